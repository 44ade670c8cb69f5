"""Which size of model is best in a file of given bytes? A larger model has fewer bits per weight.

    python -m studies.sizes [--sizes 128x3 192x3 128x6] [--steps 200] [--seeds 1337 42 2025]
        [--bits 6 5 4 3.5 3 2.5] [--equal steps|flops] [--append FILE] [--plot FILE.png]

It trains the demo's model with other values of MODEL_DIM and MLP_MULT. (Set DATA_PATH and other
settings in the environment for a model and data of your own.) 128x3 means a width of 128 and MLPs
that are 3 times as wide. The number of heads is the same for all sizes. With --equal flops, larger
models take fewer steps, so that every training costs as many FLOPs as the first size's.

Each trained model is then packed into several budgets, read back, and scored on the validation
stream in windows that do not overlap. A budget is what the first size would need at --bits bits for
each of its parameters: so the columns of the table are files of equal bytes, and larger models have
fewer bits per weight in them. A model that does not fit, even with the coarsest codes, has no
number there.

The table shows the mean bpb over the seeds. After ± stands the standard error of the difference
from the first size, where each seed is compared with itself. --append keeps runs, as in
studies.recipe.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from studies.recipe import kept_runs, mean_flops, settings, unusual
from tools import common
from tools.common import t

LEAST_LOSS = 0.0005  # bpb
COLORS = ("#2a78d6", "#d6662a", "#2f9e62", "#8f5bd6", "#b8860b", "#777777", "#c2417c", "#3aa6b9")


class Size(NamedTuple):
    """The shape of a model."""

    width: int
    mlp_mult: float

    @classmethod
    def parse(cls, text: str) -> "Size":
        """From WIDTHxMULT. ValueError: it is something else."""
        width, mlp_mult = text.split("x")
        return cls(int(width), float(mlp_mult))

    def __str__(self):
        return f"width {self.width}, MLP {self.mlp_mult:g}"

    @property
    def changes(self) -> dict[str, object]:
        """The settings that make a model of this size."""
        return dict(MODEL_DIM=self.width, MLP_MULT=self.mlp_mult)


def packed_settings(steps: int, **changes) -> t.Hyperparameters:
    """The settings of studies.recipe, but with GPTQ, which a real run uses to pack its weights."""
    return settings(steps, QUANTIZER="gptq", **changes)


def parameters(size: Size) -> int:
    """Number of weights of a model of this size."""
    return sum(p.numel() for p in t.GPT(packed_settings(1, **size.changes)).parameters())


def steps_of(size: Size, first: Size, args) -> int:
    """How many steps this size is trained for."""
    if args.equal == "steps" or size == first:
        return args.steps
    cost, reference = (mean_flops(packed_settings(args.steps, **s.changes)) for s in (size, first))
    return round(args.steps * reference / cost)


def packed_scores(hp: t.Hyperparameters, budgets: list[int]) -> dict[str, float]:
    """Train a model; the bpb of its float weights under "float", and under each budget in bytes
    that of the weights read back from such a file."""
    model, trained = common.train(hp)
    validation = t.load_validation(hp)
    found = {"float": common.bits_per_byte(model, validation, trained.weights)}
    for budget in budgets:
        try:
            packed = t.compress(trained.weights, hp, trained.curvature, budget)
        except t.UserError:
            continue  # it does not fit
        _, back = t.decompress(packed.container.blob, model.state_dict())
        found[str(budget)] = common.bits_per_byte(model, validation, back)
    return found


def run(size: Size, seed: int, budgets: list[int], steps: int, args) -> dict[str, float]:
    """The scores of one training, from --append's file if they are there."""
    hp = packed_settings(steps, **size.changes, SEED=seed)
    key = unusual(hp) | {"budgets": budgets}
    for kept in kept_runs(args.append):
        if kept["settings"] == key:
            return kept["bpb"]
    began = time.process_time()
    found = packed_scores(hp, budgets)
    took = time.process_time() - began
    print(f"{size}, seed {seed}: {found['float']:.4f}, {took:.0f} s", file=sys.stderr, flush=True)
    if args.append:
        with args.append.open("a") as lines:
            lines.write("\n" + json.dumps({"bpb": found, "settings": key}, allow_nan=False))
    return found


def rounding_growth(file: Path) -> float:
    """By which factor the bpb lost by rounding grows for each bit per weight less: the slope of its
    logarithm within the runs of --append's file. Losses under LEAST_LOSS are left out, as they are
    hardly told from 0. ValueError: no run has two that are larger."""
    usual = t.Hyperparameters().as_env()
    bits, logs = [], []
    for run in kept_runs(file):
        found = usual | run["settings"]
        weights = parameters(Size(int(found["MODEL_DIM"]), float(found["MLP_MULT"])))
        lost = {
            8 * int(b) / weights: x - run["bpb"]["float"]
            for b, x in run["bpb"].items()
            if b != "float"
        }
        points = np.array([(b, math.log(x)) for b, x in lost.items() if x >= LEAST_LOSS])
        if len(points) > 1:
            own_bits, own_logs = (points - points.mean(0)).T
            bits.extend(own_bits)
            logs.extend(own_logs)
    if not bits:
        raise ValueError(f"{file}: no run in which rounding costs {LEAST_LOSS} bpb in two budgets")
    return math.exp(-np.dot(bits, logs) / np.dot(bits, bits))


def cell(own: list[dict], first: list[dict], key: str) -> str:
    """Mean bpb, and the standard error of the difference to the first size."""
    if not all(key in scores for scores in own):
        return "does not fit"
    mean, _ = common.mean_and_error([scores[key] for scores in own])
    if own is first or not all(key in scores for scores in first):
        return f"{mean:.4f}"
    _, error = common.mean_and_error([a[key] - b[key] for a, b in zip(own, first)])
    return f"{mean:.4f} ± {error:.4f}"


def print_table(found: dict[Size, list[dict]], budgets: list[int], steps: dict, args) -> None:
    """One row per size, one column per budget; the best of each column in bold."""
    first = next(iter(found.values()))
    columns = " | ".join(f"{b / 1e3:,.0f} KB" for b in budgets)
    print(f"| | parameters | steps | float | {columns} |")
    print("|---" * (4 + len(budgets)) + "|")
    for size, own in found.items():
        cells = []
        for key in map(str, budgets):
            means = {
                s: common.mean_and_error([x[key] for x in runs])[0]
                for s, runs in found.items()
                if all(key in x for x in runs)
            }
            text = cell(own, first, key)
            cells.append(f"**{text}**" if means and min(means, key=means.get) == size else text)
        row = [f"{size}", f"{parameters(size):,}", str(steps[size]), cell(own, first, "float")]
        print(f"| {' | '.join([*row, *cells])} |")


def plot(found: dict[Size, list[dict]], budgets: list[int], path: Path) -> None:
    """bpb against bits per weight: one line per budget, a point per size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for color, budget in zip(COLORS, budgets):
        points = []
        for size, runs in found.items():
            if all(str(budget) in scores for scores in runs):
                mean, error = common.mean_and_error([scores[str(budget)] for scores in runs])
                points.append((8 * budget / parameters(size), mean, error))
        if points:
            bits, means, errors = zip(*sorted(points))
            axes.errorbar(
                bits,
                means,
                errors,
                color=color,
                marker="o",
                capsize=3,
                label=f"{budget / 1e3:,.0f} KB",
            )
    axes.set(xlabel="bits per weight (a larger model is further left)", ylabel="bits per byte")
    axes.legend(title="file", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.sizes", description=__doc__.split("\n\n")[0]
    )
    sizes = [Size(128, 3), Size(192, 3), Size(128, 6)]
    parser.add_argument("--sizes", type=Size.parse, nargs="+", default=sizes, metavar="WIDTHxMULT")
    parser.add_argument("--steps", type=int, default=200, help="of the first size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42, 2025])
    parser.add_argument("--bits", type=float, nargs="+", default=[6, 5, 4, 3.5, 3, 2.5])
    parser.add_argument("--equal", choices=["steps", "flops"], default="steps")
    parser.add_argument("--append", type=Path, metavar="FILE", help="keeps runs, repeats none")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draws the table")
    args = parser.parse_args()
    if "DATA_PATH" not in os.environ:
        common.make_demo_corpus()

    first = args.sizes[0]
    budgets = [round(parameters(first) * bits / 8) for bits in args.bits]
    steps = {size: steps_of(size, first, args) for size in args.sizes}
    found = {size: [] for size in args.sizes}
    for seed in args.seeds:  # seed by seed: a study that is stopped has whole pairs
        for size in args.sizes:
            found[size].append(run(size, seed, budgets, steps[size], args))
    print_table(found, budgets, steps, args)
    if args.plot:
        plot(found, budgets, args.plot)


if __name__ == "__main__":
    main()
