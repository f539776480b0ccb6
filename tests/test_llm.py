"""What a Python user holds: LLM, load and pipeline, on a tiny random checkpoint."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import pipeline as transformers_pipeline

import puna
from puna import LLM, SamplingParams, UserError
from puna.llm import TextDelta
from puna.model.attention import causal
from puna.parallel.process_group import choose_device

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float64", kv_tokens=4096)


@pytest.fixture(autouse=True)
def left_clean(request: pytest.FixtureRequest):
    """Whatever a test did with the shared LLM, its next step finds nothing to do."""
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert llm.step() == [] and llm.busy == 0
        assert not llm._boxes and not llm._prompts
        llm.engine.scheduler.check()
        assert llm.engine.scheduler.pool.available * 16 == 4096


def changed(checkpoint: Path, folder: Path, name: str, values: dict) -> Path:
    """A copy with other values in one of its JSON files."""
    shutil.copytree(checkpoint, folder)
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))
    return folder


def greedy(llm: LLM, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens by whole forwards."""
    new: list[int] = []
    for _ in range(count):
        tokens = torch.tensor([[*ids, *new]])
        with torch.inference_mode():
            hidden = llm.model(tokens, torch.arange(tokens.shape[1])[None], causal)
            new.append(int(llm.model.logits(hidden[0, -1]).argmax()))
    return new


# generate and chat


def test_generate_takes_texts_and_ids_one_and_many(llm: LLM):
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    ids = llm.tokenizer.encode("Once upon a time")
    expected = greedy(llm, ids, 5)
    for prompts in ("Once upon a time", ["Once upon a time"], ids, [ids], [ids, "Once upon a time"]):
        for output in llm.generate(prompts, params):
            assert output.prompt_token_ids == ids
            assert output.outputs[0].token_ids == expected
            assert output.outputs[0].text == llm.tokenizer.decode(expected)
    assert llm.generate([], params) == []
    assert llm.generate("Once upon a time", params)[0].prompt == "Once upon a time"
    assert llm.generate(ids, params)[0].prompt is None


@pytest.mark.parametrize("call", ["generate", "score", "chat"])
@pytest.mark.parametrize("prompts", [5, None, ["a", 5], [[1, "a"]], [None], b"a", {"a": 1}, [1.5]])
def test_what_is_no_prompt_is_refused_in_a_sentence(llm: LLM, call: str, prompts):
    with pytest.raises(UserError, match="text|list of messages"):
        getattr(llm, call)(prompts)


def test_a_conversation_is_for_chat_and_parameters_are_no_dict(llm: LLM):
    with pytest.raises(UserError, match="use chat for conversations"):
        llm.generate(CHAT)
    for call in (llm.generate, lambda *args: list(llm.stream(*args))):
        with pytest.raises(UserError, match=r"SamplingParams\(...\), not as a dict"):
            call("hi", {"max_tokens": 2})


def test_a_closed_llm_of_one_process_still_runs(checkpoint: Path):
    with LLM(checkpoint, kv_tokens=64) as llm:
        pass
    assert llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5]
    with pytest.raises(UserError, match="3 prompts and 2 sampling parameters"):
        llm.generate(["a", "b", "c"], params[:2])


def test_one_bad_prompt_refuses_the_call_and_leaves_nothing_behind(llm: LLM):
    with pytest.raises(UserError, match="the context of 512"):
        llm.generate(["a", [5] * 600], SamplingParams(max_tokens=3))


def test_chat_goes_through_the_template(llm: LLM):
    params = SamplingParams(max_tokens=5)
    (output,) = llm.chat(CHAT, params)
    assert output.prompt == f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == llm.tokenizer.encode_chat(CHAT)
    two = llm.chat([CHAT, [*CHAT, {"role": "assistant", "content": "Paris."}, *CHAT]], params)
    assert two[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert len(two[1].prompt_token_ids) > len(output.prompt_token_ids)


def test_an_interrupted_call_drops_its_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    run, steps = llm.engine.runner.run, []

    def interrupted(batch):
        steps.append(batch)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=20, ignore_eos=True))
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert llm.generate("a", params)[0].outputs[0].token_ids == greedy(llm, llm.tokenizer.encode("a"), 4)


# submit, step, abort


def test_submitted_requests_come_out_of_step_whatever_else_is_called(llm: LLM):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    ids = {llm.submit("one", params), llm.submit("two", params, id="mine")}
    assert "mine" in ids and llm.busy == 2
    assert [output.prompt for output in llm.generate(["three", "four"], params)] == ["three", "four"]
    list(llm.stream("five", params))
    llm.score(["six"])
    assert llm.busy == 2
    found = []
    while llm.busy:
        found += llm.step()
    assert {output.id for output in found} == ids
    assert {output.prompt for output in found} == {"one", "two"}


def test_an_aborted_request_says_so(llm: LLM):
    id = llm.submit("one", SamplingParams(max_tokens=50, ignore_eos=True))
    llm.step()
    llm.abort(id)
    (output,) = llm.step()
    assert (output.id, output.prompt, output.outputs[0].finish_reason) == (id, "one", "abort")


# stream


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.0, "seed": 1}, {"stop": ("e", "a ")}])
def test_pieces_join_to_the_text(llm: LLM, options: dict):
    params = SamplingParams(max_tokens=40, ignore_eos=True, **options)
    (whole,) = llm.generate("Once upon", params)
    pieces = list(llm.stream("Once upon", params))
    for completion in whole.outputs:
        mine = [piece for piece in pieces if piece.index == completion.index]
        assert "".join(piece.text for piece in mine) == completion.text
        assert [token for piece in mine for token in piece.token_ids] == completion.token_ids
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
    assert len(pieces) >= 3


def test_a_stream_of_nothing_but_an_end_token(llm: LLM):
    end = greedy(llm, llm.tokenizer.encode("Once upon"), 1)
    params = SamplingParams(max_tokens=9, stop_token_ids=tuple(end))
    assert list(llm.stream("Once upon", params)) == [TextDelta("", end, "stop")]


def test_closing_a_stream_aborts_it(llm: LLM):
    pieces = llm.stream("Once upon", SamplingParams(max_tokens=200, ignore_eos=True))
    next(pieces)
    assert llm.busy == 1
    pieces.close()
    assert llm.step() == [] and llm.busy == 0


def test_streams_can_take_turns(llm: LLM):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (12, 5)]
    expected = [output.outputs[0].text for output in llm.generate(["one", "two"], params)]
    streams = [llm.stream("one", params[0]), llm.stream("two", params[1])]
    texts = ["", ""]
    for _ in range(14):
        for i, stream in enumerate(streams):
            texts[i] += getattr(next(stream, None), "text", "")
    assert texts == expected


def test_a_conversation_and_ids_stream_too(llm: LLM):
    params = SamplingParams(max_tokens=8)
    for prompt in (CHAT, llm.tokenizer.encode_chat(CHAT)):
        assert "".join(p.text for p in llm.stream(prompt, params)) == llm.chat(CHAT, params)[0].outputs[0].text


def test_a_stream_that_fails_raises(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def run(batch):
        return torch.full((sum(len(chunk.logit_rows) for chunk in batch.chunks), 384), torch.nan)

    monkeypatch.setattr(llm.engine.runner, "run", run)
    with pytest.raises(UserError, match="NaN"):
        list(llm.stream("a", SamplingParams(max_tokens=3)))
    with pytest.raises(UserError, match="NaN"):
        llm.score(["Once upon"])
    assert "NaN" in (llm.generate("a", SamplingParams(max_tokens=3))[0].error or "")


def test_beams_do_not_stream(llm: LLM):
    with pytest.raises(UserError, match="cannot stream"):
        list(llm.stream("a", SamplingParams(num_beams=2)))


# score


def test_score_equals_a_whole_forward(llm: LLM):
    texts = ["The puna is the high grassland of the Andes.", "a", "", "llamas live"]
    for text, scored in zip(texts, llm.score(texts), strict=True):
        ids = llm.tokenizer.encode(text)
        assert scored.token_ids == ids and len(scored.logprobs) == len(ids)
        if len(ids) < 2:
            assert scored.logprobs == [None] * len(ids) and scored.total == 0
            continue
        with torch.inference_mode():
            hidden = llm.model(torch.tensor([ids]), torch.arange(len(ids))[None], causal)
            levels = llm.model.logits(hidden[0]).log_softmax(-1)
        expected = [levels[i, token].item() for i, token in enumerate(ids[1:])]
        assert scored.logprobs[0] is None and scored.logprobs[1:] == pytest.approx(expected, abs=1e-9)
        assert scored.total == pytest.approx(sum(expected))
    assert llm.score([]) == []
    assert llm.score(texts[0]) == llm.score(texts[:1]) == llm.score(llm.tokenizer.encode(texts[0]))


def test_a_text_too_long_to_score_leaves_nothing_behind(llm: LLM):
    assert len(llm.score([[5] * 512])[0].logprobs) == 512
    with pytest.raises(UserError, match="more than the context of 512"):
        llm.score(["llamas live", [5] * 513])


# What the checkpoint asks for


def test_defaults_are_the_checkpoints_and_given_ones_beat_them(checkpoint: Path, tmp_path: Path):
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    llm = LLM(changed(checkpoint, tmp_path / "sampling", "generation_config.json", wanted), kv_tokens=512)
    assert llm.defaults == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=7)
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 7
    (cut,) = llm.generate([[5] * 509])  # which leaves no room for seven
    assert cut.outputs[0].finish_reason
    greedy = SamplingParams(max_tokens=3, ignore_eos=True)
    assert len(llm.generate("a", greedy)[0].outputs[0].token_ids) == 3


def test_without_generation_config_it_is_greedy(llm: LLM):
    assert llm.defaults == SamplingParams()


def test_the_checkpoints_end_tokens_end_a_text(checkpoint: Path, llm: LLM, tmp_path: Path):
    first = greedy(llm, llm.tokenizer.encode("Once upon"), 4)
    end = {"eos_token_id": [2, first[3]]}
    ended = LLM(changed(checkpoint, tmp_path / "ends", "generation_config.json", end), dtype="float64", kv_tokens=512)
    assert ended.generate("Once upon")[0].outputs[0].token_ids == first[: first.index(first[3]) + 1]
    bare = changed(checkpoint, tmp_path / "bare", "generation_config.json", end)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    without = LLM(bare, dtype="float64", kv_tokens=512)
    ids = llm.tokenizer.encode("Once upon")
    assert without.tokenizer is None
    assert without.generate(ids)[0].outputs[0].token_ids == first[: first.index(first[3]) + 1]
    with pytest.raises(UserError, match="no tokenizer; give token ids"):
        without.generate("Once upon")


def test_a_builtin_template_replaces_the_checkpoints(checkpoint: Path):
    llm = LLM(checkpoint, template="llama2", kv_tokens=512)
    assert "[INST]" in (llm.chat(CHAT, SamplingParams(max_tokens=1))[0].prompt or "")


# Loading


def test_dtype_auto_is_the_checkpoints(tiny_checkpoint):
    for dtype in ("float32", "bfloat16"):
        llm = LLM(tiny_checkpoint(torch_dtype=dtype), kv_tokens=64)
        assert llm.dtype == llm.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert LLM("tiny", weights="random", kv_tokens=64).dtype == torch.bfloat16
    assert LLM("tiny", weights="random", kv_tokens=64, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(UserError, match="no dtype 'int8'"):
        LLM("tiny", weights="random", dtype=torch.int8)


def test_a_mistyped_preset_is_named():
    with pytest.raises(UserError, match="no preset 'tiny-gqaa', did you mean 'tiny-gqa'"):
        LLM("tiny-gqaa", weights="random")


def test_random_weights_of_a_preset_run(tmp_path: Path):
    llm = LLM("tiny-gqa", weights="random", dtype="float32", kv_tokens=256)
    assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0].outputs[0].token_ids) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "floaf32"}, "no dtype 'floaf32', did you mean 'float32'"),
        ({"device": "cdua"}, "no device 'cdua', did you mean 'cuda'"),
        ({"device": "mps"}, "puna runs on cpu and cuda, not on 'mps'"),
        ({"weights": "none"}, "weights must be auto or random"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_model_len": 513}, "max_model_len 513 is more than the 512 tokens"),
        ({"kv_tokens": 15}, "a cache of 15 tokens is less than one block of 16"),
        ({"template": "lama2"}, "llama2"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_a_sentence(checkpoint: Path, options: dict, says: str):
    with pytest.raises(UserError, match=says):
        LLM(checkpoint, **options)


def test_a_gpu_that_is_not_there_is_refused():
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match="torch sees"):
        choose_device(missing)


def test_dynamic_rope_reaches_beyond_the_trained_context(tiny_checkpoint):
    path = tiny_checkpoint(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    assert LLM(path, kv_tokens=64).max_model_len == 64
    assert LLM(path, kv_tokens=64, max_model_len=128).max_model_len == 128
    with pytest.raises(UserError, match="more than the 128 tokens"):
        LLM(path, max_model_len=129)


def test_a_model_that_is_dropped_leaves_memory(checkpoint: Path):
    llm = LLM(checkpoint, kv_tokens=64)
    llm.generate("a", SamplingParams(max_tokens=2))
    model = weakref.ref(llm.model)
    del llm
    gc.collect()
    assert model() is None


def test_load_gives_the_plain_model_and_the_tokenizer(checkpoint: Path):
    model, tokenizer = puna.load(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("The puna is the high grassland")])
    with torch.no_grad():
        ours = model.logits(model(ids, torch.arange(ids.shape[1])[None], causal))
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=0, atol=2e-5)


# pipeline


def test_pipeline_is_that_of_transformers(checkpoint: Path):
    """The same shape of results, and in float32 the same texts, for a text, a conversation, and lists of either."""
    ours = puna.pipeline("text-generation", checkpoint, kv_tokens=1024)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = transformers_pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    for prompts in ("Once upon", ["Once upon", "Hello"], CHAT, [CHAT, CHAT]):
        for full in (True, False):
            options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": full}
            assert ours(prompts, **options) == theirs(prompts, **options)


def test_pipeline_options(llm: LLM):
    call = puna.pipeline("text-generation", llm)
    assert len(call("a", num_return_sequences=3, do_sample=True, max_new_tokens=2)) == 3
    with pytest.raises(UserError, match="no pipeline 'text-generaton', did you mean 'text-generation'"):
        puna.pipeline("text-generaton", llm)
    with pytest.raises(UserError, match="no sampling option 'max_new_token'"):
        call("a", max_new_token=3)
