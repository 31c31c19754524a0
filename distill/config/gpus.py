"""Peak numbers of GPUs, from NVIDIA's data sheets; the only such table of the project. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from distill.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Peak numbers of one GPU; none of them is reached in practice."""

    name: str
    """Name for the key ``cluster.gpu``, in lower case, such as a100-40."""
    tflops: float
    """bfloat16 TFLOP/s without sparsity."""
    memory_gbs: float
    """Bandwidth of the memory in GB/s."""
    memory_gb: float | None
    """Size of the memory in GB that a program can use; None if unknown.

    It is below the nominal size if ECC takes a part of GDDR6 memory (l40s: 45 of 48), and for Blackwell (b200: 180 of
    192).
    """
    link_gbs: float
    """Bandwidth to the other GPUs of the node in one direction, in GB/s: NVLink, otherwise PCIe."""
    network_gbs: float
    """Bandwidth to other nodes per GPU in one direction, in GB/s.

    It is a property of the cluster and therefore an assumption: 400 Gb/s per GPU for Hopper and Blackwell GPUs with
    NVLink, 200 Gb/s for A100 and A800 with NVLink, 100 Gb/s for all other GPUs.
    """
    words: str
    """Words of the name that the driver reports, separated by spaces."""


GPUS = (
    Gpu("gb300", 2500, 8000, 279, 900, 50, "GB300"),
    Gpu("gb200", 2500, 8000, 186, 900, 50, "GB200"),
    Gpu("b300", 2250, 8000, 270, 900, 50, "B300"),
    Gpu("b200", 2250, 8000, 180, 900, 50, "B200"),
    Gpu("gh200", 989, 4000, 96, 450, 50, "GH200"),
    Gpu("h200-nvl", 835, 4800, 141, 450, 50, "H200 NVL"),
    Gpu("h200", 989, 4800, 141, 450, 50, "H200"),
    Gpu("h100-nvl", 835, 3900, 94, 300, 50, "H100 NVL"),
    Gpu("h100-pcie", 756, 2000, 80, 64, 12.5, "H100 PCIe"),
    Gpu("h100", 989, 3350, 80, 450, 50, "H100"),
    Gpu("h800", 989, 3350, 80, 200, 50, "H800"),
    Gpu("h20", 148, 4000, 96, 450, 50, "H20"),
    Gpu("a100-pcie-40", 312, 1555, 40, 32, 12.5, "A100 PCIe 40GB"),
    Gpu("a100-pcie-80", 312, 1935, 80, 32, 12.5, "A100 PCIe"),
    Gpu("a100-40", 312, 1555, 40, 300, 25, "A100 40GB"),
    Gpu("a100-80", 312, 2039, 80, 300, 25, "A100"),
    Gpu("a800-pcie", 312, 1935, 80, 32, 12.5, "A800 PCIe"),
    Gpu("a800", 312, 2039, 80, 200, 25, "A800"),
    Gpu("a30", 165, 933, 24, 32, 12.5, "A30"),
    Gpu("a40", 150, 696, 45, 32, 12.5, "A40"),
    Gpu("a10g", 70, 600, 22.5, 32, 12.5, "A10G"),
    Gpu("a10", 125, 600, 22.5, 32, 12.5, "A10"),
    Gpu("l40s", 362, 864, 45, 32, 12.5, "L40S"),
    Gpu("l40", 181, 864, 45, 32, 12.5, "L40"),
    Gpu("l4", 121, 300, 22.5, 32, 12.5, "L4"),
)
"""Known GPUs. The first one whose words are all in a device's name, in upper or lower case, is its entry.

So longer names come first.
"""

_CUSTOM_LINK_GBS, _CUSTOM_NETWORK_GBS = 300.0, 25.0
"""Assumed bandwidths of a GPU that is given as TFLOPS/GBPS, in GB/s: those of an A100."""
_NUMBER = r"\d+(?:\.\d+)?"


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the GPU with the name that torch or the driver reports, such as NVIDIA H100 80GB HBM3; None if unknown."""
    words = set(device_name.upper().replace("-", " ").split())
    return next((gpu for gpu in GPUS if set(gpu.words.upper().split()) <= words), None)


def parse_gpu(text: str) -> Gpu:
    """Return the GPU of ``cluster.gpu``: a name in upper or lower case, or TFLOPS/GBPS.

    Raises UserError with the list of names for any other text.
    """
    name = text.strip().lower()
    found = next((gpu for gpu in GPUS if gpu.name == name), None)
    if found is not None:
        return found
    numbers = re.fullmatch(rf"({_NUMBER})\s*/\s*({_NUMBER})", name)
    if numbers is not None:
        tflops, gbs = map(float, numbers.groups())
        if 0 < tflops < math.inf and 0 < gbs < math.inf:
            return Gpu(name, tflops, gbs, None, _CUSTOM_LINK_GBS, _CUSTOM_NETWORK_GBS, name)
    names = ", ".join(sorted(gpu.name for gpu in GPUS))
    raise UserError(
        f"cluster.gpu={text} is neither the name of a known GPU nor TFLOPS/GBPS",
        f"set it to one of {names}; or to the bfloat16 TFLOP/s without sparsity and the GB/s of the memory, such as"
        " 989/4800; or to null",
        key="cluster.gpu",
        value=text,
    )
