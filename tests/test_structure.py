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

# Lower to higher. A room imports only itself and rooms of the lines above its own.
ORDER = [
    {"errors"},
    {"progress", "files", "options"},
    {"tokenizer", "kernels", "cluster"},
    {"model"},
    {"parallel", "quant"},
    {"weights"},
    {"model_loader", "data"},
    {"train", "engine"},
    {"llm"},
    {"bench"},
    {"doctor"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Command line and the engine's bookkeeping: a --help, or a property test of the scheduler, must not wait for torch.
COMMAND_LINE = ["errors", "progress", "options", "cli", "__main__", "weights.hub", "data.options", "train.options"]
COMMAND_LINE += [f"commands.{path.stem}" for path in sorted((PACKAGE / "commands").glob("[a-z]*.py"))]
BOOKKEEPING = ["engine.sampling_params", "engine.sequence", "engine.block_pool", "engine.scheduler", "model.tp_plan"]


def imports(path: Path) -> set[str]:
    """Every `puna.…` module that a file imports, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively (line {node.lineno}): write puna.…"
            base = node.module or ""
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "puna" else {base}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name.startswith("puna.")}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_room_imports_only_what_stands_below_it(module):
    room = module.parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the public names, imported lazily from everywhere
    assert room in LEVEL, f"{room} has no place in the order of docs/architecture.md"
    for name in imports(PACKAGE / module):
        other = name.split(".")[1]
        below = LEVEL.get(other, -1) < LEVEL[room]
        assert other == room or below, f"{module} imports {name}, which stands beside or above it"


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
        path for room in ("src", "tests") for path in (ROOT / room).rglob("*.py")
    ]
    place = re.compile(r"(?<![\w.])/(wo)rk/|/(ro)ot/|/(ho)me/\w|/opt/(wh)eels")
    for file in files:
        if file.is_file() and file.suffix in {".py", ".md", ".toml", ".yaml", ".json", ""}:
            assert not place.search(file.read_text(errors="replace")), f"{file} names a path of one machine"
