"""Rules of the training loop: limits of the length of responses, and off-policy responses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from distill.config.loop_rules import warn_of_loop
from distill.config.response_limits import largest_max_new_tokens, max_new_tokens_at
from tests.config.test_config import load, refusal

SCHEDULE = "distillation.max_new_tokens_schedule"
WINDOWS = ["policy.max_total_sequence_length=100", "teacher.max_total_sequence_length=100"]
CONTEXT = "distillation.context_distillation"
OFF_POLICY = "distillation.off_policy"
HALF = f"{OFF_POLICY}.share=0.5"
SELF = f"{CONTEXT}.enabled=true", "teacher.model_name=Qwen/Qwen3-0.6B"  # the student


def test_the_limit_of_a_step_is_that_of_the_last_entry_it_has_reached() -> None:
    config = load(*WINDOWS, "policy.generation.max_new_tokens=20", f"{SCHEDULE}=[[2,10],[4,50]]")
    assert [max_new_tokens_at(config, step) for step in range(1, 6)] == [20, 10, 10, 50, 50]
    assert config.policy.generation.val_max_new_tokens == 20
    assert max_new_tokens_at(load(*WINDOWS), 7) == 100


@pytest.mark.parametrize(
    ("schedule", "steps", "largest"),
    [
        ("[[2,10],[4,50]]", 9, 50),
        ("[[2,10],[4,50]]", 3, 20),
        ("[[1,10]]", 3, 10),
        ("[[1,10],[2,5]]", 3, 10),
        ("[]", 3, 20),
    ],
)
def test_the_largest_limit_is_that_of_the_steps_of_the_run(schedule: str, steps: int, largest: int) -> None:
    overrides = "policy.generation.max_new_tokens=20", f"distillation.max_num_steps={steps}"
    assert largest_max_new_tokens(load(*WINDOWS, *overrides, f"{SCHEDULE}={schedule}")) == largest


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        ("[[0,10]]", "[[0, 10]]"),
        ("[[4,10],[2,5]]", "below 1"),
        ("[[2,10],[2,5]]", "below 1"),
        ("[[2,0]]", "limit 0"),
        ("[[2,101]]", "101"),
    ],
)
def test_a_schedule_out_of_order_or_outside_the_windows_is_refused(schedule: str, named: str) -> None:
    error = refusal(*WINDOWS, f"{SCHEDULE}={schedule}")
    assert error.key == SCHEDULE and named in str(error)


def test_a_schedule_must_fit_into_the_teachers_window_too() -> None:
    overrides = [WINDOWS[0], "teacher.max_total_sequence_length=40", "policy.generation.max_new_tokens=20"]
    context = [f"{CONTEXT}.enabled=true", f"{CONTEXT}.mode=frozen"]
    error = refusal(*overrides, *context, f"{SCHEDULE}=[[2,41]]")
    assert (error.key, error.value) == ("teacher.max_total_sequence_length", 40) and SCHEDULE in error.problem
    load(*overrides, *context, f"{SCHEDULE}=[[2,40]]")


def test_a_limit_that_no_step_has_need_not_fit_into_the_teachers_window() -> None:
    overrides = [
        WINDOWS[0],
        "teacher.max_total_sequence_length=40",
        f"{CONTEXT}.enabled=true",
        f"{CONTEXT}.mode=frozen",
    ]
    load(*overrides, f"{SCHEDULE}=[[1,40]]")  # the default of max_new_tokens is 100
    load(*overrides, f"{SCHEDULE}=[[1,40],[9,41]]", "distillation.max_num_steps=8")
    for schedule, steps in (("[[2,40]]", 8), ("[[1,40],[9,41]]", 9)):
        error = refusal(*overrides, f"{SCHEDULE}={schedule}", f"distillation.max_num_steps={steps}")
        assert (error.key, error.value) == ("teacher.max_total_sequence_length", 40)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"{SCHEDULE}=[[2,10],[9,20]]", "distillation.max_num_steps=8"], "[[9, 20]]"),
        ([f"{SCHEDULE}=[[2,10],[9,20]]", "distillation.max_num_steps=9"], None),
        ([f"{OFF_POLICY}.share=1"], f"{OFF_POLICY}.share"),
        ([f"{OFF_POLICY}.share=0.9"], None),
    ],
)
def test_settings_with_a_surprising_effect_cause_a_warning(
    overrides: list[str], named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(*WINDOWS, "policy.generation.max_new_tokens=20", *overrides)
    caplog.clear()
    warn_of_loop(config)
    assert (named in caplog.text and len(caplog.records) == 1) if named else not caplog.records


@pytest.mark.parametrize("schedule", ["[[1,2,3]]", "[5]", "[[a,b]]"])
def test_a_malformed_schedule_is_refused(schedule: str) -> None:
    assert refusal(f"{SCHEDULE}={schedule}").key.startswith(SCHEDULE)


def test_validation_may_have_longer_responses_than_training_but_not_than_the_window() -> None:
    limit = "policy.generation.max_new_tokens=20"
    assert load(*WINDOWS, limit, "policy.generation.val_max_new_tokens=90").policy.generation.val_max_new_tokens == 90
    for tokens in (101, 0):
        error = refusal(*WINDOWS, limit, f"policy.generation.val_max_new_tokens={tokens}")
        assert (error.key, error.value) == ("policy.generation.val_max_new_tokens", tokens)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_an_off_policy_share_outside_0_to_1_is_refused(share: float) -> None:
    assert refusal(f"distillation.off_policy.share={share}").key == "distillation.off_policy.share"


def test_off_policy_responses_cannot_have_a_sampled_divergence() -> None:
    assert refusal(HALF, f"{OFF_POLICY}.kl_type=sampled").key == f"{OFF_POLICY}.kl_type"
    assert refusal(HALF, "loss_fn.kl_type=sampled").key == "loss_fn.kl_type"
    load("loss_fn.kl_type=sampled")
    load(HALF, f"{OFF_POLICY}.kl_type=forward")


@pytest.mark.parametrize("loss", ["loss_fn.outside_topk=floor", "loss_fn.zero_outside_topk=true", "loss_fn.jsd_beta=2"])
def test_the_off_policy_divergence_is_checked_together_with_the_keys_of_the_loss(loss: str) -> None:
    given = f"{OFF_POLICY}.kl_type=jsd"
    error = refusal(HALF, given, loss, "loss_fn.kl_type=forward")
    assert (error.key, error.value) == (f"{OFF_POLICY}.kl_type", "jsd")
    load(HALF, given, "loss_fn.kl_type=forward", "loss_fn.outside_topk=bucket")


@pytest.mark.parametrize(("share", "responses"), [("0.007", 64), ("0.12", 4)])
def test_an_off_policy_share_of_less_than_one_response_is_refused(share: str, responses: int) -> None:
    sizes = [f"distillation.num_prompts_per_step={responses // 2}", "distillation.num_generations_per_prompt=2"]
    sizes.append(f"policy.train_global_batch_size={responses}")
    error = refusal(*sizes, f"{OFF_POLICY}.share={share}")
    assert (error.key, error.value) == (f"{OFF_POLICY}.share", float(share))
    assert load(*sizes, f"{OFF_POLICY}.share={1 / responses}").distillation.off_policy_per_step == 1


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ([f"{OFF_POLICY}.column=expert"], [HALF]),
        ([f"{OFF_POLICY}.kl_type=forward"], [HALF]),
        ([f"{CONTEXT}.refresh_period=7", *SELF], [f"{CONTEXT}.mode=self_periodic", *SELF]),
        ([f"{CONTEXT}.ema_decay=0.5", *SELF], [f"{CONTEXT}.mode=self_ema", *SELF]),
        ([f"{CONTEXT}.teacher_prefix_template='{{problem}}'", f"{CONTEXT}.trace_extractor.type=full_text"], SELF),
    ],
)
def test_a_key_without_effect_causes_a_warning(
    given: Sequence[str], used: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_loop(load(*given))
    (line,) = caplog.messages
    assert line.partition(" has ")[0].endswith(given[0].partition("=")[0].rpartition(".")[2])
    caplog.clear()
    warn_of_loop(load(*given[:1], *used))
    assert not caplog.text


@pytest.mark.parametrize("column", ["''", "' '"])
def test_an_empty_off_policy_column_is_refused(column: str) -> None:
    assert refusal(HALF, f"{OFF_POLICY}.column={column}").key == f"{OFF_POLICY}.column"


@pytest.mark.parametrize("train_on", ["right", "wrong"])
def test_a_selection_by_grade_without_own_responses_is_refused(train_on: str) -> None:
    key = "distillation.train_on"
    for share in (1, 0.95):  # of 8 responses
        error = refusal(f"{key}={train_on}", f"{OFF_POLICY}.share={share}")
        assert (error.key, error.value) == (key, train_on)
    load(f"{key}={train_on}", f"{OFF_POLICY}.share=0.93")
