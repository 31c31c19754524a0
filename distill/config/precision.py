"""What this machine computes fast, for the keys that leave it open."""

from __future__ import annotations

from typing import Any

PRECISIONS = (
    ("policy", "precision"),
    ("policy", "generation", "vllm_cfg", "precision"),
    ("teacher", "precision"),
)
"""Where a recipe may say ``precision: auto``."""

BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
"""Names under which torch tells of bfloat16 products on x86 and on ARM."""


def fast_precision() -> str:
    """bfloat16 where a GPU is present or the processor multiplies bfloat16, else float32.

    Without such instructions PyTorch's bfloat16 products are loops: 9 GFLOP/s a core where float32 has 76, and 1.2 with
    the operand a backward has.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if any(features.get(name) for name in BF16_FEATURES) else "float32"


def decide_precision(tree: dict[str, Any]) -> None:
    """Put what this machine computes fast in the place of each ``auto``, in a tree without interpolations."""
    for *sections, key in PRECISIONS:
        section: Any = tree
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(key) == "auto":
            section[key] = fast_precision()
