"""Describe the device of each rank, and find GPUs that Slurm or the NVIDIA driver shows but torch cannot use."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.distributed import slurm
from distill.errors import MissingError, UserError

_ROOT = Path("/")
"""Root of the file system; tests replace it."""
_DRIVER_OF_CUDA = {12: 525, 13: 580}
"""Maps a major version of CUDA to the oldest major version of the NVIDIA driver that supports it."""
_NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
_TRADEMARKS = re.compile(r"\((?:R|TM)\)| CPU(?= |$)| Processor$| @.*")
_SMI_TIMEOUT_S = 10


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: version, CUDA version of the build, and whether it finds a GPU."""

    version: str
    cuda: str | None
    """CUDA version, such as 13.0; None for a build without CUDA."""
    finds_gpu: bool


@dataclass(frozen=True)
class RankDevice:
    """Host and device of one rank."""

    host: str
    kind: str
    """Type of the torch device: cuda or cpu."""
    name: str
    """Name of the GPU, or name and number of cores of the CPU."""
    uid: str
    """Identifier of the GPU; the host name for a CPU."""
    driver: str | None
    """Version of the NVIDIA driver; None for a CPU."""


def check_gpus(device: str) -> None:
    """Raise UserError if Slurm or the driver shows GPUs and torch finds none, unless ``device`` is cpu.

    ``device``: the setting runtime.device. With ``device`` cuda, a machine without GPUs is an error too. If
    ``device`` is auto and neither Slurm nor the driver shows a GPU, torch is not imported.
    """
    if device == "cpu":
        return
    shown = shown_gpus()
    if shown is None and device != "cuda":
        return
    build = torch_build()
    if build.finds_gpu:
        return
    if shown is None:
        problem, fix = f"torch {build.version} finds no CUDA device", "set runtime.device=auto or cpu"
    else:
        cause, fix = _cause(build)
        problem = f"{shown}, while the installed torch {build.version} finds no GPU, because {cause}"
        fix += ", or set runtime.device=cpu to use the CPU"
    raise MissingError(f"runtime.device={device}, but {problem}", fix, key="runtime.device", value=device)


def torch_build() -> TorchBuild:
    """Return the installed build of torch."""
    import torch

    return TorchBuild(torch.__version__, torch.version.cuda or torch.version.hip, torch.cuda.is_available())


def shown_gpus() -> str | None:
    """Return a clause about the GPUs that Slurm or the NVIDIA driver shows on this machine; None without GPUs.

    Reads environment variables and files. If these show no GPU, as on Windows Subsystem for Linux, runs nvidia-smi, if
    it is installed, with a timeout.
    """
    host = socket.gethostname()
    if variable := slurm.gpu_variable():
        return f"Slurm gives this job GPUs on {host} ({variable})"
    devices = len([path for path in _ROOT.glob("dev/nvidia*") if path.name.removeprefix("nvidia").isdecimal()])
    if devices:
        return f"the NVIDIA driver shows {_gpus(devices)} on {host} (/dev/nvidia0)"
    if devices := len(list(_ROOT.glob("proc/driver/nvidia/gpus/*"))):
        return f"the NVIDIA driver shows {_gpus(devices)} on {host} (/proc/driver/nvidia/gpus)"
    if devices := _listed_by_smi():
        return f"nvidia-smi lists {_gpus(devices)} on {host}"
    return None


def _gpus(number: int) -> str:
    return f"{number} GPU" + "s" * (number != 1)


def _listed_by_smi() -> int:
    """Return the number of GPUs that ``nvidia-smi -L`` lists; 0 if nvidia-smi is missing, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))


def _cause(build: TorchBuild) -> tuple[str, str]:
    """Return why ``build`` finds no GPU on a machine that has GPUs, and the fix."""
    if build.cuda is None:
        return "it is a build without CUDA", "install the packages for GPUs (make venv-gpu)"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in _NO_DEVICES:
        return f"CUDA_VISIBLE_DEVICES={hidden} hides all GPUs", "unset CUDA_VISIBLE_DEVICES"
    driver = driver_version()
    if driver is None:
        return "it finds no NVIDIA driver", "install the NVIDIA driver (nvidia-smi must list the GPUs)"
    needed = _DRIVER_OF_CUDA.get(int(build.cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) < needed:
        return (
            f"CUDA {build.cuda} needs driver {needed} or newer, and driver {driver} is installed",
            f"update the driver to {needed} or newer, or install a torch for an older CUDA",
        )
    if not any(_ROOT.glob("dev/nvidia[0-9]*")):
        return "this process has no access to a GPU", "start the container with its GPUs (docker run --gpus all)"
    return "CUDA does not start", "repair the driver until nvidia-smi lists the GPUs"


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as 580.65.06; None if there is no driver."""
    try:
        text = (_ROOT / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def device_of_rank(kind: str, index: int | None) -> RankDevice:
    """Return the host and device of this rank; ``kind``, ``index``: type and index of its torch device."""
    host = socket.gethostname()
    if kind != "cuda":
        return RankDevice(host, "cpu", cpu_name(), host, None)
    import torch

    found = torch.cuda.get_device_properties(index or 0)
    return RankDevice(host, "cuda", found.name, str(getattr(found, "uuid", index)), driver_version())


def cpu_name() -> str:
    """Return the name of the CPU and the number of cores that this process may use: AMD EPYC, 2 cores."""
    try:
        text = (_ROOT / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = _TRADEMARKS.sub("", found[1]) if found else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{' '.join(name.split())}, {cores} core{'s' * (cores != 1)}"


def check_devices(devices: Sequence[RankDevice]) -> None:
    """Raise UserError if some ranks use a GPU and some the CPU; ``devices`` are in order of rank."""
    first = devices[0]
    for rank, found in enumerate(devices):
        if found.kind != first.kind:
            raise UserError(
                f"runtime.device=auto, but rank 0 on {first.host} uses {first.kind} and rank {rank} on {found.host}"
                f" uses {found.kind}",
                "repair the GPUs of these nodes or leave the nodes out, or set runtime.device=cpu",
                key="runtime.device",
                value="auto",
            )


def describe_devices(devices: Sequence[RankDevice]) -> str:
    """Return the devices of all ranks as text: 4 x NVIDIA H100 80GB HBM3, or the CPU of HOST (AMD EPYC, 2 cores)."""
    hosts = {device.host: None for device in devices}
    if devices[0].kind == "cpu":
        names = " and ".join({device.name: None for device in devices})
        return f"the CPU of {devices[0].host} ({names})" if len(hosts) == 1 else f"{len(hosts)} nodes' CPUs ({names})"
    counts = Counter({(device.host, device.uid): device.name for device in devices}.values())
    text = " + ".join(f"{count} x {name}" for name, count in counts.items())
    return text if len(hosts) == 1 else f"{text} ({len(hosts)} nodes)"
