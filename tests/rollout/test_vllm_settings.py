"""Settings of the process and of vLLM on a GPU. vLLM, its memory pool and the device are fakes here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from distill.rollout import vllm_env
from distill.rollout.factory import batch_arguments
from distill.rollout.gpu_memory import CudaMemory, pool_bytes
from distill.rollout.vllm_engine import kept_threads
from distill.rollout.vllm_env import kept_allocator_options, prepare_for_vllm
from distill.supervise.logs import log_library, log_to_console, log_to_file
from tests.harness import config_for
from tests.helpers import save_tiny_model

GIB = 2**30
PARTIAL = (
    "distillation.partial_rollouts.enabled=true",
    "distillation.partial_rollouts.finish_share=0.6",
    "policy.generation_batch_size=4096",
)


def test_vllm_cannot_lower_the_precision_of_the_trainers_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "high")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(vllm_env, "log_library", lambda *_: None)
    prepare_for_vllm(0, 1, 0)
    assert os.environ["VLLM_FLOAT32_MATMUL_PRECISION"] == "highest"


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize(("on_cpu", "after"), [(True, 3), (False, 1)])
def test_the_threads_that_vllm_sets_stay_on_a_gpu(threads: int, on_cpu: bool, after: int) -> None:
    """On a GPU, vLLM compiles the model for the number of threads that it sets."""
    with kept_threads(on_cpu):
        torch.set_num_threads(1)  # as the fake vLLM
    assert torch.get_num_threads() == after


@pytest.mark.parametrize(
    ("name", "options", "on_cpu", "applied"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", False, ["expandable_segments:False"]),
        ("PYTORCH_ALLOC_CONF", "a:True,expandable_segments: True", False, ["a:True,expandable_segments:False"]),
        ("PYTORCH_CUDA_ALLOC_CONF", "roundup_power2_divisions:4", False, ["roundup_power2_divisions:4"]),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", True, []),
        ("PYTORCH_ALLOC_CONF", "", False, []),
    ],
)
def test_expandable_segments_are_disabled_while_vllm_is_created(
    monkeypatch: pytest.MonkeyPatch, name: str, options: str, on_cpu: bool, applied: list[str]
) -> None:
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, options)
    found: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    with suppress(RuntimeError), kept_allocator_options(on_cpu):
        assert found == applied and os.environ[name] == (applied or [options])[0]
        found.clear()
        raise RuntimeError("vLLM cannot be created")
    assert found == [options] * len(applied) and os.environ[name] == options


@pytest.fixture
def fake_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of vLLM's memory pool, with tags of vLLM 0.32."""
    sizes = {"weights": [5 * GIB, GIB // 2], "kv_cache": [30 * GIB, 10 * GIB], "runtime": [GIB // 4], "default": [1]}
    data = [SimpleNamespace(tag=tag, handle=(0, size, 0, 0)) for tag, own in sizes.items() for size in own]
    pool = SimpleNamespace(pointer_to_data=dict(enumerate(data)), get_current_usage=lambda: 45 * GIB)
    module: Any = ModuleType("vllm.device_allocator.cumem")
    module.CuMemAllocator = SimpleNamespace(get_instance=lambda: pool)
    for name in ("vllm", "vllm.device_allocator"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_waking_needs_the_bytes_of_vllms_pool_by_tag(fake_pool: None) -> None:
    """All memory but the cache is mapped with the weights, so that the sampler's tensors count there."""
    memory = CudaMemory()
    assert memory.needed("kv_cache") == 40 * GIB
    assert memory.needed("weights") == 5 * GIB + GIB // 2 + GIB // 4 + 1
    assert pool_bytes() == 45 * GIB


def test_memory_outside_torch_is_what_the_default_pool_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of other pools count as reserved in torch, although vLLM has freed them."""
    segments = [
        {"total_size": 2 * GIB, "segment_pool_id": (0, 0)},
        {"total_size": GIB, "segment_pool_id": (0, 0)},
        {"total_size": 40 * GIB, "segment_pool_id": (0, 1)},
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (74 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert CudaMemory().outside_torch() == 3 * GIB


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        (["distillation.num_prompts_per_step=64"], 8, {"max_num_seqs": 8}),
        (
            ["distillation.num_prompts_per_step=64", "distillation.num_generations_per_prompt=5"],
            8,
            {"max_num_seqs": 40},
        ),
        (["distillation.num_prompts_per_step=65"], 8, {"max_num_seqs": 16}),
        (
            ["distillation.num_prompts_per_step=64", "policy.generation.vllm_cfg.tensor_parallel_size=2"],
            8,
            {"max_num_seqs": 16},
        ),
        (
            ["distillation.num_prompts_per_step=64", "distillation.val_period=5", "distillation.max_val_samples=512"],
            8,
            {"max_num_seqs": 64},
        ),
        (["distillation.num_prompts_per_step=60", *PARTIAL], 1, {"max_num_seqs": 104}),  # 60 / 0.6 = 100
        (["distillation.num_prompts_per_step=60", *PARTIAL], 2, {"max_num_seqs": 56}),
        (
            ["distillation.num_prompts_per_step=900", *PARTIAL],
            1,
            {"max_num_seqs": 1504, "max_cudagraph_capture_size": 1504},
        ),
        (["distillation.num_prompts_per_step=700"], 1, {"max_num_seqs": 704, "max_cudagraph_capture_size": 704}),
        (["distillation.num_prompts_per_step=5000"], 1, {"max_num_seqs": 1024, "max_cudagraph_capture_size": 1024}),
        (
            ["distillation.num_prompts_per_step=5000", "policy.generation.vllm_kwargs={max_num_seqs: 600}"],
            1,
            {"max_num_seqs": 600, "max_cudagraph_capture_size": 608},
        ),
        (
            ["distillation.num_prompts_per_step=5000", "policy.generation.vllm_kwargs={max_cudagraph_capture_size: 8}"],
            1,
            {"max_num_seqs": 1024},
        ),
        (
            ["distillation.num_prompts_per_step=5000", "policy.generation.vllm_kwargs={max_num_batched_tokens: 400}"],
            1,
            {"max_num_seqs": 400},
        ),
    ],
)
def test_an_engine_is_built_for_the_most_responses_that_it_generates(
    tmp_path: Path, overrides: list[str], ranks: int, expected: dict[str, int]
) -> None:
    folder = save_tiny_model(tmp_path / "m")
    quiet = ("distillation.val_period=0", "distillation.val_at_start=false", "distillation.val_at_end=false")
    batch = "policy.train_global_batch_size=1"
    config = config_for(folder, folder, "distillation.allow_degenerate=true", *quiet, batch, *overrides, ranks=ranks)
    assert batch_arguments(config, ranks) == expected


def test_a_librarys_log_goes_to_the_log_file_and_its_errors_to_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("a_library")
    try:
        log_to_console(is_main=True)
        for _ in range(2):  # a second call adds no second handler
            log_library("a_library", "INFO")
        logging.getLogger("a_library.part").info("before the file, with %d argument", 1)
        log_to_file(tmp_path / "rank.log")
        logging.getLogger("a_library.part").debug("detail")
        library.warning("unusual")
        library.error("broken")
        written = (tmp_path / "rank.log").read_text()
        assert [written.count(text) for text in ("with 1 argument", "detail", "unusual", "broken")] == [1, 0, 1, 1]
        printed = capsys.readouterr().err
        assert [printed.count(text) for text in ("with 1 argument", "detail", "unusual", "broken")] == [0, 0, 0, 1]
    finally:
        library.handlers.clear()
        for handler in list(logging.getLogger("distill").handlers):
            logging.getLogger("distill").removeHandler(handler)
            handler.close()
