#!/usr/bin/env python3
"""Logs in, a record out: results table, submission.json, preflight, figures, and the folder for records/.

    python make_record.py report logs/seed*.txt --author ... --date ...   README's table and submission.json
    python make_record.py check                                           would a reviewer accept this folder?
    python make_record.py plot                                            figures into logs/
    python make_record.py view logs/seed1337_scores.npz                   the scored text, coloured, as HTML
    python make_record.py copy ~/parameter-golf                           records/<track>/<date>_<Name>/

All numbers come from the logs that train_gpt.py writes; a person gives only names and a date. Same logs in, same
bytes out. What cannot be true (NaN, a loss that is a bpb, seeds of different code, ...) is refused in one line that
names the file and the line. Losses are nats per token, bpb bits per byte, sizes bytes (1 MB = 1,000,000).
"""
from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

RULE = "=" * 100  # the line that ends the source in a log


class RecordError(Exception):
    """What cannot be used. The message is one line: place (file:line), what was found, expected, to be done."""


# --- 1. Logs ------------------------------------------------------------------------------------------------------

PAIR = re.compile(r"([^\s:]+):(.*)", re.S)
SETTING = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf))(?:ms|s| bytes)?", re.I)


class Line(dict):
    """The `key:value` pairs of one line of a log, as text, e.g. {"train_time": "42942ms"}. Words without a colon
    belong to the value before them: `hardware:2 x H100 threads:4` has the keys hardware and threads."""

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
        """The value of `key` without its unit (ms, s, bytes). RecordError: missing, no number, NaN or infinite."""
        match = NUMBER.fullmatch(self[key])
        if not match:
            raise self.error(f"expected a number after {key}:")
        if not math.isfinite(float(match[1])):
            raise self.error(f"{key} is not finite: the run diverged; repeat it with lower rates")
        return float(match[1])


@dataclass(frozen=True)
class Step:
    """One `train_loss` line: seconds of training so far, nats per token, share of the peak learning rate."""
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
    """A parsed log of train_gpt.py, or of an older script of the field: then `source` and `settings` are empty."""
    path: Path
    source: str                         # train_gpt.py as it ran
    settings: dict[str, str]            # NAME=value, as text
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
        raise RecordError(f"{self.path}:{last}: the log ends without a line {prefix!r}: cut short, or of another "
                          f"script; repeat the run")

    def has(self, prefix: str) -> bool:
        return any(text.startswith(prefix) for _, text in self.lines)

    def setting(self, name: str) -> str:
        """The value of a setting. RecordError: the log does not list it."""
        if name not in self.settings:
            raise RecordError(f"{self.path}:1: found no setting {name}=..., expected train_gpt.py's header")
        return self.settings[name]

    def line_of(self, prefix: str) -> int:
        """The number of the first line that starts with `prefix`, 1 if there is none: where to point a finger."""
        return next((no for no, text in self.lines if text.startswith(prefix)), 1)

    @cached_property
    def train_steps(self) -> list[Step]:
        """The `train_loss` lines. A resumed run begins after step 0; what an earlier try left is not repeated."""
        return [Step(line.no, step_of(line), line.number("train_time") / 1e3, line.number("train_loss"),
                     line.number("lr_scale") if "lr_scale" in line else None)
                for line in self.all("step:") if "train_loss" in line]

    @cached_property
    def validations(self) -> list[Validation]:
        """The validations during training and at its end."""
        return [Validation(line.no, step_of(line), line.number("train_time") / 1e3, line.number("val_loss"),
                           line.number("val_bpb")) for line in self.all("step:") if "val_bpb" in line]


def step_of(line: Line) -> int:
    """500 of `step:500/20000`."""
    if not re.fullmatch(r"\d+(/\d+)?", line["step"]):
        raise line.error("expected step:<number>/<number>")
    return int(line["step"].split("/")[0])


def parse_log(path: Path | str) -> Log:
    """Reads a log: source up to the first line of 100 `=`, settings, lines. RecordError: no text, unreadable."""
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; expected a log of train_gpt.py") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start} is not UTF-8, expected a log of train_gpt.py") from None
    source, rule, rest = text.partition(f"\n{RULE}\n")
    source, rest = (source, rest) if rule else ("", text)
    start = source.count("\n") + 3 if rule else 1  # number of the first line after the rule
    lines = tuple((no, line.rstrip("\r")) for no, line in enumerate(rest.split("\n"), start) if line.strip())
    settings = dict(match.groups() for _, line in lines if (match := SETTING.fullmatch(line)))
    return Log(path, source, settings, lines)


# --- 5. Command line ----------------------------------------------------------------------------------------------

def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments().parse_args(argv)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RecordError as error:
        sys.exit(f"make_record.py: error: {error}")
