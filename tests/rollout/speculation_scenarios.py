"""Scenarios of n-gram speculation on vLLM's CPU engine, and the oracles that their results are compared with."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.distributed.world import World
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.rollout.requests import requests_of
from distill.rollout.transformers_engine import TransformersEngine
from distill.rollout.vllm_engine import VllmEngine
from distill.rollout.vllm_env import prepare_for_vllm
from distill.rollout.vllm_speculation import speculation_arguments
from distill.types import Problem, Prompt, Sampling
from scripts.bench_speculation import DraftCounter
from tests.harness import CompleteWeights
from tests.rollout.segment_scenarios import STEP, FixedCutoff, segment_scenarios

WINDOW = 128
VALID = 5
"""Number of valid token ids: with so few, responses repeat n-grams. The model has more ids, which are padding."""
LIMITS = {"max_num_batched_tokens": 4 * WINDOW, "max_num_seqs": WINDOW}
PROMPTS = [Prompt(i, ids, Problem("p")) for i, ids in enumerate([(0, 1, 2, 0, 1, 2, 0, 1), (3,), (4, 4, 4, 4), (1, 0)])]
GREEDY = Sampling(temperature=0.0, max_new_tokens=40, stop_token_ids=())
SAMPLED = Sampling(temperature=0.7, max_new_tokens=40, stop_token_ids=(4,), responses_per_prompt=4)
NUCLEUS = replace(SAMPLED, top_p=0.9, top_k=3, stop_token_ids=())
COUNTED = Sampling(temperature=1.5, max_new_tokens=4, stop_token_ids=(), responses_per_prompt=1500)
"""Sampling of the statistical test, which counts the responses of four tokens to the first prompt."""
WRONG = replace(COUNTED, responses_per_prompt=500)
"""Sampling with which the statistical test must find a wrong distribution."""
RARE = 1e-4
"""False-positive rate: for this share of all choices of seeds, the test would fail without a fault."""
LIMITED = [replace(prompt, max_new_tokens=most) for prompt, most in zip(PROMPTS, (60, 9, 30, 19), strict=True)]
"""Prompts of the scenarios of segments: the limits decide which segments end before the cut."""
CUT = replace(SAMPLED, max_new_tokens=60, stop_token_ids=(), responses_per_prompt=3)
CUT_GREEDY = replace(GREEDY, max_new_tokens=60)


def awake(engine: Any, tensors: dict[str, Tensor], version: int) -> None:
    """Load the tensors into a sleeping engine and make it ready to generate."""
    engine.wake("weights")
    engine.sync(CompleteWeights(tensors.items()), version)
    engine.wake("kv")


def speculation_scenarios(folder: Path, tp: int) -> dict[str, Any]:
    """Run all scenarios on one engine of ``tp`` ranks; the last one breaks the sampler in this process."""
    world = World()
    prepare_for_vllm(dist.get_rank(), dist.get_world_size(), dist.get_rank())
    files = find_model(str(folder), "a model")
    shape = model_config(files, "a model")
    manifest = manifest_of(meta_model(shape, "eager", torch.float32))
    arguments = {**LIMITS, **speculation_arguments(on_cpu=True)}
    engine = VllmEngine(str(folder), manifest, torch.float32, WINDOW, VALID, tp, arguments)
    tensors = {name: files.tensor(name) for name in files.files}
    awake(engine, tensors, 1)
    seen: dict[str, Any] = {
        "folder": folder,
        "greedy": engine.generate(PROMPTS, GREEDY, 0),
        "sampled": engine.generate(PROMPTS, SAMPLED, 0),
        "cut": engine.segments(requests_of(LIMITED, CUT, STEP, WINDOW), CUT, FixedCutoff(7)),
    }
    if tp == 1:
        seen |= _of_one_rank(engine, shape, tensors)
    world.barrier()
    engine.close()
    return seen


def _of_one_rank(engine: VllmEngine, shape: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    seen: dict[str, Any] = {
        "sampled segments": segment_scenarios(engine, CUT, 6, prompts=LIMITED),
        "greedy segments": segment_scenarios(engine, CUT_GREEDY, 2, prompts=LIMITED),
        "again": engine.generate(PROMPTS, SAMPLED, 0),
        "nucleus": engine.generate(PROMPTS, NUCLEUS, 0),
    }
    seen["separately"] = [r for prompt in PROMPTS for r in engine.generate([prompt], SAMPLED, 0)]
    limited = requests_of(LIMITED, CUT, STEP, WINDOW)
    seen["cut late"] = [engine.segments(limited, CUT, FixedCutoff(7, reads)) for reads in (2, 4)]
    counter = DraftCounter(engine)
    seen["counted"] = [r.response_ids for r in engine.generate(PROMPTS[:1], COUNTED, 0)]
    seen["drafts"] = counter.proposed, counter.accepted
    moved = {name: tensor * 1.5 if "norm" in name else tensor for name, tensor in tensors.items()}
    engine.sleep()
    awake(engine, moved, 2)
    plain = TransformersEngine(shape, torch.float32, torch.device("cpu"), 64, WINDOW, VALID)
    awake(plain, moved, 2)
    seen["moved"] = engine.generate(PROMPTS, GREEDY, 0), plain.generate(PROMPTS, GREEDY, 0)
    engine.sleep()
    awake(engine, tensors, 3)
    _accept_all_drafts()
    seen["all accepted"] = [r.response_ids for r in engine.generate(PROMPTS[:1], WRONG, 0)]
    return seen


def _accept_all_drafts() -> None:
    """Break vLLM's sampler: every draft token is accepted, as if the uniform random numbers were 0."""
    from vllm.v1.sample import rejection_sampler

    uniform = rejection_sampler.generate_uniform_probs
    rejection_sampler.generate_uniform_probs = lambda *args, **kwargs: uniform(*args, **kwargs).zero_()


def logprobs_of(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """Return the log-probs at each position of the response, [tokens, ids]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits[:, :VALID].log_softmax(-1)


def p_value(model: Any, responses: list[tuple[int, ...]]) -> float:
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
