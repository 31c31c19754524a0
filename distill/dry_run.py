"""``--dry-run``: make all checks of a run that need no weights and no network, and print the plan.

A dry run leaves no new files, except that the library ``datasets`` may add files to its own cache.
"""

from __future__ import annotations

import logging
import shlex
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from distill.checklist import Checklist
from distill.checkpoint import Checkpoints, Found
from distill.checkpoint.resume import clock_of
from distill.config import Arguments, Config
from distill.config.gpus import parse_gpu
from distill.config.response_limits import largest_max_new_tokens
from distill.data.cache import private_cache
from distill.data.teacher_prefix import Prefix
from distill.distributed import slurm
from distill.distributed.planned import PlannedWorld
from distill.distributed.slurm_job import check_allocation
from distill.errors import MissingError, NotCachedError, UserError, reason
from distill.hub import offline_hub
from distill.inputs import Models, check_files, check_model, check_tokenizers, find_models
from distill.memory.forecast import GIB, Forecast, card_bytes, known_shapes
from distill.memory.shapes import group_size
from distill.preflight import (
    CheckedModels,
    Data,
    Steps,
    check_models,
    check_recipe,
    compare,
    find_adapter,
    is_finished,
    read_data,
)
from distill.run_dir import check_run_dir
from distill.timing.forecast import time_table

log = logging.getLogger(__name__)

_FLAGS = ("--dry-run", "--dry_run", "--elsewhere")
_COUNTED_PROMPTS = 64
"""Number of prompts whose mean length the time forecast uses."""


def dry_run(arguments: Arguments, words: Sequence[str]) -> None:
    """Check the run and print memory forecast, checklist, time forecast and plan as YAML comments.

    ``words``: the command line, for the commands in the output. Raises the UserError that the run would raise, if
    it can be detected without weights and network. A model or dataset that is missing from the local hub cache causes
    only a warning. With ``--elsewhere``, other missing packages and files cause only warnings too.
    """
    plan = _DryRun(arguments, [word for word in words if word not in _FLAGS])
    try:
        with offline_hub(), private_cache():
            plan.check()
    except UserError as error:
        _print(plan.checklist.table(error))
        raise
    _print(plan.checklist.table())
    _print_time(plan)
    _print("\n".join(plan.lines()))


def _print_time(plan: _DryRun) -> None:
    """Print the time forecast. An error becomes a warning, because a run does not need the forecast."""
    try:
        table = plan.time_table()
    except Exception as error:
        log.warning("no time forecast, because of %s: %s", type(error).__name__, reason(error))
        return
    if table:
        _print(table)


def _print(text: str) -> None:
    print("\n".join(f"# {line}" for line in text.splitlines()), flush=True)


@dataclass
class _DryRun:
    """The checks of one dry run, and their results."""

    arguments: Arguments
    words: Sequence[str]
    """Command line of the run, without the flags of the dry run."""
    checklist: Checklist = field(init=False)
    _found: Found | None = None
    _data: Data | None = None
    _compared: Data | None = None
    """The data that were compared with the checkpoint; None if a model or the data are missing."""
    _steps: Steps | None = None
    _checked: CheckedModels | None = None
    _logged: set[str] = field(default_factory=set)
    """Warnings that ``_allowed`` has logged; each is logged only once."""

    def __post_init__(self) -> None:
        self.checklist = Checklist(self.config)

    @property
    def config(self) -> Config:
        return self.arguments.config

    def check(self) -> None:
        """Make the checks of ``distill.build.build_run`` in the same order."""
        config, checklist = self.config, self.checklist
        self._check_allocation()
        world = PlannedWorld(config.cluster.num_nodes, config.cluster.gpus_per_node, self._device(), self._gpu_bytes())
        check_recipe(config, world, self._allowed)
        checked = check_models(config, world, _print, self._allowed)
        self._checked, models, forecast = checked, checked.models, checked.forecast
        checklist.layout_checked = models is not None or forecast is not None
        self._check_memory(forecast, world)
        self._found = self._check_checkpoints(world)
        clock = clock_of(self._found)
        readers = models or self._stand_in()
        if models is None:
            check_tokenizers(config, self._allowed)
        if readers is None:
            check_files(config, self._allowed)
        else:
            self._data = read_data(config, world, readers, clock, self._found, self._allowed)
        self._compared = None if models is None else self._data  # a stand-in may have another chat template
        steps = compare(config, world, self._found, clock, self._compared, checked.export_files)
        find_adapter(config, world, models, self._found, self._allowed)
        if self._data is not None:
            last = self._data.prompts.steps(config.distillation.max_num_steps, config.distillation.max_num_epochs)
            steps = replace(steps, last=last)
        self._steps = steps
        if not self.arguments.elsewhere and not is_finished(config, self._found, steps):
            check_run_dir(config, self._found, None if self._data is None else steps.last)

    @contextmanager
    def _allowed(self) -> Iterator[None]:
        """Log a MissingError of the ``with`` block as a warning, if the planned run may still succeed.

        It may succeed after a download from the hub (NotCachedError), or on another machine (``--elsewhere``).
        """
        try:
            yield
        except MissingError as error:
            if not self.arguments.elsewhere and not isinstance(error, NotCachedError):
                raise
            if str(error) in self._logged:
                return
            self._logged.add(str(error))
            if isinstance(error, NotCachedError):
                fetch = shlex.join(["python", "-m", "scripts.fetch", *self.words])
                log.warning(
                    "%s=%s is not in the download cache of this machine: with access to the Hugging Face hub, run %s",
                    *(error.key, error.value, fetch),
                )
            else:
                log.warning("not on this machine: %s", error)

    def _device(self) -> torch.device:
        """Return the device of the planned run.

        With runtime.device=auto it is a GPU if this machine has one, if the recipe describes one (cluster.gpu or
        cluster.gpu_memory_gb), or if the run is planned for another machine.
        """
        device, cluster = self.config.runtime.device, self.config.cluster
        planned = self.arguments.elsewhere or cluster.gpu is not None or cluster.gpu_memory_gb is not None
        uses_gpu = device == "cuda" or (device == "auto" and (planned or torch.cuda.is_available()))
        return torch.device("cuda", 0) if uses_gpu else torch.device("cpu")

    def _gpu_bytes(self) -> int | None:
        """Return the memory of the planned GPU in bytes, that of cluster.gpu first; None if unknown or on the CPU."""
        named = self.config.cluster.gpu
        size = None if named is None else parse_gpu(named).memory_gb
        if size is not None and self._device().type == "cuda":
            return card_bytes(size)
        return torch.cuda.get_device_properties(0).total_memory if self._uses_own_gpu() else None

    def _uses_own_gpu(self) -> bool:
        """Return whether the run is planned for GPUs of this machine, and it has some."""
        return self._device().type == "cuda" and not self.arguments.elsewhere and torch.cuda.is_available()

    def _check_allocation(self) -> None:
        """Compare the sizes in cluster with the Slurm job or this machine's GPUs; fill in the checklist."""
        config = self.config
        if self.arguments.elsewhere:
            return
        if slurm.is_allocated():
            check_allocation(config)
            self.checklist.nodes, gpus = "the Slurm job", slurm.allocation()[1]
            self.checklist.gpus = None if gpus is None else "the Slurm job"
            return
        wanted = config.cluster.gpus_per_node
        if config.runtime.device == "cpu":
            self.checklist.gpus = "ranks on the CPU"
        elif torch.cuda.is_available():
            found = f"this machine has {_count(torch.cuda.device_count(), 'GPU')}"
            self.checklist.gpus = found
            self.checklist.too_few_gpus = torch.cuda.device_count() < wanted

    def _check_memory(self, forecast: Forecast | None, world: PlannedWorld) -> None:
        """Compare the forecast with the memory of a GPU, if both are known; fill in the checklist."""
        given, checklist = self.config.cluster.gpu_memory_gb, self.checklist
        card = world.gpu_bytes if given is None else card_bytes(given)
        if forecast is None or card is None or world.device.type == "cpu":
            return
        largest = max(map(forecast.total, forecast.phases))
        checklist.memory = f"largest phase {largest / GIB:.1f} GiB of {card / GIB:.1f} GiB"
        checklist.exceeds_memory = not forecast.fits(card)

    def _check_checkpoints(self, world: PlannedWorld) -> Found | None:
        """Return the checkpoint to resume from; None with --elsewhere, because the other machine has other files."""
        config, checkpointing = self.config, self.config.checkpointing
        if self.arguments.elsewhere or not checkpointing.enabled:
            return None
        if checkpointing.checkpoint_dir is None:
            check_run_dir(config, None, None, contents=False)
            folder = Path(config.runtime.run_dir or Path(config.logger.log_dir) / "exp_NNN") / "checkpoints"
            checkpointing = replace(checkpointing, checkpoint_dir=str(folder))
        return Checkpoints(checkpointing, world).check_only()

    def _stand_in(self) -> Models | None:
        """Return the student's files in place of both models' files; None if they are missing.

        Used if the files of a model are missing. Without the student's files, the teacher's files are checked.
        """
        config = self.config
        teacher = replace(config.teacher, model_name=config.policy.model_name, tokenizer=config.policy.tokenizer)
        with self._allowed():
            return find_models(replace(config, teacher=teacher))
        with self._allowed():
            check_model(config.teacher.model_name, "teacher.model_name")
        return None

    # ---- forecast of the time, and plan ----

    def time_table(self) -> str:
        """Return the time forecast, or a line that names what it lacks; empty for a run on a CPU."""
        checked, steps = self._checked, self._steps
        assert checked is not None and steps is not None, "check comes first"
        if self._device().type == "cpu":
            return ""
        student, teacher = known_shapes(self.config) if checked.models is None else checked.models.shapes
        if student is None or teacher is None:
            return ""  # the memory forecast names the model whose shape is unknown
        table = time_table(checked.config, student, teacher, self._gpu_name(), self._prompt_lengths(), steps.last)
        if table is None:
            return "no time forecast, because the GPU is unknown: set cluster.gpu, for example to h100 or a100-40"
        return table

    def _gpu_name(self) -> str | None:
        """Return the name of this machine's GPU; None without a GPU, or for another machine."""
        return torch.cuda.get_device_name(0) if self._uses_own_gpu() else None

    def _prompt_lengths(self) -> tuple[float, float] | None:
        """Return the mean lengths of the first prompts of student and teacher in tokens; None without the data.

        Prompts that the teacher cannot read are left out. A trace of the response is empty.
        """
        if self._data is None:
            return None
        prompts = self._data.prompts.batch(0)[:_COUNTED_PROMPTS]
        found = [self._data.teacher_prefixes.prefix_of(prompt) for prompt in prompts]
        own = [len(prompt.student_ids) for prompt in prompts]
        read = [len(prefix.token_ids) for prefix in found if isinstance(prefix, Prefix)] or own
        return statistics.mean(own), statistics.mean(read)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the plan."""
        config, steps = self.config, self._steps
        assert steps is not None, "check comes first"
        loop, cluster, generation = config.distillation, config.cluster, config.policy.generation
        yield "plan"
        if self._data is None:
            yield f"  steps: at most {loop.max_num_steps} (the training data were not read)"
        else:
            order = self._data.prompts
            yield (
                f"  steps: {steps.last}, {steps.last / order.steps_per_epoch:.1f} epochs of {order.steps_per_epoch}"
                f" steps; training set: {len(order.prompts)} prompts"
            )
        responses = loop.num_prompts_per_step * loop.num_generations_per_prompt
        yield (
            f"  each step: {loop.num_prompts_per_step} prompts x {loop.num_generations_per_prompt} responses ="
            f" {responses} responses; optimizer batches: {responses // config.policy.train_global_batch_size} of"
            f" {config.policy.train_global_batch_size}"
        )
        yield from _selection(config)
        ranks, size = cluster.num_nodes * cluster.gpus_per_node, generation.vllm_cfg.tensor_parallel_size
        size = size if generation.backend == "vllm" else 1
        yield (
            f"  ranks: {ranks} on {_count(cluster.num_nodes, 'node')}, {self._device_text()}, data-parallel size"
            f" {ranks // group_size(config.policy.dtensor_cfg)}; generation: {_count(ranks // size, 'engine')} of"
            f" {_count(size, 'rank')} ({generation.backend}{_speculation(config)})"
        )
        yield f"  checkpoints: {self._checkpoint_folder()}; run directory: {self._run_folder()}"
        yield f"  start: {self._start(steps)}"
        yield f"  command: {self._command()}"

    def _device_text(self) -> str:
        if self._device().type == "cuda":
            return "GPUs"
        if self.config.runtime.device == "cpu":
            return "CPU"
        return "CPU (this machine has no GPU; cluster.gpu or --elsewhere plans for GPUs)"

    def _checkpoint_folder(self) -> str:
        checkpointing = self.config.checkpointing
        if not checkpointing.enabled:
            return "disabled"
        run_dir = self.config.runtime.run_dir
        folder = checkpointing.checkpoint_dir
        folder = folder or (f"{run_dir}/checkpoints" if run_dir else "checkpoints in the run directory")
        period = f"every {checkpointing.save_period} steps" if checkpointing.save_period > 0 else "after the last step"
        return f"{folder}, {period}"

    def _run_folder(self) -> str:
        config = self.config
        name = "job_JOBID" if config.cluster.num_nodes > 1 else "exp_NNN, or job_JOBID in a Slurm job"
        return config.runtime.run_dir or f"a new {Path(config.logger.log_dir) / name}"

    def _start(self, steps: Steps) -> str:
        found = self._found
        if self.arguments.elsewhere:
            return "checkpoints on the other machine are not known here"
        if found is None:
            return "at step 0, because there is no checkpoint to resume from"
        if is_finished(self.config, found, steps):
            return f"nothing is left to do, because checkpoint {found.path} has finished all {steps.last} steps"
        compared = "; the data were not compared with it" if self._compared is None else ""
        return f"resumes after step {steps.first} from checkpoint {found.path}{compared}"

    def _command(self) -> str:
        cluster = self.config.cluster
        if cluster.num_nodes > 1:
            start = f"sbatch -N{cluster.num_nodes} --gpus-per-node={cluster.gpus_per_node} scripts/train.sbatch"
        elif cluster.gpus_per_node > 1:
            start = f"torchrun --nproc-per-node={cluster.gpus_per_node} -m distill.train"
        else:
            start = "python -m distill.train"
        return f"{start} {shlex.join(self.words)}"


def _selection(config: Config) -> Iterator[str]:
    """Yield the lines about the responses that a step trains on, for settings other than the defaults."""
    loop, limit = config.distillation, config.policy.generation.max_new_tokens
    if loop.max_new_tokens_schedule:
        changes = ", ".join(f"{tokens} from step {first}" for first, tokens in loop.max_new_tokens_schedule)
        yield (
            f"  response length: at most {limit} tokens, {changes}; largest limit of the run:"
            f" {largest_max_new_tokens(config)}"
        )
    if loop.off_policy.share:
        yield f"  off-policy: {loop.off_policy_per_step} responses of each step come from the dataset"
    if loop.train_on != "all":
        yield f"  selection: only responses that are graded as {loop.train_on} are trained on"


def _speculation(config: Config) -> str:
    speculative = config.policy.generation.vllm_cfg.speculative
    return f" with {speculative} speculation" if speculative is not None else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
