"""Scenarios of vLLM's engine on CPU; each function of ranks returns their results, which ``test_vllm`` checks.

A process can hold one vLLM engine at a time.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distill.distributed.world import World
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.model.student import Student
from distill.rollout.engine import SyncError
from distill.rollout.factory import build_engine
from distill.rollout.gather import gather_rollouts
from distill.rollout.requests import Request, Segment, requests_of
from distill.rollout.sync import WeightSync
from distill.rollout.transformers_engine import TransformersEngine
from distill.rollout.vllm_engine import VllmEngine
from distill.rollout.vllm_env import prepare_for_vllm
from distill.types import Problem, Prompt, Rollout, Sampling
from tests.harness import CompleteWeights, config_for
from tests.model import test_variants as variants
from tests.rollout import segment_scenarios as scenarios
from tests.rollout import speculation_scenarios as speculation
from tests.rollout.lora_scenarios import lora_syncs
from tests.rollout.scripted_vllm import plain_fields, plain_run
from tests.rollout.test_sync import FakeMemory
from tests.rollout.vllm_loop_scenarios import loop_scenarios

CYCLES = 20
"""Number of cycles of sync and generation in which memory, file handles and threads must not grow."""
VALID = 300  # ids from this one on are padding of the vocabulary
WINDOW = 64
PROBE = list(range(40, 64))
GREEDY = Sampling(temperature=0.0, max_new_tokens=10, stop_token_ids=())
SAMPLED = Sampling(temperature=0.8, max_new_tokens=10, stop_token_ids=tuple(range(0, VALID, 9)), responses_per_prompt=3)


def _prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(i, tuple(range(10 * i, 10 * i + n)), Problem("p")) for i, n in enumerate(lengths)]


PROMPTS = _prompts(7, 1, 40, 12)
OMITTED = ((0, 0), (1, 0), (1, 1), (1, 2))
SOME_LOGPROBS = replace(SAMPLED, logprob_interval=3)
NUCLEUS = replace(SAMPLED, top_p=0.9, top_k=40, stop_token_ids=())
KEY, VALUE = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv")
EXCHANGED = {KEY: VALUE, VALUE: KEY}


SEGMENTS = (("sampled segments", scenarios.SAMPLED, 6), ("greedy segments", scenarios.GREEDY, 2))
"""Name, sampling and number of segments that end by themselves, for each of the scenarios of segments."""

LIMITS = {"max_num_batched_tokens": 2 * WINDOW, "max_num_seqs": 2 * WINDOW}
"""Maximum number of tokens, and of requests, of an engine step."""


def _engine(folder: Path, tp: int = 1, memory: FakeMemory | None = None) -> VllmEngine:
    prepare_for_vllm(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    shape = model_config(find_model(str(folder), "a model"), "a model")
    manifest = manifest_of(meta_model(shape, "eager", torch.float32))
    return VllmEngine(str(folder), manifest, torch.float32, WINDOW, VALID, tp, LIMITS, memory)


def _plain_engine(folder: Path) -> TransformersEngine:
    shape = model_config(find_model(str(folder), "a model"), "a model")
    return TransformersEngine(shape, torch.float32, torch.device("cpu"), 64, WINDOW, VALID)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = find_model(str(folder), "a model")
    return {name: files.tensor(name) for name in files.files}


def _error(act: Callable[[], object]) -> str:
    """Return the message of the error that ``act`` raises; empty without an error."""
    try:
        act()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def _sync_error(act: Callable[[], object]) -> tuple[str, str]:
    """Return tensor and check of the SyncError that ``act`` raises; empty without an error."""
    try:
        act()
    except SyncError as error:
        return error.tensor, error.found_in
    return "", ""


def ids_of(rollouts: list[Rollout]) -> list[tuple[int, int, tuple[int, ...], str]]:
    """Return what identifies each rollout, its token ids and how it ended."""
    return [(r.prompt.prompt_id, r.response_index, r.response_ids, r.finish) for r in rollouts]


def difference(one: list[Rollout], other: list[Rollout]) -> float:
    """Return the largest difference of two log-probs of the same token."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def _awake(engine: Any, tensors: dict[str, torch.Tensor], version: int) -> Any:
    engine.wake("weights")
    report = engine.sync(CompleteWeights(tensors.items()), version)
    engine.wake("kv")
    return report


def _cached(engine: VllmEngine, responses: int) -> list[int]:
    """Return, for each response to a prompt of 40 tokens, how many of its tokens were in the cache."""
    prompt = Prompt(9, tuple(range(100, 140)), Problem("p"))
    return _cached_tokens(engine, requests_of([prompt], replace(SAMPLED, responses_per_prompt=responses), 0, WINDOW))


def _cached_tokens(engine: VllmEngine, requests: list[Request]) -> list[int]:
    """Return how many input tokens of each request were in the cache."""
    return [output.num_cached_tokens for output in plain_run(engine._engine, _with_params(engine, requests, SAMPLED))]


def _with_params(engine: VllmEngine, requests: list[Request], sampling: Sampling) -> list[tuple[Sequence[int], Any]]:
    return [(request.input_ids, engine._params(request, sampling)) for request in requests]


def _by_plain_loop(engine: VllmEngine, sampling: Sampling) -> list[tuple[list[int], list[float], str]]:
    """Generate the responses to PROMPTS at step 0 with LLMEngine.step: token ids, log-probs and finish reasons."""
    requests = requests_of(PROMPTS, sampling, 0, WINDOW)
    return [plain_fields(output) for output in plain_run(engine._engine, _with_params(engine, requests, sampling))]


CACHE_OR_ON_HOST = {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}
"""Attributes of vLLM's modules that are the key-value cache, or in host memory on every platform."""


def _loose_tensors(engine: VllmEngine) -> list[str]:
    """Return the tensors of vLLM's model that are neither parameters nor buffers, without CACHE_OR_ON_HOST."""
    return [
        f"{name}.{key}"
        for name, module in engine._weights.model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and key not in CACHE_OR_ON_HOST
    ]


def _random_states() -> list[Any]:
    numpys = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return [random.getstate(), numpys, torch.get_rng_state().tolist()]


def _alone(folder: Path) -> dict[str, Any]:
    """Run all scenarios of one rank; those that break the engine come last."""
    world = World()
    torch.manual_seed(5)
    before = _random_states()
    memory = FakeMemory(free=2**40)
    engine = _engine(folder, memory=memory)
    seen: dict[str, Any] = {"folder": folder, "random states": (before, _random_states())}
    tensors = _tensors(folder)
    seen["asleep"] = {
        "generate": _error(lambda: engine.generate(PROMPTS, GREEDY, 0)),
        "sync": _error(lambda: engine.sync(CompleteWeights(tensors.items()), 0)),
    }
    seen["report"] = _awake(engine, tensors, 3)
    plain = _plain_engine(folder)
    _awake(plain, tensors, 3)
    seen["probe"] = engine.probe(PROBE), plain.probe(PROBE)
    seen["greedy"] = engine.generate(PROMPTS, GREEDY, 0), plain.generate(PROMPTS, GREEDY, 0)
    seen["sampled"] = [engine.generate(PROMPTS, SAMPLED, 0) for _ in range(2)]
    seen["plain loop"] = _by_plain_loop(engine, SAMPLED)
    added = engine._loop._added
    seen["omitted"] = engine.generate(PROMPTS, replace(SAMPLED, omitted=OMITTED), 0), engine._loop._added - added
    seen["some log-probs"] = [each.generate(PROMPTS, SOME_LOGPROBS, 0) for each in (engine, plain)]
    seen["cancelled"] = _cancelled(engine)
    seen["separately"] = [r for prompt in PROMPTS for r in engine.generate([prompt], SAMPLED, 0)]
    seen["cached"] = [_cached(engine, 2)]
    many = _prompts(*[40] * 8)
    seen["many"] = engine.generate(many, SAMPLED, 0), [r for p in many for r in engine.generate([p], SAMPLED, 0)]
    seen["nucleus"] = engine.generate(PROMPTS, NUCLEUS, 0)
    for name, sampling, needed in SEGMENTS:
        seen[name] = scenarios.segment_scenarios(
            engine, sampling, needed, after_cut=lambda requests: _cached_tokens(engine, requests)
        )
    seen["another step"] = engine.generate(PROMPTS, SAMPLED, 1)
    seen["refused"] = {
        "a prompt as long as the window": _error(lambda: engine.generate(_prompts(WINDOW), GREEDY, 0)),
        "an id of the padding": _error(lambda: engine.generate([Prompt(0, (VALID,), Problem("p"))], GREEDY, 0)),
    }
    memory.outside_bytes = 5 * 2**30
    engine.sleep()
    seen["residual"] = engine.residual_bytes
    memory.free_bytes = 0
    seen["no memory"] = _error(lambda: engine.wake("weights"))
    memory.free_bytes = 2**40
    moved = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.5}
    seen["second report"] = _awake(engine, moved, 4)
    seen["second probe"] = engine.probe(PROBE)
    seen["cached"].append(_cached(engine, 1))
    engine.sleep()
    _awake(engine, tensors, 5)
    seen["faults"] = _faults(engine, CompleteWeights(tensors.items()))
    engine.close()
    seen["groups after closing"] = dist.is_initialized(), _error(world.barrier)
    world.close()
    return seen


def _cancelled(engine: VllmEngine) -> tuple[list[Any], int, bool]:
    """Cancel at the third step; return the rollouts, the number of calls, and whether vLLM still has requests."""
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls == 3

    rollouts = engine.generate(PROMPTS, SAMPLED, 0, cancelled=cancelled)
    scheduler = engine._engine.engine_core.engine_core.scheduler
    return rollouts, calls, scheduler.has_requests() or engine._engine.has_unfinished_requests()


def _faults(engine: VllmEngine, weights: CompleteWeights) -> dict[str, Any]:
    """Break the awake engine in several ways; return the error of each, and the tensor if it is a SyncError."""
    found: dict[str, Any] = {"none": _sync_error(lambda: engine._verify(weights.sums))}
    core: Any = engine._engine.engine_core
    norm: Any = engine._weights.model.get_parameter("model.norm.weight")
    engine._engine.sleep(1)
    found["asleep"] = _error(lambda: engine.generate(PROMPTS, GREEDY, 0))
    engine._engine.wake_up()
    get_output, core.get_output = core.get_output, lambda: SimpleNamespace(outputs=[])
    found["no progress"] = _error(lambda: engine.generate(PROMPTS[:2], GREEDY, 0))
    core.get_output = get_output
    engine._loop.abort()
    norm.data += 1
    found["overwritten"] = _sync_error(lambda: engine._verify(weights.sums))
    norm.data.fill_(torch.nan)
    found["nan"] = _error(lambda: engine.generate(PROMPTS, GREEDY, 0))
    for name, lost, factor in (
        ("half of a fused parameter missing", "model.layers.1.mlp.up_proj.weight", 1.5),
        ("norm missing", "model.norm.weight", 1.7),
    ):
        scaled = CompleteWeights((n, t * factor) for n, t in weights)  # so that the previous weights are wrong too
        engine._weights.receive((n, t) for n, t in scaled if n != lost)
        found[name] = _sync_error(lambda scaled=scaled: engine._verify(scaled.sums))  # type: ignore[misc]
    engine._weights.receive((EXCHANGED.get(n, n), t) for n, t in weights)
    found["key and value exchanged"] = _sync_error(lambda: engine._verify(weights.sums))
    engine._weights.receive(iter(weights))
    norm.data = norm.data[[1, 0, *range(2, len(norm))]]
    found["rows exchanged"] = _sync_error(lambda: engine._verify(weights.sums))
    head = engine._weights.model.lm_head
    engine._weights.model.lm_head = None  # type: ignore[assignment]
    engine._weights.receive(iter(weights))
    engine._weights.model.lm_head = head
    found["head not repacked"] = _sync_error(lambda: engine._verify(weights.sums))
    engine._weights.receive(iter(weights))
    found["repaired"] = _sync_error(lambda: engine._verify(weights.sums))
    engine.sleep()
    engine.wake("weights")
    stale = CompleteWeights((name, tensor + 1 if "norm" in name else tensor) for name, tensor in weights)
    stale.sums = weights.sums
    found["stale"] = _sync_error(lambda: engine.sync(stale, 6))
    return found


def one_rank(
    folder: Path, soaked: Path, speculating: Path, of_variants: dict[str, Path], ports: list[int]
) -> dict[str, Any]:
    """Run the scenarios of one rank one after the other: importing vLLM takes longer than each of them."""
    seen, port = _alone(folder), iter(ports)
    seen["loop"] = loop_scenarios(folder)
    os.environ["MASTER_PORT"] = str(next(port))
    seen["soak"] = _soak(soaked, CYCLES)
    seen["variants"] = _variants(of_variants, 1, port)
    os.environ["MASTER_PORT"] = str(next(port))  # last: after a speculating engine, vLLM on CPU cannot create another
    seen["speculation"] = speculation.speculation_scenarios(speculating, 1)
    return seen


def _variants(folders: dict[str, Path], tp: int, ports: Iterator[int]) -> dict[str, dict[str, Any]]:
    """Return for each variant of a checkpoint the error of log-probs and the tensors that sleep would discard."""
    found = {}
    for name, folder in folders.items():
        os.environ["MASTER_PORT"] = str(next(ports))
        found[name] = _variant(folder, tp)
    return found


def _variant(folder: Path, tp: int) -> dict[str, Any]:
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    prepare_for_vllm(world.rank, world.size, int(os.environ["LOCAL_RANK"]))
    settings = (
        "distillation.allow_degenerate=true",
        "policy.generation.backend=vllm",
        f"policy.max_total_sequence_length={variants.WINDOW}",
        f"policy.generation.vllm_cfg.tensor_parallel_size={tp}",
        "policy.generation.vllm_kwargs={max_num_batched_tokens: 256, max_num_seqs: 16}",
    )
    config, files = config_for(folder, folder, *settings, ranks=tp), find_model(str(folder), variants.KEY)
    engine: Any = build_engine(config, files, world, variants.VOCAB)
    difference = variants.engine_difference(engine, variants.sharded(files, world, False), variants.plain_model(folder))
    seen = {"difference": difference, "loose tensors": _loose_tensors(engine)}
    world.barrier()
    engine.close()
    return seen


def on_gpu(folder: Path) -> dict[str, Any]:
    """Run the scenarios of one rank whose results do not depend on rounding."""
    world = World()
    world.build_mesh("cuda", 1, 1)
    engine = _engine(folder)
    tensors = _tensors(folder)
    seen: dict[str, Any] = {
        "loads by": engine._weights.path,
        "asleep": _error(lambda: engine.generate(PROMPTS, GREEDY, 0)),
    }
    seen["report"] = _awake(engine, tensors, 3)
    seen["probe"] = engine.probe(PROBE)
    seen["sampled"] = [engine.generate(PROMPTS, SAMPLED, 0)]
    seen["cancelled"] = _cancelled(engine)
    engine.sleep()
    seen["residual"] = engine.residual_bytes
    _awake(engine, {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.5}, 4)
    seen["second probe"] = engine.probe(PROBE)
    norm: Any = engine._weights.model.get_parameter("model.norm.weight")
    norm.data += 1
    seen["overwritten"] = _sync_error(lambda: engine._verify(engine._sums))
    engine.close()
    return seen


def _pair(folder: Path, tp: int) -> dict[str, Any]:
    """Two ranks with a sharded student: one engine of both ranks (tp=2), or one on each (tp=1)."""
    world = World()
    engine = _engine(folder, tp)
    seen: dict[str, Any] = {"lora": lora_syncs(world, engine, folder, tp, PROBE)}
    world.build_mesh("cpu", 1, 1)
    config = config_for(folder, folder, "distillation.allow_degenerate=true", ranks=2)
    student = Student(config, find_model(str(folder), "a model"), world, VALID, ())
    sync = WeightSync(world, engine, student, VALID)
    sync.push_weights(0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.01)
    engine.sleep()
    sync.push_weights(1)  # float32: compares the probe with the trainer
    seen |= {"own": [], "probe": engine.probe(PROBE)}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        own = engine.generate(engine.share_of(PROMPTS), sampling, 0)
        seen["own"].append(len(own))
        seen[name] = gather_rollouts(world, own, PROMPTS, version=1)
    plain = _plain_engine(folder)
    _awake(plain, {name: tensor.clone() for name, tensor in student.weights()}, 1)
    seen["plain"] = plain.generate(PROMPTS, GREEDY, 0)
    if tp > 1:
        gather = functools.partial(_gathered, world)
        for name, sampling, needed in SEGMENTS:
            seen[name] = scenarios.segment_scenarios(engine, sampling, needed, gather)
        _disagree(engine, world, seen)
    else:  # every rank has a complete engine
        merged = seen["lora"].pop("merged")
        engine.sleep()
        _awake(engine, merged, 2)
        seen["lora"]["faults"] = _faults(engine, CompleteWeights(merged.items()))
    world.barrier()
    engine.close()
    return seen


def _gathered(world: World, own: list[Segment]) -> list[Segment]:
    return [segment for part in world.gather(own) for segment in part]


def _disagree(engine: VllmEngine, world: World, seen: dict[str, Any]) -> None:
    """Give the two ranks of one engine different inputs, weights and outputs."""
    other = world.rank == 1
    seen["prompts"] = _error(lambda: engine.generate(PROMPTS[: 3 if other else 4], GREEDY, 0))
    warmer = SimpleNamespace(**{**vars(SAMPLED), "temperature": 0.9 if other else 0.8})
    seen["sampling"] = _error(lambda: engine.generate(PROMPTS, warmer, 0))  # type: ignore[arg-type]
    requests, cutoff = requests_of(PROMPTS, GREEDY, 0, WINDOW), scenarios.FixedCutoff(3) if other else None
    seen["cutoff"] = _error(lambda: engine.segments(requests, GREEDY, cutoff))
    seen["bound"] = engine.segments(requests, GREEDY, scenarios.FixedCutoff(7 if other else 3))
    norm: Any = engine._weights.model.get_parameter("model.norm.weight")
    engine.sleep()
    engine.wake("weights")
    sent = dict(engine._sums)
    norm.data += float(other)
    seen["one rank's weights"] = _sync_error(lambda: engine._verify(sent))
    norm.data -= float(other)
    run = engine._run

    def drifted(*args: Any, **kwargs: Any) -> list[Any]:
        first, *rest = run(*args, **kwargs)
        return [replace(first, ids=(first.ids[0] ^ 1, *first.ids[1:])) if other else first, *rest]

    engine.state = "ready"
    engine._llm.wake_up(tags=["kv_cache"])
    engine._run = drifted  # type: ignore[method-assign]
    seen["responses"] = _error(lambda: engine.generate(PROMPTS, GREEDY, 0))


def on_two_ranks(
    folder: Path, speculating: Path, of_variants: dict[str, Path], ports: list[int]
) -> dict[str | int, dict[str, Any]]:
    """Run the scenarios of two ranks in the same processes; return their results.

    Those of engines of one and of two ranks, of variants of checkpoints, and of a speculating engine of two ranks.
    """
    seen: dict[str | int, dict[str, Any]] = {}
    port = iter(ports)
    for tp in (1, 2):
        os.environ["MASTER_PORT"] = str(next(port))
        seen[tp] = _pair(folder, tp)
    seen["variants"] = _variants(of_variants, 2, port)
    os.environ["MASTER_PORT"] = str(next(port))
    seen["speculation"] = speculation.speculation_scenarios(speculating, 2)
    return seen


def _soak(folder: Path, cycles: int) -> dict[str, Any]:
    """Return resident bytes, file handles and threads after every cycle of sync and generation."""
    world = World()
    engine = _engine(folder)
    tensors = _tensors(folder)
    seen = []
    for cycle in range(cycles):
        moved = {name: tensor * (1 + cycle / 1000) for name, tensor in tensors.items()}
        _awake(engine, moved, cycle)
        engine.probe(PROBE)
        engine.generate(PROMPTS, SAMPLED, cycle)
        engine.sleep()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen.append((resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    world.barrier()
    engine.close()
    return {"cycles": seen, "weights": sum(t.numel() * t.element_size() for t in tensors.values())}
