"""The loss on Triton kernels (interpreted if there is no GPU) against the loss on PyTorch passes."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import Sampled, Tokens, check_loss_backend, fused_linear_kl, teacher_topk, topk_kl
from distill.loss.topk_reduction import Scratch, TorchKernels, TritonKernels, choose_kernels
from distill.types import TeacherRows, TopK, map_tensors
from tests.loss.test_fused import gradients, mean, name, rows_and_head
from tests.loss_oracle import LOSSES, exact_topk

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLED = LossConfig(kl_type="sampled")
ROWS, VOCAB, VALID = 7, 530, 517


def on_both(
    config: LossConfig, dtype: torch.dtype, k: int, rows: bool, sampling: float = 0.6
) -> list[tuple[Any, list[torch.Tensor]]]:
    """Return output and gradients on Triton, on PyTorch, and on PyTorch in float64, from the same hidden rows."""
    tensors = [tensor.to(DEVICE) for tensor in rows_and_head(ROWS, VOCAB, 8, dtype=dtype)]
    weight_N = torch.tensor([1.0, 1, 0, 1, 0.5, 1, 1], device=DEVICE)
    ids_N = torch.arange(ROWS, device=DEVICE) * 70
    runs = []
    for backend, to in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        hidden, head, t_hidden, t_head = (tensor.to(to) for tensor in tensors)
        here: Any = dataclasses.replace(config, backend=backend)  # type: ignore[arg-type]
        targets: Any = TeacherRows(t_hidden, t_head)
        if not rows:
            extra_ids_N = ids_N if config.kl_type == "sampled" else None
            temperature = config.temperature or sampling
            targets = teacher_topk(t_hidden, t_head, k, temperature, 3, VALID, extra_ids_N=extra_ids_N, backend=backend)
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


# The kernels compute the same for all losses, except for the slope that floor needs and the id that sampled adds.
KINDS = [LossConfig(), LossConfig("reverse", outside_topk="floor"), SAMPLED]


@pytest.mark.parametrize("config", [*KINDS, LossConfig("jsd")], ids=name)
def test_float32_on_triton_is_as_exact_as_on_pytorch(config: LossConfig) -> None:
    assert_as_good(on_both(config, torch.float32, 9, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize("config", [LossConfig(), SAMPLED], ids=name)
def test_one_kept_id_on_triton(config: LossConfig) -> None:
    assert_as_good(on_both(config, torch.float32, 1, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize("config", KINDS[:2], ids=name)
def test_k_equal_to_the_vocabulary_on_triton(config: LossConfig) -> None:
    assert_as_good(on_both(config, torch.float32, VALID, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize("config", KINDS, ids=name)
def test_bf16_on_triton_is_as_exact_as_on_pytorch(config: LossConfig) -> None:
    """The interpreter truncates to bf16 and a GPU rounds: the error doubles, hence the slack of one rounding."""
    slack = 2e-4 if DEVICE == "cuda" else 6e-3
    assert_as_good(on_both(config, torch.bfloat16, 9, rows=False), 1e-5, slack)


@pytest.mark.parametrize(
    ("config", "support"), [(KINDS[0], "teacher"), (KINDS[1], "student"), (SAMPLED, "student")], ids=str
)
def test_teacher_rows_on_triton(config: LossConfig, support: Any) -> None:
    assert_as_good(on_both(dataclasses.replace(config, support=support), torch.float32, 9, rows=True), 2e-6, 1e-6)


def test_the_complete_vocabulary_and_two_temperatures_on_triton() -> None:
    assert_as_good(on_both(LossConfig(), torch.float32, 0, rows=True), 2e-6, 1e-6)
    assert_as_good(on_both(LossConfig(temperature=2.0), torch.float32, 9, rows=False), 2e-6, 1e-6)


@pytest.mark.parametrize(("k", "rows"), [(9, False), (9, True), (0, True)])
def test_rounded_logits_on_triton_are_close_to_those_on_pytorch(k: int, rows: bool) -> None:
    runs = on_both(LossConfig(logits_dtype="bfloat16"), torch.bfloat16, k, rows)
    (ours, our_grads), (torchs, torch_grads), _ = runs
    assert float(ours.kl_sum.detach()) == pytest.approx(float(torchs.kl_sum.detach()), rel=2e-3)
    for gradient, plain in zip(our_grads, torch_grads, strict=True):
        assert (gradient.double() - plain.double()).norm() < 1.5e-2 * plain.double().norm()


def spy_on_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Return a list that records every call of a kernel."""
    from distill.kernels import loss_student as student
    from distill.kernels import topk

    calls: list[tuple[str, tuple[Any, ...]]] = []

    def spy(function: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append((function, args))
            return original(*args)

        return call

    for module, function in ((student, "reduce_rows"), (student, "gradient_rows"), (topk, "topk_with_tail")):
        monkeypatch.setattr(module, function, spy(function, getattr(module, function)))
    return calls


@pytest.mark.parametrize(
    ("dtype", "logits_dtype", "z_dtype", "out_dtype"),
    [
        (torch.float32, "float32", torch.float32, torch.float32),
        (torch.bfloat16, "float32", torch.float32, torch.bfloat16),
        (torch.bfloat16, "bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_logits_and_gradient_have_the_narrowest_dtype(
    dtype: torch.dtype, logits_dtype: Any, z_dtype: torch.dtype, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient overwrites the logits if the dtypes are equal. The teacher's logits are always float32."""
    calls = spy_on_kernels(monkeypatch)
    on_both(LossConfig(logits_dtype=logits_dtype), dtype, 9, rows=False)
    assert [function for function, _ in calls] == ["topk_with_tail"] * 3 + ["reduce_rows", "gradient_rows"] * 2
    for function, args in calls:
        z_CV, out_CV = args[0], args[-1]
        assert z_CV.dtype == (torch.float32 if function == "topk_with_tail" else z_dtype)
        if function == "gradient_rows":
            assert out_CV.dtype == out_dtype
            assert (out_CV.data_ptr() == z_CV.data_ptr()) == (z_dtype == out_dtype), "in place if the dtypes are equal"


def test_without_a_gradient_no_buffer_is_allocated_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    get = Scratch.get

    def named(scratch: Scratch, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
        names.add(name)
        return get(scratch, name, rows, dtype)

    monkeypatch.setattr(Scratch, "get", named)
    hidden, head, t_hidden, t_head = (tensor.to(DEVICE) for tensor in rows_and_head(4, 40, 8, dtype=torch.bfloat16))
    topk = teacher_topk(t_hidden, t_head, 5, 1.0, extra_ids_N=torch.arange(4, device=DEVICE), backend="triton")
    config, weight_N = LossConfig(backend="triton"), torch.ones(4, device=DEVICE)
    with torch.no_grad():
        fused_linear_kl(hidden, head, topk, config, weight_N)
    assert names == {"logits"}
    fused_linear_kl(hidden.requires_grad_(), head, topk, config, weight_N)
    assert names == {"logits", "gradient"}


@pytest.mark.parametrize(
    ("config", "backend"),
    [*((config, "torch") for config in (*LOSSES, SAMPLED)), *((config, "triton") for config in KINDS)],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_bf16_error_is_at_most_that_of_plain_pytorch_in_bf16(config: LossConfig, backend: Any) -> None:
    """Plus 10%, for the loss and both gradients, against float64 with the same bf16 operands.

    With rounded logits the backward's scale rounds once more. The interpreter is not tested for them: it truncates to
    bf16.
    """
    tensors = [tensor.to(DEVICE) for tensor in rows_and_head(16, 1000, 32, dtype=torch.bfloat16)]
    ids_N = torch.arange(16, device=DEVICE) * 60
    sampled, weight_N = Sampled(ids_N, torch.full((16,), -3.0, device=DEVICE), 1.0), torch.ones(16, device=DEVICE)
    _, _, t_hidden, t_head = (tensor.double() for tensor in tensors)
    wide = teacher_topk(t_hidden, t_head, 32, 1.0, extra_ids_N=ids_N if config.kl_type == "sampled" else None)
    topk = TopK(wide.ids_NK, wide.logprobs_NK.float(), wide.log_tail_N.float())

    def fused(settings: LossConfig) -> Any:
        return gradients(lambda h, w: fused_linear_kl(h, w, topk, settings, weight_N, sampled), *tensors[:2])

    def plain(targets: TopK, *leaves: torch.Tensor) -> Any:
        tokens = Tokens(ids_N, sampled.logprobs_N)
        return gradients(lambda h, w: topk_kl(h @ w.t(), targets, config, tokens=tokens).sum(), *leaves)

    exact = plain(wide, *(tensor.double() for tensor in tensors[:2]))

    def errors(found: Any) -> list[float]:
        loss, (exact_loss, exact_grads) = getattr(found[0], "kl_sum", found[0]), exact
        distances = [(g.double() - e).norm() / e.norm() for g, e in zip(found[1], exact_grads, strict=True)]
        return [float((loss.detach() - exact_loss.detach()).abs() / exact_loss.detach().abs()), *map(float, distances)]

    theirs = errors(plain(topk, *tensors[:2]))
    ours = errors(fused(dataclasses.replace(config, backend=backend)))
    assert all(our <= 1.1 * their for our, their in zip(ours, theirs, strict=True)), (ours, theirs)
    if backend == "torch" or DEVICE == "cuda":
        ours = errors(fused(dataclasses.replace(config, backend=backend, logits_dtype="bfloat16")))
        assert all(our <= 1.1 * math.hypot(their, 2**-9) for our, their in zip(ours, theirs, strict=True)), ours


def test_the_teachers_topk_on_triton_is_that_of_float64() -> None:
    _, _, hidden, head = (tensor.to(DEVICE) for tensor in rows_and_head(6, 500, 8, dtype=torch.float32))
    exact = exact_topk((hidden @ head.t()).cpu(), 20, 0.6)
    assert exact.entropy_N is not None
    sampled_ids_N = torch.arange(6, device=DEVICE) * 83
    log_p_NV = torch.log_softmax((hidden @ head.t()).double() / 0.6, 1)
    logprobs_N = log_p_NV.gather(1, sampled_ids_N[:, None])[:, 0].cpu()
    for extra_ids_N in (None, torch.arange(6, device=DEVICE)):
        found = teacher_topk(
            hidden, head, 20, 0.6, 4, extra_ids_N=extra_ids_N, backend="triton", sampled_ids_N=sampled_ids_N
        )
        found = map_tensors(found, Tensor.cpu)
        assert found.entropy_N is not None
        for row in range(6):
            ours = dict(zip(found.ids_NK[row, :20].tolist(), found.logprobs_NK[row, :20].tolist(), strict=True))
            theirs = dict(zip(exact.ids_NK[row].tolist(), exact.logprobs_NK[row].tolist(), strict=True))
            assert ours == pytest.approx(theirs, abs=1e-5)
        if extra_ids_N is None:
            torch.testing.assert_close(found.log_tail_N.double(), exact.log_tail_N, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.entropy_N, exact.entropy_N.float(), rtol=0, atol=1e-5)
        assert found.sampled_logprob_N is not None
        torch.testing.assert_close(found.sampled_logprob_N.double(), logprobs_N, rtol=0, atol=1e-5)


def test_the_backend_is_chosen_by_device_and_dtype_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert isinstance(choose_kernels("auto", cpu, torch.float32), TorchKernels)
    assert isinstance(choose_kernels("auto", cuda, torch.float32), TritonKernels)
    assert isinstance(choose_kernels("torch", cuda, torch.float32), TorchKernels)
    assert isinstance(choose_kernels("triton", cuda, torch.float64), TorchKernels)
    monkeypatch.setattr("distill.kernels.interpreted", lambda: False)
    with pytest.raises(UserError, match="cpu") as error:
        check_loss_backend(LossConfig(backend="triton"), cpu)
    assert (error.value.key, error.value.value) == ("loss_fn.backend", "triton")
    monkeypatch.setattr("distill.loss.topk_reduction.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"cuda.*backend=torch"):
        check_loss_backend(LossConfig(), cuda)
    check_loss_backend(LossConfig(backend="torch"), cuda)
