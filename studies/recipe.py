"""What is each feature of the frontier preset worth? bpb with each of them off in turn.

    python -m studies.recipe [--steps 250] [--seeds 1 2 3] [--equal steps|flops]
        [--base frontier|network] [--only FEATURE ...] [--halves] [--append FILE]

It trains the demo model on the built-in corpus (runs/demo.sh) or, if DATA_PATH and other settings
are in the environment, your own model on your own corpus. The features are those of
runs/frontier.sh; layers that they name are moved to the same relative depth. Each row is the preset
with one feature set back to the default. With --base network the preset is taken without the rates
and the gain, which were chosen for thousands of steps. All rows are trained with the same batches
and seeds, for a fixed number of steps or, with --equal flops, for the number of steps that takes as
many FLOPs as the defaults do: depth recurrence and a wider MLP cost time. The last float weights
are scored on the validation stream by windows that do not overlap. A difference is to the base,
between runs of equal seed: mean and standard error.

--halves needs fewer runs for many features. Each feature is on in half of the runs, together with
other features every time, so that every run counts for every feature. (It is a Hadamard matrix: of
any two features, all four combinations come equally often.) Every second seed reverses the choices
of the seed before. So features that help each other do not change each other's differences. The
differences are estimated by least squares, as if features added up; their errors come from the
residuals.

--append writes each run to FILE as soon as it ends: a line of JSON with its bpb and with its
settings, unless they are the script's defaults. A run that is in FILE is not repeated. So a table
that was stopped can go on, and tables can share runs. Begin another file when train_gpt.py has
changed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from tools import common
from tools.common import demo_settings, t

# name of a feature -> the settings that are set back to the defaults when it is off
FEATURES = {
    "depth recurrence": "RECUR_LAYERS RECUR_START",
    "parallel lanes": "PARALLEL_START_LAYER",
    "skip gates": "SKIP_GATES",
    "attention-output gate": "ATTN_GATE_DIMS",
    "SmearGate stops at BOS": "SMEAR_CROSSES_BOS",
    "XSA on all layers": "XSA_LAST_N",
    "no value residual": "VRL_ENABLED",
    "QK gain 5": "QK_GAIN_INIT",
    "MLP 4 wide": "MLP_MULT",
    "table gain 1": "TABLE_GAIN_INIT",  # changes nothing if VE_DIM and BIGRAM_DIM are below 64
    "equal rows in Muon": "MUON_ROW_NORM",
    "rates and decays": "MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_WD EMBED_WD ADAM_WD",
    "warm-down by share": "WARMDOWN_FRAC",
}
LONG_RUNS = ("rates and decays", "QK gain 5")  # were chosen for thousands of steps
# not compared: sizes, averages, what matters in long windows only, and late QAT, which is off here
ELSEWHERE = (
    *("BIGRAM_VOCAB_SIZE", "BIGRAM_DIM", "EMA_DECAY", "ROPE_BASE_LENGTH", "LATE_QAT_THRESHOLD"),
)


def frontier_settings(layers: int, script: str = "frontier") -> dict[str, str]:
    """The features of runs/frontier.sh, or of another script, for a model of `layers` layers
    instead of 11."""
    found = common.script_settings(script)
    deep = {round(int(layer) * layers / 11) for layer in found["RECUR_LAYERS"].split(",")}
    found["RECUR_LAYERS"] = ",".join(map(str, sorted(deep)))
    found["PARALLEL_START_LAYER"] = str(round(int(found["PARALLEL_START_LAYER"]) * layers / 11))
    found["XSA_LAST_N"] = str(layers)
    return {name: value for name, value in found.items() if name not in ELSEWHERE}


def recipes(model: t.Hyperparameters, base: str) -> dict[str, dict[str, str]]:
    """Row -> the settings in which it differs from `model`."""
    preset = frontier_settings(model.num_layers)
    network = without(preset, " ".join(FEATURES[feature] for feature in LONG_RUNS))
    whole = {"frontier": preset, "network": network}[base]
    rows = {"defaults": {}, base: whole}
    for feature, names in FEATURES.items():
        if without(whole, names) != whole:
            rows[f"without: {feature}"] = without(whole, names)
    if base == "frontier":
        rows["without both"] = network
    return rows


def without(preset: dict[str, str], names: str) -> dict[str, str]:
    return {name: value for name, value in preset.items() if name not in names.split()}


def halves(features: int) -> list[tuple[bool, ...]]:
    """For each run, which features are on: Paley's Hadamard matrix, made of the squares modulo a
    prime."""
    prime = next(p for p in (3, 7, 11, 19) if p >= features)
    squares = {i * i % prime for i in range(prime)}
    runs = [tuple((run + i) % prime in squares for i in range(features)) for run in range(prime)]
    return [*runs, (False,) * features]


def mean_flops(hp: t.Hyperparameters) -> float:
    """Mean FLOPs of a step, over a training in which recurrence begins at RECUR_START."""

    def of(**changes) -> float:
        env = hp.as_env() | changes
        counted = common.count_step(t.Hyperparameters.from_env(env))
        return sum(flops for flops, _ in counted.values())

    return hp.recur_start * of(RECUR_LAYERS="") + (1 - hp.recur_start) * of()


def train(hp: t.Hyperparameters) -> float:
    """Train a new model. Returns the bits per byte of its last weights."""
    model, _ = common.train(hp)
    return common.bits_per_byte(model, t.load_validation(hp))


def settings(steps: int, **changes) -> t.Hyperparameters:
    """The demo's settings, overridden by the environment's, and those by `changes` of a row."""
    fixed = dict(
        ITERATIONS=steps,
        MAX_WALLCLOCK_SECONDS=0,
        WARMUP_STEPS=0,
        WARMDOWN_ITERS=steps * 5 // 8,
        WARMDOWN_FRAC=0,
        AVERAGING="none",
        LATE_QAT_THRESHOLD=0,
        QUANTIZER="rows",
        TRAIN_LOG_EVERY=0,
        VAL_LOSS_EVERY=0,
    )
    known = demo_settings().as_env()
    given = {name: value for name, value in os.environ.items() if name in known}
    return demo_settings(**(given | fixed | changes))


def unusual(hp: t.Hyperparameters) -> dict[str, str]:
    """The settings that are not the script's defaults."""
    usual = t.Hyperparameters().as_env()
    return {name: value for name, value in hp.as_env().items() if value != usual[name]}


def kept_runs(file: Path | None) -> list[dict]:
    """All runs in the file, except for a last line that was cut short."""
    if not file or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}}")]


def train_once(hp: t.Hyperparameters, file: Path | None) -> float:
    """Bits per byte of a run, read from the file if they are there."""
    settings = unusual(hp)
    for run in kept_runs(file):
        if run["settings"] == settings:
            return run["bpb"]
    found = train(hp)
    if file:
        with file.open("a") as lines:  # a line break first, as the last line may be cut short
            lines.write("\n" + json.dumps({"bpb": found, "settings": settings}, allow_nan=False))
    return found


def difference(pairs: list[float]) -> str:
    mean, error = common.mean_and_error(pairs)
    return f"{mean:+.4f}" + (f" ± {error:.4f}" if len(pairs) > 1 else "")


def steps_of(changes: dict[str, str], args) -> int:
    """args.steps, or as many as take the FLOPs of the defaults' args.steps."""
    if args.equal == "steps":
        return args.steps
    flops, first = (mean_flops(settings(args.steps, **c)) for c in (changes, {}))
    return round(args.steps * first / flops)


def one_row(row: str, changes: dict[str, str], seed: int, args) -> float:
    began = time.process_time()
    found = train_once(settings(steps_of(changes, args), **changes, SEED=seed), args.append)
    took = time.process_time() - began
    print(f"{row}, seed {seed}: {found:.4f}, {took:.0f} s", file=sys.stderr, flush=True)
    return found


def one_at_a_time(rows: dict[str, dict[str, str]], args) -> None:
    found = {row: [] for row in rows}
    for seed in args.seeds:  # seed by seed: a table that is stopped has whole pairs
        for row, changes in rows.items():
            found[row].append(one_row(row, changes, seed, args))
    print(f"| | parameters | GFLOP/step | steps | bpb | std | to {args.base} |")
    print("|---|---|---|---|---|---|---|")
    for row, changes in rows.items():
        hp = settings(args.steps, **changes)
        parameters = sum(p.numel() for p in t.GPT(hp).parameters())
        spread = f"{statistics.stdev(found[row]):.4f}" if len(args.seeds) > 1 else "-"
        pairs = [a - b for a, b in zip(found[row], found[args.base])]
        print(
            f"| {row} | {parameters:,} | {mean_flops(hp) / 1e9:.1f} | {steps_of(changes, args)} "
            f"| {statistics.mean(found[row]):.4f} | {spread} "
            f"| {difference(pairs) if row != args.base else ''} |"
        )


def each_on_in_half(rows: dict[str, dict[str, str]], args) -> None:
    features, whole = [row[9:] for row in rows if row.startswith("without: ")], rows[args.base]
    observed, bpbs = [], []
    for i, seed in enumerate(args.seeds):
        for design in halves(len(features)):
            off = [on == bool(i % 2) for on in design]
            names = " ".join(FEATURES[f] for f, is_off in zip(features, off) if is_off)
            row = "".join("01"[not is_off] for is_off in off)
            observed.append([*off, *(seed == other for other in args.seeds)])
            bpbs.append(one_row(row, without(whole, names), seed, args))
    x, y = np.array(observed, float), np.array(bpbs)
    differences = np.linalg.lstsq(x, y, rcond=None)[0]
    left = y - x @ differences
    freedom = len(y) - x.shape[1]
    variance = left @ left / freedom if freedom else float("nan")
    errors = np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    print(f"{len(y)} runs, mean {y.mean():.4f}, standard deviation left {variance**0.5:.4f}\n")
    print("| off | bpb |\n|---|---|")
    for feature, difference, error in zip(features, differences, errors):
        print(f"| {feature} | {difference:+.4f} ± {error:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.recipe", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=250, help="of the defaults")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--equal", choices=["steps", "flops"], default="steps")
    parser.add_argument(
        "--base",
        choices=["frontier", "network"],
        default="frontier",
        help="from what features go off: the whole preset, or it without " + ", ".join(LONG_RUNS),
    )
    parser.add_argument("--only", nargs="+", help="features, of which a row is shown")
    parser.add_argument("--halves", action="store_true", help="each feature on in half of the runs")
    parser.add_argument("--append", type=Path, metavar="FILE", help="keeps runs, repeats none")
    args = parser.parse_args()
    if "DATA_PATH" not in os.environ:
        common.make_demo_corpus()
    rows = {
        row: changes
        for row, changes in recipes(settings(args.steps), args.base).items()
        if not args.only or not row.startswith("without: ") or row[9:] in args.only
    }
    model = settings(args.steps)
    print(
        f"{model.num_layers} layers, width {model.model_dim}, {args.steps} steps of "
        f"{model.train_batch_tokens:,} tokens, seeds {args.seeds}, equal {args.equal}\n"
    )
    (each_on_in_half if args.halves else one_at_a_time)(rows, args)


if __name__ == "__main__":
    main()
