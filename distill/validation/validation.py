"""Validation: held-out problems answered with a sync's weights, judged, compared with the teacher, written down."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.batching.plan import PackingConfig
from distill.checkpoint import Checkpoints
from distill.config import Config
from distill.config.template import teacher_template
from distill.data.grading import Grader, Verdict
from distill.data.teacher_prefix import TeacherPrefixes
from distill.distributed.world import World
from distill.errors import writing_run
from distill.metrics.sinks import Recorder
from distill.metrics.step import Phases
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.rollout.engine import Engine, response_limit, stream_seed
from distill.rollout.gather import gather_rollouts
from distill.supervise.progress import heartbeat
from distill.types import Prompt, Rollout, Sampling
from distill.validation.held_out import HeldOut
from distill.validation.scores import Decode, Sample, answer_text, by_source, jsonl_line, shown
from distill.validation.token_kl import token_kls

log = logging.getLogger(__name__)

FOLDER = "validation"
_IN_CONTEXT = "in_context"
_OF_REFERENCE = ("accuracy", "accuracy_stderr", "avg_length", "truncation_rate", "num_problems")
_NO_TRACE, _NO_ROOM = "no trace", "no room"


@dataclass(frozen=True)
class Answers:
    """This rank's answers to held-out problems, from the weights after ``step`` steps."""

    step: int
    phases: Phases
    mine: list[Rollout]
    in_context: InContext | None
    """None: not asked for."""


@dataclass(frozen=True)
class InContext:
    """This rank's answers with the teacher's context in view, whose ``teacher_prefix_ids`` was read."""

    mine: list[Rollout]
    left_out: Mapping[int, str]
    """Why a problem has no answer, by the prompt's id."""


def context_is_known(config: Config) -> bool:
    """Whether the teacher's context is there before any answer, and the student at the start is the teacher."""
    context = config.distillation.context_distillation
    if not context.enabled or config.teacher.model_name != config.policy.model_name:
        return False
    return context.trace_column is not None or not teacher_template(context.teacher_prefix_template).count("trace")


@dataclass
class Validation:
    """When held-out problems are answered, and what is made of the answers. Every rank calls its methods together.

    ``answers`` needs the engine awake with the student's weights, ``report`` the device's memory that it leaves when it
    sleeps: so a step calls the one before it generates, and the other after.
    """

    config: Config
    world: World
    held_out: HeldOut
    decode: Decode
    views: TeacherPrefixes
    engine: Engine
    student: Student
    teacher: Teacher
    packing: PackingConfig
    sampling: Sampling
    last_step: int
    run_dir: Path
    recorder: Recorder
    checkpoints: Checkpoints
    measured_at: int = -1
    """The step whose validation the checkpoint that the run goes on from has already."""
    reference: Mapping[str, float] | None = None
    """What the student reached with the teacher's context in view, measured at the start; kept in checkpoints."""

    def due(self, step: int) -> bool:
        """Whether the weights after ``step`` finished steps are validated."""
        loop = self.config.distillation
        if step == self.measured_at:
            return False
        if step == 0:
            return loop.val_at_start
        return (loop.val_period > 0 and step % loop.val_period == 0) or (loop.val_at_end and step == self.last_step)

    def answers(self, step: int) -> Answers | None:
        """Answer the held-out problems with the weights after ``step`` steps, where that is due; the engine is ready.

        A rank that is asked to stop gives no answers: all of them are of no use then, and nobody may report.

        At the start they are also answered with the teacher's context in view, where that is known beforehand: the
        student is still the teacher then, so this is how well it can do what it shall learn.
        """
        if not self.due(step):
            return None
        phases = Phases(self.world.device)
        engine, prompts = self.engine, self.held_out.prompts
        share = prompts[engine.replica :: engine.replicas]
        with phases("generation"):
            mine = engine.generate(share, self.sampling, step, cancelled=self._asked)
        in_context = None
        if step == 0 and context_is_known(self.config):
            with phases("generation_in_context"):
                in_context = self._answers_in_context(share, step)
        return Answers(step, phases, mine, in_context)

    def _asked(self) -> bool:
        return bool(self.world.supervisor.stop_signal)

    def _answers_in_context(self, share: Sequence[Prompt], step: int) -> InContext:
        """Answers to what the teacher reads; a context that leaves less room than the prompt itself is left out."""
        with self.world.all_or_none("making the contexts of held-out problems"):
            contexts = {prompt.prompt_id: self._context(prompt) for prompt in share}
        views = {number: context for number, context in contexts.items() if not isinstance(context, str)}
        left_out = {number: context for number, context in contexts.items() if isinstance(context, str)}
        prefixes = {number: view.teacher_prefix_ids for number, view in views.items()}
        asked = [
            replace(p, student_ids=view.teacher_prefix_ids, inside_thought=view.teacher_inside_thought)
            for p in share
            if (view := views.get(p.prompt_id)) is not None
        ]
        seed = stream_seed(self.config.distillation.seed, _IN_CONTEXT)
        sampling = replace(self.sampling, seed=seed, max_total_length=None)  # a longer prompt shall not mean less room
        found = self.engine.generate(asked, sampling, step, cancelled=self._asked)
        return InContext([replace(r, teacher_prefix_ids=prefixes[r.prompt.prompt_id]) for r in found], left_out)

    def _context(self, prompt: Prompt) -> Rollout | str:
        """A rollout with what the teacher reads before an answer to ``prompt``, or why the problem is left out."""
        if not self._comparable(prompt):
            return _NO_TRACE
        views, counts = self.views.add([Rollout(prompt, 0, (0,), (0.0,), "length", 0)])
        if not views:
            return _NO_TRACE if counts.totals["context_distillation_dropped_missing_trace"] else _NO_ROOM
        (view,) = views
        room = self.engine.window - len(view.teacher_prefix_ids)
        fits = room >= response_limit(self.sampling, prompt, self.engine.window)
        return view if fits else _NO_ROOM

    def _comparable(self, prompt: Prompt) -> bool:
        """Whether the problem has the column that the teacher's traces come from; without traces every one has."""
        column = self.config.distillation.context_distillation.trace_column
        return column is None or column in prompt.problem.columns

    def report(self, answers: Answers | None) -> None:
        """Judge the answers, compare student and teacher on them, and publish it all; nothing where there are none.

        The engine sleeps, and the student still has the weights that answered.
        """
        if answers is None:
            return
        step, phases = answers.step, answers.phases
        with phases("judging"):
            samples = self._judged(self._with_views(answers.mine), step)
            in_context = [] if answers.in_context is None else self._judged(answers.in_context.mine, step)
        with phases("teacher_comparison"):
            samples = self._compared(samples, step)
        if answers.in_context is not None:
            self._warn_of_left_out(answers.in_context)
            in_context = [replace(s, read_ids=s.rollout.teacher_prefix_ids) for s in in_context]
            prefix = f"{_IN_CONTEXT}_"
            found = {f"validation/{prefix}num_problems": 0.0} | by_source(in_context, prefix)
            self.reference = {name: n for name, n in found.items() if name.rpartition(prefix)[2] in _OF_REFERENCE}
        with phases("writing"), self.world.all_or_none("writing the validation's samples"), writing_run(self.run_dir):
            if self.world.is_main:
                self._write(f"step_{step}", samples)
                self._write(_IN_CONTEXT, in_context)
        failures = sum(s.verdict == "failed" for s in samples)
        if failures:
            log.warning("%d of %d answers could not be judged and count as wrong", failures, len(samples))
        compared = sum(s.forward_kl_R is not None for s in samples)
        if compared < len(samples):
            log.warning(
                "%d of %d held-out answers are not compared with the teacher, which lacks a trace or room for them in"
                " teacher.max_total_sequence_length: the KL is that of the others",
                *(len(samples) - compared, len(samples)),
            )
        seconds = {**phases.seconds, "total_validation_time": sum(phases.seconds.values())}
        timing = {f"timing/validation/{name}": value for name, value in seconds.items()}
        firsts = [sample for sample in samples if sample.rollout.response_index == 0]
        few = [shown(sample, self.decode) for sample in firsts[: self.config.logger.num_val_samples_to_print]]
        values = by_source(samples) | dict(self.reference or {}) | timing
        with self.world.all_or_none("recording the validation"):
            self.recorder.record(step, values)
            self.recorder.show(step, few)
        self.checkpoints.record_metrics(step, values)

    def _warn_of_left_out(self, found: InContext) -> None:
        """Say how many problems have no answer in context, and why."""
        left_out = {number: why for part in self.world.gather(found.left_out) for number, why in part.items()}
        if left_out:
            why = Counter(left_out.values())
            log.warning(
                "%d of %d held-out problems are not answered with the context in view, and the accuracy in context is"
                " that of the others: %d have no trace, and the context of %d leaves less room for an answer than their"
                " prompt does (lower policy.generation.max_new_tokens, or raise teacher.max_total_sequence_length and,"
                " under vllm, policy.generation.vllm_cfg.max_model_len)",
                *(len(left_out), len(self.held_out.prompts), why[_NO_TRACE], why[_NO_ROOM]),
            )

    def _with_views(self, mine: Sequence[Rollout]) -> list[Rollout]:
        """The answers with what the teacher reads before them, as in training; those it leaves out without."""
        comparable = [r for r in mine if self._comparable(r.prompt)]
        with self.world.all_or_none("making the teacher's views of held-out answers"):
            views = {(r.prompt.prompt_id, r.response_index): r for r in self.views.add(comparable)[0]}
        return [views.get((r.prompt.prompt_id, r.response_index), r) for r in mine]

    def _judged(self, mine: Sequence[Rollout], step: int) -> list[Sample]:
        """The answers of all ranks in the order of problems, each judged by the rank that has it."""
        with self.world.all_or_none("judging answers"):
            verdicts = self._verdicts(mine)
        by_answer = {key: verdict for part in self.world.gather(verdicts) for key, verdict in part.items()}
        rollouts = gather_rollouts(self.world, mine, self.held_out.prompts, version=step)
        name = self.held_out.name
        return [Sample(r, name(r.prompt), by_answer[r.prompt.prompt_id, r.response_index]) for r in rollouts]

    def _verdicts(self, mine: Sequence[Rollout]) -> dict[tuple[int, int], Verdict | None]:
        found: dict[tuple[int, int], Verdict | None] = {}
        tags = self.config.distillation.context_distillation.trace_extractor.think_tags
        with Grader() as judge:
            for rollout in mine:
                heartbeat()
                name, gold = self.held_out.judge(rollout.prompt), rollout.prompt.problem.answer
                text, inside = answer_text(rollout, self.decode), rollout.prompt.inside_thought
                verdict = None if name is None else judge(name, text, gold, think_tags=tags, inside_thought=inside)
                found[rollout.prompt.prompt_id, rollout.response_index] = verdict
        return found

    def _compared(self, samples: list[Sample], step: int) -> list[Sample]:
        """The samples with the KL of each token; without it those that the teacher's views leave out."""
        measured = [i for i, sample in enumerate(samples) if sample.rollout.teacher_prefix_ids]
        rollouts = [samples[i].rollout for i in measured]
        seed = self.config.distillation.seed
        kls = token_kls(self.world, self.student, self.teacher, rollouts, self.packing, seed, step)
        compared = list(samples)
        for i, (forward_R, reverse_R) in zip(measured, kls, strict=True):
            compared[i] = replace(samples[i], forward_kl_R=forward_R, reverse_kl_R=reverse_R)
        return compared

    def _write(self, name: str, samples: Sequence[Sample]) -> None:
        if samples:
            folder = self.run_dir / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(jsonl_line(sample, self.decode) + "\n" for sample in samples)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
