"""Raw files to token stores, over all cores, at constant memory, and on from where it was killed.

Chunks are encoded by worker processes and written by this one in the order of the sources, so that the bytes are the
same whatever the number of workers. Every now and then what is written is brought to the disk and a manifest says how
far that is; a second run of the same command cuts the files to that place and goes on.
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

from puna.data import handlers, sources, worker
from puna.data.encoder import LabelEncoder
from puna.data.indexed_dataset import MAX_CARD
from puna.data.options import PrepareOptions
from puna.data.sources import Chunk, Source
from puna.data.worker import Encoded, Job
from puna.data.writer import Output, Stats, all_stores
from puna.errors import UserError
from puna.files import sha256
from puna.progress import meter
from puna.tokenizer import Tokenizer
from puna.weights import hub
from puna.weights.open import open_checkpoint

SMALL = 4 << 20  # bytes of input that are done sooner than a worker starts
PROBED = 100  # rows that are tried before the work begins
VERSION = 1


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Prepare the data as `options` say and return their card. Raises UserError for whatever the user can put right."""
    card_path = options.out.with_name(options.out.name + ".json")
    manifest = options.out.with_name(f".{options.out.name}.prepare.json")
    there = [path for path in (card_path, *all_stores(options.out)) if path.exists()]
    if there and not options.overwrite and not manifest.exists():
        raise UserError(f"{there[0]} exists already: choose another --out, or add --overwrite")
    if card_path in there and not _is_card(card_path):
        raise UserError(f"{card_path} is no card of prepared data: choose another --out, or remove it yourself")
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation is a share from 0 up to 1, not {options.validation}")
    tokenizer = load_tokenizer(options.tokenizer, options.template)
    found = sources.find(options.src, subset=options.subset, split=options.split, revision=options.revision)
    name, documents = _choose(options, found)
    encoder = LabelEncoder(tokenizer, options.loss, options.append_eos, options.template_values)
    job = Job(encoder, name, options.text_field, options.validation)
    _check(job, found, documents)
    facts = _facts(job, found, documents)
    cores = options.workers or _cores()
    if options.engine == "ray":
        from puna.data.ray_engine import encoded
    else:
        encoded = encoded_here
    with Output(options, job, facts, manifest) as output:
        work = encoded(job, found, documents, cores, output.stats.chunks)
        with meter("Preparing", unit="tok") as advance, closing(work):
            for source, result in work:
                output.add(source, result)
                advance(result.tokens)
        stats = output.stats
        if not stats.counts:
            reasons = "; ".join(f"{count:,} times {reason}" for reason, count in stats.rejected.most_common(3))
            raise UserError(f"no sample in {', '.join(options.src)}: {reasons or 'there are no rows'}")
        card = _card(options, job, facts, stats, _hashes(found, cores))
        output.publish(card_path, card)
    _report(card, found, stats)
    return card


def _is_card(path: Path) -> bool:
    """Whether a preparation wrote this file, so that another one may replace it; it could be a source."""
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_CARD else None
    except ValueError:
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
        raise UserError(f"{ref} carries no tokenizer: name another checkpoint or a tokenizer file")
    return tokenizer if template is None else tokenizer.with_template(template)


def _choose(options: PrepareOptions, found: list[Source]) -> tuple[str, sources.Documents]:
    """The handler's name, and what makes a document of a text file."""
    name = options.handler
    if name == "auto":
        probed = next((rows for source in found if (rows := _first_rows(source, "line", 20))), [])
        if not probed:
            raise UserError(f"no readable row in {', '.join(options.src)}")
        name = "text" if options.text_field in probed[0] and options.text_field != "text" else handlers.detect(probed)
        print(f"handler {name}, for rows with {', '.join(map(str, probed[0]))}", file=sys.stderr)
    return name, "article" if handlers.choose(name).article else options.documents


def _check(job: Job, found: list[Source], documents: sources.Documents) -> None:
    """Try the first rows, so that a wrong handler or template shows at once."""
    kind, tokenizer = handlers.choose(job.handler).kind, job.encoder.tokenizer
    if kind == "text" and job.encoder.append_eos and tokenizer.eos_id is None:
        raise UserError("this tokenizer has no EOS to end documents with: add --no-append-eos")
    if kind != "text" and tokenizer.chat_template is None and not job.handler.startswith("squad"):
        raise UserError(
            "this checkpoint carries no chat template: choose the one to train it with by --template (alpaca, chatml, "
            "llama2, llama3, vicuna or a Jinja file)"
        )
    tried = False
    for source in found:
        rows = _first_rows(source, documents, PROBED)
        convert, missing = handlers.choose(job.handler, job.text_field).convert, None
        for row in rows:
            try:
                convert(row)
                break
            except handlers.MissingField as error:
                missing = error
            except handlers.RowError:
                pass
        else:
            if missing:
                there = ", ".join(map(str, rows[0]))
                raise UserError(f"{source.name}: {missing}, the handler {job.handler} needs it; there are {there}")
        if rows and not tried:
            worker.encode_chunk(job, Chunk(source.name, "rows", rows))
            tried = True


def _first_rows(source: Source, documents: sources.Documents, count: int) -> list[dict[str, Any]]:
    rows = (row for chunk in sources.chunks(source, documents) for row in sources.rows(chunk))
    return [row for row in islice(rows, count) if not isinstance(row, sources.Bad)]


def encoded_here(
    job: Job, found: list[Source], documents: sources.Documents, workers: int, skip: int
) -> Generator[tuple[str, Encoded]]:
    """(source, result) of every chunk from number `skip` on, in order. No more than a few chunks are in memory."""
    todo = islice(((source.name, chunk) for source in found for chunk in sources.chunks(source, documents)), skip, None)
    local = [source.name for source in found if source.format != "hub"]
    if workers == 1 or len(local) == len(found) and sum(map(os.path.getsize, local)) < SMALL:
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
            "a worker process was killed, most likely for want of memory: run the same command with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _facts(job: Job, found: list[Source], documents: sources.Documents) -> dict[str, Any]:
    """All that decides the bytes that are written."""
    tokenizer, encoder, kind = job.encoder.tokenizer, job.encoder, handlers.choose(job.handler).kind
    text = kind == "text"
    template = None if text or job.handler.startswith("squad") else {
        "name": tokenizer.template_name, "source": tokenizer.chat_template, "values": dict(encoder.values or {})
    }  # fmt: skip
    return {
        "version": VERSION,
        "kind": kind,
        "handler": job.handler,
        "documents": documents,
        "text_field": job.text_field if job.handler == "text" else None,
        "append_eos": encoder.append_eos if text else None,
        "loss": None if text else encoder.loss,
        "validation": job.validation,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint(),
            "vocabulary": tokenizer.fingerprint(template=False),
            "vocab_size": tokenizer.vocab_size,
        },
        "template": template,
        "sources": [_source(source) for source in found],
    }


def _source(source: Source) -> dict[str, Any]:
    if source.format == "hub":
        return {"name": source.name, "subset": source.subset, "split": source.split, "revision": source.revision}
    status = os.stat(source.name)
    return {"name": source.name, "bytes": status.st_size, "changed": status.st_mtime_ns}


def _card(
    options: PrepareOptions, job: Job, facts: dict[str, Any], stats: Stats, hashes: dict[str, str]
) -> dict[str, Any]:
    """What is written beside the data: where it comes from, how it was made and what came of it."""
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
        "rejected_rows": stats.named,
    }


def _report(card: dict[str, Any], found: list[Source], stats: Stats) -> None:
    """Notes on what was left out."""
    for source in found:
        if not stats.rows.get(source.name):
            print(f"{source.name} holds no rows", file=sys.stderr)
    if card["validation"] and len(card["splits"]) == 1:
        print(f"all samples went to {next(iter(card['splits']))}: there are few, or equal ones", file=sys.stderr)
    for reason, count in sorted(card["rejected"].items(), key=lambda item: -item[1]):
        print(f"rejected {count:,} of {sum(stats.rows.values()):,} rows: {reason}", file=sys.stderr)
    for line in card["rejected_rows"]:
        print(f"  {line}", file=sys.stderr)


def _hashes(found: list[Source], workers: int) -> dict[str, str]:
    local = [source.name for source in found if source.format != "hub"]
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(local, pool.map(sha256, local), strict=True))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
