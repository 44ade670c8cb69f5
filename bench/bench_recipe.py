#!/usr/bin/env python3
"""What does each feature of the frontier preset give? bpb with each of them off in turn.

    python bench/bench_recipe.py [--steps 250] [--seeds 1 2 3] [--equal steps|flops]
        [--only FEATURE ...]

The demo model on the built-in corpus (runs/demo.sh), or with DATA_PATH and other settings in the
environment a model and corpus of yours; the features of runs/frontier.sh, those that name layers at
the same depth of that model. Each row is trained with the same batches and seeds, for a fixed
number of steps or, with --equal flops, for as many as the defaults' FLOPs buy: depth recurrence
and a wider MLP cost time. Scored: the last float weights, validation stream, windows without
overlap. A difference is that to the whole preset, by pairs of seeds: mean and standard error.
"""

import argparse
import os
import re
import statistics

import torch
from bench_averaging import ROOT, bpb, demo_settings, prepare_demo, t
from bench_step import count

# what is off in a row: the settings that go back to the defaults
FEATURES = {
    "depth recurrence": "RECUR_LAYERS",
    "parallel lanes": "PARALLEL_START_LAYER",
    "skip gates": "SKIP_GATES",
    "attention-output gate": "ATTN_GATE_DIMS",
    "SmearGate stops at BOS": "SMEAR_CROSSES_BOS",
    "XSA on all layers": "XSA_LAST_N",
    "no value residual": "VRL_ENABLED",
    "QK gain 5": "QK_GAIN_INIT",
    "MLP 4 wide": "MLP_MULT",
    "leaky slope 0.3": "LEAKY_SLOPE",
    "equal rows in Muon": "MUON_ROW_NORM",
    "rates and decays": "MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_WD EMBED_WD ADAM_WD",
    "warm-down by share": "WARMDOWN_FRAC",
}
LONG_RUNS = ("rates and decays", "QK gain 5")  # chosen for thousands of steps: "without both"
ELSEWHERE = ("BIGRAM_VOCAB_SIZE", "BIGRAM_DIM", "EMA_DECAY")  # sizes and averages: not compared


def frontier_settings(layers: int) -> dict[str, str]:
    """The features of runs/frontier.sh for a model of `layers` layers instead of 11."""
    script = (ROOT / "runs/frontier.sh").read_text()
    found = dict(re.findall(r"\b([A-Z_0-9]+)=\$\{\1:-([^}]*)\}", script))
    deep = {round(int(layer) * layers / 11) for layer in found["RECUR_LAYERS"].split(",")}
    found["RECUR_LAYERS"] = ",".join(map(str, sorted(deep)))
    found["PARALLEL_START_LAYER"] = str(round(int(found["PARALLEL_START_LAYER"]) * layers / 11))
    found["XSA_LAST_N"] = str(layers)
    return {name: value for name, value in found.items() if name not in ELSEWHERE}


def recipes(base: t.Hyperparameters) -> dict[str, dict[str, str]]:
    """Row -> settings beside those of `base`."""
    preset = frontier_settings(base.num_layers)
    rows = {"defaults": {}, "frontier": preset}
    for feature, names in FEATURES.items():
        rows[f"without: {feature}"] = without(preset, names)
    rows["without both"] = without(preset, " ".join(FEATURES[f] for f in LONG_RUNS))
    return rows


def without(preset: dict[str, str], names: str) -> dict[str, str]:
    return {name: value for name, value in preset.items() if name not in names.split()}


def mean_flops(hp: t.Hyperparameters) -> float:
    """Of a step, over a training in which recurrence begins at RECUR_START."""

    def of(**changes) -> float:
        env = hp.as_env() | changes
        return sum(flops for flops, _ in count(t.Hyperparameters.from_env(env)).values())

    return hp.recur_start * of(RECUR_LAYERS="") + (1 - hp.recur_start) * of()


def train(hp: t.Hyperparameters) -> float:
    """bits per byte of the last weights."""
    torch.manual_seed(hp.seed)
    loader, ranks = t.TokenLoader(hp, 0, 1), t.Ranks({})
    model = t.GPT(hp).to(ranks.device)
    validation = t.load_validation(hp)
    trainer = t.Trainer(model, loader, validation, ranks, t.RunLog(), t.StopSignal())
    t.train(trainer)
    return bpb(trainer, model.state_dict())


def settings(steps: int, **changes) -> t.Hyperparameters:
    """The demo's, then the environment's, then those of a row."""
    fixed = dict(
        ITERATIONS=steps,
        MAX_WALLCLOCK_SECONDS=0,
        WARMUP_STEPS=0,
        WARMDOWN_ITERS=steps * 5 // 8,
        AVERAGING="none",
        LATE_QAT_THRESHOLD=0,
        QUANTIZER="rows",
        TRAIN_LOG_EVERY=0,
        VAL_LOSS_EVERY=0,
    )
    known = demo_settings().as_env()
    given = {name: value for name, value in os.environ.items() if name in known}
    return demo_settings(**given, **(fixed | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=250, help="of the defaults")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--equal", choices=["steps", "flops"], default="steps")
    parser.add_argument("--only", nargs="+", help="features, of which a row is shown")
    args = parser.parse_args()
    if "DATA_PATH" not in os.environ:
        prepare_demo.main(ROOT / "data")
    base = settings(args.steps)
    first = mean_flops(base)
    sizes = f"{base.num_layers} layers, width {base.model_dim}, {args.steps} steps of "
    print(f"{sizes}{base.train_batch_tokens:,} tokens, seeds {args.seeds}, equal {args.equal}\n")
    print("| | parameters | GFLOP/step | steps | bpb | std | to the preset |")
    print("|---|---|---|---|---|---|---|")
    preset = []
    for row, changes in recipes(base).items():
        if args.only and row.startswith("without: ") and row[9:] not in args.only:
            continue
        flops = mean_flops(settings(args.steps, **changes))
        steps = round(args.steps * first / flops) if args.equal == "flops" else args.steps
        found = [train(settings(steps, **changes, SEED=seed)) for seed in args.seeds]
        preset = found if row == "frontier" else preset
        pairs = [a - b for a, b in zip(found, preset)]
        several = len(found) > 1
        spread = f"{statistics.stdev(found):.4f}" if several else "-"
        error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.4f}" if pairs and several else ""
        to_preset = f"{statistics.mean(pairs):+.4f}{error}" if pairs else ""
        hp = settings(steps, **changes)
        parameters = sum(p.numel() for p in t.GPT(hp).parameters())
        print(
            f"| {row} | {parameters:,} | {flops / 1e9:.1f} | {steps} "
            f"| {statistics.mean(found):.4f} | {spread} | {to_preset} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
