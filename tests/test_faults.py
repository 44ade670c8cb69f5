"""Faults provoked for real, in the middle of a run: it ends soon, says why in one line,
and nothing is lost."""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    BEFORE_STEP,
    BRIEF,
    DEADLINE,
    SCRIPT,
    STEADY,
    TINY,
    KeptLog,
    finish,
    log_of,
    losses,
    new_state,
    new_training,
    patched,
    run_script,
    score_lines,
    start_python,
    start_script,
    tiny,
    torchrun,
    train,
    values,
    wait_for,
    workers,
)

import train_gpt as t
from data import prepare_demo
from record import folder
from record.log import RecordError, parse_log
from record.run import read_runs
from studies import predecessors

DiskUsage = namedtuple("DiskUsage", "total used free")
LONG = dict(ITERATIONS=100_000, TRAIN_LOG_EVERY=0)
ENDLESS_PACKING = """
def endless(*args, **options):
    while True:
        time.sleep(0.1)
t.compress = endless
"""
# Settings, the line that says the phase has begun, what is left when it is stopped. Scoring takes
# minutes, the others far longer than a DEADLINE: a run that ends early was ended by the signal.
PHASES = dict(
    warm_up=(dict(LONG, WARMUP_STEPS=10_000), "ALPHA_MAX=", []),
    training=(LONG, "step:3/", ["test.ckpt"]),
    packing=(BRIEF, "final_float_exact", ["test.ckpt"]),
    scoring=(
        dict(ITERATIONS=2, EVAL_SEQ_LEN=1024, EVAL_STRIDE=1, NGRAM_ENABLED=0),
        "final_int6_roundtrip_exact",
        ["test.ckpt", "test.int6.ptz"],
    ),
)
# what the last line says is left
LEFT = dict(
    warm_up="there is no checkpoint",
    training="RESUME=logs/test.ckpt goes on from step ",
    packing="RESUME=logs/test.ckpt goes on from step 12, with packing",
    scoring="RESUME=logs/test.ckpt goes on from step 2, with packing; "
    "EVAL_ONLY=logs/test.int6.ptz scores it again",
)


def whole(cwd: Path) -> bool:
    """Every checkpoint and artifact here can be read, and nothing half-written lies about."""
    for path in cwd.glob("logs/*.ckpt"):
        assert t.read_checkpoint(str(path))["progress"][0] >= 0
    for path in [*cwd.glob("*.ptz"), *cwd.glob("logs/*.ptz")]:
        t.load(path)
    return not list(cwd.rglob("*.tmp"))


@pytest.mark.parametrize(
    "phase, ranks, name",
    [
        ("warm_up", 0, "TERM"),
        ("training", 0, "HUP"),
        ("packing", 0, "INT"),
        ("scoring", 0, "TERM"),
        pytest.param("packing", 2, "HUP", marks=pytest.mark.slow),
        ("scoring", 2, "TERM"),
    ],
)
def test_a_signal_ends_any_phase_at_once_and_loses_nothing(corpus, tmp_path, phase, ranks, name):
    """Training under torchrun: see test_ranks.py, which resumes it too."""
    settings, line, left = PHASES[phase]
    script = patched(tmp_path.with_suffix(".py"), ENDLESS_PACKING) if phase == "packing" else SCRIPT
    process = start_script(tmp_path, ranks, script, **corpus, **settings)
    wait_for(tmp_path / "logs/test.txt", line, process)
    process.send_signal(signal.Signals[f"SIG{name}"])
    done = finish(process)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py: error: ")]
    log = log_of(tmp_path)
    assert len(errors) == 1
    assert f"SIG{name}" in errors[0]
    assert LEFT[phase] in errors[0]
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert log.endswith("\n")
    assert "final_int6_sliding_window" not in log  # scoring was not waited for
    assert log.splitlines()[-1].startswith("error: ")
    assert f"SIG{name}" in log.splitlines()[-1]
    assert LEFT[phase] in log.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.glob("logs/*") if p.suffix != ".txt") == left
    assert len(list(tmp_path.glob("*.ptz"))) == (phase == "scoring")
    assert whole(tmp_path)
    if phase == "training":
        step = int(t.read_checkpoint(f"{tmp_path}/logs/test.ckpt")["progress"][0])
        assert step >= 3
        assert f"step:{step}/100000: stopped by SIGHUP" in errors[0]
        assert f"RESUME=logs/test.ckpt goes on from step {step}" in errors[0]


def test_a_signal_that_is_sent_again_at_once_is_one_signal(corpus, tmp_path):
    """A terminal and torchrun, or a scheduler, may both send it: training still ends its step and
    writes its checkpoint."""
    process = start_script(
        tmp_path,
        0,
        patched(
            tmp_path.with_suffix(".py"),
            BEFORE_STEP
            + """
def sleep(seconds):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
t.time.sleep = sleep
def before(state):
    if state.steps == 5: os.kill(os.getpid(), signal.SIGINT)
""",
        ),
        **corpus,
        **LONG,
    )
    done = finish(process)
    assert done.returncode == 1
    assert done.stderr == (
        "train_gpt.py: error: step:6/100000: stopped by SIGINT; "
        "RESUME=logs/test.ckpt goes on from step 6\n"
    )
    assert t.read_checkpoint(f"{tmp_path}/logs/test.ckpt")["progress"][0] == 6
    assert whole(tmp_path)


def test_a_second_signal_ends_a_step_that_does_not_end(corpus, tmp_path):
    """The checkpoint before is left."""
    endless = patched(
        tmp_path.with_suffix(".py"),
        BEFORE_STEP
        + """
t.SENT_AGAIN_SECONDS = 0
def before(state):
    if state.steps == 5:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        t.time.sleep(100)
""",
    )
    done = run_script(tmp_path, 0, endless, **corpus, **LONG, CHECKPOINT_EVERY=1e-9)
    said = "stopped by a second signal; RESUME=logs/test.ckpt goes on from step 5"
    assert (done.returncode, done.stderr) == (1, f"train_gpt.py: error: {said}\n")
    assert log_of(tmp_path).splitlines()[-1] == f"error: Stopped: {said}"
    assert whole(tmp_path)


# What runs in the middle of a phase and eats every exception; then a second signal comes.
EATEN = """
t.SENT_AGAIN_SECONDS = 0
plain = t.{function}
def eating(*args, **options):
    try: os.kill(os.getpid(), signal.SIGTERM)
    except {eaten}: pass
    os.kill(os.getpid(), signal.SIGTERM)
    t.time.sleep(100)
    return plain(*args, **options)
t.{function} = eating
"""


@pytest.mark.parametrize("eaten", ["Exception", "BaseException"])
@pytest.mark.parametrize("function", ["read_checkpoint", "compress", "save_scores"])
def test_nothing_that_eats_exceptions_keeps_a_run_from_its_end(
    corpus, trained_checkpoint, tmp_path, function, eaten
):
    """Not the first signal, unless it eats all that can be raised, and never the second."""
    script = patched(tmp_path / "eating.py", EATEN.format(function=function, eaten=eaten))
    resumed = dict(corpus, **BRIEF, RESUME=trained_checkpoint, SAVE_SCORES=1)
    done = run_script(tmp_path, 0, script, **resumed)
    assert done.returncode == 1
    by = "stopped by SIGTERM" if eaten == "Exception" else "stopped by a second signal"
    error = log_of(tmp_path).splitlines()[-1]
    assert error.startswith(f"error: Stopped: {by}; RESUME={trained_checkpoint} goes on")
    assert done.stderr == f"train_gpt.py: {error.replace('Stopped: ', '')}\n"
    assert ("EVAL_ONLY=" in error) == (function == "save_scores")


def test_a_stop_that_python_ignores_is_raised_again(corpus, trained_checkpoint, tmp_path):
    """As in a callback of a weak reference, which a signal may interrupt."""
    script = patched(
        tmp_path / "ignoring.py",
        """
import weakref
t.RAISED_AGAIN_SECONDS = 0.01
class Thing: pass
def long(*args):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing
    for _ in range(500): time.sleep(0.01)
t.compress = long
""",
    )
    done = run_script(tmp_path, 0, script, **corpus, **BRIEF, RESUME=trained_checkpoint)
    assert done.returncode == 1
    assert "Exception ignored" in done.stderr
    said = f"stopped by SIGTERM; RESUME={trained_checkpoint} goes on from step 12, with packing"
    assert done.stderr.splitlines()[-1] == f"train_gpt.py: error: {said}"
    assert log_of(tmp_path).splitlines()[-1] == f"error: Stopped: {said}"


@pytest.mark.slow  # torch traces the model first
def test_a_signal_while_compiling_is_not_eaten(corpus, tmp_path):
    """The compiler turns exceptions into others and warnings."""
    script = patched(
        tmp_path / "compiling.py",
        """
import torch._inductor.compile_fx as compiler
compiler.compile_fx = lambda *args, **options: os.kill(os.getpid(), signal.SIGTERM)
""",
    )
    done = run_script(tmp_path, 0, script, **corpus, **BRIEF, COMPILE=1)
    assert done.returncode == 1
    said = "stopped by SIGTERM; there is no checkpoint"
    assert done.stderr.splitlines()[-1] == f"train_gpt.py: error: {said}"
    assert log_of(tmp_path).splitlines()[-1] == f"error: Stopped: {said}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_a_terminal_under_torchrun_stops_a_run_with_a_checkpoint(corpus, tmp_path, name):
    """The terminal sends the signal to torchrun and to each rank; torchrun passes it on."""
    settings = {name: str(x) for name, x in {**TINY, **corpus, **LONG}.items()}
    process = start_python(
        tmp_path, [*torchrun(2), str(SCRIPT)], settings, forked=False, start_new_session=True
    )
    wait_for(tmp_path / "logs/test.txt", "step:3/", process)
    os.killpg(process.pid, signal.Signals[f"SIG{name}"])
    assert finish(process).returncode != 0
    line = log_of(tmp_path).splitlines()[-1]
    assert re.fullmatch(
        rf"error: Stopped: step:(\d+)/100000: stopped by SIG{name}; "
        r"RESUME=logs/test.ckpt goes on from step \1",
        line,
    )
    assert whole(tmp_path)


# ---- a run that goes on after training


@pytest.fixture(scope="module")
def after_training(corpus, tmp_path_factory) -> tuple[Path, str]:
    """(folder, what it said): a run that is killed while it scores."""
    folder = tmp_path_factory.mktemp("after_training")
    killed = patched(
        folder.with_suffix(".py"),
        "t.evaluate = lambda *args: os.kill(os.getpid(), signal.SIGKILL)",
    )
    done = run_script(folder, 0, killed, **corpus)
    assert done.returncode == -signal.SIGKILL
    return folder, done.stdout


@pytest.fixture
def trained_checkpoint(after_training) -> Path:
    folder, _ = after_training
    return folder / "logs/test.ckpt"


def test_resume_after_training_goes_straight_to_packing_and_leaves_a_whole_record(
    corpus, after_training, trained_checkpoint, tmp_path, alone
):
    """The scores are those of a run that was not disturbed."""
    no_step = patched(tmp_path / "no_step.py", "t.training_step = t.warm_up = None")
    done = run_script(tmp_path, 0, no_step, **corpus, RESUME=trained_checkpoint)
    assert done.returncode == 0, done.stderr
    undisturbed, _ = alone
    assert score_lines(done.stdout) == score_lines(log_of(undisturbed))
    (run,) = read_runs([parse_log(tmp_path / "logs/test.txt")])
    assert run.steps == 12
    assert trained_checkpoint.exists()


def test_a_checkpoint_that_is_resumed_under_its_own_name_is_kept_as_it_is(
    corpus, after_training, trained_checkpoint, tmp_path
):
    """A copy in a new folder has the name that this run would give to its own. An earlier run's
    file of that name is not overwritten either."""
    (tmp_path / "logs").mkdir()
    copy = shutil.copy(trained_checkpoint, tmp_path / "logs/test.ckpt")
    done = run_script(tmp_path, 0, **corpus, **BRIEF, RESUME="logs/test.ckpt")
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == trained_checkpoint.read_bytes()
    (tmp_path / "logs/test.txt").unlink()
    done = run_script(tmp_path, 0, **corpus, **BRIEF, CHECKPOINT_EVERY=100)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == trained_checkpoint.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("logs/*.ckpt")) == [
        "test.2.ckpt",
        "test.ckpt",
    ]


def test_a_signal_after_all_is_done_changes_nothing(corpus, trained_checkpoint, tmp_path):
    late = patched(
        tmp_path / "late.py",
        "t.Ranks.close = lambda ranks: os.kill(os.getpid(), signal.SIGTERM)",
    )
    done = run_script(tmp_path, 0, late, **corpus, **BRIEF, RESUME=trained_checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert log_of(tmp_path).splitlines()[-1].startswith("result {")


def test_a_checkpoint_is_deleted_only_once_the_result_is_in_the_log(corpus, tmp_path):
    """Here it is lost on the way there."""
    forgetful = patched(
        tmp_path / "forgetful.py",
        """
plain = t.RunLog.__call__
def call(log, line, console=True):
    if line.startswith("result "): log.file, log.unwritten = open("/dev/full", "wb", 0), b"lost"
    else: plain(log, line, console)
t.RunLog.__call__ = call
""",
    )
    done = run_script(tmp_path, 0, forgetful, **corpus, **BRIEF)
    assert done.returncode == 1
    assert (tmp_path / "logs/test.ckpt").exists()


def test_a_signal_during_the_last_validation_is_not_lost(corpus, tmp_path):
    training = new_training(corpus, tmp_path / "run.txt", ITERATIONS=2)

    def count_bytes(tokens):  # which a validation does
        training.stop.handle(signal.SIGTERM, None)
        return np.ones(len(tokens) - 1)

    validation = t.Validation(training.validation.tokens, count_bytes)
    with pytest.raises(t.Stopped, match="stopped by SIGTERM; RESUME=.*run.ckpt goes on"):
        t.train(*training._replace(validation=validation))


def test_a_validation_that_is_killed_costs_no_training(corpus, tmp_path):
    """A signal waits until a validation ends, a scheduler does not:
    the checkpoint is written before."""
    training = new_training(corpus, tmp_path / "run.txt", ITERATIONS=6, VAL_LOSS_EVERY=3)

    def count_bytes(tokens):
        raise KeyboardInterrupt

    validation = t.Validation(training.validation.tokens, count_bytes)
    with pytest.raises(KeyboardInterrupt):
        t.train(*training._replace(validation=validation))
    assert t.read_checkpoint(str(tmp_path / "run.ckpt"))["progress"][0] == 3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_its_checkpoint_is_whole(corpus, tmp_path, victim):
    settings = {**corpus, **STEADY, **BRIEF, "ITERATIONS": 16, "WARMDOWN_ITERS": 14}
    slow = patched(
        tmp_path.with_suffix(".py"),
        BEFORE_STEP
        + """
def before(state):  # far from the end the signal is waited for, if this machine is busy
    time.sleep(0.1)
    while state.steps == 12: time.sleep(0.1)
""",
    )
    process = start_script(tmp_path, 2, slow, **settings, CHECKPOINT_EVERY=0.001)
    wait_for(tmp_path / "logs/test.txt", "step:6/", process)
    os.kill(workers(process)[victim], signal.SIGKILL)
    done = finish(process)
    assert done.returncode != 0
    if victim:  # rank 0 is left to tell
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("train_gpt.py: error: ")
        ]
        assert len(errors) == 1
        assert "error: another rank ended: see what it said" in errors[0]
        assert log_of(tmp_path).splitlines()[-1].startswith("error: UserError: another rank ended")
    # torchrun names the rank that was killed
    assert re.search(r"exitcode *: -9|Signal 9", done.stderr)
    before = losses(log_of(tmp_path))
    for aside in tmp_path.rglob("*.tmp"):  # SIGKILL leaves no chance to remove it; never read
        aside.unlink()
    assert whole(tmp_path)
    assert t.read_checkpoint(f"{tmp_path}/logs/test.ckpt")["progress"][0] >= 5
    if victim == 0:
        return  # what it left is resumed once: below
    mixed = settings | {"NGRAM_ENABLED": 1}
    again = run_script(tmp_path, 0, **mixed, RESUME="logs/test.ckpt")
    assert again.returncode == 0, again.stderr
    after = losses(log_of(tmp_path, "test_2"))
    assert read_runs([parse_log(tmp_path / "logs/test_2.txt")]), "it agrees with itself"
    assert set(before) | set(after) == set(range(1, 17))
    for step in set(before) & set(after):  # what both did: on two ranks and on one
        assert float(before[step]) == pytest.approx(float(after[step]), abs=2e-4)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 16 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


FILL = """
def fill():
    with open("filler", "wb", buffering=0) as file:
        for size in (65536, 1):                                  # to the last byte
            try:
                while file.write(bytes(size)): pass
            except OSError: pass
"""


def test_a_disk_that_is_full_for_a_while_costs_no_line_of_the_log(corpus, small_disk):
    """Full from step 3 to 8: the log catches up, checkpoints are skipped with a warning,
    the last one is whole."""
    done = run_script(
        small_disk,
        0,
        patched(
            small_disk.parent / "fault.py",
            FILL
            + BEFORE_STEP
            + """
def before(state):
    if state.steps == 3:
        fill()
        state.log("-" * 5000, console=False)  # past the page that the log has already
    if state.steps == 8:
        step = t.read_checkpoint("logs/test.ckpt")["progress"][0]
        os.unlink("filler")
        assert step == 3, step
""",
        ),
        **corpus,
        **BRIEF,
        CHECKPOINT_EVERY=1e-9,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "warning: logs/test.txt: No space left on device; free space there; so far" in done.stderr
    )
    log = log_of(small_disk)
    assert list(losses(log)) == list(range(1, 13))
    assert "total_eval_time" in log
    assert log.count("warning: logs/test.ckpt: No space left on device; free space there") == 5
    assert set(log.splitlines()) >= set(done.stdout.split("\n\n")[0].splitlines())
    assert t.read_checkpoint(f"{small_disk}/logs/test.ckpt")["progress"][0] == 12
    assert whole(small_disk)


@pytest.mark.slow
def test_a_console_that_takes_nothing_costs_nothing(corpus, tmp_path):
    """As when it is a file on a full disk, or a pipe whose reader has gone."""
    reader, pipe = os.pipe()
    os.close(reader)
    settings = {name: str(x) for name, x in {**TINY, **corpus, **BRIEF}.items()}
    with open("/dev/full", "w") as full:
        process = start_python(
            tmp_path, [str(SCRIPT)], settings, forked=False, stdout=pipe, stderr=full
        )
    os.close(pipe)
    assert process.wait(DEADLINE) == 0
    assert list(losses(log_of(tmp_path))) == list(range(1, 13))
    assert "total_eval_time" in log_of(tmp_path)


def test_a_disk_that_stays_full_is_said_at_the_end(corpus, small_disk):
    """The log cannot be whole, so the run does not end as if it were; the artifact,
    written before, is."""
    done = run_script(
        small_disk,
        0,
        patched(
            small_disk.parent / "fault.py",
            FILL
            + """
evaluate = t.evaluate
def full(scorer, validation, began, ranks, log):
    fill()
    log("-" * 5000, console=False)  # past the page that the log has already
    return evaluate(scorer, validation, began, ranks, log)
t.evaluate = full
""",
        ),
        **corpus,
        **BRIEF,
    )
    assert done.returncode == 1
    assert "final_int6_sliding_window_exact" in done.stdout
    assert re.fullmatch(
        "train_gpt.py: error: logs/test.txt: No space left on device; free space there; "
        r"its last \d+ bytes are on the console instead; "
        "RESUME=logs/test.ckpt goes on from step 12, with packing; "
        "EVAL_ONLY=logs/test.int6.ptz scores it again",
        done.stderr.splitlines()[-1],
    )
    assert "\nresult {" in done.stdout
    assert len(list(small_disk.glob("*.ptz"))) == 1
    assert whole(small_disk)


def test_a_full_disk_at_packing_leaves_no_half_artifact_and_the_checkpoint(corpus, small_disk):
    old = b"the artifact of an earlier run"
    (small_disk / "logs").mkdir()
    (small_disk / "logs/test.int6.ptz").write_bytes(old)
    done = run_script(
        small_disk,
        0,
        patched(
            small_disk.parent / "fault.py",
            FILL
            + """
write = t.write_artifact
def full(*args):
    fill()
    return write(*args)
t.write_artifact = full
""",
        ),
        **corpus,
        **BRIEF,
    )
    assert done.returncode == 1
    said = (
        "error: logs/test.int6.2.ptz: No space left on device; free space there; "
        "RESUME=logs/test.ckpt goes on from step 12, with packing"
    )
    assert done.stderr.count("train_gpt.py: error: ") == 1
    assert f"train_gpt.py: {said}\n" in done.stderr
    assert (small_disk / "logs/test.int6.ptz").read_bytes() == old
    (small_disk / "logs/test.int6.ptz").unlink()
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    again = run_script(small_disk, 0, **corpus, **BRIEF, RESUME="logs/test.ckpt")
    assert again.returncode == 0, again.stderr
    assert "train_loss" not in again.stdout, again.stderr
    assert score_lines(again.stdout)[0] == score_lines(done.stdout)[0]
    assert whole(small_disk)


def test_scores_that_cannot_be_written_cost_no_result(corpus, tmp_path):
    script = patched(
        tmp_path.with_suffix(".py"),
        BEFORE_STEP
        + """
def before(state):
    os.makedirs("logs/test_scores.npz", exist_ok=True)
""",
    )
    done = run_script(tmp_path, 0, script, **corpus, **BRIEF, SAVE_SCORES=1)
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path)
    assert "warning: logs/test_scores.npz: Is a directory" in log
    assert "\nresult {" in log
    assert whole(tmp_path)


# ---- files that cannot be written


def write_with_train_gpt(path: Path) -> None:
    t.replace_file(path, lambda file: file.write(b"new"))


def write_with_record(path: Path) -> None:
    folder.write_all({path: "new"})


def write_with_predecessors(path: Path) -> None:
    predecessors.write_json(path, {"new": 1})


def write_with_prepare_demo(path: Path) -> None:
    prepare_demo.write_whole(path, b"new")


WRITERS = {
    write_with_train_gpt: t.UserError,
    write_with_record: RecordError,
    write_with_predecessors: t.UserError,
    write_with_prepare_demo: OSError,
}


def failing(number: int):
    """A function that raises this error, and names no file, as a write does."""

    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_cannot_even_be_removed_does_not_hide_the_error(tmp_path, monkeypatch, write):
    """On a file system that is read-only, or has become so while the file was written."""
    path = tmp_path / "file"
    path.write_bytes(b"older")
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
    with pytest.raises(WRITERS[write], match=os.strerror(errno.ENOSPC)):
        write(path)
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch, write):
    """What is written aside is not what people look for."""
    path = tmp_path / "file"
    monkeypatch.setattr(os, "replace", failing(errno.EDQUOT))
    with pytest.raises(WRITERS[write]) as error:
        write(path)
    if WRITERS[write] is not OSError:
        assert str(error.value).startswith(f"{path}: {os.strerror(errno.EDQUOT)}; ")
    assert not list(tmp_path.iterdir())


class FullAfter(io.FileIO):
    """A file on a disk that has room for so many bytes of it."""

    room = 0

    def write(self, data) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [0, 10, 100, 300, 1000, 2000, 2900])
def test_a_disk_that_fills_up_anywhere_in_a_file_is_said(tmp_path, monkeypatch, room):
    """NumPy and zipfile write again when they close a file that they could not write."""
    arrays = {name: np.zeros(100) for name in "abc"}
    monkeypatch.setattr(FullAfter, "room", room)
    monkeypatch.setattr(t, "open", FullAfter, raising=False)
    with pytest.raises(t.UserError, match="No space left on device; free space there$"):
        t.replace_file(tmp_path / "scores.npz", lambda file: np.savez(file, **arrays))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_checkpoint_that_cannot_be_written_is_a_warning(corpus, tmp_path, monkeypatch, number):
    training = new_training(corpus, tmp_path / "run.txt")
    state, _ = new_state(training)
    monkeypatch.setattr(t, "open", failing(number), raising=False)
    monkeypatch.setattr(os, "unlink", failing(number))
    state.save()
    (warning,) = training.log.starting("warning: ")
    assert warning.startswith(f"warning: {tmp_path}/run.ckpt: {os.strerror(number)}; ")
    assert "free space" not in warning


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_scores_that_cannot_be_written_are_a_warning(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    log, array = KeptLog(tmp_path / "run.txt"), np.zeros(3, np.float32)
    monkeypatch.setattr(np, "savez", fail)
    t.save_scores(t.Scores(array, array, None, 1, 0.0, 0.0, 0.0), tiny(), log)
    (warning,) = log.lines
    assert warning.startswith(f"warning: {tmp_path}/run_scores.npz: ")
    assert not list(tmp_path.iterdir())


def test_an_artifact_that_cannot_be_written_says_what_is_left(tmp_path, monkeypatch):
    model, log = t.GPT(tiny()), KeptLog(tmp_path / "run.txt")
    trained = t.Trained(model.state_dict(), {}, 0, 0.0)
    monkeypatch.setattr(os, "replace", failing(errno.EACCES))
    with pytest.raises(t.UserError, match="Permission denied; let ") as found:
        t.write_artifact(tmp_path / "m.ptz", trained, model.hp, log)
    log.leaves("checkpoint", "RESUME=run.ckpt goes on from step 3")
    shown = t.explained(found.value, {}, tiny(), t.StopSignal(), log)
    assert str(shown) == f"{found.value}; RESUME=run.ckpt goes on from step 3"


# ---- files that are tried before the first step


def disks(monkeypatch, free: int, total: int = 1 << 40) -> None:
    """All disks have so many bytes."""
    monkeypatch.setattr(t.shutil, "disk_usage", lambda folder: DiskUsage(total, total - free, free))


def test_files_must_fit_on_their_disk_together(tmp_path, monkeypatch):
    sizes = {tmp_path / "a": 3000, tmp_path / "b": 2000}
    disks(monkeypatch, 5000)
    t.require_room(sizes)
    disks(monkeypatch, 4999)
    said = (
        f"^{tmp_path}: the disk has 4,999 bytes free, and up to 5,000 are needed for .*/a, .*/b: "
    )
    with pytest.raises(t.UserError, match=said):
        t.require_room(sizes)


def test_a_disk_that_does_not_know_its_size_is_trusted(tmp_path, monkeypatch):
    disks(monkeypatch, 0, 0)
    t.require_room({tmp_path / "a": 3000})


def test_each_disk_has_its_own_files(tmp_path, monkeypatch, small_disk):
    disks(monkeypatch, 3000)
    t.require_room({tmp_path / "a": 3000, small_disk / "b": 3000})


def test_trying_leaves_nothing_behind_and_changes_nothing(tmp_path):
    (tmp_path / "older").write_bytes(b"older")
    (tmp_path / "link").symlink_to(tmp_path)
    t.require_room({tmp_path / name: 1 for name in ("older", "new", "link")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "older"]
    assert (tmp_path / "older").read_bytes() == b"older"


@pytest.mark.parametrize(
    "name, said",
    [
        ("folder", "Is a directory; move the folder of this name away"),
        ("gone/file", "No such file or directory; make the folder .*/gone$"),
        ("file/file", "Not a directory; .*/file is not a folder"),
        ("x" * 250, "File name too long; choose a shorter RUN_ID"),  # with what is added to it
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused(tmp_path, name, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(t.UserError, match=f"^{tmp_path}/{name}: {said}"):
        t.require_room({tmp_path / name: 1})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", failing(errno.EROFS))
    monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
    with pytest.raises(t.UserError, match="/a: Read-only file system; make the disk of the folder"):
        t.require_room({tmp_path / "a": 1})


@pytest.mark.parametrize("averaging", ["none", "ema", "ema_swa"])
def test_a_checkpoint_and_an_artifact_take_what_is_expected(corpus, tmp_path, averaging):
    """Twice, as the next one is written beside it."""
    training = new_training(corpus, tmp_path / "run.txt", AVERAGING=averaging)
    state, _ = new_state(training)
    state.write_checkpoint(tmp_path / "run.ckpt")
    trained = t.Trained(training.model.state_dict(), {}, 0, 0.0)
    t.write_artifact(tmp_path / "m.ptz", trained, state.hp, training.log)
    sizes = t.expected_files(tmp_path / "m.ptz", training.model, 0, training.log)
    written = {path: path.stat().st_size for path in sizes}
    assert written[tmp_path / "m.ptz"] <= sizes[tmp_path / "m.ptz"]
    assert 2 <= sizes[tmp_path / "run.ckpt"] / written[tmp_path / "run.ckpt"] <= 3.5


@pytest.mark.parametrize("ngram", [0, 1])
def test_scores_take_what_is_expected(tmp_path, ngram):
    settings = dict(SAVE_SCORES=1, NGRAM_ENABLED=ngram, EVAL_ONLY="m.ptz")
    model, log = t.GPT(tiny(**settings)), KeptLog(tmp_path / "run.txt")
    sizes = t.expected_files(tmp_path / "m.ptz", model, 1_000_000, log)
    assert list(sizes) == [tmp_path / "run_scores.npz"]  # EVAL_ONLY writes nothing else
    arrays = 4_000_000 * (2 + ngram)
    assert arrays < sizes[tmp_path / "run_scores.npz"] < arrays + 1_000_000


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_that_lacks_room_is_refused_before_its_first_step(corpus, tmp_path, ranks):
    script = patched(
        tmp_path.with_suffix(".py"),
        "from collections import namedtuple\n"
        "t.shutil.disk_usage = lambda folder: namedtuple('Disk', 'total free')(1 << 40, 1000)\n",
    )
    done = run_script(tmp_path, ranks, script, **corpus)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py: error: ")]
    # rank 1 may add that it has lost rank 0, if torchrun ends it late
    (error,) = [line for line in errors if "error: rank 1: another rank ended" not in line]
    assert error.startswith("train_gpt.py: error: logs: the disk has 1,000 bytes free, and up to ")
    assert "logs/test.ckpt, logs/test.int6.ptz: free space there" in error
    assert "step:" not in done.stdout
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["test.txt"]


# ---- consoles, names


# Standard output and error, as a shell starts the script: closed, or of ASCII
@pytest.mark.slow
@pytest.mark.parametrize("console", [">&-", ">&- 2>&- <&-", "| head -1", "> said"])
def test_any_console_and_any_names_leave_a_result(corpus, tmp_path, console):
    name, run_id = os.fsdecode(b"caf\xe9 \xff"), "caf\u00e9"  # no UTF-8; UTF-8, but no ASCII
    shutil.copytree(corpus["DATA_PATH"], tmp_path / name)
    settings = {**TINY, **BRIEF, "RUN_ID": run_id, "DATA_PATH": name, "SAVE_SCORES": 1}
    settings |= dict(
        TOKENIZER_PATH=f"{name}/tiny.model", PYTHONIOENCODING="ascii", OMP_NUM_THREADS=1
    )
    command = f'set -o pipefail; "{sys.executable}" "{SCRIPT}" {console}'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=dict(os.environ, **{key: str(value) for key, value in settings.items()}),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "logs" / f"{run_id}.txt").read_text(encoding="utf-8")
    assert log.splitlines()[-1].startswith("result {")
    assert (tmp_path / "logs" / f"{run_id}_scores.npz").exists()


# ---- data, numbers, names


def test_a_shard_removed_during_training_is_not_missed(corpus, tmp_path):
    """It is memory-mapped: the run ends with the digits of an undisturbed one."""
    data = shutil.copytree(corpus["DATA_PATH"], tmp_path / "data")
    script = patched(
        tmp_path / "fault.py",
        BEFORE_STEP
        + """
def before(state):
    if state.steps == 2:
        for path in t.find_shards("train", state.hp): path.unlink()
""",
    )
    for name in ("run", "undisturbed"):
        (tmp_path / name).mkdir()
    done = run_script(tmp_path / "run", 0, script, **{**corpus, **BRIEF, "DATA_PATH": data})
    assert done.returncode == 0, done.stderr
    assert not list(data.glob("fineweb_train_*"))
    assert score_lines(done.stdout) == score_lines(
        run_script(tmp_path / "undisturbed", 0, **corpus, **BRIEF).stdout
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    corpus, tmp_path
):
    done = run_script(
        tmp_path,
        2,
        patched(
            tmp_path.with_suffix(".py"),
            BEFORE_STEP
            + """
def before(state):
    if state.steps == 5:
        with t.torch.no_grad():
            state.parameters[0].fill_(float("nan"))
""",
        ),
        **corpus,
        **BRIEF,
        CHECKPOINT_EVERY=1e-9,
    )
    assert done.returncode != 0
    assert done.stderr.count("train_gpt.py: error: ") == 1
    assert (
        "train_gpt.py: error: step:6/12: the training loss is not finite; lower the learning "
        "rates; RESUME=logs/test.ckpt goes on from step 5\n"
    ) in done.stderr
    assert re.search(
        "^warning: model.* is not finite, so step 6 gets no checkpoint$", log_of(tmp_path), re.M
    )
    assert t.read_checkpoint(f"{tmp_path}/logs/test.ckpt")["progress"][0] == 5
    assert whole(tmp_path)


def test_a_huge_learning_rate_is_stopped_with_its_step(corpus, tmp_path):
    log_path = tmp_path / "run.txt"
    with pytest.raises(t.UserError, match="^step:.*; there is no checkpoint$") as error:
        train(corpus, log_path, MATRIX_LR=1e9, ITERATIONS=50)
    step = re.match(r"step:(\d+)/50: the training loss is not finite; lower", str(error.value))[1]
    assert int(step) < 10
    assert not list(tmp_path.iterdir())


def test_two_runs_of_the_same_name_at_the_same_time_keep_both_logs(corpus, tmp_path):
    meet = patched(
        tmp_path.with_suffix(".py"),
        BEFORE_STEP
        + """
def before(state):  # neither begins before both have a log
    while len(os.listdir("logs")) < 2: time.sleep(0.01)
""",
    )
    both = [start_script(tmp_path, 0, meet, **corpus, **BRIEF, SEED=seed) for seed in (1, 2)]
    done = [finish(process) for process in both]
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    logs = [log_of(tmp_path, name) for name in ("test", "test_2")]
    assert {values(log, "SEED=") == {} and re.search("^SEED=.*", log, re.M)[0] for log in logs} == {
        "SEED=1",
        "SEED=2",
    }
    for log in logs:
        assert list(losses(log)) == list(range(1, 13))
        assert "total_eval_time" in log
        said = next(d.stdout for d in done if score_lines(d.stdout) == score_lines(log))
        assert losses(said) == losses(log)
    assert whole(tmp_path)
    assert not np.array_equal(*(list(losses(log).values()) for log in logs))
