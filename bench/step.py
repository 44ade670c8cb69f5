"""A training step: how much work is in it, counted, and how long it takes, measured also with each
speed-up switched off.

    python -m bench.step [--steps 10] [--rounds 3] [--count] [--only VARIANT ...]
        settings: train_gpt.py's environment variables

Counted, by meta tensors, without a GPU and without computing anything: the FLOPs and bytes of each
kind of operation, in the dtypes of CUDA and with the project's kernels. The bytes are those that
cross the memory bus if each operation reads its inputs and writes its outputs. The elementwise row
is what the compiler's fusion can save (bench.fusion says what it does save). `floor`: the larger of
the times that FLOPs and bytes take at an H100's datasheet rates.
Measured, on a GPU, or on a CPU with small settings: ms per step (the median of the rounds; variants
run in turn), tokens/s, MFU, the ratio to the plain compiled model, and the kernels that take most
time. MFU is the rate of the counted FLOPs over that of the fastest bfloat16 product in the same run
(float32 on a CPU). On a GPU it also compares the compiled bfloat16 model with kernels to the
uncompiled float32 model without, and the MLP kernel with other tiles to the compiled plain form.
--count: only the first table. --only: only these variants, without the tables after theirs.
Batches are random tokens, in one process.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch._inductor import config as inductor_config

from tools import common
from tools.common import PEAK_BYTES, PEAK_FLOPS, micro_batch_rows, patched, t

PLAIN = "plain, compiled"
NO_MIX_ORDER = "mix-order reduction off"
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


def print_count(hp: t.Hyperparameters) -> float:
    """Print the table. Returns the FLOPs of a step."""
    found = common.count_step(hp)
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


def repeat(call: Callable, times: int) -> None:
    for _ in range(times):
        call()


def timed(call: Callable, times: int) -> float:
    """Seconds per call."""
    _, seconds = common.timed(partial(repeat, call, times))
    return seconds / times


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
    """FlashAttention 4, or None: it is not installed, or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    with contextlib.suppress(ImportError):
        from flash_attn.cute import flash_attn_func

        return torch.compiler.disable(flash_attn_func)  # its kernels have a compiler of their own
    return None


def new_step(hp: t.Hyperparameters, attention=None, **changes) -> Callable:
    """A function that takes a training step on random tokens, with `changes` to the settings.
    `attention`: what find_flash_attention should find, if not what it finds."""
    changed = dataclasses.replace(hp, **changes)
    attention = attention or t.find_flash_attention()
    with patched(find_flash_attention=lambda: attention):
        return common.training_step(common.new_model(changed), RandomTokens(changed))


def without_mix_order(hp: t.Hyperparameters) -> Callable:
    """A step compiled without fusing reductions along rows with reductions along columns, as with
    TORCHINDUCTOR_MIX_ORDER_REDUCTION=0. The option gives it a graph of its own."""
    options = {"triton.mix_order_reduction": False}
    loss = torch.compile(t.training_loss, dynamic=False, options=options)
    with patched(compiled=lambda *_: loss):
        return new_step(hp)


def variants(hp: t.Hyperparameters, only: Sequence[str] = ()) -> dict[str, Callable]:
    """Name -> a function that takes a training step, with one speed-up switched off. `only`: names
    of those to make."""
    on_gpu = torch.cuda.is_available()
    is_compiled = hp.compile == "1" or (hp.compile == "auto" and on_gpu)
    has_mix_order = hasattr(inductor_config.triton, "mix_order_reduction")
    attention, _ = t.find_flash_attention()
    flash_4 = flash_attention_4()
    make = partial(new_step, hp)
    possible = {
        "as it is": (True, make),
        PLAIN: (on_gpu, partial(make, fused_mlp=False)),
        "not compiled": (is_compiled, partial(make, compile="0")),
        NO_MIX_ORDER: (is_compiled and has_mix_order, partial(without_mix_order, hp)),
        "torch's attention": (attention != "sdpa", partial(make, ("sdpa", None))),
        "FlashAttention 4": (flash_4 is not None, partial(make, ("flash_attention_4", flash_4))),
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
    hp: t.Hyperparameters, steps: int, rounds: int, flops: float, only: Sequence[str] = ()
) -> None:
    """Print a row per variant, then the kernels that take most time."""
    device = t.Ranks({}).device
    calls = variants(hp, only)
    for step in calls.values():
        repeat(step, 2)  # compiles
    several = {name: partial(repeat, step, steps) for name, step in calls.items()}
    seconds, _ = common.timed_in_turn(several, rounds)
    best = ceiling(device)
    first = statistics.median(seconds[PLAIN if PLAIN in seconds else next(iter(seconds))]) / steps
    print(
        f"\nmeasured on {common.describe_device()}; fastest product {best / 1e12:.2f} TFLOP/s\n\n"
        f"{'':23} {'ms/step':>9} {'low-high':>19} {'tokens/s':>11} {'MFU':>6} {'ratio':>6}"
    )
    for name, taken in seconds.items():
        all_rounds = [each / steps for each in taken]
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
        timed(calls["as it is"], 1)
    on_gpu = device.type == "cuda"
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
    """Print how far loss and gradients of the compiled bfloat16 model with kernels are from those
    of the uncompiled float32 model without."""
    torch.manual_seed(hp.seed)
    model = t.GPT(hp).to(device)
    _, passes = t.block_passes(hp)
    ids = torch.randint(0, hp.vocab_size, (2, hp.train_seq_len + 1), device=device)
    with torch.no_grad():
        for p in model.parameters():  # so that no matrix is zero and no factor is one
            p.add_(0.02 * torch.randn_like(p))
    plain = patched(
        working_dtype=lambda x: torch.float32,
        has_kernels=lambda x: False,
        causal_attention=lambda q, k, v, flash=None, f=t.causal_attention: f(q, k, v),
    )
    with plain:
        exact = t.training_loss(model, ids[:, :-1], ids[:, 1:], passes)
        wanted = torch.autograd.grad(exact, list(model.parameters()))
    loss = torch.compile(t.training_loss, dynamic=False)(model, ids[:, :-1], ids[:, 1:], passes)
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
    """Print the ms that the MLP's kernel takes forward and backward with each tile, and those of
    the compiled plain form of the same work."""
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
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="count, measure nothing")
    parser.add_argument("--only", nargs="+", default=(), metavar="VARIANT")
    args = parser.parse_args()
    hp = common.environment_settings()
    flops = print_count(hp)
    small = hp.train_batch_tokens <= 1 << 16
    if not args.count and (small or torch.cuda.is_available()):
        if torch.cuda.is_available():
            check_gradients(hp, torch.device("cuda"))
            time_tiles(hp, torch.device("cuda"))
        measure(hp, args.steps, args.rounds, flops, args.only)
    elif not args.count:
        print(
            "\nnothing is measured: there is no GPU, and a CPU takes minutes for a step of this "
            "size; set a smaller TRAIN_BATCH_TOKENS"
        )


if __name__ == "__main__":
    main()
