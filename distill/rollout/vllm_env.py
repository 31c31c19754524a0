"""Environment variables and log output of vLLM, and the allocator options that vLLM must not change."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distill.rollout.vllm_version import installed_vllm
from distill.supervise.logs import log_library

_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share a machine; torchrun sets their threads
    "TRITON_F32_DEFAULT": "ieee",  # TF32 attention would differ from the trainer's float32 by more than allowed
}
_OWN_LOGGING = ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH")
"""Environment variables with which a user configures vLLM's own log output."""
_KEEPS_OPTIONS = (0, 32)
"""First release of vLLM that keeps the options of torch's allocator."""
_FIXED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the trainer's process
    # vLLM sets the precision of float32 products for the complete process. With TF32, the trainer's float32 log-probs
    # would differ from the engine's by more than allowed, and merged adapters would depend on the setting.
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
}


def prepare_for_vllm(rank: int, size: int, local_rank: int) -> None:
    """Set the environment variables that vLLM reads; call this function before vLLM is imported.

    Variables that the user has set keep their values, except those in _FIXED. RANK, WORLD_SIZE and LOCAL_RANK are
    always set, because they are missing in a process that no launcher (such as torchrun) started. ``local_rank``: index
    of this rank's device among the visible devices. vLLM's log goes to the rank's log file, and only errors to the
    console: its warnings are about intended calls (sleep on CPU, seeds).
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_FIXED, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if not any(os.environ.get(name) for name in _OWN_LOGGING):
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    log_library("vllm", os.environ["VLLM_LOGGING_LEVEL"].upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


@contextmanager
def kept_allocator_options(on_cpu: bool) -> Iterator[None]:
    """Restore the options of torch's CUDA allocator after the ``with`` block, in which vLLM is created.

    vLLM below 0.32 sets one option, and torch then resets the options that the user has set in PYTORCH_ALLOC_CONF or
    PYTORCH_CUDA_ALLOC_CONF, such as expandable_segments.
    """
    yield
    options = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    installed = installed_vllm()
    release = installed.release if installed else None
    if options and not on_cpu and release is not None and release < _KEEPS_OPTIONS:
        set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (set_options or torch.cuda.memory._set_allocator_settings)(options)
