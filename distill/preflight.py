"""The checks before any weight is loaded; a run and a dry run make the same checks, in this order."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from distill.checkpoint import Found, files_of, has_validation
from distill.checkpoint.manifest import retry_io
from distill.checkpoint.resume import RunHistory, compare_with_checkpoint, log_clock
from distill.config import Config
from distill.config.loop_rules import warn_of_loop
from distill.config.lora_rules import teacher_shares_base, warn_of_lora
from distill.data.clock import RunClock
from distill.data.content import ContentHashes, raise_if_ranks_differ
from distill.data.prompts import PromptOrder
from distill.data.references import check_references
from distill.data.teacher_prefix import (
    SamePromptPrefixes,
    TeacherPrefixes,
    build_context_prefixes,
    build_teacher_prefixes,
)
from distill.data.train_grader import Graders, find_graders
from distill.distributed.cluster import check_cluster, warn_of_cpu
from distill.distributed.world import World
from distill.inputs import (
    Models,
    check_contexts,
    check_teacher_reads_more,
    engine_window_of,
    find_models,
    hashes_of,
    read_held_out,
    read_prompts,
    validates,
)
from distill.loss import check_loss_backend
from distill.memory.auto import resolve
from distill.memory.forecast import Forecast, known_shapes, plan_memory
from distill.metrics.sinks import check_packages
from distill.model.export_files import ExportFiles, read_export_files, stored_export_files
from distill.model.fused_layers import uses_fused_layers
from distill.model.hf_config import model_config
from distill.model.initial_adapter import initial_adapter
from distill.model.peft_files import StoredAdapter
from distill.rollout.factory import check_backend
from distill.validation import HeldOut, validation_config
from distill.validation.golds import warn_of_unusable_golds
from distill.validation.probe_setup import check_run_probe

log = logging.getLogger(__name__)

Missing = Callable[[], AbstractContextManager[None]]
"""Function that returns a context manager for a check of packages, models or files.

In a dry run, the context manager catches errors about packages, models and files that are missing on this machine. In
a run it catches no errors (nullcontext).
"""

_LOW_IS_GOOD = re.compile(r"(_kl|loss|truncation_rate)$")


@dataclass(frozen=True)
class CheckedModels:
    """Results of the checks of the models. Models and forecast are None only in a dry run without a model's files."""

    config: Config
    """The recipe, with a value in place of each ``auto`` that depends on the memory forecast."""
    models: Models | None
    export_files: ExportFiles | None
    """Files for Hugging Face exports; None if checkpoints are disabled or this is not rank 0."""
    forecast: Forecast | None


@dataclass(frozen=True)
class Data:
    """Input data of a run: training prompts, builder of the teacher's prompts, validation prompts."""

    prompts: PromptOrder
    teacher_prefixes: TeacherPrefixes
    validation_prefixes: TeacherPrefixes
    """Builder of the teacher's prompts in validations, which contain the context also in a control experiment."""
    held_out: HeldOut
    graders: Graders
    """Graders of the training responses."""
    hashes: dict[str, ContentHashes]
    """Maps a configuration key, such as data.train, to hashes of the data that this rank read."""


@dataclass(frozen=True)
class Steps:
    """First and last step of this process, and the history of the run before it."""

    history: RunHistory
    first: int
    """Number of finished steps when this process starts: 0, or the step of the checkpoint."""
    last: int
    """Number of finished steps at which the run ends."""


def check_recipe(config: Config, world: World, missing: Missing = nullcontext) -> None:
    """Check the recipe against the installed packages and the started ranks; build the device mesh; collective.

    ``missing``: context manager that may catch errors about missing packages, see ``Missing``.
    """
    _warn_of_metric(config)
    _warn_of_validation_limit(config)
    warn_of_loop(config)
    warn_of_lora(config)
    with missing(), world.all_or_none("checking the installed packages"):
        check_packages(config.logger)
    _check_ranks(config, world, missing)


def _check_ranks(config: Config, world: World, missing: Missing) -> None:
    """Check the number of started ranks and loss_fn.backend, and build the device mesh; collective."""
    cluster, device, parallel = config.cluster, config.runtime.device, config.policy.dtensor_cfg
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    with missing(), world.all_or_none("checking the number of ranks"):
        check_cluster(world, cluster.num_nodes, cluster.gpus_per_node, device, tp, cp)
    teacher = None if teacher_shares_base(config) else config.teacher.dtensor_cfg.group_size
    world.build_mesh(device, tp, cp, parallel.replicate_size, teacher)
    warn_of_cpu(world, device, cluster.gpu)
    with missing(), world.all_or_none("checking the loss backend"):
        check_loss_backend(config.loss_fn, world.device)
    with missing(), world.all_or_none("checking runtime.fused_layers"):
        uses_fused_layers(config.runtime.fused_layers, world.device)


def check_models(
    config: Config, world: World, report: Callable[[str], None], missing: Missing = nullcontext
) -> CheckedModels:
    """Check the model files, the parallel sizes, the memory forecast and the generation engine; collective.

    ``report`` receives the text of the forecast and of the values that replace ``auto``, on rank 0.
    """
    models, export_files = None, None
    with missing(), world.all_or_none("finding the models"), world.main_first():
        models = find_models(config)
    with world.all_or_none("reading the files for exports"):
        if models is not None and world.is_main and config.checkpointing.enabled:
            export_files = _export_files(config, models)
    sizes = [size for size in world.gather(world.gpu_bytes) if size is not None]
    card = min(sizes, default=None)  # the values that replace auto must be equal on all ranks
    with world.all_or_none("checking the parallel layout and the memory forecast"):
        shapes = known_shapes(config) if models is None else models.shapes
        resolved = resolve(config, *shapes, card, world.device.type == "cuda")
        log_line = report if world.is_main else _ignore
        for decision in resolved.decisions:
            log_line(decision)
        forecast = plan_memory(resolved.config, *shapes, world.device, log_line, card)
    with missing(), world.all_or_none("checking the generation backend"):
        check_backend(config, None if models is None else models.student, world)
    return CheckedModels(resolved.config, models, export_files, forecast)


def _ignore(text: str) -> None:
    pass


def read_data(
    config: Config, world: World, models: Models, clock: RunClock, found: Found | None, missing: Missing = nullcontext
) -> Data | None:
    """Read the training and validation prompts; verify that all ranks read equal data; collective.

    ``clock``: the run's clock, because chat templates may write the date into prompts; ``found``: the checkpoint to
    resume from. Returns None only if ``missing`` has caught an error about the training data.
    """
    log.info("reading the data")
    prompts, held_out = None, HeldOut()
    prefixes: TeacherPrefixes = SamePromptPrefixes()
    with_context = prefixes
    with world.all_or_none("reading the data"), world.main_first():
        with missing():
            prompts = read_prompts(config, models, clock)
        with missing():
            prefixes = build_teacher_prefixes(config, models.teachers_tokenizer, models.valid_vocab, clock)
            with_context = prefixes
            if config.distillation.control:
                with_context = build_context_prefixes(config, models.teachers_tokenizer, models.valid_vocab, clock)
        if prompts is not None:
            check_teacher_reads_more(config, prefixes, prompts)
            check_references(config, prompts.prompts, models.tokenizer)
        with missing():
            held_out = read_held_out(config, models, clock)
        check_run_probe(config, held_out, with_context, engine_window_of(config, models))
        problems = [] if prompts is None else [prompts.prompts.problems]
        for each in (*problems, [prompt.problem for prompt in held_out.prompts]):
            check_contexts(config, models, with_context, each)
        hashes = {} if prompts is None else hashes_of(config, prompts, prefixes, held_out)
    hashes_of_ranks = world.gather((platform.node(), hashes))
    with world.all_or_none("comparing the prompts of all ranks"):
        raise_if_ranks_differ(hashes_of_ranks)
    log_clock(clock, found)
    graders = Graders()
    with missing(), world.all_or_none("checking the gold answers"):
        if world.is_main:
            warn_of_unusable_golds(held_out)
            graders = graders if prompts is None else find_graders(config, prompts.prompts)
    graders = world.broadcast(graders)
    return None if prompts is None else Data(prompts, prefixes, with_context, held_out, graders, hashes)


def compare(
    config: Config,
    world: World,
    found: Found | None,
    clock: RunClock,
    data: Data | None,
    export_files: ExportFiles | None,
) -> Steps:
    """Compare the checkpoint with the recipe, the data and the student's settings; return the steps; collective.

    ``data`` is None only in a dry run without the data; the number of steps per epoch is then unknown.
    ``export_files``: the student's files on rank 0; None on other ranks, and in a dry run without them.
    """
    loop = config.distillation
    prompts, validation = (None, None) if data is None else (data.prompts, data.hashes["data.validation"])
    model_changes: list[str] = []
    with world.all_or_none("comparing the model's settings with the checkpoint"):
        if found is not None and export_files is not None:
            stored = retry_io(partial(stored_export_files, found.path, files_of(found.info)))
            model_changes = [] if stored is None else stored.changes(export_files)
    model_changes = world.broadcast(model_changes)
    with world.all_or_none("comparing the checkpoint with the recipe"):
        history = compare_with_checkpoint(found, config, prompts, clock, validation, model_changes)
        first = int(found.info["data"]["step"]) if found else 0
    last = loop.max_num_steps if prompts is None else prompts.steps(loop.max_num_steps, loop.max_num_epochs)
    return Steps(history, first, last)


def find_adapter(
    config: Config, world: World, models: Models | None, found: Found | None, missing: Missing = nullcontext
) -> StoredAdapter | None:
    """Return the adapter with which the run starts; None without one, and if the run resumes; collective.

    ``found``: the checkpoint to resume from, which contains the adapters. ``models`` is None only in a dry run without
    a model's files; the adapter is then not checked. ``missing``: see ``Missing``.
    """
    adapter = None
    if found is None and models is not None:
        with missing(), world.all_or_none("checking the initial adapter"):
            adapter = initial_adapter(config, model_config(models.student, "policy.model_name"))
    return adapter


def is_finished(config: Config, found: Found | None, steps: Steps) -> bool:
    """Return whether no step and no validation is left to do."""
    if found is None or steps.first < steps.last:
        return False
    settings = validation_config(config, steps.first, steps.last)
    return steps.first > steps.last or not settings.due(steps.last) or validated_step(found, steps) == steps.last


def validated_step(found: Found | None, steps: Steps) -> int:
    """Return the step whose validation is not repeated after a resume, or -1.

    This is the checkpoint's step, if the checkpoint has validation metrics and the validation problems did not change.
    """
    is_validated = found is not None and has_validation(found.info) and not steps.history.validation_changes
    return steps.first if is_validated else -1


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


def _warn_of_validation_limit(config: Config) -> None:
    """Warn if the longest responses of validation do not fit into the teacher's window."""
    tokens, window = config.policy.generation.val_max_new_tokens, config.teacher.max_total_sequence_length
    if validates(config) and min(tokens, config.policy.max_total_sequence_length - 1) >= window:
        log.warning(
            "policy.generation.val_max_new_tokens=%d leaves no room for a prompt in"
            " teacher.max_total_sequence_length=%d, so the longest responses of validation are graded, but not compared"
            " with the teacher: raise teacher.max_total_sequence_length to include them",
            *(tokens, window),
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
