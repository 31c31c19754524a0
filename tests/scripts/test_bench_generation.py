"""The benchmark of generation schedules: its tables, its goal, and its conclusion about a shared queue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts import bench_generation

SMALL = replace(bench_generation.QUICK, batches=(8,), simulated=300)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generation, "QUICK", SMALL)


def test_the_default_settings_reach_the_goal_and_the_formula_is_printed(capsys) -> None:
    assert bench_generation.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "max(" in lines[1] and lines[-1] == "passed"
    rows = [line.split() for line in lines if line.strip().startswith("8 ")]
    assert {"lockstep", "0.9,"} <= {row[1] for row in rows}


def test_a_missed_goal_is_an_exit_code(capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_generation, "GOALS", {8: 0.3})
    assert bench_generation.main(["--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED"


@pytest.mark.parametrize(("worth", "verdict"), [(0.5, "is not built"), (-0.5, "is worth building")])
def test_the_conclusion_about_the_queue_follows_from_its_gain(worth, verdict, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_generation, "WORTH", worth)
    bench_generation.main(["--quick"])
    assert verdict in capsys.readouterr().out
