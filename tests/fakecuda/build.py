"""Build the ranks' connection, student, teacher and rollouts of a run on fake CUDA tensors, from a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401 (registers fake results of collectives)
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.config import Config, load_config
from distill.config.lora_rules import teacher_shares_base
from distill.distributed.world import World
from distill.memory.shapes import QWEN3, find_config
from distill.types import Problem, Prompt, Rollout
from tests.fakecuda.preload import ROOT

VALID_VOCAB = 151669
"""Number of token ids of Qwen3's tokenizer; the models have 151,936."""
STOP_TOKEN_IDS = (151645, 151643)


@dataclass(frozen=True)
class Case:
    """One run on fake CUDA tensors. None: the value of the recipe, or 1 for parallel sizes of the default recipe."""

    recipe: str = "recipes/distillation_math.yaml"
    student: str | None = None
    """Size of a Qwen3 model, such as "4b", or the folder of a model."""
    teacher: str | None = None
    layers: int = 0
    """Number of layers of both models; 0: all."""
    ranks: int | None = None
    tp: int | None = None
    cp: int | None = None
    teacher_ranks: int | None = None
    """Number of ranks that compute the teacher's micro-batches together."""
    replicas: int = 1
    rank: int = 0
    prompt: int = 300
    """Tokens of the student's prompt."""
    teacher_prefix: int = 0
    """Tokens that the teacher reads before the response; 0: the student's prompt."""
    responses: tuple[int, ...] = (2430, 2430, 2430)
    """Tokens of the responses of one micro-batch."""
    micro_batches: int = 2
    """Micro-batches of the student per rank and step."""
    steps: int = 2
    """The last step is counted; the first allocates the optimizer's moments."""
    overrides: tuple[str, ...] = ()
    """Settings key=value of the recipe."""


def model_name(size: str) -> str:
    """Return the name of the Qwen3 model of this size; other names are returned unchanged."""
    return f"Qwen/Qwen3-{size[:-1]}B" if size[-1] in "bB" and size[:-1] in QWEN3 else size


def load_case(case: Case) -> Config:
    """Return the configuration of a case."""
    default = 1 if case.recipe == Case.recipe else None
    values = {
        "policy.model_name": case.student and model_name(case.student),
        "teacher.model_name": case.teacher and model_name(case.teacher),
        "policy.dtensor_cfg.tensor_parallel_size": case.tp or default,
        "policy.dtensor_cfg.context_parallel_size": case.cp or default,
        "teacher.dtensor_cfg.tensor_parallel_size": case.teacher_ranks or default,
        "teacher.dtensor_cfg.context_parallel_size": 1 if case.teacher_ranks or default else None,
        "cluster.num_nodes": 1 if case.ranks else None,
        "cluster.gpus_per_node": case.ranks,
        "policy.dtensor_cfg.replicate_size": case.replicas if case.replicas > 1 else None,
        "policy.precision": "bfloat16",
        "runtime.device": "cuda",
        "distillation.allow_degenerate": "true",
        "logger.wandb_enabled": "false",
    }
    settings = [f"{key}={value}" for key, value in values.items() if value is not None]
    config = load_config(["--config", str(ROOT / case.recipe), *settings, *case.overrides])
    parallel = config.policy.dtensor_cfg
    dp = ranks_of(config) // (parallel.tensor_parallel_size * parallel.context_parallel_size)
    total = dp * case.micro_batches * len(case.responses)
    loop = replace(config.distillation, num_prompts_per_step=total, num_generations_per_prompt=1)
    return replace(config, distillation=loop, policy=replace(config.policy, train_global_batch_size=total))


def ranks_of(config: Config) -> int:
    """Return the number of ranks of a configuration."""
    return config.cluster.num_nodes * config.cluster.gpus_per_node


def hf_config(name: str, layers: int) -> Any:
    """Return the Hugging Face configuration of a model with ``layers`` layers; 0: all."""
    config = find_config(name, "model_name")
    assert config is not None, f"no model {name}"
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


class FakeWorld(World):
    """One of ``size`` ranks; collectives of the process group return at once, and all ranks have the same values."""

    def __init__(self, config: Config, rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self.size = ranks_of(config)
        dist.init_process_group("fake", rank=rank, world_size=self.size, store=FakeStore())
        self.rank, self.local_rank, self.local_size = rank, 0, config.cluster.gpus_per_node
        self._control = dist.group.WORLD
        self.supervisor = SimpleNamespace()  # type: ignore[assignment]
        parallel = config.policy.dtensor_cfg
        self.build_mesh(
            "cuda",
            parallel.tensor_parallel_size,
            parallel.context_parallel_size,
            parallel.replicate_size,
            None if teacher_shares_base(config) else config.teacher.dtensor_cfg.group_size,
        )
        names = ("replica_mesh", "shard_mesh", "tp_mesh", "cp_group", "teacher_group", "layout")
        self._built = {name: getattr(self, name) for name in names}

    def __getattribute__(self, name: str) -> Any:
        # Meshes are built before fake tensors are used: they compute with real tensors.
        built = object.__getattribute__(self, "__dict__").get("_built", {})
        return built[name] if name in built else object.__getattribute__(self, name)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None: ...

    @contextlib.contextmanager
    def all_or_none(self, action: str) -> Iterator[None]:
        yield


def build_models(config: Config, world: World, configs: dict[str, Any]) -> tuple[Any, Any]:
    """Return student and teacher with uninitialized weights; ``configs``: Hugging Face configurations by name."""
    import distill.model.sharded as sharded
    from distill.model.following_teacher import build_teacher
    from distill.model.hf_files import ModelFiles
    from distill.model.student import Student

    replaced = {"model_config": lambda files, key: configs[files.name], "load_weights": lambda *_: None}
    for name, function in replaced.items():
        setattr(sharded, name, function)
    student_files, teacher_files = (
        ModelFiles(name, Path("/nowhere"), {}) for name in (config.policy.model_name, config.teacher.model_name)
    )
    student = Student(config, student_files, world, VALID_VOCAB, STOP_TOKEN_IDS)
    return student, build_teacher(config, teacher_files, world, VALID_VOCAB, student)


def rollouts_of(case: Case, total: int, version: int) -> list[Rollout]:
    """Return ``total`` rollouts with different prompts and the lengths of ``case.responses``."""
    rollouts = []
    for i in range(total):
        length = case.responses[i % len(case.responses)]
        first = (1 + i,)
        prompt = Prompt(i, first + (7,) * (case.prompt - 1), Problem("x"))
        prefix = first + (7,) * (case.teacher_prefix - 1) if case.teacher_prefix else ()
        rollouts.append(Rollout(prompt, 0, (5,) * length, (-1.0,) * length, "length", version, prefix))
    return rollouts
