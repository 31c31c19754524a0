"""Predicted memory per rank in each phase of a training step, in bytes.

The prediction is computed from the recipe and the shapes of the models. Every response is assumed to have the maximum
length. The phases are the sync of the weights to the generation engine, generation, the teacher's forward, and
training. The peak of a phase may occur at one of a few points in time. ``StepMemory`` has one method per phase, which
returns a memory table for each of these points. The forecast uses the table with the largest sum.

Names: ``tp``, ``cp`` and ``dp`` are the tensor-, context- and data-parallel sizes of the student; ``shards``: number of
ranks over which one model is sharded; ``positions``: number of token positions of a packed micro-batch on one rank;
``b``: bytes per element of the compute dtype.
"""

from __future__ import annotations

from distill.config import Config
from distill.loss.full_vocab import buffers_of
from distill.loss.targets import chunk_buffers, rows_within_budget
from distill.memory.shapes import ModelShape, teacher_group
from distill.model.student import DTYPES

CPU_CACHE = 2**29
"""Size in bytes of vLLM's key-value cache on a machine without a GPU."""

Lines = dict[str, int]
"""A table of memory: maps a purpose, such as "gradients", to bytes per rank."""


def saved_by_layer(shape: ModelShape, b: int, tp: int = 1) -> int:
    """Return the bytes per token position that autograd saves for the backward of one layer.

    ``b``: bytes per element of the compute dtype; ``tp``: tensor-parallel size. The number applies to training without
    activation checkpointing, and to the layers of the transformers library. Each norm saves its float32 input, and its
    output before and after the multiplication by the weight. Attention saves queries, keys, values, and two copies of
    its output: the result of the attention kernel, and the input of the output projection. The MLP saves four tensors
    of its intermediate size. The norms of queries and keys save the same tensors as other norms.
    """
    queries, keys = shape.heads * shape.head_dim // tp, shape.kv_heads * shape.head_dim // tp
    normalised = (4 + b) * (queries + keys) if shape.qk_norm else 0
    statistics = 4 * shape.heads // tp
    return (
        2 * (4 + 2 * b) * shape.hidden
        + normalised
        + b * (3 * queries + 2 * keys)
        + statistics
        + 4 * b * shape.intermediate // tp
    )


def read_by_layer(shape: ModelShape, b: int) -> int:
    """Return the peak bytes per token position in the forward of one layer under ``torch.no_grad``.

    The peak is the residual stream plus the larger of two parts: the MLP's intermediate tensors, or the queries with
    their float32 norm. ``b``: bytes per element of the compute dtype.
    """
    queries = shape.heads * shape.head_dim
    return max(3 * b * shape.intermediate, (8 + b) * queries) + 2 * b * shape.hidden


class StepMemory:
    """Predicted memory per rank for one recipe.

    The methods ``sync_phase``, ``generation_phase``, ``teacher_phase`` and ``training_phase`` return one memory table
    for each point in time at which the peak of the phase may occur. ``cuda``: whether the run uses GPUs. ``card``:
    usable memory of a GPU in bytes; None if unknown.
    """

    def __init__(self, config: Config, student: ModelShape, teacher: ModelShape, cuda: bool, card: int | None) -> None:
        policy, cluster = config.policy, config.cluster
        self.config, self.student, self.teacher, self.cuda, self.card = config, student, teacher, cuda, card
        self.b, self.teacher_b = DTYPES[policy.precision].itemsize, DTYPES[config.teacher.precision].itemsize
        self.tp, self.cp = policy.dtensor_cfg.tensor_parallel_size, policy.dtensor_cfg.context_parallel_size
        ranks, replicas = cluster.num_nodes * cluster.gpus_per_node, policy.dtensor_cfg.replicate_size
        self.dp, self.shards = ranks // (self.tp * self.cp), ranks // replicas
        self.group, self.engine_tp = teacher_group(config), policy.generation.vllm_cfg.tensor_parallel_size
        self.triton = cuda and config.loss_fn.backend != "torch"
        self.offloads = cuda and config.runtime.offload_optimizer
        self.on_host = cuda and policy.dtensor_cfg.cpu_offload
        self.tokens, self.teacher_tokens = _pack_tokens(config, self.dp)
        self.about = (
            f"student {student.name} ({student.parameters / 1e9:.2f} B parameters), teacher {teacher.name}"
            f" ({teacher.parameters / 1e9:.2f} B parameters, {config.teacher.precision})",
            f"{ranks} ranks: dp {self.dp} x cp {self.cp} x tp {self.tp}, teacher micro-batches on {self.group} ranks;"
            f" micro-batches of at most {self.tokens} tokens (student) and {self.teacher_tokens} tokens (teacher)",
        )

    # ---- memory that several phases use ----

    def kept(self, training: bool = False) -> Lines:
        """Return the memory that stays allocated during a complete phase, as a dict from purpose to bytes.

        Most of it is the student's float32 weight shards. ``training``: whether the phase is training. AdamW's two
        moments are on the device during training, and in other phases if they are not offloaded. Without a GPU the
        teacher and the engine always stay in memory.
        """
        weights = 0 if self.on_host else 4 * self.student.parameters // self.shards
        moments_here = not self.on_host and (training or not self.offloads)
        lines = {"master weights": weights, "optimizer state": 2 * weights if moments_here else 0}
        context = self.config.distillation.context_distillation
        if context.enabled and context.mode == "self_ema":
            lines["teacher average"] = weights  # FollowingTeacher keeps it on the student's shards
        if not self.cuda:
            lines |= {"teacher shards": self.teacher_shards, **self.engine_lines()}
        return lines

    @property
    def teacher_shards(self) -> int:
        """Return the bytes per rank of the teacher's sharded weights, stored in ``teacher.precision``."""
        return self.teacher_b * self.teacher.parameters // self.shards

    def gathered(self, shape: ModelShape, b: int, tp: int, stays: bool) -> Lines:
        """Return the memory of parameters that FSDP gathers at the same time, as a dict from purpose to bytes.

        ``b`` is the number of bytes per parameter. ``stays``: whether layers stay gathered after their forward
        (reshard_after_forward=false). If so, all layers are gathered, otherwise the current and the prefetched layer.
        Embedding, head and last norm are gathered during the complete pass.
        """
        layers = shape.layers if stays else min(2, shape.layers)
        return {
            "gathered layers": layers * b * shape.layer // tp,
            "gathered embeddings": b * shape.root // tp,
        }

    def engine_lines(self) -> Lines:
        """Return the memory of the awake generation engine, as a dict from purpose to bytes.

        vLLM allocates the fraction gpu_memory_utilization of the GPU's memory; its cache gets the part of this memory
        that the weights do not use. The transformers engine has the complete model and a cache for one batch of
        sequences of the maximum length. The cache of vLLM is omitted if the memory of the GPU is unknown.
        """
        generation, shape = self.config.policy.generation, self.student
        if generation.backend != "vllm":
            cache = self.config.policy.generation_batch_size * self.window_cache()
            return {"engine weights": self.b * shape.parameters, "engine cache": cache}
        weights = self.b * shape.parameters // self.engine_tp
        if not self.cuda:
            return {"engine weights": weights, "engine cache": CPU_CACHE}
        if self.card is None:
            return {"engine weights": weights}
        share = int(generation.vllm_cfg.gpu_memory_utilization * self.card)
        return {"engine weights": weights, "engine cache": max(share - weights, 0)}

    def window_cache(self) -> int:
        """Return the bytes per rank of the engine's key-value cache for one sequence of the maximum length."""
        generation, shape = self.config.policy.generation, self.student
        vllm = generation.backend == "vllm"
        window = generation.vllm_cfg.max_model_len if vllm else self.config.policy.max_total_sequence_length
        heads = shape.kv_heads // min(self.engine_tp, shape.kv_heads) if vllm else shape.kv_heads
        return 2 * self.b * shape.layers * heads * shape.head_dim * window

    def targets(self) -> Lines:
        """Return ``{"targets": bytes}``, for all responses that one rank trains on in a step.

        The targets are the teacher's outputs that the loss compares to the student. They stay on the device until the
        student has trained on them. For each response token they are K token ids (int32), K log-probs, the log of the
        remaining probability, and the entropy (all float32). If ``returns_rows`` is True, the target of a response
        token is a hidden state of the teacher instead, and each rank also keeps a copy of the teacher's LM head.
        """
        loop, shape = self.config.distillation, self.teacher
        responses = -(-loop.num_prompts_per_step * loop.num_generations_per_prompt // self.dp)
        rows = -(-responses * self.longest_response() // self.cp)
        if self.returns_rows:
            return {"targets": self.teacher_b * shape.hidden * (rows + shape.vocab)}
        return {"targets": 8 * (loop.topk_logits_k + 1) * rows}

    @property
    def returns_rows(self) -> bool:
        """Return whether the targets are the teacher's hidden states instead of the teacher's top-k."""
        return self.config.loss_fn.support == "student" or self.config.distillation.topk_logits_k == 0

    def longest_response(self) -> int:
        """Return the maximum length of a response in tokens, without the prompt."""
        policy = self.config.policy
        return min(policy.generation.max_new_tokens, policy.max_total_sequence_length - 1)

    def chunk(self, own: int | None, rows: int, vocab: int, buffers: int = 2) -> int:
        """Return the number of rows in a chunk of logits, one row per token; one chunk is in memory at a time.

        The result is ``own`` (the chunk size configured for the model), or ``runtime.logits_chunk_rows`` if ``own`` is
        None. If both are None, it is the number of rows for which ``buffers`` buffers of [rows, ``vocab``] fit into the
        memory budget of the loss. The result is at most ``rows``, the total number of tokens.
        """
        set_rows = own or self.config.runtime.logits_chunk_rows
        return min(set_rows or rows_within_budget(self.cuda, vocab, buffers), rows)

    # ---- memory at the candidates for the peak of each phase ----

    def sync_phase(self) -> list[Lines]:
        """Return two memory tables, one for each possible peak of the sync: weight transfer, and verification.

        Weights are sent to the engine in buckets, which are groups of tensors. Two buckets are in memory at the same
        time, each with complete tensors and this rank's shards of these tensors. A bucket is at least as large as the
        largest tensor. The verification runs a forward of the student while the engine is awake.
        """
        policy, shape = self.config.policy, self.student
        bucket = max(self.config.runtime.sync_bucket_mib * 2**20, self.b * shape.embedding)
        bucket = min(bucket, self.b * shape.parameters)
        awake = self.engine_lines()
        weights = {"engine weights": awake["engine weights"]}
        gathered = self.gathered(shape, self.b, self.tp, not policy.dtensor_cfg.reshard_after_forward)
        buckets = {"sync buckets": 2 * (bucket + bucket // self.shards)}
        return [self.kept() | weights | buckets, self.kept() | awake | gathered]

    def generation_phase(self) -> list[Lines]:
        """Return one memory table: the generation engine, and memory that is always allocated (see ``kept``)."""
        return [self.kept() | self.engine_lines()]

    def teacher_phase(self) -> list[Lines]:
        """Return two memory tables, one for each possible peak of the teacher phase: a layer, and the logits.

        The first is for the forward of a layer, the second for the top-k of a chunk of logits. A teacher group is a set
        of ranks that combine their micro-batches and compute the teacher's forward on them together. The number of
        token positions per rank therefore does not depend on the size of the group. Logits are float32; without Triton,
        the top-k needs a second buffer of the same size.
        """
        config, shape, b = self.config, self.teacher, self.teacher_b
        positions = -(-self.teacher_tokens // (self.tp * self.cp))
        stays = not config.teacher.dtensor_cfg.reshard_after_forward
        lines = self.kept() | {"teacher shards": self.teacher_shards} | self.targets()
        lines |= self.gathered(shape, b, 1, stays)
        rows = self.chunk(config.teacher.logprob_chunk_size, positions, shape.vocab)
        logits = 0 if self.returns_rows else (4 if self.triton else 8) * rows * shape.vocab
        return [
            # Also includes the input of this layer and the input of the first layer.
            lines | {"teacher workspace": (read_by_layer(shape, b) + 2 * b * shape.hidden) * positions},
            lines | {"teacher workspace": b * shape.hidden * positions, "logits chunk": logits},
        ]

    def training_phase(self) -> list[Lines]:
        """Return three memory tables, one for each possible peak of the training phase.

        The possible peaks are the loss inside the forward, a layer's backward during the gradient reduction of another
        layer, and the gradient reduction of the root module or the optimizer step. Gradients of an earlier micro-batch
        are assumed to exist. Activation checkpointing saves the input of each layer and recomputes one layer at a time.
        A layer's backward needs two more tensors of the intermediate size and two of the hidden size.
        """
        config, shape, b, tp = self.config, self.student, self.b, self.tp
        parallel, own = config.policy.dtensor_cfg, config.policy.logprob_chunk_size
        positions = -(-self.tokens // self.cp)
        saved_layer = saved_by_layer(shape, b, tp)
        checkpointed = parallel.activation_checkpointing
        saved = positions * (
            shape.layers * (b * shape.hidden if checkpointed else saved_layer) + (4 + b) * shape.hidden
        )
        working = positions * (2 * b * (shape.intermediate // tp + shape.hidden) + (saved_layer if checkpointed else 0))
        kept = self.kept(training=True)
        kept |= {"gradients": kept["master weights"], **self.targets()}
        gathered = self.gathered(shape, b, tp, not parallel.reshard_after_forward)
        root = {"gathered embeddings": gathered["gathered embeddings"]}
        head = (shape.head or shape.embedding) // tp
        buffers = chunk_buffers(config.loss_fn, config.distillation.topk_logits_k)
        own_rows = self.chunk(own, positions, shape.vocab // tp, buffers)
        largest = max(shape.embedding, shape.head) // self.shards
        if config.policy.optimizer.kwargs.foreach:
            largest = shape.parameters // self.shards
        return [
            kept
            | (root if parallel.reshard_after_forward else gathered)
            | {
                "saved activations": saved,
                "response rows": 2 * b * shape.hidden * positions,
                "logits chunk": self.logits_bytes() * own_rows * shape.vocab // tp,
                "embedding gradients": 4 * head,
            },
            kept
            | gathered
            | {
                "saved activations": saved,
                "layer workspace": working,
                "gradient reduction": (b + 2 * 4) * shape.layer // tp,
                "embedding gradients": b * head,
            },
            kept
            | root
            | {
                "gradient reduction": 4 * shape.root // tp,
                # A tied embedding and head each have a complete gradient before the two are added.
                "embedding gradients": b * (shape.embedding + (shape.head or shape.embedding)) // tp,
                # Largest shard in float64 for the norm, or two float32 temporaries; with foreach, for all shards.
                "optimizer temporaries": 0 if self.on_host else 8 * largest,
            },
        ]

    def logits_bytes(self) -> int:
        """Return the bytes per logit that the loss ``fused_linear_kl`` needs for a chunk of logits.

        A chunk has shape [C, V / tp], with C response tokens and V vocabulary entries. The buffers are the float32
        logits and their gradient in the compute dtype. Without Triton one more float32 buffer is needed. With Triton
        and loss_fn.logits_dtype=bfloat16, one bfloat16 buffer is enough. The loss over the complete vocabulary needs
        ``buffers_of`` float32 buffers.
        """
        b, rounded = self.b, self.config.loss_fn.logits_dtype == "bfloat16"
        if self.config.distillation.topk_logits_k == 0:
            return 4 * buffers_of(self.config.loss_fn) + b + (2 if rounded else 0)
        cast = b if b < 4 else 0
        own = 4 + (4 + cast if not self.triton else cast)
        if self.triton and rounded:
            own = 2
        return own + (4 if self.returns_rows else 0)

    def host(self) -> Lines:
        """Return the pinned host memory per rank, as a dict from purpose to bytes.

        The purposes are the host copy of the teacher's shards, the offloaded weights, gradients and optimizer state,
        and a checkpoint that is being written.
        """
        context, saving = self.config.distillation.context_distillation, self.config.checkpointing
        state = 4 * self.student.parameters // self.shards
        average = state if context.enabled and context.mode == "self_ema" else 0
        lines = {"teacher shards": self.teacher_shards}
        if saving.enabled:
            lines["pending checkpoint"] = state * (3 if saving.save_optimizer else 1) + average
        if self.on_host:
            lines |= {"master weights": state, "gradients": state, "optimizer state": 2 * state}
            return lines | ({"teacher average": average} if average else {})
        return lines | ({"optimizer state": 2 * state} if self.offloads else {})


def _pack_tokens(config: Config, dp: int) -> tuple[int, int]:
    """Return the maximum numbers of tokens in a packed micro-batch of the student and of the teacher.

    A packed micro-batch has at most ``train_mb_tokens`` tokens, or is a single longer sequence. For this limit, each
    response counts with the longer of its two prompts (the student's and the teacher's), so both models can reach the
    limit. A micro-batch never has more responses than one data-parallel rank gets in an optimizer batch.
    """
    policy, student = config.policy, config.policy.max_total_sequence_length
    same = not config.distillation.context_distillation.enabled
    teacher = student if same else config.teacher.max_total_sequence_length
    responses = -(-policy.train_global_batch_size // dp)
    for batching in (policy.sequence_packing, policy.dynamic_batching):
        if batching.enabled:
            budget = batching.train_mb_tokens
            return min(max(budget, student), responses * student), min(max(budget, teacher), responses * teacher)
    responses = min(responses, policy.train_micro_batch_size)
    return responses * student, responses * teacher
