"""What several test modules use: small settings, data, models, training, and runs of the script.
Fixtures are in conftest.py."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import torch

import train_gpt as t
from tests.preloaded import Run

ROOT = Path(__file__).resolve().parents[1]

# What `make test T=<section>` runs: a section of train_gpt.py, or a folder beside it -> test files
SECTIONS = {
    "settings": "settings bounds source",
    "runtime": "runtime ranks ranks_of_hosts",
    "data": "data stream demo_corpus",
    "model": "model frontier sp8192",
    "kernels": "kernels",
    "rounding": "artifact gptq quantizers",
    "optimizers": "optimizer ranks",
    "training": "training clocks optimizer frontier ranks",
    "curvature": "gptq clocks",
    "artifact": "artifact load coders gptq quantizers",
    "scoring": "scoring",
    "ttt": "ttt adapters",
    "mixture": "mixture ngram decodable predecessors",
    "run": "script dry_run faults clocks ranks systems launch",
    "record": "record foreign copy tampering rescore prose figures compare",
    "examples": "examples",
    "bench": "bench studies gpu_queue",  # studies/ and tools/ too
}

# --- random numbers and the order of tests --------------------------------------------------------


def number_from_environment(name: str) -> str:
    """Empty if 0 or unset; 1 becomes a new number, which the workers of pytest-xdist and what tests
    start inherit."""
    if os.environ.get(name) == "1":
        os.environ[name] = str(int.from_bytes(os.urandom(4), "little") + 2)
    return os.environ.get(name, "0").removeprefix("0")


FRESH = number_from_environment("FRESH")
SHUFFLE = number_from_environment("SHUFFLE")


def seed_of(name: str) -> int:
    """The same on every machine and in any order of tests, unless FRESH."""
    return zlib.crc32(f"{FRESH} {name}".encode())


# --- settings -------------------------------------------------------------------------------------

TINY = dict(  # a model with every feature on that takes milliseconds
    NUM_LAYERS=4,
    MODEL_DIM=64,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    ROPE_DIMS=8,
    MLP_MULT=2,
    VE_LAYERS="2,3",
    VE_DIM=16,
    XSA_LAST_N=2,
    BIGRAM_VOCAB_SIZE=128,
    BIGRAM_DIM=16,
    VOCAB_SIZE=512,
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=512,
    EVAL_SEQ_LEN=32,
    EVAL_STRIDE=8,
    VAL_BATCH_SIZE=1024,
    WARMUP_STEPS=1,
    ITERATIONS=12,
    WARMDOWN_ITERS=6,
    TRAIN_LOG_EVERY=1,
    LATE_QAT_THRESHOLD=0.3,
    MAX_WALLCLOCK_SECONDS=0,
    GPTQ_TOKENS=1024,
    EMA_DECAY=0.9,
    TIED_EMBED_LR=0.01,
    RUN_ID="test",
)

# All that PR #1435 adds to the design, at the size of the tests
FRONTIER = dict(
    RECUR_LAYERS="1,2",
    PARALLEL_START_LAYER=3,
    SKIP_GATES=1,
    ATTN_GATE_DIMS=12,
    SMEAR_CROSSES_BOS=0,
    XSA_LAST_N=4,
    MLP_MULT=4,
    VRL_ENABLED=0,
    LEAKY_SLOPE=0.3,
    QK_GAIN_INIT=5,
)

BRIEF = dict(NGRAM_ENABLED=0, EVAL_STRIDE=32)  # for a test that is not about scoring

STEADY = dict(  # nine steps in which both averages take snapshots
    AVERAGING="ema_swa",
    SWA_EVERY=2,
    SWA_THRESHOLD=0.9,
    ITERATIONS=9,
    WARMDOWN_ITERS=6,
    WARMUP_STEPS=2,
)

ADAPTERS = dict(  # each document learns for itself
    TTT_LORA_RANK=2, TTT_LORA_ALPHA=4, TTT_LORA_LR=0.01, TTT_CHUNK_SIZE=8, TTT_BATCH_SIZE=3
)
TTT = dict(TTT_EPOCHS=2, TTT_CHUNK_TOKENS=100, TTT_LR=0.01, TTT_BLOCKS=1, TTT_DECAY=0.8)


def tiny(**changes) -> t.Hyperparameters:
    """TINY, then `changes`."""
    return t.Hyperparameters.from_env({k: str(v) for k, v in {**TINY, **changes}.items()})


# --- data -----------------------------------------------------------------------------------------


def write_shard(path: Path, tokens) -> Path:
    """Write `tokens` to `path` in the challenge's format; returns `path`."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def make_corpus(folder: Path) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a real but small text, written to `folder`: this Python's
    language reference, 512 pieces."""
    from pydoc_data.topics import topics

    from data.prepare_demo import train_tokenizer

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


def stream_of(kind: str, rng, length: int) -> np.ndarray:
    """Tokens of a certain kind, uint16."""
    zipf, motif = np.minimum(rng.zipf(1.3, length), 299), rng.integers(0, 30, 60)
    copies = np.where(
        rng.random(length) < 0.9, np.resize(motif, length), rng.integers(0, 30, length)
    )
    return dict(
        random=rng.integers(0, 5, length),
        zipf=zipf,
        one_token=np.full(length, 7),
        repetitive=np.resize(rng.integers(0, 300, 17), length),
        noisy_copies=copies,
        documents=np.where(rng.random(length) < 0.05, t.BOS, copies),
        wide=rng.integers(65500, 65536, length),
    )[kind].astype(np.uint16)


def target_scores(tokens, rng, V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(p[target, v], nll, entropy) of a random full distribution at every target."""
    p = rng.dirichlet(np.full(V, 0.5), len(tokens) - 1) + 1e-9
    p /= p.sum(-1, keepdims=True)
    nll = -np.log(p[np.arange(len(p)), tokens[1:]])
    return p, nll.astype(np.float32), -(p * np.log(p)).sum(-1).astype(np.float32)


# --- models and scores ----------------------------------------------------------------------------

ALONE = t.Ranks({})
SILENT = t.RunLog()


class FakeRanks(t.Ranks):
    """Rank `rank` of `world_size`, of which the others are not there: sums are its own part, which
    is kept in `sent`."""

    def __init__(self, rank: int, world_size: int):
        super().__init__({})
        self.rank = rank
        self.world_size = world_size
        self.sent = []

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        self.sent.append(x.clone())
        return x


def shifted(model, size: float = 0.05):
    """The model, its parameters moved away from where they begin."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * size)
    return model


def randomize(model):
    """Give every parameter a value that matters, so that zero-initialised paths are tested too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                torch.randn_like(p)
                * (0.3 / max(1, p.shape[-1] if p.ndim else 1) ** 0.5 if p.ndim == 2 else 0.2)
            )
    return model.double()


def final_passes(model) -> tuple[int, ...]:
    """The order in which blocks run when the model scores."""
    _, passes = t.block_passes(model.hp)
    return passes


def hidden_states(model, ids: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """(B, T, D), or of the last positions alone, as the model has them when it scores."""
    return model.hidden(ids, final_passes(model), last)


def log_probabilities(model, hidden: torch.Tensor) -> torch.Tensor:
    """(..., V): the logarithms of the probabilities, from hidden states."""
    return t.log_probabilities(model.logits(hidden), model.hp.logit_softcap)


def loss_of(model, ids: torch.Tensor, target_ids: torch.Tensor, shares=None) -> torch.Tensor:
    """The training loss, with the order of blocks that scoring has."""
    return model(ids, target_ids, final_passes(model), shares)


def scorer_of(model, trunk=None) -> t.Scorer:
    """The model as it scores."""
    return t.Scorer(model, final_passes(model), trunk)


def collect(segments) -> np.ndarray:
    """All segments of a score in one array, (2, targets): nll and entropy."""
    return np.concatenate(list(segments), 1)


def scores_of(model, tokens, stride: int, part=None) -> np.ndarray:
    """(2, targets): nll and entropy of the stream, or of the targets [begin, end) = `part`."""
    return collect(t.score(scorer_of(model), tokens, stride, ALONE, part))


# --- test-time training ---------------------------------------------------------------------------


def learning_model(**settings) -> t.GPT:
    """A model of fixed random weights, with the settings TTT."""
    torch.manual_seed(3)
    return shifted(t.GPT(tiny(**{**TTT, **settings})))


def validation_of(tokens, target_bytes) -> t.Validation:
    """A stream whose targets have these bytes."""
    return t.Validation(tokens, lambda _: target_bytes)


def segments_while_learning(model, validation: t.Validation, stride: int, log=SILENT):
    """The segments of `score_and_learn` on one rank."""
    loss = t.training_loss
    return t.score_and_learn(scorer_of(model), loss, validation, stride, ALONE, log)


def scores_while_learning(tokens, target_bytes, stride=8, **settings) -> np.ndarray:
    """(2, targets): what a `learning_model` scores that learns on the way."""
    validation = validation_of(tokens, target_bytes)
    return collect(segments_while_learning(learning_model(**settings), validation, stride))


# --- curvature ------------------------------------------------------------------------------------


def correlated_moments(count: int) -> torch.Tensor:
    """Moments (float64) of inputs of very different scales, which go together."""
    x = torch.randn(4 * count, count, dtype=torch.float64)
    x = x @ torch.randn(count, count, dtype=torch.float64) * torch.logspace(-1, 1, count)
    return x.T @ x / len(x)


def matrices_with_curvature() -> tuple[dict[str, torch.Tensor], dict[str, t.Curvature]]:
    """(state, curvature): matrices whose rows and inputs matter differently."""
    state = {
        f"blocks.{i}.attn.q.weight": torch.randn(60, 40 + 30 * i) * 0.1 * 2.0**-i for i in range(3)
    }
    curvature = {
        name: t.Curvature(correlated_moments(w.size(1)).float(), torch.logspace(-3 - i, i, len(w)))
        for i, (name, w) in enumerate(state.items())
    }
    return state, curvature


# --- training -------------------------------------------------------------------------------------


class KeptLog(t.RunLog):
    """Keeps its lines and prints nothing."""

    def __init__(self, path: Path | None = None):
        super().__init__()
        self.path = path
        self.lines = []

    def __call__(self, line: str, console: bool = True):
        self.lines.extend(line.split("\n"))

    def starting(self, start: str) -> list[str]:
        """The lines that start like this."""
        return [line for line in self.lines if line.startswith(start)]


class Training(NamedTuple):
    """What `t.train` is given."""

    model: t.GPT
    loader: t.TokenLoader
    validation: t.Validation
    ranks: t.Ranks
    log: KeptLog
    stop: t.StopSignal


def new_training(corpus, log_path: Path | None = None, **changes) -> Training:
    """As `run` makes it, in this process and quiet, but for a validation of 32 targets. With a
    `log_path` checkpoints are written beside it."""
    hp = tiny(**corpus, **changes)
    torch.manual_seed(hp.seed)
    validation = validation_of(np.arange(33, dtype=np.uint16), np.ones(32))
    loader = t.TokenLoader(hp, 0, 1)
    return Training(t.GPT(hp), loader, validation, ALONE, KeptLog(log_path), t.StopSignal())


def train(corpus, log_path: Path | None = None, **changes) -> tuple[t.Trained, KeptLog]:
    """Train in this process, and return what came of it and the log."""
    training = new_training(corpus, log_path, **changes)
    return t.train(*training), training.log


def new_state(training: Training) -> tuple[t.TrainState, Callable]:
    """The state that `t.train` makes, and the function with which it takes a step."""
    data = training.validation.identity | training.loader.identity
    state = t.TrainState(training.model, training.ranks, training.log, data)
    return state, partial(t.training_step, state, training.loader, t.training_loss)


def tensors_of(state: t.TrainState) -> dict[str, np.ndarray]:
    """A copy of all that training changes."""
    return {name: x.numpy(force=True).copy() for name, x in state.tensors().items()}


def checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a checkpoint."""
    arrays = t.read_checkpoint(str(path))
    return {name: x for name, x in arrays.items() if name not in ("settings", "data")}


def assert_same(a: dict, b: dict) -> None:
    """Two results of `tensors_of` or `checkpoint` are equal, bit for bit, but for the clock."""
    assert list(a) == list(b)
    for name in a:
        first, second = a[name], b[name]
        if name == "progress":
            first, second = first[0], second[0]  # the steps
        assert np.array_equal(first, second), name


# --- runs of the script ---------------------------------------------------------------------------

SCRIPT = ROOT / "train_gpt.py"
KEPT = "PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV"  # of this environment, for what tests start
# Ten times what the longest run takes on an idle machine: what is not there by then never comes.
DEADLINE = 600  # seconds


def torchrun(ranks: int) -> list[str]:
    """Python's arguments before the script's name."""
    if not ranks:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def start_python(
    cwd: Path, arguments: list[str], env: dict[str, str], forked: bool = True, **streams
) -> Run | subprocess.Popen:
    """`python *arguments` on the CPU, on one thread, with no setting of this environment."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    env = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    if forked:
        return Run(arguments, cwd, env)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | streams
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, text=True, **pipes)


def start_script(
    cwd: Path, ranks: int = 1, script: Path = SCRIPT, forked: bool = True, **env
) -> Run | subprocess.Popen:
    """train_gpt.py under torchrun, or plainly with ranks=0: from a process that has imported torch
    or, with forked=False, as users start it, which takes some seconds of CPU per rank more."""
    settings = {k: str(v) for k, v in {**TINY, **env}.items()}
    return start_python(cwd, [*torchrun(ranks), str(script)], settings, forked)


def finish(
    process: Run | subprocess.Popen, timeout: float = DEADLINE
) -> subprocess.CompletedProcess:
    """Wait until the process ends. One that does not end is killed, with the ranks that torchrun
    started."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        for pid in [*children(process), process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_script(
    cwd: Path, ranks: int = 1, script: Path = SCRIPT, forked: bool = True, **env
) -> subprocess.CompletedProcess:
    """`start_script`, and wait until it has ended."""
    return finish(start_script(cwd, ranks, script, forked, **env))


def children(process: Run | subprocess.Popen) -> list[int]:
    """The ids of the processes that it has started."""
    with contextlib.suppress(OSError):  # it has just ended
        return [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
    return []


def workers(process: Run | subprocess.Popen) -> dict[int, int]:
    """rank -> process id, of the ranks that this torchrun started."""
    found = {}
    for pid in children(process):
        with contextlib.suppress(OSError):  # it has just ended
            forked = re.match(r"rank (\d+)", Path(f"/proc/{pid}/comm").read_text())
            started = re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text())
            if forked or started:
                found[int((forked or started)[1])] = pid
    return found


def wait_for(log: Path, pattern: str, process: Run) -> None:
    """Wait until a line of `log` starts with `pattern`. No line of train_gpt.py may start with it,
    as a log begins with the source."""
    end = time.monotonic() + DEADLINE
    while not (log.exists() and re.search("^" + pattern, log.read_text(), re.M)):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{pattern} did not come: {process.communicate()}")
        time.sleep(0.01)


def patched(path: Path, body: str) -> Path:
    """A script that is train_gpt.py after `body`, which knows it as t and may wrap what it calls:
    so a fault comes at one exact moment."""
    path.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as t
RANK = int(os.environ.get("RANK", 0))
{body}
t.start(dict(os.environ), [])
""")
    return path


# For `patched`: calls before(state) ahead of each training step. "signals" has the numbers of the
# signals that came.
BEFORE_STEP = """
plain_step = t.training_step
def training_step(state, *args):
    before(state)
    return plain_step(state, *args)
t.training_step = training_step

signals = []
plain_handle = t.StopSignal.handle
def handle(stop, number, frame):
    signals.append(number)
    plain_handle(stop, number, frame)
t.StopSignal.handle = handle
"""


# In the place of Python: it finds no GPU, and writes down what the launch script would start, the
# run and after it the study.
RECORDER = """#!/usr/bin/env bash
case "$*" in
-c*) echo 0 ;;
*studies.predecessors*) printf '%s\\0' "$@" > study; echo "$PYTHONPATH" > study_path ;;
*) printf '%s\\0' "$@" > arguments; env -0 > environment ;;
esac
"""


def launched(system: str, folder: Path, **settings) -> tuple[list[str], dict[str, str]]:
    """What runs/<system>.sh starts in `folder`: Python's arguments and environment."""
    (folder / "runs").mkdir()
    for name in (system, "common"):
        shutil.copy(ROOT / f"runs/{name}.sh", folder / "runs")
    recorder = folder / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(recorder), "SCRIPT": str(SCRIPT)}
    env |= {name: str(value) for name, value in settings.items()}
    subprocess.run(["bash", f"runs/{system}.sh"], cwd=folder, env=env, check=True)
    arguments = (folder / "arguments").read_text().split("\0")[:-1]
    pairs = (folder / "environment").read_text().split("\0")[:-1]
    return arguments, dict(pair.split("=", 1) for pair in pairs)


# --- logs -----------------------------------------------------------------------------------------

SCORES = (
    "final_float_exact",
    "final_int6_roundtrip_exact",
    "final_int6_sliding_window_exact",
    "final_ngram_exact",
)


def log_of(cwd: Path, name: str = "test") -> str:
    """The log without the source at its beginning."""
    return (cwd / f"logs/{name}.txt").read_text().split("=" * 100 + "\n")[-1]


def losses(log: str) -> dict[int, str]:
    """{step: its training loss, as logged}."""
    return {
        int(step): loss for step, loss in re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", log, re.M)
    }


def score_lines(log: str) -> list[str]:
    """The lines with the final scores, without the times in them."""
    return [
        re.sub(r" (eval|added)_time:\S+", "", line)
        for line in log.splitlines()
        if line.startswith(SCORES)
    ]


def values(log: str, line_start: str) -> dict[str, str]:
    """key:value pairs of the last line of `log` that starts with `line_start`."""
    line = [line for line in log.splitlines() if line.startswith(line_start)][-1]
    return dict(pair.split(":", 1) for pair in line.split() if ":" in pair)
