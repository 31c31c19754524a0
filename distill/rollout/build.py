"""Which engine a recipe asks for."""

from __future__ import annotations

import torch

from distill.config import Config
from distill.model.load import ModelFiles, model_config
from distill.model.student import DTYPES
from distill.rollout.engine import Engine
from distill.rollout.transformers_engine import TransformersEngine
from distill.runtime.world import World
from distill.types import Sampling, UserError


def check_backend(config: Config) -> None:
    """Refuse a generation backend that isn't there, before anything is loaded."""
    if config.policy.generation.backend == "vllm":
        raise UserError(
            "policy.generation.backend=vllm is not available in this version: set it to transformers"
            " (policy.generation.backend=transformers)"
        )


def build_engine(config: Config, files: ModelFiles, world: World, valid_vocab: int) -> Engine:
    """The engine of this rank, asleep; it has no weights until the first sync. Every rank calls it."""
    return TransformersEngine(
        model_config(files, "policy.model_name"),
        DTYPES[config.policy.precision],
        torch.device(world.device),
        config.policy.generation_batch_size,
        valid_vocab,
        replica=world.rank,
        replicas=world.size,
    )


def sampling_of(config: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How training answers are drawn."""
    generation = config.policy.generation
    return Sampling(
        temperature=generation.temperature,
        max_new_tokens=generation.max_new_tokens,
        stop_token_ids=stop_token_ids,
        answers_per_prompt=config.distillation.num_generations_per_prompt,
        top_p=generation.top_p,
        top_k=generation.top_k or 0,
        seed=config.distillation.seed,
        max_total_length=config.policy.max_total_sequence_length,
    )
