"""Triton kernels, each with a reference implementation in PyTorch.

Only this package imports triton directly.
"""

from __future__ import annotations


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter; fixed when they are first imported."""
    from triton.runtime.interpreter import InterpretedFunction

    from distill.kernels import loss_student

    return isinstance(loss_student._reduce, InterpretedFunction)
