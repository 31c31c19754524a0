"""A run: its parts, and what is done with them beside the loop: recording, saving, validating at the end."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.config import Config
from distill.data.context import TeacherViews, ViewCounts
from distill.data.prompts import PromptOrder
from distill.inputs import Models
from distill.model.export import export_hf
from distill.model.load import model_config
from distill.model.memory import PHASES, Forecast
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.rollout.engine import Engine
from distill.rollout.freshness import Freshness
from distill.runtime.checkpoint import Checkpoints
from distill.runtime.metrics import Metrics, Phases, add_rollouts, finish_step
from distill.runtime.metrics_sinks import METRICS_FILE, Recorder, read_metrics, summary
from distill.runtime.packing import PackingConfig
from distill.runtime.world import World
from distill.types import Layout, Rollout, Sampling
from distill.validation import Validation

log = logging.getLogger(__name__)


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
        with self.world.agreed("writing the step's numbers"):
            self.recorder.record(step, values)
        if step == self.first_step + 2:  # the optimizer's state appears with the first
            self._compare_memory(phases)
        self.checkpoints.note(step, values)
        self.checkpoints.settle(wait=step == self.last_step)
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

    def save_if_due(self, step: int, leaving: bool = False) -> None:
        """Begin to write a checkpoint after ``step`` finished steps where one is due; collective.

        ``record`` makes it whole, in this step or a later one. ``leaving``: one is due whatever the period, without an
        export that takes time, and the caller records the step and then has ``checkpoints.settle`` wait.
        """
        saving, last = self.config.checkpointing, step == self.last_step
        if not self.checkpoints.due(step, last or leaving):
            return
        info = {
            "step": step,
            "data": self.order.state(step),
            "in_context": self.validation.reference,
            "recipe": asdict(self.config),
        }
        tensors = self.student.state(optimizer=saving.save_optimizer) | self.teacher.state()
        exports = last or (saving.save_consolidated and not leaving)
        export = self._export if exports else None
        self.checkpoints.save(step, tensors, info, export, self.run_dir / METRICS_FILE)

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
        self.checkpoints.settle(wait=True)
        with self.world.agreed("closing the metrics"):
            self.recorder.close()
        if self.world.main:
            rows = read_metrics(self.run_dir / METRICS_FILE)
            log.info("\n%s", summary({self.run_dir.name: (rows, self.run_dir)}))
        self.world.barrier()
        self.engine.close()


