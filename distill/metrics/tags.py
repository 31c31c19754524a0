"""Names of metrics in TensorBoard, in groups for reading; metrics.jsonl and Weights & Biases keep NeMo-RL's names."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distill.metrics.phases import OUTSIDE_THROUGHPUT, timing_tag

_GROUPS = {
    "responses": """mean_prompt_length mean_gen_tokens_per_sample mean_total_tokens_per_sample truncation_rate
        total_num_tokens generated_tokens max_gen_tokens_per_sample global_valid_seqs global_valid_toks
        teacher_tokens""",
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

    The groups are learning, responses, context, throughput, seconds, memory, sync, progress and validation.
    """
    kind, _, rest = name.partition("/")
    if "tokens_per_sec" in rest or rest.endswith("_share"):
        return f"throughput/{rest.removeprefix('train/')}"
    if kind == "timing":
        return f"seconds/{rest.removeprefix('train/')}"
    if kind != "train":
        return name
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
