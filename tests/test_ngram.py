"""Counts against a dictionary that scores one token and then adds it; mixtures against a
token-by-token predictor."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Predictor

import train_gpt as t

KINDS = ["random", "zipf", "one_token", "repetitive", "noisy_copies", "documents", "wide"]


def stream_of(kind, rng, length):
    zipf, motif = np.minimum(rng.zipf(1.3, length), 299), rng.integers(0, 30, 60)
    copies = np.where(
        rng.random(length) < 0.9, np.resize(motif, length), rng.integers(0, 30, length)
    )
    return dict(
        random=rng.integers(0, 5, length),
        zipf=zipf,
        one_token=np.full(length, 7),
        repetitive=np.resize(rng.integers(0, 300, 17), length),
        noisy_copies=copies,
        documents=np.where(rng.random(length) < 0.05, t.BOS, copies),
        wide=rng.integers(65500, 65536, length),
    )[kind].astype(np.uint16)


def dictionary_counts(tokens, highest):
    """Per target and order, before the target is added: (c(u), c(u, v), distinct continuations, and
    of the open document, which a BOS ends, c(u), c(u, v))."""
    counts, rows = {n: defaultdict(Counter) for n in range(2, highest + 1)}, []
    local = {n: defaultdict(Counter) for n in range(2, highest + 1)}
    for i in range(1, len(tokens)):
        row = {}
        for n, contexts in counts.items():
            if i >= n - 1:
                seen, here = (c[tuple(tokens[i - n + 1 : i])] for c in (contexts, local[n]))
                row[n] = (
                    *(seen.total(), seen[tokens[i]], sum(c > 0 for c in seen.values())),
                    *(min(here.total(), 255), min(here[tokens[i]], 255)),
                )
                seen[tokens[i]] += 1
                here[tokens[i]] += 1
        rows.append(row)
        if tokens[i] == t.BOS:
            local = {n: defaultdict(Counter) for n in local}
    return rows


def production_counts(tokens, highest):
    """The same from ngram_counts: c(u) is the previous order's pair count, one position earlier.
    Yields (n, c(u), c(u, v), code, c(u) and c(u, v) of the document)."""
    levels = list(t.ngram_counts(tokens, highest))
    for n in range(2, highest + 1):
        (context, local_context, _), (pair, local_pair, code) = levels[n - 2], levels[n - 1]
        yield n, context[:-1], pair[1:], code[1:], local_context[:-1], local_pair[1:]


@pytest.mark.parametrize("chunk", [1, 50, 1 << 18])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_a_dictionary_cache(rng, kind, chunk, monkeypatch):
    monkeypatch.setattr(t, "CHUNK", chunk)  # whatever is refined at a time
    tokens = stream_of(kind, rng, 700)
    expected = dictionary_counts(tokens.tolist(), 12)
    for n, context, pair, code, local_context, local_pair in production_counts(tokens, 12):
        want = np.array([row.get(n, (0,) * 5) for row in expected])
        assert np.array_equal(context, want[:, 0]) and np.array_equal(pair, want[:, 1]), (kind, n)
        assert np.array_equal(local_context, want[:, 3]), (kind, n)
        assert np.array_equal(local_pair, want[:, 4]), (kind, n)
        assert np.array_equal(code > 0, want[:, 0] > 0)
        # what the code says of distinct continuations
        share = (code[code > 0] - 1) // 8 % 4
        known = want[code > 0]
        assert np.array_equal(share, np.minimum(4 * (known[:, 0] - known[:, 2]) // known[:, 0], 3))


@settings(max_examples=150)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(2, 16))
def test_counts_equal_a_dictionary_cache_on_any_stream(tokens, highest):
    expected = dictionary_counts(tokens, highest)
    for n, *counts in production_counts(np.array(tokens, np.uint16), highest):
        context, pair, _, *local = counts
        want = [row.get(n, (0,) * 5) for row in expected]
        assert [row[:2] + row[3:] for row in want] == list(zip(context, pair, *local))


def test_counts_on_real_text(corpus):
    tokens = np.array(t.load_validation(tiny(**corpus)).tokens)
    expected = dictionary_counts(tokens.tolist(), 7)
    for n, context, pair, _, *local in production_counts(tokens, 7):
        want = np.array([row.get(n, (0,) * 5) for row in expected])
        assert np.array_equal(context, want[:, 0]) and np.array_equal(pair, want[:, 1])
        assert np.array_equal(np.stack(local, 1), want[:, 3:])


@pytest.mark.parametrize("lowest, highest, least", [(2, 7, 2), (3, 5, 1), (2, 2, 1), (4, 16, 3)])
def test_backoff_takes_the_longest_context_that_was_seen_often_enough(rng, lowest, highest, least):
    tokens = stream_of("noisy_copies", rng, 900)
    hp = tiny(
        NGRAM_MIN_ORDER=lowest, NGRAM_ORDER=highest, NGRAM_MIN_COUNT=least, NGRAM_ALPHA="entropy"
    )
    counts = t.BackoffCounts(tokens, hp)
    got = np.stack((counts.order, counts.context, counts.pair), 1)
    for i, row in enumerate(dictionary_counts(tokens.tolist(), highest)):
        fits = [n for n in range(lowest, highest + 1) if n in row and row[n][0] >= least]
        want = (fits[-1], *row[fits[-1]][:2]) if fits else (0, 0, 0)
        assert tuple(got[i]) == want, i


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2**40), max_size=50), st.sampled_from([1, 2**20]))
def test_sorting_groups_keys_and_counts_earlier_ones(keys, scale):
    keys = [k % 5 * scale**2 if scale > 1 else k % 7 for k in keys]
    order, first, prior = t.sort_runs(np.array(keys, np.uint64))
    assert order.tolist() == sorted(range(len(keys)), key=keys.__getitem__)  # stable
    assert prior.tolist() == [keys[:i].count(key) for i, key in enumerate(keys)]
    assert first.tolist() == [prior[i] == 0 for i in order]


def model_of(tokens, rng, V):
    """A random full distribution at every target: (p[target, v], nll, entropy)."""
    p = rng.dirichlet(np.full(V, 0.5), len(tokens) - 1) + 1e-9
    p /= p.sum(-1, keepdims=True)
    nll = -np.log(p[np.arange(len(p)), tokens[1:]])
    return p, nll.astype(np.float32), -(p * np.log(p)).sum(-1).astype(np.float32)


def mixed(tokens, nll, entropy, hp, pieces=1):
    mixture = t.Mixture(tokens, hp)
    for end in np.linspace(0, len(nll), pieces + 1).astype(int)[1:]:
        mixture.extend(nll[:end], entropy[:end])
    mixture.audit()
    return mixture.nll


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
    tokens = stream_of(kind, rng, 1500)
    p, nll, entropy = model_of(tokens, rng, V)
    predictor, expected = Predictor(int(tokens[0]), len(nll), hp), []
    for i, token in enumerate(tokens[1:].tolist()):
        distribution = predictor.predict(p[i], float(entropy[i]))
        assert abs(distribution.sum() - 1) < 1e-12 and distribution.min() > 0
        expected.append(-math.log(distribution[token]))
        predictor.learn(token)
    np.testing.assert_allclose(mixed(tokens, nll, entropy, hp), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_rule_makes_the_distribution_that_a_decoder_would_predict(rng, scheme):
    """Of the whole vocabulary, from any distribution of the model."""
    V, hp, N = 300, tiny(**scheme, VOCAB_SIZE=300), 1000
    tokens = stream_of("documents", rng, N + 1)
    p, _, entropy = model_of(tokens, rng, V)
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
def test_production_code_sums_to_one_when_the_target_is_each_token_in_turn(rng, scheme):
    V, hp = 30, tiny(**scheme)
    tokens = stream_of("documents", rng, 1200)
    p, _, entropy = model_of(tokens, rng, V)
    for position in (1, 2, 60, 300, 1199):
        total, prefix = 0.0, tokens[: position + 1].copy()
        for v in range(V):
            prefix[position] = v
            nll = -np.log(p[np.arange(position), prefix[1:]]).astype(np.float64)
            mixture = t.Mixture(prefix, hp)
            mixture.extend(nll, entropy[:position])
            total += math.exp(-mixture.nll[-1])
        assert total == pytest.approx(1.0, abs=1e-11), position


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_past_does_not_change_with_the_future(rng, scheme):
    """The scores of a prefix are the prefix of the scores, bit for bit,
    whatever pieces they arrive in."""
    tokens, hp = stream_of("documents", rng, 3000), tiny(**scheme)
    _, nll, entropy = model_of(tokens, rng, 300)
    whole = mixed(tokens, nll, entropy, hp)
    for pieces in (2, 7, 100):
        assert np.array_equal(mixed(tokens, nll, entropy, hp, pieces), whole)
    for end in (1, 2, 64, 65, 1000, 2998):
        assert np.array_equal(mixed(tokens[: end + 1], nll[:end], entropy[:end], hp), whole[:end])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_longest_known_context_of_each_target_is_kept(rng, scheme):
    tokens, hp = stream_of("documents", rng, 1500), tiny(**scheme)
    _, nll, entropy = model_of(tokens, rng, 300)
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
    assert np.array_equal(mixture.order, longest)


def test_the_cache_of_a_document_is_the_sum_of_what_its_tokens_cost(rng, monkeypatch):
    """Against a loop, whatever the blocks: from earlier targets of the same document alone."""
    tokens, V = stream_of("documents", rng, 900), 300
    nats = rng.exponential(3, 899)
    cache, got, summed = t.Cache(tokens), [], []
    for begin, end in itertools.pairwise([0, 1, 2, 40, 41, 300, 899]):
        got.append(np.stack(cache.extend(begin, end, np.exp(-nats[begin:end]))))
        sums, total = cache.distribution(end - 1, V)
        summed.append((sums[tokens[end]], total, sums.sum()))
    want, seen = [], Counter()
    for token, cost in zip(tokens[1:].tolist(), nats):
        want.append((seen[token], seen.total()))
        seen[token] += round(-(math.log(math.exp(-cost)) ** 3))
        if token == t.BOS:
            seen.clear()
    assert np.array_equal(np.concatenate(got, 1).T, want)
    ends = [0, 1, 39, 40, 299, 898]
    assert summed == [(*want[i], want[i][1]) for i in ends]


def test_a_token_dearer_than_the_largest_surprise_fits_the_cache(rng):
    tokens = stream_of("zipf", rng, 50)
    cache = t.Cache(tokens)
    cache.extend(0, 49, np.full(49, 1e-300))
    assert cache.cubes[1:].min() == t.LARGEST_SURPRISE**3 == cache.cubes.max()


def test_a_document_says_more_than_the_stream(rng):
    """Each document repeats words of its own: what counts of the stream alone cannot know."""
    words = rng.integers(2, 300, (40, 8))
    tokens = np.concatenate([[t.BOS, *rng.choice(w, 100)] for w in words]).astype(np.uint16)
    nll = np.full(len(tokens) - 1, math.log(300))
    assert mixed(tokens, nll, nll, tiny()).mean() < 0.55 * math.log(300)


def test_scores_that_are_not_finite_stop_the_mixture(rng):
    tokens = stream_of("zipf", rng, 300)
    _, nll, entropy = model_of(tokens, rng, 300)
    nll[200] = np.nan
    with pytest.raises(RuntimeError, match="scores of targets 192 to 256 are not finite"):
        mixed(tokens, nll, entropy, tiny())


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_useless_counts_cost_less_than_a_bit_in_all(rng, kind):
    """Where tokens are drawn independently from what the model says, nothing can be gained: the
    whole stream may cost at most one bit more than the model alone, and noise never less than its
    entropy."""
    V, N = 1024, 100_000
    p = np.full(V, 1 / V) if kind == "uniform" else 1 / np.arange(1, V + 1)
    p /= p.sum()
    tokens = rng.choice(V, N + 1, p=p).astype(np.uint16)
    nll = -np.log(p)[tokens[1:]]
    entropy, hp = np.full(N, -(p * np.log(p)).sum()), tiny(NGRAM_ORDER=12, VOCAB_SIZE=V)
    cost = (mixed(tokens, nll, entropy, hp) - nll).sum() / math.log(2)
    assert cost <= 1 + 1e-6
    if kind == "uniform":
        assert cost / N >= -1e-4


def test_uniform_noise_is_never_cheaper_than_its_entropy(rng):
    """Per token and in expectation: enumerate the target, so that no luck is involved."""
    V, hp = 16, tiny()
    tokens = rng.integers(0, V, 800).astype(np.uint16)
    predictor, nats = Predictor(int(tokens[0]), 799, hp), []
    for token in tokens[1:].tolist():
        distribution = predictor.predict(np.full(V, 1 / V), math.log(V))
        nats.append(-np.log(distribution).mean())  # expected cost of a uniform token
        predictor.learn(token)
    assert min(nats) / math.log(2) >= math.log2(V) - 1e-6


def test_repetition_is_learned(rng):
    tokens = stream_of("noisy_copies", rng, 3000)
    nll = np.full(2999, math.log(30))
    assert mixed(tokens, nll, nll, tiny()).mean() < 0.7 * math.log(30)


def test_the_fixed_weight_is_the_written_one():
    """PR #889: from ALPHA_MIN to ALPHA_MAX, half-way at 4 nats.
    PR #825: half-way at each order's own centre."""
    hp = tiny(NGRAM_ALPHA="entropy", ALPHA_MIN=0.1, ALPHA_MAX=0.5)
    rule = t.EntropyBackoff(np.zeros(9, np.uint16), hp)
    got = rule.weight(np.array([4.0, -300.0, 300.0, 4.0]), np.array([2, 2, 7, 0]))
    assert got == pytest.approx([0.3, 0.1, 0.5, 0.0])
    hp = tiny(NGRAM_ALPHA="order", ALPHA_MIN=0.1, ALPHA_MAX=0.5)
    centers = np.array([4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 3.0])
    rule = t.OrderBackoff(np.zeros(9, np.uint16), hp)
    assert rule.weight(centers, np.arange(2, 9)) == pytest.approx(np.full(7, 0.3))


@pytest.mark.parametrize(
    "tamper, said",
    [
        (lambda m: m.nll.__setitem__(slice(None), m.nll - 0.01), "targets 0: mass .*1998: mass"),
        (
            lambda m: m.enumerated.update({1998: (1.5, m.enumerated[1998][1])}),
            "targets 1998: mass 1.5, ",
        ),
        (
            lambda m: m.enumerated.update({1998: (1.0, m.enumerated[1998][1] / 2)}),
            "targets 1998: mass 1.0, ",
        ),
        (
            lambda m: m.rule.pairs[1].__setitem__(slice(0, 40), 9),
            "targets the counts of a prefix differ",
        ),
        (
            lambda m: m.rule.codes[3].__setitem__(slice(0, 40), 9),
            "targets the counts of a prefix differ",
        ),
        (
            lambda m: m.rule.locals[1].__setitem__(slice(0, 40), 9),
            "targets the counts of a prefix differ",
        ),
    ],
)
def test_the_audit_finds_a_mixture_that_is_no_code(rng, tamper, said):
    tokens = stream_of("noisy_copies", rng, 2000)
    _, nll, entropy = model_of(tokens, rng, 300)
    mixture = t.Mixture(tokens, tiny())
    mixture.extend(nll, entropy)
    assert mixture.audit().startswith(
        "targets:1999/1999 mass_min:1.000000000000 mass_max:1.000000000000"
    )
    tamper(mixture)
    with pytest.raises(RuntimeError, match=said):
        mixture.audit()


@pytest.mark.parametrize("name", ["order", "context", "pair"])
def test_the_audit_counts_a_prefix_of_backoff_anew(rng, name):
    tokens = stream_of("noisy_copies", rng, 2000)
    _, nll, entropy = model_of(tokens, rng, 300)
    mixture = t.Mixture(tokens, tiny(NGRAM_ALPHA="entropy"))
    mixture.extend(nll, entropy)
    mixture.audit()
    getattr(mixture.rule.counts, name)[500] += 1
    with pytest.raises(RuntimeError, match="the counts of a prefix differ"):
        mixture.audit()


@pytest.mark.parametrize("alpha", ["online", "entropy", "order"])
def test_the_audit_finds_a_count_that_was_wrong_when_it_was_mixed(rng, alpha):
    """Also beyond the prefix whose counts it compares: sampled targets are recounted."""
    tokens = stream_of("noisy_copies", rng, 20_000)
    _, nll, entropy = model_of(tokens, rng, 31)
    mixture = t.Mixture(tokens, tiny(NGRAM_ALPHA=alpha, NGRAM_ORDER=2))
    last, rule = 19_998, mixture.rule
    assert last in mixture.samples
    if alpha == "online":
        rule.pairs[2][last + 1] += 500
    else:
        rule.counts.pair[last] += 500
    mixture.extend(nll, entropy)
    with pytest.raises(RuntimeError, match=r"code; targets 19998: mass [^;]*$"):
        mixture.audit()


class OtherDistribution(t.OnlineChain):
    """Sums to 1, but is not what was mixed."""

    def distribution(self, target, model_V, entropy):
        return 0.99 * super().distribution(target, model_V, entropy) + 0.01 / len(model_V)


class OtherMix(t.OnlineChain):
    """Gives each target a little more than its distribution has for it."""

    def mix(self, begin, end, model, entropy):
        p, order = super().mix(begin, end, model, entropy)
        return 1.001 * p, order


class OtherMass(t.OnlineChain):
    """Right at the target, but the others get a little more than what is left."""

    def distribution(self, target, model_V, entropy):
        p = super().distribution(target, model_V, entropy)
        others = np.arange(len(p)) != self.tokens[target + 1]
        return np.where(others, 1.001 * p, p)


@pytest.mark.parametrize("kind", [OtherDistribution, OtherMix, OtherMass])
def test_the_audit_finds_a_rule_that_mixes_other_than_its_distribution(rng, kind):
    tokens, hp = stream_of("noisy_copies", rng, 500), tiny()
    _, nll, entropy = model_of(tokens, rng, 300)
    mixture = t.Mixture(tokens, hp, kind(tokens, hp))
    mixture.extend(nll, entropy)
    with pytest.raises(RuntimeError, match="the mixture is no code; targets 0: mass"):
        mixture.audit()
