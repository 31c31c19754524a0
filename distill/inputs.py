"""What a run reads before any weight is loaded: the models' files, the data, and what follows from them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distill.batching.balance import quadratic_cost
from distill.batching.plan import PackingConfig
from distill.config import Config, ContextDistillationConfig
from distill.config.template import teacher_template
from distill.data.chat_template import check_chat_template
from distill.data.clock import RunClock
from distill.data.content import TOKENS, ContentHashes, content_hash, data_hashes, tokenizer_hashes
from distill.data.prompts import PromptOrder, Prompts, load_prompts
from distill.data.stop_ids import stop_ids, usable_stop_ids
from distill.data.teacher_prefix import ContextPrefixes, TeacherPrefixes, teacher_template_kwargs
from distill.data.text_checks import check_texts, largest_id
from distill.data.thoughts import extract_column_trace
from distill.data.tokenizer import load_tokenizer, same_tokenizer_files
from distill.data.tokenizer_checks import compare_vocabularies
from distill.errors import UserError
from distill.memory.shapes import ModelShape, shape_of
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.teacher import check_top_k
from distill.model.tensor_accounting import check_tensors
from distill.model.tensor_parallel import check_tensor_parallel
from distill.types import Problem, Prompt, Rollout
from distill.validation import HeldOut, context_is_known, load_held_out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The two checkpoints and what their tokenizers say, before any weight is loaded."""

    student: ModelFiles
    teacher: ModelFiles
    tokenizer: Any
    """The student's."""
    teachers_tokenizer: Any
    """The same ids, and maybe another chat template; the student's, where the teacher is the student itself."""
    valid_vocab: int
    """Ids the tokenizer knows; the embeddings may be padded beyond."""
    stop_token_ids: tuple[int, ...]
    shapes: tuple[ModelShape, ModelShape]
    """Of the student and of the teacher."""


def find_models(config: Config) -> Models:
    """The two checkpoints' files, compared with each other and the recipe; raises UserError."""
    student = find_model(config.policy.model_name, "policy.model_name")
    teacher = find_model(config.teacher.model_name, "teacher.model_name")
    config_of_student = model_config(student, "policy.model_name")
    config_of_teacher = model_config(teacher, "teacher.model_name")
    shapes = shape_of(config_of_student, student.name), shape_of(config_of_teacher, teacher.name)
    check_tensors(student, config_of_student, "policy.model_name")
    if teacher.folder != student.folder:
        check_tensors(teacher, config_of_teacher, "teacher.model_name")
    tokenizer, teachers = _tokenizers(config, student, teacher)
    compare_vocabularies(tokenizer, teachers, config.policy.model_name, config.teacher.model_name)
    valid_vocab = min(max(tokenizer.get_vocab().values()) + 1, *(shape.vocab for shape in shapes))
    check_top_k(config, valid_vocab)
    check_tensor_parallel(config, config_of_student, valid_vocab)
    stop_token_ids = _stop_token_ids(config, student, teacher, tokenizer, teachers, valid_vocab)
    context = config.distillation.context_distillation
    other = context.mode == "frozen" or config.teacher.tokenizer.chat_template is not None
    models = Models(student, teacher, tokenizer, teachers if other else tokenizer, valid_vocab, stop_token_ids, shapes)
    what = f"policy.tokenizer.name={config.policy.tokenizer.name}"
    kwargs, theirs = config.policy.tokenizer.chat_template_kwargs, teacher_template_kwargs(config)[0]
    check_chat_template(tokenizer, what, "policy.tokenizer.chat_template", kwargs)
    differ = models.teachers_tokenizer is not tokenizer or kwargs != theirs
    if context.enabled and context.chat_template and differ:
        what = f"teacher.tokenizer.name={config.teacher.tokenizer.name}"
        check_chat_template(models.teachers_tokenizer, what, "teacher.tokenizer.chat_template", theirs)
    return models


def _tokenizers(config: Config, student: ModelFiles, teacher: ModelFiles) -> tuple[Any, Any]:
    """The student's and the teacher's tokenizer: one object where their files and chat template are the same.

    Without teacher.tokenizer.chat_template, a teacher that is the student itself has policy.tokenizer.chat_template.
    """
    ours, theirs = config.policy.tokenizer, config.teacher.tokenizer
    kwargs, their_kwargs = ours.chat_template_kwargs, teacher_template_kwargs(config)[0]
    tokenizer = load_tokenizer(student, ours.name, "policy.tokenizer.name", ours.chat_template, kwargs)
    itself = student.folder.resolve() == teacher.folder.resolve()
    template = ours.chat_template if itself and theirs.chat_template is None else theirs.chat_template
    if itself and (ours.name, ours.chat_template) == (theirs.name, template):
        return tokenizer, tokenizer
    own = ours.name in (None, student.name) and theirs.name in (None, teacher.name)
    if own and ours.chat_template is template is None and same_tokenizer_files(student.folder, teacher.folder):
        return tokenizer, tokenizer  # loading a large one takes several seconds
    return tokenizer, load_tokenizer(teacher, theirs.name, "teacher.tokenizer.name", template, their_kwargs)


def _stop_token_ids(
    config: Config, student: ModelFiles, teacher: ModelFiles, tokenizer: Any, teachers: Any, valid_vocab: int
) -> tuple[int, ...]:
    """The ids that end an answer: the recipe's, or both models' together; says so where they differ. Raises UserError
    for one of the recipe's that is none."""
    given = config.policy.generation.stop_token_ids
    if given is not None:
        if wrong := [token for token in given if not 0 <= token < valid_vocab]:
            raise UserError(
                f"policy.generation.stop_token_ids has {wrong[0]}, which is no token of {student.name}: give ids in"
                f" 0..{valid_vocab - 1}, or null for the models' own"
            )
        return given
    ours = usable_stop_ids(stop_ids(student, tokenizer), tokenizer, valid_vocab, student.name)
    if teachers is tokenizer and student.folder.resolve() == teacher.folder.resolve():
        return ours
    theirs = usable_stop_ids(stop_ids(teacher, teachers), teachers, valid_vocab, teacher.name)
    if set(ours) != set(theirs):
        log.warning(
            "the student %s stops at %s and the teacher %s at %s (a base student under an instruct teacher?):"
            " answers end at any of them; watch train/teacher_stop_mass",
            *(student.name, tokenizer.convert_ids_to_tokens(list(ours))),
            *(teacher.name, teachers.convert_ids_to_tokens(list(theirs))),
        )
    return tuple(sorted({*ours, *theirs}))


_TEMPLATE_KWARGS = "policy.tokenizer.chat_template_kwargs"


def read_prompts(config: Config, models: Models, clock: RunClock) -> PromptOrder:
    """The training problems as prompts, in the order of their steps; chat templates see the clock's time."""
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    kwargs = clock.template_kwargs(models.tokenizer, config.policy.tokenizer.chat_template_kwargs, _TEMPLATE_KWARGS)
    context = config.distillation.context_distillation
    column, tags = context.trace_column, context.trace_extractor.think_tags
    prompts = load_prompts(config.data.train, models.tokenizer, window, kwargs, trace_column=column, think_tags=tags)
    check_texts(prompts, models.tokenizer, models.valid_vocab, "data.train", column, tags)
    loop, inputs = config.distillation, _inputs(config, models, prompts)
    return PromptOrder(prompts, loop.num_prompts_per_step, loop.seed, config.data.shuffle, inputs)


def _inputs(config: Config, models: Models, prompts: Prompts) -> ContentHashes:
    """Hashes of what the prompts and the teacher's prefixes are made from."""
    context = config.distillation.context_distillation
    inputs = {
        **data_hashes(config.data.train, prompts.problems, context.trace_column),
        **tokenizer_hashes(models.tokenizer, config.policy.tokenizer.chat_template_kwargs),
    }
    if context.enabled and context.chat_template:
        inputs["teacher_chat_template"] = content_hash([models.teachers_tokenizer.chat_template])
        inputs["teacher_chat_template_kwargs"] = content_hash([dict(teacher_template_kwargs(config)[0] or {})])
    return inputs


def check_reading(config: Config, views: TeacherPrefixes, order: PromptOrder) -> None:
    """Refuse a student that is its own teacher and reads no more as such: neither text around the problem nor a trace
    of any problem.
    """
    itself, context = config.teacher.model_name == config.policy.model_name, config.distillation.context_distillation
    if not context.enabled or config.distillation.allow_degenerate or not itself or _has_traces(context, order):
        return
    read, _ = views.add([Rollout(prompt, 0, (0,), (0.0,), "length", 0) for prompt in order.batch(0)])
    if read and all(rollout.teacher_prefix_ids == rollout.prompt.student_ids for rollout in read):
        raise UserError(
            "distillation.context_distillation.teacher_prefix_template shows the teacher what the student reads, and"
            " the two are one model: put into it what the teacher should know, or for a control set"
            " distillation.allow_degenerate=true"
        )


def check_contexts(config: Config, models: Models, views: TeacherPrefixes, problems: Iterable[Problem]) -> None:
    """Refuse a problem whose context has an id past the embeddings, before the first step where it is known by then.

    Tokenising every context takes minutes for large data, and nearly all models have a row for each id: then nothing
    is done. Traces of responses are checked when they are read. Raises UserError with the problem.
    """
    if largest_id(models.teachers_tokenizer) < models.valid_vocab or not isinstance(views, ContextPrefixes):
        return
    context = config.distillation.context_distillation
    for problem in problems:
        known = problem.columns.get(context.trace_column, "") if context.trace_column else ""
        trace = extract_column_trace(known, context.trace_extractor)
        views.check_problem(problem, trace)


def _has_traces(context: ContextDistillationConfig, order: PromptOrder) -> bool:
    """Whether the template shows traces and there are some; dynamic ones are only known with the answers."""
    if teacher_template(context.teacher_prefix_template).count("trace") == 0:
        return False
    column = context.trace_column
    texts = (problem.columns.get(column, "") for problem in order.prompts.problems) if column else ()
    return column is None or any(extract_column_trace(text, context.trace_extractor) for text in texts)


def validates(config: Config) -> bool:
    """Whether held-out problems are ever answered."""
    loop = config.distillation
    return loop.val_period > 0 or loop.val_at_start or loop.val_at_end


def read_held_out(config: Config, models: Models, clock: RunClock) -> HeldOut:
    """The held-out problems; none where none are due. Chat templates see the clock's time."""
    if not validates(config):
        return HeldOut()
    if context_is_known(config) and not config.distillation.val_at_start:
        log.info(
            "what the student reaches with the teacher's context in view is measured before the first step only: set"
            " distillation.val_at_start=true to see how much there is to learn"
        )
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    kwargs = clock.template_kwargs(models.tokenizer, config.policy.tokenizer.chat_template_kwargs, _TEMPLATE_KWARGS)
    at_most, context = config.distillation.max_val_samples, config.distillation.context_distillation
    column, tags = context.trace_column, context.trace_extractor.think_tags
    held_out = load_held_out(config.data.validation, models.tokenizer, window, kwargs, at_most, column, tags)
    check_texts(held_out.prompts, models.tokenizer, models.valid_vocab, "data.validation", column, tags)
    return held_out


_EXAMPLE, _EXAMPLE_TRACE = "What is 1 + 1?", "<think>It is 2.</think>"


def contents_of(
    config: Config, order: PromptOrder, views: TeacherPrefixes, held_out: HeldOut
) -> dict[str, ContentHashes]:
    """Hashes of this rank's inputs, by the key that they come from; those of the validation are empty without one."""
    column = config.distillation.context_distillation.trace_column
    problem = Problem(_EXAMPLE, columns={} if column is None else {column: _EXAMPLE_TRACE})
    read, _ = views.add([Rollout(Prompt(0, (0,), problem), 0, (0,), (0.0,), "length", 0)])
    context = content_hash(view.teacher_prefix_ids for view in read)
    validation = held_out.content(column)
    return {
        "data.train": order.content_hashes,
        "teacher.tokenizer": {TOKENS: context},
        "data.validation": {**validation, "teacher's context": context} if validation else {},
    }


def packing_of(config: Config, shape: Any) -> PackingConfig:
    """Budgets of a micro-batch: tokens under packing or dynamic batching (neither pads anything), else answers.

    ``shape``: the student's Hugging Face configuration, from which a sequence's cost follows.
    """
    policy = config.policy
    batchings = (policy.sequence_packing, policy.dynamic_batching)
    tokens = next((batching.train_mb_tokens for batching in batchings if batching.enabled), None)
    windowed = [kind for kind in getattr(shape, "layer_types", None) or () if kind == "sliding_attention"]
    return PackingConfig(
        optimizer_batch=policy.train_global_batch_size,
        sequences=policy.train_micro_batch_size if tokens is None else None,
        tokens=tokens,
        quadratic=quadratic_cost(
            hidden=shape.hidden_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            intermediate=shape.intermediate_size,
            vocab=shape.vocab_size,
            windowed=len(windowed),
            window=shape.sliding_window if windowed else 0,
        ),
        share_prefixes=config.runtime.share_prefixes,
        expected=config.distillation.num_prompts_per_step * config.distillation.num_generations_per_prompt,
    )
