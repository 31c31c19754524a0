"""Roofline estimate of the phases of a training step, from the recipe, the shapes of both models, and the rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from distill.config import Config
from distill.data.teacher_context import reads_traces
from distill.loss.token_weights import needs_score_pass
from distill.memory.forecast import card_bytes
from distill.memory.phases import StepMemory
from distill.memory.shapes import ModelShape
from distill.timing.decode import DecodeCost, decode_cost
from distill.timing.lengths import Lengths
from distill.timing.passes import (
    LOSS_BYTES,
    TOPK_BYTES,
    TORCH_LOSS_BYTES,
    TORCH_TOPK_BYTES,
    Sequences,
    flops_of_shape,
    gather_seconds,
    head_seconds,
    layer_times,
)
from distill.timing.rates import Rates
from distill.timing.schedule import Generation, Job, lockstep, partial_rollouts

OPTIMIZER_BYTES = 40
"""Bytes per parameter of a rank that an optimizer step moves: AdamW 28, gradient norm 4, clipping 8."""
ACCUMULATION_BYTES = 12
"""Bytes per parameter of a rank that adding a micro-batch's gradient to earlier ones moves: two reads and a write."""
MERGE_BYTES = 60
"""Bytes per weight of a rank that a sync moves to add the adapters in float32 and to round the sum; an assumption."""
SYNC_PASSES = 6
"""How often a sync reads or writes the weights in memory: gather, cast, copy to the engine, and two bit sums."""
SYNC_TENSOR_S, SYNC_FIXED_S = 0.3e-3, 0.4
"""Seconds of a sync per tensor, and to wake the engine; assumptions. A CPU has no engine to wake."""
TRANSFORMERS_STEP_S = 25e-3
"""Seconds of a decode step of the transformers engine that neither memory nor arithmetic explains; an assumption."""
_SIMULATED = 4096
"""Approximate number of responses in a simulation of generation, and at least 12 steps."""


@dataclass(frozen=True)
class Workload:
    """Lengths of the sequences of a step, in tokens."""

    lengths: Lengths
    """Distribution of the lengths of the student's responses."""
    prompt: float
    """Mean length of the student's prompts."""
    teacher_prompt: float
    """Mean length of the teacher's prompts."""


def reads_response(config: Config) -> bool:
    """Return whether the teacher's prompt contains a trace from the response itself."""
    loop, context = config.distillation, config.distillation.context_distillation
    is_dynamic = context.enabled and not loop.control and context.trace_source == "dynamic"
    return is_dynamic and reads_traces(context)


class StepTime:
    """Predicted seconds of each phase of a step of one recipe; all ranks have the same amount of work.

    ``config`` is a recipe in which each ``auto`` is replaced. ``cuda``: whether the run uses GPUs.
    """

    def __init__(
        self, config: Config, student: ModelShape, teacher: ModelShape, rates: Rates, workload: Workload, cuda: bool
    ) -> None:
        self.config, self.student, self.teacher, self.rates, self.workload = config, student, teacher, rates, workload
        size = config.cluster.gpu_memory_gb or rates.memory_gb
        self.memory = StepMemory(config, student, teacher, cuda, card_bytes(size) if size and cuda else None)
        self.cuda, self.ranks = cuda, config.cluster.num_nodes * config.cluster.gpus_per_node
        self.per_node = config.cluster.gpus_per_node
        loop = config.distillation
        shares = config.runtime.share_prefixes and self._packs_several
        prompts = loop.num_prompts_per_step if shares else loop.responses_per_step
        self.read = Sequences.of(workload.lengths, workload.prompt, loop.responses_per_step, prompts)
        prompts = loop.responses_per_step if reads_response(config) else prompts  # each response has its own trace
        self.taught = Sequences.of(workload.lengths, workload.teacher_prompt, loop.responses_per_step, prompts)

    @property
    def _packs_several(self) -> bool:
        policy = self.config.policy
        budgets = policy.sequence_packing.enabled or policy.dynamic_batching.enabled
        return budgets or policy.train_micro_batch_size > 1

    # ---- generation ----

    def cost(self) -> DecodeCost:
        """Return the cost of a decode step of one engine."""
        generation, shape, rates = self.config.policy.generation, self.student, self.rates
        if generation.backend == "transformers":
            rates = replace(rates, step_overhead=max(rates.step_overhead, TRANSFORMERS_STEP_S))
        read = shape.parameters - (shape.embedding if shape.head else 0)
        return decode_cost(flops_of_shape(shape), read, rates, self.memory.b, generation.ranks_per_engine)

    def job(self) -> Job:
        """Return the generation of this recipe."""
        loop, generated = self.config.distillation, self.config.distillation.generated_per_step
        return Job(
            engines=self.ranks // self.config.policy.generation.ranks_per_engine,
            responses=generated,
            lengths=self.workload.lengths,
            cost=self.cost(),
            per_prompt=max(1, generated // loop.num_prompts_per_step),
            prompt_tokens=round(self.workload.prompt),
            steps=max(12, _SIMULATED // max(generated, 1)),
        )

    def generation(self, partial: tuple[float, int] | None) -> Generation | None:
        """Return the simulated generation; None if the student generates no response.

        ``partial``: (finish_share, max_age) of partial rollouts; None: in lockstep.
        """
        job = self.job()
        if not job.responses:
            return None
        return lockstep(job) if partial is None else partial_rollouts(job, *partial)

    def cache_tokens(self) -> tuple[int, int | None]:
        """Return how many tokens an engine caches at most on average, and the capacity of its key-value cache.

        The capacity is None if it is unknown. All responses run from the start of the phase, in lockstep.
        """
        job, lengths, vllm = self.job(), self.workload.lengths.quantiles, self.config.policy.generation
        alive = 1 - np.arange(len(lengths)) / len(lengths)
        needed = int((alive * (job.prompt_tokens + lengths)).max() * job.responses / job.engines)
        if vllm.backend != "vllm" or not self.cuda or self.memory.card is None:
            return needed, None
        per_token = self.memory.window_cache() / vllm.vllm_cfg.max_model_len
        return needed, int(self.memory.engine_lines()["engine cache"] / per_token)

    # ---- the other phases ----

    def micro_batches(self) -> int:
        """Return the number of the student's micro-batches on one rank.

        A token budget counts each response with the longer of its two prompts, also if responses share the prompt.
        """
        policy, memory = self.config.policy, self.memory
        in_batch = -(-policy.train_global_batch_size // memory.dp)
        if policy.sequence_packing.enabled or policy.dynamic_batching.enabled:
            longer = max(self.workload.prompt, self.workload.teacher_prompt)
            of_batch = self._counted_tokens(longer) / memory.optimizer_batches / memory.tokens
        else:
            of_batch = in_batch / policy.train_micro_batch_size
        return memory.optimizer_batches * max(1, math.ceil(min(of_batch, in_batch)))

    def _counted_tokens(self, prompt: float) -> float:
        """Return the tokens of a step on one data-parallel rank, each response with ``prompt`` tokens of a prompt."""
        lengths = prompt + self.workload.lengths.mean
        return self.config.distillation.responses_per_step * lengths / self.memory.dp

    def teacher_seconds(self) -> float:
        """Return the seconds of the teacher's forward: arithmetic and gathers, and what cannot overlap.

        Each pack gathers all weights once. The shards are copied from host memory before, unless the teacher uses the
        student's weights. A teacher group exchanges queries, keys, values and outputs in each layer; a teacher that is
        the student's module also reduces hidden states over its tensor-parallel ranks.
        """
        memory, shape, b = self.memory, self.teacher, self.memory.teacher_b
        weights = memory.teacher_weights
        adapters = memory.teacher_adapters
        times = layer_times(shape, self.taught, self.rates, self.ranks, b, memory.fused, adapters)
        packs = self.micro_batches()
        if self.config.teacher.pack_tokens is not None:
            counted = self._counted_tokens(self.workload.teacher_prompt)
            packs = min(packs, max(1, math.ceil(counted / memory.teacher_tokens)))
        gathers = packs * self._gather(b * shape.parameters / weights.tp, weights.fsdp)
        positions = self.taught.positions * weights.tp / self.ranks
        exchanged = self._exchange(shape, positions / weights.tp, memory.group, b, passes=1)
        exchanged += self._reduce(shape, positions, weights.tp, b, passes=1)
        head = 0.0
        if not memory.returns_rows:
            head = head_seconds(shape, self.taught.rows, self.rates, self.ranks, self._topk_bytes)
        copied = memory.teacher_shards / self.rates.host if self.cuda else 0.0  # 0 for the student's weights
        return self._with_gathers(times.forward, gathers) + head + exchanged + copied

    def student_seconds(self) -> float:
        """Return the seconds of the student's forward and backward with loss, without the optimizer.

        With weights in host memory, each gather copies the float32 shards to the device first, which overlaps. The
        gradients of each micro-batch are copied to host memory and added there, and the backward waits for it.
        """
        memory, shape, config, b = self.memory, self.student, self.config, self.memory.b
        parallel = config.policy.dtensor_cfg
        adapters = memory.weights.adapters
        times = layer_times(shape, self.read, self.rates, self.ranks, b, memory.fused, adapters)
        gathers = 2 if parallel.reshard_after_forward else 1
        weights = shape.parameters / memory.tp
        trained = weights if adapters is None else adapters.shard * memory.fsdp
        exchanged = gathers * b * weights + 4 * trained  # gradients are reduced in float32
        count = self.micro_batches()
        traffic = count * (self._gather(exchanged, memory.fsdp) + gathers * self._copy_of_shards())
        passes = 3 if parallel.recomputation == "full" else 2
        positions = self.read.positions / memory.dp / memory.cp
        within = self._exchange(shape, positions / memory.tp, memory.cp, b, passes)
        within += self._reduce(shape, positions, memory.tp, b, passes)
        wide = 1 + needs_score_pass(config.loss_fn, config.distillation.topk_logits_k)
        narrow = 2 if adapters is None else 1  # a frozen head has no gradient
        moved = LOSS_BYTES if memory.triton else TORCH_LOSS_BYTES
        head = head_seconds(shape, self.read.rows, self.rates, self.ranks, moved, wide, narrow)
        if memory.returns_rows:
            head += head_seconds(self.teacher, self.taught.rows, self.rates, self.ranks, self._topk_bytes)
        layers = self._with_gathers(times.training(parallel.recomputation), traffic)
        return layers + head + within + self._gradients_to_host(count)

    def optimizer_seconds(self) -> float:
        """Return the seconds of the optimizer steps, and of moving the moments from and to host memory.

        With weights in host memory, AdamW runs there, and nothing is moved: gathers and backward copy weights and
        gradients.
        """
        memory, rates = self.memory, self.rates
        moved = OPTIMIZER_BYTES * memory.weights.trained * memory.optimizer_batches
        if memory.on_host:
            return moved / rates.host_memory
        offloaded = 16 * memory.weights.trained / rates.host if memory.offloads else 0.0
        return moved / rates.elementwise + offloaded

    def sync_seconds(self) -> float:
        """Return the seconds to gather the student's weights on all ranks and to copy them to the engines.

        Adapters are first added to the weights' shards.
        """
        shape, size = self.student, self.memory.b * self.student.parameters
        merged = 0 if self.memory.weights.adapters is None else MERGE_BYTES * self.memory.weights.shard
        tensors = shape.layers * len(shape.layer_tensors) + 3
        fixed = tensors * SYNC_TENSOR_S + (SYNC_FIXED_S if self.cuda else 0.0)
        copied = (SYNC_PASSES * size + merged) / self.rates.memory
        return self._copy_of_shards() + self._gather(size, self.memory.shards) + copied + fixed

    def _with_gathers(self, layers: float, gathers: float) -> float:
        """Return the seconds of the layers with their gathers, which overlap on GPUs and not on a CPU."""
        return max(layers, gathers) if self.cuda else layers + gathers

    def _copy_of_shards(self) -> float:
        """Return the seconds to copy the student's shards from host to device memory; 0 unless they are kept there."""
        memory = self.memory
        return sum(memory.weights.stored().values()) / self.rates.host if memory.on_host else 0.0

    def _gradients_to_host(self, micro_batches: int) -> float:
        """Return the seconds to copy and add gradients in host memory; 0 unless the optimizer runs there."""
        memory, rates = self.memory, self.rates
        if not memory.on_host:
            return 0.0
        added = (micro_batches - memory.optimizer_batches) * ACCUMULATION_BYTES / rates.host_memory
        return memory.weights.trained * (micro_batches * 4 / rates.host + added)

    @property
    def _topk_bytes(self) -> int:
        return TOPK_BYTES if self.memory.triton else TORCH_TOPK_BYTES

    def _gather(self, bytes_: float, ranks: int) -> float:
        per_node = min(ranks, max(1, self.per_node * ranks // self.memory.shards))
        return gather_seconds(bytes_, ranks, per_node, self.rates)

    def _exchange(self, shape: ModelShape, positions: float, ranks: int, b: int, passes: int) -> float:
        """Return the seconds of context parallelism: queries, keys, values and outputs change ranks in each layer."""
        width = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
        return passes * shape.layers * b * width * positions * (ranks - 1) / ranks / self.rates.link

    def _reduce(self, shape: ModelShape, positions: float, tp: int, b: int, passes: int) -> float:
        """Return the seconds of tensor parallelism: two all-reduces of the hidden states per layer and pass."""
        bytes_ = 2 * shape.hidden * b * positions * 2 * (tp - 1) / tp
        return passes * shape.layers * bytes_ / self.rates.link
