"""Runs beside each other: a row per log, a CSV, overlaid losses, and a test between two groups of
seeds. It takes any log of train_gpt.py, also of a run that did not end."""

from __future__ import annotations

import csv
import io
import math
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from .colors import THEMES
from .figures import heading, margins, saved_as_png
from .folder import write_all
from .log import Log, require
from .run import FREE_SETTINGS

NAMES = {"RUN_ID", "SEED"}  # settings that name a run: no difference between runs
LEAST_GAIN, LARGEST_P = 0.005, 0.01  # the challenge's: nats per token; probability
COLUMNS = (
    *("run", "seed", "settings", "steps", "step_ms", "neural_bits_per_byte"),
    *("mixed_bits_per_byte", "submission_bytes", "train_seconds", "eval_seconds"),
)


def last(log: Log, prefix: str, key: str) -> float | None:
    """Find the last line that starts with `prefix` and has a `key`, and return the number after the
    key. Times are converted to seconds. None: there is no such line."""
    lines = [line for line in log.all(prefix) if key in line]
    if not lines:
        return None
    line = lines[-1]
    return line.seconds(key) if line[key].endswith("s") else line.number(key)


def row(log: Log, name: str, varied: list[str]) -> dict[str, object]:
    """What COLUMNS say of a run; None for what its log does not say. `varied`: the settings to
    name, of which it gets a dict."""
    steps = [*log.train_steps, *log.validations]
    total = log.all("Total submission size int")
    step_seconds = last(log, "step:", "step_avg")
    scored = [log.all(f"final_int{bits}_sliding_window_exact") for bits in range(3, 9)]
    neural = [line.number("val_bpb") for lines in scored for line in lines]
    return {
        "run": name,
        "seed": log.settings.get("SEED"),
        "settings": {one: log.settings.get(one, "?") for one in varied},
        "steps": max((line.step for line in steps), default=None),
        "step_ms": None if step_seconds is None else round(1e3 * step_seconds, 3),
        "neural_bits_per_byte": neural[-1] if neural else None,
        "mixed_bits_per_byte": last(log, "final_ngram_exact", "val_bpb"),
        "submission_bytes": total[-1].size if total else None,
        "train_seconds": last(log, "", "train_time"),
        "eval_seconds": last(log, "total_eval_time:", "total_eval_time"),
    }


def run_names(logs: list[Log]) -> list[str]:
    """What to call each run: its log's name, or its path if another log has the same."""
    names = [log.name for log in logs]
    return [log.name if names.count(log.name) == 1 else str(log.path) for log in logs]


def varied_settings(logs: list[Log]) -> list[str]:
    """The settings in which the runs differ. A log without any, as of a run that died at once, does
    not count."""
    found = [log.settings for log in logs if log.settings]
    names = sorted({name for settings in found for name in settings} - NAMES)
    return [name for name in names if len({settings.get(name) for settings in found}) > 1]


def rows(logs: list[Log]) -> list[dict[str, object]]:
    """A row of COLUMNS for each log."""
    varied = varied_settings(logs)
    return [row(log, name, varied) for log, name in zip(logs, run_names(logs))]


def in_one_line(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def table(found: list[dict[str, object]]) -> str:
    """The rows as text, in columns. Where many settings differ, they stand below, a line for each
    with the runs of each value."""
    by_name = by_setting(found)
    digits = {"neural_bits_per_byte": ".4f", "mixed_bits_per_byte": ".4f", "step_ms": ".1f"}
    digits |= {"submission_bytes": ",", "train_seconds": ".1f", "eval_seconds": ".1f"}
    heads = {"neural_bits_per_byte": "neural bpb", "mixed_bits_per_byte": "mixed bpb"}
    heads |= {"step_ms": "ms/step", "submission_bytes": "bytes"}
    heads |= {"train_seconds": "train s", "eval_seconds": "eval s"}
    found = [one | {"settings": in_one_line(one["settings"])} for one in found]
    are_few = max(len(one["settings"]) for one in found) <= 60
    shown = [name for name in COLUMNS if name != "settings"] + ["settings"] * are_few
    cells = [[heads.get(name, name) for name in shown]]
    for one in found:
        values = ((one[name], digits.get(name, "")) for name in shown)
        cells.append(["-" if value in (None, "") else format(value, f) for value, f in values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    is_text = [name in ("run", "settings") for name in shown]
    lines = []
    for line in cells:
        texts = (
            text.ljust(width) if left else text.rjust(width)
            for text, width, left in zip(line, widths, is_text)
        )
        lines.append("  ".join(texts).rstrip())
    if not are_few:
        lines += ["", "settings that differ (?: not in that log):", *by_name]
    return "\n".join(lines)


def by_setting(found: list[dict[str, object]]) -> list[str]:
    """For each setting that differs, its values, each with the runs that have it."""
    runs: dict[str, dict[str, list[str]]] = {}
    for one in found:
        for name, value in one["settings"].items():
            runs.setdefault(name, {}).setdefault(value, []).append(str(one["run"]))
    lines = []
    for name, values in runs.items():
        texts = []
        for value, names in values.items():
            where = ", ".join(names) if len(names) < 4 else f"{len(names)} runs"
            texts.append(f"{value or '(empty)'} in {where}")
        lines.append(f"  {name}: {'; '.join(texts)}")
    return lines


def write_csv(found: list[dict[str, object]], path: Path) -> None:
    """The rows as CSV, one column per COLUMNS."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(one | {"settings": in_one_line(one["settings"])} for one in found)
    write_all({path: text.getvalue()})


def plot(logs: list[Log], path: Path) -> list[Path]:
    """Draws the training losses over the steps, one line per run, as <path>_light.png and
    <path>_dark.png, and returns these. RecordError: no log has two losses."""
    losses = {}
    for log, name in zip(logs, run_names(logs)):
        finite = [line for line in log.train_steps if math.isfinite(float(line["train_loss"]))]
        pairs = [(line.step, line.number("train_loss")) for line in finite]
        if len(pairs) > 1:
            losses[name] = np.array(pairs).T
    require(losses, f"{logs[0].path}: found fewer than two train_loss lines, as in all other logs")
    paths = {theme: path.with_name(f"{path.stem}_{theme}.png") for theme in THEMES}
    for theme, png in paths.items():
        saved_as_png(lambda figure, colors: draw(figure, losses, colors), theme, png)
    return list(paths.values())


def draw(figure, losses: dict[str, np.ndarray], colors: dict) -> None:
    height = 4.0
    heading(figure, height, "Training loss", "nats per token, by step", colors)
    axes = figure.subplots()
    margins(figure, height, 0.6, 2.0, 0.45)
    styles = ["-", "--", ":", "-."]  # told apart without colours
    hues = [colors["saved"], colors["lost"], colors["plain"]]
    for i, (name, (steps, loss)) in enumerate(losses.items()):
        style = dict(color=hues[i % len(hues)], linestyle=styles[i // len(hues) % len(styles)])
        axes.plot(steps, loss, linewidth=1.4, label=name, **style)
    late = np.concatenate([loss[len(loss) // 10 :] for _, loss in losses.values()])
    axes.set_ylim(late.min() - 0.1, np.quantile(late, 0.98) + 0.3)  # the first steps fall fast
    axes.set_xlim(left=0)
    axes.grid(True, axis="y")
    beside = dict(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)
    axes.legend(frameon=False, labelcolor=colors["ink"], fontsize=8, **beside)


# --- are the runs of one group better than those of another? ---


def group(logs: list[Log], pattern: str) -> list[Log]:
    """Select the runs of one group: their names match `pattern`, in which * and ? are wildcards, or
    begin with it. RecordError: there are fewer than two runs, two have the same seed, or they
    differ in a setting other than the seed."""
    pairs = zip(logs, run_names(logs))
    found = [log for log, name in pairs if fnmatchcase(name, pattern) or name.startswith(pattern)]
    names = ", ".join(run_names(logs))
    problem = f"{len(found)} of the logs ({names}) match {pattern!r}, expected at least two seeds"
    require(len(found) > 1, problem)
    seeds: dict[str | None, Log] = {}
    for log in found:
        seed = log.settings.get("SEED")
        problem = (
            f"{log.path}: seed {seed} is also that of {seeds.get(seed, log).path}; leave one out"
        )
        require(seed not in seeds, problem)
        seeds[seed] = log
    varied = sorted(set(varied_settings(found)) - FREE_SETTINGS)
    problem = f"the runs {pattern!r} differ in {', '.join(varied)}, expected nothing but the seed"
    require(not varied, problem)
    return found


def final_scores(log: Log) -> tuple[float, float]:
    """(nats per token, bits per byte) of a run: mixed or, with NGRAM_ENABLED=0, neural.
    RecordError: it did not end."""
    names = ["final_ngram_exact"]
    if log.settings.get("NGRAM_ENABLED") == "False":
        names = [f"final_int{bits}_sliding_window_exact" for bits in range(3, 9)]
    scored = [log.find(name) for name in names if log.has(name)]
    ended = scored and log.has("total_eval_time:")
    require(ended, f"{log.path}: found no final score, expected a run that ended")
    return scored[-1].number("val_loss"), scored[-1].number("val_bpb")


def test(logs: list[Log], a: str, b: str) -> str:
    """Sentences: by how much the runs `a` are better than the runs `b`, whether that is chance
    (Welch's t-test, one-sided), and whether the challenge's rule for a new record holds."""
    from scipy.stats import ttest_ind

    groups = [group(logs, pattern) for pattern in (a, b)]
    both = {str(log.path) for log in groups[0]} & {str(log.path) for log in groups[1]}
    require(not both, f"{', '.join(sorted(both))}: found in both groups, {a!r} and {b!r}")
    for start in ("data:val ", "data:tokenizer "):
        texts = {line.text for found in groups for log in found for line in log.all(start)}
        require(
            len(texts) < 2,
            f"{a!r} and {b!r}: their lines {start.strip()} differ, so that their "
            "scores are of different texts or tokens",
        )
    scores = [np.array([final_scores(log) for log in found]).T for found in groups]
    (nats_a, bpb_a), (nats_b, bpb_b) = scores
    spread = max(np.ptp(nats_a), np.ptp(nats_b))
    require(
        spread > 0, f"{a!r} and {b!r}: all seeds of each have the same score; no test is possible"
    )

    def p_of(least: float) -> float:
        """The probability of such scores, if `a` were better by no more than `least` nats."""
        found = ttest_ind(nats_a + least, nats_b, equal_var=False, alternative="less")
        return float(found.pvalue)

    gain, gain_bpb = nats_b.mean() - nats_a.mean(), bpb_b.mean() - bpb_a.mean()
    p, p_rule = p_of(0), p_of(LEAST_GAIN)
    holds = p_rule < LARGEST_P
    better = "better" if gain > 0 else "worse"
    rule = f"{LEAST_GAIN} nats better at p < {LARGEST_P}"
    return (
        f"{a} ({len(nats_a)} seeds) is {abs(gain):.5f} nats per token, {abs(gain_bpb):.5f} bits "
        f"per byte {better} than {b} ({len(nats_b)} seeds).\n"
        f"If it were no better, such scores would come with p = {p:.2g} (Welch's t-test, "
        "one-sided).\n"
        f"The challenge's rule for a new record, {rule}, "
        f"{'holds' if holds else 'does not hold'}: p = {p_rule:.2g}."
    )
