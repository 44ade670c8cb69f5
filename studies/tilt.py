"""What does a tilt of one guessed token gain, with the mixture and without it?

    python -m studies.tilt ARTIFACT [--targets 400000] [--save FILE.npz]
    python -m studies.tilt FILE.npz

The challenge's last records guess the next token from what followed the longest match in the past,
and raise the odds of this one token (PR #2135). That needs the model's probability of the guess,
which a run does not save: this study scores the stream of DATA_PATH with a packed model, once, and
can save what it found.

The guess is what followed the most recent earlier place with the same last tokens, as many as
possible, up to 16. A class is the length of the match (12 of them) and the model's log-odds of the
guess (20 of them). In a class, the tilted probability of the guess is the share of guesses that
came true in earlier blocks, with the model's own p(guess) as a prior of 60 observations. All other
tokens are scaled so that the sum stays 1. The rows: the tilt alone, the mixture alone, and the
mixture of the tilted probabilities.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

import train_gpt as t
from tools import common

LONGEST = 16  # tokens of a match
LENGTHS, ODDS = 12, 20  # classes
PRIOR, FORGETTING = 60.0, 0.97  # observations that the model's p is worth; per block


def guesses(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length of the longest match, the token that followed it most recently), for each target; 0
    and 0 where even the last token is new."""
    num_targets = len(tokens) - 1
    length = np.zeros(num_targets, np.int64)
    guess = np.zeros(num_targets, np.int64)
    context = tokens[:-1].astype(np.int64)  # a number for the last `width` tokens, by target
    for width in range(1, LONGEST + 1):
        perm, first, _ = t.sort_runs(context)
        before = np.append(0, perm[:-1])[~first]  # the last earlier target with the same context
        here = perm[~first]
        length[here] = width
        guess[here] = tokens[before + 1]
        group = np.empty(num_targets, np.int64)
        group[perm] = np.cumsum(first)
        context = np.append(0, group[:-1] << 16 | tokens[1:-1])
        context[:width] = -1 - np.arange(width) - (1 << 20)  # too near the start: never matched
        _, context = np.unique(context, return_inverse=True)
    return length, guess


@torch.inference_mode()
def scored(model: t.GPT, tokens: np.ndarray, guess: np.ndarray, stride: int) -> np.ndarray:
    """(3, targets): nll and entropy in nats, and the model's p of the guess."""
    hp = model.hp
    device = model.embed.weight.device
    _, passes = t.block_passes(hp)
    found = np.empty((3, len(tokens) - 1))
    length = min(hp.eval_seq_len, len(tokens) - 1)
    spans = t.windows(0, len(tokens) - 1, length, stride)
    batch = max(1, hp.val_batch_size // length)
    for i in range(0, spans.shape[1], batch):
        positions, is_scored = t.window_targets(spans[:, i : i + batch], length)
        ids = torch.from_numpy(tokens[positions].astype(np.int64)).to(device)
        hidden = model.hidden(ids, passes)[torch.from_numpy(is_scored).to(device)]
        logp = t.log_probabilities(model.logits(hidden), hp.logit_softcap)
        here = positions[is_scored]
        wanted = np.stack((tokens[here + 1].astype(np.int64), guess[here]), 1)
        picked = logp.gather(1, torch.from_numpy(wanted).to(device)).cpu().numpy()
        entropy = -(logp.exp() * logp).sum(-1)
        found[:, here] = -picked[:, 0], entropy.cpu().numpy(), np.exp(picked[:, 1])
    return found


class Tilt:
    """Raises or lowers the odds of one guessed token, by what came true before."""

    def __init__(self):
        self.credits = np.zeros((2, (LENGTHS + 1) * ODDS))  # guesses that came true; all guesses

    def apply(self, p: np.ndarray, p_guess: np.ndarray, length: np.ndarray, is_true: np.ndarray):
        """The tilted p of the targets of a block; learns from the block afterwards. p_guess: of the
        guess, before the tilt."""
        p_guess = p_guess.clip(1e-9, 1 - 1e-9)
        odds = np.log(p_guess / (1 - p_guess))
        group = np.minimum(length, LENGTHS) * ODDS + (odds + ODDS / 2).clip(0, ODDS - 1).astype(int)
        came, seen = self.credits[:, group]
        tilted = (came + PRIOR * p_guess) / (seen + PRIOR)
        tilted = np.where(length > 0, tilted, p_guess)
        new = np.where(is_true, tilted, p * (1 - tilted) / (1 - p_guess))
        self.credits *= FORGETTING
        self.credits[0] += np.bincount(group, is_true, self.credits.shape[1])
        self.credits[1] += np.bincount(group, minlength=self.credits.shape[1])
        return new


def tilted_nll(nll, p_guess, length, is_true) -> np.ndarray:
    """Tilt the model's p of every target, one block after the other. Returns the nll in nats."""
    tilt = Tilt()
    found = np.empty(len(nll))
    edges = t.block_edges(len(nll))
    for begin, end in zip(edges[:-1], edges[1:]):
        part = slice(begin, end)
        p = tilt.apply(np.exp(-nll[part]), p_guess[part], length[part], is_true[part])
        found[part] = -np.log(p)
    return found


def study(arrays: dict[str, np.ndarray], hp) -> None:
    tokens, nll, entropy, p_guess, counted = arrays.values()
    length, guess = guesses(tokens)
    is_true = guess == tokens[1:]
    is_true &= length > 0
    p_guess = np.where(is_true, np.exp(-nll), p_guess)  # the same, without another rounding
    mixed = t.mix(tokens, nll, entropy, hp)
    tilted = tilted_nll(nll, p_guess, length, is_true)
    rows = {
        "the tilt alone": tilted,
        "the mixture": mixed,
        "the tilt, then the mixture": t.mix(tokens, tilted, entropy, hp),
    }
    N = len(nll)
    edges = ((0, N), (0, N // 3), (N // 3, 2 * N // 3), (2 * N // 3, N))
    print(f"{N:,} targets, {counted.sum():,} bytes; guessed {np.mean(length > 0):.1%}")
    print(f"{'bits per byte':32} {'whole':>9} {'gain':>9} {'1st third':>9} {'2nd':>9} {'3rd':>9}")
    print(f"{'neural model alone':32} {t.bits_per_byte(nll, counted):9.5f}")
    for label, found in rows.items():
        gains = [
            t.bits_per_byte(nll[a:b], counted[a:b]) - t.bits_per_byte(found[a:b], counted[a:b])
            for a, b in edges
        ]
        cells = " ".join(f"{gain:+9.5f}" for gain in gains)
        print(f"{label:32} {t.bits_per_byte(found, counted):9.5f} {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.tilt", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("source", type=Path, metavar="ARTIFACT|FILE.npz")
    parser.add_argument("--targets", type=int, default=400_000, help="of the stream")
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="what was scored")
    args = parser.parse_args()
    try:
        hp = t.Hyperparameters()
        if args.source.suffix == ".npz":
            with np.load(args.source, allow_pickle=False) as file:
                arrays = dict(file)
        else:
            model, hp = common.load_for_environment(args.source)
            tokens = t.load_validation(hp).tokens[: args.targets + 1]
            _, guess = guesses(tokens)
            scores = scored(model, tokens, guess, hp.eval_stride)
            names = ("tokens", "nll", "entropy", "p_guess", "bytes")
            arrays = dict(zip(names, (tokens, *scores, t.ByteCounter(hp)(tokens))))
            if args.save:
                np.savez_compressed(args.save, **arrays)
        largest = int(arrays["tokens"].max()) + 1
        study(arrays, dataclasses.replace(hp, vocab_size=max(hp.vocab_size, largest)))
    except t.UserError as error:
        sys.exit(f"tilt.py: error: {error}")


if __name__ == "__main__":
    main()
