"""A copy of the tensors on its way to the disk, while the run goes on."""

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

from distill.checkpoint.manifest import Sums, sums_of, write_durably
from distill.checkpoint.storage import SHARDS, CountedSave, ShardsWriter
from distill.supervise.progress import heartbeat


@dataclass(frozen=True)
class Written:
    """How this rank's part of a write ended."""

    error: Exception | None = None
    """The first OSError of any rank, where there is one."""
    sums: Sums = field(default_factory=dict)
    """Of the files that this rank wrote."""
    expected: frozenset[str] = frozenset()
    """All files that hold tensors, of whatever rank."""


class Write:
    """Tensors written to ``folder/shards`` by a thread; made by all ranks of ``group`` together, which it has for
    itself.

    They are copied to host memory before it returns, so they may change right after. ``files``: further files that this
    rank writes, content by path in ``folder``. The thread dies with the process.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        group: dist.ProcessGroup | None,
        rank: int,
        files: Mapping[str, bytes],
    ) -> None:
        self._copies = {name: copied(tensor) for name, tensor in tensors.items()}
        self._folder, self._group, self._rank, self._files = folder, group, rank, files
        self._began = time.monotonic()
        self.seconds = 0.0
        """From its beginning to its end."""
        self._written: Written | None = None
        self._moved = 0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self) -> Written | None:
        """How it ended, or None as long as it goes on."""
        return self._written

    def wait(self) -> None:
        """Until it has ended; as long as tensors are written, this rank makes progress."""
        seen = self._moved
        while self._thread.is_alive():
            self._thread.join(1.0)
            if self._moved != seen:
                seen = self._moved
                heartbeat()

    def _count(self) -> None:
        self._moved += 1

    def _run(self) -> None:
        try:
            self._written = self._write()
        except CheckpointException as error:
            errors = [failure[0] for _, failure in sorted(error.failures.items())]
            self._written = Written(next((e for e in errors if isinstance(e, OSError)), RuntimeError(repr(errors[0]))))
        except OSError as error:
            self._written = Written(error)
        except Exception as error:  # whatever it is, all ranks must hear of it, and not every kind can travel
            self._written = Written(RuntimeError(repr(error)))
        finally:
            self._copies = {}
            self.seconds = time.monotonic() - self._began

    def _write(self) -> Written:
        folder = self._folder / SHARDS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a single process
            metadata = dcp.save(
                dict(self._copies),
                storage_writer=ShardsWriter(folder),
                planner=CountedSave(self._count),
                process_group=self._group,
            )
        self._copies = {}
        beginnings = (f"__{self._rank}_", ".metadata") if self._rank == 0 else (f"__{self._rank}_",)
        mine = [f"{SHARDS}/{path.name}" for path in sorted(folder.iterdir()) if path.name.startswith(beginnings)]
        expected = {f"{SHARDS}/{place.relative_path}" for place in (metadata.storage_data or {}).values()}
        for name, content in self._files.items():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._folder / name, content)
        return Written(None, sums_of(self._folder, [*mine, *self._files]), frozenset(expected))


@torch.no_grad()
def copied(tensor: Tensor) -> Tensor:
    """A copy in host memory, of a sharded tensor's own shard; it shares nothing with the original."""
    return tensor.detach().to("cpu", copy=True)
