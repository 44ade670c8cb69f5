#!/usr/bin/env bash
# PR #825: full MHA 8/8, XSA on all 11 layers, MLP 3.5x, int5 with soft-round QAT; 2-7-gram backoff with one entropy
# centre per order; score-first test-time training, scored by Polyak-averaged weights.
#   bash runs/order_adaptive.sh; SEED=42 bash runs/order_adaptive.sh; every setting likewise.
# Needs FineWeb under DATA_PATH and TOKENIZER_PATH; one rank per GPU.
#
# Two numbers come of it. The log has `final_ngram_exact`, the same method on exact counts: a valid bpb. After the run
# studies/predecessors.py replays the saved scores with the PR's hashed counts and writes what the PR reported to
# logs/<RUN_ID>_predecessors.json: a pseudo bpb, with what its "probabilities" sum to. The log's `ttt:` says that test-time
# training ran.
# Different here, and why:
#   - a chunk is scored, once, before anything learns from it, and the stream is scored in order by all ranks together
#   - int5 is 5 bits unless the file would pass 16,000,000 bytes: this model's 33M parameters then get coarser steps,
#     logged as fit_artifact coarsen (FILL_BUDGET=0: never finer ones)
#   - soft rounding is Agustsson and Theis's (arXiv 2006.09952), its hardness from 1 to 16 while the learning rate falls
#     to zero, as PR #606 introduced it to the challenge
#   - value residual, value embedding and U-Net skips of the defaults stay on; the PR's table does not name them
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
use_fineweb
export NUM_HEADS=${NUM_HEADS:-8} XSA_LAST_N=${XSA_LAST_N:-${NUM_LAYERS:-11}} MLP_MULT=${MLP_MULT:-3.5}
export NUM_KV_HEADS=${NUM_KV_HEADS:-$NUM_HEADS}
export AVERAGING=${AVERAGING:-ema_swa} QUANT_BITS=${QUANT_BITS:-5} FILL_BUDGET=${FILL_BUDGET:-0}
export QAT_ROUNDING=${QAT_ROUNDING:-soft} LATE_QAT_THRESHOLD=${LATE_QAT_THRESHOLD:-0.15}
export TTT_EPOCHS=${TTT_EPOCHS:-3} TTT_CHUNK_TOKENS=${TTT_CHUNK_TOKENS:-32768} TTT_LR=${TTT_LR:-5e-4}
export TTT_BLOCKS=${TTT_BLOCKS:-2} TTT_DECAY=${TTT_DECAY:-0.998}
export QUANTIZER=${QUANTIZER:-rows}   # as the PR: each row by itself
export NGRAM_ALPHA=${NGRAM_ALPHA:-order} SAVE_SCORES=${SAVE_SCORES:-1}
run_and_replay 825
