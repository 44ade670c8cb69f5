# Sourced by the launch scripts: start train_gpt.py on the GPUs, as many as the largest of 8, 4, 2, 1 that fits, or on
# two CPU ranks where there is none. NPROC: another number of ranks; 0: one, without torchrun, which starts seconds
# sooner. PYTHON: interpreter; else that of `make`, else python3. SCRIPT: another train_gpt.py.
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ ${NPROC:-} != 0 ]] || exec "$python" "${SCRIPT:-train_gpt.py}"
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
for ranks in 8 4 2 1; do (( gpus < ranks )) || break; done   # what the batches of the scripts divide by
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-$(( gpus > 0 ? ranks : 2 ))}" \
    "${SCRIPT:-train_gpt.py}"
