"""Show samples of training responses: console, train_samples/step_N.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import Config
from distill.data.teacher_context import reads_traces
from distill.data.teacher_prefix import TRACE_COVERAGE
from distill.errors import writing_run
from distill.metrics.sinks import Recorder, Samples
from distill.run_files import TRAIN_SAMPLES_FOLDER
from distill.types import Rollout
from distill.validation.comparison import Compare
from distill.validation.scores import Sample, format_sample, table_row, write_samples
from distill.validation.token_texts import Decode

log = logging.getLogger(__name__)

_MIN_COVERAGE = 0.5
"""Fraction of responses with a trace in the first step, below which a warning is logged."""
_CONSOLE_CHARACTERS = 1500
"""Maximum number of characters of a sample on the console; the files have the complete texts."""


@dataclass(frozen=True)
class TrainSamples:
    """Compares a few training responses at some steps with the teacher, shows and stores them."""

    config: Config
    decode: Decode
    run_dir: Path
    recorder: Recorder
    first_step: int
    """Number of finished steps when this process starts; the samples of the step after it are shown."""
    compare: Compare

    def due(self, step: int) -> bool:
        """Return whether samples of step ``step`` (counted from 1) are shown."""
        settings = self.config.logger
        is_due = step == self.first_step + 1 or step % settings.train_samples_period == 0
        return is_due and settings.num_train_samples_to_print > 0

    def compared(self, step: int, rollouts: Sequence[Rollout]) -> list[Sample]:
        """Return the first responses to the first prompts of step ``step``, compared with the teacher; collective.

        ``rollouts``: all rollouts of the step, the same on every rank. Both models have their weights after the step:
        the comparison shows what is left to learn at the tokens of the responses on which the step trained.
        """
        shown = sorted(rollouts, key=lambda rollout: rollout.response_index)
        shown = shown[: self.config.logger.num_train_samples_to_print]
        compared = zip(shown, self.compare(shown, step), strict=True)
        return [Sample(rollout, rollout.prompt.problem.source, **vars(found)) for rollout, found in compared]

    def record(self, step: int, samples: Sequence[Sample]) -> None:
        """Show and store the samples of step ``step``; call it on the main rank only.

        The key ``weights_step`` of a row is the number of finished steps of the weights that were compared.
        """
        if not samples:
            return
        with writing_run(self.run_dir):
            write_samples(
                self.run_dir / TRAIN_SAMPLES_FOLDER / f"step_{step}.jsonl", samples, self.decode, weights_step=step
            )
        texts = [
            f"training sample {i} of step {step}\n{_shortened(format_sample(sample, self.decode))}"
            for i, sample in enumerate(samples, 1)
        ]
        rows = [table_row(sample, self.decode) for sample in samples]
        self.recorder.show(step, Samples("train", texts, rows))

    def warn_of_missing_traces(self, step: int, values: Mapping[str, float]) -> None:
        """Log a warning if the teacher reads no trace for most responses of ``step``.

        ``values``: metrics of the step, reduced over ranks.
        """
        coverage = values.get(f"train/{TRACE_COVERAGE}", 1.0)
        if shows_traces(self.config) and coverage < _MIN_COVERAGE:
            context = self.config.distillation.context_distillation
            log.warning(
                "only %.0f%% of the responses of step %d have a trace (train/%s), so {trace} in the teacher's prompt"
                " is empty for the other responses: %s, or remove {trace} from"
                " distillation.context_distillation.teacher_prefix_template",
                *(100 * coverage, step, TRACE_COVERAGE),
                f"check the texts in the column {context.trace_column}"
                if context.trace_column
                else "use a model that writes the tags trace_extractor.think_tags, raise"
                " policy.generation.max_new_tokens or distillation.max_new_tokens_schedule if responses are truncated",
            )


def shows_traces(config: Config) -> bool:
    """Return whether the teacher's prompts contain traces, so that the fraction with a trace is shown."""
    context = config.distillation.context_distillation
    return context.enabled and reads_traces(context)


def _shortened(text: str) -> str:
    """Return ``text`` without its middle if it is long; the end shows how the response stopped."""
    if len(text) <= _CONSOLE_CHARACTERS:
        return text
    half = _CONSOLE_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
