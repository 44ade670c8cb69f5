"""The record tools: logs in; tables, JSON, verdicts and the folder for records/ out. Three tiny
runs serve all tests."""

import ast
import contextlib
import dataclasses
import errno
import graphlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from edit_logs import as_run, with_settings
from helpers import ROOT, collect, run_script

import record.__main__
import train_gpt as t
from record import checks, consistency, probe
from record.__main__ import main
from record.folder import Folder, load_script, read_json, write_all
from record.log import RULE, Log, RecordError, parse_log, require
from record.rescore import rescore
from record.run import LIMITS, read_run, seed_of
from record.tables import settings_page
from record.view import load_scores
from studies import mixture, predecessors

SEEDS = 11, 2, 303
SAID = [
    "--author",
    "A. Person",
    "--github-id",
    "aperson",
    "--name",
    "Tiny: a test",
    "--blurb",
    "Three tiny seeds.",
    "--date",
    "2026-11-21",
    "--track",
    "non_record_16mb",
    "--home",
    "https://example.org/tiny",
]


@pytest.fixture(scope="module")
def good(corpus, tmp_path_factory):
    """A reported submission of three seeds, never changed by a test."""
    folder = tmp_path_factory.mktemp("good")

    def run(seed: int):
        return run_script(
            folder,
            0,
            **corpus,
            SEED=seed,
            RUN_ID=f"seed{seed}",
            ITERATIONS=11,
            WARMDOWN_ITERS=4,
            SAVE_SCORES=1,
            GPTQ_TOKENS=512,
        )

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, SEEDS):
            assert done.returncode == 0, done.stderr[-3000:]
    for name in ("train_gpt.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "logs/figure.png").write_bytes(b"\x89PNG")
    (folder / "README.md").write_text(
        "# Tiny\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\n![loss](logs/figure.png)\n"
    )
    (folder / "logs/seed5.txt").write_text("another experiment, which nobody reports\n")
    assert main(["report", *logs_of(folder), "--folder", str(folder), *SAID]) == 0
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of `good` to spoil."""
    return shutil.copytree(good, tmp_path / "submission")


def logs_of(folder) -> list[str]:
    return [str(folder / f"logs/seed{seed}.txt") for seed in SEEDS]


def edit(path, pattern: str, new: str, count: int = 1) -> None:
    """Replace `pattern` in a file, where it must occur; multi-line."""
    text, changed = re.subn(pattern, new, path.read_text(), count=count, flags=re.M)
    assert changed, pattern
    path.write_text(text)


def edit_json(folder, **changes) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


def failing(folder) -> dict[str, str]:
    return {
        finding.name: finding.evidence
        for finding in checks.check(folder)
        if finding.passed is False
    }


# --- parsing ---


def test_the_parser_knows_every_line_of_a_log(good):
    log = parse_log(good / "logs/seed2.txt")
    assert log.name == "seed2" and log.source == (ROOT / "train_gpt.py").read_text()
    assert log.settings["SEED"] == "2" and log.settings["VE_LAYERS"] == "2,3"
    whole = log.path.read_text().split("\n")
    assert all(whole[no - 1] == text for no, text in log.lines)
    assert [step.step for step in log.train_steps] == list(range(1, 12))
    assert log.train_steps[0].seconds("train_time") > 0
    assert log.validations[-1].step == 11 and log.validations[-1].number("val_bpb") > 0
    assert log.find("hardware:")["hardware"].startswith("1 x ")
    assert log.find("hardware:").number("threads") == 1
    assert log.find("final_ngram_exact").number("val_bpb") == read_run(log).mixed_bits_per_byte
    with pytest.raises(
        RecordError,
        match=rf"seed2.txt:{log.lines[-1][0]}: the log ends without a line 'nothing:'",
    ):
        log.find("nothing:")
    with pytest.raises(
        RecordError, match=rf"seed2.txt:{log.find('ngram_audit').no}: .*expected absent:"
    ):
        log.find("ngram_audit").number("absent")


def test_a_log_ends_with_a_screen_for_people_and_a_line_for_programs(good):
    *_, view, result = (text for _, text in parse_log(good / "logs/seed2.txt").lines)
    assert (view.endswith("make view"), result.split()[0]) == (True, "result")


def test_the_parser_reads_newer_and_older_lines(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("""seed:1337
model_params:26993766
resume:logs/a b.ckpt step:500 train_time:42942ms
step:501/20000 train_loss:2.3787 train_time:42942ms step_avg:85.88ms tok/s:9158312 lr_scale:0.8123
step:1000/20000 train_loss:2.3 train_time:85000ms step_avg:85.00ms
step:1000/20000 val_loss:2.0469 val_bpb:1.2123 train_time:85010ms step_avg:85.01ms
warning: NUM_LAYER is set but is no setting; did you mean NUM_LAYERS?
ngram_order order:2 targets:10 gain:0.1
ngram_order order:3 targets:20 gain:-0.2
calibration entropy:0-1 targets:5 expected:0.5 nll:0.6 mixed:0.4
artifact_bytes code:48123 side:100 embeddings:7 matrices:9
eval_budget projected:700.5s stride:96
total_eval_time:12.3s budget:600s stride:96
""")
    log = parse_log(path)
    assert log.source == "" and log.settings == {} and seed_of(log) == 1337
    assert [(step.step, step.get("lr_scale")) for step in log.train_steps] == [
        (501, "0.8123"),
        (1000, None),
    ]
    (validation,) = log.validations
    assert (validation.no, validation.step, validation.seconds("train_time")) == (6, 1000, 85.01)
    assert (validation.number("val_loss"), validation.number("val_bpb")) == (2.0469, 1.2123)
    assert log.find("resume:")["resume"] == "logs/a b.ckpt"
    assert log.find("warning:")["warning"].endswith("NUM_LAYERS?")
    assert [line.number("gain") for line in log.all("ngram_order")] == [0.1, -0.2]
    assert log.find("calibration")["entropy"] == "0-1"
    assert log.find("artifact_bytes").number("embeddings") == 7
    assert LIMITS["eval_time"].read(log) == (12.3, f"{path}:13")


def test_times_are_read_in_the_unit_they_are_written_in(tmp_path):
    path = tmp_path / "run.txt"

    def log(*lines: str) -> Log:
        path.write_text("\n".join(lines) + "\n")
        return parse_log(path)

    assert [
        log(f"t:{text}").find("t:").seconds("t") for text in ("700s", "700000ms", "0.5s", "85.88ms")
    ] == [700, 700, 0.5, 0.08588]
    for text in ("700", "700 bytes", "700min", "soon", "nans"):
        with pytest.raises(RecordError, match=r"run.txt:1: found 't:"):
            log(f"t:{text}").find("t:").seconds("t")
    training = log(
        "step:9/9 train_loss:2.3 train_time:699s lr_scale:1",
        "step:9/9 val_loss:2 val_bpb:1.2 train_time:700s",
        "stopping_early: wallclock_cap train_time:690000ms step:9/9",
    )
    assert (
        LIMITS["train_time"].read(training)[0]
        == training.validations[0].seconds("train_time")
        == 700
    )
    assert training.train_steps[0].seconds("train_time") == 699
    assert LIMITS["eval_time"].read(log("total_eval_time:700000ms"))[0] == 700
    assert LIMITS["eval_time"].read(log("final_int6_ngram val_bpb:0.9 eval_time:895s"))[0] == 895
    assert LIMITS["eval_time"].read(
        log(
            "final_int6_x val_bpb:1.1 eval_time:100s",
            "final_int6_x_exact eval_time:100s",
            "legal_ttt val_bpb:1.1 eval_time:700000ms",
        )
    ) == (800, f"{path}:2,3: sum of eval_time")
    for line in ("total_eval_time:700", "total_eval_time:12min", "legal_ttt eval_time:700"):
        with pytest.raises(RecordError, match="expected a (time in ms or s|number) after"):
            LIMITS["eval_time"].read(log(line))


# --- report ---


def test_a_report_says_what_the_logs_say(good):
    found = json.loads((good / "submission.json").read_text())
    runs = {seed: (good / f"logs/seed{seed}.txt").read_text() for seed in SEEDS}
    bpbs = {
        seed: float(re.search(r"^final_ngram_exact .*val_bpb:(\S+)", log, re.M)[1])
        for seed, log in runs.items()
    }
    assert list(found) == [
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "home",
        "val_bpb",
        "val_bpb_std",
        "val_loss",
        "val_loss_std",
        "pre_quant_val_loss",
        "pre_quant_val_bpb",
        "step_stop",
        "seeds",
        "seed_results",
        "bytes_total",
        "bytes_code",
        "hardware",
        "pytorch_version",
        "data",
        "compliance",
    ]
    assert found["seeds"] == sorted(SEEDS) and found["track"] == "non_record_16mb"
    assert {int(seed): result["val_bpb"] for seed, result in found["seed_results"].items()} == bpbs
    assert set(found["seed_results"]["2"]) == {
        "val_loss",
        "val_bpb",
        "artifact_bytes",
        "steps",
        "step_avg_ms",
        "eval_time_s",
    }
    assert found["val_bpb"] == pytest.approx(np.mean(list(bpbs.values())), abs=1e-8)
    assert found["val_bpb_std"] == pytest.approx(np.std(list(bpbs.values()), ddof=1), abs=1e-8)
    sizes = [
        int(re.search(r"^Total submission size \S+ (\d+) bytes", log, re.M)[1])
        for log in runs.values()
    ]
    assert found["bytes_total"] == max(sizes)
    assert found["bytes_code"] == (ROOT / "train_gpt.py").stat().st_size
    assert found["data"]["val_targets"] == 6000 and all(found["compliance"].values())
    rows = [line for line in (good / "README.md").read_text().split("\n") if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        *(f"| [{seed}](logs/seed{seed}.txt)" for seed in sorted(SEEDS)),
        "| mean",
        "| std",
    ]
    assert f"**{np.mean(list(bpbs.values())):.5f}**" in rows[-2]


def test_a_report_is_the_same_bytes_each_time(good, folder, capsys):
    for name in ("README.md", "submission.json"):
        assert (folder / name).read_bytes() == (good / name).read_bytes()
    # names and date as in the JSON
    assert main(["report", *reversed(logs_of(folder)), "--folder", str(folder)]) == 0
    for name in ("README.md", "submission.json"):
        assert (folder / name).read_bytes() == (good / name).read_bytes()
    assert main(["report", "--folder", str(folder)]) == 0  # the logs that README's table links to
    assert (folder / "README.md").read_bytes() == (good / "README.md").read_bytes()
    assert "bpb over seeds 2, 11, 303" in capsys.readouterr().out and not list(folder.glob(".*"))


def test_seeds_may_lie_at_other_paths(folder):
    """What the paths lead to is compared by its SHA-256."""
    names = "DATA_PATH", "TRAIN_DATA_PATH", "TOKENIZER_PATH", "CHECKPOINT_EVERY"
    with_settings(folder / "logs/seed2.txt", **dict.fromkeys(names, "60"))
    assert main(["report", "--folder", str(folder)]) == 0


def renamed(folder):
    shutil.copy(folder / "logs/seed2.txt", folder / "logs/seed11.txt")


def other_code(folder):
    edit(folder / "logs/seed2.txt", r"^import concurrent", "import concurrint")


def too_big(folder):
    path = folder / "logs/seed2.txt"
    code = int(re.search(r"^Code size: (\d+)", path.read_text(), re.M)[1])
    edit(path, r"^(Serialized model \S+) \d+", rf"\1 {16_000_001 - code}")
    edit(path, r"^(Total submission size \S+) \d+", r"\1 16000001")


def units(folder):
    edit(
        folder / "logs/seed2.txt",
        r"^(final_ngram_exact) val_loss:\S+ val_bpb:(\S+)",
        r"\1 val_loss:\2 val_bpb:\2",
    )


def twice(folder):
    shutil.copy(folder / "logs/seed2.txt", folder / "logs/seed2_2.txt")
    (folder / "logs/seed11.txt").unlink()
    (folder / "logs/seed2_2.txt").rename(folder / "logs/seed11.txt")
    edit(folder / "logs/seed11.txt", "^RUN_ID=seed2$", "RUN_ID=seed11")


def two_runs(folder):
    path = folder / "logs/seed2.txt"
    path.write_text(path.read_text() + path.read_text().split(RULE + "\n")[1])


def changed(pattern, new, name="logs/seed2.txt"):
    return lambda folder: edit(folder / name, pattern, new)


REFUSED = [
    (
        "truncated",
        changed(r"^total_eval_time:[\s\S]*", ""),
        r"seed2.txt:\d+: the log ends without a line 'total_eval_time:'",
    ),
    (
        "cut inside the source",
        lambda f: (f / "logs/seed2.txt").write_text("import torch\n"),
        r"seed2.txt:1: ",
    ),
    (
        "a log of another run",
        renamed,
        r"seed11.txt:\d+: found RUN_ID=seed2, expected the file to be named seed2.txt",
    ),
    (
        "seeds with different code",
        other_code,
        r"seed2.txt:\d+: the source differs from that in \S+seed11.txt:\d+",
    ),
    (
        "different settings",
        changed("^MATRIX_LR=.*", "MATRIX_LR=0.5"),
        r"seed2.txt:\d+: found MATRIX_LR=0.5, but 0.025 in \S+seed11.txt:\d+",
    ),
    (
        "different data",
        changed(r"^(data:val .*sha256:)\w", r"\1x"),
        r"seed2.txt:\d+: found 'data:val .*other data",
    ),
    ("the same seed twice", twice, r"seed2.txt:\d+: seed 2 is also that of \S+seed11.txt"),
    (
        "a missing metric",
        changed("^final_ngram_exact.*\n", ""),
        r"seed2.txt:\d+: the log ends without .*ngram_exact",
    ),
    (
        "a missing number",
        changed("^(final_ngram_exact.*) gain:\\S+", r"\1"),
        r"seed2.txt:\d+: .*expected gain:",
    ),
    (
        "NaN",
        changed(r"^(final_ngram_exact val_loss:)\S+", r"\1nan"),
        r"seed2.txt:\d+: .*val_loss is not finite",
    ),
    (
        "no number",
        changed(r"^(total_eval_time:)\S+", r"\1soon"),
        r"seed2.txt:\d+: .*expected a number after total",
    ),
    ("over the cap", too_big, r"seed2.txt:\d+: .* expected at most 16000000 bytes"),
    (
        "sizes that do not add up",
        changed(r"^(Total submission size \S+) \d+", r"\1 8622077"),
        r"seed2.txt:\d+: .*expected \d+ bytes, the sum of lines \d+ and \d+",
    ),
    ("a loss that is a bpb", units, r"seed2.txt:\d+: .*val_loss equals val_bpb"),
    (
        "a loss in other units",
        changed(r"^(final_ngram_exact val_loss:)\S+", r"\g<1>3.123"),
        r"seed2.txt:\d+: .*bytes per token",
    ),
    (
        "gain of another run",
        changed(r"^(final_ngram_exact.* gain:)\S+", r"\g<1>0.5"),
        r"seed2.txt:\d+: .*lines of two runs",
    ),
    (
        "another seed's checkpoint",
        changed("^(step:1/)", r"warning: SEED=2 here, 11 in the checkpoint\n\1"),
        r"seed2.txt:\d+: .*one seed from the first step on",
    ),
    (
        "a run that died",
        changed("^total_eval_time", "error: UserError: x\ntotal_eval_time"),
        r"seed2.txt:\d+: .*error",
    ),
    ("two runs in one log", two_runs, r"seed2.txt:\d+: .*a second run in one log"),
    ("steps left out", changed(r"^step:1/.*\n", ""), r"seed2.txt:\d+: training begins at step 2"),
    (
        "no last validation",
        changed(r"^step:11/.*val_bpb.*\n", ""),
        r"seed2.txt:\d+: .*val_bpb:... after training",
    ),
    (
        "another train_time",
        changed(r"^(step:11/.*val_bpb.*train_time:)\d+", r"\g<1>9"),
        r"seed2.txt:\d+: .*expected train_time / step = step_avg",
    ),
    (
        "a log of an older script, which hashed first shards alone",
        changed(r"^data:val .*", "data:val first:a/fineweb_val_000000.bin sha256:" + "0" * 64),
        r"seed2.txt:\d+: .*older train_gpt.py, .*expected the SHA-256 of all of it; repeat",
    ),
    (
        "other byte shards",
        changed(r"^(data:tokenizer .*\n)", r"\1data:val_bytes sha256:0\n"),
        r"seed2.txt: there are 6 data lines, but 5 in \S+seed11.txt",
    ),
    (
        "no data line",
        changed(r"^data:tokenizer.*\n", ""),
        r"seed2.txt:\d+: the log ends without a line 'data:tok",
    ),
    (
        "a result that the lines do not say",
        changed(r'^(result .*"mixed_bits_per_byte": )', r"\g<1>1"),
        r"seed2.txt:\d+: .*mixed_bits_per_byte is 1\d+\.\d+, but the lines above it say",
    ),
    (
        "a result with a number left out",
        changed(r'^(result .*)"steps": \d+, ', r"\1"),
        r"seed2.txt:\d+: .*steps is missing, but the lines above it say 11",
    ),
    (
        "a result that is no JSON",
        changed(r"^result .*", "result {"),
        r"seed2.txt:\d+: .*expected JSON with seed, steps",
    ),
    (
        "no text",
        lambda f: (f / "logs/seed2.txt").write_bytes(b"\xff\xfe"),
        r"seed2.txt: byte 0 is not UTF-8",
    ),
    ("no log", lambda f: (f / "logs/seed2.txt").unlink(), r"seed2.txt: No such file"),
    (
        "no markers",
        changed("<!-- results:begin -->", "", "README.md"),
        r"README.md: found 0 x <!-- results:begin --> and 1 x",
    ),
    (
        "no JSON",
        lambda f: (f / "submission.json").write_text("{\n  oops\n}"),
        r"submission.json:2: .*expected JSON",
    ),
    (
        "nobody",
        lambda f: (f / "submission.json").unlink(),
        r"submission.json: has no 'author'.*give `report --author`",
    ),
]


@pytest.mark.parametrize(
    "spoil, said", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_true_is_refused(folder, capsys, spoil, said):
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["report", *logs_of(folder), "--folder", str(folder)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("record: error: ") and error.count("\n") == 1 and re.search(said, error)
    ), error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_log_elsewhere_and_a_bad_date_are_refused(folder, good, capsys):
    assert main(["report", *logs_of(good), "--folder", str(folder)]) == 1
    assert "expected a log inside the submission; copy it into" in capsys.readouterr().err
    for date in ("today", "2026-13-99", "20261121", "2026-W47-6"):
        assert main(["report", *logs_of(folder), "--folder", str(folder), "--date", date]) == 1
        assert f"found the date '{date}', expected YYYY-MM-DD" in capsys.readouterr().err


def test_a_log_of_an_older_script_needs_no_result(folder):
    in_every_log("^result .*\n", "")(folder)
    in_every_log(r'"result \{json', r'"resolt {json')(folder)  # a script that writes no such line
    before = (folder / "submission.json").read_bytes()
    assert main(["report", "--folder", str(folder)]) == 0
    assert (folder / "submission.json").read_bytes() == before


# --- submission.json ---


ADDED = dict(technique_summary="exact counts", notes=["a", "b"], baseline={"val_bpb": 1.2244})


def test_fields_that_a_person_added_are_kept_by_report_and_pass_the_check(folder):
    found = json.loads((folder / "submission.json").read_text())
    found["compliance"]["no_ttt"] = found["seed_results"]["2"]["machine"] = "yes"
    edit_json(folder, **ADDED, **{key: found[key] for key in ("compliance", "seed_results")})
    expected = json.loads((folder / "submission.json").read_text())
    assert main(["report", "--folder", str(folder)]) == 0
    assert json.loads((folder / "submission.json").read_text()) == expected
    assert "technique_summary, notes, baseline: a person's own" in checks.check_json(Folder(folder))


@pytest.mark.parametrize("write", ["report", "check"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("wallclock_seconds", 0.001),
        ("eval_time_seconds", [1, 2, 99999.5]),
        ("artifact_bytes_max", 8622077),
        ("mean_val_bpb", 0.9),
        ("steps", "11"),
        ("train_time_ms", True),
    ],
)
def test_fields_that_contradict_the_logs_are_refused(
    folder, capsys, monkeypatch, write, name, value
):
    monkeypatch.setattr(checks, "CHECKS", {"json": checks.check_json})
    edit_json(folder, **{name: value})
    assert main([write, *(["--folder"] if write == "report" else []), str(folder)]) == 1
    said = "".join(capsys.readouterr())
    assert re.search(rf"submission.json:?\d*: {name} is .*, the logs say \d", said)


@pytest.mark.parametrize("digits", [0, 1, 3])
def test_a_person_s_field_may_say_fewer_digits_than_the_logs(folder, digits):
    run = read_run(parse_log(folder / "logs/seed2.txt"))
    edit_json(folder, wallclock_seconds=round(run.train_seconds, digits), steps=11)
    assert main(["report", "--folder", str(folder)]) == 0


def test_the_scores_before_packing_are_those_of_the_logs(good):
    found = json.loads((good / "submission.json").read_text())
    bpbs = [parse_log(path).find("final_float_exact").number("val_bpb") for path in logs_of(good)]
    assert found["pre_quant_val_bpb"] == round(float(np.mean(bpbs)), 8)


def test_a_seed_that_no_log_has_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {"json": checks.check_json})
    found = json.loads((folder / "submission.json").read_text())
    edit_json(folder, seed_results=found["seed_results"] | {"7": {"val_bpb": 0.9}})
    assert "seed_results.7 is {'val_bpb': 0.9}" in failing(folder)["json"]


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}'])
def test_numbers_that_are_no_json_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "submission.json").write_text(text)
    with pytest.raises(RecordError, match=r"submission.json:1: found (NaN|-Infinity), expected"):
        read_json(tmp_path / "submission.json")


@pytest.mark.parametrize("note, holds", [("Unlimited compute.", True), ("Long.", False)])
def test_the_track_without_records_has_no_time_limits_if_readme_says_so(
    folder, monkeypatch, note, holds
):
    monkeypatch.setattr(checks, "CHECKS", {"train_time": checks.CHECKS["train_time"]})
    changed(r"^(step:11/.*val_bpb.*train_time:)\d+", r"\g<1>600015")(folder)
    (folder / "README.md").write_text(f"{(folder / 'README.md').read_text()}{note}\n")
    assert failing(folder).keys() == ({"train_time"} if not holds else set())
    edit_json(folder, track="10min_16mb")
    assert failing(folder).keys() == {"train_time"}


@pytest.mark.parametrize("home", ["example.org", "ftp://example.org", "https://", "https://a b.c"])
def test_a_home_that_is_no_address_is_refused(folder, capsys, home):
    assert main(["report", "--folder", str(folder), "--home", home]) == 1
    assert f"found the home {home!r}, expected an address" in capsys.readouterr().err


# --- check ---


def test_check_passes_on_a_good_folder(good, monkeypatch, capsys):
    before = sorted(good.rglob("*"))
    monkeypatch.chdir(good)
    status, found = main(["check", "--json"]), json.loads(capsys.readouterr().out)
    assert status == 0 and found["passed"], found
    assert {row["name"] for row in found["checks"]} == set(checks.CHECKS)
    assert all(row["evidence"] for row in found["checks"])
    assert sorted(good.rglob("*")) == before  # leaves nothing behind


def flash_first(folder):
    edit(
        folder / "train_gpt.py",
        "^import numpy as np",
        "import flash_attn_interface\nimport numpy as np",
    )


def one_seed_less(folder):
    assert main(["report", *logs_of(folder)[1:], "--folder", str(folder)]) == 0


def in_every_log(pattern, new):
    def spoil(folder):
        for seed in SEEDS:
            edit(folder / f"logs/seed{seed}.txt", pattern, new)

    return spoil


def on_h100(folder):
    in_every_log("^hardware:.* threads", "hardware:8 x NVIDIA H100 threads")(folder)
    in_every_log(r"torch:\S+ cuda:None", "torch:2.9.1+cu128 cuda:12.8")(folder)
    memory = "peak memory allocated: 9 MiB reserved: 9 MiB"
    in_every_log("^(averaging:)", rf"{memory}\n\1")(folder)


def learning_at_evaluation(folder):
    """By the settings, though no line of the logs says so."""
    for path in logs_of(folder):
        with_settings(Path(path), TTT_EPOCHS="3")


def learning_before_scoring(folder):
    """The logs say that there was learning, but not that each chunk was scored first."""
    learning_at_evaluation(folder)
    in_every_log("^ngram_audit", "ttt:on epochs:3\nngram_audit")(folder)


def on_two_machines(folder):
    on_h100(folder)
    edit(folder / "logs/seed2.txt", "^hardware:8 x NVIDIA H100", "hardware:8 x NVIDIA A100")
    edit_json(folder, track="10min_16mb")


def with_systems(folder):
    """Logs of two systems, and README's table of them."""
    (folder / "logs/systems").mkdir()
    for seed, system in zip(SEEDS, ("backoff", "prefill")):
        path = folder / f"logs/systems/{system}_seed{seed}.txt"
        shutil.copy(folder / f"logs/seed{seed}.txt", path)
        as_run(path, path.stem)
        neural = read_run(parse_log(path)).neural_bits_per_byte
        replayed = dict(pseudo_bpb=0.5, mass=44.0, neural_bpb=neural)
        path.with_name(f"{path.stem}_predecessors.json").write_text(json.dumps(replayed))
    (folder / "docs").mkdir()
    page = "# Predecessors\n\n<!-- systems:begin -->\n<!-- systems:end -->\n"
    (folder / "docs/predecessors.md").write_text(page)
    assert write_systems(folder) == 0


def write_systems(folder) -> int:
    """Exit status of `record systems`."""
    logs = map(str, folder.glob("logs/systems/*.txt"))
    return main(["systems", *logs, "--folder", str(folder)])


def test_the_table_of_systems_shows_each_coder_and_what_rans_would_take(folder):
    with_systems(folder)
    path = folder / f"logs/systems/backoff_seed{SEEDS[0]}.txt"
    with_settings(path, CODER="lzma")
    edit(path, r"^(Total submission size|Serialized model) int6\+rans", r"\1 int6+lzma", 2)
    edit(path, r"bytes_by_rans:\d+", "bytes_by_rans:1000")
    assert write_systems(folder) == 0
    page = (folder / "docs/predecessors.md").read_text()
    run, other = (
        read_run(parse_log(folder / f"logs/systems/{system}_seed{seed}.txt"))
        for seed, system in zip(SEEDS, ("backoff", "prefill"))
    )
    assert f"| lzma | {run.submission_bytes:,} | {run.code_bytes + 1000:,} |" in page
    assert f"| rans | {other.submission_bytes:,} | {other.submission_bytes:,} |" in page


def other_system(folder):
    with_systems(folder)
    edit(folder / "docs/predecessors.md", r"^(\| `runs/backoff.sh` .*)\*0.5000\*", r"\1*0.4999*")


DEFECTS = [  # what is spoilt, which check must see it, what it must say
    (
        changed(r"^(Total submission size \S+) \d+", r"\1 17172122"),
        "artifact",
        "seed2.txt:.*17172122 bytes, expected",
    ),
    (
        changed(r"^(step:11/.*val_bpb.*train_time:)\d+", r"\g<1>600015"),
        "train_time",
        "seed2.txt:.*600.015 s of train",
    ),
    (
        changed(r"^total_eval_time:\S+", "total_eval_time:895.0s"),
        "eval_time",
        "seed2.txt:.*895.0 s of evaluation",
    ),
    (
        changed(r"^(final_int6_sl.*eval_time:)\d+", r"\g<1>99000"),
        "eval_time",
        "expected at least 99.0s",
    ),
    (
        lambda f: edit_json(f, track="10min_16mb"),
        "hardware",
        "submission.json:7: track 10min_16mb is for 8 x H100",
    ),
    (on_two_machines, "hardware", "is for 8 x H100, the logs say 8 x NVIDIA A100; 8 x NVIDIA H100"),
    (learning_at_evaluation, "logs", "without a line 'ttt:score_first', which TTT_EPOCHS writes"),
    (learning_before_scoring, "compliance", "do not show scored_before_update"),
    (
        other_system,
        "readme",
        r"predecessors.md:\d+: found '\| `runs/backoff.sh`.*0.4999.*`python -m record systems`",
    ),
    (changed(r"^!\[loss.*", "", "README.md"), "figures", "README.md: shows no figures"),
    (one_seed_less, "seeds", "2 seeds .*expected at least 3"),
    (lambda f: (f / "requirements.txt").unlink(), "files", "requirements.txt is missing"),
    (lambda f: (f / "logs/figure.png").unlink(), "figures", "logs/figure.png"),
    (
        lambda f: edit(f / "README.md", r"\Z", "[more](docs/more.md)\n"),
        "files",
        "README.md links to docs/more.md, which is missing",
    ),
    (
        lambda f: edit(f / "submission.json", r'("val_bpb": \d\.\d+)\d', r"\g<1>0" + "1"),
        "json",
        r"submission.json:9: val_bpb is .*the logs say",
    ),
    (
        lambda f: edit(f / "submission.json", r'("303": \{\s+"val_loss": )\S+', r"\g<1>1.5,"),
        "json",
        r"submission.json:\d+: seed_results.303.val_loss is 1.5, the logs say",
    ),
    (
        lambda f: edit_json(f, bytes_total=8622077),
        "json_bytes",
        "bytes_total is 8622077, but logs/seed",
    ),
    (
        lambda f: edit_json(f, val_loss=json.loads((f / "submission.json").read_text())["val_bpb"]),
        "json_units",
        "submission.json:.*equals val_bpb",
    ),
    (
        lambda f: edit(f / "submission.json", '"no_pickle": true', '"no_pickle": 1'),
        "json",
        "compliance.no_pickle is 1",
    ),
    (
        changed(r"^(\| \[303\].*)\d \|$", r"\1  |", "README.md"),
        "readme",
        r"README.md:8: found '\| \[303\]",
    ),
    (
        changed(r"^ngram_audit targets:6000/6000", "ngram_audit targets:5999/6000"),
        "scored_once",
        "targets:5999/6000",
    ),
    (
        changed(r"^train_tokens:(\d+) val_targets:6000", r"train_tokens:\1 val_targets:5999"),
        "scored_once",
        "5999/5999",
    ),
    (changed("^ngram_audit.*\n", ""), "self_audit", "without a line 'ngram_audit'"),
    (changed("mass_max:1.0", "mass_max:1.1", "logs/seed2.txt"), "self_audit", "seed2.txt:.*masses"),
    (
        changed(r"^(final_ngram_exact.*) counts:exact", r"\1 counts:other"),
        "compliance",
        "exact_counts",
    ),
    (
        changed(r"parameters:\d+$", "parameters:4242"),
        "parameters",
        "parameters:4242, but its settings make",
    ),
    (
        lambda f: edit(f / "train_gpt.py", r"\Z", "# later\n"),
        "source",
        "seed2.txt:.*differs from train_gpt.py",
    ),
    (flash_first, "imports", "No module named 'flash_attn_interface'"),
    (
        lambda f: edit(f / "train_gpt.py", "^import concurrent", "import pickle, concurrent"),
        "safe_reading",
        "imports",
    ),
    (lambda f: (f / "train_gpt.py").write_text("def f(:\n"), "compiles", "train_gpt.py:1: "),
]


@pytest.mark.parametrize(
    "spoil, name, said", DEFECTS, ids=[f"{i}-{row[1]}" for i, row in enumerate(DEFECTS)]
)
def test_each_seeded_defect_is_caught(folder, spoil, name, said, monkeypatch):
    spoil(folder)
    monkeypatch.setattr(checks, "CHECKS", {name: checks.CHECKS[name]})
    assert re.search(said, failing(folder)[name])


def test_a_system_has_a_pseudo_score_if_each_of_its_runs_was_replayed(folder):
    with_systems(folder)
    page = folder / "docs/predecessors.md"
    rows = [line.split(" | ")[5:7] for line in page.read_text().splitlines() if "runs/" in line]
    assert rows == [["*0.5000*", "44.0"]] * 2
    (folder / "logs/systems/prefill_seed2_predecessors.json").unlink()
    assert write_systems(folder) == 0
    rows = [line.split(" | ")[5:7] for line in page.read_text().splitlines() if "runs/" in line]
    assert rows == [["*0.5000*", "44.0"], ["-", "-"]]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", r"backoff_seed11_predecessors.json:1: .*expected JSON; .*studies.predecessors"),
        (
            "{}",
            "pseudo_bpb is missing, expected a number; make it by `python -m studies.predecessors",
        ),
        ('{"pseudo_bpb": 1, "mass": null}', "mass is None, expected a number"),
        (
            '{"pseudo_bpb": 1, "mass": 2, "neural_bpb": 1.5}',
            r"neural_bpb is 1.5, but \S+/backoff_seed11.txt says \d\.\d+: scores of another run",
        ),
    ],
)
def test_a_replay_of_another_run_is_refused(folder, capsys, text, said):
    with_systems(folder)
    (folder / "logs/systems/backoff_seed11_predecessors.json").write_text(text)
    capsys.readouterr()
    assert write_systems(folder) == 1
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1


def test_a_table_of_systems_is_checked_where_its_logs_lie(folder, capsys):
    with_systems(folder)
    assert "the systems table is that of 2 logs" in checks.check_readme(Folder(folder))
    log, other = (
        folder / f"logs/systems/{name}.txt" for name in ("backoff_seed11", "prefill_seed2")
    )
    page = folder / "docs/predecessors.md"
    before, was = page.read_bytes(), other.read_text()
    for spoil, said in (
        (
            ("^MAX_WALLCLOCK_SECONDS=.*", "MAX_WALLCLOCK_SECONDS=30"),
            (
                r"prefill_seed2.txt:\d+: found MAX_WALLCLOCK_SECONDS=30, "
                r"but \S+ in \S+backoff_seed11.txt:\d+"
            ),
        ),
        (
            (r"^(data:val .*sha256:)\w", r"\1x"),
            r"prefill_seed2.txt:\d+: .*other data than \S+backoff_seed11.txt:",
        ),
    ):
        edit(other, *spoil)
        assert main(["systems", str(log), str(other), "--folder", str(folder)]) == 1
        assert re.search(said, capsys.readouterr().err)
        assert page.read_bytes() == before
        other.write_text(was)


def test_a_json_of_four_digits_is_in_the_right_units(tmp_path):
    """As others write them; ours is compared to the last digit by another check."""
    (tmp_path / "train.log").write_text(
        "final_int6_ngram_exact val_loss:0.91845100 val_bpb:0.54404900\n"
    )
    for loss, holds in ((0.9185, True), (0.9, False)):
        (tmp_path / "submission.json").write_text(json.dumps(dict(val_loss=loss, val_bpb=0.5440)))
        try:
            assert "bytes per token" in checks.check_units_of_json(Folder(tmp_path)) and holds
        except RecordError as error:
            assert not holds and "in other units" in str(error)


def test_a_json_that_no_log_can_be_compared_with_is_not_passed(tmp_path):
    (tmp_path / "train.log").write_text("step:1/1 train_loss:2.0\n")
    (tmp_path / "submission.json").write_text('{"val_loss": 2.0, "val_bpb": 1.2}')
    with pytest.raises(RecordError, match="no log says a val_loss and a val_bpb"):
        checks.check_units_of_json(Folder(tmp_path))


class Ahead(t.Mixture):
    """Knows how often each token occurs in the whole stream."""

    def extend(self, nll, entropy):
        share = np.bincount(self.tokens, minlength=self.hp.vocab_size) / len(self.tokens)
        self.nll[:] = -np.log(0.5 * np.exp(-nll.astype(float)[:1]) + 0.5 * share[self.tokens[1:]])


class Generous(t.Mixture):
    """Gives the target 1 % more than there is."""

    def extend(self, nll, entropy):
        super().extend(nll, entropy)
        self.nll -= 0.01


class Piecewise(t.Mixture):
    """Its weights depend on how the scores arrive."""

    def extend(self, nll, entropy):
        self.calls = getattr(self, "calls", 0) + 1
        super().extend(nll, entropy)
        self.nll += self.calls * 1e-3


def tail_twice(*args):
    """As the predecessors' windows: the end of the stream is scored again."""
    nll, entropy = collect(SCORE(*args))
    yield nll, entropy
    yield nll[-4:], entropy[-4:]


def out_of_order(*args):
    nll, entropy = collect(SCORE(*args))
    yield np.roll(nll, 1), np.roll(entropy, 1)


def learn_first(scorer, loss, validation, stride, ranks, log):
    """Test-time training the wrong way round: each chunk is learned from, then scored."""
    model, hp = scorer.model, scorer.model.hp
    parameters = [p.data for p in model.parameters()]
    before = [p.clone() for p in parameters]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for begin in range(0, validation.num_targets, hp.ttt_chunk_tokens):
        end = min(begin + hp.ttt_chunk_tokens, validation.num_targets)
        batches = t.ttt_batches(validation, begin, end, hp.eval_seq_len, ranks)
        for ids, target_ids, shares in batches:
            loss(model, ids, target_ids, scorer.passes, None, shares).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield collect(t.score(scorer, validation.tokens, stride, ranks, (begin, end)))
    torch._foreach_copy_(parameters, before)


SCORE = t.score


@pytest.mark.parametrize(
    "name, part, broken, said",
    [
        ("causal", "score_and_learn", learn_first, "it looks ahead"),
        ("causal", "Mixture", Ahead, "it looks ahead"),
        (
            "sums_to_one",
            "Mixture",
            Generous,
            "the mixture's probabilities of target .* sum to 1.01",
        ),
        ("one_pass", "Mixture", Piecewise, "changes by .* with the pieces"),
        ("one_pass", "score", tail_twice, r"scores for \d+ targets, .*each target once"),
        ("one_pass", "score", out_of_order, r"scores for \d+ targets, .*each target once"),
    ],
)
def test_the_probes_catch_what_is_no_code(monkeypatch, name, part, broken, said):
    settings = dict(TTT_EPOCHS="3", TTT_LR="0.01") if part == "score_and_learn" else {}
    assert probe.PROBES[name](t, settings)
    monkeypatch.setattr(t, part, broken)
    with pytest.raises(RecordError, match=said):
        probe.PROBES[name](t, settings)


@pytest.mark.slow
def test_the_probes_pass_adapters_that_learn_after_they_score():
    settings = dict(TTT_LORA_RANK="2", TTT_LORA_LR="0.01", TTT_LORA_ALPHA="8")
    for name in ("causal", "sums_to_one", "one_pass"):
        assert probe.PROBES[name](t, settings)


def test_the_probes_catch_adapters_that_learn_before_they_score(monkeypatch):
    """A second reading of the documents, with adapters that already know them."""

    class Remembering(t.Adapters):
        kept = {}

        def __init__(self, model, rows):
            super().__init__(model, rows)
            key = model, rows
            self.a, self.b, self.optimizer = self.kept.setdefault(
                key, (self.a, self.b, self.optimizer)
            )

    def twice(*args, score=t.score_documents):
        list(score(*args))
        return score(*args)

    monkeypatch.setattr(t, "Adapters", Remembering)
    monkeypatch.setattr(t, "score_documents", twice)
    settings = dict(TTT_LORA_RANK="2", TTT_LORA_LR="0.01", TTT_LORA_ALPHA="8")
    with pytest.raises(RecordError, match="it looks ahead"):
        probe.PROBES["causal"](t, settings)


def test_the_probes_learn_as_the_run_did():
    settings = dict(TTT_EPOCHS="3", TTT_LR="0.01", TTT_CHUNK_TOKENS="32768", NGRAM_ALPHA="order")
    probed = probe.Probed(t, settings)
    found = probed.hp.ngram_alpha, probed.hp.ttt_epochs, probed.hp.ttt_lr
    assert found == ("order", 1, 0.01)
    tokens, still = probed.stream(200), probe.Probed(t, {})
    still.model = probed.model
    learned, untrained = probed.neural(tokens)[0], still.neural(tokens)[0]
    far = np.abs(learned - untrained)
    assert still.hp.ttt_epochs == 0 and far[:40].max() < 1e-4 < far[55:].max()
    assert np.array_equal(still.neural(tokens)[0], untrained), "the weights come back"


def test_the_command_line_speaks_to_people(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "record", "check", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        (
            "record: error: nowhere: no such folder, "
            "expected one with train_gpt.py and submission.json\n"
        ),
    )
    for command in ([], ["report"], ["check"], ["plot"], ["view"], ["copy"]):
        with pytest.raises(SystemExit) as left:
            main([*command, "--help"])
        assert left.value.code == 0 and "python -m record" in capsys.readouterr().out


# --- copy ---


class AsciiConsole(io.TextIOWrapper):
    """Refuses what is not ASCII, as Python's standard output does under PYTHONIOENCODING=ascii."""

    def __init__(self):
        super().__init__(io.BytesIO(), "ascii")

    def said(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()


def test_an_ascii_console_gets_names_of_any_kind(tmp_path, monkeypatch):
    console, folder = AsciiConsole(), tmp_path / os.fsdecode(b"caf\xe9")
    (folder / "docs").mkdir(parents=True)
    shutil.copy(ROOT / "train_gpt.py", folder)
    monkeypatch.setattr(sys, "stdout", console)
    assert main(["settings", "--folder", str(folder)]) == 0
    assert console.said() == f"{tmp_path}/caf\\udce9/docs/settings.md\n".encode()


def test_an_ascii_console_gets_errors_of_any_kind(tmp_path, monkeypatch):
    console = AsciiConsole()
    monkeypatch.setattr(sys, "stderr", console)
    assert main(["check", str(tmp_path / os.fsdecode(b"\xff\xe2\x96\x81"))]) == 1
    assert f"record: error: {tmp_path}/\\udcff\\u2581: no such folder".encode() in console.said()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_console_costs_no_file(tmp_path, monkeypatch, stream):
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(sys, stream, None)
    assert main(["settings", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "docs/settings.md").exists()


@pytest.mark.parametrize("failed, said", [(False, ""), (True, "record: error: no settings\n")])
def test_a_reader_that_has_read_enough_gets_no_traceback(monkeypatch, capsys, failed, said):
    """`| head -1`: neither now nor when Python ends, which flushes once more."""

    def run_settings(args) -> int:
        """Prints, and then may fail."""
        print("a line")
        require(not failed, "no settings")
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    console = os.fdopen(writer, "w")
    monkeypatch.setattr(record.__main__, "run_settings", run_settings)
    monkeypatch.setattr(sys, "stdout", console)
    assert main(["settings"]) == 1
    console.close()
    assert capsys.readouterr().err == said


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    """Some errors of the system name no file."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "unlink", full)
    assert main(["settings", "--folder", str(tmp_path)]) == 1
    page = tmp_path / "docs/settings.md"
    expected = f"record: error: {page}: No space left on device; it was not changed\n"
    assert capsys.readouterr().err == expected


def test_a_figure_that_cannot_be_written_is_one_line(folder, monkeypatch, capsys):
    (folder / "figures/fig_bpb_light.png").mkdir(parents=True)
    assert main(["plot", str(folder)]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch("record: error: .*Is a directory: '.*/fig_bpb_light.png'\n", said)


def test_a_name_that_is_no_utf8_is_refused_where_it_would_be_written(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("older")
    with pytest.raises(RecordError, match=r"README.md: would contain '.*\\udcff.*rename the file"):
        write_all({page: "see [the log](logs/\udcff.txt)"})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", "3"])
def test_json_of_any_kind_is_read_or_refused_in_one_line(tmp_path, text):
    (tmp_path / "submission.json").write_text(text)
    with pytest.raises(RecordError, match="submission.json:1: "):
        read_json(tmp_path / "submission.json")


@pytest.mark.parametrize("read", [load_scores, predecessors.read_scores, mixture.read_scores])
def test_scores_that_are_damaged_anywhere_are_refused(tmp_path, read):
    """NumPy and zipfile raise many types."""
    path = tmp_path / "damaged_scores.npz"
    np.savez(path, nll=np.ones(9, np.float32), entropy=np.ones(9, np.float32))
    whole = path.read_bytes()
    for place in range(len(whole) - 100, len(whole)):  # the end of the directory
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with contextlib.suppress(RecordError, t.UserError):
            read(path)


def test_copy_makes_a_folder_that_runs(good, corpus, tmp_path, capsys):
    assert main(["copy", str(tmp_path), "--folder", str(good), "--name", "My Run!"]) == 0
    made = tmp_path / "records/track_non_record_16mb/2026-11-21_My_Run"
    assert str(made) in capsys.readouterr().out
    assert sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    ) == sorted(
        f"records/track_non_record_16mb/2026-11-21_My_Run/{name}"
        for name in (
            "README.md",
            "requirements.txt",
            "submission.json",
            "train_gpt.py",
            "figures/figure.png",
            *(f"train_seed{seed}.log" for seed in SEEDS),
        )
    )
    for seed in SEEDS:
        log = made / f"train_seed{seed}.log"
        assert log.read_bytes() == (good / f"logs/seed{seed}.txt").read_bytes()
    done = run_script(
        made,
        0,
        script=made / "train_gpt.py",
        **corpus,
        ITERATIONS=2,
        RUN_ID="again",
        GPTQ_TOKENS=512,
    )
    assert done.returncode == 0 and "final_ngram_exact" in done.stdout, done.stderr[-3000:]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for force in ([], ["--force"]):
        assert (
            main(["copy", str(tmp_path), "--folder", str(good), "--name", "My Run!", *force]) == 1
        )
        assert "exists already and is left as it is" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_copy_takes_what_the_readme_and_its_pages_link_to(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {"files": checks.check_files})
    (folder / "docs").mkdir()
    (folder / "logs/gpu").mkdir()
    (folder / "logs/gpu/a.txt").write_text("a log\n")
    (folder / "docs/deep.md").write_text("[back](../README.md#tiny) [log](../logs/gpu/a.txt)\n")
    (folder / "docs/unlinked.md").write_text("nobody leads here\n")
    (folder / "docs/more.md").write_text(
        "[deep](deep.md) [out](../../x) [web](https://example.org/x.md) [here](#top)\n"
    )
    edit(folder / "README.md", r"\Z", "[more](docs/more.md#part)\n")
    (tmp_path / "dest").mkdir()
    assert main(["copy", str(tmp_path / "dest"), "--folder", str(folder)]) == 0
    made = next((tmp_path / "dest/records").glob("*/*"))
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert found >= {"docs/more.md", "docs/deep.md", "evidence/gpu/a.txt", "figures/figure.png"}
    assert "[log](../evidence/gpu/a.txt)" in (made / "docs/deep.md").read_text()
    assert "docs/unlinked.md" not in found


def test_copy_refuses_what_check_refuses(folder, tmp_path, capsys):
    edit_json(folder, bytes_total=8622077, track="10min_16mb")
    (tmp_path / "dest").mkdir()
    command = ["copy", str(tmp_path / "dest"), "--folder", str(folder), "--date", "2026-12-01"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not made, 3 checks failed: hardware: submission.json:7: track" in error
    assert not list((tmp_path / "dest").iterdir())
    assert main([*command, "--force"]) == 0
    assert (
        "21 of 25 checks passed, 1 not judged: not ready: hardware, stream, json\n"
        in capsys.readouterr().out
    )
    assert (
        tmp_path / "dest/records/track_10min_16mb/2026-12-01_Tiny_a_test/submission.json"
    ).exists()
    assert main(["copy", str(tmp_path / "nowhere"), "--folder", str(folder)]) == 1
    capsys.readouterr()
    assert main(["copy", "/proc", "--folder", str(folder)]) == 1
    assert re.fullmatch(r"record: error: /proc: [^\n]+ was not made\n", capsys.readouterr().err)


def test_a_copy_says_the_date_of_its_folder(good, tmp_path, capsys):
    assert main(["copy", str(tmp_path), "--folder", str(good), "--date", "2026-02-30"]) == 1
    assert "found the date '2026-02-30'" in capsys.readouterr().err
    assert main(["copy", str(tmp_path), "--folder", str(good), "--date", "2026-12-01"]) == 0
    path = tmp_path / "records/track_non_record_16mb/2026-12-01_Tiny_a_test/submission.json"
    made = json.loads(path.read_text())
    assert made == {**json.loads((good / "submission.json").read_text()), "date": "2026-12-01"}


@pytest.mark.slow
def test_artifacts_that_are_scored_again_repeat_the_digits_of_their_logs(good):
    found = rescore(good)
    assert [path.name for path, _ in found] == [f"seed{seed}.int6.ptz" for seed in sorted(SEEDS)]
    assert [row for _, rows in found for row in rows if row.logged != row.again] == []


# --- what starts it ---


def fake_python(path, gpus: int):
    """An interpreter that knows a number of GPUs, says how it was called, and leaves the log of
    RUN_ID or, as the study, its JSON."""
    path.parent.mkdir(parents=True)
    path.write_text(
        f'#!/bin/sh\ncase "$*" in\n-c*) echo {gpus};;\n'
        '"-m studies.predecessors"*) echo "$0 $*"; touch "logs/${RUN_ID}_predecessors.json";;\n'
        '*) echo "$0 $*"; touch "logs/$RUN_ID.txt";;\nesac\n'
    )
    path.chmod(0o755)


@pytest.mark.parametrize("gpus, ranks", [(0, 2), (1, 1), (3, 2), (7, 4), (16, 8)])
def test_launch_scripts_use_the_python_of_make(tmp_path, gpus, ranks):
    fake_python(tmp_path / ".venv/bin/python", gpus)
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    env = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    for script in ("runs/demo.sh", "studies/systems.sh"):
        (tmp_path / "logs").mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", tmp_path / script],
            env=dict(env, RUN_ID="x"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert all(".venv/bin/python " in line for line in done.stdout.splitlines())
        replays = done.stdout.count(".venv/bin/python -m studies.predecessors logs/")
        assert replays == (9 if script == "studies/systems.sh" else 0)
        assert (
            f"/.venv/bin/python -m torch.distributed.run --standalone --nproc_per_node={ranks} "
            in done.stdout
        )
    assert done.stdout.splitlines()[-1].startswith(
        ".venv/bin/python -m record systems logs/systems/backoff_seed"
    )


def test_make_record_does_without_logs_of_systems(tmp_path):
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    steps = []
    env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # test-field's
    for _ in range(2):
        done = subprocess.run(
            ["make", "-n", "record"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        steps.append(re.findall(r"^\S+ -m record (.*)", done.stdout, re.M))
        (tmp_path / "logs/systems").mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs/systems/backoff_seed1.txt").touch()
    assert steps == [
        ["report", "settings", "plot", "check"],
        ["report", "systems logs/systems/*.txt", "settings", "plot", "check"],
    ]


def test_the_record_tools_import_each_other_in_one_direction():
    imports = {}
    for path in (ROOT / "record").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "record").with_suffix("").parts)
        nodes = ast.walk(ast.parse(path.read_text()))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        found = [[node.module] if node.module else [a.name for a in node.names] for node in froms]
        imports[name.removesuffix(".__init__")] = set(sum(found, []))
    assert list(graphlib.TopologicalSorter(imports).static_order())


def test_the_readme_is_at_most_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_readme_leads_to_what_is_there():
    links = Folder(ROOT).links
    assert links and not [path for path in links if not path.exists()]


def test_the_page_of_settings_is_that_of_the_script():
    page = settings_page(ROOT / "train_gpt.py")
    assert (ROOT / "docs/settings.md").read_text() == page, "run `make record`"


def test_the_page_of_settings_lists_each_once_under_the_script_s_headings():
    page = settings_page(ROOT / "train_gpt.py")
    names = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert names == [field.name.upper() for field in dataclasses.fields(t.Hyperparameters)]
    headings = re.findall(
        r"^    # ([A-Z].*)\n    \w+: ", inspect.getsource(t.Hyperparameters), re.M
    )
    assert re.findall("^## (.*)", page, re.M) == headings


def test_the_settings_table_of_another_script_than_the_loaded_one_is_refused(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text("raise SystemExit('this was loaded')\n")
    with pytest.raises(RecordError, match="expected one script per process"):
        settings_page(script)


def test_a_script_that_cannot_be_loaded_leaves_no_module(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "train_gpt")
    script = tmp_path / "train_gpt.py"
    script.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_script(script)
    assert "train_gpt" not in sys.modules


def test_a_record_whose_readme_says_it_is_none_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {"hardware": checks.check_hardware})
    on_h100(folder)
    edit_json(folder, track="10min_16mb")
    (folder / "README.md").write_text("This is no record.\n" + (folder / "README.md").read_text())
    assert "says 'no record', but the track is 10min_16mb" in failing(folder)["hardware"]
    edit(folder / "README.md", "no record", "one")
    assert "hardware" not in failing(folder)


@pytest.mark.parametrize(
    "stream, holds",
    [
        ("SP1024 known_by:length and the sha256 of its first 1040298 tokens", True),
        ("SP8192 CaseOps known_by:length only", True),
        ("the first 1040298 tokens of SP1024 known_by:sha256", False),
        ("unknown", False),
    ],
)
def test_the_record_track_is_scored_on_a_known_stream(folder, monkeypatch, stream, holds):
    monkeypatch.setattr(checks, "CHECKS", {"stream": checks.check_stream})
    monkeypatch.setattr(consistency, "CHECKS", ())  # the stream is shorter than its name says
    in_every_log("^data:stream name:.*", f"data:stream name:{stream}")(folder)
    assert failing(folder) == {}
    edit_json(folder, track="10min_16mb")
    assert holds or "a whole validation stream of the challenge" in failing(folder)["stream"]
    assert not holds or failing(folder) == {}


@pytest.mark.slow
def test_changed_code_alone_is_fine_to_work_on(folder, capsys):
    script = folder / "train_gpt.py"
    script.write_text(script.read_text() + "# mine\n")
    assert main(["check", str(folder)]) == 1
    assert "not ready: source, code_bytes\nOnly the code has changed" in capsys.readouterr().out


def test_the_readme_denies_a_record_only_where_its_author_rewrites_it():
    """Status and the paragraph under Results. Elsewhere the words would make `check` refuse every
    submission with this README."""
    _, rest = (ROOT / "README.md").read_text().split("## Why the number can be trusted")
    assert "no record" not in rest
