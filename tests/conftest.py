"""Run Triton kernels in Triton's interpreter if there is no GPU, in this process but not in its child processes.

``triton.jit`` reads TRITON_INTERPRET when a function is decorated, which happens once, on import. So all modules with
kernels are imported here, before any test imports them, and the variable is then restored. Two modules of Triton are
imported explicitly: its language, because its reductions are decorated too, and gluon, because the first launch of a
kernel imports it and it refuses a language that was decorated under another setting.

No other code in this process depends on the variable: torch.compile and vLLM use Triton only with a GPU driver.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Use the same examples in every run, so that a merge does not depend on chance; --hypothesis-seed=N draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

_SWITCH = "TRITON_INTERPRET"
LONGEST = (
    "rollout/test_vllm.py",
    "kernels/test_compiled.py",
    "test_vllm_train.py",
    "test_train.py",
    "test_fuzz.py",
    "test_layouts.py",
    "memory/test_forecast.py",
    "model/test_fused_layers.py",
    "test_dry_run.py",
    "test_partial_rollouts.py",
)
"""Files whose tests take longest, in the order in which they start; otherwise a worker may run one alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the longest files to the front; pytest-xdist keeps this order with --no-loadscope-reorder."""
    order = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def _import_interpreted() -> None:
    if "triton" in sys.modules:
        raise RuntimeError(f"triton was imported before {_SWITCH} could be set: find the pytest plugin that imports it")
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        for name in ("triton", "triton.language", "triton.experimental.gluon"):
            importlib.import_module(name)
        package = importlib.import_module("distill.kernels")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    finally:
        del os.environ[_SWITCH]
        if before is not None:
            os.environ[_SWITCH] = before


if find_spec("triton") and not torch.cuda.is_available():
    _import_interpreted()


@pytest.fixture(autouse=True)
def _propagate_log() -> None:
    """Send log records to the root logger again, because a program in a previous test installed its own handlers."""
    logger = logging.getLogger("distill")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.handlers.clear()
