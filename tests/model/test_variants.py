"""Logits of all variants of a checkpoint equal those of ``from_pretrained``: teacher, student and engine.

tests/rollout/test_vllm.py compares those of vLLM.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig, view_of
from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.memory.shapes import shape_of
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.sharded import ShardedLM, Sharding, load_sharded
from distill.model.teacher_check import plain_logits
from distill.rollout.engine import Engine
from distill.rollout.factory import vllm_config_overrides
from distill.rollout.transformers_engine import TransformersEngine
from distill.rollout.vllm_config import check_vllm_config
from distill.types import Problem, Prompt, Sampling
from tests.harness import CompleteWeights, Step, config_for, differences, fixed_rollouts, plain_step, sharded_step
from tests.helpers import run_ranks
from tests.variants import (
    NOT_IN_VLLM,
    REFUSED,
    TENSOR_PARALLEL,
    VARIANTS,
    Variant,
    save_variant,
)

KEY = "policy.model_name"
WINDOW = 96
VOCAB = 384
TOKENS = list(range(5, 70))  # longer than every window and every original length in the table
PACK = [(tuple(TOKENS[:3]), tuple(TOKENS[3:])), ((11,), (13, 14, 15, 16)), ((1, 2), (3,))]
SAMPLING = Sampling(temperature=1.0, max_new_tokens=16, stop_token_ids=())


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def _logits(plain: Any, ids: list[int]) -> Tensor:
    logits: Tensor = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _logprobs(plain: Any, ids: list[int]) -> Tensor:
    return _logits(plain, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def sharded(files: ModelFiles, world: World, trainable: bool) -> ShardedLM:
    sharding = Sharding(world.shard_mesh)
    return load_sharded(files, KEY, world, sharding, torch.float32, torch.float32, trainable)


@torch.no_grad()
def _packed_difference(model: ShardedLM, plain: Any) -> float:
    expected = [_logits(plain, [*prefix, *response])[len(prefix) - 1 : -1] for prefix, response in PACK]
    found = model(view_of(PACK), lambda hidden, head: hidden @ head.t())
    model.reshard_all()
    return float((found - torch.cat(expected)).abs().max())


def engine_difference(engine: Engine, model: ShardedLM, plain: Any) -> float:
    """Return the difference of the log-probs of given and of generated tokens, after a sync of the weights."""
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p.data for n, p in model.named_hf_parameters()}
    engine.wake("weights")
    engine.sync(CompleteWeights(weights.items()), 0)
    engine.wake("kv")
    given = (torch.tensor(engine.probe(TOKENS)) - _logprobs(plain, TOKENS)).abs().max()
    found = engine.generate([Prompt(0, tuple(TOKENS[:20]), Problem("p"))], SAMPLING, 0)
    if not found:  # another rank of this engine returns the response
        return float(given)
    response = found[0].response_ids
    expected = _logprobs(plain, [*TOKENS[:20], *response])[19:]
    return float(torch.maximum(given, (torch.tensor(found[0].logprobs) - expected).abs().max()))


def _differences(folder: Path, world: World) -> dict[str, float]:
    plain, files = plain_model(folder), find_model(str(folder), KEY)
    config = model_config(files, KEY)
    teacher, student = (sharded(files, world, trainable) for trainable in (False, True))
    streamed = plain_logits(files, config, [TOKENS], torch.float32, torch.device("cpu"))[0]
    engine = TransformersEngine(config, torch.float32, torch.device("cpu"), 8, WINDOW, VOCAB)
    return {
        "teacher": _packed_difference(teacher, plain),
        "student": _packed_difference(student, plain),
        "plain model": float((streamed - _logits(plain, TOKENS)).abs().max()),
        "transformers engine": engine_difference(engine, student, plain),
    }


def _all_differences(root: Path) -> dict[str, dict[str, float]]:
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    found: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        try:
            found[name] = _differences(root / name, world)
        except Exception as error:  # only the test of this variant fails
            found[name] = {f"{type(error).__name__}: {error}": math.inf}
    world.close()
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    root = tmp_path_factory.mktemp("variants")
    for name, variant in VARIANTS.items():
        save_variant(root / name, variant)
    return dict(run_ranks(1, _all_differences, root)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_a_variant_equal_those_of_from_pretrained(measured, name) -> None:
    assert all(value < 1e-5 for value in measured[name].values()), measured[name]


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_variant_is_refused(tmp_path: Path, name: str) -> None:
    variant, *named = REFUSED[name]
    files = find_model(str(save_variant(tmp_path / "m", variant)), KEY)
    with pytest.raises(UserError) as refused:
        model_config(files, KEY)
    assert (refused.value.key, refused.value.value) == (KEY, files.name)
    assert all(part in str(refused.value) for part in named), refused.value


@pytest.mark.parametrize(
    ("variant", "tied", "parameters", "warned"),
    [
        (Variant("llama", {"tie_word_embeddings": True}), True, 20, ""),
        (Variant("llama", {"tie_word_embeddings": True}, tensors="same head"), True, 20, ""),
        (Variant("llama", {"tie_word_embeddings": True}, tensors="other head"), False, 21, "lm_head.weight differs"),
        (Variant("gemma3_text", tensors="other head"), False, 29, "lm_head.weight differs"),
        (Variant("llama"), False, 21, ""),
    ],
)
def test_files_decide_whether_the_head_is_tied(tmp_path, caplog, variant, tied, parameters, warned) -> None:
    folder = save_variant(tmp_path / "m", variant)
    files = find_model(str(folder), KEY)
    with caplog.at_level(logging.WARNING):
        config = model_config(files, KEY)
        model_config(files, KEY)
    assert config.tie_word_embeddings == tied
    assert (shape_of(config, files.name).head == 0) == tied
    assert vllm_config_overrides(config)["tie_word_embeddings"] == tied
    messages = [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()]
    assert len(messages) == bool(warned), "logged once for two reads"
    assert all(warned in message for message in messages)
    plain = plain_model(folder)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert len(list(plain.parameters())) == parameters


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ({"sliding_window": None, "partial_rotary_factor": 1.0, "logits_scaling": 1, "my_note": "x"}, ""),
    ],
)
def test_a_setting_that_transformers_ignores_gives_a_warning(tmp_path, caplog, raw, named) -> None:
    folder = save_variant(tmp_path / "m", Variant("llama", raw=raw))
    with caplog.at_level(logging.WARNING):
        model_config(find_model(str(folder), KEY), KEY)
    messages = [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()]
    assert len(messages) == bool(named)
    assert all(f"{KEY}={folder}" in message and named in message for message in messages)


@pytest.mark.parametrize("name", NOT_IN_VLLM)
def test_a_setting_that_vllm_lacks_is_refused_for_vllm_only(tmp_path: Path, name: str) -> None:
    variant, named = NOT_IN_VLLM[name]
    config = model_config(find_model(str(save_variant(tmp_path / "m", variant)), KEY), KEY)
    with pytest.raises(UserError, match=r"set policy\.generation\.backend=transformers") as refused:
        check_vllm_config(config, WINDOW, KEY, "m")
    assert f"{KEY}=m has {named}" in str(refused.value)


def test_a_window_longer_than_all_sequences_is_accepted_for_vllm(tmp_path: Path) -> None:
    variant = NOT_IN_VLLM["qwen2 windows in some layers"][0]
    config = model_config(find_model(str(save_variant(tmp_path / "m", variant)), KEY), KEY)
    check_vllm_config(config, config.sliding_window, KEY, "m")


def _step_config(folder: Path, tp: int) -> Config:
    settings = ("loss_fn.outside_topk=bucket", f"policy.dtensor_cfg.tensor_parallel_size={tp}")
    window = [f"{model}.max_total_sequence_length=128" for model in ("policy", "teacher")]
    return config_for(folder / "student", folder / "teacher", *settings, *window, ranks=2)


def _tensor_parallel_steps(root: Path) -> dict[str, Step]:
    world = World()
    world.build_mesh("cpu", 2, 1)
    packing = PackingConfig(12, sequences=None, tokens=120)
    steps = {
        name: sharded_step(_step_config(root / name, 2), world, fixed_rollouts(), packing) for name in TENSOR_PARALLEL
    }
    world.close()
    return steps


@pytest.mark.slow
def test_gradients_of_biases_and_untied_heads_do_not_depend_on_tensor_parallelism(tmp_path: Path) -> None:
    for name, variant in TENSOR_PARALLEL.items():
        save_variant(tmp_path / name / "student", variant, seed=1)
        save_variant(tmp_path / name / "teacher", variant, seed=2)
    steps = run_ranks(2, _tensor_parallel_steps, tmp_path)[0]
    for name, step in steps.items():
        found = differences(step, plain_step(_step_config(tmp_path / name, 1), fixed_rollouts()))
        assert all(value < 1e-5 for value in found.values()), (name, found)
