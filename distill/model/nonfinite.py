"""Nan and infinity: found before they reach weights or checkpoint, and told with the answers that they come of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.types import OptimizerBatch, Rollout


@dataclass(frozen=True)
class Broken:
    """What a rank found not finite in an optimizer batch."""

    norm: float
    """Of the gradient, over all ranks; nan also where only a loss is not finite."""
    losses: list[float]
    """This rank's summed loss of each micro-batch."""
    gradients: list[str]
    """Names of the gradients whose shard on this rank is not finite."""
    weights: list[str]
    """The same of the weights."""

    @property
    def micro_batches(self) -> list[int]:
        """Those whose loss is not finite."""
        return [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]


class NonFinite(RuntimeError):
    """The optimizer's step was not taken; raised on all ranks together. ``found``: by this rank."""

    def __init__(self, found: Broken) -> None:
        super().__init__(f"the norm of gradient and losses is {found.norm}: the optimizer step was not taken")
        self.found = found


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose shard on this rank holds nan or infinity; waits for the device once."""
    if not tensors:
        return []
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    finite = [local.detach().sum(dtype=torch.float32).isfinite() for local in locals_]
    device = next((flag.device for flag in finite if flag.device.type != "cpu"), torch.device("cpu"))
    flags = torch.stack([flag.to(device) for flag in finite]).tolist()
    return [name for name, is_finite in zip(tensors, flags, strict=True) if not is_finite]


def sample_lines(
    found: Broken, batch: OptimizerBatch, rollouts: Sequence[Rollout], decode: Callable[..., str], all_: bool
) -> Iterator[str]:
    """A JSON line for each answer of the micro-batches whose loss isn't finite, or of all; ``rollouts``: the step's."""
    for i in range(len(batch)) if all_ else found.micro_batches:
        rows_N = batch.micro_batches[i].rollout_N
        for place in sorted(set(rows_N[rows_N >= 0].tolist())):
            yield json.dumps({"micro_batch": i, "loss": _said(found.losses[i]), **_sample(rollouts[place], decode)})


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


def _said(loss: float) -> float | str:
    """JSON knows no nan."""
    return loss if math.isfinite(loss) else str(loss)


def write_report(path: Path, found: Broken, samples: Iterator[str], step: int, rank: int) -> None:
    """This rank's file: its losses and what of its shards is broken, then a line a sample."""
    numbers = {"norm": _said(found.norm), "losses": [_said(loss) for loss in found.losses]}
    tensors = {"gradients": found.gradients, "weights": found.weights}
    first = json.dumps({"step": step, "rank": rank, **numbers, **tensors})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([first, *samples]) + "\n", encoding="utf-8")


def sentence(everyone: Sequence[Broken], step: int, files: Path) -> str:
    """What happened; ``everyone``: what the ranks found, in order of rank."""
    parts = [f"step {step} was not taken: the norm of gradient and losses is {everyone[0].norm}"]
    losses = [
        f"{len(found.micro_batches)} of {len(found.losses)} micro-batches of rank {rank}"
        for rank, found in enumerate(everyone)
        if found.micro_batches
    ]
    if losses:
        parts.append(f"not finite is the loss of {', '.join(losses[:8])}")
    for what in ("weights", "gradients"):
        broken = [f"rank {r}'s shard of {getattr(e, what)[0]}" for r, e in enumerate(everyone) if getattr(e, what)]
        if broken:
            parts.append(f"not finite among the {what}: {', '.join(broken[:4])}")
    return f"{'; '.join(parts)}; the samples are in {files}, and nothing was saved"
