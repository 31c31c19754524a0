"""Models with fused layers against the same models with the layers of transformers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig, view_of
from distill.config.models import Recomputation
from distill.distributed.world import World
from distill.errors import UserError
from distill.model.attention import PACKED
from distill.model.fused_layers import fuse_layers, uses_fused_layers
from distill.model.recomputation import set_recomputation
from tests.harness import Step, config_for, differences, fixed_rollouts, plain_step, sharded_step
from tests.helpers import run_ranks, save_tiny_model, tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
SEQUENCES = [(tuple(range(1, 4)), tuple(range(5, 10))), (tuple(range(20, 23)), tuple(range(30, 33)))]
LAYERS = 2
# Norms of a layer, and the model's last norm.
NORMS = {"llama": 2, "qwen2": 2, "qwen3": 2, "gemma3_text": 4}


class _Counter(TorchDispatchMode):
    """Counts the operators of the fused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "distill":
            self.found[func._schema.name.removeprefix("distill::")] += 1
        return func(*args, **(kwargs or {}))


def _run(
    family: str, fused: bool, mode: Recomputation = "none", dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Counter[str]]:
    """Return the loss and the gradients of all weights, and the operators of the fused layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=True, layers=LAYERS), attn_implementation=PACKED)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones would hide a missing gradient
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.to(DEVICE, dtype).train()
    if fused:
        fuse_layers(model)
    set_recomputation(model, mode)
    view = view_of(SEQUENCES, share=True).to(torch.device(DEVICE))
    with _Counter() as counter:
        logits = model(
            input_ids=view.tokens_T[None],
            position_ids=view.positions_T[None],
            packed_bounds=view.bounds,
            packed_shared=view.shared,
            use_cache=False,
        ).logits
        loss = logits.float().log_softmax(-1)[..., ::7].square().mean()
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], counter.found


@pytest.mark.parametrize("family", NORMS)
def test_a_model_with_fused_layers_has_the_same_loss_and_gradients(family: str) -> None:
    plain, fused = _run(family, fused=False), _run(family, fused=True)
    norms = NORMS[family] * LAYERS + 1
    forward = {"rms_norm": norms, "rotary": 2 * LAYERS, "gated": LAYERS}
    assert not plain[1] and fused[1] == forward | {f"{name}_backward": n for name, n in forward.items()}
    for ours, theirs in zip(fused[0], plain[0], strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


def test_fused_layers_have_the_same_gradients_in_every_mode_of_activation_checkpointing() -> None:
    (plain, counted), *others = [_run("qwen3", True, mode) for mode in ("none", "selective", "full")]
    for gradients, again in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, gradients, strict=True))
        assert again == counted + Counter(
            rms_norm=again["rms_norm"] - counted["rms_norm"], rotary=2 * LAYERS, gated=LAYERS
        )


def test_fused_layers_in_bf16_are_as_exact_as_those_of_transformers() -> None:
    exact, _ = _run("qwen3", fused=False)
    ours, theirs = (_run("qwen3", fused, dtype=torch.bfloat16)[0] for fused in (True, False))
    for our, other, exactly in zip(ours, theirs, exact, strict=True):
        # The interpreter cuts float32 to bf16 where a GPU rounds, so its errors do not cancel out.
        factor, bias = (1.2, 0.0) if DEVICE == "cuda" else (2.5, 0.02)
        assert (our - exactly).norm() <= factor * (other - exactly).norm() + bias * exactly.norm() + 1e-4


def test_fused_layers_are_for_gpus() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [uses_fused_layers(None, device) for device in (cpu, cuda)] == [False, True]
    assert uses_fused_layers(True, cuda) and not uses_fused_layers(False, cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.kernels.interpreted", lambda: False)
        with pytest.raises(UserError) as caught:
            uses_fused_layers(True, cpu)
    assert (caught.value.key, caught.value.value) == ("runtime.fused_layers", True)


LAYOUTS = {"tp 2": (2, 1), "cp 2": (1, 2)}
COUNT = 3
"""Number of responses; Triton's interpreter is slow."""


def _steps(student: str, teacher: str) -> dict[str, Step]:
    """Take one step in each layout with fused layers, which Triton's interpreter computes."""
    world, found = World(), {}
    settings = ("runtime.fused_layers=true", "policy.dtensor_cfg.activation_checkpointing=selective")
    config = config_for(Path(student), Path(teacher), *settings, ranks=2)
    packing = PackingConfig(COUNT, sequences=None, tokens=120)
    for name, (tp, cp) in LAYOUTS.items():
        world.build_mesh("cpu", tp, cp, 1, 1)
        found[name] = sharded_step(config, world, fixed_rollouts(COUNT), packing)
    world.close()
    return found


@pytest.mark.slow
def test_a_step_with_fused_layers_equals_plain_pytorch_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the processes of the ranks
    student = save_tiny_model(tmp_path / "student", "qwen3", tied=False, seed=1)
    teacher = save_tiny_model(tmp_path / "teacher", "gemma3_text", seed=2)
    found = run_ranks(2, _steps, str(student), str(teacher))[0]
    reference = plain_step(config_for(student, teacher, ranks=2), fixed_rollouts(COUNT))
    for name in LAYOUTS:
        assert max(differences(found[name], reference).values()) < TOLERANCE
