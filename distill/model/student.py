"""Student: a sharded model with its optimizer, trained on packed micro-batches."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.batching.plan import view_of
from distill.batching.transfer import to_device
from distill.config import Config, TokenWeightsConfig
from distill.distributed.world import World
from distill.loss import VocabParallel, checks
from distill.metrics.step import Metrics
from distill.metrics.token_metrics import TokenMetrics, add_stats
from distill.model.base_checksum import frozen_base
from distill.model.dtensor import local_shard, tp_dim
from distill.model.fused_layers import uses_fused_layers
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, chunk_of
from distill.model.host_offload import OptimizerOffload
from distill.model.learning_rate import build_scheduler
from distill.model.lora import AdapterSettings
from distill.model.micro_batch_loss import MicroBatchLoss, RowComparison
from distill.model.nonfinite import NonFiniteError, NonFiniteReport, not_finite
from distill.model.optimizer import ShardedAdamW, sum_of_squares
from distill.model.sharded import ShardedLM, Sharding, load_sharded
from distill.model.student_weights import StudentWeights
from distill.model.weights import GatheredWeights
from distill.supervise.progress import heartbeat
from distill.types import LossOutput, MicroBatch, OptimizerBatch, Targets

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Backward:
    """Result of all forwards and backwards of an optimizer batch on this rank."""

    losses: list[Tensor]
    """Loss of each micro-batch, summed over its rows."""
    factor: float = 1.0
    """Factor by which ``Student.step`` multiplies the gradients; 0 if no token of the batch has a weight.

    It differs from 1 if the divisor of the loss depends on outputs of the models. It is equal on all ranks.
    """


class Student:
    """The trained model: a Hugging Face causal language model sharded by FSDP2, with its optimizer.

    Master weights are float32 shards; forward and backward run in ``policy.precision``. With low-rank adapters
    (``policy.dtensor_cfg.lora_cfg``) only these are float32 and trained, and the frozen weights are shards in
    ``policy.precision``. All ranks must construct the student and call its collective methods in the same order.
    ``valid_vocab``: number of token ids in the tokenizer. Larger ids are padding of the model's vocabulary and get
    probability 0. ``stop_token_ids``: ids of the tokens that end a response, for metrics only.
    """

    def __init__(
        self, config: Config, files: ModelFiles, world: World, valid_vocab: int, stop_token_ids: Sequence[int]
    ) -> None:
        policy = config.policy
        self.dtype = DTYPES[policy.precision]
        self.rounds_logits = config.loss_fn.logits_dtype == "bfloat16"
        """Whether the loss rounds the logits, and so changes the log-probs in its metrics by about 0.02 nats."""
        self.device = world.device
        self._all_or_none = world.all_or_none
        self._tp = world.layout.tp_size
        self._replicas = world.size // world.replica_mesh.size()
        self._tp_group = world.tp_mesh.get_group()
        # All ranks of a tensor-parallel group compute the same statistics, so only the first rank reports them.
        self._is_first_tp_rank = world.layout.tp_rank == 0
        self._token_weights = config.loss_fn.token_weights
        self._max_grad_norm = policy.max_grad_norm
        self._valid_vocab = valid_vocab
        self._synced = False  # whether the generation engine has the current weights
        sharding = Sharding(
            world.shard_mesh,
            world.cp_group,
            world.tp_mesh if self._tp > 1 else None,
            policy.dtensor_cfg.custom_parallel_plan,
            reshard_after_forward=policy.dtensor_cfg.reshard_after_forward,
            recomputation=policy.dtensor_cfg.recomputation,
            fused_layers=uses_fused_layers(config.runtime.fused_layers, world.device),
            cpu_offload=policy.dtensor_cfg.cpu_offload,
        )
        lora = policy.dtensor_cfg.lora_cfg
        self.model = load_sharded(
            files,
            "policy.model_name",
            world,
            sharding,
            dtype=self.dtype if lora.enabled else torch.float32,
            compute_dtype=self.dtype,
            trainable=True,
            adapters=AdapterSettings(lora, config.distillation.seed) if lora.enabled else None,
        )
        if lora.enabled:
            trained = sum(parameter.numel() for _, parameter in self.model.named_trained())
            layers = len(self.model.adapters)
            log.info("training adapters of rank %d in %d layers, %.1f M parameters", lora.dim, layers, trained / 1e6)
        self.base = frozen_base(self.model, files, world) if lora.enabled else None
        """Name, dtype and checksums of the frozen weights, to be stored in checkpoints; None without adapters."""
        self._weights = StudentWeights(config, world, self.model)
        self.parallel = _vocab_parallel(self.model, world) if self._tp > 1 else None
        """Split of the LM head over the tensor-parallel group; None without tensor parallelism."""
        self._loss = MicroBatchLoss(config, world, self.parallel, valid_vocab, stop_token_ids)
        self._optimizer = ShardedAdamW(
            [p for _, p in self.model.named_trained()], policy.optimizer.kwargs, world.device
        )
        self._scheduler = build_scheduler(self._optimizer, policy.scheduler)
        cuda, cpu_offload = world.device.type == "cuda", policy.dtensor_cfg.cpu_offload
        offloads = config.runtime.offload_optimizer and cuda and not cpu_offload
        self._moments = OptimizerOffload(self._optimizer) if offloads else None

    @property
    def head_rows(self) -> slice:
        """Return the rows of the complete LM head (token ids) from which this rank computes logits."""
        parallel = self.parallel
        return slice(None) if parallel is None else slice(parallel.first, parallel.first + parallel.per_rank)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the next optimizer step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def trained_share(self) -> float:
        """Return the fraction of the elements of all weights in tensors that training changes: 1 without adapters."""
        return self._weights.trained_share

    def to_device(self, batches: Sequence[OptimizerBatch]) -> list[OptimizerBatch]:
        """Copy the micro-batches of both models to the device in one transfer; collective.

        Raises UserError on all ranks if a response contains a token id outside the vocabulary. On a GPU, ids are not
        checked later.
        """
        with self._all_or_none("checking token ids"):
            for batch in batches:
                for micro_batch in batch:
                    checks.check_ids(self._valid_vocab, sampled_ids_N=micro_batch.sampled_N)
        return to_device(batches, self.device)

    @torch.no_grad()
    def compare(
        self, micro_batch: MicroBatch, targets: Targets, select: Callable[[Tensor], Tensor], overlap: bool = False
    ) -> RowComparison:
        """Compare student and teacher at the response tokens of a micro-batch; collective.

        N is the number of tokens with a position weight; other tokens are omitted. ``targets``: the teacher's
        outputs for ``micro_batch``. ``select``: a function that receives the larger of both KLs at each token, float32
        [N] in host memory and equal on the ranks of a tensor-parallel group. It returns the rows (int64 [M], response
        tokens of the micro-batch) at which the most likely tokens are computed. ``overlap``: whether to compute the
        overlap of both models' top-k, which needs a top-k of all tokens. No gradients are computed, and the
        gathered weights are freed afterwards: a forward of the training needs at least as much device memory.
        """
        heartbeat()
        micro_batch = micro_batch.to(self.device)

        def use(hidden_ND: Tensor, head_VD: Tensor) -> RowComparison:
            return self._loss.compare(hidden_ND, head_VD, micro_batch, targets, select, overlap)

        found: RowComparison = self.model(micro_batch.student, use)
        self.model.reshard_all()
        return found

    def loss(self, micro_batch: MicroBatch, targets: Targets) -> LossOutput:
        """Return the loss of one micro-batch, summed over its response tokens; collective.

        ``targets``: the teacher's outputs for ``micro_batch``. The loss is computed inside the root module's forward,
        because FSDP gathers the weights of the LM head only there.
        """
        heartbeat()
        micro_batch = micro_batch.to(self.device)

        def use(hidden_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, LossOutput]:
            output = self._loss.train(hidden_ND, head_VD, micro_batch, targets)
            return output.kl_sum, output  # FSDP adds a hook to the tensors of a tuple

        output: LossOutput
        kl_sum, output = self.model(micro_batch.student, use)
        return replace(output, kl_sum=kl_sum)

    def train(self, batch: OptimizerBatch, targets: Sequence[Targets], metrics: Metrics) -> None:
        """Take one optimizer step on this rank's micro-batches; collective.

        ``targets``: the teacher's outputs for each micro-batch. Adds the loss statistics and the gradient norm
        (``grad_norm``) to ``metrics``. If a loss or gradient is not finite on any rank, all ranks raise NonFiniteError
        and the weights stay unchanged. If no token of the optimizer batch has a weight, no rank takes a step.
        """
        backward = self.backward(batch, targets, metrics)
        skipped = backward.factor == 0
        if self._token_weights != TokenWeightsConfig():
            metrics.add_totals({"skipped_optimizer_steps": float(skipped and dist.get_rank() == 0)})
        if skipped:
            log.warning(
                "an optimizer step was skipped, because no token of its responses has a weight: change"
                " loss_fn.token_weights (skip_first, min_teacher_prob), or generate longer responses"
            )
            self._optimizer.zero_grad()
            return
        try:
            norm = self.step(backward.losses, backward.factor)
        except NonFiniteError as error:
            error.batch = batch
            raise
        metrics.add({"grad_norm": (norm, 1)})

    def backward(self, batch: OptimizerBatch, targets: Sequence[Targets], metrics: Metrics) -> Backward:
        """Add the gradients of this rank's micro-batches, divided by ``batch.divisor``; collective.

        ``targets``, ``metrics``: as in ``train``. Multiplied by the factor of the result, they are the gradients of the
        loss of the optimizer batch.
        """
        losses, tokens = [], TokenMetrics(weighted=self._token_weights != TokenWeightsConfig())
        for micro_batch, its_targets in zip(batch, targets, strict=True):
            output = self.loss(micro_batch, its_targets)
            # A divisor of all ranks makes the gradient independent of the split into micro-batches.
            (output.kl_sum / batch.divisor).backward()  # type: ignore[no-untyped-call]
            losses.append(output.kl_sum.detach())
            heartbeat(done=1)
            if self._is_first_tp_rank:
                add_stats(metrics, output.stats, sampler=self._synced)
                tokens.add(output)
        tokens.record(metrics)
        if not len(batch):
            return Backward([], factor=0.0)
        self.sum_gradients()
        return Backward(losses, self._gradient_factor(batch, tokens.weight))

    def _gradient_factor(self, batch: OptimizerBatch, weight: Tensor | float) -> float:
        """Return ``Backward.factor``; collective if the weights depend on outputs of the models.

        ``weight``: sum of the final weights of this rank's rows; 0 except on the first rank of a tensor-parallel group.
        """
        weights = self._token_weights
        if not weights.depends_on_models:
            return 1.0
        total = torch.as_tensor(weight, dtype=torch.float64, device=self.device).reshape(1).clone()
        summed = float(self._sum_on_first_rank(total))
        # With normalize: sequences, the sum of the weights of a response is 1.
        if summed == 0:  # false for nan, which must reach the gradient norm
            return 0.0
        return 1.0 if weights.normalize == "tokens" else batch.divisor / summed

    def step(self, losses: Sequence[Tensor] = (), factor: float = 1.0) -> float:
        """Clip the gradients, update the weights and clear the gradients; collective.

        Returns the gradient norm before clipping. ``losses``: losses of this rank's micro-batches. ``factor``: the
        gradients are multiplied by it before they are clipped. Raises NonFiniteError if the gradient norm or one of the
        losses on any rank is not finite.
        """
        self.onload()  # not earlier: the moments would be in memory during the forwards and backwards
        norm = self.grad_norm(losses) * factor
        if not math.isfinite(norm):
            raise self._non_finite_error(norm, losses)
        if self._max_grad_norm is not None and norm > self._max_grad_norm:
            factor *= self._max_grad_norm / norm
        if factor != 1:
            self._optimizer.multiply_gradients(factor)
        self._wait_for_moments()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._synced = False
        return norm

    def _non_finite_error(self, norm: float, losses: Sequence[Tensor]) -> NonFiniteError:
        named = dict(self.model.named_trained())
        gradients = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
        found = NonFiniteReport(norm, [float(loss) for loss in losses], not_finite(gradients), not_finite(named))
        return NonFiniteError(found)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """All-reduce the gradients of replicated weights over the tensor-parallel group; collective.

        Call it once per optimizer step, after the last backward. Weights that every rank applies to its own attention
        heads only (Qwen3's q_norm and k_norm), and the replicated matrix of an adapter whose layer is split, have a
        partial gradient on each rank; these gradients are summed. The other replicated weights have the same gradient
        on every rank, except for rounding; these gradients are averaged, so that the copies of a weight stay equal on
        all ranks.
        """
        if self._tp == 1:
            return
        named = [(name, p.grad) for name, p in self.model.named_trained() if tp_dim(p) is None]
        parts = {name: local_shard(grad) for name, grad in named if grad is not None}
        average = 1 / self._tp
        scaled = [
            part.flatten() * (1.0 if name in self.model.summed_gradients else average) for name, part in parts.items()
        ]
        flat = torch.cat(scaled).to(self.device)
        dist.all_reduce(flat, group=self._tp_group)
        sizes = [part.numel() for part in parts.values()]
        for part, total in zip(parts.values(), torch.split(flat, sizes), strict=True):
            part.copy_(total.view_as(part))

    @torch.no_grad()
    def grad_norm(self, losses: Sequence[Tensor] = ()) -> float:
        """Return the 2-norm of the gradients of all parameters; collective over all ranks.

        The result is nan if one of ``losses`` on any rank is not finite. Squares are accumulated in float64, because
        float32 is too inaccurate for large weights. They are summed over all ranks, which hold R replicas of the model:
        norm = sqrt(sum / R). All ranks have exactly the same norm, and clip their gradients equally.
        """
        squares = self._nan_if_not_finite(losses)
        squares += sum_of_squares(self._optimizer.gradients(self._is_counted), self.device)
        return float((self._sum_on_first_rank(squares) / self._replicas).sqrt())

    @staticmethod
    def _sum_on_first_rank(values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all ranks, in place; collective.

        One rank computes the sum and broadcasts it: an all-reduce does not guarantee the same rounding on every rank.
        """
        dist.reduce(values, dst=0)
        dist.broadcast(values, src=0)
        return values

    def _is_counted(self, parameter: Tensor) -> bool:
        """Return whether this rank's shard counts in the norm: shards that a tp group replicates count only once."""
        return self._is_first_tp_rank or tp_dim(parameter) is not None

    def _nan_if_not_finite(self, losses: Sequence[Tensor]) -> Tensor:
        """Return 0 as a float64 scalar, or nan if one of ``losses`` is not finite."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            zero += torch.stack(list(losses)).double().sum() * 0.0
        return zero

    def end_step(self) -> None:
        """Advance the learning-rate schedule; call it once per training step, after all its optimizer steps."""
        self._scheduler.step()

    def onload(self) -> None:
        """Start to copy the optimizer's moments from host memory to the device; not collective."""
        if self._moments is not None:
            self._moments.restore()

    def offload(self) -> None:
        """Move the optimizer's moments to host memory; not collective.

        Methods that read the moments copy them back to the device first.
        """
        if self._moments is not None:
            self._moments.release()

    def _wait_for_moments(self) -> None:
        if self._moments is not None:
            self._moments.restore()
            self._moments.wait()

    def weights(self, dtype: torch.dtype | None = None) -> GatheredWeights:
        """Return an iterable of (Hugging Face name, complete weight).

        The weights are gathered in buckets, groups of weights that one all-gather sends. Low-rank adapters are merged
        into their weights. ``dtype``: dtype of the gathered weights; None: the dtype ``policy.precision``. Iteration is
        collective: every rank must iterate over the result to the end.
        """
        self._synced = True  # the caller sends these weights to the engine
        return self._weights.merged(dtype or self.dtype)

    def adapter_weights(self) -> GatheredWeights:
        """Return an iterable of (name, complete float32 tensor) of the adapters; collective as ``weights``."""
        return self._weights.adapters()

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the student's log-probs of all tokens after the first, in nats, at temperature 1; collective.

        Every rank passes the same short sequence ``token_ids``. The result is compared with the log-probs of the
        generation engine, to verify that the engine has received the current weights.
        """
        view = view_of([(tuple(token_ids[:1]), tuple(token_ids[1:]))]).to(self.device)
        tokens_N = torch.tensor(token_ids[1:], device=self.device)
        first = 0 if self.parallel is None else self.parallel.first

        def use(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
            # A log-softmax over a vocabulary that tensor parallelism may split over the ranks.
            logits_NV = torch.nn.functional.linear(hidden_ND, head_VD).float()
            logits_NV[:, max(0, self._valid_vocab - first) :] = -torch.inf
            top_N = self._all_reduce(logits_NV.amax(1), dist.ReduceOp.MAX)
            own_N = tokens_N - first
            absent_N = (own_N < 0) | (own_N >= logits_NV.shape[1])
            picked_N = logits_NV.gather(1, own_N.masked_fill(absent_N, 0)[:, None])[:, 0].masked_fill(absent_N, 0.0)
            sums_2N = torch.stack([picked_N, (logits_NV - top_N[:, None]).exp().sum(1)])
            picked_N, sum_N = self._all_reduce(sums_2N, dist.ReduceOp.SUM).unbind()
            return picked_N - (top_N + sum_N.log())

        found: list[float] = self.model(view, use).tolist()
        self.model.reshard_all()
        return found

    def _all_reduce(self, part: Tensor, op: Any) -> Tensor:
        if self.parallel is not None:
            dist.all_reduce(part, op=op, group=self.parallel.group)
        return part

    def state(self, optimizer: bool = True) -> dict[str, Tensor]:
        """Return this rank's shards of the trained parameters and their moments, to save or load a checkpoint.

        The keys are ``model.NAME`` and ``optimizer.NAME.MOMENT``, where NAME is a parameter's name. Moments that do not
        exist yet are created as zeros. Read or fill the tensors before the next ``offload``, which frees the device
        memory of the moments. If ``optimizer`` is false, only weights are returned.
        """
        if not optimizer:
            return {f"model.{name}": parameter.detach() for name, parameter in self.model.named_trained()}
        self._wait_for_moments()
        state: dict[str, Tensor] = {}
        names = {parameter: name for name, parameter in self.model.named_trained()}
        for parameter, moments in self._optimizer.moments():
            name = names[parameter]
            state[f"model.{name}"] = parameter.detach()
            state.update({f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()})
        return state

    def resume(self, step: int) -> None:
        """Advance the learning-rate schedule to the state after ``step`` training steps.

        The caller loads weights and moments separately, into the tensors that ``state`` returns.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if the schedule advances before the optimizer
            for _ in range(step):
                self._scheduler.step()


def _vocab_parallel(model: ShardedLM, world: World) -> VocabParallel:
    """Return how the LM head is split by vocabulary over the tensor-parallel group.

    The result contains the group, the first token id of this rank's part, and the vocabulary size.
    """
    _, head = causal_lm_parts(model.causal_lm)
    mesh, vocab = world.tp_mesh, head.weight.shape[0]
    first, _ = chunk_of(vocab, mesh.size(), mesh.get_local_rank())
    return VocabParallel(mesh.get_group(), first, vocab)
