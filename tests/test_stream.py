"""What the score is a score of: the files of the validation stream, its tokenizer, its bytes, and
how the log and the checkpoint know them again."""

import hashlib
import io
import re
import resource
import shutil
from functools import cache
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece as spm
from helpers import new_state, new_training, tiny, write_shard

import train_gpt as t
from record import view

TEXTS = [topics[name] for name in sorted(topics)]
# what tokenizers treat differently: spaces, marks, other scripts, line ends, capitals
ODD = [
    "plain words",
    "  two  spaces   here ",
    "caf\u00e9 \u2603 and \U0001f600 bytes",
    "x",
    " x",
    "a\n\n    b\tc\r\n",
    "\u2581 literal \u2581\u2581mark",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c \uff21\uff22 \u00bd",
    "==== ---- ====\n" * 3,
]

# --- tokenizers and streams -----------------------------------------------------------------------


@cache
def tokenizer(**options) -> bytes:
    """A SentencePiece model of 512 pieces, trained on this Python's language reference."""
    model = io.BytesIO()
    plain = dict(model_type="bpe", vocab_size=512, byte_fallback=True, num_threads=1)
    ids = dict(pad_id=0, bos_id=t.BOS, eos_id=2, unk_id=3)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    lines = (line for text in TEXTS for line in text.splitlines() if line.strip())
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, minloglevel=2, **{**plain, **ids, **options}
    )
    return model.getvalue()


def pieces(model: bytes) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=model)


def write_data(folder, model: bytes, tokens, **changes) -> t.Hyperparameters:
    """One validation shard and its tokenizer; returns settings that name them."""
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    (folder / "tokenizer.model").write_bytes(model)
    size = pieces(model).vocab_size()
    paths = dict(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", VOCAB_SIZE=size)
    return tiny(**{**paths, "EVAL_SEQ_LEN": 1, "EVAL_STRIDE": 1, **changes})


def stream_of(model: bytes, texts) -> list[int]:
    """Each text after a BOS."""
    sp = pieces(model)
    return [token for text in texts for token in (t.BOS, *sp.encode(text))]


KINDS = dict(
    plain={},
    unigram=dict(model_type="unigram"),
    characters=dict(model_type="char", vocab_size=80, byte_fallback=False),
    no_fallback=dict(byte_fallback=False),
    no_dummy_prefix=dict(add_dummy_prefix=False),
    all_spaces=dict(remove_extra_whitespaces=False),
    all_spaces_no_dummy_prefix=dict(remove_extra_whitespaces=False, add_dummy_prefix=False),
    identity=dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    pieces_of_spaces=dict(
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=False,
    ),
    own_symbols=dict(user_defined_symbols=("<mask>", " x", "  ")),
)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_counts_the_bytes_of_its_decoded_text(tmp_path, kind):
    model = tokenizer(**KINDS[kind])
    sp = pieces(model)
    texts = [text for text in [*ODD, *TEXTS[:3]] if sp.unk_id() not in sp.encode(text)]
    assert len(texts) > 2
    validation = t.load_validation(write_data(tmp_path, model, stream_of(model, texts)))
    assert validation.target_bytes.sum() == sum(
        len(sp.decode(sp.encode(x)).encode()) for x in texts
    )


def slow_bytes(sp, tokens) -> list[int]:
    """The definition, one token at a time."""
    sizes = []
    for previous, token in zip(tokens[:-1], tokens[1:]):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            text = ""
        elif sp.is_byte(token):
            text = "1"
        else:
            text = sp.id_to_piece(token).replace("\u2581", " ")
            if sp.is_control(previous):
                text = text.removeprefix(" ")
        sizes.append(len(text.encode()))
    return sizes


@pytest.mark.parametrize("kind", ["plain", "unigram", "pieces_of_spaces", "own_symbols"])
def test_bytes_follow_the_definition_token_by_token(tmp_path, rng, kind):
    """In any order of pieces: marks inside and after a piece are spaces too."""
    hp = write_data(tmp_path, tokenizer(**KINDS[kind]), [1, 2])
    tokens = rng.integers(0, 512, 5000)
    expected = slow_bytes(pieces(tokenizer(**KINDS[kind])), tokens.tolist())
    assert t.ByteCounter(hp)(tokens).tolist() == expected


def test_a_space_after_an_unknown_piece_is_text(tmp_path):
    model = tokenizer(byte_fallback=False)
    tokens = [t.BOS, *pieces(model).encode("a \u2603 b")]
    assert t.ByteCounter(write_data(tmp_path, model, tokens))(np.array(tokens)).sum() == 4


def without_lone_mark(model: bytes) -> bytes:
    """The piece U+2581 becomes U+2582: spaces before rare characters are spelled in bytes."""
    changed = model.replace(b"\x0a\x03\xe2\x96\x81\x15", b"\x0a\x03\xe2\x96\x82\x15")
    assert changed != model
    return changed


@pytest.mark.parametrize(
    "make",
    [
        lambda: without_lone_mark(tokenizer()),
        lambda: tokenizer(treat_whitespace_as_suffix=True),
    ],
    ids=["no lone mark", "marks as suffixes"],
)
def test_a_tokenizer_whose_spaces_cannot_be_counted_is_refused(tmp_path, make):
    model = make()
    hp = write_data(tmp_path, model, stream_of(model, TEXTS[:3]))
    with pytest.raises(t.UserError, match="tokenizer.model: has no piece that is a space alone"):
        t.load_validation(hp)


@pytest.mark.slow
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("vocab_size", [512, 4096, 8192])
def test_tokenizers_of_the_fields_sizes(tmp_path, vocab_size, model_type, byte_fallback):
    options = dict(vocab_size=vocab_size, model_type=model_type, byte_fallback=byte_fallback)
    if vocab_size == 8192:  # more than the text has words for
        options |= dict(split_by_whitespace=False, max_sentencepiece_length=32)
    model = tokenizer(**options)
    sp = pieces(model)
    texts = [text for text in TEXTS if sp.unk_id() not in sp.encode(text)]
    validation = t.load_validation(write_data(tmp_path, model, stream_of(model, texts)))
    assert validation.target_bytes.sum() == sum(
        len(sp.decode(sp.encode(x)).encode()) for x in texts
    )


# --- the tokenizer is the data's ------------------------------------------------------------------


def with_two_pieces_exchanged(model: bytes) -> bytes:
    """The same pieces and scores, but "in" and "er" are each other's token."""
    one, other = (b"\x0a\x02" + text + b"\x15" for text in (b"in", b"er"))
    changed = model.replace(one, b"@@").replace(other, one).replace(b"@@", other)
    assert changed != model
    return changed


OTHERS = dict(  # made when they are needed
    another_text=lambda: tokenizer(input_sentence_size=300, shuffle_input_sentence=False),
    unigram=lambda: tokenizer(model_type="unigram"),
    two_exchanged=lambda: with_two_pieces_exchanged(tokenizer()),
    no_dummy_prefix=lambda: tokenizer(add_dummy_prefix=False),
    all_spaces=lambda: tokenizer(remove_extra_whitespaces=False),
)


@pytest.mark.parametrize("name", OTHERS)
def test_another_tokenizer_of_the_same_size_is_refused_with_both_numbers(tmp_path, name):
    hp = write_data(tmp_path, OTHERS[name](), stream_of(tokenizer(), TEXTS[:9]))
    said = r"is not the tokenizer of .*\d+ tokens become \d+; \d+ bytes .* text has \d+\): name"
    with pytest.raises(t.UserError, match=said):
        t.load_validation(hp)


def test_a_tokenizer_of_another_size_is_not_proposed(tmp_path):
    hp = write_data(tmp_path, tokenizer(), [1, 2, 3], VOCAB_SIZE=600)
    said = "has 512 pieces, but VOCAB_SIZE=600: name the tokenizer that the data was made with"
    with pytest.raises(t.UserError, match=said):
        t.load_validation(hp)


@pytest.mark.parametrize("kind", ["plain", "unigram", "no_dummy_prefix", "pieces_of_spaces"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_stream_may_begin_and_end_within_a_document(tmp_path, rng, kind, bos):
    model = tokenizer(**KINDS[kind])
    text = "\u4e2d\u6587 caf\u00e9 ".join(TEXTS[3:7]) + "\u00e9\u4e2d" * 20
    whole = stream_of(model, [text, *ODD]) if bos else pieces(model).encode(text)
    hp = write_data(tmp_path, model, whole)
    for _ in range(20):
        begin = int(rng.integers(0, len(whole) - 2))
        end = int(rng.integers(begin + 2, len(whole) + 1))
        write_shard(tmp_path / "fineweb_val_000000.bin", whole[begin:end])
        assert t.load_validation(hp).num_targets == end - begin - 1


def test_each_validation_shard_must_be_of_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "CHECKED_TOKENS", 500)
    own, other = tokenizer(), tokenizer(model_type="unigram")
    hp = write_data(tmp_path, own, stream_of(own, TEXTS[:20]))
    write_shard(tmp_path / "fineweb_val_000001.bin", stream_of(own, TEXTS[20:40]))
    t.load_validation(hp)
    write_shard(tmp_path / "fineweb_val_000001.bin", stream_of(other, TEXTS[20:40]))
    with pytest.raises(t.UserError, match="model, fineweb_val_000001.bin: is not the tokenizer of"):
        t.load_validation(hp)


def test_training_shards_of_another_tokenizer_are_warned_of(tmp_path):
    own, other = tokenizer(), tokenizer(model_type="unigram")
    hp = write_data(tmp_path, own, stream_of(own, TEXTS[:20]), TRAIN_SEQ_LEN=8)
    write_shard(tmp_path / "fineweb_train_000000.bin", stream_of(other, TEXTS[20:40]))
    (warning,) = t.data_warnings(hp, t.TokenLoader(hp, 0, 1), t.load_validation(hp))
    assert "fineweb_train_000000.bin: TOKENIZER_PATH=" in warning
    assert "is not the tokenizer of this data" in warning


@pytest.mark.parametrize(
    "options",
    [
        dict(control_symbols=("\u2581<sep>",)),
        dict(unk_piece="\u2581unk"),
        dict(control_symbols=("\u2581a", "\u2581b")),
    ],
    ids=["control", "unknown", "controls"],
)
def test_a_piece_that_is_no_text_has_no_space_to_drop(tmp_path, options):
    model = tokenizer(**options)
    sp = pieces(model)
    textless = [i for i in range(512) if sp.is_control(i) or sp.is_unknown(i)]
    hp = write_data(tmp_path, model, [t.BOS, *textless, t.BOS, *sp.encode("some words")])
    assert t.load_validation(hp).target_bytes.sum() == len("some words")


def test_a_wrong_tokenizer_is_noticed_in_a_stream_without_documents(tmp_path):
    hp = write_data(tmp_path, OTHERS["another_text"](), pieces(tokenizer()).encode(TEXTS[3])[7:-3])
    with pytest.raises(t.UserError, match="is not the tokenizer"):
        t.load_validation(hp)


def test_documents_with_unknown_pieces_are_counted_and_checked_in_parts(tmp_path):
    model = tokenizer(byte_fallback=False)
    tokens = stream_of(model, ["plain words", "a \u2603 b \u2603", "x", "\u2603"])
    validation = t.load_validation(write_data(tmp_path, model, tokens))
    assert validation.checked.startswith("documents:2 parts:3 ")
    assert validation.count_bytes.unknown(validation.tokens) == (3, 2)
    assert validation.target_bytes.sum() == len("plain words" + "a  b " + "x")


@pytest.mark.parametrize("options", [{}, dict(model_type="char", vocab_size=80)])
def test_texts_that_a_tokenizer_cannot_spell_are_no_reason_to_refuse_it(tmp_path, options):
    model = tokenizer(byte_fallback=False, **options)
    texts = [*TEXTS, *(" ".join(ODD) + text for text in TEXTS[:20])]
    validation = t.load_validation(write_data(tmp_path, model, stream_of(model, texts)))
    assert validation.count_bytes.unknown(validation.tokens)[1] > 20


def test_a_stream_that_could_not_be_checked_is_warned_of(tmp_path):
    model = tokenizer(byte_fallback=False)
    hp = write_data(tmp_path, model, stream_of(model, ["a \u2603 b"]))
    (warning,) = t.data_warnings(hp, None, t.load_validation(hp))
    assert "no whole document could be decoded" in warning


def test_an_unknown_piece_in_every_document_hides_no_wrong_tokenizer(tmp_path):
    """A frequent piece of the data is the other tokenizer's <unk>."""
    texts = [text for text in TEXTS if len(text) > 4000][:8]
    tokens = stream_of(tokenizer(byte_fallback=False), texts)
    frequent = int(np.argsort(np.bincount(tokens))[-3])
    other = tokenizer(byte_fallback=False, unk_id=frequent, input_sentence_size=3000)
    hp = write_data(tmp_path, other, tokens)
    assert t.ByteCounter(hp).unknown(np.array(tokens))[1] == len(texts)
    with pytest.raises(t.UserError, match="is not the tokenizer"):
        t.load_validation(hp)


def test_the_check_reads_only_the_beginning_of_a_long_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "CHECKED_TOKENS", 500)
    good = stream_of(tokenizer(), TEXTS[:9])
    hp = write_data(tmp_path, tokenizer(), [*good[:2000], *[300] * 2000])
    checked = t.load_validation(hp).checked
    assert 400 < int(re.search(r" tokens:(\d+) ", checked)[1]) < 500


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_that_is_viewed_has_the_bytes_that_are_counted(tmp_path, kind):
    model = tokenizer(**KINDS[kind])
    sp = pieces(model)
    texts = [text for text in ODD if sp.unk_id() not in sp.encode(text)]
    tokens = np.array(stream_of(model, texts))
    counter = t.ByteCounter(write_data(tmp_path, model, tokens))
    shown = view.token_texts(tokens[1:], counter, at_start=True)
    assert "".join(shown) == "".join(sp.decode(sp.encode(text)) for text in texts)
    assert len("".join(shown).encode()) == counter(tokens).sum()


# --- byte shards ----------------------------------------------------------------------------------

CASES = dict(user_defined_symbols=("\ue001", "\ue002"))


def lowered(text: str) -> str:
    """A sentinel before each capital, as the field's CaseOps writes text."""
    return re.sub("[A-Z]", lambda capital: "\ue001" + capital[0].lower(), text)


def true_bytes(model: bytes, tokens) -> np.ndarray:
    """The bytes that a correct sidecar holds: for each token, those of the original text, which
    still has its capital letters. A case sentinel stands for no byte."""
    sp = pieces(model)
    sizes = [0, *slow_bytes(sp, tokens)]
    names = [sp.id_to_piece(token) for token in tokens]
    return np.array(sizes) - [3 * sum(c in "\ue001\ue002" for c in name) for name in names]


def cased_data(folder) -> tuple[t.Hyperparameters, np.ndarray, int]:
    """(settings, bytes of each token, bytes of the text)."""
    texts = [" ".join(text.split()) for text in TEXTS[:4]]
    tokens = stream_of(tokenizer(**CASES), map(lowered, texts))
    hp = write_data(folder, tokenizer(**CASES), tokens)
    return hp, true_bytes(tokenizer(**CASES), tokens), sum(len(text.encode()) for text in texts)


def test_case_sentinels_without_byte_shards_are_refused(tmp_path):
    hp, _, _ = cased_data(tmp_path)
    with pytest.raises(t.UserError, match="no fineweb_val_bytes_ shards .*add the byte shards"):
        t.load_validation(hp)


def test_byte_shards_are_the_targets_bytes_and_no_tokens(tmp_path):
    hp, sizes, total = cased_data(tmp_path)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", sizes)
    validation = t.load_validation(hp)
    assert len(validation.tokens) == len(sizes)
    assert validation.target_bytes.tolist() == sizes[1:].tolist()
    assert validation.target_bytes.sum() == total
    assert set(validation.identity) == {"val", "tokenizer", "val_bytes"}


def test_byte_shards_win_over_counting_within_one_percent(tmp_path):
    hp = write_data(tmp_path, tokenizer(), stream_of(tokenizer(), TEXTS[:4]))
    counted = t.load_validation(hp).target_bytes
    given = np.append(0, counted)
    given[np.flatnonzero(given)[: int(0.009 * counted.sum())]] += 1
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", given)
    assert np.array_equal(t.load_validation(hp).target_bytes, given[1:])


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda sizes: sizes[:-1], "expected one entry for each token"),
        (lambda sizes: np.append(sizes, 1), "expected one entry for each token"),
        (lambda sizes: sizes + (np.arange(len(sizes)) % 20 == 0), "at most 1 % difference"),
        (lambda sizes: sizes * 2, "at most 1 % difference"),
        (lambda sizes: np.where(np.arange(len(sizes)) < 900, 0, sizes), "to the first 900 tokens"),
    ],
    ids=["one fewer", "one more", "5 percent more", "twice", "none in the documents checked"],
)
def test_byte_shards_of_other_data_are_refused(tmp_path, monkeypatch, spoil, said):
    monkeypatch.setattr(t, "CHECKED_TOKENS", 900)
    hp, sizes, _ = cased_data(tmp_path)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", spoil(sizes))
    with pytest.raises(t.UserError, match=said):
        t.load_validation(hp)


def test_a_tokenizer_with_sentinels_makes_the_round_trip(tmp_path):
    hp, sizes, _ = cased_data(tmp_path)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", sizes)
    checked = t.load_validation(hp).checked
    assert checked.startswith("documents:3 parts:1 ") and checked.endswith(f"bytes:{sizes.sum()}")


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Settings of a stream of two shards, and of three training shards."""
    tokens = stream_of(tokenizer(), TEXTS[:6])
    hp = write_data(tmp_path, tokenizer(), tokens[:1000])
    write_shard(tmp_path / "fineweb_val_000001.bin", tokens[1000:2000])
    for i in range(3):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", tokens[2000 + 500 * i :][:500])
    return hp


def warnings_of(hp) -> list[str]:
    return t.data_warnings(hp, t.TokenLoader(hp, 0, 1), t.load_validation(hp))


def test_whole_data_is_not_warned_of(data):
    assert warnings_of(data) == []


@pytest.mark.parametrize(
    "name",
    [
        "fineweb_val_000000_backup.bin",
        "fineweb_val_1.bin",
        "fineweb_val_0000002.bin",
        "fineweb_val_000000 (1).bin",
        "FineWeb_val_000002.bin",
        "fineweb_val_00000\u0662.bin",
        "fineweb_val_bytes_0.bin",
        "fineweb_validation_000002.bin",
    ],
)
def test_what_may_be_taken_for_a_validation_shard_is_refused_by_name(data, tmp_path, name):
    (tmp_path / "fineweb_val_000001.bin").rename(tmp_path / name)
    with pytest.raises(t.UserError, match=re.escape(name) + ": is it part of .*rename this file"):
        t.load_validation(data)


@pytest.mark.parametrize(
    "number, said", [(0, "2 fineweb_val_ shards, without 000000:"), (1, "without 000001: the")]
)
def test_a_hole_in_the_validation_stream_is_refused(data, tmp_path, number, said):
    write_shard(tmp_path / "fineweb_val_000002.bin", [5, 6, 7])
    (tmp_path / f"fineweb_val_{number:06d}.bin").unlink()
    with pytest.raises(t.UserError, match=said):
        t.load_validation(data)


def tokens_of(path) -> np.ndarray:
    return np.fromfile(path, "<u2")[512:]


def other_header(path, tokens) -> None:
    """A shard with something in the part of its header that nobody reads."""
    content = bytearray(write_shard(path, tokens).read_bytes())
    content[200] = 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "copy",
    [
        write_shard,
        other_header,
        lambda path, tokens: write_shard(path, tokens[:-1]),
        lambda path, tokens: write_shard(path, tokens[: len(tokens) // 2]),
        lambda path, tokens: write_shard(path, [*tokens, 5]),
    ],
    ids=["equal", "another header", "a token less", "half of it", "a token more"],
)
def test_a_copied_validation_shard_is_refused(data, tmp_path, copy):
    copy(tmp_path / "fineweb_val_000002.bin", tokens_of(tmp_path / "fineweb_val_000000.bin"))
    said = "same tokens, fineweb_val_000000.bin = fineweb_val_000002.bin: remove"
    with pytest.raises(t.UserError, match=said):
        t.load_validation(data)


def test_a_training_shard_that_begins_with_the_stream_to_score_is_warned_of(data, tmp_path):
    scored = tokens_of(tmp_path / "fineweb_val_000000.bin")
    write_shard(tmp_path / "fineweb_train_000003.bin", [*scored, 5, 6, 7])
    (warning,) = warnings_of(data)
    assert "fineweb_val_000000.bin = fineweb_train_000003.bin" in warning


@pytest.mark.parametrize("source", ["train_000000", "val_000001"])
def test_an_equal_training_shard_is_warned_of(data, tmp_path, source):
    copied = (tmp_path / f"fineweb_{source}.bin").read_bytes()
    (tmp_path / "fineweb_train_000003.bin").write_bytes(copied)
    (warning,) = warnings_of(data)
    assert f"fineweb_{source}.bin = fineweb_train_000003.bin" in warning


def test_a_hole_among_training_shards_is_warned_of(data, tmp_path):
    (tmp_path / "fineweb_train_000001.bin").rename(tmp_path / "fineweb_train_000009.bin")
    (warning,) = warnings_of(data)
    assert "training shards 000001, 000003, 000004, 000005 and 3 more are missing" in warning


def test_other_files_are_warned_of_and_not_read(data, tmp_path):
    tokens = t.TokenLoader(data, 0, 1).num_tokens
    for name in ("notes.bin", "fineweb_train_000000_copy.bin", "fineweb_train_7.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
    (warning,) = warnings_of(data)
    for name in ("notes.bin", "fineweb_train_000000_copy.bin", "fineweb_train_7.bin"):
        assert name in warning
    assert t.TokenLoader(data, 0, 1).num_tokens == tokens


def test_other_files_beside_training_shards_elsewhere_are_warned_of(data, tmp_path):
    write_shard(tmp_path / "more/fineweb_train_000000.bin", [5, 6, 7])
    write_shard(tmp_path / "more/stray.bin", [5, 6, 7])
    (warning,) = warnings_of(tiny(**{**data.as_env(), "TRAIN_DATA_PATH": tmp_path / "more"}))
    assert "more: stray.bin: not read" in warning


# --- streams of next to nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [[t.BOS] * 50, [t.BOS, 2] * 50, [300, t.BOS, t.BOS], [t.BOS, 3, 3], [t.BOS, "\u2581"] * 20],
    ids=["bos", "bos and eos", "text that is no target", "unknown", "dropped spaces"],
)
def test_a_stream_without_text_is_refused(tmp_path, tokens):
    space = pieces(tokenizer()).piece_to_id("\u2581")
    tokens = [space if token == "\u2581" else token for token in tokens]
    hp = write_data(tmp_path, tokenizer(), tokens)
    with pytest.raises(t.UserError, match="targets .* are no text: they have 0 bytes"):
        t.load_validation(hp)


@pytest.mark.parametrize("tokens", [[], [t.BOS]])
def test_a_stream_without_targets_is_refused(tmp_path, tokens):
    hp = write_data(tmp_path, tokenizer(), tokens)
    said = f"the validation stream has {len(tokens)} tokens, expected at least 2"
    with pytest.raises(t.UserError, match=said):
        t.load_validation(hp)


def test_training_shards_without_tokens_are_refused(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [])
    with pytest.raises(t.UserError, match="its training shards hold no tokens"):
        t.TokenLoader(tiny(DATA_PATH=tmp_path), 0, 1)


def test_empty_shards_change_nothing(data, tmp_path):
    stream, batch = t.load_validation(data).tokens, t.TokenLoader(data, 0, 1).micro_batch(5, 0)
    for part, first in (("val", 2), ("train", 3)):
        for i in range(2):
            write_shard(tmp_path / f"fineweb_{part}_{first + i:06d}.bin", [])
    assert np.array_equal(t.load_validation(data).tokens, stream)
    assert all(map(np.array_equal, t.TokenLoader(data, 0, 1).micro_batch(5, 0), batch))
    assert warnings_of(data) == []


def test_more_shards_than_a_process_may_open(data, tmp_path):
    """As 1,100 of a part at the usual limit of 1,024: here 300 of each at 280."""
    tokens = np.array(stream_of(tokenizer(), TEXTS[:3]))
    for i in range(300):
        for part in ("train", "val"):
            write_shard(tmp_path / f"fineweb_{part}_{i:06d}.bin", tokens[7 * i :][:7])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(tmp_path.joinpath("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 280, before[1]))
    try:
        loader = t.TokenLoader(data, 0, 1)
        assert np.array_equal(loader.span(0, 2100), tokens[:2100])
        assert np.array_equal(t.load_validation(data).tokens, tokens[:2100])
        assert len(loader.identity["train_shards"].split()) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- identity -------------------------------------------------------------------------------------


def identity(hp) -> dict[str, str]:
    return t.load_validation(hp).identity | t.TokenLoader(hp, 0, 1).identity


def test_the_validation_streams_sha256_is_that_of_its_tokens(data, tmp_path):
    raw = b"".join((tmp_path / f"fineweb_val_00000{i}.bin").read_bytes()[1024:] for i in (0, 1))
    model = (tmp_path / "tokenizer.model").read_bytes()
    found = identity(data)
    assert found["val"] == f"shards:2 tokens:2000 sha256:{hashlib.sha256(raw).hexdigest()}"
    assert found["tokenizer"] == f"sha256:{hashlib.sha256(model).hexdigest()}"


def test_training_shards_are_listed_with_their_lengths(data):
    found = identity(data)
    assert re.fullmatch(r"shards:3 tokens:1500 sha256:[0-9a-f]{64}", found["train"])
    listed = r"000000:500:[0-9a-f]{16} 000001:500:[0-9a-f]{16} 000002:500:[0-9a-f]{16}"
    assert re.fullmatch(listed, found["train_shards"])


def flip(path, token: int) -> None:
    """Change one token of a shard."""
    tokens = np.array(t.load_shard(path))
    tokens[token] ^= 4
    write_shard(path, tokens)


@pytest.mark.parametrize("token", [0, 250, -1])
@pytest.mark.parametrize("shard, part", [("train_000002", "train"), ("train_000000", "train")])
def test_a_changed_training_token_changes_the_identity(data, tmp_path, shard, part, token):
    before = identity(data)
    flip(tmp_path / f"fineweb_{shard}.bin", token)
    after = identity(data)
    assert before[part] != after[part] and before["val"] == after["val"]


def test_a_changed_validation_token_changes_the_identity(data, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "round_trip", lambda *_: "")
    before = identity(data)
    flip(tmp_path / "fineweb_val_000001.bin", 567)
    assert identity(data)["val"] != before["val"]


def test_a_training_shard_more_or_in_another_place_changes_the_identity(data, tmp_path):
    before = identity(data)["train"]
    (tmp_path / "fineweb_train_000002.bin").rename(tmp_path / "fineweb_train_000003.bin")
    moved = identity(data)["train"]
    write_shard(tmp_path / "fineweb_train_000002.bin", [])
    assert len({before, moved, identity(data)["train"]}) == 3


@pytest.mark.parametrize("place", [0, 4096, 1_000_000, 2_000_000 - 4096, 2_000_000 - 1])
def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path, place):
    path = tmp_path / "large"
    content = bytearray(2_000_000)
    path.write_bytes(content)
    before = t.sampled_sha256(path)
    starts = np.linspace(0, 2_000_000 - 4096, 64).astype(int)
    content[place] = 1
    path.write_bytes(content)
    is_sampled = any(start <= place < start + 4096 for start in starts)
    assert (t.sampled_sha256(path) != before) == is_sampled
    assert is_sampled or 0 < place < 1_999_999


def test_known_streams_are_named(monkeypatch):
    monkeypatch.setattr(t, "KNOWN_STREAMS", {6144: "SP1024", 8192: "SP8192"})
    monkeypatch.setattr(t, "SAMPLE_TOKENS", 100)
    stream = np.arange(9000, dtype=np.uint16)
    sha256 = t.hashlib.sha256(stream[:100]).hexdigest()
    monkeypatch.setattr(t, "SAMPLE_SHA256", sha256)
    assert t.stream_name(stream[:6145]).startswith("SP1024 known_by:length and the sha256 of")
    assert t.stream_name(stream[:8191]).startswith("SP1024 known_by:length and the sha256 of")
    assert t.stream_name(stream[:100]) == "the first 100 tokens of SP1024 known_by:sha256"
    assert t.stream_name(stream[1:8500]) == "SP8192 known_by:length only"
    assert t.stream_name(stream[1:6200]) == "unknown"  # of its length, but it begins otherwise
    assert t.stream_name(stream[:5000]) == "unknown"


# --- going on with the same data ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    state, _ = new_state(new_training(corpus, folder / "run.txt"))
    state.save()
    return str(folder / "run.ckpt")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: flip(f / "fineweb_train_000001.bin", 5), "train was shards:3"),
        (
            lambda f: write_shard(f / "fineweb_train_000003.bin", [5, 6, 7]),
            r"train was shards:3 .* is shards:4 .* now: set DATA_PATH.*; the checkpoint is kept",
        ),
    ],
    ids=["another token", "a shard more"],
)
def test_resume_refuses_other_data(corpus, stopped, tmp_path, change, said):
    folder = tmp_path / "data"
    shutil.copytree(corpus["DATA_PATH"], folder)
    change(folder)
    training = new_training(corpus | dict(DATA_PATH=str(folder)), RESUME=stopped, ITERATIONS=6)
    with pytest.raises(t.UserError, match=said):
        t.train(*training)


def test_resume_refuses_another_model(corpus, stopped):
    training = new_training(corpus, RESUME=stopped, ITERATIONS=6, LEAKY_SLOPE=0.9)
    with pytest.raises(t.UserError, match="was begun with LEAKY_SLOPE=0.5, not 0.9: set that$"):
        t.train(*training)


def test_resume_refuses_another_stream_to_score(corpus, stopped):
    training = new_training(corpus, RESUME=stopped, ITERATIONS=6)
    other = t.Validation(training.validation.tokens, np.ones_like, identity={"val": "another"})
    with pytest.raises(t.UserError, match="val was not recorded, but is another now"):
        t.train(*training._replace(validation=other))


def test_resume_takes_the_same_data_from_another_place(corpus, stopped, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(corpus["DATA_PATH"], folder)
    state, _ = new_state(new_training(corpus | dict(DATA_PATH=str(folder))))
    state.restore(stopped)
    assert state.log.starting("resume:")
