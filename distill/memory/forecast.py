"""What a rank's memory will hold in each phase of a step, from the recipe and the models' shapes alone.

Every formula is of one rank, in bytes, with every answer as long as the recipe allows. A phase has moments, each a
table of lines, and counts as its worst one. Names: tp, cp and dp are the sizes of the student's mesh; ``shards`` ranks
hold one sharded model together; ``positions`` are a rank's part of a pack; b is the bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from distill.config import Config
from distill.errors import UserError, any_of
from distill.loss.targets import chunk_buffers, rows_within_budget
from distill.memory.shapes import ModelShape, check_shapes, find_config, find_shape, shape_of, teacher_group
from distill.model.student import DTYPES
from distill.model.tensor_parallel import check_tensor_parallel

GIB = 2**30
CARD_SHARE = 0.98
"""What can be used of a card sold with N GB, as a share of N GiB: drivers report 0.985 to 0.99."""
RESERVE = 3 * GIB
"""An allowance, not a formula: CUDA's context, NCCL's buffers, workspaces of matrix products, CUDA graphs that a
sleeping engine keeps, and what the allocator can't put together."""
CPU_CACHE = 2**29
"""vLLM's key-value cache without a GPU."""

PHASES = {
    "sync": "prepare_for_generation",
    "generate": "generation",
    "teacher": "teacher_logprob_inference",
    "train": "policy_training",
}
"""The phases, and their names among the metrics."""

Lines = dict[str, int]
"""Bytes by what holds them."""

_STATE = ("cluster.num_nodes", "policy.dtensor_cfg.cpu_offload=true")
_TOKENS = ("policy.dtensor_cfg.context_parallel_size", "policy.sequence_packing.train_mb_tokens")
_TP = "policy.dtensor_cfg.tensor_parallel_size"
_ENGINE_SHARE = "policy.generation.vllm_cfg.gpu_memory_utilization"
_ENGINE_TP = "policy.generation.vllm_cfg.tensor_parallel_size"
_KEYS: dict[str, tuple[str, ...]] = {
    "master weights": _STATE,
    "gradients": _STATE,
    "optimizer state": _STATE,
    "optimizer's temporaries": _STATE,
    "teacher shards": ("cluster.num_nodes",),
    "gathered layers": (_TP,),
    "gathered embedding and head": (_TP,),
    "gradient reduction": (_TP,),
    "embedding's and head's gradient": (_TP,),
    "saved activations": ("policy.dtensor_cfg.activation_checkpointing=true", *_TOKENS),
    "one layer's working set": (*_TOKENS, _TP),
    "response rows": _TOKENS,
    "logits chunk": ("runtime.logits_chunk_rows", _TP),
    "teacher's working set": _TOKENS,
    "targets": ("distillation.topk_logits_k", "policy.dtensor_cfg.context_parallel_size", "cluster.num_nodes"),
    "engine's weights": (_ENGINE_TP,),
    "engine's cache": (_ENGINE_SHARE,),
    "sync buckets": ("runtime.sync_bucket_mib",),
}
"""Which keys change a line."""


@dataclass(frozen=True)
class Forecast:
    """Predicted bytes of a rank by phase, each at its worst moment, and what it keeps in pinned host memory."""

    about: tuple[str, ...]
    """Lines for people: which models, which layout."""
    phases: dict[str, Lines]
    host: Lines
    window_cache: int
    """Bytes of keys and values of one answer as long as the engine's window: less than that no engine starts with."""

    def total(self, phase: str) -> int:
        """All lines of a phase."""
        return sum(self.phases[phase].values())

    def table(self, measured: Mapping[str, float] | None = None, how: str = "measured") -> str:
        """A line a phase: GiB predicted, those ``measured`` (by phase) beside them, and the largest parts."""
        title = "predicted" if measured is None else f"predicted, then {how}"
        rows = [f"memory of a rank in GiB, {title}", *(f"  {line}" for line in self.about)]
        for phase, lines in [*self.phases.items(), *([("host", self.host)] if self.host else [])]:
            largest = sorted(lines.items(), key=lambda line: -line[1])
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest[:5] if size >= 0.05 * GIB)
            beside = "" if measured is None else f"{measured[phase]:7.1f}" if phase in measured else " " * 7
            rows.append(f"  {phase:9}{sum(lines.values()) / GIB:6.1f}{beside}  {parts}".rstrip())
        return "\n".join(rows)

    def check(self, config: Config) -> None:
        """Raise UserError where ``cluster.gpu_memory_gb`` can't hold the largest phase; null holds everything."""
        if config.cluster.gpu_memory_gb is None:
            return
        given, card = config.cluster.gpu_memory_gb, card_bytes(config.cluster.gpu_memory_gb)
        cache = self.phases["generate"]["engine's cache"]
        if cache < self.window_cache:
            settings = config.policy.generation.vllm_cfg
            raise UserError(
                f"{_ENGINE_SHARE}={settings.gpu_memory_utilization:g} of {card / GIB:.1f} GiB leaves the engine"
                f" {cache / GIB:.1f} GiB beside its weights, and one answer as long as its window takes"
                f" {self.window_cache / GIB:.1f}: raise it, or {_ENGINE_TP}={settings.tensor_parallel_size}"
            )
        phase = max(self.phases, key=self.total)
        lines, total = self.phases[phase], self.total(phase)
        if total <= card:
            return
        largest = sorted((name for name in lines if name in _KEYS), key=lambda name: -lines[name])[:3]
        keys = dict.fromkeys(key for name in largest for key in _KEYS[name] if not _is_set(config, key))
        raise UserError(
            f"cluster.gpu_memory_gb={given:g} leaves {card / GIB:.1f} GiB to use, and the phase {phase} needs"
            f" {total / GIB:.1f} GiB on a rank, {lines[largest[0]] / GIB:.1f} of them {largest[0]}: change"
            f" {any_of(keys)}, or give a larger card"
        )


def _is_set(config: Config, remedy: str) -> bool:
    key, _, value = remedy.rpartition(".")[2].partition("=")
    return value == "true" and bool(getattr(config.policy.dtensor_cfg, key))


def card_bytes(gigabytes: float) -> int:
    """Bytes that can be used of a card sold with so many GB."""
    return int(gigabytes * GIB * CARD_SHARE)


def dry_run(config: Config) -> Iterator[str]:
    """The prediction as comments of YAML, from what this machine knows of the models, without a network.

    Raises UserError for a layout that the models can't have; and after the table where ``cluster.gpu_memory_gb`` is too
    little for it.
    """
    ours = find_config(config.policy.model_name, "policy.model_name")
    student = None if ours is None else shape_of(ours, config.policy.model_name)
    teacher = find_shape(config.teacher.model_name, "teacher.model_name")
    check_shapes(config, student, teacher)
    if student is not None:
        check_tensor_parallel(config, ours, student.vocab)
    if student is None or teacher is None:
        unknown = config.policy.model_name if student is None else config.teacher.model_name
        yield f"# memory is not predicted: {unknown} is neither on this machine nor among the known shapes"
        return
    cuda = config.runtime.device != "cpu"
    forecast = predict(config, student, teacher, cuda)
    yield "\n".join(f"# {line}" for line in forecast.table().splitlines())
    if cuda:
        forecast.check(config)


def plan_memory(config: Config, student: ModelShape, teacher: ModelShape, device: torch.device) -> Forecast:
    """Check the layout of a run, and on GPUs its memory; raises UserError as ``dry_run`` does. No collective."""
    check_shapes(config, student, teacher)
    if device.type != "cuda":
        return predict(config, student, teacher, cuda=False)
    forecast = predict(config, student, teacher, card=torch.cuda.get_device_properties(device).total_memory)
    forecast.check(config)
    return forecast


def predict(
    config: Config, student: ModelShape, teacher: ModelShape, cuda: bool = True, card: int | None = None
) -> Forecast:
    """Bytes of a rank by phase. ``card``: bytes of the GPU where ``cluster.gpu_memory_gb`` doesn't say; without either
    the engine's cache, which is what others leave, is left out. Without ``cuda`` nothing ever leaves for the host.
    """
    if config.cluster.gpu_memory_gb is not None:
        card = card_bytes(config.cluster.gpu_memory_gb)
    m = _Memory(config, student, teacher, cuda, card)
    moments = dict(zip(PHASES, (m.sync(), m.generate(), m.judge(), m.train()), strict=True))
    worst = {phase: max(tables, key=lambda lines: sum(lines.values())) for phase, tables in moments.items()}
    if not cuda:
        return Forecast(m.about, worst, {}, m.cache_of_window())
    phases = {phase: lines | {"reserve": RESERVE} for phase, lines in worst.items()}
    return Forecast(m.about, phases, m.host(), m.cache_of_window())


def saved_by_layer(shape: ModelShape, b: int, tp: int = 1) -> int:
    """Bytes per position that autograd keeps of one layer without activation checkpointing.

    Read off transformers' layers: a norm keeps its float32 input, and its output before and after its weight; the
    attention queries, keys, values and its output, twice (the kernel's, and put together or exchanged as the
    projection's input); the MLP four tensors of its inner width. Norms of queries and keys keep theirs too.
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
    """Bytes per position of one layer's forward without gradient, at its widest: the MLP's inner tensors, or queries
    and their norm in float32, beside the residual stream."""
    queries = shape.heads * shape.head_dim
    return max(3 * b * shape.intermediate, (8 + b) * queries) + 2 * b * shape.hidden


class _Memory:
    """The numbers of one recipe, and the lines of each phase's moments."""

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
            f"{student.name} ({student.parameters / 1e9:.2f} B parameters) learns from {teacher.name}"
            f" ({teacher.parameters / 1e9:.2f} B, {config.teacher.precision})",
            f"{ranks} ranks: dp {self.dp} x cp {self.cp} x tp {self.tp}, the teacher's packs on {self.group} each;"
            f" packs of at most {self.tokens} tokens, the teacher's {self.teacher_tokens}",
        )

    # ---- what stays, and what two phases share ----

    def kept(self, training: bool = False) -> Lines:
        """Float32 shards of Student: weights, and AdamW's two moments, which appear with the first optimizer step.

        The moments are on the device while training, and at other times unless they wait in host memory.
        """
        weights = 0 if self.on_host else 4 * self.student.parameters // self.shards
        here = not self.on_host and (training or not self.offloads)
        lines = {"master weights": weights, "optimizer state": 2 * weights if here else 0}
        context = self.config.distillation.context_distillation
        if context.enabled and context.mode == "self_ema":
            lines["teacher's average"] = weights  # FollowingTeacher's, shard by shard as the student's
        if not self.cuda:
            lines |= {"teacher shards": self.teacher_shards, **self.engine_lines()}
        return lines

    @property
    def teacher_shards(self) -> int:
        """Of the teacher's own dtype from the first to the last moment; a float32 copy is never made."""
        return self.teacher_b * self.teacher.parameters // self.shards

    def gathered(self, shape: ModelShape, b: int, tp: int, stays: bool) -> Lines:
        """FSDP's whole parameters in the compute dtype: one layer at work and the next on its way, or all where they
        stay (reshard_after_forward false); embedding, head and last norm, the root's, from begin to end of a pass."""
        layers = shape.layers if stays else min(2, shape.layers)
        return {
            "gathered layers": layers * b * shape.layer // tp,
            "gathered embedding and head": b * shape.root // tp,
        }

    def engine_lines(self) -> Lines:
        """The engine awake. vLLM takes gpu_memory_utilization of the card, its cache what its weights leave of that;
        the transformers engine holds a whole model and a cache for a batch of its longest answers."""
        generation, shape = self.config.policy.generation, self.student
        if generation.backend != "vllm":
            cache = self.config.policy.generation_batch_size * self.cache_of_window()
            return {"engine's weights": self.b * shape.parameters, "engine's cache": cache}
        weights = self.b * shape.parameters // self.engine_tp
        if not self.cuda:
            return {"engine's weights": weights, "engine's cache": CPU_CACHE}
        if self.card is None:
            return {"engine's weights": weights}
        share = int(generation.vllm_cfg.gpu_memory_utilization * self.card)
        return {"engine's weights": weights, "engine's cache": max(share - weights, 0)}

    def cache_of_window(self) -> int:
        """Keys and values of one answer as long as the window, on one rank of an engine."""
        generation, shape = self.config.policy.generation, self.student
        vllm = generation.backend == "vllm"
        window = generation.vllm_cfg.max_model_len if vllm else self.config.policy.max_total_sequence_length
        heads = shape.kv_heads // min(self.engine_tp, shape.kv_heads) if vllm else shape.kv_heads
        return 2 * self.b * shape.layers * heads * shape.head_dim * window

    def targets(self) -> Lines:
        """Teacher.targets of all answers of a step, on the device until the student has trained on them: K ids (int32)
        and log-probs, log tail and entropy in float32; or hidden rows and a copy of the whole head."""
        loop, shape = self.config.distillation, self.teacher
        answers = -(-loop.num_prompts_per_step * loop.num_generations_per_prompt // self.dp)
        rows = -(-answers * self.longest_answer() // self.cp)
        if self.gives_rows:
            return {"targets": self.teacher_b * shape.hidden * (rows + shape.vocab)}
        return {"targets": 8 * (loop.topk_logits_k + 1) * rows}

    @property
    def gives_rows(self) -> bool:
        """Whether the teacher hands on hidden rows, as in Teacher."""
        return self.config.loss_fn.support == "student" or self.config.distillation.topk_logits_k == 0

    def longest_answer(self) -> int:
        """Response tokens of an answer at most."""
        policy = self.config.policy
        return min(policy.generation.max_new_tokens, policy.max_total_sequence_length - 1)

    def chunk(self, own: int | None, rows: int, vocab: int, buffers: int = 2) -> int:
        """Rows whose logits exist at a time: as a key says, or within the loss's budget."""
        set_rows = own or self.config.runtime.logits_chunk_rows
        return min(set_rows or rows_within_budget(self.cuda, vocab, buffers), rows)

    # ---- the phases ----

    def sync(self) -> list[Lines]:
        """GatheredWeights into the engine's own weights: two buckets at a time (whole tensors, and this rank's part of
        them), none smaller than the largest tensor; then the probe, a short forward beside the whole engine."""
        policy, shape = self.config.policy, self.student
        bucket = max(self.config.runtime.sync_bucket_mib * 2**20, self.b * shape.embedding)
        bucket = min(bucket, self.b * shape.parameters)
        awake = self.engine_lines()
        weights = {"engine's weights": awake["engine's weights"]}
        gathered = self.gathered(shape, self.b, self.tp, not policy.dtensor_cfg.reshard_after_forward)
        buckets = {"sync buckets": 2 * (bucket + bucket // self.shards)}
        return [self.kept() | weights | buckets, self.kept() | awake | gathered]

    def generate(self) -> list[Lines]:
        """The engine beside the student's shards."""
        return [self.kept() | self.engine_lines()]

    def judge(self) -> list[Lines]:
        """Teacher.targets: shards back on the device; a layer's forward over a rank's part of a pack (a larger group
        of the teacher's reads as many packs more, so the part stays); or float32 logits of a chunk of rows (twice where
        PyTorch reduces them), the head being whole."""
        config, shape, b = self.config, self.teacher, self.teacher_b
        positions = -(-self.teacher_tokens // (self.tp * self.cp))
        stays = not config.teacher.dtensor_cfg.reshard_after_forward
        lines = self.kept() | {"teacher shards": self.teacher_shards} | self.targets()
        lines |= self.gathered(shape, b, 1, stays)
        rows = self.chunk(config.teacher.logprob_chunk_size, positions, shape.vocab)
        logits = 0 if self.gives_rows else (4 if self.triton else 8) * rows * shape.vocab
        return [
            # A layer's input is there too, and the first one's to the end.
            lines | {"teacher's working set": (read_by_layer(shape, b) + 2 * b * shape.hidden) * positions},
            lines | {"teacher's working set": b * shape.hidden * positions, "logits chunk": logits},
        ]

    def train(self) -> list[Lines]:
        """Student.train at three moments, gradients of an earlier micro-batch being there: the head inside the forward,
        a layer's backward with the reduction of the one before it, and the root's reduction or the optimizer's step.

        Activation checkpointing keeps the input of each layer and makes one layer's again; a layer's backward holds
        two more tensors of the inner and of the residual width.
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
        root = {"gathered embedding and head": gathered["gathered embedding and head"]}
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
                "embedding's and head's gradient": 4 * head,
            },
            kept
            | gathered
            | {
                "saved activations": saved,
                "one layer's working set": working,
                "gradient reduction": (b + 2 * 4) * shape.layer // tp,
                "embedding's and head's gradient": b * head,
            },
            kept
            | root
            | {
                "gradient reduction": 4 * shape.root // tp,
                # Of a tied matrix the embedding's part is whole before it is added to the head's.
                "embedding's and head's gradient": b * (shape.embedding + (shape.head or shape.embedding)) // tp,
                # Of a tensor's shard: its norm in float64, or the update's two temporaries; foreach makes all at once.
                "optimizer's temporaries": 0 if self.on_host else 8 * largest,
            },
        ]

    def logits_bytes(self) -> int:
        """Bytes per element of [C, V / tp] in fused_linear_kl: logits in float32 and their gradient in the compute
        dtype; PyTorch's passes need a spare in float32; the whole vocabulary both models' logits and two spares."""
        b, rounded = self.b, self.config.loss_fn.logits_dtype == "bfloat16"
        if self.config.distillation.topk_logits_k == 0:
            return 16 + b + (2 if rounded else 0)
        cast = b if b < 4 else 0
        own = 4 + (4 + cast if not self.triton else cast)
        if self.triton and rounded:
            own = 2
        return own + (4 if self.gives_rows else 0)

    def host(self) -> Lines:
        """Pinned: the teacher's FrozenOffload, the optimizer's state outside its phase, or all that the student keeps.
        And the copy of a checkpoint while it is written."""
        context, saving = self.config.distillation.context_distillation, self.config.checkpointing
        state = 4 * self.student.parameters // self.shards
        average = state if context.enabled and context.mode == "self_ema" else 0
        lines = {"teacher shards": self.teacher_shards}
        if saving.enabled:
            lines["checkpoint on its way"] = state * (3 if saving.save_optimizer else 1) + average
        if self.on_host:
            lines |= {"master weights": state, "gradients": state, "optimizer state": 2 * state}
            return lines | ({"teacher's average": average} if average else {})
        return lines | ({"optimizer state": 2 * state} if self.offloads else {})


def _pack_tokens(config: Config, dp: int) -> tuple[int, int]:
    """Tokens of the largest pack that the student and the teacher read: a budget, or one answer that is longer.

    A budget counts the longer view, so the student's part of a pack can be as long as all of it. No pack has more than
    one rank's answers of an optimizer batch.
    """
    policy, student = config.policy, config.policy.max_total_sequence_length
    same = not config.distillation.context_distillation.enabled
    teacher = student if same else config.teacher.max_total_sequence_length
    answers = -(-policy.train_global_batch_size // dp)
    for batching in (policy.sequence_packing, policy.dynamic_batching):
        if batching.enabled:
            budget = batching.train_mb_tokens
            return min(max(budget, student), answers * student), min(max(budget, teacher), answers * teacher)
    answers = min(answers, policy.train_micro_batch_size)
    return answers * student, answers * teacher
