"""Compatibility with NeMo-RL recipes (YAML files): ignored keys, and keys with restricted values.

Some keys of NeMo-RL recipes have no effect in this project. They are ignored, and one warning lists them. A
value that is not supported raises UserError.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from distill.config.parse import parse_value, unknown_key
from distill.errors import UserError, show

IGNORED = {
    "*": "megatron_cfg offload_optimizer_for_logprob",
    "*.dtensor_cfg": """_v2 env_vars automodel_kwargs clear_cache_every_n_steps model_save_format
        save_consolidated single_rank_consolidation consolidation_timeout_minutes""",
    "*.dynamic_batching": "sequence_length_round",
    "*.sequence_packing": "sequence_length_round algorithm microbatch_order",
    "policy.generation": "port_range_low port_range_high refit_transport mcore_generation_config _pad_token_id",
    "policy.generation.colocated": "resources",
    "policy.generation.vllm_cfg": """load_format skip_tokenizer_init refit_with_reload_api use_deep_gemm
        num_first_layers_in_bf16 num_last_layers_in_bf16 distributed_executor_backend expose_http_server
        enable_vllm_metrics_logger vllm_metrics_logger_interval""",
    # NeMo-RL copies the student's section for the teacher; here the teacher neither trains nor generates.
    "teacher": """train_global_batch_size train_micro_batch_size generation_batch_size max_grad_norm optimizer scheduler
        generation make_sequence_length_divisible_by""",
    "teacher.dtensor_cfg": "lora_cfg",
    "data": "num_workers",
    "data.*": "processor download_dir split_validation_size seed",
    "env.*": "num_workers",
    "checkpointing": "is_async pretrained_checkpoint is_peft ft_save_period ft_keep_latest_k",
    "logger": """monitor_gpus gpu_monitoring mlflow_enabled mlflow swanlab_enabled swanlab tensorboard
        wandb.log_nemo_gym_full_result_tables""",
    "cluster": "master_port_range_low master_port_range_high segment_size",
}
"""Maps a section of the recipe to its ignored keys and subsections, separated by spaces.

``*`` in the name of a section matches any text.
"""

UNUSED: dict[str, Any] = {
    "distillation.val_batch_size": 64,
    "policy.make_sequence_length_divisible_by": 1,
    "policy.dtensor_cfg.sequence_parallel": False,
    "policy.dtensor_cfg.lora_cfg.dropout_position": "post",
    "policy.dtensor_cfg.lora_cfg.use_triton": True,
    "teacher.dtensor_cfg.sequence_parallel": False,
    "teacher.dtensor_cfg.activation_checkpointing": True,
    "teacher.dtensor_cfg.cpu_offload": False,
    "teacher.dtensor_cfg.replicate_size": 1,
    "teacher.dynamic_batching.train_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "teacher.sequence_packing.train_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
}
"""Maps an ignored key to its default value.

The keys need a value because recipes may refer to them in interpolations.
"""

ONE_VALUE: dict[str, tuple[Any, str]] = {
    "distillation.max_rollout_turns": (1, "set it to 1, because the student responds once to each prompt"),
    "distillation.context_distillation.frozen_teacher_source": ("base_model", "set it to base_model"),
    "distillation.context_distillation.problem_source": ("original_user_problem", "set it to original_user_problem"),
    "distillation.context_distillation.alignment": ("response_token_index", "set it to response_token_index"),
    "policy.dtensor_cfg.enabled": (True, "set it to true, because training requires FSDP2"),
    "teacher.dtensor_cfg.enabled": (True, "set it to true, because the teacher requires FSDP2"),
    "teacher.dtensor_cfg.custom_parallel_plan": (
        None,
        "set it to null, because only the student supports a custom plan",
    ),
    "policy.generation.colocated.enabled": (True, "set it to true, because generation and training use the same GPUs"),
    "policy.generation.stop_strings": (None, "set it to null and use policy.generation.stop_token_ids"),
    "policy.generation.vllm_cfg.async_engine": (False, "set it to false, because generation and training alternate"),
    "policy.generation.vllm_cfg.pipeline_parallel_size": (1, "set it to 1 and use tensor_parallel_size"),
    "policy.generation.vllm_cfg.expert_parallel_size": (
        1,
        "set it to 1, because mixture-of-experts models are not supported",
    ),
    "policy.generation.vllm_cfg.kv_cache_dtype": ("auto", "set it to auto (the compute dtype)"),
    "policy.generation.vllm_cfg.logprobs_mode": ("processed_logprobs", "set it to processed_logprobs"),
    "env.math.math_verify_impl": ("hf_math_verify", "set it to hf_math_verify (the math-verify library)"),
    "checkpointing.model_save_format": ("safetensors", "set it to safetensors"),
}
"""Maps a key to (its only allowed value, the fix in the error message for any other value)."""

ONLY_IGNORED = ("policy.generation.colocated", "env.math", "env")
"""Sections that are not in the schema because all their keys are ignored; inner sections come first."""

ALLOWED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "*.megatron_cfg.enabled": ((False,), "set it to false, because training requires FSDP2 (dtensor_cfg)"),
    "teacher.dtensor_cfg.lora_cfg.enabled": (
        (False,),
        "remove it, because only the student is trained (policy.dtensor_cfg.lora_cfg.enabled)",
    ),
    "policy.dtensor_cfg.lora_cfg.dropout_position": (("pre", "post"), "set it to pre or post, or remove it"),
    "data.*.split_validation_size": (
        (0,),
        "put the validation problems into a file and set data.validation.data_path to it",
    ),
    "checkpointing.pretrained_checkpoint": ((), "set policy.model_name to the folder of the weights"),
    "checkpointing.ft_save_period": ((), "use checkpointing.save_period"),
    "checkpointing.ft_keep_latest_k": ((), "use checkpointing.keep_top_k"),
}
"""Maps a key to (its allowed values, the fix in the error message for any other value).

null is always allowed. ``*`` in a key matches any text.
"""


def inert_defaults() -> dict[str, Any]:
    """Return a dict from each key in UNUSED and ONE_VALUE to its default value.

    The keys need a value because recipes may refer to them in interpolations.
    """
    return UNUSED | {key: value for key, (value, _) in ONE_VALUE.items()}


def drop_ignored_keys(config: DictConfig) -> list[str]:
    """Remove the keys in IGNORED from ``config`` in place, and return all keys without effect.

    ``config``: the merged recipes before their interpolations are resolved. Raises UserError for a value that
    ONE_VALUE or ALLOWED_VALUES does not allow.
    """
    _refuse_other_teacher_temperature(config)
    _refuse_peft_without_lora(config)
    _own_chat_template(config)
    _own_lora_init(config)
    values = dict(_flat(OmegaConf.to_container(config, resolve=False)))
    for key in values:
        _check_allowed(config, key)
    ignored = [key for key in values if any(fnmatchcase(key, pattern) for pattern in _ignored_patterns())]
    ignored = [key for key in ignored if not any(key.startswith(f"{section}.") for section in ignored)]
    for key in ignored:
        section, _, name = key.rpartition(".")
        del OmegaConf.select(config, section)[name]
    return ignored + [key for key, default in UNUSED.items() if values.get(key) not in (None, default)]


def drop_inert_keys(tree: dict[str, Any]) -> None:
    """Remove the keys in UNUSED and ONE_VALUE and the sections in ONLY_IGNORED from ``tree`` in place.

    ``tree``: the merged recipes with resolved interpolations. Raises UserError if a section in ONLY_IGNORED contains
    any other key.
    """
    for key in inert_defaults():
        section, name = _parent(tree, key)
        section.pop(name, None)
    for key in ONLY_IGNORED:
        section, name = _parent(tree, key)
        if name in section:
            for unknown in parse_value(dict[str, Any], section.pop(name), key):
                raise unknown_key(f"{key}.{unknown}")


def _parent(tree: Any, key: str) -> tuple[dict[str, Any], str]:
    """Return (section of ``tree`` that contains ``key``, last part of ``key``); {} for a missing section."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}, name


def _ignored_patterns() -> list[str]:
    return [f"{section}.{name}" for section, names in IGNORED.items() for name in names.split()]


def _check_allowed(config: DictConfig, key: str) -> None:
    if key in ONE_VALUE:
        only, fix = ONE_VALUE[key]
        value = OmegaConf.select(config, key)
        is_empty = key == "policy.generation.stop_strings" and value == []
        if not is_empty and (type(value) is not type(only) or value != only):
            _refuse_value(key, value, fix)
    for pattern, (allowed, fix) in ALLOWED_VALUES.items():
        if fnmatchcase(key, pattern) and (value := OmegaConf.select(config, key)) not in (None, *allowed):
            _refuse_value(key, value, fix)


def _refuse_value(key: str, value: Any, fix: str) -> NoReturn:
    raise UserError(f"{key}={show(value)} is not supported", fix, key=key, value=value)


def _refuse_other_teacher_temperature(config: DictConfig) -> None:
    """Raise UserError if teacher.generation.temperature is set and differs from the student's temperature.

    NeMo-RL divides the logits of each model by that model's temperature. Here both models have the same temperature.
    """
    teacher = OmegaConf.select(config, "teacher.generation.temperature")
    student = OmegaConf.select(config, "policy.generation.temperature")
    if teacher is not None and teacher != student:
        raise UserError(
            f"teacher.generation.temperature={teacher} differs from policy.generation.temperature={student}, but the "
            "loss divides the logits of both models by the same temperature",
            "remove teacher.generation.temperature, and set loss_fn.temperature to change the temperature of both"
            " models in the loss",
            key="teacher.generation.temperature",
            value=teacher,
        )


def _refuse_peft_without_lora(config: DictConfig) -> None:
    """Raise UserError if checkpointing.is_peft is set although the run trains all weights."""
    key, lora = "checkpointing.is_peft", "policy.dtensor_cfg.lora_cfg.enabled"
    if (value := OmegaConf.select(config, key)) and not OmegaConf.select(config, lora):
        _refuse_value(key, value, f"remove it, or set {lora}=true to train adapters")


def _own_chat_template(config: DictConfig) -> None:
    """Replace chat_template=default in ``config`` by null.

    In NeMo-RL recipes, "default" means the template in the tokenizer's files.
    """
    for key in ("policy.tokenizer.chat_template", "teacher.tokenizer.chat_template"):
        if OmegaConf.select(config, key) == "default":
            OmegaConf.update(config, key, None)


def _own_lora_init(config: DictConfig) -> None:
    """Replace lora_A_init=uniform, the name in NeMo-RL recipes, by kaiming in ``config``."""
    key = "policy.dtensor_cfg.lora_cfg.lora_A_init"
    if OmegaConf.select(config, key) == "uniform":
        OmegaConf.update(config, key, "kaiming")


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every section, list and scalar in ``tree``. Keys include list indices."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in entries:
        yield f"{prefix}{name}", value
        yield from _flat(value, f"{prefix}{name}.")
