"""The settings in an artifact: `load`, EVAL_ONLY, and what the driver does with the file: its name,
its checksum, its link. The container byte by byte: test_artifact.py."""

import ast
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import (
    ALONE,
    FRONTIER,
    ROOT,
    SILENT,
    TINY,
    FakeRanks,
    KeptLog,
    finish,
    hidden_states,
    log_of,
    run_script,
    shifted,
    start_python,
    tiny,
    values,
)

import train_gpt as t

ODD = dict(  # every setting of a model differs from TINY's, and most from the defaults
    VOCAB_SIZE=320,
    NUM_LAYERS=5,
    MODEL_DIM=48,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    MLP_MULT=2.5,
    LEAKY_SLOPE=0.25,
    TIE_EMBEDDINGS=0,
    LOGIT_SOFTCAP=12.5,
    ROPE_BASE=5e4,
    ROPE_BASE_LENGTH=512,
    ROPE_DIMS=12,
    TRAIN_SEQ_LEN=2000,
    XSA_LAST_N=3,
    LN_SCALE=0,
    UNET_SKIPS=0,
    SKIP_GATES=1,
    RECUR_LAYERS="1,2",
    RECUR_TIMES=3,
    PARALLEL_START_LAYER=3,
    ATTN_GATE_DIMS=6,
    SMEAR_ENABLED=0,
    SMEAR_GATE_DIMS=4,
    SMEAR_CROSSES_BOS=0,
    VE_ENABLED=0,
    VE_DIM=8,
    VE_LAYERS="1",
    VRL_ENABLED=0,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=8,
    QUANT_BITS=5,
    CODER="lzma",
    TRAIN_BATCH_TOKENS=2000,
)


def packed(path: Path, **changes) -> tuple[Path, t.GPT]:
    """An artifact at `path`, and the model whose weights it holds."""
    hp = tiny(**changes)
    model = shifted(t.GPT(hp))
    blob = t.pack(model.state_dict(), hp).blob
    path.write_bytes(blob)
    model.load_state_dict(t.decompress(blob)[1])
    return path, model


@pytest.fixture
def artifact(tmp_path) -> Path:
    """Of a model of TINY's settings."""
    path, _ = packed(tmp_path / "a.ptz")
    return path


# ---- which settings


def read_in_sections(*titles: str) -> set[str]:
    """The settings that these sections of the script read."""
    names = set()
    for title in titles:
        text = (ROOT / "train_gpt.py").read_text().split(f". {title} ---")[1].split("\n# --- ")[0]
        tree = ast.parse(text.partition("\n")[2])
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        names |= {a.attr.upper() for a in attributes if ast.unparse(a.value).endswith("hp")}
    return names & {f.upper() for f in t.Hyperparameters.__dataclass_fields__}


def test_all_that_the_model_reads_is_in_the_artifact():
    """A new setting of the model must be listed, or named here with a reason."""
    only_at_first = {"QK_GAIN_INIT", "TABLE_GAIN_INIT"}  # of the initial weights
    only_speed = {"FUSED_MLP"}
    only_buffers = {"EVAL_SEQ_LEN"}  # tables of positions are made for the windows that come
    expected = read_in_sections("Model") - only_at_first - only_speed - only_buffers
    assert expected <= set(t.MODEL_SETTINGS)


def test_an_artifact_holds_no_other_settings():
    rounding = {"QUANT_BITS", "CODER"}
    assert set(t.MODEL_SETTINGS) - read_in_sections("Model") <= rounding


def test_each_setting_of_a_model_comes_back():
    odd = tiny(**ODD)
    same = [name for name, value in tiny().of_model().items() if value == odd.of_model()[name]]
    assert same == []  # so that each of them is tried
    assert t.settings_of(t.pack(t.GPT(odd).state_dict(), odd).blob) == odd.of_model()


# ---- load


@pytest.mark.parametrize("changes", [{}, FRONTIER, ODD], ids=["tiny", "frontier", "odd"])
def test_load_needs_the_file_alone(tmp_path, rng, changes, monkeypatch):
    """The model computes the same, bit for bit, though all its settings differ from the
    defaults."""
    path, model = packed(tmp_path / "a.ptz", **changes)
    for name, value in {**TINY, "NUM_LAYERS": 7, "ROPE_BASE": 100}.items():
        monkeypatch.setenv(name, str(value))  # the environment is not looked at
    found, hp = t.load(path)
    assert hp.of_model() == model.hp.of_model()
    ids = torch.from_numpy(rng.integers(0, hp.vocab_size, (2, 40)))
    assert torch.equal(hidden_states(found, ids), hidden_states(model, ids))
    assert torch.equal(
        found.nll(hidden_states(found, ids)[0], ids[0]),
        model.nll(hidden_states(model, ids)[0], ids[0]),
    )


@pytest.mark.parametrize(
    "make", [lambda path: os.truncate(path, 1 << 33), os.mkfifo], ids=["huge", "endless"]
)
def test_load_reads_nothing_that_is_larger_than_artifacts_or_has_no_end(tmp_path, make):
    path = tmp_path / "x.ptz"
    if make is not os.mkfifo:
        path.touch()
    make(path)
    with pytest.raises(t.UserError, match="x.ptz: is no file of at most 16,000,000 bytes"):
        t.load(path)


@pytest.mark.parametrize("content", [None, b"", b"PK", b"PGOLF\x03 old"])
def test_load_names_a_file_that_is_no_artifact(tmp_path, content):
    path = tmp_path / "a.ptz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(t.UserError, match=f"^{path}: ") as error:
        t.load(str(path))
    assert "\n" not in str(error.value)


# ---- EVAL_ONLY


def test_settings_come_from_the_artifact(artifact):
    hp = t.read_settings({"EVAL_ONLY": str(artifact), "EVAL_STRIDE": "3", "SEED": "5"}, ALONE)
    assert hp.of_model() == tiny().of_model()
    assert (hp.eval_only, hp.eval_stride, hp.seed) == (str(artifact), 3, 5)


@pytest.mark.parametrize("name", t.MODEL_SETTINGS)
def test_a_setting_that_contradicts_the_artifact_is_refused_with_both_values(artifact, name):
    """Without the file's, each of them would be taken from the environment in silence."""
    env = {"EVAL_ONLY": str(artifact), name: str(ODD[name])}
    held = tiny().of_model()[name]
    said = f"{name}={ODD[name]}: expected {held}, with which EVAL_ONLY={artifact} was made; unset "
    with pytest.raises(t.UserError, match="^" + re.escape(said + name)):
        t.read_settings(env, ALONE)


@pytest.mark.parametrize("name", t.MODEL_SETTINGS)
def test_a_setting_that_repeats_the_artifact_is_accepted(artifact, name):
    env = {"EVAL_ONLY": str(artifact), name: str(TINY.get(name, tiny().of_model()[name]))}
    assert t.read_settings(env, ALONE).of_model() == tiny().of_model()


@pytest.mark.parametrize("spelt", ["2,3", " 2, 3", "2,3,"])
def test_another_spelling_of_the_same_value_is_no_contradiction(artifact, spelt):
    env = {"EVAL_ONLY": str(artifact), "VE_LAYERS": spelt, "MLP_MULT": "2", "LN_SCALE": "true"}
    assert t.read_settings(env, ALONE).ve_layers == (2, 3)


def test_no_default_of_training_stands_in_the_way(tmp_path):
    """786,432 tokens per step are no multiple of 100."""
    path, _ = packed(tmp_path / "a.ptz", TRAIN_SEQ_LEN=100, TRAIN_BATCH_TOKENS=100)
    assert t.read_settings({"EVAL_ONLY": str(path)}, ALONE).train_seq_len == 100
    assert t.load(path)[1].train_seq_len == 100


def test_without_eval_only_no_file_is_read():
    assert t.read_settings({"EVAL_ONLY": "", "NUM_LAYERS": "3", "VE_LAYERS": "1"}, ALONE) == (
        t.Hyperparameters.from_env({"NUM_LAYERS": "3", "VE_LAYERS": "1"})
    )


class Told(FakeRanks):
    """A rank other than 0, which gets the settings that rank 0 has read."""

    def __init__(self, text: str):
        super().__init__(1, 2)
        self.text = text

    def from_rank0(self, x):
        return self.text if isinstance(x, str) else super().from_rank0(x)


def test_only_rank_0_reads_the_file(artifact):
    stored = json.dumps(t.settings_of(artifact.read_bytes()))
    hp = t.read_settings({"EVAL_ONLY": "only/on/rank/0.ptz"}, Told(stored))
    assert hp.of_model() == tiny().of_model()


@pytest.mark.slow
def test_the_digits_of_a_run_are_repeated_with_no_setting_of_its_model(alone, corpus, tmp_path):
    """On two ranks, from the settings in the file alone."""
    cwd, _ = alone
    kept = ("EVAL_SEQ_LEN", "EVAL_STRIDE", "VAL_BATCH_SIZE", "RUN_ID")  # how to score it
    env = {name: str(TINY[name]) for name in kept} | corpus
    env |= {"EVAL_ONLY": str(cwd / "logs/test.int6.ptz")}
    script = str(ROOT / "train_gpt.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = finish(start_python(tmp_path, torchrun, env))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("final_int6_sliding_window_exact", "final_ngram_exact"):
        found, expected = (values(log_of(folder), name)["val_bpb"] for folder in (tmp_path, cwd))
        assert float(found) == pytest.approx(float(expected), abs=1e-6)


# ---- the file of a run


def test_the_log_and_its_last_line_have_the_sha256_of_the_artifact(alone):
    cwd, _ = alone
    checksum = hashlib.sha256((cwd / "logs/test.int6.ptz").read_bytes()).hexdigest()
    log = log_of(cwd)
    assert f"\nartifact:logs/test.int6.ptz sha256:{checksum}\n" in log
    result = json.loads(log.splitlines()[-1].removeprefix("result "))
    assert result["artifact_sha256"] == checksum


def test_the_name_that_other_tools_expect_is_a_link(alone):
    cwd, _ = alone
    link = cwd / "final_model.int6.ptz"
    assert link.is_symlink()
    # of the last run in that folder, which may be another test's
    assert re.fullmatch(r"logs/test(_\d+)?\.int6\.ptz", str(link.readlink()))
    assert link.read_bytes() == (cwd / "logs/test.int6.ptz").read_bytes()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, with the artifacts of two runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    for name in ("one", "two"):
        (tmp_path / f"logs/{name}.int6.ptz").write_bytes(name.encode())
    return tmp_path


def test_the_link_leads_to_the_last_run_and_the_first_keeps_its_artifact(here):
    for name in ("one", "two"):
        t.link_artifact(Path(f"logs/{name}.int6.ptz"), tiny(), SILENT)
        assert Path("final_model.int6.ptz").read_bytes() == name.encode()
    assert Path("logs/one.int6.ptz").read_bytes() == b"one"
    assert not list(here.rglob("*.tmp"))


def test_where_links_are_impossible_there_is_a_copy(here, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    t.link_artifact(Path("logs/one.int6.ptz"), tiny(), SILENT)
    assert not Path("final_model.int6.ptz").is_symlink()
    assert Path("final_model.int6.ptz").read_bytes() == b"one"
    assert not list(here.rglob("*.tmp"))


def test_a_name_that_is_taken_by_a_folder_is_a_warning(here):
    log = KeptLog()
    Path("final_model.int6.ptz").mkdir()
    t.link_artifact(Path("logs/one.int6.ptz"), tiny(), log)
    assert len(log.starting("warning: final_model.int6.ptz is not the artifact of this run")) == 1
    assert not list(here.rglob("*.tmp"))


@pytest.mark.parametrize("other", [dict(SEED=1), dict(XSA_LAST_N=1)])
def test_a_file_that_something_else_has_replaced_is_not_scored(tmp_path, other):
    """Two runs of the same RUN_ID in two folders on one disk, or a person's cp."""
    path, model = packed(tmp_path / "a.ptz")
    written = hashlib.sha256(path.read_bytes()).hexdigest()
    packed(path, **other)
    with pytest.raises(t.UserError, match=f"^{path}: SHA-256 is .* this run wrote {written}"):
        t.read_artifact(path, written, model, ALONE, SILENT)


def test_a_file_that_is_replaced_after_its_settings_were_read_is_not_scored(tmp_path):
    path, model = packed(tmp_path / "a.ptz")
    packed(path, XSA_LAST_N=1)
    with pytest.raises(t.UserError, match=f"^{path}: was replaced"):
        t.read_artifact(path, "", model, ALONE, SILENT)


def test_the_label_names_the_coder(tmp_path):
    log = KeptLog()
    path, model = packed(tmp_path / "a.ptz", CODER="lzma", QUANT_BITS=5)
    size = t.read_artifact(path, "", model, ALONE, log).size
    assert log.lines[-1] == f"Total submission size int5+lzma: {size} bytes"


# ---- the source is read once


EDITED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import submission as t
plain = t.train
def train(*args):
    trained = plain(*args)
    Path(t.__file__).unlink()
    return trained
t.train = train
t.start(dict(os.environ), [])
"""


def test_a_script_that_is_renamed_during_the_run_does_not_end_it(corpus, tmp_path):
    """The log has the source that runs, and its size."""
    source = (ROOT / "train_gpt.py").read_bytes()
    (tmp_path / "submission.py").write_bytes(source)
    runner = tmp_path / "runner.py"
    runner.write_text(EDITED.format(folder=str(tmp_path)))
    done = run_script(tmp_path, 0, runner, **corpus, ITERATIONS=1, NGRAM_ENABLED=0, EVAL_STRIDE=32)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "logs/test.txt").read_bytes()
    assert log.startswith(source + b"\n" + b"=" * 100 + b"\n")
    assert f"\nCode size: {len(source)} bytes\n".encode() in log
    assert json.loads(log.splitlines()[-1].removeprefix(b"result "))["code_bytes"] == len(source)
