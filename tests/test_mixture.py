"""What every mixing rule promises; the document's cache; the audit. Counts, and what the rules
compute: test_ngram.py."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from helpers import stream_of, target_scores, tiny

import train_gpt as t

# --- the contract ---------------------------------------------------------------------------------

LONGER = dict(NGRAM_MIN_ORDER=3, NGRAM_ORDER=9, NGRAM_MIN_COUNT=1)


@pytest.fixture(params=t.RULES)
def alpha(request) -> str:
    """The name of each rule."""
    return request.param


@pytest.fixture(params=[{}, LONGER], ids=["2-7", "3-9"])
def hp(request, alpha) -> t.Hyperparameters:
    """Settings with each rule, and with other n-grams."""
    return tiny(NGRAM_ALPHA=alpha, VOCAB_SIZE=300, **request.param)


def in_pieces(tokens, nll, entropy, hp, pieces: int) -> t.Mixture:
    mixture = t.Mixture(tokens, hp)
    for end in np.linspace(0, len(nll), pieces + 1).astype(int)[1:]:
        mixture.extend(nll[:end], entropy[:end])
    return mixture


def block_by_block(rule, tokens, p, entropy):
    """Mix the model's p[target, v]; yields (begin, end, p of the targets) after each block."""
    for begin, end in itertools.pairwise(t.block_edges(len(tokens) - 1)):
        model = p[np.arange(begin, end), tokens[begin + 1 : end + 1]]
        mixed, _ = rule.mix(begin, end, model, entropy[begin:end])
        yield begin, end, mixed


def test_p_sums_to_one_when_the_target_is_each_token_in_turn(rng, hp):
    V = 30
    hp = t.Hyperparameters.from_env(hp.as_env() | dict(VOCAB_SIZE=str(V)))
    tokens = stream_of("documents", rng, 600)
    p, _, entropy = target_scores(tokens, rng, V)
    for position in (1, 2, 60, 300, 599):
        total, prefix = 0.0, tokens[: position + 1].copy()
        for v in range(V):
            prefix[position] = v
            nll = -np.log(p[np.arange(position), prefix[1:]])
            total += math.exp(-t.mix(prefix, nll, entropy[:position], hp)[-1])
        assert total == pytest.approx(1.0, abs=1e-11), position


def test_a_distribution_is_positive_sums_to_one_and_has_the_p_that_was_mixed(rng, hp):
    """From any distribution of the model, at some targets of every block."""
    tokens = stream_of("documents", rng, 1001)
    p, _, entropy = target_scores(tokens, rng, hp.vocab_size)
    rule = t.RULES[hp.ngram_alpha](tokens, hp)
    for begin, end, mixed in block_by_block(rule, tokens, p, entropy):
        for target in {begin, end - 1, *rng.integers(begin, end, 5).tolist()}:
            found = rule.distribution(target, p[target], entropy[target])
            assert found.min() > 0
            assert found.sum() == pytest.approx(1, abs=1e-12)
            token = tokens[target + 1]
            assert found[token] == pytest.approx(mixed[target - begin], rel=1e-12), target


def test_the_scores_of_a_prefix_are_the_prefix_of_the_scores(rng, hp):
    """Bit for bit: the past does not change with the future."""
    tokens = stream_of("documents", rng, 3000)
    _, nll, entropy = target_scores(tokens, rng, 300)
    whole = t.mix(tokens, nll, entropy, hp)
    for end in (1, 2, 64, 65, 1000, 2998):
        prefix = t.mix(tokens[: end + 1], nll[:end], entropy[:end], hp)
        assert np.array_equal(prefix, whole[:end])


@pytest.mark.parametrize("pieces", [2, 7, 100])
def test_scores_may_arrive_in_any_pieces(rng, hp, pieces):
    """Bit for bit."""
    tokens = stream_of("documents", rng, 3000)
    _, nll, entropy = target_scores(tokens, rng, 300)
    found = in_pieces(tokens, nll, entropy, hp, pieces).nll
    assert np.array_equal(found, t.mix(tokens, nll, entropy, hp))


def test_uniform_noise_is_never_cheaper_than_its_entropy(rng, alpha):
    """In expectation, whatever the rule has learned: enumerate the target, so that no luck is
    involved."""
    V, N = 16, 800
    hp, tokens = tiny(NGRAM_ALPHA=alpha, VOCAB_SIZE=V), rng.integers(0, V, N + 1).astype(np.uint16)
    uniform, entropy = np.full((N, V), 1 / V), np.full(N, math.log(V))
    rule = t.RULES[alpha](tokens, hp)
    for begin, end, _ in block_by_block(rule, tokens, uniform, entropy):
        for target in range(begin, end, 7):
            found = rule.distribution(target, uniform[target], entropy[target])
            assert -np.log(found).mean() >= math.log(V) - 1e-12


def test_a_stream_of_uniform_noise_costs_its_entropy_at_least(rng, alpha):
    V, N = 1024, 20_000
    tokens = rng.integers(0, V, N + 1).astype(np.uint16)
    nats = np.full(N, math.log(V))
    mixed = t.mix(tokens, nats, nats, tiny(NGRAM_ALPHA=alpha, VOCAB_SIZE=V))
    assert mixed.mean() >= math.log(V) - 1e-4


@pytest.mark.parametrize("nats", [0.0, 1e4])
def test_a_model_that_is_sure_or_wholly_wrong_gets_a_finite_score(rng, hp, nats):
    tokens = stream_of("noisy_copies", rng, 500)
    scores = np.full(499, nats)
    assert np.isfinite(t.mix(tokens, scores, np.zeros(499), hp)).all()


def test_the_n_that_matched_is_one_of_the_settings_or_0(rng, hp):
    tokens = stream_of("documents", rng, 1500)
    _, nll, entropy = target_scores(tokens, rng, 300)
    found = in_pieces(tokens, nll, entropy, hp, 1).matched_n
    assert set(np.unique(found)) <= {0, *range(hp.ngram_min_order, hp.ngram_order + 1)}


def test_the_evidence_of_a_prefix_is_the_prefix_of_the_evidence(rng, hp):
    tokens = stream_of("documents", rng, 2000)
    whole, prefix = (t.RULES[hp.ngram_alpha](x, hp).evidence() for x in (tokens, tokens[:900]))
    assert len(whole) == len(prefix) > 0
    for some, all_ in zip(prefix, whole):
        assert np.array_equal(some, all_[: len(some)])


def audited(tokens, rng, hp, rule=None) -> t.Mixture:
    """A whole stream, mixed."""
    _, nll, entropy = target_scores(tokens, rng, 300)
    mixture = t.Mixture(tokens, hp, rule)
    mixture.extend(nll, entropy)
    return mixture


def test_the_audit_says_that_the_mixture_is_a_code(rng, hp):
    said = audited(stream_of("noisy_copies", rng, 2000), rng, hp).audit()
    assert said.startswith("targets:1999/1999 mass_min:1.000000000000 mass_max:1.000000000000")


def test_the_audit_finds_evidence_that_a_prefix_does_not_have(rng, hp, monkeypatch):
    mixture = audited(stream_of("noisy_copies", rng, 2000), rng, hp)
    evidence = mixture.rule.evidence()
    for i, array in enumerate(evidence):
        if not array.size:
            continue
        changed = array.copy()
        changed[500] += 1
        other = [*evidence[:i], changed, *evidence[i + 1 :]]
        monkeypatch.setattr(mixture.rule, "evidence", lambda other=other: other)
        with pytest.raises(
            RuntimeError,
            match="valid code: the first 2000 tokens have other counts when counted alone$",
        ):
            mixture.audit()


# --- the online chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_useless_counts_cost_less_than_a_bit_in_all(rng, kind):
    """Where tokens are drawn independently from what the model says, nothing can be gained: the
    whole stream may cost at most one bit more than the model alone."""
    V, N = 1024, 100_000
    p = np.full(V, 1 / V) if kind == "uniform" else 1 / np.arange(1, V + 1)
    p /= p.sum()
    tokens = rng.choice(V, N + 1, p=p).astype(np.uint16)
    nll = -np.log(p)[tokens[1:]]
    entropy, hp = np.full(N, -(p * np.log(p)).sum()), tiny(NGRAM_ORDER=12, VOCAB_SIZE=V)
    cost = (t.mix(tokens, nll, entropy, hp) - nll).sum() / math.log(2)
    assert cost <= 1 + 1e-6


def test_repetition_is_learned(rng):
    tokens = stream_of("noisy_copies", rng, 3000)
    nll = np.full(2999, math.log(30))
    assert t.mix(tokens, nll, nll, tiny()).mean() < 0.7 * math.log(30)


def test_a_document_says_more_than_the_stream(rng):
    """Each document repeats words of its own: what counts of the stream alone cannot know."""
    words = rng.integers(2, 300, (40, 8))
    tokens = np.concatenate([[t.BOS, *rng.choice(w, 100)] for w in words]).astype(np.uint16)
    nll = np.full(len(tokens) - 1, math.log(300))
    assert t.mix(tokens, nll, nll, tiny()).mean() < 0.55 * math.log(300)


def test_the_cache_of_a_document_is_the_sum_of_what_its_tokens_cost(rng):
    """Against a loop, whatever the blocks: from earlier targets of the same document alone."""
    tokens, V = stream_of("documents", rng, 900), 300
    nats = rng.exponential(3, 899)
    cache, got, summed = t.DocumentCache(tokens), [], []
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
    cache = t.DocumentCache(tokens)
    cache.extend(0, 49, np.full(49, 1e-300))
    assert cache.cubes[1:].min() == t.LARGEST_SURPRISE**3 == cache.cubes.max()


def test_a_document_is_numbered_by_the_bos_before_it(rng):
    tokens = np.where(rng.random(200) < 0.1, t.BOS, 7).astype(np.uint16)
    expected = [sum(token == t.BOS for token in tokens[:i]) for i in range(200)]
    assert t.document_numbers(tokens).tolist() == expected


def test_a_target_knows_where_its_document_starts(rng):
    tokens = np.where(rng.random(200) < 0.1, t.BOS, 7).astype(np.uint16)
    for target in range(199):  # it is token target + 1
        before = [i for i in range(target + 1) if tokens[i] == t.BOS]
        assert t.document_start(tokens, target) == (before[-1] + 1 if before else 0)


# --- what is not a valid code ---------------------------------------------------------------------


def test_scores_that_are_not_finite_stop_the_mixture(rng):
    tokens = stream_of("zipf", rng, 300)
    _, nll, entropy = target_scores(tokens, rng, 300)
    nll[200] = np.nan
    with pytest.raises(RuntimeError, match="scores of targets 192 to 256 are not finite"):
        t.mix(tokens, nll, entropy, tiny())


@pytest.mark.parametrize(
    "tamper, said",
    [
        (lambda m: m.nll.__isub__(0.01), "at target 0 p sums to .*at target 1998 p sums to "),
        (
            lambda m: m.enumerated.update({1998: (1.5, m.enumerated[1998][1])}),
            "at target 1998 p sums to 1.5; ",
        ),
        (
            lambda m: m.enumerated.update({1998: (1.0, m.enumerated[1998][1] / 2)}),
            "at target 1998 p sums to 1.0; ",
        ),
        (
            lambda m: m.enumerated.update({1998: (math.nan, m.enumerated[1998][1])}),
            "at target 1998 p sums to nan; ",
        ),
        (lambda m: m.enumerated.update({1998: (1.0, math.nan)}), "recounted nan$"),
        (lambda m: m.enumerated.update({1998: (1.0, 0.0)}), "recounted 0.0$"),
    ],
    ids=["scores", "mass", "p", "NaN mass", "NaN p", "p of 0"],
)
def test_the_audit_finds_a_mixture_that_is_no_code(rng, tamper, said):
    mixture = audited(stream_of("noisy_copies", rng, 2000), rng, tiny())
    tamper(mixture)
    with pytest.raises(RuntimeError, match=said):
        mixture.audit()


def miscount(rule, target: int) -> None:
    """Make the rule believe that the target's bigram came 500 times more often."""
    if isinstance(rule, t.OnlineChain):
        rule.counts[2].ngram_count[target + 1] += 500
    else:
        rule.ngram_count[target] += 500


@pytest.mark.parametrize("alpha", ["online", "entropy", "order"], indirect=True)
def test_the_audit_finds_a_count_that_was_wrong_when_it_was_mixed(rng, alpha):
    """Also beyond the prefix whose counts it compares: sampled targets are recounted."""
    tokens = stream_of("noisy_copies", rng, 20_000)
    _, nll, entropy = target_scores(tokens, rng, 31)
    mixture = t.Mixture(tokens, tiny(NGRAM_ALPHA=alpha, NGRAM_ORDER=2))
    last = 19_998
    assert last in mixture.samples
    miscount(mixture.rule, last)
    mixture.extend(nll, entropy)
    with pytest.raises(RuntimeError, match=r"code: at target 19998 p sums to [^;]*; scored [^;]*$"):
        mixture.audit()


class OtherDistribution(t.OnlineChain):
    """Sums to 1, but is not what was mixed."""

    def distribution(self, target, model_V, entropy):
        return 0.99 * super().distribution(target, model_V, entropy) + 0.01 / len(model_V)


class OtherMix(t.OnlineChain):
    """Gives each target a little more than its distribution has for it."""

    def mix(self, begin, end, model, entropy):
        p, n = super().mix(begin, end, model, entropy)
        return 1.001 * p, n


class OtherMass(t.OnlineChain):
    """Right at the target, but the others get a little more than what is left."""

    def distribution(self, target, model_V, entropy):
        p = super().distribution(target, model_V, entropy)
        others = np.arange(len(p)) != self.tokens[target + 1]
        return np.where(others, 1.001 * p, p)


@pytest.mark.parametrize("kind", [OtherDistribution, OtherMix, OtherMass])
def test_the_audit_finds_a_rule_that_mixes_other_than_its_distribution(rng, kind):
    tokens, hp = stream_of("noisy_copies", rng, 500), tiny()
    with pytest.raises(
        RuntimeError, match="the mixture is not a valid code: at target 0 p sums to "
    ):
        audited(tokens, rng, hp, kind(tokens, hp)).audit()
