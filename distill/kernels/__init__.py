"""Triton kernels; each names its plain PyTorch twin. No other package imports triton."""

from __future__ import annotations


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter; fixed at their first import."""
    from triton.runtime.interpreter import InterpretedFunction

    from distill.kernels import loss_student

    return isinstance(loss_student._reduce, InterpretedFunction)
