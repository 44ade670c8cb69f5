#!/usr/bin/env python3
"""Build the demo corpus offline, from the documentation inside the Python installation.

    python data/prepare_demo.py [OUTPUT_FOLDER]          (default: this folder)

Every Python ships a few megabytes of real English: the docstrings of its standard library and the
language reference in `pydoc_data.topics`. One module, or one topic, is one document. MODULES are
taken, no others: every build of a Python version has them, whatever else a distribution leaves out
or adds. A document belongs to validation when the CRC-32 of its name is divisible by VAL_EVERY, so
the split depends on nothing but names. A 1024-piece SentencePiece BPE with byte fallback is
trained on the training documents only, laid out as the challenge's own (<pad> <s> </s> <unk>, then
256 bytes). The result has the challenge's paths and shard format, so `train_gpt.py` needs one
loader and the real FineWeb drops in by DATA_PATH and TOKENIZER_PATH alone:

    OUTPUT/datasets/demo_sp1024/fineweb_{train,val}_000000.bin
    OUTPUT/tokenizers/demo_1024_bpe.model
    OUTPUT/datasets/demo_sp1024/corpus.json
        versions, counts and the SHA-256 of each file; removed first and written last, so that it
        stands for a whole set

The corpus is a function of the versions of Python and SentencePiece. A second run finds it whole,
by its hashes, and does nothing. The corpus is made anew if a file is missing or was changed, or if
another version or an older rule has made it.
"""

import ast
import contextlib
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

BOS, VOCAB_SIZE, VAL_EVERY = 1, 1024, 14
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
RULE = 2  # of the choice of documents; 1 took all that was there
LEAST_BYTES = 1_000_000  # of text; Python 3.10 to 3.13 have 1.7 million

# Modules and packages with much documentation that no distribution of Python leaves out, in all
# versions from 3.10 on. Debian, for one, has no idlelib, tkinter, ensurepip or test by default.
MODULES = """
    _pydecimal _pyio abc argparse ast asyncio base64 bdb bz2 calendar cmd code codecs codeop
    collections compileall concurrent configparser contextlib copy csv dataclasses datetime difflib
    dis doctest email encodings enum filecmp fileinput fractions ftplib functools getopt graphlib
    gzip heapq hmac html http imaplib importlib inspect ipaddress json logging lzma mailbox
    mimetypes multiprocessing ntpath numbers operator optparse os pathlib pdb pickle pickletools
    pkgutil plistlib poplib posixpath pprint pstats py_compile pyclbr pydoc queue random re
    rlcompleter runpy sched selectors shelve shutil smtplib socket socketserver ssl statistics
    subprocess symtable tarfile tempfile textwrap threading timeit tokenize trace traceback typing
    unittest urllib uuid warnings wave weakref wsgiref xml xmlrpc zipfile zipimport
"""
TESTS = {"test", "tests"}  # folders in packages, which some distributions leave out


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


def module_files(root: Path) -> dict[str, list[Path]]:
    """module -> its files in `root`, the folder of a standard library, without its tests."""
    found = {}
    for module in MODULES.split():
        paths = [root / f"{module}.py", *(root / module).rglob("*.py")]
        is_test = {path: TESTS & set(path.relative_to(root).parts) for path in paths}
        found[module] = [path for path in paths if path.is_file() and not is_test[path]]
    return found


def documents(root: Path | None = None) -> dict[str, str]:
    """name -> text, in the order of the names' CRC-32: neighbours in a folder are not neighbours in
    the stream. `root`: the folder of the standard library, by default this Python's. SystemExit:
    it has too little text."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = module_files(root)
    paths = [path for module in files for path in files[module]]
    found = {path.relative_to(root).as_posix(): docstrings(path.read_bytes()) for path in paths}
    found |= {f"topics/{name}": text for name, text in language_reference().items()}
    size = sum(len(text.encode()) for text in found.values())
    if size < LEAST_BYTES:
        sys.exit(
            f"prepare_demo.py: error: {root} has only {size:,} bytes of documentation, the demo "
            f"needs {LEAST_BYTES:,}: make clean, then PYTHON=/a/whole/python3 make demo"
        )
    missing = [module for module in files if not files[module]]
    if missing:
        print(
            f"warning: this Python has no {', '.join(missing)}: its demo corpus is not that of "
            f"other builds of Python {platform.python_version()}",
            file=sys.stderr,
        )
    return {name: found[name] for name in sorted(found, key=_crc) if found[name]}


def language_reference() -> dict[str, str]:
    """topic -> text."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


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
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):  # what made writing fail may make this fail too
            aside.unlink(missing_ok=True)


class Places:
    """The corpus's files in the folder OUTPUT."""

    def __init__(self, folder: Path):
        dataset = folder / "datasets/demo_sp1024"
        self.files = {  # by what corpus.json calls them
            "train": dataset / "fineweb_train_000000.bin",
            "val": dataset / "fineweb_val_000000.bin",
            "tokenizer": folder / "tokenizers/demo_1024_bpe.model",
        }
        self.marker = dataset / "corpus.json"

    def reason_to_make(self, versions: dict) -> str:
        """Why the corpus has to be made; empty if it is there, whole and of these versions."""
        if not self.marker.exists():
            return "there is none yet"
        try:
            facts = json.loads(self.marker.read_text(encoding="utf-8"))
            made = {key: facts.get(key) for key in versions}
            hashes = {name: facts.get(f"{name}_sha256") for name in self.files}
        except (ValueError, AttributeError, RecursionError):  # no JSON, or JSON of something else
            return f"{self.marker} is damaged"
        if made != versions:
            texts = (", ".join(f"{k} {v}" for k, v in some.items()) for some in (made, versions))
            return "it was made with {}; here is {}".format(*texts)
        for name, path in self.files.items():
            if not path.is_file():
                return f"{path} is missing"
            if _sha256(path.read_bytes()) != hashes[name]:
                return f"{path} is not what was written"
        return ""


def main(folder: Path) -> None:
    places = Places(folder)
    versions = {
        "python": platform.python_version(),
        "sentencepiece": spm.__version__,
        "rule": RULE,
    }
    reason = places.reason_to_make(versions)
    if not reason:
        print(f"demo corpus: already there ({places.marker})")
        return
    print(f"demo corpus: making it, as {reason}")
    places.marker.unlink(missing_ok=True)  # from here on the set is not whole
    docs = documents()
    split = {"train": [], "val": []}
    for name, text in docs.items():
        split["val" if _crc(name) % VAL_EVERY == 0 else "train"].append(text)
    model = train_tokenizer(split["train"], VOCAB_SIZE)
    pieces = spm.SentencePieceProcessor(model_proto=model)
    facts = {
        **versions,
        "documents": len(docs),
        "tokenizer_sha256": _sha256(model),
    }
    write_whole(places.files["tokenizer"], model)
    for part, texts in split.items():
        tokens = np.concatenate([np.array([BOS, *ids], np.uint16) for ids in pieces.encode(texts)])
        content = shard(tokens)
        facts |= {
            f"{part}_documents": len(texts),
            f"{part}_bytes": sum(len(t.encode()) for t in texts),
            f"{part}_tokens": len(tokens),
            f"{part}_sha256": _sha256(content),
        }
        write_whole(places.files[part], content)
    write_whole(places.marker, (json.dumps(facts, indent=1) + "\n").encode())
    print(f"demo corpus: {json.dumps(facts)}")


def _crc(name: str) -> int:
    return zlib.crc32(name.encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that know only ASCII
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
    except OSError as error:
        sys.exit(f"prepare_demo.py: error: {error}")
