"""The command line: `python -m record report | check | plot | compare | view | copy | rescore |
systems | settings`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from . import __doc__ as purpose
from .log import RecordError, first_difference, read_text
from .submission import HOME, PERSONAL
from .tables import TRACKS


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m record",
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, folder: str = "") -> argparse.ArgumentParser:
        """The parser of the command that `run` does and describes, with its submission's name."""
        name, text = run.__name__.removeprefix("run_"), " ".join(run.__doc__.split())
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        if folder:
            optional = {} if folder.startswith("--") else dict(nargs="?")
            said = "the submission (default: here)"
            one.add_argument(folder, type=Path, default=Path("."), help=said, **optional)
        return one

    one = command(run_report, "--folder")
    said = "logs/<RUN_ID>.txt, inside the folder (default: those that README's table links to)"
    one.add_argument("logs", nargs="*", type=Path, metavar="LOG", help=said)
    for key, text in PERSONAL.items():
        choices = TRACKS if key == "track" else None
        said = f"{text} (default: as in submission.json)"
        one.add_argument(f"--{key.replace('_', '-')}", help=said, choices=choices)
    one.add_argument("--home", metavar="URL", help=HOME)
    one = command(run_check, "folder")
    one.add_argument("--json", action="store_true", help="print the findings as JSON")
    said = (
        "judge it as a folder of this project, or as one of somebody else (default: see its logs)"
    )
    one.add_argument("--as", dest="judge_as", choices=["ours", "foreign"], help=said)
    said = "judge every folder in this folder, and print tables of the verdicts in Markdown"
    one.add_argument("--table", action="store_true", help=said)
    command(run_plot, "folder")
    one = command(run_view)
    said = "logs/<RUN_ID>_scores.npz of SAVE_SCORES=1 (default: that of the last run)"
    one.add_argument("scores", nargs="?", type=Path, metavar="SCORES.npz", help=said)
    one.add_argument("--out", type=Path, help="the page (default: beside the scores)")
    one.add_argument("--start", type=int, help="first target shown (default: where much happens)")
    one.add_argument("--tokens", type=int, default=4000, help="targets shown (default: 4000)")
    one = command(run_copy, "--folder")
    said = "a checkout of the challenge's repository"
    one.add_argument("dest", type=Path, metavar="DEST", help=said)
    one.add_argument("--date", help="YYYY-MM-DD (default: as in submission.json)")
    one.add_argument("--name", help="(default: as in submission.json)")
    one.add_argument("--home", metavar="URL", help="(default: as in submission.json)")
    said = "copy even if a check fails, or git would ignore a file"
    one.add_argument("--force", action="store_true", help=said)
    one = command(run_systems, "--folder")
    one.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="<system>_seed<seed>.txt")
    command(run_settings, "--folder")
    command(run_rescore, "folder")
    one = command(run_compare)
    one.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs/<RUN_ID>.txt")
    one.add_argument("--csv", type=Path, metavar="F", help="write the rows as CSV, too")
    said = "draw the losses as F_light.png and F_dark.png"
    one.add_argument("--plot", type=Path, metavar="F.png", help=said)
    said = "are runs whose names begin with A (or match it, with * and ?) better than those of B?"
    one.add_argument("--test", nargs=2, metavar=("A", "B"), help=said)
    return parser


def warn(text: str) -> None:
    print(f"record: warning: {text}", file=sys.stderr)


def run_report(args: argparse.Namespace) -> int:
    """Write README's results table and submission.json from one log per seed."""
    from .submission import report

    flags = {key: getattr(args, key) for key in (*PERSONAL, "home")}
    runs = report(args.logs, args.folder, flags)
    script = args.folder / "train_gpt.py"
    if script.exists() and (no := first_difference(runs[0].log.source, read_text(script))):
        warn(f"{script}:{no}: differs from the source in the logs; check will fail")
    score = fmean(run.mixed_bits_per_byte for run in runs)
    seeds = ", ".join(str(run.seed) for run in runs)
    written = f"{args.folder / 'README.md'} and {args.folder / 'submission.json'}"
    print(f"{written}: {score:.4f} bpb over seeds {seeds}")
    return 0


def run_systems(args: argparse.Namespace) -> int:
    """Write the table of the launch scripts' systems."""
    from .tables import SYSTEMS_PAGE, systems

    runs = systems(args.logs, args.folder)
    counts = ", ".join(f"{name} ({len(same)} seeds)" for name, same in runs.items())
    print(f"{args.folder / SYSTEMS_PAGE}: {counts}")
    return 0


def run_settings(args: argparse.Namespace) -> int:
    """Write the page of environment variables."""
    from . import whose
    from .log import require
    from .tables import settings

    require(whose.may_run(args.folder), f"{args.folder / 'train_gpt.py'}: {whose.NOT_RUN}")
    print(settings(args.folder))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Judge a submission as a reviewer would: on a CPU, without data, in under a minute. A folder
    that was not made here is judged by what it says, and nothing in it is run. Exit status 1 if a
    check fails."""
    from . import foreign, whose
    from .log import require

    problem = "no such folder, expected one with train_gpt.py and submission.json"
    require(args.folder.is_dir(), f"{args.folder}: {problem}")
    if args.table:
        print(foreign.table(args.folder))
        return 0
    is_ours = whose.is_ours(args.folder) if args.judge_as is None else args.judge_as == "ours"
    return check_ours(args) if is_ours else foreign.report(args.folder, args.json)


def check_ours(args: argparse.Namespace) -> int:
    """The checks of a folder that this project made. Its script runs only if it is this
    project's."""
    from . import whose
    from .checks import check, summary

    left_out = () if whose.may_run(args.folder) else whose.RUN_BY
    findings = check(args.folder, left_out)
    passed = all(finding.passed for finding in findings)
    if args.json:
        rows = [dict(asdict(one), verdict=one.verdict) for one in findings]
        untold = dict(passed=None, evidence=whose.NOT_RUN, verdict="CANNOT TELL")
        rows += [dict(name=name, **untold) for name in left_out]
        found = dict(folder=str(args.folder), passed=passed, checks=rows)
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        for finding in findings:
            print(f"{finding.verdict} {finding.name} {finding.evidence}")
        for name in left_out:
            print(f"CANNOT TELL {name} {whose.NOT_RUN}")
        print(summary(findings))
        if left_out:
            print(f"CANNOT TELL, as the script was not run: {', '.join(left_out)}")
    return 0 if passed else 1


def run_plot(args: argparse.Namespace) -> int:
    """Draw the figures from the reported logs into figures/ and show them on their pages."""
    from .figures import plot, show

    written, skipped = plot(args.folder)
    print(*written, *skipped, sep="\n")
    for problem in show(args.folder):
        warn(problem)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Show runs beside each other: settings in which they differ, steps, scores, sizes, times."""
    from . import compare
    from .log import parse_log

    logs = [parse_log(path) for path in args.logs]
    rows = compare.rows(logs)
    print(compare.table(rows))
    if args.csv:
        compare.write_csv(rows, args.csv)
    if args.plot:
        print(*compare.plot(logs, args.plot), sep="\n")
    if args.test:
        print(compare.test(logs, *args.test))
    return 0


def run_view(args: argparse.Namespace) -> int:
    """Make an HTML page of the scored text, coloured by what the mixture saved."""
    from .view import last_scores, view

    scores = args.scores or last_scores(Path("."))
    page = view(scores, args.out, args.start, args.tokens)
    print(page.path.resolve().as_uri())
    shown = f"targets {page.first:,} to {page.end - 1:,} of {page.total:,}"
    why = ", where counting saved most; --start N shows others" if args.start is None else ""
    print(f"It shows {shown}{why}.")
    return 0


def run_copy(args: argparse.Namespace) -> int:
    """Make DEST/records/<track>/<date>_<Name>/ of the submission's files, with a README of its own
    and what that links to, if check passes and git ignores nothing of it."""
    from .checks import summary
    from .copy import copy

    flags = dict(date=args.date, home=args.home)
    made = copy(args.folder, args.dest, args.name, flags, args.force)
    print(f"{made.target}\n{summary(made.findings)}\n{made.note}")
    return 0


def run_rescore(args: argparse.Namespace) -> int:
    """Score the artifacts that lie where the reported logs say, with this folder's script, and
    compare each digit with the log's. Exit status 1 if one differs by more than processors do."""
    from .rescore import report

    return 0 if report(args.folder) else 1


def end_output() -> None:
    """Print what is still held back. What the console does not take is forgotten: otherwise Python
    would try again when it ends, and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Exit status of the command. An error that a person can fix is one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is None if it is closed
            stream.reconfigure(errors="backslashreplace")  # for consoles that know only ASCII
    args = arguments().parse_args(argv)
    status = 1
    try:
        status = args.run(args)
        print(end="", flush=True)
    except BrokenPipeError:  # `| head` has read enough
        status = 1
    except (RecordError, OSError) as error:
        status = 1
        print(f"record: error: {error}", file=sys.stderr)
    end_output()
    return status


if __name__ == "__main__":
    sys.exit(main())
