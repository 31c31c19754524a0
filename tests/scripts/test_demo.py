"""Arithmetic and settings of the demonstrations.

With `make test-demo` also the claims of one of them, with real weights on two ranks.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import load_config
from distill.data.teacher_prefix import Prefix, build_context_prefixes, build_teacher_prefixes
from distill.types import Problem, Prompt
from scripts import demo, experiments
from scripts.demo import RUNS
from scripts.experiments import compared, rise
from scripts.launch import ROOT, run
from tests.tiny_tokenizer import tiny_tokenizer


def _samples(*problems: str, kl: float = 1.0) -> list[dict[str, Any]]:
    """Return samples of validation: one word per problem, one letter per response (r: right, w: wrong)."""
    return [
        {"prompt_id": i, "verdict": {"r": "right", "w": "wrong"}[letter], "forward_kl": [kl, 3 * kl]}
        for i, letters in enumerate(problems)
        for letter in letters
    ]


def test_the_interval_of_a_rise_has_the_problems_as_its_sample() -> None:
    rose = rise(_samples("ww", "wr", "ww"), _samples("rr", "wr", "wr"))
    # differences by problem 1, 0, 1/2: mean 1/2, variance 1/4, standard error 1/2 / sqrt(3)
    half = 1.959964 * 0.5 / math.sqrt(3)
    assert rose.difference == 0.5
    assert rose.low == pytest.approx(0.5 - half, abs=1e-6) and rose.high == pytest.approx(0.5 + half, abs=1e-6)
    assert rise(_samples("wwww", "rw"), _samples("rrrr", "rw")) == rise(_samples("w", "r"), _samples("r", "r"))


def test_closed_is_the_fraction_of_the_kl_that_was_removed() -> None:
    found = compared(_samples("ww", "wr", kl=0.2), _samples("rr", "wr", kl=0.05))
    assert (found["responses"], found["rule_before"], found["rule_after"], found["rise"]) == (4, 0.25, 0.75, 0.5)
    assert found["kl_before"] == pytest.approx(0.4) and found["kl_after"] == pytest.approx(0.1)
    assert found["closed"] == pytest.approx(0.75)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the training by files of a run without an effect; return the commands that demonstrations start."""
    started: list[list[str]] = []

    def run(command: list[str]) -> int:
        started.append(command)
        folder = next(word for word in command if word.startswith("runtime.run_dir=")).partition("=")[2]
        validation = tmp_path / folder / "validation"
        validation.mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text('{"step": 3}\n')
        lines = "".join(json.dumps(sample | {"answer": ""}) + "\n" for sample in _samples("rw", "ww", "ww"))
        for name in ("step_0", "step_3", "in_context"):
            (validation / f"{name}.jsonl").write_text(lines)
        return 0

    monkeypatch.chdir(ROOT)  # recipes are relative to it
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(demo, "RUNS", tmp_path / "runs")
    return started


def test_the_teacher_of_the_control_reads_the_students_prompt_and_that_of_the_demonstration_does_not(
    commands: list[list[str]],
) -> None:
    demo.context([])
    demo.control([])
    prompt = Prompt(0, (5, 6, 7), Problem("1+1?", "2"))
    context, control = (load_config(command[command.index("--config") :]) for command in commands)
    read = [build_teacher_prefixes(config, tiny_tokenizer()).prefix_of(prompt) for config in (context, control)]
    assert read[1] == Prefix((5, 6, 7), inside_thought=False)
    assert isinstance(read[0], Prefix) and "Once upon a time" in tiny_tokenizer().decode(read[0].token_ids)
    compared_with = build_context_prefixes(control, tiny_tokenizer()).prefix_of(prompt)
    assert compared_with == read[0], "validation compares with the teacher that reads the context"
    loop = replace(control.distillation, control=False)
    assert replace(control, distillation=loop, runtime=context.runtime) == context, "all other settings are equal"


def test_the_demonstration_of_adapters_differs_from_that_of_all_weights_in_adapters_and_rate(
    commands: list[list[str]],
) -> None:
    demo.context([])
    demo.context_lora([])
    full, lora = (load_config(command[command.index("--config") :]) for command in commands)
    assert lora.policy.dtensor_cfg.lora_cfg.enabled and lora.policy.dtensor_cfg.lora_cfg.dim == 16
    assert full.runtime.run_dir != lora.runtime.run_dir
    policy = replace(lora.policy, dtensor_cfg=full.policy.dtensor_cfg, optimizer=full.policy.optimizer)
    assert replace(lora, policy=policy, runtime=full.runtime, logger=full.logger) == full


@pytest.mark.parametrize(("value", "name"), [("1", "context-lora"), ("0", "context"), ("", "context")])
def test_make_demo_context_trains_adapters_only_with_the_value_1(value: str, name: str) -> None:
    command = ["make", "-n", "--no-print-directory", "demo-context", f"LORA={value}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.splitlines()[-1].endswith(f"scripts.demo {name}"), printed


def test_a_run_without_an_effect_is_a_control_and_no_demonstration(commands: list[list[str]]) -> None:
    assert all(demo.control([])["claims"].values())
    assert not any(demo.context([])["claims"].values())


@pytest.mark.demo
def test_the_student_learns_a_rule_that_only_the_teacher_reads() -> None:
    """Uses fewer steps and responses than `make demo-context`, because slow machines take 30 s per step."""
    assert (ROOT / "models/SmolLM2-135M-Instruct/config.json").is_file(), "make models"
    few = ("distillation.max_num_steps=24", "distillation.max_val_samples=32")
    assert run([sys.executable, "-m", "scripts.demo", "context", *few]) == 0
    found = json.loads((RUNS / "context/demo.json").read_text())
    assert (found["responses"], found["steps"]) == (64, 24)
    assert found["closed"] >= 0.6 and found["rise_low"] > 0, found
    assert found["rule_in_context"] > found["rule_before"], "the context has no effect"
