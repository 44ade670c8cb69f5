"""How much host memory 8 ranks take to score a long stream. The stream and its n-gram counts should
each be in memory once, not once for every rank.

    python -m bench.memory [--tokens 200000 2000000] [--full] [--ranks 8]

EVAL_ONLY of a tiny model over a synthetic stream in 360 pieces, so that the output head costs
little: real text as far as the script compares it with its tokenizer, then spans of it. Windows do
not overlap, and the n-gram mixture is the default one. Every half second the proportional set sizes
(/proc/PID/smaps_rollup) of all ranks are summed. So what the ranks share, the memory-mapped stream
and the libraries, counts once. Rank 0 also mixes; its high-water mark (VmHWM) counts shared pages
fully. --full: the challenge's 62M tokens.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import sentencepiece as spm

from data.prepare_demo import shard, train_tokenizer
from tests.helpers import workers
from tools.common import ROOT, t
from tools.streams import FULL, resample

MODEL = dict(
    NUM_LAYERS=1,
    MODEL_DIM=16,
    NUM_HEADS=1,
    NUM_KV_HEADS=1,
    ROPE_DIMS=8,
    VE_ENABLED=0,
    XSA_LAST_N=0,
    BIGRAM_VOCAB_SIZE=0,
    EVAL_SEQ_LEN=256,
    EVAL_STRIDE=256,
    VAL_BATCH_SIZE=32_768,
    EVAL_BUDGET_SECONDS=0,
    VOCAB_SIZE=360,
    RUN_ID="memory",
)


def megabytes(path: str, key: str) -> float:
    """The number of kB in the line `key` of a file of /proc, as MB. 0: the process has ended."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1e3 * 1.024


def real_text() -> tuple[np.ndarray, bytes]:
    """(tokens of this Python's language reference, the tokenizer)."""
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = train_tokenizer(texts, MODEL["VOCAB_SIZE"])
    sp = spm.SentencePieceProcessor(model_proto=tokenizer)
    tokens = [token for text in texts for token in (t.BOS, *sp.encode(text))]
    return np.array(tokens, np.uint16), tokenizer


def stream_of(corpus: np.ndarray, tokens: int) -> np.ndarray:
    """`tokens` tokens: the corpus again and again, then random spans of it."""
    text = np.resize(corpus, min(tokens, t.CHECKED_TOKENS))
    return np.append(text, resample(corpus, tokens - len(text)))


def measure(
    folder: Path, corpus: np.ndarray, tokenizer: bytes, tokens: int, ranks: int
) -> dict[str, float]:
    """Peaks in MB, and seconds, of one scoring run over `tokens` tokens."""
    (folder / "fineweb_val_000000.bin").write_bytes(shard(stream_of(corpus, tokens)))
    (folder / "tokenizer").write_bytes(tokenizer)
    settings = {k: str(v) for k, v in MODEL.items()} | dict(
        DATA_PATH=str(folder), TOKENIZER_PATH=f"{folder}/tokenizer"
    )
    hp = t.Hyperparameters.from_env(settings)
    (folder / "m.ptz").write_bytes(t.pack(t.GPT(hp).state_dict(), hp).blob)
    env = dict(
        os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", EVAL_ONLY="m.ptz", **settings
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        str(ROOT / "train_gpt.py"),
    ]
    peak, begun = dict(total=0.0, other=0.0, first=0.0), time.monotonic()
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=said)
        while process.poll() is None:
            pids = workers(process)
            pss = {
                rank: megabytes(f"/proc/{pid}/smaps_rollup", "Pss") for rank, pid in pids.items()
            }
            now = dict(
                total=sum(pss.values()),
                other=max((pss[r] for r in pss if r), default=0.0),
                first=megabytes(f"/proc/{pids.get(0)}/status", "VmHWM"),
            )
            peak = {key: max(peak[key], now[key]) for key in peak}
            time.sleep(0.5)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read())
    return peak | dict(seconds=time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} tokens too")
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    corpus, tokenizer = real_text()
    print(
        f"\n| tokens | stream MB | sum of PSS over {args.ranks} ranks | rank 0, high-water mark | "
        "largest other rank, PSS | seconds |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for tokens in [*args.tokens, *([FULL] if args.full else [])]:
        with tempfile.TemporaryDirectory() as folder:
            peak = measure(Path(folder), corpus, tokenizer, tokens, args.ranks)
        print(
            f"| {tokens:,} | {2e-6 * tokens:.1f} | {peak['total']:,.0f} MB | "
            f"{peak['first']:,.0f} MB | {peak['other']:,.0f} MB | {peak['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
