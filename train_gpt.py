"""Parameter Golf: train a small GPT, pack it into 16 MB, and score a text in bits per byte.

    make demo                                                 on a laptop, nothing to download
    torchrun --standalone --nproc_per_node=8 train_gpt.py     on 8xH100, FineWeb under DATA_PATH
    SEED=42 EVAL_STRIDE=256 torchrun ...                      settings are environment variables

The work is done in four phases, which hand each other plain data. `run` [14] joins them:

    train       reads the shards and returns trained weights, with their curvature       [3-9]
    compress    turns weights into the bytes of a file; decompress reads them back       [6, 10]
    score       gives every validation token its nll and the prediction's entropy        [11, 12]
    mix         improves each nll with exact counts of the text that came before it      [13]

The score is sum(nll) / ln 2 / number of bytes. It belongs to the weights that were read back from
the file, not to those that training left in memory.

Where do I add ...
    a setting             a field of Hyperparameters [1]; read it where it acts; if it changes what
                          a trained model computes, its name in MODEL_SETTINGS [1]
    a feature of a layer  its module [4]: a parameter in __init__, its effect in forward; a row of
                          PARAMETERS [4], if its weights are not to be treated as a vector
    an optimizer          a class with the methods of SummedGradients, and a row of
                          `training_groups` [7]
    a quantiser           a class with RowQuantizer's methods, and a row of QUANTIZERS [10]
    a coder               a class with Rans's methods, and a row of CODERS [10]
    a mixing rule         a class with Backoff's methods, and a row of RULES [13]

Suffixes of tensors say their shape: B batch, T position in a window, D model width, W MLP width,
H query heads, G key/value heads, K head width, V vocabulary, N any flat number of positions, R rows
and C columns of a matrix (outputs and inputs), S a stack of matrices or, in attention, the last
positions. Losses are in nats per token until `bits_per_byte`.

In docstrings "Collective" means that every rank must call the function, and "UserError: ..." says
when it raises that error.
"""

import concurrent.futures
import difflib
import errno
import hashlib
import json
import lzma
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn
from torch import distributed as dist

try:
    import triton
    import triton.language as tl
except Exception:  # absent, or it cannot be loaded: then the MLP runs in its plain form
    triton = None

SOURCE = Path(__file__).read_bytes()  # read once: the file may change or move during the run
SIZE_CAP = 16_000_000  # bytes of code and compressed weights together (the challenge's rule)


class UserError(Exception):
    """An error the user can fix. One line: what was found, what was expected, what to do."""


class Stopped(BaseException):
    """A signal ended the run. (No Exception, so that nobody who catches those swallows it.)"""


def require(holds: bool, message: str, error: type[BaseException] = UserError) -> None:
    """Raise `error(message)` unless `holds`."""
    if not holds:
        raise error(message)


# --- 1. Settings --------------------------------
# Each setting is one field here, and an environment variable of the same name in capitals. A value
# that cannot work ends the run with a one-line error before any data is read.


MOST = 10**9  # the largest value of a number, unless its setting has another bound
LEAST = 1e-30  # the smallest magnitude of a number other than 0: far from where float32 ends
LONGEST_RUN_ID = 200  # bytes; a file name may have 255, and the run's files add to it


def setting(
    default,
    doc: str,
    low: float | None = None,
    high: float = MOST,
    choices: Callable[[], list[str]] | None = None,
):
    """A field of Hyperparameters: its default, one line of explanation and, where it has them, its
    bounds (low=None: there are none) or its choices. Choices come from a function, because the
    tables that they are read from, such as QUANTIZERS, are defined later in this file."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Hyperparameters:
    """All settings of a run. `from_env` checks each of them, and whether they fit together."""

    # Files and the run
    data_path: str = setting(
        "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_######.bin"
    )
    train_data_path: str = setting(
        "", "folder of the training shards; empty: DATA_PATH has them too"
    )
    tokenizer_path: str = setting(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the data"
    )
    run_id: str = setting("", "name of logs/<RUN_ID>.txt; empty: date, time and seed")
    seed: int = setting(
        1337, "seed of the initial weights and of the order of batches", 0, 2**63 - 1
    )
    eval_only: str = setting(
        "", "path of an artifact to score, which has the model's settings; nothing is trained"
    )
    resume: str = setting("", "path of a checkpoint (logs/<RUN_ID>.ckpt) to go on from")
    checkpoint_every: float = setting(
        0.0, "training seconds between checkpoints; 0: only at validations, stops and the end", 0
    )
    dry_run: bool = setting(False, "forecast the run from some timed steps, and train nothing")
    compile: str = setting(
        "auto", "use torch.compile; auto: on CUDA only", choices=lambda: ["auto", "0", "1"]
    )

    # Training
    iterations: int = setting(20_000, "maximum number of training steps", 1)
    max_wallclock_seconds: float = setting(600.0, "maximum seconds of training; 0: no limit", 0)
    warmdown_iters: int = setting(
        3500, "last steps, over which learning rates fall linearly; WARMDOWN_FRAC replaces it", 0
    )
    warmdown_frac: float = setting(
        0.0, "the last share of training, over which they fall; 0: use WARMDOWN_ITERS", 0, 1
    )
    min_lr: float = setting(0.0, "final learning rates, as a share of the initial ones", 0, 1)
    warmup_steps: int = setting(
        20, "steps before training that compile all code; not timed, and then undone", 0, 10_000
    )
    train_batch_tokens: int = setting(786_432, "tokens per step, over all ranks", 1)
    micro_batch_tokens: int = setting(98_304, "maximum tokens per forward pass on one rank", 1)
    train_seq_len: int = setting(2048, "tokens per training sequence", 1, 2**20)
    train_log_every: int = setting(500, "steps between train_loss lines; 0: only the first ten", 0)
    fused_mlp: bool = setting(True, "use Triton kernels for the MLP on CUDA")

    # Model
    vocab_size: int = setting(1024, "V, vocabulary size; must equal the tokenizer's", 2, 65_536)
    num_layers: int = setting(11, "L, number of blocks", 1, 256)
    model_dim: int = setting(512, "D, width of the residual stream", 1, 65_536)
    num_heads: int = setting(8, "H, query heads", 1)
    num_kv_heads: int = setting(4, "G, key/value heads (GQA)", 1)
    mlp_mult: float = setting(3.0, "MLP width as a multiple of D", 0, 65_536)
    leaky_slope: float = setting(0.5, "slope below zero in leaky_relu(x)^2", -1, 1)
    tie_embeddings: bool = setting(True, "use the token embedding as output head")
    logit_softcap: float = setting(30.0, "c in c*tanh(logits/c); 0: no cap", 0)
    rope_base: float = setting(10_000.0, "RoPE base", 1)
    rope_base_length: int = setting(
        1024, "longest window for which ROPE_BASE holds; longer ones have a larger base", 1
    )
    rope_dims: int = setting(16, "rotated dimensions of each head; 0: no position encoding", 0)
    qk_gain_init: float = setting(1.5, "initial gain of the queries, per head", -100, 100)
    table_gain_init: float = setting(
        0.0,
        "initial gain of the projections of the bigram and value tables; 0: 1/sqrt(2 NUM_LAYERS)",
        0,
        100,
    )
    xsa_last_n: int = setting(
        4, "number of last layers with XSA, in which a head ignores its own position", 0
    )
    ln_scale: bool = setting(True, "scale a block's normalised inputs by 1/sqrt(layer + 1)")
    unet_skips: bool = setting(True, "U-Net skips from the first half of the blocks to the second")
    skip_gates: bool = setting(
        False, "combine a skip by a learned gate per channel instead of adding it"
    )
    recur_layers: tuple[int, ...] = setting((), "layers (from 0) that run again; empty: none")
    recur_times: int = setting(2, "how often RECUR_LAYERS run in one forward pass", 2, 16)
    recur_start: float = setting(
        0.5, "share of training after which RECUR_LAYERS run again", 0, 0.95
    )
    parallel_start_layer: int = setting(
        0,
        "first layer with two residual streams (lanes): attention reads one, the MLP the other, "
        "and both write to both; 0: none",
        0,
    )
    attn_gate_dims: int = setting(
        0, "input channels from which the gate of each head's output is computed; 0: no gate", 0
    )
    smear_enabled: bool = setting(
        True, "SmearGate: mix each position's input with the one before it"
    )
    smear_gate_dims: int = setting(
        0,
        "input channels from which SmearGate computes its share; 0: a learned share per channel",
        0,
    )
    smear_crosses_bos: bool = setting(
        True, "SmearGate also mixes a document's start with the end of the previous one"
    )
    ve_enabled: bool = setting(True, "add a shared value embedding to the values of VE_LAYERS")
    ve_dim: int = setting(128, "width of the value embedding", 1, 65_536)
    ve_layers: tuple[int, ...] = setting(
        (9, 10), "layers (from 0) that receive the value embedding"
    )
    vrl_enabled: bool = setting(
        True, "value residual (VRL): mix each layer's values with layer 0's"
    )
    bigram_vocab_size: int = setting(2048, "rows of the hashed bigram embedding; 0: none", 0)
    bigram_dim: int = setting(128, "width of the hashed bigram embedding", 1, 65_536)

    # Optimizers
    tied_embed_lr: float = setting(0.035, "AdamW lr of all embeddings when TIE_EMBEDDINGS=1", 0)
    embed_lr: float = setting(0.6, "AdamW lr of all embeddings when TIE_EMBEDDINGS=0", 0)
    head_lr: float = setting(0.008, "AdamW lr of the output head when TIE_EMBEDDINGS=0", 0)
    matrix_lr: float = setting(0.025, "Muon lr", 0)
    scalar_lr: float = setting(0.025, "AdamW lr of vectors and scalars", 0)
    muon_momentum: float = setting(0.99, "Muon momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = setting(0.92, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = setting(
        1500, "steps over which the momentum rises linearly", 0
    )
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", 1, 100)
    muon_wd: float = setting(0.04, "Muon decoupled weight decay", 0, 1)
    muon_row_norm: bool = setting(
        False, "give all rows the same norm before Newton-Schulz (MuonEq-R, PR #1435)"
    )
    wd_taper_start_frac: float = setting(
        0.7, "share of training after which MUON_WD changes linearly", 0, 1
    )
    wd_taper_final_mult: float = setting(
        1.0, "Muon's final weight decay, as a multiple of MUON_WD; 1: it does not change", 0, 10
    )
    adam_wd: float = setting(0.04, "AdamW decoupled weight decay of vectors and head", 0, 1)
    embed_wd: float = setting(0.04, "AdamW decoupled weight decay of embeddings", 0, 1)
    beta1: float = setting(0.9, "AdamW beta1", 0, 0.99999)
    beta2: float = setting(0.95, "AdamW beta2", 0, 0.99999)
    adam_eps: float = setting(1e-8, "AdamW epsilon", 1e-16)
    grad_clip_norm: float = setting(0.3, "largest gradient norm; 0: no clipping", 0)

    # Averages and the artifact
    averaging: str = setting(
        "ema", "which average is packed", choices=lambda: ["none", "ema", "swa", "ema_swa"]
    )
    ema_decay: float = setting(0.997, "decay per step of the exponential average", 0, 1)
    swa_every: int = setting(50, "steps between snapshots of the uniform average", 1)
    swa_threshold: float = setting(0.2, "lr scale below which snapshots are taken", 0, 1)
    late_qat_threshold: float = setting(
        0.15, "lr scale below which training uses rounded weights (QAT); 0: never", 0
    )
    qat_rounding: str = setting(
        "straight",
        "gradient of QAT's rounding: passed straight through, or soft (arXiv 2006.09952)",
        choices=lambda: ["straight", "soft"],
    )
    quant_bits: int = setting(
        6, "bits per weight of a matrix, before they are fitted to the size cap", 3, 8
    )
    fill_budget: bool = setting(
        True, "use bytes left under the size cap for finer codes, of up to 8 bits"
    )
    quantizer: str = setting(
        "gptq",
        "how the artifact rounds; gptq: by measured inputs; rows: each row by itself",
        choices=lambda: list(QUANTIZERS),
    )
    coder: str = setting(
        "rans",
        "how codes become bytes; lzma: as PR #889 does it, for comparison",
        choices=lambda: list(CODERS),
    )
    gptq_reserve_seconds: float = setting(
        4.0, "part of MAX_WALLCLOCK_SECONDS kept to measure GPTQ's curvature; at most 1/10", 0.1
    )
    gptq_tokens: int = setting(
        131_072, "training tokens that the curvature is measured on, in whole batches", 1
    )

    # Scoring
    eval_seq_len: int = setting(2048, "tokens per scoring window", 1, 2**20)
    eval_stride: int = setting(
        64, "targets scored by each window, at its end, in the final score", 1
    )
    eval_budget_seconds: float = setting(
        600.0, "time limit of evaluation; EVAL_STRIDE grows to end within 95 % of it; 0: none", 0
    )
    val_loss_every: int = setting(4000, "steps between validations; 0: only after the last", 0)
    val_batch_size: int = setting(524_288, "tokens per scoring batch, over all ranks", 1)
    save_scores: bool = setting(False, "write every token's scores to logs/<RUN_ID>_scores.npz")

    # Test-time training
    ttt_epochs: int = setting(0, "times to train on each chunk once it is scored; 0: off", 0, 1000)
    ttt_chunk_tokens: int = setting(32_768, "targets that are scored, then trained on", 1)
    ttt_lr: float = setting(
        5e-4, "initial AdamW lr; rises up to 3 times over the stream, then falls to 0", 0
    )
    ttt_blocks: int = setting(
        2, "number of last blocks that learn; all vectors and the output head always do", 0
    )
    ttt_decay: float = setting(
        0.998, "decay per step of the weight average that is used for scoring", 0, 0.99999
    )
    ttt_lora_rank: int = setting(
        0, "rank of the adapters that each document trains for itself; 0: none", 0, 1024
    )
    ttt_lora_alpha: float = setting(
        144.0, "the adapters' change of a matrix is multiplied by this / TTT_LORA_RANK", 0
    )
    ttt_lora_lr: float = setting(
        1e-4, "AdamW lr of the adapters; 0: score documents apart, learn nothing", 0
    )
    ttt_chunk_size: int = setting(
        48, "targets of a document that are scored before its adapters learn from them", 1
    )
    ttt_batch_size: int = setting(
        64, "documents, or pieces of long ones, that a rank scores side by side", 1
    )

    # Mixture with n-gram counts
    ngram_enabled: bool = setting(True, "mix the model with counts of the n-grams that came before")
    ngram_min_order: int = setting(2, "length of the shortest n-gram, target included", 2, 16)
    ngram_order: int = setting(7, "length of the longest n-gram", 2, 16)
    ngram_alpha: str = setting(
        "online",
        "mixing rule; online: weights learned from earlier targets",
        choices=lambda: list(RULES),
    )
    ngram_threads: int = setting(
        0, "threads that count; 0: one per core, at most 8; changes no result", 0, 256
    )
    ngram_min_count: int = setting(
        2, "minimum count of a context before its order is used (rules entropy and order)", 1
    )
    alpha_min: float = setting(
        0.05, "weight of the counts where the model is sure (rules entropy and order)", 0, 1
    )
    alpha_max: float = setting(
        0.60, "weight of the counts where the model is unsure (rules entropy and order)", 0, 1
    )

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.model_dim // self.num_heads

    @property
    def model_numbers(self) -> int:
        """How many numbers the model's matrices and its table of positions hold."""
        D, V = self.model_dim, self.vocab_size
        values = self.num_kv_heads * self.head_dim
        block = 2 * D * D + 2 * D * values + 2 * D * int(self.mlp_mult * D)
        total = self.num_layers * block + V * D * (1 if self.tie_embeddings else 2)
        if self.bigram_vocab_size:
            total += (self.bigram_vocab_size + D) * self.bigram_dim
        if self.ve_enabled and self.ve_layers:
            total += (V + values) * self.ve_dim
        return total + self.train_seq_len * max(self.rope_dims, 1)

    @property
    def gptq_seconds(self) -> float:
        """The part of MAX_WALLCLOCK_SECONDS that is kept for measuring the curvature."""
        most = self.gptq_reserve_seconds if self.quantizer == "gptq" else 0.0
        return min(most, self.max_wallclock_seconds / 10)

    @property
    def seconds_for_steps(self) -> float:
        """The part of MAX_WALLCLOCK_SECONDS that all training steps may use; 0: no limit."""
        return self.max_wallclock_seconds - self.gptq_seconds

    @classmethod
    def from_env(cls, env: dict[str, str]) -> "Hyperparameters":
        """The settings in `env`, and defaults for the others. UserError: a value cannot work; the
        message names the variable, its value and what it may hold."""
        given = [f for f in fields(cls) if f.name.upper() in env]
        return cls(**{f.name: parse_setting(f, env[f.name.upper()]) for f in given})

    def without_effect(self, env: dict[str, str]) -> list[str]:
        """A warning for each setting in `env` that these settings keep from having an effect."""
        reasons = {name: self.reason_for_no_effect(name) for name in self.as_env() if name in env}
        found = {name: reason for name, reason in reasons.items() if reason}
        return [f"{name}={env[name].strip()} has no effect with {found[name]}" for name in found]

    def reason_for_no_effect(self, name: str) -> str:
        """NAME=value of the setting that keeps the setting `name` from having an effect; empty if
        there is none."""
        env = self.as_env()
        for switch, values, feature in FEATURES:
            if name in feature.split():
                text = env[switch]
                is_listed = not text or text in values.split()
                is_on = is_listed != values.startswith("not ")
                return self.reason_for_no_effect(switch) if is_on else f"{switch}={text}"
        return ""

    def as_env(self) -> dict[str, str]:
        """All settings as they would be written in the environment."""
        texts = {}
        for name, value in vars(self).items():
            texts[name.upper()] = ",".join(map(str, value)) if type(value) is tuple else str(value)
        return texts

    def of_model(self) -> dict[str, str]:
        """Those of MODEL_SETTINGS, as they would be written in the environment."""
        texts = self.as_env()
        return {name: texts[name] for name in MODEL_SETTINGS}

    def __post_init__(self):
        """UserError: some settings cannot work together; names the first conflict."""
        for names, rule in self.conflicts():
            texts = self.as_env()
            found = ", ".join(f"{name}={texts[name]}" for name in names.split())
            raise UserError(f"{found}: {rule}")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Finds settings that cannot work together. Yields their names, separated by spaces, and
        what is wrong or what was expected."""
        if self.run_id and not is_file_name(self.run_id):
            rule = 'no spaces, control characters or any of /\\:*?"<>|, no dot in front'
            yield "RUN_ID", f"expected a file name of at most {LONGEST_RUN_ID} bytes: {rule}"
        if self.model_dim % self.num_heads:
            yield "MODEL_DIM NUM_HEADS", "expected heads that divide the width"
        if self.num_heads % self.num_kv_heads:
            yield "NUM_HEADS NUM_KV_HEADS", "expected NUM_KV_HEADS to divide NUM_HEADS"
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            most = f"the head width MODEL_DIM/NUM_HEADS = {self.head_dim}"
            yield "ROPE_DIMS", f"expected an even number up to {most}"
        if self.mlp_mult * self.model_dim < 1:
            yield "MLP_MULT", "the MLP would have no units"
        if 0 < self.logit_softcap < 0.01:
            yield "LOGIT_SOFTCAP", "expected at least 0.01, or 0 for no cap"
        if self.ve_enabled and not set(self.ve_layers) <= set(range(self.num_layers)):
            yield "VE_LAYERS", f"expected layers 0 to {self.num_layers - 1}, or VE_ENABLED=0"
        valid = sorted(set(self.recur_layers) & set(range(self.num_layers)))
        if list(self.recur_layers) != valid:  # not rising, or no such layer
            yield "RECUR_LAYERS", f"expected rising numbers from 0 to {self.num_layers - 1}"
        start = self.parallel_start_layer
        if start >= self.num_layers:
            yield "PARALLEL_START_LAYER", f"expected at most {self.num_layers - 1}; 0: no lanes"
        if len({layer < start for layer in self.recur_layers}) == 2:
            rule = "expected the lanes to start before or after all layers that run again"
            yield "PARALLEL_START_LAYER RECUR_LAYERS", rule
        for name in ("ATTN_GATE_DIMS", "SMEAR_GATE_DIMS"):
            if getattr(self, name.lower()) > self.model_dim:
                yield f"{name} MODEL_DIM", "expected at most MODEL_DIM"
        if self.bigram_vocab_size == 1:
            yield "BIGRAM_VOCAB_SIZE", "expected 0 (off) or at least 2"
        if self.model_numbers > MOST_WEIGHTS:
            names = "NUM_LAYERS MODEL_DIM MLP_MULT VOCAB_SIZE VE_DIM BIGRAM_VOCAB_SIZE BIGRAM_DIM"
            names += " TRAIN_SEQ_LEN ROPE_DIMS"
            found = f"the model would hold {self.model_numbers:,} numbers"
            yield names, f"{found}, but an artifact may have at most {MOST_WEIGHTS:,}"
        over = self.train_batch_tokens % self.train_seq_len
        if over and not self.eval_only:
            below = self.train_batch_tokens - over
            nearest = [str(n) for n in (below, below + self.train_seq_len) if n]
            rule = f"expected a multiple of the second; nearest: {' and '.join(nearest)}"
            yield "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN", rule
        if self.beta1**2 > self.beta2:
            yield "BETA1 BETA2", "expected BETA1 <= sqrt(BETA2), or AdamW's steps have no bound"
        if self.eval_stride > self.eval_seq_len:
            yield "EVAL_STRIDE EVAL_SEQ_LEN", "the windows would leave targets unscored"
        if self.ttt_epochs and self.ttt_lora_rank:
            yield "TTT_EPOCHS TTT_LORA_RANK", "set only one: each is a way to learn while scoring"
        if self.ttt_lora_rank and self.ttt_chunk_size > self.eval_seq_len:
            yield "TTT_CHUNK_SIZE EVAL_SEQ_LEN", "a chunk must fit into a window"
        if self.eval_only and self.resume:
            yield "EVAL_ONLY RESUME", "set only one: each names the file to take the weights from"
        if self.ngram_min_order > self.ngram_order:
            yield "NGRAM_MIN_ORDER NGRAM_ORDER", "expected the first to be at most the second"
        if not self.alpha_min <= self.alpha_max < 1:
            yield "ALPHA_MIN ALPHA_MAX", "expected ALPHA_MIN <= ALPHA_MAX < 1"


ON = "not 0 0.0 False"  # any value but these, and not empty
FEATURES = [  # a switch, the values with which it is on, and the settings that matter only then
    ("VE_ENABLED", ON, "VE_LAYERS"),
    ("VE_LAYERS", ON, "VE_DIM"),
    ("BIGRAM_VOCAB_SIZE", ON, "BIGRAM_DIM"),
    ("ROPE_DIMS", ON, "ROPE_BASE ROPE_BASE_LENGTH"),
    ("RECUR_LAYERS", ON, "RECUR_START RECUR_TIMES"),
    ("UNET_SKIPS", ON, "SKIP_GATES"),
    ("SMEAR_ENABLED", ON, "SMEAR_CROSSES_BOS SMEAR_GATE_DIMS"),
    ("TIE_EMBEDDINGS", "True", "TIED_EMBED_LR"),
    ("TIE_EMBEDDINGS", "False", "EMBED_LR HEAD_LR"),
    ("WARMDOWN_FRAC", "0.0", "WARMDOWN_ITERS"),
    ("MUON_MOMENTUM_WARMUP_STEPS", ON, "MUON_MOMENTUM_WARMUP_START"),
    ("MUON_WD", ON, "WD_TAPER_FINAL_MULT"),
    ("WD_TAPER_FINAL_MULT", "not 1.0", "WD_TAPER_START_FRAC"),
    ("AVERAGING", "ema ema_swa", "EMA_DECAY"),
    ("AVERAGING", "swa ema_swa", "SWA_EVERY SWA_THRESHOLD"),
    ("LATE_QAT_THRESHOLD", ON, "QAT_ROUNDING"),
    ("QUANTIZER", "gptq", "GPTQ_TOKENS GPTQ_RESERVE_SECONDS"),
    ("TTT_EPOCHS", ON, "TTT_CHUNK_TOKENS TTT_LR TTT_BLOCKS TTT_DECAY"),
    ("TTT_LORA_RANK", ON, "TTT_LORA_ALPHA TTT_LORA_LR TTT_CHUNK_SIZE TTT_BATCH_SIZE"),
    ("NGRAM_ENABLED", ON, "NGRAM_MIN_ORDER NGRAM_ORDER NGRAM_ALPHA NGRAM_THREADS"),
    ("NGRAM_ALPHA", "entropy order", "NGRAM_MIN_COUNT ALPHA_MIN ALPHA_MAX"),
]


def is_file_name(text: str) -> bool:
    """Can `text` begin the names of a run's files on any system, and stand in a line of the log?"""
    is_one_word = text.isprintable() and not set(text) & set(' /\\:*?"<>|')
    return is_one_word and text[0] != "." and len(text.encode()) <= LONGEST_RUN_ID


def parse_text(text: str) -> str:
    """ValueError: it has control characters, or white space at an end. (A file of settings with
    Windows line ends leaves a carriage return there; a path must not be changed silently.)"""
    require(text == text.strip() and not re.search(r"[\x00-\x1f\x7f]", text), text, ValueError)
    return text


def parse_float(text: str) -> float:
    """ValueError: not a number. -0.0 becomes 0.0."""
    return float(text) + 0.0


# The settings that an artifact holds: all that change what the trained network computes, and how
# the file is packed. (Settings that only training or only scoring reads, as QK_GAIN_INIT, are not.)
MODEL_SETTINGS = (
    *("VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT"),
    *("LEAKY_SLOPE", "TIE_EMBEDDINGS", "LOGIT_SOFTCAP", "TRAIN_SEQ_LEN"),
    *("ROPE_BASE", "ROPE_BASE_LENGTH", "ROPE_DIMS", "XSA_LAST_N", "LN_SCALE"),
    *("UNET_SKIPS", "SKIP_GATES", "RECUR_LAYERS", "RECUR_TIMES", "PARALLEL_START_LAYER"),
    *("ATTN_GATE_DIMS", "SMEAR_ENABLED", "SMEAR_GATE_DIMS", "SMEAR_CROSSES_BOS"),
    *("VE_ENABLED", "VE_DIM", "VE_LAYERS", "VRL_ENABLED", "BIGRAM_VOCAB_SIZE", "BIGRAM_DIM"),
    *("QUANT_BITS", "CODER"),
)


def settings_to_score(path: str, stored: dict[str, str], env: dict[str, str]) -> Hyperparameters:
    """The settings with which to score the artifact at `path`: those that it holds, `stored`, and
    those in `env`. UserError: `env` has another value for one that it holds, or a value cannot
    work."""
    by_name = {f.name.upper(): f for f in fields(Hyperparameters)}
    for name in sorted(stored.keys() & env.keys()):
        there, here = (parse_setting(by_name[name], texts[name]) for texts in (stored, env))
        require(
            here == there,
            f"{name}={env[name]}: expected {stored[name]}, with which EVAL_ONLY={path} was made; "
            f"unset {name}, or set it to that",
        )
    return Hyperparameters.from_env({**env, **stored, "EVAL_ONLY": path})


def parse_bool(text: str) -> bool:
    """KeyError: not 0, 1, false or true."""
    return {"0": False, "false": False, "1": True, "true": True}[text.strip().lower()]


def parse_integers(text: str) -> tuple[int, ...]:
    """ValueError: not integers with commas between them. An empty text is an empty tuple."""
    return tuple(int(part) for part in text.split(",") if part.strip())


PARSERS = {  # by the type of a setting's default: how to read it, and what to expect
    str: (parse_text, "text without control characters (Windows line ends?) or spaces around it"),
    int: (int, "an integer"),
    float: (parse_float, "a number"),
    bool: (parse_bool, "0 or 1"),
    tuple: (parse_integers, "comma-separated integers"),
}


def parse_setting(f, text: str):
    """The value that `text` means for the field `f`. UserError: not of its type, not one of its
    choices, or out of bounds."""
    parse, expected = PARSERS[type(f.default)]
    low, high, list_choices = (f.metadata[key] for key in ("low", "high", "choices"))
    choices = list_choices() if list_choices else []
    if choices:
        parse, expected = str.strip, f"one of {', '.join(choices)}"
    elif low is not None:
        expected += f" from {low:,} to {high:,}"

    with suppress(ValueError, KeyError):
        value = parse(text)
        is_allowed = value in choices if choices else low is None or low <= value <= high
        if type(value) is float and 0 < abs(value) < LEAST:
            expected += f"; if not 0, at least {LEAST} in size"
        elif is_allowed:
            return value
    found = shortened_text(text)
    raise UserError(f"{f.name.upper()}={found!r}: expected {expected} (default {f.default!r})")


def shortened_text(text: str) -> str:
    """The first 200 characters of a text that stands in a message."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def setting_groups() -> dict[str, list]:
    """The fields of Hyperparameters by group. The comments above them in the source are the
    titles."""
    lines = SOURCE.decode().split("class Hyperparameters:")[1]
    heads = {first: title for title, first in re.findall(r"\n    # ([A-Z].*)\n    (\w+):", lines)}
    groups = {}
    for f in fields(Hyperparameters):
        if f.name in heads:
            group = groups.setdefault(heads[f.name], [])
        group.append(f)
    return groups


def allowed(f) -> str:
    """What the field `f` may hold, in words; empty if that is any text."""
    low, high, list_choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if list_choices:
        return ", ".join(list_choices())
    if low is None:
        return ""
    return f"from {low:,}" if high == MOST else f"{low:,} to {high:,}"


def help_text() -> str:
    """All settings, in groups: name, default, what it may hold, and what it does."""
    parts = [
        "Trains a small GPT, packs it into 16 MB, and scores a text in bits per byte.\n\n"
        "  SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py    one rank per GPU\n"
        "  SEED=42 python train_gpt.py                                      one rank, or a CPU\n\n"
        "There are no arguments. Settings are environment variables; without any, the model and\n"
        "its training are those of PR #889. Defaults stand behind the =, allowed values in\n"
        "brackets."
    ]
    defaults = Hyperparameters().as_env()
    for title, group in setting_groups().items():
        lines = [f"\n{title}"]
        for f in group:
            name = f.name.upper()
            bounds = f"  [{allowed(f)}]" if allowed(f) else ""
            lines.append(f"  {name}={defaults[name]}{bounds}\n      {f.metadata['doc']}")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def refuse_arguments(arguments: list[str]) -> None:
    """UserError: the script was started with arguments, which it does not take. The message shows
    the command with these arguments written as settings."""
    # torch.distributed.launch adds --local-rank=N, which the variable LOCAL_RANK says too
    arguments = [a for a in arguments if not re.fullmatch(r"--local[-_]rank=\d+", a)]
    if not arguments:
        return
    known = {f.name.upper() for f in fields(Hyperparameters)}
    text = " ".join(map(shlex.quote, arguments)).replace("\n", " ")
    names = {}
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.upper().replace("-", "_")
        if equals or (argument.startswith("--") and name):
            names[name] = value if equals else following
    meant = [f"{name}={shlex.quote(value)}" for name, value in names.items() if name in known]
    example = " ".join(meant) or "SEED=42"
    rule = "settings are environment variables; write them in front of the command"
    similar = mistyped(dict.fromkeys(names, ""))
    unknown = [line.replace(" is set but", "") for line in similar]
    message = f"{rule}: {example} torchrun ... train_gpt.py; --help lists them"
    raise UserError("; ".join([f"arguments {shortened_text(text)}: {message}", *unknown]))


# Words that other scripts use in the names of settings, and the word of ours that means the same.
OTHER_WORDS = {
    "DATA": "DATASET DATASETS",
    "PATH": "DIR FOLDER FILE",
    "ID": "NAME",
    "ITERS": "ITERATIONS ITERATION ITER STEPS STEP",
    "SECONDS": "TIME LIMIT",
    "EVERY": "INTERVAL FREQ",
    "CHECKPOINT": "CKPT SAVE",
    "LR": "LEARNING_RATE",
    "WD": "WEIGHT_DECAY",
    "TOKENS": "SIZE",
    "SEQ": "CONTEXT CTX SEQUENCE",
    "LEN": "LENGTH",
    "VAL": "VALIDATION",
    "DIM": "WIDTH HIDDEN",
    "EMBED": "EMBD EMBEDDING EMBEDDINGS",
    "LAYERS": "DEPTH",
    "MULT": "RATIO",
    "BASE": "THETA",
    "MATRIX": "MUON",
    "QUANT": "QUANTIZATION",
}
NO_WORDS = {"", "N", "D", "NUM", "USE", "ENABLE", "ENABLED"}  # these say little
OFTEN_SET = re.compile(  # names in many environments that would resemble a setting
    r"((OMP|MKL|OPENBLAS|NUMEXPR)_)?NUM_THREADS|.*(_RUN_ID|_NODE|MODEL_DIR|MODEL_PATH)"
    r"|(TORCH|GITHUB|SLURM|CUDA|NCCL|HF|WANDB).*"
)
# A single one of these words is enough to mean a setting; other single words are too common.
TELLING = {
    *("LR", "WD", "STRIDE", "LAYER", "HEAD", "VOCAB", "TOKENIZER", "BIT", "QUANT", "EMA", "SWA"),
    *("WALLCLOCK", "ITER", "WARMUP", "WARMDOWN", "DIM", "MOMENTUM", "SOFTCAP", "NGRAM", "TTT"),
    *("GPTQ", "XSA", "VRL", "VE", "BIGRAM", "DATA", "CHECKPOINT"),
}


def words_of(name: str) -> set[str]:
    """The words of a variable's name, in capitals and without a plural S; those of OTHER_WORDS are
    replaced by ours."""
    text = f"_{name.upper()}_"
    for word, others in OTHER_WORDS.items():
        for other in others.split():
            text = text.replace(f"_{other}_", f"_{word}_")
    return {word.removesuffix("S") for word in text.split("_") if word not in NO_WORDS}


def similar_settings(name: str) -> list[str]:
    """At most three settings that a user may have meant by the variable `name`, best first. Either
    their spelling is nearly the same, in any case, or they share most of their words."""
    known = [f.name.upper() for f in fields(Hyperparameters)]
    if OFTEN_SET.fullmatch(name):
        return []
    similar = difflib.get_close_matches(name.upper(), known, cutoff=0.82)  # of 1; chosen by hand
    if similar:
        return similar
    words = words_of(name)
    if len(words) == 1 and not words & TELLING:
        return []
    shared = {other: len(words & words_of(other)) / len(words | words_of(other)) for other in known}
    found = [
        other for other in known if words and (shared[other] >= 0.5 or words < words_of(other))
    ]
    return sorted(found, key=shared.get, reverse=True)[:3]


def mistyped(env: dict[str, str]) -> list[str]:
    """A warning for each name in `env` that is not a setting but resembles one."""
    warnings = []
    for name in sorted(set(env) - {f.name.upper() for f in fields(Hyperparameters)}):
        similar = similar_settings(name)
        if similar:
            question = f"did you mean {' or '.join(similar)}?"
            warnings.append(f"{name} is set but is no setting; {question}")
    return warnings


# --- 2. Runtime ---------------------------------
# What a run needs apart from training itself: talking to the other ranks, the log, signals,
# progress, safe writing of files. On a single rank every collective returns its input, so that a
# laptop and a cluster run the same code.


class Transfer(NamedTuple):
    """A collective that is under way. Do not read its result before `wait` has returned it."""

    result: Tensor
    work: "dist.Work | None" = None  # None: a single rank has nothing to wait for

    def wait(self) -> Tensor:
        """The result, once it is there."""
        if self.work is not None:
            self.work.wait()
        return self.result


RENDEZVOUS_SECONDS = 300  # how long ranks wait for each other at the start


def place_among_ranks(env: dict[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them in `env`; 0, 1 and 0 if they are not
    there. UserError: they do not fit together, or a variable that ranks need to meet is absent."""
    numbers = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = env.get(name) or alone
        is_number = text.isdecimal() and len(text) < 10
        require(
            is_number, f"{name}={text!r}: expected an integer, as torchrun sets it; or unset it"
        )
        numbers.append(int(text))
    rank, world_size, _ = numbers
    found = f"RANK={rank}, WORLD_SIZE={world_size}"
    require(rank < world_size, f"{found}: a rank must be below WORLD_SIZE; or unset both")
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in names if not env.get(name)]
    require(
        world_size == 1 or not absent,
        f"WORLD_SIZE={world_size} without {', '.join(absent)}: start with torchrun "
        f"--standalone --nproc_per_node={world_size} train_gpt.py, or unset WORLD_SIZE",
    )
    return tuple(numbers)


def meet(backend: str, world_size: int) -> None:
    """Connect to the other ranks at MASTER_ADDR:MASTER_PORT. UserError: they are not all there
    within RENDEZVOUS_SECONDS."""
    patience = timedelta(seconds=RENDEZVOUS_SECONDS)
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=patience))
        store.set(f"rank {rank}", "is here")
        store.wait([f"rank {number}" for number in range(world_size)], patience)
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cause = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"not all of the {world_size} ranks met at {place} within {RENDEZVOUS_SECONDS} s "
            f"({cause}): start all of them, with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from None
    store.set_timeout(timedelta(minutes=30))  # torch's own, for all that comes after
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def unusable_gpu(device: torch.device, env: dict[str, str], root: Path = Path("/")) -> list[str]:
    """A warning if the run takes the CPU of a machine with the driver of an NVIDIA GPU, unless
    CUDA_VISIBLE_DEVICES hides the GPU on purpose. `root`: where dev is."""
    is_hidden = env.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_gpu = any(root.glob("dev/nvidia[0-9]*"))
    if device.type == "cuda" or is_hidden or not has_gpu:
        return []
    reason = "no GPU is visible"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an old driver, or torch without CUDA
        reason, *_ = str(error).splitlines()
    return [
        f"this machine has an NVIDIA GPU that torch cannot use, so the run takes the CPU: {reason}"
    ]


class Ranks:
    """This process's place among those that torchrun started, its device, and all communication
    between them. Every rank must call each method, in the same order. Numbers and CPU tensors go
    through gloo, not NCCL, so that ranks can agree on the time without waiting for their GPUs."""

    def __init__(self, env: dict[str, str]):
        self.rank, self.world_size, local_rank = place_among_ranks(env)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            problem = f"LOCAL_RANK={local_rank}, {gpus} GPUs: set --nproc_per_node={gpus}"
            require(local_rank < gpus, problem)
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where weights stay float32
        if self.world_size > 1:
            cuda = self.device.type == "cuda"
            meet("cpu:gloo,cuda:nccl" if cuda else "gloo", self.world_size)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """`x` itself, overwritten with the sum of all ranks' `x`."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks, in float64."""
        return self.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def any(self, *facts: bool) -> list[bool]:
        """For each fact, whether it holds on at least one rank."""
        return [count > 0 for count in self.sum_numbers(*facts)]

    def from_rank0(self, x: Tensor | float | str) -> Tensor | float | str:
        """Rank 0's `x`, on every rank. A tensor is overwritten in place; a number comes back as a
        float."""
        if isinstance(x, Tensor):
            if self.world_size > 1:
                dist.broadcast(x, 0)
            return x
        if isinstance(x, str):
            letters = torch.tensor(list(x.encode()), dtype=torch.uint8)
            letters = letters.resize_(int(self.from_rank0(len(letters))))
            return bytes(self.from_rank0(letters).tolist()).decode()
        return self.from_rank0(torch.tensor(x, dtype=torch.float64)).item()

    def reduce_scatter(self, x: Tensor) -> Transfer:
        """Begin to sum `x` over the ranks. The rows of the sum are cut into equal parts, one for
        each rank; rank r receives part r. The number of ranks must divide the number of rows."""
        if self.world_size == 1:
            return Transfer(x)
        share = x.new_empty(len(x) // self.world_size, *x.shape[1:])
        collective = getattr(dist, "reduce_scatter_single", None)  # the new name, torch >= 2.13
        collective = collective or dist.reduce_scatter_tensor
        return Transfer(share, collective(share, x, async_op=True))

    def all_gather(self, share: Tensor) -> Transfer:
        """Begin to join the rows of all ranks' `share` into one tensor, in the order of ranks."""
        if self.world_size == 1:
            return Transfer(share)
        whole = share.new_empty(len(share) * self.world_size, *share.shape[1:])
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return Transfer(whole, collective(whole, share, async_op=True))

    def require_equal(self, facts: dict[str, object]) -> None:
        """UserError: one of the `facts`, name -> value, is not the same on every rank. Values are
        compared by their repr."""
        for name, fact in facts.items():
            checksums = [0.0] * self.world_size  # every rank fills in its own; the sum has them all
            checksums[self.rank] = zlib.crc32(repr(fact).encode())
            checksums = self.sum_numbers(*checksums)
            differ = [str(rank) for rank, crc in enumerate(checksums) if crc != checksums[0]]
            require(
                not differ,
                f"rank {', '.join(differ)}: {name} differ from rank 0's: use the same files and "
                "settings everywhere",
            )

    def barrier(self) -> None:
        """Wait until all ranks and their GPUs have done their work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.sum_numbers(0)

    def close(self) -> None:
        """Leave the group of ranks."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def fill_closed_streams() -> None:
    """Open /dev/null in the place of standard input, output or error, if they are closed. Otherwise
    the next file, such as a checkpoint, would get the number of the closed one, and what C++
    libraries print would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number


def say(text: str, stream, end: str = "\n") -> None:
    """Print to a console: sys.stdout or sys.stderr. Characters that it cannot show are escaped. It
    never fails: the text is lost if the console is closed, a pipe that nobody reads, or a file on a
    full disk."""
    if stream is None:  # it was closed before Python started
        return
    with suppress(OSError, ValueError):  # ValueError: it has been closed since
        if stream is sys.stderr and is_live(stream):
            text = CLEAR + text  # an unfinished bar may stand there
        encoding = getattr(stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        print(shown, end=end, file=stream, flush=True)


def is_live(stream=None) -> bool:
    """Is the stream, or standard output, a terminal, where a line can be written over?"""
    with suppress(AttributeError, OSError, ValueError):  # None, or closed
        return (stream or sys.stdout).isatty()
    return False


CLEAR = "\r\033[K"  # erases the line of a terminal, such as a bar that is not full yet


def write_problem(path: Path, error: OSError) -> str:
    """One line for people: why the file `path` cannot be written, and what to do about it."""
    folder = path.parent
    cannot_write = f"let this user write to the folder {folder}, or run in another one"
    remedies = {
        errno.ENOSPC: "free space there",
        errno.EDQUOT: "free space there, or get a larger quota",
        errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.EACCES: cannot_write,
        errno.EPERM: cannot_write,
        errno.EROFS: f"make the disk of the folder {folder} writable, or run in another one",
        errno.ENOENT: f"make the folder {folder}",
        errno.ENOTDIR: f"{folder} is not a folder: move it away",
        errno.EEXIST: "move what has this name away",
        errno.EISDIR: "move the folder of this name away",
        errno.ENAMETOOLONG: "choose a shorter RUN_ID",
    }
    other = f"see whether files in the folder {folder} can be written"
    return f"{path}: {error.strerror or error}; {remedies.get(error.errno, other)}"


class RunLog:
    """Writes each line to logs/<run_id>.txt and prints it. If that file exists, _2, _3 ... is added
    to its name. When a call returns, the operating system has the line; what a full disk refused is
    tried again with the next line. On ranks other than 0, or without a run_id, it does nothing.
    UserError: the file cannot be made."""

    def __init__(self, run_id: str = "", rank: int = 0):
        self.path: Path | None = None  # None: this log does nothing
        self.unwritten = b""
        self.problem = ""  # why something is unwritten
        self.left: dict[str, str] = {}  # what a run that ends now leaves: see `leaves`
        if not run_id or rank:
            return
        path = Path("logs")
        number = 1
        try:
            os.makedirs(path, exist_ok=True)
            while self.path is None:
                path = Path("logs", f"{run_id}_{number}.txt" if number > 1 else f"{run_id}.txt")
                number += 1
                with suppress(FileExistsError):
                    self.file = path.open("xb", buffering=0)
                    self.path = path
        except OSError as error:
            raise UserError(write_problem(path, error)) from None

    def __call__(self, line: str, console: bool = True) -> None:
        """Write `line` to the file and, unless console=False, print it. A failure is only printed,
        so that the run goes on."""
        if self.path is None:
            return
        self.unwritten += f"{line}\n".encode(errors="backslashreplace")  # names may be no UTF-8
        self.write()
        if self.unwritten:
            lacks = f"so far the log lacks its last {len(self.unwritten)} bytes"
            say(f"warning: {self.problem}; {lacks}", sys.stderr)
        if console:
            say(f"{CLEAR}{line}" if is_live() else line, sys.stdout)

    def heading(self, text: str) -> None:
        """Print the name of the phase that begins. It is for people, and not in the file."""
        if self.path is not None:
            say(f"{CLEAR if is_live() else ''}\n{text}", sys.stdout)

    def write(self) -> None:
        """Write what is unwritten, as far as the disk takes it."""
        try:
            while self.unwritten:
                written = self.file.write(self.unwritten)
                self.unwritten = self.unwritten[written:]
        except OSError as error:
            self.problem = write_problem(self.path, error)

    def leaves(self, kind: str, how: str) -> None:
        """From now on the run leaves a file of this kind, a checkpoint or an artifact. `how` to go
        on with it begins with the setting that names it: RESUME=... or EVAL_ONLY=..."""
        self.left[kind] = how

    @property
    def hint(self) -> str:
        """For error messages: what is left to go on with."""
        return "; ".join(self.left.values()) or "there is no checkpoint"

    def close(self) -> None:
        """UserError: the file lacks its last lines, after one more try; then they are printed."""
        self.write()
        if self.unwritten:
            say(self.unwritten.decode(errors="backslashreplace"), sys.stdout)
            count = len(self.unwritten)
            raise UserError(f"{self.problem}; its last {count} bytes are on the console instead")


SENT_AGAIN_SECONDS = 0.3  # Ctrl-C reaches a rank twice: from the terminal and, later, from torchrun
RAISED_AGAIN_SECONDS = 2.0  # after which Stopped is raised again if nothing has handled it


class StopSignal:
    """The handler of SIGTERM, SIGINT and SIGHUP. The first signal raises Stopped; while
    `is_patient`, it is only noted in `name`, so that training can end its step and leave a
    checkpoint. A second one ends the process at once, whatever it is doing (see `watch`). Stopped
    is raised again every RAISED_AGAIN_SECONDS until the code that catches it calls `be_patient`,
    because Python drops exceptions that are raised in some callbacks, as those of weak
    references."""

    def __init__(self, log: RunLog | None = None):
        self.log = log or RunLog()  # is told what a second signal ends
        self.name = ""  # of the signal that came
        self.is_patient = False
        self.is_installed = False

    def install(self) -> None:
        """Handle the signals from now on, except those that the process ignores, as it does SIGHUP
        under nohup."""
        self.is_installed = True
        signal.signal(signal.SIGALRM, self.interrupt)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        received = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        for number in received:
            signal.signal(number, self.handle)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(reader, received), daemon=True).start()

    def be_patient(self, patient: bool = True) -> None:
        """True: from now on only note the first signal. False: let it raise Stopped."""
        self.is_patient = patient

    def handle(self, number: int, frame) -> None:
        """What Python calls when a signal comes. What a second one does: see `watch`."""
        if not self.name:
            self.name = signal.Signals(number).name
            self.interrupt()

    def watch(self, reader: int, received: list[int]) -> None:
        """End the process at a second signal. `reader`: a pipe into which Python writes the number
        of each signal; only those in `received` count. This runs in a thread of its own, because
        Python calls no handler while the main thread waits in C code, for example for another rank.
        A signal within SENT_AGAIN_SECONDS of the first is the same one again: terminals, torchrun
        and timeout(1) pass on a signal that the process has received already."""
        first = None  # when the first signal came
        while number := os.read(reader, 1):
            if number[0] in received:
                now = perf_counter()
                if first is None:
                    first = now
                elif now - first >= SENT_AGAIN_SECONDS:
                    self.end_at_once()

    def interrupt(self, *_) -> None:
        """Stopped, unless the run is patient."""
        if self.is_patient:
            return
        if self.is_installed:
            signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN_SECONDS)  # calls this again
        raise Stopped(f"stopped by {self.name}")

    def end_at_once(self) -> None:
        """Say what is left, remove what is half-written, and end the process. (An exception might
        be swallowed by what it interrupts.)"""
        try:
            if self.log.path is not None:  # it is None on other ranks
                line = f"stopped by a second signal; {self.log.hint}"
                self.log(f"error: Stopped: {line}", console=False)
                for temporary in self.log.path.parent.glob(f"*.{os.getpid()}.tmp"):
                    temporary.unlink()
                said = f"train_gpt.py: error: {line}\n".encode(errors="backslashreplace")
                os.write(2, said)  # print may be what the signal has interrupted
        finally:
            os._exit(1)


class Progress:
    """Shows how much of `total` is done: call it with the amount done so far. A terminal gets a
    live bar; the log gets a line every ten seconds, unless `has_lines` is False."""

    def __init__(self, log, label: str, total: float, has_lines: bool = True, done: float = 0.0):
        self.log = log
        self.label = label
        self.total = total or 1
        self.has_lines = has_lines
        self.first = done / self.total  # the share that was done at the start
        self.started = self.last_line = perf_counter()

    def __call__(self, done: float) -> None:
        if self.log.path is None:
            return
        now = perf_counter()
        share = done / self.total
        elapsed = now - self.started
        line = f"{self.label} {share:.0%} elapsed:{elapsed:.0f}s"
        if share > self.first:
            line += f" left:{elapsed * (1 - share) / (share - self.first):.0f}s"
        if self.has_lines and now - self.last_line >= 10:
            self.log(line, console=not is_live())
            self.last_line = now
        if is_live():
            bar = "#" * round(24 * share)
            say(f"{CLEAR}[{bar:24}] {line}", sys.stdout, end="" if share < 1 else "\n")


def would_overrun(elapsed: float, more: float, limit: float) -> bool:
    """After `elapsed` seconds, would work of `more` seconds pass the `limit`? 0: there is none."""
    return 0 < limit < elapsed + more


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` for a file that is removed at the end, if it is still there.
    UserError: an OSError came, which is said of `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except OSError as error:
        raise UserError(write_problem(path, error)) from None
    finally:
        with suppress(OSError):  # what made writing fail may make this fail too
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file in the same folder, then rename it to `path`, so that
    the old file stays until the new one is whole. UserError: it could not be written."""
    with temporary_file(path) as temporary:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


# --- 3. Data ------------------------------------
# A shard is 256 little-endian int32 (20240520, 1, count, 0 ...), followed by `count` uint16 tokens.
# The loader keeps no state. Batch k is a function of k and SEED, so that it is the same at any
# number of ranks and after RESUME. What was read is recorded as the data's identity, a dict of
# part -> text, which the log and the checkpoint hold and ranks compare.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # int32
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_([0-9]{6})\.bin")
OPEN_SHARDS = 256  # mapped at a time: each holds a file descriptor, of which there may be 1,024
BOS = 1  # stands before each document; as a target, it still belongs to the one before it
GET_DATA = (
    "`make demo` needs no data; for FineWeb get the challenge repository and run its "
    "data/cached_challenge_fineweb.py, then set DATA_PATH and TOKENIZER_PATH"
)
KNOWN_STREAMS = {  # tokens that whole windows of 2048 score -> the challenge's stream
    62_021_632: "SP1024",
    63_779_840: "SP1024 of March",
    45_508_608: "SP4096",
    45_514_752: "SP4096",
    40_540_160: "SP8192",
    47_851_520: "SP8192 CaseOps",
}
SAMPLE_TOKENS = 1_040_298  # SP1024 begins with so many tokens that have this SHA-256
SAMPLE_SHA256 = "3fad60f7e717550f18ba7aa3a9f1d0cb14ded3e3823714488ecb1e2a7f6630df"


def load_shard(path: Path) -> ndarray:
    """The uint16 tokens of a shard, memory-mapped. There may be none. UserError: the file is not a
    shard, has another version than 1, or not the length that its header says."""
    require(path.is_file(), f"{path}: is no file, or a link that leads to none; {GET_DATA}")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", SHARD_HEADER).tolist()
    magic, version, count, *_ = [*header, 0, 0, 0]  # zeros, if the file is shorter than that
    is_shard = (magic, version) == (SHARD_MAGIC, SHARD_VERSION) and count >= 0
    require(
        is_shard and size == 4 * SHARD_HEADER + 2 * count,
        f"{path}: magic {magic}, version {version}, {count} tokens in {size} bytes; expected "
        f"magic {SHARD_MAGIC}, version {SHARD_VERSION}, n tokens in 1024 + 2 n bytes; {GET_DATA}",
    )
    if not count:  # nothing to map
        return np.zeros(0, "<u2")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (count,))


def find_shards(part: str, hp) -> list[Path]:
    """The paths of all shards of `part` ("train", "val", or "val_bytes", of which there may be
    none), in order. UserError: there are none; in the validation stream a shard is missing, or
    another .bin file is named as if it belonged to it."""
    name = "train_data_path" if part == "train" and hp.train_data_path else "data_path"
    folder = getattr(hp, name)
    place = f"{name.upper()}={folder}"
    files = sorted(Path(folder).glob("*.bin"))
    matches = [(path, SHARD_NAME.fullmatch(path.name)) for path in files]
    paths = [path for path, match in matches if match and match[1] == part]
    problem = f"{place}: no fineweb_{part}_ + six digits + .bin there; {GET_DATA}"
    require(bool(paths) or part == "val_bytes", problem)
    if part != "train":
        missing = missing_numbers(paths)
        problem = f"{place}: {len(paths)} fineweb_{part}_ shards, without {shortened(missing)}"
        require(not missing, f"{problem}: the stream must be whole; download what is missing")
        for path, match in matches:
            require(
                bool(match) or not path.name.lower().startswith("fineweb_val"),
                f"{path}: is it part of the validation stream? Its shards are fineweb_val_ + six "
                "digits + .bin: rename this file or move it elsewhere",
            )
    return paths


def missing_numbers(paths: list[Path]) -> list[str]:
    """The numbers, of six digits, from 0 to that of the last shard, that no shard has."""
    found = {path.stem[-6:] for path in paths}
    return [n for n in map("{:06d}".format, range(int(max(found, default="0")))) if n not in found]


def shortened(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of 64 blocks of 4 KiB, spread from its first to its last byte. A
    file of up to 256 KiB is read whole."""
    size = path.stat().st_size
    digest = hashlib.sha256(b"%d" % size)
    with path.open("rb", buffering=0) as file:
        for start in np.linspace(0, max(size - 4096, 0), 64).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(4096))
    return digest.hexdigest()


def copied_shards(paths: list[Path]) -> list[str]:
    """Pairs like "a.bin = b.bin": each shard that begins with the same 128 tokens as an earlier
    one, and so is a copy of it, whole or cut. Shorter shards are left out, as they may be equal by
    chance."""
    first: dict[bytes, Path] = {}
    found = []
    for path in paths:
        with path.open("rb") as file:
            file.seek(4 * SHARD_HEADER)
            beginning = file.read(2 * 128)
        if len(beginning) == 2 * 128:
            earlier = first.setdefault(beginning, path)
            if earlier is not path:
                found.append(f"{earlier.name} = {path.name}")
    return found


def check_tokens(tokens: ndarray, vocab_size: int, source: str | Path) -> ndarray:
    """Returns `tokens`. UserError: one of them is outside the vocabulary."""
    largest = tokens.max(initial=0)
    require(
        largest < vocab_size,
        f"{source}: holds token {largest}, but VOCAB_SIZE={vocab_size}: set the size of the "
        "tokenizer that the data was made with",
    )
    return tokens


def window_starts(num_tokens: int, length: int, seed: int, epoch: int) -> ndarray:
    """The start positions (int64) of an epoch's training windows, in reading order. The circular
    stream is cut into windows of `length` tokens, starting at a random position, and the windows
    are shuffled. Both differ from epoch to epoch; tokens after the last whole window are not read
    in that epoch. (When consecutive steps read neighbouring windows, small runs ended 0.04 to 0.19
    bits per byte worse.)"""
    rng = np.random.default_rng((seed, epoch))
    phase = rng.integers(num_tokens)
    window_numbers = rng.permutation(max(1, num_tokens // length))
    return (phase + window_numbers * length) % num_tokens


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, from 1 to itself."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


class TokenLoader:
    """The training batches. All shards form one circular stream, cut into windows of TRAIN_SEQ_LEN
    tokens that are read in a random order, each once per epoch. Batch k is the k-th group of
    windows in that order. Each rank trains on an equal share of them, in `accumulation`
    micro-batches of `rows` windows."""

    def __init__(self, hp, rank: int, world_size: int):
        self.hp = hp
        self.rank = rank
        self.paths = find_shards("train", hp)
        self.shard = lru_cache(OPEN_SHARDS)(load_shard)
        self.shard_ends = np.cumsum([len(self.shard(path)) for path in self.paths])
        self.num_tokens = int(self.shard_ends[-1])
        require(self.num_tokens > 0, f"{self.paths[0].parent}: its training shards hold no tokens")
        self.windows_per_epoch = max(1, self.num_tokens // hp.train_seq_len)
        starts = partial(window_starts, self.num_tokens, hp.train_seq_len, hp.seed)
        self.epoch_starts = lru_cache(2)(starts)  # two are kept: a batch may reach into the next
        self.sequences = hp.train_batch_tokens // hp.train_seq_len

        fits = divisors(self.sequences)
        near = sorted(fits, key=lambda n: max(n / world_size, world_size / n))[:2]
        require(
            world_size in fits,
            f"{world_size} ranks cannot share TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN = {self.sequences} "
            f"sequences equally: start {' or '.join(map(str, near))} ranks instead",
        )
        self.sequences_per_rank = self.sequences // world_size
        self.most_rows = max(1, hp.micro_batch_tokens // hp.train_seq_len)
        self.rows = max(n for n in divisors(self.sequences_per_rank) if n <= self.most_rows)
        self.accumulation = self.sequences_per_rank // self.rows

    @cached_property
    def identity(self) -> dict[str, str]:
        """What was trained on: part -> text. Of each shard its number, its length and its sampled
        content count; "train" has the SHA-256 of what "train_shards" lists."""
        lengths = np.diff(self.shard_ends, prepend=0)
        shards = " ".join(
            f"{path.stem[-6:]}:{length}:{sampled_sha256(path)[:16]}"
            for path, length in zip(self.paths, lengths)
        )
        digest = hashlib.sha256(shards.encode()).hexdigest()
        facts = f"shards:{len(self.paths)} tokens:{self.num_tokens} sha256:{digest}"
        return {"train": facts, "train_shards": shards}

    def sequence_start(self, number: int) -> int:
        """The position in the stream of the run's training sequence of that number, from 0 on."""
        epoch, index = divmod(number, self.windows_per_epoch)
        return int(self.epoch_starts(epoch)[index])

    def span(self, start: int, count: int) -> ndarray:
        """`count` tokens of the circular stream from `start` on, as int64."""
        pieces = []
        while count:
            position = start % self.num_tokens
            i = int(np.searchsorted(self.shard_ends, position, "right"))
            left_in_shard = int(self.shard_ends[i]) - position
            piece = self.shard(self.paths[i])[-left_in_shard:][:count]
            check_tokens(piece, self.hp.vocab_size, self.paths[i])
            pieces.append(piece.astype(np.int64))
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """This rank's ids and target ids of one micro-batch of `step`, (B, T) int64, on the CPU."""
        T = self.hp.train_seq_len
        first = step * self.sequences + self.rank * self.sequences_per_rank + micro * self.rows
        starts = [self.sequence_start(number) for number in range(first, first + self.rows)]
        ids = torch.from_numpy(np.stack([self.span(start, T + 1) for start in starts]))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class ByteCounter:
    """The text that each piece of a tokenizer stands for, and its bytes. A word mark (U+2581) is a
    space, but for the one at the start of a document, after a control piece, if the tokenizer's
    decoder drops that. A byte piece is one byte; control, unknown and unused pieces are no text.
    Neither are case sentinels (U+E001 to U+E004), by which the field's CaseOps marks capitals."""

    def __init__(self, hp):
        from sentencepiece import SentencePieceProcessor

        setting_text = f"TOKENIZER_PATH={hp.tokenizer_path}"
        self.pieces = sp = SentencePieceProcessor()
        try:  # its own Load takes no name that is not UTF-8
            model = Path(hp.tokenizer_path).read_bytes()
            sp.LoadFromSerializedProto(model)
        except (RuntimeError, OSError, ValueError):
            message = f"{setting_text}: no such file or not a SentencePiece model; {GET_DATA}"
            raise UserError(message) from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        size = sp.vocab_size()
        require(
            size == hp.vocab_size,
            f"{setting_text}: has {size} pieces, but VOCAB_SIZE={hp.vocab_size}: name the "
            "tokenizer that the data was made with, and set VOCAB_SIZE to its number of pieces",
        )
        ids = range(size)
        self.is_control, self.is_unknown, self.is_byte = (
            np.array([test(i) for i in ids]) for test in (sp.is_control, sp.is_unknown, sp.is_byte)
        )
        texts = [sp.id_to_piece(i) for i in ids]
        self.sentinels = [c for c in "\ue001\ue002\ue003\ue004" if any(c in t for t in texts)]
        self.texts = [self.text_of(i) for i in ids]  # bytes
        self.length = np.array([len(text) for text in self.texts], np.uint16)
        has_text = self.length > 0  # a control piece may have a mark in its name
        self.opens_word = has_text & np.array([text.startswith("\u2581") for text in texts])

        mark = sp.piece_to_id("\u2581")
        require(
            self.texts[mark] == b" " and not sp.encode_as_pieces("a")[-1].endswith("\u2581"),
            f"{setting_text}: has no piece that is a space alone, or marks the ends of words: a "
            "decoded text would have other bytes than the text; use another tokenizer",
        )
        self.drops_space = sp.decode([mark]) == ""

    def text_of(self, i: int) -> bytes:
        """The text of piece `i` that is not at the start of a document."""
        text = self.pieces.id_to_piece(i)
        if self.is_byte[i]:
            return bytes([int(text[3:5], 16)])  # of <0x0A>
        if self.is_control[i] or self.is_unknown[i] or self.pieces.is_unused(i):
            return b""
        for sentinel in self.sentinels:
            text = text.replace(sentinel, "")
        return text.replace("\u2581", " ").encode()

    def token_bytes(self, tokens: ndarray) -> ndarray:
        """The number of bytes (uint16) of each token, the first being at a document's start."""
        sizes = self.length[tokens]
        if self.drops_space:
            is_first = np.append(True, self.is_control[tokens[:-1]])
            sizes -= is_first & self.opens_word[tokens]
        return sizes

    def __call__(self, tokens: ndarray) -> ndarray:
        """The number of bytes (uint16) of each target; the targets are tokens[1:]."""
        return self.token_bytes(tokens)[1:]

    def unknown(self, tokens: ndarray) -> tuple[int, int]:
        """How many tokens are unknown pieces, whose text is lost, and how many documents have
        any."""
        at = np.flatnonzero(self.is_unknown[tokens])
        documents = np.searchsorted(np.flatnonzero(self.is_control[tokens]), at)
        return len(at), len(np.unique(documents))


CHECKED_TOKENS = 1 << 18  # of the validation stream are decoded and encoded again: about 0.2 s
CHECKED_OF_SHARD = 1 << 14  # of each further shard


def whole_characters(ids: ndarray, is_byte: ndarray, cuts: tuple[bool, bool]) -> list[int]:
    """A document without the byte pieces at its start and its end, where it is cut there."""
    inner = np.flatnonzero(~is_byte[ids])
    if any(cuts) and not len(inner):
        return []
    begin = inner[0] if cuts[0] else 0
    end = inner[-1] + 1 if cuts[1] else len(ids)
    return ids[begin:end].tolist()


def came_back(ids: list[int], again: list[int], is_cut: bool, counter: ByteCounter) -> bool:
    """Is `again`, what a decoded document was encoded to, its `ids`? If it is cut, or others follow
    it without a control piece, a few may differ: 8 and 1 % of all."""
    if ids == again or not is_cut:
        return ids == again
    placed, placed_again = (  # (where it ends in the text, token)
        set(zip(np.cumsum(counter.token_bytes(np.array(x, int))).tolist(), x)) for x in (ids, again)
    )
    return len(placed - placed_again) <= 8 + len(ids) // 100


def round_trip(tokens: ndarray, counter: ByteCounter, source: str) -> str:
    """Decode the documents in `tokens`, the beginning of a stream or shard, and encode them again.
    Unknown pieces cut them into parts. Returns how much that was. UserError: other tokens come out,
    or the decoded text has other bytes than are counted, so that the data has another tokenizer;
    `source` names this one."""
    is_border = counter.is_control | counter.is_unknown
    borders = [-1, *np.flatnonzero(is_border[tokens]).tolist(), len(tokens)]
    documents, is_part = [], []
    for a, b in pairwise(borders):
        cuts = tuple(  # at its start, at its end
            not 0 <= border < len(tokens) or counter.is_unknown[tokens[border]] for border in (a, b)
        )
        document = whole_characters(tokens[a + 1 : b], counter.is_byte, cuts)
        if document:
            documents.append(document)
            is_part.append(any(cuts))

    texts = counter.pieces.decode(documents) if documents else []
    again = counter.pieces.encode(texts) if documents else []
    decoded = counted = failed = num_new = 0
    for ids, text, new, is_cut in zip(documents, texts, again, is_part):
        size = len(text.encode()) - 3 * sum(map(text.count, counter.sentinels))
        number = int(counter.token_bytes(np.array(ids)).sum())
        decoded += size
        counted += number
        num_new += len(new)
        failed += size != number or not came_back(ids, new, is_cut, counter)
    num_tokens, num_parts = sum(map(len, documents)), sum(is_part)
    require(
        not failed,
        f"{source}: is not the tokenizer of this data: {failed} of its first "
        f"{len(documents)} documents come out changed when they are decoded and encoded again "
        f"({num_tokens} tokens become {num_new}; {counted} bytes are counted, the decoded text has "
        f"{decoded}): name the tokenizer that the data was made with",
    )
    whole = len(documents) - num_parts
    return f"documents:{whole} parts:{num_parts} tokens:{num_tokens} bytes:{decoded}"


@dataclass
class Validation:
    """The token stream that is scored. Every token but the first is a target: target t is
    tokens[t + 1]."""

    tokens: ndarray  # uint16
    count_bytes: Callable[[ndarray], ndarray]  # a ByteCounter
    sidecar: ndarray | None = None  # uint16, bytes of each token: used instead of counting
    identity: dict[str, str] = field(default_factory=dict)  # part -> text
    checked: str = ""  # what `round_trip` returned

    @property
    def num_targets(self) -> int:
        """One fewer than tokens: nothing predicts the first."""
        return len(self.tokens) - 1

    @cached_property
    def target_bytes(self) -> ndarray:
        """Bytes of text of each target, counted on first use, as only rank 0 needs it."""
        return self.count_bytes(self.tokens) if self.sidecar is None else self.sidecar[1:]


def join_shards(paths: list[Path]) -> ndarray:
    """The tokens of all shards, memory-mapped if it is one."""
    if len(paths) == 1:
        return load_shard(paths[0])
    return np.concatenate([np.array(load_shard(path)) for path in paths])


def load_validation(hp) -> Validation:
    """The whole validation stream. UserError: a shard is missing or there twice, there are fewer
    tokens than a window, tokens outside the vocabulary or no text, or the tokenizer or the bytes
    are not those of the data."""
    paths = find_shards("val", hp)
    place = f"DATA_PATH={hp.data_path}"
    twice = copied_shards(paths)
    problem = f"{place}: validation shards begin with the same tokens, {shortened(twice)}"
    require(not twice, f"{problem}: remove the copies")
    tokens = join_shards(paths)
    for path in paths:
        check_tokens(load_shard(path), hp.vocab_size, path)
    require(
        len(tokens) >= 2,
        f"{place}: the validation stream has {len(tokens)} tokens, expected at least 2: the first "
        f"is only read; {GET_DATA}",
    )
    require(
        len(tokens) > hp.eval_seq_len,
        f"{place}: the validation stream has {len(tokens)} tokens, a window needs "
        f"{hp.eval_seq_len + 1}: set EVAL_SEQ_LEN to at most {len(tokens) - 1}",
    )
    counter = ByteCounter(hp)
    has_text = any(counter(tokens[:end]).any() for end in (CHECKED_TOKENS, len(tokens)))
    problem = f"{place}: the targets of the validation stream are no text: they have 0 bytes"
    require(has_text, f"{problem}; {GET_DATA}")
    source = f"TOKENIZER_PATH={hp.tokenizer_path}"
    checked = round_trip(tokens[:CHECKED_TOKENS], counter, source)
    for path in paths[1:]:
        round_trip(load_shard(path)[:CHECKED_OF_SHARD], counter, f"{source}, {path.name}")
    sha256 = hashlib.sha256(tokens).hexdigest()
    identity = {
        "val": f"shards:{len(paths)} tokens:{len(tokens)} sha256:{sha256}",
        "tokenizer": f"sha256:{counter.sha256}",
    }
    sidecar = load_sidecar(tokens, counter, hp)
    if sidecar is not None:
        identity["val_bytes"] = f"sha256:{hashlib.sha256(sidecar).hexdigest()}"
    return Validation(tokens, counter, sidecar, identity, checked)


def load_sidecar(tokens: ndarray, counter: ByteCounter, hp) -> ndarray | None:
    """The bytes of text of each token, where the data has them in shards fineweb_val_bytes_. None:
    it has none. UserError: they are not of these tokens or more than 1 % from what `counter`
    counts, or the tokenizer has case sentinels and they are missing."""
    paths = find_shards("val_bytes", hp)
    place = f"DATA_PATH={hp.data_path}"
    if not paths:
        require(
            not counter.sentinels,
            f"{place}: no fineweb_val_bytes_ shards there, but the tokenizer marks capitals by "
            "pieces that are no text (U+E001 to U+E004): add the byte shards that belong to the "
            "data",
        )
        return None
    sizes = join_shards(paths)
    require(
        len(sizes) == len(tokens),
        f"{place}: {len(sizes)} entries in its fineweb_val_bytes_ shards, but {len(tokens)} tokens "
        "in fineweb_val_: expected one entry for each token",
    )
    counted = counter.token_bytes(tokens)
    for end in (CHECKED_TOKENS, len(tokens)):
        given, expected = (int(x[1:end].sum(dtype=np.int64)) for x in (sizes, counted))
        require(
            abs(given - expected) <= 0.01 * expected,
            f"{place}: its fineweb_val_bytes_ shards give {given} bytes to the first "
            f"{min(end, len(tokens))} tokens, whose pieces have {expected}: expected at most 1 % "
            "difference; are they of other data?",
        )
    return sizes


def stream_name(tokens: ndarray) -> str:
    """Which of the challenge's validation streams this is, and how that is known."""
    sample = tokens[:SAMPLE_TOKENS]
    begins_like_sp1024 = hashlib.sha256(sample).hexdigest() == SAMPLE_SHA256
    if begins_like_sp1024 and len(tokens) == SAMPLE_TOKENS:
        return f"the first {SAMPLE_TOKENS} tokens of SP1024 known_by:sha256"
    name = KNOWN_STREAMS.get((len(tokens) - 1) // 2048 * 2048)
    if begins_like_sp1024 and name in ("SP1024", "SP1024 of March"):
        return f"{name} known_by:length and the sha256 of its first {SAMPLE_TOKENS} tokens"
    is_another = name is None or name == "SP1024"  # whose beginning is known
    return "unknown" if is_another else f"{name} known_by:length only"


def data_warnings(hp, loader: TokenLoader | None, validation: Validation) -> list[str]:
    """What looks wrong with the data, though the run can go on."""
    folders = [Path(hp.data_path)]
    warnings = []
    if loader:
        folders.append(loader.paths[0].parent)
        missing = missing_numbers(loader.paths)
        if missing:
            said = f"training shards {shortened(missing)} are missing"
            warnings.append(f"{loader.paths[0].parent}: {said}; the run does without")
        twice = copied_shards([*find_shards("val", hp), *loader.paths])
        if twice:
            said = f"shards begin with the same tokens: {shortened(twice)}"
            warnings.append(f"{said}; what is trained on must not be there twice, nor be scored")
        beginning = loader.span(0, min(CHECKED_OF_SHARD, loader.num_tokens))
        try:
            round_trip(beginning, validation.count_bytes, f"TOKENIZER_PATH={hp.tokenizer_path}")
        except UserError as error:
            warnings.append(f"{loader.paths[0]}: {error}")
    for folder in dict.fromkeys(folders):
        names = sorted(path.name for path in folder.glob("*.bin"))
        others = [name for name in names if not SHARD_NAME.fullmatch(name)]
        if others:
            said = "not read, as they are not named like shards"
            warnings.append(f"{folder}: {shortened(others)}: {said}")
    if validation.checked.startswith("documents:0 "):
        said = "no whole document could be decoded and encoded again: is it the data's tokenizer?"
        warnings.append(f"TOKENIZER_PATH={hp.tokenizer_path}: {said}")
    return warnings


def bits_per_byte(nll: ndarray, target_bytes: ndarray) -> float:
    """The score: the sum of `nll`, which is in nats, as bits, divided by the number of bytes of the
    targets. It is the length of a code that a decoder could read."""
    bits = nll.sum(dtype=np.float64) / math.log(2)
    return float(bits / target_bytes.sum(dtype=np.int64))


# --- 4. Model -----------------------------------
# Plain torch. Weights are kept in float32. Inside the blocks all activations have one dtype:
# bfloat16 on CUDA, float32 elsewhere, without autocast. Layer i is block i. Where the parts come
# from:
#   GQA (grouped-query attention)           arXiv 2305.13245
#   RoPE (rotary position embedding)        arXiv 2104.09864
#   norm of queries and keys                arXiv 2302.05442
#   VRL (value residual)                    arXiv 2410.17897
#   XSA, SmearGate, shared value embedding  PR #889 of the challenge
#   depth recurrence                        PR #1204 of the challenge
#   U-Net skips, mix with the first input   modded-nanogpt


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of activations on the device of `x`."""
    return torch.bfloat16 if x.is_cuda else torch.float32


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and applied in the dtype of its input. `factor`, if it
    is given, scales the outputs. It is multiplied into the matrix: that is cheaper than scaling the
    output of every token, forward and backward."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def matrix(self, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
        """The weights (outputs, inputs) as `dtype`, times `factor`, (outputs, 1) or a scalar."""
        weight = self.weight if factor is None else self.weight * factor
        return weight.to(dtype)

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.matrix(x.dtype, factor))


def rotary_tables(T: int, hp, device=None) -> Tensor:
    """cos and sin of RoPE's angles, (2, T, 1, ROPE_DIMS/2). The base grows with the larger of T and
    TRAIN_SEQ_LEN, if that is above ROPE_BASE_LENGTH (NTK-aware scaling, as in PR #889): so windows
    up to the training length have the same angles."""
    r = hp.rope_dims
    base = hp.rope_base
    stretch = max(T, hp.train_seq_len) / hp.rope_base_length
    if stretch > 1 and r > 2:  # with r = 2 the only frequency is 1, whatever the base
        base *= stretch ** (r / (r - 2))
    frequency = base ** -(torch.arange(0, r, 2, dtype=torch.float32, device=device) / max(r, 1))
    position = torch.arange(T, dtype=torch.float32, device=device)
    angle = torch.outer(position, frequency)[:, None, :]
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BTHK, rope: Tensor) -> Tensor:
    """RoPE on the first ROPE_DIMS of K: channel i is paired with channel i + ROPE_DIMS/2. The other
    channels are not rotated."""
    cos, sin = rope
    half = cos.size(-1)
    a, b, rest = x_BTHK.tensor_split((half, 2 * half), -1)
    rotated = torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(x_BTHK.dtype)
    return torch.cat((rotated, rest), -1)


def remove_own_value(y_BSHK, v_BSGK) -> Tensor:
    """XSA: removes from each head's output the component parallel to the value of the same
    position."""
    B, S, H, K = y_BSHK.shape
    y = y_BSHK.view(B, S, v_BSGK.size(2), -1, K)  # heads in groups that share a value
    v = F.normalize(v_BSGK, dim=-1).unsqueeze(3)
    along = (y * v).sum(-1, keepdim=True)
    return (y - along * v).view(B, S, H, K)


@cache
def find_flash_attention() -> tuple[str, Callable | None]:
    """("flash_attention_3", its function) if FlashAttention 3 is installed and the GPU is a Hopper,
    else ("sdpa", None): torch's own attention. (FlashAttention 2 is not tried: on an H200 it took
    1.7 times as long as torch's own.)"""
    with suppress(Exception):  # one that was built for another torch raises many types
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
            from flash_attn_interface import flash_attn_func

            return "flash_attention_3", flash_attn_func
    return "sdpa", None


def causal_attention(q_BSHK, k_BTGK, v_BTGK, flash=None) -> Tensor:
    """softmax(q k' / sqrt K) v, (B, S, H, K). The queries belong to the last S of T positions; each
    sees the keys up to its own position. Each key/value head serves H/G query heads."""
    if flash is not None and q_BSHK.is_cuda:
        y = flash(q_BSHK, k_BTGK, v_BTGK, causal=True)  # the last query sees the last key
        return y[0] if isinstance(y, tuple) else y

    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    S, T = q.size(2), k.size(2)
    if S == T:
        shares_keys = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_keys)
    else:
        # with a mask, torch has no fast kernel for shared keys: repeat them
        group = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        # query s belongs to position T - S + s
        seen_ST = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
        y = F.scaled_dot_product_attention(q, k, v, seen_ST)
    return y.transpose(1, 2)


class Shared(NamedTuple):
    """What all blocks read in one forward pass."""

    x0_BTD: Tensor  # the input of the first block
    rope: Tensor  # cos and sin
    ve_BTGK: Tensor | None  # value embeddings of the tokens; VE_LAYERS read them


class Attention(nn.Module):
    """Causal self-attention with the variants that the settings turn on."""

    def __init__(self, hp, layer: int):
        super().__init__()
        D, H, G, K = hp.model_dim, hp.num_heads, hp.num_kv_heads, hp.head_dim
        self.head_dim = K
        self.q = Linear(D, H * K)
        self.k = Linear(D, G * K)
        self.v = Linear(D, G * K)
        self.proj = Linear(H * K, D)
        self.q_gain = nn.Parameter(torch.full((H,), hp.qk_gain_init))  # scales the products q k'

        takes_ve = hp.ve_enabled and layer in hp.ve_layers
        self.ve_scale = nn.Parameter(torch.ones(())) if takes_ve else None
        mixes_values = hp.vrl_enabled and layer > 0
        self.vrl_gate = nn.Parameter(torch.tensor(-1.5)) if mixes_values else None
        self.xsa = layer >= hp.num_layers - hp.xsa_last_n
        gate = torch.zeros(H, hp.attn_gate_dims)
        self.gate = nn.Parameter(gate) if hp.attn_gate_dims else None
        _, self.flash = find_flash_attention()

    def forward(self, x_BTD, scale_D, shared: Shared, v_first_BTGK, last: int):
        """Returns the output for the last positions, (B, last, D), with its channels scaled by
        `scale_D`; and this layer's own values, (B, T, G, K), before the value embedding is added
        and before they are mixed. `v_first_BTGK`: the own values of layer 0, None when it runs
        first."""
        x_BSD = x_BTD[:, -last:]
        q = norm(self.q(x_BSD).unflatten(-1, (-1, self.head_dim)))
        q = q * self.q_gain.to(q.dtype)[:, None]
        q = rotate(q, shared.rope[:, -last:])
        k = rotate(norm(self.k(x_BTD).unflatten(-1, (-1, self.head_dim))), shared.rope)
        v_own = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        v = self.mixed_values(v_own, shared.ve_BTGK, v_first_BTGK)

        y = causal_attention(q, k, v, self.flash)
        if self.xsa:
            y = remove_own_value(y, v[:, -last:])
        if self.gate is not None:
            few = x_BSD[..., : self.gate.size(1)]
            y = y * torch.sigmoid(F.linear(few, self.gate.to(y.dtype)))[..., None]
        return self.proj(y.flatten(2), scale_D[:, None]), v_own

    def mixed_values(self, v_BTGK, ve_BTGK, v_first_BTGK) -> Tensor:
        """The values v, plus the value embedding and mixed with layer 0's values (VRL), where the
        layer has these."""
        if self.ve_scale is not None:
            v_BTGK = v_BTGK + self.ve_scale.to(v_BTGK.dtype) * ve_BTGK
        if self.vrl_gate is not None:
            v_BTGK = torch.lerp(v_BTGK, v_first_BTGK, torch.sigmoid(self.vrl_gate).to(v_BTGK.dtype))
        return v_BTGK


class MLP(nn.Module):
    """Two matrices with a squared leaky ReLU between them."""

    def __init__(self, hp):
        super().__init__()
        D, W = hp.model_dim, int(hp.mlp_mult * hp.model_dim)
        self.slope = hp.leaky_slope
        self.fused = hp.fused_mlp
        self.fc = Linear(D, W)
        self.proj = Linear(W, D)

    def forward(self, x_BTD, scale_D) -> Tensor:
        """proj(leaky_relu(fc(x))^2), (B, T, D), its channels times `scale`."""
        if self.fused and has_kernels(x_BTD) and not self.is_watched():
            fc_WD = self.fc.matrix(x_BTD.dtype)
            proj_DW = self.proj.matrix(x_BTD.dtype, scale_D[:, None])
            y_ND, *_ = fused_mlp(x_BTD.flatten(0, 1), fc_WD, proj_DW, self.slope)
            return y_ND.view_as(x_BTD)
        h_BTW = F.leaky_relu(self.fc(x_BTD), self.slope).square()
        return self.proj(h_BTW, scale_D[:, None])

    def is_watched(self) -> bool:
        """Whether the matrices have forward hooks (section 9 registers some). The kernels go past
        the modules, so that hooks would not run."""
        return bool(self.fc._forward_hooks or self.proj._forward_hooks)


class Block(nn.Module):
    """Attention and an MLP, each with its own residual connection."""

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
        has_lanes = 0 < hp.parallel_start_layer <= layer
        # one row per lane; columns weight the lane itself, attention's output and the MLP's output
        weights = torch.tensor([[1.1, 1.0, 1.0], [1.1, 1.0, 1.0]])
        self.lane_weights = nn.Parameter(weights) if has_lanes else None

    def forward(self, lanes: tuple[Tensor, ...], shared: Shared, v_first_BTGK, last: int):
        """Returns the lanes after the block, each (B, last, D), and the layer's own values. There
        are queries for the last positions only, keys and values for all. Before
        PARALLEL_START_LAYER there is one lane, the residual stream: attention reads it and adds to
        it, then the MLP does. From there on there are two: attention reads the first, the MLP the
        second, and both write to both (modded-nanogpt; challenge PR #1204, #1529)."""
        dtype = lanes[0].dtype
        x = self.mix_x.to(dtype) * lanes[0] + self.mix_x0.to(dtype) * shared.x0_BTD
        y, v_own = self.attn(norm(x) * self.norm_scale, self.attn_scale, shared, v_first_BTGK, last)
        if self.lane_weights is None:
            x = x[:, -last:] + y
            return (x + self.feed(x),), v_own

        lanes = [lane[:, -last:] for lane in (lanes[0], lanes[-1])]  # both begin as the stream
        z = self.feed(lanes[1])
        weights = self.lane_weights.to(dtype)
        return tuple(w[0] * lane + w[1] * y + w[2] * z for w, lane in zip(weights, lanes)), v_own

    def feed(self, x_BTD) -> Tensor:
        """The output of the MLP, (B, T, D)."""
        return self.mlp(norm(x_BTD) * self.norm_scale, self.mlp_scale)


class SmearGate(nn.Module):
    """Mixes each position's input with that of the position before: by a learned share per channel
    or, with SMEAR_GATE_DIMS, by a share per position, which its first channels decide (challenge
    PR #1667, after modded-nanogpt)."""

    def __init__(self, hp):
        super().__init__()
        self.crosses_bos = hp.smear_crosses_bos
        self.gate = nn.Parameter(torch.zeros(hp.smear_gate_dims or hp.model_dim))
        self.scale = nn.Parameter(torch.zeros(())) if hp.smear_gate_dims else None

    def forward(self, x_BTD, ids_BT) -> Tensor:
        """(B, T, D) -> (B, T, D). Nothing stands before the first position."""
        before = F.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
        if not self.crosses_bos:
            before = before.masked_fill((ids_BT == BOS)[..., None], 0)
        gate = self.gate.to(x_BTD.dtype)
        if self.scale is None:
            return torch.lerp(x_BTD, before, torch.sigmoid(gate))
        share_BT = torch.sigmoid(x_BTD[..., : len(gate)] @ gate)
        return x_BTD + (self.scale.to(gate.dtype) * share_BT)[..., None] * before


class NarrowEmbedding(nn.Module):
    """An embedding table of `width` columns, projected to `outputs` channels and scaled."""

    def __init__(self, rows: int, width: int, outputs: int, scale: float):
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.proj = Linear(width, outputs)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, rows_BT, dtype: torch.dtype) -> Tensor:
        """(B, T, outputs) in `dtype`, from the table row of each position."""
        return self.proj(self.table(rows_BT).to(dtype), self.scale)


def bigram_rows(ids_BT, rows: int) -> Tensor:
    """For each token a row of the table: a hash of the token and its predecessor. The first
    position of a window has no predecessor and gets the last row, which no hash reaches."""
    hashed = (36313 * ids_BT[:, 1:]) ^ (27191 * ids_BT[:, :-1])
    return F.pad(hashed % (rows - 1), (1, 0), value=rows - 1)


def log_probabilities(z_NV, cap: float) -> Tensor:
    """Log-softmax in float32 of cap * tanh(z / cap), or of z if cap is 0."""
    z_NV = z_NV.float()
    return F.log_softmax(cap * torch.tanh(z_NV / cap) if cap else z_NV, -1)


def token_nll(z_NV, target_ids_N, cap: float) -> Tensor:
    """nll of the targets in nats, (N,) float32, from logits z before the softcap."""
    return F.nll_loss(log_probabilities(z_NV, cap), target_ids_N, reduction="none")


def block_passes(hp) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two orders in which the blocks run, as layer numbers: until RECUR_START of training is done,
    and after it. In the second, the group of RECUR_LAYERS runs RECUR_TIMES times in a row: with 6
    layers, RECUR_LAYERS=2,3 and RECUR_TIMES=2 it is 0 1 2 3 2 3 4 5. Without RECUR_LAYERS both are
    the same."""
    once = tuple(range(hp.num_layers))
    split = hp.recur_layers[-1] + 1 if hp.recur_layers else len(once)
    return once, once[:split] + hp.recur_layers * (hp.recur_times - 1) + once[split:]


def orthogonal(p: Tensor, hp) -> None:
    """Makes a matrix orthogonal if both of its sides are at least 64; smaller ones keep torch's
    default."""
    if min(p.shape) >= 64:
        nn.init.orthogonal_(p)


def orthogonal_table(p: Tensor, hp) -> None:
    """As `orthogonal`, times TABLE_GAIN_INIT: for the projections of embedding tables. Its default,
    1/sqrt(2 L), is PR #889's; PR #1435 has 1."""
    if min(p.shape) >= 64:
        nn.init.orthogonal_(p, hp.table_gain_init or (2 * hp.num_layers) ** -0.5)


def zeros(p: Tensor, hp) -> None:
    """Makes a matrix zero."""
    nn.init.zeros_(p)


def normal(std: float) -> Callable:
    """A function that draws a matrix from N(0, std^2)."""
    return lambda p, hp: nn.init.normal_(p, std=std)


def token_embedding(p: Tensor, hp) -> None:
    """Draws the token embedding: with a standard deviation of 0.005 if it is also the output head,
    else of 1, as in the pull requests."""
    nn.init.normal_(p, std=0.005 if hp.tie_embeddings else 1.0)


class ParameterRow(NamedTuple):
    """How parameters with a certain name are treated."""

    pattern: str  # shell-style pattern of the name; * also matches dots
    kind: str  # matrix, table, head or vector: how it is trained (section 7) and coded (section 6)
    group: str  # of the artifact's bytes in the log
    initial: Callable | None  # initial(p, hp) sets the first values; None: keep the constructor's
    at_test: str  # whether test-time training (section 12) changes it


PARAMETERS = [  # the first row that matches a name counts
    ParameterRow("embed.weight", "table", "embeddings", token_embedding, "if it is the head"),
    ParameterRow("head.weight", "head", "embeddings", zeros, "always"),
    ParameterRow("bigram.table.weight", "table", "embeddings", zeros, "never"),
    ParameterRow("value_embed.table.weight", "table", "embeddings", normal(0.01), "never"),
    ParameterRow("value_embed.proj.weight", "matrix", "embeddings", orthogonal_table, "never"),
    ParameterRow("bigram.proj.weight", "matrix", "embeddings", orthogonal_table, "never"),
    ParameterRow("blocks.*.attn.proj.weight", "matrix", "attention", zeros, "in last blocks"),
    ParameterRow("blocks.*.attn.*.weight", "matrix", "attention", orthogonal, "in last blocks"),
    ParameterRow("blocks.*.mlp.proj.weight", "matrix", "mlp", zeros, "in last blocks"),
    ParameterRow("blocks.*.mlp.fc.weight", "matrix", "mlp", orthogonal, "in last blocks"),
    ParameterRow("*", "vector", "side", None, "always"),
]


def parameter_row(name: str) -> ParameterRow:
    """The row of PARAMETERS for the parameter `name`."""
    return next(row for row in PARAMETERS if fnmatchcase(name, row.pattern))


class GPT(nn.Module):
    """The model. `forward` returns the training loss, `hidden` what comes before the output head.
    The order in which blocks run is an argument, `passes` (see `block_passes`); torch.compile makes
    a graph for each order."""

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
        self.smear = SmearGate(hp) if hp.smear_enabled else None
        self.value_embed = NarrowEmbedding(V, hp.ve_dim, values, 0.1) if has_ve else None
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in range(L))
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D)) if has_skips else None
        has_gates = has_skips and hp.skip_gates
        self.skip_gates = nn.Parameter(torch.zeros(L // 2, D)) if has_gates else None
        self.head = None if hp.tie_embeddings else Linear(D, V)
        for T in {hp.train_seq_len, hp.eval_seq_len}:  # else compiled code computes them each time
            self.register_buffer(f"rope_{T}", rotary_tables(T, hp), persistent=False)
        with torch.no_grad():
            for name, p in self.named_parameters():
                initial = parameter_row(name).initial
                if initial:
                    initial(p, hp)
        # by name, for late QAT: torch.compile cannot trace how names are matched with PARAMETERS
        self.largest_codes = {n: largest_code(n, p, hp) for n, p in self.named_parameters()}

    def forward(self, ids_BT, target_ids_BT, passes, shares_BT=None) -> Tensor:
        """The mean loss of the targets in nats or, with `shares_BT`, their sum weighted by it."""
        hidden_ND = self.hidden(ids_BT, passes).flatten(0, 1)
        nll_N = self.nll(hidden_ND, target_ids_BT.ravel())
        if shares_BT is None:
            return nll_N.mean()
        return (nll_N * shares_BT.ravel()).sum()

    def hidden(self, ids_BT, passes: tuple[int, ...], last: int | None = None) -> Tensor:
        """The hidden states, (B, T, D). If `last` is given, only those of the last positions, (B,
        last, D); the last block then computes queries only for them."""
        T = ids_BT.size(1)
        x = self.embedded(ids_BT)
        shared = self.shared(ids_BT, x)

        lanes = (x,)  # two from PARALLEL_START_LAYER on; skips leave and enter the first
        v_first = None
        skips = []
        half = len(passes) // 2  # the first half of the passes leaves skips, the second takes them
        for i, layer in enumerate(passes):
            if i >= half:
                lanes = (self.add_skip(lanes[0], skips, i - half), *lanes[1:])
            queries = last if last and i == len(passes) - 1 else T
            lanes, v_own = self.blocks[layer](lanes, shared, v_first, queries)
            if v_first is None:
                v_first = v_own
            if i < half:
                skips.append(lanes[0])
        return lanes[0] if len(lanes) == 1 else (lanes[0] + lanes[1]) / 2

    def embedded(self, ids_BT) -> Tensor:
        """The input of the first block: the embedding of the token plus that of its bigram,
        normalised and blended with that of the position before (SmearGate)."""
        x = self.embed(ids_BT)
        if self.bigram is not None:
            x = x + self.bigram(bigram_rows(ids_BT, self.hp.bigram_vocab_size), x.dtype)
        x = norm(x).to(working_dtype(x))
        return x if self.smear is None else self.smear(x, ids_BT)

    def shared(self, ids_BT, x_BTD) -> Shared:
        """What every block reads, given the input of the first."""
        T = ids_BT.size(1)
        rope = getattr(self, f"rope_{T}", None)
        if rope is None:
            rope = rotary_tables(T, self.hp, x_BTD.device)
        ve = None
        if self.value_embed is not None:
            ve = self.value_embed(ids_BT, x_BTD.dtype).unflatten(-1, (-1, self.hp.head_dim))
        return Shared(x_BTD, rope, ve)

    def add_skip(self, x_BTD, skips: list[Tensor], i: int) -> Tensor:
        """Pop the newest skip and add it to x with the weights of connection i or, with SKIP_GATES,
        blend the two. Beyond the last connection x stays as it is."""
        if self.skip_weights is None or i >= len(self.skip_weights):
            return x_BTD
        skip = self.skip_weights[i].to(x_BTD.dtype) * skips.pop()
        if self.skip_gates is None:
            return x_BTD + skip
        gate = torch.sigmoid(self.skip_gates[i]).to(x_BTD.dtype)  # the weight of x
        return torch.lerp(skip, x_BTD, gate)

    def logits(self, hidden_D) -> Tensor:
        """(..., D) -> (..., V), before the softcap."""
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(norm(hidden_D), weight_VD.to(hidden_D.dtype))

    def nll(self, hidden_ND, target_ids_N) -> Tensor:
        """nll of the targets in nats, (N,) float32."""
        return token_nll(self.logits(hidden_ND), target_ids_N, self.hp.logit_softcap)

    def scores(self, hidden_ND, target_ids_N) -> Tensor:
        """nll of the targets and entropy of the predictions in nats, (2, N) float32."""
        logp_NV = log_probabilities(self.logits(hidden_ND), self.hp.logit_softcap)
        nll_N = F.nll_loss(logp_NV, target_ids_N, reduction="none")
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        return torch.stack((nll_N, entropy_N))


# --- 5. Kernels ---------------------------------
# torch.compile fuses elementwise operations with each other, but not into the matrix product before
# them. So a Triton kernel computes the MLP's first product and its activation in one pass; in the
# backward pass the same kernel computes the gradient with respect to z. The other products are
# ordinary ones. MLP.forward (section 4) has the same in plain PyTorch, which is used on a CPU, or
# when Triton is missing, or with FUSED_MLP=0. torch.library.custom_op makes torch.compile treat
# each of the two functions as one operation. The idea is modded-nanogpt's.

jit = triton.jit if triton else lambda kernel: kernel
constexpr = tl.constexpr if triton else None
MLP_TILE = dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)  # fastest of 7 tried on an H200


def has_kernels(x: Tensor) -> bool:
    """Can the kernels run on `x`?"""
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
    BACKWARD: constexpr,
    BM: constexpr,
    BN: constexpr,
    BK: constexpr,
):
    """One program computes one (BM, BN) tile of P = a @ b, where a is (M, K) and b is (K, N), and
    applies the elementwise step before the tile leaves the registers. Forward: z = P and out =
    leaky_relu(z)^2. Backward: P is the gradient of h = leaky_relu(z)^2, and out that of z."""
    # Programs are numbered along N first, so that neighbouring ones read the same rows of a.
    program = tl.program_id(0)
    tiles_per_row = tl.cdiv(N, BN)
    m = (program // tiles_per_row * BM + tl.arange(0, BM)).to(tl.int64)[:, None]  # m * N is large
    n = (program % tiles_per_row * BN + tl.arange(0, BN))[None, :]
    inside = (m < M) & (n < N)
    offset = m * N + n

    product = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m * K + k[None, :], (m < M) & (k[None, :] < K), 0.0)
        b_offset = k[:, None] * stride_k + n * stride_n
        b = tl.load(b_ptr + b_offset, (k[:, None] < K) & (n < N), 0.0)
        product = tl.dot(a, b, product)

    if BACKWARD:
        z = tl.load(z_ptr + offset, inside, 0.0).to(tl.float32)
        other = 2 * product
    else:
        z = product.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + offset, z, inside)
        z = z.to(tl.float32)  # of the rounded z, which is what backward will load
        other = z
    tl.store(out_ptr + offset, z * tl.where(z > 0, 1.0, slope * slope) * other, inside)


def launch_mlp(a_MK: Tensor, b_KN: Tensor, z_MN: Tensor, slope: float, backward: bool) -> Tensor:
    """Run `mlp_kernel` and return its `out`, (M, N): M tokens, N the MLP's width. With
    backward=False it also fills `z`; with backward=True it reads it."""
    M, N = z_MN.shape
    out_MN = torch.empty_like(z_MN)
    tile = dict(MLP_TILE)
    if z_MN.is_cuda and torch.cuda.get_device_capability()[0] not in (9, 10):
        tile["BN"] = 64  # other GPUs than Hopper and Blackwell may lack shared memory for 128
    grid = (triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),)
    sizes = (M, N, len(b_KN), *b_KN.stride())
    mlp_kernel[grid](a_MK.contiguous(), b_KN, z_MN, out_MN, *sizes, slope, backward, **tile)
    return out_MN


@torch.library.custom_op("golf::fused_mlp", mutates_args=())
def fused_mlp(
    x_ND: Tensor, fc_WD: Tensor, proj_DW: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(h @ proj.mT, z, h), with z = x @ fc.mT and h = leaky_relu(z, slope)^2. The first is the
    MLP's output; the others are returned because the backward pass needs them."""
    z_NW = x_ND.new_empty(len(x_ND), len(fc_WD))
    h_NW = launch_mlp(x_ND, fc_WD.mT, z_NW, slope, backward=False)
    return h_NW @ proj_DW.mT, z_NW, h_NW


@torch.library.custom_op("golf::fused_mlp_backward", mutates_args=())
def fused_mlp_backward(g_ND: Tensor, proj_DW: Tensor, z_NW: Tensor, slope: float) -> Tensor:
    """The gradient of z, (N, W), from the gradient g of the MLP's output."""
    return launch_mlp(g_ND, proj_DW, z_NW.contiguous(), slope, backward=True)


@fused_mlp.register_fake
def _(x_ND, fc_WD, proj_DW, slope):
    z_NW = x_ND.new_empty(len(x_ND), len(fc_WD))
    return x_ND.new_empty(x_ND.shape), z_NW, torch.empty_like(z_NW)


@fused_mlp_backward.register_fake
def _(g_ND, proj_DW, z_NW, slope):
    return z_NW.new_empty(z_NW.shape)


def save_for_mlp_gradients(ctx, inputs, output):
    """Keep what `mlp_gradients` needs."""
    x_ND, fc_WD, proj_DW, ctx.slope = inputs
    _, z_NW, h_NW = output
    ctx.save_for_backward(x_ND, fc_WD, proj_DW, z_NW, h_NW)


def mlp_gradients(ctx, g_ND, *_):
    """The gradients of fused_mlp's arguments, given that of its first result."""
    x_ND, fc_WD, proj_DW, z_NW, h_NW = ctx.saved_tensors
    dz_NW = fused_mlp_backward(g_ND, proj_DW, z_NW, ctx.slope)
    return dz_NW @ fc_WD, dz_NW.mT @ x_ND, g_ND.mT @ h_NW, None


fused_mlp.register_autograd(mlp_gradients, setup_context=save_for_mlp_gradients)


# --- 6. Rounding --------------------------------
# Rounding replaces a matrix by small integers, called codes, and by one step size per row, called
# delta: weight = code * delta. The weights of the artifact are rounded like this (section 10). So
# are those of late QAT (quantisation-aware training): the last part of training, in which the
# network gets used to rounded weights.

LARGEST_CODE = 127  # of 8 bits, the most that the artifact stores


def largest_code(name: str, tensor: Tensor, hp) -> int:
    """The largest code of a parameter, 2^(bits - 1) - 1, or 0 if it is stored as it is. Matrices
    have QUANT_BITS bits, tables and the output head 8. (To fit the size cap, section 10 changes
    this.)"""
    bits = {"matrix": hp.quant_bits, "table": 8, "head": 8, "vector": 0}[parameter_row(name).kind]
    has_rows = tensor.ndim == 2 and tensor.numel() > 0
    return 2 ** (bits - 1) - 1 if bits and has_rows else 0


def quantize_rows(w_RC, largest: int | Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a matrix by itself. Returns (codes (R, C), deltas (R, 1)), both float32.
    `largest` is a number or a tensor (R, 1), at most 127; codes lie within +-`largest`. Deltas are
    bfloat16 values, so that code * delta is exact in float32. Of three, a row gets the step size of
    least squared error: they clip the row at its largest magnitude, or at about the 99.8 % or 99.4
    % quantile (GPTQ-lite, PR #889). To quantise codes * deltas again changes nothing."""
    w = w_RC.float()
    last = w.size(-1) - 1
    ranks = [last - round(q * last) for q in (1.0, 0.998, 0.994)]  # from the top, which is 0
    top_magnitudes = w.abs().topk(max(ranks) + 1).values
    clips = top_magnitudes[:, ranks].T[..., None]  # (3, R, 1): three candidates for each row
    candidates = (clips / largest).clamp_min(1e-30).bfloat16().float()

    def codes_for(delta: Tensor) -> Tensor:
        return (w / delta).round().clamp(-largest, largest)

    errors = [(codes_for(d) * d - w).square().sum(-1, keepdim=True) for d in candidates]
    best = torch.stack(errors).argmin(0, keepdim=True)  # (1, R, 1)
    delta = candidates.gather(0, best)[0]
    return codes_for(delta), delta


def soft_round(x: Tensor, hardness: Tensor) -> Tensor:
    """A differentiable rounding: close to the identity when `hardness`, which must be above 0, is
    small, and close to `round` when it is large (Agustsson and Theis, 2006.09952)."""
    low = x.detach().floor()
    # the denominator makes it exact at the integers
    return low + 0.5 + torch.tanh(hardness * (x - low - 0.5)) / (2 * torch.tanh(hardness / 2))


def fake_quantized(model, hardness: Tensor) -> dict[str, Tensor]:
    """The weights that late QAT computes with, by name of each coded parameter. With
    QAT_ROUNDING=straight they are rounded, and gradients pass as if they were not. With soft they
    are rounded by `soft_round`, with its gradient; only then `hardness` matters."""
    rounded = {}
    for name, p in model.named_parameters():
        largest = model.largest_codes[name]
        if not largest:
            continue
        codes, delta = quantize_rows(p.detach(), largest)
        if model.hp.qat_rounding == "straight":
            rounded[name] = p + (codes * delta - p.detach())  # the gradient is that of p
        else:
            rounded[name] = soft_round((p / delta).clamp(-largest, largest), hardness) * delta
    return rounded


# --- 7. Optimizers ------------------------------
# Muon (Jordan et al. 2024) trains the matrices: its update is the Nesterov momentum, made
# orthogonal. AdamW trains all other parameters. In stacks of matrices R <= C: tall ones are stored
# transposed.


class TrainingGroup(NamedTuple):
    """How parameters of one kind are trained."""

    optimizer: type
    lr: float
    weight_decay: float


def training_groups(hp) -> dict[str, TrainingGroup]:
    """How each kind of parameter (section 4) is trained."""
    table_lr = hp.tied_embed_lr if hp.tie_embeddings else hp.embed_lr
    return {
        "matrix": TrainingGroup(Muon, hp.matrix_lr, hp.muon_wd),
        "table": TrainingGroup(AdamW, table_lr, hp.embed_wd),
        "head": TrainingGroup(AdamW, hp.head_lr, hp.adam_wd),
        "vector": TrainingGroup(AdamW, hp.scalar_lr, hp.adam_wd),
    }


def orthogonalize(G_SRC, iterations: int) -> Tensor:
    """Replaces the singular values of each matrix by numbers near 1: after five iterations those
    that were not tiny lie in about [0.7, 1.2]. Zero matrices stay zero. In bfloat16 on CUDA."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's quintic Newton-Schulz, tuned for small values
    X = G_SRC.to(working_dtype(G_SRC))
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def equalize_rows(G_SRC, is_tall_S11) -> Tensor:
    """The matrices with each row divided by its norm (MuonEq-R, PR #1435). A matrix marked as tall
    is stored transposed: its rows are the columns here."""
    row_norms = G_SRC.norm(dim=-1, keepdim=True)
    column_norms = G_SRC.norm(dim=-2, keepdim=True)
    return G_SRC / (torch.where(is_tall_S11, column_norms, row_norms) + 1e-7)


class SummedGradients:
    """The methods that `update_parameters` calls, for a torch optimizer that works elementwise:
    every rank receives the whole sum of the gradients as one flat vector, and does the whole step.
    Muon divides its work among the ranks, and so has its own versions. Every rank must call all of
    them in the same order, under torch.no_grad(); only `schedule` may be called alone."""

    def schedule(self, step: int, plan: "StepPlan"):
        """Set the learning rates of training step `step`, as `plan` has them."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * plan.scale

    def send_gradients(self):
        """Start to sum the gradients over the ranks. (This class waits for the sum.)"""
        self.grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.flat = self.ranks.sum_over_ranks(nn.utils.parameters_to_vector(self.grads))

    def receive_gradients(self):
        """Wait for the sums. Returns the tensors that hold this rank's part of them, which here is
        the whole. The caller may scale them in place before `begin_step`."""
        return [self.flat]

    def gradient_square(self):
        """The squared norm of the summed gradients, the same on every rank."""
        return self.flat.square().sum()

    def begin_step(self):
        """Do the step, or begin it."""
        nn.utils.vector_to_parameters(self.flat, self.grads)  # gradients become views of the vector
        self.step()

    def finish_step(self):
        """Finish what `begin_step` left under way."""

    def complete_state(self):
        """Collect what `state_tensors` lacks from the other ranks (here nothing)."""


class AdamW(SummedGradients, torch.optim.AdamW):
    """torch's AdamW, fused, with moments that exist before the first step."""

    def __init__(self, groups: list[dict], hp, ranks):
        self.ranks = ranks
        super().__init__(groups, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=True)
        for p in chain(*(group["params"] for group in groups)):
            # torch creates these in the first step; warm-up and checkpoints need them before
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = {"step": p.new_zeros(()), **moments}

    def state_tensors(self):
        """The tensors that a step changes, apart from the parameters, by name."""
        states = list(self.state.values())
        names = ("step", "exp_avg", "exp_avg_sq")
        return {f"adamw.{k}.{i}": s[k] for k in names for i, s in enumerate(states)}


def muon_momentum(step: int, hp) -> float:
    """Muon's momentum at `step`: from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM, linearly over
    MUON_MOMENTUM_WARMUP_STEPS steps."""
    risen = 1.0
    if hp.muon_momentum_warmup_steps:
        risen = min(1.0, step / hp.muon_momentum_warmup_steps)
    start = hp.muon_momentum_warmup_start
    return start + risen * (hp.muon_momentum - start)


class Muon(torch.optim.Optimizer):
    """Matrices of the same shape, tall ones transposed, form a stack. Each rank owns a share of
    every stack: it receives the sums of these gradients, keeps their momentum, makes the updates
    orthogonal in one batch, and sends them to the others. For sending, a stack is filled up with
    zero matrices to a multiple of the number of ranks; the momentum is not, so that the last shares
    may be short or empty."""

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
                stack = {"params": same, "buffer": buffer, "is_tall": is_tall}
                stacks.append({**group, **stack, "initial_decay": group["weight_decay"]})
        super().__init__(stacks, {"momentum": hp.muon_momentum_warmup_start})

    def local_share(self, stack: Tensor) -> Tensor:
        """A view of this rank's share of a stack."""
        size = math.ceil(len(stack) / self.ranks.world_size)
        return stack[self.ranks.rank * size :][:size]

    def schedule(self, step: int, plan: "StepPlan"):
        """Set the learning rates, the weight decay and the momentum of training step `step`, as
        `plan` has them."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * plan.scale
            group["weight_decay"] = group["initial_decay"] * plan.muon_decay
            group["momentum"] = muon_momentum(step, self.hp)

    def send_gradients(self):
        """Start to send each rank the sums of its share of the gradients."""
        self.arriving = []
        for group in self.param_groups:
            wide = [p.grad.mT if p.size(0) > p.size(1) else p.grad for p in group["params"]]
            padding = -len(wide) % self.ranks.world_size
            wide += [torch.zeros_like(wide[0])] * padding
            self.arriving.append(self.ranks.reduce_scatter(torch.stack(wide)))

    def receive_gradients(self):
        """Wait, and return this rank's share of each stack, padding included."""
        self.shares = [transfer.wait() for transfer in self.arriving]
        return self.shares

    def gradient_square(self):
        """The squared norm of the summed gradients, the same on every rank."""
        return self.ranks.sum_over_ranks(sum(share.square().sum() for share in self.shares))

    def begin_step(self):
        """Compute this rank's updates, and begin to send them."""
        self.arriving = []
        for group, grads_SRC in zip(self.param_groups, self.shares):
            momentum_SRC = self.local_share(group["buffer"])
            own_SRC = grads_SRC[: len(momentum_SRC)]  # a view of grads_SRC, without its padding
            momentum_SRC.mul_(group["momentum"]).add_(own_SRC)
            own_SRC.add_(momentum_SRC, alpha=group["momentum"])  # Nesterov
            if self.hp.muon_row_norm:
                own_SRC.copy_(equalize_rows(own_SRC, self.local_share(group["is_tall"])))
            update_SRC = orthogonalize(grads_SRC, self.hp.muon_backend_steps)  # padding stays 0
            self.arriving.append(self.ranks.all_gather(update_SRC))

    def finish_step(self):
        """Decay the weights. As the updates arrive, subtract each, times the learning rate and
        sqrt(max(1, rows / columns)) of the parameter."""
        for group, transfer in zip(self.param_groups, self.arriving):
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(group["params"], transfer.wait()):
                rows, columns = p.shape
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                p.sub_(update.mT if rows > columns else update, alpha=rate)

    def complete_state(self):
        """Collect the momentum of the other ranks' shares."""
        for group in self.param_groups:
            share = self.local_share(group["buffer"]).clone()
            group["buffer"].zero_()  # so that the sum over the ranks puts all shares together
            self.local_share(group["buffer"]).copy_(share)
            self.ranks.sum_over_ranks(group["buffer"])

    def state_tensors(self):
        """The momentum. Only this rank's share is current until `complete_state`."""
        return {f"muon.{i}": group["buffer"] for i, group in enumerate(self.param_groups)}


def build_optimizers(model, hp, ranks) -> list:
    """One optimizer for each class in `training_groups` that has parameters. Together they hold
    every parameter exactly once."""
    training = training_groups(hp)
    groups = {}  # kind -> torch's group of parameters, in the order of the model
    for name, p in model.named_parameters():
        kind = parameter_row(name).kind
        if kind not in groups:
            _, lr, decay = training[kind]
            groups[kind] = {"params": [], "lr": lr, "initial_lr": lr, "weight_decay": decay}
        groups[kind]["params"].append(p)

    optimizers = []
    # in the order of training_groups, so that Muon's updates travel while AdamW steps
    for cls in dict.fromkeys(training[kind].optimizer for kind in training):
        own = [group for kind, group in groups.items() if training[kind].optimizer is cls]
        if own:
            optimizers.append(cls(own, hp, ranks))

    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    every = [id(p) for p in model.parameters()]
    assert sorted(held) == sorted(every), "a parameter has no optimizer, or several"
    return optimizers


@torch.no_grad()
def update_parameters(optimizers: list, clip: float) -> None:
    """Sum the gradients over the ranks, and step all optimizers. If the norm of the sum exceeds
    `clip`, it is first scaled down to that; 0 turns this off. Communication of one optimizer
    overlaps with the work of the next. Collective."""
    for optimizer in optimizers:
        optimizer.send_gradients()
    gradients = [g for optimizer in optimizers for g in optimizer.receive_gradients()]
    if clip:
        norm = sum(optimizer.gradient_square() for optimizer in optimizers).sqrt()
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp_max(1))
    for optimizer in optimizers:
        optimizer.begin_step()
    for optimizer in optimizers:
        optimizer.finish_step()


# --- 8. Training --------------------------------
# TrainState holds everything that training changes, and `tensors` lists it by name. Warm-up copies
# and restores it; checkpoints store it. Batches depend only on the number of steps done, and
# nothing is random once the weights are initialised. So a resumed run continues as the stopped run
# would have. (With a time limit, learning rates also depend on the clock.)


class WeightAverage:
    """A running mean of the weights. With decay < 1 it is exponential and corrected for its zero
    start, like Adam's moments (EMA); with decay 1 all snapshots count the same (SWA)."""

    def __init__(self, decay: float, parameters: list[Tensor]):
        self.decay = decay
        self.count = torch.zeros((), dtype=torch.int64)
        self.mean = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[Tensor]) -> None:
        """Add a snapshot, the weights of now, to the mean."""
        n = int(self.count.add_(1))
        share = (1 - self.decay) / (1 - self.decay**n) if self.decay < 1 else 1 / n
        torch._foreach_lerp_(self.mean, parameters, share)


def build_averages(parameters: list[Tensor], hp) -> dict[str, WeightAverage]:
    """The averages that AVERAGING names, without a snapshot yet."""
    decays = {"ema": hp.ema_decay, "swa": 1.0}
    wanted = hp.averaging.split("_")
    return {name: WeightAverage(d, parameters) for name, d in decays.items() if name in wanted}


def takes_snapshot(name: str, step: int, scale: float, hp) -> bool:
    """Does the average `name` take a snapshot after `step` steps? EMA always does, SWA every
    SWA_EVERY steps once the lr scale is low."""
    return name == "ema" or (scale < hp.swa_threshold and step % hp.swa_every == 0)


def averaged_parameters(averages: dict[str, WeightAverage]) -> list[Tensor]:
    """For each parameter the mean of EMA and SWA, of those that have a snapshot. If none has, an
    empty list."""
    means = [average.mean for average in averages.values() if average.count]
    return [torch.stack(same).mean(0) for same in zip(*means)]


def training_share(step: int, seconds: float, hp) -> float:
    """How much of training is done, 0 to 1: by ITERATIONS or by the clock, whichever is larger."""
    share = step / hp.iterations
    if hp.seconds_for_steps:
        share = max(share, seconds / hp.seconds_for_steps)
    return min(share, 1.0)


def lr_scale(step: int, seconds: float, hp) -> float:
    """What all learning rates are multiplied by when `step` steps have taken `seconds`. It stays 1,
    then falls linearly to MIN_LR at the end of training. The fall lasts WARMDOWN_FRAC of training
    or, if that is 0, WARMDOWN_ITERS steps. The end is ITERATIONS or, if sooner, the step at which
    the time limit will come at the average speed so far."""
    if hp.warmdown_frac:
        left = (1 - training_share(step, seconds, hp)) / hp.warmdown_frac
    elif hp.warmdown_iters:
        steps_left = hp.iterations - step
        if hp.seconds_for_steps and step:
            seconds_left = hp.seconds_for_steps - seconds
            steps_left = min(steps_left, seconds_left / (seconds / step))
        left = max(steps_left, 0.0) / hp.warmdown_iters
    else:
        left = 1.0
    return hp.min_lr + (1 - hp.min_lr) * min(1.0, left)


def muon_decay(step: int, seconds: float, hp) -> float:
    """What Muon's weight decay is multiplied by: 1 up to WD_TAPER_START_FRAC of training, then
    linearly to WD_TAPER_FINAL_MULT at its end (challenge PR #1729)."""
    start = hp.wd_taper_start_frac
    beyond = max(training_share(step, seconds, hp) - start, 0.0) / max(1 - start, 1e-9)
    return 1 + (hp.wd_taper_final_mult - 1) * beyond


class StepPlan(NamedTuple):
    """What changes from one training step to the next."""

    scale: float  # factor of all learning rates
    passes: tuple[int, ...]  # the order in which blocks run
    hardness: Tensor | None = None  # late QAT: how hard soft rounding is (see `soft_round`)
    muon_decay: float = 1.0  # factor of Muon's weight decay


def plan_step(step: int, seconds: float, hp, device) -> StepPlan:
    """The plan of the next step, when `step` steps have taken `seconds`. From RECUR_START of
    training on, RECUR_LAYERS run again. While the lr scale is below LATE_QAT_THRESHOLD, weights are
    rounded; the hardness rises from 1 at the threshold to 16 at a scale of 0."""
    scale = lr_scale(step, seconds, hp)
    before, after = block_passes(hp)
    passes = after if training_share(step, seconds, hp) >= hp.recur_start else before
    decay = muon_decay(step, seconds, hp)
    if scale >= hp.late_qat_threshold:
        return StepPlan(scale, passes, None, decay)
    hardness = 16 - 15 * scale / hp.late_qat_threshold
    return StepPlan(scale, passes, torch.full((), hardness, device=device), decay)


def training_loss(model, ids_BT, target_ids_BT, passes, hardness=None, shares_BT=None) -> Tensor:
    """The loss of GPT.forward, in nats. With `hardness`, the weights are rounded first; when
    compiled, that is a graph of its own, so that warm-up runs both."""
    rounded = {} if hardness is None else fake_quantized(model, hardness)
    return torch.func.functional_call(model, rounded, (ids_BT, target_ids_BT, passes, shares_BT))


def compiled(function: Callable, hp, device: torch.device) -> Callable:
    """`function` through torch.compile, if COMPILE says so."""
    if hp.compile == "1" or (hp.compile == "auto" and device.type == "cuda"):
        return torch.compile(function, dynamic=False)
    return function


class Trained(NamedTuple):
    """What `train` returns."""

    weights: dict[str, Tensor]  # by name, averaged or not: a state dict, to be packed
    curvature: dict[str, "Curvature"]  # by name of the matrix, for GPTQ; empty with QUANTIZER=rows
    steps: int
    seconds: float  # on the training clock, with checkpoints and the measurement of the curvature
    checkpoint: Path | None = None  # which this run has written, on rank 0
    # (nats per target, bits per byte) of the last validation, if that was of these weights
    validated: tuple[float, float] | None = None


UNITS = ("step", "checkpoint", "chunk")  # of work on the training clock; chunk: of the curvature


class TrainState:
    """All that training changes: weights, optimizers, averages, and the clock."""

    def __init__(self, model, ranks, log, data: dict[str, str] | None = None):
        self.model = model
        self.hp = model.hp
        self.data = data or {}  # the identity of what the run reads
        self.ranks = ranks
        self.log = log
        self.parameters = [p.data for p in model.parameters()]  # the model's own tensors
        self.progress = torch.zeros(2, dtype=torch.float64)  # steps done, seconds of training
        # MAX_WALLCLOCK_SECONDS, once that has ended training
        self.capped_at = torch.zeros((), dtype=torch.float64)
        self.longest = dict.fromkeys(UNITS, 0.0)  # seconds of the longest so far, in this process
        self.started = 0.0  # perf_counter() when the clock would have begun without any pause
        self.checkpoint: Path | None = None  # which this run has written
        self.optimizers = build_optimizers(model, self.hp, ranks)
        self.averages = build_averages(self.parameters, self.hp)

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.progress[0])

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return float(self.progress[1])

    @property
    def is_over(self) -> bool:
        """No step is left to take: ITERATIONS are done, or there was no time for more, and the time
        limit of now is not larger."""
        has_no_time = 0 < self.hp.max_wallclock_seconds <= float(self.capped_at)
        return has_no_time or self.steps >= self.hp.iterations

    def start_clock(self) -> None:
        """From now on time counts as training: at its beginning and after each pause. A pause
        begins with `read_clock`."""
        self.started = perf_counter() - self.seconds

    def read_clock(self, unit: str = "") -> float:
        """Set `seconds` to rank 0's. Returns those since the last reading; with `unit`, it took
        them. Collective."""
        before = self.seconds
        self.progress[1] = self.ranks.from_rank0(perf_counter() - self.started)
        if unit:
            self.note_unit(unit, self.seconds - before)
        return self.seconds - before

    def note_unit(self, unit: str, seconds: float) -> None:
        """One of UNITS took so long."""
        self.longest[unit] = max(self.longest[unit], seconds)

    @property
    def hint(self) -> str:
        """For error messages: how to go on."""
        return self.log.hint

    @property
    def label(self) -> str:
        """What log lines about a step begin with."""
        return f"step:{self.steps}/{self.hp.iterations}"

    @property
    def clock(self) -> str:
        """What log lines say of the time."""
        ms = 1e3 * self.seconds
        return f"train_time:{ms:.0f}ms step_avg:{ms / max(self.steps, 1):.2f}ms"

    def update(self, plan: StepPlan) -> None:
        """One step on the gradients that the parameters hold now; then averages take their
        snapshots. Collective."""
        for optimizer in self.optimizers:
            optimizer.schedule(self.steps, plan)
        update_parameters(self.optimizers, self.hp.grad_clip_norm)
        self.model.zero_grad(set_to_none=True)
        self.progress[0] += 1
        for name, average in self.averages.items():
            if takes_snapshot(name, self.steps, plan.scale, self.hp):
                average.update(self.parameters)

    def load_averages(self) -> bool:
        """Replace the model's weights by the averages, if there are any, and log which. Returns
        whether there are."""
        means = averaged_parameters(self.averages)
        if means:
            torch._foreach_copy_(self.parameters, means)
        used = "_".join(name for name, a in self.averages.items() if a.count) or "none"
        counts = " ".join(f"{name}_updates:{a.count}" for name, a in self.averages.items())
        size = sum(p.numel() for p in self.parameters)
        self.log(f"averaging:{used} {counts} parameters:{size}")
        for name, average in self.averages.items():
            if not average.count:
                self.log(f"warning: AVERAGING={self.hp.averaging}: {name} took no snapshot")
        return bool(means)

    def tensors(self) -> dict[str, Tensor]:
        """name -> every tensor of the state. They are the live ones: to overwrite them is to change
        the state. Those of an average are `ema.0`, its count, and `ema.1` ..., its mean."""
        named = {"progress": self.progress, "capped_at": self.capped_at}
        named |= {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for optimizer in self.optimizers:
            named |= optimizer.state_tensors()
        for name, average in self.averages.items():
            named |= {f"{name}.{i}": t for i, t in enumerate([average.count, *average.mean])}
        return named

    def save(self) -> None:
        """Rank 0 writes logs/<RUN_ID>.ckpt, from which a run with any number of ranks can go on. If
        writing fails, or a number is not finite, the log says so and the previous checkpoint is
        kept. A file that an earlier run left under this name is not touched: then the name gets a
        number. Collective."""
        self.complete_state()
        try:
            if self.log.path is not None:  # it is None on other ranks
                self.checkpoint = self.checkpoint or free_path(self.log.path.with_suffix(".ckpt"))
                self.write_checkpoint(self.checkpoint)
                self.log.leaves("checkpoint", how_to_resume(self.checkpoint, self))
        except (UserError, MemoryError) as error:
            self.log(f"warning: {error or 'no memory for a checkpoint'}")
        self.ranks.barrier()

    def complete_state(self) -> None:
        """Give rank 0 what of the optimizers' state other ranks have. Collective."""
        for optimizer in self.optimizers:
            optimizer.complete_state()

    def try_saving(self) -> None:
        """Write a checkpoint and remove it. UserError: it cannot be written. Collective."""
        self.complete_state()
        if self.log.path is not None:
            trial = free_path(self.log.path.with_suffix(".trial"))
            try:
                self.write_checkpoint(trial)
            finally:
                with suppress(OSError):  # it must not hide why the trial failed
                    trial.unlink(missing_ok=True)
        self.ranks.barrier()

    def write_checkpoint(self, path: Path) -> None:
        """UserError: the file cannot be written, or a number is not finite."""
        arrays = {name: t.numpy(force=True) for name, t in self.tensors().items()}
        for name, array in arrays.items():
            problem = f"{name} is not finite, so step {self.steps} gets no checkpoint"
            require(np.isfinite(array).all(), problem)
        progress = arrays["progress"].copy()
        progress[1] += self.longest["checkpoint"]  # as long as this one may take
        arrays["progress"] = progress
        for name, facts in (("settings", self.hp.as_env()), ("data", self.data)):
            arrays[name] = np.array(json.dumps(facts, allow_nan=False))
        replace_file(path, lambda file: np.savez(file, **arrays))

    def restore(self, path: str) -> None:
        """Give every rank the state of rank 0. With a `path`, rank 0 first reads its state from the
        checkpoint there. Collective. UserError: there is no checkpoint, it is of other data, or its
        tensors have other shapes than those of these settings."""
        if path and self.ranks.rank == 0:
            self.copy_checkpoint(path, read_checkpoint(path))
        for tensor in self.tensors().values():
            self.ranks.from_rank0(tensor)
        if path:
            self.log.leaves("checkpoint", how_to_resume(path, self))
            self.log(f"resume:{path} step:{self.steps} train_time:{1e3 * self.seconds:.0f}ms")

    def copy_checkpoint(self, path: str, arrays: dict[str, ndarray]) -> None:
        """Copy the arrays of a checkpoint into the state, and warn of settings that differ.
        UserError: it was made with other data."""
        require(
            "data" in arrays and "capped_at" in arrays,
            f"RESUME={path}: is no checkpoint of this train_gpt.py: go on with the script that "
            "wrote it, or begin again",
        )
        before, data = (json.loads(str(arrays.get(name, "{}"))) for name in ("settings", "data"))
        for name, value in self.hp.as_env().items():
            was = before.get(name, value)
            if was != value and name in MODEL_SETTINGS and name not in ("QUANT_BITS", "CODER"):
                raise UserError(
                    f"RESUME={path}: was begun with {name}={was}, not {value}: set that"
                )
            if was != value and name not in ("RUN_ID", "RESUME", "CHECKPOINT_EVERY"):
                self.log(f"warning: {name}={value} here, {was} in the checkpoint")
        for name, tensor in self.tensors().items():
            shape = arrays[name].shape if name in arrays else None
            found = "is absent" if shape is None else f"has shape {shape}"
            needed = tuple(tensor.shape)
            require(
                shape == needed,
                f"RESUME={path}: {name} {found}, these settings make {needed}: set what the run "
                "was begun with",
            )
            tensor.copy_(torch.from_numpy(arrays[name]))
        for part in dict.fromkeys([*self.data, *data]):
            found, here = data.get(part, "not recorded"), self.data.get(part, "not there")
            require(
                found == here,
                f"RESUME={path}: its run began with other data: {part} was {found}, but is {here} "
                "now: set DATA_PATH, TRAIN_DATA_PATH and TOKENIZER_PATH to what it began with; the "
                "checkpoint is kept",
            )


def how_to_resume(path: str | Path, state: TrainState) -> str:
    """For error messages: how to go on from the checkpoint `path` of this state."""
    what = ", with packing" if state.is_over else ""
    return f"RESUME={path} goes on from step {state.steps}{what}"


def free_path(path: Path) -> Path:
    """`path` or, if there is such a file, the first of name.2, name.3 ... that is free."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_stem(f"{path.stem}.{number}")
    return free


def read_checkpoint(path: str) -> dict[str, ndarray]:
    """All arrays of a checkpoint. UserError: there is no such file, or it is cut or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            # np.load by itself does not verify every checksum
            require(not archive.zip.testzip(), "a checksum differs")
            arrays = dict(archive)
        for name in ("settings", "data"):
            facts = json.loads(str(arrays.get(name, "{}")))
            require(type(facts) is dict, f"its {name} are no JSON object")
        return arrays
    except MemoryError:
        raise
    except Exception as error:  # damage raises many types: of NumPy, zipfile, zlib, struct ...
        cause, *_ = str(error).split(". ")  # NumPy goes on to say how to load it unsafely
        reason = getattr(error, "strerror", None) or f"not a whole checkpoint ({cause})"
        raise UserError(f"RESUME={path}: {reason}") from None


def train(model, loader: TokenLoader, validation: Validation, ranks, log, stop) -> Trained:
    """Train `model` in place, from its initial weights or from RESUME, until ITERATIONS or
    MAX_WALLCLOCK_SECONDS. After the last step a checkpoint is written; then the model gets the
    averaged weights, and their curvature is measured. RESUME of that checkpoint takes no more
    steps, unless there are more ITERATIONS or more time than before. Collective. UserError: the
    loss is not finite. Stopped: a signal came."""
    hp = model.hp
    _, passes = block_passes(hp)  # those of the network that is scored
    state = TrainState(model, ranks, log, validation.identity | loader.identity)
    state.restore(hp.resume)
    if not state.is_over:
        loss = compiled(training_loss, hp, ranks.device)
        take_step = partial(training_step, state, loader, loss)
        warm_up(state, take_step)
        try_units(state, passes, loader)
        run_steps(state, take_step, validation, stop)
    stop_if_signalled(state, stop)
    last_passes, last_scores = log_progress_validation(state, validation)
    stop.be_patient(False)  # from here on a signal ends the run at once
    stop_if_signalled(state, stop)

    state.start_clock()
    is_averaged = state.load_averages()
    curvature = {}
    if hp.quantizer == "gptq":
        curvature, num_tokens = measure_curvature(model, passes, loader, state.steps, ranks)
        seconds = state.read_clock()
        # input channels that were always 0
        dead = sum(int((c.inputs_CC.diagonal() == 0).sum()) for c in curvature.values())
        facts = f"seconds:{seconds:.1f} matrices:{len(curvature)} dead_columns:{dead}"
        log(f"gptq_curvature tokens:{num_tokens} {facts} {state.clock}")
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    validated = last_scores if passes == last_passes and not is_averaged else None
    return Trained(weights, curvature, state.steps, state.seconds, state.checkpoint, validated)


def stop_if_signalled(state: TrainState, stop) -> None:
    """End training if a signal has come to any rank. Collective. Stopped: it has."""
    (stopped,) = state.ranks.any(bool(stop.name))
    if stopped:
        raise stopped_here(state, stop)


def stopped_here(state: TrainState, stop) -> Stopped:
    """The error with which training ends after a signal, maybe to another rank."""
    by = stop.name or "a signal"
    return Stopped(f"{state.label}: stopped by {by}; {state.hint}")


def log_progress_validation(
    state: TrainState, validation: Validation
) -> tuple[tuple[int, ...], tuple[float, float]]:
    """Validate with the weights of now, as they are trained, and log it. Returns the order in which
    blocks ran, and (nats per target, bits per byte). Collective."""
    passes = plan_step(state.steps, state.seconds, state.hp, state.ranks.device).passes
    loss, bpb = validate(Scorer(state.model, passes), validation, state.ranks, state.log)
    state.log(f"{state.label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {state.clock}")
    return passes, (loss, bpb)


def try_units(state: TrainState, passes: tuple[int, ...], loader: TokenLoader) -> None:
    """With a time limit: do once, off the clock, what training does only when the time is nearly
    over, so that it is known how much to keep. That is to measure a chunk of the curvature and to
    write a checkpoint. Both leave no trace. Collective. UserError: it cannot be written."""
    if not state.hp.max_wallclock_seconds:
        return
    began = perf_counter()
    if state.hp.quantizer == "gptq":
        measure_curvature(state.model, passes, loader, state.steps, state.ranks, most_chunks=1)
        state.note_unit("chunk", state.ranks.from_rank0(perf_counter() - began))
    began = perf_counter()
    state.try_saving()
    state.note_unit("checkpoint", state.ranks.from_rank0(perf_counter() - began))


def training_step(state: TrainState, loader: TokenLoader, loss: Callable, plan: StepPlan) -> Tensor:
    """One update, on the batch whose number is `state.steps`. Returns this rank's part of the
    batch's mean loss: summed over the ranks it is the mean. Collective."""
    device = state.ranks.device
    total = torch.zeros((), device=device)
    for micro in range(loader.accumulation):
        ids, target_ids = loader.micro_batch(state.steps, micro)
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
            target_ids = target_ids.pin_memory().to(device, non_blocking=True)
        part = loss(state.model, ids, target_ids, plan.passes, plan.hardness)
        part = part / (loader.accumulation * state.ranks.world_size)
        part.backward()
        total += part.detach()
    state.update(plan)
    return total


def plans_by_graph(hp, device) -> list[StepPlan]:
    """A plan of a step for each graph that training may need: for each order of the blocks, with
    and without late QAT."""
    hardnesses = [None]
    if hp.late_qat_threshold:
        hardnesses.append(torch.ones((), device=device))
    orders = dict.fromkeys(block_passes(hp))  # one, if no layer recurs
    return [StepPlan(1.0, passes, hardness) for passes in orders for hardness in hardnesses]


def warm_up(state: TrainState, take_step: Callable) -> None:
    """Compile every graph that training may need, by taking steps with each of them: WARMUP_STEPS
    or, if that is not 0 but too few, one for each graph. Then restore all that they changed.
    Collective."""
    hp = state.hp
    tensors = list(state.tensors().values())
    before = [t.clone() for t in tensors]
    plans = plans_by_graph(hp, state.ranks.device)
    progress = Progress(state.log, "warm-up", len(plans))
    steps = max(hp.warmup_steps, len(plans)) if hp.warmup_steps else 0
    for i in range(steps):
        take_step(plans[i % len(plans)])
        if i < len(plans):
            progress(i + 1)
    torch._foreach_copy_(tensors, before)
    state.ranks.barrier()


def run_steps(state: TrainState, take_step: Callable, validation: Validation, stop) -> None:
    """Take steps until the end of training, with validations, log lines and checkpoints; the last
    checkpoint says that training has ended. The clock is rank 0's. It stands still during
    validations, as the challenge allows, but not while a checkpoint is written. Collective."""
    hp, ranks, log = state.hp, state.ranks, state.log
    stop.be_patient()  # from here on signals wait for the end of a step
    saved_at = state.seconds
    state.start_clock()
    plan = StepPlan(1.0, block_passes(hp)[0])  # as if before the first step
    share = training_share(state.steps, state.seconds, hp)
    progress = Progress(log, "training", 1.0, has_lines=False, done=share)
    losses = deque(maxlen=2)  # of the last two steps, the older one first
    while True:
        if losses:
            # Wait for the older step only, so that the GPU always has a step to work on.
            require_finite(losses[0], state.steps + 1 - len(losses), state)
        state.read_clock("step" if losses else "")
        (stopped,) = ranks.any(bool(stop.name))
        previous_plan = plan
        plan = plan_step(state.steps, state.seconds, hp, ranks.device)
        if losses:
            log_loss(losses[-1], plan, state)
        progress(training_share(state.steps, state.seconds, hp))

        is_capped = time_is_up(state)
        if is_capped or state.steps >= hp.iterations:
            break
        validates = is_multiple(state.steps, hp.val_loss_every)
        is_due = validates or 0 < hp.checkpoint_every <= state.seconds - saved_at
        # 3: this one counts once, the last one twice, as it may take twice as long as this one
        if stopped or (is_due and not time_is_up(state, checkpoints=3)):
            saved_at = state.seconds
            state.save()  # also before a validation, in case the run is killed during it
            state.read_clock("checkpoint")
        if stopped:
            raise stopped_here(state, stop)
        if validates:
            log_progress_validation(state, validation)
            state.start_clock()
        log_changes(previous_plan, plan, state)
        losses.append(PendingLoss(take_step(plan)))

    if losses:
        require_finite(losses[-1], state.steps, state)
    if is_capped:
        log(f"stopping_early: wallclock_cap {state.clock.split()[0]} {state.label}")
        state.capped_at.fill_(hp.max_wallclock_seconds)
    state.save()
    state.read_clock("checkpoint")


class PendingLoss:
    """The loss of a step, on its way to the CPU. (To read it from the GPU would also wait for all
    work that is queued there, the next step included.)"""

    def __init__(self, loss: Tensor):
        self.copy = loss.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if loss.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def wait(self) -> Tensor:
        """This rank's part of the mean loss in nats, on the CPU."""
        if self.arrival:
            self.arrival.synchronize()
        return self.copy


def require_finite(loss: PendingLoss, step: int, state: TrainState) -> None:
    """UserError: the loss of `step` is not finite on some rank. Collective."""
    (diverged,) = state.ranks.any(not math.isfinite(loss.wait()))
    require(
        not diverged,
        f"step:{step}/{state.hp.iterations}: the training loss is not finite; lower the learning "
        f"rates; {state.hint}",
    )


def time_is_up(state: TrainState, checkpoints: int = 1) -> bool:
    """Must training end now, to keep its time limit even if it writes so many more checkpoints? The
    first step is taken in any case."""
    more = seconds_to_keep(state, checkpoints)
    return state.steps > 0 and would_overrun(state.seconds, more, state.hp.max_wallclock_seconds)


def seconds_to_keep(state: TrainState, checkpoints: int = 1) -> float:
    """The seconds that another step, so many checkpoints and the measurement of the curvature take,
    if each takes twice as long as the longest of its kind so far. On a GPU the last step is still
    under way when the clock is read; its time counts too."""
    hp = state.hp
    steps = 2 if state.ranks.device.type == "cuda" else 1
    step_seconds = state.longest["step"] or state.seconds / max(state.steps, 1)  # after RESUME
    units = steps * step_seconds + checkpoints * state.longest["checkpoint"]
    return 2 * units + max(hp.gptq_seconds, 2 * state.longest["chunk"])


def log_loss(loss: PendingLoss, plan: StepPlan, state: TrainState) -> None:
    """Log the loss of the last step, if it is due. Collective."""
    hp, step = state.hp, state.steps
    if step <= 10 or is_multiple(step, hp.train_log_every):
        mean_loss = state.ranks.sum_over_ranks(loss.wait().clone()).item()
        speed = f"tok/s:{hp.train_batch_tokens * step / state.seconds:.0f}"
        line = f"train_loss:{mean_loss:.4f} {state.clock} {speed} lr_scale:{plan.scale:.4f}"
        state.log(f"{state.label} {line}")


def log_changes(previous: StepPlan, plan: StepPlan, state: TrainState) -> None:
    """Log where recurrence or late QAT begins. Warn after ten steps if the time limit will come
    long before the end of a warm-down that began with the first step."""
    hp = state.hp
    is_early = training_share(state.steps, state.seconds, hp) < 0.5
    if state.steps == 10 and is_early and plan.scale < 1 / 3 and hp.warmdown_iters <= hp.iterations:
        state.log(
            f"warning: WARMDOWN_ITERS={hp.warmdown_iters} is more than three times the steps that "
            "the time limit allows: learning rates are low from the start"
        )
    if plan.passes != previous.passes:
        state.log(f"recurrence:on step:{state.steps} passes:{len(plan.passes)}")
    if plan.hardness is not None and previous.hardness is None:
        facts = f"lr_scale:{plan.scale:.4f} bits:{hp.quant_bits} {hp.qat_rounding}"
        state.log(f"late_qat:on step:{state.steps} {facts}")


def is_multiple(step: int, every: int) -> bool:
    """Does `every` divide `step`? Never if either is 0."""
    return step > 0 and every > 0 and step % every == 0


# --- 9. Curvature -------------------------------
# How much an error in a weight raises the loss. It is measured on training tokens, and the time
# counts as training time. GPTQ (section 10) uses it to keep those weights precise that matter most.

LEAST_COST = 1e-30  # in nats per token, of an error of 1; less is nothing
CHUNK_TOKENS = 16_384  # tokens of one rank in one forward and backward pass


class Curvature:
    """By how much errors in one matrix raise the loss: an error E costs, in nats per token,

        1/2 * sum over the rows r of  outputs_r * E_r @ inputs @ E_r'

    (second order, Kronecker-factored, with squared gradients in the place of second derivatives:
    1503.05671)."""

    def __init__(self, inputs_CC, outputs_R):
        self.inputs_CC = inputs_CC  # mean of x x' over tokens, where x is the input
        self.outputs_R = outputs_R  # mean over tokens of the squared gradient of output r

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """perm, the columns by falling diagonal of inputs_CC; and U, upper triangular, with U' U =
        (inputs_CC[perm, perm] + damping)^-1, which GPTQ needs. None, if the matrix is not positive
        definite even with the strongest damping, a number is not finite, or inputs or gradients
        were always zero."""
        H_CC = self.inputs_CC.double()
        if H_CC.diagonal().mean() * self.outputs_R.double().mean() <= LEAST_COST:
            return None
        perm_C = H_CC.diagonal().argsort(descending=True)
        H_CC = H_CC[perm_C][:, perm_C]
        for damping in (0.01, 0.1, 1.0):
            shift_C = (damping * H_CC.diagonal().mean()).expand(len(H_CC))
            lower_CC, failed = torch.linalg.cholesky_ex(H_CC + shift_C.diag())
            if not failed and lower_CC.isfinite().all() and self.outputs_R.isfinite().all():
                inverse_CC = torch.cholesky_inverse(lower_CC)
                return perm_C, torch.linalg.cholesky(inverse_CC, upper=True).float()
        return None

    @cached_property
    def deltas(self) -> Tensor:
        """(R, 1): relative step sizes, for `factors` that are not None. GPTQ multiplies those of
        all matrices by one number. They go as 1/sqrt(the cost of an error of 1), so that one more
        bit reduces the loss equally in every row of every matrix (reverse water-filling). That cost
        is outputs_r times the mean of U_cc^-2, which is what remains of an error in column c once
        later columns have compensated for it."""
        column_cost = self.factors[1].diagonal().double().pow(-2).mean()
        outputs_R = self.outputs_R.double()
        cost_R = column_cost * (outputs_R + 0.01 * outputs_R.mean())
        # The logarithm is rounded to eighths, because few different values take few bytes.
        eighths = (-4 * cost_R.clamp_min(LEAST_COST).log2()).round()
        return torch.exp2(eighths / 8).float().cpu()[:, None]


@dataclass
class Moments:
    """Sums over tokens, from which a Curvature is made. (0.0 takes the shape of what is added.)"""

    inputs_CC: Tensor | float = 0.0  # of x x'
    outputs_R: Tensor | float = 0.0  # of squared gradients
    num_inputs: int = 0  # tokens, counted again at each run of a layer that runs again

    def add_inputs(self, x: Tensor) -> None:
        """`x`: (..., C), what the matrix multiplies."""
        x_NC = x.detach().flatten(0, -2).float()
        self.inputs_CC = self.inputs_CC + x_NC.T @ x_NC
        self.num_inputs += len(x_NC)

    def add_gradients(self, g: Tensor, factor=1.0) -> None:
        """Add squares. g is the gradient of factor * (W x); so g * factor is that of W x."""
        self.outputs_R = self.outputs_R + (g.flatten(0, -2).float() * factor).square().sum(0)

    def watch_linear(self, module, args, y: Tensor) -> None:
        """A forward hook of Linear: adds its input and, in the backward pass, its gradient."""
        self.add_inputs(args[0])
        factor = args[1].detach().flatten() if len(args) > 1 else 1.0
        y.register_hook(lambda g: self.add_gradients(g, factor))

    def watch_embedding(self, module, args, y: Tensor) -> None:
        """A forward hook of an embedding. How much an error in a row of the table matters depends
        on how often that row is looked up, so outputs_R counts the lookups. How much errors in the
        columns matter depends on the gradients of the rows that were looked up, so the moments of
        these gradients go into inputs_CC."""
        counts_R = torch.bincount(args[0].flatten(), minlength=len(module.weight))
        self.outputs_R = self.outputs_R + counts_R
        y.register_hook(self.add_inputs)


@contextmanager
def watched(model) -> Iterator[dict[str, Moments]]:
    """While this context is open, each forward and backward pass adds to the Moments that it
    yields, by name of the matrix. At the end, hooks and gradients are removed."""
    moments = defaultdict(Moments)
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                hook = moments[f"{name}.weight"].watch_linear
                handles.append(module.register_forward_hook(hook))
            elif isinstance(module, nn.Embedding):
                hook = moments[f"{name}.weight"].watch_embedding
                handles.append(module.register_forward_hook(hook))
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)


def curvature_batches(hp, loader: TokenLoader, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this rank's (ids, target ids) of the batches that would follow after `step` steps, in
    chunks of about CHUNK_TOKENS: as many whole batches, of all ranks, as GPTQ_TOKENS needs."""
    rows = max(1, CHUNK_TOKENS // hp.train_seq_len)
    for batch in range(math.ceil(hp.gptq_tokens / hp.train_batch_tokens)):
        for micro in range(loader.accumulation):
            ids, target_ids = loader.micro_batch(step + batch, micro)
            yield from zip(ids.split(rows), target_ids.split(rows))


def measure_curvature(
    model, passes: tuple[int, ...], loader: TokenLoader, step: int, ranks, most_chunks: int = 0
) -> tuple[dict[str, Curvature], int]:
    """Returns the Curvature of every coded matrix, by name, and the number of tokens that it was
    measured on: those of the batches after `step` steps, or of the first `most_chunks`, unless that
    is 0. With a time limit it ends early, when one more chunk that takes twice as long as the
    longest so far would exceed the seconds kept for it. Collective."""
    hp, device = model.hp, ranks.device
    began = perf_counter()
    num_tokens, seconds, longest = 0, 0.0, 0.0
    chunks = curvature_batches(hp, loader, step)
    with watched(model) as moments:
        head = moments["head.weight"]  # GPT.logits uses the matrix without its module: no hook
        for ids, target_ids in islice(chunks, most_chunks or None):
            num_tokens += ids.numel() * ranks.world_size
            hidden_ND = model.hidden(ids.to(device), passes).flatten(0, 1)
            head.add_inputs(norm(hidden_ND))
            z_NV = model.logits(hidden_ND)
            z_NV.register_hook(head.add_gradients)
            target_ids_N = target_ids.to(device).flatten()
            token_nll(z_NV, target_ids_N, hp.logit_softcap).sum().backward()
            ranks.barrier()
            before, seconds = seconds, ranks.from_rank0(perf_counter() - began)
            longest = max(longest, seconds - before)
            if would_overrun(seconds, 2 * longest, hp.gptq_seconds):
                break

    found = {}
    for name in sorted(moments):
        num_inputs = moments[name].num_inputs * ranks.world_size
        inputs_CC = ranks.sum_over_ranks(moments[name].inputs_CC) / num_inputs
        outputs_R = ranks.sum_over_ranks(moments[name].outputs_R) / num_tokens
        found[name] = Curvature(inputs_CC, outputs_R)
    if model.head is None:
        # The embedding table is also the output head, and its costs in both places add up. That
        # keeps the form of a Curvature only if rows have the same weights in both: so how often
        # each is looked up is replaced by its share of the head's squared gradients.
        table, head = found["embed.weight"], found.pop("head.weight")
        looked_up_CC = table.inputs_CC / head.outputs_R.sum()
        found["embed.weight"] = Curvature(head.inputs_CC + looked_up_CC, head.outputs_R)
    return found, num_tokens


# --- 10. Artifact -------------------------------
# Quantise weights to codes, compress the codes to bytes, and search for the step sizes at which the
# file fits the budget. Codes are compressed by rANS (asymmetric numeral systems, Duda 1311.2540).
# Each uses one of 64 frequency tables, chosen by the spread of its row and of its column; that
# takes fewer bytes than one table for all. The natural step size of a weight is the one that
# QUANT_BITS would give (8 bits for tables and head). The file holds data only, nothing that can
# run:
#
#     "PGOLF", byte 4 | SHA-256 of the rest | u32 size of the text | text
#                                           | u32 size of the numbers | numbers | codes
#
# The text has the settings of the model and the tensor table, the numbers are all that is no code.
# Both are LZMA2. docs/container.md describes every byte. The reader believes nothing: settings are
# checked as those of the environment are, and with them the sizes of all that follows, before
# memory is taken for it.

MAGIC = b"PGOLF\x04"
CHECKSUM_PLACE = slice(len(MAGIC), len(MAGIC) + 32)
TABLES = 64  # frequency tables
SYMBOLS = 256  # symbols of a table; a symbol is a code plus 128
SCALE = 14  # the frequencies of a table sum to 2^SCALE
LEAST_STATE = 1 << 16  # the smallest rANS state, which is also the first
MOST_WEIGHTS = 1 << 26  # of a model, of which SIZE_CAP has room for less than two bits each
MOST_TEXT = 1 << 20  # bytes of the settings and the tensor table
COARSEST = 254.0  # the largest factor of RowQuantizer's step sizes: all codes are -1, 0 or 1
USUAL_RANGE = 16  # octaves; step sizes that are further from the median are those of dead rows
GPTQ_BLOCK = 128  # columns
TOLERANCE = 4096  # bytes of the budget that may stay unused
AIM = 2000  # the search aims this many bytes below the budget
LZMA = dict(
    format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=1 << 20, pb=0)]
)
LZMA_OF_CODES = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=6)])

require_valid = partial(require, error=ValueError)


# Quantisers: weights -> codes


class RowQuantizer:
    """Rounds each row by itself, without looking at the inputs of the matrix (GPTQ-lite)."""

    coarsest = COARSEST  # the largest useful factor: all codes are -1, 0 or 1

    def __init__(self, state: dict[str, Tensor], hp, curvature: dict[str, Curvature]):
        """`state`: the weights to be packed. It and `curvature` are for other quantisers."""
        self.hp = hp

    def quantize(self, name: str, w_RC, coarsen: float) -> tuple[Tensor, Tensor]:
        """(codes (R, C), step sizes (R, 1)) as of `quantize_rows`, with about `coarsen` times the
        natural step sizes."""
        largest = largest_code(name, w_RC, self.hp) / coarsen
        return quantize_rows(w_RC, dithered_codes(len(w_RC), largest))

    draft = quantize  # a quicker version, of about as many bytes; there is no need for one here


def dithered_codes(rows: int, largest: float) -> Tensor:
    """(rows, 1): the largest code of each row, an integer from 1 to 127, on average `largest`. Rows
    differ, so that a small change of `largest` changes only a few of them, and the size of the file
    by little."""
    golden = 0.6180339887498949
    dither = torch.arange(rows, dtype=torch.float64)[:, None] * golden % 1
    return (largest + dither).floor().clamp(1, LARGEST_CODE).float()


class GPTQ:
    """Takes step sizes from `Curvature.deltas`, then rounds columns in turn, so that later columns
    compensate for the error of earlier ones (GPTQ, 2210.17323). One factor scales all step sizes,
    so that their geometric mean is that of the natural ones. Matrices without a usable curvature
    are rounded by rows."""

    def __init__(self, state: dict[str, Tensor], hp, curvature: dict[str, Curvature]):
        self.rows = RowQuantizer(state, hp, curvature)
        self.curvature = {name: c for name, c in curvature.items() if c.factors is not None}
        matrices = {name: state[name].detach().float().cpu() for name in self.curvature}
        octaves = {}  # by matrix: log2 of natural step size / delta, of its rows that are not zero
        for name, w_RC in matrices.items():
            _, natural = quantize_rows(w_RC, largest_code(name, w_RC, hp))
            ratio = natural.log2() - self.curvature[name].deltas.log2()
            octaves[name] = ratio[w_RC.any(1)]
        self.scale = 2 ** self.mean_octaves(octaves, matrices)
        rows = [
            w_RC.abs().amax(1, keepdim=True) / (self.curvature[name].deltas * self.scale)
            for name, w_RC in matrices.items()
        ]
        self.coarsest = max([COARSEST, *(float(needed.max()) for needed in rows)])

    @staticmethod
    def mean_octaves(octaves: dict[str, Tensor], matrices: dict[str, Tensor]) -> float:
        """The mean over all weights. Rows that training never touched, or that weight decay has
        left next to nothing of, are far from the median: they are left out."""
        median = torch.cat([torch.zeros(0, 1), *octaves.values()]).median()
        total = 0.0
        num_weights = 0
        for name, found in octaves.items():
            usual = found[(found - median).abs() <= USUAL_RANGE]
            if len(usual):
                weights = len(usual) * matrices[name].size(1)
                total += float(usual.mean()) * weights
                num_weights += weights
        return total / max(num_weights, 1)

    def quantize(self, name: str, w_RC, coarsen: float) -> tuple[Tensor, Tensor]:
        """As RowQuantizer.quantize."""
        if name not in self.curvature:
            return self.rows.quantize(name, w_RC, coarsen)
        delta = self.delta(name, w_RC, coarsen)
        perm_C, factor_CC = self.curvature[name].factors
        w_CR = w_RC.to(factor_CC.device).T[perm_C]
        codes_CR = torch.empty_like(w_CR)
        codes_CR[perm_C] = round_in_turn(w_CR, delta.to(w_CR.device)[:, 0], factor_CC)
        return codes_CR.T.cpu().contiguous(), delta

    def draft(self, name: str, w_RC, coarsen: float) -> tuple[Tensor, Tensor]:
        """The same step sizes, but each weight is rounded by itself. That is quicker, and the file
        is about as large."""
        if name not in self.curvature:
            return self.rows.quantize(name, w_RC, coarsen)
        delta = self.delta(name, w_RC, coarsen)
        return round_to(delta, w_RC), delta

    def delta(self, name: str, w_RC, coarsen: float) -> Tensor:
        """Step sizes (R, 1), rounded to bfloat16 as they are stored, and large enough for codes of
        at most 127."""
        delta = self.curvature[name].deltas * (self.scale * coarsen)
        least = w_RC.abs().amax(1, keepdim=True) / LARGEST_CODE
        return torch.maximum(delta, least).clamp(1e-30, 1e36).bfloat16().float()


QUANTIZERS = {"gptq": GPTQ, "rows": RowQuantizer}


def round_to(delta: Tensor, w: Tensor) -> Tensor:
    """The nearest codes."""
    return (w / delta).round().clamp(-LARGEST_CODE, LARGEST_CODE)


def round_in_turn(w_CR, delta_R, factor_CC) -> Tensor:
    """Codes (C, R) of a transposed matrix: each row of `w` is a column of the matrix. The columns
    are rounded one after the other. `factor`: U of Curvature.factors. Within a block of columns,
    each error is passed on to the later columns immediately; the columns after the block get all of
    them by one product."""
    w_CR = w_CR.clone()
    codes_CR = torch.empty_like(w_CR)
    for start in range(0, len(w_CR), GPTQ_BLOCK):
        block = slice(start, start + GPTQ_BLOCK)
        w = w_CR[block]
        factor = factor_CC[block, block]
        errors = torch.empty_like(w)
        for c in range(len(w)):
            codes = round_to(delta_R, w[c])
            codes_CR[start + c] = codes
            errors[c] = (w[c] - codes * delta_R) / factor[c, c]
            w[c + 1 :].addr_(factor[c, c + 1 :], errors[c], alpha=-1)
        w_CR[block.stop :] -= factor_CC[block, block.stop :].T @ errors
    return codes_CR


# Codes <-> bytes


def spread_classes(codes_RC: ndarray) -> tuple[ndarray, ndarray]:
    """(classes of the rows, classes of the columns), int16: 16 + 4 log2 of the root mean square of
    the codes, rounded. For a column, each code is first divided by the root mean square of its row.
    Small constants keep rows and columns of zeros finite."""
    row = np.sqrt(np.square(codes_RC, dtype=np.float32).mean(1) + 0.03)
    column = np.sqrt(np.square(codes_RC / row[:, None]).mean(0) + 0.003)
    row, column = (np.rint(4 * np.log2(16 * spread)).astype("<i2") for spread in (row, column))
    return row, column


def tables_of(rows: ndarray, columns: ndarray) -> ndarray:
    """(R, C): the frequency table of each code, from the spread classes of its row and column."""
    return np.clip(np.add.outer(rows, columns) - 16, 0, TABLES - 1)


def num_states(num_symbols: int) -> int:
    """How many rANS states take turns in coding so many symbols. More are faster, as they are coded
    side by side; each takes 4 bytes in the file."""
    return min(1024, 16 + (num_symbols >> 12))


def table_frequencies(pairs: ndarray) -> ndarray:
    """How often each pair occurs, uint16, scaled to sum to 2^SCALE in each table, and at least 1
    for every pair that occurs. A pair is SYMBOLS * table + symbol, int16."""
    count = np.bincount(pairs, minlength=SYMBOLS * TABLES).reshape(TABLES, SYMBOLS)
    occurs = count > 0
    spare = (1 << SCALE) - occurs.sum(1, keepdims=True)
    freq = occurs + count * spare // np.maximum(count.sum(1, keepdims=True), 1)
    # What rounding down has left over goes to the most frequent symbol.
    left_over = (1 << SCALE) - freq.sum(1)
    freq[np.arange(TABLES), freq.argmax(1)] += left_over
    return freq.astype("<u2").ravel()


def rans_encode(pairs: ndarray) -> tuple[ndarray, bytes]:
    """(`table_frequencies`, coded bytes) of `pairs`. rANS encodes backwards: this undoes the steps
    of `rans_decode` from the last to the first. The bytes are the final states (u32), then 16-bit
    words in the order in which the decoder reads them. States lie in [2^16, 2^32); one that would
    grow beyond that first spills its low 16 bits into a word."""
    freq = table_frequencies(pairs)
    start = np.cumsum(freq, dtype=np.uint32) - freq
    count = num_states(len(pairs))
    states = np.full(count, LEAST_STATE, "<u4")
    words = []
    for i in reversed(range(0, len(pairs), count)):
        pair = pairs[i : i + count]
        x = states[: len(pair)]
        spills = (x >> (32 - SCALE)) >= freq[pair]
        words.append(x[spills].astype("<u2"))
        quotient, rest = np.divmod(np.where(spills, x >> 16, x), freq[pair])
        begin = start[pair] % (1 << SCALE)  # tables follow each other, each 2^SCALE long
        x[:] = (quotient << SCALE) + rest + begin
    return freq, b"".join([states, *reversed(words)])


def rans_decode(coded: bytes, tables: ndarray, freq: ndarray) -> ndarray:
    """The symbols (uint8); `tables` has the number of each one's frequency table. ValueError: too
    few bytes, or too many."""
    start = np.cumsum(freq, dtype=np.uint32) - freq
    pair_of_slot = np.repeat(np.arange(len(freq), dtype="<u2"), freq)
    count = num_states(len(tables))
    is_sized = len(coded) >= 4 * count and len(coded) % 2 == 0
    require_valid(is_sized, "codes end too early")
    states = np.frombuffer(coded, "<u4", count).copy()
    words = np.frombuffer(coded, "<u2", offset=4 * count)
    symbols = np.empty(len(tables), np.uint8)
    for i in range(0, len(tables), count):
        table = tables[i : i + count].astype(np.uint32)
        x = states[: len(table)]
        slot = (table << SCALE) | (x & ((1 << SCALE) - 1))
        pair = pair_of_slot[slot]
        symbols[i : i + count] = pair & (SYMBOLS - 1)
        x[:] = freq[pair] * (x >> SCALE) + slot - start[pair]

        low = np.flatnonzero(x < LEAST_STATE)
        require_valid(len(low) <= len(words), "codes end too early")
        x[low] = x[low] << 16 | words[: len(low)]
        words = words[len(low) :]
    is_whole = not len(words) and (states == LEAST_STATE).all()
    require_valid(is_whole, "codes are damaged, or bytes are left over")
    return symbols


class Coded(NamedTuple):
    """What a coder's `encode` returns."""

    numbers: list[ndarray]  # 16-bit numbers without which the codes cannot be read
    codes: bytes
    sizes: list[int]  # about how many bytes each matrix takes


class Rans:
    """Codes by rANS. Its numbers are the frequencies; the spread classes of the rows of all
    matrices; and those of the columns."""

    share_of_rans = 1.0  # rANS takes at most about so many bytes for one of this coder's
    most_packings = 4  # of a search that begins near its end

    @staticmethod
    def num_numbers(shapes: list[tuple[int, int]]) -> int:
        """How many numbers `encode` returns for matrices of these shapes."""
        return SYMBOLS * TABLES + sum(map(sum, shapes))

    @staticmethod
    def encode(matrices: list[ndarray]) -> Coded:
        """`matrices`: whole numbers from -127 to 127, as floats, (R, C) each."""
        classes = [spread_classes(codes) for codes in matrices]
        pairs = []
        for codes, (rows, columns) in zip(matrices, classes):
            symbols = codes.astype(np.int16) + 128
            pairs.append((tables_of(rows, columns) * SYMBOLS + symbols).ravel())
        freq, words = rans_encode(np.concatenate([np.empty(0, np.int16), *pairs]))
        bits = SCALE - np.log2(np.maximum(freq, 1))  # of each pair
        sizes = [round(bits[pair].sum() / 8) for pair in pairs]
        rows_first = [rows for rows, _ in classes] + [columns for _, columns in classes]
        return Coded([freq, *rows_first], words, sizes)

    @staticmethod
    def decode(shapes: list[tuple[int, int]], numbers: ndarray, codes: bytes) -> list[ndarray]:
        """The codes plus 128 of matrices of these `shapes`, uint8. `numbers`: int16, of
        `num_numbers(shapes)`. ValueError: they or the codes are damaged."""
        freq, classes = np.split(numbers, [SYMBOLS * TABLES])
        sums = freq.reshape(TABLES, SYMBOLS).sum(1)
        require_valid((sums == 1 << SCALE).all() and freq.min() >= 0, "bad frequencies")
        sides = [R for R, _ in shapes] + [C for _, C in shapes]
        classes = np.split(classes, np.cumsum(sides, dtype=int)[:-1])
        tables = [
            tables_of(rows, columns).astype(np.uint8).ravel()
            for rows, columns in zip(classes, classes[len(shapes) :])
        ]
        flat = np.concatenate([np.empty(0, np.uint8), *tables])
        return split_matrices(rans_decode(codes, flat, freq.view("<u2")), shapes)


class Lzma:
    """Codes as int8 through LZMA, as PR #889 packs them. It has no numbers."""

    share_of_rans = 0.945
    most_packings = 2  # each takes a quarter of a minute for 27 million weights

    @staticmethod
    def num_numbers(shapes: list[tuple[int, int]]) -> int:
        """As Rans.num_numbers."""
        return 0

    @staticmethod
    def encode(matrices: list[ndarray]) -> Coded:
        """As Rans.encode. LZMA does not say how many bytes a matrix takes: by its share of
        weights."""
        plain = b"".join(codes.astype(np.int8) for codes in matrices)
        packed = lzma.compress(plain, **LZMA_OF_CODES)
        share = len(packed) / max(len(plain), 1)
        return Coded([], packed, [round(codes.size * share) for codes in matrices])

    @staticmethod
    def decode(shapes: list[tuple[int, int]], numbers: ndarray, codes: bytes) -> list[ndarray]:
        """As Rans.decode."""
        size = sum(R * C for R, C in shapes)
        plain = inflate(codes, size, LZMA_OF_CODES)
        require_valid(len(plain) == size, "codes end too early")
        return split_matrices(np.frombuffer(plain, np.uint8) + np.uint8(128), shapes)


CODERS = {"rans": Rans, "lzma": Lzma}


def split_matrices(flat: ndarray, shapes: list[tuple[int, int]]) -> list[ndarray]:
    """Matrices of these shapes, from the codes of all of them."""
    ends = np.cumsum([R * C for R, C in shapes], dtype=int)
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes)]


# State dict <-> container


class TensorEntry(NamedTuple):
    """A line of the container's tensor table."""

    name: str
    is_coded: bool
    shape: tuple[int, ...]

    def line(self) -> str:
        """As text, which `parse_header` reads."""
        return " ".join(map(str, (self.name, int(self.is_coded), *self.shape))) + "\n"

    @property
    def num_weights(self) -> int:
        """How many weights the tensor has."""
        return math.prod(self.shape)

    @property
    def num_numbers(self) -> int:
        """How many 16-bit numbers it has among the container's: a step size per row if it is coded,
        else all its weights."""
        return self.shape[0] if self.is_coded else self.num_weights


class Container(NamedTuple):
    """A packed state dict."""

    blob: bytes
    sizes: dict[str, int]  # bytes of the codes by group of parameters, and of all else as "side"
    error: float  # relative error of the coded weights: |decoded - w| / |w|
    num_coded: int  # number of coded weights (1 if there are none)
    levels: int  # the largest code of the matrices, which have QUANT_BITS by nature


def tensor_table(state: dict[str, Tensor], hp) -> list[TensorEntry]:
    """An entry for each tensor."""
    return [TensorEntry(n, largest_code(n, w, hp) > 0, tuple(w.shape)) for n, w in state.items()]


def quantize_state(state: dict[str, Tensor], hp, coarsen: float, quantize: Callable):
    """(entries, codes of the coded matrices, 16-bit numbers of all tensors, relative error).
    Tensors that are not coded become float16, which ends at 65504. UserError: a weight is NaN,
    infinite or huge."""
    entries = tensor_table(state, hp)
    codes, numbers = [], []
    lost = total = 0.0  # sums of squares
    for name, is_coded, _ in entries:
        w = state[name].detach().float().cpu().contiguous()
        require(
            bool((w.abs() <= (1e30 if is_coded else 65504)).all()),
            f"{name}: holds NaN, infinity or huge values: training diverged; lower the learning "
            "rates",
        )
        if not is_coded:
            numbers.append(w.half().numpy())
            continue
        rounded, delta = quantize(name, w, coarsen)
        codes.append(rounded.numpy())
        numbers.append(delta.bfloat16().view(torch.int16).numpy())
        lost += float((rounded * delta - w).square().sum(dtype=torch.float64))
        total += float(w.square().sum(dtype=torch.float64))
    return entries, codes, numbers, math.sqrt(lost / (total + 1e-300))


def pack(
    state: dict[str, Tensor], hp, coarsen: float = 1.0, quantize: Callable | None = None
) -> Container:
    """The container of a state dict, with about `coarsen` times the natural step sizes. `quantize`:
    the `quantize` or `draft` of a quantiser, by default RowQuantizer's. UserError: a weight is NaN,
    infinite or huge."""
    quantize = quantize or RowQuantizer(state, hp, {}).quantize
    entries, codes, numbers, error = quantize_state(state, hp, coarsen, quantize)
    coded = CODERS[hp.coder].encode(codes)
    numbers = b"".join([*coded.numbers, *numbers])
    by_byte = np.frombuffer(numbers, np.uint8).reshape(-1, 2).T.tobytes()  # low bytes, then high
    settings = [f"{name}={value}\n" for name, value in hp.of_model().items()]
    text = "".join(settings + [entry.line() for entry in entries]).encode()
    require(len(text) <= MOST_TEXT, f"the tensor table has over {MOST_TEXT} bytes: fewer layers")
    parts = [lzma.compress(part, **LZMA) for part in (text, by_byte)]
    body = b"".join(len(part).to_bytes(4, "little") + part for part in parts) + coded.codes
    blob = MAGIC + hashlib.sha256(body).digest() + body

    sizes = dict.fromkeys(["side", "embeddings", "attention", "mlp"], 0)
    names = [entry.name for entry in entries if entry.is_coded]
    for name, size in zip(names, coded.sizes):
        sizes[parameter_row(name).group] += size
    sizes["side"] = len(blob) - sum(sizes.values())
    largest = [np.abs(c).max() for n, c in zip(names, codes) if parameter_row(n).kind == "matrix"]
    num_coded = max(1, sum(c.size for c in codes))
    return Container(blob, sizes, error, num_coded, int(max(largest, default=0)))


class Opened(NamedTuple):
    """A container of which settings and tensor table are read and checked."""

    hp: Hyperparameters  # with the settings of the model that the file holds
    entries: list[TensorEntry]
    numbers: bytes  # still compressed
    codes: bytes


def open_container(blob: bytes) -> Opened:
    """ValueError: not a container, damaged, of another format, or its settings cannot be."""
    magic = blob[: len(MAGIC)]
    of_other = "; score it with the train_gpt.py that wrote it, which its run's log begins with"
    require_valid(
        magic == MAGIC,
        f"starts with {magic!r}, expected {MAGIC!r}: "
        + (f"another version of the format{of_other}" if magic[:5] == MAGIC[:5] else "no artifact"),
    )
    body = blob[CHECKSUM_PLACE.stop :]
    is_intact = hashlib.sha256(body).digest() == blob[CHECKSUM_PLACE]
    require_valid(is_intact, "SHA-256 differs: cut or damaged")
    parts = []
    for _ in range(2):
        end = 4 + int.from_bytes(body[:4], "little")
        parts.append(body[4:end])
        body = body[end:]
    text, numbers = parts
    settings, entries = parse_header(inflate(text, MOST_TEXT, LZMA))
    difference = sorted(settings.keys() ^ set(MODEL_SETTINGS))
    names = " ".join(difference)[:100]
    problem = f"{names}: a setting of the file or of this train_gpt.py, but not of both{of_other}"
    require_valid(not difference, problem)
    try:
        return Opened(settings_to_score("artifact", settings, {}), entries, numbers, body)
    except (UserError, OverflowError) as error:
        raise ValueError(f"settings that cannot be: {error}") from None


@contextmanager
def errors_of_artifacts() -> Iterator[None]:
    """What a damaged container raises becomes a ValueError of one line, which is not too long."""
    try:
        yield
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"artifact: {str(error)[:400]}") from None


def settings_of(blob: bytes) -> dict[str, str]:
    """The MODEL_SETTINGS that a container holds, as they would be written in the environment.
    ValueError: as for `decompress`, but numbers and codes are not looked at."""
    with errors_of_artifacts():
        hp, entries, *_ = open_container(blob)
        require_table(entries, tensor_table(empty_state(hp), hp))
        return hp.of_model()


def decompress(
    blob: bytes, like: dict[str, Tensor] | None = None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The settings of a container, as `settings_of` gives them, and its state dict, float32 on the
    CPU. `like`: the state dict of a model with these settings, if there is one already.
    ValueError: it is not a container, is damaged, holds settings that cannot be, or other tensors
    than its settings make. All of this is checked before memory is taken for the weights."""
    with errors_of_artifacts():
        hp, entries, numbers, codes = open_container(blob)
        if like is None:
            like = empty_state(hp)
        require_table(entries, tensor_table(like, hp))
        return hp.of_model(), read_tensors(CODERS[hp.coder], entries, numbers, codes)


def empty_state(hp) -> dict[str, Tensor]:
    """The state dict of a model, but without memory for its weights."""
    with torch.device("meta"):
        return GPT(hp).state_dict()


def require_table(found: list[TensorEntry], expected: list[TensorEntry]) -> None:
    """ValueError: the tensors of a file are others than those `expected` by its settings."""
    here, needed = ({e.name: e.line().strip() for e in entries} for entries in (found, expected))
    for name in sorted(here.keys() | needed.keys()):
        one, other = (lines.get(name, f"no {name}") for lines in (here, needed))
        require_valid(
            one == other,
            f"tensors of another model than its settings make: found {one!r}, expected {other!r}; "
            "if another train_gpt.py wrote it, score it with that one",
        )


def inflate(packed: bytes, most: int, options: dict) -> bytes:
    """The bytes that lzma has compressed with `options`. ValueError: over `most`, or damaged."""
    engine = lzma.LZMADecompressor(**options)
    plain = engine.decompress(packed, most + 1)
    is_whole = engine.eof and not engine.unused_data and len(plain) <= most
    require_valid(is_whole, "a compressed part that is cut or too long")
    return plain


def parse_header(text: bytes) -> tuple[dict[str, str], list[TensorEntry]]:
    """Settings and tensor table. ValueError: a line is neither, or not possible."""
    settings, entries = {}, []
    *lines, rest = text.split(b"\n")
    require_valid(not rest, "the tensor table ends within a line")
    for line in lines:
        if setting := re.fullmatch(rb"([A-Z][A-Z0-9_]*)=([ -~]*)", line):
            name = setting[1].decode()
            require_valid(name not in settings, f"{name} is set twice")
            settings[name] = setting[2].decode()
            continue
        match = re.fullmatch(rb"([\w.]+) ([01])((?: \d{1,9}){0,4})", line)
        require_valid(match is not None, "a bad line in the tensor table")
        shape = tuple(int(n) for n in match[3].split())
        entries.append(TensorEntry(match[1].decode(), match[2] == b"1", shape))
    names = {entry.name for entry in entries}
    require_valid(len(names) == len(entries), "a tensor name occurs twice")
    return settings, entries


def read_tensors(
    coder: Rans | Lzma, entries: list[TensorEntry], numbers: bytes, codes: bytes
) -> dict[str, Tensor]:
    """The state dict. `numbers`: still compressed."""
    shapes = [entry.shape for entry in entries if entry.is_coded]
    sizes = [coder.num_numbers(shapes), *(entry.num_numbers for entry in entries)]
    numbers = inflate(numbers, 2 * sum(sizes), LZMA)
    require_valid(len(numbers) == 2 * sum(sizes), "too few numbers")
    by_byte = np.frombuffer(numbers, np.uint8).reshape(2, -1)
    parts = np.split(by_byte.T.copy().view("<i2").ravel(), np.cumsum(sizes)[:-1])
    matrices = iter(coder.decode(shapes, parts[0], codes))
    state = {}
    for entry, part in zip(entries, parts[1:]):
        if entry.is_coded:
            delta = torch.from_numpy(part).view(torch.bfloat16).float()
            w = (torch.from_numpy(next(matrices)) - 128.0).mul_(delta[:, None])
        else:
            w = torch.from_numpy(part).view(torch.float16).float()
        require_valid(bool(w.isfinite().all()), f"NaN or infinity in {entry.name}")
        state[entry.name] = w.view(entry.shape)
    return state


# Fitting to the budget


class Packed(NamedTuple):
    """What `compress` returns: a container, and facts for the log."""

    container: Container
    coarsen: float  # the factor of the natural step sizes; below 1: finer
    error_before: float  # the coded weights' relative error at the natural step sizes, as drafted
    bits_per_parameter: float
    bytes_by_rans: int  # of the container, if rANS coded the same codes


def compress(
    state: dict[str, Tensor],
    hp,
    curvature: dict[str, Curvature],
    budget: int,
    progress: Callable | None = None,
) -> Packed:
    """Pack a state dict into at most `budget` bytes, with the coder that CODER names and the
    quantiser that QUANTIZER names (RowQuantizer, if there is no curvature). `progress(n, size)` is
    called after the n-th packing. UserError: even codes of -1, 0 and 1 take too many bytes, or a
    weight is NaN, infinite or huge."""
    quantizer = QUANTIZERS[hp.quantizer if curvature else "rows"](state, hp, curvature)
    return fit(state, hp, quantizer, budget, progress)


def fit(
    state: dict[str, Tensor], hp, quantizer, budget: int, progress: Callable | None = None
) -> Packed:
    """As `compress`, with a given quantiser. One factor multiplies all natural step sizes. It is
    above 1 if the file would else be too large. With FILL_BUDGET it may fall below 1, until codes
    have 8 bits, to use the bytes that are left. It is found by packing again and again: first with
    the quantiser's quicker draft and rANS, then, starting at the factor found so, with the
    quantiser and the coder themselves."""
    natural = 2 ** (hp.quant_bits - 1) - 1
    finest = (natural + 1) / (2 * (LARGEST_CODE + 1)) if hp.fill_budget else 1.0
    *_, before = quantize_state(state, hp, 1.0, quantizer.draft)
    coarsen = finest
    packings = 0

    def pack_at(coarsen: float, quantize: Callable, coder: str) -> Container:
        nonlocal packings
        container = pack(state, replace(hp, coder=coder), coarsen, quantize)
        packings += 1
        if progress:
            progress(packings, len(container.blob))
        return container

    limits = finest, quantizer.coarsest
    draft, final = (quantizer.draft, "rans"), (quantizer.quantize, hp.coder)
    if draft != final:
        search = partial(pack_at, quantize=quantizer.draft, coder="rans")
        of_rans = int(budget * CODERS[hp.coder].share_of_rans)
        _, coarsen = largest_that_fits(search, of_rans, limits, coarsen, 100)
    search = partial(pack_at, quantize=quantizer.quantize, coder=hp.coder)
    most = 100 if draft == final else CODERS[hp.coder].most_packings
    best, coarsen = largest_that_fits(search, budget, limits, coarsen, most)
    require(
        best is not None,
        f"the artifact takes over {budget} bytes even with codes of -1, 0 and 1: lower NUM_LAYERS, "
        "MODEL_DIM, MLP_MULT, VOCAB_SIZE or BIGRAM_VOCAB_SIZE",
    )
    count = max(1, sum(tensor.numel() for tensor in state.values()))
    by_rans = best if hp.coder == "rans" else pack_at(coarsen, quantizer.quantize, "rans")
    bits_per_parameter = 8 * len(best.blob) / count
    return Packed(best, coarsen, before, bits_per_parameter, len(by_rans.blob))


def largest_that_fits(
    pack_at: Callable, budget: int, limits: tuple[float, float], coarsen: float, most: int
) -> tuple[Container | None, float]:
    """(a container that fits, its factor of the step sizes); None in its place if none fits. The
    search ends with the first container at most TOLERANCE bytes below `budget`, or with the last
    one that fits once there were `most` packings. `pack_at(coarsen)` packs. The search begins at
    `coarsen`, stays between the `limits`, and assumes that doubling the step sizes saves a bit per
    weight."""
    best = None
    low, high = limits
    packings = 0
    aim = AIM
    while high / low > 1 + 1e-7:
        if best is not None and (len(best.blob) > budget - TOLERANCE or packings >= most):
            break
        packings += 1
        container = pack_at(coarsen)
        excess = len(container.blob) - budget
        bits_over = (excess + aim) * 8 / container.num_coded  # of each weight
        if excess > 0:
            low = coarsen
            aim *= 2  # sizes move in jumps, as step sizes are bfloat16: aim lower
        else:
            high = coarsen
            aim = AIM
            best = container
        guess = coarsen * 2 ** min(bits_over, 8)
        coarsen = guess if low < guess < high else math.sqrt(low * high)
    return best, high


# --- 11. Scoring --------------------------------
# Target t is token t + 1, predicted from the tokens up to t. The stream is read in overlapping
# windows, so that targets have a long context. Each target is scored once, by the first window that
# contains it. The windows are divided among the ranks; rank 0 gets, in the order of the stream, the
# nll of each target and the entropy of the predicted distribution.

SEGMENT_BATCHES = 32  # at most so many batches before scores are summed over the ranks
HEAD_LOGITS = 2**26  # at most so many logits are in memory at once


class Scorer(NamedTuple):
    """What scoring needs of a model."""

    model: GPT
    passes: tuple[int, ...]  # the order in which its blocks run
    trunk: Callable | None = None  # model.hidden compiled; None: use it as it is
    most_batches: int = 0  # in one segment of the scores; 0: SEGMENT_BATCHES


def windows(begin: int, end: int, length: int, stride: int) -> ndarray:
    """An array (3, number of windows), whose rows are the start of each window, its first scored
    target, and the end of its scored targets. Together the windows score each target of [begin,
    end) once, in order. A window reads the tokens [start, start + length). If `begin` is 0, the
    first window scores all its targets. Every other one scores `stride` targets, the final one what
    remains: it ends at `end`."""
    first_end = begin + stride if begin else length
    ends = np.minimum(np.arange(first_end, end + stride, stride), end)  # the last is cut to `end`
    starts = np.maximum(ends - length, 0)
    firsts = np.append(begin, ends[:-1])
    return np.stack((starts, firsts, ends))


def window_targets(spans: ndarray, length: int) -> tuple[ndarray, ndarray]:
    """Two arrays (B, length): the positions in the stream of all targets of each window, and
    whether the window scores them."""
    starts, firsts, ends = spans[:, :, None]
    positions = starts + np.arange(length)
    return positions, (positions >= firsts) & (positions < ends)


@torch.inference_mode()
def score(
    scorer: Scorer, tokens: ndarray, stride: int, ranks, part: tuple[int, int] | None = None
) -> Iterator[ndarray]:
    """Scores the targets [begin, end) = `part`, by default all. Yields consecutive segments of
    them, each an array (2, N) float32 of nll and entropy in nats; on ranks other than 0, N is 0.
    Segments double in size up to a limit, so that the first come early. Every target after the
    first window has at least EVAL_SEQ_LEN - stride tokens of context. Collective: to the last
    segment."""
    hp = scorer.model.hp
    begin, end = part or (0, len(tokens) - 1)
    length = min(hp.eval_seq_len, end)
    spans = windows(begin, end, length, stride)
    count = spans.shape[1]
    batch = rank_batch(length, hp, ranks)
    done = 0
    segment_batches = 1
    while done < count:
        # Each rank writes the scores of its windows and leaves 0 elsewhere: the sum is complete.
        until = min(done + segment_batches * batch * ranks.world_size, count)
        segment = spans[:, done:until]
        segment_begin, segment_end = segment[1, 0], segment[2, -1]
        scores_2N = torch.zeros(2, segment_end - segment_begin, device=ranks.device)
        own = np.array_split(segment, ranks.world_size, axis=1)[ranks.rank]
        for i in range(0, own.shape[1], batch):
            some = own[:, i : i + batch]
            if count > batch:
                some = repeat_last_window(some, batch)  # equal shapes are compiled once
            for positions, chunk_scores in score_windows(scorer, tokens, some, length, stride):
                scores_2N[:, positions - segment_begin] = chunk_scores

        yield on_rank0(scores_2N, ranks)
        done = until
        segment_batches = min(2 * segment_batches, scorer.most_batches or SEGMENT_BATCHES)


def on_rank0(scores_2N: Tensor, ranks) -> ndarray:
    """The sum of `scores_2N` over the ranks on rank 0, an empty array on the others. Collective."""
    scores_2N = ranks.sum_over_ranks(scores_2N)
    if ranks.rank:
        scores_2N = scores_2N[:, :0]
    return scores_2N.cpu().numpy().copy()  # an empty view would keep the segment in memory


def rank_batch(length: int, hp, ranks) -> int:
    """How many windows of this length one rank scores at a time."""
    return max(1, hp.val_batch_size // (length * ranks.world_size))


def repeat_last_window(spans: ndarray, count: int) -> ndarray:
    """`spans` filled up to `count` windows; the added ones repeat the last, but score no
    targets."""
    missing = count - spans.shape[1]
    padded = np.pad(spans, ((0, 0), (0, missing)), "edge")
    padded[1, spans.shape[1] :] = padded[2, -1]  # first = end
    return padded


def score_windows(
    scorer: Scorer, tokens: ndarray, spans: ndarray, length: int, stride: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, in chunks and on the device, the positions (n,) of the targets that these windows
    score, and their nll and entropy (2, n). The last block computes queries for no more than the
    last `stride` positions, where that is enough; the output head runs on scored positions only."""
    model, passes, trunk, _ = scorer
    device = model.embed.weight.device
    starts, firsts, _ = spans
    tail = (starts + length - firsts).max()  # from the first scored target to the window's end
    last = min(stride, length) if tail <= stride else length
    if trunk is None or last == length:
        # Where windows overlap, few are scored whole: to compile for them would take too long.
        trunk = model.hidden

    positions, scored = window_targets(spans, length)
    ids_BT = torch.from_numpy(tokens[positions].astype(np.int64)).to(device)
    hidden_ND = trunk(ids_BT, passes, last=last).flatten(0, 1)
    scored = scored[:, -last:]
    scored_positions = positions[:, -last:][scored]
    target_ids = torch.from_numpy(tokens[scored_positions + 1].astype(np.int64)).to(device)
    rows = torch.from_numpy(np.flatnonzero(scored)).to(device)  # of hidden_ND
    scored_positions = torch.from_numpy(scored_positions).to(device)
    size = max(1, HEAD_LOGITS // model.hp.vocab_size)
    chunks = zip(rows.split(size), scored_positions.split(size), target_ids.split(size))
    for some_rows, some_positions, some_ids in chunks:
        yield some_positions, model.scores(hidden_ND[some_rows], some_ids)


def validation_scores(scorer: Scorer, validation: Validation, ranks, log) -> ndarray:
    """(2, N) float32: nll and entropy in nats of each target of the validation stream, scored in
    windows that do not overlap, except the final one. On ranks other than 0, N is 0. Collective.
    UserError: a score is not finite."""
    stride = scorer.model.hp.eval_seq_len
    progress = Progress(log, "validation", validation.num_targets)
    scores_2N = np.empty((2, 0 if ranks.rank else validation.num_targets), np.float32)
    done = 0
    for segment in score(scorer, validation.tokens, stride, ranks):
        end = done + segment.shape[1]
        scores_2N[:, done:end] = segment
        done = end
        progress(done)
    bad = np.count_nonzero(~np.isfinite(scores_2N[0]))
    problem = f"{bad} of {done} scores are not finite: training diverged"
    require(not bad, f"{problem}; lower the learning rates, and train again")
    return scores_2N


def validate(scorer: Scorer, validation: Validation, ranks, log) -> tuple[float, float]:
    """Scores the validation stream as `validation_scores` does. Returns (nats per target, bits per
    byte) on rank 0, and zeros on the others. Collective."""
    nll, _ = validation_scores(scorer, validation, ranks, log)
    if ranks.rank:
        return 0.0, 0.0
    return float(nll.mean(dtype=float)), bits_per_byte(nll, validation.target_bytes)


# --- 12. Test-time training ---------------------
# Score first, then learn. There are two ways; a run uses one of them or none:
# - TTT_EPOCHS (PR #825): a chunk of the stream is scored with a moving average of the weights. Only
#   then are the weights trained on it, which can help later chunks.
# - TTT_LORA_RANK (the challenge's records since 2026-03-17_LoRA_TTT): each document has low-rank
#   adapters of its own. A few of its tokens are scored, then the adapters take a step on them.
#   Documents know nothing of each other. Long ones are cut into pieces, each with new adapters.
#   Pieces are computed side by side, and AdamW enlarges rounding errors: to decode exactly, read
#   one piece at a time (TTT_BATCH_SIZE=1).

TTT_BATCH = 32  # most sequences per step, over all ranks


def ttt_scale(done: float) -> float:
    """What TTT_LR is multiplied by, where the share `done` of the stream came before the chunk. It
    is half a cosine, from 1 to 0, times a ramp, which rises from 1 to 3 over the first 30 % of the
    stream and then stays."""
    rise = 1 + 2 * min(1.0, done / 0.3)
    return rise * (1 + math.cos(math.pi * done)) / 2


def ttt_batches(
    validation: Validation, begin: int, end: int, length: int, ranks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields this rank's part of each training batch: (ids, target ids, shares), (B, T) each. The
    batches hold the targets [begin, end), each once. A target's share in the loss is its bytes over
    those of the whole batch. Windows may overlap in their context, whose share is 0."""
    length = min(length, end)  # a window may reach back before `begin`, but not before the stream
    spans = windows(begin, end, length, length)
    steps = math.ceil(spans.shape[1] / TTT_BATCH)
    for some in np.array_split(spans, steps, axis=1):
        missing = -some.shape[1] % ranks.world_size  # to a number that the ranks divide
        padded = repeat_last_window(some, some.shape[1] + missing)
        positions, scored = window_targets(padded, length)
        counted_bytes = validation.target_bytes[positions] * scored
        shares = (counted_bytes / max(counted_bytes.sum(), 1)).astype(np.float32)
        ids = validation.tokens[positions].astype(np.int64)
        target_ids = validation.tokens[positions + 1].astype(np.int64)
        own = (np.split(x, ranks.world_size)[ranks.rank] for x in (ids, target_ids, shares))
        yield tuple(torch.from_numpy(x).to(ranks.device) for x in own)


def ttt_parameters(model) -> list[nn.Parameter]:
    """The parameters to train, by the column `at_test` of PARAMETERS [4]. Sets requires_grad of
    every parameter accordingly."""
    hp = model.hp
    first = max(0, hp.num_layers - hp.ttt_blocks)
    last_blocks = tuple(f"blocks.{i}." for i in range(first, hp.num_layers))
    tuned = []
    for name, p in model.named_parameters():
        rule = parameter_row(name).at_test
        learns = {
            "always": True,
            "never": False,
            "if it is the head": hp.tie_embeddings,
            "in last blocks": name.startswith(last_blocks),
        }[rule]
        p.requires_grad_(learns)
        if learns:
            tuned.append(p)
    return tuned


def score_and_learn(
    scorer: Scorer, loss: Callable, validation: Validation, stride: int, ranks, log
) -> Iterator[ndarray]:
    """Yields (2, N) arrays as `score` does, one per chunk. A chunk is scored by the moving average
    of the weights. The weights are trained on it only when the next array is asked for. `loss`:
    `training_loss`, compiled or not. When all is scored, or the generator is closed, the initial
    weights are back. Collective."""
    hp, num_targets = scorer.model.hp, validation.num_targets
    tuned = ttt_parameters(scorer.model)
    live = [p.data for p in tuned]  # the model's own: the average to score, the learner to train
    initial, learner, average = ([p.clone() for p in live] for _ in range(3))
    optimizer = torch.optim.AdamW(tuned, betas=(hp.beta1, hp.beta2), weight_decay=0.0, fused=True)
    try:
        for begin in range(0, num_targets, hp.ttt_chunk_tokens):
            end = min(begin + hp.ttt_chunk_tokens, num_targets)
            segments = score(scorer, validation.tokens, stride, ranks, (begin, end))
            yield np.concatenate(list(segments), 1)
            if end == num_targets:
                moved = sum((a - b).square().sum() for a, b in zip(learner, initial)).sqrt()
                log(f"ttt:score_first epochs:{hp.ttt_epochs} moved:{moved:.4f}")
                return

            torch._foreach_copy_(live, learner)
            optimizer.param_groups[0]["lr"] = hp.ttt_lr * ttt_scale(begin / num_targets)
            for _ in range(hp.ttt_epochs):
                for ids, target_ids, shares in ttt_batches(
                    validation, begin, end, hp.eval_seq_len, ranks
                ):
                    loss(scorer.model, ids, target_ids, scorer.passes, shares_BT=shares).backward()
                    ttt_step(optimizer, tuned, ranks)
                    torch._foreach_lerp_(average, live, 1 - hp.ttt_decay)
            torch._foreach_copy_(learner, live)
            torch._foreach_copy_(live, average)
    finally:
        torch._foreach_copy_(live, initial)


def ttt_step(optimizer, tuned: list[nn.Parameter], ranks) -> None:
    """Sum the gradients over the ranks, scale the sum down to a norm of at most 1, and take a step.
    Collective."""
    flat = ranks.sum_over_ranks(nn.utils.parameters_to_vector(p.grad for p in tuned))
    flat *= (1 / (flat.norm() + 1e-6)).clamp_max(1)
    nn.utils.vector_to_parameters(flat, [p.grad for p in tuned])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


ADAPTED = ("attn.k", "attn.proj", "mlp.fc", "mlp.proj")  # of each block; the output head as well
PIECE_WINDOWS = 4  # a document is scored in pieces of at most so many windows
FIRST_SEGMENT, LARGEST_SEGMENT = 1024, 4096  # targets, per document that is read side by side


class Adapters:
    """Low-rank changes of a model's matrices: W + (TTT_LORA_ALPHA / TTT_LORA_RANK) B A (LoRA, arXiv
    2106.09685). Every row of a batch has its own A and B. All rows begin with the same A, drawn
    with SEED, and with B = 0, which changes nothing."""

    def __init__(self, model: GPT, rows: int):
        hp, rank = model.hp, model.hp.ttt_lora_rank
        device = model.embed.weight.device
        self.model = model
        self.scale = hp.ttt_lora_alpha / rank
        self.linears = {n: m for n, m in model.named_modules() if n.endswith(ADAPTED)}
        head = model.embed if model.head is None else model.head
        drawn = torch.Generator().manual_seed(hp.seed)
        self.a, self.b = {}, {}  # by name: (rows, inputs, rank) and (rows, rank, outputs)
        for name, module in {**self.linears, "head": head}.items():
            outputs, inputs = module.weight.shape
            a = torch.empty(inputs, rank).uniform_(-1, 1, generator=drawn) * (3 / inputs) ** 0.5
            a = a.to(device).expand(rows, -1, -1).contiguous()
            b = torch.zeros(rows, rank, outputs, device=device)
            self.a[name], self.b[name] = a.requires_grad_(), b.requires_grad_()
        self.optimizer = torch.optim.AdamW(
            [*self.a.values(), *self.b.values()],
            hp.ttt_lora_lr,
            betas=(0.0, 0.99),
            weight_decay=0.0,
            fused=True,
        )

    def change(self, name: str, x_BTI: Tensor) -> Tensor:
        """What the adapters of the first B rows add to the output of a matrix with the input x."""
        a, b = (of[name][: len(x_BTI)].to(x_BTI.dtype) for of in (self.a, self.b))
        return self.scale * (x_BTI @ a) @ b

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside this context the model computes with the adapters, except for its output head: see
        `logits`."""

        def hook(name: str) -> Callable:
            def add(linear, inputs, output):
                x, *factor = inputs  # the factor scales the outputs: see Linear
                change = self.change(name, x)
                return output + (change * factor[0].squeeze(-1).to(x.dtype) if factor else change)

            return add

        handles = [m.register_forward_hook(hook(n)) for n, m in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The model's logits with the adapters of its output head, (B, T, V), before the
        softcap."""
        return self.model.logits(hidden_BTD) + self.change("head", norm(hidden_BTD))

    def learn(self, loss: Tensor) -> None:
        """Take one step."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def document_pieces(tokens: ndarray, hp) -> ndarray:
    """An array (3, number of pieces) that divides all targets: the first token that a piece reads,
    its first scored target and the end of its targets. No piece reads beyond its document, which
    begins with BOS. One that begins inside a document also reads the window before: its adapters
    learn there before they score."""
    longest = PIECE_WINDOWS * hp.eval_seq_len
    num_targets = len(tokens) - 1
    documents = np.union1d([0], np.flatnonzero(tokens[:-1] == BOS))  # where they start
    pieces = []
    for document, end in zip(documents, np.append(documents[1:], num_targets)):
        for first in range(document, end, longest):
            start = max(document, first - hp.eval_seq_len)
            pieces.append((start, first, min(first + longest, end)))
    return np.array(pieces).T


def windows_in_pieces(pieces: ndarray, hp) -> float:
    """How many whole windows hold as many tokens as the model reads when it scores the pieces chunk
    by chunk."""
    starts, _, ends = pieces
    chunks = -(-(ends - starts) // hp.ttt_chunk_size)  # of each piece, rounded up
    lengths = np.minimum(np.arange(1, chunks.max() + 1) * hp.ttt_chunk_size, hp.eval_seq_len)
    return lengths.cumsum()[chunks - 1].sum() / hp.eval_seq_len


def first_segment(hp, ranks) -> int:
    """The most targets in the first segment of `score_documents`."""
    side_by_side = ranks.world_size * hp.ttt_batch_size
    return max(FIRST_SEGMENT * side_by_side, PIECE_WINDOWS * hp.eval_seq_len)


def score_documents(scorer: Scorer, tokens: ndarray, ranks) -> Iterator[ndarray]:
    """Yields (2, N) arrays as `score` does, and in the same order: nll and entropy of each target
    by a model that knows the target's document alone and has learned from earlier chunks of the
    same piece. A segment consists of whole pieces. They are divided among the ranks, and those of
    similar length are read side by side. Collective."""
    hp = scorer.model.hp
    pieces = document_pieces(tokens, hp)
    size = first_segment(hp, ranks)
    largest = LARGEST_SEGMENT // FIRST_SEGMENT * size
    done = 0
    while done < pieces.shape[1]:
        begin = pieces[1, done]
        until = np.searchsorted(pieces[2], begin + size, "right")  # pieces that end by then
        segment = pieces[:, done:until]
        scores_2N = torch.zeros(2, segment[2, -1] - begin, device=ranks.device)
        perm = np.argsort(segment[0] - segment[2], kind="stable")  # the longest first
        own = segment[:, perm[ranks.rank :: ranks.world_size]]
        for i in range(0, own.shape[1], hp.ttt_batch_size):
            some = own[:, i : i + hp.ttt_batch_size]
            for positions, chunk_scores in score_pieces(scorer, tokens, some):
                scores_2N[:, positions - begin] = chunk_scores
        yield on_rank0(scores_2N, ranks)
        done = until
        size = min(2 * size, largest)


def score_pieces(
    scorer: Scorer, tokens: ndarray, pieces: ndarray
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, chunk after chunk, the positions (n,) of the targets that these pieces score, and
    their nll and entropy (2, n). The pieces, the longest first, are read side by side. When a chunk
    was yielded, the adapters of each piece take a step on the mean nll of its targets there. All
    chunks have TTT_CHUNK_SIZE tokens; what follows the end of a piece fills its last one up, so
    that a window does not depend on which pieces are read together."""
    model, hp = scorer.model, scorer.model.hp
    device = model.embed.weight.device
    starts, firsts, ends = pieces
    sizes = ends - starts
    chunk = hp.ttt_chunk_size
    filled = math.ceil(sizes[0] / chunk) * chunk
    positions_BN = starts[:, None] + np.arange(filled + 1)
    ids = tokens[np.minimum(positions_BN, len(tokens) - 1)].astype(np.int64)
    ids_BN = torch.from_numpy(ids).to(device)
    adapters = Adapters(model, len(sizes))
    model.requires_grad_(False)  # only adapters learn; nothing that comes later trains the model
    for begin in range(0, filled, chunk):
        end = begin + chunk
        rows = np.count_nonzero(sizes > begin)  # pieces that have not ended
        positions = positions_BN[:rows, begin:end]
        is_target = positions < ends[:rows, None]
        scored = is_target & (positions >= firsts[:rows, None])
        window = ids_BN[:rows, max(0, end - hp.eval_seq_len) : end]
        learns = hp.ttt_lora_lr > 0 and end < filled
        with adapters.attached(), torch.set_grad_enabled(learns):
            hidden_BTD = model.hidden(window, scorer.passes, last=chunk)
            logp_BTV = log_probabilities(adapters.logits(hidden_BTD), hp.logit_softcap)
            target_ids = ids_BN[:rows, begin + 1 : end + 1]
            nll_BT = -logp_BTV.gather(2, target_ids[..., None])[..., 0]
            loss = (nll_BT * torch.from_numpy(is_target).to(device)).sum() / chunk
        with torch.no_grad():
            entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
            places = torch.from_numpy(np.flatnonzero(scored)).to(device)
            scores = torch.stack((nll_BT, entropy_BT)).flatten(1)[:, places]
        yield torch.from_numpy(positions[scored]).to(device), scores
        if learns:
            adapters.learn(loss)


# --- 13. Mixture --------------------------------
# The model's probabilities are mixed with frequencies of what came before in the stream. Each mixed
# distribution depends on earlier tokens alone and sums to 1 over the vocabulary. So the score is
# the length of a code: a decoder could compute the same distributions.
#
# Counts are exact, by sorting. Positions are grouped by the n - 1 tokens before them, and keep the
# order of the stream within a group. In a group, a position's rank among those with the same token
# is the count of its n-gram so far. Sorting each group by these tokens gives the groups for n + 1.
# All of it happens while the GPUs score.

# Bytes of memory per token of the stream that counting takes at its peak, with 7-grams (measured at
# 62M tokens); one more or less for n-grams that are longer or shorter by one; and for the scores.
COUNTING_BYTES, BYTES_PER_ORDER, SCORE_BYTES = 47, 4, 16
CHUNK = 1 << 18  # positions sorted at a time: they fit into the CPU's cache
# The online rule has a set of mixing weights for each bucket of targets, which is made of:
BUCKETS = (
    6,  # the model's entropy, in whole nats
    4,  # how often the context came before in the document: never, once, 2 or 3 times, more
    3,  # how far back it last came: less than FAR tokens, less than FARTHER, more
    4,  # the share of its followers that had followed it before, in quarters
    8,  # how often it came, as floor(log2)
)
STATES = math.prod(BUCKETS[2:])  # the last three are one number, the context's state
FAR, FARTHER = 512, 2048  # at 2048 tokens, its default, a scoring window no longer reaches back
OFTEN = 255  # the largest count kept within a document: "255 or more, the exact count is unknown"
# What to add to a context's state to get its bucket, by how often the context came in its document.
# (1 less than STATES times 0 ... 3, as states are counted from 1.)
DOC_OFFSET = STATES * np.repeat((0, 1, 2, 3), (1, 1, 2, OFTEN - 3)) - 1
LARGEST_SURPRISE = 40.0  # nats; what costs more counts as this, whose cube fits into a uint16
PRIOR_STRENGTH = 60  # pseudo-observations that the weights of the coarser buckets are worth
ALPHA_CENTERS = {  # entropy in nats at which alpha is midway between its limits, for n = 2 ... 7
    "entropy": np.full(6, 4.0),  # PR #889, #806
    "order": np.array((4.5, 4.2, 3.8, 3.5, 3.2, 3.0)),  # PR #825
}


# Exact counts


def since_start(values: ndarray, first: ndarray) -> ndarray:
    """`values` minus the value at the start of their run. A run is a number of consecutive entries,
    and `first` marks the first of each."""
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=len(first))
    return values - np.repeat(values[starts], lengths)


def sum_before(values: ndarray, first: ndarray) -> ndarray:
    """For each value, the sum of the earlier values of its run."""
    return since_start(np.cumsum(values) - values, first)


def sort_runs(keys: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """(perm, first, earlier): `perm` sorts the positions by key, equal keys in stream order;
    `first` marks, in that order, where a new key begins; earlier[t] is how many positions before t
    hold the same key. Key and position are packed into one 64-bit number, so that an ordinary sort
    keeps the order of the stream."""
    index = np.arange(len(keys), dtype=np.uint32)
    bits = np.uint64(len(keys).bit_length())
    packed = keys.astype(np.uint64) << bits | index
    packed.sort()
    position_mask = ~(~np.uint64(0) << bits)
    perm = (packed & position_mask).view(np.int64)
    np.right_shift(packed, bits, out=packed)  # leaves the keys

    first = np.append(True, packed[1:] != packed[:-1])[: len(keys)]  # cut, if there are no keys
    earlier = np.empty_like(index)
    earlier[perm] = since_start(index, first)
    return perm, first, earlier


def floor_log2(x: ndarray) -> ndarray:
    """floor(log2(x)), int32, read from the bits of a float32: exact for 1 <= x < 2^24."""
    return (x.astype(np.float32).view(np.int32) >> 23) - 127


def context_states(t: ndarray, first: ndarray, ngram_count: ndarray) -> ndarray:
    """The state of each position's context, from the past alone: 0 if the context is new, else 1 +
    a number made of the last three parts of BUCKETS. `t`: positions grouped by context; `first`
    marks where groups start; `ngram_count`: how many times the position's token had followed the
    context already."""
    seen = since_start(np.arange(len(t), dtype=np.int32), first)  # c(u)
    is_repeat = (ngram_count > 0).astype(np.int32)
    repeats_before = since_start(np.cumsum(is_repeat, dtype=np.int32) - is_repeat, first)
    gap = np.diff(t, prepend=t[:1])  # meaningless where a group starts, but there the state is 0

    divisor = np.maximum(seen, 1)
    count_class = np.minimum(floor_log2(divisor), 7)
    share_class = 4 * repeats_before // divisor  # 0 ... 3, as a context's first follower is new
    distance_class = (gap >= FAR).astype(np.int32) + (gap >= FARTHER)
    return np.where(seen, 1 + (distance_class * 4 + share_class) * 8 + count_class, 0)


def ranks_in_document(document: ndarray, first: ndarray) -> ndarray:
    """For each position of a run, in stream order: how many earlier positions of the run are in the
    same document, uint8, at most OFTEN."""
    first = first.copy()
    first[1:] |= document[1:] != document[:-1]
    ranks = since_start(np.arange(len(first), dtype=np.uint32), first)
    return np.minimum(ranks, OFTEN).astype(np.uint8)


class Counts(NamedTuple):
    """The counts for one n. Entry t is about the n-gram that ends at position t: the context u, n -
    1 tokens, then the token v."""

    ngram_count: ndarray  # c(u, v): how many earlier positions end the same n-gram
    doc_count: ndarray  # how many of them are in the same document, at most OFTEN, uint8
    context_state: ndarray  # of u, uint8, see `context_states`; empty for n = 1


def map_in_threads(threads: int) -> Callable:
    """A function that is called like Python's `map`, and works on `threads` items at a time. 0: one
    for each core, at most 8. (NumPy lets other threads run while it sorts, copies and
    calculates.)"""
    threads = threads or min(8, os.cpu_count() or 1)
    return map if threads == 1 else concurrent.futures.ThreadPoolExecutor(threads).map


def ngram_counts(
    tokens: ndarray, longest: int, describe: bool = True, map_chunks: Callable = map
) -> Iterator[Counts]:
    """Yields the Counts for n = 1 ... `longest`. c(u), how often a context was followed by
    something, is not among them: it is the ngram_count of n - 1, one position earlier. Without
    `describe`, only ngram_count is made. `map_chunks`: `map`, or what `map_in_threads` returns,
    which is faster and gives the same counts."""
    stream = tokens
    if describe:
        stream = document_numbers(tokens).astype(np.uint64)
        stream <<= np.uint64(16)  # in place: 62M tokens are 0.5 GB
        stream |= tokens

    counts = empty_counts(len(tokens), describe)._replace(context_state=np.zeros(0, np.uint8))
    t, first = count_tokens(tokens, stream, counts, map_chunks)
    yield counts._replace(ngram_count=narrowed(counts.ngram_count))

    # t holds positions, grouped by the n - 1 tokens before them; `first` marks where groups start.
    for _ in range(2, longest + 1):
        counts = empty_counts(len(tokens), describe)
        kept = count_and_regroup(stream, t, first, counts, map_chunks)
        t = t[:kept].copy()
        first = first[:kept].copy()
        done = counts._replace(ngram_count=narrowed(counts.ngram_count))
        del counts  # 62M tokens: 0.4 GB, which the next n needs
        yield done


def empty_counts(num_tokens: int, describe: bool) -> Counts:
    """Counts that are all 0, to be filled in. Without `describe` all but ngram_count are empty."""
    described = np.zeros((2, num_tokens if describe else 0), np.uint8)
    return Counts(np.zeros(num_tokens, np.uint32), *described)


def count_tokens(
    tokens: ndarray, stream: ndarray, counts: Counts, map_chunks: Callable
) -> tuple[ndarray, ndarray]:
    """Fill in `counts` for n = 1. Returns the groups for n = 2: t and `first`, as in
    `ngram_counts`. `stream`: see `count_groups`."""
    perm = np.argsort(tokens, kind="stable").astype(np.uint32)  # a radix sort, as these are 16 bits
    by_token = tokens[perm]
    first = np.append(True, by_token[1:] != by_token[:-1])
    del by_token
    for _ in map_chunks(partial(count_runs, stream, perm, first, counts), chunks_of_groups(first)):
        pass
    # The last position of the stream has no next one to enter; as it is the last of its group, no
    # group loses its start.
    is_followed = perm < len(tokens) - 1
    return perm[is_followed] + np.uint32(1), first[is_followed]


def count_and_regroup(
    stream: ndarray, t: ndarray, first: ndarray, counts: Counts, map_chunks: Callable
) -> int:
    """Fill in `counts` for one n from its groups, t and `first`. The groups for n + 1 are written
    over the beginning of both arrays; returns how many positions they have."""
    kept = 0
    count_chunk = partial(count_groups, stream, t, first, counts)
    # The chunks come in their order and each gives at most as many positions as it has, so that no
    # chunk is written over before it was read.
    for next_t, next_first in map_chunks(count_chunk, chunks_of_groups(first)):
        end = kept + len(next_t)
        t[kept:end] = next_t
        first[kept:end] = next_first
        kept = end
    return kept


def count_runs(
    stream: ndarray, perm: ndarray, first: ndarray, counts: Counts, chunk: tuple[int, int]
) -> None:
    """Fill in `counts` for n = 1 at the positions perm[start:stop] of a chunk. `perm` sorts the
    positions by token; `first` marks, in that order, where a new token begins."""
    place = perm[slice(*chunk)]
    begins = first[slice(*chunk)]
    counts.ngram_count[place] = since_start(np.arange(len(place), dtype=np.uint32), begins)
    if len(counts.doc_count):
        counts.doc_count[place] = ranks_in_document(stream[place] >> 16, begins)


def count_groups(
    stream: ndarray, t: ndarray, first: ndarray, counts: Counts, chunk: tuple[int, int]
) -> tuple[ndarray, ndarray]:
    """Fill in `counts` at the positions t[start:stop] of a chunk of groups. Returns these positions
    and their `first` for n + 1, without n-grams that come once. `stream`: document and token of
    each position, or without descriptions its token; `t` and `first` as in `ngram_counts`."""
    place = t[slice(*chunk)]
    begins = first[slice(*chunk)]
    document_and_token = stream[place]
    group = np.cumsum(begins, dtype=np.uint64)
    keys = group << np.uint64(16) | (document_and_token & 0xFFFF)
    by_token, next_begins, count = sort_runs(keys)  # the 1st and 2nd: of the sorted order
    counts.ngram_count[place] = count
    sorted_place = place[by_token]
    if len(counts.doc_count):
        by_document = document_and_token[by_token] >> 16
        counts.doc_count[sorted_place] = ranks_in_document(by_document, next_begins)
        counts.context_state[place] = context_states(place, begins, count)

    following = sorted_place + 1
    # an n-gram that comes once is dropped: with any longer context its counts are 0
    is_alone = next_begins & np.append(next_begins[1:], True)
    keep = ~is_alone & (following < len(stream))
    return following[keep], next_begins[keep]


def narrowed(count: ndarray) -> ndarray:
    """`count` in the narrowest unsigned type that holds it."""
    return count.astype(np.min_scalar_type(count.max()), copy=False)


def chunks_of_groups(first: ndarray) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of chunks that end where a group ends, of at least CHUNK positions but
    for the last."""
    stop = 0
    while stop < len(first):
        start = stop
        rest = first[start + CHUNK :]
        stop = start + CHUNK + int(rest.argmax()) if rest.any() else len(first)  # next True
        yield start, stop


def document_numbers(tokens: ndarray) -> ndarray:
    """How many BOS lie strictly before each position, uint32: so a BOS still belongs to the
    document before it."""
    closes = tokens == BOS
    return np.cumsum(closes, dtype=np.uint32) - closes


def document_start(tokens: ndarray, target: int) -> int:
    """The position of the first token of the document that the target belongs to."""
    closes = np.flatnonzero(tokens[: target + 1] == BOS)
    return closes[-1] + 1 if len(closes) else 0


def earlier_continuations(
    tokens: ndarray, target: int, lengths: range
) -> Iterator[tuple[int, ndarray]]:
    """Yields (n, positions) for each n >= 2 of `lengths`: the positions of all earlier tokens that
    have the target's context, the same n - 1 tokens, before them; nothing, where there are none. It
    looks at every position: slow, but a check on `ngram_counts`."""
    t = target + 1
    places = np.flatnonzero(tokens[: t - 1] == tokens[t - 1]) + 1
    for n in range(2, min(lengths.stop, t + 2)):
        places = places[places >= n - 1]
        places = places[tokens[places - n + 1] == tokens[t - n + 1]]
        if n in lengths and len(places):
            yield n, places


# Mixing rules: how the model's p and the counts become one probability. `mix` takes a block of
# targets. `distribution` gives the probability of every token at one target of the most recent
# block, from counts made anew, by the same formula. `evidence` is the counts, which a prefix of the
# stream must reproduce.


class Backoff:
    """p = (1 - alpha) * model + alpha * c(u, v) / c(u), for the longest n whose context u came at
    least NGRAM_MIN_COUNT times before; the choice never looks at the target. alpha rises with the
    model's entropy from ALPHA_MIN to ALPHA_MAX (PR #889, #825, #806)."""

    def __init__(self, tokens: ndarray, hp):
        self.tokens = tokens
        self.hp = hp
        self.lengths = range(hp.ngram_min_order, hp.ngram_order + 1)
        num_targets = len(tokens) - 1
        self.n = np.zeros(num_targets, np.uint8)  # the n that is used; 0: none
        self.context_count = np.zeros(num_targets, np.uint32)  # its c(u)
        self.ngram_count = np.zeros(num_targets, np.uint32)  # its c(u, v)
        shorter = None  # the counts of n - 1
        # Target i is token i + 1, and its context ends at token i. The first target that has a
        # whole context is n - 2.
        in_threads = map_in_threads(hp.ngram_threads)
        counts = ngram_counts(tokens, hp.ngram_order, describe=False, map_chunks=in_threads)
        for n, (count, *_) in enumerate(counts, start=1):
            if n in self.lengths:
                context_count = shorter[n - 2 : -1]
                qualifies = context_count >= hp.ngram_min_count
                self.n[n - 2 :][qualifies] = n
                self.context_count[n - 2 :][qualifies] = context_count[qualifies]
                self.ngram_count[n - 2 :][qualifies] = count[n - 1 :][qualifies]
            shorter = count

    def blend(self, n, context_count, ngram_count, model, entropy):
        """The formula. For a block, all arguments are arrays along its targets. For every token at
        one target, ngram_count and model are arrays along the vocabulary and the others scalars."""
        centers = ALPHA_CENTERS[self.hp.ngram_alpha]
        center = centers[np.clip(n.astype(int) - 2, 0, len(centers) - 1)]
        rising = 1 / (1 + np.exp(-2 * (entropy.astype(np.float64) - center)))
        span = self.hp.alpha_max - self.hp.alpha_min
        alpha = np.where(n > 0, self.hp.alpha_min + span * rising, 0.0)
        return (1 - alpha) * model + alpha * ngram_count / np.maximum(context_count, 1)

    def mix(self, begin: int, end: int, model: ndarray, entropy: ndarray):
        """(p, n that matched) of the targets [begin, end), from the model's p and entropy."""
        n, context_count, ngram_count = (counts[begin:end] for counts in self.evidence())
        return self.blend(n, context_count, ngram_count, model, entropy), n

    def distribution(self, target: int, model_V: ndarray, entropy):
        """p of every token at `target`, from the model's distribution there."""
        n = self.n[target]
        found = dict(earlier_continuations(self.tokens, target, range(n, n + 1)))
        places = found.get(int(n), np.empty(0, int))
        ngram_count_V = np.bincount(self.tokens[places], minlength=len(model_V))
        return self.blend(n, len(places), ngram_count_V, model_V, entropy)

    def evidence(self) -> list[ndarray]:
        """Arrays along the targets."""
        return [self.n, self.context_count, self.ngram_count]


class DocumentCache:
    """Counts the tokens of the document so far, each weighted by the cube of the nats that it cost
    the model. It predicts v with S(v) / S: the weights of v over those of all tokens. Names and
    terms return in a document more often than the model expects; tokens that it expected tell
    nothing new."""

    def __init__(self, tokens: ndarray):
        self.tokens = tokens
        self.cubes = np.zeros(len(tokens), np.uint16)  # whole numbers: their sums are exact
        self.open_sums = np.zeros(1 << 16)  # S(v) of the document in which the last block ended

    @staticmethod
    def surprise(nats):
        """The weight of a token that cost so many nats."""
        return np.rint(nats * nats * nats)

    def extend(self, begin: int, end: int, model: ndarray) -> tuple[ndarray, ndarray]:
        """(S(v) of the target, S) at each of the targets [begin, end), from earlier targets alone.
        `model`: the model's p of the targets, which counts for later ones."""
        token = self.tokens[begin + 1 : end + 1]
        opens = self.tokens[begin:end] == BOS  # does a document open with this target?
        cubes = self.surprise(np.minimum(-np.log(model), LARGEST_SURPRISE))
        self.cubes[begin + 1 : end + 1] = cubes

        perm = np.argsort(token, kind="stable")
        by_token = token[perm]
        document = np.cumsum(opens)[perm]
        first = (by_token[1:] != by_token[:-1]) | (document[1:] != document[:-1])
        sum_of_token = np.empty(len(token))
        sum_of_token[perm] = sum_before(cubes[perm], np.append(True, first))
        sum_of_all = sum_before(cubes, np.append(True, opens[1:]))

        # The document that was open goes on until the first BOS; the last one stays open.
        starts = np.flatnonzero(opens)
        before = slice(starts[0] if len(starts) else None)
        sum_of_token[before] += self.open_sums[token[before]]
        sum_of_all[before] += self.open_sums.sum()
        if len(starts):
            self.open_sums[:] = 0
        last = slice(starts[-1] if len(starts) else 0, None)
        self.open_sums += np.bincount(token[last], cubes[last], len(self.open_sums))
        return sum_of_token, sum_of_all

    def distribution(self, target: int, V: int) -> tuple[ndarray, float]:
        """(S(v) of every token, S) at `target`, summed anew."""
        past = slice(document_start(self.tokens, target), target + 1)
        sums = np.bincount(self.tokens[past], self.cubes[past], V)
        return sums, sums.sum()


class Link(NamedTuple):
    """A link of the online chain: it mixes the probabilities so far with those of some experts."""

    n: int  # the n of its counts; 1: DocumentCache
    rows: ndarray | slice  # indices of the probabilities that it changes
    bucket: ndarray | int  # which mixing weights to use, one for each row or one for all
    experts: list[ndarray]  # each expert's probabilities, one for each row


class OnlineChain:
    """A chain of mixtures that begins with the model's p. The first link mixes in DocumentCache,

        p_1(v) = w0 * p(v) + w1 * S(v) / S,

    unless S is 0. Each longer n, whose context u of n - 1 tokens came before, mixes in two experts:

        p_n(v) = w0 * p_{n-1}(v) + w1 * c(u, v) / c(u) + w2 * d(u, v) / d(u).

    c counts in the stream, d in the document. Where d(u) is 0 or has reached OFTEN, the third term
    uses c instead. Each bucket of targets has its own mixing weights w, learned from strictly
    earlier blocks by expectation maximisation (EM). The result at each target is the average of the
    last p_n and of the model's p, weighted by their likelihood on all earlier targets (Bayes). Over
    the whole stream that costs at most one bit more than the better of the two."""

    forgetting = 0.97  # forgetting factor per block: credits are multiplied by it

    def __init__(self, tokens: ndarray, hp):
        self.tokens = tokens
        self.lengths = range(hp.ngram_min_order, hp.ngram_order + 1)
        in_threads = map_in_threads(hp.ngram_threads)
        counts = ngram_counts(tokens, hp.ngram_order, map_chunks=in_threads)
        self.counts = dict(enumerate(counts, start=1))
        self.cache = DocumentCache(tokens)
        # For EM: how many earlier targets each expert explained, by n and bucket, old ones fading.
        self.credits = {n: np.zeros((3, *BUCKETS)) for n in self.lengths}
        self.credits[1] = np.zeros((2, BUCKETS[0]))
        self.log_odds = 0.0  # log of the likelihood ratio of chain and model on all earlier targets
        # Of the most recent block:
        self.mix_weights = {}  # (experts, buckets) by n
        self.begin = 0  # its first target
        self.trust = np.empty(0)  # the weight of the chain against the model, for each target

    def mix(self, begin: int, end: int, model: ndarray, entropy: ndarray):
        """(p, longest n that matched) of the targets [begin, end). What it learns from them takes
        effect in the next block."""
        self.mix_weights = {n: bucket_weights(credits) for n, credits in self.credits.items()}
        p = model.copy()
        matched_n = np.zeros(end - begin, np.uint8)
        for link in self.links_of_block(begin, end, model, entropy):
            self.learn(link, self.apply(link, p))
            if link.n > 1:
                matched_n[link.rows] = link.n

        # before each target, and after the last: a target must not judge itself
        log_odds = np.cumsum(np.append(self.log_odds, np.log(p / model)))
        self.log_odds = log_odds[-1]
        self.begin = begin
        self.trust = 1 / (1 + np.exp(-np.clip(log_odds[:-1], -500, 500)))
        return self.average(self.trust, p, model), matched_n

    def distribution(self, target: int, model_V: ndarray, entropy):
        """p of every token at `target`, which must lie in the most recent block."""
        p = model_V.copy()
        for link in self.links_of_target(target, len(model_V), entropy):
            self.apply(link, p)
        return self.average(self.trust[target - self.begin], p, model_V)

    def apply(self, link: Link, p: ndarray) -> list[ndarray]:
        """Mix the experts of a link into p, in place: the formula of the chain, for the targets of
        a block or for every token at one target. Returns what p and each expert contributed."""
        mix_weights = [w[link.bucket] for w in self.mix_weights[link.n]]
        parts = [w * q for w, q in zip(mix_weights, (p[link.rows], *link.experts))]
        p[link.rows] = sum(parts)
        return parts

    def learn(self, link: Link, parts: list[ndarray]) -> None:
        """A step of EM: each target gives a credit of 1, shared among the parts in proportion to
        what they contributed to its p."""
        total = sum(parts)
        self.credits[link.n] *= self.forgetting
        views = self.credits[link.n].reshape(len(parts), -1)
        for credit, part in zip(views, parts):
            credit += np.bincount(link.bucket, part / total, len(credit))

    @staticmethod
    def average(trust, p, model):
        """The final probability: `p` of the chain and the model's, averaged."""
        return trust * p + (1 - trust) * model

    def links_of_block(self, begin: int, end: int, model, entropy) -> Iterator[Link]:
        """Yields the links for the targets [begin, end), with what each expert gives the target."""
        entropy_bucket = self.entropy_bucket(entropy)
        sums, total = self.cache.extend(begin, end, model)
        rows = np.flatnonzero(total)
        yield Link(1, rows, entropy_bucket[rows], [sums[rows] / total[rows]])
        for n in self.lengths:
            # target t is token t + 1; its context ends at token t
            here, shorter = self.counts[n], self.counts[n - 1]
            rows = np.flatnonzero(here.context_state[begin + 1 : end + 1])
            ends, context_ends = rows + begin + 1, rows + begin
            doc_context = shorter.doc_count[context_ends]
            bucket = self.bucket(here.context_state[ends], doc_context, entropy_bucket[rows])
            counted = (here.ngram_count[ends], shorter.ngram_count[context_ends])
            experts = self.frequencies(*counted, here.doc_count[ends], doc_context)
            yield Link(n, rows, bucket, experts)

    def links_of_target(self, target: int, V: int, entropy) -> Iterator[Link]:
        """Yields the same links for one target, with what each expert gives every token. Everything
        except the context's state is counted anew."""
        entropy_bucket = self.entropy_bucket(entropy)
        sums, total = self.cache.distribution(target, V)
        if total:
            yield Link(1, slice(None), entropy_bucket, [sums / total])
        start = document_start(self.tokens, target)
        for n, places in earlier_continuations(self.tokens, target, self.lengths):
            in_document = places[places >= start]
            ngram_V = np.bincount(self.tokens[places], minlength=V)
            doc_ngram_V = np.bincount(self.tokens[in_document], minlength=V)
            doc_context = np.uint8(min(len(in_document), OFTEN))
            state = int(self.counts[n].context_state[target + 1])
            bucket = self.bucket(state, doc_context, entropy_bucket)
            experts = self.frequencies(ngram_V, len(places), doc_ngram_V, doc_context)
            yield Link(n, slice(None), bucket, experts)

    @staticmethod
    def entropy_bucket(entropy):
        """The model's entropy in whole nats, int64."""
        return entropy.clip(0, BUCKETS[0] - 1).astype(np.int64)

    @staticmethod
    def bucket(context_state, doc_context, entropy_bucket):
        """The bucket of a target whose context has this state, and came `doc_context` times in the
        document."""
        return entropy_bucket * (BUCKETS[1] * STATES) + DOC_OFFSET[doc_context] + context_state

    @staticmethod
    def frequencies(ngram_count, context_count, doc_ngram_count, doc_context_count):
        """What the two counting experts give: c(u, v) / c(u) and d(u, v) / d(u)."""
        frequency = ngram_count / context_count
        is_usable = (doc_context_count > 0) & (doc_context_count < OFTEN)
        doc_frequency = doc_ngram_count / np.maximum(doc_context_count, np.uint8(1))
        return [frequency, np.where(is_usable, doc_frequency, frequency)]

    def evidence(self) -> list[ndarray]:
        """Arrays along the positions of the stream."""
        return [array for counts in self.counts.values() for array in counts]


def bucket_weights(credits: ndarray) -> ndarray:
    """(experts, buckets): the posterior mean of the mixing weights, given credits[expert,
    *BUCKETS]. Coarser buckets, which leave out the first parts of BUCKETS, are the Dirichlet prior
    of finer ones. At first the probability so far has the weight 0.98, and the experts share
    0.02."""
    levels = [credits]  # (experts, 6, 4, 3, 4, 8), then without the 6, then without the 4 ...
    while levels[-1].ndim > 1:
        levels.append(levels[-1].sum(1))
    others = len(credits) - 1
    prior = np.array((0.98, *[0.02 / others] * others))
    for level in reversed(levels):
        posterior = (level + PRIOR_STRENGTH * prior) / (level.sum(0) + PRIOR_STRENGTH)
        prior = posterior[:, None]
    return posterior.reshape(len(credits), -1)


RULES = {"online": OnlineChain, "entropy": Backoff, "order": Backoff}


# The mixture


def block_edges(total: int) -> list[int]:
    """The borders of the blocks, from 0 to `total`. Blocks grow with the stream, from 64 targets to
    65,536, whose data fit into the CPU's cache. Mixing weights change from block to block."""
    edges = [0]
    while edges[-1] < total:
        size = min(max(64, edges[-1] // 32), 1 << 16)
        edges.append(min(edges[-1] + size, total))
    return edges


class Mixture:
    """Mixes the scores of a model with counts, block after block, as they arrive; NGRAM_ALPHA names
    the rule. For the audit, the whole distribution is made at some targets."""

    def __init__(self, tokens: ndarray, hp, rule=None):
        """Counts the whole stream `tokens`, uint16 (62 million: 3.4 GB at the peak). `rule`: a rule
        to use instead of the one that NGRAM_ALPHA names."""
        self.tokens = tokens
        self.hp = hp
        self.rule = rule or RULES[hp.ngram_alpha](tokens, hp)
        self.num_targets = len(tokens) - 1
        self.nll = np.empty(self.num_targets)  # nats, mixed
        self.matched_n = np.zeros(self.num_targets, np.uint8)  # longest n known; 0: none
        self.edges = block_edges(self.num_targets)
        self.next_block = 0
        last = max(self.num_targets, 1)
        spread = np.append(np.geomspace(1, last, 16), np.linspace(1, last, 16))
        self.samples = np.unique(spread.astype(np.int64)) - 1  # targets, counted from 0
        self.enumerated = {}  # sampled target -> (what its distribution sums to, p of the target)

    def extend(self, nll: ndarray, entropy: ndarray) -> None:
        """Mix every block that is complete. Each call passes the scores of all targets so far, in
        nats, from the first one on. RuntimeError: a score is not finite."""
        complete = np.searchsorted(self.edges, len(nll), "right")
        for begin, end in pairwise(self.edges[self.next_block : complete]):
            is_finite = np.isfinite(nll[begin:end] + entropy[begin:end]).all()
            problem = f"scores of targets {begin} to {end} are not finite: the model has diverged"
            require(is_finite, problem, RuntimeError)
            model = np.exp(-np.minimum(nll[begin:end].astype(np.float64), 690))
            p, self.matched_n[begin:end] = self.rule.mix(begin, end, model, entropy[begin:end])
            self.nll[begin:end] = -np.log(p)
            self.next_block += 1
            for target in self.samples[(begin <= self.samples) & (self.samples < end)].tolist():
                self.enumerate(target, model[target - begin], entropy[target])

    def enumerate(self, target: int, p_target: float, entropy) -> None:
        """Make the mixed distribution at `target`. Of the model's only the target's p is known
        here: the rest of its mass is spread evenly over the other tokens."""
        V = self.hp.vocab_size
        token = self.tokens[target + 1]
        model_V = np.full(V, (1 - p_target) / (V - 1))
        model_V[token] = p_target
        p_V = self.rule.distribution(target, model_V, entropy)
        self.enumerated[target] = p_V.sum(), p_V[token]

    def audit(self) -> str:
        """Facts for the log. RuntimeError: a sampled distribution does not sum to 1, or gives its
        target another p than was scored, or a prefix of the stream has other counts."""
        faults = []
        for target, (mass, p) in self.enumerated.items():
            with np.errstate(divide="ignore"):
                difference = abs(self.nll[target] + np.log(p))
            if not (abs(mass - 1) <= 1e-9 and difference <= 1e-9):  # also if one is NaN
                scored = f"scored {self.nll[target]} nats"
                faults.append(f"at target {target} p sums to {mass}; {scored}, recounted {p}")
        prefix = self.tokens[: 1 << 14]
        alone = type(self.rule)(prefix, self.hp)
        pairs = zip(alone.evidence(), self.rule.evidence())
        if not all(np.array_equal(some, full[: len(some)]) for some, full in pairs):
            faults.append(f"the first {len(prefix)} tokens have other counts when counted alone")
        require(not faults, f"the mixture is not a valid code: {'; '.join(faults)}", RuntimeError)

        masses = [mass for mass, _ in self.enumerated.values()]
        recounted = sum(self.matched_n[target] > 0 for target in self.enumerated)
        return (
            f"targets:{self.edges[self.next_block]}/{self.num_targets} mass_min:{min(masses):.12f} "
            f"mass_max:{max(masses):.12f} recounted:{recounted} enumerated:{len(masses)} "
            f"prefix:{len(prefix) - 1}"
        )


def mix(tokens: ndarray, nll: ndarray, entropy: ndarray, hp) -> ndarray:
    """The mixed nll, in nats, of every target of the stream `tokens`, float64, from the model's nll
    and entropy. (A run uses Mixture itself, to mix while it scores.)"""
    require(len(nll) == len(tokens) - 1, f"{len(nll)} scores for {len(tokens)} tokens", ValueError)
    mixture = Mixture(tokens, hp)
    mixture.extend(nll, entropy)
    return mixture.nll


# --- 14. The run --------------------------------
# Train -> compress -> write -> read back -> score -> mix -> report. Only this section reads and
# writes the artifact. It also writes everything in the log that comes after training.

FALLBACK_STRIDES = (96, 128, 256, 512, 1024, 2048)  # tried in turn if EVAL_STRIDE takes too long
ROOM_TO_SPARE = 1 << 18  # bytes of a file beside its numbers: names, settings, tables
ENTROPY_EDGES = (0, 0.5, 1, 1.5, 2, 3, 4, 5, math.inf)  # in nats, bins of the calibration table


def run(hp, ranks, log, stop, warnings: list[str]) -> Path | None:
    """A whole run. It starts from initial weights, from a checkpoint or from an artifact, and ends
    with the score. `warnings` go into the log. Returns the checkpoint that it has written, if
    nobody needs it any more. Collective. UserError: data or files are missing, or do not match the
    settings."""
    if hp.resume and Path(hp.resume).is_file():
        log.leaves("checkpoint", f"RESUME={hp.resume} goes on")
    if hp.eval_only:
        log.leaves("artifact", f"EVAL_ONLY={hp.eval_only} scores it again")
    torch.manual_seed(hp.seed)
    loader = None if hp.eval_only else TokenLoader(hp, ranks.rank, ranks.world_size)
    validation = load_validation(hp)
    identity = validation.identity | (loader.identity if loader else {})
    require_same_start(hp, identity, ranks)
    model = GPT(hp).to(ranks.device)
    path = Path(hp.eval_only)  # of the artifact; other ranks than 0 do not need it
    if ranks.rank == 0:
        path = path if hp.eval_only else artifact_path(hp, log)
        require_room(expected_files(path, model, validation.num_targets, log))
        log_header(hp, loader, validation, model, ranks, log)
        warnings = [*warnings, *run_warnings(hp, loader, validation)]
    for warning in warnings:
        log(f"warning: {warning}")

    _, passes = block_passes(hp)  # those of the trained network
    written = ""  # SHA-256 of the artifact, if this run writes one
    trained = Trained({}, {}, 0, 0.0)
    evaluation_began = perf_counter()
    if not hp.eval_only:
        limit = f" or {hp.max_wallclock_seconds:g} s, whichever comes first"
        limit = limit if hp.max_wallclock_seconds else ""
        log.heading(f"Train: {hp.iterations:,} steps{limit}")
        trained = train(model, loader, validation, ranks, log, stop)
        evaluation_began = perf_counter()
        log_peak_memory(ranks, log)
        log.heading("Compress: weights become the bytes of the artifact")
        if trained.validated is None:
            log_validation("final_float", Scorer(model, passes), validation, ranks, log)
        else:  # training has just validated these weights
            log_exactly("final_float", *trained.validated, log)
        if ranks.rank == 0:
            written = write_artifact(path, trained, hp, log)

    log.heading("Read back and score: what counts is what the file holds")
    trunk = compiled(model.hidden, hp, ranks.device)  # only now: its time counts as evaluation
    artifact = read_artifact(path, written, model, ranks, log)
    if ranks.rank == 0:
        log.leaves("artifact", f"EVAL_ONLY={path} scores it again")
    if written:
        link_artifact(path, hp, log)
    scores = evaluate(Scorer(model, passes, trunk), validation, evaluation_began, ranks, log)
    if ranks.rank == 0:
        report(scores, trained, validation, artifact, hp, log)
    stop.be_patient()  # all is done: a signal can only come too late
    return None if hp.checkpoint_every else trained.checkpoint


def dry_run(hp, ranks, log, warnings: list[str]) -> None:
    """Print what a run with these settings would do, from a few steps and windows that are timed:
    steps, seconds, memory, files; before that the `warnings`. Nothing is kept. Collective.
    UserError: data or files are missing, or something will not hold."""
    require(
        not hp.eval_only and not hp.resume,
        "DRY_RUN=1 forecasts a run from its start: unset EVAL_ONLY and RESUME",
    )
    torch.manual_seed(hp.seed)
    loader = TokenLoader(hp, ranks.rank, ranks.world_size)
    validation = load_validation(hp)
    require_same_start(hp, validation.identity | loader.identity, ranks)
    model = GPT(hp).to(ranks.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    for warning in [*warnings, *run_warnings(hp, loader, validation)]:
        log(f"warning: {warning}")
    log(f"DRY_RUN: {ranks.world_size} ranks, {ranks.device.type}; nothing is trained or kept\n")
    log(
        f"  data        {len(loader.paths)} shards, {loader.num_tokens:,} tokens to train on, "
        f"{validation.num_targets:,} targets to score; stream {stream_name(validation.tokens)}; "
        f"round trip {validation.checked}"
    )
    if ranks.rank == 0:
        sizes = expected_files(artifact_path(hp, log), model, validation.num_targets, log)
        require_room(sizes)
        for path, size in sizes.items():
            log(f"  file        {path}: at most {size:,} bytes")
        bits = 8 * (SIZE_CAP - len(SOURCE)) / num_parameters
        log(
            f"  size        {num_parameters:,} parameters, for each of which the size cap leaves "
            f"{bits:.2f} bits"
        )

    training = forecast_training(model, loader, ranks, log)
    evaluation = forecast_evaluation(model, training.curvature, validation, ranks, log)
    problems = [*training.problems, *evaluation.problems]
    require(not ranks.from_rank0(len(problems)), f"this will not hold: {'; '.join(problems)}")
    log("\n  all of this holds")


class Forecast(NamedTuple):
    """What a dry run says of a phase before it begins."""

    seconds: float
    problems: list[str]  # what will not hold, and what to do about it
    steps: int = 0  # of training
    curvature: dict[str, Curvature] | None = None  # measured on one chunk of training tokens


def forecast_training(model, loader: TokenLoader, ranks, log) -> Forecast:
    """Time three steps of each graph, a checkpoint and a chunk of the curvature, and log what
    training will be. Collective. UserError: a checkpoint cannot be written."""
    hp = model.hp
    state = TrainState(model, ranks, log)
    step_seconds = time_steps(state, loader)
    state.note_unit("step", max(step_seconds.values()))
    _, passes = block_passes(hp)
    try_units(state, passes, loader)
    curvature, curving = forecast_curvature(state, passes, loader)
    steps, mean = steps_in_time(state, step_seconds)
    total = steps * mean + state.longest["checkpoint"] + curving

    each = ", ".join(f"{1e3 * took:.1f} ms" for took in step_seconds.values())
    log(f"  step        {each} (each order of the blocks, without and with late QAT)")
    log(f"  training    {steps:,} steps in {total:.0f} s, {curving:.1f} s of it for the curvature")
    problems = gpu_memory_problems("training", hp, ranks, log)
    if would_overrun(total, 0, hp.max_wallclock_seconds):
        problems.append(
            f"one step, a checkpoint and the curvature take {total:.1f} s, more than "
            f"MAX_WALLCLOCK_SECONDS={hp.max_wallclock_seconds:g}: raise it"
        )
    if not hp.warmdown_frac and hp.warmdown_iters > steps:
        problems.append(
            f"there is time for {steps:,} steps, but WARMDOWN_ITERS={hp.warmdown_iters}: the "
            "learning rates would never be whole; set WARMDOWN_FRAC"
        )
    return Forecast(total, problems, steps, curvature)


def time_steps(state: TrainState, loader: TokenLoader) -> dict[tuple, float]:
    """Seconds of a step with each graph, by its passes and whether it has late QAT: the mean of
    three, after one that compiles. Collective."""
    loss = compiled(training_loss, state.hp, state.ranks.device)
    seconds = {}
    for plan in plans_by_graph(state.hp, state.ranks.device):
        training_step(state, loader, loss, plan).item()
        began = perf_counter()
        for _ in range(3):
            training_step(state, loader, loss, plan).item()
        took = state.ranks.from_rank0((perf_counter() - began) / 3)
        seconds[plan.passes, plan.hardness is not None] = took
    return seconds


def forecast_curvature(
    state: TrainState, passes: tuple[int, ...], loader: TokenLoader
) -> tuple[dict[str, Curvature], float]:
    """(the curvature from one chunk of tokens, seconds that training will take to measure it on as
    many chunks as there is time for); ({}, 0) with QUANTIZER=rows. Collective."""
    hp, ranks = state.hp, state.ranks
    if hp.quantizer != "gptq":
        return {}, 0.0
    began = perf_counter()
    curvature, _ = measure_curvature(state.model, passes, loader, 0, ranks, most_chunks=1)
    seconds = ranks.from_rank0(perf_counter() - began)
    rows = max(1, CHUNK_TOKENS // hp.train_seq_len)
    batches = math.ceil(hp.gptq_tokens / hp.train_batch_tokens)
    chunks = batches * loader.accumulation * math.ceil(loader.rows / rows)
    if hp.gptq_seconds and seconds:
        # it ends when another chunk of twice that time might not end in time
        chunks = min(chunks, max(1, int(hp.gptq_seconds / seconds) - 1))
    return curvature, chunks * seconds


def steps_in_time(state: TrainState, step_seconds: dict[tuple, float]) -> tuple[int, float]:
    """(steps that training will take, the mean seconds of one), from those with each graph."""
    hp = state.hp
    steps = hp.iterations
    for _ in range(3):  # the plan of a step depends on how many there are
        plans = [
            plan_step(int(share * steps), share * hp.seconds_for_steps, hp, state.ranks.device)
            for share in np.linspace(0, 1, 64, endpoint=False)
        ]
        mean = np.mean([step_seconds[plan.passes, plan.hardness is not None] for plan in plans])
        if hp.max_wallclock_seconds:
            until_last = hp.max_wallclock_seconds - seconds_to_keep(state)
            steps = min(hp.iterations, 1 + max(0, int(until_last / mean)))
    return steps, float(mean)


def forecast_evaluation(
    model, curvature: dict[str, Curvature], validation: Validation, ranks, log
) -> Forecast:
    """Pack the weights as they are, time some windows and count some of the stream, and log what
    evaluation will be. Collective."""
    hp, num_targets = model.hp, validation.num_targets
    began = perf_counter()
    if ranks.rank == 0:
        compress(model.state_dict(), hp, curvature, SIZE_CAP - len(SOURCE))
    packing = ranks.from_rank0(perf_counter() - began)
    log(
        f"  packing     {packing:.1f} s (of untrained weights; how many bytes trained ones take "
        "is not known before)"
    )
    _, passes = block_passes(hp)
    scorer = Scorer(model, passes, compiled(model.hidden, hp, ranks.device))
    whole, _ = time_windows(scorer, validation, hp.eval_seq_len, ranks)
    overlapping, compiling = time_windows(scorer, validation, hp.eval_stride, ranks)
    validations = 1 if hp.averaging == "none" else 2  # of the averages, and of the file
    validating = math.ceil(num_targets / hp.eval_seq_len) * whole
    scoring = compiling + math.ceil(num_targets / hp.eval_stride) * overlapping
    what = f"with stride {hp.eval_stride}"
    if hp.ttt_epochs:
        scoring = time_learning(scorer, validation, ranks, log)
        what += " and test-time training"
    if hp.ttt_lora_rank:
        scoring = time_adapters(scorer, validation, ranks)
        what = "with adapters per document"
    each = "two validations" if validations == 2 else "a validation"
    log(f"  scoring     {validations * validating:.1f} s for {each}, {scoring:.1f} s {what}")
    problems = gpu_memory_problems("scoring", hp, ranks, log)
    counting, counting_problems = forecast_counting(validation, hp, ranks, log)
    added = max(0.0, counting - validating - scoring)  # it begins with the second validation
    total = packing + validations * validating + scoring + added
    log(f"  evaluation  {total:.0f} s of EVAL_BUDGET_SECONDS={hp.eval_budget_seconds:g}")
    if would_overrun(total, 0, 0.95 * hp.eval_budget_seconds):
        remedy = "a wider stride is used: raise EVAL_STRIDE"
        if hp.ttt_lora_rank:
            remedy = "adapters are given up: raise TTT_BATCH_SIZE, or set TTT_LORA_RANK=0"
        problems.append(
            f"evaluation would take {total:.0f} s of EVAL_BUDGET_SECONDS="
            f"{hp.eval_budget_seconds:g}, so that {remedy}"
        )
    return Forecast(total, [*problems, *counting_problems])


def time_windows(scorer: Scorer, validation: Validation, stride: int, ranks) -> tuple[float, float]:
    """(seconds of a window with this stride, seconds that the first call takes more, as it
    compiles). Collective."""
    hp, num_targets = scorer.model.hp, validation.num_targets
    length = min(hp.eval_seq_len, num_targets)
    count = 2 * max(50, ranks.world_size * rank_batch(length, hp, ranks))  # windows to time
    end = min(length + count * stride, num_targets)
    windows_timed = math.ceil((end - length) / stride) or 1
    took = []
    for _ in range(2):
        began = perf_counter()
        deque(score(scorer, validation.tokens, stride, ranks, (min(length, end - 1), end)), 0)
        took.append(ranks.from_rank0(perf_counter() - began))
    return took[1] / windows_timed, max(0.0, took[0] - took[1])


def time_learning(scorer: Scorer, validation: Validation, ranks, log) -> float:
    """Seconds of scoring the whole stream with test-time training, judged by its first three
    chunks. Collective."""
    hp = scorer.model.hp
    loss = compiled(training_loss, hp, ranks.device)
    segments = score_and_learn(scorer, loss, validation, hp.eval_stride, ranks, log)
    seconds = []
    began = perf_counter()
    for _ in islice(segments, 3):  # the first is only scored; the second compiles
        seconds.append(ranks.from_rank0(perf_counter() - began))
        began = perf_counter()
    segments.close()
    chunks = math.ceil(validation.num_targets / hp.ttt_chunk_tokens)
    return sum(seconds) + (chunks - len(seconds)) * seconds[-1]


def time_adapters(scorer: Scorer, validation: Validation, ranks) -> float:
    """Seconds of scoring the whole stream with adapters, judged by the last of its first three
    segments, or of those in its first tenth. Collective."""
    hp, num_targets = scorer.model.hp, validation.num_targets
    count = min(math.ceil(num_targets / 10), 7 * first_segment(hp, ranks))  # 7 = 1 + 2 + 4
    target_seconds = 0.0
    began = perf_counter()
    for segment in score_documents(scorer, validation.tokens[: count + 1], ranks):
        target_seconds = (perf_counter() - began) / max(segment.shape[1], 1)  # right on rank 0
        began = perf_counter()
    return num_targets * ranks.from_rank0(target_seconds)


def forecast_counting(validation: Validation, hp, ranks, log) -> tuple[float, list[str]]:
    """(seconds of counting the stream, what will not hold), judged by its first million tokens.
    Collective."""
    if not hp.ngram_enabled:
        return 0.0, []
    num_targets = validation.num_targets
    some = validation.tokens[: 1 << 20]
    began = perf_counter()
    if ranks.rank == 0:
        Mixture(some, hp)
    seconds = ranks.from_rank0(perf_counter() - began) * num_targets / len(some)
    per_token = COUNTING_BYTES + BYTES_PER_ORDER * (hp.ngram_order - 7) + SCORE_BYTES
    needed, available = per_token * num_targets, available_memory()
    log(
        f"  counting    {seconds:.1f} s while scoring goes on; at most {needed / 1e9:.1f} GB of "
        f"rank 0's memory, of which {available / 1e9:.1f} GB are available"
    )
    if needed <= available:
        return seconds, []
    return seconds, [
        f"counting n-grams needs {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are "
        "available: free some, lower NGRAM_ORDER, or set NGRAM_ENABLED=0"
    ]


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory that a program can still take, at most the limit of this
    container. Systems other than Linux do not tell: there it is all memory of the machine. `root`:
    where proc and sys are."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        text = (root / "proc/meminfo").read_text()
        amounts += [1024 * int(kib) for kib in re.findall(r"^MemAvailable: *(\d+) kB", text, re.M)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, v2 and v1
        with suppress(OSError, ValueError):  # absent; "max", which is no number
            amounts.append(int((root / "sys/fs/cgroup" / name).read_text()))
    return min(amounts)


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """(the most bytes of the GPU that this process has held since the last call, the bytes that it
    can have); zeros on a CPU."""
    if device.type != "cuda":
        return 0, 0
    most = torch.cuda.max_memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most, free + torch.cuda.memory_reserved(device)


def gpu_memory_problems(phase: str, hp, ranks, log) -> list[str]:
    """Log the GPU memory that a phase took, "training" or "scoring". Returns a problem if less than
    5 % are left, because memory becomes fragmented in a long run."""
    most, whole = gpu_memory(ranks.device)
    if not whole:
        return []
    log(f"  memory      {most >> 20:,} MiB at most in {phase}, of {whole >> 20:,} MiB of the GPU")
    if most <= 0.95 * whole:
        return []
    return [
        f"{phase} takes {most >> 20:,} of {whole >> 20:,} MiB of the GPU, and a long run may need "
        f"more: set {smaller_batch(phase, hp, ranks.world_size)}"
    ]


def smaller_batch(phase: str, hp, world_size: int) -> str:
    """NAME=value of a setting that halves the tokens of a forward pass in "training" or "scoring":
    fewer sequences or, if it has only one, a shorter one."""
    if phase == "training":
        tokens = min(hp.micro_batch_tokens, hp.train_batch_tokens // world_size)
        if tokens >= 2 * hp.train_seq_len:
            return f"MICRO_BATCH_TOKENS={tokens // 2}"
        return f"TRAIN_SEQ_LEN={max(1, hp.train_seq_len // 2)}"
    if hp.ttt_lora_rank and hp.ttt_batch_size > 1:  # adapters need a backward pass too
        return f"TTT_BATCH_SIZE={hp.ttt_batch_size // 2}"
    if hp.val_batch_size >= 2 * world_size * hp.eval_seq_len:
        return f"VAL_BATCH_SIZE={hp.val_batch_size // 2}"
    return f"EVAL_SEQ_LEN={max(1, hp.eval_seq_len // 2)}"


def run_warnings(hp, loader: TokenLoader | None, validation: Validation) -> list[str]:
    """All that is odd about these data and settings together. `loader`: None, if nothing is
    trained."""
    return [*data_warnings(hp, loader, validation), *idle_parts(hp, loader, validation)]


def idle_parts(hp, loader: TokenLoader | None, validation: Validation) -> Iterator[str]:
    """Yields a warning for each part of the run that the settings turn on, but that cannot act with
    these numbers of steps, tokens or seconds. `loader`: None, if nothing is trained."""
    if loader is not None:
        # After the last step, or when the time limit comes, learning rates are at their lowest.
        lowest = lr_scale(hp.iterations - 1, hp.seconds_for_steps, hp)
        if hp.warmdown_iters > hp.iterations and not hp.warmdown_frac:
            yield (
                f"WARMDOWN_ITERS={hp.warmdown_iters} is more than ITERATIONS={hp.iterations}: "
                f"the learning rates begin at {lr_scale(0, 0.0, hp):.2g} times their values"
            )
        if 0 < hp.late_qat_threshold <= lowest:
            yield (
                f"LATE_QAT_THRESHOLD={hp.late_qat_threshold:g} is never reached: "
                f"the lr scale stays at {lowest:g} or more"
            )
        last_due = hp.iterations // hp.swa_every * hp.swa_every
        is_low = last_due and lr_scale(last_due - 1, hp.seconds_for_steps, hp) < hp.swa_threshold
        if "swa" in hp.averaging and not is_low:
            yield (
                f"AVERAGING={hp.averaging}: SWA takes no snapshot, as the lr scale is not below "
                f"SWA_THRESHOLD={hp.swa_threshold:g} at any multiple of SWA_EVERY={hp.swa_every} "
                f"up to step {hp.iterations}"
            )
        share = training_share(hp.iterations - 1, hp.seconds_for_steps, hp)
        if hp.recur_layers and share < hp.recur_start:
            yield (
                f"RECUR_START={hp.recur_start:g} is never reached in {hp.iterations} steps: the "
                "network is scored with RECUR_LAYERS run again, but not trained so"
            )
        if loader.rows <= 2 < min(loader.most_rows, loader.sequences_per_rank):
            full = (
                loader.most_rows
                * hp.train_seq_len
                * (loader.sequences // loader.sequences_per_rank)
            )
            yield (
                f"TRAIN_BATCH_TOKENS={hp.train_batch_tokens} makes {loader.accumulation} "
                f"micro-batches of {loader.rows} x {hp.train_seq_len} tokens on each rank; a "
                f"multiple of {full} makes larger and fewer ones"
            )
    if hp.ttt_epochs and hp.ttt_chunk_tokens >= validation.num_targets:
        yield (
            f"TTT_CHUNK_TOKENS={hp.ttt_chunk_tokens}: the whole stream of "
            f"{validation.num_targets} targets is scored before anything is learned"
        )


def require_same_start(hp, identity: dict[str, str], ranks) -> None:
    """UserError: a rank has other files, settings or versions than rank 0. `identity`: of the data
    that it reads. Collective."""
    ranks.require_equal(
        {
            "train_gpt.py": SOURCE,
            "settings": hp,
            "torch": torch.__version__,
            "NumPy": np.__version__,  # its generator shuffles the training windows
            "data files": identity,
        }
    )


def log_peak_memory(ranks, log) -> None:
    """Log the most memory that this rank's GPU has held so far, if there is one."""
    if ranks.device.type == "cuda":
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        log(f"peak memory allocated: {held >> 20} MiB reserved: {reserved >> 20} MiB")


def customary_lines(hp, loader: TokenLoader | None, validation: Validation, model) -> list[str]:
    """Facts about the run in the wording of the challenge's own script. Tools that read the logs of
    many submissions search for these lines."""
    folder = hp.train_data_path or hp.data_path
    shards = len(loader.paths) if loader else 0
    return [
        f"seed:{hp.seed}",
        f"model_params:{sum(p.numel() for p in model.parameters())}",
        f"train_loader:dataset:{Path(folder).name} train_shards:{shards}",
        f"val_loader:shards pattern={hp.data_path}/fineweb_val_*.bin "
        f"tokens:{validation.num_targets}",
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={hp.tokenizer_path}",
    ]


def log_header(hp, loader: TokenLoader | None, validation: Validation, model, ranks, log) -> None:
    """Log what is needed to repeat the run: this source, versions, hardware, every setting, and the
    data's identity."""
    versions = (
        f"python:{platform.python_version()} torch:{torch.__version__} cuda:{torch.version.cuda} "
        f"numpy:{np.__version__} platform:{platform.platform()}"
    )
    lines = [SOURCE.decode(), "=" * 100, versions]
    lines += [f"data:{part} {facts}" for part, facts in validation.identity.items()]
    lines += [f"data:{part} {facts}" for part, facts in (loader.identity if loader else {}).items()]
    unknown, documents = validation.count_bytes.unknown(validation.tokens)
    lines += [
        f"data:stream name:{stream_name(validation.tokens)}",
        f"data:round_trip {validation.checked}",
        f"data:unknown tokens:{unknown} documents:{documents}",
    ]
    lines += [f"{name}={value}" for name, value in hp.as_env().items()]
    lines += customary_lines(hp, loader, validation, model)
    log("\n".join(lines), console=False)

    usual = Hyperparameters().as_env()
    changed = [f"{name}={value}" for name, value in hp.as_env().items() if value != usual[name]]
    log(f"changed: {' '.join(changed) or 'nothing, all settings have their defaults'}")
    device = f"{platform.processor() or platform.machine()} CPU"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    attention, _ = find_flash_attention()
    log(
        f"hardware:{ranks.world_size} x {device} threads:{torch.get_num_threads()} "
        f"cores:{os.cpu_count()} attention:{attention} "
        f"accumulation:{loader.accumulation if loader else 0}"
    )
    log(
        f"train_tokens:{loader.num_tokens if loader else 0} val_targets:{validation.num_targets} "
        f"val_bytes:{validation.target_bytes.sum()}"
    )


def artifact_path(hp, log) -> Path:
    """logs/<RUN_ID>.int<QUANT_BITS>.ptz or, if another run has left that, with a number."""
    return free_path(log.path.with_name(f"{log.path.stem}.int{hp.quant_bits}.ptz"))


def expected_files(artifact: Path, model, num_targets: int, log) -> dict[Path, int]:
    """path -> the most bytes that it will have, for each file that the run will write beside its
    log. EVAL_ONLY writes no checkpoint and no artifact."""
    hp = model.hp
    numbers = sum(p.numel() for p in model.parameters())
    sizes = {}
    if not hp.eval_only:
        copies = 3 + len(build_averages([], hp))  # weights, two moments of AdamW, averages
        # for two checkpoints, as the old one stays until the new one is whole
        sizes[log.path.with_suffix(".ckpt")] = 2 * copies * 4 * numbers + ROOM_TO_SPARE
        sizes[artifact] = min(SIZE_CAP, 2 * numbers + ROOM_TO_SPARE)
    if hp.save_scores:
        arrays = 3 if hp.ngram_enabled else 2  # of float32
        sizes[scores_path(log)] = arrays * 4 * num_targets + ROOM_TO_SPARE
    return sizes


def require_room(sizes: dict[Path, int]) -> None:
    """Compare the free bytes of each disk with the `sizes` of all files that will be written there,
    and try to write a small file beside each of them, which is removed. UserError: the disk has too
    few bytes, or a file cannot be written."""
    disks = defaultdict(list)
    for path in sizes:
        with temporary_file(path):  # it says what is wrong with the folder
            disks[path.parent.stat().st_dev].append(path)
    for paths in disks.values():
        disk = shutil.disk_usage(paths[0].parent)
        needed = sum(sizes[path] for path in paths)
        require(
            needed <= disk.free or not disk.total,  # a total of 0: it does not tell its size
            f"{paths[0].parent}: the disk has {disk.free:,} bytes free, and up to {needed:,} are "
            f"needed for {', '.join(map(str, paths))}: free space there, or start the run in "
            "another folder",
        )
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    for path, size in sizes.items():
        require(
            most == resource.RLIM_INFINITY or size <= most,
            f"{path}: may take up to {size:,} bytes, and a file may have {most:,}: raise the limit "
            "(ulimit -f)",
        )
    for path in sizes:
        with temporary_file(path) as temporary:
            temporary.write_bytes(b"-")
            if path.is_dir() and not path.is_symlink():  # a folder cannot be replaced
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def write_artifact(path: Path, trained: Trained, hp, log) -> str:
    """Pack the trained weights into the file `path`, so that file and script have at most SIZE_CAP
    bytes. Returns its SHA-256. UserError: that cannot be, or the file cannot be written."""
    for name, curvature in trained.curvature.items():
        if curvature.factors is None:
            log(f"warning: {name}: its curvature is unusable; rounded row by row, without GPTQ")
    packed = compress(trained.weights, hp, trained.curvature, SIZE_CAP - len(SOURCE))
    container = packed.container
    log(
        f"fit_artifact coarsen:{packed.coarsen:.9f} error_before:{packed.error_before:.6f} "
        f"error_after:{container.error:.6f} "
        f"bits_per_parameter:{packed.bits_per_parameter:.4f} levels:{container.levels} "
        f"bytes:{len(container.blob)} bytes_by_rans:{packed.bytes_by_rans}"
    )
    sizes = " ".join(f"{part}:{size}" for part, size in container.sizes.items())
    log(f"artifact_bytes code:{len(SOURCE)} {sizes}")
    try:
        replace_file(path, lambda file: file.write(container.blob))
    except UserError as error:
        raise UserError(f"{error}; {log.hint}") from None
    return hashlib.sha256(container.blob).hexdigest()


def link_artifact(path: Path, hp, log) -> None:
    """Make the name that other people's tools expect, final_model.int<QUANT_BITS>.ptz, a link to
    the artifact, or a copy where links are impossible. This script does not read it. If neither
    can be made, the log says so."""
    link = Path(f"final_model.int{hp.quant_bits}.ptz")
    temporary = link.with_name(f"{link.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.symlink_to(path)
            temporary.replace(link)
        except OSError:
            temporary.unlink(missing_ok=True)
            replace_file(link, lambda file: file.write(path.read_bytes()))
    except (OSError, UserError) as error:
        log(f"warning: {link} is not the artifact of this run, which is {path}: {error}")


class Artifact(NamedTuple):
    """The file that is scored. On ranks other than 0 it is empty."""

    size: int = 0  # bytes, with the script
    sha256: str = ""


def read_artifact(path: Path, written: str, model: GPT, ranks, log) -> Artifact:
    """Every rank's model gets the weights that rank 0 reads from `path`. `written`: the SHA-256
    that the file must have; empty: any. Collective. UserError: there is no such file, or it is
    damaged or not the one expected."""
    artifact = Artifact()
    if ranks.rank == 0:
        hp = model.hp
        with errors_naming(path):
            blob = read_blob(path)
            found = hashlib.sha256(blob).hexdigest()
            problem = f"SHA-256 is {found}, but this run wrote {written}: it was replaced"
            require_valid(found == (written or found), f"{problem}; RESUME the checkpoint")
            settings, state = decompress(blob, model.state_dict())
            is_same = settings == hp.of_model()
            require_valid(is_same, "was replaced since this run has read its settings; start again")
        model.load_state_dict(state)
        artifact = Artifact(len(SOURCE) + len(blob), found)
        label = f"int{hp.quant_bits}+{hp.coder}"
        log(f"artifact:{path} sha256:{found}")
        log(f"Serialized model {label}: {len(blob)} bytes")
        log(f"Code size: {len(SOURCE)} bytes")
        log(f"Total submission size {label}: {artifact.size} bytes")
    for p in model.parameters():
        ranks.from_rank0(p.data)
    return artifact


def read_blob(path: Path) -> bytes:
    """The bytes of an artifact. OSError. ValueError: it is no file, or larger than artifacts are
    (/dev/zero has no end)."""
    size = path.stat().st_size
    problem = f"is no file of at most {SIZE_CAP:,} bytes, which is what artifacts are"
    require_valid(path.is_file() and size <= SIZE_CAP, problem)
    return path.read_bytes()


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """OSError and ValueError become a UserError that names the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def load(path: str | Path) -> tuple[GPT, Hyperparameters]:
    """The model in an artifact, on the CPU, and its settings; what an artifact does not hold has
    its default. Its blocks run in the second of the orders that `block_passes(hp)` returns.
    UserError: there is no such file, or it is damaged."""
    path = Path(path)
    with errors_naming(path):
        settings, state = decompress(read_blob(path))
    hp = settings_to_score("the file", settings, {})
    model = GPT(hp)
    model.load_state_dict(state)
    return model, hp


def read_settings(env: dict[str, str], ranks) -> Hyperparameters:
    """The settings in `env` and, with EVAL_ONLY, those in the artifact that it names, which rank 0
    reads. Collective. UserError: a value cannot work, or contradicts the artifact."""
    by_name = {f.name: f for f in fields(Hyperparameters)}
    path = parse_setting(by_name["eval_only"], env.get("EVAL_ONLY", ""))
    if not path:
        return Hyperparameters.from_env(env)
    stored = ""
    if ranks.rank == 0:
        with errors_naming(Path(path)):
            stored = json.dumps(settings_of(read_blob(Path(path))), allow_nan=False)
    return settings_to_score(path, json.loads(ranks.from_rank0(stored)), env)


def log_validation(name: str, scorer: Scorer, validation: Validation, ranks, log) -> ndarray:
    """Returns `validation_scores`, and logs loss and bits per byte with eight decimals.
    Collective."""
    scores_2N = validation_scores(scorer, validation, ranks, log)
    if ranks.rank == 0:
        nll, _ = scores_2N
        bpb = bits_per_byte(nll, validation.target_bytes)
        log_exactly(name, nll.mean(dtype=float), bpb, log)
    return scores_2N


def log_exactly(name: str, loss: float, bpb: float, log) -> None:
    """Log nats per target and bits per byte, as other tools look for them."""
    log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


class Scores(NamedTuple):
    """What evaluation returns. Arrays have one number per target of the stream, and are empty on
    ranks other than 0. Times are in seconds."""

    nll: ndarray  # nats, of the model alone
    entropy: ndarray  # nats, of the model's predictions
    mixture: Mixture | None
    stride: int
    seconds: float  # of scoring, with compiling and with strides that were given up
    added: float  # between the last score and the end of mixing
    began: float  # perf_counter() when evaluation began


def evaluate(scorer: Scorer, validation: Validation, began: float, ranks, log) -> Scores:
    """Score the stream. Meanwhile a thread of rank 0 counts n-grams, then mixes what is scored.
    (It counts the whole stream at once, but the counts of a target are those before it.) Targets
    that the overlapping windows do not reach in time keep the scores of the validation before.
    `began`: perf_counter() when evaluation began. Collective."""
    hp = scorer.model.hp
    worker = concurrent.futures.ThreadPoolExecutor(1)
    counted = None  # the future of the Mixture: of its counts
    if hp.ngram_enabled and ranks.rank == 0:
        counted = worker.submit(Mixture, validation.tokens, hp)
    validation_began = perf_counter()
    name = f"final_int{hp.quant_bits}_roundtrip"
    scores_2N = log_validation(name, scorer, validation, ranks, log)
    scoring_began = perf_counter()
    num_windows = math.ceil(validation.num_targets / hp.eval_seq_len)
    window_seconds = ranks.from_rank0((scoring_began - validation_began) / num_windows)

    stride, segments = score_in_time(scorer, validation, began, ranks, log, window_seconds)
    # its clock starts now, as nothing compiles any more
    progress = Progress(log, "scoring", validation.num_targets)
    done = 0
    mixing = []  # futures
    for segment in segments:
        end = done + segment.shape[1]  # segments are empty on other ranks
        scores_2N[:, done:end] = segment
        done = end
        progress(done)
        if counted:
            mixing.append(worker.submit(extend_when_counted, counted, scores_2N[:, :done]))
    if done < scores_2N.shape[1]:
        stride = hp.eval_seq_len  # of the validation, whose scores stand for the rest
        log_projection(perf_counter() - began, hp, stride, log, f" from:{done}" if done else "")
        progress(validation.num_targets)
        if counted:
            mixing.append(worker.submit(extend_when_counted, counted, scores_2N))
    scored = perf_counter()
    for future in mixing:
        future.result()  # raises what the worker has raised
    mixture = counted.result() if counted else None
    added = perf_counter() - scored
    return Scores(*scores_2N, mixture, stride, scored - scoring_began, added, began)


def extend_when_counted(counted: concurrent.futures.Future, scores_2N: ndarray) -> None:
    """Wait until the Mixture has counted, then let it mix the targets that are new in
    `scores_2N`."""
    counted.result().extend(*scores_2N)


class Budget(NamedTuple):
    """The time limit of evaluation."""

    seconds: float  # EVAL_BUDGET_SECONDS; 0: no limit
    began: float  # perf_counter() when evaluation began
    ranks: Ranks

    @property
    def elapsed(self) -> float:
        """Seconds since evaluation began."""
        return perf_counter() - self.began

    def is_late_after(self, more: float, spare: float) -> bool:
        """Would work of `more` seconds leave less than `spare` seconds, or less than 5 % of the
        budget, for what follows? If there is no more work, it is never late. Rank 0 decides.
        Collective."""
        needed = more + max(spare, 0.05 * self.seconds)
        is_late = more > 0 and would_overrun(self.elapsed, needed, self.seconds)
        return bool(self.ranks.from_rank0(is_late))


def log_projection(seconds: float, hp, stride: int, log, what: str = "") -> None:
    """Log that evaluation will have taken `seconds` at its end, if it scores with `stride`. `what`
    is appended to the line."""
    budget = f"budget:{hp.eval_budget_seconds:g}s"
    log(f"eval_budget projected:{seconds:.1f}s {budget} stride:{stride}{what}")


def score_in_time(
    scorer: Scorer,
    validation: Validation,
    began: float,
    ranks,
    log,
    window_seconds: float = 0.0,
) -> tuple[int, Iterator[ndarray]]:
    """Returns the stride and the segments of its scores. The `ways_to_score` are tried in turn,
    until one will end within 95 % of EVAL_BUDGET_SECONDS after `began`, judged by the speed of its
    third segment; if none will, there are no segments. Whether there is time for the first two is
    judged by `window_seconds`: how long a window took in the validation. If segments are slower
    than promised, they end early: see `until_late`. Collective."""
    hp, num_targets = scorer.model.hp, validation.num_targets
    budget = Budget(hp.eval_budget_seconds, began, ranks)
    batch = ranks.world_size * rank_batch(hp.eval_seq_len, hp, ranks)
    # segments of at most 1 % of the budget: shorter ones let it be used to nearly 95 %
    most = SEGMENT_BATCHES
    while most > 1 and would_overrun(
        0, most * batch * window_seconds, 0.01 * hp.eval_budget_seconds
    ):
        most //= 2
    scorer = scorer._replace(most_batches=most)
    for way in ways_to_score(scorer, validation, batch, ranks, log):
        stride, first = way.stride, min(way.first, num_targets)
        target_seconds = window_seconds * way.windows_per_target
        segments = until_late(way.segments, budget, num_targets, first, target_seconds)
        held = list(islice(segments, 2))  # these compile, so that they say nothing of the speed
        third_began = perf_counter()
        held += islice(segments, 1)
        now = perf_counter()

        done = sum(segment.shape[1] for segment in held)
        is_measured = len(held) == 3
        if is_measured:
            target_seconds = (now - third_began) / max(held[-1].shape[1], 1)
        elapsed = now - began
        remaining = target_seconds * (num_targets - done)
        log_projection(elapsed + remaining, hp, stride, log)
        is_late = not is_measured or would_overrun(
            elapsed, remaining, 0.95 * hp.eval_budget_seconds
        )
        if not ranks.from_rank0(done < num_targets and is_late):
            if way.note:
                log(f"ttt:score_first {way.note}")
            return stride, chain(held, segments)
        segments.close()
        if way.note:
            problem = f"would not end within EVAL_BUDGET_SECONDS={hp.eval_budget_seconds:g}"
            log(f"warning: TTT_LORA_RANK={hp.ttt_lora_rank}: adapters {problem}; scored without")
    return hp.eval_seq_len, iter(())


class Way(NamedTuple):
    """A way to score the stream, and what it costs."""

    stride: int
    segments: Iterator[ndarray]  # as `score` yields them
    first: int  # the most targets of its first segment
    windows_per_target: float  # the time of one target, in that of a window of the validation
    note: str = ""  # what to log if documents are scored with adapters


def ways_to_score(scorer: Scorer, validation: Validation, batch: int, ranks, log) -> Iterator[Way]:
    """The ways to score the stream, the best one first: documents with adapters, if TTT_LORA_RANK
    says so; windows with EVAL_STRIDE; windows with wider strides. `batch`: windows that all ranks
    score at a time. Training on a window takes about four times as long as scoring it."""
    hp, tokens = scorer.model.hp, validation.tokens
    if hp.ttt_lora_rank:
        pieces = document_pieces(tokens, hp)
        read = windows_in_pieces(pieces, hp)
        cost = (4 if hp.ttt_lora_lr else 1) * read / validation.num_targets
        documents = np.count_nonzero(pieces[0] == pieces[1])
        note = f"documents:{documents} rank:{hp.ttt_lora_rank} lr:{hp.ttt_lora_lr:g}"
        segments = score_documents(scorer, tokens, ranks)
        yield Way(hp.ttt_chunk_size, segments, first_segment(hp, ranks), cost, note)
    loss = compiled(training_loss, hp, ranks.device)
    wider = [s for s in FALLBACK_STRIDES if hp.eval_stride < s < hp.eval_seq_len]
    for stride in [hp.eval_stride, *wider]:
        cost = 1 / stride + 4 * hp.ttt_epochs / hp.eval_seq_len
        if hp.ttt_epochs:
            segments = score_and_learn(scorer, loss, validation, stride, ranks, log)
            yield Way(stride, segments, hp.ttt_chunk_tokens, cost)
        else:
            yield Way(stride, score(scorer, tokens, stride, ranks), batch * stride, cost)


def until_late(
    segments: Iterator[ndarray], budget: Budget, num_targets: int, first: int, target_seconds: float
) -> Iterator[ndarray]:
    """Yields the segments of `num_targets` targets until the next one might not end in time. It is
    judged by `target_seconds`, from the third on by the slowest segment since then. The first one
    takes at most as long as `first` targets (it scores a whole window too). Another takes a
    multiple of that, or less if it consists of whole pieces of documents, and at most twice as long
    as the one before. Collective."""
    done, slowest = 0, 0.0
    number, more = 0, target_seconds * first
    try:
        while not budget.is_late_after(more, spare=more):
            began = perf_counter()
            segment = next(segments, None)
            if segment is None:
                return
            number += 1
            size = first if number == 1 else max(segment.shape[1], 1)  # right on rank 0
            if number > 2:
                slowest = max(slowest, (perf_counter() - began) / size)
            done += segment.shape[1]
            batches = math.ceil(min(2 * size, num_targets - done) / first)  # which are filled up
            more = (slowest or target_seconds) * batches * first
            yield segment
    finally:
        segments.close()


def report(
    scores: Scores, trained: Trained, validation: Validation, artifact: Artifact, hp, log
) -> None:
    """Log all results, and save the scores if SAVE_SCORES says so. UserError: a score is not
    finite. RuntimeError: the mixture is not a valid code."""
    nll, mixture = scores.nll, scores.mixture
    require(bool(np.isfinite(nll).all()), "the packed weights give scores that are not finite")
    neural_bpb = bits_per_byte(nll, validation.target_bytes)
    log(
        f"final_int{hp.quant_bits}_sliding_window_exact val_loss:{nll.mean(dtype=float):.8f} "
        f"val_bpb:{neural_bpb:.8f} stride:{scores.stride} eval_time:{1e3 * scores.seconds:.0f}ms"
    )
    nats = {"neural": nll}
    if mixture:
        log.heading("Mix with exact counts of the text that came before")
        report_mixture(scores, validation, hp, log)
        nats["mixed"] = mixture.nll

    seconds = perf_counter() - scores.began
    budget = f"budget:{hp.eval_budget_seconds:g}s"
    log(f"total_eval_time:{seconds:.1f}s {budget} stride:{scores.stride}")
    for what, took, limit in (
        ("training", trained.seconds, "max_wallclock_seconds"),
        ("evaluation", seconds, "eval_budget_seconds"),
    ):
        if would_overrun(took, 0, getattr(hp, limit)):
            log(f"warning: {what} took {took:.1f} s, more than {limit.upper()}")
    bpb = {name: bits_per_byte(x, validation.target_bytes) for name, x in nats.items()}
    report_to_people(bpb, trained, seconds, artifact.size, hp, log)
    usual = Hyperparameters().as_env()
    result = {
        "run_id": log.path.stem,
        "seed": hp.seed,
        "steps": trained.steps,
        "step_ms": round(1e3 * trained.seconds / max(trained.steps, 1), 3),
        "train_seconds": round(1e3 * trained.seconds) / 1e3,
        "eval_seconds": round(seconds, 1),
        "stride_tokens": scores.stride,
        "code_bytes": len(SOURCE),
        "submission_bytes": artifact.size,
        "artifact_sha256": artifact.sha256,
    }
    for name, x in nats.items():
        result[f"{name}_nats_per_token"] = round(float(x.mean(dtype=float)), 8)
        result[f"{name}_bits_per_byte"] = round(float(bpb[name]), 8)
    if mixture:
        result["gain_bits_per_byte"] = round(float(bpb["neural"] - bpb["mixed"]), 8)
    result["settings"] = {name: x for name, x in hp.as_env().items() if x != usual[name]}
    # one line for programs, rounded as in the lines for people and for other tools
    log(f"result {json.dumps(result, allow_nan=False)}", console=False)
    if hp.save_scores:
        save_scores(scores, hp, log)


def report_mixture(scores: Scores, validation: Validation, hp, log) -> None:
    """Audit the mixture, and log what it did to the neural scores."""
    nll, entropy, mixture, *_ = scores
    target_bytes = validation.target_bytes
    log(f"ngram_audit {mixture.audit()}")
    for low, high in pairwise(ENTROPY_EDGES):
        inside = (low <= entropy) & (entropy < high)
        if inside.any():  # the mean nll of a calibrated model is its mean entropy
            log(
                f"calibration entropy:{low}-{high} targets:{inside.sum()} "
                f"expected:{entropy[inside].mean():.4f} nll:{nll[inside].mean():.4f} "
                f"mixed:{mixture.nll[inside].mean():.4f}"
            )
    # in bits per byte, by the longest n that matched; together they are the whole gain
    gain = np.bincount(mixture.matched_n, nll - mixture.nll) / math.log(2) / target_bytes.sum()
    for n, count in zip(*np.unique(mixture.matched_n, return_counts=True)):
        log(f"ngram_order order:{n} targets:{count} gain:{gain[n]:.8f}")

    bpb = bits_per_byte(mixture.nll, target_bytes)
    log(
        f"final_ngram_exact val_loss:{mixture.nll.mean():.8f} val_bpb:{bpb:.8f} "
        f"gain:{bits_per_byte(nll, target_bytes) - bpb:.8f} "
        f"orders:{hp.ngram_min_order}-{hp.ngram_order} counts:exact alpha:{hp.ngram_alpha} "
        f"added_time:{1e3 * scores.added:.0f}ms"
    )


def report_to_people(
    bpb: dict[str, float], trained: Trained, seconds: float, size: int, hp, log
) -> None:
    """The summary at the end of the console. `bpb`: "neural" and, unless it is off, "mixed";
    `seconds`: of evaluation."""
    mixed = "not mixed"
    if "mixed" in bpb:
        mixed = f"mixed with exact counts of the past {bpb['mixed']:.4f} bpb"
    log(
        f"\n  neural {bpb['neural']:.4f} bpb, {mixed}\n"
        f"  artifact {size:,} bytes of {SIZE_CAP:,}, code included; {log.path}\n"
        f"  training {trained.seconds:.1f} s, {trained.steps} steps; evaluation {seconds:.1f} s"
    )
    if hp.save_scores and "mixed" in bpb:
        log("  the text, coloured by what each token cost and what the counts saved: make view")


def scores_path(log) -> Path:
    """logs/<RUN_ID>_scores.npz."""
    return log.path.with_name(f"{log.path.stem}_scores.npz")


def save_scores(scores: Scores, hp, log) -> None:
    """Write every target's scores, and the settings, to `scores_path`. If that fails, the log says
    so."""
    path = scores_path(log)
    arrays = {"nll": scores.nll, "entropy": scores.entropy}
    settings = json.dumps(hp.as_env(), allow_nan=False)
    try:
        if scores.mixture:
            arrays["mixed"] = scores.mixture.nll.astype(np.float32)
        replace_file(path, lambda file: np.savez(file, settings=settings, **arrays))
    except UserError as error:
        log(f"warning: {error}; EVAL_ONLY with SAVE_SCORES=1 makes the scores again")
    except MemoryError:
        log(f"warning: {path}: not written, as the memory is full")


def main(env: dict[str, str]) -> None:
    """One run with the settings in `env`. UserError: an error the user can fix."""
    ranks = Ranks(env)
    try:
        hp = read_settings(env, ranks)
    except UserError as error:
        raise UserError("; ".join([str(error), *mistyped(env)])) from None
    run_id = hp.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}_seed{hp.seed}"
    log = RunLog(run_id, ranks.rank)
    stop = StopSignal(log)
    stop.install()
    try:
        warnings = [*mistyped(env), *hp.without_effect(env), *unusable_gpu(ranks.device, env)]
        if hp.dry_run:
            checkpoint = dry_run(hp, ranks, log, warnings)
        else:
            checkpoint = run(hp, ranks, log, stop, warnings)
        ranks.barrier()
        ranks.close()
        log.close()
        if checkpoint:  # the result is in the log
            with suppress(OSError):  # then it stays; the run is whole all the same
                checkpoint.unlink()
    except BaseException as error:
        # The process group stays open: to close it would make the other ranks fail, and speak
        # first. They wait until this process has ended. No signal interrupts what is said now.
        stop.be_patient()
        shown = explained(error, env, hp, stop, log)
        log(f"error: {type(shown).__name__}: {shown}", console=False)
        if shown is error:
            raise
        raise shown from None
    finally:
        if hp.dry_run and log.path:  # nothing of a dry run is kept
            with suppress(OSError):
                log.path.unlink()


def explained(error: BaseException, env: dict[str, str], hp, stop, log) -> BaseException:
    """The error that a user should see instead of `error`. It says which checkpoint or artifact is
    left to go on with."""
    if "gloo/transport" in str(error):  # a connection to another rank was lost
        what = "another rank ended: see what it said; if nothing, a signal stopped it"
        if "timed out" in str(error).lower():
            what = "another rank did not answer in time, see whether it hangs"
        # after a signal, rank 0 says so for all ranks, and the others stay silent
        error = Stopped(f"{what}; {stop.name} came") if stop.name else UserError(what)
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_memory or "can't allocate memory" in str(error):
        error = UserError(out_of_memory(error, env, hp, log))
    message = str(error)
    is_known = any(how.split()[0] in message for how in log.left.values())
    if isinstance(error, Stopped) and not is_known and log.hint not in message:
        error = Stopped(f"{message}; {log.hint}")
    elif isinstance(error, UserError):
        left = [log.hint] if log.left and not is_known else []
        error = UserError("; ".join([message, *left, *mistyped(env)]))
    return error


def out_of_memory(error: BaseException, env: dict[str, str], hp, log) -> str:
    """What to do after `error`, which came because memory was full."""
    _, world_size, _ = place_among_ranks(env)
    is_trained = hp.eval_only or "artifact" in log.left
    phases = ["scoring"] if is_trained else ["training", "scoring"]
    remedies = [f"{smaller_batch(p, hp, world_size)} if this came in {p}" for p in phases]
    if isinstance(error, MemoryError) and hp.ngram_enabled:  # of NumPy or Python, not of a GPU
        remedies.append("NGRAM_ENABLED=0 if this came in counting")
    cause, *_ = str(error).splitlines() or [""]
    return f"out of memory: try {', '.join(remedies)}, or a smaller model ({cause})"


def leave(error: BaseException | None, rank: int) -> None:
    """End the process; print the error, if there is one, in one line if the user can fix it. Rank 0
    prints at once and ends; then torchrun ends the other ranks, so that an error that all share is
    printed once. Another rank prints after 5 seconds, if it still runs. (Not by sys.exit, as gloo's
    threads may crash Python's shutdown.)"""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's may end the wait below
    if error is not None and rank:
        time.sleep(5)
    is_told_by_rank_0 = rank > 0 and isinstance(error, Stopped)
    if isinstance(error, (UserError, Stopped, OSError)) and not is_told_by_rank_0:
        speaker = f"rank {rank}: " if rank else ""
        say(f"train_gpt.py: error: {speaker}{error}", sys.stderr)
    elif error is not None and not is_told_by_rank_0:
        say("".join(traceback.format_exception(error)), sys.stderr, end="")
    os._exit(0 if error is None else 1)


def start(env: dict[str, str], arguments: list[str]) -> None:
    """Run `main`, then end the process, with or without an error. With --help, print the settings
    instead."""
    fill_closed_streams()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` handles it: no traceback
    text = env.get("RANK", "")
    rank = int(text) if text.isdecimal() else 0  # `main` refuses other texts
    try:
        if set(arguments) & {"-h", "--help"}:
            say("" if rank else help_text(), sys.stdout, end="" if rank else "\n")
        else:
            refuse_arguments(arguments)
            main(env)
        leave(None, rank)
    except BaseException as error:
        leave(error, rank)


if __name__ == "__main__":
    start(dict(os.environ), sys.argv[1:])
