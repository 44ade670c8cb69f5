"""What every coder of CODERS promises. How rANS codes, and the container around it:
test_artifact.py."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import matrices_with_curvature, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


@pytest.fixture(params=t.CODERS)
def name(request) -> str:
    """Of each coder in the table."""
    return request.param


def matrices(seed: int, shapes, spread: float) -> list[np.ndarray]:
    """Of whole numbers, as a quantiser gives them."""
    rng = np.random.default_rng(seed)
    drawn = (rng.normal(0, spread, shape).round().clip(-127, 127) for shape in shapes)
    return [codes.astype(np.float32) for codes in drawn]


def numbers_of(coded: t.Coded) -> np.ndarray:
    """As the container has them."""
    return np.frombuffer(b"".join(coded.numbers), "<i2")


SIDE = st.integers(1, 40)


@settings(max_examples=40)
@given(
    st.sampled_from(list(t.CODERS)),
    st.lists(st.tuples(SIDE, SIDE), max_size=5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 5.0, 40.0, 1000.0]),
)
def test_any_codes_come_back(name, shapes, seed, spread):
    coder, codes = t.CODERS[name], matrices(seed, shapes, spread)
    coded = coder.encode(codes)
    back = coder.decode(shapes, numbers_of(coded), coded.codes)
    assert [m.dtype for m in back] == [np.uint8] * len(shapes)
    assert all(np.array_equal(m.astype(int) - 128, before) for m, before in zip(back, codes))
    assert len(back) == len(codes)


@pytest.mark.parametrize("shapes", [[], [(1, 1)], [(3, 70), (20, 5)]])
def test_the_number_of_its_numbers_follows_from_the_shapes(name, shapes):
    coder = t.CODERS[name]
    assert len(numbers_of(coder.encode(matrices(0, shapes, 3.0)))) == coder.num_numbers(shapes)


def test_it_says_about_how_many_bytes_each_matrix_takes(name):
    coded = t.CODERS[name].encode(matrices(0, [(300, 200), (100, 100)], 8.0))
    first, second = coded.sizes
    assert first + second == pytest.approx(len(coded.codes), rel=0.01)
    assert first == pytest.approx(6 * second, rel=0.05)


def test_codes_that_are_cut_or_too_long_are_refused(name):
    coder, shapes = t.CODERS[name], [(30, 20), (7, 9)]
    coded = coder.encode(matrices(0, shapes, 8.0))
    for codes in (b"", coded.codes[:-2], coded.codes[: len(coded.codes) // 2], coded.codes + b"ab"):
        with pytest.raises((ValueError, t.lzma.LZMAError)):
            coder.decode(shapes, numbers_of(coded), codes)


@pytest.mark.parametrize("shapes", [[(30, 21)], [(30, 19)], [(30, 20), (1, 1)], []])
def test_codes_of_other_shapes_are_refused(name, shapes):
    coder = t.CODERS[name]
    coded = coder.encode(matrices(0, [(30, 20)], 8.0))
    numbers = np.resize(numbers_of(coded), coder.num_numbers(shapes))
    with pytest.raises((ValueError, t.lzma.LZMAError)):
        coder.decode(shapes, numbers, coded.codes)


@pytest.mark.parametrize("quantizer", t.QUANTIZERS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_budget_is_kept_and_used(name, quantizer, share):
    torch.manual_seed(0)
    state, curvature = matrices_with_curvature()
    hp = tiny(CODER=name, QUANTIZER=quantizer)
    budget = int(share * len(t.pack(state, hp).blob))
    blob = t.compress(state, hp, curvature, budget).container.blob
    assert budget - t.TOLERANCE < len(blob) <= budget
    found, _ = t.decompress(blob, state)
    assert found["CODER"] == name


def test_a_slow_coder_packs_only_a_few_times(name, monkeypatch):
    """rANS finds the step sizes first: LZMA of 27 million codes takes many seconds."""
    state, _ = matrices_with_curvature()
    plain, coders = t.pack, []

    def counted(state, hp, *args):
        coders.append(hp.coder)
        return plain(state, hp, *args)

    hp = tiny(CODER=name)
    budget = int(0.7 * len(plain(state, hp).blob))
    monkeypatch.setattr(t, "pack", counted)
    t.compress(state, hp, {}, budget)
    assert name == "rans" or 0 < coders.count(name) <= 4


@pytest.mark.parametrize("quantizer", t.QUANTIZERS)
def test_the_bytes_that_rans_would_take_are_known(name, quantizer):
    """Of the same weights: the table of systems shows what it saves."""
    state, curvature = matrices_with_curvature()
    hp = tiny(CODER=name, QUANTIZER=quantizer)
    budget = int(0.8 * len(t.pack(state, hp).blob))
    packed = t.compress(state, hp, curvature, budget)
    by_rans = dataclasses.replace(hp, coder="rans")
    quantize = t.QUANTIZERS[quantizer](state, hp, curvature).quantize
    expected = len(t.pack(state, by_rans, packed.coarsen, quantize).blob)
    assert packed.bytes_by_rans == expected


def test_rans_takes_fewer_bytes_than_lzma():
    codes = matrices(0, [(400, 300)], 9.0)
    sizes = {}
    for name, coder in t.CODERS.items():
        coded = coder.encode(codes)
        side = t.lzma.compress(b"".join(coded.numbers), **t.LZMA)
        sizes[name] = len(side) + len(coded.codes)
    assert sizes["rans"] < 0.99 * sizes["lzma"]


def test_a_coder_changes_no_weight(name):
    """Only the number of bytes."""
    state, curvature = matrices_with_curvature()
    hp = tiny(CODER=name)
    quantizer = t.GPTQ(state, hp, curvature)
    _, back = t.decompress(t.pack(state, hp, 1.3, quantizer.quantize).blob, state)
    other = t.pack(state, dataclasses.replace(hp, coder="rans"), 1.3, quantizer.quantize)
    _, expected = t.decompress(other.blob, state)
    assert all(torch.equal(back[matrix], expected[matrix]) for matrix in state)
