"""Set vLLM's environment variables and log level before vLLM is imported."""

from __future__ import annotations

import logging
import os
import warnings

_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about intended calls (sleep on CPU, seeds)
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share a machine; torchrun sets their threads
    "TRITON_F32_DEFAULT": "ieee",  # TF32 attention would differ from the trainer's float32 by more than allowed
}
_FIXED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine runs in the trainer's process


def prepare_for_vllm(rank: int, size: int, local_rank: int) -> None:
    """Set the environment variables that vLLM reads; call this function before vLLM is imported.

    Variables that the user has set keep their values, except VLLM_ENABLE_V1_MULTIPROCESSING, which must be 0. RANK,
    WORLD_SIZE and LOCAL_RANK are always set, because they are missing in a process that no launcher (such as torchrun)
    started. ``local_rank``: index of this rank's device among the visible devices.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_FIXED, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    # vLLM logs before it reads VLLM_LOGGING_LEVEL.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
