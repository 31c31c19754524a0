"""The responses that a step trains on: what the engine generates, the dataset's responses, grading and selection."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distill.config import Config
from distill.config.response_limits import max_new_tokens_at
from distill.data.references import References
from distill.data.teacher_context import reads_traces
from distill.data.teacher_prefix import TRACE_COVERAGE, PrefixStats, TeacherPrefixes
from distill.data.train_grader import TrainGrader
from distill.distributed.world import World
from distill.metrics.responses import WatchedWords, length_quantiles
from distill.metrics.step import Metrics, add_rollouts
from distill.rollout.off_policy import off_policy_pairs, reference_rollout
from distill.rollout.preparation import Preparation
from distill.rollout.stream import response_order
from distill.types import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)


@dataclass
class StepResponses:
    """Selects the responses of each training step, on the rank that generated them.

    The argument ``step`` of its methods is a number of finished steps; ``prompts`` are the prompts of all ranks.
    """

    config: Config
    world: World
    sampling: Sampling
    """Sampling settings that do not depend on the step."""
    window: int
    """The engine's maximum number of tokens of a prompt and its response together."""
    references: References
    grader: TrainGrader
    teacher_prefixes: TeacherPrefixes
    words: WatchedWords = field(default_factory=lambda: WatchedWords((), str))
    """Words whose frequency is measured."""
    _removed: Counter[str] = field(default_factory=Counter)
    """Maps the reason for which responses were removed in the current step to their number on this rank."""
    preparation: Preparation = field(init=False)
    """Grades responses and builds their teacher prefixes, in advance while the engine generates."""

    def __post_init__(self) -> None:
        self.preparation = Preparation(self.grader, self.teacher_prefixes, self.config.distillation.train_on)

    def sampling_at(self, step: int, prompts: Sequence[Prompt]) -> Sampling:
        """Return the sampling settings of the step after ``step``, without the responses of the dataset."""
        share, seed = self.config.distillation.off_policy.share, self.sampling.seed
        omitted = off_policy_pairs(prompts, self.sampling.responses_per_prompt, share, seed, step)
        return replace(self.sampling, max_new_tokens=max_new_tokens_at(self.config, step + 1), omitted=omitted)

    def select(
        self, generated: Sequence[Rollout], prompts: Sequence[Prompt], step: int, metrics: Metrics
    ) -> list[Rollout]:
        """Return the responses of this rank to train on, each with the teacher's prefix; collective.

        ``generated``: this rank's responses. They are graded, and those that distillation.train_on excludes are
        removed. Then the rank's part of the dataset's responses is added. The teacher's prefix is the token ids that
        the teacher reads before the response; a response for which it cannot be built is removed. All removed responses
        are counted in ``metrics``; metrics of responses describe all generated responses. If
        distillation.context_distillation.metrics.enabled is false, the metrics of teacher prefixes are omitted, except
        the fraction of rollouts with a trace if the teacher reads traces, because the console shows it.
        """
        sampling = self.sampling_at(step, prompts)
        if self.config.distillation.max_new_tokens_schedule:
            metrics.add_same({"max_new_tokens": float(sampling.max_new_tokens)})
        add_rollouts(metrics, generated)
        lengths_by_rank = self.world.gather([len(rollout.response_ids) for rollout in generated])
        metrics.add_same(length_quantiles([length for own in lengths_by_rank for length in own]))
        metrics.add(self.words.stats(generated))
        self._removed = Counter()
        kept = self._graded(generated, metrics)
        started = time.monotonic()
        with self.world.all_or_none("building the teacher's prefixes"):
            prefixed, counts = self.preparation.prefixes(kept)
        if counts.totals:  # the teacher reads a context
            metrics.add_max({"timing/train/teacher_prefixes": time.monotonic() - started})
        if seconds := self.preparation.background_s:
            metrics.add_max({"timing/train/background_preparation": seconds})
        reasons = {name: int(count) for name, count in counts.totals.items() if "dropped_" in name}
        self._removed.update({name: count for name, count in reasons.items() if not name.endswith("dropped_samples")})
        self._add_prefix_counts(counts, metrics)
        return prefixed + self._off_policy(sampling, prompts, step, metrics)

    def _graded(self, generated: Sequence[Rollout], metrics: Metrics) -> list[Rollout]:
        """Grade the responses of this rank; return those that distillation.train_on includes; collective."""
        started, train_on = time.monotonic(), self.config.distillation.train_on
        with self.world.all_or_none("grading responses"):
            verdicts = self.preparation.verdicts(generated)
        graded = [verdict for verdict in verdicts if verdict is not None]
        if graded:
            metrics.add({"accuracy": (float(graded.count("right")), float(len(graded)))})
            metrics.add_totals({"judge_failures": float(graded.count("failed"))})
            metrics.add_max({"timing/train/grading": time.monotonic() - started})
        if train_on == "all":
            return list(generated)
        kept = [rollout for rollout, verdict in zip(generated, verdicts, strict=True) if verdict == train_on]
        self._removed[f"not {train_on}"] = len(generated) - len(kept)
        metrics.add_totals({"removed_by_train_on": float(len(generated) - len(kept))})
        return kept

    def _add_prefix_counts(self, counts: PrefixStats, metrics: Metrics) -> None:
        context = self.config.distillation.context_distillation
        if context.metrics.enabled:
            metrics.add(counts.means)
            metrics.add_totals(counts.totals)
        elif context.enabled and reads_traces(context):
            metrics.add({name: value for name, value in counts.means.items() if name == TRACE_COVERAGE})

    def _off_policy(self, sampling: Sampling, prompts: Sequence[Prompt], step: int, metrics: Metrics) -> list[Rollout]:
        """Return this rank's part of the dataset's responses, with the teacher's prefixes; collective."""
        if not sampling.omitted:
            return []
        positions = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
        own = sampling.omitted[self.world.rank :: self.world.size]
        with self.world.all_or_none("reading the responses of the dataset"):
            rollouts = [self._reference(prompts, positions[id_], index, sampling, step) for id_, index in own]
            prefixed, _ = self.teacher_prefixes.add(rollouts)
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        read = sum(lengths) + sum(len(rollout.prompt.student_ids) for rollout in rollouts)
        cut, count = sum(rollout.finish == "length" for rollout in rollouts), float(len(rollouts))
        metrics.add(
            {
                "off_policy_mean_tokens_per_sample": (float(sum(lengths)), count),
                "off_policy_truncation_rate": (float(cut), count),
            }
        )
        metrics.add_totals(
            {
                "off_policy_responses": count,
                "off_policy_dropped": count - len(prefixed),
                "total_num_tokens": float(read),
            }
        )
        self._removed["off-policy responses without a teacher prompt"] = len(rollouts) - len(prefixed)
        return prefixed

    def _reference(
        self, prompts: Sequence[Prompt], position: int, index: int, sampling: Sampling, step: int
    ) -> Rollout:
        """Return the dataset's response to ``prompts[position]``, numbered like the student's own responses."""
        rollout = reference_rollout(prompts[position], index, self.references, sampling, self.window, step)
        order = response_order(step, position, index, len(prompts), sampling.responses_per_prompt)
        return replace(rollout, order=order)

    def warn_if_empty(self, step: int, rollouts: Sequence[Rollout], metrics: Metrics) -> None:
        """Count steps without responses in ``metrics`` if train_on removes responses; warn of such a step; collective.

        ``step``: number of the training step, from 1. ``rollouts``: the responses of all ranks that the step trained
        on.
        """
        train_on = self.config.distillation.train_on
        if train_on != "all":
            metrics.add_same({"empty_step": float(not rollouts)})
        if rollouts:
            return
        removed = Counter[str]()
        for own in self.world.gather(dict(self._removed)):
            removed.update(own)
        by_grade = removed.pop(f"not {train_on}", 0)
        causes = [f"{by_grade} responses were not graded as {train_on} (distillation.train_on)"] if by_grade else []
        fixes = ["set distillation.train_on=all, or use easier or harder problems"] if by_grade else []
        if dropped := {reason: count for reason, count in removed.items() if count}:
            causes.append(f"no teacher prompt could be built (dropped responses by reason: {dropped})")
            fixes.append(
                "if prompt and response are too long, raise teacher.max_total_sequence_length; if responses have no"
                " trace, change distillation.context_distillation.trace_source"
            )
        log.warning("step %d trained on no responses, because %s: %s", step, " and ".join(causes), "; ".join(fixes))
