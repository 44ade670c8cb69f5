"""The counts against a dictionary that scores one token and then adds it; the mixture is a probability."""
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


def dictionary_backoff(tokens, lowest, highest, min_count):
    """One token at a time: score, then add. The obvious reference."""
    followed, pairs, rows = Counter(), Counter(), []
    for i in range(1, len(tokens)):
        row = (0, 0, 0)
        for n in range(highest, lowest - 1, -1):
            context = tuple(tokens[i - n + 1: i]) if i - n + 1 >= 0 else None
            if context is not None and followed[context] >= min_count:
                row = (n, followed[context], pairs[context, tokens[i]])
                break
        rows.append(row)
        for n in range(2, highest + 1):
            if i - n + 1 >= 0:
                context = tuple(tokens[i - n + 1: i])
                followed[context] += 1
                pairs[context, tokens[i]] += 1
    return np.array(rows, np.int64).reshape(-1, 3).T


def streams(rng, kind, length):
    zipf = np.minimum(rng.zipf(1.3, length), 299)
    return dict(random=rng.integers(0, 5, length), zipf=zipf, one_token=np.full(length, 7),
                repetitive=np.tile(rng.integers(0, 300, 17), length // 17 + 1)[:length],
                copies=np.concatenate([zipf[: length // 2], zipf[: length - length // 2]]))[kind].astype(np.uint16)


@pytest.mark.parametrize("kind", ["random", "zipf", "one_token", "repetitive", "copies"])
@pytest.mark.parametrize("highest", [2, 7, 12])
def test_counts_equal_a_dictionary_cache(rng, kind, highest):
    tokens = streams(rng, kind, 600)
    for lowest, min_count in ((2, 2), (min(3, highest), 1)):
        hp = tiny(NGRAM_MIN_ORDER=lowest, NGRAM_ORDER=highest, NGRAM_MIN_COUNT=min_count)
        got = t.ngram_backoff(tokens, hp)
        assert np.array_equal(got, dictionary_backoff(tokens.tolist(), lowest, highest, min_count))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(2, 8), st.integers(1, 3))
def test_counts_equal_a_dictionary_cache_on_any_stream(tokens, highest, min_count):
    hp = tiny(NGRAM_ORDER=highest, NGRAM_MIN_COUNT=min_count)
    got = t.ngram_backoff(np.array(tokens, np.uint16), hp)
    assert np.array_equal(got, dictionary_backoff(tokens, 2, highest, min_count))


def test_counts_of_a_prefix_are_the_prefix_of_the_counts(rng):
    tokens = streams(rng, "copies", 2000)
    whole = t.ngram_backoff(tokens, tiny())
    for end in (2, 3, 50, 1001, 1999):
        assert np.array_equal(t.ngram_backoff(tokens[:end], tiny()), [c[:end - 1] for c in whole])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 5), max_size=50))
def test_group_numbers_keys_and_counts_earlier_ones(keys):
    ids, prior = t.group(np.array(keys, np.int64))
    seen = defaultdict(int)
    for i, key in enumerate(keys):
        assert prior[i] == seen[key]
        seen[key] += 1
        assert all((ids[i] == ids[j]) == (key == keys[j]) for j in range(i))
    assert len(keys) == 0 or set(ids) == set(range(len(set(keys))))


def test_the_mixture_sums_to_one_over_the_vocabulary(rng):
    """At each position put every token of the vocabulary in the target's place: the mixed p must sum to 1."""
    V, hp = 12, tiny(NGRAM_MIN_COUNT=1)
    tokens = rng.integers(0, V, 200).astype(np.uint16)
    p_model = rng.dirichlet(np.ones(V))
    entropy = np.full(1, -(p_model * np.log(p_model)).sum(), np.float32)
    for position in (1, 2, 5, 60, 199):
        total = 0.0
        for v in range(V):
            stream = np.concatenate((tokens[:position], [v])).astype(np.uint16)
            counts = [c[-1:] for c in t.ngram_backoff(stream, hp)]
            total += math.exp(-t.mixture_nll(np.array([-math.log(p_model[v])]), entropy, counts, hp)[0])
        assert total == pytest.approx(1.0, abs=1e-9)


def test_the_weight_is_the_written_one():
    """PR #889: from ALPHA_MIN to ALPHA_MAX, half-way at 4 nats."""
    hp = tiny(ALPHA_MIN=0.1, ALPHA_MAX=0.5)
    nll, counts = np.full(3, 50.0), [np.array(c) for c in ([2, 2, 0], [4, 4, 0], [2, 2, 0])]
    mixed = t.mixture_nll(nll, np.array([4.0, -300.0, 9.0], np.float32), counts, hp)
    assert np.exp(-mixed[:2]) == pytest.approx([0.3 * 0.5, 0.1 * 0.5]) and mixed[2] == 50.0


def test_noise_is_never_cheaper_than_its_entropy(rng):
    """A code that beats log2 V on uniform noise would not be a code."""
    V = 64
    tokens = rng.integers(0, V, 60_000).astype(np.uint16)
    entropy = np.full(len(tokens) - 1, math.log(V), np.float32)
    nll = np.full(len(tokens) - 1, math.log(V))
    assert t.mixture_nll(nll, entropy, t.ngram_backoff(tokens, tiny()), tiny()).mean() >= math.log(V) - 1e-3
