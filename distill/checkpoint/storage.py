"""The tensors of a checkpoint on disk, by torch.distributed.checkpoint."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.futures import Future

from distill.checkpoint.manifest import MAY_PASS, Fault, patiently
from distill.errors import as_disk_error
from distill.supervise.progress import heartbeat

SHARDS = "shards"
"""The folder of the tensors inside a checkpoint."""

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""What the metadata of a checkpoint is made of: module and names. A module alone would let in what it imports."""


class ShardsWriter(dcp.FileSystemWriter):
    """A writer of tensors that are in host memory already; a disk that refuses is an OSError, on every rank.

    torch sends the errors of each rank to all, but loses on the way what led to them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's part."""
        with as_disk_error():
            return super().write_data(plan, planner)


class CountedSave(dcp.DefaultSavePlanner):
    """A plan of a write that calls ``on_part`` before each tensor, or part of one, is handed to the disk."""

    def __init__(self, on_part: Callable[[], None]) -> None:
        super().__init__()
        self._on_part = on_part

    def resolve_data(self, write_item: Any) -> Any:
        """The data of one part."""
        self._on_part()
        return super().resolve_data(write_item)


class CountedLoad(dcp.DefaultLoadPlanner):
    """A plan of a read whose every tensor counts as this rank's progress."""

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        """One part is read."""
        heartbeat()
        super().commit_tensor(read_item, tensor)


class ShardsReader(dcp.FileSystemReader):
    """A reader that takes nothing but tensors and their places out of a checkpoint, and reads the places once.

    torch keeps the places in a pickle, which could hold anything: other classes than those it is made of are refused.
    A disk that doesn't answer is asked again; then, or where it refuses, it is an OSError.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Where which part of which tensor lies."""
        if self._metadata is None:
            pickled = patiently((Path(self.path) / ".metadata").read_bytes)
            self._metadata = _Unpickler(io.BytesIO(pickled)).load()
        assert self._metadata is not None
        return self._metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """Read this rank's part, file by file."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for items in by_file.values():
            patiently(partial(self._read_file, replace(plan, items=items), planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, plan: Any, planner: Any) -> None:
        with as_disk_error():
            super().read_data(plan, planner)

    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every tensor by its name."""
        stored = self.read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}

    def shapes_or_fault(self) -> tuple[dict[str, torch.Size], Fault | None]:
        """``shapes``, or why a disk doesn't tell them."""
        try:
            return self.shapes(), None
        except OSError as error:
            return {}, fault_of_read(error)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, put together from their shards one at a time, in this process alone. Raises OSError where the
        disk fails.
        """
        stored = self.read_metadata().state_dict_metadata
        for name in names:
            entry = stored[name]
            assert isinstance(entry, TensorStorageMetadata), name
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a single process
                try:
                    dcp.load({name: tensor}, storage_reader=self, no_dist=True)
                except dcp.CheckpointException as failed:
                    raise failed.failures[0][0] from failed
            yield name, tensor


def fault_of_read(error: OSError) -> Fault:
    """The disk's error as what is wrong with a checkpoint."""
    return Fault(f"{SHARDS} can't be read ({error.strerror or error})", error.errno in MAY_PASS)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata holds {module}.{name}, which has no place there")
