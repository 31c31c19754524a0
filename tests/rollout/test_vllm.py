"""Real vLLM on CPU: its answers are the transformers engine's and the trainer's, and every way to go wrong is found.

A process can hold one vLLM engine, so each fixture starts its ranks once, tries everything there, and the tests look at
what it brought back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
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
from distill.errors import UserError
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.model.student import Student
from distill.rollout.factory import check_backend
from distill.rollout.gather import gather_rollouts
from distill.rollout.sync import WeightSync
from distill.rollout.transformers_engine import TransformersEngine, processed_logprobs
from distill.rollout.vllm_engine import VllmEngine
from distill.rollout.vllm_env import prepare_for_vllm
from distill.types import Problem, Prompt, Rollout, Sampling
from tests.harness import CompleteWeights, config_for
from tests.helpers import run_ranks, save_tiny_model
from tests.rollout.test_sync import FakeMemory
from tests.variants import NOT_IN_VLLM, save_variant

pytestmark = pytest.mark.slow

VALID = 300  # ids from here on are padding of the embedding
WINDOW = 64
PROBE = list(range(40, 64))
GREEDY = Sampling(temperature=0.0, max_new_tokens=10, stop_token_ids=())
SAMPLED = Sampling(temperature=0.8, max_new_tokens=10, stop_token_ids=tuple(range(0, VALID, 9)), responses_per_prompt=3)


def _prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(i, tuple(range(10 * i, 10 * i + n)), Problem("p")) for i, n in enumerate(lengths)]


PROMPTS = _prompts(7, 1, 40, 12)
NUCLEUS = replace(SAMPLED, top_p=0.9, top_k=40, stop_token_ids=())
KEY, VALUE = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv")
EXCHANGED = {KEY: VALUE, VALUE: KEY}


AT_ONCE = {"max_num_batched_tokens": 2 * WINDOW, "max_num_seqs": 2 * WINDOW}
"""Tokens that a step of the engine reads at most."""


def _engine(folder: Path, tp: int = 1, memory: FakeMemory | None = None) -> VllmEngine:
    prepare_for_vllm(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    shape = model_config(find_model(str(folder), "a model"), "a model")
    manifest = manifest_of(meta_model(shape, "eager", torch.float32))
    return VllmEngine(str(folder), manifest, torch.float32, WINDOW, VALID, tp, AT_ONCE, memory)


def _plain_engine(folder: Path) -> TransformersEngine:
    shape = model_config(find_model(str(folder), "a model"), "a model")
    return TransformersEngine(shape, torch.float32, torch.device("cpu"), 64, WINDOW, VALID)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = find_model(str(folder), "a model")
    return {name: files.tensor(name) for name in files.files}


def _said(act: Callable[[], object]) -> str:
    """What the engine objects to; empty where it does not."""
    try:
        act()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def _ids(rollouts: list[Rollout]) -> list[tuple[int, int, tuple[int, ...], str]]:
    return [(r.prompt.prompt_id, r.response_index, r.response_ids, r.finish) for r in rollouts]


def _apart(one: list[Rollout], other: list[Rollout]) -> float:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def _awake(engine: Any, tensors: dict[str, torch.Tensor], version: int) -> Any:
    engine.wake("weights")
    report = engine.sync(CompleteWeights(tensors.items()), version)
    engine.wake("kv")
    return report


def _cached(engine: VllmEngine, answers: int) -> list[int]:
    """How many of 40 tokens of a prompt each of its answers finds read already."""
    prompt = Prompt(9, tuple(range(100, 140)), Problem("p"))
    outputs = engine._run([(prompt.student_ids, engine._params(prompt, a, SAMPLED, 0)) for a in range(answers)])
    return [output.num_cached_tokens for output in outputs]


def _random_states() -> list[Any]:
    numpys = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return [random.getstate(), numpys, torch.get_rng_state().tolist()]


def _alone(folder: Path) -> dict[str, Any]:
    """One rank tries everything that a working engine and a spoilt one do, the fatal things last."""
    world = World()
    torch.manual_seed(5)
    before = _random_states()
    memory = FakeMemory(free=2**40)
    engine = _engine(folder, memory=memory)
    seen: dict[str, Any] = {"folder": folder, "random states": (before, _random_states())}
    tensors = _tensors(folder)
    seen["asleep"] = {
        "generate": _said(lambda: engine.generate(PROMPTS, GREEDY, 0)),
        "sync": _said(lambda: engine.sync(CompleteWeights(tensors.items()), 0)),
    }
    seen["report"] = _awake(engine, tensors, 3)
    plain = _plain_engine(folder)
    _awake(plain, tensors, 3)
    seen["probe"] = engine.probe(PROBE), plain.probe(PROBE)
    seen["greedy"] = engine.generate(PROMPTS, GREEDY, 0), plain.generate(PROMPTS, GREEDY, 0)
    seen["sampled"] = [engine.generate(PROMPTS, SAMPLED, 0) for _ in range(2)]
    seen["abandoned"] = _abandoned(engine)
    seen["one by one"] = [r for prompt in PROMPTS for r in engine.generate([prompt], SAMPLED, 0)]
    seen["cached"] = [_cached(engine, 2)]
    many = _prompts(*[40] * 8)
    seen["many"] = engine.generate(many, SAMPLED, 0), [r for p in many for r in engine.generate([p], SAMPLED, 0)]
    seen["nucleus"] = engine.generate(PROMPTS, NUCLEUS, 0)
    seen["another step"] = engine.generate(PROMPTS, SAMPLED, 1)
    seen["refused"] = {
        "a prompt as long as the window": _said(lambda: engine.generate(_prompts(WINDOW), GREEDY, 0)),
        "an id of the padding": _said(lambda: engine.generate([Prompt(0, (VALID,), Problem("p"))], GREEDY, 0)),
    }
    memory.is_others = 5 * 2**30
    engine.sleep()
    seen["residual"] = engine.residual_bytes
    memory.is_free = 0
    seen["no memory"] = _said(lambda: engine.wake("weights"))
    memory.is_free = 2**40
    moved = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.5}
    seen["second report"] = _awake(engine, moved, 4)
    seen["second probe"] = engine.probe(PROBE)
    seen["cached"].append(_cached(engine, 1))
    engine.sleep()
    _awake(engine, tensors, 5)
    seen["spoilt"] = _spoil(engine, CompleteWeights(tensors.items()))
    engine.close()
    seen["groups after closing"] = dist.is_initialized(), _said(world.barrier)
    world.close()
    return seen


def _abandoned(engine: VllmEngine) -> tuple[list[Any], int, bool]:
    """The answers that nobody wants from the third step on; how often that was asked; whether something is left."""
    asked = 0

    def abandon() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    answers = engine.generate(PROMPTS, SAMPLED, 0, cancelled=abandon)
    scheduler = engine._engine.engine_core.engine_core.scheduler
    return answers, asked, scheduler.has_requests() or engine._engine.has_unfinished_requests()


def _spoil(engine: VllmEngine, weights: CompleteWeights) -> dict[str, str]:
    """Break the awake engine in one way after another; what it, or the proof of its weights, says to each."""
    said = {"nothing": _said(lambda: engine._verify(weights.sums))}
    core = engine._engine
    norm: Any = engine._weights.model.get_parameter("model.norm.weight")
    core.sleep(1)
    said["asleep underneath"] = _said(lambda: engine.generate(PROMPTS, GREEDY, 0))
    core.wake_up()
    step, core.step = core.step, list  # a step that brings nothing
    said["no progress"] = _said(lambda: engine.generate(PROMPTS[:2], GREEDY, 0))
    core.step = step
    core.abort_request([str(i) for i in range(engine._requests)])
    norm.data += 1
    said["written over"] = _said(lambda: engine._verify(weights.sums))
    norm.data.fill_(torch.nan)
    said["nan in the engine"] = _said(lambda: engine.generate(PROMPTS, GREEDY, 0))
    for name, lost, factor in (
        ("a lost half", "model.layers.1.mlp.up_proj.weight", 1.5),
        ("a lost norm", "model.norm.weight", 1.7),
    ):
        later = CompleteWeights((n, t * factor) for n, t in weights)  # so that what lay there before isn't right either
        engine._weights.receive((n, t) for n, t in later if n != lost)
        said[name] = _said(lambda later=later: engine._verify(later.sums))  # type: ignore[misc]
    engine._weights.receive((EXCHANGED.get(n, n), t) for n, t in weights)
    said["key and value exchanged"] = _said(lambda: engine._verify(weights.sums))
    engine._weights.receive(iter(weights))
    norm.data = norm.data[[1, 0, *range(2, len(norm))]]
    said["rows exchanged"] = _said(lambda: engine._verify(weights.sums))
    head = engine._weights.model.lm_head
    engine._weights.model.lm_head = None  # type: ignore[assignment]
    engine._weights.receive(iter(weights))
    engine._weights.model.lm_head = head
    said["a head that is not repacked"] = _said(lambda: engine._verify(weights.sums))
    engine._weights.receive(iter(weights))
    said["repaired"] = _said(lambda: engine._verify(weights.sums))
    engine.sleep()
    engine.wake("weights")
    stale = CompleteWeights((name, tensor + 1 if "norm" in name else tensor) for name, tensor in weights)
    stale.sums = weights.sums
    said["stale"] = _said(lambda: engine.sync(stale, 6))
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "m", "qwen3", True, seed=1)
    GenerationConfig(eos_token_id=list(range(1, VALID, 2))).save_pretrained(folder)  # which stop ids, a recipe says
    return dict(run_ranks(1, _alone, folder)[0])


def test_random_states_stay_what_they_were(alone) -> None:
    before, after = alone["random states"]
    assert before == after


def test_asleep_it_neither_generates_nor_takes_weights(alone) -> None:
    assert alone["asleep"] == {
        "generate": "the engine can generate only when ready, and it is asleep",
        "sync": "the engine can sync only when weights, and it is asleep",
    }


def test_both_members_give_the_same_greedy_answers_and_log_probs(alone) -> None:
    ours, plain = alone["greedy"]
    assert _ids(ours) == _ids(plain)
    assert _apart(ours, plain) < 1e-4
    assert max(abs(a - b) for a, b in zip(*alone["probe"], strict=True)) < 1e-4


def test_log_probs_are_those_of_the_distribution_sampled_from(alone) -> None:
    plain = AutoModelForCausalLM.from_pretrained(alone["folder"], dtype=torch.float32)
    for rollout in [*alone["sampled"][0], *alone["nucleus"]]:
        prompt, ids = rollout.prompt.student_ids, torch.tensor(rollout.response_ids)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + rollout.response_ids])).logits[0, len(prompt) - 1 : -1]
        sampling = NUCLEUS if rollout in alone["nucleus"] else SAMPLED
        expected = processed_logprobs(logits, sampling, VALID).gather(1, ids[:, None])[:, 0]
        assert (expected - torch.tensor(rollout.logprobs)).abs().max() < 1e-4


def test_answers_repeat_and_do_not_depend_on_their_neighbours(alone) -> None:
    first, second = alone["sampled"]
    assert first == second
    assert alone["one by one"] == first
    assert alone["abandoned"] == ([], 3, False)
    assert _ids(alone["another step"]) != _ids(first)
    assert len({r.response_ids for r in first}) > len(PROMPTS), "answers to one prompt share a stream"


def test_more_prompts_than_a_step_reads_are_answered_as_each_alone(alone) -> None:
    together, one_by_one = alone["many"]
    assert 2 * WINDOW < 8 * 40 and together == one_by_one


def test_a_prompt_is_read_once_for_its_answers_and_anew_after_a_sync(alone) -> None:
    block = 32
    assert alone["cached"] == [[0, block], [0]]


def test_answers_end_at_a_stop_token_or_the_limit_and_keep_their_order(alone) -> None:
    rollouts = alone["sampled"][0]
    assert [(r.prompt.prompt_id, r.response_index) for r in rollouts] == [(p, a) for p in range(4) for a in range(3)]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert (r.response_ids[-1] in SAMPLED.stop_token_ids) == (r.finish == "stop")
        assert r.finish == "stop" or len(r.response_ids) == 10
        assert max(r.response_ids) < VALID and r.version == 3


def test_it_looks_at_the_memory_before_it_wakes_and_after_it_slept(alone) -> None:
    assert "waking the engine's weights needs 0.00 GiB and 0.00 GiB are free" in alone["no memory"]
    assert alone["residual"] == 5 * 2**30


def test_prompts_it_cannot_read_are_refused(alone) -> None:
    refused = alone["refused"]
    assert "64 tokens; the engine's window of 64 needs one more" in refused["a prompt as long as the window"]
    assert "not in 0..299" in refused["an id of the padding"]


def test_a_sync_says_what_changed_and_the_probe_moves(alone) -> None:
    assert alone["report"].changed == alone["report"].tensors > 20
    assert alone["second report"].changed == 1
    assert alone["second probe"] != alone["probe"][0]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("asleep underneath", "vLLM is asleep"),
        ("no progress", "vLLM made no token in 1"),
        ("written over", "vLLM's model.norm.weight does not hold the bits of model.norm.weight"),
        ("nan in the engine", "are not finite"),
        ("a lost half", "gate_up_proj.weight does not hold the bits of model.layers.1.mlp.up_proj.weight"),
        ("a lost norm", "vLLM's model.norm.weight does not hold the bits of"),
        ("rows exchanged", "vLLM's model.norm.weight does not hold the bits of model.norm.weight"),
        ("key and value exchanged", "qkv_proj.weight does not hold the bits of model.layers.0.self_attn.k_proj.weight"),
        ("a head that is not repacked", "vLLM computes with its old lm_head.weight"),
        ("stale", "did not arrive as it was sent"),
    ],
)
def test_what_goes_wrong_in_the_engine_is_found(alone, spoilt, message) -> None:
    assert message in alone["spoilt"][spoilt], alone["spoilt"]
    assert alone["spoilt"]["nothing"] == alone["spoilt"]["repaired"] == ""


def test_closing_takes_the_process_groups_along_and_the_world_says_so(alone) -> None:
    initialized, said = alone["groups after closing"]
    assert not initialized
    assert "vLLM's engine takes them along" in said


def _pair(folder: Path, tp: int) -> dict[str, Any]:
    """Two ranks: the sharded student's weights in one engine of both, or in one each."""
    world = World()
    world.build_mesh("cpu", 1, 1)
    engine = _engine(folder, tp)
    config = config_for(folder, folder, "distillation.allow_degenerate=true", ranks=2)
    student = Student(config, find_model(str(folder), "a model"), world, VALID, ())
    freshness = WeightSync(world, engine, student, VALID)
    freshness.push_weights(0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.01)
    engine.sleep()
    freshness.push_weights(1)  # in float32 the probe is compared with the trainer's
    seen: dict[str, Any] = {"mine": [], "probe": engine.probe(PROBE)}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        mine = engine.generate(PROMPTS[engine.replica :: engine.replicas], sampling, 0)
        seen["mine"].append(len(mine))
        seen[name] = gather_rollouts(world, mine, PROMPTS, version=1)
    plain = _plain_engine(folder)
    _awake(plain, {name: tensor.clone() for name, tensor in student.weights()}, 1)
    seen["plain"] = plain.generate(PROMPTS, GREEDY, 0)
    if tp > 1:
        _disagree(engine, world, seen)
    world.barrier()
    engine.close()
    return seen


def _disagree(engine: VllmEngine, world: World, seen: dict[str, Any]) -> None:
    """Feed the two ranks of one engine different things."""
    other = world.rank == 1
    seen["prompts"] = _said(lambda: engine.generate(PROMPTS[: 3 if other else 4], GREEDY, 0))
    warmer = SimpleNamespace(**{**vars(SAMPLED), "temperature": 0.9 if other else 0.8})
    seen["sampling"] = _said(lambda: engine.generate(PROMPTS, warmer, 0))  # type: ignore[arg-type]
    norm: Any = engine._weights.model.get_parameter("model.norm.weight")
    engine.sleep()
    engine.wake("weights")
    sent = dict(engine._sums)
    norm.data += float(other)
    seen["one rank's weights"] = _said(lambda: engine._verify(sent))
    norm.data -= float(other)
    run = engine._run

    def drifted(*args: Any, **kwargs: Any) -> list[Any]:
        outputs = run(*args, **kwargs)
        if other:
            outputs[0].outputs[0].token_ids[0] ^= 1
        return outputs

    engine.state = "ready"
    engine._llm.wake_up(tags=["kv_cache"])
    engine._run = drifted  # type: ignore[method-assign]
    seen["answers"] = _said(lambda: engine.generate(PROMPTS, GREEDY, 0))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "m", "qwen3", True, seed=2)
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # what a killed run of two ranks leaves there under vLLM's own name
    made = not left.exists()
    left.touch()
    seen = {tp: run_ranks(2, _pair, folder, tp) for tp in (1, 2)}
    if made:
        left.unlink()
    return seen


def test_one_engine_of_two_ranks_answers_as_two_of_one(qwen3) -> None:
    (one, _), (two, same) = qwen3[1], qwen3[2]
    for name in ("greedy", "sampled"):
        assert _ids(one[name]) == _ids(two[name]) == _ids(same[name])
        assert _apart(one[name], two[name]) < 1e-4
    assert max(abs(a - b) for a, b in zip(one["probe"], two["probe"], strict=True)) < 1e-4


def _check_against_transformers(seen: dict[str, Any]) -> None:
    assert _ids(seen["greedy"]) == _ids(seen["plain"])
    assert _apart(seen["greedy"], seen["plain"]) < 1e-4


def test_the_sharded_students_answers_are_those_of_transformers(qwen3) -> None:
    for ranks in qwen3.values():
        _check_against_transformers(ranks[0])


@pytest.mark.parametrize(
    ("family", "tied"),
    [("qwen2", True), ("gemma3_text", True)],  # one key-value head; sliding windows
)
def test_other_families_are_split_over_two_ranks_as_well(tmp_path: Path, family: str, tied: bool) -> None:
    _check_against_transformers(
        run_ranks(2, _pair, save_tiny_model(tmp_path / "m", family, tied, seed=2, vocab=385), 2)[0]
    )


def test_every_answer_is_one_ranks_to_hand_on(qwen3) -> None:
    for ranks in qwen3.values():
        assert [sum(counts) for counts in zip(*(rank["mine"] for rank in ranks), strict=True)] == [4, 12]


def test_ranks_of_one_engine_that_differ_are_found(qwen3) -> None:
    for rank in qwen3[2]:
        assert "different prompts, sampling or step" in rank["prompts"]
        assert "different prompts, sampling or step" in rank["sampling"]
        assert "different answers" in rank["answers"]
        assert "vLLM's model.norm.weight does not hold the bits" in rank["one rank's weights"]


def _soak(folder: Path, cycles: int) -> list[tuple[int, int, int]]:
    """Resident bytes, file handles and threads after every cycle of sync and generation."""
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
    return seen


def test_fifty_cycles_leave_no_memory_handles_or_threads_behind(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", "qwen3", True, vocab=4096, hidden=256)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(folder).values())
    (seen,) = run_ranks(1, _soak, folder, 50)
    (memory, handles, threads), (memory_end, handles_end, threads_end) = seen[9], seen[-1]
    assert weights > 6 * 2**20
    assert memory_end - memory < 2 * weights, "forty cycles hold on to less than two copies of the weights"
    assert (handles_end, threads_end) == (handles, threads)


def _refusal(folder: Path, *overrides: str, ranks: int = 2) -> str:
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.setenv(name, "0")  # so that they are restored
        return _refused(folder, *overrides, ranks=ranks)


def _refused(folder: Path, *overrides: str, ranks: int) -> str:
    config = config_for(folder, folder, "distillation.allow_degenerate=true", *overrides, ranks=ranks)
    world = SimpleNamespace(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device("cpu"))
    try:
        check_backend(config, find_model(str(folder), "a model"), world)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], ""),
        (["policy.generation.vllm_kwargs={seed: 3}"], "vllm_kwargs.seed is set by the trainer: remove it"),
        (["policy.generation.vllm_kwargs={max_seqs: 3}"], "vllm_kwargs.max_seqs is no argument of vLLM's engine"),
        (["policy.generation.vllm_kwargs={max_num_seqs: 3}"], ""),
        (["policy.generation.vllm_kwargs={hf_overrides: {sliding_window: 4}}"], "vllm_kwargs.hf_overrides is set by"),
        (["policy.generation.vllm_kwargs={quantization: fp8}"], "vllm_kwargs.quantization is not possible"),
        (
            ["policy.generation.vllm_kwargs={gpu_memory_utilization: 0.5}"],
            "vllm_kwargs.gpu_memory_utilization has a key of its own: set policy.generation.vllm_cfg.gpu_memory_util",
        ),
        (["policy.generation.vllm_cfg.tensor_parallel_size=2"], "does not divide the 3 attention heads"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_it_is_built(tmp_path: Path, overrides, sentence) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama", hidden=96, heads=3, kv_heads=1)
    said = _refusal(folder, "policy.generation.backend=vllm", *overrides)
    assert sentence in said and bool(said) == bool(sentence)


@pytest.mark.parametrize(
    ("ranks", "shape", "sentence"),
    [
        (2, {"kv_heads": 1}, ""),
        (2, {"heads": 6, "kv_heads": 3, "hidden": 96}, "does not divide the 3 key-value heads"),
        (3, {"heads": 6, "kv_heads": 3, "hidden": 96}, ""),
        (3, {"heads": 6, "kv_heads": 3}, "does not divide the 128 inner channels (intermediate_size)"),
        (3, {"heads": 6, "kv_heads": 3, "hidden": 96, "vocab": 390}, "does not divide the 448 rows of the padded voc"),
    ],
)
def test_an_engine_of_several_ranks_needs_a_model_that_splits(tmp_path: Path, ranks, shape, sentence) -> None:
    folder = save_tiny_model(tmp_path / "m", "qwen3", **shape)
    overrides = ("policy.generation.backend=vllm", f"policy.generation.vllm_cfg.tensor_parallel_size={ranks}")
    said = _refusal(folder, *overrides, ranks=ranks)
    assert sentence in said and bool(said) == bool(sentence)


def test_a_model_that_vllm_builds_differently_is_refused_before_it_is_built(tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "m", NOT_IN_VLLM["qwen3 biases"][0])
    assert f"policy.model_name={folder} has attention_bias=True" in _refusal(folder, "policy.generation.backend=vllm")
    assert _refusal(folder, "policy.generation.backend=transformers") == ""


def test_without_vllm_the_other_member_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "m")
    monkeypatch.setattr("distill.rollout.factory.find_spec", lambda name: None)
    assert "vllm is not installed" in _refusal(folder, "policy.generation.backend=vllm")
    assert "policy.generation.backend=transformers" in _refusal(folder, "policy.generation.backend=vllm")
    assert _refusal(folder, "policy.generation.backend=transformers") == ""
