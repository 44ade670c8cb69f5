"""The score of one stream by each mixing rule, from the saved scores of a model. It needs neither
the model nor a GPU.

    python -m studies.mixture SCORES.npz [SHARD] [--tokenizer MODEL] [--vocab-size 1024]
        [--orders 7 12 16]

SCORES.npz holds `nll` and `entropy` (nats per target, float32) of the first targets of the stream
in SHARD, as a run with SAVE_SCORES=1 writes them. Or it holds the stream itself too, of any
vocabulary: `tokens` (uint16) and `bytes` per target. For each rule it prints the bits per byte of
all targets (bits per token if the bytes are unknown) and the gain over the neural model; the gain
in each third of the targets, in the first 60 %, on which the constants of the rule were chosen, and
in the last 40 %; and the mixture's own audit. The rule without each of its parts shows what the
part is worth; the rule with an idea more shows why the script does without it. The same targets,
shuffled, show what the rule costs where the past tells nothing. The last table shows which targets
the gain comes from.
"""

import argparse
import itertools
import math
from pathlib import Path

import numpy as np

import train_gpt
from studies import predecessors
from train_gpt import (
    ByteCounter,
    DocumentCache,
    Hyperparameters,
    Mixture,
    OnlineChain,
    UserError,
    bits_per_byte,
)

# longest n-gram of the backoff rules: the predecessors'
FIXED_ORDER = 7
CHOSEN_ON = 0.6  # share of the strong stream on which the constants of the online rule were chosen


# --- the online rule without each of its parts ----------------------------------------------------


class NoCache(DocumentCache):
    """A cache without a token in it: the chain then begins with the model's p."""

    def extend(self, begin, end, model):
        return np.zeros((2, end - begin))

    def distribution(self, target, V):
        return np.zeros(V), 0.0


class CountingCache(DocumentCache):
    """Every token counts the same, as in Kuhn and de Mori's cache (1990)."""

    @staticmethod
    def surprise(nats):
        return np.ones_like(nats)


class SquaringCache(DocumentCache):
    """Each token counts by the square of the nats that it has cost, not by their cube."""

    @staticmethod
    def surprise(nats):
        return np.rint(nats * nats)


def with_cache(kind):
    """OnlineChain with another cache."""

    def __init__(self, tokens, hp):
        OnlineChain.__init__(self, tokens, hp)
        self.cache = kind(tokens)

    return type(kind.__name__, (OnlineChain,), {"__init__": __init__})


class NoDocument(OnlineChain):
    """For n >= 2 the counts of the stream alone, without those of the document."""

    @staticmethod
    def bucket(context_state, doc_context, entropy_bucket):
        return OnlineChain.bucket(context_state, doc_context * 0, entropy_bucket)

    @staticmethod
    def frequencies(ngram_count, context_count, doc_ngram_count, doc_context_count):
        return [ngram_count / context_count] * 2


class NoForgetting(OnlineChain):
    """What was learned from early blocks counts as much as what was learned from the last ones."""

    forgetting = 1.0


# --- the online rule with ideas that it does without ----------------------------------------------


class FadingCache(DocumentCache):
    """A token of the document counts half as much after each HALF_LIFE tokens."""

    HALF_LIFE = 50
    PIECE = 1000  # tokens summed at a time: weights within a piece differ by at most 2^20

    def __init__(self, tokens):
        super().__init__(tokens)
        self.cubes = self.cubes.astype(np.float64)

    def extend(self, begin, end, model):
        token = self.tokens[begin + 1 : end + 1]
        opens = self.tokens[begin:end] == train_gpt.BOS
        cubes = self.surprise(np.minimum(-np.log(model), train_gpt.LARGEST_SURPRISE))
        self.cubes[begin + 1 : end + 1] = cubes
        sums = np.empty((2, end - begin))
        edges = {0, end - begin, *np.flatnonzero(opens), *range(0, end - begin, self.PIECE)}
        for start, stop in itertools.pairwise(sorted(edges)):
            if opens[start]:
                self.open_sums[:] = 0
            piece = slice(start, stop)
            fade = 0.5 ** (np.arange(stop - start) / self.HALF_LIFE)
            risen = cubes[piece] / fade  # relative to the start of the piece
            perm, first, _ = train_gpt.sort_runs(token[piece])
            of_token = np.empty(stop - start)
            of_token[perm] = train_gpt.sum_before(risen[perm], first)
            of_token += self.open_sums[token[piece]]
            of_all = np.cumsum(risen) - risen + self.open_sums.sum()
            sums[:, piece] = of_token * fade, of_all * fade
            self.open_sums += np.bincount(token[piece], risen, len(self.open_sums))
            self.open_sums *= 0.5 ** ((stop - start) / self.HALF_LIFE)
        return sums

    def distribution(self, target, V):
        start = train_gpt.document_start(self.tokens, target)
        places = np.arange(start, target + 1)
        weights = self.cubes[places] * 0.5 ** ((target - places) / self.HALF_LIFE)
        sums = np.bincount(self.tokens[places], weights, V)
        return sums, sums.sum()


class TwoSpeeds(OnlineChain):
    """Beside the cache of the document another one that forgets."""

    def __init__(self, tokens, hp):
        super().__init__(tokens, hp)
        self.fading = FadingCache(tokens)
        self.credits[1] = np.zeros((3, train_gpt.BUCKETS[0]))

    def links_of_block(self, begin, end, model, entropy):
        first, *others = super().links_of_block(begin, end, model, entropy)
        sums, total = (x[first.rows] for x in self.fading.extend(begin, end, model))
        return [self.with_second(first, sums, total), *others]

    def links_of_target(self, target, V, entropy):
        for link in super().links_of_target(target, V, entropy):
            if link.n == 1:
                link = self.with_second(link, *self.fading.distribution(target, V))
            yield link

    @staticmethod
    def with_second(link, sums, total):
        """The link with the second cache's p, or once more the first one's where it is empty."""
        (slow,) = link.experts
        fast = np.where(total > 0, sums / np.where(total > 0, total, 1), slow)
        return link._replace(experts=[slow, fast])


def with_strength(strength, *lengths):
    """A variant of the online rule in which the prior counts as `strength` pseudo-observations.
    `lengths` are the n for which it does; without any, it does for all."""

    class WithStrength(OnlineChain):
        def learn(self, link, parts):
            before = self.credits[link.n] * self.forgetting
            super().learn(link, parts)
            if link.n in lengths or not lengths:  # what a target adds weighs more or less
                new = self.credits[link.n] - before
                self.credits[link.n] = before + new * (train_gpt.PRIOR_STRENGTH / strength)

    return WithStrength


def with_forgetting(factor, *lengths):
    """A variant of the online rule with another forgetting factor. `lengths` are the n that have
    it; without any, all have it."""

    class WithForgetting(OnlineChain):
        def learn(self, link, parts):
            if link.n in lengths or not lengths:
                self.forgetting = factor
            super().learn(link, parts)
            self.forgetting = OnlineChain.forgetting

    return WithForgetting


LEFT_OUT = {
    "without the cache": with_cache(NoCache),
    "cache of counts, not of surprise": with_cache(CountingCache),
    "cache of squares, not of cubes": with_cache(SquaringCache),
    "without counts of the document": NoDocument,
    "without forgetting": NoForgetting,
}
ADDED = {
    "a second cache, which fades": TwoSpeeds,
    "forgetting factor 0.94": with_forgetting(0.94),
    "forgetting factor 0.9 for n = 2, 6 and 7": with_forgetting(0.9, 2, 6, 7),
    "prior of 30": with_strength(30),
    "prior of 120": with_strength(120),
    "prior of 20 for n >= 4": with_strength(20, 4, 5, 6, 7),
}


# --- reading --------------------------------------------------------------------------------------


def settings(**values) -> Hyperparameters:
    """The settings `values`, checked as a run's. UserError: they cannot work."""
    return Hyperparameters.from_env({name.upper(): str(value) for name, value in values.items()})


def read_scores(path: Path) -> dict[str, np.ndarray]:
    """nll and entropy, in nats per target, and tokens and bytes if the file has them. UserError: no
    such file, no npz, or arrays that are missing or of different lengths."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a run with SAVE_SCORES=1 writes logs/<RUN_ID>_scores.npz"
        )
    try:
        with np.load(path, allow_pickle=False) as scores:
            missing = [name for name in ("nll", "entropy") if name not in scores]
            if missing:
                raise UserError(
                    f"{path}: no array {' and no '.join(missing)}; it holds "
                    f"{', '.join(scores) or 'nothing'}"
                )
            found = {
                name: scores[name]
                for name in ("nll", "entropy", "tokens", "bytes")
                if name in scores
            }
    except UserError:
        raise
    except Exception:  # damage raises many types: of NumPy, zipfile, zlib, struct ...
        raise UserError(f"{path}: not an npz file of plain arrays") from None
    targets = found["nll"].size
    for name, array in found.items():
        kind, length = ("f", targets) if name in ("nll", "entropy") else ("u", targets)
        length += name == "tokens"
        if array.shape != (length,) or array.dtype.kind != kind or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, expected {length} finite "
                + ("floats, one per target" if kind == "f" else "unsigned integers")
            )
    if targets < 20:
        raise UserError(f"{path}: {targets} targets, expected at least 20")
    return found


def read_stream(path: Path, targets: int, hp: Hyperparameters) -> np.ndarray:
    """The first `targets` + 1 tokens of the shard. UserError: no such file, no shard, too short, or
    tokens outside the vocabulary."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the shard whose targets were scored")
    tokens = train_gpt.load_shard(path)
    if len(tokens) <= targets:
        raise UserError(
            f"{path}: {len(tokens)} tokens are {len(tokens) - 1} targets, "
            f"but the scores are of {targets}"
        )
    tokens = np.array(tokens[: targets + 1])
    train_gpt.check_tokens(tokens, hp.vocab_size, str(path))
    return tokens


def mixed(tokens, nll: np.ndarray, entropy: np.ndarray, hp: Hyperparameters, rule=None) -> Mixture:
    """The Mixture of all targets. `rule`: a class that is not in RULES."""
    mixture = Mixture(tokens, hp, rule and rule(tokens, hp))
    mixture.extend(nll, entropy)
    return mixture


def mass_facts(counts: predecessors.HashedCounts) -> str:
    """What hashed counts sum to over the vocabulary: at the end, and along the way."""
    matched = np.flatnonzero(counts.n)
    spread = matched[np.linspace(0, len(matched) - 1, min(64, len(matched))).astype(int)]
    end, mean = counts.mass(matched[-64:]), counts.mass(spread)
    return f"not a probability: its counts sum to {end:.1f} at the end, {mean:.1f} on average"


class Table:
    """The rows, each printed at once, and the audits, printed after all of them."""

    def __init__(self, nll: np.ndarray, stream_bytes: np.ndarray, unit: str):
        self.nll = nll
        self.stream_bytes = stream_bytes
        self.facts = []
        N = len(nll)
        chosen = round(CHOSEN_ON * N)
        edges = ((0, N), (0, N // 3), (N // 3, 2 * N // 3), (2 * N // 3, N))
        self.parts = [slice(*edge) for edge in (*edges, (0, chosen), (chosen, N))]
        heads = ("gain", "1st third", "2nd", "3rd", "first 60 %", "last 40 %")
        print(f"{unit:42} {'whole':>9} " + " ".join(f"{head:>10}" for head in heads))

    def row(self, label: str, scored: np.ndarray, fact: str = "", pseudo: str = "") -> None:
        """`pseudo`: why the row is no code and shows no gain; empty if it is one."""
        gains = []
        for part in self.parts:
            alone, mixed_bpb = (
                bits_per_byte(nats[part], self.stream_bytes[part]) for nats in (self.nll, scored)
            )
            gains.append("-" if pseudo else f"{alone - mixed_bpb:+.5f}")
        whole = bits_per_byte(scored, self.stream_bytes)
        cells = " ".join(f"{gain:>10}" for gain in gains)
        print(f"{label:42} {whole:9.5f} {cells}  {pseudo}".rstrip(), flush=True)
        if fact:
            self.facts.append(f"{label:42} {fact}")


def study(tokens, nll, entropy, stream_bytes, unit: str, args) -> None:
    """Print the table, the audits, and the deciles of the online rule with the longest n-grams."""
    table = Table(nll, stream_bytes, unit)
    table.row("neural model alone", nll)
    fixed = dict(vocab_size=args.vocab_size, ngram_order=FIXED_ORDER)
    for label, alpha in (("α by entropy", "entropy"), ("α by order", "order")):
        mixture = mixed(tokens, nll, entropy, settings(ngram_alpha=alpha, **fixed))
        table.row(f"{label}, orders 2-{FIXED_ORDER}", mixture.nll, mixture.audit())
    orders = sorted(set(args.orders))
    for order in orders:
        hp = settings(ngram_alpha="online", vocab_size=args.vocab_size, ngram_order=order)
        mixture = mixed(tokens, nll, entropy, hp)
        table.row(f"online, orders 2-{order}", mixture.nll, mixture.audit())
    best = mixture.nll
    hp = settings(ngram_alpha="online", vocab_size=args.vocab_size, ngram_order=orders[0])
    for label, rule in (LEFT_OUT | ADDED).items():
        mixture = mixed(tokens, nll, entropy, hp, rule)
        table.row(f"  2-{orders[0]} {label}", mixture.nll, mixture.audit())
    counts = predecessors.HashedCounts(tokens, predecessors.RULES["889"], args.vocab_size)
    table.row(
        f"pseudo: hashed, α by entropy, orders 2-{predecessors.LONGEST}",
        predecessors.mix(counts, nll, entropy, hp.alpha_min, hp.alpha_max),
        pseudo=mass_facts(counts),
    )

    places = np.random.default_rng(0).permutation(len(nll))
    shuffled = np.append(tokens[:1], tokens[1:][places])
    mixture = mixed(shuffled, nll[places], entropy[places], hp)
    gain = bits_per_byte(nll, stream_bytes) - bits_per_byte(mixture.nll, stream_bytes[places])
    print(f"{f'online, orders 2-{orders[0]}, targets shuffled':42} {'':9} {gain:+10.5f}")
    print("\naudit", *table.facts, sep="\n")
    deciles(nll, best, stream_bytes, unit, f"online, orders 2-{orders[-1]}")


def deciles(
    nll: np.ndarray, scored: np.ndarray, stream_bytes: np.ndarray, unit: str, label: str
) -> None:
    """Print what each tenth of the targets adds to the gain. They are sorted by the model's nll."""
    print(
        f"\ngain of {label} by decile of the model's own nll (nats);\n"
        f"score and gain: the decile's share of the whole, in {unit.split(' (')[0]}"
    )
    print(f"{'decile':>6} {'nll from':>9} {'to':>9} {'score':>9} {'gain':>9} {'gain/score':>10}")
    gain, scale = nll.astype(np.float64) - scored, math.log(2) * stream_bytes.sum(dtype=np.int64)
    tenths = np.array_split(np.argsort(nll, kind="stable"), 10)
    for name, rows in [*enumerate(tenths, 1), ("all", np.concatenate(tenths))]:
        own, won = nll[rows].sum(dtype=np.float64), gain[rows].sum()
        share = f"{won / own:+10.1%}" if own > 0 else f"{'-':>10}"
        print(
            f"{name:>6} {nll[rows[0]]:9.4f} {nll[rows[-1]]:9.4f} {own / scale:9.5f} "
            f"{won / scale:+9.5f} {share}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.mixture", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "scores", type=Path, metavar="SCORES.npz", help="nll and entropy per target, in nats"
    )
    parser.add_argument(
        "shard",
        type=Path,
        metavar="SHARD",
        nargs="?",
        help="the token shard that begins with those targets; not needed if SCORES.npz has tokens",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="SentencePiece model, to count bytes; without it the scores are in bits per token",
    )
    parser.add_argument("--vocab-size", type=int, default=Hyperparameters().vocab_size)
    parser.add_argument(
        "--orders",
        type=int,
        nargs="+",
        default=[7, 12, 16],
        help="longest n-grams of the online rows",
    )
    args = parser.parse_args()
    try:
        for order in args.orders:
            settings(ngram_order=order)
        scores = read_scores(args.scores)
        nll, entropy = scores["nll"], scores["entropy"]
        if "tokens" in scores:
            tokens, where = scores["tokens"].astype(np.uint16), "its own tokens"
            args.vocab_size = max(args.vocab_size, int(tokens.max()) + 1)
        elif args.shard:
            hp = settings(vocab_size=args.vocab_size)
            tokens, where = read_stream(args.shard, len(nll), hp), str(args.shard)
        else:
            raise UserError(f"{args.scores}: holds no tokens: name the SHARD that was scored")
        unit, stream_bytes = "bits per byte", scores.get("bytes")
        if args.tokenizer:
            hp = settings(vocab_size=args.vocab_size, tokenizer_path=args.tokenizer)
            stream_bytes = ByteCounter(hp)(tokens)
        elif stream_bytes is None:
            unit, stream_bytes = "bits per token (bytes unknown)", np.ones(len(nll), np.uint8)
        total = stream_bytes.sum(dtype=np.int64)
        said = f", {total:,} bytes" if unit == "bits per byte" else ""
        print(f"{args.scores.name} on {where}: {len(nll):,} targets{said}")
        study(tokens, nll, entropy, stream_bytes, unit, args)
    except UserError as error:
        raise SystemExit(f"mixture.py: error: {error}") from None


if __name__ == "__main__":
    main()
