"""Test-time training: score first, then learn; the same for all ranks; decodable."""

import math

import constriction
import numpy as np
import pytest
import torch
from helpers import (
    BRIEF,
    FakeRanks,
    KeptLog,
    hidden_states,
    learning_model,
    log_probabilities,
    run_script,
    scores_of,
    scores_while_learning,
    segments_while_learning,
    tiny,
    validation_of,
    values,
)
from reference import Predictor

import train_gpt as t


@pytest.fixture
def stream(rng) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 500, 351).astype(np.uint16), rng.integers(0, 9, 350).astype(np.uint16)


def learns(name: str) -> bool:
    """With the settings TTT: the last block, the tied embedding, and vectors."""
    return name.startswith("blocks.3.") or name == "embed.weight" or not name.endswith(".weight")


def test_learning_changes_later_scores_and_never_earlier_ones(stream):
    tokens, target_bytes = stream
    untrained = scores_of(learning_model(), tokens, 4)
    # 100 = 32 + 17 * 4: chunks end where windows do
    learned = scores_while_learning(tokens, target_bytes, stride=4)
    np.testing.assert_array_equal(learned[:, :100], untrained[:, :100])
    assert all(
        (learned[0, k : k + 100] != untrained[0, k : k + 100]).mean() > 0.9 for k in (100, 200, 300)
    )


@pytest.mark.parametrize("position", [1, 57, 99, 100, 101, 230, 349])
def test_a_changed_target_changes_nothing_before_it(stream, position, rng):
    """Scores of chunk k know nothing of later chunks, nor of later targets of their own chunk."""
    tokens, target_bytes = stream
    changed, lengths = tokens.copy(), target_bytes.copy()
    changed[position + 1 :] = rng.integers(0, 500, 350 - position)  # target j is token j + 1
    lengths[position:] = rng.integers(0, 9, 350 - position)
    before = scores_while_learning(tokens, target_bytes)
    after = scores_while_learning(changed, lengths)
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert before[1, position] == after[1, position]  # the entropy is of the prefix alone


def test_one_update_is_the_written_rule(stream):
    """One chunk, one epoch, one sequence: a step of AdamW on the byte-weighted loss, clipped;
    a quarter of it scores."""
    tokens, target_bytes = stream
    tokens, target_bytes = tokens[:65], target_bytes[:64]
    settings = dict(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=32, TTT_DECAY=0.75)
    got = scores_while_learning(tokens, target_bytes, 32, **settings)
    model = learning_model(**settings)
    hp = model.hp
    tuned = [p for n, p in model.named_parameters() if learns(n)]
    before = [p.detach().clone() for p in tuned]
    ids = torch.from_numpy(tokens[:33].astype(np.int64))
    logp = log_probabilities(model, hidden_states(model, ids[None, :32]))[0]
    shares = torch.from_numpy(target_bytes[:32].astype(np.float32))
    loss = -(logp[torch.arange(32), ids[1:]] * shares).sum() / shares.sum()
    grads = torch.autograd.grad(loss, tuned)
    scale = min(1.0, 1 / (float(sum(g.square().sum() for g in grads)) ** 0.5 + 1e-6))
    for p, old, grad in zip(tuned, before, grads):  # AdamW's first step; its average with the old
        g = grad * scale
        p.data = old - 0.25 * hp.ttt_lr * g / (g.abs() + hp.adam_eps)
    expected = scores_of(model, tokens, 32, (32, 64))
    np.testing.assert_allclose(got[:, 32:], expected, rtol=2e-4, atol=2e-4)


def test_only_the_named_parameters_learn_and_all_come_back(stream):
    model = learning_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    segments = segments_while_learning(model, validation_of(*stream), 8)
    for _ in range(2):
        next(segments)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if learns(n)}
    segments.close()  # as when the stride grows: all as it was
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("begin, end", [(0, 100), (100, 200), (90, 103), (0, 20), (32, 350)])
def test_each_target_of_a_chunk_is_learned_from_once_an_epoch(stream, begin, end, monkeypatch):
    tokens, _ = stream
    target_bytes = np.arange(1, 351).astype(np.uint16)  # so that a share names its target
    monkeypatch.setattr(t, "TTT_BATCH", 4)
    validation, length = validation_of(tokens, target_bytes), tiny().eval_seq_len
    for world_size in (1, 3):
        seen = np.zeros(350)
        for rank in range(world_size):
            for ids, target_ids, shares in t.ttt_batches(
                validation, begin, end, length, FakeRanks(rank, world_size)
            ):
                assert ids.shape == target_ids.shape == shares.shape
                assert len(ids)
                for row_ids, row_target_ids, row in zip(ids, target_ids, shares):
                    used = torch.nonzero(row).flatten().tolist()
                    start = next(
                        s
                        for s in range(351)
                        if np.array_equal(tokens[s : s + len(row)], row_ids.numpy())
                    )
                    assert np.array_equal(
                        tokens[start + 1 : start + 1 + len(row)], row_target_ids.numpy()
                    )
                    seen[[start + i for i in used]] += 1
        assert seen[begin:end].tolist() == [1] * (end - begin)
        assert seen.sum() == end - begin


def test_a_chunk_of_no_bytes_teaches_nothing(stream):
    tokens, _ = stream
    scores = scores_while_learning(tokens, np.zeros(350, np.uint16))
    parts = ((0, 100), (100, 200), (200, 300), (300, 350))
    plain = [scores_of(learning_model(), tokens, 8, part) for part in parts]
    assert np.array_equal(scores, np.concatenate(plain, 1))


def test_only_a_stream_scored_to_its_end_is_reported(stream):
    """A stride that would take too long is given up after a few chunks."""
    model, validation, log = learning_model(), validation_of(*stream), KeptLog()
    tried = segments_while_learning(model, validation, 8, log)
    next(tried)
    tried.close()
    assert log.lines == []
    list(segments_while_learning(model, validation, 8, log))
    assert [line.split()[0] for line in log.lines] == ["ttt:score_first"]


def test_the_learning_rate_rises_threefold_then_falls_to_zero():
    assert t.ttt_scale(0) == 1
    assert t.ttt_scale(1) == pytest.approx(0)
    assert t.ttt_scale(0.3) == pytest.approx(3 * (1 + math.cos(0.3 * math.pi)) / 2)
    assert t.ttt_scale(0.15) == pytest.approx(2 * (1 + math.cos(0.15 * math.pi)) / 2)
    assert t.ttt_scale(0.6) == pytest.approx(3 * (1 + math.cos(0.6 * math.pi)) / 2)  # no more


def test_one_and_two_ranks_learn_the_same(corpus, tmp_path):
    settings = dict(
        **corpus, ITERATIONS=6, TTT_EPOCHS=2, TTT_CHUNK_TOKENS=1024, TTT_LR=0.003, **BRIEF
    )
    results = {}
    for ranks in (1, 2):
        (tmp_path / f"{ranks}").mkdir()
        done = run_script(tmp_path / f"{ranks}", ranks if ranks > 1 else 0, **settings)
        assert done.returncode == 0, done.stderr[-2000:]
        results[ranks] = {
            name: values(done.stdout, f"final_int6_{name}")
            for name in ("roundtrip", "sliding_window")
        }
        assert float(values(done.stdout, "ttt:score_first")["moved"]) > 0
    for name in ("roundtrip", "sliding_window"):
        one, two = (float(results[ranks][name]["val_bpb"]) for ranks in (1, 2))
        assert one == pytest.approx(two, abs=1e-5)
    assert float(results[1]["sliding_window"]["val_bpb"]) < float(
        results[1]["roundtrip"]["val_bpb"]
    )


def distribution(model, buffer, j: int, begin: int, end: int) -> np.ndarray:
    """p(v) of target j in the window of its chunk that scores it;
    what is not decoded yet is zeros."""
    length = min(model.hp.eval_seq_len, end)
    starts, firsts, _ = t.windows(begin, end, length, model.hp.eval_stride)
    start = int(starts[np.searchsorted(firsts, j, "right") - 1])
    window = torch.from_numpy(buffer[start : start + length].astype(np.int64))
    with torch.no_grad():
        hidden = hidden_states(model, window[None])[0, j - start]
        return torch.softmax(log_probabilities(model, hidden).double(), -1).numpy()


def code(model, target_bytes, first_token: int, next_token):
    """Encoder and decoder: `next_token(p)` codes or decodes one. The stream is known only up to it:
    chunk after chunk score_and_learn, which learns when asked for the next chunk, sees the tokens
    that were decoded before."""
    total, chunk = len(target_bytes), model.hp.ttt_chunk_tokens
    buffer = np.zeros(total + 1, np.uint16)
    buffer[0] = first_token
    predictor = Predictor(first_token, total, model.hp)
    validation = validation_of(buffer, target_bytes)
    segments = segments_while_learning(model, validation, model.hp.eval_stride)
    for begin in range(0, total, chunk):
        next(segments)  # learns from the chunk before; these scores mean nothing
        end = min(begin + chunk, total)
        for j in range(begin, end):
            p = distribution(model, buffer, j, begin, end)
            buffer[j + 1] = next_token(predictor.predict(p, float(-(p * np.log(p)).sum())))
            predictor.learn(int(buffer[j + 1]))
    segments.close()
    return buffer


def test_a_decoder_that_learns_as_it_reads_restores_the_stream(corpus):
    settings = dict(**corpus, TTT_CHUNK_TOKENS=100)
    hp = learning_model(**settings).hp
    tokens = np.array(t.load_validation(hp).tokens[:301])
    target_bytes = t.ByteCounter(hp)(tokens)
    nll, entropy = scores_while_learning(tokens, target_bytes, hp.eval_stride, **settings)
    claimed = t.mix(tokens, nll, entropy, hp).sum() / math.log(2)

    def categorical(p):
        return constriction.stream.model.Categorical(p.astype(np.float64), perfect=False)

    encoder, rest = constriction.stream.queue.RangeEncoder(), iter(tokens[1:].tolist())

    def encode_next(p):
        token = next(rest)
        encoder.encode(token, categorical(p))
        return token

    code(learning_model(**settings), target_bytes, int(tokens[0]), encode_next)
    words = encoder.get_compressed()
    decoder = constriction.stream.queue.RangeDecoder(words)
    restored = code(
        learning_model(**settings),
        target_bytes,
        int(tokens[0]),
        lambda p: int(decoder.decode(categorical(p))),
    )
    print(f"ttt: claimed:{claimed:.1f} bits coded:{32 * len(words)} bits of 300 targets")
    assert np.array_equal(restored, tokens)
    assert abs(32 * len(words) - claimed) <= 64
