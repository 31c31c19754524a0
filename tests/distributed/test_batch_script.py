"""scripts/train.sbatch uses a Python only if its environment has the packages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/train.sbatch"


def fake_python(path: Path, has_packages: bool) -> Path:
    """A program that passes the check of its packages or fails it, and whose plan ends the script with exit code 7."""
    path.parent.mkdir(parents=True)
    plan = f'[ "$1" = -m ] && echo "echo used {path} >&2; exit 7" && exit 0'
    path.write_text(f"#!/bin/sh\n{plan}\nexit {int(not has_packages)}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill/train.py").write_text("")
    return tmp_path


def submit(checkout: Path, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as Slurm does; ``path``: folder of the active environment's python3."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment.pop("PYTHON", None)
    environment |= {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(checkout), "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(["bash", SCRIPT], env=environment | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("in_venv", "active", "used"),
    [(True, True, "venv"), (True, False, "venv"), (False, True, "active"), (None, True, "active")],
)
def test_the_environment_with_the_packages_is_used(
    checkout: Path, in_venv: bool | None, active: bool, used: str
) -> None:
    if in_venv is not None:
        fake_python(checkout / ".venv/bin/python", in_venv)
    python = fake_python(checkout / "active/python3", active)
    done = submit(checkout, python.parent)
    expected = ".venv/bin/python" if used == "venv" else "active/python3"
    assert done.returncode == 7 and f"{expected}\n" in done.stderr
    assert ("warning: .venv does not contain" in done.stderr) is (in_venv is False)


def test_a_job_without_packages_is_refused(checkout: Path) -> None:
    fake_python(checkout / ".venv/bin/python", False)
    done = submit(checkout, fake_python(checkout / "active/python3", False).parent)
    assert done.returncode == 2 and "run make venv-gpu" in done.stderr


def test_a_python_that_the_user_set_is_not_replaced(checkout: Path) -> None:
    good = fake_python(checkout / "active/python3", True)
    bad = fake_python(checkout / "bad/python", False)
    done = submit(checkout, good.parent, PYTHON=str(bad))
    assert done.returncode == 2 and f"{bad} does not contain" in done.stderr
    assert submit(checkout, bad.parent, PYTHON=str(good)).returncode == 7
