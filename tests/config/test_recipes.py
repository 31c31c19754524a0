"""Every recipe in recipes/ loads, and recipes with the name of a NeMo-RL recipe have its values."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import pytest

from distill.config import Config, load_config, parse_args
from distill.errors import UserError
from distill.memory.forecast import GIB, card_bytes, predict
from distill.memory.shapes import find_shape
from distill.metrics.alarms import Alarms
from tests.harness import forecast_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
RECIPES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
PAPERS = [name for name in RECIPES if name.startswith("papers/")]

REFERENCE = {
    "distillation_math.yaml",
    "my-distillation-1n4g.yaml",
    "my-context-self-distillation-1n4g.yaml",
    "distillation-qwen3-32b-to-1.7b-base-1n4g-fsdp2tp1.v1.yaml",
    "distillation-qwen3-32b-to-1.7b-base-1n8g-fsdp2tp1.v1.yaml",
    "distillation-qwen3-32b-to-4b-base-2n4g-fsdp2tp1-long.v1.yaml",
    "distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-long.v1.yaml",
    "distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-seqpack.v1.yaml",
}


@cache  # a configuration is frozen
def load(name: str, *overrides: str) -> Config:
    return load_config(["--config", str(ROOT / "recipes" / name), *overrides])


def test_every_recipe_of_nemo_rl_exists() -> None:
    assert set(RECIPES) >= REFERENCE


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_without_a_warning_and_its_files_and_its_resolved_form_are_valid(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The files that it names are in the repository, and its resolved form is the same configuration."""
    with caplog.at_level(logging.WARNING):
        arguments = parse_args(["--config", str(ROOT / "recipes" / name)])
    assert caplog.records == []
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(arguments.resolved)
    assert load_config(["--config", str(resolved)]) == arguments.config
    config = arguments.config
    data = config.data
    named = {entry.prompt_file for entry in (*data.train, *data.validation)}
    named |= {entry.data_path for entry in (*data.train, *data.validation)} | {data.default.prompt_file}
    named |= {config.distillation.context_distillation.teacher_system_prompt_file}
    assert [file for file in named - {None} if not (ROOT / str(file)).is_file()] == []


def test_the_context_recipe_runs_on_two_nodes() -> None:
    config = load("my-context-self-distillation-1n4g.yaml", "cluster.num_nodes=2", "cluster.gpus_per_node=4")
    assert config.cluster.num_nodes == 2


def test_the_base_recipe_has_the_values_of_nemo_rl() -> None:
    config = load("distillation_math.yaml")
    loop, loss, student, teacher = config.distillation, config.loss_fn, config.policy, config.teacher
    assert (loop.num_prompts_per_step, loop.num_generations_per_prompt) == (128, 1)
    assert (loop.max_num_steps, loop.max_num_epochs, loop.seed, loop.topk_logits_k) == (1000, 10, 42, 64)
    assert (loop.val_period, loop.max_val_samples) == (20, 512)
    assert (loop.val_at_start, loop.val_at_end, loop.context_distillation.enabled) == (False, False, False)
    assert (loss.kl_type, loss.mixed_kl_weight, loss.zero_outside_topk, loss.outside) == (
        "mixed",
        0.5,
        False,
        "renormalize",
    )
    assert loss.temperature is None
    assert (student.model_name, teacher.model_name) == ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B")
    assert (student.tokenizer.name, teacher.tokenizer.name) == ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B")
    assert (student.train_global_batch_size, student.train_micro_batch_size) == (64, 1)
    assert (student.generation_batch_size, student.logprob_batch_size, teacher.logprob_batch_size) == (64, 1, 1)
    assert (student.max_total_sequence_length, teacher.max_total_sequence_length) == (8192, 8192)
    assert (student.precision, student.max_grad_norm) == ("bfloat16", 1.0)
    assert (student.dtensor_cfg.tensor_parallel_size, student.dtensor_cfg.context_parallel_size) == (2, 2)
    assert (teacher.dtensor_cfg.tensor_parallel_size, teacher.dtensor_cfg.context_parallel_size) == (4, 2)
    assert student.dtensor_cfg.activation_checkpointing == "auto"
    assert not student.dtensor_cfg.cpu_offload
    for model in (student, teacher):
        assert (model.dynamic_batching.enabled, model.sequence_packing.enabled) == (True, False)
    assert (student.dynamic_batching.logprob_mb_tokens, teacher.dynamic_batching.logprob_mb_tokens) == (8192, "auto")
    adam = student.optimizer.kwargs
    assert (adam.foreach, adam.fused) == (None, None)
    assert (adam.lr, adam.weight_decay, adam.betas, adam.eps) == (2e-5, 0.01, (0.9, 0.999), 1e-8)
    warmup, constant, between = student.scheduler
    assert warmup.kwargs == {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 10}
    assert (warmup.name, constant.name) == (
        "torch.optim.lr_scheduler.LinearLR",
        "torch.optim.lr_scheduler.ConstantLR",
    )
    assert (constant.kwargs["factor"], between.milestones) == (1.0, (10,))
    sampling = student.generation
    assert (sampling.backend, sampling.max_new_tokens, sampling.temperature) == ("vllm", 8192, 1.0)
    assert (sampling.top_p, sampling.top_k, sampling.stop_token_ids) == (1.0, None, None)
    assert (sampling.vllm_cfg.tensor_parallel_size, sampling.vllm_cfg.gpu_memory_utilization) == (1, 0.6)
    assert (sampling.vllm_cfg.max_model_len, sampling.vllm_cfg.enforce_eager) == (8192, False)
    assert (config.data.max_input_seq_length, config.data.shuffle) == (8192, True)
    (train,), (validation,) = config.data.train, config.data.validation
    assert (train.dataset_name, train.repeat, train.prompt_file) == ("DeepScaler", 1, "prompts/cot.txt")
    assert (validation.dataset_name, validation.repeat, validation.env_name) == ("AIME2024", 16, "math")
    saving = config.checkpointing
    assert saving.checkpoint_dir == "checkpoints/distillation-Qwen/Qwen3-1.7B-Base"
    assert (saving.metric_name, saving.higher_is_better, saving.keep_top_k) == ("val:accuracy", True, 3)
    assert (saving.save_period, saving.save_optimizer, saving.save_consolidated) == (10, True, False)
    assert (config.logger.wandb_enabled, config.logger.tensorboard_enabled) == (True, True)
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (1, 8)


# Student, window, nodes x GPUs, student TP and CP, teacher TP and CP, vLLM TP, prompts, global batch, steps, validation
# period and problems, dynamic batching, packing, warm-up.
LARGE = {
    "1.7b-base-1n8g-fsdp2tp1.v1": ("1.7B", 8192, 1, 8, 1, 1, 4, 1, 1, 64, 32, 20, 10, 256, False, False, 20),
    "1.7b-base-1n4g-fsdp2tp1.v1": ("1.7B", 8192, 1, 4, 1, 1, 4, 1, 1, 64, 32, 20, 10, 256, False, False, 20),
    "4b-base-2n8g-fsdp2tp2-seqpack.v1": ("4B", 8192, 2, 8, 2, 1, 8, 1, 1, 64, 64, 20, 10, 256, False, True, 10),
    "4b-base-2n8g-fsdp2tp2-long.v1": ("4B", 20480, 2, 8, 2, 2, 4, 2, 2, 64, 64, 500, 50, 512, True, False, 10),
    "4b-base-2n4g-fsdp2tp1-long.v1": ("4B", 20480, 2, 4, 2, 2, 4, 2, 1, 64, 64, 500, 50, 512, True, False, 10),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_has_the_values_of_nemo_rl(name: str) -> None:
    config = load(f"distillation-qwen3-32b-to-{name}.yaml")
    loop, student, teacher = config.distillation, config.policy, config.teacher
    size = LARGE[name][0]
    assert (student.model_name, teacher.model_name) == (f"Qwen/Qwen3-{size}-Base", "Qwen/Qwen3-32B")
    assert LARGE[name][1:] == (
        student.max_total_sequence_length,
        config.cluster.num_nodes,
        config.cluster.gpus_per_node,
        student.dtensor_cfg.tensor_parallel_size,
        student.dtensor_cfg.context_parallel_size,
        teacher.dtensor_cfg.tensor_parallel_size,
        teacher.dtensor_cfg.context_parallel_size,
        student.generation.vllm_cfg.tensor_parallel_size,
        loop.num_prompts_per_step,
        student.train_global_batch_size,
        loop.max_num_steps,
        loop.val_period,
        loop.max_val_samples,
        student.dynamic_batching.enabled,
        student.sequence_packing.enabled,
        student.scheduler[0].kwargs["total_iters"],
    )
    assert (config.loss_fn.kl_type, config.loss_fn.outside, loop.topk_logits_k) == ("reverse", "renormalize", 64)
    assert teacher.max_total_sequence_length == student.generation.vllm_cfg.max_model_len == LARGE[name][1]
    assert (teacher.dynamic_batching.enabled, teacher.sequence_packing.enabled) == (
        student.dynamic_batching.enabled,
        student.sequence_packing.enabled,
    )


def test_the_small_recipes_fit_four_gpus() -> None:
    for name in ("my-distillation-1n4g.yaml", "my-context-self-distillation-1n4g.yaml"):
        config = load(name)
        assert config.policy.model_name == "Qwen/Qwen3-0.6B"
        assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (1, 4)
        assert (config.policy.dtensor_cfg.tensor_parallel_size, config.policy.dtensor_cfg.context_parallel_size) == (
            1,
            1,
        )
        assert config.policy.max_total_sequence_length == config.teacher.max_total_sequence_length == 4096
        assert (config.distillation.num_prompts_per_step, config.distillation.max_num_steps) == (8, 100)
        assert config.policy.train_global_batch_size == 8
        assert config.policy.generation.vllm_cfg.gpu_memory_utilization == 0.5


def test_the_context_recipe_has_the_values_of_nemo_rl() -> None:
    config = load("my-context-self-distillation-1n4g.yaml")
    context = config.distillation.context_distillation
    assert config.teacher.model_name == config.policy.model_name
    assert (context.enabled, context.mode) == (True, "self_frozen")
    assert context.overflow_policy == "truncate_prefix_only"
    assert context.teacher_prefix_template == (
        "You are given a problem and a trace: {problem} + {trace}. Solve it on your own."
    )
    extractor = context.trace_extractor
    assert (extractor.type, extractor.selection, extractor.missing_trace_policy) == ("think_tag", "first", "empty")
    assert (context.trace_source, extractor.unclosed_span) == ("dynamic", "ignore")
    assert context.metrics.enabled


CONTEXT_40GB = {  # Student TP and CP, vLLM TP
    "qwen3-4b-context-self-distillation-4n4g.yaml": (1, 2, 1),
    "qwen3-8b-context-self-distillation-4n4g.yaml": (2, 2, 2),
    "qwen3-14b-context-self-distillation-4n4g.yaml": (2, 2, 4),
}


@pytest.mark.parametrize("name", CONTEXT_40GB)
def test_a_context_recipe_for_40_gb_gpus_has_16k_new_tokens_and_512_ids(name: str) -> None:
    config = load(name)
    policy, teacher, context = config.policy, config.teacher, config.distillation.context_distillation
    assert policy.model_name == teacher.model_name == f"Qwen/Qwen3-{name.split('-')[1].removesuffix('b')}B"
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node, config.cluster.gpu_memory_gb) == (4, 4, 40)
    assert (config.distillation.topk_logits_k, config.loss_fn.outside, context.enabled) == (512, "bucket", True)
    assert "{trace}" in context.teacher_prefix_template
    assert policy.generation.max_new_tokens == 16384
    assert policy.max_total_sequence_length == config.data.max_input_seq_length + 16384
    # The teacher's prefix has the problem and a trace, which can be as long as the response.
    assert teacher.max_total_sequence_length == policy.max_total_sequence_length + 16384
    assert (policy.sequence_packing.enabled, policy.dynamic_batching.enabled) == (True, False)
    assert policy.sequence_packing.train_mb_tokens == teacher.max_total_sequence_length
    engine = policy.generation.vllm_cfg
    parallel = policy.dtensor_cfg
    assert CONTEXT_40GB[name] == (
        parallel.tensor_parallel_size,
        parallel.context_parallel_size,
        engine.tensor_parallel_size,
    )


@pytest.mark.parametrize("name", CONTEXT_40GB)
def test_a_context_recipe_for_40_gb_gpus_validates_and_stops_at_a_collapse(name: str) -> None:
    config = load(name)
    loop = config.distillation
    assert (loop.val_at_start, loop.val_period, loop.val_at_end, loop.max_val_samples) == (True, 20, True, None)
    assert [entry.dataset_name for entry in config.data.validation] == ["AIME2024", "AIME2025"]
    assert (loop.val_num_generations, config.checkpointing.metric_name) == (4, "val:accuracy")
    assert loop.default_alarms
    assert {alarm.action for alarm in loop.alarms} == {"stop"}


def stopped_at(config: Config, shares: list[float], truncated: float) -> int | None:
    """Return the step at which an alarm stops a run with these shares of repeated tokens; None if none does.

    ``truncated``: truncation rate after the five steps of the baseline, where it is 0.1.
    """
    alarms = Alarms.of(config.distillation)
    for step, share in enumerate(shares, 1):
        values = {"train/repeated_token_share": share, "train/truncation_rate": 0.1 if step <= 5 else truncated}
        if any(event.action == "stop" for event in alarms.update(step, values).started):
            return step
    return None


@pytest.mark.parametrize("name", CONTEXT_40GB)
def test_a_context_recipe_for_40_gb_gpus_stops_at_repetition_with_truncation_and_at_long_loops(name: str) -> None:
    config, first = load(name), [0.1] * 5
    assert stopped_at(config, [*first, *[0.25] * 10], 0.4) == 8, "both alarms hold for three steps: a collapse"
    assert stopped_at(config, [*first, *[0.25] * 10], 0.1) is None, "repetition without truncation warns"
    assert stopped_at(config, [*first, *[0.1] * 10], 0.4) is None, "truncation without repetition warns"
    assert stopped_at(config, [*first, *[0.6] * 10], 0.1) == 10, "most tokens are in loops for five steps"


QWEN3 = {"0.6": 596_049_920, "1.7": 1_720_574_976, "4": 4_022_468_096, "8": 8_190_735_360, "14": 14_768_307_200}
QWEN3 |= {"32": 32_762_123_264}

# GB of a card; student's and teacher's billions of parameters; ranks = dp x cp x tp; ranks that read a teacher's pack,
# ranks of an engine; tokens of a pack.
LAYOUTS = {
    "distillation_math.yaml": (80, "1.7", "4", 8, 2, 2, 2, 8, 1, 8192),
    "my-distillation-1n4g.yaml": (40, "0.6", "4", 4, 4, 1, 1, 1, 1, 4096),
    "my-context-self-distillation-1n4g.yaml": (40, "0.6", "0.6", 4, 4, 1, 1, 1, 1, 4096),
    "distillation-qwen3-32b-to-1.7b-base-1n4g-fsdp2tp1.v1.yaml": (40, "1.7", "32", 4, 4, 1, 1, 4, 1, 8192),
    "distillation-qwen3-32b-to-1.7b-base-1n8g-fsdp2tp1.v1.yaml": (80, "1.7", "32", 8, 8, 1, 1, 4, 1, 8192),
    "distillation-qwen3-32b-to-4b-base-2n4g-fsdp2tp1-long.v1.yaml": (40, "4", "32", 8, 2, 2, 2, 8, 1, 20480),
    "distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-long.v1.yaml": (80, "4", "32", 16, 4, 2, 2, 8, 2, 20480),
    "distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-seqpack.v1.yaml": (80, "4", "32", 16, 8, 1, 2, 8, 1, 8192),
    "qwen3-4b-context-self-distillation-4n4g.yaml": (40, "4", "4", 16, 8, 2, 1, 2, 1, 34816),
    "qwen3-8b-context-self-distillation-4n4g.yaml": (40, "8", "8", 16, 4, 2, 2, 4, 2, 34816),
    "qwen3-14b-context-self-distillation-4n4g.yaml": (40, "14", "14", 16, 4, 2, 2, 4, 4, 34816),
}

# GB of a card; billions of parameters; ranks = dp x cp x tp; ranks of an engine; rank of the adapters.
LORA_LAYOUTS = {
    "qwen3-14b-context-self-distillation-lora-1n4g.yaml": (40, "14", 4, 1, 2, 2, 4, 32),
    "qwen3-8b-context-self-distillation-lora-1n1g.yaml": (80, "8", 1, 1, 1, 1, 1, 32),
}


def test_every_gpu_recipe_has_a_layout() -> None:
    assert set(LAYOUTS) >= REFERENCE
    assert set(RECIPES) - {*LAYOUTS, *LORA_LAYOUTS, *PAPERS} == {name for name in RECIPES if "cpu" in name}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_recipe_fits_its_nodes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run passes on GPUs of that size, and its numbers are those of the layout."""
    monkeypatch.chdir(tmp_path)  # a folder without model files
    gigabytes, student, teacher, ranks, dp, cp, tp, group, engine, tokens = LAYOUTS[name]
    config = load(name, f"cluster.gpu_memory_gb={gigabytes}")
    text = forecast_text(config)  # raises if it does not fit
    assert f"{ranks} ranks: dp {dp} x cp {cp} x tp {tp}, teacher micro-batches on {group} ranks" in text
    assert f" {tokens} tokens" in text
    shapes = [find_shape(model.model_name, "a model") for model in (config.policy, config.teacher)]
    assert shapes[0] is not None and shapes[1] is not None
    found = predict(config, shapes[0], shapes[1])
    train, score, generate = (found.phases[phase] for phase in ("training", "teacher", "generation"))
    P, teachers = QWEN3[student], QWEN3[teacher]
    assert ranks == dp * cp * tp == config.cluster.num_nodes * config.cluster.gpus_per_node
    shape = shapes[0]
    norms = shape.hidden + shape.layers * sum(sizes[0] for sizes in shape.layer_tensors if len(sizes) == 1)
    own = 4 * (P + (tp - 1) * norms) / ranks  # tensor parallelism does not split the norms
    assert [train[line] for line in ("master weights", "gradients")] == [pytest.approx(own, abs=8)] * 2
    # The moments are on the device only while the optimizer needs them, which is the peak only for short sequences.
    assert train["optimizer state"] in (0, pytest.approx(2 * own, abs=8))
    assert 0 <= found.host["optimizer state"] - 2 * own < 2**20 + 8  # pinned memory has blocks of 1 MiB
    assert score["teacher shards"] == pytest.approx(2 * teachers / ranks, abs=2)
    assert score["master weights"] == generate["master weights"] == train["master weights"]
    assert score["optimizer state"] == generate["optimizer state"] == 0  # on the host
    assert generate["engine weights"] == pytest.approx(2 * P / engine, abs=2)
    share = config.policy.generation.vllm_cfg.gpu_memory_utilization
    assert generate["engine weights"] + generate["engine cache"] == int(share * gigabytes * 0.98 * GIB)
    for phase in found.phases:
        assert sum(found.phases[phase].values()) <= card_bytes(gigabytes) == int(gigabytes * 0.98 * GIB)


@pytest.mark.parametrize("name", LORA_LAYOUTS)
def test_a_recipe_with_adapters_fits_its_node_and_needs_no_memory_for_the_teacher(name: str) -> None:
    gigabytes, size, ranks, dp, cp, tp, engine, dim = LORA_LAYOUTS[name]
    config = load(name)
    text = forecast_text(config)  # raises if it does not fit
    assert f"{ranks} rank{'s' * (ranks > 1)}: dp {dp} x cp {cp} x tp {tp}; micro-batches" in text
    policy, cluster = config.policy, config.cluster
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.gpu_memory_gb) == (1, ranks, gigabytes)
    assert (policy.dtensor_cfg.lora_cfg.enabled, policy.dtensor_cfg.lora_cfg.dim) == (True, dim)
    assert policy.generation.max_new_tokens == 16384
    shape = find_shape(policy.model_name, "a model")
    assert shape is not None
    found = predict(config, shape, shape)
    assert found.phases["training"]["frozen weights"] == pytest.approx(2 * QWEN3[size] / ranks, rel=1e-3)
    assert found.phases["generation"]["engine weights"] == pytest.approx(2 * QWEN3[size] / engine, abs=2)
    assert found.phases["teacher"]["teacher shards"] == found.host["teacher shards"] == 0
    assert max(map(found.total, found.phases)) <= card_bytes(gigabytes)


def test_training_all_weights_of_14b_does_not_fit_the_node_on_which_its_adapters_are_trained() -> None:
    with pytest.raises(UserError, match="training phase"):
        forecast_text(load("qwen3-14b-context-self-distillation-4n4g.yaml", "cluster.num_nodes=1"))


@pytest.mark.parametrize("name", CONTEXT_40GB)
def test_a_context_recipe_for_40_gb_gpus_does_not_fit_20_gb(name: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.gpu_memory_gb=20 provides 19\.6 GiB"):
        (
            forecast_text(
                load(name, "cluster.gpu_memory_gb=20", "policy.generation.vllm_cfg.gpu_memory_utilization=0.95")
            )
        )


@pytest.mark.parametrize(
    ("name", "student", "lr"),
    [
        ("smollm2-distillation-cpu.yaml", "models/SmolLM2-135M-pruned", 1e-4),
        ("smollm2-context-cpu.yaml", "models/SmolLM2-135M-Instruct", 2e-5),
    ],
)
def test_a_cpu_recipe_has_two_ranks_and_a_small_model(name: str, student: str, lr: float) -> None:
    config = load(name)
    policy, teacher = config.policy, config.teacher
    assert (policy.model_name, teacher.model_name) == (student, "models/SmolLM2-135M-Instruct")
    assert policy.tokenizer.name == student
    assert config.distillation.context_distillation.enabled == ("context" in name)
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (1, 2)
    assert (config.distillation.num_prompts_per_step, config.distillation.num_generations_per_prompt) == (8, 2)
    assert (policy.train_global_batch_size, policy.optimizer.kwargs.lr) == (16, lr)
    assert (policy.generation.backend, policy.generation.max_new_tokens) == ("vllm", 48)
    assert policy.max_total_sequence_length == teacher.max_total_sequence_length == 512
    assert not policy.dtensor_cfg.activation_checkpointing
    assert not policy.dtensor_cfg.reshard_after_forward
    assert not teacher.dtensor_cfg.reshard_after_forward
    assert (config.distillation.val_period, config.logger.wandb_enabled) == (0, False)
    (train,), (validation,) = config.data.train, config.data.validation
    assert (train.dataset_name, train.data_path) == (None, "prompts/gsm_train.jsonl")
    assert (train.input_key, train.output_key) == ("question", "answer")
    assert (validation.data_path, validation.repeat) == ("prompts/gsm_validation.jsonl", 1)
