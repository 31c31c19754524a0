"""The soak's judgement: a planted leak is found, and noise is none."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scripts.soak import WORTH_A_LOOK, growth, steps_done

STEPS = 250


def noisy(step: int, rng: random.Random) -> float:
    return 800 + rng.gauss(0, 2) + 5 * (step % 25 == 0)  # a checkpoint now and then


LEAKS: dict[str, tuple[str, Callable[[int, random.Random], float]]] = {
    "100 KiB a step": ("memory MiB", lambda step, rng: noisy(step, rng) + 0.1 * step),
    "1 MiB a checkpoint": ("memory MiB", lambda step, rng: noisy(step, rng) + step // 25),
    "a file a checkpoint": ("open files", lambda step, rng: 20 + step // 25),
    "a file that is closed late, and another kept": ("open files", lambda step, rng: 20 + step // 80 + step % 3),
    "two threads in all": ("threads", lambda step, rng: 12 + step // 100),
    "shared memory": ("shared memory MiB", lambda step, rng: step / 25),
}
NOISE: dict[str, tuple[str, Callable[[int, random.Random], float]]] = {
    "nothing": ("threads", lambda step, rng: 12),
    "a jitter": ("memory MiB", noisy),
    "less than an allocator's page a step": ("memory MiB", lambda step, rng: noisy(step, rng) + 0.004 * step),
    "a tide": ("memory MiB", lambda step, rng: noisy(step, rng) + 20 * (step // 60 % 2)),
    "a fall": ("memory MiB", lambda step, rng: noisy(step, rng) - 0.1 * step),
    "files opened and closed": ("open files", lambda step, rng: 20 + rng.randrange(4)),
}


@pytest.mark.parametrize("what", LEAKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_leak_is_found(what: str, seed: int) -> None:
    quantity, holds = LEAKS[what]
    rng = random.Random(seed)
    found = growth(quantity, [holds(step, rng) for step in range(STEPS)])
    assert found.leaks, found
    assert found.end > found.start


@pytest.mark.parametrize("what", NOISE)
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_leak(what: str, seed: int) -> None:
    quantity, holds = NOISE[what]
    rng = random.Random(seed)
    found = growth(quantity, [holds(step, rng) for step in range(STEPS)])
    assert not found.leaks, found


def test_a_line_without_noise_is_measured_exactly() -> None:
    found = growth("memory MiB", [3.0 + 0.5 * step for step in range(100)])
    assert found.grown == pytest.approx(50.0) and found.error == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="9 values are too few for 10 stretches"):
        growth("memory MiB", [1.0] * 9)
    assert set(WORTH_A_LOOK) == {"memory MiB", "open files", "threads", "child processes", "shared memory MiB"}


def test_a_step_counts_when_its_line_is_whole(tmp_path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert steps_done(metrics) == 0
    metrics.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss"')
    assert steps_done(metrics) == 1
    metrics.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 1, "validation/accuracy": 0.5}\n')
    assert steps_done(metrics) == 1
