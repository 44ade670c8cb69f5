"""Hyperparameters: parsing, checks, warnings; and that importing the script does nothing."""

import ast
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import ROOT, tiny

import train_gpt
from train_gpt import Hyperparameters, UserError, mistyped


@pytest.mark.parametrize(
    "env, said",
    [
        (
            {"NUM_LAYERS": "eleven"},
            "NUM_LAYERS='eleven': expected an integer, at least 1 (default 11)",
        ),
        ({"MLP_MULT": "nan"}, "MLP_MULT='nan': expected a number, at least 0"),
        ({"MATRIX_LR": "inf"}, "MATRIX_LR='inf': expected a number, at least 0"),
        ({"LN_SCALE": "yes please"}, "LN_SCALE='yes please': expected 0 or 1"),
        ({"VE_LAYERS": "1,b"}, "VE_LAYERS='1,b': expected comma-separated integers"),
        ({"AVERAGING": "mean"}, "AVERAGING='mean': expected one of none, ema, swa, ema_swa"),
        ({"NUM_LAYERS": "0"}, "NUM_LAYERS='0': expected an integer, at least 1"),
        ({"BETA2": "1.5"}, "BETA2='1.5': expected a number from 0 to 1 (default 0.95)"),
        ({"MODEL_DIM": "100"}, "MODEL_DIM=100, NUM_HEADS=8: the heads must divide the width"),
        ({"NUM_KV_HEADS": "3"}, "NUM_HEADS=8, NUM_KV_HEADS=3: the latter must divide"),
        ({"ROPE_DIMS": "66"}, "ROPE_DIMS=66: expected an even number up to the head width"),
        ({"NUM_LAYERS": "6"}, "VE_LAYERS=9,10: layers run from 0 to 5"),
        ({"TRAIN_BATCH_TOKENS": "5000"}, "nearest are 4096 and 6144"),
        ({"EVAL_STRIDE": "4096"}, "EVAL_STRIDE=4096, EVAL_SEQ_LEN=2048: targets would go unscored"),
        ({"NGRAM_MIN_ORDER": "9"}, "NGRAM_MIN_ORDER=9, NGRAM_ORDER=7: no order is left"),
        ({"ALPHA_MIN": "0.9"}, "ALPHA_MIN=0.9, ALPHA_MAX=0.6: expected the first <= second < 1"),
        (
            {"EVAL_ONLY": "a.ptz", "RESUME": "a.ckpt"},
            "EVAL_ONLY=a.ptz, RESUME=a.ckpt: the weights are those of one file",
        ),
        ({"RECUR_LAYERS": "4,11"}, "RECUR_LAYERS=4,11: expected rising numbers from 0 to 10"),
        ({"RECUR_LAYERS": "5,4"}, "RECUR_LAYERS=5,4: expected rising numbers from 0 to 10"),
        ({"PARALLEL_START_LAYER": "11"}, "PARALLEL_START_LAYER=11: expected at most 10; 0: none"),
        ({"ATTN_GATE_DIMS": "513"}, "ATTN_GATE_DIMS=513, MODEL_DIM=512: there are no more"),
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


@pytest.mark.parametrize("name", ["", "PATH", "LAYERS", "SEQ_LEN", "MODEL_PARALLEL", "NUM_GPUS"])
def test_names_that_only_resemble_a_setting_are_left_alone(name):
    assert mistyped({name: "1"}) == []


def test_every_setting_is_documented_and_read_by_something():
    """A switch without effect is a lie: each field is read outside the class that defines it."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    read = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    for f in fields(Hyperparameters):
        assert f.metadata["doc"], f.name
        assert f.name in read, f.name


def test_import_does_nothing_and_needs_no_gpu_library(tmp_path):
    code = (
        "import sys\n"
        "for name in ('triton', 'flash_attn', 'flash_attn_interface', 'sentencepiece'): "
        "sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_gpt, torch\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"NUM_LAYERS": "eleven"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_script_has_no_long_lines():
    lines = (ROOT / "train_gpt.py").read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


def functions() -> list[ast.FunctionDef]:
    """All functions of the script but kernels: their parameters are the launch's."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node for node in found if "jit" not in map(ast.unparse, node.decorator_list)]


def test_the_scripts_functions_are_short():
    for node in functions():
        most = 40 if node.name == "main" else 60
        assert node.end_lineno - node.lineno < most, f"{node.name} is too long"


def test_the_scripts_functions_have_few_arguments():
    for node in functions():
        arguments = [a.arg for a in node.args.args if a.arg != "self"]
        assert len(arguments) <= 6, f"{node.name} has too many arguments"


def test_nothing_runs_code_from_a_file():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    imported = {
        a.name
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    called = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    loads = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not imported & {"pickle", "marshal", "shelve", "dill"}
    assert not called & {"eval", "exec", "compile"}
    assert not {"torch.load", "torch.save"} & loads
    for call in (
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "np.load"
    ):
        assert "allow_pickle=False" in ast.unparse(call)


def test_tiny_settings_keep_every_feature():
    hp = tiny()
    assert hp.ve_enabled
    assert hp.vrl_enabled
    assert hp.xsa_last_n
    assert hp.bigram_vocab_size
    assert hp.smear_enabled
    assert train_gpt.GPT(hp).skip_weights.shape == (2, 64)
