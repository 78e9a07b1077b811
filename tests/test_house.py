"""Rules of the house: imports go down, files stay short, everything has types, and what documents name is there."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fem_diffusion
from fem_diffusion import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fem_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
TORCH_ONLY = ["tests/diffusion", "tests/comparison"]
# A room may import those above it in this list, and those beside it.
LEVELS = [["errors"], ["checks"], ["files", "marginal", "page", "progress"], ["certificate", "diffusion"], ["fields"],
          ["observation"], ["measurements"], ["forward"], ["prior", "density_pde"], ["levels"], ["problem"],
          ["simulation"], ["model", "samples"], ["reference", "trust", "comparison", "plot"],
          ["monitor"], ["__main__"]]
# Samples draw themselves, posteriors check, correct and report themselves, and models go to the monitor.
ALLOWED = {("samples", "plot"), ("model", "trust"), ("model", "monitor")}


def _named(path):
    return str(path.relative_to(ROOT))


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _nodes(tree, everywhere):
    """Nodes of a file, in functions only if `everywhere`; none that type checkers alone see."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)) and (
                everywhere or not isinstance(node, ast.FunctionDef)):
            yield from _nodes(node, everywhere)


def _imports(path, everywhere=True):
    """Modules of the package that a file imports."""
    for node in _nodes(ast.parse(path.read_text()), everywhere):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{_named(path)} line {node.lineno}: name the module in full."
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("fem_diffusion."))


def test_imports_go_down():
    level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
    for path in FILES:
        room = _room(path)
        if room == "__init__":
            continue
        assert room in level, f"{_named(path)}: give its room a place in LEVELS."
        for name in _imports(path):
            to = name.split(".")[1]
            assert to == room or level[to] <= level[room] or (room, to) in ALLOWED, (
                f"{_named(path)} imports {name}, which stands above it.")


def test_any_file_can_be_imported_first():
    """No circles among imports at the head of files; to import a file is to import its packages, too."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
    graph = {}
    for path in FILES:
        me = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[me] = set()
        for name in _imports(path, everywhere=False):
            parts = name.split(".")
            needed = {".".join(parts[:i]) for i in range(2, len(parts) + 1)} & known
            # A file runs while its own packages do.
            graph[me] |= {to for to in needed if not f"{me}.".startswith(f"{to}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_files_stay_short():
    long = {_named(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"More than 400 lines: {long}. Divide them."


def _untyped(path):
    """Functions of a file in which an argument or what is returned has no type."""
    for scope in ast.walk(ast.parse(path.read_text())):
        for node in scope.body if isinstance(scope, (ast.Module, ast.ClassDef)) else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg,
                             node.args.kwarg]
                names = [x.arg for x in arguments if x and not x.annotation and x.arg not in ("self", "cls")]
                if names or not node.returns and node.name not in ("__init__", "__post_init__"):
                    yield f"{_named(path)} line {node.lineno}: {node.name}({', '.join(names)})"


@pytest.mark.parametrize("room", sorted({_room(path) for path in FILES}))
def test_everything_has_types(room):
    found = [line for path in FILES if _room(path) == room for line in _untyped(path)]
    assert not found, "Without types:\n" + "\n".join(found)


def _ends(message):
    """Whether each text that a message may be ends with a full stop; a value at its end counts as one."""
    if isinstance(message, ast.JoinedStr):
        return _ends(message.values[-1])
    if isinstance(message, ast.BinOp) and isinstance(message.op, ast.Add):
        return _ends(message.right)
    if isinstance(message, ast.IfExp):
        return _ends(message.body) and _ends(message.orelse)
    return not isinstance(message, ast.Constant) or str(message.value).endswith(".")


def test_messages_of_errors_end_with_a_full_stop():
    without = [f"{_named(path)} line {node.lineno}" for path in FILES for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
               and ast.unparse(node.exc.func) in errors.__all__
               and not (node.exc.args and _ends(node.exc.args[0]))]
    assert not without, without


def test_every_name_of_the_stub_is_there():
    assert len(fem_diffusion.__all__) > 40
    for name in fem_diffusion.__all__:
        assert getattr(fem_diffusion, name) is not None
        assert name in dir(fem_diffusion)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fem_diffusion.nothing


def test_torch_rooms_and_their_tests_do_without_firedrake_and_mpi():
    code = ("import sys\nfor name in ('firedrake', 'mpi4py', 'petsc4py', 'ufl'): sys.modules[name] = None\n"
            "import pytest; sys.exit(pytest.main(['--collect-only', '-qq', '-p', 'no:cacheprovider', *sys.argv[1:]]))")
    run = subprocess.run([sys.executable, "-c", code, *TORCH_ONLY], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = {*re.findall(r"\]\(([^):#]+)\)", text),
             *re.findall(r"(?<![\w./=])([A-Za-z_]+/[\w./]*|\w+\.(?:py|pyi|md)|Makefile)(?![\w/])", text)}
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists()]
    assert not missing, missing
    named = set(re.findall(r"`make ([\w-]+)", text))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lint", "test", "test-quick", "test-slow"} <= named <= targets


def test_readme_lists_every_room():
    layout = (ROOT / "README.md").read_text().split("## Layout")[1]
    for room in {_room(path) for path in FILES} - {"__init__"}:
        name = f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"
        assert name in layout, f"The layout in README.md does not list {name}."


def test_quick_tests_are_there():
    listed = re.search(r"^QUICK_TESTS = (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    for name in listed[1].replace("\\", " ").split():
        assert (ROOT / name).exists(), name
