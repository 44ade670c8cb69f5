#!/usr/bin/env bash
# 8,192 pieces instead of 1,024: a token holds 1.5 times the text. The settings are those of the record
# 2026-04-29_SmearGateBOSFix_3Seed_1.06141 (PR #1851), read from its logs: no bigram and no value embedding; layers 3 to 5
# run three times from 35 % of training on; lanes from layer 8; an attention-output gate and a SmearGate that read 12
# channels. Its MLP slope and AdamW betas are our defaults. Different here: the artifact and the mixture; plain
# pieces, where the record's mark capitals (CaseOps); five skips, where the record has eight once layers repeat; SmearGate
# after the first norm, where the record has it before.
#   bash runs/sp8192.sh; SEED=42 bash runs/sp8192.sh; every setting likewise.
# Needs FineWeb in these pieces, which the first record with 8,192 of them (PR #1394) published. In a clone of the challenge:
#   rm -f data/manifest.json   # one of other data lacks these
#   MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python3 data/cached_challenge_fineweb.py --variant sp8192
# Then DATA_PATH is its data/datasets/fineweb10B_sp8192, TOKENIZER_PATH its data/tokenizers/fineweb_8192_bpe.model.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
use_fineweb 8192
export VOCAB_SIZE=${VOCAB_SIZE:-8192}
# the network
export RECUR_LAYERS=${RECUR_LAYERS-3,4,5} RECUR_TIMES=${RECUR_TIMES:-3} RECUR_START=${RECUR_START:-0.35}
export PARALLEL_START_LAYER=${PARALLEL_START_LAYER:-8} SKIP_GATES=${SKIP_GATES:-1}
export ATTN_GATE_DIMS=${ATTN_GATE_DIMS:-12}
export SMEAR_GATE_DIMS=${SMEAR_GATE_DIMS:-12} SMEAR_CROSSES_BOS=${SMEAR_CROSSES_BOS:-0}
export XSA_LAST_N=${XSA_LAST_N:-${NUM_LAYERS:-11}} VRL_ENABLED=${VRL_ENABLED:-0} QK_GAIN_INIT=${QK_GAIN_INIT:-5}
export MLP_MULT=${MLP_MULT:-4} ROPE_BASE_LENGTH=${ROPE_BASE_LENGTH:-2048}
export BIGRAM_VOCAB_SIZE=${BIGRAM_VOCAB_SIZE:-0} VE_ENABLED=${VE_ENABLED:-0}
# its training
export MUON_ROW_NORM=${MUON_ROW_NORM:-1} MATRIX_LR=${MATRIX_LR:-0.026} SCALAR_LR=${SCALAR_LR:-0.02}
export TIED_EMBED_LR=${TIED_EMBED_LR:-0.03} MUON_WD=${MUON_WD:-0.095} EMBED_WD=${EMBED_WD:-0.085} ADAM_WD=${ADAM_WD:-0.02}
export MUON_MOMENTUM=${MUON_MOMENTUM:-0.97} EMA_DECAY=${EMA_DECAY:-0.9965}
export WARMDOWN_FRAC=${WARMDOWN_FRAC:-0.75} MIN_LR=${MIN_LR:-0.1}
export LATE_QAT_THRESHOLD=${LATE_QAT_THRESHOLD:-0}
exec "${run[@]}"
