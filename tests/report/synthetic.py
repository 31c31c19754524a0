"""Synthetic data of a page: several runs with curves, samples and hostile texts, without any run directory."""

from __future__ import annotations

import math
import random
from typing import Any

from distill.report.html import PageData

HOSTILE = (
    "<script>window.hostile = 1</script>",
    "</script><script>window.hostile = 1</script>",
    '<img src=x onerror="window.hostile = 1">',
    "<!-- <script> --> {{data}} {{title}} ${window.hostile = 1} &lt;b&gt;",
    "\u202eright-to-left\u202c \x00\x07 \u2028\u2029 𝔘𝔫𝔦 👩‍👩‍👧 \ud800 %s",
    "javascript:window.hostile=1//'\"`",
)
"""Texts that would run a script or break the page if they were not handled as data."""
_MODELS = ("teacher", "student")
FORWARD, REVERSE = (f"KL({one} || {other})" for one, other in (_MODELS, _MODELS[::-1]))
DIFFERENCES = ["-", "+1.2 ± 2.0 points", "-1.0 ± 2.1 points"]
_WORDS = "the answer is so we add seven apples to twelve and then divide by three which gives a total of time".split()
_TRAIN = {
    "train/loss": (0.30, 0.04), "train/forward_kl": (0.3, 0.04), "train/reverse_kl": (0.5, 0.06),
    "train/student_entropy": (1.2, 0.8), "train/teacher_entropy": (0.9, 0.9),
    "train/mean_gen_tokens_per_sample": (40, 60), "train/response_length_p10": (10, 20),
    "train/response_length_p50": (40, 60), "train/response_length_p90": (80, 120),
    "train/truncation_rate": (0.1, 0.02), "train/lr": (1e-5, 1e-6), "train/grad_norm": (3, 0.4),
    "timing/train/generation": (9, 10), "timing/train/teacher_logprob_inference": (3, 3),
    "timing/train/policy_training": (6, 6), "memory/generation_gib": (20, 20), "memory/training_gib": (60, 61),
    "memory/forecast/training_gib": (64, 64), "memory/forecast/generation_gib": (18, 18),
}  # fmt: skip
_VALIDATION = {
    "validation/forward_kl": (0.3, 0.04), "validation/reverse_kl": (0.5, 0.05), "validation/accuracy": (0.1, 0.55),
    "pass@2": (0.2, 0.7), "validation/truncation_rate": (0.1, 0.0),
    "length_p10": (12, 20), "length_p50": (44, 60), "length_p90": (90, 110),
}  # fmt: skip
_CHARTS: Any = (
    ("loss", "Loss", "nats", "quality", "lines", True, [("train", "train/loss", "loss", None, None)]),
    ("kl", "Held-out KL", "nats", "quality", "lines", False,
     [("validation", "validation/forward_kl", FORWARD, None, None),
      ("validation", "validation/reverse_kl", REVERSE, None, None)]),
    ("accuracy", "Accuracy", "fraction", "quality", "lines", False,
     [("validation", "validation/accuracy", "accuracy", "validation/accuracy_stderr", None),
      ("validation", "pass@2", "pass@2", "pass@2_stderr", None)]),
    ("positions", "KL at positions", "nats", "quality", "positions", False, []),
    ("entropy", "Entropy", "nats", "quality", "lines", False,
     [("train", "train/student_entropy", "student", None, None),
      ("train", "train/teacher_entropy", "teacher", None, None)]),
    ("length", "Response length", "tokens", "responses", "lines", False,
     [("validation", "length_p50", "median, held-out", None, ["length_p10", "length_p90"]),
      ("train", "train/response_length_p50", "median, training", None,
       ["train/response_length_p10", "train/response_length_p90"])]),
    ("truncation", "Truncated responses", "fraction", "responses", "lines", False,
     [("train", "train/truncation_rate", "training", None, None)]),
    ("lr", "Learning rate", "", "optimization", "lines", False, [("train", "train/lr", "learning rate", None, None)]),
    ("grad", "Gradient norm", "", "optimization", "lines", True, [("train", "train/grad_norm", "norm", None, None)]),
    ("time", "Time per phase", "seconds", "time", "stacked", False,
     [("train", f"timing/train/{name}", name, None, None)
      for name in ("generation", "teacher_logprob_inference", "policy_training")]),
    ("memory", "Memory per phase", "GiB", "memory", "lines", False,
     [("train", f"memory/{part}{name}_gib", f"{name}, {label}", None, None)
      for name in ("generation", "training") for part, label in (("", "measured"), ("forecast/", "predicted"))]),
)  # fmt: skip


def page_data(runs: int = 3, problems: int = 12, tokens: int = 48, steps: int = 40, seed: int = 0) -> PageData:
    """Return data of a page with ``runs`` runs, each with samples of two validations and hostile texts."""
    draw = random.Random(seed)
    index: dict[str, Any] = {
        "title": f"Report of {runs} runs {HOSTILE[0]}",
        "made": "2026-01-01T00:00:00+00:00",
        "notes": ["The last line of metrics.jsonl is incomplete; it is left out.", f"A note with {HOSTILE[1]}"],
        "runs": [_run(i, draw, steps) for i in range(runs)],
        "charts": [_chart(*chart) for chart in _CHARTS],
        "recipe_differences": []
        if runs == 1
        else [
            {"key": "policy.optimizer.kwargs.lr", "values": [f"{10.0 ** -(5 + i)}" for i in range(runs)]},
            {"key": "data.prompt_file", "values": [HOSTILE[i % len(HOSTILE)] for i in range(runs)]},
        ],
        "final": {
            "columns": [f"run {i}" for i in range(runs)],
            "rows": [
                {"label": "accuracy", "cells": ["54.7% ± 3.1"] * runs, "help": "Fraction of right responses."},
                {"label": "difference of accuracy to the first run", "cells": DIFFERENCES[:runs], "help": None},
            ],
        },
        "sample_sets": [],
        "samples": {
            name: []
            for name in (
                "set",
                "prompt",
                "response",
                "source",
                "verdict",
                "finish",
                "tokens",
                "forward",
                "reverse",
                "block",
                "at",
            )
        },
        "prompts": [
            {"title": HOSTILE[p] if p < len(HOSTILE) else f"Problem {p}: how many apples?"} for p in range(problems)
        ],
        "sources": ["gsm_validation", HOSTILE[2]],
        "verdicts": ["right", "wrong", "failed", "not graded"],
        "finishes": ["stop", "length"],
    }
    blocks: list[dict[str, Any]] = []
    for run in range(runs):
        sets = [("validation", 0), ("in_context", 0), ("validation", steps), ("train", steps)]
        for kind, step in sets:
            index["sample_sets"].append({"run": run, "kind": kind, "step": step, "label": f"{kind}, step {step}"})
            block = _samples(index, len(blocks), problems, tokens, kind, draw)
            blocks.append(block)
    return PageData(index, blocks)


def _run(number: int, draw: random.Random, steps: int) -> dict[str, Any]:
    at = list(range(1, steps + 1))
    shown = list(range(0, steps + 1, max(1, steps // 4)))
    validation = {name: _curve(ends, len(shown), draw) for name, ends in _VALIDATION.items()}
    for name in ("validation/accuracy", "pass@2"):
        validation[f"{name}_stderr"] = [0.03] * len(shown)
    train = {name: _curve(ends, len(at), draw) for name, ends in _TRAIN.items()}
    train["train/loss"][len(at) // 2] = None  # a value that is not finite
    return {
        "name": f"run {number} {HOSTILE[number % len(HOSTILE)]}",
        "folder": f"runs/{HOSTILE[0]}/{number}",
        "status": ["finished", "running", "failed", "stopped", "unknown"][number % 5],
        "ending": "finished 40 steps in 6 min",
        "headline": [
            {"label": "gap closed", "value": "88%", "detail": "KL 0.2971 before, 0.0366 after"},
            {"label": "accuracy", "value": "54.7% ± 3.1", "detail": "49.2% ± 3.3 with the context in view"},
            {"label": "length", "value": "44 → 60 tokens", "detail": None},
            {"label": "cost", "value": "1.2M tokens", "detail": "0.1 hours"},
        ],
        "facts": [{"label": "student", "value": "models/SmolLM2-135M"}, {"label": "commit", "value": HOSTILE[3]}],
        "recipe": {
            "parent": "built-in defaults",
            "changes": [
                {"key": "policy.model_name", "old": "null", "new": HOSTILE[0]},
                {"key": "distillation.max_num_steps", "old": "1000", "new": "40"},
            ],
            "text": "policy:\n  model_name: x\n",
        },
        "tables": {
            "train": {"step": at, "tokens": [1000 * i for i in at], "hours": [0.01 * i for i in at], "series": train},
            "validation": {
                "step": shown,
                "tokens": [1000 * i for i in shown],
                "hours": [0.01 * i for i in shown],
                "series": validation,
            },
        },
        "positions": {
            "edges": [0, 1, 2, 4, 8, 16, 32, 64],
            "curves": [
                {
                    "step": step,
                    "forward": _curve((0.5 / (i + 1), 0.1), 7, draw),
                    "reverse": _curve((0.6 / (i + 1), 0.1), 7, draw),
                    "count": [100] * 7,
                }
                for i, step in enumerate(shown)
            ],
        },
    }


def _curve(ends: tuple[float, float], n: int, draw: random.Random) -> list[Any]:
    first, last = ends
    return [
        float(f"{(last + (first - last) * math.exp(-4 * i / max(1, n - 1))) * draw.uniform(0.95, 1.05):.4g}")
        for i in range(n)
    ]


def _chart(id_: str, title: str, unit: str, group: str, kind: str, log: bool, series: list[Any]) -> dict[str, Any]:
    names = ("table", "name", "label", "error", "band")
    return {
        "id": id_,
        "title": title,
        "unit": unit,
        "help": f"Explanation of {title}.",
        "group": group,
        "kind": kind,
        "log": log,
        "series": [dict(zip(names, each, strict=True)) for each in series],
    }


def _samples(
    index: dict[str, Any], number: int, problems: int, tokens: int, kind: str, draw: random.Random
) -> dict[str, Any]:
    block: dict[str, Any] = {"prompts": {}, "samples": []}
    for prompt in range(problems):
        title = index["prompts"][prompt]["title"]
        block["prompts"][str(prompt)] = {"prompt": f"<|im_start|>user\n{title}<|im_end|>\n", "gold": "42"}
        for response in range(2):
            texts = [f" {draw.choice(_WORDS)}" for _ in range(draw.randint(max(2, tokens // 2), tokens))]
            texts[min(1, len(texts) - 1)] = HOSTILE[prompt % len(HOSTILE)]
            compared = kind in ("validation", "train") and draw.random() < 0.9
            forward = [float(f"{draw.expovariate(10):.3g}") for _ in texts] if compared else None
            reverse = [float(f"{draw.expovariate(6):.3g}") for _ in texts] if compared else None
            top = []
            if forward is not None:
                for at in sorted(sorted(range(len(texts)), key=lambda i: -forward[i])[:16]):
                    top.append(
                        {
                            "at": at,
                            "student": [[" the", 0.5], [HOSTILE[0], 0.2]],
                            "teacher": [[" a", 0.7], ["\n", 0.1]],
                            "chosen": {"student": 1, "teacher": None},
                        }
                    )
            block["samples"].append(
                {
                    "prompt": prompt,
                    "answer": "".join(texts),
                    "texts": [*texts, "<|im_end|>"],
                    "teacher_prompt": f"<|im_start|>system\nA rule: {HOSTILE[2]}<|im_end|>\n{title}"
                    if prompt % 2
                    else None,
                    "forward": forward and [*forward, 0.01],
                    "reverse": reverse and [*reverse, 0.02],
                    "top": top,
                }
            )
            columns = index["samples"]
            mean = None if forward is None else round(sum(forward) / len(forward), 4)
            values = {
                "set": len(index["sample_sets"]) - 1,
                "prompt": prompt,
                "response": response,
                "source": prompt % 2,
                "verdict": draw.randrange(4),
                "finish": draw.randrange(2),
                "tokens": len(texts) + 1,
                "forward": mean,
                "reverse": mean,
                "block": number,
                "at": len(block["samples"]) - 1,
            }
            for name, value in values.items():
                columns[name].append(value)
    return block
