"""The Python API: `LLM` and `pipeline`.

>>> from puna import LLM, SamplingParams
>>> llm = LLM("smollm2-135m-instruct")
>>> llm.chat([{"role": "user", "content": "What is the capital of France?"}])[0].outputs[0].text
'The capital of France is Paris.'
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import index
from pathlib import Path
from typing import Any

from puna.engine.options import EngineOptions
from puna.engine.outputs import RequestOutput, SequenceUpdate, StepOutput
from puna.engine.sampling_params import SamplingParams
from puna.engine.sequence import Logprob
from puna.errors import UserError, nearest
from puna.loading import create_engine
from puna.progress import meter

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
LONG_TEXT = 1 << 20  # characters
Encoded = tuple[list[int], str | None]  # token ids, and the text where there is one


@dataclass(frozen=True)
class TextDelta:
    """New text and tokens of completion `index`. `finish_reason` is set in its last delta.

    text: final text; it never ends inside a character or in what may become a stop string. logprobs: of `token_ids`,
    None unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    index: int = 0
    stop_reason: int | str | None = None
    logprobs: list[Logprob] | None = None


@dataclass(frozen=True)
class Scored:
    """A text's tokens and their natural log-probabilities; the first has none, since nothing predicts it.

    error: why the text could not be scored; it has no log-probabilities then.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    error: str | None = None

    @property
    def total(self) -> float:
        """The log-probability of the whole text; NaN with an `error`."""
        return math.nan if self.error else sum(level for level in self.logprobs if level is not None)


@dataclass(slots=True)
class _Inbox:
    """What the engine computed for one caller, until that caller takes it: any thread's step fills it."""

    streams: bool = False  # wants updates
    updates: deque[SequenceUpdate] = field(default_factory=deque)
    finished: deque[RequestOutput] = field(default_factory=deque)


NOBODY = _Inbox(), None  # of dropped requests


class LLM:
    """A model ready to generate. Under torchrun it is split over the ranks: rank 0 runs the script, the others serve.

    options: the fields of `EngineOptions` by name. A LoRA `adapter` is merged into the weights as they are loaded, and
    runs as fast as the plain model. seed: makes requests without a seed of their own repeatable; None draws it from the
    operating system. All methods may be called from several threads at once; their requests share one batch. Raises
    UserError for whatever the user can put right. Close it, or use it as a context manager, to release other ranks.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prefix_caching: bool = True,
        seed: int | None = None,
        quiet: bool = True,
        **options: Any,
    ) -> None:
        known = [entry.name for entry in fields(EngineOptions)]
        for name in options:
            if name not in known:
                raise UserError(f"LLM has no option {name!r}{nearest(name, known)}.")
        given = EngineOptions(model=str(model), **options)
        self.engine = create_engine(given, prefix_caching=prefix_caching, seed=seed, quiet=quiet)
        self.model = self.engine.runner.model
        self.config, self.tokenizer, self.defaults = self.model.config, self.engine.tokenizer, self.engine.defaults
        weight = self.model.embed_tokens.weight
        self.dtype, self.device = weight.dtype, str(weight.device)
        self.max_model_len = self.engine.validator.max_model_len
        pool = self.engine.scheduler.pool
        self.kv_cache_tokens = pool.num_blocks * pool.block_size
        self._submitted = _Inbox()  # of requests whose output `step` returns
        self._unfinished: dict[str, tuple[_Inbox, str | None]] = {}  # by request id, with the text of the prompt
        self._changed = threading.Condition()  # guards `_unfinished` and `_stepping`; notified after each step
        self._stepping = False  # a thread is in the engine's step

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the other ranks. With one process there is nothing to release, and the model can still be used."""
        self.engine.stop()

    # One request at a time

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, id: str | None = None) -> str:
        """Queue a text, token ids or a conversation, and return the request's id. `step` returns its output."""
        _check_params(params)
        return self._submit(self.encode(prompt), params, self._submitted, id)

    def step(self) -> list[RequestOutput]:
        """Compute the next batch. Returns the submitted requests that have finished, or have been aborted."""
        self._advance(self._submitted)
        done = []
        while self._submitted.finished:
            done.append(self._submitted.finished.popleft())
        return done

    def abort(self, id: str) -> None:
        """End a request early; its output holds what it has. Unknown and finished ones are ignored."""
        self.engine.abort(id)

    @property
    def busy(self) -> int:
        """Requests that have not finished, or whose output `step` has yet to return."""
        return len(self._unfinished) + len(self._submitted.finished)

    def encode(self, prompt: Prompt, *, continue_final_message: bool = False) -> Encoded:
        """(token ids, text) of a text (by the BOS rule), of a conversation (by its template) or of ids (text None)."""
        self._check_prompt(prompt)
        if self.tokenizer is None or not (isinstance(prompt, str) or any(isinstance(part, Mapping) for part in prompt)):
            return [index(token) for token in prompt], None  # type: ignore[arg-type]
        if isinstance(prompt, str):
            self._check_size(prompt)
            return self.tokenizer.encode(prompt), prompt
        text = self.tokenizer.render(prompt, continue_final_message=continue_final_message)  # type: ignore[arg-type]
        self._check_size(text)
        return self.tokenizer.encode_chat(prompt, continue_final_message=continue_final_message), text  # type: ignore[arg-type]

    def _check_size(self, text: str) -> None:
        """Refuse a text too long for the context under any encoding, since encoding it may take minutes."""
        if self.tokenizer is None or len(text) <= LONG_TEXT:
            return
        longest = 1 + max(map(len, map(self.tokenizer.token_bytes, range(self.tokenizer.vocab_size))))  # and a space
        if len(text) > self.max_model_len * longest:
            raise UserError(
                f"The prompt has {len(text)} characters, more than the context of {self.max_model_len} tokens can hold;"
                " shorten it."
            )

    def _check_prompt(self, prompt: Prompt) -> None:
        """Raise UserError for what is not a prompt of this model at all."""
        texts = isinstance(prompt, str)
        try:
            if not texts and not (texts := any(isinstance(part, Mapping) for part in prompt)):
                for token in prompt:
                    index(token)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"A prompt is a text, a list of token ids (integers) or a conversation, not {prompt!r:.60}."
            ) from None
        if texts and self.tokenizer is None:
            raise UserError("This model has no tokenizer; give token ids.")

    def _params(self, params: SamplingParams | None, prompt_len: int) -> SamplingParams:
        """`params`, else the checkpoint's; a max_tokens of the checkpoint is cut to what context and cache leave."""
        params, wanted = params or self.defaults, self.defaults.max_tokens
        if wanted is None or params.max_tokens != wanted:
            return params
        left = min(self.max_model_len, self.kv_cache_tokens) - prompt_len
        return replace(params, max_tokens=min(wanted, max(1, left)))

    # Steps and the dispatch of their events

    def _submit(self, encoded: Encoded, params: SamplingParams | None, inbox: _Inbox, id: str | None = None) -> str:
        ids, text = encoded
        with self._changed:  # so that no step finishes the request before its inbox is known
            id = self.engine.add(ids, self._params(params, len(ids)), id=id)
            self._unfinished[id] = inbox, text
        return id

    def _advance(self, inbox: _Inbox) -> None:
        """Return when something came for `inbox`, or one step later: this thread's own, or another's in progress."""
        with self._changed:
            if inbox.updates or inbox.finished:
                return
            if self._stepping:
                self._changed.wait()
                return
            self._stepping = True
        out = StepOutput()
        try:
            out = self.engine.step()
        finally:
            with self._changed:
                self._stepping = False
                self._dispatch(out)
                self._changed.notify_all()

    def _dispatch(self, out: StepOutput) -> None:
        """Each event to the caller whose request it belongs to; those of dropped requests to nobody."""
        for update in out.updates:
            inbox, _ = self._unfinished.get(update.request_id, NOBODY)
            if inbox.streams:
                inbox.updates.append(update)
        for output in out.finished:
            inbox, output.prompt = self._unfinished.pop(output.id, NOBODY)
            if inbox is not NOBODY[0]:
                inbox.finished.append(output)

    def _drop(self, ids: Iterable[str]) -> None:
        """Abort requests whose caller has left."""
        for id in ids:
            with self._changed:
                unfinished = self._unfinished.pop(id, None)
            if unfinished is not None:
                self.engine.abort(id)

    # Many requests at once

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue every prompt (texts or token ids), in order. A request that is refused or fails has an `error`."""
        listed = _several(prompts)
        if any(isinstance(prompt, Mapping) for prompt in listed):
            raise UserError("generate takes texts and token ids; use chat for conversations.")
        return self._all(listed, params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        continue_final_message: bool = False,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the checkpoint's chat template.

        continue_final_message: continue the last message instead of answering it. A request that is refused or fails
        has an `error`.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise UserError(
                "chat takes a list of messages, each a dict with role and content, or a list of such lists."
            )
        if self.tokenizer is not None and self.tokenizer.chat_template is None:
            self.tokenizer.render([])  # raises the error that says so, once for all conversations
        one = bool(messages) and isinstance(messages[0], Mapping)
        return self._all([messages] if one else list(messages), params, progress, continue_final_message)

    def _all(
        self, prompts: list[Any], params: Any, progress: bool, continue_final_message: bool = False
    ) -> list[RequestOutput]:
        """Outputs in the order of the prompts. When the call is interrupted, all of its requests are dropped."""
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one, or as many.")
        for prompt, given in zip(prompts, each, strict=True):
            self._check_prompt(prompt)
            _check_params(given)
        inbox, outputs, positions = _Inbox(), list[RequestOutput](), dict[str, int]()
        try:
            for prompt, given in zip(prompts, each, strict=True):
                output = RequestOutput("", [], prompt if isinstance(prompt, str) else None)
                try:
                    encoded = self.encode(prompt, continue_final_message=continue_final_message)
                    output.prompt_token_ids, output.prompt = encoded
                    positions[self._submit(encoded, given, inbox)] = len(outputs)
                except UserError as error:
                    output.error = str(error)
                outputs.append(output)
            left = len(positions)
            with meter("Generating", len(outputs), "requests", quiet=not progress) as advance:
                advance(len(outputs) - left)
                while left:
                    self._advance(inbox)
                    while inbox.finished:
                        output = inbox.finished.popleft()
                        outputs[positions[output.id]] = output
                        left -= 1
                        advance(1)
        except BaseException:
            self._drop(positions)
            raise
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TextDelta, None, None]:
        """Streams text and tokens. Closing the iterator aborts the request. Beam search cannot stream."""
        self._check_prompt(prompt)
        _check_params(params)
        if (params or self.defaults).num_beams > 1:
            raise UserError("Beam search chooses at the end and cannot stream; use generate, or num_beams = 1.")
        inbox = _Inbox(streams=True)
        id = self._submit(self.encode(prompt), params, inbox)
        try:
            while True:
                over = bool(inbox.finished)  # looked at first: with the output there, no more updates come
                while inbox.updates:
                    new = inbox.updates.popleft()
                    yield TextDelta(
                        new.text, new.token_ids, new.finish_reason, new.index, new.stop_reason, new.logprobs
                    )
                if over:
                    break
                self._advance(inbox)
            if (error := inbox.finished[0].error) is not None:
                raise UserError(error)
        finally:
            self._drop([id])

    def score(
        self, texts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], *, progress: bool = False
    ) -> list[Scored]:
        """Log-probabilities (natural, of the raw model) of given texts or token ids, one or many, batched.

        A text that is refused or fails has an `error`.
        """
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        scored = []
        for text, out in zip(listed := _several(texts), self._all(listed, params, progress), strict=True):
            if not text and not out.prompt_token_ids:  # a tokenizer without BOS makes no token of it
                scored.append(Scored([], []))
            elif out.error is not None:
                scored.append(Scored(out.prompt_token_ids, [], out.error))
            else:
                scored.append(
                    Scored(out.prompt_token_ids, [None, *(level for _, level, _ in out.prompt_logprobs or [])])
                )
        return scored


def _check_params(params: object) -> None:
    if not isinstance(params, SamplingParams | None):
        raise UserError(f"Sampling parameters are given as SamplingParams(...), not as a {type(params).__name__}.")


def _several(prompts: Any) -> list[Any]:
    """One text, or one prompt's token ids, as a list of one; a list of either as it is."""
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, str | Sequence):
        raise UserError(f"Give a text, token ids, or a list of either, not {type(prompts).__name__}.")
    one = isinstance(prompts, str) or (bool(prompts) and all(isinstance(part, int) for part in prompts))
    return [prompts] if one else list(prompts)


def pipeline(task: str, model: str | Path | LLM, **loading: Any) -> Callable[..., Any]:
    """A callable as transformers' `pipeline("text-generation", model)` gives it: [{"generated_text": ...}] a prompt.

    Calls take a text or a conversation, or a list of either, and sampling parameters by name (`max_new_tokens` and
    `do_sample` too); `return_full_text=False` leaves the prompt out.
    """
    if task.replace("_", "-") != "text-generation":
        raise UserError(f"There is no pipeline {task!r}{nearest(task, ['text-generation'])}; puna has text-generation.")
    llm = model if isinstance(model, LLM) else LLM(model, **loading)

    def call(prompts: Any, *, return_full_text: bool = True, **sampling: Any) -> Any:
        if "max_new_tokens" in sampling:
            sampling["max_tokens"] = sampling.pop("max_new_tokens")
        if "num_return_sequences" in sampling:
            sampling["n"] = sampling.pop("num_return_sequences")
        if "do_sample" in sampling:
            default = llm.defaults.temperature or 1.0
            sampling["temperature"] = sampling.get("temperature", default) if sampling.pop("do_sample") else 0.0
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
        listed = [prompts] if one else list(prompts)
        params = llm.defaults.merged(sampling) if sampling else None
        results = []
        for prompt, out in zip(listed, llm._all(listed, params, False), strict=True):
            if out.error:
                raise UserError(out.error)
            results.append([{"generated_text": _joined(prompt, c.text, return_full_text)} for c in out.outputs])
        return results[0] if one else results

    return call


def _joined(prompt: Any, text: str, full: bool) -> Any:
    if not full:
        return text
    return prompt + text if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": text}]
