"""One training step on fake CUDA tensors for every parallel layout and loss option: no tensor is on a wrong device.

FSDP2, DTensor, activation checkpointing, the optimizer and the host code of all kernels run; kernels are not launched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.fakecuda import preload
from tests.fakecuda.build import Case
from tests.fakecuda.cases import run_cases

REASON = preload.missing()
pytestmark = [pytest.mark.fakecuda, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SHALLOW = Case(student="0.6b", teacher="0.6b", layers=1, ranks=8, prompt=40, responses=(300, 200), steps=1)
_POLICY, _PARALLEL = "policy.", "policy.dtensor_cfg."
ADAPTERS = (_PARALLEL + "lora_cfg.enabled=true", _PARALLEL + "activation_checkpointing=selective")
_TOKENS = "policy.dynamic_batching.train_mb_tokens=600"


def shallow(*overrides: str, **fields: Any) -> Case:
    """Return a case with one layer and short responses."""
    return replace(SHALLOW, overrides=(_TOKENS, *overrides), **fields)


CASES = {
    "defaults": shallow(steps=2),  # the second step restores offloaded moments
    "tp2 cp2, activation checkpointing, sampled": shallow(
        _PARALLEL + "activation_checkpointing=true", "loss_fn.kl_type=sampled", tp=2, cp=2, rank=5
    ),
    "hsdp tp2, selective activation checkpointing, support student": shallow(
        _PARALLEL + "activation_checkpointing=selective", "loss_fn.support=student", replicas=2, tp=2
    ),
    "teacher group of 4, full vocabulary, foreach AdamW": shallow(
        "distillation.topk_logits_k=0",
        _POLICY + "logprob_chunk_size=128",
        _POLICY + "optimizer.kwargs.foreach=true",
        teacher_ranks=4,
        rank=3,
    ),
    "cpu_offload, bf16 logits": shallow(_PARALLEL + "cpu_offload=true", "loss_fn.logits_dtype=bfloat16", steps=2),
    "layers stay gathered, jsd with a cap, fused AdamW": shallow(
        _PARALLEL + "reshard_after_forward=false",
        "loss_fn.kl_type=jsd",
        "loss_fn.token_kl_cap=2.0",
        _POLICY + "optimizer.kwargs.fused=true",
    ),
    "untied head, torch loss, AdamW for each tensor": shallow(
        "loss_fn.backend=torch",
        _POLICY + "optimizer.kwargs.fused=false",
        _POLICY + "optimizer.kwargs.foreach=false",
        student="8b",
        teacher="14b",
    ),
    "hsdp, teacher reads a longer prefix, moments stay": shallow(
        "policy.dynamic_batching.train_mb_tokens=700",
        "runtime.offload_optimizer=false",
        teacher_prefix=90,
        replicas=2,
    ),
    "adapters, tp2 cp2": shallow(*ADAPTERS, tp=2, cp=2, rank=5, steps=2),
    "adapters, cpu_offload": shallow(*ADAPTERS, _PARALLEL + "cpu_offload=true"),
}
"""Every layout and every option once; a case combines options that do not depend on each other."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_step_runs_on_cuda(found: dict[str, Any], name: str) -> None:
    counts = found[name]
    assert "error" not in counts, counts["error"]
    assert counts["micro_batches"] == SHALLOW.micro_batches
    scopes = {"teacher/targets", "training/forward", "training/backward", "training/optimizer"}
    assert scopes <= counts["work"].keys()
    assert all(peak["counted"] > 0 for peak in counts["memory"].values())
