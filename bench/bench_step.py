#!/usr/bin/env python3
"""A training step: the work in it, counted, and the time it takes,
measured with each switch off in turn.

    python bench/bench_step.py [--steps 10] [--rounds 3] [--count] [--only VARIANT ...]
        settings: train_gpt.py's environment variables

Counted, without a GPU and without computing anything (meta tensors): per step and kind of operation
the FLOPs and the bytes that cross the memory bus if each operation reads its inputs and writes its
outputs, in the dtypes of CUDA, with the project's kernels. The elementwise row is what the
compiler's fusion can save (bench_fusion.py: what it does save). `floor`: the larger of FLOPs and
bytes at an H100's datasheet rates.
Measured, on a GPU, or on a CPU with settings that suit it: ms per step (median of the rounds,
variants in turn), tokens/s, MFU: the counted FLOPs of products and attention over the fastest
bfloat16 product seen in the same run (float32 on a CPU), the ratio to the plain compiled model, and
the kernels that take most time. On a GPU also: the compiled bfloat16 model with kernels against the
uncompiled float32 one without, and the MLP kernel with other tiles against the compiled plain form.
--count: only the first table. --only: of the measurements, only the steps of these variants, the
ratio to the first of them. Batches are random tokens, in one process.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch._inductor import config as inductor_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

PLAIN = "plain, compiled"
NO_MIX_ORDER = "mix-order reduction off"
PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12  # per second, H100 SXM: dense bfloat16; HBM3
KINDS = {
    "products": ("mm", "bmm", "addmm", "fused_mlp"),
    "loss": ("_log_softmax", "nll_loss", "tanh"),
    "tables": ("embedding", "index", "gather", "scatter"),
}


TILES = [
    dict(BM=m, BN=n, BK=k, num_warps=w, num_stages=s)
    for m, n, k, w, s in (
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (256, 128, 64, 8, 3),
        (64, 256, 64, 4, 4),
        (128, 256, 32, 8, 4),
    )
]


# --- counting -------------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(**names):
    """Other values for names of train_gpt."""
    plain = {name: getattr(t, name) for name in names}
    vars(t).update(names)
    try:
        yield
    finally:
        vars(t).update(plain)


def settings() -> t.Hyperparameters:
    """Those of the environment; ends the process with a line where they cannot work."""
    try:
        return t.Hyperparameters.from_env(dict(os.environ))
    except t.UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def micro_batch_rows(hp: t.Hyperparameters) -> int:
    """Sequences in the largest micro-batch of one rank."""
    return max(1, min(hp.micro_batch_tokens, hp.train_batch_tokens) // hp.train_seq_len)


def as_on_cuda():
    """A model on the CPU, or of meta tensors, takes the way it takes on CUDA."""
    return patched(working_dtype=lambda x: torch.bfloat16, has_kernels=lambda x: True)


@register_flop_formula(torch.ops.golf.fused_mlp)
def mlp_flops(x, fc, proj, slope, **_) -> int:
    return 4 * x[0] * fc[0] * fc[1]


@register_flop_formula(torch.ops.golf.fused_mlp_backward)
def mlp_backward_flops(g, proj, z, slope, **_) -> int:
    return 2 * g[0] * proj[0] * proj[1]


class Tally(TorchDispatchMode):
    """(FLOPs, bytes) of every operation by phase and kind. Views move nothing."""

    def __init__(self):
        super().__init__()
        self.phase, self.found = "", defaultdict(lambda: [0.0, 0.0])

    def add(self, kind: str, flops: float, size: float) -> None:
        entry = self.found[self.phase, kind]
        entry[0] += flops
        entry[1] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = all(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not (func._schema.returns and views):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            name = func._schema.name.split("::")[1]
            kind = next(
                (kind for kind, names in KINDS.items() if name.startswith(names)), "elementwise"
            )
            flops = (
                flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
                if func._overloadpacket in flop_registry
                else 0
            )
            self.add(kind, flops, sum(stored(x) for x in tensors))
        return out


def stored(x: torch.Tensor) -> int:
    """Bytes of the distinct elements of `x`: an expanded dimension is read once."""
    sizes = (size for size, stride in zip(x.shape, x.stride()) if stride)
    return int(torch.Size(sizes).numel()) * x.element_size() if x.numel() else 0


class Attention(torch.autograd.Function):
    """What a fused attention moves and computes (FlashAttention, 2205.14135): no T x T matrix,
    half of the scores."""

    @staticmethod
    def forward(ctx, tally, q_BTHK, k_BTGK, v_BTGK):
        ctx.tally, ctx.shapes = tally, [x.shape for x in (q_BTHK, k_BTGK, v_BTGK)]
        B, T, H, K = q_BTHK.shape
        ctx.flops = 2 * B * H * T * T * K
        ctx.bytes = sum(map(stored, (q_BTHK, q_BTHK, k_BTGK, v_BTGK)))
        tally.add("attention", ctx.flops, ctx.bytes)
        return torch.empty_like(q_BTHK)

    @staticmethod
    def backward(ctx, grad):
        ctx.tally.add("attention", 2.5 * ctx.flops, 2 * ctx.bytes)
        return None, *(grad.new_empty(shape) for shape in ctx.shapes)


def count(hp: t.Hyperparameters) -> dict[tuple[str, str], list[float]]:
    """(phase, kind) -> [FLOPs, bytes] of one step on one GPU, all its micro-batches."""
    passes = -(-hp.train_batch_tokens // max(hp.micro_batch_tokens, hp.train_seq_len))
    rows = hp.train_batch_tokens // hp.train_seq_len // passes
    tally = Tally()
    with torch.device("meta"):
        model, ids = t.GPT(hp), torch.zeros(rows, hp.train_seq_len, dtype=torch.int64)
        muon, adamw = t.build_optimizers(model, hp, t.Ranks({}))
    attention = patched(
        causal_attention=lambda q, k, v, flash=None: Attention.apply(tally, q, k, v)
    )
    with as_on_cuda(), attention, tally:
        tally.phase = "forward"
        loss = t.training_loss(model, ids, ids, None)
        tally.phase = "backward"
        loss.backward()
        for entry in tally.found.values():
            entry[:] = [passes * number for number in entry]
        tally.phase = "optimizer"
        # one fused kernel: parameter, gradient and two moments in; parameter and moments out
        adamw.step = lambda: tally.add(
            "elementwise",
            0,
            sum(7 * stored(p) for group in adamw.param_groups for p in group["params"]),
        )
        t.update([muon, adamw], hp.grad_clip_norm)
    return dict(tally.found)


def print_count(hp: t.Hyperparameters) -> float:
    """The table; returns the FLOPs of a step."""
    found = count(hp)
    print(
        f"counted, one step of {hp.train_batch_tokens:,} tokens (x {hp.train_seq_len}), all on one "
        "GPU\n\n"
        f"{'phase':10} {'kind':12} {'TFLOP':>9} {'GB moved':>9} {'floor ms':>9}"
    )
    floors = {}
    for (phase, kind), (flops, size) in sorted(found.items()):
        floors[phase, kind] = 1e3 * max(flops / PEAK_FLOPS, size / PEAK_BYTES)
        print(
            f"{phase:10} {kind:12} {flops / 1e12:>9.4g} {size / 1e9:>9.4g} "
            f"{floors[phase, kind]:>9.4g}"
        )
    flops, size = (sum(entry[i] for entry in found.values()) for i in (0, 1))
    whole = sum(floors.values())
    waste = sum(ms for (_, kind), ms in floors.items() if kind == "elementwise")
    print(
        f"{'all':10} {'':12} {flops / 1e12:>9.4g} {size / 1e9:>9.4g} {whole:>9.4g}   elementwise "
        f"{waste / whole:.0%}; without it {whole - waste:.4g} ms; on 8 GPUs an eighth, but the "
        "optimizer"
    )
    return flops


# --- measuring ------------------------------------------------------------------------------------


class RandomTokens:
    """A TokenLoader of one rank without data."""

    def __init__(self, hp: t.Hyperparameters):
        rows = hp.train_batch_tokens // hp.train_seq_len
        most = max(1, hp.micro_batch_tokens // hp.train_seq_len)
        self.accumulation = next(
            n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most
        )
        self.ids = torch.randint(
            0, hp.vocab_size, (rows // self.accumulation, hp.train_seq_len + 1)
        )

    def micro_batch(self, step: int, micro: int):
        return self.ids[:, :-1].contiguous(), self.ids[:, 1:].contiguous()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call, times: int) -> float:
    """Seconds per call."""
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize()
    return (time.perf_counter() - start) / times


def ceiling(device: torch.device) -> float:
    """FLOP/s of the fastest of a few large square products."""
    sizes, dtype = (
        ((4096, 8192), torch.bfloat16) if device.type == "cuda" else ((512, 1024), torch.float32)
    )
    best = 0.0
    for n in sizes:
        a = torch.randn(n, n, device=device, dtype=dtype)
        timed(lambda a=a: a @ a, 2)
        best = max(best, 2 * n**3 / min(timed(lambda a=a: a @ a, 5) for _ in range(3)))
    return best


def flash_attention_4():
    """FlashAttention 4 for the model, or None: it is not installed, or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    with contextlib.suppress(ImportError):
        from flash_attn.cute import flash_attn_func

        return torch.compiler.disable(flash_attn_func)  # its kernels have a compiler of their own
    return None


def new_trainer(hp: t.Hyperparameters, ranks: t.Ranks, flash=None, **changes) -> t.Trainer:
    """On random tokens, with `changes` to the settings; `flash`: a function that replaces the
    model's choice of attention, or "torch" for torch's own."""
    torch.manual_seed(hp.seed)
    changed = dataclasses.replace(hp, **changes)
    model = t.GPT(changed).to(ranks.device)
    for block in model.blocks if flash else ():
        block.attn.flash = None if flash == "torch" else flash
    return t.Trainer(model, RandomTokens(changed), None, ranks, t.RunLog(), t.StopSignal())


def without_mix_order(hp: t.Hyperparameters, ranks: t.Ranks) -> t.Trainer:
    """Compiled without fusing reductions along rows with reductions along columns, as by
    TORCHINDUCTOR_MIX_ORDER_REDUCTION=0; the options give it a graph of its own."""
    trainer = new_trainer(hp, ranks)
    options = {"triton.mix_order_reduction": False}
    trainer.loss = torch.compile(t.training_loss, dynamic=False, options=options)
    return trainer


def variants(hp: t.Hyperparameters, ranks: t.Ranks, only=()) -> dict[str, t.Trainer]:
    """Name -> a trainer with one switch off. `only`: names of those to make."""
    on_gpu = ranks.device.type == "cuda"
    is_compiled = hp.compile == "1" or (hp.compile == "auto" and on_gpu)
    attention, _ = t.find_flash_attention()
    flash_4 = flash_attention_4()
    make = partial(new_trainer, hp, ranks)
    possible = {
        "as it is": (True, make),
        PLAIN: (on_gpu, partial(make, fused_mlp=False)),
        "not compiled": (is_compiled, partial(make, compile="0")),
        NO_MIX_ORDER: (
            is_compiled and hasattr(inductor_config.triton, "mix_order_reduction"),
            partial(without_mix_order, hp, ranks),
        ),
        "torch's attention": (attention != "sdpa", partial(make, flash="torch")),
        "FlashAttention 4": (flash_4 is not None, partial(make, flash=flash_4)),
    }
    found = {}
    for name, (is_possible, maker) in possible.items():
        if not only or name in only:
            if is_possible:
                found[name] = maker()
            elif only:
                print(f"{name}: not possible here")
    if not found:
        sys.exit(f"--only {' '.join(only)}: none of {', '.join(possible)}")
    return found


def measure(
    hp: t.Hyperparameters, steps: int, rounds: int, flops: float, only: tuple[str, ...] = ()
) -> None:
    ranks = t.Ranks({})
    trainers, seconds = variants(hp, ranks, only), defaultdict(list)
    for trainer in trainers.values():
        timed(lambda trainer=trainer: trainer.step(1.0, None), 2)  # compiles
    for _ in range(rounds):
        for name, trainer in trainers.items():
            seconds[name].append(timed(lambda trainer=trainer: trainer.step(1.0, None), steps))
    best = ceiling(ranks.device)
    first = statistics.median(seconds[PLAIN if PLAIN in seconds else next(iter(seconds))])
    device = (
        torch.cuda.get_device_name()
        if ranks.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    attention, _ = t.find_flash_attention()
    print(
        f"\nmeasured on {device}, attention {attention}, torch {torch.__version__}; fastest "
        f"product {best / 1e12:.2f} TFLOP/s\n\n"
        f"{'':23} {'ms/step':>9} {'low-high':>19} {'tokens/s':>11} {'MFU':>6} {'ratio':>6}"
    )
    for name, all_rounds in seconds.items():
        middle = statistics.median(all_rounds)
        print(
            f"{name:23} {1e3 * middle:>9.2f} "
            f"{f'{1e3 * min(all_rounds):.2f}-{1e3 * max(all_rounds):.2f}':>19} "
            f"{hp.train_batch_tokens / middle:>11,.0f} {flops / middle / best:>6.1%} "
            f"{middle / first:>6.2f}"
        )
    if only:
        return
    with torch.profiler.profile() as profile:
        timed(lambda: trainers["as it is"].step(1.0, None), 1)
    on_gpu = ranks.device.type == "cuda"
    rows = sorted(
        (
            (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key)
            for e in profile.key_averages()
        ),
        reverse=True,
    )
    whole = sum(row[0] for row in rows) or 1
    print(f"\n{'share':>6} {'ms':>9} {'calls':>6}  kernel, one step")
    for micros, calls, name in rows[:12]:
        print(f"{micros / whole:>6.1%} {micros / 1e3:>9.2f} {calls:>6}  {name[:100]}")


def check_gradients(hp: t.Hyperparameters, device: torch.device) -> None:
    """Loss and gradients of the compiled model with kernels (bfloat16) against the
    uncompiled float32 one without."""
    torch.manual_seed(hp.seed)
    model = t.GPT(hp).to(device)
    ids = torch.randint(0, hp.vocab_size, (2, hp.train_seq_len + 1), device=device)
    with torch.no_grad():
        for p in model.parameters():  # so that no matrix is zero, no weight one
            p.add_(0.02 * torch.randn_like(p))
    plain = patched(
        working_dtype=lambda x: torch.float32,
        has_kernels=lambda x: False,
        causal_attention=lambda q, k, v, flash=None, f=t.causal_attention: f(q, k, v),
    )
    with plain:
        exact = t.training_loss(model, ids[:, :-1], ids[:, 1:], None)
        wanted = torch.autograd.grad(exact, list(model.parameters()))
    loss = torch.compile(t.training_loss, dynamic=False)(model, ids[:, :-1], ids[:, 1:], None)
    found = torch.autograd.grad(loss, list(model.parameters()))
    errors = {
        name: float((a - b).norm() / b.norm().clamp_min(1e-12))
        for (name, _), a, b in zip(model.named_parameters(), found, wanted)
    }
    worst = max(errors, key=errors.get)
    print(
        f"\ncompiled, with kernels, in {t.working_dtype(model.embed.weight)} against float32: loss "
        f"{loss:.5f} to {exact:.5f}; gradients' relative error median "
        f"{statistics.median(errors.values()):.4f}, largest {errors[worst]:.4f} ({worst})"
    )


def time_tiles(hp: t.Hyperparameters, device: torch.device) -> None:
    """ms of the MLP's kernel, forward and backward, by tile;
    beside it the compiled plain form of the same work."""
    N = micro_batch_rows(hp) * hp.train_seq_len
    W, D = int(hp.mlp_mult * hp.model_dim), hp.model_dim
    x, g, z = (torch.randn(N, width, device=device, dtype=torch.bfloat16) for width in (D, D, W))
    fc, proj = (torch.randn(W, D, device=device, dtype=torch.bfloat16) * D**-0.5 for _ in range(2))
    proj = proj.mT.contiguous()

    def forward(x, fc):
        y = x @ fc.mT
        return y, t.F.leaky_relu(y, hp.leaky_slope).square()

    def backward(g, proj, z):
        return (g @ proj) * 2 * z * torch.where(z > 0, 1.0, hp.leaky_slope**2)

    plain = [torch.compile(f, dynamic=False) for f in (forward, backward)]

    def both(calls) -> str:
        for call in calls:
            timed(call, 3)
        return "".join(f"{1e3 * min(timed(call, 10) for _ in range(3)):>12.3f}" for call in calls)

    print(
        f"\n{'MLP kernel, tile':40}{'forward ms':>12}{'backward ms':>12}\n"
        f"{'compiled plain form':40}"
        + both((lambda: plain[0](x, fc), lambda: plain[1](g, proj, z)))
    )
    for tile in TILES:
        with patched(MLP_TILE=tile):
            name = "x".join(str(tile[k]) for k in ("BM", "BN", "BK"))
            try:
                ms = both(
                    (
                        lambda: t.launch_mlp(x, fc.mT, z, hp.leaky_slope, False),
                        lambda: t.launch_mlp(g, proj, z, hp.leaky_slope, True),
                    )
                )
            except t.triton.runtime.errors.OutOfResources as error:
                ms = f"  {error}"
        print(
            f"{name + ' warps {num_warps} stages {num_stages}'.format(**tile):40}{ms}"
            f"{'  (the one in use)' if tile == t.MLP_TILE else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="count, measure nothing")
    parser.add_argument("--only", nargs="+", default=(), metavar="VARIANT")
    args = parser.parse_args()
    hp = settings()
    flops = print_count(hp)
    small = hp.train_batch_tokens <= 1 << 16
    if not args.count and (small or torch.cuda.is_available()):
        if torch.cuda.is_available() and not args.only:
            check_gradients(hp, torch.device("cuda"))
            time_tiles(hp, torch.device("cuda"))
        measure(hp, args.steps, args.rounds, flops, args.only)
    elif not args.count:
        print(
            "\nnothing measured: there is no GPU, and a CPU takes minutes for a step of such size; "
            "set smaller ones"
        )


if __name__ == "__main__":
    main()
