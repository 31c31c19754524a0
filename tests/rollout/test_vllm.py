"""vLLM on CPU: its responses equal those of transformers and the trainer, and every fault is detected.

A process can hold one vLLM engine. So each fixture starts its ranks once and runs all scenarios there; the tests check
the results.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GenerationConfig

from distill.distributed.world import World
from distill.errors import UserError, show
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.model.student import Student
from distill.rollout.engine import SyncError
from distill.rollout.factory import check_backend
from distill.rollout.gather import gather_rollouts
from distill.rollout.requests import Request, Segment, requests_of
from distill.rollout.sync import WeightSync
from distill.rollout.transformers_engine import TransformersEngine, processed_logprobs
from distill.rollout.vllm_config import ARCHITECTURES
from distill.rollout.vllm_engine import VllmEngine
from distill.rollout.vllm_env import prepare_for_vllm
from distill.types import Problem, Prompt, Rollout, Sampling
from tests.harness import CompleteWeights, config_for
from tests.helpers import free_port, run_ranks, save_tiny_model
from tests.rollout import segment_scenarios as scenarios
from tests.rollout.scripted_vllm import plain_fields, plain_run
from tests.rollout.test_sync import FakeMemory
from tests.rollout.vllm_loop_scenarios import loop_scenarios
from tests.variants import NOT_IN_VLLM, save_variant

pytestmark = pytest.mark.slow

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


def _ids(rollouts: list[Rollout]) -> list[tuple[int, int, tuple[int, ...], str]]:
    return [(r.prompt.prompt_id, r.response_index, r.response_ids, r.finish) for r in rollouts]


def _difference(one: list[Rollout], other: list[Rollout]) -> float:
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
    seen["loose tensors"] = _loose_tensors(engine)
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


def _one_rank(folder: Path, soaked: Path, port: int) -> dict[str, Any]:
    """Run the scenarios of one rank one after the other: importing vLLM takes longer than each of them."""
    seen = _alone(folder)
    seen["loop"] = loop_scenarios(folder)
    os.environ["MASTER_PORT"] = str(port)
    seen["soak"] = _soak(soaked, 50)
    return seen


def _on_gpu(folder: Path) -> dict[str, Any]:
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_a_gpu_sleeps_loads_weights_in_place_and_generates(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, _on_gpu, save_tiny_model(tmp_path / "m", "qwen3", True, seed=1))
    assert seen["loads by"] == "load_weights" and "asleep" in seen["asleep"]
    assert seen["report"].tensors > 20 and seen["probe"] != seen["second probe"]
    test_responses_end_at_a_stop_token_or_the_limit_and_keep_their_order(seen)
    assert seen["cancelled"] == ([], 3, False)
    assert seen["residual"] > 0
    assert seen["overwritten"] == ("model.norm.weight", "memory")


def _skip_on_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("compares bits and memory formats of vLLM on CPU; python -m scripts.accept checks vLLM on a GPU")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    _skip_on_gpu()
    models = tmp_path_factory.mktemp("models")
    folder = save_tiny_model(models / "m", "qwen3", True, seed=1)
    GenerationConfig(eos_token_id=list(range(1, VALID, 2))).save_pretrained(
        folder
    )  # the recipe's stop ids count instead
    soaked = save_tiny_model(models / "soaked", "llama", True, vocab=4096, hidden=256)
    return dict(run_ranks(1, _one_rank, folder, soaked, free_port())[0])


def test_creating_the_engine_keeps_the_global_random_states(alone) -> None:
    before, after = alone["random states"]
    assert before == after


def test_a_sleeping_engine_neither_generates_nor_syncs(alone) -> None:
    assert all("asleep" in error for error in alone["asleep"].values())


def test_both_engines_give_the_same_greedy_responses_and_log_probs(alone) -> None:
    ours, plain = alone["greedy"]
    assert _ids(ours) == _ids(plain)
    assert _difference(ours, plain) < 1e-4
    assert max(abs(a - b) for a, b in zip(*alone["probe"], strict=True)) < 1e-4


def test_log_probs_are_those_of_the_sampled_distribution(alone) -> None:
    plain = AutoModelForCausalLM.from_pretrained(alone["folder"], dtype=torch.float32)
    for rollout in [*alone["sampled"][0], *alone["nucleus"]]:
        prompt, ids = rollout.prompt.student_ids, torch.tensor(rollout.response_ids)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + rollout.response_ids])).logits[0, len(prompt) - 1 : -1]
        sampling = NUCLEUS if rollout in alone["nucleus"] else SAMPLED
        expected = processed_logprobs(logits, sampling, VALID).gather(1, ids[:, None])[:, 0]
        assert (expected - torch.tensor(rollout.logprobs)).abs().max() < 1e-4


def test_responses_repeat_and_do_not_depend_on_the_batch(alone) -> None:
    first, second = alone["sampled"]
    assert first == second
    assert alone["separately"] == first
    assert _ids(alone["another step"]) != _ids(first)
    assert len({r.response_ids for r in first}) > len(PROMPTS), "responses with equal seeds"


def test_omitted_responses_are_not_requested_and_the_others_do_not_change(alone) -> None:
    kept, requests = alone["omitted"]
    assert kept == [r for r in alone["sampled"][0] if (r.prompt.prompt_id, r.response_index) not in OMITTED]
    assert requests == len(kept) == len(alone["sampled"][0]) - len(OMITTED)


def test_responses_equal_those_of_vllms_own_loop(alone) -> None:
    ours = [(list(r.response_ids), list(r.logprobs), r.finish) for r in alone["sampled"][0]]
    assert ours == alone["plain loop"]


def test_some_responses_have_log_probs_if_few_are_needed(alone) -> None:
    """The log-probs that are computed are those of the same responses with all log-probs."""
    ours, plain = alone["some log-probs"]
    assert _ids(ours) == _ids(alone["sampled"][0])
    kept = [bool(r.logprobs) for r in ours]
    assert kept == [bool(r.logprobs) for r in plain] and 0 < sum(kept) < len(kept)
    assert all(r.logprobs in ((), full.logprobs) for r, full in zip(ours, alone["sampled"][0], strict=True))


def test_cancelled_generation_returns_no_rollouts_and_removes_the_requests(alone) -> None:
    assert alone["cancelled"] == ([], 3, False)


def test_more_prompts_than_fit_into_a_step_give_the_same_responses(alone) -> None:
    together, separately = alone["many"]
    assert 2 * WINDOW < 8 * 40 and together == separately


def test_responses_share_the_cache_of_their_prompt_until_the_next_sync(alone) -> None:
    block = 32
    assert alone["cached"] == [[0, block], [0]]


def test_responses_end_at_a_stop_token_or_the_limit_and_keep_their_order(alone) -> None:
    rollouts = alone["sampled"][0]
    assert [(r.prompt.prompt_id, r.response_index) for r in rollouts] == [(p, a) for p in range(4) for a in range(3)]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert (r.response_ids[-1] in SAMPLED.stop_token_ids) == (r.finish == "stop")
        assert r.finish == "stop" or len(r.response_ids) == 10
        assert max(r.response_ids) < VALID and r.version == 3


@pytest.mark.parametrize("engine", ["one rank", "two ranks"])
def test_a_cutoff_only_truncates_segments(request, engine) -> None:
    ranks = [request.getfixturevalue("alone")] if engine == "one rank" else request.getfixturevalue("qwen3")[2]
    for seen in (rank[name] for rank in ranks for name, *_ in SEGMENTS):
        scenarios.check_cut(seen)


@pytest.mark.parametrize("engine", ["one rank", "two ranks"])
def test_continued_segments_depend_on_input_and_seed_only(request, engine) -> None:
    ranks = [request.getfixturevalue("alone")] if engine == "one rank" else request.getfixturevalue("qwen3")[2]
    for rank in ranks:
        scenarios.check_continued(rank["sampled segments"])
        scenarios.check_greedy_continuation(rank["greedy segments"])


def test_log_probs_of_continued_segments_are_those_of_the_sampled_distribution(alone) -> None:
    continued = alone["sampled segments"]["continued"]
    scenarios.check_logprobs(alone["folder"], continued, scenarios.SAMPLED)


def test_ended_segments_are_reported_once_by_the_rank_that_returns_them(alone, qwen3) -> None:
    for name, *_ in SEGMENTS:
        scenarios.check_reports(alone[name])
        first, second = (rank[name] for rank in qwen3[2])
        assert first["called"] and second["called"], "both ranks return segments"
        scenarios.check_reports({**first, "called": first["called"] + second["called"]})
        assert (second["cutoff"].lengths, second["cutoff"].reads) == ([], 0), "only the first rank has a cutoff"


def test_a_continued_segment_uses_the_cache_of_the_tokens_before_it(alone) -> None:
    """Its first block of 32 tokens contains the prompt of 30 tokens and two generated tokens."""
    seen = alone["sampled segments"]
    cached = dict(zip([s.request.prompt.prompt_id for s in seen["continued"]], seen["after cut"], strict=True))
    assert cached == {0: 32, 2: 32, 4: 32}


def test_memory_is_checked_before_waking_and_measured_after_sleep(alone) -> None:
    assert "gpu_memory_utilization" in alone["no memory"]
    assert alone["residual"] == 5 * 2**30


def test_a_prompt_outside_window_or_vocabulary_is_refused(alone) -> None:
    refused = alone["refused"]
    assert str(WINDOW) in refused["a prompt as long as the window"]
    assert f"0..{VALID - 1}" in refused["an id of the padding"]


def test_a_sync_reports_what_changed_and_the_probe_changes(alone) -> None:
    assert alone["report"].changed == alone["report"].tensors > 20
    assert alone["second report"].changed == 1
    assert alone["second probe"] != alone["probe"][0]


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        ("overwritten", "model.norm.weight"),
        ("half of a fused parameter missing", "model.layers.1.mlp.up_proj.weight"),
        ("norm missing", "model.norm.weight"),
        ("rows exchanged", "model.norm.weight"),
        ("key and value exchanged", KEY),
        ("head not repacked", "lm_head.weight"),
    ],
)
def test_a_wrong_weight_in_the_engines_memory_is_found(alone, fault, tensor) -> None:
    faults = alone["faults"]
    assert faults[fault] == (tensor, "repacking" if "repacked" in fault else "memory"), faults
    assert faults["none"] == faults["repaired"] == ("", "")


def test_a_stale_tensor_is_found_during_the_sync(alone) -> None:
    tensor, found_in = alone["faults"]["stale"]
    assert "norm" in tensor and found_in == "transfer"


@pytest.mark.parametrize(("fault", "message"), [("asleep", "asleep"), ("no progress", "no token"), ("nan", "finite")])
def test_a_broken_engine_raises_instead_of_generating(alone, fault, message) -> None:
    assert message in alone["faults"][fault]


def test_closing_destroys_the_process_groups_and_the_world_reports_it(alone) -> None:
    initialized, error = alone["groups after closing"]
    assert not initialized
    assert "engine" in error


def _pair(folder: Path, tp: int) -> dict[str, Any]:
    """Two ranks with a sharded student: one engine of both ranks (tp=2), or one on each (tp=1)."""
    world = World()
    world.build_mesh("cpu", 1, 1)
    engine = _engine(folder, tp)
    config = config_for(folder, folder, "distillation.allow_degenerate=true", ranks=2)
    student = Student(config, find_model(str(folder), "a model"), world, VALID, ())
    sync = WeightSync(world, engine, student, VALID)
    sync.push_weights(0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.01)
    engine.sleep()
    sync.push_weights(1)  # float32: compares the probe with the trainer
    seen: dict[str, Any] = {"own": [], "probe": engine.probe(PROBE), "loose tensors": _loose_tensors(engine)}
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


FAMILIES = {"qwen2": True, "gemma3_text": True}  # one key-value head; sliding windows


def _pairs(engines: list[tuple[Path, int, int]]) -> list[dict[str, Any]]:
    """Run the scenario of two ranks for each (model, ranks of an engine, port), in the same processes."""
    seen = []
    for folder, tp, port in engines:
        os.environ["MASTER_PORT"] = str(port)
        seen.append(_pair(folder, tp))
    return seen


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str | int, list[dict[str, Any]]]:
    """Results of the two ranks by size of the qwen3 engine, and by family of the other models."""
    _skip_on_gpu()
    models = tmp_path_factory.mktemp("models")
    folder = save_tiny_model(models / "m", "qwen3", True, seed=2)
    engines = {1: (folder, 1), 2: (folder, 2)} | {
        family: (save_tiny_model(models / family, family, tied, seed=2, vocab=385), 2)
        for family, tied in FAMILIES.items()
    }
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # left by a killed run of two ranks with vLLM's names
    created = not left.exists()
    left.touch()
    ranks = run_ranks(2, _pairs, [(*engine, free_port()) for engine in engines.values()])
    if created:
        left.unlink()
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(engines)}


@pytest.fixture(scope="module")
def qwen3(pairs) -> dict[int, list[dict[str, Any]]]:
    return {tp: pairs[tp] for tp in (1, 2)}


def test_one_engine_of_two_ranks_generates_as_two_of_one(qwen3) -> None:
    (one, _), (two, same) = qwen3[1], qwen3[2]
    for name in ("greedy", "sampled"):
        assert _ids(one[name]) == _ids(two[name]) == _ids(same[name])
        assert _difference(one[name], two[name]) < 1e-4
    assert max(abs(a - b) for a, b in zip(one["probe"], two["probe"], strict=True)) < 1e-4


def _check_against_transformers(seen: dict[str, Any]) -> None:
    assert _ids(seen["greedy"]) == _ids(seen["plain"])
    assert _difference(seen["greedy"], seen["plain"]) < 1e-4


def test_the_sharded_students_responses_equal_those_of_transformers(qwen3) -> None:
    for ranks in qwen3.values():
        _check_against_transformers(ranks[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_of_two_ranks_supports_other_families(pairs, family: str) -> None:
    _check_against_transformers(pairs[family][0])


def test_sleep_discards_only_tensors_that_waking_restores(alone, pairs) -> None:
    """Level 2 discards tensors that are neither parameters nor buffers, so each supported family must have none."""
    found = {"qwen3": alone["loose tensors"], "llama": alone["soak"]["loose tensors"]}
    found |= {family: pairs[family][0]["loose tensors"] for family in FAMILIES}
    assert found == {family: [] for family in ARCHITECTURES}


def test_every_response_is_returned_by_one_rank(qwen3) -> None:
    for ranks in qwen3.values():
        assert [sum(counts) for counts in zip(*(rank["own"] for rank in ranks), strict=True)] == [4, 12]


def test_the_ranks_of_an_engine_use_the_bound_of_the_first_rank(qwen3) -> None:
    bounded = [segment for rank in qwen3[2] for segment in rank["bound"]]
    assert len(bounded) == len(PROMPTS) and {len(segment.ids) for segment in bounded} == {3}


def test_different_inputs_weights_or_outputs_of_an_engines_ranks_are_found(qwen3) -> None:
    for rank in qwen3[2]:
        assert "prompts" in rank["prompts"]
        assert "sampling" in rank["sampling"]
        assert "sampling" in rank["cutoff"]
        assert "responses" in rank["responses"]
        assert rank["one rank's weights"] == ("model.norm.weight", "memory")


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
    loose, weights = _loose_tensors(engine), sum(t.numel() * t.element_size() for t in tensors.values())
    world.barrier()
    engine.close()
    return {"cycles": seen, "weights": weights, "loose tensors": loose}


def test_fifty_cycles_leak_no_memory_handles_or_threads(alone) -> None:
    cycles, weights = alone["soak"]["cycles"], alone["soak"]["weights"]
    (memory, handles, threads), (memory_end, handles_end, threads_end) = cycles[9], cycles[-1]
    assert len(cycles) == 50 and weights > 6 * 2**20
    assert memory_end - memory < 2 * weights
    assert (handles_end, threads_end) == (handles, threads)


def test_the_loop_returns_the_tokens_log_probs_and_finish_reasons_of_vllms_engine(alone) -> None:
    seen = alone["loop"]
    assert seen["asynchronous"] == (True, 2)
    assert seen["loop"] == seen["plain"] == seen["expected"]
    assert {finish for _, _, finish in seen["loop"]} == {"stop", "length"}
    assert {bool(logprobs) for _, logprobs, _ in seen["loop"]} == {True, False}


def test_aborted_requests_leave_nothing_behind(alone) -> None:
    seen = alone["loop"]
    early, *left = seen["aborted"]
    assert 0 < early < 60 and left == [0, False, 0]
    assert seen["after abort"] == seen["expected"]


def test_cut_requests_return_their_tokens_although_some_started_late(alone) -> None:
    """With asynchronous scheduling, results in progress at the cut are discarded."""
    seen = alone["loop"]
    cut = [
        (ids, len(full))
        for (ids, _, finish), (full, *_) in zip(seen["cut"], seen["expected"], strict=True)
        if not finish
    ]
    assert cut and all(5 <= len(ids) < complete for ids, complete in cut)
    for (ids, logprobs, finish), (full, full_logprobs, full_finish) in zip(seen["cut"], seen["expected"], strict=True):
        assert (ids, logprobs) == (full[: len(ids)], full_logprobs[: len(ids)])
        assert finish in ("", full_finish) and (not finish or ids == full)
    assert seen["after cut"] == seen["expected"]


def test_a_sleeping_engine_accepts_no_requests(alone) -> None:
    seen = alone["loop"]
    assert "asleep" in seen["asleep"]


def _refused_key(folder: Path, *overrides: str, ranks: int = 2, problem: str = "", fix: str = "") -> str:
    """Return the configuration key that ``check_backend`` refuses; empty if it accepts the recipe.

    The error must contain ``problem`` and ``fix`` in the fields of these names.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.setenv(name, "0")  # so that their values are restored
        error = _refusal(folder, *overrides, ranks=ranks)
    if error is None:
        return ""
    assert error.fix and error.problem.startswith(f"{error.key}={show(error.value)}")
    assert problem in error.problem and fix in error.fix
    return error.key


def _refusal(folder: Path, *overrides: str, ranks: int) -> UserError | None:
    config = config_for(folder, folder, "distillation.allow_degenerate=true", *overrides, ranks=ranks)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = SimpleNamespace(rank=0, size=ranks, local_rank=0, local_size=ranks, device=device)
    try:
        check_backend(config, find_model(str(folder), "a model"), world)  # type: ignore[arg-type]
    except UserError as error:
        return error
    return None


VLLM = "policy.generation.backend=vllm"
KWARGS = "policy.generation.vllm_kwargs"
ENGINE_SIZE = "policy.generation.vllm_cfg.tensor_parallel_size"


@pytest.mark.parametrize(
    ("name", "value", "problem", "fix"),
    [
        ("seed", "3", "trainer", "remove"),
        ("max_seqs", "3", "argument", "remove"),
        ("hf_overrides", "{sliding_window: 4}", "trainer", "remove"),
        ("quantization", "fp8", "weights", "remove"),
        ("gpu_memory_utilization", "0.5", "own key", "policy.generation.vllm_cfg.gpu_memory_utilization"),
    ],
)
def test_arguments_of_vllm_that_the_trainer_cannot_allow_are_refused(
    tmp_path: Path, name: str, value: str, problem: str, fix: str
) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama")
    refused = _refused_key(folder, VLLM, f"{KWARGS}={{{name}: {value}}}", problem=problem, fix=fix)
    assert refused == f"{KWARGS}.{name}"


def test_other_arguments_of_vllm_are_allowed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama")
    assert _refused_key(folder, VLLM) == ""
    assert _refused_key(folder, VLLM, f"{KWARGS}={{max_num_seqs: 3}}") == ""


@pytest.mark.parametrize(
    ("ranks", "shape", "number"),
    [
        (2, {"heads": 3, "kv_heads": 1, "hidden": 96}, "3 attention"),
        (2, {"kv_heads": 1}, ""),
        (2, {"heads": 6, "kv_heads": 3, "hidden": 96}, "3 key-value"),
        (3, {"heads": 6, "kv_heads": 3, "hidden": 96}, ""),
        (3, {"heads": 6, "kv_heads": 3}, "128 "),
        (3, {"heads": 6, "kv_heads": 3, "hidden": 96, "vocab": 390}, "448 "),
    ],
    ids=["heads", "one kv head", "kv heads", "divisible", "intermediate_size", "vocabulary"],
)
def test_an_engine_of_several_ranks_needs_a_model_that_they_divide(tmp_path: Path, ranks, shape, number) -> None:
    folder = save_tiny_model(tmp_path / "m", "qwen3", **shape)
    fix = number.split(" ")[0]  # the size must divide this number
    key = _refused_key(folder, VLLM, f"{ENGINE_SIZE}={ranks}", ranks=ranks, problem=f" {number}", fix=fix)
    assert key == (ENGINE_SIZE if number else "")


def test_a_model_that_vllm_cannot_run_is_refused_for_vllm_only(tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "m", NOT_IN_VLLM["qwen3 biases"][0])
    assert _refused_key(folder, VLLM, problem="attention_bias=True") == "policy.model_name"
    assert _refused_key(folder, "policy.generation.backend=transformers") == ""


def test_without_vllm_the_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "m")
    monkeypatch.setattr("distill.rollout.factory.installed_vllm", lambda: None)
    alternative = "policy.generation.backend=transformers"
    assert _refused_key(folder, VLLM, problem="installed", fix=alternative) == "policy.generation.backend"
    assert _refused_key(folder, "policy.generation.backend=transformers") == ""
