"""Run directories with the files that a run writes: metrics by the real sink, responses with realistic texts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from distill.config import Config
from distill.metrics.sinks import JsonlSink
from distill.run_files import (
    IN_CONTEXT,
    METRICS_FILE,
    PARENT_FILE,
    RECIPE_FILE,
    TRAIN_SAMPLES_FOLDER,
    VALIDATION_FOLDER,
    VERSIONS_FILE,
)
from distill.supervise.status import STATUS_FILE
from scripts.launch import ROOT

CONFIG = Config()
CONFIG = replace(CONFIG, distillation=replace(CONFIG.distillation, max_num_steps=4, seed=7))


def words() -> list[str]:
    """The words of a file of problems, in their order: text with the statistics of English."""
    lines = (ROOT / "prompts" / "gsm_train.jsonl").read_text(encoding="utf-8").splitlines()
    return re.findall(r"\s?\w{1,6}|\s?[^\w\s]", " ".join(json.loads(line)["question"] for line in lines))


def response(
    prompt: int, number: int, tokens: int, step: int, draw: random.Random, text: Sequence[str]
) -> dict[str, Any]:
    """A row of validation/step_N.jsonl. The KL falls with the step and is near 0 at most tokens, as in real runs."""
    start = draw.randrange(len(text) - 1)
    texts = [*(text[(start + i) % len(text)] for i in range(tokens - 1)), "<|im_end|>"]
    forward, reverse = (
        [round(draw.lognormvariate(-3 - step / 4, 2), 5) for _ in range(tokens)] for _ in ("forward", "reverse")
    )
    ranked = sorted(range(tokens), key=lambda i: -max(forward[i], reverse[i]))[:16]
    top = [{"at": at, "student": _top(draw, text), "teacher": _top(draw, text)} for at in sorted(ranked)]
    asked = f"<|im_start|>user\nQuestion {prompt}: {''.join(text[prompt * 30 : prompt * 30 + 30])}<|im_end|>\n"
    return {
        "prompt_id": prompt,
        "answer_number": number,
        "source": "gsm_validation",
        "prompt": f"{asked}<|im_start|>assistant\n",
        "teacher_prompt": f"A rule.\n{asked}<|im_start|>assistant\n",
        "answer": "".join(texts[:-1]),
        "gold": "42",
        "verdict": "right" if draw.random() < 0.2 + step / 10 else "wrong",
        "finish": "stop",
        "tokens": tokens,
        "token_ids": [draw.randrange(49152) for _ in range(tokens)],
        "token_texts": texts,
        "forward_kl": forward,
        "reverse_kl": reverse,
        "top_tokens": top,
    }


def _top(draw: random.Random, text: Sequence[str]) -> list[list[Any]]:
    return [[draw.randrange(49152), draw.choice(text), round(draw.random() / 2**i, 5)] for i in range(5)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def responses(
    problems: int, number: int, tokens: int, step: int, change: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """``number`` responses to each problem; ``change`` changes each row."""
    draw, text = random.Random(f"{step} {tokens}"), words()
    rows = [response(p, n, tokens, step, draw, text) for p in range(problems) for n in range(number)]
    for row in rows:
        change(row)
    return rows


def write_run(
    folder: Path,
    *,
    steps: int = 4,
    validated: Sequence[int] = (0, 4),
    problems: int = 3,
    number: int = 2,
    tokens: int = 12,
    config: Config = CONFIG,
    state: str | None = "finished",
    change: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Path:
    """Write the run directory of a run of ``steps`` steps; ``change`` changes each response's row."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = json.loads(json.dumps(asdict(config)))
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    parent = json.loads(json.dumps(asdict(Config())))
    (folder / PARENT_FILE).write_text(yaml.safe_dump({"parent": "parent.yaml", "recipe": parent}))
    versions = {"python": "3.11.1", "torch": "2.13.0", "device": "CPU", "world_size": 2, "commit": "abc123"}
    (folder / VERSIONS_FILE).write_text(json.dumps(versions))
    if state is not None:
        status = {"state": state, "reason": "", "step": steps, "time": "2026-01-01T00:00:00+0000"}
        (folder / STATUS_FILE).write_text(json.dumps(status))
    sink = JsonlSink(folder / METRICS_FILE, clock=lambda: 1.0)
    for step in range(steps + 1):
        if step in validated:
            rows = responses(problems, number, tokens, step, change)
            write_rows(folder / VALIDATION_FOLDER / f"step_{step}.jsonl", rows)
            kl = sum(sum(row["forward_kl"]) for row in rows) / sum(row["tokens"] for row in rows)
            right = sum(row["verdict"] == "right" for row in rows) / len(rows)
            values = {"forward_kl": kl, "accuracy": right, "accuracy_stderr": 0.03, "avg_length": float(tokens)}
            sink.write(step, {f"validation/{name}": value for name, value in values.items()})
        if step:
            sink.write(step, _step(step))
    sink.close()
    if 0 in validated:
        rows = responses(problems, number, tokens, 9, _in_context)
        write_rows(folder / VALIDATION_FOLDER / f"{IN_CONTEXT}.jsonl", rows)
    if steps:
        train = responses(1, 2, tokens, 1, lambda row: row.update(verdict=None, prompt="A training prompt"))
        write_rows(folder / TRAIN_SAMPLES_FOLDER / "step_1.jsonl", train)
    return folder


def _in_context(row: dict[str, Any]) -> None:
    row.update(forward_kl=None, reverse_kl=None, top_tokens=None, prompt=f"A rule. {row['prompt']}")


def _step(step: int) -> dict[str, float]:
    return {
        "train/loss": 1.0 / step,
        "train/lr": 1e-5,
        "train/grad_norm": 2.0 / step,
        "train/total_num_tokens": 1000.0,
        "progress/total_tokens": 1000.0 * step,
        "timing/train/generation": 6.0,
        "timing/train/policy_training": 3.0,
        "timing/train/total_step_time": 9.0,
        "memory/training_gib": 1.4,
        "memory/predicted_training_gib": 1.5,
        "train/p10_gen_tokens_per_sample": 5.0,
        "train/p50_gen_tokens_per_sample": 8.0,
        "train/p90_gen_tokens_per_sample": 11.0,
        "train/repetition_rate": 0.1,
    }
