"""Read and write the tensors of a checkpoint with torch.distributed.checkpoint."""

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

from distill.checkpoint.manifest import TRANSIENT_ERRNOS, CheckpointError, retry_io
from distill.errors import as_disk_error
from distill.supervise.progress import heartbeat

SHARDS = "shards"
"""Name of the subdirectory of a checkpoint that contains the tensor files."""

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
"""Maps each module to the names of its classes and functions that may be unpickled from a checkpoint.

Complete modules are not allowed, because that would also allow every function that these modules import.
"""


class ShardsWriter(dcp.FileSystemWriter):
    """Writer of tensor shards that raises OSError if the disk fails.

    torch may wrap an OSError in another exception, and pickles this exception to send it to all ranks. Pickling removes
    the cause of an exception, so this class raises the OSError itself.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's shards; raise OSError if the disk fails."""
        with as_disk_error():
            return super().write_data(plan, planner)


class CountingSavePlanner(dcp.DefaultSavePlanner):
    """Save planner that calls ``on_part`` before each shard is written."""

    def __init__(self, on_part: Callable[[], None]) -> None:
        super().__init__()
        self._on_part = on_part

    def resolve_data(self, write_item: Any) -> Any:
        """Call ``on_part``, then return the data of the shard ``write_item`` as the base class does."""
        self._on_part()
        return super().resolve_data(write_item)


class HeartbeatLoadPlanner(dcp.DefaultLoadPlanner):
    """Load planner that reports progress to the watchdog after every shard."""

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        """Report progress to the watchdog after one shard was read; then do the same as the base class."""
        heartbeat()
        super().commit_tensor(read_item, tensor)


class ShardsReader(dcp.FileSystemReader):
    """Reader of a checkpoint's tensors that reads the metadata once and retries transient I/O errors.

    The metadata is a pickle. Only the classes of torch's metadata are unpickled, so that a checkpoint cannot run code.
    Raises OSError if an I/O error is not transient or still occurs after the retries.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata: shape, file and offset of every shard."""
        if self._metadata is None:
            pickled = retry_io((Path(self.path) / ".metadata").read_bytes)
            self._metadata = _Unpickler(io.BytesIO(pickled)).load()
        assert self._metadata is not None
        return self._metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        """Read this rank's shards file by file; retry the file after a transient I/O error."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for items in by_file.values():
            retry_io(partial(self._read_file, replace(plan, items=items), planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, plan: Any, planner: Any) -> None:
        with as_disk_error():
            super().read_data(plan, planner)

    def shapes(self) -> dict[str, torch.Size]:
        """Return a dict that maps the name of each tensor in the checkpoint to its unsharded shape."""
        stored = self.read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}

    def shapes_or_error(self) -> tuple[dict[str, torch.Size], CheckpointError | None]:
        """Return ``(shapes(), None)``, or ``({}, error)`` if ``shapes`` raises OSError."""
        try:
            return self.shapes(), None
        except OSError as error:
            return {}, read_error(error)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """For each of ``names``, yield the name and the unsharded tensor in host memory; not collective.

        Raises OSError if the disk fails.
        """
        stored = self.read_metadata().state_dict_metadata
        for name in names:
            entry = stored[name]
            assert isinstance(entry, TensorStorageMetadata), name
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns if there is only one process
                try:
                    dcp.load({name: tensor}, storage_reader=self, no_dist=True)
                except dcp.CheckpointException as failed:
                    raise failed.failures[0][0] from failed
            yield name, tensor


def read_error(error: OSError) -> CheckpointError:
    """Return a CheckpointError for an OSError that was raised while shards were read.

    The CheckpointError is retryable if the OSError is transient.
    """
    return CheckpointError(f"{SHARDS} cannot be read ({error.strerror or error})", error.errno in TRANSIENT_ERRNOS)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's metadata contains {module}.{name}, which must not be unpickled")
