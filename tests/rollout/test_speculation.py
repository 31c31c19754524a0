"""N-gram speculation of vLLM on CPU: it changes neither the distribution of responses nor their log-probs.

A process can hold one vLLM engine, so a fixture starts its ranks once, runs all scenarios and returns their results.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.rollout.factory import batch_arguments
from distill.rollout.transformers_engine import TransformersEngine, processed_logprobs
from distill.rollout.vllm_engine import VllmEngine
from distill.rollout.vllm_env import prepare_for_vllm
from distill.rollout.vllm_speculation import (
    KEY,
    check_speculation,
    expand_batch_to_tokens,
    speculation_arguments,
)
from distill.rollout.vllm_version import InstalledVllm
from distill.types import Problem, Prompt, Rollout, Sampling
from scripts.bench_speculation import DraftCounter
from tests.harness import CompleteWeights, config_for
from tests.helpers import run_ranks, save_tiny_model

WINDOW = 128
VALID = 5
"""Number of valid token ids: with so few, responses repeat n-grams. The model has more ids, which are padding."""
LIMITS = {"max_num_batched_tokens": 4 * WINDOW, "max_num_seqs": WINDOW}
PROMPTS = [Prompt(i, ids, Problem("p")) for i, ids in enumerate([(0, 1, 2, 0, 1, 2, 0, 1), (3,), (4, 4, 4, 4), (1, 0)])]
GREEDY = Sampling(temperature=0.0, max_new_tokens=40, stop_token_ids=())
SAMPLED = Sampling(temperature=0.7, max_new_tokens=40, stop_token_ids=(4,), responses_per_prompt=8)
NUCLEUS = replace(SAMPLED, top_p=0.9, top_k=3, stop_token_ids=())
COUNTED = Sampling(temperature=1.5, max_new_tokens=4, stop_token_ids=(), responses_per_prompt=2500)
"""Sampling of the statistical test, which counts the responses of four tokens to the first prompt."""
RARE = 1e-4
"""False-positive rate: for this share of all choices of seeds, the test would fail without a fault."""


def _awake(engine: Any, tensors: dict[str, Tensor], version: int) -> None:
    engine.wake("weights")
    engine.sync(CompleteWeights(tensors.items()), version)
    engine.wake("kv")


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = find_model(str(folder), "a model")
    return {name: files.tensor(name) for name in files.files}


def _generate(folder: Path, tp: int) -> dict[str, Any]:
    """Run all scenarios on one engine of ``tp`` ranks; the last one breaks the sampler."""
    world = World()
    prepare_for_vllm(dist.get_rank(), dist.get_world_size(), dist.get_rank())
    shape = model_config(find_model(str(folder), "a model"), "a model")
    manifest = manifest_of(meta_model(shape, "eager", torch.float32))
    arguments = {**LIMITS, **speculation_arguments(on_cpu=True)}
    engine = VllmEngine(str(folder), manifest, torch.float32, WINDOW, VALID, tp, arguments)
    tensors = _tensors(folder)
    _awake(engine, tensors, 1)
    counter = DraftCounter(engine)
    seen: dict[str, Any] = {
        "greedy": engine.generate(PROMPTS, GREEDY, 0),
        "sampled": engine.generate(PROMPTS, SAMPLED, 0),
        "nucleus": engine.generate(PROMPTS, NUCLEUS, 0),
    }
    if tp == 1:
        seen["again"] = engine.generate(PROMPTS, SAMPLED, 0)
        seen["separately"] = [r for prompt in PROMPTS for r in engine.generate([prompt], SAMPLED, 0)]
        proposed, accepted = counter.proposed, counter.accepted
        seen["counted"] = [r.response_ids for r in engine.generate(PROMPTS[:1], COUNTED, 0)]
        seen["drafts"] = counter.proposed - proposed, counter.accepted - accepted
        moved = {name: tensor * 1.5 if "norm" in name else tensor for name, tensor in tensors.items()}
        engine.sleep()
        _awake(engine, moved, 2)
        plain = TransformersEngine(shape, torch.float32, torch.device("cpu"), 64, WINDOW, VALID)
        _awake(plain, moved, 2)
        seen["moved"] = engine.generate(PROMPTS, GREEDY, 0), plain.generate(PROMPTS, GREEDY, 0)
        engine.sleep()
        _awake(engine, tensors, 3)
        _accept_all_drafts()
        seen["all accepted"] = [r.response_ids for r in engine.generate(PROMPTS[:1], COUNTED, 0)]
    world.barrier()
    engine.close()
    return seen


def _accept_all_drafts() -> None:
    """Break vLLM's sampler: every draft token is accepted, as if the uniform random numbers were 0."""
    from vllm.v1.sample import rejection_sampler

    uniform = rejection_sampler.generate_uniform_probs
    rejection_sampler.generate_uniform_probs = lambda *args, **kwargs: uniform(*args, **kwargs).zero_()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "m", "qwen3", True, seed=3)


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    if torch.cuda.is_available():
        pytest.skip("compares bits of vLLM on CPU")
    return dict(run_ranks(1, _generate, folder, 1)[0])


def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _logprobs(model: Any, prompt: tuple[int, ...], response: tuple[int, ...], sampling: Sampling) -> Tensor:
    """Return the log-probs of the processed distribution at each position of the response, [tokens, ids]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return processed_logprobs(logits, sampling, VALID)[:, :VALID]


def _p_value(model: Any, responses: list[tuple[int, ...]]) -> float:
    """Return the p-value of Pearson's chi-square test of the responses against their exact distribution.

    The distribution is computed with transformers. Cells with fewer than 5 expected responses form one cell.
    """
    counts, total = Counter(responses), len(responses)
    prompt = PROMPTS[0].student_ids
    possible = list(itertools.product(range(VALID), repeat=COUNTED.max_new_tokens))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids for ids in possible])).logits[:, len(prompt) - 1 : -1]
    logprobs = (logits[..., :VALID].double() / COUNTED.temperature).log_softmax(-1)
    sums = logprobs.gather(2, torch.tensor(possible)[..., None])[..., 0].sum(1)
    cells, rest = [], [0.0, 0.0]
    for ids, expected in zip(possible, (total * sums.exp()).tolist(), strict=True):
        if expected >= 5:
            cells.append((expected, counts[ids]))
        else:
            rest = [rest[0] + expected, rest[1] + counts[ids]]
    cells.append((rest[0], int(rest[1])))
    assert abs(sum(expected for expected, _ in cells) - total) < 1e-3 * total
    statistic = sum((found - expected) ** 2 / expected for expected, found in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.slow
def test_speculation_does_not_change_the_distribution_of_responses(folder: Path, seen) -> None:
    proposed, accepted = seen["drafts"]
    assert 500 < accepted < proposed - 500, "too few drafts were accepted or rejected"
    model = _model(folder)
    assert _p_value(model, seen["counted"]) > RARE
    assert _p_value(model, seen["all accepted"]) < RARE, "the test does not find a wrong distribution"


@pytest.mark.slow
def test_log_probs_with_speculation_are_those_of_the_sampled_distribution(folder: Path, seen) -> None:
    model = _model(folder)
    for name, sampling in (("sampled", SAMPLED), ("nucleus", NUCLEUS)):
        for rollout in seen[name]:
            expected = _logprobs(model, rollout.prompt.student_ids, rollout.response_ids, sampling)
            expected = expected.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
            assert (expected - torch.tensor(rollout.logprobs)).abs().max() < 1e-4


@pytest.mark.slow
def test_responses_with_speculation_repeat_and_do_not_depend_on_the_batch(seen) -> None:
    assert seen["again"] == seen["separately"] == seen["sampled"]


@pytest.mark.slow
def test_responses_with_speculation_end_at_a_stop_token_or_the_limit(seen) -> None:
    assert {r.finish for r in seen["sampled"]} == {"stop", "length"}
    for r in seen["sampled"]:
        assert (4 in r.response_ids) == (r.finish == "stop") and 4 not in r.response_ids[:-1]
        assert len(r.response_ids) == 40 or r.finish == "stop"


def _ids(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [r.response_ids for r in rollouts]


@pytest.mark.slow
def test_greedy_responses_are_the_same_with_speculation_also_after_a_sync(folder: Path, seen) -> None:
    ours, plain = seen["moved"]
    assert _ids(ours) == _ids(plain) != _ids(seen["greedy"])
    model = _model(folder)
    for rollout in seen["greedy"]:
        best = _logprobs(model, rollout.prompt.student_ids, rollout.response_ids, SAMPLED).argmax(1)
        assert tuple(best.tolist()) == rollout.response_ids


@pytest.mark.slow
def test_an_engine_of_two_ranks_speculates_as_one_rank(folder: Path, seen) -> None:
    ranks = run_ranks(2, _generate, folder, 2)
    for name in ("greedy", "sampled", "nucleus"):
        found = sorted((r for rank in ranks for r in rank[name]), key=lambda r: (r.prompt.prompt_id, r.response_index))
        assert _ids(found) == _ids(seen[name])


def test_the_corrected_function_repeats_each_responses_value() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert expand_batch_to_tokens(torch.tensor([0.5, 0.7, 0.0]), ends, 5, 0, 1).tolist() == [0.5, 0.5, 1, 1, 1]
    top_k = expand_batch_to_tokens(torch.tensor([3, 4, 0], dtype=torch.int32), ends, 5)
    assert top_k.dtype == torch.int32 and top_k.tolist() == [3, 3, 0, 0, 0]


def test_a_gpu_uses_the_method_that_keeps_asynchronous_scheduling() -> None:
    from typing import get_args

    from vllm.config.speculative import NgramGPUTypes
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    method = speculation_arguments(on_cpu=False)["speculative_config"]["method"]
    assert method in get_args(NgramGPUTypes) and ExecutorWithExternalLauncher.supports_async_scheduling()


@pytest.mark.parametrize(
    ("version", "on_cpu", "accepted"),
    [
        ("0.32.0", True, True),
        ("0.31.2", True, False),
        ("0.33.0", True, False),
        ("0.1.dev1", True, False),
        ("0.32.1", False, True),
        ("0.33.0", False, True),
        ("0.31.0", False, False),
    ],
)
def test_speculation_of_other_releases_of_vllm_is_refused(version: str, on_cpu: bool, accepted: bool) -> None:
    installed = InstalledVllm("vllm", version)
    if accepted:
        check_speculation(installed, on_cpu)
        return
    with pytest.raises(UserError) as caught:
        check_speculation(installed, on_cpu)
    assert (caught.value.key, caught.value.value) == (KEY, "ngram")


def _config(tmp_path: Path, *overrides: str) -> Config:
    folder = save_tiny_model(tmp_path / "m")
    return config_for(folder, folder, "distillation.allow_degenerate=true", f"{KEY}=ngram", *overrides)


def test_speculation_requires_vllm(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _config(tmp_path, "policy.generation.backend=transformers")
    assert (caught.value.key, caught.value.value) == (KEY, "ngram")


def test_with_speculation_vllm_chooses_the_sizes_of_cuda_graphs(tmp_path: Path) -> None:
    config = _config(tmp_path, "policy.generation.backend=vllm", "distillation.num_prompts_per_step=704")
    assert "max_cudagraph_capture_size" not in batch_arguments(config, 1)


@pytest.mark.parametrize("argument", ["speculative_config", "spec_method", "spec_model", "spec_tokens"])
def test_speculation_by_vllm_kwargs_is_refused(tmp_path: Path, argument: str) -> None:
    from distill.rollout.factory import _check_arguments

    with pytest.raises(UserError) as caught:
        _check_arguments({argument: "ngram"})
    assert caught.value.key == f"policy.generation.vllm_kwargs.{argument}" and KEY in caught.value.fix
