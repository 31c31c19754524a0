"""N-gram speculation of vLLM: its arguments, the correction of vLLM's sampler, and the settings that are refused.

tests/rollout/test_vllm.py generates with speculation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.config import Config
from distill.errors import UserError
from distill.rollout.factory import batch_arguments
from distill.rollout.vllm_speculation import (
    KEY,
    check_speculation,
    expand_batch_to_tokens,
)
from distill.rollout.vllm_version import InstalledVllm
from tests.harness import config_for
from tests.helpers import save_tiny_model


def test_the_corrected_function_repeats_each_responses_value() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert expand_batch_to_tokens(torch.tensor([0.5, 0.7, 0.0]), ends, 5, 0, 1).tolist() == [0.5, 0.5, 1, 1, 1]
    top_k = expand_batch_to_tokens(torch.tensor([3, 4, 0], dtype=torch.int32), ends, 5)
    assert top_k.dtype == torch.int32 and top_k.tolist() == [3, 3, 0, 0, 0]


@pytest.mark.parametrize(
    ("version", "on_cpu", "accepted"),
    [
        ("0.32.0", True, True),
        ("0.31.2", True, False),
        ("0.33.0", True, False),
        ("0.1.dev1", True, False),
        ("0.32.1", False, True),
        ("0.33.0", False, True),
        ("0.31.0", False, False),
    ],
)
def test_speculation_of_other_releases_of_vllm_is_refused(version: str, on_cpu: bool, accepted: bool) -> None:
    installed = InstalledVllm("vllm", version)
    if accepted:
        check_speculation(installed, on_cpu)
        return
    with pytest.raises(UserError) as caught:
        check_speculation(installed, on_cpu)
    assert (caught.value.key, caught.value.value) == (KEY, "ngram")


def _config(tmp_path: Path, *overrides: str) -> Config:
    folder = save_tiny_model(tmp_path / "m")
    return config_for(folder, folder, "distillation.allow_degenerate=true", f"{KEY}=ngram", *overrides)


def test_speculation_requires_vllm(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _config(tmp_path, "policy.generation.backend=transformers")
    assert (caught.value.key, caught.value.value) == (KEY, "ngram")


def test_with_speculation_vllm_chooses_the_sizes_of_cuda_graphs(tmp_path: Path) -> None:
    config = _config(tmp_path, "policy.generation.backend=vllm", "distillation.num_prompts_per_step=704")
    assert "max_cudagraph_capture_size" not in batch_arguments(config, 1)


@pytest.mark.parametrize("argument", ["speculative_config", "spec_method", "spec_model", "spec_tokens"])
def test_speculation_by_vllm_kwargs_is_refused(tmp_path: Path, argument: str) -> None:
    from distill.rollout.factory import _check_arguments

    with pytest.raises(UserError) as caught:
        _check_arguments({argument: "ngram"})
    assert caught.value.key == f"policy.generation.vllm_kwargs.{argument}" and KEY in caught.value.fix
