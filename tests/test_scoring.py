"""Windows, per-target scores, bits per byte."""

import math

import numpy as np
import pytest
import torch
from helpers import ROOT, collect, logits, score, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


@settings(max_examples=300)
@given(st.integers(1, 400), st.integers(1, 60), st.data())
def test_windows_score_every_target_once_with_enough_context(targets, length, data):
    stride = data.draw(st.integers(1, length))
    begin = data.draw(st.integers(0, targets - 1))
    T = min(length, targets)
    starts, first, ends = t.windows(begin, targets, T, stride)
    scored = [j for f, e in zip(first, ends) for j in range(f, e)]
    assert scored == list(range(begin, targets))  # each once, in stream order
    assert (first < ends).all()
    assert ends[-1] == targets  # none is empty
    for s, f, e in list(zip(starts, first, ends))[begin == 0 :]:
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
        p = torch.softmax(logits(model, model.hidden(window))[0].double(), -1)
        for j in range(done, start + T):
            nll.append(-math.log(p[j - start, tokens[j + 1]]))
            entropy.append(float(-(p[j - start] * p[j - start].log()).sum()))
        done, start = start + T, min(start + stride, len(tokens) - 1 - T)
    return np.array(nll), np.array(entropy)


@pytest.mark.parametrize(
    "length, stride, targets", [(32, 8, 200), (32, 32, 200), (32, 8, 33), (32, 8, 20), (7, 5, 64)]
)
def test_score_stream_equals_one_window_at_a_time(rng, length, stride, targets):
    hp = tiny(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride, VAL_BATCH_SIZE=4 * length)
    model = t.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        tokens = rng.integers(0, 300, targets + 1).astype(np.uint16)
        nll, entropy = score(model, tokens, stride)
        expected = plain_scores(model, tokens, stride)
    assert nll.dtype == entropy.dtype == np.float32
    np.testing.assert_allclose(nll, expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("world_size", [2, 3, 8, 50])
def test_ranks_share_the_windows(rng, world_size, monkeypatch):
    """What the ranks contribute, seen before the sum: each target by exactly one of them,
    with the same numbers."""
    hp = tiny(VAL_BATCH_SIZE=128)
    model, tokens, sent = t.GPT(hp), rng.integers(0, 300, 300).astype(np.uint16), {}
    whole = score(model, tokens, 8)
    for batches in (1, 3, 100):
        monkeypatch.setattr(t, "SEGMENT_BATCHES", batches)
        for rank in range(world_size):
            ranks = t.Ranks({})
            ranks.rank, ranks.world_size, sent[rank] = rank, world_size, []
            ranks.sum_over_ranks = lambda x, rank=rank: (sent[rank].append(x.clone()), x)[1]
            yielded = collect(t.score_stream(model.hidden, model, tokens, 8, ranks))
            assert yielded.shape == (2, 0 if rank else 299)
        parts = torch.stack([torch.cat(sent[rank], 1) for rank in range(world_size)])
        assert ((parts[:, 0] != 0).sum(0) == 1).all()
        np.testing.assert_allclose(parts.sum(0).numpy(), whole, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_stream_gets_the_scores_it_has_in_the_whole(rng):
    """Begun at a multiple of the stride, its windows are those of the whole, to rounding."""
    model, tokens = t.GPT(tiny(VAL_BATCH_SIZE=128)), rng.integers(0, 300, 300).astype(np.uint16)
    whole = score(model, tokens, 8)
    for begin, end in ((0, 100), (32, 299), (80, 296), (40, 41)):
        np.testing.assert_allclose(
            score(model, tokens, 8, (begin, end)), whole[:, begin:end], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "begin, end, stride", [(16, 32, 4), (16, 32, 8), (10, 20, 4), (5, 60, 8), (31, 33, 1)]
)
def test_a_part_near_the_start_of_the_stream_has_its_scores(rng, begin, end, stride):
    """There a window's scored targets are not its last ones:
    chunks of test-time training shorter than a window."""
    model, tokens = t.GPT(tiny(VAL_BATCH_SIZE=96)), rng.integers(0, 300, 90).astype(np.uint16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        nll, _ = score(model, tokens, stride, (begin, end))
        for j in range(begin, end):  # of some window that ends at its target
            starts, first, ends = t.windows(begin, end, min(32, end), stride)
            at = starts[np.searchsorted(ends, j, "right")]
            window = torch.tensor(tokens[None, at : j + 1].astype(int))
            logp = torch.log_softmax(logits(model, model.hidden(window)), -1)[0, -1]
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
    score(model, tokens, 8)
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

    def trunk(ids, last):
        shapes.append((tuple(ids.shape), last))
        return model.hidden(ids, last=last)

    got = collect(t.score_stream(trunk, model, tokens, 8, t.Ranks({})))
    # 4 of 35 windows at once, the first whole
    assert set(shapes) == {((4, 32), 8)}
    assert len(shapes) == 8
    np.testing.assert_array_equal(got, score(model, tokens, 8))
    assert np.isfinite(collect(t.score_stream(None, model, tokens, 32, t.Ranks({})))).all()


def test_future_tokens_change_no_earlier_score(rng):
    hp = tiny()
    model, tokens = t.GPT(hp), rng.integers(0, 300, 150).astype(np.uint16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    before = score(model, tokens, 8)
    for position in (1, 40, 100, 149):
        changed = tokens.copy()
        changed[position:] = rng.integers(0, 300, 150 - position)
        after = score(model, changed, 8)
        assert np.array_equal(before[0][: position - 1], after[0][: position - 1])
        # entropy does not see its target
        assert np.array_equal(before[1][:position], after[1][:position])


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
    assert validation.targets == len(target_bytes) == 1_040_297
    assert target_bytes.sum() == 2_504_867
