"""From samples to token ids and labels: what is trained, and that it ends with the template's end token.

A conversation is rendered and tokenised once, as the model will see it. The answers are found as spans of the text and
cut out of the tokens by their offsets. Tokenising the prompt again to measure it would give other tokens at the seam.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np

from puna.data.handlers import Chat, Completion, Messages, Pair, RowError, Text
from puna.data.indexed_dataset import IGNORED
from puna.errors import UserError
from puna.tokenizer import Tokenizer

Ids = list[int]
READS_INPUT = re.compile(r"""\[\s*['"]input['"]\s*\]|\.input\b""")


class MaskError(UserError):
    """The template doesn't let the answers be told from the rest."""


@dataclass
class LabelEncoder:
    """Samples to (ids, labels) under one tokenizer and template.

    loss: train "all" answers of a conversation, or the "last". append_eos: end documents with EOS. values: variables
    for the template.
    """

    tokenizer: Tokenizer
    loss: Literal["all", "last"] = "all"
    append_eos: bool = True
    values: Mapping[str, Any] | None = None

    def texts(self, texts: Sequence[Text]) -> list[Ids]:
        """Ids of documents: BOS as the checkpoint does, EOS at the end. Special tokens in them are plain text."""
        before, after = self._ends(self.append_eos)
        return [[*before, *ids, *after] for ids in self.tokenizer.encode_plain([item.text for item in texts])]

    def encode(self, content: Chat | Completion | Pair) -> list[tuple[Ids, Ids]]:
        """(ids, labels) of a sample: one, or chosen and rejected of a pair.

        Raises RowError for a sample that can't be used, MaskError where no sample can.
        """
        try:
            match content:
                case Pair():
                    return [self._chat(content.chosen), self._chat(content.rejected)]
                case Chat():
                    return [self._chat(content)]
                case Completion():
                    return [self._completion(content)]
        except MaskError:
            raise
        except UserError as error:  # what template or tokenizer refuse, such as roles that don't alternate
            raise RowError(str(error).rstrip(".")) from error

    def _completion(self, content: Completion) -> tuple[Ids, Ids]:
        begin = len(content.prompt)
        ids, starts = self._tokenize(content.prompt + content.answer, [begin], special=False)
        prompt = int(np.searchsorted(starts, begin))
        before, after = self._ends(True)
        if prompt == len(ids):
            raise RowError("no token to train on")
        return [*before, *ids, *after], [IGNORED] * (len(before) + prompt) + [*ids[prompt:], *after]

    def _chat(self, chat: Chat) -> tuple[Ids, Ids]:
        messages = self._fit(chat.messages)
        text, spans = self.tokenizer.render_spans(messages, tools=chat.tools, **(self.values or {}))
        if spans is None:
            spans = self._differences(text, messages, chat)
        answers = sum(message["role"] == "assistant" for message in messages)
        if chat.last or self.loss == "last":
            if len(spans) not in (1, answers):
                raise MaskError(
                    f"the template marks {len(spans)} spans in {answers} answers, so the last can't be told"
                )
            spans = spans[-1:]
        ids, starts = self._tokenize(text, [begin for begin, _ in spans])
        trained = self._tokens(ids, starts, spans)
        if not trained:
            raise RowError("no token to train on")
        labels = [IGNORED] * len(ids)
        for first, last in trained:
            labels[first:last] = ids[first:last]
        return ids, labels

    def _fit(self, messages: Messages) -> Messages:
        """The messages as the template takes them. An "input" it doesn't know follows the content on its own line."""
        if self._forged is not None:
            for message in messages:
                for part in (message.get("content"), message.get("input")):
                    if isinstance(part, str) and (found := self._forged.search(part)):
                        raise RowError(f"the text holds the special token {found.group()}")
        template = self.tokenizer.chat_template or ""
        if "tool_calls" not in template and any(message.get("tool_calls") for message in messages):
            raise RowError("the chat template knows no tool calls")
        if READS_INPUT.search(template):
            return messages
        return [
            {"role": "user", "content": f"{message['content']}\n{message['input']}"} if "input" in message else message
            for message in messages
        ]

    def _differences(self, text: str, messages: Messages, chat: Chat) -> list[tuple[int, int]]:
        """Spans of the answers: from the end of the prompt for each to the end of the conversation with it."""

        def end(count: int, prompt: bool) -> int:
            part = self.tokenizer.render(
                messages[:count], add_generation_prompt=prompt, tools=chat.tools, **(self.values or {})
            )
            if not text.startswith(part):
                raise MaskError(
                    "the chat template writes the beginning of a conversation in another way once it goes on, so "
                    "answers can't be told from prompts: mark them by {% generation %} in a template of your own "
                    "(--template FILE.jinja)"
                )
            return len(part)

        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if answers[0] == 0:
            raise RowError("the conversation begins with an answer")
        wanted = answers[-1:] if chat.last or self.loss == "last" else answers
        return [(end(at, True), end(at + 1, False) if at + 1 < len(messages) else len(text)) for at in wanted]

    def _tokenize(self, text: str, begins: list[int], special: bool = True) -> tuple[Ids, np.ndarray]:
        """Ids of a text in which answers begin at `begins`, and where each of them starts in it.

        Where one token would hold the end of a prompt and the beginning of its answer (`:D` in `Response:Dogs`), the
        text is cut there, so that the prompt has the ids that it will have when the model is asked.
        """
        ids, offsets = self.tokenizer.encode_offsets(text, special=special)
        starts, ends = np.array(offsets).reshape(-1, 2).T
        seams = [seam for seam in begins if (at := np.searchsorted(starts, seam)) and ends[at - 1] > seam]
        if not seams:
            return ids, starts
        for guard in ("", "\n"):  # SentencePiece begins every text with a space; behind a line break it adds none
            parts = [(begin, end, guard if begin else "") for begin, end in pairwise([0, *seams, len(text)])]
            found = [
                (index, start + begin - len(before))
                for begin, end, before in parts
                for index, (start, stop) in self._pairs(before + text[begin:end], special)
                if stop > len(before) or not before
            ]
            cut = [index for index, _ in found]
            if self.tokenizer.decode(cut, skip_special=False) == self.tokenizer.decode(ids, skip_special=False):
                return cut, np.array([start for _, start in found])
        return ids, starts

    def _pairs(self, text: str, special: bool) -> Iterator[tuple[int, tuple[int, int]]]:
        return zip(*self.tokenizer.encode_offsets(text, special=special), strict=True)

    def _tokens(self, ids: Ids, starts: np.ndarray, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """[first, last) of the tokens that begin in each span, up to and with the end token."""
        stops, found = self.tokenizer.stop_ids, []
        for span in spans:
            first, last = (int(edge) for edge in np.searchsorted(starts, span))
            if first == last:
                continue
            # A template may mark the answer with its end token, with the line break behind it, or without.
            places = chain(reversed(range(first, last)), range(last, min(last + 1, len(ids))))
            end = next((at for at in places if ids[at] in stops), None)
            if end is None:
                raise MaskError(
                    "the chat template ends an answer with no end token that this tokenizer knows "
                    f"({', '.join(map(self.tokenizer.token, stops))}), so the model would not learn to stop: "
                    "take a template that does (--template)"
                )
            found.append((first, end + 1))
        return found

    def _ends(self, eos: bool) -> tuple[Ids, Ids]:
        """The BOS and the EOS that belong to a text by itself."""
        tokenizer = self.tokenizer
        before = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        after = [tokenizer.eos_id] if (eos or tokenizer.add_eos) and tokenizer.eos_id is not None else []
        return before, after

    @cached_property
    def _forged(self) -> re.Pattern[str] | None:
        names = self.tokenizer.special_tokens
        return re.compile("|".join(map(re.escape, names))) if names else None
