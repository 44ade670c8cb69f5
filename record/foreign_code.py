"""Checks of a folder's code against its logs, and of patterns in it. Nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from . import field_script
from .field_log import FieldLog, Unreadable
from .foreign_folder import DATA_OF_SCRIPT, MOST_SCRIPT, ForeignFolder, agrees, total_bytes
from .foreign_logs import CAP
from .foreign_verdict import CANNOT, FAIL, INFO, MOST_SHOWN, PASS, WARN, Finding, worst_of
from .log import first_difference

MOST_SCRIPTS = 10  # compared with the source in a log


def check_code_bytes(folder: ForeignFolder) -> Finding:
    """A script here has as many bytes as the logs and submission.json say."""
    sizes = code_sizes(folder)
    findings, codes = [], []
    for run in folder.runs:
        told = run.all("code", "code_plain")
        codes += [fact.value for fact in told]
        if told and sizes:
            same = [fact for fact in told if fact.value in sizes]
            own = next(iter(sizes))
            fact = (same or [min(told, key=lambda one: abs(one.value - own))])[0]
            said = f"as {sizes[fact.value]}" if same else f"but {sizes[own]} has {own:,}"
            text = f"{fact.place}: {fact.label} {fact.value:,.0f}, {said}"
            findings.append((PASS if same else FAIL, text))
    if any(verdict == PASS for verdict, _ in findings):
        findings = [(WARN if verdict == FAIL else verdict, text) for verdict, text in findings]
    claim = folder.claim("bytes_code", "code_bytes", "code_size_bytes")
    if claim and (sizes or codes):
        text = f"{folder.json_file}: {claim.key} {claim.value:,}"
        known = {*codes, *sizes}
        is_same = any(agrees(claim._replace(unit=min(claim.unit, 1000)), one) for one in known)
        said = f"{text}, but script and logs say {', '.join(f'{n:,.0f}' for n in sorted(known))}"
        findings.append((PASS, text) if is_same else (WARN, said))
    return worst_of(findings, "no log says the size of the code, or there is no script")


def code_sizes(folder: ForeignFolder) -> dict[int, str]:
    """{bytes: name} of the script, of what it needs, and of other scripts at the root: a log may be
    of one of these. The script's own size is the first."""
    if not folder.script_name:
        size = folder.script_bytes
        return {} if size is None else {size: f"the script's size in {DATA_OF_SCRIPT}"}
    used = used_files(folder)
    others = [name for name in folder.files if "/" not in name and name.endswith(".py")]
    sizes = {folder.script_bytes: folder.script_name}
    for name in (*used, *others):
        sizes.setdefault(folder.files[name], name)
    whole = folder.script_bytes + sum(folder.files[name] for name in used)
    sizes.setdefault(whole, f"{folder.script_name} with what it needs")
    return sizes


def check_source(folder: ForeignFolder) -> Finding:
    """The source in the logs is a script at the root."""
    told = [log for log in folder.logs if log.runs and log.source]
    if not told:
        return CANNOT, "no log has its source in it"
    names = [name for name in folder.files if "/" not in name and name.endswith(".py")]
    names.sort(key=lambda name: name != folder.script_name)
    scripts = {}
    for name in names[:MOST_SCRIPTS]:
        with suppress(Unreadable):
            scripts[name] = folder.text(name, MOST_SCRIPT).strip().replace("\r", "")
    if not scripts:
        return CANNOT, f"{told[0].path} has a source in it, but there is no script here"
    return worst_of((judge_source(log, scripts) for log in told), "")


def judge_source(log: FieldLog, scripts: dict[str, str]) -> Finding:
    """The verdict on the source in one log. The first of the scripts is compared line by line if it
    is none of them."""
    source = log.source.strip().replace("\r", "")
    for name, script in scripts.items():
        if source in script and len(source) > 0.9 * len(script):
            return PASS, f"{log.path} has {name} in it"
    name, script = next(iter(scripts.items()))
    if source in script:
        return CANNOT, f"{log.path} has only a part of {name} in it"
    before, first, _ = script.partition(source.split("\n")[0])
    no = first_difference(source, script[len(before) :]) if first else 1
    line = no + before.count("\n") if first else 1
    return WARN, f"{log.path}: its source differs from {name}:{line}"


@lru_cache(maxsize=8)
def script_layers(folder: ForeignFolder) -> tuple[list[field_script.Layer], list[str]]:
    """The script, the code packed in it, and that of the files that it imports; what was not
    looked at."""
    layers, notes, queue, seen = [], [], [folder.script_name], set()
    while queue:
        name = queue.pop(0)
        if not name or name in seen or len(seen) >= 10:
            continue
        seen.add(name)
        try:
            found, left = field_script.layers_of(name, folder.text(name, MOST_SCRIPT))
        except Unreadable as error:
            notes.append(f"{name}: {error}")
            continue
        layers += found
        notes += left
        for layer in found:
            used = field_script.siblings(layer, list(folder.files))
            queue += [file for file in used if file.endswith(".py")]
    return layers, notes


def check_script(folder: ForeignFolder) -> Finding:
    """The script can be read, packed code included."""
    if not folder.script_name:
        return CANNOT, "there is no script here"
    layers, notes = script_layers(folder)
    findings = [(CANNOT, note) for note in notes]
    for layer in layers:
        lines = layer.text.count("\n") + 1
        if layer.problem:
            findings.append((CANNOT, f"{layer.name}: {layer.problem}"))
        elif hides_code(layer, layers):
            findings.append((CANNOT, f"{layer.name}: it runs code that could not be unpacked"))
        else:
            findings.append((PASS, f"{layer.name}: {lines} lines"))
    return worst_of(findings, "it could not be read")


def hides_code(layer: field_script.Layer, layers: list[field_script.Layer]) -> bool:
    """Whether a short script consists of an exec, and nothing could be unpacked."""
    is_wrapper = "exec(" in layer.text and layer.text.count("\n") < 30
    return is_wrapper and not any("unpacked" in one.name for one in layers)


def unseen(folder: ForeignFolder) -> list[str]:
    """What of the script could not be read."""
    layers, notes = script_layers(folder)
    unread = [f"{layer.name} could not be read" for layer in layers if not layer.tree]
    hidden = [layer for layer in layers if hides_code(layer, layers)]
    return [
        *notes,
        *unread,
        *(f"{one.name} runs code that could not be unpacked" for one in hidden),
    ]


def judge_patterns(folder: ForeignFolder, findings: list[Finding], nothing: str) -> Finding:
    """The verdict on patterns in the script; where none is found, it is PASS only if all was
    read."""
    layers, _ = script_layers(folder)
    if not any(layer.tree for layer in layers):
        return CANNOT, "there is no script here that can be read"
    if not findings and (hidden := unseen(folder)):
        return CANNOT, f"nothing found, but {'; '.join(hidden[:MOST_SHOWN])}"
    return worst_of(findings or [(PASS, nothing)], "")


def pattern_check(finder: Callable, verdict: str, nothing: str) -> Callable:
    """The check that looks for a pattern in all layers of the script."""

    def check(folder: ForeignFolder) -> Finding:
        found = [one for layer in script_layers(folder)[0] for one in finder(layer)]
        findings = [(verdict, f"{one.place}: {one.what}") for one in found]
        return judge_patterns(folder, findings, nothing)

    return check


def check_hashed_targets(folder: ForeignFolder) -> Finding:
    """No table of counts is keyed by a hash of the target. It is a FAIL where a log says that
    n-grams are counted, else a warning: the code may be switched off."""
    layers, _ = script_layers(folder)
    used = [fact for run in folder.runs for fact in run.all("ngram")]
    found = [one for layer in layers for one in field_script.hashed_targets(layer)]
    said = f"; {used[0].place}: {used[0].label}" if used else ""
    findings = [(FAIL if used else WARN, f"{one.place}: {one.what}{said}") for one in found]
    counting = [layer.name for layer in layers if layer.tree and "ngram" in layer.text.lower()]
    if counting and not findings:
        problem = f"no such key found, but {', '.join(counting)} counts n-grams: read how"
        findings = [(CANNOT, problem)]
    return judge_patterns(folder, findings, "the script counts no n-grams")


def used_files(folder: ForeignFolder) -> dict[str, str]:
    """{file: place} of the folder's files of code that the script imports or names."""
    found = {}
    for layer in script_layers(folder)[0]:
        for name, place in field_script.siblings(layer, list(folder.files)).items():
            if name != folder.script_name:
                found.setdefault(name, place)
    return found


def check_siblings(folder: ForeignFolder) -> Finding:
    """The script needs no other file of the folder, whose bytes nobody counted."""
    found = used_files(folder)
    if not found:
        nothing = f"{folder.script_name} names no other file of code here"
        return judge_patterns(folder, [], nothing)
    size = sum(folder.files[name] for name in found)
    text = "; ".join(
        f"{place}: {name} ({folder.files[name]:,} bytes)"
        for name, place in list(found.items())[:MOST_SHOWN]
    )
    counted = [fact.value for run in folder.runs for fact in run.all("code")]
    totals = [fact.value for run in folder.runs for fact in total_bytes(run)]
    if counted and max(counted) >= size + (folder.script_bytes or 0):
        return INFO, f"{text}; the logs' code size, {max(counted):,.0f}, has room for them"
    if totals and max(totals) + size > CAP:
        return WARN, f"{text}; with them, {max(totals) + size:,.0f} bytes are over the cap"
    return WARN, f"{text}; {size:,} bytes that the logs' code size may not count"
