#!/usr/bin/env python3
"""The score of one stream under every n-gram weight scheme, from saved scores of a model: no GPU,
no model.

    python bench/mix_study.py SCORES.npz SHARD [--tokenizer MODEL] [--vocab-size 1024]
        [--orders 7 12 16]

SCORES.npz holds `nll` and `entropy` (nats per target, float32), as a run with SAVE_SCORES=1 writes
them, of the first targets of the stream in SHARD. Printed per scheme: bits per byte (bits per token
without a tokenizer) of all targets and of the second half alone, when the counts know more; the
gain over the neural model; the mixture's own audit. The gain is what this model leaves to the
counts: a stronger one leaves less. Last, where the gain comes from.
"""

import argparse
import math
import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402
from train_gpt import (  # noqa: E402
    ByteCounter,
    EntropyBackoff,
    HashedCounts,
    Hyperparameters,
    Mixture,
    UserError,
    bits_per_byte,
)

# longest gram of the schemes with fixed weights, and of the hashed row: the predecessors'
FIXED_ORDER = 7


def settings(**values) -> Hyperparameters:
    """Checked as a run's settings are: UserError names what cannot work."""
    return Hyperparameters.from_env({name.upper(): str(value) for name, value in values.items()})


def read_scores(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """nll and entropy, nats per target; UserError: no such file, not an npz,
    arrays missing or not alike."""
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
            nll, entropy = scores["nll"], scores["entropy"]
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile):
        raise UserError(f"{path}: not an npz file of plain arrays") from None
    for name, array in (("nll", nll), ("entropy", entropy)):
        if array.ndim != 1 or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, "
                "expected one finite float per target"
            )
    if len(nll) != len(entropy) or len(nll) < 20:
        raise UserError(
            f"{path}: {len(nll)} nll and {len(entropy)} entropy: expected as many of each, "
            "at least 20"
        )
    return nll, entropy


def read_stream(path: Path, targets: int, hp: Hyperparameters) -> np.ndarray:
    """The first targets + 1 tokens of the shard; UserError: no such file, not a shard, too short,
    another V."""
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


def mixed(tokens: np.ndarray, nll: np.ndarray, entropy: np.ndarray, hp: Hyperparameters) -> Mixture:
    """The mixture of those settings, all targets scored."""
    mixture = Mixture(tokens, hp)
    mixture.extend(nll, entropy)
    return mixture


def pseudo_mixed(
    tokens: np.ndarray, nll: np.ndarray, entropy: np.ndarray, hp: Hyperparameters
) -> Mixture:
    """The same from hashed counts, α by entropy."""
    mixture = Mixture(tokens, hp, EntropyBackoff(tokens, hp, HashedCounts(tokens, hp)))
    mixture.samples = mixture.samples[:0]  # it is no code: there is nothing to audit
    mixture.extend(nll, entropy)
    return mixture


def hashed_facts(counts: HashedCounts) -> str:
    """What the hashed quotients of the winning orders sum to over the vocabulary: at the end,
    and along the way."""
    matched = np.flatnonzero(counts.order)
    spread = matched[np.linspace(0, len(matched) - 1, min(64, len(matched))).astype(int)]
    end, mean = counts.mass(matched[-64:]), counts.mass(spread)
    return f"not a probability: its counts sum to {end:.1f} at the end, {mean:.1f} on average"


def study(tokens, nll, entropy, stream_bytes, unit: str, args) -> None:
    """Print the table, the audits, and the deciles of the online scheme with the longest grams."""
    halves = slice(None), slice(len(nll) // 2, None)
    neural, facts = [bits_per_byte(nll[half], stream_bytes[half]) for half in halves], []
    print(f"{unit:42} {'whole':>9} {'gain':>9} {'2nd half':>9} {'gain':>9}")

    def row(label: str, scored: np.ndarray, fact: str = "", pseudo: str = "") -> None:
        (whole, more), (second, later) = (
            (score, "-" if pseudo else f"{alone - score:+.5f}")
            for score, alone in zip(
                (bits_per_byte(scored[half], stream_bytes[half]) for half in halves), neural
            )
        )
        print(
            f"{label:42} {whole:9.5f} {more:>9} {second:9.5f} {later:>9}  {pseudo}".rstrip(),
            flush=True,
        )
        facts.extend([f"{label:42} {fact}"] if fact else [])

    row("neural model alone", nll)
    fixed = dict(vocab_size=args.vocab_size, ngram_order=FIXED_ORDER)
    for label, alpha in (("α by entropy", "entropy"), ("α by order", "order")):
        mixture = mixed(tokens, nll, entropy, settings(ngram_alpha=alpha, **fixed))
        row(f"{label}, orders 2-{FIXED_ORDER}", mixture.nll, mixture.audit())
    for order in sorted(set(args.orders)):
        mixture = mixed(
            tokens,
            nll,
            entropy,
            settings(ngram_alpha="online", vocab_size=args.vocab_size, ngram_order=order),
        )
        row(f"online, orders 2-{order}", mixture.nll, mixture.audit())
    best = mixture.nll
    mixture = pseudo_mixed(
        tokens, nll, entropy, settings(ngram_alpha="entropy", ngram_counts="hashed", **fixed)
    )
    row(
        f"pseudo: hashed, α by entropy, orders 2-{FIXED_ORDER}",
        mixture.nll,
        pseudo=hashed_facts(mixture.rule.counts),
    )
    print("\naudit (the hashed counts would fail it)", *facts, sep="\n")
    deciles(nll, best, stream_bytes, unit, f"online, orders 2-{max(args.orders)}")


def deciles(
    nll: np.ndarray, scored: np.ndarray, stream_bytes: np.ndarray, unit: str, label: str
) -> None:
    """What each tenth of the targets, from the model's surest to its most surprised,
    adds to the gain."""
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "scores", type=Path, metavar="SCORES.npz", help="nll and entropy per target, in nats"
    )
    parser.add_argument(
        "shard", type=Path, metavar="SHARD", help="the token shard that begins with those targets"
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
        help="longest grams of the online rows",
    )
    args = parser.parse_args()
    try:
        for order in args.orders:
            settings(ngram_order=order)
        hp = settings(
            vocab_size=args.vocab_size,
            **dict(tokenizer_path=args.tokenizer) if args.tokenizer else {},
        )
        nll, entropy = read_scores(args.scores)
        tokens = read_stream(args.shard, len(nll), hp)
        stream_bytes = ByteCounter(hp)(tokens) if args.tokenizer else np.ones(len(nll), np.uint16)
        unit = "bits per byte" if args.tokenizer else "bits per token (no tokenizer was given)"
        print(
            f"{args.scores.name} on {args.shard}: {len(nll):,} targets"
            + (f", {stream_bytes.sum(dtype=np.int64):,} bytes" if args.tokenizer else "")
        )
        study(tokens, nll, entropy, stream_bytes, unit, args)
    except UserError as error:
        raise SystemExit(f"mix_study: {error}") from None


if __name__ == "__main__":
    main()
