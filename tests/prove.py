"""The proof: a range coder driven by our probabilities, and a decoder that has the bytes and the
artifact only.

A small model is trained, packed and read back. The encoder turns 1,800 tokens of real text into
bytes with the mixed probabilities; the decoder restores every token from those bytes. The length is
what the score claims, to 64 bits. With hashed counts no coder reaches what they claim.

`make prove` runs this and says what it found; test_decodable.py requires it.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import constriction
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is started as a script

from helpers import (  # noqa: E402
    hidden_states,
    log_probabilities,
    make_corpus,
    new_training,
    scores_of,
)
from reference import Predictor  # noqa: E402

import train_gpt as t  # noqa: E402
from studies import predecessors  # noqa: E402

TOKENS = 1_801  # 1,800 targets
SMALL = dict(
    NUM_LAYERS=2,
    VE_LAYERS="1",
    ITERATIONS=40,
    WARMDOWN_ITERS=20,
    TRAIN_BATCH_TOKENS=2048,
    TRAIN_LOG_EVERY=0,
)


def trained_artifact(corpus) -> tuple[bytes, t.Hyperparameters, np.ndarray]:
    """The bytes of a model trained here, its settings, and the stream."""
    training = new_training(corpus, **SMALL)
    hp = training.model.hp
    trained = t.train(*training)
    return t.pack(trained.weights, hp).blob, hp, np.array(t.load_validation(hp).tokens[:TOKENS])


def load(blob: bytes, hp) -> t.GPT:
    model = t.GPT(hp)
    model.load_state_dict(t.decompress(blob)[1])
    return model


@torch.no_grad()
def model_distribution(model, known: list[int], num_targets: int) -> np.ndarray:
    """p(v) of the token after `known`, in the window that scores it;
    what is not known yet is zeros."""
    hp, j = model.hp, len(known) - 1
    starts, firsts, _ = t.windows(0, num_targets, hp.eval_seq_len, hp.eval_stride)
    start = int(starts[np.searchsorted(firsts, j, "right") - 1])
    window = np.zeros(hp.eval_seq_len, np.int64)
    window[: j + 1 - start] = known[start:]
    hidden = hidden_states(model, torch.from_numpy(window)[None])[0, j - start]
    return torch.softmax(log_probabilities(model, hidden).double(), -1).numpy()


def predictions(model, first_token: int, num_targets: int):
    """A coroutine: yields p(v) of the next token, is sent the token.
    Encoder and decoder run this same code."""
    predictor, known = Predictor(first_token, num_targets, model.hp), [first_token]
    while len(known) <= num_targets:
        p = model_distribution(model, known, num_targets)
        token = yield predictor.predict(p, float(-(p * np.log(p)).sum()))
        predictor.learn(token)
        known.append(token)


def coder_model(p: np.ndarray):
    return constriction.stream.model.Categorical(p.astype(np.float64), perfect=False)


def encode(model, tokens: np.ndarray) -> np.ndarray:
    encoder = constriction.stream.queue.RangeEncoder()
    stream = predictions(model, int(tokens[0]), len(tokens) - 1)
    p = next(stream)
    for token in tokens[1:].tolist():
        encoder.encode(token, coder_model(p))
        try:
            p = stream.send(token)
        except StopIteration:
            return encoder.get_compressed()


def decode(blob: bytes, hp, words: np.ndarray, first_token: int, num_targets: int) -> np.ndarray:
    """All a receiver needs: the artifact, the bytes, where the stream begins and how long it is."""
    decoder = constriction.stream.queue.RangeDecoder(words)
    stream = predictions(load(blob, hp), first_token, num_targets)
    tokens, p = [first_token], next(stream)
    while True:
        tokens.append(int(decoder.decode(coder_model(p))))
        try:
            p = stream.send(tokens[-1])
        except StopIteration:
            return np.array(tokens, np.uint16)


def claimed_bits(model, tokens, hp) -> float:
    nll, entropy = scores_of(model, tokens, hp.eval_stride)
    return float(t.mix(tokens, nll, entropy, hp).sum() / math.log(2))


class Hashed(NamedTuple):
    """Code lengths of a stream with hashed counts: the claimed one, and the best possible one."""

    claimed: float  # bits
    coded: float  # bits of the best code that could be made with them
    largest_sum: float  # of what they give to all tokens at one place


def hashed_counts(artifact) -> Hashed:
    """PR #825's rule on the same stream, with few buckets. What it gives to the vocabulary sums to
    more than 1; a coder must scale it back, and the claim is gone."""
    blob, hp, tokens = artifact
    model, rule, low, high = load(blob, hp), predecessors.RULES["825"], hp.alpha_min, hp.alpha_max
    counts = predecessors.HashedCounts(tokens, rule, hp.vocab_size, buckets=2048)
    nats = predecessors.mix(counts, *scores_of(model, tokens, hp.eval_stride), low, high)
    claimed, coded, largest = float(nats.sum() / math.log(2)), 0.0, 0.0
    known = tokens.tolist()
    for j in range(TOKENS - 1):
        p = model_distribution(model, known[: j + 1], TOKENS - 1)
        entropy = np.array(-(p * np.log(p)).sum())
        alpha = rule.weight(entropy, counts.n[j], low, high)
        pairs, context = counts.continuations(j)
        p = (1 - alpha) * p + alpha * pairs / context
        largest = max(largest, p.sum())
        coded -= math.log2(p[tokens[j + 1]] / p.sum())  # the best a coder can do with it
    return Hashed(claimed, coded, largest)


def main() -> None:
    torch.set_num_threads(1)  # many tiny steps: threads would only wait for each other
    print("Half a minute: a model is trained, a text coded, decoded, and coded by hashed counts.")
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        artifact = blob, hp, tokens = trained_artifact(corpus)
        model = load(blob, hp)
        claimed, words = claimed_bits(model, tokens, hp), encode(model, tokens)
        decoded = decode(blob, hp, words, int(tokens[0]), TOKENS - 1)
        same = np.array_equal(decoded, tokens)
        pieces = t.ByteCounter(hp).pieces
        text, again = (pieces.decode(x.tolist()) for x in (tokens, decoded))
        size = len(text.encode())
    coded = 32 * len(words)
    print(
        f"A small model was trained and packed into {len(blob):,} bytes; its probabilities, mixed "
        f"with counts of the past, claim {claimed:,.0f} bits for {TOKENS - 1:,} tokens, "
        f"{size:,} bytes of text.\n"
        f"A range coder driven by them wrote {coded:,} bits, and a decoder that had only these "
        f"bits and the packed model gave back "
        + (f"the identical text, which ends {again[-40:]!r}." if same else "ANOTHER TEXT.")
    )
    hashed = hashed_counts(artifact)
    print(
        f"With hashed counts (PR #825, {2048:,} buckets) the same text would cost "
        f"{hashed.claimed:,.0f} bits by the claim, but the best possible code has "
        f"{hashed.coded:,.0f}, as what they give to all tokens sums to up to "
        f"{hashed.largest_sum:.1f} instead of 1."
    )
    if not same or text != again or abs(coded - claimed) > 64:
        sys.exit("prove.py: the proof FAILED: see above")


if __name__ == "__main__":
    main()
