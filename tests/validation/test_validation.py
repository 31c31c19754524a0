"""Validation: problems, graders, metrics, the comparison with the teacher, and what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import DatasetConfig, LoggerConfig
from distill.data.grading import Grader
from distill.data.teacher_prefix import Prefix, PrefixStats
from distill.errors import UserError
from distill.metrics.sinks import Samples, open_recorder
from distill.metrics.summary import summary, validation_line
from distill.rollout.factory import validation_sampling_of
from distill.rollout.requests import response_seed, stream_seed
from distill.supervise.stop import StopRequested
from distill.types import Problem, Prompt, Rollout, Sampling
from distill.validation import HeldOut, Validation, load_held_out, validation_config
from distill.validation.comparison import Comparison, TopTokens
from distill.validation.scores import (
    Sample,
    by_source,
    format_sample,
    jsonl_line,
    sample_row,
    scores,
    source_names,
    table_row,
    write_samples,
)
from tests.harness import config_for
from tests.tiny_tokenizer import tiny_tokenizer

# ---- graders ---------------------------------------------------------------------------------------------------------

VERDICTS = [
    ("math", r"so it is \boxed{\frac{1}{2}}", "0.5", "right"),
    ("math", "She has 3 left, then 764.", "764", "right"),
    ("math", "She has 764, then 3 left.", "764", "wrong"),
    ("math", r"\boxed{(x+1)^2}", "x^2+2x+1", "right"),
    ("math", r"$18$ pies", r"\boxed{18}", "right"),
    ("math", "I do not know.", "5", "wrong"),
    ("math", "3", "", "failed"),
    ("math", r"\boxed{5} no, wait: \boxed{6}", "6", "right"),
    ("math", r"\boxed{5} no, wait: \boxed{6}", "5", "wrong"),
    ("math", r"First \boxed{5}, then \boxed{\frac{1}{2}} of {it", "0.5", "right"),
    ("math", r"It is \boxed{5}, or \boxed{1", "5", "right"),
    ("math", r"<think>\boxed{5}?</think> It is 6.", "6", "right"),
    ("math", r"<think>\boxed{5}?</think> It is 6.", "5", "wrong"),
    ("math", r"<think>it may be \boxed{5}", "5", "wrong"),
    ("math", r"<think>5</think> It is 5. <think>or", "5", "wrong"),
    ("exact", "<think>B or C?</think>\n C \n", "C", "right"),
    ("exact", "It is C", "C", "wrong"),
    ("regex", "<think>Not so.</think> Once upon a time", r"^Once\b", "right"),
    ("regex", "Once <think>Not so.</think> so", r"^Once\b", "wrong"),
    ("regex", "(", "(", "failed"),
    ("regex", "<think>perhaps 42, but no", "42", "wrong"),
    ("exact", "<think>\nC", "<think>\nC", "wrong"),
]


def test_a_response_is_graded_by_the_grader_of_its_dataset() -> None:
    with Grader() as grade:
        found = [(*case, grade(*case)) for *case, _ in VERDICTS]
    assert found == VERDICTS


def test_a_grader_that_hangs_fails_one_response_and_grades_the_next() -> None:
    with Grader(seconds=2.0) as grade:
        assert grade("regex", "a" * 40 + "!", "^(a+)+$") == "failed"
        assert grade("regex", "aaa", "^(a+)+$") == "right"


# ---- metrics --------------------------------------------------------------------------------------------------------


def sample(
    problem: str, verdict: Any, tokens: int = 4, finish: Any = "stop", source: str = "set", **more: Any
) -> Sample:
    prompt = Prompt(more.pop("prompt_id", 0), (7, 8), Problem(problem, "5", source))
    return Sample(Rollout(prompt, 0, (1,) * tokens, (-1.0,) * tokens, finish, 0), source, verdict, **more)


def test_metrics_of_six_responses_to_three_problems_equal_a_hand_calculation() -> None:
    samples = [
        sample("a", "right", 2, forward_kl_R=torch.tensor([1.0, 2.0]), reverse_kl_R=torch.tensor([0.5, 1.5])),
        sample("a", "wrong", 1, "length", forward_kl_R=torch.tensor([6.0]), reverse_kl_R=torch.tensor([4.0])),
        sample("b", "right", 3),
        sample("b", "right", 3),
        sample("c", "failed", 9, "length"),
        sample("c", "wrong", 6, "length"),
    ]
    assert scores(samples) == {
        "accuracy": 0.5,  # 3 of 6; by problem 1/2, 1 and 0
        "accuracy_stderr": pytest.approx(0.2886751),  # standard deviation of these, 0.5, over sqrt(3)
        "pass@2": pytest.approx(2 / 3),  # of 2 responses to a, b and c, at least one is right: 1, 1 and 0
        "pass@2_stderr": pytest.approx(1 / 3),  # standard deviation of these, 0.5774, over sqrt(3)
        "judge_failures": 1.0,
        "avg_length": 4.0,  # 24 / 6
        "truncation_rate": 0.5,
        "repetition_rate": 0.0,
        "repeated_token_share": 0.375,  # the response of 9 equal tokens has the same 8-gram twice: 9 of 24 tokens
        "num_answers": 6.0,
        "num_problems": 3.0,
        "num_compared": 2.0,
        "forward_kl": 3.0,  # (1 + 2 + 6) / 3 tokens; the mean of the responses' means would be 3.75
        "reverse_kl": 2.0,
    }


def test_repeats_of_a_problem_count_as_one_problem() -> None:
    """Four prompts, two problems: means 1 and 0, standard deviation 0.7071 over sqrt(2). By prompts: 0.2887."""
    samples = [sample(p, v, prompt_id=i) for i, (p, v) in enumerate(zip("abab", ["right", "wrong"] * 2, strict=True))]
    assert scores(samples)["accuracy_stderr"] == pytest.approx(0.5)
    assert scores(samples)["num_problems"] == 2


def test_problems_are_weighted_by_their_number_of_responses() -> None:
    """1 of 1 and 1 of 3: sqrt(2 / 1 * ((1 - 0.5)^2 + (1 - 1.5)^2)) / 4."""
    samples = [sample("a", "right"), sample("b", "right"), sample("b", "wrong"), sample("b", "wrong")]
    assert scores(samples)["accuracy"] == 0.5 and scores(samples)["accuracy_stderr"] == pytest.approx(0.25)


def test_metrics_that_were_not_measured_are_missing() -> None:
    ungraded = sample("b", None)
    names = {"avg_length", "truncation_rate", "repetition_rate", "repeated_token_share"}
    names |= {"num_answers", "num_problems", "num_compared"}
    assert scores([ungraded]).keys() == names
    both = scores([sample("a", "right"), ungraded])
    assert both["accuracy"] == 1.0 and "accuracy_stderr" not in both, "one problem has no standard error"
    assert scores([]) == {}


def test_each_dataset_has_its_own_metrics() -> None:
    values = by_source([sample("a", "right", 2), sample("a", "wrong", 4, source="other"), sample("b", "wrong", 9)])
    assert values["validation/accuracy"] == pytest.approx(1 / 3) and values["validation/avg_length"] == 5.0
    assert values["validation/set/accuracy"] == 0.5 and values["validation/set/avg_length"] == 5.5
    assert values["validation/other/accuracy"] == 0.0 and values["validation/other/num_answers"] == 1.0


def test_datasets_have_short_unique_names() -> None:
    different = ("HuggingFaceH4/aime_2024", "prompts/gsm.jsonl", "x/Qwen2.5")
    assert source_names([(source, "", "") for source in different]) == ["aime_2024", "gsm", "Qwen2.5"]
    assert source_names([("a/test.jsonl", "", ""), ("b/test.jsonl", "", "")]) == ["a.test.jsonl", "b.test.jsonl"]
    parts = [("o/AIME2025", "I", "test"), ("o/AIME2025", "II", "test"), ("o/x", "", "train[:9%]")]
    assert source_names(parts) == ["AIME2025.I.test", "AIME2025.II.test", "x"]
    assert source_names([("a.jsonl", "", "train[:9%]"), ("a.jsonl", "", "")]) == ["a.train_9_", "a"]
    assert source_names([("a.jsonl", "", "")] * 2) == ["a.jsonl.0", "a.jsonl.1"]


def test_a_problem_in_two_datasets_counts_twice() -> None:
    assert by_source([sample("a", "right"), sample("a", "wrong", source="other")])["validation/num_problems"] == 2


def test_a_line_of_the_samples_file_holds_all_fields_of_a_response() -> None:
    tokenizer = tiny_tokenizer()
    ids = (*tokenizer("4<think>")["input_ids"], 258)
    prompt = Prompt(3, tuple(tokenizer("2+2?")["input_ids"]), Problem("2+2?", "4", "x.jsonl"))
    answer = Rollout(prompt, 1, ids, (-1.0,) * 3, "stop", 0, prompt.student_ids)
    kl = torch.tensor([0.25, 0.0, 1.0])
    top = (TopTokens(2, ((258, 0.7000001), (259, 0.2)), ((ids[0], 0.123456),)),)
    found = Sample(answer, "x", "right", kl, 2 * kl, top)
    assert json.loads(jsonl_line(found, tokenizer.decode)) == {
        "prompt_id": 3,
        "answer_number": 1,
        "source": "x",
        "prompt": "2+2?",
        "teacher_prompt": None,
        "answer": "4<think>",
        "gold": "4",
        "verdict": "right",
        "finish": "stop",
        "tokens": 3,
        "forward_kl": [0.25, 0.0, 1.0],
        "reverse_kl": [0.5, 0.0, 2.0],
        "token_ids": list(ids),
        "token_texts": ["4", "<think>", "<|im_end|>"],
        "top_tokens": [
            {"at": 2, "student": [[258, "<|im_end|>", 0.7], [259, "<think>", 0.2]], "teacher": [[ids[0], "4", 0.12346]]}
        ],
    }
    row = table_row(found, tokenizer.decode)
    assert (row["mean_forward_kl"], row["mean_reverse_kl"]) == (0.41667, 0.83333) and "token_ids" not in row
    other = replace(found, rollout=replace(answer, teacher_prefix_ids=(*prompt.student_ids, 258)))
    assert sample_row(other, tokenizer.decode)["teacher_prompt"] == "2+2?<|im_end|>"
    assert format_sample(found, tokenizer.decode) == "problem: 2+2?\nresponse: 4<think>\nright (gold: 4)"
    cut = Sample(replace(answer, finish="length"), "x", read_ids=(*prompt.student_ids, 258))
    row = json.loads(jsonl_line(cut, tokenizer.decode))
    assert (row["prompt"], row["answer"], row["forward_kl"]) == ("2+2?<|im_end|>", "4<think><|im_end|>", None)
    assert row["teacher_prompt"] is None and row["top_tokens"] is None and len(row["token_texts"]) == 3
    broken = replace(found, forward_kl_R=torch.tensor([0.5, torch.nan, torch.inf]))
    assert json.loads(jsonl_line(broken, tokenizer.decode))["forward_kl"] == [0.5, None, None]
    assert table_row(broken, tokenizer.decode)["mean_forward_kl"] is None
    assert "[truncated]\nnot graded" in format_sample(cut, tokenizer.decode)


# ---- problems --------------------------------------------------------------------------------------------------------


def dataset(path: Path, texts: Sequence[str], answer: str = "5", **keys: Any) -> DatasetConfig:
    path.write_text("".join(json.dumps({"input": text, "output": answer}) + "\n" for text in texts))
    return DatasetConfig(data_path=str(path), **keys)


def held_out(datasets: Sequence[DatasetConfig], at_most: int | None = None) -> Any:
    return load_held_out(datasets, tiny_tokenizer(chat_template=None), 20, None, at_most)


def test_problems_up_to_the_limit_are_taken_in_turn_from_each_dataset(tmp_path: Path) -> None:
    sets = [
        dataset(tmp_path / "a.jsonl", ["a0", "too long a problem, this one", "a1", "a2", "a3"]),
        dataset(tmp_path / "b.jsonl", ["b0", "b1"], env_name=None),
    ]
    five = held_out(sets, 5)
    assert [prompt.problem.text for prompt in five.prompts] == ["a0", "b0", "a1", "b1", "a2"]
    assert [prompt.prompt_id for prompt in five.prompts] == [0, 5, 2, 6, 3]
    assert [five.grader(prompt) for prompt in five.prompts] == ["math", None, "math", None, "math"]
    assert [five.name(prompt) for prompt in five.prompts] == ["a", "b", "a", "b", "a"]
    assert [len(held_out(sets, n).prompts) for n in (1, 6, 7, None)] == [1, 6, 6, 6]


def test_a_problem_without_a_gold_answer_is_not_graded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = dataset(tmp_path / "a.jsonl", ["a0"], answer="")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"input": "a1", "output": "5"}\n')
    found = held_out([entry])
    assert [found.grader(prompt) for prompt in found.prompts] == [None, "math"]
    assert [message.partition(" problems")[0] for message in caplog.messages] == ["data.validation: 1 of 2"]


def test_two_entries_of_one_file_are_two_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    entries = [dataset(path, ["a0", "a1", "a2"], split="train[:1]"), dataset(path, ["a0", "a1", "a2"])]
    found = held_out(entries)
    assert [found.name(prompt) for prompt in found.prompts] == ["a.train_1_", "a", "a", "a"]


def test_held_out_problems_without_the_trace_column_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both in JSONL and Parquet; a null is a missing trace, as in training."""
    rows = [{"input": "a0", "output": "5", "solution": "s"}, {"input": "a1", "output": "5", "solution": None}]
    lines = [*rows, {"input": "a2", "output": "5"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    pq.write_table(pa.Table.from_pylist([{"input": "b0", "output": "5"}]), tmp_path / "b.parquet")
    entries = [DatasetConfig(data_path=str(tmp_path / name)) for name in ("a.jsonl", "b.parquet")]
    found = load_held_out(entries, tiny_tokenizer(chat_template=None), 20, None, None, "solution")
    columns = {prompt.problem.text: dict(prompt.problem.columns) for prompt in found.prompts}
    assert columns == {"a0": {"solution": "s"}, "a1": {"solution": ""}, "a2": {}, "b0": {}}
    assert [message.partition(" problems")[0] for message in caplog.messages] == [
        "data.validation.0: 1 of 3",
        "data.validation.1: 1 of 1",
    ]
    assert all("solution" in message for message in caplog.messages)


def test_unusable_validation_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl is empty"):
        held_out([dataset(tmp_path / "a.jsonl", [])])
    with pytest.raises(UserError, match=r"data\.validation\.output_key") as caught:
        held_out([dataset(tmp_path / "a.jsonl", ["a"], answer="")])
    assert (caught.value.key, caught.value.value) == ("data.validation.env_name", "math")
    with pytest.raises(UserError, match=r"'\('") as caught:
        held_out(
            [dataset(tmp_path / "a.jsonl", ["a"]), dataset(tmp_path / "b.jsonl", ["b"], answer="(", env_name="regex")]
        )
    assert (caught.value.key, caught.value.value) == ("data.validation.1.env_name", "regex")


def test_a_missing_math_verify_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.grading.find_spec", lambda name: None)
    with pytest.raises(UserError, match="math-verify") as caught:
        held_out([dataset(tmp_path / "a.jsonl", ["a"])])
    assert caught.value.key == "data.validation.env_name"


def test_validation_samples_with_its_own_settings_and_seeds(tmp_path: Path) -> None:
    own = ["val_temperature=0.5", "val_top_p=0.9", "val_top_k=7"]
    config = config_for(
        tmp_path / "a",
        tmp_path / "b",
        *(f"policy.generation.{key}" for key in own),
        "distillation.val_num_generations=3",
    )
    sampling = validation_sampling_of(config, (1,))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.responses_per_prompt) == (0.5, 0.9, 7, 3)
    seeds = {response_seed(seed, 0, 0, 0) for seed in (42, sampling.seed, stream_seed(42, "in_context"))}
    assert sampling.seed != 42 and len(seeds) == 3
    assert stream_seed(42, "validation") == sampling.seed != stream_seed(43, "validation")


# ---- schedule and context --------------------------------------------------------------------------------------------


class NeverStops:
    """A StopCheck without requests."""

    def has_signal(self) -> bool:
        return False

    def raise_if_requested(self, step: int, check_time: bool = True) -> None:
        pass


class OneRank:
    """The world of a single rank."""

    device, is_main, size = None, False, 1

    def all_or_none(self, action: str) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def validation(tmp_path: Path, *overrides: str, **parts: Any) -> Validation:
    """A validation of two problems on one rank, for a run of five steps; ``parts`` replace its parts."""
    prompts = tuple(Prompt(i, (5,), Problem(f"p{i}", "5", "set")) for i in range(2))
    config = config_for(tmp_path / "model", tmp_path / "model", "distillation.allow_degenerate=true", *overrides)
    unused = ("decode", "teacher_prefixes", "engine", "sampling", "recorder", "checkpoints", "compare")
    given: dict[str, Any] = {
        **dict.fromkeys(unused),
        "config": validation_config(config, 0, 5),
        "world": OneRank(),
        "held_out": HeldOut(prompts),
        "run_dir": tmp_path,
        "stop": NeverStops(),
        "alarms": SimpleNamespace(check=lambda step, values: {}, raise_if_stopped=lambda step: None),
    }
    return Validation(**{**given, **parts})


@pytest.mark.parametrize(
    ("settings", "measured_at", "steps"),
    [
        (("val_period=2", "val_at_start=true", "val_at_end=true"), -1, [0, 2, 4, 5]),
        (("val_period=2",), -1, [2, 4]),
        (("val_period=5",), -1, [5]),
        (("val_period=2", "val_at_end=true"), 4, [2, 5]),
        (("val_period=0", "val_at_end=true"), -1, [5]),
        (("val_period=0",), -1, []),
    ],
)
def test_validation_is_due_as_configured_and_never_twice(tmp_path, settings, measured_at, steps) -> None:
    found = validation(tmp_path, *(f"distillation.{key}" for key in settings), measured_at=measured_at)
    assert [step for step in range(6) if found.due(step)] == steps


class Engine:
    """Generates responses of one token and records the prompts."""

    window = 100

    def __init__(self, responses: int = 1) -> None:
        self._responses = responses
        self.calls: list[tuple[list[tuple[int, ...]], Sampling]] = []
        self.is_asleep = False

    def share_of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        return prompts

    def sleep(self) -> None:
        self.is_asleep = True

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Callable[[], bool]
    ) -> list[Rollout]:
        self.calls.append(([prompt.student_ids for prompt in prompts], sampling))
        return [Rollout(p, i, (1,), (-1.0,), "stop", step) for p in prompts for i in range(self._responses)]


class Stops(NeverStops):
    """A StopCheck whose second check finds a signal, received during the generation."""

    def __init__(self) -> None:
        self.time_checks: list[bool] = []

    def raise_if_requested(self, step: int, check_time: bool = True) -> None:
        self.time_checks.append(check_time)
        if len(self.time_checks) == 2:
            raise StopRequested(step, "SIGTERM")


@pytest.mark.parametrize(("step", "time_counts"), [(2, True), (5, False)])
def test_a_signal_during_held_out_generation_stops_the_run_with_the_engine_asleep(tmp_path, step, time_counts) -> None:
    keys = [f"distillation.{key}" for key in ("val_period=2", "val_at_end=true")]
    found = validation(tmp_path, *keys, engine=(engine := Engine()), stop=(stop := Stops()))
    assert found.generate(1) is None and not stop.time_checks, "not due: nothing is checked"
    with pytest.raises(StopRequested) as caught:
        found.generate(step)
    assert caught.value.step == step and engine.is_asleep
    assert stop.time_checks == [time_counts] * 2


class Prefixes:
    """Teacher prefixes of 0 tokens (a missing trace) or more, by prompt id, for problems with ``column``."""

    column: str | None = None

    def __init__(self, *lengths: int) -> None:
        self._lengths = lengths

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        prefixed = [replace(r, teacher_prefix_ids=(9,) * self._lengths[r.prompt.prompt_id]) for r in rollouts]
        return [r for r in prefixed if r.teacher_prefix_ids], PrefixStats()

    def prefix_of(self, prompt: Prompt) -> Prefix | str:
        length = self._lengths[prompt.prompt_id]
        return Prefix((9,) * length, False) if length else "missing_trace"

    def can_read(self, problem: Problem) -> bool:
        return self.column is None or self.column in problem.columns


def test_the_first_validation_also_generates_with_a_known_context_that_fits(tmp_path) -> None:
    context = "distillation.context_distillation"
    keys = [f"{context}.enabled=true", "distillation.val_at_start=true", "distillation.val_period=2"]
    plain = Sampling(1.0, 8, (), seed=7, max_total_length=256)
    parts = {"teacher_prefixes": Prefixes(3, 93), "sampling": plain}
    known = [*keys, context + ".teacher_prefix_template='Hint: {problem}'"]
    found = validation(tmp_path, *known, **parts, engine=(engine := Engine()))
    generated = found.generate(0)
    assert generated is not None and generated.in_context is not None
    assert [r.teacher_prefix_ids for r in generated.in_context.rollouts] == [(9, 9, 9)]
    assert generated.in_context.skipped == {1: "no room"}, (
        "93 of 100 tokens leave 7 for the response, the plain prompt leaves 8"
    )
    (first, sampling), (second, other) = engine.calls
    assert (first, second) == ([(5,), (5,)], [(9, 9, 9)])
    assert sampling == plain and other == replace(plain, seed=stream_seed(42, "in_context"), max_total_length=None)
    later = found.generate(2)
    assert later is not None and later.in_context is None, "only before the first and after the last step"
    last = validation(tmp_path, *known, "distillation.val_at_end=true", **parts, engine=Engine()).generate(5)
    assert last is not None and last.in_context is not None and len(last.in_context.rollouts) == 1
    another = f"teacher.model_name={tmp_path}/other"
    for settings in (keys, [*known, another, f"{context}.enabled=false"], [*known, another, f"{context}.mode=frozen"]):
        at_start = validation(tmp_path, *settings, **parts, engine=Engine()).generate(0)
        assert at_start is not None and at_start.in_context is None


def reported(tmp_path: Path, prefixes: Prefixes, prompts: Sequence[Prompt], *overrides: str, responses: int = 1) -> Any:
    """Metrics and texts of a first validation on one rank, with KL 0."""
    recorder = MagicMock()
    keys = ["distillation.val_at_start=true", "distillation.context_distillation.enabled=true"]
    keys += ["distillation.context_distillation.teacher_prefix_template='Hint: {problem}'"]
    names = {p.prompt_id: p.problem.source for p in prompts}
    found = validation(
        tmp_path,
        *(*keys, *overrides),
        engine=Engine(responses),
        teacher_prefixes=prefixes,
        sampling=Sampling(1.0, 8, ()),
        recorder=recorder,
        checkpoints=MagicMock(),
        decode=lambda ids: f"{len(ids)}",
        held_out=HeldOut(tuple(prompts), dict.fromkeys(names, "exact"), names),
        compare=lambda rollouts, step: [Comparison(torch.zeros(1), torch.zeros(1), ())] * len(rollouts),
    )
    found.report(found.generate(0))
    return recorder.record.call_args.args[1], recorder.show.call_args.args[1].texts


def problems_of(sources: str, **columns: str) -> list[Prompt]:
    return [Prompt(i, (5,), Problem(f"p{i}", "0", source, columns)) for i, source in enumerate(sources)]


def test_problems_left_out_of_the_accuracy_in_context_are_counted_and_logged_with_reasons(
    tmp_path: Path, caplog: Any
) -> None:
    values, _ = reported(tmp_path, Prefixes(3, 0, 93, 4), problems_of("aabb"))
    assert values["validation/num_problems"] == 4 and values["validation/in_context_num_problems"] == 2
    assert (values["validation/a/in_context_num_problems"], values["validation/b/in_context_num_problems"]) == (1, 1)
    assert values["validation/b/in_context_accuracy"] == 1.0 and "validation/in_context_accuracy_stderr" in values
    assert (values["validation/num_compared"], values["validation/a/num_compared"]) == (3, 1)
    in_context, compared = caplog.messages
    assert in_context.startswith("2 of 4") and re.findall(r"(\d) have no trace|(\d) have a context", in_context) == [
        ("1", ""),
        ("", "1"),
    ]
    assert "1 of 4" in compared and "KL" in compared


def test_num_problems_in_context_is_zero_if_no_context_fits(tmp_path: Path) -> None:
    values, _ = reported(tmp_path, Prefixes(93, 94), problems_of("aa"))
    assert values["validation/in_context_num_problems"] == 0 and "validation/in_context_accuracy" not in values


def test_a_problem_without_the_trace_column_is_graded_but_not_compared(tmp_path: Path) -> None:
    context = "distillation.context_distillation"
    static = [f"{context}.trace_source=static_dataset", f"{context}.static_trace.answer_column=solution"]
    with_it, without = problems_of("a", solution="s"), problems_of("ab")[1:]
    prefixes = Prefixes(3, 3)
    prefixes.column = "solution"
    values, _ = reported(tmp_path, prefixes, [*with_it, *without], *static)
    assert (values["validation/accuracy"], values["validation/num_compared"]) == (1.0, 1)
    assert "validation/b/forward_kl" not in values and values["validation/in_context_num_problems"] == 1


def test_logged_samples_are_of_different_problems(tmp_path: Path) -> None:
    keys = ["logger.num_val_samples_to_print=2"]
    _, texts = reported(tmp_path, Prefixes(3, 3, 3), problems_of("aaa"), *keys, responses=2)
    assert [text.partition("\n")[0] for text in texts] == ["problem: p0", "problem: p1"]


# ---- console and files -----------------------------------------------------------------------------------------------

VALUES = {
    "validation/accuracy": 0.125,
    "validation/accuracy_stderr": 0.0625,
    "validation/in_context_accuracy": 0.5,
    "validation/in_context_accuracy_stderr": 0.125,
    "validation/forward_kl": 0.25,
    "validation/reverse_kl": 0.5,
    "validation/num_answers": 8.0,
    "validation/num_problems": 4.0,
}


def test_a_validation_is_logged_to_console_and_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recorder = open_recorder(LoggerConfig(wandb_enabled=False), tmp_path, main=True, total_steps=4)
    recorder.record(0, VALUES)
    recorder.show(0, Samples("validation", ["problem: 1+1\nanswer: *2*"]))
    recorder.close()
    line = "validation at 0/4  accuracy 12.5% +- 6.2%  (in context 50.0% +- 12.5%)  KL fwd 0.2500 rev 0.5000"
    assert caplog.messages == [line, "\nproblem: 1+1\nanswer: *2*\n"]
    assert validation_line(2, 4, {"validation/avg_length": 3.0}) == "validation at 2/4  length 3"
    short = {name: VALUES[name] for name in ("validation/num_answers", "validation/num_problems")}
    assert validation_line(2, 4, short).endswith("  8 responses to 4 problems")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("validation/sample_0/text_summary")
    assert text.tensor_proto.string_val == [b"    problem: 1+1\n    answer: *2*\n"]
    assert [event.step for event in events.Scalars("validation/accuracy")] == [0]


def test_the_final_summary_counts_steps_and_shows_validation(tmp_path: Path) -> None:
    rows = [
        {"step": 0, **VALUES},
        {"step": 1, "train/loss": 2.0, "timing/train/validation": 3.0, "timing/train/checkpointing": 0.0},
        {"step": 2, "train/loss": 1.0, "timing/train/validation": 0.0, "timing/train/checkpointing": 0.0},
        {"step": 2, **VALUES, "validation/accuracy": 0.375},
    ]
    lines = [line.split() for line in summary({"run": (rows, tmp_path)}).splitlines()]
    assert ["steps", "2"] in lines
    assert ["validation", "accuracy", "12.5%", "->", "37.5%"] in lines and ["in", "context", "50.0%"] in lines
    assert ["validation", "forward", "KL", "0.2500", "->", "0.2500"] in lines
    assert ["validation", "3.00"] in lines, "the median over the steps with validation"
    assert "checkpointing" not in [line[0] for line in lines]


def test_a_reader_of_a_file_of_samples_never_sees_a_part_of_it(tmp_path: Path) -> None:
    path, samples = tmp_path / "validation/step_1.jsonl", [sample("a", "right")]

    def decode(ids: Sequence[int]) -> str:
        return "\x85\u2028\u2029" * len(ids)

    write_samples(path, samples, decode, weights_step=1)
    with path.open() as reader:
        write_samples(path, samples * 2, decode)
        assert len(reader.readlines()) == 1, "the earlier file"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["prompt"] == "\x85\u2028\u2029" * 2 and "weights_step" not in rows[0]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
