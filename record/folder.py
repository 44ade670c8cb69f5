"""The parts of a submission folder: what is read of it, and how it is written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from .log import Log, RecordError, parse_log, read_text, require, without_repeats
from .run import Run, read_runs

FILES = "train_gpt.py", "README.md", "submission.json", "requirements.txt"
IMAGES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"}
LINKS = re.compile(
    r"""\]\(\s*([^)\s]+)|<(?:img|source|a)\b[^>]*?\b(?:src|srcset|href)=["']([^"'\s]+)"""
)


class Folder:
    """A submission folder; each part is read when first asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.readme = path / "README.md"

    @cached_property
    def script(self) -> str:
        return read_text(self.path / "train_gpt.py")

    @cached_property
    def submission(self) -> dict:
        return read_json(self.path / "submission.json")

    @cached_property
    def logs(self) -> list[Log]:
        """The logs that README's table links to; without such a table, all that look like one."""
        patterns = "logs/*.txt", "logs/*.log", "*.log", "*.txt"
        paths = self.linked_logs() or [
            path
            for pattern in patterns
            for path in sorted(self.path.glob(pattern))
            if not path.name.startswith(("requirements", "constraints"))
        ]
        problem = (
            "has no logs, expected one per seed, linked from README's results table; make it by "
            "`python -m record report`"
        )
        require(paths, f"{self.path}: {problem}")
        return [parse_log(path) for path in paths]

    def linked_logs(self) -> list[Path]:
        try:
            _, between, _ = split_page(self.readme, "results")
        except RecordError:
            return []
        paths = [self.path / link for link in re.findall(r"^\| \[\d+\]\(([^)]+)\)", between, re.M)]
        return [path for path in paths if inside(path, self.path)]

    @cached_property
    def runs_or_error(self) -> list[Run] | RecordError:
        """Every check asks for the runs; a problem with them is looked for once."""
        try:
            return read_runs(self.logs)
        except RecordError as error:
            return error

    @property
    def runs(self) -> list[Run]:
        """The runs of the logs, by seed. RecordError: they cannot be read as such."""
        if isinstance(self.runs_or_error, RecordError):
            raise RecordError(str(self.runs_or_error))
        return self.runs_or_error

    @cached_property
    def systems_logs(self) -> list[Path]:
        return sorted(self.path.glob("logs/systems/*.txt"))

    @cached_property
    def links(self) -> dict[Path, Path]:
        """Local path -> page: what README links to or shows, and the pages that it links to."""
        found, pages = {}, [self.readme]
        for page in pages:  # grows
            for either in LINKS.findall(read_text(page)):
                link = "".join(either).split("#")[0]
                if not link or ":" in link:
                    continue
                path = Path(os.path.normpath(page.parent / link))
                if path not in found and path.resolve().is_relative_to(self.path.resolve()):
                    found[path] = page
                    if path.suffix == ".md" and path.is_file() and path not in pages:
                        pages.append(path)
        return found

    def figures(self) -> list[Path]:
        """Local images that README, or a page it links to, shows."""
        return [path for path in self.links if path.suffix.lower() in IMAGES]


def inside(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`. RecordError: it is elsewhere."""
    path, root = path.resolve(), folder.resolve()
    require(
        path.is_relative_to(root),
        f"{path}: is not in {folder}, expected a log inside the submission; copy it into "
        f"{folder / 'logs'}",
    )
    return path.relative_to(root).as_posix()


def read_json(path: Path, made_by: str = "`python -m record report`") -> dict:
    """The JSON object in `path`. RecordError: none; the message says which command makes it."""
    require(path.exists(), f"{path}: does not exist; make it by {made_by}")
    text = read_text(path, f"JSON; fix it, or remove it and make it by {made_by}")

    def refuse(name: str):
        raise ValueError(f"found {name}")  # Python reads NaN and Infinity, which are no JSON

    try:
        found = json.loads(text, parse_constant=refuse, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # also for too long a number, or too deep a list
        line, problem = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise RecordError(
            f"{path}:{line}: {problem}, expected JSON; fix it, or remove it and make it by "
            f"{made_by}"
        ) from None
    problem = f"found {type(found).__name__}, expected a JSON object"
    require(isinstance(found, dict), f"{path}:1: {problem}")
    return found


def split_page(path: Path, part: str) -> tuple[str, str, str]:
    """A page up to and with the first marker of `part`, what is between, from the second marker
    on."""
    text, begin, end = read_text(path), f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, _, rest = text.partition(begin)
    between, _, after = rest.partition(end)
    require(
        (text.count(begin), text.count(end), rest.count(end)) == (1, 1, 1),
        f"{path}: found {text.count(begin)} x {begin} and {text.count(end)} x {end}, expected each "
        f"once, in this order; put them where the {part} belong",
    )
    return before + begin, between, end + after


def with_part(path: Path, part: str, content: str) -> str:
    """The page with `content` between the markers of `part`."""
    before, _, after = split_page(path, part)
    return f"{before}\n{content}\n{after}"


def encoded(path: Path, text: str) -> bytes:
    """`text` in UTF-8, as it goes into `path`. RecordError: a part of it has no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 20) : error.end + 20]
        raise RecordError(
            f"{path}: would contain {part!r}, which cannot be UTF-8; rename the file or change the "
            "text that it comes from"
        ) from None


def write_all(texts: dict[Path, str]) -> None:
    """Write every file aside, then rename: none is ever half-written. RecordError: a file cannot be
    written, or not in UTF-8."""
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    contents = {path: encoded(path, text) for path, text in texts.items()}
    try:
        for path, content in contents.items():
            asides[path].write_bytes(content)
        for path, aside in asides.items():
            aside.replace(path)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}; it was not changed") from None
    finally:
        for aside in asides.values():
            with suppress(OSError):  # what made writing fail may make this fail too
                aside.unlink(missing_ok=True)


def load_script(script: Path):
    """`script` as the module train_gpt: the one that is loaded already, if it is the same text. A
    second load would register torch.library's operators anew, under whoever uses the first."""
    loaded = sys.modules.get("train_gpt")
    if loaded is None:
        spec = importlib.util.spec_from_file_location("train_gpt", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_gpt"] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop("train_gpt", None)  # the script may have done it
            raise
        return module
    require(
        Path(loaded.__file__).read_bytes() == script.read_bytes(),
        f"{script}: differs from {loaded.__file__}, which this process has loaded; expected one "
        "script per process",
    )
    return loaded
