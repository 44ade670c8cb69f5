# Sourced by the launch scripts. Sets `run`, the command that starts train_gpt.py on the GPUs: on the largest of 8, 4, 2, 1
# that are there, or on two CPU ranks where there is no GPU. NPROC: another number of ranks; 0: one, without torchrun, which
# starts seconds sooner. PYTHON: interpreter; by default that of `make`, else python3. SCRIPT: another train_gpt.py.
# A run takes place where you stand: relative paths begin there, and logs/ is written there. Only what the scripts themselves
# name, train_gpt.py and the default data, is looked for in the repository, `repo`.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ $repo != "$(pwd -P)" ]] || repo=.   # short paths in the log
python=${PYTHON:-$([ -x "$repo/.venv/bin/python" ] && echo "$repo/.venv/bin/python" || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
for ranks in 8 4 2 1; do (( gpus < ranks )) || break; done   # what the batches of the scripts divide by
run=("$python" -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-$(( gpus > 0 ? ranks : 2 ))}"
    "${SCRIPT:-$repo/train_gpt.py}")
[[ ${NPROC:-} != 0 ]] || run=("$python" "${SCRIPT:-$repo/train_gpt.py}")

# use_fineweb [PIECES]: the data of the challenge in so many pieces, 1024 if not given, unless other data are named
use_fineweb() {
    local pieces=${1:-1024}
    export DATA_PATH=${DATA_PATH:-$repo/data/datasets/fineweb10B_sp$pieces}
    export TOKENIZER_PATH=${TOKENIZER_PATH:-$repo/data/tokenizers/fineweb_${pieces}_bpe.model}
}

# run_and_replay RULE: the run, then studies/predecessors.py on its scores, which says what PR #RULE would have reported. A
# run that fails or is stopped is not replayed. The exit status is the run's, or if that is 0, the study's.
run_and_replay() {
    case $SAVE_SCORES in 0 | [Ff]alse) exec "${run[@]}" ;; esac   # there will be no scores to replay
    # the log's name, as train_gpt.py chooses it: a name that is taken gets a number
    export RUN_ID=${RUN_ID:-$(date +%Y%m%d-%H%M%S)_seed${SEED:-1337}}
    local name=$RUN_ID number=1 status=0
    while [ -e "logs/$name.txt" ]; do number=$(( number + 1 )); name=${RUN_ID}_$number; done

    local stop
    for stop in TERM INT HUP QUIT; do trap "pass_on $stop" "$stop"; done
    supervise "${run[@]}" || exit
    export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}   # for `studies`
    supervise "$python" -m studies.predecessors "logs/${name}_scores.npz" --rule "$1" || exit
}

# supervise COMMAND ...: runs it to its end and returns its exit status, which after a signal is never 0. The command gets a
# process group of its own, so that Ctrl-C in a terminal reaches it through pass_on alone, and not a second time directly.
signal=
supervise() {
    local status=0
    if [ -z "$signal" ]; then
        set -m
        "$@" &
        set +m
        wait "$!" || status=$?
        [ -z "$signal" ] || { status=0; wait "$!" || status=$?; }   # the signal ended the first wait, not the command
    fi
    [ -z "$signal" ] || (( status )) || status=$(( 128 + $(kill -l "$signal") ))
    return "$status"
}

# pass_on SIGNAL: sends it to the command that runs. Only the first one is sent: a second would make torchrun leave before
# its ranks have ended.
pass_on() {
    signal=$1
    trap '' TERM INT HUP QUIT
    kill -s "$signal" "$!" 2> /dev/null || true
}
