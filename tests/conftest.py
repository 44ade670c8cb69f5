"""Shared by all tests: a small corpus in the challenge's format, small settings, fresh random numbers."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))

import sentencepiece as spm  # noqa: E402

from train_gpt import Hyperparameters  # noqa: E402

torch.set_num_threads(1)

TINY = dict(  # a model with every feature on that takes milliseconds
    NUM_LAYERS=4, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=8, MLP_MULT=2, VE_LAYERS="2,3", VE_DIM=16,
    XSA_LAST_N=2, BIGRAM_VOCAB_SIZE=128, BIGRAM_DIM=16, VOCAB_SIZE=512, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=512,
    EVAL_SEQ_LEN=32, EVAL_STRIDE=8, VAL_BATCH_SIZE=1024, WARMUP_STEPS=1, ITERATIONS=12, WARMDOWN_ITERS=6,
    TRAIN_LOG_EVERY=1, LATE_QAT_THRESHOLD=0.3, MAX_WALLCLOCK_SECONDS=0, EMA_DECAY=0.9, TIED_EMBED_LR=0.01,
    RUN_ID="test")


def tiny(**changes) -> Hyperparameters:
    return Hyperparameters.from_env({k: str(v) for k, v in {**TINY, **changes}.items()})


@pytest.fixture
def rng():
    """Random numbers drawn fresh at each run; the seed is shown when a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"rng seed: {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def write_shard(path: Path, tokens) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a real but small text: this Python's language reference, 512 pieces."""
    from pydoc_data.topics import topics

    from prepare_demo import train_tokenizer
    folder = tmp_path_factory.mktemp("corpus")
    texts = [topics[name] for name in sorted(topics)]
    model = train_tokenizer(texts, 512)
    (folder / "tiny.model").write_bytes(model)
    sp = spm.SentencePieceProcessor(model_proto=model)
    ids = [[1, *sp.encode(t)] for t in texts]
    train, val = sum(ids[:40], []), sum(ids[40:], [])[:6001]
    for i, part in enumerate(np.array_split(np.array(train), 3)):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part)
    write_shard(folder / "fineweb_val_000000.bin", val)
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tiny.model"))


def run_script(cwd: Path, ranks: int = 1, script: Path = ROOT / "train_gpt.py", **env) -> subprocess.CompletedProcess:
    """train_gpt.py as users start it: under torchrun, or plainly with ranks=0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV")}
    settings = {k: str(v) for k, v in {**TINY, **env}.items()}
    env = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **settings}
    return subprocess.run([sys.executable, *launcher, str(script)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=240)


def values(log: str, line_start: str) -> dict[str, str]:
    """key:value pairs of the last line of `log` that starts with `line_start`."""
    line = [line for line in log.splitlines() if line.startswith(line_start)][-1]
    return dict(pair.split(":", 1) for pair in line.split() if ":" in pair)
