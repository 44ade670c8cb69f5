"""Every numeric setting, at its bounds and beyond them. Values beyond are refused by `from_env`.
With those that it accepts, a model trains, is packed and is scored: no traceback, no endless loop,
and all numbers are finite."""

import math
from dataclasses import fields

import numpy as np
import pytest
from helpers import (
    ADAPTERS,
    ALONE,
    SILENT,
    STEADY,
    TTT,
    new_training,
    scorer_of,
    segments_while_learning,
    tiny,
    validation_of,
)

import train_gpt as t
from train_gpt import Hyperparameters, UserError

NUMBERS = {f.name.upper(): f for f in fields(Hyperparameters) if type(f.default) in (int, float)}
FLOATS = [name for name, f in NUMBERS.items() if type(f.default) is float]
# Steps and tokens that a run works through: their upper bounds only cost time and memory.
WORK = {"ITERATIONS", "TRAIN_BATCH_TOKENS", "GPTQ_TOKENS", "WARMUP_STEPS", "TTT_EPOCHS"}
SIZES = {"NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "MLP_MULT", "TRAIN_SEQ_LEN", "EVAL_SEQ_LEN"}


def low(name: str):
    return NUMBERS[name].metadata["low"]


def high(name: str):
    return NUMBERS[name].metadata["high"]


def refusal(**env) -> str:
    """What `from_env` says; it must be one line."""
    with pytest.raises(UserError) as error:
        Hyperparameters.from_env(env)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- beyond the bounds


def test_every_number_has_bounds():
    assert [name for name in NUMBERS if low(name) is None or not high(name) < math.inf] == []


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_beyond_its_bounds_is_refused(name):
    is_float = name in FLOATS
    below = math.nextafter(low(name), -math.inf) if is_float else low(name) - 1
    above = math.nextafter(high(name), math.inf) if is_float else high(name) + 1
    if below == -5e-324:
        below = -1e-30
    for value in (below, above):
        assert f"{name}='{value}': expected a" in refusal(**{name: str(value)})


def test_numbers_that_no_run_can_use_are_refused():
    for name in NUMBERS:
        for text in ("nan", "inf", "-inf", "1e308", "1e400", str(2**64), "9" * 5000, "", "1e-46"):
            said = refusal(**{name: text})
            assert said.startswith(f"{name}='{text[:20]}")
            assert len(said) < 400


def test_a_number_that_float32_cannot_tell_from_0_is_refused():
    assert "expected a number from -1 to 1; if not 0, at least 1e-30" in refusal(
        LEAKY_SLOPE="-1e-46"
    )


def test_a_negative_zero_is_zero():
    for name in NUMBERS:
        if low(name) <= 0 <= high(name) and name not in ("MLP_MULT", "ALPHA_MAX"):
            value = getattr(tiny(**FITTING.get(name, {}), **{name: "-0"}), name.lower())
            assert str(value) == ("0.0" if name in FLOATS else "0")


@pytest.mark.parametrize("name", ["BETA1", "BETA2", "TTT_DECAY"])
def test_a_decay_that_float32_cannot_tell_from_1_is_refused(name):
    assert "expected a number from 0 to 0.99999" in refusal(**{name: str(1 - 2**-25)})


# ---- sizes


@pytest.mark.parametrize(
    "env",
    [
        {"BIGRAM_VOCAB_SIZE": "100000000"},
        {"MLP_MULT": "65536"},
        {"MODEL_DIM": "65536", "NUM_HEADS": "1024"},
        {"NUM_LAYERS": "256"},
        {"VOCAB_SIZE": "65536", "MODEL_DIM": "4096"},
        {"VOCAB_SIZE": "65536", "VE_DIM": "65536"},
        {"BIGRAM_DIM": "65536", "BIGRAM_VOCAB_SIZE": "5000"},
    ],
)
def test_a_model_too_large_to_be_packed_is_refused(env):
    assert "but an artifact may have at most 67,108,864" in refusal(**env)


@pytest.mark.parametrize("number", [1, 2, 36, 97, 360, 1024])
def test_divisors_are_those_that_divide(number):
    assert t.divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_an_enormous_batch_is_divided_at_once(corpus):
    hp = tiny(**corpus, TRAIN_SEQ_LEN=1, TRAIN_BATCH_TOKENS=999_999_937)  # a prime
    loader = t.TokenLoader(hp, 0, 1)
    assert (loader.rows, loader.accumulation) == (1, 999_999_937)


# ---- text


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a/b",
            "/a",
            "..",
            ".",
            ".hidden",
            "a b",
            " ",
            "a\r",
            "a\t",
            "a\0b",
            "a\nb",
            "a\\b",
            "a:b",
            "a*",
            "a?",
            "<a>",
            "a|b",
        ),
        *("a" * 201, "ä" * 101, "a\x1b[0m", "a\udcff", "a\u2028b", "a\u00a0b"),
    ],
)
def test_a_run_id_that_is_no_file_name_is_refused(name):
    assert refusal(RUN_ID=name).startswith("RUN_ID=")


@pytest.mark.parametrize("name", ["", "a", "seed42", "-x", "2026-11-28_é", "a.b", "a" * 200])
def test_a_run_id_that_is_a_file_name_is_taken(name):
    assert Hyperparameters.from_env({"RUN_ID": name}).run_id == name


PATHS = ["DATA_PATH", "TRAIN_DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY", "RESUME"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("text", ["data\r", "data ", " data", "da\nta", "data\0", "\t"])
def test_a_path_with_stray_characters_is_refused_not_changed(name, text):
    assert f"{name}={text!r}: expected text without control" in refusal(**{name: text})


@pytest.mark.parametrize("name", PATHS)
def test_a_path_may_have_spaces_inside(name):
    assert getattr(tiny(**{name: "my data/ä"}), name.lower()) == "my data/ä"


def test_a_carriage_return_after_another_value_is_ignored():
    for name, text in Hyperparameters().as_env().items():
        if name not in (*PATHS, "RUN_ID"):
            assert Hyperparameters.from_env({name: f"{text}\r"}) == Hyperparameters()


# ---- at the bounds


def use(corpus, **changes) -> None:
    """Three steps with all that the settings turn on, an artifact, and scores of a short stream.
    Fails if a number is not finite."""
    training = new_training(corpus, **changes)
    hp, stream = training.model.hp, np.arange(400, dtype=np.uint16) % 250
    scorer = scorer_of(training.model)
    trained = t.train(*training)
    t.validate(scorer, training.validation, ALONE, SILENT)
    packed = t.compress(trained.weights, hp, trained.curvature, 15_000_000)
    _, state = t.decompress(packed.container.blob)
    training.model.load_state_dict(state)
    scores = t.score(scorer, stream, hp.eval_stride, ALONE)
    if hp.ttt_lora_rank:
        scores = t.score_documents(scorer, stream, ALONE)
    elif hp.ttt_epochs:
        validation = validation_of(stream, np.ones(399, np.uint16))
        scores = segments_while_learning(training.model, validation, hp.eval_stride)
    nll, entropy = np.concatenate(list(scores), 1)
    assert np.isfinite(nll).all()
    assert np.isfinite(t.mix(stream, nll, entropy, hp)).all()


STEPS = {**STEADY, "ITERATIONS": 3, "WARMDOWN_ITERS": 3, "SWA_EVERY": 1, "GPTQ_TOKENS": 512}
STEPS["LATE_QAT_THRESHOLD"] = 0.9
FITTING = {  # what else must be set for a bound to be possible
    "BETA1": dict(BETA2=0.99999),
    "BETA2": dict(BETA1=0),
    "MODEL_DIM": dict(NUM_HEADS=1, NUM_KV_HEADS=1, ROPE_DIMS=0),
    "NUM_HEADS": dict(NUM_KV_HEADS=1, ROPE_DIMS=0),
    "NUM_LAYERS": dict(VE_LAYERS="0"),
    "TRAIN_SEQ_LEN": dict(TRAIN_BATCH_TOKENS=16),
    "TRAIN_BATCH_TOKENS": dict(TRAIN_SEQ_LEN=1),
    "EVAL_SEQ_LEN": dict(EVAL_STRIDE=1),
    "NGRAM_ORDER": dict(NGRAM_MIN_ORDER=2),
    "NGRAM_MIN_ORDER": dict(NGRAM_ORDER=16),
    "ALPHA_MIN": dict(NGRAM_ALPHA="entropy", ALPHA_MAX=0.99),
    "ALPHA_MAX": dict(NGRAM_ALPHA="order", ALPHA_MIN=0),
    "MLP_MULT": dict(MODEL_DIM=64),
    "RECUR_TIMES": dict(RECUR_LAYERS="1,2"),
    "TABLE_GAIN_INIT": dict(BIGRAM_DIM=64, VE_DIM=64),
    "WD_TAPER_START_FRAC": dict(WD_TAPER_FINAL_MULT=0.5),
    "EMBED_LR": dict(TIE_EMBEDDINGS=0),
    "HEAD_LR": dict(TIE_EMBEDDINGS=0),
}
OF_LOW = {
    "VOCAB_SIZE": 512,
    "ALPHA_MAX": 0.0,
    "ATTN_GATE_DIMS": 1,
    "SMEAR_GATE_DIMS": 1,
    "MLP_MULT": 1 / 64,
}
OF_HIGH = {  # the largest possible value, where others bound it further
    **{"ROPE_DIMS": 16, "NUM_HEADS": 64, "NUM_KV_HEADS": 4, "EVAL_STRIDE": 32, "VOCAB_SIZE": 2048},
    **{"PARALLEL_START_LAYER": 3, "ATTN_GATE_DIMS": 64, "SMEAR_GATE_DIMS": 64},
    **{"TTT_CHUNK_SIZE": 32, "TTT_BATCH_SIZE": 32},
    **{"BIGRAM_VOCAB_SIZE": 100_000},
    **{"ALPHA_MIN": 0.99, "ALPHA_MAX": 1 - 2**-53, "MUON_BACKEND_STEPS": 100, "VE_DIM": 256},
    **{"BIGRAM_DIM": 256, "LOGIT_SOFTCAP": 10**9, "MAX_WALLCLOCK_SECONDS": 10**9},
}


def bounds() -> list:
    """(setting, value): the smallest, the smallest above 0 and the largest possible value of each
    number, unless it only adds work."""
    found = []
    for name in NUMBERS:
        values = {OF_LOW.get(name, low(name))}
        if name in FLOATS and low(name) <= 0 and name not in ("MLP_MULT", "LOGIT_SOFTCAP"):
            values.add(1e-30)
        if name == "LOGIT_SOFTCAP":
            values.add(0.01)
        if name in OF_HIGH or not name.endswith("_LR") and name not in WORK | SIZES:
            values.add(OF_HIGH.get(name, high(name)))
        found += [(name, value) for value in sorted(values)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, value", bounds())
def test_a_run_at_a_bound_ends_with_finite_scores(name, value, corpus):
    learning = TTT if name.startswith("TTT_") else {}
    if name in ADAPTERS:
        learning = ADAPTERS
    use(corpus, **{**STEPS, **learning, **FITTING.get(name, {}), name: value})


def test_a_run_at_the_bounds_that_once_were_too_wide_ends_with_finite_scores(corpus):
    """BETA1=1, BETA2=1, ADAM_EPS=0, LOGIT_SOFTCAP=1e-46 ended in NaN, SEED=2^64 in a traceback."""
    names = ("BETA1", "BETA2", "SEED")
    use(
        corpus,
        **{**STEPS, **{name: high(name) for name in names}},
        ADAM_EPS=low("ADAM_EPS"),
        LOGIT_SOFTCAP=0.01,
        QUANTIZER="rows",
    )


# ---- learning rates: too large is the one thing that a loss that is not finite may blame


def test_a_huge_learning_rate_is_blamed(corpus):
    with pytest.raises(UserError, match="not finite.*; lower the learning rates"):
        use(corpus, **{**STEPS, "MATRIX_LR": 10**9, "LOGIT_SOFTCAP": 0})
