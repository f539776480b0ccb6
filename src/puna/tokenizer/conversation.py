"""Rendering of conversations: messages adapted to the chat template, refusals, and the spans of answers."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.errors import UserError
from puna.tokenizer.chat_template import MARK, check_messages, marks_generation, run
from puna.tokenizer.special_tokens import SpecialSpellings, new_mark, take_marks

Message = dict[str, Any]
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation.

    spans: [start, end) of each answer that the template marks as generated; None where it has no `{% generation %}`.
    guards: positions that no special token may span, since the text around them is a message's own.
    """

    text: str
    spans: list[tuple[int, int]] | None = None
    guards: tuple[int, ...] = ()


def render_conversation(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    spellings: SpecialSpellings | None = None,
    *,
    unfinished: bool = False,
) -> Rendered:
    """Render `messages` by the template `source`.

    spellings: the special tokens that only the template may write; None lets messages write them too. unfinished: end
    after the content of the last message, for the model to continue it. Raises UserError for a bad message, for what
    the template refuses, and for tools or tool calls that it doesn't render.
    """
    conversation = check_messages(messages)
    end_mark = f"{secrets.token_hex(16)} "  # the space tells whether the template strips contents
    if unfinished:
        conversation[-1]["content"] = f"{conversation[-1]['content'] or ''}{end_mark}"
    _check_places(source, conversation, variables)
    mark = new_mark(source, json.dumps([conversation, variables.get("tools")], ensure_ascii=False, default=str))

    def theirs(value: Any) -> Any:
        return value if spellings is None else spellings.mark(value, mark)

    variables = dict(variables) | {key: theirs(variables[key]) for key in ("tools", "documents") if variables.get(key)}
    edge = f"<{secrets.token_hex(16)}>" if marks_generation(source) else None  # no text holds it by chance or by intent
    if edge is not None:
        variables[MARK] = edge
    text = _render_tool_calls(source, conversation, variables, theirs)
    parts, guards, ends = [], list[int](), [0]
    for part in [text] if edge is None else text.split(edge):
        plain, found = take_marks(part, mark)
        parts.append(plain)
        guards += [ends[-1] + position for position in found]
        ends.append(ends[-1] + len(plain))
    spans = None if edge is None else list(zip(ends[1:-1:2], ends[2::2], strict=False))
    whole = "".join(parts)
    if unfinished:
        whole = _up_to(whole, end_mark)
        spans = spans and [(begin, min(end, len(whole))) for begin, end in spans if begin < len(whole)]
    return Rendered(whole, spans, tuple(guard for guard in guards if guard < len(whole)))


def _up_to(text: str, end_mark: str) -> str:
    end = text.rfind(end_mark.strip())
    if end < 0:
        raise UserError("The last message cannot be continued: the chat template leaves its content out.")
    return text[:end] if text.startswith(end_mark, end) else text[:end].rstrip()


def _render_tool_calls(
    source: str, conversation: list[Message], variables: Mapping[str, Any], theirs: Callable[[Any], Any]
) -> str:
    """Render with the arguments of tool calls as the template takes them: as an object, else as a JSON string.

    The OpenAI API gives a string. Templates that write `arguments | tojson` would encode that twice, and those that
    write it as it is would print a dict as Python does. `theirs` marks what the messages hold.
    """

    def converted(convert: Callable[[Any], Any]) -> list[Message]:
        messages = [_with_arguments(message, convert) for message in conversation]
        return [{key: value if key == "role" else theirs(value) for key, value in item.items()} for item in messages]

    if not any(message.get("tool_calls") for message in conversation):
        return run(source, converted(lambda value: value), variables)
    objects, strings = converted(_as_object), converted(_as_string)
    try:
        text = _without_none(source, objects, variables)
    except UserError:
        if strings == objects:
            raise
        return _without_none(source, strings, variables)
    printed = {repr(call["arguments"]) for call in _calls(objects) if isinstance(call.get("arguments"), dict)} - {"{}"}
    return _without_none(source, strings, variables) if any(form in text for form in printed) else text


def _without_none(source: str, conversation: list[Message], variables: Mapping[str, Any]) -> str:
    """Render with a missing content as an empty one where the template would write it as "None"."""
    text = run(source, conversation, variables)
    if "None" not in text or all(message["content"] is not None for message in conversation):
        return text
    filled = [message | {"content": message["content"] or ""} for message in conversation]
    other = run(source, filled, variables)
    return other if other.count("None") < text.count("None") else text


def _check_places(source: str, conversation: list[Message], variables: Mapping[str, Any]) -> None:
    """Raises UserError for tools and tool calls that the template would drop silently."""
    code = COMMENT.sub("", source)
    if variables.get("tools") and not re.search(r"\btools\b", code):
        raise UserError(
            "The chat template has no place for tools; leave them out, or take a template that has (--template)."
        )
    for number, message in enumerate(conversation, 1):
        if message.get("tool_calls") and not re.search(r"\btool_calls\b", code):
            raise UserError(
                f"Message {number} calls tools, for which the chat template has no place; "
                "leave the calls out, or take a template that has (--template)."
            )


def _calls(conversation: list[Message]) -> list[dict[str, Any]]:
    """The {"name": ..., "arguments": ...} of every tool call."""
    calls = [call for message in conversation for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    """A copy of the message with the arguments of its tool calls converted."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    copy: Message = json.loads(json.dumps(message))
    for call in _calls([copy]):
        if "arguments" in call:
            call["arguments"] = convert(call["arguments"])
    return copy


def _as_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except ValueError:
        return value
    return decoded if isinstance(decoded, dict) else value


def _as_string(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
