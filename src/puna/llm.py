"""What a Python user holds: `LLM`, `load`, `pipeline`.

>>> from puna import LLM, SamplingParams
>>> llm = LLM("smollm2-135m-instruct")
>>> llm.chat([{"role": "user", "content": "What is the capital of France?"}])[0].outputs[0].text
'The capital of France is Paris.'
"""

from __future__ import annotations

import atexit
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch

from puna.engine.block_pool import BlockPool
from puna.engine.engine import Engine
from puna.engine.kv_cache import cache_blocks
from puna.engine.outputs import RequestOutput
from puna.engine.runner import BLOCK_SIZE, make_runner
from puna.engine.sampling_params import SamplingParams
from puna.engine.validation import RequestValidator
from puna.errors import UserError, nearest
from puna.model.config import ModelConfig, end_ids
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.model_loader import DTYPES, load_model, random_model
from puna.parallel.memory import free_bytes
from puna.parallel.process_group import choose_device
from puna.parallel.tp_inference import TensorParallel
from puna.progress import meter
from puna.tokenizer import Tokenizer
from puna.weights.adapter import read_adapter
from puna.weights.checkpoint import Checkpoint
from puna.weights.merge import merge, replaced
from puna.weights.open import open_checkpoint

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
Box = dict[str, RequestOutput]  # finished requests by id


@dataclass(frozen=True)
class TextDelta:
    """What came since the last one: text and tokens of one completion; `finish_reason` on its last piece."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Scored:
    """A text's tokens and their log-probabilities; the first has none, since nothing predicts it."""

    token_ids: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        return sum(level for level in self.logprobs if level is not None)


def choose_dtype(dtype: str | torch.dtype, source: Checkpoint | None) -> torch.dtype:
    """`auto` is the checkpoint's own; bfloat16 for quantised and random weights."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        lossy = source is None or source.details.get("quantised")
        stored = "bfloat16" if source is None or lossy else source.hf_config.get("torch_dtype")
        dtype = stored if stored in DTYPES else "float32"
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}{nearest(dtype, DTYPES)}; use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load(
    ref: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> tuple[Llama, Tokenizer]:
    """The plain model (nothing fused, `adapter` unmerged) and tokenizer of a checkpoint, to call or to take apart."""
    with open_checkpoint(ref, revision=revision) as source:
        lora = read_adapter(adapter) if adapter is not None else None
        tokenizer = (replaced(source, lora) if lora else source).tokenizer()
        if tokenizer is None:
            raise UserError(f"{ref} carries no tokenizer; put the model's tokenizer files beside the weights.")
        return load_model(source, choose_dtype(dtype, source), choose_device(device), adapter=lora), tokenizer


class LLM:
    """A model ready to generate. Under torchrun it is split over the ranks: rank 0 runs the script, the others serve.

    A LoRA `adapter` (a directory in peft's layout) is merged into the weights as they are loaded, and runs as fast as
    the plain model. Raises UserError for whatever the user can put right. Close it, or use it as a context manager,
    when ranks are many.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        weights: str = "auto",
        adapter: str | Path | None = None,
        quantization: str | None = None,
        template: str | None = None,
        max_model_len: int | None = None,
        kv_tokens: int | None = None,
        max_batch_tokens: int = 2048,
        max_num_seqs: int = 256,
        prefix_caching: bool = True,
        seed: int = 0,
        quiet: bool = True,
    ) -> None:
        tp = TensorParallel.start(device)
        agree = tp.raise_together if tp else nullcontext  # a UserError of any rank comes out once, on rank 0
        with agree():
            where = choose_device(device)
            available = free_bytes(where)  # of all ranks, before one of them begins to load
        build: Any = {"tp": tp, "quantization": quantization, "available": available, "fast": True, "quiet": quiet}
        with agree():
            generation: dict[str, Any] = {}
            stop_ids: tuple[int, ...] = ()
            if weights == "random" and adapter is not None:
                raise UserError("an adapter belongs to a model's own weights; leave it out, or weights=random.")
            if weights == "random" and str(model) in PRESETS:
                self.config, self.tokenizer, kind = PRESETS[str(model)], None, choose_dtype(dtype, None)
                self.model = random_model(self.config, kind, where, seed=seed, **build)
            elif weights in ("auto", "random"):
                with _open(model, revision, weights) as source:
                    if adapter is not None:
                        source = merge(source, read_adapter(adapter))
                    kind = choose_dtype(dtype, source)
                    self.config, generation = source.config, source.generation
                    stop_ids = _stop_ids(source)
                    self.tokenizer = source.tokenizer()
                    if self.tokenizer is not None:
                        self.tokenizer.check_fits(self.config.vocab_size)
                        stop_ids = self.tokenizer.stop_ids
                        if template is not None:
                            self.tokenizer = self.tokenizer.with_template(template)
                    if weights == "random":
                        self.model = random_model(self.config, kind, where, seed=seed, **build)
                    else:
                        self.model = load_model(source, kind, where, **build)
            else:
                raise UserError(f"weights must be auto or random, not {weights!r}.")
            self.defaults = SamplingParams.from_generation_config(generation)
            self.dtype, self.device = kind, where
            self.max_model_len = _context(self.config, max_model_len)
            self.model.fix_rope(self.max_model_len)
        with agree():
            blocks = cache_blocks(self.model, BLOCK_SIZE, self.max_model_len, max_num_seqs, kv_tokens, tp)
        self.kv_tokens = blocks * BLOCK_SIZE
        limits = RequestValidator(self.config.vocab_size, self.max_model_len, max_batch_tokens, max_num_seqs)
        self.engine = Engine(
            make_runner(self.model, blocks, BLOCK_SIZE),
            BlockPool(blocks, BLOCK_SIZE, prefix_caching=prefix_caching),
            limits,
            self.tokenizer,
            stop_ids=stop_ids,
            seed=seed,
            share=tp.broadcast_object if tp else None,
            is_driver=tp is None or tp.rank == 0,
        )
        self._prompts: dict[str, str] = {}  # texts of unfinished requests
        self._ended: Box = {}  # what `step` is to give
        self._boxes: dict[str, Box] = {}  # where the output of an unfinished request goes instead
        self._tp = tp
        if tp is not None:
            if tp.rank > 0:
                tp.serve(self.engine.run_worker)
            atexit.register(self.close)  # a script that ends without closing must not leave ranks waiting

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the other ranks. With one process there is nothing to release, and the model can still be used."""
        if self._tp is not None and not self._tp.broken:
            self.engine.stop()
        self._tp = None

    # One request at a time

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, id: str | None = None, stream: bool = False
    ) -> str:
        """Queue a text, token ids or a conversation, and give the request's id."""
        if not isinstance(params, SamplingParams | None):
            raise UserError(f"sampling parameters are given as SamplingParams(...), not as a {type(params).__name__}.")
        ids, text = self.encode(prompt)
        id = self.engine.add(ids, self._default(params, len(ids)), id=id, stream=stream)
        if text is not None:
            self._prompts[id] = text
        return id

    def step(self) -> list[RequestOutput]:
        """Compute the next batch; gives the submitted requests that have ended."""
        self._advance()
        done = list(self._ended.values())
        self._ended.clear()
        return done

    def _advance(self) -> None:
        """A step of the engine. Several callers may take turns in this: each output goes to whose request it was."""
        try:
            done = self.engine.step()
        except BaseException:
            if self._tp is not None:
                self._tp.broken = True
            raise
        for out in done:
            out.prompt = self._prompts.pop(out.id, None)
            self._boxes.pop(out.id, self._ended)[out.id] = out

    def abort(self, id: str) -> None:
        self.engine.abort(id)

    @property
    def busy(self) -> int:
        """Requests that have not finished, or whose output `step` has yet to give."""
        return self.engine.busy + len(self._ended)

    def encode(self, prompt: Prompt) -> tuple[list[int], str | None]:
        """Token ids, and the text, of a text (by the BOS rule), of a conversation (by its template) or of ids."""
        try:
            if not isinstance(prompt, str) and not any(isinstance(part, Mapping) for part in prompt):
                return [index(token) for token in prompt], None  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"a prompt is a text, a list of token ids (whole numbers) or a conversation, not {prompt!r:.60}."
            ) from None
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; give token ids.")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), prompt
        text = self.tokenizer.render(prompt)  # type: ignore[arg-type]
        return self.tokenizer.encode(text, bos=False), text

    def _default(self, params: SamplingParams | None, prompt_len: int) -> SamplingParams:
        """`params`, else the checkpoint's; a length that is the checkpoint's is cut to what context and cache leave."""
        params, wanted = params or self.defaults, self.defaults.max_tokens
        if wanted is None or params.max_tokens != wanted:
            return params
        return replace(params, max_tokens=min(wanted, max(1, min(self.max_model_len, self.kv_tokens) - prompt_len)))

    # Many at once

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue every prompt (texts or token ids), in order. A request that fails alone carries an `error`."""
        listed = _several(prompts)
        if any(isinstance(prompt, Mapping) for prompt in listed):
            raise UserError("generate takes texts and token ids; use chat for conversations.")
        return self._all(listed, params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the checkpoint's chat template."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise UserError(
                "chat takes a list of messages, each a dict with role and content, or a list of such lists."
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        return self._all([messages] if one else list(messages), params, progress)

    def _all(self, prompts: list[Any], params: Any, progress: bool) -> list[RequestOutput]:
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one, or as many.")
        return self._gather((self.submit(*pair) for pair in zip(prompts, each, strict=True)), len(each), progress)

    def _gather(self, submitted: Iterator[str], total: int, progress: bool) -> list[RequestOutput]:
        """Outputs of requests (ids), in their order. When anything goes wrong, Ctrl-C too, all of them are dropped."""
        ids: list[str] = []
        box: Box = {}
        try:
            for id in submitted:
                ids.append(id)
                self._boxes[id] = box
            with meter("Generating", total, "requests", quiet=not progress) as advance:
                while len(box) < len(ids):
                    before = len(box)
                    self._advance()
                    advance(len(box) - before)
        except BaseException:
            for id in ids:
                self.abort(id)
            raise
        return [box[id] for id in ids]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TextDelta, None, None]:
        """Pieces of text as they come. Closing the iterator aborts the request."""
        id = self.submit(prompt, params, stream=True)
        request = self.engine.requests[id]
        box = self._boxes[id] = {}
        seen: Counter[int] = Counter()  # tokens given, by index of the completion
        try:
            while True:
                for seq in sorted((*request.sequences, *request.finished), key=lambda seq: seq.index):
                    tokens = seq.tokens[seq.prompt_len + seen[seq.index] :]
                    if tokens and seq.text is not None:
                        seen[seq.index] += len(tokens)
                        over = seq.finish_reason is not None
                        yield TextDelta(seq.text.take(over=over), tokens, seq.finish_reason, seq.index)
                if box:
                    break
                self._advance()
            if request.error is not None:
                raise UserError(request.error)
        finally:
            self.abort(id)

    def score(
        self, texts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], *, progress: bool = False
    ) -> list[Scored]:
        """Log-probabilities (natural, of the raw model) of given texts or token ids, one or many, batched."""
        listed = [self.encode(text)[0] for text in _several(texts)]
        scorable = [tokens for tokens in listed if len(tokens) > 1]
        added = (self.engine.add(tokens, SamplingParams(), score_only=True) for tokens in scorable)
        done = iter(self._gather(added, len(scorable), progress))
        out = []
        for tokens in listed:
            levels: list[float | None] = [None] * min(len(tokens), 1)
            if len(tokens) > 1:
                result = next(done)
                if result.error is not None:
                    raise UserError(result.error)
                levels += [level for _, level, _ in result.prompt_logprobs or []]
            out.append(Scored(tokens, levels))
        return out


def _open(model: str | Path, revision: str | None, weights: str) -> Checkpoint:
    """The checkpoint. Where random weights were asked for, a name that is none may be a mistyped preset."""
    try:
        return open_checkpoint(model, revision=revision)
    except UserError as error:
        if weights == "random" and (hint := nearest(str(model), PRESETS)):
            raise UserError(f"there is no preset {str(model)!r}{hint}; and as a checkpoint: {error}") from error
        raise


def _several(prompts: Any) -> list[Any]:
    """One text, or one prompt's token ids, as a list of one; a list of either as it is."""
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, str | Sequence):
        raise UserError(f"give a text, token ids, or a list of either, not {type(prompts).__name__}.")
    one = isinstance(prompts, str) or (bool(prompts) and all(isinstance(part, int) for part in prompts))
    return [prompts] if one else list(prompts)


def _stop_ids(source: Checkpoint) -> tuple[int, ...]:
    """The end tokens of a checkpoint that has no tokenizer to name them."""
    size = source.config.vocab_size
    return end_ids(source.generation, size, "generation_config.json") or end_ids(source.hf_config, size, "config.json")


def _context(config: ModelConfig, asked: int | None) -> int:
    """The longest sequence in tokens. Going beyond the trained context is refused unless RoPE stretches to it."""
    trained = config.max_position_embeddings
    if asked is None:
        return trained
    if asked < 2:
        raise UserError(f"max_model_len must be at least 2, not {asked}.")
    scaling = config.rope_scaling or {}
    stretched = int(trained * scaling["factor"]) if scaling.get("rope_type") == "dynamic" else trained
    if asked > stretched:
        raise UserError(f"max_model_len {asked} is more than the {stretched} tokens that the model was made for.")
    return asked


def pipeline(task: str, model: str | Path | LLM, **loading: Any) -> Callable[..., Any]:
    """A callable as transformers' `pipeline("text-generation", model)` gives it: [{"generated_text": ...}] a prompt.

    Calls take a text or a conversation, or a list of either, and sampling parameters by name (`max_new_tokens` and
    `do_sample` too); `return_full_text=False` leaves the prompt out.
    """
    if task.replace("_", "-") != "text-generation":
        raise UserError(f"there is no pipeline {task!r}{nearest(task, ['text-generation'])}; puna has text-generation.")
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
    whole = prompt + text if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": text}]
    return whole if full else text
