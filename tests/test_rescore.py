"""An artifact that is scored again must be the log's, with its data and settings, and give its
digits. Here nothing is scored: the second log is the first, changed."""

import hashlib
import re
from pathlib import Path

import pytest
from edit_logs import parts_of, reported

from record import checks, rescore
from record.__main__ import main
from record.folder import Folder
from record.log import RecordError, parse_log

ARTIFACT = b"weights"


@pytest.fixture
def folder(tmp_path):
    """A submission with its data and the artifact of its first log, where the log says they are."""
    (tmp_path / "logs").mkdir()
    for name, text in reported().items():
        (tmp_path / name).write_text(text)
    path, tokenizer = tmp_path / "logs/seed42.txt", b"pieces"
    edit(path, r"^(artifact:\S+ sha256:)\w+", rf"\g<1>{hashlib.sha256(ARTIFACT).hexdigest()}")
    edit(path, r"^(Serialized model \S+) \d+", rf"\g<1> {len(ARTIFACT)}")
    edit(path, r"^(data:tokenizer sha256:)\w+", rf"\g<1>{hashlib.sha256(tokenizer).hexdigest()}")
    log = parse_log(path)
    (tmp_path / log.setting("DATA_PATH")).mkdir(parents=True)
    (tmp_path / log.setting("TOKENIZER_PATH")).parent.mkdir(parents=True)
    (tmp_path / log.setting("TOKENIZER_PATH")).write_bytes(tokenizer)
    (tmp_path / "logs/seed42.int6.ptz").write_bytes(ARTIFACT)
    return tmp_path


def edit(path: Path, pattern: str, new: str) -> None:
    source, rest = parts_of(path)
    rest, changed = re.subn(pattern, new, rest, count=1, flags=re.M)
    assert changed, pattern
    path.write_text(source + rest)


def again(folder, pattern: str, new: str) -> list[rescore.Compared]:
    """The comparison with a second log in which `pattern` is `new`."""
    log, path = parse_log(folder / "logs/seed42.txt"), folder / "logs/again.txt"
    path.write_text(log.path.read_text())
    edit(path, pattern, new)
    return rescore.compared(log, parse_log(path))


def test_the_same_scores_hold(folder):
    rows = again(folder, "^seed:42", "seed:42")
    assert [row.line for row in rows if row.holds] == [
        "final_int6_roundtrip_exact",
        "final_int6_sliding_window_exact",
        "final_ngram_exact",
        "ngram_order targets",
    ]


@pytest.mark.parametrize("digit, holds", [(4, False), (5, False), (6, True), (8, True)])
def test_a_score_may_differ_by_what_processors_do(folder, digit, holds):
    bpb = parse_log(folder / "logs/seed42.txt").find("final_ngram_exact").number("val_bpb")
    new = rf"\g<1>{bpb + 2 * 10.0**-digit:.8f}"
    rows = again(folder, r"^(final_ngram_exact .*val_bpb:)\S+", new)
    assert [row.line for row in rows if not row.holds] == ["final_ngram_exact"] * (not holds)


def test_counts_may_not_differ(folder):
    rows = again(folder, r"^(ngram_order order:3 targets:)\d+", r"\g<1>7")
    assert [row.line for row in rows if not row.holds] == ["ngram_order targets"]


def test_what_differs_is_printed_and_fails(folder, capsys, monkeypatch):
    rows = again(folder, r"^(final_ngram_exact .*val_bpb:)\S+", r"\g<1>1.50000000")
    monkeypatch.setattr(rescore, "rescore", lambda path: [(path / "a.ptz", rows)])
    assert main(["rescore", str(folder)]) == 1
    assert re.search(r"in the log, 1.50000000 here: expected the same", capsys.readouterr().out)


def test_the_settings_of_the_run_are_repeated_but_not_its_name(folder, monkeypatch):
    monkeypatch.setenv("SEED", "7")  # of whoever calls
    log = parse_log(folder / "logs/seed42.txt")
    env = rescore.environment(folder / "logs/seed42.int6.ptz", log, folder)
    assert (env["SEED"], env["EVAL_SEQ_LEN"], env["RUN_ID"]) == ("42", "256", "rescored")
    assert "SAVE_SCORES" not in env and Path(env["DATA_PATH"]).is_dir()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "logs/seed42.int6.ptz").unlink(), "found none of the artifacts"),
        (
            lambda f: (f / "logs/seed42.int6.ptz").write_bytes(b"others"),
            "its SHA-256 is .*, expected .*seed42.txt:[0-9]+: the artifact of another run",
        ),
        (
            lambda f: edit(f / "logs/seed42.txt", r"^(Serialized model \S+) \d+", r"\g<1> 9"),
            "it has 7 bytes, but .*seed42.txt:[0-9]+ says 9",
        ),
        (
            lambda f: (f / "train_gpt.py").write_text("import torch"),
            "seed42.txt:1: its source differs from",
        ),
        (
            lambda f: next(f.glob("data/tokenizers/*")).write_bytes(b"others"),
            "is another here; expected the data of the log",
        ),
        (
            lambda f: next(f.glob("data/tokenizers/*")).unlink(),
            "is not here; `python data/prepare_demo.py` makes it",
        ),
    ],
    ids=[
        "no artifact",
        "another artifact",
        "another size",
        "another script",
        "another tokenizer",
        "no tokenizer",
    ],
)
def test_what_cannot_be_compared_is_refused(folder, spoil, said):
    spoil(folder)
    with pytest.raises(RecordError, match=said):
        rescore.rescore(folder)


def test_a_script_that_is_not_this_project_s_is_not_run(folder, tmp_path, monkeypatch):
    """Though its log begins with it."""
    (tmp_path / "ours.py").write_text("# another")
    monkeypatch.setattr(rescore, "PROJECT", tmp_path / "ours.py")
    with pytest.raises(RecordError, match="is not this project's script .*, and is not run"):
        rescore.rescore(folder)


def test_check_knows_an_artifact_that_is_not_the_log_s(folder):
    assert "the artifact that 1 of them scored" in checks.check_files(Folder(folder))
    (folder / "logs/seed42.int6.ptz").write_bytes(b"others")
    with pytest.raises(RecordError, match="seed42.int6.ptz: its SHA-256 is"):
        checks.check_files(Folder(folder))


def test_check_looks_for_no_artifact_outside_the_folder(folder, tmp_path):
    (tmp_path.parent / "outside.ptz").write_bytes(b"others")
    edit(folder / "logs/seed42.txt", r"^artifact:\S+", "artifact:../outside.ptz")
    assert "scored" not in checks.check_files(Folder(folder))
