"""Special tokens that messages spell stay plain text, tool calls are rendered as the template takes them."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from conftest import CORPUS, write_tokenizer
from puna.errors import UserError
from puna.tokenizer import Tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>", "<s>")
PIECES = st.sampled_from([*SPECIAL, "<|im", "_end|>", "<", ">", " ", "\n", "hi", "it's", "1 < 2", "<|im_ end|>", "🦙"])
TEXT = st.lists(PIECES, max_size=6).map("".join)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte_level")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 8), model_writer=model, model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"legacy": True, "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<done>"]})
    )
    return Tokenizer.load(folder, template="chatml")


@pytest.mark.parametrize("kind", ["byte_level", "spm"])
@given(contents=st.lists(TEXT, min_size=1, max_size=3))
def test_only_the_templates_special_tokens_count(request, kind, contents):
    """Each stretch between the template's own special tokens has the ids of plain text."""
    tokenizer = request.getfixturevalue(kind)
    start, end = tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")
    expected = [tokenizer.bos_id] if tokenizer.add_bos else []
    for content in contents:
        expected += [start, *tokenizer.encode(f"user\n{content}", bos=False, special=False), end]
        expected += tokenizer.encode("\n", bos=False, special=False)
    messages = [{"role": "user", "content": content} for content in contents]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == expected
    allowed = tokenizer.encode_chat(messages, add_generation_prompt=False, special=True)
    assert allowed == tokenizer.encode(tokenizer.render(messages, add_generation_prompt=False), bos=False)


@given(content=TEXT)
def test_offsets_are_those_of_the_text(byte_level, content):
    rendered = byte_level.render_chat([{"role": "user", "content": content}])
    ids, offsets = byte_level.encode_offsets(rendered.text, guards=rendered.guards)
    assert rendered.text == byte_level.render([{"role": "user", "content": content}])
    for index, (begin, end) in zip(ids, offsets, strict=True):
        if index in (byte_level.id("<|im_start|>"), byte_level.id("<|im_end|>")):
            assert rendered.text[begin:end] == byte_level.token(index)
        elif rendered.text[begin:end].isascii():
            assert byte_level.decode([index]) == rendered.text[begin:end]
    assert byte_level.decode(ids, skip_special=False) == rendered.text


JOINS = [
    "{{ messages[0].content + messages[1].content }}",
    "{{ '<|im' + messages[1].content }}{{ messages[0].content }}",
    "{{ (messages[0].content | trim) ~ (messages[1].content | trim) }}",
    "{{ '<' + messages[0].name + '>' }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ [messages[0].content, messages[1].content, '<|im_end|>'] | tojson(ensure_ascii=true) }}",
    "{{ tools | tojson }}{{ documents[0].text }}",
]


@pytest.mark.parametrize("source", JOINS)
def test_no_special_token_comes_of_the_template_and_a_message(byte_level, tmp_path, source):
    (tmp_path / "own.jinja").write_text(source)
    tokenizer = byte_level.with_template(str(tmp_path / "own.jinja"))
    spelled = {"text": "a<|im_end|>b"}
    messages = [
        {"role": "user", "content": " <|im", "name": "|im_end|"},
        {"role": "user", "content": "_end|> "},
    ]
    ids = tokenizer.encode_chat(messages, tools=[spelled] if "tools" in source else None, documents=[spelled])
    wanted = source.count("'<|im_end|>'")
    assert ids.count(tokenizer.id("<|im_end|>")) == wanted


def test_a_quote_and_a_tag_reach_the_template_unchanged(byte_level, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{% if '</think>' in messages[0].content %}{{ messages[0].content.split('</think>')[-1] | length }}{% endif %}"
    )
    tokenizer = byte_level.with_template(str(tmp_path / "own.jinja"))
    chat = tokenizer.render_chat([{"role": "user", "content": "<think>a < b</think>yes"}])
    assert chat.text == "3" and chat.guards == ()


# Tool calls

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": None}}]}
TEMPLATES = {
    "tojson": "{{ messages[1].tool_calls[0].function.arguments | tojson }}",
    "named": "{% set f = messages[1].tool_calls[0].function %}{{ {'n': f.name, 'p': f.arguments} | tojson }}",
    "items": "{% for k, v in messages[1].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    "added": "{{ '<call>' + messages[1].tool_calls[0].function.arguments + '</call>' }}",
    "joined": "{{ '<call>' ~ messages[1].tool_calls[0].function.arguments ~ '</call>' }}",
    "both": "{% set a = messages[1].tool_calls[0].function.arguments %}{{ a if a is string else a | tojson }}",
}
EXPECTED = {
    "tojson": '{"city": "Puno"}',
    "named": '{"n": "w", "p": {"city": "Puno"}}',
    "items": "city=Puno",
    "added": '<call>{"city": "Puno"}</call>',
    "joined": '<call>{"city": "Puno"}</call>',
    "both": '{"city": "Puno"}',
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("arguments", [{"city": "Puno"}, '{"city": "Puno"}'])
def test_arguments_are_what_the_template_takes(byte_level, tmp_path, name, arguments):
    (tmp_path / "own.jinja").write_text(TEMPLATES[name])
    tokenizer = byte_level.with_template(str(tmp_path / "own.jinja"))
    call = json.loads(json.dumps(CALL))
    call["tool_calls"][0]["function"]["arguments"] = arguments
    messages = [{"role": "user", "content": "hi"}, call]
    assert tokenizer.render(messages) == tokenizer.render_chat(messages).text == EXPECTED[name]
    assert call["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_spell_no_special_tokens(byte_level, tmp_path, name):
    (tmp_path / "own.jinja").write_text(TEMPLATES[name] + "<|im_end|>")
    tokenizer = byte_level.with_template(str(tmp_path / "own.jinja"))
    for arguments in ({"a": "<|im_end|>"}, '{"a": "<|im_end|>"}', '{"a": "\\u003c|im_end|>"}'):
        call = json.loads(json.dumps(CALL))
        call["tool_calls"][0]["function"]["arguments"] = arguments
        ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}, call])
        assert ids.count(tokenizer.id("<|im_end|>")) == 1


def test_what_the_template_would_drop_is_refused(byte_level):
    call = json.loads(json.dumps(CALL))
    with pytest.raises(UserError, match="Message 2 calls tools, for which the chat template has no place"):
        byte_level.encode_chat([{"role": "user", "content": "hi"}, call])
    with pytest.raises(UserError, match="no place for tools"):
        byte_level.encode_chat([{"role": "user", "content": "hi"}], tools=[{"name": "w"}])


def test_a_missing_content_is_not_written_as_none(byte_level, tmp_path):
    calls = "{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}"
    source = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    (tmp_path / "own.jinja").write_text(source)
    tokenizer = byte_level.with_template(str(tmp_path / "own.jinja"))
    assert tokenizer.render([{"role": "user", "content": "None "}, CALL]) == "None [w]"


# End tokens


def test_the_token_that_the_template_writes_after_an_answer_ends_it(spm, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + ' <done>\n' }}{% endfor %}")
    assert spm.id("<done>") not in spm.stop_ids
    assert spm.with_template(str(own)).stop_ids == (*spm.stop_ids, spm.id("<done>"))
    own.write_text("{{ raise_exception('no') }}")
    assert spm.with_template(str(own)).stop_ids == spm.stop_ids


def test_an_unfinished_message_is_continued(byte_level):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a </s> b "}]
    rendered = byte_level.render_chat(messages, continue_final_message=True)
    assert rendered.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na </s> b "
