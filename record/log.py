"""What a line of a log says: `key:value` pairs, units, and where it stands."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

RULE = "=" * 100  # the line that ends the source in a log
PAIR = re.compile(r"([^\s:]+):(.*)", re.S)
SETTING = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
NUMBER = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf))(ms|s| bytes)?", re.I
)
SECONDS = {"ms": 1e3, "s": 1}  # how many of a unit are a second


class RecordError(Exception):
    """What cannot be used. The message is one line: place (file:line), what was found, expected,
    to be done."""


def require(holds, message: str) -> None:
    """RecordError with `message`, unless `holds`."""
    if not holds:
        raise RecordError(message)


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

    def require(self, holds, problem: str) -> None:
        """RecordError with this line and `problem`, unless `holds`."""
        require(holds, f"{self.place}: found {self.text[:160]!r}, {problem}")

    def __missing__(self, key: str):
        self.require(False, f"expected {key}:... on it; a log of another script?")

    def number(self, key: str) -> float:
        """The value of `key` without its unit (ms, s, bytes). RecordError: missing, no number,
        NaN or infinite."""
        match = NUMBER.fullmatch(self[key])
        self.require(match, f"expected a number after {key}:")
        problem = f"{key} is not finite: the run diverged; repeat it with lower rates"
        self.require(math.isfinite(float(match[1])), problem)
        return float(match[1])

    def seconds(self, key: str) -> float:
        """The time after `key` in seconds. RecordError: as `number`, or its unit is neither ms
        nor s."""
        value, unit = self.number(key), NUMBER.fullmatch(self[key])[2]
        self.require(unit in SECONDS, f"expected a time in ms or s after {key}:")
        return value / SECONDS[unit]

    @property
    def size(self) -> int:
        """N of a line that says `...: N bytes`."""
        match = re.search(r": (\d+) bytes\b", self.text)
        self.require(match, "expected a size in bytes")
        return int(match[1])

    @property
    def step(self) -> int:
        """500 of `step:500/20000`."""
        problem = "expected step:<number>/<number>"
        self.require(re.fullmatch(r"\d+(/\d+)?", self["step"]), problem)
        return int(self["step"].split("/")[0])


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

    def has(self, prefix: str) -> bool:
        return any(text.startswith(prefix) for _, text in self.lines)

    def find(self, prefix: str) -> Line:
        """The last line that starts with `prefix`. RecordError: there is none."""
        self.require_end(self.has(prefix), f"a line {prefix!r}: cut short, or of another script")
        return self.all(prefix)[-1]

    def require_end(self, holds, missing: str) -> None:
        """RecordError, unless `holds`: the log ends without what is `missing`."""
        last = self.lines[-1][0] if self.lines else 1
        require(holds, f"{self.path}:{last}: the log ends without {missing}; repeat the run")

    def setting(self, name: str) -> str:
        """The value of a setting. RecordError: the log does not list it."""
        problem = f"found no setting {name}=..., expected train_gpt.py's header"
        require(name in self.settings, f"{self.path}:1: {problem}")
        return self.settings[name]

    def place(self, prefix: str) -> str:
        """file:line of the first line that starts with `prefix`, line 1 if there is none."""
        no = next((no for no, text in self.lines if text.startswith(prefix)), 1)
        return f"{self.path}:{no}"

    @cached_property
    def train_steps(self) -> list[Line]:
        """The `train_loss` lines. A resumed run begins after step 0; what an earlier try left is
        not repeated."""
        return [line for line in self.all("step:") if "train_loss" in line]

    @cached_property
    def validations(self) -> list[Line]:
        """The `val_bpb` lines during training and at its end."""
        return [line for line in self.all("step:") if "val_bpb" in line]


def parse_log(path: Path | str) -> Log:
    """Reads a log: source up to the first line of 100 `=`, settings, lines. RecordError: no text,
    unreadable."""
    path = Path(path)
    text = read_text(path, "a log of train_gpt.py")
    source, rule, rest = text.partition(f"\n{RULE}\n")
    source, rest = (source, rest) if rule else ("", text)
    start = source.count("\n") + 3 if rule else 1  # number of the first line after the rule
    lines = tuple(
        (no, line.rstrip("\r")) for no, line in enumerate(rest.split("\n"), start) if line.strip()
    )
    settings = dict(match.groups() for _, line in lines if (match := SETTING.fullmatch(line)))
    return Log(path, source, settings, lines)


def read_text(path: Path, expected: str = "a text file") -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; expected {expected}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start} is not UTF-8, expected {expected}") from None


def without_repeats(pairs: list[tuple]) -> dict:
    """For json.loads, as object_pairs_hook. ValueError: a name is there twice, so that readers
    could take either value."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"found {name!r} twice")
        found[name] = value
    return found


def first_difference(a: str, b: str) -> int:
    """Number of the first line that differs, from 1; 0: the texts are equal."""
    if a == b:
        return 0
    pairs = zip(a.split("\n"), b.split("\n"))
    shorter = min(a.count("\n"), b.count("\n"))
    return next((no for no, (x, y) in enumerate(pairs, 1) if x != y), shorter + 2)
