"""Validation: generate responses to held-out problems, grade them, compare student and teacher, record the metrics."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from distill.checkpoint import Checkpoints
from distill.config import Config
from distill.config.template import teacher_template
from distill.data.grading import Grader, Verdict
from distill.data.teacher_prefix import Prefix, TeacherPrefixes
from distill.distributed.world import World
from distill.errors import writing_run
from distill.metrics.phases import Phases
from distill.metrics.sinks import Recorder
from distill.rollout.engine import Engine, response_limit, stream_seed
from distill.rollout.gather import gather_rollouts
from distill.supervise.progress import heartbeat
from distill.supervise.stop import StopCheck, StopRequested
from distill.types import Prompt, Rollout, Sampling
from distill.validation.held_out import HeldOut
from distill.validation.scores import Decode, Sample, by_source, format_sample, jsonl_line, response_text

log = logging.getLogger(__name__)

FOLDER = "validation"
"""Folder in the run directory with the samples of each validation."""
_IN_CONTEXT = "in_context"
_REFERENCE_METRICS = ("accuracy", "accuracy_stderr", "avg_length", "truncation_rate", "num_problems")
_NO_TRACE, _NO_ROOM = "no trace", "no room"

Compare = Callable[[Sequence[Rollout], int], list[tuple[Tensor, Tensor]]]
"""Function that returns forward and reverse KL [R] of each rollout of a step, see ``token_kls``; collective."""


@dataclass(frozen=True)
class ValidationConfig:
    """Settings of the validations of a run."""

    period: int
    """Steps between validations; 0: no periodic validation."""
    at_start: bool
    at_end: bool
    first_step: int
    last_step: int
    seed: int
    in_context: bool
    """Whether the first validation also measures the student with the teacher's context."""
    trace_column: str | None
    think_tags: tuple[str, str]
    samples_shown: int
    """Number of samples to log."""


def validation_config(config: Config, first_step: int, last_step: int) -> ValidationConfig:
    """Return the settings of validation for a run from ``first_step`` to ``last_step`` finished steps."""
    loop, context = config.distillation, config.distillation.context_distillation
    return ValidationConfig(
        period=loop.val_period,
        at_start=loop.val_at_start,
        at_end=loop.val_at_end,
        first_step=first_step,
        last_step=last_step,
        seed=loop.seed,
        in_context=context_is_known(config),
        trace_column=context.trace_column,
        think_tags=context.trace_extractor.think_tags,
        samples_shown=config.logger.num_val_samples_to_print,
    )


def context_is_known(config: Config) -> bool:
    """Return whether the teacher is the initial student and its context does not depend on a response."""
    context = config.distillation.context_distillation
    if not context.enabled or config.teacher.model_name != config.policy.model_name:
        return False
    return context.trace_column is not None or not teacher_template(context.teacher_prefix_template).count("trace")


@dataclass(frozen=True)
class Generated:
    """This rank's responses to held-out problems, sampled with the weights after ``step`` finished steps."""

    step: int
    phases: Phases
    rollouts: list[Rollout]
    in_context: InContext | None
    """Responses generated with the teacher's context; None except in the first validation."""


@dataclass(frozen=True)
class InContext:
    """This rank's responses generated with the teacher's context, stored in ``teacher_prefix_ids``."""

    rollouts: list[Rollout]
    skipped: Mapping[int, str]
    """Reason why a problem was skipped, by prompt id."""


@dataclass
class Validation:
    """Validation of a run; all ranks call ``generate`` and ``report`` together.

    ``generate`` needs the engine awake with the current weights. ``report`` needs the device memory that the engine
    frees when it sleeps, and the student's weights unchanged.
    """

    config: ValidationConfig
    world: World
    held_out: HeldOut
    decode: Decode
    teacher_prefixes: TeacherPrefixes
    engine: Engine
    compare: Compare
    sampling: Sampling
    run_dir: Path
    recorder: Recorder
    checkpoints: Checkpoints
    stop: StopCheck
    measured_at: int = -1
    """Step for which the resumed checkpoint already has validation metrics; -1 if it has none."""
    reference: Mapping[str, float] | None = None
    """In-context metrics of the initial student, which are stored in checkpoints; None if not measured."""

    def due(self, step: int) -> bool:
        """Return whether a validation of the weights after ``step`` finished steps is due."""
        if step == self.measured_at:
            return False
        if step == 0:
            return self.config.at_start
        periodic = self.config.period > 0 and step % self.config.period == 0
        return periodic or (self.config.at_end and step == self.config.last_step)

    def generate(self, step: int) -> Generated | None:
        """Generate responses to the held-out problems; return None if no validation is due; collective.

        ``step``: number of finished steps. The validation before the first step also generates with the teacher's
        context, if the context does not depend on a response. Student and teacher are still equal then, so this gives
        the accuracy that distillation can reach. Raises StopRequested on all ranks, with the engine asleep, if any rank
        requests a stop before or during the generation.
        """
        if not self.due(step):
            return None
        self._raise_if_stop_requested(step)
        phases = Phases(self.world.device)
        prompts = self.engine.share_of(self.held_out.prompts)
        with phases("generation"):
            rollouts = self.engine.generate(prompts, self.sampling, step, cancelled=self.stop.has_signal)
        in_context = None
        if step == 0 and self.config.in_context:
            with phases("generation_in_context"):
                in_context = self._generate_in_context(prompts, step)
        self._raise_if_stop_requested(step)  # a signal cancels the generation, so the responses are incomplete
        return Generated(step, phases, rollouts, in_context)

    def _raise_if_stop_requested(self, step: int) -> None:
        # Before the first step of this start the time limit is ignored, or no restart would ever make progress.
        check_time = self.config.first_step < step < self.config.last_step
        try:
            self.stop.raise_if_requested(step, check_time)
        except StopRequested:
            self.engine.sleep()
            raise

    def _generate_in_context(self, prompts: Sequence[Prompt], step: int) -> InContext:
        """Generate with the teacher's prefix as the prompt; skip problems with a missing or too long prefix."""
        with self.world.all_or_none("building the contexts of held-out problems"):
            prefixes = {prompt.prompt_id: self._prefix_or_reason(prompt) for prompt in prompts}
        in_context = [
            replace(prompt, student_ids=prefix.token_ids, inside_thought=prefix.inside_thought)
            for prompt in prompts
            if isinstance(prefix := prefixes[prompt.prompt_id], Prefix)
        ]
        # With max_total_length, the longer prompts would leave fewer response tokens.
        sampling = replace(self.sampling, seed=stream_seed(self.config.seed, _IN_CONTEXT), max_total_length=None)
        rollouts = self.engine.generate(in_context, sampling, step, cancelled=self.stop.has_signal)
        skipped = {prompt_id: reason for prompt_id, reason in prefixes.items() if isinstance(reason, str)}
        return InContext([replace(r, teacher_prefix_ids=r.prompt.student_ids) for r in rollouts], skipped)

    def _prefix_or_reason(self, prompt: Prompt) -> Prefix | str:
        """Return the teacher's prefix of ``prompt``, or the reason why the problem is skipped."""
        if not self._has_trace_column(prompt):
            return _NO_TRACE
        prefix = self.teacher_prefixes.prefix_of(prompt)
        if not isinstance(prefix, Prefix):
            return _NO_TRACE if prefix == "missing_trace" else _NO_ROOM
        room = self.engine.window - len(prefix.token_ids)
        return prefix if room >= response_limit(self.sampling, prompt, self.engine.window) else _NO_ROOM

    def _has_trace_column(self, prompt: Prompt) -> bool:
        column = self.config.trace_column
        return column is None or column in prompt.problem.columns

    def report(self, generated: Generated | None) -> None:
        """Grade the responses, compare student and teacher on them, and record metrics and samples; collective.

        ``generated``: result of ``generate``; nothing happens if it is None.
        """
        if generated is None:
            return
        step, phases, in_context = generated.step, generated.phases, generated.in_context
        with phases("judging"):
            samples = self._graded(self._with_prefixes(generated.rollouts), step)
            context_samples = [] if in_context is None else self._graded(in_context.rollouts, step)
        with phases("teacher_comparison"):
            samples = self._compared(samples, step)
        if in_context is not None:
            self._warn_of_skipped(in_context)
            context_samples = [replace(s, read_ids=s.rollout.teacher_prefix_ids) for s in context_samples]
            self.reference = _reference(context_samples)
        with phases("writing"), self.world.all_or_none("writing the validation's samples"), writing_run(self.run_dir):
            if self.world.is_main:
                self._write(f"step_{step}", samples)
                self._write(_IN_CONTEXT, context_samples)
        _warn_of_incomplete(samples)
        self._record(step, samples, phases)

    def _graded(self, rollouts: Sequence[Rollout], step: int) -> list[Sample]:
        """Return the samples of all ranks, ordered by problem; collective. Each rank grades its own rollouts."""
        with self.world.all_or_none("grading responses"):
            own = self._verdicts(rollouts)
        verdicts = {key: verdict for part in self.world.gather(own) for key, verdict in part.items()}
        everyone = gather_rollouts(self.world, rollouts, self.held_out.prompts, version=step)
        name = self.held_out.name
        return [Sample(r, name(r.prompt), verdicts[r.prompt.prompt_id, r.response_index]) for r in everyone]

    def _verdicts(self, rollouts: Sequence[Rollout]) -> dict[tuple[int, int], Verdict | None]:
        found: dict[tuple[int, int], Verdict | None] = {}
        with Grader() as grade:
            for rollout in rollouts:
                heartbeat()
                prompt, name = rollout.prompt, self.held_out.grader(rollout.prompt)
                text, tags = response_text(rollout, self.decode), self.config.think_tags
                found[prompt.prompt_id, rollout.response_index] = (
                    None
                    if name is None
                    else grade(name, text, prompt.problem.answer, think_tags=tags, inside_thought=prompt.inside_thought)
                )
        return found

    def _with_prefixes(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Add the teacher's prefix as in training; return rollouts that the teacher cannot score unchanged."""
        scorable = [r for r in rollouts if self._has_trace_column(r.prompt)]
        with self.world.all_or_none("building the teacher's prefixes of held-out responses"):
            kept = {(r.prompt.prompt_id, r.response_index): r for r in self.teacher_prefixes.add(scorable)[0]}
        return [kept.get((r.prompt.prompt_id, r.response_index), r) for r in rollouts]

    def _compared(self, samples: list[Sample], step: int) -> list[Sample]:
        """Return the samples with the KL of each token; collective. Samples without teacher prefix get no KL."""
        indices = [i for i, sample in enumerate(samples) if sample.rollout.teacher_prefix_ids]
        compared = list(samples)
        kls = self.compare([samples[i].rollout for i in indices], step)
        for i, (forward_R, reverse_R) in zip(indices, kls, strict=True):
            compared[i] = replace(samples[i], forward_kl_R=forward_R, reverse_kl_R=reverse_R)
        return compared

    def _warn_of_skipped(self, in_context: InContext) -> None:
        """Log the number of problems that were skipped in the in-context generation, and the reasons; collective."""
        skipped = {id_: reason for part in self.world.gather(in_context.skipped) for id_, reason in part.items()}
        if skipped:
            reasons = Counter(skipped.values())
            log.warning(
                "%d of %d held-out problems do not count in in_context_accuracy: %d have no trace, and %d have a"
                " context that leaves too few tokens for a response (lower policy.generation.max_new_tokens, or raise"
                " teacher.max_total_sequence_length and, with vllm, policy.generation.vllm_cfg.max_model_len)",
                *(len(skipped), len(self.held_out.prompts), reasons[_NO_TRACE], reasons[_NO_ROOM]),
            )

    def _write(self, name: str, samples: Sequence[Sample]) -> None:
        if samples:
            folder = self.run_dir / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(jsonl_line(sample, self.decode) + "\n" for sample in samples)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def _record(self, step: int, samples: Sequence[Sample], phases: Phases) -> None:
        seconds = {**phases.seconds, "total_validation_time": sum(phases.seconds.values())}
        timing = {f"timing/validation/{name}": value for name, value in seconds.items()}
        first_responses = [sample for sample in samples if sample.rollout.response_index == 0]
        texts = [format_sample(sample, self.decode) for sample in first_responses[: self.config.samples_shown]]
        values = by_source(samples) | dict(self.reference or {}) | timing
        with self.world.all_or_none("recording the validation"):
            self.recorder.record(step, values)
            self.recorder.show(step, texts)
        self.checkpoints.record_metrics(step, values)


def _reference(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the in-context metrics, which later validations report again."""
    prefix = f"{_IN_CONTEXT}_"
    values = {f"validation/{prefix}num_problems": 0.0} | by_source(samples, prefix)
    return {name: value for name, value in values.items() if name.rpartition(prefix)[2] in _REFERENCE_METRICS}


def _warn_of_incomplete(samples: Sequence[Sample]) -> None:
    """Log the number of responses that could not be graded or compared with the teacher."""
    if failures := sum(s.verdict == "failed" for s in samples):
        log.warning("%d of %d responses could not be graded and count as wrong", failures, len(samples))
    if missing := sum(s.forward_kl_R is None for s in samples):
        log.warning(
            "the KL excludes %d of %d held-out responses, which have no trace for the teacher or exceed"
            " teacher.max_total_sequence_length",
            *(missing, len(samples)),
        )
