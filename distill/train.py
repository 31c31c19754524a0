"""On-policy distillation: the student generates, the teacher scores each token, the student learns.

    torchrun --nproc-per-node 4 -m distill.train --config recipes/NAME.yaml key.path=value ...

The same program runs on every rank. In each step the student trains on responses that its current weights generated;
with partial rollouts, earlier weights generated a part of some responses. Rewards are not used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from distill.batching.plan import plan
from distill.config import parse_args, print_flag
from distill.distributed.program import exit_process, run_program, run_without_world, start_process
from distill.errors import CollectiveUserError, RunFailed
from distill.supervise.progress import counted
from distill.supervise.stop import StopRequested

if TYPE_CHECKING:
    from distill.distributed.world import World
    from distill.run import Run


def train(run: Run) -> None:
    """Run the remaining training steps; collective."""
    for step in range(run.first_step, run.last_step):
        train_step(run, step)
    run.validate_last()


def train_step(run: Run, step: int) -> None:
    """Generate responses and train on them; collective.

    ``step`` is the number of finished steps, which is also the version of the weights. The step is a separate
    function, so that its rollouts are freed before the next generation.
    """
    from distill.rollout.gather import gather_rollouts

    student, teacher = run.student, run.teacher
    metrics = run.begin_step(step)

    with run.phase("sync"):
        run.sync.push_weights(step, metrics)

    with run.phase("validation"):  # timed separately: its tokens are not trained on
        held_out = run.validation.generate(step)  # None unless due

    with run.phase("generation"):
        generated = run.generation.generate(step, metrics)
        run.engine.sleep()

    run.report_validation(held_out)

    with run.phase("batching"):
        run.checkpoints.finalize_pending(block=False)  # the background write may have finished
        selected = run.responses.select(generated.own, generated.batch, step, metrics)
        rollouts = gather_rollouts(run.world, selected, generated.prompts)
        batches = student.to_device(plan(rollouts, run.layout, run.packing, run.seed, step))

    with run.phase("teacher", batches), teacher.on_device():
        read = teacher.targets_of([micro_batch for batch in batches for micro_batch in batch])
        targets = [[next(read) for _ in counted(batch)] for batch in batches]

    with run.phase("training", batches):
        for batch in batches:
            # pop frees the targets of the batch, which may include a complete LM head
            student.train(batch, targets.pop(0), metrics)
        student.end_step()
        teacher.after_step(student, step + 1)

    run.end_step(step + 1, metrics, rollouts)  # log, checkpoint if due; raises StopRequested


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command-line program; return the exit code: 0, 1 if the run failed, 2 for a user error."""
    argv = sys.argv[1:] if argv is None else argv
    start_process()
    if print_flag(argv):  # --help or --dry-run
        return run_without_world(partial(print_dry_run, argv))
    return run_program(partial(train_from, argv))


def print_dry_run(argv: Sequence[str]) -> None:
    """Print the resolved recipe and the plan of the run, or print the help; do not start a run.

    Raises the UserError with which the run would be refused, if this can be known without weights and network.
    """
    arguments = parse_args(argv)
    print(arguments.resolved, flush=True)
    from distill.dry_run import dry_run  # a slow import: print the recipe first

    dry_run(arguments, argv)


def train_from(argv: Sequence[str], world: World) -> None:
    """Build the run from the command-line arguments and train; collective."""
    from distill.build import build_run

    with world.all_or_none("reading the recipe"):
        arguments = parse_args(argv)
    run = build_run(arguments, world)
    if run is None:  # all steps are finished
        return
    # From now on, a stop signal ends the run after the current step.
    world.supervisor.begin_loop(arguments.config.runtime.phase_timeout_s)
    try:
        _train_or_stop(run)
    except (CollectiveUserError, RunFailed):
        run.checkpoints.finalize_pending(block=True)  # all ranks raise, so the pending checkpoint can be completed
        raise
    run.finish()


def _train_or_stop(run: Run) -> None:
    from distill.model.nonfinite import NonFiniteError

    try:
        train(run)
    except StopRequested as stop:
        run.save_and_stop(stop)
    except NonFiniteError as error:
        run.report_non_finite(error)


def command() -> NoReturn:
    """Run the program and end the process with its exit code; the console command ``distill``."""
    exit_process(main())


if __name__ == "__main__":
    command()
