"""Triton kernels of the loss, of the top-k and of model layers, each with a reference implementation in PyTorch.

Only this package imports triton directly.
"""

from __future__ import annotations


def interpreted() -> bool:
    """Return whether the Triton kernels run in Triton's interpreter instead of on a GPU.

    The environment variable ``TRITON_INTERPRET``, read when the kernels are first imported, selects the interpreter.
    """
    from triton.runtime.interpreter import InterpretedFunction

    from distill.kernels import loss_student

    return isinstance(loss_student._reduce, InterpretedFunction)
