"""Verdicts on a folder that nobody here wrote, and how several findings become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .field_log import Fact, Run
from .foreign_folder import ForeignFolder, total_bytes

PASS, INFO, CANNOT, WARN, FAIL = "PASS", "INFO", "CANNOT TELL", "WARN", "FAIL"
ORDER = PASS, INFO, CANNOT, WARN, FAIL  # a check is as bad as the worst that it finds
MOST_SHOWN = 4  # findings in one line of evidence


class Verdict(NamedTuple):
    name: str
    verdict: str
    evidence: str
    advice: str  # to the reviewer


Finding = tuple[str, str]  # (verdict, evidence)


def worst_of(findings: Iterable[Finding], nothing: str) -> Finding:
    """The worst verdict, with the evidence for it; `nothing` is why there is none at all."""
    found = list(findings)
    if not found:
        return CANNOT, nothing
    verdict = max((one for one, _ in found), key=ORDER.index)
    said = list(dict.fromkeys(text for one, text in found if one == verdict))
    shown = "; ".join(said[:MOST_SHOWN])
    if len(said) > MOST_SHOWN:
        shown += f"; and {len(said) - MOST_SHOWN} more"
    others = Counter(one for one, _ in found if one != verdict)
    if others:
        shown += f" ({', '.join(f'{count} x {one}' for one, count in others.items())})"
    return verdict, shown


def for_runs(folder: ForeignFolder, judge: Callable[[Run], list[Finding]]) -> list[Finding]:
    """Findings on the reported runs; those on others are at most warnings."""
    findings = [finding for run in folder.runs for finding in judge(run)]
    for run in folder.further_runs:
        for verdict, text in judge(run):
            if verdict == FAIL:
                findings.append((WARN, f"{text} (a run that the submission does not report)"))
    return findings


def sizes_of(folder: ForeignFolder, run: Run) -> list[Fact]:
    """What the run's log says that the submission has in bytes; where it says nothing, as that of
    an evaluation alone, what other logs of its seed say."""
    same = [other for other in folder.all_runs if other.seed == run.seed]
    return total_bytes(run) or [fact for other in same for fact in total_bytes(other)]
