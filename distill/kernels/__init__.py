"""Triton kernels of the loss: the fast twins of its PyTorch passes over logits. Nothing else imports triton."""

from __future__ import annotations


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is decided when they are first imported."""
    from triton.runtime.interpreter import InterpretedFunction

    from distill.kernels import loss_student as student

    return isinstance(student._reduce, InterpretedFunction)
