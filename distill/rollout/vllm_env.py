"""Environment variables and log levels of vLLM, set before its first import."""

from __future__ import annotations

import logging
import os
import warnings

_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about calls made on purpose (sleep on CPU, seeds)
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share a machine; torchrun sets the threads of each
    "TRITON_F32_DEFAULT": "ieee",  # TF32 attention would differ from the trainer's float32 by more than allowed
}
_FIXED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine runs in the trainer's process


def prepare_for_vllm(rank: int, size: int, local_rank: int) -> None:
    """Set the environment variables that vLLM reads; call it before vLLM is imported.

    Variables that the user exported keep their values, except those that the trainer depends on. ``local_rank``: the
    index of this rank's device among its visible devices. Ranks are set too, because a process without a launcher has
    no such variables.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_FIXED, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    logging.getLogger("vllm").setLevel(
        os.environ["VLLM_LOGGING_LEVEL"].upper()
    )  # vLLM reads the variable later than it logs
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
