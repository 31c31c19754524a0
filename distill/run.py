"""A run: its parts, and what is done with them beside the loop: recording, saving, validating at the end."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from distill.batching.plan import PackingConfig
from distill.checkpoint import Checkpoints
from distill.checkpoint.resume import RunHistory
from distill.config import Config
from distill.data.prompts import PromptOrder
from distill.data.teacher_prefix import TRUNCATION_RATE, PrefixStats, TeacherPrefixes
from distill.distributed.host_memory import give_back_freed_memory
from distill.distributed.world import World
from distill.errors import RunFailed
from distill.inputs import Models
from distill.memory.forecast import PHASES, Forecast
from distill.metrics.sinks import METRICS_FILE, Recorder, read_metrics, summary
from distill.metrics.step import Metrics, Phases, add_rollouts, finish_step
from distill.model.export import export_hf
from distill.model.export_files import ExportFiles
from distill.model.nonfinite import NonFiniteError, describe, not_finite, sample_lines, write_report
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.rollout.engine import Engine
from distill.rollout.sync import WeightSync
from distill.supervise.progress import phase, set_step
from distill.supervise.signals import Deadline
from distill.types import Layout, OptimizerBatch, Rollout, Sampling
from distill.validation import Validation

log = logging.getLogger(__name__)

_STOP = "stop/asked"
_NOTHING, _TIME = 0.0, 0.5
"""Beside the numbers of signals; of all ranks the largest counts."""


@dataclass
class Run:
    """All parts of a run on this rank; ``first_step`` is above 0 when it goes on from a checkpoint."""

    config: Config
    world: World
    run_dir: Path
    models: Models
    order: PromptOrder
    origin: RunHistory
    views: TeacherPrefixes
    engine: Engine
    student: Student
    teacher: Teacher
    sync: WeightSync
    checkpoints: Checkpoints
    exported: ExportFiles | None
    """The small files of exports; on the main rank of a run with checkpoints."""
    recorder: Recorder
    validation: Validation
    sampling: Sampling
    packing: PackingConfig
    forecast: Forecast
    deadline: Deadline
    first_step: int
    last_step: int
    _stop: float = _NOTHING
    _values: dict[str, float] = field(default_factory=dict)
    """Of the last recorded step."""

    @property
    def layout(self) -> Layout:
        """This rank's place among those that train."""
        return self.world.layout

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.distillation.seed

    def begin(self) -> None:
        """The steps begin: from now on a signal waits for the end of a step."""
        self.world.supervisor.begin_loop(self.config.runtime.phase_timeout_s)

    def phases(self, step: int) -> Phases:
        """A fresh clock for the making of step ``step``, the first being 1."""
        set_step(step)
        return Phases(self.world.device)

    def record(
        self,
        step: int,
        metrics: Metrics,
        phases: Phases,
        mine: list[Rollout],
        trained: list[Rollout],
        counts: PrefixStats,
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
            if counts.totals and not trained:  # of nothing, nothing was cut: no gap in the curve
                metrics.add({TRUNCATION_RATE: (0.0, 1.0)})
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
        metrics.add_max({_STOP: self._asked_to_stop(phases)})
        values = finish_step(metrics, phases, self.world.control)
        self._stop = values.pop(_STOP)
        with self.world.all_or_none("writing the step's numbers"):
            self.recorder.record(step, values)
        if step == self.first_step + 2:  # the optimizer's state appears with the first
            self._compare_memory(phases)
        self.checkpoints.record_metrics(step, values)
        self.checkpoints.finalize_pending(block=step == self.last_step)
        if self.sampling.full:  # else the sampler's log-probs are those of a part of the vocabulary
            self.sync.observe(values.get("train/sampler_logprob_diff", math.nan))
        self._values = values
        self._tell(step)

    def _tell(self, step: int) -> None:
        """Write to the status how far the run is."""
        status = self.world.supervisor.status
        status.checkpoint_step = self.checkpoints.newest_step or status.checkpoint_step
        status.set_step(step)

    def _asked_to_stop(self, phases: Phases) -> float:
        """What of this rank asks for an end after this step: a signal's number, the time, or nothing."""
        copied = phases.seconds["checkpointing"]
        written = self.checkpoints.slowest_s
        self.deadline.record(sum(phases.seconds.values()) - copied, copied + written if written else 0.0)
        return float(self.world.supervisor.stop_signal or (_TIME if self.deadline.is_near() else _NOTHING))

    def ends_early(self, step: int) -> bool:
        """Whether any rank was asked to stop, as ``record`` gathered; if so the run is saved now; collective."""
        last = step == self.last_step and not self.validation.due(step)
        if self._stop == _NOTHING or last:
            return False
        self._stop_after(step)
        return True

    def leaves_unjudged(self, step: int) -> bool:
        """Whether any rank was asked to stop by now, before or while held-out problems are answered with the weights
        after ``step`` steps: then these are saved, and a run that goes on from there validates them; collective.

        The engine is ready. Where no validation is due nothing is asked: the step that begins is short enough.
        """
        if not self.validation.due(step):
            return False
        late = (
            self.first_step < step < self.last_step and self.deadline.is_near()
        )  # elsewhere there would be no progress
        self._stop = max(self.world.gather(float(self.world.supervisor.stop_signal or (_TIME if late else _NOTHING))))
        if self._stop == _NOTHING:
            return False
        self.engine.sleep()
        self.student.onload()
        self._stop_after(step)
        return True

    def _stop_after(self, step: int) -> None:
        """Save the weights after ``step`` steps where they aren't; the run ends as one that was asked to stop."""
        by_time = f"checkpointing.checkpoint_must_save_by={self.config.checkpointing.checkpoint_must_save_by}"
        reason = by_time if self._stop == _TIME else signal.Signals(int(self._stop)).name
        saved = step == self.first_step or self.checkpoints.due(step, step == self.last_step)
        with phase("saving before the end"):
            if self.config.checkpointing.enabled and not saved:
                self._save(step, exports=False)
                self.checkpoints.record_metrics(step, self._values)
            self.checkpoints.finalize_pending(block=True)
        self._tell(step)
        self.world.supervisor.stop_reason = reason
        log.warning("stopped after step %d: %s", step, reason)

    def _compare_memory(self, phases: Phases) -> None:
        """Log what a step took of memory, the most of any rank, beside what was predicted; collective."""
        asleep = {"teacher", "train"}  # torch counts the sleeping engine's pool as given out, though it is free
        found = {
            phase: (phases.memory[name] - (self.engine.pool_bytes if phase in asleep else 0)) / 2**30
            for phase, name in PHASES.items()
            if name in phases.memory
        }
        everyone = self.world.gather(found)
        if self.world.is_main:
            cuda = self.world.device.type == "cuda"
            how = "measured at torch's peak" if cuda else "resident of the whole process (no GPU to measure)"
            largest = {phase: max(rank[phase] for rank in everyone) for phase in found}
            log.info("%s", self.forecast.table(largest, f"{how}, in the second step"))

    def save_if_due(self, step: int) -> None:
        """Begin to write a checkpoint after ``step`` finished steps where one is due; collective.

        ``record`` makes it whole, in this step or a later one.
        """
        last = step == self.last_step
        if self.checkpoints.due(step, last):
            self._save(step, exports=last or self.config.checkpointing.save_consolidated)

    def _save(self, step: int, exports: bool) -> None:
        info = {
            "step": step,
            **self.origin.info,
            "data": self.order.state(step),
            "in_context": self.validation.reference,
            "recipe": asdict(self.config),
            "stop_token_ids": self.models.stop_token_ids,
        }
        tensors = self.student.state(optimizer=self.config.checkpointing.save_optimizer) | self.teacher.state()
        self.checkpoints.finalize_pending(block=True)  # the one before is good, whatever this one is
        give_back_freed_memory()  # of which a save leaves the smallest pieces
        self._check_finite(step, tensors)
        small = self._small_files(step)
        names = [name.removeprefix("model.") for name in tensors if name.startswith("model.")]
        self.checkpoints.save(
            step,
            tensors,
            info,
            partial(self._export, files=small) if exports else None,
            self.run_dir / METRICS_FILE,
            {} if small is None else small.stored(self.student.dtype, names),
        )

    def _check_finite(self, step: int, state: dict[str, Tensor]) -> None:
        """Raise RunFailed, on all ranks, where one is about to save nan or infinity; collective."""
        everyone = self.world.gather(not_finite(state))
        broken = [f"rank {rank}'s shard of {names[0]}" for rank, names in enumerate(everyone) if names]
        if broken:
            raise RunFailed(
                f"after step {step} {', '.join(broken[:4])} is not finite: no checkpoint was written, and the newest"
                " one stays"
            )

    @contextmanager
    def finite(self, step: int, batch: OptimizerBatch, rollouts: Sequence[Rollout]) -> Iterator[None]:
        """Train on ``batch`` inside: where a loss or gradient isn't finite, each rank writes its answers to a file, and
        all raise RunFailed.
        """
        try:
            yield
        except NonFiniteError as error:
            self.checkpoints.finalize_pending(block=True)
            found, rank = error.found, self.world.rank
            everyone = self.world.gather(found)
            unnamed = not any(other.micro_batches for other in everyone)
            lines = sample_lines(found, batch, rollouts, self.models.tokenizer.decode, all_=unnamed)
            files = self.run_dir / "nonfinite"
            with self.world.all_or_none("writing the answers whose loss isn't finite"):
                write_report(files / f"step_{step}_rank_{rank}.jsonl", found, lines, step, rank)
            raise RunFailed(describe(everyone, step, files / f"step_{step}_rank_*.jsonl")) from error

    def _small_files(self, step: int) -> ExportFiles | None:
        """What an export of the weights after ``step`` steps holds beside them; None on ranks that write none."""
        if self.exported is None:
            return None
        tokens = {id_: self.models.tokenizer.convert_ids_to_tokens(id_) for id_ in self.models.stop_token_ids}
        return self.exported.with_card(asdict(self.config), step, tokens)

    def _export(self, folder: Path, files: ExportFiles | None) -> None:
        export_hf(folder / "hf", self.student.weights(), files, self.student.dtype)

    def validate_at_end(self) -> None:
        """Validate the last step's weights where that is due, after one more sync; collective."""
        step = self.last_step
        if self.first_step > step or not self.validation.due(step):
            return
        self.sync.push_weights(step)
        if self.leaves_unjudged(step):
            return
        held_out = self.validation.answers(step)
        if self.leaves_unjudged(step):
            return
        self.engine.sleep()
        self.validation.report(held_out)

    def finish(self) -> None:
        """Say how it went, and close what must be closed, the engine last; collective."""
        self.checkpoints.finalize_pending(block=True)
        with self.world.all_or_none("closing the metrics"):
            self.recorder.close()
        if self.world.is_main:
            rows = read_metrics(self.run_dir / METRICS_FILE)
            log.info("\n%s", summary({self.run_dir.name: (rows, self.run_dir)}))
        self.world.shutdown_barrier()  # the engine takes the process groups along
        self.engine.close()
