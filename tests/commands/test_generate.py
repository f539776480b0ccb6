"""`puna generate`: rows in order through a bounded window, errors per row, resume, and what wins over what."""

import io
import json
import random
import sys
from types import SimpleNamespace

import pytest

from puna.cli import main
from puna.commands.generate import Row, finished, resume
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError


class Shuffled:
    """Stands in for the engine: finishes requests in random order, one a step; refuses the prompt "bad"."""

    def __init__(self):
        self.waiting, self.most, self.rng = [], 0, random.Random()

    def submit(self, prompt, params):
        if prompt == "bad":
            raise UserError("a bad prompt")
        self.waiting.append(prompt)
        self.most = max(self.most, len(self.waiting))
        return f"id {prompt}"

    def step(self):
        prompt = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        return [SimpleNamespace(id=f"id {prompt}", error=None, prompt=prompt)]


def test_rows_come_back_in_order_and_few_are_held():
    read = 0

    def rows():
        nonlocal read
        for i in range(300):
            read += 1
            yield Row(i, "bad" if i % 7 == 3 else i)

    engine = Shuffled()
    for i, row in enumerate(finished(engine, SamplingParams(), rows(), 8)):
        assert row.index == i and read <= i + 8 + 1
        assert row.error == "a bad prompt" if i % 7 == 3 else row.output.prompt == i
    assert i == 299 and engine.most <= 8


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return str(tiny_checkpoint())


@pytest.fixture(scope="module")
def llm(model):
    from puna.llm import LLM

    return LLM(model, dtype="float64")


@pytest.fixture
def run(model, capsys, monkeypatch, tmp_path):
    """`run(*words, stdin="")` -> exit code, stdout, stderr, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words, stdin=""):
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        code = main(["generate", model, *words, "--dtype", "float64"])
        return code, *capsys.readouterr()

    return call


def texts(llm, prompt, **params):
    if isinstance(prompt, str):
        output = llm.generate(prompt, SamplingParams(**params))[0]
    else:
        output = llm.chat(prompt, SamplingParams(**params))[0]
    return [completion.text for completion in output.outputs]


def test_one_prompt_streams(run, llm):
    want = texts(llm, "Once upon", max_tokens=8)[0]
    assert run("Once upon", "--max-tokens", "8") == (0, want + "\n", "")
    assert run("--max-tokens", "8", stdin="Once upon\n") == (0, want + "\n", "")
    assert run("--max-tokens", "8", stdin="\ufeffOnce upon\n") == (0, want + "\n", "")


def test_chat_applies_the_template(run, llm):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    want = texts(llm, asked, max_tokens=8)[0]
    assert run("--chat", "Hi", "--system", "Be brief.", "--max-tokens", "8")[1] == want + "\n"


def test_several_answers_have_a_head(run, llm):
    code, out, _ = run("one", "two", "--max-tokens", "4")
    one, two = texts(llm, "one", max_tokens=4)[0], texts(llm, "two", max_tokens=4)[0]
    assert (code, out) == (0, f"==> prompt 1, answer 1 <==\n{one}\n==> prompt 2, answer 1 <==\n{two}\n")
    out = run("one", "--n", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "4")[1]
    first, second = texts(llm, "one", max_tokens=4, n=2, temperature=1.0, seed=3)
    assert out == f"==> prompt 1, answer 1 <==\n{first}\n==> prompt 1, answer 2 <==\n{second}\n"


def test_a_text_file_has_a_prompt_a_line(run, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert run("--file", "p.txt", "--max-tokens", "4")[1] == run("one", "two", "--max-tokens", "4")[1]
    assert run("--file", "-", "--max-tokens", "4", stdin="one\ntwo")[1] == run("one", "two", "--max-tokens", "4")[1]


ROWS = [
    {"id": "a", "prompt": "Once upon", "max_tokens": 3, "metadata": {"any": ["thing"]}},
    {"prompt": [40, 41, 42]},
    {"id": 7, "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0, "seed": 5, "n": 2},
    "not json",
    ["a list"],
    {"prompt": "x", "messages": []},
    {"id": "e", "prompt": "x", "temprature": 1},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x" * 5000},
    {"messages": [{"content": "no role"}]},
    {"prompt": "x", "max_completion_tokens": 2, "stop": "zzz", "top_p": None},
]


def lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_jsonl_in_and_out(run, llm, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines(ROWS))
    code, out, err = run("--file", "in.jsonl", "--max-tokens", "5")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["index"] for record in records] == list(range(len(ROWS)))
    assert "8 rows could not be answered" in err

    got = [[choice["text"] for choice in record.get("choices", [])] for record in records]
    assert got[0] == texts(llm, "Once upon", max_tokens=3) and records[0]["metadata"] == {"any": ["thing"]}
    assert got[1] == [llm.generate([[40, 41, 42]], SamplingParams(max_tokens=5))[0].outputs[0].text]
    assert got[2] == texts(llm, ROWS[2]["messages"], max_tokens=5, temperature=1.0, seed=5, n=2)
    assert records[1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5}
    assert records[11]["usage"]["completion_tokens"] == 2
    assert {records[i].get("id") for i in (0, 1, 2, 6)} == {"a", None, 7, "e"}

    errors = {record["index"]: record["error"] for record in records if "error" in record}
    assert list(errors) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert errors[6] == "the row has no option 'temprature' (did you mean 'temperature'?)"
    assert errors[7] == "the row: temperature takes a number, not 'hot'"
    for index, says in {3: "not JSON", 4: "not a JSON object", 5: "one of the two", 10: '"messages" is a list'}.items():
        assert says in errors[index]
    assert not any("\n" in error for error in errors.values())


def test_the_same_rows_from_stdin_and_into_a_file(run, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines(ROWS))
    want = run("--file", "in.jsonl", "--max-tokens", "5")[1]
    assert run("--file", "-", "--jsonl", "--max-tokens", "5", stdin=lines(ROWS))[1] == want
    assert run("--file", "in.jsonl", "--max-tokens", "5", "--out", "out.jsonl")[1] == ""
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len({record.pop("fingerprint") for record in records}) == len(ROWS)
    assert records == [json.loads(line) for line in want.splitlines()]


def test_log_probabilities_are_records(run):
    record = json.loads(run("Once", "--logprobs", "2", "--prompt-logprobs", "1", "--max-tokens", "3")[1])
    steps = record["choices"][0]["logprobs"]
    assert len(steps) == 3 and all(len(step["top"]) == 2 and step["logprob"] <= 0 for step in steps)
    assert steps[0]["logprob"] == steps[0]["top"][0]["logprob"]  # greedy takes the likeliest
    assert len(record["prompt_logprobs"]) == record["usage"]["prompt_tokens"] - 1  # nothing predicts the first
    assert b"".join(bytes(step["bytes"]) for step in steps).decode(errors="replace") == record["choices"][0]["text"]
    assert all(bytes(step["bytes"]).decode(errors="replace") == step["token"] for step in steps)
    scored = json.loads(run("Once", "--prompt-logprobs", "1", "--max-tokens", "0")[1])
    assert scored["prompt_logprobs"] == record["prompt_logprobs"] and scored["usage"]["completion_tokens"] == 0


def test_a_prompt_beyond_any_context_is_not_encoded(run, monkeypatch, tmp_path):
    text = "word " * 3_000_000
    (tmp_path / "in.jsonl").write_text(lines([{"prompt": text}, {"messages": [{"role": "user", "content": text}]}]))
    (tmp_path / "in.txt").write_text(text)
    monkeypatch.setattr("puna.tokenizer.Tokenizer.encode", None)
    records = [json.loads(line) for line in run("--file", "in.jsonl")[1].splitlines()]
    assert all("more than the context of 512 tokens can hold" in record["error"] for record in records)
    assert run("--file", "in.txt")[0] == 2


def test_resume_gives_what_one_go_gives(run, tmp_path):
    rows = [{"id": i, "prompt": f"row {i}", "temperature": 1.0, "seed": i} for i in range(9)]
    (tmp_path / "in.jsonl").write_text(lines(rows))
    out = tmp_path / "out.jsonl"
    command = ("--file", "in.jsonl", "--out", "out.jsonl", "--max-tokens", "4")
    run(*command)
    whole = out.read_bytes()
    for cut in random.sample(range(len(whole)), 3) + [0, len(whole) - 1]:
        out.write_bytes(whole[:cut])
        code, _, err = run(*command)
        assert code == 0 and out.read_bytes() == whole
        there = whole[:cut].count(b"\n")
        assert f"out.jsonl has {there} row{'s' * (there != 1)} already; going on" in err or there == 0
    assert "Nothing left to do: out.jsonl has 9 rows." in run(*command)[2]


CHANGES = [
    (["--temperature", "0.5"], {}),
    (["--chat"], {}),
    (["--max-model-len", "100"], {}),
    (["--template", "llama2"], {}),
    ([], {"prompt": "Another"}),
    ([], {"max_tokens": 2}),
]


@pytest.mark.parametrize(("words", "row"), CHANGES, ids=str)
def test_resume_refuses_what_other_options_or_prompts_made(run, tmp_path, words, row):
    rows = [{"prompt": "first"}, {"prompt": "One"}]
    (tmp_path / "in.jsonl").write_text(lines(rows))
    command = ("--file", "in.jsonl", "--out", "out.jsonl", "--max-tokens", "1")
    assert run(*command)[0] == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "in.jsonl").write_text(lines([rows[0], rows[1] | row]))
    code, _, err = run(*command, *words)
    assert code == 2 and "was made from another prompt, by another model or with other options" in err
    assert f"Line {1 if words else 2} of out.jsonl" in err and (tmp_path / "out.jsonl").read_bytes() == whole


def test_resume_refuses_what_another_model_made(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Of the same shape, under the same path: one whose weights differ in some rows."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    command = ["generate", str(model), "a", "--max-tokens", "1", "--out", "out.jsonl"]
    for seed, code in ((0, 0), (0, 0), (1, 2)):
        for file in tiny_checkpoint(seed=seed).iterdir():
            (model / file.name).unlink(missing_ok=True)
            (model / file.name).symlink_to(file)
        assert main(command) == code, capsys.readouterr().err
    assert "by another model" in capsys.readouterr().err


def test_a_bad_line_of_text_fails_alone(run, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"one\nna\xefve\n" + b"x" * 5000 + b"\ntwo\n")
    code, out, err = run("--file", "in.txt", "--max-tokens", "4")
    good = run("one", "two", "--max-tokens", "4")[1]
    assert code == 2 and out == good.replace("prompt 2", "prompt 4")
    assert err.splitlines()[0].startswith("puna: prompt 2: line 2 of in.txt is not UTF-8")
    assert err.splitlines()[1].startswith("puna: prompt 3: ") and "context" in err and err.count("\n") == 2
    code, _, err = run("--file", "in.txt", "--max-tokens", "4", "--out", "out.jsonl")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0 and [("error" in record) for record in records] == [False, True, True, False]


def test_bad_sampling_options_are_found_before_a_model_is_loaded(run, monkeypatch, capsys):
    monkeypatch.setattr("puna.llm.LLM", None)
    for verb in ("generate", "chat"):
        for words in (["--top-p", "1.5"], ["--logit-bias", "{1: 1000}"], ["--min-tokens", "5", "--max-tokens", "4"]):
            assert main([verb, "no/such/model", *words]) == 2
            assert words[0][2:].replace("-", "_") in capsys.readouterr().err


def test_resume_refuses_the_output_of_another_input(tmp_path):
    out = tmp_path / "out.jsonl"
    rows = [Row(i, "p", carried={"id": f"r{i}"}) for i in range(3)]
    for text in (
        '{"index": 1}\n',
        '{"index": 0, "id": "other"}\n',
        "hello\n",
        "[1]\n",
        '{"index": 0, "id": "r0"}\n' * 2,
    ):
        out.write_text(text)
        with pytest.raises(UserError, match="choose another --out"):
            resume(out, iter(rows))
        assert out.read_text() == text


@pytest.mark.parametrize("text", ["note to self", "{}", '{"index": 1, "id"', '{"model_type": "llama"}', '{"index": 0}'])
def test_a_file_of_someone_else_is_left_alone(run, tmp_path, text):
    (tmp_path / "mine").write_text(text)
    code, _, err = run("hi", "--out", "mine", "--max-tokens", "1")
    assert code == 2 and "choose another --out" in err and (tmp_path / "mine").read_text() == text


def test_the_output_is_cut_only_when_the_model_is_there(run, tmp_path):
    (tmp_path / "out").write_text('{"index": 0, "choi')
    assert run("hi", "--out", "out", "--max-tokens", "1", "--template", "nosuch")[0] == 2
    assert (tmp_path / "out").read_text() == '{"index": 0, "choi'
    assert run("hi", "--out", "out", "--max-tokens", "1")[0] == 0
    assert json.loads((tmp_path / "out").read_text())["choices"]


def test_the_input_is_no_output(run, tmp_path):
    for text in ('{"prompt": "x"}', '{"prompt": "x"}\n'):
        (tmp_path / "one.jsonl").write_text(text)
        code, _, err = run("--file", "one.jsonl", "--out", "./one.jsonl")
        assert code == 2 and "is the input itself" in err and (tmp_path / "one.jsonl").read_text() == text


BAD_BYTES = [
    (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": "x", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"prompt": "\xff"}', "line 3 of in.jsonl is not UTF-8 text"),
    (b'{"prompt": "half \\ud83d"}', ""),
    (b'{"id": "\\ud83d", "prompt": "x", "metadata": "\\udc00"}', None),
    (b'{"prompt": "' + b"x" * 700_000 + b'"}', "line 6 of in.jsonl is longer than"),
    (b'{"prompt": "good"}', None),
]


def test_no_row_stops_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr("puna.commands.generate_input.MAX_LINE", 300_000)
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(row for row, _ in BAD_BYTES))
    command = ("--file", "in.jsonl", "--out", "out.jsonl", "--max-tokens", "2")
    assert run(*command)[0] == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(7))
    for record, (_, says) in zip(records, BAD_BYTES, strict=True):
        assert says in record["error"] if says is not None else record["choices"]
    assert (records[4]["id"], records[4]["metadata"]) == ("\ud83d", "\udc00")
    assert "Nothing left to do" in run(*command)[2]


@pytest.mark.parametrize("words", [[], ["--file", "-"]])
def test_stdin_that_is_no_text(run, words):
    code, _, err = run(*words, "--max-tokens", "2", stdin=b"a\xff\xfe")
    assert code == 2 and "stdin is not UTF-8 text" in err and err.count("\n") == 1


def test_a_row_wins_over_the_command_line_over_the_checkpoint(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_checkpoint().iterdir():
        (model / file.name).symlink_to(file)
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.0, "max_new_tokens": 2}')
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "max_tokens": 4}\n')

    def used(*words):
        assert main(["generate", str(model), "--file", "in.jsonl", "--seed", "1", *words]) == 0
        return [json.loads(line)["usage"]["completion_tokens"] for line in capsys.readouterr().out.splitlines()]

    assert used() == [2, 4] and used("--max-tokens", "3") == [3, 4]
    # Only a length that the user asked for must fit; the checkpoint's is cut to the context.
    (model / "generation_config.json").write_text('{"max_new_tokens": 100000}')
    assert used("--max-model-len", "8", "--ignore-eos") == [7, 4]


def test_yaml_holds_the_options(run, tmp_path):
    (tmp_path / "run.yaml").write_text("prompt: Once upon\nmax_tokens: 5\n")
    assert run("--config", "run.yaml") == run("Once upon", "--max-tokens", "5")
    assert run("--config", "run.yaml", "--max-tokens", "2") == run("Once upon", "--max-tokens", "2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["p", "--file", "f"], "Give prompts as arguments or by --file, not both"),
        (["--file", "nowhere.txt"], "Cannot use nowhere.txt: No such file or directory"),
        (["--file", "latin1.txt"], "latin1.txt is not UTF-8 text"),
        (["p", "--system", "x"], "--system goes with --chat"),
        (["p", "--out", "/dev/full"], "--out /dev/full must be a file"),
        (["p", "--out", "."], "--out '.' must name a file of its own"),
        (["p", "--out", "no/where.jsonl"], "--out no/where.jsonl is in a folder that doesn't exist: make no first."),
        (["p", "--temperature", "-1"], "temperature must be a number of at least 0"),
        (["p", "--top-p", "1.5"], "top_p must be"),
        (["x" * 5000], "context"),
        (["p", "x" * 5000], "prompt 2: "),
        (["p", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1, not 0."),
        (["p", "--max-num-batched-tokens", "0"], "--max-num-batched-tokens must be at least 1, not 0."),
        (["p", "--max-model-len", "1000000"], "1000000"),
        (["p", "--device", "tpu"], "tpu"),
        (["p", "--template", "nosuch"], "nosuch"),
    ],
)
def test_bad_use_is_one_sentence(run, tmp_path, words, says):
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin1"))
    code, _, err = run(*words, "--max-tokens", "2")
    assert code == 2 and says in err and err.count("\n") == 1, err


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_bad_sampling_options_are_found_before_the_model_is_loaded(verb, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("puna.llm.LLM.__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    for words, says in ((["--top-p", "1.5"], "top_p must be"), (["--num-beams", "2", "--stop", "x"], "beam search")):
        assert main([verb, str(tiny_checkpoint()), *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-tokens", "512"], "A prompt and max_tokens 512 exceed the context of 512; ask for at most 511."),
        (["--logit-bias", "{384: 1}"], "logit_bias names token 384, but the vocabulary ends at 383."),
        (["--n", "300"], "300 sequences at once are more than a step takes"),
        (["--num-beams", "4", "--max-num-seqs", "3"], "4 sequences at once are more than a step takes"),
        (["--out", "/proc/x.jsonl"], "Cannot use /proc/x.jsonl: "),
    ],
)
def test_what_no_prompt_can_run_with_is_refused_before_the_model_is_loaded(
    words, says, tiny_checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr("puna.llm.LLM.__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(["generate", str(tiny_checkpoint()), "x", *words]) == 2
    assert says in capsys.readouterr().err


def test_ctrl_c_keeps_whole_rows(run, monkeypatch, tmp_path):
    from puna.llm import LLM

    step, steps = LLM.step, 0

    def interrupted(self):
        nonlocal steps
        steps += 1
        if steps == 12:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LLM, "step", interrupted)
    rows = [{"prompt": f"row {i}", "max_tokens": 2 + 5 * i, "ignore_eos": True} for i in range(4)]
    (tmp_path / "in.jsonl").write_text(lines(rows))
    code, _, err = run("--file", "in.jsonl", "--out", "out.jsonl")
    assert code == 130 and "the same command goes on after them" in err
    assert [json.loads(line)["index"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [0, 1]
