"""Run by test_ranks.py: for each world size the ranks do with gloo what one
process does by the written rule.

Each rank makes its own gradients from a seed, so that rank 0 can make everybody's and
apply the rule to their sum."""

import math
import os
import socket
import sys

import torch

import train_gpt as t
from tests.helpers import tiny


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) / 30 for p in model.parameters()]


def groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def written_rule(model, hp, clip, steps, ranks):
    """The weights after `steps` updates on sums of all ranks' gradients: Muon and AdamW,
    matrix by matrix."""
    params = [p.detach().double() for p in model.parameters()]
    muon, adamw = t.build_optimizers(model, hp, t.Ranks({}))
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    one = [torch.zeros_like(p) for p in params]
    two = [torch.zeros_like(p) for p in params]
    clipped = 0
    rates = {id(p): g["lr"] for g in groups_of([muon, adamw]) for p in g["params"]}
    for step in range(steps):
        grads = [
            sum(g).double() for g in zip(*(gradients(model, 100 * step + r) for r in range(ranks)))
        ]
        length = math.sqrt(sum(float(g.square().sum()) for g in grads))
        scale = min(1.0, clip / (length + 1e-6)) if clip else 1.0
        clipped += scale < 1
        for i, (p, g) in enumerate(zip(model.parameters(), grads)):
            g, w, lr = g * scale, params[i], rates[id(p)]
            if id(p) in in_muon:
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


def check_update(ranks, clip):
    torch.manual_seed(3)
    # stacks of 10, 10, 5, 5, ... matrices: 2, 3 and 4 ranks do not divide all
    hp = tiny(NUM_LAYERS=5, MLP_MULT=3)
    model = t.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    expected, clipped = written_rule(model, hp, clip, 3, ranks.world_size)
    optimizers = t.build_optimizers(model, hp, ranks)
    for group in optimizers[0].param_groups:
        group["momentum"] = 0.9
    for step in range(3):
        for p, g in zip(model.parameters(), gradients(model, 100 * step + ranks.rank)):
            p.grad = g
        t.update(optimizers, clip)
    assert clipped == (3 if clip and clip < 1 else 0)
    for (name, p), w in zip(model.named_parameters(), expected):
        torch.testing.assert_close(
            p.detach().double(), w, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        first = p.detach().clone()
        ranks.broadcast(first)
        assert torch.equal(first, p), f"{name} differs between ranks"
    stacks = [len(g["params"]) for g in optimizers[0].param_groups]
    assert ranks.world_size == 1 or any(n % ranks.world_size for n in stacks)


def check_state(ranks):
    """Each rank keeps the momentum of its own matrices only; made complete, it is that of one
    process."""
    torch.manual_seed(4)
    hp = tiny(NUM_LAYERS=5)
    model = t.GPT(hp)
    alone = t.GPT(hp)
    alone.load_state_dict(model.state_dict())
    optimizers = t.build_optimizers(model, hp, ranks)
    expected = t.build_optimizers(alone, hp, t.Ranks({}))
    for step in range(2):
        shares = [gradients(model, 100 * step + r) for r in range(ranks.world_size)]
        for p, q, *all_shares in zip(model.parameters(), alone.parameters(), *shares):
            p.grad = all_shares[ranks.rank].clone()
            q.grad = sum(all_shares)
        t.update(optimizers, 0)
        t.update(expected, 0)
    for optimizer, other in zip(optimizers, expected):
        optimizer.complete_state()
        found = optimizer.state_tensors()
        for name, tensor in other.state_tensors().items():
            torch.testing.assert_close(
                found[name], tensor, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def check_collectives(ranks):
    R, r = ranks.world_size, ranks.rank
    assert ranks.sum_numbers(1, r) == [R, R * (R - 1) / 2]
    x = torch.full((2,), float(r))
    assert ranks.sum_over_ranks(x) is x and torch.equal(x, torch.full((2,), R * (R - 1) / 2))
    x = torch.full((2,), 5.0 + r)
    ranks.broadcast(x)
    assert torch.equal(x, torch.full((2,), 5.0))
    rows = torch.arange(2.0 * R * 3).view(2 * R, 3)
    share = ranks.reduce_scatter(rows + r).wait()
    assert torch.equal(share, (rows * R + R * (R - 1) / 2)[2 * r : 2 * r + 2])
    whole = ranks.all_gather(torch.full((2, 3), float(r))).wait()
    assert torch.equal(whole[:, 0], torch.arange(R).repeat_interleave(2).float())
    ranks.require_equal(dict(settings="same", code=b"same"))
    if R > 2:
        try:
            ranks.require_equal(dict(settings="same", data=r if r in (1, R - 1) else 0))
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
    ranks = t.Ranks(dict(os.environ))
    check_collectives(ranks)
    for clip in (0.0, 0.5):
        check_update(ranks, clip)
    check_state(ranks)
    ranks.close()


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
