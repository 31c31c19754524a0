"""Keys of the system whose recipes this program reads that don't exist here.

Most have no meaning without Ray, servers or Megatron: they are dropped, and named in one warning. Some would change
what a run computes: those are refused unless they have the value that changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config.parse import refuse
from distill.errors import show

log = logging.getLogger(__name__)

MEANINGLESS = {
    "*": "megatron_cfg offload_optimizer_for_logprob",
    "*.dtensor_cfg": """_v2 env_vars lora_cfg automodel_kwargs clear_cache_every_n_steps model_save_format
        save_consolidated single_rank_consolidation consolidation_timeout_minutes""",
    "*.dynamic_batching": "sequence_length_round",
    "*.sequence_packing": "sequence_length_round algorithm microbatch_order",
    "policy.generation": "port_range_low port_range_high refit_transport mcore_generation_config _pad_token_id",
    "policy.generation.colocated": "resources",
    "policy.generation.vllm_cfg": """load_format skip_tokenizer_init refit_with_reload_api use_deep_gemm
        num_first_layers_in_bf16 num_last_layers_in_bf16 distributed_executor_backend expose_http_server
        enable_vllm_metrics_logger vllm_metrics_logger_interval""",
    # The teacher there is a copy of the student's section; here it neither trains nor generates.
    "teacher": """train_global_batch_size train_micro_batch_size generation_batch_size max_grad_norm optimizer scheduler
        generation make_sequence_length_divisible_by""",
    "data": "num_workers",
    "data.*": "processor download_dir split_validation_size",
    "env.*": "num_workers",
    "checkpointing": "is_async pretrained_checkpoint is_peft ft_save_period ft_keep_latest_k",
    "logger": """monitor_gpus gpu_monitoring mlflow_enabled mlflow swanlab_enabled swanlab tensorboard
        wandb.log_nemo_gym_full_result_tables""",
    "cluster": "master_port_range_low master_port_range_high segment_size",
}
"""Section -> its keys; a section among them goes with all it holds. * stands for any path."""

NO_CHANGE: dict[str, tuple[tuple[Any, ...], str]] = {
    "*.megatron_cfg.enabled": ((False,), "Megatron isn't supported, so set it to false; dtensor_cfg (FSDP2) trains"),
    "*.dtensor_cfg.lora_cfg.enabled": ((False,), "LoRA isn't supported, so set it to false to train every parameter"),
    "data.*.split_validation_size": ((0,), "put the held-out problems into a file and name it in data.validation"),
    "checkpointing.pretrained_checkpoint": ((), "name the folder of the weights in policy.model_name instead"),
    "checkpointing.is_peft": ((False,), "adapters aren't supported, so set it to false"),
    "checkpointing.ft_save_period": ((), "use checkpointing.save_period"),
    "checkpointing.ft_keep_latest_k": ((), "use checkpointing.keep_top_k"),
}
"""Pattern -> the values besides null that change nothing, and the remedy for any other."""


def drop_old_keys(config: DictConfig) -> tuple[str, ...]:
    """Take them out of ``config``, warn of them once, and return their paths."""
    _refuse_other_teacher_temperature(config)
    _own_chat_template(config)
    dropped = []
    for path in list(_paths(OmegaConf.to_container(config, resolve=False))):
        for pattern, (harmless, remedy) in NO_CHANGE.items():
            if fnmatchcase(path, pattern) and (value := OmegaConf.select(config, path)) not in (None, *harmless):
                refuse(f"{path}={show(value)} would change the meaning of the run: {remedy}")
        if any(
            fnmatchcase(path, f"{section}.{name}") for section, names in MEANINGLESS.items() for name in names.split()
        ):
            dropped.append(path)
    dropped = [path for path in dropped if not any(path.startswith(other + ".") for other in dropped)]
    for path in dropped:
        parent, _, name = path.rpartition(".")
        del OmegaConf.select(config, parent)[name]
    if dropped:
        log.warning("these keys have no meaning here and are ignored: %s", ", ".join(dropped))
    return tuple(dropped)


def _refuse_other_teacher_temperature(config: DictConfig) -> None:
    """There, the teacher's logits were divided by the teacher's own temperature; here both models have one."""
    teacher = OmegaConf.select(config, "teacher.generation.temperature")
    student = OmegaConf.select(config, "policy.generation.temperature")
    if teacher is not None and teacher != student:
        refuse(
            f"teacher.generation.temperature={teacher} differs from policy.generation.temperature={student}, but both "
            "models' logits are divided by one temperature: leave it out, and set loss_fn.temperature if need be"
        )


def _own_chat_template(config: DictConfig) -> None:
    """The reference system writes ``default`` for the tokenizer's own chat template; here that is null."""
    for key in ("policy.tokenizer.chat_template", "teacher.tokenizer.chat_template"):
        if OmegaConf.select(config, key) == "default":
            OmegaConf.update(config, key, None)


def _paths(tree: Any, prefix: str = "") -> Iterator[str]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in entries:
        yield f"{prefix}{name}"
        yield from _paths(value, f"{prefix}{name}.")
