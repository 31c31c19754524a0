"""Run the training loop of ``distill.train`` on fake CUDA tensors and count what it does."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fakecuda import patches
from tests.fakecuda.device import CARD
from tests.fakecuda.watch import Watch

MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one for the process: tensors in caches of distill belong to it
WATCH = Watch(MODE)
patches.install(WATCH)

import distill.model.attention as attention  # noqa: E402
import distill.model.weights as weights  # noqa: E402
import distill.rollout.gather as gather  # noqa: E402
from distill.inputs import packing_of  # noqa: E402
from distill.memory.auto import resolve  # noqa: E402
from distill.memory.forecast import Forecast, predict  # noqa: E402
from distill.memory.shapes import shape_of  # noqa: E402
from distill.metrics.phases import Phases  # noqa: E402
from distill.metrics.step import Metrics  # noqa: E402
from distill.model.student import Student  # noqa: E402
from distill.model.teacher import ScoringTeacher  # noqa: E402
from distill.rollout.engine import EngineBase  # noqa: E402
from distill.rollout.generation import Generated  # noqa: E402
from distill.rollout.sync import WeightSync  # noqa: E402
from distill.train import train  # noqa: E402
from distill.types import map_tensors  # noqa: E402
from tests.fakecuda.build import (  # noqa: E402
    VALID_VOCAB,
    Case,
    FakeWorld,
    build_models,
    hf_config,
    load_case,
    rollouts_of,
)

# The made-up values of checksums differ.
setattr(weights._Copies, "verify", lambda self, replicas, device: None)  # noqa: B010 (mypy)
setattr(gather, "gather_rollouts", lambda world, own, prompts, version=None: own)  # noqa: B010 (mypy)

PHASES = ("sync", "teacher", "training")
"""Phases whose memory is compared with the forecast."""


class FakeEngine(EngineBase):
    """A generation engine without a model: it receives the weights, and its memory is not counted."""

    def __init__(self, student: Any) -> None:
        manifest = {name: parameter.shape for name, parameter in student.model.named_hf_parameters()}
        super().__init__(manifest=manifest, window=2**20, valid_vocab=VALID_VOCAB, replica=0, replicas=1)

    def _wake_weights(self) -> None: ...

    def _wake_kv(self) -> None: ...

    def _sleep(self) -> None: ...

    def _close(self) -> None: ...

    def _receive(self, weights: Iterator[tuple[str, Any]]) -> None:
        for _ in weights:
            pass

    def _verify(self, sent: Any) -> None: ...

    def _probe(self, token_ids: Sequence[int]) -> list[float]:
        return [-1.0] * (len(token_ids) - 1)

    def _segments(self, *_: Any) -> list[Any]:
        return []


class FakeRun:
    """The attributes of ``distill.run.Run`` that ``distill.train.train`` uses."""

    def __init__(self, case: Case) -> None:
        given = load_case(case)
        names = given.policy.model_name, given.teacher.model_name
        self.configs = {name: hf_config(name, case.layers) for name in names}
        self.shapes = [shape_of(self.configs[name], name) for name in names]
        student, teacher = self.shapes
        self.config = config = resolve(given, student, teacher, CARD).config
        self.world = FakeWorld(config, case.rank)
        self.layout, self.seed = self.world.layout, config.distillation.seed
        self.packing = packing_of(config, self.configs[names[0]])
        total = config.distillation.num_prompts_per_step
        self._rollouts = lambda version: rollouts_of(case, total, version)
        self.first_step, self.last_step = 0, case.steps
        self.responses = SimpleNamespace(select=lambda own, batch, step, metrics: own)
        self.generation = SimpleNamespace(generate=self._generated)
        self.checkpoints = SimpleNamespace(finalize_pending=lambda block: None)
        self.validation = SimpleNamespace(generate=lambda step: None)
        self.micro_batches = 0
        """Number of student micro-batches of the last step."""
        self.transferred = 0
        """Bytes of the last step's micro-batches, with the alignment of each tensor."""

    def build(self) -> None:
        """Build student and teacher; the FakeTensorMode must be active."""
        self.student, self.teacher = build_models(self.config, self.world, self.configs)
        self.teacher.offload()
        self.engine = FakeEngine(self.student)
        self.sync = WeightSync(self.world, self.engine, self.student, VALID_VOCAB)

    def _generated(self, step: int, metrics: Metrics) -> Generated:
        rollouts = self._rollouts(step)
        prompts = [rollout.prompt for rollout in rollouts]
        return Generated(rollouts, prompts, prompts)

    def begin_step(self, step: int) -> Metrics:
        if step == self.last_step - 1:
            WATCH.reset()
        self._phases = Phases(self.world.device)
        return Metrics()

    @contextlib.contextmanager
    def phase(self, name: str, batches: Sequence[Any] = (), engine_asleep: bool | None = None) -> Iterator[None]:
        if name == "training":
            self.micro_batches, self.transferred = sum(map(len, batches)), transferred_bytes(batches)
        with WATCH.phase(name), self._phases(name, engine_asleep):
            yield

    def end_step(self, step: int, metrics: Metrics, rollouts: Sequence[Any]) -> None: ...

    def report_validation(self, held_out: None) -> None: ...

    def validate_last(self) -> None: ...


def transferred_bytes(batches: Sequence[Any]) -> int:
    """Return the bytes of all tensors of the micro-batches, each rounded up to 256; shared tensors count once."""
    sizes: dict[tuple[torch.dtype, int], int] = {}

    def add(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        sizes[tensor.dtype, int(tensor.storage_offset())] = -(-size // 256) * 256
        return tensor

    for batch in batches:
        for micro_batch in batch:
            map_tensors(micro_batch, add)
    return sum(sizes.values())


@dataclass
class Result:
    """What the last step of a case did."""

    case: Case
    forecast: Forecast
    micro_batches: int
    layers: tuple[int, int]
    """Number of layers of student and teacher."""
    transferred: int
    """Bytes of the micro-batches; see ``transferred_bytes``."""


def run_case(case: Case) -> Result:
    """Run a case; the counts are in ``WATCH`` until the next case."""
    gc.collect()
    WATCH.new_case()
    torch._C._set_only_lift_cpu_tensors(True)
    run = FakeRun(case)
    with MODE, WATCH, _parts():
        run.build()
        train(run)  # type: ignore[arg-type]
    student, teacher = run.shapes
    forecast = predict(run.config, student, teacher, card=CARD)
    return Result(case, forecast, run.micro_batches, (student.layers, teacher.layers), run.transferred)


@contextlib.contextmanager
def _parts() -> Iterator[None]:
    """Count the calls of some methods as parts of a phase."""
    methods: tuple[tuple[type, str, str], ...] = (
        (ScoringTeacher, "targets", "targets"),
        (Student, "loss", "forward"),
        (torch.Tensor, "backward", "backward"),
        (Student, "sum_gradients", "optimizer"),
        (Student, "step", "optimizer"),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in methods]

    def counted(function: Any, part: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if part in ("targets", "forward"):
                _clear_caches()
            with WATCH.part(part):
                return function(*args, **kwargs)

        return call

    for owner, name, part in methods:
        setattr(owner, name, counted(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _clear_caches() -> None:
    """Clear caches by sequence lengths: in a run, every micro-batch has new lengths."""
    for value in vars(attention).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
