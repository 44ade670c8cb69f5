"""GPTQ: what it rounds, against the textbook; where its step sizes come from; the curvature. What
every quantiser promises: test_quantizers.py."""

import lzma

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    correlated_moments,
    final_passes,
    hidden_states,
    matrices_with_curvature,
    shifted,
    tiny,
)

import train_gpt as t

MATRIX, OTHER = (f"blocks.{i}.mlp.fc.weight" for i in (0, 1))  # by their names they are coded


def textbook_codes(w_RC, delta_R, H_CC):
    """GPTQ, one column at a time, its inverse Hessian by Gaussian elimination (2210.17323, 3)."""
    w, inverse = w_RC.clone(), torch.linalg.inv(H_CC)
    codes = torch.zeros_like(w)
    for c in range(w.size(1)):
        codes[:, c] = (w[:, c] / delta_R).round().clamp(-127, 127)
        error = (w[:, c] - codes[:, c] * delta_R) / inverse[c, c]
        w[:, c:] -= torch.outer(error, inverse[c, c:])
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return codes


def upper_factor(H_CC):
    return torch.linalg.cholesky(torch.linalg.inv(H_CC), upper=True)


@pytest.mark.parametrize("columns", [1, 5, 128, 129, 300])
def test_gptq_is_the_textbooks_column_by_column_update(rng, columns):
    w = torch.randn(9, columns, dtype=torch.float64)
    delta, H = torch.rand(9, dtype=torch.float64) + 0.1, correlated_moments(columns)
    codes = t.round_in_turn(w.T, delta, upper_factor(H)).T
    assert torch.equal(codes, textbook_codes(w, delta, H))


def test_with_independent_inputs_gptq_is_plain_rounding(rng):
    w, delta = torch.randn(40, 300), torch.rand(40) + 0.1
    codes = t.round_in_turn(w.T, delta, torch.eye(300)).T
    assert torch.equal(codes, (w / delta[:, None]).round().clamp(-127, 127))


def weighted_error(curvature, w, rounded) -> float:
    """Nats per token, by the curvature."""
    e = (rounded - w).double()
    per_row = ((e @ curvature.inputs_CC.double()) * e).sum(1)
    return float((curvature.outputs_R.double() * per_row).sum()) / 2


@pytest.fixture
def matrices(seed):
    """(state, curvature) of three matrices."""
    return matrices_with_curvature()


@pytest.mark.parametrize("coarsen", [0.5, 1.0, 4.0, 16.0])
def test_weighted_error_is_below_that_of_rounding_to_the_same_deltas(matrices, coarsen):
    state, curvature = matrices
    gptq = t.GPTQ(state, tiny(), curvature)
    for name, w in state.items():
        (plain, delta), (turned, same) = (
            quantize(name, w, coarsen) for quantize in (gptq.draft, gptq.quantize)
        )
        assert torch.equal(delta, same)
        error, other = (weighted_error(curvature[name], w, x * delta) for x in (turned, plain))
        assert error < other


def weighted_errors(state, curvature, hp, budget) -> tuple[float, float]:
    """Of the files of GPTQ and of rows, at equal bytes."""
    found = []
    for c in (curvature, {}):
        _, back = t.decompress(t.compress(state, hp, c, budget).container.blob, state)
        found.append(sum(weighted_error(curvature[n], w, back[n]) for n, w in state.items()))
    return found


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_at_equal_bytes_the_weighted_error_is_at_most_half_that_of_rows(matrices, bits):
    state, curvature = matrices
    hp = tiny(QUANT_BITS=bits, FILL_BUDGET=1)
    budget = len(t.pack(state, hp).blob) + t.AIM
    gptq, rows = weighted_errors(state, curvature, hp, budget)
    assert gptq < 0.5 * rows


@pytest.mark.parametrize("bits", [7, 8])
def test_with_codes_to_spare_the_weighted_error_is_still_below_that_of_rows(matrices, bits):
    """Step sizes are then held back by the largest code, and rows' are fine already."""
    state, curvature = matrices
    hp = tiny(QUANT_BITS=bits)
    gptq, rows = weighted_errors(state, curvature, hp, len(t.pack(state, hp).blob))
    assert gptq < rows


def test_codes_of_gptq_take_less_than_their_zeroth_order_entropy(rng):
    """By 1.5 %, all that decodes them counted (as the file of `rows` does, bench/artifact.py)."""
    w = torch.randn(700, 400)
    curvature = t.Curvature(correlated_moments(400).float(), torch.logspace(-2, 2, 700))
    codes, _ = t.GPTQ({MATRIX: w}, tiny(), {MATRIX: curvature}).quantize(MATRIX, w, 1.5)
    codes = codes.numpy().astype(np.int8)
    coded = t.Rans.encode([codes])
    side = lzma.compress(b"".join(coded.numbers), **t.LZMA)
    p = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(p * np.log2(p)).sum() * codes.size / 8
    assert len(side) + len(coded.codes) < 0.985 * entropy


def test_rows_that_matter_more_get_smaller_deltas(matrices):
    _, curvature = matrices
    for c in curvature.values():
        assert (c.deltas.diff(dim=0) <= 0).all()
        assert c.deltas[0] > 4 * c.deltas[-1]


def test_a_bit_buys_the_same_in_every_matrix(rng):
    """A matrix whose outputs matter 16 times as much has deltas a quarter as large."""
    H = correlated_moments(20).float()
    one, other = (t.Curvature(H, torch.full((3,), v)) for v in (0.5, 8.0))
    torch.testing.assert_close(one.deltas, 4 * other.deltas)


def test_dead_inputs_are_no_obstacle(rng):
    H = correlated_moments(30)
    H[[3, 17]] = 0.0
    H[:, [3, 17]] = 0.0
    w, curvature = torch.randn(8, 30), {MATRIX: t.Curvature(H.float(), torch.ones(8))}
    codes, delta = t.GPTQ({MATRIX: w}, tiny(), curvature).quantize(MATRIX, w, 1.0)
    dead = (codes * delta - w)[:, [3, 17]]
    assert (dead.abs() <= delta / 2 * (1 + 1e-5)).all()


def without_factor(bad: float) -> t.Curvature:
    inputs_CC = torch.eye(30)
    inputs_CC[5, 5] = 1e6 * bad
    return t.Curvature(inputs_CC, torch.ones(8))


def with_bad_gradients() -> t.Curvature:
    outputs_R = torch.ones(8)
    outputs_R[3] = float("nan")
    return t.Curvature(correlated_moments(30).float(), outputs_R)


@pytest.mark.parametrize(
    "useless",
    [lambda: without_factor(float("nan")), lambda: without_factor(-1.0), with_bad_gradients],
    ids=["not finite", "negative", "gradients not finite"],
)
def test_a_matrix_whose_curvature_is_useless_is_rounded_by_rows(rng, useless):
    state = {name: torch.randn(8, 30) for name in (MATRIX, OTHER)}
    usable = t.Curvature(correlated_moments(30).float(), torch.ones(8))
    curvature = {MATRIX: usable, OTHER: useless()}
    rows = t.RowQuantizer(state, tiny(), {})
    gptq = t.GPTQ(state, tiny(), curvature)
    assert list(gptq.curvature) == [MATRIX]
    for quantize in (gptq.draft, gptq.quantize):
        found = quantize(OTHER, state[OTHER], 1.3)
        assert all(map(torch.equal, found, rows.quantize(OTHER, state[OTHER], 1.3)))


# ---- the curvature


def plain_curvature(model, ids, target_ids):
    """By the definition, one token's gradient at a time where that is needed: (inputs' moments,
    squared gradients of the outputs) of block 1's MLP. An error in a matrix that runs twice costs
    what it costs in both places."""
    block = model.blocks[1].mlp
    seen = {"fc": [], "proj": []}
    handles = [
        getattr(block, part).register_forward_hook(
            lambda module, args, y, part=part: seen[part].append((args, y))
        )
        for part in seen
    ]
    z_NV = model.logits(hidden_states(model, ids)).flatten(0, 1)
    nll = t.token_nll(z_NV, target_ids.flatten(), 30.0)
    found = {}
    for part, uses in seen.items():
        inputs = torch.cat([args[0].detach().flatten(0, 1).double() for args, _ in uses])
        outputs = 0.0
        for args, y in uses:
            (g,) = torch.autograd.grad(nll.sum(), y, retain_graph=True)
            factor = args[1].detach().double().T if len(args) > 1 else 1.0
            outputs = outputs + (g.flatten(0, 1).double() * factor).square().mean(0)
        found[part] = (sum(torch.outer(v, v) for v in inputs) / len(inputs), outputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def model(corpus, seed) -> t.GPT:
    return shifted(t.GPT(tiny(**corpus, GPTQ_TOKENS=700)), 0.1)


@pytest.fixture
def loader(model) -> t.TokenLoader:
    return t.TokenLoader(model.hp, 0, 1)


def measured(model, loader) -> tuple[dict[str, t.Curvature], int]:
    """From the first batch on."""
    return t.measure_curvature(model, final_passes(model), loader, 0, ALONE)


@pytest.mark.parametrize("switches", [{}, dict(RECUR_LAYERS="1,2", RECUR_TIMES=3)], ids=str)
def test_curvature_is_the_mean_over_training_tokens(corpus, seed, switches):
    model = shifted(t.GPT(tiny(**corpus, GPTQ_TOKENS=700, **switches)), 0.1)
    loader = t.TokenLoader(model.hp, 0, 1)
    batches = zip(*(loader.micro_batch(step, 0) for step in (0, 1)))
    ids, target_ids = (torch.cat(both) for both in batches)
    expected = plain_curvature(model, ids, target_ids)
    found, num_tokens = measured(model, loader)
    assert num_tokens == 1024  # 700 tokens are two batches of 512
    for part, (inputs, outputs) in expected.items():
        c = found[f"blocks.1.mlp.{part}.weight"]
        torch.testing.assert_close(
            c.inputs_CC.double(), inputs, rtol=1e-4, atol=1e-4 * float(inputs.diagonal().mean())
        )
        torch.testing.assert_close(c.outputs_R.double(), outputs, rtol=1e-3, atol=0)


def test_every_coded_matrix_has_a_curvature(model, loader):
    found, _ = measured(model, loader)
    state = model.state_dict()
    assert set(found) == {n for n, w in state.items() if t.largest_code(n, w, model.hp)}
    for name, c in found.items():
        rows, columns = state[name].shape
        assert c.inputs_CC.shape == (columns, columns) and c.outputs_R.shape == (rows,)


def is_unwatched(model) -> bool:
    return not any(module._forward_hooks for module in model.modules())


def test_measuring_leaves_the_model_as_it_was(model, loader):
    before = {n: w.clone() for n, w in model.state_dict().items()}
    measured(model, loader)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert is_unwatched(model)


def test_an_error_in_the_middle_leaves_no_hook_and_no_gradient(model, loader, monkeypatch):
    plain = model.logits
    calls = []

    def failing(hidden):
        calls.append(hidden)
        if len(calls) == 2:
            assert not is_unwatched(model)
            raise KeyboardInterrupt
        return plain(hidden)

    monkeypatch.setattr(model, "logits", failing)
    with pytest.raises(KeyboardInterrupt):
        measured(model, loader)
    assert is_unwatched(model)
    assert all(p.grad is None for p in model.parameters())


def test_the_reserve_is_a_tenth_of_the_clock_at_most():
    reserves = [
        tiny(MAX_WALLCLOCK_SECONDS=s, QUANTIZER=q).gptq_seconds
        for s, q in ((600, "gptq"), (30, "gptq"), (0, "gptq"), (600, "rows"))
    ]
    assert reserves == [4, 3, 0, 0]


def test_rates_end_when_the_time_of_the_steps_does():
    hp = tiny(ITERATIONS=10**6, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=600)
    assert [t.lr_scale(596, seconds, hp) for seconds in (586.0, 596.0)] == pytest.approx(
        [0.5, 0], abs=0.01
    )


def test_measuring_ends_when_its_time_does(corpus, monkeypatch):
    """A clock on which each look takes a second. After the third pass 3 s are gone, and the next,
    at twice the mean, would end after 5 s; the reserve is 4 s."""
    model = t.GPT(tiny(**corpus, MAX_WALLCLOCK_SECONDS=600, GPTQ_TOKENS=512 * 100))
    clock = iter(range(10**6))
    monkeypatch.setattr(t, "perf_counter", lambda: float(next(clock)))
    _, num_tokens = measured(model, t.TokenLoader(model.hp, 0, 1))
    assert num_tokens == 3 * 512


# ---- rows and matrices that training has not touched


def with_dead_rows(state: dict, curvature: dict, share: float, size: float) -> dict:
    """The state with rows of this size in the place of a share of the rows of each matrix."""
    dead = {}
    for name, w in state.items():
        rows = torch.arange(len(w)) * 0.618 % 1 < share  # evenly over rows that matter and others
        dead[name] = torch.where(rows[:, None], torch.randn_like(w) * size, w)
    return dead


@pytest.mark.parametrize(
    "size, share",
    [(0.0, 0.02), (0.0, 0.08), (0.0, 0.7), (1e-38, 0.08), (1e-12, 0.08), (1e-12, 0.4)],
)
def test_rows_next_to_zero_do_not_move_the_step_sizes_of_others(matrices, size, share):
    """Never visited rows of a table are 0, or what weight decay has left of them."""
    state, curvature = matrices
    dead = with_dead_rows(state, curvature, share, size)
    scale, expected = (t.GPTQ(s, tiny(), curvature).scale for s in (dead, state))
    assert 0.3 < scale / expected < 3


@pytest.mark.parametrize(
    "changed",
    [
        dict(outputs_R=torch.zeros(60)),
        dict(outputs_R=torch.full((60,), 1e-38)),
        dict(inputs_CC=torch.zeros(40, 40)),
        dict(inputs_CC=torch.eye(40) * 1e-38),
    ],
    ids=["no gradients", "hardly any", "no inputs", "hardly any inputs"],
)
def test_a_matrix_without_gradients_or_inputs_is_rounded_by_rows_and_moves_no_other(
    matrices, changed
):
    state, curvature = matrices
    name, *others = state
    dead = t.Curvature(curvature[name].inputs_CC, curvature[name].outputs_R)
    dead = t.Curvature(**{**vars_of(dead), **changed})
    assert dead.factors is None
    rest = {other: curvature[other] for other in others}
    one, expected = (t.GPTQ(state, tiny(), c) for c in (rest | {name: dead}, rest))
    assert one.scale == expected.scale
    codes, delta = one.quantize(name, state[name], 1.0)
    plain, same = t.RowQuantizer(state, tiny(), {}).quantize(name, state[name], 1.0)
    assert torch.equal(codes, plain) and torch.equal(delta, same)


def vars_of(c: t.Curvature) -> dict[str, torch.Tensor]:
    return dict(inputs_CC=c.inputs_CC, outputs_R=c.outputs_R)


def test_some_rows_without_gradients_keep_step_sizes_near_those_of_others(matrices):
    """A row that seems not to matter gets at most ten times the mean row's."""
    _, curvature = matrices
    for c in curvature.values():
        outputs_R = torch.where(torch.arange(len(c.outputs_R)) < 20, 0.0, 1.0)
        deltas = t.Curvature(c.inputs_CC, outputs_R).deltas
        assert deltas.max() < 13 * deltas.min()


def test_a_state_of_zeros_can_be_packed(matrices):
    state, curvature = matrices
    zeros = {name: torch.zeros_like(w) for name, w in state.items()}
    packed = t.compress(zeros, tiny(), curvature, 100_000)
    _, back = t.decompress(packed.container.blob, zeros)
    assert all(torch.equal(back[name], w) for name, w in zeros.items())
    assert packed.container.levels == 0


@pytest.mark.parametrize("dead", ["rows", "matrix", "gradients", "matrix and gradients"])
@pytest.mark.parametrize("share", [0.35, 0.6])
def test_what_fits_by_rows_fits_by_gptq(matrices, dead, share):
    """Dead parts are no reason to refuse a model."""
    state, curvature = matrices
    name = next(iter(state))
    if dead == "rows":
        state = with_dead_rows(state, curvature, 0.3, 0.0)
    if "matrix" in dead:
        state = state | {name: torch.zeros_like(state[name])}
    if "gradients" in dead:
        nothing = t.Curvature(curvature[name].inputs_CC, torch.zeros(60))
        curvature = curvature | {name: nothing}
    budget = int(share * len(t.pack(state, tiny()).blob))
    sizes = [len(t.compress(state, tiny(), c, budget).container.blob) for c in (curvature, {})]
    assert all(budget - t.TOLERANCE < size <= budget for size in sizes)


def test_rows_that_matter_a_thousand_times_as_much_are_no_reason_to_refuse_a_model():
    """They have steps so fine that 254 times the natural ones leaves large codes."""
    w = torch.randn(60, 40)
    outputs_R = torch.where(torch.arange(60) < 30, 1e9, 1.0)
    curvature = {MATRIX: t.Curvature(correlated_moments(40).float(), outputs_R)}
    state = {MATRIX: w, OTHER: torch.randn(60, 40) * 1e-3}
    curvature[OTHER] = t.Curvature(correlated_moments(40).float() * 1e-9, torch.ones(60))
    least = len(t.pack(state, tiny(), t.COARSEST).blob)
    assert len(t.compress(state, tiny(), curvature, least).container.blob) <= least


def test_step_sizes_stay_finite_however_coarse(matrices):
    """Else a file would be written that nobody can read: 0 times infinity is no number."""
    state, curvature = matrices
    quantizer = t.GPTQ(state, tiny(), curvature)
    _, back = t.decompress(t.pack(state, tiny(), 1e45, quantizer.draft).blob, state)
    assert all(w.isfinite().all() for w in back.values())
