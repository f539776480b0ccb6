"""The text contract of a checkpoint: tokenizer, BOS rule, chat template and stop list as one object.

Everything that turns text into ids or back goes through it, whatever the checkpoint's format, so that training, chat,
evaluation and every export agree. A BOS is never doubled; special tokens in a user's text can be kept as plain text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from puna.errors import UserError
from puna.tokenizer import hf_files, sentencepiece_model
from puna.tokenizer.bpe_patterns import PRE, patterns
from puna.tokenizer.builtin_templates import choose
from puna.tokenizer.conversation import Rendered, render_conversation
from puna.tokenizer.detokenizer import Detokenizer, IncrementalDetokenizer
from puna.tokenizer.gguf_fields import not_in_gguf, read_gguf, write_gguf
from puna.tokenizer.panics import panics_refused
from puna.tokenizer.spec import TokenizerSpec, flatten, probes, state, strips
from puna.tokenizer.special_tokens import SpecialSpellings, front
from puna.tokenizer.stop_tokens import end_of_answer, spelled_ends
from puna.tokenizer.tiktoken_bpe import read_tiktoken

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

ANSWER = "Highland-grass."  # an answer to render, to see which token the template writes after it
SURROGATE = "The text is not valid Unicode (it holds half of a surrogate pair); correct its source."


class Tokenizer:
    """Text to ids, messages to ids, ids to text. Make one with `load` or a `from_...` method."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        self._backend = spec.backend
        self._detokenizer = Detokenizer(spec.backend)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = map(self._id, (spec.bos, spec.eos, spec.unk, spec.pad))
        self.add_bos, self.add_eos = spec.add_bos, spec.add_eos
        self.template_name = spec.template_name if spec.templates else None
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[TokenizerSpec]]:
        """Pickles what was read alone: a pickled `_plain` would lose that it takes special tokens for plain text."""
        return type(self), (self._spec,)

    # Loading and saving

    @classmethod
    def load(cls, path: str | Path, *, template: str | None = None) -> Tokenizer:
        """Read a Hugging Face directory, a directory with `tokenizer.model` alone, or that file itself.

        `template`: a built-in chat template by name, or the path of a Jinja file; it replaces the checkpoint's own.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"There is no tokenizer at {path}.")
        tokenizer = cls(hf_files.read_directory(path) if path.is_dir() else hf_files.read_model(path))
        return tokenizer if template is None else tokenizer.with_template(template)

    @classmethod
    def from_spm(cls, path: str | Path) -> Tokenizer:
        """Read a SentencePiece `tokenizer.model` (LLaMA 1 and 2)."""
        return cls(sentencepiece_model.read_spm(path))

    @classmethod
    def from_tiktoken(cls, path: str | Path) -> Tokenizer:
        """Read a tiktoken `tokenizer.model` (Llama 3)."""
        return cls(read_tiktoken(path))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """Read the `tokenizer.*` metadata of a GGUF file, given as plain Python values by key."""
        return cls(read_gguf(fields))

    @classmethod
    def from_llama2c(cls, path: str | Path) -> Tokenizer:
        """Read llama2.c's `tokenizer.bin` or `tok512.bin`."""
        return cls(sentencepiece_model.read_llama2c(path))

    def with_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template: a built-in by name, or the path of a Jinja file."""
        spec = self._spec
        source = choose(template, add_bos=spec.add_bos)
        files = {name: data for name, data in spec.files.items() if not name.endswith(".jinja")}
        return Tokenizer(replace(spec, templates={"default": source}, template_name=template, files=files))

    def with_bos(self, add_bos: bool) -> Tokenizer:
        """The same tokenizer with BOS added by `encode` or not, regardless of the checkpoint."""
        if add_bos and self.bos_id is None:
            raise UserError("This checkpoint's tokenizer has no BOS to add; leave out add_bos.")
        return Tokenizer(replace(self._spec, add_bos=add_bos))

    def save(self, directory: str | Path) -> None:
        """Write Hugging Face files that transformers 4 and 5 read the same way. Loading and saving again is stable."""
        hf_files.write_directory(self._spec, Path(directory))

    def to_gguf(self) -> dict[str, Any]:
        """The `tokenizer.*` fields of a GGUF file. UserError names what llama.cpp would tokenise differently."""
        fields = write_gguf(self._spec)
        result = Tokenizer.from_gguf(fields)
        for index, token in sorted(self._backend.get_added_tokens_decoder().items()):
            if any(self.encode(text) != result.encode(text) for text in probes(token.content)):
                raise not_in_gguf(token, index)
        return fields

    @property
    def model_file(self) -> bytes | None:
        """The checkpoint's own `tokenizer.model`, which Meta's layout carries; None when it has none."""
        return self._spec.files.get("tokenizer.model")

    # Text to ids and back

    def encode(self, text: str, *, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of a text. `bos`: None adds BOS (and EOS) as the checkpoint does, True and False override BOS alone.

        The BOS is added only where the text doesn't start with it. With `special=False` special tokens spelled in
        the text, such as `<|eot_id|>`, are plain text.
        """
        ids = self.encode_offsets(text, special=special)[0]
        if bos and self.bos_id is None:
            raise UserError("A BOS was asked for, but this checkpoint's tokenizer has none.")
        if (self.add_bos if bos is None else bos) and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]  # type: ignore[list-item]
        if bos is None and self.add_eos and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]  # type: ignore[list-item]
        return ids

    def encode_offsets(
        self, text: str, *, special: bool = True, guards: Collection[int] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without BOS and EOS, and the [start, end) of each in characters of the text.

        A special token that spans one of `guards` (positions in the text) is plain text; see `render_chat`.
        """
        with self._refusals():
            if special and guards:
                ids, offsets = self._spellings.encode(text, guards)
            else:
                encoding = (self._backend if special else self._plain).encode(text, add_special_tokens=False)
                ids, offsets = encoding.ids, encoding.offsets
        if unused := self._spec.unused:
            pairs = [
                (new, span) for index, span in zip(ids, offsets, strict=True) for new in unused.get(index, [index])
            ]
            return [index for index, _ in pairs], [span for _, span in pairs]
        return ids, offsets

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many documents, without BOS, EOS and other special tokens; faster than one by one."""
        with self._refusals():
            encoded = [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        unused = self._spec.unused
        return [[i for index in ids for i in unused.get(index, [index])] for ids in encoded] if unused else encoded

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raises UserError for a text that is not Unicode, and for one that the library panics on."""
        try:
            with panics_refused(hush=self._hush):
                yield
        except (TypeError, UnicodeError) as error:
            raise UserError(SURROGATE) from error

    @cached_property
    def _hush(self) -> bool:
        """Whether the regular expressions are the checkpoint's own, so that they may fail on a text."""
        steps = flatten(self._backend.pre_tokenizer, "pretokenizers") + flatten(self._backend.normalizer, "normalizers")
        known = {expression for expressions in PRE.values() for expression in expressions}
        own = {step["pattern"]["Regex"] for step in steps if "Regex" in (step.get("pattern") or ())}
        return self._spec.source == "tokenizer.json" and not own <= known

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, after: Sequence[int] = ()) -> str:
        """Text of ids. Invalid UTF-8 becomes U+FFFD; ids without a token (padding rows) have no text.

        `after`: preceding ids, such as a prompt's; the result is the text that `ids` add to theirs.
        """
        return self._detokenizer.decode(ids, skip_special=skip_special, after=after)

    def stream(self, *, skip_special: bool = True, after: Sequence[int] = ()) -> IncrementalDetokenizer:
        """A streaming detokenizer. `after`: preceding ids, such as a prompt's."""
        return IncrementalDetokenizer(self._detokenizer, skip_special=skip_special, after=after)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token adds to a text, a leading space included; empty for ids without a token."""
        return self._detokenizer.table.get(index, b"")

    def token(self, index: int) -> str:
        """The vocabulary's own spelling of an id."""
        text = self._backend.id_to_token(index) if index >= 0 else None
        if text is None:
            raise UserError(f"There is no token with id {index}; the tokenizer has {self.vocab_size}.")
        return text

    def id(self, token: str) -> int | None:
        """The id of a token by the vocabulary's own spelling, None when there is none."""
        return self._id(token)

    @property
    def probes(self) -> list[str]:
        """Texts with every added token in the middle, beside a space, and at a line break, to compare tokenizers on."""
        added = self._backend.get_added_tokens_decoder()
        return [text for _, token in sorted(added.items()) for text in probes(token.content)]

    @cached_property
    def special_tokens(self) -> list[str]:
        """The spellings that `encode` takes for special tokens."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = front(self._backend)  # so that no call has to switch the first one's mode
        plain.add_tokens([token for _, token in sorted(self._backend.get_added_tokens_decoder().items())])
        plain.encode_special_tokens = True
        return plain

    # Conversations

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template in use, None when the checkpoint carries none and none was chosen."""
        return self._spec.templates.get("default")

    def render(self, messages: Sequence[Mapping[str, Any]], **kw: Any) -> str:
        """The text of a conversation by the chat template, as transformers' `apply_chat_template` gives it.

        Takes what `render_chat` takes. The text does not say which special tokens are the template's own: for ids, call
        `encode_chat`.
        """
        return self.render_chat(messages, special=True, **kw).text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        special: bool = False,
        **kw: Any,
    ) -> Rendered:
        """The text of a conversation with the spans of its answers and the guards for `encode_offsets`.

        messages: dicts with "role" and "content"; continue_final_message: end inside the last message, for the model to
        continue; tools: JSON schemas; special: whether special tokens that messages and tools spell count too; other
        keywords go to the template. UserError names what the template or the sandbox refused.
        """
        templates = self._spec.templates
        name = "tool_use" if tools and "tool_use" in templates else "default"
        if name not in templates:
            raise UserError(
                "This checkpoint carries no chat template; choose one of alpaca, chatml, llama2, llama3 or vicuna "
                "by `template`, the one that the model was trained with."
            )
        roles = {f"{role}_token": getattr(self._spec, role) for role in ("bos", "eos", "unk", "pad")}
        variables = {key: value for key, value in roles.items() if value is not None} | kw
        variables |= {"add_generation_prompt": add_generation_prompt and not continue_final_message, "tools": tools}
        spellings = None if special else self._spellings
        return render_conversation(templates[name], messages, variables, spellings, unfinished=continue_final_message)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kw: Any) -> list[int]:
        """Ids of a conversation: what the template renders and no more, so the BOS is the template's own.

        Takes what `render_chat` takes. Special tokens that messages and tools spell are plain text, unless `special`.
        """
        rendered = self.render_chat(messages, **kw)
        return self.encode_offsets(rendered.text, guards=rendered.guards)[0]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: the declared ones, those by spelling, and the template's own after an answer."""
        declared = [*self._spec.stops, *([] if self.eos_id is None else [self.eos_id])]
        ends = [*declared, *spelled_ends(self._backend)]
        if "default" in self._spec.templates:
            turns = [{"role": "user", "content": "Puna?"}, {"role": "assistant", "content": ANSWER}]
            with suppress(UserError):  # a template that wants other turns
                text = self.render(turns, add_generation_prompt=False)
                end = end_of_answer(text, ANSWER, self._backend.get_added_tokens_decoder())
                ends += [] if end in (None, self.bos_id) else [end]
        return tuple(dict.fromkeys(ends))

    @cached_property
    def _spellings(self) -> SpecialSpellings:
        return SpecialSpellings(self._backend)

    # Checks

    def fingerprint(self, *, template: bool = True) -> str:
        """sha256 over what decides ids and prompts: vocabulary, merges, splitting, special tokens, templates.

        `template=False` leaves templates and the stop list out: two that agree then give a text the same ids.
        """
        spec, model = self._spec, state(self._backend.model) or {}
        added = self._backend.get_added_tokens_decoder()
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
        facts: dict[str, Any] = {
            "vocab": self._backend.get_vocab(with_added_tokens=True),
            "merges": merges,
            "words": patterns(self._backend) or state(self._backend.pre_tokenizer),
            "normalizer": state(self._backend.normalizer),
            "added": [[index, token.content, token.special, *strips(token)] for index, token in sorted(added.items())],
            "ends": [self.bos_id, self.eos_id, self.unk_id, self.pad_id, self.add_bos, self.add_eos],
        }
        if spec.unused:
            facts["unused"] = sorted(spec.unused.items())
        if template:
            facts |= {"stops": sorted(self.stop_ids), "templates": spec.templates}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def check_fits(self, vocab_size: int) -> None:
        """Raises UserError when the tokenizer cannot belong to a model of `vocab_size` rows.

        Added tokens beyond the rows, such as the [PAD] of many fine-tunes, get a note on stderr, for only a text that
        holds them cannot be used.
        """
        beyond = sorted((index, text) for text, index in self._backend.get_vocab().items() if index >= vocab_size)
        if not beyond:
            return
        named = ", ".join(f"{text!r} ({index})" for index, text in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        added = self._backend.get_added_tokens_decoder()
        if not all(index in added for index, _ in beyond) or (self.add_bos and (self.bos_id or 0) >= vocab_size):
            raise UserError(
                f"The tokenizer has ids up to {self.vocab_size - 1} ({beyond[-1][1]!r}), "
                f"but the model's vocabulary has {vocab_size} rows; use the tokenizer that belongs to the model."
            )
        print(
            f"note: the tokenizer has {named} beyond the model's {vocab_size} rows; texts that hold it are refused.",
            file=sys.stderr,
        )
