#!/usr/bin/env bash
# Ours: the best public network of the challenge without eval-time training (PR #1435, 1.0980 bpb neural), which is PR
# #889's plus depth recurrence, two residual lanes, skip gates, MuonEq-R and other rates; the lanes, the attention-output
# gate and the SmearGate of later records; finer steps, for the bytes that #1435 leaves; exact counts with learned weights.
#   bash runs/frontier.sh; SEED=42 bash runs/frontier.sh; every setting likewise. TTT_EPOCHS=3 (as #825) or
#   TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 TTT_LORA_LR=1e-3 (adapters per document): it learns while it scores.
# Needs FineWeb under DATA_PATH and TOKENIZER_PATH; one rank per GPU.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
use_fineweb
# the network
export RECUR_LAYERS=${RECUR_LAYERS-4,5} RECUR_START=${RECUR_START:-0.55}
export PARALLEL_START_LAYER=${PARALLEL_START_LAYER:-7} SKIP_GATES=${SKIP_GATES:-1}
export ATTN_GATE_DIMS=${ATTN_GATE_DIMS:-12} SMEAR_CROSSES_BOS=${SMEAR_CROSSES_BOS:-0}
export ROPE_BASE_LENGTH=${ROPE_BASE_LENGTH:-2048}   # the base is 10,000 for windows of 2,048 tokens
export XSA_LAST_N=${XSA_LAST_N:-${NUM_LAYERS:-11}} VRL_ENABLED=${VRL_ENABLED:-0} QK_GAIN_INIT=${QK_GAIN_INIT:-5}
export TABLE_GAIN_INIT=${TABLE_GAIN_INIT:-1} MLP_MULT=${MLP_MULT:-4}
export BIGRAM_VOCAB_SIZE=${BIGRAM_VOCAB_SIZE:-1536} BIGRAM_DIM=${BIGRAM_DIM:-112}
# its training
export MUON_ROW_NORM=${MUON_ROW_NORM:-1} MATRIX_LR=${MATRIX_LR:-0.02} SCALAR_LR=${SCALAR_LR:-0.02}
export TIED_EMBED_LR=${TIED_EMBED_LR:-0.03} MUON_WD=${MUON_WD:-0.09} EMBED_WD=${EMBED_WD:-0.09} ADAM_WD=${ADAM_WD:-0.02}
export WARMDOWN_FRAC=${WARMDOWN_FRAC:-0.667} EMA_DECAY=${EMA_DECAY:-0.9965}
export LATE_QAT_THRESHOLD=${LATE_QAT_THRESHOLD:-0}
exec "${run[@]}"
