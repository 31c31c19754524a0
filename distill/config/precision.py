"""Choose the precision of keys set to ``auto``."""

from __future__ import annotations

from typing import Any

PRECISIONS = (("policy", "precision"), ("policy", "generation", "vllm_cfg", "precision"), ("teacher", "precision"))
"""Key paths that may be ``auto``."""

BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
"""torch's names of CPU features with bfloat16 matrix products (x86 and ARM)."""


def fast_precision() -> str:
    """Return bfloat16 on GPUs and on CPUs with bfloat16 instructions, else float32.

    Without such instructions PyTorch multiplies bfloat16 in plain loops: 9 GFLOP/s per core instead of 76, and 1.2 in
    the backward pass.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if any(features.get(name) for name in BF16_FEATURES) else "float32"


def resolve_auto_precision(tree: dict[str, Any]) -> None:
    """Replace each ``auto`` in a resolved tree by the precision that is fast on this machine."""
    for *sections, key in PRECISIONS:
        section: Any = tree
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(key) == "auto":
            section[key] = fast_precision()
