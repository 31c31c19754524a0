"""Environment variables and log output of vLLM, and the options of torch's allocator while vLLM is created."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distill.supervise.logs import log_library

_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share a machine; torchrun sets their threads
    "TRITON_F32_DEFAULT": "ieee",  # TF32 attention would differ from the trainer's float32 by more than allowed
}
_OWN_LOGGING = ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH")
"""Environment variables with which a user configures vLLM's own log output."""
_EXPANDABLE = re.compile(r"\bexpandable_segments\s*:\s*True\b")
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
    """Disable expandable segments in the ``with`` block, in which vLLM is created; then restore the user's options.

    CUDA graphs of an engine on several GPUs share their memory between processes, and memory in expandable segments
    cannot be shared in this way: vLLM would end the process. vLLM below 0.32 also resets the options that the user has
    set in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF.
    """
    name = next((name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if os.environ.get(name)), None)
    if on_cpu or name is None:
        yield
        return
    options = os.environ[name]
    _set_allocator_options(name, _EXPANDABLE.sub("expandable_segments:False", options))
    try:
        yield
    finally:
        _set_allocator_options(name, options)


def _set_allocator_options(name: str, options: str) -> None:
    """Set all options of torch's allocator, which resets absent ones, and the variable, which vLLM may read."""
    os.environ[name] = options
    set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (set_options or torch.cuda.memory._set_allocator_settings)(options)
