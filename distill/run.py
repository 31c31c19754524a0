"""The ``Run`` class: a run's components, and methods for its metrics, checkpoints and stop requests."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from distill.batching.plan import PackingConfig
from distill.checkpoint import Checkpoints
from distill.checkpoint.base_model import BASE
from distill.checkpoint.lock import DirectoryLock
from distill.checkpoint.resume import RunHistory
from distill.checkpoint.search import step_of
from distill.config import Config
from distill.data.prompts import PromptOrder
from distill.distributed.host_memory import give_back_freed_memory
from distill.distributed.world import World
from distill.errors import RunFailed, reason
from distill.inputs import Models
from distill.memory.forecast import Forecast, compare
from distill.metrics.names import Phase
from distill.metrics.phases import Phases
from distill.metrics.run_alarms import RunAlarms, is_alarm
from distill.metrics.sinks import Recorder, read_metrics
from distill.metrics.step import Metrics, step_numbers
from distill.metrics.summary import ending, summary
from distill.metrics.utilization import Utilization
from distill.model.export_files import ExportFiles
from distill.model.export_student import export_student
from distill.model.nonfinite import NonFiniteError, describe, not_finite, sample_lines, write_report
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.report.page_data import write_run_page
from distill.rollout.engine import Engine
from distill.rollout.generation import Generation
from distill.rollout.responses import StepResponses
from distill.rollout.sync import WeightSync
from distill.run_files import METRICS_FILE
from distill.supervise.progress import phase, set_step, task
from distill.supervise.stop import StopCheck, StopRequested
from distill.timing.forecast import StepPredictor
from distill.types import Layout, OptimizerBatch, Rollout
from distill.validation import Validation
from distill.validation.paired import FIRST_VALIDATION
from distill.validation.scores import Sample
from distill.validation.train_samples import TrainSamples
from distill.validation.validation import Generated

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Components and state of a run on this rank.

    The argument ``step`` of its methods is a number of finished steps, which is also the version of the weights.
    """

    config: Config
    world: World
    run_dir: Path
    run_lock: DirectoryLock | None
    """Lock of the run directory, held until the process exits; None except on rank 0."""
    models: Models
    prompts: PromptOrder
    history: RunHistory
    generation: Generation
    responses: StepResponses
    engine: Engine
    student: Student
    teacher: Teacher
    sync: WeightSync
    checkpoints: Checkpoints
    export_files: ExportFiles | None
    """Files of a Hugging Face export except weights; None on ranks other than 0 or if saving is disabled."""
    recorder: Recorder
    alarms: RunAlarms
    utilization: Utilization
    train_samples: TrainSamples
    validation: Validation
    packing: PackingConfig
    forecast: Forecast
    time_forecast: StepPredictor
    stop: StopCheck
    first_step: int
    """Number of finished steps when this process starts: 0, or the step of the checkpoint to resume from."""
    last_step: int
    """Number of finished steps at which the run ends."""
    _step: int = 0
    _saved_step: int = -1
    """Step of the last checkpoint that this process started to save; -1 if none."""
    _phases: Phases = field(default_factory=Phases)
    _values: dict[str, float] = field(default_factory=dict)
    """Metrics of the last finished step, reduced over all ranks."""

    @property
    def layout(self) -> Layout:
        """Return this rank's position in the device mesh of training."""
        return self.world.layout

    @property
    def seed(self) -> int:
        """Return the random seed of the run."""
        return self.config.distillation.seed

    def begin_step(self, step: int) -> Metrics:
        """Start timing the step that follows ``step`` finished steps; return a new metrics object for it."""
        set_step(step + 1)
        self._step, self._phases = step, Phases(self.world.device)
        metrics = Metrics()
        metrics.add_same({"lr": self.student.learning_rate})
        return metrics

    @contextmanager
    def phase(
        self, name: Phase, batches: Sequence[OptimizerBatch] = (), engine_asleep: bool | None = None
    ) -> Iterator[None]:
        """Measure the time and memory of the ``with`` block as phase ``name`` of the current step.

        ``batches``: batches whose micro-batches the phase computes, for the progress report on the console.
        ``engine_asleep``: whether the engine is asleep in the complete block; None: the default of this phase.
        """
        with self._phases(name, engine_asleep), task(sum(map(len, batches)), "micro-batches"):
            yield

    def end_step(self, step: int, metrics: Metrics, rollouts: Sequence[Rollout]) -> None:
        """Save a checkpoint and compare samples if they are due; record the metrics of step ``step``; collective.

        ``rollouts``: the rollouts of all ranks on which the step trained. Raises StopRequested on all ranks if any rank
        requests a stop and the run is not finished.
        """
        with self.phase("checkpointing"):
            self._save_if_due(step)
        self.responses.warn_if_empty(step, rollouts, metrics)
        self._record(step, metrics, rollouts, self._samples(step, rollouts))
        if self.alarms.take_save():
            self._save_for_alarm(step)
        if step == self.first_step + 2:  # the first step allocates AdamW's moments
            compare(self.forecast, self._phases.memory, self.engine.pool_bytes, self.world)
            self.time_forecast.compare(self._values, step, self.world)
        self.checkpoints.record_metrics(step, self._values)
        with phase("completing the checkpoint"):
            self.checkpoints.finalize_pending(block=step == self.last_step)
        if self.responses.sampling.full:  # otherwise top-p and top-k renormalize the sampler's log-probs
            self.sync.observe(self._values.get("train/sampler_logprob_diff", math.nan))  # may end the run: last
        self._update_status(step)
        self.alarms.raise_if_stopped(step)
        if step < self.last_step or self.validation.due(step):
            self.stop.raise_if_requested(step)

    def _samples(self, step: int, rollouts: Sequence[Rollout]) -> list[Sample]:
        """Return a few rollouts of step ``step``, compared with the teacher; empty if no samples are due; collective.

        Responses of the dataset are not shown. The weights are those after the step. The optimizer's moments are moved
        to host memory before.
        """
        sampled = [rollout for rollout in rollouts if not rollout.off_policy]
        if not (sampled and self.train_samples.due(step)):
            return []
        self.student.offload()  # the next sync would do it, and the teacher needs memory
        with self.phase("samples"):
            return self.train_samples.compared(step, sampled)

    def _record(self, step: int, metrics: Metrics, rollouts: Sequence[Rollout], samples: Sequence[Sample]) -> None:
        seconds, write_s = self._phases.seconds, self.checkpoints.slowest_s
        copy_s = seconds["checkpointing"]
        self.stop.record_duration(sum(seconds.values()) - copy_s, copy_s + write_s if write_s else 0.0)
        metrics.add_max({"engine_residual_gib": self.engine.residual_bytes / 2**30})
        omitted = () if self.validation.due(step - 1) else ("validation",)
        metrics.add_max(self._phases.memory_gib(self.engine.pool_bytes, omitted))
        self._values = step_numbers(metrics, self._phases, rollouts, self.world.control, self.packing.reads)
        self._values |= self.utilization.metrics(self._values, rollouts)
        self._values |= self.forecast.metrics()
        self._values["progress/epoch"] = step / self.prompts.steps_per_epoch
        self._values |= self.alarms.check(step, self._values)
        with self.world.all_or_none("writing the step's metrics"):
            self.recorder.record(step, self._values)
            if self.world.is_main:
                self.train_samples.record(step, samples)
        if step == self.first_step + 1:
            self.train_samples.warn_of_missing_traces(step, self._values)

    def _update_status(self, step: int) -> None:
        """Write the number of finished steps and the step of the newest checkpoint to status.json."""
        status = self.world.supervisor.status
        if self.checkpoints.newest is not None:
            status.checkpoint_step = step_of(self.checkpoints.newest)
        status.set_step(step)

    def _save_if_due(self, step: int) -> None:
        is_last = step == self.last_step
        if self.checkpoints.due(step, is_last):
            self.save(step, exports=is_last or self.config.checkpointing.save_consolidated)

    def _save_for_alarm(self, step: int) -> None:
        """Save a checkpoint after step ``step`` if it has none, and exempt it from keep_top_k; collective."""
        if self.config.checkpointing.enabled and step not in (self.first_step, self._saved_step):
            self.save(step, exports=False)
        self.checkpoints.keep_for_alarm(step)

    def report_validation(self, held_out: Generated | None) -> None:
        """Report a validation; save the validated weights if an alarm requests it; collective.

        ``held_out``: result of ``Validation.generate``; nothing happens if it is None. The student must not have taken
        a step since then. Raises StopRequested on all ranks if an alarm stops the run.
        """
        with self.phase("validation", engine_asleep=True):
            self.validation.report(held_out)
        if held_out is not None and self.alarms.take_save():
            with self.phase("checkpointing"):
                self._save_for_alarm(held_out.step)
                self.checkpoints.record_metrics(held_out.step, self.validation.values)
                self.student.offload()  # the teacher needs the memory of the moments, which a checkpoint contains

    def save(self, step: int, exports: bool) -> None:
        """Start a background write of the checkpoint for ``step`` finished steps; collective.

        ``exports``: whether the checkpoint includes a Hugging Face export. Raises RunFailed on all ranks if a weight or
        an optimizer tensor contains nan or inf.
        """
        info = {
            "step": step,
            **self.history.info,
            "data": self.prompts.state(step),
            "in_context": self.validation.reference,
            FIRST_VALIDATION: self.validation.first,
            "recipe": asdict(self.config),
            BASE: self.student.base,
            "stop_token_ids": self.models.stop_token_ids,
            **self.generation.info(step),
        }
        tensors = self.student.state(optimizer=self.config.checkpointing.save_optimizer) | self.teacher.state()
        # An error below must not leave the previous checkpoint incomplete.
        self.checkpoints.finalize_pending(block=True)
        give_back_freed_memory()  # the previous save left it fragmented
        self._check_finite(step, tensors)
        small = self._small_files(step)
        files = dict(self.generation.files(step)) if self.world.is_main else {}
        names = [name for name, _ in self.student.model.named_hf_parameters()]
        self.checkpoints.save(
            step,
            tensors,
            info,
            partial(self._export, files=small) if exports else None,
            self.run_dir / METRICS_FILE,
            files | ({} if small is None else small.stored(self.student.dtype, names)),
        )
        self._saved_step = step

    def _check_finite(self, step: int, state: dict[str, Tensor]) -> None:
        """Raise RunFailed on all ranks if a tensor of ``state`` contains nan or inf on any rank; collective."""
        names_by_rank = self.world.gather(not_finite(state))
        broken = [f"rank {rank}'s shard of {names[0]}" for rank, names in enumerate(names_by_rank) if names]
        if broken:
            raise RunFailed(
                f"weights or optimizer state contain nan or inf after step {step} ({', '.join(broken[:4])}): no"
                " checkpoint of this step was written, and the previous checkpoints are kept"
            )

    def _small_files(self, step: int) -> ExportFiles | None:
        """Return the files of a Hugging Face export except weights, for ``step``; None on ranks other than 0."""
        if self.export_files is None:
            return None
        tokens = {id_: self.models.tokenizer.convert_ids_to_tokens(id_) for id_ in self.models.stop_token_ids}
        return self.export_files.with_card(asdict(self.config), step, tokens)

    def _export(self, folder: Path, files: ExportFiles | None) -> None:
        export_student(folder, self.student, files, asdict(self.config))

    def save_and_stop(self, stop: StopRequested) -> None:
        """Save a checkpoint after step ``stop.step`` if it has none; record the early stop; collective."""
        step = stop.step
        is_saved = step in (self.first_step, self._saved_step)
        self.student.onload()  # a stopped validation leaves the optimizer state in host memory
        with phase("saving before the exit"):
            if self.config.checkpointing.enabled and not is_saved:
                self.save(step, exports=False)
                validated = self.validation.values if self.validation.values_step == step else {}
                self.checkpoints.record_metrics(step, {**self._values, **validated})
            if is_alarm(stop.reason):
                self.checkpoints.keep_for_alarm(step)
            self.checkpoints.finalize_pending(block=True)
        self._update_status(step)
        self.world.supervisor.stop_reason = stop.reason
        log.warning("the run stopped after step %d because of %s", step, stop.reason)

    def report_non_finite(self, error: NonFiniteError) -> None:
        """Write responses that may cause the non-finite loss or gradient, then raise RunFailed; collective.

        Each rank writes ``nonfinite/step_N_rank_R.jsonl`` in the run directory.
        """
        step, rank, found = self._step + 1, self.world.rank, error.found
        assert error.batch is not None, "raised by Student.train"
        found_by_rank = self.world.gather(found)
        # If only the gradient is not finite, any sample may be the cause, so all samples are written.
        loss_is_finite = not any(each.micro_batches for each in found_by_rank)
        decode = self.models.tokenizer.decode
        lines = sample_lines(found, error.batch, error.batch.rollouts, decode, all_=loss_is_finite)
        folder = self.run_dir / "nonfinite"
        with self.world.all_or_none("writing the samples whose loss is not finite"):
            write_report(folder / f"step_{step}_rank_{rank}.jsonl", found, lines, step, rank)
            if self.world.is_main:
                self._write_page("failed")
        raise RunFailed(describe(found_by_rank, step, folder / f"step_{step}_rank_*.jsonl")) from error

    def validate_last(self) -> None:
        """If a validation is due after the last step, sync the final weights and validate them; collective."""
        step = self.last_step
        if self.first_step > step or not self.validation.due(step):
            return
        with self.phase("sync"):
            self.sync.push_weights(step)
        with self.phase("validation"):
            held_out = self.validation.generate(step)
            self.engine.sleep()
        self.report_validation(held_out)

    def finish(self) -> None:
        """Wait until the last checkpoint is written, close recorder and engine, log a summary; collective."""
        self.checkpoints.finalize_pending(block=True)
        with self.world.all_or_none("closing the metrics"):
            self.recorder.close()
        if self.world.is_main:
            rows = read_metrics(self.run_dir / METRICS_FILE)
            # A job that is stopped by a signal or a time limit has little time, and it continues later.
            reason = self.world.supervisor.stop_reason
            page = None
            if reason is None or is_alarm(reason):
                page = self._write_page("finished" if reason is None else "stopped")
            log.info("\n%s\n\n%s", summary({self.run_dir.name: (rows, self.run_dir)}), self._ending(page))
        self.responses.grader.close()
        self.world.shutdown_barrier()  # closing vLLM's engine destroys the process groups, so it comes last
        self.engine.close()

    def _write_page(self, state: Literal["finished", "stopped", "failed"]) -> Path | None:
        """Write the page of the run if ``logger.report`` is true, and return its path; called on the main rank.

        An error becomes a warning, because the page must not fail the run.
        """
        if not self.config.logger.report:
            return None
        try:
            with phase("writing the page of the run"):
                return write_run_page(self.run_dir, state)
        except Exception as error:
            log.warning(
                "the report of the run was not written (%s): write it with `python -m scripts.report %s`, or set"
                " logger.report=false",
                *(reason(error), self.run_dir),
            )
            return None

    def _ending(self, page: Path | None) -> str:
        """Return the lines about duration, checkpoint, export and page that follow the table of the run."""
        supervisor = self.world.supervisor
        seconds = time.monotonic() - supervisor.started
        reason, enabled = supervisor.stop_reason, self.config.checkpointing.enabled
        by_alarm = reason is not None and is_alarm(reason)
        return ending(seconds, self.checkpoints.newest, reason is not None, enabled, page, by_alarm)
