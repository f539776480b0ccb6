"""The structure of docs/architecture.md, enforced: who imports whom, what needs no torch, how long a file is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/puna"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# Lower to higher, as docs/architecture.md says it: `errors` < `progress, files` < ... < `cli`.
ORDER_LINE = re.search(r"^`errors` <.*?`cli`", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL)
TIERS = [names.split(", ") for names in re.findall(r"`([^`]+)`", ORDER_LINE[0] if ORDER_LINE else "")] + [["__main__"]]
LEVEL = {name: level for level, names in enumerate(TIERS) for name in names}
# Command line and the engine's bookkeeping: a --help, or a property test of the scheduler, must not wait for torch.
COMMAND_LINE = [
    "errors",
    "progress",
    "option_values",
    "options",
    "cli",
    "__main__",
    "weights.hub",
    "data.options",
    "train.options",
]
COMMAND_LINE += [f"commands.{path.stem}" for path in sorted((PACKAGE / "commands").glob("[a-z]*.py"))]
BOOKKEEPING = [f"engine.{name}" for name in ("sampling_params", "options", "sequence", "block_pool", "scheduler")]
BOOKKEEPING += ["model.tp_plan"]


def dotted(path: Path, package: Path) -> str:
    """The module's name: puna.engine.engine, puna.engine."""
    words = ("puna", *path.relative_to(package).with_suffix("").parts)
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Every module of the package and the modules that it imports, inside functions and for type checking too."""
    paths = {dotted(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively (line {node.lineno}): write puna.…"
                base = node.module or ""
                names |= {f"{base}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        # `from puna.engine.engine import Engine` names a module and what is in it.
        nearest = {name if name in paths else name.rpartition(".")[0] for name in names}
        graph[module] = nearest & paths.keys() - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of two or more modules (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == order[module]:
            start = stack.index(module)
            if len(component := set(stack[start:])) > 1:
                found.append(component)
            del stack[start:]

    for module in graph:
        if module not in order:
            visit(module)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports between packages that the order of docs/architecture.md doesn't allow."""
    found = []
    for module, others in graph.items():
        if module == "puna":
            continue  # the public names, imported lazily from everywhere
        here = module.split(".")[1]
        for other in sorted(others):
            there = other.partition(".")[2].split(".")[0]  # "" for puna itself, of which only the version is read
            if there and there != here and not LEVEL.get(there, 99) < LEVEL.get(here, -1):
                found.append(f"{module} -> {other}")
    return found


GRAPH = import_graph(PACKAGE)


def test_packages_import_only_what_is_below_them():
    packages = {module.split(".")[1] for module in GRAPH if module != "puna"}
    assert packages <= LEVEL.keys(), f"docs/architecture.md gives no place to {packages - LEVEL.keys()}"
    assert not upward(GRAPH)


def test_files_import_one_another_in_no_circle():
    assert circles(GRAPH) == []


def test_nothing_inside_imports_the_public_names():
    """`from puna import LLM` in the package would be a lazy import of what is above."""
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "puna":
                names = {alias.name for alias in node.names} - {"__version__"}
                assert all(f"puna.{name}" in GRAPH for name in names), f"{module} imports {names} from puna"


def test_a_planted_circle_and_a_planted_upward_import_are_found(tmp_path):
    for name, text in {
        "__init__": "",
        "errors": "def f():\n    from puna.model.llama import Llama\n",
        "model/__init__": "",
        "model/llama": "import puna.model.linear\n",
        "model/linear": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from puna.model import rope\n",
        "model/rope": "from puna.model.llama import Llama\n",
        "model/config": "from puna.model.rope import rotate\n",
    }.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    graph = import_graph(tmp_path)
    assert circles(graph) == [{"puna.model.llama", "puna.model.linear", "puna.model.rope"}]
    assert upward(graph) == ["puna.errors -> puna.model.llama"]


def test_engine_bookkeeping_and_command_line_import_no_torch():
    for name in COMMAND_LINE + BOOKKEEPING:
        assert (PACKAGE / (name.replace(".", "/") + ".py")).exists(), name
        code = f"import sys, puna.{name}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0, f"puna.{name} imports torch"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_file_is_one_idea_and_says_why_it_exists(module):
    text = (PACKAGE / module).read_text()
    assert text.count("\n") <= 450, f"{module} is too long to read in one sitting"
    assert ast.get_docstring(ast.parse(text)), f"{module} doesn't open with why it exists"


def test_nothing_names_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    files = [ROOT / name for name in listed] or [
        path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    place = re.compile(r"(?<![\w.])/(wo)rk/|/(ro)ot/|/(ho)me/\w|/opt/(wh)eels")
    for file in files:
        if file.is_file() and file.suffix in {".py", ".md", ".toml", ".yaml", ".json", ""}:
            assert not place.search(file.read_text(errors="replace")), f"{file} names a path of one machine"
