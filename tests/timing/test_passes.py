"""Seconds of the passes of a step: hand-worked numbers, counted FLOPs, and an independent count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from distill.config import Config, LoraConfig
from distill.config.gpus import parse_gpu
from distill.config.lora_rules import KEY
from distill.memory.adapters import adapters_of
from distill.memory.shapes import ModelShape, find_shape, shape_of
from distill.model.hf_load import meta_model
from distill.model.lora import AdapterSwitch, add_adapters
from distill.timing.lengths import Lengths
from distill.timing.passes import (
    BACKWARD_BYTES,
    LayerTimes,
    Sequences,
    adapter_bytes,
    elementwise_bytes,
    gather_seconds,
    head_seconds,
    layer_times,
)
from distill.timing.rates import Rates, rates_of_gpu
from distill.timing.step import MERGE_BYTES, OPTIMIZER_BYTES, SYNC_PASSES, SYNC_TENSOR_S, StepTime, Workload
from tests.helpers import tiny_config
from tests.memory.test_forecast import recipe

UNIT = Rates("unit", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
INFINITE = float("inf")
FREE = Rates(
    "free", INFINITE, INFINITE, INFINITE, INFINITE, INFINITE, INFINITE, INFINITE, INFINITE, INFINITE, INFINITE, 0.0, 0.0
)
"""All operations take no time."""
ONLY_FLOPS = replace(UNIT, memory=INFINITE, elementwise=INFINITE)
"""One FLOP per second and free small operations, so seconds are FLOPs."""
TEN = Lengths(10, 0.0, 10)
"""All responses have ten tokens."""


def known(size: str) -> ModelShape:
    shape = find_shape(f"Qwen/Qwen3-{size}B", "policy.model_name")
    assert shape is not None
    return shape


def test_a_step_reads_its_prompts_and_responses() -> None:
    """Two responses of ten tokens to one prompt of six, computed once: 26 positions; pairs 18 and twice 60 + 50."""
    assert Sequences.of(TEN, 6, responses=2, prompts=1) == Sequences(26, 18 + 2 * 110, 20)
    assert Sequences.of(TEN, 6, responses=2, prompts=2) == Sequences(32, 2 * (18 + 110), 20)


def test_a_forward_and_backward_have_the_counted_flops() -> None:
    """Eager attention computes all n^2 pairs, and its backward computes four products in place of five."""
    config = tiny_config("qwen3", tied=False, heads=8, kv_heads=4, hidden=96, layers=3)
    model, shape, n = AutoModelForCausalLM.from_config(config, attn_implementation="eager"), None, 24
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=torch.zeros(1, n, dtype=torch.int64), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    shape = shape_of(config, "tiny")
    times = layer_times(shape, Sequences(n, n * n, n), ONLY_FLOPS, 1, 2, fused=True)
    one = head_seconds(shape, n, ONLY_FLOPS, 1, bytes_=0)
    assert forward.get_total_flops() == times.forward + one
    recomputed = 3 * 2 * n * n * 8 * shape.head_dim  # one product in each of three layers with eight heads
    assert backward.get_total_flops() == times.backward + 2 * one - recomputed


def test_a_forward_and_backward_of_adapters_have_the_counted_flops() -> None:
    """The input of the first layer needs no gradient: neither the products of q, k and v with W nor those with A."""
    config = tiny_config("qwen3", tied=False, heads=8, kv_heads=4, hidden=96, layers=3)
    model, shape, n = meta_model(config, "eager", torch.float32), shape_of(config, "tiny"), 24
    lora = LoraConfig(enabled=True, dim=4, exclude_modules=("o_proj",))
    add_adapters(model, lora, AdapterSwitch())
    model.to_empty(device="cpu")  # the values have no effect
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=torch.zeros(1, n, dtype=torch.int64), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    words = (f"{KEY}.enabled=true", f"{KEY}.dim=4", f"{KEY}.exclude_modules=[o_proj]")
    adapters = adapters_of(recipe("distillation_math.yaml", *words), shape, 1, 1)
    assert adapters is not None
    times = layer_times(shape, Sequences(n, n * n, n), ONLY_FLOPS, 1, 2, fused=True, adapters=adapters)
    one = head_seconds(shape, n, ONLY_FLOPS, 1, bytes_=0)
    assert forward.get_total_flops() == times.forward + one
    recomputed = 3 * 2 * n * n * 8 * shape.head_dim  # as above
    spared = 2 * n * 96 * ((8 + 2 * 4) * shape.head_dim + 3 * 4)
    assert backward.get_total_flops() == times.backward + one - recomputed - spared


def test_adapters_move_their_inputs_once_and_their_outputs_twice() -> None:
    shape, words = known("4"), (f"{KEY}.enabled=true", f"{KEY}.target_modules=[q_proj]")
    adapters = adapters_of(recipe("distillation_math.yaml", *words), shape, 1, 1)
    assert adapters is not None and adapter_bytes(adapters, 2) == 2 * 36 * (2560 + 2 * 4096)
    read, rates = Sequences(10, 0, 10), replace(UNIT, matmul=float("inf"))
    with_adapters, without = (layer_times(shape, read, rates, 2, 2, True, given) for given in (adapters, None))
    assert with_adapters.elementwise - without.elementwise == 5 * adapter_bytes(adapters, 2)


def test_small_operations_move_the_bytes_of_an_independent_count() -> None:
    """Counted per operation for Qwen3-4B in bfloat16: 604 KB a token and layer in transformers, 120 KB fused."""
    shape = known("4")
    assert elementwise_bytes(shape, 2, fused=False) == pytest.approx(604e3, rel=0.05)
    assert elementwise_bytes(shape, 2, fused=True) == pytest.approx(120e3, rel=0.05)
    times = layer_times(shape, Sequences(10, 0, 10), replace(UNIT, matmul=float("inf")), 2, 2, fused=True)
    assert times.forward == times.elementwise == 36 * 5 * elementwise_bytes(shape, 2, True)
    assert times.backward == BACKWARD_BYTES * times.forward


def test_the_head_computes_logits_in_float32_and_gradients_in_the_compute_dtype() -> None:
    """One row of a vocabulary of 151,936 and 2,560 hidden states, half of it on each of two ranks."""
    shape, rates = known("4"), replace(UNIT, wide_matmul=0.5, matmul=4.0, memory=2.0)
    product, logits = 2 * 2560 * 151_936 / 2, 151_936 / 2
    assert head_seconds(shape, 1, rates, 2, bytes_=6) == product / 0.5 + 3 * logits
    assert head_seconds(shape, 1, rates, 2, bytes_=6, wide=2, narrow=3) == product * (4 + 0.75) + 3 * logits


def test_a_loss_without_triton_moves_more_bytes_per_logit() -> None:
    only_bytes = replace(FREE, memory=1.0)
    triton, torch_ = (
        step(f"loss_fn.backend={name}", "runtime.fused_layers=true", rates=only_bytes) for name in ("triton", "torch")
    )
    logits = triton.read.rows / 8 * triton.student.vocab
    assert torch_.student_seconds() - triton.student_seconds() == pytest.approx((62 - 18) * logits)
    assert torch_.teacher_seconds() - triton.teacher_seconds() == pytest.approx((84 - 8) * logits)


def test_recomputation_adds_the_forward_or_its_small_operations() -> None:
    times = LayerTimes(forward=4.0, elementwise=1.0, backward=9.0)
    assert [times.training(mode) for mode in ("none", "selective", "full")] == [13, 14, 17]


def test_a_gather_is_limited_by_links_or_by_the_network() -> None:
    """Four ranks on two nodes: three quarters over the links, or half over the two cards of a node."""
    slow_links, slow_network = replace(UNIT, network=8.0), replace(UNIT, link=8.0)
    assert gather_seconds(800, 4, 2, slow_links) == 600 and gather_seconds(800, 4, 2, slow_network) == 200
    assert gather_seconds(800, 4, 4, slow_network) == 75 and gather_seconds(800, 1, 4, UNIT) == 0


def step(*overrides: str, size: str = "4", teacher: str = "32", rates: Rates | None = None, tokens: float = 3000):
    """Return the times of one node with eight H100, with responses of about ``tokens`` tokens."""
    words = [
        f"policy.model_name=Qwen/Qwen3-{size}B",
        f"teacher.model_name=Qwen/Qwen3-{teacher}B",
        *(f"{owner}.dtensor_cfg.{kind}_parallel_size=1" for owner in ("policy", "teacher") for kind in PARALLEL),
        "policy.generation.vllm_cfg.tensor_parallel_size=1",
        "policy.dtensor_cfg.activation_checkpointing=true",
        "policy.train_global_batch_size=64",
        "distillation.num_prompts_per_step=64",
        "cluster.gpus_per_node=8",
        "cluster.num_nodes=1",
        "distillation.allow_degenerate=true",
        *overrides,
    ]
    config: Config = recipe("distillation_math.yaml", *words)
    workload = Workload(Lengths(tokens, 0.0, 8192), 300, 300)
    return StepTime(config, known(size), known(teacher), rates or rates_of_gpu(parse_gpu("h100")), workload, True)


PARALLEL = ("tensor", "context")


@pytest.mark.parametrize(
    ("fused", "checkpointing", "student", "teacher"),
    [(False, True, 2.8, 3.9), (True, True, 2.0, 3.3), (True, False, 1.5, 3.3)],
)
def test_a_step_of_4b_from_32b_takes_the_seconds_of_an_independent_count(
    fused: bool, checkpointing: bool, student: float, teacher: float
) -> None:
    """Each operation of fake training steps was counted and rated for eight H100, without copies of the teacher."""
    found = step(
        f"runtime.fused_layers={fused}", f"policy.dtensor_cfg.activation_checkpointing={checkpointing}".lower()
    )
    copied = found.memory.teacher_shards / found.rates.host
    assert found.student_seconds() == pytest.approx(student, rel=0.12)
    assert found.teacher_seconds() - copied == pytest.approx(teacher, rel=0.12)


def test_the_optimizer_moves_its_bytes_once_per_optimizer_step() -> None:
    one, four = step(rates=UNIT), step("policy.train_global_batch_size=16", rates=UNIT)
    shard = one.memory.weights.shard
    assert one.optimizer_seconds() == (OPTIMIZER_BYTES + 16) * shard
    assert four.optimizer_seconds() == (4 * OPTIMIZER_BYTES + 16) * shard
    kept = step("runtime.offload_optimizer=false", rates=UNIT)
    assert kept.optimizer_seconds() == OPTIMIZER_BYTES * shard


def test_an_optimizer_on_the_host_uses_host_memory_and_the_gradients_pcie() -> None:
    """64 responses in two optimizer batches of two micro-batches each, on eight ranks; 3 bytes/s of PCIe, 5 of memory.

    Each micro-batch copies float32 weights once per gather (forward and backward) and float32 gradients back, and the
    second micro-batch of each optimizer batch adds its gradients to those of the first: 12 bytes.
    """
    words = ("policy.dtensor_cfg.cpu_offload=true", "policy.train_global_batch_size=32")
    found = step(*words, rates=replace(FREE, host=3.0, host_memory=5.0))
    shard = found.memory.weights.shard
    assert found.micro_batches() == 4 and found.memory.optimizer_batches == 2
    assert found.optimizer_seconds() == 2 * 40 * shard / 5
    copies = 4 * 2 * 4 * shard / 3
    assert found.student_seconds() == pytest.approx(copies + 4 * 4 * shard / 3 + 2 * 12 * shard / 5)
    kept = step(*words, "policy.dtensor_cfg.reshard_after_forward=false", rates=found.rates)
    assert found.student_seconds() - kept.student_seconds() == pytest.approx(copies / 2)
    assert found.sync_seconds() - step(words[1], rates=FREE).sync_seconds() == pytest.approx(4 * shard / 3)


LORA = (
    f"{KEY}.enabled=true",
    f"{KEY}.dim=16",
    "teacher.model_name=Qwen/Qwen3-4B",
    "distillation.context_distillation.enabled=true",
)


def test_a_teacher_in_the_students_module_copies_no_shards_and_the_optimizer_moves_only_adapters() -> None:
    own, shared = step(*LORA[2:], teacher="4", rates=UNIT), step(*LORA, teacher="4", rates=UNIT)
    copied = 2 * 4_022_468_096 // 8
    assert own.teacher_seconds() - shared.teacher_seconds() == pytest.approx(copied, rel=1e-3)
    adapters = shared.memory.weights.adapters
    assert adapters is not None and shared.optimizer_seconds() == (OPTIMIZER_BYTES + 16) * adapters.shard
    live = step(*LORA, "distillation.context_distillation.mode=self_live", teacher="4", rates=UNIT)
    assert live.teacher_seconds() > shared.teacher_seconds(), "its adapters are on"
    merged = shared.sync_seconds() - own.sync_seconds()
    assert merged == pytest.approx(MERGE_BYTES * 4_022_468_096 / 8, rel=1e-3)


def test_a_step_of_adapters_has_no_gradients_of_weights() -> None:
    """Seconds of FLOPs: 4 in place of 6 per parameter of the layers, 2 products of the head in place of 3."""
    full, lora = (step(*words, teacher="4", rates=replace(ONLY_FLOPS, link=1e30)) for words in (LORA[2:], LORA))
    shape, positions, rows = full.student, full.read.positions / 8, full.read.rows / 8
    adapters = lora.memory.weights.adapters
    assert adapters is not None
    matrices = shape.layers * (shape.layer - sum(size[0] for size in shape.layer_tensors if len(size) == 1))
    less = 2 * matrices * positions + 2 * shape.hidden * shape.vocab * rows
    recomputed_too = 4 * 2 * adapters.parameters * positions
    assert full.student_seconds() - lora.student_seconds() == pytest.approx(less - recomputed_too, rel=1e-6)


def test_a_sync_gathers_the_weights_and_copies_them() -> None:
    found = step(rates=UNIT)
    size = 2 * found.student.parameters
    fixed = found.sync_seconds() - size * 7 / 8 - SYNC_PASSES * size
    assert fixed == pytest.approx((36 * 11 + 3) * SYNC_TENSOR_S + 0.4, rel=0.1)


def test_weights_are_gathered_once_per_micro_batch_and_hidden_behind_arithmetic() -> None:
    """With slow links the student takes as long as its gathers: bfloat16 weights twice, and float32 gradients."""
    slow = replace(rates_of_gpu(parse_gpu("h100")), link=1e9)
    found = step(rates=slow)
    batches = found.micro_batches()
    assert batches == 4  # 64 * 3300 tokens on eight ranks, in micro-batches of 8192
    weights = found.student.parameters
    head = found.student_seconds() - batches * (2 * 2 + 4) * weights * 7 / 8 / 1e9
    assert 0 < head < 0.5
    stays = step("policy.dtensor_cfg.reshard_after_forward=false", rates=slow)
    saved = found.student_seconds() - stays.student_seconds()
    assert saved == pytest.approx(batches * 2 * weights * 7 / 8 / 1e9)


def test_parallel_ranks_share_the_work_and_pay_for_their_exchange() -> None:
    plain = step("policy.sequence_packing.enabled=false")
    tensor = step("policy.dtensor_cfg.tensor_parallel_size=2")
    context = step("policy.dtensor_cfg.context_parallel_size=2")
    assert plain.student_seconds() < context.student_seconds() < tensor.student_seconds()


def test_micro_batches_without_a_budget_count_responses() -> None:
    found = step("policy.sequence_packing.enabled=false", "policy.dynamic_batching.enabled=false")
    assert found.micro_batches() == 8


@pytest.mark.parametrize(("teacher_prompt", "expected"), [(30, 4), (300, 4), (3000, 6), (30_000, 8)])
def test_a_token_budget_counts_each_response_with_the_longer_prompt(teacher_prompt: float, expected: int) -> None:
    """Each rank has eight responses of 3,000 tokens with prompts of 300 for the student; the budget is 8,192."""
    for words in ((), ("distillation.num_prompts_per_step=8", "distillation.num_generations_per_prompt=8")):
        found = step(*words)
        workload = replace(found.workload, teacher_prompt=teacher_prompt)
        changed = StepTime(found.config, found.student, found.teacher, found.rates, workload, True)
        assert changed.micro_batches() == expected


@pytest.mark.parametrize(
    ("words", "prompts"), [(("trace_source=static_dataset", "static_trace.answer_column=trace"), 8), ((), 64)]
)
def test_the_teacher_reads_a_prompt_once_unless_it_contains_a_trace_of_the_response(
    words: Sequence[str], prompts: int
) -> None:
    context = (f"distillation.context_distillation.{word}" for word in ("enabled=true", *words))
    several = ("distillation.num_prompts_per_step=8", "distillation.num_generations_per_prompt=8")
    found = step("teacher.model_name=Qwen/Qwen3-4B", *several, *context, teacher="4")
    assert found.taught.positions == prompts * 300 + 64 * 3000


def test_a_full_vocabulary_moves_the_teachers_head_to_the_student() -> None:
    topk, full = step(), step("distillation.topk_logits_k=0")
    assert full.teacher_seconds() < topk.teacher_seconds() and full.student_seconds() > topk.student_seconds()


def test_the_cache_of_an_engine_holds_all_responses_or_too_few() -> None:
    small, large = (step(f"cluster.gpu_memory_gb={size}", tokens=8000) for size in (40, 80))
    needed, room = small.cache_tokens()
    assert needed == 8 * 8300 and room is not None and large.cache_tokens()[1] > 2 * room
    share = int(0.6 * 40 * 2**30 * 0.98)
    assert room == pytest.approx((share - 2 * small.student.parameters) / (2 * 2 * 36 * 8 * 128), rel=1e-3)


def test_generation_uses_the_engines_and_responses_of_the_recipe() -> None:
    found = step("policy.generation.vllm_cfg.tensor_parallel_size=2", "distillation.num_generations_per_prompt=2")
    job = found.job()
    assert (job.engines, job.responses, job.per_prompt, job.prompt_tokens) == (4, 128, 2, 300)
    assert found.generation(None).seconds < step(size="8").generation(None).seconds * 2
    mixed = step("distillation.off_policy.share=0.5", "distillation.num_generations_per_prompt=2").job()
    assert (mixed.responses, mixed.per_prompt) == (64, 1)


def test_gathers_overlap_with_arithmetic_on_gpus_and_not_on_a_cpu() -> None:
    found = step(rates=replace(FREE, link=1.0))
    gathers = found.student_seconds()
    assert gathers > 0 == step(rates=FREE).student_seconds()
    busy = replace(FREE, link=1.0, matmul=1.0)
    arithmetic = step(rates=replace(busy, link=INFINITE, wide_matmul=INFINITE)).student_seconds()
    on_cpu = StepTime(found.config, found.student, found.teacher, busy, found.workload, False)
    head = head_seconds(found.student, found.read.rows, busy, 8, bytes_=0, wide=0, narrow=2)
    assert step(rates=busy).student_seconds() == pytest.approx(max(gathers, arithmetic - head) + head)
    assert on_cpu.student_seconds() == pytest.approx(gathers + arithmetic)
