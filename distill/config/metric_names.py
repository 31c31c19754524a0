"""Names of the metrics that a run records, to find spelling errors in a recipe; imports no torch."""

from __future__ import annotations

import difflib
import re
from functools import cache

_KLS = "forward_kl reverse_kl"
_ROWS = f"""loss {_KLS} student_entropy teacher_entropy teacher_topk_mass student_topk_mass top1_agreement topk_overlap
    teacher_stop_mass student_logprob teacher_logprob"""
_TRAIN = f"""{_ROWS} sampler_logprob_diff sampler_logprob_diff_max grad_norm lr
    skipped_optimizer_steps trained_tokens mean_token_weight accuracy judge_failures removed_by_train_on empty_step
    max_new_tokens mean_prompt_length mean_gen_tokens_per_sample
    mean_total_tokens_per_sample max_gen_tokens_per_sample p10_gen_tokens_per_sample p50_gen_tokens_per_sample
    p90_gen_tokens_per_sample p99_gen_tokens_per_sample truncation_rate natural_termination_rate repetition_rate
    repeated_token_share watched_words total_num_tokens generated_tokens teacher_tokens global_valid_seqs
    global_valid_toks tokens_per_sec_per_gpu probe_change sync_changed_tensors engine_residual_gib"""
_PARTIAL = """age_mean age_max older_token_share pool_responses pool_tokens waiting_responses reprefilled_tokens
    cut_after_tokens discarded_tokens untrained_tokens"""
_OFF_POLICY = f"{_ROWS} responses dropped mean_tokens_per_sample truncation_rate"
_CONTEXT = """trace_coverage trace_mean_chars trace_mean_tokens prefix_truncation_rate prefix_mean_tokens valid_samples
    prefix_truncation_count dropped_samples dropped_missing_trace dropped_too_long_response dropped_no_prefix_budget
    dropped_prefix_too_long dropped_invalid_message dropped_for_dp_divisibility"""
_BY_POSITION = f"{_KLS} student_entropy teacher_entropy"
_CHANGE = "accuracy_change accuracy_change_stderr accuracy_change_num_problems"
"""Metrics of all validation datasets together."""
_SCORES = f"""accuracy accuracy_stderr judge_failures avg_length truncation_rate
    repetition_rate repeated_token_share num_answers num_problems num_compared {_KLS}"""
_IN_CONTEXT = "accuracy accuracy_stderr avg_length truncation_rate num_problems"
_PROBE = """accuracy accuracy_stderr student_accuracy student_accuracy_stderr difference difference_stderr
    truncation_rate avg_length"""
_ALARMS = "repetition truncation length entropy topk_overlap grad_norm collapse accuracy"
_PHASES = "prepare_for_generation data_processing teacher_logprob_inference policy_training generation validation"
_SECONDS = f"""{_PHASES} checkpointing samples weight_sync grading teacher_prefixes background_preparation
    total_step_time generation_slowest"""
_VALIDATION_SECONDS = """generation generation_in_context judging teacher_comparison writing total_validation_time
    probe_generation probe_judging probe_comparison"""
_MEMORY = "sync generation validation batching teacher training checkpointing samples"


def _names(prefix: str, names: str) -> list[str]:
    return [f"{prefix}{name}" for name in names.split()]


_EXACT = frozenset(
    [
        *_names("train/", _TRAIN),
        *_names("train/off_policy_", _OFF_POLICY),
        *_names("train/partial/", _PARTIAL),
        *_names("train/context_distillation_", _CONTEXT),
        *(f"{name}_{tenth}" for name in _names("train/position/", _BY_POSITION) for tenth in range(1, 11)),
        *_names("validation/", f"{_SCORES} {_CHANGE}"),
        *_names("validation/in_context_", _IN_CONTEXT),
        *_names("validation/in_context_at_end_", _IN_CONTEXT),
        *(name for start in (0, 10, 30, 60, 90) for name in _names(f"validation/probe/start_{start}/", _PROBE)),
        *_names("alarm/", _ALARMS),
        *_names("timing/train/", _SECONDS),
        *_names("timing/train/generation_", "wait_share busy"),
        "timing/train/valid_tokens_per_sec_per_gpu",
        *(f"timing/train/{phase}_tokens_per_sec" for phase in _PHASES.split()[2:5]),
        *_names("timing/validation/", _VALIDATION_SECONDS),
        *(f"memory/{phase}_gib" for phase in [*_MEMORY.split(), "peak"]),
        *(f"memory/predicted_{phase}_gib" for phase in ("sync", "generation", "teacher", "training")),
        *("throughput/training_tflop", "throughput/training_tflops_per_gpu", "throughput/mfu", "progress/epoch"),
    ]
)
_PATTERNS = (
    "train/watched_words/.+",
    r"validation/((?!probe/).+/)?pass@[1-9]\d*(_stderr)?",
    f"validation/(?!probe/).+/({'|'.join(_SCORES.split())})",
    f"validation/(?!probe/).+/in_context_(at_end_)?({'|'.join(_IN_CONTEXT.split())})",
)
"""Regular expressions of names that depend on the recipe or on the data."""


@cache
def _pattern() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS))


def is_metric(name: str) -> bool:
    """Return whether a run may record a metric ``name``; names of datasets and of watched words are not checked."""
    return name in _EXACT or _pattern().fullmatch(name) is not None


def is_of_validation(name: str) -> bool:
    """Return whether the metric ``name`` is recorded by validations; other metrics are recorded by training steps."""
    return name.startswith(("validation/", "timing/validation/")) or name == "alarm/accuracy"


def similar_metrics(name: str) -> list[str]:
    """Return up to three metrics whose names are similar to ``name``; metrics with the same last part first."""
    found = difflib.get_close_matches(name, sorted(_EXACT), 3, 0.6)
    same_end = [each for each in sorted(_EXACT) if each.rpartition("/")[2] == name.rpartition("/")[2] != ""]
    return list(dict.fromkeys([*same_end, *found]))[:3]
