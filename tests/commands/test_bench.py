"""`puna bench`: the grid, the file of conversations, what is counted, and the table as JSON and PNG."""

import json
import random

import pytest

from puna.bench import latency, throughput
from puna.cli import main


@pytest.fixture
def run(tiny_checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(kind, *words, model=None):
        code = main(["bench", kind, model or str(tiny_checkpoint()), *words])
        return code, *capsys.readouterr()

    return call


def columns(out):
    head, *lines = (line.split() for line in out.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_latency_times_the_grid(run, tmp_path):
    words = ["--input-len", "4,16", "--output-len", "3", "--batch-size", "1,2", "--repeats", "2"]
    code, out, _ = run("latency", *words, "--json", "t.json", "--plot", "t.png")
    rows = columns(out)
    assert code == 0
    assert [(row["input"], row["output"], row["batch"]) for row in rows] == [
        ("4", "3", "1"), ("4", "3", "2"), ("16", "3", "1"), ("16", "3", "2")]  # fmt: skip
    assert all(float(row["first_ms"]) > 0 and float(row["of_bandwidth"]) > 0 for row in rows)
    saved = json.loads((tmp_path / "t.json").read_text())
    assert [row["input"] for row in saved["rows"]] == [4, 4, 16, 16]
    assert saved["options"]["repeats"] == 2 and saved["machine"]["read_bandwidth"] > 0
    for row in saved["rows"]:
        assert row["decode_tok_s"] == pytest.approx(row["batch"] / row["per_token_ms"] * 1e3)
        assert row["prefill_tok_s"] == pytest.approx(row["batch"] * row["input"] / row["first_ms"] * 1e3)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".t.*"))


def test_a_preset_with_random_weights(run):
    shape = ("--input-len", "8", "--output-len", "2", "--batch-size", "1", "--repeats", "1")
    code, out, _ = run("latency", "--load-format", "dummy", *shape, model="tiny")
    assert code == 0 and len(columns(out)) == 1


def test_throughput_answers_every_request(run, tmp_path):
    words = ["--input-len", "8", "--output-len", "4", "--batch-size", "1,3", "--num-prompts", "5", "--json", "t.json"]
    code, out, _ = run("throughput", *words)
    assert code == 0 and [row["requests"] for row in columns(out)] == ["5", "5"]
    for row in json.loads((tmp_path / "t.json").read_text())["rows"]:
        assert row["p50_s"] <= row["p90_s"] <= row["p99_s"]
        assert row["output_tok_s"] == pytest.approx(4 * row["requests_s"])
        assert row["total_tok_s"] == pytest.approx(12 * row["requests_s"])


def conversation(*turns):
    return {"conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": t} for i, t in enumerate(turns)]}


CHATS = [
    conversation("What is the capital?", "It's Paris, isn't it?", "Thanks."),
    conversation("x", "too short a question"),
    conversation("a question with no answer"),
    conversation("A long question. " * 200, "A fine answer."),
]


def test_throughput_takes_its_lengths_from_conversations(run, tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    code, out, _ = run("throughput", "--dataset", "chats.json", "--batch-size", "2")
    assert code == 0 and [row["requests"] for row in columns(out)] == ["1"]


def test_lengths_are_those_of_the_tokenizer(tiny_checkpoint):
    from puna.llm import LLM

    llm = LLM(tiny_checkpoint())
    pairs = [("What is the capital?", "It's Paris, isn't it?"), ("x", "too short a question")]
    question, answer = (len(llm.tokenizer.encode(text)) for text in pairs[0])
    assert throughput.sample_lengths(llm, pairs, 9, random.Random(0)) == [(question, answer)]


def test_bytes_of_a_decode_step(tiny_checkpoint):
    from puna.llm import LLM

    for tied in (False, True):
        llm = LLM(tiny_checkpoint(tie_word_embeddings=tied), dtype="float32")
        c = llm.config
        attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        weights = c.num_hidden_layers * layer + c.hidden_size + c.vocab_size * c.hidden_size
        cache = 3 * 100 * c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim
        assert latency.step_bytes(llm, 3, 100) == 4 * (weights + cache)


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("latency", ["--output-len", "1"], "--output-len must be at least 2"),
        ("latency", ["--repeats", "0"], "--repeats must be at least 1, not 0."),
        ("latency", ["--input-len", "0"], "--input-len must be at least 1, not 0."),
        ("latency", ["--input-len", "500"], "come to 564 tokens, the context is 512: shorten them"),
        ("latency", ["--batch-size", "4,x"], "--batch-size takes whole numbers"),
        ("throughput", ["--num-prompts", "0"], "--num-prompts must be at least 1, not 0."),
        ("latency", ["--json", "no/where.json"], "--json no/where.json is in a folder that doesn't exist"),
        ("latency", ["--plot", "."], "--plot '.' must name a file of its own"),
        ("throughput", ["--dataset", "nowhere.json"], "Cannot use nowhere.json"),
        ("throughput", ["--dataset", "bad.json"], "--dataset bad.json is not JSON"),
        ("throughput", ["--dataset", "empty.json"], "has no rows of"),
        ("throughput", ["--dataset", "short.json"], "No conversation of --dataset fits 4 to 512 tokens"),
    ],
)
def test_bad_use_is_one_sentence(run, tmp_path, kind, words, says):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "short.json").write_text(json.dumps(CHATS[1:2]))
    code, out, err = run(kind, *words)
    assert code == 2 and not out and says in err and err.count("\n") == 1, err
