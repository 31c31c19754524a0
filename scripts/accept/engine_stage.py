"""Engine, student and weight sync on one rank, as a training run builds them; shared by the parts about vLLM."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.config import (
    Config,
    DtensorConfig,
    GenerationConfig,
    PolicyConfig,
    RuntimeConfig,
    TeacherConfig,
    VllmConfig,
)
from distill.distributed.world import World
from distill.metrics.step import Metrics
from distill.model.checksum import BitSums
from distill.model.dtensor import local_shard
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.rollout.engine import SyncError
from distill.rollout.factory import build_engine, check_backend
from distill.rollout.sync import WeightSync
from distill.rollout.vllm_engine import VllmEngine
from distill.types import Problem, Prompt, Sampling
from scripts.accept.settings import Context, Settings

WINDOW = 512
KEY = "policy.model_name"
MEMORY = 0.4
"""Fraction of the GPU's memory for the engine."""
ALONE_ON_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**29}
"""Arguments that the trainer sets on a CPU, so that vLLM alone has equal settings."""


@dataclass(frozen=True)
class Work:
    """Amount of work."""

    responses: int
    """Number of responses whose log-probs are compared."""
    response_tokens: int
    prompts: int
    """Number of prompts in a timed pass of generation."""
    prompt_tokens: int
    new_tokens: int
    passes: int


def work_of(settings: Settings) -> Work:
    """Return the amount of work for a GPU, or a tiny one."""
    return Work(4, 16, 4, 16, 16, 1) if settings.quick else Work(64, 128, 256, 128, 256, 3)


def config_of(settings: Settings) -> Config:
    """Return a configuration for one rank; made without a recipe, so that OmegaConf is not needed."""
    engine = VllmConfig(gpu_memory_utilization=MEMORY, max_model_len=WINDOW)
    running = max(64, work_of(settings).prompts)  # a timed pass generates more responses than a step of the recipe
    return Config(
        policy=PolicyConfig(
            model_name=str(settings.student),
            precision="bfloat16",
            max_total_sequence_length=WINDOW,
            dtensor_cfg=DtensorConfig(activation_checkpointing=False),
            generation=GenerationConfig(
                backend="vllm", max_new_tokens=WINDOW, vllm_cfg=engine, vllm_kwargs={"max_num_seqs": running}
            ),
        ),
        teacher=TeacherConfig(model_name=str(settings.student), max_total_sequence_length=WINDOW),  # never loaded
        runtime=RuntimeConfig(device=settings.device),
    )


def random_prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Return random token ids. No two seeds give a common prefix, so that the prefix cache has no effect."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(0, vocab, (count, length), generator=generator).tolist()
    return ids


class Stage:
    """Engine, student and weight sync of one rank; the engine is created first, as in a run."""

    def __init__(self, settings: Settings, world: World) -> None:
        self.work = work_of(settings)
        self.version = -1
        self.config = config_of(settings)
        self.world = world
        self.on_gpu = world.device.type == "cuda"
        torch.zeros(1, device=world.device)  # create the device context before memory is measured
        before = self._stable_use()
        self.files = find_model(str(settings.student), KEY)
        self.vocab: int = model_config(self.files, KEY).vocab_size
        check_backend(self.config, self.files, world)
        started = time.monotonic()
        engine = build_engine(self.config, self.files, world, self.vocab)
        assert isinstance(engine, VllmEngine)
        self.engine = engine
        self.start_seconds = time.monotonic() - started
        self.left_asleep = self.used() - before
        self.student = Student(self.config, self.files, world, self.vocab, ())
        self.sync = WeightSync(world, engine, self.student, self.vocab)

    @staticmethod
    def of(context: Context) -> Stage:
        """Return the stage of this process; created at the first call."""
        if "stage" not in context.shared:
            context.shared["stage"] = Stage(context.settings, context.world())
        stage: Stage = context.shared["stage"]
        return stage

    def used(self) -> int:
        """Return the bytes in use on the device, without torch's cache; 0 without a GPU."""
        if not self.on_gpu:
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def _stable_use(self) -> int:
        """Return the bytes in use once they are constant; the processes of an earlier part may still be ending."""
        used, last = self.used(), -1
        for _ in range(20):
            if not self.on_gpu or used == last:
                break
            time.sleep(1)
            used, last = self.used(), used
        return used

    def ready(self) -> None:
        """Bring the engine from any state to the state in which it generates."""
        engine = self.engine
        if engine.state == "asleep":
            engine.wake("weights")
        if engine.state == "weights":
            self.version += 1
            engine.sync(self.student.weights(), self.version)
        if engine.state == "synced":
            engine.wake("kv")

    def asleep(self) -> None:
        """Put the engine to sleep from any state."""
        if self.engine.state != "asleep":
            self.ready()
            self.engine.sleep()

    def push_weights(self) -> dict[str, float]:
        """Push and verify the weights as a training step does; return the metrics."""
        self.asleep()
        self.version += 1
        metrics = Metrics()
        self.sync.push_weights(self.version, metrics)
        return metrics.reduce(None)

    def sums(self) -> dict[str, BitSums]:
        """Return the bit sums of the student's current weights."""
        return {name: sums for name, _, sums in self.student.weights().with_sums()}

    def nudge(self, names: Sequence[str]) -> None:
        """Change every element of these weights by 1/64 up or down, which changes every bfloat16 value."""
        for local in self.shards(names):
            local.mul_(1 + (torch.randint_like(local, 2) * 2 - 1) / 64)

    def shards(self, names: Sequence[str]) -> list[Tensor]:
        """Return the local shards of these weights, float32; on one rank, a shard is the complete tensor."""
        parameters = dict(self.student.model.named_hf_parameters())
        return [local_shard(parameters[name]).detach() for name in names]

    def parameter_names(self) -> list[str]:
        """Return the names of the student's weights in the order of the sync."""
        return [name for name, _ in self.student.model.named_hf_parameters()]

    def prompts(self, count: int, length: int, seed: int) -> list[Prompt]:
        """Return prompts of random tokens."""
        ids = random_prompts(count, length, self.vocab, seed)
        return [Prompt(i, tuple(one), Problem("")) for i, one in enumerate(ids)]

    def sampling(self, new_tokens: int) -> Sampling:
        """Return sampling parameters without stop tokens, so that all responses have one length."""
        return Sampling(temperature=1.0, max_new_tokens=new_tokens, stop_token_ids=())

    def refuses(self, sent: dict[str, BitSums]) -> bool:
        """Return whether verification refuses the weights in vLLM's memory, given the sums of the sent weights."""
        try:
            self.engine._weights.verify(sent)
        except SyncError as error:
            if error.found_in != "memory":
                raise
            return True
        return False

    def refuses_stale(self, name: str, change: Callable[[Tensor], None]) -> bool:
        """Return whether verification detects a ``change`` of the student's tensor that the engine did not receive."""
        (local,) = self.shards([name])
        kept = local.clone()
        change(local)
        try:
            return self.refuses(self.sums())
        finally:
            local.copy_(kept)

    def refuses_flipped(self, parameter: Tensor, sent: dict[str, BitSums]) -> bool:
        """Return whether verification detects one flipped bit in vLLM's memory; restores the bit."""
        assert parameter.is_contiguous() and parameter.element_size() == 2, (parameter.stride(), parameter.dtype)
        last = parameter.detach().view(-1).view(torch.int16)[-1:]
        last ^= 1
        try:
            return self.refuses(sent)
        finally:
            last ^= 1


def one_of_each_kind(names: Sequence[str]) -> list[str]:
    """Return the first tensor of each kind (q_proj, norm, ...); the layout in vLLM depends on the kind."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], name)
    return list(kinds.values())


def grow(weights: Tensor) -> None:
    """Multiply by 1 + 1/64, which changes every sum of bit patterns."""
    weights.mul_(1 + 1 / 64)


def exchange_rows(weights: Tensor) -> None:
    """Exchange the first row and the first row that differs from it; the plain sum of bits stays equal."""
    differs = (weights != weights[0]).flatten(1).any(1) if weights.ndim > 1 else weights != weights[0]
    places = [0, int(differs.nonzero()[0])] if differs.any() else [0, 0]
    weights[places] = weights[places[::-1]].clone()


def storage_bytes(tensors: Any) -> int:
    """Return the bytes of the storages of ``tensors``, which may be nested lists; each storage counts once."""
    storages: dict[int, int] = {}
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if isinstance(tensor, Tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        else:
            waiting.extend(tensor)
    return sum(storages.values())
