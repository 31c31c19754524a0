"""The probe: continuations, statistics, the sequence of a probe, and refused inputs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.checkpoint import changed_keys
from distill.config import Config
from distill.data.clock import RunClock, current_time
from distill.data.teacher_prefix import Prefix
from distill.errors import UserError
from distill.rollout.requests import response_limit, stream_seed
from distill.supervise.stop import StopRequested
from distill.types import Problem, Prompt, Rollout, Sampling
from distill.validation import HeldOut, Validation
from distill.validation.comparison import Comparison
from distill.validation.probe import Candidate, ProbeConfig, ProbedValidation
from distill.validation.probe_continuations import (
    by_start,
    continuations,
    index_of,
    joined,
    joined_at_start,
    kept_tokens,
    percentile,
    prompts_at_start,
)
from distill.validation.probe_setup import (
    candidates_of,
    check_probe_data,
    check_recipe_of_probe,
    check_run_probe,
    configs_of_templates,
    with_columns,
)
from distill.validation.probe_stats import (
    STARTS,
    Estimate,
    by_position,
    candidate_result,
    clustered,
)
from distill.validation.scores import Sample, scores
from tests.harness import config_for
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.validation.test_validation import Engine, NeverStops, Prefixes, validation

CONTEXT = "distillation.context_distillation"

# ---- statistics ------------------------------------------------------------------------------------------------------


def test_the_standard_error_takes_the_problems_as_the_sample() -> None:
    """Sums 2, 0 and 1 of 2, 2 and 1 values: sqrt(3 / 2 * (0.8^2 + 1.2^2 + 0.4^2)) / 5."""
    values = [("a", 1.0), ("b", 0.0), ("a", 1.0), ("c", 1.0), ("b", 0.0)]
    found = clustered(values)
    assert found.mean == 0.6 and found.stderr == pytest.approx((1.5 * (0.64 + 1.44 + 0.16)) ** 0.5 / 5)
    assert clustered(values[:1]) == Estimate(1.0, None)
    assert clustered([]).stderr is None


def test_accuracies_of_a_probe_have_the_errors_of_a_validation() -> None:
    generator = random.Random(0)
    samples = [sample(p, 0, 0, generator.random() < 0.4) for p in range(7) for _ in range(1 + p % 3)]
    found, expected = clustered((s.rollout.prompt.prompt_id, s.verdict == "right") for s in samples), scores(samples)
    assert (found.mean, found.stderr) == pytest.approx((expected["accuracy"], expected["accuracy_stderr"]))


def sample(problem: int, index: int, start: int, right: bool, tokens: int = 2, finish: Any = "stop") -> Sample:
    prompt = Prompt(problem, (5,), Problem(f"p{problem}"))
    rollout = Rollout(prompt, index_of(index, start), (1,) * tokens, (), finish, 0)
    return Sample(rollout, "set", "right" if right else "wrong")


def test_a_difference_is_paired_by_response() -> None:
    """Differences 1, 0 of problem 0 and 0 of problem 1; the unpaired response of problem 2 does not count."""
    ours = [sample(0, 0, 0, True, 3, "length"), sample(0, 1, 0, True), sample(1, 0, 0, False, 5), sample(2, 0, 0, True)]
    student = [sample(0, 0, 0, False, 1), sample(0, 1, 0, True, 4, "length"), sample(1, 0, 0, False, 4)]
    (cell,) = candidate_result("c", "context", by_start(ours), by_start(student), 1).cells
    assert (cell.start, cell.responses, cell.problems) == (0, 3, 2)
    assert cell.accuracy.mean == pytest.approx(2 / 3) and cell.student_accuracy.mean == pytest.approx(1 / 3)
    # The mean is 1/3. Sums 1 and 0 differ from 2/3 and 1/3 by 1/3 each: sqrt(2 / 1 * 2 / 9) / 3.
    assert cell.difference.mean == pytest.approx(1 / 3) and cell.difference.stderr == pytest.approx(2 / 9)
    assert (cell.truncated, cell.student_truncated) == pytest.approx((1 / 3, 1 / 3))
    assert (cell.avg_length, cell.student_avg_length) == pytest.approx((10 / 3, 3.0))


def test_the_trend_is_the_early_difference_minus_the_late_one() -> None:
    """Problem 0 is repaired from 0% and 10%, problem 1 from 0% and 90%: contrasts 1 and 0.5 - 0.5."""
    repaired = {0: (0, 10), 1: (0, 90)}
    ours = [sample(p, 0, start, start in repaired[p]) for p in (0, 1) for start in STARTS]
    student = [sample(p, 0, start, False) for p in (0, 1) for start in STARTS]
    found = candidate_result("c", "context", by_start(ours), by_start(student))
    assert [cell.difference.mean for cell in found.cells] == [1.0, 0.5, 0.0, 0.0, 0.5]
    assert found.trend.mean == 0.5 and found.trend.stderr == pytest.approx(0.5)  # sqrt(2 * 2 * 0.5^2) / 2


def test_each_token_counts_in_the_tenth_of_its_position() -> None:
    """T = 4: positions 1/8, 3/8, 5/8, 7/8; T = 1: position 1/2, which is in the sixth tenth."""
    kls = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([8.0]), torch.tensor([3.0, torch.nan, 3.0, 3.0])]
    found = by_position([Comparison(kl_R, kl_R, ()) for kl_R in kls])
    assert [tenth.tokens for tenth in found] == [0, 2, 0, 1, 0, 1, 2, 0, 2, 0]
    assert [tenth.forward_kl for tenth in found] == [None, 2.0, None, 2.0, None, 8.0, 3.0, None, 3.5, None]
    assert by_position([]) == ()


def test_the_overlap_is_a_mean_over_the_tokens_at_which_it_was_computed() -> None:
    zeros_R = torch.zeros(2)
    compared = [Comparison(zeros_R, zeros_R, (), torch.tensor(each)) for each in ([0.5, 1.0], [0.25, torch.nan])]
    found = by_position(compared)
    assert [(tenth.topk_overlap, tenth.tokens) for tenth in (found[2], found[7])] == [(0.375, 2), (1.0, 2)]
    assert by_position([*compared, Comparison(zeros_R, zeros_R, ())])[2].topk_overlap is None


def test_the_percentile_is_a_length_that_occurs() -> None:
    assert percentile(range(1, 11), 90) == 9 and percentile([5], 90) == 5 and percentile([9, 1, 5], 90) == 9


# ---- continuations ---------------------------------------------------------------------------------------------------


def response(prompt: Prompt, tokens: int, finish: Any, index: int = 0) -> Rollout:
    return Rollout(prompt, index, tuple(range(10, 10 + tokens)), (), finish, 4)


def test_a_continuation_keeps_the_first_tokens_and_the_length_limit() -> None:
    prompts = [Prompt(3, (1, 2), Problem("p3")), Prompt(8, (5,), Problem("p8"))]
    bases = [response(prompts[0], 10, "stop"), response(prompts[0], 20, "length", 1), response(prompts[1], 1, "stop")]
    assert [[kept_tokens(base, start) for start in STARTS] for base in bases] == [
        [0, 0, 2, 5, 8],  # of nine tokens before the stop token
        [0, 2, 6, 12, 18],
        [0, 0, 0, 0, 0],
    ]

    context = {3: Prefix((7, 7, 7), True)}
    found = continuations(bases, (0, 30), context, {3: 20, 8: 20})
    assert [each.prompt.student_ids[3:] for each in found] == [(), (10, 11), (), tuple(range(10, 16))]
    assert all(each.prompt.student_ids[:3] == (7, 7, 7) for each in found)
    assert [each.prompt.max_new_tokens for each in found] == [20, 18, 20, 14]
    assert response_limit(Sampling(1.0, 64, ()), found[1].prompt, 256) == 18
    plain = continuations(bases, STARTS, {p.prompt_id: Prefix(p.student_ids, False) for p in prompts}, {3: 20, 8: 20})
    ids = [each.prompt.prompt_id for each in plain]
    assert len(set(ids)) == 15 and [each.prompt.prompt_id for each in found] == [ids[0], ids[2], ids[5], ids[7]]
    rest = [Rollout(each.prompt, 0, (90, 91), (-1.0, -1.0), "stop", 4) for each in found]
    complete = joined(found, [replace(rest[0], finish="length"), *rest[1:]])
    assert [rollout.finish for rollout in complete] == ["length", "stop", "stop", "stop"]
    assert [rollout.response_ids for rollout in complete][:2] == [(90, 91), (10, 11, 90, 91)]
    assert all(r.prompt.prompt_id == 3 and r.prompt.inside_thought and r.prompt.student_ids == (1, 2) for r in complete)
    graded = by_start([Sample(rollout, "set") for rollout in complete])
    assert list(graded) == [((3, 0), 0), ((3, 0), 30), ((3, 1), 0), ((3, 1), 30)]
    (at_start,) = prompts_at_start(prompts, context, {3: 20, 8: 20})
    assert (at_start.prompt_id, at_start.student_ids, at_start.max_new_tokens) == (3, (7, 7, 7), 20)
    (first,) = joined_at_start(prompts, [Rollout(at_start, 1, (90,), (-1.0,), "stop", 4)])
    assert (first.prompt.student_ids, first.prompt.inside_thought, first.response_ids) == ((1, 2), True, (90,))
    assert list(by_start([Sample(first, "set")])) == [((3, 1), 0)]


def probing(tmp_path: Path, engine: Any, stop: Any = None, **parts: Any) -> ProbedValidation:
    """Probes every two steps of the problems 0 and 1, on one rank; problem 1 has too long a context."""
    prompts = tuple(Prompt(i, (5,), Problem(f"p{i}", "5", "set")) for i in range(3))
    graders, names = {0: "exact", 1: "exact"}, dict.fromkeys(range(3), "set")
    sampling = Sampling(1.0, 99, (), responses_per_prompt=2, max_total_length=64)
    held_out = HeldOut(prompts, graders, names)
    keys = [f"distillation.{key}" for key in ("val_period=3", "val_at_end=false")]
    more = {} if stop is None else {"stop": stop}
    base = validation(tmp_path, *keys, engine=engine, held_out=held_out, sampling=sampling, **more, **parts)
    settings = ProbeConfig(2, (Candidate("c", "context", contexts(3, 93, 3)),), 4, 8)
    return ProbedValidation(**vars(base), probe=settings)


def test_a_probe_generates_responses_the_control_and_each_candidate(tmp_path: Path) -> None:
    found = probing(tmp_path, engine := Engine(responses=2))
    assert [step for step in range(7) if found.probe_due(step)] == [2, 4, 6]
    assert [step for step in range(7) if found.due(step)] == [2, 3, 4, 6]
    probed = found.generate_probe(2)
    (responses, first), (control, second), (at_start, third), (candidate, fourth) = engine.calls
    assert responses == [(5,), (5,)], "only problems with a grader"
    assert first.seed == stream_seed(42, "probe responses") and first.max_new_tokens == 8
    assert second.seed == stream_seed(42, "probe continuations") and second.responses_per_prompt == 1
    assert control == [(5,)] * 4 * 4, "four responses, each of a stop token only, from four later starts"
    assert at_start == [(9, 9, 9)], "problem 1 leaves 7 of 100 tokens, and a response may need 8"
    assert candidate == [(9, 9, 9)] * 2 * 4
    assert (third, fourth) == (replace(first, max_total_length=None), second), "the random numbers of the control"
    assert [(r.prompt.prompt_id, r.response_index) for r in probed.continued["c"][:2]] == [(0, 0), (0, 5)]
    assert probed.skipped == {"c": 1} and probed.limits == {0: 8, 1: 8}
    assert [r.response_index for r in probed.control[:4]] == [0, 5, 0, 5]


def test_another_model_continues_only_with_its_own_engine(tmp_path: Path) -> None:
    found = probing(tmp_path, engine := Engine(responses=2))
    teacher = Candidate("t", "teacher", contexts(4, 4, 4))
    found.probe = replace(found._settings, candidates=(teacher,))
    other: Any = Engine(responses=2)
    probed = found.generate_probe(2)
    assert len(engine.calls) == 2 and not probed.continued and found.needs_teacher_engine
    found.continue_with(other, probed)
    prompt = (9, 9, 9, 9)
    assert [call[0] for call in other.calls] == [[prompt] * 2, [prompt] * 4 * 4]


def test_a_probe_that_is_not_due_generates_nothing(tmp_path: Path) -> None:
    found = probing(tmp_path, engine := Engine())
    assert found.generate(1) is None and not engine.calls
    assert found.generate(3) is not None and len(engine.calls) == 1, "only the validation"
    assert found.generate(2) is None and len(engine.calls) == 5, "only the probe: responses, control and candidate"
    found.probe = replace(found._settings, measured_at=4)
    assert not found.due(4)


def test_an_alarm_of_the_validation_stops_the_run_after_the_probe_is_reported(tmp_path: Path, monkeypatch: Any) -> None:
    found = probing(tmp_path, Engine(responses=2))
    reported: list[int] = []

    def stops(self: Any, generated: Any) -> None:
        raise StopRequested(6, "an alarm")

    monkeypatch.setattr(Validation, "report", stops)
    monkeypatch.setattr(ProbedValidation, "_report_of_run", lambda self, probed: reported.append(probed.step))
    generated = found.generate(6)
    with pytest.raises(StopRequested):
        found.report(generated)
    assert reported == [6]


class StopsAt(NeverStops):
    """A StopCheck whose n-th check finds a signal."""

    def __init__(self, n: int) -> None:
        self._left = n

    def raise_if_requested(self, step: int, check_time: bool = True) -> None:
        self._left -= 1
        if not self._left:
            raise StopRequested(step, "SIGTERM")


@pytest.mark.parametrize(("check", "calls"), [(1, 0), (2, 1), (3, 1), (6, 3)])
def test_a_signal_during_a_probe_stops_the_run_with_the_engine_asleep(tmp_path: Path, check: int, calls: int) -> None:
    found = probing(tmp_path, engine := Engine(), StopsAt(check))
    with pytest.raises(StopRequested):
        found.generate(2)
    assert engine.is_asleep and len(engine.calls) == calls


def contexts(*lengths: int) -> Any:
    """Teacher prefixes of these lengths; the stand-in has only the methods that a probe calls."""
    return Prefixes(*lengths)


def test_a_resumed_run_may_have_another_probe_period() -> None:
    loop = {"probe_period": 0, "seed": 1}
    assert not changed_keys({"distillation": loop}, {"distillation": {**loop, "probe_period": 5}})
    assert changed_keys({"distillation": loop}, {"distillation": {**loop, "seed": 5}})


# ---- refused inputs --------------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return config_for(tmp_path / "a", tmp_path / "a", "distillation.allow_degenerate=true", *overrides)


KNOWN = (f"{CONTEXT}.enabled=true", f"{CONTEXT}.teacher_prefix_template='Hint: {{problem}}'")


def test_a_recipe_without_a_known_candidate_is_refused(tmp_path: Path) -> None:
    good, bad, dynamic = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "dynamic.txt"
    good.write_text("Hint: {problem}")
    bad.write_text("Hint: {problem!r}")
    dynamic.write_text("{problem} {trace}")
    check_recipe_of_probe(config_of(tmp_path, *KNOWN), [])
    check_recipe_of_probe(config_of(tmp_path), [good])
    check_recipe_of_probe(config_of(tmp_path, f"teacher.model_name={tmp_path}/b"), [])
    template = f"{CONTEXT}.teacher_prefix_template"
    for key, overrides, templates in (
        (f"{CONTEXT}.enabled", (), []),
        (template, (f"{CONTEXT}.enabled=true",), []),
        (template, (f"teacher.model_name={tmp_path}/b", f"{CONTEXT}.enabled=true", f"{CONTEXT}.mode=frozen"), []),
        ("--template", KNOWN, [good, bad]),
        ("--template", KNOWN, [dynamic]),
        ("--template", KNOWN, [tmp_path / "missing.txt"]),
        ("--template", KNOWN, [tmp_path]),
    ):
        with pytest.raises(UserError) as caught:
            check_recipe_of_probe(config_of(tmp_path, *overrides), templates)
        assert caught.value.key == key, caught.value


def test_templates_add_their_columns_to_the_held_out_problems(tmp_path: Path) -> None:
    def held_out(**columns: str) -> HeldOut:
        return HeldOut((Prompt(4, (5,), Problem("p", "5", "set", columns)),), {4: "exact"}, {4: "set"})

    found = with_columns(held_out(trace="t"), [held_out(hint="h"), held_out(trace="t", note="n")])
    assert found.prompts[0].problem.columns == {"trace": "t", "hint": "h", "note": "n"}
    assert found.graders == {4: "exact"} and found.prompts[0].student_ids == (5,)
    hint = tmp_path / "hint.txt"
    hint.write_text("{problem} {hint}\n")
    given = config_of(tmp_path, f"{CONTEXT}.enabled=true", f"{CONTEXT}.teacher_messages_key=messages")
    (context,) = [each.distillation.context_distillation for each in configs_of_templates(given, [hint])]
    assert context.teacher_messages_key is None and context.teacher_prefix_template == "{problem} {hint}"


@pytest.mark.parametrize("chat_template", [None, "teacher.jinja"])
def test_a_context_next_to_another_teacher_has_the_prompts_of_the_run_with_the_recommended_settings(
    tmp_path: Path, chat_template: str | None
) -> None:
    hint = tmp_path / "hint.txt"
    hint.write_text("Hint: {problem}\n")
    config = config_of(
        tmp_path,
        *(f"teacher.model_name={tmp_path}/b", f"{CONTEXT}.enabled=true", f"{CONTEXT}.mode=frozen"),
        f"{CONTEXT}.teacher_messages_key=messages",
        *([] if chat_template is None else [f"teacher.tokenizer.chat_template={tmp_path}/{chat_template}"]),
    )
    thinking = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    tokenizers = tiny_tokenizer(), tiny_tokenizer(thinking)
    _, context = candidates_of(config, [hint], contexts(), tokenizers, 261, RunClock(current_time()))
    prefix = context.prefixes.prefix_of(Prompt(0, (5,), Problem("1+1?", "2", "set")))
    assert isinstance(prefix, Prefix)
    end = "" if chat_template is None else "<think>\n"
    text = tokenizers[0].decode(list(prefix.token_ids))
    assert text == f"<|im_start|>user\nHint: 1+1?<|im_end|>\n<|im_start|>assistant\n{end}"
    assert {f"{CONTEXT}.mode=self_frozen", f"{CONTEXT}.teacher_messages_key=null"} < set(context.lines)


def test_a_run_whose_teacher_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    period = "distillation.probe_period=5"
    prompts = (Prompt(0, (5,) * 10, Problem("p", "5", "set")),)
    held_out, prefixes = HeldOut(prompts, {0: "exact"}, {0: "set"}), contexts(20)
    check_run_probe(config_of(tmp_path), HeldOut(prompts), prefixes, 30)
    check_run_probe(config_of(tmp_path, period, *KNOWN), HeldOut(), prefixes, 30)
    short = "policy.generation.val_max_new_tokens=10"
    check_run_probe(config_of(tmp_path, period, short, *KNOWN), held_out, prefixes, 30)
    for key, overrides, data, window in (
        ("distillation.probe_period", [f"{CONTEXT}.enabled=true"], held_out, 30),
        ("distillation.probe_period", [], held_out, 30),
        ("data.validation.env_name", KNOWN, HeldOut(prompts), 30),
        ("policy.generation.val_max_new_tokens", KNOWN, held_out, 29),
    ):
        with pytest.raises(UserError) as caught:
            check_run_probe(config_of(tmp_path, period, short, *overrides), data, prefixes, window)
        assert caught.value.key == key


def test_a_candidate_without_any_usable_prompt_is_refused(tmp_path: Path) -> None:
    held_out = HeldOut((Prompt(0, (5,), Problem("p", "5", "set")),), {0: "exact"}, {0: "set"})
    with pytest.raises(UserError) as caught:
        check_probe_data(config_of(tmp_path), held_out, [Candidate("c", "context", contexts(0))], 256)
    assert caught.value.key == "policy.generation.val_max_new_tokens"


def test_a_probe_period_needs_validation_data(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, "distillation.probe_period=5", "distillation.val_period=0", "data.validation=null")
    assert caught.value.key == "data.validation"
