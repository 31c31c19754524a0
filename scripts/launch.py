"""Start torchrun on this machine: one thread per rank, no network, a private rendezvous."""

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
    "OMP_NUM_THREADS": "1",  # per rank: two torch threads are slower than one on a busy core
    "TOKENIZERS_PARALLELISM": "false",
}


def torchrun(ranks: int, *program: str) -> list[str]:
    """Return the command line that starts ``program`` (``-m module argument ...``) on ``ranks`` ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *program,
    ]


def run(command: Sequence[str]) -> int:
    """Run ``command`` in the repository's root; return its exit code."""
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=False).returncode
