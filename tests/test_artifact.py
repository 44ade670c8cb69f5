"""Quantisation, the container, the cap; and late QAT, which must round exactly as the artifact does."""
import hashlib
import struct

import numpy as np
import pytest
import torch
from conftest import tiny
from test_scoring import t_runtime

import train_gpt as t


def heavy_tailed(*shape):
    return torch.distributions.StudentT(4.0).sample(shape) * 0.05


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_codes_are_small_integers_and_clipping_never_loses(rng, bits):
    w, top = heavy_tailed(40, 300), 2 ** (bits - 1) - 1
    codes, step = t.quantize_rows(w, bits)
    assert torch.equal(codes, codes.round()) and codes.abs().max() <= top and step.dtype == torch.float16
    error = (codes * step.float() - w).square().sum(-1)
    plain_step = (w.abs().amax(-1, keepdim=True) / top).half().float()
    plain = ((w / plain_step).round().clamp(-top, top) * plain_step - w).square().sum(-1)
    assert (error <= plain * (1 + 1e-6)).all() and (bits > 5 or (error < plain).any())


def test_rows_of_zeros_and_of_one_value(rng):
    w = torch.zeros(3, 8)
    w[1], w[2, 3] = 0.25, -7.0
    codes, step = t.quantize_rows(w, 6)
    torch.testing.assert_close(codes * step.float(), w, rtol=1e-3, atol=1e-6)
    assert codes[0].abs().max() == 0


def test_round_trip_gives_exactly_codes_times_steps(rng):
    hp = tiny()
    model = t.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(heavy_tailed(*p.shape))
    state, back = model.state_dict(), t.unpack(t.pack(model.state_dict(), hp))
    assert list(back) == list(state)
    for name, tensor in state.items():
        scheme = t.scheme_of(name, tensor, hp)
        if scheme.startswith("int"):
            codes, step = t.quantize_rows(tensor, int(scheme[3:]))
            expected = codes * step.float()
        else:
            expected = tensor.half().float() if scheme == "float16" else tensor
        assert torch.equal(back[name], expected), name
    model.load_state_dict(back)


def test_schemes_follow_the_kind():
    hp = tiny(QUANT_BITS=5)
    schemes = {n: t.scheme_of(n, p, hp) for n, p in t.GPT(hp).state_dict().items()}
    assert schemes["embed.weight"] == schemes["bigram.table.weight"] == "int8"
    assert schemes["blocks.0.attn.q.weight"] == schemes["bigram.proj.weight"] == "int5"
    assert schemes["blocks.1.attn.vrl_gate"] == "float32" and schemes["skip_weights"] == "float16"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad):
    state = t.GPT(tiny()).state_dict()
    state["blocks.1.mlp.fc.weight"][3, 4] = bad
    with pytest.raises(t.UserError, match="blocks.1.mlp.fc.weight: holds NaN or infinity"):
        t.pack(state, tiny())


def test_damage_is_refused(rng):
    blob = t.pack(t.GPT(tiny()).state_dict(), tiny())
    for _ in range(100):
        position = int(rng.integers(0, len(blob)))
        damaged = bytearray(blob)
        damaged[position] ^= 1 << int(rng.integers(0, 8))
        with pytest.raises(ValueError, match="not an artifact|SHA-256"):
            t.unpack(bytes(damaged))
        with pytest.raises(ValueError, match="not an artifact|SHA-256"):
            t.unpack(blob[:position])
    with pytest.raises(ValueError, match="not an artifact"):
        t.unpack(b"\x80\x04\x95 a pickle")


def test_a_table_that_does_not_fit_its_data_is_refused():
    header = b'[["a",[2],"float32"]]'
    import lzma
    body = t.MAGIC + struct.pack("<I", len(header)) + header + lzma.compress(np.zeros(3, "<f4").tobytes())
    with pytest.raises(ValueError, match="holds 12 bytes of tensors, its table describes 8"):
        t.unpack(body + hashlib.sha256(body).digest())


def test_over_the_cap_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "SIZE_CAP", 70_000)
    path = tmp_path / "final_model.int6.ptz"
    with pytest.raises(t.UserError, match="over the cap of 70000: not written"):
        t.write_artifact(t.GPT(tiny()), path, tiny(), t_runtime())
    assert not list(tmp_path.iterdir())


def test_fake_quantised_weights_are_what_the_artifact_gives_back(rng):
    hp = tiny()
    model = t.GPT(hp)
    fake, back = t.fake_quantized(model, hp), t.unpack(t.pack(model.state_dict(), hp))
    assert set(fake) == {n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith(".weight")}
    for name, w in fake.items():
        torch.testing.assert_close(w.detach(), back[name], rtol=0, atol=1e-6)


def test_gradients_pass_straight_through_the_rounding(rng):
    model = t.GPT(tiny())
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    t.training_loss(model, ids[:, :-1], ids[:, 1:], quantize=True).backward()
    with_rounding = {n: p.grad.clone() for n, p in model.named_parameters()}
    rounded = t.GPT(model.hp)
    fake = {n: w.detach() for n, w in t.fake_quantized(model, model.hp).items()}
    rounded.load_state_dict({**model.state_dict(), **fake})
    rounded(ids[:, :-1], ids[:, 1:]).backward()
    for name, p in rounded.named_parameters():
        torch.testing.assert_close(with_rounding[name], p.grad, rtol=1e-4, atol=1e-7)


def test_late_qat_changes_the_forward_of_a_compiled_module_and_recompiles_nothing(rng):
    """The predecessors' flag was baked into the graph at the first compile and never took effect."""
    torch.compiler.reset()
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = t.GPT(tiny(NUM_LAYERS=2, VE_LAYERS="1"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    loss = torch.compile(t.training_loss, dynamic=False, backend=counting_backend)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    x, y = ids[:, :-1], ids[:, 1:]
    plain, quantised = (loss(model, x, y, q).item() for q in (False, True))      # warm-up: both graphs
    compiled = len(graphs)
    assert compiled >= 2 and abs(plain - quantised) > 1e-6
    for quantize, expected in ((False, plain), (True, quantised), (False, plain), (True, quantised)):
        assert loss(model, x, y, quantize).item() == pytest.approx(expected, abs=1e-6)
        assert t.training_loss(model, x, y, quantize).item() == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight.mul_(1.5)                                  # training moves weights, not graphs
    assert loss(model, x, y, True).item() != pytest.approx(quantised, abs=1e-7)
    assert len(graphs) == compiled
