"""Names of metrics in TensorBoard, in groups for reading; metrics.jsonl and Weights & Biases keep NeMo-RL's names."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distill.metrics.names import OUTSIDE_THROUGHPUT, PHASES, timing_tag

_GROUPS = {
    "responses": """mean_prompt_length mean_gen_tokens_per_sample mean_total_tokens_per_sample truncation_rate
        total_num_tokens generated_tokens max_gen_tokens_per_sample p10_gen_tokens_per_sample p50_gen_tokens_per_sample
        p90_gen_tokens_per_sample p99_gen_tokens_per_sample repetition_rate repeated_token_share watched_words
        global_valid_seqs global_valid_toks teacher_tokens""",
    "sync": "sync_changed_tensors probe_change sampler_logprob_diff sampler_logprob_diff_max",
    "memory": "engine_residual_gib",
}
"""Maps a TensorBoard group to the names NAME of its metrics ``train/NAME``, separated by spaces."""
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}
_CONTEXT = "context_distillation_"
_REDUNDANT = (
    "train/natural_termination_rate",  # 1 - truncation_rate
    f"train/{_CONTEXT}dropped_invalid_message",  # always 0
    f"train/{_CONTEXT}dropped_for_dp_divisibility",  # always 0
)


def tensorboard_tag(name: str) -> str:
    """Return the TensorBoard tag of a metric: ``GROUP/NAME``.

    The groups are learning, position, responses, context, throughput, seconds, memory, sync, progress and
    validation.
    """
    kind, _, rest = name.partition("/")
    if name.startswith("train/partial/"):
        return f"responses/{rest}"
    if "tokens_per_sec" in rest or rest.endswith("_share"):
        return f"throughput/{rest.removeprefix('train/')}"
    if kind == "timing":
        return f"seconds/{rest.removeprefix('train/')}"
    if kind != "train":
        return name
    if rest.startswith("position/"):
        return rest
    if rest.startswith(_CONTEXT):
        return f"context/{rest.removeprefix(_CONTEXT)}"
    return f"{_GROUP_OF.get(rest, 'learning')}/{rest}"


def tensorboard_scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return a dict from TensorBoard tag to finite value, without redundant metrics.

    Omitted: metrics that follow from another metric, durations of a validation or checkpoint that did not happen, and
    the metrics of the only validation dataset, which are those of the complete validation.
    """
    datasets = {name.split("/")[1] for name in values if name.startswith("validation/") and name.count("/") == 2}
    skipped = {
        *_REDUNDANT,
        *(timing_tag(name) for name in OUTSIDE_THROUGHPUT if values.get(timing_tag(name), 0) < 0.005),
    }

    def is_shown(name: str) -> bool:
        is_only_dataset = len(datasets) == 1 and name.startswith("validation/") and name.count("/") == 2
        return name not in skipped and not is_only_dataset and math.isfinite(values[name])

    return {tensorboard_tag(name): values[name] for name in values if is_shown(name)}


_MAIN_CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "quality": {
        "loss": ("train/loss",),
        "KL on training responses": ("train/forward_kl", "train/reverse_kl"),
        "KL on held-out responses": ("validation/forward_kl", "validation/reverse_kl"),
        "accuracy": ("validation/accuracy", "validation/in_context_accuracy"),
        "entropy": ("train/student_entropy", "train/teacher_entropy"),
    },
    "responses": {
        "length, 10% and 90% quantile around the median": (
            *("train/p50_gen_tokens_per_sample", "train/p10_gen_tokens_per_sample"),
            "train/p90_gen_tokens_per_sample",
        ),
        "truncated and repetitive responses": (
            *("train/truncation_rate", "train/repetition_rate", "train/repeated_token_share"),
        ),
    },
    "optimization": {"gradient norm": ("train/grad_norm",), "learning rate": ("train/lr",)},
    "time": {
        "seconds per phase": tuple(timing_tag(phase) for phase in PHASES),
        "tokens per second": ("train/tokens_per_sec_per_gpu",),
    },
    "memory": {
        f"{phase} in GiB, measured and predicted": (f"memory/{phase}_gib", f"memory/predicted_{phase}_gib")
        for phase in ("sync", "generation", "teacher", "training")
    },
}
"""Maps groups to main charts, and titles of charts to metrics.

The chart of the lengths has a curve with a lower and an upper bound.
"""


def tensorboard_layout() -> dict[str, dict[str, list[str | list[str]]]]:
    """Return the layout of the main charts for ``SummaryWriter.add_custom_scalars``: the tab Custom Scalars."""

    def chart(names: tuple[str, ...]) -> list[str | list[str]]:
        tags = [tensorboard_tag(name) for name in names]
        # The tags of lines are regular expressions, of which the beginning must match.
        return ["Margin", tags] if names[0].startswith("train/p50") else ["Multiline", [f"{tag}$" for tag in tags]]

    return {group: {title: chart(names) for title, names in charts.items()} for group, charts in _MAIN_CHARTS.items()}
