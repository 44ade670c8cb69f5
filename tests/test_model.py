"""The model against a plain second reading of DESIGN section 4: loops, no tricks;
and causality of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import logits, tiny

import train_gpt as t


def randomize(model):
    """Give every parameter a value that matters, so that zero-initialised paths are tested too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                torch.randn_like(p)
                * (0.3 / max(1, p.shape[-1] if p.ndim else 1) ** 0.5 if p.ndim == 2 else 0.2)
            )
    return model.double()


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
            out[i, h] = y
    return out.reshape(T, H * K) @ m.proj.weight.T, v_own


def plain_forward(model, ids):
    """DESIGN section 4, one sentence after the other, for one sequence."""
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
            [(1 - gate) * x[i] + gate * (x[i - 1] if i else 0 * x[i]) for i in range(T)]
        )
    ve = None
    if hp.ve_enabled and hp.ve_layers:
        ve = (
            model.value_embed.table.weight[ids] @ model.value_embed.proj.weight.T
        ) * model.value_embed.scale
        ve = ve.view(T, hp.num_kv_heads, hp.head_dim)
    x0, v_first, stack = x, None, []
    for layer, m in enumerate(model.blocks):
        if hp.unet_skips and layer >= L // 2 and stack:
            x = x + model.skip_weights[layer - L // 2] * stack.pop()
        c = 1 / math.sqrt(layer + 1) if hp.ln_scale else 1.0
        x = m.mix_x * x + m.mix_x0 * x0
        y, v = plain_attention(m.attn, rms(x) * c, hp, ve, v_first, layer)
        v_first = v if layer == 0 else v_first
        x = x + m.attn_scale * y
        hidden = (rms(x) * c) @ m.mlp.fc.weight.T
        hidden = torch.where(hidden > 0, hidden, hp.leaky_slope * hidden) ** 2
        x = x + m.mlp_scale * (hidden @ m.mlp.proj.weight.T)
        if layer < L // 2:
            stack.append(x)
    z = rms(x) @ (model.embed.weight if hp.tie_embeddings else model.head.weight).T
    return hp.logit_softcap * torch.tanh(z / hp.logit_softcap) if hp.logit_softcap else z


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
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: ",".join(s) or "defaults")
def test_every_feature_equals_its_plain_reading(rng, in_float64, switch):
    model = randomize(t.GPT(tiny(**switch)))
    ids = torch.from_numpy(rng.integers(0, 300, (2, 7)))
    got = logits(model, model(ids))
    for row, row_logits in zip(ids, got):
        torch.testing.assert_close(
            row_logits, plain_forward(model, row.tolist()), rtol=1e-9, atol=1e-9
        )


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
    ids = torch.arange(12).view(1, 12) * 7
    assert not torch.allclose(logits(base, base(ids)), logits(other, other(ids)), rtol=0, atol=1e-6)


def test_rope_base_grows_beyond_1024_positions(rng, in_float64):
    hp = tiny()
    x = torch.randn(1, 1500, 1, 16, dtype=torch.float64)
    rotated = t.rotate(x, t.rotary_tables(1500, hp, x.device))
    for i in (0, 1, 700, 1499):
        torch.testing.assert_close(
            rotated[0, i, 0], plain_rope(x[0, i, 0], i, 1500, hp), rtol=1e-9, atol=1e-9
        )


def test_a_changed_token_changes_no_earlier_logit(rng):
    """Causality of the whole model, bit for bit, at every position."""
    model = randomize(t.GPT(tiny())).float()
    ids = torch.from_numpy(rng.integers(0, 300, (1, 20)))
    before = logits(model, model(ids))
    for position in range(20):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1 + rng.integers(0, 298)) % 300
        after = logits(model, model(changed))
        assert torch.equal(before[0, :position], after[0, :position])
        assert not torch.equal(before[0, position], after[0, position])


def test_loss_is_the_mean_cross_entropy_of_the_logits(rng):
    model = randomize(t.GPT(tiny())).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (3, 9))) for _ in range(2))
    torch.testing.assert_close(
        model(x, y), F.cross_entropy(logits(model, model(x)).flatten(0, 1), y.flatten())
    )


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


def test_gradients_reach_every_parameter(rng):
    model = randomize(t.GPT(tiny())).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (4, 16))) for _ in range(2))
    model(x, y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_xsa_leaves_nothing_along_the_own_value(rng):
    y, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    out = t.remove_own_value(y, v).view(2, 5, 2, 2, 16)
    assert (out * v[:, :, :, None]).sum(-1).abs().max() < 1e-4
