"""Arithmetic of the demonstrations; with `make test-demo` also the claims of one, with real weights on two ranks."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest

from scripts.demo import RUNS
from scripts.experiments import compared, rise
from scripts.launch import ROOT, run


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
