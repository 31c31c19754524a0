"""Configuration keys of the two models: policy.* (the student) and teacher.*."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["bfloat16", "float32", "auto"]
"""Compute dtype. Master weights, gradient reduction and loss are always float32.

``load_config`` replaces ``auto`` by a dtype.
"""


Recomputation = Literal["none", "selective", "full"]
"""Activations inside layers that the backward pass recomputes."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer of the student or the teacher, and its chat template."""

    name: str = "Qwen/Qwen3-1.7B-Base"
    """Hub name or folder of the tokenizer. Default: the model_name in the same section (policy or teacher)."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, such as {enable_thinking: false}; null: no arguments. For the teacher, null means
    the value of policy.tokenizer.chat_template_kwargs."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template; null: no replacement. For a teacher with the student's
    model_name, null means the value of policy.tokenizer.chat_template."""


@dataclass(frozen=True)
class TeacherDtensorConfig:
    """Parallelism of the teacher, which is sharded over all ranks."""

    tensor_parallel_size: int = 1
    """Number of ranks over which the weight matrices of each layer are split."""
    context_parallel_size: int = 1
    """Number of ranks over which the positions of each sequence are split."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after the layer's forward pass (less memory); false: keep them (less
    communication)."""

    @property
    def group_size(self) -> int:
        """Return the number of ranks that process a micro-batch together."""
        return self.tensor_parallel_size * self.context_parallel_size


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA): for each selected weight, two small matrices A and B are trained in its place.

    A linear layer then returns ``W x + alpha / dim * B (A x)``. In a self_* mode of context distillation, the teacher
    is the student's model with other adapters or none, without a copy of the weights.
    """

    enabled: bool = False
    """Train adapters and freeze the model's weights; false: train all weights. Adapters need a value of
    policy.optimizer.kwargs.lr about ten times that of a training of all weights."""
    dim: int = 8
    """Rank of the adapters: the number of rows of A and of columns of B."""
    alpha: float = 32.0
    """Scale of the adapters: the product of B and A is multiplied by alpha / dim."""
    dropout: float = 0.0
    """Dropout of the adapters' input. 0 is the only choice, because dropout would change the student's outputs and not
    the teacher's."""
    target_modules: tuple[str, ...] = ()
    """Patterns of the linear layers that get adapters, such as q_proj or *.mlp.up_proj. ``*`` matches any text; a
    pattern is compared with a module's complete name, and with the last part of the name. Patterns take precedence over
    match_all_linear. The embedding and the LM head never get adapters."""
    exclude_modules: tuple[str, ...] = ()
    """Patterns, as in target_modules, of linear layers that get no adapters."""
    match_all_linear: bool = True
    """Select all linear layers of the decoder layers if target_modules is empty. false without target_modules requires
    exclude_modules, and selects all layers except these."""
    lora_A_init: Literal["xavier", "kaiming"] = "xavier"
    """Initial values of A. xavier: a normal distribution; kaiming: a uniform distribution, the default of peft. B
    starts at 0, so that the student starts as the model in policy.model_name."""
    init_from: str | None = None
    """Folder of an adapter in the format of peft, whose values replace the initial ones; its rank, alpha and modules
    must equal those of this section. A checkpoint of the run takes precedence. null: new adapters. With an adapter, the
    teacher in mode self_frozen is the base with this adapter."""


@dataclass(frozen=True)
class DtensorConfig(TeacherDtensorConfig):
    """Parallelism of the student: FSDP2 over all ranks, combined with tensor and context parallelism."""

    activation_checkpointing: bool | Literal["auto", "selective"] = "auto"
    """Recompute activations in the backward pass instead of storing them. true: all activations inside layers;
    selective: all except the results of attention and matrix multiplications, which are expensive to compute; false:
    none. auto: the fastest of false, selective and true whose memory forecast fits the GPU; true on a CPU and if the
    memory of the GPU is unknown."""
    cpu_offload: bool = False
    """Keep parameters and optimizer state in host memory."""
    replicate_size: int = 1
    """Number of replicas of the sharded model (HSDP), for example one per node. Parameters are gathered within a
    replica; gradients are summed over all replicas."""
    custom_parallel_plan: dict[str, str] | None = None
    """Tensor-parallel plan: maps module names to colwise, rowwise or replicated_with_grad_allreduce, for example
    layers.*.mlp.up_proj: colwise. Each module has one allowed style: a plan can only select the attention and MLP
    blocks that are split, and must list all modules of such a block. The embedding and the LM head are always split by
    vocabulary. null: the predefined plan of the model family."""
    lora_cfg: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters (LoRA): train two small matrices for each weight, and freeze the weights."""

    @property
    def recomputation(self) -> Recomputation:
        """Return the mode of activation checkpointing; an ``auto`` that was not resolved is ``full``."""
        named: dict[Any, Recomputation] = {False: "none", "selective": "selective"}
        return named.get(self.activation_checkpointing, "full")


@dataclass(frozen=True)
class BatchingConfig:
    """Token budget: limit a micro-batch by its number of tokens instead of its number of sequences."""

    enabled: bool = False
    """Limit micro-batches by the token budget."""
    train_mb_tokens: int = 8192
    """Maximum number of tokens in a micro-batch, prompts included. If a response has different prompts for student and
    teacher, the longer one counts. Default: policy.max_total_sequence_length * policy.train_micro_batch_size."""
    logprob_mb_tokens: int | Literal["auto"] = 8192
    """No effect: use the key with this name in section teacher. Default: policy.max_total_sequence_length *
    policy.logprob_batch_size."""


@dataclass(frozen=True)
class TeacherBatchingConfig:
    """Token budget of the teacher's packs. A pack joins consecutive micro-batches of the student."""

    enabled: bool = False
    """Join micro-batches of the student to larger packs for the teacher, up to the token budget. false: the teacher
    reads the student's micro-batches. The teacher's two sections have the same effect."""
    logprob_mb_tokens: int | Literal["auto"] = "auto"
    """Maximum number of tokens in a pack of the teacher, prompts included. A smaller budget than a micro-batch of the
    student has no effect, because micro-batches are not split. auto: the largest multiple of the student's budget, up
    to 65536 tokens, whose memory forecast fits the GPU; the student's budget if the memory of the GPU is unknown."""


@dataclass(frozen=True)
class OptimizerKwargs:
    """Arguments of AdamW."""

    lr: float = 2e-5
    """Base learning rate, which policy.scheduler multiplies by a factor."""
    weight_decay: float = 0.01
    """Coefficient of AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and the second moment of the gradient."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment, to avoid division by zero."""
    foreach: bool | None = None
    """Use torch's multi-tensor (foreach) implementation of AdamW; null: see fused."""
    fused: bool | None = None
    """Use torch's fused implementation of AdamW. null: on GPUs, unless foreach is true."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Class and arguments of the optimizer."""

    name: Literal["torch.optim.AdamW"] = "torch.optim.AdamW"
    """Class of the optimizer; AdamW is the only choice."""
    kwargs: OptimizerKwargs = field(default_factory=OptimizerKwargs)
    """Arguments of the optimizer."""


@dataclass(frozen=True)
class SchedulerStage:
    """One entry of policy.scheduler: a stage of the learning rate schedule, or (last) the milestones."""

    name: (
        Literal[
            "torch.optim.lr_scheduler.LinearLR",
            "torch.optim.lr_scheduler.ConstantLR",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
        ]
        | None
    ) = None
    """Scheduler class of the stage; null in the entry that lists the milestones."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the scheduler. LinearLR: start_factor, end_factor, total_iters; ConstantLR: factor, total_iters;
    CosineAnnealingLR: T_max, eta_min."""
    milestones: tuple[int, ...] = ()
    """Training steps at which the second and later stages start. Set only in the last entry of policy.scheduler; empty
    in entries that define a stage."""


def reference_scheduler(warmup: int = 10) -> tuple[SchedulerStage, ...]:
    """Return the default learning rate schedule, which is also NeMo-RL's default.

    The factor of the learning rate rises linearly from 0.1 to 1 in ``warmup`` training steps, then stays 1.
    """
    return (
        SchedulerStage(
            "torch.optim.lr_scheduler.LinearLR", {"start_factor": 0.1, "end_factor": 1.0, "total_iters": warmup}
        ),
        SchedulerStage("torch.optim.lr_scheduler.ConstantLR", {"factor": 1.0, "total_iters": 10_000_000_000}),
        SchedulerStage(milestones=(warmup,)),
    )


@dataclass(frozen=True)
class VllmConfig:
    """Settings of the vLLM engine."""

    precision: Precision = "bfloat16"
    """Compute dtype of the engine. It must equal policy.precision, which is also the default."""
    tensor_parallel_size: int = 1
    """Number of consecutive ranks that run one engine together."""
    gpu_memory_utilization: float = 0.6
    """Fraction of each GPU's memory that the engine may use during generation."""
    max_model_len: int = 8192
    """Maximum number of tokens of prompt and response together in the engine. Default:
    policy.max_total_sequence_length."""
    enforce_eager: bool = False
    """Disable CUDA graphs."""
    speculative: Literal["ngram"] | None = None
    """Speculative decoding without a draft model. ngram: vLLM proposes the tokens that followed the last tokens earlier
    in the sequence, and the model verifies them in one pass. The distribution of responses stays the same; responses
    with the same seed differ from those without speculation. It can be slower with many running responses per engine,
    and on CPU. null: no speculation."""


@dataclass(frozen=True)
class ExpectedLengthConfig:
    """Expected lengths of the training responses, in tokens, for the time forecast of --dry-run."""

    median: float | None = None
    """Median length; null: a quarter of the largest maximum of policy.generation.max_new_tokens and
    distillation.max_new_tokens_schedule, and at most p90."""
    p90: float | None = None
    """90th percentile of the length; null: three times the median."""


@dataclass(frozen=True)
class GenerationConfig:
    """Generation and sampling of the student's responses."""

    backend: Literal["vllm", "transformers"] = "vllm"
    """Engine that generates responses. vllm is fast; transformers is slow and needs no additional package."""
    max_new_tokens: int = 8192
    """Maximum number of tokens in a response, without its prompt. Default: policy.max_total_sequence_length."""
    temperature: float = 1.0
    """Sampling temperature. It also divides the logits of both models in the loss if loss_fn.temperature is null."""
    top_p: float = 1.0
    """Probability mass of nucleus sampling. A value below 1 requires distillation.allow_degenerate, because the loss
    then does not match the sampling distribution."""
    top_k: int | None = None
    """Number of most likely tokens to sample from; null: all tokens. A number requires
    distillation.allow_degenerate."""
    val_max_new_tokens: int = 8192
    """Maximum number of tokens in a response of validation. Default: policy.generation.max_new_tokens."""
    val_temperature: float = 1.0
    """Sampling temperature in validation. Default: policy.generation.temperature."""
    val_top_p: float = 1.0
    """Probability mass of nucleus sampling in validation. Default: policy.generation.top_p."""
    val_top_k: int | None = None
    """Number of most likely tokens to sample from in validation; null: all tokens. Default: policy.generation.top_k."""
    stop_token_ids: tuple[int, ...] | None = None
    """Token ids that end a response; null: the stop ids of both models' generation configs and tokenizers."""
    vllm_cfg: VllmConfig = field(default_factory=VllmConfig)
    """Settings of the vLLM engine."""
    vllm_kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of vLLM's LLM class, passed unchanged."""
    expected_length: ExpectedLengthConfig = field(default_factory=ExpectedLengthConfig)
    """Expected lengths of the responses, for the time forecast of --dry-run."""

    @property
    def engine_window(self) -> int | None:
        """Return the maximum sequence length of the vLLM engine, in tokens; None for transformers (no limit)."""
        return self.vllm_cfg.max_model_len if self.backend == "vllm" else None

    @property
    def engine_precision(self) -> Precision | None:
        """Return the compute dtype of the vLLM engine; None for transformers, which uses the student's dtype."""
        return self.vllm_cfg.precision if self.backend == "vllm" else None

    @property
    def ranks_per_engine(self) -> int:
        """Return the number of ranks that run one engine together; 1 for transformers."""
        return self.vllm_cfg.tensor_parallel_size if self.backend == "vllm" else 1


@dataclass(frozen=True)
class PolicyConfig:
    """Configuration of the student."""

    model_name: str = "Qwen/Qwen3-1.7B-Base"
    """Hub name or folder of the student model."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of the student."""
    train_global_batch_size: int = 64
    """Number of responses per optimizer step. It must divide num_prompts_per_step * num_generations_per_prompt."""
    train_micro_batch_size: int = 1
    """Number of responses per micro-batch and rank, if neither dynamic_batching nor sequence_packing is enabled."""
    generation_batch_size: int = 64
    """Number of responses that a rank generates at a time; only for policy.generation.backend=transformers."""
    logprob_batch_size: int = 1
    """No effect: the value is only a factor in the default of policy.*.logprob_mb_tokens, which has no effect
    either."""
    max_total_sequence_length: int = 8192
    """Maximum number of tokens in the student's prompt and response together."""
    precision: Precision = "bfloat16"
    """Compute dtype; master weights and gradient reduction are float32. auto: bfloat16 on GPUs and on CPUs with
    bfloat16 instructions; float32 on other CPUs, because bfloat16 is 10 to 60 times slower there."""
    logprob_chunk_size: int | None = None
    """Value that replaces runtime.logits_chunk_rows for the student (a NeMo-RL key); null: no replacement."""
    dtensor_cfg: DtensorConfig = field(default_factory=DtensorConfig)
    """Parallelism of the student."""
    dynamic_batching: BatchingConfig = field(default_factory=BatchingConfig)
    """Form micro-batches of sequences with similar lengths, up to a token budget. The sequences are packed without
    padding, as with sequence_packing."""
    sequence_packing: BatchingConfig = field(default_factory=BatchingConfig)
    """Form micro-batches up to a token budget. The sequences are packed without padding."""
    max_grad_norm: float | None = 1.0
    """Maximum norm of the gradient over all parameters. A gradient with a larger norm is scaled down; null: no
    clipping."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Class and arguments of the optimizer."""
    scheduler: tuple[SchedulerStage, ...] = field(default_factory=reference_scheduler)
    """Learning rate schedule, advanced once per training step: a list of stages, followed by one entry `milestones`
    with the training steps at which the second and later stages start. An empty list: a constant learning rate."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Generation and sampling of responses."""


@dataclass(frozen=True)
class TeacherConfig:
    """Configuration of the teacher, which neither trains nor generates."""

    model_name: str = "Qwen/Qwen3-4B"
    """Hub name or folder of the teacher model."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig("Qwen/Qwen3-4B"))
    """Tokenizer of the teacher. Its vocabulary must equal the student's."""
    max_total_sequence_length: int = 8192
    """Maximum number of tokens in the teacher's prompt and the response together. Default:
    policy.max_total_sequence_length."""
    precision: Precision = "bfloat16"
    """Dtype of the teacher's weights and computation. Default: policy.precision."""
    logprob_batch_size: int = 1
    """No effect: set teacher.*.logprob_mb_tokens instead. Default: policy.logprob_batch_size."""
    logprob_chunk_size: int | None = None
    """Value that replaces runtime.logits_chunk_rows for the teacher (a NeMo-RL key); null: no replacement."""
    dtensor_cfg: TeacherDtensorConfig = field(default_factory=TeacherDtensorConfig)
    """Parallelism of the teacher."""
    dynamic_batching: TeacherBatchingConfig = field(default_factory=TeacherBatchingConfig)
    """Token budget of the teacher's packs."""
    sequence_packing: TeacherBatchingConfig = field(default_factory=TeacherBatchingConfig)
    """Token budget of the teacher's packs, under another name."""

    @property
    def pack_tokens(self) -> int | None:
        """Return the maximum number of tokens in a pack of the teacher.

        None: the teacher reads the student's micro-batches. An ``auto`` that was not resolved is also None.
        """
        enabled = (batching for batching in (self.sequence_packing, self.dynamic_batching) if batching.enabled)
        budget = next((batching.logprob_mb_tokens for batching in enabled), None)
        return budget if isinstance(budget, int) else None
