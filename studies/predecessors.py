"""What a predecessor's rule would have reported for a run, replayed on the run's saved scores.

    python -m studies.predecessors logs/<RUN_ID>_scores.npz --rule 889 [--data-path DIR]
        [--tokenizer-path MODEL]

PR #889, #825 and #806 mix a model with n-gram counts kept in hash tables. A context of w = n - 1
tokens has the hash h = xor_k x[t-w+k] * P[k]. It is counted in bucket h & (B - 1) of one table, and
together with the token that follows it in bucket (h ^ x[t] * P[w]) & (B - 1) of another. The pull
requests use the quotient of the two counts as a probability. It is none: contexts share buckets, so
a token that never followed a context gets counts of others. Over the vocabulary the quotients sum
not to 1 but to more, which is called their mass here. What the mass takes off the bpb is not saved
by any decoder. So the result is named `pseudo_bpb`, and the measured mass stands beside it.

The scores are those that a run with SAVE_SCORES=1 writes; they hold the run's settings. Settings
used here: DATA_PATH, TOKENIZER_PATH, VOCAB_SIZE, NGRAM_MIN_ORDER, NGRAM_ORDER (grams of more than 7
tokens are left out, as the rules have no primes for them), NGRAM_MIN_COUNT, ALPHA_MIN, ALPHA_MAX.
Unlike in PR #889, one cache counts the whole stream, whatever the number of GPUs.

Prints the result and writes it as JSON to logs/<RUN_ID>_predecessors.json. Memory: 0.5 GB and 30
bytes per target (measured at 4 and 12 million targets, on one core at 0.4 million targets per
second). For the 62 million targets of FineWeb's stream that makes 2.4 GB and 2.5 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train_gpt import (
    Hyperparameters,
    UserError,
    bits_per_byte,
    load_validation,
    say,
    sort_runs,
)

BUCKETS = 4_194_304  # B, of each table; there are two tables for each n
LONGEST = 7  # tokens of the longest gram: a rule has one prime for each of them
CHUNK = 1 << 20  # targets counted at a time
MASS_TARGETS = 32  # the mass is the mean over so many targets, the last ones with a known context


# --- The rules ------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What differs between the pull requests."""

    primes: tuple[int, ...]  # P
    centers: np.ndarray  # nats, by n; index 0: where no context is known
    is_uniform: bool  # where no context is known: mixes in 1/V; if not, the model stays alone

    def weight(self, entropy: np.ndarray, n: np.ndarray, low: float, high: float) -> np.ndarray:
        """The weight of the counts at targets whose longest known context has n - 1 tokens (0: none
        is known): rises from `low` to `high` with the model's entropy (nats)."""
        rising = 1 / (1 + np.exp(-2 * (entropy.astype(np.float64) - self.centers[n])))
        alpha = low + (high - low) * rising
        return alpha if self.is_uniform else np.where(n > 0, alpha, 0.0)


PRIMES_889 = 36313, 27191, 51647, 81929, 131071, 175447, 209591
PRIMES = *PRIMES_889[:5], 174763, 233017
ONE_CENTER = np.full(LONGEST + 1, 4.0)
CENTERS_825 = np.array((4.0, 4.0, 4.5, 4.2, 3.8, 3.5, 3.2, 3.0))

RULES = {
    "889": Rule(PRIMES_889, ONE_CENTER, False),
    "825": Rule(PRIMES, CENTERS_825, True),
    "806": Rule(PRIMES, ONE_CENTER, False),
}


# --- Hashed counts --------------------------------------------------------------------------------


def hash_contexts(tokens: np.ndarray, width: int, primes: tuple[int, ...]) -> np.ndarray:
    """The hash (uint64) of each `width` neighbouring tokens, in the order of the stream."""
    hashes = np.zeros(max(len(tokens) - width + 1, 0), np.uint64)
    for k in range(width):
        hashes ^= tokens[k : k + len(hashes)].astype(np.uint64) * np.uint64(primes[k])
    return hashes


def bucket_pairs(
    hashes: np.ndarray, following: np.ndarray, prime: int, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """(bucket of the context, bucket of the context with the token that follows), int64."""
    mask = np.uint64(buckets - 1)
    pairs = (hashes ^ following.astype(np.uint64) * np.uint64(prime)) & mask
    return (hashes & mask).view(np.int64), pairs.view(np.int64)


def fill(filled: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """Counts each of `bucket` in the table `filled`, one after the other. Returns for each how
    often its bucket had been counted before."""
    perm, first, prior = sort_runs(bucket)
    before = filled[bucket] + prior
    starts = np.flatnonzero(first)
    filled[bucket[perm[starts]]] += np.diff(starts, append=len(first)).astype(filled.dtype)
    return before


class HashedCounts:
    """The hashed counts at every target, from the tokens before it.

    Of the grams whose context's bucket was filled at least `min_count` times, the longest wins.
    Arrays with one entry per target: `n`, its length in tokens (uint8; 0: none wins), and the
    counts of its two buckets, `context` and `pair` (uint32; `pair` is cut down to `context`). Where
    no gram wins, pair / context is 1/V for a rule that mixes this in, and 0/1 for the others.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        rule: Rule,
        vocab_size: int,
        lengths: range = range(2, LONGEST + 1),
        buckets: int = BUCKETS,
        min_count: int = 2,
    ):
        """`lengths`: of the grams, at most 7. `buckets`: a power of two."""
        self.tokens = tokens
        self.rule = rule
        self.vocab_size = vocab_size
        self.buckets = buckets
        targets = len(tokens) - 1
        self.n = np.zeros(targets, np.uint8)
        self.context = np.full(targets, vocab_size if rule.is_uniform else 1, np.uint32)
        self.pair = np.full(targets, int(rule.is_uniform), np.uint32)
        self.filled = {}  # n -> the table of pairs, once the whole stream is counted
        for n in lengths:
            contexts = np.zeros(buckets, np.uint32)
            self.filled[n] = np.zeros(buckets, np.uint32)
            for block, context_bucket, pair_bucket in self.blocks(n, n - 2):
                context = fill(contexts, context_bucket)
                pair = np.minimum(fill(self.filled[n], pair_bucket), context)
                wins = context >= min_count
                self.n[block][wins] = n
                self.context[block][wins] = context[wins]
                self.pair[block][wins] = pair[wins]

    def blocks(self, n: int, first: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields (targets, their context buckets, their pair buckets) of the targets from `first`
        on, a chunk at a time. The first target with n - 1 tokens before it is n - 2."""
        width, targets = n - 1, len(self.tokens) - 1
        for begin in range(first, targets, CHUNK):
            end = min(begin + CHUNK, targets)
            context = self.tokens[begin + 1 - width : end]
            hashes = hash_contexts(context, width, self.rule.primes)
            following = self.tokens[begin + 1 : end + 1]
            prime = self.rule.primes[width]
            yield slice(begin, end), *bucket_pairs(hashes, following, prime, self.buckets)

    def continuations(self, target: int) -> tuple[np.ndarray, int]:
        """(the pair count of every token of the vocabulary, the context count) at a target: what
        `pair` would be for each token, and `context`."""
        n, context = int(self.n[target]), int(self.context[target])
        if n == 0:
            return np.full(self.vocab_size, self.pair[target]), context
        width = n - 1
        before = self.tokens[target + 1 - width : target + 1]
        hashes = hash_contexts(before, width, self.rule.primes)
        every_token = np.arange(self.vocab_size)
        prime = self.rule.primes[width]
        _, asked = bucket_pairs(hashes, every_token, prime, self.buckets)
        pairs = self.filled[n][asked].astype(np.int64)
        for _, _, later in self.blocks(n, target):  # not counted yet at this target
            pairs -= np.bincount(later, minlength=self.buckets)[asked]
        return np.minimum(pairs, context), context

    def mass(self, targets: np.ndarray) -> float:
        """What the quotients sum to over the vocabulary, the mean at `targets`."""
        counted = [self.continuations(int(target)) for target in targets]
        return float(np.mean([pairs.sum() / context for pairs, context in counted]))


def mix(
    counts: HashedCounts, nll: np.ndarray, entropy: np.ndarray, low: float, high: float
) -> np.ndarray:
    """Nats per target (float64) of (1 - a) * model + a * pair / context, where a is the rule's
    weight between `low` and `high`. `nll` and `entropy`: the model's, nats per target. The result
    is no code length, as the mixture sums to more than 1."""
    mixed = np.empty(len(nll))
    for begin in range(0, len(nll), CHUNK):
        block = slice(begin, begin + CHUNK)
        model = np.exp(-np.minimum(nll[block].astype(np.float64), 690))
        alpha = counts.rule.weight(entropy[block], counts.n[block], low, high)
        p = (1 - alpha) * model + alpha * counts.pair[block] / counts.context[block]
        mixed[block] = -np.log(p)
    return mixed


# --- One run --------------------------------------------------------------------------------------


def read_scores(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """(nll, entropy, settings) of a run: nats per target, float32, and NAME -> text. UserError: no
    such file, or not what SAVE_SCORES=1 writes."""
    expected = "expected logs/<RUN_ID>_scores.npz, as a run with SAVE_SCORES=1 writes it"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("nll", "entropy", "settings") if name in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {expected}") from None
    except Exception:  # damage raises many types: of NumPy, zipfile, zlib, struct ...
        raise UserError(f"{path}: not an npz file of plain arrays; {expected}") from None
    for name in ("nll", "entropy", "settings"):
        if name not in found:
            raise UserError(f"{path}: holds no {name}; {expected}")
    nll, entropy = found["nll"], found["entropy"]
    for name, array in dict(nll=nll, entropy=entropy).items():
        if array.ndim != 1 or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is {array.dtype} of shape {array.shape}, expected finite floats, "
                "one per target"
            )
    if len(nll) != len(entropy):
        raise UserError(f"{path}: holds {len(nll)} nll and {len(entropy)} entropies; {expected}")
    try:
        return nll, entropy, dict(json.loads(str(found["settings"])))
    except (ValueError, TypeError):
        raise UserError(f"{path}: its settings are no JSON object; {expected}") from None


def run_name(scores: Path) -> str:
    """RUN_ID of logs/<RUN_ID>_scores.npz, or of another file its name without the ending."""
    return scores.stem.removesuffix("_scores")


def check_log(scores: Path, neural_bpb: float) -> None:
    """UserError: the log beside the scores is that of another run, or of one that did not end."""
    log = scores.with_name(f"{run_name(scores)}.txt")
    if not log.exists():
        return
    results = re.findall(r"^result (\{.*\})$", log.read_text(encoding="utf-8"), re.M)
    if not results:
        raise UserError(f"{log}: has no result line: the run did not end, so {scores} is not its")
    said = json.loads(results[-1]).get("neural_bits_per_byte")
    if said is None or abs(said - neural_bpb) > 1e-8:
        raise UserError(
            f"{log}: says neural_bits_per_byte {said}, but {scores} gives {neural_bpb:.8f}: "
            "scores of another run, or other data than it scored"
        )


def replay(path: Path, name: str, moved: dict[str, str], buckets: int = BUCKETS) -> dict:
    """What PR #`name` would have reported for the scores in `path`, as it is written to the JSON.
    `moved`: settings that replace those of the run, as its files may lie elsewhere now. UserError:
    scores and data do not fit together."""
    nll, entropy, settings = read_scores(path)
    hp = Hyperparameters.from_env(settings | moved)
    validation = load_validation(hp)
    tokens, targets = validation.tokens, len(validation.tokens) - 1
    if len(nll) != targets:
        raise UserError(
            f"{path}: holds scores of {len(nll)} targets, but the validation stream in "
            f"{hp.data_path} has {targets}: name the data of that run by --data-path"
        )
    lengths = range(hp.ngram_min_order, min(hp.ngram_order, LONGEST) + 1)
    if not lengths:
        found = f"NGRAM_MIN_ORDER={hp.ngram_min_order}"
        raise UserError(f"{path}: {found}, but the pull requests' grams have at most {LONGEST}")
    neural_bpb = bits_per_byte(nll, validation.target_bytes)
    check_log(path, neural_bpb)

    say(f"{path}: counting by hashes as PR #{name} does, {targets:,} targets", sys.stdout)
    rule = RULES[name]
    counts = HashedCounts(tokens, rule, hp.vocab_size, lengths, buckets, hp.ngram_min_count)
    matched = np.flatnonzero(counts.n)
    if not len(matched):
        raise UserError(
            f"{path}: no context of the stream came NGRAM_MIN_COUNT={hp.ngram_min_count} times "
            "before: there are no counts to mix in"
        )
    mass, num_matched = counts.mass(matched[-MASS_TARGETS:]), len(matched)
    del matched  # 62M targets: 0.5 GB
    mixed = mix(counts, nll, entropy, hp.alpha_min, hp.alpha_max)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "pull_request": int(name),
        "pseudo_bpb": bits_per_byte(mixed, validation.target_bytes),
        "mass": mass,
        "mass_targets": min(MASS_TARGETS, num_matched),
        "neural_bpb": neural_bpb,
        "targets": targets,
        "targets_with_known_context": num_matched,
        "orders": f"{lengths[0]}-{lengths[-1]}",
        "min_count": hp.ngram_min_count,
        "alpha_min": hp.alpha_min,
        "alpha_max": hp.alpha_max,
        "buckets": buckets,
        "scores": path.name,
        "scores_sha256": checksum,
    }


def write_json(path: Path, found: dict) -> None:
    """Write aside, then rename, so that the file is never half-written. UserError: cannot."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was written") from None
    finally:
        with suppress(OSError):  # what made writing fail may make this fail too
            aside.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.predecessors", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "scores", type=Path, metavar="SCORES.npz", help="logs/<RUN_ID>_scores.npz of SAVE_SCORES=1"
    )
    parser.add_argument("--rule", choices=RULES, required=True, help="number of the pull request")
    parser.add_argument("--data-path", help="folder of the validation shards (default: the run's)")
    parser.add_argument("--tokenizer-path", help="its SentencePiece model (default: the run's)")
    args = parser.parse_args(argv)
    try:
        asked = dict(DATA_PATH=args.data_path, TOKENIZER_PATH=args.tokenizer_path)
        moved = {name: path for name, path in asked.items() if path}
        found = replay(args.scores, args.rule, moved)
        path = args.scores.with_name(f"{run_name(args.scores)}_predecessors.json")
        write_json(path, found)
    except UserError as error:
        raise SystemExit(f"predecessors.py: error: {error}") from None
    say(
        f"predecessors pull_request:{args.rule} pseudo_bpb:{found['pseudo_bpb']:.8f} "
        f"mass:{found['mass']:.2f} targets:{found['targets']} orders:{found['orders']} "
        f"buckets:{found['buckets']} (no score: a probability sums to 1, this to the mass)\n{path}",
        sys.stdout,
    )


if __name__ == "__main__":
    main()
