"""Devices and package versions of each start of a run: the start line and versions.json."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.distributed.hardware import RankDevice, check_devices, describe_devices, device_of_rank
from distill.distributed.world import World
from distill.rollout.vllm_version import InstalledVllm, installed_vllm
from distill.run_files import EARLIER_STARTS, VERSIONS_FILE

log = logging.getLogger(__name__)

_PACKAGES = ("transformers", "triton", "safetensors", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class Start:
    """Devices of all ranks, and versions of the packages that this process uses."""

    devices: tuple[RankDevice, ...]
    """Device of each rank, in order of rank."""
    vllm: InstalledVllm | None
    """Installed distribution of vLLM; None if the run does not generate with vLLM or vLLM is not installed."""

    @property
    def number_of_gpus(self) -> int:
        """Return the number of different GPUs of all ranks; 0 on CPUs."""
        return len({(device.host, device.uid) for device in self.devices if device.kind == "cuda"})

    def line(self) -> str:
        """Return the start line, such as "4 ranks on 4 x NVIDIA H200, torch 2.13.0+cu130, vLLM 0.32.0"."""
        ranks = len(self.devices)
        engine = str(self.vllm) if self.vllm else f"generation by transformers {_version('transformers')}"
        return f"{ranks} rank{'s' * (ranks != 1)} on {describe_devices(self.devices)}, torch {_torch()}, {engine}"

    def versions(self) -> dict[str, Any]:
        """Return the entry of this start in versions.json."""
        import torch

        drivers = {device.driver: None for device in self.devices if device.driver}
        return {
            "python": platform.python_version(),
            "command": sys.argv,
            "torch": _torch(),
            "vllm": self.vllm and self.vllm.version,
            "vllm_distribution": self.vllm and self.vllm.name,
            **{package: _version(package) for package in _PACKAGES},
            "commit": _commit(),
            "world_size": len(self.devices),
            "hosts": list({device.host: None for device in self.devices}),
            "device": describe_devices(self.devices),
            "driver": ", ".join(drivers) or None,
            "cuda": torch.version.cuda,
            "nccl": _nccl() if self.devices[0].kind == "cuda" else None,
        }


def log_start(world: World, backend: str) -> Start:
    """Gather the devices of all ranks, log the start line, and return the start; collective.

    ``backend``: the setting policy.generation.backend. Raises UserError on all ranks if some ranks use a GPU and some
    the CPU.
    """
    devices = tuple(world.gather(device_of_rank(world.device.type, world.device.index)))
    with world.all_or_none("comparing the devices of all ranks"):
        check_devices(devices)
        start = Start(devices, installed_vllm() if backend == "vllm" else None)
        log.info("%s", start.line())
        if (gpus := start.number_of_gpus) and gpus < world.size:
            log.warning(
                "%d ranks share %d GPUs, which needs more memory and time: start one rank for each GPU, with"
                " cluster.gpus_per_node and torchrun's --nproc-per-node",
                *(world.size, gpus),
            )
    return start


def write_versions(run_dir: Path, versions: Mapping[str, Any]) -> None:
    """Write versions.json: the values of this start, and those of earlier starts in the list ``earlier_starts``."""
    path = run_dir / VERSIONS_FILE
    earlier = _earlier(path)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps({**versions, EARLIER_STARTS: earlier}, indent=2) + "\n")
    part.replace(path)  # a kill while writing must not lose the earlier starts


def _earlier(path: Path) -> list[Any]:
    """Return the starts in versions.json, oldest first; the text of an unreadable file is one entry."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    try:
        newest = json.loads(text)
        earlier = list(newest.pop(EARLIER_STARTS, []))
    except (ValueError, AttributeError, TypeError):
        return [{"unreadable": text}]
    return [*earlier, newest]


def _torch() -> str:
    import torch

    return str(torch.__version__)


def _nccl() -> str:
    import torch

    parts: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, parts))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
