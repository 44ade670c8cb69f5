"""What a log says in two places must be the same. Most numbers of a run stand in its log more than
once, or are the sum of others: a log in which they differ was edited, or is a mixture of two
runs."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from .log import Line, Log, require, without_repeats

EDITED = "was the log edited, or are these lines of two runs?"
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # of a setting
KIND = re.compile(r"\s*(?:calibration \S+|ngram_order \S+|data:\w+|\w+)")  # of a line, by its start
EDGES = "0-0.5 0.5-1 1-1.5 1.5-2 2-3 3-4 4-5 5-inf".split()  # noqa: SIM905  of the calibration
CHECKED = 1 << 18  # tokens of the stream that data:round_trip decodes, at most
PREFIX = 1 << 14  # tokens that ngram_audit counts alone, at most
SAMPLES = 32  # targets at which ngram_audit enumerates the whole distribution, at most
LONGEST_PIECE = 128  # bytes of text of one token, with room to spare
CAP = 16_000_000

SCORED = "roundtrip", "sliding_window"  # the packed weights, in windows that do not overlap or do
LEARNS = "TTT_EPOCHS", "TTT_LORA_RANK"  # settings: ways to train while scoring

# A line that each log must have: how it starts, and by which text of the source a script is known
# that writes it. Scripts without that text are older ones.
WRITTEN = (
    *(("python:", "python:{"), ("data:round_trip ", "data:round_trip"), ("seed:", '"seed:{')),
    *(("data:unknown ", "data:unknown"), ("model_params:", '"model_params:{')),
    *(("train_loader:", "train_loader:dataset"), ("val_loader:", '"val_loader:shards')),
    *(("val_bpb:enabled", '"val_bpb:enabled'), ("data:train_shards ", '"train_shards": shards')),
    *(("changed:", '"changed: '), ("averaging:", '"averaging:{'), ("hardware:", '"hardware:{')),
    *(("final_float_exact", '"final_float"'), ("fit_artifact ", '"fit_artifact coarsen:{')),
    *(("artifact_bytes ", '"artifact_bytes code:{'), ("artifact:", '"artifact:{')),
    *(("ngram_audit ", '"ngram_audit {'), ("calibration ", '"calibration entropy:{')),
    *(("ngram_order ", '"ngram_order order:{'), ("  neural ", "  neural {")),
    ("eval_budget ", "eval_budget projected:{seconds:.1f}s {budget} stride:{stride}{what}"),
    *(("  artifact ", "  artifact {"), ("  training ", "  training {"), ("result ", '"result {')),
)
OFTEN = "calibration ", "ngram_order ", "eval_budget "  # of these there may be several
# Lines that stand in a log once: most of those, and some that not every run has.
ONCE = (
    *(start for start, _ in WRITTEN if not start.startswith(OFTEN)),
    *("data:val", "data:val_bytes", "data:tokenizer", "data:train", "data:stream", "resume:"),
    *("train_tokens:", "stopping_early:", "gptq_curvature", "peak memory", "Serialized model"),
    *("Code size:", "Total submission size", "total_eval_time:", "final_ngram_exact"),
    *(f"final_int{bits}_{kind}_exact" for bits in range(2, 9) for kind in SCORED),
)
TABLES = "calibration ", "ngram_order "  # one line for each bin, for each order
RESULT = (  # what the result line may say
    *("run_id", "seed", "steps", "step_ms", "train_seconds", "eval_seconds", "stride_tokens"),
    *("code_bytes", "submission_bytes", "artifact_sha256", "settings", "gain_bits_per_byte"),
    *("neural_nats_per_token", "neural_bits_per_byte"),
    *("mixed_nats_per_token", "mixed_bits_per_byte"),
)


def refuse_contradictions(log: Log) -> None:
    """RecordError: a line of the log is missing, stands there twice, or says another number than
    the others."""
    for check in CHECKS:
        check(log)


def agree(line: Line, key: str, expected: float, far: float, why: str) -> None:
    """RecordError, unless the number after `key` is `expected`, or at most `far` from it."""
    problem = f"expected {key}:{expected:.10g}, {why}; {EDITED}"
    line.require(abs(line.number(key) - expected) <= far, problem)


def says(line: Line, key: str, expected: str, why: str) -> None:
    """RecordError, unless the text after `key` is `expected`."""
    line.require(line[key] == expected, f"expected {key}:{expected}, {why}; {EDITED}")


def only(log: Log, prefix: str) -> Line | None:
    """The line that starts with `prefix`; None in a log of an older script that has none."""
    return log.find(prefix) if log.has(prefix) else None


def setting(log: Log, name: str) -> float:
    """The value of a setting that is a number. RecordError: it is missing, or none."""
    text = log.setting(name)
    place = log.place(f"{name}=")
    is_number = NUMBER.fullmatch(text) and math.isfinite(float(text))
    require(is_number, f"{place}: found {name}={text}, expected a number; {EDITED}")
    return float(text)


# --- which lines there are ---


def check_lines(log: Log) -> None:
    """Each line that the script writes once is there, once; the result is the last one. Kinds of
    lines that are not known here may repeat."""
    check_printing(log)
    seen: dict[str, int] = {}
    known = {KIND.match(start)[0] for start in ONCE}
    for no, text in log.lines:
        kind = KIND.match(text)
        is_setting = kind and text.startswith(f"{kind[0]}=") and kind[0] in log.settings
        if not (is_setting or kind and (kind[0] in known or text.startswith(TABLES))):
            continue
        line = Line(log.path, no, text)
        problem = f"expected one such line, line {seen.get(kind[0])} is another; {EDITED}"
        line.require(kind[0] not in seen, problem)
        seen[kind[0]] = no
    missing = [start for start, mark in WRITTEN if mark in log.source and not log.has(start)]
    log.require_end(not missing, f"a line {(missing or [''])[0]!r}, which its script writes")
    for line in log.all("result ")[-1:]:
        late = [no for no, text in log.lines if no > line.no and not text.startswith("warning:")]
        problem = f"expected it to be the last line, but line {(late or [0])[0]} follows"
        line.require(not late, problem)


def check_printing(log: Log) -> None:
    """No line hides another when it is printed, and none looks like a line of the script that is
    not read because it is indented. Warnings quote names of files, which may be odd."""
    starts = [start for start in (*ONCE, *TABLES, "final_") if not start.startswith(" ")]
    for no, text in log.lines:
        if text.startswith("warning:"):
            continue
        line = Line(log.path, no, text)
        odd = re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
        line.require(not odd, f"expected no control character; {EDITED}")
        inner = text.lstrip()
        is_indented = inner != text and inner.startswith((*starts, "step:"))
        line.require(not is_indented, f"expected no spaces before it; {EDITED}")


@lru_cache
def settings_of_source(source: str) -> dict[str, str | None]:
    """NAME -> default, as a log writes it, of every setting that the script has; None: a default
    that is not written out. Empty for a script without a class Hyperparameters."""
    try:
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError):
        return {}
    classes = [node for node in nodes if getattr(node, "name", "") == "Hyperparameters"]
    found = {}
    for node in (node for one in classes for node in one.body if isinstance(node, ast.AnnAssign)):
        try:
            default = ast.literal_eval(node.value.args[0])
        except (AttributeError, IndexError, ValueError):
            found[node.target.id.upper()] = None
            continue
        is_tuple = isinstance(default, tuple)
        text = ",".join(map(str, default)) if is_tuple else str(default)
        found[node.target.id.upper()] = text
    return found


def check_settings(log: Log) -> None:
    """All settings of the script are listed, and those that differ from its defaults stand in
    `changed:` and in the result."""
    defaults = settings_of_source(log.source)
    if not defaults:
        return
    place = f"{log.path}:{log.lines[0][0]}"
    missing, unknown = set(defaults) - set(log.settings), set(log.settings) - set(defaults)
    said = f"does not list the setting {min(missing, default='')}, expected all of its script"
    require(not missing, f"{place}: {said}; {EDITED}")
    for name in sorted(unknown):
        require(False, f"{log.place(f'{name}=')}: {name} is no setting of its script; {EDITED}")
    changed = {name: x for name, x in log.settings.items() if x != defaults[name]}
    line = only(log, "changed:")
    if line and None not in defaults.values():
        pairs = [f"{name}={x}" for name, x in changed.items()]
        said = f"changed: {' '.join(pairs) or 'nothing, all settings have their defaults'}"
        lacks = next((pair for pair in pairs if f" {pair} " not in f"{line.text} "), "no more")
        problem = f"expected {lacks} in it, as the settings above say; {EDITED}"
        line.require(line.text.rstrip() == said.rstrip(), problem)
    for line in log.all("result ") if 'result["settings"]' in log.source else ():
        found = parsed_result(line).get("settings")
        found = found if isinstance(found, dict) else {}
        names = [name for name in {**changed, **found} if changed.get(name) != found.get(name)]
        problem = f"its settings differ from those above in {', '.join(names)}; {EDITED}"
        line.require(found == changed or None in defaults.values(), problem)


def parsed_result(line: Line) -> dict:
    """The JSON of the `result` line. RecordError: it has none, or says something twice or more
    than the script does."""
    try:
        text = line.text.removeprefix("result ")
        found = dict(json.loads(text, object_pairs_hook=without_repeats))
    except (ValueError, TypeError, RecursionError) as error:
        line.require(False, f"expected JSON after result ({error})")
    more = sorted(set(found) - set(RESULT))
    line.require(not more, f"expected no {', '.join(more)} in it; {EDITED}")
    return found


# --- data and hardware ---


def check_data(log: Log) -> None:
    """The lines about data agree with each other and with the settings."""
    header, val, train = map(log.find, ("train_tokens:", "data:val ", "data:train "))
    targets, train_tokens = (header.number(key) for key in ("val_targets", "train_tokens"))
    why = f"one more than val_targets in line {header.no}"
    agree(val, "tokens", targets + 1, 0, why)
    agree(train, "tokens", train_tokens, 0, f"as train_tokens in line {header.no}")
    if line := only(log, "data:train_shards "):
        shards = line.text.removeprefix("data:train_shards ").split(" ")
        says(train, "sha256", hashlib.sha256(" ".join(shards).encode()).hexdigest(), "of that list")
        agree(train, "shards", len(shards), 0, f"as many as line {line.no} lists")
        lengths = [shard.split(":")[1] for shard in shards if shard.count(":") == 2]
        total = sum(int(length) for length in lengths if length.isdigit())
        agree(train, "tokens", total, 0, f"the sum of the shards in line {line.no}")
    check_round_trip(log)
    check_stream(log.find("data:stream "), int(targets), log.source)
    check_customary(log, targets, train.number("shards"))


def check_round_trip(log: Log) -> None:
    """The text that was decoded has about as many bytes per token as the whole stream is said to
    have; if it is the whole stream, as many bytes."""
    line, header = only(log, "data:round_trip "), log.find("train_tokens:")
    targets, size = header.number("val_targets"), header.number("val_bytes")
    if not line or line.number("tokens") < min(targets, CHECKED) / 2:
        return  # too little of the stream could be decoded
    tokens, decoded = line.number("tokens"), line.number("bytes")
    problem = f"expected at most the {targets + 1:g} tokens of the stream; {EDITED}"
    line.require(tokens <= targets + 1, problem)
    ratio = (decoded / tokens) / (size / targets)
    problem = f"its bytes per token are {ratio:.2f} times those of line {header.no}; {EDITED}"
    # a text that somebody has put together may begin with another language
    most = 2 if log.find("data:stream ")["name"] == "unknown" else 1.25
    line.require(1 / most <= ratio <= most, problem)
    unknown = only(log, "data:unknown ")
    is_whole = targets < CHECKED and log.find("data:val ")["shards"] == "1"
    if is_whole and unknown and unknown["tokens"] == "0" and not log.has("data:val_bytes "):
        # But for a character that the start or the end of the stream cuts, and for the first
        # token: nothing predicts it, so that it is text but no target where it is no BOS.
        problem = f"expected bytes:{size:g}, as val_bytes in line {header.no}; {EDITED}"
        line.require(-6 <= decoded - size <= LONGEST_PIECE, problem)


def check_stream(line: Line, targets: int, source: str) -> None:
    """The stream has the length of the one that the line names, by the table in the script."""
    known_by, is_part = line.get("known_by", ""), line["name"].startswith("the first ")
    problem = f"expected known_by:length... or the name unknown; {EDITED}"
    is_known = known_by.startswith("sha256" if is_part else "length")
    line.require(is_known or (line["name"] == "unknown" and not known_by), problem)
    table = re.search(r"^KNOWN_STREAMS = (\{.*?^\})", source, re.M | re.S)
    name = line["name"]
    try:
        known = dict(ast.literal_eval(table[1])) if table else {}
    except (ValueError, TypeError, SyntaxError):
        known = {}
    if known and known_by.startswith("length"):
        its = known.get(targets // 2048 * 2048, "no stream of the challenge")
        line.require(its == name, f"but {targets} targets are {its}; {EDITED}")
    if part := re.match(r"the first (\d+) tokens", name):
        problem = f"expected as many tokens: there are {targets} targets; {EDITED}"
        line.require(int(part[1]) == targets + 1, problem)


def check_customary(log: Log, targets: float, shards: float) -> None:
    """The header lines that every script of the challenge writes, as `seed:`, agree with the
    settings."""
    paths = {name: log.setting(f"{name}_PATH") for name in ("DATA", "TRAIN_DATA", "TOKENIZER")}
    if line := only(log, "seed:"):
        says(line, "seed", log.setting("SEED"), "as SEED of the settings")
    if line := only(log, "model_params:"):
        trained = log.find("averaging:")
        same = trained.number("parameters")
        agree(line, "model_params", same, 0, f"as parameters in line {trained.no}")
    if line := only(log, "train_loader:"):
        name = Path(paths["TRAIN_DATA"] or paths["DATA"]).name
        expected = f"train_loader:dataset:{name} train_shards:{shards:.0f}"
        line.require(line.text == expected, f"expected {expected!r}; {EDITED}")
    if line := only(log, "val_loader:"):
        pattern = f"{paths['DATA']}/fineweb_val_*.bin"
        expected = f"val_loader:shards pattern={pattern} tokens:{targets:.0f}"
        line.require(line.text == expected, f"expected {expected!r}; {EDITED}")
    if line := only(log, "val_bpb:enabled"):
        problem = f"expected tokenizer_path={paths['TOKENIZER']}, as in the settings; {EDITED}"
        line.require(line.text.endswith(f" tokenizer_path={paths['TOKENIZER']}"), problem)


def check_hardware(log: Log) -> None:
    """The device is one that torch could use, and its ranks divide a batch."""
    line, versions = log.find("hardware:"), only(log, "python:")
    found = re.match(r"(\d+) x (.*)", line["hardware"])
    line.require(found, "expected hardware:<ranks> x <device>")
    is_cpu = found[2].endswith("CPU")
    if versions and "cuda" in versions:
        check_torch(versions)
        has_gpu = versions["cuda"] != "None" or "+rocm" in versions["torch"]
        problem = f"but torch had no CUDA (cuda:None in line {versions.no}); {EDITED}"
        line.require(is_cpu or has_gpu, f"expected a CPU: {problem}")
    for memory in log.all("peak memory") if is_cpu else ():
        memory.require(False, f"expected no such line of a run on CPUs (line {line.no})")
    has_memory = is_cpu or '"peak memory allocated: {' not in log.source or log.has("peak memory")
    problem = f"expected a line 'peak memory allocated:' of a run on GPUs; {EDITED}"
    line.require(has_memory, problem)
    if "accumulation" in line:
        rows = int(found[1]) * line.number("accumulation") * int(setting(log, "TRAIN_SEQ_LEN"))
        batch = int(setting(log, "TRAIN_BATCH_TOKENS"))
        problem = f"its ranks and accumulation do not divide TRAIN_BATCH_TOKENS={batch}"
        line.require(rows and batch % rows == 0, f"{problem} into sequences; {EDITED}")


def check_torch(line: Line) -> None:
    """The name of a build of torch, as 2.9.1+cu128, says which CUDA it has."""
    build = re.search(r"\+(cpu$|rocm|cu(\d+)(\d)$)", line["torch"])
    if build:
        expected = f"{build[2]}.{build[3]}" if build[2] else "None"
        says(line, "cuda", expected, f"as torch:{line['torch']} has")


# --- training ---


def clock_lines(log: Log) -> Iterator[tuple[Line, int, float]]:
    """(line, step, ms) of each line that says when it was written and after which step."""
    step = 0
    for line in log.all(""):
        if "train_time" in line:
            step = line.step if "step" in line else step
            yield line, step, 1e3 * line.seconds("train_time")


def check_clock(log: Log) -> None:
    """Time never runs backwards, and the speeds are those that times and steps make."""
    before, batch = 0.0, setting(log, "TRAIN_BATCH_TOKENS")
    for line, step, ms in clock_lines(log):
        problem = f"train_time is less than the {before:.0f}ms of an earlier line; {EDITED}"
        line.require(ms >= before, problem)
        before = ms
        if "step_avg" in line and step:
            average = 1e3 * line.seconds("step_avg")
            problem = f"expected train_time / step = step_avg, {ms / step:.2f}ms; {EDITED}"
            line.require(abs(ms / step - average) <= 0.01 + 1 / step, problem)
        if "tok/s" in line and ms > 1:
            slow, fast = (1e3 * batch * step / (ms + shift) for shift in (0.6, -0.6))
            problem = f"expected tok/s from {slow:.0f} to {fast:.0f}: TRAIN_BATCH_TOKENS * step /"
            is_speed = slow - 1 <= line.number("tok/s") <= fast + 1
            line.require(is_speed, f"{problem} train_time; {EDITED}")


def check_steps(log: Log) -> None:
    """The steps that the settings ask for are logged, and no others, with finite losses."""
    last = log.validations[-1].step
    started = log.find("resume:").step if log.has("resume:") else 0
    iterations, every, validated = (
        int(setting(log, name)) for name in ("ITERATIONS", "TRAIN_LOG_EVERY", "VAL_LOSS_EVERY")
    )
    for line in log.all("step:"):
        says(line, "step", f"{line.step}/{iterations}", "of ITERATIONS")
    due = [
        step for step in range(started + 1, last + 1) if step <= 10 or every and not step % every
    ]
    steps = [line.step for line in log.train_steps]
    gone = sorted(set(due) ^ set(steps))
    said = f"train_loss lines after steps {gone[:5]}, by TRAIN_LOG_EVERY={every}"
    place = log.validations[-1].place
    require(not gone, f"{place}: found too many or too few {said}; {EDITED}")
    for line in log.train_steps:
        line.number("train_loss")
        if "lr_scale" in line:
            problem = f"expected an lr_scale from 0 to 1; {EDITED}"
            line.require(0 <= line.number("lr_scale") <= 1, problem)
    due = [step for step in range(started + 1, last) if validated and not step % validated]
    found = [line.step for line in log.validations[:-1] if line.step > started]
    problem = f"expected validations after steps {due[:5]}, by VAL_LOSS_EVERY={validated}"
    require(found == due, f"{place}: {problem}, found {found[:5]}; {EDITED}")


def check_learning_rates(log: Log) -> None:
    """The learning rate of each line is the one that its step and its time make by the settings."""
    marks = "seconds_left = hp.seconds_for_steps - seconds", "min(most, self.max_wallclock_seconds"
    if not all(mark in log.source for mark in marks):
        return
    for line in (x for x in log.train_steps if "lr_scale" in x):
        ms = 1e3 * line.seconds("train_time")
        slow, fast = (max(ms + shift, 1e-3) / 1e3 for shift in (0.6, -0.6))
        low, high = (lr_scale(log, line.step, seconds) for seconds in (slow, fast))
        problem = (
            f"expected lr_scale:{(low + high) / 2:.4f}, by the settings, the step and the time"
        )
        is_its = low - 6e-5 <= line.number("lr_scale") <= high + 6e-5
        line.require(is_its, f"{problem}; {EDITED}")


def seconds_for_steps(log: Log) -> float:
    """The part of MAX_WALLCLOCK_SECONDS that is not kept for GPTQ; 0: no limit."""
    limit = setting(log, "MAX_WALLCLOCK_SECONDS")
    is_gptq = log.settings.get("QUANTIZER") == "gptq"
    return limit - min(setting(log, "GPTQ_RESERVE_SECONDS") if is_gptq else 0.0, limit / 10)


def training_share(log: Log, step: int, seconds: float) -> float:
    """How much of training is done, as the script counts it."""
    share, limit = step / setting(log, "ITERATIONS"), seconds_for_steps(log)
    return min(max(share, seconds / limit if limit else 0.0), 1.0)


def lr_scale(log: Log, step: int, seconds: float) -> float:
    """What the script multiplies learning rates by when `step` steps have taken `seconds`."""
    share, steps = setting(log, "WARMDOWN_FRAC"), setting(log, "WARMDOWN_ITERS")
    limit, least = seconds_for_steps(log), setting(log, "MIN_LR")
    left = 1.0
    if share:
        left = (1 - training_share(log, step, seconds)) / share
    elif steps:
        steps_left = setting(log, "ITERATIONS") - step
        if limit:
            steps_left = min(steps_left, (limit - seconds) / (seconds / step))
        left = max(steps_left, 0.0) / steps
    return least + (1 - least) * min(1.0, left)


def check_recurrence(log: Log) -> None:
    """RECUR_LAYERS run again from RECUR_START of training on, and the log says so."""
    lines, layers = log.all("recurrence:on"), log.settings.get("RECUR_LAYERS", "")
    for line in lines:
        line.require(layers, f"expected no such line without RECUR_LAYERS; {EDITED}")
    if not layers or '"recurrence:on step:{' not in log.source:
        return
    begin, last = setting(log, "RECUR_START") + 1e-4, log.validations[-1].step
    for line in log.train_steps:
        seconds = line.seconds("train_time") - 6e-4  # which are rounded
        is_due = training_share(log, line.step, seconds) >= begin
        is_on = line.step >= last or any(x.step <= line.step for x in lines)
        line.require(is_on or not is_due, f"expected a line recurrence:on before it; {EDITED}")


def check_end_of_training(log: Log) -> None:
    """Training ended with ITERATIONS or by the clock, and what follows is of its weights."""
    last, stop = log.validations[-1], only(log, "stopping_early:")
    iterations = int(setting(log, "ITERATIONS"))
    if stop:
        says(stop, "step", last["step"], f"as in line {last.no}")
        check_stop(log, stop)
    is_whole = last.step == iterations or stop is not None
    is_whole |= log.has("resume:") and not log.train_steps  # resumed after training
    last.require(is_whole, f"expected a line stopping_early: before step {iterations}; {EDITED}")
    check_late_qat(log)
    if line := only(log, "gptq_curvature"):
        took = line.seconds("train_time") - last.seconds("train_time")
        agree(line, "seconds", took, 0.06, f"the training time since line {last.no}")
    is_gptq = log.settings.get("QUANTIZER", "gptq") == "gptq"
    for line in log.all("gptq_curvature"):
        line.require(is_gptq, f"expected no such line, as QUANTIZER is not gptq; {EDITED}")
    is_said = log.has("gptq_curvature") or '"gptq_curvature ' not in log.source
    log.require_end(is_said or not is_gptq, "a line 'gptq_curvature'")
    averaging = log.find("averaging:")
    used = averaging["averaging"].partition(" ")[0]
    wanted = log.setting("AVERAGING").split("_")
    problem = f"expected averages of AVERAGING={log.setting('AVERAGING')}; {EDITED}"
    averaging.require(used == "none" or set(used.split("_")) <= set(wanted), problem)
    if "ema_updates" in averaging:
        agree(averaging, "ema_updates", last.step, 0, "one for each step")
    exact = only(log, "final_float_exact")
    if exact and used == "none" and not log.settings.get("RECUR_LAYERS"):
        agree(exact, "val_loss", last.number("val_loss"), 1e-3, f"the weights of line {last.no}")


def check_stop(log: Log, stop: Line) -> None:
    """Training that the clock ended has used its time, but for what is kept for the end."""
    limit, seconds = setting(log, "MAX_WALLCLOCK_SECONDS"), stop.seconds("train_time")
    kept = 10 * seconds / max(1, stop.step)
    if "GPTQ_RESERVE_SECONDS" in log.settings:
        kept += setting(log, "GPTQ_RESERVE_SECONDS")
    problem = f"expected a time nearer to MAX_WALLCLOCK_SECONDS={limit:g}; {EDITED}"
    # much is kept for the last checkpoint on a slow disk, and after a step that hung
    stop.require(limit and seconds >= limit / 6 - kept, problem)


def check_limits(log: Log) -> None:
    """A time over its limit has a warning."""
    *_, (last, _, ms) = clock_lines(log)
    total = log.find("total_eval_time:")
    for line, what, seconds, name in (
        (last, "training", ms / 1e3, "MAX_WALLCLOCK_SECONDS"),
        (total, "evaluation", total.seconds("total_eval_time"), "EVAL_BUDGET_SECONDS"),
    ):
        limit, warning = setting(log, name), f"warning: {what} took "
        problem = f"over {name}={limit:g}, expected a line {warning!r}; {EDITED}"
        is_over = limit and seconds > limit + 0.05 and "} took {took:" in log.source
        line.require(not is_over or log.has(warning), problem)


def check_late_qat(log: Log) -> None:
    """Training uses rounded weights from where the learning rates are under the threshold on."""
    threshold, lines = setting(log, "LATE_QAT_THRESHOLD"), log.all("late_qat:on")
    names = "QUANT_BITS", "QAT_ROUNDING"
    expected = [log.settings[name] for name in names if name in log.settings]
    for line in lines:
        problem = f"expected lr_scale below LATE_QAT_THRESHOLD={threshold:g}; {EDITED}"
        line.require(line.number("lr_scale") <= threshold + 1e-4, problem)
        problem = f"expected bits:{' '.join(expected)} at its end, as in the settings; {EDITED}"
        line.require(line["bits"].split()[: len(expected)] == expected, problem)
    last = log.validations[-1].step
    low = [x for x in log.train_steps if x.step < last and "lr_scale" in x]
    low = [x for x in low if x.number("lr_scale") < threshold - 1e-4]
    is_logged = '"late_qat:on step:{' in log.source
    for line in low[:1] if is_logged else ():
        is_on = any(x.step <= line.step for x in lines)
        line.require(is_on, f"expected a line late_qat:on before it; {EDITED}")


# --- the artifact ---


def check_artifact(log: Log) -> None:
    """Sizes add up, and name and label of the file are those of the settings."""
    starts = "Serialized model int", "Code size:", "Total submission size int"
    model, code, total = map(log.find, starts)
    label = f"int{log.setting('QUANT_BITS')}+{log.settings.get('CODER', 'rans')}"
    for line in (model, total) if "CODER" in log.settings else ():
        found = line.text.split(":")[0].split()[-1]
        line.require(found == label, f"expected {label}, by QUANT_BITS and CODER; {EDITED}")
    if fit := only(log, "fit_artifact "):
        if "bytes" in fit:
            agree(fit, "bytes", model.size, 0, f"as in line {model.no}")
            if log.settings.get("CODER") == "rans" and "bytes_by_rans" in fit:
                agree(fit, "bytes_by_rans", model.size, 0, "as CODER=rans")
        bits = 8 * model.size / max(1, log.find("averaging:").number("parameters"))
        if "bits_per_parameter" in fit:
            why = f"the bits of line {model.no} by the parameters"
            agree(fit, "bits_per_parameter", bits, 6e-5, why)
    if parts := only(log, "artifact_bytes "):
        agree(parts, "code", code.size, 0, f"as in line {code.no}")
        found = sum(parts.number(kind) for kind in parts)
        problem = f"its parts have {found:g} bytes, expected {total.size} as in line {total.no}"
        parts.require(found == total.size, f"{problem}; {EDITED}")
    if line := only(log, "artifact:"):
        path, sha256 = line["artifact"], line["sha256"]
        run_id, end = log.setting("RUN_ID"), f".int{log.setting('QUANT_BITS')}.ptz"
        # a number where a run or an artifact of that name was there before
        names = rf"{re.escape(run_id)}(_\d+)?{re.escape(end[:-4])}(\.\d+)?\.ptz"
        is_its = not run_id or re.fullmatch(names, Path(path).name)
        line.require(is_its, f"expected the file to be named {run_id}{end}; {EDITED}")
        for result in log.all("result "):
            found = parsed_result(result).get("artifact_sha256")
            problem = f"artifact_sha256 is not that of line {line.no}; {EDITED}"
            result.require(found == sha256, problem)
    names = [line.text.split()[0] for line in log.all("final_")]
    bits = log.setting("QUANT_BITS")
    known = [f"final_int{bits}_{kind}_exact" for kind in SCORED]
    expected = ["final_float_exact"] * log.has("final_float_exact") + [*known, "final_ngram_exact"]
    problem = f"found the scores {', '.join(names)}, expected {', '.join(expected)}"
    require(names == expected, f"{log.place('final_')}: {problem}, in this order; {EDITED}")


# --- scoring and mixing ---


def neural_score(log: Log) -> Line:
    """The line of the neural score: the one that says its stride."""
    found = [line for line in log.all("final_int") if "stride" in line]
    log.require_end(found, "a line final_int... with the stride of the score")
    return found[0]


def check_evaluation(log: Log) -> None:
    """Stride, budget and seconds are the same wherever they stand."""
    score, total, tried = neural_score(log), log.find("total_eval_time:"), log.all("eval_budget ")
    # adapters score a document in chunks, without overlapping windows
    has_adapters = log.settings.get("TTT_LORA_RANK", "0") != "0"
    name = "TTT_CHUNK_SIZE" if has_adapters else "EVAL_STRIDE"
    stride, wanted = score["stride"], log.setting(name)
    budget = f"{setting(log, 'EVAL_BUDGET_SECONDS'):g}s"
    says(total, "stride", stride, f"as in line {score.no}")
    for line in (total, *tried):
        says(line, "budget", budget, "by EVAL_BUDGET_SECONDS")
    strides = [line["stride"] for line in tried]
    if tried:
        says(tried[0], "stride", wanted, f"as {name} is tried first")
        says(tried[-1], "stride", stride, f"the one of the score in line {score.no}")
    problem = f"expected stride:{wanted} ({name}), or a line eval_budget that says why not"
    score.require(stride == wanted or len(strides) > 1, f"{problem}; {EDITED}")
    if len(tried) > 1 and "from" not in tried[-1] and stride == log.setting("EVAL_SEQ_LEN"):
        plain = log.find(f"final_int{log.setting('QUANT_BITS')}_roundtrip_exact")
        why = f"that of line {plain.no}, as there was no time for overlapping windows"
        agree(score, "val_loss", plain.number("val_loss"), 2e-8, why)
    parts = sum(x.seconds(key) for x in log.all("final_") for key in x if key.endswith("_time"))
    least = f"expected at least {parts:.1f}s, the times of the scores above it"
    total.require(total.seconds("total_eval_time") + 0.06 >= parts, f"{least}; {EDITED}")


def gave_way(log: Log) -> bool:
    """Did scoring give up its first way, or end early, for lack of time?"""
    return len(log.all("eval_budget ")) > 1


def check_learning(log: Log) -> None:
    """Training while scoring says so, and only where the settings ask for it."""
    names = [name for name in LEARNS if log.settings.get(name, "0") != "0"]
    for line in log.all("ttt:"):
        problem = f"expected no such line: {' and '.join(LEARNS)} are 0; {EDITED}"
        line.require(names, problem)
        facts = ("epochs", "TTT_EPOCHS"), ("rank", "TTT_LORA_RANK"), ("lr", "TTT_LORA_LR")
        for key, name in facts:
            if key in line:
                agree(line, key, setting(log, name), 1e-5 * setting(log, name), f"as {name}")
    is_said = log.has("ttt:") or gave_way(log) or "ttt:score_first" not in log.source
    missing = f"a line 'ttt:score_first', which {' and '.join(names)} writes"
    log.require_end(is_said or not names, missing)


def check_mixture(log: Log) -> None:
    """The tables by order and by entropy add up to the scores."""
    neural = neural_score(log)
    mixed, targets = log.find("final_ngram_exact"), log.find("train_tokens:").number("val_targets")
    low, high = (int(setting(log, name)) for name in ("NGRAM_MIN_ORDER", "NGRAM_ORDER"))
    says(mixed, "orders", f"{low}-{high}", "by NGRAM_MIN_ORDER and NGRAM_ORDER")
    says(mixed, "alpha", log.setting("NGRAM_ALPHA"), "by NGRAM_ALPHA")
    if orders := log.all("ngram_order "):
        add_up(orders, "targets", targets, 0, "the val_targets of the stream")
        gain, far = mixed.number("gain"), 1e-8 * (1 + len(orders))
        add_up(orders, "gain", gain, far, f"the gain of line {mixed.no}")
        for line in orders:
            n = int(line.number("order"))
            problem = f"expected order 0 or from {low} to {high}; {EDITED}"
            line.require(n == 0 or low <= n <= high, problem)
        found = [line.number("order") for line in orders]
        orders[0].require(found == sorted(found), f"expected the orders from 0 up; {EDITED}")
    if bins := log.all("calibration "):
        add_up(bins, "targets", targets, 0, "the val_targets of the stream")
        for key, score in (("nll", neural), ("mixed", mixed)):
            sums = sum(line.number("targets") * line.number(key) for line in bins)
            mean, loss = sums / targets, score.number("val_loss")
            problem = f"{key} by entropy averages {mean:.5f} over the targets of lines "
            problem += f"{bins[0].no} to {bins[-1].no}, expected val_loss:{loss} of line {score.no}"
            # each mean of a bin is rounded by 5e-5 at most
            bins[0].require(abs(mean - loss) <= 6e-5, f"{problem}; {EDITED}")
        check_bins(bins)
    audit = log.find("ngram_audit")
    agree(audit, "prefix", min(PREFIX - 1, targets), 0, "the tokens that are counted alone")
    problem = f"expected recounted to be at most enumerated, and that at most {SAMPLES}; {EDITED}"
    audit.require(audit.number("recounted") <= audit.number("enumerated") <= SAMPLES, problem)


def add_up(lines: list[Line], key: str, expected: float, far: float, of: str) -> None:
    """RecordError, unless the numbers after `key` add up to `expected`."""
    total = sum(line.number(key) for line in lines)
    problem = f"{key} of lines {lines[0].no} to {lines[-1].no} adds up to {total:.10g}"
    said = f"{problem}, expected {expected:.10g}, {of}; {EDITED}"
    lines[0].require(abs(total - expected) <= far, said)


def check_bins(bins: list[Line]) -> None:
    """Bins of the entropy are the usual ones, in order, each with a mean inside it."""
    names = [line["entropy"] for line in bins]
    problem = f"found bins {', '.join(names)}, expected some of {', '.join(EDGES)}, in order"
    bins[0].require(names == [name for name in EDGES if name in names], f"{problem}; {EDITED}")
    for line in bins:
        low, high = map(float, line["entropy"].split("-"))
        problem = f"expected an entropy from {low:g} to {high:g}; {EDITED}"
        line.require(low - 6e-5 <= line.number("expected") <= high + 6e-5, problem)


# --- what people read last ---


def check_screen(log: Log) -> None:
    """The last screen says the numbers of the lines above it."""
    if not log.has("  neural "):
        return
    neural = neural_score(log)
    mixed, total = log.find("final_ngram_exact"), log.find("Total submission size int")
    last, seconds = log.validations[-1], log.find("total_eval_time:").seconds("total_eval_time")
    *_, (_, _, ms) = clock_lines(log)
    expected = [
        f"  neural {neural.number('val_bpb'):.4f} bpb, mixed with exact counts of the past "
        f"{mixed.number('val_bpb'):.4f} bpb",
        f"  artifact {total.size:,} bytes of {CAP:,}, code included; ",
        f"  training {ms / 1e3:.1f} s, {last.step} steps; evaluation {seconds:.1f} s",
    ]
    for start in expected:
        line = log.find(start[:9])  # without the first digit, which rounding may change
        is_same = line.text.startswith(start) or same_but_for_rounding(line.text, start)
        line.require(is_same, f"the lines above it say {start.strip()!r}; {EDITED}")
    for line in log.all("result ") if '"step_ms": round(' in log.source else ():
        found, step_ms = parsed_result(line), ms / max(last.step, 1)
        said = found.get("step_ms")
        far = abs(said - step_ms) if isinstance(said, (int, float)) else math.inf
        problem = f"expected a step_ms of {step_ms:.3f}, as in the lines above it; {EDITED}"
        line.require(far <= 2e-3 + 1 / last.step, problem)
        name, run_id = str(found.get("run_id")), log.setting("RUN_ID")
        problem = f"run_id is {name!r}, expected {run_id!r}; {EDITED}"
        line.require(re.fullmatch(rf"{re.escape(run_id)}(_\d+)?", name) or not run_id, problem)


def same_but_for_rounding(a: str, b: str) -> bool:
    """Are the texts equal but for one unit in a number's last digit? Python rounds numbers of the
    log once more than the script did."""
    number = re.compile(r"\d+\.\d+")
    if number.sub("#", a) != number.sub("#", b):
        return False
    for x, y in zip(number.findall(a), number.findall(b)):
        unit = 10.0 ** -len(x.split(".")[1])
        if abs(float(x) - float(y)) > 1.01 * unit:
            return False
    return True


CHECKS = (
    *(check_lines, check_settings, check_data, check_hardware, check_clock, check_steps),
    *(check_learning_rates, check_recurrence, check_end_of_training, check_limits),
    *(check_artifact, check_evaluation, check_learning, check_mixture, check_screen),
)


# --- the logs of several seeds ---


def refuse_copies(logs: list[Log]) -> None:
    """RecordError: two logs of one result are the same run under two seeds."""
    starts = "artifact:", "final_float_exact", "final_ngram_exact"
    seen: dict[tuple, Line] = {}
    for log in logs:
        for line in (log.find(start) for start in starts if log.has(start)):
            key = "sha256" if "sha256" in line else "val_loss"
            what = f"{line.text.split(':')[0].split()[0]} {key}"
            other = seen.setdefault((what, line[key]), line)
            problem = f"{what}: the same as in {other.place}; expected another for each seed"
            line.require(other is line, f"{problem}; is one run's log there twice?")
    for log, other in combinations(logs, 2):
        late, others = ([x for x in of.train_steps if x.step > 10] for of in (log, other))
        refuse_common("train_loss", "step", 1e-3, log.train_steps, other.train_steps)
        refuse_common("train_time", "step", 1, late, others)  # the first steps take as long
        for start, key, at, least in (
            ("ngram_order ", "gain", "order", 1e-6),
            ("calibration ", "targets", "entropy", 100),
        ):
            refuse_common(key, at, least, log.all(start), other.all(start))


def refuse_common(key: str, at: str, least: float, lines: list[Line], others: list[Line]) -> None:
    """RecordError: in half of the lines, and in at least three, the number after `key` is that of
    another log's line with the same text after `at`. Numbers below `least` do not count: they may
    be the same for each seed. So may a few others, as the loss of an untrained model."""
    theirs = {line[at]: line for line in others}
    lines = [line for line in lines if abs(line.number(key)) >= least]
    same = [line for line in lines if theirs.get(line[at], {}).get(key) == line[key]]
    for line in same[:1]:
        its = theirs[line[at]].place
        problem = f"{key}: the same as in {its}, as in {len(same)} of {len(lines)} such lines"
        is_copy = len(same) >= max(3, len(lines) / 2)
        said = "expected others for each seed; is one run's log there twice?"
        line.require(not is_copy, f"{problem}; {said}")


def refuse_other_texts(logs: list[Log]) -> None:
    """RecordError: runs on the same data say different things of the text itself."""
    for start, keys in (
        ("data:round_trip ", ("data", "documents", "parts", "tokens", "bytes")),
        ("data:unknown ", ("tokens", "documents")),
        ("ngram_order ", ("order", "targets")),
    ):
        for log in logs[1:]:
            if not (log.has(start) and logs[0].has(start)):
                continue
            mine, its = ([[x[k] for k in keys] for x in of.all(start)] for of in (log, logs[0]))
            place = logs[0].place(start)
            problem = f"expected {', '.join(keys)} as from {place} on, of the same text; {EDITED}"
            log.find(start).require(mine == its, problem)
