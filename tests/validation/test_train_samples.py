"""Samples of training responses: when they are due, where they are written, and the warning of missing traces."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import Config
from distill.metrics.sinks import Samples
from distill.types import Problem, Prompt, Rollout
from distill.validation.comparison import Comparison, TopTokens
from distill.validation.scores import Sample, jsonl_line
from distill.validation.train_samples import TrainSamples


class Recorder:
    def __init__(self) -> None:
        self.shown: list[tuple[int, Samples]] = []

    def show(self, step: int, samples: Samples) -> None:
        self.shown.append((step, samples))


def decode(ids: Any) -> str:
    return "".join(chr(id_) for id_ in ids)


def rollout(prompt_id: int, response_index: int, response: str) -> Rollout:
    prompt = Prompt(prompt_id, (ord("p"),), Problem(f"problem {prompt_id}", "48", "gsm"))
    ids = tuple(map(ord, response))
    prefix = tuple(map(ord, f"context {prompt_id}"))
    return Rollout(prompt, response_index, ids, (-0.5,) * len(ids), "length", 0, prefix)


def samples_of(tmp_path: Path, template: str | None = None, **logger: int) -> TrainSamples:
    config = Config()
    config = replace(config, logger=replace(config.logger, **logger))  # type: ignore[arg-type]
    if template is not None:
        context = replace(config.distillation.context_distillation, enabled=True, teacher_prefix_template=template)
        config = replace(config, distillation=replace(config.distillation, context_distillation=context))
    return TrainSamples(config, decode, tmp_path, Recorder(), 4, compare)  # type: ignore[arg-type]


def compare(rollouts: Sequence[Rollout], step: int) -> list[Comparison]:
    """Return the step as the KL of each token, and one top token."""
    top = (TopTokens(0, ((ord("x"), 0.5),), ((ord("y"), 0.25),)),)
    kls = [torch.full((len(r.response_ids),), float(step)) for r in rollouts]
    return [Comparison(kl_R, 2 * kl_R, top) for kl_R in kls]


def record(samples: TrainSamples, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Compare and record the responses of step 5; return the rows of the file."""
    samples.record(5, samples.compared(5, rollouts))
    lines = (samples.run_dir / "train_samples/step_5.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_samples_are_due_at_the_first_step_and_periodically(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, train_samples_period=10)
    assert [step for step in range(5, 31) if samples.due(step)] == [5, 10, 20, 30]
    assert not samples_of(tmp_path, num_train_samples_to_print=0).due(5)


def test_samples_are_responses_to_different_prompts_in_all_places(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, num_train_samples_to_print=2)
    rollouts = [rollout(7, 0, "one"), rollout(7, 1, "two"), rollout(8, 0, "three")]
    samples.record(6, [])
    assert not list(tmp_path.iterdir()), "not due"
    rows = record(samples, rollouts)
    assert [(row["prompt_id"], row["answer"], row["gold"]) for row in rows] == [(7, "one", "48"), (8, "three", "48")]
    ((step, shown),) = samples.recorder.shown  # type: ignore[attr-defined]
    assert (step, shown.group) == (5, "train")
    columns = {"prompt_id", "source", "prompt", "answer", "gold", "verdict", "finish", "tokens"}
    assert [{k: table[k] for k in columns} for table in shown.rows] == [{k: row[k] for k in columns} for row in rows]
    assert [table["mean_reverse_kl"] for table in shown.rows] == [10.0, 10.0]
    assert [text.count(word) for text, word in zip(shown.texts, ("one", "three"), strict=True)] == [1, 1]


def test_a_sample_has_the_fields_of_a_validation_and_the_step_of_its_weights(tmp_path: Path) -> None:
    (row,) = record(samples_of(tmp_path, template="{problem}"), [rollout(7, 0, "one")])
    assert row.pop("weights_step") == 5
    assert row["teacher_prompt"] == "context 7" and row["forward_kl"] == [5.0] * 3
    assert row["top_tokens"] == [{"at": 0, "student": [[120, "x", 0.5]], "teacher": [[121, "y", 0.25]]}]
    sample = Sample(rollout(7, 0, "one"), "gsm", **vars(compare([rollout(7, 0, "one")], 5)[0]))
    assert json.loads(jsonl_line(sample, decode)) == row


def test_the_console_omits_the_middle_of_a_long_response(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    record(samples, [rollout(7, 0, "a" * 5000 + "the end")])
    ((_, shown),) = samples.recorder.shown  # type: ignore[attr-defined]
    assert len(shown.texts[0]) < 1700 and "the end" in shown.texts[0]
    assert "a" * 5000 in (tmp_path / "train_samples/step_5.jsonl").read_text()


@pytest.mark.parametrize(
    ("template", "coverage", "warns"),
    [
        ("{problem} {trace}", 0.49, True),
        ("{problem} {trace}", 0.5, False),
        ("{problem}", 0.0, False),
        (None, 0.0, False),
    ],
)
def test_a_first_step_with_few_traces_warns(
    template: str | None, coverage: float, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"train/context_distillation_trace_coverage": coverage}
    with caplog.at_level(logging.WARNING):
        samples_of(tmp_path, template).warn_of_missing_traces(1, values)
    assert bool(caplog.records) is warns
    assert not warns or "49%" in caplog.messages[0]
