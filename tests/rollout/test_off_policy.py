"""Off-policy responses: which ones come from the dataset, and what a step trains on."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from distill.config import Config, ContextMetricsConfig, OffPolicyConfig
from distill.data.references import References
from distill.data.teacher_prefix import TRACE_COVERAGE, PrefixStats, SamePromptPrefixes
from distill.data.train_grader import Graders, TrainGrader
from distill.metrics.phases import Phases
from distill.metrics.step import Metrics, step_numbers
from distill.rollout.gather import gather_rollouts
from distill.rollout.off_policy import off_policy_pairs, reference_rollout
from distill.rollout.responses import StepResponses
from distill.rollout.stream import numbered_requests
from distill.types import Problem, Prompt, Rollout, Sampling
from tests.tiny_tokenizer import THINK, tiny_tokenizer

END = 258
TOKENIZER = tiny_tokenizer()
SAMPLING = Sampling(1.0, max_new_tokens=6, stop_token_ids=(END,), responses_per_prompt=4, seed=11, max_total_length=12)


def prompts(count: int, answer: str = "2") -> list[Prompt]:
    return [Prompt(7 * i, (1, 2, 3), Problem(f"p{i}", answer, reference="abc"[: i % 3 + 1])) for i in range(count)]


def references() -> References:
    return References(TOKENIZER, (END,), 261, THINK)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 2), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_the_share_of_responses_is_chosen_by_a_hash_of_each_response(share: float, count: int) -> None:
    given = prompts(5)
    chosen = off_policy_pairs(given, 4, share, seed=3, step=2)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == off_policy_pairs(given[::-1], 4, share, seed=3, step=2), (
        "the order of the prompts has no influence"
    )
    larger = off_policy_pairs(given, 4, min(1.0, share + 0.3), seed=3, step=2)
    assert set(chosen) <= set(larger)


def test_the_choice_differs_between_steps_and_seeds_and_is_uniform() -> None:
    given = prompts(5)
    steps = [off_policy_pairs(given, 4, 0.5, seed=3, step=step) for step in range(400)]
    assert len(set(steps)) > 390 and steps[0] != off_policy_pairs(given, 4, 0.5, seed=4, step=0)
    counts = Counter(pair for pairs in steps for pair in pairs)
    assert len(counts) == 20 and all(150 < count < 250 for count in counts.values()), "200 expected, deviation 7"


@pytest.mark.parametrize(
    ("limit", "total", "ids", "finish"),
    [(6, 12, 4, "stop"), (4, 12, 4, "stop"), (3, 12, 3, "length"), (6, 6, 3, "length"), (1, 12, 1, "length")],
)
def test_a_response_of_the_dataset_is_truncated_like_a_generated_one(
    limit: int, total: int, ids: int, finish: str
) -> None:
    sampling = replace(SAMPLING, max_new_tokens=limit, max_total_length=total)
    found = reference_rollout(prompts(3)[2], 1, references(), sampling, window=100, step=5)
    complete = (*TOKENIZER("abc")["input_ids"], END)
    assert found.response_ids == complete[:ids] and found.finish == finish
    assert found.off_policy and found.logprobs == () and found.version == 5


class Rank:
    """A world of several ranks in which ``gather`` returns ``gathered``."""

    def __init__(self, rank: int = 0, size: int = 1, gathered: Any = None) -> None:
        self.rank, self.size = rank, size
        self.gather = lambda value: [value] if gathered is None else gathered

    def all_or_none(self, action: str) -> Any:
        return contextlib.nullcontext()


def responses(
    rank: Rank | None = None, graders: Graders | None = None, prefixes: Any = None, **loop: Any
) -> StepResponses:
    config = Config()
    context = replace(config.distillation.context_distillation, **loop.pop("context", {}))
    return StepResponses(
        config=replace(config, distillation=replace(config.distillation, context_distillation=context, **loop)),
        world=rank or Rank(),  # type: ignore[arg-type]
        sampling=SAMPLING,
        window=100,
        references=references(),
        grader=TrainGrader(graders or Graders(), lambda ids: str(TOKENIZER.decode(list(ids)))),
        teacher_prefixes=prefixes or SamePromptPrefixes(),
    )


def generated(text: str, index: int = 0, prompt: Prompt | None = None) -> Rollout:
    ids = (*TOKENIZER(text)["input_ids"], END)
    return Rollout(prompt or prompts(1)[0], index, ids, (0.0,) * len(ids), "stop", version=0)


def test_the_ranks_share_the_responses_of_the_dataset() -> None:
    given, half = prompts(3), OffPolicyConfig(share=0.5)
    own = [responses(Rank(rank, 4), off_policy=half).select([], given, 0, Metrics()) for rank in range(4)]
    sampling = responses(off_policy=half).sampling_at(0, given)
    pairs = [(r.prompt.prompt_id, r.response_index) for part in own for r in part]
    assert sorted(pairs) == list(sampling.omitted) and len(pairs) == 6 and max(map(len, own)) == 2
    assert all(r.off_policy and r.teacher_prefix_ids == (1, 2, 3) for part in own for r in part)


def test_own_responses_and_those_of_the_dataset_are_numbered_in_the_order_of_prompts_and_indices() -> None:
    """All ranks get the responses of the step in this order, which decides about the optimizer batches."""
    given = prompts(3)[::-1]
    step = responses(off_policy=OffPolicyConfig(share=0.5))
    of_dataset = step.select([], given, 5, Metrics())
    own = [
        Rollout(each.prompt, each.response_index, (7,), (-1.0,), "length", 5, order=each.order)
        for each in numbered_requests(given, step.sampling_at(5, given), 5, 100)
    ]
    assert len(own) == len(of_dataset) == 6
    world: Any = SimpleNamespace(gather=lambda sent: [sent[1::2], sent[::2]])
    gathered = gather_rollouts(world, [*of_dataset, *own], given)
    assert [rollout.order for rollout in gathered] == list(range(5 * 12, 6 * 12))
    assert [(r.prompt.prompt_id, r.response_index) for r in gathered] == [
        (p.prompt_id, i) for p in given for i in range(4)
    ]


def test_rollouts_are_gathered_with_all_fields() -> None:
    rollout = replace(reference_rollout(prompts(1)[0], 2, references(), SAMPLING, 50, 3), older_tokens=1, order=9)
    world: Any = SimpleNamespace(gather=lambda sent: [sent])
    prefixed = replace(rollout, teacher_prefix_ids=(4,), teacher_inside_thought=True)
    assert gather_rollouts(world, [prefixed], prompts(1), version=3) == [prefixed]
    with pytest.raises(AssertionError):
        gather_rollouts(world, [prefixed], prompts(1), version=4)
    twice = [replace(prefixed, prompt=prompts(2)[i], order=order) for i, order in ((0, 30), (1, 5), (0, 1))]
    assert gather_rollouts(world, twice, prompts(2)) == twice[::-1], "a prompt of two steps"


def test_statistics_of_responses_count_only_the_students_own() -> None:
    metrics = Metrics()
    step = responses(off_policy=OffPolicyConfig(share=1.0), graders=Graders(("exact",)))
    step.select([generated("2"), generated("33")], prompts(1), 0, metrics)
    values = metrics.reduce()
    assert values["mean_gen_tokens_per_sample"] == 2.5 and values["generated_tokens"] == 5
    assert values["truncation_rate"] == 0 and values["accuracy"] == 0.5 and values["judge_failures"] == 0
    assert values["off_policy_responses"] == 4 and values["off_policy_mean_tokens_per_sample"] == 2
    assert values["off_policy_truncation_rate"] == values["off_policy_dropped"] == 0
    assert values["total_num_tokens"] == 5 + 6 + 4 * 5, "prompts of 3 tokens"


LOOP = "1" * 70
"""A text that ends in a loop and is graded as wrong."""


@pytest.mark.parametrize("train_on", ["all", "right", "wrong"])
def test_statistics_of_responses_are_the_same_for_any_selection_of_responses_to_train_on(train_on: str) -> None:
    """Own lengths 2, 71 and 3, of two ranks 2, 71, 3 and 40: the median is 3 + 37 / 2."""
    given = [generated("2"), generated(LOOP, 1), generated("33", 2)]
    metrics = Metrics()
    rank = Rank(0, 2, [[2, 71, 3], [40]])
    responses(rank, Graders(("exact",)), train_on=train_on).select(given, prompts(1), 0, metrics)
    values = metrics.reduce()
    assert values["p50_gen_tokens_per_sample"] == 21.5 and values["p10_gen_tokens_per_sample"] == pytest.approx(2.3)
    assert values["repetition_rate"] == 1 / 3 and values["repeated_token_share"] == 70 / 76
    assert values["mean_gen_tokens_per_sample"] == 76 / 3 and values["max_gen_tokens_per_sample"] == 71


def test_quantiles_count_only_the_students_own_responses() -> None:
    metrics = Metrics()
    kept = responses(off_policy=OffPolicyConfig(share=0.5)).select([generated("22")], prompts(3), 0, metrics)
    assert len(kept) == 7 and metrics.reduce()["p90_gen_tokens_per_sample"] == 3


def test_a_step_without_own_responses_has_no_metric_without_a_value() -> None:
    for share, own in ((1.0, []), (0.5, [generated("2")])):
        metrics, phases = Metrics(), Phases()
        with phases("generation"):
            pass
        kept = responses(off_policy=OffPolicyConfig(share=share)).select(own, prompts(1), 0, metrics)
        metrics.add({"loss": (0.0, 0.0), "off_policy_loss": (1.0, 2.0)})
        values = step_numbers(metrics, phases, kept, None)
        assert ("train/loss" in values) is bool(own) and values["train/off_policy_loss"] == 0.5
        assert ("train/truncation_rate" in values) is ("train/p50_gen_tokens_per_sample" in values) is bool(own)
        assert values["train/global_valid_seqs"] == len(kept)


def test_without_gold_nothing_is_graded_and_no_metric_is_added() -> None:
    plain, other = Metrics(), Metrics()
    for answer, graders, metrics in (("2", None, plain), ("", Graders(("exact",)), other)):
        given = prompts(1, answer)
        kept = responses(graders=graders).select([generated("2", prompt=given[0])], given, 0, metrics)
        assert len(kept) == 1
    assert plain.reduce() == other.reduce() and "accuracy" not in plain.reduce()
    assert not any("off_policy" in name or "max_new" in name for name in plain.reduce())


class CountedPrefixes(SamePromptPrefixes):
    """Counts the rollouts whose teacher prefix is built."""

    built = 0

    def add(self, rollouts: Any) -> Any:
        self.built += len(rollouts)
        return super().add(rollouts)


@pytest.mark.parametrize(("train_on", "kept"), [("all", ["2", "3"]), ("right", ["2"]), ("wrong", ["3"])])
def test_responses_are_filtered_by_their_grade_before_the_teachers_prefixes(train_on: str, kept: list[str]) -> None:
    prefixes, metrics = CountedPrefixes(), Metrics()
    step = responses(graders=Graders(("exact",)), prefixes=prefixes, train_on=train_on)
    found = step.select([generated("2"), generated("3", 1)], prompts(1), 0, metrics)
    assert [str(TOKENIZER.decode(list(r.response_ids[:-1]))) for r in found] == kept and prefixes.built == len(kept)
    assert metrics.reduce()["accuracy"] == 0.5
    assert metrics.reduce().get("removed_by_train_on") == (None if train_on == "all" else 1)


def test_a_failed_grade_counts_as_neither_right_nor_wrong() -> None:
    graders = Graders(("choice",))
    for train_on in ("right", "wrong"):
        step, metrics = responses(graders=graders, train_on=train_on), Metrics()
        assert step.select([generated("A", prompt=prompts(1, "no option")[0])], prompts(1), 0, metrics) == []
        assert metrics.reduce()["judge_failures"] == 1 and metrics.reduce()["accuracy"] == 0


def test_off_policy_responses_are_kept_whatever_train_on_selects() -> None:
    step = responses(graders=Graders(("exact",)), train_on="right", off_policy=OffPolicyConfig(share=0.5))
    found = step.select([generated("3")], prompts(1), 0, Metrics())
    assert len(found) == 2 and all(r.off_policy for r in found)


@pytest.mark.parametrize(
    ("removed", "named", "absent"),
    [
        ([{"not right": 3}, {"not right": 1}], ["4 ", "train_on"], "max_total_sequence_length"),
        ([{"dropped_missing_trace": 2}, {}], ["dropped_missing_trace", "trace_source"], "train_on"),
        ([{"not right": 3}, {"dropped_x": 1}], ["3 ", "train_on", "dropped_x"], "nothing"),
    ],
)
def test_the_warning_of_an_empty_step_names_the_cause(
    removed: list[dict[str, int]], named: list[str], absent: str, caplog: pytest.LogCaptureFixture
) -> None:
    step, metrics = responses(Rank(0, 2, removed), train_on="right"), Metrics()
    step.warn_if_empty(4, [], metrics)
    assert all(word in caplog.text for word in ["step 4", *named]) and absent not in caplog.text
    assert metrics.reduce() == {"empty_step": 1}


def test_a_step_with_responses_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for train_on in ("all", "right"):
        metrics = Metrics()
        responses(train_on=train_on).warn_if_empty(4, [generated("2")], metrics)
        assert metrics.reduce() == ({} if train_on == "all" else {"empty_step": 0}) and not caplog.records


def test_the_sampling_of_a_step_depends_only_on_its_number() -> None:
    step = responses(max_new_tokens_schedule=((1, 3), (3, 5)), off_policy=OffPolicyConfig(share=0.5))
    assert [step.sampling_at(i, prompts(2)).max_new_tokens for i in (0, 1, 2, 3, 1)] == [3, 3, 5, 5, 3]
    again = responses(max_new_tokens_schedule=((1, 3), (3, 5)), off_policy=OffPolicyConfig(share=0.5))
    assert again.sampling_at(3, prompts(2)) == step.sampling_at(3, prompts(2)) != step.sampling_at(2, prompts(2))
    metrics = Metrics()
    step.select([], prompts(2), 2, metrics)
    assert metrics.reduce()["max_new_tokens"] == 5
    unused = replace(responses(), config=replace(Config(), policy=SimpleNamespace(generation=SAMPLING)))  # type: ignore[arg-type]
    assert unused.sampling_at(5, prompts(2)) == SAMPLING


@pytest.mark.parametrize(
    ("enabled", "template"), [(True, "{problem}{trace}"), (False, "{problem}{trace}"), (False, "{problem}")]
)
def test_trace_coverage_is_counted_also_without_metrics_of_context_distillation(enabled: bool, template: str) -> None:
    context = {"enabled": True, "teacher_prefix_template": template, "metrics": ContextMetricsConfig(enabled)}
    counts = PrefixStats({TRACE_COVERAGE: (1.0, 4.0), "other": (1.0, 2.0)}, {"dropped": 3.0})
    prefixes = SimpleNamespace(add=lambda rollouts: (rollouts, counts))
    metrics = Metrics()
    responses(prefixes=prefixes, context=context).select([], [], 0, metrics)
    values = metrics.reduce()
    assert values.get(TRACE_COVERAGE) == (0.25 if "trace" in template else None)
    assert ("other" in values) is enabled and ("dropped" in values) is enabled
