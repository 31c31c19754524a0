"""Configuration keys as frozen dataclasses: the key policy.precision is the attribute ``config.policy.precision``.

``--help-all`` prints the docstrings of the fields. "Default: KEY" means that an unset field has the value of KEY
(DERIVED_DEFAULTS in load.py). rules.py checks ranges and rules between keys; nemo_compat.py lists keys without effect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config.loop import DistillationConfig
from distill.config.loss import LossConfig
from distill.config.models import PolicyConfig, TeacherConfig

BUILT_IN = "built-in defaults"
"""Name of the parent of a recipe without the key ``defaults``."""


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset, from the hub or from files. Keys that data.train or data.validation omit come from data.default."""

    dataset_name: str | None = None
    """Name of a built-in dataset (DeepScaler, AIME2024, AIME2025, AIME2026, MATH500, GSM8K, OpenMathInstruct-2,
    OpenR1-Math-220k, DAPOMath17K) or hub name (openai/gsm8k). Set either this key or data_path. If both are set in
    different places, the command line overrides the recipe, and the recipe overrides its parent recipes."""
    data_path: str | None = None
    """Your own data: a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .xz, .zst), a
    folder of such files, a folder written by save_to_disk, or a hub name (owner/name)."""
    input_key: str | None = None
    """Column with the problem, by name or dotted path: a text, or a conversation (a list of messages with role and
    content, or from and value). The prompt ends at the last user or tool message; an assistant message after it is the
    reference response. null: the predefined column if dataset_name is a built-in dataset, otherwise "input"."""
    tools_key: str | None = None
    """Column with the tools (a list of JSON schemas) that the chat template shows to the model; null: no tools."""
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
    value of metric_name ranks below all others. The newest two checkpoints that alarms saved are kept in addition."""
    save_period: int = 10
    """Number of training steps between checkpoints. A checkpoint of the last step is always saved."""
    checkpoint_must_save_by: str | None = None
    """Time limit, counted from the start of the program, as DD:HH:MM:SS. The run saves a checkpoint before the limit
    and exits with code 0, so checkpointing.enabled=true is required; null: no limit."""
    save_consolidated: bool = False
    """Write an export with every checkpoint: the folder hf with the complete model, or the folder peft with the
    adapters if policy.dtensor_cfg.lora_cfg.enabled=true. false: only with the last checkpoint."""
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
    """Write report.html into the run directory when the run finishes, is stopped by an alarm, or fails because of
    non-finite numbers: one page with the curves and responses of the run. `python -m scripts.report RUN` writes it at
    any time."""
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
    """Nominal memory of a GPU in GB (40 for A100-40GB, but 45 for L40S, because ECC takes 3 GB, and 180 for B200); the
    usable memory is 0.98 GiB per GB. If the memory forecast exceeds the usable memory, the run or --dry-run exits with
    an error; null: no check."""
    gpu: str | None = None
    """GPU for which --dry-run forecasts memory and time, also on a machine without a GPU: the name of a card, such as
    h100, h200 or a100-40, or its peak numbers as TFLOPS/GBPS, such as 989/4800 (bfloat16 TFLOP/s without sparsity, and
    GB/s of the memory; the size of the memory is then gpu_memory_gb). null: the GPU of this machine; without a GPU
    there is no time forecast. A run uses its own devices and compares its phases with a forecast for them."""


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
