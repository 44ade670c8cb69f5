"""Whose a folder is, and whether its script may run: only a script that is, byte for byte, the
train_gpt.py beside this package. Everything else is read, never run."""

from __future__ import annotations

import re
from pathlib import Path

from .field_log import MOST_BYTES, Unreadable, numbered_lines, read_bytes
from .foreign_folder import MOST_SCRIPT, OUTSIDE, TOOLS_FOLDERS, File, is_log, is_near, scan

HOME = Path(__file__).resolve().parents[1]  # the project that this package belongs to
RUN_BY = "imports", "parameters", "causal", "sums_to_one", "one_pass"  # checks that run the script
NOT_RUN = (
    "the script is not the train_gpt.py beside this record package, and no other is ever run; "
    "check it in its own project"
)
OURS_IN_SCRIPT = "class RunLog", "class Mixture", "def from_env("
LEAST_SETTINGS = 20  # lines NAME=value in a log's header
SETTING = re.compile(r"[A-Z][A-Z0-9_]*=")
MOST_READ = 64_000_000  # bytes of a file that our own checks read whole
MOST_LOGS = 20
READ_WHOLE = ".md", ".txt", ".log", ".json", ".py"
LINK_TO_TOOLS = re.compile(rb"""(?:\]\(|=["'])[^)"']*\.(?:git|venv)/""")


def may_run(folder: Path) -> bool:
    """Whether the folder's script may run: it is this project's, or the same bytes."""
    try:
        mine, _, size = read_bytes(HOME / "train_gpt.py", MOST_READ)
        its, _, other = read_bytes(folder / "train_gpt.py", MOST_READ)
    except Unreadable:
        return False
    return size == other and mine == its


def is_ours(folder: Path) -> bool:
    """Whether our own checks judge the folder: its script is this project's or of its family, or a
    log is one of such a script. A folder with files that those checks must not read is none."""
    if folder.resolve() == HOME:
        return True
    entries, notes = scan(folder)
    unseen = set(notes) - {f"{name}/: not looked at" for name in TOOLS_FOLDERS}
    if unseen or not all(map(is_tame, entries)) or links_to_tools(folder, entries):
        return False
    return may_run(folder) or has_our_script(folder) or has_our_log(folder, entries)


def is_tame(entry: File) -> bool:
    """A regular file of a size that can be read whole, or a link to what lies in the folder, too;
    data and artifacts may be of any size, as they are not read."""
    if entry.kind != "file":
        return entry.kind.startswith("a link") and not entry.kind.endswith(OUTSIDE)
    return entry.size <= MOST_READ or not entry.name.endswith(READ_WHOLE)


def links_to_tools(folder: Path, entries: list[File]) -> bool:
    """Whether a page links into .git or .venv, which nobody looked at."""
    for entry in entries:
        if entry.name.endswith(".md"):
            try:
                head, _, size = read_bytes(folder / entry.name, MOST_READ)
            except Unreadable:
                return True
            if LINK_TO_TOOLS.search(head):
                return True
    return False


def has_our_script(folder: Path) -> bool:
    try:
        head, _, _ = read_bytes(folder / "train_gpt.py", MOST_SCRIPT)
    except Unreadable:
        return False
    text = head.decode("utf-8", "replace")
    return all(part in text for part in OURS_IN_SCRIPT)


def has_our_log(folder: Path, entries: list[File]) -> bool:
    """Whether a log lists the settings of train_gpt.py."""
    names = [entry.name for entry in entries if is_log(entry.name) and is_near(entry.name)]
    for name in names[:MOST_LOGS]:
        try:
            lines, _ = numbered_lines(folder / name, MOST_BYTES)
        except Unreadable:
            continue
        if sum(bool(SETTING.match(text)) for _, text in lines) >= LEAST_SETTINGS:
            return True
    return False
