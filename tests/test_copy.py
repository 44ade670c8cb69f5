"""The folder for records/ arrives in the challenge's repository whole, and other people's tools
find in it what they look for. The logs are those of this folder's own runs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from edit_logs import reported, without_probes
from helpers import ROOT

import record.git
from record import checks, figures
from record.__main__ import main
from record.folder import Folder
from record.log import parse_log

SEEDS = 42, 1337, 2025
HOME = "https://example.org/project"
IGNORES = "data/tokenizers\n__pycache__/\n.DS_Store\n.venv\nlogs/\n*.ptz\n"  # as the challenge's
NAME = "Exact_counts"


@pytest.fixture(scope="module")
def texts():
    return reported()


@pytest.fixture
def folder(texts, tmp_path, monkeypatch):
    """A submission that is ready, and the checks that do not read its script at length."""
    monkeypatch.setattr(checks, "CHECKS", without_probes("compiles", "safe_reading"))
    path = tmp_path / "submission"
    (path / "logs").mkdir(parents=True)
    for name, text in texts.items():
        (path / name).write_text(text)
    shutil.copytree(ROOT / "figures", path / "figures")
    shown = figures.pictures(path, figures.README)
    page = path / "README.md"
    page.write_text(f"{page.read_text()}\n<!-- figures:begin -->\n{shown}\n<!-- figures:end -->\n")
    return path


@pytest.fixture
def challenge(tmp_path):
    """A repository with the rules of the challenge's."""
    path = tmp_path / "challenge"
    path.mkdir()
    git(path, "init", "-q")
    (path / ".gitignore").write_text(IGNORES)
    commit(path)
    return path


def git(path: Path, *command: str) -> str:
    me = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(["git", *me, *command], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(path: Path) -> None:
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "x")


def copied(folder, dest, *more: str) -> Path:
    """What `record copy` made, which it must."""
    command = ["copy", str(dest), "--folder", str(folder), "--home", HOME, "--name", NAME, *more]
    assert main(command) == 0
    return next((dest / "records").glob("*/*"))


def refused(folder, dest, capsys, *more: str) -> str:
    """Why `record copy` made nothing."""
    capsys.readouterr()
    assert main(["copy", str(dest), "--folder", str(folder), *more]) == 1
    assert not (dest / "records").exists()
    return capsys.readouterr().err


def names_in(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file())


def append(page: Path, text: str) -> None:
    page.write_text(f"{page.read_text()}\n{text}\n")


# --- it arrives ---


def test_the_copy_is_ready_in_a_fresh_clone(folder, challenge, tmp_path):
    made = copied(folder, challenge)
    commit(challenge)
    git(tmp_path, "clone", "-q", str(challenge), "clone")
    clone = tmp_path / "clone" / made.relative_to(challenge)
    assert names_in(clone) == names_in(made)
    findings = checks.check(clone)
    assert [finding.name for finding in findings if not finding.passed] == []


def test_logs_lie_at_the_root_and_figures_beside_them(folder, challenge):
    names = names_in(copied(folder, challenge))
    assert [name for name in names if "/" not in name] == [
        *("README.md", "requirements.txt", "submission.json", "train_gpt.py"),
        *(f"train_seed{seed}.log" for seed in sorted(SEEDS, key=str)),
    ]
    assert {name.split("/")[0] for name in names if "/" in name} == {"figures"}


def test_copy_says_how_git_takes_it(folder, challenge, capsys):
    made = copied(folder, challenge)
    there = made.relative_to(challenge)
    assert f"next: git -C {challenge} add {there}\n" in capsys.readouterr().out


def test_what_git_would_leave_out_is_refused_with_the_rule(folder, challenge, capsys):
    (folder / "model.ptz").write_bytes(b"weights")
    append(folder / "README.md", "[weights](model.ptz)")
    error = refused(folder, challenge, capsys, "--home", HOME)
    assert "not made, git would leave out model.ptz (.gitignore:6: *.ptz)" in error
    assert "rename it or remove README's link to it; or --force, and then `git" in error


def test_with_force_copy_says_how_git_takes_what_is_ignored(folder, challenge, capsys):
    (folder / "model.ptz").write_bytes(b"weights")
    append(folder / "README.md", "[weights](model.ptz)")
    made = copied(folder, challenge, "--force")
    assert f"add -f {made.relative_to(challenge)}" in capsys.readouterr().out


def test_a_rule_that_is_taken_back_ignores_nothing(folder, challenge, capsys):
    (challenge / ".gitignore").write_text(f"{IGNORES}*.log\n!train_seed*.log\n")
    copied(folder, challenge)
    assert "add records" in capsys.readouterr().out


def test_a_folder_that_is_no_repository_gets_the_copy_and_is_told(folder, tmp_path, capsys):
    (tmp_path / "dest").mkdir()
    copied(folder, tmp_path / "dest")
    assert "dest is in no git repository" in capsys.readouterr().out


def test_without_git_the_copy_is_made_and_says_so(folder, challenge, capsys, monkeypatch):
    def no_git(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(record.git.subprocess, "run", no_git)
    copied(folder, challenge)
    assert "git is not installed: look with `git status` whether" in capsys.readouterr().out


def test_the_variables_of_a_hook_do_not_lead_to_another_repository(
    folder, challenge, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    copied(folder, challenge)
    assert "next: git" in capsys.readouterr().out


def test_files_that_would_have_one_name_are_refused(folder, challenge, capsys):
    for name in ("logs/a.txt", "evidence/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
        append(folder / "README.md", f"[x]({name})")
    error = refused(folder, challenge, capsys, "--home", HOME)
    assert "would both be evidence/a.txt in the copy; rename one of them" in error


# --- its README ---


def test_without_a_home_nothing_is_copied(folder, challenge, capsys):
    assert "has no 'home'" in refused(folder, challenge, capsys)


def test_the_home_and_the_date_of_the_flags_are_those_of_the_copy(folder, challenge):
    made = copied(folder, challenge, "--date", "2026-12-24")
    found = json.loads((made / "submission.json").read_text())
    assert (found["home"], found["date"], made.name) == (HOME, "2026-12-24", f"2026-12-24_{NAME}")


def test_the_readme_begins_with_the_score_and_the_bytes(folder, challenge):
    made = copied(folder, challenge)
    found = json.loads((made / "submission.json").read_text())
    lines = (made / "README.md").read_text().splitlines()[:8]
    assert any(line.startswith(f"val_bpb: {found['val_bpb']:.8f} (mean of 3") for line in lines)
    assert any(
        line.startswith(f"bytes_total: {found['bytes_total']} of 16000000") for line in lines
    )


def test_the_readme_repeats_what_is_marked_for_it_and_nothing_else(folder, challenge):
    marked = "<!-- record:begin -->\n## Idea\n\nSee logs/seed42.txt.\n<!-- record:end -->"
    append(folder / "README.md", f"{marked}\n\n`make demo` is the project's alone.")
    page = (copied(folder, challenge) / "README.md").read_text()
    assert "## Idea\n\nSee train_seed42.log." in page and "make demo" not in page


def test_a_mark_without_its_end_is_refused(folder, challenge, capsys):
    append(folder / "README.md", "<!-- record:begin -->\n## Idea")
    error = refused(folder, challenge, capsys, "--home", HOME)
    assert "found 1 x <!-- record:begin --> and 0 x <!-- record:end -->, expected pairs" in error


@pytest.mark.parametrize(
    "asked",
    [
        "`make check`",
        "```\n.venv/bin/python x.py\n```",
        "`tests/test_ngram.py`",
        "`-m record view`",
    ],
)
def test_a_readme_that_asks_for_what_is_not_there_is_refused(folder, challenge, capsys, asked):
    append(folder / "README.md", f"<!-- record:begin -->\n{asked}\n<!-- record:end -->")
    error = refused(folder, challenge, capsys, "--home", HOME)
    assert re.search("files: README.md asks for '.*', which this folder lacks", error)


def test_this_folder_s_readme_asks_only_for_what_is_there():
    assert [x for x in checks.asked_for((ROOT / "README.md").read_text()) if x.startswith("tests/")]
    folder = Folder(ROOT)
    asked = checks.asked_for((ROOT / "README.md").read_text())
    assert [name for name in asked if not checks.is_there(folder, name)] == []


def test_the_commands_set_all_that_the_runs_changed(folder, challenge):
    page = (copied(folder, challenge) / "README.md").read_text()
    log = parse_log(ROOT / "logs/seed42.txt")
    changed = re.findall(r" ([A-Z_0-9]+)=", log.find("changed:").text)
    elsewhere = {"DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "SEED", "SAVE_SCORES"}
    assert [
        name for name in set(changed) - elsewhere if f"{name}={log.settings[name]}" not in page
    ] == []


def test_a_longer_run_is_declared_as_unlimited_compute(folder, challenge):
    for seed in SEEDS:
        path = folder / f"logs/seed{seed}.txt"
        text = path.read_text()
        warning = "warning: evaluation took 700.0 s, more than EVAL_BUDGET_SECONDS"
        for pattern, new in (
            (r"^total_eval_time:\S+ (.*)", rf"total_eval_time:700.0s \1\n{warning}"),
            (r"evaluation [\d.]+ s$", "evaluation 700.0 s"),
            (r'("eval_seconds": )[\d.]+', r"\g<1>700.0"),
        ):
            text = re.sub(pattern, new, text, flags=re.M)
        path.write_text(text)
    assert main(["report", "--folder", str(folder)]) == 0
    page = (copied(folder, challenge) / "README.md").read_text()
    assert "Unlimited compute" in page and "evaluation 700 s" in page


# --- what other people's tools look for (rules of validators in the field, in our words) ---


def test_a_validator_of_folders_finds_its_files(folder, challenge):
    """One asks of each folder: README.md, submission.json, train_gpt.py, and a log at the root."""
    made = copied(folder, challenge)
    assert all((made / name).is_file() for name in ("README.md", "submission.json", "train_gpt.py"))
    assert len(list(made.glob("train*.log"))) == 3
    found = json.loads((made / "submission.json").read_text())
    assert all(found[key] for key in ("author", "github_id", "name", "blurb", "date"))
    assert isinstance(found["val_bpb"], float) and isinstance(found["bytes_total"], int)


def test_a_validator_of_logs_finds_seed_sizes_and_score(folder, challenge):
    """Another searches the whole text of each log, source included: the first `Code size:`, `seed`
    and total that have a number, and the last exact score, or the last score of all."""
    made = copied(folder, challenge)
    found = json.loads((made / "submission.json").read_text())
    for seed, result in found["seed_results"].items():
        text = (made / f"train_seed{seed}.log").read_text()
        first = [
            re.search(pattern, text)[1]
            for pattern in (
                r"\bseed:\s*(\d+)",
                r"Code size: (\d+) bytes",
                r"Total submission size.*?: (\d+) bytes",
            )
        ]
        assert first == [seed, str(found["bytes_code"]), str(result["artifact_bytes"])]
        last = re.findall(r"final_\w+_exact val_loss:([\d.]+) val_bpb:([\d.]+)", text)[-1]
        assert last == (f"{result['val_loss']:.8f}", f"{result['val_bpb']:.8f}")
        assert re.findall(r"val_bpb:([\d.]+)", text)[-1] == last[1]
