"""The model that learns: sharded, in micro-batches without padding, one optimizer step an optimizer batch."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.batching.plan import view_of
from distill.config import Config
from distill.distributed.world import World
from distill.loss import Sampled, VocabParallel, fused_linear_kl
from distill.metrics.step import Metrics
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, chunk_of
from distill.model.host_offload import OptimizerOffload
from distill.model.nonfinite import Broken, NonFinite, not_finite
from distill.model.sharded import ShardedLM, Sharding, load_sharded
from distill.model.weights import GatheredWeights, tp_dim
from distill.supervise.progress import heartbeat
from distill.types import LossOutput, MicroBatch, OptimizerBatch, Stats, Targets

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MIB = 2**20


class Student:
    """A Hugging Face causal language model under FSDP2: float32 master shards, ``policy.precision`` for the compute.

    Every rank makes it and calls its methods at the same points. ``valid_vocab`` is the number of ids the tokenizer
    knows: columns past it are padding and get no mass. ``stop_token_ids`` are for the metrics only.
    """

    def __init__(
        self, config: Config, files: ModelFiles, world: World, valid_vocab: int, stop_token_ids: Sequence[int]
    ) -> None:
        policy = config.policy
        self.dtype = DTYPES[policy.precision]
        self.device = world.device
        self._mesh, self._tp = world.replica_mesh, world.layout.tp_size
        self._replicas = world.size // self._mesh.size()
        self._tp_group = world.tp_mesh.get_group()
        self._counts = world.layout.tp_rank == 0  # whether this rank's statistics are its group's
        self._temperature = config.policy.generation.temperature
        self._loss_config = loss_at_temperature(config)
        self._loss_options: dict[str, Any] = dict(
            chunk_rows=policy.logprob_chunk_size or config.runtime.logits_chunk_rows,
            valid_vocab=valid_vocab,
            stop_token_ids=tuple(stop_token_ids),
            topk_logits_k=config.distillation.topk_logits_k,
        )
        self._bucket_bytes = config.runtime.sync_bucket_mib * _MIB
        self._max_grad_norm = policy.max_grad_norm
        self._valid_vocab = valid_vocab
        self._as_synced = False  # whether the weights are still those that were last sent out
        sharding = Sharding(
            world.shard_mesh,
            world.cp_group,
            world.tp_mesh if self._tp > 1 else None,
            policy.dtensor_cfg.custom_parallel_plan,
            reshard_after_forward=policy.dtensor_cfg.reshard_after_forward,
            activation_checkpointing=policy.dtensor_cfg.activation_checkpointing,
            cpu_offload=policy.dtensor_cfg.cpu_offload,
        )
        self.model = load_sharded(
            files,
            "policy.model_name",
            world,
            sharding,
            dtype=torch.float32,
            compute_dtype=self.dtype,
            trainable=True,
        )
        self._parallel = _vocab_parallel(self.model, world) if self._tp > 1 else None
        kwargs = dataclasses.asdict(policy.optimizer.kwargs)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), **kwargs)
        self._scheduler = build_scheduler(self._optimizer, policy.scheduler)
        leaves = config.runtime.offload_optimizer and world.device.type == "cuda" and not policy.dtensor_cfg.cpu_offload
        self._moments = OptimizerOffload(self._optimizer) if leaves else None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def loss(self, micro_batch: MicroBatch, targets: Targets) -> LossOutput:
        """The summed loss of one micro-batch, computed inside the root's forward; collective over the shard mesh."""
        return self._loss(micro_batch, targets)

    @torch.no_grad()
    def row_kls(self, micro_batch: MicroBatch, targets: Targets) -> dict[str, Tensor]:
        """``forward_kl`` and ``reverse_kl`` of each row of weight other than 0, in order, in nats, without gradient.

        Collective over the shard mesh. For validation: nothing is left of it.
        """
        found: dict[str, Tensor] = {}
        self._loss(micro_batch, targets, found)
        self.model.reshard_all()
        return found

    def _loss(self, micro_batch: MicroBatch, targets: Targets, row_kls: dict[str, Tensor] | None = None) -> LossOutput:
        heartbeat()
        micro_batch = micro_batch.to(self.device)
        sampled = Sampled(micro_batch.sampled_N, micro_batch.sampled_logprobs_N, self._temperature)

        def use(hidden_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, Stats]:
            output = fused_linear_kl(
                hidden_ND,
                head_VD,
                targets,
                self._loss_config,
                micro_batch.weight_N,
                sampled,
                parallel=self._parallel,
                row_kls=row_kls,
                **self._loss_options,
            )
            return output.kl_sum, output.stats

        return LossOutput(*self.model(micro_batch.student, use))

    def train(self, batch: OptimizerBatch, targets: Sequence[Targets], metrics: Metrics) -> None:
        """One optimizer step on the micro-batches of this rank; adds their statistics and the gradient norm.

        Raises NonFinite, on all ranks alike, where a loss or gradient isn't finite; the weights are untouched then.
        """
        losses = []
        for micro_batch, said in zip(batch, targets, strict=True):
            output = self.loss(micro_batch, said)
            (output.kl_sum / batch.response_tokens).backward()  # type: ignore[no-untyped-call]
            losses.append(output.kl_sum.detach())
            if self._counts:
                _add_stats(metrics, output.stats, sampler=self._as_synced)
        self.sum_gradients()
        metrics.add({"grad_norm": (self.step(losses), 1)})

    def step(self, losses: Sequence[Tensor] = ()) -> float:
        """Clip, update, clear; the gradient's norm before clipping. Raises NonFinite where it, or a loss, isn't."""
        norm = self.grad_norm(losses)
        if not math.isfinite(norm):
            raise self._non_finite(norm, losses)
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._max_grad_norm / norm)
        self._have_moments()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._as_synced = False
        return norm

    def _non_finite(self, norm: float, losses: Sequence[Tensor]) -> NonFinite:
        named = self.model.named_hf_parameters()
        gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        found = Broken(norm, [float(loss) for loss in losses], not_finite(gradients), not_finite(dict(named)))
        return NonFinite(found)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Bring the gradients of weights that every rank of a tensor-parallel group has whole to one value; collective,
        once after the last backward.

        Weights that act on a rank's own heads (Qwen3's q_norm and k_norm) have the gradients of those heads, and the
        sum is right: left out, the loss is right and these gradients are half wrong. All others have the same on every
        rank but for the order in which a GPU adds up, and take the mean: else copies would drift apart.
        """
        if self._tp == 1:
            return
        named = [(name, p.grad) for name, p in self.model.named_hf_parameters() if tp_dim(p) is None]
        parts = [grad.to_local() for _, grad in named]  # type: ignore[union-attr]
        share = 1 / self._tp
        scaled = [
            part.flatten() * (1.0 if name in self.model.summed else share)
            for (name, _), part in zip(named, parts, strict=True)
        ]
        flat = torch.cat(scaled).to(self.device)
        dist.all_reduce(flat, group=self._tp_group)
        for part, total in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))

    @torch.no_grad()
    def grad_norm(self, losses: Sequence[Tensor] = ()) -> float:
        """The 2-norm of all gradients, accumulated in float64; collective over all ranks.

        torch's own float32 norm of a 49152 x 576 tensor errs by 1.6e-3. Over all replicas, though each could tell it
        alone: sums in groups of their own might differ in a last bit, and so would what is clipped by them. Not finite
        also where one of ``losses`` isn't, on any rank: so nobody waits for a loss by itself.
        """
        squares = self._doubt(losses)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                local = parameter.grad.to_local()  # type: ignore[attr-defined]
                square = torch.linalg.vector_norm(local, dtype=torch.float64).square().to(self.device)
                # what is whole on every rank of a tensor-parallel group counts once
                squares += square if self._counts or tp_dim(parameter) is not None else 0.0
        dist.all_reduce(squares)
        return float((squares / self._replicas).sqrt())

    def _doubt(self, losses: Sequence[Tensor]) -> Tensor:
        """Zero, or nan where a loss isn't finite."""
        doubt = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            doubt += torch.stack(list(losses)).double().sum() * 0.0
        return doubt

    def end_step(self) -> None:
        """Move the learning rate's schedule: once a step, however many optimizer batches it had."""
        self._scheduler.step()

    def onload(self) -> None:
        """Begin to bring the optimizer's moments back to the device; no collective."""
        if self._moments is not None:
            self._moments.restore()

    def offload(self) -> None:
        """Let the optimizer's moments go to host memory; no collective. Whatever needs them brings them back."""
        if self._moments is not None:
            self._moments.release()

    def _have_moments(self) -> None:
        if self._moments is not None:
            self._moments.restore()
            self._moments.wait()

    def weights(self, dtype: torch.dtype | None = None) -> GatheredWeights:
        """Whole tensors under their Hugging Face names, bucket by bucket, in the compute dtype; all ranks drain it."""
        self._as_synced = True
        parameters = self.model.named_hf_parameters()
        return GatheredWeights(parameters, dtype or self.dtype, self._bucket_bytes, self._mesh, self._tp)

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs in nats of every token after the first, given those before it, at temperature 1.

        For the proof of a sync: one short sequence, the same on every rank of the shard mesh.
        """
        view = view_of([(tuple(token_ids[:1]), tuple(token_ids[1:]))]).to(self.device)
        tokens_N = torch.tensor(token_ids[1:], device=self.device)
        first = 0 if self._parallel is None else self._parallel.first

        def use(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
            logits_NV = torch.nn.functional.linear(hidden_ND, head_VD).float()
            logits_NV[:, max(0, self._valid_vocab - first) :] = -torch.inf
            top_N = self._over_ranks(logits_NV.amax(1), dist.ReduceOp.MAX)
            own_N = tokens_N - first
            absent_N = (own_N < 0) | (own_N >= logits_NV.shape[1])
            picked_N = logits_NV.gather(1, own_N.masked_fill(absent_N, 0)[:, None])[:, 0].masked_fill(absent_N, 0.0)
            sums_2N = torch.stack([picked_N, (logits_NV - top_N[:, None]).exp().sum(1)])
            picked_N, sum_N = self._over_ranks(sums_2N, dist.ReduceOp.SUM).unbind()
            return picked_N - (top_N + sum_N.log())

        found: list[float] = self.model(view, use).tolist()
        self.model.reshard_all()
        return found

    def _over_ranks(self, part: Tensor, op: Any) -> Tensor:
        if self._parallel is not None:
            dist.all_reduce(part, op=op, group=self._parallel.group)
        return part

    def state(self, optimizer: bool = True) -> dict[str, Tensor]:
        """Weights and optimizer moments by name, sharded, for a checkpoint; moments not made yet count as zeros.

        To be read or filled before the next ``offload``, which takes the moments away. ``optimizer`` false: the weights
        alone.
        """
        if not optimizer:
            return {f"model.{name}": parameter.detach() for name, parameter in self.model.named_hf_parameters()}
        self._have_moments()
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_hf_parameters():
            moments = self._optimizer.state[parameter]
            if not moments:
                # torch keeps it on the host, but for its fused kernel
                device = parameter.device if self._optimizer.defaults["fused"] else "cpu"
                moments["step"] = torch.zeros((), dtype=torch.float32, device=device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            state[f"model.{name}"] = parameter.detach()
            state.update({f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()})
        return state

    def resume(self, step: int) -> None:
        """Bring the schedule to where ``step`` finished steps left it; the tensors of ``state`` are loaded in place."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a schedule that moves before the optimizer
            for _ in range(step):
                self._scheduler.step()


def _add_stats(metrics: Metrics, stats: Stats, sampler: bool) -> None:
    """Add a micro-batch's statistics; those that compare with the sampler only where it has these very weights."""
    stats = {name: pair for name, pair in stats.items() if sampler or not name.startswith("sampler_")}
    metrics.add({name: pair for name, pair in stats.items() if not name.endswith("_max")})
    metrics.add_max({name: pair[0] for name, pair in stats.items() if name.endswith("_max")})


def _vocab_parallel(model: ShardedLM, world: World) -> VocabParallel:
    """The head's rows of this rank, as the loss wants to know them."""
    _, head = causal_lm_parts(model.causal_lm)
    mesh, vocab = world.tp_mesh, head.weight.shape[0]
    first, _ = chunk_of(vocab, mesh.size(), mesh.get_local_rank())
    return VocabParallel(mesh.get_group(), first, vocab)


def loss_at_temperature(config: Config) -> Any:
    """The loss's configuration with its temperature filled in: null is the sampling temperature, for both models."""
    temperature = config.loss_fn.temperature
    if temperature is None:
        temperature = config.policy.generation.temperature
    return dataclasses.replace(config.loss_fn, temperature=temperature)


def build_scheduler(optimizer: torch.optim.Optimizer, pieces: Sequence[Any]) -> torch.optim.lr_scheduler.LRScheduler:
    """torch's own schedulers by name, one after another at the milestones, as the reference's recipes spell them."""
    if not pieces:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    named = [piece for piece in pieces if piece.name]
    milestones = [m for piece in pieces if not piece.name for m in piece.milestones]
    built = [
        getattr(torch.optim.lr_scheduler, piece.name.rpartition(".")[2])(optimizer, **piece.kwargs) for piece in named
    ]
    return built[0] if len(built) == 1 else torch.optim.lr_scheduler.SequentialLR(optimizer, built, milestones)
