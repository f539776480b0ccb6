"""Each handler makes of a row what its dataset's publisher meant, and refuses what it can't use with a reason."""

import json
import re

import pytest

from puna.data.handlers import HANDLERS, Chat, Completion, MissingField, Pair, RowError, Text, choose, detect
from puna.data.records import TITLE
from puna.data.sources import Bad, chunks, find, rows
from puna.errors import UserError


def contents(name, row, **kw):
    return [sample if isinstance(sample, Bad) else sample.content for sample in choose(name, **kw).convert(row)]


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


USER, GPT = ("user", "Hi"), ("assistant", "Hello.")
CONVERSATION = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
MOSS = {
    "meta_instruction": "You are MOSS.",
    "chat": {
        f"turn_{k}": {
            "Human": f"<|Human|>: Ask {k}<eoh>\n",
            "Inner Thoughts": "None",
            "MOSS": f"<|MOSS|>: Say {k}<eom>\n",
        }
        for k in (1, 2, 10)
    },
}
SQUAD = {
    "title": "Bowl",
    "paragraphs": [
        {
            "context": f"Passage {p}.",
            "qas": [
                {
                    "id": f"{p}{q}",
                    "question": f"Which {q}?",
                    "answers": [{"text": f"{p}{q}", "answer_start": 0}, {"text": "b"}],
                }
                for q in range(2)
            ],
        }
        for p in range(2)
    ],
}
LEETCODE = {
    "id": 1,
    "code_with_problem": "# Two Sum\nFind two numbers.\n```python\ndef f(): pass\n```",
    "code_only": "def f(): pass",
    "explanation_only": "It passes.",
}
# handler that `auto` must find -> row -> what comes out
CASES = [
    ("text", {"text": "A document."}, [Text("A document.")]),
    ("wikitext", {"text": " = Title = \n \n Text . \n"}, [Text(" = Title = \n \n Text . \n")]),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below ..."},
        [Chat([{"role": "user", "content": "Add.", "input": "1 2"}, *said(("assistant", "3"))])],
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, [Chat(said(USER, GPT))]),
    (
        "alpaca",
        {"instruction": "Hi", "output": "Hello.", "system": "Be kind.", "history": [["a", "b"]]},
        [Chat(said(("system", "Be kind."), ("user", "a"), ("assistant", "b"), USER, GPT))],
    ),
    ("sharegpt", {"id": "x", "conversations": CONVERSATION}, [Chat(said(USER, GPT))]),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "S"}, CONVERSATION[1], *CONVERSATION, CONVERSATION[0]]},
        [Chat(said(("system", "S"), USER, GPT))],
    ),
    ("openai", {"messages": said(("system", "S"), USER, GPT)}, [Chat(said(("system", "S"), USER, GPT))]),
    (
        "openai",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}, *said(GPT)]},
        [Chat(said(USER, GPT))],
    ),
    ("openai", {"messages": said(USER, GPT), "tools": "[{}]"}, [Chat(said(USER, GPT), tools=[{}])]),
    (
        "moss",
        MOSS,
        [Chat(said(*((r, f"{w} {k}") for k in (1, 2, 10) for r, w in (("user", "Ask"), ("assistant", "Say")))))],
    ),
    (
        "belle",
        {"instruction": "Human:Hi\nAssistant:Hello.\nHuman: Who?\nAssistant:", "input": "", "output": "Me."},
        [Chat(said(USER, GPT, ("user", "Who?"), ("assistant", "Me.")))],
    ),
    (
        "leetcode",
        LEETCODE,
        [Chat(said(("user", "# Two Sum\nFind two numbers."), ("assistant", "def f(): pass\nIt passes.")))],
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        [Pair(Chat(said(USER, GPT), last=True), Chat(said(USER, ("assistant", "No.")), last=True))],
    ),
]
PAIR = CASES[-1][2]


@pytest.mark.parametrize("name, row, wanted", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_are_recognised_and_understood(name, row, wanted):
    assert detect([row]) == name
    assert contents(name, row) == wanted


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": said(USER), "chosen": said(GPT), "rejected": said(("assistant", "No."))},
        {"prompt": "Hi", "chosen": said(USER, GPT), "rejected": said(USER, ("assistant", "No."))},
        {"chosen": said(USER, GPT), "rejected": said(USER, ("assistant", "No."))},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
        {"conversations": CONVERSATION[:1], "chosen": CONVERSATION[1], "rejected": {"from": "gpt", "value": "No."}},
        {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "No."},
    ],
    ids=["prompt-messages", "prompt-and-whole", "whole", "hh-rlhf", "sharegpt", "alpaca"],
)
def test_preference_pairs_come_in_many_forms(row):
    assert detect([row]) == "preference" and contents("preference", row) == PAIR


def test_moss_turns_are_a_sample_each_and_stay_in_one_split():
    samples = choose("moss-turns").convert(MOSS)
    assert [len(sample.content.messages) for sample in samples] == [2, 4, 6]
    assert all(sample.content.last for sample in samples) and len({sample.key for sample in samples}) == 1


def test_squad_is_the_sources_prompt():
    prompt = "Read the passage and answer the question below.\n\n### Instruction:\nPassage 0."
    prompt += "\n\n### Input:\nWhich 1?\n\n### Response:"
    assert detect([SQUAD]) == "squad"
    found = contents("squad", SQUAD)
    assert len(found) == 4 and found[1] == Completion(prompt, "01")
    assert contents("squad-first", SQUAD) == [found[0], found[2]]
    flat = {
        "id": "1",
        "title": "t",
        "context": "Passage 0.",
        "question": "Which 1?",
        "answers": {"text": ["01"], "s": [0]},
    }
    assert detect([flat]) == "squad" and contents("squad", flat) == [Completion(prompt, "01")]
    unanswered = {
        "paragraphs": [{"context": "c", "qas": [{"question": "q?", "answers": []}, *SQUAD["paragraphs"][0]["qas"]]}]
    }
    assert (
        contents("squad", unanswered)[0] == Bad("a question without an answer")
        and len(contents("squad", unanswered)) == 3
    )


def test_wikitext_loses_its_spaces_where_asked():
    row = {"text": ' = A = \n \n He said , " no " ( 1 @,@ 000 @.@ 5 well @-@ known ) ; it \'s : fine . \n'}
    assert contents("wikitext-clean", row) == [Text(' = A =\n\nHe said, "no" (1,000.5 well-known); it\'s: fine.\n')]


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("text", {"body": "x"}, "no field 'text'"),
        ("text", {"text": None}, "no field 'text'"),
        ("text", {"text": 3}, "text is not text"),
        ("text", {"text": " \n"}, "an empty text"),
        ("alpaca", {"instruction": "x"}, "no field 'output'"),
        ("alpaca", {"instruction": "x", "output": ""}, "an empty output"),
        ("sharegpt", {"conversations": []}, "conversations is no list of objects"),
        ("sharegpt", {"conversations": CONVERSATION[1:]}, "no question with an answer"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "a turn from 'alien'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": ""}, CONVERSATION[1]]}, "an empty value"),
        ("openai", {"messages": [{"role": "user"}]}, "no field 'content'"),
        ("openai", {"messages": said(USER)}, "no answer to train on"),
        ("openai", {"messages": said(USER, GPT), "tools": "{"}, "tools are not JSON"),
        ("moss", {"chat": []}, "chat is not an object of turns"),
        ("moss", {"chat": {"turn_1": None}}, "no question with an answer"),
        ("moss", {"chat": {"turn_1": {"Human": "x"}}}, "no field 'MOSS'"),
        ("belle", {"instruction": "Hi", "output": "x"}, "instruction is not Human: and Assistant: in turn"),
        ("squad-first", {"context": "x", "question": "y", "answers": {"text": ["z"]}}, "no field 'paragraphs'"),
        ("leetcode", {"code_with_problem": "x"}, "no field 'code_only'"),
        ("preference", {"prompt": "x", "chosen": "y"}, "no field 'rejected'"),
        ("preference", {"chosen": "y", "rejected": "z"}, "chosen and rejected come without a prompt"),
    ],
)
def test_what_is_missing_or_wrong_has_a_reason(name, row, reason):
    with pytest.raises(RowError, match=re.escape(reason)) as caught:
        contents(name, row)
    assert isinstance(caught.value, MissingField) == reason.startswith("no field")


def test_nothing_falls_back():
    with pytest.raises(UserError, match="did you mean 'sharegpt'"):
        choose("sharegtp")
    with pytest.raises(UserError, match="fields question, passage.*--handler"):
        detect([{"question": "x", "passage": "y"}])
    assert contents("text", {"passage": "y"}, text_field="passage") == [Text("y")]
    with pytest.raises(MissingField, match="no field 'pasage'"):
        contents("text", {"passage": "y"}, text_field="pasage")


@pytest.mark.parametrize(
    "name, handler, samples, rejected",
    [
        ("alpaca/alpaca_en_demo.json", "alpaca", 999, 0),
        ("alpaca/alpaca_tiny.derived.parquet", "alpaca", 100, 0),
        ("moss/moss-003-sft-no-tools.sample.jsonl", "moss", 620, 0),
        ("moss/moss-003-sft-no-tools.sample.jsonl", "moss-turns", 3323, 0),
        # 5 without a turn, 11 without a question, 3 with an empty turn
        ("sharegpt/sharegpt_v3_first800.json", "sharegpt", 781, 19),
        ("squad/xquad.en.json", "squad", 1190, 0),
        ("squad/xquad.zh.json", "squad", 1190, 0),
        ("c4/c4_demo.jsonl", "text", 300, 0),
        ("c4/wiki_demo.txt", "text", 30, 0),
        ("tinystories/sample.txt", "text", 2476, 0),
        ("wikitext2/valid.txt", "wikitext", 60, 0),
        ("boolq/dev.first1500.jsonl", None, 1500, 0),
    ],
)
def test_real_data_is_rejected_only_where_it_is_malformed(shared_data, name, handler, samples, rejected):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    source = find([str(shared_data / name)])[0]
    documents = "article" if handler == "wikitext" else "line"
    table = [row for chunk in chunks(source, documents) for row in rows(chunk)]
    assert handler in (None, "moss-turns") or detect(table) == handler
    convert = choose(handler or "text", "text" if handler else "passage").convert
    found, reasons = [], []
    for row in table:
        try:
            found += convert(row)
        except RowError as error:
            reasons.append(str(error))
    assert (len(found), len(reasons)) == (samples, rejected), reasons
    assert not any(isinstance(sample, Bad) for sample in found)
    if handler == "wikitext":
        text = (shared_data / name).read_text()
        assert "".join(sample.content.text for sample in found) == text[text.index(" =") :]
        assert all(TITLE.fullmatch(sample.content.text.split("\n")[0].strip()) for sample in found)
    if handler == "squad":
        articles = json.loads((shared_data / name).read_text())["data"]
        questions = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
        assert [sample.content.answer for sample in found] == [qa["answers"][0]["text"] for qa in questions]


def test_every_handler_says_what_it_reads():
    assert all(handler.about and handler.kind in ("text", "instruction", "preference") for handler in HANDLERS.values())
