"""Replace ``auto``, as the value of a precision key, by the dtype that is fast on this machine."""

from __future__ import annotations

from typing import Any

PRECISIONS = (("policy", "precision"), ("policy", "generation", "vllm_cfg", "precision"), ("teacher", "precision"))
"""Configuration keys whose value may be ``auto``, each split at its dots."""

BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features (x86 and ARM) for bfloat16 matrix multiplication, as named by torch.cpu.get_capabilities()."""


def fast_precision() -> str:
    """Return bfloat16 if this machine has a GPU or a CPU with bfloat16 instructions, else float32.

    On a CPU without such instructions, PyTorch multiplies bfloat16 matrices at 9 GFLOP/s per core (1.2 in the
    backward pass), and float32 matrices at 76 GFLOP/s.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if any(features.get(name) for name in BF16_FEATURES) else "float32"


def resolve_auto_precision(tree: dict[str, Any]) -> None:
    """In the configuration ``tree``, replace each precision ``auto`` in place by the result of fast_precision."""
    for *sections, key in PRECISIONS:
        section: Any = tree
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(key) == "auto":
            section[key] = fast_precision()
