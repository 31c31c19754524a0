"""Configuration keys of the training loop and of context distillation: distillation.*."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from distill.config.loss import KlType


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
    """Context distillation: the teacher reads a context that the student does not read.

    The context is a filled template with a problem, a trace or columns of the dataset, or a column of messages.
    """

    enabled: bool = False
    """The teacher reads a prompt with the context; false: it reads the student's prompt."""
    mode: Literal["self_frozen", "self_ema", "self_live", "self_periodic", "frozen"] = "self_frozen"
    """Model that is the teacher. self_frozen: the student before training; self_ema: a moving average of the student's
    weights (ema_decay); self_live: the current student; self_periodic: a copy of the student, refreshed every
    refresh_period steps; frozen: teacher.model_name, which may be any model with the student's vocabulary. If adapters
    are trained (policy.dtensor_cfg.lora_cfg), the modes that begin with self share the student's frozen weights, and
    only the adapters differ; with lora_cfg.init_from, the student before training is the base with this adapter."""
    ema_decay: float = 0.99
    """Decay d of the moving average in mode self_ema. After each step: teacher = d * teacher + (1 - d) * student."""
    refresh_period: int = 50
    """Number of training steps n between refreshes of the teacher in mode self_periodic: the student's weights are
    copied after steps n, 2n, ...; before the first copy, the teacher is the initial student."""
    overflow_policy: Literal["truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"] = "truncate_trace"
    """Action if the teacher's prefix (its prompt) and the response together exceed teacher.max_total_sequence_length.
    truncate_trace: remove the end of the trace, or drop the response if even the prefix without a trace is too long;
    truncate_prefix_only: keep the last tokens of the prefix; truncate_prefix_from_end: keep the first tokens of the
    prefix. Responses are never truncated."""
    teacher_prefix_template: str = "You are given a problem and a trace: {problem} + {trace}. Solve it on your own."
    """Text for the teacher, with {problem} (the problem in the dataset, without the text of prompt_file), {trace} and
    the names of dataset columns in braces: letters, digits, underscores and dots. A name that is no column is an error.
    Doubled braces become literal braces ({{word}} becomes {word}). All other braces are literal; literal text in single
    braces that is the name of a column is an error."""
    teacher_system_prompt_file: str | None = None
    """Text file with the teacher's system message, which may contain placeholders like teacher_prefix_template; null:
    no system message. Requires chat_template."""
    teacher_messages_key: str | None = None
    """Column with the complete conversation that the teacher reads, a list of messages. It replaces
    teacher_prefix_template and teacher_system_prompt_file; null: not used."""
    keep_history: bool = False
    """The teacher reads the student's conversation, with the filled template in place of the last user message; false:
    the filled template is the only user message, and prompts that end with the result of a tool are an error."""
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
class OffPolicyConfig:
    """Responses from the dataset in place of some of the student's own responses (GKD)."""

    share: float = 0.0
    """Fraction of the responses of a step that come from the dataset, from 0 to 1. The number
    round(share * num_prompts_per_step * num_generations_per_prompt) is the same in each step."""
    column: str | None = None
    """Column with the responses; null: the last assistant message of each conversation."""
    kl_type: KlType | None = None
    """Divergence for these responses; null: loss_fn.kl_type. sampled is not possible."""


@dataclass(frozen=True)
class PartialRolloutsConfig:
    """Partial rollouts: a step ends generation early, and unfinished responses continue in the next steps.

    No response is dropped, so the lengths that are trained on are unbiased in the long run; the first steps train on
    shorter responses.
    """

    enabled: bool = False
    """Continue unfinished responses in later steps; false: each step waits for its longest response."""
    finish_share: float = 0.9
    """Number of responses that a step trains on, divided by the number of responses in progress; from 0.5 to 1."""
    max_age: int = 2
    """Number of steps after which a response is no longer interrupted: a response that was started in step s runs to
    its end in step s + max_age. At least 1."""


@dataclass(frozen=True)
class AlarmConfig:
    """A condition on a metric, and the action if it holds."""

    metric: str = ""
    """Name of the metric, as in metrics.jsonl, such as train/truncation_rate or validation/accuracy."""
    op: Literal[">", ">=", "<", "<="] = ">"
    """Comparison of the metric with ``value``."""
    value: float = 0.0
    """Threshold of the metric."""
    steps: int = 1
    """Number of consecutive values of the metric for which the condition must hold."""
    action: Literal["warn", "stop", "save"] = "warn"
    """Action when the alarm starts. warn: log a warning; save: also save a checkpoint; stop: also save a checkpoint and
    end the run."""


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
    probe_period: int = 0
    """Number of training steps between probes: the student continues its responses to the validation problems from
    several positions with and without the teacher's context in view; 0: none. Each probe costs about six validations.
    python -m scripts.probe measures the same before a run."""
    topk_logits_k: int = 64
    """Number of most likely tokens (K) over which the loss compares teacher and student at each response token; 0: the
    complete vocabulary."""
    seed: int = 42
    """Random seed of the data order, of sampling and of the assignment of responses to optimizer batches."""
    max_new_tokens_schedule: tuple[tuple[int, int], ...] = ()
    """List of [step, tokens]: from training step ``step`` on (the first step is 1), responses have at most ``tokens``
    tokens. Before the first entry, and without entries, policy.generation.max_new_tokens is the maximum."""
    train_on: Literal["all", "right", "wrong"] = "all"
    """Responses to train on: all, or only those that the dataset's grader (env_name) grades as right or wrong. Other
    responses are counted, and the teacher does not read them."""
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    """Responses from the dataset in place of some of the student's own responses."""
    partial_rollouts: PartialRolloutsConfig = field(default_factory=PartialRolloutsConfig)
    """Continue unfinished responses in later steps, so that no rank waits for the longest response."""
    alarms: tuple[AlarmConfig, ...] = ()
    """Conditions on metrics that log a warning, save a checkpoint or stop the run, in addition to default_alarms."""
    default_alarms: bool = True
    """Warn if repetition, truncation, length, entropy, top-k overlap or gradient norm changed strongly since steps 1 to
    5; warn and save a checkpoint if the accuracy of two consecutive validations is significantly below the first
    one."""
    watched_words: tuple[str, ...] = ()
    """Words whose frequency in the responses is logged in each step, such as "wait"."""
    control: bool = False
    """Control experiment: the teacher reads the student's prompt in place of the context, and all other settings stay
    the same. The student then learns nothing beyond rounding: in bfloat16 its weights drift slightly, because AdamW
    scales gradients of any size to steps of the size lr. The default alarm grad_norm is off."""
    allow_degenerate: bool = False
    """Allow settings for control experiments: a teacher that is the student's model and reads the same prompts, and
    truncated sampling (top_p, top_k)."""
    context_distillation: ContextDistillationConfig = field(default_factory=ContextDistillationConfig)
    """Settings of context distillation."""

    @property
    def responses_per_step(self) -> int:
        """Return the number of responses of a step: the student's own and those from the dataset."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    @property
    def off_policy_per_step(self) -> int:
        """Return the number of responses of a step that come from the dataset."""
        return round(self.off_policy.share * self.responses_per_step)

    @property
    def generated_per_step(self) -> int:
        """Return the number of the student's own responses that a step trains on."""
        return self.responses_per_step - self.off_policy_per_step

    @property
    def most_in_progress(self) -> int:
        """Return the maximum number of responses that all engines together generate at the same time in training."""
        partial = self.partial_rollouts
        share = Fraction(str(partial.finish_share)) if partial.enabled else 1
        return math.ceil(self.generated_per_step / share)

    def most_per_engine(self, engines: int) -> int:
        """Return the maximum number of training responses that one of ``engines`` engines generates at the same time.

        All new responses to a prompt are on one engine, as long as no engine gets more than this number.
        """
        of_prompts = -(-self.num_prompts_per_step // engines) * self.num_generations_per_prompt
        return max(-(-self.most_in_progress // engines), of_prompts)
