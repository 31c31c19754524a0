"""Forecast the peak memory per rank in each phase of a training step, and check that it fits the GPU.

The phases are the sync of the weights to the generation engine, generation, the teacher's forward, and training.
"""

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
"""Usable fraction of GPU memory: a GPU sold with N GB has ``CARD_SHARE * N`` GiB of usable memory.

Drivers report a total memory of 0.985 to 0.99 times N GiB.
"""
RESERVE = 3 * GIB
"""Bytes that the forecast adds to each phase on a GPU, for memory use that it cannot predict.

Examples are the CUDA context, NCCL buffers, matmul workspaces, CUDA graphs of the generation engine, and fragmentation.
"""

PHASES = {
    "sync": "sync",
    "generate": "generation",
    "teacher": "teacher",
    "train": "training",
}
"""Maps the name of a phase in the forecast to the name of the phase in ``distill.metrics.phases``."""

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
"""Maps a purpose of memory, such as "gradients", to configuration keys that can reduce this memory.

The error for a GPU that is too small recommends these keys. An entry ``key=value`` recommends this value of the key.
"""


@dataclass(frozen=True)
class Forecast:
    """Predicted peak memory per rank in each phase of a training step."""

    about: tuple[str, ...]
    """Text lines that describe the models and the parallel layout, printed above the table."""
    phases: dict[str, Lines]
    """Maps each phase to its memory table, which maps a purpose, such as "gradients", to bytes per rank.

    The table is for the point in time at which the phase uses the most device memory.
    """
    host: Lines
    """Maps each purpose of pinned host memory to bytes per rank; empty without a GPU."""
    window_cache: int
    """Bytes per rank of the key-value cache for one sequence of the maximum length.

    vLLM refuses to start with a smaller cache.
    """

    def total(self, phase: str) -> int:
        """Return the predicted peak device memory of ``phase`` in bytes per rank."""
        return sum(self.phases[phase].values())

    def table(self) -> str:
        """Return the forecast as a text table with one line per phase.

        Each line has the predicted peak in GiB per rank, followed by the sizes of the five largest purposes of
        memory, such as gradients. Pinned host memory has its own line.
        """
        rows = ["predicted peak memory per rank in GiB", *(f"  {line}" for line in self.about)]
        for phase, lines in [*self.phases.items(), *([("host", self.host)] if self.host else [])]:
            largest = sorted(lines.items(), key=lambda line: -line[1])
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest[:5] if size >= 0.05 * GIB)
            rows.append(f"  {phase:9}{sum(lines.values()) / GIB:6.1f}  {parts}".rstrip())
        return "\n".join(rows)

    def check(self, config: Config) -> None:
        """Raise UserError if a GPU with ``cluster.gpu_memory_gb`` GB has too little memory.

        This is the case if a phase needs more memory than the GPU has, or if the generation engine has too little
        memory for the key-value cache of one sequence of the maximum length. Checks nothing if
        ``cluster.gpu_memory_gb`` is null.
        """
        if config.cluster.gpu_memory_gb is None:
            return
        given, card = config.cluster.gpu_memory_gb, card_bytes(config.cluster.gpu_memory_gb)
        cache = self.phases["generate"]["engine cache"]
        if cache < self.window_cache:
            settings = config.policy.generation.vllm_cfg
            raise UserError(
                f"{_ENGINE_SHARE}={settings.gpu_memory_utilization:g} of {card / GIB:.1f} GiB leaves"
                f" {cache / GIB:.1f} GiB for vLLM's key-value cache, but one sequence of the maximum length needs"
                f" {self.window_cache / GIB:.1f} GiB",
                f"raise {_ENGINE_SHARE}, or raise {_ENGINE_TP}={settings.tensor_parallel_size}",
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
            f" needs {total / GIB:.1f} GiB per rank according to the forecast, including"
            f" {lines[largest[0]] / GIB:.1f} GiB for {largest[0]}",
            f"change {any_of(keys)}, or use a larger GPU",
            key="cluster.gpu_memory_gb",
            value=given,
        )


def _is_set(config: Config, remedy: str) -> bool:
    """Return whether the recipe already contains the recommended setting ``remedy``.

    ``remedy`` has the form ``key=true`` or ``key``. For the form ``key`` the result is always False.
    """
    key, _, value = remedy.rpartition(".")[2].partition("=")
    return value == "true" and bool(getattr(config.policy.dtensor_cfg, key))


def card_bytes(gigabytes: float) -> int:
    """Return the usable memory in bytes of a GPU sold with ``gigabytes`` GB."""
    return int(gigabytes * GIB * CARD_SHARE)


def dry_run(config: Config) -> Iterator[str]:
    """Yield the memory forecast of a recipe as YAML comments; never uses the network.

    The layer sizes of student and teacher are read from local files or from a built-in table. If they are unknown, the
    only comment reports that no forecast is possible. Raises UserError if a model does not support the sequence lengths
    or the parallel sizes of the recipe. After the forecast, raises UserError if ``cluster.gpu_memory_gb`` is too small.
    """
    ours = find_config(config.policy.model_name, "policy.model_name")
    student = None if ours is None else shape_of(ours, config.policy.model_name)
    teacher = find_shape(config.teacher.model_name, "teacher.model_name")
    check_shapes(config, student, teacher)
    if student is not None:
        check_tensor_parallel(config, ours, student.vocab)
    if student is None or teacher is None:
        unknown = config.policy.model_name if student is None else config.teacher.model_name
        yield f"# no memory forecast, because the model {unknown} is neither on this machine nor in the built-in table"
        return
    cuda = config.runtime.device != "cpu"
    forecast = predict(config, student, teacher, cuda)
    yield "\n".join(f"# {line}" for line in forecast.table().splitlines())
    if cuda:
        forecast.check(config)


def plan_memory(config: Config, student: ModelShape, teacher: ModelShape, device: torch.device) -> Forecast:
    """Check the recipe against both models, and return the memory forecast of the run.

    Raises UserError if a model does not support the sequence lengths or the parallel sizes of the recipe, or if
    ``cluster.gpu_memory_gb`` is too small. ``device`` is the device of this rank.
    """
    check_shapes(config, student, teacher)
    if device.type != "cuda":
        return predict(config, student, teacher, cuda=False)
    forecast = predict(config, student, teacher, card=torch.cuda.get_device_properties(device).total_memory)
    forecast.check(config)
    return forecast


def predict(
    config: Config, student: ModelShape, teacher: ModelShape, cuda: bool = True, card: int | None = None
) -> Forecast:
    """Predict the peak memory per rank in each phase of a training step.

    ``cuda``: whether the run uses GPUs; if not, all memory is host memory and nothing is offloaded. ``card``: memory of
    the GPU in bytes, used if ``cluster.gpu_memory_gb`` is null. If both are None, the forecast does not include vLLM's
    key-value cache, because its size depends on the GPU.
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
    """Log the measured peak memory of each phase, followed by its forecast in parentheses; collective.

    The logged measurement is the maximum over ranks in GiB. Call this function after the second step of the process,
    because the first step allocates the optimizer state. ``measured`` maps a phase name of ``distill.metrics.phases``
    to this rank's peak in bytes. ``pool_bytes``: size of the generation engine's memory pool. The pool is free in the
    teacher and training phases, but torch still counts it as allocated, so it is subtracted from their peaks.
    """
    sleeping = {"teacher", "train"}
    own = {
        phase: (measured[name] - (pool_bytes if phase in sleeping else 0)) / GIB
        for phase, name in PHASES.items()
        if name in measured
    }
    everyone = world.gather(own)
    method = "memory allocated by torch" if world.device.type == "cuda" else "resident memory of the process"
    largest = {phase: max(rank[phase] for rank in everyone) for phase in own}
    numbers = (f"{phase} {value:.1f} ({forecast.total(phase) / GIB:.1f})" for phase, value in largest.items())
    if world.is_main:
        log.info(
            "peak %s in each phase of the second step after the start, in GiB (maximum over all ranks; forecast in"
            " parentheses): %s",
            method,
            ", ".join(numbers),
        )
