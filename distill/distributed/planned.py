"""The ranks of a planned run, represented by one process, so that a dry run makes the run's collective checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from distill.distributed.world import World

T = TypeVar("T")


class PlannedWorld(World):
    """Rank 0 of a planned run; no other rank exists, and there are no process groups.

    Sizes and device are those of the planned run. Collectives return the value of this process only, and errors are
    raised unchanged. Methods that need a device mesh or a process group must not be called.
    """

    def __init__(self, num_nodes: int, gpus_per_node: int, device: torch.device, gpu_bytes: int | None = None) -> None:
        self.rank = self.local_rank = 0
        self.size = num_nodes * gpus_per_node
        self.local_size = gpus_per_node
        self.device = device
        self.mesh = None
        self._gpu_bytes = gpu_bytes

    @property
    def gpu_bytes(self) -> int | None:
        """Return the memory of each GPU in bytes; None if it is unknown, and on the CPU."""
        return self._gpu_bytes

    def build_mesh(self, device: str, tp: int, cp: int, replicas: int = 1, teacher: int | None = 1) -> None:
        """Do nothing, because there are no ranks to connect."""

    def gather(self, value: T) -> list[T]:
        """Return ``[value]``."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return ``value``."""
        return value

    def barrier(self) -> None:
        """Do nothing."""

    @contextmanager
    def all_or_none(self, action: str) -> Iterator[None]:
        """Run the ``with`` block; its errors are raised unchanged."""
        yield

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the ``with`` block."""
        yield
