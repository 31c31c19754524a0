"""Configuration keys as frozen dataclasses: the key policy.precision is the attribute ``config.policy.precision``.

``--help-all`` prints the docstrings of the fields. "Default: KEY" means that an unset field has the value of KEY
(DERIVED_DEFAULTS in load.py). rules.py checks ranges and rules between keys; nemo_compat.py lists keys without effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config.models import PolicyConfig, TeacherConfig

Outside = Literal["bucket", "renormalize", "floor"]
"""How the loss treats the tokens outside the top-k; the values are explained at LossConfig.outside_topk."""


BUILT_IN = "built-in defaults"
"""Name of the parent of a recipe without the key ``defaults``."""


@dataclass(frozen=True)
class TraceExtractorConfig:
    """How the trace (the reasoning) is extracted from a response, or from a text in a column of the dataset."""

    type: Literal["think_tag", "full_text"] = "think_tag"
    """Part of the text that is used as the trace. think_tag: the text between the think_tags; full_text: the complete
    text in the column of the dataset."""
    think_tags: tuple[str, str] = ("<think>", "</think>")
    """Tags that open and close a think block, for example [THINK] and [/THINK] for Mistral. They are used to extract
    traces and to find the final text that is graded. If a chat template ends the prompt with the opening tag, the
    response starts inside a think block."""
    selection: Literal["first", "last", "longest"] = "first"
    """Think block that is the trace if a text has several. longest: the block with the most characters; in a tie, the
    first of these blocks."""
    unclosed_span: Literal["to_end", "ignore"] = "to_end"
    """Treatment of a think block without a closing tag, as in a truncated response. to_end: the block extends to the
    end of the text; ignore: the block is not used."""
    missing_trace_policy: Literal["empty", "drop_sample"] = "empty"
    """Treatment of a response without a trace. empty: use an empty trace; drop_sample: do not train on the response."""


@dataclass(frozen=True)
class StaticTraceConfig:
    """Source of precomputed traces: a column of the dataset."""

    answer_column: str | None = None
    """Column with the traces, by name or dotted path; required for trace_source static_dataset. Every row of the
    dataset must have this column, with a text or null as value."""


@dataclass(frozen=True)
class ContextMetricsConfig:
    """Metrics of context distillation."""

    enabled: bool = True
    """Write metrics of the traces, of the teacher's prefixes (its prompts) and of dropped responses.
    false: only the fraction of responses with a trace is written, if the template contains {trace}."""


@dataclass(frozen=True)
class ContextDistillationConfig:
    """Context distillation: the teacher's prompt is a template filled with the problem and a trace."""

    enabled: bool = False
    """Use the filled teacher_prefix_template as the teacher's prompt; false: the teacher reads the student's prompt."""
    mode: Literal["self_frozen", "self_ema", "self_live", "frozen"] = "self_frozen"
    """Model that is the teacher. self_frozen: the student before training; self_ema: a moving average of the student's
    weights (ema_decay); self_live: the current student; frozen: teacher.model_name, which may be any model with the
    student's tokenizer."""
    ema_decay: float = 0.99
    """Decay d of the moving average in mode self_ema. After each step: teacher = d * teacher + (1 - d) * student."""
    overflow_policy: Literal["truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"] = "truncate_trace"
    """Action if the teacher's prefix (its prompt) and the response together exceed teacher.max_total_sequence_length.
    truncate_trace: remove the end of the trace, or drop the response if even the prefix without a trace is too long;
    truncate_prefix_only: keep the last tokens of the prefix; truncate_prefix_from_end: keep the first tokens of the
    prefix. Responses are never truncated."""
    teacher_prefix_template: str = "You are given a problem and a trace: {problem} + {trace}. Solve it on your own."
    """Text for the teacher, with {problem} (the problem in the dataset, without the text of prompt_file) and optionally
    {trace}. Any other word in braces is an error. Doubled braces become literal braces ({{word}} becomes {word}). All
    other braces are literal."""
    chat_template: bool = True
    """Insert the filled template as the user message into the teacher's chat template; false: use it as plain text."""
    trace_source: Literal["dynamic", "static_dataset"] = "dynamic"
    """Source of the trace. dynamic: the response itself, so the teacher reads its trace before it scores the response;
    static_dataset: the dataset's column static_trace.answer_column."""
    static_trace: StaticTraceConfig = field(default_factory=StaticTraceConfig)
    """Traces from the dataset, for trace_source static_dataset."""
    trace_extractor: TraceExtractorConfig = field(default_factory=TraceExtractorConfig)
    """How the trace is extracted from a response, or from a text in a column of the dataset."""
    metrics: ContextMetricsConfig = field(default_factory=ContextMetricsConfig)
    """Metrics of context distillation."""

    @property
    def trace_column(self) -> str | None:
        """Return the dataset's column with the traces; None if traces come from responses or are not used."""
        return self.static_trace.answer_column if self.enabled and self.trace_source == "static_dataset" else None


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of the training loop."""

    num_prompts_per_step: int = 128
    """Number of prompts per step (P)."""
    num_generations_per_prompt: int = 1
    """Number of responses per prompt (G)."""
    max_num_steps: int = 1000
    """Maximum number of training steps."""
    max_num_epochs: int = 10
    """Maximum number of passes over the training data."""
    val_period: int = 20
    """Number of training steps between validations; 0: no periodic validation."""
    val_at_start: bool = False
    """Validate before the first training step. If the teacher's prompt does not depend on a response, also measure the
    student's accuracy with the teacher's prompts."""
    val_at_end: bool = False
    """Validate after the last training step."""
    max_val_samples: int | None = 512
    """Maximum number of problems per validation, taken in turn from each validation dataset; null: all problems."""
    val_num_generations: int = 1
    """Number of responses to each validation problem (n in the accuracy avg@n)."""
    topk_logits_k: int = 64
    """Number of most likely tokens (K) over which the loss compares teacher and student at each response token; 0: the
    complete vocabulary."""
    seed: int = 42
    """Random seed of the data order, of sampling and of the assignment of responses to optimizer batches."""
    allow_degenerate: bool = False
    """Allow settings for control experiments: a teacher that is the student's model and reads the same prompts, and
    truncated sampling (top_p, top_k)."""
    context_distillation: ContextDistillationConfig = field(default_factory=ContextDistillationConfig)
    """Settings of context distillation."""


@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss: the divergence between teacher and student at every response token."""

    kl_type: Literal["mixed", "forward", "reverse", "jsd", "sampled"] = "mixed"
    """Divergence. forward: KL(teacher || student); reverse: KL(student || teacher); mixed: both, weighted by
    mixed_kl_weight; jsd: generalized Jensen-Shannon divergence, with jsd_beta; sampled: KL(student || teacher)
    estimated from the sampled token, with log student - log teacher as the cost of a policy gradient."""
    mixed_kl_weight: float = 0.5
    """Weight w in kl_type mixed: the loss is w KL(teacher || student) + (1 - w) KL(student || teacher)."""
    jsd_beta: float = 0.5
    """Weight b, between 0 and 1, of the teacher in kl_type jsd: the loss is b KL(teacher || m) +
    (1 - b) KL(student || m) with m = b teacher + (1 - b) student."""
    importance_ratio_cap: float = 2.0
    """Maximum importance ratio of a response token, for kl_type sampled; larger ratios are set to this value. The
    ratio is the student's probability of the token in training divided by its probability in generation."""
    support: Literal["teacher", "student"] = "teacher"
    """Model that selects the distillation.topk_logits_k most likely tokens, over which both models are compared. With
    student, the teacher's LM head stays on the GPU during training, to score these tokens."""
    token_kl_cap: float | None = None
    """Maximum loss of a response token, in nats. A token with a larger loss gets a smaller weight, so its gradient is
    not zero; null: no maximum."""
    zero_outside_topk: bool | None = None
    """NeMo-RL's name for outside_topk. false: renormalize; true: floor; null: the value of outside_topk. If both keys
    are set in different places, the command line overrides the recipe, and the recipe overrides its parent recipes."""
    outside_topk: Outside | None = None
    """Treatment of the vocabulary outside the top-k. bucket: all tokens outside count as one outcome with their
    summed probability, so the loss is a lower bound of the full KL; renormalize: both models' probabilities are
    renormalized over the top-k; floor: the teacher's log-prob of each token outside is -100; null: as set by
    zero_outside_topk, or bucket if that key is also null."""
    temperature: float | None = None
    """Divisor of both models' logits in the loss; null: policy.generation.temperature."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the student's logits. bfloat16 is faster, with an error of about 0.02 nats per log-prob. The teacher's
    logits are float32."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the loss. auto: Triton kernels on GPUs, PyTorch on CPUs; triton: Triton kernels; torch:
    PyTorch."""

    @property
    def outside(self) -> Outside:
        """Return the treatment of the vocabulary outside the top-k, from outside_topk and zero_outside_topk."""
        if self.outside_topk is not None:
            return self.outside_topk
        if self.zero_outside_topk is None:
            return "bucket"
        return "floor" if self.zero_outside_topk else "renormalize"


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset, from the hub or from files. Keys that data.train or data.validation omit come from data.default."""

    dataset_name: str | None = None
    """Name of a built-in dataset (DeepScaler, AIME2024, AIME2025, AIME2026, MATH500, GSM8K, OpenMathInstruct-2,
    OpenR1-Math-220k, DAPOMath17K) or hub name (openai/gsm8k). Set either this key or data_path. If both are set in
    different places, the command line overrides the recipe, and the recipe overrides its parent recipes."""
    data_path: str | None = None
    """Your own data: a .jsonl, .json, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .xz, .zst), or a folder
    of such files."""
    input_key: str | None = None
    """Column with the problem, by name or dotted path (messages.0.content: the first message of a chat); null: the
    predefined column if dataset_name is a built-in dataset, otherwise "input"."""
    output_key: str | None = None
    """Column with the gold answer, by name or dotted path; null: the predefined column if dataset_name is a built-in
    dataset, otherwise "output"."""
    output_pattern: str | None = None
    """Regular expression that finds the gold answer in the column output_key. The answer is the text of
    the group (...) in the last match. Without a group, as in "####" for GSM8K, it is the text after the last match.
    null: the predefined pattern if dataset_name is a built-in dataset, otherwise the complete text is the answer."""
    subset: str | None = None
    """Name of a configuration of the hub dataset (main for openai/gsm8k); null: the predefined configurations if
    dataset_name is a built-in dataset, otherwise the default configuration."""
    split: str | None = None
    """Split of the dataset, or a slice of a split (train[:90%]); null: the predefined split if dataset_name is a
    built-in dataset, otherwise train."""
    prompt_file: str | None = None
    """Text file with {} in place of the problem; literal braces are written as in teacher_prefix_template. null: the
    prompt is the problem."""
    system_prompt_file: str | None = None
    """Text file with the system message; null: no system message."""
    env_name: str | None = "math"
    """Grader of a response's final text (after the last think block). math: math-verify compares the text with the gold
    answer; exact: the text must equal the gold answer; regex: the gold answer is a regular expression that must match
    in the text; choice: the text must select the option, A to J, of the gold answer; null: no grading."""
    repeat: int = 1
    """Number of copies of each problem in an epoch or a validation (AIME2024 with 16: 30 problems, 480 prompts)."""


@dataclass(frozen=True)
class DataConfig:
    """Training and validation problems."""

    max_input_seq_length: int = 8192
    """Maximum number of tokens in a prompt; longer prompts are skipped and counted. Default:
    policy.max_total_sequence_length."""
    shuffle: bool = True
    """Shuffle the training data in each epoch, with the seed distillation.seed; false: use the dataset's order."""
    default: DatasetConfig = field(default_factory=DatasetConfig)
    """Values of the keys that a dataset in data.train or data.validation omits."""
    train: tuple[DatasetConfig, ...] = ()
    """Training data: a dataset, or a list of datasets to concatenate."""
    validation: tuple[DatasetConfig, ...] = ()
    """Validation data: a dataset, or a list of datasets to concatenate; null: no validation data."""


@dataclass(frozen=True)
class CheckpointingConfig:
    """Settings of checkpoints. A run resumes from the newest checkpoint in checkpoint_dir, see resume_from."""

    enabled: bool = True
    """Save checkpoints in the background, and resume from them."""
    checkpoint_dir: str | None = "checkpoints/distillation"
    """Folder of the run's checkpoints; step_N is the checkpoint of step N. Every run needs a different folder. null:
    the folder checkpoints in the run directory."""
    resume_from: str = "latest"
    """Checkpoint to resume from. latest: the newest in checkpoint_dir, if there is one; never: start at step 0, and
    refuse a checkpoint_dir with checkpoints; a path: this step_N folder, or the newest in this folder. The run then
    saves to checkpoint_dir, and a restart continues from there."""
    metric_name: str | None = "val:accuracy"
    """Metric that selects the best checkpoints, val:NAME or train:NAME; null: the newest checkpoints are the best."""
    higher_is_better: bool = True
    """Whether higher values of metric_name are better."""
    keep_top_k: int | None = 3
    """Number of best checkpoints to keep; null: all. The newest checkpoint is always kept. A checkpoint without a
    value of metric_name ranks below all others."""
    save_period: int = 10
    """Number of training steps between checkpoints. A checkpoint of the last step is always saved."""
    checkpoint_must_save_by: str | None = None
    """Time limit, counted from the start of the program, as DD:HH:MM:SS. The run saves a checkpoint before the limit
    and exits with code 0; null: no limit."""
    save_consolidated: bool = False
    """Write a Hugging Face export with every checkpoint; false: only with the last checkpoint."""
    allow_changes: bool = False
    """Allow a run to resume with other training data, or with other values of keys that affect what it learns (model,
    loss, optimizer, sampling, batch sizes, seed): the step number continues, and the change is logged and recorded.
    false: such a change is an error."""
    save_optimizer: bool = True
    """Save the optimizer state. Without it, a resumed run starts with AdamW's moments at zero and logs a warning."""


@dataclass(frozen=True)
class WandbConfig:
    """Settings of Weights & Biases."""

    project: str = "distill"
    """Name of the Weights & Biases project."""
    name: str | None = None
    """Name of the run in Weights & Biases; null: the name of the run directory."""
    entity: str | None = None
    """Weights & Biases team or user that owns the run; null: the default of the account."""
    group: str | None = None
    """Name of the group of runs in Weights & Biases to which the run belongs; null: no group."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of the Weights & Biases client; null: the value of the environment variable WANDB_MODE."""


@dataclass(frozen=True)
class LoggerConfig:
    """Destinations of metrics, in addition to the console and metrics.jsonl in the run directory."""

    log_dir: str = "logs/distillation"
    """Parent directory of the run directories exp_001, exp_002, ... if runtime.run_dir is null."""
    num_val_samples_to_print: int = 5
    """Number of responses that each validation prints on the console."""
    num_train_samples_to_print: int = 2
    """Number of training responses to print on the console and to write to train_samples/step_N.jsonl in the run
    directory, TensorBoard and Weights & Biases, every train_samples_period steps; 0: none."""
    train_samples_period: int = 20
    """Number of training steps between samples of training responses; the first step's responses are always shown."""
    top_tokens_per_sample: int = 16
    """Number of tokens per response at which files of samples list the five most likely tokens of student and teacher:
    the tokens with the highest KL between them; 0: none."""
    report: bool = True
    """Write report.html into the run directory when the run finishes, or fails because of non-finite numbers: one page
    with the curves and responses of the run. `python -m scripts.report RUN` writes it at any time."""
    wandb_enabled: bool = True
    """Write metrics to Weights & Biases."""
    tensorboard_enabled: bool = True
    """Write TensorBoard events to the run directory."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Settings of Weights & Biases."""


@dataclass(frozen=True)
class ClusterConfig:
    """Number of nodes and of ranks per node, which must match the started processes. On GPUs, each rank has one GPU."""

    gpus_per_node: int = 8
    """Number of ranks per node."""
    num_nodes: int = 1
    """Number of nodes."""
    gpu_memory_gb: float | None = None
    """Nominal memory of a GPU in GB (40 for A100-40GB); the usable memory is 0.98 GiB per GB. If the memory forecast
    exceeds the usable memory, the run or --dry-run exits with an error; null: no check."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Run directory, device, memory use, timeout and verification of the teacher.

    These keys do not change the result of a training step, except for rounding.
    """

    run_dir: str | None = None
    """Run directory, for the logs and metrics of the run; null: a new directory exp_NNN in logger.log_dir."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of training and generation; auto: cuda if available, otherwise cpu."""
    sync_bucket_mib: int = 512
    """Maximum size in MiB of a bucket, a set of tensors that are gathered and copied together when the student's
    weights are copied to the generation engine or to the teacher. A larger tensor has its own bucket."""
    share_prefixes: bool = True
    """Compute each prompt only once for all its responses in a micro-batch. If micro-batches have a token budget,
    responses to the same prompt are placed in the same micro-batch if possible."""
    offload_optimizer: bool = True
    """Keep the optimizer's moments in pinned host memory except during training and checkpoints. No effect on CPUs."""
    attention: Literal["auto", "fa2", "fa3", "fa4"] = "auto"
    """Attention kernel on GPUs for bfloat16. fa2: FlashAttention-2 of PyTorch. fa3, fa4: FlashAttention-3
    (flash_attn_interface) or 4 (flash-attn-4), which PyTorch 2.11 and later can use if they are installed. auto: the
    first of fa3, fa4 and fa2 that supports GPU and models. No effect on CPUs."""
    fused_layers: bool | None = None
    """Compute norms, rotary embeddings and MLP activations of student and teacher with Triton kernels, which move fewer
    bytes than those of transformers; null: on GPUs. false is for debugging."""
    logits_chunk_rows: int | None = None
    """Maximum number of rows of logits in memory at a time, one row per response token; null: derived from a memory
    budget (2048 rows for a vocabulary of 151,936 on CUDA)."""
    phase_timeout_s: int = 1800
    """Timeout in seconds: the run fails if no rank makes progress in a phase (such as generation) for this time."""
    verify_teacher: bool = True
    """Compare the log-probs of the sharded teacher with those of the unsharded model when a run starts without a
    checkpoint. This reads the teacher's weights a second time."""


@dataclass(frozen=True)
class Config:
    """Configuration of a run, merged from the default values, recipes (YAML files) and command-line overrides."""

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Settings of the training loop."""
    loss_fn: LossConfig = field(default_factory=LossConfig)
    """Settings of the loss: the divergence between teacher and student at every response token."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The student: model, batches, parallelism, optimizer, generation."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher: model, tokenizer, parallelism."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation problems."""
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    """Settings of checkpoints."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Destinations of metrics: Weights & Biases, TensorBoard, console."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Number of nodes, ranks per node, and GPU memory."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Run directory, device, memory use, timeout and verification of the teacher."""
