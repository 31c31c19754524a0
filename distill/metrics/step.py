"""The numbers of a step: gathered as sums and counts on every rank, reduced once, divided once.

A mean of means weighs a short micro-batch like a long one; a sum with its count does not. Where the numbers go is in
metrics_sinks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from distill.data.teacher_prefix import TRUNCATION_RATE
from distill.distributed.host_memory import resident_bytes
from distill.supervise.progress import phase
from distill.types import Rollout, Stats

Kind = Literal["mean", "total", "max", "same"]
Scalar = float | Tensor

Phase = Literal["sync", "generation", "validation", "batching", "teacher", "training", "checkpointing"]
"""The phases of a step, in the names that the code uses."""

_TAGS = {
    "sync": "prepare_for_generation",
    "batching": "data_processing",
    "teacher": "teacher_logprob_inference",
    "training": "policy_training",
}
"""Metric tags of the phases whose tag differs from their name; users know the tags from NeMo-RL."""

OUTSIDE_THROUGHPUT = ("validation", "checkpointing")
"""Phases that produce no training tokens: their seconds don't count in tokens per second."""

# Which tokens a phase works on, for its own tokens per second over the whole job.
_TOKENS_OF_PHASE = {
    "generation": "train/generated_tokens",
    "teacher_logprob_inference": "train/teacher_tokens",
    "policy_training": "train/total_num_tokens",
}


class Metrics:
    """The numbers of one step on this rank; a plain holder until ``reduce``.

    A name has one kind for its whole life: ``mean`` (sum over ranks of sums / sum of counts), ``total`` (sum over
    ranks), ``max`` (over ranks) or ``same`` (every rank must bring the identical number). Tensors are kept where they
    are, so adding never waits for a device.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._values: dict[str, tuple[Scalar, Scalar]] = {}

    def add(self, stats: Stats) -> None:
        """Add (sum, count) pairs; their mean is taken over everything added on all ranks."""
        for name, (total, count) in stats.items():
            self._put(name, "mean", total, count)

    def add_totals(self, totals: Mapping[str, Scalar]) -> None:
        """Add this rank's share of numbers that are summed over ranks."""
        for name, total in totals.items():
            self._put(name, "total", total, 1.0)

    def add_max(self, values: Mapping[str, Scalar]) -> None:
        """Add numbers of which the largest of all ranks is kept."""
        for name, value in values.items():
            self._put(name, "max", value, 1.0)

    def add_same(self, values: Mapping[str, Scalar]) -> None:
        """Add numbers that every rank knows alike; ``reduce`` raises RuntimeError where they differ."""
        for name, value in values.items():
            self._put(name, "same", value, 1.0)

    def _put(self, name: str, kind: Kind, first: Scalar, second: Scalar) -> None:
        assert self._kinds.setdefault(name, kind) == kind, f"{name} is a {self._kinds[name]}, not a {kind}"
        first, second = _double(first), _double(second)
        if name in self._values:
            old_first, old_second = self._values[name]
            first, second = _join(kind, old_first, first), old_second + second
        self._values[name] = (first, second)

    def on_host(self) -> dict[str, tuple[Kind, float, float]]:
        """Kind, sum and count by name, as Python numbers, by one copy from the device."""
        scalars = [scalar for pair in self._values.values() for scalar in pair]
        on_device = [scalar for scalar in scalars if isinstance(scalar, Tensor)]
        device = next((scalar.device for scalar in on_device if scalar.device.type != "cpu"), torch.device("cpu"))
        copied = iter(torch.stack([scalar.to(device) for scalar in on_device]).tolist() if on_device else [])
        numbers = iter([next(copied) if isinstance(scalar, Tensor) else scalar for scalar in scalars])
        return {name: (self._kinds[name], next(numbers), next(numbers)) for name in self._values}

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The numbers of all ranks by name, identical on every rank.

        Every rank of ``group`` calls it at the same point, with a group that carries host memory (gloo); None: this
        rank alone. Ranks may bring different names. It is one gather of names and numbers together: a sum alone would
        need the names agreed on before, and the maxima apart. Added up in float64 in the order of the ranks. A mean
        over nothing is nan.
        """
        mine = self.on_host()
        everyone = [mine]
        if group is not None:
            everyone = [mine] * dist.get_world_size(group)
            dist.all_gather_object(everyone, mine, group=group)
        return _combine(everyone)


class Phases:
    """Seconds and memory of a step by phase; made at the step's start, which starts its clock.

    On CUDA the device is waited for when a phase begins and ends, so that a phase is charged with its own kernels.
    ``memory`` is in bytes: on CUDA the most that torch's allocator had given out at once, elsewhere what of the process
    was resident when the phase ended.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Charge what happens inside to phase ``name``; a phase may come several times in a step. The watch is told."""
        self._wait()
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        with phase(name):
            try:
                yield
            finally:
                self._wait()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
                used = torch.cuda.max_memory_allocated(self._device) if self._on_cuda else resident_bytes()
                if used is not None:
                    self.memory[name] = max(self.memory.get(name, 0), used)

    def stats(self) -> Stats:
        """``timing/train/*`` in seconds as (seconds, 1): over ranks a mean, so that phases add up to the step."""
        seconds = {**self.seconds, "total_step_time": time.perf_counter() - self._start}
        return {f"timing/train/{_TAGS.get(name, name)}": (value, 1.0) for name, value in seconds.items()}

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    @property
    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"


def add_rollouts(metrics: Metrics, rollouts: Sequence[Rollout]) -> None:
    """Add lengths and endings of ``rollouts``; each rollout must be added on exactly one rank."""
    prompts = [len(rollout.prompt.student_ids) for rollout in rollouts]
    answers = [len(rollout.response_ids) for rollout in rollouts]
    cut = [rollout.finish == "length" for rollout in rollouts]
    number = float(len(rollouts))
    metrics.add(
        {
            "mean_prompt_length": (float(sum(prompts)), number),
            "mean_gen_tokens_per_sample": (float(sum(answers)), number),
            "mean_total_tokens_per_sample": (float(sum(prompts) + sum(answers)), number),
            "truncation_rate": (float(sum(cut)), number),
            "natural_termination_rate": (number - sum(cut), number),
        }
    )
    totals = {"total_num_tokens": sum(prompts) + sum(answers), "generated_tokens": sum(answers)}
    metrics.add_totals({name: float(total) for name, total in totals.items()})
    if answers:
        metrics.add_max({"max_gen_tokens_per_sample": float(max(answers))})


def step_numbers(
    metrics: Metrics, phases: Phases, rollouts: Sequence[Rollout], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Return the metrics of a finished step over all ranks by name; collective over ``group``.

    ``rollouts`` are those that were trained on, the same list on every rank.
    """
    response_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    prefix_tokens = sum(len(rollout.teacher_prefix_ids) for rollout in rollouts)
    metrics.add_same(
        {
            "global_valid_seqs": float(len(rollouts)),
            "global_valid_toks": float(response_tokens),
            "teacher_tokens": float(prefix_tokens + response_tokens),
        }
    )
    metrics.add_max({"timing/train/generation_slowest": phases.seconds["generation"]})
    values = finish_step(metrics, phases, group)
    if "train/context_distillation_valid_samples" in values:
        values.setdefault(f"train/{TRUNCATION_RATE}", 0.0)  # not measured if all were dropped: no gap in the curve
    return values


def finish_step(metrics: Metrics, phases: Phases, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Close the step's books: phases added, ranks reduced, rates derived, names as in the logs.

    Every rank of ``group`` calls it at the same point, and gets the same numbers. A name without a slash gets the
    prefix ``train/``.
    """
    metrics.add(phases.stats())
    values = {name if "/" in name else f"train/{name}": value for name, value in metrics.reduce(group).items()}
    return {**values, **rates(values, 1 if group is None else dist.get_world_size(group)), **waits(values)}


def waits(values: Mapping[str, float]) -> dict[str, float]:
    """The share of their generation time in which ranks waited for the one with the longest answers, on average."""
    mean, slowest = (values.get(name) for name in ("timing/train/generation", "timing/train/generation_slowest"))
    return {"timing/train/generation_wait_share": 1 - mean / slowest} if mean and slowest else {}


def rates(values: Mapping[str, float], world_size: int) -> dict[str, float]:
    """Tokens per second of a step's ``values``: per GPU (prompt and answer; scored ones only), and by phase over all.

    Seconds of validation and checkpoints are left out.
    """

    def seconds(phase: str) -> float:
        return values.get(f"timing/train/{phase}", 0.0)

    working = seconds("total_step_time") - sum(seconds(phase) for phase in OUTSIDE_THROUGHPUT)
    found = {
        "train/tokens_per_sec_per_gpu": (values.get("train/total_num_tokens"), working * world_size),
        "timing/train/valid_tokens_per_sec_per_gpu": (values.get("train/global_valid_toks"), working * world_size),
    }
    for name, tokens in _TOKENS_OF_PHASE.items():
        found[f"timing/train/{name}_tokens_per_sec"] = (values.get(tokens), seconds(name))
    return {name: tokens / spent for name, (tokens, spent) in found.items() if tokens is not None and spent > 0}


def _double(value: Scalar) -> Scalar:
    if isinstance(value, Tensor):
        assert value.numel() == 1, f"a metric is one number, not {tuple(value.shape)}"
        return value.detach().reshape(()).double()
    return float(value)


def _join(kind: Kind, old: Scalar, new: Scalar) -> Scalar:
    if kind in ("mean", "total"):
        return old + new
    if kind == "same":
        return new
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return torch.maximum(torch.as_tensor(old), torch.as_tensor(new).to(torch.as_tensor(old).device))
    return max(old, new)


def _combine(everyone: Iterable[Mapping[str, tuple[Kind, float, float]]]) -> dict[str, float]:
    entries: dict[str, list[tuple[Kind, float, float]]] = {}
    for rank in everyone:
        for name, entry in rank.items():
            entries.setdefault(name, []).append(entry)
    return {name: _value(name, found) for name, found in entries.items()}


def _value(name: str, found: list[tuple[Kind, float, float]]) -> float:
    kinds, firsts, seconds = {kind for kind, _, _ in found}, [a for _, a, _ in found], [b for _, _, b in found]
    assert len(kinds) == 1, f"{name} is of kinds {kinds} on different ranks"
    kind = next(iter(kinds))
    if kind == "total":
        return sum(firsts)
    if kind == "max":
        return math.nan if any(math.isnan(first) for first in firsts) else max(firsts)
    if kind == "same":
        if len({repr(first) for first in firsts}) > 1:  # by repr, for nan is like itself here
            raise RuntimeError(f"{name} should be the same on every rank but is {firsts}: the ranks have drifted apart")
        return firsts[0]
    return sum(firsts) / sum(seconds) if sum(seconds) else math.nan
