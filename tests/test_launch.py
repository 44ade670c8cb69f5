"""The launch scripts from anywhere, and what `make clean` leaves. Other tests of these scripts:
what the systems do (test_systems), how a run's signals reach its study (test_predecessors)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import RECORDER, ROOT

SYSTEMS = ["demo", "backoff", "order_adaptive", "prefill", "frontier", "sp8192"]


@pytest.fixture
def repository(tmp_path) -> Path:
    """The launch scripts in a folder whose name has a space."""
    folder = tmp_path / "the repository"
    shutil.copytree(ROOT / "runs", folder / "runs")
    return folder


@pytest.fixture
def here(tmp_path) -> Path:
    """Where the user stands, with a stand-in for Python."""
    folder = tmp_path / "else where"
    folder.mkdir()
    (folder / "python").write_text(RECORDER)
    (folder / "python").chmod(0o755)
    return folder


def launch(script: Path, here: Path, **env) -> tuple[list[str], dict[str, str]]:
    """What `script`, started from `here`, starts there: Python's arguments and its environment."""
    env = {"PATH": os.environ["PATH"], "PYTHON": "./python", "NPROC": "0", **env}
    done = subprocess.run(["bash", script], cwd=here, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    arguments = (here / "arguments").read_text().split("\0")[:-1]
    pairs = (here / "environment").read_text().split("\0")[:-1]
    return arguments, dict(pair.split("=", 1) for pair in pairs)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_takes_place_where_the_user_stands(system, repository, here):
    arguments, env = launch(repository / f"runs/{system}.sh", here)
    assert env["PWD"] == str(here)
    assert arguments == [str(repository / "train_gpt.py")]
    assert not (repository / "environment").exists()


@pytest.mark.parametrize("system", ["demo", "backoff"])
def test_a_relative_path_begins_where_the_user_stands(system, repository, here):
    names = ("DATA_PATH", "TOKENIZER_PATH", "TRAIN_DATA_PATH", "RESUME")
    _, env = launch(repository / f"runs/{system}.sh", here, **dict.fromkeys(names, "my data/x"))
    assert {env[name] for name in names} == {"my data/x"}  # and the run takes place there


@pytest.mark.parametrize(
    "system, data, tokenizer",
    [
        ("demo", "demo_sp1024", "demo_1024_bpe"),
        ("prefill", "fineweb10B_sp1024", "fineweb_1024_bpe"),
        ("sp8192", "fineweb10B_sp8192", "fineweb_8192_bpe"),
    ],
)
def test_the_default_data_lie_in_the_repository(system, data, tokenizer, repository, here):
    _, env = launch(repository / f"runs/{system}.sh", here)
    assert env["DATA_PATH"] == str(repository / f"data/datasets/{data}")
    assert env["TOKENIZER_PATH"] == str(repository / f"data/tokenizers/{tokenizer}.model")


def test_paths_are_short_for_who_stands_in_the_repository(repository, here):
    shutil.copy(here / "python", repository)
    arguments, env = launch(Path("runs/demo.sh"), repository)
    assert arguments == ["./train_gpt.py"]
    assert env["DATA_PATH"] == "./data/datasets/demo_sp1024"


@pytest.mark.parametrize("system", ["demo", "backoff"])
def test_a_symbolic_link_to_a_script_starts_it(system, repository, here):
    (here / "links to").mkdir()
    first, second = here / "links to/first", here / "second"
    first.symlink_to(repository / f"runs/{system}.sh")
    second.symlink_to("links to/first")  # relative, to a link
    arguments, _ = launch(second, here)
    assert arguments == [str(repository / "train_gpt.py")]


def test_a_script_is_not_misled_by_cdpath(repository, here):
    arguments, _ = launch(Path("../the repository/runs/demo.sh"), here, CDPATH="..:.")
    assert arguments == [str(repository / "train_gpt.py")]


def test_the_study_after_a_run_finds_its_package(repository, here):
    launch(repository / "runs/backoff.sh", here, PYTHONPATH="mine")
    found = (here / "study").read_text().split("\0")
    assert found[:2] == ["-m", "studies.predecessors"]
    assert (here / "study_path").read_text() == f"{repository}:mine\n"


# ---- empty values


@pytest.mark.parametrize(
    "system, name, default",
    [
        ("frontier", "RECUR_LAYERS", "4,5"),
        ("sp8192", "RECUR_LAYERS", "3,4,5"),
        ("demo", "VE_LAYERS", "3,4"),
    ],
)
def test_an_empty_list_of_layers_stays_empty(system, name, default, repository, here):
    assert launch(repository / f"runs/{system}.sh", here)[1][name] == default
    assert launch(repository / f"runs/{system}.sh", here, **{name: ""})[1][name] == ""


@pytest.mark.parametrize(
    "averaging, own", [("none", ""), ("ema", "e"), ("swa", "s"), ("ema_swa", "es")]
)
def test_the_demo_shortens_the_averages_that_are_named(averaging, own, repository, here):
    _, env = launch(repository / "runs/demo.sh", here, AVERAGING=averaging)
    assert ("EMA_DECAY" in env, "SWA_EVERY" in env) == ("e" in own, "s" in own)


# ---- make clean


def test_make_clean_removes_what_make_made_and_nothing_else(tmp_path):
    kept = [
        *("data/datasets/fineweb10B_sp1024/fineweb_val_000000.bin", "data/datasets/mine.txt"),
        "data/datasets/demo_sp1024/fineweb_val_bytes_000000.bin",
        *("data/datasets/demo_sp1024/notes.txt", "data/tokenizers/fineweb_1024_bpe.model"),
        *("final_model.int6.ptz", "logs/seed42.txt", "logs/seed42.ckpt", "logs/seed42.int6.ptz"),
        *("data/prepare_demo.py", "data/gpu/runs.tar"),
    ]
    made = [
        *(".venv/ready", ".venv-field/ready", "data/tokenizers/demo_1024_bpe.model"),
        *(f"data/datasets/demo_sp1024/fineweb_{part}_000000.bin" for part in ("train", "val")),
        "data/datasets/demo_sp1024/corpus.json",
    ]
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in kept + made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    for _ in range(2):  # the second finds nothing to remove
        subprocess.run(["make", "clean"], cwd=tmp_path, env=env, check=True, capture_output=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*kept, "Makefile"}
    assert not (tmp_path / ".venv").exists()
