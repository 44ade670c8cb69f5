"""The loop: what each step is told."""

import pytest
from helpers import new_trainer

import train_gpt as t


def steps_of(trainer) -> list[tuple[float, float | None]]:
    """Train, and return (lr scale, hardness of late QAT) of each step."""
    seen = []
    plain = trainer.step

    def step(scale, hardness):
        seen.append((scale, None if hardness is None else float(hardness)))
        return plain(scale, hardness)

    trainer.warm_up = lambda: None
    trainer.step = step
    t.train(trainer)
    return seen


def test_late_qat_hardens_from_1_to_16_as_the_rate_falls_to_zero(corpus):
    settings = dict(ITERATIONS=10, WARMDOWN_ITERS=8, LATE_QAT_THRESHOLD=0.5, QAT_ROUNDING="soft")
    seen = steps_of(new_trainer(corpus, **settings))
    expected = [1 + 15 * (1 - scale / 0.5) if scale < 0.5 else None for scale, _ in seen]
    assert [hardness for _, hardness in seen] == [x and pytest.approx(x) for x in expected]


def test_late_qat_ends_where_a_slow_first_step_began_it(corpus):
    """The speed of one step promises no time for more; that of a few knows better."""
    trainer = new_trainer(corpus, LATE_QAT_THRESHOLD=0.15)
    early = t.late_qat_hardness(trainer, 0.08, None)
    assert early is not None
    assert t.late_qat_hardness(trainer, 1.0, early) is None


def test_an_average_without_snapshots_is_not_named(corpus):
    trainer = new_trainer(corpus, ITERATIONS=3, WARMDOWN_ITERS=0, AVERAGING="ema_swa")
    t.train(trainer)
    (line,) = [line for line in trainer.log.lines if line.startswith("averaging:")]
    assert line.startswith("averaging:ema ema_updates:3 swa_updates:0 ")


def test_the_rate_falls_linearly_over_the_last_steps(corpus):
    seen = steps_of(new_trainer(corpus, ITERATIONS=6, WARMDOWN_ITERS=4))
    assert [scale for scale, _ in seen] == [1, 1, 1, 0.75, 0.5, 0.25]
