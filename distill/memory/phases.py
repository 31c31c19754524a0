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
from distill.config.lora_rules import stores_adapters, teacher_shares_base
from distill.config.response_limits import largest_max_new_tokens
from distill.loss.full_vocab import buffers_of
from distill.loss.targets import chunk_buffers, rows_within_budget
from distill.memory.adapters import Adapters, adapters_of
from distill.memory.layers import backward_workspace, forward_workspace, kept_by_layer
from distill.memory.shapes import ModelShape, teacher_group
from distill.memory.weights import Lines, ShardedWeights
from distill.model.host_offload import pinned_blocks
from distill.model.lora_merge import TEMPORARY_BYTES
from distill.model.student import DTYPES

CPU_CACHE = 2**29
"""Size in bytes of vLLM's key-value cache on a machine without a GPU."""

_INT64 = 8
_ROW_VALUES = 40
"""Bytes per response token of a micro-batch, outside of both models' inputs.

They are those of three int64, two float32 and two int32 tensors.
"""
_TENSOR_PADDING = 20 * 256
"""Bytes per micro-batch by which the alignment of its tensors, and its sequence lengths, can exceed the values."""


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
        self.fsdp = self.shards // self.tp
        adapters = adapters_of(config, student, self.fsdp, self.tp)
        stays = [not parallel.reshard_after_forward for parallel in (policy.dtensor_cfg, config.teacher.dtensor_cfg)]
        self.weights = ShardedWeights(student, self.fsdp, self.tp, self.b, stays[0], cuda, adapters)
        """The student's weights and adapters."""
        self.shares_base = teacher_shares_base(config)
        """Whether the teacher is the student's module."""
        own = ShardedWeights(teacher, self.shards, 1, self.teacher_b, stays[1], cuda)
        self.teacher_weights = self.weights if self.shares_base else own
        self.teacher_ranks = self.tp * self.cp // self.teacher_weights.tp
        """Number of ranks of a student group over which the positions that the teacher reads are split."""
        fused = config.runtime.fused_layers
        self.fused = cuda if fused is None else fused
        loop = config.distillation
        in_step, in_batch = loop.num_prompts_per_step * loop.num_generations_per_prompt, policy.train_global_batch_size
        self.optimizer_batches = in_step // in_batch
        self.responses = -(-in_step // self.dp)  # of one data-parallel rank in a step
        self.tokens, self.teacher_tokens = _pack_tokens(config, self.dp, self.responses)
        # Then no gradients of an earlier micro-batch exist.
        self.is_only_micro_batch = self.tokens >= -(-in_batch // self.dp) * policy.max_total_sequence_length
        self.about = self._describe(ranks)

    def _describe(self, ranks: int) -> tuple[str, str]:
        """Return two lines about the models, the layout and the micro-batches."""
        student, teacher, adapters = self.student, self.teacher, self.weights.adapters
        trained = "" if adapters is None else f", frozen, and {adapters.parameters / 1e6:.1f} M in adapters"
        theirs = (
            f"teacher {teacher.name} ({teacher.parameters / 1e9:.2f} B parameters, {self.config.teacher.precision})"
        )
        split = f"dp {self.dp} x cp {self.cp} x tp {self.tp}"
        if not self.shares_base:
            split += f", teacher micro-batches on {self.group} ranks"
        return (
            f"student {student.name} ({student.parameters / 1e9:.2f} B parameters{trained}),"
            f" {'the teacher uses its weights' if self.shares_base else theirs}",
            f"{ranks} {'rank' if ranks == 1 else 'ranks'}: {split};"
            f" micro-batches of at most {self.tokens} tokens (student) and {self.teacher_tokens} tokens (teacher)",
        )

    # ---- memory that several phases use ----

    def kept(self, moments: bool | None = None) -> Lines:
        """Return the memory that stays allocated during a complete phase, as a dict from purpose to bytes.

        Most of it is the student's shards. ``moments``: whether AdamW's two moments are on the device; None: they are,
        unless they are offloaded. Without a GPU the teacher and the engine always stay in memory.
        """
        trained = 0 if self.on_host else 4 * self.weights.trained
        if moments is None:
            moments = not self.offloads
        stored = self.weights.stored()
        lines = dict.fromkeys(stored, 0) if self.on_host else stored
        lines |= {"optimizer state": 2 * trained if moments else 0}
        if self.teacher_is_stored:
            lines["teacher copy"] = trained  # on the shards of the trained parameters
        if not self.cuda:
            lines |= {"teacher shards": self.teacher_shards, **self.engine_lines()}
        return lines

    @property
    def teacher_is_stored(self) -> bool:
        """Return whether the teacher stores its own copy of the trained parameters (EMA or periodic copy).

        The teacher before training also does, if the student starts with given adapters.
        """
        context = self.config.distillation.context_distillation
        if self.shares_base:
            return stores_adapters(context.mode, self.config.policy.dtensor_cfg.lora_cfg.init_from)
        return context.enabled and context.mode in ("self_ema", "self_periodic")

    @property
    def teacher_adapters(self) -> Adapters | None:
        """Return the adapters in the teacher's forward; None for a teacher without adapters."""
        is_adapted = self.config.distillation.context_distillation.mode != "self_frozen" or self.teacher_is_stored
        return self.weights.adapters if self.shares_base and is_adapted else None

    @property
    def teacher_shards(self) -> int:
        """Return the bytes per rank of the teacher's own sharded weights, stored in ``teacher.precision``."""
        return 0 if self.shares_base else self.teacher_b * self.teacher_weights.shard

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
        remaining probability, and the entropy (all float32); some weights of the tokens also need the log-prob of the
        sampled token. If ``returns_rows`` is True, the target of a response token is a hidden state of the teacher
        instead, and each rank also keeps its part of the teacher's LM head, unless it is the student's.
        """
        loop, shape = self.config.distillation, self.teacher
        rows = -(-self.responses * self.longest_response() // self.cp)
        if self.returns_rows:
            head = 0 if self.shares_base else -(-shape.vocab // self.tp)
            return {"targets": self.teacher_b * shape.hidden * (rows + head)}
        sampled = 4 * self.config.loss_fn.token_weights.reads_sampled_token
        return {"targets": (8 * (loop.topk_logits_k + 1) + sampled) * rows}

    @property
    def returns_rows(self) -> bool:
        """Return whether the targets are the teacher's hidden states instead of the teacher's top-k."""
        return self.config.loss_fn.support == "student" or self.config.distillation.topk_logits_k == 0

    def longest_response(self) -> int:
        """Return the maximum length of a response in tokens, without the prompt."""
        policy = self.config.policy
        return min(largest_max_new_tokens(self.config), policy.max_total_sequence_length - 1)

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
        """Return memory tables for the possible peaks of the sync: its start, weight transfer, and verification.

        At the start the optimizer's moments are still on the device, and the engine sleeps. Weights are sent to the
        engine in buckets, which are groups of tensors. Two buckets are in memory at the same time, each with complete
        tensors and this rank's shards of these tensors, and a copy of one tensor, unless one rank has all shards. A
        bucket is larger than ``runtime.sync_bucket_mib`` if it consists of one larger tensor, such as the embedding;
        the bucket after it is not. With tensor parallelism, the parts of a tensor are copied first, and then joined in
        a second copy. Adapters are added to the shards in chunks. The verification runs a forward of the student while
        the engine is awake, but only in float32.
        """
        policy, shape = self.config.policy, self.student
        largest, rest = self.b * shape.embedding, self.b * shape.layers * shape.layer
        bucket = min(self.config.runtime.sync_bucket_mib * 2**20, rest)
        both = max(largest, bucket) + bucket
        awake = self.engine_lines()
        weights = {"engine weights": awake["engine weights"]}
        copies = 2 if self.tp > 1 else 1 if self.shards > 1 else 0
        buckets = {"sync buckets": both + both // self.shards + largest * copies}
        if self.weights.adapters is not None:
            buckets["merge temporaries"] = TEMPORARY_BYTES
        tables = [self.kept(moments=not self.on_host), self.kept() | weights | buckets, self.kept() | awake]
        if policy.precision != "float32":
            return tables
        return [
            *tables,
            self.kept() | awake | self.weights.start(casts=True),
            self.kept() | awake | self.weights.gathered(layers=3 if self.cuda else 2),
        ]

    def generation_phase(self) -> list[Lines]:
        """Return one memory table: the generation engine, and memory that is always allocated (see ``kept``)."""
        return [self.kept() | self.engine_lines()]

    def teacher_phase(self) -> list[Lines]:
        """Return memory tables for the possible peaks of the teacher phase: its start, a layer, and the logits.

        A teacher group is a set of ranks that combine their micro-batches and compute the teacher's forward on them
        together. The number of token positions per rank therefore does not depend on the size of the group. A teacher
        that is the student's module is split as the student. Logits are float32; without Triton, the top-k needs a
        second buffer of the same size. If one pack has all responses of a step, no targets exist before its logits.
        """
        config, shape, b, weights = self.config, self.teacher, self.teacher_b, self.teacher_weights
        positions = -(-self.teacher_tokens // self.teacher_ranks)
        lines = self.kept() | {"teacher shards": self.teacher_shards} | self.packs()
        if self.shares_base and self.teacher_is_stored:
            lines["exchanged adapters"] = 4 * weights.trained
        is_only_pack = self.teacher_tokens >= self.responses * _teacher_window(config)
        before = lines if is_only_pack else lines | self.targets()
        rows = self.chunk(config.teacher.logprob_chunk_size, positions, shape.vocab // weights.tp)
        logits = 0 if self.returns_rows else (4 if self.triton else 8) * rows * shape.vocab // weights.tp
        layer = forward_workspace(shape, b, self.fused, weights.tp) + 2 * b * shape.hidden
        return [
            before | weights.start(casts=False) | {"teacher workspace": b * shape.hidden * positions},
            before
            | weights.gathered(layers=3 if self.cuda else 2)
            | {"teacher workspace": 2 * b * shape.hidden * positions},
            # Also includes the input of this layer and the input of the first layer.
            before | weights.gathered() | {"teacher workspace": layer * positions},
            lines
            | self.targets()
            | weights.gathered(layers=1 if self.cuda else 2)
            | {"teacher workspace": b * shape.hidden * positions, "logits chunk": logits},
        ]

    def packs(self) -> Lines:
        """Return the memory of a step's micro-batches, on GPUs; pinned host memory has a copy during the transfer.

        Each model's input has token ids and positions, split over the ranks that compute it together, and one row index
        per response token. If they are several ranks, each has the complete mapping between positions and ranks. If
        sequences share prefixes, each has the complete mapping between sequences and positions.
        """
        if not self.cuda:
            return {}
        config, ranks, responses = self.config, self.teacher_ranks, self.responses
        shared = config.runtime.share_prefixes and config.distillation.num_generations_per_prompt > 1

        def view(tokens: int, ranks: int, members: int = 1) -> int:
            """Return the bytes of a model's input; ``members``: micro-batches that ``ranks`` ranks compute together."""
            complete = 2 * (ranks > 1) + 2 * shared
            return _INT64 * members * tokens * complete + 2 * _INT64 * -(-members * tokens // ranks)

        rows = responses * self.longest_response()
        values = -(-rows * (_ROW_VALUES + _INT64) // self.cp) + -(-rows * _INT64 // ranks)
        inputs = view(responses * config.policy.max_total_sequence_length, self.cp)
        inputs += view(responses * _teacher_window(config), self.group, self.group // ranks)
        return {"micro-batches": inputs + values + responses * _TENSOR_PADDING}

    def training_phase(self) -> list[Lines]:
        """Return memory tables for the possible peaks of the training phase.

        The possible peaks are the start of a forward, the loss inside the forward, a layer's backward during the
        gradient reduction of another layer, the gradient reduction of the root module, and the optimizer step.
        Gradients of an earlier micro-batch exist, unless one micro-batch is always enough for an optimizer batch. With
        one micro-batch, gradients grow during the backward while activations are freed. Moments are on the device from
        the first optimizer step of a training step.
        """
        config, shape, b, tp, weights = self.config, self.student, self.b, self.tp, self.weights
        parallel, own = config.policy.dtensor_cfg, config.policy.logprob_chunk_size
        mode = parallel.recomputation
        positions = -(-self.tokens // self.cp)
        low = 0 if weights.adapters is None else weights.adapters.products * weights.adapters.dim
        kept_layer = kept_by_layer(shape, b, tp, self.fused, mode, self.cp, low)
        last_norm = positions * (2 * b if self.fused else 4 + b) * shape.hidden
        saved = positions * shape.layers * kept_layer
        # Fitted to the memory that the tests count on a fake GPU, not derived: if all weights are trained, the backward
        # of the last layer needs as much additional memory as the last norm has saved. With adapters it does not.
        saved_above = 0 if weights.adapters else last_norm
        working = positions * backward_workspace(shape, b, tp, self.fused, mode, self.cp, low)
        has_moments = None if self.optimizer_batches == 1 else not self.on_host
        lines = self.kept(moments=has_moments) | self.targets() | self.packs()
        gradients = 0 if self.on_host else 4 * weights.trained
        before = lines | {"gradients": 0 if self.is_only_micro_batch else gradients}
        gathered = weights.gathered()
        buffers = chunk_buffers(config.loss_fn, config.distillation.topk_logits_k)
        own_rows = self.chunk(own, positions, shape.vocab // tp, buffers)
        # While a layer's backward runs, the gradient of the layer above it is reduced in float32. The first layer that
        # the backward reaches has no such gradient, and its own saved activations are freed only at its end.
        saved_below = positions * (shape.layers - 1) * kept_layer
        reduction = {
            "gradient reduction": (b + 4) * weights.trained_layer,
            "embedding gradients": b * weights.trained_head,
        }
        root = {"gathered embeddings": gathered["gathered embeddings"]}
        return [
            before | weights.start(casts=True) | {"saved activations": positions * b * shape.hidden},
            before
            | weights.gathered(layers=1 if self.cuda else 2)
            | {
                "saved activations": saved + last_norm,
                "response rows": 2 * b * shape.hidden * positions,
                "logits chunk": self.logits_bytes() * own_rows * shape.vocab // tp,
                "embedding gradients": 4 * weights.trained_head,
            },
            before | gathered | reduction | {"saved activations": saved_below, "layer workspace": working},
            before
            | gathered
            | {
                "saved activations": saved + saved_above,
                "layer workspace": working,
                "embedding gradients": reduction["embedding gradients"],
            },
            lines
            | {"gradients": gradients}
            | gathered
            | reduction
            | {"saved activations": positions * kept_layer, "layer workspace": working},
            lines
            | {"gradients": gradients}
            | root
            | {
                "gradient reduction": 4 * weights.trained_root + 4 * weights.trained_root // self.fsdp,
                "embedding gradients": b * weights.trained_root,
            },
            self.kept(moments=not self.on_host)
            | self.targets()
            | self.packs()
            | {"gradients": gradients, "optimizer temporaries": self.optimizer_temporaries()},
        ]

    def optimizer_temporaries(self) -> int:
        """Return the bytes of temporary tensors in AdamW: none if fused, one or two float32 tensors otherwise."""
        kwargs = self.config.policy.optimizer.kwargs
        if self.on_host or (self.cuda and not kwargs.foreach and kwargs.fused is not False):
            return 0
        return 4 * self.weights.trained if kwargs.foreach else 8 * self.weights.largest_trained

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
        """Return the host memory per rank, as a dict from purpose to bytes, on GPUs.

        Pinned are the host copy of the teacher's shards, the offloaded moments, and the transfer of micro-batches. With
        cpu_offload also weights and gradients are pinned, each tensor in a block that torch rounds up to a power of
        two. A checkpoint that is being written, and moments with cpu_offload, are in pageable memory.
        """
        saving = self.config.checkpointing
        state = 4 * self.weights.trained
        copy = state if self.teacher_is_stored else 0
        lines = {"teacher shards": sum(pinned_blocks(self.teacher_shards)), **self.packs()}
        if saving.enabled:
            lines["pending checkpoint"] = state * (3 if saving.save_optimizer else 1) + copy
        if self.on_host:
            lines |= self.weights.pinned() | {"optimizer state": 2 * state}
            return lines | ({"teacher copy": copy} if copy else {})
        return lines | ({"optimizer state": sum(pinned_blocks(2 * state))} if self.offloads else {})


def _teacher_window(config: Config) -> int:
    """Return the maximum number of tokens of a sequence that the teacher reads."""
    own = config.distillation.context_distillation.enabled  # else the teacher reads the student's prompts
    return (config.teacher if own else config.policy).max_total_sequence_length


def _pack_tokens(config: Config, dp: int, of_step: int) -> tuple[int, int]:
    """Return the maximum numbers of tokens in a micro-batch of the student and in a pack of the teacher.

    A micro-batch has at most ``train_mb_tokens`` tokens, or is a single longer sequence. For this limit, each response
    counts with the longer of its two prompts (the student's and the teacher's), so both models can reach the limit. A
    micro-batch does not have more responses than one data-parallel rank gets in an optimizer batch. A pack of the
    teacher joins micro-batches up to ``logprob_mb_tokens``, also of several optimizer batches. It has at most the
    ``of_step`` responses that one data-parallel rank gets in a step.
    """
    policy, student, teacher = config.policy, config.policy.max_total_sequence_length, _teacher_window(config)
    responses = -(-policy.train_global_batch_size // dp)
    budget = next((b.train_mb_tokens for b in (policy.sequence_packing, policy.dynamic_batching) if b.enabled), None)
    if budget is None:
        count = min(responses, policy.train_micro_batch_size)
        tokens, own = count * student, count * teacher
    else:
        tokens, own = min(max(budget, student), responses * student), min(max(budget, teacher), responses * teacher)
    return tokens, max(own, min(config.teacher.pack_tokens or 0, of_step * teacher))
