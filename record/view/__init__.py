"""One HTML page of a run: the validation text, coloured by the bits that counting saved at each
token. It holds all it needs: no network, no dates, no random numbers."""

from __future__ import annotations

import codecs
import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from ..colors import RAMPS, THEMES
from ..fill import HERE, fill
from ..folder import load_script
from ..log import RecordError, require

SCRIPT = HERE.parent / "train_gpt.py"
# bits saved; between the two of the middle: no colour
GAIN_EDGES = (-8, -4, -2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2, 4, 8)
COST_EDGES = (0.1, 0.5, 1, 2, 4, 6, 8, 10)  # bits paid
ORDER_EDGES = (2, 3, 4, 5, 6, 7, 8)  # tokens of the longest gram whose context was known


@dataclass(frozen=True)
class Scores:
    """A run's scores with the stream they belong to. Arrays are one entry per target; nats."""

    path: Path
    hp: object  # train_gpt.Hyperparameters
    tokens: np.ndarray  # x_0 ... x_N: target t is tokens[t + 1]
    bytes: np.ndarray  # UTF-8 bytes of each target
    nll: np.ndarray
    entropy: np.ndarray
    mixed: np.ndarray

    def bits(self, name: str) -> np.ndarray:
        return getattr(self, name).astype(np.float64) / math.log(2)

    @property
    def gain(self) -> np.ndarray:
        """Bits that the mixture saved at each target."""
        return self.bits("nll") - self.bits("mixed")


class Page(NamedTuple):
    """A page that was written: where, and which targets it shows, [first, end) of `total`."""

    path: Path
    first: int
    end: int
    total: int


def view(scores: Path | str, out=None, start: int | None = None, tokens: int = 4000) -> Page:
    """Writes the page for `tokens` targets from target `start` (by default where counting saved
    most), by default to <RUN_ID>_view.html beside the scores. RecordError: scores or data that do
    not fit together, or `out` cannot be written."""
    path = Path(scores)
    out = Path(out or path.with_name(f"{path.stem.removesuffix('_scores')}_view.html"))
    found = load_scores(path)
    first, last = choose_stretch(found, start, tokens)
    page = render(found, first, last)
    try:
        out.write_bytes(page.encode(errors="backslashreplace"))  # names may be no UTF-8
    except OSError as error:
        problem = "expected a file that can be written in a folder that is there"
        raise RecordError(f"{out}: {error.strerror}; {problem}") from None
    return Page(out, first, last, len(found.nll))


def last_scores(folder: Path) -> Path:
    """The scores of the folder's last run. RecordError: no run saved its scores."""
    paths = sorted(folder.glob("logs/*_scores.npz"), key=lambda path: path.stat().st_mtime)
    problem = "no scores of a run; `make demo` saves them, as every run with SAVE_SCORES=1 does"
    require(paths, f"{folder / 'logs'}: {problem}")
    return paths[-1]


# --- what the page shows ---


def load_scores(path: Path) -> Scores:
    """The arrays of `path`, the settings of their run, and the stream that these name."""
    train_gpt = load_script(SCRIPT)
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # damage raises many types: of NumPy, zipfile, zlib, struct ...
        problem = f"no scores of a run ({error}); expected an .npz that SAVE_SCORES=1 wrote"
        raise RecordError(f"{path}: {problem}") from None
    names = "nll", "entropy", "mixed"
    missing = ", ".join(sorted(set(names) - set(arrays)))
    problem = f"holds no {missing}; expected scores of a run with NGRAM_ENABLED=1 SAVE_SCORES=1"
    require(not missing, f"{path}: {problem}")
    try:
        hp = train_gpt.Hyperparameters.from_env(run_settings(path, arrays))
        validation = train_gpt.load_validation(hp)
    except (train_gpt.UserError, OSError) as error:
        raise RecordError(f"{path}: {error}") from None
    sizes = {name: len(arrays[name]) for name in names}
    require(
        set(sizes.values()) == {validation.num_targets},
        f"{path}: holds {sizes}, but the validation stream in {hp.data_path} has "
        f"{validation.num_targets} targets: expected the data of that run",
    )
    are_finite = all(np.isfinite(arrays[name]).all() for name in names)
    require(are_finite, f"{path}: some scores are not finite: the run diverged")
    scores = (arrays[name] for name in names)
    return Scores(path, hp, validation.tokens, validation.target_bytes, *scores)


def run_settings(path: Path, arrays: dict) -> dict[str, str]:
    """NAME -> text of the run's settings, which its scores hold. Relative paths are looked for from
    here, from the run's folder, and from the repository."""
    try:
        settings = dict(json.loads(str(arrays["settings"])))
    except (KeyError, ValueError, TypeError):
        problem = "holds no settings, no JSON object of that name; was it written by train_gpt.py?"
        raise RecordError(f"{path}: {problem}") from None
    homes = Path(), path.resolve().parent.parent, SCRIPT.parent
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        places = [home / settings.get(name, "") for home in homes]
        settings[name] = str(next((place for place in places if place.exists()), places[0]))
    return settings


def choose_stretch(scores: Scores, start: int | None, count: int) -> tuple[int, int]:
    """[first, last) targets to show: `count` from `start`, or where they gain most, beginning at a
    word."""
    total = len(scores.nll)
    is_there = count >= 1 and (start is None or 0 <= start < total)
    problem = f"asked for {count} targets from {start}; there are targets 0 to {total - 1}"
    require(is_there, f"{scores.path}: {problem}")
    if start is None:
        counter = load_script(SCRIPT).ByteCounter(scores.hp)
        opens = counter.opens_word | (counter.length == 0)
        begins = np.flatnonzero(opens[scores.tokens[1 : max(total - count, 0) + 2]])
        begins = begins if len(begins) else np.zeros(1, int)
        so_far = np.append(0, np.cumsum(scores.gain))
        start = int(begins[np.argmax(so_far[np.minimum(begins + count, total)] - so_far[begins])])
    return start, min(start + count, total)


def token_texts(ids, counter, at_start: bool) -> list[str]:
    """The text that each token completes, by the ByteCounter's rule; joined, the exact text. A
    character of several byte pieces stands at its last byte, '' at the others; malformed bytes are
    U+FFFD. `at_start`: the first token is at the start of a document, where a space is dropped."""
    decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
    for i in map(int, ids):
        if not counter.is_byte[i] and (rest := decoder.decode(b"", final=True)):
            texts[-1] += rest
        dropped = int(at_start and counter.drops_space and counter.opens_word[i])
        texts.append(decoder.decode(counter.texts[i][dropped:]))
        at_start = counter.is_control[i]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


# --- the page ---


def render(scores: Scores, first: int, last: int) -> str:
    """The page for targets [first, last)."""
    hp, size = scores.hp, slice(first, last)
    counter = load_script(SCRIPT).ByteCounter(hp)
    sp = counter.pieces
    least = 1 if hp.ngram_alpha == "online" else hp.ngram_min_count
    rule = load_script(SCRIPT).Backoff
    known = rule(scores.tokens[: last + 1], replace(hp, ngram_min_count=least))
    # enough for the first context and to finish its characters
    lead = max(0, first - max(hp.ngram_order, 4))
    ids = [int(i) for i in scores.tokens[lead + 1 : last + 1]]
    texts = token_texts(ids, counter, counter.is_control[scores.tokens[lead]])
    ids, texts, before = ids[first - lead :], texts[first - lead :], texts[: first - lead]
    pieces = {k: sp.id_to_piece(i) for k, i in enumerate(ids) if sp.is_byte(i) or not texts[k]}
    bits = {name: scores.bits(name)[size] for name in ("nll", "mixed", "entropy")}
    columns = {name: getattr(known, name)[size] for name in ("n", "context_count", "ngram_count")}
    data = dict(
        start=first,
        total=len(scores.nll),
        lead=before,
        text=texts,
        piece=pieces,
        bytes=scores.bytes[size].tolist(),
        **{name: [round(float(b), 4) for b in column] for name, column in bits.items()},
        **{name: column.tolist() for name, column in columns.items()},
    )
    kinds = [kind_of(sp, i) if not text else "" for i, text in zip(ids, texts)]
    marks = [sp.id_to_piece(i) if kind == "ctl" else "" for i, kind in zip(ids, kinds)]
    bins = token_bins(bits, columns["n"])
    ramps = {theme: {k: ramp.split() for k, ramp in RAMPS[theme].items()} for theme in THEMES}
    return fill(
        "page.html",
        run=hp.run_id or scores.path.stem.removesuffix("_scores"),
        themes=[(theme, THEMES[theme], ramps[theme]) for theme in THEMES],
        style=Markup((HERE / "view/style.css").read_text()),
        script=Markup((HERE / "view/script.js").read_text()),
        tokens=zip(range(first, last), bins, kinds, marks, map(visible, texts)),
        data=data,
        orders=(hp.ngram_min_order - 1, hp.ngram_order - 1),
        rows={"This stretch": totals(scores, size), "Whole stream": totals(scores, slice(None))},
        overview=overview(bits["nll"] - bits["mixed"]),
        stream=stream(scores, first, last),
        legends=legends(),
    )


def visible(text: str) -> Markup:
    """`text` for HTML: escaped, with a sign before each newline and tab; other control characters
    as their pictures."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    for sign, name in (("\n", "nl"), ("\t", "tab")):
        shown = escape(shown).replace(sign, Markup(f'<i class="{name}"></i>{sign}'))
    return shown


def kind_of(sp, i: int) -> str:
    """The class of a token that has no text: a part of a character, a new document, a control."""
    if sp.is_byte(i):
        return "part"
    return "doc" if i == sp.bos_id() else "ctl"


def token_bins(bits: dict[str, np.ndarray], order: np.ndarray) -> list[str]:
    """Each token's classes: its bins in the four ways of colouring."""
    gain = np.digitize(bits["nll"] - bits["mixed"], GAIN_EDGES)
    model, mixed = (np.digitize(bits[name], COST_EDGES) for name in ("nll", "mixed"))
    longest = np.digitize(order, ORDER_EDGES)
    return [f"g{g} m{m} x{x} o{o}" for g, m, x, o in zip(gain, model, mixed, longest)]


def totals(scores: Scores, size: slice) -> dict[str, float]:
    """Targets, bytes, and bits of the model and of the mixture within `size`; bpb where there are
    bytes."""
    size_bytes = int(scores.bytes[size].sum(dtype=np.int64))
    found = dict(targets=len(scores.nll[size]), bytes=size_bytes)
    for name in ("nll", "mixed"):
        found[name] = float(scores.bits(name)[size].sum())
        found[f"{name}_bpb"] = found[name] / size_bytes if size_bytes else math.nan
    return found


def legends() -> list[tuple]:
    """(way of colouring, caption, letter of its classes, marks under the swatches, words of each
    swatch); as many marks as swatches stand under their middles, else under their borders."""
    between = [f"{a:g} to {b:g}" for a, b in pairwise(GAIN_EDGES)]
    gains = [f"lost {-GAIN_EDGES[0]}+", *between, f"saved {GAIN_EDGES[-1]}+"]
    marks = [str(abs(edge)).removeprefix("0") for edge in GAIN_EDGES]
    between = [f"{a:g} to {b:g}" for a, b in pairwise(COST_EDGES)]
    costs = [f"under {COST_EDGES[0]}", *between, f"{COST_EDGES[-1]}+"]
    edges = [f"{edge:g}".removeprefix("0") if edge < 1 else f"{edge:g}" for edge in COST_EDGES]
    names = ["none", *map(str, ORDER_EDGES[:-1]), f"{ORDER_EDGES[-1]}+"]
    return [
        ("gain", "bits lost \u2190 \u2192 bits saved", "g", marks, gains),
        ("model", "bits the network pays", "m", edges, costs),
        ("mixed", "bits the mixture pays", "x", edges, costs),
        ("order", "tokens of the longest known gram", "o", names, names),
    ]


def overview(gain: np.ndarray, columns: int = 240) -> dict:
    """Bits saved (up) and lost (down) along the stretch: bars (x, width, up, down) of one column
    per few tokens in a picture 1000 wide, the height of its zero line and of it."""
    edges = np.unique(np.linspace(0, len(gain), min(columns, len(gain)) + 1).astype(int))
    up, down = (np.add.reduceat(np.maximum(sign * gain, 0), edges[:-1]) for sign in (1, -1))
    scale, share = 40 / max(float((up + down).max()), 1e-9), 1000 / len(gain)
    zero, width = 2 + scale * float(up.max()), share * np.diff(edges)
    return dict(
        bars=list(
            zip(share * edges[:-1], width - np.minimum(0.8, width / 4), scale * up, scale * down)
        ),
        zero=zero,
        height=zero + scale * float(down.max()) + 2,
        saved=up.sum(),
        lost=down.sum(),
    )


def stream(scores: Scores, first: int, last: int, columns: int = 120) -> dict:
    """Bits per byte along the whole stream in a picture 1000 x 100, network above, mixture below,
    and where the stretch lies."""
    total = len(scores.nll)
    edges = np.unique(np.linspace(0, total, min(columns, total) + 1).astype(int))
    size = np.maximum(np.add.reduceat(scores.bytes.astype(np.int64), edges[:-1]), 1)
    curves = [np.add.reduceat(scores.bits(name), edges[:-1]) / size for name in ("nll", "mixed")]
    top, x = 1.05 * float(np.max(curves)), (edges[:-1] + edges[1:]) / 2 / total * 1000
    model, mixed = ([f"{a:.1f},{100 - 100 * b / top:.2f}" for a, b in zip(x, y)] for y in curves)
    return dict(
        left=1000 * first / total,
        width=max(1000 * (last - first) / total, 3),
        model=" ".join(model),
        mixed=" ".join(mixed),
        back=" ".join(reversed(mixed)),
        ends=[float(y[at]) for y in curves for at in (0, -1)],
    )
