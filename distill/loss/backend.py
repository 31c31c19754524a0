"""Which pass reduces the logits: Triton's kernels on CUDA, PyTorch elsewhere or where it is asked for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss.reduction import Partial, Reduced, Scratch, reduce_in_place
from distill.types import TopK


class Pass(Protocol):
    """The passes over [C, V] of one backend."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Dtype of the buffer that takes the logits: ``wide``, or bf16 where rounded logits stay narrow."""

    def reduce(
        self, z_CV: Tensor, ids_CK: Tensor, temperature: float, scratch: Scratch, gradient_dtype: torch.dtype
    ) -> Reduced:
        """Down to the K + 1 outcomes; overwrites ``z_CV``, which holds logits that nothing has divided yet."""

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """int [C, k]: the ids of the k largest logits, in any order; leaves ``z_CV`` as it is."""

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """The targets of a row in one pass where the backend has one, else None; leaves ``z_CV`` as it is."""


class TorchPass:
    """PyTorch, on any device and in float64 too."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """See ``Pass``."""
        return wide

    def reduce(
        self, z_CV: Tensor, ids_CK: Tensor, temperature: float, scratch: Scratch, gradient_dtype: torch.dtype
    ) -> Reduced:
        """See ``Pass``."""
        divide(z_CV, temperature)
        return reduce_in_place(z_CV, ids_CK, scratch.get("spare", len(z_CV), z_CV.dtype))

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """See ``Pass``."""
        return z_CV.topk(k, dim=1).indices

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """See ``Pass``."""
        return None


@dataclass(frozen=True)
class _TritonReduced:
    partial: Partial
    z_CV: Tensor
    ids_CK: Tensor
    inverse_temperature: float
    scratch: Scratch
    gradient_dtype: torch.dtype

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """See ``Reduced``."""
        from distill.kernels.loss_student import gradient_rows

        out_CV = self.z_CV
        if out_CV.dtype != self.gradient_dtype:
            out_CV = self.scratch.get("gradient", len(out_CV), self.gradient_dtype)
        return gradient_rows(
            self.z_CV,
            self.ids_CK,
            self.partial.tail_top_C,
            factor_C,
            slope_C,
            d_logits_CK,
            self.inverse_temperature,
            out_CV,
        )


class TritonPass:
    """Two reads and one write of the logits; the gradient leaves in the dtype that the head multiplies."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """See ``Pass``."""
        return torch.bfloat16 if rounded else wide

    def reduce(
        self, z_CV: Tensor, ids_CK: Tensor, temperature: float, scratch: Scratch, gradient_dtype: torch.dtype
    ) -> Reduced:
        """See ``Pass``."""
        from distill.kernels.loss_student import reduce_rows

        partial = Partial(*reduce_rows(z_CV, ids_CK, 1 / temperature))
        return _TritonReduced(partial, z_CV, ids_CK, 1 / temperature, scratch, gradient_dtype)

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """See ``Pass``."""
        from distill.kernels.topk import topk_ids

        return topk_ids(z_CV, k)

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """See ``Pass``."""
        from distill.kernels.topk import topk_with_tail

        return TopK(*topk_with_tail(z_CV, k, 1 / temperature))


def choose_pass(backend: str, device: torch.device, dtype: torch.dtype) -> Pass:
    """The pass for logits of ``dtype`` on ``device``.

    ``auto`` is Triton on CUDA and PyTorch elsewhere; float64, which is for proofs, is always PyTorch's. ``triton`` on a
    CPU runs under Triton's interpreter, if that was switched on before its first import.

    Errors: ``UserError`` where Triton is asked for, or needed, and missing.
    """
    wants = backend == "triton" or (backend == "auto" and device.type == "cuda")
    if not wants or dtype == torch.float64:
        return TorchPass()
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            f"loss_fn.backend={backend} needs Triton on {device.type}, and it isn't installed: install triton, or set "
            "loss_fn.backend=torch for slower passes"
        )
    if device.type != "cuda":
        from distill.kernels import interpreted

        if not interpreted():
            raise UserError(f"loss_fn.backend=triton can't run on {device.type}: set loss_fn.backend=auto")
    return TritonPass()


def check_loss_backend(loss_config: LossConfig, device: torch.device) -> None:
    """Refuse a backend that this machine can't run, before any weight is loaded. Errors: ``UserError``."""
    choose_pass(loss_config.backend, device, torch.float32)


def divide(z_CV: Tensor, temperature: float) -> None:
    """Divide in place, or leave the memory alone."""
    if temperature != 1.0:
        z_CV.div_(temperature)
