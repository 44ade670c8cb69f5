"""What a reviewer would look at, on a CPU, without data. A check returns its evidence or raises a
RecordError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import probe
from .folder import FILES, Folder, read_text, split_page
from .log import Log, RecordError, first_difference, parse_log, require
from .run import LEAST_SEEDS, LIMITS, largest_total, read_systems, seed_of
from .tables import (
    SYSTEMS_PAGE,
    TRACKS,
    compliance,
    hardware,
    personal_facts,
    results_table,
    submission,
    systems_table,
    unsafe_reading,
    unscored,
)


@dataclass(frozen=True)
class Finding:
    name: str
    passed: bool
    evidence: str


def check(path: Path) -> list[Finding]:
    """All checks on a submission folder. RecordError: there is no such folder."""
    problem = "no such folder, expected one with train_gpt.py and submission.json"
    require(path.is_dir(), f"{path}: {problem}")
    folder, findings = Folder(path), []
    for name, function in CHECKS.items():
        try:
            passed, evidence = True, function(folder)
        except (RecordError, OSError) as error:
            passed, evidence = False, str(error)
        except Exception as error:  # one odd file must not hide what the other checks find
            passed, evidence = False, f"cannot be judged: {type(error).__name__}: {error}"
        findings.append(Finding(name, passed, evidence.replace(f"{path}/", "").replace("\n", " ")))
    return findings


def summary(findings: list[Finding]) -> str:
    failed = [finding.name for finding in findings if not finding.passed]
    verdict = f"not ready: {', '.join(failed)}" if failed else "ready"
    said = f"{len(findings) - len(failed)} of {len(findings)} checks passed: {verdict}"
    if failed and set(failed) <= {"source", "code_bytes"}:
        said += (
            "\nOnly the code has changed since the logs were written. To work on it, that is fine; "
            "a submission needs new logs, and then `make record`."
        )
    return said


def every(items, problem: Callable) -> None:
    """RecordError with the problems (text, or an error raised) of all items that have one."""
    found = []
    for item in items:
        try:
            found.append(problem(item))
        except RecordError as error:
            found.append(str(error))
    require(not any(found), "; ".join(filter(None, found)))


# --- the script and its files ---


def check_files(folder: Folder) -> str:
    every(FILES, lambda name: "" if (folder.path / name).is_file() else f"{name} is missing")
    gone = [path for path in folder.links if not path.exists() and path not in folder.figures()]
    every(gone, lambda path: f"{folder.links[path]} links to {path}, which is missing")
    return f"{', '.join(FILES)}, {len(folder.logs)} logs"


def check_compiles(folder: Folder) -> str:
    try:
        compile(folder.script, "train_gpt.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", 1)
        raise RecordError(f"train_gpt.py:{line}: {error}, expected Python") from None
    return "train_gpt.py"


def check_source(folder: Folder) -> str:
    def problem(log: Log) -> str:
        no = first_difference(log.source, folder.script)
        said = "the log does not begin with the source, expected that of train_gpt.py"
        if log.source:
            said = "the source differs from train_gpt.py: a log of another version; repeat the run"
        return no and f"{log.path}:{no}: {said}"

    every(folder.logs, problem)
    return f"the source in {len(folder.logs)} logs is train_gpt.py"


def check_code_bytes(folder: Folder) -> str:
    size = len(folder.script.encode())

    def problem(log: Log) -> str:
        line = log.find("Code size:")
        is_same = line.size == size
        said = f"{line.place}: Code size: {line.size}, but train_gpt.py has {size} bytes"
        return "" if is_same else said

    every(folder.logs, problem)
    return f"train_gpt.py and the logs: {size} bytes"


def check_reading(folder: Folder) -> str:
    found = unsafe_reading(folder.script)
    require(not found, f"train_gpt.py: {found}: a file that is read could run code")
    return "no pickle, no torch.load without weights_only, no eval"


# --- the logs ---


def check_logs(folder: Folder) -> str:
    """Complete, finite, in the right units, of the same code, settings and data."""
    warnings = [line for log in folder.logs for line in log.all("warning:")]
    older = [log for log in folder.logs if not log.has("result ")]
    said = f"{len(folder.runs)} complete runs of one code, one set of settings, the same data; "
    said += f"{len(older)} of an older script, without a result line; " if older else ""
    if warnings:
        return f"{said}{len(warnings)} warnings, {warnings[0].place}: {warnings[0].text}"
    return f"{said}no warnings"


def check_limit(name: str) -> Callable[[Folder], str]:
    """The check of one row of LIMITS."""
    limit = LIMITS[name]

    def problem(log: Log) -> str:
        value, place = limit.read(log)
        said = f"{place}: {value:{limit.digits}} {limit.what}"
        return value > limit.most and f"{said}, expected at most {limit.most} {limit.unit}"

    def check(folder: Folder) -> str:
        every(folder.logs, problem)
        value, place = max(map(limit.read, folder.logs), key=lambda found: found[0])
        said = f"{limit.extreme} {value:{limit.digits}} of {limit.most} {limit.unit}"
        return f"{said} ({place})"

    return check


def check_seeds(folder: Folder) -> str:
    seeds = sorted({seed_of(log) for log in folder.logs})
    said = ", ".join(map(str, seeds))
    problem = f"{len(seeds)} seeds ({said}), expected at least {LEAST_SEEDS}"
    require(len(seeds) >= LEAST_SEEDS, problem)
    return said


def check_hardware(folder: Folder) -> str:
    """The record track is run on 8 x H100."""
    found, track = hardware(folder.runs), folder.submission.get("track")
    if track == TRACKS[0]:
        place = json_place(folder, "track")
        fits = all(re.fullmatch(r"8 x .*H100.*", part) for part in found.split("; "))
        problem = f"track {track} is for 8 x H100, the logs say {found}; use {TRACKS[1]}"
        require(fits, f"{place}: {problem}")
        problem = f"says 'no record', but the track is {track}; rewrite what it says of the results"
        require("no record" not in read_text(folder.readme), f"{folder.readme}: {problem}")
    return f"{found}, track {track}"


def check_stream(folder: Folder) -> str:
    """A folder for the record track must be scored on one of the challenge's validation streams."""
    log = folder.runs[0].log
    line, val, unknown = (log.find(f"data:{part} ") for part in ("stream", "val", "unknown"))
    known_by, track = line.get("known_by", "nothing"), folder.submission.get("track")
    if track == TRACKS[0]:
        problem = f"track {track} is scored on a whole validation stream of the challenge"
        line.require(known_by.startswith("length"), f"but {problem}; use {TRACKS[1]}")
    name = f"{line['name']}, known by {known_by}"
    if line["name"] == "unknown":
        name = "none of the challenge's"
    return (
        f"{name}; {val['tokens']} tokens, sha256 {val['sha256']} "
        f"({val.place}), {unknown['tokens']} of them unknown to the tokenizer"
    )


def check_scored_once(folder: Folder) -> str:
    every(folder.logs, unscored)
    line = folder.logs[0].find("ngram_audit")
    return f"targets:{line['targets']} ({line.place}), as many as val_targets, in each log"


def check_audit(folder: Folder) -> str:
    """The run recounted and enumerated samples of its own mixture."""

    def problem(log: Log) -> str:
        line = log.find("ngram_audit")
        if min(line.number(key) for key in ("recounted", "enumerated", "prefix")) <= 0:
            return f"{line.place}: nothing was recounted, enumerated or counted alone"
        masses = [line.number(key) for key in ("mass_min", "mass_max")]
        far = max(abs(mass - 1) for mass in masses)
        return far > 1e-9 and f"{line.place}: masses {masses}, expected 1"

    every(folder.logs, problem)
    line = folder.logs[0].find("ngram_audit")
    return f"{line.place}: {line.text}; the like in each log"


def check_compliance(folder: Folder) -> str:
    found = compliance(folder.runs)
    broken = [name for name, holds in found.items() if not holds]
    require(not broken, f"the logs do not show {', '.join(broken)}")
    return f"the logs show {', '.join(found)}"


# --- what is said of them ---


def check_json(folder: Folder) -> str:
    """Every field that logs decide equals them, to the last digit; no other field."""
    expected = submission(folder.runs, personal_facts(folder.path, {}))
    for keys, its, mine in differences(expected, folder.submission):
        place, name = json_place(folder, *keys), ".".join(keys)
        problem = f"{name} is {its}, the logs say {mine}; `python -m record report` writes it"
        raise RecordError(f"{place}: {problem}")
    return f"{len(expected)} fields as the logs say"


def differences(expected, found, keys: tuple[str, ...] = ()):
    """(keys to a field, what was found, what was expected) where two JSON objects differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            mine, its = expected.get(key, "no such field"), found.get(key, "missing")
            yield from differences(mine, its, (*keys, key))
    elif expected != found or type(expected) is not type(found):
        yield keys, found, expected


def json_place(folder: Folder, *keys: str) -> str:
    """file:line of a field of submission.json, about: the first lines that have its keys, in
    order."""
    path, at = folder.path / "submission.json", 0
    lines = [line.replace('" :', '":') for line in read_text(path).split("\n")]
    for key in keys:
        found = (
            no
            for no in range(at, len(lines))
            if f"{json.dumps(key, allow_nan=False)}:" in lines[no]
        )
        at = next(found, at)
    return f"{path}:{at + 1}"


def check_bytes_of_json(folder: Folder) -> str:
    found = folder.submission.get("bytes_total")
    size, place = max(map(largest_total, folder.logs), key=lambda total: total[0])
    at = json_place(folder, "bytes_total")
    require(found == size, f"{at}: bytes_total is {found}, but {place} says {size} bytes")
    return f"bytes_total is the largest of the logs: {size}"


def check_units_of_json(folder: Folder) -> str:
    loss, bpb = (folder.submission.get(key) for key in ("val_loss", "val_bpb"))
    for key, value in (("val_loss", loss), ("val_bpb", bpb)):
        is_positive = isinstance(value, (int, float)) and 0 < value < math.inf
        problem = f"{key} is {value!r}, expected a positive number"
        require(is_positive, f"{json_place(folder, key)}: {problem}")
    place, ratio = json_place(folder, "val_loss"), loss / math.log(2) / bpb
    problem = f"val_loss {loss} equals val_bpb: nats per token and bits per byte differ"
    require(loss != bpb, f"{place}: {problem}")
    scores = [
        (line.number("val_loss") / math.log(2) / line.number("val_bpb"), line.place)
        for log in folder.logs
        for line in reversed(log.all("final_"))
        if "val_loss" in line and "val_bpb" in line and line["val_loss"] != line["val_bpb"]
    ]
    expected, where = (scores or [(ratio, "no log says")])[0]
    require(
        abs(ratio / expected - 1) <= 1e-3,  # four digits, as others write them
        f"{place}: val_loss {loss} / ln 2 / val_bpb {bpb} = {ratio:.4f} bytes per token, but "
        f"{expected:.4f} in {where}: is one of them in other units?",
    )
    return f"val_loss / ln 2 / val_bpb = {ratio:.4f} bytes per token ({where})"


def check_readme(folder: Folder) -> str:
    """The results table, and that of systems where their logs lie, are as the logs say, to the last
    digit."""
    parts = [("results", folder.readme, "report", results_table(folder.runs, folder.path))]
    counts = [len(folder.runs)]
    if folder.systems_logs:
        runs = read_systems([parse_log(path) for path in folder.systems_logs])
        parts.append(("systems", folder.path / SYSTEMS_PAGE, "systems", systems_table(runs)))
        counts.append(len(folder.systems_logs))
    for part, page, command, table in parts:
        before, between, _ = split_page(page, part)
        expected = f"\n{table}\n"
        if no := first_difference(between, expected):
            found, wanted = ((text.split("\n") + [""] * no)[no - 1] for text in (between, expected))
            raise RecordError(
                f"{page}:{before.count(chr(10)) + no}: found {found[:200]!r}, the logs say "
                f"{wanted[:200]!r}; `python -m record {command}` writes it"
            )
    return " and ".join(
        f"the {part} table is that of {count} logs" for (part, *_), count in zip(parts, counts)
    )


def check_figures(folder: Folder) -> str:
    figures = folder.figures()
    problem = (
        "shows no figures; `python -m record plot` draws them and puts them between "
        "<!-- figures:begin --> and <!-- figures:end -->"
    )
    require(figures, f"{folder.readme}: {problem}")
    gone = [path for path in figures if not path.is_file() or not path.stat().st_size]
    every(gone, lambda path: f"{path}: README shows it, but it is missing or empty")
    return f"{len(figures)} shown by README, all here"


# --- what only running the script can tell ---


def probed(folder: Folder) -> dict[str, list]:
    """{check: [passed, evidence]}"""
    return probe.run_probe(folder.script, json.dumps(folder.logs[0].settings, allow_nan=False))


def check_by_probe(name: str) -> Callable[[Folder], str]:
    def check(folder: Folder) -> str:
        passed, evidence = probed(folder)[name]
        require(passed, evidence)
        return evidence

    return check


def check_parameters(folder: Folder) -> str:
    """The model that the logged settings make has as many parameters as the log says."""

    def problem(log: Log) -> str:
        lines = log.all("model_params:") + [x for x in log.all("averaging:") if "parameters" in x]
        if not lines:
            log.find("averaging:")
        if not log.settings:
            problem = "but the log lists no settings to count them by"
            return f"{lines[0].place}: {lines[0].text[:80]!r}, {problem}"
        passed, count = probed(folder)["parameters"]
        if not passed:
            return count
        for line in lines:
            name = "parameters" if "parameters" in line else "model_params"
            if line.number(name) != int(count):
                return f"{line.place}: {name}:{line[name]}, but its settings make {count}"
        return ""

    every(folder.logs, problem)
    return f"{probed(folder)['parameters'][1]}, as in the logs"


CHECKS = dict(
    files=check_files,
    compiles=check_compiles,
    imports=check_by_probe("imports"),
    logs=check_logs,
    source=check_source,
    code_bytes=check_code_bytes,
    parameters=check_parameters,
    artifact=check_limit("artifact"),
    train_time=check_limit("train_time"),
    eval_time=check_limit("eval_time"),
    seeds=check_seeds,
    hardware=check_hardware,
    stream=check_stream,
    json=check_json,
    json_bytes=check_bytes_of_json,
    json_units=check_units_of_json,
    readme=check_readme,
    figures=check_figures,
    scored_once=check_scored_once,
    self_audit=check_audit,
    compliance=check_compliance,
    safe_reading=check_reading,
    causal=check_by_probe("causal"),
    sums_to_one=check_by_probe("sums_to_one"),
    one_pass=check_by_probe("one_pass"),
)
