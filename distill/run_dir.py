"""The run's folder."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError


def new_run_dir(log_dir: str, run_dir: str | None) -> Path:
    """The run's folder, made by the main rank: ``run_dir`` itself, or the first unused ``log_dir/exp_NNN``."""
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
        key = "runtime.run_dir" if run_dir is not None else "logger.log_dir"
        raise UserError(
            f"{key}={run_dir or log_dir} can't be made ({error.strerror}): choose a writable folder"
        ) from error
