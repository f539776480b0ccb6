"""Preparation of training data: raw files to token stores, over all cores, at constant memory, resumable.

Chunks are encoded by worker processes and written by this one in the order of the sources, so that the bytes don't
depend on the number of workers. Every 20 seconds the stores are synced to the disk and a state records their length;
a second run of the same command truncates them to that length and resumes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from puna.data import sources, worker
from puna.data.encoder import LabelEncoder
from puna.data.handlers.registry import detect, get_handler
from puna.data.indexed_dataset import MAX_METADATA
from puna.data.options import PrepareOptions
from puna.data.samples import MissingField, RowError
from puna.data.source_files import Source, find
from puna.data.sources import Chunk
from puna.data.worker import Encoded, Job
from puna.data.writer import (
    PUBLICATION,
    Output,
    Stats,
    complete_publication,
    identity_of,
    metadata_path,
    outputs,
    staging,
)
from puna.errors import UserError
from puna.files import sha256
from puna.progress import meter
from puna.tokenizer import Tokenizer
from puna.tokenizer.builtin_templates import BUILTIN
from puna.weights import hub
from puna.weights.open import open_checkpoint

SMALL = 4 << 20  # bytes of input that are encoded before a worker would have started
PROBED = 100  # rows encoded as a trial before the work begins
VERSION = 1


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Prepare the data by `options` and return their metadata. Raises UserError for whatever the user can correct.

    Existing data are replaced only once their replacement is complete on disk.
    """
    out = options.out
    if out.name in ("", ".."):
        raise UserError(f"--out {out} is a folder: give the prefix of files in it, as {out / 'NAME'}.")
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation is a fraction of at least 0 and below 1, not {options.validation}.")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be a positive integer, not {options.workers}.")
    _check_free(out, options.overwrite or (out.absolute().with_name(f".{out.name}.prepare") / PUBLICATION).exists())
    tokenizer = load_tokenizer(options.tokenizer, options.template)
    with staging(out) as folder:
        recovered = complete_publication(folder, out)
        inputs = find(options.src, subset=options.subset, split=options.split, revision=options.revision)
        name, documents = _choose(options, inputs)
        encoder = LabelEncoder(
            tokenizer, options.loss, options.append_eos, options.template_values, options.special_tokens
        )
        job = Job(encoder, name, options.text_field, options.validation)
        _check(job, inputs, documents)
        facts = _facts(job, inputs, documents)
        if recovered and recovered["identity"] == identity_of(facts):
            print("completed the preparation that was killed while its files were moved into place", file=sys.stderr)
            metadata: dict[str, Any] = recovered["metadata"]
            return metadata
        _check_free(out, options.overwrite)
        return _run(options, job, inputs, documents, facts, folder)


def _run(
    options: PrepareOptions,
    job: Job,
    inputs: list[Source],
    documents: sources.Documents,
    facts: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Encode, write and publish all chunks that aren't done yet."""
    cores = options.workers or _cores()
    if options.engine == "ray":
        from puna.data.ray_engine import encoded
    else:
        encoded = encoded_here
    with Output(options, job, facts, folder) as output:
        work = encoded(job, inputs, documents, cores, output.stats.chunks)
        with meter("Preparing", unit="tok") as advance, closing(work):
            for source, result in work:
                output.add(source, result)
                advance(result.tokens)
        stats = output.stats
        if not stats.counts:
            reasons = "; ".join(_rejections(stats)[:3])
            raise UserError(f"There is no sample in {', '.join(options.src)}: {reasons or 'it has no rows'}.")
        metadata = _metadata(options, job, facts, stats, _hashes(inputs, cores))
        output.publish(metadata)
    _report(metadata, inputs, stats)
    return metadata


def _check_free(out: Path, overwrite: bool) -> None:
    """Raises UserError when data under the prefix must not be replaced."""
    there = outputs(out)
    if there and not overwrite:
        raise UserError(f"{there[0]} exists already: choose another --out, or add --overwrite.")
    if metadata_path(out) in there and not _is_metadata(metadata_path(out)):
        raise UserError(
            f"{metadata_path(out)} was not written by puna data prepare: choose another --out, or remove it yourself."
        )


def _is_metadata(path: Path) -> bool:
    """Whether a preparation wrote this file, so that another one may replace it; it could be a source."""
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_METADATA else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "splits" in content


def load_tokenizer(ref: str, template: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint in any format, or of a folder or file that holds a tokenizer alone."""
    path = hub.resolve(ref)
    alone = ("tokenizer.json", "tokenizer.model")
    if path.name in alone or path.is_dir() and any((path / name).exists() for name in alone):
        tokenizer: Tokenizer | None = Tokenizer.load(path)
    else:
        with open_checkpoint(path) as source:
            tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(f"{ref} holds no tokenizer: name another checkpoint or a tokenizer file.")
    return tokenizer if template is None else tokenizer.with_template(template)


def _choose(options: PrepareOptions, inputs: list[Source]) -> tuple[str, sources.Documents]:
    """The handler's name, and the unit of text files that is a document."""
    name = options.handler
    if name == "auto":
        probed = next((rows for source in inputs if (rows := _first_rows(source, "line", 20))), [])
        if not probed:
            raise UserError(f"There is no readable row in {', '.join(options.src)}.")
        name = detect(probed, options.text_field)
        print(f"handler {name}, for rows with {', '.join(map(str, probed[0]))}", file=sys.stderr)
    return name, get_handler(name).documents or options.documents


def _check(job: Job, inputs: list[Source], documents: sources.Documents) -> None:
    """Try the first rows, so that a wrong handler or template is reported at once."""
    handler, tokenizer = get_handler(job.handler, job.text_field), job.encoder.tokenizer
    if handler.kind == "text" and job.encoder.append_eos and tokenizer.eos_id is None:
        raise UserError("This tokenizer has no EOS to end documents with: add --no-append-eos.")
    if handler.needs_template and tokenizer.chat_template is None:
        raise UserError(
            "This checkpoint has no chat template: choose the one to train it with by --template "
            f"({', '.join(BUILTIN)} or a Jinja file)."
        )
    tried = False
    for source in inputs:
        rows = _first_rows(source, documents, PROBED)
        missing = None
        for row in rows:
            try:
                handler.convert(row)
                break
            except MissingField as error:
                missing = error
            except RowError:
                pass
        else:
            if missing:
                there = ", ".join(map(str, rows[0]))
                raise UserError(f"{source.name}: {missing}, which the handler {job.handler} needs; there are {there}.")
        if rows and not tried:
            worker.encode_chunk(job, Chunk(source.name, "rows", rows))
            tried = True


def _first_rows(source: Source, documents: sources.Documents, count: int) -> list[dict[str, Any]]:
    rows = (row for chunk in sources.chunks(source, documents) for row in sources.rows(chunk))
    return [row for row in islice(rows, count) if not isinstance(row, sources.BadRow)]


def encoded_here(
    job: Job, inputs: list[Source], documents: sources.Documents, workers: int, skip: int
) -> Generator[tuple[str, Encoded]]:
    """(source, result) of every chunk from number `skip` on, in order. No more than a few chunks are in memory."""
    todo = islice(
        ((source.name, chunk) for source in inputs for chunk in sources.chunks(source, documents)), skip, None
    )
    local = [source.name for source in inputs if source.format != "hub"]
    if workers == 1 or len(local) == len(inputs) and sum(map(os.path.getsize, local)) < SMALL:
        for name, chunk in todo:
            yield name, worker.encode_chunk(job, chunk)
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[str, Future[Encoded]]] = deque()
    pool = ProcessPoolExecutor(workers, context, worker.start_worker, (job,))
    try:
        for name, chunk in todo:
            waiting.append((name, pool.submit(worker.work, chunk)))
            if len(waiting) >= 4 * workers:
                before, future = waiting.popleft()
                yield before, future.result()
        for name, future in waiting:
            yield name, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, most likely for lack of memory: run the same command with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _facts(job: Job, inputs: list[Source], documents: sources.Documents) -> dict[str, Any]:
    """Everything that the bytes of the output depend on."""
    tokenizer, encoder, handler = job.encoder.tokenizer, job.encoder, get_handler(job.handler)
    text = handler.kind == "text"
    template = {
        "name": tokenizer.template_name,
        "source": tokenizer.chat_template,
        "values": dict(encoder.values or {}),
    }
    return {
        "version": VERSION,
        "kind": handler.kind,
        "handler": job.handler,
        "documents": documents,
        "text_field": job.text_field if handler.uses_text_field else None,
        "append_eos": encoder.append_eos if text else None,
        "special_tokens": encoder.special_tokens if text else None,
        "loss": None if text else encoder.loss,
        "validation": job.validation,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint(),
            "vocabulary": tokenizer.fingerprint(template=False),
            "vocab_size": tokenizer.vocab_size,
        },
        "template": template if handler.needs_template else None,
        "sources": [_source(source) for source in inputs],
    }


def _source(source: Source) -> dict[str, Any]:
    if source.format == "hub":
        return {"name": source.name, "subset": source.subset, "split": source.split, "revision": source.revision}
    status = os.stat(source.name)
    return {"name": source.name, "bytes": status.st_size, "changed": status.st_mtime_ns}


def _metadata(
    options: PrepareOptions, job: Job, facts: dict[str, Any], stats: Stats, hashes: dict[str, str]
) -> dict[str, Any]:
    """The metadata beside the data: sources, options and counts."""
    listed = []
    for source in facts["sources"]:
        digest = {"sha256": hashes[source["name"]]} if source["name"] in hashes else {}
        kept = {key: value for key, value in source.items() if key != "changed"}
        listed.append(kept | digest | {"rows": stats.rows.get(source["name"], 0)})
    return facts | {
        "tokenizer": {"source": options.tokenizer} | facts["tokenizer"],
        "sources": listed,
        "splits": {split: asdict(stats.counts[split]) for split in ("train", "validation") if split in stats.counts},
        "rejected": dict(sorted(stats.rejected.items())),
        "rejected_rows": [f"{stats.examples[reason]}: {reason}" for reason in sorted(stats.rejected)],
        "notes": dict(sorted(stats.notes.items())),
    }


def _rejections(stats: Stats) -> list[str]:
    """Each reason of rejection with its count and first example, the most frequent first."""
    return [
        f"{count:,} rejected for {reason} (first {stats.examples[reason]})"
        for reason, count in stats.rejected.most_common()
    ]


def _report(metadata: dict[str, Any], inputs: list[Source], stats: Stats) -> None:
    """Print notes on skipped sources and rejected rows to stderr."""
    for source in inputs:
        if not stats.rows.get(source.name):
            print(f"{source.name} holds no rows", file=sys.stderr)
    if metadata["validation"] and len(metadata["splits"]) == 1:
        print(f"all samples went to {next(iter(metadata['splits']))}: there are few, or equal ones", file=sys.stderr)
    for line in _rejections(stats):
        print(line, file=sys.stderr)
    if stats.rejected:
        print(f"{stats.rejected.total():,} rejected of {sum(stats.rows.values()):,} rows", file=sys.stderr)
    for note, count in stats.notes.most_common():
        print(f"note: {count:,} {note}", file=sys.stderr)


def _hashes(inputs: list[Source], workers: int) -> dict[str, str]:
    local = [source.name for source in inputs if source.format != "hub"]
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(local, pool.map(sha256, local), strict=True))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
