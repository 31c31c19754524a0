"""Read a run's inputs except weights: model files, tokenizers, prompts and held-out problems."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from distill.batching.flops import ModelFlops, sizes_of
from distill.batching.plan import PackingConfig
from distill.config import Config, ContextDistillationConfig, LoraConfig, TokenWeightsConfig
from distill.config.lora_rules import starts_as_teacher
from distill.data.chat_template import check_chat_template
from distill.data.clock import RunClock
from distill.data.columns import TextColumn
from distill.data.content import TOKENS, ContentHashes, content_hash, data_hashes, tokenizer_hashes
from distill.data.files import read_text
from distill.data.grading import check_grader
from distill.data.prompt_files import read_datasets
from distill.data.prompts import PromptOrder, Prompts, load_prompts
from distill.data.stop_ids import stop_ids, usable_stop_ids
from distill.data.table import Problems
from distill.data.teacher_context import SYSTEM_KEY, TeacherContext, check_history, context_columns, reads_traces
from distill.data.teacher_prefix import ContextPrefixes, Prefix, TeacherPrefixes, teacher_template_kwargs
from distill.data.text_checks import check_texts, largest_id
from distill.data.thoughts import extract_column_trace
from distill.data.tokenizer import check_tokenizer, load_tokenizer, same_tokenizer_files
from distill.data.tokenizer_checks import compare_vocabularies
from distill.data.train_grader import gold_hashes
from distill.errors import UserError
from distill.memory.shapes import ModelShape, shape_of
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.lora import adapted_layers, check_adapters
from distill.model.teacher import check_top_k
from distill.model.tensor_accounting import check_tensors
from distill.model.tensor_parallel import check_tensor_parallel
from distill.rollout.factory import engine_window, validation_sampling_of
from distill.types import Problem, Prompt
from distill.validation import HeldOut, context_is_known, load_held_out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """Files, tokenizers and layer sizes of the student and the teacher, without weights."""

    student: ModelFiles
    teacher: ModelFiles
    tokenizer: Any
    """The student's tokenizer."""
    teachers_tokenizer: Any
    """Tokenizer for the teacher's prompts: same token ids as ``tokenizer``, perhaps another chat template."""
    valid_vocab: int
    """Number of valid token ids, which start at 0; further rows of the embedding matrices are padding."""
    stop_token_ids: tuple[int, ...]
    """Token ids that end a response."""
    shapes: tuple[ModelShape, ModelShape]
    """Layer sizes and parameter counts of the student and the teacher, in this order."""


def find_models(config: Config) -> Models:
    """Find the files and tokenizers of both models; check them against each other and the recipe.

    Raises UserError if a check fails.
    """
    student = find_model(config.policy.model_name, "policy.model_name")
    teacher = find_model(config.teacher.model_name, "teacher.model_name")
    student_config = model_config(student, "policy.model_name")
    teacher_config = model_config(teacher, "teacher.model_name")
    shapes = shape_of(student_config, student.name), shape_of(teacher_config, teacher.name)
    check_tensors(student, student_config, "policy.model_name")
    if teacher.folder != student.folder:
        check_tensors(teacher, teacher_config, "teacher.model_name")
    tokenizer, teachers = _tokenizers(config, student, teacher)
    compare_vocabularies(tokenizer, teachers, config.policy.model_name, config.teacher.model_name)
    valid_vocab = min(max(tokenizer.get_vocab().values()) + 1, *(shape.vocab for shape in shapes))
    check_top_k(config, valid_vocab)
    check_tensor_parallel(config, student_config, valid_vocab)
    check_adapters(config, student_config)
    stop_token_ids = _stop_token_ids(config, student, teacher, tokenizer, teachers, valid_vocab)
    context = config.distillation.context_distillation
    is_other = context.mode == "frozen" or config.teacher.tokenizer.chat_template is not None
    teachers = teachers if is_other else tokenizer
    _check_chat_templates(config, tokenizer, teachers)
    return Models(student, teacher, tokenizer, teachers, valid_vocab, stop_token_ids, shapes)


def check_model(name: str, key: str) -> None:
    """Check the files of one model without the recipe; ``key``: its configuration key. Raises UserError."""
    files = find_model(name, key)
    check_tensors(files, model_config(files, key), key)


def check_files(config: Config, missing: Callable[[], AbstractContextManager[None]]) -> None:
    """Check the files of the datasets and the prompt files, for a dry run without the student's tokenizer.

    ``missing``: context manager that may catch errors about missing packages and files. Raises UserError.
    """
    context = config.distillation.context_distillation
    column, tags = context.trace_column, context.trace_extractor.think_tags
    extra: Sequence[TextColumn] = ()
    with missing():
        extra = _extra_columns(config)
    held_out = config.data.validation if validates(config) else ()
    for key, datasets, required in (("data.train", config.data.train, True), ("data.validation", held_out, False)):
        reference = reference_column(config) if required else None
        for dataset in datasets:
            with missing():
                if dataset.env_name is not None and key == "data.validation":
                    check_grader(dataset.env_name, key)
                for _ in read_datasets([dataset], key, column, required, extra, reference, tags):
                    pass


def check_tokenizers(config: Config, missing: Callable[[], AbstractContextManager[None]]) -> None:
    """Check the tokenizers and chat template files of both models, for a dry run without the files of a model.

    ``missing``: see ``check_files``. Raises UserError.
    """
    teacher_kwargs = teacher_template_kwargs(config)[0]
    for section, owner, kwargs in (
        ("policy", config.policy, config.policy.tokenizer.chat_template_kwargs),
        ("teacher", config.teacher, teacher_kwargs),
    ):
        name = None if owner.tokenizer.name == owner.model_name else owner.tokenizer.name
        with missing():
            check_tokenizer(name, f"{section}.tokenizer.name", owner.tokenizer.chat_template, kwargs)


def _check_chat_templates(config: Config, tokenizer: Any, teachers: Any) -> None:
    """Raise UserError if a chat template fails to render an example.

    The teacher's template is not checked if it is unused, or if it equals the student's template and has the same
    arguments.
    """
    name = f"policy.tokenizer.name={config.policy.tokenizer.name}"
    kwargs, teacher_kwargs = config.policy.tokenizer.chat_template_kwargs, teacher_template_kwargs(config)[0]
    template = config.policy.tokenizer.chat_template
    check_chat_template(tokenizer, name, "policy.tokenizer.chat_template", kwargs, template)
    context, differ = config.distillation.context_distillation, teachers is not tokenizer or kwargs != teacher_kwargs
    if context.enabled and context.chat_template and differ:
        name = f"teacher.tokenizer.name={config.teacher.tokenizer.name}"
        template = config.teacher.tokenizer.chat_template
        check_chat_template(teachers, name, "teacher.tokenizer.chat_template", teacher_kwargs, template)


def _tokenizers(config: Config, student: ModelFiles, teacher: ModelFiles) -> tuple[Any, Any]:
    """Return the tokenizers of student and teacher; both are one object if files and templates are equal.

    If both models are the same and teacher.tokenizer.chat_template is null, the teacher uses
    policy.tokenizer.chat_template.
    """
    policy, other = config.policy.tokenizer, config.teacher.tokenizer
    kwargs, teacher_kwargs = policy.chat_template_kwargs, teacher_template_kwargs(config)[0]
    tokenizer = load_tokenizer(student, policy.name, "policy.tokenizer.name", policy.chat_template, kwargs)
    is_self = student.folder.resolve() == teacher.folder.resolve()
    template = policy.chat_template if is_self and other.chat_template is None else other.chat_template
    if is_self and (policy.name, policy.chat_template) == (other.name, template):
        return tokenizer, tokenizer
    own_files = policy.name in (None, student.name) and other.name in (None, teacher.name)
    if own_files and policy.chat_template is template is None and same_tokenizer_files(student.folder, teacher.folder):
        return tokenizer, tokenizer  # loading a large tokenizer takes several seconds
    return tokenizer, load_tokenizer(teacher, other.name, "teacher.tokenizer.name", template, teacher_kwargs)


def _stop_token_ids(
    config: Config, student: ModelFiles, teacher: ModelFiles, tokenizer: Any, teachers: Any, valid_vocab: int
) -> tuple[int, ...]:
    """Return the recipe's stop token ids; if they are null, the union of both models' stop token ids.

    Warns if the stop ids of the two models differ. Raises UserError if an id in the recipe is outside the vocabulary.
    """
    given = config.policy.generation.stop_token_ids
    if given is not None:
        if wrong := [token for token in given if not 0 <= token < valid_vocab]:
            key = "policy.generation.stop_token_ids"
            raise UserError(
                f"{key} contains {wrong[0]}, which is not a token id of {student.name}",
                f"set it to token ids in 0..{valid_vocab - 1}, or to null to use the stop token ids of both models",
                key=key,
                value=wrong[0],
            )
        return given
    ours = usable_stop_ids(stop_ids(student, tokenizer, "policy.model_name"), tokenizer, valid_vocab, student.name)
    if teachers is tokenizer and student.folder.resolve() == teacher.folder.resolve():
        return ours
    theirs = usable_stop_ids(stop_ids(teacher, teachers, "teacher.model_name"), teachers, valid_vocab, teacher.name)
    if set(ours) != set(theirs):
        log.warning(
            "the stop tokens of student %s are %s, but the stop tokens of teacher %s are %s (perhaps one is a base"
            " model and the other an instruct model), so responses end at any of these tokens: set"
            " policy.generation.stop_token_ids to choose the stop tokens",
            *(student.name, tokenizer.convert_ids_to_tokens(list(ours))),
            *(teacher.name, teachers.convert_ids_to_tokens(list(theirs))),
        )
    return tuple(sorted({*ours, *theirs}))


_TEMPLATE_KWARGS = "policy.tokenizer.chat_template_kwargs"


def read_prompts(config: Config, models: Models, clock: RunClock) -> PromptOrder:
    """Read the training problems (data.train) and return their prompts in training order.

    ``clock``: date and time of the run, for chat templates that use them.
    """
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    kwargs = clock.template_kwargs(models.tokenizer, config.policy.tokenizer.chat_template_kwargs, _TEMPLATE_KWARGS)
    context = config.distillation.context_distillation
    column, tags, extra = context.trace_column, context.trace_extractor.think_tags, _extra_columns(config)
    prompts = load_prompts(
        config.data.train,
        models.tokenizer,
        window,
        kwargs,
        trace_column=column,
        think_tags=tags,
        extra=extra,
        reference=reference_column(config),
    )
    check_texts(prompts, models.tokenizer, models.valid_vocab, "data.train", column, tags, _names(extra))
    loop, inputs = config.distillation, _inputs(config, models, prompts)
    return PromptOrder(prompts, loop.num_prompts_per_step, loop.seed, config.data.shuffle, inputs)


def _extra_columns(config: Config) -> Sequence[TextColumn]:
    """Return the columns that the teacher reads, except the trace column, and columns of the kind unread."""
    return context_columns(config.distillation.context_distillation)


def _names(columns: Sequence[TextColumn]) -> list[str]:
    return [column.name for column in columns if column.kind != "unread"]


def reference_column(config: Config) -> TextColumn | None:
    """Return the column of the off-policy responses; None if no response is off-policy.

    If distillation.off_policy.column is null, its kind is message: the last assistant message of each conversation.
    """
    off_policy, key = config.distillation.off_policy, "distillation.off_policy.column"
    if not off_policy.share > 0:
        return None
    if off_policy.column is None:
        return TextColumn("", key, required=False, kind="message")
    return TextColumn(off_policy.column, key)


def _inputs(config: Config, models: Models, prompts: Prompts) -> ContentHashes:
    """Return content hashes of the training data, the student's tokenizer and the chat templates."""
    context = config.distillation.context_distillation
    inputs = {
        **data_hashes(
            config.data.train,
            prompts.problems,
            context.trace_column,
            _names(_extra_columns(config)),
            references=config.distillation.off_policy.share > 0,
        ),
        **gold_hashes(config, prompts.problems),
        **tokenizer_hashes(models.tokenizer, config.policy.tokenizer.chat_template_kwargs),
    }
    if context.enabled and context.chat_template:
        inputs["teacher_chat_template"] = content_hash([models.teachers_tokenizer.chat_template])
        inputs["teacher_chat_template_kwargs"] = content_hash([dict(teacher_template_kwargs(config)[0] or {})])
    if context.enabled and context.teacher_system_prompt_file is not None:
        inputs["teacher_system_prompt_file"] = content_hash([read_text(context.teacher_system_prompt_file, SYSTEM_KEY)])
    return inputs


def check_teacher_reads_more(config: Config, prefixes: TeacherPrefixes, order: PromptOrder) -> None:
    """Raise UserError if student and teacher are the same model and read the same prompts.

    Compares the prompts of the first step only. Skips the check if context distillation is disabled, if the
    teacher's prompts contain traces (reasoning texts), or if distillation.control or allow_degenerate is true.
    """
    is_self, context = starts_as_teacher(config), config.distillation.context_distillation
    allowed = config.distillation.allow_degenerate or config.distillation.control
    if not context.enabled or allowed or not is_self or _has_traces(context, order):
        return
    found = [(prompt, prefixes.prefix_of(prompt)) for prompt in order.batch(0)]
    kept = [(prompt.student_ids, prefix.token_ids) for prompt, prefix in found if isinstance(prefix, Prefix)]
    if kept and all(student_ids == teacher_ids for student_ids, teacher_ids in kept):
        key = TeacherContext.of(context).key
        raise UserError(
            f"{key} gives the teacher the same prompt as the student, and both are the same model, so the student"
            " cannot learn from the teacher",
            "add information for the teacher to it, or set distillation.allow_degenerate=true for a control experiment",
            key=key,
            value=context.teacher_messages_key or context.teacher_prefix_template,
        )


def check_contexts(config: Config, models: Models, prefixes: TeacherPrefixes, problems: Sequence[Problem]) -> None:
    """Raise UserError if the teacher cannot read a conversation, or if a token id has no embedding row.

    For conversations see ``check_history`` and ``ContextPrefixes.check_conversations``.

    The check of token ids tokenizes the teacher's prompts (prefixes) of all problems, which takes minutes for large
    datasets. It is skipped if the embedding has a row for every id of the tokenizer, which is the usual case. Prefixes
    that contain the reasoning of a response are checked after the response is generated.
    """
    if not isinstance(prefixes, ContextPrefixes):
        return
    context = config.distillation.context_distillation
    if not isinstance(problems, Problems):
        check_history(context, problems, _number, "data.validation")
        prefixes.check_conversations(problems, _number)
    elif problems.has_conversations or prefixes.reads_conversations:
        check_history(context, problems, problems.location, "data.train")
        prefixes.check_conversations(problems, problems.location)
    if largest_id(models.teachers_tokenizer) < models.valid_vocab:
        return
    for problem in problems:
        column_text = problem.columns.get(context.trace_column, "") if context.trace_column else ""
        prefixes.check_problem(problem, extract_column_trace(column_text, context.trace_extractor))


def _number(i: int) -> str:
    return f"problem {i + 1} of data.validation"


def _has_traces(context: ContextDistillationConfig, order: PromptOrder) -> bool:
    """Return whether the teacher's prompts contain traces (reasoning texts).

    This requires the placeholder {trace} in a template. If the traces come from a dataset
    column, at least one trace in this column must not be empty.
    """
    if not reads_traces(context):
        return False
    column = context.trace_column
    texts = (problem.columns.get(column, "") for problem in order.prompts.problems) if column else ()
    return column is None or any(extract_column_trace(text, context.trace_extractor) for text in texts)


def validates(config: Config) -> bool:
    """Return whether the recipe enables validation."""
    loop = config.distillation
    return loop.val_period > 0 or loop.val_at_start or loop.val_at_end or loop.probe_period > 0


def read_held_out(config: Config, models: Models, clock: RunClock) -> HeldOut:
    """Read the held-out problems (data.validation); return an empty HeldOut if validation is disabled.

    ``clock``: date and time of the run, for chat templates that use them.
    """
    if not validates(config):
        return HeldOut()
    if context_is_known(config) and not config.distillation.val_at_start:
        log.info(
            "the student's accuracy with the teacher's context in the prompt is not measured in this run: set"
            " distillation.val_at_start=true to measure it before the first step"
        )
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    kwargs = clock.template_kwargs(models.tokenizer, config.policy.tokenizer.chat_template_kwargs, _TEMPLATE_KWARGS)
    max_samples, context = config.distillation.max_val_samples, config.distillation.context_distillation
    column, tags, extra = context.trace_column, context.trace_extractor.think_tags, _extra_columns(config)
    datasets, tokenizer = config.data.validation, models.tokenizer
    held_out = load_held_out(datasets, tokenizer, window, kwargs, max_samples, column, tags, extra)
    check_texts(held_out.prompts, tokenizer, models.valid_vocab, "data.validation", column, tags, _names(extra))
    return held_out


def engine_window_of(config: Config, models: Models) -> int:
    """Return the maximum number of tokens of a prompt and its response in the generation engine."""
    return engine_window(config, model_config(models.student, "policy.model_name"))


def hashes_of(
    config: Config, order: PromptOrder, prefixes: TeacherPrefixes, held_out: HeldOut
) -> dict[str, ContentHashes]:
    """Return a dict from configuration key, such as data.train, to hashes of the data that this rank read.

    The hashes of data.validation are empty if validation is disabled. They include the settings of its sampling,
    because two validations are comparable only if these are equal too.
    """
    distilled = config.distillation.context_distillation
    example = TeacherContext.of(distilled).example() if distilled.enabled else Problem("")
    prefix = prefixes.prefix_of(Prompt(0, (0,), example))
    context = content_hash([prefix.token_ids] if isinstance(prefix, Prefix) else [])
    validation = held_out.content(distilled.trace_column, _names(_extra_columns(config)))
    sampling = validation_sampling_of(config, ())
    settings = content_hash([sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens])
    others = {"teacher's context": context, "sampling settings (policy.generation.val_*)": settings}
    return {
        "data.train": order.content_hashes,
        "teacher.tokenizer": {TOKENS: context},
        "data.validation": {**validation, **others} if validation else {},
    }


def packing_of(config: Config, shape: Any) -> PackingConfig:
    """Return the sizes of optimizer batches and micro-batches.

    Sequence packing and dynamic batching limit the number of tokens in a micro-batch. If neither is enabled, the number
    of sequences is limited. ``shape``: the student's Hugging Face configuration, from which the compute cost of a
    sequence is estimated.
    """
    policy = config.policy
    batchings = (policy.sequence_packing, policy.dynamic_batching)
    tokens = next((batching.train_mb_tokens for batching in batchings if batching.enabled), None)
    return PackingConfig(
        optimizer_batch=policy.train_global_batch_size,
        sequences=policy.train_micro_batch_size if tokens is None else None,
        tokens=tokens,
        quadratic=flops_of(shape, policy.dtensor_cfg.lora_cfg).quadratic,
        share_prefixes=config.runtime.share_prefixes,
        expected=config.distillation.num_prompts_per_step * config.distillation.num_generations_per_prompt,
        weights=None if config.loss_fn.token_weights == TokenWeightsConfig() else config.loss_fn.token_weights,
    )


def flops_of(shape: Any, lora: LoraConfig) -> ModelFlops:
    """Return the FLOPs of the student; ``shape``: its Hugging Face configuration; ``lora``: its adapters."""
    adapted = adapted_layers(lora, shape) if lora.enabled else {}
    windowed = [kind for kind in getattr(shape, "layer_types", None) or () if kind == "sliding_attention"]
    return ModelFlops(
        **sizes_of(shape),
        windowed=len(windowed),
        window=shape.sliding_window if windowed else 0,
        adapters=2 * lora.dim * sum(map(sum, adapted.values())),
    )
