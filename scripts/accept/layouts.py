"""A training step of a small model at every layout that the ranks allow, against plain PyTorch on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from scripts.accept.models import save_model
from scripts.accept.results import Check, at_most
from scripts.accept.settings import Context, Settings

SHAPE = dict(hidden=64, inner=128, layers=2, heads=8, kv_heads=4, channels=32, vocab=384)
_Precision = Literal["float32", "bfloat16"]
_K = 16
_TOLERANCE = {("float32", "cpu"): 1e-5, ("float32", "cuda"): 1e-4, ("bfloat16", "cuda"): 0.25}
"""Maps dtype and device to the largest relative difference of the loss, the gradient norm, and any gradient.

The reference is float32. In bfloat16 on a CPU, gradients of q_norm and k_norm differ by up to 0.11, the loss by 3e-4.
"""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of a layout; ``packed``: whether a micro-batch contains several responses."""

    tp: int = 1
    cp: int = 1
    replicas: int = 1
    teacher: int = 1
    packed: bool = True

    def __str__(self) -> str:
        names = {"tp": self.tp, "cp": self.cp, "HSDP replicas": self.replicas, "teacher group": self.teacher}
        sizes = [f"{name} {size}" for name, size in names.items() if size > 1]
        return ", ".join(["FSDP", *sizes, "packed" if self.packed else "single responses"])


@dataclass(frozen=True)
class Step:
    """Results of one training step; they must not depend on the layout."""

    loss: float
    norm: float
    gradients: Mapping[str, Tensor]


def layouts_for(ranks: int) -> list[Layout]:
    """Return the layouts that this number of ranks allows; the model has 8 query and 4 key-value heads."""
    found = [Layout(), Layout(packed=False)]
    if ranks % 2 == 0:
        found += [Layout(tp=2), Layout(cp=2), Layout(cp=2, packed=False), Layout(teacher=2)]
        found += [Layout(replicas=2)]
    if ranks % 4 == 0:
        found += [Layout(tp=2, cp=2), Layout(tp=4), Layout(cp=4), Layout(tp=2, replicas=2), Layout(tp=2, teacher=4)]
    return found


def steps(context: Context) -> Iterator[Check]:
    """Compare loss, gradient norm and all gradients of each layout with one rank; collective."""
    world = context.world()
    folder = context.settings.models / "layouts"
    if context.rank == 0:
        for seed, name in enumerate(("student", "teacher")):
            save_model(folder / name, {**SHAPE, "layers": 2 + seed}, seed, "cpu", torch.float32)
    world.barrier()
    rollouts = random_rollouts(max(12, 3 * world.size))
    device = world.device
    precisions: tuple[_Precision, ...] = ("float32", "bfloat16") if context.settings.on_gpu else ("float32",)
    configs = {precision: step_config(context.settings, precision) for precision in precisions}
    references = {precision: plain_step(config, rollouts, device) for precision, config in configs.items()}
    for layout in layouts_for(world.size):
        # Process groups are created once per layout: NCCL needs seconds for each.
        world.build_mesh(context.settings.device, layout.tp, layout.cp, layout.replicas, layout.teacher)
        for precision, config in configs.items():
            found = sharded_step(config, world, rollouts, layout)
            name, difference = worst_difference(found, references[precision])
            bound = at_most(_TOLERANCE[precision, context.settings.device])
            yield Check(f"{layout}, {precision}", difference, "", bound, f"relative, largest for {name}")


def step_config(settings: Settings, precision: _Precision) -> Any:
    """Return a configuration for the small models; made without a recipe, so that OmegaConf is not needed."""
    from distill.config import (
        Config,
        DistillationConfig,
        DtensorConfig,
        GenerationConfig,
        LossConfig,
        PolicyConfig,
        RuntimeConfig,
        TeacherBatchingConfig,
        TeacherConfig,
    )

    folder = settings.models / "layouts"
    return Config(
        policy=PolicyConfig(
            model_name=f"{folder}/student",
            precision=precision,
            max_total_sequence_length=256,
            dtensor_cfg=DtensorConfig(activation_checkpointing=False),
            generation=GenerationConfig(backend="transformers"),
        ),
        teacher=TeacherConfig(
            model_name=f"{folder}/teacher",
            precision=precision,
            max_total_sequence_length=256,
            dynamic_batching=TeacherBatchingConfig(enabled=True, logprob_mb_tokens=400),  # several micro-batches
        ),
        distillation=DistillationConfig(topk_logits_k=_K),
        loss_fn=LossConfig(kl_type="mixed", outside_topk="bucket"),
        runtime=RuntimeConfig(device=settings.device),
    )


def random_rollouts(count: int) -> list[Any]:
    """Return rollouts of 1 to 40 random tokens; every second teacher prefix differs from the student's prompt."""
    from distill.types import Problem, Prompt, Rollout

    generator = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(0, SHAPE["vocab"], (length,), generator=generator).tolist())

    rollouts = []
    for i in range(count):
        prompt, response = Prompt(i, tokens(1, 30), Problem(f"problem {i}")), tokens(1, 40)
        prefix = tokens(5, 50) if i % 2 else prompt.student_ids
        rollouts.append(Rollout(prompt, 0, response, (-1.0,) * len(response), "length", 0, prefix))
    return rollouts


def plain_step(config: Any, rollouts: Sequence[Any], device: torch.device) -> Step:
    """Compute loss and gradients in float32 on this rank with transformers and autograd, response by response."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="eager")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(model.model_name, **options).to(device)
        for model in (config.policy, config.teacher)
    )
    temperature, weight = config.policy.generation.temperature, config.loss_fn.mixed_kl_weight
    total, tokens = torch.zeros((), device=device), sum(len(r.response_ids) for r in rollouts)
    for rollout in rollouts:
        ours = _response_logits(student, rollout.prompt.student_ids, rollout.response_ids) / temperature
        with torch.no_grad():
            theirs = _response_logits(teacher, rollout.teacher_prefix_ids, rollout.response_ids) / temperature
        p, q = (_outcomes(logits, theirs) for logits in (theirs, ours))
        forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
        total = total + (weight * forward + (1 - weight) * reverse).sum() / tokens
    total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return Step(float(total.detach()), norm, gradients)


def _response_logits(model: Any, prefix: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([prefix + response], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 : -1]
    return logits


def _outcomes(logits: Tensor, choosing: Tensor) -> Tensor:
    """Return the log-probs of the ids in the top-k of ``choosing``, and of all other ids together."""
    ids = choosing.topk(_K, -1).indices
    logprobs = logits.log_softmax(-1)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def sharded_step(config: Any, world: Any, rollouts: Sequence[Any], layout: Layout) -> Step:
    """Take the trainer's step on this rank; return the loss of all ranks and complete gradients. Collective."""
    from distill.batching.plan import PackingConfig, plan
    from distill.model.hf_files import find_model
    from distill.model.student import Student
    from distill.model.teacher import ShardedTeacher
    from distill.model.weights import GatheredWeights

    files = [find_model(model.model_name, "a model") for model in (config.policy, config.teacher)]
    student = Student(config, files[0], world, SHAPE["vocab"], ())
    teacher = ShardedTeacher(config, files[1], world, SHAPE["vocab"])
    packing = PackingConfig(len(rollouts), *((None, 120) if layout.packed else (1, None)))
    (batch,) = student.to_device(plan(rollouts, world.layout, packing, seed=0, step=0))
    with teacher.on_device():
        targets = list(teacher.targets_of(batch.micro_batches))
    loss = 0.0
    for micro_batch, its_targets in zip(batch, targets, strict=True):
        output = student.loss(micro_batch, its_targets)
        (output.kl_sum / batch.response_tokens).backward()
        loss += float(output.kl_sum.detach()) / batch.response_tokens
    student.sum_gradients()
    sharded = [(name, cast(Tensor, p.grad)) for name, p in student.model.named_hf_parameters()]
    gathered = GatheredWeights(sharded, torch.float32, 2**30, world.replica_mesh, world.layout.tp_size)
    gradients = {name: tensor.clone() for name, tensor in gathered}
    norm = student.step()
    counted = loss if world.layout.tp_rank == 0 else 0.0  # all ranks of a tensor-parallel group have the same loss
    return Step(sum(world.gather(counted)), norm, gradients)


def worst_difference(ours: Step, reference: Step) -> tuple[str, float]:
    """Return the quantity with the largest relative difference, and the difference; nan is the largest."""
    assert ours.gradients.keys() == reference.gradients.keys(), (ours.gradients.keys(), reference.gradients.keys())
    found = {
        f"the gradient of {name}": float((ours.gradients[name] - g).double().norm() / g.double().norm())
        for name, g in reference.gradients.items()
    }
    found["the loss"] = abs(ours.loss - reference.loss) / abs(reference.loss)
    found["the gradient norm"] = abs(ours.norm - reference.norm) / reference.norm
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    return worst, found[worst]
