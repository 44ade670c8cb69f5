"""`record check` of a folder that nobody here wrote. Every check says PASS, INFO, WARN, CANNOT TELL
or FAIL, with its evidence (file:line) and what a reviewer can do. A check judges only what the
folder itself says; no script is run, imported or trusted.

FAIL means that the folder contradicts itself or a rule of the challenge. Where a line is missing
the verdict is CANNOT TELL, and all other checks are made all the same.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from . import field_script, foreign_code, foreign_json, foreign_logs
from .foreign_folder import ForeignFolder
from .foreign_verdict import CANNOT, FAIL, INFO, ORDER, PASS, WARN, Finding, Verdict


def not_run(folder: ForeignFolder) -> Finding:
    return CANNOT, "only running the script can tell, and a foreign script is never run"


CHECKS = dict(  # name -> (what judges it, what a reviewer can do)
    folder=(foreign_logs.check_folder, "read by hand what was not read here"),
    finite=(foreign_logs.check_finite, "ask for a run that did not diverge"),
    seeds=(
        foreign_logs.check_seeds,
        "ask for the missing logs, or repeat the run with other seeds",
    ),
    distinct=(foreign_logs.check_distinct, "ask for the log of each seed"),
    artifact=(
        foreign_logs.check_artifact,
        "ask for files under the cap; runs over it do not count",
    ),
    size_sum=(foreign_logs.check_size_sum, "count the bytes of file and code yourself"),
    train_time=(
        foreign_logs.check_train_time,
        "ask what this clock counts; less than a step over is usual, as it is read between steps",
    ),
    eval_time=(
        foreign_logs.check_eval_time,
        "see which of these parts the score needs; if they alone are over, it does not count",
    ),
    stream=(foreign_logs.check_stream, "compare tokenizer and shards with those of the challenge"),
    whole_stream=(foreign_logs.check_whole_stream, "count the scored targets when you run it"),
    bytes_per_token=(
        foreign_logs.check_bytes_per_token,
        "count the bytes of the decoded text yourself",
    ),
    units=(foreign_logs.check_units, "take loss and bpb from the lines of the logs, not from here"),
    json_score=(foreign_json.check_json_score, "take the mean of the logs' scores as the result"),
    json_seeds=(foreign_json.check_json_seeds, "ask which log belongs to the number"),
    json_bytes=(foreign_json.check_json_bytes, "take the largest run's bytes"),
    code_bytes=(
        foreign_code.check_code_bytes,
        "ask for the script that wrote the logs; what lies here may do something else",
    ),
    source=(
        foreign_code.check_source,
        "read the differences between the log's source and the script",
    ),
    script=(foreign_code.check_script, "unpack and read it by hand"),
    hashed_targets=(
        foreign_code.check_hashed_targets,
        "sum the probabilities over the vocabulary at some place",
    ),
    updates_first=(
        foreign_code.pattern_check(
            field_script.updates_first, WARN, "no loop updates a cache, then asks it"
        ),
        "read whether what the cache learns there is scored already",
    ),
    siblings=(foreign_code.check_siblings, "count the bytes of every file that the script needs"),
    network=(
        foreign_code.pattern_check(field_script.network, WARN, "no network library, no download"),
        "run it without a network",
    ),
    pickle=(
        foreign_code.pattern_check(
            field_script.pickles, INFO, "no pickle, no torch.load of any object"
        ),
        "load its files only where they may run code",
    ),
    causal=(not_run, "change later tokens in a sandbox and compare earlier scores"),
    sums_to_one=(not_run, "sum the probabilities over the vocabulary in a sandbox"),
    one_pass=(not_run, "count in a sandbox how often each target is scored"),
)


def judge(path: Path) -> list[Verdict]:
    """All checks of a folder. Nothing in it can end them: a check that fails on odd content says
    so."""
    folder, verdicts = ForeignFolder(path), []
    for name, (function, advice) in CHECKS.items():
        try:
            verdict, evidence = function(folder)
        except Exception as error:  # one odd file must not hide what the other checks find
            verdict, evidence = CANNOT, f"this check failed: {type(error).__name__}: {error}"
        evidence = printable(" ".join(evidence.split()))
        verdicts.append(Verdict(name, verdict, evidence, "" if verdict == PASS else advice))
    return verdicts


def printable(text: str) -> str:
    """The text with what a terminal would obey instead of print, such as escapes, written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def summary(verdicts: list[Verdict]) -> str:
    """One line: how many checks have which verdict, and which fail."""
    counts = Counter(one.verdict for one in verdicts)
    said = ", ".join(f"{counts[one]} {one}" for one in reversed(ORDER) if counts[one])
    failed = [one.name for one in verdicts if one.verdict == FAIL]
    return f"{len(verdicts)} checks: {said}" + (f"; FAIL: {', '.join(failed)}" if failed else "")


def report(path: Path, as_json: bool) -> int:
    """Print the verdicts on a folder; returns the exit status, 1 if a check fails."""
    verdicts = judge(path)
    failed = any(one.verdict == FAIL for one in verdicts)
    if as_json:
        rows = [one._asdict() for one in verdicts]
        found = dict(folder=str(path), kind="foreign", passed=not failed, checks=rows)
        print(json.dumps(found, indent=2, allow_nan=False))
        return int(failed)
    for one in in_fewer_lines(verdicts):
        print(f"{one.verdict} {one.name} {one.evidence}")
        if one.verdict in (FAIL, WARN):
            print(f"     reviewer: {one.advice}")
    print(summary(verdicts))
    return int(failed)


def in_fewer_lines(verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts as they are printed: checks that cannot tell for the same reason share a line,
    the place of the first of them."""
    names: dict[str, list[str]] = {}
    for one in verdicts:
        if one.verdict == CANNOT:
            names.setdefault(one.evidence, []).append(one.name)
    shown = []
    for one in verdicts:
        if one.verdict != CANNOT:
            shown.append(one)
        elif one.name == names[one.evidence][0]:
            shown.append(one._replace(name=f"{', '.join(names[one.evidence])}:"))
    return shown


def table(root: Path) -> str:
    """Judge every folder in `root`. Returns two Markdown tables: how often each check gave each
    verdict, and which checks failed or warned in each folder."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    judged = {path.name: judge(path) for path in folders}
    shown = list(reversed(ORDER))
    lines = [f"| check | {' | '.join(shown)} |", "| --- |" + " --- |" * len(shown)]
    for name in CHECKS:
        counts = Counter(
            one.verdict for verdicts in judged.values() for one in verdicts if one.name == name
        )
        cells = [str(counts[verdict] or "") for verdict in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| folder | FAIL | WARN |", "| --- | --- | --- |"]
    for folder, verdicts in judged.items():
        cells = [
            ", ".join(one.name for one in verdicts if one.verdict == verdict)
            for verdict in (FAIL, WARN)
        ]
        lines.append(f"| {folder} | {' | '.join(cells)} |")
    return "\n".join(lines)
