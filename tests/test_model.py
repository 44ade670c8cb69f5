"""The model against the same formulas written with loops and without tricks;
and causality of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FRONTIER, logits, randomize, tiny

import train_gpt as t


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def plain_rope(x_K, position, T, hp):
    r, base = hp.rope_dims, hp.rope_base
    if T > 1024 and r > 2:
        base = base * (T / 1024) ** (r / (r - 2))
    y = x_K.clone()
    for i in range(r // 2):
        angle = position / base ** (2 * i / r)
        c, s = math.cos(angle), math.sin(angle)
        y[i] = x_K[i] * c + x_K[i + r // 2] * s
        y[i + r // 2] = -x_K[i] * s + x_K[i + r // 2] * c
    return y


def plain_attention(m, x_TD, hp, ve_TGK, v_first_TGK, layer):
    T, H, G, K = len(x_TD), hp.num_heads, hp.num_kv_heads, hp.head_dim
    q, k = rms((x_TD @ m.q.weight.T).view(T, H, K)), rms((x_TD @ m.k.weight.T).view(T, G, K))
    v_own = (x_TD @ m.v.weight.T).view(T, G, K)
    v = v_own.clone()
    if hp.ve_enabled and layer in hp.ve_layers:
        v = v + m.ve_scale * ve_TGK
    if hp.vrl_enabled and layer:
        gate = torch.sigmoid(m.vrl_gate)
        v = (1 - gate) * v + gate * v_first_TGK
    out = torch.zeros(T, H, K, dtype=x_TD.dtype)
    for h in range(H):
        g = h // (H // G)
        for i in range(T):
            qi = plain_rope(q[i, h], i, T, hp) * m.q_gain[h]
            weights = torch.stack(
                [qi @ plain_rope(k[j, g], j, T, hp) for j in range(i + 1)]
            ) / math.sqrt(K)
            y = torch.softmax(weights, 0) @ v[: i + 1, g]
            if layer >= hp.num_layers - hp.xsa_last_n:
                own = v[i, g] / v[i, g].norm()
                y = y - (y @ own) * own
            if hp.attn_gate_dims:
                y = y * torch.sigmoid(m.gate[h] @ x_TD[i, : hp.attn_gate_dims])
            out[i, h] = y
    return out.reshape(T, H * K) @ m.proj.weight.T, v_own


def plain_order(hp):
    """Depth recurrence: 0 ... 5, 4, 5, 6 ... 10 for RECUR_LAYERS=4,5 of 11 layers."""
    order = []
    for layer in range(hp.num_layers):
        order.append(layer)
        if hp.recur_layers and layer == hp.recur_layers[-1]:
            order += hp.recur_layers
    return order


def plain_forward(model, ids):
    """What the model is defined to compute, part by part, for one sequence; without the softcap."""
    hp, T, L = model.hp, len(ids), model.hp.num_layers
    x = model.embed.weight[ids]
    if hp.bigram_vocab_size:
        size = hp.bigram_vocab_size
        rows = [size - 1] + [
            ((36313 * ids[i]) ^ (27191 * ids[i - 1])) % (size - 1) for i in range(1, T)
        ]
        x = x + (model.bigram.table.weight[rows] @ model.bigram.proj.weight.T) * model.bigram.scale
    x = rms(x)
    if hp.smear_enabled:
        gate = torch.sigmoid(model.smear_gate)
        x = torch.stack(
            [
                (1 - gate) * x[i]
                + gate * (x[i - 1] if i and (hp.smear_crosses_bos or ids[i] != 1) else 0 * x[i])
                for i in range(T)
            ]
        )
    ve = None
    if hp.ve_enabled and hp.ve_layers:
        ve = (
            model.value_embed.table.weight[ids] @ model.value_embed.proj.weight.T
        ) * model.value_embed.scale
        ve = ve.view(T, hp.num_kv_heads, hp.head_dim)
    x0, v_first, stack, order = x, None, [], plain_order(hp)
    lanes = None
    for i, layer in enumerate(order):
        m, weight = model.blocks[layer], i - len(order) // 2
        if hp.unet_skips and 0 <= weight < L // 2:
            skip = model.skip_weights[weight] * stack.pop()
            gate = torch.sigmoid(model.skip_gates[weight]) if hp.skip_gates else None
            x = x + skip if gate is None else gate * x + (1 - gate) * skip
        if hp.parallel_start_layer and layer >= hp.parallel_start_layer and lanes is None:
            lanes = x
        c = 1 / math.sqrt(layer + 1) if hp.ln_scale else 1.0
        x = m.mix_x * x + m.mix_x0 * x0
        y, v = plain_attention(m.attn, rms(x) * c, hp, ve, v_first, layer)
        v_first = v if v_first is None else v_first
        x = x + m.attn_scale * y
        read = x if lanes is None else lanes
        hidden = (rms(read) * c) @ m.mlp.fc.weight.T
        hidden = torch.where(hidden > 0, hidden, hp.leaky_slope * hidden) ** 2
        written = read + m.mlp_scale * (hidden @ m.mlp.proj.weight.T)
        x, lanes = (written, None) if lanes is None else (x, written)
        if weight < 0:
            stack.append(x)
    if lanes is not None:
        x = model.lane_mix * x + (1 - model.lane_mix) * lanes
    return rms(x) @ (model.embed.weight if hp.tie_embeddings else model.head.weight).T


@pytest.fixture
def in_float64(monkeypatch):
    """The trunk computes in float32 on the CPU; for exact comparisons keep it in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


SWITCHES = [
    {},
    dict(VE_ENABLED=0),
    dict(VRL_ENABLED=0),
    dict(XSA_LAST_N=0),
    dict(XSA_LAST_N=4),
    dict(LN_SCALE=0),
    dict(BIGRAM_VOCAB_SIZE=0),
    dict(SMEAR_ENABLED=0),
    dict(UNET_SKIPS=0),
    dict(ROPE_DIMS=0),
    dict(ROPE_DIMS=16),
    dict(LEAKY_SLOPE=0.9),
    dict(TIE_EMBEDDINGS=0),
    dict(LOGIT_SOFTCAP=0),
    dict(NUM_KV_HEADS=4),
    dict(NUM_KV_HEADS=1),
    dict(NUM_LAYERS=3, VE_LAYERS="0,2"),
    dict(NUM_LAYERS=5, VE_LAYERS=""),
    dict(NUM_LAYERS=1, VE_LAYERS="0", XSA_LAST_N=1),
    dict(MLP_MULT=3.5),
    dict(ROPE_BASE=500),
    dict(RECUR_LAYERS="1,2"),
    dict(RECUR_LAYERS="0", NUM_LAYERS=3, VE_LAYERS="2"),
    dict(RECUR_LAYERS="3"),
    dict(PARALLEL_START_LAYER=2),
    dict(PARALLEL_START_LAYER=1, RECUR_LAYERS="1,2"),
    dict(SKIP_GATES=1),
    dict(ATTN_GATE_DIMS=12),
    dict(SMEAR_CROSSES_BOS=0),
]


@pytest.mark.parametrize(
    "switch", [*SWITCHES, FRONTIER], ids=lambda s: ",".join(list(s)[:3]) or "defaults"
)
def test_every_feature_equals_its_plain_reading(rng, in_float64, switch):
    model = randomize(t.GPT(tiny(**switch)))
    ids = torch.from_numpy(rng.integers(0, 300, (2, 7)))
    ids[0, 3] = t.BOS
    hidden, cap = model.hidden(ids), model.hp.logit_softcap
    for row, row_hidden in zip(ids, hidden):
        z = plain_forward(model, row.tolist())
        torch.testing.assert_close(model.logits(row_hidden), z, rtol=1e-9, atol=1e-9)
        expected = F.log_softmax(cap * torch.tanh(z / cap) if cap else z, -1)
        torch.testing.assert_close(logits(model, row_hidden), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("switch", SWITCHES[1:], ids=lambda s: ",".join(s))
def test_every_switch_changes_the_model(switch):
    torch.manual_seed(1)
    base = randomize(t.GPT(tiny()))
    torch.manual_seed(1)
    other = randomize(t.GPT(tiny(**switch)))
    other.load_state_dict(
        {
            k: v
            for k, v in base.state_dict().items()
            if k in (s := other.state_dict()) and s[k].shape == v.shape
        },
        strict=False,
    )
    ids = torch.arange(12).view(1, 12) * 7 + 1  # the first is a BOS
    ids[0, 5] = t.BOS
    found, changed = (logits(model, model.hidden(ids)) for model in (base, other))
    assert not torch.allclose(found, changed, rtol=0, atol=1e-6)


def test_xsa_on_more_layers_than_there_are_is_xsa_on_all():
    ids = torch.arange(12).view(1, 12) * 7
    found = []
    for layers in (4, 5, 1000):
        torch.manual_seed(1)
        model = randomize(t.GPT(tiny(XSA_LAST_N=layers)))
        assert [block.attn.xsa for block in model.blocks] == [True] * 4
        found.append(logits(model, model.hidden(ids)))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_rope_base_grows_beyond_1024_positions(rng, in_float64):
    hp = tiny()
    x = torch.randn(1, 1500, 1, 16, dtype=torch.float64)
    rotated = t.rotate(x, t.rotary_tables(1500, hp, x.device))
    for i in (0, 1, 700, 1499):
        torch.testing.assert_close(
            rotated[0, i, 0], plain_rope(x[0, i, 0], i, 1500, hp), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("T", [100, 1024, 1500])
def test_a_window_shorter_than_trainings_has_its_rope(T):
    hp = tiny(TRAIN_SEQ_LEN=2048, TRAIN_BATCH_TOKENS=2048)
    assert torch.equal(t.rotary_tables(T, hp), t.rotary_tables(2048, hp)[:, :T])


@pytest.mark.parametrize("switches", [{}, FRONTIER], ids=["defaults", "frontier"])
def test_a_changed_token_changes_no_earlier_logit(rng, switches):
    """Causality of the whole model, bit for bit, at every position."""
    model = randomize(t.GPT(tiny(**switches))).float()
    ids = torch.from_numpy(rng.integers(0, 300, (1, 20)))
    before = logits(model, model.hidden(ids))
    for position in range(20):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1 + rng.integers(0, 298)) % 300
        after = logits(model, model.hidden(changed))
        assert torch.equal(before[0, :position], after[0, :position])
        assert not torch.equal(before[0, position], after[0, position])


def test_loss_is_the_mean_cross_entropy_of_the_logits(rng):
    model = randomize(t.GPT(tiny())).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (3, 9))) for _ in range(2))
    expected = F.cross_entropy(logits(model, model.hidden(x)).flatten(0, 1), y.flatten())
    torch.testing.assert_close(model(x, y), expected)


def test_a_weighted_loss_is_the_weighted_sum_over_the_targets(rng):
    model = randomize(t.GPT(tiny())).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (3, 9))) for _ in range(2))
    weights = torch.from_numpy(rng.random((3, 9))).float()
    logp = logits(model, model.hidden(x)).flatten(0, 1)
    nll = F.cross_entropy(logp, y.flatten(), reduction="none")
    torch.testing.assert_close(model(x, y, weights), (nll * weights.flatten()).sum())


@pytest.mark.parametrize(
    "switches",
    [dict(XSA_LAST_N=4), FRONTIER, dict(RECUR_LAYERS="3"), dict(PARALLEL_START_LAYER=1)],
    ids=lambda s: ",".join(list(s)[:1]),
)
def test_the_last_positions_alone_are_those_of_all(rng, in_float64, switches):
    model = randomize(t.GPT(tiny(**switches)))
    ids = torch.from_numpy(rng.integers(0, 300, (2, 20)))
    whole = model.hidden(ids)
    for last in (1, 7, 20):
        torch.testing.assert_close(model.hidden(ids, last), whole[:, -last:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cap", [0, 30])
def test_scores_are_the_nll_and_the_entropy_of_the_logits(rng, cap):
    model = randomize(t.GPT(tiny(LOGIT_SOFTCAP=cap))).float()
    hidden, targets = torch.randn(6, 64), torch.from_numpy(rng.integers(0, 300, 6))
    logp = logits(model, hidden)
    nll, entropy = model.scores(hidden, targets)
    torch.testing.assert_close(nll, -logp[torch.arange(6), targets])
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(model.nll(hidden, targets), nll)


def test_defaults_are_the_design():
    torch.manual_seed(0)
    model = t.GPT(t.Hyperparameters())
    assert sum(p.numel() for p in model.parameters()) == 26_993_766
    p = dict(model.named_parameters())
    assert abs(p["embed.weight"].std().item() - 0.005) < 1e-4
    assert abs(p["value_embed.table.weight"].std().item() - 0.01) < 1e-3
    for name, tensor in p.items():
        if (
            name.endswith(("proj.weight",))
            and "blocks" in name
            or name in ("bigram.table.weight", "smear_gate")
        ):
            assert tensor.count_nonzero() == 0, name
        elif name.endswith(".weight") and "embed.weight" not in name and ".table." not in name:
            scale = 22**-0.5 if name.startswith(("bigram", "value_embed")) else 1.0
            singular = torch.linalg.svdvals(tensor)
            torch.testing.assert_close(
                singular, torch.full_like(singular, scale), rtol=1e-4, atol=1e-5
            )
    assert {round(b.attn.vrl_gate.item(), 3) for b in model.blocks[1:]} == {-1.5}
    assert model.blocks[0].attn.vrl_gate is None
    assert [b.attn.xsa for b in model.blocks] == [False] * 7 + [True] * 4
    assert [b.attn.ve_scale is not None for b in model.blocks] == [False] * 9 + [True] * 2
    assert model.skip_weights.shape == (5, 512) and p["blocks.0.attn.q_gain"].tolist() == [1.5] * 8


def test_recurrence_runs_its_layers_again_after_the_last_of_them():
    plain, recurrent = t.block_orders(t.Hyperparameters(recur_layers=(4, 5)))
    assert (plain, recurrent) == (tuple(range(11)), (0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10))


def test_without_recurrence_both_orders_are_one():
    assert len(set(t.block_orders(t.Hyperparameters()))) == 1


def test_recurrence_adds_no_parameters():
    counts = [
        sum(p.numel() for p in t.GPT(tiny(RECUR_LAYERS=layers)).parameters())
        for layers in ("", "1,2")
    ]
    assert counts[0] == counts[1]


def test_the_plain_order_is_the_model_without_recurrence(rng):
    torch.manual_seed(1)
    model = randomize(t.GPT(tiny(RECUR_LAYERS="1,2"))).float()
    torch.manual_seed(1)
    plain = randomize(t.GPT(tiny())).float()
    model.order, _ = t.block_orders(model.hp)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    assert torch.equal(model.hidden(ids), plain.hidden(ids))


@pytest.mark.parametrize("switches", [{}, FRONTIER], ids=["defaults", "frontier"])
def test_gradients_reach_every_parameter(rng, switches):
    model = randomize(t.GPT(tiny(**switches))).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (4, 16))) for _ in range(2))
    model(x, y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_xsa_leaves_nothing_along_the_own_value(rng):
    y, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    out = t.remove_own_value(y, v).view(2, 5, 2, 2, 16)
    left = (out * v[:, :, :, None]).sum(-1).abs()
    summed = y.view(2, 5, 2, 2, 16).norm(dim=-1) * v.norm(dim=-1)[..., None]
    assert (left <= 16 * torch.finfo(torch.float32).eps * summed).all()
