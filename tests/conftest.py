"""Without a GPU the Triton kernels run in Triton's interpreter, in this process and in none that it starts.

``triton.jit`` reads TRITON_INTERPRET where a function is decorated, which happens once, on import. So whatever a kernel
is made of is imported here, before any test can import it otherwise, and the variable is then taken back. Two parts of
Triton need naming: its language, whose reductions are decorated too, and gluon, which the first launch of a kernel
would import and which refuses a language that was decorated under another setting.

Nothing else in this process decides by it: torch.compile and vLLM use Triton only where they find a GPU's driver.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a merge must not depend on what was drawn. Other ones: pytest --hypothesis-seed=N.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

_SWITCH = "TRITON_INTERPRET"


def _import_interpreted() -> None:
    if "triton" in sys.modules:
        raise RuntimeError(f"triton was imported before {_SWITCH} could be set for it: find out by which plugin")
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
def _heard_log() -> None:
    """A program that ran in this process keeps its log to its own handlers; each test listens at the root again."""
    logger = logging.getLogger("distill")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.handlers.clear()
