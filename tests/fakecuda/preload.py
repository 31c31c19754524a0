"""Compile ``hooks.cpp``, and start Python with it preloaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_SOURCE = Path(__file__).with_name("hooks.cpp")


def missing() -> str | None:
    """Return why fake CUDA cannot run on this machine, or None if it can."""
    if sys.platform != "linux":
        return "LD_PRELOAD needs Linux"
    if torch.version.cuda is not None:
        return "needs a CPU build of PyTorch"
    return None if _compiler() else "no C++ compiler (g++ or clang++)"


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def library() -> Path:
    """Return the compiled library; compile it if the cache folder has none for this source and PyTorch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"
    digest = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()).hexdigest()[:16]
    found = cache / f"fakecuda-{digest}.so"
    if found.exists():
        return found
    cache.mkdir(parents=True, exist_ok=True)
    headers, libraries = Path(torch.__file__).parent / "include", Path(torch.__file__).parent / "lib"
    partial = cache / f"{found.name}.{os.getpid()}"
    include = [f"-I{headers}", f"-I{headers / 'torch/csrc/api/include'}"]
    link = [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    compiler = _compiler()
    assert compiler is not None, missing()
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", str(_SOURCE), *include, *link, "-o", str(partial)]
    subprocess.run(command, check=True)
    partial.replace(found)  # another process may compile the same file
    return found


def environment() -> dict[str, str]:
    """Return the environment variables of a process that uses fake CUDA."""
    fixed = {"LD_PRELOAD": str(library()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": str(ROOT)}


def is_preloaded() -> bool:
    """Return whether this process was started with the library."""
    return str(library()) in os.environ.get("LD_PRELOAD", "")


def run_preloaded(module: str, argv: Sequence[str]) -> None:
    """Replace this process by ``python -m module argv...`` with the library, unless it is already preloaded."""
    reason = missing()
    if reason:
        raise SystemExit(f"fake CUDA cannot run: {reason}")
    if not is_preloaded():
        os.execve(sys.executable, [sys.executable, "-W", "ignore", "-m", module, *argv], environment())
