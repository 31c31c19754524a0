"""Probe: find out from where a candidate teacher still repairs the student's responses to held-out problems.

The student generates responses. From several positions of each response, each candidate generates the rest: the student
with a context in its prompt, or another model. The student's own continuation from the same tokens, without context, is
the control. The responses are graded, and student and candidate are compared at each token.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from distill.data.teacher_prefix import Prefix, TeacherPrefixes
from distill.errors import writing_run
from distill.metrics.phases import Phases
from distill.rollout.engine import Engine
from distill.rollout.gather import gather_rollouts
from distill.rollout.requests import response_limit, stream_seed
from distill.run_files import PROBE_FOLDER
from distill.supervise.stop import StopRequested
from distill.types import Prompt, Rollout, Sampling
from distill.validation.probe_advice import Lengths, Recommendation, recommend
from distill.validation.probe_continuations import (
    Continuation,
    by_start,
    continuations,
    joined,
    joined_at_start,
    percentile,
    prompts_at_start,
)
from distill.validation.probe_report import as_json, as_metrics, as_text
from distill.validation.probe_stats import STARTS, CandidateResult, Kind, by_position, candidate_result
from distill.validation.validation import Generated, Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model and a prompt that may become the teacher of a run."""

    name: str
    kind: Kind
    prefixes: TeacherPrefixes
    """Builds the prompt that the candidate reads before a response."""
    is_compared: bool = True
    """Whether the run's teacher has this candidate's weights, so that the comparison of tokens applies to it."""
    lines: tuple[str, ...] = ()
    """Settings (key.path=value) that make this candidate the teacher of a run."""


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the probes of a run."""

    period: int
    """Number of steps between probes; 0: no periodic probe."""
    candidates: tuple[Candidate, ...]
    max_new_tokens: int
    """The recipe's limit of a response in training."""
    val_max_new_tokens: int
    """Limit of a complete response in the probe: the kept tokens and the continuation."""
    measured_at: int = -1
    """Step of the loaded checkpoint if its probe need not be repeated; otherwise -1."""


@dataclass(frozen=True)
class ProbeOutput:
    """Results of a probe; equal on all ranks."""

    step: int
    results: tuple[CandidateResult, ...]
    lengths: Lengths
    recommendation: Recommendation


@dataclass
class Probed:
    """Responses and continuations of a probe, before they are graded."""

    step: int
    phases: Phases
    bases: list[Rollout]
    """The student's responses on all ranks."""
    control: list[Rollout]
    """This rank's responses that the student continued without context, with the start in their response index."""
    limits: Mapping[int, int]
    """Maps a prompt id to the maximum number of tokens of a complete response."""
    continued: dict[str, list[Rollout]] = field(default_factory=dict)
    """This rank's responses that each candidate continued."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of problems that lack a column of the context or leave too little space, for each candidate."""


@dataclass
class ProbedValidation(Validation):
    """Validation of a run that also probes the student; all ranks call its methods together.

    ``generate`` and ``report`` include the probe after the steps in which it is due. They have the requirements of the
    base class: ``generate`` needs the engine awake, ``report`` needs it asleep.
    """

    probe: ProbeConfig | None = None
    _probed: Probed | None = None

    @property
    def _settings(self) -> ProbeConfig:
        assert self.probe is not None, "build gives a ProbedValidation its settings"
        return self.probe

    @property
    def needs_teacher_engine(self) -> bool:
        """Return whether a candidate has other weights than the student, so that ``continue_with`` must be called."""
        return any(candidate.kind == "teacher" for candidate in self._settings.candidates)

    def probe_due(self, step: int) -> bool:
        """Return whether the weights after ``step`` finished steps must be probed."""
        period = self._settings.period
        return period > 0 and step > 0 and step % period == 0 and step != self._settings.measured_at

    def due(self, step: int) -> bool:
        """Return whether a validation or a probe is due after ``step`` finished steps."""
        return super().due(step) or self.probe_due(step)

    def generate(self, step: int) -> Generated | None:
        """Generate the responses of validation and probe, if they are due; see the base class."""
        generated = super().generate(step) if super().due(step) else None
        self._probed = self.generate_probe(step) if self.probe_due(step) else None
        return generated

    def report(self, generated: Generated | None) -> None:
        """Grade and report validation and probe, if they were due; see the base class."""
        stopped: StopRequested | None = None
        try:
            super().report(generated)
        except (
            StopRequested
        ) as stop:  # an alarm, on all ranks; the probe of this step is complete and is reported first
            stopped = stop
        probed, self._probed = self._probed, None
        if probed is not None:
            self._report_of_run(probed)
        if stopped is not None:
            raise stopped

    def _report_of_run(self, probed: Probed) -> None:
        """Report a probe of a run; raise StopRequested on all ranks if an alarm stops the run; collective."""
        output = self.report_probe(probed)
        timing = {f"timing/validation/{name}": value for name, value in probed.phases.seconds.items()}
        values = as_metrics(output.results) | timing
        values |= self.alarms.check(probed.step, values)
        with self.world.all_or_none("recording the probe"):
            self.recorder.record(probed.step, values)
        self.write_probe(output, f"{PROBE_FOLDER}/step_{probed.step}.json")
        self.alarms.raise_if_stopped(probed.step)

    def generate_probe(self, step: int) -> Probed:
        """Generate the student's responses and the continuations by the student; collective.

        The student continues its responses without context and with the context of each candidate of kind ``context``.
        If any rank requests a stop, puts the engine to sleep and raises StopRequested on all ranks. ``step``: number of
        finished steps.
        """
        phases = Phases(self.world.device)
        with phases("probe_generation"):
            prompts = [prompt for prompt in self.held_out.prompts if self.held_out.grader(prompt) is not None]
            sampling = self._responses_sampling
            limits = {p.prompt_id: response_limit(sampling, p, self.engine.window) for p in prompts}
            own = self._sampled(prompts, sampling, step)
            bases = gather_rollouts(self.world, own, prompts, version=step)
            # At the start 0 the control is the response itself.
            probed = Probed(step, phases, bases, joined_at_start(prompts, own), limits)
            plain = {p.prompt_id: Prefix(p.student_ids, p.inside_thought) for p in prompts}
            probed.control += self._continued(continuations(bases, STARTS[1:], plain, limits), step)
            for candidate in self._settings.candidates:
                if candidate.kind == "context":
                    self._add(probed, candidate)
        return probed

    def continue_with(self, engine: Engine, probed: Probed) -> None:
        """Add the continuations by the candidates of kind ``teacher``, whose weights ``engine`` has; collective."""
        other = replace(self, engine=engine)
        with probed.phases("probe_generation"):
            for candidate in self._settings.candidates:
                if candidate.kind == "teacher":
                    other._add(probed, candidate)

    def _add(self, probed: Probed, candidate: Candidate) -> None:
        """Add the continuations by ``candidate``, whose weights the engine has; collective."""
        prompts = list({base.prompt.prompt_id: base.prompt for base in probed.bases}.values())
        with self.world.all_or_none("building the contexts of held-out problems"):
            prefixes = self._usable_prefixes(candidate, prompts, probed.limits)
            found = continuations(probed.bases, STARTS[1:], prefixes, probed.limits)
        probed.skipped[candidate.name] = len(prompts) - len(prefixes)
        # As in the student's responses, so that equal prompts have equal responses. The prompts contain the context, so
        # the limits are those of the prompts.
        sampling = replace(self._responses_sampling, max_total_length=None)
        own = self._sampled(prompts_at_start(prompts, prefixes, probed.limits), sampling, probed.step)
        probed.continued[candidate.name] = joined_at_start(prompts, own) + self._continued(found, probed.step)

    def _usable_prefixes(
        self, candidate: Candidate, prompts: Sequence[Prompt], limits: Mapping[int, int]
    ) -> dict[int, Prefix]:
        """Return the candidate's prompt for each prompt id, without unreadable or too long problems."""
        readable = [prompt for prompt in prompts if candidate.prefixes.can_read(prompt.problem)]
        found = {prompt.prompt_id: candidate.prefixes.prefix_of(prompt) for prompt in readable}
        return {
            id_: prefix
            for id_, prefix in found.items()
            if isinstance(prefix, Prefix) and fits(prefix, limits[id_], self.engine.window)
        }

    def _continued(self, found: Sequence[Continuation], step: int) -> list[Rollout]:
        # The prompts contain tokens of the responses, so the limits are those of the prompts.
        seed = stream_seed(self.config.seed, "probe continuations")
        sampling = replace(self._responses_sampling, seed=seed, responses_per_prompt=1, max_total_length=None)
        return joined(found, self._sampled([each.prompt for each in found], sampling, step))

    def _sampled(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Rollout]:
        """Generate on this rank's engine; raise StopRequested on all ranks if any rank requests a stop; collective."""
        self._raise_if_stop_requested(step)
        rollouts = self.engine.generate(self.engine.share_of(prompts), sampling, step, cancelled=self.stop.has_signal)
        self._raise_if_stop_requested(step)  # a signal cancels the generation, so the responses are incomplete
        return rollouts

    @property
    def _responses_sampling(self) -> Sampling:
        seed = stream_seed(self.config.seed, "probe responses")
        return replace(self.sampling, seed=seed, max_new_tokens=self._settings.val_max_new_tokens)

    def report_probe(self, probed: Probed) -> ProbeOutput:
        """Grade the responses, compare student and candidates, and return the results; collective.

        The engine must be asleep.
        """
        with probed.phases("probe_judging"):
            control = by_start(self._graded(probed.control, probed.step))
            results = [
                candidate_result(
                    *(candidate.name, candidate.kind),
                    by_start(self._graded(probed.continued[candidate.name], probed.step)),
                    control,
                    probed.skipped[candidate.name],
                )
                for candidate in self._settings.candidates
            ]
        with probed.phases("probe_comparison"):
            results = [
                self._with_comparison(result, candidate, probed)
                for result, candidate in zip(results, self._settings.candidates, strict=True)
            ]
        tokens = [len(base.response_ids) for base in probed.bases]
        lengths = Lengths(
            percentile(tokens, 90) if tokens else 1, self._settings.max_new_tokens, self._settings.val_max_new_tokens
        )
        return ProbeOutput(probed.step, tuple(results), lengths, recommend(results, lengths))

    def _with_comparison(self, result: CandidateResult, candidate: Candidate, probed: Probed) -> CandidateResult:
        """Return the result with the KL by position, if the run's teacher is the candidate; collective."""
        result = replace(result, lines=candidate.lines)
        if not candidate.is_compared:
            return result
        view = replace(self, teacher_prefixes=candidate.prefixes)
        read = [rollout for rollout in view._with_prefixes(probed.bases) if rollout.teacher_prefix_ids]
        return replace(result, tenths=by_position(self.compare(read, probed.step, overlap=True)))

    def write_probe(self, output: ProbeOutput, name: str) -> None:
        """Log the results and write them to the file ``name`` of the run directory, on rank 0; collective."""
        text = as_text(output.step, output.results, output.lengths, output.recommendation)
        with self.world.all_or_none("writing the probe"), writing_run(self.run_dir):
            if self.world.is_main:
                log.info("\n%s", text)
                path = self.run_dir / name
                path.parent.mkdir(parents=True, exist_ok=True)
                found = as_json(output.step, output.results, output.lengths, output.recommendation)
                _write(path, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
                _write(path.with_suffix(".txt"), text + "\n")


def _write(path: os.PathLike[str], text: str) -> None:
    part = f"{os.fspath(path)}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)


def fits(prefix: Prefix, limit: int, window: int) -> bool:
    """Return whether a response of ``limit`` tokens fits after ``prefix`` into the engine's ``window``."""
    return len(prefix.token_ids) + limit <= window


def with_probe(validation: Validation, settings: ProbeConfig) -> ProbedValidation:
    """Return ``validation`` with probes; collective.

    The probe of the step at which the run starts is not repeated if the run directory has its results.
    """
    first = validation.config.first_step
    is_measured = validation.world.broadcast((validation.run_dir / PROBE_FOLDER / f"step_{first}.json").exists())
    return ProbedValidation(**vars(validation), probe=replace(settings, measured_at=first if is_measured else -1))
