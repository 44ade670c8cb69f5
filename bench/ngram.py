"""Speed and memory of the n-gram stage, compared with a dictionary cache and the predecessors' hash
cache, in one run.

    python -m bench.ngram [--tokens 1000000 8000000] [--full] [--repeat 3] [--threads 1 2]
        [--arrive 100] [SHARD ...]

Rows: exact counts + backoff (what NGRAM_ALPHA=entropy needs), the online mixture's counting and
mixing, a plain dictionary that scores one token and then adds it, and chunked `np.add.at` into hash
tables. Every measurement is a fresh process on one core (OMP_NUM_THREADS=1), so that no row holds
another's memory. It times the call alone, without imports and reading the stream, in seconds of CPU
time, which on a busy machine says more than the clock (each row has one thread). Memory is the
process's high-water mark (ru_maxrss). Nothing here fails because it is slow: read the ratios.

Counting with several threads (NGRAM_THREADS) is compared by the clock, in turn and in one process,
on the largest size. With --arrive S it also does what rank 0 of a run does: count, and mix scores
while they come in segments as from 8 GPUs that take S seconds for the stream, or less in proportion
to its length. It says how much later than the last score the last target is mixed.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tools.streams import FULL, resample

# train_gpt, and torch with it, is imported only where it is measured: a process's high-water mark
# starts at that of its parent, so the parent stays small.

LOW, HIGH, MIN_COUNT = 2, 7, 2  # shortest and longest n-gram; NGRAM_MIN_COUNT
ONCE = 10_000_000  # more tokens than this are measured only once
DICTIONARY_TOKENS, HASH_TOKENS = 300_000, 2_000_000  # most tokens of the two slow rows
BUCKETS, CHUNK = 4_194_304, 65_536  # the predecessors' table and chunk
PRIMES = np.array((36313, 27191, 51647, 81929, 131071, 175447, 209591), np.uint64)


# --- the two streams ------------------------------------------------------------------------------


def make_stream(path: str, length: int, shards: list[str]) -> dict:
    """Write up to `length` tokens (uint16) to the file `path`. Returns how many, and what they are
    in words."""
    import train_gpt

    if shards:
        names, parts = [], []
        for shard in shards:
            if not Path(shard).is_file():
                raise train_gpt.UserError(f"{shard}: no such file")
            if length > sum(map(len, parts)):
                names = [*names, Path(shard).name]
                parts = [*parts, train_gpt.load_shard(Path(shard))]
        tokens = np.concatenate(parts)[:length]
        words = f"the first {len(tokens):,} tokens of {' + '.join(names)}, as they are"
    else:
        from tools import common

        common.make_demo_corpus()
        demo = Path(common.demo_settings().data_path, "fineweb_train_000000.bin")
        corpus = train_gpt.load_shard(demo)
        tokens = resample(corpus, length)
        words = (
            f"SYNTHETIC, {length:,} tokens: random spans of 32-1024 tokens of the built-in demo "
            f"corpus ({len(corpus):,} tokens), 10 % of the tokens replaced by unigram draws, seed 0"
        )
    tokens.tofile(path)
    return dict(tokens=len(tokens), words=words)


# --- the rows: each returns [(label, seconds, high-water mark in bytes after it), ...] ------------


def high_water() -> int:
    """The most memory that this process has held so far, in bytes (Linux counts KiB, macOS
    bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def timed(label: str, call, *args) -> tuple[tuple, object]:
    """(label, seconds, bytes) of one call, and what it returned."""
    start = time.process_time()
    result = call(*args)
    return (label, time.process_time() - start, high_water()), result


def exact_settings():
    """Settings for exact counts with backoff."""
    import train_gpt

    return train_gpt.Hyperparameters(
        ngram_alpha="entropy",
        ngram_min_order=LOW,
        ngram_order=HIGH,
        ngram_min_count=MIN_COUNT,
        ngram_threads=1,
    )


def exact_row(tokens: np.ndarray) -> list[tuple]:
    """Exact counts of n-grams of all lengths, and the longest one whose context came often enough,
    per target."""
    import train_gpt

    name = f"exact counts + backoff, orders {LOW}-{HIGH}"
    row, _ = timed(name, train_gpt.Backoff, tokens, exact_settings())
    return [row]


def online_row(tokens: np.ndarray, highest: int) -> list[tuple]:
    """The online mixture: counts and states of contexts, then mixing, block by block, with invented
    scores."""
    import train_gpt

    changes = dict(ngram_order=highest) if highest else {}
    hp = train_gpt.Hyperparameters(ngram_alpha="online", ngram_threads=1, **changes)
    rng = np.random.default_rng(0)
    name = f"online mixture, orders {hp.ngram_min_order}-{hp.ngram_order}"
    counting, mixture = timed(f"{name}: counting", train_gpt.Mixture, tokens, hp)
    nll = rng.standard_exponential(len(tokens) - 1, np.float32)
    nll *= 2  # in place: a run holds no copy of its scores either
    entropy = rng.random(len(tokens) - 1, np.float32)
    entropy *= 6
    mixing, _ = timed(f"{name}: mixing", mixture.extend, nll, entropy)
    return [counting, mixing]


def threads_row(tokens: np.ndarray, repeat: int, *threads: int) -> list[list]:
    """For each number of threads, the seconds by the clock that counting took, in each round; and
    whether its counts are those of the first."""
    import train_gpt

    found = {number: [] for number in threads}
    sums = {}
    for _ in range(repeat):
        for number in threads:
            began = time.perf_counter()
            checksum = 0
            for counts in train_gpt.ngram_counts(
                tokens, HIGH, map_chunks=train_gpt.map_in_threads(number)
            ):
                checksum += sum(int(array.sum(dtype=np.uint64)) for array in counts)
            found[number].append(time.perf_counter() - began)
            sums[number] = checksum
    return [[number, found[number], sums[number] == sums[threads[0]]] for number in threads]


def arrive_row(tokens: np.ndarray, seconds: float, threads: int) -> list[float]:
    """(when counting ended, when the last score came, when the last target was mixed), in seconds
    from the start, if `seconds` pass until all scores are there; and the high-water mark in bytes.
    Segments are as large as those of 8 GPUs with the default settings."""
    import train_gpt

    hp, rng = train_gpt.Hyperparameters(ngram_threads=threads), np.random.default_rng(0)
    scores_2N = np.empty((2, len(tokens) - 1), np.float32)
    rng.standard_exponential(out=scores_2N[0], dtype=np.float32)
    scores_2N[0] *= 2
    rng.random(out=scores_2N[1], dtype=np.float32)
    scores_2N[1] *= 6
    windows = hp.val_batch_size // hp.eval_seq_len * train_gpt.SEGMENT_BATCHES
    size = windows * hp.eval_stride
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as worker:  # as in train_gpt.evaluate
        counted = worker.submit(train_gpt.Mixture, tokens, hp)
        ended = []
        counted.add_done_callback(lambda _: ended.append(time.perf_counter() - began))
        mixing = []
        for done in [*range(size, len(tokens) - 1, size), len(tokens) - 1]:
            time.sleep(max(0, seconds * done / len(tokens) - (time.perf_counter() - began)))
            scores = scores_2N[:, :done]
            mixing.append(worker.submit(train_gpt.extend_when_counted, counted, scores))
        scored = time.perf_counter() - began
        for future in mixing:
            future.result()
    return [ended[0], scored, time.perf_counter() - began, high_water()]


def dictionary_cache(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, c(u), c(u, v)) per target from two dictionaries, keyed by the tokens' bytes: each token
    is scored, then added."""
    raw, contexts, pairs = tokens.astype("<u2").tobytes(), {}, {}
    best = np.zeros((3, len(tokens) - 1), np.int64)
    for t in range(1, len(tokens)):
        longest = min(HIGH, t + 1)
        for n in range(longest, LOW - 1, -1):
            count = contexts.get(raw[2 * (t - n + 1) : 2 * t], 0)
            if count >= MIN_COUNT:
                best[:, t - 1] = n, count, pairs.get(raw[2 * (t - n + 1) : 2 * t + 2], 0)
                break
        for n in range(LOW, longest + 1):
            context, pair = raw[2 * (t - n + 1) : 2 * t], raw[2 * (t - n + 1) : 2 * t + 2]
            contexts[context] = contexts.get(context, 0) + 1
            pairs[pair] = pairs.get(pair, 0) + 1
    return tuple(best)


def dictionary_row(tokens: np.ndarray) -> list[tuple]:
    """The row of the dictionary cache. It also says if its counts are not those of Backoff; that
    comparison is not timed."""
    import train_gpt

    row, found = timed(f"dictionary cache, orders {LOW}-{HIGH}", dictionary_cache, tokens)
    exact = train_gpt.Backoff(tokens, exact_settings())
    same = all(np.array_equal(x, y) for x, y in zip(found, exact.evidence()))
    return [(row[0] + ("" if same else " (DIFFERS from the exact counts)"), *row[1:])]


def chunk_buckets(
    tokens: np.ndarray, start: int, stop: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """(bucket of the context, bucket of the n-gram) for the targets t in start ... stop - 1, where
    start >= n - 1."""
    width, mask = n - 1, np.uint64(BUCKETS - 1)
    h = np.zeros(stop - start, np.uint64)
    for k in range(width):
        h ^= tokens[start - width + k : stop - width + k].astype(np.uint64) * PRIMES[k]
    context = h & mask
    pair = (context ^ tokens[start:stop].astype(np.uint64) * PRIMES[width]) & mask
    return context.astype(np.int64), pair.astype(np.int64)


def hash_cache(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, quotient) per target from hash tables, as the predecessors did it: a chunk is scored,
    then added."""
    tables = {n: np.zeros((2, BUCKETS), np.uint32) for n in range(LOW, HIGH + 1)}
    order, quotient = np.zeros(len(tokens) - 1, np.uint8), np.zeros(len(tokens) - 1)
    for begin in range(1, len(tokens), CHUNK):
        stop = min(begin + CHUNK, len(tokens))
        for n, (contexts, pairs) in tables.items():
            start = max(begin, n - 1)
            if start >= stop:
                continue
            context, pair = chunk_buckets(tokens, start, stop, n)
            c_u = contexts[context]
            wins = np.flatnonzero(c_u >= MIN_COUNT)
            order[start - 1 + wins] = n
            quotient[start - 1 + wins] = np.minimum(pairs[pair[wins]], c_u[wins]) / c_u[wins]
            np.add.at(contexts, context, 1)
            np.add.at(pairs, pair, 1)
    return order, quotient


def hash_row(tokens: np.ndarray) -> list[tuple]:
    """The hash cache. Its quotients are no probabilities; it is here to compare speeds."""
    return [timed(f"np.add.at hash cache, orders {LOW}-{HIGH}", hash_cache, tokens)[0]]


ROWS = dict(exact=exact_row, online=online_row, dictionary=dictionary_row, hash=hash_row)
OTHERS = dict(threads=threads_row, arrive=arrive_row)


# --- the table ------------------------------------------------------------------------------------


def child(*args) -> object:
    """Runs this program as a fresh process on one core that does one thing. Returns what it found,
    from the last line that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.ngram", *map(str, args)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(
            f"ngram.py: the step {' '.join(map(str, args[:2]))} failed (above)"
            if done.returncode != 2
            else 2
        )
    return json.loads(done.stdout.splitlines()[-1])


def serve(task: str, *args: str) -> None:
    """What a child does: make the stream, or measure one row on the first tokens of it."""
    import train_gpt

    try:
        if task == "stream":
            answer = make_stream(args[0], int(args[1]), list(args[2:]))
        else:
            tokens = np.fromfile(args[0], np.uint16, int(args[1]))
            begin = high_water()
            numbers = map(int, args[2:])
            if task in OTHERS:
                answer = OTHERS[task](tokens, *numbers)
            else:
                answer = [[*row, begin] for row in ROWS[task](tokens, *numbers)]
    except train_gpt.UserError as error:
        print(f"ngram.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(answer, allow_nan=False))


def measure(task: str, path: str, tokens: int, repeat: int, *args) -> float:
    """Measure one row in `repeat` processes and print its lines. Returns the median tokens/s of the
    first one."""
    runs = [child(f"_{task}", path, tokens, *args) for _ in range(1 if tokens > ONCE else repeat)]
    rates = []
    for same in zip(*runs):
        speeds = [tokens / seconds for _, seconds, _, _ in same]
        rates.append(statistics.median(speeds))
        spread = f"{min(speeds) / 1e6:.3f}-{max(speeds) / 1e6:.3f}" if len(speeds) > 1 else "once"
        label, _, _, begin = same[0]
        peak = max(bytes_ for _, _, bytes_, _ in same)
        print(
            f"{label:46} {tokens:>11,} {rates[-1] / 1e6:>9.3f} {spread:>15} {peak / 1e6:>9.0f} "
            f"{begin / 1e6:>9.0f}",
            flush=True,
        )
    return rates[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ngram", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "shards",
        nargs="*",
        metavar="SHARD",
        help="token shards to read, one after the other; none: "
        "a synthetic stream from the built-in demo corpus",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1_000_000, 8_000_000],
        help="sizes of the fast rows",
    )
    parser.add_argument(
        "--full", action="store_true", help=f"{FULL:,} tokens too: about 3.5 GB and some minutes"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=3,
        help=f"processes per row (above {ONCE:,} tokens always one)",
    )
    parser.add_argument(
        "--order", type=int, default=0, help="longest gram of the online mixture; 0: the default"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to compare"
    )
    parser.add_argument(
        "--arrive",
        type=int,
        metavar="S",
        help=f"scores arrive as from GPUs that take S seconds for {FULL:,} targets",
    )
    args = parser.parse_args()
    if min(args.tokens) < 2 or args.repeat < 1 or min(args.threads) < 1:
        parser.error("--tokens needs at least 2, --repeat and --threads at least 1")
    wanted = args.tokens + [FULL] * args.full
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores of "
        f"{platform.processor() or platform.machine()}, load average {os.getloadavg()[0]:.1f}; one "
        "core per row"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/stream"
        stream = child("_stream", path, max(*wanted, 2), *args.shards)
        print(f"stream: {stream['words']}", flush=True)
        sizes = sorted({min(size, stream["tokens"]) for size in wanted})
        table(path, sizes, args.repeat, args.order)
        compare_threads(path, sizes[-1], args.repeat, args.threads)
        if args.arrive is not None:
            for threads in args.threads:
                let_arrive(path, sizes[-1], args.arrive, threads)


def compare_threads(path: str, tokens: int, repeat: int, threads: list[int]) -> None:
    """Print how long counting takes with each number of threads, and the ratio to the first."""
    rows = child("_threads", path, tokens, repeat, *threads)
    base = rows[0][1]
    print(
        f"\ncounting {tokens:,} tokens, orders 1-{HIGH}, seconds by the clock in {repeat} rounds:"
    )
    for number, seconds, same in rows:
        ratios = [a / b for a, b in zip(base, seconds)]
        print(
            f"  {number} threads: {statistics.median(seconds):.1f} s, "
            f"{statistics.median(ratios):.2f}x as fast ({min(ratios):.2f}-{max(ratios):.2f})"
            + ("" if same else "; DIFFERENT counts")
        )


def let_arrive(path: str, tokens: int, full_seconds: int, threads: int) -> None:
    """Print what counting and mixing add to a run whose scores arrive in time."""
    seconds = round(full_seconds * tokens / FULL)
    counted, scored, mixed, peak = child("_arrive", path, tokens, seconds, threads)
    print(
        f"scores of {tokens:,} targets in {scored:.1f} s, {threads} threads: counted after "
        f"{counted:.1f} s; all mixed {mixed - scored:.2f} s after the last score; peak "
        f"{peak / 1e6:.0f} MB"
    )


def table(path: str, sizes: list[int], repeat: int, order: int) -> None:
    """Print every row, then the ratios of the exact counts' tokens/s to the two caches'."""
    print(f"\n{'':46} {'tokens':>11} {'Mtok/s':>9} {'low-high':>15} {'peak MB':>9} {'at start':>9}")
    exact = {size: measure("exact", path, size, repeat) for size in sizes}
    for size in sizes:
        measure("online", path, size, repeat, order)
    others = {
        name: (most, measure(task, path, most, repeat))
        for task, name, most in (
            ("dictionary", "dictionary cache", min(DICTIONARY_TOKENS, sizes[-1])),
            ("hash", "np.add.at hash cache", min(HASH_TOKENS, sizes[-1])),
        )
    }
    print(f"\nratio of tokens/s: exact counts + backoff, orders {LOW}-{HIGH}, to")
    for name, (most, rate) in others.items():
        ratios = ", ".join(f"{exact[size] / rate:.1f}x at {size:,}" for size in sizes)
        print(f"  {name + f' at {most:,} tokens':46} {ratios}")
    print(
        f"Mtok/s: per second of CPU time, median of {repeat} processes (once above {ONCE:,} "
        "tokens). peak MB: the process's high-water mark to the row's end;\n"
        "at start: what Python, torch and the stream took of it. Mixing used synthetic nll "
        "(exponential, mean 2) and\n"
        "entropy (uniform 0-6). The dictionary's counts were compared with the exact ones.\n"
        "These machines are noisy: read the ratios."
    )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("_"):
        serve(sys.argv[1][1:], *sys.argv[2:])
    else:
        main()
