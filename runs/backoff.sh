#!/usr/bin/env bash
# PR #889: 11 layers, GQA 8/4, VRL, value embedding, int6; 2-7-gram backoff, weight by the model's entropy.
#   bash runs/backoff.sh; SEED=42 bash runs/backoff.sh; every setting likewise.
# Needs FineWeb under DATA_PATH and TOKENIZER_PATH; one rank per GPU.
#
# Two numbers come of it. The log has `final_ngram_exact`, the same method on exact counts: a valid bpb. After the run
# studies/predecessors.py replays the saved scores with the PR's counts, which lie in two independent hash tables, and writes
# what the PR reported to logs/<RUN_ID>_predecessors.json: a pseudo bpb, with what its "probabilities" sum to.
# Different here, and why:
#   - one cache over the whole stream, not one per rank, so that the score does not depend on the number of GPUs
#   - SWA is used: AVERAGING packs the middle of EMA and SWA. The PR collected SWA and packed EMA
#   - late QAT works: it is an argument of the loss, not a class attribute that a compiled graph has already read
#   - each target is scored once; the PR scored the last 64 tokens 32 times, after they had entered its cache
#   - the file is never over 16,000,000 bytes and holds no pickle; its codes are packed by lzma as in the PR
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
use_fineweb
export AVERAGING=${AVERAGING:-ema_swa} EMA_DECAY=${EMA_DECAY:-0.997} SWA_EVERY=${SWA_EVERY:-50}
export QUANT_BITS=${QUANT_BITS:-6} LATE_QAT_THRESHOLD=${LATE_QAT_THRESHOLD:-0.15}
export QUANTIZER=${QUANTIZER:-rows} CODER=${CODER:-lzma}   # as the PR: each row by itself, codes through lzma
export NGRAM_ALPHA=${NGRAM_ALPHA:-entropy} SAVE_SCORES=${SAVE_SCORES:-1}
run_and_replay 889
