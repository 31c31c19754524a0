"""Variables that libraries read from the process's environment, set in one place before they are imported."""

from __future__ import annotations

import logging
import os
import warnings

_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this very process
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings speak of calls made on purpose (sleep on CPU, seeds)
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share a machine: torchrun says how many threads each has
    "TRITON_F32_DEFAULT": "ieee",  # float32 attention in float32: TF32 would err more than a sync may
}
_FIXED = {"VLLM_ENABLE_V1_MULTIPROCESSING"}


def prepare_for_vllm(rank: int, size: int, local_rank: int) -> None:
    """Set what vLLM reads; comes before its first import.

    What a user exported stays, but where the trainer needs it otherwise. ``local_rank``: the index of this rank's
    device among those it sees, as vLLM reads it. A world of one has no launcher that told it its rank.
    """
    os.environ.update({name: value for name, value in _VLLM.items() if name in _FIXED or name not in os.environ})
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it reads the variable late
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
