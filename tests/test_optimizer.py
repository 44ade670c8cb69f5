"""What every optimizer promises; Muon, AdamW, schedules, averages; and, as optimizers share their
work out by them, the methods of Ranks on several ranks (update_driver.py)."""

import itertools
import math
import subprocess

import pytest
import torch
from helpers import ALONE, ROOT, finish, shifted, start_python, tiny

import train_gpt as t

# a model of the settings UNTIED has parameters of every kind
UNTIED = dict(TIE_EMBEDDINGS=0)
CLASSES = list(dict.fromkeys(group.optimizer for group in t.training_groups(tiny()).values()))


def parameters_of(optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_of(cls: type, model):
    """The one of the model's optimizers that is of this class."""
    (found,) = (o for o in t.build_optimizers(model, model.hp, ALONE) if type(o) is cls)
    return found


def take_step(optimizer, step: int, gradients: list[torch.Tensor]) -> None:
    optimizer.schedule(step, t.StepPlan(1.0, ()))
    for p, g in zip(parameters_of(optimizer), gradients):
        p.grad = g.clone()
    t.update_parameters([optimizer], clip=0.3)


def random_gradients(optimizer) -> list[torch.Tensor]:
    return [torch.randn_like(p) for p in parameters_of(optimizer)]


# --- the contract ---------------------------------------------------------------------------------


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request) -> type:
    """Each class in the table of training_groups."""
    return request.param


@pytest.fixture
def optimizer(cls, seed):
    """One of the class, with the parameters that it has in a model."""
    return optimizer_of(cls, shifted(t.GPT(tiny(**UNTIED))))


def test_a_step_moves_every_parameter(optimizer):
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    take_step(optimizer, 0, random_gradients(optimizer))
    assert not any(map(torch.equal, before, parameters_of(optimizer)))


def test_the_state_is_there_before_the_first_step_and_stays_where_it_is(optimizer):
    """So that warm-up can put it back, and a checkpoint can be copied into it."""
    before = {name: x.data_ptr() for name, x in optimizer.state_tensors().items()}
    take_step(optimizer, 0, random_gradients(optimizer))
    optimizer.complete_state()
    assert {name: x.data_ptr() for name, x in optimizer.state_tensors().items()} == before


def test_a_fresh_optimizer_with_the_state_of_another_takes_its_steps(cls, optimizer):
    for step in range(2):
        take_step(optimizer, step, random_gradients(optimizer))
    optimizer.complete_state()
    fresh = optimizer_of(cls, t.GPT(tiny(**UNTIED)))
    for p, q in zip(parameters_of(fresh), parameters_of(optimizer)):
        p.data.copy_(q.detach())
    found = fresh.state_tensors()
    for name, x in optimizer.state_tensors().items():
        found[name].copy_(x)
    for step in range(2, 4):
        gradients = random_gradients(optimizer)
        take_step(optimizer, step, gradients)
        take_step(fresh, step, gradients)
    assert all(map(torch.equal, parameters_of(fresh), parameters_of(optimizer)))


def test_a_schedule_scales_every_rate_from_its_initial_one(optimizer):
    optimizer.schedule(0, t.StepPlan(0.5, ()))
    optimizer.schedule(750, t.StepPlan(0.25, ()))
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 * group["initial_lr"] > 0


def test_only_muons_decay_follows_the_plan_and_from_its_initial_value(optimizer):
    before = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.schedule(0, t.StepPlan(1.0, (), muon_decay=0.2))
    optimizer.schedule(1, t.StepPlan(1.0, (), muon_decay=0.5))
    factor = 0.5 if type(optimizer) is t.Muon else 1.0
    found = [group["weight_decay"] for group in optimizer.param_groups]
    assert found == [factor * decay for decay in before]


def test_the_square_of_the_gradients_is_that_of_all_its_parameters(optimizer):
    for p in parameters_of(optimizer):
        p.grad = torch.randn_like(p)
    expected = sum(p.grad.double().square().sum().item() for p in parameters_of(optimizer))
    optimizer.send_gradients()
    optimizer.receive_gradients()
    assert optimizer.gradient_square().item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_gradients_that_the_caller_has_halved_are_those_of_half_the_size(cls, optimizer):
    """As clipping does; in the second step, as the first of AdamW is the same for any size."""
    other = optimizer_of(cls, t.GPT(tiny(**UNTIED)))
    for p, q in zip(parameters_of(other), parameters_of(optimizer)):
        p.data.copy_(q.detach())
    for halve in (False, True):
        for p, q in zip(parameters_of(optimizer), parameters_of(other)):
            p.grad = torch.randn_like(p)
            q.grad = p.grad / 2 if halve else p.grad.clone()
        for o in (optimizer, other):
            o.send_gradients()
            received = o.receive_gradients()
            if halve and o is optimizer:
                torch._foreach_mul_(received, 0.5)
            o.begin_step()
            o.finish_step()
    assert all(map(torch.equal, parameters_of(optimizer), parameters_of(other)))


def test_each_parameter_has_exactly_one_optimizer():
    """Also where all rates agree."""
    rates = dict(EMBED_LR=0.1, HEAD_LR=0.1, SCALAR_LR=0.1, MATRIX_LR=0.1)
    model = t.GPT(tiny(**UNTIED, **rates))
    optimizers = t.build_optimizers(model, model.hp, ALONE)
    owned = [id(p) for o in optimizers for p in parameters_of(o)]
    assert sorted(owned) == sorted(map(id, model.parameters()))


def test_no_two_optimizers_give_a_state_the_same_name():
    model = t.GPT(tiny(**UNTIED))
    optimizers = t.build_optimizers(model, model.hp, ALONE)
    names = list(itertools.chain(*(o.state_tensors() for o in optimizers)))
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def updates() -> subprocess.CompletedProcess:
    """Of update_driver.py, which says what has held on 1, 2, 3 and 4 ranks, until something does
    not."""
    return finish(start_python(ROOT, ["-m", "tests.update_driver"], {}))


def has_held(updates, world_size: int, what: str) -> bool:
    print(updates.stderr)  # shown when the test fails
    return f"world_size:{world_size} {what}\n" in updates.stdout


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_sum_share_agree_and_learn_from_rank_0(updates, world_size):
    """The methods of Ranks."""
    assert has_held(updates, world_size, "collectives")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shared_out_over_ranks_its_steps_and_state_are_those_of_one(updates, cls, world_size):
    assert has_held(updates, world_size, f"shared:{cls.__name__}")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_updates_over_ranks_are_the_written_rule(updates, world_size):
    assert has_held(updates, world_size, "written_rule")


# --- Muon -----------------------------------------------------------------------------------------


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
        muon.schedule(step * 100, t.StepPlan(1.0, ()))
        for p in params:
            p.grad = torch.randn_like(p)
        for p, w, m in zip(params, plain, buffers):
            m.mul_(momentum).add_(p.grad)
            update = t.orthogonalize(p.grad + momentum * m, 5) * math.sqrt(
                max(1, p.size(0) / p.size(1))
            )
            w.mul_(1 - 0.1 * 0.2).sub_(0.1 * update)
        t.update_parameters([muon], clip=0)
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
    muon.schedule(0, t.StepPlan(1.0, ()))
    momentum = t.muon_momentum(0, hp)
    updates = []
    for p in params:
        p.grad = torch.randn_like(p)
        update = (1 + momentum) * p.grad
        updates.append(t.orthogonalize(update / update.norm(dim=1, keepdim=True), 5))
    t.update_parameters([muon], clip=0)
    for p, w, update in zip(params, before, updates):
        rate = 0.1 * math.sqrt(max(1, p.size(0) / p.size(1)))
        torch.testing.assert_close(p.detach(), w - rate * update)


def test_muon_momentum_warms_up():
    hp = tiny()
    found = [round(t.muon_momentum(step, hp), 4) for step in (0, 750, 1500, 9000)]
    assert found == [0.92, 0.955, 0.99, 0.99]


def test_a_schedule_sets_muons_momentum():
    muon = optimizer_of(t.Muon, t.GPT(tiny()))
    muon.schedule(750, t.StepPlan(1.0, ()))
    assert {round(group["momentum"], 4) for group in muon.param_groups} == {0.955}


# --- who trains what ------------------------------------------------------------------------------


def training_of(model) -> dict[str, tuple[type, float, float]]:
    """name -> (class of its optimizer, lr, weight decay)."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (type(o), group["lr"], group["weight_decay"])
        for o in t.build_optimizers(model, model.hp, ALONE)
        for group in o.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("tied", [0, 1])
def test_each_parameter_has_the_right_optimizer(tied):
    hp = tiny(TIE_EMBEDDINGS=tied, MUON_WD=0.05, ADAM_WD=0.02, EMBED_WD=0.09)
    classes = {kind: group.optimizer for kind, group in t.training_groups(hp).items()}
    for name, found in training_of(t.GPT(hp)).items():
        if name.endswith((".table.weight", "embed.weight")):
            expected = classes["table"], hp.tied_embed_lr if tied else hp.embed_lr, 0.09
        elif name == "head.weight":
            expected = classes["head"], hp.head_lr, 0.02
        elif name.endswith(".weight"):
            expected = classes["matrix"], hp.matrix_lr, 0.05
        else:
            expected = classes["vector"], hp.scalar_lr, 0.02
        assert found == expected, name


def test_muon_trains_the_matrices():
    assert t.training_groups(tiny())["matrix"].optimizer is t.Muon


def test_adamw_has_the_betas_of_the_settings():
    adamw = optimizer_of(t.AdamW, t.GPT(tiny(BETA1=0.8, BETA2=0.93)))
    assert adamw.defaults["betas"] == (0.8, 0.93)


def test_a_parameter_without_an_optimizer_is_noticed(monkeypatch):
    cls = CLASSES[-1]

    class Forgetful(cls):
        """Drops the first parameter that it was given."""

        def __init__(self, groups, hp, ranks):
            first, *others = groups
            super().__init__([first | dict(params=first["params"][1:]), *others], hp, ranks)

    monkeypatch.setattr(t, cls.__name__, Forgetful)
    model = t.GPT(tiny())
    with pytest.raises(AssertionError, match="a parameter has no optimizer, or several"):
        t.build_optimizers(model, model.hp, ALONE)


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
    t.update_parameters(optimizers, clip=0.3)
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


def test_adamw_is_torchs(rng):
    """It takes the steps that it would have taken had its state been made at the first of them."""
    adamw = optimizer_of(t.AdamW, t.GPT(tiny()))
    params = parameters_of(adamw)
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    rates = [g["lr"] for g in adamw.param_groups for _ in g["params"]]
    other = torch.optim.AdamW(
        [dict(params=[p], lr=lr) for p, lr in zip(plain, rates)],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.04,
        fused=True,
    )
    for _ in range(2):
        for p, q in zip(params, plain):
            p.grad = q.grad = torch.randn_like(p)
        adamw.step()
        other.step()
    assert all(map(torch.equal, params, plain))


# --- schedules ------------------------------------------------------------------------------------


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


# --- averages -------------------------------------------------------------------------------------


def test_averages_are_the_means_they_claim(rng):
    snapshots = [torch.randn(3, 2) for _ in range(9)]
    ema, swa = (t.WeightAverage(decay, snapshots[:1]) for decay in (0.8, 1.0))
    for s in snapshots:
        ema.update([s])
        swa.update([s])
    shares = torch.tensor([0.8 ** (8 - i) for i in range(9)])
    expected = (torch.stack(snapshots) * (shares / shares.sum())[:, None, None]).sum(0)
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
    averages = t.build_averages([torch.randn(3, 2)], tiny(AVERAGING=averaging))
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
