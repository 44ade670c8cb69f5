"""Do two revisions of train_gpt.py give the same numbers, bit for bit, on a CPU? For refactorings.

    python -m tools.same_numbers BASE [--new FILE_OR_REV] [--cases demo,resume] [--ranks 1,2]
                                 [--keep DIR] [--show 3] [--jobs CORES]

BASE is a git revision. The other side is the working tree's train_gpt.py, or the file or revision
that --new names. Both are started by the working tree's launch scripts, each run in a folder of its
own. The runs are short and of demo size; the number of steps is fixed, and no clock decides
anything. See CASES.

Compared are all lines of the log after the source, except for EXCEPTIONS; the last checkpoint
(weights, momenta, averages) and the scores of every target, bit for bit; and the artifact's bytes
or, if the scripts pack differently, its weights.
There is one line per case and number of ranks. The exit status is 1 if anything differs or a run
fails.

With --keep DIR the results of BASE stay in DIR (some 10 MB per run). The next comparison uses them
again if script, launch scripts, settings, data, versions and processor are still the same.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from data import prepare_demo

# nothing here imports the tree's train_gpt.py: it may be the side that does not work yet
ROOT = Path(__file__).resolve().parent.parent
TRAIN_SHARDS = 2
TARGETS = 12_000  # of the validation stream
SECONDS = 1200  # most seconds that a run may take

COMMON = dict(
    # demo size
    NUM_LAYERS=5, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, VE_LAYERS="3,4", VE_DIM=32,
    XSA_LAST_N=2, BIGRAM_VOCAB_SIZE=1024, BIGRAM_DIM=32, TRAIN_BATCH_TOKENS=2048, TRAIN_SEQ_LEN=256,
    EVAL_SEQ_LEN=256, EVAL_STRIDE=64, VAL_BATCH_SIZE=4096, TIED_EMBED_LR=0.03,
    # no clock; validation, late QAT and snapshots all come within 24 steps
    ITERATIONS=24, MAX_WALLCLOCK_SECONDS=0, EVAL_BUDGET_SECONDS=0, WARMUP_STEPS=2,
    WARMDOWN_ITERS=16, LATE_QAT_THRESHOLD=0.5, EMA_DECAY=0.8, SWA_EVERY=2, SWA_THRESHOLD=0.7,
    MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_STEPS=12, VAL_LOSS_EVERY=12, TRAIN_LOG_EVERY=1,
    # what is compared; CHECKPOINT_EVERY makes the checkpoint stay, which is the last step's
    RUN_ID="same", DATA_PATH="data", TOKENIZER_PATH="data/tokenizer.model", SAVE_SCORES=1,
    CHECKPOINT_EVERY=1e6,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A launch script, and settings beside COMMON's."""

    launch: str
    settings: dict = field(default_factory=dict)
    after: str = ""  # another case, with what is left of which this one begins:
    start: str = ""  # "EVAL_ONLY": each script's own artifact; "RESUME": BASE's checkpoint
    budget: int = 0  # most bytes of the artifact alone, whatever the code's size; 0: as it is


UNTIED = dict(
    TIE_EMBEDDINGS=0, VRL_ENABLED=0, SMEAR_ENABLED=0, UNET_SKIPS=0, VE_ENABLED=0,
    BIGRAM_VOCAB_SIZE=0, XSA_LAST_N=0, LN_SCALE=0, LOGIT_SOFTCAP=0, GRAD_CLIP_NORM=0,
    AVERAGING="ema", EMBED_LR=0.03, FILL_BUDGET=0, QUANT_BITS=5,
    EVAL_BUDGET_SECONDS=0.001,  # always exceeded: strides 64, 96, 128, whose third segment ends
)  # fmt: skip

# In 24 steps: blocks recur from step 14 on, weights are rounded from step 16 on.
FRONTIER = dict(RECUR_LAYERS="2", PARALLEL_START_LAYER=3, XSA_LAST_N=5, GPTQ_TOKENS=16_384)

CASES = {
    "demo": Case("demo", dict(MICRO_BATCH_TOKENS=512)),
    "backoff": Case("backoff"),
    "order_adaptive": Case(
        "order_adaptive",
        dict(NUM_KV_HEADS=4, XSA_LAST_N=5, TTT_CHUNK_TOKENS=4096, NGRAM_MIN_COUNT=1),
    ),
    "prefill": Case("prefill", dict(WARMDOWN_ITERS=20, LATE_QAT_THRESHOLD=0)),
    "frontier": Case("frontier", FRONTIER),
    "eval_only": Case(
        "demo", dict(EVAL_STRIDE=96, NGRAM_MIN_ORDER=3, NGRAM_ORDER=12), "demo", "EVAL_ONLY"
    ),
    "frontier_eval_only": Case(
        "frontier", {**FRONTIER, "TTT_EPOCHS": 1, "TTT_CHUNK_TOKENS": 4096}, "frontier", "EVAL_ONLY"
    ),
    "resume": Case("backoff", dict(ITERATIONS=36, NGRAM_ENABLED=0), "backoff", "RESUME"),
    "frontier_resume": Case(  # blocks recur from step 27 on
        "frontier", {**FRONTIER, "ITERATIONS": 36, "RECUR_START": 0.75}, "frontier", "RESUME"
    ),
    "tight": Case("demo", dict(AVERAGING="ema_swa", QAT_ROUNDING="soft"), budget=300_000),
    "untied": Case("demo", UNTIED),
}

EXCEPTIONS = (  # what is taken out of both logs before they are compared: pattern, reason
    (r"\b(train|eval|added|total_eval)_time:\S+", "a time"),
    (r"\bstep_avg:\S+", "a time"),
    (r"\btok/s:\S+", "a speed"),
    (r"\bprojected:\S+", "a time, expected from a speed"),
    (r"\bseconds:\S+", "a time, of measuring the curvature"),
    (r"^.* elapsed:\S+ left:\S+$", "progress, logged every 10 s"),
    (r"^  training .* evaluation .*$", "times, on the last screen"),
    (r"^Code size: .*$", "the code's size"),
    (r"^Total submission size .*$", "with the code's size"),
    (r"^  artifact .* code included.*$", "with the code's size, on the last screen"),
    (r"^artifact:.*$", "its name and SHA-256; the artifacts themselves are compared"),
    (r"(?<=^artifact_bytes) .*$", "likewise"),
    (r"^Serialized model .*$", "likewise"),
    (r"\b(bits_per_parameter|levels|bytes|bytes_by_rans):\S+", "likewise"),
    (r"^final_ngram_hashed .*$", "of BASE alone: studies/predecessors.py counts by hashes now"),
)
SETTINGS_OF_ONE = {  # settings that log, checkpoint and scores of one side alone may have: reason
    "NGRAM_COUNTS": "chose the hashed counts, which are now those of studies/predecessors.py",
    "NGRAM_BUCKETS": "their number of buckets",
    "CODER": "how codes become bytes; before, they always were rANS's",
}
RESULT_EXCEPTIONS = {  # keys of the line `result {json}` that are not compared: reason
    "train_seconds": "a time",
    "eval_seconds": "a time",
    "code_bytes": "the code's size",
    "submission_bytes": "with the code's size; the artifact itself is compared",
    "artifact_sha256": "the artifact itself is compared",
}

# With this line the cap less the code's size, which is what the artifact may take, is `budget`.
CAP = re.compile(rb"^SIZE_CAP = [\d_]+", re.M)
EQUAL_BUDGET = "SIZE_CAP = {budget} + Path(__file__).stat().st_size"


class Failed(Exception):
    """A run that failed; the message says why."""


@dataclass(frozen=True)
class Side:
    """One of the two scripts; its results are folders in `store`."""

    name: str
    script: bytes
    store: Path


# --- Scripts and data -----------------------------------------------------------------------------


def read_script(source: str) -> bytes:
    """train_gpt.py of a git revision, or the file `source`."""
    if Path(source).is_file():
        return Path(source).read_bytes()
    command = ["git", "-C", str(ROOT), "show", f"{source}:train_gpt.py"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode().strip().splitlines()[0]
        sys.exit(f"{source}: no such file, and no git revision with a train_gpt.py: {reason}")
    return done.stdout


def write_data(folder: Path) -> str:
    """The demo corpus with a short validation stream, two training shards; returns its SHA-256."""
    prepare_demo.main(ROOT / "data")
    demo = ROOT / "data/datasets/demo_sp1024"
    header = np.fromfile(demo / "fineweb_val_000000.bin", "<i4", 256)
    train, val = (
        np.fromfile(demo / f"fineweb_{part}_000000.bin", "<u2", offset=1024)
        for part in ("train", "val")
    )
    border = len(train) // TRAIN_SHARDS + 3000  # a window of the loader crosses it
    shards = dict(train_000000=train[:border], train_000001=train[border:])
    for name, tokens in {**shards, "val_000000": val[: TARGETS + 1]}.items():
        header[2] = len(tokens)
        (folder / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    shutil.copy(ROOT / "data/tokenizers/demo_1024_bpe.model", folder / "tokenizer.model")
    return digest(*(path.read_bytes() for path in sorted(folder.iterdir())))


def digest(*facts) -> str:
    """SHA-256 of `facts`, bytes or what repr tells."""
    parts = (fact if isinstance(fact, bytes) else repr(fact).encode() for fact in facts)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@functools.cache
def surroundings() -> str:
    """What else may change the numbers: versions and processor, as one digest."""
    cpu = re.findall(r"^(?:model name|flags)\s*:.*", Path("/proc/cpuinfo").read_text(), re.M)[:2]
    packages = map(version, ("torch", "numpy", "sentencepiece"))
    return digest(sys.version, *packages, platform.platform(), os.cpu_count(), *cpu)


# --- Runs -----------------------------------------------------------------------------------------


def key(side: Side, name: str, ranks: int, data_digest: str) -> str:
    """Name of a result's folder. Two runs have the same one only if their numbers must be equal."""
    case, launchers = CASES[name], [ROOT / "runs/common.sh", ROOT / f"runs/{CASES[name].launch}.sh"]
    facts = [side.script, case, COMMON, EQUAL_BUDGET, ranks, data_digest, surroundings()]
    facts += [path.read_bytes() for path in launchers]
    facts += [CASES[case.after]] if case.after else []
    return f"{name}_{ranks}_{digest(*facts)[:20]}"


def run(case: Case, ranks: int, folder: Path) -> None:
    """Run the launch script in `folder`, which holds copies of the launch scripts, train_gpt.py and
    the data. Failed: another exit status than 0, or no end within SECONDS."""
    start = f"start.{'ptz' if case.start == 'EVAL_ONLY' else 'ckpt'}"
    settings = COMMON | case.settings | ({case.start: start} if case.start else {})
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    launch = dict(PYTHON=sys.executable, NPROC=ranks)
    fixed = dict(OMP_NUM_THREADS=1, CUDA_VISIBLE_DEVICES="")
    env = {k: str(v) for k, v in {**kept, **launch, **fixed, **settings}.items()}
    with open(folder / "stderr.txt", "w+") as stderr:
        process = subprocess.Popen(
            ["bash", f"runs/{case.launch}.sh"],
            cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # bash and torchrun, which then ends its ranks
            process.wait()
            raise Failed(f"no end after {SECONDS} s") from None
        if code:
            said = (folder / "stderr.txt").read_text()
            own = re.split(r"^[EW]\d{4} ", said, maxsplit=1, flags=re.M)[0]  # not torchrun's lines
            last = "\n    ".join((own.strip() or said.strip()).splitlines()[-6:])
            raise Failed(f"exit status {code}, stderr ends with\n    {last}")


def result(side: Side, name: str, ranks: int, data: Path, data_digest: str, before: Path) -> Path:
    """The folder with all that this run left, made now unless it is in the store."""
    case, done = CASES[name], side.store / key(side, name, ranks, data_digest)
    if done.exists():
        return done
    folder = Path(tempfile.mkdtemp(dir=side.store, prefix=f"{name}_{ranks}_part_"))
    try:
        source = side.script
        if case.budget:
            line = EQUAL_BUDGET.format(budget=case.budget).encode()
            source, found = CAP.subn(line, source)
            if found != 1:
                raise Failed("no line SIZE_CAP = ... to replace by an equal budget")
        (folder / "train_gpt.py").write_bytes(source)
        shutil.copytree(ROOT / "runs", folder / "runs")
        # A launch script may start studies/predecessors.py after the run. Its result is not
        # compared, so an empty file in its place saves the time.
        (folder / "studies").mkdir()
        for module in ("__init__", "predecessors"):
            (folder / f"studies/{module}.py").touch()
        (folder / "data").symlink_to(data)  # so that all logs have the same path
        if case.start == "EVAL_ONLY":
            shutil.copy(artifact(before), folder / "start.ptz")
        elif case.start:
            shutil.copy(before / "logs/same.ckpt", folder / "start.ckpt")
        run(case, ranks, folder)
        for path in (folder / "data", *folder.glob("start.*")):
            path.unlink()
        folder.rename(done)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return done


class Schedule:
    """Runs both sides' cases, several at a time. A run that others begin from is run before them,
    and once."""

    def __init__(self, jobs: int, data: Path):
        self.pool, self.data, self.data_digest = ThreadPoolExecutor(jobs), data, write_data(data)
        self.futures: dict[tuple, Future] = {}

    def submit(self, side: Side, base: Side, name: str, ranks: int) -> Future:
        """The folder that will hold the result. Jobs begin in order: none waits for a later one."""
        job = side.name, name, ranks
        if job not in self.futures:
            after = CASES[name].after
            beginning = base if CASES[name].start == "RESUME" else side
            before = self.submit(beginning, base, after, ranks) if after else None
            self.futures[job] = self.pool.submit(self.work, side, name, ranks, before)
        return self.futures[job]

    def work(self, side: Side, name: str, ranks: int, before: Future | None) -> Path:
        try:
            folder = before.result() if before else None
            return result(side, name, ranks, self.data, self.data_digest, folder)
        except Failed as error:
            raise Failed(f"{side.name}: {str(error).removeprefix(f'{side.name}: ')}") from None


# --- Comparison -----------------------------------------------------------------------------------


def artifact(folder: Path) -> Path | None:
    return next(folder.glob("final_model.*.ptz"), None)


def log_values(log: str) -> dict[str, str]:
    """All values after the source: "first word of the line, key" -> value, numbered if repeated.
    The words of a line that are no key:value pairs are the value of "first word, text"."""
    body, values, seen = log.split("=" * 100 + "\n")[-1], {}, Counter()
    for pattern, _ in EXCEPTIONS:
        body = re.sub(pattern, "", body, flags=re.M)

    def add(name: str, value: str) -> None:
        seen[name] += 1
        values[f"{name} ({seen[name]})" if seen[name] > 1 else name] = value

    for line in filter(None, map(str.strip, body.splitlines())):
        if setting := re.fullmatch(r"([A-Z][A-Z0-9_]+)=(.*)", line):
            if setting[1] not in SETTINGS_OF_ONE:
                add(f"setting {setting[1]}", setting[2])
            continue
        if line.startswith("result {"):
            result = json.loads(line.removeprefix("result "))
            for name in result.keys() - RESULT_EXCEPTIONS.keys():
                add(f"result {name}", repr(result[name]))
            continue
        first, *words = line.split()
        pairs = [word for word in words if re.fullmatch("[^:]+:.+", word)]
        text = " ".join(word for word in words if word not in pairs)
        if text or not pairs:
            add(f"{first} text", text)
        for name, _, value in (pair.partition(":") for pair in pairs):
            add(f"{first} {name}", value)
    return values


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of scores and checkpoint, and their settings, which are texts, as arrays too."""
    found = {}
    for kind, path in dict(scores="logs/same_scores.npz", checkpoint="logs/same.ckpt").items():
        if (folder / path).exists():
            with np.load(folder / path) as archive:
                found |= {f"{kind} {name}": array for name, array in archive.items()}
        if f"{kind} settings" in found:
            settings = json.loads(str(found.pop(f"{kind} settings")))
            for name in settings.keys() - SETTINGS_OF_ONE.keys():
                found[f"{kind} setting {name}"] = np.array(settings[name])
    if "checkpoint progress" in found:
        found["checkpoint progress"] = found["checkpoint progress"][:1]  # the rest is a time
    return found


def describe(a: np.ndarray, b: np.ndarray) -> str:
    """How two arrays differ; "" if they are equal."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {a.shape} -> {b.dtype} {b.shape}"
    if a.tobytes() == b.tobytes():
        return ""
    if a.dtype.kind not in "fiu":
        return "differs"
    most = np.abs(a.astype(np.float64) - b).max()
    return f"{np.count_nonzero(a != b)} of {a.size} numbers differ, by up to {most:.3g}"


def compare(base: Path, new: Path) -> tuple[str, list[str]]:
    """(what was compared, the differences)."""
    a, b = (log_values((folder / "logs/same.txt").read_text()) for folder in (base, new))
    found = [
        f"{name}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]
    x, y = arrays(base), arrays(new)
    for name in {**x, **y}:
        if name not in x or name not in y:
            found.append(f"{name}: only in {'BASE' if name in x else 'NEW'}")
        elif said := describe(x[name], y[name]):
            found.append(f"{name}: {said}")
    sizes = [array.size for array in x.values() if array.dtype.kind in "fiu"]  # not the settings
    return f"{len(a)} values in the log, {sum(sizes):,} in {len(sizes)} arrays", found


def compare_artifacts(base: Path, new: Path) -> tuple[str, bool]:
    """(what to say of the artifacts, whether they are equal)."""
    old, young = artifact(base), artifact(new)
    if not old and not young:
        return "no artifact is written", True
    if not (old and young and old.name == young.name):
        return "artifact's name DIFFERS", False
    if old.read_bytes() == young.read_bytes():
        return "artifact's SHA-256 equal", True
    a, b = weights(base), weights(new)
    equal = list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    return f"artifact's weights {'equal' if equal else 'DIFFER'}, its bytes differ", equal


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict in the artifact, read by the script that wrote it: formats may differ."""
    spec = importlib.util.spec_from_file_location(f"script_{folder.name}", folder / "train_gpt.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # older scripts need it
    spec.loader.exec_module(script)
    found = script.decompress(artifact(folder).read_bytes())
    return found if isinstance(found, dict) else found[1]


def report(name: str, ranks: int, base: Future, new: Future, show: int) -> bool:
    """Print the line of a case. Returns whether all of it is equal."""
    label = f"{name:14} {ranks} rank{'s' if ranks > 1 else ' '}"
    try:
        folders = base.result(), new.result()
    except Failed as error:
        print(f"{label}  FAILED, {error}", flush=True)
        return False
    (facts, found), (word, same) = compare(*folders), compare_artifacts(*folders)
    verdict = f"{len(found)} DIFFER" if found else "equal"
    print(f"{label}  {facts}: {verdict}; {word}", flush=True)
    for difference in found[:show]:
        print(f"    {difference}")
    if len(found) > show:
        print(f"    and {len(found) - show} more", flush=True)
    return not found and same


# --- main -----------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def cases(text: str) -> list[str]:
        if unknown := set(names := text.split(",")) - set(CASES):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(CASES)}")
        return names

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m tools.same_numbers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("base", metavar="BASE", help="git revision (or file)")
    parser.add_argument("--new", default=str(ROOT / "train_gpt.py"), help="file or git revision")
    parser.add_argument("--cases", type=cases, default=list(CASES), help=",".join(CASES))
    parser.add_argument("--ranks", type=numbers, default=[1, 2], help="1,2")
    parser.add_argument("--keep", type=Path, help="folder in which BASE's results stay")
    parser.add_argument("--show", type=int, default=3, help="differences shown per case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    return parser.parse_args()


def main() -> None:
    args, began = parse_arguments(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as top:
        kept, fresh, data = args.keep or Path(top, "base"), Path(top, "new"), Path(top, "data")
        for folder in (kept, fresh, data):
            folder.mkdir(parents=True, exist_ok=True)
        base = Side("BASE", read_script(args.base), kept.resolve())
        new = Side("NEW", read_script(args.new), fresh)
        schedule = Schedule(args.jobs, data)
        try:
            rows = [
                (name, ranks, *(schedule.submit(side, base, name, ranks) for side in (base, new)))
                for ranks in args.ranks
                for name in args.cases
            ]
            different = [row for row in rows if not report(*row, args.show)]
        finally:
            schedule.pool.shutdown(cancel_futures=True)
    print(f"{len(rows)} comparisons, {len(different)} not equal; {time.monotonic() - began:.0f} s")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
