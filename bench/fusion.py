"""What the compiler fuses in a training step: kernels and bytes, without and with the script's own
kernels for the MLP. It needs no GPU.

    python -m bench.fusion [--list]           settings: train_gpt.py's environment variables

Inductor schedules forward and backward of one micro-batch in the dtypes of CUDA. Its tensors are
fake: nothing is computed or compiled. It says for each kernel the bytes of all buffers that the
kernel reads and writes. The CPU scheduler is told to treat concatenations as the CUDA scheduler
does. Both fuse by the same rules, but reductions on a GPU can include more of what follows them.
Attention counts as one kernel that reads q, k, v and writes y. `floor`: those bytes at an H100's
datasheet bandwidth. --list: every kernel of the model as it is, with the operations in it.
"""

import argparse
import copy
import dataclasses
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch._guards import TracingContext
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from tools.common import (
    PEAK_BYTES,
    as_on_cuda,
    environment_settings,
    micro_batch_rows,
    patched,
    t,
)

VARIANTS = {
    "plain": {"fused_mlp": False},
    "MLP kernels": {},
}


class Scheduled(Exception):
    """Raised where code would be generated."""


@torch.library.custom_op("bench::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


@torch.library.custom_op("bench::attention_backward", mutates_args=())
def attention_backward(
    g: torch.Tensor, y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError


attention.register_fake(lambda q, k, v: q.new_empty(q.shape))
attention_backward.register_fake(lambda g, y, *qkv: tuple(x.new_empty(x.shape) for x in qkv))
attention.register_autograd(
    lambda ctx, g: attention_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs),
)


def schedule(hp: t.Hyperparameters) -> list[list[tuple[str, int, str]]]:
    """Of each graph, forward and backward, its kernels: ("library" or "generated", bytes,
    operations)."""
    graphs = []

    def operations(node) -> str:
        origins = (o for n in node.get_nodes() for o in getattr(n.node, "origins", ()))
        return " ".join(sorted({o.name for o in origins}))

    def record(graph: GraphLowering):
        graph.init_wrapper_code()
        graph._update_scheduler()
        graphs.append(
            [
                (
                    "library" if type(node).__name__.startswith("Extern") else "generated",
                    node.get_read_write_buffers_sizes(),
                    operations(node),
                )
                for node in graph.scheduler.nodes
                if not type(node).__name__.startswith("Nop")
            ]
        )
        raise Scheduled

    def one_fake_mode():
        """Makes Dynamo use the fake mode that the model's tensors have, as torch 2.9 refuses
        tensors of another fake mode than its own."""
        return mock.patch.object(TracingContext.get(), "fake_mode", fake_mode)

    def inner(module, inputs, **options):
        found = len(graphs)
        # a copy: Inductor's passes may put operations into the graph that only its scheduler knows
        plain = GraphModule(module, copy.deepcopy(module.graph))
        try:
            with one_fake_mode():
                compile_fx_inner(module, inputs, **options)
        except Exception:
            if len(graphs) == found:
                raise
        return make_boxed_func(plain.forward)

    def backend(module, inputs):
        with one_fake_mode():
            return compile_fx(module, inputs, inner_compile=inner)

    fake_mode = FakeTensorMode()
    torch._dynamo.reset()
    with (
        mock.patch.object(GraphLowering, "codegen", record),
        as_on_cuda(),
        patched(causal_attention=lambda q, k, v, flash=None: attention(q, k, v)),
        config.patch(force_pointwise_cat=True, fx_graph_cache=False),
        fake_mode,
    ):
        model = t.GPT(hp)
        ids = torch.zeros(micro_batch_rows(hp), hp.train_seq_len, dtype=torch.int64)
        _, passes = t.block_passes(hp)
        loss = torch.compile(t.training_loss, dynamic=False, backend=backend)
        loss(model, ids, ids, passes).backward()
    return graphs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fusion", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="every kernel of the model as it is")
    args = parser.parse_args()
    hp = environment_settings()
    tokens = micro_batch_rows(hp) * hp.train_seq_len
    print(
        f"scheduled by torch {torch.__version__}, one micro-batch of {tokens:,} tokens, "
        "bfloat16\n\n"
        f"{'':14}{'forward: kernels':>17}{'GB':>8}{'library GB':>11}"
        f"{'backward: kernels':>19}{'GB':>8}{'library GB':>11}{'floor ms':>10}{'to plain':>9}"
    )
    first = 0.0
    for name, changes in VARIANTS.items():
        graphs, cells, total = schedule(dataclasses.replace(hp, **changes)), "", 0
        for width, graph in zip((17, 19), graphs):
            own = [size for kind, size, _ in graph if kind == "generated"]
            library = sum(size for kind, size, _ in graph if kind == "library")
            cells += f"{len(own):>{width}}{sum(own) / 1e9:>8.2f}{library / 1e9:>11.2f}"
            total += sum(own) + library
        first = first or total
        print(f"{name:14}{cells}{1e3 * total / PEAK_BYTES:>10.2f}{total / first:>9.3f}")
        if args.list and name == "MLP kernels":
            for phase, graph in zip(("forward", "backward"), graphs):
                for kind, size, operations in graph:
                    print(f"  {phase:9}{kind:10}{size / tokens:>9.0f} B/token  {operations[:120]}")


if __name__ == "__main__":
    main()
