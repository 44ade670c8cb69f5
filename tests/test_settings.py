"""Hyperparameters: parsing, checks, warnings, choices."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import ROOT, finish, start_python, tiny

import train_gpt as t
from train_gpt import Hyperparameters, UserError, mistyped


@pytest.mark.parametrize(
    "env, said",
    [
        (
            {"NUM_LAYERS": "eleven"},
            "NUM_LAYERS='eleven': expected an integer from 1 to 256 (default 11)",
        ),
        ({"MLP_MULT": "nan"}, "MLP_MULT='nan': expected a number from 0 to 65,536"),
        ({"MATRIX_LR": "inf"}, "MATRIX_LR='inf': expected a number from 0 to 1,000,000,000"),
        ({"LN_SCALE": "yes please"}, "LN_SCALE='yes please': expected 0 or 1"),
        ({"VE_LAYERS": "1,b"}, "VE_LAYERS='1,b': expected comma-separated integers"),
        ({"AVERAGING": "mean"}, "AVERAGING='mean': expected one of none, ema, swa, ema_swa"),
        ({"NUM_HEADS": "0"}, "NUM_HEADS='0': expected an integer from 1"),
        ({"BETA2": "1.5"}, "BETA2='1.5': expected a number from 0 to 0.99999 (default 0.95)"),
        (
            {"MODEL_DIM": "100"},
            "MODEL_DIM=100, NUM_HEADS=8: expected heads that divide the width",
        ),
        ({"NUM_KV_HEADS": "3"}, "NUM_HEADS=8, NUM_KV_HEADS=3: expected NUM_KV_HEADS to divide"),
        ({"ROPE_DIMS": "66"}, "ROPE_DIMS=66: expected an even number up to the head width"),
        ({"NUM_LAYERS": "6"}, "VE_LAYERS=9,10: expected layers 0 to 5, or VE_ENABLED=0"),
        ({"TRAIN_BATCH_TOKENS": "5000"}, "nearest: 4096 and 6144"),
        (
            {"EVAL_STRIDE": "4096"},
            "EVAL_STRIDE=4096, EVAL_SEQ_LEN=2048: the windows would leave targets unscored",
        ),
        (
            {"NGRAM_MIN_ORDER": "9"},
            "NGRAM_MIN_ORDER=9, NGRAM_ORDER=7: expected the first to be at most the second",
        ),
        (
            {"BETA2": "0.5"},
            "BETA1=0.9, BETA2=0.5: expected BETA1 <= sqrt(BETA2), or AdamW's steps have no bound",
        ),
        ({"ALPHA_MIN": "0.9"}, "ALPHA_MIN=0.9, ALPHA_MAX=0.6: expected ALPHA_MIN <= ALPHA_MAX < 1"),
        (
            {"EVAL_ONLY": "a.ptz", "RESUME": "a.ckpt"},
            "EVAL_ONLY=a.ptz, RESUME=a.ckpt: set only one",
        ),
        ({"RECUR_LAYERS": "4,11"}, "RECUR_LAYERS=4,11: expected rising numbers from 0 to 10"),
        ({"RECUR_LAYERS": "5,4"}, "RECUR_LAYERS=5,4: expected rising numbers from 0 to 10"),
        (
            {"PARALLEL_START_LAYER": "11"},
            "PARALLEL_START_LAYER=11: expected at most 10; 0: no lanes",
        ),
        (
            {"ATTN_GATE_DIMS": "513"},
            "ATTN_GATE_DIMS=513, MODEL_DIM=512: expected at most MODEL_DIM",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(env, said):
    with pytest.raises(UserError) as error:
        Hyperparameters.from_env(env)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_windows_may_follow_each_other_without_overlap():
    hp = Hyperparameters.from_env({"EVAL_STRIDE": "512", "EVAL_SEQ_LEN": "512"})
    assert hp.eval_stride == hp.eval_seq_len


def test_settings_have_the_type_of_their_default():
    hp = Hyperparameters.from_env(
        {"MLP_MULT": "3.5", "VE_LAYERS": "0, 3", "TIE_EMBEDDINGS": "0", "SEED": "7"}
    )
    assert (hp.mlp_mult, hp.ve_layers, hp.tie_embeddings, hp.seed) == (3.5, (0, 3), False, 7)
    assert Hyperparameters.from_env({}) == Hyperparameters()


def test_mistyped_names_are_pointed_out():
    assert mistyped(
        {"NUM_LAYER": "3", "EVAL_STRIED": "1", "PATH": "/bin", "HOME": "/", "SEED": "1"}
    ) == [
        "EVAL_STRIED is set but is no setting; did you mean EVAL_STRIDE?",
        "NUM_LAYER is set but is no setting; did you mean NUM_LAYERS?",
    ]


WRONG_NAMES = {  # name in other scripts, or a slip -> a setting that must be among those suggested
    "MAX_WALLCLOCK": "MAX_WALLCLOCK_SECONDS",
    "WALLCLOCK": "MAX_WALLCLOCK_SECONDS",
    "LR": "EMBED_LR",
    "MUON_LR": "MATRIX_LR",
    "LEARNING_RATE": "EMBED_LR",
    "WEIGHT_DECAY": "MUON_WD",
    "STRIDE": "EVAL_STRIDE",
    "seed": "SEED",
    "TRAIN_BATCH_SIZE": "TRAIN_BATCH_TOKENS",
    "BATCH_SIZE": "VAL_BATCH_SIZE",
    "RESUME_FROM": "RESUME",
    "SEQ_LEN": "TRAIN_SEQ_LEN",
    "CONTEXT_LENGTH": "TRAIN_SEQ_LEN",
    "N_LAYER": "NUM_LAYERS",
    "LAYERS": "NUM_LAYERS",
    "N_HEADS": "NUM_HEADS",
    "VOCAB": "VOCAB_SIZE",
    "MAX_STEPS": "ITERATIONS",
    "NUM_ITERATIONS": "ITERATIONS",
    "WARMUP_ITERS": "WARMUP_STEPS",
    "WARMDOWN_STEPS": "WARMDOWN_ITERS",
    "GRAD_CLIP": "GRAD_CLIP_NORM",
    "DATA_DIR": "DATA_PATH",
    "TOKENIZER": "TOKENIZER_PATH",
    "EVAL_BUDGET": "EVAL_BUDGET_SECONDS",
    "BITS": "QUANT_BITS",
    "NGRAM_MAX_ORDER": "NGRAM_ORDER",
    "TTT_ENABLED": "TTT_EPOCHS",
    "TTT_LEARNING_RATE": "TTT_LR",
    "EMA": "EMA_DECAY",
    "LOG_INTERVAL": "TRAIN_LOG_EVERY",
    "RUN_NAME": "RUN_ID",
    "ROPE_THETA": "ROPE_BASE",
}


@pytest.mark.parametrize("name, meant", WRONG_NAMES.items())
def test_names_that_other_scripts_use_are_pointed_out(name, meant):
    (warning,) = mistyped({name: "1"})
    assert meant in warning.removeprefix(name)


USUAL_NAMES = """
    PATH HOME USER SHELL PWD OLDPWD LANG LC_ALL TERM SHLVL LOGNAME HOSTNAME EDITOR TMPDIR TEMP
    SSH_CLIENT SSH_AUTH_SOCK XDG_RUNTIME_DIR XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS LS_COLORS
    VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED
    PYTHON_VERSION LD_LIBRARY_PATH LIBRARY_PATH MANPATH CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES
    CUDA_VERSION NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NV_CUDNN_VERSION NCCL_DEBUG
    NCCL_IB_DISABLE OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUM_THREADS TORCH_HOME
    TORCHINDUCTOR_CACHE_DIR TORCH_COMPILE_DEBUG PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR RANK
    LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME MASTER_ADDR
    MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID HF_HOME
    HF_TOKEN WANDB_API_KEY WANDB_PROJECT SLURM_JOB_ID SLURM_NTASKS SLURM_STEP_ID GITHUB_RUN_ID
    GITHUB_PATH GITHUB_STEP_SUMMARY CI KUBERNETES_SERVICE_HOST RUNPOD_POD_ID RUNPOD_GPU_COUNT
    JUPYTER_TOKEN HISTSIZE HISTFILE COLUMNS LINES DEBIAN_FRONTEND TZ GOPATH JAVA_HOME NODE_PATH
    NVM_DIR MAKEFLAGS MAKELEVEL CC CFLAGS HTTP_PROXY http_proxy no_proxy SECONDS RANDOM FRESH
    MODEL_PARALLEL NUM_GPUS NPROC_PER_NODE TOKENIZERS_PARALLELISM SESSION_ID INVOCATION_ID
    WINDOWID LOG_LEVEL DEBUG PORT HOST MODEL PYTHON
"""


@pytest.mark.parametrize("name", ["", "_", *USUAL_NAMES.split()])
def test_names_of_a_usual_environment_are_left_alone(name):
    assert mistyped({name: "1"}) == []


def test_a_value_that_cannot_work_does_not_hide_a_mistyped_name():
    done = finish(start_python(ROOT, ["train_gpt.py"], {"ITERATIONS": "x", "STRIDE": "64"}))
    assert "ITERATIONS='x': expected" in done.stderr
    assert "STRIDE is set but is no setting; did you mean EVAL_STRIDE?" in done.stderr


# ---- arguments


def test_help_explains_each_setting_in_its_group():
    done = finish(start_python(ROOT, ["train_gpt.py", "--help"], {}))
    assert done.returncode == 0 and not done.stderr
    groups = t.setting_groups()
    assert sum(groups.values(), []) == list(dataclasses.fields(Hyperparameters))
    for f in dataclasses.fields(Hyperparameters):
        assert f"\n  {f.name.upper()}=" in done.stdout
        assert f.metadata["doc"] in done.stdout
    assert all(f"\n\n{title}\n" in done.stdout for title in groups)


@pytest.mark.parametrize(
    "arguments, remedy",
    [
        (
            ["--seed=42", "--iterations", "3"],
            "write them in front of the command: SEED=42 ITERATIONS=3 ",
        ),
        (["SEED=42"], ": SEED=42 torchrun"),
        (["--eval-stride", "64", "-v"], ": EVAL_STRIDE=64 torchrun"),
        (["config.yaml"], ": SEED=42 torchrun"),
        (["--stride", "64"], "STRIDE is no setting; did you mean EVAL_STRIDE?"),
    ],
)
def test_arguments_are_refused_with_the_settings_that_were_meant(arguments, remedy):
    with pytest.raises(UserError) as caught:
        t.refuse_arguments(arguments)
    assert remedy in str(caught.value) and "--help" in str(caught.value)


def test_the_rank_that_an_old_launcher_appends_is_no_argument():
    t.refuse_arguments(["--local-rank=3"])
    t.refuse_arguments(["--local_rank=3"])


def test_a_run_with_arguments_ends_before_it_begins():
    done = finish(start_python(ROOT, ["train_gpt.py", "--seed=42", "--iterations", "3"], {}))
    assert done.returncode == 1
    assert done.stderr.startswith(
        "train_gpt.py: error: arguments --seed=42 --iterations 3: settings"
    )
    assert not done.stdout


# ---- settings without effect


def without_effect(**env) -> list[str]:
    return Hyperparameters.from_env(env).without_effect(env)


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"TTT_LR": "1e-3"}, "TTT_EPOCHS=0"),
        ({"TTT_LR": "1e-3\r"}, "TTT_EPOCHS=0"),
        ({"ALPHA_MIN": "0.1"}, "NGRAM_ALPHA=online"),
        ({"NGRAM_MIN_COUNT": "3", "NGRAM_ALPHA": "entropy", "NGRAM_ENABLED": "0"}, "NGRAM_ENABLED"),
        ({"SWA_EVERY": "5"}, "AVERAGING=ema"),
        ({"EMA_DECAY": "0.9", "AVERAGING": "none"}, "AVERAGING=none"),
        ({"VE_DIM": "64", "VE_ENABLED": "0"}, "VE_ENABLED=False"),
        ({"VE_DIM": "64", "VE_LAYERS": ""}, "VE_LAYERS="),
        ({"BIGRAM_DIM": "64", "BIGRAM_VOCAB_SIZE": "0"}, "BIGRAM_VOCAB_SIZE=0"),
        ({"HEAD_LR": "0.1"}, "TIE_EMBEDDINGS=True"),
        ({"TIED_EMBED_LR": "0.1", "TIE_EMBEDDINGS": "0"}, "TIE_EMBEDDINGS=False"),
        ({"WARMDOWN_ITERS": "10", "WARMDOWN_FRAC": "0.5"}, "WARMDOWN_FRAC=0.5"),
        ({"QAT_ROUNDING": "soft", "LATE_QAT_THRESHOLD": "0"}, "LATE_QAT_THRESHOLD=0.0"),
        ({"GPTQ_TOKENS": "100", "QUANTIZER": "rows"}, "QUANTIZER=rows"),
        ({"ROPE_BASE": "5000", "ROPE_DIMS": "0"}, "ROPE_DIMS=0"),
        ({"RECUR_START": "0.2"}, "RECUR_LAYERS="),
        ({"RECUR_TIMES": "3"}, "RECUR_LAYERS="),
        ({"SMEAR_GATE_DIMS": "12", "SMEAR_ENABLED": "0"}, "SMEAR_ENABLED=False"),
        ({"WD_TAPER_START_FRAC": "0.5"}, "WD_TAPER_FINAL_MULT=1.0"),
        ({"WD_TAPER_FINAL_MULT": "0.5", "MUON_WD": "0"}, "MUON_WD=0.0"),
    ],
)
def test_a_setting_of_a_feature_that_is_off_is_pointed_out(env, reason):
    name, value = next(iter(env.items()))
    assert any(
        said.startswith(f"{name}={value.strip()} has no effect with {reason}")
        for said in without_effect(**env)
    )


def test_a_setting_of_a_feature_that_is_on_is_left_alone():
    assert without_effect(**Hyperparameters().as_env() | {"NGRAM_ALPHA": "order"}) != []
    on = {"TTT_LR": "1", "TTT_EPOCHS": "1", "SWA_EVERY": "5", "AVERAGING": "ema_swa", "SEED": "3"}
    assert without_effect(**on) == []


def test_only_what_somebody_has_set_is_pointed_out():
    assert without_effect() == without_effect(TTT_EPOCHS="0", NGRAM_ENABLED="0") == []


def test_features_and_what_turns_them_on_are_settings():
    names = set(Hyperparameters().as_env())
    for switch, _, feature in t.FEATURES:
        assert {switch, *feature.split()} <= names


# ---- choices come from the tables


class Half:
    """A mixing rule that gives half to the model and half to all tokens equally."""

    def __init__(self, tokens, hp):
        self.tokens = tokens
        self.hp = hp

    def mix(self, begin, end, model, entropy):
        return 0.5 * model + 0.5 / self.hp.vocab_size, np.zeros(end - begin, np.uint8)

    def distribution(self, target, model_V, entropy):
        return 0.5 * model_V + 0.5 / self.hp.vocab_size

    def evidence(self):
        return [self.tokens]


@pytest.fixture
def half(monkeypatch) -> t.Hyperparameters:
    """Settings with a rule that a test has added to the table."""
    monkeypatch.setitem(t.RULES, "half", Half)
    return tiny(NGRAM_ALPHA="half")


def test_a_mixing_rule_is_a_choice_by_being_in_the_table(half):
    assert half.ngram_alpha == "half"


def test_a_mixture_takes_its_rule_from_the_table(half, rng):
    tokens = rng.integers(0, 500, 300).astype(np.uint16)
    mixture = t.Mixture(tokens, half)
    mixture.extend(np.ones(299), np.ones(299))
    assert mixture.nll == pytest.approx(-math.log(0.5 / math.e + 0.5 / half.vocab_size))
    assert mixture.audit().startswith("targets:299/299 mass_min:1.000000000000")


@pytest.mark.parametrize(
    "name, table", [("NGRAM_ALPHA", t.RULES), ("QUANTIZER", t.QUANTIZERS)], ids=lambda x: str(x)[:9]
)
def test_the_choices_of_a_setting_are_its_table(name, table, monkeypatch):
    monkeypatch.setitem(table, "another", None)
    assert getattr(tiny(**{name: "another"}), name.lower()) == "another"
    with pytest.raises(UserError) as error:
        tiny(**{name: "absent"})
    assert f"{name}='absent': expected one of {', '.join(table)} (" in str(error.value)


def test_tiny_settings_keep_every_feature():
    hp = tiny()
    assert hp.ve_enabled
    assert hp.vrl_enabled
    assert hp.xsa_last_n
    assert hp.bigram_vocab_size
    assert hp.smear_enabled
    assert t.GPT(hp).skip_weights.shape == (2, 64)
