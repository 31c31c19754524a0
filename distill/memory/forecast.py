"""Forecast of the memory of a rank in each phase of a step, and checks based on the forecast."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError, any_of
from distill.memory.phases import Lines, StepMemory
from distill.memory.shapes import ModelShape, check_shapes, find_config, find_shape, shape_of
from distill.model.tensor_parallel import check_tensor_parallel

log = logging.getLogger(__name__)

GIB = 2**30
CARD_SHARE = 0.98
"""Usable fraction of N GiB on a GPU sold with N GB; drivers report 0.985 to 0.99."""
RESERVE = 3 * GIB
"""Fixed reserve in bytes for memory that the forecast does not compute.

It covers the CUDA context, NCCL buffers, matmul workspaces, CUDA graphs of a sleeping engine, and fragmentation.
"""

PHASES = {
    "sync": "sync",
    "generate": "generation",
    "teacher": "teacher",
    "train": "training",
}
"""Names of the phases in the forecast, mapped to their names in a training step."""

_STATE = ("cluster.num_nodes", "policy.dtensor_cfg.cpu_offload=true")
_TOKENS = ("policy.dtensor_cfg.context_parallel_size", "policy.sequence_packing.train_mb_tokens")
_TP = "policy.dtensor_cfg.tensor_parallel_size"
_ENGINE_SHARE = "policy.generation.vllm_cfg.gpu_memory_utilization"
_ENGINE_TP = "policy.generation.vllm_cfg.tensor_parallel_size"
_KEYS: dict[str, tuple[str, ...]] = {
    "master weights": _STATE,
    "gradients": _STATE,
    "optimizer state": _STATE,
    "optimizer temporaries": _STATE,
    "teacher shards": ("cluster.num_nodes",),
    "gathered layers": (_TP,),
    "gathered embeddings": (_TP,),
    "gradient reduction": (_TP,),
    "embedding gradients": (_TP,),
    "saved activations": ("policy.dtensor_cfg.activation_checkpointing=true", *_TOKENS),
    "layer workspace": (*_TOKENS, _TP),
    "response rows": _TOKENS,
    "logits chunk": ("runtime.logits_chunk_rows", _TP),
    "teacher workspace": _TOKENS,
    "targets": ("distillation.topk_logits_k", "policy.dtensor_cfg.context_parallel_size", "cluster.num_nodes"),
    "engine weights": (_ENGINE_TP,),
    "engine cache": (_ENGINE_SHARE,),
    "sync buckets": ("runtime.sync_bucket_mib",),
}
"""Configuration keys that reduce each line of the table; errors recommend them."""


@dataclass(frozen=True)
class Forecast:
    """Predicted peak memory of a rank in bytes, by phase."""

    about: tuple[str, ...]
    """Text lines that name the models and the layout, for the head of the table."""
    phases: dict[str, Lines]
    """Bytes by purpose at the peak of each phase."""
    host: Lines
    """Bytes of pinned host memory by purpose."""
    window_cache: int
    """Bytes of keys and values for one sequence of the maximum length: the smallest cache vLLM accepts."""

    def total(self, phase: str) -> int:
        """Return the predicted bytes of a phase."""
        return sum(self.phases[phase].values())

    def table(self) -> str:
        """Return a text table with a line per phase: predicted GiB and the five largest parts."""
        rows = ["memory of a rank in GiB, predicted", *(f"  {line}" for line in self.about)]
        for phase, lines in [*self.phases.items(), *([("host", self.host)] if self.host else [])]:
            largest = sorted(lines.items(), key=lambda line: -line[1])
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest[:5] if size >= 0.05 * GIB)
            rows.append(f"  {phase:9}{sum(lines.values()) / GIB:6.1f}  {parts}".rstrip())
        return "\n".join(rows)

    def check(self, config: Config) -> None:
        """Raise UserError if a phase or the engine's cache does not fit ``cluster.gpu_memory_gb``.

        Checks nothing if the key is null.
        """
        if config.cluster.gpu_memory_gb is None:
            return
        given, card = config.cluster.gpu_memory_gb, card_bytes(config.cluster.gpu_memory_gb)
        cache = self.phases["generate"]["engine cache"]
        if cache < self.window_cache:
            settings = config.policy.generation.vllm_cfg
            raise UserError(
                f"{_ENGINE_SHARE}={settings.gpu_memory_utilization:g} of {card / GIB:.1f} GiB leaves"
                f" {cache / GIB:.1f} GiB for the engine's cache, but one sequence of the maximum length needs"
                f" {self.window_cache / GIB:.1f} GiB",
                f"raise it, or raise {_ENGINE_TP}={settings.tensor_parallel_size}",
                key=_ENGINE_SHARE,
                value=settings.gpu_memory_utilization,
            )
        phase = max(self.phases, key=self.total)
        lines, total = self.phases[phase], self.total(phase)
        if total <= card:
            return
        largest = sorted((name for name in lines if name in _KEYS), key=lambda name: -lines[name])[:3]
        keys = dict.fromkeys(key for name in largest for key in _KEYS[name] if not _is_set(config, key))
        raise UserError(
            f"cluster.gpu_memory_gb={given:g} provides {card / GIB:.1f} GiB of usable memory, but the {phase} phase"
            f" needs {total / GIB:.1f} GiB per rank ({lines[largest[0]] / GIB:.1f} GiB of it for {largest[0]})",
            f"change {any_of(keys)}, or use a larger GPU",
            key="cluster.gpu_memory_gb",
            value=given,
        )


def _is_set(config: Config, remedy: str) -> bool:
    """Return whether the recipe already has the recommended setting ``remedy``, written as key=value."""
    key, _, value = remedy.rpartition(".")[2].partition("=")
    return value == "true" and bool(getattr(config.policy.dtensor_cfg, key))


def card_bytes(gigabytes: float) -> int:
    """Return the usable bytes of a GPU sold with ``gigabytes`` GB."""
    return int(gigabytes * GIB * CARD_SHARE)


def dry_run(config: Config) -> Iterator[str]:
    """Yield the forecast's table as YAML comments; never uses the network.

    The shapes of the models are read from local files or a table of published shapes. Raises UserError if the models do
    not support the layout. After the table, raises UserError if ``cluster.gpu_memory_gb`` is too small.
    """
    ours = find_config(config.policy.model_name, "policy.model_name")
    student = None if ours is None else shape_of(ours, config.policy.model_name)
    teacher = find_shape(config.teacher.model_name, "teacher.model_name")
    check_shapes(config, student, teacher)
    if student is not None:
        check_tensor_parallel(config, ours, student.vocab)
    if student is None or teacher is None:
        unknown = config.policy.model_name if student is None else config.teacher.model_name
        yield f"# no memory forecast: {unknown} is not on this machine, and its shape is not in the built-in table"
        return
    cuda = config.runtime.device != "cpu"
    forecast = predict(config, student, teacher, cuda)
    yield "\n".join(f"# {line}" for line in forecast.table().splitlines())
    if cuda:
        forecast.check(config)


def plan_memory(config: Config, student: ModelShape, teacher: ModelShape, device: torch.device) -> Forecast:
    """Return the forecast of a run, after checking its layout and, on GPUs, its memory; raises UserError."""
    check_shapes(config, student, teacher)
    if device.type != "cuda":
        return predict(config, student, teacher, cuda=False)
    forecast = predict(config, student, teacher, card=torch.cuda.get_device_properties(device).total_memory)
    forecast.check(config)
    return forecast


def predict(
    config: Config, student: ModelShape, teacher: ModelShape, cuda: bool = True, card: int | None = None
) -> Forecast:
    """Predict the peak memory of a rank in each phase.

    ``card``: memory of the GPU in bytes, used if ``cluster.gpu_memory_gb`` is null. If both are unknown, the table has
    no line for the engine's cache, because its size depends on the GPU. Without ``cuda`` nothing is offloaded.
    """
    if config.cluster.gpu_memory_gb is not None:
        card = card_bytes(config.cluster.gpu_memory_gb)
    memory = StepMemory(config, student, teacher, cuda, card)
    candidates = (memory.sync_phase(), memory.generation_phase(), memory.teacher_phase(), memory.training_phase())
    peaks = {
        phase: max(tables, key=lambda lines: sum(lines.values()))
        for phase, tables in zip(PHASES, candidates, strict=True)
    }
    if not cuda:
        return Forecast(memory.about, peaks, {}, memory.window_cache())
    phases = {phase: lines | {"reserve": RESERVE} for phase, lines in peaks.items()}
    return Forecast(memory.about, phases, memory.host(), memory.window_cache())


def compare(forecast: Forecast, measured: Mapping[str, int], pool_bytes: int, world: World) -> None:
    """Log the measured memory of a step next to the forecast, as the maximum over ranks; collective.

    ``measured``: peak bytes by phase of the step. ``pool_bytes``: size of the sleeping engine's memory pool; it is
    subtracted, because torch reports the pool as allocated although its memory is free.
    """
    sleeping = {"teacher", "train"}
    own = {
        phase: (measured[name] - (pool_bytes if phase in sleeping else 0)) / GIB
        for phase, name in PHASES.items()
        if name in measured
    }
    everyone = world.gather(own)
    method = "torch's peak memory" if world.device.type == "cuda" else "resident memory of the process (no GPU)"
    largest = {phase: max(rank[phase] for rank in everyone) for phase in own}
    numbers = (f"{phase} {value:.1f} ({forecast.total(phase) / GIB:.1f})" for phase, value in largest.items())
    if world.is_main:
        log.info(
            "peak memory per rank, maximum over ranks, GiB (forecast): %s; measured as %s", ", ".join(numbers), method
        )
