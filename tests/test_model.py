"""The model against the same formulas written with loops and without tricks;
and causality of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FRONTIER, hidden_states, log_probabilities, loss_of, randomize, tiny

import train_gpt as t


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def plain_rope(x_K, position, T, hp):
    r, base = hp.rope_dims, hp.rope_base
    span = max(T, hp.train_seq_len)
    if span > hp.rope_base_length and r > 2:
        base = base * (span / hp.rope_base_length) ** (r / (r - 2))
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
    keys = [[plain_rope(k[j, g], j, T, hp) for j in range(T)] for g in range(G)]
    for h in range(H):
        g = h // (H // G)
        for i in range(T):
            qi = plain_rope(q[i, h], i, T, hp) * m.q_gain[h]
            scores = torch.stack([qi @ key for key in keys[g][: i + 1]]) / math.sqrt(K)
            y = torch.softmax(scores, 0) @ v[: i + 1, g]
            if layer >= hp.num_layers - hp.xsa_last_n:
                own = v[i, g] / v[i, g].norm()
                y = y - (y @ own) * own
            if hp.attn_gate_dims:
                y = y * torch.sigmoid(m.gate[h] @ x_TD[i, : hp.attn_gate_dims])
            out[i, h] = y
    return out.reshape(T, H * K) @ m.proj.weight.T, v_own


def plain_passes(hp):
    """The order in which the blocks run, with depth recurrence. For RECUR_LAYERS=4,5, RECUR_TIMES=2
    and 11 layers it is 0 ... 5, 4, 5, 6 ... 10."""
    passes = []
    for layer in range(hp.num_layers):
        passes.append(layer)
        if hp.recur_layers and layer == hp.recur_layers[-1]:
            for _ in range(hp.recur_times - 1):
                passes += hp.recur_layers
    return passes


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
        smear, mixed = model.smear, []
        for i in range(T):
            reads_before = i and (hp.smear_crosses_bos or ids[i] != 1)
            before = x[i - 1] if reads_before else 0 * x[i]
            if hp.smear_gate_dims:
                share = torch.sigmoid(smear.gate @ x[i, : hp.smear_gate_dims])
                mixed.append(x[i] + smear.scale * share * before)
            else:
                share = torch.sigmoid(smear.gate)
                mixed.append((1 - share) * x[i] + share * before)
        x = torch.stack(mixed)
    ve = None
    if hp.ve_enabled and hp.ve_layers:
        ve = (
            model.value_embed.table.weight[ids] @ model.value_embed.proj.weight.T
        ) * model.value_embed.scale
        ve = ve.view(T, hp.num_kv_heads, hp.head_dim)
    x0, v_first, stack, passes = x, None, [], plain_passes(hp)
    mlp_lane = None  # the second lane
    for i, layer in enumerate(passes):
        m, number = model.blocks[layer], i - len(passes) // 2
        if hp.unet_skips and 0 <= number < L // 2:
            skip = model.skip_weights[number] * stack.pop()
            gate = torch.sigmoid(model.skip_gates[number]) if hp.skip_gates else None
            x = x + skip if gate is None else gate * x + (1 - gate) * skip
        if hp.parallel_start_layer and layer >= hp.parallel_start_layer and mlp_lane is None:
            mlp_lane = x
        c = 1 / math.sqrt(layer + 1) if hp.ln_scale else 1.0
        mixed = m.mix_x * x + m.mix_x0 * x0
        y, v = plain_attention(m.attn, rms(mixed) * c, hp, ve, v_first, layer)
        y = m.attn_scale * y
        v_first = v if v_first is None else v_first
        read = mixed + y if mlp_lane is None else mlp_lane
        hidden = (rms(read) * c) @ m.mlp.fc.weight.T
        hidden = torch.where(hidden > 0, hidden, hp.leaky_slope * hidden) ** 2
        z = m.mlp_scale * (hidden @ m.mlp.proj.weight.T)
        if mlp_lane is None:
            x = mixed + y + z
        else:
            (r0, p0, q0), (r1, p1, q1) = m.lane_weights
            x, mlp_lane = r0 * x + p0 * y + q0 * z, r1 * mlp_lane + p1 * y + q1 * z
        if number < 0:
            stack.append(x)
    if mlp_lane is not None:
        x = (x + mlp_lane) / 2
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
    dict(SMEAR_GATE_DIMS=12),
    dict(SMEAR_GATE_DIMS=12, SMEAR_CROSSES_BOS=0),
    dict(RECUR_LAYERS="1,2", RECUR_TIMES=3),
    dict(ROPE_BASE_LENGTH=4),
]


@pytest.mark.parametrize(
    "switch", [*SWITCHES, FRONTIER], ids=lambda s: ",".join(list(s)[:3]) or "defaults"
)
def test_every_feature_equals_its_plain_reading(rng, in_float64, switch):
    model = randomize(t.GPT(tiny(**switch)))
    ids = torch.from_numpy(rng.integers(0, 300, (2, 7)))
    ids[0, 3] = t.BOS
    hidden, cap = hidden_states(model, ids), model.hp.logit_softcap
    for row, row_hidden in zip(ids, hidden):
        z = plain_forward(model, row.tolist())
        torch.testing.assert_close(model.logits(row_hidden), z, rtol=1e-9, atol=1e-9)
        expected = F.log_softmax(cap * torch.tanh(z / cap) if cap else z, -1)
        found = log_probabilities(model, row_hidden)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


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
    found, changed = (log_probabilities(m, hidden_states(m, ids)) for m in (base, other))
    assert not torch.allclose(found, changed, rtol=0, atol=1e-6)


def test_xsa_on_more_layers_than_there_are_is_xsa_on_all():
    ids = torch.arange(12).view(1, 12) * 7
    found = []
    for layers in (4, 5, 1000):
        torch.manual_seed(1)
        model = randomize(t.GPT(tiny(XSA_LAST_N=layers)))
        assert [block.attn.xsa for block in model.blocks] == [True] * 4
        found.append(log_probabilities(model, hidden_states(model, ids)))
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
    before = log_probabilities(model, hidden_states(model, ids))
    for position in range(20):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1 + rng.integers(0, 298)) % 300
        after = log_probabilities(model, hidden_states(model, changed))
        assert torch.equal(before[0, :position], after[0, :position])
        assert not torch.equal(before[0, position], after[0, position])


def test_loss_is_the_mean_cross_entropy_of_the_logits(rng):
    model = randomize(t.GPT(tiny())).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (3, 9))) for _ in range(2))
    logp = log_probabilities(model, hidden_states(model, x)).flatten(0, 1)
    expected = F.cross_entropy(logp, y.flatten())
    torch.testing.assert_close(loss_of(model, x, y), expected)


def test_a_loss_with_shares_is_the_sum_of_nll_times_share(rng):
    model = randomize(t.GPT(tiny())).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (3, 9))) for _ in range(2))
    shares = torch.from_numpy(rng.random((3, 9))).float()
    logp = log_probabilities(model, hidden_states(model, x)).flatten(0, 1)
    nll = F.cross_entropy(logp, y.flatten(), reduction="none")
    torch.testing.assert_close(loss_of(model, x, y, shares), (nll * shares.flatten()).sum())


@pytest.mark.parametrize(
    "switches",
    [dict(XSA_LAST_N=4), FRONTIER, dict(RECUR_LAYERS="3"), dict(PARALLEL_START_LAYER=1)],
    ids=lambda s: ",".join(list(s)[:1]),
)
def test_the_last_positions_alone_are_those_of_all(rng, in_float64, switches):
    model = randomize(t.GPT(tiny(**switches)))
    ids = torch.from_numpy(rng.integers(0, 300, (2, 20)))
    whole = hidden_states(model, ids)
    for last in (1, 7, 20):
        found = hidden_states(model, ids, last)
        torch.testing.assert_close(found, whole[:, -last:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cap", [0, 30])
def test_scores_are_the_nll_and_the_entropy_of_the_logits(rng, cap):
    model = randomize(t.GPT(tiny(LOGIT_SOFTCAP=cap))).float()
    hidden, target_ids = torch.randn(6, 64), torch.from_numpy(rng.integers(0, 300, 6))
    logp = log_probabilities(model, hidden)
    nll, entropy = model.scores(hidden, target_ids)
    torch.testing.assert_close(nll, -logp[torch.arange(6), target_ids])
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(model.nll(hidden, target_ids), nll)


# --- the design's model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_model() -> t.GPT:
    torch.manual_seed(0)
    return t.GPT(t.Hyperparameters())


def test_the_default_model_has_the_designs_number_of_parameters(default_model):
    assert sum(p.numel() for p in default_model.parameters()) == 26_993_766


def test_output_projections_bigram_table_and_smear_gate_begin_at_zero(default_model):
    zero = {n for n, p in default_model.named_parameters() if not p.count_nonzero()}
    projections = {f"blocks.{i}.{part}.proj.weight" for i in range(11) for part in ("attn", "mlp")}
    mixes = {f"blocks.{i}.mix_x0" for i in range(11)}
    assert zero == projections | mixes | {"bigram.table.weight", "smear.gate"}


def test_the_other_matrices_begin_orthogonal(default_model):
    for name, p in default_model.named_parameters():
        row = t.parameter_row(name)
        if row.kind == "matrix" and p.count_nonzero():
            scale = 22**-0.5 if name.startswith(("bigram", "value_embed")) else 1.0
            wide = (p if p.size(0) <= p.size(1) else p.T) / scale
            torch.testing.assert_close(wide @ wide.T, torch.eye(len(wide)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, std", [("embed", 0.005), ("value_embed.table", 0.01)])
def test_tables_begin_at_random(default_model, name, std):
    weight = default_model.get_parameter(f"{name}.weight")
    assert weight.std().item() == pytest.approx(std, rel=0.02)


def test_an_untied_embedding_begins_with_the_deviation_of_the_pull_requests():
    weight = t.GPT(tiny(TIE_EMBEDDINGS=0)).embed.weight
    assert weight.std().item() == pytest.approx(1.0, rel=0.03)


def test_the_projections_of_tables_begin_with_the_gain_that_is_asked_for():
    model = t.GPT(tiny(MODEL_DIM=128, BIGRAM_DIM=64, TABLE_GAIN_INIT=0.7))
    w = model.bigram.proj.weight
    torch.testing.assert_close(w.T @ w, 0.49 * torch.eye(64), rtol=0, atol=1e-5)


def test_features_of_layers_are_on_where_the_design_has_them(default_model):
    attentions = [block.attn for block in default_model.blocks]
    assert [a.xsa for a in attentions] == [False] * 7 + [True] * 4
    assert [a.ve_scale is not None for a in attentions] == [False] * 9 + [True] * 2
    assert [a.vrl_gate and round(a.vrl_gate.item(), 3) for a in attentions] == [None] + [-1.5] * 10
    assert attentions[0].q_gain.tolist() == [1.5] * 8
    assert default_model.skip_weights.shape == (5, 512)


def test_each_row_of_the_table_of_parameters_matches_one():
    """A row that matches nothing, or only what an earlier row has, is a mistake."""
    names = [n for n, _ in t.GPT(tiny(TIE_EMBEDDINGS=0)).named_parameters()]
    assert {t.parameter_row(name) for name in names} == set(t.PARAMETERS)


def test_only_vectors_are_no_matrices():
    for name, p in t.GPT(tiny(TIE_EMBEDDINGS=0)).named_parameters():
        is_coded = p.ndim == 2 and name.endswith(".weight")
        assert (t.parameter_row(name).kind != "vector") == is_coded, name


# --- depth recurrence -----------------------------------------------------------------------------


def test_recurrence_runs_its_layers_again_after_the_last_of_them():
    once, recurrent = t.block_passes(t.Hyperparameters(recur_layers=(4, 5)))
    assert (once, recurrent) == (tuple(range(11)), (0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10))


def test_without_recurrence_passes_before_and_after_its_start_are_equal():
    assert len(set(t.block_passes(t.Hyperparameters()))) == 1


def test_recurrence_adds_no_parameters():
    counts = [
        sum(p.numel() for p in t.GPT(tiny(RECUR_LAYERS=layers)).parameters())
        for layers in ("", "1,2")
    ]
    assert counts[0] == counts[1]


def test_each_block_once_is_the_model_without_recurrence(rng):
    torch.manual_seed(1)
    model = randomize(t.GPT(tiny(RECUR_LAYERS="1,2"))).float()
    torch.manual_seed(1)
    plain = randomize(t.GPT(tiny())).float()
    once, _ = t.block_passes(model.hp)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    assert torch.equal(model.hidden(ids, once), hidden_states(plain, ids))


@pytest.mark.parametrize("switches", [{}, FRONTIER], ids=["defaults", "frontier"])
def test_gradients_reach_every_parameter(rng, switches):
    model = randomize(t.GPT(tiny(**switches))).float()
    x, y = (torch.from_numpy(rng.integers(0, 300, (4, 16))) for _ in range(2))
    loss_of(model, x, y).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_xsa_leaves_nothing_along_the_own_value(rng):
    y, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    out = t.remove_own_value(y, v).view(2, 5, 2, 2, 16)
    left = (out * v[:, :, :, None]).sum(-1).abs()
    summed = y.view(2, 5, 2, 2, 16).norm(dim=-1) * v.norm(dim=-1)[..., None]
    assert (left <= 16 * torch.finfo(torch.float32).eps * summed).all()


# --- the MLP's two forms --------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch) -> list[float]:
    """One item for each call of the kernels, which do nothing here."""
    calls = []
    monkeypatch.setattr(t, "has_kernels", lambda x: True)
    monkeypatch.setattr(t, "fused_mlp", lambda x, fc, proj, slope: (x, calls.append(slope)))
    return calls


def test_an_mlp_takes_the_kernels_where_they_run(kernel_calls):
    hp = tiny()
    t.MLP(hp)(torch.randn(1, 3, hp.model_dim), torch.ones(hp.model_dim))
    assert kernel_calls == [hp.leaky_slope]


@pytest.mark.parametrize("part", ["fc", "proj"])
def test_an_mlp_that_is_watched_takes_the_plain_form(kernel_calls, part):
    """The kernels would not call the hooks, and the curvature would be of nothing."""
    hp = tiny()
    mlp, seen = t.MLP(hp), []
    handle = getattr(mlp, part).register_forward_hook(lambda *_: seen.append(part))
    x, scale = torch.randn(1, 3, hp.model_dim), torch.ones(hp.model_dim)
    mlp(x, scale)
    assert seen == [part]
    assert not kernel_calls
    handle.remove()
    mlp(x, scale)
    assert len(kernel_calls) == 1
