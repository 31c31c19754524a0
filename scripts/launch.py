"""torchrun on this machine, as one would type it: one thread a rank, no network, a rendezvous of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # a rank: two torch threads are far slower than one where a neighbour is busy
    "TOKENIZERS_PARALLELISM": "false",
}


def torchrun(ranks: int, *program: str) -> list[str]:
    """The command line that starts ``program`` (``-m module argument ...``) on ``ranks`` ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *program,
    ]


def run(command: Sequence[str]) -> int:
    """Run it from the repository's root; returns its exit code."""
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=False).returncode
