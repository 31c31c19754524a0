"""Weights of response tokens: every layout takes the same step as plain PyTorch, for every factor and normaliser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig, plan
from distill.config import Config, LoraConfig, TokenWeightsConfig
from distill.distributed.world import World
from distill.inputs import flops_of, packing_of
from distill.loss.token_weights import needs_score_pass
from distill.metrics.step import Metrics
from distill.metrics.utilization import Utilization
from distill.model.dtensor import local_shard
from distill.model.following_teacher import build_teacher
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.nonfinite import NonFiniteError
from distill.model.student import Student
from distill.types import Problem, Prompt, Rollout, TopK
from distill.validation.token_kl import compare_tokens
from tests.harness import Step, config_for, differences, fixed_rollouts, outcomes, response_logits, sharded_step
from tests.helpers import run_ranks, save_tiny_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
VOCAB = 383  # odd, so that the ranks' parts of the vocabulary have different sizes
W = "loss_fn.token_weights"
POSITIONS = (f"{W}.skip_first=2", f"{W}.first=25", f"{W}.position_slope=0.6")
SIGMOID = (f"{W}.position_sigmoid.w_min=0.25", f"{W}.position_sigmoid.tau=0.3", f"{W}.position_sigmoid.s=0.1")


def _select(score: str, share: float) -> tuple[str, ...]:
    return f"{W}.select.score={score}", f"{W}.select.share={share}"


CASES: dict[str, tuple[str, ...]] = {
    "positions, tokens": (*POSITIONS, *SIGMOID),
    "positions, sequences": (*POSITIONS, *SIGMOID, f"{W}.normalize=sequences"),
    "teacher_entropy, weights": (*_select("teacher_entropy", 0.4), *POSITIONS, f"{W}.normalize=weights"),
    "divergence, sequences": (*_select("divergence", 0.3), f"{W}.skip_first=1", f"{W}.normalize=sequences"),
    "soft_or, full vocabulary": (*_select("soft_or", 0.5), "distillation.topk_logits_k=0", f"{W}.normalize=weights"),
    "all factors, student's support": (
        *(*_select("student_entropy", 0.7), f"{W}.prefix_importance=0.5", f"{W}.min_teacher_prob=0.0005"),
        *(*POSITIONS, *SIGMOID, f"{W}.normalize=sequences", "loss_fn.support=student"),
    ),
    "off-policy": (
        "distillation.off_policy.share=0.5",
        "distillation.off_policy.kl_type=reverse",
        "loss_fn.kl_type=forward",
    ),
    "off-policy, positions and divergence": (
        *(*_select("divergence", 0.5), *POSITIONS, f"{W}.normalize=weights", f"{W}.prefix_importance=0.5"),
        *("distillation.off_policy.share=0.5", "distillation.off_policy.kl_type=forward", "loss_fn.kl_type=jsd"),
    ),
}
FAMILIES = ("llama", "qwen3")
IN_QWEN3 = ("all factors, student's support",)


@dataclass(frozen=True)
class Layout:
    """A layout of four ranks, and limits of micro-batches."""

    tp: int
    cp: int
    teacher: int = 1
    replicas: int = 1
    tokens: int = 120
    """Maximum number of tokens of a micro-batch."""


LAYOUTS = {
    "tp 2, cp 2": Layout(2, 2, tokens=250),
    "cp 2, teacher group of 4": Layout(1, 2, teacher=4),
    "replicas, several micro-batches": Layout(1, 1, replicas=2, tokens=80),
}
COMPLETE = "tp 2, cp 2"
"""Layout of all cases; the case ``IN_ALL_LAYOUTS`` also runs in the other layouts."""
IN_ALL_LAYOUTS = "off-policy, positions and divergence"
RUNS = [
    *(("llama", name, COMPLETE) for name in CASES),
    *(("llama", IN_ALL_LAYOUTS, layout) for layout in LAYOUTS if layout != COMPLETE),
    *(("qwen3", name, "cp 2, teacher group of 4") for name in IN_QWEN3),
]


def _rollouts(case: str | tuple[str, ...] = ()) -> list[Rollout]:
    """Return responses of which several share their prompts; the first has one token.

    In cases whose name begins with ``off-policy``, every third response comes from the dataset.
    """
    made = fixed_rollouts(9, VOCAB)
    made += [replace(r, response_index=1, response_ids=r.response_ids[3:], logprobs=r.logprobs[3:]) for r in made[1:4]]
    if not isinstance(case, str) or not case.startswith("off-policy"):
        return made
    return [replace(r, off_policy=True, logprobs=()) if i % 3 == 1 else r for i, r in enumerate(made)]


def _config(root: Path, family: str, case: str | tuple[str, ...], ranks: int = 4) -> Config:
    folders = root / f"{family}-student", root / f"{family}-teacher"
    settings = CASES[case] if isinstance(case, str) else case
    return config_for(*folders, "loss_fn.outside_topk=bucket", *settings, ranks=ranks)


# ---- the reference -------------------------------------------------------------------------------------------------


def _position_weight(weights: TokenWeightsConfig, t: int, length: int) -> float:
    f = (t - 0.5) / length
    if t <= weights.skip_first or (weights.first is not None and t > weights.first):
        return 0.0
    weight = 1 + weights.position_slope * (2 * f - 1)
    if (rise := weights.position_sigmoid) is not None:
        weight *= rise.w_min + (1 - rise.w_min) / (1 + math.exp(-(f - rise.tau) / rise.s))
    return weight


def _selected(scores: list[float], eligible: list[bool], share: float) -> list[bool]:
    best = sorted((i for i, chosen in enumerate(eligible) if chosen), key=lambda i: (-scores[i], i))
    kept = math.ceil(share * len(best) - 1e-9)
    assert kept == len(best) or scores[best[kept - 1]] - scores[best[kept]] > 1e-5, "choose another seed: a near tie"
    return [i in best[:kept] for i in range(len(scores))]


def _min_max(values: list[float], eligible: list[bool]) -> list[float]:
    chosen = [value for value, is_chosen in zip(values, eligible, strict=True) if is_chosen]
    low, high = min(chosen, default=0.0), max(chosen, default=0.0)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _weights(config: Config, rollout: Rollout, rows: dict[str, list[float]]) -> list[float]:
    """Return the weight of each token of a response, from the definitions in loops over tokens."""
    weights, length = config.loss_fn.token_weights, len(rollout.response_ids)
    found = [_position_weight(weights, t, length) for t in range(1, length + 1)]
    eligible = [weight != 0 for weight in found]
    read = max((t + 1 for t in range(length) if eligible[t]), default=0)
    if (select := weights.select) is not None:
        entropy, loss = rows["student_entropy"], rows["loss"]
        scores = {"student_entropy": entropy, "divergence": loss, "teacher_entropy": rows["teacher_entropy"]}
        h, d = _min_max(entropy, eligible), _min_max(loss, eligible)
        scores["soft_or"] = [a + b - a * b for a, b in zip(h, d, strict=True)]
        kept = _selected(scores[select.score], eligible, select.share)
        found = [weight * chosen for weight, chosen in zip(found, kept, strict=True)]
    if weights.prefix_importance and not rollout.off_policy:
        sizes = [abs(p - q) for p, q in zip(rows["teacher_logprob"], rollout.logprobs, strict=True)][:read]
        for t in range(read):
            ratio = sum(sizes[:t]) / sum(sizes) if sum(sizes) else 0.0
            found[t] *= 1 + weights.prefix_importance * (1 - ratio)
    if weights.min_teacher_prob:
        found = [
            weight * (math.exp(p) >= weights.min_teacher_prob)
            for weight, p in zip(found, rows["teacher_logprob"], strict=True)
        ]
    return found


def _rows(config: Config, ours: Tensor, theirs: Tensor, kl_type: str, sampled: Sequence[int]) -> dict[str, Tensor]:
    """Return loss, entropies and the teacher's log-prob of the sampled token at each token; the loss has a gradient."""
    choosing = ours.detach() if config.loss_fn.support == "student" else theirs
    k, outside = config.distillation.topk_logits_k, config.loss_fn.outside
    p, q = (outcomes(logits, choosing, k, outside) for logits in (theirs, ours))
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    share, b = {"forward": 1.0, "mixed": config.loss_fn.mixed_kl_weight}.get(kl_type, 0.0), config.loss_fn.jsd_beta
    m = (b * p.exp() + (1 - b) * q.exp()).log()
    jsd = b * (p.exp() * (p - m)).sum(-1) + (1 - b) * (q.exp() * (q - m)).sum(-1)
    full_p, full_q = theirs.log_softmax(-1), ours.detach().log_softmax(-1)
    return {
        "loss": jsd if kl_type == "jsd" else share * forward + (1 - share) * reverse,
        "forward_kl": forward.detach(),
        "reverse_kl": reverse.detach(),
        "student_entropy": -(full_q.exp() * full_q).sum(-1),
        "teacher_entropy": -(full_p.exp() * full_p).sum(-1),
        "teacher_logprob": full_p.gather(-1, torch.tensor(sampled)[:, None])[:, 0],
    }


def plain_weighted_step(config: Config, rollouts: Sequence[Rollout], rows_of: list[Any] | None = None) -> Step:
    """Compute loss and gradients response by response, with plain transformers and autograd.

    ``rows_of``: a list to which the pair (rows, weights) of each response is added.
    """
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(model.model_name, dtype=torch.float32, attn_implementation="eager")
        for model in (config.policy, config.teacher)
    )
    off_policy = config.distillation.off_policy.kl_type or config.loss_fn.kl_type
    sums: list[tuple[Tensor, float]] = []
    for rollout in rollouts:
        ours = response_logits(student, rollout.prompt.student_ids, rollout.response_ids)
        with torch.no_grad():
            theirs = response_logits(teacher, rollout.teacher_prefix_ids, rollout.response_ids)
        kl_type = off_policy if rollout.off_policy else config.loss_fn.kl_type
        rows = _rows(config, ours, theirs, kl_type, rollout.response_ids)
        weights = _weights(config, rollout, {name: values.tolist() for name, values in rows.items()})
        if rows_of is not None:
            rows_of.append(({name: values.tolist() for name, values in rows.items()}, weights))
        sums.append(((rows["loss"] * torch.tensor(weights)).sum(), sum(weights)))
    if config.loss_fn.token_weights.normalize == "sequences":
        means = [total / weight for total, weight in sums if weight]
        loss = torch.stack(means).mean()
    else:
        by_tokens = config.loss_fn.token_weights.normalize == "tokens"
        divisor = sum(len(r.response_ids) for r in rollouts) if by_tokens else sum(weight for _, weight in sums)
        loss = torch.stack([total for total, _ in sums]).sum() / divisor
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    norm = math.hypot(*(float(g.double().norm()) for g in gradients.values()))
    return Step(loss.item(), norm, gradients)


# ---- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shape = dict(hidden=64, heads=8, kv_heads=4, vocab=VOCAB)
    for family in FAMILIES:
        save_tiny_model(root / f"{family}-student", family, family == "llama", seed=1, **shape)
        save_tiny_model(root / f"{family}-teacher", family, family == "llama", seed=2, layers=3, **shape)
    return root


IN_LAYOUTS = (COMPLETE, "replicas, several micro-batches")
"""Layouts in which the metrics of a training step are compared."""
MEASURED = "soft_or, full vocabulary"
"""Case of which the metrics of a training step are compared."""
NOTHING = (f"{W}.min_teacher_prob=0.9999",)
"""Settings with which no token has a weight."""
UNKNOWN = {
    normalize: (f"{W}.min_teacher_prob=0.001", f"{W}.normalize={normalize}") for normalize in ("tokens", "weights")
}
"""Settings with which a weight is nan if a log-prob of the teacher is nan."""


def _train(config: Config, world: World, tokens: int) -> tuple[dict[str, float], list[str], list[Any]]:
    """Train a step; return its metrics, the names of the weights that changed, and the comparisons of all tokens."""
    models = [find_model(model.model_name, "a model") for model in (config.policy, config.teacher)]
    student = Student(config, models[0], world, VOCAB, ())
    teacher = build_teacher(config, models[1], world, VOCAB, student)
    before = {name: tensor.clone() for name, tensor in student.state().items()}
    packing, metrics = PackingConfig(12, None, tokens, weights=config.loss_fn.token_weights), Metrics()
    compared = compare_tokens(world, student, teacher, _rollouts(), 0, packing=packing, seed=0, top_tokens=1)
    (batch,) = student.to_device(plan(_rollouts(), world.layout, packing, seed=0, step=0))
    student.train(batch, list(teacher.targets_of(batch.micro_batches)), metrics)
    after = student.state()
    changed = [
        name
        for name, tensor in before.items()
        if not torch.equal(*(local_shard(each) for each in (tensor, after[name])))
    ]
    return metrics.reduce(world.control), changed, [len(each.forward_kl_R) for each in compared]


def _train_with_nan(config: Config, world: World, tokens: int) -> list[bool]:
    """Train a step in which one log-prob of the teacher on rank 3 is nan; return which ranks raise NonFiniteError."""
    models = [find_model(model.model_name, "a model") for model in (config.policy, config.teacher)]
    student = Student(config, models[0], world, VOCAB, ())
    teacher = build_teacher(config, models[1], world, VOCAB, student)
    packing = PackingConfig(12, None, tokens, weights=config.loss_fn.token_weights)
    (batch,) = student.to_device(plan(_rollouts(), world.layout, packing, seed=0, step=0))
    targets = list(teacher.targets_of(batch.micro_batches))
    if world.rank == 3:
        assert isinstance(targets[0], TopK) and targets[0].sampled_logprob_N is not None
        targets[0].sampled_logprob_N[0] = math.nan
    try:
        student.train(batch, targets, Metrics())
    except NonFiniteError:
        return list(world.gather(True))
    return list(world.gather(False))


def _all_steps(root: Path) -> dict[str, Any]:
    """Run all cases in the same four processes, because starting a process takes longer than a step."""
    world = World()
    steps, measured = {}, {}
    for layout_name, layout in LAYOUTS.items():
        world.build_mesh("cpu", layout.tp, layout.cp, layout.replicas, layout.teacher)
        for family, name, in_layout in RUNS:
            if in_layout == layout_name:
                config = _config(root, family, name)
                packing = PackingConfig(12, None, layout.tokens, weights=config.loss_fn.token_weights)
                steps[family, name, layout_name] = sharded_step(config, world, _rollouts(name), packing)
        if layout_name in IN_LAYOUTS:
            measured[layout_name] = _train(_config(root, "llama", MEASURED), world, layout.tokens)
        if layout_name == COMPLETE:
            nothing = _train(_config(root, "llama", NOTHING), world, layout.tokens)
        if layout.replicas > 1:
            unknown = {
                name: _train_with_nan(_config(root, "llama", UNKNOWN[name]), world, layout.tokens) for name in UNKNOWN
            }
    world.close()
    found = {"steps": steps, "measured": measured, "nothing": nothing, "unknown": unknown}
    return found if world.is_main else {}


@pytest.fixture(scope="module")
def found(models: Path) -> dict[str, Any]:
    first: dict[str, Any] = run_ranks(4, _all_steps, models)[0]
    return first


@pytest.fixture(scope="module")
def references(models: Path) -> dict[tuple[str, str], Step]:
    return {
        (family, name): plain_weighted_step(_config(models, family, name), _rollouts(name))
        for family, name in dict.fromkeys((family, name) for family, name, _ in RUNS)
    }


@pytest.mark.parametrize(("family", "name", "layout"), RUNS)
def test_a_weighted_step_equals_plain_pytorch_for_every_layout(
    found: Any, references: Any, family: str, name: str, layout: str
) -> None:
    found_differences = differences(found["steps"][family, name, layout], references[family, name])
    worst = max(found_differences, key=found_differences.__getitem__)
    assert found_differences[worst] < TOLERANCE, f"{worst} differs by {found_differences[worst]:.2g}"


@pytest.fixture(scope="module")
def measured_rows(models: Path) -> list[Any]:
    """Return the rows and weights of each response in the case ``MEASURED``."""
    rows: list[Any] = []
    plain_weighted_step(_config(models, "llama", MEASURED), _rollouts(), rows)
    return rows


@pytest.mark.parametrize("layout", IN_LAYOUTS)
def test_metrics_of_trained_tokens_are_the_same_for_every_layout(found: Any, measured_rows: Any, layout: str) -> None:
    values, changed, compared = found["measured"][layout]
    assert values["skipped_optimizer_steps"] == 0 and any(name.startswith("model.") for name in changed)
    assert compared == [len(rollout.response_ids) for rollout in _rollouts()], "the comparison omits tokens"
    weights = [weight for _, of_response in measured_rows for weight in of_response]
    assert values["trained_tokens"] == sum(weight > 0 for weight in weights)
    assert values["mean_token_weight"] == pytest.approx(sum(weights) / values["trained_tokens"])
    by_tenth: dict[str, list[float]] = {}
    for rows, of_response in measured_rows:
        for t, weight in enumerate(of_response, 1):
            tenth = 10 * (2 * t - 1) // (2 * len(of_response)) + 1  # the smallest tenth with 10 f < tenth
            for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy") if weight else ():
                by_tenth.setdefault(f"train/position/{name}_{tenth}", []).append(rows[name][t - 1])
    logged = {name: value for name, value in values.items() if "/position/" in name and not math.isnan(value)}
    assert logged == pytest.approx({name: sum(of) / len(of) for name, of in by_tenth.items()}, rel=1e-4, abs=1e-6)
    assert len(logged) >= 30


def test_a_batch_without_weights_changes_neither_weights_nor_moments(found: Any) -> None:
    values, changed, compared = found["nothing"]
    assert changed == []
    assert values["skipped_optimizer_steps"] == 1 and "grad_norm" not in values
    assert values["trained_tokens"] == 0
    assert sum(compared) == sum(len(rollout.response_ids) for rollout in _rollouts())


@pytest.mark.parametrize("normalize", UNKNOWN)
def test_a_nan_of_the_teacher_on_one_rank_ends_the_run_on_all_ranks(found: Any, normalize: str) -> None:
    assert found["unknown"][normalize] == [True] * 4


def _flops(root: Path) -> dict[str, tuple[int, int, float]]:
    """Return the counted FLOPs of student and teacher, and the student's FLOPs by formula, for several weights."""
    world = World()
    world.build_mesh("cpu", 1, 1)
    prompts = [Prompt(i, (1 + i,) * 8, Problem("p")) for i in range(4)]
    rollouts = [Rollout(p, 0, tuple(range(5, 45)), (-1.0,) * 40, "stop", 0, p.student_ids) for p in prompts]
    found = {}
    for name, settings in SAVING.items():
        config = _config(root, "llama", settings, ranks=1)
        models = [find_model(model.model_name, "a model") for model in (config.policy, config.teacher)]
        student = Student(config, models[0], world, VOCAB, ())
        teacher = build_teacher(config, models[1], world, VOCAB, student)
        shape = model_config(models[0], "a model")
        packing = replace(packing_of(config, shape), optimizer_batch=12, sequences=1, tokens=None, expected=None)
        (batch,) = plan(rollouts, world.layout, packing, seed=0, step=0)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as reading:
            targets = list(teacher.targets_of(batch.micro_batches))
        metrics = Metrics()
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as training:
            student.train(batch, targets, metrics)
        scores = needs_score_pass(config.loss_fn, config.distillation.topk_logits_k)
        flops = flops_of(shape, LoraConfig())
        utilization = Utilization(flops, packing.share_prefixes, 1, None, packing.weights, scores)
        trained = metrics.reduce().get("trained_tokens")
        expected = utilization.training_flops(trained, rollouts)
        found[name] = training.get_total_flops(), reading.get_total_flops(), expected
    world.close()
    return found


def _addmm_flops(_: Any, a_shape: Any, b_shape: Any, *__: Any, **___: Any) -> int:
    return int(2 * a_shape[0] * a_shape[1] * b_shape[1])


SAVING: dict[str, tuple[str, ...]] = {
    "all": (),
    "first": (f"{W}.first=8",),
    "select, teacher": _select("teacher_entropy", 0.25),
    "select, student": _select("student_entropy", 0.25),
}


def test_first_and_select_save_the_flops_that_the_metric_counts(models: Path) -> None:
    """The counter omits attention and the last token of a response, which predicts none: about 14%."""
    found = run_ranks(1, _flops, models)[0]
    (trained, read, expected) = found["all"]
    assert 0.8 < trained / expected < 1
    for name in SAVING:
        assert found[name][0] / trained == pytest.approx(found[name][2] / expected, rel=0.06), name
    assert found["first"][0] < 0.35 * trained and found["first"][1] < 0.35 * read, "16 of 48 tokens are read"
    assert found["select, teacher"][1] == read
    assert found["select, teacher"][0] < found["select, student"][0] < trained
