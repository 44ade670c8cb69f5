"""The artifact's bytes over the zeroth-order entropy of its codes, compared in one run with other
coders of the same codes.

    python -m bench.artifact [--seconds 60] [--bits 6] [--budget BYTES] [--state STATE.npz]

Weights: a model of the default shapes (27.0M parameters), trained for --seconds on the built-in
corpus; or the arrays of an npz, by parameter name. H0 is the sum over tensors of the entropy of
their codes, each by its own frequencies: no coder with one table per tensor can take fewer bytes.
All rows are of the natural codes, as wide as QUANT_BITS (tables: 8 bits). The last line is of the
codes that fit into --budget bytes. One thread.
"""

import argparse
import io
import lzma
import zlib

import numpy as np
import torch

from tools import common
from tools.common import t, timed


def trained_state(seconds: float) -> dict[str, torch.Tensor]:
    """Weights of the default shapes after `seconds` of training on the built-in corpus, in small
    batches."""
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
    _, done = common.train(hp)
    print(f"weights: default shapes, {done.steps} steps of 1024 tokens in {done.seconds:.0f} s")
    return done.state


def entropy_bytes(codes: np.ndarray) -> float:
    """The zeroth-order entropy of all codes together, in bytes."""
    p = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(p * np.log2(p)).sum() * codes.size / 8)


def quantized(w: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as t.pack makes them, int8; deltas, bfloat16)."""
    codes, delta = t.quantize_rows(w.detach(), largest)
    return codes.to(torch.int8), delta.bfloat16()


def compare(state: dict[str, torch.Tensor], hp: t.Hyperparameters) -> None:
    """One row per coder of the same natural codes: bytes, bytes / H0, seconds."""
    coded, quantize_s = timed(
        lambda: {
            name: quantized(w, largest)
            for name, w in state.items()
            if (largest := t.largest_code(name, w, hp))
        }
    )
    h0 = sum(entropy_bytes(codes.numpy()) for codes, _ in coded.values())
    stream = b"".join(codes.numpy().tobytes() for codes, _ in coded.values())
    packed, pack_s = timed(lambda: t.pack(state, hp))
    encode_s = pack_s - quantize_s
    _, decode_s = timed(lambda: t.decompress(packed.blob))
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
            "torch.save of codes and deltas, lzma -9e",
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
    """(length of what `work` returns, its seconds)."""
    result, seconds = timed(work)
    return len(result), seconds


def huffman(stream: bytes) -> bytes:
    """`stream`, coded by a Huffman code of its bytes alone."""
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
        default=t.SIZE_CAP - len(t.SOURCE),
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
    packed, seconds = timed(lambda: t.compress(state, hp, {}, args.budget))
    size = len(packed.container.blob)
    print(
        f"fitted to {args.budget:,} bytes: {size:,} bytes in {seconds:.1f} s, step sizes times "
        f"{packed.coarsen:.6f}, relative error {packed.error_before:.5f} before and "
        f"{packed.container.error:.5f} after"
    )


if __name__ == "__main__":
    main()
