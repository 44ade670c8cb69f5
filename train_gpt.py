"""Parameter Golf: train a small GPT, pack it into 16 MB, score a stream with a mixture that is a code.

    make demo                                                 laptop CPU, nothing to download
    torchrun --standalone --nproc_per_node=8 train_gpt.py     8xH100, FineWeb under DATA_PATH
    SEED=42 EVAL_STRIDE=256 torchrun ...                      settings are environment variables (section 1)

One token's life, from the top of this file to its bottom:

    shard -> TokenLoader -> GPT -> loss -> Muon / AdamW -> WeightAverage   it teaches the model      (3-7, 11)
    weights -> int6 codes -> container -> file -> weights again            what is read back is scored     (8)
    validation stream -> windows -> nll[t], entropy[t] per target          each target once                (9)
    the same stream -> exact counts of the past -> mixture -> nll'[t]      a probability at every t       (10)
    sum(nll') / ln 2 / sum(bytes)                                          the score                      (12)

Shape suffixes: B batch, T position, D model width, H query heads, G key/value heads, K head width,
V vocabulary, N any flat number of positions, R x C a matrix. Losses are nats per token until `bits_per_byte`.
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import math
import os
import platform
import signal
import struct
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import timedelta
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SIZE_CAP = 16_000_000          # bytes, decimal: code + compressed weights (the challenge's rule)
WIDER_STRIDES = (96, 128, 256)  # tried in turn when scoring would not end in time

class UserError(Exception):
    """What a user can mend. The message is one line: what was found, what was expected, what to do."""

class Stopped(UserError):
    """A signal ended the run."""

# --- 1. Hyperparameters -------------------------------------------------------------------------------------
# The only place that reads the environment. What cannot work is refused, in one line, before data is touched.

def setting(default, doc: str, low=None, high=None, choices=None):
    return field(default=default, metadata=dict(doc=doc, low=low, high=high, choices=choices))

@dataclass(frozen=True)
class Hyperparameters:
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    train_data_path: str = setting("", "another folder for the training shards; empty: DATA_PATH")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece, to count bytes")
    run_id: str = setting("", "name of logs/<RUN_ID>.txt; empty: date, time and seed")
    seed: int = setting(1337, "seed of the initial weights", 0)
    eval_only: str = setting("", "score this final_model.int6.ptz and train nothing")
    resume: str = setting("", "go on from this logs/<RUN_ID>.ckpt")
    checkpoint_every: float = setting(0.0, "seconds between checkpoints; 0: at the end and on SIGTERM only", 0)
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    # training length and batches
    iterations: int = setting(20_000, "most training steps", 1)
    max_wallclock_seconds: float = setting(600.0, "most training time; 0: no limit", 0)
    warmdown_iters: int = setting(3500, "length of the final linear decay, in steps' worth of time", 0)
    warmup_steps: int = setting(20, "untimed steps that compile both graphs (at least 2), then undone", 0)
    train_batch_tokens: int = setting(786_432, "tokens per step, over all ranks", 1)
    micro_batch_tokens: int = setting(98_304, "most tokens of one forward and backward pass on one rank", 1)
    train_seq_len: int = setting(2048, "tokens per training sequence", 1)
    train_log_every: int = setting(500, "steps between train_loss lines; 0: only the first ten", 0)
    # model
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
    qk_gain_init: float = setting(1.5, "initial per-head gain of the queries")
    xsa_last_n: int = setting(4, "last layers whose heads drop the part along their own value (XSA)", 0)
    ln_scale: bool = setting(True, "scale a block's normed inputs by 1/sqrt(layer + 1)")
    unet_skips: bool = setting(True, "U-Net skips from the first half of the blocks to the second")
    smear_enabled: bool = setting(True, "SmearGate: mix each position's input with the one before")
    ve_enabled: bool = setting(True, "shared value embedding, added to the values of VE_LAYERS")
    ve_dim: int = setting(128, "width of the value embedding", 1)
    ve_layers: tuple[int, ...] = setting((9, 10), "layers (from 0) that receive it, comma-separated")
    vrl_enabled: bool = setting(True, "value residual: mix each layer's values with layer 0's (VRL)")
    bigram_vocab_size: int = setting(2048, "rows of the hashed bigram embedding; 0: none", 0)
    bigram_dim: int = setting(128, "width of the hashed bigram embedding", 1)
    # optimizer
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
    adam_wd: float = setting(0.04, "AdamW decoupled weight decay", 0)
    beta1: float = setting(0.9, "AdamW beta1", 0, 1)
    beta2: float = setting(0.95, "AdamW beta2", 0, 1)
    adam_eps: float = setting(1e-8, "AdamW epsilon", 0)
    grad_clip_norm: float = setting(0.3, "largest gradient norm; 0: no clipping", 0)
    # averaging, quantisation, artifact
    averaging: str = setting("ema", "weights that are packed", choices=("none", "ema", "swa", "ema_swa"))
    ema_decay: float = setting(0.997, "decay per step of the exponential average", 0, 1)
    swa_every: int = setting(50, "steps between snapshots of the uniform average", 1)
    swa_threshold: float = setting(0.2, "snapshots start once the lr scale is below this", 0, 1)
    late_qat_threshold: float = setting(0.15, "lr scale below which fake quantisation starts; 0: never", 0)
    quant_bits: int = setting(6, "bits of the matrices' codes before fitting, and late QAT's", 3, 8)
    fill_budget: bool = setting(True, "spend the bytes that are left on finer codes, up to 8 bits")
    # scoring
    eval_seq_len: int = setting(2048, "tokens per scoring window", 1)
    eval_stride: int = setting(64, "new targets per window of the final score", 1)
    eval_budget_seconds: float = setting(600.0, "everything after training; a wider stride is taken to keep "
                                         "95 % of it; 0: never", 0)
    val_loss_every: int = setting(4000, "steps between validations during training; 0: only the last", 0)
    val_batch_size: int = setting(524_288, "tokens per scoring batch, over all ranks", 1)
    save_scores: bool = setting(False, "write nll, entropy, mixed nll per target to logs/<RUN_ID>_scores.npz")
    # n-gram mixture
    ngram_enabled: bool = setting(True, "mix the model with counts of what came before in the stream")
    ngram_min_order: int = setting(2, "shortest gram (context + target)", 2, 16)
    ngram_order: int = setting(7, "longest gram", 2, 16)
    ngram_alpha: str = setting("online", "weight of the counts: learned on the way; by PR #889; by PR #825",
                               choices=("online", "entropy", "order"))
    ngram_min_count: int = setting(2, "times a context must occur before its order may win; not online", 1)
    alpha_min: float = setting(0.05, "weight where the model is sure; not online", 0, 1)
    alpha_max: float = setting(0.60, "weight where the model is lost; not online", 0, 1)
    ngram_counts: str = setting("exact", "hashed: as the predecessors', no code", choices=("exact", "hashed"))
    ngram_buckets: int = setting(4_194_304, "buckets of each hashed table, a power of two", 2, 2 ** 30)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @classmethod
    def from_env(cls, env: dict[str, str]) -> Hyperparameters:
        """Typed, checked settings from `env`; UserError names the variable, its value, what it may hold."""
        return cls(**{f.name: parse_setting(f, env[f.name.upper()])
                      for f in fields(cls) if f.name.upper() in env})

    def __post_init__(self) -> None:
        """Refuse settings that cannot work together, with the first rule that they break."""
        T, last, power = self.train_seq_len, self.num_layers - 1, 1 << self.ngram_buckets.bit_length()
        sequences, hashed = self.train_batch_tokens / T, self.ngram_counts == "hashed"
        for ok, names, rule in (
            (self.model_dim % self.num_heads == 0, "model_dim num_heads", "the heads must divide the width"),
            (self.num_heads % self.num_kv_heads == 0, "num_heads num_kv_heads", "the latter must divide"),
            (self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim, "rope_dims",
             f"expected an even number up to the head width MODEL_DIM/NUM_HEADS = {self.head_dim}"),
            (int(self.mlp_mult * self.model_dim) >= 1, "mlp_mult", "the MLP would have no units"),
            (self.xsa_last_n <= self.num_layers, "xsa_last_n num_layers", "there are not so many layers"),
            (not self.ve_enabled or all(0 <= i <= last for i in self.ve_layers), "ve_layers",
             f"layers run from 0 to {last}; name some of those or set VE_ENABLED=0"),
            (self.bigram_vocab_size != 1, "bigram_vocab_size", "expected 0 (off) or at least 2"),
            (sequences.is_integer(), "train_batch_tokens train_seq_len",
             f"expected a multiple; nearest are {math.floor(sequences) * T} and {math.ceil(sequences) * T}"),
            (self.eval_stride <= self.eval_seq_len, "eval_stride eval_seq_len", "targets would go unscored"),
            (self.ngram_min_order <= self.ngram_order, "ngram_min_order ngram_order", "no order is left"),
            (not hashed or self.ngram_alpha != "online" and self.ngram_order <= 7,
             "ngram_counts ngram_alpha ngram_order",
             "hashed counts are the predecessors': set NGRAM_ALPHA=entropy or order, NGRAM_ORDER up to 7"),
            (2 * self.ngram_buckets == power, "ngram_buckets", f"expected a power of two, such as {power}"),
            (self.alpha_min <= self.alpha_max < 1, "alpha_min alpha_max", "expected the first <= second < 1"),
        ):
            if not ok:
                found = ", ".join(f"{name}={self.as_env()[name]}" for name in names.upper().split())
                raise UserError(f"{found}: {rule}")

    def as_env(self) -> dict[str, str]:
        """All settings as they would be written in the environment."""
        return {name.upper(): ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                for name, value in vars(self).items()}

PARSERS = {  # by the type of a setting's default: how to read it, what to expect
    str: (str, "text"), int: (int, "an integer"), float: (float, "a number"),
    bool: (lambda text: {"0": 0, "false": 0, "1": 1, "true": 1}[text.strip().lower()] == 1, "0 or 1"),
    tuple: (lambda text: tuple(int(i) for i in text.split(",") if i.strip()), "comma-separated integers")}

def parse_setting(f, text: str):
    """The value of field `f` in `text`, of the type of its default, within its bounds."""
    (parse, expected), bounds, name = PARSERS[type(f.default)], f.metadata, f.name.upper()
    try:
        value = parse(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        raise UserError(f"{name}={text!r}: expected {expected} (default {f.default!r})") from None
    if bounds["choices"] and value not in bounds["choices"]:
        raise UserError(f"{name}={text!r}: expected one of {', '.join(bounds['choices'])}")
    for sign, bound, word in ((1, bounds["low"], "least"), (-1, bounds["high"], "most")):
        if bound is not None and sign * value < sign * bound:
            raise UserError(f"{name}={text}: expected at {word} {bound}")
    return value

def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]

def mistyped(env: dict[str, str]) -> list[str]:
    """Warnings for environment names that are within edit distance 2 of a setting but are none."""
    known = {f.name.upper() for f in fields(Hyperparameters)}
    near = ((name, min((edit_distance(name, k), k) for k in known)) for name in sorted(set(env) - known))
    return [f"{name} is set but is no setting; did you mean {k}?" for name, (far, k) in near if far <= 2]

# --- 2. Runtime ---------------------------------------------------------------------------------------------
# All that knows of other ranks: on one rank each method is the identity, so laptop and cluster run the same
# lines. What is on the CPU travels by gloo: agreeing on the clock never waits for a GPU.

REDUCE_SCATTER, ALL_GATHER = (getattr(dist, new, None) or getattr(dist, old) for new, old in (  # torch 2.13
    ("reduce_scatter_single", "reduce_scatter_tensor"), ("all_gather_single", "all_gather_into_tensor")))

class Runtime:
    """This process among the others, its device and its log. Without `run_id` it writes nothing."""

    def __init__(self, run_id: str, env: dict[str, str]):
        """Joins the process group that torchrun put in `env`; rank 0 opens logs/<run_id>.txt, always new."""
        self.rank, self.world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank, gpus = int(env.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        cuda = torch.cuda.is_available()
        if cuda and local_rank >= gpus:
            raise UserError(f"LOCAL_RANK={local_rank}, {gpus} GPUs are visible: set --nproc_per_node={gpus}")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        self.previous_step, self.log_path, self.unwritten = None, None, b""
        self.stopped, self.patient = "", False  # the signal that came; it waits for the end of the step
        for number in (signal.SIGTERM, signal.SIGINT) if run_id else ():
            signal.signal(number, self.stop)
        names = (f"logs/{run_id}{suffix}.txt" for suffix in ("", *(f"_{i}" for i in range(2, 10_000))))
        while run_id and self.rank == 0 and not self.log_path:
            os.makedirs("logs", exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.log_file = open(name := next(names), "xb", buffering=0)
                self.log_path = Path(name)

    def stop(self, number: int, frame) -> None:
        """On SIGTERM and SIGINT: training ends its step and leaves a checkpoint, all else ends here."""
        first, self.stopped = not self.stopped, signal.Signals(number).name
        if first and not self.patient:
            raise Stopped(f"stopped by {self.stopped}")

    def log(self, line: str, console: bool = True) -> None:
        """Rank 0 writes `line` to stdout and its log file at once: a run that dies leaves all it said. What
        a full disk does not take is tried again with every later line."""
        if not self.log_path:
            return
        self.unwritten += f"{line}\n".encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.log_file.write(self.unwritten):]
        except OSError as error:
            print(f"warning: {self.log_path}: {error.strerror}; the run goes on", file=sys.stderr, flush=True)
        if console:
            print(line, flush=True)

    def sum(self, x: Tensor) -> Tensor:
        """In-place sum of `x` over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def agree(self, *numbers: float) -> list[float]:
        """Sums over the ranks, by way of the CPU."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def from_rank_0(self, x: Tensor) -> Tensor:
        """`x` becomes rank 0's, in place."""
        if self.world_size > 1:
            dist.broadcast(x, 0)
        return x

    def start_sum(self, x: Tensor):
        """(`x`, which holds the sum over the ranks once the second, a function, was called)."""
        return x, dist.all_reduce(x, async_op=True).wait if self.world_size > 1 else lambda: None

    def start_scatter(self, x: Tensor):
        """(this rank's share of the first axis of the sum of `x` over the ranks, function that waits)."""
        if self.world_size == 1:
            return x, lambda: None
        share = x.new_empty(len(x) // self.world_size, *x.shape[1:])
        return share, REDUCE_SCATTER(share, x, async_op=True).wait

    def start_gather(self, share: Tensor):
        """(all ranks' shares, end to end along the first axis, function that waits)."""
        if self.world_size == 1:
            return share, lambda: None
        whole = share.new_empty(len(share) * self.world_size, *share.shape[1:])
        return whole, ALL_GATHER(whole, share, async_op=True).wait

    def compare(self, facts: dict[str, object]) -> None:
        """UserError that names the ranks whose `facts` are not rank 0's."""
        digests = [hashlib.sha256(repr(fact).encode()).digest() for fact in facts.values()]
        table_RF = torch.zeros(self.world_size, len(facts), dtype=torch.int64)
        table_RF[self.rank] = torch.tensor([int.from_bytes(d[:8], "big", signed=True) for d in digests])
        for name, column in zip(facts, self.sum(table_RF).T):
            if odd := (column != column[0]).nonzero().flatten().tolist():
                raise UserError(f"rank {', '.join(map(str, odd))}: {name} differ from rank 0's: start the same "
                                "files with the same settings everywhere")

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.agree(0)

    def pace(self) -> None:
        """Let the CPU run at most one step ahead of the GPU, so that the clock is right to within a step."""
        if self.device.type == "cuda":
            if self.previous_step:
                self.previous_step.synchronize()
            self.previous_step = torch.cuda.Event()
            self.previous_step.record()

    def close(self) -> None:
        """UserError: lines of the log that no later one could bring to the disk."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        if self.unwritten:
            raise UserError(f"{self.log_path}: its last {len(self.unwritten)} bytes found no space on the disk; "
                            "free some and keep what was printed")

def replace_file(path: Path, write) -> None:
    """`write(file)` aside, then rename: `path` is whole, the old one until the new one is."""
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

class Progress:
    """How far long work is and how long it will take: a live bar on a terminal, and a line every 10 s."""

    def __init__(self, rt: Runtime, label: str, total: int):
        self.rt, self.label, self.total = rt, label, max(total, 1)
        self.start = self.said = time.perf_counter()

    def __call__(self, done: int) -> None:
        now, share, live = time.perf_counter(), done / self.total, sys.stdout.isatty()
        left = (now - self.start) * (1 / share - 1) if share else math.nan
        line = f"{self.label} {share:.0%} elapsed:{now - self.start:.0f}s left:{left:.0f}s"
        if live and self.rt.rank == 0:
            print(f"\r[{'#' * round(24 * share):24}] {line}\033[K", end="" if share < 1 else "\n", flush=True)
        if now - self.said >= 10:
            self.rt.log(line, console=not live)
            self.said = now

# --- 3. Data ------------------------------------------------------------------------------------------------
# A shard is 256 little-endian int32 (20240520, 1, count, 0 ...), then `count` uint16 tokens, memory-mapped.
# The loader has no state: batch k is a function of k, the same tokens whatever the number of ranks.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256
GET_DATA = ("`make demo` needs no data; for FineWeb get the challenge repository and run its "
            "data/cached_challenge_fineweb.py, then set DATA_PATH")

def load_shard(path: Path) -> np.memmap:
    """The uint16 tokens of one shard, memory-mapped. UserError: not a shard, another version, cut short."""
    header, size = np.fromfile(path, "<i4", SHARD_HEADER), path.stat().st_size
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC:
        found = f"starts with {header[0]}" if len(header) else "is empty"
        raise UserError(f"{path}: {found}, expected the shard magic {SHARD_MAGIC}; {GET_DATA}")
    if header[1] != SHARD_VERSION:
        raise UserError(f"{path}: shard version {header[1]}, expected {SHARD_VERSION}; {GET_DATA}")
    expected = 4 * SHARD_HEADER + 2 * int(header[2])
    if size != expected or header[2] < 1:
        raise UserError(f"{path}: {size} bytes, but its header promises {header[2]} tokens, that is "
                        f"{expected} bytes: the file is cut or damaged; fetch it again")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (int(header[2]),))

def find_shards(part: str, hp: Hyperparameters) -> list[Path]:
    """All shards of `part` (train or val), in order; UserError: none in its folder."""
    name = "train_data_path" if part == "train" and hp.train_data_path else "data_path"
    paths = sorted(Path(getattr(hp, name)).glob(f"fineweb_{part}_*.bin"))
    if not paths:
        raise UserError(f"{name.upper()}={getattr(hp, name)}: no fineweb_{part}_*.bin there; {GET_DATA}")
    return paths

def check_tokens(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise UserError(f"{source}: holds token {int(tokens.max())}, but VOCAB_SIZE={vocab_size}: data and "
                        "VOCAB_SIZE must come from the same tokenizer")

def load_validation(hp: Hyperparameters) -> np.ndarray:
    """The whole validation stream x_0 ... x_N as uint16: the memory map itself when it is one shard."""
    paths = find_shards("val", hp)
    shards = [load_shard(path) for path in paths]
    for path, tokens in zip(paths, shards):
        check_tokens(tokens, hp.vocab_size, str(path))
    stream = shards[0] if len(shards) == 1 else np.concatenate(shards)
    if len(stream) <= hp.eval_seq_len:
        raise UserError(f"DATA_PATH={hp.data_path}: the validation stream has {len(stream)} tokens, a window "
                        f"needs {hp.eval_seq_len + 1}: set EVAL_SEQ_LEN to at most {len(stream) - 1}")
    return stream

class TokenLoader:
    """All training shards laid end to end as one circular stream, read in lanes: sequence i of a batch of S
    starts at i/S of the stream and moves on by T tokens a step, so that even a small batch holds S different
    places, and S lanes together read everything once. Rank r takes the r-th share of the sequences."""

    def __init__(self, hp: Hyperparameters, rank: int, world_size: int):
        self.hp, self.rank = hp, rank
        self.paths = find_shards("train", hp)
        self.shards = [load_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(s) for s in self.shards])
        self.tokens = int(self.ends[-1])
        self.sequences = sequences = hp.train_batch_tokens // hp.train_seq_len
        if sequences % world_size:
            fits = (w for w in range(1, sequences + 1) if sequences % w == 0)
            near = sorted(fits, key=lambda w: max(w / world_size, world_size / w))[:2]
            raise UserError(f"{world_size} ranks cannot share TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN = {sequences} "
                            f"sequences equally: start {' or '.join(map(str, near))} ranks")
        self.share, most = sequences // world_size, max(1, hp.micro_batch_tokens // hp.train_seq_len)
        self.accumulation = next(a for a in range(1, self.share + 1)
                                 if self.share % a == 0 and self.share // a <= most)

    def span(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the circular stream from `start`, as int64."""
        parts, position = [], start % self.tokens
        while count:
            i = int(np.searchsorted(self.ends, position, "right"))
            part = self.shards[i][position - int(self.ends[i]):][:count]  # counted from the shard's end
            check_tokens(part, self.hp.vocab_size, str(self.paths[i]))
            parts.append(part)
            count, position = count - len(part), (position + len(part)) % self.tokens
        return np.concatenate(parts).astype(np.int64)

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of a micro-batch of step `step`, both (B, T) int64 on the CPU."""
        T, rows = self.hp.train_seq_len, self.share // self.accumulation
        first = self.rank * self.share + micro * rows
        starts = (lane * self.tokens // self.sequences + step * T for lane in range(first, first + rows))
        ids = torch.from_numpy(np.stack([self.span(start, T + 1) for start in starts]))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

def fingerprint(hp: Hyperparameters) -> list[tuple]:
    """(name, bytes, SHA-256 of the first 64 KB) of every data file, so that ranks can compare theirs."""
    paths = [*find_shards("val", hp), *([] if hp.eval_only else find_shards("train", hp)), Path(hp.tokenizer_path)]
    return [(path.name, path.stat().st_size, hashlib.sha256(path.open("rb").read(1 << 16)).hexdigest())
            for path in paths]

class ByteCounter:
    """UTF-8 bytes of each target, from the tokenizer's pieces (the challenge's definition of a byte)."""

    def __init__(self, hp: Hyperparameters):
        import sentencepiece
        name, ids = f"TOKENIZER_PATH={hp.tokenizer_path}", range(hp.vocab_size)
        if not Path(hp.tokenizer_path).is_file():
            raise UserError(f"{name}: no such file; {GET_DATA} and TOKENIZER_PATH")
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=hp.tokenizer_path)
        except (RuntimeError, OSError):
            raise UserError(f"{name}: not a SentencePiece model") from None
        if sp.vocab_size() != hp.vocab_size:
            raise UserError(f"{name}: has {sp.vocab_size()} pieces, but VOCAB_SIZE={hp.vocab_size}: set "
                            f"VOCAB_SIZE={sp.vocab_size()} or name the data's own tokenizer")
        self.is_text = ~np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        pieces = [sp.id_to_piece(i) if text else "" for i, text in zip(ids, self.is_text)]
        self.opens_word = np.array([piece.startswith("\u2581") for piece in pieces])
        self.length = np.array([1 if sp.is_byte(i) else len(piece.replace("\u2581", "").encode())
                                for i, piece in zip(ids, pieces)], np.uint16)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes (uint16) of each target of the stream `tokens`; a word's space counts only after text."""
        space = self.opens_word[tokens[1:]] & self.is_text[tokens[:-1]]
        return self.length[tokens[1:]] + space

# --- 4. Kernels ---------------------------------------------------------------------------------------------
# The ops that are worth more than what the compiler makes of them, each with its plain form beside it.

def find_flash_attention():
    """(name, function) of the fastest attention that is installed and runs here, or (name, None): torch's."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        if torch.cuda.get_device_capability() >= (9, 0):
            with contextlib.suppress(ImportError):
                from flash_attn_interface import flash_attn_func
                return "flash_attention_3", flash_attn_func
        with contextlib.suppress(ImportError):
            from flash_attn import flash_attn_func
            return "flash_attention_2", flash_attn_func
    return "sdpa", None

def causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, flash=None) -> Tensor:
    """softmax(q k' / sqrt K) v over positions up to one's own, layout B T H K; H/G heads share k, v."""
    if flash and q_BTHK.is_cuda:
        y = flash(q_BTHK, k_BTGK, v_BTGK, causal=True)
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

# --- 5. Model -----------------------------------------------------------------------------------------------
# Master weights are float32; every op follows the dtype of the residual stream (bfloat16 on CUDA, float32 on
# CPU): no autocast. Sources: GQA 2305.13245, RoPE 2104.09864, QK-norm 2302.05442, value residual 2410.17897,
# XSA and SmearGate as in PR #889, U-Net skips and x0 mixes as in modded-nanogpt.

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Linear):
    """Without bias; float32 weights, computed in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

def rotary_tables(T: int, hp: Hyperparameters, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, ROPE_DIMS/2) float32; beyond 1024 positions the base grows (NTK-aware scaling)."""
    r = hp.rope_dims
    base = hp.rope_base * (T / 1024) ** (r / (r - 2)) if T > 1024 and r > 2 else hp.rope_base
    frequency = base ** -(torch.arange(0, r, 2, dtype=torch.float32, device=device) / max(r, 1))
    angle = torch.outer(torch.arange(T, dtype=torch.float32, device=device), frequency)[:, None, :]
    return angle.cos(), angle.sin()

def rotate(x_BTHK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the first 2 * rope width of K, in half-split pairs; the other dimensions carry no position."""
    cos, sin = rope
    half = cos.size(-1)
    a, b, rest = x_BTHK[..., :half], x_BTHK[..., half: 2 * half], x_BTHK[..., 2 * half:]
    rotated = torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(x_BTHK.dtype)
    return torch.cat((rotated, rest), -1)

def remove_own_value(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA: what a head reads must come from elsewhere: drop its component along its own position's value."""
    B, T, H, K = y_BTHK.shape
    y = y_BTHK.view(B, T, v_BTGK.size(2), -1, K)
    v = F.normalize(v_BTGK, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).view(B, T, H, K)

class Attention(nn.Module):
    def __init__(self, hp: Hyperparameters, layer: int, flash):
        super().__init__()
        self.heads, self.flash = (hp.num_heads, hp.num_kv_heads, hp.head_dim), flash
        D, (H, G, K) = hp.model_dim, self.heads
        self.q, self.k, self.v = Linear(D, H * K), Linear(D, G * K), Linear(D, G * K)
        self.proj = Linear(H * K, D)
        self.q_gain = nn.Parameter(torch.full((H,), hp.qk_gain_init))
        self.xsa = layer >= hp.num_layers - hp.xsa_last_n
        self.ve_scale = nn.Parameter(torch.ones(())) if hp.ve_enabled and layer in hp.ve_layers else None
        self.vrl_gate = nn.Parameter(torch.tensor(-1.5)) if hp.vrl_enabled and layer else None

    def forward(self, x_BTD: Tensor, rope, ve_BTGK: Tensor | None, v_first_BTGK: Tensor | None):
        """(B, T, D) out, and this layer's values before any change (layer 0's are the others' v_first)."""
        B, T, _ = x_BTD.shape
        H, G, K = self.heads
        q = rotate(norm(self.q(x_BTD).view(B, T, H, K)), rope) * self.q_gain.to(x_BTD.dtype)[:, None]
        k = rotate(norm(self.k(x_BTD).view(B, T, G, K)), rope)
        v_own = v = self.v(x_BTD).view(B, T, G, K)
        if self.ve_scale is not None:
            v = v + self.ve_scale.to(v.dtype) * ve_BTGK
        if self.vrl_gate is not None:
            v = torch.lerp(v, v_first_BTGK, torch.sigmoid(self.vrl_gate).to(v.dtype))
        y = causal_attention(q, k, v, self.flash)
        y = remove_own_value(y, v) if self.xsa else y
        return self.proj(y.reshape(B, T, H * K)), v_own

class MLP(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        D, width, self.slope = hp.model_dim, int(hp.mlp_mult * hp.model_dim), hp.leaky_slope
        self.fc, self.proj = Linear(D, width), Linear(width, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x_BTD), self.slope).square())

class Block(nn.Module):
    def __init__(self, hp: Hyperparameters, layer: int, flash):
        super().__init__()
        self.attn, self.mlp = Attention(hp, layer, flash), MLP(hp)
        self.mix_x, self.mix_x0, self.attn_scale, self.mlp_scale = (
            nn.Parameter(torch.full((hp.model_dim,), value)) for value in (1.0, 0.0, 1.0, 1.0))
        self.norm_scale = (layer + 1) ** -0.5 if hp.ln_scale else 1.0

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, rope, ve_BTGK, v_first_BTGK):
        mix_x, mix_x0, a, b = (p.to(x_BTD.dtype)
                               for p in (self.mix_x, self.mix_x0, self.attn_scale, self.mlp_scale))
        x = mix_x * x_BTD + mix_x0 * x0_BTD
        y, v = self.attn(norm(x) * self.norm_scale, rope, ve_BTGK, v_first_BTGK)
        x = x + a * y
        return x + b * self.mlp(norm(x) * self.norm_scale), v

def bigram_rows(ids_BT: Tensor, rows: int) -> Tensor:
    """A row for each token with the one before it: a hash, collisions are harmless; the first: the last."""
    pair = (36313 * ids_BT[:, 1:]) ^ (27191 * ids_BT[:, :-1])
    return F.pad(pair % (rows - 1), (1, 0), value=rows - 1)

class NarrowEmbedding(nn.Module):
    """A table of `width` columns, projected to `out` and scaled."""

    def __init__(self, rows: int, width: int, out: int, scale: float):
        super().__init__()
        self.table, self.proj = nn.Embedding(rows, width), Linear(width, out)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, rows_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table(rows_BT).to(dtype)) * self.scale.to(dtype)

class GPT(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, L = hp, hp.num_layers
        self.attention_name, flash = find_flash_attention()
        self.embed = nn.Embedding(hp.vocab_size, hp.model_dim)
        self.bigram = (NarrowEmbedding(hp.bigram_vocab_size, hp.bigram_dim, hp.model_dim, 0.05)
                       if hp.bigram_vocab_size else None)
        self.smear_gate = nn.Parameter(torch.zeros(hp.model_dim)) if hp.smear_enabled else None
        self.value_embed = (NarrowEmbedding(hp.vocab_size, hp.ve_dim, hp.num_kv_heads * hp.head_dim, 0.1)
                            if hp.ve_enabled and hp.ve_layers else None)
        self.blocks = nn.ModuleList(Block(hp, layer, flash) for layer in range(L))
        skips = L // 2 if hp.unet_skips else 0
        self.skip_weights = nn.Parameter(torch.ones(skips, hp.model_dim)) if skips else None
        self.head = None if hp.tie_embeddings else Linear(hp.model_dim, hp.vocab_size)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Initial values not set where the parameter is made. Small matrices keep nn.Linear's default."""
        std = {"embed.weight": 0.005, "value_embed.table.weight": 0.01}
        for name, p in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.proj.weight", "bigram.table.weight", "head.weight")):
                p.zero_()
            elif name in std:
                p.normal_(std=std[name])
            elif name.endswith(".weight") and min(p.shape) >= 64:
                nn.init.orthogonal_(p, 1 if name.startswith("blocks") else (2 * self.hp.num_layers) ** -0.5)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) before the head, or with targets the mean loss in nats per token."""
        x = self.embed(ids_BT)
        if self.bigram is not None:
            x = x + self.bigram(bigram_rows(ids_BT, self.hp.bigram_vocab_size), x.dtype)
        x = norm(x).to(torch.bfloat16 if x.is_cuda else torch.float32)
        if self.smear_gate is not None:
            x = torch.lerp(x, F.pad(x, (0, 0, 1, 0))[:, :-1], torch.sigmoid(self.smear_gate).to(x.dtype))
        x0, v_first, skips, L = x, None, [], self.hp.num_layers
        rope = rotary_tables(ids_BT.size(1), self.hp, ids_BT.device)
        if (ve := self.value_embed) is not None:
            ve = ve(ids_BT, x.dtype).unflatten(-1, (-1, self.hp.head_dim))
        for layer, block in enumerate(self.blocks):
            if self.skip_weights is not None and layer >= L // 2 and skips:
                x = x + self.skip_weights[layer - L // 2].to(x.dtype) * skips.pop()
            x, v = block(x, x0, rope, ve, v_first)
            v_first = v if layer == 0 else v_first
            if layer < L // 2:
                skips.append(x)
        return x if targets_BT is None else F.cross_entropy(self.logits(x).flatten(0, 1), targets_BT.ravel())

    def logits(self, hidden_D: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32, softly capped to +-LOGIT_SOFTCAP."""
        weight = self.embed.weight if self.head is None else self.head.weight
        z, cap = F.linear(norm(hidden_D), weight.to(hidden_D.dtype)).float(), self.hp.logit_softcap
        return cap * torch.tanh(z / cap) if cap else z

# --- 6. Optimizer -------------------------------------------------------------------------------------------
# Muon (Jordan et al. 2024), whose update is the momentum made orthogonal, for matrices; AdamW for the rest.

def orthogonalize(G_NRC: Tensor, steps: int) -> Tensor:
    """Nearly the orthogonal factor U V' of each matrix U S V': singular values come out in about [0.7, 1.2].
    A quintic Newton-Schulz iteration, tuned for speed at zero, not convergence to one. bfloat16 on CUDA."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G_NRC.bfloat16() if G_NRC.is_cuda else G_NRC.float()
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X

class Muon(torch.optim.Optimizer):
    """One group per shape: a stack, tall matrices transposed, so that one batched iteration serves them all.
    Each rank owns an equal share of every stack (zero matrices fill it up): it receives the sum over the ranks
    of those gradients only, keeps their momentum only, and sends the others its updates."""

    def __init__(self, matrices: list[nn.Parameter], hp: Hyperparameters, rt: Runtime):
        self.rt, stacks = rt, {}
        for p in matrices:
            stacks.setdefault(tuple(sorted(p.shape)), []).append(p)
        groups = [dict(params=same, buffer=same[0].new_zeros(len(same), *shape))
                  for shape, same in sorted(stacks.items())]
        super().__init__(groups, dict(lr=hp.matrix_lr, initial_lr=hp.matrix_lr, weight_decay=hp.muon_wd,
                                      momentum=hp.muon_momentum_warmup_start, steps=hp.muon_backend_steps))

    def own(self, stack: Tensor) -> Tensor:
        """This rank's share of a whole stack, as a view; the last ranks' may be short, or empty."""
        share = -(-len(stack) // self.rt.world_size)
        return stack[self.rt.rank * share:][:share]

    def start_reduce(self) -> None:
        """Send the gradients, receive this rank's share of their sum over the ranks."""
        self.sums = []
        for group in self.param_groups:
            wide = [p.grad.mT if p.size(0) > p.size(1) else p.grad for p in group["params"]]
            wide += [torch.zeros_like(wide[0])] * (-len(wide) % self.rt.world_size)
            self.sums.append(self.rt.start_scatter(torch.stack(wide)))

    def finish_reduce(self) -> list[Tensor]:
        """This rank's share of the sums, (share, R, C) per stack. To be waited for once: gloo writes then."""
        for _, wait in self.sums:
            wait()
        self.grads = [share for share, _ in self.sums]
        return self.grads

    @torch.no_grad()
    def start_step(self) -> None:
        """Momentum and orthogonal updates of this rank's share, on their way to the others."""
        self.updates = []
        for group, grads_NRC in zip(self.param_groups, self.grads):
            own_NRC = self.own(group["buffer"])
            ours = grads_NRC[:len(own_NRC)]
            ours.add_(own_NRC.mul_(group["momentum"]).add_(ours), alpha=group["momentum"])  # Nesterov
            self.updates.append(self.rt.start_gather(orthogonalize(grads_NRC, group["steps"])))

    @torch.no_grad()
    def step(self) -> None:
        for group, (update_NRC, wait) in zip(self.param_groups, self.updates):
            wait()
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(group["params"], update_NRC):
                R, C = p.shape
                p.sub_(update.mT if R > C else update, alpha=group["lr"] * max(1, R / C) ** 0.5)

def build_optimizers(model: GPT, hp: Hyperparameters, rt: Runtime) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW]; together they hold every parameter exactly once."""
    tables, heads, matrices, vectors = [], [], [], []
    for name, p in model.named_parameters():
        kind = (tables if name.endswith((".table.weight", "embed.weight")) else heads if name == "head.weight"
                else matrices if name.endswith(".weight") else vectors)
        kind.append(p)
    table_lr = hp.tied_embed_lr if hp.tie_embeddings else hp.embed_lr
    rates = (tables, table_lr), (heads, hp.head_lr), (vectors, hp.scalar_lr)
    adamw = torch.optim.AdamW([dict(params=kind, lr=lr, initial_lr=lr) for kind, lr in rates if kind], fused=True,
                              betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, weight_decay=hp.adam_wd)
    for p in (*tables, *heads, *vectors):  # what AdamW would make at its first step; a checkpoint fills it
        adamw.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                              exp_avg_sq=torch.zeros_like(p))
    optimizers = [Muon(matrices, hp, rt), adamw]
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters())), "a parameter without exactly one optimizer"
    return optimizers

@torch.no_grad()
def update(optimizers: list[torch.optim.Optimizer], rt: Runtime, clip: float) -> None:
    """One step on the sum over the ranks of all gradients, scaled to a norm of at most `clip`. What travels:
    Muon's gradients in, AdamW's both ways, Muon's updates out while AdamW works. One rank sends nothing."""
    muon, adamw = optimizers
    params = [p for group in adamw.param_groups for p in group["params"]]
    muon.start_reduce()
    flat, wait = rt.start_sum(torch.cat([p.grad.flatten() for p in params]))
    shares = muon.finish_reduce()
    squares = rt.sum(sum(share.square().sum() for share in shares))
    wait()
    if clip:
        scale = (clip / ((squares + flat.square().sum()).sqrt() + 1e-6)).clamp_max(1)
        torch._foreach_mul_([flat, *shares], scale)
    muon.start_step()
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad = grad.view_as(p)
    adamw.step()
    muon.step()

def lr_scale(step: int, seconds: float, hp: Hyperparameters) -> float:
    """1, then linearly to 0 over the last WARMDOWN_ITERS steps before ITERATIONS or, at the average step time
    so far, the wall-clock cap, whichever comes first."""
    left = hp.iterations - step
    if hp.max_wallclock_seconds and step:
        left = min(left, (hp.max_wallclock_seconds - seconds) / (seconds / step))
    return min(1.0, max(left, 0.0) / hp.warmdown_iters) if hp.warmdown_iters else 1.0

def muon_momentum(step: int, hp: Hyperparameters) -> float:
    share = min(1.0, step / hp.muon_momentum_warmup_steps) if hp.muon_momentum_warmup_steps else 1.0
    return hp.muon_momentum_warmup_start + share * (hp.muon_momentum - hp.muon_momentum_warmup_start)

# --- 7. Averaging -------------------------------------------------------------------------------------------
# Averaged weights are better than the last ones. EMA and SWA are one class: running means, but one forgets.

class WeightAverage:
    """Mean of snapshots: exponential, free of its start (as Adam's moments), or uniform if decay=1."""

    def __init__(self, decay: float, parameters: list[Tensor]):
        self.decay, self.count, self.mean = decay, 0, [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[Tensor]) -> None:
        self.count += 1
        weight = (1 - self.decay) / (1 - self.decay ** self.count) if self.decay < 1 else 1 / self.count
        torch._foreach_lerp_(self.mean, parameters, weight)

def averaged_parameters(averages: dict[str, WeightAverage]) -> list[Tensor] | None:
    """A mean, or the middle of both; None: the last weights are it (AVERAGING=none, or SWA never began)."""
    means = [average.mean for average in averages.values() if average.count]
    return [torch.stack(same).mean(0) for same in zip(*means)] if means else None

# --- 8. Artifact --------------------------------------------------------------------------------------------
# A matrix becomes codes in +-levels and a step per row, clipped where that loses least (GPTQ-lite). Codes are
# near-Gaussian noise that no dictionary coder shortens, so they are range-coded (rANS, Duda 1311.2540) with
# tables chosen by the spread of row and column: below the zeroth-order entropy per tensor. A file holds only
# numbers: nothing in it can run. Little-endian; * marks 16-bit arrays: all low bytes, then all high bytes.
#   "PGOLF" 2 | SHA-256 of the rest | 6 streams: u8 coder (0 raw, 1 LZMA2, 2 rANS), u32 bytes, u32 coded bytes
#   streams: JSON [[name, shape, coded 0 or 1], ...], the order in all others | bfloat16* steps per row
#   | u8 spread class per row | per column: table = row + column - 16, in 0 ... 63 (of other streams: 0)
#   | float16* of the tensors not coded | u8 codes + 128. A weight is code * step, exact in float32.
#   rANS: u16 lanes, u8 tables, u32 size of the LZMA2-coded u16* frequencies (256 a table, their sum is 2^14),
#   these, u32 state per lane, u16 words. Symbol i is in lane i % lanes. Its state x has x % 2^14 in symbol s:
#   x = f[s] * (x >> 14) + x % 2^14 - sum(f[:s]); if x < 2^16: x = x << 16 | next word. All end at 2^16.

MAGIC, RANS_BITS, TABLES = b"PGOLF\x02", 14, 64
MOST_WEIGHTS = 1 << 28                # a file that claims more is refused before anything is allocated
CLIP_QUANTILES = (1.0, 0.998, 0.994)  # of |w| in a row: the candidates for its largest code
LZMA = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=1 << 20)])

def row_clips(w_RC: Tensor) -> Tensor:
    """(candidates, R, 1): the magnitudes at CLIP_QUANTILES of each row."""
    magnitude, last = w_RC.float().abs().sort(-1).values, w_RC.size(-1) - 1
    return torch.stack([magnitude[:, round(q * last), None] for q in CLIP_QUANTILES])

def quantize_rows(w_RC: Tensor, levels, clips: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (R, C) in +-levels, as floats, and bfloat16 steps (R, 1): their product is exact in float32.
    `levels`, a number or one per row, is at most 127. Per row the clip of least squared error wins and is
    the code `levels` itself, so that quantising the product again changes nothing."""
    w = w_RC.float()
    steps = ((row_clips(w) if clips is None else clips) / levels).clamp_min(1e-30).bfloat16().float()
    errors = [((w / s).round().clamp(-levels, levels) * s - w).square().sum(-1, keepdim=True) for s in steps]
    step = steps.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
    return (w / step).round().clamp(-levels, levels), step

def natural_levels(name: str, tensor: Tensor, hp: Hyperparameters) -> int:
    """Largest code by kind: 127 for tables, 2^(QUANT_BITS-1) - 1 for other matrices; 0: not coded."""
    if tensor.ndim != 2 or not name.endswith(".weight") or not tensor.numel():
        return 0
    table = name.endswith((".table.weight", "embed.weight", "head.weight"))
    return 127 if table else 2 ** (hp.quant_bits - 1) - 1

def fake_quantized(model: GPT, hp: Hyperparameters) -> dict[str, Tensor]:
    """The matrices as the artifact would give them back; gradients pass straight through the rounding."""
    weights = {}
    for name, p in model.named_parameters():
        if levels := natural_levels(name, p, hp):
            codes, step = quantize_rows(p.detach(), levels)
            weights[name] = p + (codes * step - p.detach())
    return weights

def quantize_state(state: dict[str, Tensor], hp: Hyperparameters, coarsen: float = 1.0, clips=None):
    """[(name, shape, codes or float16 values, bfloat16 steps as int16 or None)] in numpy, and the relative
    error of the matrices. Levels are divided by `coarsen`, rounded up in some rows, down in others, so that
    sizes move by single rows. UserError: a tensor holds NaN, infinity or more than its kind can."""
    entries, lost, total = [], 0.0, 1e-300
    for name, tensor in state.items():
        w, natural = tensor.detach().float().cpu().contiguous(), natural_levels(name, tensor, hp)
        if w.numel() and not w.abs().max() <= (1e30 if natural else 65504):
            raise UserError(f"{name}: holds NaN, infinity or huge values; training diverged, lower the rates")
        values, steps = w.half(), None
        if natural:
            dither = torch.arange(len(w), dtype=torch.float64)[:, None] * 0.6180339887498949 % 1
            levels = (natural / coarsen + dither).floor().clamp(1, 127).float()
            codes, step = quantize_rows(w, levels, clips and clips[name])
            lost += float((codes * step - w).square().sum(dtype=torch.float64))
            total += float(w.square().sum(dtype=torch.float64))
            values, steps = codes.to(torch.int8), step.bfloat16().view(torch.int16).numpy()
        entries.append((name, w.shape, values.numpy(), steps))
    return entries, math.sqrt(lost / total)

def turn(raw: bytes, *shape: int) -> bytes:
    """The bytes of a matrix of `shape`, transposed: (-1, 2) brings low bytes together, (2, -1) undoes it."""
    return np.frombuffer(raw, np.uint8).reshape(shape).T.tobytes()

def spread_classes(codes_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u8 per row, u8 per column): 16 + 4 * log2 of the codes' spread, columns relative to their rows."""
    f = codes_RC.astype(np.float32)
    row = np.sqrt(np.square(f).mean(1) + 0.03)
    column = np.sqrt(np.square(f / row[:, None]).mean(0) + 0.003)
    return tuple(np.clip(np.rint(4 * np.log2(x)) + 16, 0, 47).astype(np.uint8) for x in (row, column))

def table_of(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.clip(row[:, None].astype(np.int16) + column - 16, 0, TABLES - 1).astype(np.uint8).ravel()

def rans_encode(symbols: np.ndarray, table: np.ndarray) -> bytes:
    """The payload of `symbols` (u8), each coded with the frequencies of its `table` (u8)."""
    pairs, lanes = table.astype(np.int64) << 8 | symbols, min(1024, 16 + (len(symbols) >> 12))
    count = np.bincount(pairs, minlength=(int(table.max(initial=0)) + 1) * 256).reshape(-1, 256)
    spare, total = (1 << RANS_BITS) - (count > 0).sum(1, keepdims=True), count.sum(1, keepdims=True)
    freq = ((count > 0) + count * spare // np.maximum(total, 1)).astype(np.uint32)
    freq[np.arange(len(freq)), freq.argmax(1)] += ((1 << RANS_BITS) - freq.sum(1)).astype(np.uint32)
    packed = lzma.compress(turn(freq.astype("<u2").tobytes(), -1, 2), **LZMA)
    start, freq = (np.cumsum(freq, 1, dtype=np.uint32) - freq).ravel(), freq.ravel()
    x, words = np.full(lanes, 1 << 16, np.uint32), []
    for i in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):  # the decoder's steps, last to first
        at = pairs[i: i + lanes]
        f, y = freq[at], x[:len(at)]
        full = y >> (32 - RANS_BITS) >= f
        words.append(y[full].astype("<u2").tobytes())
        quotient, rest = np.divmod(np.where(full, y >> 16, y), f)
        x[:len(at)] = (quotient << RANS_BITS) + rest + start[at]
    head = struct.pack("<HBI", lanes, len(count), len(packed)) + packed
    return head + x.astype("<u4").tobytes() + b"".join(reversed(words))

def rans_decode(coded: bytes, table: np.ndarray) -> bytes:
    lanes, tables, size = struct.unpack_from("<HBI", coded)
    need(table.max(initial=0) < tables <= TABLES, "bad tables")
    raw = turn(decompress(coded[7: 7 + size], 512 * tables), 2, -1)
    freq = np.frombuffer(raw, "<u2").astype(np.uint32).reshape(-1, 256)
    need((freq.sum(1) == 1 << RANS_BITS).all(), "frequencies that do not sum to 2^14")
    owner = np.repeat(np.arange(freq.size), freq.ravel())  # the (table, symbol) that each slot belongs to
    start, freq = (np.cumsum(freq, 1, dtype=np.uint32) - freq).ravel()[owner], freq.ravel()[owner]
    symbol, rest = owner.astype(np.uint8), np.arange(len(owner), dtype=np.uint32) % (1 << RANS_BITS) - start
    x = np.frombuffer(coded, "<u4", lanes, 7 + size).astype(np.uint32)
    words = np.frombuffer(coded, "<u2", offset=7 + size + 4 * lanes).astype(np.uint32)
    out, read = np.empty(len(table), np.uint8), 0
    for i in range(0, len(table), lanes):
        part = table[i: i + lanes]
        y = x[:len(part)]
        slot = part.astype(np.int64) << RANS_BITS | y & ((1 << RANS_BITS) - 1)
        out[i: i + lanes], y = symbol[slot], freq[slot] * (y >> RANS_BITS) + rest[slot]
        low = np.flatnonzero(y < 1 << 16)
        need(read + len(low) <= len(words), "codes end early")
        y[low] = y[low] << 16 | words[read: read + len(low)]
        x[:len(part)], read = y, read + len(low)
    need(read == len(words) and (x == 1 << 16).all(), "codes do not end where they should")
    return out.tobytes()

def squeeze(raw: bytes, table: np.ndarray | int = 0) -> bytes:
    """One stream by its shortest coder. LZMA, slow and never the shortest on codes, is tried up to 1 MB."""
    ways = [raw, lzma.compress(raw, **LZMA) if len(raw) < 1 << 20 else raw,
            rans_encode(np.frombuffer(raw, np.uint8), np.broadcast_to(np.uint8(table), len(raw)))]
    coder = min(range(3), key=lambda i: len(ways[i]))
    return struct.pack("<BII", coder, len(raw), len(ways[coder])) + ways[coder]

def encode(entries: list[tuple]) -> bytes:
    """The container of what `quantize_state` gave."""
    header = [[name, list(shape), int(steps is not None)] for name, shape, _, steps in entries]
    plain = b"".join(values for _, _, values, steps in entries if steps is None)
    matrices = [(codes, steps, *spread_classes(codes)) for _, _, codes, steps in entries if steps is not None]
    codes, steps, rows, columns = ([matrix[i] for matrix in matrices] for i in range(4))
    symbols = np.frombuffer(b"".join(codes), np.uint8) ^ np.uint8(128)
    table = np.frombuffer(b"".join(map(table_of, rows, columns)), np.uint8)
    streams = [json.dumps(header, separators=(",", ":")).encode(), turn(b"".join(steps), -1, 2),
               b"".join(rows), b"".join(columns), turn(plain, -1, 2)]
    body = b"".join([*map(squeeze, streams), squeeze(symbols.tobytes(), table)])
    return MAGIC + hashlib.sha256(body).digest() + body

def pack(state: dict[str, Tensor], hp: Hyperparameters, coarsen: float = 1.0) -> bytes:
    """The container of a state dict; UserError: see `quantize_state`."""
    return encode(quantize_state(state, hp, coarsen)[0])

def need(ok: bool, why: str) -> None:
    if not ok:
        raise ValueError(why)

def decompress(coded: bytes, size: int) -> bytes:
    """LZMA2 of exactly `size` bytes; never allocates more."""
    engine = lzma.LZMADecompressor(**LZMA)
    raw = engine.decompress(coded, size + 1)
    need(len(raw) == size and engine.eof and not engine.unused_data, "a stream of another length")
    return raw

def read_header(raw: bytes) -> list[tuple[str, list[int], int]]:
    """The tensor table, every claim checked before anything of its size is allocated."""
    header = json.loads(raw)
    need(type(header) is list and all(type(row) is list and len(row) == 3 for row in header), "bad table")
    for name, shape, coded in header:
        need(type(name) is str and type(shape) is list and len(shape) <= 4
             and all(type(n) is int and 0 <= n <= MOST_WEIGHTS for n in [coded, *shape]) and coded <= 1
             and (not coded or len(shape) == 2 and min(shape) > 0), f"bad entry {name!r:.80}")
    need(len({row[0] for row in header}) == len(header), "a name twice")
    need(sum(math.prod(shape) for _, shape, _ in header) <= MOST_WEIGHTS, "absurdly many weights")
    return header

def decode(blob: bytes) -> dict[str, Tensor]:
    need(blob[:6] == MAGIC, f"starts with {blob[:6]!r}, expected {MAGIC!r}: not an artifact of this script")
    need(hashlib.sha256(blob[38:]).digest() == blob[6:38], "SHA-256 differs: cut or damaged")
    read = io.BytesIO(blob[38:]).read

    def stream(size: int | None = None, table: np.ndarray | int = 0) -> bytes:
        coder, raw_size, coded_size = struct.unpack("<BII", read(9))
        coded = read(coded_size)
        fits = raw_size < 1 << 20 if size is None else raw_size == size
        need(fits and len(coded) == coded_size, "bad stream length")
        if coder == 1:
            return decompress(coded, raw_size)
        if coder == 2:
            return rans_decode(coded, np.broadcast_to(np.uint8(table), raw_size))
        need(coder == 0 and coded_size == raw_size, "unknown coder")
        return coded

    def arrays(sizes: list[int], kind: str = "u1", table: np.ndarray | int = 0):
        width = np.dtype(kind).itemsize
        values = np.frombuffer(turn(stream(width * sum(sizes), table), width, -1), kind)
        return iter(np.split(values, np.cumsum(sizes, dtype=int)))  # and an empty one at the end

    header = read_header(stream())
    plain, coded = ([shape for _, shape, c in header if c == kind] for kind in (0, 1))
    R, C = ([shape[axis] for shape in coded] for axis in (0, 1))
    steps, rows, columns = arrays(R, "<u2"), arrays(R), arrays(C)
    table = np.concatenate(list(map(table_of, rows, columns)))
    values = arrays(list(map(math.prod, plain)), "<f2"), arrays(list(map(math.prod, coded)), "u1", table)
    need(not read(1), "bytes after the end")
    state = {}
    for name, shape, c in header:
        w = torch.from_numpy(next(values[c]).astype(np.float32)).view(shape)
        if c:
            w = (w - 128) * torch.from_numpy((next(steps).astype(np.uint32) << 16).view(np.float32))[:, None]
        state[name] = w
    need(all(w.isfinite().all() for w in state.values()), "NaN or infinity inside")
    return state

def unpack(blob: bytes) -> dict[str, Tensor]:
    """The state dict of a container, all float32; of anything else a ValueError that says what is wrong."""
    try:
        return decode(blob)
    except (lzma.LZMAError, struct.error, ValueError, RecursionError) as error:
        raise ValueError(f"artifact: {error}") from None

def fit_artifact(state: dict[str, Tensor], hp: Hyperparameters, budget: int) -> tuple[bytes, str]:
    """(container of at most `budget` bytes, facts for the log). One scalar divides all levels: 1 if that fits
    and FILL_BUDGET is off; below 1, finer codes up to +-127, while bytes are left; above 1 where they are too
    few. Found by packing, to within 4 KB. UserError: not even codes of +-1 fit."""
    clips = {n: row_clips(w.detach().cpu()) for n, w in state.items() if natural_levels(n, w, hp)}
    count, high, best = max(1, sum(map(torch.numel, state.values()))), 254.0, None
    low = coarsen = 2 ** (hp.quant_bits - 1) / 256 if hp.fill_budget else 1.0
    while high / low > 1 + 1e-7:
        entries, error = quantize_state(state, hp, coarsen, clips)
        fits = len(blob := encode(entries)) <= budget
        best, low, high = ((blob, coarsen, error), low, coarsen) if fits else (best, coarsen, high)
        if fits and len(blob) > budget - 4096:
            break
        guess = coarsen * 2 ** min((len(blob) - budget + 2000) * 8 / count, 8)  # a bit more halves the step
        coarsen = guess if low < guess < high else math.sqrt(low * high)
    if best is None:
        raise UserError(f"the artifact takes over {budget} bytes even with codes of +-1: lower NUM_LAYERS, "
                        "MODEL_DIM, MLP_MULT, VOCAB_SIZE or BIGRAM_VOCAB_SIZE")
    (blob, coarsen, after), before = best, quantize_state(state, hp, 1.0, clips)[1]
    return blob, (f"coarsen:{coarsen:.9f} error_before:{before:.6f} error_after:{after:.6f} "
                  f"bits_per_parameter:{8 * len(blob) / count:.4f} "
                  f"levels:{min(127, (2 ** (hp.quant_bits - 1) - 1) / coarsen):.2f}")

def write_artifact(model: GPT, path: Path, hp: Hyperparameters, rt: Runtime) -> None:
    """Pack the model into the file `path`, which with this file takes at most SIZE_CAP bytes; UserError: not
    possible, or no space on the disk."""
    blob, facts = fit_artifact(model.state_dict(), hp, SIZE_CAP - len(Path(__file__).read_bytes()))
    rt.log(f"fit_artifact {facts}")
    replace_file(path, lambda file: file.write(blob))

def load_artifact(model: GPT, path: Path, rt: Runtime) -> int:
    """Every rank's model becomes what rank 0 reads from `path`. Logs and returns the bytes of code + artifact;
    UserError: no such file, a damaged one, or one of another model."""
    size, label = 0, f"int{model.hp.quant_bits}+rans"
    if rt.rank == 0:
        try:
            blob, code, own = path.read_bytes(), len(Path(__file__).read_bytes()), model.state_dict()
            state, size = unpack(blob), code + len(blob)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        for name in own.keys() | state.keys():
            found, expected = (tuple(s[name].shape) if name in s else "absent" for s in (state, own))
            if found != expected:
                raise UserError(f"{path}: {name} is {found}, the settings describe {expected}: set those that it "
                                "was trained with (they are in its log)")
        model.load_state_dict(state)
        rt.log(f"Serialized model {label}: {len(blob)} bytes\nCode size: {code} bytes\n"
               f"Total submission size {label}: {size} bytes")
    for p in model.parameters():
        rt.from_rank_0(p.data)
    return size

# --- 9. Neural scoring --------------------------------------------------------------------------------------
# Overlapping windows give every target a long context; the window that ends nearest after it scores it, once.
# Ranks share the windows, rank 0 gets nll[t] and entropy[t] in stream order.

SEGMENT_BATCHES = 32  # most global batches that are scored between two sums over the ranks

def windows(begin: int, end: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, first scored target, its end), one entry per window, of the targets [begin, end), counted from 0
    (target j is token j + 1). A window reads tokens [start, start + length); the first scores `length` targets
    if the stream begins with it, each other `stride`, the last what is left."""
    ends = np.minimum(np.arange(begin + stride if begin else length, end + stride, stride), end)
    return np.maximum(ends - length, 0), np.append(begin, ends[:-1]), ends

@torch.inference_mode()
def score_stream(trunk, model: GPT, tokens: np.ndarray, stride: int, rt: Runtime, part=None):
    """Yields (2, N) float32, nll and entropy in nats, of the targets [begin, end) = `part`, by default all, in
    stream order, in segments that grow; N = 0 on ranks other than 0. `trunk` is the model, compiled or not;
    only scored positions go through the head."""
    hp, (begin, end) = model.hp, part or (0, len(tokens) - 1)
    length = min(hp.eval_seq_len, end)
    starts, first, ends = windows(begin, end, length, stride)
    batch, head_rows = max(1, hp.val_batch_size // (length * rt.world_size)), max(1, 2 ** 26 // hp.vocab_size)
    progress = Progress(rt, f"scoring stride:{stride}", len(tokens) - 1)
    done, batches = 0, 1
    while done < len(starts):
        segment = np.arange(done, min(done + batches * batch * rt.world_size, len(starts)))
        share, offset = np.array_split(segment, rt.world_size)[rt.rank], first[done]
        scores_2N = torch.zeros(2, ends[segment[-1]] - offset, device=rt.device)  # a rank fills in its windows
        for i in range(0, len(share), batch):
            mine = share[i: i + batch]
            full = np.pad(mine, (0, batch - len(mine) if len(starts) > batch else 0), "edge")  # one shape
            at = starts[full][:, None] + np.arange(length)
            scored = (at >= first[full][:, None]) & (at < ends[full][:, None])
            scored[len(mine):] = False
            hidden_BTD = trunk(torch.from_numpy(tokens[at].astype(np.int64)).to(rt.device))
            rows, column, target = (torch.from_numpy(x).to(rt.device) for x in (
                np.flatnonzero(scored), at[scored] - offset, tokens[at[scored] + 1].astype(np.int64)))
            for r, c, v in zip(*(x.split(head_rows) for x in (rows, column, target))):
                logp_NV = F.log_softmax(model.logits(hidden_BTD.flatten(0, 1)[r]), -1)
                scores_2N[0, c] = -logp_NV.gather(1, v[:, None])[:, 0]
                scores_2N[1, c] = -(logp_NV.exp() * logp_NV).sum(-1)
        done, batches = done + len(segment), min(2 * batches, SEGMENT_BATCHES)
        yield rt.sum(scores_2N)[:, :0 if rt.rank else None].cpu().numpy()
        progress(int(ends[done - 1]))

def collect(segments) -> np.ndarray:
    """All segments of score_stream as one (nll, entropy)."""
    return np.concatenate(list(segments), 1)

def bits_per_byte(nll: np.ndarray, stream_bytes: np.ndarray) -> float:
    """Code length of the targets in bits over their UTF-8 bytes; sums in float64, divided once."""
    return float(nll.sum(dtype=np.float64) / math.log(2) / stream_bytes.sum(dtype=np.int64))

# --- 10. N-gram mixture -------------------------------------------------------------------------------------
# The model forgets what it read a window ago; counts do not. Counting is sorting: positions lie grouped by
# the n - 1 tokens before them, in stream order; sorting a group by its next token splits it into groups of n:
# exact counts of strictly earlier positions. It runs in a thread while the GPUs score.

CHUNK = 1 << 18  # positions refined at a time, so that what a sort touches stays in the cache
ORDER_CENTERS = np.array((4.5, 4.2, 3.8, 3.5, 3.2, 3.0))  # nats, orders 2...7 and beyond (PR #825)
HASH_PRIMES = np.array((36313, 27191, 51647, 81929, 131071, 175447, 209591), np.uint64)
BOS = 1  # token that opens a document
STATES, GAPS, HEATS = 128, 13, 6  # buckets of the online weights: state of the context x distance x entropy

def sort_runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, first): `order` brings equal keys together, each run in stream order; `first` marks, in that
    order, where runs start. One in-place sort of integers, of key and position in 64 bits, does it."""
    bits = np.uint64(len(keys).bit_length())
    keys = keys.astype(np.uint64) << bits | np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    order, keys = (keys & ((np.uint64(1) << bits) - np.uint64(1))).view(np.int64), keys >> bits
    return order, np.append(True, keys[1:] != keys[:-1])[:len(keys)]

def since_start(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """`values` minus the value at the start of their run."""
    starts = np.flatnonzero(first)
    return values - np.repeat(values[starts], np.diff(starts, append=len(first)))

def group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each position: a dense id of its key, and how many earlier positions hold that key (both int64)."""
    order, first = sort_runs(keys)
    ids, prior = np.empty_like(order), np.empty_like(order)
    ids[order], prior[order] = np.cumsum(first) - 1, since_start(np.arange(len(keys)), first)
    return ids, prior

def whole_groups(first: np.ndarray):
    """Slices of about CHUNK positions that cut no group: back to its start, or past the end of a huge one."""
    start = 0
    while start < len(first):
        stop = start + CHUNK
        if stop < len(first):
            back = int(np.argmax(first[stop:start:-1]))
            stop += -back if first[stop - back] else int(np.argmax(np.append(first[stop:], True)))
        yield slice(start, stop)
        start = stop

def floor_log2(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.int32) >> 23) - 127  # the exponent of a float; exact below 2^24

def describe_contexts(t, token, age, first, context, pair) -> np.ndarray:
    """What the online weights may know, for positions grouped by context: 2 * (1 + bucket) + (the target is
    the context's last continuation), 0 where the context is new. The bucket, of the prefix alone: how often
    the context occurred, the share of continuations that were not new, whether the last repeated the one
    before, whether it lies in this document (of `age` tokens so far), the distance to it."""
    same = np.append(False, token[1:] == token[:-1]) & ~first
    repeated = np.append(False, same[:-1]) & ~first
    gap = np.where(first, 1, np.diff(t, prepend=t[:1])).view(np.int32)
    known, context = (pair > 0).astype(np.int32), context.view(np.int32)
    share = np.minimum(4 * since_start(np.cumsum(known, dtype=np.int32) - known, first)
                       // np.maximum(context, 1), 3)
    size = np.minimum(floor_log2(np.maximum(context, 1)), 7)
    state = ((size * 4 + share) * 2 + repeated) * 2 + (gap <= age)
    return np.where(context, 2 * (1 + state * GAPS + np.minimum(floor_log2(gap) >> 1, GAPS - 1)) + same, 0)

def ngram_counts(tokens: np.ndarray, highest: int, describe: bool = True):
    """Yields (pair, code), uint32 and uint16 per position of `tokens`, for grams of n = 1 ... highest tokens.
    pair[t]: how many earlier positions end the same n-gram: c(u, v) of a target at t; its c(u) is the
    previous n's pair[t - 1]. code: see `describe_contexts`; 0 exactly where c(u) = 0."""
    here = np.arange(len(tokens), dtype=np.uint32)
    age = np.minimum(here - np.maximum.accumulate(np.where(tokens == BOS, here, 0)), 65535)
    stream = np.append(age[:1], age[:-1]) << 16 | tokens  # the age of the token BEFORE: no look at the target
    t = np.argsort(tokens, kind="stable").astype(np.uint32)
    first = np.append(True, tokens[t[1:]] != tokens[t[:-1]])
    pair, code = np.empty(len(tokens), np.uint32), np.zeros(len(tokens) if describe else 0, np.uint16)
    pair[t] = since_start(here, first)
    del here, age
    keep = t < len(tokens) - 1  # what ends the stream is no context
    t, first = t[keep] + 1, first[keep]
    yield pair, code
    for _ in range(2, highest + 1):
        pair, code, kept = np.zeros(len(tokens), np.uint32), np.zeros(len(code), np.uint16), 0
        for part in whole_groups(first):
            target, begin = t[part], first[part]
            word, number = stream[target], np.arange(len(target), dtype=np.uint32)
            order, split = sort_runs(np.cumsum(begin, dtype=np.uint64) << np.uint64(16) | (word & 0xFFFF))
            count = np.empty_like(number)
            count[order] = since_start(number, split)
            pair[target] = count
            if describe:
                code[target] = describe_contexts(target, word & 0xFFFF, word >> 16, begin,
                                                 since_start(number, begin), count)
            target = target[order] + 1
            keep = ~(split & np.append(split[1:], True)) & (target < len(tokens))
            size = np.count_nonzero(keep)
            t[kept: kept + size], first[kept: kept + size] = target[keep], split[keep]
            kept += size
        t, first = t[:kept], first[:kept]
        yield pair, code

def ngram_backoff(tokens: np.ndarray, hp: Hyperparameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, context count, pair count) per target: the longest gram whose context was followed by something
    at least NGRAM_MIN_COUNT times before. Order 0: none was. The choice never looks at the target."""
    order, context, pair = (np.zeros(len(tokens) - 1, kind) for kind in (np.uint8, np.uint32, np.uint32))
    levels = enumerate(pairwise(pair for pair, _ in ngram_counts(tokens, hp.ngram_order, describe=False)), 2)
    exact = ((n, shorter[:-1], pair[1:]) for n, (shorter, pair) in levels if n >= hp.ngram_min_order)
    for n, c_u, c_uv in hashed_counts(tokens, hp) if hp.ngram_counts == "hashed" else exact:
        wins = c_u >= hp.ngram_min_count
        order[wins] = n
        np.copyto(context, c_u, "unsafe", wins)
        np.copyto(pair, c_uv, "unsafe", wins)
    return order, context, pair

def hash_buckets(tokens: np.ndarray, n: int, hp: Hyperparameters, following: np.ndarray | None = None):
    """(context bucket, pair bucket with token `following`, by default its own) of targets from n - 2 on."""
    following = tokens[n - 1:] if following is None else following
    h = np.zeros(max(len(tokens) - n + 1, 0), np.uint64)
    for k in range(n - 1):
        h ^= tokens[k: k + len(h)].astype(np.uint64) * HASH_PRIMES[k]
    h &= np.uint64(hp.ngram_buckets - 1)
    return h, (h ^ following.astype(np.uint64) * HASH_PRIMES[n - 1]) & np.uint64(hp.ngram_buckets - 1)

def hashed_counts(tokens: np.ndarray, hp: Hyperparameters):
    """Yields (n, c(u), c(u, v)) of two independent hash tables (PR #889, #825, #806). Their quotient is NOT a
    probability: a token that never followed may own a bucket that others filled."""
    for n in range(hp.ngram_min_order, hp.ngram_order + 1):
        early = np.zeros(min(n - 2, len(tokens) - 1), np.int64)
        context, pair = (np.append(early, group(keys)[1]) for keys in hash_buckets(tokens, n, hp))
        yield n, context, np.minimum(pair, context)

def hashed_mass(tokens: np.ndarray, order: np.ndarray, targets: np.ndarray, hp: Hyperparameters) -> float:
    """What the hashed quotients of one position sum to over the vocabulary; the mean of matched `targets`."""
    masses, vocabulary = [], np.arange(hp.vocab_size)
    for target, n in zip(targets, order[targets].tolist()):
        bucket, filled = hash_buckets(tokens[:target + 2], n, hp)
        _, asked = hash_buckets(tokens[target + 2 - n: target + 2], n, hp, vocabulary)
        pair = np.bincount(filled[:-1].astype(np.int64), minlength=hp.ngram_buckets)[asked.astype(np.int64)]
        context = np.count_nonzero(bucket[:-1] == bucket[-1])
        masses.append(np.minimum(pair, context).sum() / context)
    return float(np.mean(masses)) if masses else math.nan

def backoff_weight(entropy: np.ndarray, order: np.ndarray, hp: Hyperparameters) -> np.ndarray:
    """Weight of the counts: ALPHA_MIN + (ALPHA_MAX - ALPHA_MIN) * sigmoid(2 * (H - centre)), H the model's
    entropy in nats; the centre is 4 (PR #889), or one per order (PR #825). 0 where no order matched."""
    center = 4.0 if hp.ngram_alpha == "entropy" else ORDER_CENTERS[np.clip(order.astype(int) - 2, 0, 5)]
    squashed = 1 / (1 + np.exp(-2 * (entropy.astype(np.float64) - center)))
    return np.where(order > 0, hp.alpha_min + (hp.alpha_max - hp.alpha_min) * squashed, 0.0)

def block_edges(total: int) -> list[int]:
    """0 ... total: blocks that grow with the stream, from 64 targets to what fits in the cache."""
    edges = [0]
    while edges[-1] < total:
        edges.append(min(edges[-1] + min(max(64, edges[-1] // 16), 1 << 16), total))
    return edges

def bucket_weights(mass: np.ndarray) -> np.ndarray:
    """(3, buckets): posterior mean of the experts' weights in each bucket of mass[expert, state, gap, heat],
    the targets that EM ascribed to each expert so far. Each level, all -> state -> gap -> heat, is the
    Dirichlet prior (worth 20 targets) of the next; where nothing was seen the model has 98 %."""
    levels, weights = [mass], np.array((0.98, 0.01, 0.01))
    while levels[-1].ndim > 1:
        levels.append(levels[-1].sum(-1))
    for seen in reversed(levels):
        weights = weights if seen.ndim == 1 else weights[..., None]
        weights = (seen + 20 * weights) / (seen.sum(0) + 20)
    return weights.reshape(3, -1)

class Mixture:
    """The model's scores mixed with counts, block after block as they come. NGRAM_ALPHA=online: p_1 = model,
        p_n(v) = w0 * p_{n-1}(v) + w1 * c(u, v) / c(u) + w2 * [v is what followed u last time],
    with weights of the context's bucket, learned by EM from strictly earlier blocks; then Bayes between p_N
    and the model: over the stream at most one bit worse than either. Else one order per target, mixed by
    entropy. All sum to 1 over the vocabulary, fixed by the prefix alone, in whatever pieces scores arrive."""

    def __init__(self, tokens: np.ndarray, hp: Hyperparameters, samples: int = 16):
        self.tokens, self.hp, self.targets = tokens, hp, len(tokens) - 1
        self.nll, self.edges, self.block = np.empty(self.targets), block_edges(self.targets), 0
        spread = (space(1, max(self.targets, 1), samples) for space in (np.geomspace, np.linspace))
        self.samples = np.unique(np.concatenate(list(spread)).astype(int) - 1)
        self.decided = {}  # sampled target -> [(order, w0, w1, w2, c(u), c(u, v)), ...], for the audit
        self.trusted = {}  # sampled target -> (p of the model, trust in the mixture)
        if hp.ngram_alpha == "online":
            counts, orders = ngram_counts(tokens, hp.ngram_order), hp.ngram_order - 1
            self.unigram, self.lead, self.counts = next(counts)[0], 0.0, []
            for pair, code in counts:
                self.counts += pair[code > 0].astype(np.min_scalar_type(pair.max())), code[code > 0]
                del pair, code  # a level is large: free it before the next is counted
            self.cursor, self.carry = np.zeros(orders, np.int64), np.zeros(orders, np.uint32)
            self.mass = np.zeros((orders, 3, STATES, GAPS, HEATS))
        else:
            self.counts = ngram_backoff(tokens, hp)

    def extend(self, nll: np.ndarray, entropy: np.ndarray) -> None:
        """Mix every block that ends within the scores so far: nats of the stream's first len(nll) targets."""
        mix = self.mix_online if self.hp.ngram_alpha == "online" else self.mix_backoff
        while self.block + 1 < len(self.edges) and self.edges[self.block + 1] <= len(nll):
            a, b = self.edges[self.block: self.block + 2]
            model = np.exp(-np.minimum(nll[a:b].astype(np.float64), 690))
            p, trust = mix(a, b, model, entropy[a:b])
            self.nll[a:b] = -np.log(trust * p + (1 - trust) * model)
            if not np.isfinite(self.nll[a:b]).all():
                raise RuntimeError(f"scores of targets {a} to {b} are not finite: the model has diverged")
            for target in self.samples[(a <= self.samples) & (self.samples < b)].tolist():
                self.trusted[target] = model[target - a], trust[target - a]
            self.block += 1

    def sample(self, targets: np.ndarray, orders: np.ndarray, weights, counts) -> None:
        """Remember what decides those of `targets` that the audit will look at."""
        for i in np.flatnonzero(np.isin(targets, self.samples)):
            facts = int(orders[i]), *(float(w[i]) for w in weights), *(int(c[i]) for c in counts)
            self.decided.setdefault(int(targets[i]), []).append(facts)

    def mix_backoff(self, a: int, b: int, model: np.ndarray, entropy: np.ndarray):
        """(mixed p of the targets [a, b), trust in it: all)."""
        order, context, pair = (array[a:b] for array in self.counts)
        alpha, rows = backoff_weight(entropy, order, self.hp), np.flatnonzero(order)
        weights = 1 - alpha[rows], alpha[rows], 0 * rows
        self.sample(rows + a, order[rows], weights, [context[rows], pair[rows]])
        return (1 - alpha) * model + alpha * pair / np.maximum(context, 1), np.ones(b - a)

    def mix_online(self, a: int, b: int, model: np.ndarray, entropy: np.ndarray):
        """(p_N of the targets [a, b), trust in it against the model by the likelihood of both so far)."""
        p, heat, context = model.copy(), np.clip(entropy, 0, HEATS - 1).astype(np.int64), self.unigram[a:b]
        for i, (mass, carry) in enumerate(zip(self.mass, self.carry)):
            rows = np.flatnonzero(context)
            c_u, at = context[rows], slice(self.cursor[i], self.cursor[i] + len(rows))
            c_uv, code = (array[at] for array in self.counts[2 * i: 2 * i + 2])  # kept where c(u) > 0
            if i + 2 >= self.hp.ngram_min_order:
                bucket = ((code >> 1) - 1) * np.int64(HEATS) + heat[rows]
                weights = [w[bucket] for w in bucket_weights(mass)]
                self.sample(rows + a, np.full(len(rows), i + 2), weights, [c_u, c_uv])
                parts = [w * q for w, q in zip(weights, (p[rows], c_uv / c_u, code & 1))]
                p[rows] = total = sum(parts)
                for flat, part in zip(mass.reshape(3, -1), parts):
                    flat += np.bincount(bucket, part / total, len(flat))
            context = np.zeros(b - a + 1, np.uint32)  # c(u, v) of this order is c(u) of the next, one later
            context[0], context[rows + 1] = carry, c_uv
            self.cursor[i], self.carry[i], context = at.stop, context[-1], context[:-1]
        odds = np.cumsum(np.append(self.lead, np.log(p / model)))
        self.lead = odds[-1]
        return p, 1 / (1 + np.exp(-np.clip(odds[:-1], -500, 500)))

    def audit(self) -> str:
        """Recount sampled targets by scanning the stream before them, sum their mixture over the vocabulary,
        and count a prefix alone. Returns facts for the log; RuntimeError if the mixture is no code."""
        masses, V = [], self.hp.vocab_size
        for target, (p_target, trust) in self.trusted.items():
            t = target + 1
            model = np.full(V, (1 - p_target) / (V - 1))  # the rest of its distribution is not at hand
            p, model[self.tokens[t]] = model, p_target
            for n, w0, w1, w2, *counts in self.decided.get(target, ()):
                past = np.flatnonzero(self.tokens[n - 2: t - 1] == self.tokens[t - 1]) + n - 1
                for k in range(2, n):
                    past = past[self.tokens[past - k] == self.tokens[t - k]]
                c = np.bincount(self.tokens[past], minlength=V)
                if [len(past), c[self.tokens[t]]] != counts:
                    raise RuntimeError(f"target {target}, order {n}: c(u), c(u, v) = {counts}, recounted: "
                                       f"{len(past)}, {c[self.tokens[t]]}")
                p = w0 * p + w1 * c / len(past)
                p[self.tokens[past[-1]]] += w2
            p = trust * p + (1 - trust) * model
            masses.append(p.sum())
            if abs(self.nll[target] + math.log(p[self.tokens[t]])) > 1e-6:
                raise RuntimeError(f"target {target} was scored {self.nll[target]} nats, -ln p is "
                                   f"{-math.log(p[self.tokens[t]])}")
        prefix = Mixture(self.tokens[: 1 << 14], self.hp)
        same = all(np.array_equal(some, whole[:len(some)]) for some, whole in zip(prefix.counts, self.counts))
        if not same or any(abs(mass - 1) > 1e-9 for mass in masses):
            raise RuntimeError(f"masses {masses}, or the counts of {prefix.targets} targets differ alone")
        return (f"targets:{self.edges[self.block]}/{self.targets} mass_min:{min(masses):.12f} "
                f"mass_max:{max(masses):.12f} recounted:{len(self.decided)} enumerated:{len(masses)} "
                f"prefix:{prefix.targets}")

# --- 11. Training -------------------------------------------------------------------------------------------

def training_loss(model: GPT, ids_BT: Tensor, targets_BT: Tensor, quantize: bool) -> Tensor:
    """Mean nats per token; with `quantize` (a compiler makes a graph for each), of the artifact's weights."""
    weights = fake_quantized(model, model.hp) if quantize else {}
    return torch.func.functional_call(model, weights, (ids_BT, targets_BT))

class Trainer:
    """The model with all that changes while it learns: optimizers, averages, steps done, seconds spent."""

    def __init__(self, model: GPT, loader: TokenLoader | None, rt: Runtime):
        self.model, self.loader, self.rt, self.hp = model, loader, rt, model.hp
        self.parameters, self.steps, self.seconds = list(model.parameters()), 0, 0.0
        self.checkpoint: Path | None = None  # the last whole one of this run
        compiled = self.hp.compile == "1" or self.hp.compile == "auto" and rt.device.type == "cuda"
        self.loss = torch.compile(training_loss, dynamic=False) if compiled else training_loss
        self.trunk = torch.compile(model, dynamic=False) if compiled else model
        self.optimizers = build_optimizers(model, self.hp, rt)
        decays = dict(ema=self.hp.ema_decay, swa=1.0)
        self.averages = {name: WeightAverage(decays[name], self.parameters)
                         for name in self.hp.averaging.split("_") if name in decays}

    def step(self, scale: float, quantize: bool) -> Tensor:
        """One update on batch `self.steps`, every lr times `scale`, shown to the averages. Returns the part of
        the batch's mean loss that this rank saw, detached: the ranks' sum is the loss."""
        total, passes = torch.zeros((), device=self.rt.device), self.loader.accumulation
        for micro in range(passes):
            x, y = (t.pin_memory() if self.rt.device.type == "cuda" else t
                    for t in self.loader.micro_batch(self.steps, micro))
            x, y = (t.to(self.rt.device, non_blocking=True) for t in (x, y))
            loss = self.loss(self.model, x, y, quantize) / (passes * self.rt.world_size)
            loss.backward()
            total += loss.detach()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        for group in self.optimizers[0].param_groups:
            group["momentum"] = muon_momentum(self.steps, self.hp)
        update(self.optimizers, self.rt, self.hp.grad_clip_norm)
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        for name, average in self.averages.items():
            if name == "ema" or scale < self.hp.swa_threshold and self.steps % self.hp.swa_every == 0:
                average.update(self.parameters)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes, by name, to be read or written. Of Muon's momentum only this
        rank's own share is current."""
        muon, adamw = self.optimizers
        named = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        named |= {f"muon.{i}": group["buffer"] for i, group in enumerate(muon.param_groups)}
        for i, state in enumerate(adamw.state.values()):
            named |= {f"adamw.{key}.{i}": value for key, value in state.items()}
        return named | {f"{name}.{i}": mean for name, a in self.averages.items() for i, mean in enumerate(a.mean)}

    def warm_up(self) -> None:
        """Run WARMUP_STEPS steps so that everything is compiled, the quantised graph too, then undo them."""
        kept, steps = {name: t.clone() for name, t in self.tensors().items()}, self.steps
        counts = [average.count for average in self.averages.values()]
        progress = Progress(self.rt, "warm-up", self.hp.warmup_steps)
        for i in range(self.hp.warmup_steps):
            self.step(1.0, quantize=self.hp.late_qat_threshold > 0 and i % 2 == 1)
            progress(i + 1)
        for name, t in self.tensors().items():
            t.copy_(kept[name])
        self.steps = steps
        for average, count in zip(self.averages.values(), counts):
            average.count = count

    def save(self) -> None:
        """Write the checkpoint logs/<RUN_ID>.ckpt, a NumPy archive: the run between two steps, for any number
        of ranks. Where a number is not finite or the disk is full it warns, and the one before is kept."""
        tensors, path = self.tensors(), self.rt.log_path and self.rt.log_path.with_suffix(".ckpt")
        for name in (name for name in tensors if name.startswith("muon")):
            own, tensors[name] = self.optimizers[0].own, torch.zeros_like(whole := tensors[name])
            own(tensors[name]).copy_(own(whole))
            self.rt.sum(tensors[name])
        try:
            if path:  # on rank 0, unless it is quiet
                progress = [self.steps, self.seconds, *(average.count for average in self.averages.values())]
                arrays = {name: t.numpy(force=True) for name, t in tensors.items()} | dict(
                    progress=np.float64(progress), rng=torch.get_rng_state().numpy())
                if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
                    raise UserError(f"step {self.steps}: {bad[0]} is not finite, so no checkpoint is written")
                arrays["settings"] = np.array(json.dumps(self.hp.as_env()))
                replace_file(path, lambda file: np.savez(file, **arrays))
                self.checkpoint = path
        except UserError as error:
            self.rt.log(f"warning: {error}")
        self.rt.barrier()

    def hint(self) -> str:
        return f"RESUME={self.checkpoint} goes on from there" if self.checkpoint else "there is no checkpoint"

    def restore(self, path: str) -> None:
        """Every rank gets what rank 0 has: the checkpoint at `path`, or, if that is "", the initial weights.
        UserError: no such file, a damaged one, or one of other tensors than the settings describe."""
        rt, progress, rng = self.rt, torch.zeros(2 + len(self.averages)).double(), torch.get_rng_state()
        arrays = read_checkpoint(path) if path and rt.rank == 0 else {}
        then = json.loads(str(arrays.get("settings", "{}")))
        for name, value in self.hp.as_env().items():
            if then.get(name, value) != value and name not in ("RUN_ID", "RESUME", "CHECKPOINT_EVERY"):
                rt.log(f"warning: {name}={value} here, {then[name]} in the checkpoint")
        for name, t in (self.tensors() | dict(progress=progress, rng=rng)).items():
            if arrays:
                found = arrays[name].shape if name in arrays else "absent"
                if found != t.shape:
                    raise UserError(f"RESUME={path}: {name} is {found}, these settings need {tuple(t.shape)}: set "
                                    "what the run was begun with")
                t.copy_(torch.from_numpy(arrays[name]))
            rt.from_rank_0(t)
        torch.set_rng_state(rng)
        self.steps, self.seconds, *counts = progress.tolist()
        self.steps = int(self.steps)
        for average, count in zip(self.averages.values(), counts):
            average.count = int(count)
        if path:
            rt.log(f"resume:{path} step:{self.steps} train_time:{1e3 * self.seconds:.0f}ms")

def read_checkpoint(path: str) -> dict[str, np.ndarray]:
    """All arrays of a NumPy archive; UserError: no such file, or cut or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # of many types: a damaged archive fails in NumPy, zipfile, zlib, struct ...
        raise UserError(f"RESUME={path}: not a whole checkpoint: {error}".split("\n")[0]) from None

def train(trainer: Trainer, validate) -> None:
    """Trains until ITERATIONS or the wall-clock cap; `validate()` gives (loss, bpb) and is not timed. Ranks
    follow rank 0's clock, of which checkpoints are a part; no step is begun that would pass the cap by taking
    twice the average. Leaves a checkpoint of the last step and the averaged weights in the model. Stopped: a
    signal came, the step was ended and a checkpoint left; UserError: the loss is not finite."""
    hp, rt = trainer.hp, trainer.rt
    trainer.warm_up()
    rt.barrier()
    rt.patient, saved, quantized, losses = True, trainer.seconds, False, []
    started = time.perf_counter() - trainer.seconds
    while True:
        now = time.perf_counter() - started if rt.rank == 0 else 0
        lost = losses and not math.isfinite(losses[0])  # of the step before the last: no wait for a GPU
        seconds, stopped, lost = rt.agree(now, bool(rt.stopped), bool(lost))
        step, trainer.seconds = trainer.steps, seconds
        label, scale = f"step:{step}/{hp.iterations}", lr_scale(step, seconds, hp)
        capped = step and 0 < hp.max_wallclock_seconds < seconds * (1 + 2 / step)
        last = capped or step >= hp.iterations
        if lost:
            raise UserError(f"step:{step + 1 - len(losses)}/{hp.iterations}: the training loss is not finite; "
                            f"lower the learning rates; {trainer.hint()}")
        if stopped or last or 0 < hp.checkpoint_every <= seconds - saved:
            saved = seconds
            trainer.save()
        if stopped:
            raise Stopped(f"{label}: stopped by {rt.stopped or 'a signal'}; {trainer.hint()}")
        if last or hp.val_loss_every and step and step % hp.val_loss_every == 0:
            rt.barrier()
            paused = time.perf_counter()
            loss, bpb = validate()
            rt.log(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1e3 * seconds:.0f}ms "
                   f"step_avg:{1e3 * seconds / step:.2f}ms")
            rt.barrier()
            started += time.perf_counter() - paused
        if last:
            break
        quantize = scale < hp.late_qat_threshold
        if quantize and not quantized:
            rt.log(f"late_qat:on step:{step} lr_scale:{scale:.4f} bits:{hp.quant_bits}")
        quantized = quantized or quantize
        losses = [*losses, trainer.step(scale, quantize)][-2:]
        rt.pace()
        if step < 10 or hp.train_log_every and (step + 1) % hp.train_log_every == 0:
            loss, ms = rt.sum(losses[-1].clone()).item(), 1e3 * (time.perf_counter() - started)
            rt.log(f"step:{step + 1}/{hp.iterations} train_loss:{loss:.4f} train_time:{ms:.0f}ms "
                   f"step_avg:{ms / (step + 1):.2f}ms tok/s:{hp.train_batch_tokens * (step + 1) / ms * 1e3:.0f} "
                   f"lr_scale:{scale:.4f}")
    rt.patient = False
    if rt.agree(bool(rt.stopped))[0]:  # while the last step was validated
        raise Stopped(f"stopped by {rt.stopped or 'a signal'}; {trainer.hint()}")
    if capped:
        rt.log(f"stopping_early: wallclock_cap train_time:{1e3 * seconds:.0f}ms {label}")
    weights = averaged_parameters(trainer.averages)
    for p, mean in zip(trainer.parameters, weights or []):
        p.data.copy_(mean)
    counts = " ".join(f"{name}_updates:{average.count}" for name, average in trainer.averages.items())
    rt.log(f"averaging:{hp.averaging if weights else 'none'} {counts} "
           f"parameters:{sum(p.numel() for p in trainer.parameters)}")

# --- 12. main -----------------------------------------------------------------------------------------------
# train -> average -> pack -> write -> read -> unpack -> score -> mix -> report

def log_header(trainer: Trainer, stream_bytes: np.ndarray) -> None:
    """What a reviewer needs to repeat the run: this source, versions, hardware, data, every setting."""
    hp, loader, rt = trainer.hp, trainer.loader, trainer.rt
    rt.log(f"{Path(__file__).read_text(encoding='utf-8')}\n{'=' * 100}", console=False)
    processor = f"{platform.processor() or platform.machine()} CPU"
    hardware = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else processor
    rt.log(f"python:{platform.python_version()} torch:{torch.__version__} cuda:{torch.version.cuda} "
           f"numpy:{np.__version__} platform:{platform.platform()}", console=False)
    rt.log(f"hardware:{rt.world_size} x {hardware} threads:{torch.get_num_threads()} cores:{os.cpu_count()} "
           f"attention:{trainer.model.attention_name} accumulation:{loader.accumulation if loader else 0}")
    data = dict(train=loader.paths[0]) if loader else {}
    data |= dict(val=find_shards("val", hp)[0], tokenizer=Path(hp.tokenizer_path))
    for name, path in data.items():
        rt.log(f"data:{name} first:{path} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}", False)
    rt.log(f"train_tokens:{loader.tokens if loader else 0} val_targets:{len(stream_bytes)} "
           f"val_bytes:{stream_bytes.sum()}")
    rt.log("\n".join(f"{name}={value}" for name, value in hp.as_env().items()), console=False)

def log_score(name: str, nll: np.ndarray, stream_bytes: np.ndarray, facts: str, rt: Runtime) -> float:
    """Log the mean nats per target and the bits per byte; returns the latter."""
    bpb = bits_per_byte(nll, stream_bytes)
    rt.log(f"{name}_exact val_loss:{nll.mean(dtype=np.float64):.8f} val_bpb:{bpb:.8f} {facts}".rstrip())
    return bpb

def report_mixture(mixture: Mixture, nll: np.ndarray, stream_bytes: np.ndarray, added: str, rt: Runtime):
    """Audit the mixture, log its score, return its bpb. Hashed counts get none, NaN: they are no code."""
    hp, bpb = mixture.hp, bits_per_byte(mixture.nll, stream_bytes)
    orders, kind = f"{hp.ngram_min_order}-{hp.ngram_order}", f"{hp.ngram_counts} alpha:{hp.ngram_alpha}"
    facts = f"orders:{orders} counts:{kind} {added}"
    if hp.ngram_counts == "hashed":
        order, matched = mixture.counts[0], np.flatnonzero(mixture.counts[0])
        spread = matched[np.linspace(0, len(matched) - 1, min(64, len(matched))).astype(int)]
        mean, end = (hashed_mass(mixture.tokens, order, some, hp) for some in (spread, matched[-64:]))
        rt.log(f"final_ngram_hashed pseudo_bpb:{bpb:.8f} mass:{end:.2f} mass_mean:{mean:.2f} {facts} (not a "
               f"probability: at the stream's end the counts sum to {end:.3g} over the vocabulary, not to 1)")
        return math.nan
    rt.log(f"ngram_audit {mixture.audit()}")
    gain = bits_per_byte(nll - mixture.nll, stream_bytes)
    return log_score("final_ngram", mixture.nll, stream_bytes, f"gain:{gain:.8f} {facts}", rt)

def scores_in_time(trainer: Trainer, tokens: np.ndarray, began: float):
    """(stride, segments of scores): EVAL_STRIDE or, where the third segment's speed projects an end later than
    95 % of EVAL_BUDGET_SECONDS after `began`, the smallest of WIDER_STRIDES that fits, or else the widest."""
    hp, rt, total = trainer.hp, trainer.rt, len(tokens) - 1
    strides = [hp.eval_stride, *(s for s in WIDER_STRIDES if hp.eval_stride < s <= hp.eval_seq_len)]
    for stride in strides:
        segments = score_stream(trainer.trunk, trainer.model, tokens, stride, rt)
        held = list(islice(segments, 2))
        begun = time.perf_counter()
        held += islice(segments, 1)
        now, done = time.perf_counter(), [part.shape[1] for part in held]
        projected = now - began + (now - begun) * (total - sum(done)) / max(done[-1], 1)
        late = rt.rank == 0 and sum(done) < total and 0 < 0.95 * hp.eval_budget_seconds < projected
        rt.log(f"eval_budget projected:{projected:.1f}s budget:{hp.eval_budget_seconds:g}s stride:{stride}")
        if not rt.agree(late)[0] or stride == strides[-1]:
            return stride, chain(held, segments)

def evaluate(trainer: Trainer, tokens: np.ndarray, stream_bytes: np.ndarray, began: float) -> dict[str, float]:
    """The model scores the stream and is mixed with counts while it scores; `began`: when training ended."""
    hp, rt, label = trainer.hp, trainer.rt, f"final_int{trainer.hp.quant_bits}"
    results, done, pending = {}, 0, []
    background = ThreadPoolExecutor(1)  # not waited for when the run is stopped
    mixture = background.submit(Mixture, tokens, hp) if hp.ngram_enabled and rt.rank == 0 else None
    nll, _ = collect(score_stream(trainer.trunk, trainer.model, tokens, hp.eval_seq_len, rt))
    if rt.rank == 0:
        log_score(f"{label}_roundtrip", nll, stream_bytes, "", rt)
    begun, scores = time.perf_counter(), np.empty((2, len(tokens) - 1 if rt.rank == 0 else 0), np.float32)
    nll, entropy = scores
    stride, segments = scores_in_time(trainer, tokens, began)
    for segment in segments:
        scores[:, done: done + segment.shape[1]] = segment
        done += segment.shape[1]
        if mixture:
            now = nll[:done], entropy[:done]
            pending.append(background.submit(lambda now=now: mixture.result().extend(*now)))
    scored = time.perf_counter()
    if rt.rank == 0:
        took = f"stride:{stride} eval_time:{1e3 * (scored - begun):.0f}ms"
        results["neural"] = log_score(f"{label}_sliding_window", nll, stream_bytes, took, rt)
    if mixture:
        for part in pending:
            part.result()
        added = f"added_time:{1e3 * (time.perf_counter() - scored):.0f}ms"
        results["mixed"] = report_mixture(mixture.result(), nll, stream_bytes, added, rt)
    if hp.save_scores and rt.rank == 0:
        arrays = dict(nll=nll, entropy=entropy, settings=np.array(json.dumps(hp.as_env())))
        arrays |= dict(mixed=mixture.result().nll.astype(np.float32)) if mixture else {}
        replace_file(rt.log_path.with_name(rt.log_path.stem + "_scores.npz"), lambda file: np.savez(file, **arrays))
    results["seconds"] = time.perf_counter() - began
    rt.log(f"total_eval_time:{results['seconds']:.1f}s budget:{hp.eval_budget_seconds:g}s stride:{stride}")
    return results

def last_screen(trainer: Trainer, results: dict, size: int) -> None:
    """The run for a person."""
    hp, mixed = trainer.hp, results.get("mixed", math.nan)
    counted = f"{mixed:.4f} bpb   with exact {hp.ngram_min_order}-{hp.ngram_order}-gram counts of the past"
    limit = f" of {hp.max_wallclock_seconds:.0f} s" if hp.max_wallclock_seconds else ""
    trainer.rt.log(f"""
  neural     {results["neural"]:.4f} bpb   every target once
  mixed      {counted if mixed == mixed else "no score: off, or hashed counts, which are no probability"}
  artifact   {size:,} bytes of {SIZE_CAP:,}, code included
  training   {trainer.seconds:.1f} s{limit}, {trainer.steps} steps
  evaluation {results["seconds"]:.1f} s of {hp.eval_budget_seconds:g} s
  log        {trainer.rt.log_path}""")

def prepare(hp: Hyperparameters, rt: Runtime, env: dict[str, str]) -> tuple[Trainer, np.ndarray, np.ndarray | None]:
    """(trainer, validation stream, on rank 0 its bytes per target), the same on all ranks; opens the log."""
    torch.manual_seed(hp.seed)
    loader = None if hp.eval_only else TokenLoader(hp, rt.rank, rt.world_size)
    tokens, count = load_validation(hp), ByteCounter(hp)
    rt.compare({"train_gpt.py": Path(__file__).read_bytes(), "settings": hp, "torch": torch.__version__,
                "data files": fingerprint(hp)})
    stream_bytes = count(tokens) if rt.rank == 0 else None
    trainer = Trainer(GPT(hp).to(rt.device), loader, rt)
    if rt.rank == 0:
        log_header(trainer, stream_bytes)
    for warning in mistyped(env):
        rt.log(f"warning: {warning}")
    if not hp.eval_only:
        trainer.restore(hp.resume)
    return trainer, tokens, stream_bytes

def main(env: dict[str, str]) -> None:
    hp = Hyperparameters.from_env(env)
    rt = Runtime(hp.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}_seed{hp.seed}", env)
    try:
        trainer, tokens, stream_bytes = prepare(hp, rt, env)

        def validate() -> tuple[float, float]:
            nll, _ = collect(score_stream(trainer.trunk, trainer.model, tokens, hp.eval_seq_len, rt))
            return (nll.mean(dtype=np.float64), bits_per_byte(nll, stream_bytes)) if rt.rank == 0 else (0, 0)

        path = Path(hp.eval_only or f"final_model.int{hp.quant_bits}.ptz")
        if not hp.eval_only:
            train(trainer, validate)
        began = time.perf_counter()
        if not hp.eval_only:
            loss, bpb = validate()  # of the weights that are packed: what packing costs shows in the next scores
            rt.log(f"final_float_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
            if rt.rank == 0:
                write_artifact(trainer.model, path, hp, rt)
        size = load_artifact(trainer.model, path, rt)
        if trainer.checkpoint and not hp.checkpoint_every:
            trainer.checkpoint.unlink(missing_ok=True)  # the artifact is whole
        results = evaluate(trainer, tokens, stream_bytes, began)
        if rt.rank == 0:
            last_screen(trainer, results, size)
        rt.barrier()
        rt.close()
    except BaseException as error:  # the group stays open, so that the others wait and the cause is seen
        rt.patient = True  # a signal does not cut short what is said now
        if "gloo/transport" in str(error):  # connection closed, reset, pipe broken ...
            error = UserError(f"another rank ended, see what it said{f'; {rt.stopped} came' * bool(rt.stopped)}")
        rt.log(f"error: {type(error).__name__}: {error}", console=False)
        raise error from None

def end(error: BaseException | None) -> None:
    """Leaves the process, with one line for an error that a user can mend. Rank 0 speaks first; then torchrun
    stops the others. Not sys.exit: a thread of gloo that drops its last tensor would crash Python's shutdown."""
    rank = int(os.environ.get("RANK", 0))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun, as rank 0 has spoken
    if error and not (rank and isinstance(error, Stopped)):
        time.sleep(5 if rank else 0)
        if isinstance(error, (UserError, OSError)):
            print(f"train_gpt.py: error: {f'rank {rank}: ' * bool(rank)}{error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if error else 0)

if __name__ == "__main__":
    try:
        main(dict(os.environ))
    except BaseException as error:
        end(error)
    end(None)
