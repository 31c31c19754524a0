"""Partial rollouts: which responses a step trains on, what it cuts, and what a checkpoint stores."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import RunFailed
from distill.rollout import pool_file
from distill.rollout.cutoff import EndedSegments, StoreCutoff
from distill.rollout.generation import Lockstep
from distill.rollout.pool import Pool, PooledResponse, cut, cut_after, deal
from distill.rollout.pool_file import from_bytes, to_bytes
from distill.rollout.requests import Request, Segment, requests_of, response_seed
from distill.rollout.stream import Stream, numbered_requests
from distill.types import Problem, Prompt, Sampling
from tests.rollout.pool_stand_ins import MAX_NEW_TOKENS, Case, checkpoint, length_of, run_steps, token

TIMES = {"train/partial/discarded_tokens", "timing/train/generation_busy"}
"""Metrics that depend on time."""


def segment(tokens: int, finish: Any) -> Segment:
    request = Request(Prompt(0, (1,), Problem("p")), 0, 5, 50, True)
    return Segment(request, tuple(range(tokens)), tuple(-1.0 * i for i in range(tokens)), finish)


@pytest.mark.parametrize(
    ("ended", "needed", "tokens"),
    [([5, 2, 9, 3], 1, 2), ([5, 2, 9, 3], 2, 3), ([5, 2, 9, 3], 4, 9), ([4, 4, 4, 1], 2, 4), ([7], 0, 0), ([], -1, 0)],
)
def test_segments_are_cut_after_the_fewest_tokens_at_which_enough_ended(ended, needed, tokens) -> None:
    assert cut_after(ended, needed) == tokens


def test_too_few_ended_segments_are_an_error() -> None:
    with pytest.raises(AssertionError):
        cut_after([5, 2], 3)


def test_a_segment_that_ended_at_the_cut_stays_and_longer_ones_lose_their_last_tokens() -> None:
    assert cut(segment(4, "stop"), 4) == segment(4, "stop") and cut(segment(3, "length"), 4) == segment(3, "length")
    for finish in ("stop", "length", "cut"):
        assert cut(segment(6, finish), 4) == segment(4, "cut")
    assert cut(segment(4, "cut"), 4) == segment(4, "cut") and cut(segment(2, "stop"), 0) == segment(0, "cut")
    with pytest.raises(AssertionError):
        cut(segment(3, "cut"), 4)


LENGTHS = (5, 2, 9, 3, 1, 4, 2, 8, 1, 1, 1, 1)
"""Lengths of the responses of the example, by number."""


def test_an_example_by_hand() -> None:
    """Two responses are trained per step and four are in progress.

    Step 0: 0 to 3 start and end after 5, 2, 9 and 3 tokens: cut after 3. Step 1: 0 and 2 miss 2 and 6 tokens, 4 and 5
    have 1 and 4: cut after 2, and 2 runs to its end, because it is one step old. 4 waits. Step 2: one more is needed;
    5 and 6 both end after 2 tokens, and 7 is cut.
    """
    steps, _ = run_steps(Case(length_of=LENGTHS.__getitem__), 1, range(3))
    assert [[r.order for r in step.trained] for step in steps] == [[1, 3], [0, 2], [4, 5]]
    assert [[r.older_tokens for r in step.trained] for step in steps] == [[0, 0], [3, 3], [1, 2]]
    assert [[r.version for r in step.trained] for step in steps] == [[0, 0], [1, 1], [1, 2]]
    names = ["cut_after_tokens", "age_mean", "age_max", "older_token_share", "pool_responses", "pool_tokens"]
    names += ["waiting_responses", "reprefilled_tokens"]
    numbers = [[step.metrics[f"train/partial/{name}"] for name in names] for step in steps]
    assert numbers == [  # prompts 0 to 4 have 1, 2, 3, 1 and 2 tokens; response 5 has prompt 0
        [3, 0, 0, 0, 2, 6, 0, 0],
        [2, 1, 1, 6 / 14, 2, 3, 1, (1 + 3) + (3 + 3)],
        [2, 1, 1, 3 / 5, 2, 4, 1, 1 + 2],
    ]
    assert [step.info["partial_rollouts"] for step in steps] == [
        {"responses": 2, "waiting": 0, "tokens": 6},
        {"responses": 2, "waiting": 1, "tokens": 3},
        {"responses": 2, "waiting": 1, "tokens": 4},
    ]


def test_tokens_of_the_last_pool_are_reported_in_the_last_step_only() -> None:
    steps, _ = run_steps(Case(length_of=LENGTHS.__getitem__), 1, range(3), last_step=3)
    assert [step.metrics.get("train/partial/untrained_tokens") for step in steps] == [None, None, 4]


def test_no_response_is_generated_if_enough_of_them_wait() -> None:
    """All four responses end in step 0, so two wait; step 1 starts two more, which get no token yet."""
    case = Case(length_of=lambda order: 3)
    steps, (strategy,) = run_steps(case, 1, range(3))
    assert [[r.order for r in step.trained] for step in steps] == [[0, 1], [2, 3], [4, 5]]
    assert [len(call) for call in strategy.engine.requests] == [4, 4], "no call in step 1"
    assert [step.metrics["train/partial/cut_after_tokens"] for step in steps] == [3, 0, 3]
    assert [r.older_tokens for r in steps[1].trained] == [3, 3] and steps[2].trained[0].older_tokens == 0
    assert steps[2].metrics["train/partial/age_max"] == 1 and steps[2].metrics["train/partial/reprefilled_tokens"] == 0


CASES = st.builds(
    Case,
    prompts=st.integers(1, 4),
    responses=st.integers(1, 3),
    finish_share=st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0]),
    max_age=st.integers(1, 3),
    problems=st.integers(4, 9),
    off_policy=st.sampled_from([0.0, 0.34]),
)


@settings(max_examples=15, deadline=None)
@given(CASES, st.integers(1, 3))
def test_every_response_is_trained_on_once_and_complete(case: Case, ranks: int) -> None:
    """Each step trains on B responses, no unfinished one is older than max_age, and no token is missing."""
    if not case.config.generated_per_step:
        return
    steps, _ = run_steps(case, ranks, range(7))
    trained = [rollout for step in steps for rollout in step.trained]
    assert all(len(step.trained) == case.config.generated_per_step for step in steps)
    assert max(Counter(rollout.order for rollout in trained).values()) == 1
    for rollout in trained:
        assert rollout.response_ids == tuple(token(rollout.order, i) for i in range(length_of(rollout.order)))
        batch, place = divmod(rollout.order, case.prompts * case.responses)
        prompts = case.batch(batch)
        assert rollout.prompt == prompts[place // case.responses]
        pair = (rollout.prompt.prompt_id, rollout.response_index)
        assert pair[1] == place % case.responses and pair not in case.omitted(batch, prompts)
    pool = from_bytes(steps[-1].file, lambda prompt_id, _: case.prompt(prompt_id)).pool
    started = {rollout.order for rollout in trained} | {response.order for response in pool.responses}
    new = Stream(case.batch, lambda step, prompts: sampling(case, step, prompts), 2000, case.prompts * case.responses)
    assert sorted(started) == [response.order for response in new.new(0, len(started), 0)], "started in order"
    assert all(7 - response.started <= case.max_age for response in pool.unfinished)


def sampling(case: Case, step: int, prompts: Any) -> Sampling:
    return Sampling(1.0, MAX_NEW_TOKENS, (), case.responses, seed=3, omitted=tuple(case.omitted(step, prompts)))


@settings(max_examples=8, deadline=None)
@given(CASES)
def test_the_number_of_ranks_changes_nothing(case: Case) -> None:
    if not case.config.generated_per_step:
        return
    alone, two, three = (run_steps(case, ranks, range(5))[0] for ranks in (1, 2, 3))
    for step, others in zip(alone, zip(two, three, strict=True), strict=True):
        for other in others:
            assert other.trained == step.trained
            assert {k: v for k, v in other.metrics.items() if k not in TIMES} == {
                k: v for k, v in step.metrics.items() if k not in TIMES
            }


SPREAD = Case(prompts=3, responses=2, finish_share=0.6, max_age=2, problems=4)


@pytest.mark.parametrize("resumed", range(1, 6))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_resume_continues_every_pool(resumed: int, ranks: int, tmp_path: Path) -> None:
    """With two ranks before; two ranks also have equal files: an epoch has less than two steps."""
    complete, _ = run_steps(SPREAD, 2, range(6))
    found = checkpoint(tmp_path / f"step_{resumed}", complete[resumed - 1])
    continued, _ = run_steps(SPREAD, ranks, range(resumed, 6), found)
    assert [step.trained for step in continued] == [step.trained for step in complete[resumed:]]
    assert [step.info for step in continued] == [step.info for step in complete[resumed:]]
    if ranks == 2:
        assert [step.file for step in continued] == [step.file for step in complete[resumed:]]


def test_the_pools_of_the_resumes_are_in_every_state() -> None:
    complete, _ = run_steps(SPREAD, 2, range(6))
    pools = [from_bytes(step.file, lambda prompt_id, _: SPREAD.prompt(prompt_id)).pool for step in complete[:5]]
    assert any(pool.waiting for pool in pools) and any(pool.unfinished for pool in pools)
    ages = [step - response.started for step, pool in enumerate(pools, 1) for response in pool.unfinished]
    assert max(ages) == SPREAD.max_age
    ids = [[response.prompt.prompt_id for response in pool.responses if not response.response_index] for pool in pools]
    assert any(len(set(of_pool)) < len(of_pool) for of_pool in ids), "a prompt is twice in the pool"


def test_the_pool_before_a_step_is_available_until_the_next_step() -> None:
    """An alarm of a validation saves a checkpoint after the next step's responses were generated."""
    _, (strategy,) = run_steps(SPREAD, 1, range(2))
    complete, _ = run_steps(SPREAD, 1, range(2))
    assert strategy.files(1)["partial_rollouts.npz"] == complete[0].file
    assert strategy.files(2)["partial_rollouts.npz"] == complete[1].file


def test_a_changed_share_or_age_continues_the_pool(tmp_path: Path) -> None:
    complete, _ = run_steps(SPREAD, 1, range(2))
    found = checkpoint(tmp_path / "step_2", complete[-1])
    orders = {rollout.order for step in complete for rollout in step.trained}
    for changed in (replace(SPREAD, finish_share=1.0), replace(SPREAD, finish_share=0.5), replace(SPREAD, max_age=1)):
        continued, _ = run_steps(changed, 1, range(2, 6), found)
        later = [rollout.order for step in continued for rollout in step.trained]
        assert len({*later, *orders}) == 6 * 6 and min(later) < 12, "the pool's responses are trained on"


def test_a_pool_is_discarded_with_a_warning_if_it_does_not_fit(tmp_path: Path, caplog) -> None:
    complete, _ = run_steps(SPREAD, 1, range(2))
    found = checkpoint(tmp_path / "step_2", complete[-1])
    counts = f"{complete[-1].info['partial_rollouts']['responses']} responses"
    run_steps(replace(SPREAD, prompts=2), 1, [2], found)
    Lockstep(None, None, None).restore(found)  # type: ignore[arg-type]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and all(text.startswith(counts) for text in warnings), warnings
    assert "num_prompts_per_step" in warnings[0] and "enabled" in warnings[1]


def test_responses_to_removed_prompts_are_left_out(tmp_path: Path, caplog) -> None:
    complete, _ = run_steps(SPREAD, 1, range(2))
    pool = from_bytes(complete[-1].file, lambda prompt_id, _: SPREAD.prompt(prompt_id)).pool
    of_last = sum(response.prompt.prompt_id == 3 for response in pool.responses)
    continued, _ = run_steps(replace(SPREAD, problems=3), 1, range(2, 4), checkpoint(tmp_path / "step_2", complete[-1]))
    assert 0 < of_last < len(pool.responses)
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert warning.getMessage().startswith(f"{of_last} ")
    assert all(len(step.trained) == 6 for step in continued)


@pytest.mark.parametrize(
    ("changed", "given", "tokens", "limit"),
    [
        ({}, {}, 49, 50),
        ({"max_total_length": 20}, {}, 16, 17),
        ({"max_total_length": 20}, {}, 17, None),
        ({"max_total_length": 20}, {"finish": "stop"}, 17, 17),
        ({"max_total_length": 20}, {"finish": "length"}, 18, None),
        ({"logprob_interval": 2}, {"with_logprobs": False}, 5, 50),
        ({}, {"with_logprobs": False}, 5, None),
        ({}, {"with_logprobs": False, "finish": "stop"}, 5, None),
    ],
)
def test_a_response_that_does_not_fit_changed_settings_starts_again(changed, given, tokens, limit) -> None:
    """The prompt has three tokens; limit None: the response starts again in step 6, with the limit of this step."""
    settings = replace(Sampling(1.0, 40, (), 2), **changed)
    stream = Stream(lambda step: [], lambda step, prompts: settings, 100, 4)
    stored = replace(response(5, tokens), versions=((2, tokens),), **given)
    again = replace(response(5), started=6, max_new_tokens=min(40, (settings.max_total_length or 99) - 3))
    assert stream.adapted(stored, 6) == (again if limit is None else replace(stored, max_new_tokens=limit))


def test_responses_without_log_probs_are_generated_again_if_the_loss_needs_them(tmp_path: Path, caplog) -> None:
    complete, _ = run_steps(replace(SPREAD, logprob_interval=2**62), 1, range(2))
    assert not any(rollout.logprobs for step in complete for rollout in step.trained)
    continued, _ = run_steps(SPREAD, 2, range(2, 5), checkpoint(tmp_path / "step_2", complete[-1]))
    (warning,) = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert warning.startswith(f"{complete[-1].info['partial_rollouts']['responses']} ")
    trained = [rollout for step in continued for rollout in step.trained]
    assert all(len(rollout.logprobs) == len(rollout.response_ids) == length_of(rollout.order) for rollout in trained)
    assert len({rollout.order for step in [*complete, *continued] for rollout in step.trained}) == 5 * 6


def test_a_checkpoint_without_a_pool_continues_with_the_batch_of_its_step() -> None:
    found: Any = SimpleNamespace(info={"files": {}}, path=Path("step_3"))
    (first,), _ = run_steps(SPREAD, 1, [3], found)
    assert min(rollout.order for rollout in first.trained) // 6 == 3


def test_a_file_of_another_format_or_an_unreadable_file_is_an_error(tmp_path: Path, monkeypatch) -> None:
    complete, _ = run_steps(SPREAD, 1, range(1))
    found = checkpoint(tmp_path / "step_1", complete[-1])
    monkeypatch.setattr(pool_file, "_FORMAT", 2)
    with pytest.raises(RunFailed, match="format 1 instead of 2"):
        run_steps(SPREAD, 1, [1], found)
    (tmp_path / "step_1/partial_rollouts.npz").unlink()
    with pytest.raises(RunFailed, match=r"partial_rollouts\.npz cannot be read"):
        run_steps(SPREAD, 2, [1], found)


def response(order: int, tokens: int = 0, **given: Any) -> PooledResponse:
    ids = tuple(range(tokens))
    return PooledResponse(order, Prompt(order // 2, (1, 2, 3), Problem("p")), order % 2, 0, 0, 50, True, ids, **given)


def test_a_pool_is_the_same_after_writing_and_reading() -> None:
    pool = Pool(
        77,
        (
            response(3, 2, logprobs=(-0.1, -1e-9), versions=((4, 1), (6, 1)), finish="stop", rank=2),
            replace(response(5, 3), with_logprobs=False, versions=((6, 3),)),
            replace(response(9), batch=7, started=8),
        ),
    )
    stored = from_bytes(to_bytes(pool, 8), lambda prompt_id, ids: Prompt(prompt_id, ids, Problem("p")))
    assert (stored.pool, stored.responses_per_step, stored.missing) == (pool, 8, 0)
    assert to_bytes(stored.pool, 8) == to_bytes(pool, 8)
    assert from_bytes(to_bytes(Pool(), 8), lambda *_: None).pool == Pool()


def test_seeds_depend_on_the_batch_of_the_prompt_and_the_number_of_tokens_before() -> None:
    """The first segment of a response has the seed that it has without partial rollouts."""
    batch = [Prompt(4, (1,), Problem("p")), Prompt(9, (2,), Problem("q"))]
    settings = Sampling(1.0, 30, (), 2, seed=3, logprob_interval=2)
    stream = Stream(lambda step: batch, lambda step, prompts: settings, 50, 4)
    plain = requests_of(batch, settings, 6, 50)
    new = stream.new(6 * 4, 4, step=5)
    assert [replace(each.request(3), order=0) for each in new] == plain
    assert plain[0].seed == response_seed(3, 6, 4, 0)
    later = new[0].extended((7, 8), (-1.0, -2.0), "cut", step=5, rank=1).request(3)
    assert later.seed != plain[0].seed and later.max_new_tokens == 28 and later.input_ids == (1, 7, 8)
    assert later.with_logprobs == plain[0].with_logprobs and later.order == 24
    assert numbered_requests(batch, settings, 6, 50) == [replace(each, order=24 + i) for i, each in enumerate(plain)]


def test_limits_are_those_of_the_step_in_which_a_response_is_started() -> None:
    """The limit grows by one with each step: in step 0, also the responses of batch 1 have the limit of step 0."""
    _, (strategy,) = run_steps(Case(length_of=LENGTHS.__getitem__), 1, range(3))
    limits = {r.order: r.max_new_tokens + len(r.generated_ids) for call in strategy.engine.requests for r in call}
    assert limits == {order: MAX_NEW_TOKENS + step for order, step in enumerate((0, 0, 0, 0, 1, 1, 2, 2))}


def test_new_responses_to_a_prompt_share_an_engine_and_continued_ones_even_the_engines() -> None:
    new = [response(order) for order in range(8)]  # of prompts 0 to 3
    assert [[r.order for r in own] for own in deal(new, 3, 4, 4, 2)] == [[0, 1, 6, 7], [2, 3], [4, 5]]
    continued = [response(order, tokens) for order, tokens in ((-4, 9), (-3, 30), (-2, 2), (-1, 20))]
    dealt = deal([*continued, *new], 3, 4, 4, 2)
    assert [len(own) for own in dealt] == [4, 4, 4] and [r.order for r in dealt[0]] == [0, 1, 6, 7]
    assert [[r.order for r in own] for own in dealt[1:]] == [[-3, -2, 2, 3], [-4, -1, 4, 5]], "sorted by number"
    assert sorted(sum(len(r.ids) for r in own) for own in dealt) == [0, 29, 32], "30 + 2 and 20 + 9"


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.data())
def test_no_engine_gets_more_responses_than_it_has_room_for(prompts, each, engines, data) -> None:
    share = data.draw(st.sampled_from([0.5, 0.7, 0.9, 1.0]))
    config = Case(prompts, each, share).config
    most, total = config.most_per_engine(engines), config.most_in_progress
    first, old = data.draw(st.integers(0, 40)), data.draw(st.integers(0, total))
    responses = [response(order, 0 if order >= first + old else 3) for order in range(first, first + total)]
    dealt = deal(responses, engines, most, prompts, each)
    assert max(map(len, dealt)) <= most and sorted(r.order for own in dealt for r in own) == [
        r.order for r in responses
    ]


def test_the_bound_of_a_cutoff_never_increases_and_ends_at_the_cut() -> None:
    store, now = dist.HashStore(), [0.0]
    published = [EndedSegments(store, engine, 3) for engine in range(3)]
    cutoffs = [StoreCutoff(each, 7, 3, clock=lambda: now[0]) for each in published]
    published[2].publish(6, [1, 1, 1])  # of an earlier step
    assert cutoffs[0].limit() is None
    seen: list[float] = []
    for engine, ended in ((0, [9]), (1, [4, 8]), (2, [3]), (0, [10]), (2, [6])):
        cutoffs[engine].ended(ended)
        now[0] += 1.0
        seen.append(cutoffs[0].limit() or math.inf)
    assert seen == [math.inf, 9, 8, 8, 6] and cutoffs[1].limit() == cut_after([9, 4, 8, 3, 10, 6], 3)
    assert StoreCutoff(published[0], 8, 0).limit() == 0


def test_an_engine_polls_the_others_rarely_and_its_own_segments_at_once() -> None:
    reads: list[int] = []

    def multi_get(keys: list[str]) -> list[bytes]:
        reads.append(len(keys))
        return []

    store = SimpleNamespace(set=lambda key, value: None, multi_get=multi_get)
    now = [0.0]
    cutoff = StoreCutoff(EndedSegments(store, 0, 2), 0, 1, clock=lambda: now[0])
    for _ in range(100):
        cutoff.limit()
        now[0] += 0.05
    assert 20 <= len(reads) <= 26, "at most five times a second"
    cutoff.ended([4])
    assert cutoff.limit() == 4
    alone = SimpleNamespace(set=None, multi_get=None)
    own = StoreCutoff(EndedSegments(alone, 0, 1), 0, 1)
    own.ended([5])
    assert own.limit() == 5 and EndedSegments(store, 0, 640).poll_s == pytest.approx(2.0)


def test_responses_are_prepared_with_all_their_tokens_and_waiting_ones_stay_on_their_rank() -> None:
    case = Case(length_of=LENGTHS.__getitem__)
    steps, (strategy,) = run_steps(case, 1, range(3))
    trained = {rollout.order: rollout for step in steps for rollout in step.trained}
    added = {rollout.order: rollout for rollout in strategy.responses.added}
    assert all(added[order].response_ids == trained[order].response_ids for order in trained)
    assert [[rollout.order for rollout in waiting] for waiting in strategy.responses.waiting] == [[], [], [4]]
    assert np.all([rollout.order < 8 for rollout in strategy.responses.added])
