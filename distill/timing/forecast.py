"""The time forecast of a step: as a table in a dry run, and next to the measured phases in a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distill.config import Config
from distill.config.gpus import parse_gpu
from distill.config.response_limits import expected_length, largest_max_new_tokens, max_new_tokens_at
from distill.distributed.world import World
from distill.errors import reason
from distill.memory.shapes import ModelShape
from distill.metrics.names import timing_tag
from distill.model.student import DTYPES
from distill.timing.lengths import Lengths
from distill.timing.rates import Rates, planned_rates, running_rates
from distill.timing.schedule import Generation
from distill.timing.step import StepTime, Workload, reads_response

log = logging.getLogger(__name__)

UNKNOWN_PROMPT = 256.0
"""Assumed length of a prompt in tokens, if the training data were not read."""


@dataclass(frozen=True)
class TimeForecast:
    """Predicted seconds of the phases of a step, with and without partial rollouts."""

    lockstep: Generation | None
    """Generation without partial rollouts; None if the student generates no response."""
    partial: Generation | None
    """Generation with partial rollouts."""
    settings: tuple[float, int]
    """finish_share and max_age of ``partial``."""
    uses_partial: bool
    """Whether the recipe enables partial rollouts."""
    teacher: float
    student: float
    optimizer: float
    sync: float
    tokens: float
    """Tokens of a step per rank: the student's prompts and responses, each prompt once per response."""

    @property
    def used(self) -> Generation | None:
        """Return the generation of the recipe."""
        return self.partial if self.uses_partial else self.lockstep

    def total(self, generation: Generation | None) -> float:
        """Return the seconds of a step with this generation."""
        seconds = 0.0 if generation is None else generation.seconds
        return seconds + self.teacher + self.student + self.optimizer + self.sync

    @property
    def tail_gain(self) -> float:
        """Return an upper bound of the seconds that scoring finished responses in the decode tail would save.

        A rank could score at most while its engine waits for other engines, and at most all responses.
        """
        if self.used is None:
            return 0.0
        return min(self.teacher, self.used.wait_seconds)

    def phases(self) -> dict[str, float]:
        """Return the seconds by phase, named as in ``distill.metrics.names``."""
        generation = 0.0 if self.used is None else self.used.seconds
        training = self.student + self.optimizer
        return {"sync": self.sync, "generation": generation, "teacher": self.teacher, "training": training}


def predict_time(step: StepTime) -> TimeForecast:
    """Predict the phases of a step."""
    loop, given = step.config.distillation, step.config.distillation.partial_rollouts
    settings = given.finish_share, given.max_age
    lengths = step.workload.prompt + step.workload.lengths.mean
    return TimeForecast(
        lockstep=step.generation(None),
        partial=step.generation(settings),
        settings=settings,
        uses_partial=given.enabled,
        teacher=step.teacher_seconds(),
        student=step.student_seconds(),
        optimizer=step.optimizer_seconds(),
        sync=step.sync_seconds(),
        tokens=loop.responses_per_step * lengths / step.ranks,
    )


def expected_workload(config: Config, prompts: tuple[float, float] | None = None) -> Workload:
    """Return the lengths that the recipe expects.

    ``prompts``: mean lengths of the student's and of the teacher's prompts in tokens, without a trace of the response;
    None: unknown. A trace that the teacher reads is assumed to be as long as the response.
    """
    median, p90 = expected_length(config)
    cap = min(largest_max_new_tokens(config), config.policy.max_total_sequence_length - 1)
    lengths = Lengths.of_percentiles(median, p90, cap)
    student, teacher = prompts or (UNKNOWN_PROMPT, UNKNOWN_PROMPT)
    return Workload(lengths, student, teacher + (lengths.mean if reads_response(config) else 0.0))


def time_table(
    config: Config,
    student: ModelShape,
    teacher: ModelShape,
    gpu_name: str | None,
    prompts: tuple[float, float] | None,
    steps: int,
) -> str | None:
    """Return the time forecast of a dry run as text; None if ``cluster.gpu`` is null and ``gpu_name`` is unknown.

    ``config``: the recipe with a value in place of each ``auto``. ``gpu_name``: name of this machine's GPU, if the run
    is planned for it. ``prompts``: as in ``expected_workload``. ``steps``: number of steps of the run.
    """
    rates = planned_rates(config, gpu_name, DTYPES[config.policy.precision].itemsize)
    if rates is None:
        return None
    workload = expected_workload(config, prompts)
    step = StepTime(config, student, teacher, rates, workload, cuda=True)
    return "\n".join(_lines(step, predict_time(step), prompts is not None, steps))


def _lines(step: StepTime, forecast: TimeForecast, knows_prompts: bool, steps: int) -> list[str]:
    lengths, workload = step.workload.lengths, step.workload
    median, p90 = expected_length(step.config)
    source = "" if knows_prompts else ", assumed"
    given = step.config.policy.generation.expected_length
    is_default = given.median is None and given.p90 is None
    return [
        f"predicted time per step on {step.ranks} x {step.rates.name}: a roofline estimate from peak numbers and"
        " assumed efficiencies, not from measurements",
        f"  lengths    responses: median {median:g}, 90th percentile {p90:g}, at most {lengths.cap}, mean"
        f" {lengths.mean:.0f} tokens{' by default' * is_default} (policy.generation.expected_length); prompts:"
        f" {workload.prompt:.0f} (student) and {workload.teacher_prompt:.0f} (teacher) tokens{source}",
        f"  sync       {forecast.sync:8.1f} s",
        *_generation_lines(forecast),
        f"  teacher    {forecast.teacher:8.1f} s",
        f"  student    {forecast.student:8.1f} s",
        f"  optimizer  {forecast.optimizer:8.1f} s",
        *_total_lines(forecast, steps),
        *_cache_lines(step),
        *_memory_lines(step.config),
    ]


def _generation_lines(forecast: TimeForecast) -> list[str]:
    lockstep, partial = forecast.lockstep, forecast.partial
    if lockstep is None or partial is None:
        return [f"  generation {0:8.1f} s  the student generates no response"]
    share, age = forecast.settings
    settings = f"finish_share={share:g}, max_age={age}"
    texts = [
        f"{lockstep.seconds:8.1f} s  without partial rollouts: engines are idle {lockstep.wait_share:.0%} of the phase,"
        " waiting for the slowest",
        f"{partial.seconds:8.1f} s  with distillation.partial_rollouts ({settings}): engines are"
        f" idle {partial.wait_share:.0%}, and decode discarded tokens {partial.discarded_share:.0%}; older weights"
        f" sampled {partial.older_share:.0%} of the trained tokens",
    ]
    marks = (" (this recipe)", "") if not forecast.uses_partial else ("", " (this recipe)")
    return [f"  {name} {text}{mark}" for name, text, mark in zip(("generation", " " * 10), texts, marks, strict=True)]


def _total_lines(forecast: TimeForecast, steps: int) -> list[str]:
    total, used = forecast.total(forecast.used), forecast.used
    other = forecast.lockstep if forecast.uses_partial else forecast.partial
    lines = [f"  total      {_rate(forecast, total, steps)}"]
    if used is not None:
        name = "without" if forecast.uses_partial else "with"
        lines.append(f"             {_rate(forecast, forecast.total(other), steps)}, {name} partial rollouts")
        lines.append(
            f"  possible gain, not implemented: scoring finished responses while other engines decode, at most"
            f" {forecast.tail_gain:.1f} s per step"
        )
    return lines


def _rate(forecast: TimeForecast, seconds: float, steps: int) -> str:
    return (
        f"{seconds:8.1f} s  {forecast.tokens / seconds:.0f} tokens/s per GPU; {steps} steps: {_hours(steps * seconds)}"
        " without validation and checkpoints"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _cache_lines(step: StepTime) -> list[str]:
    """Return a warning if the key-value cache of an engine is too small for all responses at the same time."""
    needed, room = step.cache_tokens()
    if room is None or needed <= room:
        return []
    return [
        f"  warning    the responses of an engine need up to {needed} tokens of key-value cache at the same time, and"
        f" there is room for {room}: vLLM recomputes some of them, which the forecast does not include"
    ]


def _memory_lines(config: Config) -> list[str]:
    """Return a warning if ``cluster.gpu`` and ``cluster.gpu_memory_gb`` describe different GPUs."""
    name, given = config.cluster.gpu, config.cluster.gpu_memory_gb
    size = None if name is None else parse_gpu(name).memory_gb
    if size is None or given is None or size == given:
        return []
    return [
        f"  warning    cluster.gpu={name} has {size:g} GB, but cluster.gpu_memory_gb={given:g}: the memory forecast"
        f" uses {given:g} GB, and the time forecast uses the rates of {name}; set both keys for the same GPU"
    ]


@dataclass(frozen=True)
class StepPredictor:
    """Predicts the phases of a step of this run, for comparison with the measured phases."""

    config: Config
    """The recipe with a value in place of each ``auto``."""
    student: ModelShape
    teacher: ModelShape
    device: torch.device

    def compare(self, values: Mapping[str, float], step: int, world: World) -> None:
        """Log the measured seconds of each phase of step ``step``, followed by the prediction in parentheses.

        The prediction is for the lengths of this step. Collective: on CPUs all ranks measure their rates at the same
        time, because they share the machine. ``values``: metrics of the step, reduced over ranks. With partial
        rollouts, generation has no prediction. Logs nothing if the GPU is unknown, or if the step has no own responses.
        An error becomes a warning, because a forecast must not end a run.
        """
        world.barrier()
        try:
            rates = running_rates(self.config, self.device, DTYPES[self.config.policy.precision])
            if world.is_main:
                self._compare(values, step, rates)
        except Exception as error:
            log.warning("no time forecast for the second step, because of %s: %s", type(error).__name__, reason(error))

    def _compare(self, values: Mapping[str, float], step: int, rates: Rates | None) -> None:
        workload = measured_workload(self.config, values, step)
        if workload is None or rates is None:
            return
        cuda = self.device.type == "cuda"
        forecast = predict_time(StepTime(self.config, self.student, self.teacher, rates, workload, cuda))
        log.info("%s", comparison(forecast, values, rates.name))


def measured_workload(config: Config, values: Mapping[str, float], step: int) -> Workload | None:
    """Return the lengths of step ``step`` from its metrics; None if the student generated no response in it."""
    try:
        median, p90 = (values[f"train/p{q}_gen_tokens_per_sample"] for q in (50, 90))
        prompt, teacher = values["train/mean_prompt_length"], values["train/teacher_tokens"]
        sequences, tokens = values["train/global_valid_seqs"], values["train/global_valid_toks"]
    except KeyError:
        return None
    if not sequences or not median >= 1:
        return None
    cap = min(max_new_tokens_at(config, step), config.policy.max_total_sequence_length - 1)
    return Workload(Lengths.of_percentiles(median, p90, cap), prompt, max(0.0, (teacher - tokens) / sequences))


def comparison(forecast: TimeForecast, values: Mapping[str, float], name: str) -> str:
    """Return one line: the seconds of each phase in ``values``, and those of the forecast in parentheses.

    With partial rollouts, generation has no forecast: the first steps train on shorter responses than later steps, and
    the forecast is for later steps.
    """
    measured = {phase: values.get(timing_tag(phase)) for phase in forecast.phases()}
    measured["generation"] = values.get(timing_tag("generation_slowest"))
    expected = {phase: f"{seconds:.1f}" for phase, seconds in forecast.phases().items()}
    if forecast.uses_partial:
        expected["generation"] = "no forecast: with partial rollouts, responses of the first steps are shorter"
    parts = [f"{phase} {seconds:.1f} ({expected[phase]})" for phase, seconds in measured.items() if seconds is not None]
    waits = values.get(timing_tag("generation_wait_share"))
    if waits is not None and forecast.used is not None and not forecast.uses_partial:
        parts.append(f"wait in generation {waits:.0%} ({forecast.used.wait_share:.0%})")
    return (
        f"seconds of the phases of the second step after the start (time forecast for its response lengths on {name} in"
        f" parentheses): {', '.join(parts)}"
    )
