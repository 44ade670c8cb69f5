#!/usr/bin/env python3
"""Build the demo corpus offline, from the documentation inside the Python installation.

    python data/prepare_demo.py [OUTPUT_FOLDER]          (default: this folder)

Every Python ships a few megabytes of real English: the docstrings of its standard library and the
language reference in `pydoc_data.topics`. One module, or one topic, is one document. A document
belongs to validation when the CRC-32 of its name is divisible by VAL_EVERY, so the split depends on
nothing but names. A 1024-piece SentencePiece BPE with byte fallback is trained on the training
documents only, laid out as the challenge's own (<pad> <s> </s> <unk>, then 256 bytes). The result
has the challenge's paths and shard format, so `train_gpt.py` needs one loader and the real FineWeb
drops in by DATA_PATH and TOKENIZER_PATH alone:

    OUTPUT/datasets/demo_sp1024/fineweb_{train,val}_000000.bin
    OUTPUT/tokenizers/demo_1024_bpe.model
    OUTPUT/datasets/demo_sp1024/corpus.json
        counts and sha256; written last, so it marks a whole set

The corpus is a function of the Python version alone; a second run finds it whole and does nothing.
"""

import ast
import hashlib
import io
import json
import os
import platform
import sys
import sysconfig
import warnings
import zlib
from pathlib import Path

import numpy as np
import sentencepiece as spm

BOS, VOCAB_SIZE, VAL_EVERY = 1, 1024, 16
SHARD_MAGIC, SHARD_VERSION = 20240520, 1


def docstrings(source: bytes) -> str:
    """All docstrings of one module, in source order;
    empty when the file is not valid Python (test fixtures)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted(
        (n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0)
    )
    return "\n\n".join(text for n in nodes if (text := ast.get_docstring(n)))


def documents() -> dict[str, str]:
    """name -> text, in the order of the names' CRC-32:
    neighbours in a folder are not neighbours in the stream."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages"} & set(name.parts):
            found[name.as_posix()] = docstrings(path.read_bytes())
    from pydoc_data.topics import topics

    found |= {f"topics/{name}": text for name, text in topics.items()}
    return {name: found[name] for name in sorted(found, key=_crc) if found[name]}


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def write_whole(path: Path, content: bytes) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def main(folder: Path) -> None:
    dataset, tokenizer = folder / "datasets/demo_sp1024", folder / "tokenizers/demo_1024_bpe.model"
    marker = dataset / "corpus.json"
    if marker.exists() and json.loads(marker.read_text())["python"] == platform.python_version():
        print(f"demo corpus: already there ({marker})")
        return
    docs = documents()
    split = {"train": [], "val": []}
    for name, text in docs.items():
        split["val" if _crc(name) % VAL_EVERY == 0 else "train"].append(text)
    model = train_tokenizer(split["train"], VOCAB_SIZE)
    pieces = spm.SentencePieceProcessor(model_proto=model)
    facts = {
        "python": platform.python_version(),
        "documents": len(docs),
        "tokenizer_sha256": _sha256(model),
    }
    write_whole(tokenizer, model)
    for part, texts in split.items():
        tokens = np.concatenate([np.array([BOS, *ids], np.uint16) for ids in pieces.encode(texts)])
        content = shard(tokens)
        facts |= {
            f"{part}_documents": len(texts),
            f"{part}_bytes": sum(len(t.encode()) for t in texts),
            f"{part}_tokens": len(tokens),
            f"{part}_sha256": _sha256(content),
        }
        write_whole(dataset / f"fineweb_{part}_000000.bin", content)
    write_whole(marker, (json.dumps(facts, indent=1) + "\n").encode())
    print(f"demo corpus: {json.dumps(facts)}")


def _crc(name: str) -> int:
    return zlib.crc32(name.encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
