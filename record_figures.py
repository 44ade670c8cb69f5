"""Pictures of a run, for people who would rather look than read.

    view(scores.npz)   one HTML page: the validation text, coloured by the bits that counting saved
                       at each token
    plot(folder)       PNGs from the logs that README's results table links to, light and dark

`python make_record.py view` and `python make_record.py plot` call these. Both are pure functions of
their inputs: no dates, no random numbers, no network. The page holds all it needs; the figures hold
nothing but the logs' numbers.
"""

from __future__ import annotations

import codecs
import contextlib
import html
import json
import math
import re
import zipfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from make_record import Folder, Log, RecordError, parse_log

# --- 1. Colours -----------------------------------------------------------------------------------
# Blue means saved, orange lost: told apart by every kind of colour vision, and losses are
# underlined besides. Text on each of them keeps a contrast of at least 4.5 (tested). The figures
# use the same two hues.

# bits saved; between the two of the middle: no colour
GAIN_EDGES = (-8, -4, -2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2, 4, 8)
COST_EDGES = (0.1, 0.5, 1, 2, 4, 6, 8, 10)  # bits paid
ORDER_EDGES = (2, 3, 4, 5, 6, 7, 8)  # tokens of the longest gram whose context was known

THEMES = {
    "light": dict(
        paper="#fbfaf7",
        card="#ffffff",
        ink="#1c1b19",
        soft="#5f5c57",
        line="#e2dfd8",
        saved="#1f6fb5",
        lost="#ad5406",
        mark="#1c1b19",
        plain="#8d8a84",
        gain=(
            "#e0802d #ea9a52 #f2b47c #f7cca4 #fae0c8 #fcf0e3 - "
            "#ebf2f9 #d8e6f5 #bfd8f0 #a1c6ea #7fb0e0 #5c9cd6"
        ),
        cost="- #eeeaf6 #e0d9f0 #cfc4e8 #bfb1e0 #b09fd9 #a592d3 #9b87cd #927dc8",
    ),
    "dark": dict(
        paper="#141517",
        card="#1c1e21",
        ink="#ebe9e4",
        soft="#a5a29b",
        line="#313338",
        saved="#6db1ee",
        lost="#f0a04b",
        mark="#ebe9e4",
        plain="#77767a",
        gain=(
            "#9a5206 #834a0e #6d4012 #573515 #412a17 #2c2118 - "
            "#19232d #1a2e3f #1b3a54 #1c476a #1e5583 #1f639c"
        ),
        cost="- #221f2e #2a253b #332c48 #3d3457 #473c68 #52457a #5b4c8a #635397",
    ),
}


def theme_css(name: str) -> str:
    """The custom properties of one theme; `-` in a ramp is the bare page."""
    theme = THEMES[name]
    plain = {k: v for k, v in theme.items() if k not in ("gain", "cost")}
    ramps = {
        f"{ramp}{i}": "transparent" if color == "-" else color
        for ramp in ("gain", "cost")
        for i, color in enumerate(theme[ramp].split())
    }
    return f"color-scheme:{name};" + "".join(f"--{k}:{v};" for k, v in {**plain, **ramps}.items())


# --- 2. What the page shows -----------------------------------------------------------------------


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

    @property
    def gain(self) -> np.ndarray:
        """Bits that the mixture saved at each target."""
        return (self.nll.astype(np.float64) - self.mixed) / math.log(2)


def view(scores_path, out=None, start: int | None = None, tokens: int = 4000) -> Path:
    """Writes the page for `tokens` targets from target `start` (by default where counting saved
    most) and returns its path, by default <RUN_ID>_view.html beside the scores. RecordError: scores
    or data that do not fit together, or `out` cannot be written."""
    scores_path = Path(scores_path)
    scores = load_scores(scores_path)
    out = (
        Path(out)
        if out
        else scores_path.with_name(f"{scores_path.stem.removesuffix('_scores')}_view.html")
    )
    first, last = choose_stretch(scores, start, tokens)
    page = render(scores, first, last)
    try:
        out.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise RecordError(
            f"{out}: {error.strerror}; expected a file that can be written "
            "in a folder that is there"
        ) from None
    return out


def load_scores(path: Path) -> Scores:
    """The arrays of `path`, the settings of their run, and the stream that these name."""
    import train_gpt

    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    # TypeError: a bare array, .npy
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise RecordError(
            f"{path}: no scores of a run ({error}); expected an .npz that SAVE_SCORES=1 wrote"
        ) from None
    missing = {"nll", "entropy", "mixed"} - set(arrays)
    if missing:
        raise RecordError(
            f"{path}: holds no {', '.join(sorted(missing))}; expected scores of a run with "
            "NGRAM_ENABLED=1 SAVE_SCORES=1"
        )
    try:
        hp = train_gpt.Hyperparameters.from_env(run_settings(path, arrays))
        validation = train_gpt.load_validation(hp)
    except (train_gpt.UserError, OSError) as error:
        raise RecordError(f"{path}: {error}") from None
    sizes = {name: len(arrays[name]) for name in ("nll", "entropy", "mixed")}
    if set(sizes.values()) != {validation.targets}:
        raise RecordError(
            f"{path}: holds {sizes}, but the validation stream in {hp.data_path} has "
            f"{validation.targets} targets: expected the data of that run"
        )
    if not all(np.isfinite(arrays[name]).all() for name in sizes):
        raise RecordError(f"{path}: some scores are not finite: the run diverged")
    # the mixture that is saved: hashed counts are only reported beside it
    hp = replace(hp, ngram_counts="exact")
    return Scores(
        path, hp, validation.tokens, validation.target_bytes, *(arrays[name] for name in sizes)
    )


def run_settings(path: Path, arrays: dict) -> dict[str, str]:
    """NAME -> text of the run's settings: from the scores' own `settings`, or from the log beside
    them. Relative paths are looked for from here, from the run's folder, and from the
    repository."""
    if "settings" in arrays:
        try:
            settings = {
                name.upper(): as_text(value)
                for name, value in json.loads(str(arrays["settings"])).items()
            }
        except (ValueError, AttributeError):
            raise RecordError(
                f"{path}: its settings are no JSON object; was it written by train_gpt.py?"
            ) from None
    else:
        log = path.with_name(path.stem.removesuffix("_scores") + ".txt")
        if not log.is_file():
            raise RecordError(
                f"{path}: holds no settings, and there is no {log.name} beside it to take them from"
            )
        settings = parse_log(log).settings
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        value = settings.get(name)
        homes = (Path(), path.resolve().parent.parent, Path(__file__).resolve().parent)
        found = value and next((home / value for home in homes if (home / value).exists()), None)
        settings[name] = str(found or value or "")
    return settings


def as_text(value) -> str:
    """A setting as it would be written in the environment."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def choose_stretch(scores: Scores, start: int | None, count: int) -> tuple[int, int]:
    """[first, last) targets to show: `count` from `start`, or where they gain most,
    beginning at a word."""
    total = len(scores.nll)
    if count < 1 or start is not None and not 0 <= start < total:
        raise RecordError(
            f"{scores.path}: asked for {count} targets from {start}; "
            f"there are targets 0 to {total - 1}"
        )
    if start is None:
        import train_gpt

        counter = train_gpt.ByteCounter(scores.hp)
        opens = counter.opens_word | ~counter.is_text
        begins = np.flatnonzero(opens[scores.tokens[1 : max(total - count, 0) + 2]])
        begins = begins if len(begins) else np.zeros(1, int)
        so_far = np.append(0, np.cumsum(scores.gain))
        start = int(begins[np.argmax(so_far[np.minimum(begins + count, total)] - so_far[begins])])
    return start, min(start + count, total)


def token_texts(ids, sp, after_text: bool) -> list[str]:
    """The text that each token completes; joined, the exact text. A character of several byte
    pieces stands at its last byte, '' at the others; malformed bytes are U+FFFD. A word's space is
    dropped where it opens a document, as when bytes are counted. Control pieces have no text."""
    decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
    for i in map(int, ids):
        if sp.is_byte(i):
            texts.append(decoder.decode(bytes([int(sp.id_to_piece(i)[3:5], 16)])))
            after_text = True
            continue
        if rest := decoder.decode(b"", final=True):
            texts[-1] += rest
        after = after_text
        after_text = not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))
        text = sp.id_to_piece(i).replace("\u2581", " ") if after_text else ""
        texts.append(text if after else text.removeprefix(" "))
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


# --- 3. The page ----------------------------------------------------------------------------------


def render(scores: Scores, first: int, last: int) -> str:
    """The page for targets [first, last)."""
    import sentencepiece

    import train_gpt

    sp = sentencepiece.SentencePieceProcessor(model_file=scores.hp.tokenizer_path)
    hp, size = scores.hp, slice(first, last)
    least = 1 if hp.ngram_alpha == "online" else hp.ngram_min_count
    known = train_gpt.BackoffCounts(scores.tokens[: last + 1], replace(hp, ngram_min_count=least))
    order, context, pair = (array[size] for array in (known.order, known.context, known.pair))
    # enough for the first context and to finish its characters
    lead = max(0, first - max(hp.ngram_order, 4))
    ids = scores.tokens[lead + 1 : last + 1]
    before = int(scores.tokens[lead])
    is_text = not (sp.is_control(before) or sp.is_unknown(before) or sp.is_unused(before))
    texts = token_texts(ids, sp, is_text)
    bits = {
        name: getattr(scores, name)[size].astype(np.float64) / math.log(2)
        for name in ("nll", "mixed", "entropy")
    }
    data = dict(
        start=first,
        total=len(scores.nll),
        lead=texts[: first - lead],
        text=texts[first - lead :],
        piece={
            k: sp.id_to_piece(int(i))
            for k, i in enumerate(ids[first - lead :])
            if sp.is_byte(int(i)) or not texts[first - lead + k]
        },
        **{name: [round(float(b), 4) for b in column] for name, column in bits.items()},
        order=order.tolist(),
        context=context.tolist(),
        pair=pair.tolist(),
        bytes=scores.bytes[size].tolist(),
    )
    spans = token_spans(ids[first - lead :], texts[first - lead :], scores, size, order, sp)
    whole, part = totals(scores, slice(None)), totals(scores, size)
    run = hp.run_id or scores.path.stem.removesuffix("_scores")
    return fill(
        PAGE,
        dict(
            title=html.escape(f"{run}: what counting saved"),
            run=html.escape(run),
            light=theme_css("light"),
            dark=theme_css("dark"),
            css=CSS + mode_css(),
            script=SCRIPT,
            text=spans,
            data=script_json(data),
            lead=lead_sentence(hp, part, last - first),
            totals=totals_table(part, whole),
            overview=overview_svg(bits),
            stream=stream_svg(scores, first, last),
            legend=legends(),
            where=f"targets {first:,} to {last - 1:,} of {len(scores.nll):,}",
        ),
    )


def fill(template: str, parts: dict[str, str]) -> str:
    """`template` with every @@name@@ replaced once; what is put in is not looked at again."""
    return re.sub(r"@@(\w+)@@", lambda match: parts[match[1]], template)


def script_json(value) -> str:
    """JSON that can stand in a <script>: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """`text` for HTML: escaped, with a sign before each newline;
    other control characters as their pictures."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return (
        html.escape(shown)
        .replace("\n", '<i class="nl"></i>\n')
        .replace("\t", '<i class="tab"></i>\t')
    )


def token_spans(ids, texts: list[str], scores: Scores, size: slice, order, sp) -> str:
    """One element per target. Its classes are its bins in the four ways of colouring."""
    gain = np.digitize(scores.gain[size], GAIN_EDGES)
    model, mixed = (
        np.digitize(x[size] / math.log(2), COST_EDGES) for x in (scores.nll, scores.mixed)
    )
    longest, spans = np.digitize(order, ORDER_EDGES), []
    for k, (i, text) in enumerate(zip(map(int, ids), texts)):
        kind, extra = "", ""
        if not text:
            kind = " part" if sp.is_byte(i) else " doc" if i == sp.bos_id() else " ctl"
            extra = f' data-p="{html.escape(sp.id_to_piece(i))}"' if kind == " ctl" else ""
        spans.append(
            f'<span role="option" tabindex="-1" id="t{size.start + k}" class="g{gain[k]} '
            f'm{model[k]} x{mixed[k]} o{longest[k]}{kind}"{extra}>{visible(text)}</span>'
        )
    return "".join(spans)


def totals(scores: Scores, size: slice) -> dict[str, float]:
    """Targets, bytes, and bits of the model and of the mixture within `size`;
    bpb where there are bytes."""
    size_bytes = int(scores.bytes[size].sum(dtype=np.int64))
    bits = {
        name: float(getattr(scores, name)[size].sum(dtype=np.float64) / math.log(2))
        for name in ("nll", "mixed")
    }
    return dict(
        targets=len(scores.nll[size]),
        bytes=size_bytes,
        **bits,
        **{f"{name}_bpb": b / size_bytes if size_bytes else math.nan for name, b in bits.items()},
    )


def totals_table(part: dict, whole: dict) -> str:
    """The header's table: bits per byte of the stretch and of the whole stream."""
    rows = []
    for name, t in (("This stretch", part), ("Whole stream", whole)):
        saved = t["nll_bpb"] - t["mixed_bpb"]
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{t["targets"]:,}</td><td>{t["bytes"]:,}</td>'
            f'<td>{t["nll_bpb"]:.4f}</td><td class="strong">{t["mixed_bpb"]:.4f}</td>'
            f'<td class="{"saved" if saved >= 0 else "lost"}">{signed(saved, 4)}</td></tr>'
        )
    return "".join(rows)


def signed(value: float, digits: int) -> str:
    return ("+" if value >= 0 else "\u2212") + f"{abs(value):.{digits}f}"


def lead_sentence(hp, part: dict, count: int) -> str:
    """What a visitor sees, in plain words."""
    saved = part["nll"] - part["mixed"]
    verb = "saves" if saved >= 0 else "loses"
    return (
        "A neural network predicts each token of a text. Beside it, exact counts of what followed "
        f"the same {hp.ngram_min_order - 1} to {hp.ngram_order - 1} tokens earlier in the stream "
        f"predict it too. In these {count:,} tokens the mixture of both needs "
        f"<strong>{part['mixed']:,.0f} bits</strong> where the network alone needs "
        f"{part['nll']:,.0f}: it {verb} <strong>{abs(saved):,.0f}</strong>."
    )


def mode_css() -> str:
    """The colours of the four ways of colouring."""
    rules = [
        f'[data-mode="gain"] .g{i}{{background:var(--gain{i})}}' for i in range(len(GAIN_EDGES) + 1)
    ]
    for mode, letter, edges in (
        ("model", "m", COST_EDGES),
        ("mixed", "x", COST_EDGES),
        ("order", "o", ORDER_EDGES),
    ):
        rules += [
            f'[data-mode="{mode}"] .{letter}{i}{{background:var(--cost{i})}}'
            for i in range(len(edges) + 1)
        ]
    return "\n".join(rules)


def legends() -> str:
    """One legend per way of colouring; the page shows that of the current one."""
    words = [f"{a:g} to {b:g}" for a, b in pairwise(GAIN_EDGES)]
    words = [f"lost {-GAIN_EDGES[0]}+", *words, f"saved {GAIN_EDGES[-1]}+"]
    short = [str(abs(e)).removeprefix("0") for e in GAIN_EDGES]
    parts = [
        legend(
            "gain",
            "bits lost \u2190 \u2192 bits saved",
            [f"g{i}" for i in range(len(words))],
            short,
            words,
        )
    ]
    costs = [f"{e:g}".removeprefix("0") if e < 1 else f"{e:g}" for e in COST_EDGES]
    words = [
        f"under {COST_EDGES[0]}",
        *(f"{a:g} to {b:g}" for a, b in pairwise(COST_EDGES)),
        f"{COST_EDGES[-1]}+",
    ]
    for mode, letter, label in (
        ("model", "m", "bits the network pays"),
        ("mixed", "x", "bits the mixture pays"),
    ):
        parts.append(legend(mode, label, [f"{letter}{i}" for i in range(len(words))], costs, words))
    names = ["none", *map(str, ORDER_EDGES[:-1]), f"{ORDER_EDGES[-1]}+"]
    classes = [f"o{i}" for i in range(len(names))]
    parts.append(legend("order", "tokens of the longest known gram", classes, names, names))
    return "".join(parts)


def legend(mode: str, label: str, classes: list[str], marks: list[str], words: list[str]) -> str:
    """Swatches with `marks` under their borders, or under their middles if there are as many."""
    cells = "".join(f'<i class="{c}" title="{html.escape(w)}"></i>' for c, w in zip(classes, words))
    share, shift = 100 / len(classes), 0.5 if len(marks) == len(classes) else 1
    ticks = "".join(
        f'<b style="left:{share * (i + shift):.2f}%">{m}</b>' for i, m in enumerate(marks)
    )
    return (
        f'<figure class="legend" data-for="{mode}" data-mode="{mode}">'
        f"<figcaption>{label}</figcaption>"
        f'<span class="swatches" aria-hidden="true">{cells}</span>'
        f'<span class="ticks" aria-hidden="true">{ticks}</span></figure>'
    )


def overview_svg(bits: dict[str, np.ndarray], columns: int = 240) -> str:
    """Bits saved (up) and lost (down) along the stretch, one column per few tokens."""
    gain = bits["nll"] - bits["mixed"]
    edges = np.unique(np.linspace(0, len(gain), min(columns, len(gain)) + 1).astype(int))
    up, down = (np.add.reduceat(np.maximum(sign * gain, 0), edges[:-1]) for sign in (1, -1))
    scale, zero = 40 / max(float((up + down).max()), 1e-9), 0.0
    zero = 2 + scale * float(up.max())
    parts, share = [], 1000 / len(gain)
    for a, b, u, d in zip(edges, edges[1:], up, down):
        x, width = a * share, (b - a) * share
        gap = min(0.8, width / 4)
        parts.append(
            f'<rect class="up" x="{x:.2f}" y="{zero - u * scale:.2f}" width="{width - gap:.2f}" '
            f'height="{u * scale:.2f}"/><rect class="down" x="{x:.2f}" y="{zero:.2f}" '
            f'width="{width - gap:.2f}" height="{d * scale:.2f}"/>'
        )
    height = zero + scale * float(down.max()) + 2
    label = f"Bits saved and lost along the stretch: {up.sum():,.0f} saved, {down.sum():,.0f} lost"
    return (
        f'<svg viewBox="0 0 1000 {height:.2f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">'
        f'{"".join(parts)}<line x1="0" x2="1000" y1="{zero:.2f}" y2="{zero:.2f}"/></svg>'
    )


def stream_svg(scores: Scores, first: int, last: int, columns: int = 120) -> str:
    """Bits per byte along the whole stream, network above, mixture below,
    and where the stretch lies."""
    total = len(scores.nll)
    edges = np.unique(np.linspace(0, total, min(columns, total) + 1).astype(int))
    size = np.maximum(np.add.reduceat(scores.bytes.astype(np.int64), edges[:-1]), 1)
    model, mixed = (
        np.add.reduceat(x.astype(np.float64), edges[:-1]) / math.log(2) / size
        for x in (scores.nll, scores.mixed)
    )
    top = float(max(model.max(), mixed.max())) * 1.05
    x = (edges[:-1] + edges[1:]) / 2 / total * 1000

    def points(y, step=1):
        return " ".join(f"{a:.1f},{100 - 100 * b / top:.2f}" for a, b in zip(x[::step], y[::step]))

    left, width = 1000 * first / total, max(1000 * (last - first) / total, 3)
    label = (
        f"Bits per byte along the whole stream: the network from {model[0]:.2f} to "
        f"{model[-1]:.2f}, the mixture from {mixed[0]:.2f} to {mixed[-1]:.2f}"
    )
    return (
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<rect class="here" x="{left:.1f}" y="0" width="{width:.1f}" height="100"/>'
        f'<polygon points="{points(model)} {points(mixed, -1)}"/>'
        f'<polyline class="model" points="{points(model)}"/>'
        f'<polyline class="mixed" points="{points(mixed)}"/>'
        f'<line x1="0" x2="1000" y1="99.5" y2="99.5"/></svg>'
    )


# --- 4. The README's figures ----------------------------------------------------------------------
# Grey is the network, blue what the counts add, orange a loss. Bars start at zero, lines and bars
# carry their own names, seeds are shown together: mean and range. On GitHub's own backgrounds, at
# twice the pixels of its column.

FIGURES = {  # name -> text for those who do not see it; in the order of the README
    "fig_bpb": (
        "Bits per byte from the last validation to the score: averaged, quantised, "
        "sliding window, mixed"
    ),
    "fig_orders": (
        "What the counts save, by the longest n-gram whose context was known, "
        "and how many targets that are"
    ),
    "fig_training": "Training loss and learning rate over training time",
    "fig_calibration": (
        "Expected and actual nats per token by the model's entropy, for the network and the mixture"
    ),
    "fig_bytes": "Bytes of the submission by kind",
}
WIDTH, DPI = 8.3, 200  # inches; 830 px at twice the density
BACKGROUNDS = {"light": "#ffffff", "dark": "#0d1117"}


def plot(folder) -> list[Path]:
    """Writes <folder>/logs/<figure>_{light,dark}.png from the reported logs (see submitted_logs);
    returns their paths. A figure whose lines a log lacks is skipped, with a line that says so; what
    an earlier call drew of it is removed. The same logs give the same pixels."""
    folder, written = Path(folder), []
    logs = submitted_logs(folder)
    for name in FIGURES:
        paths = [folder / "logs" / f"{name}_{theme}.png" for theme in THEMES]
        try:
            data = COLLECT[name](logs)
        except RecordError as error:
            for path in paths:
                path.unlink(missing_ok=True)
            print(f"{name}: skipped: {error}")
            continue
        for path, theme in zip(paths, THEMES):
            draw(name, data, theme, path)
        written += paths
    return written


def pictures(folder) -> str:
    """Markdown for the README: each figure that is there, in the reader's theme."""
    return "\n\n".join(
        f"<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="logs/{name}_dark.png">\n'
        f'  <img src="logs/{name}_light.png" width="830" alt="{html.escape(text)}">\n</picture>'
        for name, text in FIGURES.items()
        if (Path(folder) / "logs" / f"{name}_light.png").is_file()
    )


def submitted_logs(folder: Path) -> list[Log]:
    """The logs that README's results table links to. If it links none, one per seed of
    submission.json, in its order: logs/*.txt with that SEED; of several, that whose score it
    states."""
    if linked := Folder(folder).linked_logs():
        return [parse_log(path) for path in linked]
    path = folder / "submission.json"
    try:
        submission = json.loads(path.read_text(encoding="utf-8"))
        seeds = [str(seed) for seed in submission["seeds"]]
        stated = {
            str(seed): result["val_bpb"] for seed, result in submission["seed_results"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path}: no seeds and seed_results there ({error!r}); make it with `report`"
        ) from None
    logs, found = [], []
    for log in sorted((folder / "logs").glob("*.txt")):
        with contextlib.suppress(RecordError):  # no text: no log of ours
            logs.append(parse_log(log))
    for seed in seeds:
        ours = [log for log in logs if log.settings.get("SEED") == seed]
        if len(ours) > 1:
            ours = [
                log
                for log in ours
                if log.has("final_ngram_exact")
                and abs(
                    log.find("final_ngram_exact").number("val_bpb") - stated.get(seed, math.nan)
                )
                < 5e-9
            ]
        if len(ours) != 1:
            raise RecordError(
                f"{path}: seed {seed} has {len(ours)} logs in {folder / 'logs'}, expected one"
            )
        found += ours
    if not found:
        raise RecordError(f"{path}: names no seeds")
    return found


# What each figure needs, from the logs. One row per seed.


def per_seed(logs: list[Log], prefix: str, key: str) -> list[dict]:
    """For each log, its lines with `prefix` by the value of their `key`.
    RecordError: it has none."""
    tables = [{line[key]: line for line in log.all(f"{prefix} ")} for log in logs]
    for log, table in zip(logs, tables):
        if not table:
            raise RecordError(f"{log.path}: has no line {prefix!r}; a log of an older script?")
    return tables


def collect_training(logs: list[Log]) -> dict:
    """Loss and lr over seconds on a grid that all seeds share."""
    for log in logs:
        if not log.train_steps or any(step.lr_scale is None for step in log.train_steps):
            raise RecordError(f"{log.path}: its train_loss lines are missing or have no lr_scale")
    seconds = [np.array([step.seconds for step in log.train_steps]) for log in logs]
    last = min(s[-1] for s in seconds)
    grid = np.unique(np.concatenate(seconds))
    grid = grid[(grid >= max(s[0] for s in seconds)) & (grid <= last)]
    rows = {
        name: np.array(
            [
                np.interp(grid, s, [getattr(step, name) for step in log.train_steps])
                for s, log in zip(seconds, logs)
            ]
        )
        for name in ("loss", "lr_scale")
    }
    validated = [(v.seconds, v.loss) for log in logs for v in log.validations]
    steps = [max(step.step for step in (*log.train_steps, *log.validations)) for log in logs]
    return dict(seconds=grid, **rows, validated=validated, steps=steps)


def collect_bpb(logs: list[Log]) -> dict:
    """The bpb of each seed by stage."""
    learns = any(log.settings.get("TTT_EPOCHS", "0") != "0" for log in logs)
    stages = {
        "last validation": [],
        "averaged, float": [],
        "quantised, read back": [],
        "sliding, learning" if learns else "sliding window": [],
        "mixed with counts": [],
    }
    for log in logs:
        if not log.validations:
            raise RecordError(f"{log.path}: has no line with val_bpb")
        bits = log.settings.get("QUANT_BITS", "6")
        lines = [
            log.find(name).number("val_bpb")
            for name in (
                "final_float_exact",
                f"final_int{bits}_roundtrip_exact",
                f"final_int{bits}_sliding_window_exact",
                "final_ngram_exact",
            )
        ]
        for values, value in zip(stages.values(), [log.validations[-1].bpb, *lines]):
            values.append(value)
    return dict(stages=stages)


def collect_orders(logs: list[Log]) -> dict:
    """Gain in bpb and share of the targets by the longest known order, 0 where a log has none;
    rows are seeds."""
    tables = per_seed(logs, "ngram_order", "order")
    orders = sorted({order for table in tables for order in table}, key=int)
    gain, targets = (
        np.array(
            [
                [table[order].number(key) if order in table else 0.0 for order in orders]
                for table in tables
            ]
        )
        for key in ("gain", "targets")
    )
    return dict(
        orders=[int(order) for order in orders],
        gain=gain,
        share=targets / targets.sum(1, keepdims=True),
    )


def collect_bytes(logs: list[Log]) -> dict:
    """Bytes by kind; rows are seeds."""
    lines = [log.find("artifact_bytes ") for log in logs]
    kinds = dict.fromkeys(kind for line in lines for kind in line)
    return dict(
        kinds=list(kinds),
        bytes=np.array(
            [[line.number(kind) if kind in line else 0 for kind in kinds] for line in lines]
        ),
    )


def collect_calibration(logs: list[Log]) -> dict:
    """Expected, actual and mixed nats per token by bin of the model's entropy; rows are seeds. Bins
    that are empty or absent for a seed are left out; the share of targets is of all."""
    tables = per_seed(logs, "calibration", "entropy")
    bins = [
        name
        for name in tables[0]
        if all(name in table and table[name].number("targets") > 0 for table in tables)
    ]
    if not bins:
        raise RecordError(
            f"{logs[0].path}: no bin of its calibration lines holds targets of every seed"
        )
    columns = {
        key: np.array([[table[name].number(key) for name in bins] for table in tables])
        for key in ("expected", "nll", "mixed", "targets")
    }
    all_targets = np.array(
        [sum(line.number("targets") for line in table.values()) for table in tables]
    )
    columns["share"] = columns.pop("targets") / all_targets[:, None]
    order = np.argsort(columns["expected"].mean(0), kind="stable")
    return {key: column[:, order] for key, column in columns.items()}


# How each figure is drawn: on a matplotlib Figure, with the colours of a theme.


def draw(name: str, data: dict, theme: str, path: Path) -> None:
    """One figure in one theme. Neither pyplot nor the user's matplotlibrc has a say,
    and no date goes into the file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = THEMES[theme] | {"paper": BACKGROUNDS[theme]}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                "font.size": 9.5,
                "text.color": colors["ink"],
                "axes.edgecolor": colors["line"],
                "axes.labelcolor": colors["soft"],
                "axes.facecolor": colors["paper"],
                "axes.spines.top": False,
                "axes.spines.right": False,
                "xtick.color": colors["soft"],
                "ytick.color": colors["soft"],
                "axes.axisbelow": True,
                "axes.unicode_minus": True,
                "grid.color": colors["line"],
                "grid.linewidth": 0.8,
                "xtick.major.size": 0,
                "ytick.major.size": 0,
            }
        )
        figure = Figure(facecolor=colors["paper"], dpi=DPI)
        FigureCanvasAgg(figure)
        DRAW[name](figure, data, colors)
        figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})


def heading(figure, height: float, title: str, note: str, colors: dict) -> None:
    """Sets the size; a title and a line under it stand at the upper left,
    `margins` leaves them their room."""
    figure.set_size_inches(WIDTH, height)
    figure.text(0.02, 1 - 0.17 / height, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.44 / height, note, fontsize=9.5, color=colors["soft"], va="top")


def margins(
    figure, height: float, left: float, right: float = 0.3, bottom: float = 0.35, head=0.8, **more
) -> None:
    """The plotting area, by its distance in inches from the edges of the figure."""
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - right / WIDTH,
        bottom=bottom / height,
        top=1 - head / height,
        **more,
    )


def seeds_note(count: int) -> str:
    return "one seed" if count == 1 else f"mean of {count} seeds, thin line: their range"


def named_bars(
    axes, names: list[str], rows: np.ndarray, colors: list[str], labels: list[str], ink: str
) -> None:
    """Horizontal bars from zero, the first on top: means of `rows` (seeds x bars), ranges,
    a label at each end."""
    y, mean = np.arange(len(names))[::-1], rows.mean(0)
    axes.barh(y, mean, 0.62, color=colors)
    if len(rows) > 1:
        axes.hlines(y, rows.min(0), rows.max(0), color=ink, linewidth=1.1)
    low, high = min(0.0, float(rows.min())), max(0.0, float(rows.max()))
    span = high - low or 1.0
    for at, top, label in zip(y, np.maximum(rows.max(0), 0), labels):
        axes.text(top + 0.015 * span, at, label, va="center", fontsize=9.5)
    axes.set_xlim(low - (0.02 * span if low < 0 else 0), high)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(y, names, color=ink)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.axvline(0, color=ink, linewidth=0.8)


def draw_bpb(figure, data: dict, colors: dict) -> None:
    names, rows = list(data["stages"]), np.array(list(data["stages"].values())).T
    mean, height = rows.mean(0), 2.75
    heading(
        figure,
        height,
        "Where the bits per byte go",
        f"bits per byte of the validation stream, lower is better; {seeds_note(len(rows))}",
        colors,
    )
    steps = ["", *(f"{signed(b - a, 4)}" for a, b in pairwise(mean))]
    axes = figure.subplots()
    margins(figure, height, 1.75, 1.75, 0.15)
    named_bars(
        axes,
        names,
        rows,
        [colors["plain"]] * (len(names) - 1) + [colors["saved"]],
        [f"{m:.4f}" for m in mean],
        colors["ink"],
    )
    for at, step in zip(np.arange(len(names))[::-1], steps):
        color = colors["lost"] if step.startswith("+") and float(step) > 0 else colors["saved"]
        axes.text(
            1 + 1.55 / (WIDTH - 3.5),
            at,
            step,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            color=color,
        )


def draw_orders(figure, data: dict, colors: dict) -> None:
    gain, share, height = data["gain"], data["share"], 0.95 + 0.31 * len(data["orders"])
    heading(
        figure,
        height,
        "What counting saves, by the longest n-gram whose context was known",
        f"the gain adds up to {gain.sum(1).mean():.4f} bits per byte; {seeds_note(len(gain))}",
        colors,
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    margins(figure, height, 1.1, 0.75, 0.32, wspace=0.42)
    names = ["none" if order == 0 else f"{order} tokens" for order in data["orders"]]
    hues = [colors["saved"] if g >= 0 else colors["lost"] for g in gain.mean(0)]
    named_bars(left, names, gain, hues, [signed(g, 4) for g in gain.mean(0)], colors["ink"])
    named_bars(
        right,
        names,
        100 * share,
        [colors["plain"]] * len(names),
        [f"{100 * s:.1f} %" for s in share.mean(0)],
        colors["ink"],
    )
    right.set_yticks([])
    left.set_xlabel("bits per byte saved", loc="left")
    right.set_xlabel("share of the targets", loc="left")


def draw_bytes(figure, data: dict, colors: dict) -> None:
    order = np.argsort(-data["bytes"].mean(0), kind="stable")
    rows, names = data["bytes"][:, order], [data["kinds"][i] for i in order]
    mean, height = rows.mean(0), 0.85 + 0.34 * len(names)
    total = rows.sum(1).max()
    note = f"the largest of {len(rows)} seeds; bars: their mean, thin line: their range"
    note = "bytes by kind" if len(rows) == 1 else note
    heading(
        figure,
        height,
        f"{total:,.0f} bytes, {100 * total / CAP:.1f} % of the {CAP:,} allowed",
        note,
        colors,
    )
    axes = figure.subplots()
    margins(figure, height, 1.25, 1.75, 0.1)
    named_bars(
        axes,
        names,
        rows,
        [colors["saved"]] * len(names),
        [f"{b:,.0f}   {100 * b / mean.sum():.1f} %" for b in mean],
        colors["ink"],
    )


def band(axes, x, rows: np.ndarray, color: str) -> None:
    """Mean of `rows` over `x` as a line, their range as a band."""
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=color, alpha=0.22, linewidth=0)
    axes.plot(x, rows.mean(0), color=color, linewidth=1.6, solid_capstyle="round")


def draw_training(figure, data: dict, colors: dict) -> None:
    height, x, count, steps = 4.4, data["seconds"], len(data["steps"]), sorted(set(data["steps"]))
    heading(
        figure,
        height,
        "Training",
        f"{' to '.join(f'{s:,}' for s in steps[:: max(1, len(steps) - 1)])} steps; "
        f"{'one seed' if count == 1 else f'mean of {count} seeds, band: their range'}",
        colors,
    )
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    margins(figure, height, 0.62, 1.35, 0.5, head=1.02, hspace=0.42)
    for axes, rows, name in ((loss, data["loss"], "training loss"), (rate, data["lr_scale"], "")):
        band(axes, x, rows, colors["plain"])
        middle = x[0] + 0.45 * (x[-1] - x[0])
        axes.annotate(
            name,
            (middle, np.interp(middle, x, rows.max(0))),
            (4, 7),
            textcoords="offset points",
            color=colors["soft"],
        )
    if data["validated"]:
        at, value = np.array(data["validated"]).T
        loss.plot(at, value, "o", color=colors["saved"], markersize=4.5, clip_on=False)
        final = value[np.argsort(at)[-count:]].mean()
        loss.text(
            1.01,
            final,
            f"validation {final:.3f}",
            transform=loss.get_yaxis_transform(),
            va="center",
            color=colors["saved"],
        )
    rate.set_ylim(0, 1.05)
    rate.set_yticks([0, 1], ["0", "1"])
    rate.set_xlim(0, None)
    rate.set_xlabel("training time, seconds", loc="left")
    panels(colors, {loss: "nats per token", rate: "learning rate, share of its peak"})


def panels(colors: dict, titles: dict) -> None:
    """Light frames: a quiet title over each of the axes, horizontal lines,
    no spines but the lowest."""
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize=9.5, color=colors["soft"], pad=7)
        axes.grid(axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)


def draw_calibration(figure, data: dict, colors: dict) -> None:
    height, x, count = 5.0, data["expected"].mean(0), len(data["nll"])
    heading(
        figure,
        height,
        "Does the model know what it does not know?",
        f"grouped by what the model expects (its entropy); dashed: just as expected; "
        f"{'one seed' if count == 1 else f'mean of {count} seeds, thin lines: range'}",
        colors,
    )
    curve, amount = figure.subplots(2, 1, sharex=True, height_ratios=(3.6, 1))
    margins(figure, height, 0.62, 1.05, 0.5, head=1.02, hspace=0.36)
    curve.plot([0, x[-1]], [0, x[-1]], color=colors["soft"], linewidth=0.9, linestyle=(0, (4, 3)))
    last = {key: float(data[key].mean(0)[-1]) for key in ("nll", "mixed")}
    # then their names move apart
    close = abs(last["nll"] - last["mixed"]) < 0.06 * max(last.values())
    above = "nll" if last["nll"] >= last["mixed"] else "mixed"
    for key, color, label in (("nll", "plain", "network"), ("mixed", "saved", "mixture")):
        rows, shift = data[key], (7 if key == above else -7) * close
        if count > 1:
            curve.vlines(x, rows.min(0), rows.max(0), color=colors["ink"], linewidth=1.1)
        curve.plot(x, rows.mean(0), "-o", color=colors[color], linewidth=1.6, markersize=4.5)
        curve.annotate(
            label,
            (x[-1], last[key]),
            (9, shift),
            textcoords="offset points",
            va="center",
            color=colors["soft" if key == "nll" else color],
            annotation_clip=False,
        )
    width = 0.6 * np.min(np.diff(x), initial=float(x[-1]))
    amount.bar(x, 100 * data["share"].mean(0), width, color=colors["plain"])
    amount.yaxis.set_major_formatter("{x:.0f} %")
    amount.set_xlabel("the model's entropy, nats (mean of each group)", loc="left")
    curve.set_xlim(0, float(x.max()) + width / 2)
    curve.set_ylim(0, None)
    panels(colors, {curve: "nats per token", amount: "share of the targets"})


CAP = 16_000_000  # bytes (train_gpt.SIZE_CAP, which needs torch to be read)
COLLECT = dict(
    fig_bpb=collect_bpb,
    fig_orders=collect_orders,
    fig_training=collect_training,
    fig_calibration=collect_calibration,
    fig_bytes=collect_bytes,
)
DRAW = dict(
    fig_bpb=draw_bpb,
    fig_orders=draw_orders,
    fig_training=draw_training,
    fig_calibration=draw_calibration,
    fig_bytes=draw_bytes,
)

# --- 5. The page's template -----------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@title@@</title>
<style>
:root{@@light@@}
@media (prefers-color-scheme:dark){:root:not([data-theme="light"]){@@dark@@}}
:root[data-theme="dark"]{@@dark@@}
@@css@@
</style>
</head>
<body>
<a class="skip" href="#text">Skip to the text</a>
<header>
  <div class="intro">
    <p class="eyebrow">Parameter Golf <span aria-hidden="true">/</span> @@run@@</p>
    <h1>What counting saved</h1>
    <p class="lead">@@lead@@</p>
  </div>
  <div class="facts">
    <table>
      <caption>Bits per byte; lower is better</caption>
      <thead><tr><td></td><th scope="col">tokens</th><th scope="col">bytes</th><th scope="col">network</th>
      <th scope="col">mixture</th><th scope="col">saved</th></tr></thead>
      <tbody>@@totals@@</tbody>
    </table>
    <figure class="stream">@@stream@@<figcaption>Bits per byte along the whole stream:
      <span class="key-model">network</span>, <span class="key-mixed">mixture</span>; the band is the text below,
      @@where@@.</figcaption></figure>
  </div>
</header>
<div class="bar" id="bar">
  <div class="overview" id="overview">@@overview@@<i id="window"></i><i id="cursor"></i></div>
  <div class="tools">
    <label class="mode"><span>Colour</span>
      <select id="mode">
        <option value="gain">bits saved</option>
        <option value="model">network's cost</option>
        <option value="mixed">mixture's cost</option>
        <option value="order">longest match</option>
      </select></label>
    @@legend@@
    <div class="buttons">
      <button id="next" class="saved" aria-keyshortcuts="n" title="Next biggest gain (n; back: p)">Gains</button>
      <button id="nextloss" class="lost" aria-keyshortcuts="Shift+N"
        title="Next biggest loss (Shift+N; back: Shift+P)">Losses</button>
      <button id="theme" aria-keyshortcuts="t" title="Theme: system, light, dark (t)">Theme: system</button>
    </div>
  </div>
</div>
<main>
  <div id="text" class="text" role="listbox" aria-label="The validation text, token by token"
    aria-describedby="keys" data-mode="gain">@@text@@</div>
  <div class="side">
    <section id="card" class="card" aria-label="The token under the pointer or the focus">
      <p class="hint">Point at a word, tap it, or press an arrow key.</p></section>
    <nav class="rank" aria-label="Biggest gains and losses">
      <h2>Biggest gains</h2><ol id="gains"></ol>
      <h2>Biggest losses</h2><ol id="losses"></ol>
    </nav>
  </div>
<footer id="keys">
  <p class="keys"><span><kbd>&larr;</kbd> <kbd>&rarr;</kbd> token</span> <span><kbd>&uarr;</kbd> <kbd>&darr;</kbd>
  line</span> <span><kbd>n</kbd> <kbd>p</kbd> next, previous biggest gain</span> <span>with <kbd>Shift</kbd> loss</span>
  <span><kbd>c</kbd> colour</span> <span><kbd>t</kbd> theme</span></p>
  <p>Every probability shown was fixed before its token was seen. The network is charged &minus;log<sub>2</sub> of the
  probability it gave to the token that came; so is the mixture. Counts are exact: of all earlier places in the stream
  where the same context stood. The online mixture weighs all orders; the card shows the longest known one.</p>
</footer>
</main>
<p id="said" class="quiet" aria-live="polite"></p>
<script type="application/json" id="data">@@data@@</script>
<script>@@script@@</script>
</body>
</html>
"""  # noqa: E501 (the page's own lines: breaking them would change its bytes)

CSS = """
*{box-sizing:border-box}
html{background:var(--paper);color:var(--ink);-webkit-text-size-adjust:100%;scrollbar-color:var(--plain) transparent}
body{margin:0;font:15px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
  "Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
header,main,.bar>div{max-width:1180px;margin-inline:auto;padding-inline:28px}
header{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:20px 56px;padding-block:44px 26px;
  align-items:end}
.eyebrow{margin:0 0 10px;color:var(--soft);font-size:13px;letter-spacing:.04em;overflow-wrap:anywhere}
h1{margin:0 0 14px;font:500 40px/1.1 ui-serif,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,
  "Liberation Serif",serif;letter-spacing:-.015em;text-wrap:balance}
.lead{margin:0;max-width:58ch;color:var(--soft);font-size:16px;line-height:1.6;text-wrap:pretty}
.lead strong{color:var(--ink);font-weight:600}
.quiet,.skip:not(:focus){position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);
  white-space:nowrap}
.skip:focus{position:fixed;z-index:9;top:8px;left:8px;padding:8px 14px;background:var(--card);color:var(--ink)}
table{width:100%;border-collapse:collapse;font-size:14px}
th,td{padding:6px 0 6px 12px;text-align:right;font-weight:400;white-space:nowrap}
caption{padding-bottom:4px;color:var(--soft);font-size:12.5px;text-align:left}
thead th{color:var(--soft);font-size:12.5px}
tbody th{padding-left:0;text-align:left}
tbody tr{border-top:1px solid var(--line)}
.strong{font-weight:650}
.saved{color:var(--saved)}
.lost{color:var(--lost)}
td.saved,td.lost{font-weight:650}
figure{margin:0}
figcaption{color:var(--soft);font-size:12.5px}
.stream{margin-top:16px}
.stream svg{display:block;width:100%;height:62px;margin-bottom:6px}
.stream polygon{fill:var(--saved);opacity:.16}
.stream polyline{fill:none;stroke-width:1.5;vector-effect:non-scaling-stroke}
.stream .model{stroke:var(--plain)}
.stream .mixed{stroke:var(--saved)}
.stream .here{fill:var(--ink);opacity:.12}
.stream line,.overview line{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
.key-model,.key-mixed{white-space:nowrap}
.key-model::before,.key-mixed::before{content:"";display:inline-block;width:14px;height:2px;margin-right:5px;
  vertical-align:.28em;background:var(--plain)}
.key-mixed::before{background:var(--saved)}
.bar{position:sticky;top:0;z-index:3;background:var(--paper);border-block:1px solid var(--line)}
.bar>div{position:relative}
.overview{height:52px;padding-block:6px;cursor:pointer;touch-action:none}
.overview svg{display:block;width:100%;height:40px}
.overview .up{fill:var(--saved)}
.overview .down{fill:var(--lost)}
#window,#cursor{position:absolute;top:2px;bottom:2px;pointer-events:none}
#window{background:var(--ink);opacity:.09;border-radius:2px;min-width:3px}
#cursor{visibility:hidden;width:2px;margin-left:-1px;background:var(--mark)}
.tools{display:flex;gap:8px 28px;align-items:center;padding-bottom:8px}
.mode{display:flex;gap:8px;align-items:center;color:var(--soft);font-size:13px}
select,button{font:inherit;font-size:13px;color:var(--ink);background:var(--card);border:1px solid var(--line);
  border-radius:6px;padding:4px 10px;min-height:30px;white-space:nowrap;cursor:pointer}
.tools button.saved{color:var(--saved)}
.tools button.lost{color:var(--lost)}
button:hover,select:hover{border-color:var(--plain)}
.buttons{display:flex;gap:6px;margin-left:auto}
.buttons .saved::after,.buttons .lost::after{content:" \\2193";color:var(--soft)}
#theme{color:var(--soft);min-width:112px}
.legend{display:none;position:relative;width:300px;flex:0 1 300px}
body:not([data-mode]) .legend[data-for="gain"],body[data-mode="gain"] .legend[data-for="gain"],
body[data-mode="model"] .legend[data-for="model"],body[data-mode="mixed"] .legend[data-for="mixed"],
body[data-mode="order"] .legend[data-for="order"]{display:block}
.legend figcaption{font-size:11.5px;line-height:1.3;text-align:center;margin-bottom:2px}
.swatches{display:flex;height:9px;border:1px solid var(--line);border-radius:3px;overflow:hidden}
.swatches i{flex:1}
.ticks{position:relative;display:block;height:13px;font-size:10.5px;line-height:13px;color:var(--soft)}
.ticks b{position:absolute;font-weight:400;transform:translateX(-50%)}
main{display:grid;grid-template-columns:minmax(0,1fr) 316px;gap:0 52px;padding-block:28px 24px;align-items:start}
.text{max-width:66ch;font:18.5px/1.78 ui-serif,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,
  "Liberation Serif",serif;font-variant-numeric:normal;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.text:focus{outline:none}
.text>span{border-radius:2.5px;padding-block:1.5px;cursor:default;outline-offset:0;scroll-margin:130px 0 40px;
  -webkit-box-decoration-break:clone;box-decoration-break:clone}
[data-mode="gain"] :is(.g0,.g1,.g2,.g3){text-decoration:underline;text-decoration-color:var(--lost);
  text-decoration-thickness:1.5px;text-underline-offset:4px}
.text>.ctx{box-shadow:0 3px 0 -1px var(--mark)}
.text>.on{outline:2px solid var(--mark);position:relative;z-index:1}
.text>.hover{outline:1.5px solid var(--plain);position:relative;z-index:1}
.text>:focus-visible{outline:3px solid var(--mark)}
.text .nl::before{content:"\\21b5";color:var(--soft);font-style:normal;font-size:.75em}
.text .tab::before{content:"\\2192";color:var(--soft);font-style:normal;font-size:.75em}
.text .part::before{content:"\\00b7";color:var(--soft)}
.text .ctl::before{content:attr(data-p);color:var(--soft);font:12px ui-monospace,Menlo,Consolas,monospace}
.text .doc{display:block;width:fit-content;margin:34px 0 8px;padding:1px 7px}
.text .doc:first-child{margin-top:0}
.text .doc::before{content:"new document";color:var(--soft);font:italic 14px/1.4 ui-serif,Georgia,
  "Liberation Serif",serif}
.side{grid-area:1/2/span 2;position:sticky;top:124px;display:flex;flex-direction:column;gap:22px;
  max-height:calc(100vh - 148px)}
.card{flex:none;min-height:318px;padding:18px 20px 16px;background:var(--card);border:1px solid var(--line);
  border-radius:10px}
.hint{margin:0;color:var(--soft)}
.word{margin:0 0 2px;font:500 25px/1.25 ui-serif,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,
  "Liberation Serif",serif;white-space:pre-wrap;overflow-wrap:anywhere}
.word .space{color:var(--plain)}
.verdict{margin:0 0 14px;font-size:15px;font-weight:600}
.bars{display:grid;grid-template-columns:auto 1fr;gap:1px 10px;align-items:baseline;margin:0 0 14px;font-size:13px}
.bars dt{color:var(--soft)}
.bars dd{margin:0}
.bars .track{position:relative;grid-column:1/3;height:8px;margin-bottom:7px}
.bars .track i{position:absolute;inset:0 auto 0 0;background:var(--plain);border-radius:0 2px 2px 0;min-width:1.5px}
.bars .mixed i{background:var(--saved)}
.bars .mixed.worse i{background:var(--lost)}
.bars .track u{position:absolute;top:-2px;bottom:-2px;width:2px;margin-left:-1px;background:var(--ink)}
.bars .num{text-align:right;white-space:nowrap}
.bars .num small{color:var(--soft);font-size:12px;margin-left:5px}
.count{margin:0 0 12px;padding-top:12px;border-top:1px solid var(--line);font-size:13.5px;line-height:1.5}
.count q{quotes:none;font-family:ui-serif,Georgia,"Liberation Serif",serif;font-size:15px;white-space:pre-wrap;
  overflow-wrap:anywhere;box-shadow:0 3px 0 -1px var(--mark)}
.meta{margin:0;color:var(--soft);font-size:12.5px}
.rank{overflow:auto;min-height:120px;padding:2px}
.rank h2{margin:0 0 4px;font-size:13px;font-weight:600}
.rank ol{list-style:none;margin:0 0 16px;padding:0}
.rank button{display:grid;grid-template-columns:46px 1fr;width:100%;padding:3px 6px;min-height:0;border:0;
  background:none;text-align:left;border-radius:5px;align-items:baseline}
.rank button:hover{background:var(--line)}
.rank button[aria-current]{background:var(--line)}
.rank span{overflow:hidden;text-overflow:ellipsis;white-space:pre;color:var(--soft);
  font-family:ui-serif,Georgia,"Liberation Serif",serif;font-size:14.5px}
.rank b{font-weight:600;color:var(--ink)}
.rank em{font-style:normal;font-size:13px}
:is(button,select,a):focus-visible{outline:2px solid var(--mark);outline-offset:1px}
footer{margin-top:40px;padding-block:18px;border-top:1px solid var(--line);color:var(--soft);
  font-size:13px;line-height:1.7}
footer p{max-width:72ch;margin:0 0 8px}
.keys span{display:inline-block;margin-right:12px;white-space:nowrap}
kbd{font:12px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;border:1px solid var(--line);
  border-radius:4px;padding:1px 5px;background:var(--card);color:var(--ink)}
@media (max-width:900px){
  header{grid-template-columns:minmax(0,1fr);padding-block:26px 18px;gap:22px}
  header,main,.bar>div{padding-inline:18px}
  h1{font-size:33px}
  main{display:block;padding-block:20px 24px}
  .text{font-size:17.5px;line-height:1.8;max-width:none}
  .text>span{scroll-margin-bottom:300px}
  .side{position:static;max-height:none;display:block}
  .rank{overflow:visible;margin-top:30px}
  .rank button{padding-block:7px}
  .card{position:fixed;z-index:4;left:0;right:0;bottom:0;min-height:0;padding:12px 18px
    calc(12px + env(safe-area-inset-bottom));border-width:1px 0 0;border-radius:14px 14px 0 0;
    box-shadow:0 -6px 24px rgb(0 0 0/.12)}
  .card .word{display:inline;margin-right:10px;font-size:21px}
  .card .verdict{display:inline}
  .card .bars{grid-template-columns:auto 1fr auto;grid-auto-flow:dense;align-items:center;gap:3px 10px;margin:8px 0}
  .bars .track{grid-column:2;margin:0}
  .bars dt{grid-column:1}
  .bars .num{grid-column:3}
  .card .count{margin:0 0 4px;padding-top:8px;min-height:48px}
  #theme{min-width:0;font-size:0}
  #theme::after{content:"\\25d0";font-size:15px}
  footer{padding-bottom:260px}
  footer p:first-child{display:none}
}
@media (min-width:901px) and (max-height:780px){
  header{padding-block:18px 12px}
  main{padding-block:16px 24px}
  .card{min-height:296px;padding-block:12px 10px}
}
@media (max-width:640px){
  th,td{padding-left:6px;font-size:13px}
  table tr>:nth-child(3){display:none}
  .tools{flex-wrap:wrap;gap:6px 12px}
  .legend{order:3;flex:1 0 100%}
  .legend figcaption{display:none}
  .mode span{display:none}
  .text>span{scroll-margin-top:150px}
}
@media print{.bar,.side,footer,.skip{display:none}main{display:block}}
@media (forced-colors:active){.text>span,.swatches i{forced-color-adjust:none}.text{forced-color-adjust:none}}
"""  # noqa: E501 (the page's own lines: breaking them would change its bytes)

SCRIPT = """
"use strict";
(() => {
const $ = id => document.getElementById(id), root = document.documentElement;
const D = JSON.parse($("data").textContent), before = D.lead.concat(D.text);
const text = $("text"), spans = [...text.children], N = spans.length;
const gain = D.nll.map((b, i) => b - D.mixed[i]), calm = matchMedia("(prefers-reduced-motion: reduce)");
const group = n => n.toLocaleString("en-US"), minus = s => s.replace("-", "\\u2212");
let current = -1, hovered = -1, marked = [];

function make(tag, name, content) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (content !== undefined) e.textContent = content;
  return e;
}
const name = i => D.text[i] || D.piece[i];
function shown(name) {              // newlines and tabs as signs, a lone accent on a circle
  return name.replace(/\\n/g, "\\u21b5").replace(/\\t/g, "\\u2192").replace(/^\\p{M}/u, "\\u25cc$&");
}
function word(name) {               // a leading space is a part of the token: show it
  const p = make("p", "word"), bare = name.replace(/^ +/, "");
  p.append(make("span", "space", "\\u2423".repeat(name.length - bare.length)), shown(bare));
  return p;
}
function percent(bits) {
  const p = 100 * 2 ** -bits;
  if (p > 99.95) return "> 99.9 %";
  if (p >= 0.01) return p.toPrecision(p < 1 ? 2 : 3) + " %";
  return "1 in " + group(+(2 ** bits).toPrecision(2));
}
function verdict(i) {
  const g = gain[i], b = Math.abs(g).toFixed(2);
  return b === "0.00" ? "no difference" : (g > 0 ? "saved " : "lost ") + b + " bits";
}
function context(i) {               // the n - 1 tokens before token i, also those before the stretch
  const n = D.order[i] - 1, at = i + D.lead.length;
  const parts = before.slice(at - n, at);
  for (let k = n - 1; k >= 0 && !parts[k]; k--) parts[k] = D.piece[i - n + k] || "";  // bytes of a cut character
  return parts.join("");
}
function bar(list, label, kind, bits, scale, unit) {
  const track = make("dd", "track " + kind), fill = make(kind === "expected" ? "u" : "i");
  fill.style[kind === "expected" ? "left" : "width"] = 100 * bits / scale + "%";
  track.append(fill);
  const num = make("dd", "num", bits.toFixed(2));
  num.append(make("small", "", unit));
  list.append(make("dt", "", label), num, track);
}
function card(i) {
  const box = make("div"), bars = make("dl", "bars"), count = make("p", "count");
  box.append(word(name(i)), make("p", "verdict " + verdict(i).split(" ")[0], verdict(i)), bars, count);
  const scale = Math.max(12, D.nll[i], D.mixed[i]);
  bar(bars, "network", "model", D.nll[i], scale, "bits, " + percent(D.nll[i]));
  bar(bars, "mixture", "mixed" + (gain[i] < 0 ? " worse" : ""), D.mixed[i], scale, "bits, " + percent(D.mixed[i]));
  bar(bars, "expected", "expected", D.entropy[i], scale, "bits, entropy");
  if (D.order[i]) {
    const share = D.pair[i] / D.context[i];
    count.append(make("q", "", shown(context(i)).trim() || "\\u2423"), " seen ", make("b", "", group(D.context[i])),
      " \\u00d7 before, followed by this token ", make("b", "", group(D.pair[i])), " \\u00d7 ("
      + (100 * share).toFixed(share > 0 && share < .1 ? 1 : 0) + " %); order " + D.order[i]);
  } else count.append("The tokens before it are new here: no context was known, the network decides.");
  const bytes = D.bytes[i] === 1 ? " byte" : " bytes", piece = D.piece[i] ? ", piece " + D.piece[i] : "";
  box.append(make("p", "meta", "target " + group(D.start + i) + ", " + D.bytes[i] + bytes + piece));
  $("card").replaceChildren(...box.children);
}
function show(i) {
  marked.forEach(e => e.classList.remove("ctx"));
  marked = i < 0 || !D.order[i] ? [] : spans.slice(Math.max(0, i - D.order[i] + 1), i);
  marked.forEach(e => e.classList.add("ctx"));
  if (i >= 0) card(i);
}
function select(i, how) {
  i = Math.max(0, Math.min(N - 1, i));
  if (current >= 0) {
    spans[current].classList.remove("on");
    spans[current].removeAttribute("aria-selected");
  }
  spans[current < 0 ? 0 : current].tabIndex = -1;
  current = i;
  const e = spans[i];
  e.tabIndex = 0;
  e.classList.add("on");
  e.setAttribute("aria-selected", "true");
  if (!e.hasAttribute("aria-label")) e.setAttribute("aria-label", shown(name(i)) + ": " + verdict(i));
  if (hovered >= 0) spans[hovered].classList.remove("hover");
  hovered = -1;
  if (how.focus) e.focus({preventScroll: true});
  const behavior = how.block === "center" && !calm.matches ? "smooth" : "auto";
  if (how.block) e.scrollIntoView({block: how.block, behavior});
  show(i);
  $("cursor").style.cssText = "visibility:visible;left:" + place((i + .5) / N);
  for (const b of document.querySelectorAll(".rank button"))
    +b.dataset.i === i ? b.setAttribute("aria-current", "true") : b.removeAttribute("aria-current");
  try { history.replaceState(null, "", "#t" + (D.start + i)); } catch { /* a page without an address */ }
}
function place(share) {
  const strip = $("overview"), svg = strip.firstElementChild.getBoundingClientRect();
  return svg.left - strip.getBoundingClientRect().left + share * svg.width + "px";
}

// pointer and focus
const index = e => { const s = e.target.closest("#text > span"); return s ? s.id.slice(1) - D.start : -1; };
text.addEventListener("pointerover", e => {
  const i = index(e);
  if (e.pointerType === "touch" || i === hovered) return;
  if (hovered >= 0) spans[hovered].classList.remove("hover");
  hovered = i;
  if (i >= 0) { spans[i].classList.add("hover"); show(i); }
});
text.addEventListener("pointerleave", () => {
  if (hovered >= 0) spans[hovered].classList.remove("hover");
  hovered = -1;
  if (current >= 0) show(current);
});
text.addEventListener("click", e => { const i = index(e); if (i >= 0) select(i, {focus: true}); });
text.addEventListener("focusin", e => { const i = index(e); if (i >= 0 && i !== current) select(i, {}); });

// ranks
const ranked = [...gain.keys()].sort((a, b) => gain[b] - gain[a] || a - b);
const ranks = {gains: ranked.filter(i => gain[i] > 0), losses: ranked.filter(i => gain[i] < 0).reverse()};
const turn = {gains: -1, losses: -1};
function jump(kind, step) {
  const list = ranks[kind], here = list.indexOf(current);
  if (!list.length) return;
  const from = here >= 0 ? here : turn[kind];
  turn[kind] = Math.max(0, Math.min(list.length - 1, from + step));
  select(list[turn[kind]], {focus: true, block: "center"});
  $("said").textContent = "Rank " + (turn[kind] + 1) + " of the " + kind;
}
for (const kind of ["gains", "losses"]) {
  for (const i of ranks[kind].slice(0, 8)) {
    const li = make("li"), b = make("button"), line = make("span");
    b.dataset.i = i;
    const bits = minus((gain[i] > 0 ? "+" : "") + gain[i].toFixed(1));
    b.append(make("em", kind === "gains" ? "saved" : "lost", bits), line);
    line.append(shown(D.text.slice(Math.max(0, i - 5), i).join("")).slice(-14), make("b", "", shown(name(i))),
      shown(D.text.slice(i + 1, i + 6).join("")));
    b.addEventListener("click", () => select(i, {focus: true, block: "center"}));
    li.append(b);
    $(kind).append(li);
  }
  if (!ranks[kind].length) $(kind).append(make("li", "hint", "none"));
}

// keys
function line(step) {               // the token of the next line nearest to this one's middle
  const box = spans[current].getClientRects()[0], middle = (box.left + box.right) / 2;
  let best = current, far = Infinity, top = null;
  for (let i = current + step; i >= 0 && i < N; i += step) {
    const r = spans[i].getClientRects()[0];
    if (!r || Math.abs(r.top - box.top) < box.height / 2) continue;
    if (top === null) top = r.top;
    if (Math.abs(r.top - top) > box.height / 2) break;
    const d = Math.abs((r.left + r.right) / 2 - middle);
    if (d < far) [best, far] = [i, d];
  }
  return best;
}
const keys = {
  ArrowRight: () => select(current + 1, {focus: true, block: "nearest"}),
  ArrowLeft: () => select(current < 0 ? 0 : current - 1, {focus: true, block: "nearest"}),
  ArrowDown: () => select(current < 0 ? 0 : line(1), {focus: true, block: "nearest"}),
  ArrowUp: () => select(current < 0 ? 0 : line(-1), {focus: true, block: "nearest"}),
  Home: () => select(0, {focus: true, block: "center"}), End: () => select(N - 1, {focus: true, block: "center"}),
  n: () => jump("gains", 1), p: () => jump("gains", -1), N: () => jump("losses", 1), P: () => jump("losses", -1),
  c: () => { $("mode").selectedIndex = ($("mode").selectedIndex + 1) % $("mode").length; colour(); },
  t: () => theme(1)};
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === "SELECT" || !Object.hasOwn(keys, e.key)) return;
  if (e.key.length > 1 && e.target.tagName === "BUTTON") return;
  e.preventDefault();
  keys[e.key]();
});
$("next").addEventListener("click", () => jump("gains", 1));
$("nextloss").addEventListener("click", () => jump("losses", 1));

// colours
function colour() { document.body.dataset.mode = text.dataset.mode = $("mode").value; }
$("mode").addEventListener("change", colour);
const themes = ["system", "light", "dark"];
let chosen = "system";
try { chosen = localStorage.getItem("theme") || chosen; } catch { /* no storage: the system's theme */ }
function theme(step) {
  chosen = themes[(themes.indexOf(chosen) + step + 3) % 3] || "system";
  chosen === "system" ? delete root.dataset.theme : root.dataset.theme = chosen;
  $("theme").textContent = "Theme: " + chosen;
  try { localStorage.setItem("theme", chosen); } catch { /* as above */ }
}
$("theme").addEventListener("click", () => theme(1));
theme(0);

// the strip: where the window is, and a click to go there
function findTop(y) {
  let a = 0, b = N - 1;
  while (a < b) { const m = a + b >> 1; spans[m].getBoundingClientRect().bottom < y ? a = m + 1 : b = m; }
  return a;
}
function follow() {
  const top = findTop($("bar").getBoundingClientRect().bottom), end = findTop(innerHeight);
  $("window").style.left = place(top / N);
  $("window").style.width = parseFloat(place((end + 1) / N)) - parseFloat(place(top / N)) + "px";
  if (current >= 0) $("cursor").style.left = place((current + .5) / N);
}
let waiting = false;
function later() {
  if (!waiting) requestAnimationFrame(() => { waiting = false; follow(); });
  waiting = true;
}
addEventListener("scroll", later, {passive: true});
addEventListener("resize", later);
$("overview").addEventListener("pointerdown", e => go(e));
$("overview").addEventListener("pointermove", e => { if (e.buttons) go(e); });
function go(e) {
  const r = $("overview").firstElementChild.getBoundingClientRect(), share = (e.clientX - r.left) / r.width;
  spans[Math.max(0, Math.min(N - 1, Math.floor(share * N)))].scrollIntoView({block: "center"});
}
spans[0].tabIndex = 0;
follow();
const asked = /^#t(\\d+)$/.exec(location.hash);
if (asked && spans[asked[1] - D.start]) select(asked[1] - D.start, {focus: true, block: "center"});
else if (ranks.gains.length && innerWidth > 900) {
  hovered = ranks.gains[0];
  spans[hovered].classList.add("hover");
  show(hovered);
}
})();
"""  # noqa: E501 (the page's own lines: breaking them would change its bytes)
