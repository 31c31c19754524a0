"""Comparison of student and teacher: KL and most likely tokens at each token, for every layout and loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig
from distill.distributed.world import World
from distill.model.following_teacher import build_teacher
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.validation.token_kl import compare_tokens, highest
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model

VOCAB, VALID = 383, 381  # ranks have unequal parts of the vocabulary, and two tokens are padding
VARIANTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "fsdp": (1, 1, ()),
    "tp": (2, 1, ("loss_fn.temperature=0.7",)),
    "tp, complete vocabulary": (2, 1, ("distillation.topk_logits_k=0",)),
    "cp, fewer than five ids": (1, 2, ("distillation.topk_logits_k=3", "loss_fn.kl_type=sampled")),
    "tp, student's support": (2, 1, ("loss_fn.support=student",)),
}
"""Maps a name to tensor- and context-parallel size of two ranks, and to settings of the loss."""
PACKED = PackingConfig(4, sequences=None, tokens=120, expected=64)  # more rollouts than a validation has
MOST = 4


def _record(owner: Any, method: str, events: list[str]) -> None:
    """Append the method's name to ``events`` at each call."""
    original = getattr(owner, method)

    def recorded(*args: Any) -> Any:
        events.append(method)
        return original(*args)

    setattr(owner, method, recorded)


def _comparisons(root: Path) -> dict[str, Any]:
    """Return this rank's comparisons in every variant."""
    world = World()
    found: dict[str, Any] = {}
    rollouts = fixed_rollouts(vocab=VALID)
    for name, (tp, cp, settings) in VARIANTS.items():
        world.build_mesh("cpu", tp, cp)
        config = config_for(root / "student", root / "teacher", *settings, ranks=2)
        student = Student(config, find_model(str(root / "student"), ""), world, VALID, ())
        teacher = build_teacher(config, find_model(str(root / "teacher"), ""), world, VALID, student)
        compare = partial(compare_tokens, world, student, teacher, packing=PACKED, seed=0, top_tokens=MOST)
        found[name] = compare(rollouts, 0)
        assert compare([], 0) == []
    found["order"] = []
    for owner, method in ((teacher, "onload"), (teacher, "targets"), (teacher, "offload"), (student, "compare")):
        _record(owner, method, found["order"])
    (first,) = partial(compare, top_tokens=0)(rollouts[1:2], 0)
    assert first.top_tokens == ()
    found["order"] = list(found["order"])  # without later calls
    with torch.no_grad():
        next(student.model.parameters()).fill_(torch.nan)
    found["nan"] = compare(rollouts[:2], 0)
    world.close()
    return found


_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
"""The float32 logits of the tiny models differ from float64 by up to 1e-5, and probabilities by as much relatively."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[tuple[Tensor, Tensor]]]:
    """Return all ranks' comparisons, and float64 logits of student and teacher for each rollout."""
    root = tmp_path_factory.mktemp("comparisons")
    for seed, name in ((1, "student"), (2, "teacher")):
        save_tiny_model(root / name, "qwen3", True, seed=seed, vocab=VOCAB)
    models = [AutoModelForCausalLM.from_pretrained(root / n, dtype=torch.float64) for n in ("student", "teacher")]
    logits = []
    for rollout in fixed_rollouts(vocab=VALID):
        prefixes = rollout.prompt.student_ids, rollout.teacher_prefix_ids
        with torch.no_grad():
            z, teacher_z = (
                model(torch.tensor([[*prefix, *rollout.response_ids]])).logits[0, len(prefix) - 1 : -1, :VALID]
                for model, prefix in zip(models, prefixes, strict=True)
            )
        logits.append((z, teacher_z))
    return run_ranks(2, _comparisons, root), logits


def _log_probs(logits: tuple[Tensor, Tensor], settings: Sequence[str]) -> list[Tensor]:
    temperature = 0.7 if "loss_fn.temperature=0.7" in settings else 1.0
    return [(z / temperature).log_softmax(-1) for z in logits]


def _kept(q: Tensor, p: Tensor, ids: Sequence[int], settings: Sequence[str]) -> Tensor:
    """Return a mask of the ids that the loss compares one by one."""
    k = next((int(word.partition("k=")[2]) for word in settings if "topk_logits_k" in word), 16)
    if k == 0:
        return torch.ones_like(q, dtype=torch.bool)
    best = (q if "loss_fn.support=student" in settings else p).topk(k).indices
    mask = torch.zeros_like(q, dtype=torch.bool).scatter(1, best, True)
    return mask.scatter(1, torch.tensor(ids)[:, None], True) if "loss_fn.kl_type=sampled" in settings else mask


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_token_kls_equal_those_of_plain_models_in_any_layout(compared: Any, name: str) -> None:
    ranks, logits = compared
    settings = VARIANTS[name][2]
    for i, rollout in enumerate(fixed_rollouts(vocab=VALID)):
        q, p = _log_probs(logits[i], settings)
        kept = _kept(q, p, rollout.response_ids, settings)
        q, p = (
            torch.cat([x.masked_fill(~kept, -80.0), x.masked_fill(kept, -80.0).logsumexp(1, keepdim=True)], 1)
            for x in (q, p)
        )
        wanted = ((p.exp() * (p - q)).sum(1), (q.exp() * (q - p)).sum(1))
        for rank in ranks:
            ours = rank[name][i].forward_kl_R, rank[name][i].reverse_kl_R
            torch.testing.assert_close(ours, tuple(x.float() for x in wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_top_tokens_equal_those_of_plain_models_in_any_layout(compared: Any, name: str) -> None:
    """The reference is the complete logits in float64.

    float32 may swap entries that are equal up to rounding. So the test compares the sorted probabilities, and the
    reference's probability of each listed id, instead of the ids. The listed tokens must have the highest KLs of the
    comparison itself; the test above compares these KLs with the reference.
    """
    ranks, logits = compared
    settings = VARIANTS[name][2]
    own = 3 if "distillation.topk_logits_k=3" in settings else 5
    for i, rollout in enumerate(fixed_rollouts(vocab=VALID)):
        models = _log_probs(logits[i], settings)
        for found in (rank[name][i] for rank in ranks):
            kl_R = torch.maximum(found.forward_kl_R, found.reverse_kl_R)
            at = [each.at for each in found.top_tokens]
            assert at == sorted(kl_R.argsort(descending=True, stable=True)[:MOST].tolist())
            assert len(at) == min(MOST, len(rollout.response_ids))
            for each in found.top_tokens:
                for likely, logprobs, count in zip((each.student, each.teacher), models, (5, own), strict=True):
                    exact = logprobs[each.at].exp()
                    ids, probs = map(list, zip(*likely, strict=True))
                    _close(torch.tensor(probs).double(), exact.topk(count).values)
                    _close(torch.tensor(probs).double(), exact[ids])
                    assert len(set(ids)) == count


@pytest.mark.slow
def test_the_teacher_is_not_on_the_device_during_the_comparison_of_one_micro_batch(compared: Any) -> None:
    assert [rank["order"] for rank in compared[0]] == [["onload", "targets", "offload", "compare"]] * 2


@pytest.mark.slow
def test_a_comparison_with_broken_weights_has_nan_and_no_top_tokens(compared: Any) -> None:
    """A later step or checkpoint reports the broken weights; the comparison must not raise before."""
    for found in (one for rank in compared[0] for one in rank["nan"]):
        assert found.forward_kl_R.isnan().all() and {each.student for each in found.top_tokens} == {()}


def test_the_tokens_of_highest_kl_are_selected_per_rollout_and_ties_by_position() -> None:
    """Rows in the order of a rank with context parallelism: rollout 1 first, positions not in order."""
    kl = torch.tensor([5.0, 5.0, 9.0, 1.0, 5.0, 0.0, 0.0])
    index = torch.tensor([12, 11, 10, 13, 3, 1, 2])
    rollout = torch.tensor([1, 1, 1, 1, 0, 0, 0])

    def selected(most: int) -> list[int]:
        return sorted(index[highest(kl, index, rollout, most)].tolist())

    assert selected(2) == [1, 3, 10, 11] and selected(0) == []
    assert selected(1) == [3, 10] and selected(9) == sorted(index.tolist())
