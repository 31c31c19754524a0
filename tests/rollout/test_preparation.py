"""Responses that are graded in the background while the engine generates, compared with their plain twin."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from distill.data.grading import Verdict
from distill.data.teacher_prefix import TeacherPrefixes
from distill.data.train_grader import Graders, TrainGrader
from distill.errors import UserError
from distill.metrics.step import Metrics
from distill.rollout.preparation import Preparation
from distill.rollout.responses import StepResponses
from distill.supervise.progress import CURRENT
from distill.types import Problem, Prompt, Rollout
from tests.data.teacher_prefixes import STATIC, prefixes
from tests.rollout.test_off_policy import responses
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ("<think>abc</think>2", "2", "<think>a</think>3", "<think>abcdefghijkl</think>2", "3" * 40, "(", "<think>b")
SECONDS = ("timing/train/grading", "timing/train/teacher_prefixes", "timing/train/background_preparation")


def rollout(text: str, index: int = 0, gold: str = "2", order: int = 0, **columns: str) -> Rollout:
    ids = (*TOKENIZER(text)["input_ids"], 258)
    prompt = Prompt(7, (1, 2, 3), Problem("1+1?", gold, source="a.jsonl", columns=columns))
    return Rollout(prompt, index, ids, (0.0,) * len(ids), "stop", version=0, order=order)


GENERATED = [rollout(text, i) for i, text in enumerate(TEXTS)]


def step(train_on: str = "all", grader: str = "exact", **context: Any) -> StepResponses:
    """Return the responses of a step whose teacher has a window of 30 tokens and reads the trace."""
    built = prefixes(max_tokens=30, missing_trace_policy="drop_sample", **context)
    return responses(graders=Graders((grader,)), prefixes=built, train_on=train_on, context={"enabled": True})


def selected(step: StepResponses, generated: Sequence[Rollout]) -> tuple[list[Rollout], dict[str, Any], Any]:
    """Return the selected responses, their metrics without seconds, and the numbers of removed responses."""
    metrics = Metrics()
    kept = step.select(generated, [generated[0].prompt], 0, metrics)
    values = {name: pair for name, pair in metrics.on_host().items() if name not in SECONDS}
    return kept, values, step._removed


def prepare(preparation: Preparation, rollouts: Sequence[Rollout], waiting: Sequence[Rollout] = ()) -> None:
    """Prepare the rollouts in the background, and wait until the thread has finished them."""
    done = threading.Event()
    prepare, last = preparation._prepare, [*waiting, *rollouts][-1]

    def observed(given: Rollout) -> None:
        try:
            prepare(given)
        finally:
            if given is last:
                done.set()

    preparation._prepare = observed  # type: ignore[assignment,method-assign]
    with preparation.while_generating(waiting) as add:
        for each in rollouts:
            add(each)
        assert done.wait(60)
    preparation._prepare = prepare  # type: ignore[method-assign]


class Counted:
    """Counts the grades and prefixes that are computed, and remembers the threads."""

    def __init__(self, step: StepResponses) -> None:
        self.graded: list[Rollout] = []
        self.prefixed: list[Rollout] = []
        self.threads: set[threading.Thread] = set()
        preparation = step.preparation
        self._grader: TrainGrader = preparation._grader
        self._prefixes: TeacherPrefixes = preparation._teacher_prefixes
        preparation._grader = preparation._teacher_prefixes = self  # type: ignore[assignment]

    def verdict(self, rollout: Rollout) -> Verdict | None:
        self.graded.append(rollout)
        self.threads.add(threading.current_thread())
        return self._grader.verdict(rollout)

    def add(self, rollouts: Sequence[Rollout]) -> Any:
        self.prefixed += rollouts
        return self._prefixes.add(rollouts)


@pytest.mark.parametrize(
    "ahead", [slice(None), slice(0, 3), slice(3, None), slice(None, None, 2), slice(None, None, -1)]
)
@pytest.mark.parametrize("train_on", ["all", "right", "wrong"])
def test_a_step_is_the_same_with_and_without_the_preparation_in_the_background(train_on: str, ahead: slice) -> None:
    plain, background = step(train_on), step(train_on)
    prepare(background.preparation, GENERATED[ahead])
    expected = selected(plain, GENERATED)
    assert selected(background, GENERATED) == expected
    assert 0 < len(expected[0]) < len(GENERATED), "some responses are dropped"


def test_prepared_responses_are_not_computed_again_and_missing_ones_are() -> None:
    given = step("right")
    counted = Counted(given)
    prepare(given.preparation, GENERATED[:4])
    assert counted.graded == GENERATED[:4] and threading.main_thread() not in counted.threads
    selected(given, GENERATED)
    assert counted.graded == GENERATED and counted.prefixed == [GENERATED[i] for i in (0, 1, 3)]
    assert not given.preparation._prepared.keys() & {(7, i, 0) for i in (0, 1, 3)}, "used results are freed"


@pytest.mark.parametrize("change", [{"response_ids": (1, 2, 258)}, {"finish": "length"}, {"order": 1}])
def test_a_result_is_only_used_for_the_same_response(change: dict[str, Any]) -> None:
    given, other = step(), replace(GENERATED[0], logprobs=(), **change)
    prepare(given.preparation, GENERATED[:1])
    assert selected(given, [other]) == selected(step(), [other])
    counted = Counted(given)
    prepare(given.preparation, [other, GENERATED[0]])
    assert counted.graded == [other, GENERATED[0]]


def test_a_result_is_used_for_the_rollout_of_the_step_with_its_version_and_log_probs() -> None:
    given, later = step(), replace(GENERATED[0], version=3, logprobs=(), older_tokens=2)
    prepare(given.preparation, GENERATED[:1])
    counted = Counted(given)
    kept, *_ = selected(given, [later])
    assert not counted.graded and kept[0].version == 3 and kept[0].older_tokens == 2 and kept[0].logprobs == ()


def test_results_of_waiting_responses_are_kept_or_computed_and_others_dropped() -> None:
    given = step()
    prepare(given.preparation, GENERATED[:3])
    counted = Counted(given)
    prepare(given.preparation, [], waiting=GENERATED[2:4])
    assert counted.graded == [GENERATED[3]]
    selected(given, GENERATED[:3])
    assert counted.graded == [GENERATED[3], *GENERATED[:2]]
    with given.preparation.while_generating():
        assert not given.preparation._prepared


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_an_error_of_a_prefix_is_raised_by_select_as_without_the_background(bad: int) -> None:
    generated = [rollout(text, i, solution="<think>s</think>") for i, text in enumerate(TEXTS)]
    generated[bad] = rollout("2", bad, answer="x")
    errors = []
    for ahead in (False, True):
        given = step(**STATIC)
        if ahead:
            with given.preparation.while_generating() as add:
                for each in generated:
                    add(each)
        with pytest.raises(UserError) as caught:
            selected(given, generated)
        errors.append((caught.value.key, caught.value.value, str(caught.value)))
    assert errors[0] == errors[1]


def test_an_exception_in_the_background_is_raised_only_if_it_repeats() -> None:
    given = step()
    grade, failures = given.grader.verdict, [RuntimeError()] * 2

    def failing(rollout: Rollout) -> Verdict | None:
        if rollout is GENERATED[1] and failures:
            raise failures.pop()
        return grade(rollout)

    given.grader.verdict = failing  # type: ignore[method-assign]
    prepare(given.preparation, GENERATED[:2])
    with pytest.raises(RuntimeError):
        selected(given, GENERATED)
    assert selected(given, GENERATED) == selected(step(), GENERATED)


def test_no_thread_works_after_the_engine_and_the_last_response_is_finished_before() -> None:
    given = step()
    entered, proceed, grade = threading.Event(), threading.Event(), given.grader.verdict
    graded = []

    def slow(rollout: Rollout) -> Verdict | None:
        entered.set()
        assert proceed.wait(60)
        graded.append(rollout)
        return grade(rollout)

    given.grader.verdict = slow  # type: ignore[method-assign]
    before = threading.active_count()
    with given.preparation.while_generating() as add:
        for each in GENERATED:
            add(each)
        assert entered.wait(60) and threading.active_count() == before + 1
        threading.Timer(0.05, proceed.set).start()
    assert GENERATED[0] in graded and len(graded) < len(GENERATED), "other responses are left for select"
    assert not any("preparation" in thread.name for thread in threading.enumerate())


def test_an_exception_of_the_engine_does_not_wait_for_the_grader() -> None:
    given = step()
    entered, proceed = threading.Event(), threading.Event()

    def stuck(rollout: Rollout) -> Verdict | None:
        entered.set()
        assert proceed.wait(60)
        return None

    given.grader.verdict = stuck  # type: ignore[method-assign]

    def engine() -> None:
        with given.preparation.while_generating() as add:
            add(GENERATED[0])
            add(GENERATED[1])
            assert entered.wait(60)
            raise KeyError

    with pytest.raises(KeyError):
        engine()
    assert not given.preparation._prepared
    (thread,) = [each for each in threading.enumerate() if "preparation" in each.name]
    assert thread.daemon
    proceed.set()
    thread.join(60)
    assert len(given.preparation._prepared) == 1, "no further response is started"


def test_the_background_counts_no_progress_that_would_hide_a_hang_of_the_engine() -> None:
    given = step()
    before = CURRENT.work_units
    prepare(given.preparation, GENERATED)
    assert CURRENT.work_units == before
    selected(given, GENERATED)
    assert CURRENT.work_units == before + len(GENERATED)


def test_a_dead_grader_worker_fails_one_response_and_the_next_has_a_new_worker() -> None:
    given = step(grader="regex")
    prepare(given.preparation, GENERATED[:1])
    given.grader._grade._workers["regex"]._process.kill()
    given.grader._grade._workers["regex"]._process.wait()
    prepare(given.preparation, GENERATED[1:4], waiting=GENERATED[:1])
    assert given.preparation.verdicts(GENERATED[:4]) == ["right", "failed", "wrong", "right"]
    given.grader.close()


def test_seconds_of_the_background_are_a_metric_of_the_step_that_used_it() -> None:
    given, metrics = step(), Metrics()
    prepare(given.preparation, GENERATED)
    given.select(GENERATED, [GENERATED[0].prompt], 0, metrics)
    assert set(SECONDS) <= metrics.reduce().keys()
    plain = Metrics()
    step().select(GENERATED, [GENERATED[0].prompt], 0, plain)
    assert set(SECONDS[:2]) <= plain.reduce().keys() and SECONDS[2] not in plain.reduce()


def test_a_warning_about_the_chat_template_is_logged_once_for_all_responses(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<thinking>"
    given = step(chat_template=True, tokenizer=tiny_tokenizer(template))
    selected(given, GENERATED[:1])
    prepare(given.preparation, GENERATED)
    assert sum("<thinking>" in record.getMessage() for record in caplog.records) == 1
