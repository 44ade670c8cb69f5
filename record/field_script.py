"""What can be seen in a script without running it. Code that is packed into a string (lzma, zlib,
bz2; base64, base85, hex) is unpacked by its decoders alone, up to a size and a depth, and never
executed.

A look at the text proves little: it finds patterns that a reviewer should read, with their lines.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

MOST_DECODED = 1_000_000  # bytes of all layers together
MOST_LAYERS = 4
LEAST_PACKED = 100  # characters of a string that may be packed code
MOST_VISITS = 1_000_000  # of nodes of a syntax tree; the field's scripts need up to 100,000
MOST_STRINGS = 20  # tried per layer

NETWORK = {
    *("requests", "urllib", "http", "httpx", "aiohttp", "ftplib", "paramiko", "boto3", "wandb"),
    *("huggingface_hub", "datasets", "smtplib", "xmlrpc", "gdown", "modelscope", "urllib3"),
}
DOWNLOADS = re.compile(r"\b(?:curl|wget|aria2c|gsutil|pip3? install|git clone|https?://\S+)")
SHELLS = {"system", "popen", "run", "call", "check_call", "check_output", "Popen"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CODE_FILES = (
    *(".py", ".pyc", ".so", ".cpp", ".cc", ".c", ".cu", ".cuh", ".h", ".hpp", ".pyx", ".rs"),
    *(".pt", ".pth", ".ptz", ".pkl", ".npz", ".npy", ".bin", ".safetensors", ".xz", ".zst"),
)
TARGET = re.compile(r"(?:^|_)(?:tgts?|targets?|labels?|nxt|next|y)(?:_|\d|$)", re.I)
TABLE = re.compile(r"n_?gram|cache|table|count|hash|ctx|full|pair|bucket", re.I)
COUNTING = {"at", "bincount", "scatter_add_", "scatter_add", "index_add_", "index_put_", "put_"}
WRITES = {"update", "add", "insert", "learn", "observe", "add_tokens", "update_batch", "ingest"}
READS = {"score", "lookup", "query", "predict", "prob", "probs", "mix", "lookup_batch", "get_prob"}


class Layer(NamedTuple):
    """A text of code: the script's own, or one that was packed in it."""

    name: str  # e.g. "train_gpt.py", "train_gpt.py, unpacked (b85, lzma)"
    text: str
    tree: ast.AST | None  # None: it is not Python of this version
    problem: str  # then: why


class Found(NamedTuple):
    """A pattern, and the lines that show it."""

    place: str  # file:line
    what: str


# --- unpacking ---


def decode_b85(text: bytes) -> bytes:
    return base64.b85decode(text)


def decode_b64(text: bytes) -> bytes:
    return base64.b64decode(text, validate=True)


TEXT_CODES: dict[str, Callable[[bytes], bytes]] = {
    "b85": decode_b85,
    "b64": decode_b64,
    "a85": base64.a85decode,
    "hex": binascii.unhexlify,
}


def open_lzma(data: bytes, most: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=1 << 28).decompress(data, most)


def open_raw_lzma(data: bytes, most: int) -> bytes:
    filters = [dict(id=lzma.FILTER_LZMA2, dict_size=1 << 24)]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, most)


def open_zlib(data: bytes, most: int) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, most)


def open_raw_zlib(data: bytes, most: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)


def open_bz2(data: bytes, most: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, most)


PACKERS: dict[str, Callable[[bytes, int], bytes]] = {
    "lzma": open_lzma,
    "zlib": open_zlib,
    "bz2": open_bz2,
    "raw lzma": open_raw_lzma,
    "raw zlib": open_raw_zlib,
    "no packer": lambda data, most: data[:most],
}


def as_code(data: bytes) -> str:
    """The text of `data` if it looks like Python, else ""."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    return text if re.search(r"^\s*(?:import |from \w|def |class |exec\()", text, re.M) else ""


def unpacked(constant: str | bytes, most: int) -> tuple[str, str]:
    """(how, code) of a string that holds packed code, else ("", ""). At most `most` bytes of it are
    made."""
    raw = constant.encode("utf-8", "replace") if isinstance(constant, str) else constant
    forms = [("bytes", raw)] if isinstance(constant, bytes) else []
    for name, decoder in TEXT_CODES.items():
        try:
            forms.append((name, decoder(raw)))
        except (ValueError, OverflowError):
            continue
    for form, data in forms:
        for packer, opener in PACKERS.items():
            if form == "bytes" and packer == "no packer":
                continue
            try:
                code = as_code(opener(data, most))
            except (lzma.LZMAError, zlib.error, OSError, ValueError, EOFError, MemoryError):
                continue
            if code:
                return f"{form}, {packer}", code
    return "", ""


def parse(text: str) -> tuple[ast.AST | None, str]:
    """(syntax tree, "") or (None, why there is none)."""
    problem = ""
    for form in (lambda: text, lambda: without_fstrings(text)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes in foreign strings
                tree = ast.parse(form())
            return (tree, "") if is_small(tree) else (None, "too much code to look at")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = problem or f"not Python of this version: {str(error)[:80]}"
    return None, problem


def is_small(tree: ast.AST) -> bool:
    """Whether every function and loop can be walked on its own in seconds: those in others are
    walked again."""
    stack, visits = [(tree, 1)], 0
    while stack and visits <= MOST_VISITS:
        node, depth = stack.pop()
        visits += depth
        depth += isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.For, ast.While))
        stack += [(child, depth) for child in ast.iter_child_nodes(node)]
    return visits <= MOST_VISITS


QUOTE = re.compile(r"""#[^\n]*|(?<![\w])([rbuf]{0,2})(\"{3}|'{3}|"|')""", re.I)
IN_FSTRING = re.compile(r"""\\.|\{\{|\{|\"{3}|'{3}|"|'""", re.S)
IN_BRACES = re.compile(r"""[\[({]|[\])}]|(?<![\w])([rbuf]{0,2})(\"{3}|'{3}|"|')""", re.I)


def without_fstrings(text: str) -> str:
    """The code with every f-string replaced by an empty string of as many lines: Python 3.12 allows
    in them what older versions cannot parse. Raises ValueError: a string does not end."""
    parts, at = [], 0
    while match := QUOTE.search(text, at):
        end = match.end()
        if match[2]:
            end = end_of_string(text, end, match[1], match[2], 0)
        is_fstring = match[2] and "f" in match[1].lower()
        lines = text.count("\n", match.start(), end)
        empty = "'''" + "\n" * lines + "'''" if lines else "''"
        parts += [text[at : match.start()], empty if is_fstring else text[match.start() : end]]
        at = end
    return "".join(parts) + text[at:]


def end_of_string(text: str, at: int, prefix: str, quote: str, depth: int) -> int:
    """Where a string ends whose content begins at `at`. Raises ValueError: it does not."""
    if depth > 20:
        raise ValueError("strings nested too deep")
    while match := IN_FSTRING.search(text, at):
        at = match.end()
        if match[0].startswith(quote):
            return match.start() + len(quote)
        if match[0] == "{" and "f" in prefix.lower():
            at = end_of_braces(text, at, depth)
        elif match[0] in ('"""', "'''"):
            at = match.start() + 1  # of these quotes the first alone is no end
    raise ValueError("a string does not end")


def end_of_braces(text: str, at: int, depth: int) -> int:
    """Where an expression in an f-string ends that begins at `at`. Raises ValueError."""
    opened = 1
    while match := IN_BRACES.search(text, at):
        at = match.end()
        if match[2]:
            at = end_of_string(text, at, match[1], match[2], depth + 1)
        else:
            opened += 1 if match[0] in "[({" else -1
            if not opened:
                return at
    raise ValueError("an f-string does not end")


def layers_of(name: str, text: str) -> tuple[list[Layer], list[str]]:
    """(the script and all code packed in it, what was not looked at)."""
    layers, notes, left = [], [], MOST_DECODED
    queue = [(name, text, 0)]
    while queue:
        name, text, depth = queue.pop(0)
        layers.append(Layer(name, text, *parse(text)))
        strings = big_strings(layers[-1])
        if strings and depth >= MOST_LAYERS:
            notes.append(f"{name}: packed more than {MOST_LAYERS} times, not unpacked further")
            continue
        for string in strings[:MOST_STRINGS]:
            how, code = unpacked(string, left) if left > 0 else ("", "")
            if code:
                left -= len(code)
                queue.append((f"{layers[0].name}, unpacked ({how})", code, depth + 1))
                if left <= 0:
                    notes.append(f"unpacked code was read up to {MOST_DECODED:,} bytes")
    return layers, notes


def big_strings(layer: Layer) -> list[str | bytes]:
    """Strings of a layer that may be packed code, the longest first."""
    nodes = ast.walk(layer.tree) if layer.tree else ()
    found = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant)
        and isinstance(node.value, (str, bytes))
        and len(node.value) >= LEAST_PACKED
        and not (isinstance(node.value, str) and " " in node.value.strip())
    ]
    return sorted(found, key=len, reverse=True)


# --- what it imports and calls ---


def name_of(node: ast.AST) -> str:
    """`a.b.c` of such an expression, else what of it is a name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(layer: Layer) -> Iterator[tuple[str, int]]:
    """(module, line)"""
    for node in ast.walk(layer.tree) if layer.tree else ():
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and node.args:
            called, first = name_of(node.func).split(".")[-1], node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value), node.lineno


def network(layer: Layer) -> list[Found]:
    """Imports of network libraries, and shell commands that download."""
    found = [
        Found(f"{layer.name}:{line}", f"imports {module}")
        for module, line in imports(layer)
        if module.split(".")[0] in NETWORK
    ]
    for node in ast.walk(layer.tree) if layer.tree else ():
        if isinstance(node, ast.Call) and name_of(node.func).split(".")[-1] in SHELLS:
            words = [
                part.value
                for part in ast.walk(node)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            if match := DOWNLOADS.search(" ".join(words)[:2000]):
                found.append(Found(f"{layer.name}:{node.lineno}", f"runs {match[0][:60]}"))
    return found


def pickles(layer: Layer) -> list[Found]:
    """Reading that can run code: pickle and its relatives, torch.load without weights_only."""
    found = [
        Found(f"{layer.name}:{line}", f"imports {module}")
        for module, line in imports(layer)
        if module.split(".")[0] in PICKLES
    ]
    for node in ast.walk(layer.tree) if layer.tree else ():
        if isinstance(node, ast.Call) and name_of(node.func) == "torch.load":
            safe = [word for word in node.keywords if word.arg == "weights_only"]
            is_safe = safe and isinstance(safe[0].value, ast.Constant) and safe[0].value.value
            if not is_safe:
                found.append(Found(f"{layer.name}:{node.lineno}", "torch.load of any object"))
    return found


def siblings(layer: Layer, names: list[str]) -> dict[str, str]:
    """{file: place} of the folder's code files (`names`) that this code imports or names."""
    code = [name for name in names if name.lower().endswith(CODE_FILES)]
    modules = dict(imports(layer))
    literals = {}
    for node in ast.walk(layer.tree) if layer.tree else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            literals.setdefault(node.value[-200:].rsplit("/", 1)[-1], node.lineno)
    found = {}
    for name in code:
        module = name.rsplit(".", 1)[0].replace("/", ".")
        line = modules.get(module)
        if line is None:
            line = literals.get(name.rsplit("/", 1)[-1])
        if line is not None:
            found[name] = f"{layer.name}:{line}"
    return found


# --- n-gram caches ---


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
    }


def outside_slices(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of an expression but for what stands in square brackets."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Subscript) and child is node.slice):
            yield from outside_slices(child)


def mixes(node: ast.AST) -> bool:
    """Whether an expression combines numbers as hashes do, by xor."""
    return any(
        isinstance(part, ast.BinOp)
        and isinstance(part.op, ast.BitXor)
        or isinstance(part, ast.Call)
        and name_of(part.func).split(".")[-1] in ("bitwise_xor", "logical_xor")
        for part in outside_slices(node)
    )


def folds(node: ast.AST) -> bool:
    """Whether an expression brings a number into the range of a table, by `&` or `%`."""
    return any(
        isinstance(part, ast.BinOp)
        and isinstance(part.op, (ast.BitAnd, ast.Mod))
        or isinstance(part, ast.Call)
        and name_of(part.func).split(".")[-1] in ("bitwise_and", "remainder", "mod", "fmod")
        for part in outside_slices(node)
    )


def folded_names(node: ast.AST) -> set[str]:
    """The names of what an expression folds: `h` of `(h & mask).astype(int)`."""
    sides = (
        part.left
        for part in outside_slices(node)
        if isinstance(part, ast.BinOp) and isinstance(part.op, (ast.BitAnd, ast.Mod))
    )
    return {side.id for side in sides if isinstance(side, ast.Name)}


def functions(tree: ast.AST) -> list[ast.AST]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module))
    ]


def assignments(tree: ast.AST) -> list[tuple[set[str], ast.AST, int]]:
    """(names that are set, the value, line) of a function, in the order of lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
            targets = [node.target]
        else:
            continue
        names = {name for target in targets for name in names_in(target)}
        if node.value is not None:
            # the value of `h ^= x` is h ^ x
            value = node if isinstance(node, ast.AugAssign) else node.value
            found.append((names, value, node.lineno))
    return sorted(found, key=lambda one: one[2])


def is_mixing(value: ast.AST) -> bool:
    """Whether a value is mixed as hashes are: by xor, or times a large constant."""
    is_xor = isinstance(value, ast.AugAssign) and isinstance(value.op, ast.BitXor)
    return is_xor or mixes(value) or any(map(is_large_product, ast.walk(value)))


def is_large_product(node: ast.AST) -> bool:
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
    return bool(sides and isinstance(node.op, ast.Mult)) and any(
        isinstance(side, ast.Constant) and isinstance(side.value, int) and side.value > 1000
        for side in sides
    )


def has_target(value: ast.AST) -> bool:
    return any(TARGET.search(name) for name in names_in(value))


def called_in(value: ast.AST) -> set[str]:
    """The last names of what an expression calls."""
    calls = (node for node in ast.walk(value) if isinstance(node, ast.Call))
    return {name_of(node.func).split(".")[-1] for node in calls}


class Hashes(NamedTuple):
    """Names in a function, with their lines."""

    mixed: dict[str, int]  # a target, mixed with something else
    keys: dict[str, int]  # that, folded into the range of a table


def target_hashes(tree: ast.AST, makers: set[str]) -> Hashes:
    """What is computed by hashing a target: mixed with something else, then folded into the range
    of a table, or returned by one of `makers`. A second key that mixes one value more into the hash
    of a first is one, too, whatever the value is called: so are a context and its target
    counted."""
    found, contexts = Hashes({}, {}), set()
    for names, value, line in assignments(tree):
        used, does_fold = names_in(value), folds(value)
        if does_fold and not mixes(value):
            contexts |= folded_names(value)
        is_second = mixes(value) and used & contexts
        is_first = is_mixing(value) and has_target(value)
        is_mixed = is_first or is_second or used & set(found.mixed)
        is_key = does_fold and is_mixed or used & set(found.keys) or called_in(value) & makers
        if is_key or is_mixed:
            for name in names:
                (found.keys if is_key else found.mixed).setdefault(name, line)
    return found


def key_makers(tree: ast.AST) -> set[str]:
    """The functions that return a hash of a target, folded into the range of a table."""
    makers = set()
    for function in functions(tree):
        if isinstance(function, ast.Module):
            continue
        hashes = target_hashes(function, makers)
        for node in ast.walk(function):
            if not isinstance(node, ast.Return) or node.value is None:
                continue
            used = names_in(node.value)
            is_mixed = is_mixing(node.value) and has_target(node.value) or used & set(hashes.mixed)
            if used & set(hashes.keys) or (folds(node.value) and is_mixed):
                makers.add(function.name)
    return makers


def hashed_targets(layer: Layer) -> list[Found]:
    """Tables whose key is a hash of the context and the target: counts of different pairs fall
    together, and their quotient is no probability."""
    found, makers = {}, key_makers(layer.tree) if layer.tree else set()
    for function in functions(layer.tree) if layer.tree else ():
        keys = target_hashes(function, makers).keys
        if not keys or isinstance(function, ast.Module):
            continue
        names = set(keys)
        for node in ast.walk(function):
            if used := table_of(node, names):
                key = min(names & names_in(node), key=keys.get)
                text = f"`{used}` is looked up or counted by `{key}`, a hash of the target"
                place = f"{layer.name}:{keys[key]},{node.lineno}"
                found.setdefault((used, key), Found(place, text))
    return list(found.values())


def table_of(node: ast.AST, keys: set[str]) -> str:
    """The table that this expression reads or counts in by one of `keys`, else ""."""
    if isinstance(node, ast.Subscript) and names_in(node.slice) & keys:
        table = last_name(node.value)
        return table if TABLE.search(table) else ""
    is_call = isinstance(node, ast.Call)
    method = name_of(node.func).split(".")[-1] if is_call else ""
    if method in COUNTING and any(names_in(arg) & keys for arg in node.args):
        return last_name(node.args[0]) if method == "at" else method
    return ""


def last_name(node: ast.AST) -> str:
    """`table` of self.table[n]."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def updates_first(layer: Layer) -> list[Found]:
    """Loops in which a cache learns before it is asked: then the score may know its target."""
    found = {}
    for loop in ast.walk(layer.tree) if layer.tree else ():
        if not isinstance(loop, (ast.For, ast.While)):
            continue
        writes, reads = {}, {}
        nodes = [node for statement in loop.body for node in ast.walk(statement)]
        written = {id(part) for node in nodes for part in parts_written(node)}
        for node in nodes:
            note_use(node, writes, reads, id(node) in written)
        for table, line in writes.items():
            asked = reads.get(table)
            if asked and asked > line and TABLE.search(table):
                text = f"`{table}` is updated, and asked later in the same turn of the loop"
                found.setdefault(table, Found(f"{layer.name}:{line},{asked}", text))
    return list(found.values())


def parts_written(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of an expression that name a table which it writes: no lookups."""
    is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if is_method and node.func.attr in COUNTING | WRITES:
        yield from ast.walk(node.func)
        yield from (part for arg in node.args[:1] for part in ast.walk(arg))


def note_use(node: ast.AST, writes: dict, reads: dict, is_written: bool) -> None:
    """Keep the first line at which a table is written, and at which it is read."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method, owner = node.func.attr, last_name(node.func.value)
        if method in COUNTING and node.args:
            keep_first(writes, last_name(node.args[0]) if method == "at" else owner, node.lineno)
        elif method in WRITES:
            keep_first(writes, owner, node.lineno)
        elif method in READS:
            keep_first(reads, owner, node.lineno)
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript):
        keep_first(writes, last_name(node.target), node.lineno)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and not is_written:
        keep_first(reads, last_name(node), node.lineno)


def keep_first(table: dict[str, int], name: str, line: int) -> None:
    if name:
        table[name] = min(line, table.get(name, line))
