"""Short runs that are killed at random moments and resumed until they end: is nothing lost?

    python -m tools.soak [--runs 20] [--minutes 15] [--seed 1]

Each run trains a tiny model on the built-in corpus. It is disturbed up to three times, by SIGTERM
or SIGKILL to one rank or to torchrun. With SIGKILL of torchrun its ranks are killed too, as if the
machine was switched off. The run goes on from its newest checkpoint or, sometimes, from its
artifact (EVAL_ONLY), on a random number of ranks.

After each end all checkpoints and artifacts must be readable, and the log must be whole and say why
the run ended. After the last one every step must be in a log, and the bpb must be that of an
undisturbed run to 1e-4. It prints a markdown table. The exit status is 1 if anything was lost.
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
    "DATA_PATH": ROOT / "data/datasets/demo_sp1024",
    "TOKENIZER_PATH": ROOT / "data/tokenizers/demo_1024_bpe.model",
}
FINAL = "final_ngram_exact"


def logs(folder: Path) -> list[str]:
    """All logs, in the order of the runs, without the source at their beginning."""
    paths = sorted((folder / "logs").glob("*.txt"), key=lambda path: int(f"0{path.stem[5:]}"))
    return [path.read_text().split("=" * 100 + "\n")[-1] for path in paths]


def moment(rng):
    """A random moment, as a function that says whether a log has reached it: the start, a step,
    packing, or scoring."""
    step = rng.randrange(STEPS)
    line = rng.choice(
        (None, "step", "step", "step", "final_float_exact", "final_int6_roundtrip_exact")
    )
    if line == "step":
        return lambda log: any(int(s) >= step for s in re.findall(r"^step:(\d+)/", log, re.M))
    return lambda log: not line or re.search(f"^{line}", log, re.M)


def disturb(process, folder: Path, begun: int, rng) -> str:
    """Wait until the log after the first `begun` ones reaches a random moment, and up to 0.5 s
    more; then send a random signal. Returns what it was, "" if the run ended before."""
    due = moment(rng)
    while process.poll() is None and not due("".join(logs(folder)[begun:])):
        time.sleep(0.05)
    time.sleep(rng.choice((0, 0, 0.2, 0.5)))
    ranks = workers(process) if process.poll() is None else {}
    if not ranks:
        return ""
    number, aim = rng.choice((signal.SIGTERM, signal.SIGKILL)), rng.choice(("torchrun", "rank"))
    rank = rng.choice(sorted(ranks))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid if aim == "torchrun" else ranks[rank], number)
        for pid in ranks.values() if (aim, number) == ("torchrun", signal.SIGKILL) else ():
            os.kill(pid, number)
    return f"{number.name[3:]} {aim if aim == 'torchrun' else f'rank {rank}'}"


def check(folder: Path, code: int, blow: str) -> list[str]:
    """Look at the files that a run has left, and return a line for each fault. `code`: its exit
    status; `blow`: the signal that it got, or nothing."""
    wrong = [] if code == 0 or blow else [f"exit status {code} of an undisturbed run"]
    hp = t.Hyperparameters.from_env({k: str(v) for k, v in SETTINGS.items()})
    for path in [*folder.glob("logs/*.ckpt"), *folder.glob("*.ptz")]:
        try:
            if path.suffix == ".ckpt":
                t.read_checkpoint(str(path))
            else:
                t.GPT(hp).load_state_dict(t.decompress(path.read_bytes()))
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
    return wrong


def one_run(folder: Path, rng) -> tuple[list[str], list[str]]:
    """(what happened, what was wrong), from the first start to the last end."""
    story, wrong = [], []
    for blows in range(3, -1, -1):
        ranks, extra = rng.choice((1, 2, 4)), {}
        saved = sorted(folder.glob("logs/*.ckpt"), key=lambda path: path.stat().st_mtime)
        if list(folder.glob("*.ptz")) and rng.random() < 0.5:
            extra = dict(EVAL_ONLY="final_model.int6.ptz")
        elif saved:
            extra = dict(RESUME=saved[-1].relative_to(folder))
        begun, process = (
            len(logs(folder)),
            start_script(folder, ranks, forked=False, **{**SETTINGS, **extra}),
        )
        blow = disturb(process, folder, begun, rng) if blows else ""
        done = finish(process, 200)
        at = re.findall(r"^step:(\d+)/", logs(folder)[-1], re.M) if blow and logs(folder) else []
        kind = "".join(name[0] for name in extra)  # E: EVAL_ONLY, R: RESUME
        story.append(f"{ranks}{kind}{f' {blow}' if blow else ''}{f' at {at[-1]}' if at else ''}")
        wrong += check(folder, done.returncode, blow)
        if done.returncode == 0:
            return story, wrong
        if not blow:
            return story, [*wrong, done.stderr[-300:]]
    return story, [*wrong, "did not end"]


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
    wrong = [] if abs(bpb - expected) <= 1e-4 else [f"bpb is off by {bpb - expected:+.6f}"]
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
            "then what ended it and the last step logged\n\n"
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
