"""The parts of the acceptance test, in the order in which they run: proofs first, timings last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Need = Literal["torch", "gpu", "vllm", "ranks", "triton", "config", "transformers", "model", "engine", "vllm timings"]
"""gpu: a GPU; vllm: vLLM for this device; ranks: at least two ranks; config: packages that read recipes; model: part
``model`` succeeded; engine: START_OF_ENGINE did not end with an error; vllm timings: a GPU, or --only; otherwise a
package."""

REASONS: dict[str, str] = {
    "torch": "needs torch",
    "gpu": "needs a GPU",
    "vllm": "needs vLLM for this device",
    "ranks": "needs at least two ranks",
    "triton": "needs triton",
    "config": "needs the packages that read recipes (omegaconf)",
    "transformers": "needs transformers",
    "model": "the model could not be made",
    "engine": "vLLM did not start",
    "vllm timings": "needs a GPU, or --only",
}


@dataclass(frozen=True)
class Part:
    """One part: a function that yields checks, with its needs and its limit.

    A dict that the function yields is added to the head of accept.json.
    """

    name: str
    kind: Literal["proof", "timing"]
    group: str
    """Consecutive parts of one group share their processes, unless one of the parts fails."""
    needs: tuple[Need, ...]
    limit: float
    """Seconds on a GPU machine; the first part of a group has START_LIMIT more."""
    source: str
    """Module and function, separated by a colon; the module is imported in the part's process only."""
    about: str


START_OF_ENGINE = "vLLM start"
"""Part after whose error the other parts with an engine do not run: each would repeat the failed start."""
RANK_GROUPS = ("ranks", "model", "runs", "train", "bandwidth")
"""Groups with one process per GPU on every node; all other groups have one process per node."""
START_LIMIT = 120.0
"""Seconds to import packages and to find the other ranks; long, because a first import reads from a cold disk."""

_STEP: tuple[Need, ...] = ("torch", "transformers")
_RUN: tuple[Need, ...] = ("config", "transformers", "model")
_ENGINE: tuple[Need, ...] = ("vllm", "transformers", "model", "engine")
_SPEED: tuple[Need, ...] = (*_ENGINE, "vllm timings")


def _proof(name: str, group: str, needs: tuple[Need, ...], limit: float, source: str, about: str) -> Part:
    return Part(name, "proof", group, needs, limit, f"{__package__}.{source}", about)


def _timing(name: str, group: str, needs: tuple[Need, ...], limit: float, source: str, about: str) -> Part:
    return Part(name, "timing", group, needs, limit, f"{__package__}.{source}", about)


_ALL = [
    _proof("environment", "environment", (), 60, "environment:environment", "devices, packages, disk"),
    _proof("collectives", "ranks", ("ranks",), 60, "collectives:values", "each collective once, values checked"),
    _proof("layouts", "ranks", _STEP, 120, "layouts:steps", "a training step at every layout, against one rank"),
    _proof("kernels", "kernels", ("triton",), 90, "kernels:loss_and_topk", "loss and top-k against float64"),
    _proof("layer kernels", "kernels", ("triton",), 60, "kernels:layers", "norm, rotary, SwiGLU against float64"),
    _proof("attention", "kernels", ("gpu", "transformers"), 60, "attention:packed", "a pack, per sequence"),
    _proof("model", "model", ("transformers",), 120, "models:make", "random models of the size asked"),
    _proof(START_OF_ENGINE, "vllm", _ENGINE, 240, "engine_checks:start", "the first start, without caches on a GPU"),
    _proof("log-probs", "vllm", _ENGINE, 90, "engine_checks:logprobs", "sampler against trainer"),
    _proof("sync", "vllm", _ENGINE, 60, "engine_checks:sync", "changed weights arrive, and are reported"),
    _proof("verification", "vllm", _ENGINE, 60, "engine_checks:verification", "stale and damaged weights"),
    _proof("sleep cycles", "vllm", _ENGINE, 120, "engine_checks:cycles", "ten cycles leak no memory"),
    _proof("transfer", "vllm", _ENGINE, 60, "engine_checks:transfer", "a stale tensor stops the sync"),
    _proof(
        "resume", "runs", ("config", "transformers"), 180, "runs:resume", "a stopped run resumes with the same data"
    ),
    _proof("training run", "train", _RUN, 240, "runs:train", "the program; memory against forecast"),
    _timing("loss speed", "loss", ("torch",), 240, "speed:loss", "loss and top-k against the roofline"),
    _timing("bandwidth", "bandwidth", ("ranks",), 90, "collectives:bandwidth", "collectives by size"),
    _timing("step speed", "step", ("config", "model"), 30, "runs:speed", "tokens per second of the training run"),
    _timing("vLLM alone", "alone", _SPEED, 180, "speed:alone", "offline throughput without the trainer"),
    _timing("generation speed", "ours", _SPEED, 180, "speed:ours", "the trainer's engine against vLLM alone"),
]
PARTS = {part.name: part for part in _ALL}


def missing(part: Part, facts: dict[str, Any]) -> str:
    """Return why this machine cannot run ``part``; empty if it can. ``facts``: need -> whether it is fulfilled."""
    reasons = [str(facts.get(f"no {need}") or REASONS[need]) for need in part.needs if not facts.get(need)]
    return "; ".join(reasons)
