"""Check a complete Config: ranges of values, and rules between keys.

Rules that depend on model files, data or the started ranks are checked by other packages.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any

from distill.config.alarm_rules import check_alarms
from distill.config.context_rules import check_context
from distill.config.divergence_rules import check_divergence
from distill.config.forecast_rules import check_time_forecast
from distill.config.loop_rules import check_loop
from distill.config.lora_rules import check_lora, starts_as_teacher, teacher_shares_base
from distill.config.response_limits import largest_max_new_tokens
from distill.config.schedule_rules import check_scheduler
from distill.config.schema import Config, DatasetConfig
from distill.config.token_weight_rules import check_token_weights
from distill.errors import UserError, any_of, show

AT_LEAST: dict[int, str] = {
    1: """distillation.num_prompts_per_step distillation.num_generations_per_prompt distillation.max_num_steps
        distillation.max_num_epochs distillation.max_val_samples distillation.val_num_generations
        policy.train_global_batch_size policy.train_micro_batch_size policy.generation_batch_size
        policy.logprob_batch_size policy.max_total_sequence_length policy.logprob_chunk_size
        policy.dtensor_cfg.tensor_parallel_size policy.dtensor_cfg.context_parallel_size
        policy.dtensor_cfg.replicate_size policy.dtensor_cfg.lora_cfg.dim
        policy.dynamic_batching.train_mb_tokens
        policy.dynamic_batching.logprob_mb_tokens policy.sequence_packing.train_mb_tokens
        policy.sequence_packing.logprob_mb_tokens policy.generation.max_new_tokens
        policy.generation.val_max_new_tokens policy.generation.top_k policy.generation.val_top_k
        policy.generation.vllm_cfg.tensor_parallel_size
        policy.generation.vllm_cfg.max_model_len teacher.max_total_sequence_length teacher.logprob_batch_size
        teacher.logprob_chunk_size teacher.dtensor_cfg.tensor_parallel_size teacher.dtensor_cfg.context_parallel_size
        teacher.dynamic_batching.logprob_mb_tokens teacher.sequence_packing.logprob_mb_tokens data.max_input_seq_length
        checkpointing.keep_top_k checkpointing.save_period cluster.num_nodes cluster.gpus_per_node
        logger.train_samples_period
        runtime.sync_bucket_mib runtime.logits_chunk_rows runtime.phase_timeout_s""",
    0: """distillation.val_period distillation.probe_period distillation.seed distillation.topk_logits_k
        loss_fn.mixed_kl_weight
        policy.optimizer.kwargs.lr policy.optimizer.kwargs.weight_decay logger.num_val_samples_to_print
        logger.num_train_samples_to_print logger.top_tokens_per_sample""",
}
"""Maps a minimum to the configuration keys with this minimum, separated by spaces."""
ABOVE_ZERO = """loss_fn.temperature loss_fn.token_kl_cap loss_fn.importance_ratio_cap loss_fn.entry_clip
    policy.dtensor_cfg.lora_cfg.alpha policy.max_grad_norm policy.optimizer.kwargs.eps
    policy.generation.temperature policy.generation.top_p
    policy.generation.val_top_p policy.generation.vllm_cfg.gpu_memory_utilization cluster.gpu_memory_gb"""
AT_MOST_1 = """loss_fn.mixed_kl_weight policy.generation.top_p policy.generation.val_top_p
    policy.generation.vllm_cfg.gpu_memory_utilization"""
_OPTIONAL_TEXTS = "input_key tools_key output_key output_pattern subset split prompt_file system_prompt_file"
"""Keys of a dataset whose value is null or a text that is not empty."""


def check(config: Config) -> None:
    """Raise UserError for the first rule that ``config`` breaks."""
    for rule in (
        _check_ranges,
        _check_batches,
        _check_optimizer,
        _check_windows,
        _check_groups,
        check_lora,
        check_scheduler,
        _check_loss,
        check_token_weights,
        check_context,
        check_loop,
        _check_teacher_window,
        _check_data,
        _check_checkpointing,
        _check_degenerate,
        check_alarms,
        check_time_forecast,
    ):
        rule(config)


def _check_ranges(config: Config) -> None:
    def require(keys: str, holds: Any, fix: str, fault: str = "is out of range") -> None:
        for key in keys.split():
            if (value := attrgetter(key)(config)) not in (None, "auto") and not holds(value):
                raise UserError(f"{key}={show(value)} {fault}", fix, key=key, value=value)

    for least, keys in AT_LEAST.items():
        require(keys, lambda value, least=least: value >= least, f"set it to at least {least}")
    require(ABOVE_ZERO, lambda value: value > 0, "set it above 0")
    require(AT_MOST_1, lambda value: value <= 1, "set it to at most 1")
    betas = "set both numbers to at least 0 and below 1"
    require("policy.optimizer.kwargs.betas", lambda betas: all(0 <= beta < 1 for beta in betas), betas)
    require("policy.generation.val_temperature", lambda value: value >= 0, "set it to at least 0")
    require("policy.model_name teacher.model_name", bool, "set it to a hub name or a folder", "is not allowed")
    folders = "runtime.run_dir logger.log_dir checkpointing.checkpoint_dir checkpointing.resume_from"
    fix = "set it to the name of a folder"
    require(folders, lambda path: path and "\0" not in path, fix, "is not allowed")


def _check_batches(config: Config) -> None:
    loop, batch = config.distillation, config.policy.train_global_batch_size
    responses = loop.num_prompts_per_step * loop.num_generations_per_prompt
    if responses % batch:
        raise UserError(
            f"policy.train_global_batch_size={batch} does not divide the {responses} responses of a step "
            f"(distillation.num_prompts_per_step={loop.num_prompts_per_step} * "
            f"distillation.num_generations_per_prompt={loop.num_generations_per_prompt})",
            f"set it to a divisor of {responses}",
            key="policy.train_global_batch_size",
            value=batch,
        )
    for name, model in (("policy", config.policy), ("teacher", config.teacher)):
        if model.dynamic_batching.enabled and model.sequence_packing.enabled:
            raise UserError(
                f"{name}.dynamic_batching.enabled=true and {name}.sequence_packing.enabled=true cannot be combined",
                "set one of them to false",
                key=f"{name}.dynamic_batching.enabled",
                value=True,
            )


def _check_optimizer(config: Config) -> None:
    if (kwargs := config.policy.optimizer.kwargs).fused and kwargs.foreach:
        raise UserError(
            "policy.optimizer.kwargs.fused=true and policy.optimizer.kwargs.foreach=true cannot be combined",
            "set one of them to null",
            key="policy.optimizer.kwargs.fused",
            value=True,
        )


def _check_windows(config: Config) -> None:
    window, generation = (config.policy.max_total_sequence_length, config.policy.generation)
    student_window = f"policy.max_total_sequence_length={window}"
    if generation.max_new_tokens > window:
        raise UserError(
            f"policy.generation.max_new_tokens={generation.max_new_tokens} exceeds {student_window}",
            f"set it to at most {window}",
            key="policy.generation.max_new_tokens",
            value=generation.max_new_tokens,
        )
    if generation.engine_window is not None and generation.engine_window < window:
        raise UserError(
            f"policy.generation.vllm_cfg.max_model_len={generation.engine_window} is below {student_window}, so the "
            "longest sequences do not fit into the engine",
            f"set policy.generation.vllm_cfg.max_model_len to at least {window}",
            key="policy.generation.vllm_cfg.max_model_len",
            value=generation.engine_window,
        )
    if generation.engine_precision not in (None, config.policy.precision):
        raise UserError(
            f"policy.generation.vllm_cfg.precision={generation.engine_precision} differs from "
            f"policy.precision={config.policy.precision}",
            "remove policy.generation.vllm_cfg.precision, so that the engine uses the student's precision",
            key="policy.generation.vllm_cfg.precision",
            value=generation.engine_precision,
        )
    if generation.backend != "vllm" and generation.vllm_cfg.speculative is not None:
        raise UserError(
            f"policy.generation.vllm_cfg.speculative={generation.vllm_cfg.speculative} requires"
            f" policy.generation.backend=vllm, not {generation.backend}",
            "set policy.generation.vllm_cfg.speculative=null, or policy.generation.backend=vllm",
            key="policy.generation.vllm_cfg.speculative",
            value=generation.vllm_cfg.speculative,
        )
    teacher = config.teacher.max_total_sequence_length
    loop = config.distillation
    if teacher < window and (loop.control or not loop.context_distillation.enabled):
        raise UserError(
            f"teacher.max_total_sequence_length={teacher} is below {student_window}, but the teacher reads the "
            "student's sequences",
            f"set it to at least {window}",
            key="teacher.max_total_sequence_length",
            value=teacher,
        )


def _check_teacher_window(config: Config) -> None:
    """Raise UserError if the longest responses do not fit into the teacher's window."""
    window, longest = config.teacher.max_total_sequence_length, largest_max_new_tokens(config)
    if window < longest:
        schedule = config.distillation.max_new_tokens_schedule
        source = " and distillation.max_new_tokens_schedule" if schedule else ""
        raise UserError(
            f"teacher.max_total_sequence_length={window} is below {longest}, the largest number of new tokens of the"
            f" run (policy.generation.max_new_tokens{source}), so the longest responses do not fit",
            f"set it to at least {longest} plus the length of the teacher's prompt",
            key="teacher.max_total_sequence_length",
            value=window,
        )


def _check_groups(config: Config) -> None:
    ranks, node = (config.cluster.num_nodes * config.cluster.gpus_per_node, config.cluster.gpus_per_node)
    cluster = f"(cluster.num_nodes={config.cluster.num_nodes} * cluster.gpus_per_node={node})"
    policy = config.policy.dtensor_cfg
    teacher = policy if teacher_shares_base(config) else config.teacher.dtensor_cfg
    for name, parallel in (("policy", policy), ("teacher", teacher)):
        if ranks % parallel.group_size:
            raise UserError(
                f"{name}.dtensor_cfg.tensor_parallel_size={parallel.tensor_parallel_size} * context_parallel_size="
                f"{parallel.context_parallel_size} does not divide the {ranks} ranks {cluster}",
                f"choose sizes with the product {_divisors(ranks)}",
                key=f"{name}.dtensor_cfg.tensor_parallel_size",
                value=parallel.tensor_parallel_size,
            )
    groups = ranks // policy.group_size
    if groups % policy.replicate_size:
        raise UserError(
            f"policy.dtensor_cfg.replicate_size={policy.replicate_size} does not divide {groups}, the number of groups "
            f"of tensor_parallel_size={policy.tensor_parallel_size} * context_parallel_size="
            f"{policy.context_parallel_size} ranks {cluster}",
            f"set it to {_divisors(groups)}",
            key="policy.dtensor_cfg.replicate_size",
            value=policy.replicate_size,
        )
    _check_node("policy.dtensor_cfg.tensor_parallel_size", policy.tensor_parallel_size, node)
    if teacher.group_size > policy.group_size and teacher.group_size % policy.group_size:
        sizes = any_of(str(policy.group_size * size) for size in range(1, groups + 1) if groups % size == 0)
        raise UserError(
            f"teacher.dtensor_cfg.tensor_parallel_size={teacher.tensor_parallel_size} * context_parallel_size="
            f"{teacher.context_parallel_size} is not a multiple of policy.dtensor_cfg.tensor_parallel_size="
            f"{policy.tensor_parallel_size} * context_parallel_size={policy.context_parallel_size}",
            f"choose teacher sizes with the product {sizes}",
            key="teacher.dtensor_cfg.tensor_parallel_size",
            value=teacher.tensor_parallel_size,
        )
    _check_node("policy.generation.vllm_cfg.tensor_parallel_size", config.policy.generation.ranks_per_engine, node)


def _check_node(key: str, size: int, node: int) -> None:
    if node % size:
        raise UserError(
            f"{key}={size} does not divide the number of ranks per node (cluster.gpus_per_node={node})",
            f"set it to {_divisors(node)}",
            key=key,
            value=size,
        )


def _divisors(number: int) -> str:
    return any_of(str(size) for size in range(1, number + 1) if number % size == 0)


def _check_loss(config: Config) -> None:
    loss = config.loss_fn
    if loss.zero_outside_topk is not None and loss.outside_topk is not None:
        raise UserError(
            f"loss_fn.zero_outside_topk={show(loss.zero_outside_topk)} and loss_fn.outside_topk={loss.outside_topk} "
            "are set together, but have the same meaning",
            "set one of them to null",
            key="loss_fn.zero_outside_topk",
            value=loss.zero_outside_topk,
        )
    check_divergence(loss)
    if loss.kl_type == "sampled" and loss.temperature not in (None, config.policy.generation.temperature):
        raise UserError(
            f"loss_fn.temperature={loss.temperature} differs from policy.generation.temperature="
            f"{config.policy.generation.temperature}, but loss_fn.kl_type=sampled requires equal temperatures",
            "remove loss_fn.temperature",
            key="loss_fn.temperature",
            value=loss.temperature,
        )


def _check_data(config: Config) -> None:
    loop, data = config.distillation, config.data
    if not data.train:
        fix = "set data.train.dataset_name or data.train.data_path"
        raise UserError("data.train=null provides no training data", fix, key="data.train")
    validations = [name for name in ("val_period", "val_at_start", "val_at_end", "probe_period") if getattr(loop, name)]
    if not data.validation and validations:
        raise UserError(
            f"data.validation=null, but distillation.{validations[0]}={show(getattr(loop, validations[0]))} enables "
            "validation",
            "set data.validation.dataset_name or data.validation.data_path, or disable validation with "
            "distillation.val_period=0, distillation.val_at_start=false, distillation.val_at_end=false and "
            "distillation.probe_period=0",
            key="data.validation",
        )
    for name, entries in (("data.train", data.train), ("data.validation", data.validation)):
        for i, entry in enumerate(entries):
            _check_dataset(f"{name}.{i}" if len(entries) > 1 else name, entry)


def _check_dataset(key: str, entry: DatasetConfig) -> None:
    if (entry.dataset_name is None) == (entry.data_path is None):
        found = "both dataset_name and data_path" if entry.data_path else "neither dataset_name nor data_path"
        raise UserError(f"{key} has {found}", "set exactly one of them", key=key)
    if entry.repeat < 1:
        raise UserError(
            f"{key}.repeat={entry.repeat} is out of range", "set it to at least 1", f"{key}.repeat", entry.repeat
        )
    for name in _OPTIONAL_TEXTS.split():
        value = getattr(entry, name)
        text = value if name == "output_pattern" else value and value.strip()  # a pattern may be a space
        if text == "":
            raise UserError(f"{key}.{name} is an empty text", "set it to a text, or to null", f"{key}.{name}", value)
    graders = ("math", "exact", "regex", "choice", None)
    if entry.env_name not in graders:
        fix = f"set it to {any_of(map(show, graders))}"
        raise UserError(f"{key}.env_name={entry.env_name} is not a grader", fix, f"{key}.env_name", entry.env_name)


def _check_checkpointing(config: Config) -> None:
    metric, deadline = (config.checkpointing.metric_name, config.checkpointing.checkpoint_must_save_by)
    if metric is not None and not re.fullmatch(r"(train|val):.+", metric):
        raise UserError(
            f"checkpointing.metric_name={metric} is not a metric",
            "set it to train:NAME, val:NAME or null",
            key="checkpointing.metric_name",
            value=metric,
        )
    if deadline is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", deadline):
        raise UserError(
            f"checkpointing.checkpoint_must_save_by={deadline} is not DD:HH:MM:SS",
            "set it to a duration such as 00:03:45:00, or to null",
            key="checkpointing.checkpoint_must_save_by",
            value=deadline,
        )
    resume_from = config.checkpointing.resume_from
    source = None if resume_from in ("latest", "never") else resume_from
    for name, needed, without in (("resume_from", source, "never"), ("checkpoint_must_save_by", deadline, "null")):
        if needed is not None and not config.checkpointing.enabled:
            raise UserError(
                f"checkpointing.{name}={needed} requires checkpointing.enabled=true",
                f"set checkpointing.enabled=true, or checkpointing.{name}={without}",
                key=f"checkpointing.{name}",
                value=needed,
            )


def _check_degenerate(config: Config) -> None:
    """Raise UserError if the settings are suitable only for control experiments.

    These settings are a teacher that is the student's model and reads the same prompts, and sampling that is truncated
    by top_p or top_k. The check is skipped if distillation.allow_degenerate is true.
    """
    loop, generation = config.distillation, config.policy.generation
    if loop.allow_degenerate:
        return
    if starts_as_teacher(config) and not loop.context_distillation.enabled:
        raise UserError(
            f"teacher.model_name={config.teacher.model_name} is the student's model and reads the same prompts, so "
            "the student cannot learn from it",
            "choose another teacher, set distillation.context_distillation.enabled=true, or set "
            "distillation.allow_degenerate=true for a control experiment",
            key="teacher.model_name",
            value=config.teacher.model_name,
        )
    if generation.top_p < 1 or generation.top_k is not None:
        name, value = ("top_p", generation.top_p) if generation.top_p < 1 else ("top_k", generation.top_k)
        raise UserError(
            f"policy.generation.{name}={value} truncates the sampling distribution, but the loss "
            "assumes the complete distribution",
            "set top_p=1 and top_k=null, or distillation.allow_degenerate=true",
            key=f"policy.generation.{name}",
            value=value,
        )
