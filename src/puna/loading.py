"""From a checkpoint to a plain model (`load`) or to an engine that generates (`create_engine`)."""

from __future__ import annotations

import atexit
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from puna.engine.block_pool import BlockPool
from puna.engine.engine import Engine
from puna.engine.kv_cache import BLOCK_SIZE, cache_blocks, check_cache_tokens
from puna.engine.options import EngineOptions
from puna.engine.runner import make_runner
from puna.engine.sampling_params import SamplingParams
from puna.engine.validation import RequestValidator
from puna.errors import UserError, nearest
from puna.model.config import ModelConfig, end_ids
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.model.tp_plan import kv_heads_per_rank
from puna.model_loader import DTYPES, load_model, random_model
from puna.parallel.memory import free_bytes
from puna.parallel.process_group import choose_device
from puna.parallel.tp_inference import TensorParallel
from puna.tokenizer import Tokenizer
from puna.weights.adapter import read_adapter
from puna.weights.checkpoint import Checkpoint
from puna.weights.merge import merge, replaced
from puna.weights.open import open_checkpoint


def load(
    ref: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> tuple[Llama, Tokenizer]:
    """The plain model (nothing fused, `adapter` unmerged) and tokenizer of a checkpoint, to call or to take apart.

    `hidden = model(ids)` with ids [B, T] gives hidden states [B, T, hidden_size], causal and without a cache;
    `model.logits(hidden)` gives logits [B, T, vocab_size].
    """
    with open_checkpoint(ref, revision=revision) as source:
        lora = read_adapter(adapter) if adapter is not None else None
        tokenizer = (replaced(source, lora) if lora else source).tokenizer()
        if tokenizer is None:
            raise UserError(f"{ref} carries no tokenizer; put the model's tokenizer files beside the weights.")
        return load_model(source, choose_dtype(dtype, source), choose_device(device), adapter=lora), tokenizer


def create_engine(
    options: EngineOptions, *, prefix_caching: bool = True, seed: int | None = None, quiet: bool = True
) -> Engine:
    """Load a model and build the engine around it. Raises UserError for whatever the user can put right.

    seed: of requests without one (None: drawn from the operating system), and of dummy weights. Under torchrun the
    model is split over the ranks, and the call returns on rank 0 alone: the other ranks work for it until it stops the
    engine or ends.
    """
    tp = TensorParallel.start(options.device)
    together = tp.raise_together if tp else nullcontext  # a UserError of any rank is raised once, on rank 0
    with together():
        device = choose_device(options.device)
        memory = free_bytes(device)  # of all ranks, before one of them begins to load
    with together():
        model, tokenizer, stop_ids, defaults = _load_all(options, device, memory, tp, seed or 0, quiet)
        validator = _validator(model.config, options)
        model.fix_rope(validator.max_model_len)
    with together():
        blocks = cache_blocks(
            model, BLOCK_SIZE, validator.max_model_len, options.max_num_seqs, options.kv_cache_tokens, tp
        )
    engine = Engine(
        make_runner(model, blocks, BLOCK_SIZE),
        BlockPool(blocks, BLOCK_SIZE, prefix_caching=prefix_caching),
        validator,
        tokenizer,
        stop_ids=stop_ids,
        defaults=defaults,
        seed=seed,
        tp=tp,
    )
    if tp is not None:
        if tp.rank > 0:
            tp.serve(engine.run_worker)
        atexit.register(engine.stop)  # a script that ends without closing must not leave ranks waiting
    return engine


def check_params(options: EngineOptions, params: SamplingParams) -> None:
    """Raises UserError for sampling parameters that no prompt can run with on this model. Reads no weights."""
    dummy = options.load_format == "dummy"
    if dummy and options.model in PRESETS:
        return _validator(PRESETS[options.model], options).check_params(params)
    with _open(options, dummy) as source:
        return _validator(source.config, options).check_params(params)


def _load_all(
    options: EngineOptions, device: str, memory: int, tp: TensorParallel | None, seed: int, quiet: bool
) -> tuple[Llama, Tokenizer | None, tuple[int, ...], SamplingParams]:
    """Model, tokenizer, end tokens and default sampling parameters of what `options` name.

    All options are checked before weights are loaded.
    """
    dummy = options.load_format == "dummy"
    if options.load_format not in ("auto", "dummy"):
        raise UserError(f"load_format must be auto or dummy, not {options.load_format!r}.")
    if dummy and options.adapter is not None:
        raise UserError("An adapter belongs to a model's own weights; leave out the adapter or load_format=dummy.")
    build: dict[str, Any] = {"tp": tp, "quantization": options.quantization, "available": memory}
    build |= {"fast": True, "quiet": quiet}
    if dummy and options.model in PRESETS:
        dtype = choose_dtype(options.dtype, None)
        _check_sizes(PRESETS[options.model], options, dtype, memory, tp)
        return random_model(PRESETS[options.model], dtype, device, seed=seed, **build), None, (), SamplingParams()
    with _open(options, dummy) as source:
        if options.adapter is not None:
            source = merge(source, read_adapter(options.adapter))
        dtype = choose_dtype(options.dtype, source)
        _check_sizes(source.config, options, dtype, memory, tp)
        defaults = _defaults(source)
        tokenizer = source.tokenizer()
        stop_ids = _stop_ids(source)
        if tokenizer is not None:
            tokenizer.check_fits(source.config.vocab_size)
            if options.template is not None:
                tokenizer = tokenizer.with_template(options.template)
            if options.add_bos is not None:
                tokenizer = tokenizer.with_bos(options.add_bos)
            stop_ids = tuple(index for index in tokenizer.stop_ids if index < source.config.vocab_size)
        if dummy:
            model = random_model(source.config, dtype, device, seed=seed, **build)
        else:
            model = load_model(source, dtype, device, **build)
        return model, tokenizer, stop_ids, defaults


def _open(options: EngineOptions, dummy: bool) -> Checkpoint:
    """The checkpoint. With dummy weights, a name that is none may be a mistyped preset."""
    try:
        return open_checkpoint(options.model, revision=options.revision)
    except UserError as error:
        if dummy and (hint := nearest(options.model, PRESETS)):
            raise UserError(f"There is no preset {options.model!r}{hint}; and as a checkpoint: {error}") from error
        raise


def _validator(config: ModelConfig, options: EngineOptions) -> RequestValidator:
    max_model_len, longest = _context(config, options.max_model_len)
    return RequestValidator(
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        longest_model_len=longest,
    )


def _check_sizes(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, memory: int, tp: TensorParallel | None
) -> None:
    """Raises UserError for limits that the model or the `memory` of this rank, in bytes, can't have."""
    _validator(config, options)
    if options.kv_cache_tokens is not None:
        token_bytes = config.kv_bytes_per_token(dtype.itemsize, kv_heads_per_rank(config, tp.size if tp else 1))
        check_cache_tokens(options.kv_cache_tokens, BLOCK_SIZE, token_bytes, memory)


def _defaults(source: Checkpoint) -> SamplingParams:
    try:
        return SamplingParams.from_generation_config(source.generation)
    except UserError as error:
        raise UserError(f"The generation_config.json of {source.path} has a wrong value: {error}") from None


def _stop_ids(source: Checkpoint) -> tuple[int, ...]:
    """The end tokens of a checkpoint that has no tokenizer to name them."""
    size = source.config.vocab_size
    return end_ids(source.generation, size, "generation_config.json") or end_ids(source.hf_config, size, "config.json")


def _context(config: ModelConfig, asked: int | None) -> tuple[int, int]:
    """(the longest sequence in tokens, the most that could be asked for): beyond the trained context only where RoPE
    is scaled dynamically."""
    trained = config.max_position_embeddings
    scaling = config.rope_scaling or {}
    longest = int(trained * scaling["factor"]) if scaling.get("rope_type") == "dynamic" else trained
    if asked is None:
        return trained, longest
    if asked < 2:
        raise UserError(f"max_model_len must be at least 2, not {asked}.")
    if asked > longest:
        raise UserError(f"max_model_len {asked} is more than the {longest} tokens that the model supports.")
    return asked, longest


def choose_dtype(dtype: str | torch.dtype, source: Checkpoint | None) -> torch.dtype:
    """The torch dtype; `auto` is the checkpoint's own, and bfloat16 for quantised and random weights."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        lossy = source is None or source.details.get("quantised")
        stored = "bfloat16" if source is None or lossy else source.hf_config.get("torch_dtype")
        dtype = stored if stored in DTYPES else "float32"
    if dtype not in DTYPES:
        raise UserError(f"There is no dtype {dtype!r}{nearest(dtype, DTYPES)}; use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]
