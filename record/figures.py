"""PNGs of the logs that README's results table links to, light and dark. Grey is the network, blue
what the counts add, orange a loss. Bars start at zero, lines and bars carry their own names, seeds
are shown together: mean and range. The same logs give the same pixels: no dates, no random numbers,
no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from .colors import THEMES
from .fill import fill, signed
from .folder import Folder, with_part, write_all
from .log import Log, RecordError, require
from .run import LIMITS
from .stamp import digest_of_numbers, fault_of, stamp

WIDTH, DPI = 8.3, 200  # inches; 830 px, GitHub's column, at twice the density
FOLDER = "figures"  # not logs/, which the challenge's repository ignores
BACKGROUNDS = {"light": "#ffffff", "dark": "#0d1117"}  # GitHub's
README, MEASUREMENTS = Path("README.md"), Path("docs/measurements.md")


@dataclass(frozen=True)
class Plot:
    page: Path  # which shows it
    alt: str
    collect: Callable[[list[Log]], dict]  # its data; RecordError: a log lacks lines of it
    draw: Callable  # on a matplotlib Figure: (figure, data, colors)


def plot(path: Path) -> tuple[list[Path], list[str]]:
    """Draws <folder>/figures/<figure>_{light,dark}.png from the reported logs.
    Returns their paths and a line for each figure that was skipped, because a log lacks its lines;
    what an earlier call drew of it is removed."""
    written, skipped = [], []
    logs = Folder(path).logs
    (path / FOLDER).mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        paths = {theme: path / FOLDER / f"{name}_{theme}.png" for theme in THEMES}
        try:
            data = figure.collect(logs)
        except RecordError as error:
            skipped.append(f"{name}: skipped: {error}")
            for stale in paths.values():
                try:
                    stale.unlink(missing_ok=True)
                except OSError as left:
                    skipped.append(f"{stale}: shows older logs: {left.strerror}; remove it")
            continue
        for theme, png in paths.items():
            draw(name, data, theme, png)
        written += paths.values()
    return written, skipped


def pictures(path: Path, page: Path) -> str:
    """Markdown for one page: each of its figures that is there, in the reader's theme."""
    shown = [
        (name, figure.alt)
        for name, figure in FIGURES.items()
        if figure.page == page and (path / FOLDER / f"{name}_light.png").is_file()
    ]
    return fill("figures.md", figures=shown, folder="../" * (len(page.parts) - 1) + FOLDER).strip()


def show(path: Path) -> list[str]:
    """Puts the figures that are there between the markers of their pages; returns a line for each
    page that cannot show them."""
    problems = []
    for page in dict.fromkeys(figure.page for figure in FIGURES.values()):
        try:
            write_all({path / page: with_part(path / page, "figures", pictures(path, page))})
        except RecordError as error:
            problems.append(f"{page} shows no figures: {error}")
    return problems


def faults(shown: list[Path], logs: list[Log]) -> list[str]:
    """A line for each of the figures in `shown`, of those that `plot` draws, that does not show the
    numbers of the logs."""
    found = []
    for path in shown:
        name, _, theme = path.stem.rpartition("_")
        if name in FIGURES and theme in THEMES:
            fault = fault_of(path, digest_of_numbers(name, theme, FIGURES[name].collect(logs)))
            found += [f"{path}: {fault}; `python -m record plot` draws it"] if fault else []
    return found


# --- what each figure needs, from the logs: a row per seed ---


def per_seed(logs: list[Log], prefix: str, key: str) -> list[dict]:
    """For each log, its lines with `prefix` by the value of their `key`. RecordError: it has
    none."""
    tables = [{line[key]: line for line in log.all(f"{prefix} ")} for log in logs]
    for log, table in zip(logs, tables):
        require(table, f"{log.path}: has no line {prefix!r}; a log of an older script?")
    return tables


def collect_training(logs: list[Log]) -> dict:
    """Loss and lr over seconds on a grid that all seeds share."""
    for log in logs:
        is_whole = log.train_steps and all("lr_scale" in step for step in log.train_steps)
        problem = "its train_loss lines are missing or have no lr_scale"
        require(is_whole, f"{log.path}: {problem}")
    seconds = [np.array([step.seconds("train_time") for step in log.train_steps]) for log in logs]
    grid = np.unique(np.concatenate(seconds))
    grid = grid[(grid >= max(s[0] for s in seconds)) & (grid <= min(s[-1] for s in seconds))]

    def rows(key: str) -> np.ndarray:
        values = [[step.number(key) for step in log.train_steps] for log in logs]
        return np.array([np.interp(grid, s, value) for s, value in zip(seconds, values)])

    validations = [line for log in logs for line in log.validations]
    return dict(
        seconds=grid,
        loss=rows("train_loss"),
        lr_scale=rows("lr_scale"),
        validated=[(line.seconds("train_time"), line.number("val_loss")) for line in validations],
        steps=[max(line.step for line in log.train_steps + log.validations) for log in logs],
    )


def collect_bpb(logs: list[Log]) -> dict:
    """The bpb of each seed by stage."""
    learns = any(line.get("lr") != "0" for log in logs for line in log.all("ttt:"))
    bits = logs[0].settings.get("QUANT_BITS", "6")
    names = {
        "averaged, float": "final_float_exact",
        "quantised, read back": f"final_int{bits}_roundtrip_exact",
        "sliding, learning" if learns else "sliding window": (
            f"final_int{bits}_sliding_window_exact"
        ),
        "mixed with counts": "final_ngram_exact",
    }
    for log in logs:
        require(log.validations, f"{log.path}: has no line with val_bpb")
    stages = {"last validation": [log.validations[-1].number("val_bpb") for log in logs]}
    for stage, line in names.items():
        stages[stage] = [log.find(line).number("val_bpb") for log in logs]
    return dict(stages=stages)


def collect_orders(logs: list[Log]) -> dict:
    """Gain in bpb and share of the targets by the longest known order, 0 where a log has none."""
    tables = per_seed(logs, "ngram_order", "order")
    orders = sorted({order for table in tables for order in table}, key=int)

    def rows(key: str) -> np.ndarray:
        return np.array(
            [[t[order].number(key) if order in t else 0.0 for order in orders] for t in tables]
        )

    share = rows("targets") / rows("targets").sum(1, keepdims=True)
    return dict(orders=list(map(int, orders)), gain=rows("gain"), share=share)


def collect_bytes(logs: list[Log]) -> dict:
    """Bytes by kind."""
    lines = [log.find("artifact_bytes ") for log in logs]
    kinds = list(dict.fromkeys(kind for line in lines for kind in line))
    sizes = [[line.number(kind) if kind in line else 0 for kind in kinds] for line in lines]
    return dict(kinds=kinds, bytes=np.array(sizes))


def collect_calibration(logs: list[Log]) -> dict:
    """Expected, actual and mixed nats per token by bin of the model's entropy. Bins that are empty
    or absent for a seed are left out; the share of targets is of all."""
    tables = per_seed(logs, "calibration", "entropy")

    def targets(table: dict, name: str) -> float:
        return table[name].number("targets") if name in table else 0

    bins = [name for name in tables[0] if all(targets(table, name) > 0 for table in tables)]
    problem = "no bin of its calibration lines holds targets of every seed"
    require(bins, f"{logs[0].path}: {problem}")
    columns = {
        key: np.array([[table[name].number(key) for name in bins] for table in tables])
        for key in ("expected", "nll", "mixed", "targets")
    }
    total = np.array([sum(targets(table, name) for name in table) for table in tables])
    columns["share"] = columns.pop("targets") / total[:, None]
    order = np.argsort(columns["expected"].mean(0), kind="stable")
    return {key: column[:, order] for key, column in columns.items()}


# --- how each figure is drawn: on a matplotlib Figure, with the colours of a theme ---


def draw(name: str, data: dict, theme: str, path: Path) -> None:
    """Draw one figure in one theme. Its file also holds a digest of the numbers that it shows."""
    saved_as_png(lambda figure, colors: FIGURES[name].draw(figure, data, colors), theme, path)
    stamp(path, digest_of_numbers(name, theme, data))


def saved_as_png(draw: Callable, theme: str, path: Path) -> None:
    """draw(figure, colors) on a matplotlib Figure, saved. Neither pyplot nor the user's
    matplotlibrc has a say, and no date goes into the file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = THEMES[theme] | {"paper": BACKGROUNDS[theme]}
    style = {
        **{"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": colors["ink"]},
        **{"axes.edgecolor": colors["line"], "axes.labelcolor": colors["soft"]},
        **{"axes.facecolor": colors["paper"], "axes.axisbelow": True, "axes.unicode_minus": True},
        **{"axes.spines.top": False, "axes.spines.right": False},
        **{"xtick.color": colors["soft"], "ytick.color": colors["soft"]},
        **{"xtick.major.size": 0, "ytick.major.size": 0},
        **{"grid.color": colors["line"], "grid.linewidth": 0.8},
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(facecolor=colors["paper"], dpi=DPI)
        FigureCanvasAgg(figure)
        draw(figure, colors)
        figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})


def heading(figure, height: float, title: str, note: str, colors: dict) -> None:
    """Sets the size; a title and a line under it stand at the upper left, `margins` leaves them
    their room."""
    figure.set_size_inches(WIDTH, height)
    figure.text(0.02, 1 - 0.17 / height, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.44 / height, note, fontsize=9.5, color=colors["soft"], va="top")


def margins(
    figure, height: float, left: float, right: float = 0.3, bottom: float = 0.35, head=0.8, **more
) -> None:
    """The plotting area, by its distance in inches from the edges of the figure."""
    sides = dict(left=left / WIDTH, right=1 - right / WIDTH)
    figure.subplots_adjust(**sides, bottom=bottom / height, top=1 - head / height, **more)


def seeds_note(count: int, mark: str = "thin line") -> str:
    return "one seed" if count == 1 else f"mean of {count} seeds, {mark}: their range"


def named_bars(axes, rows: np.ndarray, ink: str, bars: list[tuple[str, str, str]]) -> None:
    """Horizontal bars from zero, the first on top: means of `rows` (seeds x bars), ranges; each of
    `bars` is a name, a colour, and a label at its end."""
    names, colors, labels = zip(*bars)
    y, mean = np.arange(len(names))[::-1], rows.mean(0)
    axes.barh(y, mean, 0.62, color=colors)
    if len(rows) > 1:
        axes.hlines(y, rows.min(0), rows.max(0), color=ink, linewidth=1.1)
    low, high = min(0.0, float(rows.min())), max(0.0, float(rows.max()))
    span = high - low or 1.0
    for at, top, label in zip(y, np.maximum(rows.max(0), 0), labels):
        axes.text(top + 0.015 * span, at, label, va="center", fontsize=9.5)
    axes.set_xlim(low - (0.02 * span if low < 0 else 0), high)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(y, names, color=ink)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axvline(0, color=ink, linewidth=0.8)


def panels(colors: dict, titles: dict) -> None:
    """Light frames: a quiet title over each of the axes, horizontal lines, no spines but the
    lowest."""
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize=9.5, color=colors["soft"], pad=7)
        axes.grid(axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)


def draw_bpb(figure, data: dict, colors: dict) -> None:
    names, rows = list(data["stages"]), np.array(list(data["stages"].values())).T
    mean, height = rows.mean(0), 2.75
    note = "bits per byte of the validation stream, lower is better"
    note = f"{note}; {seeds_note(len(rows))}"
    heading(figure, height, "Where the bits per byte go", note, colors)
    axes = figure.subplots()
    margins(figure, height, 1.75, 1.75, 0.15)
    hues = [colors["plain"]] * (len(names) - 1) + [colors["saved"]]
    named_bars(axes, rows, colors["ink"], list(zip(names, hues, (f"{m:.4f}" for m in mean))))
    for at, (before, after) in zip(range(len(names) - 2, -1, -1), pairwise(mean)):
        step = signed(after - before, 4)
        right = dict(transform=axes.get_yaxis_transform(), ha="right", va="center")
        color = colors["lost" if step.startswith("+") and float(step) > 0 else "saved"]
        axes.text(1 + 1.55 / (WIDTH - 3.5), at, step, color=color, **right)


def draw_orders(figure, data: dict, colors: dict) -> None:
    gain, share, height = data["gain"], data["share"], 0.95 + 0.31 * len(data["orders"])
    note = f"the gain adds up to {gain.sum(1).mean():.4f} bits per byte; {seeds_note(len(gain))}"
    title = "What counting saves, by the longest n-gram whose context was known"
    heading(figure, height, title, note, colors)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    margins(figure, height, 1.1, 0.75, 0.32, wspace=0.42)
    names = ["none" if order == 0 else f"{order} tokens" for order in data["orders"]]
    hues = [colors["saved" if g >= 0 else "lost"] for g in gain.mean(0)]
    saved = list(zip(names, hues, (signed(g, 4) for g in gain.mean(0))))
    shares = [(name, colors["plain"], f"{s:.1%}") for name, s in zip(names, share.mean(0))]
    shares = [(name, hue, label.replace("%", " %")) for name, hue, label in shares]
    named_bars(left, gain, colors["ink"], saved)
    named_bars(right, 100 * share, colors["ink"], shares)
    right.set_yticks([])
    left.set_xlabel("bits per byte saved", loc="left")
    right.set_xlabel("share of the targets", loc="left")


def draw_bytes(figure, data: dict, colors: dict) -> None:
    order = np.argsort(-data["bytes"].mean(0), kind="stable")
    rows, names = data["bytes"][:, order], [data["kinds"][i] for i in order]
    mean, height = rows.mean(0), 0.85 + 0.34 * len(names)
    total, cap = rows.sum(1).max(), LIMITS["artifact"].most
    note = f"the largest of {len(rows)} seeds; bars: their mean, thin line: their range"
    note = "bytes by kind" if len(rows) == 1 else note
    title = f"{total:,.0f} bytes, {100 * total / cap:.1f} % of the {cap:,} allowed"
    heading(figure, height, title, note, colors)
    axes = figure.subplots()
    margins(figure, height, 1.25, 1.75, 0.1)
    labels = [f"{b:,.0f}   {100 * b / mean.sum():.1f} %" for b in mean]
    bars = [(name, colors["saved"], label) for name, label in zip(names, labels)]
    named_bars(axes, rows, colors["ink"], bars)


def band(axes, x, rows: np.ndarray, color: str) -> None:
    """Mean of `rows` over `x` as a line, their range as a band."""
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=color, alpha=0.22, linewidth=0)
    axes.plot(x, rows.mean(0), color=color, linewidth=1.6, solid_capstyle="round")


def draw_training(figure, data: dict, colors: dict) -> None:
    height, x, count, steps = 4.4, data["seconds"], len(data["steps"]), sorted(set(data["steps"]))
    span = " to ".join(f"{s:,}" for s in steps[:: max(1, len(steps) - 1)])
    heading(figure, height, "Training", f"{span} steps; {seeds_note(count, 'band')}", colors)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    margins(figure, height, 0.62, 1.35, 0.5, head=1.02, hspace=0.42)
    band(loss, x, data["loss"], colors["plain"])
    band(rate, x, data["lr_scale"], colors["plain"])
    middle = x[0] + 0.45 * (x[-1] - x[0])
    at = (middle, np.interp(middle, x, data["loss"].max(0)))
    near = dict(textcoords="offset points", color=colors["soft"])
    loss.annotate("training loss", at, (4, 7), **near)
    if data["validated"]:
        at, value = np.array(data["validated"]).T
        loss.plot(at, value, "o", color=colors["saved"], markersize=4.5, clip_on=False)
        final = value[np.argsort(at)[-count:]].mean()
        right = dict(transform=loss.get_yaxis_transform(), va="center", color=colors["saved"])
        loss.text(1.01, final, f"validation {final:.3f}", **right)
    rate.set_ylim(0, 1.05)
    rate.set_yticks([0, 1], ["0", "1"])
    rate.set_xlim(0, None)
    rate.set_xlabel("training time, seconds", loc="left")
    panels(colors, {loss: "nats per token", rate: "learning rate, share of its peak"})


def draw_calibration(figure, data: dict, colors: dict) -> None:
    height, x, count = 5.0, data["expected"].mean(0), len(data["nll"])
    title = "Does the model know what it does not know?"
    note = "grouped by what the model expects (its entropy); dashed: just as expected"
    heading(figure, height, title, f"{note}; {seeds_note(count)}", colors)
    curve, amount = figure.subplots(2, 1, sharex=True, height_ratios=(3.6, 1))
    margins(figure, height, 0.62, 1.05, 0.5, head=1.02, hspace=0.36)
    curve.plot([0, x[-1]], [0, x[-1]], color=colors["soft"], linewidth=0.9, linestyle=(0, (4, 3)))
    last = {key: float(data[key].mean(0)[-1]) for key in ("nll", "mixed")}
    # then their names move apart
    close = abs(last["nll"] - last["mixed"]) < 0.06 * max(last.values())
    above = "nll" if last["nll"] >= last["mixed"] else "mixed"
    for key, color, label in (("nll", "plain", "network"), ("mixed", "saved", "mixture")):
        rows, shift = data[key], (7 if key == above else -7) * close
        if count > 1:
            curve.vlines(x, rows.min(0), rows.max(0), color=colors["ink"], linewidth=1.1)
        curve.plot(x, rows.mean(0), "-o", color=colors[color], linewidth=1.6, markersize=4.5)
        near = dict(textcoords="offset points", va="center", annotation_clip=False)
        ink = colors["soft" if key == "nll" else color]
        curve.annotate(label, (x[-1], last[key]), (9, shift), color=ink, **near)
    width = 0.6 * np.min(np.diff(x), initial=float(x[-1]))
    amount.bar(x, 100 * data["share"].mean(0), width, color=colors["plain"])
    amount.yaxis.set_major_formatter("{x:.0f} %")
    amount.set_xlabel("the model's entropy, nats (mean of each group)", loc="left")
    curve.set_xlim(0, float(x.max()) + width / 2)
    curve.set_ylim(0, None)
    panels(colors, {curve: "nats per token", amount: "share of the targets"})


ALTS = {  # for those who do not see it
    "bpb": "Bits per byte by stage: last validation, averaged, quantised, sliding window, mixed",
    "orders": "What the counts save, and how many targets, by the longest n-gram whose context was "
    "known",
    "bytes": "Bytes of the submission by kind",
    "training": "Training loss and learning rate over training time",
    "calibration": "Expected and actual nats per token by the model's entropy, for the network and "
    "the mixture",
}
FIGURES = dict(  # in the order of their pages
    fig_bpb=Plot(README, ALTS["bpb"], collect_bpb, draw_bpb),
    fig_orders=Plot(README, ALTS["orders"], collect_orders, draw_orders),
    fig_bytes=Plot(README, ALTS["bytes"], collect_bytes, draw_bytes),
    fig_training=Plot(MEASUREMENTS, ALTS["training"], collect_training, draw_training),
    fig_calibration=Plot(MEASUREMENTS, ALTS["calibration"], collect_calibration, draw_calibration),
)
