#!/usr/bin/env python3
"""Do averages and late QAT pay for themselves? bpb after the round trip,
for each AVERAGING x late QAT, 3 seeds.

    python bench/bench_averaging.py [--steps 280] [--seeds 1 2 3] [--bits 6]

Trains the demo model (the settings of runs/demo.sh, but a fixed number of steps, so that seeds and
machines agree) on the built-in corpus. One training serves all four averages: they only watch. Then
each is packed at QUANT_BITS, read back, and scored on the validation stream in windows without
overlap. Float = the same weights before packing.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare_demo  # noqa: E402

import train_gpt as t  # noqa: E402


def demo_settings(**changes) -> t.Hyperparameters:
    """The defaults written in runs/demo.sh, then `changes`."""
    script = (ROOT / "runs/demo.sh").read_text()
    env = dict(re.findall(r"\b([A-Z_0-9]+)=\$\{\1:-([^}]*)\}", script))
    env |= {k: str(ROOT / env[k]) for k in ("DATA_PATH", "TOKENIZER_PATH")}
    return t.Hyperparameters.from_env(env | {k: str(v) for k, v in changes.items()})


def bpb(trainer, state) -> float:
    """Of the validation stream, with these weights."""
    trainer.model.load_state_dict(state)
    _, result = trainer.validate()
    return result


def one_run(hp, validation) -> dict[str, tuple[float, float]]:
    """averaging -> (bpb of the float weights, bpb after the round trip)."""
    torch.manual_seed(hp.seed)
    loader, ranks = t.TokenLoader(hp, 0, 1), t.Ranks({})
    trainer = t.Trainer(t.GPT(hp), loader, validation, ranks, t.RunLog(), t.StopSignal())
    last, train_step = {}, trainer.step

    def step(*args, **named):  # keeps the last weights, before train() loads the average
        loss = train_step(*args, **named)
        last["weights"] = [p.detach().clone() for p in trainer.parameters]
        return loss

    trainer.step = step
    t.train(trainer)
    names, results = [n for n, _ in trainer.model.named_parameters()], {}
    for averaging in ("none", "ema", "swa", "ema_swa"):
        watched = {
            name: trainer.averages[name]
            for name in averaging.split("_")
            if name in trainer.averages
        }
        chosen = t.averaged_parameters(watched) or last["weights"]
        state = dict(zip(names, chosen))
        packed = t.pack(state, hp)
        results[averaging] = bpb(trainer, state), bpb(trainer, t.unpack(packed.blob))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bits", type=int, default=6)
    args = parser.parse_args()
    prepare_demo.main(ROOT / "data")
    fixed = dict(
        ITERATIONS=args.steps,
        MAX_WALLCLOCK_SECONDS=0,
        WARMUP_STEPS=0,
        WARMDOWN_ITERS=args.steps * 5 // 8,
        AVERAGING="ema_swa",
        QUANT_BITS=args.bits,
        QUANTIZER="rows",
        TRAIN_LOG_EVERY=0,
    )
    table = {}
    for threshold in (0, t.Hyperparameters().late_qat_threshold):
        for seed in args.seeds:
            hp = demo_settings(**fixed, SEED=seed, LATE_QAT_THRESHOLD=threshold)
            for averaging, pair in one_run(hp, t.load_validation(hp)).items():
                table.setdefault((averaging, threshold > 0), []).append(pair)
            print(
                f"done: late QAT {'on' if threshold else 'off'}, seed {seed}",
                file=sys.stderr,
                flush=True,
            )
    print(
        f"demo model, {args.steps} steps, int{args.bits}, seeds {args.seeds}: "
        "mean bpb (standard deviation)"
    )
    print("| AVERAGING | late QAT | float | round trip | cost of packing |\n|---|---|---|---|---|")
    for (averaging, qat), pairs in sorted(
        table.items(), key=lambda item: np.mean([p[1] for p in item[1]])
    ):
        floats, packed = zip(*pairs)
        spread = statistics.stdev(packed) if len(packed) > 1 else 0.0
        print(
            f"| {averaging} | {'on' if qat else 'off'} | {np.mean(floats):.4f} "
            f"| {np.mean(packed):.4f} ({spread:.4f}) | {np.mean(packed) - np.mean(floats):+.4f} |"
        )


if __name__ == "__main__":
    main()
