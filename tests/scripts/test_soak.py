"""Leak detection of the soak test: it finds a leak in synthetic values, and no leak in noise."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scripts.soak import INTERVALS, PERIOD, TAIL, TOLERANCE, growth, steps_done

STEPS = INTERVALS * PERIOD


def noisy(step: int, rng: random.Random) -> float:
    return 800 + rng.gauss(0, 2) + 5 * (step % PERIOD == 0)  # a checkpoint returns memory


LEAKS: dict[str, tuple[str, Callable[[int, random.Random], float]]] = {
    "100 KiB per step": ("memory MiB", lambda step, rng: noisy(step, rng) + 0.1 * step),
    "1 MiB per checkpoint": ("memory MiB", lambda step, rng: noisy(step, rng) + step // PERIOD),
    "a file per checkpoint": ("open files", lambda step, rng: 20 + step // PERIOD),
    "a file per 80 steps, and some that are closed late": ("open files", lambda step, rng: 20 + step // 80 + step % 3),
    "a thread": ("threads", lambda step, rng: 12 + step // 100),
    "shared memory": ("shared memory MiB", lambda step, rng: step / 25),
}
NOISE: dict[str, tuple[str, Callable[[int, random.Random], float]]] = {
    "constant": ("threads", lambda step, rng: 12),
    "jitter": ("memory MiB", noisy),
    "less than a page per step": ("memory MiB", lambda step, rng: noisy(step, rng) + 0.004 * step),
    "periodic": ("memory MiB", lambda step, rng: noisy(step, rng) + 20 * (step // 60 % 2)),
    "decrease": ("memory MiB", lambda step, rng: noisy(step, rng) - 0.1 * step),
    "files opened and closed": ("open files", lambda step, rng: 20 + rng.randrange(4)),
}


@pytest.mark.parametrize("what", LEAKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_leak_is_detected(what: str, seed: int) -> None:
    quantity, value_at = LEAKS[what]
    rng = random.Random(seed)
    found = growth(quantity, [value_at(step, rng) for step in range(STEPS)])
    assert found.leaks, found
    assert found.end > found.start


@pytest.mark.parametrize("what", NOISE)
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_a_leak(what: str, seed: int) -> None:
    quantity, value_at = NOISE[what]
    rng = random.Random(seed)
    found = growth(quantity, [value_at(step, rng) for step in range(STEPS)])
    assert not found.leaks, found


def test_linear_growth_without_noise_is_measured_exactly() -> None:
    found = growth("memory MiB", [3.0 + 0.5 * step for step in range(100)])
    assert found.grown == pytest.approx(50.0) and found.error == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"^9 measured"):
        growth("memory MiB", [1.0] * 9)
    assert set(TOLERANCE) == {"memory MiB", "open files", "threads", "child processes", "shared memory MiB"}


def test_a_step_counts_if_its_line_is_complete(tmp_path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert steps_done(metrics) == 0
    metrics.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss"')
    assert steps_done(metrics) == 1
    metrics.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 1, "validation/accuracy": 0.5}\n')
    assert steps_done(metrics) == 1
    metrics.write_text(TAIL * " " + '\n{"step": 7, "train/loss": 2.0}\n')
    assert steps_done(metrics) == 7
