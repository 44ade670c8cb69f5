"""The proof of prove.py: the score is a code length, and a decoder restores the text."""

import numpy as np
import pytest
from prove import TOKENS, claimed_bits, decode, encode, hashed_counts, load, trained_artifact

import train_gpt as t


@pytest.fixture(scope="module")
def artifact(corpus) -> tuple[bytes, t.Hyperparameters, np.ndarray]:
    return trained_artifact(corpus)


@pytest.mark.parametrize("alpha", ["online", pytest.param("order", marks=pytest.mark.slow)])
def test_a_decoder_restores_the_stream_from_the_claimed_number_of_bits(artifact, alpha):
    blob, hp, tokens = artifact
    hp = t.Hyperparameters(**{**vars(hp), "ngram_alpha": alpha})
    model = load(blob, hp)
    claimed, words = claimed_bits(model, tokens, hp), encode(model, tokens)
    assert abs(32 * len(words) - claimed) <= 64
    assert np.array_equal(decode(blob, hp, words, int(tokens[0]), TOKENS - 1), tokens)


@pytest.mark.slow
def test_hashed_counts_cannot_keep_what_they_claim(artifact):
    claimed, coded, largest_sum = hashed_counts(artifact)
    assert coded > claimed + 64 and largest_sum > 2
