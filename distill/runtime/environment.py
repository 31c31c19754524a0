"""Variables that libraries read from the process's environment, set in one place before they are imported."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping

_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this very process
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings speak of calls made on purpose (sleep on CPU, seeds)
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share a machine: torchrun says how many threads each has
}
_FIXED = {"VLLM_ENABLE_V1_MULTIPROCESSING"}


def prepare_for_vllm(rank: int, size: int, local_rank: int) -> None:
    """Set what vLLM reads; comes before its first import.

    What a user exported stays, but where the trainer needs it otherwise. A world of one has no launcher that told it
    its rank.
    """
    os.environ.update({name: value for name, value in _VLLM.items() if name in _FIXED or name not in os.environ})
    ranks: Mapping[str, int] = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    for name, number in ranks.items():
        os.environ.setdefault(name, str(number))
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it reads the variable late
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
