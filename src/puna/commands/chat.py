"""`puna chat`: a conversation on the terminal or through a pipe. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.engine.options import EngineOptions
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError, nearest
from puna.files import write_text
from puna.options import convert_all, option, overrides

if TYPE_CHECKING:
    from puna.llm import LLM

Message = dict[str, str]
LEAVE, START_OVER = ("q", "quit", "exit"), ("clear", "new")
HELP = """q, quit, exit   leave (Ctrl-D too; Ctrl-C stops an answer)
clear, new      start over
/system TEXT    set the system message and start over; without TEXT remove it
/set NAME VALUE change a sampling option, as in /set temperature 0.7; without NAME show them
/save FILE      write the conversation as a row of JSONL
/help           this list
Esc Enter       begin a new line in a message"""
COMMANDS = (*LEAVE, *START_OVER, "system", "set", "save", "help")
UNUSED = ("n", "num_beams", "logprobs", "prompt_logprobs")  # options that make no sense for one streamed answer


@dataclass(kw_only=True)
class ChatOptions(EngineOptions):
    """Talk with a model.

    The answer streams to stdout, everything else goes to stderr. In the chat: q, quit or exit leave; clear or new start
    over; /system TEXT sets the system message; /set NAME VALUE a sampling option; /help lists all. Lines may be piped
    in. A chat that outgrows the context drops its oldest turns and says so.

    Examples:
      puna chat smollm2-135m-instruct
      puna chat ./my-model --system "Answer in one line." --temperature 0.7 --top-p 0.9
      echo "What is the capital of France?" | puna chat smollm2-135m-instruct
    """

    system: str | None = option(None, "system message; the template's own when not given")
    verbose: bool = option(False, "print the number of tokens and the speed after each answer")
    sampling: dict[str, Any] = overrides(SamplingParams)


def run(options: ChatOptions) -> int:
    """Chats until the user leaves or the input ends."""
    from puna.llm import LLM

    given = options.sampling
    SamplingParams().merged(given)  # refuses bad values before the model is loaded
    for name in UNUSED:
        if name in given:
            raise UserError(f"puna chat streams one answer and has no use for --{name.replace('_', '-')}; omit it.")
    with LLM(**options.arguments(), quiet=False) as llm:
        terminal = sys.stdin.isatty()
        if terminal:
            _note("Type a message, /help for the commands, q to leave.")
        Chat(llm, llm.defaults.merged(given), options.system, options.verbose, terminal).talk(_reader(terminal))
    return 0


class Chat:
    """The messages so far and what is done with each new line."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, verbose: bool, terminal: bool) -> None:
        self.llm, self.params, self.verbose, self.terminal = llm, params, verbose, terminal
        self.messages: list[Message] = []
        self.start_over(system)

    def start_over(self, system: str | None) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def talk(self, read: Callable[[], str]) -> None:
        """Answers line after line until a word to leave or the end of the input."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            if line in LEAVE or line.removeprefix("/") in LEAVE:
                return
            if not line or self.command(line):
                continue
            try:
                self.answer(line)
            except UserError as error:
                if not self.terminal:
                    raise
                self.messages.pop()
                _note(f"puna: {error}")

    def command(self, line: str) -> bool:
        """Whether `line` was a command, which is then done."""
        if line.removeprefix("/") in START_OVER:
            self.start_over(self.system)
            _note("A new conversation.")
            return True
        match = re.fullmatch(r"/(\w+)(?:\s+(.*))?", line, re.DOTALL)
        if not match:
            return False
        name, text = match.groups()
        if name == "system":
            self.start_over(text)
            _note("The system message is set." if text else "There is no system message.")
        elif name == "set":
            self.set_option(text or "")
        elif name == "save":
            self.save(text or "")
        elif name == "help":
            _note(HELP)
        else:
            _note(f"There is no command /{name}{nearest(name, COMMANDS)} (see /help).")
        return True

    def set_option(self, text: str) -> None:
        """Change one sampling option; a bad one is refused and changes nothing. Without text, show all that are set."""
        name, _, value = text.strip().partition(" ")
        if name and value:
            try:
                given = convert_all(SamplingParams, {name: value.strip()}, "/set")
                if unused := [entry for entry in given if entry in UNUSED]:
                    raise UserError(f"puna chat streams one answer and has no use for {unused[0]}.")
                self.params = self.params.merged(given)
            except UserError as error:
                _note(f"puna: {error}")
                return
        default = SamplingParams()
        values = {entry.name: getattr(self.params, entry.name) for entry in fields(self.params)}
        changed = [f"{key} = {value!r}" for key, value in values.items() if value != getattr(default, key)]
        _note(", ".join(changed) or "All sampling options have their defaults.")

    def save(self, file: str) -> None:
        """Write the conversation as one row of JSONL, which `puna generate --file` and `puna data prepare` read."""
        path = Path(file.strip()).expanduser()
        if not file.strip() or path.exists():
            _note(
                f"puna: {path} is there already; choose another name." if file.strip() else "puna: /save needs a file."
            )
            return
        try:
            write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            _note(f"puna: Cannot write {path}: {error.strerror}.")
            return
        _note(f"{path} has {len(self.messages)} messages.")

    def answer(self, line: str) -> None:
        """Streams the answer to `line` to stdout and remembers both; Ctrl-C keeps what has come so far."""
        self.messages.append({"role": "user", "content": line})
        prompt_tokens, params = self.fit()
        start, first, tokens, text = time.perf_counter(), 0.0, 0, ""
        deltas = self.llm.stream(self.messages, params)
        with _ctrl_c() as pressed:
            for delta in deltas:
                first = first or time.perf_counter() - start
                tokens += len(delta.token_ids)
                text += delta.text
                sys.stdout.write(delta.text)
                sys.stdout.flush()
                if pressed:
                    break
        deltas.close()  # aborts the request when it was stopped
        print(flush=True)
        if pressed:
            if not self.terminal or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun ends all ranks
                raise KeyboardInterrupt
            _note("[stopped]")
        self.messages.append({"role": "assistant", "content": text})
        if self.verbose:
            seconds = time.perf_counter() - start
            rate = (tokens - 1) / (seconds - first) if tokens > 1 and seconds > first else 0.0
            _note(f"[{prompt_tokens} + {tokens} tokens, first after {first:.2f} s, then {rate:.1f} tokens/s]")

    def fit(self) -> tuple[int, SamplingParams]:
        """Drop the oldest turns until an answer fits. Returns the prompt's length and the sampling parameters."""
        limit = self.llm.max_model_len
        reserved = min(self.params.max_tokens or limit // 4, limit // 2)
        dropped = 0
        while True:
            length = len(self.llm.encode(self.messages)[0])
            first = 1 if self.system else 0
            if length + reserved <= limit or len(self.messages) <= first + 1:
                break
            del self.messages[first : first + 2]  # a question and its answer
            dropped += 2
        if dropped:
            _note(f"The chat outgrew the context of {limit} tokens: its oldest {dropped} messages were dropped.")
        most = max(limit - length, 1)
        return length, replace(self.params, max_tokens=min(self.params.max_tokens or most, most))


def _reader(terminal: bool) -> Callable[[], str]:
    """Reads a line, with editing and arrow-key history on a terminal; raises EOFError at the end."""
    if not terminal:
        lines = enumerate(sys.stdin.buffer, 1)

        def read_line() -> str:
            number, line = next(lines, (0, b""))
            if not number:
                raise EOFError
            try:
                return (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"Line {number} of stdin is not UTF-8 text ({error.reason}); convert it first."
                ) from None

        return read_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr), key_bindings=keys)
    return lambda: session.prompt("> ")


@contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """Collects Ctrl-C instead of raising it in the middle of an engine step; a second one is raised as usual."""
    pressed: list[bool] = []

    def press(signum: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
