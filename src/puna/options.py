"""Dataclass <-> YAML <-> command line: one table of options behind all three.

A verb's options are a keyword-only dataclass whose fields are made by `argument` (positional) and `option`. The same
names work as `--max-tokens 8`, as `--max_tokens 8` and as `max_tokens: 8` in a YAML file; the command line beats the
file, the later of two files beats the earlier. A field made by `group` holds a dataclass of its own: `--optim.lr 1e-5`,
and in YAML a mapping. Whatever is wrong is one `UserError` sentence that names the nearest known option.

Plain Python rather than a parser library: positionals between options, a leading YAML file, nearest names and
one-sentence errors would each have to be patched into one, and --help must start in a blink.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field
from operator import attrgetter
from pathlib import Path
from textwrap import fill, indent
from typing import Any, Literal, TypeVar, Union

import yaml

from puna.errors import UserError, nearest

T = TypeVar("T")
OPTION = re.compile(
    r"(--?[A-Za-z][\w-]*|--[A-Za-z][\w.-]*)(=.*)?", re.DOTALL
)  # "-", "-1.5" and "- a list" are arguments, not options
WIDTH = 100
CHECKPOINT = "path, Hugging Face id (org/name) or alias (smollm2-135m-instruct) of a checkpoint"


def argument(help: str, default: Any = MISSING, *, rest: bool = False) -> Any:
    """A positional field; required without a default. A `tuple[str, ...]` takes all that remain.

    `rest`: it takes everything from the first positional on as it is, options of another command too.

    It can be given by name too (`--model X`, `model: X`); then the positionals of the command line fill the others.
    """
    return field(default=default, metadata={"help": help, "positional": True, "rest": rest})


def option(default: Any, help: str) -> Any:
    """A `--named` field; required when `default` is `dataclasses.MISSING`."""
    return field(default=default, metadata={"help": help})


def group(kind: type) -> Any:
    """A field that holds options of their own, a dataclass of `option` fields."""
    return field(default_factory=kind, metadata={"group": kind})


def parse(verb: str, kind: type[T], argv: Sequence[str]) -> T:
    """The options that `argv` and the YAML files it names ask for.

    Raises `UserError` for anything that doesn't fit, and `SystemExit(0)` after printing what `--help` or
    `--print-config` ask for.
    """
    hints = _hints(kind)
    named, positional, files, show = _split(verb, kind, argv)
    values: dict[str, Any] = {}
    for file in files:
        values |= convert_all(kind, _read_yaml(file), where=f"{file}: puna {verb}")
    for name in _positionals(kind):
        if positional and name not in named and name not in values:
            many = typing.get_origin(hints[name]) is tuple
            named[name], positional = (positional, []) if many else (positional[0], positional[1:])
    if positional:
        raise UserError(f"puna {verb} has no place for the argument {positional[0]!r} (see puna {verb} --help)")
    values |= {name: convert(text, hints[name], flag(name)) for name, text in named.items()}
    for entry in _fields(kind):
        if entry.default is MISSING and entry.name not in values:
            what = entry.name.upper() if entry.metadata.get("positional") else flag(entry.name)
            raise UserError(f"puna {verb} needs {what}: {entry.metadata['help']} (see puna {verb} --help)")
    options = _make(kind, values)
    if show:
        print(to_yaml(options), end="")
        raise SystemExit(0)
    return options


def convert_all(kind: type, mapping: Any, where: str) -> dict[str, Any]:
    """Checked values for the fields that `mapping` names, with dashes or underscores. `where` opens each error."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} takes a mapping of option names to values, not {mapping!r}")
    hints, groups = _hints(kind), _groups(kind)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name in groups:
            inner = convert_all(groups[name], {} if value is None else value, f"{where}: {key}")
            values |= {f"{name}.{inside}": item for inside, item in inner.items()}
            continue
        if name not in hints:
            raise UserError(f"{where} has no option {key!r}{nearest(name, [*hints, *groups])}")
        values[name] = convert(value, hints[name], f"{where}: {key}")
    return values


def to_yaml(options: Any) -> str:
    """The options that differ from their defaults, as the YAML file that gives them again."""
    values: dict[str, Any] = {}
    for entry in _fields(type(options)):
        value = attrgetter(entry.name)(options)
        if value != entry.default:
            *path, name = entry.name.split(".")
            inner = values
            for step in path:
                inner = inner.setdefault(step, {})
            inner[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def help_text(verb: str, kind: type) -> str:
    """What `puna VERB --help` prints: the class's docstring, then its options by the class that declares them."""
    hints, usage = _hints(kind), [f"puna {verb}"]
    for entry in _fields(kind):
        if entry.metadata.get("positional"):
            word = entry.name.upper() + ("..." if typing.get_origin(hints[entry.name]) is tuple else "")
            usage.append(word if entry.default is MISSING else f"[{word}]")
    lines = ["usage: " + " ".join([*usage, "[options]"]), "", _doc(kind)]
    for owner in kind.__mro__[:-1]:
        own = [entry for entry in _fields(kind) if entry.name in owner.__dict__.get("__annotations__", {})]
        if own:
            title = "Arguments and options" if owner is kind else summary(owner)
            lines += ["", f"{title}:", *(_describe(entry, hints[entry.name]) for entry in own)]
    for name, inner in _groups(kind).items():
        inside = [entry for entry in _fields(kind) if entry.name.startswith(f"{name}.")]
        lines += ["", f"{summary(inner)}:"]
        lines += [_describe(entry, hints[entry.name]) for entry in inside]
    lines += ["", "Everywhere:"]
    for head, text in (
        ("--config FILE", "read options from a YAML file; what stands on the command line wins"),
        ("--print-config", "print the options as such a file and stop"),
        ("--traceback", "show the Python traceback of an error"),
        ("--help", "this page"),
    ):
        lines.append(_row(head, text))
    return "\n".join(lines)


def summary(kind: type) -> str:
    """The first line of a class's docstring without its full stop."""
    return _doc(kind).splitlines()[0].rstrip(".")


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value`, from YAML or as the text of the command line, as the type `hint`; `UserError` names `name`."""
    try:
        return _convert(value, hint)
    except (ValueError, yaml.YAMLError, RecursionError):
        close = nearest(str(value), map(str, typing.get_args(hint))) if typing.get_origin(hint) is Literal else ""
        raise UserError(f"{name} takes {_wanted(hint)}, not {value!r}{close}") from None


def flag(name: str) -> str:
    """The command-line spelling of a field: max_tokens -> --max-tokens."""
    return "--" + name.replace("_", "-")


def _split(verb: str, kind: type, argv: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str], bool]:
    """The command line as (named values, positional texts, YAML files, --print-config)."""
    named: dict[str, Any] = {}
    positional: list[str] = []
    files: list[str] = []
    show = False
    hints, rest = _hints(kind), list(argv)
    verbatim = any(entry.metadata.get("rest") for entry in _fields(kind))
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        if not OPTION.fullmatch(word):
            if verbatim:
                positional += [word, *rest]
                break
            leading = not positional and not files and word.endswith((".yaml", ".yml"))
            (files if leading else positional).append(word)
            continue
        written, equals, value = word.partition("=")
        name = written.lstrip("-").replace("-", "_")
        if written in ("-h", "--help"):
            print(help_text(verb, kind))
            raise SystemExit(0)
        if name == "print_config":
            show = True
            continue
        negated = name.removeprefix("no_")
        if not equals and name in hints and _bare(hints[name]) is bool:
            named[name] = True
            continue
        if not equals and negated in hints and _bare(hints[negated]) is bool:
            named[negated] = False
            continue
        if name not in hints and name != "config":
            known = [flag(known) for known in [*hints, "config", "help"]]
            hint = nearest(written.replace("_", "-"), known) or f" (see puna {verb} --help)"
            raise UserError(f"puna {verb} has no option {written}{hint}")
        if not equals:
            if not rest or (rest[0].startswith("--") and OPTION.fullmatch(rest[0])):
                wanted = "a YAML file" if name == "config" else _wanted(hints[name])
                raise UserError(f"{written} needs a value: {wanted}")
            value = rest.pop(0)
        if name == "config":
            files.append(value)
        elif typing.get_origin(_bare(hints[name])) is tuple:
            named.setdefault(name, []).append(value)
        else:
            named[name] = value
    return named, positional, files, show


def _read_yaml(file: str) -> Any:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the options file {file}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{file} is not valid YAML: lists or mappings are nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{file} is not valid YAML{place}: {getattr(error, 'problem', None) or error}") from None
    return {} if content is None else content


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for member in args:
            if member is not type(None):
                try:
                    return _convert(value, member)
                except ValueError:
                    continue
        raise ValueError
    if origin is Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        raise ValueError
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if args[0] in (int, float):  # 128,512
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        return tuple(_convert(item, args[0]) for item in items)
    if origin is dict:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError
        return {_convert(key, args[0]): _convert(item, args[1]) for key, item in value.items()}
    if hint is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if isinstance(value, bool):
            return value
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    if hint is int and isinstance(value, float):
        raise ValueError
    if hint is float and not math.isfinite(float(value)):
        raise ValueError
    return Path(str(value)).expanduser() if hint is Path else hint(value)


def _wanted(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(member) for member in args if member is not type(None))
    if origin is Literal:
        *most, last = map(str, args)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        return {int: "whole numbers, as in 1,4,16", float: "numbers, as in 0.5,1"}.get(args[0], "text")
    if origin is dict:
        return "a mapping, as in '{13: -100}'"
    return {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}.get(hint, "text")


def _metavar(hint: Any) -> str:
    hint = _bare(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(member) for member in args if member is not type(None))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return _metavar(args[0]) + (",..." if args[0] in (int, float) else "")
    return {bool: "true|false", int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(hint, "{KEY: VALUE}")


def _describe(entry: Field, hint: Any) -> str:
    text, default = entry.metadata["help"], entry.default
    if entry.metadata.get("positional"):
        return _row(entry.name.upper(), text)
    if _bare(hint) is bool:
        return _row(flag(f"no_{entry.name}" if default else entry.name), text)
    if default is MISSING:
        text += " (required)"
    elif default not in (None, ()):
        text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    return _row(f"{flag(entry.name)} {_metavar(hint)}", text)


def _row(head: str, text: str) -> str:
    body = indent(fill(text, WIDTH - 30), " " * 30)
    return f"  {head}\n{body}" if len(head) > 26 else f"  {head:<28}{body[30:]}"


def _doc(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _bare(hint: Any) -> Any:
    """`T` of an optional `T | None`."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if typing.get_origin(hint) in (Union, types.UnionType) and len(members) == 1 else hint


def _hints(kind: Any) -> dict[str, Any]:
    """The type of every option, by its name; one of a group is called `group.name`."""
    hints = typing.get_type_hints(kind)
    found = {entry.name: hints[entry.name] for entry in dataclasses.fields(kind) if "group" not in entry.metadata}
    for name, inner in _groups(kind).items():
        found |= {f"{name}.{inside}": hint for inside, hint in _hints(inner).items()}
    return found


def _fields(kind: Any) -> list[Field]:
    """Every option, those of groups last and under their full name."""
    found = [entry for entry in dataclasses.fields(kind) if "group" not in entry.metadata]
    for name, inner in _groups(kind).items():
        for entry in map(copy.copy, _fields(inner)):
            entry.name = f"{name}.{entry.name}"
            found.append(entry)
    return found


def _groups(kind: Any) -> dict[str, type]:
    return {entry.name: entry.metadata["group"] for entry in dataclasses.fields(kind) if "group" in entry.metadata}


def _make(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from options by their full names."""
    own = {name: value for name, value in values.items() if "." not in name}
    for name, inner in _groups(kind).items():
        start = f"{name}."
        own[name] = _make(
            inner, {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
        )
    return kind(**own)


def _positionals(kind: type) -> list[str]:
    return [entry.name for entry in _fields(kind) if entry.metadata.get("positional")]
