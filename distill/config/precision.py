"""Replace the precision ``auto`` by the dtype that is fast on this machine."""

from __future__ import annotations

from typing import Any

PRECISIONS = (("policy", "precision"), ("policy", "generation", "vllm_cfg", "precision"), ("teacher", "precision"))
"""Paths, as tuples of names, of the configuration keys whose value may be ``auto``."""

BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
"""PyTorch's names of CPU features with bfloat16 matrix multiplication (x86 and ARM)."""


def fast_precision() -> str:
    """Return bfloat16 on machines with a GPU or with bfloat16 instructions of the CPU, else float32.

    Without such instructions, PyTorch multiplies bfloat16 matrices at 9 GFLOP/s per core (1.2 in the backward pass),
    and float32 matrices at 76 GFLOP/s.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if any(features.get(name) for name in BF16_FEATURES) else "float32"


def resolve_auto_precision(tree: dict[str, Any]) -> None:
    """Replace each precision ``auto`` in the configuration ``tree`` in place by this machine's fast dtype."""
    for *sections, key in PRECISIONS:
        section: Any = tree
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(key) == "auto":
            section[key] = fast_precision()
