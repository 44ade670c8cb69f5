"""Does `make test` pass every time? Runs the suite again and again, and says what failed.

    python -m tools.repeat_suite [--runs 10] [--loaded] [--fresh] [--append table.md] [-- ...]

Each run is a row of a markdown table. --append also writes the rows to a file. --loaded keeps two
cores busy with other processes. --fresh draws other random numbers in each run (FRESH=1); the row
says which. --beside says in words what else the machine does, for the table. What follows -- is
given to pytest, in the place of -m "not slow". The output of a run that failed is kept in a file
that its row names. The exit status is 1 if a run failed.
"""

import argparse
import contextlib
import datetime
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "| begun | revision | beside it | FRESH | passed | failed | seconds | which failed |"
SUITE = "tests", "-q", "-n", "2", "--dist", "worksteal"


def spin() -> None:
    """Keep one core busy until this process is killed."""
    while True:
        sum(range(1_000_000))


@contextlib.contextmanager
def load(processes: int):
    """Within, so many other processes keep a core busy each."""
    spinning = [multiprocessing.Process(target=spin, daemon=True) for _ in range(processes)]
    for process in spinning:
        process.start()
    try:
        yield
    finally:
        for process in spinning:
            process.kill()


def revision() -> str:
    """The commit, with a + if files have been changed since."""
    words = "git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run_suite(extra: list[str], beside: str, fresh: bool) -> tuple[str, bool]:
    """Run the suite once. Returns its row, and whether it passed."""
    begun, start = datetime.datetime.now(), time.monotonic()
    env = {**os.environ, "FRESH": "1" if fresh else "0"}
    command = [sys.executable, "-m", "pytest", *SUITE, *(extra or ["-m", "not slow"])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    seconds = time.monotonic() - start
    said = done.stdout + done.stderr
    counts = {word: number for number, word in re.findall(r"(\d+) (passed|failed|error)", said)}
    number = re.search(r"^FRESH=(\d+)", said, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", said, re.M)
    if done.returncode:
        with tempfile.NamedTemporaryFile("w", prefix="suite_", suffix=".txt", delete=False) as kept:
            kept.write(said)
        failed.append(f"(status {done.returncode}: {kept.name})")
    cells = (
        f"{begun:%Y-%m-%d %H:%M}",
        revision(),
        beside,
        number[1] if number else "",
        counts.get("passed", "0"),
        str(int(counts.get("failed", 0)) + int(counts.get("error", 0))),
        f"{seconds:.0f}",
        " ".join(failed),
    )
    return f"| {' | '.join(cells)} |", done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.repeat_suite", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--loaded", action="store_true", help="two busy processes beside the suite")
    parser.add_argument("--fresh", action="store_true", help="FRESH=1")
    parser.add_argument("--beside", default="", help="in words: what else the machine is doing")
    parser.add_argument("--append", type=Path, help="a file that gets the rows too")
    parser.add_argument("extra", nargs="*", help='pytest\'s; without: -m "not slow"')
    args = parser.parse_args()
    beside = args.beside or ("two busy processes" if args.loaded else "nothing")
    passed = 0

    def tell(line: str) -> None:
        print(line, flush=True)
        if args.append:
            with args.append.open("a") as file:
                file.write(line + "\n")

    if not (args.append and args.append.exists()):  # else the file has the head
        tell(HEAD)
        tell(re.sub("[^|]+", "---", HEAD))
    with load(2 if args.loaded else 0):
        for _ in range(args.runs):
            row, ok = run_suite(args.extra, beside, args.fresh)
            tell(row)
            passed += ok
    print(f"\n{passed} of {args.runs} runs passed")
    return int(passed < args.runs)


if __name__ == "__main__":
    sys.exit(main())
