"""Forecast the peak memory per rank in each phase of a training step, and check that it fits the GPU.

The phases are the sync of the weights to the generation engine, generation, the teacher's forward, and training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from distill.config import Config
from distill.distributed.host_memory import resident_bytes
from distill.distributed.world import World
from distill.errors import UserError, any_of
from distill.memory.phases import StepMemory
from distill.memory.reserve import reserve
from distill.memory.shapes import ModelShape, check_shapes, find_config, find_shape, shape_of
from distill.memory.weights import Lines
from distill.model.lora import check_adapters
from distill.model.tensor_parallel import check_tensor_parallel

log = logging.getLogger(__name__)

GIB = 2**30
CARD_SHARE = 0.98
"""Usable fraction of GPU memory: a GPU sold with N GB has ``CARD_SHARE * N`` GiB of usable memory.

Drivers report a total memory of 0.985 to 0.99 times N GiB.
"""
ENGINE = ("engine weights", "engine cache")
"""Purposes of memory that belong to the generation engine."""

_CARDS_GB = (16, 24, 32, 40, 48, 64, 80, 96, 141, 180, 270)
"""Memory of common GPUs in GB."""

PHASES = ("sync", "generation", "teacher", "training")
"""Phases of a step with a forecast, named as in ``distill.metrics.names``."""

_STATE = ("cluster.num_nodes", "policy.dtensor_cfg.cpu_offload=true")
_TOKENS = ("policy.dtensor_cfg.context_parallel_size", "policy.sequence_packing.train_mb_tokens")
_TP = "policy.dtensor_cfg.tensor_parallel_size"
_ENGINE_SHARE = "policy.generation.vllm_cfg.gpu_memory_utilization"
_ENGINE_TP = "policy.generation.vllm_cfg.tensor_parallel_size"
_KEYS: dict[str, tuple[str, ...]] = {
    "master weights": _STATE,
    "frozen weights": (*_STATE, _TP),
    "adapters": ("policy.dtensor_cfg.lora_cfg.dim",),
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
    "teacher workspace": ("teacher.sequence_packing.logprob_mb_tokens", *_TOKENS),
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

    The table is for the point in time at which the phase uses the most device memory. The line "reserve" is the
    estimate of ``distill.memory.reserve`` for memory outside the trainer's tensors.
    """
    trainer: dict[str, Lines]
    """Maps each phase to the memory table at the peak of the trainer's tensors, without engine and reserve."""
    host: Lines
    """Maps each purpose of host memory to bytes per rank; empty without a GPU."""
    window_cache: int
    """Bytes per rank of the key-value cache for one sequence of the maximum length.

    vLLM refuses to start with a smaller cache.
    """
    engine_share: float | None = None
    """Fraction of the GPU's memory that vLLM takes, if the memory of the GPU is unknown; else None.

    The phases then contain the engine's weights, but not its cache.
    """
    resident: int = 0
    """Resident memory of this process before any model is loaded, in bytes; 0 on GPUs."""

    def total(self, phase: str) -> int:
        """Return the predicted peak device memory of ``phase`` in bytes per rank."""
        return sum(self.phases[phase].values())

    def tensors(self, phase: str) -> int:
        """Return the predicted peak of ``phase`` in bytes per rank without the reserve."""
        return self.total(phase) - self.phases[phase].get("reserve", 0)

    def metrics(self) -> dict[str, float]:
        """Return the metrics ``memory/predicted_PHASE_gib``: the predicted peaks without the reserve, in GiB per rank.

        They can be compared with the measured ``memory/PHASE_gib``: torch does not count memory outside of tensors.
        """
        return {f"memory/predicted_{phase}_gib": self.tensors(phase) / GIB for phase in self.phases}

    def fits(self, card: int) -> bool:
        """Return whether each phase, and vLLM's cache for one sequence, fit a GPU with ``card`` bytes of memory."""
        is_cached = self.phases["generation"]["engine cache"] >= self.window_cache
        return is_cached and max(map(self.total, self.phases)) <= card

    def table(self) -> str:
        """Return the forecast as a text table with one line per phase.

        Each line has the predicted peak in GiB per rank, followed by the sizes of the five largest purposes of
        memory, such as gradients. Pinned host memory has its own line. If the memory of the GPU is unknown, the memory
        of an awake vLLM engine is a percentage of the GPU.
        """
        rows = ["predicted peak memory per rank in GiB", *(f"  {line}" for line in self.about)]
        for phase, lines in [*self.phases.items(), *([("host", self.host)] if self.host else [])]:
            largest = sorted(lines.items(), key=lambda line: -line[1])
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest[:5] if size >= 0.05 * GIB)
            total = sum(lines.values()) / GIB
            if self.engine_share is not None and "engine weights" in lines:
                engine = lines["engine weights"] / GIB
                rows.append(
                    f"  {phase:10}{total - engine:6.1f} + {self.engine_share:.0%} of the GPU for vLLM (engine weights"
                    f" {engine:.1f} and its cache); {parts}"
                )
            else:
                rows.append(f"  {phase:10}{total:6.1f}  {parts}".rstrip())
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
        cache = self.phases["generation"]["engine cache"]
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
    return value == "true" and getattr(config.policy.dtensor_cfg, key) in (True, "auto")


def card_bytes(gigabytes: float) -> int:
    """Return the usable memory in bytes of a GPU sold with ``gigabytes`` GB."""
    return int(gigabytes * GIB * CARD_SHARE)


def known_shapes(config: Config) -> tuple[ModelShape | None, ModelShape | None]:
    """Return the shapes of student and teacher if they are known without a download, else None.

    The shapes are read from local files, or taken from a built-in table. Raises UserError if the student does not
    support the tensor-parallel size, or if a pattern of the adapters matches no layer.
    """
    ours = find_config(config.policy.model_name, "policy.model_name")
    student = None if ours is None else shape_of(ours, config.policy.model_name)
    if student is not None:
        check_tensor_parallel(config, ours, student.vocab)
        check_adapters(config, ours)
    return student, find_shape(config.teacher.model_name, "teacher.model_name")


def plan_memory(
    config: Config,
    student: ModelShape | None,
    teacher: ModelShape | None,
    device: torch.device,
    report: Callable[[str], None] = lambda table: None,
    card: int | None = None,
) -> Forecast | None:
    """Check the recipe against both models, and return the memory forecast; None if a shape is unknown (None).

    ``report`` receives the text of the forecast before the check, so that it is printed even if the forecast exceeds
    the memory of the GPU. ``device`` is the device of this rank; a dry run may plan a GPU on a machine without one.
    ``card``: memory of the GPU in bytes, used if ``cluster.gpu_memory_gb`` is null; None: unknown. Raises UserError if
    a model does not support the sequence lengths or the parallel sizes of the recipe, or if ``cluster.gpu_memory_gb``
    is too small.
    """
    check_shapes(config, student, teacher)
    if student is None or teacher is None:
        unknown = config.policy.model_name if student is None else config.teacher.model_name
        report(f"no memory forecast, because the model {unknown} is neither on this machine nor in the built-in table")
        return None
    cuda = device.type == "cuda"
    forecast = predict(config, student, teacher, cuda, card)
    if not cuda:
        forecast = replace(forecast, resident=resident_bytes() or 0)
    report(forecast.table())
    if cuda and card is None and config.cluster.gpu_memory_gb is None:
        report(_fitting_gpus(config, student, teacher))
    if cuda:
        forecast.check(config)
    return forecast


def _fitting_gpus(config: Config, student: ModelShape, teacher: ModelShape) -> str:
    """Return a sentence about the memory of GPUs on which the recipe fits, for an unknown GPU."""
    fits = (size for size in _CARDS_GB if _fits(config, size, student, teacher))
    smallest = next(fits, None)
    found = "no GPU" if smallest is None else f"GPUs with at least {smallest} GB"
    return (
        "cluster.gpu_memory_gb is null, so the memory of the GPUs is unknown: according to the forecast, the run fits"
        f" on {found} (checked: {', '.join(map(str, _CARDS_GB))} GB)"
    )


def _fits(config: Config, gigabytes: int, student: ModelShape, teacher: ModelShape) -> bool:
    sized = replace(config, cluster=replace(config.cluster, gpu_memory_gb=float(gigabytes)))
    try:
        predict(sized, student, teacher).check(sized)
    except UserError:
        return False
    return True


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
    tables = dict(
        zip(
            PHASES,
            (memory.sync_phase(), memory.generation_phase(), memory.teacher_phase(), memory.training_phase()),
            strict=True,
        )
    )
    trainer = {phase: max(map(_without_engine, found), key=_sum) for phase, found in tables.items()}
    if not cuda:
        phases = {phase: max(found, key=_sum) for phase, found in tables.items()}
        return Forecast(memory.about, phases, trainer, {}, memory.window_cache())
    phases = {phase: max((_with_reserve(config, t) for t in found), key=_sum) for phase, found in tables.items()}
    generation = config.policy.generation
    share = generation.vllm_cfg.gpu_memory_utilization if card is None and generation.backend == "vllm" else None
    return Forecast(memory.about, phases, trainer, memory.host(), memory.window_cache(), share)


def _sum(lines: Lines) -> int:
    return sum(lines.values())


def _without_engine(lines: Lines) -> Lines:
    return {purpose: size for purpose, size in lines.items() if purpose not in ENGINE}


def _with_reserve(config: Config, lines: Lines) -> Lines:
    asleep = not any(purpose in lines for purpose in ENGINE)
    parts = reserve(config, _sum(_without_engine(lines)), asleep)
    return lines | {"reserve": sum(parts.values())}


def compare(forecast: Forecast, measured: Mapping[str, int], pool_bytes: int, world: World) -> None:
    """Log the measured peak memory of each phase, followed by its forecast in parentheses; collective.

    The logged measurement is the maximum over ranks in GiB. Call this function after the second step of the process,
    because the first step allocates the optimizer state. ``measured`` maps a phase name of ``distill.metrics.phases``
    to this rank's peak in bytes. ``pool_bytes``: size of the generation engine's memory pool. The pool is free in the
    teacher and training phases, but torch still counts it as allocated, so it is subtracted from their peaks. The
    forecast is without the reserve, because torch does not count the memory outside of tensors. Without a GPU, only the
    largest phase is compared: freed memory stays resident, so each phase has the peak of all earlier ones.
    """
    if world.device.type != "cuda":
        _compare_resident(forecast, measured, world)
        return
    sleeping = {"teacher", "training"}
    own = {
        phase: (measured[phase] - (pool_bytes if phase in sleeping else 0)) / GIB
        for phase in PHASES
        if phase in measured
    }
    everyone = world.gather(own)
    largest = {phase: max(rank[phase] for rank in everyone) for phase in own}
    numbers = (f"{phase} {value:.1f} ({forecast.tensors(phase) / GIB:.1f})" for phase, value in largest.items())
    if world.is_main:
        log.info(
            "peak memory allocated by torch in each phase of the second step after the start, in GiB (maximum over all"
            " ranks; forecast in parentheses): %s",
            ", ".join(numbers),
        )


def _compare_resident(forecast: Forecast, measured: Mapping[str, int], world: World) -> None:
    own = max((measured[phase] for phase in PHASES if phase in measured), default=0)
    largest, before = max(world.gather((own, forecast.resident)))
    phase = max(forecast.phases, key=forecast.total)
    if world.is_main and largest:
        log.info(
            "resident memory of the process in the second step after the start: %.1f GiB (maximum over all ranks); it"
            " had %.1f GiB before models were loaded, and the forecast of the largest phase (%s) is %.1f GiB without"
            " libraries and fragmentation",
            *(largest / GIB, before / GIB, phase, forecast.total(phase) / GIB),
        )
