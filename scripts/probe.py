"""Measure where a teacher can be trusted, before a run: from where does it repair the student's responses?

    python -m scripts.probe --config RECIPE [--template FILE ...] [key.path=value ...]

The student generates responses to the held-out problems (data.validation, which need a grader). After 0, 10, 30, 60 and
90% of each response, every candidate generates the rest, and the responses are graded. A candidate is the student with
a context in its prompt (the recipe's template, or each --template FILE with {problem} and columns of the dataset), or
another model (teacher.model_name) with its prompt. The control is the student without context, from the same tokens.

The run directory (runtime.run_dir, by default runs/probe/NAME of the recipe) gets probe.json and probe.txt: accuracies
with standard errors, KL by position, and a recommendation with settings to copy. The program also runs under torchrun.
Exit codes: 0 for success, 2 for an error in the recipe, a file or the data, 1 for other failures.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import parse_args, print_flag
from distill.distributed.program import exit_process, run_program, start_process
from distill.errors import UserError

if TYPE_CHECKING:
    from distill.config import Config
    from distill.data.clock import RunClock
    from distill.distributed.world import World
    from distill.inputs import Models
    from distill.preflight import Data
    from distill.rollout.engine import Engine
    from distill.run import Run
    from distill.validation import HeldOut
    from distill.validation.probe import Candidate, ProbedValidation

log = logging.getLogger("distill.probe")

FILE = "probe.json"
_SETTINGS = (
    "checkpointing.enabled=false",
    "checkpointing.checkpoint_must_save_by=null",
    "logger.wandb_enabled=false",
    "logger.tensorboard_enabled=false",
    "distillation.val_period=0",
    "distillation.val_at_start=true",
    "distillation.val_at_end=false",
    "distillation.probe_period=0",
    "distillation.allow_degenerate=true",
)
"""Settings of every probe, after those of the command line: validation problems are read, and nothing is trained."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code, which is the same on every rank."""
    args, overrides = _parser().parse_known_args(argv)
    run_dir = f"runtime.run_dir=runs/probe/{Path(args.config).stem}"
    words = ["--config", args.config, run_dir, *overrides, *_SETTINGS]
    start_process()
    return run_program(partial(probe_from, words, tuple(args.template)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe of the run to plan")
    parser.add_argument(
        "--template",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text file with a template to probe, in place of the recipe's teacher_prefix_template; may be repeated",
    )
    return parser


def probe_from(words: Sequence[str], templates: Sequence[Path], world: World) -> None:
    """Build the run of the command line ``words``, probe its student and write the results; collective."""
    from distill.build import build_run
    from distill.supervise.stop import StopRequested
    from distill.validation.probe import with_probe
    from distill.validation.probe_setup import check_recipe_of_probe, probe_config

    with world.all_or_none("reading the recipe"):
        if flag := print_flag(words):
            fix = f"remove it, or run python -m distill.train {flag} with the same recipe"
            raise UserError(f"{flag} cannot be used with scripts.probe", fix, key=flag)
        arguments = parse_args(words)
        check_recipe_of_probe(arguments.config, templates)
    plan = Plan(arguments.config, templates, world)
    run = build_run(arguments, world, plan.prepare)
    assert run is not None, "without checkpoints, no run is finished"
    world.supervisor.begin_loop(run.config.runtime.phase_timeout_s)
    validation = with_probe(replace(run.validation, held_out=plan.held_out), probe_config(run.config, plan.candidates))
    engines = [run.engine]
    try:
        probe(run, validation, engines)
    except StopRequested as stop:
        world.supervisor.stop_reason = stop.reason
        log.warning("the probe stopped because of %s; it has no results", stop.reason)
    with world.all_or_none("closing the metrics"):
        run.recorder.close()
    world.shutdown_barrier()  # closing vLLM's engine destroys the process groups, so it comes last
    for engine in reversed(engines):
        engine.close()


class Plan:
    """Candidates and held-out problems of the probe, selected when the data have been read."""

    candidates: list[Candidate]
    held_out: HeldOut
    """The problems, with the columns that the recipe's context or the templates need."""

    def __init__(self, config: Config, templates: Sequence[Path], world: World) -> None:
        self._config, self._templates, self._world = config, templates, world

    def prepare(self, models: Models, data: Data, clock: RunClock) -> None:
        """Select the candidates, and raise UserError if they cannot be measured; before any weight is loaded."""
        from distill.inputs import engine_window_of, read_held_out
        from distill.rollout.teacher_engine import check_teacher_fits
        from distill.validation.probe_setup import candidates_of, check_probe_data, configs_of_templates, with_columns

        config, templates = self._config, self._templates
        with_templates = configs_of_templates(config, templates)
        self.held_out = with_columns(data.held_out, [read_held_out(each, models, clock) for each in with_templates])
        tokenizers, vocab = (models.tokenizer, models.teachers_tokenizer), models.valid_vocab
        self.candidates = candidates_of(config, templates, data.validation_prefixes, tokenizers, vocab, clock)
        check_probe_data(config, self.held_out, self.candidates, engine_window_of(config, models))
        if any(candidate.kind == "teacher" for candidate in self.candidates):
            check_teacher_fits(config, models.shapes, self._world)


def probe(run: Run, validation: ProbedValidation, engines: list[Engine]) -> None:
    """Generate, grade, compare and write; collective. Appends the teacher's engine to ``engines`` if it needs one."""
    from distill.model.teacher import ShardedTeacher
    from distill.rollout.teacher_engine import build_teacher_engine, push_teacher
    from distill.supervise.progress import phase

    step, config, world = run.first_step, run.config, run.world
    with phase("sync"):
        run.sync.push_weights(step)
    probed = validation.generate_probe(step)
    run.engine.sleep()
    if validation.needs_teacher_engine:
        assert isinstance(run.teacher, ShardedTeacher), "a teacher with another model does not share the student's base"
        with phase("creating the teacher's engine"):
            engines.append(build_teacher_engine(config, run.models.teacher, world, run.models.valid_vocab))
            push_teacher(world, engines[-1], run.teacher, config.runtime.sync_bucket_mib * 2**20, step)
        validation.continue_with(engines[-1], probed)
        engines[-1].sleep()
    validation.write_probe(validation.report_probe(probed), FILE)


if __name__ == "__main__":
    exit_process(main())
