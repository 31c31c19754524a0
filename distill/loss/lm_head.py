"""The LM head as three matmuls: logits, gradient of the hidden rows, gradient of the head.

bf16 operands give float32 logits: bf16 logits would move every log-prob by 0.02 nats. The logits' gradient is cast to
the head's dtype; the head's gradient is accumulated in float32. A float32 or float64 head keeps its dtype everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDED = "bfloat16"
"""Value of ``loss_fn.logits_dtype`` that rounds the logits: a faster matmul, 6e-4 nats of error in the KL."""


class Projection:
    """The head's matmuls for one pass over all chunks; autograd does not record them.

    C is the number of rows in a chunk, V the head's rows, D the hidden width.
    """

    def __init__(self, head_VD: Tensor, logits_dtype: str = "float32") -> None:
        self.head_VD = head_VD.detach()
        self.dtype = torch.promote_types(head_VD.dtype, torch.float32)
        """Dtype of logits and of the head's gradient: float32, or float64 for a float64 head."""
        self.logits_dtype = logits_dtype
        self._rounded = logits_dtype == ROUNDED
        self._narrow = head_VD.dtype != self.dtype
        # Only CUDA multiplies bf16 operands into a float32 result; other devices widen the head, once per pass.
        self._widen = self._narrow and not head_VD.is_cuda
        self._operand_VD = self.head_VD.to(self.dtype) if self._widen and not self._rounded else self.head_VD

    def logits(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """Write hidden @ head^T to ``out_CV`` (of ``dtype``, or bf16 for rounded logits) and return it."""
        transposed_DV = self._operand_VD.t()
        if self._rounded and out_CV.dtype == hidden_CD.dtype == transposed_DV.dtype == torch.bfloat16:
            return torch.mm(hidden_CD, transposed_DV, out=out_CV)
        if self._rounded:
            return out_CV.copy_((hidden_CD @ transposed_DV).to(torch.bfloat16))
        if self._narrow and not self._widen:
            return torch.mm(hidden_CD, transposed_DV, out_dtype=self.dtype, out=out_CV)
        return torch.mm(hidden_CD.to(self.dtype), transposed_DV, out=out_CV)

    def cast(self, gradient_CV: Tensor) -> Tensor:
        """Return the logits' gradient in the head's dtype, as both methods below need it."""
        return gradient_CV.to(self.head_VD.dtype)

    def hidden_gradient(self, gradient_CV: Tensor, wide: bool = False) -> Tensor:
        """Return the hidden rows' gradient, [C, D], in the head's dtype, or in ``dtype`` if ``wide``."""
        if not (wide and self._narrow):
            return gradient_CV @ self.head_VD
        if self._widen:
            return gradient_CV.to(self.dtype) @ self._operand_VD.to(self.dtype)
        return torch.mm(gradient_CV, self.head_VD, out_dtype=self.dtype)

    def add_head_gradient(self, gradient_CV: Tensor, hidden_CD: Tensor, into_VD: Tensor, first: bool) -> None:
        """Add this chunk's gradient of the head to ``into_VD`` (of ``dtype``); the ``first`` chunk overwrites it."""
        if self._widen:  # like plain PyTorch: a bf16 matmul, accumulated in float32
            product_VD = gradient_CV.t() @ hidden_CD
            into_VD.copy_(product_VD) if first else into_VD.add_(product_VD)
        elif self._narrow:
            beta = 0 if first else 1
            torch.addmm(
                into_VD,
                gradient_CV.t(),
                hidden_CD,
                beta=beta,
                out_dtype=self.dtype,
                out=into_VD,
            )
        else:
            into_VD.addmm_(gradient_CV.t(), hidden_CD, beta=0 if first else 1)
