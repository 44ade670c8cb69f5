"""Which size of runs/frontier.sh would be best at 16 MB and 600 s on eight H100? A prediction.

    python -m studies.best_size RUNS [--sizes 512x3 512x4 512x5 512x6 576x4 576x5 640x4]

RUNS: the file that studies.sizes --append has written. It says how fast the cost of rounding grows
as the bits per weight fall.

Three things change with the size, each to be added to the bits per byte of the preset as it is:

- capacity: what a larger model gains in the same number of steps,
- steps: what it loses because a step costs more FLOPs, so that 600 s buy fewer of them,
- rounding: what it loses because the file has fewer bits for each weight.

The first two are taken from the law that Hoffmann et al. fitted (2203.15556),
L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 nats per token, for N weights and D training tokens of
about 4.2 bytes. The third starts from the preset's own cost on a GPU, 0.0018 bpb at 3.88 bits, and
grows by the same factor for each bit less as in models of the demo's size. So it is assumed that a
law of other models, with other data and optimizers, has the right slopes here; that time goes with
counted FLOPs, from the 5,500 steps on that PR #1435 reports for the preset's network; and that
rounding grows with falling bits as it does for a model of a million weights. None of this replaces
a run.
"""

import argparse
import math
from pathlib import Path

import torch

from studies import recipe
from studies.sizes import Size, rounding_growth
from tools import common
from tools.common import t

A, ALPHA, B, BETA = 406.4, 0.34, 410.7, 0.28
BYTES_PER_TOKEN_OF_LAW = 4.2
BYTES_PER_TOKEN = 2.408  # of the FineWeb sample, with 1,024 pieces
STEPS = 5_500  # of the preset in 600 s on eight H100, as PR #1435 reports
KNOWN_BITS, KNOWN_COST = 3.88, 0.0018  # bits per weight; bpb lost by rounding, on an H200
FILE_BITS = 8 * (16_000_000 - 260_000)  # without the code


def frontier(**changes) -> t.Hyperparameters:
    """The settings of runs/frontier.sh, then `changes`."""
    env = common.script_settings("frontier")
    return t.Hyperparameters.from_env(env | {k: str(v) for k, v in changes.items()})


def weights_and_flops(hp: t.Hyperparameters) -> tuple[int, float]:
    """Number of weights; FLOPs of a step, as a mean over training."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in t.GPT(hp).parameters())
    return weights, recipe.mean_flops(hp)


def law_bpb(weights: float, steps: float, batch_tokens: int) -> tuple[float, float]:
    """The law's two terms that change, in bits per byte: of the weights, of the training tokens."""
    tokens = steps * batch_tokens * BYTES_PER_TOKEN / BYTES_PER_TOKEN_OF_LAW
    unit = math.log(2) * BYTES_PER_TOKEN_OF_LAW
    return A / weights**ALPHA / unit, B / tokens**BETA / unit


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.best_size", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("runs", type=Path, help="what studies.sizes --append has written")
    sizes = [Size(512, mlp) for mlp in (3, 4, 5, 6)] + [Size(576, 4), Size(576, 5), Size(640, 4)]
    parser.add_argument("--sizes", type=Size.parse, nargs="+", default=sizes, metavar="WIDTHxMULT")
    args = parser.parse_args()
    growth = rounding_growth(args.runs)
    preset = frontier()
    own_weights, own_flops = weights_and_flops(preset)
    own_terms = law_bpb(own_weights, STEPS, preset.train_batch_tokens)
    print(f"Each bit per weight less multiplies the cost of rounding by {growth:.2f}.\n")
    print("| | weights | steps | bits per weight | capacity | fewer steps | rounding | all |")
    print("|---" * 8 + "|")
    for size in args.sizes:
        weights, flops = weights_and_flops(frontier(**size.changes))
        steps = STEPS * own_flops / flops
        terms = law_bpb(weights, steps, preset.train_batch_tokens)
        parts = [new - old for new, old in zip(terms, own_terms)]
        bits = FILE_BITS / weights
        lost, own_lost = (
            KNOWN_COST * growth ** (KNOWN_BITS - b) for b in (bits, FILE_BITS / own_weights)
        )
        parts.append(lost - own_lost)
        changes = " | ".join(f"{part:+.4f}" for part in [*parts, sum(parts)])
        print(f"| {size} | {weights / 1e6:.1f}M | {steps:,.0f} | {bits:.2f} | {changes} |")


if __name__ == "__main__":
    main()
