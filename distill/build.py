"""Build a run: check the recipe, find the checkpoint, read the data, load the models, in this order."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from torch import Tensor

from distill.checkpoint import Checkpoints, Found, has_validation
from distill.checkpoint.resume import RunHistory, clock_of, compare_with_checkpoint, log_clock, warn_of_changes
from distill.config import Arguments, Config
from distill.data.clock import RunClock
from distill.data.content import ContentHashes, raise_if_ranks_differ
from distill.data.prompts import PromptOrder
from distill.data.teacher_prefix import TeacherPrefixes, build_teacher_prefixes
from distill.distributed.cluster import check_cluster
from distill.distributed.world import World
from distill.errors import writing_run
from distill.inputs import (
    Models,
    check_contexts,
    check_teacher_reads_more,
    find_models,
    hashes_of,
    packing_of,
    read_held_out,
    read_prompts,
    validates,
)
from distill.loss import check_loss_backend
from distill.memory.forecast import Forecast, plan_memory
from distill.metrics.sinks import Recorder, open_recorder
from distill.model.export_files import ExportFiles, read_export_files
from distill.model.hf_config import model_config
from distill.model.student import Student
from distill.model.teacher import Teacher, build_teacher
from distill.model.teacher_check import verify_teacher
from distill.rollout.factory import build_engine, check_backend, sampling_of, validation_sampling_of
from distill.rollout.sync import WeightSync
from distill.run import Run
from distill.run_dir import start_run_dir
from distill.supervise.progress import phase
from distill.supervise.signals import Deadline, seconds_of
from distill.supervise.stop import StopCheck
from distill.types import Rollout
from distill.validation import HeldOut, Validation, validation_config
from distill.validation.golds import warn_of_unusable_golds
from distill.validation.token_kl import token_kls

log = logging.getLogger(__name__)

_LOW_IS_GOOD = re.compile(r"(_kl|loss|truncation_rate)$")


@dataclass(frozen=True)
class ModelInputs:
    """Model files, files for Hugging Face exports, and memory forecast; ready before weights are loaded.

    ``export_files``: the files of an export except weights; None if checkpoints are disabled or this is not rank 0.
    """

    models: Models
    export_files: ExportFiles | None
    forecast: Forecast


@dataclass(frozen=True)
class Resume:
    """Checkpoint manager, checkpoint to resume from, and clock with the time of the run's first start.

    Chat templates that insert the date get it from the clock, so prompts do not change at a resume.
    """

    checkpoints: Checkpoints
    found: Found | None
    """Newest checkpoint, from which the run resumes; None if checkpoint_dir contains no checkpoint."""
    clock: RunClock


@dataclass(frozen=True)
class Data:
    """Input data of a run: training prompts, builder of the teacher's prompts, validation prompts."""

    prompts: PromptOrder
    teacher_prefixes: TeacherPrefixes
    held_out: HeldOut
    hashes: dict[str, ContentHashes]
    """Maps a configuration key, such as data.train, to hashes of the data that this rank read."""


@dataclass(frozen=True)
class Start:
    """History of changes, first and last step, run directory and metrics recorder of a run at its start."""

    history: RunHistory
    first_step: int
    last_step: int
    run_dir: Path
    recorder: Recorder


def build_run(arguments: Arguments, world: World) -> Run:
    """Check the recipe, load the models and the checkpoint, and return the run; collective.

    Raises UserError on all ranks for errors in the recipe or in the files that it names, in most cases before any
    weight is loaded.
    """
    config = arguments.config
    world.supervisor.allow_loading(config.runtime.phase_timeout_s)
    inputs = _check(config, world)
    resume = _find_checkpoint(config, world)
    data = _read_data(config, world, inputs.models, resume)
    return _load(arguments, world, inputs, resume, data)


def _check(config: Config, world: World) -> ModelInputs:
    """Check the recipe against the started ranks and the model files; build the device mesh; collective."""
    _warn_of_metric(config)
    _check_ranks(config, world)
    log.info("reading the model files")
    with world.all_or_none("finding the models"), world.main_first():
        models = find_models(config)
    with world.all_or_none("reading the files for exports"):
        export_files = _export_files(config, models) if world.is_main and config.checkpointing.enabled else None
    with world.all_or_none("checking the parallel layout and the memory forecast"):
        forecast = plan_memory(config, *models.shapes, world.device)
        if world.is_main:
            log.info("%s", forecast.table())
    with world.all_or_none("checking the generation backend"):
        check_backend(config, models.student, world)
    return ModelInputs(models, export_files, forecast)


def _check_ranks(config: Config, world: World) -> None:
    """Check the number of started ranks and loss_fn.backend, and build the device mesh; collective."""
    cluster, device, parallel = config.cluster, config.runtime.device, config.policy.dtensor_cfg
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    with world.all_or_none("checking the number of ranks"):
        check_cluster(world, cluster.num_nodes, cluster.gpus_per_node, device, tp, cp)
    teacher = config.teacher.dtensor_cfg
    teacher_size = teacher.tensor_parallel_size * teacher.context_parallel_size
    world.build_mesh(device, tp, cp, parallel.replicate_size, teacher_size)
    with world.all_or_none("checking the loss backend"):
        check_loss_backend(config.loss_fn, world.device)


def _find_checkpoint(config: Config, world: World) -> Resume:
    checkpoints = Checkpoints(config.checkpointing, world)
    checkpoints.prepare()
    found = checkpoints.newest()
    return Resume(checkpoints, found, world.broadcast(clock_of(found)))


def _read_data(config: Config, world: World, models: Models, resume: Resume) -> Data:
    """Read the training prompts and held-out problems; verify that all ranks read equal data; collective."""
    log.info("reading the data")
    clock = resume.clock  # chat templates may write the date into prompts
    with world.all_or_none("reading the data"), world.main_first():
        prompts = read_prompts(config, models, clock)
        prefixes = build_teacher_prefixes(config, models.teachers_tokenizer, models.valid_vocab, clock)
        check_teacher_reads_more(config, prefixes, prompts)
        held_out = read_held_out(config, models, clock)
        for problems in (prompts.prompts.problems, [prompt.problem for prompt in held_out.prompts]):
            check_contexts(config, models, prefixes, problems)
        hashes = hashes_of(config, prompts, prefixes, held_out)
    hashes_of_ranks = world.gather((platform.node(), hashes))
    with world.all_or_none("comparing the prompts of all ranks"):
        raise_if_ranks_differ(hashes_of_ranks)
    log_clock(clock, resume.found)
    with world.all_or_none("checking the gold answers"):
        if world.is_main:
            warn_of_unusable_golds(held_out)
    return Data(prompts, prefixes, held_out, hashes)


def _open_run(arguments: Arguments, world: World, resume: Resume, data: Data) -> Start:
    """Compare recipe and checkpoint, create the run directory, open the log and metrics files; collective."""
    config, found = arguments.config, resume.found
    loop = config.distillation
    last_step = data.prompts.steps(loop.max_num_steps, loop.max_num_epochs)
    with world.all_or_none("comparing the checkpoint with the recipe"):
        history = compare_with_checkpoint(found, config, data.prompts, resume.clock, data.hashes["data.validation"])
        first_step = int(found.info["data"]["step"]) if found else 0
    with world.all_or_none("creating the run directory"):
        created = start_run_dir(arguments, history) if world.is_main else Path()
    run_dir = world.broadcast(created)
    with world.all_or_none("opening the log"), writing_run(run_dir):
        world.supervisor.log_to(run_dir, world.rank)
    world.supervisor.status.begin(run_dir, first_step)
    with world.all_or_none("opening the metrics"), writing_run(run_dir):
        recorder = open_recorder(
            config.logger,
            run_dir,
            main=world.is_main,
            total_steps=last_step,
            resumed_step=first_step,
            recipe=yaml.safe_load(arguments.resolved),
            history=found.history if found else (),
        )
    return Start(history, first_step, last_step, run_dir, recorder)


def _load(arguments: Arguments, world: World, inputs: ModelInputs, resume: Resume, data: Data) -> Run:
    """Create the run directory and generation engine, load both models and the checkpoint; return the run."""
    start = _open_run(arguments, world, resume, data)
    config, models, checkpoints = arguments.config, inputs.models, resume.checkpoints
    log.info("starting the generation engine (%s)", config.policy.generation.backend)
    with phase("creating the engine"):
        engine = build_engine(config, models.student, world, models.valid_vocab)
    log.info("loading the student model %s", config.policy.model_name)
    student = Student(config, models.student, world, models.valid_vocab, models.stop_token_ids)
    log.info("loading the teacher model %s", config.teacher.model_name)
    teacher = build_teacher(config, models.teacher, world, models.valid_vocab, student)
    if resume.found is None and config.runtime.verify_teacher:
        difference = verify_teacher(teacher, [prompt.student_ids for prompt in data.prompts.batch(0)])
        log.info(
            "teacher %s verified: its log-probs differ by %.2g nats on average from the log-probs that transformers"
            " computes with the same weights",
            *(config.teacher.model_name, difference),
        )
    teacher.offload()
    if resume.found is not None:
        _restore(resume.found, checkpoints, student, teacher, start)
    packing = packing_of(config, model_config(models.student, "policy.model_name"))
    stop = _stop_check(config, world)

    def compare(rollouts: Sequence[Rollout], step: int) -> list[tuple[Tensor, Tensor]]:
        return token_kls(world, student, teacher, rollouts, packing, config.distillation.seed, step)

    validation = Validation(
        config=validation_config(config, start.first_step, start.last_step),
        world=world,
        held_out=data.held_out,
        decode=partial(models.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        teacher_prefixes=data.teacher_prefixes,
        engine=engine,
        compare=compare,
        sampling=validation_sampling_of(config, models.stop_token_ids),
        run_dir=start.run_dir,
        recorder=start.recorder,
        checkpoints=checkpoints,
        stop=stop,
        measured_at=_validated_step(resume.found, start),
        reference=start.history.in_context_metrics(resume.found),
    )
    return Run(
        config=config,
        world=world,
        run_dir=start.run_dir,
        models=models,
        prompts=data.prompts,
        history=start.history,
        teacher_prefixes=data.teacher_prefixes,
        engine=engine,
        student=student,
        teacher=teacher,
        sync=WeightSync(world, engine, student, models.valid_vocab),
        checkpoints=checkpoints,
        export_files=inputs.export_files,
        recorder=start.recorder,
        validation=validation,
        sampling=sampling_of(config, models.stop_token_ids),
        packing=packing,
        forecast=inputs.forecast,
        stop=stop,
        first_step=start.first_step,
        last_step=start.last_step,
    )


def _restore(found: Found, checkpoints: Checkpoints, student: Student, teacher: Teacher, start: Start) -> None:
    """Load the checkpoint into student and teacher; log changes of recipe and data since the checkpoint."""
    has_optimizer = found.info["recipe"]["checkpointing"]["save_optimizer"]
    checkpoints.load(found.path, student.state(optimizer=has_optimizer) | teacher.state())
    student.resume(start.first_step)
    teacher.resume(student)
    log.info("resumed from checkpoint %s after %d finished steps", found.path, start.first_step)
    if not has_optimizer:
        log.warning(
            "checkpoint %s was saved without the optimizer state (checkpointing.save_optimizer=false), so the"
            " moments of AdamW start at zero and the first updates differ from those of an uninterrupted run: set"
            " checkpointing.save_optimizer=true to avoid this at later resumes",
            found.path,
        )
    warn_of_changes(start.history, found)
    if start.first_step >= start.last_step:
        log.warning(
            "all %d steps of the run are finished: increase distillation.max_num_steps or"
            " distillation.max_num_epochs to continue, or set another checkpointing.checkpoint_dir to start a new run",
            start.last_step,
        )


def _validated_step(found: Found | None, start: Start) -> int:
    """Return the step whose validation is not repeated after a resume; -1 if no validation is skipped.

    The step is that of the checkpoint, if it has validation metrics and the validation problems did not change.
    """
    is_validated = found is not None and has_validation(found.info) and not start.history.validation_changes
    return start.first_step if is_validated else -1


def _stop_check(config: Config, world: World) -> StopCheck:
    supervisor, limit = world.supervisor, config.checkpointing.checkpoint_must_save_by
    return StopCheck(
        lambda: supervisor.stop_signal,
        world.gather,
        Deadline(seconds_of(limit), supervisor.started),
        f"checkpointing.checkpoint_must_save_by={limit}",
    )


def _warn_of_metric(config: Config) -> None:
    """Warn if the settings of checkpointing cannot select the best checkpoints.

    Either checkpointing.metric_name is never measured, or low values of this metric are better although
    checkpointing.higher_is_better is true.
    """
    metric = config.checkpointing.metric_name or ""
    if not config.checkpointing.enabled:
        return
    if config.checkpointing.higher_is_better and _LOW_IS_GOOD.search(metric):
        log.warning(
            "low values of checkpointing.metric_name=%s are better, but the checkpoints with the highest values are"
            " kept: set checkpointing.higher_is_better=false",
            metric,
        )
    if metric.startswith("val:") and not validates(config):
        log.warning(
            "checkpointing.metric_name=%s is never measured, because distillation.val_period=0 and val_at_start and"
            " val_at_end are false, so the newest checkpoints are kept: set distillation.val_period to measure it",
            metric,
        )


def _export_files(config: Config, models: Models) -> ExportFiles:
    tokenizer = config.policy.tokenizer
    return read_export_files(
        models.student,
        models.tokenizer,
        tokenizer.name,
        models.stop_token_ids,
        chat_template=tokenizer.chat_template,
    )
