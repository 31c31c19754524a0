"""Rules of context distillation: what the teacher reads, and which keys can be combined."""

from __future__ import annotations

from distill.config.loop import ContextDistillationConfig
from distill.config.lora_rules import KEY, starts_as_teacher
from distill.config.schema import Config
from distill.config.template import teacher_template
from distill.errors import UserError, show

_KEY = "distillation.context_distillation"


def check_context(config: Config) -> None:
    """Raise UserError if the keys of context distillation are out of range, or cannot be combined."""
    context, key = config.distillation.context_distillation, _KEY
    teacher_template(context.teacher_prefix_template)
    _check_think_tags(context.trace_extractor.think_tags, f"{key}.trace_extractor.think_tags")
    if not 0 < context.ema_decay < 1:
        raise UserError(
            f"{key}.ema_decay={context.ema_decay} is not strictly between 0 and 1",
            "set it between 0 and 1, or set mode to self_frozen (a decay of 1) or self_live (a decay of 0)",
            key=f"{key}.ema_decay",
            value=context.ema_decay,
        )
    _check_refresh_period(context)
    _check_names(context)
    _check_control(config)
    if not context.enabled:
        return
    if context.mode != "frozen" and config.policy.model_name != config.teacher.model_name:
        raise UserError(
            f"teacher.model_name={config.teacher.model_name} differs from policy.model_name="
            f"{config.policy.model_name}, but with {key}.mode={context.mode} the teacher is a copy of the student",
            "set both to the same model, or set mode to frozen",
            key="teacher.model_name",
            value=config.teacher.model_name,
        )
    _check_messages(context)
    _check_chat_template(context)
    _check_trace_source(context, key)


def _refusal(name: str, value: object, problem: str, fix: str) -> UserError:
    """Return an error about the key ``name`` of context distillation: "key=value problem: fix"."""
    return UserError(f"{_KEY}.{name}={show(value)} {problem}", fix, key=f"{_KEY}.{name}", value=value)


def _check_refresh_period(context: ContextDistillationConfig) -> None:
    if context.refresh_period < 1:
        raise _refusal("refresh_period", context.refresh_period, "is out of range", "set it to at least 1")


def _check_names(context: ContextDistillationConfig) -> None:
    """Raise UserError for an empty text in place of a column or a file."""
    for name in ("teacher_messages_key", "teacher_system_prompt_file"):
        value = getattr(context, name)
        if value is not None and not value.strip():
            what = "a column" if name == "teacher_messages_key" else "a text file"
            raise _refusal(name, value, "is an empty text", f"set it to the name of {what}, or to null")


def _check_control(config: Config) -> None:
    """Raise UserError if distillation.control cannot show what the student learns without the context."""
    if not config.distillation.control:
        return
    key, context = "distillation.control", config.distillation.context_distillation
    if not context.enabled:
        raise UserError(
            f"{key}=true has no effect with {_KEY}.enabled=false, because the teacher then has no context",
            f"set {_KEY}.enabled=true, or {key}=false",
            key=key,
            value=True,
        )
    if not starts_as_teacher(config):
        init_from = config.policy.dtensor_cfg.lora_cfg.init_from
        difference, fix = f"{KEY}.init_from={init_from} adapts the student only", f"set {_KEY}.mode=self_frozen"
        if config.teacher.model_name != config.policy.model_name:
            names = config.teacher.model_name, config.policy.model_name
            difference = "teacher.model_name={} differs from policy.model_name={}".format(*names)
            fix = "set both to the same model"
        raise UserError(
            f"{key}=true requires that teacher and student are the same model, but"
            f" {difference}, so the student would learn from the teacher without the context",
            f"{fix}, or {key}=false",
            key=key,
            value=True,
        )


def _check_messages(context: ContextDistillationConfig) -> None:
    """Raise UserError for keys without effect with teacher_messages_key, which replaces the templates."""
    if context.teacher_messages_key is None:
        return
    given = f"{_KEY}.teacher_messages_key={context.teacher_messages_key}"
    problem = f"has no effect with {given}, which gives the complete messages"
    for name, unused in (
        ("teacher_system_prompt_file", None),
        ("keep_history", False),
        ("trace_source", "dynamic"),
    ):
        value = getattr(context, name)
        if value != unused:
            raise _refusal(name, value, problem, f"set {name} to {show(unused)}, or teacher_messages_key to null")
    if (policy := context.trace_extractor.missing_trace_policy) != "empty":
        fix = "set missing_trace_policy to empty, or teacher_messages_key to null"
        raise _refusal("trace_extractor.missing_trace_policy", policy, problem, fix)


def _check_chat_template(context: ContextDistillationConfig) -> None:
    """Raise UserError if chat_template=false is combined with a key that needs messages."""
    if context.chat_template:
        return
    for name, unused in (("teacher_messages_key", None), ("teacher_system_prompt_file", None), ("keep_history", False)):
        value = getattr(context, name)
        if value != unused:
            problem = f"requires {_KEY}.chat_template=true, because the teacher reads messages"
            raise _refusal(name, value, problem, f"set chat_template to true, or {name} to {show(unused)}")


def _check_trace_source(context: ContextDistillationConfig, key: str) -> None:
    column = context.static_trace.answer_column
    if context.trace_source == "static_dataset" and not column:
        raise UserError(
            f"{key}.static_trace.answer_column={show(column)} is missing for {key}.trace_source=static_dataset",
            "set it to the dataset column that contains the reasoning traces for the teacher's prompt",
            key=f"{key}.static_trace.answer_column",
            value=column,
        )
    if context.trace_source == "dynamic" and column:
        raise UserError(
            f"{key}.static_trace.answer_column={column} has no effect with {key}.trace_source=dynamic",
            "set trace_source to static_dataset, or answer_column to null",
            key=f"{key}.static_trace.answer_column",
            value=column,
        )
    if context.trace_source == "dynamic" and context.trace_extractor.type == "full_text":
        raise UserError(
            f"{key}.trace_extractor.type=full_text is not allowed with {key}.trace_source=dynamic, because the teacher "
            "would read the complete response before it scores this response",
            "set type to think_tag, or trace_source to static_dataset",
            key=f"{key}.trace_extractor.type",
            value="full_text",
        )


def _check_think_tags(tags: tuple[str, str], key: str) -> None:
    opening, closing = tags
    example = 'such as ["<think>", "</think>"]'
    if not all(tag and tag == tag.strip() for tag in tags):
        raise UserError(
            f"{key}={show(list(tags))} has an empty tag or a tag with white space around it",
            f"set it to an opening and a closing tag, {example}",
            key=key,
            value=tags,
        )
    if opening in closing or closing in opening:
        raise UserError(
            f"{key}={show(list(tags))} has a tag that equals or contains the other",
            f"set it to two different tags, {example}",
            key=key,
            value=tags,
        )
