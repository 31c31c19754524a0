"""A run's parts, checked and put together: everything that is wrong with a recipe is found here, weights last."""

from __future__ import annotations

import json
import logging
import os.path
import platform
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from distill.checkpoint import Checkpoints, has_validation
from distill.checkpoint.resume import RunHistory, clock_of, compare_with_checkpoint, log_clock, warn_of_changes
from distill.config import Arguments, Config
from distill.data.content import raise_if_ranks_differ
from distill.data.teacher_prefix import build_teacher_prefixes
from distill.distributed.cluster import check_cluster
from distill.distributed.world import World
from distill.errors import writing_run
from distill.inputs import (
    Models,
    check_contexts,
    check_reading,
    contents_of,
    find_models,
    packing_of,
    read_held_out,
    read_prompts,
    validates,
)
from distill.loss import check_loss_backend
from distill.memory.forecast import plan_memory
from distill.metrics.sinks import open_recorder
from distill.model.export_files import ExportFiles, read_export_files
from distill.model.hf_config import model_config
from distill.model.student import Student
from distill.model.teacher import build_teacher
from distill.model.teacher_check import verify_teacher
from distill.rollout.factory import build_engine, check_backend, sampling_of, validation_sampling_of
from distill.rollout.sync import WeightSync
from distill.run import Run
from distill.run_dir import new_run_dir
from distill.supervise.progress import phase
from distill.supervise.signals import Deadline, seconds_of
from distill.validation import Validation
from distill.validation.golds import warn_of_unusable_golds

log = logging.getLogger(__name__)

_LOW_IS_GOOD = re.compile(r"(_kl|loss|truncation_rate)$")
_PACKAGES = ("torch", "transformers", "vllm", "triton", "safetensors", "datasets")


def build_run(arguments: Arguments, world: World) -> Run:
    """Check the recipe against the world, the files and each other, then load; every rank calls it.

    Raises UserError, on all ranks alike, for what the user can put right.
    """
    config = arguments.config
    world.supervisor.allow_loading(config.runtime.phase_timeout_s)
    with world.all_or_none("checking the recipe"):
        _check_supported(config)
    cluster, device, parallel = config.cluster, config.runtime.device, config.policy.dtensor_cfg
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    with world.all_or_none("checking the cluster"):
        check_cluster(world, cluster.num_nodes, cluster.gpus_per_node, device, tp, cp)
    theirs = config.teacher.dtensor_cfg
    teacher_size = theirs.tensor_parallel_size * theirs.context_parallel_size
    world.build_mesh(device, tp, cp, parallel.replicate_size, teacher_size)
    with world.all_or_none("checking the loss"):
        check_loss_backend(config.loss_fn, world.device)
    with world.all_or_none("finding the models"), world.main_first():
        models = find_models(config)
    with world.all_or_none("reading the files that exports copy"):
        exported = _export_files(config, models) if world.is_main and config.checkpointing.enabled else None
    with world.all_or_none("checking the layout and the memory"):
        forecast = plan_memory(config, *models.shapes, world.device)
        if world.is_main:
            log.info("%s", forecast.table())
    with world.all_or_none("checking the generation backend"):
        check_backend(config, models.student, world)
    checkpoints = Checkpoints(config.checkpointing, world)
    checkpoints.prepare()
    found = checkpoints.newest()
    clock = world.broadcast(clock_of(found))  # before the data are read: chat templates may write the date
    with world.all_or_none("reading the data"), world.main_first():
        order = read_prompts(config, models, clock)
        views = build_teacher_prefixes(config, models.teachers_tokenizer, models.valid_vocab, clock)
        check_reading(config, views, order)
        held_out = read_held_out(config, models, clock)
        for problems in (order.prompts.problems, [prompt.problem for prompt in held_out.prompts]):
            check_contexts(config, models, views, problems)
        contents = contents_of(config, order, views, held_out)
    everyone = world.gather((platform.node(), contents))
    with world.all_or_none("comparing the prompts of all ranks"):
        raise_if_ranks_differ(everyone)
    log_clock(clock, found)
    with world.all_or_none("checking the gold answers"):
        if world.is_main:
            warn_of_unusable_golds(held_out)
    last_step = order.steps(config.distillation.max_num_steps, config.distillation.max_num_epochs)
    with world.all_or_none("comparing the checkpoint with the recipe"):
        origin = compare_with_checkpoint(found, config, order, clock, contents["data.validation"])
        first_step = int(found.info["data"]["step"]) if found else 0
    with world.all_or_none("making the run's folder"):
        made = _start_run_dir(arguments, origin) if world.is_main else Path()
    run_dir = world.broadcast(made)
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
    with phase("making the engine"):
        engine = build_engine(config, models.student, world, models.valid_vocab)
    student = Student(config, models.student, world, models.valid_vocab, models.stop_token_ids)
    teacher = build_teacher(config, models.teacher, world, models.valid_vocab, student)
    difference = verify_teacher(teacher, [prompt.student_ids for prompt in order.batch(0)])
    log.info("teacher %s proven: packed and sharded it differs by %.2g nats", config.teacher.model_name, difference)
    teacher.offload()
    if found is not None:
        has_moments = found.info["recipe"]["checkpointing"]["save_optimizer"]
        checkpoints.load(found.path, student.state(optimizer=has_moments) | teacher.state())
        student.resume(first_step)
        teacher.resume(student)
        log.info("resumed from %s after %d steps", found.path, first_step)
        if not has_moments:
            log.warning(
                "%s holds no optimizer (checkpointing.save_optimizer=false): AdamW begins with fresh moments",
                found.path,
            )
        warn_of_changes(origin, found)
        if first_step >= last_step:
            remedy = "raise distillation.max_num_steps=%d or set another checkpointing.checkpoint_dir"
            log.warning(f"nothing is left to do: {remedy}", last_step)
    packing = packing_of(config, model_config(models.student, "policy.model_name"))
    validation = Validation(
        config=config,
        world=world,
        held_out=held_out,
        decode=partial(models.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        views=views,
        engine=engine,
        student=student,
        teacher=teacher,
        packing=packing,
        sampling=validation_sampling_of(config, models.stop_token_ids),
        last_step=last_step,
        run_dir=run_dir,
        recorder=recorder,
        checkpoints=checkpoints,
        measured_at=first_step if found and has_validation(found.info) and not origin.validation_changes else -1,
        reference=origin.in_context_metrics(found),
    )
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        models=models,
        order=order,
        origin=origin,
        views=views,
        engine=engine,
        student=student,
        teacher=teacher,
        sync=WeightSync(world, engine, student, models.valid_vocab),
        checkpoints=checkpoints,
        exported=exported,
        recorder=recorder,
        validation=validation,
        sampling=sampling_of(config, models.stop_token_ids),
        packing=packing,
        forecast=forecast,
        deadline=Deadline(seconds_of(config.checkpointing.checkpoint_must_save_by), world.supervisor.started),
        first_step=first_step,
        last_step=last_step,
    )


def _check_supported(config: Config) -> None:
    checkpointing = config.checkpointing
    low = _LOW_IS_GOOD.search(checkpointing.metric_name or "")
    if checkpointing.enabled and checkpointing.higher_is_better and low:
        log.warning(
            "checkpointing.metric_name=%s ranks the highest first, and the lowest is best of it: set"
            " checkpointing.higher_is_better=false to keep the best",
            checkpointing.metric_name,
        )
    by_validation = checkpointing.enabled and (checkpointing.metric_name or "").startswith("val:")
    if by_validation and not validates(config):
        log.warning(
            "checkpointing.metric_name=%s is never measured, as distillation.val_period=0 and val_at_start and"
            " val_at_end are false: the newest checkpoints are kept",
            checkpointing.metric_name,
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


def _start_run_dir(arguments: Arguments, origin: RunHistory) -> Path:
    """Make the run's folder with the resolved recipe and the versions in it; the main rank's work."""
    config = arguments.config
    run_dir = new_run_dir(config.logger.log_dir, config.runtime.run_dir)
    with writing_run(run_dir):
        (run_dir / "config.yaml").write_text(arguments.resolved)
        (run_dir / "versions.json").write_text(json.dumps(_versions() | {"clock": str(origin.clock)}, indent=2) + "\n")
        origin.write(run_dir)
    log.info("run folder %s", os.path.relpath(run_dir))
    return run_dir


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "command": sys.argv}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = None
    return found
