"""What a Python user holds: LLM, load and pipeline, on a tiny random checkpoint."""

import gc
import io
import json
import math
import re
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import pipeline as transformers_pipeline

import puna
from conftest import CHATML, CORPUS
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
    return LLM(checkpoint, dtype="float64", kv_cache_tokens=4096)


@pytest.fixture(autouse=True)
def left_clean(request: pytest.FixtureRequest):
    """Whatever a test did with the shared LLM, its next step finds nothing to do."""
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert llm.step() == [] and llm.busy == 0
        assert not llm._unfinished
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
    with LLM(checkpoint, kv_cache_tokens=64) as llm:
        pass
    assert llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5]
    with pytest.raises(UserError, match="3 prompts and 2 sampling parameters"):
        llm.generate(["a", "b", "c"], params[:2])


def test_a_request_that_is_refused_fails_alone(llm: LLM):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    alone = llm.generate(["a", "b"], params)
    one, long, empty, surrogate, two = llm.generate(["a", [5] * 600, [], "\ud83d", "b"], params)
    assert [one.outputs, two.outputs] == [out.outputs for out in alone] and one.error is two.error is None
    assert "600 prompt tokens" not in (long.error or "") and "the context of 512" in (long.error or "")
    assert long.prompt_token_ids == [5] * 600 and long.outputs == []
    assert "empty" in (empty.error or "") and "Unicode" in (surrogate.error or "") and surrogate.prompt == "\ud83d"
    bad = [{"role": "user", "content": None}]
    fine, refused = llm.chat([CHAT, bad], params)
    assert fine.error is None and "Message 1" in (refused.error or "")


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
    assert list(llm.stream("Once upon", params)) == [TextDelta("", end, "stop", stop_reason=end[0])]


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


@pytest.mark.parametrize("other", ["generate", "score", "step", "stream", "abort"])
def test_a_stream_gets_all_of_its_text_whoever_computes_it(llm: LLM, other: str):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    want = llm.generate("Once upon", params)[0].outputs[0]
    stream = llm.stream("Once upon", params)
    pieces = [next(stream)]
    if other == "generate":
        llm.generate("another", SamplingParams(max_tokens=30, ignore_eos=True))
    elif other == "score":
        llm.score(["another text"] * 9)
    elif other == "stream":
        list(llm.stream("another", SamplingParams(max_tokens=30, ignore_eos=True)))
    else:
        id = llm.submit("another", SamplingParams(max_tokens=30, ignore_eos=True))
        done = [output.id for _ in range(20) for output in llm.step()]
        if other == "abort":
            llm.abort(id)
        while id not in done:
            done += [output.id for output in llm.step()]
    pieces += stream
    assert "".join(piece.text for piece in pieces) == want.text
    assert [token for piece in pieces for token in piece.token_ids] == want.token_ids
    assert pieces[-1].finish_reason == "length"


def test_closed_streams_are_not_busy(llm: LLM):
    stream = llm.stream("one", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert llm.busy == 1
    stream.close()
    assert llm.busy == 0 and llm.step() == []


def test_several_threads_share_one_llm(llm: LLM):
    params = [SamplingParams(max_tokens=3 + i, temperature=1.0, seed=i, ignore_eos=True) for i in range(12)]
    want = [output.outputs[0].text for output in llm.generate([f"text {i}" for i in range(12)], params)]
    got: dict[int, str] = {}
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                if i % 3 == 0:
                    got[i] = llm.generate(f"text {i}", params[i])[0].outputs[0].text
                elif i % 3 == 1:
                    got[i] = "".join(piece.text for piece in llm.stream(f"text {i}", params[i]))
                else:
                    left = llm.stream("another", params[i])
                    next(left)
                    left.close()
                    got[i] = llm.generate([f"text {i}", "another"], params[i])[0].outputs[0].text
                assert got[i] == want[i]
                assert llm.score(f"text {i}")[0].error is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [got[i] for i in range(12)] == want


def test_without_a_seed_no_two_models_sample_alike(checkpoint: Path):
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    texts = [LLM(checkpoint, kv_cache_tokens=64).generate("a", params)[0].outputs[0].text for _ in range(2)]
    assert texts[0] != texts[1]
    texts = [LLM(checkpoint, kv_cache_tokens=64, seed=3).generate("a", params)[0].outputs[0].text for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_prompt_is_scored_without_generating(llm: LLM):
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    (output,) = llm.generate("Once upon a time", params)
    assert [c.token_ids for c in output.outputs] == [[]] and output.num_output_tokens == 0
    (scored,) = llm.score("Once upon a time")
    assert [level for _, level, _ in output.prompt_logprobs or []] == scored.logprobs[1:]


@pytest.mark.parametrize("content", ["The capital is", "The capital is ", " a\n", "🐑"])
@pytest.mark.parametrize("strips", [False, True])
def test_the_last_message_is_continued_as_transformers_does(
    checkpoint: Path, tmp_path: Path, content: str, strips: bool
):
    template = CHATML.replace("message['content']", "message['content'] | trim") if strips else CHATML
    path = changed(checkpoint, tmp_path / "m", "tokenizer_config.json", {"chat_template": template})
    asked = [*CHAT, {"role": "assistant", "content": content}]
    llm = LLM(path, kv_cache_tokens=512)
    (output,) = llm.chat(asked, SamplingParams(max_tokens=2), continue_final_message=True)
    theirs = AutoTokenizer.from_pretrained(path)
    assert output.prompt == theirs.apply_chat_template(asked, tokenize=False, continue_final_message=True)
    assert asked[-1]["content"] == content


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
    assert "NaN" in (llm.score(["Once upon"])[0].error or "")
    assert "NaN" in (llm.generate("a", SamplingParams(max_tokens=3))[0].error or "")


def test_beams_do_not_stream(llm: LLM):
    with pytest.raises(UserError, match="cannot stream"):
        list(llm.stream("a", SamplingParams(num_beams=2)))


# SentencePiece


@pytest.fixture(scope="module")
def spm(tiny_checkpoint, tmp_path_factory) -> LLM:
    """The same weights with a SentencePiece vocabulary, most of whose words open with a space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        byte_fallback=True,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("spm")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_checkpoint() / name, folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return LLM(folder, dtype="float64", kv_cache_tokens=4096)


@pytest.mark.parametrize("prompt", ["Once", "Once upon", "", "llama 🐑", "\n"])
@pytest.mark.parametrize("seed", range(4))
def test_completions_are_decoded_behind_their_prompt(spm: LLM, prompt: str, seed: int):
    """As sentencepiece decodes prompt and completion together, in every way to get them."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=spm.tokenizer.model_file)
    control = dict.fromkeys(range(3), -100.0)  # <unk>, <s>, </s>, which sentencepiece spells in its own way
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True, logit_bias=control)
    output = spm.generate(prompt, params)[0]
    ids = [token for token in output.prompt_token_ids if token != spm.tokenizer.bos_id]
    completion = output.outputs[0]
    together = reference.decode(ids + completion.token_ids)
    assert one_mark(reference.decode(ids) + completion.text) == one_mark(together)
    assert "".join(piece.text for piece in spm.stream(prompt, params)) == completion.text
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed, "ignore_eos": True, "logit_bias": control}
    assert puna.pipeline("text-generation", spm)(prompt, **options) == [{"generated_text": prompt + completion.text}]
    cut = completion.text[len(completion.text) // 2 :][:3]
    stopped = spm.generate(prompt, replace(params, stop=(cut,)))[0].outputs[0] if cut else completion
    assert completion.text.startswith(stopped.text)


def one_mark(text: str) -> str:
    """sentencepiece spells each byte that is no character as U+FFFD, Python each run of them that belongs together."""
    return re.sub("\ufffd+", "\ufffd", text)


def test_some_completions_open_with_a_space(spm: LLM):
    params = [SamplingParams(max_tokens=3, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(20)]
    texts = [output.outputs[0].text for output in spm.generate(["Once"] * 20, params)]
    assert any(text.startswith(" ") for text in texts) and any(text[:1].isalpha() for text in texts)


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
    short, long = llm.score(["llamas live", [5] * 513])
    assert short == llm.score("llamas live")[0] and short.error is None
    assert "more than the context of 512" in (long.error or "") and math.isnan(long.total) and long.logprobs == []


# What the checkpoint asks for


def test_defaults_are_the_checkpoints_and_given_ones_beat_them(checkpoint: Path, tmp_path: Path):
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    llm = LLM(changed(checkpoint, tmp_path / "sampling", "generation_config.json", wanted), kv_cache_tokens=512)
    assert llm.defaults == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=7)
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 7
    (cut,) = llm.generate([[5] * 509])  # which leaves no room for seven
    assert cut.outputs[0].finish_reason
    greedy = SamplingParams(max_tokens=3, ignore_eos=True)
    assert len(llm.generate("a", greedy)[0].outputs[0].token_ids) == 3


def test_a_longer_context_is_advised_only_where_it_would_be_accepted(checkpoint: Path):
    short = LLM(checkpoint, kv_cache_tokens=512, max_model_len=100)
    error = short.generate([[5] * 200], SamplingParams(max_tokens=3))[0].error or ""
    advised = re.search(r"raise max_model_len to (\d+)", error)
    assert advised
    longer = LLM(checkpoint, kv_cache_tokens=512, max_model_len=int(advised[1]) + 2)
    assert longer.generate([[5] * 200], SamplingParams(max_tokens=3))[0].error is None
    for llm, length in ((short, 600), (LLM(checkpoint, kv_cache_tokens=512), 512)):
        error = llm.generate([[5] * length], SamplingParams(max_tokens=3))[0].error or ""
        assert "context" in error and "max_model_len" not in error


def test_a_wrong_generation_config_is_named_before_loading(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("puna.loading.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    model = changed(checkpoint, tmp_path / "wrong", "generation_config.json", {"top_p": 7})
    with pytest.raises(UserError, match="The generation_config.json of .*wrong has a wrong value: top_p must be"):
        LLM(model)


def test_without_generation_config_it_is_greedy(llm: LLM):
    assert llm.defaults == SamplingParams()


def test_the_checkpoints_end_tokens_end_a_text(checkpoint: Path, llm: LLM, tmp_path: Path):
    first = greedy(llm, llm.tokenizer.encode("Once upon"), 4)
    end = {"eos_token_id": [2, first[3]]}
    ended = LLM(
        changed(checkpoint, tmp_path / "ends", "generation_config.json", end), dtype="float64", kv_cache_tokens=512
    )
    assert ended.generate("Once upon")[0].outputs[0].token_ids == first[: first.index(first[3]) + 1]
    bare = changed(checkpoint, tmp_path / "bare", "generation_config.json", end)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    without = LLM(bare, dtype="float64", kv_cache_tokens=512)
    ids = llm.tokenizer.encode("Once upon")
    assert without.tokenizer is None
    assert without.generate(ids)[0].outputs[0].token_ids == first[: first.index(first[3]) + 1]
    with pytest.raises(UserError, match="no tokenizer; give token ids"):
        without.generate("Once upon")


def test_a_builtin_template_replaces_the_checkpoints(checkpoint: Path):
    llm = LLM(checkpoint, template="llama2", kv_cache_tokens=512)
    assert "[INST]" in (llm.chat(CHAT, SamplingParams(max_tokens=1))[0].prompt or "")


# Loading


def test_dtype_auto_is_the_checkpoints(tiny_checkpoint):
    for dtype in ("float32", "bfloat16"):
        llm = LLM(tiny_checkpoint(torch_dtype=dtype), kv_cache_tokens=64)
        assert llm.dtype == llm.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert LLM("tiny", load_format="dummy", kv_cache_tokens=64).dtype == torch.bfloat16
    assert LLM("tiny", load_format="dummy", kv_cache_tokens=64, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(UserError, match="There is no dtype 'int8'"):
        LLM("tiny", load_format="dummy", dtype=torch.int8)


def test_a_mistyped_preset_is_named():
    with pytest.raises(UserError, match="There is no preset 'tiny-gqaa' .did you mean 'tiny-gqa'"):
        LLM("tiny-gqaa", load_format="dummy")


def test_random_weights_of_a_preset_run(tmp_path: Path):
    llm = LLM("tiny-gqa", load_format="dummy", dtype="float32", kv_cache_tokens=256)
    assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0].outputs[0].token_ids) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "floaf32"}, "There is no dtype 'floaf32' .did you mean 'float32'"),
        ({"device": "cdua"}, "There is no device 'cdua' .did you mean 'cuda'"),
        ({"device": "mps"}, "puna runs on cpu and cuda, not on 'mps'"),
        ({"load_format": "none"}, "load_format must be auto or dummy"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_model_len": 513}, "max_model_len 513 is more than the 512 tokens"),
        ({"kv_cache_tokens": 15}, "A KV cache of 15 tokens is smaller than one block of 16"),
        ({"kv_cache_tokens": 10**15}, "A KV cache of 10{15} tokens takes .* GB .*set kv_cache_tokens to at most"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_model_len": "100"}, "max_model_len must be a whole number, not '100'"),
        ({"kv_cache_tokens": 64.0}, "kv_cache_tokens must be a whole number, not 64.0"),
        ({"template": "lama2"}, "llama2"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_loading(
    checkpoint: Path, options: dict, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("puna.loading.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=says):
        LLM(checkpoint, **options)


def test_a_gpu_that_is_not_there_is_refused():
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match="torch sees"):
        choose_device(missing)


def test_dynamic_rope_reaches_beyond_the_trained_context(tiny_checkpoint):
    path = tiny_checkpoint(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    assert LLM(path, kv_cache_tokens=64).max_model_len == 64
    assert LLM(path, kv_cache_tokens=64, max_model_len=128).max_model_len == 128
    with pytest.raises(UserError, match="more than the 128 tokens"):
        LLM(path, max_model_len=129)


def test_a_model_that_is_dropped_leaves_memory(checkpoint: Path):
    llm = LLM(checkpoint, kv_cache_tokens=64)
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
        ours = model.logits(model(ids))
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=0, atol=2e-5)
        two = ids[:, :6].reshape(2, 3)
        torch.testing.assert_close(model.logits(model(two)), theirs(two).logits, rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=r"\[batch, length\]"):
        model(ids[0])


# pipeline


def test_pipeline_is_that_of_transformers(checkpoint: Path):
    """The same shape of results, and in float32 the same texts, for a text, a conversation, and lists of either."""
    ours = puna.pipeline("text-generation", checkpoint, kv_cache_tokens=1024)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = transformers_pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    for prompts in ("Once upon", ["Once upon", "Hello"], CHAT, [CHAT, CHAT]):
        for full in (True, False):
            options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": full}
            assert ours(prompts, **options) == theirs(prompts, **options)


def test_pipeline_options(llm: LLM):
    call = puna.pipeline("text-generation", llm)
    assert len(call("a", num_return_sequences=3, do_sample=True, max_new_tokens=2)) == 3
    with pytest.raises(UserError, match="no pipeline 'text-generaton' .did you mean 'text-generation'"):
        puna.pipeline("text-generaton", llm)
    with pytest.raises(UserError, match="no sampling option 'max_new_token'"):
        call("a", max_new_token=3)
