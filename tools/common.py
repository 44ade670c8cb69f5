"""What benches, studies and tools share: settings, train_gpt.py's phases on one rank without a log,
the work of a training step counted, and seconds measured.

They are modules of packages and are started from the repository's root: `python -m bench.step`."""

import contextlib
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

import train_gpt as t
from data import prepare_demo

ROOT = Path(__file__).resolve().parents[1]

# --- settings -------------------------------------------------------------------------------------


def make_demo_corpus() -> None:
    """Write the built-in corpus to data/, unless it is there."""
    prepare_demo.main(ROOT / "data")


def script_settings(name: str) -> dict[str, str]:
    """The settings that runs/<name>.sh has where the environment has none, paths from ROOT on."""
    script = (ROOT / f"runs/{name}.sh").read_text(encoding="utf-8").replace("$repo/", "")
    script = script.replace("${NUM_LAYERS:-11}", "11")
    return dict(re.findall(r"\b([A-Z_0-9]+)=\$\{\1:?-([^}]*)\}", script))


def demo_settings(**changes) -> t.Hyperparameters:
    """The settings of runs/demo.sh, then `changes`."""
    env = script_settings("demo")
    env |= {k: str(ROOT / env[k]) for k in ("DATA_PATH", "TOKENIZER_PATH")}
    return t.Hyperparameters.from_env(env | {k: str(v) for k, v in changes.items()})


def environment_settings() -> t.Hyperparameters:
    """The settings in the environment. If they cannot work, one line says why and the process
    ends."""
    try:
        return t.Hyperparameters.from_env(dict(os.environ))
    except t.UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def micro_batch_rows(hp: t.Hyperparameters) -> int:
    """Sequences in the largest micro-batch of one rank."""
    return max(1, min(hp.micro_batch_tokens, hp.train_batch_tokens) // hp.train_seq_len)


# --- the phases of train_gpt.py -------------------------------------------------------------------
# On one rank, without a log or files. `compress` and `decompress` need no help: call them directly.


def load_for_environment(path: Path, **changes: str) -> tuple[t.GPT, t.Hyperparameters]:
    """The model in an artifact, on this machine's device, and its settings. Those that the artifact
    does not hold come from `changes` and the environment. UserError: they contradict it."""
    loaded, stored = t.load(path)
    hp = t.settings_to_score(str(path), stored.of_model(), {**os.environ, **changes})
    model = t.GPT(hp).to(t.Ranks({}).device)
    model.load_state_dict(loaded.state_dict())
    return model, hp


def new_model(hp: t.Hyperparameters) -> t.GPT:
    """A model with the initial weights of SEED, on this machine's device."""
    torch.manual_seed(hp.seed)
    return t.GPT(hp).to(t.Ranks({}).device)


def one_window(hp: t.Hyperparameters) -> t.Validation:
    """A stream to validate on that is a single window, so that it takes next to no time."""
    tokens = np.zeros(hp.eval_seq_len + 1, np.uint16)
    return t.Validation(tokens, lambda tokens: np.ones(len(tokens) - 1, np.uint16))


def train(hp: t.Hyperparameters) -> tuple[t.GPT, t.Trained]:
    """Train a new model on the training shards of DATA_PATH. Returns it, with the weights that
    AVERAGING names, and what t.train returns."""
    model = new_model(hp)
    loader = t.TokenLoader(hp, 0, 1)
    return model, t.train(model, loader, one_window(hp), t.Ranks({}), t.RunLog(), t.StopSignal())


def step_of(state: t.TrainState, loader) -> Callable[[t.StepPlan], torch.Tensor]:
    """t.training_step on batches of `loader`: anything with TokenLoader's `micro_batch` and
    `accumulation`. COMPILE says whether it is compiled, at the first call."""
    loss = t.compiled(t.training_loss, state.hp, state.ranks.device)
    return partial(t.training_step, state, loader, loss)


def train_averages(hp: t.Hyperparameters) -> tuple[t.GPT, dict[str, dict[str, torch.Tensor]]]:
    """Train once with AVERAGING=ema_swa. Returns (the model, {value of AVERAGING: the state dict
    that it would have given}). A value whose average has taken no snapshot gives the last
    weights."""
    model = new_model(hp)
    state = t.TrainState(model, t.Ranks({}), t.RunLog())
    take_step = step_of(state, t.TokenLoader(hp, 0, 1))
    t.warm_up(state, take_step)
    t.run_steps(state, take_step, one_window(hp), t.StopSignal())
    names = [name for name, _ in model.named_parameters()]
    states = {}
    for averaging in ("none", "ema", "swa", "ema_swa"):
        used = {name: a for name, a in state.averages.items() if name in averaging.split("_")}
        weights = t.averaged_parameters(used) or [p.clone() for p in state.parameters]
        states[averaging] = dict(zip(names, weights))
    return model, states


def training_step(model: t.GPT, loader) -> Callable[[], torch.Tensor]:
    """A function that trains `model` by one step, at the full learning rate and without late QAT,
    on the next batch of `loader`, as in `step_of`. Blocks recur from the first step on."""
    state = t.TrainState(model, t.Ranks({}), t.RunLog())
    _, passes = t.block_passes(model.hp)
    return partial(step_of(state, loader), t.StepPlan(1.0, passes, None))


def curvature_of(model: t.GPT) -> dict[str, t.Curvature]:
    """name -> Curvature of the model's matrices, from the first GPTQ_TOKENS tokens of training."""
    _, passes = t.block_passes(model.hp)
    loader = t.TokenLoader(model.hp, 0, 1)
    curvature, _ = t.measure_curvature(model, passes, loader, 0, t.Ranks({}))
    return curvature


def score(model: t.GPT, tokens: np.ndarray, stride: int, trunk=None) -> np.ndarray:
    """The nll in nats of each target of `tokens`, scored by windows of EVAL_SEQ_LEN tokens.
    `trunk`: as of t.Scorer."""
    _, passes = t.block_passes(model.hp)
    segments = t.score(t.Scorer(model, passes, trunk), tokens, stride, t.Ranks({}))
    return np.concatenate([*segments], 1)[0]


def bits_per_byte(model: t.GPT, validation: t.Validation, state=None) -> float:
    """Of the validation stream, scored by windows that do not overlap. `state`: weights that the
    model is given first."""
    if state is not None:
        model.load_state_dict(state)
    nll = score(model, validation.tokens, model.hp.eval_seq_len)
    return t.bits_per_byte(nll, validation.target_bytes)


# --- the work of a training step, counted ---------------------------------------------------------

PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12  # per second, H100 SXM: dense bfloat16; HBM3
KINDS = {
    "products": ("mm", "bmm", "addmm", "fused_mlp"),
    "loss": ("_log_softmax", "nll_loss", "tanh"),
    "tables": ("embedding", "index", "gather", "scatter"),
}


@contextlib.contextmanager
def patched(**names):
    """Within, these names of train_gpt have other values."""
    plain = {name: getattr(t, name) for name in names}
    vars(t).update(names)
    try:
        yield
    finally:
        vars(t).update(plain)


def as_on_cuda():
    """Within, a model on the CPU or of meta tensors computes as it would on CUDA: in bfloat16 and
    with the project's kernels."""
    return patched(working_dtype=lambda x: torch.bfloat16, has_kernels=lambda x: True)


@register_flop_formula(torch.ops.golf.fused_mlp)
def mlp_flops(x, fc, proj, slope, **_) -> int:
    return 4 * x[0] * fc[0] * fc[1]


@register_flop_formula(torch.ops.golf.fused_mlp_backward)
def mlp_backward_flops(g, proj, z, slope, **_) -> int:
    return 2 * g[0] * proj[0] * proj[1]


class Tally(TorchDispatchMode):
    """Within, the FLOPs and bytes of every operation are added to found[phase, kind]. Views move no
    bytes."""

    def __init__(self):
        super().__init__()
        self.phase = ""
        self.found = defaultdict(lambda: [0.0, 0.0])

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self.phase = phase

    def multiply(self, factor: int) -> None:
        """Everything so far happens so many times."""
        for entry in self.found.values():
            entry[:] = [factor * number for number in entry]

    def add(self, kind: str, flops: float, size: float) -> None:
        entry = self.found[self.phase, kind]
        entry[0] += flops
        entry[1] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = all(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not (func._schema.returns and views):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            name = func._schema.name.split("::")[1]
            kind = next(
                (kind for kind, names in KINDS.items() if name.startswith(names)), "elementwise"
            )
            flops = (
                flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
                if func._overloadpacket in flop_registry
                else 0
            )
            self.add(kind, flops, sum(stored(x) for x in tensors))
        return out


def stored(x: torch.Tensor) -> int:
    """Bytes of the distinct elements of `x`. An expanded dimension is read once."""
    sizes = (size for size, stride in zip(x.shape, x.stride()) if stride)
    return int(torch.Size(sizes).numel()) * x.element_size() if x.numel() else 0


class Attention(torch.autograd.Function):
    """Counts what a fused attention computes and moves (FlashAttention, 2205.14135): half of the
    T x T scores, none of which leave the chip."""

    @staticmethod
    def forward(ctx, tally, q_BTHK, k_BTGK, v_BTGK):
        ctx.tally, ctx.shapes = tally, [x.shape for x in (q_BTHK, k_BTGK, v_BTGK)]
        B, T, H, K = q_BTHK.shape
        ctx.flops = 2 * B * H * T * T * K
        ctx.bytes = sum(map(stored, (q_BTHK, q_BTHK, k_BTGK, v_BTGK)))
        tally.add("attention", ctx.flops, ctx.bytes)
        return torch.empty_like(q_BTHK)

    @staticmethod
    def backward(ctx, grad):
        ctx.tally.add("attention", 2.5 * ctx.flops, 2 * ctx.bytes)
        return None, *(grad.new_empty(shape) for shape in ctx.shapes)


def count_step(hp: t.Hyperparameters) -> dict[tuple[str, str], list[float]]:
    """(phase, kind of operation) -> [FLOPs, bytes] of one step on one GPU, over all its
    micro-batches. Nothing is computed, and no GPU is needed."""
    micro_batches = -(-hp.train_batch_tokens // max(hp.micro_batch_tokens, hp.train_seq_len))
    rows = hp.train_batch_tokens // hp.train_seq_len // micro_batches
    tally = Tally()
    with torch.device("meta"):
        model, ids = t.GPT(hp), torch.zeros(rows, hp.train_seq_len, dtype=torch.int64)
        optimizers = t.build_optimizers(model, hp, t.Ranks({}))
    _, passes = t.block_passes(hp)

    def count_adamw(adamw) -> None:
        """One fused kernel: parameter, gradient and two moments in; parameter and moments out."""
        parameters = [p for group in adamw.param_groups for p in group["params"]]
        tally.add("elementwise", 0, sum(7 * stored(p) for p in parameters))

    attention = patched(
        causal_attention=lambda q, k, v, flash=None: Attention.apply(tally, q, k, v)
    )
    with as_on_cuda(), attention, mock.patch.object(t.AdamW, "step", count_adamw), tally:
        tally.begin("forward")
        loss = t.training_loss(model, ids, ids, passes)
        tally.begin("backward")
        loss.backward()
        tally.multiply(micro_batches)
        tally.begin("optimizer")
        t.update_parameters(optimizers, hp.grad_clip_norm)
    return dict(tally.found)


# --- measuring ------------------------------------------------------------------------------------


def describe_device() -> str:
    """What a measurement runs on: the device, attention's implementation, the version of torch."""
    attention, _ = t.find_flash_attention()
    threads = f"{torch.get_num_threads()} CPU threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    return f"{device}, attention {attention}, torch {torch.__version__}"


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable) -> tuple[object, float]:
    """(what `call` returns, its seconds by the clock, including the GPU's work)."""
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return result, time.perf_counter() - start


def timed_in_turn(calls: dict[object, Callable], rounds: int) -> tuple[dict, dict]:
    """({key: seconds in each round}, {key: last result}). Each round makes all calls, so that all
    of them are slowed alike by whatever else the machine does."""
    seconds, results = defaultdict(list), {}
    for _ in range(rounds):
        for key, call in calls.items():
            results[key], took = timed(call)
            seconds[key].append(took)
    return dict(seconds), results


def mean_and_error(values) -> tuple[float, float]:
    """(mean, its standard error, which is NaN for a single value), summed in float64."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)
