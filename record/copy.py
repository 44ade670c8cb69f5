"""The folder for records/ of the challenge's repository. It must survive `git add` there, whose
.gitignore has logs/, and its README asks only for what works there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from markupsafe import Markup

from . import git, whose
from .checks import Finding, check
from .fill import fill
from .folder import FILES, IMAGES, LINKS, Folder, encoded, inside, read_text, split_page
from .log import RecordError, require
from .run import FREE_SETTINGS, LIMITS, Run, record_name
from .submission import HOME, as_json, personal_facts, submission
from .tables import compliance

RULES = (  # rule of `compliance`, in words, and the line of a log that shows it
    (
        "artifact_under_cap",
        "code and weights have at most 16,000,000 bytes",
        "`Total submission size`",
    ),
    ("train_under_600s", "training takes at most 600 s", "the largest `train_time`"),
    ("eval_under_600s", "evaluation takes at most 600 s", "`total_eval_time`"),
    ("three_seeds", "at least three seeds", "`seed:` of each log"),
    ("same_code", "all seeds ran this script", "the source at the beginning"),
    ("each_target_scored_once", "each target is scored once", "`ngram_audit targets:`"),
    ("exact_counts", "counts are exact, not hashed", "`final_ngram_exact counts:`"),
    (
        "distribution_sums_to_one",
        "probabilities sum to 1 over the vocabulary, at sampled targets",
        "`ngram_audit mass_min:`, `mass_max:`",
    ),
    (
        "scored_before_update",
        "a target is scored before anything learns from it",
        "`ngram_audit recounted:`, `prefix:`",
    ),
    ("no_pickle", "no file that is read can run code", "the source at the beginning"),
)


class Copied(NamedTuple):
    target: Path
    findings: list[Finding]
    note: str  # what git does with it, and what to do next


def copy(
    folder: Path, dest: Path, name: str | None, flags: dict[str, str | None], force: bool
) -> Copied:
    """Makes dest/records/track_<track>/<date>_<Name>/ of the submission's files and of what its
    README links to, with a README of its own, and checks it there. `flags`: date and home, None as
    in submission.json. Checks that run the script are left out if it is not this project's.
    RecordError: it exists already, a check failed, or git would ignore a part of it, and `force` is
    off; then nothing is left behind."""
    source = Folder(folder)
    said = personal_facts(folder, flags)
    problem = f"has no 'home' ({HOME}); give `copy --home URL` or `report --home URL`"
    require("home" in said, f"{folder / 'submission.json'}: {problem}")
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", name or said["name"]).strip("_.")
    problem = "no such folder, expected a checkout of the challenge's repository"
    require(dest.is_dir(), f"{dest}: {problem}")
    target = dest / "records" / f"track_{said['track']}" / f"{said['date']}_{name}"
    problem = "exists already and is left as it is; choose another --name or --date"
    require(not target.exists() and not target.is_symlink(), f"{target}: {problem}")
    try:
        aside = Path(tempfile.mkdtemp(prefix=".record-", dir=dest))
    except OSError as error:
        problem = f"{error.strerror}, expected a folder that can be written"
        raise RecordError(f"{dest}: {problem}; {target} was not made") from None
    try:
        places = fill_folder(aside, source, said, target.relative_to(dest))
        note = ask_git(dest, target, sorted(map(str, places.values())), force)
        findings = check(aside, () if whose.may_run(folder) else whose.RUN_BY)
        failed = [finding for finding in findings if finding.passed is False]
        reasons = "; ".join(f"{finding.name}: {finding.evidence}" for finding in failed)
        problem = f"not made, {len(failed)} checks failed: {reasons}; mend them, or --force"
        require(force or not failed, f"{target}: {problem}")
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.chmod(0o755)  # mkdtemp makes it private
        aside.rename(target)
    except OSError as error:
        # some errors name no file, or say nothing beside their text
        problem = f"{error.filename or aside}: {error.strerror or error}"
        raise RecordError(f"{problem}; {target} was not made") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Copied(target, findings, note)


def ask_git(dest: Path, target: Path, names: list[str], force: bool) -> str:
    """What to do so that git takes the files `names` of `target`. RecordError: its rules leave some
    out, and `force` is off."""
    if not git.is_repository(dest):
        return f"{dest} is in no git repository: whether one would ignore a file is not known"
    add = f"git -C {shlex.quote(str(dest))} add"
    there = target.relative_to(dest).as_posix()
    try:
        left_out = git.ignored(dest, [f"{there}/{name}" for name in names])
    except RecordError as error:
        return f"{error}: look with `git status` whether {add} {there} takes all {len(names)} files"
    found = ", ".join(f"{one.path.removeprefix(f'{there}/')} ({one.rule})" for one in left_out)
    problem = f"not made, git would leave out {found}: rename it or remove README's link to it"
    require(force or not left_out, f"{target}: {problem}; or --force, and then `{add} -f {there}`")
    return f"next: {add} {'-f ' if left_out else ''}{shlex.quote(there)}"


# --- what is in it ---


def fill_folder(aside: Path, source: Folder, said: dict, there: Path) -> dict[Path, PurePosixPath]:
    """Writes the folder, which will lie at `there` in the repository. Returns where each file of
    the submission has gone."""
    runs = source.runs
    pages = {source.readme: body_of(source.readme)}
    files = [source.path / name for name in FILES if name != source.readme.name]
    files += [log.path for log in source.logs]
    license = source.path / "LICENSE"
    files += [license] if license.is_file() else []
    files += linked(source, pages)
    places = places_of(source, dict.fromkeys([source.readme, *files]))
    for path, place in places.items():
        copied = aside / place
        copied.parent.mkdir(parents=True, exist_ok=True)
        if path in pages and path != source.readme:
            copied.write_bytes(encoded(copied, moved(pages[path], source, places)))
        else:
            shutil.copyfile(path, copied)
    found = submission(runs, said)
    body = moved(pages[source.readme], source, places)
    page = readme(runs, found, said, body, there)
    texts = {"README.md": page}
    if source.submission != said:  # it gets another date or home
        texts["submission.json"] = as_json(said)
    for name, text in texts.items():
        (aside / name).write_bytes(encoded(aside / name, text))
    return places


def body_of(page: Path) -> str:
    """What of README the copy repeats: results, figures, and all that stands between
    `<!-- record:begin -->` and `<!-- record:end -->`. A README without these is repeated whole, but
    for its title."""
    text = read_text(page)
    begin, end = (f"(?<!`)<!-- record:{which} -->" for which in ("begin", "end"))  # not as code
    counts = [len(re.findall(mark, text)) for mark in (begin, end)]
    parts = re.findall(rf"{begin}(.*?){end}", text, re.S)
    problem = f"found {counts[0]} x <!-- record:begin --> and {counts[1]} x <!-- record:end -->"
    are_pairs = counts == [len(parts)] * 2 and not any(re.search(begin, part) for part in parts)
    require(are_pairs, f"{page}: {problem}, expected pairs")
    if not parts:
        return re.sub(r"\A\s*# .*\n", "", text).strip()
    shown = []
    for part, heading in (("results", "## Results\n\n"), ("figures", "")):
        if f"<!-- {part}:begin -->" in text:
            _, between, _ = split_page(page, part)
            shown.append(f"{heading}<!-- {part}:begin -->{between}<!-- {part}:end -->")
    return "\n\n".join([*shown, *(part.strip() for part in parts)])


def linked(source: Folder, pages: dict[Path, str]) -> list[Path]:
    """The local files that `pages` link to or show. Pages among them are added to `pages`, and what
    they link to is found, too."""
    found: list[Path] = []
    for page in (queue := list(pages)):
        for either in LINKS.findall(pages[page]):
            link = "".join(either).split("#")[0]
            path = Path(os.path.normpath(page.parent / link))
            is_here = path.resolve().is_relative_to(source.path.resolve()) and path.is_file()
            if not link or ":" in link or not is_here or path in found:
                continue
            found.append(path)
            if path.suffix == ".md" and path not in pages:
                pages[path] = read_text(path)
                queue.append(path)
    return [path for path in found if path != source.readme]


def places_of(source: Folder, files: dict[Path, None]) -> dict[Path, PurePosixPath]:
    """Where each file goes: logs to the root, by their seeds; nothing into a folder called logs,
    which the challenge's repository ignores. RecordError: two files would have one place."""
    logs = {log.path: record_name(log) for log in source.logs}
    places: dict[Path, PurePosixPath] = {}
    for path in files:
        place = PurePosixPath(logs.get(path) or inside(path, source.path))
        if "logs" in place.parts[:-1]:
            other = "figures" if path.suffix.lower() in IMAGES else "evidence"
            place = PurePosixPath(*(other if part == "logs" else part for part in place.parts))
        first = next((path for path, its in places.items() if its == place), path)
        problem = f"{first} and {path} would both be {place} in the copy; rename one of them"
        require(first == path, problem)
        places[path] = place
    return places


def moved(text: str, source: Folder, places: dict[Path, PurePosixPath]) -> str:
    """The text of a page with the new names of the files that have one."""
    for path, place in sorted(places.items(), key=lambda pair: -len(str(pair[0]))):
        old = inside(path, source.path)
        if old != str(place):
            text = re.sub(rf"(?<![\w-])(?<!\w/){re.escape(old)}(?![\w-])", str(place), text)
    return text


# --- its README ---


def readme(runs: list[Run], found: dict, said: dict, body: str, there: Path) -> str:
    """README of the copy: the score where people's tools look for it, the submission's own words,
    how to run it, and where the logs show that the rules are kept."""
    holds = compliance(runs)
    notes = []
    longest = {name: max(LIMITS[name].read(run.log)[0] for run in runs) for name in LIMITS}
    if any(longest[name] > LIMITS[name].most for name in ("train_time", "eval_time")):
        times = (
            f"training took {longest['train_time']:.0f} s, evaluation {longest['eval_time']:.0f} s"
        )
        notes.append(
            f"Unlimited compute, as the track for runs that are no record allows: {times}."
        )
    stream, train = found["data"]["val"], found["data"]["train"]
    tokenizer, sha256 = (found["data"][key] for key in ("tokenizer", "tokenizer_sha256"))
    data_note = (
        f"The runs were trained on {train} and scored on {stream} with {tokenizer} "
        f"(SHA-256 {sha256[:16]}…)"
    )
    is_fineweb = "fineweb" in stream
    origin = (
        "`data/cached_challenge_fineweb.py` downloads such data"
        if is_fineweb
        else ("these data come from the project that is named above")
    )
    page = fill(
        "record.md",
        said=said,
        found=found,
        cap=LIMITS["artifact"].most,
        notes=notes,
        body=Markup(body),
        data_note=f"{data_note}; {origin}.",
        commands=Markup(commands(runs, found, there)),
        rules=[(text, line, "yes" if holds[rule] else "**no**") for rule, text, line in RULES],
    )
    return page.rstrip() + "\n"


def commands(runs: list[Run], found: dict, there: Path) -> str:
    """Shell commands that repeat the runs, in the root of the challenge's repository."""
    log, data = runs[0].log, found["data"]
    changed = log.find("changed:").text if log.has("changed:") else ""
    names = [name for name in log.settings if f" {name}=" in changed and name not in FREE_SETTINGS]
    settings = [f"{name}={shlex.quote(log.settings[name])}" for name in names]
    ranks = re.match(r"\d+", found["hardware"])
    train = (
        f" TRAIN_DATA_PATH=./data/datasets/{data['train']}" if data["train"] != data["val"] else ""
    )
    lines = [
        f"pip install -r {there.as_posix()}/requirements.txt",
        f"export DATA_PATH=./data/datasets/{data['val']}{train}",
        f"export TOKENIZER_PATH=./data/tokenizers/{data['tokenizer']}",
        *(f"export {' '.join(settings[at : at + 5])}" for at in range(0, len(settings), 5)),
        f"for s in {' '.join(map(str, found['seeds']))}; do",
        "    SEED=$s RUN_ID=seed$s torchrun --standalone "
        f"--nproc_per_node={ranks[0] if ranks else 8} {there.as_posix()}/train_gpt.py",
        "done",
    ]
    return "\n".join(lines)
