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
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from puna.commands.generate_input import Record, Row, RowReader, open_lines
from puna.engine.options import EngineOptions
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError
from puna.files import sha256
from puna.options import argument, option, overrides
from puna.progress import meter

if TYPE_CHECKING:
    from puna.engine.outputs import Logprob
    from puna.llm import LLM
    from puna.tokenizer import Tokenizer

WINDOW = 4  # rows held, in units of max_num_seqs: the batch stays full behind one long answer
Load = Callable[[], tuple["LLM", SamplingParams]]


@dataclass(kw_only=True)
class GenerateOptions(EngineOptions):
    """Complete one prompt or thousands.

    Prompts are arguments, a text file with one prompt a line, JSONL, or stdin. A JSONL row is {"prompt": "..."} or
    {"messages": [{"role": "user", "content": "..."}]}, with optional "id" and "metadata", which are copied to the
    record, and the row's own sampling options. The output is JSONL in the same order:
    {"index", "id", "choices", "usage"}, or {"index", "id", "error"} for a bad row, which doesn't fail the run. With
    --out, a second run skips the rows that are already there.

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
    out: Path | None = option(
        None, "write JSONL here; rows that it already holds are not generated again", writes="file"
    )
    chat: bool = option(False, "a prompt is a user's message: apply the chat template")
    system: str | None = option(None, "system message of --chat")
    sampling: Record = overrides(SamplingParams)


def run(options: GenerateOptions) -> int:
    """Generates for every prompt. Exit code 0 where each row has its record; 2 where a prompt failed in plain text."""
    from puna.llm import LLM
    from puna.loading import check_params

    _check(options)
    jsonl = options.jsonl or (options.file or "").endswith((".jsonl", ".ndjson"))
    given = options.sampling
    params = SamplingParams().merged(given)  # refuses bad values before the model is loaded
    if given and not jsonl:  # rows of JSONL may have other ones
        check_params(options, params)
    with ExitStack() as stack:

        @cache
        def load() -> tuple[LLM, SamplingParams]:
            llm = stack.enter_context(LLM(**options.arguments(), quiet=False))
            return llm, llm.defaults.merged(given)

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            load()  # first of all: the other ranks serve from there on, and rank 0 alone reads the input
        lines = stack.enter_context(open_lines(options.prompt, options.file))
        fingerprint = _run_fingerprint(options, given) if options.out else None
        rows = RowReader(bool(jsonl and options.file), options.chat, options.system, fingerprint).rows(lines)
        if jsonl or options.out or "logprobs" in given or "prompt_logprobs" in given:
            _write_records(rows, options, load)
            return 0
        return _write_text(rows, load, options.max_num_seqs)


def _run_fingerprint(options: GenerateOptions, given: Record) -> str:
    """A hash of the model and of the options of the run that decide answers."""
    from puna.weights.fingerprint import checkpoint_fingerprint

    model = checkpoint_fingerprint(options.model, revision=options.revision, adapter=options.adapter)
    template = options.template
    if template and os.path.isfile(template):
        template = sha256(template)
    loaded = [options.dtype, options.load_format, options.quantization, options.max_model_len, options.add_bos]
    return json.dumps([model, template, loaded, given], sort_keys=True)


def finished(llm: LLM, params: SamplingParams, rows: Iterable[Row], window: int) -> Iterator[Row]:
    """The rows in their order, each answered or with its error; at most `window` of them are held at once."""
    source, held, asked = iter(rows), deque[Row](), {}
    while True:
        while len(held) < window and (row := next(source, None)) is not None:
            held.append(row)
            if row.error is None:
                try:
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


def resume(path: Path, rows: Iterator[Row]) -> tuple[int, int]:
    """Take from `rows` those that the file answers already. Returns how many they are, and their bytes in the file.

    What follows these bytes is the beginning of the next record, left by a run that was killed. Raises UserError for a
    file that holds anything else, and for a record that was made from another prompt, by another model or with other
    options.
    """
    done = size = 0
    if not path.exists():
        return 0, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                head = f'{{"index": {done}, "'.encode()
                if not (line.startswith(head) or head.startswith(line)):
                    raise _foreign(path, done)
                break
            _check_record(path, line, done, next(rows, None))
            done, size = done + 1, size + len(line)
    return done, size


def _check_record(path: Path, line: bytes, index: int, row: Row | None) -> None:
    """Raise UserError unless a line of the output is the record of `row`."""
    try:
        record = json.loads(line)
        if row is None or (record["index"], record.get("id")) != (index, row.carried.get("id")):
            raise _foreign(path, index)
        if record.get("fingerprint") != row.fingerprint:
            raise UserError(
                f"Line {index + 1} of {path} was made from another prompt, by another model or with other options;"
                " choose another --out."
            )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _foreign(path, index) from None


def _foreign(path: Path, index: int) -> UserError:
    return UserError(
        f"Line {index + 1} of {path} is not the answer to row {index + 1} of the input; choose another --out."
    )


def record(row: Row, tokenizer: Tokenizer | None) -> Record:
    """The output record of a row: its index, id and metadata, and its answer in OpenAI's names, or its error."""
    head, output = {"index": row.index, **row.carried}, row.output
    if row.fingerprint is not None:
        head["fingerprint"] = row.fingerprint
    if output is None or row.error is not None:
        return head | {"error": row.error}
    choices = []
    for completion in output.outputs:
        choice = {"index": completion.index, "text": completion.text, "finish_reason": completion.finish_reason}
        if completion.logprobs is not None:
            choice["logprobs"] = [_logprob(entry, tokenizer) for entry in completion.logprobs]
        choices.append(choice)
    usage = {"prompt_tokens": output.num_prompt_tokens, "completion_tokens": output.num_output_tokens}
    tail = {}
    if output.prompt_logprobs is not None:
        tail["prompt_logprobs"] = [_logprob(entry, tokenizer) for entry in output.prompt_logprobs]
    return head | {"choices": choices, "usage": usage} | tail


def _logprob(entry: Logprob, tokenizer: Tokenizer | None) -> Record:
    """A token's log-probability and those of the likeliest tokens in its place, with their texts and bytes.

    The text keeps the space that opens a word; bytes that are only a part of a character are U+FFFD in it.
    """

    def named(token: int, level: float) -> Record:
        spelled = tokenizer.token_bytes(token) if tokenizer else None
        text = None if spelled is None else spelled.decode("utf-8", "replace")
        return {"token": text, "id": token, "logprob": level, "bytes": None if spelled is None else list(spelled)}

    token, level, top = entry
    return named(token, level) | {"top": [named(*other) for other in top]}


def _check(options: GenerateOptions) -> None:
    if options.prompt and options.file:
        raise UserError("Give prompts as arguments or by --file, not both.")
    if not options.prompt and not options.file and sys.stdin.isatty():
        raise UserError("puna generate needs a prompt: as an argument, by --file, or on stdin.")
    if options.system is not None and not options.chat:
        raise UserError("--system goes with --chat: a plain prompt has no system message.")
    out, file = options.out, options.file
    if out and (not out.absolute().parent.is_dir() or (out.exists() and not out.is_file())):
        raise UserError(f"--out {out} must be a file in a directory that exists.")
    if out and file and out.exists() and os.path.exists(file) and out.samefile(file):
        raise UserError(f"--out {out} is the input itself; choose another file.")
    if out and os.environ.get("RANK", "0") == "0":
        _check_writable(out)


def _check_writable(path: Path) -> None:
    """Raises OSError for a file that can't be made or appended to, since only trying tells. Leaves no new file."""
    try:
        path.open("xb").close()
    except FileExistsError:
        path.open("ab").close()
    else:
        path.unlink()


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
    """The file, opened to append after its first `whole` bytes."""
    file = path.open("a", encoding="utf-8")
    file.truncate(whole)
    return file


def _line(record: Record, encoding: str) -> str:
    """The record as JSON; escaped where it can't be encoded, as with half a surrogate pair."""
    text = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return text


def _write_text(rows: Iterator[Row], load: Load, max_num_seqs: int) -> int:
    """Print the answers; a single one is streamed. Errors go to stderr and give exit code 2."""
    llm, params = load()
    head = list(islice(rows, 2))
    if len(head) == 1 and params.n == params.num_beams == 1:
        if head[0].error is not None:
            raise UserError(head[0].error)
        for delta in llm.stream(head[0].prompt, params):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        print()
        return 0
    failed = 0
    for row in finished(llm, params, chain(head, rows), WINDOW * max_num_seqs):
        if row.output is None or row.error is not None:
            print(f"puna: prompt {row.index + 1}: {row.error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        for completion in row.output.outputs:
            if len(head) > 1 or params.n > 1:
                print(f"==> prompt {row.index + 1}, answer {completion.index + 1} <==")
            print(completion.text, flush=True)
    return 2 if failed else 0


def _count(options: GenerateOptions, done: int) -> int | None:
    """How many rows are left, where that can be known before reading them."""
    if options.prompt:
        return len(options.prompt) - done
    if options.file and os.path.isfile(options.file):
        with open(options.file, "rb") as file:
            return sum(1 for line in file if line.strip()) - done
    return None
