"""What a log of the field says, whoever wrote it. Each number is a Fact with its place, so that a
reviewer can look it up.

Scripts of the field write `key:value`, `key: value` or `key=value`, times in ms, s or minutes,
sizes with or without a label, their source anywhere. So a line is read by its keys alone, and a
line that is not understood is passed over. Reading is bounded, whatever the file is: a log may be
a gigabyte long, or no text at all.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MOST_BYTES = 4_000_000  # of a file: half from its beginning, half from its end
MOST_CHARACTERS = 1_000  # of a line

NUMBER = r"(?>[-+]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)\b)"
SECONDS = dict(ms=1e-3, s=1, sec=1, secs=1, seconds=1, m=60, min=60, mins=60, minutes=60, h=3600)
BYTES = {"": 1, "b": 1, "bytes": 1, "kb": 1e3, "mb": 1e6, "kib": 1024, "mib": 1024**2}


def pattern(text: str) -> re.Pattern:
    """A pattern that begins at the start of a word, in any case; N stands for a number."""
    return re.compile(r"(?<![\w.+-])" + text.replace("<N>", f"({NUMBER})"), re.I)


BPB = pattern(r"(?:val_|valid_|eval_|test_|final_|mean_)?(?:bpb|bits_per_byte)\s*[:=]\s*<N>")
LOSS = pattern(r"(?:val_|valid_|eval_|test_)?loss\s*[:=]\s*<N>")
TRAIN_LOSS = pattern(r"(?:train_)?loss\s*(?:[:=]\s*|\s)<N>")
STEP = re.compile(r"\W{0,3}(?:step\W{0,9})?(\d{1,9})/(\d{1,9})\b", re.I)
TRAIN_TIME = pattern(r"(?:train(?:ing)?[ _]time|t)(_ms|_s|_seconds)?\s*[:=]\s*<N>\s?([a-z]+)?")
STEP_AVERAGE = pattern(r"(?:step_avg|avg|ms_per_step)\s*[:=]\s*<N>\s?(ms|s)?")
STEP_END = re.compile(rf"\|\s*({NUMBER})\s?(s|ms|m)\s*$")
EVAL_TIME = re.compile(
    rf"(?<![\w.+-])((?:[\w+-]{{0,40}}[ _-])?eval(?:uation)?[ _]time)(_ms|_s|_seconds)?\s*[:=]\s*"
    rf"({NUMBER})\s?([a-z]+)?",
    re.I,
)
OTHER_TIME = re.compile(  # of work that the clocks of training and evaluation may leave out
    rf"(?!.*(?:reserv|train_time|eval_time))(?=.*(?:(gptq|hessian|calibrat)|compil|warm-?up|"
    rf"decompress|deserializ)).*?(?:\bin|took|\()\s*({NUMBER})\s?([a-z]+)",
    re.I,
)
PLAIN_TIME = pattern(r"time\s*[:=]\s*<N>\s?([a-z]+)?")
SEED = pattern(r"""(?:random_)?seed["']?\s*[:=]\s*(\d{1,12})(?![\w.])""")
SEED_IN_NAME = re.compile(r"seed[_-]?(\d{1,12})(?!\d)", re.I)
GUESS_IN_NAME = re.compile(r"(?<![a-z])s[_-]?(\d{1,12})(?![\d.])|log[_-](\d{1,12})$", re.I)
TOKENS = pattern(r"(?:val_loader\b.{0,300}?\btokens|val(?:idation)?[ _]tokens)\s*[:=]\s*<N>")
VOCAB = pattern(r"vocab(?:ulary)?_size\s*[:=]\s*<N>")
VOCAB_IN_PATH = re.compile(r"(?:_sp|fineweb_)(\d{3,6})(?:_bpe)?(?!\d)")
PARTIAL = re.compile(  # a share of the stream, in percent or as two counts
    rf"\b(?:cut ?off|stopped|aborted|truncated|coverage|scored|evaluated|covered)\b[^\d%]{{0,40}}"
    rf"(?:({NUMBER})\s?%|({NUMBER})\s*(?:/|\bof\b)\s*({NUMBER}))",
    re.I,
)
FRACTION = pattern(r"(?:val_|eval_)(?:doc_|token_|data_)?fraction\s*[:=]\s*<N>")
SIZE = re.compile(
    rf"\W{{0,6}}([a-z][^:=]{{0,80}}?)\s*[:=]\s*({NUMBER})\s*([a-z]{{1,5}})?(?![a-z])", re.I
)
NGRAM = re.compile(  # a line that says that n-grams are counted, at the margin: no list of settings
    r"(?!\s|logs/)(?!.*(?:tilt|false|disabled|skip))(?=.*n-?gram).*\d", re.I
)
BUDGET = pattern(r"budget\s*:\s*<N>\s*/\s*\d+")
RUN_BEGINS = re.compile(  # lines that a script writes once, before it trains
    r"\s*(?:world_size|train_loader|val_loader|model_params|val_tokens)\s*:|\s*seed\s*:\s*\d+\s*$|"
    r"\s*(?:Running Python|Hyperparameters:)",
    re.I,
)
RULE = re.compile(r"={20,}\s*$")
CODE = re.compile(
    r"(?:\"\"\"|'''|from __future__ import |import \w|from \w[\w.]* import |def \w|class \w|@\w|"
    r"exec\()"
)
LOG_LINE = re.compile(r"[A-Za-z_][\w ./+-]{0,60}:\s?\d|\d+/\d+ \w+:")
COUNT = re.compile(r"^\W*([\w :-]{0,40}?)\s*\[\s*(\d{1,12})\s*/\s*(\d{1,12})\s*\]")
PROGRESS = re.compile(r"\[\d+/\d+\]|\b(?:batch|chunk|running|rank|progress)\b|\bb\d+/\d+", re.I)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STAMP = re.compile(r"^(?:\s*\[?(?:rank ?\d+|\d[\d:T.,+Z-]{5,}|INFO|DEBUG)\]?:?\s+)+", re.I)


class Unreadable(Exception):
    """A file that cannot be read as text; the message says why, without the file's name."""


class Fact(NamedTuple):
    """One number of a log."""

    kind: str  # e.g. seed, train_time (seconds), eval_time (seconds), total (bytes), score (bpb)
    value: float
    slack: float  # half a unit of the last digit written
    place: str  # file:line; a negative line counts from the end, as `tail` does
    label: str  # what the line calls it
    loss: float = math.nan  # of a score: the loss in nats per token on the same line


@dataclass(eq=False)
class Run:
    """What a log says of one run of a script. A file may hold several."""

    path: str
    named_seed: int | None  # of the file's name, where that says seed
    guessed_seed: int | None = None  # of a name like run_s42
    facts: list[Fact] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of training, in order
    last_step: int = 0

    def all(self, *kinds: str) -> list[Fact]:
        return [fact for fact in self.facts if fact.kind in kinds]

    @property
    def trained(self) -> bool:
        return self.last_step > 1

    @property
    def seed(self) -> int | None:
        """The seed that the log says, else that of the file's name."""
        for fact in self.all("seed"):
            return int(fact.value)
        return self.guessed_seed if self.named_seed is None else self.named_seed

    @property
    def scores(self) -> list[Fact]:
        return self.all("score")


@dataclass(eq=False)
class FieldLog:
    """A file and the runs in it. A file without a run has none."""

    path: str
    runs: list[Run]
    notes: list[str]  # what was not read
    source: str  # the first Python source that stands in it


# --- reading, bounded ---


def read_bytes(path: Path, most: int) -> tuple[bytes, bytes, int]:
    """(beginning, end, size) of a regular file, at most `most` bytes in all; the end is empty if
    the beginning is everything. It never waits for a pipe and follows no link. Raises
    Unreadable."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("no regular file")
        try:
            if status.st_size <= most:
                return file.read(most), b"", status.st_size
            head = file.read(most // 2)
            file.seek(-(most // 2), os.SEEK_END)
            return head, file.read(most // 2), status.st_size
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None


def decode(data: bytes, like: bytes = b"") -> str:
    """Text of UTF-8 or UTF-16 bytes; what is neither is replaced. `like` is the file's beginning,
    which tells how it is encoded. Raises Unreadable: it is no text."""
    mark = (like or data)[:1000]
    zeros = [part.count(0) / max(len(part), 1) for part in (mark[::2], mark[1::2])]
    if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
        codec = "utf-16-le" if mark.startswith(b"\xff") else "utf-16-be"
    elif b"\0" not in mark:
        codec = "utf-8-sig"
    elif zeros[0] < 0.2 and zeros[1] > 0.8:
        codec = "utf-16-le"
    elif zeros[0] > 0.8 and zeros[1] < 0.2:
        codec = "utf-16-be"
    elif is_padded_text(mark):
        return data.replace(b"\0", b"").decode("utf-8", "replace")
    else:
        raise Unreadable("binary data, no text")
    return data.decode(codec, "replace").lstrip("\ufeff")


def is_padded_text(data: bytes) -> bool:
    """Whether bytes are text but for zeros, as a disk leaves them in a file whose machine died."""
    rest = data.replace(b"\0", b"")
    return sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in rest) > 0.9 * len(rest) > 0


def numbered_lines(path: Path, most: int = MOST_BYTES) -> tuple[list[tuple[int, str]], list[str]]:
    """([(line number, line)], what was not read) of a log. Lines of the end of a long file have
    negative numbers, as they are counted from its end. Raises Unreadable."""
    head, tail, size = read_bytes(path, most)
    notes = []
    lines = list(enumerate(decode(head).split("\n"), 1))
    if tail:
        kept = decode(tail, head).split("\n")[1:]  # the first may be a part of a line
        kept = kept[:-1] if kept and not kept[-1] else kept
        lines += list(enumerate(kept, -len(kept)))
        unread = size - len(head) - len(tail)
        notes.append(f"{unread:,} of {size:,} bytes, in its middle, were not read")
    cut = sum(len(text) > MOST_CHARACTERS for _, text in lines)
    if cut:
        notes.append(f"{cut} lines were read up to {MOST_CHARACTERS} characters")
    return lines, notes


def without_source(lines: list[tuple[int, str]], source: list[str]) -> Iterator[tuple[int, str]]:
    """The lines that are no Python source; the first source found goes into `source`. A source
    begins with a line of code at the margin and ends at a rule of `=` or at a line of a log."""
    inside, first = False, not source
    for no, text in lines:
        begins = CODE.match(text)
        if inside and (RULE.match(text) or LOG_LINE.match(text)):
            inside = first = False
        elif begins:
            inside = True
        if inside and first:
            source.append(text)
        elif not inside and any(map(str.isdigit, text[:MOST_CHARACTERS])):
            yield no, text


# --- lines ---


def to_number(text: str) -> tuple[float, float]:
    """(value, half a unit of its last digit) of a number as it is written."""
    plain = text.replace(",", "").replace("_", "").lower()
    mantissa, _, exponent = plain.partition("e")
    decimals = len(mantissa.partition(".")[2])
    try:
        value = float(plain)
        return value, 0.5 * 10.0 ** (int(exponent or 0) - decimals)
    except (ValueError, OverflowError):
        return math.nan, 0.0


def to_seconds(number: str, unit: str | None) -> tuple[float, float] | None:
    """(seconds, half a unit of the last digit), or None if the unit is none of time."""
    scale = SECONDS.get((unit or "").strip("_").lower())
    if scale is None:
        return None
    value, slack = to_number(number)
    return value * scale, slack * scale


class Reader:
    """Turns the lines of one file into runs."""

    def __init__(self, path: str):
        self.path = path
        stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        named, guess = SEED_IN_NAME.search(stem), GUESS_IN_NAME.search(stem)
        self.named_seed = int(named[1]) if named else None
        self.guessed_seed = int(guess[1] or guess[2]) if guess else None
        self.runs = []
        self.begin()

    def add(self, kind: str, number: tuple[float, float] | None, no: int, label: str, loss=None):
        """Keep a number, unless it has no known unit."""
        if number:
            place = f"{self.path}:{no}"
            loss = math.nan if loss is None else loss
            self.runs[-1].facts.append(Fact(kind, *number, place, label.strip()[:80], loss))

    def begin(self) -> None:
        self.runs.append(Run(self.path, self.named_seed, self.guessed_seed))

    def begin_if(self, begins) -> None:
        """A new run, if one `begins` and the last has trained or scored."""
        if begins and (self.runs[-1].trained or self.runs[-1].scores):
            self.begin()

    def read(self, no: int, text: str) -> None:
        """Keep what one line says."""
        text = STAMP.sub("", ESCAPES.sub("", text[:MOST_CHARACTERS].rstrip()))
        self.begin_if(RUN_BEGINS.match(text))
        step = STEP.match(text)
        if step and "loss" in text and "warmup" not in text:
            self.read_step(no, text, int(step[1]))
        else:
            self.read_score(no, text)
            self.read_times(no, text)
        self.read_header(no, text)
        self.read_size(no, text)

    def read_step(self, no: int, text: str, step: int) -> None:
        """A line of training: step, loss, time, perhaps a validation."""
        self.begin_if(step <= 1 and self.runs[-1].last_step > 1)
        run = self.runs[-1]
        run.last_step = max(run.last_step, step)
        self.add("step", (step, 0), no, "step")
        if score := BPB.search(text):
            loss = LOSS.search(text)
            self.add("validation", to_number(score[1]), no, "validation", loss and float_of(loss))
        elif loss := TRAIN_LOSS.search(text):
            run.losses.append(float_of(loss))
            self.add("train_loss", to_number(loss[1]), no, "train_loss")
        if time := TRAIN_TIME.search(text):
            self.add("train_time", to_seconds(time[2], time[1] or time[3]), no, "train_time")
        elif time := STEP_END.search(text):
            self.add("train_time", to_seconds(*time.groups()), no, "train_time")
        if average := STEP_AVERAGE.search(text):
            self.add("step_time", to_seconds(average[1], average[2] or "ms"), no, "step_avg")

    def read_score(self, no: int, text: str) -> None:
        """bpb of an evaluation; of the progress of one, how far it came."""
        score = BPB.search(text)
        if score and PROGRESS.search(text):
            if (count := COUNT.match(text)) and int(count[3]):
                self.add("progress", (int(count[2]) / int(count[3]), 0), no, count[0])
            return
        if not score:
            return
        loss = LOSS.search(text)
        if not loss and not math.isfinite(float_of(score)):
            return  # `bpb=inf`, what a search for the best begins with
        start = min(match.start() for match in (score, loss) if match)
        label = text[:start] or text[: score.start()]
        self.add("score", to_number(score[1]), no, label, loss and float_of(loss))

    def read_times(self, no: int, text: str) -> None:
        found = list(EVAL_TIME.finditer(text))
        for time in found:
            kind = "eval_total" if time[1].lower().startswith("total") else "eval_time"
            seconds = to_seconds(time[3], time[2] or time[4])
            self.add(kind, seconds, no, text[: time.start()] or time[1])
        is_score = BPB.search(text) and not PROGRESS.search(text)
        if not found and is_score and (time := PLAIN_TIME.search(text)):
            self.add("eval_time", to_seconds(*time.groups()), no, text[: time.start()])
        if not found and (time := OTHER_TIME.match(text)):
            kind = "beside_training" if time[1] else "beside_evaluation"
            self.add(kind, to_seconds(time[2], time[3]), no, text)
        time = TRAIN_TIME.search(text)
        if time and time[0].lower().startswith("train"):
            self.add("train_time", to_seconds(time[2], time[1] or time[3]), no, "train_time")

    def read_header(self, no: int, text: str) -> None:
        """Seed, stream, vocabulary, and what says that only a part was scored."""
        for kind, known in (("seed", SEED), ("tokens", TOKENS), ("vocab", VOCAB)):
            if match := known.search(text):
                self.add(kind, to_number(match[1]), no, text)
        if ("dataset" in text or "tokenizer" in text) and (match := VOCAB_IN_PATH.search(text)):
            self.add("vocab", to_number(match[1]), no, text)
        if NGRAM.match(text) and not self.runs[-1].all("ngram"):
            self.add("ngram", (1, 0), no, text)
        if match := FRACTION.search(text):
            kind = "partial" if float_of(match) < 1 else "progress"
            self.add(kind, to_number(match[1]), no, text)
        if match := PARTIAL.search(text):
            percent, part, whole = (to_number(number or "nan")[0] for number in match.groups())
            share = percent / 100 if match[1] else part / whole if whole else math.nan
            if share < 0.999 and "train" not in text.lower():
                self.add("partial", (share, 0), no, text)

    def read_size(self, no: int, text: str) -> None:
        """Bytes of the submission and of its parts."""
        if match := BUDGET.search(text):
            self.add("total", to_number(match[1]), no, "budget")
            return
        match = SIZE.match(text)
        kind = match and size_kind(match[1].lower())
        scale = match and BYTES.get((match[3] or "").lower())
        if not kind or not scale:
            return
        value, slack = to_number(match[2])
        if match[3] or value >= 1000:  # `code:1` is no size
            self.add(kind, (value * scale, slack * scale), no, match[1])


def float_of(match: re.Match) -> float:
    return to_number(match[1])[0]


def size_kind(label: str) -> str:
    """total, packed, plain (before packing), code, code_plain, artifact, or "": no size."""
    words = set(re.split(r"[\s_()+-]+", label))
    if "code" in words and words & {"size", "bytes"}:
        return "code_plain" if "uncompressed" in words else "code"
    if "total" in words and words & {"submission", "bytes", "artifact", "size"}:
        return "total"
    if "artifact" in words:
        return "artifact" if words <= {"artifact", "size", "bytes", "total", "final"} else ""
    if label.startswith("serialized model"):
        return "plain" if label == "serialized model" else "packed"
    return ""


def read_log(path: Path, name: str, most: int = MOST_BYTES) -> FieldLog:
    """The runs in a file that `name` stands for in places. Raises Unreadable."""
    lines, notes = numbered_lines(path, most)
    reader, source = Reader(name), []
    for no, text in without_source(lines, source):
        for part in text.split("\r"):  # progress bars
            reader.read(no, part)
    runs = [run for run in reader.runs if run.trained or run.scores]
    return FieldLog(name, runs, notes, "\n".join(source))
