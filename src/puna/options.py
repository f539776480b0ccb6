"""Options: one keyword-only dataclass is a verb's command line, its YAML file and its Python arguments.

Fields are made by `argument` (positional), `option`, `group` and `overrides`; other fields are for Python alone. The
names are the same everywhere: `--max-tokens 8`, `--max_tokens=8`, `max_tokens: 8`; of a group, `--optim.lr 1e-5` and a
mapping in YAML. The command line beats the files, a later file an earlier one. Any mistake is one `UserError` sentence.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from textwrap import fill, indent
from typing import Any, Literal, TypeVar

import yaml

from puna.errors import UserError, nearest
from puna.files import read_bytes
from puna.option_values import bare, convert, in_words, is_list, metavar, unescape

T = TypeVar("T")
OPTION = re.compile(
    r"(--?[A-Za-z][\w-]*|--[A-Za-z][\w.-]*)(=.*)?", re.DOTALL
)  # "-", "-1.5" and "- a list" are arguments, not options
WIDTH = 100
MAX_YAML = 1 << 20  # bytes
MAX_SEED = 2**63 - 1  # of torch's and numpy's generators alike
CHECKPOINT = "path, Hugging Face id (org/name) or alias (smollm2-135m-instruct) of a checkpoint"


@dataclass(frozen=True)
class Option:
    """A field as an option. `name` is its full name, `optim.lr`; `default` is MISSING where a value is required."""

    name: str
    hint: Any
    default: Any
    owner: type
    help: str
    positional: bool = False
    rest: bool = False
    aliases: tuple[str, ...] = ()
    old_values: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    escapes: bool = False
    writes: Literal["file", "folder", "prefix", "file or folder"] | None = None

    @property
    def flag(self) -> str:
        """The command-line spelling: max_tokens -> --max-tokens."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_flag(self) -> bool:
        return bare(self.hint) is bool


def argument(help: str, default: Any = MISSING, *, rest: bool = False, writes: str | None = None) -> Any:
    """A positional field; required without a default. A `tuple[str, ...]` takes all that remain.

    It can be given by name too, by `--model X` or in a YAML file that is the first positional itself; then the
    positionals fill the others. They override `model: X` in a file given by --config.
    `rest`: it takes everything from the first positional on unparsed, options of another command too.
    """
    return field(default=default, metadata={"help": help, "positional": True, "rest": rest, "writes": writes})


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    old_values: Mapping[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    escapes: bool = False,
    writes: str | None = None,
) -> Any:
    """A `--named` field; required when `default` is `dataclasses.MISSING`. The help of a flag says what true does.

    `aliases` and `old_values`: former spellings, which still work with a note on stderr. `minimum`, `maximum`, `above`:
    bounds of a number, or of each number of a list. `escapes`: the command line takes \\n and the like. `writes`: the
    kind of path that the verb writes; one that can't be written is refused at once.
    """
    metadata = {"help": help, "aliases": aliases, "old_values": old_values or {}, "minimum": minimum}
    metadata |= {"maximum": maximum, "above": above, "escapes": escapes, "writes": writes}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type, **defaults: Any) -> Any:
    """A field that holds a dataclass of options; `defaults` override the dataclass's own."""
    return field(default_factory=lambda: kind(**defaults), metadata={"group": kind, "defaults": defaults})


def overrides(kind: type) -> Any:
    """A field that holds, as a dict by name, those options of the dataclass `kind` that were given."""
    return field(default_factory=dict, metadata={"overrides": kind})


def options_of(kind: Any) -> dict[str, Option]:
    """Every option by its full name: a class's own, those that it overrides, and its groups'."""
    hints = typing.get_type_hints(kind)
    own, later = {}, {}
    for entry in dataclasses.fields(kind):
        metadata = dict(entry.metadata)
        if "group" in metadata:
            for inner in options_of(metadata["group"]).values():
                default = metadata["defaults"].get(inner.name, inner.default)
                name = f"{entry.name}.{inner.name}"
                later[name] = dataclasses.replace(inner, name=name, default=default)
        elif "overrides" in metadata:
            for inner in options_of(metadata["overrides"]).values():
                hint = inner.hint if type(None) in typing.get_args(inner.hint) else inner.hint | None
                later[inner.name] = dataclasses.replace(inner, hint=hint, default=None)
        elif "help" in metadata:
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            owner = next(cls for cls in kind.__mro__ if entry.name in cls.__dict__.get("__annotations__", {}))
            own[entry.name] = Option(entry.name, hints[entry.name], default, owner, **metadata)
    return own | later


def parse(verb: str, kind: type[T], argv: Sequence[str]) -> T:
    """The options that `argv` and the YAML files it names ask for.

    Raises `UserError` for anything that doesn't fit, and `SystemExit(0)` after printing what `--help` or
    `--print-config` ask for.
    """
    known = options_of(kind)
    named, positional, files, show, former = _split(verb, kind, argv)
    values: dict[str, Any] = {}
    filled = set(named)  # positional fields that the positional texts do not fill
    for file, is_first in files:
        values |= (given := convert_all(kind, _read_yaml(file), where=f"{file}: puna {verb}"))
        filled |= given.keys() if is_first else set()
    for name, entry in known.items():
        if entry.positional and positional and name not in filled:
            many = is_list(entry.hint)
            named[name], positional = (positional, []) if many else (positional[0], positional[1:])
    if positional:
        raise UserError(f"puna {verb} has no place for the argument {positional[0]!r} (see puna {verb} --help)")
    for name, text in named.items():
        before, now = former.get(name, (known[name].flag, known[name].flag))
        text = _modern(text, known[name], before, now)
        if known[name].escapes:
            text = [unescape(item) for item in text] if isinstance(text, list) else unescape(text)
        values[name] = _checked(text, known[name], known[name].flag)
    for name, entry in known.items():
        if entry.default is MISSING and name not in values:
            what = name.upper() if entry.positional else entry.flag
            raise UserError(f"puna {verb} needs {what}: {entry.help} (see puna {verb} --help)")
    options = _make(kind, values)
    if show:
        print(to_yaml(options), end="")
        raise SystemExit(0)
    return options


def convert_all(kind: type, mapping: Any, where: str) -> dict[str, Any]:
    """Checked values for the fields that `mapping` names, with dashes or underscores. `where` opens each error."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} takes a mapping of option names to values, not {mapping!r:.200}")
    known, groups = options_of(kind), _groups(kind)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name in groups:
            inner = convert_all(groups[name], {} if value is None else value, f"{where}: {key}")
            values |= {f"{name}.{inside}": item for inside, item in inner.items()}
            continue
        former = _renamed(name, known)
        name = former or name
        if name not in known:
            raise UserError(f"{where} has no option {key!r}{nearest(name, [*known, *groups])}")
        value = _modern(value, known[name], f"{where}: {key}", name if former else str(key))
        values[name] = _checked(value, known[name], f"{where}: {key}")
    return values


def to_yaml(options: Any) -> str:
    """The options that differ from their defaults, as the YAML file that gives them again."""
    values: dict[str, Any] = {}
    flat = [entry.name for entry in dataclasses.fields(options) if "overrides" in entry.metadata]
    given = {name: value for field_name in flat for name, value in getattr(options, field_name).items()}
    for name, entry in options_of(type(options)).items():
        *path, last = name.split(".")
        value: Any = options
        for step in path:
            value = getattr(value, step)
        value = getattr(value, last) if hasattr(value, last) else given.get(last)
        if value != entry.default:
            inner = values
            for step in path:
                inner = inner.setdefault(step, {})
            inner[last] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def help_text(verb: str, kind: type) -> str:
    """What `puna VERB --help` prints: the class's docstring, then its options by the class that declares them."""
    known, usage = options_of(kind), [f"puna {verb}"]
    sections: dict[tuple[type, str], list[str]] = {}
    for name, entry in known.items():
        if entry.positional:
            word = name.upper() + ("..." if is_list(entry.hint) else "")
            usage.append(word if entry.default is MISSING else f"[{word}]")
        sections.setdefault((entry.owner, name.rpartition(".")[0]), []).append(_describe(entry))
    lines = ["usage: " + " ".join([*usage, "[options]"]), "", _doc(kind)]
    own = sections.pop((kind, ""), [])
    for (owner, _), rows in [((kind, ""), own), *sections.items()] if own else sections.items():
        lines += ["", "Arguments and options:" if owner is kind else f"{summary(owner)}:", *rows]
    lines += ["", "Everywhere:"]
    for head, text in (
        ("--config FILE", "read options from a YAML file; the command line overrides it"),
        ("FILE.yaml", "as the first argument: the same, and further arguments follow those that the file gives"),
        ("--print-config", "print the options as such a file and stop"),
        ("--traceback", "show the Python traceback of an error"),
        ("--help", "this page"),
    ):
        lines.append(_row(head, text))
    return "\n".join(lines)


def summary(kind: type) -> str:
    """The first line of a class's docstring without its full stop."""
    return _doc(kind).splitlines()[0].rstrip(".")


def _split(
    verb: str, kind: type, argv: Sequence[str]
) -> tuple[dict[str, Any], list[str], list[tuple[str, bool]], bool, dict[str, tuple[str, str]]]:
    """The command line as (named values, positional texts, YAML files, --print-config, former and present flags).

    With each YAML file: whether it is the first positional.
    """
    named: dict[str, Any] = {}
    positional: list[str] = []
    files: list[tuple[str, bool]] = []
    former: dict[str, tuple[str, str]] = {}
    show = False
    known, rest = options_of(kind), list(argv)
    flags = {name for name, entry in known.items() if entry.is_flag}
    verbatim = any(entry.rest for entry in known.values())
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        if not OPTION.fullmatch(word):
            if verbatim:
                positional += [word, *rest]
                break
            if not positional and not files and word.endswith((".yaml", ".yml")):
                files.append((word, True))
            else:
                positional.append(word)
            continue
        written, equals, value = word.partition("=")
        name = written.lstrip("-").replace("-", "_")
        if written in ("-h", "--help"):
            print(help_text(verb, kind))
            raise SystemExit(0)
        if name == "print_config":
            show = True
            continue
        if name not in known and (renamed := _renamed(name, known)):
            former[renamed.removeprefix("no_")] = written, f"--{renamed.replace('_', '-')}"
            name = renamed
        negated = name.removeprefix("no_")
        if not equals and name in flags:
            named[name] = True
            continue
        if not equals and negated in flags:
            named[negated] = False
            continue
        if name not in known and name != "config":
            spellings = [*(entry.flag for entry in known.values()), "--config", "--help"]
            hint = nearest(written.replace("_", "-"), spellings) or f" (see puna {verb} --help)"
            raise UserError(f"puna {verb} has no option {written}{hint}")
        if not equals:
            if not rest or (rest[0].startswith("--") and OPTION.fullmatch(rest[0])):
                wanted = "a YAML file" if name == "config" else in_words(known[name].hint)
                raise UserError(f"{written} needs a value: {wanted}")
            value = rest.pop(0)
        if name == "config":
            files.append((value, False))
        elif is_list(known[name].hint):
            named.setdefault(name, []).append(value)
        else:
            named[name] = value
    return named, positional, files, show, former


def _renamed(name: str, known: Mapping[str, Option]) -> str | None:
    """The present name for a former one, `no_` included."""
    for entry in known.values():
        if name in entry.aliases:
            return entry.name
        if name.removeprefix("no_") in entry.aliases and entry.is_flag:
            return f"no_{entry.name}"
    return None


def _modern(value: Any, entry: Option, before: str, now: str) -> Any:
    """`value` in its present spelling; one note if it, or the option's name `before` (as given), is a former one."""
    new = entry.old_values.get(value) if isinstance(value, str) else None
    if new is not None:
        _note(f"{before} {value} is now {now} {new}")
    elif before.rpartition(": ")[2] != now:
        _note(f"{before} is now {now}")
    return value if new is None else new


def _checked(value: Any, entry: Option, name: str) -> Any:
    """`value` converted to the option's type and within its bounds. `name` opens the error."""
    if entry.writes:
        _check_output(str(value), entry.writes, name)
    value = convert(value, entry.hint, name)
    for number in value if isinstance(value, tuple) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if entry.minimum is not None and number < entry.minimum:
                raise UserError(f"{name} must be at least {entry.minimum:g}, not {number}")
            if entry.maximum is not None and number > entry.maximum:
                raise UserError(f"{name} must be at most {entry.maximum}, not {number}")
            if entry.above is not None and number <= entry.above:
                raise UserError(f"{name} must be above {entry.above:g}, not {number}")
    return value


def _check_output(text: str, what: str, name: str) -> None:
    """Raises UserError for a path that can't be written, before hours of work."""
    path = Path(text).expanduser()
    if not path.name or path.name == "..":
        raise UserError(f"{name} {text!r} must name a {what} of its own, such as {Path(text, 'result')}")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{name} {text} is a symbolic link to nothing: make its target, or choose another path")
    if what == "folder":
        if path.exists() and not path.is_dir():
            raise UserError(f"{name} {text} is a file, not a folder: choose another path")
        return
    if what != "file or folder" and text.endswith(("/", os.sep)):
        example = "data" if what == "prefix" else "result"
        raise UserError(f"{name} {text} is a folder: add the name of the {what}, such as {text}{example}")
    if what == "file" and path.is_dir():
        raise UserError(f"{name} {text} is a folder: give the path of a file")
    if what == "file" and not path.absolute().parent.is_dir():
        raise UserError(f"{name} {text} is in a folder that doesn't exist: make {path.parent} first")


def _note(text: str) -> None:
    print(f"note: {text}.", file=sys.stderr)


def _read_yaml(file: str) -> Any:
    try:
        content = yaml.safe_load(read_bytes(Path(file), MAX_YAML).decode())
    except RecursionError:
        raise UserError(f"{file} is not valid YAML: lists or mappings are nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{file} is not valid YAML{place}: {getattr(error, 'problem', None) or error}") from None
    return {} if content is None else content


def _describe(entry: Option) -> str:
    text, default = entry.help, entry.default
    if entry.positional:
        return _row(entry.name.upper(), text)
    if entry.is_flag and default is not False:
        return _row(f"{entry.flag}, --no-{entry.flag[2:]}", f"{text} (default: yes)" if default else text)
    if entry.is_flag:
        return _row(entry.flag, text)
    if default is MISSING:
        text += " (required)"
    elif default not in (None, (), {}):
        text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    return _row(f"{entry.flag} {metavar(entry.hint)}", text)


def _row(head: str, text: str) -> str:
    body = indent(fill(text, WIDTH - 30, break_on_hyphens=False), " " * 30)
    return f"  {head}\n{body}" if len(head) > 26 else f"  {head:<28}{body[30:]}"


def _doc(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _groups(kind: Any) -> dict[str, type]:
    return {entry.name: entry.metadata["group"] for entry in dataclasses.fields(kind) if "group" in entry.metadata}


def _make(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from options by their full names."""
    own: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        if "group" in entry.metadata:
            start = f"{entry.name}."
            inner = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
            own[entry.name] = _make(entry.metadata["group"], {**entry.metadata["defaults"], **inner})
        elif "overrides" in entry.metadata:
            names = options_of(entry.metadata["overrides"])
            own[entry.name] = {name: values[name] for name in names if values.get(name) is not None}
        elif entry.name in values:
            own[entry.name] = values[entry.name]
    return kind(**own)
