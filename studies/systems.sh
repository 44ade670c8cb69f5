#!/usr/bin/env bash
# The table of systems in docs/predecessors.md: the four launch scripts at demo size on the built-in corpus, the same
# training time, three seeds each. Writes logs/systems/<system>_seed<seed>.txt and, for the three predecessors, what their
# hashed counts report, logs/systems/<system>_seed<seed>_predecessors.json. On two CPU cores about a quarter of an hour.
set -euo pipefail
[[ ${PYTHON:-} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON   # a relative path begins where you stand
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export DATA_PATH=data/datasets/demo_sp1024 TOKENIZER_PATH=data/tokenizers/demo_1024_bpe.model
export NUM_LAYERS=5 MODEL_DIM=128 NUM_HEADS=4 VE_LAYERS=3,4 VE_DIM=32 BIGRAM_VOCAB_SIZE=1024 BIGRAM_DIM=32
export TRAIN_BATCH_TOKENS=2048 TRAIN_SEQ_LEN=256 MAX_WALLCLOCK_SECONDS=${MAX_WALLCLOCK_SECONDS:-30} WARMUP_STEPS=2
export TRAIN_LOG_EVERY=50 MUON_MOMENTUM=0.95
export MUON_MOMENTUM_WARMUP_STEPS=100 TIED_EMBED_LR=0.03 EVAL_SEQ_LEN=256 EVAL_STRIDE=64 VAL_BATCH_SIZE=16384
mkdir -p logs/systems
# what a script sets for layers or heads that this model has not; its averages and its warm-down, for fewer steps
declare -A own=(
    [backoff]="NUM_KV_HEADS=2 XSA_LAST_N=2 EMA_DECAY=0.95 SWA_EVERY=5 WARMDOWN_ITERS=100"
    [order_adaptive]="NUM_KV_HEADS=4 XSA_LAST_N=5 EMA_DECAY=0.95 SWA_EVERY=5 WARMDOWN_ITERS=100"
    [prefill]="NUM_KV_HEADS=2 XSA_LAST_N=2 SWA_EVERY=5 WARMDOWN_ITERS=100"
    [frontier]="NUM_KV_HEADS=2 XSA_LAST_N=5 EMA_DECAY=0.95 RECUR_LAYERS=2 PARALLEL_START_LAYER=3"
)
for system in backoff order_adaptive prefill frontier; do
    for seed in 42 1337 2025; do
        name=${system}_seed$seed
        rm -f "logs/$name.txt" "logs/${name}_predecessors.json"
        env ${own[$system]} SEED=$seed RUN_ID=$name bash runs/$system.sh
        mv "logs/$name.txt" logs/systems/
        [ $system = frontier ] || mv "logs/${name}_predecessors.json" logs/systems/
    done
done
"$PYTHON" -m record systems logs/systems/*.txt
