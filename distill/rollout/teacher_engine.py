"""A second generation engine, which generates with the teacher's weights; only the probe needs it."""

from __future__ import annotations

from dataclasses import replace

from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.memory.shapes import ModelShape
from distill.model.hf_files import ModelFiles
from distill.model.teacher import ShardedTeacher
from distill.model.weights import GatheredWeights
from distill.rollout.engine import Engine
from distill.rollout.factory import build_engine

_ITEMSIZE = {"bfloat16": 2, "float32": 4}
_USABLE = 0.9
"""Share of a GPU's memory for the weights of the second engine and the student; the rest is for the cache."""


def build_teacher_engine(config: Config, files: ModelFiles, world: World, valid_vocab: int) -> Engine:
    """Build and return an engine for the teacher's model, asleep and without weights; collective.

    The student's engine must be asleep. On GPUs the engine is the transformers one, with a complete copy of the teacher
    on each rank, because vLLM's sleep mode allows only one engine per process.
    """
    policy, teacher = config.policy, config.teacher
    generation, window = policy.generation, teacher.max_total_sequence_length
    backend = "transformers" if world.device.type == "cuda" else generation.backend
    vllm_cfg = replace(generation.vllm_cfg, max_model_len=window)
    policy = replace(
        policy,
        model_name=teacher.model_name,
        precision=teacher.precision,
        max_total_sequence_length=window,
        generation=replace(generation, backend=backend, vllm_cfg=vllm_cfg),
    )
    return build_engine(replace(config, policy=policy), files, world, valid_vocab)


def check_teacher_fits(config: Config, shapes: tuple[ModelShape, ModelShape], world: World) -> None:
    """Raise UserError if a GPU cannot hold a complete teacher together with the student's shards; not collective.

    ``shapes``: sizes of the student and the teacher. Without a GPU nothing is checked.
    """
    if world.gpu_bytes is None:
        return
    student, teacher = shapes
    needed = teacher.parameters * _ITEMSIZE.get(config.teacher.precision, 4) + 4 * student.parameters / world.size
    if needed > _USABLE * world.gpu_bytes:
        raise UserError(
            f"teacher.model_name={config.teacher.model_name} needs {needed / 2**30:.0f} GiB on each GPU to generate,"
            f" with the student, and a GPU has {world.gpu_bytes / 2**30:.0f} GiB",
            "probe a smaller teacher, or use GPUs with more memory",
            key="teacher.model_name",
            value=config.teacher.model_name,
        )


def push_teacher(world: World, engine: Engine, teacher: ShardedTeacher, bucket_bytes: int, version: int) -> None:
    """Wake ``engine``, and load and verify the teacher's weights; afterwards it can generate; collective.

    Only a teacher with its own model needs such an engine: a candidate of a probe that is the student's model uses the
    student's engine. ``bucket_bytes``: size of the buckets in which the weights are gathered. ``version``: number of
    finished training steps, with which the responses are marked.
    """
    with world.all_or_none("waking the teacher's engine"):
        engine.wake("weights")
    teacher.onload()
    teacher.model.reshard_all()
    parameters = teacher.model.named_hf_parameters()
    engine.sync(GatheredWeights(parameters, teacher.dtype, bucket_bytes, world.replica_mesh), version)
    teacher.offload()
    with world.all_or_none("waking the cache of the teacher's engine"):
        engine.wake("kv")
