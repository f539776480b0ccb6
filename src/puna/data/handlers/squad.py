"""SQuAD: a passage, a question and its first answer, in the prompt that MindFormers trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from puna.data.handlers.handler import Handler, require, require_objects, require_text
from puna.data.samples import Completion, Row, Sample
from puna.data.sources import BadRow

PROMPT = "Read the passage and answer the question below.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"


def squad(row: Row) -> list[Sample | BadRow]:
    samples: list[Sample | BadRow] = []
    for context, questions in _paragraphs(row):
        samples += [_sample(context, question) for question in questions]
    return samples


def squad_first(row: Row) -> list[Sample | BadRow]:
    require(row, "paragraphs")
    return [_sample(context, questions[0]) for context, questions in _paragraphs(row)]


def is_squad(rows: Sequence[Row]) -> bool:
    return "paragraphs" in rows[0] or rows[0].keys() >= {"context", "question", "answers"}


def _paragraphs(row: Row) -> list[tuple[str, list[Row]]]:
    """(passage, its questions) of an article of the original file, or of a row of the Hub's flat table."""
    if "paragraphs" not in row:
        return [(require_text(row, "context"), [row])]
    paragraphs = require_objects(row, "paragraphs")
    return [(require_text(paragraph, "context"), require_objects(paragraph, "qas")) for paragraph in paragraphs]


def _sample(context: str, question: Row) -> Sample | BadRow:
    answers = require(question, "answers")
    if isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers):
        answers = {"text": [answer.get("text") for answer in answers]}
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        return BadRow("a question without an answer")
    return Sample(Completion(PROMPT.format(context, require_text(question, "question")), texts[0]), key=context)


SQUAD = Handler(
    "squad",
    squad,
    "instruction",
    fields=("context", "question", "answers"),
    sample="a completion for each question of an article or of the Hub's flat rows",
    detect=is_squad,
    needs_template=False,
)
SQUAD_FIRST = replace(
    SQUAD,
    name="squad-first",
    convert=squad_first,
    fields=("paragraphs",),
    sample="a completion for the first question of each paragraph of an article",
    auto=False,
)
