"""Metrics of one training step: sums and counts on every rank, reduced over ranks once per step.

A mean is stored as (sum, count), because a mean of micro-batch means would give too much weight to short micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from distill.data.teacher_prefix import TRUNCATION_RATE
from distill.metrics.names import OUTSIDE_THROUGHPUT, timing_tag
from distill.metrics.phases import Phases
from distill.metrics.responses import ends_in_a_loop, own_responses, repeated_token_stats
from distill.types import Rollout, Stats

Kind = Literal["mean", "total", "max", "same"]
Scalar = float | Tensor

_TOKENS_OF_PHASE = {
    "generation": "train/generated_tokens",
    "teacher": "train/teacher_tokens",
    "training": "train/total_num_tokens",
}
"""Maps a phase to the name of the metric that counts the tokens processed in this phase on all ranks."""


class Metrics:
    """Metrics of one step on this rank; ``reduce`` combines the metrics of all ranks.

    Each metric has one kind: ``mean`` (sum of all sums / sum of all counts), ``total`` (sum over ranks), ``max``
    (maximum over ranks) or ``same`` (equal on every rank). Tensors stay on their device, so adding a value does not
    synchronize the device.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._values: dict[str, tuple[Scalar, Scalar]] = {}

    def add(self, stats: Stats) -> None:
        """Add (sum, count) pairs by metric name; the metric is the sum of all sums / the sum of all counts."""
        for name, (total, count) in stats.items():
            self._put(name, "mean", total, count)

    def add_totals(self, totals: Mapping[str, Scalar]) -> None:
        """Add values by metric name; the metric is the sum of all values added on all ranks."""
        for name, total in totals.items():
            self._put(name, "total", total, 1.0)

    def add_max(self, values: Mapping[str, Scalar]) -> None:
        """Add values by metric name; the metric is the maximum of all values added on all ranks.

        The value -inf means that nothing was measured; the metric is nan if all values are -inf.
        """
        for name, value in values.items():
            self._put(name, "max", value, 1.0)

    def add_same(self, values: Mapping[str, Scalar]) -> None:
        """Add values by metric name; ``reduce`` raises RuntimeError if a metric differs between ranks."""
        for name, value in values.items():
            self._put(name, "same", value, 1.0)

    def _put(self, name: str, kind: Kind, first: Scalar, second: Scalar) -> None:
        assert self._kinds.setdefault(name, kind) == kind, f"metric {name} is of kind {self._kinds[name]}, not {kind}"
        first, second = _double(first), _double(second)
        if name in self._values:
            old_first, old_second = self._values[name]
            first, second = _join(kind, old_first, first), old_second + second
        self._values[name] = (first, second)

    def on_host(self) -> dict[str, tuple[Kind, float, float]]:
        """Return a dict from metric name to (kind, sum or value, count), copied to the host in one transfer."""
        scalars = [scalar for pair in self._values.values() for scalar in pair]
        on_device = [scalar for scalar in scalars if isinstance(scalar, Tensor)]
        device = next((scalar.device for scalar in on_device if scalar.device.type != "cpu"), torch.device("cpu"))
        copied = iter(torch.stack([scalar.to(device) for scalar in on_device]).tolist() if on_device else [])
        numbers = iter([next(copied) if isinstance(scalar, Tensor) else scalar for scalar in scalars])
        return {name: (self._kinds[name], next(numbers), next(numbers)) for name in self._values}

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return the reduced metrics by name, equal on all ranks of ``group``; collective over ``group``.

        ``group``: a gloo group; None: this rank only. Names may differ between ranks, so names and values are gathered
        as Python objects. Sums are computed in float64, in the order of the ranks. A mean with count 0 is nan.
        """
        own = self.on_host()
        by_rank = [own]
        if group is not None:
            by_rank = [own] * dist.get_world_size(group)
            dist.all_gather_object(by_rank, own, group=group)
        return _combine(by_rank)


def add_rollouts(metrics: Metrics, rollouts: Sequence[Rollout]) -> None:
    """Add metrics of lengths, finish reasons and repetition; each rollout of a step must be added on exactly one rank.

    Numbers of tokens count all rollouts. The other metrics are those of the student's own responses; without such
    responses on any rank, only numbers of tokens are metrics of the step.
    """
    own = own_responses(rollouts)
    prompts = [len(rollout.prompt.student_ids) for rollout in own]
    responses = [len(rollout.response_ids) for rollout in own]
    truncated = [rollout.finish == "length" for rollout in own]
    number = float(len(own))
    if own:
        metrics.add(
            {
                "mean_prompt_length": (float(sum(prompts)), number),
                "mean_gen_tokens_per_sample": (float(sum(responses)), number),
                "mean_total_tokens_per_sample": (float(sum(prompts) + sum(responses)), number),
                "truncation_rate": (float(sum(truncated)), number),
                "natural_termination_rate": (number - sum(truncated), number),
                "repeated_token_share": repeated_token_stats(own),
                "repetition_rate": (float(sum(map(ends_in_a_loop, own))), number),
            }
        )
        metrics.add_max({"max_gen_tokens_per_sample": float(max(responses))})
    tokens = sum(len(rollout.prompt.student_ids) + len(rollout.response_ids) for rollout in rollouts)
    metrics.add_totals({"total_num_tokens": float(tokens), "generated_tokens": float(sum(responses))})


def step_numbers(
    metrics: Metrics,
    phases: Phases,
    rollouts: Sequence[Rollout],
    group: dist.ProcessGroup | None,
    read: Callable[[Rollout], int] = lambda rollout: len(rollout.response_ids),
) -> dict[str, float]:
    """Return all metrics of a finished step by logged name, reduced over ranks; collective.

    If the student generated no response in this step, metrics without a value (nan) are omitted.

    ``rollouts``: the rollouts that the step trained on, the same list on every rank. ``read``: function that returns
    the number of tokens of a response that the models read.
    """
    response_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    teacher_tokens = sum(len(rollout.teacher_prefix_ids) + n for rollout in rollouts if (n := read(rollout)))
    metrics.add_same(
        {
            "global_valid_seqs": float(len(rollouts)),
            "global_valid_toks": float(response_tokens),
            "teacher_tokens": float(teacher_tokens),
        }
    )
    metrics.add_max({"timing/train/generation_slowest": phases.seconds["generation"]})
    values = finish_step(metrics, phases, group)
    if "train/context_distillation_valid_samples" in values:
        # If all samples were dropped, the rate was not measured. 0 avoids a gap in the curve.
        values.setdefault(f"train/{TRUNCATION_RATE}", 0.0)
    if values.get("train/generated_tokens") == 0:
        # All responses come from the dataset, so no step measures the metrics of the student's own responses.
        return {name: value for name, value in values.items() if not math.isnan(value)}
    return values


def finish_step(metrics: Metrics, phases: Phases, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Return the step's metrics, reduced over ranks, by logged name; collective over ``group``.

    Adds metrics for durations and throughput. Metrics whose names have no slash get the prefix ``train/``.
    """
    metrics.add(phases.stats())
    values = {name if "/" in name else f"train/{name}": value for name, value in metrics.reduce(group).items()}
    return {**values, **rates(values, 1 if group is None else dist.get_world_size(group)), **waits(values)}


def waits(values: Mapping[str, float]) -> dict[str, float]:
    """Return the metric ``timing/train/generation_wait_share``; empty if generation was not measured.

    The value is 1 - mean / max, with mean and max of the ranks' generation times: the average fraction of the
    generation phase in which a rank waits for the slowest rank. With partial rollouts, ranks wait within the phase, and
    the mean is that of the times in which their engines worked, also on tokens that are discarded. ``values``: the
    step's metrics, reduced over ranks.
    """
    names = ("timing/train/generation_busy", "timing/train/generation", "timing/train/generation_slowest")
    busy, complete, slowest = (values.get(name) for name in names)
    mean = complete if busy is None else busy
    return {"timing/train/generation_wait_share": 1 - mean / slowest} if mean and slowest else {}


def rates(values: Mapping[str, float], world_size: int) -> dict[str, float]:
    """Return throughput in tokens/s by metric name: of a step per rank, and of each phase over all ranks.

    ``values``: the step's metrics, reduced over ranks. Rates of the step exclude the time of validation and
    checkpointing.
    """

    def seconds(phase: str) -> float:
        return values.get(timing_tag(phase), 0.0)

    working = seconds("total_step_time") - sum(seconds(phase) for phase in OUTSIDE_THROUGHPUT)
    found = {
        "train/tokens_per_sec_per_gpu": (values.get("train/total_num_tokens"), working * world_size),
        "timing/train/valid_tokens_per_sec_per_gpu": (values.get("train/global_valid_toks"), working * world_size),
    }
    for name, tokens in _TOKENS_OF_PHASE.items():
        found[f"{timing_tag(name)}_tokens_per_sec"] = (values.get(tokens), seconds(name))
    return {name: tokens / spent for name, (tokens, spent) in found.items() if tokens is not None and spent > 0}


def _double(value: Scalar) -> Scalar:
    if isinstance(value, Tensor):
        assert value.numel() == 1, f"a metric must be a scalar, not a tensor of shape {tuple(value.shape)}"
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


def _combine(by_rank: Iterable[Mapping[str, tuple[Kind, float, float]]]) -> dict[str, float]:
    entries: dict[str, list[tuple[Kind, float, float]]] = {}
    for metrics in by_rank:
        for name, entry in metrics.items():
            entries.setdefault(name, []).append(entry)
    return {name: _value(name, found) for name, found in entries.items()}


def _value(name: str, found: list[tuple[Kind, float, float]]) -> float:
    kinds, firsts, seconds = {kind for kind, _, _ in found}, [a for _, a, _ in found], [b for _, _, b in found]
    assert len(kinds) == 1, f"metric {name} has different kinds on different ranks: {kinds}"
    kind = next(iter(kinds))
    if kind == "total":
        return sum(firsts)
    if kind == "max":
        unknown = max(firsts) == -math.inf or any(math.isnan(first) for first in firsts)
        return math.nan if unknown else max(firsts)
    if kind == "same":
        if len({repr(first) for first in firsts}) > 1:  # by repr, because nan != nan
            raise RuntimeError(f"metric {name} must be equal on every rank, but the ranks have the values {firsts}")
        return firsts[0]
    return sum(firsts) / sum(seconds) if sum(seconds) else math.nan
