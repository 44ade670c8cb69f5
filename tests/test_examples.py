"""The examples run on a small model: what they print, and which files they write."""

import re

import numpy as np
import pytest
import torch
from helpers import ROOT, finish, start_python, tiny
from test_load import packed

import train_gpt as t
from examples import last_artifact


@pytest.fixture
def artifact(tmp_path, corpus):
    path, _ = packed(tmp_path / "a.ptz", VOCAB_SIZE=512)
    return path


@pytest.fixture
def example(corpus):
    """Runs an example. Returns what it printed; or, with fails=True, its error."""

    def run(name: str, *arguments, fails=False) -> str:
        env = {"TOKENIZER_PATH": corpus["TOKENIZER_PATH"], "EVAL_SEQ_LEN": "64"}
        done = finish(start_python(ROOT, ["-m", f"examples.{name}", *map(str, arguments)], env))
        assert bool(done.returncode) == fails, done.stderr
        return done.stderr if fails else done.stdout

    return run


def test_a_sample_is_a_function_of_the_seed(example, artifact):
    one, same, other = (
        example("sample", artifact, "--tokens", 20, "--seed", seed) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_the_last_artifact_is_never_a_link_to_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone.ptz").touch()
    (tmp_path / "final_model.int6.ptz").symlink_to("gone.ptz")
    assert last_artifact() == "final_model.int6.ptz"
    (tmp_path / "final_model.int5.ptz").touch()
    (tmp_path / "gone.ptz").unlink()
    assert last_artifact() == "final_model.int5.ptz"


@pytest.mark.slow
def test_a_sample_begins_with_the_prompt(example, artifact):
    assert example("sample", artifact, "--prompt", "the object", "--tokens", 3).startswith(
        "the object"
    )


@pytest.mark.slow
def test_a_sample_from_the_cache_alone_repeats_the_text(example, artifact):
    text = example("sample", artifact, "--prompt", "one two", "--tokens", 30, "--cache", 1)
    assert set(text) <= set("one two\n")


def test_a_text_costs_what_the_model_says(example, artifact, corpus, tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("A statement is executed. " * 6)
    said = example("score_text", path, artifact, "--tokens")
    model, hp = t.load(artifact)
    counter = t.ByteCounter(tiny(**corpus, VOCAB_SIZE=512))
    ids = [t.BOS, *counter.pieces.encode(path.read_text())]
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids[:-1]]), t.block_passes(hp)[1])[0]
        nll = model.nll(hidden, torch.tensor(ids[1:])).numpy()
    bits = nll.sum() / np.log(2) / len(path.read_text().rstrip())
    found = re.search(r"bits per byte: (\S+) model alone, (\S+) mixed", said)
    assert abs(float(found[1]) - bits) < 1e-3
    assert float(found[2]) < float(found[1])  # the text repeats itself
    rows = [line.split("\t") for line in said.splitlines()[2:]]
    assert [row[0] for row in rows] == [counter.pieces.id_to_piece(i) for i in ids[1:]]
    np.testing.assert_allclose([float(row[1]) for row in rows], nll / np.log(2), atol=0.006)


@pytest.mark.slow
def test_a_text_gets_a_page(example, artifact, tmp_path):
    path, page = tmp_path / "my.txt", tmp_path / "page.html"
    path.write_text("A statement is executed. " * 6)
    said = example("score_text", path, artifact, "--page", page)
    assert said.splitlines()[-1] == page.as_uri()
    assert "statement is executed" in re.sub("<[^>]*>", "", page.read_text())


def test_exported_weights_are_the_models_and_come_back(example, artifact, tmp_path):
    from safetensors.torch import load_file

    weights, again = tmp_path / "w.safetensors", tmp_path / "b.ptz"
    example("export", weights, artifact)
    model, hp = t.load(artifact)
    exported = load_file(weights)
    state = model.state_dict()
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)

    example("export", "--back", weights, again)
    back, same = t.load(again)
    assert same.of_model() == hp.of_model()
    for name, tensor in back.state_dict().items():
        # codes of 6 bits or more: an error of at most 1/62 of the row's largest weight
        assert (tensor - state[name]).abs().max() <= state[name].abs().max() / 60


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["sample", "no.ptz"], "no.ptz"),
        (["score_text", "no.txt", "{artifact}"], "no.txt"),
        (["export", "w.safetensors", "no.ptz"], "no.ptz"),
    ],
)
def test_an_error_is_one_line(example, artifact, arguments, said):
    name, *others = arguments
    error = example(name, *(text.format(artifact=artifact) for text in others), fails=True)
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_examples_are_short():
    for path in ROOT.glob("examples/[a-z]*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
