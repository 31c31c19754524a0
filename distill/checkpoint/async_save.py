"""Write a checkpoint's tensors in the background while training continues.

This module does not use ``torch.distributed.checkpoint.async_save``, because the background thread of this module also
hashes the written files, reports progress to the watchdog, and does not delay the exit of the process.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distill.checkpoint.manifest import Checksums, checksums_of, write_durably
from distill.checkpoint.storage import SHARDS, CountingSavePlanner, ShardsWriter
from distill.supervise.progress import heartbeat


@dataclass(frozen=True)
class WriteResult:
    """Result of one rank's part of a checkpoint write."""

    error: Exception | None = None
    """Error of the failed write; None after success. If several ranks failed, an OSError takes precedence."""
    checksums: Checksums = field(default_factory=dict)
    """Maps the path of each file that this rank wrote to its size and SHA-256; empty after a failed write.

    The paths are relative to the checkpoint.
    """
    expected: frozenset[str] = frozenset()
    """Paths of the tensor files of all ranks, relative to the checkpoint; empty after a failed write."""


class Write:
    """Background write of tensors to ``folder/shards``; the constructor is collective over ``group``.

    The constructor copies the tensors to host memory, so the caller may change them afterwards. ``tensors`` maps names
    to tensors. ``group`` must not be used for other collectives; None without torch.distributed. ``files`` maps the
    path of each additional file of this rank, relative to ``folder``, to its content. The background thread is a daemon
    thread, so the process can exit before the write has finished.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        group: dist.ProcessGroup | None,
        rank: int,
        files: Mapping[str, bytes],
    ) -> None:
        self._copies = {name: _host_copy(tensor) for name, tensor in tensors.items()}
        self._folder, self._group, self._rank, self._files = folder, group, rank, files
        self._start = time.monotonic()
        self.seconds = 0.0
        """Duration of the write in seconds; 0 until the write has finished."""
        self._result: WriteResult | None = None
        self._tensors_written = 0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> WriteResult | None:
        """Return the result of the finished write, or None while the write is running."""
        return self._result

    def wait(self) -> None:
        """Wait until the write has finished.

        Report progress to the watchdog whenever more tensors have been written.
        """
        seen = self._tensors_written
        while self._thread.is_alive():
            self._thread.join(1.0)
            if self._tensors_written != seen:
                seen = self._tensors_written
                heartbeat()

    def _count(self) -> None:
        self._tensors_written += 1

    def _run(self) -> None:
        try:
            self._result = self._write()
        except CheckpointException as error:
            errors = [failure[0] for _, failure in sorted(error.failures.items())]
            first = next((e for e in errors if isinstance(e, OSError)), RuntimeError(repr(errors[0])))
            self._result = WriteResult(first)
        except OSError as error:
            self._result = WriteResult(error)
        except Exception as error:  # as text: all ranks gather the result, and some exceptions cannot be pickled
            self._result = WriteResult(RuntimeError(repr(error)))
        finally:
            self._copies = {}
            self.seconds = time.monotonic() - self._start

    def _write(self) -> WriteResult:
        folder = self._folder / SHARDS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is only one process
            metadata = dcp.save(
                dict(self._copies),
                storage_writer=ShardsWriter(folder),
                planner=CountingSavePlanner(self._count),
                process_group=self._group,
            )
        self._copies = {}
        prefixes = (f"__{self._rank}_", ".metadata") if self._rank == 0 else (f"__{self._rank}_",)
        own = [f"{SHARDS}/{path.name}" for path in sorted(folder.iterdir()) if path.name.startswith(prefixes)]
        expected = {f"{SHARDS}/{entry.relative_path}" for entry in (metadata.storage_data or {}).values()}
        for name, content in self._files.items():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._folder / name, content)
        return WriteResult(None, checksums_of(self._folder, [*own, *self._files]), frozenset(expected))


@torch.no_grad()
def _host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of the tensor in host memory; for a sharded tensor, a copy of this rank's shard."""
    return tensor.detach().to("cpu", copy=True)
