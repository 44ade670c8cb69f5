"""Rounding by rows, entropy coding, the container, the cap; and late QAT, which must round exactly
as the artifact does. What every quantiser promises: test_quantizers.py."""

import errno
import hashlib
import lzma
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import ALONE, SILENT, KeptLog, final_passes, loss_of, shifted, tiny, values
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

EPS = torch.finfo(torch.float32).eps
MATRIX = "blocks.0.mlp.fc.weight"  # by its name it is coded


def heavy_tailed(*shape):
    return torch.distributions.StudentT(4.0).sample(shape) * 0.05


def pack(*args) -> bytes:
    return t.pack(*args).blob


def noisy_model(hp) -> t.GPT:
    model = t.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(heavy_tailed(*p.shape))
    return model


# ---- codes


@pytest.mark.parametrize("largest", [1, 7, 15, 31, 127])
def test_codes_are_small_integers_and_clipping_never_loses(rng, largest):
    w = heavy_tailed(40, 700)
    codes, delta = t.quantize_rows(w, largest)
    assert torch.equal(codes, codes.round()) and (codes.abs().amax(1) == largest).all()
    assert torch.equal(delta, delta.bfloat16().float())
    error = (codes * delta - w).square().sum(-1)
    plain_delta = (w.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
    plain = (w / plain_delta).round().clamp(-largest, largest) * plain_delta
    plain_error = (plain - w).square().sum(-1)
    # sums of 700 squares, made twice in float32
    assert (error <= plain_error * (1 + 16 * EPS)).all()
    assert largest > 31 or (error < plain_error).any()


def test_quantising_a_result_again_changes_nothing(rng):
    for largest in (1, 2, 5, 15, 31, 63, 100, 127):
        w = heavy_tailed(200, 64) * 10.0 ** torch.randint(-12, 12, (200, 1))
        codes, delta = t.quantize_rows(w, largest)
        again, delta_again = t.quantize_rows(codes * delta, largest)
        assert torch.equal(codes, again) and torch.equal(delta, delta_again), largest


def test_rows_of_zeros_and_of_one_value():
    w = torch.zeros(3, 8)
    w[1], w[2, 3] = 0.25, -7.0
    codes, delta = t.quantize_rows(w, 31)
    torch.testing.assert_close(codes * delta, w, rtol=2**-8, atol=0)  # deltas are bfloat16
    assert codes[0].abs().max() == 0


@pytest.fixture
def largest_codes(monkeypatch) -> list[np.ndarray]:
    """The largest code of each row of each matrix that is packed from here on."""
    seen, quantize_rows = [], t.quantize_rows

    def seeing(w, largest):
        codes, delta = quantize_rows(w, largest)
        seen.append(codes.abs().amax(1).numpy())
        return codes, delta

    monkeypatch.setattr(t, "quantize_rows", seeing)
    return seen


def test_the_largest_codes_of_a_matrix_change_row_by_row(rng, largest_codes):
    """Their mean follows the factor closely, though each is an integer."""
    for coarsen in (0.3, 0.9, 1.0, 1.01, 1.7, 30.0):
        t.pack({MATRIX: heavy_tailed(1000, 30)}, tiny(), coarsen)
        found = largest_codes[-1]
        assert found.min() >= 1 and found.max() - found.min() <= 1
        assert found.mean() == pytest.approx(max(31 / coarsen, 1), abs=0.02)
    t.pack({"bigram.table.weight": heavy_tailed(9, 30)}, tiny(), 0.2)
    assert (largest_codes[-1] == 127).all()


def test_the_largest_code_depends_on_the_kind():
    model = t.GPT(tiny(QUANT_BITS=5, TIE_EMBEDDINGS=0))
    expected = dict(matrix=15, table=127, head=127, vector=0)
    for name, p in model.state_dict().items():
        assert t.largest_code(name, p, model.hp) == expected[t.parameter_row(name).kind], name


def signs(name, w_RC, coarsen):
    """Codes of +-1 times the mean magnitude of the row, however coarse."""
    delta = w_RC.abs().mean(1, keepdim=True).clamp_min(1e-30).bfloat16().float()
    return torch.where(w_RC < 0, -1.0, 1.0), delta


def test_another_quantiser_makes_the_codes(rng):
    state = {MATRIX: heavy_tailed(40, 30), "smear_gate": torch.ones(3)}
    packed = t.pack(state, tiny(), 1.0, signs)
    codes, delta = signs(MATRIX, state[MATRIX], None)
    _, back = t.decompress(packed.blob, state)
    assert torch.equal(back[MATRIX], codes * delta)
    assert torch.equal(back["smear_gate"], state["smear_gate"])
    error = (codes * delta - state[MATRIX]).norm() / state[MATRIX].norm()
    assert packed.error == pytest.approx(error.item(), rel=1e-5)


def test_the_quantiser_is_told_each_matrix_by_its_name(rng):
    model, told = noisy_model(tiny()), []
    rows = t.RowQuantizer(model.state_dict(), model.hp, {})

    def telling(name, w_RC, coarsen):
        told.append(name)
        return rows.quantize(name, w_RC, coarsen)

    packed = t.pack(model.state_dict(), model.hp, 1.0, telling)
    assert told == [n for n, p in model.named_parameters() if p.ndim == 2 and "weight" in n[-6:]]
    assert packed.blob == pack(model.state_dict(), model.hp)


# ---- rANS


@settings(max_examples=60)
@given(
    st.integers(1, 3000),
    st.integers(1, 64),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.2, 3.0, 40.0]),
)
def test_rans_restores_any_symbols_with_any_tables(count, tables, seed, spread):
    rng = np.random.default_rng(seed)
    symbols = np.clip(np.rint(rng.normal(128, spread, count)), 0, 255).astype(np.uint8)
    table = rng.integers(0, tables, count).astype(np.uint8)
    freq, coded = t.rans_encode(table.astype(np.int16) * 256 + symbols)
    assert np.array_equal(t.rans_decode(coded, table, freq), symbols)
    sums, used = freq.reshape(t.TABLES, 256).sum(1), np.unique(table)
    assert (sums[used] == 1 << t.SCALE).all()
    assert (freq[table.astype(int) * 256 + symbols] > 0).all()


def test_rans_restores_a_symbol_that_is_one_in_forty_thousand():
    """Its share of 2^14 rounds to 0."""
    symbols = np.zeros(40_000, np.uint8)
    symbols[12_345] = 7
    freq, coded = t.rans_encode(symbols.astype(np.int16))
    assert np.array_equal(t.rans_decode(coded, np.zeros_like(symbols), freq), symbols)


def test_rans_is_close_to_the_entropy(rng):
    symbols = np.clip(np.rint(rng.normal(128, 9, 1_000_000)), 0, 255).astype(np.uint8)
    p = np.bincount(symbols) / len(symbols)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * len(symbols) / 8
    assert entropy < len(t.rans_encode(symbols.astype(np.int16))[1]) < entropy * 1.003


def test_tables_by_row_and_column_pay(rng):
    """Rows and columns of different spread: below the zeroth-order entropy of the tensor."""
    codes = np.rint(
        rng.normal(size=(400, 500))
        * 2.0 ** rng.normal(2, 0.7, (400, 1))
        * 2.0 ** rng.normal(0, 0.7, 500)
    )
    codes = np.clip(codes, -127, 127).astype(np.int8)
    table = t.tables_of(*t.spread_classes(codes))
    symbols = codes.astype(np.int16) + 128
    assert len(t.rans_encode((256 * table + symbols).ravel())[1]) < 0.95 * len(
        t.rans_encode(symbols.ravel())[1]
    )


# ---- container


def test_round_trip_gives_exactly_codes_times_deltas(rng):
    model = noisy_model(tiny())
    state = model.state_dict()
    _, back = t.decompress(pack(state, model.hp))
    assert list(back) == list(state)
    for name, tensor in state.items():
        if largest := t.largest_code(name, tensor, model.hp):
            codes, delta = t.quantize_rows(tensor, largest)
            expected = codes * delta
        else:
            expected = tensor.half().float()
        assert torch.equal(back[name], expected), name
    model.load_state_dict(back)


@pytest.mark.parametrize("coarsen", [0.3, 1.0, 1.37, 9.0])
def test_packing_again_gives_the_same_bytes(rng, coarsen):
    model = noisy_model(tiny())
    blob = pack(model.state_dict(), model.hp, coarsen)
    _, back = t.decompress(blob)
    assert pack(back, model.hp, coarsen) == blob


SHAPES = st.lists(
    st.one_of(
        st.tuples(),
        st.tuples(st.integers(0, 70)),
        st.tuples(st.integers(0, 9), st.integers(0, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    max_size=6,
)


@settings(max_examples=120)
@given(
    SHAPES,
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "constant", "zero", "huge", "tiny"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_any_state_survives(shapes, seed, kind, dtype):
    generator, hp = torch.Generator().manual_seed(seed), tiny()
    scale = dict(normal=1.0, constant=0.0, zero=0.0, huge=5e3, tiny=1e-7)[kind]
    state = {
        f"blocks.{i}.mlp.fc.weight" if i % 2 else f"blocks.{i}.mix_x": (
            torch.randn(s, generator=generator) * scale + (kind == "constant")
        ).to(dtype)
        for i, s in enumerate(shapes)
    }
    blob = pack(state, hp)
    _, back = t.decompress(blob, state)
    assert list(back) == list(state) and pack(back, hp) == blob
    for name, w in state.items():
        w = w.float()
        assert back[name].shape == w.shape and back[name].dtype == torch.float32
        if w.numel():
            exact = not t.largest_code(name, w, hp)
            bound = (
                w.abs() * 2.0**-11 + 1e-7
                if exact
                else w.abs().max(1, keepdim=True).values / 31 + 1e-30
            )
            assert ((back[name] - w).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
def test_nan_and_infinity_are_refused_by_name(bad):
    state = t.GPT(tiny()).state_dict()
    state["blocks.1.mlp.fc.weight"][3, 4] = bad
    with pytest.raises(t.UserError, match="blocks.1.mlp.fc.weight: holds NaN, infinity"):
        pack(state, tiny())


def repaired(body: bytes) -> bytes:
    """A container of this body, with the right checksum."""
    return t.MAGIC + hashlib.sha256(body).digest() + body


def parts_of(blob: bytes) -> tuple[bytes, bytes, bytes]:
    """(text, numbers, codes) of a container, the first two decompressed."""
    body, parts = blob[t.CHECKSUM_PLACE.stop :], []
    for _ in range(2):
        end = 4 + int.from_bytes(body[:4], "little")
        parts.append(lzma.decompress(body[4:end], lzma.FORMAT_RAW, filters=t.LZMA["filters"]))
        body = body[end:]
    return *parts, body


def quickly_compressed(plain: bytes) -> bytes:
    """As readable as what the script writes."""
    return lzma.compress(plain, lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=0)])


def container(text: bytes, numbers: bytes = b"", codes: bytes = b"") -> bytes:
    """A container of these parts."""
    packed = [quickly_compressed(part) for part in (text, numbers)]
    return repaired(b"".join(len(p).to_bytes(4, "little") + p for p in packed) + codes)


def settings_text(**changes) -> bytes:
    """The settings of `tiny` as a container holds them, with `changes` as they are."""
    settings = tiny().of_model() | {name: str(value) for name, value in changes.items()}
    return "".join(f"{name}={value}\n" for name, value in settings.items()).encode()


def test_a_container_holds_the_settings_of_its_model():
    hp = tiny(XSA_LAST_N=3, LEAKY_SLOPE=0.3, RECUR_LAYERS="1,2", QUANT_BITS=5, ROPE_BASE=1e6)
    blob = pack(t.GPT(hp).state_dict(), hp)
    settings, state = t.decompress(blob)
    assert settings == t.settings_of(blob) == hp.of_model()
    assert list(state) == list(t.GPT(hp).state_dict())


def test_a_container_without_the_tensors_that_its_settings_make_is_refused_by_name():
    hp = tiny()
    state = t.GPT(hp).state_dict()
    fc = "blocks.3.mlp.fc.weight"
    for other, said in (
        (state | {fc: state[fc].T}, f"found '{fc} 1 64 128', expected '{fc} 1 128 64'"),
        (state | {"extra": torch.ones(2)}, "found 'extra 0 2', expected 'no extra'"),
        ({n: w for n, w in state.items() if n != fc}, f"found 'no {fc}', expected '{fc} 1 128 64'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            t.decompress(pack(other, hp))
        assert str(error.value).startswith("artifact: tensors of another model than its settings")


def test_another_model_is_refused_before_its_codes_are_decoded(monkeypatch):
    state = t.GPT(tiny()).state_dict()
    blob = pack(state, tiny(NUM_LAYERS=5))
    monkeypatch.setattr(t, "read_tensors", None)
    for read in (
        t.decompress,
        t.settings_of,
        lambda blob: t.decompress(blob, t.GPT(tiny(NUM_LAYERS=5)).state_dict()),
    ):
        with pytest.raises(ValueError, match="tensors of another model"):
            read(blob)


def test_an_artifact_of_an_older_format_is_refused_with_what_to_do():
    blob = pack(t.GPT(tiny()).state_dict(), tiny())
    said = (
        "version of the format; score it with the train_gpt.py that wrote it, which its run's log"
    )
    for version in (1, 3):
        with pytest.raises(ValueError, match=said):
            t.decompress(b"PGOLF" + bytes([version]) + blob[6:])


@pytest.mark.parametrize("coder", t.CODERS)
def test_hundreds_of_corruptions_are_all_refused(rng, coder):
    hp = tiny(CODER=coder)
    blob = pack(noisy_model(hp).state_dict(), hp)
    for i in range(500):
        damaged, at = bytearray(blob), int(rng.integers(0, len(blob)))
        if i % 4 == 0:
            damaged[at] ^= 1 << int(rng.integers(0, 8))
        elif i % 4 == 1:
            del damaged[at:]
        elif i % 4 == 2:
            damaged[at : at + 40] = rng.bytes(40)
        else:
            damaged[at:at] = rng.bytes(int(rng.integers(1, 9)))
        with pytest.raises(ValueError, match="^artifact: ") as error:
            t.decompress(bytes(damaged))
        assert "\n" not in str(error.value)


def test_a_whole_file_under_the_checksum_of_another_is_refused():
    """Nothing else is wrong with it."""
    one, other = (pack(noisy_model(tiny()).state_dict(), tiny()) for _ in range(2))
    body = t.CHECKSUM_PLACE.stop
    with pytest.raises(ValueError, match="SHA-256 differs"):
        t.decompress(other[:body] + one[body:])


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    """For each coder, the bytes of an artifact so small that reading it takes a millisecond."""
    torch.manual_seed(1)
    sizes = dict(NUM_LAYERS=1, VE_LAYERS="0", MODEL_DIM=16, VOCAB_SIZE=32, BIGRAM_VOCAB_SIZE=8)
    hps = [tiny(CODER=coder, NUM_HEADS=2, NUM_KV_HEADS=1, **sizes) for coder in t.CODERS]
    return {hp.coder: pack(noisy_model(hp).state_dict(), hp) for hp in hps}


def damaged_in(part: int, blob: bytes, rng) -> bytes:
    """The container with one byte changed, cut out or put in, in the text (0), the numbers (1) or
    the codes (2); all around it is right, so that a reader gets this far."""
    parts = [bytearray(part) for part in parts_of(blob)]
    at = int(rng.integers(0, len(parts[part])))
    kind = rng.integers(0, 4)
    if kind == 0:
        parts[part][at] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1:
        parts[part][at] = int(rng.integers(0, 256))
    elif kind == 2:
        del parts[part][at : at + int(rng.integers(1, 9))]
    else:
        parts[part][at:at] = rng.bytes(int(rng.integers(1, 9)))
    return container(*map(bytes, parts))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["text", "numbers", "codes"])
@pytest.mark.parametrize("coder", t.CODERS)
def test_with_a_repaired_checksum_damage_is_refused_or_harmless(rng, small, coder, part):
    """An attacker can repair the checksum: then the result is a clear error, or finite weights of
    the shapes that the settings make."""
    refused = 0
    for _ in range(30):
        blob = damaged_in(part, small[coder], rng)
        try:
            settings, state = t.decompress(blob)
            like = t.GPT(t.settings_to_score("a", settings, {})).state_dict()
            assert {n: w.shape for n, w in state.items()} == {n: w.shape for n, w in like.items()}
            assert all(torch.isfinite(w).all() for w in state.values())
        except ValueError as error:
            assert str(error).startswith("artifact: ") and "\n" not in str(error)
            assert len(str(error)) < 500
            refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    "foreign", [b"", b"PGOLF", b"\x80\x04\x95 a pickle", b"PK\x03\x04 a zip", bytes(1000)]
)
def test_foreign_files_are_refused(foreign):
    with pytest.raises(ValueError, match="^artifact: "):
        t.decompress(foreign)


@pytest.fixture
def frugal():
    """What the test does takes less than 20 MB at any time (of Python's and NumPy's memory)."""
    tracemalloc.start()
    yield
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000_000


@pytest.mark.parametrize(
    "table",
    [
        "a 0 99999999999\n",
        "a 0 999999999\n",
        "a 1 268435456 2\n",
        "embed.weight 1 268435456 2\n",
        "a 0 -1\n",
        "a exec 2\n",
        "a 0 1.5\n",
        "a 2 2\n",
        '[["a",[2],0]]\n',
        '{"a":' * 50_000 + "\n",
        "a 0 2\na 0 2\n",
        "a\n",
        "a 1 0 4\n",
        "a 1 2\n",
        "a 0 1 1 1 1 1\n",
        "nonsense",
        "\n",
        "\xff 0 2\n",
        "a 0 2",
        "a 0 0\n" * 200_000,
        "x" * 2_000_000 + " 0 2\n",
    ],
    ids=lambda table: table[:20],
)
def test_absurd_tables_are_refused_before_anything_is_allocated(frugal, table):
    for numbers in (b"", bytes(1 << 22)):
        with pytest.raises(ValueError, match="^artifact: "):
            t.decompress(container(settings_text() + table.encode(), numbers, bytes(4096)))


@pytest.mark.parametrize(
    "settings",
    [
        dict(NUM_LAYERS=1_000_000_000),
        dict(NUM_LAYERS="1e9"),
        dict(NUM_LAYERS="None"),
        dict(NUM_LAYERS=""),
        dict(NUM_LAYERS="9" * 3000),
        dict(MODEL_DIM="9" * 400),
        dict(MODEL_DIM=1 << 20),
        dict(VOCAB_SIZE=65_536, MODEL_DIM=4096),
        dict(BIGRAM_VOCAB_SIZE=4_200_000, BIGRAM_DIM=128),
        dict(BIGRAM_DIM="9" * 30),
        dict(VE_DIM=1 << 40),
        dict(TRAIN_SEQ_LEN=1 << 60),
        dict(TRAIN_SEQ_LEN=1 << 60, ROPE_DIMS=0),
        dict(MLP_MULT=1e300),
        dict(MLP_MULT="inf"),
        dict(MLP_MULT="nan"),
        dict(LEAKY_SLOPE="nan"),
        dict(ROPE_BASE="NaN"),
        dict(LOGIT_SOFTCAP="-1"),
        dict(LN_SCALE="yes"),
        dict(RECUR_LAYERS="2,1"),
        dict(VE_LAYERS="0,x"),
        dict(CODER="pickle"),
        dict(CODER="__class__"),
        dict(EVAL_ONLY="/etc/passwd"),
        dict(NEW_SETTING=1),
    ],
    ids=str,
)
def test_absurd_settings_are_refused_before_anything_is_allocated(frugal, settings):
    text = settings_text(**settings) + b"embed.weight 1 512 64\n"
    with pytest.raises(ValueError, match="^artifact: ") as error:
        t.decompress(container(text, bytes(1 << 22), bytes(4096)))
    assert len(str(error.value)) < 500


def test_a_model_of_many_layers_is_refused_though_its_table_has_one():
    sizes = dict(NUM_LAYERS=256, MODEL_DIM=8, ROPE_DIMS=2, VE_LAYERS="0")
    with pytest.raises(ValueError, match="tensors of another model"):
        t.decompress(container(settings_text(**sizes) + b"embed.weight 1 512 8\n"))


def test_a_container_that_lacks_a_setting_is_refused_by_its_name():
    text = settings_text().replace(b"XSA_LAST_N=2\n", b"")
    with pytest.raises(ValueError, match="XSA_LAST_N"):
        t.decompress(container(text))


@pytest.mark.parametrize("part, coder", [(0, "rans"), (1, "rans"), (2, "rans"), (2, "lzma")])
def test_a_decompression_bomb_is_refused_without_being_inflated(frugal, small, coder, part):
    parts = list(parts_of(small[coder]))
    parts[part] = bytes(1 << 25)
    if part == 2:
        parts[part] = quickly_compressed(parts[part])
    bomb = container(*parts)
    del parts
    tracemalloc.reset_peak()
    with pytest.raises(ValueError, match="cut or too long|left over|bad line|too early"):
        t.decompress(bomb)


def test_what_the_settings_count_are_the_matrices_of_the_model():
    """MOST_WEIGHTS is compared with this."""
    for changes in (
        {},
        dict(TIE_EMBEDDINGS=0),
        dict(BIGRAM_VOCAB_SIZE=0),
        dict(VE_ENABLED=0),
        dict(NUM_KV_HEADS=4, MLP_MULT=2.3, NUM_LAYERS=7),
        dict(VE_LAYERS="", ATTN_GATE_DIMS=12, NUM_LAYERS=1),
    ):
        hp = tiny(**changes)
        sizes = [w.numel() for n, w in t.GPT(hp).state_dict().items() if t.largest_code(n, w, hp)]
        assert hp.model_numbers == sum(sizes) + hp.train_seq_len * hp.rope_dims


def test_a_model_too_large_to_be_read_back_is_refused_before_it_is_trained():
    with pytest.raises(t.UserError, match="BIGRAM_VOCAB_SIZE=4200000.* at most 67,108,864"):
        t.Hyperparameters.from_env({"BIGRAM_VOCAB_SIZE": "4200000"})
    t.Hyperparameters.from_env({"BIGRAM_VOCAB_SIZE": "300000"})


def test_the_largest_model_that_settings_allow_can_be_read_back(frugal):
    """As for the table of tensors; that of weights: test_what_the_settings_count_..."""
    layers = range(256)
    hp = tiny(NUM_LAYERS=256, MODEL_DIM=4, ROPE_DIMS=0, VE_LAYERS=",".join(map(str, layers)))
    state = {name: torch.zeros(()) for name in t.GPT(tiny()).state_dict()}
    one_layer = [name for name in state if name.startswith("blocks.3.")]
    state |= {n.replace(".3.", f".{i}."): torch.zeros(()) for i in layers for n in one_layer}
    assert t.open_container(pack(state, hp)).hp.of_model() == hp.of_model()


# ---- the budget


@pytest.mark.parametrize("bits, share", [(5, 0.97), (6, 0.7), (5, 0.4)])
def test_forced_over_lands_within_4_kb_below_the_budget(rng, bits, share):
    model = noisy_model(tiny(MODEL_DIM=128, QUANT_BITS=bits))
    budget = int(len(pack(model.state_dict(), model.hp)) * share)
    packed = t.compress(model.state_dict(), model.hp, {}, budget)
    blob = packed.container.blob
    assert budget - 4096 < len(blob) <= budget
    assert packed.coarsen > 1
    assert packed.container.error > packed.error_before > 0
    assert pack(model.state_dict(), model.hp, packed.coarsen) == blob
    _, back = t.decompress(blob)
    assert pack(back, model.hp, packed.coarsen) == blob


def test_what_is_left_is_spent(rng, largest_codes):
    model = noisy_model(tiny(MODEL_DIM=128))
    state = model.state_dict()
    natural = pack(state, model.hp)
    packed = t.compress(state, model.hp, {}, len(natural) + 20_000)
    assert len(natural) + 20_000 - 4096 < len(packed.container.blob) <= len(natural) + 20_000
    assert packed.coarsen < 1 and packed.container.error < packed.error_before
    finest = t.compress(state, model.hp, {}, 16_000_000).container.blob
    _, back = t.decompress(finest)
    largest_codes.clear()
    assert pack(back, model.hp, 0.125) == finest
    assert min(map(np.min, largest_codes)) == 127
    kept = t.compress(state, tiny(MODEL_DIM=128, FILL_BUDGET=0), {}, 16_000_000)
    assert kept.container.blob == natural


def test_progress_is_called_after_each_packing_with_its_size(rng, monkeypatch):
    state, hp = {MATRIX: heavy_tailed(200, 150)}, tiny()
    sizes, told, plain = [], [], t.pack

    def seeing(*args):
        container = plain(*args)
        sizes.append(len(container.blob))
        return container

    monkeypatch.setattr(t, "pack", seeing)
    t.compress(state, hp, {}, 20_000, progress=lambda *args: told.append(args))
    assert told == list(enumerate(sizes, start=1))
    assert len(told) > 1


def test_bits_per_parameter_are_those_of_the_file(rng):
    state = {MATRIX: heavy_tailed(200, 150), "smear_gate": torch.ones(50)}
    packed = t.compress(state, tiny(), {}, 16_000_000)
    assert packed.bits_per_parameter == 8 * len(packed.container.blob) / 30_050


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.02, 1.3),
    st.sampled_from(["signs", "spikes", "uniform", "ladder"]),
)
def test_adversarial_weights_never_go_over(seed, share, kind):
    rng = np.random.default_rng(seed)
    shape = (30, 150)
    w = dict(
        signs=rng.choice([-1.0, 1.0], shape),
        uniform=rng.uniform(-1, 1, shape),
        spikes=rng.normal(size=shape) * (rng.random(shape) < 0.01) + 1e-6,
        ladder=2.0 ** rng.integers(-30, 30, shape),
    )
    state = {
        MATRIX: torch.from_numpy(w[kind]).float(),
        "smear_gate": torch.from_numpy(rng.normal(size=50)).float(),
    }
    budget = max(600, int(len(pack(state, tiny())) * share))
    try:
        blob = t.compress(state, tiny(), {}, budget).container.blob
        assert len(blob) <= budget and t.decompress(blob, state)
    except t.UserError as error:
        assert len(pack(state, tiny(), t.COARSEST)) > budget
        assert "even with codes of -1, 0 and 1" in str(error)


def trained(model) -> t.Trained:
    """As training returns it, without a curvature."""
    return t.Trained(model.state_dict(), {}, 0, 0.0)


def test_over_the_cap_nothing_is_written(tmp_path, monkeypatch):
    path, state = tmp_path / "final_model.int6.ptz", {MATRIX: heavy_tailed(60, 100)}
    monkeypatch.setattr(t, "SIZE_CAP", len(t.SOURCE) + 500)
    with pytest.raises(t.UserError, match="takes over 500 bytes even with codes of"):
        t.write_artifact(path, t.Trained(state, {}, 0, 0.0), tiny(), SILENT)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """What was written when the disk filled up goes away again, and an older artifact stays."""
    path, model = tmp_path / "final_model.int6.ptz", t.GPT(tiny())
    path.write_bytes(b"older")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(t.os, "fsync", full)
    said = "final_model.int6.ptz: No space left on device; free space"
    with pytest.raises(t.UserError, match=said):
        t.write_artifact(path, trained(model), model.hp, SILENT)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(path.name, b"older")]


def test_bytes_by_kind_add_up_to_the_submission(tmp_path, rng):
    model, log = noisy_model(tiny()), KeptLog()
    t.write_artifact(tmp_path / "m.ptz", trained(model), model.hp, log)
    size = t.read_artifact(tmp_path / "m.ptz", "", model, ALONE, log).size
    assert size == (tmp_path / "m.ptz").stat().st_size + len(t.SOURCE)
    assert log.lines[-1] == f"Total submission size int6+rans: {size} bytes"
    (told,) = log.starting("artifact_bytes ")
    told = {part: int(n) for part, n in (pair.split(":") for pair in told.split()[1:])}
    assert set(told) == {"code", "side", "embeddings", "attention", "mlp"}
    assert sum(told.values()) == size
    counts = dict(embeddings=0, attention=0, mlp=0)
    for name, p in model.named_parameters():
        if t.largest_code(name, p, model.hp):
            part = "attention" if ".attn." in name else "mlp" if ".mlp." in name else "embeddings"
            counts[part] += p.numel()
    # 3 to 8 bits each
    assert all(0.4 * counts[part] < told[part] < 1.02 * counts[part] for part in counts)


def test_a_matrix_that_is_rounded_by_rows_for_want_of_a_curvature_is_named(tmp_path, rng):
    state, log = {MATRIX: heavy_tailed(8, 30)}, KeptLog()
    useless = t.Curvature(torch.full((30, 30), torch.nan), torch.ones(8))
    t.write_artifact(tmp_path / "m.ptz", t.Trained(state, {MATRIX: useless}, 0, 0.0), tiny(), log)
    assert log.starting("warning:") == [
        f"warning: {MATRIX}: its curvature is unusable; rounded row by row, without GPTQ"
    ]


# ---- late QAT

HARDNESS = torch.tensor(1.0)  # plays no part in straight-through rounding


def test_fake_quantised_weights_are_what_the_artifact_gives_back(rng):
    model = noisy_model(tiny())
    fake = t.fake_quantized(model, HARDNESS)
    _, back = t.decompress(pack(model.state_dict(), model.hp))
    assert set(fake) == {
        n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith(".weight")
    }
    for name, w in fake.items():
        assert torch.equal(w.detach(), back[name]), name


def test_gradients_pass_straight_through_the_rounding(rng):
    model = t.GPT(tiny())
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    once = final_passes(model)
    t.training_loss(model, ids[:, :-1], ids[:, 1:], once, HARDNESS).backward()
    with_rounding = {n: p.grad.clone() for n, p in model.named_parameters()}
    rounded = t.GPT(model.hp)
    fake = {n: w.detach() for n, w in t.fake_quantized(model, HARDNESS).items()}
    rounded.load_state_dict({**model.state_dict(), **fake})
    loss_of(rounded, ids[:, :-1], ids[:, 1:]).backward()
    for name, p in rounded.named_parameters():
        assert torch.equal(with_rounding[name], p.grad), name


def test_late_qat_changes_the_forward_of_a_compiled_module_and_recompiles_nothing(rng):
    """The predecessors' flag was baked into the graph at the first compile
    and never took effect."""
    torch.compiler.reset()
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # of 3 bits, so that rounding changes the loss by far more than float32 does
    model = shifted(t.GPT(tiny(NUM_LAYERS=1, VE_LAYERS="0", QUANT_BITS=3)))
    loss = torch.compile(t.training_loss, dynamic=False, backend=counting_backend)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    batch = ids[:, :-1], ids[:, 1:], final_passes(model)
    # warm-up: both graphs
    plain, quantised = (loss(model, *batch, q).item() for q in (None, HARDNESS))
    compiled = len(graphs)
    assert compiled >= 2 and abs(plain - quantised) > 1e-6
    for hardness, expected in (
        (None, plain),
        (HARDNESS * 2, quantised),
        (None, plain),
        (HARDNESS * 9, quantised),
    ):
        assert loss(model, *batch, hardness).item() == pytest.approx(expected, abs=1e-6)
        assert t.training_loss(model, *batch, hardness).item() == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight.mul_(1.5)  # training moves weights, not graphs
    assert loss(model, *batch, HARDNESS).item() != pytest.approx(quantised, abs=1e-7)
    assert len(graphs) == compiled and math.isfinite(plain)


@pytest.mark.parametrize("rounding", ["straight", "soft"])
def test_late_qat_is_one_graph(rng, rounding):
    """No break, in particular not at the table of kinds; and the hardness is no constant of it."""
    torch.compiler.reset()
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = noisy_model(tiny(NUM_LAYERS=1, VE_LAYERS="0", QAT_ROUNDING=rounding))
    loss = torch.compile(t.training_loss, dynamic=False, fullgraph=True, backend=counting_backend)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 9)))
    batch = ids[:, :-1], ids[:, 1:], final_passes(model)
    for hardness in (1.0, 2.5, 16.0):
        expected = t.training_loss(model, *batch, torch.tensor(hardness)).item()
        found = loss(model, *batch, torch.tensor(hardness)).item()
        assert found == pytest.approx(expected, abs=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow  # 27 million weights
def test_a_model_of_the_default_size_lands_at_the_cap(tmp_path, rng):
    """27 million heavy-tailed weights, over the cap at 6 bits: the file ends within 10 KB below it,
    never above."""
    model, log = t.GPT(t.Hyperparameters()), KeptLog()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_().mul_(1 + 0.3 * torch.randn_like(p[:, :1]).abs())
    t.write_artifact(tmp_path / "m.ptz", trained(model), model.hp, log)
    size = (tmp_path / "m.ptz").stat().st_size + len(t.SOURCE)
    assert 15_990_000 <= size <= 16_000_000
    told = values("\n".join(log.lines), "fit_artifact ")
    assert float(told["coarsen"]) > 1
    assert float(told["error_after"]) > float(told["error_before"])
    assert 4.5 < float(told["bits_per_parameter"]) < 4.8
    blob = (tmp_path / "m.ptz").read_bytes()
    assert set(t.decompress(blob)[1]) == set(model.state_dict())
