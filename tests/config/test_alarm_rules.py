"""Rules for alarms and watched words, and the list of metric names."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config.alarm_rules import alarm_name
from distill.config.metric_names import is_metric, is_of_validation
from distill.errors import UserError
from tests.harness import config_for

A = "distillation.alarms"


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        config_for(Path("a"), Path("b"), *overrides)
    return caught.value


def one(entry: str) -> str:
    return f"{A}=[{{{entry}}}]"


@pytest.mark.parametrize(
    ("entry", "key", "value", "fix"),
    [
        ("metric: train/truncation, value: 1", "metric", "train/truncation", "train/truncation_rate"),
        ("metric: train/repetition_share, value: 1", "metric", "train/repetition_share", "train/repeated_token_share"),
        ("metric: accuracy, value: 1", "metric", "accuracy", "validation/accuracy"),
        ("value: 1", "metric", "", "train/loss"),
        ("metric: train/loss, value: .nan", "value", None, "finite"),
        ("metric: train/loss, value: 1, steps: 0", "steps", 0, "1"),
        ("metric: train/watched_words/wait, value: 1", "metric", "train/watched_words/wait", "watched_words"),
    ],
)
def test_an_alarm_that_can_never_start_is_refused(entry, key, value, fix) -> None:
    error = refused(one(entry))
    assert error.key == f"{A}.{key}" and fix in error.fix
    assert value is None or error.value == value


@pytest.mark.parametrize("entry", ["metric: train/loss, op: '==', value: 1", "metric: train/loss, action: halt"])
def test_an_unknown_comparison_or_action_is_refused(entry) -> None:
    assert refused(one(entry)).key.startswith(A)


def test_the_number_of_the_alarm_is_in_the_key() -> None:
    error = refused(f"{A}=[{{metric: train/loss, value: 1}}, {{metric: train/los, value: 1}}]")
    assert (error.key, error.value) == (f"{A}.1.metric", "train/los")


def test_an_alarm_on_a_validation_that_never_happens_is_refused() -> None:
    off = [f"distillation.{key}" for key in ("val_period=0", "val_at_start=false", "val_at_end=false")]
    assert refused(one("metric: validation/accuracy, value: 1"), *off).key == f"{A}.metric"
    config_for(
        Path("a"), Path("b"), one("metric: validation/accuracy, value: 1"), *off[1:], "distillation.val_period=5"
    )


def test_an_alarm_without_its_effect_is_refused() -> None:
    save = one("metric: train/loss, value: 1, action: save")
    assert refused(save, "checkpointing.enabled=false").key == f"{A}.action"
    config_for(Path("a"), Path("b"), save.replace("save", "stop"), "checkpointing.enabled=false")
    collapse = one("metric: alarm/collapse, op: '>=', value: 1, action: stop")
    assert refused(collapse, "distillation.default_alarms=false").key == f"{A}.metric"
    config_for(Path("a"), Path("b"), collapse)


def test_the_same_alarm_twice_is_refused() -> None:
    twice = f"{A}=[{{metric: train/loss, value: 1}}, {{metric: train/loss, value: 1.0, steps: 1}}]"
    assert refused(twice).value == "train/loss>1.0,warn"


@pytest.mark.parametrize("second", ["value: 1, action: stop", "value: 1, steps: 3", "value: 1.0000001"])
def test_alarms_that_differ_have_different_names(second) -> None:
    config = config_for(
        Path("a"), Path("b"), f"{A}=[{{metric: train/loss, value: 1}}, {{metric: train/loss, {second}}}]"
    )
    assert len({alarm_name(alarm) for alarm in config.distillation.alarms}) == 2


VALIDATED = ("data.validation.data_path=x.jsonl", "data.validation.env_name=exact", "data.validation.repeat=1")
CONTROL = (
    "distillation.control=true",
    "distillation.context_distillation.enabled=true",
    "distillation.context_distillation.teacher_prefix_template='Hint: {problem}'",
    "teacher.model_name=a",
)


@pytest.mark.parametrize(
    ("metric", "overrides", "key"),
    [
        ("train/topk_overlap", ["distillation.topk_logits_k=0"], "distillation.topk_logits_k"),
        ("alarm/topk_overlap", ["distillation.topk_logits_k=0"], "distillation.topk_logits_k"),
        ("train/accuracy", ["data.train.env_name=null"], "data.train.env_name"),
        ("train/off_policy_loss", [], "distillation.off_policy.share"),
        ("train/trained_tokens", [], "loss_fn.token_weights"),
        ("train/max_new_tokens", [], "distillation.max_new_tokens_schedule"),
        ("train/removed_by_train_on", [], "distillation.train_on"),
        ("train/context_distillation_trace_coverage", [], "distillation.context_distillation.enabled"),
        ("alarm/grad_norm", CONTROL, "distillation.control"),
        ("validation/accuracy", ["data.validation=null", "distillation.val_period=0"], "data.validation"),
        ("alarm/accuracy", ["data.validation=null", "distillation.val_period=0"], "data.validation"),
        ("validation/gsm8k/accuracy", [*VALIDATED, "data.validation.env_name=null"], "data.validation.env_name"),
        ("validation/probe/start_10/accuracy", VALIDATED, "distillation.probe_period"),
        ("validation/in_context_accuracy", VALIDATED, "distillation.context_distillation.enabled"),
        ("validation/pass@8", [*VALIDATED, "distillation.val_num_generations=4"], "distillation.val_num_generations"),
        ("validation/pass@3", [*VALIDATED, "distillation.val_num_generations=4"], "distillation.val_num_generations"),
    ],
)
def test_a_metric_that_the_recipe_cannot_produce_is_refused(metric, overrides, key) -> None:
    error = refused(one(f"metric: {metric}, value: 1"), *overrides)
    assert (error.key, error.value) == (f"{A}.metric", metric) and key in f"{error.problem} {error.fix}"


@pytest.mark.parametrize(
    ("metric", "overrides"),
    [
        ("validation/pass@4", ["distillation.val_num_generations=4"]),
        ("validation/gsm8k/pass@6_stderr", ["distillation.val_num_generations=6"]),
        ("validation/pass@8", ["data.validation.repeat=8"]),
        ("validation/probe/start_10/accuracy", ["distillation.probe_period=5"]),
        ("train/skipped_optimizer_steps", ["loss_fn.token_weights.skip_first=2"]),
    ],
)
def test_a_metric_that_the_recipe_may_produce_is_accepted(metric, overrides) -> None:
    config_for(Path("a"), Path("b"), one(f"metric: {metric}, value: 1"), *VALIDATED, *overrides)


@pytest.mark.parametrize("words", ["['']", "[' wait']", "['let  me']", "['...']", "[Wait, WAIT]"])
def test_a_text_that_is_no_word_is_refused(words) -> None:
    assert refused(f"distillation.watched_words={words}").key == "distillation.watched_words"


def test_watched_words_may_be_phrases() -> None:
    config = config_for(
        *(Path("a"), Path("b"), "distillation.watched_words=[wait, let me, '等等']"),
        one("metric: train/watched_words/let me, value: 5"),
    )
    assert config.distillation.watched_words == ("wait", "let me", "等等")


@pytest.mark.parametrize(
    "name",
    [
        *("train/position/forward_kl_3", "train/off_policy_loss", "validation/gsm8k/accuracy", "validation/pass@16"),
        *("validation/AIME/pass@2_stderr", "validation/in_context_at_end_accuracy", "timing/train/policy_training"),
        *(
            "validation/gsm8k/in_context_accuracy",
            "memory/training_gib",
            "memory/predicted_sync_gib",
            "train/grad_norm",
        ),
    ],
)
def test_names_of_metrics_are_known(name) -> None:
    assert is_metric(name) and is_of_validation(name) == name.startswith("validation/")


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "train/", "val:accuracy", "validation/accurcy", "timing/train", "step", "x/y", "throughput/xyz"),
        *("train/position/anything", "train/position/forward_kl_11", "train/off_policy_xyz", "train/probe/x"),
        *("timing/validation/xyz", "timing/train/xyz_tokens_per_sec", "memory/predicted_xyz_gib", "validation/pass@0"),
        *("train/context_distillation_xyz", "validation/probe/xyz", "validation/probe/start_10/xyz"),
        *("validation/gsm8k/accuracy_change", "validation/gsm8k/in_context_num_compared"),
    ],
)
def test_other_names_are_unknown(name) -> None:
    assert not is_metric(name)
