"""The messages of a row, normalised to {"role", "content"}.

Every handler reads conversations through here, so that a spelling is understood in all formats or in none. Roles and
shapes are those that ShareGPT, LLaMA-Factory, axolotl, TRL, OASST and the OpenAI API write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from puna.data.handlers.handler import require, require_objects, require_text, valid_unicode
from puna.data.samples import Chat, Messages, MissingField, Row, RowError, Sample

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response"), "tool"),
    **{role: role for role in ("system", "developer", "function", "ipython")},
}
CALLS = ("function_call", "tool_call")  # LLaMA-Factory's roles for an answer that calls tools
# Whether a message is trained: OpenAI and Mistral "weight", axolotl "train" and "training", ms-swift and XTuner "loss"
TRAIN_FLAGS = ("weight", "train", "training", "loss")
PARTIAL_FLAGS = ("train_detail", "training_detail")  # axolotl's spans within a message
KEPT = ("name", "tool_calls", "tool_call_id")  # further keys of a {from, value} message that a template may read


def message(role: str, content: Any) -> dict[str, Any]:
    """A message with text; RowError for another content and for an empty one."""
    if not isinstance(content, str):
        raise RowError(f"a {role} message that is not text")
    if not content.strip():
        raise RowError(f"an empty {role} message")
    return {"role": role, "content": valid_unicode(content)}


def system_of(row: Row) -> Messages:
    """The system message in a field of the row, if there is one."""
    return [message("system", row["system"])] if row.get("system") else []


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The JSON schemas in `tools`, which may be a JSON string."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise RowError("tools that are not JSON") from None
    return tools or None


def has_messages(row: Row, name: str) -> bool:
    """Whether a field holds messages: a list, or the JSON text of a list of objects."""
    return isinstance(_decoded(row.get(name)), list)


def messages_of(row: Row, name: str) -> Messages:
    """The messages in a field: a list of them, one alone, or their JSON text. Empty system messages are left out.

    Raises RowError for an unknown role, an empty message, and a flag that puna can't follow.
    """
    value = _decoded(require(row, name))
    turns = [value] if isinstance(value, Mapping) else require_objects({name: value}, name)
    messages = []
    for turn in turns:
        read = _message(turn)
        empty = not str(read.get("content", "")).strip() and not read.get("tool_calls")
        if not (empty and read["role"] in ("system", "developer")):
            messages.append(read)
    return messages


def conversation(messages: Messages, **kw: Any) -> Chat:
    """A conversation; RowError when it holds no answer to train on."""
    if not any(entry["role"] == "assistant" and entry.get("train", True) for entry in messages):
        raise RowError("no answer to train on")
    return Chat(messages, **kw)


def chat(messages: Messages, *, key: str = "", **kw: Any) -> Sample:
    return Sample(conversation(messages, **kw), key)


def _decoded(value: Any) -> Any:
    """The list of objects that a JSON text holds, any other value unchanged: a prompt may begin with a bracket too."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(decoded, list) and decoded and all(isinstance(entry, dict) for entry in decoded):
            return decoded
    return value


def _message(turn: Row) -> dict[str, Any]:
    """{role, content} of a turn, with what else a template may read and "train" where the turn decides it."""
    given = {key: value for key, value in turn.items() if value is not None}  # a table fills absent keys with null
    name = given.pop("role", None) or given.pop("from", None)
    if name is None:
        raise MissingField("no field 'role' or 'from'")
    spelled = str(name).strip().lower()
    flag = _flag(given)
    field = "content" if "content" in given or ("role" in turn and "value" not in given) else "value"
    read: dict[str, Any]
    if spelled in CALLS:
        read = {"role": "assistant", "tool_calls": _calls(require_text(given, field))}
    elif spelled not in ROLES:
        raise RowError(f"the unknown role {str(name)[:40]!r}")
    else:
        role = ROLES[spelled]
        content = given.pop(field, None)
        if field == "value":
            given = {key: given[key] for key in KEPT if key in given}
        if function := given.pop("function_call", None):  # the OpenAI API before it had tool_calls
            given["tool_calls"] = [{"type": "function", "function": function}]
        if isinstance(content, list):
            content = "\n".join(_part(part) for part in require_objects({field: content}, field))
        calls = given.get("tool_calls")
        if content is None and not calls:
            raise MissingField(f"no field {field!r}")
        silent = calls or (role in ("system", "developer") and isinstance(content, str) and not content.strip())
        if not silent:
            content = message(role, content)["content"]
        read = {"role": role} | ({} if content is None else {"content": content}) | given
    if flag is not None and flag != (read["role"] == "assistant"):
        read["train"] = flag
    return read


def _part(part: Row) -> str:
    if not isinstance(part.get("text"), str):
        raise RowError("a part of a message that is not text")
    return valid_unicode(part["text"])


def _flag(turn: dict[str, Any]) -> bool | None:
    """Whether the turn is marked as trained, None without a mark. Removes the keys from the turn."""
    for key in PARTIAL_FLAGS:
        if turn.pop(key, None):
            raise RowError(f"{key}, which trains parts of a message")
    flags: dict[str, Any] = {key: turn.pop(key) for key in TRAIN_FLAGS if key in turn}
    if "masked" in turn:  # torchtune's opposite
        masked = turn.pop("masked")
        flags["masked"] = int(not masked) if masked in (0, 1) else masked
    for key, value in flags.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowError(f"a {key} of {str(value)[:40]}, where an answer is trained (1) or not (0)")
    return all(flags.values()) if flags else None


def _calls(text: str) -> list[dict[str, Any]]:
    """The tool calls in a turn of LLaMA-Factory's role function_call: JSON of one {name, arguments} or of a list."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError("a function_call that is not JSON with a name")
    return [{"type": "function", "function": call} for call in calls]
