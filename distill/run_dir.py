"""Create the run directory, and write the recipe, the package versions and the changes at each resume."""

from __future__ import annotations

import json
import logging
import os.path
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.checkpoint.resume import RunHistory
from distill.config import Arguments
from distill.errors import UserError, writing_run

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "vllm", "triton", "safetensors", "datasets")


def start_run_dir(arguments: Arguments, history: RunHistory) -> Path:
    """Create the run directory and return its path; called on rank 0 only.

    Writes the resolved recipe, the package versions, and the differences in recipe and data detected at each resume.
    """
    config = arguments.config
    run_dir = new_run_dir(config.logger.log_dir, config.runtime.run_dir)
    with writing_run(run_dir):
        (run_dir / "config.yaml").write_text(arguments.resolved)
        versions = _versions() | {"clock": str(history.clock)}
        (run_dir / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
        history.write(run_dir)
    log.info("the run directory is %s", os.path.relpath(run_dir))
    return run_dir


def new_run_dir(log_dir: str, run_dir: str | None) -> Path:
    """Create and return the directory ``run_dir``, or a new ``log_dir/exp_NNN`` if ``run_dir`` is None."""
    try:
        if run_dir is not None:
            path = Path(run_dir)
            path.mkdir(parents=True, exist_ok=True)
            return path
        taken = [int(p.name[4:]) for p in Path(log_dir).glob("exp_*") if p.name[4:].isdigit()]
        path = Path(log_dir) / f"exp_{max(taken, default=0) + 1:03d}"
        path.mkdir(parents=True)
        return path
    except OSError as error:
        key, value = ("logger.log_dir", log_dir) if run_dir is None else ("runtime.run_dir", run_dir)
        raise UserError(
            f"{key}={value} cannot be created ({error.strerror})",
            "set it to a writable directory",
            key=key,
            value=value,
        ) from error


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "command": sys.argv}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = None
    return found
