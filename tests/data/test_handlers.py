"""Each handler makes of a row what its dataset's publisher meant, and refuses what it can't use with a reason."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data.handlers.handler import Handler, require_text
from puna.data.handlers.registry import HANDLERS, detect, get_handler, markdown_table
from puna.data.records import TITLE
from puna.data.samples import Chat, Completion, MissingField, Pair, RowError, Sample, Text
from puna.data.source_files import find
from puna.data.sources import BadRow, chunks, rows
from puna.errors import UserError


def contents(name, row, **kw):
    return [sample if isinstance(sample, BadRow) else sample.content for sample in get_handler(name, **kw).convert(row)]


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
    samples = get_handler("moss-turns").convert(MOSS)
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
        contents("squad", unanswered)[0] == BadRow("a question without an answer")
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
        ("sharegpt", {"conversations": []}, "conversations is not a list of objects"),
        ("sharegpt", {"conversations": CONVERSATION[1:]}, "no question with an answer"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "the unknown role 'alien'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": ""}, CONVERSATION[1]]}, "an empty user message"),
        ("openai", {"messages": [{"role": "user"}]}, "no field 'content'"),
        ("openai", {"messages": said(USER)}, "no answer to train on"),
        ("openai", {"messages": said(USER, GPT), "tools": "{"}, "tools that are not JSON"),
        ("moss", {"chat": []}, "chat is not an object of turns"),
        ("moss", {"chat": {"turn_1": None}}, "no question with an answer"),
        ("moss", {"chat": {"turn_1": {"Human": "x"}}}, "no field 'MOSS'"),
        ("belle", {"instruction": "Hi", "output": "x"}, "an instruction that is not Human: and Assistant: in turn"),
        ("squad-first", {"context": "x", "question": "y", "answers": {"text": ["z"]}}, "no field 'paragraphs'"),
        ("leetcode", {"code_with_problem": "x"}, "no field 'code_only'"),
        ("preference", {"prompt": "x", "chosen": "y"}, "no field 'rejected'"),
        ("preference", {"chosen": "y", "rejected": "z"}, "chosen and rejected without a prompt"),
    ],
)
def test_what_is_missing_or_wrong_has_a_reason(name, row, reason):
    with pytest.raises(RowError, match=re.escape(reason)) as caught:
        contents(name, row)
    assert isinstance(caught.value, MissingField) == reason.startswith("no field")


def test_nothing_falls_back():
    with pytest.raises(UserError, match="did you mean 'sharegpt'"):
        get_handler("sharegtp")
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
    convert = get_handler(handler or "text", "text" if handler else "passage").convert
    found, reasons = [], []
    for row in table:
        try:
            found += convert(row)
        except RowError as error:
            reasons.append(str(error))
    assert (len(found), len(reasons)) == (samples, rejected), reasons
    assert not any(isinstance(sample, BadRow) for sample in found)
    if handler == "wikitext":
        text = (shared_data / name).read_text()
        assert "".join(sample.content.text for sample in found) == text[text.index(" =") :]
        assert all(TITLE.fullmatch(sample.content.text.split("\n")[0].strip()) for sample in found)
    if handler == "squad":
        articles = json.loads((shared_data / name).read_text())["data"]
        questions = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
        assert [sample.content.answer for sample in found] == [qa["answers"][0]["text"] for qa in questions]


def test_the_documentation_and_the_help_list_every_handler():
    assert markdown_table() in (Path(__file__).parents[2] / "docs/data.md").read_text()
    assert all(name == handler.name and handler.sample and handler.fields for name, handler in HANDLERS.items())


def test_a_handler_is_a_record_and_a_name_in_the_registry(monkeypatch):
    """Detection, choice and errors follow from the record."""

    def qa(row):
        return [Sample(Completion(require_text(row, "q") + " ", require_text(row, "a")))]

    record = Handler("qa", qa, "instruction", fields=("q", "a"), sample="a completion", needs_template=False)
    monkeypatch.setitem(HANDLERS, "qa", record)
    row = {"q": "Why?", "a": "So."}
    assert detect([row]) == "qa" and contents("qa", row) == [Completion("Why? ", "So.")]
    assert "| `qa` | `q`, `a` | a completion |" in markdown_table()
    with pytest.raises(UserError, match="text, qa"):
        detect([{"b": 1}])


NAMES = sorted(
    {name for handler in HANDLERS.values() for name in (*handler.fields, *handler.optional)}
    | {"role", "from", "content", "value", "weight", "tool_calls", "text", "qas", "Human", "MOSS", "turn_1", "tools"}
)
SPELLINGS = [
    [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    [{"from": "system", "value": ""}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
    [{"role": "system", "content": " "}, {"role": "USER", "content": "Hi"}, {"role": "Assistant", "content": "Hello."}],
    [{"role": "prompter", "content": "Hi"}, {"role": "model", "content": "Hello."}],
    [{"from": "Human", "content": "Hi"}, {"from": " ai ", "content": "Hello."}],
    [{"role": "user", "value": "Hi"}, {"role": "bot", "value": "Hello.", "weight": None}],
]


@pytest.mark.parametrize("turns", SPELLINGS)
@pytest.mark.parametrize("encode", [lambda turns: turns, json.dumps], ids=["list", "json"])
def test_spellings_and_shapes_of_messages_are_one(turns, encode):
    """Whatever the handler, the roles and keys that other tools write are read; an empty system turn is none."""
    wanted = [Chat(said(USER, GPT))]
    for field, name in (("messages", "openai"), ("conversations", "sharegpt")):
        row = {field: encode(turns)}
        assert detect([row]) == name and contents(name, row) == wanted
    pair = {"prompt": encode(turns[:-1]), "chosen": encode(turns[-1:]), "rejected": encode(turns[-1:])}
    assert contents("preference", pair) == [
        Pair(Chat(wanted[0].messages, last=True), Chat(wanted[0].messages, last=True))
    ]
    whole = {"chosen": encode(turns), "rejected": encode(turns)}
    assert contents("preference", whole) == contents("preference", pair)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Puno"}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Puno"}}'},
        {"role": "tool_call", "content": '[{"name": "weather", "arguments": {"city": "Puno"}}]'},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
    ],
)
def test_tool_calls_have_one_shape(turn):
    turns = [{"from": "human", "value": "Hi"}, turn, {"from": "observation", "value": "9"}, CONVERSATION[1]]
    wanted = [*said(USER), {"role": "assistant", "tool_calls": [CALL]}, *said(("tool", "9"), GPT)]
    row = {"conversations": turns, "tools": '[{"name": "weather"}]'}
    assert contents("sharegpt", row) == [Chat(wanted, tools=[{"name": "weather"}])]
    assert contents("openai", {"messages": turns}) == [Chat(wanted)]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": 0}, {"masked": True}])
def test_a_message_can_be_excluded_from_training(flag):
    turns = said(USER, GPT, USER, GPT)
    turns[1] |= flag
    wanted = said(USER, GPT, USER, GPT)
    wanted[1]["train"] = False
    assert contents("openai", {"messages": turns}) == [Chat(wanted)]
    ones = [message | {"weight": 1, "train": True, "masked": False} for message in said(GPT)]
    assert contents("openai", {"messages": said(USER) + ones}) == [Chat(said(USER, GPT))]
    with pytest.raises(RowError, match="no answer to train on"):
        contents("openai", {"messages": turns[:2]})


@pytest.mark.parametrize(
    "extra, reason",
    [
        ({"weight": 0.5}, "a weight of 0.5"),
        ({"train": "yes"}, "a train of yes"),
        ({"masked": 3}, "a masked of 3"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail"),
        ({"content": [{"type": "image_url"}]}, "a part of a message that is not text"),
        ({"role": "robot"}, "the unknown role 'robot'"),
        ({"role": "function_call", "content": "weather()"}, "a function_call that is not JSON"),
    ],
)
def test_what_a_message_asks_for_in_vain_is_a_reason(extra, reason):
    turns = said(USER, GPT)
    turns[1] |= extra
    with pytest.raises(RowError, match=reason):
        contents("openai", {"messages": turns})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "x", "user", "assistant", "[]", "{", "Human: a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=6), st.sampled_from(sorted(HANDLERS)))
def test_no_row_stops_a_handler(row, name):
    """Whatever a row holds, it gives samples or is rejected with a reason; detection finds a handler or says so."""
    with suppress(RowError):
        assert all(isinstance(sample, Sample | BadRow) for sample in get_handler(name).convert(row))
    with suppress(UserError):
        assert detect([row]) in HANDLERS


def test_text_that_looks_like_messages_stays_text():
    row = {"prompt": "[1, 2]", "chosen": '[{"a": 1', "rejected": "[]"}
    chat = contents("preference", row)[0].chosen
    assert chat.messages == said(("user", "[1, 2]"), ("assistant", '[{"a": 1'))
