"""The keys of the two models: policy.* (the student) and teacher.*."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["bfloat16", "float32", "auto"]
"""auto: what the machine multiplies fast, decided when the configuration is read; a Config that was read has none."""
"""The compute dtype; master weights, reduction and loss are float32 in both."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and what its chat template is given."""

    name: str = "Qwen/Qwen3-1.7B-Base"
    """Hub name or folder. Left out: the model's."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Passed to the chat template, such as {enable_thinking: false}."""
    chat_template: str | None = None
    """A Jinja file to use as chat template; null: the tokenizer's own. Null for the teacher: its own, or
    policy.tokenizer.chat_template where teacher and student are the same model."""


@dataclass(frozen=True)
class DtensorConfig:
    """How the model is spread over ranks: FSDP2 over all of them, tensor and context parallelism inside."""

    enabled: bool = True
    """FSDP2; there is no other way here, so false is refused."""
    tensor_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    context_parallel_size: int = 1
    """Ranks that share a sequence's positions."""
    activation_checkpointing: bool = True
    """Compute activations again in the backward instead of keeping them."""
    cpu_offload: bool = False
    """Keep parameters and optimizer in host memory."""
    replicate_size: int = 1
    """Groups of ranks that hold a whole sharded model each, one a node, say (HSDP): gathers stay inside a group, and
    gradients are summed over the groups."""
    sequence_parallel: bool = False
    """Split activations between matrices over the tensor-parallel ranks too."""
    custom_parallel_plan: dict[str, str] | None = None
    """Tensor parallelism by module of the model's body (layers.*.mlp.up_proj: colwise, say); null: the family's own."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward (less memory) instead of after its backward (less traffic)."""


@dataclass(frozen=True)
class BatchingConfig:
    """Micro-batches by tokens instead of by number of sequences."""

    enabled: bool = False
    """Use the token budgets below."""
    train_mb_tokens: int = 8192
    """Tokens of a training micro-batch at most. Left out: max_total_sequence_length * train_micro_batch_size."""
    logprob_mb_tokens: int = 8192
    """Not used: the teacher reads the student's micro-batches, whose budget counts the longer of the two views."""


@dataclass(frozen=True)
class OptimizerKwargs:
    """AdamW's arguments."""

    lr: float = 2e-5
    """Learning rate at its peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    foreach: bool = False
    """torch's multi-tensor form."""
    fused: bool = False
    """torch's fused form."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["torch.optim.AdamW"] = "torch.optim.AdamW"
    """AdamW."""
    kwargs: OptimizerKwargs = field(default_factory=OptimizerKwargs)
    """Its arguments."""


@dataclass(frozen=True)
class SchedulerStage:
    """One entry of policy.scheduler: a stage (name and kwargs), or the milestones between stages."""

    name: (
        Literal[
            "torch.optim.lr_scheduler.LinearLR",
            "torch.optim.lr_scheduler.ConstantLR",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
        ]
        | None
    ) = None
    """The torch scheduler; null in the entry that holds the milestones."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its arguments: LinearLR start_factor, end_factor, total_iters; ConstantLR factor, total_iters;
    CosineAnnealingLR T_max, eta_min."""
    milestones: tuple[int, ...] = ()
    """Steps at which the next stage begins, one fewer than there are stages."""


def reference_scheduler(warmup: int = 10) -> tuple[SchedulerStage, ...]:
    """The base recipe's learning rate: a tenth of it rising linearly to all of it over ``warmup`` steps, then level."""
    return (
        SchedulerStage(
            "torch.optim.lr_scheduler.LinearLR", {"start_factor": 0.1, "end_factor": 1.0, "total_iters": warmup}
        ),
        SchedulerStage("torch.optim.lr_scheduler.ConstantLR", {"factor": 1.0, "total_iters": 10_000_000_000}),
        SchedulerStage(milestones=(warmup,)),
    )


@dataclass(frozen=True)
class VllmConfig:
    """The vLLM engine."""

    async_engine: bool = False
    """Must be false: the engine is driven in step with training."""
    precision: Precision = "bfloat16"
    """Compute dtype of the engine: that of policy.precision, which it is when left out."""
    kv_cache_dtype: Literal["auto"] = "auto"
    """Dtype of the key-value cache: the compute dtype."""
    logprobs_mode: Literal["processed_logprobs"] = "processed_logprobs"
    """Log-probs of sampled tokens are those of the distribution sampled from."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that make one engine."""
    pipeline_parallel_size: int = 1
    """Must be 1."""
    expert_parallel_size: int = 1
    """Must be 1."""
    gpu_memory_utilization: float = 0.6
    """Share of the GPU's memory that an engine takes while awake."""
    max_model_len: int = 8192
    """The engine's window in tokens. Left out: policy.max_total_sequence_length."""
    enforce_eager: bool = False
    """No CUDA graphs."""


@dataclass(frozen=True)
class ColocatedConfig:
    """Where generation runs."""

    enabled: bool = True
    """On the GPUs that train; there is no other way here, so false is refused."""


@dataclass(frozen=True)
class GenerationConfig:
    """How the student's answers are sampled."""

    backend: Literal["vllm", "transformers"] = "vllm"
    """vllm: fast; transformers: plain, slow, and needs nothing more."""
    max_new_tokens: int = 8192
    """Longest answer in tokens. Left out: policy.max_total_sequence_length (prompt and answer together)."""
    temperature: float = 1.0
    """Sampling temperature; it also divides both models' logits in the loss unless loss_fn.temperature is set."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the loss no longer sees what was sampled, so it needs distillation.allow_degenerate."""
    top_k: int | None = None
    """Sample from the k likeliest tokens; null: all. Needs distillation.allow_degenerate like top_p."""
    val_temperature: float = 1.0
    """Temperature in validation. Left out: temperature."""
    val_top_p: float = 1.0
    """top_p in validation. Left out: top_p."""
    val_top_k: int | None = None
    """top_k in validation. Left out: top_k."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end an answer; null: those of both models' generation configs."""
    stop_strings: tuple[str, ...] | None = None
    """Texts that end an answer; null: none."""
    vllm_cfg: VllmConfig = field(default_factory=VllmConfig)
    """Settings of vLLM."""
    vllm_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's engine, passed as they are."""
    colocated: ColocatedConfig = field(default_factory=ColocatedConfig)
    """Where generation runs."""


@dataclass(frozen=True)
class PolicyConfig:
    """The student."""

    model_name: str = "Qwen/Qwen3-1.7B-Base"
    """Hub name or folder of the student."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Its tokenizer."""
    train_global_batch_size: int = 64
    """Answers of one optimizer step; divides num_prompts_per_step * num_generations_per_prompt."""
    train_micro_batch_size: int = 1
    """Answers of one forward and backward on a rank, where neither batching by tokens is enabled."""
    generation_batch_size: int = 64
    """Answers that the transformers engine samples at a time on a rank."""
    logprob_batch_size: int = 1
    """Not used: the teacher reads the student's micro-batches."""
    max_total_sequence_length: int = 8192
    """Prompt and answer together, in tokens."""
    precision: Precision = "bfloat16"
    """Compute dtype; master weights and gradient reduction are float32. auto: bfloat16 on GPUs and on processors with
    bfloat16 arithmetic, float32 elsewhere, where bfloat16 is ten to sixty times slower."""
    logprob_chunk_size: int | None = None
    """As runtime.logits_chunk_rows, under the reference's name; null: that one."""
    dtensor_cfg: DtensorConfig = field(default_factory=DtensorConfig)
    """How the model is spread over ranks."""
    dynamic_batching: BatchingConfig = field(default_factory=BatchingConfig)
    """Micro-batches by tokens, sequences sorted by length."""
    sequence_packing: BatchingConfig = field(default_factory=BatchingConfig)
    """Micro-batches by tokens, packed; here both are packed without padding."""
    make_sequence_length_divisible_by: int = 1
    """Not used: nothing is padded."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; null: not clipped."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    scheduler: tuple[SchedulerStage, ...] = field(default_factory=reference_scheduler)
    """The learning rate's course: stages, then the milestones between them; stepped once a step, not once an optimizer
    batch. Empty: constant."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How answers are sampled."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen teacher. It neither trains nor generates, so the keys for that don't exist here."""

    model_name: str = "Qwen/Qwen3-4B"
    """Hub name or folder of the teacher."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig("Qwen/Qwen3-4B"))
    """Its tokenizer; it must agree with the student's."""
    max_total_sequence_length: int = 8192
    """The teacher's window in tokens: what it reads and the answer. Left out: policy.max_total_sequence_length."""
    precision: Precision = "bfloat16"
    """Dtype of its weights and arithmetic. Left out: policy.precision."""
    logprob_batch_size: int = 1
    """Not used: the teacher reads the student's micro-batches."""
    logprob_chunk_size: int | None = None
    """As policy.logprob_chunk_size."""
    dtensor_cfg: DtensorConfig = field(default_factory=DtensorConfig)
    """How the model is spread over ranks."""
    dynamic_batching: BatchingConfig = field(default_factory=BatchingConfig)
    """Not used: the teacher reads the student's micro-batches."""
    sequence_packing: BatchingConfig = field(default_factory=BatchingConfig)
    """Not used: the teacher reads the student's micro-batches."""
