"""The recipe's key tree as frozen dataclasses: the attribute path of a value is exactly its key path.

A field's default holds where neither a recipe nor its parents set the key; some follow other keys then, as their
docstrings and FOLLOWING in load.py say. The docstrings are what ``--help`` prints. check.py has the rules that span
several keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.config.models import PolicyConfig, TeacherConfig

Outside = Literal["bucket", "renormalize", "floor"]
"""What the loss does with the vocabulary outside the top-k."""


@dataclass(frozen=True)
class TraceExtractorConfig:
    """How a trace (a stretch of reasoning) is taken out of the student's answer or a dataset's column."""

    type: Literal["think_tag", "full_text"] = "think_tag"
    """think_tag: the text between the think_tags; full_text: all of a column that holds nothing but the trace."""
    think_tags: tuple[str, str] = ("<think>", "</think>")
    """What opens and closes a thought in this model's text ([THINK] and [/THINK] for Mistral); also for grading. A
    prompt that ends with an open thought, as its chat template may write it, lets the answer begin inside it."""
    selection: Literal["first", "last", "longest"] = "first"
    """Which of several spans is taken; longest counts characters, and of equally long ones the first is taken."""
    unclosed_span: Literal["to_end", "ignore"] = "to_end"
    """A thought that is not closed, as in an answer cut short. to_end: its span reaches to the end of the text;
    ignore: it is no span."""
    missing_trace_policy: Literal["empty", "drop_sample"] = "empty"
    """An answer without a trace: empty fills the template with an empty one, drop_sample leaves the answer out."""


@dataclass(frozen=True)
class StaticTraceConfig:
    """Traces that the dataset brings."""

    answer_column: str | None = None
    """The column that the trace is extracted from, by its name or a dotted path; every row has it, null or a text."""


@dataclass(frozen=True)
class ContextMetricsConfig:
    """Metrics of context distillation."""

    enabled: bool = True
    """Report trace coverage, prefix truncation and dropped answers."""


@dataclass(frozen=True)
class ContextDistillationConfig:
    """The teacher reads something else before the answer than the student did: a template with problem and trace."""

    enabled: bool = False
    """Let the teacher read teacher_prefix_template instead of the student's prompt."""
    mode: Literal["self_frozen", "self_ema", "self_live", "frozen"] = "self_frozen"
    """Who reads the template. The student itself: self_frozen, as it was at the start; self_ema, as it was on average,
    by ema_decay; self_live, as it is. frozen: teacher.model_name, any checkpoint with the student's tokenizer."""
    ema_decay: float = 0.99
    """Under mode self_ema, how much of the average stays at each step; the rest is the student's weights of then."""
    frozen_teacher_source: Literal["base_model"] = "base_model"
    """base_model: the copy is read from policy.model_name, never from a checkpoint of the run."""
    problem_source: Literal["original_user_problem"] = "original_user_problem"
    """original_user_problem: {problem} is the dataset's text, before prompt file and chat template."""
    alignment: Literal["response_token_index"] = "response_token_index"
    """response_token_index: the i-th token of the answer is compared with the i-th, whatever stands before it."""
    overflow_policy: Literal["truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"] = "truncate_trace"
    """Prefix and answer beyond teacher.max_total_sequence_length: truncate_trace keeps so much of the trace's beginning
    as fits, template and chat header whole, and leaves out an answer that does not fit without a trace either;
    truncate_prefix_only keeps the prefix's last tokens, truncate_prefix_from_end its first. No answer is ever cut."""
    teacher_prefix_template: str = "You are given a problem and a trace: {problem} + {trace}. Solve it on your own."
    """What the teacher reads; {problem} and {trace} are filled in, other braces are doubled ({{ and }}). Without
    {trace} it is plain context distillation: a rule, a hint, worked examples that only the teacher sees."""
    chat_template: bool = True
    """Wrap the filled template into the model's chat template as a user message; false: the teacher reads it bare."""
    trace_source: Literal["dynamic", "static_dataset"] = "dynamic"
    """dynamic: the answer that is about to be scored, so that the teacher has read its reasoning before judging it;
    static_dataset: the column static_trace.answer_column."""
    static_trace: StaticTraceConfig = field(default_factory=StaticTraceConfig)
    """Where static_dataset finds the trace."""
    trace_extractor: TraceExtractorConfig = field(default_factory=TraceExtractorConfig)
    """How the trace is found."""
    metrics: ContextMetricsConfig = field(default_factory=ContextMetricsConfig)
    """What is reported of it."""

    @property
    def trace_column(self) -> str | None:
        """The dataset's column that traces come from; None where none is read."""
        return self.static_trace.answer_column if self.enabled and self.trace_source == "static_dataset" else None


@dataclass(frozen=True)
class DistillationConfig:
    """The training loop."""

    num_prompts_per_step: int = 128
    """Prompts of one step (P)."""
    num_generations_per_prompt: int = 1
    """Answers of the student to each prompt (G)."""
    max_rollout_turns: int = 1
    """Turns of a conversation; only 1 is supported."""
    max_num_steps: int = 1000
    """The run ends after this many steps, or after max_num_epochs, whichever comes first."""
    max_num_epochs: int = 10
    """Passes over the training problems at most."""
    val_batch_size: int = 64
    """Not used: all held-out problems go to the engine together."""
    val_period: int = 20
    """Validate after every so many steps; 0: not periodically."""
    val_at_start: bool = False
    """Validate before the first step; where the teacher's context needs no answer, the student answers with it too."""
    val_at_end: bool = False
    """Validate after the last step."""
    max_val_samples: int | None = 512
    """Problems validated, never more; null: all. Of several datasets each gives one in turn."""
    val_num_generations: int = 1
    """Answers to each held-out problem (n of the accuracy avg@n), with the context in view too."""
    topk_logits_k: int = 64
    """The most likely tokens kept at each position (K), the support of the loss; 0: the whole vocabulary."""
    seed: int = 42
    """Decides data order, sampling and the dealing of answers to optimizer batches."""
    allow_degenerate: bool = False
    """Allow what can't teach (teacher and student the same and reading the same, cut sampling): for controls."""
    context_distillation: ContextDistillationConfig = field(default_factory=ContextDistillationConfig)
    """What the teacher reads before the answer, where that is not the student's prompt."""


@dataclass(frozen=True)
class LossConfig:
    """The divergence at every token of the answer."""

    kl_type: Literal["mixed", "forward", "reverse", "jsd", "sampled"] = "mixed"
    """forward: KL(teacher || student); reverse: KL(student || teacher); mixed: both, by mixed_kl_weight; jsd: the
    generalised Jensen-Shannon divergence, by jsd_beta, never above ln 2 at 0.5; sampled: KL(student || teacher) told by
    the sampled token alone, log student - log teacher as the cost of a policy gradient."""
    mixed_kl_weight: float = 0.5
    """Weight of the forward KL(teacher || student) in a mixed loss; the reverse KL(student || teacher) has the rest."""
    jsd_beta: float = 0.5
    """b in b KL(teacher || m) + (1 - b) KL(student || m), where m = b teacher + (1 - b) student; between 0 and 1."""
    importance_ratio_cap: float = 2.0
    """Under kl_type sampled each token weighs as much as the trainer finds it likelier than the sampler did, at most
    this."""
    support: Literal["teacher", "student"] = "teacher"
    """Whose distillation.topk_logits_k most likely tokens are compared. student: the teacher scores the student's, its
    logits made beside them, so that its head stays on the GPU while the student trains."""
    token_kl_cap: float | None = None
    """A token whose loss is above this, in nats, is weighted down to it: its gradient shrinks, and never stops; null:
    not capped."""
    zero_outside_topk: bool | None = None
    """The reference's key. false: both models renormalised over the top-k (as outside_topk renormalize); true: teacher
    log-prob -100 outside it (as floor); null: as outside_topk says. Of the two keys the one set later wins."""
    outside_topk: Outside | None = None
    """The vocabulary outside the top-k. bucket: one more outcome with the summed mass (a lower bound of the
    full KL); renormalize: ignored, both models renormalised over the top-k; floor: teacher log-prob -100; null: as
    zero_outside_topk says, bucket if that is null too."""
    temperature: float | None = None
    """Divides the logits of both models in the loss; null: policy.generation.temperature."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the student's logits; bfloat16 is faster and costs about 0.02 nats a log-prob. The teacher's stay
    float32."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """What passes over the logits. auto: Triton's kernels on GPUs, PyTorch elsewhere; torch: PyTorch everywhere."""

    @property
    def outside(self) -> Outside:
        """What the loss does outside the top-k, the two keys together."""
        if self.outside_topk is not None:
            return self.outside_topk
        if self.zero_outside_topk is None:
            return "bucket"
        return "floor" if self.zero_outside_topk else "renormalize"


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset: by its hub name or a file. What data.train or data.validation leaves out, data.default fills in."""

    dataset_name: str | None = None
    """A known name (DeepScaler, AIME2024) or a hub path (openai/gsm8k); of this and data_path the later set wins."""
    data_path: str | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .xz, .zst), or a folder of them."""
    input_key: str | None = None
    """The column with the problem; null: the known dataset's own, or "input"."""
    output_key: str | None = None
    """The column with the gold answer; null: the known dataset's own, or "output"."""
    output_pattern: str | None = None
    """A regular expression that finds the gold answer in its column: the group's text in the last match, or without a
    group the text after that match ("####" for GSM8K's solutions); null: the known dataset's own, or all of it."""
    subset: str | None = None
    """The hub dataset's configuration (main of openai/gsm8k, say)."""
    split: str | None = None
    """The split; null: the dataset's own choice, or train."""
    prompt_file: str | None = None
    """A text file with {} where the problem goes; null: the problem as it is."""
    system_prompt_file: str | None = None
    """A text file with the system message; null: none."""
    env_name: str | None = "math"
    """The grader of the text after an answer's last closing tag (think_tags). math: math-verify finds it equal to the
    gold answer; exact: it is the gold answer; regex: the gold answer is a regular expression that matches in it;
    choice: it chooses the option, A to J, that the gold answer names; null: not graded."""
    repeat: int = 1
    """How many times the dataset is read in one epoch (AIME2024 with 16: 30 problems, 480 answers)."""
    seed: int | None = None
    """Not used: data are shuffled by distillation.seed."""


@dataclass(frozen=True)
class DataConfig:
    """The problems."""

    max_input_seq_length: int = 8192
    """Longest prompt in tokens; a longer one is skipped and counted. Left out: policy.max_total_sequence_length."""
    shuffle: bool = True
    """Shuffle the training problems, by (seed, epoch)."""
    default: DatasetConfig = field(default_factory=DatasetConfig)
    """Fills the keys that data.train and data.validation leave out."""
    train: tuple[DatasetConfig, ...] = ()
    """The training problems: one dataset, or a list of them that are put end to end."""
    validation: tuple[DatasetConfig, ...] = ()
    """The held-out problems: one dataset, a list, or null."""


@dataclass(frozen=True)
class MathEnvConfig:
    """How an answer to a mathematical problem is judged."""

    math_verify_impl: Literal["hf_math_verify"] = "hf_math_verify"
    """hf_math_verify: the math-verify library compares the answer with the gold one."""


@dataclass(frozen=True)
class EnvConfig:
    """Who judges answers in validation, by env_name."""

    math: MathEnvConfig = field(default_factory=MathEnvConfig)
    """The judge named math."""


@dataclass(frozen=True)
class CheckpointingConfig:
    """What is saved, when and where. A run resumes from the newest checkpoint in checkpoint_dir by itself."""

    enabled: bool = True
    """Save checkpoints, in the background, and resume from them."""
    checkpoint_dir: str = "checkpoints/distillation"
    """The folder of the step_N folders."""
    metric_name: str | None = "val:accuracy"
    """Which metric ranks checkpoints: val:NAME or train:NAME; null: the step."""
    higher_is_better: bool = True
    """Whether a high metric is a good one."""
    keep_top_k: int | None = 3
    """How many of the best are kept, the newest always besides; null: all. One whose metric was not measured comes
    after all others."""
    save_period: int = 10
    """Save every so many steps, and at the end."""
    checkpoint_must_save_by: str | None = None
    """DD:HH:MM:SS after the start: save before then and leave, with code 0; null: no limit."""
    model_save_format: Literal["safetensors"] = "safetensors"
    """The format of the Hugging Face export."""
    save_consolidated: bool = False
    """Write a Hugging Face export with every checkpoint, not only with the last."""
    allow_changes: bool = False
    """Resume from a checkpoint of other training data, prompts or order of prompts: the step number continues and the
    change is logged and recorded. false: such a run is refused."""
    save_optimizer: bool = True
    """Save the optimizer too; without it a resumed run begins with fresh moments, and says so."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    project: str = "distill"
    """Project."""
    name: str | None = None
    """Name of the run; null: the run folder's."""
    entity: str | None = None
    """Team or user; null: the account's default."""
    group: str | None = None
    """Group of runs."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """null: as the environment says (WANDB_MODE)."""


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go. The console and metrics.jsonl in the run's folder are always on."""

    log_dir: str = "logs/distillation"
    """Runs get folders exp_001, exp_002, ... in it, unless runtime.run_dir says where."""
    num_val_samples_to_print: int = 5
    """Validation answers shown on the console each time."""
    wandb_enabled: bool = True
    """Write to Weights & Biases."""
    tensorboard_enabled: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Settings of Weights & Biases."""


@dataclass(frozen=True)
class ClusterConfig:
    """The machines. Checked against the real world at start: one rank for each GPU (without GPUs, for each process)."""

    gpus_per_node: int = 8
    """Ranks on a node."""
    num_nodes: int = 1
    """Nodes."""
    gpu_memory_gb: float | None = None
    """Memory of each GPU as its name says it (40 for an A100-40GB): 98% of so many GiB. What can't fit is refused at
    start and by --dry-run; null: not checked."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How this program runs. Nothing here changes what a step computes."""

    run_dir: str | None = None
    """The exact folder of the run; null: the next logger.log_dir/exp_NNN."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one."""
    sync_bucket_mib: int = 512
    """MiB of weights moved at a time from the student to the engine."""
    share_prefixes: bool = True
    """Read a prompt once for all its answers in one micro-batch; under token budgets answers are dealt for it."""
    offload_optimizer: bool = True
    """Keep the optimizer's moments in pinned host memory but for training and checkpoints; without effect on CPU."""
    logits_chunk_rows: int | None = None
    """Rows of logits that exist at a time; null: what a budget of memory holds, 2048 of 151,936 on CUDA."""
    phase_timeout_s: int = 1800
    """Seconds without any progress on any rank after which a phase of a step counts as hung, and the run ends."""


@dataclass(frozen=True)
class Config:
    """A whole recipe, parents and overrides merged, interpolations resolved, contradictions refused."""

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The training loop."""
    loss_fn: LossConfig = field(default_factory=LossConfig)
    """The divergence at every token of the answer."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The student: model, batches, parallelism, optimizer, generation."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen teacher."""
    data: DataConfig = field(default_factory=DataConfig)
    """The problems."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Who judges answers in validation."""
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    """What is saved, when and where."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where metrics go."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """How this program runs."""
