"""What the source of train_gpt.py keeps to, read from its syntax tree."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields

import pytest
from helpers import ROOT, finish, start_python

import train_gpt as t

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
Function = ast.FunctionDef | ast.AsyncFunctionDef
CALLS = [node for node in ast.walk(TREE) if isinstance(node, ast.Call)]


def definitions(node: ast.AST = TREE, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.AST]]:
    """Yields (dotted name, node) of the functions and classes in `node`, those in them too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = (*path, child.name)
            yield ".".join(name), child
            yield from definitions(child, name)
        else:
            yield from definitions(child, path)


DEFINITIONS = dict(definitions())


def is_kernel(node: ast.AST) -> bool:
    """A kernel has the parameters of its launch, and as many lines as one loop over tiles takes."""
    return "jit" in map(ast.unparse, node.decorator_list)


FUNCTIONS = {
    name: node
    for name, node in DEFINITIONS.items()
    if isinstance(node, Function) and not is_kernel(node)
}


class Unloadable:
    """An import hook: Triton is installed, but not for this machine."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise RuntimeError("undefined symbol")


def test_a_triton_that_cannot_be_loaded_is_as_none(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Unloadable(), *sys.meta_path])
    (block,) = [node for node in TREE.body if isinstance(node, ast.Try)]
    names = {}
    exec(compile(ast.Module([block], []), "train_gpt.py", "exec"), names)
    assert names["triton"] is None


# --- form -----------------------------------------------------------------------------------------


def test_there_are_no_long_lines():
    assert [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100] == []


def test_functions_have_at_most_60_lines():
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in FUNCTIONS.items()}
    assert {name: n for name, n in lines.items() if n > 60} == {}


def test_functions_have_at_most_6_arguments_beside_self():
    counts = {}
    for name, node in FUNCTIONS.items():
        found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        counts[name] = len([a for a in found if a.arg not in ("self", "cls")])
    assert {name: n for name, n in counts.items() if n > 6} == {}


# --- docstrings -----------------------------------------------------------------------------------


def public_definitions() -> list[str]:
    """Functions and classes but for those in functions, special methods, which the class speaks
    for, and names that begin with an underscore."""
    return [
        name
        for name in DEFINITIONS
        if name.rpartition(".")[0] not in FUNCTIONS and not name.rpartition(".")[2].startswith("_")
    ]


def test_public_functions_and_classes_have_docstrings():
    assert [n for n in public_definitions() if not ast.get_docstring(DEFINITIONS[n])] == []


def test_settings_are_documented():
    assert [f.name for f in fields(t.Hyperparameters) if not f.metadata["doc"]] == []


# --- state ----------------------------------------------------------------------------------------


def own_object(functions: list[Function]) -> str:
    """In these nested definitions: the name of the object whose attributes may be set. It is the
    first argument of a method or, named ctx, of what torch's autograd calls."""
    for node in functions:
        first = node.args.args[0].arg if node.args.args else ""
        if first in ("self", "ctx"):
            return first
    return ""


def attributes_set_outside(node: ast.AST, functions: tuple = ()) -> Iterator[str]:
    """Yields each line that sets or deletes an attribute of an object from outside its class."""
    if isinstance(node, Function):
        functions = (*functions, node)
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
    if is_set and ast.unparse(node.value) != own_object(functions):
        yield f"{node.lineno}: {ast.unparse(node)}"
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called.split(".")[-1] in ("setattr", "__setattr__", "delattr", "__delattr__"):
            yield f"{node.lineno}: {called}"
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        written = ast.unparse(node.value)
        if written.startswith("vars(") or written.endswith("__dict__"):
            yield f"{node.lineno}: {written}"
    for child in ast.iter_child_nodes(node):
        yield from attributes_set_outside(child, functions)


def test_nothing_sets_an_attribute_from_outside_its_class():
    """What varies is an argument; what training changes is a TrainState."""
    assert list(attributes_set_outside(TREE)) == []


@pytest.mark.parametrize(
    "line",
    [
        "model.order = 1",
        "model.order += 1",
        "model.order: int = 1",
        "model.blocks[0].order = 1",
        "self.model.order = 1",
        "a, (model.order, b) = 1, (2, 3)",
        "del model.order",
        "setattr(model, 'order', 1)",
        "vars(model)['order'] = 1",
        "model.__dict__['order'] = 1",
        "for model.order in range(3): pass",
        "with open('x') as model.file: pass",
    ],
)
def test_an_attribute_set_from_outside_is_found(line):
    assert len(list(attributes_set_outside(ast.parse(f"def f(self, model):\n    {line}")))) == 1


@pytest.mark.parametrize("line", ["self.a = 1", "self.a += 1", "self.a[0] = 1", "model.a[0] = 1"])
def test_an_attribute_set_by_its_own_class_is_not_meant(line):
    assert list(attributes_set_outside(ast.parse(f"def f(self, model):\n    {line}"))) == []


def test_only_say_prints():
    """What it prints, any console takes."""
    calls = {
        name: [ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)]
        for name, node in FUNCTIONS.items()
    }
    assert [name for name, called in calls.items() if "print" in called] == ["say"]


def test_every_setting_is_read_by_something():
    """A switch without effect is a lie."""
    read = {
        node.attr
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert [f.name for f in fields(t.Hyperparameters) if f.name not in read] == []


# --- what it may do -------------------------------------------------------------------------------


def test_nothing_that_runs_code_from_a_file_is_imported():
    imported = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
    assert not imported & {"pickle", "marshal", "shelve", "dill"}


def test_nothing_that_runs_code_from_a_file_is_called():
    called = {ast.unparse(node.func) for node in CALLS}
    assert not called & {"eval", "exec", "compile", "torch.load", "torch.save"}


def test_numpy_loads_no_pickles():
    loads = [ast.unparse(node) for node in CALLS if ast.unparse(node.func) == "np.load"]
    assert loads
    assert all("allow_pickle=False" in call for call in loads)


def test_no_json_can_hold_nan():
    """NaN is no JSON, though Python writes it. (data/ writes whole numbers alone.)"""
    folders = "record", "studies", "bench", "tools"
    files = [ROOT / "train_gpt.py", *(p for name in folders for p in (ROOT / name).rglob("*.py"))]
    sources = [path.read_text() for path in files]
    nodes = [n for text in sources if "json.dump" in text for n in ast.walk(ast.parse(text))]
    calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
    writing = [call for call in calls if call.startswith(("json.dumps(", "json.dump("))]
    assert writing
    assert [call for call in writing if "allow_nan=False" not in call] == []


def test_import_does_nothing_and_needs_no_gpu_library(tmp_path):
    code = (
        "import sys\n"
        "for name in ('triton', 'flash_attn', 'flash_attn_interface', 'sentencepiece'): "
        "sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_gpt, torch\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert 'torch._dynamo' not in sys.modules\n"  # it takes seconds
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"NUM_LAYERS": "eleven"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_it_can_be_imported_without_an_entry_in_sys_modules(tmp_path):
    """As other people's loaders do it."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('theirs', {str(ROOT / 'train_gpt.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'theirs', 'train_gpt'} & set(sys.modules)\n"
        "assert module.Hyperparameters.from_env({'NUM_LAYERS': '12'}).num_layers == 12\n"
        "hp = module.Hyperparameters.from_env(dict(NUM_LAYERS='1', VE_ENABLED='0'))\n"
        "assert module.GPT(hp).hp is hp\n"
    )
    script = tmp_path / "loader.py"
    script.write_text(code)
    done = finish(start_python(tmp_path, [str(script)], {}))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_test_that_the_page_of_trust_names_exists():
    page = (ROOT / "docs/trust.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)::(\w+)`", page)) - {("file", "test")}
    assert len(named) > 30
    sources = {file: (ROOT / f"tests/test_{file}.py").read_text() for file, _ in named}
    assert [(f, n) for f, n in named if f"\ndef test_{n}(" not in sources[f]] == []
