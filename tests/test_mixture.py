"""Small parts of the mixture; the whole is in test_ngram.py."""

import numpy as np

import train_gpt as t


def test_a_document_is_numbered_by_the_bos_before_it(rng):
    tokens = np.where(rng.random(200) < 0.1, t.BOS, 7).astype(np.uint16)
    expected = [sum(token == t.BOS for token in tokens[:i]) for i in range(200)]
    assert t.document_numbers(tokens).tolist() == expected


def test_a_target_knows_where_its_document_starts(rng):
    tokens = np.where(rng.random(200) < 0.1, t.BOS, 7).astype(np.uint16)
    for target in range(199):  # it is token target + 1
        before = [i for i in range(target + 1) if tokens[i] == t.BOS]
        assert t.document_start(tokens, target) == (before[-1] + 1 if before else 0)
