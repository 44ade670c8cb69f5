"""Figures in sentences, outside the tables. A comment on the page says which number of the logs
each of them is, so that new logs cannot leave old figures behind:

    <!-- from the logs: "about 1.9 bpb neural": neural_bits_per_byte; "in 70 s": train_seconds -->

Between quotation marks stands a piece of the page. For each number in it follows, after the colon
and between commas, where it comes from: a number of a run (their mean), a setting in capitals, or a
log, the start of a line in it and a key (`logs/a.txt final_ngram_exact val_bpb`)."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

from .folder import Folder, read_text
from .log import parse_log, require
from .run import Run

MARK = re.compile(r"<!-- from the logs: (.*?) -->", re.S)
CLAIM = re.compile(r'"([^"]+)": ([^;"]+)')
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def claims(page: Path) -> list[tuple[str, list[str]]]:
    """(a piece of the page, the sources of its numbers) of each claim that the page marks.
    RecordError: a mark cannot be read, or the page does not have the piece."""
    text = read_text(page)
    rest, found = " ".join(MARK.sub("", text).split()), []
    for mark in MARK.findall(text):
        parts = CLAIM.findall(mark)
        said = "; ".join(f'"{piece}": {names}' for piece, names in parts)
        problem = f'found the mark {mark[:80]!r}, expected "piece of the page": source, source; ...'
        require(said.split() == mark.split(), f"{page}: {problem}")
        for piece, names in parts:
            is_there = " ".join(piece.split()) in rest
            problem = f"its mark names {piece!r}, which it does not say; correct one of them"
            require(is_there, f"{page}: {problem}")
            found.append((piece, [name.strip() for name in names.split(",")]))
    return found


def number_of(source: str, folder: Folder) -> float:
    """The number that `source` names. RecordError: there is none."""
    runs, words = folder.runs, source.split()
    if len(words) == 3:
        return parse_log(folder.path / words[0]).find(words[1]).number(words[2])
    if source.isupper():
        return float(runs[0].log.setting(source))
    problem = f"{source!r} is no number of a run, expected one of {', '.join(Run.__annotations__)}"
    require(source in Run.__annotations__ and source != "log", problem)
    return fmean(getattr(run, source) for run in runs)


def stale(page: Path, folder: Folder) -> list[str]:
    """A line for each figure in the marked pieces of a page that its source does not round to.
    RecordError: a mark cannot be read."""
    problems = []
    for piece, sources in claims(page):
        numbers = NUMBER.findall(piece)
        problem = f"{piece!r} has {len(numbers)} numbers, its mark names {len(sources)} sources"
        require(len(numbers) == len(sources), f"{page}: {problem}")
        for text, source in zip(numbers, sources):
            value, digits = number_of(source, folder), len(text.partition(".")[2])
            if abs(float(text.replace(",", "")) - value) > 0.5001 * 10.0**-digits:
                problem = f"{text} in {piece!r} is not the {value:.{digits + 2}f} of the logs"
                problems.append(f"{page}: {problem} ({source}); write what they say")
    return problems
