"""What git would do with files that are not there yet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from .log import RecordError


class Ignored(NamedTuple):
    path: str  # as it was asked for
    rule: str  # .gitignore:10: logs/


def run(folder: Path, *command: str, said: str = "") -> subprocess.CompletedProcess:
    """Run git in `folder`. Variables such as GIT_DIR, which name another repository, do not count.
    RecordError: git is not installed."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    talk = dict(input=said.encode(errors="surrogateescape"), capture_output=True, env=env)
    try:
        return subprocess.run(["git", "-C", str(folder), *command], **talk)
    except OSError:
        raise RecordError("git is not installed") from None


def is_repository(folder: Path) -> bool:
    """Is the folder in a git work tree, as far as that can be seen without git?"""
    above = folder.resolve()
    return any((path / ".git").exists() for path in (above, *above.parents))


def ignored(folder: Path, paths: list[str]) -> list[Ignored]:
    """Which of `paths`, seen from `folder`, `git add` would leave out, and by which rule.
    RecordError: git cannot say."""
    done = run(folder, "check-ignore", "-v", "-z", "--stdin", said="\0".join(paths) + "\0")
    if done.returncode not in (0, 1):
        problem = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise RecordError(f"git cannot be asked: {problem[0]}")
    words = done.stdout.decode(errors="surrogateescape").split("\0")
    found = zip(words[0::4], words[1::4], words[2::4], words[3::4])
    rules = [(path, f"{file}:{no}: {rule}", rule) for file, no, rule, path in found]
    return [Ignored(path, said) for path, said, rule in rules if not rule.startswith("!")]
