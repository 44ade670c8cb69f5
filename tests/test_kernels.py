"""Kernels against float64 references: in Triton's interpreter,
or on the GPU where there is one (see conftest.py)."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, final_passes, loss_of, scores_of, shifted, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from record.tables import settings_page

if t.triton is None:
    pytest.skip("no Triton for this platform", allow_module_level=True)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies bfloat16 matrices wrongly (as the integers that hold them),
# so there float16 stands for it.
HALF = torch.bfloat16 if CUDA else torch.float16
# TF32 on CUDA
EPS = {torch.float32: 2e-3 if CUDA else 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SMALL = dict(BM=16, BN=32, BK=16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def small_tiles(monkeypatch):
    """The interpreter works through a tile whatever is in it."""
    monkeypatch.setattr(t, "MLP_TILE", SMALL)


def random(*shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def gradients(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream)


def assert_near(found, expected, eps, what="", size=1e-30):
    """Within `eps` of the largest number, or of `size`: sums err by the size of what is summed."""
    expected, error = expected.double(), (found.double() - expected).abs().max()
    assert error <= eps * max(expected.abs().max(), size) + 1e-30, (
        what,
        float(error),
        float(expected.abs().max()),
    )


# --- MLP ------------------------------------------------------------------------------------------


def plain_mlp(x, fc, proj, slope, g):
    """Result and gradients of the plain form in float64."""
    inputs = [v.detach().double().requires_grad_() for v in (x, fc, proj)]
    y = F.linear(F.leaky_relu(F.linear(inputs[0], inputs[1]), slope) ** 2, inputs[2])
    return y, *gradients(y, inputs, g.double())


def check_mlp(x, fc, proj, slope, g):
    """Result and gradients of the kernel against those of the plain form."""
    y, _, _ = t.fused_mlp(x, fc, proj, slope)
    found = y, *gradients(y, (x, fc, proj), g)
    exact = plain_mlp(x, fc, proj, slope, g)
    # Sums err by the size of what is summed: of magnitudes alone nothing cancels.
    sizes = plain_mlp(x.abs(), fc.abs(), proj.abs(), 1.0, g.abs())
    for name, a, b, size in zip(("y", "dx", "dfc", "dproj"), found, exact, sizes):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert_near(a, b, EPS[x.dtype] * (4 if CUDA else 1), name, size.abs().max())


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 50),
    st.integers(1, 70),
    st.sampled_from([0.5, 0.9, 0.0, 1.0, -0.3]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_mlp_of_any_size_equals_float64(N, D, W, slope, seed, half):
    torch.manual_seed(seed)
    dtype, plain = HALF if half else torch.float32, t.MLP_TILE
    t.MLP_TILE = SMALL
    try:
        x = random(N, D, dtype=dtype)
        fc = random(W, D, dtype=dtype)
        proj = random(D, W, dtype=dtype, scale=W**-0.5)
        check_mlp(x, fc, proj, slope, random(N, D, dtype=dtype).detach())
    finally:
        t.MLP_TILE = plain


def test_mlp_with_the_tiles_that_are_shipped(rng):
    x = random(130, 65, dtype=HALF)
    fc = random(260, 65, dtype=HALF)
    proj = random(65, 260, dtype=HALF, scale=0.06)
    check_mlp(x, fc, proj, 0.5, random(130, 65, dtype=HALF).detach())


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_mlp_of_extreme_values(rng, small_tiles, scale):
    check_mlp(
        random(20, 24, scale=scale), random(33, 24), random(24, 33), 0.5, random(20, 24).detach()
    )


def test_mlp_of_zeros_is_zero_and_has_no_gradient(small_tiles):
    x, fc, proj = (
        torch.zeros(s, device=DEVICE, requires_grad=True) for s in ((5, 8), (9, 8), (8, 9))
    )
    y, z, h = t.fused_mlp(x, fc, proj, 0.5)
    assert not any(v.any() for v in (y, z, h, *gradients(y, (x, fc, proj), torch.ones_like(y))))


def test_mlp_of_inputs_that_are_not_contiguous(rng, small_tiles):
    x, fc, proj = random(24, 40).T, random(24, 33).T, random(33, 24).T
    check_mlp(
        *(v.detach().requires_grad_() for v in (x, fc, proj)),
        0.5,
        torch.ones((), device=DEVICE).expand(40, 24),
    )


def test_mlp_kernel_writes_nothing_outside_of_its_matrix(rng, small_tiles):
    """Rows and columns that do not fill the tiles."""
    x = random(19, 24).detach()
    fc = random(37, 24).detach()
    guard = torch.full((40, 37), 7.0, device=DEVICE)
    t.launch_mlp(x, fc.mT, guard[:19], 0.5, False)
    assert (guard[19:] == 7).all() and not (guard[:19] == 7).any()


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck_of_the_mlp(rng, small_tiles):
    """Inputs and steps are multiples of 1/64, which TF32, a GPU's float32 product, holds exactly:
    rounded, a step of 0.01 was 2.4 % off on an H200."""
    grid = 2**-6
    shapes = ((4, 5), (6, 5), (5, 6))
    inputs = [((random(*s).detach() / grid).round() * grid).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(
        lambda *args: t.fused_mlp(*args, 0.5)[0], inputs, eps=grid, atol=0.1, rtol=0.02
    )


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """Triton's compiler refuses what its interpreter takes; and each tile must fit a
    multiprocessor's shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.compile_kernels"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    kernels = {name for name in vars(t) if name.endswith("_kernel")}
    assert {name for _, name, _ in rows} == kernels and len(rows) == 4
    assert all(
        int(shared) <= {"90": 232_448, "89": 101_376}[architecture]
        for architecture, _, shared in rows
    )


# --- as ops ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_every_op(rng, small_tiles):
    """Schemas, fake results and autograd registrations, as torch.library checks them."""
    x, fc, proj, z = random(7, 5), random(6, 5), random(5, 6), random(7, 6).detach()
    cases = [
        (t.fused_mlp, (x, fc, proj, 0.5)),
        (t.fused_mlp_backward, (random(7, 5).detach(), proj.detach(), z, 0.5)),
    ]
    ops = {v for v in vars(t).values() if isinstance(v, torch._library.custom_ops.CustomOpDef)}
    assert {op for op, _ in cases} == ops, "an op without a case here"
    for op, args in cases:
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_the_record_tools_leave_the_ops_to_the_loaded_kernels(rng, kernels_on, monkeypatch):
    """A second load of the script would register them anew, without the interpreter."""
    with monkeypatch.context() as elsewhere:  # as under other tests
        elsewhere.delenv("TRITON_INTERPRET", raising=False)
        settings_page(ROOT / "train_gpt.py")
    t.fused_mlp(random(7, 5), random(6, 5), random(5, 6), 0.5)
    assert kernels_on == [t.mlp_kernel.kernel]


class Watched:
    """A kernel that notes its launches: kernel[grid](...)."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel)
        return self.kernel[grid]


@pytest.fixture
def kernels_on(monkeypatch, small_tiles):
    """The model takes the kernel's way, on the CPU too; its launches."""
    launches = []
    monkeypatch.setattr(t, "has_kernels", lambda x: True)
    monkeypatch.setattr(t, "mlp_kernel", Watched(t.mlp_kernel, launches))
    return launches


def small_model(**changes):
    model = shifted(t.GPT(tiny(**dict(NUM_LAYERS=2, VE_LAYERS="1") | changes)).to(DEVICE))
    ids = torch.randint(0, 512, (2, 33), device=DEVICE)
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def without_kernels(model):
    """The same weights in a model whose switch is off."""
    settings = model.hp.as_env() | dict(FUSED_MLP="0")
    plain = t.GPT(t.Hyperparameters.from_env(settings)).to(DEVICE)
    plain.load_state_dict(model.state_dict())
    return plain


def sizes_of_gradients(model, ids, target_ids):
    """Per parameter the largest number in gradients of losses with random signs. In the mean over
    the targets what they want of one scalar may cancel to nearly nothing; not in all of these."""
    sizes = [0.0] * len(list(model.parameters()))
    for _ in range(4):
        signs = torch.randint(0, 2, target_ids.shape, device=DEVICE) * 2.0 - 1
        loss = loss_of(model, ids, target_ids, signs / target_ids.numel())
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        sizes = [max(size, g.abs().max().item()) for size, g in zip(sizes, gradient)]
    return sizes


def test_the_model_with_kernels_equals_the_model_without(rng, kernels_on):
    model, ids, target_ids = small_model()
    loss = loss_of(model, ids, target_ids)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert len(kernels_on) == 4  # forward and backward, two layers
    other = without_kernels(model)
    plain = loss_of(other, ids, target_ids)
    expected = torch.autograd.grad(plain, list(other.parameters()))
    sizes = sizes_of_gradients(other, ids, target_ids)
    assert len(kernels_on) == 4
    eps = 0.02 if CUDA else 1e-5
    assert_near(loss, plain, eps)
    for (name, _), a, b, size in zip(model.named_parameters(), found, expected, sizes):
        assert_near(a, b, 4 * eps, name, size)


def test_the_switch_turns_the_kernel_off(rng, kernels_on):
    model, ids, target_ids = small_model(FUSED_MLP=0)
    loss_of(model, ids, target_ids).backward()
    assert not kernels_on


def test_scoring_with_kernels_equals_scoring_without(rng, kernels_on, monkeypatch):
    model, _, _ = small_model()
    tokens = rng.integers(0, 512, 61).astype(np.uint16)
    found = scores_of(model, tokens, 8)
    monkeypatch.setattr(t, "has_kernels", lambda x: False)
    plain = scores_of(model, tokens, 8)
    np.testing.assert_allclose(found, plain, rtol=2e-4, atol=2e-5)
    assert kernels_on


@pytest.mark.filterwarnings("ignore")
def test_compiled_graphs_keep_the_ops_and_do_not_break(rng, kernels_on):
    """One graph, in which each op stands as a node; same loss and gradients as uncompiled."""
    model, ids, target_ids = small_model(NUM_LAYERS=1, VE_LAYERS="0")
    passes = final_passes(model)
    seen = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(t.training_loss, backend=backend, fullgraph=True, dynamic=False)
    loss = compiled(model, ids, target_ids, passes)
    found = torch.autograd.grad(loss, list(model.parameters()))
    plain = t.training_loss(model, ids, target_ids, passes)
    assert sum("golf.fused_mlp" in name for name in seen) == 1
    expected = torch.autograd.grad(plain, list(model.parameters()))
    sizes = sizes_of_gradients(without_kernels(model), ids, target_ids)
    assert_near(loss, plain, 1e-5 if not CUDA else 0.02)
    for a, b, size in zip(found, expected, sizes):
        assert_near(a, b, 4e-5 if not CUDA else 0.05, size=size)


def test_without_triton_the_plain_forms_run():
    """Kernels are asked for, CUDA is said to be there, Triton is not."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, train_gpt as t\n"
        "class OnCuda: is_cuda = True\n"
        "assert t.triton is None and not t.has_kernels(OnCuda())\n"
        "sizes = dict(num_layers=4, model_dim=64, num_heads=4, num_kv_heads=4, ve_layers=(3,), "
        "train_seq_len=32)\n"
        "model = t.GPT(t.Hyperparameters(**sizes))\n"
        "ids = torch.zeros(1, 32, dtype=torch.int64)\n"
        "model(ids, ids, (0, 1, 2, 3)).backward()"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
