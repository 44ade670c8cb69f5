"""The built-in corpus: which documents it has, and when it is made anew."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from data import prepare_demo

# ---- which documents


def library(folder: Path, modules: str) -> Path:
    """A standard library of these files, each with a docstring."""
    for name in modules.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Some words on {name}."""\n')
    return folder


@pytest.fixture
def small(monkeypatch):
    """A library of two modules is enough."""
    monkeypatch.setattr(prepare_demo, "MODULES", "json typing")
    monkeypatch.setattr(prepare_demo, "LEAST_BYTES", 1)


FOUND = "json/__init__.py json/tool.py typing.py"


def test_the_demo_takes_the_same_documents_whatever_a_distribution_adds(small, tmp_path):
    extra = (
        "idlelib/help.py tkinter/__init__.py test/test_json.py ensurepip/__init__.py abc.py "
        "json/tests/test_a.py json/test/b.py site-packages/typing.py sitecustomize.py"
    )
    plain = prepare_demo.documents(library(tmp_path / "plain", FOUND))
    full = prepare_demo.documents(library(tmp_path / "full", f"{FOUND} {extra}"))
    assert list(plain.items()) == list(full.items())
    assert {name for name in plain if not name.startswith("topics/")} == set(FOUND.split())


def test_a_module_that_is_missing_is_named(small, tmp_path, capsys):
    prepare_demo.documents(library(tmp_path, "json.py"))
    said = capsys.readouterr().err
    assert said.startswith("warning: this Python has no typing: its demo corpus is not that of")


def test_a_python_without_documentation_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has only .* bytes of documentation, the demo needs"):
        prepare_demo.documents(tmp_path)


def test_this_python_has_all_modules_of_the_demo():
    files = prepare_demo.module_files(Path(sysconfig.get_paths()["stdlib"]))
    assert [module for module in files if not files[module]] == []


# ---- when it is made


@pytest.fixture
def make(tmp_path, monkeypatch, capsys) -> Callable[[], str]:
    """A function that runs prepare_demo on 99 short documents, into tmp_path, and returns what it
    printed."""
    texts = {f"m{i}.py": f"Words of document {i}: alpha beta gamma {i * 7919}." for i in range(99)}
    monkeypatch.setattr(prepare_demo, "documents", lambda: texts)
    monkeypatch.setattr(prepare_demo, "VOCAB_SIZE", 300)

    def make() -> str:
        prepare_demo.main(tmp_path)
        return capsys.readouterr().out

    return make


MARKER, *SHARDS = (
    f"datasets/demo_sp1024/{name}"
    for name in ("corpus.json", "fineweb_train_000000.bin", "fineweb_val_000000.bin")
)
TOKENIZER = "tokenizers/demo_1024_bpe.model"
CORPUS = [MARKER, *SHARDS, TOKENIZER]


def remove(path: Path) -> None:
    path.unlink()


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, harm", [(name, remove) for name in CORPUS] + [(name, change) for name in CORPUS[1:]]
)
def test_a_corpus_that_is_not_whole_is_made_anew(name, harm, make, tmp_path):
    make()
    whole = {name: (tmp_path / name).read_bytes() for name in CORPUS}
    harm(tmp_path / name)
    assert "demo corpus: making it, as " in make()
    assert {name: (tmp_path / name).read_bytes() for name in CORPUS} == whole
    assert "already there" in make()


@pytest.mark.parametrize("change", [{"python": "3.9.1"}, {"sentencepiece": "0.1"}, {"rule": 1}])
def test_a_corpus_of_another_version_is_made_anew(change, make, tmp_path):
    make()
    marker = tmp_path / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | change))
    assert "it was made with " in make()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"7", b"\xff", b"{}"])
def test_a_damaged_marker_is_no_marker(content, make, tmp_path):
    make()
    (tmp_path / MARKER).write_bytes(content)
    assert "demo corpus: making it, as " in make()


def test_a_corpus_half_made_has_no_marker(make, tmp_path, monkeypatch):
    """That of the corpus before is gone, too: new shards would stand under its name."""
    make()
    remove(tmp_path / TOKENIZER)

    def fail(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(prepare_demo, "write_whole", fail)
    with pytest.raises(OSError, match="no space left"):
        make()
    assert not (tmp_path / MARKER).exists()


def test_a_file_that_cannot_be_written_leaves_no_other_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        prepare_demo.write_whole(tmp_path / "taken", b"content")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
