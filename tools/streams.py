"""Long streams of tokens, made from short ones. Without torch, as a process that measures memory
must not have held more than what it measures."""

import numpy as np

FULL = 62_000_000  # tokens of the challenge's validation stream


def resample(corpus: np.ndarray, length: int, seed: int = 0) -> np.ndarray:
    """`length` tokens (uint16): random spans of 32-1024 tokens of `corpus`,
    one token in ten replaced by a unigram draw."""
    rng, out, done = np.random.default_rng(seed), np.empty(length, np.uint16), 0
    while done < length:
        size = min(int(rng.integers(32, 1025)), length - done, len(corpus))
        start = rng.integers(0, len(corpus) - size + 1)
        out[done : done + size] = corpus[start : start + size]
        done += size
    for at in range(0, length, 1 << 20):
        piece = out[at : at + (1 << 20)]
        swap = np.flatnonzero(rng.random(len(piece)) < 0.1)
        piece[swap] = corpus[rng.integers(0, len(corpus), len(swap))]
    return out
