#!/usr/bin/env python3
"""Logs in, a record out: results table, submission.json, preflight, figures,
and the folder for records/.

    python make_record.py report logs/seed*.txt --author ... --date ...
                                                         README's table and submission.json
    python make_record.py check                          would a reviewer accept this folder?
    python make_record.py plot                           figures into logs/ and README
    python make_record.py view logs/seed1337_scores.npz  the scored text, coloured, as HTML
    python make_record.py copy ~/parameter-golf          records/<track>/<date>_<Name>/

All numbers come from the logs that train_gpt.py writes; a person gives only names and a date. Same
logs in, same bytes out. What cannot be true (NaN, a loss that is a bpb, seeds of different code,
...) is refused in one line that names the file and the line. Losses are nats per token, bpb bits
per byte, sizes bytes (1 MB = 1,000,000).
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

RULE = "=" * 100  # the line that ends the source in a log
SIZE_CAP = 16_000_000  # bytes, code + weights; this and the next three: the challenge's rules
TRAIN_LIMIT = 600.0  # seconds
EVAL_LIMIT = 600.0  # seconds
LEAST_SEEDS = 3
TRACKS = "10min_16mb", "non_record_16mb"


class RecordError(Exception):
    """What cannot be used. The message is one line: place (file:line), what was found, expected,
    to be done."""


# --- 1. Logs --------------------------------------------------------------------------------------

PAIR = re.compile(r"([^\s:]+):(.*)", re.S)
SETTING = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
NUMBER = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf))(ms|s| bytes)?", re.I
)


class Line(dict):
    """The `key:value` pairs of one line of a log, as text, e.g. {"train_time": "42942ms"}. Words
    without a colon belong to the value before them: `hardware:2 x H100 threads:4` has the keys
    hardware and threads."""

    def __init__(self, path: Path, no: int, text: str):
        super().__init__()
        self.path, self.no, self.text, key = path, no, text, None
        for word in text.split():
            if match := PAIR.fullmatch(word):
                key, self[match[1]] = match[1], match[2]
            elif key:
                self[key] = f"{self[key]} {word}".strip()

    @property
    def place(self) -> str:
        return f"{self.path}:{self.no}"

    def error(self, problem: str) -> RecordError:
        return RecordError(f"{self.place}: found {self.text[:160]!r}, {problem}")

    def __missing__(self, key: str):
        raise self.error(f"expected {key}:... on it; a log of another script?")

    def number(self, key: str) -> float:
        """The value of `key` without its unit (ms, s, bytes). RecordError: missing, no number,
        NaN or infinite."""
        match = NUMBER.fullmatch(self[key])
        if not match:
            raise self.error(f"expected a number after {key}:")
        if not math.isfinite(float(match[1])):
            raise self.error(f"{key} is not finite: the run diverged; repeat it with lower rates")
        return float(match[1])

    def seconds(self, key: str) -> float:
        """The time after `key` in seconds. RecordError: as `number`,
        or its unit is neither ms nor s."""
        value, unit = self.number(key), NUMBER.fullmatch(self[key])[2]
        if unit not in ("ms", "s"):
            raise self.error(f"expected a time in ms or s after {key}:")
        return value / 1e3 if unit == "ms" else value


@dataclass(frozen=True)
class Step:
    """One `train_loss` line: seconds of training so far, nats per token,
    share of the peak learning rate."""

    no: int
    step: int
    seconds: float
    loss: float
    lr_scale: float | None  # None: an older log, which does not say


@dataclass(frozen=True)
class Validation:
    """One `step:... val_loss` line: seconds of training so far, nats per token, bits per byte."""

    no: int
    step: int
    seconds: float
    loss: float
    bpb: float


@dataclass(frozen=True)
class Log:
    """A parsed log of train_gpt.py, or of an older script of the field: then `source` and
    `settings` are empty."""

    path: Path
    source: str  # train_gpt.py as it ran
    settings: dict[str, str]  # NAME=value, as text
    lines: tuple[tuple[int, str], ...]  # (line number from 1, text) of what follows the source

    @property
    def name(self) -> str:
        """RUN_ID, or what train_gpt.py put in its place: the file name without its ending."""
        return self.path.stem

    def all(self, prefix: str) -> list[Line]:
        """Every line that starts with `prefix`, in order, as key:value pairs."""
        return [Line(self.path, no, text) for no, text in self.lines if text.startswith(prefix)]

    def find(self, prefix: str) -> Line:
        """The last line that starts with `prefix`. RecordError: there is none."""
        if found := self.all(prefix):
            return found[-1]
        last = self.lines[-1][0] if self.lines else 1
        raise RecordError(
            f"{self.path}:{last}: the log ends without a line {prefix!r}: cut short, or of another "
            f"script; repeat the run"
        )

    def has(self, prefix: str) -> bool:
        return any(text.startswith(prefix) for _, text in self.lines)

    def setting(self, name: str) -> str:
        """The value of a setting. RecordError: the log does not list it."""
        if name not in self.settings:
            raise RecordError(
                f"{self.path}:1: found no setting {name}=..., expected train_gpt.py's header"
            )
        return self.settings[name]

    def line_of(self, prefix: str) -> int:
        """The number of the first line that starts with `prefix`, 1 if there is none:
        where to point a finger."""
        return next((no for no, text in self.lines if text.startswith(prefix)), 1)

    @cached_property
    def train_steps(self) -> list[Step]:
        """The `train_loss` lines. A resumed run begins after step 0;
        what an earlier try left is not repeated."""
        return [
            Step(
                line.no,
                step_of(line),
                line.seconds("train_time"),
                line.number("train_loss"),
                line.number("lr_scale") if "lr_scale" in line else None,
            )
            for line in self.all("step:")
            if "train_loss" in line
        ]

    @cached_property
    def validations(self) -> list[Validation]:
        """The validations during training and at its end."""
        return [
            Validation(
                line.no,
                step_of(line),
                line.seconds("train_time"),
                line.number("val_loss"),
                line.number("val_bpb"),
            )
            for line in self.all("step:")
            if "val_bpb" in line
        ]


def step_of(line: Line) -> int:
    """500 of `step:500/20000`."""
    if not re.fullmatch(r"\d+(/\d+)?", line["step"]):
        raise line.error("expected step:<number>/<number>")
    return int(line["step"].split("/")[0])


def parse_log(path: Path | str) -> Log:
    """Reads a log: source up to the first line of 100 `=`, settings, lines. RecordError: no text,
    unreadable."""
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; expected a log of train_gpt.py") from None
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: byte {error.start} is not UTF-8, expected a log of train_gpt.py"
        ) from None
    source, rule, rest = text.partition(f"\n{RULE}\n")
    source, rest = (source, rest) if rule else ("", text)
    start = source.count("\n") + 3 if rule else 1  # number of the first line after the rule
    lines = tuple(
        (no, line.rstrip("\r")) for no, line in enumerate(rest.split("\n"), start) if line.strip()
    )
    settings = dict(match.groups() for _, line in lines if (match := SETTING.fullmatch(line)))
    return Log(path, source, settings, lines)


# --- 2. Runs --------------------------------------------------------------------------------------
# One finished run: its numbers, each checked against what else the log says
# before anybody may use it.

# may differ between the seeds of one result; what the paths lead to is compared by SHA-256
FREE_SETTINGS = {
    "SEED",
    "RUN_ID",
    "RESUME",
    "SAVE_SCORES",
    "CHECKPOINT_EVERY",
    "DATA_PATH",
    "TRAIN_DATA_PATH",
    "TOKENIZER_PATH",
}


@dataclass(frozen=True)
class Run:
    log: Log
    seed: int
    neural: float  # bits per byte, sliding window, without counts
    val_loss: float  # nats per token, mixed
    val_bpb: float  # bits per byte, mixed: the score
    gain: float  # neural - val_bpb
    steps: int
    step_avg_ms: float
    train_s: float
    eval_s: float
    artifact_bytes: int  # code included
    code_bytes: int
    audit: Line  # what ngram_audit found


def read_run(log: Log) -> Run:
    """The numbers of a complete run of train_gpt.py. RecordError: anything missing,
    cut short or impossible."""
    refuse_unfinished(log)
    total = log.find("total_eval_time:")
    neural, mixed = sliding(log), log.find("final_ngram_exact")
    check_units(log)
    gain = neural.number("val_bpb") - mixed.number("val_bpb")
    if abs(gain - mixed.number("gain")) > 2e-8:
        raise mixed.error(
            f"expected gain:{gain:.8f}, neural ({neural.place}) - mixed; lines of two runs?"
        )
    last, (code, size) = last_validation(log), submission_bytes(log)
    return Run(
        log=log,
        seed=seed_of(log),
        neural=neural.number("val_bpb"),
        val_loss=mixed.number("val_loss"),
        val_bpb=mixed.number("val_bpb"),
        gain=mixed.number("gain"),
        steps=step_of(last),
        step_avg_ms=round(1e3 * last.seconds("step_avg"), 6),
        train_s=last.seconds("train_time"),
        eval_s=total.seconds("total_eval_time"),
        artifact_bytes=size,
        code_bytes=code,
        audit=log.find("ngram_audit"),
    )


def refuse_unfinished(log: Log) -> None:
    """RecordError: the run died, is another one than its name says, trained nothing,
    or has no honest score."""
    for line in log.all("error:"):
        raise line.error("expected a run without errors; repeat or RESUME it")
    for line in log.all("warning: SEED="):
        raise line.error(
            "expected one seed from the first step on; RESUME with that of the checkpoint"
        )
    totals = log.all("total_eval_time:")
    if len(totals) > 1:
        raise totals[1].error(
            f"a second run in one log, the first ended in line {totals[0].no}; use one log per run"
        )
    for line in [] if log.has("final_ngram_exact") else log.all("final_ngram_hashed"):
        raise line.error(
            "hashed counts are no probability and have no bpb; run with NGRAM_COUNTS=exact"
        )
    run_id = log.setting("RUN_ID")
    if run_id and not re.fullmatch(rf"{re.escape(run_id)}(_\d+)?", log.name):
        raise RecordError(
            f"{log.path}:{log.line_of('RUN_ID=')}: found RUN_ID={run_id}, expected the file to be "
            f"named {run_id}.txt: the log of another run?"
        )
    if log.settings.get("EVAL_ONLY"):
        raise RecordError(
            f"{log.path}:{log.line_of('EVAL_ONLY=')}: the run trained nothing (EVAL_ONLY), "
            "expected training and scoring in one log"
        )
    steps = log.train_steps
    if steps and steps[0].step != 1 and not log.has("resume:"):
        raise RecordError(
            f"{log.path}:{steps[0].no}: training begins at step {steps[0].step}, expected step 1 "
            "or a line resume:...; lines are missing"
        )
    for before, after in zip(steps, steps[1:]):
        if after.step <= before.step:
            raise RecordError(
                f"{log.path}:{after.no}: step {after.step} follows step {before.step} of line "
                f"{before.no}: two runs in one log; use one log per run"
            )


def sliding(log: Log) -> Line:
    """The exact sliding-window score of the packed weights, whatever their bits."""
    names = (f"final_int{bits}_sliding_window_exact" for bits in range(3, 9))
    return log.find(next(filter(log.has, names), "final_int6_sliding_window_exact"))


def last_validation(log: Log) -> Line:
    """The validation that ended training. RecordError: there is none,
    or its times contradict each other."""
    last = ([line for line in log.all("step:") if "val_bpb" in line] or [None])[-1]
    if not last or log.train_steps and step_of(last) < log.train_steps[-1].step:
        raise RecordError(
            f"{log.path}:{log.lines[-1][0] if log.lines else 1}: the log ends without a line "
            "step:... val_loss:... val_bpb:... after training; repeat the run"
        )
    steps = step_of(last)
    ms = 1e3 * last.seconds("train_time")
    average = 1e3 * last.seconds("step_avg")
    if steps < 1 or abs(ms / steps - average) > 0.01 + 1 / steps:
        raise last.error("expected train_time / step = step_avg")
    return last


def check_units(log: Log) -> None:
    """Every val_loss (nats per token) and val_bpb (bits per byte) must fit the
    stream's bytes per token."""
    header = log.find("train_tokens:")
    if min(header.number("val_bytes"), header.number("val_targets")) < 1:
        raise header.error("expected a validation stream")
    bytes_per_target = header.number("val_bytes") / header.number("val_targets")
    for line in [*log.all("final_"), *(line for line in log.all("step:") if "val_bpb" in line)]:
        if "val_loss" not in line or "val_bpb" not in line:
            continue
        loss, bpb = line.number("val_loss"), line.number("val_bpb")
        if loss == bpb:
            raise line.error(
                "val_loss equals val_bpb, expected nats per token and bits per byte: "
                "one is the other"
            )
        far = 1e-6 if "exact" in line.text else 1e-3
        if bpb <= 0 or abs(loss / math.log(2) / bpb / bytes_per_target - 1) > far:
            raise line.error(
                f"expected val_loss / ln 2 / val_bpb = {bytes_per_target:.6f} bytes per token, "
                f"as in line {header.no} (val_bytes / val_targets); found "
                f"{loss / math.log(2) / bpb if bpb else math.nan:.6f}"
            )


def submission_bytes(log: Log) -> tuple[int, int]:
    """(code bytes, code + model bytes). RecordError: they contradict each other or the source,
    or break the cap."""
    lines = [
        log.find(start)
        for start in ("Serialized model int", "Code size:", "Total submission size int")
    ]
    (model, code, total), (_, code_line, total_line) = map(bytes_of, lines), lines
    if model + code != total:
        raise total_line.error(
            f"expected {model + code} bytes, the sum of lines {lines[0].no} and {code_line.no}"
        )
    if log.source and len(log.source.encode()) != code:
        raise code_line.error(
            f"but the source above it has {len(log.source.encode())} bytes: not the log of one run"
        )
    if total > SIZE_CAP:
        raise total_line.error(f"expected at most {SIZE_CAP} bytes; this run cannot be submitted")
    return code, total


def bytes_of(line: Line) -> int:
    """N of a line that says `...: N bytes`."""
    match = re.search(r": (\d+) bytes\b", line.text)
    if not match:
        raise line.error("expected a size in bytes")
    return int(match[1])


def seed_of(log: Log) -> int:
    """SEED of the settings, or an older log's `seed:1337`."""
    text = log.settings.get("SEED") or (
        log.find("seed:")["seed"] if log.has("seed:") else log.setting("SEED")
    )
    if not text.isdigit():
        raise RecordError(
            f"{log.path}:{log.line_of('SEED=')}: found SEED={text}, expected an integer"
        )
    return int(text)


def check_same_experiment(logs: list[Log]) -> None:
    """Seeds of one result share code, settings and data; RecordError names the first difference."""
    first, seeds = logs[0], {}
    for log in logs:
        seed = seed_of(log)
        if seed in seeds:
            raise RecordError(
                f"{log.path}:{log.line_of('SEED=')}: seed {seed} is also that of {seeds[seed]}, "
                "expected each seed once; leave one out"
            )
        seeds[seed] = log.path
        no = first_difference(log.source, first.source)
        if no:
            raise RecordError(
                f"{log.path}:{no}: the source differs from that in {first.path}:{no}, expected the "
                "same code for all seeds; repeat the older runs"
            )
        for name in sorted(set(log.settings) | set(first.settings)):
            mine, its = log.settings.get(name), first.settings.get(name)
            if mine != its and name not in FREE_SETTINGS:
                raise RecordError(
                    f"{log.path}:{log.line_of(f'{name}=')}: found {name}={mine}, but {its} in "
                    f"{first.path}:{first.line_of(f'{name}=')}; only "
                    f"{', '.join(sorted(FREE_SETTINGS))} may differ"
                )
        check_same_data(log, first)


def check_same_data(log: Log, first: Log) -> None:
    """RecordError names the first line by which two runs were trained or
    scored on different data."""
    for mine, its in zip(data_lines(log), data_lines(first)):
        if {**mine, "first": ""} != {**its, "first": ""}:
            raise mine.error(
                f"other data than {its.place} ({its.text[:120]!r}), expected the same for all logs"
            )


def data_lines(log: Log) -> list[Line]:
    """What was trained and scored on: shards, tokenizer, sizes."""
    return [
        log.find(start)
        for start in ("data:train ", "data:val ", "data:tokenizer ", "train_tokens:")
    ]


def first_difference(a: str, b: str) -> int:
    """Number of the first line that differs, from 1; 0: the texts are equal."""
    if a == b:
        return 0
    pairs = zip(a.split("\n"), b.split("\n"))
    return next(
        (no for no, (x, y) in enumerate(pairs, 1) if x != y), min(a.count("\n"), b.count("\n")) + 2
    )


def read_runs(logs: list[Log]) -> list[Run]:
    """The runs of one result, by seed."""
    runs = [read_run(log) for log in logs]
    check_same_experiment(logs)
    return sorted(runs, key=lambda run: run.seed)


# --- 3. Report ------------------------------------------------------------------------------------
# README's table and submission.json are functions of the logs and of what a person
# says about the submission.

PERSONAL = {  # what no log knows: --help text of the flag
    "author": "who made it",
    "github_id": "GitHub account",
    "name": "title of the submission",
    "blurb": "one or two sentences on what it does",
    "date": "of the submission, YYYY-MM-DD",
    "track": f"{' or '.join(TRACKS)}",
}
COLUMNS = (  # heading, value of a run, format
    ("step_avg", lambda run: run.step_avg_ms, "{:.2f} ms"),
    ("steps", lambda run: run.steps, "{:,.0f}"),
    ("neural bpb", lambda run: run.neural, "{:.5f}"),
    ("**mixed bpb**", lambda run: run.val_bpb, "**{:.5f}**"),
    ("gain", lambda run: run.gain, "{:.5f}"),
    ("eval s", lambda run: run.eval_s, "{:.1f}"),
    ("artifact bytes", lambda run: run.artifact_bytes, "{:,.0f}"),
)


def results_table(runs: list[Run], folder: Path) -> str:
    """The table between README's markers: a row per seed, linked to its log; mean;
    sample standard deviation."""
    rows = [["Seed", *(heading for heading, _, _ in COLUMNS)], ["---"] * (1 + len(COLUMNS))]
    rows += [
        [
            f"[{run.seed}]({inside(run.log.path, folder)})",
            *(form.format(get(run)) for _, get, form in COLUMNS),
        ]
        for run in runs
    ]
    columns = [[get(run) for run in runs] for _, get, _ in COLUMNS]
    rows.append(
        ["mean", *(form.format(statistics.fmean(c)) for c, (_, _, form) in zip(columns, COLUMNS))]
    )
    rows.append(
        [
            "std",
            *(
                form.format(statistics.stdev(c)) if len(runs) > 1 else "-"
                for c, (_, _, form) in zip(columns, COLUMNS)
            ),
        ]
    )
    facts, budget = data_facts(runs), runs[0].log.setting("MAX_WALLCLOCK_SECONDS")
    strides = ", ".join(sorted({sliding(run.log)["stride"] for run in runs}, key=len))
    limit = f"at most {float(budget):g} s" if float(budget) else "no limit"
    caption = (
        f"Measured on {hardware(runs)} with torch {torch_version(runs)}; {facts['val']}: "
        f"{facts['val_targets']:,} targets, {facts['val_bytes']:,} bytes; training {limit} of "
        f"wall-clock ({max(run.train_s for run in runs):.1f} s used), scoring stride {strides}. "
        f"Largest submission: {max(run.artifact_bytes for run in runs):,} of {SIZE_CAP:,} bytes, "
        "code included. bpb: bits per byte; std: sample standard deviation over the seeds."
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", caption])


def inside(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`. RecordError: it is elsewhere."""
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise RecordError(
            f"{path}: is not in {folder}, expected a log inside the submission; copy it into "
            f"{folder / 'logs'}"
        ) from None


def common(runs: list[Run], read) -> str:
    """What `read` finds in the runs: one text, or the different ones joined."""
    return "; ".join(sorted({read(run.log) for run in runs}))


def hardware(runs: list[Run]) -> str:
    return common(runs, lambda log: log.find("hardware:")["hardware"])


def torch_version(runs: list[Run]) -> str:
    return common(runs, lambda log: log.find("python:")["torch"])


def data_facts(runs: list[Run]) -> dict[str, str | int]:
    """What was trained and scored on: folder and first file of each part, its SHA-256, tokens,
    targets, bytes."""
    *parts, header = data_lines(runs[0].log)
    facts = {}
    for line in parts:
        facts[line["data"]] = "/".join(Path(line["first"]).parts[-2:])
        facts[f"{line['data']}_sha256"] = line["sha256"]
    return facts | {
        key: int(header.number(key)) for key in ("train_tokens", "val_targets", "val_bytes")
    }


def compliance(runs: list[Run]) -> dict[str, bool]:
    """The rules, each decided by what the logs say; a fact that is missing makes it false."""
    audits = [run.audit for run in runs]
    return dict(
        artifact_under_cap=all(run.artifact_bytes <= SIZE_CAP for run in runs),
        train_under_600s=all(run.train_s <= TRAIN_LIMIT for run in runs),
        eval_under_600s=all(run.eval_s <= EVAL_LIMIT for run in runs),
        three_seeds=len({run.seed for run in runs}) >= LEAST_SEEDS,
        same_code=len({run.log.source for run in runs}) == 1,
        exact_counts=all(
            run.log.find("final_ngram_exact").get("counts") == "exact" for run in runs
        ),
        each_target_scored_once=all(not unscored(run.log) for run in runs),
        distribution_sums_to_one=all(
            audit.number("enumerated") > 0 and abs(audit.number(key) - 1) <= 1e-9
            for audit in audits
            for key in ("mass_min", "mass_max")
        ),
        scored_before_update=all(
            run.audit.number("recounted") > 0
            and run.audit.number("prefix") > 0
            and score_first(run.log)
            for run in runs
        ),
        no_pickle=all(not unsafe_reading(run.log.source) for run in runs),
    )


def unscored(log: Log) -> str:
    """Why the log does not show that each target is scored once; empty: it does."""
    targets = int(log.find("train_tokens:").number("val_targets"))
    audit = log.find("ngram_audit")
    if audit["targets"] != f"{targets}/{targets}":
        return (
            f"{audit.place}: targets:{audit['targets']}, "
            f"expected {targets}/{targets} (val_targets of the header)"
        )
    for line in log.all("scored "):
        if (line["targets"], line["of"]) != (str(targets), str(targets)):
            return f"{line.place}: {line.text!r}, expected targets:{targets} of:{targets}"
    return ""


def score_first(log: Log) -> bool:
    """Test-time training says in its `ttt:` lines that it scores before it learns;
    without lines it must be off."""
    lines = log.all("ttt:")
    return (
        any("score_first" in line.text for line in lines)
        if lines
        else log.settings.get("TTT_EPOCHS", "0") == "0"
    )


def unsafe_reading(source: str) -> str:
    """The first thing in `source` that could run code from a file: pickle, torch.load, eval; empty:
    none."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError) as error:
        return f"it is not Python: {error}"
    for node in nodes:
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if any(
            name.split(".")[0]
            in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
            for name in names
        ):
            return f"line {node.lineno} imports {names[0]}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                called in ("eval", "exec", "__import__")
                or options.get("allow_pickle") == "True"
                or called == "torch.load"
                and options.get("weights_only") != "True"
            ):
                return f"line {node.lineno} calls {ast.unparse(node)[:80]}"
    return ""


def submission(runs: list[Run], said: dict[str, str]) -> dict:
    """submission.json: what a person said, and the numbers of the runs."""
    bpbs = [run.val_bpb for run in runs]
    return {
        **{key: said[key] for key in PERSONAL},
        "val_bpb": round(statistics.fmean(bpbs), 8),
        "val_bpb_std": round(statistics.stdev(bpbs), 8) if len(runs) > 1 else None,
        "val_loss": round(statistics.fmean(run.val_loss for run in runs), 8),
        "seeds": [run.seed for run in runs],
        "seed_results": {
            str(run.seed): dict(
                val_loss=run.val_loss,
                val_bpb=run.val_bpb,
                artifact_bytes=run.artifact_bytes,
                steps=run.steps,
                step_avg_ms=run.step_avg_ms,
                eval_time_s=run.eval_s,
            )
            for run in runs
        },
        "bytes_total": max(run.artifact_bytes for run in runs),
        "bytes_code": runs[0].code_bytes,
        "hardware": hardware(runs),
        "pytorch_version": torch_version(runs),
        "data": data_facts(runs),
        "compliance": compliance(runs),
    }


def personal_facts(folder: Path, flags: dict[str, str | None]) -> dict[str, str]:
    """Author, name, date, ... of the flags, else of the folder's submission.json.
    RecordError: one is missing."""
    path = folder / "submission.json"
    said = {
        key: value
        for key, value in (read_json(path) if path.exists() else {}).items()
        if key in PERSONAL
    }
    said |= {key: value for key, value in flags.items() if key in PERSONAL and value is not None}
    for key in PERSONAL:
        if not isinstance(said.get(key), str) or not said[key].strip():
            raise RecordError(
                f"{path}: has no {key!r} ({PERSONAL[key]}); give `report --{key.replace('_', '-')}`"
            )
    try:
        is_date = datetime.date.fromisoformat(said["date"]).isoformat() == said["date"]
    except ValueError:
        is_date = False
    if not is_date:
        raise RecordError(
            f"{path}: found the date {said['date']!r}, expected YYYY-MM-DD; give `report --date`"
        )
    if said["track"] not in TRACKS:
        raise RecordError(
            f"{path}: found the track {said['track']!r}, expected {PERSONAL['track']}; give "
            "`report --track`"
        )
    return said


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: does not exist; make it by `make_record.py report`") from None
    except UnicodeDecodeError:
        raise RecordError(
            f"{path}: is not UTF-8; mend it, or remove it and make it by `report`"
        ) from None
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}:{error.lineno}: {error.msg}, expected JSON; mend it, "
            "or remove it and make it by `report`"
        ) from None
    if not isinstance(found, dict):
        raise RecordError(f"{path}:1: found {type(found).__name__}, expected a JSON object")
    return found


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}, expected a text file") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start} is not UTF-8, expected text") from None


def split_readme(path: Path, part: str = "results") -> tuple[str, str, str]:
    """README up to and with the first marker of `part`, what is between,
    from the second marker on."""
    text, begin, end = read_text(path), f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise RecordError(
            f"{path}: found {text.count(begin)} x {begin} and {text.count(end)} x {end}, expected "
            f"each once, in this order; put them where the {part} belong"
        )
    before, _, rest = text.partition(begin)
    between, _, after = rest.partition(end)
    return before + begin, between, end + after


def write_all(texts: dict[Path, str]) -> None:
    """Write every file aside, then rename: none is ever half-written."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            asides[path].write_bytes(text.encode())
        for path, aside in asides.items():
            aside.replace(path)
    except OSError as error:
        raise RecordError(
            f"{error.filename}: {error.strerror}; nothing of it was changed"
        ) from None
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def report(paths: list[Path], folder: Path, flags: dict[str, str | None]) -> list[Run]:
    """Rewrites README's table and submission.json in `folder` from logs, by default those that the
    table links to. RecordError: nothing is written."""
    before, _, after = split_readme(folder / "README.md")
    paths = paths or Folder(folder).linked_logs()
    if not paths:
        raise RecordError(
            f"{folder / 'README.md'}: its results table links to no logs; name one LOG per seed"
        )
    runs, said = read_runs([parse_log(path) for path in paths]), personal_facts(folder, flags)
    found = submission(runs, said)
    write_all(
        {
            folder / "README.md": f"{before}\n{results_table(runs, folder)}\n{after}",
            folder / "submission.json": as_json(found),
        }
    )
    return runs


def as_json(found: dict) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def systems_table(runs: dict[str, list[Run]]) -> str:
    """A row per system: means over its seeds,
    and the sample standard deviation of the mixed bpb."""
    heads = (
        "System",
        "seeds",
        "neural bpb",
        "**mixed bpb**, exact counts",
        "std",
        "hashed, *not a bpb*",
        "its mass",
        "artifact bytes",
        "train s",
        "eval s",
    )
    rows = [heads, ["---"] * len(heads)]
    for name, same in runs.items():

        def mean(read, same=same) -> float:
            return statistics.fmean(map(read, same))

        hashed = [run.log.find("final_ngram_hashed") for run in same]
        bpbs = [run.val_bpb for run in same]
        rows.append(
            (
                f"`runs/{name}.sh`",
                ", ".join(str(run.seed) for run in same),
                f"{mean(lambda run: run.neural):.4f}",
                f"**{statistics.fmean(bpbs):.4f}**",
                f"{statistics.stdev(bpbs):.4f}" if len(same) > 1 else "-",
                f"*{statistics.fmean(line.number('pseudo_bpb') for line in hashed):.4f}*",
                f"{statistics.fmean(line.number('mass') for line in hashed):.1f}",
                f"{mean(lambda run: run.artifact_bytes):,.0f}",
                f"{mean(lambda run: run.train_s):.1f}",
                f"{mean(lambda run: run.eval_s):.1f}",
            )
        )
    every_run = [run for same in runs.values() for run in same]
    facts = data_facts(every_run)
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Measured on {hardware(every_run)}; {facts['val']}: {facts['val_targets']:,} targets. "
            "Hashed: what the pull request's method reports; its counts sum to the mass over the "
            "vocabulary, not 1.",
        ]
    )


def systems(paths: list[Path], folder: Path) -> dict[str, list[Run]]:
    """Rewrites README's table of systems from logs named <system>_seed<seed>.txt.
    RecordError: nothing is written."""
    before, _, after = split_readme(folder / "README.md", "systems")
    runs = read_systems(paths)
    write_all({folder / "README.md": f"{before}\n{systems_table(runs)}\n{after}"})
    return runs


def read_systems(paths: list[Path]) -> dict[str, list[Run]]:
    """system -> its runs. RecordError: a name says no system,
    or the systems differ in data or training time."""
    groups: dict[str, list[Log]] = {}
    for path in sorted(paths):
        name, mark, _ = path.stem.rpartition("_seed")
        if not mark:
            raise RecordError(
                f"{path}: its name says no system, expected <system>_seed<seed>.txt; set RUN_ID so"
            )
        groups.setdefault(name, []).append(parse_log(path))
    first, *others = (log for logs in groups.values() for log in logs)
    for log in others:
        check_same_data(log, first)
        mine, its = (of.setting("MAX_WALLCLOCK_SECONDS") for of in (log, first))
        if mine != its:
            at, its_at = (
                f"{of.path}:{of.line_of('MAX_WALLCLOCK_SECONDS=')}" for of in (log, first)
            )
            raise RecordError(
                f"{at}: found MAX_WALLCLOCK_SECONDS={mine}, but {its} in {its_at}; expected the "
                "same training time for all systems"
            )
    return {name: read_runs(logs) for name, logs in groups.items()}


def load_script(script: Path):
    """`script` as the module train_gpt: the one that is loaded already, if it is the same text. A
    second load would register torch.library's operators anew, under whoever uses the first."""
    loaded = sys.modules.get("train_gpt")
    if loaded is None:
        spec = importlib.util.spec_from_file_location("train_gpt", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_gpt"] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules["train_gpt"]
            raise
        return module
    if Path(loaded.__file__).read_bytes() != script.read_bytes():
        raise RecordError(
            f"{script}: differs from {loaded.__file__}, which this process has loaded; expected "
            "one script per process"
        )
    return loaded


def settings_table(script: Path) -> str:
    """Every environment variable of `script`, its default, range and meaning,
    from its Hyperparameters."""
    module = load_script(script)
    rows = ["| variable | default | range | meaning |", "|---|---|---|---|"]
    defaults = module.Hyperparameters().as_env()
    for field in fields(module.Hyperparameters):
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        span = ", ".join(choices) or (
            "" if low is None else f"from {low:,}" if high == math.inf else f"{low:,} to {high:,}"
        )
        doc = field.metadata["doc"].replace("<", "\\<")
        rows.append(f"| `{field.name.upper()}` | {defaults[field.name.upper()]} | {span} | {doc} |")
    return "\n".join(rows)


def settings(folder: Path) -> None:
    """Rewrites README's table of environment variables."""
    before, _, after = split_readme(folder / "README.md", "settings")
    write_all(
        {folder / "README.md": f"{before}\n{settings_table(folder / 'train_gpt.py')}\n{after}"}
    )


# --- 4. Check -------------------------------------------------------------------------------------
# What a reviewer would look at, on a CPU, without data.
# A check returns its evidence or raises a RecordError.

FILES = "train_gpt.py", "README.md", "submission.json", "requirements.txt"
IMAGES = re.compile(
    r"""!\[[^\]]*\]\(\s*([^)\s]+)|<(?:img|source)\b[^>]*?\b(?:src|srcset)=["']([^"'\s]+)"""
)


class Folder:
    """A submission folder; each part is read when first asked for."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def script(self) -> str:
        return read_text(self.path / "train_gpt.py")

    @cached_property
    def submission(self) -> dict:
        return read_json(self.path / "submission.json")

    @cached_property
    def logs(self) -> list[Log]:
        """The logs that README's table links to; without such a table, all that look like one."""
        patterns = ("logs/*.txt", "logs/*.log", "*.log", "*.txt")
        others = ("requirements", "constraints")
        paths = self.linked_logs() or [
            path
            for pattern in patterns
            for path in sorted(self.path.glob(pattern))
            if not path.name.startswith(others)
        ]
        if not paths:
            raise RecordError(
                f"{self.path}: has no logs, expected one per seed, linked from README's results "
                "table; make it by `make_record.py report`"
            )
        return [parse_log(path) for path in paths]

    def linked_logs(self) -> list[Path]:
        try:
            _, between, _ = split_readme(self.path / "README.md")
        except RecordError:
            return []
        paths = [self.path / link for link in re.findall(r"^\| \[\d+\]\(([^)]+)\)", between, re.M)]
        return [path for path in paths if inside(path, self.path)]

    @cached_property
    def runs(self) -> list[Run]:
        return read_runs(self.logs)

    def figures(self) -> list[Path]:
        """Local images that README shows."""
        links = dict.fromkeys(a or b for a, b in IMAGES.findall(read_text(self.path / "README.md")))
        paths = [self.path / link.split("#")[0] for link in links if "://" not in link]
        return [path for path in paths if inside(path, self.path)]

    @cached_property
    def probe(self) -> dict[str, list]:
        """{check: [passed, evidence]} of what only running the script can tell."""
        return run_probe(self.script, json.dumps(self.logs[0].settings))


def every(items, problem) -> None:
    """RecordError with the problems (text, or an error raised) of all items that have one."""
    found = []
    for item in items:
        try:
            found.append(problem(item))
        except RecordError as error:
            found.append(str(error))
    if any(found):
        raise RecordError("; ".join(filter(None, found)))


def check_files(folder: Folder) -> str:
    every(FILES, lambda name: "" if (folder.path / name).is_file() else f"{name} is missing")
    return f"{', '.join(FILES)}, {len(folder.logs)} logs"


def check_compiles(folder: Folder) -> str:
    try:
        compile(folder.script, "train_gpt.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise RecordError(
            f"train_gpt.py:{getattr(error, 'lineno', 1)}: {error}, expected Python"
        ) from None
    return "train_gpt.py"


def check_logs(folder: Folder) -> str:
    """Complete, finite, in the right units, of the same code, settings and data."""
    warnings = [line for log in folder.logs for line in log.all("warning:")]
    return f"{len(folder.runs)} complete runs of one code, one set of settings, the same data; " + (
        f"{len(warnings)} warnings, {warnings[0].place}: {warnings[0].text}"
        if warnings
        else "no warnings"
    )


def check_source(folder: Folder) -> str:
    def problem(log: Log) -> str:
        no = first_difference(log.source, folder.script)
        return no and (
            f"{log.path}:{no}: "
            + (
                "the source differs from train_gpt.py"
                if log.source
                else "the log does not begin with the source, expected that of train_gpt.py"
            )
        )

    every(folder.logs, problem)
    return f"the source in {len(folder.logs)} logs is train_gpt.py"


def check_code_bytes(folder: Folder) -> str:
    size = len(folder.script.encode())

    def problem(log: Log) -> str:
        line = log.find("Code size:")
        found = bytes_of(line)
        return (
            ""
            if found == size
            else f"{line.place}: Code size: {found}, but train_gpt.py has {size} bytes"
        )

    every(folder.logs, problem)
    return f"train_gpt.py and the logs: {size} bytes"


def largest_total(log: Log) -> tuple[int, Line]:
    """(bytes, line) of the log's largest `Total submission size int6+lzma:`. Older logs have
    several; without a label it is that of the weights before packing."""
    log.find("Total submission size int")
    return max(
        ((bytes_of(line), line) for line in log.all("Total submission size int")),
        key=lambda found: found[0],
    )


def check_artifact(folder: Folder) -> str:
    def problem(log: Log) -> str:
        size, line = largest_total(log)
        return size > SIZE_CAP and f"{line.place}: {size} bytes, expected at most {SIZE_CAP}"

    every(folder.logs, problem)
    size, line = max((largest_total(log) for log in folder.logs), key=lambda found: found[0])
    return f"largest {size} of {SIZE_CAP} bytes ({line.place})"


def train_seconds(log: Log) -> tuple[float, Line]:
    """(seconds, line) of the largest train_time."""
    lines = [line for line in log.all("step:") + log.all("stopping_early") if "train_time" in line]
    if not lines:
        log.find("stopping_early")
    return max(((line.seconds("train_time"), line) for line in lines), key=lambda found: found[0])


def eval_seconds(log: Log) -> tuple[float, str]:
    """(seconds, place) of the evaluation; of an older log, the sum of all its eval_time,
    each value once."""
    scores = {line["eval_time"]: line for line in log.all("") if "eval_time" in line}
    parts = sum(line.seconds("eval_time") for line in scores.values())
    if not log.has("total_eval_time:") and parts:
        return (
            parts,
            f"{log.path}:{','.join(str(line.no) for line in scores.values())}: sum of eval_time",
        )
    line = log.find("total_eval_time:")
    total = line.seconds("total_eval_time")
    if total + 0.1 < parts:
        raise line.error(f"expected at least {parts:.1f}s, the sum of the scores' eval_time")
    return total, line.place


def check_train_time(folder: Folder) -> str:
    def problem(log: Log) -> str:
        seconds, line = train_seconds(log)
        return (
            seconds > TRAIN_LIMIT
            and f"{line.place}: {seconds:.3f} s of training, expected at most {TRAIN_LIMIT} s"
        )

    every(folder.logs, problem)
    seconds, line = max((train_seconds(log) for log in folder.logs), key=lambda found: found[0])
    return f"longest {seconds:.3f} of {TRAIN_LIMIT:.0f} s ({line.place})"


def check_eval_time(folder: Folder) -> str:
    def problem(log: Log) -> str:
        seconds, place = eval_seconds(log)
        return (
            seconds > EVAL_LIMIT
            and f"{place}: {seconds:.1f} s of evaluation, expected at most {EVAL_LIMIT:.0f} s"
        )

    every(folder.logs, problem)
    seconds, place = max(eval_seconds(log) for log in folder.logs)
    return f"longest {seconds:.1f} of {EVAL_LIMIT:.0f} s ({place})"


def check_seeds(folder: Folder) -> str:
    seeds = sorted({seed_of(log) for log in folder.logs})
    if len(seeds) < LEAST_SEEDS:
        raise RecordError(
            f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), expected at least {LEAST_SEEDS}"
        )
    return ", ".join(map(str, seeds))


def check_units_of_json(folder: Folder) -> str:
    path, found = folder.path / "submission.json", folder.submission
    loss, bpb = (found.get(key) for key in ("val_loss", "val_bpb"))
    for key, value in (("val_loss", loss), ("val_bpb", bpb)):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise RecordError(
                f"{path}:{json_line(path, [key])}: {key} is {value!r}, expected a positive number"
            )
    place, ratio = f"{path}:{json_line(path, ['val_loss'])}", loss / math.log(2) / bpb
    if loss == bpb:
        raise RecordError(
            f"{place}: val_loss {loss} equals val_bpb: nats per token and bits per byte differ"
        )
    expected, where = next(
        (
            (line.number("val_loss") / math.log(2) / line.number("val_bpb"), line.place)
            for log in folder.logs
            for line in reversed(log.all("final_"))
            if "val_loss" in line and "val_bpb" in line and line["val_loss"] != line["val_bpb"]
        ),
        (ratio, "no log says"),
    )
    if abs(ratio / expected - 1) > 1e-3:  # four digits, as others write them
        raise RecordError(
            f"{place}: val_loss {loss} / ln 2 / val_bpb {bpb} = {ratio:.4f} bytes per token, but "
            f"{expected:.4f} in {where}: is one of them in other units?"
        )
    return f"val_loss / ln 2 / val_bpb = {ratio:.4f} bytes per token ({where})"


def check_bytes_of_json(folder: Folder) -> str:
    path, found = folder.path / "submission.json", folder.submission.get("bytes_total")
    size, line = max((largest_total(log) for log in folder.logs), key=lambda total: total[0])
    if found != size:
        raise RecordError(
            f"{path}:{json_line(path, ['bytes_total'])}: bytes_total is {found}, "
            f"but {line.place} says {size} bytes"
        )
    return f"bytes_total is the largest of the logs: {size}"


def check_hardware(folder: Folder) -> str:
    """The record track is run on 8 x H100."""
    found = hardware(folder.runs)
    track = folder.submission.get("track")
    if track == TRACKS[0] and not all(
        re.fullmatch(r"8 x .*H100.*", part) for part in found.split("; ")
    ):
        raise RecordError(
            f"{folder.path / 'submission.json'}:"
            f"{json_line(folder.path / 'submission.json', ['track'])}: "
            f"track {track} is for 8 x H100, the logs say {found}; use {TRACKS[1]}"
        )
    if track == TRACKS[0] and "no record" in read_text(folder.path / "README.md"):
        raise RecordError(
            f"{folder.path / 'README.md'}: says 'no record', but the track is {track}; rewrite "
            "what it says of the results"
        )
    return f"{found}, track {track}"


def check_json(folder: Folder) -> str:
    """Every field that logs decide equals them, to the last digit; no other field."""
    path = folder.path / "submission.json"
    expected = submission(folder.runs, personal_facts(folder.path, {}))
    for keys, its, mine in differences(expected, folder.submission):
        raise RecordError(
            f"{path}:{json_line(path, keys)}: {'.'.join(keys)} is {its}, the logs say {mine}; "
            "`make_record.py report` writes it"
        )
    return f"{len(expected)} fields as the logs say"


def differences(expected, found, keys: tuple[str, ...] = ()):
    """(keys to a field, what was found, what was expected) where two JSON objects differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            yield from differences(
                expected.get(key, "no such field"), found.get(key, "missing"), (*keys, key)
            )
    elif expected != found or type(expected) is not type(found):
        yield keys, found, expected


def json_line(path: Path, keys) -> int:
    """The number of the line of a field in a JSON file, about: the first lines that have its keys,
    in order."""
    lines, at = read_text(path).split("\n"), 0
    for key in keys:
        at = next(
            (
                no
                for no in range(at, len(lines))
                if f"{json.dumps(key)}:" in lines[no].replace('" :', '":')
            ),
            at,
        )
    return at + 1


def check_readme(folder: Folder) -> str:
    """The results table, and that of systems where their logs lie, are as the logs say,
    to the last digit."""
    path, systems_logs = folder.path / "README.md", sorted(folder.path.glob("logs/systems/*.txt"))
    tables = {"results": ("report", results_table(folder.runs, folder.path))}
    if systems_logs:
        tables["systems"] = "systems", systems_table(read_systems(systems_logs))
    for part, (command, table) in tables.items():
        before, between, _ = split_readme(path, part)
        if no := first_difference(between, expected := f"\n{table}\n"):
            found, wanted = ((text.split("\n") + [""] * no)[no - 1] for text in (between, expected))
            raise RecordError(
                f"{path}:{before.count(chr(10)) + no}: found {found[:200]!r}, the logs say "
                f"{wanted[:200]!r}; `make_record.py {command}` writes it"
            )
    return " and ".join(
        f"the {part} table is that of {count} logs"
        for part, count in zip(tables, (len(folder.runs), len(systems_logs)))
    )


def check_figures(folder: Folder) -> str:
    figures = folder.figures()
    if not figures:
        raise RecordError(
            f"{folder.path / 'README.md'}: shows no figures; `make_record.py plot` draws them and "
            "puts them between <!-- figures:begin --> and <!-- figures:end -->"
        )
    every(
        figures,
        lambda path: (
            ""
            if path.is_file() and path.stat().st_size
            else f"{path}: README shows it, but it is missing or empty"
        ),
    )
    return f"{len(figures)} shown by README, all here"


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
        return (
            max(abs(mass - 1) for mass in masses) > 1e-9
            and f"{line.place}: masses {masses}, expected 1"
        )

    every(folder.logs, problem)
    line = folder.logs[0].find("ngram_audit")
    return f"{line.place}: {line.text}; the like in each log"


def check_compliance(folder: Folder) -> str:
    found = compliance(folder.runs)
    if broken := [name for name, holds in found.items() if not holds]:
        raise RecordError(f"the logs do not show {', '.join(broken)}")
    return f"the logs show {', '.join(found)}"


def check_reading(folder: Folder) -> str:
    if found := unsafe_reading(folder.script):
        raise RecordError(f"train_gpt.py: {found}: a file that is read could run code")
    return "no pickle, no torch.load without weights_only, no eval"


def check_by_probe(name: str):
    def check(folder: Folder) -> str:
        passed, evidence = folder.probe[name]
        if not passed:
            raise RecordError(evidence)
        return evidence

    return check


def check_parameters(folder: Folder) -> str:
    """The model that the logged settings make has as many parameters as the log says."""

    def problem(log: Log) -> str:
        line = log.find("model_params:" if log.has("model_params:") else "averaging:")
        if not log.settings:
            return (
                f"{line.place}: {line.text[:80]!r}, but the log lists no settings to count them by"
            )
        claimed = int(line.number("parameters" if "parameters" in line else "model_params"))
        passed, count = folder.probe["parameters"]
        return (
            ""
            if passed and int(count) == claimed
            else (
                f"{line.place}: parameters:{claimed}, but its settings make {count}"
                if passed
                else count
            )
        )

    every(folder.logs, problem)
    return f"{folder.probe['parameters'][1]}, as in the logs"


CHECKS = dict(
    files=check_files,
    compiles=check_compiles,
    imports=check_by_probe("imports"),
    logs=check_logs,
    source=check_source,
    code_bytes=check_code_bytes,
    parameters=check_parameters,
    artifact=check_artifact,
    train_time=check_train_time,
    eval_time=check_eval_time,
    seeds=check_seeds,
    hardware=check_hardware,
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


@dataclass(frozen=True)
class Finding:
    name: str
    passed: bool
    evidence: str


def check(path: Path) -> list[Finding]:
    """All checks on a submission folder. RecordError: there is no such folder."""
    if not path.is_dir():
        raise RecordError(
            f"{path}: no such folder, expected one with train_gpt.py and submission.json"
        )
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
    return (
        f"{len(findings) - len(failed)} of {len(findings)} checks passed: "
        f"{'not ready: ' + ', '.join(failed) if failed else 'ready'}"
    )


# The probe: the folder's own script, in a process of its own that sees no GPU, no flash-attention,
# no Triton.

HIDDEN = "flash_attn", "flash_attn_interface", "flash_attn_3", "triton"
PROBE_SECONDS = 50
PROBED = dict(  # a model of every feature that takes milliseconds, on an invented stream
    VOCAB_SIZE=32,
    NUM_LAYERS=3,
    MODEL_DIM=32,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    ROPE_DIMS=8,
    MLP_MULT=2,
    VE_LAYERS="1,2",
    VE_DIM=8,
    XSA_LAST_N=1,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=8,
    TRAIN_SEQ_LEN=16,
    TRAIN_BATCH_TOKENS=64,
    EVAL_SEQ_LEN=16,
    EVAL_STRIDE=5,
    VAL_BATCH_SIZE=256,
    TTT_CHUNK_TOKENS=50,
    NGRAM_COUNTS="exact",
    COMPILE=0,
)


@lru_cache
def run_probe(source: str, settings: str) -> dict[str, list]:
    """{check: [passed, evidence]} of a script's source and settings (JSON),
    from `probe` in another process."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key in ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
    }
    env |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    with tempfile.TemporaryDirectory() as elsewhere:
        script = Path(elsewhere, "train_gpt.py")
        script.write_bytes(source.encode())
        command = [sys.executable, str(Path(__file__).resolve()), "_probe", str(script)]
        try:
            done = subprocess.run(
                command,
                cwd=elsewhere,
                env=env,
                input=settings,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
            )
            return json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            problem = f"the script did not answer in {PROBE_SECONDS} s"
        except (IndexError, json.JSONDecodeError):
            problem = (
                f"the process died: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
            )
    return {name: [False, problem] for name in ("imports", *PROBES)}


class Hider:
    """An import hook: what is in HIDDEN is not installed."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class OneRank:
    """Stands in for the script's Ranks: one process, on the CPU."""

    rank, world_size = 0, 1

    def __init__(self):
        import torch

        self.device = torch.device("cpu")

    def __getattr__(self, name: str):
        # sum_over_ranks, broadcast, barrier, ...: one rank's is all
        return lambda *args: args[0] if args else None


def probe(script: Path, settings: dict[str, str]) -> dict[str, list]:
    """Import the script, run every probe on it."""
    sys.meta_path.insert(0, Hider())
    try:
        module = load_script(script)
    except BaseException as error:  # a script may also exit while it is imported
        problem = (
            f"train_gpt.py cannot be imported without {', '.join(HIDDEN)} and CUDA: "
            f"{type(error).__name__}: {error}"
        )
        return {name: [False, problem] for name in ("imports", *PROBES)}
    found = dict(imports=[True, f"without {', '.join(HIDDEN)} and CUDA"])
    for name, function in PROBES.items():
        try:
            found[name] = [True, function(module, settings)]
        except Exception as error:
            kind = (
                ""
                if isinstance(error, RecordError)
                else f"the script's functions failed: {type(error).__name__}: "
            )
            found[name] = [False, f"{kind}{error}"]
    return found


def probe_parameters(module, settings: dict[str, str]) -> str:
    """How many parameters the logged settings make."""
    import torch

    with torch.device("meta"):
        model = module.GPT(module.Hyperparameters.from_env(settings))
    return str(sum(p.numel() for p in model.parameters()))


class Probed:
    """A small model with random weights that learns and is mixed as the logged settings say, on an
    invented stream. Of hashed counts, the exact ones beside them: those make the score."""

    def __init__(self, module, settings: dict[str, str]):
        import torch

        seed = int.from_bytes(os.urandom(4), "little")
        self.module, self.rng, self.seed = module, np.random.default_rng(seed), f"seed {seed}"
        kept = {
            key: value
            for key, value in settings.items()
            if key.startswith(("NGRAM_", "ALPHA_", "TTT_"))
        }
        # one shows as much as many
        kept["TTT_EPOCHS"] = "0" if kept.get("TTT_EPOCHS", "0") == "0" else "1"
        self.hp = module.Hyperparameters.from_env(
            {**kept, **{key: str(value) for key, value in PROBED.items()}}
        )
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.model = module.GPT(self.hp)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def stream(self, size: int) -> np.ndarray:
        """Random tokens in which pieces recur, so that counts matter."""
        pieces = self.rng.integers(1, self.hp.vocab_size, (12, 9))
        some = [pieces[i][: 3 + i % 7] for i in self.rng.integers(0, 12, size)]
        return np.concatenate(some)[:size].astype(np.uint16)

    def neural(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nll, entropy) in nats of the targets, by the script's score_stream or, with TTT,
        its score_and_learn."""
        if self.hp.ttt_epochs:
            validation = self.module.Validation(
                tokens, lambda stream: np.ones(len(stream) - 1, np.uint16)
            )
            trainer = self.module.Trainer(
                self.model,
                None,
                validation,
                OneRank(),
                self.module.RunLog(),  # without a name: no file, nothing said
                self.module.StopSignal(),
            )
            segments = self.module.score_and_learn(trainer, self.hp.eval_stride)
        else:
            segments = self.module.score_stream(
                self.model.hidden, self.model, tokens, self.hp.eval_stride, OneRank()
            )
        nll, entropy = (np.concatenate(parts) for parts in list(zip(*segments))[:2])
        if len(nll) != len(tokens) - 1:
            raise RecordError(f"{len(nll)} scores for {len(tokens) - 1} targets")
        return nll, entropy

    def mixed(
        self, tokens: np.ndarray, nll: np.ndarray, entropy: np.ndarray, pieces=()
    ) -> np.ndarray:
        """nats after mixing; the scores arrive in one piece, or cut at `pieces`."""
        mixture = self.module.Mixture(tokens, self.hp)
        for end in (*pieces, len(nll)):
            mixture.extend(nll[:end], entropy[:end])
        return np.array(mixture.nll)


def probe_causal(module, settings: dict[str, str]) -> str:
    """Changing the future changes no score of the past."""
    probed = Probed(module, settings)
    tokens, cuts = probed.stream(700), [1, 64, 65, 301, 640]
    scores = probed.neural(tokens)
    scores = *scores, probed.mixed(tokens, *scores)
    for cut in cuts:
        other = tokens.copy()
        other[cut + 1 :] = (
            other[cut + 1 :] + probed.rng.integers(1, probed.hp.vocab_size, 700 - cut - 1)
        ) % probed.hp.vocab_size
        changed = probed.neural(other)
        changed = *changed, probed.mixed(other, *changed)
        for name, before, after, exempt in zip(
            ("neural nll", "entropy", "mixed nll"), scores, changed, (0, 1, 0)
        ):
            # an entropy is fixed before its target is seen
            far = np.abs(before[: cut + exempt] - after[: cut + exempt])
            if not far.max() < 1e-4:
                raise RecordError(
                    f"{name} of target {int(far.argmax())} changes by {far.max():.3g} nats when "
                    f"only targets from {cut} on change: it looks ahead ({probed.seed})"
                )
        if np.abs(scores[2][cut:] - changed[2][cut:]).max() < 1e-3:
            raise RecordError(f"no score changes when the stream does ({probed.seed})")
    return (
        f"targets before {', '.join(map(str, cuts))} keep their scores when later "
        f"ones change ({probed.seed})"
    )


def probe_sum(module, settings: dict[str, str]) -> str:
    """With each token of the vocabulary in one place, the probabilities of that place sum to 1."""
    probed, sums = Probed(module, settings), []
    tokens, at = probed.stream(300), [20, 150, 290]
    for target in at:
        # what comes later matters to no score: see probe_causal
        p, known = np.zeros(2), tokens[: target + 9].copy()
        for token in range(probed.hp.vocab_size):
            known[target + 1] = token
            nll, entropy = probed.neural(known)
            p += np.exp(-np.array([nll[target], probed.mixed(known, nll, entropy)[target]], float))
        sums += p.tolist()
        for name, mass in zip(("the model's", "the mixture's"), p):
            if not abs(mass - 1) < 1e-4:
                raise RecordError(
                    f"{name} probabilities of target {target} sum to {mass:.6f} over the "
                    f"vocabulary, expected 1 ({probed.seed})"
                )
    return (
        f"{min(sums):.7f} to {max(sums):.7f} at targets {', '.join(map(str, at))} ({probed.seed})"
    )


class Bigram:
    """A model whose score of each target can be known: logits are a row of a table,
    chosen by the token before."""

    def __init__(self, hp, table):
        import torch

        self.hp, self.embed = hp, torch.nn.Embedding.from_pretrained(table)

    def hidden(self, ids, last=0):
        return self.embed(ids[:, -last:])

    def scores(self, rows, targets):
        import torch

        logp = rows.log_softmax(-1)
        return torch.stack((-logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))


def probe_once(module, settings: dict[str, str]) -> str:
    """Windows score each target once, left to right;
    a mixture does not depend on the pieces scores come in."""
    import torch

    probed, trials = Probed(module, settings), 40
    table = torch.randn(probed.hp.vocab_size, probed.hp.vocab_size)
    for _ in range(trials):
        size, length = int(probed.rng.integers(2, 400)), int(probed.rng.integers(1, 100))
        stride, tokens = int(probed.rng.integers(1, length + 1)), probed.stream(size)
        model = Bigram(replace(probed.hp, eval_seq_len=length, eval_stride=stride), table)
        segments = module.score_stream(model.hidden, model, tokens, stride, OneRank())
        nll = np.concatenate([segment[0] for segment in segments])
        known = -table.log_softmax(-1).numpy()[tokens[:-1].astype(int), tokens[1:].astype(int)]
        if len(nll) != len(known) or not np.abs(nll - known).max() < 1e-4:
            raise RecordError(
                f"{len(nll)} scores for {size - 1} targets, window {length}, stride {stride}: "
                f"expected that of each target once, in order ({probed.seed})"
            )
    tokens = probed.stream(300)
    nll, entropy = probed.neural(tokens)
    far = np.abs(
        probed.mixed(tokens, nll, entropy) - probed.mixed(tokens, nll, entropy, (1, 100, 101, 250))
    ).max()
    if not far < 1e-9:
        raise RecordError(
            f"the mixture changes by {far:.3g} nats with the pieces its scores "
            f"come in ({probed.seed})"
        )
    return (
        f"{trials} random streams, windows and strides; "
        f"a mixture in pieces equals one at once ({probed.seed})"
    )


PROBES = dict(
    parameters=probe_parameters, causal=probe_causal, sums_to_one=probe_sum, one_pass=probe_once
)


# --- 5. Copy --------------------------------------------------------------------------------------


def copy(
    folder: Path, dest: Path, date: str | None, name: str | None, force: bool
) -> tuple[Path, list[Finding]]:
    """Makes dest/records/track_<track>/<date>_<Name>/ of exactly the submission's files, its
    submission.json with that date, and checks it there. RecordError: it exists already, or a check
    failed and `force` is off; then nothing is left behind."""
    source = Folder(folder)
    said = personal_facts(folder, dict(date=date))
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", name or said["name"]).strip("_.")
    if not dest.is_dir():
        raise RecordError(
            f"{dest}: no such folder, expected a checkout of the challenge's repository"
        )
    target = dest / "records" / f"track_{said['track']}" / f"{said['date']}_{name}"
    if target.exists() or target.is_symlink():
        raise RecordError(
            f"{target}: exists already and is left as it is; choose another --name or --date"
        )
    try:
        aside = Path(tempfile.mkdtemp(prefix=".record-", dir=dest))
    except OSError as error:
        raise RecordError(
            f"{dest}: {error.strerror}, expected a folder that can be written; "
            f"{target} was not made"
        ) from None
    try:
        for path in [
            *(folder / name for name in FILES),
            *(log.path for log in source.logs),
            *source.figures(),
        ]:
            copied = aside / inside(path, folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        if source.submission.get("date") != said["date"]:
            (aside / "submission.json").write_bytes(
                as_json({**source.submission, "date": said["date"]}).encode()
            )
        findings = check(aside)
        failed = [finding for finding in findings if not finding.passed]
        if failed and not force:
            raise RecordError(
                f"{target}: not made, {len(failed)} checks failed: "
                + "; ".join(f"{finding.name}: {finding.evidence}" for finding in failed)
                + "; mend them, or --force"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.chmod(0o755)  # mkdtemp makes it private
        aside.rename(target)
    except OSError as error:
        raise RecordError(f"{error.filename}: {error.strerror}; {target} was not made") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target, findings


# --- 6. Command line ------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_record.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    one = command(
        "report", "write README's results table and submission.json from one log per seed"
    )
    one.add_argument(
        "logs",
        nargs="*",
        type=Path,
        metavar="LOG",
        help="logs/<RUN_ID>.txt, inside the folder (default: those that README's table links to)",
    )
    one.add_argument(
        "--folder", type=Path, default=Path("."), help="the submission (default: here)"
    )
    for key, text in PERSONAL.items():
        one.add_argument(
            f"--{key.replace('_', '-')}",
            help=f"{text} (default: as in submission.json)",
            choices=TRACKS if key == "track" else None,
        )
    one = command(
        "check",
        "judge a submission as a reviewer would: on a CPU, without data, in under a minute; exit "
        "status 1 if a check fails",
    )
    one.add_argument(
        "folder", nargs="?", type=Path, default=Path("."), help="the submission (default: here)"
    )
    one.add_argument("--json", action="store_true", help="print the findings as JSON")
    one = command("systems", "write README's table of the launch scripts' systems")
    one.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="<system>_seed<seed>.txt")
    one.add_argument(
        "--folder", type=Path, default=Path("."), help="the submission (default: here)"
    )
    one = command("settings", "write README's table of environment variables")
    one.add_argument(
        "--folder", type=Path, default=Path("."), help="the submission (default: here)"
    )
    one = command(
        "plot", "draw the figures from the reported logs into logs/ and show them in README"
    )
    one.add_argument(
        "folder", nargs="?", type=Path, default=Path("."), help="the submission (default: here)"
    )
    one = command(
        "view", "make an HTML page of the scored text, coloured by what the mixture saved"
    )
    one.add_argument(
        "scores", type=Path, metavar="SCORES.npz", help="logs/<RUN_ID>_scores.npz of SAVE_SCORES=1"
    )
    one.add_argument("--out", type=Path, help="the page (default: beside the scores)")
    one.add_argument("--start", type=int, help="first target shown (default: where much happens)")
    one.add_argument("--tokens", type=int, help="targets shown")
    one = command(
        "copy",
        "make DEST/records/<track>/<date>_<Name>/ of exactly the submission's files, "
        "if check passes",
    )
    one.add_argument(
        "dest", type=Path, metavar="DEST", help="a checkout of the challenge's repository"
    )
    one.add_argument(
        "--folder", type=Path, default=Path("."), help="the submission (default: here)"
    )
    one.add_argument("--date", help="YYYY-MM-DD (default: as in submission.json)")
    one.add_argument("--name", help="(default: as in submission.json)")
    one.add_argument("--force", action="store_true", help="copy even if a check fails")
    return parser


def run_report(args: argparse.Namespace) -> int:
    runs = report(args.logs, args.folder, vars(args))
    script = args.folder / "train_gpt.py"
    if script.exists() and (no := first_difference(runs[0].log.source, read_text(script))):
        print(
            f"make_record.py: warning: {script}:{no}: differs from the source in the logs; "
            "check will fail",
            file=sys.stderr,
        )
    print(
        f"{args.folder / 'README.md'} and {args.folder / 'submission.json'}: "
        f"{statistics.fmean(run.val_bpb for run in runs):.4f} bpb over seeds "
        f"{', '.join(str(run.seed) for run in runs)}"
    )
    return 0


def run_systems(args: argparse.Namespace) -> int:
    runs = systems(args.logs, args.folder)
    print(
        f"{args.folder / 'README.md'}: "
        f"{', '.join(f'{name} ({len(same)} seeds)' for name, same in runs.items())}"
    )
    return 0


def run_settings(args: argparse.Namespace) -> int:
    settings(args.folder)
    return 0


def run_check(args: argparse.Namespace) -> int:
    findings = check(args.folder)
    passed = all(finding.passed for finding in findings)
    if args.json:
        print(
            json.dumps(
                dict(folder=str(args.folder), passed=passed, checks=list(map(asdict, findings))),
                indent=2,
            )
        )
    else:
        for finding in findings:
            print(f"{'PASS' if finding.passed else 'FAIL'} {finding.name} {finding.evidence}")
        print(summary(findings))
    return 0 if passed else 1


def figures():
    """The module that draws. RecordError: it or what it needs is not installed."""
    try:
        import record_figures
    except ImportError as error:
        raise RecordError(
            f"{error}: plot and view need record_figures.py and matplotlib; "
            "`pip install matplotlib`"
        ) from None
    return record_figures


def run_plot(args: argparse.Namespace) -> int:
    for path in figures().plot(args.folder):
        print(path)
    readme = args.folder / "README.md"
    try:
        before, _, after = split_readme(readme, "figures")
    except RecordError as error:
        print(f"make_record.py: warning: README shows no figures: {error}", file=sys.stderr)
        return 0
    write_all({readme: f"{before}\n{figures().pictures(args.folder)}\n{after}"})
    return 0


def run_view(args: argparse.Namespace) -> int:
    asked = {
        key: value
        for key, value in vars(args).items()
        if key in ("start", "tokens") and value is not None
    }
    print(figures().view(args.scores, out=args.out, **asked))
    return 0


def run_copy(args: argparse.Namespace) -> int:
    target, findings = copy(args.folder, args.dest, args.date, args.name, args.force)
    print(f"{target}\n{summary(findings)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["_probe"]:  # check calls this, see run_probe
        print(json.dumps(probe(Path(argv[1]), json.load(sys.stdin))))
        return 0
    args = arguments().parse_args(argv)
    run = dict(
        report=run_report,
        systems=run_systems,
        settings=run_settings,
        check=run_check,
        plot=run_plot,
        view=run_view,
        copy=run_copy,
    )[args.command]
    try:
        return run(args)
    except RecordError as error:
        print(f"make_record.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # so that record_figures raises the RecordError caught here
    sys.modules["make_record"] = sys.modules["__main__"]
    sys.exit(main())
