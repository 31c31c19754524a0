"""Options of torch's allocator of GPU memory."""

from __future__ import annotations

import os

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_OPTION = "expandable_segments:True"


def use_expandable_segments() -> bool:
    """Let torch's allocator use expandable segments; return whether it was set.

    The option applies to all later allocations, also after CUDA was initialized. Nothing is set without a GPU, or if
    the user has set options of the allocator in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF. Expandable segments
    avoid fragmentation: training frees and allocates tensors of different sizes in each micro-batch.
    """
    if not torch.cuda.is_available() or any(os.environ.get(name) for name in _VARIABLES):
        return False
    os.environ[_VARIABLES[0]] = _OPTION  # for vLLM, which changes the options around its own memory pool
    torch._C._accelerator_setAllocatorSettings(_OPTION)  # torch reads the variable only once
    return True
