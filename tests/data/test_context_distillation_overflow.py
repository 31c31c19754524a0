"""Truncated prefixes, dropped responses and their metrics equal hand-counted values. A byte is a token here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import ContextDistillationConfig
from distill.types import Problem, Prompt, Rollout
from tests.data.teacher_prefixes import RESPONSE, STATIC, counted, prefixes, read, rollout

# -- overflow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "policy", "prefix", "cut"),
    [
        (15, "truncate_trace", "1+1?|abc", 0.0),
        (15, "truncate_prefix_only", "1+1?|abc", 0.0),
        (15, "truncate_prefix_from_end", "1+1?|abc", 0.0),
        (14, "truncate_trace", "1+1?|ab", 1.0),
        (14, "truncate_prefix_only", "+1?|abc", 1.0),
        (14, "truncate_prefix_from_end", "1+1?|ab", 1.0),
        (12, "truncate_trace", "1+1?|", 1.0),
        (8, "truncate_prefix_only", "c", 1.0),
        (8, "truncate_prefix_from_end", "1", 1.0),
    ],
)
def test_a_prefix_is_truncated_to_leave_room_for_the_response(
    max_tokens: int, policy: Any, prefix: str, cut: float
) -> None:
    made, counts = prefixes(max_tokens=max_tokens, overflow_policy=policy).add([rollout(RESPONSE)])
    assert read(made) == [prefix]
    assert len(made[0].teacher_prefix_ids) + len(made[0].response_ids) <= max_tokens
    assert counts.means["context_distillation_prefix_truncation_rate"] == (cut, 1.0)
    assert counts.totals["context_distillation_prefix_truncation_count"] == cut
    assert counts.means["context_distillation_trace_mean_tokens"] == (3.0, 1.0)


def test_only_the_trace_is_truncated_by_default() -> None:
    # 35 tokens surround the trace, 19 of them the chat's; the trace has 9 and the response 13.
    response = rollout("<think>0123é678</think>2")
    assert ContextDistillationConfig().overflow_policy == "truncate_trace"
    kept_at = {58: "0123é678", 57: "0123é678", 56: "0123é67", 54: "0123é", 53: "0123", 48: ""}
    for max_tokens, kept in kept_at.items():
        made, counts = prefixes("P: {problem} T: {trace} {problem}", max_tokens, chat_template=True).add([response])
        assert read(made) == [f"<|im_start|>user\nP: 1+1? T: {kept} 1+1?<|im_end|>\n<|im_start|>assistant\n"]
        assert counted(counts)["prefix_truncation_count"] == float(kept != "0123é678")
    made, counts = prefixes("P: {problem} T: {trace} {problem}", 47, chat_template=True).add([response])
    assert made == []
    assert (counted(counts)["dropped_prefix_too_long"], counted(counts)["dropped_samples"]) == (1.0, 1.0)


def test_a_prefix_that_cannot_be_truncated_is_dropped_and_counted() -> None:
    rollouts = [rollout("2"), rollout("2", problem="1+1+1?")]
    for template in ("{problem}.{trace}", "{problem}."):
        made, counts = prefixes(template, max_tokens=7).add(rollouts)
        assert read(made) == ["1+1?."]
        assert {name: n for name, n in counted(counts).items() if "dropped" in name and n} == {
            "dropped_samples": 1.0,
            "dropped_prefix_too_long": 1.0,
        }
        assert counted(counts)["prefix_truncation_rate"] == (0.0, 1.0)


def test_a_required_trace_is_not_truncated_to_nothing() -> None:
    cases: Any = ((13, "drop_sample", ["1+1?|a"]), (12, "drop_sample", []), (12, "empty", ["1+1?|"]))
    for max_tokens, policy, expected in cases:
        made, counts = prefixes(max_tokens=max_tokens, missing_trace_policy=policy).add([rollout(RESPONSE)])
        assert read(made) == expected
        assert counted(counts)["dropped_prefix_too_long"] == 1.0 - len(expected)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abé ☃\n", max_size=60), st.integers(12, 120), st.booleans())
def test_the_longest_fitting_start_of_the_trace_is_kept(trace: str, max_tokens: int, needed: bool) -> None:
    trace = trace.strip()
    response = rollout("2", solution=trace)
    made, _ = prefixes(
        "{problem}|{trace}|", max_tokens, **STATIC, type="full_text",
        missing_trace_policy="drop_sample" if needed else "empty",
    ).add([response])  # fmt: skip
    room = max_tokens - 2 - len("1+1?||")
    kept = ""
    for character in trace:  # complete characters, as long as their bytes fit
        if len((kept + character).encode()) > room:
            break
        kept += character
    assert read(made) == ([] if needed and not kept else [f"1+1?|{kept}|"])


def test_a_truncated_trace_fills_the_window_with_a_bpe_tokenizer() -> None:
    """With merges, tokens depend on their neighbours, and the length is not linear in the number of characters."""
    from transformers import AutoTokenizer

    models = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct"
    if not models.exists():
        pytest.skip("needs models/SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(models)
    trace = " " * 400 + "+-*/" * 300 + "the sum of both " * 200 + "1234567890" * 40
    for max_tokens in (60, 61, 100, 333, 1000):
        response = Rollout(Prompt(0, (1,), Problem("1+1?", columns={"solution": trace})), 0, (5,), (0.0,), "stop", 0)
        (made,), _ = prefixes(
            "P {problem} T {trace} end", max_tokens, tokenizer, **STATIC, type="full_text", chat_template=True
        ).add([response])
        text = tokenizer.decode(list(made.teacher_prefix_ids))
        begin, _, rest = text.partition("P 1+1? T ")
        assert begin.endswith("<|im_start|>user\n") and text.endswith(" end<|im_end|>\n<|im_start|>assistant\n")
        assert max_tokens - 4 <= len(made.teacher_prefix_ids) + 1 <= max_tokens
        assert trace.strip().startswith(rest.removesuffix(" end<|im_end|>\n<|im_start|>assistant\n"))


def test_a_response_that_leaves_no_room_for_a_prefix_is_dropped() -> None:
    for policy in ("truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"):
        for max_tokens, reason in ((7, "no_prefix_budget"), (6, "too_long_response")):
            made, counts = prefixes(max_tokens=max_tokens, overflow_policy=policy).add([rollout(RESPONSE)])
            assert made == []
            assert counts.totals == {
                "context_distillation_valid_samples": 0.0,
                "context_distillation_prefix_truncation_count": 0.0,
                "context_distillation_dropped_samples": 1.0,
                "context_distillation_dropped_missing_trace": 0.0,
                "context_distillation_dropped_too_long_response": float(reason == "too_long_response"),
                "context_distillation_dropped_no_prefix_budget": float(reason == "no_prefix_budget"),
                "context_distillation_dropped_prefix_too_long": 0.0,
                "context_distillation_dropped_invalid_message": 0.0,
                "context_distillation_dropped_for_dp_divisibility": 0.0,
            }


def test_a_response_without_a_trace_is_kept_or_dropped_by_policy() -> None:
    rollouts = [rollout("2"), rollout("<think></think>2"), rollout("<think>t</think>2")]
    made, counts = prefixes(missing_trace_policy="drop_sample").add(rollouts)
    assert read(made) == ["1+1?|t"]
    assert counts.totals["context_distillation_dropped_missing_trace"] == 2.0
    assert counts.means["context_distillation_trace_coverage"] == (1.0, 3.0)
    made, counts = prefixes(missing_trace_policy="empty").add(rollouts)
    assert read(made) == ["1+1?|", "1+1?|", "1+1?|t"]
    assert counts.totals["context_distillation_dropped_samples"] == 0.0


def test_a_template_without_trace_drops_no_response() -> None:
    made, counts = prefixes("{problem}", missing_trace_policy="drop_sample").add([rollout("2")])
    assert read(made) == ["1+1?"]
    assert counts.totals["context_distillation_dropped_samples"] == 0.0


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_batch_equal_hand_computed_values() -> None:
    # A window of 20. Answers in tokens, their prefixes "1+1?|" + trace in tokens:
    rollouts = [
        rollout("<think>abc</think>2"),  # 7; 8: fits
        rollout("<think>né+fgh</think>2"),  # 11; 12, cut to 9
        rollout("2"),  # 2; 5: fits, no trace
        rollout("<think>0123456789abcde</think>2"),  # 19; 20, cut to 1
        rollout("x" * 19),  # 20: no room for a prefix, no trace
        rollout("<think>0123456789abcdefghi</think>"),  # 22: too long, with a trace
    ]
    assert [len(r.response_ids) for r in rollouts] == [7, 11, 2, 19, 20, 22]
    made, counts = prefixes(max_tokens=20, overflow_policy="truncate_prefix_only").add(rollouts)
    assert read(made) == ["1+1?|abc", "?|né+fgh", "1+1?|", "e"]
    assert {name.removeprefix("context_distillation_"): pair for name, pair in counts.means.items()} == {
        "trace_coverage": (4.0, 6.0),
        "trace_mean_chars": (3.0 + 6.0 + 15.0 + 19.0, 4.0),
        "trace_mean_tokens": (3.0 + 7.0 + 15.0 + 19.0, 4.0),
        "prefix_truncation_rate": (2.0, 4.0),
        "prefix_mean_tokens": (8.0 + 9.0 + 5.0 + 1.0, 4.0),
    }
    assert {name.removeprefix("context_distillation_"): total for name, total in counts.totals.items()} == {
        "valid_samples": 4.0,
        "prefix_truncation_count": 2.0,
        "dropped_samples": 2.0,
        "dropped_missing_trace": 0.0,
        "dropped_too_long_response": 1.0,
        "dropped_no_prefix_budget": 1.0,
        "dropped_prefix_too_long": 0.0,
        "dropped_invalid_message": 0.0,
        "dropped_for_dp_divisibility": 0.0,
    }
    made, counts = prefixes(max_tokens=20).add(rollouts)  # the fourth's template and problem alone are 5, and 1 fits
    assert read(made) == ["1+1?|abc", "1+1?|né+", "1+1?|"]
    assert counted(counts) == {
        "trace_coverage": (4.0, 6.0),
        "trace_mean_chars": (43.0, 4.0),
        "trace_mean_tokens": (44.0, 4.0),
        "prefix_truncation_rate": (1.0, 3.0),
        "prefix_mean_tokens": (8.0 + 9.0 + 5.0, 3.0),
        "valid_samples": 3.0,
        "prefix_truncation_count": 1.0,
        "dropped_samples": 3.0,
        "dropped_missing_trace": 0.0,
        "dropped_too_long_response": 1.0,
        "dropped_no_prefix_budget": 1.0,
        "dropped_prefix_too_long": 1.0,
        "dropped_invalid_message": 0.0,
        "dropped_for_dp_divisibility": 0.0,
    }


def test_counts_of_two_ranks_add_up_to_those_of_one() -> None:
    rollouts = [rollout(text) for text in ("<think>abc</think>2", "2", "x" * 30, "<think>é</think>3", "4")]
    _, complete = prefixes(max_tokens=12).add(rollouts)
    parts = [prefixes(max_tokens=12).add(part)[1] for part in (rollouts[:2], rollouts[2:], [])]
    for name, (total, count) in complete.means.items():
        pairs = [part.means.get(name, (0.0, 0.0)) for part in parts]
        assert (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)) == (total, count)
    assert {name: sum(part.totals[name] for part in parts) for name in complete.totals} == complete.totals


def test_a_mean_without_samples_is_omitted() -> None:
    made, counts = prefixes().add([])
    assert (made, counts.means) == ([], {})
    _, counts = prefixes().add([rollout("2")])
    assert "context_distillation_trace_mean_chars" not in counts.means
