"""Scores a committed artifact again, with the script and the settings of its log, and compares the
digits. It runs no script but this project's."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .folder import Folder
from .log import Line, Log, first_difference, parse_log, read_text, require

# Of another run than the one that scores again, or in the artifact.
NOT_REPEATED = set("RUN_ID EVAL_ONLY RESUME DRY_RUN SAVE_SCORES CHECKPOINT_EVERY".split())  # noqa: SIM905
PROJECT = Path(__file__).resolve().parents[1] / "train_gpt.py"
PATHS = "DATA_PATH", "TOKENIZER_PATH"
OTHER_DATA = (  # the demo's text is the documentation inside Python
    "is another here; expected the data of the log (the demo's depend on the version of Python):"
)
FAR = 1e-5  # bpb: processors of other kinds add float32 numbers in another order


class Compared(NamedTuple):
    line: str  # how it starts
    logged: str
    again: str
    holds: bool

    def __str__(self) -> str:
        if self.logged == self.again:
            return f"  {self.line} {self.logged}: the same here"
        said = f"at most {FAR:g} apart" if self.holds else "expected the same"
        return f"  {self.line} {self.logged} in the log, {self.again} here: {said}"


def rescore(folder: Path) -> list[tuple[Path, list[Compared]]]:
    """(artifact, comparisons) of each reported run whose artifact lies where its log says.
    RecordError: there is none, one is not the file that was scored, or scoring failed."""
    logs = Folder(folder).logs
    files = {folder / log.find("artifact:")["artifact"]: log for log in logs}
    here = {path: log for path, log in files.items() if path.is_file()}
    names = ", ".join(map(str, files))
    require(here, f"{folder}: found none of the artifacts that its logs name: {names}")
    return [(path, compared(log, scored_again(path, log, folder))) for path, log in here.items()]


def require_its_file(path: Path, log: Log) -> None:
    """RecordError: the artifact is not the one that the run of `log` has scored, or the log says
    another size."""
    blob, line, model = path.read_bytes(), log.find("artifact:"), log.find("Serialized model int")
    found = hashlib.sha256(blob).hexdigest()
    problem = f"{path}: its SHA-256 is {found}, expected {line['sha256']} of {line.place}"
    require(found == line["sha256"], f"{problem}: the artifact of another run")
    problem = f"{path}: it has {len(blob)} bytes, but {model.place} says {model.size}"
    require(len(blob) == model.size, problem)


def environment(path: Path, log: Log, folder: Path) -> dict[str, str]:
    """The variables that score `path` as the run of `log` did, from any folder."""
    env = {name: value for name, value in os.environ.items() if name not in log.settings}
    changed = log.find("changed:").text
    asked = {name: x for name, x in log.settings.items() if f" {name}={x}" in changed}
    asked = {name: x for name, x in asked.items() if name not in NOT_REPEATED}
    for name in PATHS:
        asked[name] = str((folder / log.setting(name)).absolute())
        problem = f"{log.place(f'{name}=')}: {asked[name]} is not here"
        require(Path(asked[name]).exists(), f"{problem}; `python data/prepare_demo.py` makes it")
    tokenizer = hashlib.sha256(Path(asked["TOKENIZER_PATH"]).read_bytes()).hexdigest()
    line = log.find("data:tokenizer ")
    problem = f"{asked['TOKENIZER_PATH']} {OTHER_DATA} {line.place}"
    require(tokenizer == line["sha256"], problem)
    threads = log.find("hardware:")["threads"]
    asked |= dict(EVAL_ONLY=str(path.absolute()), RUN_ID="rescored", OMP_NUM_THREADS=threads)
    return env | asked


def scored_again(path: Path, log: Log, folder: Path) -> Log:
    """The log of a run that only scores the artifact, on as many ranks. RecordError: it failed, or
    the artifact or the script is another one than the log's."""
    require_its_file(path, log)
    env = environment(path, log, folder)
    script = (folder / "train_gpt.py").absolute()
    no = first_difference(log.source, read_text(script))
    problem = f"{log.path}:{no}: its source differs from {script}; expected the script of the log"
    require(not no, problem)
    problem = f"{script}: is not this project's script ({PROJECT}), and is not run"
    require(script.read_bytes() == PROJECT.read_bytes(), problem)
    ranks = re.match(r"\d+", log.find("hardware:")["hardware"])[0]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if int(ranks) > 1 else []), str(script)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as elsewhere:
        talk = dict(cwd=elsewhere, env=env, capture_output=True, text=True, errors="replace")
        done = subprocess.run(command, **talk)
        said = re.findall(r"^train_gpt.py: error: .*", done.stderr, re.M) or [done.stderr[-300:]]
        require(not done.returncode, f"{path}: could not be scored: {said[0]}")
        again = parse_log(Path(elsewhere, "logs/rescored.txt"))
    for start in ("data:val ", "data:tokenizer ", "data:val_bytes "):
        mine, its = ([line.text for line in one.all(start)] for one in (again, log))
        require(mine == its, f"{path}: {start.strip()} {OTHER_DATA} {log.place(start)}")
    return again


def compared(log: Log, again: Log) -> list[Compared]:
    """What is compared: every score of the packed weights with all its digits, and the number of
    targets that each n-gram order predicted."""
    found = []
    for line in log.all("final_"):
        name = line.text.split()[0]
        if name != "final_float_exact":  # the weights before they were packed
            other = again.find(name)
            near = abs(line.number("val_bpb") - other.number("val_bpb")) <= FAR
            found.append(Compared(name, line["val_bpb"], other["val_bpb"], near))
    orders = [targets_by_order(one) for one in (log, again)]
    return [*found, Compared("ngram_order targets", *orders, orders[0] == orders[1])]


def targets_by_order(log: Log) -> str:
    """2:14203,3:15613,...: exact counts, which no processor changes."""

    def pair(line: Line) -> str:
        return f"{line['order']}:{line['targets']}"

    return ",".join(map(pair, log.all("ngram_order ")))


def report(folder: Path) -> bool:
    """Prints the comparisons; returns whether all hold."""
    found = rescore(folder)
    for path, rows in found:
        print(f"{path}: the file that was scored", *rows, sep="\n")
    return all(row.holds for _, rows in found for row in rows)
