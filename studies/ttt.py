"""What does learning during evaluation gain, with the mixture and without it?

    python -m studies.ttt ARTIFACT [--documents 100] [--longest 4096] [--rank 8] [--alpha 16]
        [--lr 1e-4] [--chunks-825 32768]

It reads a packed model and the first documents of the validation stream of DATA_PATH, and scores
them in three ways; each row is compared with the row before it that does not learn:

- `documents apart`: every document is scored alone, in chunks of TTT_CHUNK_SIZE targets, each with
  as many earlier tokens of the document as fit into EVAL_SEQ_LEN. `adapters` does the same and
  learns, as a run with TTT_LORA_RANK does (section 12 of the script).
- `one stream`: as a run scores it, with EVAL_STRIDE. `chunks` learns as PR #825 did: TTT_EPOCHS and
  the other TTT settings in the environment hold, and --chunks-825 gives the chunk length.

Each row is mixed with n-gram counts after it was scored (NGRAM_ALPHA=online, the whole stream of
these documents). So the last column says what learning adds to the mixture. Seconds are of
computing, on the hardware named in the first line. Documents longer than --longest tokens are left
out.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import train_gpt as t
from tools import common


def score_stream(model: t.GPT, validation: t.Validation) -> np.ndarray:
    """(2, targets): nll and entropy, as a run with the model's settings scores the stream."""
    hp = model.hp
    _, passes = t.block_passes(hp)
    scorer = t.Scorer(model, passes)
    ranks, log = t.Ranks({}), t.RunLog()
    if hp.ttt_lora_rank:
        parts = t.score_documents(scorer, validation.tokens, ranks)
    elif hp.ttt_epochs:
        loss = t.training_loss
        parts = t.score_and_learn(scorer, loss, validation, hp.eval_stride, ranks, log)
    else:
        parts = t.score(scorer, validation.tokens, hp.eval_stride, ranks)
    return np.concatenate([*parts], 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.ttt", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--documents", type=int, default=100, help="of the stream, from its start")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--rank", type=int, nargs="+", default=[8], help="one row for each")
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="one row for each")
    parser.add_argument("--chunks-825", type=int, nargs="*", default=[32768])
    args = parser.parse_args()
    try:
        study(args)
    except t.UserError as error:
        sys.exit(f"ttt.py: error: {error}")


def study(args) -> None:
    model, hp = common.load_for_environment(args.artifact)
    validation = t.load_validation(hp)
    count, tokens = first_documents(validation.tokens, args.documents, args.longest)
    target_bytes = t.ByteCounter(hp)(tokens)
    part = t.Validation(tokens, lambda _: target_bytes)
    print(f"{args.artifact}: {common.describe_device()}")
    print(f"{count} documents, {part.num_targets:,} targets, {target_bytes.sum():,} bytes\n")
    print(f"{'':36} {'neural':>9} {'learned':>9} {'mixed':>9} {'learned':>9} {'seconds':>8}")

    def row(label: str, score, base: tuple | None = None) -> tuple:
        scores_2N, seconds = common.timed(score)
        nll, entropy = scores_2N
        found = [t.bits_per_byte(x, target_bytes) for x in (nll, t.mix(tokens, nll, entropy, hp))]
        gains = [f"{a - b:+9.5f}" if base else " " * 9 for a, b in zip(base or found, found)]
        cells = " ".join(f"{bpb:9.5f} {gain}" for bpb, gain in zip(found, gains))
        print(f"{label:36} {cells} {seconds:8.1f}", flush=True)
        return found

    def scored(**settings) -> Callable:
        changed, _ = common.load_for_environment(args.artifact, **settings)
        return partial(score_stream, changed, part)

    apart = dict(TTT_LORA_RANK="1", TTT_LORA_LR="0", TTT_EPOCHS="0")
    base = row("documents apart", scored(**apart))
    for rank in args.rank:
        for lr in args.lr:
            size = dict(TTT_LORA_RANK=str(rank), TTT_LORA_ALPHA=str(args.alpha), TTT_EPOCHS="0")
            learning = scored(**size, TTT_LORA_LR=str(lr))
            row(f"  adapters of rank {rank}, lr {lr:g}", learning, base)
    base = row("one stream", scored(TTT_EPOCHS="0"))
    for length in args.chunks_825:
        settings = settings_825(length)
        label = f"  chunks of {length:,}, {settings['TTT_EPOCHS']} epochs"
        row(label, scored(**settings), base)


def settings_825(length: int) -> dict[str, str]:
    """PR #825's settings of its learning, unless the environment has others."""
    values = common.script_settings("order_adaptive")
    learning = {name: value for name, value in values.items() if name.startswith("TTT_")}
    given = {name: os.environ.get(name, value) for name, value in learning.items()}
    return given | {"TTT_CHUNK_TOKENS": str(length)}


def first_documents(tokens: np.ndarray, count: int, longest: int) -> tuple[int, np.ndarray]:
    """(number, stream) of the first documents, at most `count`, that have at most `longest` tokens.
    The stream ends with a BOS, the last target of the last document."""
    starts = np.flatnonzero(tokens == t.BOS)
    spans = [(a, b) for a, b in zip(starts[:-1], starts[1:]) if b - a <= longest][:count]
    t.require(bool(spans), "the validation stream has no whole document that is short enough")
    stream = np.concatenate([tokens[a:b] for a, b in spans] + [[t.BOS]])
    return len(spans), stream.astype(np.uint16)


if __name__ == "__main__":
    main()
