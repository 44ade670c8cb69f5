"""Shards, the loader, the byte counter, the built-in corpus."""

import json

import numpy as np
import pytest
from helpers import tiny, write_shard

from data import prepare_demo
from train_gpt import (
    ByteCounter,
    TokenLoader,
    UserError,
    load_shard,
    load_validation,
    window_starts,
)


def test_load_shard_is_a_memory_map_of_what_was_written(tmp_path, rng):
    tokens = rng.integers(0, 65536, 1000)
    loaded = load_shard(write_shard(tmp_path / "s.bin", tokens))
    assert isinstance(loaded, np.memmap)
    assert np.array_equal(loaded, tokens)


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            lambda b: b"\x00" * 4 + b[4:],
            "magic 0, version 1, 100 tokens in 1224 bytes; expected magic 20240520, version 1",
        ),
        (
            lambda b: b[:4] + (7).to_bytes(4, "little") + b[8:],
            "magic 20240520, version 7, 100 tokens",
        ),
        (lambda b: b[:-2], "100 tokens in 1222 bytes; expected .* 1024 \\+ 2 n bytes"),
        (lambda b: b[:100], "100 tokens in 100 bytes; expected .* 1024 \\+ 2 n bytes"),
        (lambda b: b"", "0 tokens in 0 bytes; expected"),
        (lambda b: b[:8] + (-462).to_bytes(4, "little", signed=True) + b[12:100], "-462 tokens in"),
    ],
)
def test_bad_shards_are_refused_by_name(tmp_path, damage, said):
    path = write_shard(tmp_path / "fineweb_val_000000.bin", range(100))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=said) as error:
        load_shard(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def stream_of(paths):
    return np.concatenate([load_shard(p) for p in paths])


def batches(hp, world_size: int, steps) -> np.ndarray:
    """(steps, sequences, T + 1): the tokens of each step's batch, from all ranks."""
    loaders = [TokenLoader(hp, rank, world_size) for rank in range(world_size)]
    found = []
    for step in steps:
        parts = [ld.micro_batch(step, m) for ld in loaders for m in range(ld.accumulation)]
        x, y = (np.concatenate([part[i].numpy() for part in parts]) for i in (0, 1))
        found.append(np.concatenate((x, y[:, -1:]), 1))
        assert np.array_equal(x[:, 1:], y[:, :-1])
    return np.stack(found)


def numbered(folder, tokens: int, shards: int = 3, **changes):
    """Settings for a training stream in which token i is i: so a batch shows what was read."""
    for i, part in enumerate(np.array_split(np.arange(tokens), shards)):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part)
    return tiny(DATA_PATH=folder, VOCAB_SIZE=65_536, **changes)


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
@pytest.mark.parametrize("micro", [32, 64, 512])
def test_a_batch_is_the_same_at_any_number_of_ranks_and_micro_batches(corpus, world_size, micro):
    steps = (0, 1, 7, 1000)
    shared = batches(tiny(**corpus, MICRO_BATCH_TOKENS=micro), world_size, steps)
    assert np.array_equal(shared, batches(tiny(**corpus), 1, steps))


@pytest.mark.parametrize("micro, rows", [(32, 1), (64, 2), (512, 8), (1, 1)])
def test_a_micro_batch_holds_at_most_the_tokens_that_were_asked_for(corpus, micro, rows):
    loader = TokenLoader(tiny(**corpus, MICRO_BATCH_TOKENS=micro), 1, 2)
    assert (loader.rows, loader.accumulation) == (rows, 8 // rows)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_an_epoch_reads_each_window_once(tmp_path, world_size):
    """Five steps of 16 windows are an epoch. The windows do not overlap, so that each token is read
    once, and those after the last whole window are left out."""
    hp = numbered(tmp_path, 5 * 16 * 32 + 7)
    for epoch in range(3):
        ids = batches(hp, world_size, range(5 * epoch, 5 * epoch + 5))[:, :, :-1]
        assert len(np.unique(ids)) == ids.size == 5 * 16 * 32


def test_a_window_is_a_run_of_the_circular_stream_across_shards_and_its_end(tmp_path):
    ids = batches(numbered(tmp_path, 5 * 16 * 32 + 7), 1, range(10)).reshape(-1, 33)
    assert np.array_equal((ids[:, :1] + np.arange(33)) % (5 * 16 * 32 + 7), ids)


def test_an_epoch_may_end_within_a_batch(tmp_path):
    """90 windows: the sixth batch reads the epoch's last 10 and the next epoch's first 6."""
    ids = batches(numbered(tmp_path, 90 * 32), 1, range(12))[:, :, :-1].reshape(-1, 32)
    for epoch in (ids[:90], ids[90:180]):
        assert len(np.unique(epoch)) == 90 * 32


def test_epochs_differ_in_order_and_in_phase():
    first, second, other_seed = (
        window_starts(100_003, 32, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))
    )
    for other in (second, other_seed):
        assert np.mean(first == other) < 0.01
        assert np.min(first % 32) != np.min(other % 32)  # at most two remainders in an epoch


@pytest.mark.parametrize("epoch", range(3))
def test_windows_read_one_after_the_other_are_as_far_apart_as_chance_has_it(epoch):
    """In a random order of n windows two in a row are n/3 windows apart on the mean; the mean of
    n - 1 such distances has a standard error of about n / sqrt(18 n)."""
    n = 20_000
    window = window_starts(n * 64, 64, 1337, epoch) // 64
    distance = np.abs(np.diff(window)).mean()
    assert abs(distance - n / 3) < 5 * n / (18 * n) ** 0.5


def test_a_stream_shorter_than_a_window_is_read_round_and_round(tmp_path):
    ids = batches(numbered(tmp_path, 20), 1, range(3)).reshape(-1, 33)
    assert np.array_equal((ids[:, :1] + np.arange(33)) % 20, ids)


def test_the_stream_wraps_at_its_end(tmp_path, rng):
    tokens = rng.integers(0, 300, 700)
    for i, part in enumerate(np.array_split(tokens, 3)):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    loader = TokenLoader(tiny(DATA_PATH=tmp_path), 0, 1)
    for start, count in [(0, 700), (690, 30), (233, 1), (5, 2000), (7000, 3)]:
        assert np.array_equal(loader.span(start, count), tokens[(start + np.arange(count)) % 700])


def test_a_world_size_that_does_not_divide_is_refused_with_the_nearest_that_do(corpus):
    with pytest.raises(UserError, match="start 4 or 8 ranks"):
        TokenLoader(tiny(**corpus), 0, 5)


def test_training_shards_may_lie_elsewhere(tmp_path, corpus):
    write_shard(tmp_path / "fineweb_train_000000.bin", range(400))
    hp = tiny(**corpus, TRAIN_DATA_PATH=tmp_path)
    assert TokenLoader(hp, 0, 1).num_tokens == 400
    assert len(load_validation(hp).tokens) == 6001
    with pytest.raises(UserError, match="TRAIN_DATA_PATH=.*/nowhere: no fineweb_train"):
        TokenLoader(tiny(**corpus, TRAIN_DATA_PATH=tmp_path / "nowhere"), 0, 1)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    for part in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{part}_000000.bin", [1, 2, 512, 4] * 400)
    with pytest.raises(
        UserError, match="fineweb_train_000000.bin: holds token 512, but VOCAB_SIZE=512"
    ):
        TokenLoader(tiny(DATA_PATH=tmp_path), 0, 1).micro_batch(0, 0)
    with pytest.raises(
        UserError, match="fineweb_val_000000.bin: holds token 512, but VOCAB_SIZE=512"
    ):
        load_validation(tiny(DATA_PATH=tmp_path))


def test_a_validation_stream_shorter_than_a_window_is_refused(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", range(32))
    with pytest.raises(
        UserError, match="has 32 tokens, a window needs 33: set EVAL_SEQ_LEN to at most 31"
    ):
        load_validation(tiny(DATA_PATH=tmp_path))


def test_validation_shards_are_joined_in_order(tmp_path, corpus, rng):
    text = load_validation(tiny(**corpus)).tokens
    parts = np.split(text[:93], [40, 43])
    for i, part in enumerate(parts):
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", part)
    validation = load_validation(tiny(**corpus | {"DATA_PATH": tmp_path}))
    assert np.array_equal(validation.tokens, np.concatenate(parts))


def test_validation_counts_its_bytes_once_and_only_when_asked(corpus):
    validation = load_validation(tiny(**corpus))
    counter, asked = validation.count_bytes, []
    validation.count_bytes = lambda tokens: (asked.append(len(tokens)), counter(tokens))[1]
    assert validation.num_targets == 6000
    assert not asked
    expected = ByteCounter(tiny(**corpus))(validation.tokens)
    for _ in range(2):
        assert np.array_equal(validation.target_bytes, expected)
    assert asked == [6001]


def test_a_validation_stream_without_its_tokenizer_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="absent.model: no such file"):
        load_validation(tiny(**corpus | {"TOKENIZER_PATH": tmp_path / "absent.model"}))


def test_tokenizer_errors(corpus, tmp_path):
    with pytest.raises(UserError, match="has 512 pieces, but VOCAB_SIZE=256: name the tokenizer"):
        ByteCounter(tiny(**corpus | {"VOCAB_SIZE": 256}))
    with pytest.raises(UserError, match="no such file"):
        ByteCounter(tiny(TOKENIZER_PATH=tmp_path / "absent.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        ByteCounter(tiny(TOKENIZER_PATH=tmp_path / "bad.model"))


def test_the_built_in_corpus_is_whole_deterministic_and_split_by_document(tmp_path, monkeypatch):
    docs = {
        f"m{i}.py": f"This is document {i}. It says the words alpha beta gamma {i * 7919}."
        for i in range(400)
    }
    monkeypatch.setattr(prepare_demo, "documents", lambda: docs)
    monkeypatch.setattr(prepare_demo, "VOCAB_SIZE", 300)
    for name in ("a", "b"):
        prepare_demo.main(tmp_path / name)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 4
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    facts = json.loads((tmp_path / "a/datasets/demo_sp1024/corpus.json").read_text())
    val = load_shard(tmp_path / "a/datasets/demo_sp1024/fineweb_val_000000.bin")
    assert facts["train_documents"] + facts["val_documents"] == 400
    assert facts["val_tokens"] == len(val)
    assert (val == 1).sum() == facts["val_documents"] > 0
    stamp = (tmp_path / "a/datasets/demo_sp1024/fineweb_val_000000.bin").stat().st_mtime_ns
    prepare_demo.main(tmp_path / "a")
    assert stamp == (tmp_path / "a/datasets/demo_sp1024/fineweb_val_000000.bin").stat().st_mtime_ns


def test_docstrings_are_found_in_source_order():
    source = (
        b'"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n    """Method."""\n'
        b'def g():\n  "Last."\n'
    )
    assert prepare_demo.docstrings(source) == "Module.\n\nClass.\n\nMethod.\n\nLast."
    assert prepare_demo.docstrings(b"print 'python two'") == ""
