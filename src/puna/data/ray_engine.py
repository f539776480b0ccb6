"""Preparation as a Ray Data job on several machines, all of which must be able to read the sources.

Files that can be split are distributed in spans, all others whole. Results come back in order and are written by the
process that started the job, so that the bytes are those of a run without Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

from puna.data.source_files import Source
from puna.data.sources import Chunk, Documents, chunks
from puna.data.worker import Encoded, Job, encode_chunk
from puna.errors import UserError

SPANS = 16  # chunks in a task


def encoded(
    job: Job, inputs: list[Source], documents: Documents, workers: int, skip: int
) -> Generator[tuple[str, Encoded]]:
    """(source, result) of every chunk, in order, without the first `skip`. Joins a cluster, or starts a local one."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs the package ray: pip install 'puna[ray]'.") from None
    if not ray.is_initialized():
        ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    tasks = [{"task": pickle.dumps(task)} for task in _tasks(inputs, documents)]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(
        _Worker, fn_constructor_args=(pickle.dumps(job), documents), concurrency=(1, workers)
    )
    for row in islice(dataset.iter_rows(), skip, None):
        yield row["source"], pickle.loads(row["result"])


def _tasks(inputs: list[Source], documents: Documents) -> Iterator[Source | list[Chunk]]:
    for source in inputs:
        if source.packed or source.format not in ("jsonl", "txt"):
            yield source
            continue
        spans = chunks(source, documents)
        while task := list(islice(spans, SPANS)):
            yield task


class _Worker:
    """The worker in Ray's processes: the job is sent once, then each task returns a row per chunk."""

    def __init__(self, job: bytes, documents: Documents) -> None:
        self.job: Job = pickle.loads(job)
        self.documents = documents

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        task = pickle.loads(row["task"])
        task_chunks = chunks(task, self.documents) if isinstance(task, Source) else task
        return [
            {"source": chunk.source, "result": pickle.dumps(encode_chunk(self.job, chunk))} for chunk in task_chunks
        ]
