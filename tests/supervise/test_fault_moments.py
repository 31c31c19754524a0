"""Moments of injected faults name functions that exist, so that a renamed function is found without running faults."""

from __future__ import annotations

import functools
import importlib

import pytest

from tests.faulty_train import MOMENTS


@pytest.mark.parametrize("moment", sorted(MOMENTS.keys() - {"vllm"}))  # importing vLLM takes too long here
def test_a_moment_names_an_existing_function(moment: str) -> None:
    module, _, path = MOMENTS[moment].partition(":")
    assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))
