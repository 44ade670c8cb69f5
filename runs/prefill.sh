#!/usr/bin/env bash
# PR #806: LeakyReLU(0.9)^2, GQA 8/4, SmearGate, BigramHash(2048), SWA, warm-down of 3000 steps, int6; 2-7-gram backoff
# with every rank's cache pre-filled with all earlier tokens.
#   bash runs/prefill.sh; SEED=42 bash runs/prefill.sh; every setting likewise.
# Needs FineWeb under DATA_PATH and TOKENIZER_PATH; one rank per GPU.
#
# Two numbers come of it. The log has `final_ngram_exact`, the same method on exact counts: a valid bpb. After the run
# studies/predecessors.py replays the saved scores with the PR's hashed counts and writes what the PR reported to
# logs/<RUN_ID>_predecessors.json: a pseudo bpb, with what its "probabilities" sum to.
# Different here, and why:
#   - there is nothing to pre-fill: every target sees all earlier tokens of the stream, at any number of GPUs
#   - the last weights' uniform average, SWA, is what is packed; value residual, value embedding and XSA of the defaults
#     stay on, though the PR's table does not name them
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
use_fineweb
export LEAKY_SLOPE=${LEAKY_SLOPE:-0.9} AVERAGING=${AVERAGING:-swa} WARMDOWN_ITERS=${WARMDOWN_ITERS:-3000}
export QUANTIZER=${QUANTIZER:-rows}   # as the PR: each row by itself
export NGRAM_ALPHA=${NGRAM_ALPHA:-entropy} SAVE_SCORES=${SAVE_SCORES:-1}
run_and_replay 806
