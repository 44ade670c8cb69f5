#!/usr/bin/env bash
# The whole submission in two minutes on a laptop: a 0.9M-parameter model of the full design on the built-in corpus.
# Two ranks on two CPU cores, or one rank per GPU. Every setting can be overridden: SEED=42 bash runs/demo.sh
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

export DATA_PATH=${DATA_PATH:-$repo/data/datasets/demo_sp1024}
export TOKENIZER_PATH=${TOKENIZER_PATH:-$repo/data/tokenizers/demo_1024_bpe.model}
# a small model with every feature on
export NUM_LAYERS=${NUM_LAYERS:-5} MODEL_DIM=${MODEL_DIM:-128} NUM_HEADS=${NUM_HEADS:-4} NUM_KV_HEADS=${NUM_KV_HEADS:-2}
export VE_LAYERS=${VE_LAYERS-3,4} VE_DIM=${VE_DIM:-32} XSA_LAST_N=${XSA_LAST_N:-2}
export BIGRAM_VOCAB_SIZE=${BIGRAM_VOCAB_SIZE:-1024} BIGRAM_DIM=${BIGRAM_DIM:-32}
# small batches of short sequences: a CPU takes some hundred steps in a minute, so everything is shorter
export TRAIN_BATCH_TOKENS=${TRAIN_BATCH_TOKENS:-2048} TRAIN_SEQ_LEN=${TRAIN_SEQ_LEN:-256}
export MAX_WALLCLOCK_SECONDS=${MAX_WALLCLOCK_SECONDS:-70} WARMUP_STEPS=${WARMUP_STEPS:-2}
[[ -n ${WARMDOWN_ITERS:-} ]] || export WARMDOWN_FRAC=${WARMDOWN_FRAC:-0.75}   # rates fall over the last 75 % of the time
export TRAIN_LOG_EVERY=${TRAIN_LOG_EVERY:-50}
# in so short a run the last weights are the best (studies/averaging.py); an average that you name gets shorter, too
export AVERAGING=${AVERAGING:-none}
[[ $AVERAGING != *ema* ]] || export EMA_DECAY=${EMA_DECAY:-0.95}
[[ $AVERAGING != *swa* ]] || export SWA_EVERY=${SWA_EVERY:-5}
export MUON_MOMENTUM=${MUON_MOMENTUM:-0.95} MUON_MOMENTUM_WARMUP_STEPS=${MUON_MOMENTUM_WARMUP_STEPS:-100}
# two seconds of the clock for GPTQ: so small a model leaves bytes for codes of 8 bits, and gains little by it
export GPTQ_TOKENS=${GPTQ_TOKENS:-16384} GPTQ_RESERVE_SECONDS=${GPTQ_RESERVE_SECONDS:-2}
export TIED_EMBED_LR=${TIED_EMBED_LR:-0.03}
export EVAL_SEQ_LEN=${EVAL_SEQ_LEN:-256} EVAL_STRIDE=${EVAL_STRIDE:-64} VAL_BATCH_SIZE=${VAL_BATCH_SIZE:-16384}
export SAVE_SCORES=${SAVE_SCORES:-1}   # for `make view`: the text, coloured by what each token cost

exec "${run[@]}"
