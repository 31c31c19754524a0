"""Rules of a teacher that shares the student's base: precision, parallelism, and a second copy of the base."""

from __future__ import annotations

import logging

import pytest

from distill.config import Config, load_config
from distill.config.lora_rules import teacher_shares_base, warn_of_lora
from distill.errors import UserError
from tests.harness import REPO

CONTEXT = "distillation.context_distillation"
SELF = (
    "teacher.model_name=${policy.model_name}",
    "teacher.dtensor_cfg.tensor_parallel_size=1",
    "teacher.dtensor_cfg.context_parallel_size=1",
    "policy.dtensor_cfg.tensor_parallel_size=2",
    "policy.dtensor_cfg.context_parallel_size=1",
    "policy.dtensor_cfg.lora_cfg.enabled=true",
    f"{CONTEXT}.enabled=true",
)


def _config(*overrides: str) -> Config:
    return load_config(["--config", str(REPO / "recipes/distillation_math.yaml"), *SELF, *overrides])


@pytest.mark.parametrize("mode", ["self_frozen", "self_ema", "self_live", "self_periodic", "frozen"])
def test_another_precision_of_a_teacher_that_shares_the_base_is_refused(mode: str) -> None:
    settings = (f"{CONTEXT}.mode={mode}", "policy.precision=bfloat16", "teacher.precision=float32")
    if mode == "frozen":
        assert not teacher_shares_base(_config(*settings))
        return
    with pytest.raises(UserError) as error:
        _config(*settings)
    assert (error.value.key, error.value.value) == ("teacher.precision", "float32")


def test_without_adapters_or_context_the_teacher_has_its_own_model() -> None:
    assert teacher_shares_base(_config())
    assert not teacher_shares_base(_config("policy.dtensor_cfg.lora_cfg.enabled=false"))
    assert not teacher_shares_base(_config(f"{CONTEXT}.enabled=false", "distillation.allow_degenerate=true"))


def test_parallelism_of_a_teacher_that_shares_the_base_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    """A size that does not divide the ranks is then no error."""
    sizes = ("teacher.dtensor_cfg.tensor_parallel_size=3", "teacher.dtensor_cfg.reshard_after_forward=false")
    with caplog.at_level(logging.WARNING):
        warn_of_lora(_config(*sizes))
        (record,) = caplog.records
        assert "tensor_parallel_size, reshard_after_forward" in record.getMessage()
        caplog.clear()
        warn_of_lora(_config())
        warn_of_lora(_config("teacher.dtensor_cfg.tensor_parallel_size=2"))  # the student's size
        warn_of_lora(_config("policy.dtensor_cfg.lora_cfg.enabled=false"))
    assert not caplog.records


def test_a_second_copy_of_the_base_as_teacher_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_lora(_config(f"{CONTEXT}.mode=frozen", "teacher.model_name=another/Model"))
        assert not caplog.records
        warn_of_lora(_config(f"{CONTEXT}.mode=frozen"))
    (record,) = caplog.records
    assert f"{CONTEXT}.mode=self_frozen" in record.getMessage()
