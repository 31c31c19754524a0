"""Validation: held-out problems answered with a sync's weights, judged, compared with the teacher, written down."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.config import Config
from distill.data.context import TeacherViews
from distill.data.verify import Judge, Verdict
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.rollout.engine import Engine, stream_seed
from distill.rollout.exchange import gather_rollouts
from distill.runtime.checkpoint import Checkpoints
from distill.runtime.disk import writing_run
from distill.runtime.metrics import Phases
from distill.runtime.metrics_sinks import Recorder
from distill.runtime.packing import PackingConfig
from distill.runtime.place import progressed
from distill.runtime.world import World
from distill.types import Prompt, Rollout, Sampling
from distill.validation.comparison import token_kls
from distill.validation.held_out import HeldOut
from distill.validation.scores import Decode, Sample, answer_text, by_source, jsonl_line, scores, shown

log = logging.getLogger(__name__)

FOLDER = "validation"
_IN_CONTEXT = "in_context"
_OF_REFERENCE = ("accuracy", "accuracy_stderr", "avg_length", "truncation_rate")


@dataclass(frozen=True)
class Answers:
    """This rank's answers to held-out problems, from the weights after ``step`` steps."""

    step: int
    phases: Phases
    mine: list[Rollout]
    in_context: list[Rollout] | None
    """Answers with the teacher's context in view, whose ``teacher_prefix_ids`` was read; None: not asked for."""


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
    views: TeacherViews
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

        At the start they are also answered with the teacher's context in view, where that is known beforehand: the
        student is still the teacher then, so this is how well it can do what it shall learn.
        """
        if not self.due(step):
            return None
        phases = Phases(self.world.device)
        engine, prompts = self.engine, self.held_out.prompts
        share = prompts[engine.replica :: engine.replicas]
        with phases("generation"):
            mine = engine.generate(share, self.sampling, step)
        in_context = None
        if step == 0 and self._context_is_known():
            with phases("generation_in_context"):
                in_context = self._answers_in_context(share, step)
        return Answers(step, phases, mine, in_context)

    def _context_is_known(self) -> bool:
        """Whether the teacher's context is there before any answer, and the student at the start is the teacher."""
        context = self.config.distillation.context_distillation
        itself = self.config.teacher.model_name == self.config.policy.model_name
        known = context.trace_column is not None or "{trace}" not in context.teacher_prefix_template
        return context.enabled and itself and known

    def _answers_in_context(self, share: Sequence[Prompt], step: int) -> list[Rollout]:
        """Answers to what the teacher reads; a context that leaves no room for an answer is left out."""
        window = self.config.policy.max_total_sequence_length
        with self.world.agreed("making the contexts of held-out problems"):
            blank = [Rollout(prompt, 0, (0,), (0.0,), "length", step) for prompt in share]
            with_context, _ = self.views.prefixed(blank)
            fitting = [r for r in with_context if len(r.teacher_prefix_ids) < window]
        prefixes = {r.prompt.prompt_id: r.teacher_prefix_ids for r in fitting}
        asked = [replace(r.prompt, student_ids=r.teacher_prefix_ids) for r in fitting]
        seed = stream_seed(self.config.distillation.seed, _IN_CONTEXT)
        sampling = replace(self.sampling, seed=seed, max_total_length=None)  # a longer prompt shall not mean less room
        found = self.engine.generate(asked, sampling, step)
        return [replace(r, teacher_prefix_ids=prefixes[r.prompt.prompt_id]) for r in found]

    def report(self, answers: Answers | None) -> None:
        """Judge the answers, compare student and teacher on them, and publish it all; nothing where there are none.

        The engine sleeps, and the student still has the weights that answered.
        """
        if answers is None:
            return
        step, phases = answers.step, answers.phases
        with phases("judging"):
            samples = self._judged(self._with_views(answers.mine), step)
            in_context = [] if answers.in_context is None else self._judged(answers.in_context, step)
        with phases("teacher_comparison"):
            samples = self._compared(samples, step)
        if answers.in_context is not None:
            if len(in_context) < len(samples):
                log.warning(
                    "%d of %d held-out answers have a context that leaves them no room in"
                    " policy.max_total_sequence_length: raise it; the accuracy in context is that of the others",
                    *(len(samples) - len(in_context), len(samples)),
                )
            in_context = [replace(s, read_ids=s.rollout.teacher_prefix_ids) for s in in_context]
            kept = {name: value for name, value in scores(in_context).items() if name in _OF_REFERENCE}
            self.reference = {f"validation/{_IN_CONTEXT}_{name}": value for name, value in kept.items()}
        with phases("writing"), self.world.agreed("writing the validation's samples"), writing_run(self.run_dir):
            if self.world.main:
                self._write(f"step_{step}", samples)
                self._write(_IN_CONTEXT, in_context)
        failures = sum(s.verdict == "failed" for s in samples)
        if failures:
            log.warning("%d of %d answers could not be judged and count as wrong", failures, len(samples))
        seconds = {**phases.seconds, "total_validation_time": sum(phases.seconds.values())}
        timing = {f"timing/validation/{name}": value for name, value in seconds.items()}
        few = [shown(sample, self.decode) for sample in samples[: self.config.logger.num_val_samples_to_print]]
        values = by_source(samples) | dict(self.reference or {}) | timing
        with self.world.agreed("recording the validation"):
            self.recorder.record(step, values)
            self.recorder.show(step, few)
        self.checkpoints.note(step, values)

    def _with_views(self, mine: Sequence[Rollout]) -> list[Rollout]:
        """The answers with what the teacher reads before them, as in training; those it leaves out without."""
        with self.world.agreed("making the teacher's views of held-out answers"):
            views = {(r.prompt.prompt_id, r.answer): r for r in self.views.prefixed(mine)[0]}
        return [views.get((r.prompt.prompt_id, r.answer), r) for r in mine]

    def _judged(self, mine: Sequence[Rollout], step: int) -> list[Sample]:
        """The answers of all ranks in the order of problems, each judged by the rank that has it."""
        with self.world.agreed("judging answers"):
            verdicts = self._verdicts(mine)
        by_answer = {key: verdict for part in self.world.gather(verdicts) for key, verdict in part.items()}
        rollouts = gather_rollouts(self.world, mine, self.held_out.prompts, version=step)
        name = self.held_out.name
        return [Sample(r, name(r.prompt), by_answer[r.prompt.prompt_id, r.answer]) for r in rollouts]

    def _verdicts(self, mine: Sequence[Rollout]) -> dict[tuple[int, int], Verdict | None]:
        found: dict[tuple[int, int], Verdict | None] = {}
        with Judge() as judge:
            for rollout in mine:
                progressed()
                name, gold = self.held_out.judge(rollout.prompt), rollout.prompt.problem.answer
                verdict = None if name is None else judge(name, answer_text(rollout, self.decode), gold)
                found[rollout.prompt.prompt_id, rollout.answer] = verdict
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
