"""Windows, per-target scores, bits per byte."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    ROOT,
    SILENT,
    FakeRanks,
    KeptLog,
    collect,
    final_passes,
    hidden_states,
    log_probabilities,
    scorer_of,
    scores_of,
    shifted,
    tiny,
    validation_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


@settings(max_examples=300)
@given(st.integers(1, 400), st.integers(1, 60), st.data())
def test_windows_score_every_target_once_with_enough_context(num_targets, length, data):
    stride = data.draw(st.integers(1, length))
    begin = data.draw(st.integers(0, num_targets - 1))
    T = min(length, num_targets)
    starts, firsts, ends = t.windows(begin, num_targets, T, stride)
    scored = [j for f, e in zip(firsts, ends) for j in range(f, e)]
    assert scored == list(range(begin, num_targets))  # each once, in stream order
    assert (firsts < ends).all()  # none is empty
    assert ends[-1] == num_targets
    for s, f, e in list(zip(starts, firsts, ends))[begin == 0 :]:
        # context before the first scored
        assert s >= 0
        assert e - s <= T
        assert f - s >= min(f, T - stride)
    assert begin or starts[0] == 0 and ends[0] == T  # the stream's first window is whole
    # strides of exactly `stride`
    assert all(b - a == stride for a, b in zip(ends[:-2], ends[1:-1]))


def plain_scores(model, tokens, stride):
    """One window at a time, one target at a time."""
    hp, nll, entropy = model.hp, [], []
    T, done, start = min(hp.eval_seq_len, len(tokens) - 1), 0, 0
    while done < len(tokens) - 1:
        window = torch.tensor(tokens[None, start : start + T].astype(int))
        p = log_probabilities(model, hidden_states(model, window))[0].double().exp()
        for j in range(done, start + T):
            nll.append(-math.log(p[j - start, tokens[j + 1]]))
            entropy.append(float(-(p[j - start] * p[j - start].log()).sum()))
        done, start = start + T, min(start + stride, len(tokens) - 1 - T)
    return np.array(nll), np.array(entropy)


@pytest.mark.parametrize(
    "length, stride, num_targets",
    [(32, 8, 200), (32, 32, 200), (32, 8, 33), (32, 8, 20), (7, 5, 64)],
)
def test_a_score_equals_one_window_at_a_time(rng, length, stride, num_targets):
    hp = tiny(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride, VAL_BATCH_SIZE=4 * length)
    model = shifted(t.GPT(hp))
    tokens = rng.integers(0, 300, num_targets + 1).astype(np.uint16)
    nll, entropy = scores_of(model, tokens, stride)
    with torch.no_grad():
        expected = plain_scores(model, tokens, stride)
    assert nll.dtype == entropy.dtype == np.float32
    np.testing.assert_allclose(nll, expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("world_size", [2, 3, 8, 50])
def test_ranks_share_the_windows(rng, world_size, monkeypatch):
    """What the ranks contribute, seen before the sum: each target by exactly one of them,
    with the same numbers."""
    hp = tiny(VAL_BATCH_SIZE=128)
    model, tokens = t.GPT(hp), rng.integers(0, 300, 300).astype(np.uint16)
    whole = scores_of(model, tokens, 8)
    for batches in (1, 3, 100):
        monkeypatch.setattr(t, "SEGMENT_BATCHES", batches)
        parts = []
        for rank in range(world_size):
            ranks = FakeRanks(rank, world_size)
            yielded = collect(t.score(scorer_of(model), tokens, 8, ranks))
            assert yielded.shape == (2, 0 if rank else 299)
            parts.append(torch.cat(ranks.sent, 1))
        parts = torch.stack(parts)
        assert ((parts[:, 0] != 0).sum(0) == 1).all()
        np.testing.assert_allclose(parts.sum(0).numpy(), whole, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_stream_gets_the_scores_it_has_in_the_whole(rng):
    """Begun at a multiple of the stride, its windows are those of the whole, to rounding."""
    model, tokens = t.GPT(tiny(VAL_BATCH_SIZE=128)), rng.integers(0, 300, 300).astype(np.uint16)
    whole = scores_of(model, tokens, 8)
    for begin, end in ((0, 100), (32, 299), (80, 296), (40, 41)):
        np.testing.assert_allclose(
            scores_of(model, tokens, 8, (begin, end)), whole[:, begin:end], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "begin, end, stride", [(16, 32, 4), (16, 32, 8), (10, 20, 4), (5, 60, 8), (31, 33, 1)]
)
def test_a_part_near_the_start_of_the_stream_has_its_scores(rng, begin, end, stride):
    """There a window's scored targets are not its last ones:
    chunks of test-time training shorter than a window."""
    model = shifted(t.GPT(tiny(VAL_BATCH_SIZE=96)))
    tokens = rng.integers(0, 300, 90).astype(np.uint16)
    nll, _ = scores_of(model, tokens, stride, (begin, end))
    with torch.no_grad():
        for j in range(begin, end):  # of some window that ends at its target
            starts, _, ends = t.windows(begin, end, min(32, end), stride)
            at = starts[np.searchsorted(ends, j, "right")]
            window = torch.tensor(tokens[None, at : j + 1].astype(int))
            logp = log_probabilities(model, hidden_states(model, window))[0, -1]
            assert nll[j - begin] == pytest.approx(-float(logp[int(tokens[j + 1])]), abs=1e-4)


def test_only_scored_positions_go_through_the_head_and_the_last_block(rng, monkeypatch):
    """Of 200 targets in windows of 32: the first window's 32, then 8 a window;
    the attention sees the same queries."""
    hp, head, queries = tiny(VAL_BATCH_SIZE=32), [], []
    model, tokens = t.GPT(hp), rng.integers(0, 300, 201).astype(np.uint16)
    plain = model.logits
    monkeypatch.setattr(
        model, "logits", lambda hidden: (head.append(len(hidden)), plain(hidden))[1]
    )
    for layer, block in enumerate(model.blocks):
        block.attn.q.register_forward_hook(
            lambda _, x, y, layer=layer: queries.append((layer, y.size(0) * y.size(1)))
        )
    scores_of(model, tokens, 8)
    assert sum(head) == 200
    last = hp.num_layers - 1
    assert sum(n for layer, n in queries if layer == last) == 200
    assert all(n == 32 for layer, n in queries if layer < last)
    assert len(queries) == 22 * hp.num_layers


def test_the_compiled_trunk_scores_the_many_windows_the_model_the_few_whole_ones(rng):
    """One graph of one shape: compiling another for whole windows would
    cost more than they take."""
    hp, shapes = tiny(VAL_BATCH_SIZE=128), []
    model, tokens = t.GPT(hp), rng.integers(0, 300, 301).astype(np.uint16)

    def trunk(ids, passes, last):
        shapes.append((tuple(ids.shape), passes, last))
        return model.hidden(ids, passes, last)

    scorer = scorer_of(model, trunk)
    got = collect(t.score(scorer, tokens, 8, ALONE))
    # 4 of 35 windows at once, the first whole
    assert set(shapes) == {((4, 32), final_passes(model), 8)}
    assert len(shapes) == 8
    np.testing.assert_array_equal(got, scores_of(model, tokens, 8))
    collect(t.score(scorer, tokens, 32, ALONE))
    assert len(shapes) == 8


def test_future_tokens_change_no_earlier_score(rng):
    model, tokens = shifted(t.GPT(tiny())), rng.integers(0, 300, 150).astype(np.uint16)
    before = scores_of(model, tokens, 8)
    for position in (1, 40, 100, 149):
        changed = tokens.copy()
        changed[position:] = rng.integers(0, 300, 150 - position)
        after = scores_of(model, changed, 8)
        assert np.array_equal(before[0][: position - 1], after[0][: position - 1])
        # entropy does not see its target
        assert np.array_equal(before[1][:position], after[1][:position])


def test_a_validation_is_the_mean_over_windows_that_do_not_overlap(rng):
    model, tokens = shifted(t.GPT(tiny())), rng.integers(0, 300, 150).astype(np.uint16)
    target_bytes = rng.integers(1, 9, 149).astype(np.uint16)
    nll, _ = scores_of(model, tokens, model.hp.eval_seq_len)
    found = t.validate(scorer_of(model), validation_of(tokens, target_bytes), ALONE, SILENT)
    assert found == (nll.mean(dtype=float), t.bits_per_byte(nll, target_bytes))


def test_only_rank_0_knows_a_validation(rng):
    validation = validation_of(rng.integers(0, 300, 150).astype(np.uint16), None)
    found = t.validate(scorer_of(t.GPT(tiny())), validation, FakeRanks(1, 2), SILENT)
    assert found == (0.0, 0.0)


def test_scores_that_are_not_finite_are_refused_and_give_no_result():
    scores = t.Scores(np.array([1, np.nan]), np.ones(2), None, 1, 0, 0, 0)
    validation, log = validation_of(np.arange(3), np.ones(2)), KeptLog()
    with pytest.raises(t.UserError, match="scores that are not finite"):
        t.report(scores, t.Trained({}, {}, 0, 0), validation, 1, tiny(), log)
    assert log.lines == []


def test_bits_per_byte_sums_in_float64():
    nll = np.array([2.0**24, 1], np.float32)  # in float32 their sum is the first
    assert t.bits_per_byte(nll, np.array([1, 1])) * 2 * math.log(2) == 2.0**24 + 1


def test_bits_per_byte_counts_more_bytes_than_16_bits_hold():
    nll = np.full(2, math.log(2), np.float32)
    assert t.bits_per_byte(nll, np.full(2, 50_000, np.uint16)) == pytest.approx(2 / 100_000)


def test_bytes_of_the_real_fineweb_sample():
    """The design's figure; runs where the sample lies beside the checkout,
    since it is not ours to ship."""
    sample = ROOT.parent / "shared/data/fineweb_sample"
    if not sample.is_dir():
        pytest.skip("no FineWeb sample beside the checkout")
    hp = t.Hyperparameters.from_env(
        dict(DATA_PATH=str(sample), TOKENIZER_PATH=str(sample / "fineweb_1024_bpe.model"))
    )
    validation = t.load_validation(hp)
    target_bytes = validation.target_bytes
    assert validation.num_targets == len(target_bytes) == 1_040_297
    assert target_bytes.sum() == 2_504_867
