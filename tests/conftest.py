"""Shared by all tests: seeds, a small corpus in the challenge's format, runs on several ranks.

Random numbers are the same in every run: each test's seed is a function of its name, and
hypothesis draws the same examples. FRESH=1 draws all of them anew and says which FRESH=<number>
draws them again. SHUFFLE=1 puts files, and the tests in each, in another order, and says which
SHUFFLE=<number> does it again."""

import itertools
import os
import random
import signal

import hypothesis
import numpy as np
import pytest
import torch

# kernels made in this process run in Triton's interpreter; not those of subprocesses
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import train_gpt  # noqa: F401

os.environ.pop("TRITON_INTERPRET", None)
pytest.register_assert_rewrite("helpers")
from helpers import FRESH, SECTIONS, SHUFFLE, make_corpus, run_script, seed_of  # noqa: E402

torch.set_num_threads(1)
for number in (signal.SIGINT, signal.SIGQUIT):  # a shell's background jobs ignore these,
    if signal.getsignal(number) == signal.SIG_IGN:  # and so would what the tests start
        signal.signal(number, signal.SIG_DFL)


hypothesis.settings.register_profile(
    "tests", derandomize=not FRESH, database=None, deadline=None, print_blob=True
)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--section", help=f"only the tests of one of {', '.join(SECTIONS)}")


@pytest.hookimpl(tryfirst=True)  # before hypothesis' own plugin reads the option
def pytest_configure(config):
    if config.option.section not in (None, *SECTIONS):
        known = ", ".join(SECTIONS)
        raise pytest.UsageError(f"T={config.option.section}: expected one of {known}")
    if FRESH and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = FRESH


def pytest_ignore_collect(collection_path, config):
    """With --section, test files that are not of it are not even imported."""
    name = collection_path.stem.removeprefix("test_")
    is_test = collection_path.stem != name
    if is_test and config.option.section and name not in SECTIONS[config.option.section].split():
        return True


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of a real but small text."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run_on(ranks: int, corpus, tmp_path_factory):
    """(folder, what it said) of a run on so many ranks."""
    cwd = tmp_path_factory.mktemp(f"ranks{ranks}")
    result = run_script(cwd, ranks, **corpus, NUM_LAYER=3, TTT_LR=0.5)
    assert result.returncode == 0, result.stderr[-3000:]
    return cwd, result


@pytest.fixture(scope="session")
def alone(corpus, tmp_path_factory):
    """(folder, what it said) of a run on one rank."""
    return run_on(1, corpus, tmp_path_factory)


@pytest.fixture(scope="session")
def runs(alone, corpus, tmp_path_factory):
    """The same run on 1, 2 and 4 ranks, and on 8 where there are cores for them: ranks -> (folder,
    what it said)."""
    many = (2, 4, *[8] * (os.cpu_count() >= 8))
    return {1: alone, **{ranks: run_on(ranks, corpus, tmp_path_factory) for ranks in many}}
