"""Arguments, models and recipes that vLLM accepts or refuses; this process imports vLLM to read its rules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from distill.errors import UserError, show
from distill.model.hf_files import find_model
from distill.rollout.factory import check_backend
from distill.rollout.vllm_speculation import speculation_arguments
from tests.harness import config_for
from tests.helpers import save_tiny_model
from tests.variants import NOT_IN_VLLM, save_variant

pytestmark = pytest.mark.slow


def _refused_key(folder: Path, *overrides: str, ranks: int = 2, problem: str = "", fix: str = "") -> str:
    """Return the configuration key that ``check_backend`` refuses; empty if it accepts the recipe.

    The error must contain ``problem`` and ``fix`` in the fields of these names.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.setenv(name, "0")  # so that their values are restored
        error = _refusal(folder, *overrides, ranks=ranks)
    if error is None:
        return ""
    assert error.fix and error.problem.startswith(f"{error.key}={show(error.value)}")
    assert problem in error.problem and fix in error.fix
    return error.key


def _refusal(folder: Path, *overrides: str, ranks: int) -> UserError | None:
    config = config_for(folder, folder, "distillation.allow_degenerate=true", *overrides, ranks=ranks)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = SimpleNamespace(rank=0, size=ranks, local_rank=0, local_size=ranks, device=device)
    try:
        check_backend(config, find_model(str(folder), "a model"), world)  # type: ignore[arg-type]
    except UserError as error:
        return error
    return None


VLLM = "policy.generation.backend=vllm"
KWARGS = "policy.generation.vllm_kwargs"
ENGINE_SIZE = "policy.generation.vllm_cfg.tensor_parallel_size"


@pytest.mark.parametrize(
    ("name", "value", "problem", "fix"),
    [
        ("seed", "3", "trainer", "remove"),
        ("max_seqs", "3", "argument", "remove"),
        ("hf_overrides", "{sliding_window: 4}", "trainer", "remove"),
        ("quantization", "fp8", "weights", "remove"),
        ("gpu_memory_utilization", "0.5", "own key", "policy.generation.vllm_cfg.gpu_memory_utilization"),
    ],
)
def test_arguments_of_vllm_that_the_trainer_cannot_allow_are_refused(
    tmp_path: Path, name: str, value: str, problem: str, fix: str
) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama")
    refused = _refused_key(folder, VLLM, f"{KWARGS}={{{name}: {value}}}", problem=problem, fix=fix)
    assert refused == f"{KWARGS}.{name}"


def test_other_arguments_of_vllm_are_allowed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama")
    assert _refused_key(folder, VLLM) == ""
    assert _refused_key(folder, VLLM, f"{KWARGS}={{max_num_seqs: 3}}") == ""


@pytest.mark.parametrize(
    ("ranks", "shape", "number"),
    [
        (2, {"heads": 3, "kv_heads": 1, "hidden": 96}, "3 attention"),
        (2, {"kv_heads": 1}, ""),
        (2, {"heads": 6, "kv_heads": 3, "hidden": 96}, "3 key-value"),
        (3, {"heads": 6, "kv_heads": 3, "hidden": 96}, ""),
        (3, {"heads": 6, "kv_heads": 3}, "128 "),
        (3, {"heads": 6, "kv_heads": 3, "hidden": 96, "vocab": 390}, "448 "),
    ],
    ids=["heads", "one kv head", "kv heads", "divisible", "intermediate_size", "vocabulary"],
)
def test_an_engine_of_several_ranks_needs_a_model_that_they_divide(tmp_path: Path, ranks, shape, number) -> None:
    folder = save_tiny_model(tmp_path / "m", "qwen3", **shape)
    fix = number.split(" ")[0]  # the size must divide this number
    key = _refused_key(folder, VLLM, f"{ENGINE_SIZE}={ranks}", ranks=ranks, problem=f" {number}", fix=fix)
    assert key == (ENGINE_SIZE if number else "")


def test_a_model_that_vllm_cannot_run_is_refused_for_vllm_only(tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "m", NOT_IN_VLLM["qwen3 biases"][0])
    assert _refused_key(folder, VLLM, problem="attention_bias=True") == "policy.model_name"
    assert _refused_key(folder, "policy.generation.backend=transformers") == ""


def test_without_vllm_the_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "m")
    monkeypatch.setattr("distill.rollout.factory.installed_vllm", lambda: None)
    alternative = "policy.generation.backend=transformers"
    assert _refused_key(folder, VLLM, problem="installed", fix=alternative) == "policy.generation.backend"
    assert _refused_key(folder, "policy.generation.backend=transformers") == ""


def test_a_gpu_uses_the_method_that_keeps_asynchronous_scheduling() -> None:
    from vllm.config.speculative import NgramGPUTypes
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    method = speculation_arguments(on_cpu=False)["speculative_config"]["method"]
    assert method in get_args(NgramGPUTypes) and ExecutorWithExternalLauncher.supports_async_scheduling()
