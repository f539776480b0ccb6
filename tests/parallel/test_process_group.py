"""How ranks start, speak and end: one voice, one exit, no rank left waiting, even without torchrun to end it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from launching import SECONDS, launch
from puna.engine.sampling_params import SamplingParams
from puna.llm import LLM

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
from puna import LLM, SamplingParams
from puna.engine import engine
from puna.engine.eager_runner import EagerRunner

rank = int(os.environ["RANK"])

def after(steps, where, name, act):
    "Let the method `name` of the class do `act` instead, once it was called so often."
    plain, calls = getattr(where, name), []
    def method(*args):
        calls.append(1)
        return act() if len(calls) > steps else plain(*args)
    setattr(where, name, method)

def raises(error):
    raise error

{before}
llm = LLM(sys.argv[1] if rank == 0 else {path}, dtype="float64")
print(llm.generate("Once upon", SamplingParams(max_tokens=12, ignore_eos=True))[0].outputs[0].token_ids)
{after}
"""


def script(size, model, *, before="", after="", path="sys.argv[1]"):
    return launch(size, "-c", SCRIPT.format(before=before, after=after, path=path), model)


def test_a_script_that_ends_without_a_word_ends_all_ranks(tiny_checkpoint):
    first, second = script(2, tiny_checkpoint(), after="LLM(sys.argv[1])")
    answer = LLM(tiny_checkpoint(), dtype="float64").generate(
        "Once upon", SamplingParams(max_tokens=12, ignore_eos=True)
    )
    assert first.out == f"{answer[0].outputs[0].token_ids}\n"
    assert first.code == 1 and "under torchrun a script makes one LLM" in first.err.splitlines()[-1]
    assert (second.code, second.out, second.err) == (0, "", "")


@pytest.mark.full
def test_a_closed_model_leaves_no_trace(tiny_checkpoint):
    for rank in script(2, tiny_checkpoint(), after="llm.close()\nllm.close()"):
        assert rank.code == 0 and not rank.err


@pytest.mark.parametrize(
    ("before", "code", "says"),
    [
        ("rank == 0 and after(4, EagerRunner, 'run', lambda: raises(KeyError('oops')))", 1, "KeyError: 'oops'"),
        ("rank == 0 and after(4, engine, 'decide', lambda: raises(SystemExit(7)))", 7, ""),
        ("rank == 0 and after(4, EagerRunner, 'run', lambda: os._exit(9))", 9, ""),
        ("rank == 1 and after(4, EagerRunner, 'run', lambda: os._exit(9))", 1, "RankLost: Another rank has ended"),
    ],
    ids=["error in the model", "exit while choosing tokens", "rank 0 dies", "rank 1 dies"],
)
def test_a_rank_that_ends_in_a_step_ends_the_others_soon(tiny_checkpoint, before, code, says):
    first, second = script(2, tiny_checkpoint(), before=before)
    assert first.code == code and says in first.err
    assert second.code == (9 if "rank == 1" in before else 1) and not second.err


def test_an_error_on_all_ranks_comes_out_once(tiny_checkpoint):
    ranks = launch(3, "-m", "puna", "generate", tiny_checkpoint(), "Once")
    assert [rank.code for rank in ranks] == [2, 0, 0]
    assert ranks[0].err == (
        "puna: 4 attention heads and 2 key/value heads cannot be split over 3 ranks; use one of 1, 2, 4.\n"
    )
    assert not any(rank.out for rank in ranks) and not ranks[1].err and not ranks[2].err


def test_an_error_before_the_ranks_have_joined_comes_out_once():
    ranks = launch(2, "-m", "puna", "generate", "model", "--temprature", "1")
    assert [rank.code for rank in ranks] == [2, 2]
    assert "did you mean '--temperature'?" in ranks[0].err and not ranks[1].err


def test_rank_0_tells_what_another_rank_alone_met(tiny_checkpoint):
    first, second = script(2, tiny_checkpoint(), path="'nowhere/model'")
    assert first.code == 1 and "UserError: Rank 1: " in first.err and "nowhere/model" in first.err
    assert second.code == 0 and not second.err


def torchrun(size, *words, **pipes):
    """`torchrun --nproc-per-node SIZE -m puna WORDS`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "puna"]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}  # or torchrun sets it and says so
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | pipes
    return subprocess.Popen([*command, *map(str, words)], env=variables, **pipes)


def test_generate_under_torchrun(tiny_checkpoint, tmp_path):
    rows = [{"id": i, "prompt": f"Number {i}", "seed": i, "temperature": 1.0, "max_tokens": 9 + i} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("generate", tiny_checkpoint(), "--file", tmp_path / "rows.jsonl", "--dtype", "float64")
    out, err = torchrun(2, *words).communicate(timeout=SECONDS)
    assert not err
    alone = LLM(tiny_checkpoint(), dtype="float64")
    params = [SamplingParams(seed=row["seed"], temperature=1.0, max_tokens=row["max_tokens"]) for row in rows]
    expected = [answer.outputs[0].text for answer in alone.generate([row["prompt"] for row in rows], params)]
    assert [json.loads(line)["choices"][0]["text"] for line in out.splitlines()] == expected


@pytest.mark.full
def test_smollm2_on_three_ranks(smollm2, tmp_path):
    """In float32: equal tokens, but where the two likeliest are closer than 1e-3."""
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    words = ("--file", rows, "--dtype", "float32", "--max-tokens", 24, "--logprobs", 2)
    out, _ = torchrun(3, "generate", smollm2, *words).communicate(timeout=SECONDS)
    params = SamplingParams(max_tokens=24, logprobs=2)
    alone = LLM(smollm2, dtype="float32").generate(prompts, params)
    for line, answer in zip(out.splitlines(), alone, strict=True):
        split, whole = json.loads(line)["choices"][0]["logprobs"], answer.outputs[0].logprobs
        for one, (token, level, top) in zip(split, whole, strict=False):
            if one["id"] != token:
                assert top[0][1] - top[1][1] < 1e-3
                break
            assert one["logprob"] == pytest.approx(level, abs=1e-3)


@pytest.mark.full
def test_chat_under_torchrun(tiny_checkpoint):
    words = ("chat", tiny_checkpoint(), "--dtype", "float64", "--max-tokens", "8", "--verbose")
    running = torchrun(2, *words, stdin=subprocess.PIPE)
    out, err = running.communicate("Hello\n/new\nHello\n", timeout=SECONDS)
    assert running.returncode == 0
    alone = LLM(tiny_checkpoint(), dtype="float64")
    answer = alone.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=8))[0].outputs[0].text
    assert out == f"{answer}\n{answer}\n"
    assert err.count("A new conversation.") == 1 and err.count("tokens/s") == 2


@pytest.mark.full
def test_bench_under_torchrun(tmp_path):
    words = ("bench", "latency", "tiny", "--load-format", "dummy", "--input-len", "8", "--output-len", "4")
    words += ("--batch-size", "1,2", "--repeats", "1", "--json", tmp_path / "times.json")
    running = torchrun(2, *words)
    out, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 0 and out.count("per_token_ms") == 1 and err.count("\n") <= 2
    assert len(json.loads((tmp_path / "times.json").read_text())["rows"]) == 2


@pytest.mark.full
@pytest.mark.parametrize("when", ["in an answer", "between answers"])
def test_ctrl_c_ends_all_ranks_at_once(tiny_checkpoint, when):
    length = 500 if when == "in an answer" else 4
    running = torchrun(2, "chat", tiny_checkpoint(), "--max-tokens", length, stdin=subprocess.PIPE, bufsize=1)
    running.stdin.write("Hello\n")
    running.stdout.read(1 if when == "in an answer" else 2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=SECONDS)
    assert "forcefully" not in err, "torchrun had to kill a rank, which it does after 30 seconds"
    assert err.count("puna: stopped") == 1 and "(rank 1)" not in err
