"""Run by test_optimizer.py: for each world size the ranks do with gloo what one process does.

Each rank makes its own gradients from a seed, so that rank 0 can make everybody's and apply a rule
to their sum. A line says what has held on all ranks."""

import math
import os
import socket
import sys
from functools import partial

import torch

import train_gpt as t
from tests.helpers import ALONE, shifted, tiny

# stacks of 10, 10, 5, 5, ... matrices: 2, 3 and 4 ranks do not divide all
SETTINGS = dict(NUM_LAYERS=5, MLP_MULT=3, MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM=0.9)


def gradients(params, seed):
    """Multiples of 1/1024, so that sums over ranks are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-60, 61, p.shape, generator=generator) / 1024 for p in params]


def groups_of(optimizers) -> dict[int, tuple[type, dict]]:
    """id of a parameter -> (class of its optimizer, its group)."""
    return {
        id(p): (type(optimizer), group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def written_rule(model, hp, clip, steps, world_size):
    """({index of a parameter: its value after `steps` updates on sums of all ranks' gradients}, how
    many of these sums were clipped): Muon and AdamW, matrix by matrix."""
    weights = [p.detach().double() for p in model.parameters()]
    groups = groups_of(t.build_optimizers(model, hp, ALONE))
    one = [torch.zeros_like(w) for w in weights]
    two = [torch.zeros_like(w) for w in weights]
    clipped = 0
    for step in range(steps):
        shares = (gradients(weights, 100 * step + r) for r in range(world_size))
        sums = [sum(g).double() for g in zip(*shares)]
        length = math.sqrt(sum(float(g.square().sum()) for g in sums))
        scale = min(1.0, clip / (length + 1e-6)) if clip else 1.0
        clipped += scale < 1
        for i, (p, g) in enumerate(zip(model.parameters(), sums)):
            cls, group = groups[id(p)]
            g, w, lr = g * scale, weights[i], group["initial_lr"]
            w.mul_(1 - lr * group["weight_decay"])
            if cls is t.Muon:
                one[i] = 0.9 * one[i] + g
                update = t.orthogonalize((g + 0.9 * one[i]).float(), hp.muon_backend_steps).double()
                w.sub_(lr * math.sqrt(max(1, p.size(0) / p.size(1))) * update)
            else:
                one[i] = hp.beta1 * one[i] + (1 - hp.beta1) * g
                two[i] = hp.beta2 * two[i] + (1 - hp.beta2) * g * g
                m, v = one[i] / (1 - hp.beta1 ** (step + 1)), two[i] / (1 - hp.beta2 ** (step + 1))
                w.sub_(lr * m / (v.sqrt() + hp.adam_eps))
    known = [groups[id(p)][0] in (t.Muon, t.AdamW) for p in model.parameters()]
    return {i: w for i, w in enumerate(weights) if known[i]}, clipped


def assert_near(found, expected, name):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")


def assert_equal_on_all_ranks(ranks, name, p):
    first = ranks.from_rank0(p.detach().clone())
    assert torch.equal(first, p), f"{name} differs between ranks"


def check_written_rule(ranks):
    for clip in (0.0, 0.5):
        check_update(ranks, clip)


def check_update(ranks, clip):
    torch.manual_seed(3)
    hp = tiny(**SETTINGS)
    model = shifted(t.GPT(hp), 0.1)
    expected, clipped = written_rule(model, hp, clip, 3, ranks.world_size)
    optimizers = t.build_optimizers(model, hp, ranks)
    params = list(model.parameters())
    for step in range(3):
        for p, g in zip(params, gradients(params, 100 * step + ranks.rank)):
            p.grad = g
        for optimizer in optimizers:
            optimizer.schedule(step, t.StepPlan(1.0, ()))
        t.update_parameters(optimizers, clip)
    assert clipped == (3 if clip and clip < 1 else 0)
    for i, (name, p) in enumerate(model.named_parameters()):
        if i in expected:
            assert_near(p.detach().double(), expected[i], name)
        assert_equal_on_all_ranks(ranks, name, p)


def check_sharing(ranks, index: int):
    """Shared out over the ranks, the optimizer of that index takes the steps of one process that
    has the sums of the gradients, and its state, made complete, is that of one process."""
    torch.manual_seed(4)
    hp = tiny(**SETTINGS, TIE_EMBEDDINGS=0)
    model, alone = shifted(t.GPT(hp)), t.GPT(hp)
    alone.load_state_dict(model.state_dict())
    optimizer = t.build_optimizers(model, hp, ranks)[index]
    other = t.build_optimizers(alone, hp, ALONE)[index]
    params, expected = (
        [p for group in o.param_groups for p in group["params"]] for o in (optimizer, other)
    )
    for step in range(3):
        shares = [gradients(params, 100 * step + r) for r in range(ranks.world_size)]
        for p, q, *all_shares in zip(params, expected, *shares):
            p.grad = all_shares[ranks.rank].clone()
            q.grad = sum(all_shares)
        for o in (optimizer, other):
            o.schedule(step, t.StepPlan(0.5, ()))
            t.update_parameters([o], clip=0.5)
    for i, (p, q) in enumerate(zip(params, expected)):
        assert_near(p, q, f"parameter {i}")
        assert_equal_on_all_ranks(ranks, f"parameter {i}", p)
    optimizer.complete_state()
    found = optimizer.state_tensors()
    for name, tensor in other.state_tensors().items():
        assert_near(found[name], tensor, name)


def check_collectives(ranks):
    R, r = ranks.world_size, ranks.rank
    assert ranks.sum_numbers(1, r) == [R, R * (R - 1) / 2]
    x = torch.full((2,), float(r))
    assert ranks.sum_over_ranks(x) is x and torch.equal(x, torch.full((2,), R * (R - 1) / 2))
    x = torch.full((2,), 5.0 + r)
    assert ranks.from_rank0(x) is x and torch.equal(x, torch.full((2,), 5.0))
    assert ranks.from_rank0(0.1 + r) == 0.1
    assert ranks.any(r == R - 1, False, True, r == 0) == [True, False, True, True]
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
    checks = {"collectives": check_collectives}
    hp = tiny(**SETTINGS, TIE_EMBEDDINGS=0)
    for index, optimizer in enumerate(t.build_optimizers(t.GPT(hp), hp, ALONE)):
        checks[f"shared:{type(optimizer).__name__}"] = partial(check_sharing, index=index)
    checks["written_rule"] = check_written_rule
    for what, check in checks.items():
        check(ranks)
        ranks.barrier()
        if rank == 0:
            print(f"world_size:{world_size} {what}", flush=True)
    ranks.close()


if __name__ == "__main__":
    failed = False
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
        failed |= any(codes)
    sys.exit(failed)
