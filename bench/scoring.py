"""Scoring with overlapping windows: windows/s, time and bits per byte for each stride, with all
speed-ups and with each of them switched off, in one run.

    python -m bench.scoring [logs/seed42.int6.ptz] [--targets 60000] [--rounds 3]
        [--strides 64 96 128 256]

Settings are train_gpt.py's environment variables. They must be those that the artifact was trained
with. Without DATA_PATH it is the demo's model on the built-in corpus. Without an artifact the
weights are random, and no bpb is shown. One process runs all variants in turn in each round; the
medians are shown. The variants: as it is; all positions through the last block, not only the scored
ones; on a GPU also without the kernels, without both (`plain`, which the ratio compares with), and
not compiled. The last column is the time that this one device would take for the whole stream.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from tools import common
from tools.common import t


def variants(model: t.GPT, hp: t.Hyperparameters, on_gpu: bool) -> dict[str, tuple]:
    """Name -> (trunk, the model that it belongs to). The first is as it is, the second the plain
    form."""

    def whole(trunk):
        return lambda ids, passes, last: trunk(ids, passes)[:, -last:]

    if not on_gpu:
        return {"as it is": (model.hidden, model), "whole last block": (whole(model.hidden), model)}
    plain_hp = dataclasses.replace(hp, fused_mlp=False)
    plain = t.GPT(plain_hp).to(model.embed.weight.device)
    plain.load_state_dict(model.state_dict())
    compiled, plainly = (torch.compile(m.hidden, dynamic=False) for m in (model, plain))
    return {
        "as it is": (compiled, model),
        "plain": (whole(plainly), plain),
        "whole last block": (whole(compiled), model),
        "kernels off": (plainly, plain),
        "not compiled": (model.hidden, model),
    }


def measure(
    hp: t.Hyperparameters, artifact: Path | None, strides: list[int], targets: int, rounds: int
) -> None:
    """Print a row per stride and variant."""
    validation = t.load_validation(hp)
    tokens = np.array(validation.tokens[: targets + 1])
    target_bytes = validation.count_bytes(tokens)
    model = common.new_model(hp)
    if artifact:
        t.read_artifact(artifact, "", model, t.Ranks({}), t.RunLog())
    trunks = variants(model, hp, torch.cuda.is_available())
    calls = {}
    for stride, (name, (trunk, scorer)) in product(strides, trunks.items()):
        calls[stride, name] = partial(common.score, scorer, tokens, stride, trunk)
        # compiles, and warms up
        common.score(scorer, tokens[: 4 * hp.eval_seq_len], stride, trunk)
    seconds, nll = common.timed_in_turn(calls, rounds)
    bpb = {stride: t.bits_per_byte(nll[stride, "as it is"], target_bytes) for stride in strides}
    print(
        f"{common.describe_device()}: {len(tokens) - 1:,} of {validation.num_targets:,} targets, "
        f"windows of {hp.eval_seq_len}\n\n"
        f"{'stride':>6} {'':17} {'windows':>8} {'windows/s':>10} {'ratio':>6} {'low-high s':>14} "
        f"{'bpb':>9} {'to first':>9} {'whole stream s':>15}"
    )
    for (stride, name), rows in seconds.items():
        windows = len(
            t.windows(0, len(tokens) - 1, min(hp.eval_seq_len, len(tokens) - 1), stride)[0]
        )
        middle = statistics.median(rows)
        said = (
            f"{bpb[stride]:>9.4f} {bpb[stride] - bpb[strides[0]]:>+9.4f}"
            if artifact
            else f"{'':19}"
        )
        whole = middle * validation.num_targets / (len(tokens) - 1)
        ratio = statistics.median(seconds[stride, list(trunks)[1]]) / middle
        print(
            f"{stride:>6} {name:17} {windows:>8,} {windows / middle:>10,.1f} {ratio:>6.2f} "
            f"{f'{min(rows):.2f}-{max(rows):.2f}':>14} {said} {whole:>15.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scoring", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("artifact", nargs="?", type=Path, help="none: random weights")
    parser.add_argument("--strides", type=int, nargs="+", default=[64, 96, 128, 256])
    parser.add_argument("--targets", type=int, default=60_000, help="of the stream's beginning")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        if "DATA_PATH" in os.environ:
            env = dict(os.environ)
        else:
            common.make_demo_corpus()
            env = common.demo_settings().as_env()
        if args.artifact:  # it has the settings of its model
            env = {name: value for name, value in env.items() if name not in t.MODEL_SETTINGS}
            env["EVAL_ONLY"] = str(args.artifact)
        hp = t.read_settings(env, t.Ranks({}))
        if not 1 <= min(args.strides) <= max(args.strides) <= hp.eval_seq_len:
            raise t.UserError(
                f"--strides {args.strides}: expected 1 to EVAL_SEQ_LEN={hp.eval_seq_len}"
            )
        measure(hp, args.artifact, args.strides, args.targets, args.rounds)
    except t.UserError as error:
        sys.exit(f"scoring.py: error: {error}")


if __name__ == "__main__":
    main()
