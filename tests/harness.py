"""Reference and product training steps on fixed responses, for any layout and packing.

``plain_step`` computes the reference loss and gradients in one process, with plain transformers and autograd, response
by response; ``plain_update`` takes the reference optimizer step. ``sharded_step`` takes the product's step on this
rank. ``differences`` compares two steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig, plan
from distill.config import Config, load_config
from distill.distributed.world import World
from distill.memory.forecast import known_shapes, plan_memory
from distill.metrics.step import Metrics
from distill.model.checksum import BitSums, bit_sums_by_name
from distill.model.dtensor import local_shard, tp_dim
from distill.model.following_teacher import build_teacher
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.model.teacher import ShardedTeacher
from distill.model.weights import GatheredWeights
from distill.types import Problem, Prompt, Rollout, Stats
from tests.lora_oracle import fill, peft_parameters, with_peft

REPO = Path(__file__).resolve().parent.parent


def forecast_text(config: Config) -> str:
    """Return the memory forecast of models without weights, for GPUs unless runtime.device=cpu."""
    lines: list[str] = []
    device = torch.device("cpu" if config.runtime.device == "cpu" else "cuda")
    plan_memory(config, *known_shapes(config), device, lines.append)
    return "\n".join(lines)


def config_for(student: Path, teacher: Path, *overrides: str, ranks: int = 1) -> Config:
    """Return the base recipe in float32 for two small models."""
    return load_config(
        [
            "--config",
            str(REPO / "recipes/distillation_math.yaml"),
            f"policy.model_name={student}",
            f"teacher.model_name={teacher}",
            "policy.precision=float32",
            "policy.max_total_sequence_length=256",
            "policy.generation.backend=transformers",
            "policy.dtensor_cfg.tensor_parallel_size=1",
            "policy.dtensor_cfg.context_parallel_size=1",
            "policy.dtensor_cfg.activation_checkpointing=false",
            "teacher.dtensor_cfg.tensor_parallel_size=1",
            "teacher.dtensor_cfg.context_parallel_size=1",
            "distillation.topk_logits_k=16",
            f"cluster.gpus_per_node={ranks}",
            "logger.wandb_enabled=false",
            *overrides,
        ]
    )


def fixed_rollouts(count: int = 12, vocab: int = 384, seed: int = 0) -> list[Rollout]:
    """Return rollouts of 1 to 40 random tokens; every second teacher prefix differs from the student's prompt."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())

    rollouts = []
    for i in range(count):
        prompt = Prompt(i, tokens(1, 30), Problem(f"problem {i}"))
        response = tokens(1, 40) if i else tokens(1, 1)
        prefix = tokens(5, 50) if i % 2 else prompt.student_ids
        rollouts.append(Rollout(prompt, 0, response, (-1.0,) * len(response), "length", 0, prefix))
    return rollouts


WARM_UP = 0.1
"""Factor of the learning rate in the first step: the schedule's warm-up starts there."""


@dataclass
class Step:
    """Results of one optimizer step; they must not depend on the layout."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights after the update; ``plain_update`` returns those of the reference."""


def plain_step(config: Config, rollouts: Sequence[Rollout], dtype: torch.dtype = torch.float32) -> Step:
    """Compute loss and gradients with plain PyTorch, as an independent reference.

    Supports the mixed, forward, reverse and sampled losses, without floor. If the recipe enables low-rank adapters,
    they are those of peft, with fixed values.
    """
    student = AutoModelForCausalLM.from_pretrained(config.policy.model_name, dtype=dtype, attn_implementation="eager")
    lora = config.policy.dtensor_cfg.lora_cfg
    student = with_peft(student, lora) if lora.enabled else student
    teacher = AutoModelForCausalLM.from_pretrained(config.teacher.model_name, dtype=dtype, attn_implementation="eager")
    temperature, k = (config.policy.generation.temperature, config.distillation.topk_logits_k)
    weight = {"forward": 1.0, "mixed": config.loss_fn.mixed_kl_weight}.get(config.loss_fn.kl_type, 0.0)
    tokens = sum(len(r.response_ids) for r in rollouts)
    total = torch.zeros((), dtype=dtype)
    for rollout in rollouts:
        ours = response_logits(student, rollout.prompt.student_ids, rollout.response_ids) / temperature
        with torch.no_grad():
            theirs = response_logits(teacher, rollout.teacher_prefix_ids, rollout.response_ids) / temperature
        if config.loss_fn.kl_type == "sampled":
            chosen = torch.tensor(rollout.response_ids)[:, None]
            q, p = (logits.log_softmax(-1).gather(-1, chosen)[:, 0] for logits in (ours, theirs))
            ratio = (q.detach() - torch.tensor(rollout.logprobs)).exp().clamp(max=config.loss_fn.importance_ratio_cap)
            cost = ratio * (q.detach() - p)
            total = total + (cost + cost * (q - q.detach())).sum() / tokens
            continue
        choosing = ours.detach() if config.loss_fn.support == "student" else theirs
        p, q = (outcomes(logits, choosing, k, config.loss_fn.outside) for logits in (theirs, ours))
        forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
        total = total + (weight * forward + (1 - weight) * reverse).sum() / tokens
    total.backward()
    trained = peft_parameters(student) if lora.enabled else dict(student.named_parameters())
    gradients = {name: cast(Tensor, p.grad).clone() for name, p in trained.items()}
    return Step(total.item(), _norm(gradients), gradients)


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()


def plain_update(config: Config, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's weights after one step of PyTorch's AdamW with ``gradients``."""
    student = AutoModelForCausalLM.from_pretrained(config.policy.model_name, dtype=torch.float32)
    named = dict(student.named_parameters())
    for name, parameter in named.items():
        parameter.grad = gradients[name].clone()
    norm = torch.tensor(_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(named.values(), config.policy.max_grad_norm or math.inf, norm)
    kwargs = config.policy.optimizer.kwargs
    lr = kwargs.lr * WARM_UP
    torch.optim.AdamW(named.values(), lr, kwargs.betas, kwargs.eps, kwargs.weight_decay).step()
    return {name: p.detach().clone() for name, p in named.items()}


def response_logits(model: torch.nn.Module, prefix: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([prefix + response])
    return model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 : -1]


def outcomes(logits: Tensor, choosing: Tensor, k: int, outside: str) -> Tensor:
    """Return the log-probs of the ids in the top-k of ``choosing``, or of all ids if k is 0.

    ``outside``: "bucket" adds one outcome with the total probability of all other ids, "renormalize" drops these ids.
    """
    if k == 0:
        return logits.log_softmax(-1)
    best = choosing.topk(k + 1, -1)
    gap = float((best.values[:, k - 1] - best.values[:, k]).min())
    assert gap > 2e-5, f"top-{k} is ambiguous in float32 (gap {gap:.1g}): choose another seed for the test"
    ids = best.indices[:, :k]
    logprobs = logits.log_softmax(-1)
    kept = logprobs.gather(-1, ids)
    if outside == "renormalize":
        return kept.log_softmax(-1)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1)


def sharded_step(config: Config, world: World, rollouts: Sequence[Rollout], packing: PackingConfig) -> Step:
    """Take the product's step on this rank; return complete gradients and weights. Collective.

    Low-rank adapters have the same fixed values as in ``plain_step``.
    """
    models = [find_model(model.model_name, "a model") for model in (config.policy, config.teacher)]
    vocab = model_config(models[0], "a model").vocab_size
    student = Student(config, models[0], world, vocab, ())
    if config.policy.dtensor_cfg.lora_cfg.enabled:
        fill(student.model.named_trained())
    teacher = build_teacher(_with_larger_packs(config), models[1], world, vocab, student)
    (batch,) = student.to_device(plan(rollouts, world.layout, packing, seed=0, step=0))
    targets = list(teacher.targets_of(batch.micro_batches))
    teacher.offload()
    backward = student.backward(batch, targets, Metrics())
    loss = sum(float(each) for each in backward.losses) / batch.divisor * backward.factor
    gradients = {name: gradient * backward.factor for name, gradient in complete_gradients(student, world).items()}
    for _, parameter in student.model.named_trained():  # needed by torch's fused AdamW on CUDA
        assert local_shard(cast(Tensor, parameter.grad)).stride() == local_shard(parameter).stride()
    norm = student.step(factor=backward.factor)
    weights = {name: tensor.clone() for name, tensor in student.weights(torch.float32)}
    layout = world.layout
    counted = loss if layout.tp_rank == 0 else 0.0  # all ranks of a tensor-parallel group have the same loss
    return Step(sum(world.gather(counted)), norm, gradients, weights)


def _with_larger_packs(config: Config, tokens: int = 400) -> Config:
    """Return ``config`` with a teacher that reads several micro-batches at once."""
    batching = replace(config.teacher.dynamic_batching, enabled=True, logprob_mb_tokens=tokens)
    return replace(config, teacher=replace(config.teacher, dynamic_batching=batching))


def complete_gradients(student: Student, world: World) -> dict[str, Tensor]:
    """Return every trained parameter's complete gradient by name. Collective."""
    sharded = [(name, cast(Tensor, p.grad)) for name, p in student.model.named_trained()]
    gathered = GatheredWeights(sharded, torch.float32, 2**30, world.replica_mesh, world.layout.tp_size)
    return {name: tensor.clone() for name, tensor in gathered}


def copies_that_differ(
    config: Config, world: World, rollouts: Sequence[Rollout], packing: PackingConfig, count: int
) -> list[str]:
    """Train ``count`` steps; return what differs between ranks that must have equal copies. Collective.

    The result contains names of parameters, ``grad_norm`` if the gradient norms are not the same bits on all ranks, and
    names of parameters that are not trained and have changed.
    """
    models = [find_model(model.model_name, "a model") for model in (config.policy, config.teacher)]
    vocab = model_config(models[0], "a model").vocab_size
    student = Student(config, models[0], world, vocab, ())
    teacher = ShardedTeacher(config, models[1], world, vocab)
    trained = {name for name, _ in student.model.named_trained()}
    before = _frozen(student, trained)
    norms = []
    for step in range(count):
        for batch in plan(rollouts, world.layout, packing, seed=0, step=step):
            metrics = _Norms()
            student.train(batch, [teacher.targets(micro_batch) for micro_batch in batch], metrics)
            norms.append(metrics.grad_norm)
        student.end_step()
    different = [] if len({tuple(each) for each in world.gather(norms)}) == 1 else ["grad_norm"]
    different += sorted({name for changed in world.gather(_changed(student, before)) for name in changed})
    copies: dict[tuple[str, int, int], set[bytes]] = {}
    for named in world.gather(list(_digests(student, world))):
        for part, digest in named:
            copies.setdefault(part, set()).add(digest)
    return different + sorted({name for (name, _, _), digests in copies.items() if len(digests) > 1})


def _frozen(student: Student, trained: set[str]) -> dict[str, Tensor]:
    """Return copies of this rank's shards of the parameters that are not trained."""
    named = student.model.causal_lm.named_parameters()
    return {name: local_shard(p).detach().clone() for name, p in named if name not in trained}


def _changed(student: Student, before: Mapping[str, Tensor]) -> list[str]:
    named = dict(student.model.causal_lm.named_parameters())
    return [name for name, shard in before.items() if not torch.equal(local_shard(named[name]), shard)]


class _Norms(Metrics):
    """Metrics that keep the gradient norm of the last optimizer step on this rank."""

    grad_norm: float

    def add(self, stats: Stats) -> None:
        """Keep the gradient norm, and add the statistics."""
        if "grad_norm" in stats:
            self.grad_norm = float(stats["grad_norm"][0])
        super().add(stats)


def _digests(student: Student, world: World) -> Iterator[tuple[tuple[str, int, int], bytes]]:
    """Yield the key (name, FSDP shard, tensor-parallel part) and a digest of each shard on this rank."""
    shard, tp_rank = divmod(world.replica_mesh.get_local_rank(), world.layout.tp_size)
    for name, parameter in student.model.causal_lm.named_parameters():
        part = 0 if tp_dim(parameter) is None else tp_rank
        local = local_shard(parameter)
        yield (
            (name, shard, part),
            hashlib.sha256(local.detach().flatten().view(torch.uint8).numpy().tobytes()).digest(),
        )


class CompleteWeights:
    """Complete tensors of one process with their bit sums; same interface as ``GatheredWeights``."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = list(weights)
        self.sums = bit_sums_by_name(self._weights)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._weights)

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield each tensor with its name and its bit sums."""
        for name, tensor in self._weights:
            yield name, tensor, self.sums[name]


def differences(ours: Step, reference: Step) -> dict[str, float]:
    """Return the relative differences of loss, gradient norm and each gradient (2-norms in float64)."""
    assert ours.gradients.keys() == reference.gradients.keys()
    found = {
        f"gradient of {name}": float((ours.gradients[name].double() - g.double()).norm() / g.double().norm())
        for name, g in reference.gradients.items()
    }
    found["loss"] = abs(ours.loss - reference.loss) / abs(reference.loss)
    found["grad_norm"] = abs(ours.grad_norm - reference.grad_norm) / reference.grad_norm
    return found


def sync_error(student: Student) -> str:
    """Return the error of a sync of the student's weights, or "" without an error; collective."""
    try:
        for _ in student.weights():
            pass
    except RuntimeError as error:
        return str(error)
    return ""
