"""Matmuls of the LM head: logits, gradient of the hidden states, gradient of the head's weight.

With a bf16 head and bf16 hidden states the logits are float32 by default, because rounding the logits to bf16 changes
log-probs by about 0.02 nats. The gradient of the logits is converted to the head's dtype. The gradient of the head is
accumulated in float32. With a float32 or float64 head, all tensors have the head's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDED = "bfloat16"
"""Value of ``loss_fn.logits_dtype`` for which the student's logits are rounded to bf16.

Rounding makes the matmul of the LM head faster and changes the KL between student and teacher by about 6e-4 nats.
"""


class Projection:
    """Matmuls of the LM head for the chunks of rows of one micro-batch, without autograd.

    C is the number of rows (response tokens) in a chunk, V the number of rows of the head's weight, D the hidden size.
    """

    def __init__(self, head_VD: Tensor, logits_dtype: str = "float32") -> None:
        self.head_VD = head_VD.detach()
        self.dtype = torch.promote_types(head_VD.dtype, torch.float32)
        """Dtype of the head's gradient, and of logits that are not rounded to bf16.

        It is float64 for a float64 head, else float32.
        """
        self.logits_dtype = logits_dtype
        self._rounded = logits_dtype == ROUNDED
        self._narrow = head_VD.dtype != self.dtype
        # Only CUDA has a matmul of bf16 operands with a float32 result; elsewhere the head is converted once per pass.
        self._widen = self._narrow and not head_VD.is_cuda
        self._operand_VD = self.head_VD.to(self.dtype) if self._widen and not self._rounded else self.head_VD

    def logits(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """Write the logits, hidden states @ head^T, to ``out_CV`` and return ``out_CV``.

        ``out_CV`` has dtype ``self.dtype``, or bf16 if ``loss_fn.logits_dtype`` is bfloat16.
        """
        transposed_DV = self._operand_VD.t()
        if self._rounded and out_CV.dtype == hidden_CD.dtype == transposed_DV.dtype == torch.bfloat16:
            return torch.mm(hidden_CD, transposed_DV, out=out_CV)
        if self._rounded:
            return out_CV.copy_((hidden_CD @ transposed_DV).to(torch.bfloat16))
        if self._narrow and not self._widen:
            return torch.mm(hidden_CD, transposed_DV, out_dtype=self.dtype, out=out_CV)
        return torch.mm(hidden_CD.to(self.dtype), transposed_DV, out=out_CV)

    def cast(self, gradient_CV: Tensor) -> Tensor:
        """Return the gradient of the logits, converted to the dtype of the head's weight.

        ``hidden_gradient`` and ``add_head_gradient`` require this dtype.
        """
        return gradient_CV.to(self.head_VD.dtype)

    def hidden_gradient(self, gradient_CV: Tensor, wide: bool = False) -> Tensor:
        """Return the gradient [C, D] of the hidden states from the gradient [C, V] of the logits.

        The result has the dtype of the head's weight, or with ``wide`` the dtype ``self.dtype`` (at least float32).
        """
        if not (wide and self._narrow):
            return gradient_CV @ self.head_VD
        if self._widen:
            return gradient_CV.to(self.dtype) @ self._operand_VD.to(self.dtype)
        return torch.mm(gradient_CV, self.head_VD, out_dtype=self.dtype)

    def add_head_gradient(self, gradient_CV: Tensor, hidden_CD: Tensor, into_VD: Tensor, first: bool) -> None:
        """Add one chunk's gradient of the head's weight to ``into_VD``, a buffer of dtype ``self.dtype``.

        ``gradient_CV`` is the gradient of the chunk's logits, ``hidden_CD`` the hidden states of the chunk. If
        ``first`` is True (first chunk), the result overwrites ``into_VD``, which may be uninitialised.
        """
        if self._widen:  # as in plain PyTorch: a bf16 matmul, added to a float32 sum
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
