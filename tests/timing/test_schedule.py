"""The simulated generation phases: hand-worked cases, a twin that generates token by token, and invariants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from distill.config import DistillationConfig
from distill.config.loop import PartialRolloutsConfig
from distill.metrics.step import waits
from distill.timing.decode import DecodeCost
from distill.timing.lengths import Lengths
from distill.timing.queue import lockstep_queue, partial_queue, run_queue
from distill.timing.schedule import (
    CUTOFF_POLL_S,
    Job,
    Pool,
    _partial_phase,
    assign,
    cut_after,
    in_progress,
    lockstep,
    lower_limit,
    partial_rollouts,
)

COST = DecodeCost(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Each decode step takes one second, and a prompt takes none."""
REAL = DecodeCost(1e-3, 1e-5, 2e-3, 1e-7, 1e-5, 0.0, 1e-6, 1e-10)
"""Numbers of the size that a GPU has."""
LENGTHS = Lengths.of_percentiles(50, 150, 400)
JOB = Job(engines=3, responses=24, lengths=LENGTHS, cost=REAL, prompt_tokens=10, steps=60, seed=1)
SETTINGS = [(share, age) for share in (0.5, 0.6, 0.75, 0.9) for age in (1, 2, 4)]


class Fixed(Lengths):
    """Lengths that are listed in advance."""

    def __init__(self, *tokens: int) -> None:
        super().__init__(1, 0, 10**9)
        object.__setattr__(self, "tokens", np.array(tokens))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return np.resize(self.tokens, count)  # type: ignore[attr-defined]


def test_lockstep_waits_for_the_longest_response() -> None:
    """Engine 0 has the lengths 2 and 5, engine 1 has 3 and 4: five seconds, of which one engine waits one."""
    found = lockstep(Job(2, 4, Fixed(2, 3, 5, 4), COST, steps=2))
    assert found.seconds == 5 and found.cut_after == 5
    assert found.steady[0].busy.tolist() == [5, 4] and found.wait_share == pytest.approx(0.1)


def test_responses_to_a_prompt_start_on_one_engine_and_compute_it_once() -> None:
    cost = replace(COST, prefill_token=1.0)
    found = lockstep(Job(2, 4, Fixed(1, 1, 1, 1), cost, per_prompt=2, prompt_tokens=7, steps=1))
    assert found.steady[0].busy.tolist() == [8, 8]
    single = lockstep(Job(2, 4, Fixed(1, 1, 1, 1), cost, prompt_tokens=7, steps=1))
    assert single.steady[0].busy.tolist() == [15, 15]


def test_a_phase_ends_when_enough_responses_have_ended_and_cuts_all_others_equally() -> None:
    """B = 2, M = 4: two of the lengths 9, 2, 3, 20 end after three tokens; 9 and 20 continue with three tokens."""
    job = Job(2, 2, Fixed(9, 2, 3, 20, 1, 1), COST, prompt_tokens=5, steps=3)
    found = partial_rollouts(job, 0.5, 5, warm_up=0)
    first, second, third = found.steady
    assert (first.cut_after, first.seconds) == (3, 3 + CUTOFF_POLL_S) and first.trained.tolist() == [2, 3]
    assert (second.cut_after, second.trained.tolist()) == (1, [1, 1])
    assert second.reprefilled == 2 * (5 + 3) and first.reprefilled == 0
    assert third.cut_after == 5 and third.trained.tolist() == [9, 2] and third.older == 4


def test_an_engine_with_cut_responses_decodes_until_the_phase_ends_and_other_engines_wait() -> None:
    """T* = 4. Engine 0: prompts of 30 s, lengths 4 and 4. Engine 1: 15 s, 9 is cut. Engine 2: 15 s, 1 ends."""
    cost = replace(COST, prefill_token=1.0)
    job = Job(3, 3, Fixed(4, 9, 1, 4), cost, prompt_tokens=15, steps=1)
    found = partial_rollouts(job, 0.75, 5, warm_up=0)
    (phase,) = found.steady
    end = 30 + 4 + CUTOFF_POLL_S
    assert phase.seconds == end and phase.trained.tolist() == [4, 1, 4]
    assert phase.busy.tolist() == [34, end, 16]
    assert phase.discarding == pytest.approx((end - 19) / 3)
    assert found.wait_seconds == pytest.approx((CUTOFF_POLL_S + end - 16) / 3)
    assert found.wait_share == pytest.approx(found.wait_seconds / end)
    assert found.discarded_share == pytest.approx(phase.discarding / end)


def test_the_wait_share_is_the_mean_of_the_metric_of_each_step() -> None:
    """Engines work 2 and 1 s, then 4 and 8 s: shares of 1/4 each; the metric of a run has the same values."""
    found = lockstep(Job(2, 2, Fixed(2, 1, 4, 8), COST, steps=2), warm_up=0)
    metrics = [
        waits({"timing/train/generation": phase.busy.mean(), "timing/train/generation_slowest": phase.seconds})
        for phase in found.steady
    ]
    assert [list(each.values()) for each in metrics] == [[0.25], [0.25]] and found.wait_share == 0.25
    uneven = lockstep(Job(2, 2, Fixed(2, 1, 8, 8), COST, steps=2), warm_up=0)
    assert uneven.wait_share == 0.125 and uneven.wait_seconds == 0.25


def test_a_response_of_the_largest_age_runs_to_its_end_after_the_others_are_cut() -> None:
    """With age 1, the response of 20 tokens has three of them and ends in the second phase: 1 and then 16 seconds."""
    job = Job(2, 2, Fixed(9, 2, 3, 20, 1, 1), COST, prompt_tokens=5, steps=3)
    second = partial_rollouts(job, 0.5, 1, warm_up=0).steady[1]
    assert second.cut_after == 1 and second.seconds == pytest.approx(1 + 16 + CUTOFF_POLL_S)
    assert second.busy.tolist() == pytest.approx([1 + 5 + CUTOFF_POLL_S, second.seconds])  # only engine 0 waits
    assert second.trained.tolist() == [9, 20] and second.older == 3 + 3


def test_the_cut_is_the_fewest_new_tokens_at_which_enough_have_ended() -> None:
    remaining = np.array([5, 1, 9, 3, 3])
    for needed in range(1, 6):
        brute = next(n for n in range(1, 10) if (remaining <= n).sum() >= needed)
        assert cut_after(remaining, needed) == brute
    assert cut_after(remaining, 0) == 0


def test_the_number_in_progress_is_that_of_the_recipe() -> None:
    for prompts, share in ((9, 0.9), (10, 0.9), (64, 0.7), (7, 1.0)):
        partial = PartialRolloutsConfig(enabled=True, finish_share=share)
        loop = DistillationConfig(num_prompts_per_step=prompts, partial_rollouts=partial)
        assert in_progress(prompts, share) == loop.most_in_progress


def test_a_finish_share_of_1_is_lockstep() -> None:
    plain, partial = lockstep(JOB), partial_rollouts(JOB, 1, 1, warm_up=1)
    for one, other in zip(plain.steady, partial.steady, strict=True):
        assert one.seconds == other.seconds and (one.busy == other.busy).all()
        assert (one.trained == other.trained).all() and other.older == other.reprefilled == 0


def test_a_large_age_needs_no_more_steps_of_the_simulation() -> None:
    job = replace(JOB, steps=5)
    assert partial_rollouts(job, 0.75, 10**9).seconds == partial_rollouts(job, 0.75, 100).seconds
    assert partial_queue(job, 0.75, 10**9, 6).seconds == partial_queue(job, 0.75, 100, 6).seconds


@dataclass
class Response:
    """A response of the twin."""

    order: int
    length: int
    started: int
    tokens: list[int]
    """The step in which each token was sampled."""


def twin(job: Job, share: float, age: int, steps: int) -> list[tuple[int, list[int], int, int]]:
    """Generate token by token; return T*, trained responses, older and re-prefilled tokens of each step."""
    most = in_progress(job.responses, share)
    stream = iter(enumerate(job.stream(most + steps * job.responses).tolist()))
    pool: list[Response] = []
    found = []
    for step in range(steps):
        while len(pool) < most:
            order, length = next(stream)
            pool.append(Response(order, length, step, []))
        again = sum(job.prompt_tokens + len(r.tokens) for r in pool if 0 < len(r.tokens) < r.length)
        unfinished = [r for r in pool if len(r.tokens) < r.length]
        cut = 0
        while sum(len(r.tokens) == r.length for r in pool) < job.responses:
            for response in unfinished:
                if len(response.tokens) < response.length:
                    response.tokens.append(step)
            cut += 1
        for response in unfinished:
            if step - response.started >= age:
                response.tokens += [step] * (response.length - len(response.tokens))
        ended = sorted((r for r in pool if len(r.tokens) == r.length), key=lambda r: r.order)[: job.responses]
        pool = [r for r in pool if all(r is not trained for trained in ended)]
        older = sum(version < step for r in ended for version in r.tokens)
        found.append((cut, [r.length for r in ended], older, again))
    return found


@pytest.mark.parametrize(("share", "age"), SETTINGS)
def test_the_simulation_equals_its_twin(share: float, age: int) -> None:
    job = replace(JOB, lengths=Lengths.of_percentiles(12, 40, 90), responses=11)
    found = partial_rollouts(replace(job, steps=15), share, age, warm_up=0)
    expected = [(p.cut_after, p.trained.tolist(), p.older, p.reprefilled) for p in found.steady]
    assert expected == twin(job, share, age, 15)


def test_every_response_is_trained_once_or_is_still_in_the_pool() -> None:
    stream, pool, trained, at = JOB.stream(2000), Pool(), [], 0
    for step in range(40):
        new = in_progress(JOB.responses, 0.75) - len(pool.length)
        assert step == 0 or new == JOB.responses
        pool.start(stream[at : at + new], step)
        at += new
        trained += _partial_phase(JOB, pool, step, 2).trained.tolist()
        assert (step - pool.started[pool.unfinished] < 2).all()
    assert sorted([*trained, *pool.length.tolist()]) == sorted(stream[:at].tolist())
    assert len(trained) == 40 * JOB.responses


@pytest.mark.parametrize(("share", "age"), SETTINGS)
def test_no_phase_is_shorter_than_the_limit(share: float, age: int) -> None:
    assert lower_limit(JOB, share, age) <= partial_rollouts(JOB, share, age).seconds * 1.02


def test_the_limit_is_the_longest_response_over_its_phases_or_the_work_of_all() -> None:
    """Ten responses of 100 tokens on two engines, at one second per step."""
    job = Job(2, 10, Fixed(100), COST, steps=3)
    assert lower_limit(job, 1, 1) == 100  # work: each engine decodes five responses in 100 steps
    assert lower_limit(job, 0.5, 1) == 50  # work: ten responses an engine
    assert lower_limit(replace(job, lengths=Fixed(*[1] * 9, 91)), 1, 1) == 45.5  # depth: 91 tokens in two phases


def test_the_first_step_favours_short_responses_and_later_steps_have_the_true_mix() -> None:
    found = partial_rollouts(replace(JOB, steps=400), 0.75, 2)
    assert found.first_bias < -0.15 and abs(found.bias) < 0.03
    assert 0 < found.older_share < 1 and found.reprefilled > 0


def test_partial_rollouts_shorten_the_phase_and_the_waits() -> None:
    slow = replace(JOB, cost=replace(REAL, fixed=1.0))  # the delay of the cutoff does not count
    plain, partial = lockstep(slow), partial_rollouts(slow, 0.75, 3)
    assert partial.seconds < plain.seconds and partial.wait_share < plain.wait_share


def test_equal_seeds_give_equal_simulations() -> None:
    first, again, other = (partial_rollouts(replace(JOB, seed=seed), 0.8, 2).seconds for seed in (1, 1, 2))
    assert first == again != other


def test_continued_responses_are_assigned_evenly_by_number_and_then_by_tokens() -> None:
    """Three new responses on engines 0, 1, 2; the longest continued ones follow, one per engine."""
    engine = assign(Job(3, 6, LENGTHS, COST), np.array([0, 30, 0, 90, 0, 60, 10]))
    assert engine[[0, 2, 4]].tolist() == [0, 1, 2] and engine[[3, 5, 1, 6]].tolist() == [0, 1, 2, 2]
    even = assign(JOB, np.random.default_rng(0).integers(1, 500, 91))
    counts = np.bincount(even)
    assert counts.max() - counts.min() <= 1


def test_new_prompts_are_computed_once_beside_continued_responses() -> None:
    """80 new responses to ten prompts, and 20 continued ones: five prompts of 100 tokens on each of two engines."""
    cost = replace(COST, fixed=0.0, prefill_token=1.0)
    job = Job(2, 80, Fixed(10), cost, per_prompt=8, prompt_tokens=100)
    pool = Pool()
    pool.start(np.full(20, 10), 0)
    pool.done[:] = 4
    pool.start(np.full(80, 10), 1)
    phase = _partial_phase(job, pool, 1, 5)
    assert phase.reprefilled == 20 * 104 and phase.busy.tolist() == [5 * 100 + 10 * 104] * 2


# ---- shared queue ----------------------------------------------------------------------------------------------------


def test_a_queue_with_room_for_all_is_lockstep() -> None:
    job = replace(JOB, cost=replace(REAL, prefill_token=0.0, prefill_pair=0.0))
    assert lockstep_queue(job, 8).seconds == pytest.approx(lockstep(job).seconds)


def test_an_engine_takes_the_next_response_when_it_has_room() -> None:
    """Two engines run one response each; lengths 4, 1, 2, 3: engine 1 takes 2 after 1 second, then 3 after 3."""
    new = np.array([4, 1, 2, 3])
    engines, made, seconds = run_queue(Job(2, 4, LENGTHS, COST), np.zeros(4, int), new, np.arange(4), 1)
    assert seconds == 6 and made.tolist() == new.tolist() and [one.clock for one in engines] == [4, 6]


def test_a_queue_stops_when_enough_responses_have_ended() -> None:
    new = np.array([4, 1, 2, 3])
    _, made, seconds = run_queue(Job(2, 4, LENGTHS, COST), np.zeros(4, int), new, np.arange(4), 1, needed=2)
    assert seconds == 3 and made.tolist() == [3, 1, 2, 0]


def test_a_queue_with_partial_rollouts_trains_on_the_true_mix() -> None:
    found = partial_queue(replace(JOB, steps=200), 0.75, 2, at_most=6)
    assert abs(found.bias) < 0.05 and all(len(phase.trained) == JOB.responses for phase in found.steady)
