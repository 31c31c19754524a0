"""Choice of the flash-attention implementation on GPUs (``runtime.attention``).

PyTorch contains FlashAttention-2. From version 2.11 it can replace it by FlashAttention-3 or 4 for the complete
process, if their packages are installed; ``torch.nn.attention.activate_flash_attention_impl`` does this for all calls,
also for ``varlen_attn``. PyTorch calls both a prototype, so a replacement is used only after a small computation
with it gave the same results and gradients as FlashAttention-2's documented formula.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError, reason
from distill.model.attention import attend_packed, attend_per_sequence

log = logging.getLogger(__name__)

_KEY = "runtime.attention"


@dataclass(frozen=True)
class _Implementation:
    torch_name: str
    """Name in PyTorch's registry."""
    package: str
    majors: tuple[int, ...]
    """Major compute capabilities of supported GPUs."""
    max_channels: int
    """Maximum number of channels per head, forward and backward."""


_IMPLEMENTATIONS = {
    "fa3": _Implementation("FA3", "flash_attn_interface", (9,), 256),
    "fa4": _Implementation("FA4", "flash_attn.cute.interface", (9, 10), 128),
}
"""Alternatives to FlashAttention-2 that have a backward, in the order in which ``auto`` tries them."""


def activate_flash_attention(setting: str, configs: list[Any], device: torch.device) -> str:
    """Activate the flash-attention implementation that ``runtime.attention`` selects; return its name. Not collective.

    ``configs``: Hugging Face configurations of all models of this process, because the choice holds for the process.
    Does nothing on CPUs. Raises UserError if ``setting`` is fa3 or fa4 and cannot be used.
    """
    if device.type != "cuda" or setting == "fa2":
        return "fa2"
    channels, window = sorted(set(map(_channels, configs))), any(map(_has_window, configs))
    faults = {}
    for name in _IMPLEMENTATIONS if setting == "auto" else [setting]:
        fault = _fault(name, channels[-1], torch.cuda.get_device_capability(device)) or _activate(
            name, channels, window, device
        )
        if fault is None:
            log.info("attention uses %s (runtime.attention=%s)", name, setting)
            return name
        if setting != "auto":
            raise UserError(f"{_KEY}={setting} cannot be used: {fault}", f"set {_KEY}=auto", key=_KEY, value=setting)
        faults[name] = fault
    reasons = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    log.info("attention uses fa2, FlashAttention-2 of PyTorch (runtime.attention=auto; %s)", reasons)
    return "fa2"


def check_same_attention(setting: str, names: Sequence[str]) -> None:
    """Raise UserError if the ranks have different implementations; their rounding differs, and so would the results.

    ``names``: the result of ``activate_flash_attention`` on each rank. ``setting``: ``runtime.attention``.
    """
    if len(set(names)) > 1:
        ranks = ", ".join(f"{name} on rank {names.index(name)}" for name in sorted(set(names)))
        raise UserError(
            f"{_KEY}={setting} selects different attention kernels on different ranks ({ranks})",
            f"set {_KEY}=fa2, or install the same packages on all nodes",
            key=_KEY,
            value=setting,
        )


def _channels(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _has_window(config: Any) -> bool:
    return "sliding_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def _fault(name: str, channels: int, capability: tuple[int, int]) -> str | None:
    """Return why an implementation cannot be used, without a computation; None: it may be usable."""
    wanted = _IMPLEMENTATIONS[name]
    if capability[0] not in wanted.majors:
        return f"it does not support GPUs of compute capability {capability[0]}.{capability[1]}"
    if channels > wanted.max_channels:
        return f"it supports at most {wanted.max_channels} channels per attention head, but a model has {channels}"
    if wanted.torch_name not in _registered():
        return f"PyTorch {torch.__version__} cannot activate it"
    if not _is_installed(wanted.package):
        return f"the package {wanted.package} is not installed"
    return None


def _registered() -> list[str]:
    import torch.nn.attention as torch_attention

    registered = getattr(torch_attention, "list_flash_attention_impls", list)
    return list(registered())


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _activate(name: str, channels: list[int], window: bool, device: torch.device) -> str | None:
    """Activate an implementation and verify it for each number of channels per head; not collective.

    Returns None, or the fault after FlashAttention-2 is active again.
    """
    import torch.nn.attention as torch_attention

    try:
        torch_attention.activate_flash_attention_impl(_IMPLEMENTATIONS[name].torch_name)
        faults = (_wrong_result(count, window, device) for count in channels)
        fault = next((fault for fault in faults if fault is not None), None)
    except Exception as error:  # packages of other versions fail in many ways
        fault = f"a test of it failed ({reason(error)})"
    if fault is not None:
        torch_attention.restore_flash_attention_impl()
    return fault


def _wrong_result(channels: int, window: bool, device: torch.device) -> str | None:
    """Compare output and gradients of the active implementation with ``attend_per_sequence`` in float32."""
    bounds = (0, 70, 71, 300)
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, bounds[-1], count, channels, generator=generator) for count in (4, 2, 2)]
    for size in (None, 64) if window else (None,):
        exact = _results(attend_per_sequence, [tensor.to(device) for tensor in heads], bounds, size)
        ours = _results(attend_packed, [tensor.to(device, torch.bfloat16) for tensor in heads], bounds, size)
        for our, exactly in zip(ours, exact, strict=True):
            error = float((our.float() - exactly).norm() / exactly.norm())
            if not error < 0.02:
                return f"its results differ from PyTorch's by {error:.2g}"
    return None


def _results(attend: Any, heads: list[Tensor], bounds: tuple[int, ...], window: int | None) -> Iterator[Tensor]:
    inputs = [tensor.transpose(1, 2).requires_grad_() for tensor in heads]
    out = attend(*inputs, bounds, None, window)
    yield out.detach()
    yield from torch.autograd.grad(out, inputs, torch.ones_like(out) * out.detach())
