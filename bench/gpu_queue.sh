#!/usr/bin/env bash
# What to run when a GPU can be had, most valuable first: one GPU, for minutes at a time.
#
#   bash bench/gpu_queue.sh --pack ../shared/data     fill data/gpu/, beforehand, where the data are
#   bash bench/gpu_queue.sh --list                    the items and where each of them stands
#   bash bench/gpu_queue.sh --seconds 540             run from the top; called again, it goes on
#   bash bench/gpu_queue.sh loader preset             run only these
#
# An item runs in a process group of its own until its limit, which includes compiling. Then it gets SIGTERM, so that a
# training run leaves a checkpoint, and SIGKILL 45 s later. An item that fails or runs out of time doesn't end the queue. It
# is tried again by the next call, where its finished runs are kept and a stopped one resumes from its checkpoint. An item
# whose code or data are missing is skipped, with the reason. To repeat one, delete its .done and the folders of its runs.
#
# --seconds N      begin no item whose limit does not fit in what is left of N seconds (or QUEUE_SECONDS=N; 0: no limit)
# --pack FOLDER    copy compressed text, tokenizers and two older scripts to data/gpu/. --pr889 FILE adds PR
#                  #889's own script, which is never committed; --wheels FOLDER packs wheels for the item fa4
# QUEUE_LIMIT=N    replaces the limit of every item, for the last minutes of a machine
# QUEUE_BEST=run   which kind of run `long` trains: preset (default), sp8192, defaults
# QUEUE_TINY=1     tiny models, texts and times: all of the queue on a CPU in three to five minutes
# QUEUE_DATA, QUEUE_DIR, OUT, PYTHON: other places than data/gpu, logs/gpu_queue, the same, and .venv/bin/python or python3
#
# Results: $OUT gets <item>.log, written as it goes, summary.txt, the logs of all runs in runs.tar.gz, and what `long` made.
# A lent machine may empty $OUT before each command. So what the next call needs stays in logs/gpu_queue/: the runs with
# their checkpoints, the compilers' one cache, and <item>.done for each finished item.
#
# Where a machine is lent for single commands, let only the first one carry data/gpu: to carry it again takes the time of 57
# MB and removes what was unpacked. The wheels lie in parts, data/gpu_wheels/1of2 and so on, each for a command of its own.
set -euo pipefail

# item | limit in seconds | the question that it answers
ITEMS="
works    | 150 | Does it still work on CUDA? Kernel tests; the defaults stopped by SIGTERM, resumed, scored whole
loader   | 400 | What is a random order of windows worth at full size? The same network with the old loader and with ours
steptime | 120 | ms per step of the defaults as they are, and without Inductor's mix-order reduction (5.9 ms in the field)
pr889    | 150 | Is our step as fast as PR #889's own script on the same GPU and batch?
preset   | 420 | How far is the frontier preset ahead of the defaults at equal time, with the new loader?
sp8192   | 420 | Does a vocabulary of 8,192 pieces beat the preset on the same text in the same seconds?
lanes    | 420 | Are lanes that write across better than the preset's former ones, and than none? (small runs: a gain in 11 layers, a loss in 5)
decay04  | 260 | Is a weight decay of 0.04 better than the preset's 0.09, as our files are full in any case?
decay06  | 260 | The same, for 0.06
larger   | 300 | Is a larger model in the same bytes better? One with wider MLPs, whose weights have fewer bits
wider    | 300 | The same, for a model of width 576
ttt      | 200 | What does learning at evaluation, as in PR #825, add to one artifact, with and without the mixture?
adapters | 300 | What do adapters per document add to it, small ones and as large as the records', and how long do they take?
fa4      | 200 | Is FlashAttention 4 faster than torch's own attention? If so, requirements-gpu.txt should name it
long     | 480 | 600 s of the best preset, in two calls: stopped at 480 s with a checkpoint, resumed by the next
momentum | 260 | Is MUON_MOMENTUM 0.97 better than 0.99? (0.0004 to 0.0008 in the field)
minlr    | 260 | Are rates that end at 5 % better than at 0? (0.001 in the field)
taper    | 260 | Does halving Muon's decay towards the end help?
gain     | 260 | Is QK gain 5.25 better than 5? (0.0002 in the field)
slope    | 260 | Is a slope of 0.3 better than 0.5? (0.0007 in the field)
window   | 120 | Does scoring in windows of 2,560 tokens help? The same artifact, trained on 2,048
"
OLD_LOADER=2d8162d   # the last revision whose batches went on where the last one ended
OLD_LANES=aaba28b    # the last one whose attention and MLP wrote to a lane of their own
GRACE=45             # seconds from SIGTERM to SIGKILL
MOST=$((64 << 20))   # bytes that one call can take to a lent machine, this repository included

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
DATA=$(absolute "${QUEUE_DATA:-$ROOT/data/gpu}")
TINY=${QUEUE_TINY:-}; [[ $TINY != 0 ]] || TINY=
STATE=$(absolute "${QUEUE_DIR:-$ROOT/logs/gpu_queue${TINY:+_tiny}}")
RESULTS=$(absolute "${OUT:-$STATE}")
UNPACKED=$DATA/unpacked${TINY:+_tiny}
WHEELS=${DATA}_wheels
PYTHON=${PYTHON:-$([[ -x $ROOT/.venv/bin/python ]] && echo "$ROOT/.venv/bin/python" || echo python3)}
found=$(command -v "$PYTHON") || { echo "PYTHON=$PYTHON: no such program" >&2; exit 2; }
PYTHON=$(absolute "$found")

# What everything runs with. NPROC=0: one process, without torchrun.
export PYTHON NPROC=0 SCRIPT=$ROOT/train_gpt.py PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=$STATE/compiled/inductor TRITON_CACHE_DIR=$STATE/compiled/triton
export DATA_PATH=$UNPACKED/fineweb TRAIN_DATA_PATH=$UNPACKED/docs
export TOKENIZER_PATH=$DATA/fineweb_sample/fineweb_1024_bpe.model
BATCH=98304 WHOLE_BATCH=786432   # tokens: what one GPU of eight gets, and what all of them do
STEP_SECONDS=110   # of training in each run that is compared with others
LONG_SECONDS=600
WINDOW=2048 STRIDE=64
if [[ $TINY ]]; then
    BATCH=512 WHOLE_BATCH=1024 STEP_SECONDS=2 LONG_SECONDS=4 WINDOW=64 STRIDE=16
    export COMPILE=0 OMP_NUM_THREADS=1 NUM_LAYERS=4 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=8 VE_LAYERS=2,3
    export VE_DIM=8 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 TRAIN_SEQ_LEN=64 EVAL_SEQ_LEN=64 VAL_BATCH_SIZE=4096 WARMUP_STEPS=1
    export GPTQ_TOKENS=1024 TTT_CHUNK_TOKENS=4096
fi

say() { printf '%s\n' "$*"; }

# --- runs -----------------------------------------------------------------------------------------

# launch KIND: train_gpt.py with the settings of that kind of run
launch() {
    case $1 in
        defaults) exec "$PYTHON" "$SCRIPT" ;;
        old_loader) exec "$PYTHON" "$DATA/train_gpt_old_loader.py" ;;
        old_lanes)   # this script always enlarges RoPE's base; with this one it is 10,000 for 2,048 tokens, as in the preset
            export SCRIPT=$DATA/train_gpt_old_lanes.py ROPE_BASE=4528.6
            launch preset ;;
        preset)
            [[ ! $TINY ]] || export RECUR_LAYERS=1 PARALLEL_START_LAYER=2
            exec bash runs/frontier.sh ;;
        sp8192)
            export DATA_PATH=$UNPACKED/fineweb_8192 TRAIN_DATA_PATH=$UNPACKED/docs_8192
            export TOKENIZER_PATH=$DATA/fineweb_8192_bpe.model
            [[ ! $TINY ]] || export RECUR_LAYERS=1 PARALLEL_START_LAYER=2
            exec bash runs/sp8192.sh ;;
    esac
}

# train NAME KIND [SETTING=VALUE ...]: a run in a folder of its own, unless it is done; a stopped one is resumed
train() {
    local name=$1 kind=$2 folder=$STATE/$1 checkpoint
    shift 2
    [[ ! -e $folder/done ]] || { say "$name: done before"; return; }
    mkdir -p "$folder/logs"
    ln -sfn "$ROOT/runs" "$folder/runs"
    checkpoint=$(newest "$folder"/logs/*.ckpt)
    say "$name: ${checkpoint:+resumes $(basename "$checkpoint"), }$kind $*"
    (
        cd "$folder"
        echo "$BASHPID" >pid   # of the run itself, as `launch` replaces this subshell
        export RUN_ID=$name RESUME=$checkpoint "$@"
        launch "$kind"
    )
    touch "$folder/done"
    rm -f "$folder"/logs/*.ckpt
}

# score NAME RUN KIND [SETTING=VALUE ...]: score the artifact of RUN again
score() { train "$1" "$3" EVAL_ONLY="$(artifact "$2")" "${@:4}"; }
artifact() { newest "$STATE/$1"/logs/*.int*.ptz; }
newest() {  # of the files named; nothing if there are none
    local file found=
    for file in "$@"; do
        if [[ -e $file && ( ! $found || $file -nt $found ) ]]; then found=$file; fi
    done
    say "$found"
}

# for_seconds SECONDS AVERAGE: settings for a run of so many seconds. What is a number of steps was chosen for 600 s and
# shrinks with the time; 1 - EMA_DECAY, AVERAGE in 600 s, grows. Late QAT would only compile more graphs.
for_seconds() {
    say "MAX_WALLCLOCK_SECONDS=$1 LATE_QAT_THRESHOLD=0 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=100 TRAIN_BATCH_TOKENS=$BATCH"
    awk -v part="$(("$1" * 1000 / 600))" -v average="$2" 'BEGIN {
        decay = 1 - average * 1000 / part
        if (decay < 0) decay = 0
        printf "WARMDOWN_ITERS=%d MUON_MOMENTUM_WARMUP_STEPS=%d EMA_DECAY=%.5f\n", 3.5 * part, 1.5 * part, decay
    }'
}
average_of() { case $1 in defaults | old_loader) say 0.003 ;; *) say 0.0035 ;; esac; }
unmixed() { say "EVAL_STRIDE=$WINDOW NGRAM_ENABLED=0"; }   # windows without overlap

# compared NAME KIND [SETTING=VALUE ...]: a run that is compared with others: equal text, seconds and share of the batch
compared() { train "$1" "$2" $(for_seconds "$STEP_SECONDS" "$(average_of "$2")") $(unmixed) "${@:3}"; }
# on_docs RUN KIND: its held-out documentation; not compiled, as that would take longer than scoring does
on_docs() { score "$1_docs" "$1" "$2" $(unmixed) DATA_PATH="$UNPACKED/docs" COMPILE=0; }

needs_data() { [[ -d $UNPACKED ]] || queue_part unpack "$DATA" "$UNPACKED" ${TINY:+--tiny}; }
queue_part() { PYTHONPATH=$ROOT "$PYTHON" "$ROOT/bench/gpu_queue.py" "$@"; }
bench_step() { (cd "$ROOT" && "$PYTHON" -m bench.step "$@"); }

# --- items: item_NAME does the work; missing_NAME says why it cannot be done, by default missing_text ---

missing_script() { [[ -e $DATA/$1 ]] || say "no $DATA/$1, an older script: --pack"; }
missing_text() { [[ -e $DATA/docs/docs_train_000000.bin.xz ]] || say "no text in $DATA: --pack"; }

item_works() {
    (cd "$ROOT" && "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_kernels.py ${TINY:+-k mlp_of_zeros})
    needs_data
    [[ -d $UNPACKED/short ]] || queue_part shorten "$UNPACKED"/{fineweb,short}
    local folder=$STATE/works settings=(DATA_PATH="$UNPACKED/short" LATE_QAT_THRESHOLD=0 TRAIN_BATCH_TOKENS="$BATCH")
    if [[ ! $(newest "$folder"/logs/*.ckpt) ]]; then
        train works defaults "${settings[@]}" ITERATIONS=1000000 &
        until grep -q '^step:10/' "$folder"/logs/works*.txt 2>/dev/null; do
            kill -0 $! 2>/dev/null || break   # it has ended by itself, without a checkpoint
            sleep 0.2
        done
        kill -TERM "$(<"$folder/pid")" || true
        wait $! || true
        ls "$folder"/logs/*.ckpt
    fi
    local stopped_at
    stopped_at=$(sed -nE 's/^error: Stopped: step:([0-9]+).*/\1/p' "$folder"/logs/works*.txt | tail -n 1)
    train works defaults "${settings[@]}" ITERATIONS=$((stopped_at < 20 ? 40 : stopped_at + 20))
}

item_loader() {
    needs_data
    compared old_loader old_loader
    on_docs old_loader old_loader
    compared defaults defaults
    on_docs defaults defaults
}
missing_loader() {
    missing_text
    missing_script train_gpt_old_loader.py
}

missing_steptime() { :; }   # it needs no data
item_steptime() { TRAIN_BATCH_TOKENS=$BATCH bench_step --steps 10 --rounds 3 --only "as it is" "mix-order reduction off"; }

# The pull request's script divides a batch into eight parts on one GPU, as ours does. It needs FlashAttention 3; where that
# is not installed, a stand-in gives both scripts torch's own attention. It runs between two measurements of ours.
item_pr889() {
    local folder=$STATE/pr889 ours=(--steps 5 --rounds 3 --only "as it is")
    needs_data
    mkdir -p "$folder/site"
    rm -f "$folder/log"
    "$PYTHON" -c 'import flash_attn_interface' 2>/dev/null || cat >"$folder/site/flash_attn_interface.py" <<'PYTHON'
import torch.nn.functional as F


def flash_attn_func(q, k, v, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)
PYTHON
    export TRAIN_BATCH_TOKENS=$WHOLE_BATCH
    bench_step "${ours[@]}"
    (
        cd "$folder"
        export PYTHONPATH=$folder/site DATA_PATH=$TRAIN_DATA_PATH
        export ITERATIONS=1000000 TRAIN_LOG_EVERY=20 VAL_LOSS_EVERY=0 WARMUP_STEPS=2 MAX_WALLCLOCK_SECONDS=600
        exec "$PYTHON" "$DATA/pr889_train_gpt.py" >log 2>&1
    ) &
    until grep -q '^step:60/' "$folder/log" 2>/dev/null; do
        kill -0 $! 2>/dev/null || { tail -n 20 "$folder/log"; return 1; }
        sleep 0.2
    done
    kill -KILL $!
    wait $! || true
    sed -nE 's/^step:([0-9]+).*train_time:([0-9.]+)ms.*/\1 \2/p' "$folder/log" | awk '
        $1 == 20 { begun = $2 }
        $1 == 60 { printf "PR #889: %.2f ms per step, steps 21 to 60\n", ($2 - begun) / 40 }'
    bench_step "${ours[@]}"
}
missing_pr889() {
    missing_text
    [[ -e $DATA/pr889_train_gpt.py ]] || say "no $DATA/pr889_train_gpt.py: --pack … --pr889 FILE"
}

item_preset() {
    needs_data
    compared preset preset
    on_docs preset preset
    compared defaults defaults   # done before, if `loader` ran on this machine
    on_docs defaults defaults
}

# Scored on the same bytes of FineWeb as the preset, so bits per byte compare.
item_sp8192() {
    needs_data
    needs_8192
    compared sp8192 sp8192
    compared preset preset
}
needs_8192() {
    local text
    for text in docs fineweb; do
        [[ ! -d $UNPACKED/${text}_8192 ]] || continue
        rm -rf "$UNPACKED/part"
        "$PYTHON" "$DATA/retokenize.py" "$DATA/fineweb_8192_bpe.model" "$UNPACKED/part" "$UNPACKED/$text"/*.bin
        mv "$UNPACKED/part" "$UNPACKED/${text}_8192"
    done
}
missing_sp8192() {
    missing_text
    [[ -e $DATA/fineweb_8192_bpe.model && -e $DATA/retokenize.py ]] || say "no tokenizer of 8,192 pieces in $DATA: --pack"
}

item_lanes() {
    needs_data
    compared old_lanes old_lanes
    compared preset_no_lanes preset PARALLEL_START_LAYER=0
    compared preset preset
}
missing_lanes() { missing_text; missing_script train_gpt_old_lanes.py; }

# candidate NAME SETTING=VALUE ...: the preset with these settings, and as it is
candidate() { needs_data; compared "preset_$1" preset "${@:2}"; compared preset preset; }
item_decay04() { candidate decay04 MUON_WD=0.04 EMBED_WD=0.04; }
item_decay06() { candidate decay06 MUON_WD=0.06 EMBED_WD=0.06; }
item_larger() { candidate larger MLP_MULT=5; }
item_wider() { candidate wider MODEL_DIM=576; }
item_momentum() { candidate momentum MUON_MOMENTUM=0.97; }
item_minlr() { candidate minlr MIN_LR=0.05; }
item_taper() { candidate taper WD_TAPER_FINAL_MULT=0.5; }
item_gain() { candidate gain QK_GAIN_INIT=5.25; }
item_slope() { candidate slope LEAKY_SLOPE=0.3; }

item_window() {
    local length
    needs_data
    for length in 2048 2560; do score "preset_window_$length" preset preset EVAL_SEQ_LEN=$length EVAL_STRIDE="$STRIDE"; done
}
missing_window() { missing_text; [[ $(artifact preset) ]] || say "no artifact: the item preset leaves one"; }

item_ttt() {
    local run settings=(EVAL_STRIDE="$STRIDE")
    run=$([[ $(artifact preset) ]] && say preset || say defaults)
    needs_data
    score "${run}_overlapping" "$run" "$run" "${settings[@]}"
    score "${run}_ttt" "$run" "$run" "${settings[@]}" TTT_EPOCHS=3
}
item_adapters() {
    local run
    run=$([[ $(artifact preset) ]] && say preset || say defaults)
    needs_data
    # apart: documents without learning, what the other two are compared with
    score "${run}_apart" "$run" "$run" TTT_LORA_RANK=1 TTT_LORA_LR=0
    score "${run}_adapters_8" "$run" "$run" TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 TTT_LORA_LR=1e-3
    score "${run}_adapters_96" "$run" "$run" TTT_LORA_RANK=96 TTT_LORA_ALPHA=144 TTT_LORA_LR=1e-4
}
missing_adapters() { missing_ttt; }
missing_ttt() {
    missing_text
    [[ $(artifact preset)$(artifact defaults) ]] || say "no artifact: the item preset or loader leaves one"
}

item_fa4() {
    local site=$STATE/site
    if [[ ! -d $site ]]; then
        mkdir -p "$STATE/wheels"
        cat "$WHEELS"/*/part | tar -x -C "$STATE/wheels"
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site.part" "$STATE"/wheels/*.whl
        mv "$site.part" "$site"
    fi
    export PYTHONPATH=$site
    queue_part attention
    TRAIN_BATCH_TOKENS=$BATCH bench_step --steps 10 --rounds 3 --only "as it is" "FlashAttention 4"
}
missing_fa4() {
    [[ ! -d $STATE/site ]] || return 0
    local parts=("$WHEELS"/*of*/part) all
    all=${parts[0]%/part} all=${all##*of}
    if [[ ! -e ${parts[0]} ]]; then
        say "no wheels of flash-attn-4 in $WHEELS: --pack … --wheels FOLDER"
    elif ((${#parts[@]} < all)); then
        say "${#parts[@]} of $all parts of the wheels are here: carry the others too, one in each call"
    fi
}

item_long() {
    local kind=${QUEUE_BEST:-preset}
    needs_data
    [[ $kind != sp8192 ]] || needs_8192
    train long "$kind" $(for_seconds "$LONG_SECONDS" "$(average_of "$kind")") EVAL_STRIDE="$STRIDE" SAVE_SCORES=1
    cp -f "$(artifact long)" "$STATE"/long/logs/*_scores.npz "$RESULTS"
}

# --- the queue ------------------------------------------------------------------------------------

names() { sed -nE 's/^([a-z0-9]+) +\|.*/\1/p' <<<"$ITEMS"; }
field() { sed -nE "s/^$1 +\| ([0-9]+) \| (.*)/\\$2/p" <<<"$ITEMS"; }   # field NAME 1: the limit; 2: the question
limit() { say "${QUEUE_LIMIT:-$([[ $TINY ]] && say 60 || field "$1" 1)}"; }
state() {   # of the item NAME, in words
    local reasons=
    if declare -F "missing_$1" >/dev/null; then reasons=$("missing_$1"); else reasons=$(missing_text); fi
    if [[ -e $STATE/$1.done ]]; then
        say "done, $(<"$STATE/$1.done")"
    elif [[ $reasons ]]; then
        say "skipped: ${reasons%%$'\n'*}"
    elif [[ -e $STATE/$1.stopped ]]; then
        say "to go on: $(<"$STATE/$1.stopped")"
    else
        say "to do"
    fi
}

list() {
    local name
    for name in $(names); do
        printf '%-8s %4s s  %s\n%-15s%s\n' "$name" "$(limit "$name")" "$(field "$name" 2)" "" "$(state "$name")"
    done
}

child= is_stopped=
stop() { is_stopped=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true; }

# run_item NAME: until its limit, in a process group of its own; 0 if it is done
run_item() {
    local name=$1 log=$RESULTS/$1.log began=$SECONDS status=0 facts
    say "$name: $(field "$name" 2)"
    timeout --signal=TERM --kill-after="$GRACE" "$(limit "$name")" \
        bash "${BASH_SOURCE[0]}" --inside "$name" </dev/null >>"$log" 2>&1 &
    child=$!
    while wait "$child" && status=0 || status=$?; kill -0 "$child" 2>/dev/null; do
        :   # a signal to this script has interrupted `wait`
    done
    child=
    facts="$(date -u +%FT%TZ) after $((SECONDS - began)) s, $log"
    rm -f "$STATE/$name.stopped"
    case $status in
        0) say "$facts" >"$STATE/$name.done" ;;
        124 | 137) say "stopped $facts" >"$STATE/$name.stopped" ;;
        *) say "failed with status $status $facts" >"$STATE/$name.stopped"; tail -n 5 "$log" | sed 's/^/    /' ;;
    esac
    say "    $(state "$name")"
    keep_results
    return "$status"
}

keep_results() {
    queue_part summary "$STATE" >"$RESULTS/summary.txt" || true
    [[ $RESULTS == "$STATE" ]] || (cd "$STATE" && tar -czf "$RESULTS/runs.tar.gz" */logs/*.txt) 2>/dev/null || true
}

run_queue() {   # run_queue SECONDS NAME ...
    local most=$1 name reason failed=0 left
    shift
    mkdir -p "$STATE" "$RESULTS"
    trap stop TERM INT
    if [[ ! $TINY ]] && ! nvidia-smi -L && ! "$PYTHON" -c 'import torch; torch.cuda.get_device_name()'; then
        say "there is no GPU; QUEUE_TINY=1 tries the queue on a CPU" >&2
        return 2
    fi
    for name in "$@"; do
        reason=$(state "$name")
        left=$((most - SECONDS))
        if [[ $reason == done* || $reason == skipped* ]]; then
            say "$name: $reason"
        elif ((most && $(limit "$name") > left)); then
            say "$name: not begun, its limit is $(limit "$name") s and $left s are left"
        else
            run_item "$name" || failed=1
        fi
        [[ ! $is_stopped ]] || { say "stopped by a signal; called again, the queue goes on"; return 1; }
    done
    [[ ! -s $RESULTS/summary.txt ]] || cat "$RESULTS/summary.txt"
    return "$failed"
}

# --- packing --------------------------------------------------------------------------------------

pack() {   # pack SHARED PR889 WHEELS, the last two may be empty
    local shared=$1 size tree
    mkdir -p "$DATA/docs" "$DATA/fineweb_sample"
    rm -rf "$DATA"/unpacked*
    cp -f "$shared"/docs/docs_train_00000[0-3].bin.xz "$shared"/docs/docs_val_000000.bin.xz "$DATA/docs/"
    cp -f "$shared"/fineweb_sample/* "$DATA/fineweb_sample/"
    cp -f "$shared"/fineweb_8192_bpe.model "$shared"/retokenize.py "$DATA/" || say "goes without 8,192 pieces"
    chmod -R u+w "$DATA"
    pack_script "$OLD_LOADER" train_gpt_old_loader.py
    pack_script "$OLD_LANES" train_gpt_old_lanes.py
    [[ ! $2 ]] || cp -f "$2" "$DATA/pr889_train_gpt.py"
    [[ ! $3 ]] || pack_wheels "$3"
    size=$(find "$DATA" -type f -printf '%s\n' | awk '{ n += $1 } END { print n + 0 }')
    tree=$(cd "$ROOT" && git ls-files -coz --exclude-standard | xargs -0 cat 2>/dev/null | wc -c) || true
    say "$DATA: $size bytes; with the repository's $tree that is $((size + tree)) of $MOST"
    ((size + tree <= MOST)) || { say "error: more than one call can carry; remove a file of $DATA/docs" >&2; return 1; }
}

pack_script() {   # pack_script REVISION NAME
    git -C "$ROOT" show "$1:train_gpt.py" >"$DATA/$2" || { rm "$DATA/$2"; say "goes without $2: there is no revision $1"; }
}

pack_wheels() {   # in parts of 52 MiB: each is carried by a call of its own, as a wheel can be larger than a call takes
    local part number=0 parts
    rm -rf "$WHEELS"
    mkdir -p "$WHEELS"
    (cd "$1" && tar -c -- *.whl) | split -b 52M - "$WHEELS/part"
    parts=("$WHEELS"/part*)
    for part in "${parts[@]}"; do
        number=$((number + 1))
        mkdir "$WHEELS/${number}of${#parts[@]}"
        mv "$part" "$WHEELS/${number}of${#parts[@]}/part"
    done
    say "$WHEELS: ${#parts[@]} parts of wheels"
}

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

main() {
    local seconds=${QUEUE_SECONDS:-0} shared= pr889= wheels= chosen=() name
    while (($#)); do
        case $1 in
            --help | -h) usage; return ;;
            --list) list; return ;;
            --inside) trap 'wait; exit 124' TERM; "item_$2"; return ;;
            --seconds) seconds=$2; shift ;;
            --pack) shared=$2; shift ;;
            --pr889) pr889=$2; shift ;;
            --wheels) wheels=$2; shift ;;
            *) names | grep -qx -- "$1" || { say "no item or option $1; items: $(names | xargs)" >&2; return 2; }
                chosen+=("$1") ;;
        esac
        shift
    done
    if [[ $shared ]]; then pack "$shared" "$pr889" "$wheels"; return; fi
    [[ ${chosen[*]-} ]] || mapfile -t chosen < <(names)
    run_queue "$seconds" "${chosen[@]}"
}

main "$@"
