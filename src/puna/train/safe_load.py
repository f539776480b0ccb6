"""Loading checkpoints of torch.distributed.checkpoint without running code from their files.

Their metadata is a pickle, and single values are loaded by an unrestricted `torch.load`. Here both are restricted to
the types that a checkpoint of tensors and numbers needs.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from puna.errors import UserError

# module -> names that the pickle of a checkpoint's metadata refers to (torch 2.11 to 2.13)
ALLOWED: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module.replace("pathlib._local", "pathlib"), set()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        saved = io.BytesIO()
        torch.save(plain, saved)
        saved.seek(0)
        super().load_bytes(read_item, saved)

    def create_local_plan(self) -> LoadPlan:
        missing = [name for name in self.state_dict if name not in self.metadata.state_dict_metadata]  # type: ignore[union-attr]
        if missing:
            raise UserError(f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        return super().create_local_plan()


def load_state(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Load the checkpoint in `folder`, of any parallel layout, into `state`; collective over `group`, if any.

    Raises UserError when the folder holds something else.
    """
    try:
        reader = _Reader(folder)
        reader.read_metadata()
        dcp.load(
            state,
            storage_reader=reader,
            planner=_Planner(),
            process_group=group,
            no_dist=group is None,
        )
    except (Exception, CheckpointException) as error:  # the latter, a BaseException, holds each rank's error
        causes = getattr(error, "failures", None)
        first = next(iter(causes.values()))[0] if causes else error
        raise UserError(f"{folder} can't be loaded: {_sentence(first)}") from error


def _sentence(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return f"it asks for {error}, which no checkpoint of puna does"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
