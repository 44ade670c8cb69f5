"""The queue for a GPU, with a stand-in for Python; slow: at tiny sizes on the CPU."""

import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import DEADLINE, ROOT, write_shard

import train_gpt as t

# In the place of Python. It writes down each run, fails or hangs in that which is named so, leaves
# a checkpoint at SIGTERM and an artifact at the end.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *"gpu_queue.py unpack"*) mkdir -p "$4" ;;
    *"gpu_queue.py"*) exec "$REAL_PYTHON" "$@" ;;
    *train_gpt*)
        [[ $RUN_ID != "${HANGS:-}" ]] || trap 'touch "logs/$RUN_ID.ckpt"; exit 1' TERM
        echo "$RUN_ID $(basename "$RESUME")" >>"$CALLS"
        [[ $RUN_ID != "${FAILS:-}" ]] || exit 3
        if [[ $RUN_ID == "${HANGS:-}" ]]; then sleep 600 & wait; fi
        touch "logs/$RUN_ID.int6.ptz" ;;
esac
"""


class Queue:
    """A copy of what the queue needs, in a folder of its own, with data that a stand-in reads."""

    def __init__(self, root: Path):
        self.root = root
        (root / "bench").mkdir(parents=True)
        for name in ("gpu_queue.sh", "gpu_queue.py"):
            shutil.copy(ROOT / "bench" / name, root / "bench")
        shutil.copytree(ROOT / "runs", root / "runs")
        shutil.copy(ROOT / "train_gpt.py", root)
        (root / "data/gpu/docs").mkdir(parents=True)
        (root / "data/gpu/docs/docs_train_000000.bin.xz").touch()
        (root / "data/gpu/train_gpt_old_loader.py").touch()
        stand_in = root / "python"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        self.calls = root / "calls"

    def start(self, *arguments, **env) -> subprocess.Popen:
        env = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(self.root / "python"),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "QUEUE_DIR": str(self.root / "state"),
            "QUEUE_TINY": "1",
        } | env
        command = ["bash", str(self.root / "bench/gpu_queue.sh"), *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, env=env, cwd=self.root, text=True, **pipes)

    def __call__(self, *arguments, **env) -> tuple[int, str]:
        """(exit status, what it said)"""
        process = self.start(*arguments, **env)
        said, _ = process.communicate(timeout=DEADLINE)
        return process.returncode, said

    def runs(self) -> list[str]:
        """Name and checkpoint of every run that was started, and forget them."""
        found = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [line.strip() for line in found]

    def states(self, **env) -> dict[str, str]:
        """Item -> what --list says of it."""
        lines = self("--list", **env)[1].splitlines()
        return {line.split()[0]: state.strip() for line, state in zip(lines[::2], lines[1::2])}


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "tree")


def test_items_without_code_or_data_say_what_is_missing(queue):
    states = queue.states()
    assert states["loader"] == "to do"
    assert states["sp8192"].startswith("skipped: no tokenizer of 8,192 pieces")
    assert "train_gpt_old_lanes.py" in states["lanes"]
    assert states["ttt"].startswith("skipped: no artifact")
    assert "pr889_train_gpt.py" in states["pr889"]
    assert "no wheels" in states["fa4"]
    (queue.root / "data/gpu/docs/docs_train_000000.bin.xz").unlink()
    states = queue.states()
    assert states.pop("steptime") == "to do"
    assert all(state.startswith("skipped: no ") for state in states.values())


def test_items_are_no_longer_skipped_once_their_code_is_there(queue):
    data = queue.root / "data/gpu"
    for path in (
        data / "fineweb_8192_bpe.model",
        data / "retokenize.py",
        data / "pr889_train_gpt.py",
        data / "train_gpt_old_lanes.py",
        queue.root / "state/defaults/logs/defaults.int6.ptz",
        queue.root / "data/gpu_wheels/1of2/part",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    states = queue.states()
    assert {states[name] for name in ("sp8192", "lanes", "pr889", "ttt", "adapters")} == {"to do"}
    assert states["fa4"].startswith("skipped: 1 of 2 parts")
    queue("lanes")
    assert queue.runs() == ["old_lanes", "preset_no_lanes", "preset"]


def test_an_item_that_fails_is_tried_again_and_the_others_are_not(queue):
    status, said = queue("decay04", "decay06", FAILS="preset_decay04")
    assert status == 1
    assert "failed with status 3" in said
    assert queue.runs() == ["preset_decay04", "preset_decay06", "preset"]
    assert queue("decay04", "decay06")[0] == 0
    assert queue.runs() == ["preset_decay04"]  # the preset's own run is there
    assert all(queue.states()[name].startswith("done, ") for name in ("decay04", "decay06"))


def test_compared_runs_have_equal_time_and_schedules_that_fit_it(queue):
    """110 s of 600; the preset's EMA_DECAY is 0.9965 and the defaults' 0.997 for 600."""
    assert queue("preset", QUEUE_TINY="0")[0] == 0
    runs = (queue.root / "state/preset.log").read_text().splitlines()
    for name, decay in (("preset", "0.98087"), ("defaults", "0.98361")):
        (run,) = (line.split() for line in runs if line.startswith(f"{name}:"))
        assert {
            "MAX_WALLCLOCK_SECONDS=110",
            "TRAIN_BATCH_TOKENS=98304",
            "WARMDOWN_ITERS=640",
            "MUON_MOMENTUM_WARMUP_STEPS=274",
            f"EMA_DECAY={decay}",
            "EVAL_STRIDE=2048",
        } <= set(run)


def test_an_item_ends_at_its_limit_and_resumes_from_the_checkpoint(queue):
    hangs = dict(HANGS="old_loader", QUEUE_LIMIT="3")
    status, said = queue("loader", **hangs)
    assert status == 1
    assert "to go on: stopped" in said
    assert queue.runs() == ["old_loader"]
    assert queue("loader")[0] == 0
    assert queue.runs() == [
        "old_loader old_loader.ckpt",
        "old_loader_docs",
        "defaults",
        "defaults_docs",
    ]
    assert not list(queue.root.glob("state/*/logs/*.ckpt"))


def test_a_signal_stops_the_item_and_the_queue(queue):
    process = queue.start("loader", "decay04", HANGS="defaults")
    until = time.monotonic() + DEADLINE
    while not (queue.calls.exists() and "defaults" in queue.calls.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "called again, the queue goes on" in said
    assert queue.runs() == ["old_loader", "old_loader_docs", "defaults"]
    assert (queue.root / "state/defaults/logs/defaults.ckpt").exists()


def test_no_item_begins_whose_limit_does_not_fit_in_what_is_left(queue):
    status, said = queue("--seconds", "50", "loader")  # tiny: 60 s for each
    assert status == 0
    assert "loader: not begun, its limit is 60 s and 50 s are left" in said
    assert queue.runs() == []
    assert queue("loader", QUEUE_SECONDS="50", QUEUE_LIMIT="40")[0] == 0
    assert len(queue.runs()) == 4


def test_a_name_that_is_no_item_is_refused(queue):
    status, said = queue("loader", "lodaer")
    assert status == 2
    assert "no item or option lodaer" in said


def shared_folder(folder: Path, corpus: dict[str, str]) -> Path:
    """The corpus as the shared data folder has its own."""
    source = Path(corpus["DATA_PATH"])
    (folder / "docs").mkdir(parents=True)
    (folder / "fineweb_sample").mkdir()
    shards = [*sorted(source.glob("fineweb_train_*.bin")), source / "fineweb_train_000000.bin"]
    for i, shard in enumerate(shards):
        packed = lzma.compress(shard.read_bytes(), preset=0)
        (folder / f"docs/docs_train_{i:06d}.bin.xz").write_bytes(packed)
    val = source / "fineweb_val_000000.bin"
    (folder / "docs/docs_val_000000.bin.xz").write_bytes(lzma.compress(val.read_bytes()))
    shutil.copy(val, folder / "fineweb_sample")
    shutil.copy(corpus["TOKENIZER_PATH"], folder / "fineweb_sample/fineweb_1024_bpe.model")
    return folder


def test_packing_collects_text_scripts_and_wheels(queue, corpus, tmp_path):
    shared = shared_folder(tmp_path / "shared", corpus)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").write_bytes(b"wheel")
    status, said = queue(
        *("--pack", str(shared), "--pr889", str(ROOT / "runs/demo.sh"), "--wheels", str(wheels))
    )
    assert status == 0, said
    assert "bytes; with the repository's" in said
    data = queue.root / "data/gpu"
    assert (data / "pr889_train_gpt.py").read_bytes() == (ROOT / "runs/demo.sh").read_bytes()
    assert len(list(data.glob("docs/*.xz"))) == 5
    with tarfile.open(queue.root / "data/gpu_wheels/1of1/part") as parts:
        assert parts.getnames() == ["a.whl"]


def test_unpacked_text_is_that_of_the_shards(corpus, tmp_path):
    from bench import gpu_queue

    shared, out = shared_folder(tmp_path / "shared", corpus), tmp_path / "out"
    gpu_queue.unpack(shared, out)
    source = Path(corpus["DATA_PATH"])
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        assert (out / "docs" / name).read_bytes() == (source / name).read_bytes()
    write_shard(out / "long/fineweb_val_000000.bin", np.arange(70_000) % 500)
    gpu_queue.shorten(out / "long", out / "short")
    short = t.load_shard(out / "short/fineweb_val_000000.bin")
    np.testing.assert_array_equal(short, np.arange(gpu_queue.SHORT) % 500)


@pytest.mark.slow  # some runs of the script, and the tests of a kernel
def test_the_queue_on_a_cpu(corpus, tmp_path):
    """Kept in $OUT: a log of each item, the logs of the runs, what `long` made."""
    data, out, state = tmp_path / "gpu", tmp_path / "out", tmp_path / "state"
    settings = dict(
        PATH=os.environ["PATH"],
        PYTHON=sys.executable,
        QUEUE_TINY="1",
        QUEUE_DATA=str(data),
        QUEUE_DIR=str(state),
        OUT=str(out),
        VOCAB_SIZE="512",
        CUDA_VISIBLE_DEVICES="",
        QUEUE_LIMIT="300",
    )
    shared = shared_folder(tmp_path / "shared", corpus)
    command = ["bash", str(ROOT / "bench/gpu_queue.sh")]
    options = dict(env=settings, text=True, capture_output=True, timeout=2 * DEADLINE)
    subprocess.run([*command, "--pack", str(shared)], check=True, **options)
    shutil.copy(ROOT / "train_gpt.py", data / "train_gpt_old_loader.py")
    items = "works", "loader", "ttt", "adapters", "long"
    done = subprocess.run([*command, *items], **options)
    logs = {name: (out / f"{name}.log").read_text() for name in items}
    assert done.returncode == 0, (done.stdout, {name: log[-1000:] for name, log in logs.items()})
    assert "stopped by SIGTERM" in logs["works"]
    assert "resume:" in logs["works"]
    assert "ttt:score_first" in logs["ttt"]
    assert logs["adapters"].count("ttt:score_first documents:") == 3
    rows = {line.split()[0] for line in (out / "summary.txt").read_text().splitlines()[1:]}
    assert rows == {
        "works", "old_loader", "old_loader_docs", "defaults", "defaults_docs",
        "defaults_overlapping", "defaults_ttt", "long",
        "defaults_apart", "defaults_adapters_8", "defaults_adapters_96",
    }  # fmt: skip
    with tarfile.open(out / "runs.tar.gz") as logs:
        assert "long/logs/long.txt" in logs.getnames()
    (artifact,) = out.glob("long*.int6.ptz")
    assert artifact.read_bytes().startswith(b"PGOLF")
    assert (out / "long_scores.npz").exists()
