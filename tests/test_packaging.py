"""What is installed: constraints agree with pyproject.toml, and dependencies are what the sources import."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pyyaml": "yaml", "prompt-toolkit": "prompt_toolkit", "huggingface-hub": "huggingface_hub"}


def names(requirements: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, requirements)}


def test_the_constraints_pin_every_requirement_within_its_range():
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    pins = names([line for line in lines if line and not line.startswith("#")])
    extras = PROJECT["optional-dependencies"]
    for wanted in (PROJECT["dependencies"], extras["dev"], extras["docs"]):
        for name, requirement in names(wanted).items():
            (pin,) = pins[name].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{pins[name]}, {requirement}"


def imported() -> set[str]:
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"puna"}


def test_dependencies_are_what_the_sources_import():
    required = {IMPORTED_AS.get(name, name) for name in names(PROJECT["dependencies"])}
    optional = [r for extra in ("data", "train", "ray") for r in PROJECT["optional-dependencies"][extra]]
    optional = {IMPORTED_AS.get(name, name) for name in names(optional)} | {"wandb"}
    assert required <= imported(), "an unused dependency"
    assert imported() <= required | optional, "an undeclared dependency"


def test_the_package_is_typed():
    assert (ROOT / "src/puna/py.typed").exists()


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w-]+\.md", yaml.safe_dump(site["nav"]))
    outside = ["index.md", "contributing.md", "changelog.md", "security.md"]  # from the repository's root, by the hook
    assert sorted(listed) == sorted([*outside, *(page.name for page in (ROOT / "docs").glob("*.md"))])


def test_reference_pages_name_what_exists():
    from importlib import import_module

    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            parts = name.split(".")
            for cut in range(len(parts), 0, -1):
                try:
                    item = import_module(".".join(parts[:cut]))
                except ModuleNotFoundError:
                    continue
                break
            for part in parts[cut:]:
                item = getattr(item, part)
            assert item.__doc__, f"{page.name}: {name} has no docstring"
