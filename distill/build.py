"""Build a run: check the recipe, find the checkpoint, read the data, load the models, in this order."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml

from distill.batching.plan import PackingConfig
from distill.checkpoint import Checkpoints, Found
from distill.checkpoint.base_model import raise_if_other_base
from distill.checkpoint.lock import DirectoryLock
from distill.checkpoint.resume import clock_of, warn_of_changes
from distill.config import Arguments, Config
from distill.data.clock import RunClock
from distill.data.references import References
from distill.data.train_grader import TrainGrader
from distill.distributed.allocator import use_expandable_segments
from distill.distributed.world import World
from distill.errors import writing_run
from distill.inputs import (
    Models,
    flops_of,
    packing_of,
)
from distill.loss.token_weights import needs_score_pass
from distill.memory.forecast import Forecast
from distill.metrics.responses import WatchedWords
from distill.metrics.run_alarms import RunAlarms
from distill.metrics.sinks import Recorder, open_recorder, tokens_of
from distill.metrics.utilization import Utilization, device_peak
from distill.model.export_files import ExportFiles
from distill.model.flash_attention import activate_flash_attention, check_same_attention
from distill.model.following_teacher import build_teacher
from distill.model.hf_config import model_config
from distill.model.initial_adapter import load_adapter
from distill.model.peft_files import StoredAdapter
from distill.model.student import DTYPES, Student
from distill.model.teacher import Teacher
from distill.model.teacher_check import verify_teacher
from distill.preflight import (
    Data,
    Steps,
    check_models,
    check_recipe,
    compare,
    find_adapter,
    is_finished,
    read_data,
    validated_step,
)
from distill.rollout.engine import Engine
from distill.rollout.factory import build_engine, sampling_of, validation_sampling_of
from distill.rollout.generation import Generation, Lockstep
from distill.rollout.partial import PartialRollouts
from distill.rollout.responses import StepResponses
from distill.rollout.sync import WeightSync
from distill.rollout.vllm_version import allows_expandable_segments, installed_vllm
from distill.run import Run
from distill.run_dir import new_run_dir, open_run_dir
from distill.supervise.progress import phase
from distill.supervise.signals import Deadline, seconds_of
from distill.supervise.stop import StopCheck
from distill.timing.forecast import StepPredictor
from distill.validation import Validation, validation_config
from distill.validation.comparison import Compare
from distill.validation.probe_setup import with_run_probe
from distill.validation.token_kl import compare_tokens
from distill.validation.train_samples import TrainSamples, shows_traces
from distill.versions import Start, log_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInputs:
    """Model files, files for exports, memory forecast and devices; ready before weights are loaded.

    ``config``: the recipe, with a value in place of each ``auto`` that depends on the memory forecast.
    ``export_files``: the files of an export except weights; None if checkpoints are disabled or this is not rank 0.
    ``start``: devices of all ranks, and package versions.
    """

    config: Config
    models: Models
    export_files: ExportFiles | None
    forecast: Forecast
    start: Start


@dataclass(frozen=True)
class Resume:
    """Checkpoint manager, checkpoint to resume from, and clock with the time of the run's first start.

    Chat templates that insert the date get it from the clock, so prompts do not change at a resume.
    """

    checkpoints: Checkpoints
    found: Found | None
    """Checkpoint from which the run resumes; None if the run starts at step 0."""
    clock: RunClock
    run_dir: Path | None
    """Run directory, if it already exists because checkpoints are saved in it; otherwise None."""


@dataclass(frozen=True)
class RunDir:
    """Run directory and metrics recorder; ``lock`` is None except on rank 0."""

    path: Path
    recorder: Recorder
    lock: DirectoryLock | None


def build_run(
    arguments: Arguments, world: World, check_data: Callable[[Models, Data, RunClock], None] | None = None
) -> Run | None:
    """Check the recipe, load the models and the checkpoint, and return the run; collective.

    Returns None, without creating a run directory, if the checkpoint shows that the run has finished all its steps.
    Raises UserError on all ranks for errors in the recipe or in the files that it names, in most cases before any
    weight is loaded. ``check_data``: additional check of the data before any weight is loaded, which may raise
    UserError.
    """
    config = arguments.config
    world.supervisor.allow_loading(config.runtime.phase_timeout_s)
    inputs = _check(config, world)
    resume = _find_checkpoint(config, world)
    data = read_data(config, world, inputs.models, resume.clock, resume.found)
    assert data is not None, "only a dry run continues without its data"
    with world.all_or_none("checking the data"):
        if check_data is not None:
            check_data(inputs.models, data, resume.clock)
    steps = compare(config, world, resume.found, resume.clock, data, inputs.export_files)
    adapter = find_adapter(config, world, inputs.models, resume.found)
    if is_finished(config, resume.found, steps):
        log.info(
            "all %d steps of this run are finished (checkpoint %s): increase distillation.max_num_steps or"
            " distillation.max_num_epochs to continue, or set another checkpointing.checkpoint_dir to start a new run",
            *(steps.last, resume.found and resume.found.path),
        )
        world.supervisor.status.set_step(steps.first)
        return None
    return _load(arguments, world, inputs, resume, data, steps, adapter)


def _check(config: Config, world: World) -> ModelInputs:
    """Check the recipe against the started ranks and the model files; build the device mesh; collective."""
    check_recipe(config, world)
    start = log_start(world, config.policy.generation.backend)
    log.info("reading the model files")
    checked = check_models(config, world, partial(log.info, "%s"))
    models, forecast = checked.models, checked.forecast
    assert models is not None and forecast is not None, "only a dry run continues without its models"
    return ModelInputs(checked.config, models, checked.export_files, forecast, start)


def _find_checkpoint(config: Config, world: World) -> Resume:
    checkpointing, run_dir = config.checkpointing, None
    if checkpointing.enabled and checkpointing.checkpoint_dir is None:
        run_dir = _create_run_dir(config, world)
        checkpointing = replace(checkpointing, checkpoint_dir=str(run_dir / "checkpoints"))
    checkpoints = Checkpoints(checkpointing, world)
    checkpoints.prepare()
    found = checkpoints.find()
    return Resume(checkpoints, found, world.broadcast(clock_of(found)), run_dir)


def _create_run_dir(config: Config, world: World) -> Path:
    with world.all_or_none("creating the run directory"):
        created = new_run_dir(config.logger.log_dir, config.runtime.run_dir) if world.is_main else Path()
    return world.broadcast(created)


def _open_run(arguments: Arguments, world: World, resume: Resume, steps: Steps, start: Start) -> RunDir:
    """Create and lock the run directory, open the log and metrics files; collective."""
    config, found, history = arguments.config, resume.found, steps.history
    run_dir = resume.run_dir or _create_run_dir(config, world)
    with world.all_or_none("opening the run directory"):
        lock = open_run_dir(arguments, run_dir, history, found, steps.last, start) if world.is_main else None
    with world.all_or_none("opening the log"), writing_run(run_dir):
        world.supervisor.log_to(run_dir, world.rank)
    world.supervisor.status.begin(run_dir, steps.first)
    with world.all_or_none("opening the metrics"), writing_run(run_dir):
        recorder = open_recorder(
            config.logger,
            run_dir,
            main=world.is_main,
            total_steps=steps.last,
            resumed_step=steps.first,
            recipe=yaml.safe_load(arguments.resolved),
            history=found.history if found and history.same_run else (),  # a changed run has no earlier metrics
            total_tokens=tokens_of(found.history) if found else 0.0,
            shows_traces=shows_traces(config),
        )
    return RunDir(run_dir, recorder, lock)


def _load(
    arguments: Arguments,
    world: World,
    inputs: ModelInputs,
    resume: Resume,
    data: Data,
    steps: Steps,
    adapter: StoredAdapter | None,
) -> Run:
    """Create the run directory, engine, student and teacher, load the checkpoint or ``adapter``, and return the run."""
    run_dir = _open_run(arguments, world, resume, steps, inputs.start)
    config, models, checkpoints = inputs.config, inputs.models, resume.checkpoints
    log.info("starting the generation engine (%s)", config.policy.generation.backend)
    with phase("creating the engine"):
        engine = _build_engine(config, models, world)
    _activate_attention(config, models, world)
    student = _load_student(config, models, world, adapter)
    teacher = _load_teacher(config, models, world, student, data, verify=resume.found is None)
    teacher.offload()
    if resume.found is not None:
        with phase("loading the checkpoint"):
            raise_if_other_base(resume.found, student.base, config.policy.model_name)
            _restore(resume.found, checkpoints, student, teacher, steps)
    packing = packing_of(config, model_config(models.student, "policy.model_name"))
    stop = _stop_check(config, world)
    compare_responses = _comparison(config, world, student, teacher, packing)
    decode = partial(models.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    alarms = _alarms(config, world, run_dir.path, resume, steps)
    validation = Validation(
        config=validation_config(config, steps.first, steps.last),
        world=world,
        held_out=data.held_out,
        decode=decode,
        teacher_prefixes=data.validation_prefixes,
        engine=engine,
        compare=compare_responses,
        sampling=validation_sampling_of(config, models.stop_token_ids),
        run_dir=run_dir.path,
        recorder=run_dir.recorder,
        checkpoints=checkpoints,
        alarms=alarms,
        stop=stop,
        measured_at=validated_step(resume.found, steps),
        reference=steps.history.in_context_metrics(resume.found),
        first=steps.history.first_validation(resume.found),
    )
    validation = with_run_probe(config, validation)
    responses = _responses(config, models, world, engine, data, decode)
    generation = _generation(config, world, engine, data, responses, steps)
    if resume.found is not None:
        generation.restore(resume.found)
    _freeze_heap()
    return Run(
        config=arguments.config,  # checkpoints store the recipe with its ``auto``, so a resume may choose other values
        world=world,
        run_dir=run_dir.path,
        run_lock=run_dir.lock,
        models=models,
        prompts=data.prompts,
        generation=generation,
        responses=responses,
        history=steps.history,
        engine=engine,
        student=student,
        teacher=teacher,
        sync=WeightSync(world, engine, student, models.valid_vocab),
        checkpoints=checkpoints,
        export_files=inputs.export_files,
        recorder=run_dir.recorder,
        alarms=alarms,
        utilization=_utilization(config, models, world, packing),
        train_samples=TrainSamples(config, decode, run_dir.path, run_dir.recorder, steps.first, compare_responses),
        validation=validation,
        packing=packing,
        forecast=inputs.forecast,
        time_forecast=StepPredictor(config, *models.shapes, world.device),
        stop=stop,
        first_step=steps.first,
        last_step=steps.last,
    )


def _comparison(config: Config, world: World, student: Student, teacher: Teacher, packing: PackingConfig) -> Compare:
    """Return a collective function that compares student and teacher at every token of given responses."""
    seed, top_tokens = config.distillation.seed, config.logger.top_tokens_per_sample
    return partial(compare_tokens, world, student, teacher, packing=packing, seed=seed, top_tokens=top_tokens)


def _load_student(config: Config, models: Models, world: World, adapter: StoredAdapter | None) -> Student:
    """Load the student; its adapters start with the values of ``adapter`` if it is not None; collective."""
    log.info("loading the student model %s", config.policy.model_name)
    with phase("loading the student model"):
        student = Student(config, models.student, world, models.valid_vocab, models.stop_token_ids)
        if adapter is not None:
            load_adapter(adapter, student, world)
    return student


def _load_teacher(config: Config, models: Models, world: World, student: Student, data: Data, verify: bool) -> Teacher:
    """Load the teacher; with ``verify``, compare it with transformers if the recipe requires it; collective."""
    with phase("loading the teacher model"):
        teacher = build_teacher(config, models.teacher, world, models.valid_vocab, student)
    if verify and config.runtime.verify_teacher:
        with phase("verifying the teacher"):
            difference = verify_teacher(teacher, [prompt.student_ids for prompt in data.prompts.batch(0)])
        log.info(
            "teacher %s verified: its log-probs differ by %.2g nats on average from the log-probs that transformers"
            " computes with the same weights",
            *(config.teacher.model_name, difference),
        )
    return teacher


def _alarms(config: Config, world: World, run_dir: Path, resume: Resume, steps: Steps) -> RunAlarms:
    """Return the alarms of the run, in their state after the loaded checkpoint."""
    found, checkpoints = resume.found, resume.checkpoints
    history = found.history if found and steps.history.same_run else ()  # a changed run has no earlier metrics
    loop = config.distillation
    if loop.default_alarms and config.data.validation and loop.val_period and not (loop.val_at_start or steps.first):
        log.info(
            "the alarm accuracy compares with the validation after step %d, the first one: set"
            " distillation.val_at_start=true to compare with the accuracy before training",
            loop.val_period,
        )
    with world.all_or_none("reading the state of the alarms"):
        return RunAlarms(
            config.distillation,
            world,
            run_dir,
            steps.last,
            history,
            checkpoints.before,
            config.checkpointing.enabled,
            kept_until=-1 if steps.history.same_run else steps.first,
        )


def _responses(
    config: Config, models: Models, world: World, engine: Engine, data: Data, decode: Callable[[Sequence[int]], str]
) -> StepResponses:
    tags = config.distillation.context_distillation.trace_extractor.think_tags
    kwargs = config.policy.tokenizer.chat_template_kwargs
    return StepResponses(
        config=config,
        world=world,
        sampling=sampling_of(config, models.stop_token_ids),
        window=engine.window,
        references=References(
            models.tokenizer, models.stop_token_ids, models.valid_vocab, tags, kwargs, data.prompts.prompts.location
        ),
        grader=TrainGrader(data.graders, decode, tags),
        teacher_prefixes=data.teacher_prefixes,
        words=WatchedWords(config.distillation.watched_words, decode),
    )


def _generation(
    config: Config, world: World, engine: Engine, data: Data, responses: StepResponses, steps: Steps
) -> Generation:
    """Return the strategy of generation that the recipe selects; collective."""
    if not config.distillation.partial_rollouts.enabled:
        return Lockstep(data.prompts, responses, engine)
    return PartialRollouts(config.distillation, world, data.prompts, responses, engine, steps.first, steps.last)


def _build_engine(config: Config, models: Models, world: World) -> Engine:
    """Build the generation engine, then use expandable segments on GPUs if the engine supports them; collective.

    Not before: CUDA graphs of a vLLM engine on several GPUs share their memory between processes, and memory in
    expandable segments cannot be shared in this way: vLLM would end the process.
    """
    engine = build_engine(config, models.student, world, models.valid_vocab)
    uses_vllm = config.policy.generation.backend == "vllm"
    if world.device.type == "cuda" and (not uses_vllm or allows_expandable_segments(installed_vllm())):
        use_expandable_segments()
    return engine


def _activate_attention(config: Config, models: Models, world: World) -> None:
    """Activate the attention kernel; raise UserError on all ranks if GPUs support different ones; collective."""
    files = ((models.student, "policy.model_name"), (models.teacher, "teacher.model_name"))
    with world.all_or_none("checking runtime.attention"):
        configs = [model_config(*each) for each in files]
        name = activate_flash_attention(config.runtime.attention, configs, world.device)
    names = world.gather(name)
    with world.all_or_none("comparing the attention kernels of all ranks"):
        check_same_attention(config.runtime.attention, names)


def _freeze_heap() -> None:
    """Exclude all current objects from garbage collection; the engine, the models and the libraries live to the end.

    Otherwise each full collection in the training loop would visit all of them.
    """
    gc.collect()
    gc.freeze()


def _utilization(config: Config, models: Models, world: World, packing: PackingConfig) -> Utilization:
    flops = flops_of(model_config(models.student, "policy.model_name"), config.policy.dtensor_cfg.lora_cfg)
    peak = device_peak(world.device, DTYPES[config.policy.precision])
    scores = needs_score_pass(config.loss_fn, config.distillation.topk_logits_k)
    return Utilization(flops, packing.share_prefixes, world.size, peak, packing.weights, scores)


def _restore(found: Found, checkpoints: Checkpoints, student: Student, teacher: Teacher, steps: Steps) -> None:
    """Load the checkpoint into student and teacher; log changes of recipe and data since the checkpoint."""
    has_optimizer = found.info["recipe"]["checkpointing"]["save_optimizer"]
    checkpoints.load(found.path, student.state(optimizer=has_optimizer) | teacher.state())
    student.resume(steps.first)
    teacher.resume(student)
    log.info("resumed from checkpoint %s after %d finished steps", found.path, steps.first)
    if not has_optimizer:
        log.warning(
            "checkpoint %s was saved without the optimizer state (checkpointing.save_optimizer=false), so the"
            " moments of AdamW start at zero and the first updates differ from those of an uninterrupted run: set"
            " checkpointing.save_optimizer=true to avoid this at later resumes",
            found.path,
        )
    warn_of_changes(steps.history, found)


def _stop_check(config: Config, world: World) -> StopCheck:
    supervisor, limit = world.supervisor, config.checkpointing.checkpoint_must_save_by
    return StopCheck(
        lambda: supervisor.stop_signal,
        world.gather,
        Deadline(seconds_of(limit), supervisor.started),
        f"checkpointing.checkpoint_must_save_by={limit}",
    )
