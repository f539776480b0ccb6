"""Encoding of samples to token ids and labels. Answers are trained, each with its end token.

A conversation is rendered and tokenised once, as the model will see it. The answers are found as spans of the text and
mapped to tokens by their offsets. Tokenising the prompt alone to measure it could give other tokens at the boundary.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from puna.data.indexed_dataset import IGNORED
from puna.data.samples import Chat, Completion, Messages, Pair, RowError, Text
from puna.errors import UserError
from puna.tokenizer import Tokenizer

Ids = list[int]
READS_INPUT = re.compile(r"""\[\s*['"]input['"]\s*\]|\.input\b""")
# Keys of a message whose absence from a template loses nothing. tool_calls are checked by themselves.
HARMLESS = {"role", "content", "input", "train", "name", "tool_calls", "tool_call_id", "id"}
MARK_IT = "mark the answers by {% generation %} in a template of your own (--template FILE.jinja)"
SPELLED = "texts spell special tokens, which are encoded as plain text (--special-tokens recognises them)"


class MaskError(UserError):
    """The answers can't be located in the rendered conversation."""


class Answer(NamedTuple):
    """Characters `begin` to `end` of a rendered conversation, in which `content` replaces those of `cut` if given."""

    begin: int
    end: int
    cut: tuple[int, int] = (0, 0)
    content: str | None = None


@dataclass
class LabelEncoder:
    """Encodes samples to (ids, labels) with one tokenizer and chat template.

    loss: train "all" answers of a conversation, or the "last". append_eos: end documents with EOS. special_tokens:
    recognise special tokens that documents spell. values: variables for the template.
    """

    tokenizer: Tokenizer
    loss: Literal["all", "last"] = "all"
    append_eos: bool = True
    values: Mapping[str, Any] | None = None
    special_tokens: bool = False

    def texts(self, texts: Sequence[Text]) -> list[Ids]:
        """Ids of documents, with BOS as the checkpoint adds it and EOS at the end.

        Special tokens that a document spells are plain text, or with `special_tokens` recognised; a document that
        begins with BOS or ends with an end token then gets no second one.
        """
        before, after = self._ends(self.append_eos)
        if not self.special_tokens:
            return [[*before, *ids, *after] for ids in self.tokenizer.encode_plain([item.text for item in texts])]
        stops = tuple(map(self.tokenizer.token, self.tokenizer.stop_ids))
        encoded = []
        for item in texts:
            ids = self.tokenizer.encode(item.text, bos=False)
            ended = item.text.rstrip().endswith(stops)
            encoded.append([*(before if ids[:1] != before else []), *ids, *([] if ended else after)])
        return encoded

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

    def notes(self, content: Text | Chat | Completion | Pair) -> list[str]:
        """Notes on requests of a sample that are ignored, each phrased to follow a count."""
        match content:
            case Text():
                spelled = not self.special_tokens and self._special and self._special.search(content.text)
                return [SPELLED] if spelled else []
            case Completion():
                return []
            case Pair():
                return [*self.notes(content.chosen), *self.notes(content.rejected)]
        notes = []
        template = self.tokenizer.chat_template or ""
        for message in content.messages:
            notes += [f"messages have the key {key!r}, which the chat template does not read"
                      for key in message.keys() - HARMLESS if key not in template and message[key]]  # fmt: skip
            if message.get("train"):
                notes.append(f"{message['role']} messages ask to be trained, but only answers are")
        return sorted(notes)

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
        values = self.values or {}
        rendered = self.tokenizer.render_chat(messages, add_generation_prompt=False, tools=chat.tools, **values)
        text, marked = rendered.text, rendered.spans
        if rendered.guards:
            safe, naive = (self.tokenizer.encode_offsets(text, guards=guards)[0] for guards in (rendered.guards, ()))
            if safe != naive:
                raise RowError("a tool, a tool call or a name spells a special token")
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers[-1:] if chat.last or self.loss == "last" else answers
        wanted = [index for index in wanted if chat.messages[index].get("train", True)]
        if marked is None:
            text, spans = self._locate(text, messages, wanted, chat.tools)
        elif wanted == answers:
            spans = marked
        elif len(marked) == len(answers):
            spans = [span for span, index in zip(marked, answers, strict=True) if index in wanted]
        elif len(marked) == 1 and wanted == answers[-1:]:
            spans = marked
        else:
            raise MaskError(
                f"the template marks {len(marked)} spans in {len(answers)} answers, so single answers can't be "
                "located: mark each answer by one {% generation %}."
            )
        ids, starts = self._tokenize(text, [begin for begin, _ in spans])
        trained = self._tokens(ids, starts, spans)
        if not trained:
            raise RowError("no token to train on")
        labels = [IGNORED] * len(ids)
        for first, last in trained:
            labels[first:last] = ids[first:last]
        return ids, labels

    def _fit(self, messages: Messages) -> Messages:
        """The messages in the template's form: an "input" that it doesn't read is appended to the content."""
        template = self.tokenizer.chat_template or ""
        if "tool_calls" not in template and any(message.get("tool_calls") for message in messages):
            raise RowError("tool calls, which the chat template does not render")
        fitted = []
        for message in messages:
            for value in (message.get("content"), message.get("input")):
                if self._special and isinstance(value, str) and (match := self._special.search(value)):
                    raise RowError(f"the text holds the special token {match.group()}")
            message = {key: value for key, value in message.items() if key != "train"}
            if "input" in message and not READS_INPUT.search(template):
                message = {"role": "user", "content": f"{message['content']}\n{message['input']}"}
            fitted.append(message)
        return fitted

    def _locate(
        self, text: str, messages: Messages, wanted: list[int], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and [begin, end) of the wanted answers in it, for a template that marks none.

        An answer begins where the prompt for it ends and ends where the conversation up to it does. Where the template
        renders these differently, or leaves out a part of the answer, a sentinel in the answer's place locates it. The
        text is changed where an answer lost its beginning (its thoughts): a trained answer is trained whole.
        """
        if wanted[:1] == [0]:
            raise RowError("a conversation that begins with an answer")
        spans, pieces, done, shift = [], [], 0, 0
        for index in wanted:
            answer = self._answer(text, messages, index, tools)
            begin = answer.begin + shift
            if answer.content is not None:
                start, stop = answer.cut
                pieces += [text[done:start], answer.content]
                done, shift = stop, shift + len(answer.content) - (stop - start)
            spans.append((begin, answer.end + shift))
        return "".join([*pieces, text[done:]]), spans

    def _answer(self, text: str, messages: Messages, index: int, tools: list[dict[str, Any]] | None) -> Answer:
        def render(messages: Messages, prompt: bool = False) -> str:
            return self.tokenizer.render(messages, add_generation_prompt=prompt, tools=tools, **(self.values or {}))

        message = messages[index]
        content = message.get("content") or ""
        prompt = render(messages[:index], True)
        until = render(messages[: index + 1]) if index + 1 < len(messages) else text
        asked = text.startswith(prompt)
        if asked and text.startswith(until) and content.strip() in until[len(prompt) :]:
            return Answer(len(prompt), len(until))
        sentinel = secrets.token_hex(16)
        stand_in = {"role": "assistant", "content": sentinel} | ({} if message.get("tool_calls") else message)
        frame = render([*messages[:index], stand_in | {"content": sentinel}, *messages[index + 1 :]]).split(sentinel)
        if len(frame) == 2 and text.startswith(frame[0]) and text[len(frame[0]) :].endswith(frame[1]):
            cut = len(frame[0]), len(text) - len(frame[1])
            begin = len(prompt) if asked and len(prompt) <= cut[1] else cut[0]
            end = len(text) - len(frame[1].lstrip())  # the end token may follow after white space
            written, content = text[cut[0] : cut[1]].strip(), content.strip()
            lost = not message.get("tool_calls") and written != content and content.endswith(written)
            return Answer(begin, end, cut, content if lost else None)
        if asked and text.startswith(until):
            return Answer(len(prompt), len(until))
        if len(frame) == 2:
            cause = "writes other text around an answer depending on what the answer says"
        elif len(frame) == 1:
            cause = "leaves out or rewrites an answer of a conversation"
        else:
            cause = "writes an answer more than once"
        raise MaskError(f"the chat template {cause}, so that answers can't be told from prompts: {MARK_IT}.")

    def _tokenize(self, text: str, begins: list[int], special: bool = True) -> tuple[Ids, np.ndarray]:
        """Ids of a text in which answers begin at `begins`, and the character where each id starts, int64 [ids].

        Where one token would hold the end of a prompt and the beginning of its answer (`:D` in `Response:Dogs`), the
        text is split there, so that the prompt has the same ids as at inference.
        """
        ids, offsets = self.tokenizer.encode_offsets(text, special=special)
        starts, ends = np.array(offsets).reshape(-1, 2).T
        seams = [seam for seam in begins if (index := np.searchsorted(starts, seam)) and ends[index - 1] > seam]
        if not seams:
            return ids, starts
        for guard in ("", "\n"):  # SentencePiece begins every text with a space; behind a line break it adds none
            bounds = [(begin, end, guard if begin else "") for begin, end in pairwise([0, *seams, len(text)])]
            tokens = [
                (token, start + begin - len(before))
                for begin, end, before in bounds
                for token, (start, stop) in self._pairs(before + text[begin:end], special)
                if stop > len(before) or not before
            ]
            split = [token for token, _ in tokens]
            if self.tokenizer.decode(split, skip_special=False) == self.tokenizer.decode(ids, skip_special=False):
                return split, np.array([start for _, start in tokens])
        return ids, starts

    def _pairs(self, text: str, special: bool) -> Iterator[tuple[int, tuple[int, int]]]:
        return zip(*self.tokenizer.encode_offsets(text, special=special), strict=True)

    def _tokens(self, ids: Ids, starts: np.ndarray, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """[first, last) of the tokens that begin in each span, up to and including the end token."""
        stops, ranges = self.tokenizer.stop_ids, []
        for span in spans:
            first, last = (int(edge) for edge in np.searchsorted(starts, span))
            if first == last:
                continue
            # A template may mark the answer with its end token, with the line break behind it, or without.
            candidates = chain(reversed(range(first, last)), range(last, min(last + 1, len(ids))))
            end = next((index for index in candidates if ids[index] in stops), None)
            if end is None:
                raise MaskError(
                    "the chat template ends an answer with no end token that this tokenizer knows "
                    f"({', '.join(map(self.tokenizer.token, stops))}), so the model would not learn to stop: "
                    "choose a template that does (--template)."
                )
            ranges.append((first, end + 1))
        return ranges

    def _ends(self, eos: bool) -> tuple[Ids, Ids]:
        """The ids before and after a text without a chat template: BOS and EOS."""
        tokenizer = self.tokenizer
        before = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        after = [tokenizer.eos_id] if (eos or tokenizer.add_eos) and tokenizer.eos_id is not None else []
        return before, after

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Matches the spelling of any special token."""
        names = self.tokenizer.special_tokens
        return re.compile("|".join(map(re.escape, names))) if names else None
