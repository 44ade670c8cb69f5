"""DRY_RUN=1: it says what a run would do, and leaves nothing behind."""

import re
import shutil

import numpy as np
import pytest
from helpers import ADAPTERS, ALONE, KeptLog, patched, run_script, scorer_of, tiny, validation_of

import train_gpt as t


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dry_run_forecasts_on_one_screen_and_leaves_nothing(tmp_path, corpus, ranks):
    settings = {**corpus, "DRY_RUN": 1, "RUN_ID": "dry", "SAVE_SCORES": 1}
    done = run_script(tmp_path, ranks, **settings, MAX_WALLCLOCK_SECONDS=30, WARMDOWN_FRAC=0.5)
    assert done.returncode == 0, done.stderr
    for line in (
        r"data +3 shards, \d[\d,]+ tokens to train on, 6,000 targets to score; stream unknown",
        r"file +logs/dry\.ckpt: at most [\d,]+ bytes",
        r"file +logs/dry\.int6\.ptz: at most [\d,]+ bytes",
        r"file +logs/dry_scores\.npz: at most [\d,]+ bytes",
        r"size +[\d,]+ parameters, for each of which the size cap leaves [\d.]+ bits",
        r"step +[\d.]+ ms",
        r"training +\d+ steps in \d+ s",
        r"packing +[\d.]+ s",
        r"scoring +[\d.]+ s for two validations, [\d.]+ s with stride 8",
        r"counting +[\d.]+ s while .*; at most 0.0 GB of rank 0's memory, of which [\d.]+ GB are",
        r"evaluation +\d+ s of EVAL_BUDGET_SECONDS=600",
        r"all of this holds",
    ):
        assert re.search(f"^  {line}", done.stdout, re.M), line
    assert len(done.stdout.splitlines()) < 24
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def forecast(tmp_path, corpus, monkeypatch, **settings) -> None:
    monkeypatch.chdir(tmp_path)
    t.dry_run(tiny(**corpus, **settings), ALONE, t.RunLog("dry"), [])


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(EVAL_BUDGET_SECONDS=0.1), "evaluation would take .*: raise EVAL_STRIDE"),
        (dict(WARMDOWN_ITERS=10**6), "WARMDOWN_ITERS=1000000: the learning rates would never be"),
        (
            dict(MAX_WALLCLOCK_SECONDS=0.001, WARMDOWN_FRAC=0.5),
            "one step, a checkpoint and the curvature take .* MAX_WALLCLOCK_SECONDS=0.001: raise",
        ),
    ],
)
def test_what_will_not_hold_ends_with_status_1(tmp_path, corpus, monkeypatch, settings, problem):
    with pytest.raises(t.UserError, match=f"this will not hold: .*{problem}"):
        forecast(tmp_path, corpus, monkeypatch, **settings)


def test_counting_must_have_room_in_memory(tmp_path, corpus, monkeypatch):
    """6,000 targets take 63 bytes each with 7-grams, and 4 more for each longer n."""
    monkeypatch.setattr(t, "available_memory", lambda: 6000 * 63)
    forecast(tmp_path, corpus, monkeypatch)
    with pytest.raises(t.UserError, match="counting n-grams needs 0.0 GB .* lower NGRAM_ORDER"):
        forecast(tmp_path, corpus, monkeypatch, NGRAM_ORDER=8)


def test_without_counting_no_memory_is_asked_for(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(t, "available_memory", lambda: 0)
    forecast(tmp_path, corpus, monkeypatch, NGRAM_ENABLED=0)


@pytest.mark.parametrize(
    "held, problem",
    [
        ([96, 95], "training takes 96 of 100 MiB .*: set MICRO_BATCH_TOKENS=256"),
        ([95, 96], "scoring takes 96 of 100 MiB .*: set VAL_BATCH_SIZE=512"),
        ([95, 95], None),
    ],
)
def test_the_gpu_must_have_memory_to_spare(tmp_path, corpus, monkeypatch, held, problem):
    found = iter([(mib << 20, 100 << 20) for mib in held])
    monkeypatch.setattr(t, "gpu_memory", lambda device: next(found))
    if problem is None:
        forecast(tmp_path, corpus, monkeypatch)
        return
    with pytest.raises(t.UserError, match=f"this will not hold: {problem}$"):
        forecast(tmp_path, corpus, monkeypatch)


def test_the_disk_must_have_room(tmp_path, corpus, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(t.shutil, "disk_usage", lambda path: full)
    with pytest.raises(t.UserError, match="the disk has 0 bytes free"):
        forecast(tmp_path, corpus, monkeypatch)


def test_a_dry_run_warns_as_a_run_would(tmp_path, corpus):
    settings = {**corpus, "DRY_RUN": 1, "STRIDE": 8, "SWA_EVERY": 9, "LATE_QAT_THRESHOLD": 1e-9}
    done = run_script(tmp_path, 0, **settings, MIN_LR=0.1)
    for warning in (
        "STRIDE is set but",
        "SWA_EVERY=9 has no effect",
        "LATE_QAT_THRESHOLD=1e-09 is",
    ):
        assert f"warning: {warning}" in done.stdout, warning


MEMINFO = "MemTotal:       24000000 kB\nMemAvailable:      5 kB\nMemFree: 3 kB\n"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"proc/meminfo": MEMINFO}, 5 * 1024),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"}, 5 * 1024),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n"}, 4096),
        ({}, 7 * 7),  # no Linux: all memory of the machine
    ],
)
def test_available_memory_is_what_the_machine_and_its_container_leave(
    tmp_path, monkeypatch, files, expected
):
    monkeypatch.setattr(t.os, "sysconf", lambda name: 7 if not files else 10**6)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert t.available_memory(tmp_path) == expected


@pytest.mark.parametrize("name", ["EVAL_ONLY", "RESUME"])
def test_only_a_run_from_its_start_is_forecast(tmp_path, corpus, name):
    with pytest.raises(t.UserError, match="from its start"):
        t.dry_run(tiny(**corpus, **{name: "x"}), ALONE, KeptLog(), [])


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time of a clock that only moves when a test says so."""
    now = [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    "settings, steps, seconds",
    [
        (dict(ITERATIONS=7, MAX_WALLCLOCK_SECONDS=0), 7, 2 * 3 + 5 * 5),
        (dict(ITERATIONS=10**6), 132, 132 * 4.5),
    ],
)
def test_steps_are_what_the_time_buys(corpus, monkeypatch, now, settings, steps, seconds):
    """Each step takes 3 seconds of this clock before recurrence begins, and 5 after it. Twice that
    is kept for the last one, which begins before 590 of 600 s: 4.5 s on average make 132 steps."""
    hp = tiny(
        **{**corpus, "MAX_WALLCLOCK_SECONDS": 600, "LATE_QAT_THRESHOLD": 0, **settings},
        RECUR_LAYERS="1",
        RECUR_START=0.25,
        QUANTIZER="rows",
    )

    def training_step(state, loader, loss, plan):
        now[0] += 3 if plan.passes == t.block_passes(hp)[0] else 5
        return t.torch.zeros(())

    monkeypatch.setattr(t, "training_step", training_step)
    loader = t.TokenLoader(hp, 0, 1)
    found = t.forecast_training(t.GPT(hp), loader, ALONE, KeptLog())
    assert found.steps == steps
    assert abs(found.seconds / seconds - 1) < 0.02


@pytest.mark.parametrize("micro_tokens", [64, 512])
@pytest.mark.parametrize("chunk_seconds", [0.3, 0.5, 1.0, 5.0])
def test_the_curvature_is_forecast_as_it_is_measured(
    corpus, monkeypatch, now, chunk_seconds, micro_tokens
):
    """Until its 4 seconds are over, or on all of its 20 chunks or more."""
    plain = t.curvature_batches

    def batches(*args):
        for chunk in plain(*args):
            now[0] += chunk_seconds
            yield chunk

    monkeypatch.setattr(t, "curvature_batches", batches)
    hp = tiny(
        **{**corpus, "MAX_WALLCLOCK_SECONDS": 600, "GPTQ_TOKENS": 512 * 20},
        MICRO_BATCH_TOKENS=micro_tokens,
    )
    loader = t.TokenLoader(hp, 0, 1)
    state = t.TrainState(t.GPT(hp), ALONE, KeptLog())
    passes, _ = t.block_passes(hp)
    _, forecast = t.forecast_curvature(state, passes, loader)
    began = now[0]
    t.measure_curvature(state.model, passes, loader, 0, ALONE)
    assert forecast == pytest.approx(now[0] - began)


def test_the_curvature_without_a_time_limit_takes_all_chunks(corpus, monkeypatch, now):
    plain = t.curvature_batches
    chunks = []

    def batches(*args):
        for chunk in plain(*args):
            now[0] += 1
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr(t, "curvature_batches", batches)
    monkeypatch.setattr(t, "CHUNK_TOKENS", 96)  # 3 of the 16 sequences of a batch
    hp = tiny(**corpus, GPTQ_TOKENS=1000, MICRO_BATCH_TOKENS=256)
    loader = t.TokenLoader(hp, 0, 1)
    state = t.TrainState(t.GPT(hp), ALONE, KeptLog())
    passes, _ = t.block_passes(hp)
    _, forecast = t.forecast_curvature(state, passes, loader)
    chunks.clear()
    t.measure_curvature(state.model, passes, loader, 0, ALONE)
    assert forecast == len(chunks) == 2 * 2 * 3


@pytest.mark.parametrize("chunks, seconds", [(6, 2 + 9 + 4 * 5), (2, 2 + 9), (1, 2)])
def test_learning_is_forecast_by_the_third_chunk(monkeypatch, now, chunks, seconds):
    """The first one is only scored, and the second one compiles."""

    def score_and_learn(*_):
        for took in [2, 9, 5, 5, 5, 5][:chunks]:
            now[0] += took
            yield None

    monkeypatch.setattr(t, "score_and_learn", score_and_learn)
    hp = tiny(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=100)
    tokens = np.zeros(100 * chunks - 3, np.uint16)
    validation = validation_of(tokens, np.ones(len(tokens) - 1, np.uint16))
    found = t.time_learning(scorer_of(t.GPT(hp)), validation, ALONE, KeptLog())
    assert found == seconds


def test_adapters_are_in_the_forecast(tmp_path, corpus, monkeypatch, capsys):
    forecast(tmp_path, corpus, monkeypatch, **ADAPTERS)
    said = capsys.readouterr().out
    assert " s with adapters per document\n" in said
    assert "ttt:" not in said


def test_test_time_training_is_in_the_forecast(tmp_path, corpus, monkeypatch, capsys):
    forecast(tmp_path, corpus, monkeypatch, TTT_EPOCHS=1, TTT_CHUNK_TOKENS=1000)
    assert " s with stride 8 and test-time training\n" in capsys.readouterr().out


# ---- out of memory


@pytest.mark.parametrize(
    "phase, function",
    [
        ("training", "training_loss"),
        ("scoring", "score_windows"),
        ("a dry run", "training_loss"),
        ("a dry run", "score_windows"),
    ],
)
def test_out_of_memory_says_what_to_lower_and_to_what(tmp_path, corpus, phase, function):
    """A GPU's error, raised artificially in the middle of a run."""
    code = f"""
def full(*args, **options):
    raise t.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
t.{function} = full
"""
    script = patched(tmp_path / "full.py", code)
    settings = {**corpus, "MICRO_BATCH_TOKENS": 256, "DRY_RUN": int(phase == "a dry run")}
    done = run_script(tmp_path, 0, script, **settings)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "train_gpt.py: error: out of memory: try MICRO_BATCH_TOKENS=128 if this came in training, "
        "VAL_BATCH_SIZE=512 if this came in scoring, or a smaller model (CUDA out of memory. Tried "
        "to allocate 9 GiB.)"
    )


@pytest.mark.parametrize("settings", [dict(EVAL_ONLY="x"), dict()])
def test_out_of_memory_after_training_says_what_helps_in_scoring(settings):
    log = KeptLog()
    log.left = {} if settings else {"artifact": "EVAL_ONLY=x scores it again"}
    error = t.torch.OutOfMemoryError("full")
    said = str(t.explained(error, {}, tiny(**settings), t.StopSignal(), log))
    assert "VAL_BATCH_SIZE=512" in said and "MICRO_BATCH_TOKENS" not in said


def test_out_of_memory_outside_a_gpu_names_counting():
    said = str(t.explained(MemoryError("full"), {}, tiny(), t.StopSignal(), KeptLog()))
    assert "NGRAM_ENABLED=0 if this came in counting" in said


@pytest.mark.parametrize(
    "phase, settings, world_size, smaller",
    [
        ("training", dict(MICRO_BATCH_TOKENS=256), 1, "MICRO_BATCH_TOKENS=128"),
        ("training", dict(), 1, "MICRO_BATCH_TOKENS=256"),  # a batch has 512 tokens
        ("training", dict(), 8, "MICRO_BATCH_TOKENS=32"),  # of which a rank has 64
        ("training", dict(MICRO_BATCH_TOKENS=63), 1, "TRAIN_SEQ_LEN=16"),
        ("scoring", dict(), 2, "VAL_BATCH_SIZE=512"),
        ("scoring", dict(VAL_BATCH_SIZE=64), 1, "VAL_BATCH_SIZE=32"),
        ("scoring", dict(VAL_BATCH_SIZE=64), 2, "EVAL_SEQ_LEN=16"),
        (
            "scoring",
            dict(TTT_LORA_RANK=8, TTT_BATCH_SIZE=6, TTT_CHUNK_SIZE=8),
            2,
            "TTT_BATCH_SIZE=3",
        ),
    ],
)
def test_a_smaller_batch_has_half_the_tokens(phase, settings, world_size, smaller):
    assert t.smaller_batch(phase, tiny(**settings), world_size) == smaller
