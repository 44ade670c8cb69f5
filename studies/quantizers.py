"""What rounding costs at equal bytes: bits per byte after packing and reading back, for each
quantiser.

    python -m studies.quantizers [--seeds 1337 42 7] [--steps 300] [--bits 3 4 5 6]
    python -m studies.quantizers --weights W0.npz W1.npz --data DIR [--held-out DIR]

Without --weights: models of the demo's settings, trained on the built-in corpus for --steps steps,
one per seed. With it: a model of the default shapes, with the weights that these npz files hold by
name. DIR holds the training shards, for the curvature, and the stream to score, unless --held-out
names another folder for it.

The bytes are those of the container that `rows` makes with codes of --bits bits (for tables too).
Each quantiser then fits its own container into them. Each line shows, with their standard errors:
the `rise`, the mean increase over the float model on the same targets; and the KL divergence from
the float model's predictions. The KL is what the rise would be on endless text that the float model
itself predicts perfectly, and it is far less noisy. `predicted`: by the curvature.

rows and gptq are the script's own. `grid`: GPTQ's step sizes, each weight rounded by itself.
`carry`: the step sizes of `rows`, with later columns compensating for errors as in GPTQ.
"""

import argparse
import dataclasses
import math
import time

import numpy as np
import torch

from tools import common
from tools.common import mean_and_error, t


class Grid(t.GPTQ):
    """GPTQ's step sizes, each weight rounded by itself."""

    quantize = t.GPTQ.draft


class Carry(t.GPTQ):
    """RowQuantizer's step sizes, GPTQ's rounding."""

    def quantize(self, name: str, w_RC, coarsen: float):
        codes_RC, delta = self.rows.quantize(name, w_RC, coarsen)
        if name in self.curvature:
            perm_C, factor_CC = self.curvature[name].factors
            codes_RC[:, perm_C] = t.round_in_turn(w_RC.T[perm_C], delta[:, 0], factor_CC).T
        return codes_RC, delta

    def draft(self, name: str, w_RC, coarsen: float):
        return self.rows.quantize(name, w_RC, coarsen)


QUANTIZERS = {"rows": t.RowQuantizer, "grid": Grid, "carry": Carry, "gptq": t.GPTQ}


def demo_model(seed: int, steps: int, tokens: int):
    """(model, curvature) after `steps` steps of runs/demo.sh."""
    common.make_demo_corpus()
    hp = common.demo_settings(
        SEED=seed,
        ITERATIONS=steps,
        MAX_WALLCLOCK_SECONDS=0,
        WARMUP_STEPS=0,
        TRAIN_LOG_EVERY=0,
        GPTQ_TOKENS=tokens,
    )
    model, done = common.train(hp)
    return model, done.curvature


def given_model(args):
    """(model, curvature) of the default shapes with the given weights."""
    hp = t.Hyperparameters(
        data_path=args.held_out or args.data,
        train_data_path=args.data,
        tokenizer_path=args.tokenizer,
        max_wallclock_seconds=0,
        train_batch_tokens=args.length,
        train_seq_len=args.length,
        eval_seq_len=args.length,
        gptq_tokens=args.tokens,
    )
    model = common.new_model(hp)
    state = {}
    for path in args.weights:
        with np.load(path, allow_pickle=False) as arrays:
            state |= {name: torch.from_numpy(arrays[name]).float() for name in arrays}
    model.load_state_dict(state)
    return model, common.curvature_of(model)


@torch.inference_mode()
def predictions(model, windows) -> torch.Tensor:
    """(targets, V) float16: log-probabilities at all positions of the windows (count, T + 1)."""
    _, passes = t.block_passes(model.hp)
    cap = model.hp.logit_softcap
    parts = []
    for ids in windows.split(8192 // windows.size(1)):
        hidden = model.hidden(ids[:, :-1], passes).flatten(0, 1)
        parts.append(t.log_probabilities(model.logits(hidden), cap).half())
    return torch.cat(parts)


def held_out_windows(hp, targets: int):
    """(windows (count, T + 1) spread over the validation stream, bytes of their targets)."""
    T = hp.eval_seq_len
    stream = t.load_validation(hp).tokens
    count = min(targets // T, (len(stream) - 1) // T)
    starts = [i * (len(stream) - T - 1) // max(1, count - 1) for i in range(count)]
    windows = np.stack([stream[s : s + T + 1] for s in starts])
    counted = t.ByteCounter(hp)
    return torch.from_numpy(windows.astype(np.int64)), sum(int(counted(w).sum()) for w in windows)


def cost(state, curvature, back) -> float:
    """How many nats per token the errors back - state cost, as the curvature predicts."""
    total = 0.0
    for name, c in curvature.items():
        e = (back[name] - state[name]).double()
        total += float((c.outputs_R.double() * ((e @ c.inputs_CC.double()) * e).sum(1)).sum()) / 2
    return total


class Judge:
    """What rounded weights cost on held-out windows, in bits per byte more than the float model."""

    def __init__(self, model, curvature: dict, targets: int):
        self.model = model
        self.curvature = curvature
        self.state = {name: w.clone() for name, w in model.state_dict().items()}
        self.windows, text_bytes = held_out_windows(model.hp, targets)
        self.targets = self.windows[:, 1:].reshape(-1, 1)
        self.reference = predictions(model, self.windows)
        nats = -self.reference.float().gather(1, self.targets)
        self.per_byte = len(nats) / math.log(2) / text_bytes  # bits per byte of a nat per token
        self.bpb = float(nats.mean()) * self.per_byte

    def __call__(self, back: dict):
        """(KL divergence, rise of the score) of each target."""
        self.model.load_state_dict(back)
        found = predictions(self.model, self.windows).float()
        self.model.load_state_dict(self.state)
        expected = self.reference.float()
        kl = (expected.exp() * (expected - found)).sum(1)
        rise = (expected - found).gather(1, self.targets)[:, 0]
        return kl * self.per_byte, rise * self.per_byte

    def predicted(self, back: dict):
        """The cost of these weights as the curvature predicts it, in bits per byte."""
        return cost(self.state, self.curvature, back) * self.per_byte


def introduce(label: str, judge: Judge) -> None:
    """Print the size and the score of the float model."""
    weights = sum(w.numel() for w in judge.state.values())
    targets = len(judge.targets)
    print(
        f"{label}: {weights:,} parameters, float {judge.bpb:.4f} bpb on {targets:,} targets",
        flush=True,
    )


def budget_of(bits: int, state: dict, hp):
    """(settings with QUANT_BITS=`bits`, bytes of the container that `rows` makes with them)."""
    hp = dataclasses.replace(hp, quant_bits=bits, fill_budget=True)
    return hp, len(t.pack(state, hp).blob)


def compare(label: str, judge: Judge, args) -> None:
    """Print a line per width of codes and quantiser."""
    introduce(label, judge)
    for bits in args.bits:
        hp, size = budget_of(bits, judge.state, judge.model.hp)
        for name in args.quantizers:
            began = time.perf_counter()
            quantizer = QUANTIZERS[name](judge.state, hp, judge.curvature)
            container = t.fit(judge.state, hp, quantizer, size + t.AIM).container
            seconds = time.perf_counter() - began
            _, back = t.decompress(container.blob, judge.state)
            (kl, kl_error), (rise, rise_error) = map(mean_and_error, judge(back))
            print(
                f"  {bits} bits {name:5} {len(container.blob):>10,} bytes  rise {rise:+.6f} "
                f"+- {rise_error:.6f}  KL {kl:.6f} +- {kl_error:.6f} bpb  "
                f"predicted {judge.predicted(back):.6f}  "
                f"error {container.error:.4f}  {seconds:.1f} s",
                flush=True,
            )


def judges(args):
    """Yields (label, Judge) of the models that the options name."""
    if args.weights:
        yield "given weights", Judge(*given_model(args), args.targets)
        return
    for seed in args.seeds:
        model = demo_model(seed, args.steps, args.tokens)
        yield f"seed {seed}", Judge(*model, args.targets)


def options(name: str, description: str):
    """A parser with the options that studies.quantizers and studies.roundings share. `name`: which
    of them asks."""
    parser = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42, 7])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5, 6])
    parser.add_argument("--targets", type=int, default=60_000, help="held-out targets, at most")
    parser.add_argument("--tokens", type=int, default=32_768, help="GPTQ_TOKENS")
    parser.add_argument("--weights", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--held-out")
    parser.add_argument("--tokenizer")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window of --weights")
    return parser


def main() -> None:
    parser = options("quantizers", __doc__.split("\n\n")[0])
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for label, judge in judges(args):
        compare(label, judge, args)


if __name__ == "__main__":
    main()
