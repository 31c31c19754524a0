"""On-policy distillation: the student answers, the teacher judges every token, the student learns.

    torchrun --nproc-per-node 4 -m distill.train --config recipes/NAME.yaml key.path=value ...

The same program runs on every rank. A step has no importance ratios and no rewards: the student's own answers are
scored by the very weights that gave them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from distill.batching.plan import plan
from distill.config import Arguments, parse_args
from distill.distributed.program import exit_process, refuse, run_program, start_process
from distill.errors import CollectiveUserError, RunFailed, UserError
from distill.metrics.step import Metrics

if TYPE_CHECKING:
    from distill.distributed.world import World
    from distill.run import Run


def train(run: Run) -> None:
    """The loop, from the first step that isn't done to the last."""
    from distill.rollout.gather import gather_rollouts

    student, teacher, engine = run.student, run.teacher, run.engine
    run.begin()
    for step in range(run.first_step, run.last_step):
        metrics, phases = Metrics(), run.phases(step + 1)

        with phases("prepare_for_generation"):
            prompts = run.order.batch(step)
            run.sync.push_weights(step, metrics)

        if run.leaves_unjudged(step):
            return
        with phases("validation"):
            held_out = run.validation.answers(step)
        if run.leaves_unjudged(step):
            return

        with phases("generation"):
            mine = engine.generate(prompts[engine.replica :: engine.replicas], run.sampling, step)
            engine.sleep()

        with phases("validation"):
            run.validation.report(held_out)

        with phases("data_processing"):
            run.checkpoints.finalize_pending(block=False)  # the last step's may be whole by now
            with run.world.all_or_none("making the teacher's views"):
                read, counts = run.views.add(mine)
            rollouts = gather_rollouts(run.world, read, prompts, version=step)
            batches = plan(rollouts, run.layout, run.packing, run.seed, step)

        with phases("teacher_logprob_inference"):
            teacher.onload()
            targets = [[teacher.targets(micro_batch) for micro_batch in batch] for batch in batches]
            teacher.offload()

        with phases("policy_training"):
            student.onload()
            lr = student.learning_rate
            for batch in batches:
                with run.finite(step + 1, batch, rollouts):
                    student.train(batch, targets.pop(0), metrics)  # which go with the batch: a whole head, maybe
            student.end_step()
            teacher.after_step(student)

        with phases("checkpointing"):
            run.save_if_due(step + 1)
        run.record(step + 1, metrics, phases, mine, rollouts, counts, lr)
        if run.ends_early(step + 1):
            return
    run.validate_at_end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 if the run failed, 2 if the user must change something."""
    start_process()
    try:
        arguments = parse_args(sys.argv[1:] if argv is None else argv)
        if arguments.dry_run:
            print_dry_run(arguments)
            return 0
    except UserError as error:
        return refuse(error)
    return run_program(partial(train_from, arguments))


def print_dry_run(arguments: Arguments) -> None:
    """Print the resolved recipe and the memory forecast. Raises UserError if the models cannot run in this layout."""
    print(arguments.resolved)
    from distill.memory.forecast import dry_run  # slow to import, and the recipe is printed by now

    for part in dry_run(arguments.config):
        print(part)


def train_from(arguments: Arguments, world: World) -> None:
    """Build the run of a command line and train it; every rank calls it."""
    from distill.build import build_run

    run = build_run(arguments, world)
    try:
        train(run)
    except (CollectiveUserError, RunFailed):
        run.checkpoints.finalize_pending(block=True)  # all ranks exit; let the checkpoint in flight complete first
        raise
    run.finish()


if __name__ == "__main__":
    exit_process(main())
