"""Memory forecast of low-rank adapters, and of a teacher that is the student's module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.config import LoraConfig
from distill.config.lora_rules import KEY
from distill.errors import UserError
from distill.memory.adapters import Adapters, adapters_of
from distill.memory.forecast import PHASES, Forecast, known_shapes
from distill.memory.phases import StepMemory
from distill.memory.shapes import shape_of
from distill.model.hf_load import meta_model
from distill.model.lora import AdapterSwitch, add_adapters
from tests.helpers import tiny_config
from tests.memory.test_forecast import PUBLISHED, forecast, known, recipe

NAME = "qwen3-4b-context-self-distillation-4n4g.yaml"
MODE = "distillation.context_distillation.mode="
ON = (f"{KEY}.enabled=true", f"{KEY}.dim=16")


def adapters(*words: str, tp: int = 1, fsdp: int = 1) -> Adapters:
    """Return the adapters of Qwen3-4B: D = 2560, Q = 4096, K = 1024, I = 9728."""
    found = adapters_of(recipe(NAME, *ON, *words), known("Qwen/Qwen3-4B"), fsdp, tp)
    assert found is not None
    return found


def lora(*words: str) -> Forecast:
    return forecast(recipe(NAME, *ON, *words))


def test_adapters_of_all_layers_computed_by_hand() -> None:
    d, q, k, i = 2560, 4096, 1024, 9728
    sides = (d + q) + 2 * (d + k) + (q + d) + 2 * (d + i) + (i + d)
    found = adapters()
    assert (found.parameters, found.layer, found.products) == (36 * 16 * sides, 16 * sides, 7)
    assert found.outputs == 36 * (q + 2 * k + d + 2 * i + d)
    assert found.inputs == 36 * sides - found.outputs
    assert found.shard == found.parameters


def test_tensor_parallelism_splits_one_matrix_of_each_adapter() -> None:
    d, q, k, i = 2560, 4096, 1024, 9728
    # q, k, v, gate and up: B by its rows; o and down: A by its columns.
    half = (d + q // 2) + 2 * (d + k // 2) + (q // 2 + d) + 2 * (d + i // 2) + (i // 2 + d)
    assert adapters(tp=2).layer == 16 * half
    assert adapters(tp=2).parameters == adapters().parameters


def test_fsdp_splits_rows_and_a_has_only_as_many_rows_as_the_rank() -> None:
    one, query = f"{KEY}.target_modules=[q_proj]", 36 * 2560
    assert adapters(one, fsdp=8).shard == 2 * query + 36 * 4096 // 8 * 16
    assert adapters(one, fsdp=64).shard == query + 36 * 4096 // 64 * 16


def test_a_pattern_for_one_layer_counts_this_layer_as_the_largest() -> None:
    found = adapters(f"{KEY}.target_modules=['model.layers.3.self_attn.q_proj', 'v_proj']")
    assert found.parameters == 16 * (2560 + 4096) + 36 * 16 * (2560 + 1024)
    assert (found.layer, found.products) == (16 * (2560 + 4096 + 2560 + 1024), 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_adapters_have_the_parameters_of_the_model_that_is_trained(family: str) -> None:
    config = tiny_config(family, True, layers=2)
    settings = LoraConfig(enabled=True, dim=3, exclude_modules=("*.1.mlp.*",))
    model = meta_model(config, "eager", torch.bfloat16)
    add_adapters(model, settings, AdapterSwitch())
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    words = (f"{KEY}.enabled=true", f"{KEY}.dim=3", f"{KEY}.exclude_modules=['*.1.mlp.*']")
    found = adapters_of(recipe(NAME, *words), shape_of(config, family), 1, 1)
    assert found is not None and sorted(found.shards) == sorted(trained)
    assert found.parameters == sum(trained)


def test_the_frozen_weights_have_two_bytes_and_the_teacher_needs_none() -> None:
    full, found = forecast(recipe(NAME)), lora()
    assert adapters_of(recipe(NAME), known("Qwen/Qwen3-4B"), 1, 1) is None
    for phase in PHASES:
        lines, before = found.phases[phase], full.phases[phase]
        assert lines["frozen weights"] == before["master weights"] // 2
        assert lines["adapters"] == 4 * adapters(fsdp=16).shard
        assert not {"master weights", "teacher copy"} & lines.keys() and lines.get("teacher shards", 0) == 0
    training = found.trainer["training"]
    assert training["gradients"] in (0, training["adapters"]) and training["optimizer state"] == 0
    assert found.host["teacher shards"] == 0
    assert found.host["pending checkpoint"] == 3 * training["adapters"]
    assert full.host["teacher shards"] > 0


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        ([f"{MODE}self_live"], False),
        ([f"{MODE}self_ema"], True),
        ([f"{MODE}self_periodic"], True),
        ([f"{KEY}.init_from=models"], True),  # the model before training has the given adapters
    ],
)
def test_a_teacher_with_its_own_adapters_stores_only_these(words: list[str], stored: bool) -> None:
    found = lora(*words)
    for phase in PHASES:
        assert found.phases[phase].get("teacher copy", 0) == stored * found.phases[phase]["adapters"]
    assert found.phases["teacher"].get("exchanged adapters", 0) == stored * found.phases["teacher"]["adapters"]
    assert found.host["pending checkpoint"] == (3 + stored) * found.phases["teacher"]["adapters"]


def test_another_teacher_is_sharded_as_without_adapters() -> None:
    words = (f"{MODE}frozen", "teacher.model_name=Qwen/Qwen3-8B")
    full, found = forecast(recipe(NAME, *words)), lora(*words)
    for line in ("teacher shards", "gathered layers", "teacher workspace", "logits chunk"):
        assert found.trainer["teacher"].get(line) == full.trainer["teacher"].get(line)
    assert found.host["teacher shards"] == full.host["teacher shards"]


def phase_tables(*words: str) -> list[dict[str, int]]:
    config = recipe(NAME, *words)
    shapes = known_shapes(config)
    assert shapes[0] is not None and shapes[1] is not None
    return StepMemory(config, shapes[0], shapes[1], True, None).teacher_phase()


def test_a_teacher_that_is_the_students_module_is_split_as_the_student() -> None:
    """Qwen3-4B with tp 2 and cp 2: half of the weights and of the vocabulary, and positions of the two cp ranks."""
    tp = "policy.dtensor_cfg.tensor_parallel_size=2"
    own, shared = phase_tables(tp), phase_tables(tp, *ON)
    layer = adapters(tp=2).layer
    assert own[0]["gathered embeddings"] == 2 * shared[0]["gathered embeddings"]
    assert shared[2]["gathered layers"] == own[2]["gathered layers"] // 2 + 2 * 2 * layer
    assert shared[1]["teacher workspace"] == 2 * own[1]["teacher workspace"]
    assert shared[3]["logits chunk"] == own[3]["logits chunk"] // 2
    rows = phase_tables(tp, *ON, "distillation.topk_logits_k=0")[3]["targets"]
    head = 2 * 2560 * 151936 // 2
    assert phase_tables(tp, "distillation.topk_logits_k=0")[3]["targets"] == rows + head


def test_a_frozen_model_has_no_gradients_of_embedding_and_head() -> None:
    config = recipe(NAME, *ON, "policy.dtensor_cfg.activation_checkpointing=true")
    shape = known("Qwen/Qwen3-4B")
    tables = StepMemory(config, shape, shape, True, None).training_phase()
    assert all(table.get("embedding gradients", 0) == 0 for table in tables)
    assert tables[2]["gradient reduction"] == (2 + 4) * adapters().layer
    saved = [StepMemory(recipe(NAME, *words), shape, shape, True, None).training_phase()[1] for words in (ON, ())]
    assert saved[0]["saved activations"] == saved[1]["saved activations"], "full recomputation keeps the layers' inputs"


@pytest.mark.parametrize(
    ("mode", "channels"), [("true", 0), ("selective", 7 * 16), ("false", 7 * 16)], ids=["full", "selective", "none"]
)
def test_adapters_keep_their_intermediate_results(mode: str, channels: int) -> None:
    fixed, shape = f"policy.dtensor_cfg.activation_checkpointing={mode}", known("Qwen/Qwen3-4B")
    tables = [StepMemory(recipe(NAME, fixed, *words), shape, shape, True, None) for words in (ON, ())]
    positions = -(-tables[0].tokens // 2)
    more, less = (memory.training_phase()[1]["saved activations"] for memory in tables)
    assert more - less == positions * 36 * 2 * channels


def test_patterns_without_a_layer_are_refused_without_the_models_files() -> None:
    with pytest.raises(UserError) as refused:
        known_shapes(recipe(NAME, *ON, f"{KEY}.target_modules=[embed_tokens]"))
    assert refused.value.key == f"{KEY}.target_modules"


def test_with_cpu_offload_each_shard_of_an_adapter_has_a_pinned_block_of_a_power_of_two() -> None:
    """Query adapters of 36 layers on 16 ranks: one row of A, 2560 * 4 bytes, and 256 rows of B, 4096 * 4 bytes."""
    offload = "policy.dtensor_cfg.cpu_offload=true"
    found, full = lora(f"{KEY}.target_modules=[q_proj]", offload).host, forecast(recipe(NAME, offload)).host
    assert found["adapters"] == found["gradients"] == 36 * (2**14 + 2**14)
    assert found["frozen weights"] == full["master weights"] // 2, "the same tensors with half of the bytes"


def test_adamw_for_each_tensor_needs_two_temporaries_of_the_largest_shard_of_an_adapter() -> None:
    kwargs = "policy.optimizer.kwargs."
    config = recipe(NAME, *ON, f"{KEY}.target_modules=[q_proj]", f"{kwargs}fused=false", f"{kwargs}foreach=false")
    shape = known("Qwen/Qwen3-4B")
    optimizer = StepMemory(config, shape, shape, True, None).training_phase()[-1]
    assert optimizer["optimizer temporaries"] == 2 * 4 * (4096 // 16 * 16)


@pytest.mark.parametrize(("words", "text"), [((), "adapters"), ((f"{KEY}.enabled=false",), "teacher micro-batches")])
def test_the_dry_run_describes_adapters_and_the_teacher(words: Any, text: str) -> None:
    lines = "\n".join(lora(*words).about)
    assert text in lines and ("teacher Qwen" in lines) == bool(words)


def test_the_published_parameters_are_frozen() -> None:
    found = forecast(recipe("qwen3-8b-context-self-distillation-lora-1n1g.yaml"))
    assert found.phases["training"]["frozen weights"] == 2 * PUBLISHED["8"]
