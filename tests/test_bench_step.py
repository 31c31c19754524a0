"""The benchmark's command line is one that the program takes."""

from __future__ import annotations

import pytest

from distill.config import load_config
from scripts import bench_step


def test_the_benchmark_generates_a_fixed_number_of_tokens(monkeypatch) -> None:
    seen: list[list[str]] = []

    def stop(command: list[str]) -> int:
        seen.append(command)
        return 3

    monkeypatch.setattr(bench_step, "run", stop)
    with pytest.raises(SystemExit, match="3"):
        bench_step.measure(2, 10, ["policy.precision=float32"])
    arguments = seen[0][seen[0].index("distill.train") + 1 :]
    config = load_config(arguments)
    assert config.policy.generation.stop_token_ids == () and config.policy.generation.max_new_tokens == 48
    assert (config.distillation.num_prompts_per_step, config.distillation.num_generations_per_prompt) == (8, 2)
    assert config.distillation.max_num_steps == 11 and config.policy.precision == "float32"
