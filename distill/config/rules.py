"""Rules that need more than one value's type, checked once at the end; what they refuse they say how to mend.

What needs the models' files, the data or the world of ranks is checked where those are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from distill.config.parse import refuse
from distill.config.schema import Config, DatasetConfig, LossConfig
from distill.config.template import teacher_template
from distill.errors import any_of, show

AT_LEAST: dict[int, str] = {
    1: """distillation.num_prompts_per_step distillation.num_generations_per_prompt distillation.max_num_steps
        distillation.max_num_epochs distillation.val_batch_size distillation.max_val_samples
        distillation.val_num_generations
        policy.train_global_batch_size policy.train_micro_batch_size policy.generation_batch_size
        policy.logprob_batch_size policy.max_total_sequence_length policy.logprob_chunk_size
        policy.dtensor_cfg.tensor_parallel_size
        policy.dtensor_cfg.context_parallel_size policy.dtensor_cfg.replicate_size
        policy.dynamic_batching.train_mb_tokens policy.dynamic_batching.logprob_mb_tokens
        policy.sequence_packing.train_mb_tokens
        policy.sequence_packing.logprob_mb_tokens policy.generation.max_new_tokens policy.generation.top_k
        policy.generation.val_top_k policy.generation.vllm_cfg.tensor_parallel_size
        policy.generation.vllm_cfg.max_model_len teacher.max_total_sequence_length teacher.logprob_batch_size
        teacher.logprob_chunk_size teacher.dtensor_cfg.tensor_parallel_size teacher.dtensor_cfg.context_parallel_size
        teacher.dynamic_batching.logprob_mb_tokens teacher.sequence_packing.logprob_mb_tokens
        data.max_input_seq_length checkpointing.keep_top_k checkpointing.save_period
        cluster.num_nodes cluster.gpus_per_node runtime.sync_bucket_mib runtime.logits_chunk_rows
        runtime.phase_timeout_s policy.make_sequence_length_divisible_by""",
    0: """distillation.val_period distillation.seed distillation.topk_logits_k loss_fn.mixed_kl_weight
        policy.optimizer.kwargs.lr policy.optimizer.kwargs.weight_decay logger.num_val_samples_to_print""",
}
ABOVE_ZERO = """loss_fn.temperature loss_fn.token_kl_cap loss_fn.importance_ratio_cap policy.max_grad_norm
    policy.optimizer.kwargs.eps policy.generation.temperature policy.generation.top_p policy.generation.val_top_p
    policy.generation.vllm_cfg.gpu_memory_utilization cluster.gpu_memory_gb"""
AT_MOST_1 = """loss_fn.mixed_kl_weight policy.generation.top_p policy.generation.val_top_p
    policy.generation.vllm_cfg.gpu_memory_utilization"""

FIXED: dict[str, tuple[Any, str]] = {
    "distillation.max_rollout_turns": (1, "the student answers once, so set it to 1"),
    "policy.dtensor_cfg.enabled": (True, "FSDP2 is the only way to train here, so set it to true"),
    "teacher.dtensor_cfg.enabled": (True, "FSDP2 is the only way to spread a model here, so set it to true"),
    "teacher.dtensor_cfg.custom_parallel_plan": (None, "the teacher's layers are gathered whole, so set it to null"),
    "policy.generation.colocated.enabled": (True, "generation shares the GPUs that train, so set it to true"),
    "policy.generation.vllm_cfg.async_engine": (False, "the engine is driven in step with training: set it to false"),
    "policy.generation.vllm_cfg.pipeline_parallel_size": (1, "set it to 1 and use tensor_parallel_size"),
    "policy.generation.vllm_cfg.expert_parallel_size": (1, "mixtures of experts aren't supported, so set it to 1"),
}
"""Keys with one value that is possible here, and the remedy for any other."""

Rule = tuple[Callable[[Any], bool], str]
_SHARE: Rule = lambda value: 0 <= value <= 1, "between 0 and 1"
_STEPS: Rule = lambda value: value >= 1 and value == int(value), "a whole number of at least 1"
STAGES: dict[str, dict[str, Rule]] = {
    "torch.optim.lr_scheduler.LinearLR": {
        "start_factor": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "end_factor": _SHARE,
        "total_iters": _STEPS,
    },
    "torch.optim.lr_scheduler.ConstantLR": {"factor": _SHARE, "total_iters": _STEPS},
    "torch.optim.lr_scheduler.CosineAnnealingLR": {
        "T_max": _STEPS,
        "eta_min": (lambda value: value >= 0, "at least 0"),
    },
}
"""The learning rate's stages, their arguments and what those may be."""


def check(config: Config) -> None:
    """Raise UserError for the first rule broken."""
    for rule in (
        _fixed,
        _ranges,
        _batches,
        _windows,
        _groups,
        _scheduler,
        _loss,
        _context,
        _data,
        _saving,
        _degenerate,
    ):
        rule(config)


def _fixed(config: Config) -> None:
    for key, (value, remedy) in FIXED.items():
        if (found := attrgetter(key)(config)) != value:
            refuse(f"{key}={show(found)} isn't supported: {remedy}")


def _ranges(config: Config) -> None:
    def demand(keys: str, holds: Any, rule: str) -> None:
        for key in keys.split():
            if (value := attrgetter(key)(config)) is not None and not holds(value):
                refuse(f"{key}={show(value)} must be {rule}: set it so")

    for least, keys in AT_LEAST.items():
        demand(keys, lambda value, least=least: value >= least, f"at least {least}")
    demand(ABOVE_ZERO, lambda value: value > 0, "above 0")
    demand(AT_MOST_1, lambda value: value <= 1, "at most 1")
    demand("policy.optimizer.kwargs.betas", lambda betas: all(0 <= beta < 1 for beta in betas), "in [0, 1)")
    demand("policy.generation.val_temperature", lambda value: value >= 0, "at least 0")
    demand("policy.model_name teacher.model_name", bool, "a hub name or a folder")
    folders = "runtime.run_dir logger.log_dir checkpointing.checkpoint_dir"
    demand(folders, lambda path: path and "\0" not in path, "the name of a folder")


def _batches(config: Config) -> None:
    loop, batch = config.distillation, config.policy.train_global_batch_size
    answers = loop.num_prompts_per_step * loop.num_generations_per_prompt
    if answers % batch:
        refuse(
            f"policy.train_global_batch_size={batch} doesn't divide the {answers} answers of a step "
            f"(distillation.num_prompts_per_step={loop.num_prompts_per_step} * "
            f"distillation.num_generations_per_prompt={loop.num_generations_per_prompt}): choose one that does"
        )
    for name, model in (("policy", config.policy), ("teacher", config.teacher)):
        if model.dynamic_batching.enabled and model.sequence_packing.enabled:
            refuse(f"{name}.dynamic_batching.enabled=true excludes {name}.sequence_packing.enabled=true: set one false")


def _windows(config: Config) -> None:
    window, generation = config.policy.max_total_sequence_length, config.policy.generation
    if generation.max_new_tokens > window:
        refuse(
            f"policy.generation.max_new_tokens={generation.max_new_tokens} exceeds "
            f"policy.max_total_sequence_length={window}: set it to at most {window}"
        )
    if generation.backend == "vllm" and generation.vllm_cfg.max_model_len < window:
        refuse(
            f"policy.generation.vllm_cfg.max_model_len={generation.vllm_cfg.max_model_len} is below "
            f"policy.max_total_sequence_length={window}: set it to at least {window}"
        )
    if generation.backend == "vllm" and generation.vllm_cfg.precision != config.policy.precision:
        refuse(
            f"policy.generation.vllm_cfg.precision={generation.vllm_cfg.precision} differs from "
            f"policy.precision={config.policy.precision}, and the student samples as it is trained: leave it out"
        )
    teacher = config.teacher.max_total_sequence_length
    if teacher < window and not config.distillation.context_distillation.enabled:
        refuse(
            f"teacher.max_total_sequence_length={teacher} is below policy.max_total_sequence_length={window}, and the "
            f"teacher reads all that the student does: set it to at least {window}"
        )
    if teacher < generation.max_new_tokens:
        refuse(
            f"teacher.max_total_sequence_length={teacher} is below policy.generation.max_new_tokens="
            f"{generation.max_new_tokens}, so the teacher could not read the longest answers: set it to at least "
            f"{generation.max_new_tokens}, and more for what stands before them"
        )


def _groups(config: Config) -> None:
    ranks = config.cluster.num_nodes * config.cluster.gpus_per_node
    where = f"cluster.num_nodes={config.cluster.num_nodes} * cluster.gpus_per_node={config.cluster.gpus_per_node}"
    for name, parallel in (("policy", config.policy.dtensor_cfg), ("teacher", config.teacher.dtensor_cfg)):
        if ranks % (parallel.tensor_parallel_size * parallel.context_parallel_size):
            refuse(
                f"{name}.dtensor_cfg.tensor_parallel_size={parallel.tensor_parallel_size} * context_parallel_size="
                f"{parallel.context_parallel_size} doesn't divide the {ranks} ranks of {where}: choose sizes whose "
                f"product is {_sizes(ranks)}"
            )
    policy = config.policy.dtensor_cfg
    group = policy.tensor_parallel_size * policy.context_parallel_size
    if ranks % (group * policy.replicate_size):
        refuse(
            f"policy.dtensor_cfg.replicate_size={policy.replicate_size} doesn't divide the {ranks // group} groups of "
            f"{group} ranks (tensor_parallel_size * context_parallel_size) of {where}: set it to "
            f"{_sizes(ranks // group)}"
        )
    tp, node = config.policy.dtensor_cfg.tensor_parallel_size, config.cluster.gpus_per_node
    if node % tp:
        refuse(
            f"policy.dtensor_cfg.tensor_parallel_size={tp} doesn't divide the ranks of a node (cluster.gpus_per_node="
            f"{node}), and tensor parallelism stays inside one: set it to {_sizes(node)}"
        )
    ours, theirs = (
        model.dtensor_cfg.tensor_parallel_size * model.dtensor_cfg.context_parallel_size
        for model in (config.policy, config.teacher)
    )
    if theirs > ours and theirs % ours:
        refuse(
            f"teacher.dtensor_cfg.tensor_parallel_size={config.teacher.dtensor_cfg.tensor_parallel_size} * "
            f"context_parallel_size={config.teacher.dtensor_cfg.context_parallel_size} is no multiple of the student's "
            f"{ours} ranks, and a teacher's group holds whole student's groups: choose sizes whose product is "
            f"{any_of(str(ours * size) for size in range(1, ranks // ours + 1) if ranks // ours % size == 0)}"
        )
    engine = config.policy.generation.vllm_cfg.tensor_parallel_size
    if config.policy.generation.backend == "vllm" and node % engine:
        refuse(
            f"policy.generation.vllm_cfg.tensor_parallel_size={engine} doesn't divide the ranks of a node "
            f"(cluster.gpus_per_node={node}), and an engine lies inside one: set it to {_sizes(node)}"
        )


def _sizes(number: int) -> str:
    """What divides ``number``, as a choice."""
    return any_of(str(size) for size in range(1, number + 1) if number % size == 0)


def _scheduler(config: Config) -> None:
    stages = [entry for entry in config.policy.scheduler if entry.name]
    milestones = [step for entry in config.policy.scheduler for step in entry.milestones]
    for stage in stages:
        assert stage.name is not None
        for name, value in stage.kwargs.items():
            if name not in STAGES[stage.name] or type(value) not in (int, float):
                known = ", ".join(sorted(STAGES[stage.name]))
                refuse(f"policy.scheduler: {stage.name} takes no {name}={show(value)}: give numbers for {known}")
            holds, rule = STAGES[stage.name][name]
            if not (math.isfinite(value) and holds(value)):
                refuse(f"policy.scheduler: {stage.name} has {name}={show(value)}, which must be {rule}: set it so")
        if stage.name.endswith("CosineAnnealingLR") and "T_max" not in stage.kwargs:
            refuse(f"policy.scheduler: {stage.name} has no T_max: give the steps that it takes to eta_min")
    if len(milestones) != max(len(stages) - 1, 0) or milestones != sorted(set(milestones)):
        refuse(
            f"policy.scheduler has {len(stages)} stages and milestones={milestones}: give one milestone between each "
            "two stages, rising"
        )


def _loss(config: Config) -> None:
    loss = config.loss_fn
    if loss.zero_outside_topk is not None and loss.outside_topk is not None:
        refuse(
            f"loss_fn.zero_outside_topk={show(loss.zero_outside_topk)} and loss_fn.outside_topk={loss.outside_topk} "
            "are set in one place and say the same thing: set one of them to null"
        )
    check_jsd(loss)
    tp, k = config.policy.dtensor_cfg.tensor_parallel_size, config.distillation.topk_logits_k
    if tp > 1 and (loss.support == "student" or k == 0):
        refuse(
            f"policy.dtensor_cfg.tensor_parallel_size={tp} splits the student's vocabulary over ranks, and "
            f"loss_fn.support={loss.support} with distillation.topk_logits_k={k} needs it whole: set the size to 1 "
            "and context_parallel_size instead, or take the teacher's top-k"
        )
    if loss.kl_type == "sampled" and loss.temperature not in (None, config.policy.generation.temperature):
        refuse(
            f"loss_fn.temperature={loss.temperature} differs from policy.generation.temperature="
            f"{config.policy.generation.temperature} under loss_fn.kl_type=sampled, whose tokens come from the "
            "distribution that it corrects: leave loss_fn.temperature out"
        )


def check_jsd(loss: LossConfig) -> None:
    """Raise UserError for a Jensen-Shannon divergence that is 0 everywhere, or that would need a floor."""
    if loss.kl_type != "jsd":
        return
    if not 0 < loss.jsd_beta < 1:
        refuse(
            f"loss_fn.jsd_beta={loss.jsd_beta} isn't between 0 and 1, and outside of them the divergence is 0 whatever "
            f"the student does: set it between, or loss_fn.kl_type={'reverse' if loss.jsd_beta <= 0 else 'forward'}"
        )
    if loss.outside == "floor":
        refuse(
            "loss_fn.kl_type=jsd knows no floor outside the top-k (outside_topk=floor or zero_outside_topk=true): "
            "set loss_fn.outside_topk=bucket"
        )


def _context(config: Config) -> None:
    context, key = config.distillation.context_distillation, "distillation.context_distillation"
    teacher_template(context.teacher_prefix_template)
    _think_tags(context.trace_extractor.think_tags, f"{key}.trace_extractor.think_tags")
    if not 0 < context.ema_decay < 1:
        refuse(
            f"{key}.ema_decay={context.ema_decay} must lie between 0 and 1: set it so, or mode to self_frozen (1) or "
            "self_live (0)"
        )
    if not context.enabled:
        return
    if context.mode != "frozen" and config.policy.model_name != config.teacher.model_name:
        refuse(
            f"teacher.model_name={config.teacher.model_name} differs from policy.model_name="
            f"{config.policy.model_name} under {key}.mode={context.mode}, where the teacher is the student itself: set "
            "both to the same, or the mode to frozen"
        )
    column = context.static_trace.answer_column
    if context.trace_source == "static_dataset" and not column:
        refuse(
            f"{key}.static_trace.answer_column={show(column)} names no column under {key}.trace_source=static_dataset: "
            "set it to the dataset's column with the traces"
        )
    if context.trace_source == "dynamic" and column:
        refuse(
            f"{key}.static_trace.answer_column={column} is read under {key}.trace_source=static_dataset alone, and it "
            "is dynamic: set it to static_dataset, or the column to null"
        )
    if context.trace_source == "dynamic" and context.trace_extractor.type == "full_text":
        refuse(
            f"{key}.trace_extractor.type=full_text would show the teacher the whole answer that it scores under "
            f"{key}.trace_source=dynamic: set the type to think_tag, or the source to static_dataset"
        )


def _think_tags(tags: tuple[str, str], key: str) -> None:
    opening, closing = tags
    if not all(tag and tag == tag.strip() for tag in tags):
        refuse(
            f"{key}={show(list(tags))} has a tag that is empty or has white space around it: set it to the opening and "
            'the closing tag alone, such as ["<think>", "</think>"]'
        )
    if opening in closing or closing in opening:
        refuse(
            f"{key}={show(list(tags))} has a tag that equals or contains the other: set it to two different tags, such "
            'as ["<think>", "</think>"]'
        )


def _data(config: Config) -> None:
    loop, data = config.distillation, config.data
    if not data.train:
        refuse("data.train=null leaves nothing to train on: set data.train.dataset_name or data.train.data_path")
    if not data.validation and (loop.val_period or loop.val_at_start or loop.val_at_end):
        refuse(
            "data.validation=null leaves nothing to validate on: name a dataset, or set distillation.val_period=0 and "
            "distillation.val_at_start and val_at_end to false"
        )
    for name, entries in (("data.train", data.train), ("data.validation", data.validation)):
        for i, entry in enumerate(entries):
            _dataset(f"{name}.{i}" if len(entries) > 1 else name, entry)


def _dataset(key: str, entry: DatasetConfig) -> None:
    if (entry.dataset_name is None) == (entry.data_path is None):
        both = "both dataset_name and data_path" if entry.data_path else "neither dataset_name nor data_path"
        refuse(f"{key} has {both}: set one of them")
    if entry.repeat < 1:
        refuse(f"{key}.repeat={entry.repeat} must be at least 1: set it so")
    if entry.env_name not in ("math", "exact", "regex", "choice", None):
        refuse(f"{key}.env_name={entry.env_name} is no known judge: set it to math, exact, regex, choice or null")


def _saving(config: Config) -> None:
    saving = config.checkpointing
    if saving.metric_name is not None and not re.fullmatch(r"(train|val):.+", saving.metric_name):
        refuse(
            f"checkpointing.metric_name={saving.metric_name} is neither train:NAME nor val:NAME: write it so, or null"
        )
    if saving.checkpoint_must_save_by is not None and not re.fullmatch(
        r"\d+:\d\d:\d\d:\d\d", saving.checkpoint_must_save_by
    ):
        refuse(
            f"checkpointing.checkpoint_must_save_by={saving.checkpoint_must_save_by} isn't DD:HH:MM:SS: write it so "
            "(00:03:45:00), or null"
        )


def _degenerate(config: Config) -> None:
    """What runs but can't teach."""
    loop, generation = config.distillation, config.policy.generation
    if loop.allow_degenerate:
        return
    if config.teacher.model_name == config.policy.model_name and not loop.context_distillation.enabled:
        refuse(
            f"teacher.model_name={config.teacher.model_name} is the student itself and reads the same, so there is "
            "nothing to learn: choose another teacher, set distillation.context_distillation.enabled=true, or for a "
            "control distillation.allow_degenerate=true"
        )
    if generation.top_p < 1 or generation.top_k is not None:
        refuse(
            f"policy.generation.top_p={generation.top_p} with top_k={show(generation.top_k)} samples from a cut "
            "distribution, but the loss assumes the full one: set top_p=1 and top_k=null, or "
            "distillation.allow_degenerate=true"
        )
