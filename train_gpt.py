"""Parameter Golf: train a small GPT, pack it into 16 MB, score a stream by a code length.

    make demo                                                 laptop CPU, nothing to download
    torchrun --standalone --nproc_per_node=8 train_gpt.py     8xH100, FineWeb under DATA_PATH
    SEED=42 EVAL_STRIDE=256 torchrun ...                      settings are environment variables

One token's life, from the top of this file to its bottom (in brackets: the sections):

    shard -> TokenLoader -> GPT -> loss -> Muon, AdamW -> WeightAverage  it teaches the model [3-8]
    weights -> codes -> container -> file -> weights   what is read back is what is scored [9]
    validation stream -> windows -> nll[t], entropy[t]   every target once [10, 11]
    the same stream -> exact counts of the past -> mixture -> nll'[t]   still a distribution [12]
    sum(nll') / ln 2 / sum(bytes)   the score [13]

Where do I add ...
    a setting             a field of Hyperparameters [1], read where it acts
    a feature of a layer  its module [4]: a parameter in __init__, its effect in forward;
                          parameter_kind [6] says by its name who trains and codes it
    an optimizer          a class with AdamW's methods, a row of parameter_kinds [6]
    a quantiser           a class with RowQuantizer's method, handed over by write_artifact [9];
                          late QAT [8] rounds by quantize_rows
    a rule of mixing      a class with EntropyBackoff's methods, a row of RULES [12]

Shape suffixes: B batch, T position, D model width, W MLP width, H query heads, G key/value heads,
K head width, V vocabulary, N any flat number of positions, R x C a matrix, S a stack or the last
positions. Losses are nats per token until `bits_per_byte`. Arguments hp, ranks, log, stop, model,
trainer, validation and mixture are of the class of that name (hp: Hyperparameters); tokens, nll,
entropy and target_bytes are arrays along the stream. Collective: every rank must make the call.
"""

from __future__ import annotations

import concurrent.futures
import difflib
import hashlib
import json
import lzma
import math
import os
import platform
import re
import signal
import sys
import time
import traceback
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, lru_cache, partial
from itertools import chain, islice, pairwise, product
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn
from torch import distributed as dist

try:
    import triton
    import triton.language as tl
except ImportError:  # then every fused operation runs in its plain form
    triton = None

SIZE_CAP = 16_000_000  # bytes, decimal: code + compressed weights (the challenge's rule)


class UserError(Exception):
    """What a user can mend. One line: what was found, what was expected, what to do."""


class Stopped(UserError):
    """A signal ended the run."""


def require(holds: bool, message: str, error: type[Exception] = UserError):
    """Raise `error(message)` unless `holds`."""
    if not holds:
        raise error(message)


# --- 1. Settings --------------------------------
# Every switch is one field here, and the environment variable of that name in capitals. What cannot
# work is refused, in one line, before any data is touched.


def setting(default, doc: str, low: float | None = None, high: float = math.inf, choices: str = ""):
    """A field of Hyperparameters: its default, one line of doc, and its bounds or its choices."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices.split()}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Hyperparameters:
    # Files and the run
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "fineweb_{train,val}_*.bin")
    train_data_path: str = setting("", "another folder for the training shards; empty: DATA_PATH")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece")
    run_id: str = setting("", "name of logs/<RUN_ID>.txt; empty: date, time and seed")
    seed: int = setting(1337, "seed of the initial weights and of the order of batches", 0)
    eval_only: str = setting("", "score this final_model.int6.ptz and train nothing")
    resume: str = setting("", "go on from this logs/<RUN_ID>.ckpt")
    checkpoint_every: float = setting(0.0, "seconds; 0: at validations and SIGTERM only", 0)
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices="auto 0 1")

    # Training
    iterations: int = setting(20_000, "most training steps", 1)
    max_wallclock_seconds: float = setting(600.0, "most training time; 0: no limit", 0)
    warmdown_iters: int = setting(3500, "final linear decay, in steps' worth of time", 0)
    warmdown_frac: float = setting(0.0, "if not 0, instead: the decay's share of training", 0, 1)
    min_lr: float = setting(0.0, "factor of all learning rates where the decay ends", 0, 1)
    warmup_steps: int = setting(20, "untimed, to compile 2 or 4 graphs; then undone", 0)
    train_batch_tokens: int = setting(786_432, "tokens per step, over all ranks", 1)
    micro_batch_tokens: int = setting(98_304, "most tokens of one pass on one rank", 1)
    train_seq_len: int = setting(2048, "tokens per training sequence", 1)
    train_log_every: int = setting(500, "steps between train_loss lines; 0: only the first ten", 0)
    fused_mlp: bool = setting(True, "Triton kernels for the MLP, on CUDA")

    # Model
    vocab_size: int = setting(1024, "V; must equal the tokenizer's", 2, 65_536)
    num_layers: int = setting(11, "L, blocks", 1)
    model_dim: int = setting(512, "D, width of the residual stream", 1)
    num_heads: int = setting(8, "H, query heads", 1)
    num_kv_heads: int = setting(4, "G, key/value heads (GQA)", 1)
    mlp_mult: float = setting(3.0, "MLP width as a multiple of D", 0)
    leaky_slope: float = setting(0.5, "slope below zero of leaky_relu(x)^2", -1, 1)
    tie_embeddings: bool = setting(True, "output head = token embedding")
    logit_softcap: float = setting(30.0, "c in c*tanh(logits/c); 0: none", 0)
    rope_base: float = setting(10_000.0, "RoPE base", 1)
    rope_dims: int = setting(16, "rotated dimensions of each head; 0: no positions", 0)
    qk_gain_init: float = setting(1.5, "initial per-head gain of the queries", -100, 100)
    xsa_last_n: int = setting(4, "last layers without their own value (XSA); >= L: all", 0)
    ln_scale: bool = setting(True, "scale a block's normed inputs by 1/sqrt(layer + 1)")
    unet_skips: bool = setting(True, "U-Net skips from the first half of the blocks to the second")
    skip_gates: bool = setting(False, "blend skips in by a gate per channel instead of adding them")
    recur_layers: tuple[int, ...] = setting((), "layers (from 0) that run twice; empty: none")
    recur_start: float = setting(0.5, "share of training from which on they do", 0, 0.95)
    parallel_start_layer: int = setting(0, "first layer of two residual lanes; 0: none", 0)
    attn_gate_dims: int = setting(0, "input channels of the gate on each head's output; 0: none", 0)
    smear_enabled: bool = setting(True, "SmearGate: mix each position's input with the one before")
    smear_crosses_bos: bool = setting(
        True, "SmearGate mixes a document's start with the last's end"
    )
    ve_enabled: bool = setting(True, "shared value embedding, added to the values of VE_LAYERS")
    ve_dim: int = setting(128, "width of the value embedding", 1)
    ve_layers: tuple[int, ...] = setting((9, 10), "layers (from 0) that receive it")
    vrl_enabled: bool = setting(True, "value residual (VRL): mix values with layer 0's")
    bigram_vocab_size: int = setting(2048, "rows of the hashed bigram embedding; 0: none", 0)
    bigram_dim: int = setting(128, "width of the hashed bigram embedding", 1)

    # Optimizers
    tied_embed_lr: float = setting(0.035, "AdamW lr of all embeddings when TIE_EMBEDDINGS=1", 0)
    embed_lr: float = setting(0.6, "AdamW lr of all embeddings when TIE_EMBEDDINGS=0", 0)
    head_lr: float = setting(0.008, "AdamW lr of the output head when TIE_EMBEDDINGS=0", 0)
    matrix_lr: float = setting(0.025, "Muon lr", 0)
    scalar_lr: float = setting(0.025, "AdamW lr of vectors and scalars", 0)
    muon_momentum: float = setting(0.99, "Muon momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = setting(0.92, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = setting(1500, "steps of linear momentum warm-up", 0)
    muon_backend_steps: int = setting(5, "Newton-Schulz steps", 1)
    muon_wd: float = setting(0.04, "Muon decoupled weight decay", 0)
    muon_row_norm: bool = setting(False, "rows of equal norm before Newton-Schulz (MuonEq-R)")
    adam_wd: float = setting(0.04, "AdamW decoupled weight decay", 0)
    embed_wd: float = setting(0.04, "the same, of embeddings", 0)
    beta1: float = setting(0.9, "AdamW beta1", 0, 1)
    beta2: float = setting(0.95, "AdamW beta2", 0, 1)
    adam_eps: float = setting(1e-8, "AdamW epsilon", 0)
    grad_clip_norm: float = setting(0.3, "largest gradient norm; 0: no clipping", 0)

    # Averages and the artifact
    averaging: str = setting("ema", "weights that are packed", choices="none ema swa ema_swa")
    ema_decay: float = setting(0.997, "decay per step of the exponential average", 0, 1)
    swa_every: int = setting(50, "steps between snapshots of the uniform average", 1)
    swa_threshold: float = setting(0.2, "snapshots start once the lr scale is below this", 0, 1)
    late_qat_threshold: float = setting(0.15, "lr scale where fake quantisation starts", 0)
    qat_rounding: str = setting("straight", "soft: as in 2006.09952", choices="straight soft")
    quant_bits: int = setting(6, "bits of a matrix's codes before fitting, and in QAT", 3, 8)
    fill_budget: bool = setting(True, "spend bytes that are left on codes of up to 8 bits")
    quantizer: str = setting("gptq", "rows: each by itself, blind to inputs", choices="gptq rows")
    gptq_reserve_seconds: float = setting(4.0, "of training, for GPTQ; at most a tenth", 0.1)
    gptq_tokens: int = setting(131_072, "training tokens for GPTQ, in whole batches", 1)

    # Scoring
    eval_seq_len: int = setting(2048, "tokens per scoring window", 1)
    eval_stride: int = setting(64, "new targets per window of the final score", 1)
    eval_budget_seconds: float = setting(600.0, "the stride widens to keep 95 % of it; 0: none", 0)
    val_loss_every: int = setting(4000, "steps between validations; 0: only the last", 0)
    val_batch_size: int = setting(524_288, "tokens per scoring batch, over all ranks", 1)
    save_scores: bool = setting(False, "all scores to logs/<RUN_ID>_scores.npz")

    # Test-time training
    ttt_epochs: int = setting(0, "passes over each chunk once it is scored; 0: off", 0)
    ttt_chunk_tokens: int = setting(32_768, "targets that are scored, then trained on", 1)
    ttt_lr: float = setting(5e-4, "AdamW lr: at first times 1 to 3, then by cosine to 0", 0)
    ttt_blocks: int = setting(2, "last blocks that learn, beside vectors and output head", 0)
    ttt_decay: float = setting(0.998, "decay per step of the average that scores", 0, 1)

    # Mixture with n-gram counts
    ngram_enabled: bool = setting(True, "mix the model with counts of the past")
    ngram_min_order: int = setting(2, "shortest gram (context + target)", 2, 16)
    ngram_order: int = setting(7, "longest gram", 2, 16)
    ngram_alpha: str = setting("online", "who weighs the counts", choices="online entropy order")
    ngram_min_count: int = setting(2, "of a context, before it may win; not online", 1)
    alpha_min: float = setting(0.05, "weight where the model is sure; not online", 0, 1)
    alpha_max: float = setting(0.60, "weight where the model is lost; not online", 0, 1)
    ngram_counts: str = setting("exact", "hashed: also as PR #889", choices="exact hashed")
    ngram_buckets: int = setting(4_194_304, "of a hashed table, a power of two", 2, 2**30)

    @property
    def head_dim(self):
        """K, the width of one head."""
        return self.model_dim // self.num_heads

    @property
    def gptq_seconds(self):
        """Of MAX_WALLCLOCK_SECONDS, what is kept from the steps."""
        most = self.gptq_reserve_seconds if self.quantizer == "gptq" else 0.0
        return min(most, self.max_wallclock_seconds / 10)

    @property
    def step_seconds(self):
        return self.max_wallclock_seconds - self.gptq_seconds

    @classmethod
    def from_env(cls, env: dict[str, str]):
        """Typed, checked settings; UserError names the variable, its value and what it may hold."""
        given = [f for f in fields(cls) if f.name.upper() in env]
        return cls(**{f.name: parse_setting(f, env[f.name.upper()]) for f in given})

    def as_env(self):
        """All settings as they would be written in the environment."""
        texts = {}
        for name, value in vars(self).items():
            texts[name.upper()] = ",".join(map(str, value)) if type(value) is tuple else str(value)
        return texts

    def __post_init__(self):
        """UserError: settings that cannot work together."""
        for names, rule in self.conflicts():
            texts = self.as_env()
            found = ", ".join(f"{name}={texts[name]}" for name in names.split())
            raise UserError(f"{found}: {rule}")

    def conflicts(self):
        """Yields (the names of settings, the rule that they break)."""
        if self.model_dim % self.num_heads:
            yield "MODEL_DIM NUM_HEADS", "the heads must divide the width"
        if self.num_heads % self.num_kv_heads:
            yield "NUM_HEADS NUM_KV_HEADS", "the latter must divide"
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            most = f"the head width MODEL_DIM/NUM_HEADS = {self.head_dim}"
            yield "ROPE_DIMS", f"expected an even number up to {most}"
        if self.mlp_mult * self.model_dim < 1:
            yield "MLP_MULT", "the MLP would have no units"
        if self.ve_enabled and not set(self.ve_layers) <= set(range(self.num_layers)):
            yield "VE_LAYERS", f"layers run from 0 to {self.num_layers - 1}; or set VE_ENABLED=0"
        rising = sorted(set(self.recur_layers) & set(range(self.num_layers)))
        if list(self.recur_layers) != rising:
            yield "RECUR_LAYERS", f"expected rising numbers from 0 to {self.num_layers - 1}"
        if self.parallel_start_layer >= self.num_layers:
            yield "PARALLEL_START_LAYER", f"expected at most {self.num_layers - 1}; 0: none"
        if self.attn_gate_dims > self.model_dim:
            yield "ATTN_GATE_DIMS MODEL_DIM", "there are no more channels than the latter"
        if self.bigram_vocab_size == 1:
            yield "BIGRAM_VOCAB_SIZE", "expected 0 (off) or at least 2"
        over = self.train_batch_tokens % self.train_seq_len
        if over:
            below = self.train_batch_tokens - over
            rule = f"expected a multiple; nearest are {below} and {below + self.train_seq_len}"
            yield "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN", rule
        if self.eval_stride > self.eval_seq_len:
            yield "EVAL_STRIDE EVAL_SEQ_LEN", "targets would go unscored"
        if self.eval_only and self.resume:
            yield "EVAL_ONLY RESUME", "the weights are those of one file"
        if self.ngram_min_order > self.ngram_order:
            yield "NGRAM_MIN_ORDER NGRAM_ORDER", "no order is left"
        if self.ngram_counts == "hashed" and (self.ngram_alpha == "online" or self.ngram_order > 7):
            rule = "hashed counts need alpha entropy or order, order <= 7"
            yield "NGRAM_COUNTS NGRAM_ALPHA NGRAM_ORDER", rule
        if self.ngram_buckets.bit_count() > 1:
            power = 1 << self.ngram_buckets.bit_length()
            yield "NGRAM_BUCKETS", f"expected a power of two, such as {power}"
        if not self.alpha_min <= self.alpha_max < 1:
            yield "ALPHA_MIN ALPHA_MAX", "expected the first <= second < 1"


def parse_bool(text: str):
    return {"0": False, "false": False, "1": True, "true": True}[text.strip().lower()]


def parse_integers(text: str):
    return tuple(int(part) for part in text.split(",") if part.strip())


PARSERS = {  # by the type of a setting's default: how to read it, and what to expect
    str: (str, "text"),
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (parse_bool, "0 or 1"),
    tuple: (parse_integers, "comma-separated integers"),
}


def parse_setting(f, text: str):
    """What `text` gives field `f`. UserError: not of its type, choices or bounds."""
    parse, expected = PARSERS[type(f.default)]
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif low is not None:
        expected += f", at least {low}" if high == math.inf else f" from {low} to {high}"

    with suppress(ValueError, KeyError):
        value = parse(text)
        is_inside = low is None or (low <= value <= high and value < math.inf)
        if value in choices if choices else is_inside:
            return value
    raise UserError(f"{f.name.upper()}={text!r}: expected {expected} (default {f.default!r})")


def mistyped(env: dict[str, str]):
    """A warning for each name in `env` that is no setting but nearly one."""
    known = {f.name.upper() for f in fields(Hyperparameters)}
    near = {n: difflib.get_close_matches(n, known, cutoff=0.82) for n in sorted(set(env) - known)}
    text = "{} is set but is no setting; did you mean {}?"
    return [text.format(name, " or ".join(meant)) for name, meant in near.items() if meant]


# --- 2. Runtime ---------------------------------
# Four duties beside learning: the other ranks, the log, signals, progress. On one rank collectives
# are the identity, so that a laptop and a cluster run the same lines.


@dataclass
class Transfer:
    """A collective under way. The result may be read only once `wait` has returned it."""

    result: Tensor
    work: dist.Work | None = None  # None: one rank, there is nothing to wait for

    def wait(self):
        """The result, once it is there."""
        if self.work is not None:
            self.work.wait()
        return self.result


class Ranks:
    """This process among torchrun's, its device, all that ranks tell each other. Every method
    is collective. CPU tensors travel by gloo: agreeing on the clock never waits for a GPU."""

    def __init__(self, env: dict[str, str]):
        self.rank = int(env.get("RANK", 0))
        self.world_size = int(env.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local_rank = int(env.get("LOCAL_RANK", 0))
            gpus = torch.cuda.device_count()
            too_many = f"LOCAL_RANK={local_rank}, {gpus} GPUs: set --nproc_per_node={gpus}"
            require(local_rank < gpus, too_many)
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            cuda = self.device.type == "cuda"
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    def sum_over_ranks(self, x: Tensor):
        """`x` itself, which becomes the sum of all ranks' `x`, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def sum_numbers(self, *numbers: float):
        """Each number summed over the ranks, by way of the CPU."""
        return self.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def broadcast(self, x: Tensor):
        """`x` becomes rank 0's, in place."""
        if self.world_size > 1:
            dist.broadcast(x, 0)

    def reduce_scatter(self, x: Tensor):
        """Begin to sum `x` over the ranks; each rank receives an equal share of its rows."""
        if self.world_size == 1:
            return Transfer(x)
        share = x.new_empty(len(x) // self.world_size, *x.shape[1:])
        collective = getattr(dist, "reduce_scatter_single", None)  # since torch 2.13
        collective = collective or dist.reduce_scatter_tensor
        return Transfer(share, collective(share, x, async_op=True))

    def all_gather(self, share: Tensor):
        """Begin to collect the rows of all ranks' `share`s."""
        if self.world_size == 1:
            return Transfer(share)
        whole = share.new_empty(len(share) * self.world_size, *share.shape[1:])
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return Transfer(whole, collective(whole, share, async_op=True))

    def require_equal(self, facts: dict[str, object]):
        """UserError: `facts`, by name, are not rank 0's (compared by their repr)."""
        for name, fact in facts.items():
            checksums = [0.0] * self.world_size
            checksums[self.rank] = zlib.crc32(repr(fact).encode())
            checksums = self.sum_numbers(*checksums)
            odd = [str(rank) for rank, sum_ in enumerate(checksums) if sum_ != checksums[0]]
            require(
                not odd,
                f"rank {', '.join(odd)}: {name} differ from rank 0's: start the same files with "
                "the same settings everywhere",
            )

    def barrier(self):
        """Wait for all ranks and their GPUs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.sum_numbers(0)

    def close(self):
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class RunLog:
    """logs/<run_id>.txt (a name that is taken gets a number) and the console; silent on ranks but
    0. A line is on the disk when the call returns; what a full disk refuses is tried again."""

    def __init__(self, run_id: str = "", rank: int = 0):
        self.path: Path | None = None  # None: this log says nothing
        self.unwritten = b""
        if not run_id or rank:
            return
        os.makedirs("logs", exist_ok=True)
        number = 1
        while self.path is None:
            path = Path("logs", f"{run_id}_{number}.txt" if number > 1 else f"{run_id}.txt")
            number += 1
            with suppress(FileExistsError):
                self.file = path.open("xb", buffering=0)
                self.path = path

    def __call__(self, line: str, console: bool = True):
        """Write `line` to the file and, unless console=False, print it."""
        if self.path is None:
            return
        self.unwritten += f"{line}\n".encode()
        with suppress(OSError):  # of the console: a file on that disk, or a closed pipe
            try:
                while self.unwritten:
                    written = self.file.write(self.unwritten)
                    self.unwritten = self.unwritten[written:]
            except OSError as error:
                print(f"warning: {self.path}: {error.strerror}; the run goes on", file=sys.stderr)
            if console:
                print(line, flush=True)

    def close(self):
        """UserError: lines that no later one could bring to the disk."""
        require(
            not self.unwritten,
            f"{self.path}: no disk space for its last {len(self.unwritten)} bytes; free some and "
            "keep what was printed",
        )


class StopSignal:
    """SIGTERM and SIGINT: the first raises Stopped but, while `patient`, is only noted, so that
    training can end its step and leave a checkpoint."""

    def __init__(self):
        self.name = ""  # of the signal that came
        self.patient = False

    def install(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame):
        is_first = not self.name
        self.name = signal.Signals(number).name
        if is_first and not self.patient:
            raise Stopped(f"stopped by {self.name}")


class Progress:
    """Called with how much of `total` is done: a live bar, or in a log a line every 10 s."""

    def __init__(self, log, label: str, total: int):
        self.log = log
        self.label = label
        self.total = max(total, 1)
        self.started = self.last_line = perf_counter()

    def __call__(self, done: int):
        if self.log.path is None:
            return
        now = perf_counter()
        share = done / self.total
        elapsed = now - self.started
        left = elapsed / share - elapsed if share else math.nan
        line = f"{self.label} {share:.0%} elapsed:{elapsed:.0f}s left:{left:.0f}s"

        is_live = sys.stdout.isatty()
        if is_live:
            bar = "#" * round(24 * share)
            print(f"\r[{bar:24}] {line}\033[K", end="" if share < 1 else "\n", flush=True)
        if now - self.last_line >= 10:
            self.log(line, console=not is_live)
            self.last_line = now


def replace_file(path: Path, write: Callable):
    """`write(file)` aside, then rename: the old file stays till the new is whole. UserError."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; free space, then RESUME") from None
    finally:
        aside.unlink(missing_ok=True)


# --- 3. Data ------------------------------------
# A shard is 256 little-endian int32 (20240520, 1, count, 0 ...), then `count` uint16 tokens. The
# loader has no state: batch k is the same tokens at any number of ranks, and after a RESUME.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # int32
BOS = 1  # the token that opens a document
GET_DATA = (
    "`make demo` needs no data; for FineWeb get the challenge repository and run its "
    "data/cached_challenge_fineweb.py, then set DATA_PATH and TOKENIZER_PATH"
)


def load_shard(path: Path):
    """The uint16 tokens of a shard, memory-mapped; UserError: none, of another version, or cut."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", SHARD_HEADER).tolist()
    magic, version, count, *_ = [*header, 0, 0, 0]
    is_shard = (magic, version) == (SHARD_MAGIC, SHARD_VERSION) and count >= 1
    require(
        is_shard and size == 4 * SHARD_HEADER + 2 * count,
        f"{path}: magic {magic}, version {version}, {count} tokens in {size} bytes; expected "
        f"magic {SHARD_MAGIC}, version {SHARD_VERSION}, n in 1024 + 2 n bytes; {GET_DATA}",
    )
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (count,))


def find_shards(part: str, hp):
    """All shards of `part` ("train" or "val"), in order; UserError: none in its folder."""
    name = "train_data_path" if part == "train" and hp.train_data_path else "data_path"
    folder = getattr(hp, name)
    paths = sorted(Path(folder).glob(f"fineweb_{part}_*.bin"))
    require(bool(paths), f"{name.upper()}={folder}: no fineweb_{part}_*.bin there; {GET_DATA}")
    return paths


def check_tokens(tokens, vocab_size: int, source: str | Path):
    """`tokens` themselves; UserError: one is outside of the vocabulary."""
    largest = tokens.max(initial=0)
    require(
        largest < vocab_size,
        f"{source}: holds token {largest}, but VOCAB_SIZE={vocab_size}: data and VOCAB_SIZE must "
        "come from the same tokenizer",
    )
    return tokens


def window_starts(tokens: int, length: int, seed: int, epoch: int):
    """Where each training window of an epoch starts in a circular stream of `tokens` tokens, int64,
    in the order in which they are read. The stream is cut into windows of `length` from a random
    place on, and the windows are put in a random order: both differ from epoch to epoch. Reading
    neighbouring windows in consecutive steps instead costs 0.04 to 0.19 bpb in small runs."""
    rng = np.random.default_rng((seed, epoch))
    phase = rng.integers(tokens)
    window = rng.permutation(max(1, tokens // length))
    return (phase + window * length) % tokens


class TokenLoader:
    """All training shards as one circular stream, cut into windows of TRAIN_SEQ_LEN tokens that are
    read in a random order, each once per epoch. Batch k is the k-th group of windows in that order:
    a function of k and SEED. Rank r trains on the r-th share of a batch's sequences, in
    `accumulation` micro-batches of `rows` sequences each."""

    def __init__(self, hp, rank: int, world_size: int):
        self.hp = hp
        self.rank = rank
        self.paths = find_shards("train", hp)
        self.shards = [load_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens = int(self.ends[-1])
        self.windows = max(1, self.tokens // hp.train_seq_len)  # in an epoch
        draw = partial(window_starts, self.tokens, hp.train_seq_len, hp.seed)
        self.epoch_starts = lru_cache(2)(draw)  # two: a batch may reach into the next epoch
        self.sequences = hp.train_batch_tokens // hp.train_seq_len

        fits = [n for n in range(1, self.sequences + 1) if self.sequences % n == 0]
        near = sorted(fits, key=lambda n: max(n / world_size, world_size / n))[:2]
        require(
            world_size in fits,
            f"{world_size} ranks cannot share TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN = {self.sequences} "
            f"sequences equally: start {' or '.join(map(str, near))} ranks",
        )
        self.share = self.sequences // world_size
        most = max(1, hp.micro_batch_tokens // hp.train_seq_len)
        self.rows = max(n for n in range(1, min(most, self.share) + 1) if self.share % n == 0)
        self.accumulation = self.share // self.rows

    def start(self, sequence: int):
        """Where the `sequence`-th training sequence of the run starts in the stream."""
        epoch, place = divmod(sequence, self.windows)
        return int(self.epoch_starts(epoch)[place])

    def span(self, start: int, count: int):
        """`count` tokens of the circular stream from `start` on, as int64."""
        pieces = []
        while count:
            place = start % self.tokens
            i = int(np.searchsorted(self.ends, place, "right"))
            from_end = place - int(self.ends[i])  # negative: counted back from the shard's end
            piece = self.shards[i][from_end:][:count]
            check_tokens(piece, self.hp.vocab_size, self.paths[i])
            pieces.append(piece.astype(np.int64))
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def micro_batch(self, step: int, micro: int):
        """This rank's inputs and targets of a micro-batch of `step`: (B, T) int64, on the CPU."""
        T = self.hp.train_seq_len
        first = step * self.sequences + self.rank * self.share + micro * self.rows
        ids = np.stack([self.span(self.start(i), T + 1) for i in range(first, first + self.rows)])
        ids = torch.from_numpy(ids)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class ByteCounter:
    """The challenge's bytes of a target: a piece counts its UTF-8 length without the word mark
    U+2581, a byte piece 1, a control piece 0; the mark counts 1, as a space, after text."""

    def __init__(self, hp):
        from sentencepiece import SentencePieceProcessor

        found = f"TOKENIZER_PATH={hp.tokenizer_path}"
        sp = SentencePieceProcessor()
        try:
            sp.Load(hp.tokenizer_path)
        except (RuntimeError, OSError, ValueError):
            message = f"{found}: no such file or not a SentencePiece model; {GET_DATA}"
            raise UserError(message) from None
        size = sp.vocab_size()
        require(
            size == hp.vocab_size,
            f"{found}: has {size} pieces, but VOCAB_SIZE={hp.vocab_size}: set VOCAB_SIZE={size} or "
            "name the data's own tokenizer",
        )
        self.is_text = np.ones(size, bool)
        self.opens_word = np.zeros(size, bool)
        self.length = np.zeros(size, np.uint16)
        for i in range(size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.is_text[i] = False
            elif sp.is_byte(i):
                self.length[i] = 1
            else:
                piece = sp.id_to_piece(i)
                self.opens_word[i] = piece.startswith("\u2581")
                self.length[i] = len(piece.replace("\u2581", "").encode())

    def __call__(self, tokens):
        """Bytes (uint16) of each target of the stream `tokens`: one fewer than there are tokens."""
        targets, before = tokens[1:], tokens[:-1]
        return self.length[targets] + (self.opens_word[targets] & self.is_text[before])


@dataclass
class Validation:
    """The stream x_0 ... x_N that is scored; target j is token j + 1."""

    tokens: ndarray  # uint16
    count_bytes: Callable[[ndarray], ndarray]  # a ByteCounter

    @property
    def targets(self):
        return len(self.tokens) - 1

    @cached_property
    def target_bytes(self):
        """UTF-8 bytes of each target, counted when first asked for: few ranks ask."""
        return self.count_bytes(self.tokens)


def load_validation(hp):
    """The whole validation stream. UserError: none, shorter than a window, or of other tokens."""
    paths = find_shards("val", hp)
    shards = [check_tokens(load_shard(path), hp.vocab_size, path) for path in paths]
    tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)
    require(
        len(tokens) > hp.eval_seq_len,
        f"DATA_PATH={hp.data_path}: the validation stream has {len(tokens)} tokens, a window needs "
        f"{hp.eval_seq_len + 1}: set EVAL_SEQ_LEN to at most {len(tokens) - 1}",
    )
    return Validation(tokens, ByteCounter(hp))


def fingerprint(hp):
    """(name, bytes, CRC-32 of the first and last 64 KB) of every data file."""
    paths = [Path(hp.tokenizer_path), *find_shards("val", hp)]
    if not hp.eval_only:
        paths += find_shards("train", hp)
    facts = []
    for path in paths:
        data = np.memmap(path, np.uint8, "r")
        crc = zlib.crc32(data[-(1 << 16) :], zlib.crc32(data[: 1 << 16]))
        facts.append((path.name, len(data), crc))
    return facts


def bits_per_byte(nll, target_bytes):
    """The targets' code length in bits, from `nll` in nats, over their bytes; sums in float64."""
    bits = nll.sum(dtype=np.float64) / math.log(2)
    return float(bits / target_bytes.sum(dtype=np.int64))


# --- 4. Model -----------------------------------
# Plain torch. Master weights are float32; every operation follows the dtype of the residual stream,
# bfloat16 on CUDA, without autocast. GQA 2305.13245, RoPE 2104.09864, QK-norm 2302.05442, value
# residual (VRL) 2410.17897, XSA and SmearGate PR #889, U-Net skips and x0 mixes modded-nanogpt.


def working_dtype(x: Tensor):
    """The dtype of activations on the device of `x`."""
    return torch.bfloat16 if x.is_cuda else torch.float32


def norm(x: Tensor):
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Float32 weights, computed in the dtype of the input. A factor of the outputs multiplies the
    weights: so neither it nor its gradient takes a pass over all tokens."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def matrix(self, dtype: torch.dtype, factor: Tensor | None = None):
        """The weights (outputs, inputs), times a factor that broadcasts to them, as `dtype`."""
        weight = self.weight if factor is None else self.weight * factor
        return weight.to(dtype)

    def forward(self, x: Tensor, factor: Tensor | None = None):
        return F.linear(x, self.matrix(x.dtype, factor))


def rotary_tables(T: int, hp, device=None):
    """cos and sin, (2, T, 1, ROPE_DIMS/2); beyond 1024 positions the base grows (NTK-aware), in
    windows shorter than training's as there."""
    r = hp.rope_dims
    base = hp.rope_base
    span = max(T, hp.train_seq_len)
    if span > 1024 and r > 2:
        base *= (span / 1024) ** (r / (r - 2))
    frequency = base ** -(torch.arange(0, r, 2, dtype=torch.float32, device=device) / max(r, 1))
    position = torch.arange(T, dtype=torch.float32, device=device)
    angle = torch.outer(position, frequency)[:, None, :]
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BTHK, rope: Tensor):
    """RoPE on the first ROPE_DIMS of K, in half-split pairs; the others carry no position."""
    cos, sin = rope
    half = cos.size(-1)
    a, b, rest = x_BTHK.tensor_split((half, 2 * half), -1)
    rotated = torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(x_BTHK.dtype)
    return torch.cat((rotated, rest), -1)


def remove_own_value(y_BTHK, v_BTGK):
    """XSA: what a head reads must come from elsewhere: drop its component along its own value."""
    B, T, H, K = y_BTHK.shape
    y = y_BTHK.view(B, T, v_BTGK.size(2), -1, K)
    v = F.normalize(v_BTGK, dim=-1).unsqueeze(3)
    along = (y * v).sum(-1, keepdim=True)
    return (y - along * v).view(B, T, H, K)


@cache
def find_flash_attention():
    """(name, function) of FlashAttention 3 if it is installed and this is a Hopper GPU, for which
    it is made; ("sdpa", None): torch's own, which outruns version 2 there."""
    with suppress(ImportError):
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
            from flash_attn_interface import flash_attn_func

            return "flash_attention_3", flash_attn_func
    return "sdpa", None


def causal_attention(q_BSHK, k_BTGK, v_BTGK, flash=None):
    """softmax(q k' / sqrt K) v up to one's own position, (B, S, H, K), for queries of the last S of
    T positions; H/G heads share keys and values."""
    if flash is not None and q_BSHK.is_cuda:
        y = flash(q_BSHK, k_BTGK, v_BTGK, causal=True)
        return y[0] if isinstance(y, tuple) else y

    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    S, T = q.size(2), k.size(2)
    if S == T:
        shares_keys = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_keys)
    else:
        # the fast kernels that take masks know no GQA
        group = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        seen_ST = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
        y = F.scaled_dot_product_attention(q, k, v, seen_ST)
    return y.transpose(1, 2)


@dataclass
class Shared:
    """What one forward pass hands to all of its blocks."""

    x0_BTD: Tensor  # the input of the first block
    rope: Tensor  # cos and sin
    ve_BTGK: Tensor | None = None  # value embeddings of the tokens, for VE_LAYERS
    v_first_BTGK: Tensor | None = None  # layer 0's values before any change: set by layer 0


class Attention(nn.Module):
    def __init__(self, hp, layer: int):
        super().__init__()
        D, H, G, K = hp.model_dim, hp.num_heads, hp.num_kv_heads, hp.head_dim
        self.head_dim = K
        self.q = Linear(D, H * K)
        self.k = Linear(D, G * K)
        self.v = Linear(D, G * K)
        self.proj = Linear(H * K, D)
        self.q_gain = nn.Parameter(torch.full((H,), hp.qk_gain_init))

        takes_ve = hp.ve_enabled and layer in hp.ve_layers
        self.ve_scale = nn.Parameter(torch.ones(())) if takes_ve else None
        mixes_values = hp.vrl_enabled and layer > 0
        self.vrl_gate = nn.Parameter(torch.tensor(-1.5)) if mixes_values else None
        self.xsa = layer >= hp.num_layers - hp.xsa_last_n
        gate = torch.zeros(H, hp.attn_gate_dims)
        self.gate = nn.Parameter(gate) if hp.attn_gate_dims else None
        _, self.flash = find_flash_attention()

    def forward(self, x_BTD, scale_D, shared: Shared, last: int):
        """The layer's contribution, (B, `last` positions, D), its channels times `scale`."""
        x_BSD = x_BTD[:, -last:]
        q = norm(self.q(x_BSD).unflatten(-1, (-1, self.head_dim)))
        q = q * self.q_gain.to(q.dtype)[:, None]  # before the rotation, which takes it along
        q = rotate(q, shared.rope[:, -last:])
        k = rotate(norm(self.k(x_BTD).unflatten(-1, (-1, self.head_dim))), shared.rope)
        v = self.values(x_BTD, shared)

        y = causal_attention(q, k, v, self.flash)
        if self.xsa:
            y = remove_own_value(y, v[:, -last:])
        if self.gate is not None:
            few = x_BSD[..., : self.gate.size(1)]
            y = y * torch.sigmoid(F.linear(few, self.gate.to(y.dtype)))[..., None]
        return self.proj(y.flatten(2), scale_D[:, None])

    def values(self, x_BTD, shared: Shared):
        """(B, T, G, K): from x, plus the value embedding, mixed with layer 0's (VRL)."""
        v = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        if shared.v_first_BTGK is None:
            shared.v_first_BTGK = v
        if self.ve_scale is not None:
            v = v + self.ve_scale.to(v.dtype) * shared.ve_BTGK
        if self.vrl_gate is not None:
            v = torch.lerp(v, shared.v_first_BTGK, torch.sigmoid(self.vrl_gate).to(v.dtype))
        return v


class MLP(nn.Module):
    def __init__(self, hp):
        super().__init__()
        D, W = hp.model_dim, int(hp.mlp_mult * hp.model_dim)
        self.slope = hp.leaky_slope
        self.fused = hp.fused_mlp
        self.fc = Linear(D, W)
        self.proj = Linear(W, D)

    def forward(self, x_BTD, scale_D):
        """The layer's contribution, (B, T, D), its channels times `scale`."""
        if self.fused and has_kernels(x_BTD):
            fc_WD = self.fc.matrix(x_BTD.dtype)
            proj_DW = self.proj.matrix(x_BTD.dtype, scale_D[:, None])
            return fused_mlp(x_BTD.flatten(0, 1), fc_WD, proj_DW, self.slope)[0].view_as(x_BTD)
        h_BTW = F.leaky_relu(self.fc(x_BTD), self.slope).square()
        return self.proj(h_BTW, scale_D[:, None])


class Block(nn.Module):
    """Attention, then the MLP: on one residual stream or, from PARALLEL_START_LAYER on, each on its
    own."""

    def __init__(self, hp, layer: int):
        super().__init__()
        D = hp.model_dim
        self.attn = Attention(hp, layer)
        self.mlp = MLP(hp)
        self.mix_x = nn.Parameter(torch.ones(D))
        self.mix_x0 = nn.Parameter(torch.zeros(D))
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        self.norm_scale = (layer + 1) ** -0.5 if hp.ln_scale else 1.0

    def attend(self, x_BTD, shared: Shared, last: int):
        """(B, `last` positions, D): all are keys and values, only these are queries."""
        dtype = x_BTD.dtype
        x = self.mix_x.to(dtype) * x_BTD + self.mix_x0.to(dtype) * shared.x0_BTD
        y = self.attn(norm(x) * self.norm_scale, self.attn_scale, shared, last)
        return x[:, -last:] + y

    def feed(self, x_BTD):
        return x_BTD + self.mlp(norm(x_BTD) * self.norm_scale, self.mlp_scale)


class NarrowEmbedding(nn.Module):
    """A table of `width` columns, projected to `outputs` and scaled."""

    def __init__(self, rows: int, width: int, outputs: int, scale: float):
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.proj = Linear(width, outputs)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, rows_BT, dtype: torch.dtype):
        return self.proj(self.table(rows_BT).to(dtype), self.scale)


def bigram_rows(ids_BT, rows: int):
    """The row, a hash, of each token with the one before it; the first has the last row."""
    pair = (36313 * ids_BT[:, 1:]) ^ (27191 * ids_BT[:, :-1])
    return F.pad(pair % (rows - 1), (1, 0), value=rows - 1)


def token_nll(z_NV, targets_N, cap: float):
    """nll of the targets in nats, (N,) float32, given logits z that are yet to be capped."""
    return F.nll_loss(log_probabilities(z_NV, cap), targets_N, reduction="none")


def log_probabilities(z_NV, cap: float):
    """Log-softmax in float32 of cap * tanh(z / cap), or of z if cap is 0."""
    z_NV = z_NV.float()
    return F.log_softmax(cap * torch.tanh(z_NV / cap) if cap else z_NV, -1)


INITIAL_VALUES = (  # the first row whose ending fits
    ("bigram.table.weight", nn.init.zeros_),
    ("value_embed.table.weight", partial(nn.init.normal_, std=0.01)),
    ("embed.weight", partial(nn.init.normal_, std=0.005)),
    ("head.weight", nn.init.zeros_),
    ("attn.proj.weight", nn.init.zeros_),
    ("mlp.proj.weight", nn.init.zeros_),
)


def block_orders(hp):
    """The layers in the order of passes, before RECUR_START and after it: depth recurrence runs
    RECUR_LAYERS again once the last of them has run (PR #1204). Equal, if there are none."""
    L = hp.num_layers
    plain = tuple(range(L))
    again = hp.recur_layers
    after = again[-1] + 1 if again else L
    return plain, plain[:after] + again + plain[after:]


class GPT(nn.Module):
    """`hidden` is the trunk of training and scoring; `forward` is the loss. `order` is the layers
    in the order of passes, at first as at the end of training; it is part of a compiled graph."""

    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        D, V, L = hp.model_dim, hp.vocab_size, hp.num_layers
        values = hp.num_kv_heads * hp.head_dim
        rows = hp.bigram_vocab_size
        has_ve = hp.ve_enabled and hp.ve_layers
        has_skips = hp.unet_skips and L > 1

        self.embed = nn.Embedding(V, D)
        self.bigram = NarrowEmbedding(rows, hp.bigram_dim, D, 0.05) if rows else None
        self.smear_gate = nn.Parameter(torch.zeros(D)) if hp.smear_enabled else None
        self.value_embed = NarrowEmbedding(V, hp.ve_dim, values, 0.1) if has_ve else None
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in range(L))
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D)) if has_skips else None
        has_gates = has_skips and hp.skip_gates
        self.skip_gates = nn.Parameter(torch.zeros(L // 2, D)) if has_gates else None
        self.lane_mix = nn.Parameter(torch.tensor(0.5)) if hp.parallel_start_layer else None
        self.head = None if hp.tie_embeddings else Linear(D, V)
        _, self.order = block_orders(hp)
        for T in {hp.train_seq_len, hp.eval_seq_len}:  # else compiled code makes them at each use
            self.register_buffer(f"rope_{T}", rotary_tables(T, hp), persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """By INITIAL_VALUES, else orthogonal where both sides are at least 64 (the projections of
        tables times 1/sqrt(2 L)), else as the module has drawn it."""
        table_gain = (2 * self.hp.num_layers) ** -0.5
        for name, p in self.named_parameters():
            fits = [init for ending, init in INITIAL_VALUES if name.endswith(ending)]
            if fits:
                fits[0](p)
            elif name.endswith(".weight") and min(p.shape) >= 64:
                nn.init.orthogonal_(p, 1 if name.startswith("blocks.") else table_gain)

    def forward(self, ids_BT, targets_BT, weights_BT=None):
        """The targets' mean loss in nats or, with weights, the weighted sum."""
        hidden_ND = self.hidden(ids_BT).flatten(0, 1)
        nll_N = self.nll(hidden_ND, targets_BT.ravel())
        if weights_BT is None:
            return nll_N.mean()
        return (nll_N * weights_BT.ravel()).sum()

    def hidden(self, ids_BT, last: int | None = None):
        """Hidden states (B, T, D), or (B, `last`, D): then the last pass computes these alone."""
        T = ids_BT.size(1)
        x = self.embedded(ids_BT)
        rope = getattr(self, f"rope_{T}", None)
        shared = Shared(x, rotary_tables(T, self.hp, x.device) if rope is None else rope)
        if self.value_embed is not None:
            ve = self.value_embed(ids_BT, x.dtype)
            shared.ve_BTGK = ve.unflatten(-1, (-1, self.hp.head_dim))

        lane = None  # of the MLPs, once they have one to themselves; then x is attention's
        skips = []
        passes = len(self.order)
        for i, layer in enumerate(self.order):
            block = self.blocks[layer]
            if i >= passes // 2:
                x = self.skipped(x, skips, i - passes // 2)
            if self.lane_mix is not None and layer == self.hp.parallel_start_layer:
                lane = x if lane is None else lane
            queries = last if last and i == passes - 1 else T
            x = block.attend(x, shared, queries)
            if lane is None:
                x = block.feed(x)
            else:
                lane = block.feed(lane[:, -queries:])
            if i < passes // 2:
                skips.append(x)
        return x if lane is None else torch.lerp(lane, x, self.lane_mix.to(x.dtype))

    def skipped(self, x_BTD, skips: list, i: int):
        """`x` with the last of `skips`, which it takes, if there is an i-th weight for it."""
        if self.skip_weights is None or i >= len(self.skip_weights):
            return x_BTD
        skip = self.skip_weights[i].to(x_BTD.dtype) * skips.pop()
        if self.skip_gates is None:
            return x_BTD + skip
        return torch.lerp(skip, x_BTD, torch.sigmoid(self.skip_gates[i]).to(x_BTD.dtype))

    def embedded(self, ids_BT):
        """What enters the first block: tokens, bigrams, a share of the position before."""
        x = self.embed(ids_BT)
        if self.bigram is not None:
            x = x + self.bigram(bigram_rows(ids_BT, self.hp.bigram_vocab_size), x.dtype)
        x = norm(x).to(working_dtype(x))
        if self.smear_gate is not None:
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            if not self.hp.smear_crosses_bos:
                before = before.masked_fill((ids_BT == BOS)[..., None], 0)
            x = torch.lerp(x, before, torch.sigmoid(self.smear_gate).to(x.dtype))
        return x

    def logits(self, hidden_D):
        """(..., D) -> (..., V), before the softcap."""
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(norm(hidden_D), weight_VD.to(hidden_D.dtype))

    def nll(self, hidden_ND, targets_N):
        """nll of the targets in nats, (N,) float32."""
        return token_nll(self.logits(hidden_ND), targets_N, self.hp.logit_softcap)

    def scores(self, hidden_ND, targets_N):
        """nll of the targets and entropy of the predictions in nats, (2, N) float32."""
        logp_NV = log_probabilities(self.logits(hidden_ND), self.hp.logit_softcap)
        nll_N = F.nll_loss(logp_NV, targets_N, reduction="none")
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        return torch.stack((nll_N, entropy_N))


# --- 5. Kernels ---------------------------------
# What is elementwise the compiler fuses, but not into the product before it: so the activation of
# the MLP and its gradient have a kernel. The plain form [4] runs on a CPU, without Triton, or by a
# switch. torch.library keeps an operation whole under torch.compile. After modded-nanogpt.

jit = triton.jit if triton else lambda kernel: kernel
MLP_TILE = dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)  # the fastest of 7 on an H200


def has_kernels(x: Tensor):
    """Can the kernels work on `x` here?"""
    return triton is not None and x.is_cuda


@jit
def mlp_kernel(
    a_ptr,
    b_ptr,
    z_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_k,
    stride_n,
    slope,
    BACKWARD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of P = a b, (M, K) (K, N), and what the MLP makes of it in registers. Forward: z = P,
    out = leaky_relu(z)^2. Backward: P is the gradient of that, out = that of z."""
    # neighbouring programs share rows of a, and all of b stays in the cache
    tile = tl.program_id(0)
    tiles = tl.cdiv(N, BN)
    m = (tile // tiles * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    n = (tile % tiles * BN + tl.arange(0, BN))[None, :]
    inside = (m < M) & (n < N)
    place = m * N + n

    product = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m * K + k[None, :], (m < M) & (k[None, :] < K), 0.0)
        b_place = k[:, None] * stride_k + n * stride_n
        b = tl.load(b_ptr + b_place, (k[:, None] < K) & (n < N), 0.0)
        product = tl.dot(a, b, product)

    if BACKWARD:
        z = tl.load(z_ptr + place, inside, 0.0).to(tl.float32)
        other = 2 * product
    else:
        z = product.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + place, z, inside)
        z = z.to(tl.float32)  # as rounded as backward will read it
        other = z
    tl.store(out_ptr + place, z * tl.where(z > 0, 1.0, slope * slope) * other, inside)


def launch_mlp(a_MK, b_KN, z_MN, slope: float, backward: bool):
    """Run `mlp_kernel`: returns `out`, and forward fills z, which backward reads."""
    M, N = z_MN.shape
    out_MN = torch.empty_like(z_MN)
    tile = dict(MLP_TILE)
    if z_MN.is_cuda and torch.cuda.get_device_capability()[0] not in (9, 10):
        tile["BN"] = 64  # less shared memory
    grid = (triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),)
    sizes = (M, N, len(b_KN), *b_KN.stride())
    mlp_kernel[grid](a_MK.contiguous(), b_KN, z_MN, out_MN, *sizes, slope, backward, **tile)
    return out_MN


@torch.library.custom_op("golf::fused_mlp", mutates_args=())
def fused_mlp(
    x_ND: Tensor, fc_WD: Tensor, proj_DW: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(h proj', z = x fc', h = leaky_relu(z, slope)^2): the last two are for backward."""
    z_NW = x_ND.new_empty(len(x_ND), len(fc_WD))
    h_NW = launch_mlp(x_ND, fc_WD.mT, z_NW, slope, backward=False)
    return h_NW @ proj_DW.mT, z_NW, h_NW


@torch.library.custom_op("golf::fused_mlp_backward", mutates_args=())
def fused_mlp_backward(g_ND: Tensor, proj_DW: Tensor, z_NW: Tensor, slope: float) -> Tensor:
    """The gradient of z, given that of the result."""
    return launch_mlp(g_ND, proj_DW, z_NW.contiguous(), slope, backward=True)


@fused_mlp.register_fake
def _(x_ND, fc_WD, proj_DW, slope):
    z_NW = x_ND.new_empty(len(x_ND), len(fc_WD))
    return x_ND.new_empty(x_ND.shape), z_NW, torch.empty_like(z_NW)


@fused_mlp_backward.register_fake
def _(g_ND, proj_DW, z_NW, slope):
    return z_NW.new_empty(z_NW.shape)


def save_for_mlp_gradients(ctx, inputs, output):
    x_ND, fc_WD, proj_DW, ctx.slope = inputs
    _, z_NW, h_NW = output
    ctx.save_for_backward(x_ND, fc_WD, proj_DW, z_NW, h_NW)


def mlp_gradients(ctx, g_ND, *_):
    x_ND, fc_WD, proj_DW, z_NW, h_NW = ctx.saved_tensors
    dz_NW = fused_mlp_backward(g_ND, proj_DW, z_NW, ctx.slope)
    return dz_NW @ fc_WD, dz_NW.mT @ x_ND, g_ND.mT @ h_NW, None


fused_mlp.register_autograd(mlp_gradients, setup_context=save_for_mlp_gradients)


# --- 6. Optimizers ------------------------------
# Muon (Jordan et al. 2024), whose update is the momentum made orthogonal, for matrices; AdamW for
# the rest. One table says what a parameter is: who updates it, how fast, and with how many bits the
# artifact codes it.


@dataclass(frozen=True)
class Kind:
    """What a kind of parameter gets."""

    optimizer: type
    lr: float
    weight_decay: float
    bits: int  # of its codes before fitting; 0: not coded, float16


def parameter_kind(name: str):
    """The kind of the parameter `name`: a key of `parameter_kinds`."""
    if name == "head.weight":
        return "head"
    if name.endswith(("table.weight", "embed.weight")):
        return "table"
    return "matrix" if name.endswith(".weight") else "vector"


def parameter_kinds(hp):
    """The table: what each kind of parameter gets."""
    table_lr = hp.tied_embed_lr if hp.tie_embeddings else hp.embed_lr
    return {
        "matrix": Kind(Muon, hp.matrix_lr, hp.muon_wd, hp.quant_bits),
        "table": Kind(AdamW, table_lr, hp.embed_wd, 8),
        "head": Kind(AdamW, hp.head_lr, hp.adam_wd, 8),
        "vector": Kind(AdamW, hp.scalar_lr, hp.adam_wd, 0),
    }


def orthogonalize(G_SRC, steps: int):
    """Nearly the orthogonal factor U V' of each wide matrix U S V', in bfloat16 on CUDA: a quintic
    Newton-Schulz iteration that is tuned for speed at zero; singular values end in [0.7, 1.2]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G_SRC.to(working_dtype(G_SRC))
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def equalize_rows(G_SRC, is_tall_S11):
    """The matrices, each row divided by its norm or, if they are transposed, column (MuonEq-R)."""
    rows, columns = (G_SRC.norm(dim=dim, keepdim=True) for dim in (-1, -2))
    return G_SRC / (torch.where(is_tall_S11, columns, rows) + 1e-7)


class SummedGradients:
    """How an elementwise optimizer of torch takes part in `update`: each rank gets the gradients'
    whole sum, as one flat vector, and does the whole step. An optimizer that shares its work out,
    as Muon does, has these methods of its own. All but `schedule` are collective."""

    def schedule(self, step: int, scale: float):
        """Set what changes from step to step."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * scale

    def send_gradients(self):
        """Sum, or begin to sum, the gradients over the ranks."""
        self.grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.flat = self.ranks.sum_over_ranks(nn.utils.parameters_to_vector(self.grads))

    def receive_gradients(self):
        """This rank's part of the sums, once it is there, to be scaled in place."""
        return [self.flat]

    def gradient_square(self):
        """The squared norm of the sums, the same on every rank."""
        return self.flat.square().sum()

    def begin_step(self):
        """Do, or begin, the step."""
        nn.utils.vector_to_parameters(self.flat, self.grads)  # gradients become views of it
        self.step()

    def finish_step(self):
        """Do what `begin_step` could not wait for."""

    def complete_state(self):
        """Make the state whole on this rank."""


class AdamW(SummedGradients, torch.optim.AdamW):
    def __init__(self, groups: list[dict], hp, ranks):
        self.ranks = ranks
        super().__init__(groups, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=True)
        for p in chain(*(group["params"] for group in groups)):
            # as torch would at the first step: a checkpoint needs it before
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = {"step": p.new_zeros(()), **moments}

    def state_tensors(self):
        """What a step changes beside the parameters."""
        states = list(self.state.values())
        names = ("step", "exp_avg", "exp_avg_sq")
        return {f"adamw.{k}.{i}": s[k] for k in names for i, s in enumerate(states)}


class Muon(torch.optim.Optimizer):
    """Matrices of one shape, tall ones transposed, are a stack. A rank owns an equal share of each
    stack (zeros fill it up): it receives these gradients' sums, keeps their momentum, makes them
    orthogonal in one batch, and sends the updates to all."""

    def __init__(self, groups: list[dict], hp, ranks):
        self.ranks = ranks
        self.hp = hp
        stacks = []
        for group in groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, same in sorted(by_shape.items()):
                buffer = same[0].new_zeros(len(same), *shape)
                is_tall = [p.size(0) > p.size(1) for p in same]
                is_tall = torch.tensor(is_tall, device=buffer.device)[:, None, None]
                stacks.append({**group, "params": same, "buffer": buffer, "is_tall": is_tall})
        super().__init__(stacks, {"momentum": hp.muon_momentum_warmup_start})

    def local_share(self, stack: Tensor):
        """This rank's part of a stack, a view; it may be short, or empty."""
        share = -(-len(stack) // self.ranks.world_size)
        return stack[self.ranks.rank * share :][:share]

    def schedule(self, step: int, scale: float):
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * scale
            group["momentum"] = muon_momentum(step, self.hp)

    def send_gradients(self):
        self.arriving = []
        for group in self.param_groups:
            wide = [p.grad.mT if p.size(0) > p.size(1) else p.grad for p in group["params"]]
            missing = -len(wide) % self.ranks.world_size
            wide += [torch.zeros_like(wide[0])] * missing
            self.arriving.append(self.ranks.reduce_scatter(torch.stack(wide)))

    def receive_gradients(self):
        self.shares = [transfer.wait() for transfer in self.arriving]
        return self.shares

    def gradient_square(self):
        return self.ranks.sum_over_ranks(sum(share.square().sum() for share in self.shares))

    def begin_step(self):
        """Make this rank's updates and begin to send them."""
        self.arriving = []
        for group, grads_SRC in zip(self.param_groups, self.shares):
            momentum_SRC = self.local_share(group["buffer"])
            own_SRC = grads_SRC[: len(momentum_SRC)]  # a view, without the zeros that fill up
            momentum_SRC.mul_(group["momentum"]).add_(own_SRC)
            own_SRC.add_(momentum_SRC, alpha=group["momentum"])  # Nesterov
            if self.hp.muon_row_norm:
                own_SRC.copy_(equalize_rows(own_SRC, self.local_share(group["is_tall"])))
            update_SRC = orthogonalize(grads_SRC, self.hp.muon_backend_steps)
            self.arriving.append(self.ranks.all_gather(update_SRC))

    def finish_step(self):
        """Decay, then apply updates as they arrive, times sqrt(max(1, rows / columns))."""
        for group, transfer in zip(self.param_groups, self.arriving):
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(group["params"], transfer.wait()):
                R, C = p.shape
                rate = group["lr"] * max(1, R / C) ** 0.5
                p.sub_(update.mT if R > C else update, alpha=rate)

    def complete_state(self):
        for group in self.param_groups:
            share = self.local_share(group["buffer"]).clone()
            group["buffer"].zero_()  # the others' shares: so the sum is the whole
            self.local_share(group["buffer"]).copy_(share)
            self.ranks.sum_over_ranks(group["buffer"])

    def state_tensors(self):
        """The momentum; but for this rank's share it is stale until `complete_state`."""
        return {f"muon.{i}": group["buffer"] for i, group in enumerate(self.param_groups)}


def build_optimizers(model, hp, ranks):
    """One optimizer per class in the table of kinds; they hold every parameter exactly once."""
    kinds = parameter_kinds(hp)
    groups = {}  # by kind, in the order in which the model has them
    for name, p in model.named_parameters():
        kind = parameter_kind(name)
        lr, decay = kinds[kind].lr, kinds[kind].weight_decay
        new = {"params": [], "lr": lr, "initial_lr": lr, "weight_decay": decay}
        groups.setdefault(kind, new)["params"].append(p)

    optimizers = []
    # in the table's order: so Muon's updates travel while AdamW steps
    for cls in dict.fromkeys(kinds[kind].optimizer for kind in kinds if kind in groups):
        own = [group for kind, group in groups.items() if kinds[kind].optimizer is cls]
        optimizers.append(cls(own, hp, ranks))

    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    every = [id(p) for p in model.parameters()]
    assert sorted(held) == sorted(every), "a parameter without exactly one optimizer"
    return optimizers


@torch.no_grad()
def update(optimizers: list, clip: float):
    """One step on the gradients' sum over the ranks, scaled to norm `clip` if it is above (0:
    never). What one optimizer sends travels while the next one works. Collective."""
    for optimizer in optimizers:
        optimizer.send_gradients()
    gradients = [g for optimizer in optimizers for g in optimizer.receive_gradients()]
    if clip:
        length = sum(optimizer.gradient_square() for optimizer in optimizers).sqrt()
        torch._foreach_mul_(gradients, (clip / (length + 1e-6)).clamp_max(1))
    for optimizer in optimizers:
        optimizer.begin_step()
    for optimizer in optimizers:
        optimizer.finish_step()


def training_share(step: int, seconds: float, hp):
    """How much of training is done, 0 to 1, by ITERATIONS or by the clock, whichever is further."""
    share = step / hp.iterations
    if hp.step_seconds:
        share = max(share, seconds / hp.step_seconds)
    return min(share, 1.0)


def lr_scale(step: int, seconds: float, hp):
    """Factor of all learning rates: 1, then linearly to MIN_LR over the last WARMDOWN_FRAC of
    training or the last WARMDOWN_ITERS steps before ITERATIONS, or before the cap at the speed so
    far."""
    left = 1 - training_share(step, seconds, hp)
    decay = hp.warmdown_frac
    if not decay and hp.warmdown_iters:
        decay = hp.warmdown_iters
        left = hp.iterations - step
        if hp.step_seconds and step:
            seconds_left = hp.step_seconds - seconds
            left = min(left, seconds_left / (seconds / step))
    if not decay:
        return 1.0
    return hp.min_lr + (1 - hp.min_lr) * min(1.0, max(left, 0.0) / decay)


def muon_momentum(step: int, hp):
    """Rises linearly over MUON_MOMENTUM_WARMUP_STEPS."""
    share = 1.0
    if hp.muon_momentum_warmup_steps:
        share = min(1.0, step / hp.muon_momentum_warmup_steps)
    start = hp.muon_momentum_warmup_start
    return start + share * (hp.muon_momentum - start)


# --- 7. Averaging -------------------------------
# Averaged weights are better than the last ones. EMA and SWA are one class, a running mean that may
# forget, with two schedules.


class WeightAverage:
    """Mean of snapshots: exponential, free of its start as Adam's moments; uniform if decay=1."""

    def __init__(self, decay: float, parameters: list[Tensor]):
        self.decay = decay
        self.count = torch.zeros((), dtype=torch.int64)
        self.mean = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[Tensor]):
        """Take a snapshot into the mean."""
        n = int(self.count.add_(1))
        weight = (1 - self.decay) / (1 - self.decay**n) if self.decay < 1 else 1 / n
        torch._foreach_lerp_(self.mean, parameters, weight)


def build_averages(parameters: list[Tensor], hp):
    """The averages that AVERAGING names, still empty."""
    decays = {"ema": hp.ema_decay, "swa": 1.0}
    wanted = hp.averaging.split("_")
    return {name: WeightAverage(d, parameters) for name, d in decays.items() if name in wanted}


def takes_snapshot(name: str, step: int, scale: float, hp):
    """Is the average `name` due after `step` steps? EMA always, SWA now and then near the end."""
    return name == "ema" or (scale < hp.swa_threshold and step % hp.swa_every == 0)


def averaged_parameters(averages: dict[str, WeightAverage]):
    """The one mean, or the middle of both; an empty list if no average has begun."""
    means = [average.mean for average in averages.values() if average.count]
    return [torch.stack(same).mean(0) for same in zip(*means)]


# --- 8. Training --------------------------------
# All that training changes is one dictionary of tensors: warm-up puts it back, a checkpoint holds
# it. Batches follow from the number of steps, and after the first weights nothing is random.


def soft_round(x: Tensor, hardness: Tensor):
    """Differentiable: the identity for small `hardness`, `round` as it grows (2006.09952)."""
    low = x.detach().floor()
    return low + 0.5 + torch.tanh(hardness * (x - low - 0.5)) / (2 * torch.tanh(hardness / 2))


def fake_quantized(model, hardness: Tensor):
    """The matrices rounded by rows to QUANT_BITS [9], with straight-through gradients, or soft."""
    weights = {}
    for name, p in model.named_parameters():
        levels = natural_levels(name, p, model.hp)
        if not levels:
            continue
        codes, step = quantize_rows(p.detach(), levels)
        if model.hp.qat_rounding == "straight":
            weights[name] = p + (codes * step - p.detach())
        else:
            weights[name] = soft_round((p / step).clamp(-levels, levels), hardness) * step
    return weights


def training_loss(model, ids_BT, targets_BT, hardness=None, weights_BT=None):
    """The loss of GPT.forward; with `hardness`, a graph of its own, of `fake_quantized` weights."""
    quantized = {} if hardness is None else fake_quantized(model, hardness)
    return torch.func.functional_call(model, quantized, (ids_BT, targets_BT, weights_BT))


class Trainer:
    """The model with all that changes while it learns: optimizers, averages, progress."""

    def __init__(self, model, loader: TokenLoader | None, validation, ranks, log, stop):
        self.model = model
        self.hp = model.hp
        self.loader = loader  # None: EVAL_ONLY
        self.validation = validation
        self.ranks = ranks
        self.log = log
        self.stop = stop

        self.parameters = [p.data for p in model.parameters()]
        self.progress = torch.zeros(2, dtype=torch.float64)  # steps done, seconds of training
        self.optimizers = build_optimizers(model, self.hp, ranks)
        self.averages = build_averages(self.parameters, self.hp)
        self.loss = self.compile(training_loss)
        self.trunk = model.hidden  # a compiled one after training
        self.curvature = {}  # of the weights that are packed, after training: for GPTQ
        self.hint = "there is no checkpoint"  # for error messages: how to go on

    @property
    def steps(self):
        return int(self.progress[0])

    @property
    def seconds(self):
        return float(self.progress[1])

    @property
    def label(self):
        return f"step:{self.steps}/{self.hp.iterations}"

    @property
    def clock(self):
        ms = 1e3 * self.seconds
        return f"train_time:{ms:.0f}ms step_avg:{ms / max(self.steps, 1):.2f}ms"

    def compile(self, function: Callable):
        """`function`, through torch.compile if COMPILE says so."""
        on_cuda = self.ranks.device.type == "cuda"
        if self.hp.compile == "1" or (self.hp.compile == "auto" and on_cuda):
            return torch.compile(function, dynamic=False)
        return function

    def step(self, scale: float, hardness: Tensor | None):
        """An update on batch `self.steps`; returns this rank's part of the mean loss.
        Collective."""
        device = self.ranks.device
        total = torch.zeros((), device=device)
        passes = self.loader.accumulation
        for micro in range(passes):
            ids, targets = self.loader.micro_batch(self.steps, micro)
            if device.type == "cuda":
                ids = ids.pin_memory().to(device, non_blocking=True)
                targets = targets.pin_memory().to(device, non_blocking=True)
            loss = self.loss(self.model, ids, targets, hardness)
            loss = loss / (passes * self.ranks.world_size)
            loss.backward()
            total += loss.detach()

        for optimizer in self.optimizers:
            optimizer.schedule(self.steps, scale)
        update(self.optimizers, self.hp.grad_clip_norm)
        self.model.zero_grad(set_to_none=True)
        self.progress[0] += 1
        for name, average in self.averages.items():
            if takes_snapshot(name, self.steps, scale, self.hp):
                average.update(self.parameters)
        return total

    def warm_up(self):
        """WARMUP_STEPS steps, undone, compile all graphs, at least one each: without and with late
        QAT, of both orders of blocks. Collective."""
        tensors = list(self.tensors().values())
        before = [t.clone() for t in tensors]
        hardnesses = [None]
        if self.hp.late_qat_threshold:
            hardnesses.append(torch.ones((), device=self.ranks.device))
        graphs = list(product(dict.fromkeys(block_orders(self.hp)), hardnesses))
        steps = self.hp.warmup_steps and max(self.hp.warmup_steps, len(graphs))
        progress = Progress(self.log, "warm-up", len(graphs))
        for i in range(steps):
            self.model.order, hardness = graphs[i % len(graphs)]
            self.step(1.0, hardness)
            if i < len(graphs):
                progress(i + 1)
        torch._foreach_copy_(tensors, before)
        self.model.order, _ = block_orders(self.hp)
        self.ranks.barrier()

    def validate(self):
        """(nats per target, bits per byte) of the validation stream in windows that do not overlap
        [10], on rank 0; zeros on the others. Collective."""
        tokens = self.validation.tokens
        stride = self.hp.eval_seq_len
        progress = Progress(self.log, "validation", self.validation.targets)
        nll = np.empty(0, np.float32)
        for scores_2N in score_stream(self.model.hidden, self.model, tokens, stride, self.ranks):
            nll = np.append(nll, scores_2N[0])
            progress(len(nll))
        if self.ranks.rank:
            return 0.0, 0.0
        return nll.mean(dtype=float), bits_per_byte(nll, self.validation.target_bytes)

    def tensors(self):
        """All that training changes, by name, to read or to write."""
        named = {"progress": self.progress}
        named |= {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for optimizer in self.optimizers:
            named |= optimizer.state_tensors()
        for name, average in self.averages.items():
            named |= {f"{name}.{i}": t for i, t in enumerate([average.count, *average.mean])}
        return named

    def save(self):
        """Rank 0 writes logs/<RUN_ID>.ckpt, which any number of ranks can resume. If it cannot, or
        a number is not finite, the log says so and the last one stays. Collective."""
        for optimizer in self.optimizers:
            optimizer.complete_state()
        try:
            if self.log.path is not None:
                self.write_checkpoint(self.log.path.with_suffix(".ckpt"))
        except UserError as error:
            self.log(f"warning: {error}")
        self.ranks.barrier()

    def write_checkpoint(self, path: Path):
        """UserError: it cannot be written, or would hold a number that is not finite."""
        arrays = {name: t.numpy(force=True) for name, t in self.tensors().items()}
        for name, array in arrays.items():
            problem = f"{name} is not finite, so step {self.steps} gets no checkpoint"
            require(np.isfinite(array).all(), problem)
        settings = json.dumps(self.hp.as_env())
        replace_file(path, lambda file: np.savez(file, settings=settings, **arrays))
        self.hint = f"RESUME={path} goes on from step {self.steps}"

    def restore(self, path: str):
        """Every rank gets rank 0's checkpoint `path` or, if "", rank 0's initial weights.
        Collective. UserError: no checkpoint, or one that these settings do not fit."""
        if path and self.ranks.rank == 0:
            self.copy_checkpoint(path, read_checkpoint(path))
        for tensor in self.tensors().values():
            self.ranks.broadcast(tensor)
        if path:
            self.hint = f"RESUME={path} goes on from step {self.steps}"
            self.log(f"resume:{path} step:{self.steps} train_time:{1e3 * self.seconds:.0f}ms")

    def copy_checkpoint(self, path: str, arrays: dict[str, ndarray]):
        """Put `arrays` in the place of `tensors`, and warn of settings that have changed."""
        before = json.loads(str(arrays.get("settings", "{}")))
        for name, value in self.hp.as_env().items():
            may_differ = name in ("RUN_ID", "RESUME", "CHECKPOINT_EVERY")
            if not may_differ and before.get(name, value) != value:
                self.log(f"warning: {name}={value} here, {before[name]} in the checkpoint")
        for name, tensor in self.tensors().items():
            found = arrays[name].shape if name in arrays else "absent"
            needed = tuple(tensor.shape)
            require(
                found == needed,
                f"RESUME={path}: {name} is {found}, these settings need {needed}: set what the run "
                "was begun with",
            )
            tensor.copy_(torch.from_numpy(arrays[name]))


def read_checkpoint(path: str):
    """All arrays of a NumPy archive; UserError: no such file, or cut or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            require(not archive.zip.testzip(), "damaged")  # NumPy reads only some
            return dict(archive)
    except Exception as error:  # of many types: damage shows in NumPy, zipfile, zlib, struct ...
        reason = getattr(error, "strerror", None) or "no whole checkpoint"
        raise UserError(f"RESUME={path}: {reason}") from None


def train(trainer):
    """Train to ITERATIONS or to MAX_WALLCLOCK_SECONDS on rank 0's clock, which is paused in
    validations but not in checkpoints; no step begins that would pass it if it took twice the
    average. Leaves a checkpoint, the averaged weights and their curvature. Collective. Stopped;
    UserError: the loss is not finite."""
    hp, ranks, log, stop = trainer.hp, trainer.ranks, trainer.log, trainer.stop
    trainer.warm_up()
    stop.patient = True  # signals wait for the loop
    saved_at = trainer.seconds
    started = perf_counter() - trainer.seconds
    hardness = None  # of late QAT, once it is on
    losses = []  # of the last two steps
    while True:
        # Wait for the step before the last only: the GPU keeps work to do, and the clock, rank 0's,
        # to which the others add 0, is right to within a step.
        diverged = bool(losses) and not math.isfinite(losses[0])
        own_clock = perf_counter() - started if ranks.rank == 0 else 0.0
        seconds, stopped, diverged = ranks.sum_numbers(own_clock, bool(stop.name), diverged)
        trainer.progress[1] = seconds
        step = trainer.steps
        set_block_order(trainer)
        scale = lr_scale(step, seconds, hp)
        require(
            not diverged,
            f"step:{step + 1 - len(losses)}/{hp.iterations}: the training loss is not finite; "
            f"lower the learning rates; {trainer.hint}",
        )
        if losses and (step <= 10 or is_multiple(step, hp.train_log_every)):
            loss = ranks.sum_over_ranks(losses[-1].clone()).item()
            speed = f"tok/s:{hp.train_batch_tokens * step / seconds:.0f} lr_scale:{scale:.4f}"
            log(f"{trainer.label} train_loss:{loss:.4f} {trainer.clock} {speed}")

        capped = step > 0 and 0 < hp.step_seconds < seconds * (1 + 2 / step)
        is_last = capped or step >= hp.iterations
        validates = is_last or is_multiple(step, hp.val_loss_every)
        if stopped or validates or 0 < hp.checkpoint_every <= seconds - saved_at:
            saved_at = seconds
            trainer.save()  # before a validation too, as signals wait until it ends
        if validates and not stopped:
            paused = perf_counter()
            loss, bpb = trainer.validate()
            log(f"{trainer.label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {trainer.clock}")
            if is_last:
                stop.patient = False  # a signal from here on ends the run at once
                (stopped,) = ranks.sum_numbers(bool(stop.name))
            started += perf_counter() - paused
        if stopped:
            raise Stopped(f"{trainer.label}: stopped by {stop.name or 'a signal'}; {trainer.hint}")
        if is_last:
            break

        hardness = late_qat_hardness(trainer, scale, hardness)
        losses = [*losses, trainer.step(scale, hardness)][-2:]

    if capped:
        log(f"stopping_early: wallclock_cap train_time:{1e3 * seconds:.0f}ms {trainer.label}")
    use_averages(trainer)
    if hp.quantizer == "gptq":
        trainer.curvature = measure_curvature(trainer)


def set_block_order(trainer):
    """The order of blocks from here on, by the share of training that is done."""
    hp, model = trainer.hp, trainer.model
    plain, recurrent = block_orders(hp)
    recurs = training_share(trainer.steps, trainer.seconds, hp) >= hp.recur_start
    if recurs and model.order == plain != recurrent:
        trainer.log(f"recurrence:on step:{trainer.steps} passes:{len(recurrent)}")
    model.order = recurrent if recurs else plain


def late_qat_hardness(trainer, scale: float, before: Tensor | None):
    """The hardness of soft rounding in the next step, rising from 1 to 16 as the rates fall from
    LATE_QAT_THRESHOLD to 0. None: there is no rounding. `before`: that of the last step."""
    hp = trainer.hp
    if scale >= hp.late_qat_threshold:
        return None
    if before is None:
        facts = f"lr_scale:{scale:.4f} bits:{hp.quant_bits} {hp.qat_rounding}"
        trainer.log(f"late_qat:on step:{trainer.steps} {facts}")
    return torch.full((), 16 - 15 * scale / hp.late_qat_threshold, device=trainer.ranks.device)


def is_multiple(step: int, every: int):
    """Does `every` divide `step`? Never if either is 0."""
    return step > 0 and every > 0 and step % every == 0


def use_averages(trainer):
    """The model gets what is packed: the averaged weights, where there are any, and the final order
    of blocks."""
    _, trainer.model.order = block_orders(trainer.hp)
    weights = averaged_parameters(trainer.averages)
    if weights:
        torch._foreach_copy_(trainer.parameters, weights)
    used = "_".join(name for name, a in trainer.averages.items() if a.count) or "none"
    counts = " ".join(f"{name}_updates:{a.count}" for name, a in trainer.averages.items())
    size = sum(p.numel() for p in trainer.parameters)
    trainer.log(f"averaging:{used} {counts} parameters:{size}")


# --- 9. Artifact --------------------------------
# Weights <-> codes <-> bytes <-> file, and the step size at which the file fits. A matrix becomes
# small integers and a step per row; rANS (Duda 1311.2540), its tables chosen by the spread of row
# and column, codes them below their zeroth-order entropy. A file holds numbers, never code:
#
#     "PGOLF" 3 | SHA-256 of the rest | u32 size of the side stream | side stream | rANS words
#
# where the side stream is LZMA2 of all else. docs/container.md says what each byte is.

MAGIC = b"PGOLF\x03"
CHECKSUM = slice(len(MAGIC), len(MAGIC) + 32)
TABLES = 64
SYMBOLS = 256  # of a table: code + 128
SCALE = 14  # the frequencies of a table sum to 2^SCALE
LEAST_STATE = 1 << 16  # of a rANS lane, and its first
MOST_WEIGHTS = 1 << 28  # a file that claims more is refused before anything is allocated
MOST_SIDE = 1 << 24  # bytes of the side stream once inflated
MOST_TEXT = 1 << 20
LARGEST_CODE = 127
COARSEST = 254.0  # divides all levels; all are +-1 then
GPTQ_BLOCK = 128  # columns
PASS_TOKENS = 16_384  # of a rank at a time, for the curvature
TOLERANCE = 4096  # bytes that `fit_artifact` may leave unused
AIM = 2000  # bytes below the budget at which its search aims first
LZMA = dict(
    format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=1 << 20, pb=0)]
)

require_valid = partial(require, error=ValueError)


# What errors of the weights cost


class Curvature:
    """An error e_RC of a matrix costs, to second order, half the sum over its rows r of
    `outputs_r * e_r inputs e_r'` nats per token (Kronecker-factored: 1503.05671)."""

    def __init__(self, inputs_CC, outputs_R):
        self.inputs_CC = inputs_CC  # mean of x x' over tokens, x what enters the matrix
        self.outputs_R = outputs_R  # mean of the squared gradients of what leaves it

    @cached_property
    def factors(self):
        """(order of the columns, upper Cholesky factor of the inverse of the damped moments in that
        order), or None if there is no such factor or a moment is not finite."""
        H_CC = self.inputs_CC.double()
        order_C = H_CC.diagonal().argsort(descending=True)
        H_CC = H_CC[order_C][:, order_C]
        for damping in (0.01, 0.1, 1.0):
            shift_C = (damping * H_CC.diagonal().mean()).expand(len(H_CC))
            lower_CC, failed = torch.linalg.cholesky_ex(H_CC + shift_C.diag())
            if not failed and lower_CC.isfinite().all() and self.outputs_R.isfinite().all():
                inverse_CC = torch.cholesky_inverse(lower_CC)
                return order_C, torch.linalg.cholesky(inverse_CC, upper=True).float()
        return None

    @cached_property
    def steps(self):
        """(R, 1), up to a factor: where a bit buys the same in every row of every matrix (reverse
        water-filling). A unit error of column c costs factor_cc^-2 once later columns have made up
        for it. Powers of 2^(1/8): few different numbers take few bytes."""
        residual = self.factors[1].diagonal().double().pow(-2).mean()
        outputs_R = self.outputs_R.double()
        cost_R = residual * (outputs_R + 0.01 * outputs_R.mean())
        return torch.exp2((-4 * cost_R.clamp_min(1e-30).log2()).round() / 8).float().cpu()[:, None]


def add_moments(sums: list, x):
    x_NC = x.detach().flatten(0, -2).float()
    sums[0] = sums[0] + x_NC.T @ x_NC


def add_squares(sums: list, g, factor=1.0):
    sums[1] = sums[1] + (g.flatten(0, -2).float() * factor).square().sum(0)


def watch(sums: list, module, args, y):
    """A forward hook that adds to `sums` moments of the inputs and, when the gradient of y comes,
    its squares. A table, turned, is a matrix of one-hot inputs: a row counts as often as it is
    looked up, and errors of its columns cost by moments of the gradient."""
    if isinstance(module, nn.Embedding):
        sums[1] = sums[1] + torch.bincount(args[0].flatten(), minlength=len(module.weight))
        y.register_hook(lambda g: add_moments(sums, g))
        return
    x, *factors = args
    add_moments(sums, x)
    factor = factors[0].detach().flatten() if factors else 1.0  # of the weights of an output
    y.register_hook(lambda g: add_squares(sums, g, factor))


@contextmanager
def watched(model):
    """Within, all passes add to a dictionary that this gives, name of a matrix -> `sums`."""
    sums = defaultdict(lambda: [0.0, 0.0])
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (Linear, nn.Embedding)):
            hook = partial(watch, sums[f"{name}.weight"])
            handles.append(module.register_forward_hook(hook))
    for block in model.blocks:
        block.mlp.fused = False  # its kernel would go past the hooks
    yield sums
    for block in model.blocks:
        block.mlp.fused = model.hp.fused_mlp
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)


def curvature_passes(trainer):
    """Yields this rank's (ids, targets) of the batches after the last step, PASS_TOKENS at a time,
    by the loader that has the shards open: they may be gone by now."""
    hp, loader = trainer.hp, trainer.loader
    rows = max(1, PASS_TOKENS // hp.train_seq_len)
    for batch in range(math.ceil(hp.gptq_tokens / hp.train_batch_tokens)):
        for micro in range(loader.accumulation):
            ids, targets = loader.micro_batch(trainer.steps + batch, micro)
            yield from zip(ids.split(rows), targets.split(rows))


def measure_curvature(trainer):
    """{name: Curvature} of the coded weights, from the next training tokens: whole batches, at
    least GPTQ_TOKENS, unless the time kept for it ends. It counts as training. Collective."""
    model, hp, ranks = trainer.model, trainer.hp, trainer.ranks
    began = perf_counter()
    tokens = 0
    with watched(model) as sums:
        head = sums["head.weight"]
        for done, (ids, targets) in enumerate(curvature_passes(trainer), start=1):
            tokens += ids.numel() * ranks.world_size
            hidden_ND = model.hidden(ids.to(ranks.device)).flatten(0, 1)
            add_moments(head, norm(hidden_ND))
            z_NV = model.logits(hidden_ND)
            z_NV.register_hook(partial(add_squares, head))
            targets_N = targets.to(ranks.device).flatten()
            token_nll(z_NV, targets_N, hp.logit_softcap).sum().backward()
            ranks.barrier()
            own_clock = perf_counter() - began if ranks.rank == 0 else 0.0
            (seconds,) = ranks.sum_numbers(own_clock)
            if hp.max_wallclock_seconds and seconds * (1 + 2 / done) > hp.gptq_seconds:
                break

    found = {}
    for name in sorted(sums):
        found[name] = Curvature(*(ranks.sum_over_ranks(x) / tokens for x in sums[name]))
    if model.head is None:  # then it is the same matrix as the table
        table, head = found["embed.weight"], found.pop("head.weight")
        looked_up_CC = table.inputs_CC / head.outputs_R.sum()
        found["embed.weight"] = Curvature(head.inputs_CC + looked_up_CC, head.outputs_R)
    dead = sum(int((c.inputs_CC.diagonal() == 0).sum()) for c in found.values())
    trainer.progress[1] += perf_counter() - began
    facts = f"seconds:{seconds:.1f} matrices:{len(found)} dead_columns:{dead} {trainer.clock}"
    trainer.log(f"gptq_curvature tokens:{tokens} {facts}")
    return found


# Codes <-> weights


def natural_levels(name: str, tensor: Tensor, hp):
    """The largest code of a matrix by its kind, 2^(bits - 1) - 1; 0: the tensor is not coded."""
    bits = parameter_kinds(hp)[parameter_kind(name)].bits
    is_matrix = tensor.ndim == 2 and tensor.numel() > 0
    return 2 ** (bits - 1) - 1 if bits and is_matrix else 0


def quantize_rows(w_RC, levels: int | Tensor):
    """Codes (R, C) in +-levels (<= 127, a number or one per row) and bfloat16 steps (R, 1), both as
    float32: code * step is exact. Per row the clip of least squared error becomes `levels`
    (GPTQ-lite); quantising the result again changes nothing."""
    w = w_RC.float()
    last = w.size(-1) - 1
    places = [last - round(q * last) for q in (1.0, 0.998, 0.994)]  # 0: the largest magnitude
    largest = w.abs().topk(max(places) + 1).values
    clips = largest[:, places].T[..., None]
    steps = (clips / levels).clamp_min(1e-30).bfloat16().float()

    def codes(step: Tensor):
        return (w / step).round().clamp(-levels, levels)

    errors = [(codes(s) * s - w).square().sum(-1, keepdim=True) for s in steps]
    best = torch.stack(errors).argmin(0, keepdim=True)
    step = steps.gather(0, best)[0]
    return codes(step), step


class RowQuantizer:
    """Rounds each row by itself, blind to the inputs of the matrix."""

    def __init__(self, hp):
        self.hp = hp

    def quantize(self, name: str, w_RC, coarsen: float):
        """(codes, steps) as of `quantize_rows`, with the natural levels over `coarsen`."""
        levels = natural_levels(name, w_RC, self.hp) / coarsen
        return quantize_rows(w_RC, row_levels(len(w_RC), levels))


def row_levels(rows: int, levels: float):
    """(rows, 1) integers in 1 ... 127 of mean `levels`, so that sizes move by single rows."""
    golden = 0.6180339887498949
    dither = torch.arange(rows, dtype=torch.float64)[:, None] * golden % 1
    return (levels + dither).floor().clamp(1, LARGEST_CODE).float()


class GPTQ:
    """`Curvature.steps`; the columns are rounded in turn, and those to come make up for the error
    so far (2210.17323)."""

    def __init__(self, hp, curvature: dict[str, Curvature], scale: float, carries=True):
        self.rows = RowQuantizer(hp)
        self.curvature = curvature
        self.scale = scale  # of all steps
        self.carries = carries  # False: each weight by itself: about as many bytes, quickly

    @property
    def draft(self):
        return GPTQ(self.rows.hp, self.curvature, self.scale, carries=False)

    def quantize(self, name: str, w_RC, coarsen: float):
        """As RowQuantizer.quantize, which codes what has no curvature."""
        if name not in self.curvature:
            return self.rows.quantize(name, w_RC, coarsen)
        step = self.curvature[name].steps * (self.scale * coarsen)
        reach = w_RC.abs().amax(1, keepdim=True) / LARGEST_CODE
        step = torch.maximum(step, reach).clamp_min(1e-30).bfloat16().float()
        if not self.carries:
            return round_to(step, w_RC), step
        order_C, factor_CC = self.curvature[name].factors
        w_CR = w_RC.to(factor_CC.device).T[order_C]
        codes_CR = torch.empty_like(w_CR)
        codes_CR[order_C] = round_in_turn(w_CR, step.to(w_CR.device)[:, 0], factor_CC)
        return codes_CR.T.cpu().contiguous(), step


def round_to(step: Tensor, w: Tensor):
    return (w / step).round().clamp(-LARGEST_CODE, LARGEST_CODE)


def build_gptq(state: dict[str, Tensor], hp, curvature: dict[str, Curvature], log):
    """A GPTQ whose steps have RowQuantizer's geometric mean at coarsen 1. Matrices whose moments
    cannot be used are rounded by rows; the log names them."""
    usable = {name: c for name, c in curvature.items() if c.factors is not None}
    for name in curvature.keys() - usable.keys():
        log(f"warning: {name}: its moments have no Cholesky factor; rounded by rows")
    log_ratio = 0.0
    weights = 0
    for name, c in usable.items():
        w_RC = state[name].detach().float().cpu()
        _, natural = quantize_rows(w_RC, natural_levels(name, w_RC, hp))
        log_ratio += float((natural.log2() - c.steps.log2()).mean()) * w_RC.numel()
        weights += w_RC.numel()
    return GPTQ(hp, usable, 2 ** (log_ratio / max(weights, 1)))


def round_in_turn(w_CR, step_R, factor_CC):
    """Codes (C, R) of the columns of a matrix, here the rows of `w`, in this order. `factor`: upper
    Cholesky factor of the inverse of the inputs' moments. Within a block each error is carried on
    at once, beyond it by one product."""
    w_CR = w_CR.clone()
    codes_CR = torch.empty_like(w_CR)
    for start in range(0, len(w_CR), GPTQ_BLOCK):
        block = slice(start, start + GPTQ_BLOCK)
        w = w_CR[block]
        factor = factor_CC[block, block]
        errors = torch.empty_like(w)
        for c in range(len(w)):
            codes = round_to(step_R, w[c])
            codes_CR[start + c] = codes
            errors[c] = (w[c] - codes * step_R) / factor[c, c]
            w[c + 1 :].addr_(factor[c, c + 1 :], errors[c], alpha=-1)
        w_CR[block.stop :] -= factor_CC[block, block.stop :].T @ errors
    return codes_CR


# Codes <-> bytes


def spread_classes(codes_RC):
    """16 + 4 log2 of the codes' spread, int16: by row and, relative to the rows, by column."""
    row = np.sqrt(np.square(codes_RC, dtype=np.float32).mean(1) + 0.03)
    column = np.sqrt(np.square(codes_RC / row[:, None]).mean(0) + 0.003)
    row, column = (np.rint(4 * np.log2(16 * spread)).astype("<i2") for spread in (row, column))
    return row, column


def tables_of(rows: ndarray, columns: ndarray):
    """(R, C): the table of each code, from the spread classes of rows and columns."""
    return np.clip(np.add.outer(rows, columns) - 16, 0, TABLES - 1)


def lanes_of(count: int):
    """How many rANS states, 4 bytes each in the file, work side by side on `count` symbols."""
    return min(1024, 16 + (count >> 12))


def table_frequencies(pairs: ndarray):
    """How often each of the int16 `pairs`, SYMBOLS * table + symbol, comes: uint16, scaled to sum
    to 2^SCALE in each table, at least 1 for a pair that comes."""
    count = np.bincount(pairs, minlength=SYMBOLS * TABLES).reshape(TABLES, SYMBOLS)
    comes = count > 0
    spare = (1 << SCALE) - comes.sum(1, keepdims=True)
    freq = comes + count * spare // np.maximum(count.sum(1, keepdims=True), 1)
    freq[np.arange(TABLES), freq.argmax(1)] += (1 << SCALE) - freq.sum(1)  # what rounding has left
    return freq.astype("<u2").ravel()


def rans_encode(pairs: ndarray):
    """(`table_frequencies`, coded) of `pairs`: undoes the steps of `rans_decode`, last to first."""
    freq = table_frequencies(pairs)
    start = np.cumsum(freq, dtype=np.uint32) - freq
    lanes = lanes_of(len(pairs))
    states = np.full(lanes, LEAST_STATE, "<u4")
    words = []
    for i in reversed(range(0, len(pairs), lanes)):
        pair = pairs[i : i + lanes]
        x = states[: len(pair)]
        spills = (x >> (32 - SCALE)) >= freq[pair]
        words.append(x[spills].astype("<u2"))
        quotient, rest = np.divmod(np.where(spills, x >> 16, x), freq[pair])
        x[:] = (quotient << SCALE) + rest + start[pair] % (1 << SCALE)  # start within its table
    return freq, b"".join([states, *reversed(words)])


def rans_decode(coded: bytes, tables: ndarray, freq: ndarray):
    """The symbols (uint8), given the table of each; ValueError: too few or too many bytes."""
    start = np.cumsum(freq, dtype=np.uint32) - freq
    pair_of_slot = np.repeat(np.arange(len(freq), dtype="<u2"), freq)
    lanes = lanes_of(len(tables))
    states = np.frombuffer(coded, "<u4", lanes).copy()
    words = np.frombuffer(coded, "<u2", offset=4 * lanes)
    symbols = np.empty(len(tables), np.uint8)
    for i in range(0, len(tables), lanes):
        table = tables[i : i + lanes].astype(np.uint32)
        x = states[: len(table)]
        slot = (table << SCALE) | (x & ((1 << SCALE) - 1))
        pair = pair_of_slot[slot]
        symbols[i : i + lanes] = pair & (SYMBOLS - 1)
        x[:] = freq[pair] * (x >> SCALE) + slot - start[pair]

        low = np.flatnonzero(x < LEAST_STATE)
        require_valid(len(low) <= len(words), "codes end early")
        x[low] = x[low] << 16 | words[: len(low)]
        words = words[len(low) :]
    is_whole = not len(words) and (states == LEAST_STATE).all()
    require_valid(is_whole, "codes do not end where they should")
    return symbols


def encode_matrices(matrices: list[ndarray]):
    """(frequencies, spread classes of each matrix's rows, then of the columns, rANS words), as for
    `decode_matrices`, and the bytes of each matrix."""
    classes = [spread_classes(codes) for codes in matrices]
    pairs = []
    for codes, (rows, columns) in zip(matrices, classes):
        symbols = codes.astype(np.int16) + 128
        pairs.append((tables_of(rows, columns) * SYMBOLS + symbols).ravel())
    freq, words = rans_encode(np.concatenate([np.empty(0, np.int16), *pairs]))
    bits = SCALE - np.log2(np.maximum(freq, 1))  # of each pair
    sizes = [round(bits[pair].sum() / 8) for pair in pairs]
    rows_first = [rows for rows, _ in classes] + [columns for _, columns in classes]
    return freq, rows_first, words, sizes


def decode_matrices(freq: ndarray, classes: list[ndarray], words: bytes):
    """The codes of each matrix, plus 128, as uint8 (R, C)."""
    half = len(classes) // 2
    tables = [tables_of(*both) for both in zip(classes[:half], classes[half:])]
    flat = np.concatenate([np.empty(0, np.int16), *(table.ravel() for table in tables)])
    ends = np.cumsum([table.size for table in tables], dtype=int)
    symbols = np.split(rans_decode(words, flat, freq), ends)
    return [part.reshape(table.shape) for part, table in zip(symbols, tables)]


# State dict <-> container


@dataclass
class TensorEntry:
    """A line of the container's text."""

    name: str
    is_coded: bool
    shape: tuple[int, ...]

    def line(self):
        return " ".join(map(str, (self.name, int(self.is_coded), *self.shape))) + "\n"

    @property
    def weight_count(self):
        return math.prod(self.shape)

    @property
    def number_count(self):
        """Of steps or, if it is not coded, of float16 values in the side stream."""
        return self.shape[0] if self.is_coded else self.weight_count


@dataclass
class Packed:
    blob: bytes  # the container
    sizes: dict[str, int]  # its bytes, by kind of content
    error: float  # of the coded weights: norm of the difference over norm
    weights: int  # how many were coded, at least 1


def quantize_state(state: dict[str, Tensor], hp, coarsen: float, quantizer):
    """(entries, codes of coded matrices, 16-bit numbers of all tensors, relative error)."""
    entries, codes, numbers = [], [], []
    lost = total = 0.0  # sums of squares
    for name, tensor in state.items():
        w = tensor.detach().float().cpu().contiguous()
        levels = natural_levels(name, tensor, hp)
        require(
            bool((w.abs() <= (1e30 if levels else 65504)).all()),
            f"{name}: holds NaN, infinity or huge values; training diverged, lower the rates",
        )
        entries.append(TensorEntry(name, levels > 0, tuple(w.shape)))
        if not levels:
            numbers.append(w.half().numpy())
            continue
        rounded, step = quantizer.quantize(name, w, coarsen)
        codes.append(rounded.numpy())
        numbers.append(step.bfloat16().view(torch.int16).numpy())
        lost += float((rounded * step - w).square().sum(dtype=torch.float64))
        total += float(w.square().sum(dtype=torch.float64))
    return entries, codes, numbers, math.sqrt(lost / (total + 1e-300))


def pack(state: dict[str, Tensor], hp, coarsen: float = 1.0, quantizer=None):
    """The container of a state dict, all levels divided by `coarsen`. UserError: NaN or huge."""
    quantizer = quantizer or RowQuantizer(hp)
    entries, codes, numbers, error = quantize_state(state, hp, coarsen, quantizer)
    freq, classes, words, coded_sizes = encode_matrices(codes)
    numbers = b"".join([freq, *classes, *numbers])
    by_byte = np.frombuffer(numbers, np.uint8).reshape(-1, 2).T.tobytes()
    text = "".join(entry.line() for entry in entries).encode()
    side = lzma.compress(text + b"\0" + by_byte, **LZMA)
    body = len(side).to_bytes(4, "little") + side + words
    blob = MAGIC + hashlib.sha256(body).digest() + body

    sizes = {"side": 0, "embeddings": 0, "attention": 0, "mlp": 0}
    names = [entry.name for entry in entries if entry.is_coded]
    for name, size in zip(names, coded_sizes):
        other = "mlp" if ".mlp." in name else "embeddings"
        sizes["attention" if ".attn." in name else other] += size
    sizes["side"] = len(blob) - sum(sizes.values())  # all that is not codes
    return Packed(blob, sizes, error, max(1, sum(c.size for c in codes)))


def unpack(blob: bytes):
    """A container's state dict, float32; claims are checked before they allocate. ValueError."""
    try:
        magic = blob[: len(MAGIC)]
        found = f"starts with {magic!r}, expected {MAGIC!r}: no artifact of this script"
        require_valid(magic == MAGIC, found)
        body = blob[CHECKSUM.stop :]
        is_intact = hashlib.sha256(body).digest() == blob[CHECKSUM]
        require_valid(is_intact, "SHA-256 differs: cut or damaged")
        side_end = 4 + int.from_bytes(body[:4], "little")
        text, numbers = inflate(body[4:side_end])
        return read_tensors(parse_entries(text), numbers, body[side_end:])
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"artifact: {error}") from None


def inflate(side: bytes):
    """(text, numbers) of a side stream, which may not grow beyond MOST_SIDE."""
    engine = lzma.LZMADecompressor(**LZMA)
    text, _, numbers = engine.decompress(side, MOST_SIDE).partition(b"\0")
    is_whole = engine.eof and not engine.unused_data
    require_valid(is_whole, "a side stream that is cut or too long")
    require_valid(len(text) < MOST_TEXT, "a tensor table that is too long")
    return text, numbers


def parse_entries(text: bytes):
    """The lines of the container's text, whose claims are checked."""
    entries = []
    for line in text.splitlines():
        match = re.fullmatch(rb"([\w.]+) ([01])((?: \d{1,9}){0,4})", line)
        require_valid(match is not None, "a bad line in the tensor table")
        shape = tuple(int(n) for n in match[3].split())
        entries.append(TensorEntry(match[1].decode(), match[2] == b"1", shape))

    names = {entry.name for entry in entries}
    require_valid(len(names) == len(entries), "a name twice")
    coded_shapes = [entry.shape for entry in entries if entry.is_coded]
    are_matrices = all(len(shape) == 2 and min(shape) > 0 for shape in coded_shapes)
    require_valid(are_matrices, "codes of no matrix")
    claimed = sum(entry.weight_count for entry in entries)
    require_valid(claimed <= MOST_WEIGHTS, "absurdly many weights")
    return entries


def read_tensors(entries: list[TensorEntry], numbers: bytes, words: bytes):
    """The state dict, from the numbers of the side stream and the rANS words."""
    coded = [entry for entry in entries if entry.is_coded]
    sizes = [
        SYMBOLS * TABLES,
        *(entry.shape[0] for entry in coded),
        *(entry.shape[1] for entry in coded),
        *(entry.number_count for entry in entries),
    ]
    require_valid(len(numbers) == 2 * sum(sizes), "a side stream of another length")
    by_byte = np.frombuffer(numbers, np.uint8).reshape(2, -1)
    parts = iter(np.split(by_byte.T.copy().view("<i2").ravel(), np.cumsum(sizes)[:-1]))
    freq = next(parts)
    sums = freq.reshape(TABLES, SYMBOLS).sum(1)
    require_valid((sums == 1 << SCALE).all() and freq.min() >= 0, "bad frequencies")
    classes = list(islice(parts, 2 * len(coded)))
    matrices = iter(decode_matrices(freq.view("<u2"), classes, words))
    state = {}
    for entry, part in zip(entries, parts):
        if entry.is_coded:
            step = torch.from_numpy(part).view(torch.bfloat16).float()
            w = (torch.from_numpy(next(matrices)) - 128.0) * step[:, None]
        else:
            w = torch.from_numpy(part).view(torch.float16).float()
        require_valid(bool(w.isfinite().all()), f"NaN or infinity in {entry.name}")
        state[entry.name] = w.view(entry.shape)
    return state


# Size <-> step


def fit_artifact(state: dict[str, Tensor], hp, budget: int, quantizer=None):
    """(a container of at most `budget` bytes, facts for the log). One number divides all levels,
    found by packing to within TOLERANCE: over 1 if bytes are few; under 1, with FILL_BUDGET and up
    to 8 bits, if some are left. A quantiser with a quicker `draft` of itself is tried near where
    that fits only. UserError: even codes of +-1 take too many."""
    quantizer = quantizer or RowQuantizer(hp)
    draft = getattr(quantizer, "draft", quantizer)
    natural = 2 ** (hp.quant_bits - 1) - 1
    finest = (natural + 1) / (2 * (LARGEST_CODE + 1)) if hp.fill_budget else 1.0
    *_, before = quantize_state(state, hp, 1.0, draft)
    coarsen = finest
    for each in dict.fromkeys((draft, quantizer)):
        pack_at = partial(pack, state, hp, quantizer=each)
        most = 100 if each is draft else 4
        best, coarsen = largest_that_fits(pack_at, budget, finest, coarsen, most)
    if best is None:
        raise UserError(
            f"the artifact takes over {budget} bytes even with codes of +-1: lower NUM_LAYERS, "
            "MODEL_DIM, MLP_MULT, VOCAB_SIZE or BIGRAM_VOCAB_SIZE"
        )
    count = max(1, sum(tensor.numel() for tensor in state.values()))
    return best, (
        f"coarsen:{coarsen:.9f} error_before:{before:.6f} error_after:{best.error:.6f} "
        f"bits_per_parameter:{8 * len(best.blob) / count:.4f} "
        f"levels:{min(LARGEST_CODE, natural / coarsen):.2f}"
    )


def largest_that_fits(pack_at: Callable, budget: int, finest: float, coarsen: float, most: int):
    """(a container within TOLERANCE below `budget`, or the largest of about `most`, None if none
    fits; its coarsen), searched from `coarsen` on."""
    best = None
    low, high = finest, COARSEST
    passes = 0
    aim = AIM
    while high / low > 1 + 1e-7:
        if best is not None and (len(best.blob) > budget - TOLERANCE or passes >= most):
            break
        passes += 1
        packed = pack_at(coarsen)
        excess = len(packed.blob) - budget
        bits_over = (excess + aim) * 8 / packed.weights  # of each weight
        if excess > 0:
            low = coarsen
            aim *= 2  # steps are bfloat16, so that a size comes in jumps
        else:
            high = coarsen
            aim = AIM
            best = packed
        guess = coarsen * 2 ** min(bits_over, 8)  # a bit less doubles the step
        coarsen = guess if low < guess < high else math.sqrt(low * high)
    return best, high


def code_size():
    """Bytes of this script, which count as the weights do."""
    return Path(__file__).stat().st_size


def write_artifact(model, path: Path, ranks, log, curvature: dict[str, Curvature] | None = None):
    """Rank 0 packs the model into `path`, by GPTQ where it is given a curvature, with the code at
    most SIZE_CAP bytes. UserError."""
    if ranks.rank:
        return
    budget = SIZE_CAP - code_size()
    state = model.state_dict()
    quantizer = build_gptq(state, model.hp, curvature, log) if curvature else None
    packed, facts = fit_artifact(state, model.hp, budget, quantizer)
    log(f"fit_artifact {facts}")
    sizes = " ".join(f"{part}:{size}" for part, size in packed.sizes.items())
    log(f"artifact_bytes code:{code_size()} {sizes}")
    replace_file(path, lambda file: file.write(packed.blob))


def load_artifact(model, path: Path, ranks, log):
    """Every rank gets the weights that rank 0 reads from `path`; returns the bytes of code and
    file. Collective. UserError: no such file, damaged, or of another model."""
    size = 0
    if ranks.rank == 0:
        try:
            blob = path.read_bytes()
            model.load_state_dict(unpack(blob))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        except RuntimeError as error:
            mismatch = str(error).splitlines()[1].strip()
            raise UserError(
                f"{path}: is of another model than the settings (its log has those that it was "
                f"trained with): {mismatch}"
            ) from None
        size = code_size() + len(blob)
        label = f"int{model.hp.quant_bits}+rans"
        log(f"Serialized model {label}: {len(blob)} bytes")
        log(f"Code size: {code_size()} bytes")
        log(f"Total submission size {label}: {size} bytes")
    for p in model.parameters():
        ranks.broadcast(p.data)
    return size


# --- 10. Scoring --------------------------------
# Overlapping windows give every target a long context; the window that ends nearest after a target
# scores it, once. Ranks share the windows, and rank 0 gets nll[t] and entropy[t] in stream order.

SEGMENT_BATCHES = 32  # most global batches between two sums over the ranks
HEAD_LOGITS = 2**26  # most logits at a time


def windows(begin: int, end: int, length: int, stride: int):
    """(start, first scored target, end of these) of each window, (3, windows), so that they score
    the targets [begin, end) once, in order. A window reads the tokens [start, start + length). The
    stream's first scores all its targets, each other its last `stride`, the last what is left."""
    first_end = begin + stride if begin else length
    ends = np.minimum(np.arange(first_end, end + stride, stride), end)
    starts = np.maximum(ends - length, 0)
    firsts = np.append(begin, ends[:-1])
    return np.stack((starts, firsts, ends))


def window_targets(spans: ndarray, length: int):
    """(targets, scored), (B, length): what the windows predict, and what of that they score."""
    starts, firsts, ends = spans[:, :, None]
    targets = starts + np.arange(length)
    return targets, (targets >= firsts) & (targets < ends)


@torch.inference_mode()
def score_stream(
    trunk: Callable, model, tokens, stride: int, ranks, part: tuple[int, int] | None = None
):
    """Yields (2, N) float32, nll and entropy in nats, of the targets [begin, end) = `part` or of
    all, in growing segments; N = 0 on ranks but 0. `trunk`: model.hidden, compiled. Collective."""
    begin, end = part or (0, len(tokens) - 1)
    length = min(model.hp.eval_seq_len, end)
    spans = windows(begin, end, length, stride)
    count = spans.shape[1]
    batch = max(1, model.hp.val_batch_size // (length * ranks.world_size))
    done = 0
    batches = 1
    while done < count:
        # Each rank fills in the targets of its windows; the sum over the ranks has them all.
        until = min(done + batches * batch * ranks.world_size, count)
        _, (offset, *_), (*_, segment_end) = spans[:, done:until]
        scores_2N = torch.zeros(2, segment_end - offset, device=ranks.device)
        own = np.array_split(spans[:, done:until], ranks.world_size, axis=1)[ranks.rank]
        for i in range(0, own.shape[1], batch):
            some = own[:, i : i + batch]
            if count > batch:
                some = repeat_last_window(some, batch)  # batches of one shape need one graph
            for targets, scores_2n in score_windows(trunk, model, tokens, some, length, stride):
                scores_2N[:, targets - offset] = scores_2n

        scores_2N = ranks.sum_over_ranks(scores_2N)
        if ranks.rank:
            scores_2N = scores_2N[:, :0]
        yield scores_2N.cpu().numpy().copy()  # a view would keep the whole alive
        done = until
        batches = min(2 * batches, SEGMENT_BATCHES)


def repeat_last_window(spans: ndarray, count: int):
    """`spans` filled up to `count` windows with copies of the last one that score nothing."""
    missing = count - spans.shape[1]
    padded = np.pad(spans, ((0, 0), (0, missing)), "edge")
    padded[1, spans.shape[1] :] = padded[2, -1]
    return padded


def score_windows(trunk: Callable, model, tokens, spans: ndarray, length: int, stride: int):
    """Yields (targets (n,), scores (2, n)), on the device, of what these windows score. Only the
    positions that may be scored go through the last block's queries and the output head."""
    device = model.embed.weight.device
    starts, firsts, _ = spans
    reaches_back = (starts + length - firsts).max()  # to the first scored target, from the end
    last = min(stride, length) if reaches_back <= stride else length
    if last == length:  # whole windows are few: a graph of theirs would not pay for itself
        trunk = model.hidden

    targets, scored = window_targets(spans, length)
    ids_BT = torch.from_numpy(tokens[targets].astype(np.int64)).to(device)
    hidden_ND = trunk(ids_BT, last=last).flatten(0, 1)
    targets, scored = targets[:, -last:], scored[:, -last:]
    rows = torch.from_numpy(np.flatnonzero(scored)).to(device)
    next_tokens = torch.from_numpy(tokens[targets[scored] + 1].astype(np.int64)).to(device)
    targets = torch.from_numpy(targets[scored]).to(device)
    size = max(1, HEAD_LOGITS // model.hp.vocab_size)
    for r, t, v in zip(rows.split(size), targets.split(size), next_tokens.split(size)):
        yield t, model.scores(hidden_ND[r], v)


# --- 11. Test-time training ---------------------
# Score first, then learn (PR #825): a chunk of the stream is scored with an average of the weights,
# and only then may the weights learn from it, for the chunks to come. Off by default.

TTT_BATCH = 32  # sequences per step, over all ranks


def ttt_scale(done: float):
    """Factor of TTT_LR at a share of the stream: a cosine to 0, times 1 to 3 in the first 30 %."""
    rise = 1 + 2 * min(1.0, done / 0.3)
    return rise * (1 + math.cos(math.pi * done)) / 2


def ttt_batches(validation, begin: int, end: int, length: int, ranks):
    """Yields this rank's (ids, targets, weights), (B, T) each: the targets [begin, end) in
    sequences that do not overlap, TTT_BATCH at once over all ranks, weighted by their bytes."""
    length = min(length, end)
    spans = windows(begin, end, length, length)
    for some in np.array_split(spans, -(-spans.shape[1] // TTT_BATCH), axis=1):
        missing = -some.shape[1] % ranks.world_size
        padded = repeat_last_window(some, some.shape[1] + missing)  # as many for each rank
        targets, scored = window_targets(padded, length)
        weights = validation.target_bytes[targets] * scored
        weights = (weights / max(weights.sum(), 1)).astype(np.float32)
        ids = validation.tokens[targets].astype(np.int64)
        next_ids = validation.tokens[targets + 1].astype(np.int64)
        shares = (np.split(x, ranks.world_size)[ranks.rank] for x in (ids, next_ids, weights))
        yield tuple(torch.from_numpy(share).to(ranks.device) for share in shares)


def ttt_parameters(model):
    """What learns: the last TTT_BLOCKS blocks, all vectors, the output head; the rest is frozen."""
    hp = model.hp
    first = max(0, hp.num_layers - hp.ttt_blocks)
    blocks = tuple(f"blocks.{i}." for i in range(first, hp.num_layers))
    head = "embed.weight" if hp.tie_embeddings else "head.weight"
    tuned = []
    for name, p in model.named_parameters():
        learns = name == head or name.startswith(blocks) or parameter_kind(name) == "vector"
        p.requires_grad_(learns)
        if learns:
            tuned.append(p)
    return tuned


def score_and_learn(trainer, stride: int):
    """Yields segments as `score_stream` does, each a chunk, scored by an average of the weights,
    which learn from it when the next is asked for. In the end all weights are as before.
    Collective."""
    hp, ranks, model, validation = trainer.hp, trainer.ranks, trainer.model, trainer.validation
    total = validation.targets
    tuned = ttt_parameters(model)
    live = [p.data for p in tuned]  # what scores and what steps change, by turns
    initial, weights, mean = ([p.clone() for p in live] for _ in range(3))
    optimizer = torch.optim.AdamW(tuned, betas=(hp.beta1, hp.beta2), weight_decay=0.0, fused=True)
    try:
        for begin in range(0, total, hp.ttt_chunk_tokens):
            end = min(begin + hp.ttt_chunk_tokens, total)
            part = (begin, end)
            segments = score_stream(trainer.trunk, model, validation.tokens, stride, ranks, part)
            yield np.concatenate(list(segments), 1)
            if end == total:
                moved = sum((a - b).square().sum() for a, b in zip(weights, initial)).sqrt()
                trainer.log(f"ttt:score_first epochs:{hp.ttt_epochs} moved:{moved:.4f}")
                return

            torch._foreach_copy_(live, weights)
            optimizer.param_groups[0]["lr"] = hp.ttt_lr * ttt_scale(begin / total)
            for _ in range(hp.ttt_epochs):
                for batch in ttt_batches(validation, begin, end, hp.eval_seq_len, ranks):
                    ttt_step(trainer, optimizer, tuned, batch)
                    torch._foreach_lerp_(mean, live, 1 - hp.ttt_decay)
            torch._foreach_copy_(weights, live)
            torch._foreach_copy_(live, mean)
    finally:
        torch._foreach_copy_(live, initial)


def ttt_step(trainer, optimizer, tuned: list[nn.Parameter], batch):
    """One step on the byte-weighted loss of all ranks' batches, its gradient's norm at most 1."""
    ids, targets, weights = batch
    trainer.loss(trainer.model, ids, targets, None, weights).backward()
    flat = trainer.ranks.sum_over_ranks(nn.utils.parameters_to_vector(p.grad for p in tuned))
    flat *= (1 / (flat.norm() + 1e-6)).clamp_max(1)
    nn.utils.vector_to_parameters(flat, [p.grad for p in tuned])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- 12. Mixture --------------------------------
# The model's probabilities mixed with counts of what came before: fixed by the past alone, summing
# to 1. Counting is sorting: positions lie grouped by the n - 1 tokens before them, in stream order;
# sorting a group by its next token splits it into groups of n. So the counts of every order are
# exact, and are made while the GPUs score.

CHUNK = 1 << 18  # positions sorted at a time, so that what a sort touches stays in the cache
# Buckets of the online weights, the finest distinction first: the model's entropy in whole nats;
# a context's frequency in the document; its state: how far back it last came, its share of
# followers that were not new, its frequency.
BUCKETS = (6, 4, 3, 4, 8)
STATES = 3 * 4 * 8
FAR, FARTHER = 512, 2048  # tokens: what the model may still see, what it no longer sees
OFTEN = 255  # a context that came as often in its document, or oftener, has no counts of it
# By how often a context came in its document: never, once, 2 or 3 times, oftener; codes begin at 1.
LOCAL_OFFSET = STATES * np.array((0, 1, 2, 2, *[3] * (OFTEN - 3))) - 1
LARGEST_SURPRISE = 40.0  # nats; its cube is a uint16
PRIOR_WEIGHT = 60  # targets that a level of buckets is worth to the next finer one
ORDER_CENTERS = np.array((4.5, 4.2, 3.8, 3.5, 3.2, 3.0))  # nats, orders 2 ... 7, beyond (PR #825)
HASH_PRIMES = np.array((36313, 27191, 51647, 81929, 131071, 175447, 209591), np.uint64)


# Exact counts


def since_start(values: ndarray, first: ndarray):
    """`values` minus the value at the start of their run; `first` marks where runs start."""
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=len(first))
    return values - np.repeat(values[starts], lengths)


def sum_before(values: ndarray, first: ndarray):
    """The sum of the values before each in its run."""
    return since_start(np.cumsum(values) - values, first)


def sort_runs(keys: ndarray):
    """(order, first, prior): `order` brings equal keys together, in stream order; `first` marks
    where runs of them start; prior[t] is how many positions before t hold the same key. Key and
    position are packed into 64 bits, so that one in-place sort is stable."""
    index = np.arange(len(keys), dtype=np.uint32)
    bits = np.uint64(len(keys).bit_length())
    packed = keys.astype(np.uint64) << bits | index
    packed.sort()
    position_mask = ~(~np.uint64(0) << bits)
    order = (packed & position_mask).view(np.int64)
    np.right_shift(packed, bits, out=packed)  # drops the positions

    first = np.append(True, packed[1:] != packed[:-1])[: len(keys)]
    prior = np.empty_like(index)
    prior[order] = since_start(index, first)
    return order, first, prior


def floor_log2(x: ndarray):
    """floor(log2(x)), int32, read from a float32: exact for 1 <= x < 2^24."""
    return (x.astype(np.float32).view(np.int32) >> 23) - 127


def describe_contexts(t: ndarray, first: ndarray, pair: ndarray):
    """Given positions t grouped by context, and how often their token followed the context before:
    0 where the context is new, else 1 + its state, which knows the past alone: how often it came,
    which share of its followers was not new, how long ago it came."""
    seen = since_start(np.arange(len(t), dtype=np.int32), first)  # c(u)
    is_known = (pair > 0).astype(np.int32)
    known_before = since_start(np.cumsum(is_known, dtype=np.int32) - is_known, first)
    gap = np.diff(t, prepend=t[:1])

    often = np.maximum(seen, 1)
    frequency = np.minimum(floor_log2(often), 7)
    share_known = 4 * known_before // often  # 0 ... 3, as a context's first follower is new
    distance = (gap >= FAR).astype(np.int32) + (gap >= FARTHER)
    return np.where(seen, 1 + (distance * 4 + share_known) * 8 + frequency, 0)


def local_ranks(document: ndarray, first: ndarray):
    """uint8, of positions in runs, in stream order: how many of the run lie before in the same
    document, at most OFTEN."""
    first = first.copy()
    first[1:] |= document[1:] != document[:-1]
    ranks = since_start(np.arange(len(first), dtype=np.uint32), first)
    return np.minimum(ranks, OFTEN).astype(np.uint8)


def ngram_counts(tokens, highest: int, describe: bool = True):
    """Yields (pair, local, code) per position of `tokens`, uint16, for n = 1 ... `highest`.
    pair[t]: how many earlier positions end the same n-gram, that is c(u, v) of position t; its c(u)
    is the pair of n - 1 at t - 1. local[t]: the same within the document, at most OFTEN. code[t]:
    of `describe_contexts`, from n = 2. Without `describe`, local and code are empty."""
    order, first, pair = sort_runs(tokens)
    stream = tokens
    local = np.zeros(len(tokens) if describe else 0, np.uint8)
    code = np.zeros(0, np.uint8)
    if describe:
        document = document_numbers(tokens)
        local[order] = local_ranks(document[order], first)
        stream = document.astype(np.uint64)
        del document
        stream <<= np.uint64(16)  # in place: 62M tokens are 0.5 GB
        stream |= tokens
    yield pair.astype(np.min_scalar_type(pair.max()), copy=False), local, code

    # t holds positions, grouped by the n - 1 tokens before them; `first` marks where groups start.
    # What ends the stream is followed by nothing; it is the last of its group.
    is_followed = order < len(tokens) - 1
    t = order[is_followed].astype(np.uint32) + 1
    first = first[is_followed]
    del order, is_followed  # 62M tokens: 0.6 GB
    for _ in range(2, highest + 1):
        pair = np.zeros(len(tokens), np.uint32)
        local, code = np.zeros((2, len(local)), np.uint8)
        # The next n's t and first are written over this one's, which have been read by then.
        kept = 0
        for start, stop in chunks_of_groups(first):
            place = t[start:stop]
            begins = first[start:stop]
            document_and_token = stream[place]
            group = np.cumsum(begins, dtype=np.uint64)
            keys = group << np.uint64(16) | (document_and_token & 0xFFFF)
            by_token, next_begins, count = sort_runs(keys)
            pair[place] = count
            sorted_place = place[by_token]
            if describe:
                local[sorted_place] = local_ranks(document_and_token[by_token] >> 16, next_begins)
                code[place] = describe_contexts(place, begins, count)

            following = sorted_place + 1
            is_alone = next_begins & np.append(next_begins[1:], True)  # its counts stay 0
            keep = ~is_alone & (following < len(tokens))
            end = kept + np.count_nonzero(keep)
            t[kept:end] = following[keep]
            first[kept:end] = next_begins[keep]
            kept = end
        t = t[:kept].copy()
        first = first[:kept].copy()
        yield pair.astype(np.min_scalar_type(pair.max()), copy=False), local, code


def chunks_of_groups(first: ndarray):
    """Yields (start, stop) of chunks, of CHUNK positions and up to a group more, that end where a
    group ends. `first` is read beyond the current chunk only."""
    stop = 0
    while stop < len(first):
        start = stop
        rest = first[start + CHUNK :]
        stop = start + CHUNK + int(rest.argmax()) if rest.any() else len(first)
        yield start, stop


def document_numbers(tokens):
    """uint32: how many BOS lie before each position: so a BOS, as a target, still belongs to the
    document before it."""
    closes = tokens == BOS
    return np.cumsum(closes, dtype=np.uint32) - closes


def earlier_continuations(tokens, target: int, orders: range):
    """Yields (n, the positions of what followed the target's context of n - 1 tokens before it)
    for each n >= 2 of `orders` that knows any: recounted by looking at every position."""
    t = target + 1
    places = np.flatnonzero(tokens[: t - 1] == tokens[t - 1]) + 1
    for n in range(2, min(orders.stop, t + 2)):
        places = places[places >= n - 1]
        places = places[tokens[places - n + 1] == tokens[t - n + 1]]
        if n in orders and len(places):
            yield n, places


# Counts for backoff


class BackoffCounts:
    """Per target the longest gram whose context came at least NGRAM_MIN_COUNT times before: its
    `order` (0: none), `context` = c(u), `pair` = c(u, v). The choice never looks at the target."""

    def __init__(self, tokens, hp):
        self.tokens = tokens
        self.hp = hp
        self.orders = range(hp.ngram_min_order, hp.ngram_order + 1)
        targets = len(tokens) - 1
        self.order = np.zeros(targets, np.uint8)
        self.context = np.zeros(targets, np.uint32)
        self.pair = np.zeros(targets, np.uint32)
        for n, context, pair in self.levels():
            if n in self.orders:
                wins = context >= hp.ngram_min_count
                self.order[n - 2 :][wins] = n
                self.context[n - 2 :][wins] = context[wins]
                self.pair[n - 2 :][wins] = pair[wins]

    def levels(self):
        """Yields (n, c(u), c(u, v)), of the targets from n - 2 on: the first with a context."""
        lower = None  # the pairs of the order below
        counts = ngram_counts(self.tokens, self.hp.ngram_order, describe=False)
        for n, (pair, *_) in enumerate(counts, start=1):
            if lower is not None:
                yield n, lower[n - 2 : -1], pair[n - 1 :]
            lower = pair

    def continuations(self, target: int):
        """(c(u, v) of every v, c(u)) of a target that has an order, counted anew."""
        n = int(self.order[target])
        ((_, places),) = earlier_continuations(self.tokens, target, range(n, n + 1))
        return np.bincount(self.tokens[places], minlength=self.hp.vocab_size), len(places)


class HashedCounts(BackoffCounts):
    """The predecessors' counts, of contexts and of pairs in hash tables that know nothing of each
    other: a token that never followed may own a bucket that others have filled. What the quotients
    sum to over the vocabulary is the mass: they are no probabilities. A diagnostic."""

    def levels(self):
        for n in range(2, self.hp.ngram_order + 1):
            context, pair = (sort_runs(b)[2] for b in hash_buckets(self.tokens, n, self.hp))
            yield n, context, np.minimum(context, pair)

    @lru_cache(1)  # noqa: B019
    def buckets(self, n: int):
        """`hash_buckets` of the whole stream."""
        return hash_buckets(self.tokens, n, self.hp)

    def continuations(self, target: int):
        n = int(self.order[target])
        earlier = target + 2 - n  # targets that have a context of n - 1 tokens
        context_buckets, pair_buckets = (b[:earlier] for b in self.buckets(n))
        gram = self.tokens[earlier : target + 2]
        (bucket,), asked = hash_buckets(gram, n, self.hp, np.arange(self.hp.vocab_size))
        context = np.count_nonzero(context_buckets == bucket)
        filled = np.bincount(pair_buckets.view(np.int64), minlength=self.hp.ngram_buckets)
        return np.minimum(filled[asked.view(np.int64)], context), context

    def mass(self, targets: ndarray):
        """The mean mass at `targets`, all of which have an order; nan: there are none."""
        by_order = targets[np.argsort(self.order[targets], kind="stable")]
        counts = [self.continuations(target) for target in by_order]
        masses = [pairs.sum() / context for pairs, context in counts]
        return float(np.mean(masses)) if masses else math.nan


def hash_buckets(tokens, n: int, hp, following: ndarray | None = None):
    """(context bucket, pair bucket), uint64, of the targets from n - 2 on; the pair is that with
    the token `following`, by default the target's own (PR #889)."""
    hashed = np.zeros(max(len(tokens) - n + 1, 0), np.uint64)
    for k in range(n - 1):
        hashed ^= tokens[k : k + len(hashed)].astype(np.uint64) * HASH_PRIMES[k]
    if following is None:
        following = tokens[n - 1 :]
    last = following.astype(np.uint64) * HASH_PRIMES[n - 1]
    mask = np.uint64(hp.ngram_buckets - 1)
    return hashed & mask, (hashed ^ last) & mask


# Rules: how a model's p and counts become one. `mix` takes a block of targets; `distribution` is
# the same over the vocabulary, at a target of the block mixed last; `evidence` is the counts, which
# a prefix of the stream must reproduce.


class EntropyBackoff:
    """p = (1 - a) * model + a * c(u, v) / c(u) of the order that wins, where a rises with the
    model's entropy from ALPHA_MIN to ALPHA_MAX, half-way at 4 nats (PR #889, #806)."""

    def __init__(self, tokens, hp, counts: BackoffCounts | None = None):
        self.hp = hp
        self.counts = counts or BackoffCounts(tokens, hp)

    def center(self, order: ndarray):
        """The entropy, in nats, at which the weight is half-way."""
        return 4.0

    def weight(self, entropy, order: ndarray):
        """The counts' weight a; 0 where no order won."""
        rising = 1 / (1 + np.exp(-2 * (entropy.astype(np.float64) - self.center(order))))
        span = self.hp.alpha_max - self.hp.alpha_min
        return np.where(order > 0, self.hp.alpha_min + span * rising, 0.0)

    @staticmethod
    def blend(alpha, model, pair, context):
        return (1 - alpha) * model + alpha * pair / np.maximum(context, 1)

    def mix(self, begin: int, end: int, model: ndarray, entropy):
        """(p, order that matched) of the targets [begin, end), given the model's p and entropy."""
        block = slice(begin, end)
        order = self.counts.order[block]
        alpha = self.weight(entropy, order)
        return self.blend(alpha, model, self.counts.pair[block], self.counts.context[block]), order

    def distribution(self, target: int, model_V, entropy):
        """p of every token at `target`, given the model's distribution there."""
        order = self.counts.order[target]
        if not order:
            return model_V
        alpha = self.weight(entropy, order)
        return self.blend(alpha, model_V, *self.counts.continuations(target))

    def evidence(self):
        """Arrays along the stream."""
        return [self.counts.order, self.counts.context, self.counts.pair]


class OrderBackoff(EntropyBackoff):
    """The same, half-way at an entropy that falls with the order (PR #825)."""

    def center(self, order: ndarray):
        return ORDER_CENTERS[np.clip(order.astype(int) - 2, 0, len(ORDER_CENTERS) - 1)]


class Cache:
    """What the open document has said, each token as often as the model was surprised by it: the
    expert S(v) / S, where S(v) sums the cubes of the nats that v cost in this document. Names and
    terms of a document return oftener than the model expects; what it expected says nothing new."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.cubes = np.zeros(len(tokens), np.uint16)  # whole numbers: sums are exact in float64
        self.open = np.zeros(1 << 16)  # S(v) of the document in which the last block ended

    @staticmethod
    def surprise(nats):
        """How much a token counts that cost so many."""
        return np.rint(nats * nats * nats)

    def extend(self, begin: int, end: int, model: ndarray):
        """(S(v), S) at the targets [begin, end) and their tokens, from earlier targets alone."""
        token = self.tokens[begin + 1 : end + 1]
        opens = self.tokens[begin:end] == BOS  # a document
        cubes = self.surprise(np.minimum(-np.log(model), LARGEST_SURPRISE))
        self.cubes[begin + 1 : end + 1] = cubes

        order = np.argsort(token, kind="stable")
        by_token = token[order]
        document = np.cumsum(opens)[order]
        first = (by_token[1:] != by_token[:-1]) | (document[1:] != document[:-1])
        sorted_cubes = cubes[order]
        of_token = np.empty(len(token))
        of_token[order] = sum_before(sorted_cubes, np.append(True, first))
        of_all = sum_before(cubes, np.append(True, opens[1:]))

        starts = np.flatnonzero(opens)
        old = slice(starts[0] if len(starts) else None)  # the targets of the open document
        of_token[old] += self.open[token[old]]
        of_all[old] += self.open.sum()
        if len(starts):
            self.open[:] = 0
        new = slice(starts[-1] if len(starts) else 0, None)
        self.open += np.bincount(token[new], cubes[new], len(self.open))
        return of_token, of_all

    def distribution(self, target: int, V: int):
        """(S(v) of every token, S) at `target`, summed anew."""
        start = document_start(self.tokens, target)
        known = slice(start, target + 1)
        sums = np.bincount(self.tokens[known], self.cubes[known], V)
        return sums, sums.sum()


class OnlineChain:
    """A chain over the orders that begins with the model's p. First the document's `Cache`,

        p_1(v) = w0 * p(v) + w1 * S(v) / S,

    then, where u, the n - 1 tokens before v, has come before,

        p_n(v) = w0 * p_{n-1}(v) + w1 * c(u, v) / c(u) + w2 * d(u, v) / d(u).

    c counts in the stream, d in the document; where d knows nothing, c stands in. Each bucket of
    contexts has weights of its own, learned by EM from strictly earlier blocks. The last p_n and
    the model are weighed by their likelihood on all earlier targets (Bayes), which over the whole
    stream costs at most one bit more than the better of the two.
    """

    fading = 0.97  # what each block leaves of what the ones before taught

    def __init__(self, tokens, hp):
        self.tokens = tokens
        self.hp = hp
        self.orders = range(hp.ngram_min_order, hp.ngram_order + 1)
        counts = dict(enumerate(ngram_counts(tokens, hp.ngram_order), start=1))
        self.pairs = {n: pair for n, (pair, _, _) in counts.items()}
        self.locals = {n: local for n, (_, local, _) in counts.items()}
        self.codes = {n: code for n, (_, _, code) in counts.items() if n > 1}
        self.cache = Cache(tokens)
        # Targets that EM gave to each expert, by order; 1 is the cache's.
        self.credits = {n: np.zeros((3, *BUCKETS)) for n in self.orders}
        self.credits[1] = np.zeros((2, BUCKETS[0]))
        self.weights = {}  # (experts, buckets) of each order, for the block mixed last
        self.log_odds = 0.0  # of the last p_n against the model, by likelihood so far
        self.begin = 0  # of the block mixed last
        self.trust = np.empty(0)  # in the last p_n, for each target of that block

    @staticmethod
    def entropy_bucket(entropy):
        """The model's entropy in whole nats, int64."""
        return entropy.clip(0, BUCKETS[0] - 1).astype(np.int64)

    @staticmethod
    def bucket(code, local, entropy_bucket):
        """The index of the weights of a context with this code, which came `local` times in the
        document."""
        return entropy_bucket * (BUCKETS[1] * STATES) + LOCAL_OFFSET[local] + code

    @staticmethod
    def quotients(pair, context, local_pair, local_context):
        """What the two counting experts give; OFTEN stands for unknown counts of the document."""
        frequency = pair / context
        is_known = (local_context > 0) & (local_context < OFTEN)
        local_frequency = local_pair / np.maximum(local_context, np.uint8(1))
        return frequency, np.where(is_known, local_frequency, frequency)

    @staticmethod
    def parts(weights, lower, experts):
        """What `lower` and the experts give to the mixture, which is the sum."""
        return [w * p for w, p in zip(weights, (lower, *experts))]

    def mix(self, begin: int, end: int, model: ndarray, entropy):
        """(p, longest order that matched) of targets [begin, end), from which it then learns."""
        p = model.copy()
        order = np.zeros(end - begin, np.uint8)
        entropy_bucket = self.entropy_bucket(entropy)
        sums, total = self.cache.extend(begin, end, model)
        rows = np.flatnonzero(total)
        self.step(1, p, rows, entropy_bucket[rows], [sums[rows] / total[rows]])
        for n in self.orders:
            code = self.codes[n][begin + 1 : end + 1]
            rows = np.flatnonzero(code)
            context, local = (
                counts[n - 1][begin:end][rows] for counts in (self.pairs, self.locals)
            )
            pair, local_pair = (
                counts[n][begin + 1 : end + 1][rows] for counts in (self.pairs, self.locals)
            )
            bucket = self.bucket(code[rows], local, entropy_bucket[rows])
            self.step(n, p, rows, bucket, self.quotients(pair, context, local_pair, local))
            order[rows] = n

        log_odds = np.cumsum(np.append(self.log_odds, np.log(p / model)))
        self.log_odds = log_odds[-1]
        self.begin = begin
        self.trust = 1 / (1 + np.exp(-np.clip(log_odds[:-1], -500, 500)))
        return self.weigh(self.trust, p, model), order

    def step(self, n: int, p: ndarray, rows: ndarray, bucket: ndarray, experts):
        """Mix the experts into the rows of p, with weights from earlier blocks, then learn."""
        self.weights[n] = bucket_weights(self.credits[n])
        parts = self.parts([w[bucket] for w in self.weights[n]], p[rows], experts)
        total = sum(parts)
        p[rows] = total
        self.credits[n] *= self.fading
        for credit, part in zip(self.credits[n].reshape(len(parts), -1), parts):
            credit += np.bincount(bucket, part / total, len(credit))  # views of credits[n]

    @staticmethod
    def weigh(trust, p, model):
        return trust * p + (1 - trust) * model

    def distribution(self, target: int, model_V, entropy):
        """p of every token at `target`, of the block mixed last; its counts are counted anew."""
        V = len(model_V)
        entropy_bucket = self.entropy_bucket(entropy)
        p = model_V
        sums, total = self.cache.distribution(target, V)
        if total:
            p = sum(self.parts(self.weights[1][:, entropy_bucket], p, [sums / total]))
        start = document_start(self.tokens, target)
        for n, places in earlier_continuations(self.tokens, target, self.orders):
            local = np.uint8(min(np.count_nonzero(places >= start), OFTEN))
            pair, local_pair = (
                np.bincount(self.tokens[some], minlength=V)
                for some in (places, places[places >= start])
            )
            bucket = self.bucket(int(self.codes[n][target + 1]), local, entropy_bucket)
            experts = self.quotients(pair, len(places), local_pair, local)
            p = sum(self.parts(self.weights[n][:, bucket], p, experts))
        return self.weigh(self.trust[target - self.begin], p, model_V)

    def evidence(self):
        return [*self.pairs.values(), *self.locals.values(), *self.codes.values()]


def document_start(tokens, target: int):
    """The position after the last BOS before the target."""
    closes = np.flatnonzero(tokens[: target + 1] == BOS)
    return closes[-1] + 1 if len(closes) else 0


def bucket_weights(credits: ndarray):
    """(experts, buckets): posterior mean weights, given credits[expert, *BUCKETS]. The mean over
    coarser buckets is the Dirichlet prior of the finer; where nothing was seen, 0.98 for the first
    expert, the lower order."""
    levels = [credits]
    while levels[-1].ndim > 1:
        levels.append(levels[-1].sum(1))
    others = len(credits) - 1
    prior = np.array((0.98, *[0.02 / others] * others))
    for level in reversed(levels):
        posterior = (level + PRIOR_WEIGHT * prior) / (level.sum(0) + PRIOR_WEIGHT)
        prior = posterior[:, None]
    return posterior.reshape(len(credits), -1)


RULES = {"online": OnlineChain, "entropy": EntropyBackoff, "order": OrderBackoff}


# The mixture


def block_edges(total: int):
    """0 ... `total`: blocks that grow with the stream, from 64 targets to what a cache holds."""
    edges = [0]
    while edges[-1] < total:
        size = min(max(64, edges[-1] // 32), 1 << 16)
        edges.append(min(edges[-1] + size, total))
    return edges


class Mixture:
    """The model's scores mixed by a rule, block after block, in whatever pieces they arrive. For
    the audit, some targets' whole distributions are made."""

    def __init__(self, tokens, hp, rule=None):
        self.tokens = tokens
        self.hp = hp
        self.rule = rule or RULES[hp.ngram_alpha](tokens, hp)
        self.targets = len(tokens) - 1
        self.nll = np.empty(self.targets)  # nats, mixed
        self.order = np.zeros(self.targets, np.uint8)  # that knew the context; 0: none did
        self.edges = block_edges(self.targets)
        self.block = 0  # the next one
        places = [f(1, max(self.targets, 1), 16) for f in (np.geomspace, np.linspace)]
        self.samples = np.unique(np.concatenate(places).astype(np.int64)) - 1
        self.enumerated = {}  # sampled target -> (what its distribution sums to, p of the target)

    def extend(self, nll, entropy):
        """Mix every complete block of the first len(nll) targets. RuntimeError: not finite."""
        complete = np.searchsorted(self.edges, len(nll), "right")
        for begin, end in pairwise(self.edges[self.block : complete]):
            is_finite = np.isfinite(nll[begin:end] + entropy[begin:end]).all()
            problem = f"scores of targets {begin} to {end} are not finite: the model has diverged"
            require(is_finite, problem, RuntimeError)
            model = np.exp(-np.minimum(nll[begin:end].astype(np.float64), 690))
            p, self.order[begin:end] = self.rule.mix(begin, end, model, entropy[begin:end])
            self.nll[begin:end] = -np.log(p)
            self.block += 1
            for target in self.samples[(begin <= self.samples) & (self.samples < end)].tolist():
                self.enumerate(target, model[target - begin], entropy[target])

    def enumerate(self, target: int, p_target: float, entropy):
        """Make the mixed distribution at `target`: the model's rest is spread evenly."""
        V = self.hp.vocab_size
        token = self.tokens[target + 1]
        model_V = np.full(V, (1 - p_target) / (V - 1))
        model_V[token] = p_target
        p_V = self.rule.distribution(target, model_V, entropy)
        self.enumerated[target] = p_V.sum(), p_V[token]

    def audit(self):
        """Facts for the log. RuntimeError: a sampled distribution does not sum to 1, or does not
        give its target what was scored, or a prefix of the stream has other counts."""
        faults = []
        for target, (mass, p) in self.enumerated.items():
            nll = self.nll[target]
            if abs(mass - 1) > 1e-9 or abs(nll + math.log(p)) > 1e-9:
                faults.append(f"{target}: mass {mass}, p {p}, scored {nll} nats")
        prefix = self.tokens[: 1 << 14]
        alone = type(self.rule)(prefix, self.hp)
        for some, full in zip(alone.evidence(), self.rule.evidence()):
            if not np.array_equal(some, full[: len(some)]):
                faults.append("the counts of a prefix differ alone")
        require(not faults, f"the mixture is no code; targets {'; '.join(faults)}", RuntimeError)

        masses = [mass for mass, _ in self.enumerated.values()]
        recounted = sum(self.order[target] > 0 for target in self.enumerated)
        return (
            f"targets:{self.edges[self.block]}/{self.targets} mass_min:{min(masses):.12f} "
            f"mass_max:{max(masses):.12f} recounted:{recounted} enumerated:{len(masses)} "
            f"prefix:{len(prefix) - 1}"
        )


# --- 13. main -----------------------------------
# Train -> average -> fit and pack -> write -> read back -> score -> mix -> report.

FALLBACK_STRIDES = (96, 128, 256, 512, 1024, 2048)
ENTROPY_EDGES = (0, 0.5, 1, 1.5, 2, 3, 4, 5, math.inf)  # nats, of the calibration table


def log_header(trainer):
    """What repeats the run: this source, versions, hardware, data, every setting."""
    hp, loader, log = trainer.hp, trainer.loader, trainer.log
    source = Path(__file__).read_text(encoding="utf-8")
    versions = (
        f"python:{platform.python_version()} torch:{torch.__version__} cuda:{torch.version.cuda} "
        f"numpy:{np.__version__} platform:{platform.platform()}"
    )
    files = {"train": loader.paths[0]} if loader else {}
    files |= {"val": find_shards("val", hp)[0], "tokenizer": Path(hp.tokenizer_path)}
    lines = [source, "=" * 100, versions]
    for part, path in files.items():
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"data:{part} first:{path} sha256:{checksum}")
    lines += [f"{name}={value}" for name, value in hp.as_env().items()]
    log("\n".join(lines), console=False)

    device = f"{platform.processor() or platform.machine()} CPU"
    if trainer.ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    attention, _ = find_flash_attention()
    log(
        f"hardware:{trainer.ranks.world_size} x {device} threads:{torch.get_num_threads()} "
        f"cores:{os.cpu_count()} attention:{attention} "
        f"accumulation:{loader.accumulation if loader else 0}"
    )
    validation = trainer.validation
    log(
        f"train_tokens:{loader.tokens if loader else 0} val_targets:{validation.targets} "
        f"val_bytes:{validation.target_bytes.sum()}"
    )


def report_mixture(trainer, mixture, nll, entropy, added: float):
    """Audit the mixture, log what it did to the neural scores (nats)."""
    hp, log, target_bytes = trainer.hp, trainer.log, trainer.validation.target_bytes
    log(f"ngram_audit {mixture.audit()}")
    for low, high in pairwise(ENTROPY_EDGES):
        inside = (low <= entropy) & (entropy < high)
        if inside.any():  # a calibrated model's nll is what it expects
            log(
                f"calibration entropy:{low}-{high} targets:{inside.sum()} "
                f"expected:{entropy[inside].mean():.4f} nll:{nll[inside].mean():.4f} "
                f"mixed:{mixture.nll[inside].mean():.4f}"
            )
    gain = np.bincount(mixture.order, nll - mixture.nll) / math.log(2) / target_bytes.sum()
    for n, count in zip(*np.unique(mixture.order, return_counts=True)):
        log(f"ngram_order order:{n} targets:{count} gain:{gain[n]:.8f}")

    bpb = bits_per_byte(mixture.nll, target_bytes)
    log(
        f"final_ngram_exact val_loss:{mixture.nll.mean():.8f} val_bpb:{bpb:.8f} "
        f"gain:{bits_per_byte(nll, target_bytes) - bpb:.8f} "
        f"orders:{hp.ngram_min_order}-{hp.ngram_order} counts:exact alpha:{hp.ngram_alpha} "
        f"added_time:{1e3 * added:.0f}ms"
    )


def report_hashed(trainer, nll, entropy):
    """Log what the predecessors would have reported, and the mass that makes it no score."""
    hp, validation = trainer.hp, trainer.validation
    counts = HashedCounts(validation.tokens, hp)
    mixture = Mixture(validation.tokens, hp, RULES[hp.ngram_alpha](validation.tokens, hp, counts))
    mixture.samples = mixture.samples[:0]  # it is no code: there is nothing to audit
    mixture.extend(nll, entropy)
    mass = counts.mass(np.flatnonzero(counts.order)[-32:])
    trainer.log(
        f"final_ngram_hashed pseudo_bpb:{bits_per_byte(mixture.nll, validation.target_bytes):.8f} "
        f"mass:{mass:.2f} orders:{hp.ngram_min_order}-{hp.ngram_order} counts:hashed "
        f"alpha:{hp.ngram_alpha} (not a probability: it sums to the mass)"
    )


def score_in_time(trainer, began: float):
    """(stride, segments) of the first of EVAL_STRIDE and wider ones that, at the speed of its third
    segment, ends within 95 % of EVAL_BUDGET_SECONDS after `began`, or of the last. Collective."""
    hp, tokens, targets = trainer.hp, trainer.validation.tokens, trainer.validation.targets
    wider = [s for s in FALLBACK_STRIDES if hp.eval_stride < s <= hp.eval_seq_len]
    strides = [hp.eval_stride, *wider]
    for stride in strides:
        if hp.ttt_epochs:
            segments = score_and_learn(trainer, stride)
        else:
            segments = score_stream(trainer.trunk, trainer.model, tokens, stride, trainer.ranks)
        held = list(islice(segments, 2))  # the first ones compile
        third_began = perf_counter()
        held += islice(segments, 1)
        now = perf_counter()

        done = sum(part.shape[1] for part in held)
        seconds_per_target = (now - third_began) / max(held[-1].shape[1], 1)
        projected = now - began + seconds_per_target * (targets - done)
        budget = f"budget:{hp.eval_budget_seconds:g}s"
        trainer.log(f"eval_budget projected:{projected:.1f}s {budget} stride:{stride}")
        is_late = 0 < 0.95 * hp.eval_budget_seconds < projected and done < targets
        (must_widen,) = trainer.ranks.sum_numbers(is_late and trainer.ranks.rank == 0)
        if not must_widen or stride == strides[-1]:
            return stride, chain(held, segments)
        segments.close()


def evaluate(trainer, size: int, began: float):
    """Score the stream with the model that was read back, mix while it scores, report. `size`:
    bytes of the submission; `began`: when training ended. Collective."""
    hp, ranks, log, validation = trainer.hp, trainer.ranks, trainer.log, trainer.validation
    worker = concurrent.futures.ThreadPoolExecutor(1)
    counted = None  # the Mixture, counted by the worker
    if hp.ngram_enabled and ranks.rank == 0:
        counted = worker.submit(Mixture, validation.tokens, hp)
    log_validation(trainer, f"final_int{hp.quant_bits}_roundtrip")

    scoring_began = perf_counter()
    stride, segments = score_in_time(trainer, began)
    progress = Progress(log, "scoring", validation.targets)  # from here on nothing compiles
    scores_2N = np.empty((2, 0 if ranks.rank else validation.targets), np.float32)
    done = 0
    for segment in segments:
        end = done + segment.shape[1]
        scores_2N[:, done:end] = segment
        done = end
        progress(done)
        if counted:
            # what fails in one call fails in the next again
            mixed = worker.submit(lambda part: counted.result().extend(*part), scores_2N[:, :done])
    if ranks.rank:
        return  # the rest is rank 0's

    scored = perf_counter()
    nll, entropy = scores_2N
    neural_bpb = bits_per_byte(nll, validation.target_bytes)
    log(
        f"final_int{hp.quant_bits}_sliding_window_exact val_loss:{nll.mean(dtype=float):.8f} "
        f"val_bpb:{neural_bpb:.8f} stride:{stride} eval_time:{1e3 * (scored - scoring_began):.0f}ms"
    )
    arrays = {"nll": nll, "entropy": entropy}
    nats = {"neural": nll}
    if counted:
        mixed.result()
        mixture = counted.result()
        added = perf_counter() - scored
        report_mixture(trainer, mixture, nll, entropy, added)
        arrays["mixed"] = mixture.nll.astype(np.float32)
        nats["mixed"] = mixture.nll
        if hp.ngram_counts == "hashed":
            report_hashed(trainer, nll, entropy)

    seconds = perf_counter() - began
    log(f"total_eval_time:{seconds:.1f}s budget:{hp.eval_budget_seconds:g}s stride:{stride}")
    report_run(trainer, size, seconds, stride, nats)
    if hp.save_scores:
        settings = json.dumps(hp.as_env())
        path = log.path.with_name(f"{log.path.stem}_scores.npz")
        try:
            replace_file(path, lambda file: np.savez(file, settings=settings, **arrays))
        except UserError as error:
            log(f"warning: {error}")


def report_run(trainer, size: int, seconds: float, stride: int, nats: dict[str, ndarray]):
    """End the log: a screen for people, then one line for programs, a key per number with its unit
    in the name, rounded as in the lines above. `size`: bytes of the submission; `seconds`: of the
    evaluation; `nats`: per target, "neural" and, unless it is off, "mixed"."""
    hp, log, target_bytes = trainer.hp, trainer.log, trainer.validation.target_bytes
    bpb = {name: bits_per_byte(scored, target_bytes) for name, scored in nats.items()}
    mixed = f"{bpb['mixed']:.4f} bpb" if "mixed" in bpb else "off"
    log(
        f"\n  neural {bpb['neural']:.4f} bpb, mixed with exact counts of the past {mixed}\n"
        f"  artifact {size:,} bytes of {SIZE_CAP:,}, code included; {log.path}\n"
        f"  training {trainer.seconds:.1f} s, {trainer.steps} steps; evaluation {seconds:.1f} s"
    )
    if hp.save_scores and "mixed" in bpb:
        log("  the text, coloured by what each token cost and what the counts saved: make view")

    result = {
        "seed": hp.seed,
        "steps": trainer.steps,
        "train_seconds": round(1e3 * trainer.seconds) / 1e3,
        "eval_seconds": round(seconds, 1),
        "stride_tokens": stride,
        "code_bytes": code_size(),
        "submission_bytes": size,
    }
    for name, scored in nats.items():
        result[f"{name}_nats_per_token"] = round(float(scored.mean(dtype=float)), 8)
        result[f"{name}_bits_per_byte"] = round(float(bpb[name]), 8)
    if "mixed" in bpb:
        result["gain_bits_per_byte"] = round(float(bpb["neural"] - bpb["mixed"]), 8)
    log(f"result {json.dumps(result)}", console=False)


def log_validation(trainer, name: str):
    """Validate, and log it with all digits. Collective."""
    loss, bpb = trainer.validate()
    trainer.log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def prepare(hp, ranks, log, stop):
    """Find all data, the same on every rank, and make the model. Collective. UserError: cannot."""
    torch.manual_seed(hp.seed)
    loader = None if hp.eval_only else TokenLoader(hp, ranks.rank, ranks.world_size)
    validation = load_validation(hp)
    ranks.require_equal(
        {
            "train_gpt.py": Path(__file__).read_bytes(),
            "settings": hp,
            "torch": torch.__version__,
            "NumPy": np.__version__,  # draws the order of the training windows
            "data files": fingerprint(hp),
        }
    )
    return Trainer(GPT(hp).to(ranks.device), loader, validation, ranks, log, stop)


def run(trainer):
    """From initial weights, or a checkpoint, or an artifact, to the score. Collective."""
    hp, ranks, log = trainer.hp, trainer.ranks, trainer.log
    trainer.restore(hp.resume)
    path = Path(hp.eval_only or f"final_model.int{hp.quant_bits}.ptz")
    began = perf_counter()
    if not hp.eval_only:
        train(trainer)
        began = perf_counter()
        log_validation(trainer, "final_float")  # of the weights that are packed
        write_artifact(trainer.model, path, ranks, log, trainer.curvature)

    trainer.trunk = trainer.compile(trainer.model.hidden)  # now: evaluation's time counts it
    size = load_artifact(trainer.model, path, ranks, log)
    is_trained = not hp.eval_only
    if ranks.rank == 0 and is_trained and not hp.checkpoint_every:
        log.path.with_suffix(".ckpt").unlink(missing_ok=True)  # the artifact is whole
    evaluate(trainer, size, began)


def main(env: dict[str, str]):
    """One run of the script with the settings in `env`. UserError: what the user can mend."""
    hp = Hyperparameters.from_env(env)
    ranks = Ranks(env)
    stop = StopSignal()
    stop.install()
    run_id = hp.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}_seed{hp.seed}"
    log = RunLog(run_id, ranks.rank)
    try:
        trainer = prepare(hp, ranks, log, stop)
        if ranks.rank == 0:
            log_header(trainer)
        for warning in mistyped(env):
            log(f"warning: {warning}")
        run(trainer)
        ranks.barrier()
        ranks.close()
        log.close()
    except BaseException as error:
        # The group stays open, so that the others wait; no signal cuts short what is said now.
        stop.patient = True
        error = explained(error, env, stop)
        log(f"error: {type(error).__name__}: {error}", console=False)
        raise error from None


def explained(error: BaseException, env: dict[str, str], stop):
    """The error that a user should see for `error`."""
    if "gloo/transport" in str(error):  # connection closed, reset, pipe broken ...
        signalled = f"; {stop.name} came" if stop.name else ""
        error = UserError(f"another rank ended, see what it said{signalled}")
    if type(error) is UserError:
        error = UserError("; ".join([str(error), *mistyped(env)]))
    return error


def leave(error: BaseException | None, rank: int):
    """End the process, with one line for an error that a user can mend: rank 0's; the others wait
    for torchrun to stop them. Not sys.exit: gloo's threads may crash Python's shutdown."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, once rank 0 has spoken
    is_told_by_rank_0 = rank > 0 and isinstance(error, Stopped)
    if error is not None and not is_told_by_rank_0:
        if rank:
            time.sleep(5)
        if isinstance(error, (UserError, OSError)):
            speaker = f"rank {rank}: " if rank else ""
            print(f"train_gpt.py: error: {speaker}{error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
    os._exit(1 if error else 0)


def start(env: dict[str, str]):
    """`main`, then leave the process, whatever came of it."""
    rank = int(env.get("RANK", 0))
    try:
        main(env)
        leave(None, rank)
    except BaseException as error:
        leave(error, rank)


if __name__ == "__main__":
    start(dict(os.environ))
