"""Matmuls of the LM head: logits, gradient of the hidden states, gradient of the head's weight.

With a bf16 head and bf16 hidden states the logits are float32 by default, because rounding the logits to bf16 changes
log-probs by about 0.02 nats. The gradient of the logits is converted to the head's dtype. The gradient of the head is
accumulated in float32. With a float32 or float64 head, all tensors have the head's dtype.

A tokenizer often has an odd number of ids, and matmul kernels are slow if a dimension of a matrix is not a multiple of
16 bytes. The matmuls therefore include some rows of the head that are vocabulary padding: see ``padded_columns``. The
logits in these columns are never read, and their gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDED = "bfloat16"
"""Value of ``loss_fn.logits_dtype`` for which the student's logits are rounded to bf16.

Rounding makes the matmul of the LM head faster and changes the KL between student and teacher by about 6e-4 nats.
"""

_MULTIPLE = 64
"""The number of columns in the matmuls is a multiple of this number: 128 bytes of bf16."""


def padded_columns(vocab: int, head_rows: int) -> int:
    """Return the number of columns of logits in the matmuls of the LM head: at least ``vocab``, the number of tokens.

    It is the next multiple of 64, or ``head_rows``, the number of rows of the head's weight, if that is smaller.
    """
    return min(head_rows, -(-vocab // _MULTIPLE) * _MULTIPLE)


def with_padding(rows_CV: Tensor, columns: int) -> Tensor:
    """Return a view of ``rows_CV``, columns of a wider buffer, that has ``columns`` columns of this buffer."""
    if columns == rows_CV.shape[1]:
        return rows_CV
    return rows_CV.as_strided((len(rows_CV), columns), (rows_CV.stride(0), 1))


def with_zero_padding(rows_CV: Tensor, columns: int) -> Tensor:
    """Return the view of ``with_padding`` after its additional columns were set to 0."""
    rows_CP = with_padding(rows_CV, columns)
    if rows_CP is not rows_CV:
        rows_CP[:, rows_CV.shape[1] :] = 0
    return rows_CP


class Projection:
    """Matmuls of the LM head for the chunks of rows of one micro-batch, without autograd.

    C is the number of rows (response tokens) in a chunk, V the number of tokens, P the number of columns in the
    matmuls (``padded_columns``), D the hidden size. ``vocab`` is V; None means all rows of the head's weight.
    """

    def __init__(self, head_VD: Tensor, vocab: int | None = None, logits_dtype: str = "float32") -> None:
        self.columns = padded_columns(vocab or len(head_VD), len(head_VD))
        """P, the number of columns in the matmuls."""
        self.head_PD = head_VD.detach().narrow(0, 0, self.columns)
        self.dtype = torch.promote_types(head_VD.dtype, torch.float32)
        """Dtype of the head's gradient, and of logits that are not rounded to bf16.

        It is float64 for a float64 head, else float32.
        """
        self.logits_dtype = logits_dtype
        self._rounded = logits_dtype == ROUNDED
        self._narrow = head_VD.dtype != self.dtype
        # Only CUDA has a matmul of bf16 operands with a float32 result; elsewhere the head is converted once per pass.
        self._widen = self._narrow and not head_VD.is_cuda
        self._operand_PD = self.head_PD.to(self.dtype) if self._widen and not self._rounded else self.head_PD

    def logits(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """Write the logits, hidden states @ head^T, to ``out_CV`` and return ``out_CV``.

        ``out_CV`` has dtype ``self.dtype``, or bf16 if ``loss_fn.logits_dtype`` is bfloat16. It must be a view of a
        buffer with at least P columns, because columns V to P are written too.
        """
        transposed_DP = self._operand_PD.t()
        out_CP = with_padding(out_CV, self.columns)
        if self._rounded and out_CV.dtype == hidden_CD.dtype == transposed_DP.dtype == torch.bfloat16:
            torch.mm(hidden_CD, transposed_DP, out=out_CP)
        elif self._rounded:
            out_CP.copy_((hidden_CD @ transposed_DP).to(torch.bfloat16))
        elif self._narrow and not self._widen:
            torch.mm(hidden_CD, transposed_DP, out_dtype=self.dtype, out=out_CP)
        else:
            torch.mm(hidden_CD.to(self.dtype), transposed_DP, out=out_CP)
        return out_CV

    def cast(self, gradient_CV: Tensor) -> Tensor:
        """Return the gradient [C, P] of the logits in the dtype of the head's weight, with 0 in columns V to P.

        ``gradient_CV`` must be a view of a buffer with at least P columns; columns V to P of the buffer become 0 too.
        """
        return with_zero_padding(gradient_CV, self.columns).to(self.head_PD.dtype)

    def hidden_gradient(self, gradient_CP: Tensor, wide: bool = False) -> Tensor:
        """Return the gradient [C, D] of the hidden states from the result of ``cast``.

        The result has the dtype of the head's weight, or with ``wide`` the dtype ``self.dtype`` (at least float32).
        """
        if not (wide and self._narrow):
            return gradient_CP @ self.head_PD
        if self._widen:
            return gradient_CP.to(self.dtype) @ self._operand_PD.to(self.dtype)
        return torch.mm(gradient_CP, self.head_PD, out_dtype=self.dtype)

    def add_head_gradient(self, gradient_CP: Tensor, hidden_CD: Tensor, into_PD: Tensor, first: bool) -> None:
        """Add one chunk's gradient of the head's weight to ``into_PD``, a buffer of dtype ``self.dtype``.

        ``gradient_CP`` is the result of ``cast``, ``hidden_CD`` the hidden states of the chunk. If ``first`` is True
        (first chunk), the result overwrites ``into_PD``, which may be uninitialised.
        """
        if self._widen:  # as in plain PyTorch: a bf16 matmul, added to a float32 sum
            product_PD = gradient_CP.t() @ hidden_CD
            into_PD.copy_(product_PD) if first else into_PD.add_(product_PD)
        elif self._narrow:
            beta = 0 if first else 1
            torch.addmm(
                into_PD,
                gradient_CP.t(),
                hidden_CD,
                beta=beta,
                out_dtype=self.dtype,
                out=into_PD,
            )
        else:
            into_PD.addmm_(gradient_CP.t(), hidden_CD, beta=0 if first else 1)
