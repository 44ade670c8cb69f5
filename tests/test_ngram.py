"""Counts against a dictionary that scores one token and then adds it; mixtures against a predictor
that does the same. What every mixing rule promises: test_mixture.py."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from helpers import stream_of, target_scores, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CENTERS, Predictor

import train_gpt as t

KINDS = ["random", "zipf", "one_token", "repetitive", "noisy_copies", "documents", "wide"]


def dictionary_counts(tokens, longest):
    """Per target and n, before the target is added: (c(u), c(u, v), distinct continuations, and of
    the open document, which a BOS ends, d(u), d(u, v))."""
    counts, rows = {n: defaultdict(Counter) for n in range(2, longest + 1)}, []
    doc_counts = {n: defaultdict(Counter) for n in range(2, longest + 1)}
    for i in range(1, len(tokens)):
        row = {}
        for n, contexts in counts.items():
            if i >= n - 1:
                seen, here = (c[tuple(tokens[i - n + 1 : i])] for c in (contexts, doc_counts[n]))
                row[n] = (
                    *(seen.total(), seen[tokens[i]], sum(c > 0 for c in seen.values())),
                    *(min(here.total(), 255), min(here[tokens[i]], 255)),
                )
                seen[tokens[i]] += 1
                here[tokens[i]] += 1
        rows.append(row)
        if tokens[i] == t.BOS:
            doc_counts = {n: defaultdict(Counter) for n in doc_counts}
    return rows


def production_counts(tokens, longest):
    """Yields (n, c(u), c(u, v), the context's state, d(u), d(u, v)) of all targets: the count of a
    context is that of n - 1, one position earlier."""
    for shorter, counts in enumerate(itertools.pairwise(t.ngram_counts(tokens, longest)), start=1):
        of_context, of_ngram = counts
        yield (
            shorter + 1,
            of_context.ngram_count[:-1],
            of_ngram.ngram_count[1:],
            of_ngram.context_state[1:],
            of_context.doc_count[:-1],
            of_ngram.doc_count[1:],
        )


@pytest.mark.parametrize("chunk", [1, 50, 1 << 18])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_a_dictionary_cache(rng, kind, chunk, monkeypatch):
    monkeypatch.setattr(t, "CHUNK", chunk)  # however many positions are sorted at a time
    tokens = stream_of(kind, rng, 700)
    expected = dictionary_counts(tokens.tolist(), 12)
    for n, context_count, ngram_count, state, *of_document in production_counts(tokens, 12):
        want = np.array([row.get(n, (0,) * 5) for row in expected])
        assert np.array_equal(context_count, want[:, 0]), (kind, n)
        assert np.array_equal(ngram_count, want[:, 1]), (kind, n)
        assert np.array_equal(np.stack(of_document, 1), want[:, 3:]), (kind, n)
        assert np.array_equal(state > 0, want[:, 0] > 0)
        # what the state says of distinct continuations
        share = (state[state > 0] - 1) // 8 % 4
        known = want[state > 0]
        assert np.array_equal(share, np.minimum(4 * (known[:, 0] - known[:, 2]) // known[:, 0], 3))


@settings(max_examples=150)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(2, 16))
def test_counts_equal_a_dictionary_cache_on_any_stream(tokens, longest):
    expected = dictionary_counts(tokens, longest)
    for n, *counts in production_counts(np.array(tokens, np.uint16), longest):
        context_count, ngram_count, _, *of_document = counts
        want = [row.get(n, (0,) * 5) for row in expected]
        found = list(zip(context_count, ngram_count, *of_document))
        assert [row[:2] + row[3:] for row in want] == found


@pytest.mark.parametrize("describe", [True, False])
@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_the_same_with_any_number_of_threads(rng, kind, threads, describe, monkeypatch):
    """In many small chunks, which the threads finish in any order."""
    monkeypatch.setattr(t, "CHUNK", 40)
    tokens = stream_of(kind, rng, 3000)
    alone = t.ngram_counts(tokens, 9, describe)
    together = t.ngram_counts(tokens, 9, describe, map_chunks=t.map_in_threads(threads))
    for want, found in zip(alone, together, strict=True):
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(want, found))


def test_a_chunk_is_not_overwritten_before_it_is_read(rng, monkeypatch):
    """The last chunk is counted first, and the first one last."""
    monkeypatch.setattr(t, "CHUNK", 40)
    tokens = stream_of("noisy_copies", rng, 2000)

    def backwards(function, items):
        items = list(items)
        found = [function(item) for item in reversed(items)]
        return reversed(found)

    for want, found in zip(
        t.ngram_counts(tokens, 7), t.ngram_counts(tokens, 7, map_chunks=backwards)
    ):
        assert all(map(np.array_equal, want, found))


@pytest.mark.parametrize("rule", t.RULES)
def test_a_mixture_is_the_same_with_any_number_of_threads(rng, rule):
    tokens = stream_of("documents", rng, 3000)
    _, nll, entropy = target_scores(tokens, rng, 300)
    settings = [tiny(NGRAM_ALPHA=rule, NGRAM_THREADS=threads) for threads in (1, 2, 8)]
    one, *others = [t.mix(tokens, nll, entropy, hp) for hp in settings]
    assert all(np.array_equal(one, other) for other in others)


def test_no_number_of_threads_means_the_cores_up_to_8(monkeypatch):
    made = []
    pool = t.concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(
        t.concurrent.futures, "ThreadPoolExecutor", lambda n: made.append(n) or pool(n)
    )
    for cores in (1, 2, 64, None):
        monkeypatch.setattr(t.os, "cpu_count", lambda cores=cores: cores)
        t.map_in_threads(0)
    assert made == [2, 8]  # one core needs no pool, nor does an unknown number


def test_counts_alone_are_those_with_descriptions(rng):
    tokens = stream_of("documents", rng, 700)
    for alone, described in zip(t.ngram_counts(tokens, 5, False), t.ngram_counts(tokens, 5)):
        assert np.array_equal(alone.ngram_count, described.ngram_count)
        assert alone.doc_count.size == 0


def test_counts_on_real_text(corpus):
    tokens = np.array(t.load_validation(tiny(**corpus)).tokens)
    expected = dictionary_counts(tokens.tolist(), 7)
    for n, context_count, ngram_count, _, *of_document in production_counts(tokens, 7):
        want = np.array([row.get(n, (0,) * 5) for row in expected])
        found = np.stack((context_count, ngram_count, *of_document), 1)
        assert np.array_equal(found, want[:, [0, 1, 3, 4]])


@pytest.mark.parametrize("shortest, longest, least", [(2, 7, 2), (3, 5, 1), (2, 2, 1), (4, 16, 3)])
def test_backoff_takes_the_longest_context_that_was_seen_often_enough(
    rng, shortest, longest, least
):
    tokens = stream_of("noisy_copies", rng, 900)
    bounds = dict(NGRAM_MIN_ORDER=shortest, NGRAM_ORDER=longest, NGRAM_MIN_COUNT=least)
    rule = t.Backoff(tokens, tiny(NGRAM_ALPHA="entropy", **bounds))
    got = np.stack((rule.n, rule.context_count, rule.ngram_count), 1)
    for i, row in enumerate(dictionary_counts(tokens.tolist(), longest)):
        fits = [n for n in range(shortest, longest + 1) if n in row and row[n][0] >= least]
        want = (fits[-1], *row[fits[-1]][:2]) if fits else (0, 0, 0)
        assert tuple(got[i]) == want, i


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2**40), max_size=50), st.sampled_from([1, 2**20]))
def test_sorting_groups_keys_and_counts_earlier_ones(keys, scale):
    keys = [k % 5 * scale**2 if scale > 1 else k % 7 for k in keys]
    perm, first, prior = t.sort_runs(np.array(keys, np.uint64))
    assert perm.tolist() == sorted(range(len(keys)), key=keys.__getitem__)  # stable
    assert prior.tolist() == [keys[:i].count(key) for i, key in enumerate(keys)]
    assert first.tolist() == [prior[i] == 0 for i in perm]


SCHEMES = [
    dict(NGRAM_ALPHA="online"),
    dict(NGRAM_ALPHA="online", NGRAM_MIN_ORDER=3, NGRAM_ORDER=9),
    dict(NGRAM_ALPHA="entropy"),
    dict(NGRAM_ALPHA="order", NGRAM_MIN_COUNT=1),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("kind", ["zipf", "noisy_copies", "documents", "one_token"])
def test_the_mixture_is_what_a_decoder_would_predict_and_sums_to_one(rng, kind, scheme):
    """Token by token against the dictionary predictor: the same probability of each target, from a
    distribution that was complete before the target was seen."""
    V, hp = 300, tiny(**scheme)
    tokens = stream_of(kind, rng, 1000)
    p, nll, entropy = target_scores(tokens, rng, V)
    predictor, expected = Predictor(int(tokens[0]), len(nll), hp), []
    for i, token in enumerate(tokens[1:].tolist()):
        distribution = predictor.predict(p[i], float(entropy[i]))
        assert abs(distribution.sum() - 1) < 1e-12 and distribution.min() > 0
        expected.append(-math.log(distribution[token]))
        predictor.learn(token)
    np.testing.assert_allclose(t.mix(tokens, nll, entropy, hp), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_rule_makes_the_distribution_that_a_decoder_would_predict(rng, scheme):
    """Of the whole vocabulary, from any distribution of the model."""
    V, hp, N = 300, tiny(**scheme, VOCAB_SIZE=300), 1000
    tokens = stream_of("documents", rng, N + 1)
    p, _, entropy = target_scores(tokens, rng, V)
    predictor, expected = Predictor(int(tokens[0]), N, hp), []
    for i, token in enumerate(tokens[1:].tolist()):
        expected.append(predictor.predict(p[i], float(entropy[i])))
        predictor.learn(token)
    rule, compared = t.RULES[hp.ngram_alpha](tokens, hp), []
    for begin, end in itertools.pairwise(t.block_edges(N)):
        of_targets = p[np.arange(begin, end), tokens[begin + 1 : end + 1]]
        rule.mix(begin, end, of_targets, entropy[begin:end])
        for target in {begin, end - 1, *rng.integers(begin, end, 5).tolist()}:
            got = rule.distribution(target, p[target], entropy[target])
            np.testing.assert_allclose(got, expected[target], rtol=0, atol=1e-12)
            compared.append(target)
    changed = [i for i in compared if not np.allclose(expected[i], p[i], rtol=0, atol=1e-6)]
    assert {0, N - 1} <= set(compared) and len(changed) > len(compared) / 2


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_longest_known_context_of_each_target_is_kept(rng, scheme):
    tokens, hp = stream_of("documents", rng, 1500), tiny(**scheme)
    _, nll, entropy = target_scores(tokens, rng, 300)
    mixture = t.Mixture(tokens, hp)
    mixture.extend(nll[:700], entropy[:700])
    mixture.extend(nll, entropy)
    least = 1 if hp.ngram_alpha == "online" else hp.ngram_min_count
    longest = [
        max(
            (n for n, (seen, *_) in row.items() if seen >= least and n >= hp.ngram_min_order),
            default=0,
        )
        for row in dictionary_counts(tokens.tolist(), hp.ngram_order)
    ]
    assert np.array_equal(mixture.matched_n, longest)


@pytest.mark.parametrize("alpha, centers", [("entropy", [4.0] * 6), ("order", CENTERS)])
def test_the_alpha_of_backoff_is_the_written_one(alpha, centers):
    """From ALPHA_MIN to ALPHA_MAX, half-way at 4 nats (PR #889) or at a centre for each n (PR
    #825), of which longer ones than 7 share the last."""
    rule = t.Backoff(np.zeros(9, np.uint16), tiny(NGRAM_ALPHA=alpha, ALPHA_MIN=0.1, ALPHA_MAX=0.5))
    n = np.array([*range(2, 8), 9, 2, 7, 0])
    entropy = np.array([*centers, centers[-1], -300.0, 300.0, 4.0])
    found = rule.blend(n, np.full(10, 2), np.full(10, 2), np.zeros(10), entropy)
    assert found == pytest.approx([*[0.3] * 7, 0.1, 0.5, 0.0])
