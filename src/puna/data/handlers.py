"""What a row of a published dataset means: a document, a conversation, a prompt with its answer, or a preference pair.

A handler is a function from a row to samples. It knows field names and markers, no tokenizer and no template. A row
that it can't use raises `RowError` with a reason that is the same for all such rows, so that they can be counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from puna.data.records import TITLE
from puna.data.sources import Bad
from puna.errors import UserError, nearest

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """A document of running text."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation; `last`: only the last answer is trained, whatever the user chose."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    last: bool = False


@dataclass(frozen=True)
class Completion:
    """A prompt that is encoded as it stands, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in the last answer, the first of them preferred."""

    chosen: Chat
    rejected: Chat


@dataclass(frozen=True)
class Sample:
    """`key`: samples with the same key go to the same split."""

    content: Text | Chat | Completion | Pair
    key: str = ""


class RowError(Exception):
    """Why a row can't be used."""


class MissingField(RowError):
    pass


@dataclass(frozen=True)
class Handler:
    """`kind`: what it makes, "text", "instruction" or "preference". `article`: it wants WikiText's articles."""

    convert: Callable[[Row], list[Sample | Bad]]
    kind: str
    about: str
    article: bool = False


def text(row: Row, field: str = "text") -> list[Sample | Bad]:
    return [Sample(Text(_text(row, field)))]


def wikitext_clean(row: Row) -> list[Sample | Bad]:
    return [Sample(Text(detokenize(_text(row, "text"))))]


def alpaca(row: Row) -> list[Sample | Bad]:
    messages = _system(row)
    for question, answer in row.get("history") or []:
        messages += [_say("user", question), _say("assistant", answer)]
    request = _say("user", _text(row, "instruction"))
    if row.get("input"):
        request["input"] = _text(row, "input")
    return [_chat([*messages, request, _say("assistant", _text(row, "output"))])]


SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant"),
    "system": "system",
}


def sharegpt(row: Row) -> list[Sample | Bad]:
    turns = [_say(_speaker(turn), _text(turn, "value")) for turn in _turns(row, "conversations")]
    messages = _system(row)
    while turns and turns[0]["role"] == "system":
        messages.append(turns.pop(0))
    # As FastChat does: an export may begin in the middle, with an answer, or end with a question.
    if turns and turns[0]["role"] == "assistant":
        turns.pop(0)
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise RowError("no question with an answer")
    return [_chat([*messages, *turns])]


def openai(row: Row) -> list[Sample | Bad]:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise RowError("tools are not JSON") from None
    return [_chat(_messages(row, "messages"), tools=tools or None)]


def moss_turns_of(row: Row) -> list[Messages]:
    """(question, answer) of each turn, without MOSS's markers."""
    chat = _need(row, "chat")
    if not isinstance(chat, Mapping):
        raise RowError("chat is not an object of turns")
    found = []
    for name in sorted(chat, key=lambda name: int(re.sub(r"\D", "", name) or 0)):
        if turn := chat[name]:
            if not isinstance(turn, Mapping):
                raise RowError("a turn is not an object")
            asked = _text(turn, "Human").replace("<eoh>", "").replace("<|Human|>:", "").strip()
            said = _text(turn, "MOSS").replace("<eom>", "").replace("<|MOSS|>:", "").strip()
            found.append([_say("user", asked), _say("assistant", said)])
    if not found:
        raise RowError("no question with an answer")
    return found


def moss(row: Row) -> list[Sample | Bad]:
    return [_chat([message for turn in moss_turns_of(row) for message in turn])]


def moss_turns(row: Row) -> list[Sample | Bad]:
    turns = moss_turns_of(row)
    key = turns[0][0]["content"]
    ends = range(1, len(turns) + 1)
    return [_chat([message for turn in turns[:end] for message in turn], last=True, key=key) for end in ends]


def belle(row: Row) -> list[Sample | Bad]:
    parts = re.split(r"(?:^|\n)\s*(Human|Assistant):", _text(row, "instruction"))
    said = [(role, content.strip()) for role, content in zip(parts[1::2], parts[2::2], strict=True)]
    roles = [role for role, _ in said]
    if parts[0].strip() or not said or roles != ["Human", "Assistant"] * (len(said) // 2) or said[-1][1]:
        raise RowError("instruction is not Human: and Assistant: in turn, ending with Assistant:")
    said[-1] = ("Assistant", _text(row, "output").strip())
    return [_chat([_say("user" if role == "Human" else "assistant", content) for role, content in said])]


SQUAD = "Read the passage and answer the question below.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"


def squad(row: Row) -> list[Sample | Bad]:
    samples: list[Sample | Bad] = []
    for context, questions in _squad(row):
        samples += [_question(context, question) for question in questions]
    return samples


def squad_first(row: Row) -> list[Sample | Bad]:
    _need(row, "paragraphs")
    return [_question(context, questions[0]) for context, questions in _squad(row)]


def _squad(row: Row) -> list[tuple[str, list[Row]]]:
    """Paragraphs and their questions: an article of the original file, or a row of the Hub's flat table."""
    if "paragraphs" not in row:
        return [(_text(row, "context"), [row])]
    return [(_text(paragraph, "context"), _turns(paragraph, "qas")) for paragraph in _turns(row, "paragraphs")]


def _question(context: str, question: Row) -> Sample | Bad:
    answers = _need(question, "answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else [answer.get("text") for answer in answers]
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        return Bad("a question without an answer")
    return Sample(Completion(SQUAD.format(context, _text(question, "question")), texts[0]), key=context)


def leetcode(row: Row) -> list[Sample | Bad]:
    problem = _text(row, "code_with_problem").split("```", maxsplit=1)[0].strip()
    solution = _text(row, "code_only") + "\n" + _text(row, "explanation_only")
    return [_chat([_say("user", problem), _say("assistant", solution)])]


def preference(row: Row) -> list[Sample | Bad]:
    sides = [(_need(row, name), name) for name in ("chosen", "rejected")]
    before: Messages = _system(row)
    if isinstance(row.get("conversations"), list):
        before += [_say(_speaker(turn), _text(turn, "value")) for turn in row["conversations"]]
    elif isinstance(row.get("prompt"), list):
        before += _messages(row, "prompt")
    elif "instruction" in row:
        before.append(_say("user", _text(row, "instruction")))
        if row.get("input"):
            before[-1]["input"] = _text(row, "input")
    elif isinstance(row.get("prompt", row.get("question")), str) and not isinstance(row["chosen"], list):
        before.append(_say("user", row.get("prompt", row.get("question"))))
    pair = Pair(*(_conversation([*before, *_answer(side, name)], last=True) for side, name in sides))
    if min(len(pair.chosen.messages), len(pair.rejected.messages)) < 2:
        raise RowError("chosen and rejected come without a prompt")
    return [Sample(pair, key=json.dumps(pair.chosen.messages[:-1]))]


def _answer(side: Any, name: str) -> Messages:
    """The messages that one side of a preference adds."""
    if isinstance(side, list):
        return _messages({name: side}, name)
    if isinstance(side, Mapping):
        if "value" in side:
            return [_say(_speaker(side), _text(side, "value"))]
        return _messages({name: [side]}, name)
    if not isinstance(side, str):
        raise RowError(f"{name} is no text and no messages")
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", side)  # Anthropic's HH-RLHF holds the whole dialogue
    if len(parts) < 3 or parts[0].strip():
        return [_say("assistant", side)]
    said = zip(parts[1::2], parts[2::2], strict=True)
    return [_say("user" if role == "Human" else "assistant", content.strip()) for role, content in said]


HANDLERS = {
    "text": Handler(text, "text", "a document in the field text, or of a text file"),
    "wikitext": Handler(text, "text", "articles of WikiText, as they stand", article=True),
    "wikitext-clean": Handler(wikitext_clean, "text", "the same, its spaced punctuation undone", article=True),
    "alpaca": Handler(alpaca, "instruction", "instruction, input, output"),
    "sharegpt": Handler(sharegpt, "instruction", "conversations of {from, value}"),
    "vicuna": Handler(sharegpt, "instruction", "the same as sharegpt"),
    "openai": Handler(openai, "instruction", "messages of {role, content}"),
    "moss": Handler(moss, "instruction", "MOSS: chat.turn_k, all turns in one sample"),
    "moss-turns": Handler(moss_turns, "instruction", "MOSS: a sample for each turn, with all before it"),
    "belle": Handler(belle, "instruction", "BELLE multi-turn: Human: and Assistant: in the instruction"),
    "squad": Handler(squad, "instruction", "SQuAD: a sample for each question"),
    "squad-first": Handler(squad_first, "instruction", "SQuAD: the first question of each paragraph"),
    "leetcode": Handler(leetcode, "instruction", "code_with_problem, code_only, explanation_only"),
    "preference": Handler(preference, "preference", "chosen and rejected answers"),
}


def detect(rows: Sequence[Row]) -> str:
    """The name of the handler for the first rows of a source. UserError when their fields fit none, or several."""
    row = rows[0]
    first = next((str(row["text"]).strip() for row in rows if str(row.get("text") or "").strip()), "")
    if {"chosen", "rejected"} <= row.keys():
        return "preference"
    if isinstance(row.get("messages"), list):
        return "openai"
    if "conversations" in row:
        return "sharegpt"
    if isinstance(row.get("chat"), Mapping):
        return "moss"
    if "paragraphs" in row or {"context", "question", "answers"} <= row.keys():
        return "squad"
    if {"code_with_problem", "code_only"} <= row.keys():
        return "leetcode"
    if {"instruction", "output"} <= row.keys():
        dialogue = re.match(r"\s*Human:", str(row["instruction"])) and "Assistant:" in str(row["instruction"])
        return "belle" if dialogue else "alpaca"
    if "text" in row:
        return "wikitext" if TITLE.fullmatch(first.partition("\n")[0].strip()) else "text"
    raise UserError(
        f"no handler fits rows with the fields {', '.join(map(str, row))}: choose one by --handler "
        f"({', '.join(HANDLERS)}), or for running text name its field by --text-field"
    )


def choose(name: str, text_field: str = "text") -> Handler:
    """The handler with this name; UserError names the nearest. `text_field`: where `text` finds its documents."""
    if name not in HANDLERS:
        raise UserError(f"there is no handler {name!r}{nearest(name, HANDLERS)}; known are auto, {', '.join(HANDLERS)}")
    handler = HANDLERS[name]
    return replace(handler, convert=partial(text, field=text_field)) if name == "text" else handler


def detokenize(text: str) -> str:
    """WikiText's spaces around punctuation undone, by the rules of Megatron-LM's and MindFormers' clean_wikitext."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for spaced, close in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    ):
        text = text.replace(spaced, close)
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


def _chat(messages: Messages, *, key: str = "", **kw: Any) -> Sample:
    return Sample(_conversation(messages, **kw), key)


def _conversation(messages: Messages, **kw: Any) -> Chat:
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no answer to train on")
    return Chat(messages, **kw)


def _say(role: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, str):
        raise RowError("a message is not text")
    if not content.strip():
        raise RowError("an empty message")
    return {"role": role, "content": _whole(content)}


def _system(row: Row) -> Messages:
    return [_say("system", row["system"])] if row.get("system") else []


def _speaker(turn: Row) -> str:
    name = turn.get("from", turn.get("role"))
    if name not in SPEAKERS:
        raise RowError(f"a turn from {name!r}")
    return SPEAKERS[name]


def _messages(row: Row, name: str) -> Messages:
    messages = []
    for turn in _turns(row, name):
        # A table fills what a message doesn't have with null.
        message = {key: value for key, value in turn.items() if value is not None}
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(_text(part, "text") for part in _turns(message, "content"))
        if not message.get("tool_calls"):
            message |= _say(message.get("role", ""), _need(message, "content"))
        messages.append(message)
    return messages


def _turns(row: Row, name: str) -> list[Row]:
    turns = _need(row, name)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError(f"{name} is no list of objects")
    return turns


def _text(row: Row, name: str) -> str:
    value = _need(row, name)
    if not isinstance(value, str):
        raise RowError(f"{name} is not text")
    if not value.strip():
        raise RowError(f"an empty {name}")
    return _whole(value)


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair") from None
    return text


def _need(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise MissingField(f"no field {name!r}")
    return row[name]
