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
import concurrent.futures, contextlib, functools, hashlib, importlib, json, lzma, math, os, platform
import re, signal, sys, time, traceback, zlib
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice, pairwise
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from torch import Tensor, distributed as dist, nn
triton = None  # then each op runs in its plain form
with contextlib.suppress(ImportError):
    import triton, triton.language as tl
SIZE_CAP = 16_000_000          # bytes, decimal: code + compressed weights (the challenge's rule)
class UserError(Exception):
    """What a user can mend. The message is one line: what was found, what was expected, what to do."""
class Stopped(UserError):
    """A signal ended the run."""
def require(holds: bool, message: str, kind=UserError) -> None:
    if not holds:
        raise kind(message)
# --- 1. Hyperparameters -------------------------------------------------------------------------------------
# The only place that reads the environment. What cannot work is refused, in one line, before data is touched.
def setting(default, doc: str, low=None, high=math.inf, choices=""):
    return field(default=default, metadata=dict(doc=doc, low=low, high=high, choices=choices.split()))
@dataclass(frozen=True)
class Hyperparameters:
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    train_data_path: str = setting("", "another folder for the training shards; empty: DATA_PATH")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece, to count bytes")
    run_id: str = setting("", "name of logs/<RUN_ID>.txt; empty: date, time and seed")
    seed: int = setting(1337, "seed of the initial weights", 0)
    eval_only: str = setting("", "score this final_model.int6.ptz and train nothing")
    resume: str = setting("", "go on from this logs/<RUN_ID>.ckpt")
    checkpoint_every: float = setting(0.0, "seconds between checkpoints; 0: at validations and SIGTERM", 0)
    compile: str = setting("auto", "torch.compile; auto: on CUDA only", choices="auto 0 1")
    iterations: int = setting(20_000, "most training steps", 1)
    max_wallclock_seconds: float = setting(600.0, "most training time; 0: no limit", 0)
    warmdown_iters: int = setting(3500, "length of the final linear decay, in steps' worth of time", 0)
    warmup_steps: int = setting(20, "untimed steps that compile both graphs (at least 2), then undone", 0)
    train_batch_tokens: int = setting(786_432, "tokens per step, over all ranks", 1)
    micro_batch_tokens: int = setting(98_304, "most tokens of one forward and backward pass on one rank", 1)
    train_seq_len: int = setting(2048, "tokens per training sequence", 1)
    train_log_every: int = setting(500, "steps between train_loss lines; 0: only the first ten", 0)
    fused_mlp: bool = setting(True, "Triton kernels for the MLP, on CUDA")
    fused_loss: bool = setting(True, "Triton kernels for loss and entropy, on CUDA")
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
    averaging: str = setting("ema", "weights that are packed", choices="none ema swa ema_swa")
    ema_decay: float = setting(0.997, "decay per step of the exponential average", 0, 1)
    swa_every: int = setting(50, "steps between snapshots of the uniform average", 1)
    swa_threshold: float = setting(0.2, "snapshots start once the lr scale is below this", 0, 1)
    late_qat_threshold: float = setting(0.15, "lr scale below which fake quantisation starts; 0: never", 0)
    qat_rounding: str = setting("straight", "of late QAT; soft as in 2006.09952", choices="straight soft")
    quant_bits: int = setting(6, "bits of the matrices' codes before fitting, and late QAT's", 3, 8)
    fill_budget: bool = setting(True, "spend the bytes that are left on finer codes, up to 8 bits")
    eval_seq_len: int = setting(2048, "tokens per scoring window", 1)
    eval_stride: int = setting(64, "new targets per window of the final score", 1)
    eval_budget_seconds: float = setting(600.0, "to keep 95 % of it, the stride widens; 0: no budget", 0)
    val_loss_every: int = setting(4000, "steps between validations during training; 0: only the last", 0)
    val_batch_size: int = setting(524_288, "tokens per scoring batch, over all ranks", 1)
    save_scores: bool = setting(False, "write nll, entropy, mixed nll per target to logs/<RUN_ID>_scores.npz")
    ttt_epochs: int = setting(0, "passes over each chunk once it is scored; 0: off", 0)
    ttt_chunk_tokens: int = setting(32_768, "targets that are scored, then trained on", 1)
    ttt_lr: float = setting(5e-4, "AdamW lr; over the stream by cosine to 0, times 1 to 3 at first", 0)
    ttt_blocks: int = setting(2, "last blocks that learn, beside all vectors, scalars and the output head", 0)
    ttt_decay: float = setting(0.998, "decay per step of the average that scores", 0, 1)
    ngram_enabled: bool = setting(True, "mix the model with counts of what came before in the stream")
    ngram_min_order: int = setting(2, "shortest gram (context + target)", 2, 16)
    ngram_order: int = setting(7, "longest gram", 2, 16)
    ngram_alpha: str = setting("online", "learned; by PR #889; by PR #825", choices="online entropy order")
    ngram_min_count: int = setting(2, "times a context must occur before its order may win; not online", 1)
    alpha_min: float = setting(0.05, "weight where the model is sure; not online", 0, 1)
    alpha_max: float = setting(0.60, "weight where the model is lost; not online", 0, 1)
    ngram_counts: str = setting("exact", "hashed: the predecessors' too, no code", choices="exact hashed")
    ngram_buckets: int = setting(4_194_304, "buckets of each hashed table, a power of two", 2, 2 ** 30)
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    @classmethod
    def from_env(cls, env: dict[str, str]) -> Hyperparameters:
        """Typed, checked settings from `env`; UserError names the variable, its value, what it may hold."""
        return cls(**{f.name: parse_setting(f, env) for f in fields(cls) if f.name.upper() in env})
    def __post_init__(self) -> None:
        """Refuse settings that cannot work together, with the first rule that they break."""
        T, L, power = self.train_seq_len, self.num_layers, 1 << self.ngram_buckets.bit_length()
        whole, ve = self.train_batch_tokens // T * T, self.ve_layers if self.ve_enabled else ()
        for holds, names, rule in (
            (self.model_dim % self.num_heads == 0, "MODEL_DIM NUM_HEADS", "the heads must divide the width"),
            (self.num_heads % self.num_kv_heads == 0, "NUM_HEADS NUM_KV_HEADS", "the latter must divide"),
            (self.rope_dims in range(0, self.head_dim + 1, 2), "ROPE_DIMS",
             f"expected an even number up to the head width MODEL_DIM/NUM_HEADS = {self.head_dim}"),
            (self.mlp_mult * self.model_dim >= 1, "MLP_MULT", "the MLP would have no units"),
            (self.xsa_last_n <= L, "XSA_LAST_N NUM_LAYERS", "there are not so many layers"),
            (set(ve) <= set(range(L)), "VE_LAYERS", f"layers run from 0 to {L - 1}; or set VE_ENABLED=0"),
            (self.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE", "expected 0 (off) or at least 2"),
            (self.train_batch_tokens == whole, "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN",
             f"expected a multiple; nearest are {whole} and {whole + T}"),
            (self.eval_stride <= self.eval_seq_len, "EVAL_STRIDE EVAL_SEQ_LEN", "targets would go unscored"),
            (self.ngram_min_order <= self.ngram_order, "NGRAM_MIN_ORDER NGRAM_ORDER", "no order is left"),
            (self.ngram_counts == "exact" or self.ngram_alpha != "online" and self.ngram_order <= 7,
             "NGRAM_COUNTS NGRAM_ALPHA NGRAM_ORDER", "hashed counts need alpha entropy or order, order <= 7"),
            (2 * self.ngram_buckets == power, "NGRAM_BUCKETS", f"expected a power of two, such as {power}"),
            (self.alpha_min <= self.alpha_max < 1, "ALPHA_MIN ALPHA_MAX", "expected the first <= second < 1"),
        ):
            require(holds, ", ".join(f"{n}={self.as_env()[n]}" for n in names.split()) + f": {rule}")
    def as_env(self) -> dict[str, str]:
        """All settings as they would be written in the environment."""
        return {name.upper(): ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                for name, value in vars(self).items()}
PARSERS = {  # by the type of a setting's default: how to read it, what to expect
    str: (str, "text"), int: (int, "an integer"), float: (float, "a number"),
    bool: (lambda text: {"0": 0, "false": 0, "1": 1, "true": 1}[text.strip().lower()] == 1, "0 or 1"),
    tuple: (lambda text: tuple(int(i) for i in text.split(",") if i.strip()), "comma-separated integers")}
def parse_setting(f, env: dict[str, str]):
    """The value of field `f` in `env`: of the type of its default, finite, within its bounds."""
    (parse, expected), (_, low, high, choices) = PARSERS[type(f.default)], f.metadata.values()
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif low is not None:
        expected += f", at least {low}" if high == math.inf else f" from {low} to {high}"
    with contextlib.suppress(ValueError, KeyError):
        value = parse(text := env[f.name.upper()])
        if value in choices if choices else low is None or low <= value <= high and value < math.inf:
            return value
    raise UserError(f"{f.name.upper()}={text!r}: expected {expected} (default {f.default!r})")
def is_near(a: str, b: str, n: int) -> bool:
    """Can `n` insertions, deletions and changes of a letter turn `a` into `b`?"""
    if n < 0 or not a or not b:
        return len(a) + len(b) <= n
    return is_near(a[1:], b[1:], n - (a[0] != b[0])) or is_near(a[1:], b, n - 1) or is_near(a, b[1:], n - 1)
def mistyped(env: dict[str, str]) -> list[str]:
    """Warnings for environment names that are within edit distance 2 of settings but are none."""
    known = sorted(f.name.upper() for f in fields(Hyperparameters))
    meant = {name: " or ".join(k for k in known if is_near(name, k, 2)) for name in sorted({*env} - {*known})}
    return [f"{name} is set but is no setting; did you mean {k}?" for name, k in meant.items() if k]
# --- 2. Runtime ---------------------------------------------------------------------------------------------
# All that knows of other ranks: on one rank each method is the identity, so laptop and cluster run the same
# lines. What is on the CPU travels by gloo: agreeing on the clock never waits for a GPU.
REDUCE_SCATTER, ALL_GATHER = (getattr(dist, new, None) or getattr(dist, old) for new, old in (  # torch 2.13
    ("reduce_scatter_single", "reduce_scatter_tensor"), ("all_gather_single", "all_gather_into_tensor")))
class Runtime:
    """This process among torchrun's (in `env`), its device, its log: rank 0 opens a new logs/<run_id>.txt."""
    def __init__(self, run_id: str, env: dict[str, str]):
        self.rank, self.world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank, cuda = int(env.get("LOCAL_RANK", 0)), torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            gpus = torch.cuda.device_count()
            require(local_rank < gpus, f"LOCAL_RANK={local_rank}, {gpus} GPUs: set --nproc_per_node={gpus}")
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.stopped, self.patient = "", False  # the signal that came; it waits for the end of the step
        for number in (signal.SIGTERM, signal.SIGINT) if run_id else ():  # without it: no handlers, no log
            signal.signal(number, self.stop)
        self.log_path, self.unwritten, i = None, b"", 1
        while run_id and self.rank == 0 and not self.log_path:
            os.makedirs("logs", exist_ok=True)
            path, i = Path("logs", f"{run_id}_{i}.txt" if i > 1 else f"{run_id}.txt"), i + 1
            with contextlib.suppress(FileExistsError):
                self.log_file, self.log_path = path.open("xb", buffering=0), path
    def stop(self, number: int, frame) -> None:
        """On SIGTERM and SIGINT: training ends its step and leaves a checkpoint, all else ends here."""
        first, self.stopped = not self.stopped, signal.Signals(number).name
        if first and not self.patient:
            raise Stopped(f"stopped by {self.stopped}")
    def log(self, line: str, console: bool = True) -> None:
        """Rank 0 prints and writes `line` at once; what a full disk refuses is tried again with the next."""
        self.unwritten += f"{line}\n".encode() if self.log_path else b""
        with contextlib.suppress(OSError):  # of the console: it may be a file on that disk, or a closed pipe
            try:
                while self.unwritten:
                    self.unwritten = self.unwritten[self.log_file.write(self.unwritten):]
            except OSError as error:
                print(f"warning: {self.log_path}: {error.strerror}; the run goes on", file=sys.stderr)
            if console and self.log_path:
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
        return self.sum(x if self.rank == 0 else x.zero_())
    def start(self, collective, x: Tensor, rows: int):
        """A function that waits for the `rows` rows that `collective` makes of `x`. To be called once."""
        if self.world_size == 1:
            return lambda: x
        out = x.new_empty(rows, *x.shape[1:])
        work = collective(out, x, async_op=True)
        return lambda: (work.wait(), out)[1]
    def compare(self, facts: dict[str, object]) -> None:
        """UserError that names the ranks whose `facts` are not rank 0's."""
        for name, fact in facts.items():
            column = self.agree(*np.eye(self.world_size)[self.rank] * zlib.crc32(repr(fact).encode()))
            if odd := [str(rank) for rank, checksum in enumerate(column) if checksum != column[0]]:
                raise UserError(f"rank {', '.join(odd)}: {name} differ from rank 0's: start the same files "
                                "with the same settings everywhere")
    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.agree(0)
    def close(self) -> None:
        """UserError: lines of the log that no later one could bring to the disk."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        require(not self.unwritten, f"{self.log_path}: no disk space for its last {len(self.unwritten)} "
                "bytes; free some and keep what was printed")
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
        elapsed = now - self.start
        line = f"{self.label} {share:.0%} elapsed:{elapsed:.0f}s left:{elapsed / (share or math.nan) - elapsed:.0f}s"
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
            "data/cached_challenge_fineweb.py, then set DATA_PATH and TOKENIZER_PATH")
def load_shard(path: Path) -> np.memmap:
    """The uint16 tokens of one shard, memory-mapped; UserError: it is none, of another version, or cut."""
    header, size = np.fromfile(path, "<i4", SHARD_HEADER), path.stat().st_size
    magic, version, count, *_ = *header.tolist(), 0, 0, 0
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or count < 1 or size != 4 * SHARD_HEADER + 2 * count:
        raise UserError(f"{path}: magic {magic}, version {version}, {count} tokens in {size} bytes; expected "
                        f"magic {SHARD_MAGIC}, version {SHARD_VERSION}, n in 1024 + 2 n bytes; {GET_DATA}")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (count,))
def find_shards(part: str, hp: Hyperparameters) -> list[Path]:
    """All shards of `part` (train or val), in order; UserError: none in its folder."""
    name = "train_data_path" if part == "train" and hp.train_data_path else "data_path"
    paths = sorted(Path(folder := getattr(hp, name)).glob(f"fineweb_{part}_*.bin"))
    require(bool(paths), f"{name.upper()}={folder}: no fineweb_{part}_*.bin there; {GET_DATA}")
    return paths
def check_tokens(tokens: np.ndarray, vocab_size: int, source: str | Path) -> np.ndarray:
    """`tokens` themselves; UserError: one is outside of the vocabulary."""
    require((largest := tokens.max(initial=0)) < vocab_size, f"{source}: holds token {largest}, but "
            f"VOCAB_SIZE={vocab_size}: data and VOCAB_SIZE must come from the same tokenizer")
    return tokens
def load_validation(hp: Hyperparameters) -> np.ndarray:
    """The whole validation stream x_0 ... x_N as uint16: the memory map itself when it is one shard."""
    shards = [check_tokens(load_shard(path), hp.vocab_size, path) for path in find_shards("val", hp)]
    stream = shards[0] if len(shards) == 1 else np.concatenate(shards)
    require(len(stream) > hp.eval_seq_len, f"DATA_PATH={hp.data_path}: the validation stream has {len(stream)} tokens, "
            f"a window needs {hp.eval_seq_len + 1}: set EVAL_SEQ_LEN to at most {len(stream) - 1}")
    return stream
class TokenLoader:
    """All training shards as one circular stream, read in lanes: sequence i of S starts at i/S of it and goes
    on by T tokens a step: a batch holds S places, S lanes read all once. Rank r has its r-th share."""
    def __init__(self, hp: Hyperparameters, rank: int, world_size: int):
        self.hp, self.rank, self.paths = hp, rank, find_shards("train", hp)
        self.shards = [load_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.tokens, self.sequences = int(self.ends[-1]), hp.train_batch_tokens // hp.train_seq_len
        fits = [n for n in range(1, self.sequences + 1) if self.sequences % n == 0]
        near = sorted(fits, key=lambda n: max(n / world_size, world_size / n))[:2]
        require(world_size in fits, f"{world_size} ranks cannot share TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN = "
                f"{self.sequences} sequences equally: start {' or '.join(map(str, near))} ranks")
        self.share, most = self.sequences // world_size, max(1, hp.micro_batch_tokens // hp.train_seq_len)
        self.accumulation = self.share // next(n for n in range(most, 0, -1) if self.share % n == 0)
    def span(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the circular stream from `start`, as int64."""
        i = int(np.searchsorted(self.ends, at := start % self.tokens, "right"))
        part = self.shards[i][at - int(self.ends[i]):][:count]  # counted from the shard's end
        head = check_tokens(part, self.hp.vocab_size, self.paths[i]).astype(np.int64)
        return head if len(head) == count else np.append(head, self.span(start + len(head), count - len(head)))
    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of a micro-batch of step `step`, both (B, T) int64 on the CPU."""
        T, rows = self.hp.train_seq_len, self.share // self.accumulation
        first = self.rank * self.share + micro * rows
        starts = (lane * self.tokens // self.sequences + step * T for lane in range(first, first + rows))
        ids = torch.from_numpy(np.stack([self.span(start, T + 1) for start in starts]))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
def fingerprint(hp: Hyperparameters) -> list[tuple]:
    """(name, bytes, CRC-32 of the first 64 KB) of every data file, so that ranks can compare theirs."""
    paths = [Path(hp.tokenizer_path), *find_shards("val", hp), *([] if hp.eval_only else find_shards("train", hp))]
    return [(path.name, path.stat().st_size, zlib.crc32(path.open("rb").read(1 << 16))) for path in paths]
class ByteCounter:
    """UTF-8 bytes of each target, from the tokenizer's pieces (the challenge's definition of a byte)."""
    def __init__(self, hp: Hyperparameters):
        from sentencepiece import SentencePieceProcessor
        name, sp, ids = f"TOKENIZER_PATH={hp.tokenizer_path}", SentencePieceProcessor(), range(hp.vocab_size)
        try:
            sp.Load(hp.tokenizer_path)
        except (RuntimeError, OSError, ValueError):
            raise UserError(f"{name}: no such file or not a SentencePiece model; {GET_DATA}") from None
        require(sp.vocab_size() == hp.vocab_size, f"{name}: has {sp.vocab_size()} pieces, but VOCAB_SIZE="
                f"{hp.vocab_size}: set VOCAB_SIZE={sp.vocab_size()} or name the data's own tokenizer")
        self.is_text = np.array([not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)) for i in ids])
        pieces = [sp.id_to_piece(i) * bool(self.is_text[i]) for i in ids]
        self.opens_word = np.array([piece.startswith("\u2581") for piece in pieces])
        self.length = np.uint16([1 if sp.is_byte(i) else len(pieces[i].replace("\u2581", "").encode()) for i in ids])
    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes (uint16) of each target of the stream `tokens`; a word's space counts only after text."""
        return self.length[tokens[1:]] + (self.opens_word[tokens[1:]] & self.is_text[tokens[:-1]])
# --- 4. Kernels ---------------------------------------------------------------------------------------------
# What is elementwise the compiler fuses, but not into a product, and to it a loss is several passes. Each op
# has its plain form beside it, which runs on a CPU and where Triton is missing or the op's switch off.
jit = triton.jit if triton else lambda kernel: kernel
def has_kernels(x: Tensor) -> bool:
    return triton is not None and x.is_cuda
def kernel_op(fake):
    """A function that launches kernels becomes an op of torch.library; to torch.compile it is what `fake` is."""
    def register(launch):
        (op := torch.library.custom_op(f"golf::{launch.__name__}", launch, mutates_args=())).register_fake(fake)
        return op
    return register
def mlp(x_ND: Tensor, fc_WD: Tensor, proj_DW: Tensor, slope: float) -> Tensor:
    """leaky_relu(x fc', slope)^2 proj'"""
    return F.linear(F.leaky_relu(F.linear(x_ND, fc_WD), slope).square(), proj_DW)
@jit
def mlp_kernel(a_ptr, b_ptr, z_ptr, out_ptr, M, N, K, stride_k, stride_n, slope,
               BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile of P = a b, (M, K) (K, N), and what the MLP makes of it while it is in registers. Forward: z = P
    and out = leaky_relu(z)^2. Backward: P is the gradient of that, z is given, out = the gradient of z."""
    tile, tiles = tl.program_id(0), tl.cdiv(N, BN)  # neighbours share rows of a, and b stays in the cache
    m = (tile // tiles * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    n = (tile % tiles * BN + tl.arange(0, BN))[None, :]
    product, at, inside = tl.zeros((BM, BN), tl.float32), m * N + n, (m < M) & (n < N)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m * K + k[None, :], (m < M) & (k[None, :] < K), 0.0)
        b = tl.load(b_ptr + k[:, None] * stride_k + n * stride_n, (k[:, None] < K) & (n < N), 0.0)
        product = tl.dot(a, b, product)
    z = tl.load(z_ptr + at, inside, 0.0) if BACKWARD else product.to(z_ptr.dtype.element_ty)
    if not BACKWARD:
        tl.store(z_ptr + at, z, inside)
    z = z.to(tl.float32)  # rounded forward too, as backward will read it
    tl.store(out_ptr + at, z * tl.where(z > 0, 1.0, slope * slope) * (2 * product if BACKWARD else z), inside)
MLP_TILE = dict(BM=128, BN=256, BK=64, num_warps=8, num_stages=3)  # for Hopper: 147 KB of shared memory
def launch_mlp(a_MK: Tensor, b_KN: Tensor, z_MN: Tensor, slope: float, backward: bool) -> Tensor:
    sizes, out_MN = (*z_MN.shape, len(b_KN)), torch.empty_like(z_MN)
    tile = dict(MLP_TILE, BN=64) if z_MN.is_cuda and torch.cuda.get_device_capability()[0] not in (9, 10) else MLP_TILE
    grid = triton.cdiv(sizes[0], tile["BM"]) * triton.cdiv(sizes[1], tile["BN"]),
    mlp_kernel[grid](a_MK.contiguous(), b_KN, z_MN, out_MN, *sizes, *b_KN.stride(), slope, backward, **tile)
    return out_MN
@kernel_op(lambda x, fc, proj, slope: (x.new_empty(x.shape), *(x.new_empty(len(x), len(fc)) for _ in "zh")))
def fused_mlp(x_ND: Tensor, fc_WD: Tensor, proj_DW: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """(`mlp` of x, and for backward z = x fc' and h = leaky_relu(z)^2); the idea is modded-nanogpt's."""
    h = launch_mlp(x_ND, fc_WD.mT, z := x_ND.new_empty(len(x_ND), len(fc_WD)), slope, False)
    return h @ proj_DW.mT, z, h
@kernel_op(lambda g, proj, z, slope: z.new_empty(z.shape))
def fused_mlp_backward(g_ND: Tensor, proj_DW: Tensor, z_NW: Tensor, slope: float) -> Tensor:
    """z's gradient, from that of the result."""
    return launch_mlp(g_ND, proj_DW, z_NW.contiguous(), slope, True)
def keep(ctx, inputs, output) -> None:
    *tensors, ctx.number = inputs
    ctx.save_for_backward(*tensors, *(output[1:] if isinstance(output, tuple) else ()))
def mlp_gradients(ctx, g_ND: Tensor, *_):
    x, fc, proj, z, h = ctx.saved_tensors
    dz = fused_mlp_backward(g_ND, proj, z, ctx.number)
    return dz @ fc, dz.mT @ x, g_ND.mT @ h, None
fused_mlp.register_autograd(mlp_gradients, setup_context=keep)
def softcap(z: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(z.float() / cap) if cap else z.float()
def token_scores(z_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """nll of the targets and entropy, nats, (2, N) float32, of softcapped logits z; in training nll only."""
    logp_NV = F.log_softmax(softcap(z_NV, cap), -1)
    nll_N, learns = F.nll_loss(logp_NV, targets_N, reduction="none"), torch.is_grad_enabled()
    return nll_N[None] if learns else torch.stack((nll_N, -(logp_NV.exp() * logp_NV).sum(-1)))
@jit
def scores_kernel(z_ptr, target_ptr, upstream_ptr, out_ptr, N, V, cap, CAPPED: tl.constexpr,
                  BACKWARD: tl.constexpr, BV: tl.constexpr):
    """A row of logits in registers: its nll and entropy or, backward, given their gradients, its gradient."""
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    z, target = tl.load(z_ptr + row * V + v, v < V, 0.0).to(tl.float32), tl.load(target_ptr + row)
    tanh = 2 * tl.sigmoid(2 * z / cap) - 1 if CAPPED else z
    logits = tl.where(v < V, cap * tanh if CAPPED else z, -float("inf"))
    logits -= tl.max(logits, 0)
    e = tl.exp(logits)
    total = tl.sum(e, 0)
    p, logp = e / total, tl.where(v < V, logits - tl.log(total), 0.0)
    entropy = -tl.sum(p * logp, 0)
    if BACKWARD:
        dz = tl.load(upstream_ptr + row) * (p - tl.where(v == target, 1.0, 0.0))
        dz -= tl.load(upstream_ptr + N + row) * p * (logp + entropy)
        tl.store(out_ptr + row * V + v, dz * (1 - tanh * tanh) if CAPPED else dz, v < V)
    else:
        tl.store(out_ptr + row, -tl.sum(tl.where(v == target, logp, 0.0), 0))
        tl.store(out_ptr + N + row, entropy)
@kernel_op(lambda z, targets, upstream, cap: z.new_empty(z.shape) if upstream.numel() else z.new_empty(
    2, len(z), dtype=torch.float32))
def fused_token_scores(z_NV: Tensor, targets_N: Tensor, upstream_2N: Tensor, cap: float) -> Tensor:
    """`token_scores`, reading the logits once, in their own precision, and writing nothing of V numbers; or, if
    `upstream` is not empty but the gradient of that, the gradient of z."""
    (N, V), backward, block = z_NV.shape, upstream_2N.numel() > 0, triton.next_power_of_2(z_NV.size(1))
    out = z_NV.new_empty(N, V) if backward else z_NV.new_empty(2, N, dtype=torch.float32)
    scores_kernel[(N,)](z_NV.contiguous(), targets_N, upstream_2N.contiguous(), out, N, V, cap or 1.0, cap > 0,
                        backward, block, num_warps=min(max(block // 256, 1), 16))
    return out
def scores_gradients(ctx, upstream_2N: Tensor):
    z, targets, _ = ctx.saved_tensors
    return fused_token_scores(z, targets, upstream_2N, ctx.number), None, None, None
fused_token_scores.register_autograd(scores_gradients, setup_context=keep)
def find_flash_attention():
    """(name, function) of the fastest attention that is installed and runs here, or (name, None): torch's."""
    for version, module, needed in ((3, "flash_attn_interface", 9), (2, "flash_attn", 8)):
        with contextlib.suppress(ImportError):
            if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= needed:
                return f"flash_attention_{version}", importlib.import_module(module).flash_attn_func
    return "sdpa", None
def causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, flash=None) -> Tensor:
    """softmax(q k' / sqrt K) v up to one's own position, B T H K, H/G heads share k, v; queries: all or the last."""
    if flash and q_BTHK.is_cuda:
        y = flash(q_BTHK, k_BTGK, v_BTGK, causal=True)
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    S, T = q.size(2), k.size(2)
    k, v = (x if S == T else x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))  # fast masks know no GQA
    seen_ST = None if S == T else torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    return F.scaled_dot_product_attention(q, k, v, seen_ST, is_causal=S == T,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)
# --- 5. Model -----------------------------------------------------------------------------------------------
# Master weights are float32; every op follows the dtype of the residual stream: no autocast. GQA 2305.13245, RoPE
# 2104.09864, QK-norm 2302.05442, VRL 2410.17897, XSA, SmearGate: PR #889, skips and x0 mixes: modded-nanogpt.
def working_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.is_cuda else torch.float32
def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))
class Linear(nn.Linear):
    """Float32 weights, computed in the dtype of the input. A factor of the outputs multiplies the weights: it
    is the same, but neither it nor its gradient takes a pass over all tokens."""
    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return F.linear(x, self.matrix(x.dtype, factor))
    def matrix(self, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
        return (self.weight if factor is None else self.weight * factor).to(dtype)
def rotary_tables(T: int, hp: Hyperparameters, device=None) -> Tensor:
    """cos and sin, (2, T, 1, ROPE_DIMS/2) float32; beyond 1024 positions the base grows (NTK-aware)."""
    r = hp.rope_dims
    base = hp.rope_base * (T / 1024) ** (r / (r - 2)) if T > 1024 and r > 2 else hp.rope_base
    frequency = base ** -(torch.arange(0, r, 2, dtype=torch.float32, device=device) / max(r, 1))
    angle = torch.outer(torch.arange(T, dtype=torch.float32, device=device), frequency)[:, None, :]
    return torch.stack((angle.cos(), angle.sin()))
def rotate(x_BTHK: Tensor, rope: Tensor) -> Tensor:
    """RoPE on the first 2 * rope width of K, in half-split pairs; the other dimensions carry no position."""
    cos, sin = rope
    a, b, rest = x_BTHK.tensor_split((cos.size(-1), 2 * cos.size(-1)), -1)
    rotated = torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(x_BTHK.dtype)
    return torch.cat((rotated, rest), -1)
def remove_own_value(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA: what a head reads must come from elsewhere: drop its component along its own position's value."""
    B, T, H, K = y_BTHK.shape
    y, v = y_BTHK.view(B, T, v_BTGK.size(2), -1, K), F.normalize(v_BTGK, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).view(B, T, H, K)
class Attention(nn.Module):
    def __init__(self, hp: Hyperparameters, layer: int, flash):
        super().__init__()
        self.heads, self.flash = (hp.num_heads, hp.num_kv_heads, hp.head_dim), flash
        D, (H, G, K) = hp.model_dim, self.heads
        self.q, self.k, self.v = (Linear(D, heads * K, bias=False) for heads in (H, G, G))
        self.proj, self.q_gain = Linear(H * K, D, bias=False), nn.Parameter(torch.full((H,), hp.qk_gain_init))
        self.xsa = layer >= hp.num_layers - hp.xsa_last_n
        self.ve_scale = nn.Parameter(torch.ones(())) if hp.ve_enabled and layer in hp.ve_layers else None
        self.vrl_gate = nn.Parameter(torch.tensor(-1.5)) if hp.vrl_enabled and layer else None
    def forward(self, x_BTD: Tensor, scale_D: Tensor, rope, ve_BTGK, v_first_BTGK, last: int):
        """(B, `last` positions, D) out, and this layer's values before any change (v_first of the others)."""
        (B, T, _), (H, G, K) = x_BTD.shape, self.heads
        q = norm(self.q(x_BTD[:, -last:]).view(B, last, H, K)) * self.q_gain.to(x_BTD.dtype)[:, None]
        q = rotate(q, rope[:, -last:])  # after the gain, which so costs no pass of its own
        k = rotate(norm(self.k(x_BTD).view(B, T, G, K)), rope)
        v_own = v = self.v(x_BTD).view(B, T, G, K)
        if self.ve_scale is not None:
            v = v + self.ve_scale.to(v.dtype) * ve_BTGK
        if self.vrl_gate is not None:
            v = torch.lerp(v, v_first_BTGK, torch.sigmoid(self.vrl_gate).to(v.dtype))
        y = causal_attention(q, k, v, self.flash)
        y = remove_own_value(y, v[:, -last:]) if self.xsa else y
        return self.proj(y.reshape(B, last, H * K), scale_D[:, None]), v_own
class MLP(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        D, width = hp.model_dim, int(hp.mlp_mult * hp.model_dim)
        self.slope, self.fused = hp.leaky_slope, hp.fused_mlp
        self.fc, self.proj = Linear(D, width, bias=False), Linear(width, D, bias=False)
    def forward(self, x_BTD: Tensor, scale_D: Tensor) -> Tensor:
        fc, proj = self.fc.matrix(x_BTD.dtype), self.proj.matrix(x_BTD.dtype, scale_D[:, None])
        if self.fused and has_kernels(x_BTD):
            return fused_mlp(x_BTD.flatten(0, 1), fc, proj, self.slope)[0].view_as(x_BTD)
        return mlp(x_BTD, fc, proj, self.slope)
class Block(nn.Module):
    def __init__(self, hp: Hyperparameters, layer: int, flash):
        super().__init__()
        self.attn, self.mlp = Attention(hp, layer, flash), MLP(hp)
        self.mix_x, self.mix_x0, self.attn_scale, self.mlp_scale = (
            nn.Parameter(torch.full((hp.model_dim,), value)) for value in (1.0, 0.0, 1.0, 1.0))
        self.norm_scale = (layer + 1) ** -0.5 if hp.ln_scale else 1.0
    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, rope, ve_BTGK, v_first_BTGK, last: int):
        x = self.mix_x.to(x_BTD.dtype) * x_BTD + self.mix_x0.to(x_BTD.dtype) * x0_BTD
        y, v = self.attn(norm(x) * self.norm_scale, self.attn_scale, rope, ve_BTGK, v_first_BTGK, last)
        x = x[:, -last:] + y
        return x + self.mlp(norm(x) * self.norm_scale, self.mlp_scale), v
def bigram_rows(ids_BT: Tensor, rows: int) -> Tensor:
    """A row for each token with the one before it: a hash, collisions are harmless; the first: the last."""
    pair = (36313 * ids_BT[:, 1:]) ^ (27191 * ids_BT[:, :-1])
    return F.pad(pair % (rows - 1), (1, 0), value=rows - 1)
class NarrowEmbedding(nn.Module):
    """A table of `width` columns, projected to `out` and scaled."""
    def __init__(self, rows: int, width: int, out: int, scale: float):
        super().__init__()
        self.table, self.proj = nn.Embedding(rows, width), Linear(width, out, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))
    def forward(self, rows_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table(rows_BT).to(dtype), self.scale)
class GPT(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, D, V, L, rows = hp, hp.model_dim, hp.vocab_size, hp.num_layers, hp.bigram_vocab_size
        values = hp.num_kv_heads * hp.head_dim if hp.ve_enabled and hp.ve_layers else 0
        skips = L // 2 if hp.unet_skips else 0
        self.attention_name, flash = find_flash_attention()
        self.embed = nn.Embedding(V, D)
        self.bigram = NarrowEmbedding(rows, hp.bigram_dim, D, 0.05) if rows else None
        self.smear_gate = nn.Parameter(torch.zeros(D)) if hp.smear_enabled else None
        self.value_embed = NarrowEmbedding(V, hp.ve_dim, values, 0.1) if values else None
        self.blocks = nn.ModuleList(Block(hp, layer, flash) for layer in range(L))
        self.skip_weights = nn.Parameter(torch.ones(skips, D)) if skips else None
        self.head = None if hp.tie_embeddings else Linear(D, V, bias=False)
        for T in {hp.train_seq_len, hp.eval_seq_len}:  # else compiled code computes them at each use
            self.register_buffer(f"rope_{T}", rotary_tables(T, hp), persistent=False)
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
    def forward(self, ids_BT: Tensor, targets_BT=None, weights_BT=None, last: int = 0) -> Tensor:
        """Hidden states (B, T, D), or of the `last` positions only, which then are the last block's only
        queries; with targets their mean loss in nats, with weights the weighted sum."""
        x = self.embed(ids_BT)
        if self.bigram is not None:
            x = x + self.bigram(bigram_rows(ids_BT, self.hp.bigram_vocab_size), x.dtype)
        x = norm(x).to(working_dtype(x))
        if self.smear_gate is not None:
            x = torch.lerp(x, F.pad(x, (0, 0, 1, 0))[:, :-1], torch.sigmoid(self.smear_gate).to(x.dtype))
        x0, v_first, skips, L, T = x, None, [], self.hp.num_layers, ids_BT.size(1)
        rope = self.get_buffer(f"rope_{T}") if hasattr(self, f"rope_{T}") else rotary_tables(T, self.hp, x.device)
        if (ve := self.value_embed) is not None:
            ve = ve(ids_BT, x.dtype).unflatten(-1, (-1, self.hp.head_dim))
        for layer, block in enumerate(self.blocks):
            if self.skip_weights is not None and layer >= L // 2 and skips:
                x = x + self.skip_weights[layer - L // 2].to(x.dtype) * skips.pop()
            x, v = block(x, x0, rope, ve, v_first, last if last and layer == L - 1 else T)
            v_first = v if layer == 0 else v_first
            if layer < L // 2:
                skips.append(x)
        if targets_BT is None:
            return x
        nll_N = self.scores(x.flatten(0, 1), targets_BT.ravel())[0]
        return nll_N.mean() if weights_BT is None else (nll_N * weights_BT.ravel()).sum()
    def logits(self, hidden_D: Tensor) -> Tensor:
        """(..., D) -> (..., V), before the softcap."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(norm(hidden_D), weight.to(hidden_D.dtype))
    def scores(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """nll of the targets and entropy, nats, (2, N) float32; with gradients on the plain form gives nll only."""
        z_NV = self.logits(hidden_ND)
        if self.hp.fused_loss and has_kernels(z_NV):
            return fused_token_scores(z_NV, targets_N, z_NV.new_empty(0), self.hp.logit_softcap)
        return token_scores(z_NV, targets_N, self.hp.logit_softcap)
# --- 6. Optimizer -------------------------------------------------------------------------------------------
# Muon (Jordan et al. 2024), whose update is the momentum made orthogonal, for matrices; AdamW for the rest.
def orthogonalize(G_NRC: Tensor, steps: int) -> Tensor:
    """Nearly the orthogonal factor U V' of each wide matrix U S V': singular values come out in [0.7, 1.2]. A
    quintic Newton-Schulz iteration, tuned for speed at zero, not convergence to one. bfloat16 on CUDA."""
    (a, b, c), X = (3.4445, -4.7750, 2.0315), G_NRC.to(working_dtype(G_NRC))
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X
class Muon(torch.optim.Optimizer):
    """One group per shape: a stack, tall matrices transposed, for one batched iteration. Of each stack (zeros
    fill it up) a rank owns an equal share: gets these gradients' sums, keeps their momentum, sends updates."""
    def __init__(self, matrices: list[nn.Parameter], hp: Hyperparameters, rt: Runtime):
        self.rt, stacks = rt, {}
        for p in matrices:
            stacks.setdefault(tuple(sorted(p.shape)), []).append(p)
        groups = [dict(params=same, buffer=matrices[0].new_zeros(len(same), *shape))
                  for shape, same in sorted(stacks.items())]
        super().__init__(groups, dict(lr=hp.matrix_lr, initial_lr=hp.matrix_lr, weight_decay=hp.muon_wd,
                                      momentum=hp.muon_momentum_warmup_start, steps=hp.muon_backend_steps))
    def own(self, stack: Tensor) -> Tensor:
        """This rank's share of a whole stack, as a view; the last ranks' may be short, or empty."""
        share = -(-len(stack) // self.rt.world_size)
        return stack[self.rt.rank * share:][:share]
    def send_gradients(self):
        """Per stack a function that waits for this rank's share, (share, R, C), of the sum over the ranks."""
        ranks = self.rt.world_size
        for group in self.param_groups:
            wide = [p.grad.mT if p.size(0) > p.size(1) else p.grad for p in group["params"]]
            wide += [torch.zeros_like(wide[0])] * (-len(wide) % ranks)
            yield self.rt.start(REDUCE_SCATTER, torch.stack(wide), len(wide) // ranks)
    def send_updates(self, shares: list[Tensor]):
        """Per stack a function that waits for all its orthogonal updates, (N, R, C)."""
        for group, grads_NRC in zip(self.param_groups, shares):
            buffer_NRC = self.own(group["buffer"])
            ours = grads_NRC[:len(buffer_NRC)]
            ours.add_(buffer_NRC.mul_(group["momentum"]).add_(ours), alpha=group["momentum"])  # Nesterov
            update_NRC = orthogonalize(grads_NRC, group["steps"])
            yield self.rt.start(ALL_GATHER, update_NRC, len(update_NRC) * self.rt.world_size)
    def step(self, sent: list) -> None:
        for group, updates in zip(self.param_groups, sent):
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(group["params"], updates()):
                R, C = p.shape
                p.sub_(update.mT if R > C else update, alpha=group["lr"] * max(1, R / C) ** 0.5)
def build_optimizers(model: GPT, hp: Hyperparameters, rt: Runtime) -> tuple[Muon, torch.optim.AdamW]:
    """Together they hold every parameter exactly once: Muon the matrices but tables and head."""
    table_lr, groups = hp.tied_embed_lr if hp.tie_embeddings else hp.embed_lr, {}
    for name, p in model.named_parameters():
        lr = (table_lr if name.endswith(("table.weight", "embed.weight")) else
              hp.head_lr if name == "head.weight" else "muon" if name.endswith(".weight") else hp.scalar_lr)
        groups.setdefault(lr, []).append(p)
    muon = Muon(groups.pop("muon"), hp, rt)
    adam = torch.optim.AdamW([dict(params=same, lr=lr, initial_lr=lr) for lr, same in groups.items()],
                             betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, weight_decay=hp.adam_wd, fused=True)
    owned = [*map(id, chain(*(group["params"] for group in muon.param_groups + adam.param_groups)))]
    assert sorted(owned) == sorted(map(id, model.parameters())), "a parameter without exactly one optimizer"
    for p in chain(*groups.values()):  # as at its first step: a checkpoint fills it before
        adam.state[p] = dict(step=p.new_zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return muon, adam
@torch.no_grad()
def update(muon: Muon, adamw: torch.optim.AdamW, rt: Runtime, clip: float) -> None:
    """A step on the ranks' summed gradients, of norm at most `clip`; Muon's updates travel while AdamW works."""
    grads, sent = [p.grad for group in adamw.param_groups for p in group["params"]], [*muon.send_gradients()]
    flat = rt.sum(nn.utils.parameters_to_vector(grads))
    shares = [arrived() for arrived in sent]
    if clip:
        squares = rt.sum(sum(share.square().sum() for share in shares)) + flat.square().sum()
        torch._foreach_mul_([flat, *shares], (clip / (squares.sqrt() + 1e-6)).clamp_max(1))
    sent = [*muon.send_updates(shares)]
    nn.utils.vector_to_parameters(flat, grads)
    adamw.step()
    muon.step(sent)
def ttt_scale(done: float) -> float:
    """Factor of TTT_LR at a share `done` of the stream: by cosine to 0, times 1 to 3 over the first 30 %."""
    return (1 + 2 * min(1.0, done / 0.3)) * (1 + math.cos(math.pi * done)) / 2
def lr_scale(step: int, seconds: float, hp: Hyperparameters) -> float:
    """1, then linearly to 0 over the last WARMDOWN_ITERS steps before ITERATIONS or the cap, at this speed."""
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
        self.decay, self.count = decay, torch.zeros((), dtype=torch.int64)
        self.mean = [torch.zeros_like(p) for p in parameters]
    @torch.no_grad()
    def update(self, parameters: list[Tensor]) -> None:
        n = int(self.count.add_(1))
        weight = (1 - self.decay) / (1 - self.decay ** n) if self.decay < 1 else 1 / n
        torch._foreach_lerp_(self.mean, parameters, weight)
def averaged_parameters(averages: dict[str, WeightAverage]) -> list[Tensor]:
    """A mean, or the middle of both; none: the last weights are it (AVERAGING=none, or SWA never began)."""
    return [torch.stack(same).mean(0) for same in zip(*(a.mean for a in averages.values() if a.count))]
# --- 8. Artifact --------------------------------------------------------------------------------------------
# A matrix becomes codes in +-levels and a step per row (GPTQ-lite). rANS (Duda 1311.2540), its tables chosen by
# the spread of row and column, gets below the codes' zeroth-order entropy. A file holds numbers: see `pack`.
need = functools.partial(require, kind=ValueError)
MAGIC, TABLES, SCALE = b"PGOLF\x03", 64, 14  # a table's frequencies sum to 2^SCALE
MOST_WEIGHTS, MOST_SIDE = 1 << 28, 1 << 24   # a file that claims more is refused before it is allocated
LZMA = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=1 << 20, pb=0)])
def quantize_rows(w_RC: Tensor, levels) -> tuple[Tensor, Tensor]:
    """Codes (R, C) in +-levels (<= 127, for all or per row) and bfloat16 steps (R, 1), both as float32: exact
    products. Per row the clip of least squared error becomes `levels`: a second pass changes nothing."""
    w, last = w_RC.float(), w_RC.size(-1) - 1
    ranks = [last - round(q * last) for q in (1.0, 0.998, 0.994)]  # the clips tried; 0: the largest magnitude
    clips = w.abs().topk(max(ranks) + 1).values[:, ranks].T[..., None]
    steps = (clips / levels).clamp_min(1e-30).bfloat16().float()
    errors = [((w / s).round().clamp(-levels, levels) * s - w).square().sum(-1, keepdim=True) for s in steps]
    step = steps.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
    return (w / step).round().clamp(-levels, levels), step
def natural_levels(name: str, tensor: Tensor, hp: Hyperparameters) -> int:
    """Largest code by kind: 127 for tables, 2^(QUANT_BITS-1) - 1 for other matrices; 0: not coded."""
    bits = 8 if name.endswith(("table.weight", "embed.weight", "head.weight")) else hp.quant_bits
    return 2 ** (bits - 1) - 1 if tensor.ndim == 2 and name.endswith(".weight") and tensor.numel() else 0
def soft_round(x: Tensor, hardness: Tensor) -> Tensor:
    """Differentiable rounding: nearly the identity for small `hardness`, `round` as it grows (2006.09952)."""
    low = x.detach().floor()
    return low + 0.5 + torch.tanh(hardness * (x - low - 0.5)) / (2 * torch.tanh(hardness / 2))
def fake_quantized(model: GPT, hp: Hyperparameters, hardness: Tensor) -> dict[str, Tensor]:
    """The artifact's matrices, with straight-through gradients; QAT_ROUNDING=soft: on their way there."""
    weights = {}
    for name, p in model.named_parameters():
        if levels := natural_levels(name, p, hp):
            codes, step = quantize_rows(p.detach(), levels)
            weights[name] = (p + (codes * step - p.detach()) if hp.qat_rounding == "straight"
                             else soft_round((p / step).clamp(-levels, levels), hardness) * step)
    return weights
def spread_classes(codes_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int16: 16 + 4 * log2 of the codes' spread, by row; by column, relative to the rows."""
    row = np.sqrt(np.square(codes_RC, dtype=np.float32).mean(1) + 0.03)
    column = np.sqrt(np.square(codes_RC / row[:, None]).mean(0) + 0.003)
    return tuple(np.rint(4 * np.log2(16 * x)).astype("<i2") for x in (row, column))
def rans_encode(pairs: np.ndarray) -> tuple[np.ndarray, bytes]:
    """(freq, coded) of int16 `pairs`, 256 * table + symbol: how often each came, as uint16 that sum to
    2^SCALE in a table, at least 1 for what came; and the steps of `rans_decode`, last to first."""
    count = np.bincount(pairs, minlength=256 * TABLES).reshape(TABLES, 256)
    spare, total = (1 << SCALE) - (count > 0).sum(1, keepdims=True), count.sum(1, keepdims=True)
    freq = (count > 0) + count * spare // np.maximum(total, 1)
    freq[np.arange(TABLES), freq.argmax(1)] += (1 << SCALE) - freq.sum(1)
    freq, lanes, words = freq.astype("<u2").ravel(), min(1024, 16 + (len(pairs) >> 12)), []
    start, x = np.cumsum(freq, dtype=np.uint32) - freq, np.full(lanes, 1 << 16, "<u4")
    for i in reversed(range(0, len(pairs), lanes)):
        y, pair = x[:len(pairs) - i], pairs[i: i + lanes]
        full = y >> (32 - SCALE) >= freq[pair]
        words.append(y[full].astype("<u2"))
        quotient, rest = np.divmod(np.where(full, y >> 16, y), freq[pair])
        y[:] = (quotient << SCALE) + rest + start[pair] % (1 << SCALE)
    return freq, b"".join([x, *reversed(words)])
def rans_decode(coded: bytes, table: np.ndarray, freq: np.ndarray) -> np.ndarray:
    """The symbols (uint8) of the pairs, given the `table` of each."""
    start, owner = np.cumsum(freq, dtype=np.uint32) - freq, np.repeat(np.arange(len(freq), dtype="<u2"), freq)
    symbols, lanes = np.empty(len(table), np.uint8), min(1024, 16 + (len(table) >> 12))
    x, words = np.frombuffer(coded, "<u4", lanes).copy(), np.frombuffer(coded, "<u2", offset=4 * lanes)
    for i in range(0, len(table), lanes):
        y = x[:len(table) - i]
        slot = table[i: i + lanes].astype(np.uint32) << SCALE | y & ((1 << SCALE) - 1)
        pair = owner[slot]
        symbols[i: i + lanes], y[:] = pair & 255, freq[pair] * (y >> SCALE) + slot - start[pair]
        low = np.flatnonzero(y < 1 << 16)
        need(len(low) <= len(words), "codes end early")
        y[low], words = y[low] << 16 | words[:len(low)], words[len(low):]
    need(not len(words) and (x == 1 << 16).all(), "codes do not end where they should")
    return symbols
def pack(state: dict[str, Tensor], hp: Hyperparameters, coarsen: float = 1.0) -> tuple[bytes, str, float]:
    """(container, bytes by kind of matrix, relative error). `coarsen` divides all levels, rounded up in some rows, down
    in others: sizes move by single rows. UserError: NaN, infinity, too large. Little-endian layout:
        "PGOLF" 3 | SHA-256 of the rest | u32 size of side stream | side stream, LZMA2 | rANS words
    Side stream: per tensor a line `name coded(0, 1) dimensions ...`, whose order all follows; a zero; then 16-bit
    numbers, low bytes first, then high ones: 256 frequencies for each of the 64 tables; spread classes of all rows,
    then columns (a code's table: row + column - 16, clipped to 0 ... 63); per tensor the bfloat16 steps of its rows if
    coded, else its float16 values. A weight is code * step. rANS words: u32 states of min(1024, 16 + symbols // 4096)
    lanes, then u16. Symbol i, code + 128, is in lane i % lanes, whose state x has x % 2^14 in symbol s of its table: x
    = f[s] * (x >> 14) + x % 2^14 - sum(f[:s]); if that is below 2^16, x = x << 16 | next word. All end at 2^16."""
    text, classes, numbers, pairs, squares = "", [], [], {}, np.array((0.0, 1e-300))  # what is lost, what was
    for name, tensor in state.items():
        w, natural = tensor.detach().float().cpu().contiguous(), natural_levels(name, tensor, hp)
        if not (w.abs() <= (1e30 if natural else 65504)).all():
            raise UserError(f"{name}: holds NaN, infinity or huge values; training diverged, lower the rates")
        text += " ".join(map(str, (name, int(natural > 0), *w.shape))) + "\n"
        if natural:
            dither = torch.arange(len(w), dtype=torch.float64)[:, None] * 0.6180339887498949 % 1
            codes, step = quantize_rows(w, (natural / coarsen + dither).floor().clamp(1, 127).float())
            squares += [float(x.square().sum(dtype=torch.float64)) for x in (codes * step - w, w)]
            classes.append(spread_classes(codes.numpy()))
            table = np.clip(np.add.outer(*classes[-1]) - 16, 0, TABLES - 1)
            pairs[name] = (table * 256 + codes.numpy().astype(np.int16) + 128).ravel()
        numbers.append((step.bfloat16().view(torch.int16) if natural else w.half()).numpy())
    freq, words = rans_encode(np.concatenate([np.empty(0, np.int16), *pairs.values()]))
    arrays = np.frombuffer(b"".join([freq, *chain(*zip(*classes)), *numbers]), np.uint8).reshape(-1, 2).T
    side = lzma.compress(text.encode() + b"\0" + arrays.tobytes(), **LZMA)
    body = len(side).to_bytes(4, "little") + side + words
    blob, bits = MAGIC + hashlib.sha256(body).digest() + body, SCALE - np.log2(np.maximum(freq, 1))
    sizes = dict(side=0, embeddings=0, attention=0, mlp=0)
    for name, pair in pairs.items():
        kind = "attention" if ".attn." in name else "mlp" if ".mlp." in name else "embeddings"
        sizes[kind] += round(bits[pair].sum() / 8)
    sizes["side"] = len(blob) - sum(sizes.values())
    return blob, " ".join(f"{kind}:{size}" for kind, size in sizes.items()), math.sqrt(np.divide(*squares))
def unpack(blob: bytes) -> dict[str, Tensor]:
    """A container's state dict, float32; claims are checked before they allocate. ValueError: what fails."""
    try:
        need(blob[:6] == MAGIC, f"starts with {blob[:6]!r}, expected {MAGIC!r}: no artifact of this script")
        need(hashlib.sha256(blob[38:]).digest() == blob[6:38], "SHA-256 differs: cut or damaged")
        engine, end = lzma.LZMADecompressor(**LZMA), 42 + int.from_bytes(blob[38:42], "little")
        text, _, arrays = engine.decompress(blob[42: end], MOST_SIDE).partition(b"\0")
        need(engine.eof and not engine.unused_data, "a side stream that is cut or too long")
        need(len(text) < 1 << 20, "a tensor table that is too long")
        lines = [re.fullmatch(rb"([\w.]+) ([01])((?: \d{1,9}){0,4})", line) for line in text.splitlines()]
        need(all(lines), "a bad line in the tensor table")
        table, state = [(m[1].decode(), m[2] == b"1", [int(n) for n in m[3].split()]) for m in lines], {}
        need(len({name for name, *_ in table}) == len(table), "a name twice")
        need(all(len(shape) == 2 and min(shape) for _, coded, shape in table if coded), "codes of no matrix")
        need(sum(math.prod(shape) for *_, shape in table) <= MOST_WEIGHTS, "absurdly many weights")
        rows, columns = ([shape[axis] for _, coded, shape in table if coded] for axis in (0, 1))
        numbers = [shape[0] if coded else math.prod(shape) for _, coded, shape in table]
        sizes, R = np.array([256 * TABLES, *rows, *columns, *numbers]), len(rows)
        need(len(arrays) == 2 * sizes.sum(), "a side stream of another length")
        by_byte = np.frombuffer(arrays, np.uint8).reshape(2, -1)
        freq, *parts = np.split(by_byte.T.copy().view("<i2").ravel(), np.cumsum(sizes))
        need((freq.reshape(TABLES, 256).sum(1) == 1 << SCALE).all() and min(freq) >= 0, "bad frequencies")
        tables = [np.clip(x - 16, 0, TABLES - 1).ravel() for x in map(np.add.outer, parts[:R], parts[R:])]
        symbols = rans_decode(blob[end:], np.concatenate([*tables, parts[-1]]), freq.view("<u2"))  # + nothing
        for (name, coded, shape), number in zip(table, parts[2 * R:]):
            w = torch.from_numpy(number).view(torch.bfloat16 if coded else torch.float16).float()
            if coded:
                codes, symbols = np.split(symbols, [math.prod(shape)])
                w = (torch.from_numpy(codes).view(shape) - 128.0) * w[:, None]
            need(w.isfinite().all(), f"NaN or infinity in {name}")
            state[name] = w.view(shape)
        return state
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"artifact: {error}") from None
def fit_artifact(state: dict[str, Tensor], hp: Hyperparameters, budget: int) -> tuple[bytes, str]:
    """(container of at most `budget` bytes, two lines of facts). One scalar, found by packing, to within 4 KB,
    divides all levels: over 1 if bytes are few, with FILL_BUDGET under 1, up to 8 bits, if some are left."""
    count, before = max(1, sum(map(torch.numel, state.values()))), pack(state, hp)[2]
    natural, high, best = 2 ** (hp.quant_bits - 1) - 1, 254.0, None  # `best` is packed with `high`
    low = coarsen = (natural + 1) / 256 if hp.fill_budget else 1.0
    while high / low > 1 + 1e-7 and (best is None or len(best[0]) <= budget - 4096):
        packed = pack(state, hp, coarsen)
        over = len(packed[0]) - budget
        low, high, best = (coarsen, high, best) if over > 0 else (low, coarsen, packed)
        guess = coarsen * 2 ** min((over + 2000) * 8 / count, 8)  # a bit more halves the step
        coarsen = guess if low < guess < high else math.sqrt(low * high)
    if best is None:
        raise UserError(f"the artifact takes over {budget} bytes even with codes of +-1: lower NUM_LAYERS, "
                        "MODEL_DIM, MLP_MULT, VOCAB_SIZE or BIGRAM_VOCAB_SIZE")
    blob, sizes, error = best
    return blob, (f"coarsen:{high:.9f} error_before:{before:.6f} error_after:{error:.6f} bits_per_parameter:"
                  f"{8 * len(blob) / count:.4f} levels:{min(127, natural / high):.2f}\n{sizes}")
def write_artifact(model: GPT, path: Path, hp: Hyperparameters, rt: Runtime) -> None:
    """Rank 0 packs the model into `path`, <= SIZE_CAP bytes with this code. UserError: too big, disk full."""
    if rt.rank == 0:
        blob, facts = fit_artifact(model.state_dict(), hp, SIZE_CAP - (code := len(Path(__file__).read_bytes())))
        rt.log("fit_artifact " + facts.replace("\n", f"\nartifact_bytes code:{code} "))
        replace_file(path, lambda file: file.write(blob))
def load_artifact(model: GPT, path: Path, rt: Runtime) -> int:
    """All get rank 0's `path`; returns the bytes of code and artifact. UserError: none, damaged, another model."""
    code, blob, label = len(Path(__file__).read_bytes()), b"", f"int{model.hp.quant_bits}+rans"
    if rt.rank == 0:
        try:
            blob = path.read_bytes()
            model.load_state_dict(unpack(blob))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        except RuntimeError as error:
            raise UserError(f"{path}: is of another model than the settings (its log has those that it was "
                            f"trained with): {str(error).splitlines()[1].strip()}") from None
        rt.log(f"Serialized model {label}: {len(blob)} bytes\nCode size: {code} bytes\n"
               f"Total submission size {label}: {code + len(blob)} bytes")
    for p in model.parameters():
        rt.from_rank_0(p.data)
    return code + len(blob)
# --- 9. Neural scoring --------------------------------------------------------------------------------------
# Overlapping windows give every target a long context; the window that ends nearest after it scores it, once.
# Ranks share the windows, rank 0 gets nll[t] and entropy[t] in stream order.
SEGMENT_BATCHES, TTT_BATCH = 32, 32  # most global batches between two sums; sequences per step of learning
def windows(begin: int, end: int, length: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, first scored target, its end) per window of the targets [begin, end); target j is token j + 1,
    tokens [start, start + length) are read. The stream's first scores all, each other `stride` or the rest."""
    ends = np.minimum(np.arange(begin + stride if begin else length, end + stride, stride), end)
    return np.maximum(ends - length, 0), np.append(begin, ends[:-1]), ends
@torch.inference_mode()
def score_stream(trunk, model: GPT, tokens: np.ndarray, stride: int, rt: Runtime, part=None):
    """Yields (2, N) float32, nll and entropy in nats, of the targets [begin, end) = `part` or all, in growing
    segments; N = 0 on ranks but 0. `trunk`: the model, perhaps compiled. Only scored positions go all through."""
    hp, (begin, end) = model.hp, part or (0, len(tokens) - 1)
    length = min(hp.eval_seq_len, end)
    starts, first, ends = windows(begin, end, length, stride)
    batch, head_rows = max(1, hp.val_batch_size // (length * rt.world_size)), max(1, 2 ** 26 // hp.vocab_size)
    progress, done, batches = Progress(rt, f"scoring stride:{stride}", len(tokens) - 1), 0, 1
    while done < len(starts):
        segment = np.arange(done, min(done + batches * batch * rt.world_size, len(starts)))
        share, offset = np.array_split(segment, rt.world_size)[rt.rank], first[done]
        scores_2N = torch.zeros(2, ends[segment[-1]] - offset, device=rt.device)  # a rank fills its windows
        for i in range(0, len(share), batch):
            mine = share[i: i + batch]
            full = np.pad(mine, (0, batch - len(mine) if len(starts) > batch else 0), "edge")  # one shape
            at = starts[full][:, None] + np.arange(length)
            last = min(stride, length) if (starts + length - first)[full].max() <= stride else length
            run = trunk if last < length else model  # whole windows are few: no graph of theirs pays for itself
            hidden_BTD = run(torch.from_numpy(tokens[at].astype(np.int64)).to(rt.device), last=last)
            at = at[:, -last:]
            scored = (at >= first[full][:, None]) & (at < ends[full][:, None])
            scored[len(mine):] = False
            rows, column, target = (torch.from_numpy(x).to(rt.device) for x in (
                np.flatnonzero(scored), at[scored] - offset, tokens[at[scored] + 1].astype(np.int64)))
            for r, c, v in zip(*(x.split(head_rows) for x in (rows, column, target))):
                scores_2N[:, c] = model.scores(hidden_BTD.flatten(0, 1)[r], v)
        done, batches = done + len(segment), min(2 * batches, SEGMENT_BATCHES)
        yield rt.sum(scores_2N)[:, :0 if rt.rank else None].cpu().numpy().copy()  # a view keeps all alive
        if not part:
            progress(int(ends[done - 1]))
def bits_per_byte(nll: np.ndarray, stream_bytes: np.ndarray) -> float:
    """Code length of the targets in bits over their UTF-8 bytes; sums in float64, divided once."""
    return float(nll.sum(dtype=np.float64) / math.log(2) / stream_bytes.sum(dtype=np.int64))
# --- 10. N-gram mixture -------------------------------------------------------------------------------------
# Counting is sorting: positions lie grouped by the n - 1 tokens before them, in stream order; sorting a group
# by its next token splits it into groups of n: exact counts of the past, in a thread while the GPUs score.
CHUNK = 1 << 18  # positions refined at a time, so that what a sort touches stays in the cache
ORDER_CENTERS = np.array((4.5, 4.2, 3.8, 3.5, 3.2, 3.0))  # nats, orders 2...7 and beyond (PR #825)
HASH_PRIMES = np.array((36313, 27191, 51647, 81929, 131071, 175447, 209591), np.uint64)
BOS = 1  # token that opens a document
STATES, GAPS, HEATS = 128, 13, 6  # buckets of the online weights: state of the context x distance x entropy
def since_start(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """`values` minus the value at the start of their run; `first` marks where runs start."""
    starts = np.flatnonzero(first)
    return values - np.repeat(values[starts], np.diff(starts, append=len(first)))
def sort_runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, first, prior): `order` brings equal keys together, each run in stream order; `first` marks, in
    that order, where runs start; prior[t]: how many positions before t hold the same key."""
    number, bits = np.arange(len(keys), dtype=np.uint32), np.uint64(len(keys).bit_length())
    keys = keys.astype(np.uint64) << bits | number  # key and position in 64 bits: one in-place sort
    keys.sort()
    order, keys = (keys & ~(~np.uint64(0) << bits)).view(np.int64), np.right_shift(keys, bits, keys)
    first, prior = np.append(True, keys[1:] != keys[:-1])[:len(keys)], np.empty_like(number)
    prior[order] = since_start(number, first)
    return order, first, prior
def floor_log2(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.int32) >> 23) - 127  # the exponent of a float; exact below 2^24
def describe_contexts(t, token, age, first, pair) -> np.ndarray:
    """For positions grouped by context: 0 if that is new, else 2 * (1 + bucket) + (its last continuation is
    repeated). The bucket, of the prefix alone: how often the context occurred, the share of continuations not
    new, whether the last repeated the one before, is in this document (of `age` tokens), how far back."""
    same = np.append(False, token[1:] == token[:-1]) & ~first
    repeated = np.append(False, same[:-1]) & ~first
    gap = np.where(first, 1, np.diff(t, prepend=t[:1])).view(np.int32)
    known, context = (pair > 0).astype(np.int32), since_start(np.arange(len(t), dtype=np.int32), first)
    earlier, often = since_start(np.cumsum(known, dtype=np.int32) - known, first), np.maximum(context, 1)
    state = np.minimum(floor_log2(often), 7) * 4 + np.minimum(4 * earlier // often, 3)
    state = (state * 2 + repeated) * 2 + (gap <= age)
    return np.where(context, 2 * (1 + state * GAPS + np.minimum(floor_log2(gap) >> 1, GAPS - 1)) + same, 0)
def ngram_counts(tokens: np.ndarray, highest: int, describe: bool = True):
    """Yields (pair, code), of few bytes, per position of `tokens`, for grams of n = 1 ... highest tokens.
    pair[t]: how many earlier positions end the same n-gram: c(u, v) of a target at t; its c(u) is the
    previous n's pair[t - 1]. code: see `describe_contexts`; 0 exactly where c(u) = 0."""
    first = np.append((True, True), tokens[1:-1] == BOS)[:len(tokens)]  # one late: t's age must not see t
    stream = np.minimum(since_start(np.arange(len(tokens), dtype=np.uint32), first), 65535) << 16 | tokens
    (t, first, pair), code = sort_runs(tokens), np.zeros(len(tokens) if describe else 0, np.uint16)
    keep = t < len(tokens) - 1  # what ends the stream is no context
    t, first = t[keep].astype(np.uint32) + 1, first[keep]
    yield pair.astype(np.min_scalar_type(pair.max()), copy=False), code
    for _ in range(2, highest + 1):
        pair, code, kept, stop = np.zeros(len(tokens), np.uint32), np.zeros(len(code), np.uint16), 0, 0
        while stop < len(first):  # whole groups, of at least CHUNK positions in all
            start, rest = stop, first[stop + CHUNK:]
            stop = start + CHUNK + int(rest.argmax()) if rest.any() else len(first)
            target, begin = t[start:stop], first[start:stop]
            word, age = (seen := stream[target]) & 0xFFFF, seen >> 16
            order, split, count = sort_runs(np.cumsum(begin, dtype=np.uint64) << np.uint64(16) | word)
            pair[target] = count
            if describe:
                code[target] = describe_contexts(target, word, age, begin, count)
            target = target[order] + 1
            keep = ~(split & np.append(split[1:], True)) & (target < len(tokens))
            free, kept = kept, kept + np.count_nonzero(keep)
            t[free:kept], first[free:kept] = target[keep], split[keep]
        t, first = t[:kept].copy(), first[:kept].copy()
        yield pair.astype(np.min_scalar_type(pair.max()), copy=False), code
def ngram_backoff(tokens: np.ndarray, hp: Hyperparameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, context count, pair count) per target: the longest gram whose context was followed by something
    at least NGRAM_MIN_COUNT times before. Order 0: none was. The choice never looks at the target."""
    order, context, pair = (np.zeros(len(tokens) - 1, kind) for kind in (np.uint8, np.uint32, np.uint32))
    exact = pairwise(pair for pair, _ in ngram_counts(tokens, hp.ngram_order, describe=False))
    for n in range(2, hp.ngram_order + 1):  # from target n - 2 on there is a context
        if hp.ngram_counts == "hashed":  # a token that never followed may own a bucket that others filled
            c_u, c_uv = (sort_runs(keys)[2] for keys in hash_buckets(tokens, n, hp))
            c_uv = np.minimum(c_u, c_uv)
        else:
            c_u, c_uv = (pair[n - 2 + late: len(tokens) - 1 + late] for late, pair in enumerate(next(exact)))
        wins = c_u >= (hp.ngram_min_count if n >= hp.ngram_min_order else len(tokens))
        order[n - 2:][wins], context[n - 2:][wins], pair[n - 2:][wins] = n, c_u[wins], c_uv[wins]
    return order, context, pair
def hash_buckets(tokens: np.ndarray, n: int, hp: Hyperparameters, following: np.ndarray | None = None):
    """(context bucket, pair bucket with token `following`, by default its own) of targets from n - 2 on."""
    h, mask = np.zeros(max(len(tokens) - n + 1, 0), np.uint64), np.uint64(hp.ngram_buckets - 1)
    for k in range(n - 1):
        h ^= tokens[k: k + len(h)].astype(np.uint64) * HASH_PRIMES[k]
    last = (tokens[n - 1:] if following is None else following).astype(np.uint64) * HASH_PRIMES[n - 1]
    return h & mask, (h ^ last) & mask
def hashed_mass(tokens: np.ndarray, order: np.ndarray, targets: np.ndarray, hp: Hyperparameters) -> float:
    """What the hashed quotients of one position sum to over the vocabulary; the mean of matched `targets`."""
    masses, vocabulary = [], np.arange(hp.vocab_size)
    for n in np.unique(order[targets]).tolist():
        bucket, filled = (buckets.view(np.int64) for buckets in hash_buckets(tokens, n, hp))
        for i in targets[order[targets] == n] + 2 - n:  # its place among these buckets
            _, asked = hash_buckets(tokens[i: i + n], n, hp, vocabulary)
            pair = np.bincount(filled[:i], minlength=hp.ngram_buckets)[asked.view(np.int64)]
            context = np.count_nonzero(bucket[:i] == bucket[i])
            masses.append(np.minimum(pair, context).sum() / context)
    return float(np.mean(masses)) if masses else math.nan
def backoff_weight(entropy: np.ndarray, order: np.ndarray, hp: Hyperparameters) -> np.ndarray:
    """Weight of the counts: half-way at an entropy of 4 nats (PR #889) or one centre per order (PR #825)."""
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
    """(3, buckets): posterior mean weights of the experts, to which EM gave mass[expert, state, gap, heat]
    targets. Each level, all -> state -> gap -> heat, is the next one's Dirichlet prior, worth 20 targets."""
    prior = np.array((0.98, 0.01, 0.01))  # where nothing was seen the model has 98 %
    if mass.ndim > 1:
        prior = bucket_weights(mass.sum(-1)).reshape(*mass.shape[:-1], 1)
    return ((mass + 20 * prior) / (mass.sum(0) + 20)).reshape(3, -1)
class Mixture:
    """The model's scores mixed with counts, block after block as they come. NGRAM_ALPHA=online: p_1 = model,
        p_n(v) = w0 * p_{n-1}(v) + w1 * c(u, v) / c(u) + w2 * [v is what followed u last time],
    with weights of the context's bucket, learned by EM from strictly earlier blocks; then Bayes between p_N
    and the model: over the stream at most one bit worse than either. Else one order per target, mixed by
    entropy. All sum to 1 over the vocabulary, fixed by the prefix alone, in whatever pieces scores arrive."""
    def __init__(self, tokens: np.ndarray, hp: Hyperparameters):
        self.tokens, self.hp, self.targets = tokens, hp, len(tokens) - 1
        self.nll, self.edges, self.block = np.empty(self.targets), block_edges(self.targets), 0
        self.longest = np.zeros(self.targets, np.uint8)  # order that knew the context; 0: none did
        self.samples = np.int64([f(1, max(self.targets, 1), 16) for f in (np.geomspace, np.linspace)]) - 1
        self.decided = {}  # sampled target -> [[order, w0, w1, w2, c(u), c(u, v)], ..., [model, trust]]
        self.mass, self.lead = np.zeros((hp.ngram_order + 1, 3, STATES, GAPS, HEATS)), 0.0  # online
        self.counts = ([*chain(*ngram_counts(tokens, hp.ngram_order))]  # order n: pairs 2n - 2, codes 2n - 1
                       if hp.ngram_alpha == "online" else ngram_backoff(tokens, hp))
    def extend(self, nll: np.ndarray, entropy: np.ndarray) -> None:
        """Mix every block that ends within the scores so far: nats of the stream's first len(nll) targets."""
        for a, b in pairwise(self.edges[self.block: np.searchsorted(self.edges, len(nll), "right")]):
            finite = np.isfinite(nll[a:b] + entropy[a:b]).all()
            require(finite, f"scores of targets {a} to {b} are not finite: the model has diverged", RuntimeError)
            model = np.exp(-np.minimum(nll[a:b].astype(np.float64), 690))
            mix = self.mix_online if self.hp.ngram_alpha == "online" else self.mix_backoff
            p, trust, self.longest[a:b] = mix(a, b, model, entropy[a:b])
            self.nll[a:b] = -np.log(trust * p + (1 - trust) * model)
            self.sample(np.arange(a, b), model, trust)
            self.block += 1
    def sample(self, targets: np.ndarray, *facts: np.ndarray) -> None:
        """Remember what decides those of `targets` that the audit will look at."""
        for i in np.flatnonzero(np.isin(targets, self.samples)):
            self.decided.setdefault(int(targets[i]), []).append([fact[i].item() for fact in facts])
    def mix_backoff(self, a: int, b: int, model: np.ndarray, entropy: np.ndarray):
        """(mixed p of the targets [a, b), trust in it: all, the order that won)."""
        order, context, pair = (array[a:b] for array in self.counts)
        alpha, rows = backoff_weight(entropy, order, self.hp), np.flatnonzero(order)
        self.sample(rows + a, *(x[rows] for x in (order, 1 - alpha, alpha, 0 * alpha, context, pair)))
        return (1 - alpha) * model + alpha * pair / np.maximum(context, 1), np.ones(b - a), order
    def mix_online(self, a: int, b: int, model: np.ndarray, entropy: np.ndarray):
        """(p_N of the targets [a, b), trust in it by the likelihood so far, longest order that matched)."""
        p, heat, longest = model.copy(), entropy.clip(0, HEATS - 1).astype(int), np.zeros(b - a, np.uint8)
        for n in range(self.hp.ngram_min_order, self.hp.ngram_order + 1):
            pair, code = (array[a + 1: b + 1] for array in self.counts[2 * n - 2: 2 * n])
            rows = np.flatnonzero(code)
            c_u, c_uv, code = self.counts[2 * n - 4][a:b][rows].astype(float), pair[rows], code[rows]
            longest[rows] = n
            bucket = ((code >> 1) - 1) * np.int64(HEATS) + heat[rows]
            weights = [w[bucket] for w in bucket_weights(self.mass[n])]
            self.sample(rows + a, longest[rows], *weights, c_u, c_uv)
            parts = [w * q for w, q in zip(weights, (p[rows], c_uv / c_u, code & 1))]
            p[rows] = total = sum(parts)
            for flat, part in zip(self.mass[n].reshape(3, -1), parts):
                flat += np.bincount(bucket, part / total, len(flat))
        odds = np.cumsum(np.append(self.lead, np.log(p / model)))
        self.lead = odds[-1]
        return p, 1 / (1 + np.exp(-np.clip(odds[:-1], -500, 500))), longest
    def audit(self) -> str:
        """Recounts samples, sums their mixture over the vocabulary, counts a prefix; facts for the log."""
        tokens, masses, faults, V = self.tokens, [], [], self.hp.vocab_size
        for target, (*levels, (p_target, trust)) in self.decided.items():
            t, model = target + 1, np.full(V, (1 - p_target) / (V - 1))
            p, model[tokens[t]] = model, p_target  # the rest of the model's distribution is not at hand
            for n, w0, w1, w2, *counts in levels:
                past = np.flatnonzero(tokens[n - 2: t - 1] == tokens[t - 1]) + n - 1
                for k in range(2, n):
                    past = past[tokens[past - k] == tokens[t - k]]
                c = np.bincount(tokens[past], minlength=V)
                if counts != [len(past), c[tokens[t]]]:
                    faults.append(f"{target}, order {n}: {counts}, recounted {len(past)}, {c[tokens[t]]}")
                p = w0 * p + w1 * c / len(past)
                p[tokens[past[-1]]] += w2
            p = trust * p + (1 - trust) * model
            masses.append(p.sum())
            if abs(p.sum() - 1) > 1e-9 or abs(self.nll[target] + math.log(p[tokens[t]])) > 1e-6:
                faults.append(f"{target}: mass {p.sum()}, p {p[tokens[t]]}, scored {self.nll[target]} nats")
        prefix = Mixture(tokens[: 1 << 14], self.hp)
        if not all(np.array_equal(some, full[:len(some)]) for some, full in zip(prefix.counts, self.counts)):
            faults.append(f"the counts of the first {prefix.targets} differ alone")
        require(not faults, f"the mixture is no code; targets {'; '.join(faults)}", RuntimeError)
        return (f"targets:{self.edges[self.block]}/{self.targets} mass_min:{min(masses):.12f} "
                f"mass_max:{max(masses):.12f} recounted:{sum(len(f) > 1 for f in self.decided.values())} "
                f"enumerated:{len(masses)} prefix:{prefix.targets}")
# --- 11. Training -------------------------------------------------------------------------------------------
# All that changes is one dictionary of tensors: warm-up undoes it, a checkpoint holds it. Batches follow from
# the number of steps, and nothing draws random numbers after the first weights.
def training_loss(model: GPT, ids_BT: Tensor, targets_BT: Tensor, hardness: Tensor | None, weights_BT=None):
    """Loss as in GPT.forward; with `hardness` (a graph of its own), of the artifact's weights."""
    quantized = {} if hardness is None else fake_quantized(model, model.hp, hardness)
    return torch.func.functional_call(model, quantized, (ids_BT, targets_BT, weights_BT))
class Trainer:
    """The model with all that changes while it learns: optimizers, averages, progress."""
    steps = property(lambda self: int(self.progress[0]), doc="that were done")
    seconds = property(lambda self: float(self.progress[1]), doc="of training")
    def __init__(self, model: GPT, loader: TokenLoader | None, rt: Runtime):
        self.model, self.loader, self.rt, self.hp = model, loader, rt, model.hp
        self.parameters, self.progress = [p.data for p in model.parameters()], torch.zeros(2).double()
        self.tokens = self.stream_bytes = None  # the validation stream, its bytes per target
        self.hint = "there is no checkpoint"  # what a user can do if this run ends now
        compiled = self.hp.compile == "1" or self.hp.compile == "auto" and rt.device.type == "cuda"
        self.compile = (lambda f: torch.compile(f, dynamic=False)) if compiled else lambda f: f
        self.loss, self.trunk = self.compile(training_loss), model
        self.optimizers = build_optimizers(model, self.hp, rt)
        self.averages = {name: WeightAverage(decay, self.parameters) for name, decay in (
            ("ema", self.hp.ema_decay), ("swa", 1.0)) if name in self.hp.averaging.split("_")}
    def step(self, scale: float, hardness: Tensor | None) -> Tensor:
        """One update on batch `self.steps`, lr times `scale`; returns this rank's part of the mean loss."""
        total, passes = torch.zeros((), device=self.rt.device), self.loader.accumulation
        for micro in range(passes):
            ids, targets = self.loader.micro_batch(self.steps, micro)
            if self.rt.device.type == "cuda":
                ids, targets = (x.pin_memory().to(self.rt.device, non_blocking=True) for x in (ids, targets))
            loss = self.loss(self.model, ids, targets, hardness) / (passes * self.rt.world_size)
            loss.backward()
            total += loss.detach()
        for group in chain(*(optimizer.param_groups for optimizer in self.optimizers)):
            group |= dict(lr=group["initial_lr"] * scale, momentum=muon_momentum(self.steps, self.hp))
        update(*self.optimizers, self.rt, self.hp.grad_clip_norm)
        self.model.zero_grad(set_to_none=True)
        self.progress[0] += 1
        for name, average in self.averages.items():
            if name == "ema" or scale < self.hp.swa_threshold and self.steps % self.hp.swa_every == 0:
                average.update(self.parameters)
        return total
    def validate(self, name: str = "") -> tuple[float, float]:
        """(nats per target, bits per byte) on rank 0, of windows that do not overlap; logged as `name`."""
        nll, _ = np.concatenate([*score_stream(self.model, self.model, self.tokens, self.hp.eval_seq_len, self.rt)], 1)
        loss, bpb = (nll.mean(dtype=float), bits_per_byte(nll, self.stream_bytes)) if len(nll) else (0, 0)
        if name:
            self.rt.log(f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        return loss, bpb
    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, to read or write; of Muon's momentum this rank's share is true."""
        muon, adamw = self.optimizers
        named = {"progress": self.progress, **{f"model.{k}": t for k, t in self.model.state_dict().items()}}
        lists = {"muon": [group["buffer"] for group in muon.param_groups]}
        lists |= {f"adamw.{k}": [state[k] for state in adamw.state.values()]
                  for k in ("step", "exp_avg", "exp_avg_sq")}
        lists |= {name: [average.count, *average.mean] for name, average in self.averages.items()}
        return named | {f"{name}.{i}": t for name, ts in lists.items() for i, t in enumerate(ts)}
    def warm_up(self) -> None:
        """Run WARMUP_STEPS steps so that everything is compiled, the quantised graph too, then undo them."""
        kept = [t.clone() for t in self.tensors().values()]
        progress = Progress(self.rt, "warm-up", self.hp.warmup_steps)
        for i in range(self.hp.warmup_steps):
            self.step(1.0, torch.ones((), device=self.rt.device) if self.hp.late_qat_threshold and i % 2 else None)
            progress(i + 1)
        torch._foreach_copy_([*self.tensors().values()], kept)
    def save(self) -> None:
        """Write logs/<RUN_ID>.ckpt, an archive for any number of ranks; where it fails, the last is kept."""
        arrays, own = {}, self.optimizers[0].own
        for name, t in self.tensors().items():
            if name.startswith("muon"):
                own(whole := torch.zeros_like(t)).copy_(own(t))
                t = self.rt.sum(whole)
            if self.rt.log_path:
                arrays[name] = t.numpy(force=True)
        if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            self.rt.log(f"warning: {bad[0]} is not finite, so step {self.steps} gets no checkpoint")
        elif arrays:
            try:
                path, settings = self.rt.log_path.with_suffix(".ckpt"), json.dumps(self.hp.as_env())
                replace_file(path, lambda file: np.savez(file, settings=settings, **arrays))
                self.hint = f"RESUME={path} goes on from step {self.steps}"
            except UserError as error:
                self.rt.log(f"warning: {error}")
        self.rt.barrier()
    def restore(self, path: str) -> None:
        """All get rank 0's checkpoint `path` or, if "", initial weights. UserError: not of these settings."""
        arrays = read_checkpoint(path) if path and self.rt.rank == 0 else {}
        then = json.loads(str(arrays.get("settings", "{}")))
        for name, value in self.hp.as_env().items():
            if then.get(name, value) != value and name not in ("RUN_ID", "RESUME", "CHECKPOINT_EVERY"):
                self.rt.log(f"warning: {name}={value} here, {then[name]} in the checkpoint")
        for name, t in self.tensors().items():
            if arrays:
                found, needed = arrays[name].shape if name in arrays else "absent", tuple(t.shape)
                require(found == needed, f"RESUME={path}: {name} is {found}, these settings need {needed}: "
                        "set what the run was begun with")
                t.copy_(torch.from_numpy(arrays[name]))
            self.rt.from_rank_0(t)
        if path:
            self.rt.log(f"resume:{path} step:{self.steps} train_time:{1e3 * self.seconds:.0f}ms")
def read_checkpoint(path: str) -> dict[str, np.ndarray]:
    """All arrays of a NumPy archive; UserError: no such file, or cut or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # of many types: a damaged archive fails in NumPy, zipfile, zlib, struct ...
        raise UserError(f"RESUME={path}: {getattr(error, 'strerror', 0) or 'no whole checkpoint'}") from None
def train(trainer: Trainer) -> None:
    """Trains to ITERATIONS or the cap on rank 0's clock, which stops in validations: begins no step that may
    pass it at twice the average. Leaves checkpoint, averaged weights. Stopped; UserError: loss not finite."""
    hp, rt = trainer.hp, trainer.rt
    trainer.warm_up()
    rt.barrier()
    rt.patient, saved, hardness, losses = True, trainer.seconds, None, []
    started = time.perf_counter() - trainer.seconds
    while True:
        # This waits for the step before the last: the GPU has work, and the clock is right to within a step.
        lost, now = bool(losses) and not math.isfinite(losses[0]), time.perf_counter() - started
        seconds, stopped, lost = rt.agree(0 if rt.rank else now, bool(rt.stopped), lost)
        step, trainer.progress[1] = trainer.steps, seconds
        label, scale = f"step:{step}/{hp.iterations}", lr_scale(step, seconds, hp)
        clock = f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / max(step, 1):.2f}ms"
        require(not lost, f"step:{step + 1 - len(losses)}/{hp.iterations}: the training loss is not finite; "
                f"lower the learning rates; {trainer.hint}")
        if losses and (step <= 10 or hp.train_log_every and step % hp.train_log_every == 0):
            rt.log(f"{label} train_loss:{rt.sum(losses[-1].clone()).item():.4f} {clock} "
                   f"tok/s:{hp.train_batch_tokens * step / seconds:.0f} lr_scale:{scale:.4f}")
        capped = step and 0 < hp.max_wallclock_seconds < seconds * (1 + 2 / step)
        last = capped or step >= hp.iterations
        pause = last or hp.val_loss_every and step and step % hp.val_loss_every == 0
        if stopped or pause or 0 < hp.checkpoint_every <= seconds - saved:
            saved = seconds
            trainer.save()  # and barrier; also before a validation, in which a signal would have to wait
        if pause and not stopped:
            paused, (loss, bpb) = time.perf_counter(), trainer.validate()
            rt.log(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {clock}")
            rt.patient = not last  # a signal from here on ends the run at once
            stopped = rt.agree(bool(rt.stopped))[0] and last
            started += time.perf_counter() - paused
        if stopped:
            raise Stopped(f"{label}: stopped by {rt.stopped or 'a signal'}; {trainer.hint}")
        if last:
            break
        if scale < hp.late_qat_threshold:
            if hardness is None:
                rt.log(f"late_qat:on step:{step} lr_scale:{scale:.4f} bits:{hp.quant_bits} {hp.qat_rounding}")
            hardness = torch.tensor(16 - 15 * scale / hp.late_qat_threshold, device=rt.device)  # 1 to 16
        losses = [*losses, trainer.step(scale, hardness)][-2:]
    if capped:
        rt.log(f"stopping_early: wallclock_cap train_time:{1e3 * seconds:.0f}ms {label}")
    weights = averaged_parameters(trainer.averages)
    torch._foreach_copy_(trainer.parameters, weights or trainer.parameters)
    counts = " ".join(f"{name}_updates:{average.count}" for name, average in trainer.averages.items())
    rt.log(f"averaging:{hp.averaging if weights else 'none'} {counts} "
           f"parameters:{sum(p.numel() for p in trainer.parameters)}")
# --- 12. main -----------------------------------------------------------------------------------------------
def log_header(trainer: Trainer) -> None:
    """What a reviewer needs to repeat the run: this source, versions, hardware, data, every setting."""
    hp, loader, rt = trainer.hp, trainer.loader, trainer.rt
    files = dict(train=loader.paths[0]) if loader else {}
    files |= dict(val=find_shards("val", hp)[0], tokenizer=Path(hp.tokenizer_path))
    rt.log("\n".join((
        Path(__file__).read_text(encoding="utf-8"), "=" * 100, f"python:{platform.python_version()} torch:"
        f"{torch.__version__} cuda:{torch.version.cuda} numpy:{np.__version__} platform:{platform.platform()}",
        *(f"data:{k} first:{p} sha256:{hashlib.sha256(p.read_bytes()).hexdigest()}" for k, p in files.items()),
        *map("=".join, hp.as_env().items()))), console=False)
    cpu = f"{platform.processor() or platform.machine()} CPU"
    rt.log(f"hardware:{rt.world_size} x {torch.cuda.get_device_name() if rt.device.type == 'cuda' else cpu} threads:"
           f"{torch.get_num_threads()} cores:{os.cpu_count()} attention:{trainer.model.attention_name} "
           f"accumulation:{getattr(loader, 'accumulation', 0)}\ntrain_tokens:{getattr(loader, 'tokens', 0)} "
           f"val_targets:{len(trainer.stream_bytes)} val_bytes:{trainer.stream_bytes.sum()}")
def report_mixture(trainer: Trainer, mixture: Mixture, scores: np.ndarray, added: float) -> float:
    """Audits the mixture, logs its score, its sources and, if hashed, the predecessors'; returns its bpb."""
    hp, rt, stream_bytes, (nll, entropy) = trainer.hp, trainer.rt, trainer.stream_bytes, scores
    neural, bpb = (bits_per_byte(x, stream_bytes) for x in (nll, mixture.nll))
    rt.log(f"ngram_audit {mixture.audit()}")
    for low, high in pairwise((0, 0.5, 1, 1.5, 2, 3, 4, 5, math.inf)):  # calibrated: nll = expected
        if (at := (low <= entropy) & (entropy < high)).any():
            rt.log(f"calibration entropy:{low}-{high} targets:{at.sum()} expected:{entropy[at].mean():.4f} "
                   f"nll:{nll[at].mean():.4f} mixed:{mixture.nll[at].mean():.4f}")
    gain = np.bincount(mixture.longest, nll - mixture.nll) / math.log(2) / stream_bytes.sum()
    for n, targets in zip(*np.unique(mixture.longest, return_counts=True)):
        rt.log(f"ngram_order order:{n} targets:{targets} gain:{gain[n]:.8f}")
    facts = f"orders:{hp.ngram_min_order}-{hp.ngram_order} counts:%s alpha:{hp.ngram_alpha}"
    rt.log(f"final_ngram_exact val_loss:{mixture.nll.mean():.8f} val_bpb:{bpb:.8f} gain:{neural - bpb:.8f} "
           f"{facts % 'exact'} added_time:{1e3 * added:.0f}ms")
    if hp.ngram_counts == "hashed":
        hashed = Mixture(trainer.tokens, hp)
        hashed.extend(*scores)
        mass = hashed_mass(trainer.tokens, order := hashed.counts[0], np.flatnonzero(order)[-32:], hp)
        rt.log(f"final_ngram_hashed pseudo_bpb:{bits_per_byte(hashed.nll, stream_bytes):.8f} mass:{mass:.2f} "
               f"{facts % 'hashed'} (not a probability: it sums to the mass)")
    return bpb
def ttt_batches(trainer: Trainer, begin: int, end: int):
    """(ids, targets, weights), each (B, T), of this rank: the targets [begin, end) in sequences that do not
    overlap, TTT_BATCH at once over all ranks; the weight is the target's share of the batch's bytes."""
    rt, tokens, length = trainer.rt, trainer.tokens, min(trainer.hp.eval_seq_len, end)
    starts, first, ends = windows(begin, end, length, length)
    for rows in np.array_split(np.arange(len(starts)), -(-len(starts) // TTT_BATCH)):
        full = np.pad(rows, (0, -len(rows) % rt.world_size), "edge")  # as many for each rank
        at = starts[full][:, None] + np.arange(length)
        weights = trainer.stream_bytes[at] * ((at >= first[full][:, None]) & (at < ends[full][:, None]))
        weights[len(rows):] = 0
        batch = *(np.int64(tokens[i]) for i in (at, at + 1)), np.float32(weights / max(weights.sum(), 1))
        yield [torch.from_numpy(np.split(x, rt.world_size)[rt.rank]).to(rt.device) for x in batch]
def score_and_learn(trainer: Trainer, stride: int):
    """Score-first test-time training (PR #825). Yields segments as score_stream does: a chunk, scored with an
    average of the weights, which learn from it only when the next is asked for. At last all is as before."""
    hp, rt, model, tokens = trainer.hp, trainer.rt, trainer.model, trainer.tokens
    progress = Progress(rt, f"scoring and learning stride:{stride}", total := len(tokens) - 1)
    last = tuple(f"blocks.{i}." for i in range(hp.num_layers)[-hp.ttt_blocks or hp.num_layers:])
    head = "embed.weight" if hp.tie_embeddings else "head.weight"
    tuned = [p.requires_grad_() for name, p in model.requires_grad_(False).named_parameters()
             if name.startswith(last) or not name.endswith(".weight") or name == head]
    live = [p.data for p in tuned]
    initial, weights, mean = ([p.clone() for p in live] for _ in range(3))
    optimizer = torch.optim.AdamW(tuned, betas=(hp.beta1, hp.beta2), weight_decay=0.0, fused=True)
    try:
        for begin, end in pairwise([*range(0, total, hp.ttt_chunk_tokens), total]):
            yield np.concatenate([*score_stream(trainer.trunk, model, tokens, stride, rt, (begin, end))], 1)
            if end == total:
                return
            progress(end)
            torch._foreach_copy_(live, weights)
            optimizer.param_groups[0]["lr"] = hp.ttt_lr * ttt_scale(begin / total)
            for ids, targets, w in chain(*(ttt_batches(trainer, begin, end) for _ in range(hp.ttt_epochs))):
                trainer.loss(model, ids, targets, None, w).backward()
                flat = rt.sum(nn.utils.parameters_to_vector(p.grad for p in tuned))
                flat *= (1 / (flat.norm() + 1e-6)).clamp_max(1)
                nn.utils.vector_to_parameters(flat, [p.grad for p in tuned])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                torch._foreach_lerp_(mean, live, 1 - hp.ttt_decay)
            torch._foreach_copy_(weights, live)
            torch._foreach_copy_(live, mean)
    finally:
        moved = sum((a - b).square().sum() for a, b in zip(weights, initial)).sqrt()
        rt.log(f"ttt:score_first epochs:{hp.ttt_epochs} moved:{moved:.4f}")
        torch._foreach_copy_(live, initial)
def scores_in_time(trainer: Trainer, began: float):
    """(stride, segments): of the first of EVAL_STRIDE, 96, 128, 256 that by the third segment's speed ends within 95 %
    of EVAL_BUDGET_SECONDS after `began`, or else of the last."""
    hp, rt, total = trainer.hp, trainer.rt, len(trainer.tokens) - 1
    strides = [hp.eval_stride, *(s for s in (96, 128, 256) if hp.eval_stride < s <= hp.eval_seq_len)]
    for stride in strides:
        segments = (score_and_learn(trainer, stride) if hp.ttt_epochs
                    else score_stream(trainer.trunk, trainer.model, trainer.tokens, stride, rt))
        held, begun = list(islice(segments, 2)), time.perf_counter()
        held += islice(segments, 1)
        now, done = time.perf_counter(), [part.shape[1] for part in held]
        projected = now - began + (now - begun) * (total - sum(done)) / max(done[-1], 1)
        late = rt.rank == 0 and sum(done) < total and 0 < 0.95 * hp.eval_budget_seconds < projected
        rt.log(f"eval_budget projected:{projected:.1f}s budget:{hp.eval_budget_seconds:g}s stride:{stride}")
        if not rt.agree(late)[0] or stride == strides[-1]:
            return stride, chain(held, segments)
        segments.close()
def evaluate(trainer: Trainer, size: int, began: float) -> None:
    """The model scores the stream and is mixed with counts while it scores; `began`: when training ended."""
    hp, rt, tokens, label = trainer.hp, trainer.rt, trainer.tokens, f"final_int{trainer.hp.quant_bits}"
    mixture, submit = None, concurrent.futures.ThreadPoolExecutor(1).submit  # a stop does not wait for it
    if hp.ngram_enabled and rt.rank == 0:
        mixture = submit(Mixture, tokens, replace(hp, ngram_counts="exact"))
    trainer.validate(f"{label}_roundtrip")
    begun, scores = time.perf_counter(), np.empty((2, 0 if rt.rank else len(tokens) - 1), np.float32)
    (stride, segments), done, mixed = scores_in_time(trainer, began), 0, "off"
    for segment in segments:
        scores[:, done: done + segment.shape[1]] = segment
        done += segment.shape[1]
        if mixture:  # what fails in one of these calls fails in the last one again
            added = submit(lambda now=scores[:, :done]: mixture.result().extend(*now))
    if rt.rank:
        return  # the rest is rank 0's
    scored, arrays = time.perf_counter(), dict(nll=scores[0], entropy=scores[1])
    loss, neural = scores[0].mean(dtype=float), bits_per_byte(scores[0], trainer.stream_bytes)
    rt.log(f"{label}_sliding_window_exact val_loss:{loss:.8f} val_bpb:{neural:.8f} stride:{stride} "
           f"eval_time:{1e3 * (scored - begun):.0f}ms")
    if mixture:
        added.result()
        mixed = f"{report_mixture(trainer, mixture.result(), scores, time.perf_counter() - scored):.4f} bpb"
        arrays |= dict(mixed=mixture.result().nll.astype(np.float32))
    if hp.save_scores:
        path = rt.log_path.with_name(f"{rt.log_path.stem}_scores.npz")
        replace_file(path, lambda file: np.savez(file, settings=json.dumps(hp.as_env()), **arrays))
    seconds = time.perf_counter() - began
    rt.log(f"total_eval_time:{seconds:.1f}s budget:{hp.eval_budget_seconds:g}s stride:{stride}")
    rt.log(f"\n  neural {neural:.4f} bpb, mixed with exact counts of the past {mixed}\n"
           f"  artifact {size:,} bytes of {SIZE_CAP:,}, code included; {rt.log_path}\n"
           f"  training {trainer.seconds:.1f} s, {trainer.steps} steps; evaluation {seconds:.1f} s")
def main(env: dict[str, str]) -> None:
    """All data found, all ranks the same, the log begun; train, pack, read back, score, mix, report."""
    hp = Hyperparameters.from_env(env)
    rt = Runtime(hp.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}_seed{hp.seed}", env)
    try:
        torch.manual_seed(hp.seed)
        loader = None if hp.eval_only else TokenLoader(hp, rt.rank, rt.world_size)
        tokens, count = load_validation(hp), ByteCounter(hp)
        rt.compare({"train_gpt.py": Path(__file__).read_bytes(), "settings": hp, "torch": torch.__version__,
                    "data files": fingerprint(hp)})
        trainer = Trainer(GPT(hp).to(rt.device), loader, rt)
        trainer.tokens, trainer.stream_bytes = tokens, count(tokens) if rt.rank == 0 or hp.ttt_epochs else None
        if rt.rank == 0:
            log_header(trainer)
        for warning in mistyped(env):
            rt.log(f"warning: {warning}")
        trainer.restore(hp.resume)
        path, began = Path(hp.eval_only or f"final_model.int{hp.quant_bits}.ptz"), time.perf_counter()
        if not hp.eval_only:
            train(trainer)
            began = time.perf_counter()
            trainer.validate("final_float")  # the weights that are packed
            write_artifact(trainer.model, path, hp, rt)
        trainer.trunk = trainer.compile(trainer.model)  # not before: evaluation's time counts it
        size = load_artifact(trainer.model, path, rt)
        if rt.rank == 0 and not (hp.eval_only or hp.checkpoint_every):
            rt.log_path.with_suffix(".ckpt").unlink(missing_ok=True)  # the artifact is whole
        evaluate(trainer, size, began)
        rt.barrier()
        rt.close()
    except BaseException as error:  # the group stays open, so that the others wait and the cause is seen
        rt.patient = True  # a signal does not cut short what is said now
        if "gloo/transport" in str(error):  # connection closed, reset, pipe broken ...
            error = UserError(f"another rank ended, see what it said{rt.stopped and f'; {rt.stopped} came'}")
        if type(error) is UserError:
            error = UserError("; ".join([str(error), *mistyped(env)]))
        rt.log(f"error: {type(error).__name__}: {error}", console=False)
        raise error from None
def end(error: BaseException | None) -> None:
    """Leaves the process, with a line for an error that a user can mend; rank 0 speaks, torchrun stops the others.
    Not sys.exit: gloo's thread that drops its last tensor would crash Python's shutdown."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun, as rank 0 has spoken
    rank = int(os.environ.get("RANK", 0))
    if error and not (rank and isinstance(error, Stopped)):
        time.sleep(5 if rank else 0)
        if isinstance(error, (UserError, OSError)):
            print(f"train_gpt.py: error: {f'rank {rank}: ' * bool(rank)}{error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
    os._exit(1 if error else 0)
if __name__ == "__main__":
    try:
        end(main(dict(os.environ)))
    except BaseException as error:
        end(error)
