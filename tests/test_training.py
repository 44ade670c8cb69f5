"""Training: what each step is told, the clock, the averages, what comes out."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    BRIEF,
    STEADY,
    FakeRanks,
    KeptLog,
    final_passes,
    launched,
    new_state,
    new_training,
    tiny,
    train,
    validation_of,
)

import train_gpt as t


@pytest.fixture
def plans(monkeypatch) -> list[t.StepPlan]:
    """What each step from here on is told."""
    seen, plain = [], t.training_step

    def training_step(state, loader, loss, plan):
        seen.append(plan)
        return plain(state, loader, loss, plan)

    monkeypatch.setattr(t, "training_step", training_step)
    return seen


# --- the plan of a step ---------------------------------------------------------------------------

PLANNED = dict(
    RECUR_LAYERS="1,2",
    RECUR_START=0.5,
    ITERATIONS=100,
    WARMDOWN_ITERS=40,
    LATE_QAT_THRESHOLD=0.5,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "step, scale, passes, hardness",
    [
        (0, 1.0, (0, 1, 2, 3), None),
        (49, 1.0, (0, 1, 2, 3), None),
        (50, 1.0, (0, 1, 2, 1, 2, 3), None),
        (70, 0.75, (0, 1, 2, 1, 2, 3), None),
        (80, 0.5, (0, 1, 2, 1, 2, 3), None),
        (90, 0.25, (0, 1, 2, 1, 2, 3), 8.5),
        (100, 0.0, (0, 1, 2, 1, 2, 3), 16.0),
    ],
)
def test_a_plan_follows_from_the_step(step, scale, passes, hardness):
    plan = t.plan_step(step, 0.0, tiny(**PLANNED), CPU)
    assert plan.scale == pytest.approx(scale)
    assert plan.passes == passes
    assert (plan.hardness and plan.hardness.item()) == hardness


def test_a_plan_follows_from_the_clock_where_that_ends_training():
    hp = tiny(**PLANNED | dict(ITERATIONS=10**6), MAX_WALLCLOCK_SECONDS=100, QUANTIZER="rows")
    by_clock = [t.plan_step(seconds, float(seconds), hp, CPU) for seconds in (49, 50, 90)]
    assert [len(plan.passes) for plan in by_clock] == [4, 6, 6]
    assert [plan.scale for plan in by_clock] == pytest.approx([1, 1, 0.25])


def test_a_plan_ends_late_qat_where_a_slow_first_step_began_it():
    """The speed of one step promises no time for more; that of a few knows better."""
    hp = tiny(
        ITERATIONS=10**6, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=50, LATE_QAT_THRESHOLD=0.15,
        QUANTIZER="rows",
    )  # fmt: skip
    early, later = t.plan_step(1, 30.0, hp, CPU), t.plan_step(5, 31.0, hp, CPU)
    assert early.hardness is not None
    assert later.hardness is None


def test_without_late_qat_no_plan_rounds():
    hp = tiny(LATE_QAT_THRESHOLD=0)
    assert t.plan_step(hp.iterations, 0.0, hp, CPU).hardness is None


# --- the loop -------------------------------------------------------------------------------------


def test_late_qat_hardens_from_1_to_16_as_the_rate_falls_to_zero(corpus, plans):
    settings = dict(ITERATIONS=10, WARMDOWN_ITERS=8, LATE_QAT_THRESHOLD=0.5, QAT_ROUNDING="soft")
    train(corpus, **settings, WARMUP_STEPS=0)
    expected = [1 + 15 * (1 - p.scale / 0.5) if p.scale < 0.5 else None for p in plans]
    found = [None if p.hardness is None else p.hardness.item() for p in plans]
    assert found == [x and pytest.approx(x) for x in expected]
    assert None in found and found[-1] is not None


def test_the_rate_falls_linearly_over_the_last_steps(corpus, plans):
    train(corpus, ITERATIONS=6, WARMDOWN_ITERS=4, WARMUP_STEPS=0)
    assert [plan.scale for plan in plans] == [1, 1, 1, 0.75, 0.5, 0.25]


def test_an_average_without_snapshots_is_not_named(corpus):
    _, log = train(corpus, ITERATIONS=3, WARMDOWN_ITERS=0, AVERAGING="ema_swa")
    (line,) = log.starting("averaging:")
    assert line.startswith("averaging:ema ema_updates:3 swa_updates:0 ")


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_loss_that_is_not_finite_is_noticed_also_in_the_last_step(corpus, monkeypatch, bad):
    """A loss is looked at once the next step is under way, or at the end."""
    plain = t.training_step

    def training_step(state, *args):
        loss = plain(state, *args)
        return loss * math.nan if state.steps == bad else loss

    monkeypatch.setattr(t, "training_step", training_step)
    with pytest.raises(t.UserError, match=f"^step:{bad}/3: the training loss is not finite"):
        train(corpus, ITERATIONS=3, WARMUP_STEPS=0)


@pytest.mark.parametrize("device, expected", [("cpu", False), ("cuda", True)])
def test_on_a_gpu_the_step_that_is_under_way_counts_too(corpus, device, expected):
    """Five steps in 7 s: another that takes twice the average ends at 9.8 s, two at 11.2 s or
    later."""
    ranks = FakeRanks(0, 1)
    ranks.device = torch.device(device)
    training = new_training(corpus, MAX_WALLCLOCK_SECONDS=10, QUANTIZER="rows")
    state, _ = new_state(training._replace(ranks=ranks))
    state.progress.copy_(torch.tensor([5, 7.0]))
    assert t.time_is_up(state) == expected


# --- what comes out -------------------------------------------------------------------------------


def test_training_returns_the_weights_that_the_model_is_left_with(corpus):
    training = new_training(corpus, **STEADY)
    trained = t.train(*training)
    found = training.model.state_dict()
    assert list(trained.weights) == list(found)
    assert all(torch.equal(w, found[name]) for name, w in trained.weights.items())
    assert all(w.data_ptr() != found[name].data_ptr() for name, w in trained.weights.items())


def test_without_averages_the_last_validation_is_that_of_what_is_packed(corpus):
    training = new_training(corpus, AVERAGING="none")
    trained = t.train(*training)
    _, passes = t.block_passes(training.model.hp)
    scorer = t.Scorer(training.model, passes)
    again = t.validate(scorer, training.validation, ALONE, training.log)
    assert trained.validated == again


def test_averages_are_validated_before_they_are_packed(corpus):
    trained, _ = train(corpus)
    assert trained.validated is None


def test_a_network_without_its_recurrence_is_validated_again_with_it(corpus, monkeypatch):
    monkeypatch.setattr(t, "training_share", lambda *_: 0.1)  # the time was over early
    trained, _ = train(corpus, AVERAGING="none", RECUR_LAYERS="1", RECUR_START=0.9)
    assert trained.validated is None


def test_training_returns_a_curvature_only_where_the_quantiser_needs_it(corpus):
    for quantizer, is_needed in (("gptq", True), ("rows", False)):
        trained, log = train(corpus, ITERATIONS=1, QUANTIZER=quantizer)
        assert bool(trained.curvature) == bool(log.starting("gptq_curvature ")) == is_needed


def test_the_curvature_is_that_of_the_averaged_weights_and_the_final_passes(corpus, monkeypatch):
    seen, plain = [], t.measure_curvature

    def measure(model, passes, loader, step, ranks):
        seen.append((model.embed.weight.detach().clone(), passes, step))
        return plain(model, passes, loader, step, ranks)

    monkeypatch.setattr(t, "measure_curvature", measure)
    training = new_training(corpus, ITERATIONS=3, RECUR_LAYERS="1,2")
    trained = t.train(*training)
    ((weights, passes, step),) = seen
    assert torch.equal(weights, trained.weights["embed.weight"])
    assert (passes, step) == (final_passes(training.model), 3)


def test_measuring_the_curvature_counts_as_training_time(corpus, monkeypatch):
    """A clock on which a step takes a second, measuring five, and nothing else any."""
    clock = [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: clock[0])
    step, measure = t.training_step, t.measure_curvature

    def taking(function, seconds):
        def timed(*args):
            clock[0] += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(t, "training_step", taking(step, 1))
    monkeypatch.setattr(t, "measure_curvature", taking(measure, 5))
    trained, log = train(corpus, ITERATIONS=3, WARMUP_STEPS=0)
    assert (trained.steps, trained.seconds) == (3, 8.0)
    (line,) = log.starting("gptq_curvature ")
    assert "seconds:5.0 " in line and "train_time:8000ms" in line


def test_a_model_that_is_scored_alone_gets_no_optimizer(corpus, tmp_path, monkeypatch):
    """EVAL_ONLY needs the memory of the weights, not that of momenta and averages."""
    monkeypatch.chdir(tmp_path)
    settings = {**corpus, **BRIEF, "EVAL_ONLY": "a.ptz"}
    state = t.GPT(tiny(**corpus)).state_dict()
    (tmp_path / "a.ptz").write_bytes(t.pack(state, tiny(**corpus)).blob)
    monkeypatch.setattr(t, "TrainState", None)
    monkeypatch.setattr(t, "build_optimizers", None)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", None)
    log = t.RunLog("alone")
    t.run(tiny(**settings), t.Ranks({}), log, t.StopSignal(), [])
    assert "\nresult {" in log.path.read_text()


# --- what is turned on but cannot act -------------------------------------------------------------


def idle_parts(corpus, world_size: int = 1, num_targets: int = 5000, **settings) -> list[str]:
    """The warnings at the start of a run with these settings, TINY's for the others."""
    hp = tiny(**corpus, **settings)
    validation = validation_of(np.zeros(num_targets + 1, np.uint16), np.ones(num_targets))
    return list(t.idle_parts(hp, t.TokenLoader(hp, 0, world_size), validation))


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            dict(WARMDOWN_ITERS=24),
            "WARMDOWN_ITERS=24 is more than ITERATIONS=12: the learning rates begin at 0.5",
        ),
        (dict(MIN_LR=0.3), "LATE_QAT_THRESHOLD=0.3 is never reached: the lr scale stays at 0.41"),
        (
            dict(WARMDOWN_ITERS=0),
            "LATE_QAT_THRESHOLD=0.3 is never reached: the lr scale stays at 1",
        ),
        (
            dict(MIN_LR=0.3, MAX_WALLCLOCK_SECONDS=9),
            "LATE_QAT_THRESHOLD=0.3 is never reached: the lr scale stays at 0.3 or more",
        ),
        (
            dict(AVERAGING="swa", SWA_EVERY=13),
            "AVERAGING=swa: SWA takes no snapshot, as the lr scale is not below",
        ),
        (dict(AVERAGING="ema_swa", SWA_EVERY=7), "AVERAGING=ema_swa: SWA takes no snapshot"),
        (
            dict(AVERAGING="swa", SWA_EVERY=1, MIN_LR=0.2, MAX_WALLCLOCK_SECONDS=9),
            "AVERAGING=swa: SWA takes no snapshot",
        ),
        (
            dict(RECUR_LAYERS=1, RECUR_START=0.95),
            "RECUR_START=0.95 is never reached in 12 steps",
        ),
        (
            dict(TRAIN_BATCH_TOKENS=32 * 13, MICRO_BATCH_TOKENS=128),
            "TRAIN_BATCH_TOKENS=416 makes 13 micro-batches of 1 x 32 tokens on each rank; "
            "a multiple of 128 makes larger and fewer ones",
        ),
        (
            dict(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=5000),
            "TTT_CHUNK_TOKENS=5000: the whole stream of 5000 targets is scored before",
        ),
    ],
)
def test_what_cannot_act_is_said_in_one_line(settings, said, corpus):
    (warning,) = idle_parts(corpus, **settings)
    assert warning.startswith(said)
    assert "\n" not in warning


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(AVERAGING="ema_swa", SWA_EVERY=1),
        dict(MAX_WALLCLOCK_SECONDS=9),
        dict(LATE_QAT_THRESHOLD=0, WARMDOWN_ITERS=0),
        dict(TRAIN_BATCH_TOKENS=32 * 13),
        dict(TRAIN_BATCH_TOKENS=32 * 2),
        dict(TRAIN_BATCH_TOKENS=32 * 13, MICRO_BATCH_TOKENS=32),
        dict(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=4999),
        dict(RECUR_LAYERS=1),
        dict(WARMDOWN_ITERS=24, WARMDOWN_FRAC=0.5),
    ],
)
def test_nothing_is_said_where_all_can_act(settings, corpus):
    assert idle_parts(corpus, **settings) == []


@pytest.mark.parametrize(
    "system", ["demo", "backoff", "order_adaptive", "prefill", "frontier", "sp8192"]
)
def test_launch_scripts_warn_of_nothing(system, corpus, tmp_path):
    _, env = launched(system, tmp_path)
    hp = t.Hyperparameters.from_env(env)
    assert hp.without_effect(env) == []
    ranks = 2 if system == "demo" else 8
    validation = validation_of(np.zeros(60_001, np.uint16), np.ones(60_000))
    hp = t.Hyperparameters.from_env(env | corpus)
    assert list(t.idle_parts(hp, t.TokenLoader(hp, 0, ranks), validation)) == []


def test_the_defaults_warn_of_nothing(corpus):
    validation = validation_of(np.zeros(60_001, np.uint16), np.ones(60_000))
    hp = t.Hyperparameters.from_env(corpus)
    for ranks in (1, 2, 4, 8):
        assert list(t.idle_parts(hp, t.TokenLoader(hp, 0, ranks), validation)) == []


def test_what_cannot_act_is_said_before_training(corpus, tmp_path, monkeypatch):
    def train(*args):
        raise t.Stopped("training begins")

    monkeypatch.setattr(t, "train", train)
    log = KeptLog(tmp_path / "log.txt")
    with pytest.raises(t.Stopped, match="training begins"):
        t.run(tiny(**corpus, WARMDOWN_ITERS=24), ALONE, log, t.StopSignal(), ["of the settings"])
    first, second = log.starting("warning:")
    assert first == "warning: of the settings"
    assert second.startswith("warning: WARMDOWN_ITERS=24 is more than ITERATIONS=12")


def test_an_average_without_a_snapshot_is_pointed_out(corpus):
    _, log = train(corpus, AVERAGING="swa", SWA_EVERY=7, **BRIEF)
    assert "warning: AVERAGING=swa: swa took no snapshot" in log.lines


@pytest.mark.parametrize(
    "warmdown, warns", [(300, True), (60, False), (10**6 + 1, False)], ids=["long", "fits", "known"]
)
def test_a_warm_down_that_the_clock_makes_too_long_is_pointed_out(warmdown, warns, corpus):
    """The time limit allows 100 steps. A warm-down longer than ITERATIONS was warned of before."""
    training = new_training(
        corpus,
        ITERATIONS=10**6,
        WARMDOWN_ITERS=warmdown,
        MAX_WALLCLOCK_SECONDS=100,
        QUANTIZER="rows",
    )
    state, _ = new_state(training)
    state.progress[0] = 10
    state.progress[1] = 10.0
    plan = t.plan_step(10, 10.0, state.hp, CPU)
    t.log_changes(plan, plan, state)
    said = training.log.starting(f"warning: WARMDOWN_ITERS={warmdown} is more than three times")
    assert bool(said) == warns
