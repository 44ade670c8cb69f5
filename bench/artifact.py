"""The artifact's bytes over the zeroth-order entropy of its codes,
beside other coders of the same codes, in one run.

    python -m bench.artifact [--seconds 60] [--bits 6] [--budget BYTES] [--state STATE.npz]

Weights: a model of the default shapes (27.0M parameters), trained for --seconds on the built-in
corpus; or the arrays of an npz, by parameter name. H0 is the entropy of each tensor's codes by
their own frequencies, summed: what no coder with one table per tensor can beat. Everything is of
the natural codes (QUANT_BITS, tables 8 bits); last, the codes that are chosen to fit
--budget bytes. One thread.
"""

import argparse
import io
import lzma
import zlib
from pathlib import Path

import numpy as np
import torch

from tools import common
from tools.common import t, timed


def trained_state(seconds: float) -> dict[str, torch.Tensor]:
    """Weights of the default shapes after `seconds` of training on the built-in corpus,
    small batches."""
    common.make_demo_corpus()
    demo = common.demo_settings()
    hp = t.Hyperparameters(
        data_path=demo.data_path,
        tokenizer_path=demo.tokenizer_path,
        train_seq_len=256,
        train_batch_tokens=1024,
        warmup_steps=0,
        max_wallclock_seconds=seconds,
        warmdown_iters=10,
        ema_decay=0.9,
        train_log_every=0,
        compile="0",
        late_qat_threshold=0.0,
    )
    done = common.train(hp)
    print(f"weights: default shapes, {done.steps} steps of 1024 tokens in {done.seconds:.0f} s")
    return done.model.state_dict()


def entropy_bytes(codes: np.ndarray) -> float:
    p = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(p * np.log2(p)).sum() * codes.size / 8)


def quantized(w: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes as pack makes them, int8, and their steps, bfloat16."""
    codes, step = t.quantize_rows(w.detach(), levels)
    return codes.to(torch.int8), step.bfloat16()


def compare(state: dict[str, torch.Tensor], hp: t.Hyperparameters) -> None:
    """One row per coder of the same natural codes: bytes, bytes / H0, seconds."""
    coded, quantize_s = timed(
        lambda: {
            name: quantized(w, levels)
            for name, w in state.items()
            if (levels := t.natural_levels(name, w, hp))
        }
    )
    h0 = sum(entropy_bytes(codes.numpy()) for codes, _ in coded.values())
    stream = b"".join(codes.numpy().tobytes() for codes, _ in coded.values())
    packed, pack_s = timed(lambda: common.pack(state, hp))
    encode_s = pack_s - quantize_s
    _, decode_s = timed(lambda: common.unpack(packed.blob))
    saved = io.BytesIO()
    torch.save(coded | {name: w.half() for name, w in state.items() if name not in coded}, saved)
    print(
        f"codes: {len(stream):,}, H0 {h0:,.0f} bytes = {8 * h0 / len(stream):.4f} bits per code, "
        f"relative error {packed.error:.5f}"
    )
    print(f"{'coder':44} {'bytes':>12} {'/ H0':>8} {'seconds':>8}")
    best = 9 | lzma.PRESET_EXTREME
    rows = [
        ("this container, all of it", len(packed.blob), encode_s),
        (
            "torch.save of codes and steps, lzma -9e",
            *timed_size(lambda: lzma.compress(saved.getvalue(), preset=best)),
        ),
        ("codes alone, lzma -9e", *timed_size(lambda: lzma.compress(stream, preset=best))),
        ("codes alone, deflate Z_HUFFMAN_ONLY", *timed_size(lambda: huffman(stream))),
    ]
    for name, size, seconds in rows:
        print(f"{name:44} {size:12,} {size / h0:8.4f} {seconds:8.1f}")
    print(
        f"quantise {quantize_s:.1f} s, encode {encode_s:.1f} s, read back {decode_s:.1f} s; saved "
        f"over torch.save + lzma: {rows[1][1] - len(packed.blob):,} bytes\n"
        f"bytes of the container: {packed.sizes}"
    )


def timed_size(work) -> tuple[int, float]:
    result, seconds = timed(work)
    return len(result), seconds


def huffman(stream: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return engine.compress(stream) + engine.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.artifact", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument(
        "--budget",
        type=int,
        default=t.SIZE_CAP - len(Path(t.__file__).read_bytes()),
        help="default: what train_gpt.py leaves of the cap",
    )
    parser.add_argument("--state")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if args.state:
        with np.load(args.state, allow_pickle=False) as arrays:
            state = {name: torch.from_numpy(arrays[name]) for name in arrays}
        print(f"weights: {args.state}")
    else:
        state = trained_state(args.seconds)
    hp = t.Hyperparameters(quant_bits=args.bits)
    compare(state, hp)
    (packed, facts), seconds = timed(lambda: common.fit(state, hp, args.budget))
    size = len(packed.blob)
    print(f"fitted to {args.budget:,} bytes: {size:,} bytes in {seconds:.1f} s, {facts}")


if __name__ == "__main__":
    main()
