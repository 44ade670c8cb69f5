"""Checks of what the logs of a folder say: seeds, sizes, times, the stream and the units."""

from __future__ import annotations

import math

from .field_log import Fact, Run
from .foreign_folder import Claim, ForeignFolder, agrees, mean_of, total_bytes
from .foreign_verdict import (
    CANNOT,
    FAIL,
    INFO,
    MOST_SHOWN,
    PASS,
    WARN,
    Finding,
    for_runs,
    sizes_of,
    worst_of,
)
from .run import LEAST_SEEDS, LIMITS

MOST_TOLD = 12  # files that were not read

CAP = LIMITS["artifact"].most
TRAIN_SECONDS = LIMITS["train_time"].most
EVAL_SECONDS = LIMITS["eval_time"].most

# the validation texts of the challenge in bytes, each measured as tokens times bytes per token of
# several tokenizers, which agree to 0.4 %: FineWeb's first 50,000 documents, and the first
# baseline's in March
TEXTS = {"the usual validation text": 151_080_000, "the text of March": 155_770_000}
STREAMS = {  # lengths in tokens, cut to whole windows
    62_021_632: "SP1024",
    45_508_608: "SP4096",
    45_514_752: "SP4096",
    40_540_160: "SP8192",
    47_851_520: "SP8192 with CaseOps",
    63_779_840: "SP1024, March",
}
USUAL = {1024: (2.436,), 4096: (3.320,), 8192: (3.727, 3.157)}  # bytes per token, by vocabulary
MOST_RATIO = 1.12  # more bytes per token than that, by vocabulary, no tokenizer was seen to give
NEAR = 0.02  # of bytes per token: streams of whole windows differ by less


# --- files and logs ---


def check_folder(folder: ForeignFolder) -> Finding:
    """What lies there, and what was not read."""
    odd = [f"{entry.name} is {entry.kind}" for entry in folder.entries if entry.kind != "file"]
    notes = [f"{log.path}: {note}" for log in folder.logs for note in log.notes]
    _ = folder.submission  # says what is wrong with it
    broken = [f"{name}: {why}" for name, why in folder.unreadable.items()]
    findings = [(WARN, text) for text in (*odd, *broken)]
    findings += [(INFO, text) for text in (*folder.notes, *notes)]
    if not folder.json_file:
        findings.append((WARN, "no submission.json"))
    if not any(log.runs for log in folder.logs):
        findings.append((WARN, "no log with a run in it"))
    runs = sum(len(log.runs) for log in folder.logs)
    said = f"{len(folder.files)} files, {runs} runs in {len(folder.logs)} logs"
    verdict, _ = worst_of(findings or [(PASS, said)], "")
    told = [text for _, text in findings]
    more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return verdict, "; ".join([said, *told[:MOST_TOLD]]) + more


def check_finite(folder: ForeignFolder) -> Finding:
    """No loss or score is NaN or infinite, and no score is below zero."""
    findings = []
    for run in folder.runs:
        for fact in run.all("train_loss", "validation", "score"):
            is_negative = fact.value < 0 and fact.kind != "train_loss"
            if is_negative or not math.isfinite(fact.value):
                findings.append((FAIL, f"{fact.place}: {fact.label} {fact.value}"))
        if run.losses or run.scores:
            findings.append((PASS, f"{run.path}: {len(run.losses)} losses of training"))
    return worst_of(findings, "no log has a loss")


def check_seeds(folder: ForeignFolder) -> Finding:
    """As many runs with different seeds as a record needs, each with its log."""
    scored = [run for run in folder.runs if run.scores] or folder.runs
    if not scored:
        return CANNOT, "there is no log of a run"
    seeds = sorted({run.seed for run in scored if run.seed is not None})
    unnamed = [run for run in scored if run.seed is None]
    said = f"runs with a log: {len(scored)}, of the seeds {', '.join(map(str, seeds)) or 'unknown'}"
    findings = []
    for run in scored:
        if run.named_seed not in (None, run.seed):
            problem = f"its name says seed {run.named_seed}, its lines say {run.seed}"
            findings.append((FAIL, f"{run.all('seed')[0].place}: {problem}"))
    if folder.seeds_without_log:
        gone = ", ".join(map(str, folder.seeds_without_log))
        said += f"; {folder.json_file} names seeds without a log: {gone}"
    if len(seeds) + len(unnamed) < LEAST_SEEDS:
        verdict = INFO if folder.is_unlimited else FAIL
        findings.append((verdict, f"{said}; a record has at least {LEAST_SEEDS}"))
    elif len(seeds) < LEAST_SEEDS:
        findings.append((CANNOT, f"{said}; {unnamed[0].path} says no seed"))
    else:
        findings.append((WARN if folder.seeds_without_log else PASS, said))
    return worst_of(findings, "")


def check_distinct(folder: ForeignFolder) -> Finding:
    """Runs with different seeds have different losses."""
    seen, findings = {}, []
    for run in folder.all_runs:
        losses = tuple(run.losses) or tuple(fact.value for fact in run.all("validation"))
        if len(losses) < 3:
            continue
        if (other := seen.get(losses)) and other.seed != run.seed:
            problem = f"{run.path} (seed {run.seed}) and {other.path} (seed {other.seed}) have"
            findings.append((FAIL, f"{problem} the same {len(losses)} losses: one run, copied"))
        seen.setdefault(losses, run)
    if not findings and len(seen) > 1:
        findings.append((PASS, f"{len(seen)} runs with different losses"))
    return worst_of(findings, "fewer than two runs with losses of training")


# --- limits ---


def check_artifact(folder: ForeignFolder) -> Finding:
    """Code and packed model of every run are at most 16,000,000 bytes."""

    def judge(run: Run) -> list[Finding]:
        totals = sizes_of(folder, run)
        over = [fact for fact in totals if fact.value - fact.slack > CAP]
        if not totals:
            return []
        if len(over) < len(totals):
            worst = over or [max(totals, key=lambda fact: fact.value)]
            text = "; ".join(f"{fact.place}: {fact.label} {fact.value:,.0f}" for fact in worst)
            under = "of several sizes, one is over the cap" if over else "bytes"
            return [(CANNOT if over else PASS, f"{text} {under}")]
        fact = min(over, key=lambda fact: fact.value)
        problem = f"{fact.value:,.0f} bytes, {fact.value - CAP:,.0f} over the cap of {CAP:,}"
        return [(FAIL, f"{fact.place}: {fact.label} {problem}")]

    findings = for_runs(folder, judge)
    silent = [run.path for run in folder.runs if not sizes_of(folder, run)]
    if silent and findings:
        findings.append((CANNOT, f"{', '.join(silent[:MOST_SHOWN])}: no size"))
    return worst_of(findings, "no log says how many bytes the submission has")


def check_size_sum(folder: ForeignFolder) -> Finding:
    """The total is the packed model plus the code."""
    findings = []
    for run in folder.runs:
        totals, packed = run.all("total"), run.all("packed")
        codes = run.all("code", "code_plain")
        if not totals or not packed or not codes:
            continue
        last = total_bytes(run)[-1]
        sums = [model.value + code.value for model in packed for code in codes]
        near = min(sums, key=lambda one: abs(one - last.value))
        text = f"{last.place}: total {last.value:,.0f}, model and code are {near:,.0f}"
        if abs(near - last.value) <= 1 + last.slack:
            findings.append((PASS, text))
        else:
            findings.append((FAIL if last.value < near else WARN, text))
    return worst_of(findings, "no log has model, code and total")


def check_train_time(folder: ForeignFolder) -> Finding:
    """Training takes at most 600 s. Less than two steps over it is a warning: scripts read the
    clock between steps, and some without waiting for the step that is still running."""

    def judge(run: Run) -> list[Finding]:
        times = run.all("train_time")
        if not times:
            return []
        longest = max(times, key=lambda fact: fact.value)
        averages = [fact.value for fact in run.all("step_time")]
        step = max([longest.value / max(run.last_step, 1), *averages[-1:]])
        over = longest.value - longest.slack - TRAIN_SECONDS
        text = f"{longest.place}: {longest.value:.3f} s of training"
        if over <= 0:
            return [beside(text, longest.value, run.all("beside_training"), TRAIN_SECONDS)]
        if folder.is_unlimited:
            return [(INFO, f"{text}, in a track without limit")]
        if over <= 2 * step:
            few = "less than a step" if over <= step else "less than two steps"
            far = longest.value - TRAIN_SECONDS
            problem = f"{far:.3f} s over {TRAIN_SECONDS}, {few} of {step:.3f} s"
            return [(WARN, f"{text}, {problem}")]
        return [(FAIL, f"{text}, {longest.value - TRAIN_SECONDS:.3f} s over {TRAIN_SECONDS}")]

    return worst_of(for_runs(folder, judge), "no log says how long training took")


def beside(text: str, seconds: float, others: list[Fact], most: float) -> Finding:
    """PASS; a warning, if the work of the lines `others`, which the clock may not count, would take
    the time over the limit."""
    more = sum(fact.value for fact in others)
    if not seconds + more > most:
        return PASS, text
    told = ", ".join(f"{fact.value:.1f} s in {fact.place} ({fact.label})" for fact in others)
    return WARN, f"{text}; more than {most} with what this clock may not count: {told}"


def is_diagnostic(fact: Fact) -> bool:
    label = fact.label.lower().replace("_", "-")
    return "diagnostic" in label or "pre-quant" in label or "temp-scaling" in label


def eval_parts(run: Run) -> list[Fact]:
    """The parts of a run's evaluation; one that is printed twice counts once."""
    parts = []
    for fact in run.all("eval_time"):
        copies = (p for p in parts if abs(p.value - fact.value) <= p.slack + fact.slack + 1e-9)
        if not any(copies):
            parts.append(fact)
    return parts


def check_eval_time(folder: ForeignFolder) -> Finding:
    """All parts of the evaluation together take at most 600 s."""

    def judge(run: Run) -> list[Finding]:
        parts, totals = eval_parts(run), run.all("eval_total")
        if not parts and not totals:
            return []
        counted = [fact for fact in parts if not is_diagnostic(fact)]
        least = max([sum(fact.value for fact in counted), *(fact.value for fact in totals)])
        whole = max(sum(fact.value for fact in parts), least)
        slack = sum(fact.slack for fact in (*parts, *totals))
        lines = [fact.place.rsplit(":", 1)[1] for fact in parts or totals]
        seconds = " + ".join(f"{fact.value:.1f}" for fact in parts or totals)
        text = f"{run.path}:{','.join(lines)}: {seconds} = {whole:.1f} s of evaluation"
        if whole - slack <= EVAL_SECONDS:
            return [beside(text, whole, run.all("beside_evaluation"), EVAL_SECONDS)]
        if folder.is_unlimited:
            return [(INFO, f"{text}, in a track without limit")]
        if least - slack <= EVAL_SECONDS:
            return [(WARN, f"{text}, over {EVAL_SECONDS}; without diagnostics {least:.1f} s")]
        return [(FAIL, f"{text}, over {EVAL_SECONDS}")]

    return worst_of(for_runs(folder, judge), "no log says how long the evaluation took")


# --- the stream and the units ---


def tokens_of(run: Run) -> Fact | None:
    return next(reversed(run.all("tokens")), None)


def known_stream(tokens: float) -> str:
    """The name of the stream with that many tokens: cut to whole windows of up to 32,768, or with
    up to 2,047 more."""
    for length, name in STREAMS.items():
        if length <= tokens < length + 2048:
            return name
        if length - 32_768 < tokens < length and tokens % 1024 == 0:
            return f"{name}, cut to longer windows"
    return ""


def ratio_of(fact: Fact) -> float:
    """Bytes per token by a loss in nats per token and a score in bits per byte; NaN: one is
    missing."""
    fits = fact.loss > 0 and fact.value > 0 and math.isfinite(fact.loss + fact.value)
    return fact.loss / math.log(2) / fact.value if fits else math.nan


def ratios(run: Run) -> list[tuple[Fact, float]]:
    """(score, bytes per token) of the run's scores that have both numbers."""
    found = [(fact, ratio_of(fact)) for fact in (*run.all("validation"), *run.scores)]
    return [(fact, ratio) for fact, ratio in found if math.isfinite(ratio)]


def vocabulary(run: Run) -> int | None:
    found = run.all("vocab")
    return int(found[-1].value) if found and math.isfinite(found[-1].value) else None


def check_stream(folder: ForeignFolder) -> Finding:
    """The validation stream has a length that other submissions have."""
    findings = []
    for run in folder.runs:
        if not (fact := tokens_of(run)):
            continue
        text = f"{fact.place}: {fact.value:,.0f} tokens"
        if name := known_stream(fact.value):
            findings.append((PASS, f"{text} ({name})"))
            continue
        known = ", ".join(f"{length:,} ({name})" for length, name in STREAMS.items())
        told = ratios(run)
        scored = f"; at {told[-1][1]:.4f} bytes per token {fact.value * told[-1][1]:,.0f} bytes"
        scored += f", the usual text has about {min(TEXTS.values()):,}"
        said = f"{text}, a length that nobody else has{scored if told else ''}; known: {known}"
        findings.append((CANNOT, said))
    return worst_of(findings, "no log says how many tokens the validation stream has")


def check_whole_stream(folder: ForeignFolder) -> Finding:
    """The log does not say that only a part was scored."""
    findings = []
    for run in folder.runs:
        for fact in run.all("partial"):
            share = f"{100 * fact.value:.1f} % of the stream"
            findings.append((FAIL, f"{fact.place}: {share}: {fact.label}"))
        for fact in run.all("progress")[-1:]:
            text = f"{fact.place}: {fact.label}, the last line that says how far it came"
            whole = fact.value >= 0.98
            findings.append((PASS if whole else WARN, text))
    return worst_of(findings, "no line that this check knows says which share was scored")


def check_bytes_per_token(folder: ForeignFolder) -> Finding:
    """Loss and bpb belong to the text: tokens times bytes per token are its bytes."""
    findings = []
    for run in folder.runs:
        told = ratios(run)
        chosen = [one for one in told if one[0].kind == "score"][-1:] or told[-1:]
        for fact, ratio in chosen:
            if abs(ratio * math.log(2) - 1) > 1e-3:  # else the loss is a bpb: see units
                findings.append(judge_ratio(fact, ratio, tokens_of(run), vocabulary(run)))
    return worst_of(findings, "no log has a loss and a bpb on one line")


def judge_ratio(fact: Fact, ratio: float, tokens: Fact | None, vocab: int | None) -> Finding:
    """The verdict on one score's bytes per token."""
    text = f"{fact.place}: {ratio:.4f} bytes per token"
    if tokens and any(abs(ratio * tokens.value / size - 1) < NEAR for size in TEXTS.values()):
        return PASS, f"{text} x {tokens.value:,.0f} tokens = {ratio * tokens.value:,.0f} bytes"
    if tokens and known_stream(tokens.value):
        is_old = known_stream(tokens.value).endswith("March")
        usual = list(TEXTS.values())[is_old] / tokens.value
        said = f"{text}, but {tokens.value:,.0f} tokens ({tokens.place}) have {usual:.4f}"
        if ratio > usual:
            return FAIL, f"{said}: the bytes are counted too high, and bpb too low"
        return WARN, f"{said}: the bytes are counted too low, and bpb too high"
    known = USUAL.get(vocab or 0, ())
    if any(abs(ratio / usual - 1) < NEAR for usual in known):
        return PASS, f"{text}, as others with {vocab} pieces have"
    if known and ratio > (1 + NEAR) * max(known):
        percent = 100 * (ratio / max(known) - 1)
        problem = f"{percent:.0f} % more than the {max(known)} of others with {vocab} pieces"
        return FAIL if ratio > MOST_RATIO * max(known) else WARN, f"{text}: {problem}"
    return CANNOT, f"{text} with {vocab or 'an unknown number of'} pieces: none to compare with"


def check_units(folder: ForeignFolder) -> Finding:
    """val_loss is in nats per token, val_bpb in bits per byte."""
    findings = []
    for run in folder.runs:
        for fact in (*run.all("validation"), *run.scores):
            if fact.loss == fact.value:
                findings.append((FAIL, f"{fact.place}: loss and bpb are both {fact.value}"))
    claim, score = folder.claim("val_loss", "mean_val_loss"), folder.score_claim
    if claim and score and claim.value == score.value:
        problem = f"{claim.key} and {score.key} are both {claim.value}"
        findings.append((FAIL, f"{folder.json_file}: {problem}"))
    elif claim:
        findings.append(judge_loss(folder, claim))
    elif any(ratios(run) for run in folder.runs) and not findings:
        findings.append((PASS, "in the logs, loss and bpb are different numbers"))
    return worst_of(findings, "no loss to compare with a bpb")


def judge_loss(folder: ForeignFolder, claim: Claim) -> Finding:
    """The verdict on the val_loss of submission.json."""
    text = f"{folder.json_file}: {claim.key} {claim.value}"
    facts = [fact for run in folder.all_runs for fact in (*run.scores, *run.all("validation")[-1:])]
    last = [run.scores[-1] for run in folder.runs if run.scores]
    losses, scores = ([getattr(fact, key) for fact in last] for key in ("loss", "value"))
    mean = f"the mean of {len(last)} runs"
    for fact in facts:
        if agrees(claim, fact.loss):
            return PASS, f"{text} is the loss of {fact.place}"
    if agrees(claim, mean_of(losses)):
        return PASS, f"{text} is the loss, {mean}"
    told = f"not a loss; losses are about {mean_of(losses):.4f}"
    for fact in facts:
        if agrees(claim, fact.value):
            return FAIL, f"{text} is the bpb of {fact.place}, {told}"
    if agrees(claim, mean_of(scores)):
        return FAIL, f"{text} is the bpb, {mean}, {told}"
    score = folder.score_claim
    ratio = claim.value / math.log(2) / score.value if score and score.value > 0 else math.nan
    told = [value for run in folder.runs for _, value in ratios(run)]
    if told and abs(ratio / told[-1] - 1) < NEAR:
        return PASS, f"{text} / ln 2 / {score.value} = {ratio:.3f} bytes per token, as in the logs"
    return CANNOT, f"{text} is in no log"
