"""Choice of the flash-attention implementation, with fakes of GPU, packages and PyTorch's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.model import flash_attention
from distill.model.attention import attend_per_sequence
from distill.model.flash_attention import activate_flash_attention, check_same_attention
from tests.helpers import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Machine = Callable[..., list[str]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function that fakes a machine and returns the list of activated implementations."""

    def fake(capability: tuple[int, int], installed: str, registered: str = "FA3 FA4", fault: str = "") -> list[str]:
        active: list[str] = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(flash_attention, "_is_installed", lambda package: package in installed.split())
        monkeypatch.setattr(flash_attention, "_registered", registered.split)
        monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", active.append, raising=False)
        monkeypatch.setattr("torch.nn.attention.restore_flash_attention_impl", active.clear, raising=False)
        monkeypatch.setattr(flash_attention, "_wrong_result", lambda *args: fault or None)
        return active

    return fake


BOTH = "flash_attn_interface flash_attn.cute.interface"


def _config(channels: int) -> Any:
    config = tiny_config("qwen3", tied=True)
    config.head_dim = channels
    return config


@pytest.mark.parametrize(
    ("capability", "installed", "channels", "registered", "chosen"),
    [
        ((9, 0), BOTH, 128, "FA3 FA4", "fa3"),
        ((9, 0), "flash_attn.cute.interface", 128, "FA3 FA4", "fa4"),
        ((9, 0), BOTH, 256, "FA3 FA4", "fa3"),
        ((9, 0), BOTH, 128, "", "fa2"),
        ((9, 0), "", 128, "FA3 FA4", "fa2"),
        ((10, 0), BOTH, 128, "FA3 FA4", "fa4"),
        ((10, 0), BOTH, 256, "FA3 FA4", "fa2"),
        ((8, 0), BOTH, 128, "FA3 FA4", "fa2"),
    ],
)
def test_auto_chooses_the_first_implementation_that_supports_gpu_and_models(
    machine: Machine, capability, installed, channels, registered, chosen
) -> None:
    active = machine(capability, installed, registered)
    assert activate_flash_attention("auto", [_config(64), _config(channels)], CUDA) == chosen
    assert active == ([] if chosen == "fa2" else [chosen.upper()])


def test_an_implementation_with_wrong_results_is_not_used(machine: Machine) -> None:
    active = machine((9, 0), BOTH, fault="its results differ")
    assert activate_flash_attention("auto", [_config(128)], CUDA) == "fa2" and not active
    with pytest.raises(UserError) as caught:
        activate_flash_attention("fa3", [_config(128)], CUDA)
    assert (caught.value.key, caught.value.value, active) == ("runtime.attention", "fa3", [])


def test_an_implementation_is_verified_for_the_heads_of_each_model(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = machine((9, 0), "flash_attn_interface")
    faults = {64: "wrong", 128: None}
    monkeypatch.setattr(flash_attention, "_wrong_result", lambda channels, *args: faults[channels])
    assert activate_flash_attention("auto", [_config(64), _config(128)], CUDA) == "fa2" and not active
    assert activate_flash_attention("auto", [_config(128), _config(128)], CUDA) == "fa3"


@pytest.mark.parametrize(("setting", "capability", "installed"), [("fa3", (9, 0), ""), ("fa4", (8, 0), BOTH)])
def test_an_implementation_that_cannot_be_used_is_refused(machine: Machine, setting, capability, installed) -> None:
    active = machine(capability, installed)
    with pytest.raises(UserError) as caught:
        activate_flash_attention(setting, [_config(128)], CUDA)
    assert (caught.value.key, caught.value.value, active) == ("runtime.attention", setting, [])


def test_cpus_and_fa2_activate_nothing(machine: Machine) -> None:
    active = machine((9, 0), BOTH)
    assert activate_flash_attention("fa3", [], CPU) == activate_flash_attention("fa2", [], CUDA) == "fa2"
    assert not active


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_the_verification_of_an_implementation_compares_results_and_gradients(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def packed(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        out = attend_per_sequence(query, key, value, *args)
        return out + (factor - 1) * (out - out.detach())  # only the gradients are wrong

    monkeypatch.setattr(flash_attention, "attend_packed", packed)
    fault = flash_attention._wrong_result(32, True, CPU)
    assert (fault is None) == (factor == 1.0)


def test_ranks_with_different_implementations_are_refused() -> None:
    check_same_attention("auto", ["fa3", "fa3"])
    with pytest.raises(UserError) as caught:
        check_same_attention("auto", ["fa3", "fa2", "fa3"])
    assert (caught.value.key, "fa2 on rank 1" in str(caught.value)) == ("runtime.attention", True)
