"""Select the candidates of a probe, and check before any weight is loaded that they can be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.config.lora_rules import starts_as_teacher
from distill.data.clock import RunClock
from distill.data.teacher_context import TeacherContext, reads_traces
from distill.data.teacher_prefix import Prefix, TeacherPrefixes, build_context_prefixes
from distill.errors import UserError
from distill.rollout.factory import validation_sampling_of
from distill.rollout.requests import response_limit
from distill.validation.held_out import HeldOut
from distill.validation.probe import Candidate, ProbeConfig, fits, with_probe
from distill.validation.validation import Validation, context_is_known

_PERIOD, _CONTEXT = "distillation.probe_period", "distillation.context_distillation"
_TEMPLATE = f"{_CONTEXT}.teacher_prefix_template"


def probe_config(config: Config, candidates: Sequence[Candidate]) -> ProbeConfig:
    """Return the settings of the probes with these candidates."""
    generation, period = config.policy.generation, config.distillation.probe_period
    return ProbeConfig(period, tuple(candidates), generation.max_new_tokens, generation.val_max_new_tokens)


def check_run_probe(config: Config, held_out: HeldOut, prefixes: TeacherPrefixes, window: int) -> None:
    """Raise UserError if a run with distillation.probe_period cannot probe its teacher with the student's engine.

    ``held_out``: empty only in a dry run without the data. ``prefixes``: builds the teacher's prompts. ``window``: see
    ``check_probe_data``.
    """
    period = config.distillation.probe_period
    if not period:
        return
    if not context_is_known(config):
        raise UserError(
            f"{_PERIOD}={period} needs a teacher that is the student with a context that can be in its prompt before a"
            " response exists, and this teacher is not",
            f"set {_PERIOD}=0 (python -m scripts.probe also measures other teachers), or use a template without"
            f" {{trace}}, or traces from the dataset ({_CONTEXT}.trace_source=static_dataset)",
            key=_PERIOD,
            value=period,
        )
    if held_out.prompts:
        check_probe_data(config, held_out, [run_candidate(prefixes)], window)


def with_run_probe(config: Config, validation: Validation) -> Validation:
    """Return ``validation`` with the probes of distillation.probe_period, or unchanged if it is 0; collective."""
    if not config.distillation.probe_period:
        return validation
    return with_probe(validation, probe_config(config, [run_candidate(validation.teacher_prefixes)]))


def run_candidate(prefixes: TeacherPrefixes) -> Candidate:
    """Return the candidate of a run's own probes: the current student with the teacher's context."""
    return Candidate("recipe's context", "context", prefixes)


def check_recipe_of_probe(config: Config, templates: Sequence[Path]) -> None:
    """Raise UserError if the recipe has no candidate whose prompt is known before a response exists.

    ``templates``: files with templates, in place of the recipe's.
    """
    context = config.distillation.context_distillation
    is_other = not starts_as_teacher(config)
    for path in templates:
        _check_template(config, path)
    if is_other and context.enabled and context.trace_column is None and reads_traces(context):
        raise _unknown_context(_TEMPLATE, context.teacher_prefix_template)
    if templates or is_other:
        return
    if not context.enabled:
        raise UserError(
            f"teacher.model_name={config.teacher.model_name} is the student's model and {_CONTEXT}.enabled=false, so"
            " there is no candidate to probe",
            f"set teacher.model_name to another model, set {_CONTEXT}.enabled=true, or add --template FILE",
            key=f"{_CONTEXT}.enabled",
            value=False,
        )
    if not context_is_known(config):
        raise _unknown_context(_TEMPLATE, context.teacher_prefix_template)


def _unknown_context(key: str, value: object) -> UserError:
    return UserError(
        f"{key} contains {{trace}}, the reasoning of the response itself, so the context is not known before a response"
        " exists",
        f"remove {{trace}} from the template, or take traces from the dataset ({_CONTEXT}.trace_source=static_dataset)",
        key=key,
        value=value,
    )


def _check_template(config: Config, path: Path) -> None:
    context = _with_template(config, _read(path)).distillation.context_distillation
    with _of_template(path):
        TeacherContext.of(context)
    if reads_traces(context) and context.trace_column is None:
        raise _unknown_context("--template", str(path))


@contextmanager
def _of_template(path: Path) -> Iterator[None]:
    """Change a UserError of the ``with`` block into an error about the option --template."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--template={path}: {error.problem}", error.fix, key="--template", value=str(path)) from error


def _read(path: Path) -> str:
    """Return the text of a template without line breaks at its end, which $(cat FILE) in ``lines`` also removes."""
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        fix = "set it to a text file with a template that contains {problem}"
        raise UserError(f"--template={path} cannot be read ({why})", fix, key="--template", value=str(path)) from error


def configs_of_templates(config: Config, templates: Sequence[Path]) -> list[Config]:
    """Return the recipe with each template as the teacher's context; their columns must be read with the data."""
    return [_with_template(config, _read(path)) for path in templates]


def with_columns(held_out: HeldOut, others: Sequence[HeldOut]) -> HeldOut:
    """Return the held-out problems with the columns of the same problems in ``others``."""
    by_id = [{prompt.prompt_id: prompt.problem for prompt in other.prompts} for other in others]
    prompts = []
    for prompt in held_out.prompts:
        columns: dict[str, str] = {}
        for problem in (prompt.problem, *(problems[prompt.prompt_id] for problems in by_id)):
            columns.update(problem.columns)
        prompts.append(replace(prompt, problem=replace(prompt.problem, columns=columns)))
    return replace(held_out, prompts=tuple(prompts))


def candidates_of(
    config: Config,
    templates: Sequence[Path],
    prefixes: TeacherPrefixes,
    tokenizers: tuple[Any, Any],
    vocab: int,
    clock: RunClock,
) -> list[Candidate]:
    """Return the candidates that the program scripts.probe measures.

    With another model as the teacher, this model with its prompt; then the student with each of ``templates``, or with
    the recipe's template if there are none. ``prefixes``: builds the prompts of the recipe's teacher; ``tokenizers``:
    those of the student and the teacher; ``vocab``: number of valid token ids. Raises UserError for an unusable
    template.
    """
    is_other = not starts_as_teacher(config)
    # With the lines of a template, the student is its own teacher, with the student's chat template by default.
    tokenizer = tokenizers[0] if is_other and config.teacher.tokenizer.chat_template is None else tokenizers[1]
    found = [Candidate(f"teacher {config.teacher.model_name}", "teacher", prefixes)] if is_other else []
    if not templates and not is_other:
        return [run_candidate(prefixes)]
    for path, with_template in zip(templates, configs_of_templates(config, templates), strict=True):
        with _of_template(path):
            built = build_context_prefixes(with_template, tokenizer, vocab, clock)
        lines = [f"{_CONTEXT}.enabled=true", f'"{_TEMPLATE}=$(cat {path})"']
        if config.distillation.context_distillation.teacher_messages_key is not None:
            lines.append(f"{_CONTEXT}.teacher_messages_key=null")
        if is_other:
            lines += [f"teacher.model_name={config.policy.model_name}", f"{_CONTEXT}.mode=self_frozen"]
        found.append(Candidate(f"context {path}", "context", built, not is_other, tuple(lines)))
    return found


def _with_template(config: Config, text: str) -> Config:
    loop = config.distillation
    context = replace(loop.context_distillation, enabled=True, teacher_prefix_template=text, teacher_messages_key=None)
    return replace(config, distillation=replace(loop, context_distillation=context))


def check_probe_data(config: Config, held_out: HeldOut, candidates: Sequence[Candidate], window: int) -> None:
    """Raise UserError if no held-out response can be graded, or if no context leaves space for a response.

    ``window``: the engine's maximum number of tokens of a prompt and its response together.
    """
    prompts = [prompt for prompt in held_out.prompts if held_out.grader(prompt) is not None]
    if not prompts:
        key = "data.validation.env_name"
        raise UserError(
            f"{key}=null: a probe grades responses, and no validation problem has a grader",
            f"set {key} to math, exact, regex or choice, and data.validation.output_key to the gold answers",
            key=key,
        )
    sampling = replace(validation_sampling_of(config, ()), max_new_tokens=config.policy.generation.val_max_new_tokens)
    for candidate in candidates:
        readable = (prompt for prompt in prompts if candidate.prefixes.can_read(prompt.problem))
        found = ((prompt, candidate.prefixes.prefix_of(prompt)) for prompt in readable)
        if not any(
            isinstance(prefix, Prefix) and fits(prefix, response_limit(sampling, prompt, window), window)
            for prompt, prefix in found
        ):
            key = "policy.generation.val_max_new_tokens"
            raise UserError(
                f"no problem has the columns of the {candidate.name} and leaves space for"
                f" {key}={sampling.max_new_tokens} tokens in the engine's window of {window} tokens",
                "check the columns, lower the number of tokens, shorten the context, or raise"
                " policy.max_total_sequence_length (with vllm: policy.generation.vllm_cfg.max_model_len) and"
                " teacher.max_total_sequence_length",
                key=key,
                value=sampling.max_new_tokens,
            )
