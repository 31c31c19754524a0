"""Measure the host seconds of grading and teacher prefixes, and the part that is hidden behind generation.

    python -m scripts.bench_preparation [--responses 64] [--tokens 16384] [--seconds 20]

The responses are synthetic: a think block, then a boxed answer. The engine is a stub: it sleeps until the next response
ends; a "busy engine" runs a Python loop like that of vLLM in the main thread, whose steps are counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from distill.config import ContextDistillationConfig
from distill.data.teacher_prefix import ContextPrefixes
from distill.data.train_grader import Graders, TrainGrader
from distill.rollout.preparation import Preparation
from distill.types import Problem, Prompt, Rollout

MODEL = "models/SmolLM2-135M-Instruct"
TEXT = "We add $\\frac{{{0}}}{{7}}$ to {0} * {1}, and see that the sum x_{0} is larger than {1}. "


def synthetic(tokenizer: Any, count: int, tokens: int) -> list[Rollout]:
    """Return ``count`` responses of ``tokens`` tokens with different texts."""
    rollouts = []
    end = tokenizer("</think>The answer is \\boxed{42}.", add_special_tokens=False)["input_ids"]
    for i in range(count):
        text = "<think>" + "".join(TEXT.format(i * 31 + n, n) for n in range(tokens // 20))
        ids = (*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: tokens - len(end) - 1], *end)
        prompt = Prompt(i, (1, 2, 3), Problem(f"What is {i} + 1?", "42", source="synthetic"))
        rollouts.append(Rollout(prompt, 0, (*ids, tokenizer.eos_token_id), (), "stop", 0))
    return rollouts


def build(tokenizer: Any, tokens: int) -> Preparation:
    """Return the preparation with the math grader and a template with the trace."""
    context = ContextDistillationConfig(enabled=True, teacher_prefix_template="{problem}\n{trace}")
    prefixes = ContextPrefixes(tokenizer, context, 4 * tokens)
    decode = lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))  # noqa: E731
    preparation = Preparation(TrainGrader(Graders(("math",)), decode), prefixes, "all")
    warm_up = synthetic(tokenizer, 1, 64)
    preparation.verdicts(warm_up)  # starts the worker process, and compiles the template
    preparation.prefixes(warm_up)
    return preparation


def generated(rollouts: Sequence[Rollout], seconds: float, busy: bool) -> Iterator[tuple[Rollout, int]]:
    """Yield each response when it ends, evenly over ``seconds``, with the number of steps of the stub engine."""
    started = time.monotonic()
    for i, rollout in enumerate(rollouts, 1):
        steps, end = 0, started + seconds * i / len(rollouts)
        while (left := end - time.monotonic()) > 0:
            if busy:
                sum(range(20_000))  # about a millisecond of Python, then a short wait for the device
                time.sleep(0.002)
                steps += 1
            else:
                time.sleep(left)
        yield rollout, steps


def measure(preparation: Preparation, rollouts: Sequence[Rollout], seconds: float, busy: bool, ahead: bool) -> str:
    """Return one line: seconds of generation, of the work in the step, and in the background."""
    started, steps = time.monotonic(), 0
    preparation.background_s = 0.0
    with preparation.while_generating() if ahead else nullcontext(lambda rollout: None) as add:
        for rollout, more in generated(rollouts, seconds, busy):
            add(rollout)
            steps += more
    ended = time.monotonic()
    preparation.verdicts(rollouts)
    graded = time.monotonic()
    preparation.prefixes(rollouts)
    done = time.monotonic()
    name = f"{'background' if ahead else 'plain'}{', busy engine' if busy else ''}"
    numbers = (ended - started, graded - ended, done - graded, preparation.background_s)
    return f"{name:25}" + "".join(f"{number:12.3f}" for number in numbers) + f"{steps:10d}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the generation")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(Path(MODEL))
    rollouts = synthetic(tokenizer, arguments.responses, arguments.tokens)
    preparation = build(tokenizer, arguments.tokens)
    print(f"{'':25}{'generation':>12}{'grading':>12}{'prefixes':>12}{'background':>12}{'steps':>10}")
    for busy in (False, True):
        for ahead in (False, True):
            print(measure(preparation, rollouts, arguments.seconds, busy, ahead), flush=True)


if __name__ == "__main__":
    main()
