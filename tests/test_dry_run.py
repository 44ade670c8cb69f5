"""DRY_RUN=1: it says what a run would do, and leaves nothing behind."""

import re

import pytest
from helpers import ALONE, KeptLog, run_script, tiny

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
        r"size +[\d,]+ parameters: at most [\d.]+ bits for each",
        r"step +[\d.]+ ms",
        r"training +\d+ steps in \d+ s",
        r"packing +[\d.]+ s",
        r"scoring +[\d.]+ s for two validations, [\d.]+ s with stride",
        r"counting +[\d.]+ s",
        r"evaluation +\d+ s of EVAL_BUDGET_SECONDS=600",
        r"all of this holds",
    ):
        assert re.search(f"^  {line}", done.stdout, re.M), line
    assert len(done.stdout.splitlines()) < 24
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(EVAL_BUDGET_SECONDS=0.1), "evaluation would take"),
        (dict(WARMDOWN_ITERS=10**6), "WARMDOWN_ITERS=1000000: the learning rates would never be"),
    ],
)
def test_what_will_not_hold_ends_with_status_1(tmp_path, corpus, monkeypatch, settings, problem):
    monkeypatch.chdir(tmp_path)
    log = t.RunLog("dry")
    with pytest.raises(t.UserError, match=f"this will not hold: .*{problem}"):
        t.dry_run(tiny(**corpus, **settings), ALONE, log)


@pytest.mark.parametrize("name", ["EVAL_ONLY", "RESUME"])
def test_only_a_run_from_its_start_is_forecast(tmp_path, corpus, name):
    with pytest.raises(t.UserError, match="from its start"):
        t.dry_run(tiny(**corpus, **{name: "x"}), ALONE, KeptLog())


@pytest.mark.parametrize(
    "settings, steps, seconds",
    [
        (dict(ITERATIONS=7, MAX_WALLCLOCK_SECONDS=0), 7, 2 * 3 + 5 * 5),
        (dict(ITERATIONS=10**6), 133, 600),
    ],
)
def test_steps_are_what_the_time_buys(corpus, monkeypatch, settings, steps, seconds):
    """Each step takes 3 seconds of this clock before recurrence begins, and 5 after it."""
    hp = tiny(
        **{**corpus, "MAX_WALLCLOCK_SECONDS": 600, "LATE_QAT_THRESHOLD": 0, **settings},
        RECUR_LAYERS="1",
        RECUR_START=0.25,
        QUANTIZER="rows",
    )
    now = [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])

    def training_step(state, loader, loss, plan):
        now[0] += 3 if plan.passes == t.block_passes(hp)[0] else 5
        return t.torch.zeros(())

    monkeypatch.setattr(t, "training_step", training_step)
    loader = t.TokenLoader(hp, 0, 1)
    found, took, _ = t.forecast_training(t.GPT(hp), loader, ALONE, KeptLog())
    assert found == steps  # 600 s are 133 steps of 4.5 s on average
    assert abs(took / seconds - 1) < 0.02


def test_out_of_memory_says_what_to_lower_and_to_what():
    hp = tiny(MICRO_BATCH_TOKENS=4096, VAL_BATCH_SIZE=8192)
    shown = t.explained(MemoryError("no room"), {}, hp, t.StopSignal(), KeptLog())
    assert isinstance(shown, t.UserError)
    assert "MICRO_BATCH_TOKENS=2048" in str(shown) and "VAL_BATCH_SIZE=4096" in str(shown)
