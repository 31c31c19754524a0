"""Settings that the command passes to the processes of the parts, and what a part's function receives."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from distill.distributed.world import World

SIZES = ("tiny", "0.1b", "0.6b", "4b")
"""Sizes of random models. ``tiny`` is for machines without a GPU."""


@dataclass(frozen=True)
class Settings:
    """What to run, and where. All paths are absolute."""

    out: str
    """Folder of the first node's results, and of the runs; on a file system that all nodes share."""
    scratch: str
    """Folder of this node for caches; removed at the end."""
    device: Literal["cuda", "cpu"]
    """Device of the parts; the part ``environment`` finds it."""
    ranks: int
    """Number of ranks on this node."""
    nodes: int = 1
    node: int = 0
    """Index of this node."""
    size: str = "tiny"
    """One of SIZES; it also sets the amount of work of the other parts."""
    model: str = ""
    """Folder of a model; empty: make a random one."""

    @property
    def folder(self) -> Path:
        """Return the folder of this node's results and logs."""
        return Path(self.out) / f"node_{self.node}" if self.node else Path(self.out)

    @property
    def quick(self) -> bool:
        """Return whether all sizes are tiny, as on a machine without a GPU."""
        return self.size == "tiny"

    @property
    def on_gpu(self) -> bool:
        """Return whether the parts use GPUs."""
        return self.device == "cuda"

    @property
    def models(self) -> Path:
        """Return the folder of the random models; the same path on all nodes."""
        return Path(self.scratch if self.nodes == 1 else self.out) / "models"

    @property
    def student(self) -> Path:
        """Return the folder of the student."""
        return Path(self.model) if self.model else self.models / "student"

    @property
    def teacher(self) -> Path:
        """Return the folder of a small teacher with the student's tokenizer; with ``model``, the student itself."""
        return Path(self.model) if self.model else self.models / "teacher"

    @property
    def runs(self) -> Path:
        """Return the folder of the run directories and checkpoints."""
        return Path(self.out) / "runs"


@dataclass
class Context:
    """Argument of a part's function in a process of its group."""

    settings: Settings
    ports: list[int] = field(default_factory=list)
    """Free rendezvous ports of this group, equal on all ranks; each world uses up one."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Objects that parts of one group share, such as an engine."""

    @property
    def rank(self) -> int:
        """Return the rank of this process among all processes of its group."""
        return int(os.environ.get("RANK", "0"))

    @property
    def size(self) -> int:
        """Return the number of processes of this group on all nodes."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def world(self) -> World:
        """Return the World of this group's processes; created at the first call, which is collective."""
        from distill.distributed.world import World

        if "world" not in self.shared:
            self.use_next_port()
            self.shared["world"] = World()
            self.shared["world"].build_mesh(self.settings.device, 1, 1)
        world: World = self.shared["world"]
        return world

    def use_next_port(self) -> None:
        """Set the rendezvous port of the next World; call it on all ranks."""
        if "RANK" in os.environ:
            os.environ["MASTER_PORT"] = str(self.ports.pop(0))


@dataclass(frozen=True)
class Order:
    """Work of one process: parts of one group, in order. Written as a JSON file by the command."""

    parts: list[tuple[str, str, float]]
    """Name, source (see ``parts.Part``) and limit in seconds of each part."""
    settings: dict[str, Any]
    ports: list[int]
    events: str
    """Prefix of the files to which each rank appends its events, one JSON object per line."""

    def write(self, path: Path) -> None:
        """Write the order as a JSON file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Order:
        """Return the order in a JSON file."""
        return Order(**json.loads(path.read_text(encoding="utf-8")))
