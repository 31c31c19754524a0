"""Grading of training responses: datasets that can be graded, refusals, and worker processes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, load_config
from distill.data.prompts import Prompts, load_prompts
from distill.data.train_grader import Graders, TrainGrader, find_graders, gold_hashes
from distill.errors import UserError
from distill.supervise.signals import SIGNALS
from distill.types import Problem, Prompt, Rollout
from tests.harness import REPO
from tests.tiny_tokenizer import THINK, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROSE = "First we add the numbers and then we look at the result, which is clearly equal to two."


def config_of(folder: Path, *sets: tuple[str | None, list[str]], train_on: str = "all", repeat: int = 1) -> Config:
    """Return a recipe with one dataset for each (grader, gold answers)."""
    entries = []
    for i, (grader, golds) in enumerate(sets):
        path = folder / f"{i}.jsonl"
        rows = [{"question": f"{i}: {row}?", "answer": gold} for row, gold in enumerate(golds)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"data_path": str(path), "env_name": grader, "repeat": repeat})
    base = ["--config", str(REPO / "recipes/distillation_math.yaml"), "data.default.prompt_file=null"]
    keys = ["data.default.input_key=question", "data.default.output_key=answer"]
    return load_config([*base, *keys, f"data.train={json.dumps(entries)}", f"distillation.train_on={train_on}"])


def graders(config: Config) -> tuple[Graders, Prompts]:
    found = load_prompts(config.data.train, TOKENIZER, 100)
    return find_graders(config, found), found


def refusal(config: Config) -> UserError:
    with pytest.raises(UserError) as caught:
        graders(config)
    assert "\n" not in str(caught.value)
    return caught.value


def test_each_problem_has_the_grader_of_its_dataset_and_none_without_gold(tmp_path: Path) -> None:
    sets = [("exact", ["1", "", "3"]), (None, ["4"]), ("choice", ["A", "B"]), ("exact", [""])]
    found, prompts = graders(config_of(tmp_path, *sets, repeat=2))
    names = [found.of(prompt) for prompt in prompts]
    one = ["exact", None, "exact"]
    assert names == [*one, *one, None, None, *["choice"] * 4, None, None]
    assert found.starts == (0, 6, 8, 12)


@pytest.mark.parametrize(
    ("grader", "golds", "graded"),
    [
        ("math", ["1", "2.5", PROSE], True),
        ("math", [PROSE, PROSE, "1"], False),
        ("choice", ["A", "B", "maybe"], True),
        ("choice", ["yes", "no", "A"], False),
        ("regex", ["(", "[", "a"], False),
        ("exact", ["a\nb", "c\nd", "e"], False),
    ],
)
def test_only_datasets_whose_gold_answers_the_grader_can_use_are_graded(
    grader: str, golds: list[str], graded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "distill"):
        found, _ = graders(config_of(tmp_path, (grader, golds)))
    assert found.names == ((grader,) if graded else (None,))
    assert ("train/accuracy" in caplog.text) is not graded


def test_without_the_package_of_the_grader_nothing_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.grading.find_spec", lambda name: None)
    assert graders(config_of(tmp_path, ("math", ["1"])))[0].names == (None,)
    assert refusal(config_of(tmp_path, ("math", ["1"]), train_on="right")).key == "data.train.env_name"


@pytest.mark.parametrize(
    ("sets", "key", "named"),
    [
        ([(None, ["1"])], "data.train.env_name", "null"),
        ([("exact", ["1", ""])], "data.train.output_key", "problem 2 "),
        ([("exact", ["1"]), ("exact", ["2", ""])], "data.train.1.output_key", "problem 3 "),
        ([("exact", ["1"]), (None, ["2"])], "data.train.1.env_name", "null"),
        ([("choice", ["A", "B", "maybe"])], "data.train.env_name", "maybe"),
        ([("math", [PROSE, PROSE])], "data.train.env_name", "math"),
    ],
)
@pytest.mark.parametrize("train_on", ["right", "wrong"])
def test_data_that_cannot_be_graded_is_refused_if_the_grade_selects_responses(
    sets: Any, key: str, named: str, train_on: str, tmp_path: Path
) -> None:
    error = refusal(config_of(tmp_path, *sets, train_on=train_on))
    assert error.key == key and named in error.problem


def test_a_changed_gold_answer_is_a_change_of_the_data_only_if_it_selects_responses() -> None:
    recipe = ["--config", str(REPO / "recipes/distillation_math.yaml")]
    right = load_config([*recipe, "distillation.train_on=right"])
    other = load_config([*recipe, "distillation.train_on=right", "data.train.env_name=exact"])
    problems, changed = [Problem("p", "1"), Problem("q", "2")], [Problem("p", "1"), Problem("q", "3")]
    found = [gold_hashes(right, problems), gold_hashes(right, changed), gold_hashes(other, problems)]
    assert len({each["golds"] for each in found}) == 3
    assert gold_hashes(load_config(recipe), problems) == {}


def rollout(text: str, gold: str, finish: Any = "stop", inside: bool = False) -> Rollout:
    ids = (*TOKENIZER(text)["input_ids"], *([258] if finish == "stop" else []))
    return Rollout(Prompt(0, (1,), Problem("p", gold), inside), 0, ids, (), finish, 0)


def train_grader(name: str, think_tags: tuple[str, str] = THINK) -> TrainGrader:
    return TrainGrader(Graders((name,)), lambda ids: str(TOKENIZER.decode(list(ids))), think_tags)


def test_the_text_after_the_reasoning_is_graded_as_in_validation() -> None:
    given = [
        rollout("<think>3</think>2", "2"),
        rollout("3</think>2", "2", inside=True),
        rollout("2", "2", inside=True),
        rollout("2", "2", "length"),
        rollout("2", ""),
    ]
    assert [*map(train_grader("exact").verdict, given)] == ["right", "right", "wrong", "right", None]
    other = rollout("(3)2", "2")
    assert [train_grader("exact", tags).verdict(other) for tags in (("(", ")"), THINK)] == ["right", "wrong"]


def test_the_worker_process_of_a_grader_serves_all_steps_until_it_is_closed() -> None:
    found = train_grader("regex")
    assert found.verdict(rollout("ab", "b$")) == "right"
    first = found._grade._workers["regex"]._process
    for number in SIGNALS:  # a scheduler signals every process, and the run finishes its step
        os.kill(first.pid, number)
    assert found.verdict(rollout("ba", "b$")) == "wrong"
    assert found._grade._workers["regex"]._process is first and first.poll() is None
    found.close()
    assert first.poll() is not None and not found._grade._workers
