"""Run by test_ranks.py: for each world size the ranks do with gloo what one
process does by the written rule.

Each rank makes its own gradients from a seed, so that rank 0 can make everybody's and
apply the rule to their sum."""

import math
import os
import socket
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from conftest import tiny  # noqa: E402

import train_gpt as t  # noqa: E402


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) / 30 for p in model.parameters()]


def written_rule(model, hp, clip, steps, ranks):
    """The weights after `steps` updates on sums of all ranks' gradients: Muon and AdamW,
    matrix by matrix."""
    params = [p.detach().double() for p in model.parameters()]
    muon = {
        id(p)
        for g in t.build_optimizers(model, hp, t.Runtime("", {}))[0].param_groups
        for p in g["params"]
    }
    one = [torch.zeros_like(p) for p in params]
    two = [torch.zeros_like(p) for p in params]
    clipped = 0
    rates = {
        id(p): g["lr"]
        for o in t.build_optimizers(model, hp, t.Runtime("", {}))
        for g in o.param_groups
        for p in g["params"]
    }
    for step in range(steps):
        grads = [
            sum(g).double() for g in zip(*(gradients(model, 100 * step + r) for r in range(ranks)))
        ]
        length = math.sqrt(sum(float(g.square().sum()) for g in grads))
        scale = min(1.0, clip / (length + 1e-6)) if clip else 1.0
        clipped += scale < 1
        for i, (p, g) in enumerate(zip(model.parameters(), grads)):
            g, w, lr = g * scale, params[i], rates[id(p)]
            if id(p) in muon:
                one[i] = 0.9 * one[i] + g
                update = t.orthogonalize((g + 0.9 * one[i]).float(), hp.muon_backend_steps).double()
                w.mul_(1 - lr * hp.muon_wd).sub_(
                    lr * math.sqrt(max(1, p.size(0) / p.size(1))) * update
                )
            else:
                one[i] = hp.beta1 * one[i] + (1 - hp.beta1) * g
                two[i] = hp.beta2 * two[i] + (1 - hp.beta2) * g * g
                m, v = one[i] / (1 - hp.beta1 ** (step + 1)), two[i] / (1 - hp.beta2 ** (step + 1))
                w.mul_(1 - lr * hp.adam_wd).sub_(lr * m / (v.sqrt() + hp.adam_eps))
    return params, clipped


def check_update(rt, clip):
    torch.manual_seed(3)
    # stacks of 10, 10, 5, 5, ... matrices: 2, 3 and 4 ranks do not divide all
    hp = tiny(NUM_LAYERS=5, MLP_MULT=3)
    model = t.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    expected, clipped = written_rule(model, hp, clip, 3, rt.world_size)
    optimizers = t.build_optimizers(model, hp, rt)
    for group in optimizers[0].param_groups:
        group["momentum"] = 0.9
    for step in range(3):
        for p, g in zip(model.parameters(), gradients(model, 100 * step + rt.rank)):
            p.grad = g
        t.update(*optimizers, rt, clip)
    assert clipped == (3 if clip and clip < 1 else 0)
    for (name, p), w in zip(model.named_parameters(), expected):
        torch.testing.assert_close(
            p.detach().double(), w, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        mine = p.detach().clone()
        assert torch.equal(rt.from_rank_0(mine), p), f"{name} differs between ranks"
    stacks = [len(g["params"]) for g in optimizers[0].param_groups]
    assert rt.world_size == 1 or any(n % rt.world_size for n in stacks)


def check_runtime(rt):
    R, r = rt.world_size, rt.rank
    assert rt.agree(1, r) == [R, R * (R - 1) / 2]
    arrived = rt.start(t.REDUCE_SCATTER, torch.arange(2.0 * R * 3).view(2 * R, 3) + r, 2)
    assert torch.equal(
        arrived(),
        (torch.arange(2.0 * R * 3).view(2 * R, 3) * R + R * (R - 1) / 2)[2 * r : 2 * r + 2],
    )
    arrived = rt.start(t.ALL_GATHER, torch.full((2, 3), float(r)), 2 * R)
    assert torch.equal(arrived()[:, 0], torch.arange(R).repeat_interleave(2).float())
    rt.compare(dict(settings="same", code=b"same"))
    if R > 2:
        try:
            rt.compare(dict(settings="same", data=r if r in (1, R - 1) else 0))
        except t.UserError as error:
            assert str(error).startswith(f"rank 1, {R - 1}: data differ from rank 0's: "), error
        else:
            raise AssertionError("ranks that differ were not noticed")


def one_rank(rank, world_size, port):
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    rt = t.Runtime("", dict(os.environ))
    check_runtime(rt)
    for clip in (0.0, 0.5):
        check_update(rt, clip)
    rt.close()


if __name__ == "__main__":
    for world_size in (1, 2, 3, 4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(world_size):
            if not (child := os.fork()):
                try:
                    one_rank(rank, world_size, port)
                except BaseException as error:
                    print(
                        f"rank {rank} of {world_size}: {type(error).__name__}: {error}",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        print(f"world_size:{world_size} codes:{codes}", flush=True)
        if any(codes):
            sys.exit(1)
