"""A run's parts, checked and put together: everything that is wrong with a recipe is found here, weights last."""

from __future__ import annotations

import json
import logging
import math
import os.path
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from distill.config import Arguments, Config
from distill.data.context import TeacherViews, ViewCounts, teacher_views
from distill.data.prompts import PromptOrder, load_prompts
from distill.loss import check_loss_backend
from distill.model.export import export_hf
from distill.model.following import build_teacher
from distill.model.load import (
    ModelFiles,
    compare_vocabularies,
    find_model,
    load_tokenizer,
    model_config,
    stop_ids,
)
from distill.model.memory import PHASES, Forecast, plan_memory
from distill.model.shapes import ModelShape, shape_of
from distill.model.student import Student
from distill.model.teacher import Teacher, check_top_k
from distill.model.tensor_parallel import check_plan
from distill.rollout.build import build_engine, check_backend, sampling_of, validation_sampling_of
from distill.rollout.engine import Engine
from distill.rollout.freshness import Freshness
from distill.runtime.checkpoint import Checkpoints, has_validation
from distill.runtime.dealing import quadratic_cost
from distill.runtime.metrics import Metrics, Phases, add_rollouts, finish_step
from distill.runtime.metrics_sinks import METRICS_FILE, Recorder, open_recorder, read_metrics, summary
from distill.runtime.packing import PackingConfig
from distill.runtime.world import World, new_run_dir
from distill.types import Layout, Prompt, Rollout, Sampling, UserError
from distill.validation import HeldOut, Validation, load_held_out

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "vllm", "triton", "safetensors", "datasets")


@dataclass(frozen=True)
class Models:
    """The two checkpoints and what their tokenizers say, before any weight is loaded."""

    student: ModelFiles
    teacher: ModelFiles
    tokenizer: Any
    valid_vocab: int
    """Ids the tokenizer knows; the embeddings may be padded beyond."""
    stop_token_ids: tuple[int, ...]
    shapes: tuple[ModelShape, ModelShape]
    """Of the student and of the teacher."""


@dataclass
class Run:
    """All parts of a run on this rank; ``first_step`` is above 0 when it goes on from a checkpoint."""

    config: Config
    world: World
    run_dir: Path
    models: Models
    order: PromptOrder
    views: TeacherViews
    engine: Engine
    student: Student
    teacher: Teacher
    freshness: Freshness
    checkpoints: Checkpoints
    recorder: Recorder
    validation: Validation
    sampling: Sampling
    packing: PackingConfig
    forecast: Forecast
    first_step: int
    last_step: int

    @property
    def layout(self) -> Layout:
        """This rank's place among those that train."""
        return self.world.layout

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.distillation.seed

    def phases(self) -> Phases:
        """A fresh clock for a step."""
        return Phases(self.world.device)

    def record(
        self,
        step: int,
        metrics: Metrics,
        phases: Phases,
        mine: list[Rollout],
        trained: list[Rollout],
        counts: ViewCounts,
        lr: float,
    ) -> None:
        """Reduce the numbers of a finished step over ranks and write them; collective.

        ``mine``: the answers this rank generated; ``trained``: those of all ranks that were not left out.
        """
        if not trained:
            log.warning("step %d trained nothing: all answers were left out (%s)", step, dict(counts.totals))
        add_rollouts(metrics, mine)
        if self.config.distillation.context_distillation.metrics.enabled:
            metrics.add(counts.means)
            metrics.add_totals(counts.totals)
        scored = sum(len(rollout.response_ids) for rollout in trained)
        read = sum(len(rollout.teacher_prefix_ids) for rollout in trained) + scored
        metrics.add_same(
            {
                "lr": lr,
                "global_valid_seqs": float(len(trained)),
                "global_valid_toks": float(scored),
                "teacher_tokens": float(read),
            }
        )
        metrics.add_max({"engine_residual_gib": self.engine.residual_bytes / 2**30})
        metrics.add_max({"timing/train/generation_slowest": phases.seconds["generation"]})
        values = finish_step(metrics, phases, self.world.control)
        self.recorder.record(step, values)
        if step == self.first_step + 2:  # the optimizer's state appears with the first
            self._compare_memory(phases)
        self.checkpoints.note(step, values)
        if self.sampling.full:  # else the sampler's log-probs are those of a part of the vocabulary
            self.freshness.observe(values.get("train/sampler_logprob_diff", math.nan))

    def _compare_memory(self, phases: Phases) -> None:
        """Log what a step took of memory, the most of any rank, beside what was predicted; collective."""
        asleep = {"teacher", "train"}  # torch counts the sleeping engine's pool as given out, though it is free
        found = {
            phase: (phases.memory[name] - (self.engine.pool_bytes if phase in asleep else 0)) / 2**30
            for phase, name in PHASES.items()
            if name in phases.memory
        }
        everyone = self.world.gather(found)
        if self.world.main:
            cuda = self.world.device.type == "cuda"
            how = "measured at torch's peak" if cuda else "resident of the whole process (no GPU to measure)"
            largest = {phase: max(rank[phase] for rank in everyone) for phase in found}
            log.info("%s", self.forecast.table(largest, f"{how}, in the second step"))

    def save_if_due(self, step: int) -> None:
        """Write a checkpoint after ``step`` finished steps where one is due; collective."""
        last = step == self.last_step
        if self.checkpoints.due(step, last):
            exports = last or self.config.checkpointing.save_consolidated
            info = {"step": step, "data": self.order.state(step), "in_context": self.validation.reference}
            state = self.student.state() | self.teacher.state()
            path = self.checkpoints.save(step, state, info, self._export if exports else None)
            log.info("checkpoint %s", path)

    def _export(self, folder: Path) -> None:
        files, dtype = self.models.student, self.student.dtype
        config = model_config(files, "policy.model_name")
        export_hf(folder / "hf", self.student.weights(), files, config, self.models.tokenizer, dtype, self.world.main)

    def validate_at_end(self) -> None:
        """Validate the last step's weights where that is due, after one more sync; collective."""
        step = self.last_step
        if self.first_step > step or not self.validation.due(step):
            return
        self.student.offload()
        self.freshness.renew(step)
        held_out = self.validation.answers(step)
        self.engine.sleep()
        self.validation.report(held_out)

    def finish(self) -> None:
        """Say how it went, and close what must be closed, the engine last; collective."""
        self.recorder.close()
        if self.world.main:
            rows = read_metrics(self.run_dir / METRICS_FILE)
            log.info("\n%s", summary({self.run_dir.name: (rows, self.run_dir)}))
        self.world.barrier()
        self.engine.close()


def build_run(arguments: Arguments, world: World) -> Run:
    """Check the recipe against the world, the files and each other, then load; every rank calls it.

    Raises UserError, on all ranks alike, for what the user can put right.
    """
    config = arguments.config
    with world.agreed("checking the recipe"):
        _check_supported(config)
    cluster, device, parallel = config.cluster, config.runtime.device, config.policy.dtensor_cfg
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    with world.agreed("checking the cluster"):
        world.check_cluster(cluster.num_nodes, cluster.gpus_per_node, device, tp, cp)
    theirs = config.teacher.dtensor_cfg
    teacher_size = theirs.tensor_parallel_size * theirs.context_parallel_size
    world.build_mesh(device, tp, cp, parallel.replicate_size, teacher_size)
    with world.agreed("checking the loss"):
        check_loss_backend(config.loss_fn, world.device)
    with world.agreed("finding the models"), world.main_first():
        models = _find_models(config)
    with world.agreed("checking the layout and the memory"):
        forecast = plan_memory(config, *models.shapes, world.device)
        if world.main:
            log.info("%s", forecast.table())
    with world.agreed("checking the generation backend"):
        check_backend(config, models.student, world)
    with world.agreed("reading the data"), world.main_first():
        order = _prompt_order(config, models)
        views = teacher_views(config, models.tokenizer)
        _check_reading(config, views, order.batch(0))
        held_out = _held_out(config, models)
    last_step = order.steps(config.distillation.max_num_steps, config.distillation.max_num_epochs)
    checkpoints = Checkpoints(config.checkpointing, world)
    found = checkpoints.newest()
    with world.agreed("reading the newest checkpoint"):
        info = checkpoints.info(found) if found else None
        first_step = order.resume(info["data"]) if info else 0
    with world.agreed("making the run's folder"):
        made = _start_run_dir(arguments) if world.main else Path()
    run_dir = world.broadcast(made)
    world.log_to(run_dir)
    with world.agreed("opening the metrics"):
        recorder = open_recorder(
            config.logger,
            run_dir,
            main=world.main,
            total_steps=last_step,
            resumed_step=first_step,
            recipe=yaml.safe_load(arguments.resolved),
        )
    engine = build_engine(config, models.student, world, models.valid_vocab)
    student = Student(config, models.student, world, models.valid_vocab, models.stop_token_ids)
    teacher = build_teacher(config, models.teacher, world, models.valid_vocab, student)
    difference = teacher.prove([prompt.student_ids for prompt in order.batch(0)])
    log.info("teacher %s proven: packed and sharded it differs by %.2g nats", config.teacher.model_name, difference)
    teacher.offload()
    if found is not None:
        checkpoints.load(found, student.state() | teacher.state())
        student.resume(first_step)
        teacher.resume(student)
        log.info("resumed from %s after %d steps", found, first_step)
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
        measured_at=first_step if info and has_validation(info) else -1,
        reference=info.get("in_context") if info else None,
    )
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        models=models,
        order=order,
        views=views,
        engine=engine,
        student=student,
        teacher=teacher,
        freshness=Freshness(world, engine, student, models.valid_vocab),
        checkpoints=checkpoints,
        recorder=recorder,
        validation=validation,
        sampling=sampling_of(config, models.stop_token_ids),
        packing=packing,
        forecast=forecast,
        first_step=first_step,
        last_step=last_step,
    )


def _check_supported(config: Config) -> None:
    if config.policy.generation.stop_strings:
        raise UserError("policy.generation.stop_strings is not supported yet: use policy.generation.stop_token_ids")
    if not config.checkpointing.save_optimizer:
        raise UserError("checkpointing.save_optimizer=false is not supported yet: set it to true")
    checkpointing = config.checkpointing
    not_yet = {
        "checkpointing.checkpoint_must_save_by": checkpointing.checkpoint_must_save_by,
        "policy.dtensor_cfg.sequence_parallel": config.policy.dtensor_cfg.sequence_parallel,
        "teacher.dtensor_cfg.cpu_offload": config.teacher.dtensor_cfg.cpu_offload,
        "data.train.seed": any(dataset.seed is not None for dataset in config.data.train),
    }
    if ignored := [key for key, is_set in not_yet.items() if is_set]:
        log.warning("not there yet, so without effect: %s", ", ".join(ignored))
    by_validation = checkpointing.enabled and (checkpointing.metric_name or "").startswith("val:")
    if by_validation and not _validates(config):
        log.warning(
            "checkpointing.metric_name=%s is never measured, as distillation.val_period=0 and val_at_start and"
            " val_at_end are false: the newest checkpoints are kept",
            checkpointing.metric_name,
        )


def _validates(config: Config) -> bool:
    loop = config.distillation
    return loop.val_period > 0 or loop.val_at_start or loop.val_at_end


def _find_models(config: Config) -> Models:
    student = find_model(config.policy.model_name, "policy.model_name")
    teacher = find_model(config.teacher.model_name, "teacher.model_name")
    parallel, config_of_student = config.policy.dtensor_cfg, model_config(student, "policy.model_name")
    if parallel.tensor_parallel_size > 1:
        check_plan(config_of_student, parallel.custom_parallel_plan, student.name)
    shapes = (
        shape_of(config_of_student, student.name),
        shape_of(model_config(teacher, "teacher.model_name"), teacher.name),
    )
    tokenizer = load_tokenizer(student, config.policy.tokenizer.name, "policy.tokenizer.name")
    teachers = load_tokenizer(teacher, config.teacher.tokenizer.name, "teacher.tokenizer.name")
    compare_vocabularies(tokenizer, teachers, config.policy.model_name, config.teacher.model_name)
    valid_vocab = min(max(tokenizer.get_vocab().values()) + 1, *(shape.vocab for shape in shapes))
    check_top_k(config, valid_vocab)
    stop_token_ids = _stop_token_ids(config, student, teacher, tokenizer, teachers)
    return Models(student, teacher, tokenizer, valid_vocab, stop_token_ids, shapes)


def _stop_token_ids(
    config: Config, student: ModelFiles, teacher: ModelFiles, tokenizer: Any, teachers: Any
) -> tuple[int, ...]:
    """The ids that end an answer: the recipe's, or both models' together; says so where they differ."""
    if config.policy.generation.stop_token_ids is not None:
        return config.policy.generation.stop_token_ids
    ours, theirs = stop_ids(student, tokenizer), stop_ids(teacher, teachers)
    if set(ours) != set(theirs):
        log.warning(
            "the student %s stops at %s and the teacher %s at %s (a base student under an instruct teacher?):"
            " answers end at any of them; watch train/teacher_stop_mass",
            *(student.name, tokenizer.convert_ids_to_tokens(list(ours))),
            *(teacher.name, teachers.convert_ids_to_tokens(list(theirs))),
        )
    return tuple(sorted({*ours, *theirs}))


def _prompt_order(config: Config, models: Models) -> PromptOrder:
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    kwargs = config.policy.tokenizer.chat_template_kwargs
    trace_column = config.distillation.context_distillation.trace_column
    prompts = load_prompts(config.data.train, models.tokenizer, window, kwargs, trace_column=trace_column)
    return PromptOrder(prompts, config.distillation.num_prompts_per_step, config.distillation.seed, config.data.shuffle)


def _check_reading(config: Config, views: TeacherViews, prompts: Sequence[Prompt]) -> None:
    """Refuse a student that is its own teacher and reads no more as such."""
    if not config.distillation.context_distillation.enabled or config.distillation.allow_degenerate:
        return
    read, _ = views.prefixed([Rollout(prompt, 0, (0,), (0.0,), "length", 0) for prompt in prompts])
    if read and all(rollout.teacher_prefix_ids == rollout.prompt.student_ids for rollout in read):
        raise UserError(
            "distillation.context_distillation.teacher_prefix_template shows the teacher what the student reads, and"
            " the two are one model: put into it what the teacher should know, or for a control set"
            " distillation.allow_degenerate=true"
        )


def _held_out(config: Config, models: Models) -> HeldOut:
    if not _validates(config):
        return HeldOut()
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    kwargs, at_most = config.policy.tokenizer.chat_template_kwargs, config.distillation.max_val_samples
    column = config.distillation.context_distillation.trace_column
    return load_held_out(config.data.validation, models.tokenizer, window, kwargs, at_most, column)


def packing_of(config: Config, shape: Any) -> PackingConfig:
    """Budgets of a micro-batch: tokens under packing or dynamic batching (neither pads anything), else answers.

    ``shape``: the student's Hugging Face configuration, from which a sequence's cost follows.
    """
    policy = config.policy
    batchings = (policy.sequence_packing, policy.dynamic_batching)
    tokens = next((batching.train_mb_tokens for batching in batchings if batching.enabled), None)
    windowed = [kind for kind in getattr(shape, "layer_types", None) or () if kind == "sliding_attention"]
    return PackingConfig(
        optimizer_batch=policy.train_global_batch_size,
        sequences=policy.train_micro_batch_size if tokens is None else None,
        tokens=tokens,
        quadratic=quadratic_cost(
            hidden=shape.hidden_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            intermediate=shape.intermediate_size,
            vocab=shape.vocab_size,
            windowed=len(windowed),
            window=shape.sliding_window if windowed else 0,
        ),
        share_prefixes=config.runtime.share_prefixes,
    )


def _start_run_dir(arguments: Arguments) -> Path:
    """Make the run's folder with the resolved recipe and the versions in it; the main rank's work."""
    config = arguments.config
    run_dir = new_run_dir(config.logger.log_dir, config.runtime.run_dir)
    (run_dir / "config.yaml").write_text(arguments.resolved)
    (run_dir / "versions.json").write_text(json.dumps(_versions(), indent=2) + "\n")
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
