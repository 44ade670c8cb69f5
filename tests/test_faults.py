"""Faults provoked for real, in the middle of a run: it ends soon, says why in one line,
and nothing is lost."""

import os
import re
import shutil
import signal
import subprocess
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
    finish,
    log_of,
    losses,
    new_training,
    patched,
    run_script,
    score_lines,
    start_python,
    start_script,
    tiny,
    train,
    values,
    wait_for,
    workers,
)

import train_gpt as t

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
    warm_up=(dict(LONG, WARMUP_STEPS=100_000), "ALPHA_MAX=", []),
    training=(LONG, "step:3/", ["test.ckpt"]),
    packing=(BRIEF, "final_float_exact", ["test.ckpt"]),
    scoring=(
        dict(ITERATIONS=2, EVAL_SEQ_LEN=1024, EVAL_STRIDE=1, NGRAM_ENABLED=0),
        "final_int6_roundtrip_exact",
        [],
    ),
)


def whole(cwd: Path) -> bool:
    """Every checkpoint and artifact here can be read, and nothing half-written lies about."""
    for path in cwd.glob("logs/*.ckpt"):
        assert t.read_checkpoint(str(path))["progress"][0] >= 0
    for path in cwd.glob("*.ptz"):
        t.GPT(tiny()).load_state_dict(t.decompress(path.read_bytes()))
    return not list(cwd.rglob("*.tmp"))


@pytest.mark.parametrize(
    "phase, ranks",
    [
        ("warm_up", 0),
        ("training", 0),
        ("packing", 0),
        ("scoring", 0),
        ("packing", 2),
        ("scoring", 2),
    ],
)
def test_sigterm_ends_any_phase_at_once_and_loses_nothing(corpus, tmp_path, phase, ranks):
    """Training under torchrun: see test_ranks.py, which resumes it too."""
    settings, line, left = PHASES[phase]
    script = patched(tmp_path.with_suffix(".py"), ENDLESS_PACKING) if phase == "packing" else SCRIPT
    process = start_script(tmp_path, ranks, script, **corpus, **settings)
    wait_for(tmp_path / "logs/test.txt", line, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py: error: ")]
    log = log_of(tmp_path)
    assert len(errors) == 1
    assert "SIGTERM" in errors[0]
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert log.endswith("\n")
    assert "final_int6_sliding_window" not in log  # scoring was not waited for
    assert log.splitlines()[-1].startswith("error: ")
    assert "SIGTERM" in log.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.glob("logs/*") if p.suffix != ".txt") == left
    assert len(list(tmp_path.glob("*.ptz"))) == (phase == "scoring")
    assert whole(tmp_path)
    if phase == "training":
        step = int(t.read_checkpoint(f"{tmp_path}/logs/test.ckpt")["progress"][0])
        assert step >= 3
        assert f"step:{step}/100000: stopped by SIGTERM" in errors[0]
        assert f"RESUME=logs/test.ckpt goes on from step {step}" in errors[0]


def test_a_second_signal_changes_nothing(corpus, tmp_path):
    """torchrun and a scheduler may both send one:
    training still ends its step and writes its checkpoint."""
    process = start_script(
        tmp_path,
        0,
        patched(
            tmp_path.with_suffix(".py"),
            BEFORE_STEP
            + """
def before(state):
    if state.steps == 5:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
""",
        ),
        **corpus,
        **LONG,
    )
    done = finish(process)
    assert done.returncode == 1
    assert done.stderr == (
        "train_gpt.py: error: step:6/100000: stopped by SIGTERM; "
        "RESUME=logs/test.ckpt goes on from step 6\n"
    )
    assert t.read_checkpoint(f"{tmp_path}/logs/test.ckpt")["progress"][0] == 6
    assert whole(tmp_path)


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
        assert "error: another rank ended, see what it said" in errors[0]
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
    again = run_script(tmp_path, 0, **settings, RESUME="logs/test.ckpt")
    assert again.returncode == 0, again.stderr
    after = losses(log_of(tmp_path, "test_2"))
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
    assert "warning: logs/test.txt: No space left on device; the run goes on" in done.stderr
    log = log_of(small_disk)
    assert list(losses(log)) == list(range(1, 13))
    assert "total_eval_time" in log
    assert (
        log.count("warning: logs/test.ckpt: No space left on device; free space, then RESUME") == 5
    )
    assert set(log.splitlines()) >= set(done.stdout.split("\n\n")[0].splitlines())
    assert t.read_checkpoint(f"{small_disk}/logs/test.ckpt")["progress"][0] == 12
    assert whole(small_disk)


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
        r"train_gpt.py: error: logs/test.txt: lacks its last \d+ bytes, as the disk is full; "
        "keep what was printed",
        done.stderr.splitlines()[-1],
    )
    assert len(list(small_disk.glob("*.ptz"))) == 1
    assert whole(small_disk)


def test_a_full_disk_at_packing_leaves_no_half_artifact_and_the_checkpoint(corpus, small_disk):
    old = b"the artifact of an earlier run"
    (small_disk / "final_model.int6.ptz").write_bytes(old)
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
    write(*args)
t.write_artifact = full
""",
        ),
        **corpus,
        **BRIEF,
    )
    assert done.returncode == 1
    said = "error: final_model.int6.ptz: No space left on device; free space, then RESUME"
    assert done.stderr.count("train_gpt.py: error: ") == 1
    assert f"train_gpt.py: {said}\n" in done.stderr
    assert (small_disk / "final_model.int6.ptz").read_bytes() == old
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    again = run_script(small_disk, 0, **corpus, **BRIEF, RESUME="logs/test.ckpt")
    assert again.returncode == 0, again.stderr
    assert "train_loss" not in again.stdout, again.stderr
    assert score_lines(again.stdout)[0] == score_lines(done.stdout)[0]
    assert whole(small_disk)


def test_scores_that_cannot_be_written_cost_no_result(corpus, tmp_path):
    (tmp_path / "logs/test_scores.npz").mkdir(parents=True)
    done = run_script(tmp_path, 0, **corpus, **BRIEF, SAVE_SCORES=1)
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path)
    assert "warning: logs/test_scores.npz: Is a directory" in log
    assert "\nresult {" in log
    assert whole(tmp_path)


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
        train(corpus, log_path, MATRIX_LR=1e30, ITERATIONS=50)
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
