#!/usr/bin/env bash
# Models on which mixtures are judged: the frontier network of 11 layers and width 128, with 1,024 or 8,192 pieces, trained
# for several numbers of steps, then packed, read back, and scored on held-out documents and on a stream of other text.
#   PIECES=1024 JUDGE_TRAIN=DIR JUDGE_OTHER=DIR TOKENIZER_PATH=FILE bash studies/judges.sh STEPS [STEPS ...]
# JUDGE_TRAIN holds training and validation shards, JUDGE_OTHER a validation shard. Writes logs/judge<PIECES>_<STEPS>_scores.npz and
# logs/judge<PIECES>_<STEPS>_other_scores.npz; `python -m studies.judges` makes the table. On one core 2,400 steps with
# 1,024 pieces take about an hour.
set -euo pipefail
[[ ${PYTHON:-} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON   # a relative path begins where you stand
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
: "${PIECES:?1024 or 8192}" "${JUDGE_TRAIN:?the folder of the training shards}" "${JUDGE_OTHER:?the folder of the other stream}"
export DATA_PATH=$JUDGE_TRAIN TOKENIZER_PATH=${TOKENIZER_PATH:?the tokenizer of both} VOCAB_SIZE=$PIECES
# the network: the small tables only where pieces are few, as in runs/frontier.sh and runs/sp8192.sh
export NUM_LAYERS=11 MODEL_DIM=${MODEL_DIM:-128} NUM_HEADS=4 NUM_KV_HEADS=4 MLP_MULT=4
if [ "$PIECES" = 1024 ]; then
    export BIGRAM_VOCAB_SIZE=1536 BIGRAM_DIM=80 VE_LAYERS=9,10 VE_DIM=80 TABLE_GAIN_INIT=1
else
    export BIGRAM_VOCAB_SIZE=0 VE_ENABLED=0
fi
export RECUR_LAYERS=4,5 RECUR_START=0.55 PARALLEL_START_LAYER=7 SKIP_GATES=1 ATTN_GATE_DIMS=12 SMEAR_CROSSES_BOS=0
export XSA_LAST_N=11 VRL_ENABLED=0 QK_GAIN_INIT=5 ROPE_BASE_LENGTH=512
# its training
export TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 WARMDOWN_FRAC=0.667
export MUON_ROW_NORM=1 MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_WD=0.09 EMBED_WD=0.09 ADAM_WD=0.02
export AVERAGING=none LATE_QAT_THRESHOLD=0 GPTQ_TOKENS=65536 TRAIN_LOG_EVERY=100 VAL_LOSS_EVERY=0
export EVAL_SEQ_LEN=512 EVAL_STRIDE=384 EVAL_BUDGET_SECONDS=0 VAL_BATCH_SIZE=16384 SAVE_SCORES=1
for steps in "$@"; do
    name=judge${PIECES}_$steps
    RUN_ID=$name ITERATIONS=$steps MUON_MOMENTUM_WARMUP_STEPS=$((steps < 1500 ? steps / 5 : 300)) "$python" train_gpt.py
    artifact=$(ls "logs/$name".int*.ptz)
    RUN_ID=${name}_other DATA_PATH=$JUDGE_OTHER EVAL_ONLY=$artifact "$python" train_gpt.py
done
