"""What every quantiser promises. How GPTQ rounds: test_gptq.py; rows: test_artifact.py."""

import pytest
import torch
from helpers import matrices_with_curvature, tiny

import train_gpt as t


@pytest.fixture(params=t.QUANTIZERS)
def name(request) -> str:
    """Of each quantiser in the table."""
    return request.param


@pytest.fixture
def matrices(seed) -> tuple[dict, dict]:
    """(state, curvature) of three matrices."""
    return matrices_with_curvature()


@pytest.fixture
def quantizer(name, matrices):
    """Made for these matrices."""
    state, curvature = matrices
    return t.QUANTIZERS[name](state, tiny(), curvature)


def methods(quantizer) -> list:
    return [quantizer.draft, quantizer.quantize]


@pytest.mark.parametrize("coarsen", [1e-6, 0.5, 1.0, 4.0, t.COARSEST])
def test_codes_are_whole_numbers_of_at_most_8_bits(quantizer, matrices, coarsen):
    state, _ = matrices
    for quantize in methods(quantizer):
        for matrix, w in state.items():
            codes, _ = quantize(matrix, w, coarsen)
            assert codes.shape == w.shape
            assert torch.equal(codes, codes.round())
            assert codes.abs().max() <= 127


@pytest.mark.parametrize("coarsen", [1e-6, 1.0, t.COARSEST])
def test_deltas_are_positive_bfloat16_numbers_one_per_row(quantizer, matrices, coarsen):
    state, _ = matrices
    for quantize in methods(quantizer):
        for matrix, w in state.items():
            _, delta = quantize(matrix, w, coarsen)
            assert delta.shape == (len(w), 1)
            assert torch.equal(delta, delta.bfloat16().float())
            assert (delta > 0).all()


@pytest.mark.parametrize("bits", [3, 6, 7, 8])
def test_the_file_gives_back_codes_times_deltas(name, matrices, bits):
    state, curvature = matrices
    hp = tiny(QUANT_BITS=bits)
    quantizer = t.QUANTIZERS[name](state, hp, curvature)
    _, back = t.decompress(t.pack(state, hp, 1.0, quantizer.quantize).blob, state)
    for matrix, w in state.items():
        codes, delta = quantizer.quantize(matrix, w, 1.0)
        assert torch.equal(back[matrix], codes * delta), matrix


def test_the_coarser_the_deltas_the_smaller_the_file_and_the_larger_its_error(quantizer, matrices):
    state, _ = matrices
    packed = [t.pack(state, tiny(), c, quantizer.quantize) for c in (0.5, 1.0, 2.0, 4.0)]
    sizes, errors = [len(p.blob) for p in packed], [p.error for p in packed]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert len(set(sizes)) == len(set(errors)) == 4


def geometric_mean(quantizer, state, coarsen: float) -> float:
    """Of the deltas, over all weights."""
    total = sum(w.numel() for w in state.values())
    logs = (
        quantizer.quantize(matrix, w, coarsen)[1].log2().mean() * w.numel() / total
        for matrix, w in state.items()
    )
    return 2 ** float(sum(logs))


def test_natural_deltas_are_those_of_rows_on_average(quantizer, matrices):
    state, _ = matrices
    rows = t.RowQuantizer(state, tiny(), {})
    expected = geometric_mean(rows, state, 1.0)
    # rows' deltas reach from the largest weight, which a quantiser's may not pass
    assert geometric_mean(quantizer, state, 1.0) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("coarsen", [1.5, 4.0])
def test_deltas_are_coarsened_by_the_factor(quantizer, matrices, coarsen):
    state, _ = matrices
    natural = geometric_mean(quantizer, state, 1.0)
    found = geometric_mean(quantizer, state, coarsen)
    assert found / natural == pytest.approx(coarsen, rel=0.2)


@pytest.mark.parametrize("coarsen", [0.5, 1.0, 4.0])
def test_a_draft_takes_about_as_many_bytes(quantizer, matrices, coarsen):
    state, _ = matrices
    draft, final = (len(t.pack(state, tiny(), coarsen, q).blob) for q in methods(quantizer))
    assert draft == pytest.approx(final, rel=0.06)


def test_quantising_changes_neither_the_weights_nor_what_comes_next(quantizer, matrices):
    state, _ = matrices
    before = {matrix: w.clone() for matrix, w in state.items()}
    first, second = (
        [quantizer.quantize(matrix, w, 1.3) for matrix, w in state.items()] for _ in range(2)
    )
    assert all(torch.equal(w, before[matrix]) for matrix, w in state.items())
    for one, other in zip(first, second):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.1])
def test_the_budget_is_kept_and_used(name, matrices, share):
    state, curvature = matrices
    budget = int(share * len(t.pack(state, tiny()).blob))
    packed = t.compress(state, tiny(QUANTIZER=name), curvature, budget)
    assert budget - t.TOLERANCE < len(packed.container.blob) <= budget


def test_a_budget_too_small_for_any_codes_is_refused(name, matrices):
    state, curvature = matrices
    with pytest.raises(t.UserError, match="even with codes of -1, 0 and 1"):
        t.compress(state, tiny(QUANTIZER=name), curvature, 400)


def test_at_its_coarsest_all_codes_are_small(quantizer, matrices):
    """So "even with codes of -1, 0 and 1" is true."""
    state, _ = matrices
    for matrix, w in state.items():
        codes, _ = quantizer.draft(matrix, w, quantizer.coarsest)
        assert codes.abs().max() <= 1


@pytest.mark.parametrize("share", [0.5, 0.8, 2.0])
@pytest.mark.parametrize("bits", [4, 6])
def test_levels_are_the_largest_code_in_the_file(name, matrices, share, bits):
    state, curvature = matrices
    state = state | {"bigram.table.weight": torch.randn(50, 9)}  # of 8 bits, so not counted
    hp = tiny(QUANTIZER=name, QUANT_BITS=bits)
    packed = t.compress(state, hp, curvature, int(share * len(t.pack(state, hp).blob)))
    _, back = t.decompress(packed.container.blob, state)
    quantizer = t.QUANTIZERS[name](state, hp, curvature)
    largest = 0
    for matrix in curvature:
        _, delta = quantizer.quantize(matrix, state[matrix], packed.coarsen)
        largest = max(largest, int((back[matrix] / delta).abs().max()))
    assert packed.container.levels == largest


def test_a_quantiser_with_a_quicker_draft_packs_only_a_few_times_itself(
    name, matrices, monkeypatch
):
    """The draft finds the step sizes first."""
    state, curvature = matrices
    cls, plain, packings = t.QUANTIZERS[name], t.pack, []
    most = 4 if cls.draft is not cls.quantize else 100

    def counted(*args):
        packings.append(args[-1].__name__)
        return plain(*args)

    monkeypatch.setattr(t, "pack", counted)
    for share in (0.5, 0.8, 0.95):
        packings.clear()
        budget = int(share * len(plain(state, tiny()).blob))
        t.compress(state, tiny(QUANTIZER=name), curvature, budget)
        assert 0 < packings.count("quantize") <= most
