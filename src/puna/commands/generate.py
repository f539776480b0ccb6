"""`puna generate`: one prompt or a file of any length, in order, in bounded memory, resumable.

Rows are read as the engine takes them and written as soon as every row before them is written: line i of the output
belongs to row i of the input, and no more than a window of them is held at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from puna.commands.shared_options import SamplingOptions, loading, sampling
from puna.engine.options import EngineOptions
from puna.errors import UserError
from puna.options import argument, convert_all, option
from puna.progress import meter

if TYPE_CHECKING:
    from puna.engine.outputs import Logprob, RequestOutput
    from puna.engine.sampling_params import SamplingParams
    from puna.llm import LLM
    from puna.tokenizer import Tokenizer

LONGEST = 64 << 20  # bytes of a line of input
LONG = 1 << 20  # characters of a prompt, from which on the context is looked at before they are encoded
WINDOW = 4  # rows held, in units of max_num_seqs: the batch stays full behind one long answer
SPELLINGS = {"max_completion_tokens": "max_tokens", "max_new_tokens": "max_tokens"}
Record = dict[str, Any]
Load = Callable[[], tuple["LLM", "SamplingParams"]]


@dataclass(kw_only=True)
class GenerateOptions(EngineOptions, SamplingOptions):
    """Complete one prompt or thousands.

    Prompts are arguments, a text file with one prompt a line, JSONL, or stdin. A JSONL row is {"prompt": "..."} or
    {"messages": [{"role": "user", "content": "..."}]}, with an optional "id", an optional "metadata" that comes out as
    it went in, and the row's own values for the options of how tokens are chosen. JSONL goes in and JSONL comes out, in
    the same order: {"index", "id", "choices", "usage"}, or {"index", "id", "error"} for a bad row, and the rest goes
    on; that is no failure of the run. With --out, a second run skips the rows that are already there.

    Examples:
      puna generate smollm2-135m-instruct "The capital of France is" --max-tokens 16
      puna generate smollm2-135m-instruct --chat "Name three llamas." --n 2 --temperature 0.8 --seed 1
      puna generate smollm2-135m-instruct --file prompts.txt --max-tokens 64
      puna generate smollm2-135m-instruct --file prompts.jsonl --out answers.jsonl
      puna generate smollm2-135m-instruct --file - --jsonl < prompts.jsonl > answers.jsonl
    """

    prompt: tuple[str, ...] = argument("prompts; without any and without --file, all of stdin is one", default=())
    file: str | None = option(None, "prompts: a .jsonl file, a text file with one a line, or - for stdin")
    jsonl: bool = option(False, "--file is JSONL whatever its name, and JSONL is printed")
    out: Path | None = option(None, "write JSONL here; rows that it already holds are not generated again")
    chat: bool = option(False, "a prompt is a user's message: apply the chat template")
    system: str | None = option(None, "system message of --chat")


@dataclass
class Row:
    """One request; `error` says why it has no answer, `output` is its answer once there is one."""

    index: int
    prompt: Any = None  # text, token ids, or messages
    options: Record = field(default_factory=dict)
    carried: Record = field(default_factory=dict)  # "id" and "metadata", which come out as they went in
    error: str | None = None
    output: RequestOutput | None = None


def run(options: GenerateOptions) -> int:
    """Generates for every prompt. A bad row of JSONL becomes a record with an error, and the run ends with 0."""
    from puna.llm import LLM

    _check(options)
    jsonl = options.jsonl or (options.file or "").endswith((".jsonl", ".ndjson"))
    given = sampling(options)
    with ExitStack() as stack:

        @cache
        def load() -> tuple[LLM, SamplingParams]:
            llm = stack.enter_context(LLM(**loading(options)))
            return llm, llm.defaults.merged(given)

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            load()  # first of all: the other ranks stay in there and serve, rank 0 alone reads the input
        lines = stack.enter_context(_prompts(options))
        rows = (_json_row if jsonl and options.file else _text_row)(lines, options)
        if jsonl or options.out or "logprobs" in given or "prompt_logprobs" in given:
            _write_records(rows, options, load)
        else:
            _write_text(rows, options, load)
    return 0


def finished(llm: LLM, params: SamplingParams, rows: Iterable[Row], window: int) -> Iterator[Row]:
    """The rows in their order, each answered or with its error; at most `window` of them are held at once."""
    source, held, asked = iter(rows), deque[Row](), {}
    while True:
        while len(held) < window and (row := next(source, None)) is not None:
            held.append(row)
            if row.error is None:
                try:
                    check_length(llm, row.prompt)
                    asked[llm.submit(row.prompt, params.merged(row.options))] = row
                except UserError as error:
                    row.error = str(error)
        if not held:
            return
        if held[0].error is not None or held[0].output is not None:
            yield held.popleft()
            continue
        for output in llm.step():
            row = asked.pop(output.id)
            row.output, row.error = output, output.error


def check_length(llm: LLM, prompt: Any) -> None:
    """Raises `UserError` for text that no tokens could bring into the context, at once: to encode it takes minutes."""
    parts = prompt if isinstance(prompt, list) else [prompt]
    texts = (part.get("content") if isinstance(part, dict) else part for part in parts)
    size = sum(len(text) for text in texts if isinstance(text, str))
    if size <= LONG or llm.tokenizer is None:
        return
    # One more, since a space that opens a text may not come out again.
    longest = 1 + max(
        len(llm.tokenizer.decode([token], skip_special=False)) for token in range(llm.tokenizer.vocab_size)
    )
    if size > llm.max_model_len * longest:
        raise UserError(
            f"the prompt has {size} characters, more than the context of {llm.max_model_len} tokens can hold;"
            " shorten it"
        )


def resume(path: Path, rows: Iterator[Row]) -> tuple[int, int]:
    """Takes from `rows` those that the file answers already; how many they are, and how many bytes of the file.

    What follows these bytes is the beginning of the next answer, left by a run that was killed. Raises `UserError` for
    a file that holds anything else.
    """
    done = whole = 0
    if not path.exists():
        return 0, 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                ours = _answers(line, done, next(rows, None))
            else:
                head = f'{{"index": {done}, "'.encode()
                ours = line.startswith(head) or head.startswith(line)
            if not ours:
                raise UserError(
                    f"line {done + 1} of {path} is not the answer to row {done + 1} of the input; choose another --out"
                )
            if line.endswith(b"\n"):
                done, whole = done + 1, whole + len(line)
    return done, whole


def _answers(line: bytes, index: int, row: Row | None) -> bool:
    """Whether a line of the output is the record of `row`."""
    try:
        record = json.loads(line)
        return row is not None and (record["index"], record.get("id")) == (index, row.carried.get("id"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def record(row: Row, tokenizer: Tokenizer | None) -> Record:
    """What is printed for a row: its index, what it carried, and its answer in OpenAI's names, or its error."""
    head, output = {"index": row.index, **row.carried}, row.output
    if output is None or row.error is not None:
        return head | {"error": row.error}
    choices = []
    for completion in output.outputs:
        choice = {"index": completion.index, "text": completion.text, "finish_reason": completion.finish_reason}
        if completion.logprobs is not None:
            choice["logprobs"] = [_logprob(entry, tokenizer) for entry in completion.logprobs]
        choices.append(choice)
    usage = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
    }
    tail = {}
    if output.prompt_logprobs is not None:
        tail["prompt_logprobs"] = [_logprob(entry, tokenizer) for entry in output.prompt_logprobs]
    return head | {"choices": choices, "usage": usage} | tail


def _logprob(entry: Logprob, tokenizer: Tokenizer | None) -> Record:
    """A token's log-probability and those of the likeliest tokens in its place, with their texts."""

    def named(token: int, level: float) -> Record:
        text = tokenizer.decode([token], skip_special=False) if tokenizer else None
        return {"token": text, "id": token, "logprob": level}

    token, level, top = entry
    return named(token, level) | {"top": [named(*other) for other in top]}


def _check(options: GenerateOptions) -> None:
    if options.prompt and options.file:
        raise UserError("give prompts as arguments or by --file, not both")
    if not options.prompt and not options.file and sys.stdin.isatty():
        raise UserError("puna generate needs a prompt: as an argument, by --file, or on stdin")
    if options.system is not None and not options.chat:
        raise UserError("--system goes with --chat: a plain prompt has no system message")
    out, file = options.out, options.file
    if out and (not out.absolute().parent.is_dir() or (out.exists() and not out.is_file())):
        raise UserError(f"--out {out} must be a file in a directory that exists")
    if out and file and out.exists() and os.path.exists(file) and out.samefile(file):
        raise UserError(f"--out {out} is the input itself; choose another file")


@contextmanager
def _prompts(options: GenerateOptions) -> Iterator[Iterator[tuple[str, bytes]]]:
    """The prompts or JSON rows, one after the other: where each stands, and its bytes."""
    if options.prompt:
        yield (("the prompt", prompt.encode(errors="surrogateescape")) for prompt in options.prompt)
    elif not options.file:
        yield iter([("stdin", sys.stdin.buffer.read().replace(b"\r\n", b"\n").removesuffix(b"\n"))])
    elif options.file == "-":
        yield _lines(sys.stdin.buffer, "stdin")
    else:
        with open(options.file, "rb") as file:
            yield _lines(file, options.file)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank. Of one that is too long, as much as shows that it is; its rest is passed over."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield f"line {number} of {name}", content.rstrip(b"\r\n")
        while not line.endswith(b"\n") and (line := file.readline(LONGEST)):
            pass


def _decode(where: str, line: bytes) -> str:
    if len(line) >= LONGEST:
        raise UserError(f"{where} is longer than {LONGEST >> 20} MiB")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason}); convert it first") from None


def _text_row(lines: Iterator[tuple[str, bytes]], options: GenerateOptions) -> Iterator[Row]:
    for index, line in enumerate(lines):
        yield Row(index, _ask(_decode(*line), options))


def _json_row(lines: Iterator[tuple[str, bytes]], options: GenerateOptions) -> Iterator[Row]:
    for index, line in enumerate(lines):
        row = Row(index)
        try:
            _fill(row, _decode(*line), options)
        except UserError as error:
            row.error = str(error)
        except RecursionError:
            row.error = "lists or objects are nested too deeply"
        yield row


def _fill(row: Row, line: str, options: GenerateOptions) -> None:
    """Reads a JSON line into `row`; `UserError` says what is wrong with it."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError('not a JSON object with "prompt" or "messages"')
    row.carried = {key: data.pop(key) for key in ("id", "metadata") if key in data}
    prompt, messages = data.pop("prompt", None), data.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise UserError('a row needs "prompt" or "messages", one of the two')
    if messages is not None:
        row.prompt = _with_system(_messages(messages), options.system)
    elif isinstance(prompt, str):
        row.prompt = _ask(prompt, options)
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt) and not options.chat:
        row.prompt = prompt
    else:
        raise UserError('"prompt" is text, or without --chat a list of token ids')
    row.options = convert_all(SamplingOptions, {SPELLINGS.get(key, key): data[key] for key in data}, "the row")


def _ask(prompt: str, options: GenerateOptions) -> Any:
    return _with_system([{"role": "user", "content": prompt}], options.system) if options.chat else prompt


def _messages(messages: Any) -> list[Record]:
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        return messages
    raise UserError('"messages" is a list of {"role": "...", "content": "..."}')


def _with_system(messages: list[Record], system: str | None) -> list[Record]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _write_records(rows: Iterator[Row], options: GenerateOptions, load: Load) -> None:
    done, whole = resume(options.out, rows) if options.out else (0, 0)
    first = next(rows, None)
    if first is None:
        print(f"Nothing left to do: {options.out or 'the input'} has {done} row{'s' * (done != 1)}.", file=sys.stderr)
        return
    if done:
        print(f"{options.out} has {done} row{'s' * (done != 1)} already; going on after them.", file=sys.stderr)
    llm, params = load()
    errors = 0
    to_terminal = options.out is None and sys.stdout.isatty()
    try:
        with (
            _append(options.out, whole) if options.out else nullcontext(sys.stdout) as out,
            meter("Generating", _count(options, done), "rows", quiet=to_terminal) as advance,
        ):
            for row in finished(llm, params, chain([first], rows), WINDOW * options.max_num_seqs):
                out.write(_line(record(row, llm.tokenizer), out.encoding or "utf-8"))
                out.flush()
                errors += row.error is not None
                advance(1)
    except KeyboardInterrupt:
        if options.out:
            print(f"\n{options.out} keeps the rows so far; the same command goes on after them.", file=sys.stderr)
        raise
    if errors:
        what = "1 row" if errors == 1 else f"{errors} rows"
        print(f"{what} could not be answered, as the error in the record says.", file=sys.stderr)


def _append(path: Path, whole: int) -> TextIO:
    """The file opened to go on after its first `whole` bytes."""
    file = path.open("a", encoding="utf-8")
    file.truncate(whole)
    return file


def _line(record: Record, encoding: str) -> str:
    """The record as JSON; escaped where it can't be written as it is, as with half a surrogate pair."""
    text = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return text


def _write_text(rows: Iterator[Row], options: GenerateOptions, load: Load) -> None:
    llm, params = load()
    head = list(islice(rows, 2))
    if len(head) == 1 and params.n == params.num_beams == 1:
        check_length(llm, head[0].prompt)
        for piece in llm.stream(head[0].prompt, params):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        print()
        return
    for row in finished(llm, params, chain(head, rows), WINDOW * options.max_num_seqs):
        if row.output is None or row.error is not None:
            raise UserError(f"prompt {row.index + 1}: {row.error}")
        for completion in row.output.outputs:
            if len(head) > 1 or params.n > 1:
                print(f"==> prompt {row.index + 1}, answer {completion.index + 1} <==")
            print(completion.text, flush=True)


def _count(options: GenerateOptions, done: int) -> int | None:
    """How many rows are left, where that can be known before reading them."""
    if options.prompt:
        return len(options.prompt) - done
    if options.file and os.path.isfile(options.file):
        with open(options.file, "rb") as file:
            return sum(1 for line in file if line.strip()) - done
    return None
