"""runs/sp8192.sh: a tiny model with 8,192 pieces goes through every stage."""

import numpy as np
import pytest
import sentencepiece as spm
import torch
from helpers import (
    SCORES,
    TINY,
    finish,
    launched,
    log_of,
    scores_of,
    start_python,
    tiny,
    values,
    write_shard,
)

import train_gpt as t
from data.prepare_demo import train_tokenizer

pytestmark = pytest.mark.slow
PIECES = 8192

# Two gates of this preset read the first 12 channels. So the model needs at least that width.
SIZES = dict(
    NUM_LAYERS=3,
    MODEL_DIM=16,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    ROPE_DIMS=4,
    RECUR_LAYERS="1",
    PARALLEL_START_LAYER=2,
)
OWN = ("VOCAB_SIZE", "MLP_MULT", "XSA_LAST_N", "EMA_DECAY", "TIED_EMBED_LR")  # the script sets them
UNUSED = ("VE_LAYERS", "VE_DIM", "BIGRAM_VOCAB_SIZE", "BIGRAM_DIM", "WARMDOWN_ITERS")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, str]:
    """The settings that name a corpus and its tokenizer of 8,192 pieces. The text is the language
    reference that comes with the Python that runs this test."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("corpus8192")
    texts = [topics[name] for name in sorted(topics)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, PIECES))
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [[t.BOS, *pieces.encode(text)] for text in texts]
    write_shard(folder / "fineweb_train_000000.bin", sum(ids[:40], []))
    write_shard(folder / "fineweb_val_000000.bin", sum(ids[40:], [])[:3001])
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tokenizer.model"))


def run(folder, corpus, **settings) -> str:
    """The log of runs/sp8192.sh with a tiny model that learns while it scores."""
    fixed = {k: v for k, v in TINY.items() if k not in OWN + UNUSED} | SIZES
    ttt = dict(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=1024)
    settings = fixed | ttt | corpus | dict(NPROC=0) | settings
    done = finish(start_python(folder, *launched("sp8192", folder, **settings)))
    assert done.returncode == 0, done.stderr[-3000:]
    return log_of(folder)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Where the run took place."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, corpus)
    return folder


@pytest.fixture(scope="module")
def log(folder) -> str:
    return log_of(folder)


def test_the_text_needs_the_larger_vocabulary(corpus):
    validation = t.load_validation(tiny(**corpus, VOCAB_SIZE=PIECES))
    assert (validation.tokens >= 1024).mean() > 0.3


@pytest.mark.parametrize(
    "stage, key, value",
    [
        ("recurrence:on", "passes", "5"),  # layer 1 runs three times
        ("late_qat:on", "bits", "6"),
        ("gptq_curvature", "tokens", "1024"),
        ("ttt:score_first", "epochs", "1"),
        ("ngram_audit", "targets", "3000/3000"),
        ("ngram_audit", "mass_min", "1.000000000000"),
        ("ngram_audit", "mass_max", "1.000000000000"),
    ],
)
def test_every_stage_takes_place(log, stage, key, value):
    assert values(log, stage)[key] == value


def test_every_score_is_better_than_an_even_guess(log):
    for score in SCORES:
        assert float(values(log, score)["val_loss"]) < np.log(PIECES), score


def test_no_setting_of_the_script_is_refused_or_without_effect(log):
    assert "warning:" not in log


def test_the_table_is_rounded_by_its_curvature(log, folder):
    """All of its rows, also those of pieces that the measured tokens do not have."""
    blob = (folder / "logs/test.int6.ptz").read_bytes()
    settings, state = t.decompress(blob)
    table = state["embed.weight"]
    assert settings["VOCAB_SIZE"] == str(PIECES)
    assert table.shape == (PIECES, 16)
    assert (table != 0).any(1).all()
    assert "its curvature is unusable" not in log


def test_the_artifact_alone_gives_the_same_scores(folder, log, corpus, tmp_path):
    again = run(tmp_path, corpus, EVAL_ONLY=folder / "logs/test.int6.ptz")
    for name in ("final_int6_roundtrip", "final_int6_sliding_window", "final_ngram"):
        first, second = (float(values(x, f"{name}_exact")["val_bpb"]) for x in (log, again))
        assert first == pytest.approx(second, abs=1e-6), name


def test_scores_do_not_depend_on_how_many_logits_are_made_at_once(corpus, monkeypatch):
    hp = tiny(**corpus, VOCAB_SIZE=PIECES)
    model, tokens = t.GPT(hp), t.load_validation(hp).tokens[:600]
    with torch.no_grad():
        model.embed.weight.mul_(20)
    whole = scores_of(model, tokens, 8)
    monkeypatch.setattr(t, "HEAD_LOGITS", 50 * PIECES)
    pieces = scores_of(model, tokens, 8)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)
