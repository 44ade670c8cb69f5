"""What a reviewer would look at, on a CPU, without data. A check returns its evidence or raises a
RecordError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from . import probe, prose
from .figures import FIGURES, faults
from .folder import FILES, Folder, read_text, split_page
from .log import Log, RecordError, first_difference, parse_log, require
from .rescore import require_its_file
from .run import LEAST_SEEDS, LIMITS, largest_total, read_systems, seed_of
from .submission import PERSONAL, contradicted, personal_facts, submission
from .tables import (
    SYSTEMS_PAGE,
    TRACKS,
    compliance,
    hardware,
    results_table,
    systems_table,
    unsafe_reading,
    unscored,
)


@dataclass(frozen=True)
class Finding:
    name: str
    passed: bool | None  # None: not judged, as it rests on what another check has refused
    evidence: str

    @property
    def verdict(self) -> str:
        return {True: "PASS", False: "FAIL", None: "SKIP"}[self.passed]


def check(path: Path, left_out: Collection[str] = ()) -> list[Finding]:
    """All checks on a submission folder but those `left_out`. What fails in several checks for one
    cause, the same message or the same line of a file, is reported by the first. RecordError: there
    is no such folder."""
    problem = "no such folder, expected one with train_gpt.py and submission.json"
    require(path.is_dir(), f"{path}: {problem}")
    folder, findings, causes = Folder(path), [], {}
    for name, function in CHECKS.items():
        if name in left_out:
            continue
        passed = False
        try:
            passed, evidence = True, function(folder)
        except (RecordError, OSError) as error:
            evidence = str(error)
        except Exception as error:  # one odd file must not hide what the other checks find
            evidence = f"cannot be judged: {type(error).__name__}: {error}"
        evidence = evidence.replace(f"{path}/", "").replace("\n", " ")
        if not passed:
            # line 1 stands for a whole file
            line = re.match(r"[^\s:]+:(?!1:)\d+: |", evidence)[0] or evidence
            first = causes.setdefault(evidence, causes.setdefault(line, name))
            if first != name:
                passed, evidence = None, f"not judged: it rests on what {first} refuses"
        findings.append(Finding(name, passed, evidence))
    return findings


def summary(findings: list[Finding]) -> str:
    failed = [finding.name for finding in findings if finding.passed is False]
    skipped = [finding.name for finding in findings if finding.passed is None]
    verdict = f"not ready: {', '.join(failed)}" if failed else "ready"
    passed = len(findings) - len(failed) - len(skipped)
    more = f", {len(skipped)} not judged" if skipped else ""
    said = f"{passed} of {len(findings)} checks passed{more}: {verdict}"
    if failed and not skipped and set(failed) <= {"source", "code_bytes"}:
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
    asked = [name for name in asked_for(read_text(folder.readme)) if not is_there(folder, name)]
    advice = "which this folder lacks; leave it out, or say it for readers of this folder alone"
    every(asked, lambda name: f"{folder.readme} asks for {name!r}, {advice}")
    scored = [log for log in folder.logs if artifact_of(folder, log).is_file()]
    every(scored, lambda log: require_its_file(artifact_of(folder, log), log))
    more = f", the artifact that {len(scored)} of them scored" if scored else ""
    return f"{', '.join(FILES)}, {len(folder.logs)} logs{more}"


def artifact_of(folder: Folder, log: Log) -> Path:
    """Where the log says that its artifact lies, inside the folder; nowhere if it does not say."""
    name = log.find("artifact:")["artifact"] if log.has("artifact:") else ""
    path = folder.path / name
    is_inside = path.resolve().is_relative_to(folder.path.resolve())
    return path if name and is_inside else folder.path / "no artifact"


# What a README asks for that only this project has: make, its folders, its packages.
ASKED = re.compile(
    r"(?<![\w./~$-])(make(?= [a-z])|\.venv/|-m (?:record|bench|studies|tools|examples)\b"
    r"|(?:tests|runs|record|bench|studies|tools|examples|docs)/[\w./-]*\w)"
)


def asked_for(page: str) -> list[str]:
    """What the code in a page, between backticks, asks for of what ASKED lists, each once."""
    code = re.findall(r"```.*?```|`[^`\n]+`", page, re.S)
    return list(dict.fromkeys(found for text in code for found in ASKED.findall(text)))


def is_there(folder: Folder, name: str) -> bool:
    """Does the folder have what `asked_for` found?"""
    if name in ("make", ".venv/"):  # make sets up .venv
        return (folder.path / "Makefile").is_file()
    return (folder.path / name.removeprefix("-m ")).exists()


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
    """The check of one row of LIMITS. The track for runs that are no record has no time limits, but
    wants README to say so of longer ones."""
    limit = LIMITS[name]

    def check(folder: Folder) -> str:
        value, place = max(map(limit.read, folder.logs), key=lambda found: found[0])
        is_over = value > limit.most
        is_free = is_over and limit.unit == "s" and track_of(folder) == TRACKS[1]
        said = f"{limit.extreme} {value:{limit.digits}} of {limit.most} {limit.unit} ({place})"
        if is_free and re.search(r"unlimited[\s-]+compute", read_text(folder.readme), re.I):
            return f"{said}: unlimited compute, as README says"
        more = f"; on the track {TRACKS[1]} README must say 'unlimited compute'" if is_free else ""

        def problem(log: Log) -> str:
            value, place = limit.read(log)
            said = f"{place}: {value:{limit.digits}} {limit.what}"
            is_over = value > limit.most
            return f"{said}, expected at most {limit.most} {limit.unit}{more}" if is_over else ""

        every(folder.logs, problem)
        return said

    return check


def track_of(folder: Folder) -> str:
    """The track of submission.json; empty if that cannot be read."""
    try:
        return str(folder.submission.get("track", ""))
    except RecordError:
        return ""


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


CHECKED_ALONE = {
    *(limit.rule for limit in LIMITS.values()),
    *("three_seeds", "same_code", "each_target_scored_once", "distribution_sums_to_one"),
    "no_pickle",
}


def check_compliance(folder: Folder) -> str:
    """The rules that have no check of their own; all of them stand in submission.json."""
    found = compliance(folder.runs)
    broken = [name for name, holds in found.items() if not holds and name not in CHECKED_ALONE]
    require(not broken, f"the logs do not show {', '.join(broken)}")
    return f"the logs show {', '.join(name for name, holds in found.items() if holds)}"


# --- what is said of them ---


def check_json(folder: Folder) -> str:
    """Every field that logs decide equals them, to the last digit, and a person's own fields do not
    contradict them."""
    said = personal_facts(folder.path, {})
    expected = submission(
        folder.runs, {key: said[key] for key in said if key in (*PERSONAL, "home")}
    )
    for keys, its, mine in differences(expected, folder.submission):
        place, name = json_place(folder, *keys), ".".join(keys)
        problem = f"{name} is {its}, the logs say {mine}; `python -m record report` writes it"
        raise RecordError(f"{place}: {problem}")
    name, known = contradicted(folder.submission, folder.runs)
    problem = f"{name} is {said.get(name)}, the logs say {known}; correct it, or leave it out"
    require(not name, f"{json_place(folder, name)}: {problem}")
    own = [name for name in said if name not in expected]
    more = f"; {', '.join(own)}: a person's own" if own else ""
    return f"{len(expected)} fields as the logs say{more}"


def differences(expected, found, keys: tuple[str, ...] = ()):
    """(keys to a field, what was found, what was expected) where the JSON object `found` says
    something else than `expected`, or has a seed more."""
    if isinstance(expected, dict) and isinstance(found, dict):
        more = [key for key in found if key not in expected and keys == ("seed_results",)]
        for key in [*expected, *more]:
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
    problem = "no log says a val_loss and a val_bpb that it could be compared with"
    require(scores, f"{place}: {problem}; expected a line final_..._exact in each")
    expected, where = scores[0]
    require(
        abs(ratio / expected - 1) <= 1e-3,  # four digits, as others write them
        f"{place}: val_loss {loss} / ln 2 / val_bpb {bpb} = {ratio:.4f} bytes per token, but "
        f"{expected:.4f} in {where}: is one of them in other units?",
    )
    return f"val_loss / ln 2 / val_bpb = {ratio:.4f} bytes per token ({where})"


def check_readme(folder: Folder) -> str:
    """The results table, and that of systems where their logs lie, are as the logs say, to the last
    digit, and so are figures in sentences that the pages mark as theirs."""
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
    pages = [folder.readme, *(path for path in folder.links if path.suffix == ".md")]
    pages = [page for page in dict.fromkeys(pages) if page.is_file()]
    every((fault for page in pages for fault in prose.stale(page, folder)), lambda fault: fault)
    marked = sum(len(sources) for page in pages for _, sources in prose.claims(page))
    tables = " and ".join(
        f"the {part} table is that of {count} logs" for (part, *_), count in zip(parts, counts)
    )
    return f"{tables}; {marked} marked figures in sentences are theirs"


def check_figures(folder: Folder) -> str:
    figures = folder.figures()
    problem = (
        "shows no figures; `python -m record plot` draws them and puts them between "
        "<!-- figures:begin --> and <!-- figures:end -->"
    )
    require(figures, f"{folder.readme}: {problem}")
    gone = [path for path in figures if not path.is_file() or not path.stat().st_size]
    every(gone, lambda path: f"{path}: README shows it, but it is missing or empty")
    every(faults(figures, folder.logs), lambda fault: fault)
    drawn = sum(path.stem.rpartition("_")[0] in FIGURES for path in figures)
    return f"{len(figures)} shown by README, all here; {drawn} show the numbers of the logs"


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
