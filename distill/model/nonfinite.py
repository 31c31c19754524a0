"""Detection and reports of nan and infinity in losses, gradients and weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.model.dtensor import local_shard
from distill.types import OptimizerBatch, Rollout


@dataclass(frozen=True)
class NonFiniteReport:
    """Non-finite values that one rank found in an optimizer batch."""

    norm: float
    """Gradient norm over all ranks; nan also if only a loss is not finite."""
    losses: list[float]
    """Summed loss of each micro-batch of this rank."""
    gradients: list[str]
    """Names of the gradients whose shard on this rank is not finite."""
    weights: list[str]
    """Names of the weights whose shard on this rank is not finite."""

    @property
    def micro_batches(self) -> list[int]:
        """Return the indices of the micro-batches whose loss is not finite."""
        return [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]


class NonFiniteError(RuntimeError):
    """Raised by all ranks together instead of an optimizer step; ``found`` is this rank's report."""

    def __init__(self, found: NonFiniteReport) -> None:
        super().__init__(f"the norm of gradient and losses is {found.norm}: the optimizer step was not taken")
        self.found = found
        self.batch: OptimizerBatch | None = None
        """The optimizer batch that was not trained; Student.train sets it."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors whose shard on this rank has nan or infinity; waits for the device once."""
    if not tensors:
        return []
    # A sum is finite only if all elements are; it needs no temporary of the tensor's size.
    finite = [local_shard(tensor).detach().sum(dtype=torch.float32).isfinite() for tensor in tensors.values()]
    device = next((flag.device for flag in finite if flag.device.type != "cpu"), torch.device("cpu"))
    flags = torch.stack([flag.to(device) for flag in finite]).tolist()
    return [name for name, is_finite in zip(tensors, flags, strict=True) if not is_finite]


def sample_lines(
    found: NonFiniteReport, batch: OptimizerBatch, rollouts: Sequence[Rollout], decode: Callable[..., str], all_: bool
) -> Iterator[str]:
    """Yield a JSON line per response of the micro-batches whose loss is not finite, or of all if ``all_``.

    ``rollouts``: all rollouts of the step, which ``rollout_N`` indexes.
    """
    for i in range(len(batch)) if all_ else found.micro_batches:
        rows_N = batch.micro_batches[i].rollout_N
        for index in sorted(set(rows_N[rows_N >= 0].tolist())):
            loss = _json_number(found.losses[i])
            yield json.dumps({"micro_batch": i, "loss": loss, **_sample(rollouts[index], decode)})


def _sample(rollout: Rollout, decode: Callable[..., str]) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "answer": rollout.response_index,
        "prompt": decode(rollout.prompt.student_ids),
        "text": decode(rollout.response_ids),
        "prompt_ids": list(rollout.prompt.student_ids),
        "teacher_ids": list(rollout.teacher_prefix_ids),
        "response_ids": list(rollout.response_ids),
        "finish": rollout.finish,
    }


def _json_number(loss: float) -> float | str:
    """Return the number, or its text if it is not finite: JSON has no nan."""
    return loss if math.isfinite(loss) else str(loss)


def write_report(path: Path, found: NonFiniteReport, samples: Iterator[str], step: int, rank: int) -> None:
    """Write this rank's report to ``path``: a line with losses and tensor names, then the ``samples``."""
    numbers = {"norm": _json_number(found.norm), "losses": [_json_number(loss) for loss in found.losses]}
    tensors = {"gradients": found.gradients, "weights": found.weights}
    first = json.dumps({"step": step, "rank": rank, **numbers, **tensors})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([first, *samples]) + "\n", encoding="utf-8")


def describe(reports: Sequence[NonFiniteReport], step: int, files: Path) -> str:
    """Return one sentence that summarises the reports of all ranks.

    ``reports``: in order of rank; ``files``: the pattern of the report files' paths.
    """
    parts = [f"step {step} was not taken, because the norm of gradient and losses is {reports[0].norm}"]
    losses = [
        f"{len(found.micro_batches)} of {len(found.losses)} micro-batches of rank {rank}"
        for rank, found in enumerate(reports)
        if found.micro_batches
    ]
    if losses:
        parts.append(f"the loss is not finite in {', '.join(losses[:8])}")
    for kind in ("weights", "gradients"):
        broken = [f"rank {r}'s shard of {getattr(e, kind)[0]}" for r, e in enumerate(reports) if getattr(e, kind)]
        if broken:
            parts.append(f"{kind} that are not finite: {', '.join(broken[:4])}")
    return f"{'; '.join(parts)}; the responses are in {files}, and no checkpoint was saved"
