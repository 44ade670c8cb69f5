"""Muon, AdamW, schedules, averages."""

import math

import pytest
import torch
from helpers import tiny

import train_gpt as t

ALONE = t.Ranks({})


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (3, 40, 24)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(rng, shape):
    G = torch.randn(*shape)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    X = t.orthogonalize(G, 5).double()
    inner = U.mT @ X @ Vh.mT  # diagonal when the singular vectors are the same
    diagonal = torch.diagonal(inner, dim1=-2, dim2=-1)
    off = inner - torch.diag_embed(diagonal)
    # each round makes what it was given, and its errors, at most 3.4445 times larger
    assert off.abs().max() < 3.4445**5 * torch.finfo(torch.float32).eps
    assert diagonal[0.05 * S.amax(-1, keepdim=True) < S].min() > 0.5 and diagonal.max() < 1.3


def test_orthogonalize_of_a_stack_is_that_of_each(rng):
    G = torch.randn(5, 24, 16)
    torch.testing.assert_close(
        t.orthogonalize(G, 5), torch.stack([t.orthogonalize(g, 5) for g in G])
    )


def test_muon_step_is_the_written_rule(rng):
    hp = tiny()
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 4), (4, 8), (8, 4))]
    plain = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    muon = t.Muon([dict(params=params, lr=0.1, initial_lr=0.1, weight_decay=0.2)], hp, ALONE)
    for step in range(3):
        momentum = t.muon_momentum(step * 100, hp)
        muon.schedule(step * 100, 1.0)
        for p in params:
            p.grad = torch.randn_like(p)
        for p, w, m in zip(params, plain, buffers):
            m.mul_(momentum).add_(p.grad)
            update = t.orthogonalize(p.grad + momentum * m, 5) * math.sqrt(
                max(1, p.size(0) / p.size(1))
            )
            w.mul_(1 - 0.1 * 0.2).sub_(0.1 * update)
        t.update([muon], clip=0)
    for p, w in zip(params, plain):
        torch.testing.assert_close(p.detach(), w)


def test_equal_rows_are_those_of_the_matrix_and_not_of_its_stack(rng):
    """A stack holds tall matrices transposed: their rows are its columns."""
    wide, tall = torch.randn(4, 8), torch.randn(8, 4)
    stack = torch.stack((wide, tall.T))
    found = t.equalize_rows(stack, torch.tensor([False, True])[:, None, None])
    torch.testing.assert_close(found[0], wide / wide.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found[1].T, tall / tall.norm(dim=1, keepdim=True))


def test_muon_with_equal_rows_is_the_written_rule(rng):
    hp = tiny(MUON_ROW_NORM=1)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 4), (4, 8))]
    before = [p.detach().clone() for p in params]
    muon = t.Muon([dict(params=params, lr=0.1, initial_lr=0.1, weight_decay=0.0)], hp, ALONE)
    muon.schedule(0, 1.0)
    momentum = t.muon_momentum(0, hp)
    updates = []
    for p in params:
        p.grad = torch.randn_like(p)
        update = (1 + momentum) * p.grad
        updates.append(t.orthogonalize(update / update.norm(dim=1, keepdim=True), 5))
    t.update([muon], clip=0)
    for p, w, update in zip(params, before, updates):
        rate = 0.1 * math.sqrt(max(1, p.size(0) / p.size(1)))
        torch.testing.assert_close(p.detach(), w - rate * update)


def test_embeddings_have_a_weight_decay_of_their_own():
    model = t.GPT(tiny(ADAM_WD=0.02, EMBED_WD=0.09))
    _, adam = t.build_optimizers(model, model.hp, ALONE)
    names = {id(p): n for n, p in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in adam.param_groups for p in g["params"]}
    tables = {name for name, decay in decays.items() if decay == 0.09}
    assert tables == {"embed.weight", "bigram.table.weight", "value_embed.table.weight"}


@pytest.mark.parametrize("tied", [0, 1])
def test_each_parameter_has_the_right_optimizer(tied):
    model = t.GPT(tiny(TIE_EMBEDDINGS=tied))
    muon, adam = t.build_optimizers(model, model.hp, ALONE)
    names = {id(p): n for n, p in model.named_parameters()}
    in_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert in_muon == {
        n for n in names.values() if n.startswith("blocks.") and n.endswith(".weight")
    } | {"bigram.proj.weight", "value_embed.proj.weight"}
    rates = {names[id(p)]: g["lr"] for g in adam.param_groups for p in g["params"]}
    embed = model.hp.tied_embed_lr if tied else model.hp.embed_lr
    for name, rate in rates.items():
        table = name.endswith((".table.weight", "embed.weight"))
        assert rate == (
            embed if table else model.hp.head_lr if name == "head.weight" else model.hp.scalar_lr
        ), name
    assert {g["weight_decay"] for g in adam.param_groups} == {0.04}
    assert adam.defaults["betas"] == (0.9, 0.95)
    assert {g["lr"] for g in muon.param_groups} == {model.hp.matrix_lr}
    assert {g["weight_decay"] for g in muon.param_groups} == {model.hp.muon_wd}


def test_a_parameter_without_an_optimizer_is_noticed(monkeypatch):
    class Forgetful(t.AdamW):
        """Drops a group of what it was given."""

        def __init__(self, groups, hp, ranks):
            super().__init__(groups[1:], hp, ranks)

    monkeypatch.setattr(t, "AdamW", Forgetful)
    model = t.GPT(tiny())
    with pytest.raises(AssertionError, match="without exactly one optimizer"):
        t.build_optimizers(model, model.hp, ALONE)


def test_a_schedule_scales_every_rate_from_its_initial_one():
    model = t.GPT(tiny())
    optimizers = t.build_optimizers(model, model.hp, ALONE)
    for optimizer in optimizers:
        optimizer.schedule(0, 0.5)
        optimizer.schedule(750, 0.25)
    for group in (g for o in optimizers for g in o.param_groups):
        assert group["lr"] == 0.25 * group["initial_lr"]
    assert {round(g["momentum"], 4) for g in optimizers[0].param_groups} == {0.955}


def test_clipping_scales_all_gradients_to_the_norm(rng):
    """The norm is that of all parameters together, whatever optimizer has them."""
    model = t.GPT(tiny())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    length = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    optimizers = t.build_optimizers(model, model.hp, ALONE)
    seen = []
    for optimizer in optimizers:
        keep_scaled_gradients(optimizer, seen)
    t.update(optimizers, clip=0.3)
    scaled = math.sqrt(sum(g.double().square().sum().item() for g in seen))
    assert length > 0.3 and scaled == pytest.approx(0.3, rel=1e-4)


def keep_scaled_gradients(optimizer, seen):
    """From here on `seen` gets, at each step, what the optimizer is to use."""
    receive, begin = optimizer.receive_gradients, optimizer.begin_step

    def receiving():
        optimizer.received = receive()
        return optimizer.received

    def beginning():
        seen.extend(g.clone() for g in optimizer.received)
        begin()

    optimizer.receive_gradients, optimizer.begin_step = receiving, beginning


def test_each_parameter_has_exactly_one_optimizer_also_where_rates_agree():
    model = t.GPT(tiny(TIE_EMBEDDINGS=0, EMBED_LR=0.1, HEAD_LR=0.1, SCALAR_LR=0.1, MATRIX_LR=0.1))
    owned = [
        id(p)
        for o in t.build_optimizers(model, model.hp, ALONE)
        for g in o.param_groups
        for p in g["params"]
    ]
    assert sorted(owned) == sorted(map(id, model.parameters()))


def test_adamw_has_its_whole_state_before_the_first_step(rng):
    """So that a checkpoint can fill it; and it makes the steps that it would have made without."""
    model = t.GPT(tiny())
    _, adamw = t.build_optimizers(model, model.hp, ALONE)
    params = [p for g in adamw.param_groups for p in g["params"]]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    rates = [g["lr"] for g in adamw.param_groups for _ in g["params"]]
    other = torch.optim.AdamW(
        [dict(params=[p], lr=lr) for p, lr in zip(plain, rates)],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.04,
        fused=True,
    )
    assert list(adamw.state) == params
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in adamw.state.values())
    for _ in range(2):
        for p, q in zip(params, plain):
            p.grad = q.grad = torch.randn_like(p)
        adamw.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain))


def test_lr_scale_by_steps_and_by_time():
    hp = tiny(ITERATIONS=100, WARMDOWN_ITERS=20)
    assert [t.lr_scale(s, 0, hp) for s in (0, 80, 90, 100)] == [1, 1, 0.5, 0]
    hp = tiny(ITERATIONS=10**6, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=50, QUANTIZER="rows")
    assert t.lr_scale(0, 0.0, hp) == 1 and t.lr_scale(10, 10.0, hp) == 1  # 40 s = 40 steps left
    assert t.lr_scale(40, 40.0, hp) == pytest.approx(0.5)  # 10 s = 10 steps left, of 20
    assert t.lr_scale(20, 40.0, hp) == pytest.approx(0.25)  # steps of 2 s: 5 left
    assert t.lr_scale(60, 51.0, hp) == 0


def test_rates_fall_to_the_last_step_however_much_time_is_left():
    hp = tiny(ITERATIONS=100, WARMDOWN_ITERS=20, MAX_WALLCLOCK_SECONDS=10_000, QUANTIZER="rows")
    assert [t.lr_scale(s, float(s), hp) for s in (80, 90, 100)] == [1, 0.5, 0]


def test_muon_momentum_warms_up():
    hp = tiny()
    assert [round(t.muon_momentum(s, hp), 4) for s in (0, 750, 1500, 9000)] == [
        0.92,
        0.955,
        0.99,
        0.99,
    ]


def test_averages_are_the_means_they_claim(rng):
    snapshots = [torch.randn(3, 2) for _ in range(9)]
    ema, swa = (t.WeightAverage(decay, snapshots[:1]) for decay in (0.8, 1.0))
    for s in snapshots:
        ema.update([s])
        swa.update([s])
    weights = torch.tensor([0.8 ** (8 - i) for i in range(9)])
    expected = (torch.stack(snapshots) * (weights / weights.sum())[:, None, None]).sum(0)
    torch.testing.assert_close(ema.mean[0], expected)
    torch.testing.assert_close(swa.mean[0], torch.stack(snapshots).mean(0))


def test_swa_takes_each_swa_every_step_near_the_end():
    hp = tiny(SWA_EVERY=3, SWA_THRESHOLD=0.2)
    taken = [step for step in range(1, 10) if t.takes_snapshot("swa", step, 0.1, hp)]
    assert taken == [3, 6, 9]


def test_long_running_ema_is_the_plain_recursion(rng):
    """From some hundred steps on the bias correction is gone: 0.997 means 0.997."""
    ema = t.WeightAverage(0.9, [torch.zeros(2)])
    for _ in range(400):
        ema.update([torch.randn(2)])
    before, new = ema.mean[0].clone(), torch.randn(2)
    ema.update([new])
    torch.testing.assert_close(ema.mean[0], 0.9 * before + 0.1 * new)


@pytest.mark.parametrize("averaging", ["none", "ema", "swa", "ema_swa"])
def test_the_average_that_is_named_is_the_one_that_is_used(averaging, rng):
    model = t.GPT(tiny(AVERAGING=averaging))
    averages = t.Trainer(model, None, None, ALONE, t.RunLog(), t.StopSignal()).averages
    assert "_".join(averages) == averaging.replace("none", "")
    for average in averages.values():
        average.update([torch.randn_like(p) for p in average.mean])
    got, means = t.averaged_parameters(averages), [average.mean[0] for average in averages.values()]
    assert got == [] if averaging == "none" else torch.equal(got[0], sum(means) / len(means))


def test_an_average_that_never_began_is_not_used(rng):
    """SWA without a snapshot: the EMA alone, or else the last weights."""
    parameters = [torch.randn(3)]
    ema, swa = (t.WeightAverage(decay, parameters) for decay in (0.5, 1.0))
    assert t.averaged_parameters(dict(ema=ema, swa=swa)) == []
    ema.update(parameters)
    torch.testing.assert_close(t.averaged_parameters(dict(ema=ema, swa=swa)), parameters)
