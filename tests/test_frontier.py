"""The frontier preset in training: schedules, depth recurrence that begins in the middle, the
launch script on one and four ranks. What its features compute: test_model.py, test_optimizer.py."""

import numpy as np
import pytest
import torch
from helpers import (
    FRONTIER,
    TINY,
    assert_same,
    finish,
    launched,
    losses,
    new_trainer,
    plain_scores,
    randomize,
    scores_of,
    start_python,
    state,
    tiny,
    trainer_with,
    values,
)

import train_gpt as t

RECURRENT = dict(RECUR_LAYERS="1,2", RECUR_START=0.5, ITERATIONS=8, WARMUP_STEPS=0)
PRESET = FRONTIER | RECURRENT | dict(MUON_ROW_NORM=1, EMBED_WD=0.09, WARMDOWN_FRAC=0.667)
PLAIN_ORDER = (0, 1, 2, 3)
FINAL_ORDER = (0, 1, 2, 1, 2, 3)


# --- schedules ------------------------------------------------------------------------------------


def test_a_share_of_training_is_that_of_steps_or_of_time_whichever_is_further():
    hp = tiny(ITERATIONS=100, MAX_WALLCLOCK_SECONDS=50, QUANTIZER="rows")
    found = [t.training_share(*done, hp) for done in ((0, 0.0), (40, 10.0), (40, 30.0), (90, 60.0))]
    assert found == [0, 0.4, 0.6, 1]


def test_warm_down_by_share_is_linear_over_the_last_part():
    hp = tiny(ITERATIONS=100, WARMDOWN_FRAC=0.5)
    assert [t.lr_scale(step, 0.0, hp) for step in (0, 50, 75, 100)] == [1, 1, 0.5, 0]


def test_warm_down_by_share_follows_the_clock_where_that_ends_training():
    hp = tiny(ITERATIONS=10**6, WARMDOWN_FRAC=0.5, MAX_WALLCLOCK_SECONDS=40, QUANTIZER="rows")
    assert [t.lr_scale(9, seconds, hp) for seconds in (20.0, 30.0, 40.0)] == [1, 0.5, 0]


@pytest.mark.parametrize("decay", [dict(WARMDOWN_FRAC=0.5), dict(WARMDOWN_ITERS=50)])
def test_rates_end_at_min_lr(decay):
    hp = tiny(ITERATIONS=100, MIN_LR=0.1, **decay)
    found = [t.lr_scale(step, 0.0, hp) for step in (50, 75, 100)]
    assert found == pytest.approx([1, 0.55, 0.1])


# --- depth recurrence while training --------------------------------------------------------------


@pytest.fixture
def orders(monkeypatch):
    """The order of blocks in each step from here on."""
    seen, step = [], t.Trainer.step

    def keep_order(trainer, scale, hardness):
        seen.append(trainer.model.order)
        return step(trainer, scale, hardness)

    monkeypatch.setattr(t.Trainer, "step", keep_order)
    return seen


def test_recurrence_begins_at_its_share_of_training(corpus, orders):
    t.train(new_trainer(corpus, **RECURRENT))
    assert orders == 4 * [PLAIN_ORDER] + 4 * [FINAL_ORDER]


def test_the_log_says_once_when_recurrence_begins(corpus):
    trainer = new_trainer(corpus, **RECURRENT)
    t.train(trainer)
    said = [line for line in trainer.log.lines if line.startswith("recurrence:")]
    assert said == ["recurrence:on step:4 passes:6"]


def test_without_recurrence_the_log_says_nothing_of_it(corpus):
    trainer = new_trainer(corpus, ITERATIONS=2)
    t.train(trainer)
    assert not any("recurrence" in line for line in trainer.log.lines)


def test_scoring_is_by_the_final_order(corpus):
    trainer = new_trainer(corpus, **RECURRENT)
    t.train(trainer)
    assert trainer.model.order == t.GPT(trainer.hp).order == FINAL_ORDER


def test_warm_up_runs_each_graph_that_training_may_need(corpus, monkeypatch):
    seen = []
    monkeypatch.setattr(
        t.Trainer,
        "step",
        lambda trainer, scale, hardness: seen.append((trainer.model.order, hardness is not None)),
    )
    new_trainer(corpus, **RECURRENT | dict(WARMUP_STEPS=4)).warm_up()
    assert sorted(seen) == [
        (order, rounded) for order in (FINAL_ORDER, PLAIN_ORDER) for rounded in (False, True)
    ]


def test_warm_up_reports_how_many_graphs_are_compiled(corpus, monkeypatch):
    """The other steps take no time: counted, they would promise a wait that never comes."""
    done, totals = [], []

    class Counted:
        def __init__(self, log, label, total):
            totals.append(total)

        def __call__(self, count):
            done.append(count)

    monkeypatch.setattr(t, "Progress", Counted)
    monkeypatch.setattr(t.Trainer, "step", lambda *_: None)
    new_trainer(corpus, **RECURRENT | dict(WARMUP_STEPS=20)).warm_up()
    assert (done, totals) == ([1, 2, 3, 4], [4])


def test_warm_up_runs_each_graph_though_its_steps_are_fewer(corpus, monkeypatch):
    steps = []
    monkeypatch.setattr(t.Trainer, "step", lambda *_: steps.append(1))
    new_trainer(corpus, **RECURRENT | dict(WARMUP_STEPS=1)).warm_up()
    assert len(steps) == 4


@pytest.mark.slow
def test_after_warm_up_no_change_of_order_or_rounding_compiles(rng):
    """Order and rounding are arguments of four graphs, all made before the clock starts."""
    torch.compiler.reset()
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    small = dict(NUM_LAYERS=3, RECUR_LAYERS="1", PARALLEL_START_LAYER=2, VE_LAYERS="2")
    model = randomize(t.GPT(tiny(**FRONTIER | small))).float()
    loss = torch.compile(t.training_loss, dynamic=False, fullgraph=True, backend=counting_backend)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    x, y = ids[:, :-1], ids[:, 1:]
    cases = [(order, h) for order in t.block_orders(model.hp) for h in (None, torch.ones(()))]
    found = []
    for order, hardness in cases + cases:
        model.order = order
        found.append(loss(model, x, y, hardness).item())
        assert found[-1] == pytest.approx(t.training_loss(model, x, y, hardness).item(), abs=1e-4)
    assert len(graphs) == 4


def test_a_run_resumed_after_recurrence_began_ends_in_the_same_bits(corpus, tmp_path, orders):
    whole = new_trainer(corpus, tmp_path / "run.txt", **PRESET)
    t.train(whole)
    expected = state(whole)
    stopped = new_trainer(corpus, tmp_path / "run.txt", **PRESET)
    step = t.Trainer.step

    def stop_in_the_sixth(scale, hardness):
        loss = step(stopped, scale, hardness)
        stopped.stop.name = "SIGTERM" if stopped.steps == 6 else ""
        return loss

    stopped.step = stop_in_the_sixth
    with pytest.raises(t.Stopped):
        t.train(stopped)
    resumed = new_trainer(corpus, **PRESET)
    resumed.restore(str(tmp_path / "run.ckpt"))
    orders.clear()
    t.train(resumed)
    assert_same(expected, state(resumed))
    assert orders == 2 * [FINAL_ORDER]


def test_a_resumed_run_validates_by_the_order_that_it_trained(corpus, tmp_path):
    def validated(trainer):
        orders = []
        trainer.validate = lambda: orders.append(trainer.model.order) or (0.0, 0.0)
        t.train(trainer)
        return orders

    assert validated(new_trainer(corpus, tmp_path / "run.txt", **PRESET)) == [FINAL_ORDER]
    resumed = new_trainer(corpus, **PRESET)
    resumed.restore(str(tmp_path / "run.ckpt"))
    assert validated(resumed) == [FINAL_ORDER]


def test_an_artifact_keeps_all_that_the_preset_learns():
    """Nothing of it is large enough to be coded; float16 is what the container keeps."""
    model = randomize(t.GPT(tiny(**FRONTIER))).float()
    found = t.unpack(t.pack(model.state_dict(), model.hp).blob)
    for name, p in model.named_parameters():
        if t.parameter_kind(name) == "vector":
            assert torch.equal(found[name], p.half().float()), name


def test_test_time_training_of_the_preset_changes_later_scores_and_never_earlier_ones(rng):
    tokens = rng.integers(0, 500, 151).astype(np.uint16)
    target_bytes = rng.integers(0, 9, 150).astype(np.uint16)
    untrained = plain_scores(trainer_with(tokens, target_bytes, **FRONTIER), 4)
    learned = scores_of(tokens, target_bytes, stride=4, **FRONTIER)
    first = trainer_with(tokens, target_bytes, **FRONTIER).hp.ttt_chunk_tokens
    np.testing.assert_array_equal(learned[:, :first], untrained[:, :first])
    assert np.abs(learned[:, first:] - untrained[:, first:]).max() > 1e-4


# --- the launch script ----------------------------------------------------------------------------


def run_frontier(folder, corpus, ranks: int) -> str:
    """The log of runs/frontier.sh for a tiny model."""
    own = ("MLP_MULT", "XSA_LAST_N", "EMA_DECAY", "TIED_EMBED_LR")  # what the script sets
    sizes = {k: v for k, v in TINY.items() if k not in own}
    sizes |= dict(RECUR_LAYERS="1,2", PARALLEL_START_LAYER=3, NPROC=ranks)
    done = finish(start_python(folder, *launched("frontier", folder, **sizes, **corpus)))
    assert done.returncode == 0, done.stderr[-3000:]
    return (folder / "logs/test.txt").read_text()


@pytest.fixture(scope="module")
def logs(corpus, tmp_path_factory):
    """ranks -> log."""
    return {n: run_frontier(tmp_path_factory.mktemp(f"ranks{n}"), corpus, n) for n in (1, 4)}


def test_the_preset_turns_every_feature_on(logs):
    for setting in (
        "SKIP_GATES=True",
        "ATTN_GATE_DIMS=12",
        "SMEAR_CROSSES_BOS=False",
        "MUON_ROW_NORM=True",
        "XSA_LAST_N=4",
        "EMBED_WD=0.09",
        "WARMDOWN_FRAC=0.667",
        "NGRAM_ALPHA=online",
    ):
        assert f"\n{setting}\n" in logs[1]


def test_the_preset_runs_its_layers_again_in_the_second_half(logs):
    assert values(logs[1], "recurrence:on")["passes"] == "6"


def test_four_ranks_train_the_preset_as_one_does(logs):
    one, four = (np.float64(list(losses(logs[ranks]).values())) for ranks in (1, 4))
    np.testing.assert_allclose(one, four, rtol=0, atol=2e-4)


def test_four_ranks_score_the_preset_as_one_does(logs):
    for name in ("final_float", "final_int6_roundtrip", "final_int6_sliding", "final_ngram"):
        one, four = (float(values(logs[ranks], name)["val_bpb"]) for ranks in (1, 4))
        assert np.isclose(one, four, rtol=0, atol=1e-4), name
