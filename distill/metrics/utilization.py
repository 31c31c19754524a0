"""Model FLOPs utilization (MFU): the FLOPs of training in relation to the peak of the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distill.batching.flops import ModelFlops
from distill.batching.position_weights import tokens_read
from distill.config import TokenWeightsConfig
from distill.config.gpus import gpu_of_device
from distill.metrics.names import timing_tag
from distill.types import Rollout


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the peak of a GPU in FLOP/s; None for unknown GPUs and for dtypes other than bfloat16 and float16."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    gpu = gpu_of_device(device_name)
    return None if gpu is None else gpu.tflops * 1e12


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak of ``device`` in FLOP/s; None on CPUs, and if ``peak_flops`` returns None."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs utilization of the training phase."""

    flops: ModelFlops
    """FLOPs of the student."""
    share_prefixes: bool
    """Whether a prompt is computed once for all its responses."""
    ranks: int
    """Number of ranks of the job."""
    peak: float | None
    """Peak FLOP/s of a rank's device; None if unknown."""
    weights: TokenWeightsConfig | None = None
    """Weights of the response tokens, as in ``PackingConfig``."""
    scores: bool = False
    """Whether the weights need a pass of the LM head over the tokens before the loss."""

    def metrics(self, values: Mapping[str, float], rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Return the metrics ``throughput/training_tflop``, ``training_tflops_per_gpu`` and, for a known peak, ``mfu``.

        They count the tokens that the student reads, and the tokens with a weight for which the LM head computes
        logits. ``values``: the step's metrics, reduced over ranks. ``rollouts``: the rollouts of all ranks on which the
        step trained. The result is empty without rollouts or without a measured training time.
        """
        seconds = values.get(timing_tag("training"), 0.0)
        if not rollouts or seconds <= 0:
            return {}
        flops = self.training_flops(values.get("train/trained_tokens"), rollouts)
        rate = flops / seconds / self.ranks
        found = {"throughput/training_tflop": flops / 1e12, "throughput/training_tflops_per_gpu": rate / 1e12}
        return found if self.peak is None else found | {"throughput/mfu": rate / self.peak}

    def training_flops(self, trained: float | None, rollouts: Sequence[Rollout]) -> float:
        """Return the FLOPs of training on ``rollouts``, those of all ranks.

        ``trained``: number of tokens with a weight; None: all tokens that the student reads.
        """

        def read(rollout: Rollout) -> int:
            return tokens_read(self.weights, len(rollout.response_ids))

        scored = sum(map(read, rollouts)) if self.scores else 0
        return self.flops.training(rollouts, self.share_prefixes, read, trained, scored)
