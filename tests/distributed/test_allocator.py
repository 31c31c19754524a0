"""Options of torch's allocator of GPU memory."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill import build
from distill.config import load_config
from distill.distributed.allocator import use_expandable_segments
from distill.rollout.vllm_version import InstalledVllm, allows_expandable_segments

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the settings that torch's allocator received; the machine seems to have a GPU."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    return found


def test_expandable_segments_are_set_for_torch_and_for_vllm(applied: list[str]) -> None:
    assert use_expandable_segments()
    assert applied == [os.environ["PYTORCH_ALLOC_CONF"]] == ["expandable_segments:True"]


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_allocator_options_are_kept(applied: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:256")
    assert not use_expandable_segments()
    assert applied == [] and os.environ[name] == "max_split_size_mb:256"


def test_nothing_is_set_without_a_gpu(applied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not use_expandable_segments() and applied == []


@pytest.mark.parametrize(("backend", "version"), [("vllm", "0.32.0"), ("transformers", "0.25.1"), ("vllm", "0.25.1")])
def test_expandable_segments_are_set_after_the_engine_was_built(
    backend: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs of a vLLM engine on several GPUs cannot be captured in expandable segments."""
    order: list[str] = []
    monkeypatch.setattr(build, "build_engine", lambda *_: order.append("engine"))
    monkeypatch.setattr(build, "use_expandable_segments", lambda: order.append("segments"))
    monkeypatch.setattr(build, "installed_vllm", lambda: InstalledVllm("vllm", version))
    models: Any = SimpleNamespace(student=None, valid_vocab=1)
    world: Any = SimpleNamespace(device=torch.device("cuda"))
    build._build_engine(
        load_config(["--config", "recipes/distillation_math.yaml", f"policy.generation.backend={backend}"]),
        models,
        world,
    )
    assert order == (["engine"] if (backend, version) == ("vllm", "0.25.1") else ["engine", "segments"])


@pytest.mark.parametrize(
    ("version", "allowed"), [("0.25.1", False), ("0.31.9", False), ("0.32.0", True), ("1.0", True)]
)
def test_expandable_segments_need_vllm_0_32(version: str, allowed: bool) -> None:
    assert allows_expandable_segments(InstalledVllm("vllm", version)) == allowed
    assert not allows_expandable_segments(None) and not allows_expandable_segments(InstalledVllm("vllm", "unknown"))
