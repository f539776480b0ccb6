"""Chat templates: Jinja programs that come with a checkpoint, so they are untrusted and run in a bounded sandbox.

The environment is that of transformers (5.x, `chat_template_utils`), so that the same template gives the same text.
Bounds are added: on the size of the source, the CPU time, and the size of every text or list that a template builds. A
template can neither reach Python nor keep the process busy or fill its memory.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from puna.errors import UserError, nearest

MAX_SOURCE = 1 << 18  # characters; the longest templates in use have about 20,000
MAX_SECONDS = 5.0  # of CPU time, so that a busy machine refuses nothing; a long conversation takes some milliseconds
MAX_TEXT = 16_000_000  # characters of a text, or of everything in a list
MAX_PRODUCT = 250_000_000  # upper bound on the characters that a call could make, checked before it runs
MAX_DATE = 200  # characters of a date's format; strftime is slow on long ones
MAX_REASON = 300  # characters of a template's own error that are shown
MAX_COUNT = 100_000  # any integer argument of a call, as jinja2's own bound on `range`
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
GROWING = {"replace", "join", "indent", "tojson", "format", "format_map", "wordwrap", "expandtabs", "translate", "%"}
FORMATS = {"format", "format_map", "%"}
MARK = "generation_mark"
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
WIDTH = re.compile(r"\d{5,}")  # in a format string


def render(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Run a template over a conversation. UserError for a bad message, and for whatever the template refuses."""
    return run(source, check_messages(messages), variables)


def run(source: str, conversation: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    """Run a template over checked messages. UserError for whatever the template refuses."""
    try:
        variables = json.loads(json.dumps(dict(variables)))  # plain data only: no object with methods gets in
    except (TypeError, ValueError) as error:
        raise UserError(f"Tools and template settings must be plain JSON data ({error}).") from error
    template = _compile(source)
    outer = sys.gettrace()
    chunks, size = [], 0
    try:
        sys.settrace(_Clock())
        for chunk in template.generate({"documents": None, **variables, "messages": conversation}):
            size += len(chunk)
            if size > MAX_TEXT:
                raise SecurityError(f"it writes more than {MAX_TEXT:,} characters")
            chunks.append(chunk)
    except Exception as error:  # whatever a template does wrong is the template's or the conversation's fault
        raise UserError(f"The chat template refused this conversation: {_reason(error)}.") from error
    finally:
        sys.settrace(outer)
    return "".join(chunks)


def marks_generation(source: str) -> bool:
    """Whether a template marks the text that the assistant generates."""
    return bool(GENERATION.search(source))


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain data, text parts joined; UserError where a role or a content is missing or unknown."""
    if isinstance(messages, str | Mapping) or not messages:
        raise UserError('A conversation is a list of messages, such as [{"role": "user", "content": "Hello"}].')
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise UserError(f"Message {number} must be a dict with role and content, not {type(message).__name__}.")
        role = message.get("role")
        if role not in ROLES:
            hint = nearest(str(role), ROLES)
            raise UserError(f"Message {number} has the role {role!r}{hint}; known roles are {', '.join(ROLES)}.")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
                raise UserError(f"Message {number} holds parts that are not text, which LLaMA text models cannot read.")
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
            raise UserError(f"Message {number} needs a content that is text, not {type(content).__name__}.")
        try:
            checked.append(json.loads(json.dumps({**message, "content": content})))
        except (TypeError, ValueError) as error:
            raise UserError(f"Message {number} must be plain JSON data ({error}).") from error
    return checked


def _reason(error: Exception) -> str:
    """An error's message on one line, truncated, without control characters."""
    text = " ".join(str(error)[: 2 * MAX_REASON].split()).rstrip(".") or type(error).__name__
    return "".join(char if char.isprintable() else "\ufffd" for char in text[:MAX_REASON])


class _Clock:
    """A trace function that stops a template when its time is up. Jinja has no other hook that every loop passes."""

    def __init__(self) -> None:
        self.end = time.thread_time() + MAX_SECONDS

    def __call__(self, frame: FrameType, event: str, arg: Any) -> _Clock | None:
        if time.thread_time() > self.end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds of CPU time")
        return self if frame.f_code.co_filename == "<template>" else None


def _weight(value: Any, most: int) -> int:
    """Characters in a value, every reference counted; the value itself for a number. Stops counting beyond `most`."""
    match value:
        case str() | bytes() | range():
            return len(value)
        case int():
            return abs(value)
        case Collection():
            total = len(value)
            for item in value.items() if isinstance(value, dict) else value:
                total += 1 if isinstance(item, int) else _weight(item, most - total)
                if total > most:
                    break
            return total
        case _:
            return 1


def _sized(value: Any) -> Any:
    """The value, checked against `MAX_TEXT`. Everything that a template builds passes through here."""
    if not isinstance(value, int) and _weight(value, MAX_TEXT) > MAX_TEXT:
        raise SecurityError(f"it builds more than {MAX_TEXT:,} characters")
    return value


def _metered(items: Iterator[Any]) -> Iterator[Any]:
    """The items, their total checked against `MAX_TEXT`, since a list of them may be made."""
    size = 0
    for item in items:
        size += 1 if isinstance(item, int) else _weight(item, MAX_TEXT)
        if size > MAX_TEXT:
            raise SecurityError(f"it builds more than {MAX_TEXT:,} characters")
        yield item


def _join(parts: Iterable[Any]) -> str:
    texts, size = [], 0
    for part in parts:
        texts.append(str(part))
        size += len(texts[-1])
        if size > MAX_TEXT:
            raise SecurityError(f"it builds more than {MAX_TEXT:,} characters")
    return "".join(texts)


def _bounded(function: Callable[..., Any], name: str, owner: Any = "") -> Callable[..., Any]:
    """`function` with bounds on its integer arguments, on the size it could build, and on its result."""

    @wraps(function)
    def checked(*args: Any, **kw: Any) -> Any:
        if name in GROWING:  # what comes one by one is weighed too
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        given = [*args, *kw.values()]
        if any(isinstance(value, int) and abs(value) > MAX_COUNT for value in given):
            raise SecurityError(f"it uses a number beyond {MAX_COUNT:,}")
        if name in GROWING:
            product = 1
            for value in (owner, *given):
                product *= max(1, _weight(value, MAX_PRODUCT))
            if product > MAX_PRODUCT:
                raise SecurityError(f"it builds more than {MAX_PRODUCT:,} characters")
            if any(isinstance(value, str) and WIDTH.search(value) for value in (owner, *given[:1])) and name in FORMATS:
                raise SecurityError("it formats to a width of more than four digits")
        made = function(*args, **kw)
        return _metered(made) if isinstance(made, Iterator) else _sized(made)

    return checked


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text and renders as its body.

    `conversation` sets the variable `MARK` and looks for its value in the text; otherwise it is undefined and empty.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = jinja2.nodes.Output([jinja2.nodes.Name(MARK, "load")], lineno=line)
        return jinja2.nodes.Scope([mark, *body, mark], lineno=line)


class _Names(Namespace):
    """`namespace()` without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kw: Any) -> None:
        self, rest = args[0], args[1:]
        names = dict(*rest, **kw)
        for name in names:
            _Names._check(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Names._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it stores the name {name!r} on a namespace")


class _Generator(CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, through the bounded join."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: jinja2.nodes.List, frame: Frame) -> None:
        self.write("environment.sized(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Frame) -> None:
        self.write("environment.sized(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":  # the names that a loop or an assignment sets
            return super().visit_Tuple(node, frame)
        self.write("environment.sized(")
        super().visit_Tuple(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join)
    sized = staticmethod(_sized)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and not (numbers and abs(left) <= 1000 and 0 <= right <= 100):
            raise SecurityError("it raises to a large power")
        if operator == "*":
            if numbers and max(abs(left), abs(right)) >= 1 << 64:
                raise SecurityError("it multiplies large numbers")
            for many, times in ((left, right), (right, left)):
                sequence = isinstance(many, str | list | tuple) and isinstance(times, int)
                if sequence and _weight(many, MAX_TEXT) * times > MAX_TEXT:
                    raise SecurityError(f"it builds more than {MAX_TEXT:,} characters")
        if operator == "%" and isinstance(left, str):
            return _bounded(lambda text, values: text % values, "%")(left, right)
        return _sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kw: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int):
            __obj = _bounded(__obj, name, owner)
        return _sized(super().call(__context, __obj, *args, **kw))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE or WIDTH.search(form):
        raise SecurityError(f"it formats a date by more than {MAX_DATE} characters")
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise UserError(f"The chat template has {len(source):,} characters, more than the {MAX_SOURCE:,} that are run.")
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _bounded(function, name) for name, function in environment.filters.items()}
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "namespace": _Names,
    }
    del environment.globals["lipsum"]
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise UserError(f"The chat template is not valid Jinja: {_reason(error)}.") from error
