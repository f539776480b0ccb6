"""The chat: commands, history, what happens when it outgrows the context, Ctrl-C, pipe and terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from launching import SECONDS
from puna.cli import main
from puna.commands import chat
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError


class Parrot:
    """Stands in for the model: a token a character, and every answer is the last message in capitals."""

    max_model_len = 100
    defaults = SamplingParams()

    def __init__(self):
        self.asked, self.params, self.press = [], [], None

    def encode(self, messages):
        return [0] * sum(len(message["content"]) for message in messages), ""

    def stream(self, messages, params):
        self.asked.append([f"{m['role']}: {m['content']}" for m in messages])
        self.params.append(params)
        if len(self.encode(messages)[0]) >= self.max_model_len:
            raise UserError("the prompt is longer than the context")
        for i, letter in enumerate(messages[-1]["content"].upper()):
            if i == self.press:
                os.kill(os.getpid(), signal.SIGINT)
            yield SimpleNamespace(text=letter, token_ids=[0], finish_reason=None)


def talk(*lines, parrot=None, terminal=False, params=None, system=None, verbose=False):
    """The parrot after the conversation."""
    parrot = parrot or Parrot()
    waiting = iter(lines)

    def read():
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    chat.Chat(parrot, params or SamplingParams(), system, verbose, terminal).talk(read)
    return parrot


def test_answers_go_to_stdout_and_the_conversation_grows(capsys):
    parrot = talk("hello\n", "", "again\n")
    assert capsys.readouterr().out == "HELLO\nAGAIN\n"
    assert parrot.asked == [["user: hello"], ["user: hello", "assistant: HELLO", "user: again"]]


@pytest.mark.parametrize("word", ["q", "quit", "exit", "/q", "/exit"])
def test_words_that_leave(word, capsys):
    assert talk("a", word, "b").asked == [["user: a"]]


@pytest.mark.parametrize("word", ["clear", "new", "/clear", "/new"])
def test_words_that_start_over_keep_the_system_message(word, capsys):
    parrot = talk("a", word, "b", system="be")
    assert parrot.asked[1] == ["system: be", "user: b"]
    assert capsys.readouterr().out == "A\nB\n"


def test_system_command(capsys):
    parrot = talk("/system be kind", "a", "/system", "b")
    assert parrot.asked == [["system: be kind", "user: a"], ["user: b"]]


def test_help_and_unknown_commands_are_not_messages(capsys):
    assert talk("/help", "/hlep", "/etc/passwd is what?").asked == [["user: /etc/passwd is what?"]]
    err = capsys.readouterr().err
    assert "/system TEXT" in err and "There is no command /hlep (did you mean 'help'?)" in err


def test_the_oldest_turns_are_dropped_and_it_says_so(capsys):
    parrot = talk(*(letter * 10 for letter in "abcd"), system="s" * 10)
    assert parrot.asked[2][:2] == ["system: " + "s" * 10, "user: " + "a" * 10]
    assert parrot.asked[3] == ["system: " + "s" * 10, "user: bbbbbbbbbb", "assistant: BBBBBBBBBB",
                               "user: cccccccccc", "assistant: CCCCCCCCCC", "user: dddddddddd"]  # fmt: skip
    assert "outgrew the context of 100 tokens: its oldest 2 messages were dropped" in capsys.readouterr().err


def test_an_answer_never_asks_for_more_than_fits(capsys):
    assert talk("a" * 40, params=SamplingParams(max_tokens=80)).params[0].max_tokens == 60
    assert talk("a" * 40, params=SamplingParams(max_tokens=8)).params[0].max_tokens == 8


def test_a_message_that_cannot_fit(capsys):
    with pytest.raises(UserError, match="longer than the context"):
        talk("a" * 200)
    parrot = talk("a" * 200, "b", terminal=True)
    assert parrot.asked[-1] == ["user: b"] and "puna: the prompt is longer" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(capsys):
    parrot, handler = Parrot(), signal.getsignal(signal.SIGINT)
    parrot.press = 2
    talk("hello", "b", parrot=parrot, terminal=True)
    out, err = capsys.readouterr()
    assert out == "HEL\nB\n" and "[stopped]" in err
    assert parrot.asked[1] == ["user: hello", "assistant: HEL", "user: b"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_ends_a_piped_chat():
    parrot = Parrot()
    parrot.press = 2
    with pytest.raises(KeyboardInterrupt):
        talk("hello", "b", parrot=parrot)


def test_verbose_says_how_fast(capsys):
    talk("hello", verbose=True)
    assert re.search(r"\[5 \+ 5 tokens, first after \d+\.\d", capsys.readouterr().err)


def test_a_real_model_through_a_pipe(tiny_checkpoint, monkeypatch, capsys):
    path = tiny_checkpoint()
    given = io.BytesIO(b"\xef\xbb\xbfHello, llama!\nclear\r\nHello, llama!\nq\nnever")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    assert main(["chat", str(path), "--max-tokens", "12", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    from puna.llm import LLM

    llm = LLM(path, dtype="float32")
    answer = llm.chat([{"role": "user", "content": "Hello, llama!"}], llm.defaults.merged({"max_tokens": 12}))[0]
    assert out == (answer.outputs[0].text + "\n") * 2
    assert "A new conversation." in err


def test_options_that_a_chat_cannot_use(capsys):
    assert main(["chat", "m", "--n", "2"]) == 2
    assert "puna chat streams one answer and has no use for --n" in capsys.readouterr().err


def test_piped_input_that_is_not_text_is_named(tiny_checkpoint, monkeypatch, capsys):
    for given, number in ((b"Hello\nna\xefve\n", 2), (b"\xff\xfeH\x00", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert main(["chat", str(tiny_checkpoint()), "--max-tokens", "2"]) == 2
        err = capsys.readouterr().err
        assert f"Line {number} of stdin is not UTF-8 text" in err and "internal" not in err


def test_sampling_options_are_set_between_messages(capsys):
    lines = ["/set", "a", "/set temperature 0.5", "b", "/set top_p 3", "/set temprature 1", "/set n 2", "c"]
    parrot = talk(*lines, params=SamplingParams(max_tokens=9))
    assert [params.temperature for params in parrot.params] == [0.0, 0.5, 0.5]
    assert all(params.top_p == 1.0 and params.n == 1 for params in parrot.params)
    err = capsys.readouterr().err
    for says in ("max_tokens = 9", "temperature = 0.5", "top_p must be", "did you mean 'temperature'", "no use for n"):
        assert says in err, says


def test_a_conversation_is_saved_as_a_row(tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    talk("hello", f"/save {file}", "again", f"/save {file}", "/save", f"/save {tmp_path}/no/where", system="be")
    messages = [("system", "be"), ("user", "hello"), ("assistant", "HELLO")]
    assert json.loads(file.read_text()) == {"messages": [{"role": r, "content": c} for r, c in messages]}
    err = capsys.readouterr().err
    assert "has 3 messages" in err and "is there already" in err and "needs a file" in err and "Cannot write" in err


@pytest.mark.slow
def test_a_terminal_with_history(tiny_checkpoint):
    command = [sys.executable, "-m", "puna", "chat", str(tiny_checkpoint()), "--max-tokens", "4"]
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stderr=slave, stdout=subprocess.PIPE, text=True)
    os.close(slave)
    try:
        seen = expect(master, ">")
        os.write(master, b"Hello\r")
        seen = expect(master, ">", seen)
        os.write(master, b"\x1b[A\r")  # up, enter: the same message again
        seen = expect(master, ">", seen)
        os.write(master, b"\x03")  # Ctrl-C at the prompt
        process.wait(SECONDS)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == 130
    assert process.stdout.read().count("\n") == 2
    assert seen.count("Hello") >= 2


def expect(master: int, text: str, seen: str = "", seconds: float = SECONDS) -> str:
    """Reads from the terminal until `text` comes after what was seen already, and the line is quiet."""
    start, end = len(seen), time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([master], [], [], 0.5)[0]:
            chunk = os.read(master, 4096).decode(errors="replace")
            seen += chunk
            if "\x1b[6n" in chunk:  # the prompt asks where the cursor is
                os.write(master, b"\x1b[1;1R")
        elif text in seen[start:]:
            return seen
    raise AssertionError(f"{text!r} never came: {seen[start:]!r}")
