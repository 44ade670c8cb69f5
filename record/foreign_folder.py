"""A submission folder that nobody here wrote: its files, its logs, what its submission.json claims.
Nothing in it is run or followed, and reading is bounded, whatever lies there."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from .field_log import MOST_BYTES, Fact, FieldLog, Run, Unreadable, decode, read_bytes, read_log

MOST_FILES = 3_000
MOST_DEPTH = 4  # folders in folders
TOOLS_FOLDERS = ".git", ".venv"  # of git and Python: no part of a submission
MOST_LOGS = 60
MOST_LOG_BYTES = 16_000_000  # read of all logs together
MOST_JSON = 1_000_000
MOST_SCRIPT = 1_000_000
PLAIN_NUMBER = re.compile(r"\d{1,12}(?:\.\d{1,12})?")
OUTSIDE = ", outside of the folder"
LOG_ENDINGS = ".log", ".txt", ".out"
NO_LOGS = "requirements", "constraints", "readme", "license", "notes"
DATA_OF_SCRIPT = "facts.json"  # {"train_gpt.py bytes": 47642}, in collections without the scripts


class File(NamedTuple):
    name: str  # as seen from the folder, with /
    size: int
    kind: str  # "file", or what else it is


class Written(float):
    """A number of a JSON file that remembers how it was written: 1.0640 is not 1.064."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number


class Claim(NamedTuple):
    """A number in submission.json."""

    key: str
    value: float
    unit: float  # of its last digit


def scan(root: Path) -> tuple[list[File], list[str]]:
    """(files, what was not looked at) of a folder: first those that a submission consists of, then
    others, so that many of these hide none of them. No link is followed."""
    found, notes, queue = [], [], [(root, "", 0)]
    while queue:
        folder, prefix, depth = queue.pop(0)
        try:
            entries = sorted(
                os.scandir(folder), key=lambda entry: (is_extra(entry.name), entry.name)
            )
        except OSError as error:
            notes.append(f"{prefix or '.'}: {error.strerror}")
            continue
        for entry in entries:
            if len(found) >= MOST_FILES:
                notes.append(f"more than {MOST_FILES} files: the rest was not looked at")
                return found, notes
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name in TOOLS_FOLDERS:
                    notes.append(f"{name}/: not looked at")
                elif depth < MOST_DEPTH:
                    queue.append((Path(entry.path), name + "/", depth + 1))
                else:
                    notes.append(f"{name}/: deeper than {MOST_DEPTH} folders, not looked at")
            else:
                found.append(described(entry, name, root))
    return found, notes


def is_extra(name: str) -> bool:
    """Whether a name is none of a submission's script, logs, pages or JSON."""
    return not (name.endswith((*LOG_ENDINGS, ".md", ".json")) or "train" in name)


def described(entry: os.DirEntry, name: str, root: Path) -> File:
    """One entry of a folder that is no folder itself."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError as error:
        return File(name, 0, f"unreadable: {error.strerror}")
    if stat.S_ISLNK(status.st_mode):
        try:
            target = os.readlink(entry.path)
            whole = os.path.realpath(entry.path)
        except (OSError, ValueError):
            return File(name, 0, "a broken link")
        inside = Path(whole).is_relative_to(os.path.realpath(root))
        return File(name, 0, f"a link to {target}{'' if inside else OUTSIDE}")
    if not stat.S_ISREG(status.st_mode):
        return File(name, 0, "no regular file (a pipe, a socket or a device)")
    return File(name, status.st_size, "file")


class ForeignFolder:
    """The parts of a folder; each is read when first asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.notes = scan(path)
        self.files = {entry.name: entry.size for entry in self.entries if entry.kind == "file"}
        self.unreadable: dict[str, str] = {}  # file -> why

    def text(self, name: str, most: int) -> str:
        """A text file of the folder. Raises Unreadable: it is none, or longer than `most` bytes."""
        head, _, size = read_bytes(self.path / name, most)
        if size > most:
            raise Unreadable(f"{size:,} bytes, more than the {most:,} that are read")
        return decode(head)

    # --- logs ---

    @cached_property
    def logs(self) -> list[FieldLog]:
        """All logs; first those at the root and in logs/, and of these those of a seed."""
        names = sorted(filter(is_log, self.files), key=lambda n: (not is_near(n), "seed" not in n))
        found, left = [], MOST_LOG_BYTES
        for name in names[:MOST_LOGS]:
            if left <= 0:
                self.unreadable[name] = "not read, the logs before it are too long"
                continue
            try:
                found.append(read_log(self.path / name, name))
                left -= min(self.files[name], MOST_BYTES)
            except Unreadable as error:
                self.unreadable[name] = str(error)
        if names[MOST_LOGS:]:
            why = f"not read, nor the {len(names) - MOST_LOGS - 1} after it: too many logs"
            self.unreadable[names[MOST_LOGS]] = why
        return found

    @cached_property
    def all_runs(self) -> list[Run]:
        """The runs with a score, or all if none has; a copy of another run is left out."""
        runs = [run for log in self.logs for run in log.runs]
        scored = [run for run in runs if run.scores] or runs
        kept = {}
        for run in scored:
            sizes = tuple(fact.value for fact in total_bytes(run))
            scores = tuple(fact.value for fact in run.scores)
            kept.setdefault((run.seed, tuple(run.losses), scores, sizes), run)
        return list(kept.values())

    @cached_property
    def runs(self) -> list[Run]:
        """The runs that the submission reports: those of the seeds that submission.json names; of
        several with one seed the one whose score it names, else those at the root and in logs/."""
        named = [run for run in self.all_runs if run.seed in self.json_seeds] or self.all_runs
        kept = []
        for run in named:
            same = [other for other in named if other.seed == run.seed]
            told = [other for other in same if self.tells_score_of(other)]
            near = [other for other in same if is_near(other.path)]
            if run in (told or near or same):
                kept.append(run)
        near = [run for run in kept if is_near(run.path) or self.tells_score_of(run)]
        return near or kept

    @property
    def further_runs(self) -> list[Run]:
        return [run for run in self.all_runs if run not in self.runs]

    def tells_score_of(self, run: Run) -> bool:
        """Whether submission.json names the last score of this run, its own or as the result."""
        claims = [self.score_claim, self.seed_claims.get(run.seed, {}).get("score")]
        return bool(run.scores) and any(
            claim and agrees(claim, run.scores[-1].value) for claim in claims
        )

    # --- submission.json ---

    @cached_property
    def json_file(self) -> str:
        """Its name, or "": there is none. Some folders call it submission_<name>.json."""
        names = [name for name in self.files if "/" not in name and name.endswith(".json")]
        found = [name for name in names if name.startswith("submission")]
        return min(found, key=len, default="")

    @cached_property
    def submission(self) -> dict:
        """The JSON object, empty if it cannot be read; then `unreadable` says why."""
        if not self.json_file:
            return {}
        try:
            found = json.loads(self.text(self.json_file, MOST_JSON), parse_float=Written)
        except (Unreadable, ValueError, RecursionError) as error:
            self.unreadable[self.json_file] = f"no JSON: {str(error)[:120]}"
            return {}
        if not isinstance(found, dict):
            self.unreadable[self.json_file] = f"a JSON {type(found).__name__}, expected an object"
            return {}
        return found

    def claim(self, *keys: str) -> Claim | None:
        """The first of these fields that is a number."""
        return first_claim(self.submission, keys)

    @cached_property
    def score_claim(self) -> Claim | None:
        return self.claim(
            "val_bpb", "mean_val_bpb", "val_bpb_mean", "mean_bpb", "bpb", "final_val_bpb"
        )

    @cached_property
    def bytes_claim(self) -> Claim | None:
        return self.claim(
            "bytes_total", "artifact_bytes", "total_bytes", "artifact_size_bytes",
            "artifact_bytes_max", "submission_bytes",
        )  # fmt: skip

    @cached_property
    def json_seeds(self) -> set[int]:
        """The seeds that submission.json names."""
        found = set(self.seed_claims)
        for key in ("seeds", "seed"):
            value = self.submission.get(key)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int) and not isinstance(one, bool):
                    found.add(one)
        return found

    @cached_property
    def seed_claims(self) -> dict[int, dict[str, Claim]]:
        """{seed: {"score": ..., "bytes": ...}} of the fields seed_results or seeds."""
        found = {}
        lists = "seed_results", "seeds", "per_seed", "results", "val_bpb_seeds", "seed_bpbs"
        for table in (*map(self.submission.get, lists), self.submission):
            for seed, told in seeds_with_results(table):
                claims = dict(
                    score=first_claim(told, ("val_bpb", "bpb", "final_val_bpb")),
                    bytes=first_claim(told, ("artifact_bytes", "bytes_total", "total_bytes")),
                )
                if any(claims.values()):
                    found.setdefault(seed, {name: c for name, c in claims.items() if c})
        return found

    @property
    def seeds_without_log(self) -> list[int]:
        return sorted(self.json_seeds - {run.seed for run in self.all_runs})

    @cached_property
    def is_unlimited(self) -> bool:
        """Whether it is in a track without limits of time, by its JSON or its folder."""
        names = "/".join(self.path.resolve().parts[-3:])
        said = f"{self.submission.get('track', '')} {names}".lower()
        return "non_record" in said or "non-record" in said or "unlimited" in said

    # --- the script ---

    @cached_property
    def script_name(self) -> str:
        """train_gpt.py, or the longest of the scripts that train; "": there is none."""
        if "train_gpt.py" in self.files:
            return "train_gpt.py"
        names = [name for name in self.files if "/" not in name and name.endswith(".py")]
        named = [name for name in names if "train" in name]
        return max(named or names, key=self.files.get, default="")

    @cached_property
    def script_bytes(self) -> int | None:
        """Its size; where the script is missing, what a collection's facts say of it."""
        if self.script_name:
            return self.files[self.script_name]
        try:
            size = json.loads(self.text(DATA_OF_SCRIPT, MOST_JSON))["train_gpt.py bytes"]
        except (Unreadable, ValueError, KeyError, TypeError, RecursionError):
            return None
        return size if isinstance(size, int) else None


def is_log(name: str) -> bool:
    last = name.rsplit("/", 1)[-1].lower()
    return last.endswith(LOG_ENDINGS) and not last.startswith(NO_LOGS)


def is_near(name: str) -> bool:
    """Whether a log lies where the logs of a submission are, at the root or in logs/."""
    return "/" not in name or (name.startswith("logs/") and name.count("/") == 1)


def first_claim(table, keys: tuple[str, ...]) -> Claim | None:
    """The first of `keys` whose value is a finite number."""
    for key in keys:
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str) and PLAIN_NUMBER.fullmatch(value):
            value = Written(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and abs(value) < 1e15 and math.isfinite(value):
            return Claim(key, value, last_unit(value))
    return None


def last_unit(value: float) -> float:
    """What the last digit of a number counts: 0.01 of 1.25, 100000 of 13400000."""
    text = getattr(value, "text", repr(value)).lower()
    if "e" in text:
        return abs(value) * 1e-6
    if "." in text and text.partition(".")[2].strip("0"):
        return 10.0 ** -len(text.partition(".")[2])
    digits = text.partition(".")[0]
    return 10.0 ** (len(digits) - len(digits.rstrip("0"))) if value else 1.0


def seeds_with_results(table):
    """(seed, its results) of {"42": {...}}, {"seed_42": {...}}, {"42": score} or
    [{"seed": 42, ...}]."""
    if isinstance(table, dict):
        for key, told in table.items():
            digits = key.lower().removeprefix("seed").strip("_- ")
            told = dict(val_bpb=told) if isinstance(told, float) else told
            if isinstance(told, dict) and digits.isascii() and digits.isdigit():
                yield int(digits[:12]), told
    if isinstance(table, list):
        for told in table:
            if isinstance(told, dict) and isinstance(told.get("seed"), int):
                yield told["seed"], told


def agrees(claim: Claim, value: float, slack: float = 0.0) -> bool:
    """Whether a log's number, rounded or cut to the digits of the claim, is the claim. A claim of
    fewer than three decimals, or of fewer than three digits, is taken at three."""
    most = 1e-3 if abs(claim.value) < 100 else abs(claim.value) * 5e-3
    return abs(claim.value - value) <= min(claim.unit, most) * 1.001 + slack


def total_bytes(run: Run) -> list[Fact]:
    """What a log says that the submission has in bytes, code included. A total that is that of the
    model before packing is left out: scripts print both."""
    plain = [fact.value for fact in run.all("plain")]
    code = [fact.value for fact in run.all("code", "code_plain")] or [0]
    totals = [
        fact
        for fact in run.all("total")
        if not any(abs(fact.value - model - size) < 1 for model in plain for size in code)
    ]
    if totals:
        return totals
    sums = [
        fact._replace(kind="total", value=fact.value + code[-1], label=f"{fact.label} + code")
        for fact in run.all("packed")
    ]
    return sums or run.all("artifact")


def mean_of(values: list[float]) -> float:
    return fmean(values) if values else math.nan
