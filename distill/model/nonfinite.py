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
    """Report of one rank on NaN and infinity in the losses, gradients and weights of an optimizer batch."""

    norm: float
    """2-norm of the gradients of all ranks; nan if a loss on any rank is not finite."""
    losses: list[float]
    """Loss of each micro-batch on this rank, summed over its response tokens."""
    gradients: list[str]
    """Names of the gradients whose shard on this rank is not finite."""
    weights: list[str]
    """Names of the weights whose shard on this rank is not finite."""

    @property
    def micro_batches(self) -> list[int]:
        """Return the indices of this rank's micro-batches whose loss is not finite."""
        return [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]


class NonFiniteError(RuntimeError):
    """Error that all ranks raise instead of an optimizer step if a loss or gradient is not finite.

    ``found``: this rank's report.
    """

    def __init__(self, found: NonFiniteReport) -> None:
        super().__init__(
            f"the optimizer step was not taken, because a loss or gradient is not finite (norm {found.norm})"
        )
        self.found = found
        self.batch: OptimizerBatch | None = None
        """The optimizer batch of the failed step; None until ``Student.train`` sets it."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors whose shard on this rank has NaN or infinity; not collective."""
    if not tensors:
        return []
    # A sum is finite only if all elements are finite. It needs no temporary of the size of the tensor.
    finite = [local_shard(tensor).detach().sum(dtype=torch.float32).isfinite() for tensor in tensors.values()]
    device = next((flag.device for flag in finite if flag.device.type != "cpu"), torch.device("cpu"))
    flags = torch.stack([flag.to(device) for flag in finite]).tolist()
    return [name for name, is_finite in zip(tensors, flags, strict=True) if not is_finite]


def sample_lines(
    found: NonFiniteReport, batch: OptimizerBatch, rollouts: Sequence[Rollout], decode: Callable[..., str], all_: bool
) -> Iterator[str]:
    """Yield one JSON line for each response in a micro-batch whose loss is not finite.

    ``found``: this rank's report on ``batch``. ``all_``: include the responses of all micro-batches. ``rollouts``: all
    rollouts (responses with prompts) of the training step; ``rollout_N`` of a micro-batch contains indices into them.
    ``decode``: converts token ids to text.
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
    """Return ``loss`` itself if it is finite, otherwise a string such as "nan", because JSON has no nan."""
    return loss if math.isfinite(loss) else str(loss)


def write_report(path: Path, found: NonFiniteReport, samples: Iterator[str], step: int, rank: int) -> None:
    """Write this rank's report to the file ``path`` in JSON lines.

    The first line contains ``step``, ``rank`` and the contents of ``found``. The lines that ``samples`` yields follow.
    """
    numbers = {"norm": _json_number(found.norm), "losses": [_json_number(loss) for loss in found.losses]}
    tensors = {"gradients": found.gradients, "weights": found.weights}
    first = json.dumps({"step": step, "rank": rank, **numbers, **tensors})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([first, *samples]) + "\n", encoding="utf-8")


def describe(reports: Sequence[NonFiniteReport], step: int, files: Path) -> str:
    """Return one sentence that summarises the reports of all ranks on a failed optimizer step.

    ``reports``: one report per rank, in order; ``step``: the training step; ``files``: glob pattern of the report
    files.
    """
    parts = [f"the optimizer did not update the weights in step {step}, because a loss or gradient is not finite"]
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
            parts.append(f"the {kind} are not finite in {', '.join(broken[:4])}")
    return f"{'; '.join(parts)}; losses and responses were written to {files}, and no checkpoint was saved"
