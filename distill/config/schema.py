"""The recipe's keys as frozen dataclasses; the attribute path of a value is its key path.

``--help`` prints the docstrings. "Default: ..." names the key that a value is derived from if no recipe sets it
(DERIVED_DEFAULTS in load.py). rules.py has ranges and rules between keys; nemo_compat.py has keys without effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config.models import PolicyConfig, TeacherConfig

Outside = Literal["bucket", "renormalize", "floor"]
"""Treatment of the vocabulary outside the top-k in the loss."""


@dataclass(frozen=True)
class TraceExtractorConfig:
    """Extraction of the trace (a part with reasoning) from a response or from a dataset's column."""

    type: Literal["think_tag", "full_text"] = "think_tag"
    """think_tag: the text between the think_tags; full_text: the complete text of a column."""
    think_tags: tuple[str, str] = ("<think>", "</think>")
    """Tags that open and close a think block, for traces and for grading ([THINK] and [/THINK] for Mistral). If a
    chat template ends the prompt with the opening tag, the response starts inside a think block."""
    selection: Literal["first", "last", "longest"] = "first"
    """Which of several think blocks to use; longest counts characters and prefers the first of equal blocks."""
    unclosed_span: Literal["to_end", "ignore"] = "to_end"
    """Treatment of a think block without closing tag, as in a truncated response. to_end: it extends to the end of the
    text; ignore: it is not used."""
    missing_trace_policy: Literal["empty", "drop_sample"] = "empty"
    """Treatment of a response without a trace. empty: use an empty trace; drop_sample: do not train on the response."""


@dataclass(frozen=True)
class StaticTraceConfig:
    """Traces from the dataset."""

    answer_column: str | None = None
    """Column with the traces, by name or dotted path. Every row must have it, with text or null."""


@dataclass(frozen=True)
class ContextMetricsConfig:
    """Metrics of context distillation."""

    enabled: bool = True
    """Report trace coverage, prefix truncation and dropped responses."""


@dataclass(frozen=True)
class ContextDistillationConfig:
    """Context distillation: before the response, the teacher reads a template with problem and trace."""

    enabled: bool = False
    """Give the teacher teacher_prefix_template instead of the student's prompt."""
    mode: Literal["self_frozen", "self_ema", "self_live", "frozen"] = "self_frozen"
    """The teacher. self_frozen: the student before training; self_ema: a moving average of the student (ema_decay);
    self_live: the current student; frozen: teacher.model_name, any model with the student's tokenizer."""
    ema_decay: float = 0.99
    """Decay of the moving average per step, for mode self_ema."""
    overflow_policy: Literal["truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"] = "truncate_trace"
    """Treatment of prefix and response above teacher.max_total_sequence_length. truncate_trace: cut the end of the
    trace, and drop the response if it does not fit without a trace; truncate_prefix_only: keep the last tokens of the
    prefix; truncate_prefix_from_end: keep its first tokens. Responses are never cut."""
    teacher_prefix_template: str = "You are given a problem and a trace: {problem} + {trace}. Solve it on your own."
    """Text for the teacher, with {problem} (the dataset's text, without prompt file) and optionally {trace}. Any other
    word in braces is refused. Doubled braces become literal braces ({{word}}: {word}); all other braces are literal."""
    chat_template: bool = True
    """Use the filled template as a user message in the model's chat template; false: as plain text."""
    trace_source: Literal["dynamic", "static_dataset"] = "dynamic"
    """Source of the trace. dynamic: the response itself, so that the teacher reads it before scoring it;
    static_dataset: the column static_trace.answer_column."""
    static_trace: StaticTraceConfig = field(default_factory=StaticTraceConfig)
    """Traces from the dataset, for trace_source static_dataset."""
    trace_extractor: TraceExtractorConfig = field(default_factory=TraceExtractorConfig)
    """Extraction of the trace."""
    metrics: ContextMetricsConfig = field(default_factory=ContextMetricsConfig)
    """Metrics of context distillation."""

    @property
    def trace_column(self) -> str | None:
        """Return the dataset's column with the traces, or None if traces do not come from the dataset."""
        return self.static_trace.answer_column if self.enabled and self.trace_source == "static_dataset" else None


@dataclass(frozen=True)
class DistillationConfig:
    """The training loop."""

    num_prompts_per_step: int = 128
    """Number of prompts per step (P)."""
    num_generations_per_prompt: int = 1
    """Number of responses per prompt (G)."""
    max_num_steps: int = 1000
    """Maximum number of steps."""
    max_num_epochs: int = 10
    """Maximum number of passes over the training data."""
    val_period: int = 20
    """Number of steps between validations; 0: no periodic validation."""
    val_at_start: bool = False
    """Validate before the first step. If the teacher's context needs no response, also measure the accuracy of the
    student with the context in its prompt."""
    val_at_end: bool = False
    """Validate after the last step."""
    max_val_samples: int | None = 512
    """Maximum number of problems per validation, taken in turn from each dataset; null: all."""
    val_num_generations: int = 1
    """Number of responses per held-out problem (n in the accuracy avg@n)."""
    topk_logits_k: int = 64
    """Number of most likely tokens per position in the loss (K); 0: the complete vocabulary."""
    seed: int = 42
    """Seed of data order, sampling and the assignment of responses to optimizer batches."""
    allow_degenerate: bool = False
    """Allow runs in which the student cannot learn from the teacher (the same model with the same prompts, truncated
    sampling), for controls."""
    context_distillation: ContextDistillationConfig = field(default_factory=ContextDistillationConfig)
    """Context distillation."""


@dataclass(frozen=True)
class LossConfig:
    """The divergence between teacher and student at every response token."""

    kl_type: Literal["mixed", "forward", "reverse", "jsd", "sampled"] = "mixed"
    """Divergence. forward: KL(teacher || student); reverse: KL(student || teacher); mixed: both, weighted by
    mixed_kl_weight; jsd: generalized Jensen-Shannon divergence, with jsd_beta; sampled: KL(student || teacher)
    estimated from the sampled token, with log student - log teacher as the cost of a policy gradient."""
    mixed_kl_weight: float = 0.5
    """Weight of KL(teacher || student) in kl_type mixed; KL(student || teacher) has the remaining weight."""
    jsd_beta: float = 0.5
    """b in b KL(teacher || m) + (1 - b) KL(student || m) with m = b teacher + (1 - b) student; between 0 and 1."""
    importance_ratio_cap: float = 2.0
    """Maximum of a token's importance ratio (trainer's probability / sampler's) in kl_type sampled."""
    support: Literal["teacher", "student"] = "teacher"
    """Model whose distillation.topk_logits_k most likely tokens are compared. With student, the teacher's LM head stays
    on the GPU during training to score them."""
    token_kl_cap: float | None = None
    """Maximum loss of a token, in nats. The weight of a token above it is reduced, so its gradient stays above zero;
    null: no maximum."""
    zero_outside_topk: bool | None = None
    """NeMo-RL's name for outside_topk. false: renormalize; true: floor; null: as outside_topk. The one of the two keys
    that is set last counts."""
    outside_topk: Outside | None = None
    """Vocabulary outside the top-k. bucket: one more outcome with the summed probability (a lower bound of the full
    KL); renormalize: ignored, both models are renormalized over the top-k; floor: teacher log-prob -100; null: as
    zero_outside_topk, or bucket if that is null."""
    temperature: float | None = None
    """Divisor of both models' logits in the loss; null: policy.generation.temperature."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the student's logits. bfloat16 is faster, with an error of about 0.02 nats per log-prob. The teacher's
    logits are float32."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Implementation. auto: Triton kernels on GPUs, PyTorch on CPUs; torch: PyTorch."""

    @property
    def outside(self) -> Outside:
        """Return the treatment outside the top-k, from outside_topk and zero_outside_topk."""
        if self.outside_topk is not None:
            return self.outside_topk
        if self.zero_outside_topk is None:
            return "bucket"
        return "floor" if self.zero_outside_topk else "renormalize"


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset, from the hub or from files. data.default fills the keys that data.train and data.validation omit."""

    dataset_name: str | None = None
    """Known name (DeepScaler, AIME2024) or hub path (openai/gsm8k). Set either this or data_path; the later one
    counts."""
    data_path: str | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .xz, .zst), or a folder of them."""
    input_key: str | None = None
    """Column with the problem; null: that of the known dataset, or "input"."""
    output_key: str | None = None
    """Column with the gold answer; null: that of the known dataset, or "output"."""
    output_pattern: str | None = None
    """Regular expression that finds the gold answer in its column: the group of the last match, or without a group the
    text after the last match ("####" for GSM8K); null: that of the known dataset, or the complete column."""
    subset: str | None = None
    """Configuration of the hub dataset (main for openai/gsm8k)."""
    split: str | None = None
    """Split; null: that of the known dataset, or train."""
    prompt_file: str | None = None
    """Text file with {} in place of the problem, and braces as in teacher_prefix_template; null: the problem alone."""
    system_prompt_file: str | None = None
    """Text file with the system message; null: no system message."""
    env_name: str | None = "math"
    """Grader of the text after a response's last think block. math: math-verify finds it equal to the gold answer;
    exact: it equals the gold answer; regex: the gold answer is a regular expression that matches in it; choice: it
    selects the option, A to J, of the gold answer; null: no grading."""
    repeat: int = 1
    """Number of times that an epoch contains the dataset (AIME2024 with 16: 30 problems, 480 responses)."""


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out problems."""

    max_input_seq_length: int = 8192
    """Maximum number of tokens in a prompt; longer prompts are skipped and counted. Default:
    policy.max_total_sequence_length."""
    shuffle: bool = True
    """Shuffle the training data, by seed and epoch."""
    default: DatasetConfig = field(default_factory=DatasetConfig)
    """Values of keys that data.train and data.validation omit."""
    train: tuple[DatasetConfig, ...] = ()
    """Training data: a dataset, or a list of datasets to concatenate."""
    validation: tuple[DatasetConfig, ...] = ()
    """Held-out data: a dataset, a list, or null."""


@dataclass(frozen=True)
class CheckpointingConfig:
    """Checkpoints. A run resumes from the newest checkpoint in checkpoint_dir."""

    enabled: bool = True
    """Save checkpoints in the background, and resume from them."""
    checkpoint_dir: str = "checkpoints/distillation"
    """Folder of the checkpoints step_N. Every run needs its own."""
    metric_name: str | None = "val:accuracy"
    """Metric that ranks checkpoints, val:NAME or train:NAME; null: the step."""
    higher_is_better: bool = True
    """Whether higher values of the metric are better."""
    keep_top_k: int | None = 3
    """Number of best checkpoints to keep; the newest is always kept; null: all. Checkpoints without a value of the
    metric rank last."""
    save_period: int = 10
    """Number of steps between checkpoints. The last step is always saved."""
    checkpoint_must_save_by: str | None = None
    """Time limit after the start, DD:HH:MM:SS: the run saves before it and exits with code 0; null: no limit."""
    save_consolidated: bool = False
    """Write a Hugging Face export with every checkpoint; false: only with the last."""
    allow_changes: bool = False
    """Resume with other training data, prompts or prompt order: the step number continues, and the change is logged
    and recorded. false: such a run is refused."""
    save_optimizer: bool = True
    """Save the optimizer state. Without it, a resumed run starts with zero moments and logs a warning."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    project: str = "distill"
    """Project."""
    name: str | None = None
    """Name of the run; null: the name of the run's folder."""
    entity: str | None = None
    """Team or user; null: the default of the account."""
    group: str | None = None
    """Group of runs."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Mode; null: the environment variable WANDB_MODE."""


@dataclass(frozen=True)
class LoggerConfig:
    """Destinations of metrics, in addition to the console and metrics.jsonl in the run's folder."""

    log_dir: str = "logs/distillation"
    """Folder of the run folders exp_001, exp_002, ... if runtime.run_dir is null."""
    num_val_samples_to_print: int = 5
    """Number of responses shown on the console per validation."""
    wandb_enabled: bool = True
    """Write to Weights & Biases."""
    tensorboard_enabled: bool = True
    """Write TensorBoard events to the run's folder."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Settings of Weights & Biases."""


@dataclass(frozen=True)
class ClusterConfig:
    """Number of ranks, checked at start: one rank per GPU, or one per process on CPUs."""

    gpus_per_node: int = 8
    """Ranks per node."""
    num_nodes: int = 1
    """Number of nodes."""
    gpu_memory_gb: float | None = None
    """Memory of a GPU as in its name (40 for A100-40GB), counted as 98% of that number of GiB. A run that does not fit
    is refused at start and by --dry-run; null: no check."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Execution of the program. These keys do not change what a step computes."""

    run_dir: str | None = None
    """Folder of the run; null: the next logger.log_dir/exp_NNN."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: cuda if available."""
    sync_bucket_mib: int = 512
    """Size in MiB of a bucket of weights in the sync from student to engine."""
    share_prefixes: bool = True
    """Compute a prompt once for all its responses in a micro-batch. With a token budget, responses to a prompt are
    placed in the same micro-batch if possible."""
    offload_optimizer: bool = True
    """Keep optimizer moments in pinned host memory except during training and checkpoints. No effect on CPUs."""
    logits_chunk_rows: int | None = None
    """Number of rows of logits in memory; null: a number that fits a memory budget (2048 rows of 151,936 on CUDA)."""
    phase_timeout_s: int = 1800
    """Seconds without progress on any rank after which a phase counts as hung and the run ends."""
    verify_teacher: bool = True
    """Compare the sharded teacher with the plain model at the first start of a run; reads its checkpoint once more."""


@dataclass(frozen=True)
class Config:
    """A complete recipe: parents and overrides merged, interpolations resolved, rules checked."""

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The training loop."""
    loss_fn: LossConfig = field(default_factory=LossConfig)
    """The divergence between teacher and student at every response token."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The student: model, batches, parallelism, optimizer, generation."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and held-out problems."""
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    """Checkpoints."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Destinations of metrics."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Number of ranks."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Execution of the program."""
