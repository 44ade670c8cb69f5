"""Adapters per document: what they compute, what they may know, the same for all ranks."""

import re

import numpy as np
import pytest
import torch
from helpers import (
    ADAPTERS,
    ALONE,
    BRIEF,
    FakeRanks,
    KeptLog,
    collect,
    final_passes,
    hidden_states,
    log_probabilities,
    run_script,
    scorer_of,
    shifted,
    tiny,
    validation_of,
    values,
)

import train_gpt as t


def model_of(**settings) -> t.GPT:
    """A model of fixed random weights, with the settings ADAPTERS. A window has 32 tokens."""
    torch.manual_seed(3)
    return shifted(t.GPT(tiny(**{**ADAPTERS, **settings})))


def stream_of_documents(rng, *sizes: int) -> np.ndarray:
    """Documents of so many tokens, each of which begins with BOS; one more BOS ends the last."""
    documents = [np.append(t.BOS, rng.integers(2, 500, size - 1)) for size in sizes]
    return np.append(np.concatenate(documents), t.BOS).astype(np.uint16)


def adapted(model, tokens, ranks=ALONE) -> np.ndarray:
    """(2, targets): nll and entropy of the stream, scored document by document."""
    return collect(t.score_documents(scorer_of(model), tokens, ranks))


# --- the computation ---


def changed_matrices(model, a: dict, b: dict) -> dict[str, torch.Tensor]:
    """The model's parameters, with the adapters' change added to each matrix inside the blocks."""
    scale = model.hp.ttt_lora_alpha / model.hp.ttt_lora_rank
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name in a:
        if name != "head":
            found[f"{name}.weight"] = found[f"{name}.weight"] + scale * (a[name] @ b[name]).T
    return found


def logits(model, a: dict, b: dict, ids: torch.Tensor) -> torch.Tensor:
    """(T, V) of a window, by a model whose matrices were changed, before the softcap."""
    matrices = changed_matrices(model, a, b)
    passes = final_passes(model)
    hidden = torch.func.functional_call(Hidden(model), prefixed(matrices), (ids[None], passes))[0]
    head = model.embed.weight if model.head is None else model.head.weight
    scale = model.hp.ttt_lora_alpha / model.hp.ttt_lora_rank
    return t.norm(hidden) @ (head.detach() + scale * (a["head"] @ b["head"]).T).T


class Hidden(torch.nn.Module):
    """The model up to its output head, as a module that can be called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, passes):
        return self.model.hidden(ids, passes)


def prefixed(parameters: dict) -> dict:
    return {f"model.{name}": p for name, p in parameters.items()}


def learned_slowly(model, tokens: np.ndarray, start: int, end: int) -> np.ndarray:
    """(2, end - start): nll and entropy of the targets of one document, of which the first token
    is at `start`. Matrices are changed, and AdamW's step is written out."""
    hp = model.hp
    first = t.Adapters(model, 1)
    names = list(first.a)
    learned = [p[0].detach().clone() for p in (*first.a.values(), *first.b.values())]
    squares = [0.0] * len(learned)
    scores = np.empty((2, end - start))
    for step, begin in enumerate(range(start, end, hp.ttt_chunk_size), 1):
        stop = min(begin + hp.ttt_chunk_size, end)
        window = max(start, begin + hp.ttt_chunk_size - hp.eval_seq_len)
        learned = [p.requires_grad_() for p in learned]
        a = dict(zip(names, learned))
        b = dict(zip(names, learned[len(names) :]))
        ids = torch.from_numpy(tokens[window:stop].astype(np.int64))
        z = logits(model, a, b, ids)[begin - window :]
        logp = t.log_probabilities(z, hp.logit_softcap)
        targets = torch.from_numpy(tokens[begin + 1 : stop + 1].astype(np.int64))
        nll = -logp[torch.arange(stop - begin), targets]
        entropy = -(logp.exp() * logp).sum(-1)
        scores[:, begin - start : stop - start] = torch.stack((nll, entropy)).detach()
        for i, grad in enumerate(torch.autograd.grad(nll.mean(), learned)):
            squares[i] = 0.99 * squares[i] + 0.01 * grad.square()
            size = (squares[i] / (1 - 0.99**step)).sqrt() + 1e-8
            learned[i] = (learned[i] - hp.ttt_lora_lr * grad / size).detach()
    return scores


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(TIE_EMBEDDINGS=0),
        dict(TTT_LORA_RANK=5, TTT_CHUNK_SIZE=32, TTT_LORA_LR=0.02),
        dict(RECUR_LAYERS="1,2", PARALLEL_START_LAYER=3, SKIP_GATES=1),
    ],
    ids=str,
)
def test_each_document_is_learned_as_the_slow_reference_does(rng, settings):
    model = model_of(**settings)
    tokens = stream_of_documents(rng, 50, 9, 2, 27, 1, 61)
    found = adapted(model, tokens)
    starts = np.flatnonzero(tokens == t.BOS)
    expected = [learned_slowly(model, tokens, a, b) for a, b in zip(starts, starts[1:])]
    np.testing.assert_allclose(found, np.concatenate(expected, 1), atol=5e-4)


def test_adapters_that_are_attached_change_the_model_as_their_matrices_say(rng):
    model = model_of()
    adapters = t.Adapters(model, 2)
    ids = torch.from_numpy(rng.integers(2, 500, (2, 20)))
    with torch.no_grad():
        for b in adapters.b.values():
            b.normal_(0, 0.1)
        with adapters.attached():
            found = adapters.logits(hidden_states(model, ids))
    for row in range(2):
        a, b = (
            {name: p[row].detach() for name, p in of.items()} for of in (adapters.a, adapters.b)
        )
        torch.testing.assert_close(found[row], logits(model, a, b, ids[row]), atol=2e-4, rtol=1e-4)


def test_adapters_that_are_detached_leave_the_model_as_it_was(rng):
    model = model_of()
    ids = torch.from_numpy(rng.integers(2, 500, (1, 20)))
    before = hidden_states(model, ids)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    adapted(model, stream_of_documents(rng, 40, 30))
    assert torch.equal(hidden_states(model, ids), before)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_a_learning_rate_of_zero_scores_documents_apart_without_learning(rng):
    model = model_of(TTT_LORA_LR=0)
    tokens = stream_of_documents(rng, 45, 20)
    nll, entropy = adapted(model, tokens)
    for start, end in ((0, 45), (45, 65)):
        for target in range(start, end):
            stop = start + 8 * ((target - start) // 8 + 1)  # where its chunk ends
            window = max(start, stop - 32)
            stop = min(stop, end)
            ids = torch.from_numpy(tokens[window:stop].astype(np.int64))
            logp = log_probabilities(model, hidden_states(model, ids[None])[0, target - window])
            assert nll[target] == pytest.approx(-logp[tokens[target + 1]].item(), abs=1e-4)
            assert entropy[target] == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-4)


# --- what a score may know ---


@pytest.mark.parametrize("position", [0, 7, 8, 33, 69, 70, 71, 150, 200])
def test_a_changed_target_changes_no_score_before_it(rng, position):
    """Also none of its own chunk. The entropy of its prediction is of the prefix alone."""
    model = model_of()
    tokens = stream_of_documents(rng, 70, 5, 150)
    changed = tokens.copy()
    changed[position + 1 :] = rng.integers(2, 500, len(tokens) - position - 1)
    before, after = adapted(model, tokens), adapted(model, changed)
    np.testing.assert_allclose(before[:, :position], after[:, :position], atol=1e-4)
    assert before[1, position] == pytest.approx(after[1, position], abs=1e-4)


def test_no_score_depends_on_another_document(rng):
    model = model_of()
    tokens = stream_of_documents(rng, 70, 30, 150)
    changed = tokens.copy()
    changed[71:100] = rng.integers(2, 500, 29)
    changed[101:250] = rng.integers(2, 500, 149)
    alone = adapted(model, np.append(tokens[:70], t.BOS).astype(np.uint16))
    np.testing.assert_allclose(adapted(model, changed)[:, :70], alone, atol=1e-4)


def test_a_document_gains_from_its_own_repetition(rng):
    """The window does not reach back to the first copy: only the adapters remember it."""
    model = model_of(TTT_LORA_LR=0.02)
    text = rng.integers(2, 500, 40)
    tokens = np.append(np.append(t.BOS, np.tile(text, 12)), t.BOS).astype(np.uint16)
    nll, _ = adapted(model, tokens)
    assert nll[-40:].mean() < nll[:40].mean() - 1


# --- pieces ---


@pytest.mark.parametrize("seed", range(8))
def test_pieces_score_each_target_once_and_stay_inside_their_document(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 9, 3000)
    tokens[rng.random(3000) < 10 ** rng.uniform(-3.5, -0.5)] = t.BOS
    hp = tiny(**ADAPTERS)
    pieces = t.document_pieces(tokens, hp)
    scored = [target for _, first, stop in pieces.T for target in range(first, stop)]
    assert scored == [*range(2999)]
    for start, first, stop in pieces.T:
        assert not (tokens[start + 1 : stop] == t.BOS).any()
        assert stop - first <= t.PIECE_WINDOWS * hp.eval_seq_len
        is_document = start == first and (start == 0 or tokens[start] == t.BOS)
        assert is_document or first - start == hp.eval_seq_len


def test_the_window_before_a_piece_is_learned_from_and_not_scored(rng):
    tokens = stream_of_documents(rng, 90)
    pieces = np.array([[10, 40, 85], [0, 20, 30]]).T
    chunks = t.score_pieces(scorer_of(model_of()), tokens, pieces)
    positions = torch.cat([positions for positions, _ in chunks])
    assert sorted(positions.tolist()) == [*range(20, 30), *range(40, 85)]


def test_a_long_document_is_scored_in_pieces_with_the_window_before(rng, monkeypatch):
    monkeypatch.setattr(t, "PIECE_WINDOWS", 1)
    model = model_of()
    tokens = stream_of_documents(rng, 90)
    found = adapted(model, tokens)
    for start, first, stop in ((0, 0, 32), (0, 32, 64), (32, 64, 90)):
        expected = learned_slowly(model, tokens, start, stop)[:, first - start :]
        np.testing.assert_allclose(found[:, first:stop], expected, atol=5e-4)


def test_the_cost_is_that_of_all_windows_read():
    hp = tiny(**ADAPTERS)  # chunks of 8, windows of 32
    pieces = np.array([[0, 50], [0, 60], [45, 77]])  # 45 targets from 0 on, 27 from 50 on
    read = 8 + 16 + 24 + 32 + 32 + 32 + 8 + 16 + 24 + 32
    assert t.windows_in_pieces(pieces, hp) == read / 32


# --- ranks and runs ---


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_ranks_together_score_what_one_does(rng, world_size):
    model = model_of()
    tokens = stream_of_documents(rng, 70, 5, 33, 2, 64, 18, 100)
    parts = []
    for rank in range(world_size):
        ranks = FakeRanks(rank, world_size)
        list(t.score_documents(scorer_of(model), tokens, ranks))
        parts.append(torch.cat(ranks.sent, 1).numpy())
    np.testing.assert_allclose(sum(parts), adapted(model, tokens), atol=1e-3)


def test_segments_come_in_the_order_of_the_stream(rng, monkeypatch):
    monkeypatch.setattr(t, "FIRST_SEGMENT", 1)
    monkeypatch.setattr(t, "LARGEST_SEGMENT", 2)
    model = model_of()
    tokens = stream_of_documents(rng, 100, 30, 120, 90, 80, 60)
    segments = list(t.score_documents(scorer_of(model), tokens, ALONE))
    # at most 128 targets, then 256
    assert [segment.shape[1] for segment in segments] == [100, 240, 140]
    monkeypatch.undo()
    np.testing.assert_allclose(collect(segments), adapted(model, tokens), atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_adapters_learn_whether_or_not_gradients_are_on_outside(rng, mode):
    tokens = stream_of_documents(rng, 60)
    with mode():
        found = adapted(model_of(), tokens)
    np.testing.assert_array_equal(found, adapted(model_of(), tokens))


@pytest.mark.parametrize("share, expected", [(0.3, 8), (2, 16)])
def test_too_little_time_for_adapters_leaves_windows(rng, share, expected):
    """A window of the validation took so long that learning needs `share` of the budget. Scoring a
    window takes a quarter of that, and EVAL_STRIDE is wider than a chunk."""
    hp = tiny(**ADAPTERS, EVAL_BUDGET_SECONDS=1000, EVAL_STRIDE=16)
    torch.manual_seed(3)
    scorer, tokens, log = scorer_of(t.GPT(hp)), stream_of_documents(rng, 300, 200), KeptLog()
    window_seconds = share * 1000 / (4 * t.windows_in_pieces(t.document_pieces(tokens, hp), hp))
    validation = validation_of(tokens, None)
    began = t.perf_counter()
    stride, segments = t.score_in_time(scorer, validation, began, ALONE, log, window_seconds)
    assert stride == expected
    assert collect(segments).shape == (2, 500)
    said = [line for line in log.lines if line.startswith("ttt:")]
    assert said == (["ttt:score_first documents:2 rank:2 lr:0.01"] if expected == 8 else [])
    assert bool(log.starting("warning: TTT_LORA_RANK=2: adapters would not end")) == (not said)


def test_a_run_whose_adapters_are_stopped_by_the_budget_says_that_it_learned(rng, monkeypatch):
    """The third segment is as fast as promised, the fourth is not."""
    monkeypatch.setattr(t, "FIRST_SEGMENT", 1)
    monkeypatch.setattr(t, "LARGEST_SEGMENT", 1)
    hp = tiny(**ADAPTERS, EVAL_BUDGET_SECONDS=1000, EVAL_STRIDE=16)
    scorer, tokens, log = scorer_of(t.GPT(hp)), stream_of_documents(rng, *[120] * 8), KeptLog()
    clock = [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: clock[0])
    validation = validation_of(tokens, None)
    _, segments = t.score_in_time(scorer, validation, 0.0, ALONE, log, 1e-3)
    taken = 0
    for segment in segments:
        taken += segment.shape[1]
        clock[0] += 300
    assert 0 < taken < validation.num_targets
    assert log.starting("ttt:score_first documents:8")


@pytest.mark.slow
def test_one_and_two_ranks_score_a_run_with_adapters_alike(corpus, tmp_path):
    """AdamW divides by the size of the gradient, so at high rates its steps turn rounding errors
    into differences."""
    settings = dict(**corpus, ITERATIONS=6, **{**ADAPTERS, "TTT_LORA_LR": 0.003}, **BRIEF)
    found = {}
    for ranks in (1, 2):
        (tmp_path / f"{ranks}").mkdir()
        done = run_script(tmp_path / f"{ranks}", ranks if ranks > 1 else 0, **settings)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "documents" in values(done.stdout, "ttt:score_first")
        found[ranks] = {
            name: float(values(done.stdout, f"final_int6_{name}")["val_bpb"])
            for name in ("roundtrip", "sliding_window")
        }
        assert re.search(r"^eval_budget .* stride:8\b", done.stdout, re.M)
    for name in ("roundtrip", "sliding_window"):
        assert found[1][name] == pytest.approx(found[2][name], abs=1e-4)
    assert found[1]["sliding_window"] < found[1]["roundtrip"]


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(TTT_EPOCHS=1), "set only one"),
        (dict(TTT_CHUNK_SIZE=33), "a chunk must fit into a window"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(settings, problem):
    with pytest.raises(t.UserError, match=problem):
        tiny(**{**ADAPTERS, **settings})
