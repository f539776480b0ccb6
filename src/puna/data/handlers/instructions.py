"""Instructions with one answer a row: Alpaca, BELLE, LeetCode."""

from __future__ import annotations

import re
from collections.abc import Sequence

from puna.data.handlers.handler import Handler, require_text
from puna.data.handlers.messages import chat, message, system_of
from puna.data.samples import Row, RowError, Sample
from puna.data.sources import BadRow


def alpaca(row: Row) -> list[Sample | BadRow]:
    messages = system_of(row)
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("a history that is not pairs of question and answer")
        messages += [message("user", pair[0]), message("assistant", pair[1])]
    request = message("user", require_text(row, "instruction"))
    if row.get("input"):
        request["input"] = require_text(row, "input")
    return [chat([*messages, request, message("assistant", require_text(row, "output"))])]


def belle(row: Row) -> list[Sample | BadRow]:
    parts = re.split(r"(?:^|\n)\s*(Human|Assistant):", require_text(row, "instruction"))
    turns = [(role, content.strip()) for role, content in zip(parts[1::2], parts[2::2], strict=True)]
    roles = [role for role, _ in turns]
    if parts[0].strip() or not turns or roles != ["Human", "Assistant"] * (len(turns) // 2) or turns[-1][1]:
        raise RowError("an instruction that is not Human: and Assistant: in turn, ending with Assistant:")
    turns[-1] = ("Assistant", require_text(row, "output").strip())
    return [chat([message("user" if role == "Human" else "assistant", content) for role, content in turns])]


def is_belle(rows: Sequence[Row]) -> bool:
    row = rows[0]
    if "instruction" not in row or "output" not in row:
        return False
    return bool(re.match(r"\s*Human:", str(row["instruction"]))) and "Assistant:" in str(row["instruction"])


def leetcode(row: Row) -> list[Sample | BadRow]:
    problem = require_text(row, "code_with_problem").split("```", maxsplit=1)[0].strip()
    solution = require_text(row, "code_only") + "\n" + require_text(row, "explanation_only")
    return [chat([message("user", problem), message("assistant", solution)])]


ALPACA = Handler(
    "alpaca",
    alpaca,
    "instruction",
    fields=("instruction", "output"),
    optional=("input", "system", "history"),
    sample="a conversation; with `--template alpaca` the two published prompts",
)
BELLE = Handler(
    "belle",
    belle,
    "instruction",
    fields=("instruction", "output"),
    sample="a conversation; the instruction holds `Human:` and `Assistant:` in turn",
    detect=is_belle,
)
LEETCODE = Handler(
    "leetcode",
    leetcode,
    "instruction",
    fields=("code_with_problem", "code_only", "explanation_only"),
    sample="the problem, then solution and explanation",
)
