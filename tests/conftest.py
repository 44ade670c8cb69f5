"""Shared by all tests: a small corpus in the challenge's format, small settings, seeds.

Random numbers are the same in every run: each test's seed is a function of its name, and
hypothesis draws the same examples. FRESH=1 draws all of them anew and says which FRESH=<number>
draws them again. SHUFFLE=1 puts files, and the tests in each, in another order, and says which
SHUFFLE=<number> does it again."""

import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from preloaded import Run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))

import sentencepiece as spm  # noqa: E402

# kernels made in this process run in Triton's interpreter; not those of subprocesses
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from train_gpt import Hyperparameters, log_probabilities  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)
torch.set_num_threads(1)

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

BRIEF = dict(NGRAM_ENABLED=0, EVAL_STRIDE=32)  # of a test that is not about scoring


def tiny(**changes) -> Hyperparameters:
    return Hyperparameters.from_env({k: str(v) for k, v in {**TINY, **changes}.items()})


def logits(model, hidden) -> torch.Tensor:
    """(..., V): the logarithms of the probabilities."""
    return log_probabilities(model.logits(hidden), model.hp.logit_softcap)


def number_from_environment(name: str) -> str:
    """Empty if 0 or unset; 1 becomes a new number, which the workers of pytest-xdist and what tests
    start inherit."""
    if os.environ.get(name) == "1":
        os.environ[name] = str(int.from_bytes(os.urandom(4), "little") + 2)
    return os.environ.get(name, "0").removeprefix("0")


FRESH = number_from_environment("FRESH")
SHUFFLE = number_from_environment("SHUFFLE")
hypothesis.settings.register_profile(
    "tests", derandomize=not FRESH, database=None, deadline=None, print_blob=True
)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before hypothesis' own plugin reads the option
def pytest_configure(config):
    config.addinivalue_line("markers", "slow: run by `make test-all`, not by `make test`")
    if FRESH and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = FRESH


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Tests of a file stay together, as they share what the file has made once."""
    if SHUFFLE:
        by_file = {}
        for item in items:
            by_file.setdefault(item.path, []).append(item)
        dice = random.Random(SHUFFLE)
        files = list(by_file.values())
        dice.shuffle(files)
        for tests in files:
            dice.shuffle(tests)
        items[:] = itertools.chain(*files)


def pytest_report_header():
    return [
        f"{name}={number} draws the same {what} again"
        for name, number, what in (("FRESH", FRESH, "numbers"), ("SHUFFLE", SHUFFLE, "order"))
        if number
    ]


def pytest_terminal_summary(terminalreporter):
    """With -q there is no header."""
    for line in pytest_report_header():
        terminalreporter.write_line(line)


def seed_of(name: str) -> int:
    """The same on every machine and in any order of tests, unless FRESH."""
    return zlib.crc32(f"{FRESH} {name}".encode())


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Of this test, for every generator that is not given a seed of its own."""
    number = seed_of(f"{request.node.path.name}::{request.node.name}")
    for line in pytest_report_header():  # shown when the test fails
        print(line)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    return number


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def collect(segments) -> np.ndarray:
    """All segments of score_stream as one (nll, entropy)."""
    return np.concatenate(list(segments), 1)


def write_shard(path: Path, tokens) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a real but small text: this Python's language reference,
    512 pieces."""
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


SCRIPT = ROOT / "train_gpt.py"
KEPT = "PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV"  # of this environment, for what tests start
# Ten times what the longest run takes on an idle machine: what is not there by then never comes.
DEADLINE = 600  # seconds


def start_script(
    cwd: Path, ranks: int = 1, script: Path = SCRIPT, forked: bool = True, **env
) -> Run | subprocess.Popen:
    """train_gpt.py under torchrun, or plainly with ranks=0: from a process that has imported torch
    or, with forked=False, as users start it, which takes some seconds of CPU per rank more."""
    settings = {k: str(v) for k, v in {**TINY, **env}.items()}
    return start_python(cwd, [*torchrun(ranks), str(script)], settings, forked)


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


def finish(
    process: Run | subprocess.Popen, timeout: float = DEADLINE
) -> subprocess.CompletedProcess:
    """Waits; what does not end is killed, and with it the ranks that torchrun started."""
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
    return finish(start_script(cwd, ranks, script, forked, **env))


def children(process: Run | subprocess.Popen) -> list[int]:
    """Process ids."""
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
    """Until a line of `log` starts with `pattern` (no line of the source, with which a log begins,
    should)."""
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
t.start(dict(os.environ))
""")
    return path


BEFORE_STEP = """
plain_step = t.Trainer.step
def step(trainer, scale, hardness):
    before(trainer)
    return plain_step(trainer, scale, hardness)
t.Trainer.step = step
"""


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """The same run on 1, 2 and 4 ranks, and on 8 where there are cores for them: ranks -> (folder,
    what it said)."""
    done = {}
    for ranks in (1, 2, 4, *[8] * (os.cpu_count() >= 8)):
        cwd = tmp_path_factory.mktemp(f"ranks{ranks}")
        result = run_script(cwd, ranks, **corpus, NUM_LAYER=3)
        assert result.returncode == 0, result.stderr[-3000:]
        done[ranks] = cwd, result
    return done


def values(log: str, line_start: str) -> dict[str, str]:
    """key:value pairs of the last line of `log` that starts with `line_start`."""
    line = [line for line in log.splitlines() if line.startswith(line_start)][-1]
    return dict(pair.split(":", 1) for pair in line.split() if ":" in pair)
