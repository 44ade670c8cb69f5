"""One finished run: its numbers, each checked against what else the log says before anybody may
use it. The challenge's limits stand here, in LIMITS."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .consistency import CAP, refuse_contradictions, refuse_copies, refuse_other_texts
from .log import Line, Log, first_difference, require

LEAST_SEEDS = 3
# may differ between the seeds of one result; what the paths lead to is compared by SHA-256
FREE_SETTINGS = {
    *("SEED", "RUN_ID", "RESUME", "SAVE_SCORES", "CHECKPOINT_EVERY"),
    *("DATA_PATH", "TRAIN_DATA_PATH", "TOKENIZER_PATH"),
}


# --- the challenge's limits ---


def largest_total(log: Log) -> tuple[float, str]:
    """(bytes, place) of the log's largest `Total submission size int6+lzma:`. Older logs have
    several; without a label it is that of the weights before packing."""
    log.find("Total submission size int")
    totals = [(line.size, line.place) for line in log.all("Total submission size int")]
    return max(totals, key=lambda total: total[0])


def train_seconds(log: Log) -> tuple[float, str]:
    """(seconds, place) of the largest train_time: what follows the last step, as GPTQ's curvature,
    counts as training too."""
    lines = [line for line in log.all("") if "train_time" in line]
    times = [(line.seconds("train_time"), line.place) for line in lines]
    if not times:
        log.find("stopping_early")
    return max(times, key=lambda time: time[0])


def eval_seconds(log: Log) -> tuple[float, str]:
    """(seconds, place) of the evaluation; of an older log, the sum of all its eval_time, each value
    once."""
    scores = {line["eval_time"]: line for line in log.all("") if "eval_time" in line}
    parts = sum(line.seconds("eval_time") for line in scores.values())
    if not log.has("total_eval_time:") and parts:
        numbers = ",".join(str(line.no) for line in scores.values())
        return parts, f"{log.path}:{numbers}: sum of eval_time"
    line = log.find("total_eval_time:")
    total = line.seconds("total_eval_time")
    line.require(
        total + 0.1 >= parts, f"expected at least {parts:.1f}s, the sum of the scores' eval_time"
    )
    return total, line.place


@dataclass(frozen=True)
class Limit:
    most: int
    unit: str
    what: str  # after the number of a log that is over it
    digits: str  # how the number is written
    extreme: str  # what the greatest of several is called
    rule: str  # its name in submission.json's compliance
    read: Callable[[Log], tuple[float, str]]  # (value, place)


LIMITS = dict(  # by the name of the check
    artifact=Limit(CAP, "bytes", "bytes", "d", "largest", "artifact_under_cap", largest_total),
    train_time=Limit(
        600, "s", "s of training", ".3f", "longest", "train_under_600s", train_seconds
    ),
    eval_time=Limit(600, "s", "s of evaluation", ".1f", "longest", "eval_under_600s", eval_seconds),
)


# --- one run ---


@dataclass(frozen=True)
class Run:
    """A run's numbers, under the names that they have in its `result` line (but for step_ms)."""

    log: Log
    seed: int
    steps: int
    step_ms: float
    train_seconds: float
    eval_seconds: float
    stride_tokens: int
    code_bytes: int
    submission_bytes: int  # code included
    neural_nats_per_token: float  # sliding window, without counts
    neural_bits_per_byte: float
    mixed_nats_per_token: float
    mixed_bits_per_byte: float  # the score
    gain_bits_per_byte: float  # neural - mixed

    @property
    def audit(self) -> Line:
        """What ngram_audit found."""
        return self.log.find("ngram_audit")


def read_run(log: Log) -> Run:
    """The numbers of a complete run of train_gpt.py. RecordError: anything missing, cut short,
    impossible, or other in the line that programs read than in those that people read."""
    refuse_unfinished(log)
    total, neural = log.find("total_eval_time:"), sliding(log)
    mixed = log.find("final_ngram_exact")
    check_units(log)
    gain = neural.number("val_bpb") - mixed.number("val_bpb")
    problem = f"expected gain:{gain:.8f}, neural ({neural.place}) - mixed; lines of two runs?"
    mixed.require(abs(gain - mixed.number("gain")) <= 2e-8, problem)
    last, (code, size) = last_validation(log), submission_bytes(log)
    log.find("ngram_audit")
    run = Run(
        log=log,
        seed=seed_of(log),
        steps=last.step,
        step_ms=round(1e3 * last.seconds("step_avg"), 6),
        train_seconds=train_seconds(log)[0],
        eval_seconds=total.seconds("total_eval_time"),
        stride_tokens=int(neural.number("stride")),
        code_bytes=code,
        submission_bytes=size,
        neural_nats_per_token=neural.number("val_loss"),
        neural_bits_per_byte=neural.number("val_bpb"),
        mixed_nats_per_token=mixed.number("val_loss"),
        mixed_bits_per_byte=mixed.number("val_bpb"),
        gain_bits_per_byte=mixed.number("gain"),
    )
    for line in log.all("result "):
        check_result(line, run)
    return run


def check_result(line: Line, run: Run) -> None:
    """RecordError: the line that programs read is no JSON, or says another number."""
    try:
        found = dict(json.loads(line.text.removeprefix("result ")))
    except (ValueError, TypeError, RecursionError):
        found = {}
    expected = {name: value for name, value in vars(run).items() if name not in ("log", "step_ms")}
    line.require(found, f"expected JSON with {', '.join(expected)}")
    for name, value in expected.items():
        problem = f"{name} is {found.get(name, 'missing')}, but the lines above it say {value}"
        line.require(found.get(name) == value, problem)


def refuse_unfinished(log: Log) -> None:
    """RecordError: the run died, is another one than its name says, or trained nothing."""
    for line in log.all("error:"):
        line.require(False, "expected a run without errors; repeat or RESUME it")
    for line in log.all("warning: SEED="):
        problem = "expected one seed from the first step on; RESUME with that of the checkpoint"
        line.require(False, problem)
    first, *more = log.all("total_eval_time:") or [None]
    for line in more:
        problem = f"a second run in one log, the first ended in line {first.no}"
        line.require(False, f"{problem}; use one log per run")
    run_id = log.setting("RUN_ID")
    is_its = re.fullmatch(rf"{re.escape(run_id)}(_\d+)?", log.name)
    require(
        not run_id or is_its or log.path.name == record_name(log),
        f"{log.place('RUN_ID=')}: found RUN_ID={run_id}, expected the file to be named "
        f"{run_id}.txt or, in a folder for records/, {record_name(log)}: the log of another run?",
    )
    require(
        not log.settings.get("EVAL_ONLY"),
        f"{log.place('EVAL_ONLY=')}: the run trained nothing (EVAL_ONLY), expected training and "
        "scoring in one log",
    )
    require(
        log.settings.get("NGRAM_ENABLED", "True") != "False",
        f"{log.place('NGRAM_ENABLED=')}: the run mixed nothing (NGRAM_ENABLED=False), so it has no "
        "mixed score to report; expected a run with NGRAM_ENABLED=1",
    )
    steps = log.train_steps
    for begin in [] if log.has("resume:") else steps[:1]:
        problem = "expected step 1 or a line resume:...; lines are missing"
        message = f"{begin.place}: training begins at step {begin.step}, {problem}"
        require(begin.step == 1, message)
    for before, after in zip(steps, steps[1:]):
        require(
            after.step > before.step,
            f"{after.place}: step {after.step} follows step {before.step} of line {before.no}: "
            "two runs in one log; use one log per run",
        )


def record_name(log: Log) -> str:
    """How the log is called in a folder for records/."""
    return f"train_seed{seed_of(log)}.log"


def sliding(log: Log) -> Line:
    """The exact sliding-window score of the packed weights, whatever their bits."""
    names = (f"final_int{bits}_sliding_window_exact" for bits in range(3, 9))
    return log.find(next(filter(log.has, names), "final_int6_sliding_window_exact"))


def last_validation(log: Log) -> Line:
    """The validation that ended training. RecordError: there is none, or its times contradict each
    other."""
    is_last = log.validations and (
        not log.train_steps or log.validations[-1].step >= log.train_steps[-1].step
    )
    log.require_end(is_last, "a line step:... val_loss:... val_bpb:... after training")
    last = log.validations[-1]
    ms, average = 1e3 * last.seconds("train_time"), 1e3 * last.seconds("step_avg")
    fits = last.step >= 1 and abs(ms / last.step - average) <= 0.01 + 1 / last.step
    last.require(fits, "expected train_time / step = step_avg")
    return last


def check_units(log: Log) -> None:
    """Every val_loss (nats per token) and val_bpb (bits per byte) must fit the stream's bytes per
    token."""
    header = log.find("train_tokens:")
    sizes = [header.number(key) for key in ("val_bytes", "val_targets")]
    header.require(min(sizes) >= 1, "expected a validation stream")
    bytes_per_target = sizes[0] / sizes[1]
    for line in [*log.all("final_"), *log.validations]:
        if "val_loss" not in line or "val_bpb" not in line:
            continue
        loss, bpb = line.number("val_loss"), line.number("val_bpb")
        line.require(
            loss != bpb,
            "val_loss equals val_bpb, expected nats per token and bits per byte: one is the other",
        )
        far = 1e-6 if "exact" in line.text else 1e-3
        ratio = loss / math.log(2) / bpb if bpb else math.nan
        line.require(
            bpb > 0 and abs(ratio / bytes_per_target - 1) <= far,
            f"expected val_loss / ln 2 / val_bpb = {bytes_per_target:.6f} bytes per token, "
            f"as in line {header.no} (val_bytes / val_targets); found {ratio:.6f}",
        )


def submission_bytes(log: Log) -> tuple[int, int]:
    """(code bytes, code + model bytes). RecordError: they contradict each other or the source, or
    break the cap."""
    starts = "Serialized model int", "Code size:", "Total submission size int"
    model, code, total = (log.find(start) for start in starts)
    problem = f"the sum of lines {model.no} and {code.no}"
    total.require(
        model.size + code.size == total.size,
        f"expected {model.size + code.size} bytes, {problem}",
    )
    source_bytes = len(log.source.encode())
    code.require(
        source_bytes in (0, code.size),
        f"but the source above it has {source_bytes} bytes: not the log of one run",
    )
    cap = LIMITS["artifact"].most
    problem = f"expected at most {cap} bytes; this run cannot be submitted"
    total.require(total.size <= cap, problem)
    return code.size, total.size


def seed_of(log: Log) -> int:
    """SEED of the settings, or an older log's `seed:1337`."""
    older = log.find("seed:")["seed"] if log.has("seed:") else ""
    text = log.settings.get("SEED") or older or log.setting("SEED")
    require(text.isdigit(), f"{log.place('SEED=')}: found SEED={text}, expected an integer")
    return int(text)


# --- the runs of one result ---


def read_runs(logs: list[Log]) -> list[Run]:
    """The runs of one result, by seed. RecordError: one is not complete, contradicts itself, or is
    no run of the same experiment."""
    runs = [read_run(log) for log in logs]
    check_same_experiment(logs)
    for log in logs:
        refuse_contradictions(log)
    refuse_copies(logs)
    refuse_other_texts(logs)
    return sorted(runs, key=lambda run: run.seed)


def check_same_experiment(logs: list[Log]) -> None:
    """Seeds of one result share code, settings and data; RecordError names the first difference."""
    first, seeds = logs[0], {}
    for log in logs:
        seed = seed_of(log)
        require(
            seed not in seeds,
            f"{log.place('SEED=')}: seed {seed} is also that of {seeds.get(seed)}, expected each "
            "seed once; leave one out",
        )
        seeds[seed] = log.path
        no = first_difference(log.source, first.source)
        require(
            not no,
            f"{log.path}:{no}: the source differs from that in {first.path}:{no}, expected the "
            "same code for all seeds; repeat the older runs",
        )
        for name in sorted((set(log.settings) | set(first.settings)) - FREE_SETTINGS):
            mine, its = log.settings.get(name), first.settings.get(name)
            require(
                mine == its,
                f"{log.place(f'{name}=')}: found {name}={mine}, but {its} in "
                f"{first.place(f'{name}=')}; only {', '.join(sorted(FREE_SETTINGS))} may differ",
            )
        check_same_data(log, first)


def check_same_data(log: Log, first: Log) -> None:
    """RecordError names the first line by which two runs were trained or scored on different
    data."""
    found, expected = data_lines(log), data_lines(first)
    problem = f"{log.path}: there are {len(found)} data lines, but {len(expected)} in {first.path}"
    require(len(found) == len(expected), f"{problem}; expected byte shards for all runs or none")
    for mine, its in zip(found, expected):
        problem = (
            f"other data than {its.place} ({its.text[:120]!r}), expected the same for all logs"
        )
        mine.require(mine == its, problem)


def data_lines(log: Log) -> list[Line]:
    """What was trained and scored on: shards, tokenizer, which stream it is, sizes, and the byte
    shards if there are any. RecordError: the log does not say."""
    require(
        not log.has("data:val first:"),
        f"{log.place('data:val ')}: the log of an older train_gpt.py, which hashed only the first "
        "shard of the validation stream, expected the SHA-256 of all of it; repeat the run",
    )
    starts = "data:train ", "data:val ", "data:tokenizer ", "data:stream ", "train_tokens:"
    return [*map(log.find, starts), *log.all("data:val_bytes ")]


def read_systems(logs: list[Log]) -> dict[str, list[Run]]:
    """system -> its runs, from logs named <system>_seed<seed>.txt. RecordError: a name says no
    system, or the systems differ in data or training time."""
    groups: dict[str, list[Log]] = {}
    for log in sorted(logs, key=lambda log: log.path):
        name, mark, _ = log.name.rpartition("_seed")
        problem = "its name says no system, expected <system>_seed<seed>.txt; set RUN_ID so"
        require(mark, f"{log.path}: {problem}")
        groups.setdefault(name, []).append(log)
    first, *others = (log for group in groups.values() for log in group)
    for log in others:
        check_same_data(log, first)
        mine, its = (of.setting("MAX_WALLCLOCK_SECONDS") for of in (log, first))
        at, its_at = (of.place("MAX_WALLCLOCK_SECONDS=") for of in (log, first))
        require(
            mine == its,
            f"{at}: found MAX_WALLCLOCK_SECONDS={mine}, but {its} in {its_at}; expected the same "
            "training time for all systems",
        )
    return {name: read_runs(group) for name, group in groups.items()}
