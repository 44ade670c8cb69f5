"""A figure says which numbers it was drawn from: a text in the PNG holds a SHA-256 of them and one
of the picture. So a figure of older logs, or one that was painted over, is known without drawing
it again."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .log import RecordError, require

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"Numbers\0"  # of the text: two SHA-256, of the numbers and of the picture


def digest_of_numbers(name: str, theme: str, data: dict) -> str:
    """SHA-256 of all that a figure shows: its name, its theme and its numbers, to six digits."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [plain(part) for part in value]
        return value if isinstance(value, str) else f"{float(value):.6g}"

    text = json.dumps([name, theme, plain(data)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """(kind, content, where it begins) of each chunk of a PNG. RecordError: it is none, or cut
    short."""
    require(png.startswith(SIGNATURE), "found no PNG")
    at = len(SIGNATURE)
    while at < len(png):
        require(at + 12 <= len(png), "found a PNG that is cut short")
        (size,) = struct.unpack(">I", png[at : at + 4])
        require(at + 12 + size <= len(png), "found a PNG that is cut short")
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size], at
        at += 12 + size


def digest_of_picture(png: bytes) -> str:
    """SHA-256 of what makes the pixels: the size, the palette and the compressed picture."""
    digest = hashlib.sha256()
    for kind, content, _ in chunks(png):
        if kind in (b"IHDR", b"PLTE", b"IDAT"):
            digest.update(kind + content)
    return digest.hexdigest()


def stamp(path: Path, numbers: str) -> None:
    """Writes the digests into the PNG, before its last chunk."""
    png = path.read_bytes()
    content = KEYWORD + f"{numbers} {digest_of_picture(png)}".encode()
    end = next(at for kind, _, at in chunks(png) if kind == b"IEND")
    checksum = struct.pack(">I", zlib.crc32(b"tEXt" + content))
    chunk = struct.pack(">I", len(content)) + b"tEXt" + content + checksum
    path.write_bytes(png[:end] + chunk + png[end:])


def fault_of(path: Path, numbers: str) -> str:
    """Why the figure in `path` does not show the numbers with this digest; empty: it does."""
    try:
        png = path.read_bytes()
        texts = [content for kind, content, _ in chunks(png) if kind == b"tEXt"]
        picture = digest_of_picture(png)
    except OSError as error:
        return f"{error.strerror}"
    except RecordError as error:
        return str(error)
    found = [text.removeprefix(KEYWORD).decode("latin-1") for text in texts if KEYWORD in text]
    if len(found) != 1 or len(found[0].split()) != 2:
        return "does not say which numbers it was drawn from"
    its_numbers, its_picture = found[0].split()
    if its_numbers != numbers:
        return "shows other numbers than the logs"
    return "" if its_picture == picture else "was changed after it had been drawn"
