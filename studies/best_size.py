"""Which size of runs/frontier.sh would be best at 16 MB and 600 s on eight H100? A prediction.

    python -m studies.best_size RUNS [--sizes 512x3 512x4 512x5 512x6 576x4 576x5 640x4]

RUNS: the file that studies.sizes --append has written. It says how fast the cost of rounding grows
as the bits per weight fall.

A larger model differs from the preset in three ways. The table has the bits per byte of each, and
their sum:

- capacity: it gains by having more weights,
- fewer steps: it loses because each step costs more FLOPs, and the time is the same,
- rounding: it loses because the file has fewer bits for each weight.

The first two follow the scaling law of Hoffmann et al. (2203.15556). With N weights and D training
tokens, the loss is 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 nats per token of about 4.2 bytes. The
third starts from what rounding cost the preset on a GPU, 0.0018 bpb at 3.88 bits per weight. For
each bit less it is multiplied by the factor that the demo-sized models in RUNS show.

The prediction assumes that this law, fitted to other models and data, holds for ours; that the
time of a step grows as its FLOPs do, starting from 5,500 steps in 600 s, which PR #1435 reports;
and that rounding costs a large model the same factor per bit as a small one. It does not replace a
run.
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
    """The settings of runs/frontier.sh, overridden by `changes`."""
    env = common.script_settings("frontier")
    return t.Hyperparameters.from_env(env | {k: str(v) for k, v in changes.items()})


def weights_and_flops(hp: t.Hyperparameters) -> tuple[int, float]:
    """The number of weights, and the FLOPs of a training step. Steps with and without recurrence
    differ; this is their mean over a run."""
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
    try:
        growth = rounding_growth(args.runs)
    except ValueError as error:
        parser.error(str(error))
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
