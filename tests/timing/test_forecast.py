"""The time forecast of a dry run, and its comparison with the measured phases of a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.config import Config
from distill.distributed.planned import PlannedWorld
from distill.memory.shapes import find_shape
from distill.timing import forecast as forecast_module
from distill.timing import rates as rates_module
from distill.timing.forecast import (
    StepPredictor,
    expected_workload,
    measured_workload,
    predict_time,
    time_table,
)
from distill.timing.lengths import Lengths
from distill.timing.rates import Rates, measure_cpu, planned_rates, rates_of_cpu, running_rates
from distill.timing.step import StepTime, Workload, reads_response
from tests.memory.test_forecast import known, recipe

WORLD = PlannedWorld(1, 1, torch.device("cpu"))
CPU_RATES = rates_of_cpu(1e12, 1e11, (1e11, 1e11), 1e10, 1e10)
RECIPE = "qwen3-4b-context-self-distillation-4n4g.yaml"
VALUES = {
    "train/p50_gen_tokens_per_sample": 100.0,
    "train/p90_gen_tokens_per_sample": 300.0,
    "train/mean_prompt_length": 20.0,
    "train/teacher_tokens": 64 * 250.0,
    "train/global_valid_seqs": 64.0,
    "train/global_valid_toks": 64 * 150.0,
    "timing/train/prepare_for_generation": 1.5,
    "timing/train/generation": 8.0,
    "timing/train/generation_slowest": 10.0,
    "timing/train/generation_wait_share": 0.2,
    "timing/train/teacher_logprob_inference": 2.25,
    "timing/train/policy_training": 3.75,
}


def numbers(table: str, name: str) -> Sequence[float]:
    """The numbers of seconds in the line ``name`` of a table, and in the line after it."""
    lines = table.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(name))
    return [float(text) for text in re.findall(r"^[\sa-z]*([\d.]+) s", "\n".join(lines[at : at + 2]), re.MULTILINE)]


def table_of(*overrides: str, prompts: tuple[float, float] | None = (300, 500)) -> tuple[str, StepTime]:
    config = recipe(RECIPE, "policy.dtensor_cfg.activation_checkpointing=true", *overrides)
    student, teacher = known(config.policy.model_name), known(config.teacher.model_name)
    text = time_table(config, student, teacher, None, prompts, steps=500)
    assert text is not None
    rates = planned_rates(config, None, 2)
    assert rates is not None
    return text, StepTime(config, student, teacher, rates, expected_workload(config, prompts), True)


def test_a_dry_run_shows_each_phase_with_and_without_partial_rollouts() -> None:
    text, step = table_of()
    found = predict_time(step)
    assert found.lockstep is not None and found.partial is not None and not found.uses_partial
    assert found.partial.seconds < 0.6 * found.lockstep.seconds
    for name in ("sync", "teacher", "student", "optimizer"):
        assert numbers(text, name)[0] == pytest.approx(getattr(found, name), abs=0.05)
    assert numbers(text, "generation") == pytest.approx([found.lockstep.seconds, found.partial.seconds], abs=0.05)
    assert numbers(text, "total") == pytest.approx([found.total(found.lockstep), found.total(found.partial)], abs=0.05)
    assert "policy.generation.expected_length" in text and "distillation.partial_rollouts" in text


def test_the_total_is_the_sum_of_the_phases_and_counts_the_recipes_generation() -> None:
    plain = predict_time(table_of()[1])
    enabled = predict_time(table_of("distillation.partial_rollouts.enabled=true")[1])
    assert enabled.used is enabled.partial and plain.used is plain.lockstep
    assert plain.total(plain.used) == pytest.approx(sum(plain.phases().values()))
    assert enabled.phases()["generation"] < plain.phases()["generation"]
    assert plain.tokens == pytest.approx(64 * (300 + Lengths.of_percentiles(2048, 6144, 16384).mean) / 16)


def test_scoring_in_the_tail_saves_at_most_the_wait_and_the_teacher() -> None:
    found = predict_time(table_of()[1])
    assert found.lockstep is not None
    wait = found.lockstep.wait_seconds
    assert found.tail_gain == min(found.teacher, wait)
    assert replace(found, teacher=1e9).tail_gain == wait


def test_settings_of_partial_rollouts_are_those_of_the_recipe() -> None:
    step = table_of("distillation.partial_rollouts.finish_share=0.7", "distillation.partial_rollouts.max_age=4")[1]
    assert predict_time(step).settings == (0.7, 4)


def test_a_step_without_own_responses_has_no_generation() -> None:
    text, step = table_of("distillation.off_policy.share=1", "distillation.train_on=all")
    found = predict_time(step)
    assert found.lockstep is None and found.tail_gain == 0 and numbers(text, "generation")[0] == 0
    assert found.total(None) == pytest.approx(sum(found.phases().values()))


def test_lengths_come_from_the_recipe_and_prompts_from_the_data() -> None:
    config = recipe(RECIPE)
    lengths = Lengths.of_percentiles(2048, 6144, 16384)
    assert expected_workload(config, (30, 40)) == Workload(lengths, 30, 40 + lengths.mean)
    plain = recipe("distillation_math.yaml", "policy.generation.max_new_tokens=4000")
    assert expected_workload(plain, (30, 30)) == Workload(Lengths.of_percentiles(1000, 3000, 4000), 30, 30)


@pytest.mark.parametrize(
    ("word", "reads"),
    [
        ("data.shuffle=true", True),
        ("distillation.context_distillation.teacher_prefix_template='{problem}'", False),
        ("distillation.control=true", False),
        ("distillation.context_distillation.enabled=false", False),
    ],
)
def test_the_teacher_reads_as_long_a_trace_as_the_response(word: str, reads: bool) -> None:
    assert reads_response(recipe(RECIPE, word, "distillation.allow_degenerate=true")) is reads


def test_the_trace_may_be_in_the_teachers_system_message(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("This was a draft: {trace}")
    context = "distillation.context_distillation"
    template, system = "teacher_prefix_template='{problem}'", f"teacher_system_prompt_file={tmp_path}/system.txt"
    assert reads_response(recipe(RECIPE, f"{context}.{template}", f"{context}.{system}"))


def test_a_small_cache_is_a_warning_of_the_forecast() -> None:
    enough, small = (
        table_of("distillation.num_prompts_per_step=512", "cluster.gpu=312/1555", f"cluster.gpu_memory_gb={size}")[0]
        for size in (40, 16)
    )
    assert len(small.splitlines()) == len(enough.splitlines()) + 1


def test_different_memory_of_the_gpu_and_of_the_recipe_is_a_warning() -> None:
    same, other = (table_of(f"cluster.gpu_memory_gb={size}")[0] for size in (40, 80))
    assert "cluster.gpu_memory_gb" not in same
    assert "cluster.gpu=a100-40" in other and "cluster.gpu_memory_gb=80" in other


def test_a_known_gpu_of_this_machine_is_used_without_cluster_gpu() -> None:
    config = recipe(RECIPE, "cluster.gpu=null")
    found = planned_rates(config, "NVIDIA H200", 2)
    assert found is not None and found.name == "h200"
    assert planned_rates(config, "NVIDIA GeForce RTX 4090", 2) is planned_rates(config, None, 2) is None
    student = find_shape("Qwen/Qwen3-4B", "policy.model_name")
    assert student is not None and time_table(config, student, student, None, None, 1) is None


# ---- a run -----------------------------------------------------------------------------------------------------------


def predictor(config: Config, device: str = "cpu") -> StepPredictor:
    return StepPredictor(config, known("Qwen/Qwen3-4B"), known("Qwen/Qwen3-4B"), torch.device(device))


def test_a_run_logs_measured_phases_with_the_forecast_for_its_lengths(monkeypatch, caplog) -> None:
    config = recipe(RECIPE, "policy.dtensor_cfg.activation_checkpointing=true")
    rates = CPU_RATES
    monkeypatch.setattr(forecast_module, "running_rates", lambda *_: rates)
    with caplog.at_level(logging.INFO):
        predictor(config).compare(VALUES, 2, WORLD)
    (record,) = caplog.records
    found = dict(re.findall(r"(\w+) ([\d.]+ \([\d.]+\))", record.getMessage()))
    workload = measured_workload(config, VALUES, 2)
    assert workload is not None
    student = known("Qwen/Qwen3-4B")
    expected = predict_time(StepTime(config, student, student, rates, workload, False)).phases()
    measured = {"sync": 1.5, "generation": 10.0, "teacher": 2.2, "training": 3.8}
    assert found == {name: f"{seconds:.1f} ({expected[name]:.1f})" for name, seconds in measured.items()}
    assert "20%" in record.getMessage()


def test_a_step_without_responses_or_a_gpu_without_a_name_logs_nothing(monkeypatch, caplog) -> None:
    config = recipe(RECIPE)
    with caplog.at_level(logging.INFO):
        predictor(config).compare({"timing/train/generation": 1.0}, 2, WORLD)
        monkeypatch.setattr(forecast_module, "running_rates", lambda *_: None)
        predictor(config).compare(VALUES, 2, WORLD)
    assert not caplog.records


def test_an_error_of_the_forecast_does_not_end_a_run(monkeypatch, caplog) -> None:
    monkeypatch.setattr(forecast_module, "running_rates", lambda *_: 1 / 0)
    predictor(recipe(RECIPE)).compare(VALUES, 2, WORLD)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_measured_lengths_of_a_step_replace_the_expected_ones() -> None:
    workload = measured_workload(recipe(RECIPE), VALUES, 2)
    assert workload == Workload(Lengths.of_percentiles(100, 300, 16384), 20, 100)


def test_the_measured_lengths_have_the_limit_of_their_step() -> None:
    config = recipe(RECIPE, "policy.generation.max_new_tokens=4000", "distillation.max_new_tokens_schedule=[[3,8000]]")
    found = [measured_workload(config, VALUES, step) for step in (2, 3)]
    assert [workload.lengths.cap for workload in found if workload is not None] == [4000, 8000]


def test_the_first_steps_of_partial_rollouts_have_no_forecast_of_generation(monkeypatch, caplog) -> None:
    monkeypatch.setattr(forecast_module, "running_rates", lambda *_: CPU_RATES)
    with caplog.at_level(logging.INFO):
        predictor(recipe(RECIPE, "distillation.partial_rollouts.enabled=true")).compare(VALUES, 2, WORLD)
    found = dict(re.findall(r"(\w+) ([\d.]+) \([\d.]+\)", caplog.records[0].getMessage()))
    assert list(found) == ["sync", "teacher", "training"] and "20%" not in caplog.records[0].getMessage()


def test_all_ranks_of_a_cpu_run_measure_at_the_same_time_and_one_logs(monkeypatch, caplog) -> None:
    """Each rank passes the barrier first and then measures; only rank 0 logs."""
    calls: list[str] = []

    def measure(*_: object) -> Rates:
        calls.append("measured")
        return CPU_RATES

    monkeypatch.setattr(forecast_module, "running_rates", measure)
    other = PlannedWorld(1, 2, torch.device("cpu"))
    other.rank = 1
    for world in (WORLD, other):
        monkeypatch.setattr(world, "barrier", lambda: calls.append("barrier"))
        with caplog.at_level(logging.INFO):
            predictor(recipe(RECIPE)).compare(VALUES, 2, world)
    assert calls == ["barrier", "measured"] * 2 and len(caplog.records) == 1


def test_a_run_uses_its_own_gpu_before_cluster_gpu(monkeypatch) -> None:
    config, device = recipe(RECIPE), torch.device("cuda", 0)
    for name, expected in (("NVIDIA H100 80GB HBM3", "h100"), ("Unknown", "a100-40")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found = running_rates(config, device, torch.bfloat16)
        assert found is not None and found.name == expected


def test_a_cpu_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(rates_module, "_MEASURED_S", 0.0)
    found = measure_cpu(torch.float32)
    measured = (found.matmul, found.wide_matmul, found.attention_forward, found.attention_backward)
    assert min(*measured, found.memory, found.elementwise) > 0 and found.matmul == found.wide_matmul
    assert running_rates(recipe(RECIPE), torch.device("cpu"), torch.float32) is not None
