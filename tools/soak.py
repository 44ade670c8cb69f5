"""Short runs that are stopped at random moments and resumed until they end: is nothing lost?

    python -m tools.soak [--runs 20] [--minutes 15] [--seed 1]

Each run trains a tiny model on the built-in corpus. It is disturbed up to three times, by SIGTERM,
SIGHUP, SIGINT or SIGKILL to one rank or to torchrun, or by two signals to a rank, the second while
the first is being handled. That may be while it starts, compiles (then the start has COMPILE=1),
trains, packs, scores or writes its scores. With SIGKILL of torchrun its ranks are killed too, as if
the machine was switched off. The run goes on from its newest checkpoint or, sometimes, from its
artifact (EVAL_ONLY), on a random number of ranks.

After each end all checkpoints and artifacts must be readable, and the log must be whole and say why
the run ended. A run that was stopped must say what is left to go on with: the files that it names
must be there, and its own checkpoint must be named. After the last one every step must be in a log,
the bpb must be that of an undisturbed run to 1e-4 (2e-3 if some steps were compiled), and the log
must be one that `record report` takes. It prints a markdown table. The exit status is 1 if anything
was lost.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from record.log import RecordError, parse_log
from record.run import read_run
from tests.helpers import TINY, finish, start_script, values, workers
from tools import common
from tools.common import ROOT, t

STEPS = 200
SETTINGS = {
    **TINY,
    "VOCAB_SIZE": 1024,
    "ITERATIONS": STEPS,
    "WARMDOWN_ITERS": 60,
    "CHECKPOINT_EVERY": 0.3,
    "EVAL_SEQ_LEN": 256,
    "EVAL_STRIDE": 256,
    "VAL_BATCH_SIZE": 8192,
    "NGRAM_ORDER": 3,
    "SAVE_SCORES": 1,
    "DATA_PATH": ROOT / "data/datasets/demo_sp1024",
    "TOKENIZER_PATH": ROOT / "data/tokenizers/demo_1024_bpe.model",
}
FINAL = "final_ngram_exact"


def logs(folder: Path) -> list[str]:
    """All logs, in the order of the runs, without the source at their beginning."""
    paths = sorted((folder / "logs").glob("*.txt"), key=lambda path: int(f"0{path.stem[5:]}"))
    return [path.read_text().split("=" * 100 + "\n")[-1] for path in paths]


MOMENTS = {  # what a start is in the middle of -> the line of the log that says so
    "start": "",
    "compile": "train_tokens:",
    "pack": "final_float_exact",
    "score": "final_int6_roundtrip_exact",
    "write": "result ",
}


def reached(moment: str, log: str, step: int) -> bool:
    """Whether the log shows that the run has reached `moment`: a key of MOMENTS, or "step" for the
    training step with the number `step`."""
    if moment == "step":
        return any(int(s) >= step for s in re.findall(r"^step:(\d+)/", log, re.M))
    return bool(re.search(f"^{MOMENTS[moment]}", log, re.M))


def disturb(process, folder: Path, begun: int, moment: str, rng) -> str:
    """Wait until the log after the first `begun` ones reaches the moment, and up to 0.5 s more, or
    up to ten while it compiles; then send a random signal. Returns what it was, "" if the run ended
    before."""
    step = rng.randrange(STEPS)
    while process.poll() is None and not reached(moment, "".join(logs(folder)[begun:]), step):
        time.sleep(0.05 if moment != "write" else 0.001)
    time.sleep(rng.choice((0, 0, 0.2, 0.5)) if moment != "compile" else rng.uniform(0, 10))
    ranks = workers(process) if process.poll() is None else {}
    if not ranks:
        return ""
    number = rng.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL))
    aim, rank = rng.choice(("torchrun", "rank", "rank twice")), rng.choice(sorted(ranks))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid if aim == "torchrun" else ranks[rank], number)
        if aim == "rank twice":
            time.sleep(0.4)  # sooner it would count as the first, sent again
            os.kill(ranks[rank], rng.choice((signal.SIGTERM, signal.SIGINT)))
        for pid in ranks.values() if (aim, number) == ("torchrun", signal.SIGKILL) else ():
            os.kill(pid, number)
    return f"{number.name[3:]} {aim.replace('rank', f'rank {rank}')}"


def says_what_is_left(folder: Path, error: str) -> list[str]:
    """What is wrong with the last line of a log that says why the run was stopped: a file that it
    names is not there, or it does not name the run's own checkpoint."""
    named = re.findall(r"(?:RESUME|EVAL_ONLY)=([^ ;]+) (?:goes on|scores it)", error)
    wrong = [f"the log names {path}" for path in named if not (folder / path).exists()]
    newest = max(folder.glob("logs/*.txt"), key=lambda path: int(f"0{path.stem[5:]}"))
    own = newest.with_suffix(".ckpt")
    if own.exists() and f"RESUME={own.relative_to(folder)} goes on" not in error:
        wrong.append(f"the log does not name {own.name}")
    if not named and "there is no checkpoint" not in error:
        wrong.append("the log does not say what is left")
    return wrong


def artifacts(folder: Path) -> list[Path]:
    """All artifacts, the newest last."""
    return sorted(folder.glob("logs/*.ptz"), key=lambda path: path.stat().st_mtime)


def check(folder: Path, code: int, blow: str) -> list[str]:
    """Look at the files that a run has left, and return a line for each fault. `code`: its exit
    status; `blow`: the signal that it got, or nothing."""
    wrong = [] if code == 0 or blow else [f"exit status {code} of an undisturbed run"]
    for path in [*folder.glob("logs/*.ckpt"), *artifacts(folder)]:
        try:
            if path.suffix == ".ckpt":
                t.read_checkpoint(str(path))
            else:
                t.load(path)
        except Exception as error:
            wrong.append(f"{path.name}: {error}")
    for path in folder.rglob("*.tmp"):
        path.unlink()
        wrong += [] if "KILL" in blow else [f"{path.name} left behind"]
    last = (
        logs(folder)[-1:]
        if code and "KILL torchrun" not in blow and "KILL rank 0" not in blow
        else []
    )
    wrong += [
        f"the log ends with {log[-80:]!r}"
        for log in last
        if log and not log.splitlines()[-1].startswith(("error: ", "result {"))
    ]
    for log in last:
        if log and log.splitlines()[-1].startswith("error: "):
            wrong += says_what_is_left(folder, log.splitlines()[-1])
    return wrong


def one_run(folder: Path, rng) -> tuple[list[str], list[str]]:
    """(what happened, what was wrong), from the first start to the last end."""
    story, wrong = [], []
    for blows in range(3, -1, -1):
        ranks, extra = rng.choice((1, 2, 4)), {}
        moment = rng.choice(("step", "step", *MOMENTS))
        saved = sorted(folder.glob("logs/*.ckpt"), key=lambda path: path.stat().st_mtime)
        if artifacts(folder) and rng.random() < 0.3:
            extra = dict(EVAL_ONLY=artifacts(folder)[-1].relative_to(folder))
        elif saved:
            extra = dict(RESUME=saved[-1].relative_to(folder))
        if blows and moment == "compile" and "EVAL_ONLY" not in extra:
            extra["COMPILE"] = 1
            ranks = 1  # each rank compiles, which takes minutes
        begun = len(logs(folder))
        process = start_script(folder, ranks, forked=False, **{**SETTINGS, **extra})
        blow = disturb(process, folder, begun, moment, rng) if blows else ""
        done = finish(process, 400)
        at = re.findall(r"^step:(\d+)/", logs(folder)[-1], re.M) if blow and logs(folder) else []
        kind = "".join(name[0] for name in extra)  # E: EVAL_ONLY, R: RESUME, C: COMPILE
        aimed = f" {blow} in {moment}" if blow else ""
        story.append(f"{ranks}{kind}{aimed}{f' at {at[-1]}' if at else ''}")
        wrong += check(folder, done.returncode, blow)
        if done.returncode == 0:
            return story, wrong if extra.get("EVAL_ONLY") else wrong + no_record(folder)
        if not blow:
            return story, [*wrong, done.stderr[-300:]]
    return story, [*wrong, "did not end"]


def no_record(folder: Path) -> list[str]:
    """Why `record report` would not take the last log, if it would not."""
    newest = max(folder.glob("logs/*.txt"), key=lambda path: int(f"0{path.stem[5:]}"))
    try:
        read_run(parse_log(newest))
    except RecordError as error:
        return [f"no record: {error}"]
    return []


def verdict(folder: Path, expected: float) -> tuple[str, list[str]]:
    """(the bpb of the run, what is wrong with it or with its logs)."""
    last = next((log for log in reversed(logs(folder)) if re.search(f"^{FINAL}", log, re.M)), "")
    if not last:
        return "none", ["no final score"]
    bpb = float(values(last, FINAL)["val_bpb"])
    steps = {
        int(step)
        for log in logs(folder)
        for step in re.findall(r"^step:(\d+)/\d+ train_loss", log, re.M)
    }
    far = 2e-3 if any("\nCOMPILE=1\n" in log for log in logs(folder)) else 1e-4
    wrong = [] if abs(bpb - expected) <= far else [f"bpb is off by {bpb - expected:+.6f}"]
    return f"{bpb:.8f}", wrong + (
        [] if steps == set(range(1, STEPS + 1)) else [f"{STEPS - len(steps)} steps unlogged"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=15, help="after these no run starts")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    common.make_demo_corpus()
    rng, begun, failed = random.Random(args.seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "undisturbed"
        folder.mkdir()
        done = finish(start_script(folder, 1, forked=False, **SETTINGS))
        if done.returncode:
            sys.exit(done.stderr)
        expected = float(values(logs(folder)[0], FINAL)["val_bpb"])
        print(
            f"undisturbed, one rank: {expected:.8f} bpb. Starts: ranks, R = RESUME, E = EVAL_ONLY, "
            "C = COMPILE, then what ended it, in the middle of what, and the last step logged\n\n"
            "| run | starts | bpb | difference | lost |\n"
            "|---|---|---|---|---|",
            flush=True,
        )
        for run in range(1, args.runs + 1):
            if time.monotonic() - begun > 60 * args.minutes:
                print(f"| | time is over after {run - 1} runs | | | |")
                break
            folder = Path(top) / str(run)
            folder.mkdir()
            story, wrong = one_run(folder, rng)
            bpb, more = verdict(folder, expected)
            failed += bool(wrong + more)
            difference = "" if bpb == "none" else f"{float(bpb) - expected:+.1e}"
            print(
                f"| {run} | {', '.join(story)} | {bpb} | {difference} | "
                f"{'; '.join(wrong + more) or 'nothing'} |",
                flush=True,
            )
    print(f"\n{failed} runs lost something")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
