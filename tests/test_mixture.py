"""Small parts of the mixture; the whole is in test_ngram.py."""

import numpy as np

import train_gpt as t


def test_the_age_of_a_token_is_counted_up_to_65535():
    """A longer document's would not fit beside the token in 32 bits."""
    ages = t.document_ages(np.full(70_001, 5, np.uint16))  # the first token is as a BOS
    assert np.array_equal(ages[1:], np.minimum(np.arange(70_000), 65_535))


def test_the_age_of_a_token_is_that_in_its_document():
    """0 at the first token after BOS; the stream opens a document too."""
    tokens = np.array([7, 7, 1, 7, 7, 7, 1, 1, 7], np.uint16)
    assert t.document_ages(tokens).tolist() == [0, 0, 1, 0, 1, 2, 3, 0, 0]
