"""The frontier preset in training: schedules, depth recurrence that begins in the middle, the
launch script on one and four ranks. What its features compute: test_model.py, test_optimizer.py."""

import re
import signal

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    FRONTIER,
    SILENT,
    TINY,
    assert_same,
    checkpoint,
    finish,
    launched,
    learning_model,
    log_of,
    losses,
    new_state,
    new_training,
    randomize,
    scores_of,
    scores_while_learning,
    start_python,
    tiny,
    train,
    values,
)

import train_gpt as t

RECURRENT = dict(RECUR_LAYERS="1,2", RECUR_START=0.5, ITERATIONS=8, WARMUP_STEPS=0)
PRESET = FRONTIER | RECURRENT | dict(MUON_ROW_NORM=1, EMBED_WD=0.09, WARMDOWN_FRAC=0.667)
ONCE = (0, 1, 2, 3)
RECURRING = (0, 1, 2, 1, 2, 3)


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


def test_muons_decay_changes_linearly_from_its_share_of_training_on():
    hp = tiny(ITERATIONS=100, WD_TAPER_START_FRAC=0.6, WD_TAPER_FINAL_MULT=0.5)
    found = [t.muon_decay(step, 0.0, hp) for step in (0, 60, 80, 100)]
    assert found == pytest.approx([1, 1, 0.75, 0.5])


@pytest.mark.parametrize("threshold", [0, 2], ids=["no late QAT", "late QAT"])
def test_the_plan_of_a_step_has_muons_decay(threshold):
    hp = tiny(ITERATIONS=100, WD_TAPER_FINAL_MULT=0.4, LATE_QAT_THRESHOLD=threshold)
    assert t.plan_step(85, 0.0, hp, "cpu").muon_decay == pytest.approx(0.7)


def test_by_default_muons_decay_stays():
    assert [t.muon_decay(step, 0.0, tiny(ITERATIONS=100)) for step in (0, 80, 100)] == [1, 1, 1]


@pytest.mark.parametrize("decay", [dict(WARMDOWN_FRAC=0.5), dict(WARMDOWN_ITERS=50)])
def test_rates_end_at_min_lr(decay):
    hp = tiny(ITERATIONS=100, MIN_LR=0.1, **decay)
    found = [t.lr_scale(step, 0.0, hp) for step in (50, 75, 100)]
    assert found == pytest.approx([1, 0.55, 0.1])


# --- depth recurrence while training --------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """The order of blocks in each step from here on."""
    seen, plain = [], t.training_step

    def training_step(state, loader, loss, plan):
        seen.append(plan.passes)
        return plain(state, loader, loss, plan)

    monkeypatch.setattr(t, "training_step", training_step)
    return seen


def test_recurrence_begins_at_its_share_of_training(corpus, passes):
    train(corpus, **RECURRENT)
    assert passes == 4 * [ONCE] + 4 * [RECURRING]


def test_the_log_says_once_when_recurrence_begins(corpus):
    _, log = train(corpus, **RECURRENT)
    assert log.starting("recurrence:") == ["recurrence:on step:4 passes:6"]


def test_without_recurrence_the_log_says_nothing_of_it(corpus):
    _, log = train(corpus, ITERATIONS=2)
    assert not any("recurrence" in line for line in log.lines)


def warmed_up(corpus, **settings) -> list[t.StepPlan]:
    """The steps that warm-up takes."""
    state, _ = new_state(new_training(corpus, **settings))
    plans = []
    t.warm_up(state, plans.append)
    return plans


def test_warm_up_runs_each_graph_that_training_may_need(corpus):
    plans = warmed_up(corpus, **RECURRENT | dict(WARMUP_STEPS=4))
    assert sorted((plan.passes, plan.hardness is not None) for plan in plans) == [
        (order, rounded) for order in (RECURRING, ONCE) for rounded in (False, True)
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
    assert len(warmed_up(corpus, **RECURRENT | dict(WARMUP_STEPS=20))) == 20
    assert (done, totals) == ([1, 2, 3, 4], [4])


def test_warm_up_runs_each_graph_though_its_steps_are_fewer(corpus):
    assert len(warmed_up(corpus, **RECURRENT | dict(WARMUP_STEPS=1))) == 4


def test_without_warm_up_no_graph_is_compiled_ahead(corpus):
    assert warmed_up(corpus, **RECURRENT) == []


@pytest.mark.slow
def test_after_warm_up_no_change_of_passes_or_rounding_compiles(rng):
    """Passes and rounding are arguments of four graphs, all made before the clock starts."""
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
    cases = [(passes, h) for passes in t.block_passes(model.hp) for h in (None, torch.ones(()))]
    for plan in cases + cases:
        found = loss(model, x, y, *plan).item()
        assert found == pytest.approx(t.training_loss(model, x, y, *plan).item(), abs=1e-4)
    assert len(graphs) == 4


def test_a_run_resumed_after_recurrence_began_ends_in_the_same_bits(
    corpus, tmp_path, passes, monkeypatch
):
    whole, _ = train(corpus, tmp_path / "whole.txt", **PRESET)
    stopped = new_training(corpus, tmp_path / "run.txt", **PRESET)
    with monkeypatch.context() as patch:
        plain = t.training_step

        def stop_in_the_sixth(state, *args):
            if state.steps == 5:
                stopped.stop.handle(signal.SIGTERM, None)
            return plain(state, *args)

        patch.setattr(t, "training_step", stop_in_the_sixth)
        with pytest.raises(t.Stopped):
            t.train(*stopped)
    passes.clear()
    resumed, _ = train(corpus, tmp_path / "again.txt", **PRESET, RESUME=tmp_path / "run.ckpt")
    assert passes == 2 * [RECURRING]
    assert_same(*(checkpoint(tmp_path / f"{name}.ckpt") for name in ("whole", "again")))
    assert all(torch.equal(w, whole.weights[name]) for name, w in resumed.weights.items())


def test_validations_and_a_resumed_run_score_with_the_passes_that_were_trained(
    corpus, tmp_path, monkeypatch
):
    validated = []

    def validate(scorer, *args):
        validated.append(scorer.passes)
        return 0.0, 0.0

    monkeypatch.setattr(t, "validate", validate)
    train(corpus, tmp_path / "run.txt", **PRESET, VAL_LOSS_EVERY=3)
    assert validated == [ONCE, RECURRING, RECURRING]
    validated.clear()
    train(corpus, **PRESET, RESUME=tmp_path / "run.ckpt")
    assert validated == [RECURRING]


def test_an_artifact_keeps_all_that_the_preset_learns():
    """Nothing of it is large enough to be coded; float16 is what the container keeps."""
    model = randomize(t.GPT(tiny(**FRONTIER))).float()
    _, found = t.decompress(t.pack(model.state_dict(), model.hp).blob)
    for name, p in model.named_parameters():
        if t.parameter_row(name).kind == "vector":
            assert torch.equal(found[name], p.half().float()), name


def test_test_time_training_of_the_preset_changes_later_scores_and_never_earlier_ones(rng):
    tokens = rng.integers(0, 500, 151).astype(np.uint16)
    target_bytes = rng.integers(0, 9, 150).astype(np.uint16)
    model = learning_model(**FRONTIER)
    untrained = scores_of(model, tokens, 4)
    learned = scores_while_learning(tokens, target_bytes, stride=4, **FRONTIER)
    first = model.hp.ttt_chunk_tokens
    np.testing.assert_array_equal(learned[:, :first], untrained[:, :first])
    assert np.abs(learned[:, first:] - untrained[:, first:]).max() > 1e-4


# --- the launch script ----------------------------------------------------------------------------


def run_frontier(folder, corpus, ranks: int):
    """runs/frontier.sh for a tiny model; returns `folder`."""
    own = ("MLP_MULT", "XSA_LAST_N", "EMA_DECAY", "TIED_EMBED_LR")  # what the script sets
    sizes = {k: v for k, v in TINY.items() if k not in own}
    sizes |= dict(RECUR_LAYERS="1,2", PARALLEL_START_LAYER=3, NPROC=ranks, EVAL_STRIDE=16)
    done = finish(start_python(folder, *launched("frontier", folder, **sizes, **corpus)))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """ranks -> folder of a run."""
    return {n: run_frontier(tmp_path_factory.mktemp(f"ranks{n}"), corpus, n) for n in (1, 4)}


@pytest.fixture(scope="module")
def logs(folders):
    """ranks -> log."""
    return {n: log_of(folder) for n, folder in folders.items()}


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


def test_the_preset_is_scored_with_its_layers_run_again(folders, logs):
    found = dict(line.split("=", 1) for line in re.findall(r"^[A-Z_]+=.*", logs[1], re.M))
    model = t.GPT(t.Hyperparameters.from_env(found))
    model.load_state_dict(t.decompress((folders[1] / "logs/test.int6.ptz").read_bytes())[1])
    validation = t.load_validation(model.hp)
    _, bpb = t.validate(t.Scorer(model, RECURRING), validation, ALONE, SILENT)
    expected = float(values(logs[1], "final_int6_roundtrip")["val_bpb"])
    assert bpb == pytest.approx(expected, abs=1e-6)


def test_four_ranks_train_the_preset_as_one_does(logs):
    one, four = (np.float64(list(losses(logs[ranks]).values())) for ranks in (1, 4))
    np.testing.assert_allclose(one, four, rtol=0, atol=2e-4)


def test_four_ranks_score_the_preset_as_one_does(logs):
    for name in ("final_float", "final_int6_roundtrip", "final_int6_sliding", "final_ngram"):
        one, four = (float(values(logs[ranks], name)["val_bpb"]) for ranks in (1, 4))
        assert np.isclose(one, four, rtol=0, atol=1e-4), name
