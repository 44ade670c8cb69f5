"""How long is train_gpt.py, and how well does it keep its own rules? One column per version.

    python -m tools.measure_script [--list] [REVISION_OR_FILE ...]     (default: the working tree's)

Each row is a number that a refactoring should watch: size, share of explanations, long functions,
objects that are changed by others, and what has no docstring. --list also names what was counted,
with its lines.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from tools.same_numbers import ROOT, read_script

LONG = 40  # lines; longer functions are counted
OWN = ("self", "cls", "ctx")  # what a method or an autograd function may set attributes of
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*FUNCTIONS, ast.ClassDef)


def explanation_bytes(source: str, tree: ast.Module) -> int:
    """Bytes of all comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    total = sum(len(token.string.encode()) for token in tokens if token.type == tokenize.COMMENT)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DOCUMENTED)) and ast.get_docstring(node) is not None:
            total += len(ast.get_source_segment(source, node.body[0]).encode())
    return total


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """All functions, methods and functions inside others."""
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


class Place(NamedTuple):
    """Where something is in the script, and what."""

    line: int
    text: str


class Row(NamedTuple):
    """A row of the table."""

    label: str
    value: str  # as it is shown
    found: list[Place]  # what was counted


def long_functions(tree: ast.Module) -> list[Place]:
    """Functions of more than LONG lines, docstring included, decorators not."""
    lengths = {f: f.end_lineno - f.lineno + 1 for f in functions(tree)}
    return [Place(f.lineno, f"{f.name}, {n} lines") for f, n in lengths.items() if n > LONG]


def functions_with_argument(tree: ast.Module, name: str) -> list[Place]:
    """Functions that have an argument of this name."""
    found = []
    for f in functions(tree):
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        if name in {argument.arg for argument in arguments}:
            found.append(Place(f.lineno, f.name))
    return found


def parts(target: ast.expr) -> Iterator[ast.expr]:
    """The single targets of an assignment such as `a.x, (b, *c) = ...`."""
    if isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            yield from parts(element)
    elif isinstance(target, ast.Starred):
        yield from parts(target.value)
    else:
        yield target


def assignment_targets(tree: ast.Module) -> Iterator[ast.expr]:
    """Everything that a statement assigns to: by =, :=, for, with, or del."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, ast.withitem):
            targets = [node.optional_vars] if node.optional_vars else []
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.For)):
            targets = [node.target]
        else:
            targets = []
        for target in targets:
            yield from parts(target)


def attributes_from_outside(tree: ast.Module) -> list[Place]:
    """The places that set an attribute of another object than self: by `model.x = ...`, by
    `self.model.x = ...` or by `setattr(model, ...)`."""
    found = []
    for target in assignment_targets(tree):
        if isinstance(target, ast.Attribute):
            owner = target.value
            if not (isinstance(owner, ast.Name) and owner.id in OWN):
                found.append(Place(target.lineno, ast.unparse(target)))
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"
        if is_call and ast.unparse(node.args[0]) not in OWN:
            found.append(Place(node.lineno, ast.unparse(node)))
    return found


def name_tests(tree: ast.Module) -> list[Place]:
    """Tests of a parameter's name by a part of it: `name.endswith(...)`, `name.startswith(...)`,
    `"..." in name`, or a comparison with a pattern. A variable `name` is taken for such a name."""
    found = []
    for node in ast.walk(tree):
        is_test = False
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_test = called in ("name.endswith", "name.startswith")
            is_match = called.split(".")[-1] in ("fnmatch", "fnmatchcase")
            is_test |= is_match and ast.unparse(node.args[0]) == "name"
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            is_text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
            is_test = is_text and ast.unparse(node.comparators[0]) == "name"
        if is_test:
            found.append(Place(node.lineno, ast.unparse(node)))
    return found


def undocumented(nodes: list[ast.stmt], prefix: str = "") -> list[Place]:
    """Those of `nodes` that are public functions or classes and have no docstring."""
    found = []
    for node in nodes:
        is_public = isinstance(node, DOCUMENTED) and not node.name.startswith("_")
        if is_public and ast.get_docstring(node) is None:
            found.append(Place(node.lineno, prefix + node.name))
    return found


def undocumented_methods(tree: ast.Module) -> list[Place]:
    """Public methods of public classes that have no docstring."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += undocumented(node.body, f"{node.name}.")
    return found


def measure(source: str) -> list[Row]:
    """The rows of a script."""
    tree = ast.parse(source)
    size = len(source.encode())
    counts = {
        f"functions over {LONG} lines": long_functions(tree),
        "functions that take `trainer`": functions_with_argument(tree, "trainer"),
        "attributes set from outside a class": attributes_from_outside(tree),
        "tests of a parameter's name by a part of it": name_tests(tree),
        "public functions and classes without docstring": undocumented(tree.body),
        "public methods without docstring": undocumented_methods(tree),
    }
    return [
        Row("lines", f"{len(source.splitlines()):,}", []),
        Row("bytes", f"{size:,}", []),
        Row("comments and docstrings", f"{explanation_bytes(source, tree) / size:.1%}", []),
        *(Row(label, str(len(found)), sorted(found)) for label, found in counts.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.measure_script", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("sources", nargs="*", metavar="REVISION_OR_FILE")
    parser.add_argument("--list", action="store_true", help="name what was counted")
    args = parser.parse_args()
    sources = args.sources or [str(ROOT / "train_gpt.py")]
    columns = [measure(read_script(source).decode()) for source in sources]
    print(f"| | {' | '.join(sources)} |")
    print("|---|" + "---:|" * len(sources))
    for rows in zip(*columns):
        print(f"| {rows[0].label} | {' | '.join(row.value for row in rows)} |")
    if args.list:
        for source, rows in zip(sources, columns):
            for row in rows:
                if row.found:
                    print(f"\n{source}: {row.label}")
                for line, text in row.found:
                    print(f"    line {line}: {text}")


if __name__ == "__main__":
    main()
