"""vLLM inside the trainer: start, log-probs, weight sync, verification, and memory over sleep cycles."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distill.batching.plan import pack
from distill.metrics.phases import Phases
from distill.metrics.step import Metrics
from distill.model.checksum import BitSums
from distill.model.weights import GatheredWeights
from distill.rollout.engine import SyncError
from distill.types import Prompt, Rollout, TopK
from scripts.accept.engine_stage import Stage, exchange_rows, grow, one_of_each_kind, storage_bytes
from scripts.accept.results import Bound, Check, at_least, at_most, exactly
from scripts.accept.settings import Context

GIB, MIB = 2**30, 2**20
ONLY_GPU = "needs a GPU"
CYCLES = 10


def start(context: Context) -> Iterator[Check]:
    """Start the engine, push weights and generate; on a GPU, vLLM has no cache and compiles here."""
    cache = os.environ.get("VLLM_CACHE_ROOT") or os.path.expanduser("~/.cache/vllm")
    files = sum(len(names) for _, _, names in os.walk(cache))
    stage = Stage.of(context)
    note = f"{files} files in vLLM's cache before the start"
    yield Check("start of the engine", stage.start_seconds, "s", note=note)
    started = time.monotonic()
    stage.ready()
    rollouts = stage.engine.generate(stage.prompts(4, 16, seed=1), stage.sampling(8), 0)
    yield Check("first sync and generation", time.monotonic() - started, "s")
    yield Check("responses of the first generation", float(len(rollouts)), "", exactly(4))
    weights, cache_bytes = held(stage)
    yield Check("weights of the engine", weights / GIB, "GiB")
    yield Check("key-value cache of the engine", cache_bytes / GIB, "GiB")
    if not stage.on_gpu:
        yield Check("fraction of weights and cache freed by sleep", None, "", at_least(0.95), ONLY_GPU)
        return
    awake = stage.used()
    stage.asleep()
    freed = awake - stage.used()
    note = f"{freed / GIB:.2f} GiB freed"
    share = freed / (weights + cache_bytes)
    yield Check("fraction of weights and cache freed by sleep", share, "", at_least(0.95), note)
    yield Check("memory of the sleeping engine", stage.left_asleep / GIB, "GiB", at_most(4), "CUDA graphs, workspaces")


def held(stage: Stage) -> tuple[int, int]:
    """Return the bytes of vLLM's weights and of its key-value cache; each storage counts once."""
    runner = stage.engine._engine.model_executor.driver_worker.worker.model_runner
    return storage_bytes(stage.engine._weights.model.parameters()), storage_bytes(runner.kv_caches)


def logprobs(context: Context) -> Iterator[Check]:
    """Compare the sampler's log-probs of its responses, and of a prompt, with the trainer's."""
    stage = Stage.of(context)
    stage.ready()
    work = stage.work
    prompts = stage.prompts(work.responses, 32, seed=2)
    rollouts = stage.engine.generate(prompts, stage.sampling(work.response_tokens), 0)
    mean, largest = logprob_difference(stage, rollouts)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    yield Check("|trainer - sampler|, mean", mean, "nats", at_most(0.05), f"{tokens} sampled tokens, bfloat16")
    yield Check("|trainer - sampler|, largest", largest, "nats")
    probe = prompts[0].student_ids
    sampler, trainer = stage.engine.probe(probe), stage.student.logprobs(probe)
    difference = statistics.fmean(abs(a - b) for a, b in zip(sampler, trainer, strict=True))
    yield Check("|trainer - engine| of a prompt, mean", difference, "nats", at_most(0.1), "bfloat16 logits")
    again = stage.engine.generate(prompts[:4], stage.sampling(work.response_tokens), 0)
    equal = [a.response_ids == b.response_ids for a, b in zip(again, rollouts, strict=False)]
    note = "on a GPU, the batch may change the rounding"
    bound = None if stage.on_gpu else exactly(1)
    yield Check("equal responses with the same seeds", statistics.fmean(equal), "", bound, note)


@torch.no_grad()
def logprob_difference(stage: Stage, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Return mean and largest |trainer - sampler| log-prob of the sampled tokens, as the training metrics do."""
    metrics, student = Metrics(), stage.student
    for begin in range(0, len(rollouts), 8):
        batch = [dataclasses.replace(r, teacher_prefix_ids=r.prompt.student_ids) for r in rollouts[begin : begin + 8]]
        micro_batch = pack(list(enumerate(batch))).to(student.device)
        stats = student.loss(micro_batch, any_targets(micro_batch.sampled_N)).stats
        metrics.add({"mean": stats["sampler_logprob_diff"]})
        metrics.add_max({"largest": stats["sampler_logprob_diff_max"][0]})
    student.logprobs([0, 0])  # frees the gathered weights, because no backward follows
    found = metrics.reduce(None)
    return found["mean"], found["largest"]


def any_targets(tokens_N: Tensor) -> TopK:
    """Return arbitrary targets: half of the mass at the sampled token. The log-prob difference does not use them."""
    half = torch.full_like(tokens_N, math.log(0.5), dtype=torch.float32)
    return TopK(tokens_N[:, None], half[:, None], half)


def sync(context: Context) -> Iterator[Check]:
    """Check that a sync transfers and reports all changes, and that log-probs change with the weights."""
    stage = Stage.of(context)
    names = stage.parameter_names()
    stage.push_weights()
    again = stage.push_weights()
    yield Check("tensors changed by a repeated sync", again["sync_changed_tensors"], "", exactly(0))
    moved = names[::2]
    stage.nudge(moved)
    found = stage.push_weights()
    note = f"{len(moved)} of {len(names)} were changed"
    yield Check("tensors changed, as reported", found["sync_changed_tensors"], "", exactly(len(moved)), note)
    yield Check("change of the probe's log-probs", found["probe_change"], "nats", at_least(1e-3))


def verification(context: Context) -> Iterator[Check]:
    """Check that verification detects stale and damaged weights in vLLM's memory."""
    stage = Stage.of(context)
    stage.ready()
    weights, sent = stage.engine._weights, stage.sums()
    yield Check("correct weights refused", float(stage.refuses(sent)), "", exactly(0))
    stale = one_of_each_kind(stage.parameter_names())
    found = sum(stage.refuses_stale(name, grow) for name in stale)
    yield Check("stale tensors detected", found, "", exactly(len(stale)), "one of each kind")
    found = sum(stage.refuses_stale(name, exchange_rows) for name in stale)
    yield Check("exchanged rows detected", found, "", exactly(len(stale)), "a plain sum does not show them")
    parameters = dict(weights.model.named_parameters())
    flipped = one_of_each_kind([name for name in parameters if name not in weights._repacked_names])
    found = sum(stage.refuses_flipped(parameters[name], sent) for name in flipped)
    note = "one of each kind" + ("" if stage.on_gpu else ", without tensors that vLLM repacks for CPUs")
    yield Check("flipped bits detected", found, "", exactly(len(flipped)), note)
    yield Check("restored weights refused", float(stage.refuses(sent)), "", exactly(0))


def cycles(context: Context) -> Iterator[Check]:
    """Check that sleep cycles do not leak memory, and time their phases."""
    stage = Stage.of(context)
    stage.asleep()
    prompts, names = stage.prompts(4, 32, seed=3), stage.parameter_names()
    timed: list[dict[str, float]] = []
    outside: list[int] = []  # bytes in use outside torch
    used: list[int] = []
    synced = 0
    for _ in range(CYCLES):
        stage.nudge(names)
        seconds, synced = one_cycle(stage, prompts)
        timed.append(seconds)
        if stage.on_gpu:
            used.append(stage.used())  # called first, because it frees torch's cache
            outside.append(stage.engine.residual_bytes)
    yield growth("memory outside torch", outside, len(timed), at_most(256))
    yield growth("total memory", used, len(timed), None)
    middle = {phase: statistics.median(cycle[phase] for cycle in timed) for phase in timed[0]}
    for phase, value in middle.items():
        yield Check(f"{phase}, median", value, "s", note=f"slowest {max(cycle[phase] for cycle in timed):.3g} s")
    note = f"{synced / MIB:.0f} MiB in {len(names)} tensors, verified"
    yield Check("speed of the sync", synced / middle["sync"] / 1e9, "GB/s", note=note)


def one_cycle(stage: Stage, prompts: Sequence[Prompt]) -> tuple[dict[str, float], int]:
    """Run a sleep cycle; return the seconds of its phases and the bytes of its sync."""
    phases, engine = Phases(stage.world.device), stage.engine
    with phases("wake weights"):
        engine.wake("weights")
    stage.version += 1
    with phases("sync"):
        report = engine.sync(stage.student.weights(), stage.version)
    with phases("wake cache"):
        engine.wake("kv")
    engine.generate(prompts, stage.sampling(8), stage.version)
    with phases("sleep"):
        engine.sleep()
    return phases.seconds, report.bytes


def growth(what: str, asleep: Sequence[int], count: int, bound: Bound | None) -> Check:
    """Return the growth of the bytes in use after sleep, from the second cycle (the first warms up) to the last."""
    name = f"{what}, growth over {count} sleep cycles"
    if not asleep:
        return Check(name, None, "MiB", bound, ONLY_GPU)
    most = (max(asleep[1:]) - asleep[1]) / MIB
    return Check(name, (asleep[-1] - asleep[1]) / MIB, "MiB", bound, f"since cycle 2; maximum {most:.0f}")


class SentStale:
    """The student's weights with an old value of one tensor and the sums of its current value."""

    def __init__(self, weights: GatheredWeights, name: str, before: Tensor) -> None:
        self._weights, self._name, self._before = weights, name, before

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield name, tensor and bit sums of each weight."""
        for name, tensor, sums in self._weights.with_sums():
            yield name, self._before if name == self._name else tensor, sums


def transfer(context: Context) -> Iterator[Check]:
    """Check that a stale tensor stops the sync. This part is the last of its group: the engine is unusable then."""
    stage = Stage.of(context)
    stage.asleep()
    name = stage.parameter_names()[-2]
    before = next(tensor.clone() for sent, tensor in stage.student.weights() if sent == name)
    grow(*stage.shards([name]))
    stage.engine.wake("weights")
    found = 0.0
    try:
        stage.engine.sync(SentStale(stage.student.weights(), name, before), stage.version + 1)
    except SyncError as error:
        if (error.found_in, error.tensor) != ("transfer", name):
            raise
        found = 1.0
    yield Check("stale tensors detected during the transfer", found, "", exactly(1), name)
