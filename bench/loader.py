"""What random access costs the loader: a batch from windows in a random permutation against the
same batch in the order before it, where every sequence went on in the next step.

    python -m bench.loader [--shards 80] [--tokens 1000000] [--rounds 200]

Shards of random tokens are written into a temporary folder, so they lie in the page cache. Batch
size and sequence length are TRAIN_BATCH_TOKENS and TRAIN_SEQ_LEN, by default the challenge's. In
the old order sequence i of S starts at i/S of the stream and moves on by its own length each step.
Each round reads one batch in each order, in turn; the table has medians and quartiles over the
rounds, of CPU time, which other processes disturb least. Last come the time and memory that one
epoch's permutation takes for all of FineWeb's training shards.
"""

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from tools.common import environment_settings, t

FINEWEB = 8_200_000_000  # tokens: about 4 million windows of 2,048


def write_shards(folder: Path, shards: int, tokens: int, vocab_size: int) -> None:
    """`shards` training shards of `tokens` random tokens each."""
    rng = np.random.default_rng(0)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, tokens
    for i in range(shards):
        ids = rng.integers(0, vocab_size, tokens, dtype=np.uint16)
        path = folder / f"fineweb_train_{i:06d}.bin"
        path.write_bytes(header.tobytes() + ids.tobytes())


def permuted(loader: t.TokenLoader, step: int) -> list[tuple]:
    """The script's own batch `step`, as micro-batches of (inputs, targets)."""
    return [loader.micro_batch(step, micro) for micro in range(loader.accumulation)]


def in_lanes(loader: t.TokenLoader, step: int) -> list[tuple]:
    """The batch `step` as it was read before: every sequence goes on where it ended."""
    T, batch = loader.hp.train_seq_len, []
    for first in range(0, loader.sequences_per_rank, loader.rows):
        lanes = range(first, first + loader.rows)
        starts = [i * loader.num_tokens // loader.sequences + step * T for i in lanes]
        ids = t.torch.from_numpy(np.stack([loader.span(start, T + 1) for start in starts]))
        batch.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return batch


ORDERS = {"windows in a random permutation": permuted, "sequences that go on": in_lanes}


def measure(loader: t.TokenLoader, rounds: int) -> dict[str, list[float]]:
    """Order -> CPU seconds for a batch, one number for each round."""
    seconds = defaultdict(list)
    for step in range(rounds):
        turns = list(ORDERS.items())
        for name, read in turns if step % 2 else turns[::-1]:
            began = process_time()
            read(loader, step)
            seconds[name].append(process_time() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loader", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--shards", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="in each shard")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--epoch", type=int, default=FINEWEB, help="tokens of the drawn epoch")
    args = parser.parse_args()
    t.torch.set_num_threads(1)  # as torchrun sets it
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DATA_PATH"] = folder
        hp = environment_settings()
        write_shards(Path(folder), args.shards, args.tokens, hp.vocab_size)
        loader = t.TokenLoader(hp, 0, 1)
        seconds = measure(loader, args.rounds)
    print(
        f"\n{loader.sequences} sequences of {hp.train_seq_len} tokens from {args.shards} shards of "
        f"{args.tokens:,}; one thread, page cache warm\n\n"
        f"{'':32} {'ms/batch':>9} {'quartiles':>16}"
    )
    new, old = (seconds[name] for name in ORDERS)
    for name in ORDERS:
        low, middle, high = statistics.quantiles([1e3 * x for x in seconds[name]], n=4)
        print(f"{name:32} {middle:>9.2f} {f'{low:.2f}-{high:.2f}':>16}")
    low, middle, high = statistics.quantiles([a / b for a, b in zip(new, old)], n=4)
    print(f"{'ratio in a round':32} {middle:>9.3f} {f'{low:.3f}-{high:.3f}':>16}")

    began = perf_counter()
    starts = t.window_starts(args.epoch, hp.train_seq_len, hp.seed, 0)
    print(
        f"\nan epoch of {len(starts):,} windows: {perf_counter() - began:.2f} s to draw, "
        f"{starts.nbytes:,} bytes"
    )


if __name__ == "__main__":
    main()
