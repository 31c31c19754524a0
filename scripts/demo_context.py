"""Teach SmolLM2 a rule that only its teacher's context states, and measure whether it was learnt.

    torchrun --nproc-per-node 2 -m scripts.demo_context [key.path=value ...]

Held-out problems are answered three times: by the untrained student, by the untrained student with the teacher's
context in view (the upper bound: what there is to learn), and by the student after training. The table and
``demo.json`` in the run's folder say how often the rule was followed, and how far the KL on fresh rollouts fell.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from distill.build import build_run
from distill.config import parse_args
from distill.data.prompts import load_prompts
from distill.rollout.exchange import gather_rollouts
from distill.run import Run
from distill.runtime.metrics_sinks import METRICS_FILE, read_metrics
from distill.runtime.world import World, guarded, leave
from distill.train import train
from distill.types import Prompt, Rollout

log = logging.getLogger("distill.demo")

RECIPE = "recipes/demo-context-cpu.yaml"
BEGINNING = "Once upon a time"


def follows_rule(answer: str) -> bool:
    """Whether an answer begins as the teacher's context asks."""
    return answer.strip().startswith(BEGINNING)


def in_context(run: Run, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as the teacher reads them."""
    dummies = [Rollout(prompt, 0, (0,), (0.0,), "length", 0) for prompt in prompts]
    viewed, _ = run.views.prefixed(dummies)
    return [Prompt(r.prompt.prompt_id, r.teacher_prefix_ids, r.prompt.problem) for r in viewed]


def rule_rate(run: Run, prompts: Sequence[Prompt], step: int) -> tuple[float, list[str]]:
    """Share of answers that follow the rule, and the answers; collective."""
    engine = run.engine
    run.freshness.renew(version=step)
    mine = engine.generate(prompts[engine.replica :: engine.replicas], run.sampling, step)
    engine.sleep()
    answers = [run.models.tokenizer.decode(r.response_ids) for r in gather_rollouts(run.world, mine, prompts)]
    return sum(map(follows_rule, answers)) / len(answers), answers


def demo(world: World | None) -> None:
    """Measure, train, measure again, and print the table."""
    assert world is not None
    run = build_run(parse_args(["--config", RECIPE, *sys.argv[1:]]), world)
    held_out = list(load_prompts(run.config.data.validation, run.models.tokenizer, 256, where="data.validation"))[:32]
    before, _ = rule_rate(run, held_out, step=1_000_000)
    bound, _ = rule_rate(run, in_context(run, held_out), step=1_000_000)
    train(run)
    after, answers = rule_rate(run, held_out, step=1_000_000)
    run.finish()
    if world.main:
        report(run, before, bound, after, answers)


def report(run: Run, before: float, bound: float, after: float, answers: Sequence[str]) -> None:
    """The table on the console and demo.json in the run's folder."""
    rows = read_metrics(run.run_dir / METRICS_FILE)
    first, last = (float(rows[i]["train/forward_kl"] or 0) for i in (0, -1))
    result = {
        "answers": len(answers),
        "rule_before": before,
        "rule_after": after,
        "rule_in_context": bound,
        "kl_first": first,
        "kl_last": last,
    }
    (run.run_dir / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    log.info("\nKL(teacher || student) on fresh rollouts  %.4f -> %.4f (%.0f%%)", first, last, 100 * last / first)
    log.info(
        "rule followed on %d held-out answers: before %.1f%%  after %.1f%%  with the context in view %.1f%%",
        *(len(answers), 100 * before, 100 * after, 100 * bound),
    )
    log.info("for example: %r", answers[0])


if __name__ == "__main__":
    leave(guarded(demo, needs_world=True))
