"""Do averages and late QAT improve the score? bpb after packing and reading back, for each
AVERAGING with and without late QAT, 3 seeds.

    python -m studies.averaging [--steps 280] [--seeds 1 2 3] [--bits 6]

Trains the demo model on the built-in corpus, with the settings of runs/demo.sh but a fixed number
of steps, so that all machines take the same ones. One training gives all four averages, as they do
not change it. Each is packed at QUANT_BITS, read back, and scored on the validation stream by
windows that do not overlap. Float: the same weights before packing.
"""

import argparse
import statistics
import sys

import numpy as np

from tools import common
from tools.common import bits_per_byte, t


def one_run(hp, validation) -> dict[str, tuple[float, float]]:
    """averaging -> (bpb of the float weights, bpb after packing and reading back)."""
    model, states = common.train_averages(hp)
    results = {}
    for averaging, state in states.items():
        _, restored = t.decompress(t.pack(state, hp).blob)
        found = (bits_per_byte(model, validation, weights) for weights in (state, restored))
        results[averaging] = tuple(found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.averaging", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bits", type=int, default=6)
    args = parser.parse_args()
    common.make_demo_corpus()
    fixed = dict(
        ITERATIONS=args.steps,
        MAX_WALLCLOCK_SECONDS=0,
        WARMUP_STEPS=0,
        WARMDOWN_ITERS=args.steps * 5 // 8,
        WARMDOWN_FRAC=0,
        AVERAGING="ema_swa",
        QUANT_BITS=args.bits,
        QUANTIZER="rows",
        TRAIN_LOG_EVERY=0,
    )
    table = {}
    for threshold in (0, t.Hyperparameters().late_qat_threshold):
        for seed in args.seeds:
            hp = common.demo_settings(**fixed, SEED=seed, LATE_QAT_THRESHOLD=threshold)
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
