"""The folder for records/ of the challenge's repository."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from .checks import Finding, check
from .folder import FILES, Folder, encoded, inside
from .log import RecordError, require
from .tables import as_json, personal_facts


def copy(
    folder: Path, dest: Path, date: str | None, name: str | None, force: bool
) -> tuple[Path, list[Finding]]:
    """Makes dest/records/track_<track>/<date>_<Name>/ of exactly the submission's files and of what
    its README and the pages that it links to link to or show, its submission.json with that date,
    and checks it there. RecordError: it exists already, or a check failed and `force` is off; then
    nothing is left behind."""
    source = Folder(folder)
    said = personal_facts(folder, dict(date=date))
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
        linked = [path for path in source.links if path.is_file()]
        logs = [log.path for log in source.logs]
        for path in dict.fromkeys([*(folder / file for file in FILES), *logs, *linked]):
            copied = aside / inside(path, folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        if source.submission.get("date") != said["date"]:
            dated = as_json({**source.submission, "date": said["date"]})
            copied = aside / "submission.json"
            copied.write_bytes(encoded(copied, dated))
        findings = check(aside)
        failed = [finding for finding in findings if not finding.passed]
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
    return target, findings
