"""Time limits, on a clock that only moves when a test says so: training with curvature and
checkpoints ends within MAX_WALLCLOCK_SECONDS, evaluation within EVAL_BUDGET_SECONDS."""

import math

import numpy as np
import pytest
import torch
from helpers import ALONE, KeptLog, new_training, scorer_of, tiny, train, validation_of

import train_gpt as t

# --- training -------------------------------------------------------------------------------------


class Durations:
    """A fake clock, which replaces perf_counter. It stands still, except while a function runs that
    was given a duration."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(t, "perf_counter", lambda: self.now)

    def takes(self, holder, name: str, seconds) -> None:
        """Calls of holder.name take `seconds()`."""
        plain = getattr(holder, name)

        def timed(*args, **options):
            self.now += seconds()
            return plain(*args, **options)

        self.monkeypatch.setattr(holder, name, timed)

    def chunks_take(self, seconds) -> None:
        """Each chunk of the curvature takes `seconds()`."""
        plain = t.curvature_batches

        def batches(*args):
            for chunk in plain(*args):
                self.now += seconds()
                yield chunk

        self.monkeypatch.setattr(t, "curvature_batches", batches)


@pytest.fixture
def clock(monkeypatch) -> Durations:
    """A fake clock on which a validation takes 100 s and everything else no time, until a test
    gives it a duration. Training steps are counted, but compute nothing."""

    def training_step(state, *args):
        state.progress[0] += 1
        return torch.zeros(())

    clock = Durations(monkeypatch)
    monkeypatch.setattr(t, "training_step", training_step)
    monkeypatch.setattr(t, "validate", lambda *args: (0.0, 0.0))
    clock.takes(t, "validate", lambda: 100.0)
    return clock


class Unit:
    """Durations of one kind of work: often `usual`, sometimes up to twice the longest so far."""

    def __init__(self, rng, usual: float):
        self.rng = rng
        self.usual = self.longest = usual
        self.total, self.count = 0.0, 0

    def __call__(self) -> float:
        seconds = self.usual
        if self.count and self.rng.random() < 0.1:
            seconds = min(2 * self.longest, 3 * self.usual)
        self.longest = max(self.longest, seconds)
        self.total += seconds
        self.count += 1
        return seconds


ENDLESS = dict(ITERATIONS=10**6, WARMUP_STEPS=0, LATE_QAT_THRESHOLD=0, TRAIN_LOG_EVERY=0)


@pytest.mark.parametrize("every, validations", [(0, 0), (1e-9, 0), (7, 9)])
@pytest.mark.parametrize("step, checkpoint, chunk", [(1, 0.1, 6), (2, 5, 3)])
def test_training_ends_within_its_time(
    corpus, tmp_path, clock, rng, step, checkpoint, chunk, every, validations
):
    """As long as nothing takes more than twice as long as the longest of its kind so far. All that
    was done is on the clock, but for the trial before the first step and validations."""
    units = [Unit(rng, seconds) for seconds in (step, checkpoint, chunk)]
    clock.takes(t, "training_step", units[0])
    clock.takes(t.TrainState, "write_checkpoint", units[1])
    clock.chunks_take(units[2])
    settings = dict(ENDLESS, MAX_WALLCLOCK_SECONDS=60, CHECKPOINT_EVERY=every)
    training = new_training(corpus, tmp_path / "run.txt", **settings, VAL_LOSS_EVERY=validations)
    trial = sum(unit.usual for unit in units[1:])
    trained = t.train(*training)
    assert 30 < trained.seconds <= 60
    assert trained.seconds == pytest.approx(sum(unit.total for unit in units) - trial)
    assert (units[1].count > 2) == bool(every)  # the trial, the last one, those on the way
    assert t.read_checkpoint(str(tmp_path / "run.ckpt"))["progress"][0] == trained.steps


def test_a_checkpoint_near_the_end_counts_before_the_next_step_begins(corpus, tmp_path, clock):
    """12 s, steps of 1 s, checkpoints of 2 s, one due at 6 s. Nine steps and two checkpoints would
    be 13 s; with what may take twice as long, the last step ends at 7 s."""
    clock.takes(t, "training_step", lambda: 1.0)
    clock.takes(t.TrainState, "write_checkpoint", lambda: 2.0)
    settings = dict(ENDLESS, MAX_WALLCLOCK_SECONDS=12, QUANTIZER="rows", CHECKPOINT_EVERY=6)
    trained, log = train(corpus, tmp_path / "run.txt", **settings)
    assert (trained.steps, trained.seconds) == (7, 9.0)
    (line,) = log.starting("stopping_early:")
    assert line == "stopping_early: wallclock_cap train_time:7000ms step:7/1000000"


def test_the_trial_is_not_on_the_clock_and_leaves_nothing(corpus, tmp_path, clock):
    clock.takes(t.TrainState, "write_checkpoint", lambda: 5.0)
    clock.chunks_take(lambda: 3.0)
    training = new_training(corpus, tmp_path / "run.txt", MAX_WALLCLOCK_SECONDS=60)
    state = t.TrainState(training.model, training.ranks, training.log)
    before = {name: x.clone() for name, x in state.tensors().items()}
    t.try_units(state, (0, 1, 2, 3), training.loader)
    assert state.longest == {"step": 0, "checkpoint": 5, "chunk": 3}
    assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())
    assert not list(tmp_path.iterdir())
    assert all(p.grad is None for p in training.model.parameters())


def test_a_checkpoint_holds_the_time_that_it_takes_to_write_it(corpus, tmp_path, clock):
    """So a run that is stopped and resumed does not get it back."""
    clock.takes(t.TrainState, "write_checkpoint", lambda: 2.0)
    clock.takes(t, "training_step", lambda: 1.0)
    trained, _ = train(
        corpus, tmp_path / "run.txt", ITERATIONS=3, WARMUP_STEPS=0, QUANTIZER="rows",
        MAX_WALLCLOCK_SECONDS=600,
    )  # fmt: skip
    assert t.read_checkpoint(str(tmp_path / "run.ckpt"))["progress"][1] == trained.seconds == 5


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({}, 0),
        (dict(MAX_WALLCLOCK_SECONDS=10), 0),
        (dict(MAX_WALLCLOCK_SECONDS=16), 2),
        (dict(MAX_WALLCLOCK_SECONDS=0, ITERATIONS=9), 3),
    ],
)
def test_after_the_time_limit_no_step_is_taken_unless_there_is_more_time(
    corpus, tmp_path, clock, changes, steps
):
    """Steps of 1 s and checkpoints of 2 s, each of which may take twice as long: of 12 s, half a
    second is kept for the curvature, so that the last step begins at 5 s."""
    clock.takes(t, "training_step", lambda: 1.0)
    clock.takes(t.TrainState, "write_checkpoint", lambda: 2.0)
    settings = dict(ENDLESS, MAX_WALLCLOCK_SECONDS=12, GPTQ_RESERVE_SECONDS=0.5)
    first, _ = train(corpus, tmp_path / "run.txt", **settings)
    resumed = settings | changes | dict(RESUME=tmp_path / "run.ckpt")
    again, _ = train(corpus, tmp_path / "again.txt", **resumed)
    assert (first.steps, again.steps) == (6, 6 + steps)


def test_the_curvature_keeps_time_for_a_chunk_twice_as_long_as_the_longest(corpus, clock):
    """Chunks of 0.5, 1 and 0.5 s: after them 2 s are gone, and one of 2 s might end the reserve of
    4 s; another of 0.5 s more would pass it."""
    seconds = iter([0.5, 1.0, 0.5, 0.5, 0.5])
    clock.chunks_take(lambda: next(seconds))
    settings = dict(MAX_WALLCLOCK_SECONDS=600, GPTQ_TOKENS=512 * 100)
    model, loader, *_ = new_training(corpus, **settings)
    _, num_tokens = t.measure_curvature(model, (0, 1, 2, 3), loader, 0, ALONE)
    assert num_tokens == 4 * 512


# --- evaluation -----------------------------------------------------------------------------------

LENGTH = 2048


class FakeScoring:
    """Scoring without a model: a window takes `seconds`, after `slow_after` windows twice as long.
    The nll of a target is the stride that it was scored with."""

    def __init__(self, monkeypatch, seconds: float, slow_after: float = math.inf):
        self.now, self.windows = 0.0, 0
        self.seconds, self.slow_after = seconds, slow_after
        self.strides = {}
        monkeypatch.setattr(t, "score_windows", self.score_windows)
        monkeypatch.setattr(t, "perf_counter", lambda: self.now)

    def score_windows(self, scorer, tokens, spans, length, stride):
        self.strides[stride] = True
        for _ in range(spans.shape[1]):
            self.windows += 1
            self.now += self.seconds * (2 if self.windows > self.slow_after else 1)
        positions, scored = t.window_targets(spans, length)
        found = torch.from_numpy(positions[scored])
        yield found, torch.full((2, len(found)), float(stride))

    def evaluate(self, num_targets: int, log, **settings) -> t.Scores:
        """What evaluation returns that began at 0."""
        hp = tiny(EVAL_SEQ_LEN=LENGTH, EVAL_STRIDE=64, NGRAM_ENABLED=0, **settings)
        tokens = np.zeros(num_targets + 1, np.uint16)
        validation = validation_of(tokens, np.ones(num_targets, np.uint16))
        return t.evaluate(scorer_of(t.GPT(hp)), validation, 0.0, ALONE, log)


@pytest.mark.parametrize("slow_after", [70, 1000, math.inf])
@pytest.mark.parametrize("num_targets, batch", [(100_000, 1), (100_000, 8), (10_000, 64)])
@pytest.mark.parametrize("windows", [1.02, 3, 20])
def test_evaluation_ends_within_its_budget_whenever_the_widest_stride_can(
    monkeypatch, num_targets, batch, windows, slow_after
):
    """The budget is so many times what the validation takes, also where two segments are the whole
    stream, where one is more than the budget, and where scoring becomes slower."""
    scoring, log = FakeScoring(monkeypatch, 1.0, slow_after), KeptLog()
    validation = math.ceil(num_targets / LENGTH)
    if validation > batch:
        validation += -validation % batch  # batches are filled up
    budget = windows * validation
    scores = scoring.evaluate(
        num_targets, log, EVAL_BUDGET_SECONDS=budget, VAL_BATCH_SIZE=batch * LENGTH
    )
    assert scoring.now <= budget
    used = set(scores.nll.tolist())
    assert scores.stride == max(used)
    assert used <= {64, 96, 128, 256, 512, 1024, LENGTH}
    assert np.array_equal(np.sort(scores.nll), scores.nll)  # the rest is that of the widest
    assert log.starting("eval_budget projected:")[-1].split(" stride:")[1].split()[0] == str(
        scores.stride
    )


@pytest.mark.parametrize("budget", [0, 2000])
def test_with_ample_time_the_stride_is_that_of_the_settings(monkeypatch, budget):
    scoring, log = FakeScoring(monkeypatch, 1.0), KeptLog()
    scores = scoring.evaluate(100_000, log, EVAL_BUDGET_SECONDS=budget, VAL_BATCH_SIZE=LENGTH)
    assert set(scores.nll.tolist()) == {64} and scores.stride == 64
    assert set(scoring.strides) == {64, LENGTH}


def test_scoring_that_becomes_slower_leaves_the_rest_to_the_validation(monkeypatch):
    """49 windows of the validation, then 1,533 of stride 64, of which the last 600 take twice as
    long: that would be 2,182 s."""
    scoring, log = FakeScoring(monkeypatch, 1.0, slow_after=49 + 933), KeptLog()
    scores = scoring.evaluate(100_000, log, EVAL_BUDGET_SECONDS=1700, VAL_BATCH_SIZE=8 * LENGTH)
    done = int((scores.nll == 64).sum())
    assert 0.75 < done / 100_000 < 1
    assert (scores.nll[done:] == LENGTH).all()
    *_, line = log.starting("eval_budget ")
    assert line.endswith(f" budget:1700s stride:{LENGTH} from:{done}")
    assert 0.85 * 1700 < scoring.now <= 1700


def test_mixing_goes_on_where_scoring_was_left(monkeypatch):
    """The counts mix each target once, with the score that it has in the end."""
    FakeScoring(monkeypatch, 1.0, slow_after=100)
    hp = tiny(EVAL_SEQ_LEN=64, EVAL_STRIDE=16, EVAL_BUDGET_SECONDS=500, VAL_BATCH_SIZE=256)
    tokens = np.zeros(4001, np.uint16)
    validation = validation_of(tokens, np.ones(4000, np.uint16))
    scores = t.evaluate(scorer_of(t.GPT(hp)), validation, 0.0, ALONE, KeptLog())
    assert len(set(scores.nll.tolist())) == 2
    expected = t.mix(tokens, scores.nll, scores.entropy, hp)
    np.testing.assert_array_equal(scores.mixture.nll, expected)
