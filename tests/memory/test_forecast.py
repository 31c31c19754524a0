"""Model shapes, the memory forecast, and the UserErrors for layouts that a model does not support."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from distill.batching.plan import pack
from distill.config import Config, load_config
from distill.distributed.world import World
from distill.errors import UserError
from distill.loss.lm_head import Projection
from distill.memory.forecast import (
    GIB,
    PHASES,
    Forecast,
    plan_memory,
    predict,
)
from distill.memory.layers import backward_workspace, forward_workspace, kept_by_layer, saved_by_layer
from distill.memory.phases import StepMemory
from distill.memory.reserve import COMMUNICATOR, CONTEXT, CUBLAS, FRAGMENTATION, communicators, reserve
from distill.memory.shapes import QWEN3, ModelShape, _published, find_shape, shape_of
from distill.metrics.step import Metrics
from distill.model.attention import PACKED
from distill.model.hf_files import find_model
from distill.model.hf_load import causal_lm_parts, meta_model
from distill.model.student import Student
from distill.model.teacher import ShardedTeacher
from distill.model.teacher_check import verify_teacher
from distill.model.tensor_parallel import check_tensor_parallel
from distill.train import print_dry_run
from distill.types import OptimizerBatch, Problem, Prompt, Rollout
from scripts.live_bytes import LiveBytes
from tests.harness import REPO, config_for, fixed_rollouts, forecast_text
from tests.helpers import run_ranks, save_tiny_model, tiny_config

LARGE = "distillation-qwen3-32b-to-1.7b-base-1n8g-fsdp2tp1.v1.yaml"
LONG = "distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-long.v1.yaml"

PUBLISHED = {
    "0.6": 596_049_920,
    "1.7": 1_720_574_976,
    "4": 4_022_468_096,
    "8": 8_190_735_360,
    "14": 14_768_307_200,
    "32": 32_762_123_264,
}
"""Number of parameters of each Qwen3 model by size in billions; a tied head is counted once."""


Peaks = dict[bool, tuple[int, int, list[dict[str, int]], Forecast]]
Measured = tuple[Peaks, set[int]]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(["--config", str(REPO / "recipes" / name), *overrides])


def known(name: str) -> ModelShape:
    shape = find_shape(name, "policy.model_name")
    assert shape is not None
    return shape


def forecast(config: Config, **options: Any) -> Forecast:
    return predict(config, known(config.policy.model_name), known(config.teacher.model_name), **options)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _check_counts(shape: ModelShape, config: Any) -> None:
    """Compare the counts of ``shape`` with the parameters of the complete model."""
    model = meta_model(config, "eager", torch.bfloat16)
    layers: Any = causal_lm_parts(model)[0].layers
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert shape.parameters == sum(counts.values())
    assert shape.layers == len(layers)
    assert {sum(p.numel() for p in layer.parameters()) for layer in layers} == {shape.layer}
    assert shape.embedding == model.get_input_embeddings().weight.numel() == shape.vocab * shape.hidden
    assert shape.head == counts.get("lm_head.weight", 0)
    assert (shape.head == 0) == config.tie_word_embeddings


@pytest.mark.parametrize("size", QWEN3)
def test_published_shapes_have_the_parameters_of_transformers_models(size: str) -> None:
    shape = known(f"Qwen/Qwen3-{size}B")
    assert shape.parameters == PUBLISHED[size]
    assert (shape.kv_heads, shape.head_dim, shape.vocab, shape.window) == (8, 128, 151936, 40960)
    assert shape.qk_norm
    _check_counts(shape, _published(f"Qwen/Qwen3-{size}B"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_shape_of_counts_the_parameters_of_each_family(family: str, tied: bool) -> None:
    config = tiny_config(family, tied, layers=3)
    shape = shape_of(config, family)
    assert (shape.layers, config.num_hidden_layers, shape.qk_norm) == (3, 3, family == "qwen3")
    _check_counts(shape, config)


def test_a_models_files_take_precedence_over_the_published_shapes(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "Qwen3-4B", "qwen3")
    assert known(str(folder)).hidden == 64
    assert known(str(tmp_path / "elsewhere" / "Qwen3-4B-Base")).window == 32768
    assert find_shape("Qwen/Qwen3-5B", "x") is None
    assert find_shape("models/a/b", "x") is None


def test_dry_run_reports_an_unknown_model_without_an_error() -> None:
    config = recipe("my-distillation-1n4g.yaml", "teacher.model_name=someone/Model-7B", "cluster.gpu_memory_gb=1")
    assert "someone/Model-7B" in forecast_text(config)


# ---- activations -----------------------------------------------------------------------------------------------------


def _counted(family: str, grad: bool, checkpointed: bool = False) -> tuple[ModelShape, float, float]:
    """Return the shape of a layer, and its saved and peak bytes per position, measured with fake tensors."""
    kinds: dict[str, Any] = {"qwen3": (Qwen3Config, Qwen3DecoderLayer), "llama": (LlamaConfig, LlamaDecoderLayer)}
    make, layer_class = kinds[family]
    config = make(
        hidden_size=2560,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=64,
    )
    shape = shape_of(config, family)
    config._attn_implementation = "sdpa"
    positions, dtype = 2**16, torch.bfloat16  # so many that the weights' gradients are negligible
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            layer = layer_class(config, 0).requires_grad_(grad)
            hidden = torch.randn(1, positions, 2560, requires_grad=grad)
            angles = (torch.randn(1, positions, 128), torch.randn(1, positions, 128))
            above = torch.randn_like(hidden)
            with LiveBytes() as live, torch.set_grad_enabled(grad):
                run = lambda hidden: layer(hidden, position_embeddings=angles)  # noqa: E731
                out = checkpoint(run, hidden, use_reentrant=False) if checkpointed else run(hidden)
                left = live.live - out.numel() * out.element_size()
                if grad:
                    out.backward(above)
    finally:
        torch.set_default_dtype(torch.float32)
    return shape, left / positions, live.peak / positions


def _saved_by_sdpa(shape: ModelShape) -> int:
    """Return the bytes that a layer saves for a single sequence; it needs no copy of the kernel's output."""
    return saved_by_layer(shape, 2) - 2 * shape.heads * shape.head_dim


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_saved_by_layer_equals_the_storages_that_a_layer_saves(family: str) -> None:
    shape, left, _ = _counted(family, grad=True)
    assert left == pytest.approx(_saved_by_sdpa(shape), rel=0.03)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_training_phase_predicts_the_peak_of_a_checkpointed_layers_backward(family: str) -> None:
    shape, left, peak = _counted(family, grad=True, checkpointed=True)
    assert left == 0  # the layer saves only its input, which existed before
    expected = backward_workspace(shape, 2, 1, False, "full") - 2 * 2 * shape.heads * shape.head_dim // 2
    assert peak == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_forward_workspace_equals_the_peak_of_a_forward_without_gradient(family: str) -> None:
    shape, _, peak = _counted(family, grad=False)
    assert peak == pytest.approx(forward_workspace(shape, 2), rel=0.03)


def _peaks(root: str, world: World) -> Peaks:
    """Return peak bytes of training and of the teacher, and forecasts, with and without activation checkpointing."""
    files, shape = find_model(root, "policy.model_name"), known(root)
    rollout = Rollout(Prompt(0, (1,) * 12, Problem("")), 0, (2,) * 500, (-1.0,) * 500, "length", 0, (1,) * 12)
    micro_batch = pack([(i, rollout) for i in range(4)])
    batch = OptimizerBatch((micro_batch, micro_batch), 8000)
    found = {}
    for checkpointing in (True, False):
        config = config_for(
            Path(root),
            Path(root),
            "distillation.allow_degenerate=true",
            f"policy.dtensor_cfg.activation_checkpointing={checkpointing}",
            "policy.max_total_sequence_length=512",
            "policy.dynamic_batching.enabled=false",
            "policy.train_micro_batch_size=4",
            "policy.train_global_batch_size=16",
            ranks=2,
        )
        student = Student(config, files, world, shape.vocab, ())
        teacher = ShardedTeacher(config, files, world, shape.vocab)
        targets = [teacher.targets(micro_batch)] * 2
        student.train(batch, targets, Metrics())  # creates the optimizer's state
        with LiveBytes() as training:
            student.train(batch, targets, Metrics())
        with LiveBytes() as reading:
            teacher.targets(micro_batch)
        tables = StepMemory(config, shape, shape, False, None).training_phase()
        found[checkpointing] = (training.peak, reading.peak, tables, predict(config, shape, shape, cuda=False))
    return found


@pytest.mark.slow
def test_forecast_equals_the_memory_of_a_step_on_two_ranks(two_ranks: Sequence[Measured]) -> None:
    """On CPUs FSDP does not prefetch, and it reduces gradients immediately; resized storages are not measured."""
    seen = ("gradients", "saved activations", "layer workspace", "embedding gradients")
    for peaks, _ in two_ranks:
        for training, reading, tables, expected in peaks.values():
            largest = max(sum(table.get(line, 0) for line in seen) for table in tables)
            assert training == pytest.approx(largest, rel=0.05)
            teacher = expected.phases["teacher"]
            assert reading == pytest.approx(teacher["teacher workspace"] + teacher["gathered layers"] // 2, rel=0.05)


# ---- formulas against numbers computed by hand -----------------------------------------------------------------------


def test_forecast_of_a_32b_teacher_on_eight_gpus_of_80_gb() -> None:
    config = recipe(LARGE, "cluster.gpu_memory_gb=80")
    lines = forecast(config).trainer["teacher"]
    # A layer: q and o 2 * 5120 * 8192, k and v 2 * 5120 * 1024, the MLP 3 * 5120 * 25600, norms 2 * 5120 + 2 * 128.
    layer = 83_886_080 + 10_485_760 + 393_216_000 + 10_496
    # Outside the layers: embedding and head 2 * 151936 * 5120, the last norm.
    outside = 1_555_824_640 + 5_120
    assert 64 * layer + outside == 32_762_123_264
    # The peak is at the start of a pass: FSDP keeps the gathered root while it gathers the first layer.
    assert lines == {
        "teacher shards": 2 * 32_762_123_264 // 8,  # 8.2 GB of 65.5 GB; in float32 it would be 16.4 GB
        "gathered layers": 2 * 2 * layer,  # the result of the gather, and the parameters
        "gathered embeddings": 2 * 2 * outside,
        "teacher workspace": 2 * 5120 * 8192,  # the embeddings of the tokens
        "targets": 8 * (64 + 1) * 8 * 8191,  # 8 of 64 responses per rank
        # 8 responses per rank. Per token: 16 bytes for the student; the teacher's ranks, 4 in a group, share 16, and
        # each has 16 for every token of the group. Per response token: 48 bytes.
        "micro-batches": 8 * (8192 * (16 + 16 + 4 * 16) + 8191 * 56 + 20 * 256),
        "master weights": 4 * 1_720_574_976 // 8,
        "optimizer state": 0,  # on the host
    }
    pinned = {"teacher shards": 8_190_530_816, "optimizer state": 8 * 1_720_574_976 // 8}
    host = forecast(config).host
    for name, size in pinned.items():
        assert 0 <= host[name] - size < 2**20
    assert host["pending checkpoint"] == 12 * 1_720_574_976 // 8
    assert "32.76 B" in forecast_text(config)


def test_forecast_of_a_4b_student_with_tensor_and_context_parallelism() -> None:
    """dp 4, cp 2, tp 2; packs of 20480 tokens, 10240 positions per rank; the loss, and the backward of a layer."""
    fixed = "policy.dtensor_cfg.activation_checkpointing=true"
    config = recipe(LONG, "cluster.gpu_memory_gb=80", fixed)
    shape, teacher = known("Qwen/Qwen3-4B"), known(config.teacher.model_name)
    # q and o 2 * 2560 * 4096, k and v 2 * 2560 * 1024, the MLP 3 * 2560 * 9728, norms 2 * 2560 + 2 * 128.
    layer = 20_971_520 + 5_242_880 + 74_711_040 + 5_376
    assert 36 * layer + 151936 * 2560 + 2560 == 4_022_468_096
    norms = 36 * 5_376 + 2560  # not split by tensor parallelism
    shard = 4 * ((4_022_468_096 - norms) // 16 + norms // 8)
    workspace = backward_workspace(shape, 2, 2, True, "full", cp=2)
    assert kept_by_layer(shape, 2, 2, True, "full") == 2 * 2560
    both = {
        "master weights": shard,
        "gradients": shard,
        "optimizer state": 0,  # not before the optimizer step
        "targets": 8 * 65 * 16 * 20479 // 2,
        # 16 responses per data-parallel rank; the teacher's group of 8 ranks reads the responses of two of them.
        "micro-batches": 16 * (20480 * (16 + 16 // 2 + 2 * 16 + 2 * 16 // 8) + 20479 * (48 // 2 + 8 // 4) + 20 * 256),
        "gathered embeddings": 2 * (151936 + 1) * 2560 // 2,
    }
    assert forecast(config).trainer["training"] == both | {
        "gathered layers": 2 * layer // 2,
        "saved activations": 10240 * (36 * 2 * 2560 + 4 * 2560),
        "response rows": 2 * 2 * 2560 * 10240,
        "logits chunk": (4 + 2) * 2048 * 151936 // 2,
        "embedding gradients": 4 * 151936 * 2560 // 2,
    }
    assert StepMemory(config, shape, teacher, True, None).training_phase()[2] == both | {
        "gathered layers": 2 * 2 * layer // 2,
        "saved activations": 10240 * 35 * 2 * 2560,
        "layer workspace": 10240 * workspace,
        "gradient reduction": (2 + 4) * layer // 2,
        "embedding gradients": 2 * 151936 * 2560 // 2,
    }


@pytest.mark.parametrize(
    ("setting", "cuda", "fused"), [("null", True, True), ("null", False, False), ("false", True, False)]
)
def test_forecast_uses_the_fused_formulas_where_the_run_uses_fused_layers(
    setting: str, cuda: bool, fused: bool
) -> None:
    config, shape = recipe(LONG, f"runtime.fused_layers={setting}"), known("Qwen/Qwen3-4B")
    assert StepMemory(config, shape, shape, cuda, None).fused == fused


def test_saved_by_layer_of_fused_layers_computed_by_hand() -> None:
    """Qwen3-4B: D = 2560, Q = 4096, K = 1024, I = 9728, 32 heads."""
    shape = known("Qwen/Qwen3-4B")
    d, q, k, i, statistics = 2560, 4096, 1024, 9728, 4 * 32
    none = 2 * (4 * d + 2 * q + 2 * k + 3 * i) + 2 * (q + k) + statistics
    selective = 2 * (2 * d + 2 * q + 2 * k + 2 * i) + statistics
    assert saved_by_layer(shape, 2, 1, True) == none == kept_by_layer(shape, 2, 1, True, "none")
    assert saved_by_layer(shape, 2, 1, True, cp=2) == none + 2 * q  # the output before and after the exchange
    assert kept_by_layer(shape, 2, 1, True, "selective") == selective
    assert kept_by_layer(shape, 2, 1, True, "full") == 2 * d
    assert none < saved_by_layer(shape, 2) / 1.6


def test_reserve_has_a_part_for_each_communicator_and_for_a_sleeping_engine() -> None:
    """LONG: the default group, FSDP's shards, the teacher's ranks, tp, cp and groups of 8 teacher ranks."""
    config = recipe(LONG)
    assert communicators(config) == 5
    one = recipe(LONG, f"{_TP}=1", f"{_CP}=1", "teacher.dtensor_cfg.tensor_parallel_size=1")
    assert communicators(one) == 2  # all ranks, and two ranks per teacher group
    parts = reserve(config, 100 * GIB, asleep=False)
    assert sum(parts.values()) == CONTEXT + CUBLAS + 5 * COMMUNICATOR + int(FRAGMENTATION * 100 * GIB)
    asleep = reserve(config, 100 * GIB, asleep=True)
    eager = reserve(recipe(LONG, "policy.generation.vllm_cfg.enforce_eager=true"), 0, asleep=True)
    assert asleep["engine buffers"] > 0 and asleep["engine graphs"] > 0 and eager["engine graphs"] == 0


def test_moments_are_in_memory_before_the_optimizer_step_only_with_several_optimizer_batches() -> None:
    words = ("distillation.num_prompts_per_step=128", "policy.train_global_batch_size=128")
    one, several = recipe(LARGE, *words), recipe(LARGE, *words[:1], "policy.train_global_batch_size=64")
    assert forecast(one).trainer["training"]["optimizer state"] == 0
    found = forecast(several).trainer["training"]
    assert found["optimizer state"] == 2 * found["master weights"]


def test_pinned_parameters_are_rounded_up_to_powers_of_two() -> None:
    config = recipe(LARGE, "policy.dtensor_cfg.cpu_offload=true")
    host, shape = forecast(config).host, known("Qwen/Qwen3-1.7B")
    exact = 4 * shape.parameters // 8
    assert exact < host["master weights"] == host["gradients"] < 2 * exact
    assert host["optimizer state"] == 2 * exact


def test_engine_cache_is_the_engines_memory_minus_its_weights() -> None:
    config = recipe(LONG, "cluster.gpu_memory_gb=80")
    share, weights = int(0.6 * int(80 * GIB * 0.98)), 2 * 4_022_468_096 // 2
    lines = forecast(config).phases["generation"]
    assert (lines["engine weights"], lines["engine cache"]) == (weights, share - weights)
    unknown = recipe(LONG)
    assert forecast(unknown).phases["generation"].get("engine cache") is None
    assert forecast(unknown, card=80 * GIB).phases["generation"]["engine cache"] == int(0.6 * 80 * GIB) - weights


@pytest.mark.parametrize(
    ("override", "phase", "line", "factor"),
    [
        ("policy.dtensor_cfg.context_parallel_size=4", "training", "saved activations", 0.5),
        ("policy.dtensor_cfg.tensor_parallel_size=4", "training", "gathered embeddings", 0.5),
        ("policy.dtensor_cfg.cpu_offload=true", "training", "master weights", 0),
        ("policy.dtensor_cfg.cpu_offload=true", "training", "optimizer state", 0),
        ("cluster.num_nodes=4", "training", "optimizer state", 0.5),
        ("cluster.num_nodes=4", "teacher", "teacher shards", 0.5),
        ("teacher.precision=float32", "teacher", "teacher shards", 2),
        ("policy.generation.vllm_cfg.tensor_parallel_size=4", "generation", "engine weights", 0.5),
    ],
)
def test_configuration_keys_change_their_line_of_the_forecast(
    override: str, phase: str, line: str, factor: float
) -> None:
    before, after = (forecast(recipe(LONG, *extra)).phases[phase] for extra in ((), (override,)))
    assert after[line] == pytest.approx(factor * before[line], rel=1e-6)


@pytest.mark.parametrize("mode", ["self_ema", "self_periodic"])
def test_a_teacher_with_stored_weights_has_a_float32_copy_in_every_phase(mode: str) -> None:
    mode = f"distillation.context_distillation.mode={mode}"
    found = forecast(recipe("my-context-self-distillation-1n4g.yaml", mode))
    for phase in PHASES:
        assert found.phases[phase]["teacher copy"] == found.phases["training"]["master weights"]


def test_the_forecast_uses_the_largest_response_limit_of_the_run() -> None:
    schedule, short = "distillation.max_new_tokens_schedule", "policy.generation.max_new_tokens=64"

    def targets(*overrides: str) -> int:
        return forecast(recipe(LONG, short, *overrides)).phases["training"]["targets"]

    assert targets(f"{schedule}=[[2,128],[3,32]]") == 2 * targets()
    assert targets(f"{schedule}=[[1,32]]") == targets() // 2
    assert targets(f"{schedule}=[[9,128]]", "distillation.max_num_steps=8") == targets()


def test_each_replica_has_a_complete_model() -> None:
    before, after = (forecast(recipe(LONG, *extra)) for extra in ((), ("policy.dtensor_cfg.replicate_size=2",)))
    for phase, line in (("training", "master weights"), ("training", "gradients"), ("teacher", "teacher shards")):
        assert after.phases[phase][line] == 2 * before.phases[phase][line]


def test_without_a_gpu_nothing_is_offloaded_to_host_memory() -> None:
    found = forecast(recipe("my-distillation-1n4g.yaml"), cuda=False)
    assert found.host == {}
    for lines in found.phases.values():
        assert {"master weights", "optimizer state", "teacher shards", "engine cache"} <= lines.keys()
        assert "reserve" not in lines


# ---- no float32 copy of the teacher ----------------------------------------------------------------------------------


def test_a_bfloat16_teacher_of_32b_has_two_bytes_per_parameter() -> None:
    model = meta_model(_published("Qwen/Qwen3-32B"), PACKED, torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == 65_524_246_528
    assert sum(b.numel() * b.element_size() for b in model.buffers()) < 1024


class _Wide(TorchDispatchMode):
    """Dispatch mode that records the sizes of new tensors with four or more bytes per element."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.element_size() >= 4:
                self.numels.add(leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def _wide_of_a_teacher(root: str, world: World) -> set[int]:
    config = config_for(Path(root), Path(root), "teacher.precision=bfloat16", "distillation.allow_degenerate=true")
    with _Wide() as wide:
        teacher = ShardedTeacher(config, find_model(root, "teacher.model_name"), world, 4104)
        teacher.targets(pack(list(enumerate(fixed_rollouts(2, seed=1)))))
        verify_teacher(teacher, [(1, 2, 3), (4, 5)])
    return wide.numels


def _on_a_rank(root: str) -> Measured:
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    found = _peaks(f"{root}/float32", world), _wide_of_a_teacher(f"{root}/bfloat16", world)
    world.close()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an untied model, saved in float32 and in bfloat16."""
    root = tmp_path_factory.mktemp("memory")
    save_tiny_model(root / "float32", "qwen3", tied=False, vocab=4104, hidden=512, heads=16, kv_heads=8, layers=3)
    shutil.copytree(root / "float32", root / "bfloat16")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(root / "float32/model.safetensors").items()}
    save_file(weights, root / "bfloat16/model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def two_ranks(root: Path) -> Sequence[Measured]:
    """Return the memory that two ranks measured."""
    return run_ranks(2, _on_a_rank, str(root))


@pytest.mark.slow
def test_a_bfloat16_teacher_is_never_copied_to_float32(root: Path, two_ranks: Sequence[Measured]) -> None:
    """No float32 tensor has the size of a matrix or its shard, or is larger than the logits."""
    weights = load_file(root / "bfloat16/model.safetensors")
    matrices = {tensor.numel() for tensor in weights.values() if tensor.dim() == 2}
    head = weights["lm_head.weight"].numel()
    for _, numels in two_ranks:
        # CPUs have no bfloat16 matmul with float32 output, so the loss copies the head to float32 once per pass.
        rest = numels - {head}
        assert rest & {matrix // part for matrix in matrices for part in (1, 2)} == set()
        assert max(rest) == 64 * 4104 < max(matrices)


def test_on_a_gpu_the_head_is_never_copied_to_float32() -> None:
    with FakeTensorMode(), _Wide() as wide:
        head_VD = torch.empty(4096, 64, dtype=torch.bfloat16, device="cuda")
        hidden_ND = torch.empty(8, 64, dtype=torch.bfloat16, device="cuda")
        Projection(head_VD).logits(hidden_ND, torch.empty(8, 4096, device="cuda"))
    assert max(wide.numels) == 8 * 4096


# ---- errors ----------------------------------------------------------------------------------------------------------


_TP, _CP = "policy.dtensor_cfg.tensor_parallel_size", "policy.dtensor_cfg.context_parallel_size"
_MEMORY, _SHARE = "cluster.gpu_memory_gb", "policy.generation.vllm_cfg.gpu_memory_utilization"


@pytest.mark.parametrize(
    ("name", "overrides", "key", "parts"),
    [
        (
            "qwen3-14b-context-self-distillation-4n4g.yaml",
            ["policy.dtensor_cfg.activation_checkpointing=false"],
            _MEMORY,
            ["=40 ", "39.2 GiB", "training phase", "saved activations", "activation_checkpointing=true"],
        ),
        (
            "qwen3-14b-context-self-distillation-4n4g.yaml",
            [f"{_SHARE}=0.95"],
            _MEMORY,
            ["sync phase", "engine cache", f"change {_SHARE}"],
        ),
        (
            "distillation-qwen3-32b-to-1.7b-base-1n4g-fsdp2tp1.v1.yaml",
            [f"{_MEMORY}=24"],
            _MEMORY,
            ["teacher phase", "15.3 GiB", "teacher shards", "change cluster.num_nodes"],
        ),
        (
            "qwen3-14b-context-self-distillation-4n4g.yaml",
            ["policy.generation.vllm_cfg.tensor_parallel_size=1"],
            _SHARE,
            ["=0.75 of 39.2 GiB", "1.9 GiB", "2.8 GiB", "tensor_parallel_size=1"],
        ),
        (
            LONG,
            ["policy.max_total_sequence_length=40960"],
            "policy.max_total_sequence_length",
            ["Qwen/Qwen3-4B-Base", "32768"],
        ),
        (LONG, ["cluster.gpus_per_node=16", f"{_TP}=16"], _TP, ["8 key-value heads", "1, 2, 4 or 8"]),
        (
            LONG,
            ["cluster.num_nodes=3", f"{_CP}=3", "teacher.dtensor_cfg.context_parallel_size=3"],
            _CP,
            ["16 attention", "4 key-value", "1, 2 or 4"],
        ),
        (
            LONG,
            ["cluster.num_nodes=3", "teacher.dtensor_cfg.context_parallel_size=3"],
            "teacher.dtensor_cfg.context_parallel_size",
            ["12 ranks", "64 attention", "8 key-value", "Qwen/Qwen3-32B", "4 or 8"],
        ),
        (
            LONG,
            ["policy.dtensor_cfg.custom_parallel_plan={layers.*.mlp.up_proj: rowwise}"],
            "policy.dtensor_cfg.custom_parallel_plan",
            ["layers.*.mlp", "colwise"],
        ),
    ],
)
def test_dry_run_refuses_layouts_that_the_models_do_not_support(
    name: str, overrides: list[str], key: str, parts: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        forecast_text(recipe(name, *overrides))
    assert refused.value.key == key
    for part in parts:
        assert part in str(refused.value)


def test_a_vocabulary_part_of_padding_only_is_refused_before_loading(tmp_path: Path) -> None:
    config = tiny_config("qwen3", True, vocab=384, kv_heads=4)
    save_tiny_model(tmp_path / "five rows", "qwen3", True, vocab=5, kv_heads=4)
    sizes = ("policy.dtensor_cfg.tensor_parallel_size=4", "teacher.dtensor_cfg.tensor_parallel_size=4")
    split = config_for(tmp_path / "five rows", tmp_path / "another", *sizes, ranks=4)
    check_tensor_parallel(split, config, 289)
    with pytest.raises(UserError, match="288"):
        check_tensor_parallel(split, config, 288)
    check_tensor_parallel(config_for(tmp_path / "five rows", tmp_path / "another"), config, 1)
    with pytest.raises(UserError, match=r"\b5\b"):
        forecast_text(split)


def test_a_teacher_group_smaller_than_the_students_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    shapes = known("Qwen/Qwen3-4B-Base"), known("Qwen/Qwen3-32B")
    for tp, warns in ((1, False), (2, True), (4, False), (8, False)):
        caplog.clear()
        sizes = f"teacher.dtensor_cfg.tensor_parallel_size={tp}", "teacher.dtensor_cfg.context_parallel_size=1"
        plan_memory(recipe(LONG, *sizes), *shapes, torch.device("cpu"))
        assert [record.args for record in caplog.records if record.levelname == "WARNING"] == [(2, 4, 4)] * warns


_CP3 = ("policy.dtensor_cfg.context_parallel_size=3", "teacher.dtensor_cfg.tensor_parallel_size=6")


def test_a_run_raises_the_same_errors_as_a_dry_run() -> None:
    shapes = known("Qwen/Qwen3-1.7B-Base"), known("Qwen/Qwen3-32B")
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with pytest.raises(UserError) as refused:
        plan_memory(recipe(LARGE, f"{_MEMORY}=16"), *shapes, gpu)
    assert (refused.value.key, refused.value.value) == (_MEMORY, 16)
    for device in (gpu, cpu):
        with pytest.raises(UserError) as refused:
            plan_memory(recipe(LARGE, "cluster.gpus_per_node=12", *_CP3), *shapes, device)
        assert (refused.value.key, refused.value.value) == (_CP, 3)
    # the memory is not checked, but the size of the engine's cache is known
    found = plan_memory(recipe(LARGE), *shapes, gpu, card=79 * GIB)
    assert found is not None
    assert found.phases["generation"]["engine cache"] == int(0.6 * 79 * GIB) - 2 * PUBLISHED["1.7"]
    on_cpu = plan_memory(recipe(LARGE, "cluster.gpu_memory_gb=1"), *shapes, cpu)
    assert on_cpu is not None and on_cpu.host == {}


def test_a_refused_dry_run_prints_recipe_and_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.preflight.check_backend", lambda *arguments: None)  # it imports vLLM
    words = ["--config", str(REPO / "recipes" / LARGE), "--dry-run", f"{_MEMORY}=16", "logger.wandb_enabled=false"]
    with pytest.raises(UserError) as refused:
        print_dry_run(words)
    printed = capsys.readouterr().out
    assert "gpu_memory_gb: 16" in printed and "#   teacher " in printed
    assert (refused.value.key, refused.value.value) == (_MEMORY, 16) and "teacher phase" in refused.value.problem
