"""The demonstration of context self-distillation: real weights, two ranks, 24 steps; `make test-demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.demo_context import follows_rule
from scripts.launch import ROOT, run, torchrun


def test_the_rule_is_told_by_the_first_words_of_an_answer() -> None:
    assert follows_rule("Once upon a time, there were 4.") and follows_rule("\n Once upon a time")
    assert not follows_rule("Ann lived once upon a time. Once upon a time")


@pytest.mark.demo
def test_a_rule_that_only_the_teacher_reads_is_learnt(tmp_path: Path) -> None:
    assert (ROOT / "models/SmolLM2-135M-Instruct/config.json").is_file(), "make models"
    assert run(torchrun(2, "-m", "scripts.demo_context", f"runtime.run_dir={tmp_path}")) == 0
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["kl_last"] < 0.35 * found["kl_first"], found
    assert found["rule_after"] > found["rule_before"], found
    assert found["rule_in_context"] > found["rule_before"], "there is nothing to learn"
