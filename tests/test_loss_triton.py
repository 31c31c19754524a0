"""The loss on Triton's kernels, interpreted where there is no GPU, against the loss on PyTorch's passes."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from distill.config import LossConfig
from distill.loss import Sampled, check_loss_backend, fused_linear_kl, teacher_topk
from distill.loss.backend import TorchPass, TritonPass, choose_pass
from distill.types import TeacherRows, TopK, UserError
from tests.loss_oracle import MEMBERS, exact_topk
from tests.test_loss_head import gradients, mean, name, rows_and_head

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLED = LossConfig(kl_type="sampled")
ROWS, VOCAB, VALID = 7, 530, 517


def both(
    config: LossConfig, dtype: torch.dtype, k: int, rows: bool, sampling: float = 0.6
) -> list[tuple[Any, list[torch.Tensor]]]:
    """Loss, metrics and gradients on Triton, on PyTorch and on PyTorch in float64, everything from hidden rows on."""
    tensors = [tensor.to(DEVICE) for tensor in rows_and_head(ROWS, VOCAB, 8, dtype=dtype)]
    weight_N = torch.tensor([1.0, 1, 0, 1, 0.5, 1, 1], device=DEVICE)
    ids_N = torch.arange(ROWS, device=DEVICE) * 70
    runs = []
    for backend, to in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        hidden, head, t_hidden, t_head = (tensor.to(to) for tensor in tensors)
        here: Any = dataclasses.replace(config, backend=backend)  # type: ignore[arg-type]
        targets: Any = TeacherRows(t_hidden, t_head)
        if not rows:
            also_N = ids_N if config.kl_type == "sampled" else None
            temperature = config.temperature or sampling
            targets = teacher_topk(
                t_hidden, t_head, k, temperature, 3, VALID, config.logits_dtype, also_N=also_N, backend=backend
            )
        sampled = Sampled(ids_N, torch.full((ROWS,), -3.0, device=DEVICE), sampling)
        runs.append(
            gradients(
                lambda h, w, t=targets, c=here, s=sampled: fused_linear_kl(
                    h, w, t, c, weight_N, s, chunk_rows=3, valid_vocab=VALID, stop_token_ids=[5, 9], topk_logits_k=k
                ),
                hidden,
                head,
            )
        )
    return runs


def assert_as_good(runs: list[tuple[Any, list[torch.Tensor]]], bound: float, gradient_bound: float) -> None:
    (ours, our_grads), (torchs, torch_grads), (exact, exact_grads) = runs
    assert float(ours.kl_sum.detach()) == pytest.approx(float(exact.kl_sum.detach()), rel=bound, abs=2e-6)
    for gradient, plain, expected in zip(our_grads, torch_grads, exact_grads, strict=True):
        assert gradient.dtype == plain.dtype and (gradient[VALID:] == 0).all()
        worst = float((plain.double() - expected).norm())
        slack = gradient_bound * max(1.0, float(expected.norm()))
        assert float((gradient.double() - expected).norm()) <= 1.1 * worst + slack
    assert ours.stats.keys() == torchs.stats.keys() == exact.stats.keys()
    for metric in ours.stats:
        assert mean(ours, metric) == pytest.approx(mean(exact, metric), rel=20 * bound, abs=1e-6), metric


@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize("config", [*MEMBERS, SAMPLED], ids=name)
def test_float32_is_as_exact_as_pytorchs(config: LossConfig, k: int) -> None:
    assert_as_good(both(config, torch.float32, k, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig("reverse", outside_topk="floor")], ids=name)
def test_a_support_that_is_the_vocabulary(config: LossConfig) -> None:
    assert_as_good(both(config, torch.float32, VALID, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize("config", [*MEMBERS, SAMPLED], ids=name)
def test_bf16_operands_are_as_exact_as_pytorchs(config: LossConfig) -> None:
    """The interpreter cuts bf16 off where a GPU rounds it: twice the error, hence the slack of one rounding."""
    slack = 2e-4 if DEVICE == "cuda" else 6e-3
    assert_as_good(both(config, torch.bfloat16, 9, rows=False), 1e-5, slack)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("config", [LossConfig(), SAMPLED, LossConfig("reverse", outside_topk="floor")], ids=name)
def test_targets_made_in_the_chunk_loop(config: LossConfig, support: Any) -> None:
    assert_as_good(both(dataclasses.replace(config, support=support), torch.float32, 9, rows=True), 2e-6, 1e-6)


def test_the_whole_vocabulary_and_another_temperature() -> None:
    assert_as_good(both(LossConfig(), torch.float32, 0, rows=True), 2e-6, 1e-6)
    assert_as_good(both(LossConfig(temperature=2.0), torch.float32, 9, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize(("k", "rows"), [(9, False), (9, True), (0, True)])
def test_rounded_logits_stay_narrow(k: int, rows: bool) -> None:
    """bf16 logits are bf16 in memory, and their gradient is written over them."""
    runs = both(LossConfig(logits_dtype="bfloat16"), torch.bfloat16, k, rows)
    (ours, our_grads), (torchs, torch_grads), _ = runs
    assert float(ours.kl_sum.detach()) == pytest.approx(float(torchs.kl_sum.detach()), rel=2e-3)
    for gradient, plain in zip(our_grads, torch_grads, strict=True):
        assert (gradient.double() - plain.double()).norm() < 1.5e-2 * plain.double().norm()


def test_the_kernels_are_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.loss.kernels import student, topk

    called: list[str] = []
    gradients_are: set[torch.dtype] = set()

    def spy(function: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            called.append(function)
            if function == "gradient_rows":
                gradients_are.add(args[-1].dtype)
            return original(*args)

        return call

    for module, function in ((student, "reduce_rows"), (student, "gradient_rows"), (topk, "topk_with_tail")):
        monkeypatch.setattr(module, function, spy(function, getattr(module, function)))
    both(LossConfig(), torch.float32, 9, rows=False)
    assert called == ["topk_with_tail"] * 3 + ["reduce_rows", "gradient_rows"] * 2
    assert gradients_are == {torch.float32}
    gradients_are.clear()
    both(LossConfig(), torch.bfloat16, 9, rows=False)
    assert gradients_are == {torch.bfloat16}, "a float32 gradient of bf16 operands is a write too wide"


def test_the_teachers_topk_is_that_of_float64() -> None:
    _, _, hidden, head = (tensor.to(DEVICE) for tensor in rows_and_head(6, 500, 8, dtype=torch.float32))
    exact = exact_topk((hidden @ head.t()).cpu(), 20, 0.6)
    assert exact.entropy_N is not None
    for also_N in (None, torch.arange(6, device=DEVICE)):
        found = teacher_topk(hidden, head, 20, 0.6, 4, also_N=also_N, backend="triton")
        found = TopK(*(tensor.cpu() for tensor in vars(found).values()))
        assert found.entropy_N is not None
        for row in range(6):
            ours = dict(zip(found.ids_NK[row, :20].tolist(), found.logprobs_NK[row, :20].tolist(), strict=True))
            theirs = dict(zip(exact.ids_NK[row].tolist(), exact.logprobs_NK[row].tolist(), strict=True))
            assert ours == pytest.approx(theirs, abs=1e-5)
        if also_N is None:
            torch.testing.assert_close(found.log_tail_N.double(), exact.log_tail_N, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.entropy_N, exact.entropy_N.float(), rtol=0, atol=1e-5)


def test_a_backend_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert isinstance(choose_pass("auto", cpu, torch.float32), TorchPass)
    assert isinstance(choose_pass("auto", cuda, torch.float32), TritonPass)
    assert isinstance(choose_pass("torch", cuda, torch.float32), TorchPass)
    assert isinstance(choose_pass("triton", cuda, torch.float64), TorchPass)
    monkeypatch.setattr("distill.loss.kernels.interpreted", lambda: False)
    with pytest.raises(UserError, match=r"loss_fn.backend=triton can't run on cpu: set loss_fn.backend=auto"):
        check_loss_backend(LossConfig(backend="triton"), cpu)
    monkeypatch.setattr("distill.loss.backend.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Triton on cuda, and it isn't installed: .* loss_fn.backend=torch"):
        check_loss_backend(LossConfig(), cuda)
    check_loss_backend(LossConfig(backend="torch"), cuda)
