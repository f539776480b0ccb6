"""Chat templates give what transformers and the published prompts give, and can neither escape nor run wild."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, write_tokenizer
from puna.errors import UserError
from puna.tokenizer import Tokenizer, chat_template
from puna.tokenizer.builtin_templates import BUILTIN
from puna.tokenizer.chat_template import render

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 1 + 1? "},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Naïve 🦙?"},
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chatml")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def transformers_of(tokenizer: Tokenizer, folder):
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def says(source: str, messages=HELLO, **variables) -> str:
    return render(source, messages, {"add_generation_prompt": True, "tools": None} | variables)


# As transformers


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def test_chatml_equals_transformers(chatml, tmp_path):
    theirs = transformers_of(chatml, tmp_path)

    @settings(max_examples=100)
    @given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=6))
    def check(turns):
        messages = [{"role": role, "content": content} for role, content in turns]
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert chatml.render(messages, add_generation_prompt=prompt) == text
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert chatml.encode_chat(messages, add_generation_prompt=prompt) == ids

    check()
    assert chatml.chat_template == CHATML and chatml.template_name == "checkpoint"


def test_llama3_own_template_equals_transformers_and_the_builtin(shared_data, tmp_path):
    tokenizer = Tokenizer.load(shared_data / "tokenizers/llama3")
    theirs = transformers_of(tokenizer, tmp_path)
    for messages in (HELLO, CHAT, CHAT[:3]):
        ours = tokenizer.render(messages)
        assert ours == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours == tokenizer.with_template("llama3").render(messages)
        ids = tokenizer.encode_chat(messages)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id


DIALECT = """
{%- set ns = namespace(count=0, names=[]) -%}
{%- macro item(message, last=false) -%}
{{ message['role'] | upper }}:{{ message.content | trim | replace('\n', ' ') }}{{ ';' if not last }}
{%- endmacro -%}
{%- for message in messages if message.content -%}
    {%- if loop.index > 3 %}{% break %}{% endif -%}
    {%- set ns.count = ns.count + loop.index0 * 2 ** 2 -%}
    {{- item(message, loop.last) -}}
    {% generation %}<{{ message['content'].split(' ')[0] ~ loop.index }}>{% endgeneration %}
{%- endfor %}
{{ tools | tojson }} {{ tools[0] | tojson(indent=2) }} {{ {'a': 'é<&', 'b': [1, none, true]} | tojson }}
{{ ns.count }} {{ '%s=%03d' | format('x', 7) }} {{ 'ab' * 3 }} {{ [1, 2] + [3] }} {{ (1, 2)[1] }} {{ 7 % 4 }}
{{ messages | map(attribute='role') | unique | list | join(', ') }} {{ range(3) | list }} {{ dict(k=1) }}
{%- for key, value in {'p': 1, 'q': 2}.items() %} {{ key }}={{ value }}{% endfor %}
{%- if documents is defined and documents is none %} no documents{% endif %} {{ custom }} {{ eos_token }}
{{ messages[0]['content'].startswith('Be') }} {{ strftime_now('%Y')[:1] }} {{ 'x'.ljust(4, '.') }} {{ messages[-1:] }}
"""


def test_the_dialect_is_transformers(chatml, tmp_path):
    theirs = transformers_of(chatml, tmp_path)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "é": "<&'\">"}}}]
    expected = theirs.apply_chat_template(
        CHAT, tools=tools, chat_template=DIALECT, tokenize=False, custom="own", add_generation_prompt=True
    )
    assert says(DIALECT, CHAT, tools=tools, custom="own", eos_token=theirs.eos_token) == expected
    assert says("{{ documents[0].title }}", documents=[{"title": "T"}]) == "T"


def test_parts_of_text_are_joined_and_tool_calls_need_no_content():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert says("{{ messages[0].content }}", parts) == "a\nb"
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert says("{{ messages[0].tool_calls[0].name }}", call) == "f"


# The published prompts

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@pytest.mark.parametrize(
    "name, messages, expected",
    [
        ("alpaca", HELLO, ALPACA.format(instruction="Hello")),
        (
            "alpaca",
            [{"role": "user", "content": "Sum up.", "input": "A text."}],
            ALPACA_INPUT.format(instruction="Sum up.", input="A text."),
        ),
        (
            "alpaca",
            [{"role": "user", "content": "Sum up.", "input": ""}],
            ALPACA.format(instruction="Sum up."),
        ),
        (
            "alpaca",
            CHAT[:2],
            "Be brief.\n\n### Instruction:\n What is 1 + 1? \n\n### Response:",
        ),
        ("llama2", HELLO, "<s>[INST] Hello [/INST]"),
        (
            "llama2",
            CHAT,
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n What is 1 + 1? [/INST] 2 </s><s>[INST] Naïve 🦙? [/INST]",
        ),
        (
            "vicuna",
            CHAT[1:],
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
            "USER:  What is 1 + 1?  ASSISTANT: 2</s>USER: Naïve 🦙? ASSISTANT:",
        ),
        ("vicuna", CHAT[:2], "Be brief. USER:  What is 1 + 1?  ASSISTANT:"),
        (
            "chatml",
            CHAT[:2],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n What is 1 + 1? <|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            CHAT[:2],
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1 + 1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_builtins_are_the_published_prompts(name, messages, expected):
    assert says(BUILTIN[name], messages, bos_token="<s>", eos_token="</s>") == expected


def test_a_chosen_template_is_saved_with_its_bos(chatml, tmp_path):
    chosen = chatml.with_template("alpaca")
    assert chosen.template_name == "alpaca" and chosen.render(HELLO) == ALPACA.format(instruction="Hello")
    chosen.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == chosen.chat_template
    assert chosen.to_gguf()["tokenizer.chat_template"] == chosen.chat_template
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with_bos = Tokenizer.load(tmp_path, template="vicuna")
    ids = with_bos.encode_chat(HELLO)
    assert ids[0] == with_bos.bos_id and ids.count(with_bos.bos_id) == 1
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(tmp_path, template=str(tmp_path / "own.jinja")).render(HELLO) == "Hello!"


def test_no_template_is_an_error_that_names_the_builtins(chatml, tmp_path):
    chatml.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = Tokenizer.load(tmp_path)
    assert bare.chat_template is None and bare.template_name is None
    with pytest.raises(UserError, match="no chat template.*alpaca, chatml, llama2, llama3 or vicuna"):
        bare.render(HELLO)
    with pytest.raises(UserError, match="no chat template called 'lama2' .did you mean 'llama2'"):
        bare.with_template("lama2")


# Bad conversations


@pytest.mark.parametrize(
    "messages, says_what",
    [
        ([], "list of messages"),
        ("Hello", "list of messages"),
        (HELLO[0], "list of messages"),
        (["Hello"], "Message 1 must be a dict"),
        ([{"content": "x"}], "Message 1 has the role None"),
        ([*HELLO, {"role": "asistant", "content": "x"}], "Message 2 has the role 'asistant' .did you mean 'assistant'"),
        ([{"role": "user"}], "Message 1 needs a content that is text"),
        ([{"role": "user", "content": 3}], "Message 1 needs a content that is text, not int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts that are not text"),
        ([{"role": "user", "content": "x", "extra": object()}], "plain JSON data"),
    ],
)
def test_bad_messages_are_named(messages, says_what):
    with pytest.raises(UserError, match=says_what):
        says("x", messages)


@pytest.mark.parametrize("name", ["alpaca", "llama2", "vicuna"])
def test_turns_out_of_order_are_refused(name):
    with pytest.raises(UserError, match="must alternate"):
        says(BUILTIN[name], HELLO + HELLO, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "source, says_what",
    [
        ("{{ raise_exception('Only one turn.') }}", "refused this conversation: Only one turn."),
        ("{{ raise_exception('two\nlines') }}", "refused this conversation: two lines."),
        ("{{ raise_exception('\x1b[31m red \x9b\u202e') }}", "conversation: \ufffd\\[31m red \ufffd\ufffd."),
        ("{{ raise_exception('long' * 1000000) }}", "conversation: (long){75}\\.$"),
        ("{{ strftime_now('%Y' * 1000000) }}", "formats a date by more than 200"),
        ("{{ strftime_now('%99999999Y') }}", "formats a date"),
        ("{% for %}", "not valid Jinja"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("x" * (chat_template.MAX_SOURCE + 1), "more than the 262,144"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "not valid Jinja"),
    ],
)
def test_template_errors_are_one_sentence(source, says_what):
    with pytest.raises(UserError, match=says_what) as caught:
        says(source)
    assert "\n" not in str(caught.value)


# The sandbox


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ messages.__class__.__base__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ['{0.__class__.__mro__}']|map('format', 1)|first }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ (lambda: 1)() }}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_of_python_is_reached(source):
    try:
        reached = says(source)
    except UserError:
        return
    assert reached in ("", "{0.__class__.__mro__}")  # an unsafe attribute is undefined, and undefined prints nothing


GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(80) %%}%s{%% endfor %%}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(20000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ [[1] * 99999] * 99999 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ [1] | batch(999999999, 'x') | list }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 100000 %}{{ range(99999) | map('default', a) | map('replace', '0', a) | list }}",
        "{{ (['a' * 1000] * 99999) | join('b' * 1000) }}",
        "{{ lipsum(n=99999) }}",
        "{{ range(99999) | join('b' * 100000) }}",
        "{{ range(99999) | map('string') | join('b' * 100000) }}",
        "{{ 'a'.encode().ljust(999999999) }}",
        "{{ (1).to_bytes(999999999, 'big') }}",
        "{{ 9 ** 9 ** 9 }}",
        GROW % ("9", "{% set ns.x = ns.x * ns.x %}"),
        GROW % ("'abc'", "{% set ns.x = ns.x + ns.x %}"),
        GROW % ("'abc'", "{% set ns.x = ns.x ~ ns.x %}"),
        GROW % ("'abc'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        GROW % ("[1]", "{% set ns.x = ns.x + ns.x %}"),
        GROW % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
        GROW % ("[1]", "{% set ns.x = (ns.x, ns.x) %}"),
        GROW % ("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
        GROW % ("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    ],
)
def test_a_template_that_runs_wild_is_stopped(monkeypatch, source):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    start = time.thread_time()
    with pytest.raises(UserError):
        says(source)
    assert time.thread_time() - start < 20  # what a single step of a template may cost at most, with a wide margin


@pytest.mark.parametrize("last", ["list | length", "batch(9) | list", "join"])
def test_what_comes_one_by_one_is_bounded_before_it_is_collected(monkeypatch, last):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1e9)  # its size stops it, however slow the machine is
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="builds more than"):
            says("{{ range(99999) | map('string') | map('center', 9999) | " + last + " }}")
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_long_conversation_is_far_from_the_bounds(chatml):
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 1000} for i in range(400)]
    assert len(chatml.render(messages)) > 2_000_000
