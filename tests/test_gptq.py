"""GPTQ: what it rounds, against the textbook; where its steps come from; how it gets there."""

import lzma

import numpy as np
import pytest
import torch
from helpers import tiny

import train_gpt as t

ALONE = t.Ranks({})


def correlated(count: int, tokens: int | None = None):
    """Moments (float64) of inputs of very different scales, which go together."""
    x = torch.randn(tokens or 4 * count, count, dtype=torch.float64)
    x = x @ torch.randn(count, count, dtype=torch.float64) * torch.logspace(-1, 1, count)
    return x.T @ x / len(x)


def textbook_codes(w_RC, step_R, H_CC):
    """GPTQ, one column at a time, its inverse Hessian by Gaussian elimination (2210.17323, 3)."""
    w, inverse = w_RC.clone(), torch.linalg.inv(H_CC)
    codes = torch.zeros_like(w)
    for c in range(w.size(1)):
        codes[:, c] = (w[:, c] / step_R).round().clamp(-127, 127)
        error = (w[:, c] - codes[:, c] * step_R) / inverse[c, c]
        w[:, c:] -= torch.outer(error, inverse[c, c:])
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return codes


def upper_factor(H_CC):
    return torch.linalg.cholesky(torch.linalg.inv(H_CC), upper=True)


@pytest.mark.parametrize("columns", [1, 5, 128, 129, 300])
def test_gptq_is_the_textbooks_column_by_column_update(rng, columns):
    w = torch.randn(9, columns, dtype=torch.float64)
    step, H = torch.rand(9, dtype=torch.float64) + 0.1, correlated(columns)
    codes = t.round_in_turn(w.T, step, upper_factor(H)).T
    assert torch.equal(codes, textbook_codes(w, step, H))


def test_with_independent_inputs_gptq_is_plain_rounding(rng):
    w, step = torch.randn(40, 300), torch.rand(40) + 0.1
    codes = t.round_in_turn(w.T, step, torch.eye(300)).T
    assert torch.equal(codes, (w / step[:, None]).round().clamp(-127, 127))


def weighted_error(curvature, w, codes, step):
    """Nats per token, by the curvature."""
    e = (codes * step - w).double()
    return (
        float(
            (curvature.outputs_R.double() * ((e @ curvature.inputs_CC.double()) * e).sum(1)).sum()
        )
        / 2
    )


@pytest.fixture
def matrices(rng):
    """(state, curvature): matrices whose rows and inputs matter differently."""
    state = {f"{i}.weight": torch.randn(60, 40 + 30 * i) * 0.1 * 2.0**-i for i in range(3)}
    curvature = {
        name: t.Curvature(correlated(w.size(1)).float(), torch.logspace(-3 - i, i, 60))
        for i, (name, w) in enumerate(state.items())
    }
    return state, curvature


def gptq_of(state, hp, curvature):
    return t.build_gptq(state, hp, curvature, t.RunLog())


@pytest.mark.parametrize("coarsen", [0.5, 1.0, 4.0, 16.0])
def test_weighted_error_is_below_that_of_rounding_to_the_same_steps(matrices, coarsen):
    state, curvature = matrices
    gptq = gptq_of(state, tiny(), curvature)
    for name, w in state.items():
        plain, turned = (q.quantize(name, w, coarsen) for q in (gptq.draft, gptq))
        assert torch.equal(plain[1], turned[1])
        assert weighted_error(curvature[name], w, *turned) < weighted_error(
            curvature[name], w, *plain
        )


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_at_equal_bytes_the_weighted_error_is_at_most_half_that_of_rows(matrices, bits):
    state, curvature = matrices
    hp = tiny(QUANT_BITS=bits, FILL_BUDGET=1)
    budget = len(t.pack(state, hp).blob) + t.AIM
    lost = []
    for quantizer in (t.RowQuantizer(hp), gptq_of(state, hp, curvature)):
        packed, _ = t.fit_artifact(state, hp, budget, quantizer)
        back = t.unpack(packed.blob)
        assert len(packed.blob) <= budget
        lost.append(sum(weighted_error(curvature[n], w, back[n], 1.0) for n, w in state.items()))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("bits", [3, 7, 8])
def test_the_file_is_the_codes_of_gptq_at_every_width(matrices, bits):
    state, curvature = matrices
    gptq = gptq_of(state, tiny(QUANT_BITS=bits), curvature)
    back = t.unpack(t.pack(state, gptq.rows.hp, 1.0, gptq).blob)
    for name, w in state.items():
        codes, step = gptq.quantize(name, w, 1.0)
        assert torch.equal(back[name], codes * step), name


@pytest.mark.parametrize("bits", [7, 8])
def test_with_codes_to_spare_the_weighted_error_is_still_below_that_of_rows(matrices, bits):
    """Steps are then held back by the largest code, and rows' are fine already."""
    state, curvature = matrices
    hp = tiny(QUANT_BITS=bits)
    budget = len(t.pack(state, hp).blob)
    lost = []
    for quantizer in (t.RowQuantizer(hp), gptq_of(state, hp, curvature)):
        packed, _ = t.fit_artifact(state, hp, budget, quantizer)
        back = t.unpack(packed.blob)
        lost.append(sum(weighted_error(curvature[n], w, back[n], 1.0) for n, w in state.items()))
    assert lost[1] < lost[0]


def test_codes_of_gptq_take_less_than_their_zeroth_order_entropy(rng):
    """By 1.5 %, all that decodes them counted (as the file of `rows` does, bench/artifact.py)."""
    w = torch.randn(700, 400)
    curvature = {"a.weight": t.Curvature(correlated(400).float(), torch.logspace(-2, 2, 700))}
    codes, _ = gptq_of({"a.weight": w}, tiny(), curvature).quantize("a.weight", w, 1.5)
    codes = codes.numpy().astype(np.int8)
    freq, classes, words, _ = t.encode_matrices([codes])
    side = lzma.compress(b"".join([freq, *classes]), **t.LZMA)
    p = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(p * np.log2(p)).sum() * codes.size / 8
    assert len(side) + len(words) < 0.985 * entropy


def test_natural_steps_are_those_of_rows_on_average(matrices):
    state, curvature = matrices
    gptq, rows = gptq_of(state, tiny(), curvature), t.RowQuantizer(tiny())
    mean = [
        sum(float(q.quantize(n, w, 1.0)[1].log2().mean()) * w.numel() for n, w in state.items())
        / sum(w.numel() for w in state.values())
        for q in (gptq, rows)
    ]
    # rows' steps reach from the largest weight, which GPTQ's may not pass
    assert mean[0] == pytest.approx(mean[1], abs=0.2)


def test_rows_that_matter_more_get_finer_steps(matrices):
    _, curvature = matrices
    for c in curvature.values():
        assert (c.steps.diff(dim=0) <= 0).all()
        assert c.steps[0] > 4 * c.steps[-1]


def test_a_bit_buys_the_same_in_every_matrix(rng):
    """A matrix whose outputs matter 16 times as much has steps a quarter as long."""
    H = correlated(20).float()
    one, other = (t.Curvature(H, torch.full((3,), v)) for v in (0.5, 8.0))
    torch.testing.assert_close(one.steps, 4 * other.steps)


def test_codes_stay_within_eight_bits_however_fine(matrices):
    state, curvature = matrices
    gptq = gptq_of(state, tiny(), curvature)
    for name, w in state.items():
        codes, _ = gptq.quantize(name, w, 1e-6)
        assert codes.abs().max() <= 127


def test_dead_inputs_are_no_obstacle(rng):
    H = correlated(30)
    H[[3, 17]] = 0.0
    H[:, [3, 17]] = 0.0
    w, curvature = torch.randn(8, 30), {"a.weight": t.Curvature(H.float(), torch.ones(8))}
    codes, step = gptq_of({"a.weight": w}, tiny(), curvature).quantize("a.weight", w, 1.0)
    dead = (codes * step - w)[:, [3, 17]]
    assert (dead.abs() <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_without_a_cholesky_factor_a_matrix_is_rounded_by_rows(rng, bad):
    state = {"a.weight": torch.randn(8, 30), "b.weight": torch.randn(8, 30)}
    H, broken = correlated(30).float(), torch.eye(30)
    broken[5, 5] = 1e6 * bad
    curvature = {
        "a.weight": t.Curvature(H, torch.ones(8)),
        "b.weight": t.Curvature(broken, torch.ones(8)),
    }
    lines = []
    gptq = t.build_gptq(state, tiny(), curvature, lines.append)
    assert len(lines) == 1 and "b.weight" in lines[0] and "rounded by rows" in lines[0]
    found = gptq.quantize("b.weight", state["b.weight"], 1.3)
    expected = t.RowQuantizer(tiny()).quantize("b.weight", state["b.weight"], 1.3)
    assert all(map(torch.equal, found, expected))


def test_with_gradients_that_are_not_finite_a_matrix_is_rounded_by_rows(rng):
    state, outputs = {"a.weight": torch.randn(8, 30)}, torch.ones(8)
    outputs[3] = float("nan")
    curvature, lines = {"a.weight": t.Curvature(correlated(30).float(), outputs)}, []
    gptq = t.build_gptq(state, tiny(), curvature, lines.append)
    assert len(lines) == 1 and "a.weight" in lines[0] and "rounded by rows" in lines[0]
    found = gptq.quantize("a.weight", state["a.weight"], 1.3)
    expected = t.RowQuantizer(tiny()).quantize("a.weight", state["a.weight"], 1.3)
    assert all(map(torch.equal, found, expected))


def test_few_passes_of_gptq_find_what_fits(matrices, monkeypatch):
    """Drafts, which carry nothing on, find the steps first."""
    rounded, plain = [], t.round_in_turn

    def counted(*args):
        rounded.append(args)
        return plain(*args)

    monkeypatch.setattr(t, "round_in_turn", counted)
    state, curvature = matrices
    hp = tiny()
    budget = len(t.pack(state, hp).blob)
    for share in (0.5, 0.8, 0.95):
        rounded.clear()
        gptq = gptq_of(state, hp, curvature)
        packed, _ = t.fit_artifact(state, hp, int(share * budget), gptq)
        assert len(packed.blob) <= share * budget
        assert 0 < len(rounded) <= 4 * len(state)


# ---- the curvature


def plain_curvature(model, ids, targets):
    """By the definition, one token's gradient at a time where that is needed: (inputs' moments,
    squared gradients of the outputs) of block 1's MLP."""
    block = model.blocks[1].mlp
    seen = {}
    handles = [
        getattr(block, part).register_forward_hook(
            lambda module, args, y, part=part: seen.update({part: (args, y)})
        )
        for part in ("fc", "proj")
    ]
    nll = t.token_nll(model.logits(model.hidden(ids)).flatten(0, 1), targets.flatten(), 30.0)
    found = {}
    for part, (args, y) in seen.items():
        x = args[0].detach().flatten(0, 1).double()
        (g,) = torch.autograd.grad(nll.sum(), y, retain_graph=True)
        factor = args[1].detach().double().T if len(args) > 1 else 1.0
        found[part] = (
            sum(torch.outer(v, v) for v in x) / len(x),
            (g.flatten(0, 1).double() * factor).square().mean(0),
        )
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def trainer(corpus):
    hp = tiny(**corpus, GPTQ_TOKENS=700)
    model = t.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return t.Trainer(model, t.TokenLoader(hp, 0, 1), None, ALONE, t.RunLog(), t.StopSignal())


def test_curvature_is_the_mean_over_training_tokens(trainer):
    ids, targets = (
        torch.cat(both) for both in zip(*(trainer.loader.micro_batch(step, 0) for step in (0, 1)))
    )
    expected = plain_curvature(trainer.model, ids, targets)
    found = t.measure_curvature(trainer)  # 700 tokens are two batches of 512
    for part, (inputs, outputs) in expected.items():
        c = found[f"blocks.1.mlp.{part}.weight"]
        torch.testing.assert_close(
            c.inputs_CC.double(), inputs, rtol=1e-4, atol=1e-4 * float(inputs.diagonal().mean())
        )
        torch.testing.assert_close(c.outputs_R.double(), outputs, rtol=1e-3, atol=0)


def test_every_coded_matrix_has_a_curvature(trainer):
    found = t.measure_curvature(trainer)
    state = trainer.model.state_dict()
    assert set(found) == {n for n, w in state.items() if t.natural_levels(n, w, trainer.hp)}
    for name, c in found.items():
        rows, columns = state[name].shape
        assert c.inputs_CC.shape == (columns, columns) and c.outputs_R.shape == (rows,)


def test_measuring_leaves_the_model_as_it_was(trainer):
    model = trainer.model
    before = {n: w.clone() for n, w in model.state_dict().items()}
    t.measure_curvature(trainer)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(block.mlp.fused == model.hp.fused_mlp for block in model.blocks)
    assert not any(m._forward_hooks for m in model.modules())


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


def test_measuring_ends_when_its_time_does(trainer, monkeypatch):
    """A clock on which each look takes a second: passes end before the reserve of 4 s does."""
    trainer.hp.__dict__.update(max_wallclock_seconds=600.0, gptq_tokens=512 * 100)
    clock = iter(range(10**6))
    monkeypatch.setattr(t, "perf_counter", lambda: float(next(clock)))
    before = trainer.seconds
    t.measure_curvature(trainer)
    assert 0 < trainer.seconds - before <= 4
