"""Rules of the adapters' keys, and when the teacher is the student's module."""

from __future__ import annotations

import logging

import pytest

from distill.config import Config, LoraConfig, load_config
from distill.config.lora_rules import KEY, starts_as_teacher, teacher_shares_base, warn_of_lora
from distill.errors import UserError
from distill.validation.validation import context_is_known
from tests.harness import REPO

CONTEXT = "distillation.context_distillation."


def load(*words: str, recipe: str = "my-context-self-distillation-1n4g.yaml") -> Config:
    return load_config(["--config", str(REPO / "recipes" / recipe), *words])


def lora(*words: str) -> LoraConfig:
    return load(*(f"{KEY}.{word}" for word in words)).policy.dtensor_cfg.lora_cfg


def test_adapters_are_off_and_have_the_defaults_of_nemo_rl() -> None:
    assert lora() == LoraConfig(False, 8, 32.0, 0.0, (), (), True, "xavier", None)


def test_the_other_name_of_kaiming_in_nemo_rl_is_accepted() -> None:
    assert lora("lora_A_init=uniform") == lora("lora_A_init=kaiming") != lora()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["dim=0"], "dim", 0),
        (["alpha=0"], "alpha", 0),
        (["dropout=0.1"], "dropout", 0.1),
        (["dropout_position=middle"], "dropout_position", "middle"),
        (["lora_A_init=zeros"], "lora_A_init", "zeros"),
        (["match_all_linear=false"], "match_all_linear", False),
        (["target_modules=['']"], "target_modules", [""]),
        (["exclude_modules=[q_proj, ' ']"], "exclude_modules", ["q_proj", " "]),
        (["init_from=' '"], "init_from", " "),
        (["rank=4"], "rank", None),
    ],
)
def test_a_wrong_value_of_enabled_adapters_is_refused(words: list[str], name: str, value: object) -> None:
    with pytest.raises(UserError) as refused:
        lora("enabled=true", *words)
    assert (refused.value.key, refused.value.value) == (f"{KEY}.{name}", value)


def test_patterns_take_precedence_over_the_selection_of_all_layers() -> None:
    assert lora("enabled=true", "target_modules=[q_proj]").match_all_linear
    assert lora("enabled=true", "target_modules=[q_proj]", "match_all_linear=false").target_modules == ("q_proj",)


def test_exclude_modules_without_match_all_linear_selects_all_other_layers_as_in_nemo_rl() -> None:
    assert lora("enabled=true", "match_all_linear=false", "exclude_modules=[q_proj]").exclude_modules == ("q_proj",)


def test_a_peft_checkpoint_is_refused_only_if_all_weights_are_trained() -> None:
    assert load("checkpointing.is_peft=true", f"{KEY}.enabled=true").policy.dtensor_cfg.lora_cfg.enabled
    with pytest.raises(UserError) as refused:
        load("checkpointing.is_peft=true")
    assert (refused.value.key, refused.value.value) == ("checkpointing.is_peft", True)


def test_keys_of_disabled_adapters_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    unused = load(f"{KEY}.dropout=0.1", f"{KEY}.dim=16")  # a value that enabled adapters refuse
    with caplog.at_level(logging.WARNING):
        warn_of_lora(load())
        warn_of_lora(load(f"{KEY}.enabled=true", f"{KEY}.dim=16"))
        assert caplog.records == []
        warn_of_lora(unused)
    (record,) = caplog.records
    assert "dim, dropout" in record.getMessage()


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ([f"{CONTEXT}mode=self_frozen"], True),
        ([f"{CONTEXT}mode=self_live"], True),
        ([f"{CONTEXT}mode=self_ema"], True),
        ([f"{CONTEXT}mode=self_periodic"], True),
        ([f"{CONTEXT}mode=frozen"], False),
        ([f"{CONTEXT}enabled=false", "distillation.allow_degenerate=true"], False),
        ([f"{CONTEXT}mode=self_frozen", f"{KEY}.enabled=false"], False),
        ([f"{CONTEXT}mode=self_frozen", "distillation.control=true"], True),
    ],
)
def test_the_teacher_is_the_students_module_if_the_mode_makes_the_student_its_teacher(
    words: list[str], shares: bool
) -> None:
    assert teacher_shares_base(load(f"{KEY}.enabled=true", *words)) is shares


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ([f"{CONTEXT}mode=frozen"], True),
        ([f"{CONTEXT}mode=frozen", f"{KEY}.init_from=a"], False),
        ([f"{CONTEXT}mode=self_frozen", f"{KEY}.init_from=a"], True),
        ([f"{CONTEXT}mode=frozen", f"{KEY}.init_from=a", f"{KEY}.enabled=false"], True),
    ],
)
def test_an_initial_adapter_makes_the_student_another_model_than_a_frozen_teacher(
    words: list[str], starts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    static = [f"{CONTEXT}trace_source=static_dataset", f"{CONTEXT}static_trace.answer_column=answer"]
    config = load(f"{KEY}.enabled=true", *static, *words)
    assert starts_as_teacher(config) is context_is_known(config) is starts
    with caplog.at_level(logging.WARNING):
        warn_of_lora(config)
    is_copied = starts and f"{CONTEXT}mode=frozen" in words and config.policy.dtensor_cfg.lora_cfg.enabled
    assert ("set distillation.context_distillation.mode=self_frozen" in caplog.text) is is_copied


def test_the_student_with_an_initial_adapter_is_no_control_of_its_frozen_base() -> None:
    words = [f"{CONTEXT}mode=frozen", f"{KEY}.enabled=true", "distillation.control=true"]
    assert load(*words).distillation.control
    with pytest.raises(UserError) as refused:
        load(*words, f"{KEY}.init_from=a")
    assert refused.value.key == "distillation.control" and f"{CONTEXT}mode=self_frozen" in refused.value.fix


def test_an_initial_adapter_can_learn_from_its_base_without_a_context() -> None:
    words = [f"{CONTEXT}enabled=false", f"{KEY}.enabled=true"]
    assert load(*words, f"{KEY}.init_from=a").policy.dtensor_cfg.lora_cfg.init_from == "a"
    with pytest.raises(UserError) as refused:
        load(*words)
    assert refused.value.key == "teacher.model_name"
