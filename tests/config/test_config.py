"""Command lines and recipe files in, one Config out, or one sentence that says what to mend."""

from __future__ import annotations

import ast
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, DatasetConfig, LossConfig, load_config, parse_args
from distill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "recipes" / "my-distillation-1n4g.yaml")
Write = Callable[[str, str], str]


def load(*overrides: str, recipe: str = SMALL) -> Config:
    return load_config(["--config", recipe, *overrides])


def refusal(*overrides: str, recipe: str = SMALL) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(UserError) as error:
        load(*overrides, recipe=recipe)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe by name and text; gives its path."""

    def to_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return to_file


# ---- spelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["distillation.max_num_steps=5"],
        ["++distillation.max_num_steps=5"],
        ["+distillation.max_num_steps=5"],
        ["--distillation.max_num_steps=5"],
        ["--distillation.max-num-steps=5"],
        ["--distillation.max-num-steps", "5"],
        ["distillation={max_num_steps: 5}"],
        ["distillation.max_num_steps=7", "--distillation.max-num-steps", "5"],
    ],
    ids=" ".join,
)
def test_an_override_may_be_spelled_in_any_of_the_usual_ways(words: list[str]) -> None:
    config = load(*words)
    assert config.distillation.max_num_steps == 5
    assert config.distillation.num_prompts_per_step == 8  # the section's other keys stay


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("policy.optimizer.kwargs.lr=1e-6", "policy.optimizer.kwargs.lr", 1e-6),
        ("policy.optimizer.kwargs.lr=1", "policy.optimizer.kwargs.lr", 1.0),
        ("policy.optimizer.kwargs.betas=[0.9, 0.95]", "policy.optimizer.kwargs.betas", (0.9, 0.95)),
        ("logger.wandb_enabled=True", "logger.wandb_enabled", True),
        ("policy.max_grad_norm=null", "policy.max_grad_norm", None),
        ("policy.generation.stop_token_ids=[1, 2]", "policy.generation.stop_token_ids", (1, 2)),
        ("logger.wandb.name=a: {b} = [c", "logger.wandb.name", "a: {b} = [c"),
        ("logger.wandb.name=123", "logger.wandb.name", "123"),
        ("logger.wandb.name=null", "logger.wandb.name", None),
        ("logger.wandb.name='null'", "logger.wandb.name", "null"),
        ("logger.wandb.name=${policy.model_name}", "logger.wandb.name", "Qwen/Qwen3-0.6B"),
        (
            "policy.tokenizer.chat_template_kwargs.enable_thinking=false",
            "policy.tokenizer.chat_template_kwargs",
            {"enable_thinking": False},
        ),
        ("policy.scheduler.0.kwargs.total_iters=3", "policy.scheduler", None),
    ],
)
def test_a_value_gets_the_type_of_its_key(word: str, key: str, value: Any) -> None:
    found: Any = load(word)
    for name in key.split("."):
        found = getattr(found, name)
    if key == "policy.scheduler":
        assert found[0].kwargs == {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 3}
        assert found[2].milestones == (10,)
    else:
        assert found == value
        assert type(found) is type(value)


def test_a_template_on_the_command_line_is_not_read_as_yaml() -> None:
    template = "A hint: {problem}, then: {trace} {{x}}"
    config = load(f"distillation.context_distillation.teacher_prefix_template={template}")
    assert config.distillation.context_distillation.teacher_prefix_template == template


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["distillation.max_num_steps"],
            ["distillation.max_num_steps has no value", "distillation.max_num_steps=value"],
        ),
        (["--distillation.max-num-steps"], ["--distillation.max-num-steps has no value"]),
        (["--distillation.max-num-steps", "--dry-run"], ["--distillation.max-num-steps has no value"]),
        (["=5"], ["=5 is no setting", "key.path=value"]),
        (["~distillation.seed"], ["~distillation.seed is no setting"]),
        (["data.train=[{"], ["data.train=[{ can't be read"]),
    ],
)
def test_a_word_that_sets_nothing_is_refused(words: list[str], parts: list[str]) -> None:
    sentence = refusal(*words)
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_is_parsed_in_both_spellings(flag: str) -> None:
    assert parse_args([flag, "--config", SMALL]).dry_run
    assert not parse_args([f"--config={SMALL}"]).dry_run


def test_the_base_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config([]).policy.model_name == "Qwen/Qwen3-1.7B-Base"


def test_the_base_recipe_of_the_current_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    write("recipes/distillation_math.yaml", f"defaults: {SMALL}\ndistillation: {{seed: 7}}")
    monkeypatch.chdir(tmp_path)
    assert load_config([]).distillation.seed == 7


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_child_wins_over_its_parents_and_a_later_parent_over_an_earlier(write: Write) -> None:
    write("old/one.yaml", "distillation: {max_num_steps: 1, seed: 1, val_period: 1, val_batch_size: 1}")
    write("two.yaml", "distillation: {max_num_steps: 2, seed: 2, val_period: 2}")
    write("three.yaml", "defaults: two.yaml\ndistillation: {max_num_steps: 3, seed: 3}")
    child = write("child.yaml", f"defaults: [{SMALL}, old/one.yaml, three.yaml]\ndistillation: {{max_num_steps: 4}}")
    loop = load(recipe=child).distillation
    assert (loop.max_num_steps, loop.seed, loop.val_period, loop.val_batch_size) == (4, 3, 2, 1)
    assert load("distillation.max_num_steps=5", recipe=child).distillation.max_num_steps == 5


def test_a_parent_is_sought_beside_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    write("old/parent.yaml", f"defaults: {SMALL}\ndistillation: {{seed: 9}}")
    child = write("old/child.yaml", "defaults: parent.yaml\ndistillation: {max_num_steps: 1}")
    monkeypatch.chdir("/")
    assert load(recipe=child).distillation.seed == 9


def test_a_list_replaces_the_parents_list(write: Write) -> None:
    child = write("child.yaml", f"defaults: {SMALL}\npolicy: {{scheduler: []}}")
    assert load(recipe=child).policy.scheduler == ()


def test_a_recipe_reads_small_numbers_anchors_and_merge_keys(write: Write) -> None:
    text = f"""
        defaults: {SMALL}
        policy: &student
          optimizer: {{kwargs: {{lr: 1e-6, eps: 1E-9}}}}
          dtensor_cfg: &parallel {{tensor_parallel_size: 2}}
        teacher:
          dtensor_cfg:
            <<: *parallel
            cpu_offload: true
        """
    config = load(recipe=write("child.yaml", text))
    assert config.policy.optimizer.kwargs.lr == 1e-6
    assert config.policy.optimizer.kwargs.eps == 1e-9
    assert config.teacher.dtensor_cfg.tensor_parallel_size == 2
    assert config.teacher.dtensor_cfg.cpu_offload


def test_interpolations_are_resolved_after_all_layers_are_merged(write: Write) -> None:
    text = f"""
        defaults: {SMALL}
        policy:
          train_micro_batch_size: 3
          dynamic_batching:
            train_mb_tokens: ${{mul:${{..max_total_sequence_length}}, ${{..train_micro_batch_size}}}}
        checkpointing: {{checkpoint_dir: "a/${{policy.model_name}}/${{..distillation.seed}}"}}
        """
    config = load("policy.max_total_sequence_length=100", "distillation.seed=3", recipe=write("child.yaml", text))
    assert config.policy.dynamic_batching.train_mb_tokens == 300
    assert config.checkpointing.checkpoint_dir == "a/Qwen/Qwen3-0.6B/3"


def test_what_no_recipe_sets_follows_the_key_it_belongs_to(write: Write) -> None:
    alone = write("alone.yaml", "data: {train: {data_path: x.jsonl}}\ndistillation: {val_period: 0}")
    config = load(
        "policy.max_total_sequence_length=512",
        "policy.logprob_batch_size=2",
        "policy.model_name=a",
        "teacher.model_name=b",
        "policy.precision=float32",
        "policy.generation.temperature=0.5",
        recipe=alone,
    )
    assert config.policy.tokenizer.name == "a"
    assert config.teacher.tokenizer.name == "b"
    assert config.policy.generation.max_new_tokens == 512
    assert config.policy.generation.vllm_cfg.max_model_len == 512
    assert config.policy.generation.vllm_cfg.precision == "float32"
    assert config.policy.generation.val_temperature == 0.5
    assert config.policy.dynamic_batching.train_mb_tokens == 512
    assert config.policy.sequence_packing.logprob_mb_tokens == 1024
    assert config.teacher.max_total_sequence_length == 512
    assert config.teacher.precision == "float32"
    assert config.teacher.logprob_batch_size == 2
    assert config.teacher.dynamic_batching.logprob_mb_tokens == 1024
    assert config.data.max_input_seq_length == 512


@pytest.mark.parametrize(
    ("gpu", "features", "expected"),
    [
        (False, {"avx2": True, "avx512_bf16": False}, "float32"),
        (False, {"avx512_bf16": True}, "bfloat16"),
        (False, {"amx_bf16": True}, "bfloat16"),
        (False, {"neon": True, "bf16": True}, "bfloat16"),
        (True, {"avx2": True}, "bfloat16"),
    ],
)
def test_precision_auto_is_what_the_machine_multiplies_fast(
    gpu: bool, features: dict[str, bool], expected: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: features)
    text = f"defaults: {SMALL}\npolicy: {{precision: auto}}\nteacher: {{precision: auto}}\n"
    config = load(recipe=write("auto.yaml", text))
    assert config.policy.precision == expected
    assert config.policy.generation.vllm_cfg.precision == expected and config.teacher.precision == expected
    assert load("teacher.precision=float32", recipe=write("auto.yaml", text)).teacher.precision == "float32"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("distillation: {seed: 1, seed: 2}", ["isn't a readable recipe", "duplicate key seed"]),
        ("distillation: [1", ["isn't a readable recipe in line"]),
        ("- 1", ["holds no keys"]),
        ("defaults: recipe.yaml", ["makes a recipe its own ancestor"]),
        ("defaults: nowhere.yaml", ["defaults=", "nowhere.yaml", "does not exist", "recipe.yaml"]),
        ("defaults: 3", ["defaults=3", "a file name or a list of them"]),
        ("policy: {model_name: '${no.such}'}", ["policy.model_name can't be resolved", "'no.such' not found"]),
        ("policy: {model_name: '${mul:a}'}", ["policy.model_name can't be resolved"]),
        ("policy: {model_name: '${mul:a,3}'}", ["policy.model_name can't be resolved", "two numbers, not 'a' and 3"]),
        ("policy: {model_name: '${..model_name}'}", ["policy.model_name can't be resolved"]),
        ("policy: {model_name: '${mul:1,'}", ["isn't a readable recipe", "BRACE_CLOSE"]),
        ("policy: 3", ["policy=3 has the wrong type", "keys with values"]),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(write: Write, text: str, parts: list[str]) -> None:
    sentence = refusal(recipe=write("recipe.yaml", text))
    assert all(part in sentence for part in parts), sentence


def test_a_missing_recipe_is_refused_with_the_names_nearby() -> None:
    sentence = refusal(recipe=str(ROOT / "recipes" / "my-destillation-1n4g.yaml"))
    assert "my-destillation-1n4g.yaml does not exist" in sentence
    assert "my-distillation-1n4g.yaml" in sentence.partition("does not exist")[2]


# ---- keys and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        (
            "distillation.topk_logit_k=3",
            "unknown key distillation.topk_logit_k: did you mean distillation.topk_logits_k?",
        ),
        ("loss_fn.kltype=reverse", "unknown key loss_fn.kltype: did you mean loss_fn.kl_type?"),
        (
            "policy.temperature=1",
            "unknown key policy.temperature: did you mean loss_fn.temperature or policy.generation.temperature?",
        ),
        (
            "distillation.train_global_batch_size=4",
            "unknown key distillation.train_global_batch_size: did you mean policy.train_global_batch_size?",
        ),
        ("topk_logits_k=3", "unknown key topk_logits_k: did you mean distillation.topk_logits_k?"),
        ("data.train.datapath=x", "unknown key data.train.datapath: did you mean data.train.data_path?"),
        ("policy.automodel_cfg.enabled=true", "unknown key policy.automodel_cfg: did you mean policy.dtensor_cfg?"),
        ("qqq.zzz=1", "unknown key qqq: --help lists every key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(word: str, sentence: str) -> None:
    assert refusal(word) == sentence


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("distillation.max_num_steps=five", "has the wrong type: set it to a whole number"),
        ("distillation.max_num_steps=5.5", "has the wrong type: set it to a whole number"),
        ("distillation.max_num_steps=true", "has the wrong type: set it to a whole number"),
        ("distillation.max_num_steps=null", "has the wrong type: set it to a whole number"),
        ("distillation.max_val_samples=all", "has the wrong type: set it to a whole number or null"),
        ("policy.optimizer.kwargs.lr=high", "has the wrong type: set it to a finite number"),
        ("policy.optimizer.kwargs.lr=.nan", "has the wrong type: set it to a finite number"),
        ("policy.optimizer.kwargs.betas=[0.9]", "has the wrong type: set it to a list of 2 numbers"),
        ("policy.generation.stop_token_ids=1", "has the wrong type: set it to a list of numbers or null"),
        ("policy.generation.stop_token_ids=[a]", "has the wrong type: set it to a whole number"),
        ("logger.wandb_enabled=maybe", "has the wrong type: set it to true or false"),
        ("logger.wandb_enabled=1", "has the wrong type: set it to true or false"),
        ("policy.vllm_kwargs_=3", "unknown key policy.vllm_kwargs_"),
        ("policy.generation.vllm_kwargs=3", "has the wrong type: set it to keys with values"),
        ("policy.tokenizer=x", "has the wrong type: set it to keys with values"),
        ("policy.model_name=null", "has the wrong type: set it to a text"),
        ("loss_fn.kl_type=backward", "isn't possible: set it to mixed, forward, reverse, jsd or sampled"),
        ("loss_fn.support=both", "isn't possible: set it to teacher or student"),
        ("loss_fn.backend=cuda", "isn't possible: set it to auto, triton or torch"),
        ("policy.precision=fp8", "isn't possible: set it to bfloat16, float32 or auto"),
        ("policy.generation.vllm_cfg.kv_cache_dtype=fp8", "isn't possible: set it to auto"),
        ("policy.generation.backend=megatron", "isn't possible: set it to vllm or transformers"),
        ("distillation.context_distillation.mode=ema", "isn't possible: set it to self_frozen"),
        ("distillation.context_distillation.alignment=text", "isn't possible: set it to response_token_index"),
        ("distillation.context_distillation.problem_source=x", "isn't possible: set it to original_user_problem"),
        ("distillation.context_distillation.trace_source=x", "isn't possible: set it to dynamic or static_dataset"),
        (
            "distillation.context_distillation.overflow_policy=x",
            "set it to truncate_trace, truncate_prefix_only or truncate_prefix_from_end",
        ),
        ("distillation.context_distillation.trace_extractor.selection=x", "set it to first, last or longest"),
        ("distillation.context_distillation.trace_extractor.missing_trace_policy=x", "set it to empty or drop_sample"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_wanted(word: str, remedy: str) -> None:
    sentence = refusal(word)
    assert word.partition("=")[0] in sentence
    assert sentence.endswith(remedy) or remedy in sentence, sentence


def test_a_number_in_a_recipe_is_no_text(write: Write) -> None:
    assert "policy.model_name=123 has the wrong type" in refusal(
        recipe=write("a.yaml", f"defaults: {SMALL}\npolicy: {{model_name: 123}}")
    )


def test_a_list_entry_that_does_not_exist_is_refused() -> None:
    assert "policy.scheduler.7 doesn't exist: policy.scheduler has 3 entries" in refusal("policy.scheduler.7.name=x")


# ---- old keys --------------------------------------------------------------------------------------------------------


def test_keys_without_a_meaning_here_give_one_warning_that_names_them_all(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"""
        defaults: {SMALL}
        policy:
          offload_optimizer_for_logprob: false
          megatron_cfg:
            enabled: false
            offload_optimizer_for_logprob: true
            optimizer: {{lr: 1, clip: "${{policy.max_grad_norm}}"}}
          dtensor_cfg: {{_v2: true, lora_cfg: {{enabled: false}}}}
          sequence_packing: {{algorithm: modified_first_fit_decreasing}}
          generation: {{port_range_low: 3000, colocated: {{enabled: true, resources: {{num_nodes: null}}}}}}
        teacher: {{generation: null, optimizer: {{kwargs: {{lr: 1}}}}}}
        data: {{train: {{processor: math, split_validation_size: 0}}}}
        env: {{math: {{num_workers: 8}}}}
        logger: {{monitor_gpus: true, mlflow_enabled: false, swanlab: {{name: "${{data.train.x}}"}}}}
        cluster: {{master_port_range_low: 1400, segment_size: null}}
        """
    with caplog.at_level(logging.WARNING):
        load(recipe=write("old.yaml", text))
    (record,) = caplog.records
    assert record.name.startswith("distill.")
    assert set(record.getMessage().partition("ignored: ")[2].split(", ")) == {
        "policy.offload_optimizer_for_logprob",
        "policy.megatron_cfg",
        "policy.dtensor_cfg._v2",
        "policy.dtensor_cfg.lora_cfg",
        "policy.sequence_packing.algorithm",
        "policy.generation.port_range_low",
        "policy.generation.colocated.resources",
        "teacher.generation",
        "teacher.optimizer",
        "data.train.processor",
        "data.train.split_validation_size",
        "env.math.num_workers",
        "logger.monitor_gpus",
        "logger.mlflow_enabled",
        "logger.swanlab",
        "cluster.master_port_range_low",
        "cluster.segment_size",
    }


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("policy.megatron_cfg.enabled=true", "set it to false"),
        ("teacher.megatron_cfg.enabled=true", "set it to false"),
        ("policy.dtensor_cfg.lora_cfg.enabled=true", "set it to false"),
        ("policy.dtensor_cfg.enabled=false", "set it to true"),
        ("teacher.dtensor_cfg.enabled=false", "set it to true"),
        ("policy.dtensor_cfg.custom_parallel_plan=x.y", "keys with values or null"),
        ("policy.generation.colocated.enabled=false", "set it to true"),
        ("policy.generation.vllm_cfg.async_engine=true", "set it to false"),
        ("policy.generation.vllm_cfg.pipeline_parallel_size=2", "set it to 1"),
        ("policy.generation.vllm_cfg.expert_parallel_size=2", "set it to 1"),
        ("distillation.max_rollout_turns=2", "set it to 1"),
        ("data.train.split_validation_size=0.05", "data.validation"),
        ("checkpointing.ft_save_period=3", "checkpointing.save_period"),
        ("checkpointing.is_peft=true", "set it to false"),
    ],
)
def test_a_key_that_would_change_the_meaning_of_a_run_is_refused(word: str, remedy: str) -> None:
    sentence = refusal(word)
    assert sentence.startswith(word + " ")
    assert remedy in sentence.partition(":")[2]


def test_a_temperature_of_the_teachers_own_is_refused() -> None:
    assert load("teacher.generation.temperature=1.0").teacher.model_name == "Qwen/Qwen3-4B"
    sentence = refusal("teacher.generation.temperature=1.0", "policy.generation.temperature=0.6")
    assert "teacher.generation.temperature=1.0 differs from policy.generation.temperature=0.6" in sentence
    assert "loss_fn.temperature" in sentence


# ---- rules across keys -----------------------------------------------------------------------------------------------

CONTEXT = ["distillation.context_distillation.enabled=true", "teacher.model_name=${policy.model_name}"]
TEMPLATE = "distillation.context_distillation.teacher_prefix_template="


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["distillation.num_prompts_per_step=0"], ["distillation.num_prompts_per_step=0 must be at least 1"]),
        (["distillation.topk_logits_k=-1"], ["distillation.topk_logits_k=-1 must be at least 0"]),
        (["loss_fn.token_kl_cap=0"], ["loss_fn.token_kl_cap=0.0 must be above 0"]),
        (["loss_fn.importance_ratio_cap=-1"], ["loss_fn.importance_ratio_cap=-1.0 must be above 0"]),
        (
            ["loss_fn.kl_type=sampled", "loss_fn.temperature=2", "policy.generation.temperature=0.5"],
            ["loss_fn.temperature=2.0 differs from policy.generation.temperature=0.5", "leave loss_fn.temperature out"],
        ),
        (["distillation.val_period=-1"], ["distillation.val_period=-1 must be at least 0"]),
        (["runtime.logits_chunk_rows=0"], ["runtime.logits_chunk_rows=0 must be at least 1"]),
        (["loss_fn.mixed_kl_weight=1.5"], ["loss_fn.mixed_kl_weight=1.5 must be at most 1"]),
        (["loss_fn.mixed_kl_weight=-0.5"], ["loss_fn.mixed_kl_weight=-0.5 must be at least 0"]),
        (["loss_fn.temperature=0"], ["loss_fn.temperature=0.0 must be above 0"]),
        (["policy.generation.temperature=0"], ["policy.generation.temperature=0.0 must be above 0"]),
        (["policy.generation.top_p=1.5"], ["policy.generation.top_p=1.5 must be at most 1"]),
        (["policy.optimizer.kwargs.betas=[0.9, 1.0]"], ["betas=(0.9, 1.0) must be in [0, 1)"]),
        (["policy.model_name="], ["policy.model_name= must be a hub name or a folder"]),
        (
            ["policy.train_global_batch_size=3"],
            ["policy.train_global_batch_size=3 doesn't divide the 8 answers", "num_prompts_per_step=8"],
        ),
        (
            ["policy.dynamic_batching.enabled=true", "policy.sequence_packing.enabled=true"],
            ["policy.dynamic_batching.enabled=true excludes policy.sequence_packing.enabled=true"],
        ),
        (
            ["loss_fn.kl_type=jsd", "loss_fn.jsd_beta=1", "loss_fn.outside_topk=bucket"],
            ["loss_fn.jsd_beta=1", "loss_fn.kl_type=forward"],
        ),
        (["loss_fn.kl_type=jsd", "loss_fn.jsd_beta=0", "loss_fn.outside_topk=bucket"], ["loss_fn.kl_type=reverse"]),
        (["loss_fn.kl_type=jsd", "loss_fn.zero_outside_topk=true"], ["knows no floor", "loss_fn.outside_topk=bucket"]),
        (
            ["policy.generation.max_new_tokens=4097"],
            ["max_new_tokens=4097 exceeds policy.max_total_sequence_length=4096", "at most 4096"],
        ),
        (
            ["policy.generation.vllm_cfg.precision=float32"],
            ["policy.generation.vllm_cfg.precision=float32 differs from policy.precision=bfloat16", "leave it out"],
        ),
        (
            ["policy.generation.vllm_cfg.max_model_len=4095"],
            ["max_model_len=4095 is below policy.max_total_sequence_length=4096", "at least 4096"],
        ),
        (
            ["teacher.max_total_sequence_length=4095"],
            ["teacher.max_total_sequence_length=4095 is below policy.max_total_sequence_length=4096"],
        ),
        (
            ["policy.dtensor_cfg.tensor_parallel_size=3"],
            ["policy.dtensor_cfg.tensor_parallel_size=3", "doesn't divide the 4 ranks", "cluster.gpus_per_node=4"],
        ),
        (
            ["policy.dtensor_cfg.tensor_parallel_size=4", "policy.dtensor_cfg.context_parallel_size=2"],
            ["size=4 * context_parallel_size=2 doesn't divide the 4 ranks", "whose product is 1, 2 or 4"],
        ),
        (["teacher.dtensor_cfg.context_parallel_size=8"], ["teacher.dtensor_cfg", "doesn't divide the 4 ranks"]),
        (
            ["policy.generation.vllm_cfg.tensor_parallel_size=8"],
            ["policy.generation.vllm_cfg.tensor_parallel_size=8 doesn't divide the ranks of a node", "1, 2 or 4"],
        ),
        (
            ["policy.generation.vllm_cfg.tensor_parallel_size=8", "cluster.num_nodes=2"],
            ["policy.generation.vllm_cfg.tensor_parallel_size=8 doesn't divide the ranks of a node", "1, 2 or 4"],
        ),
        (
            ["policy.dtensor_cfg.tensor_parallel_size=8", "cluster.num_nodes=2"],
            ["tensor_parallel_size=8 doesn't divide the ranks of a node (cluster.gpus_per_node=4)", "to 1, 2 or 4"],
        ),
        (
            [
                "policy.dtensor_cfg.tensor_parallel_size=2",
                "teacher.dtensor_cfg.tensor_parallel_size=3",
                "cluster.gpus_per_node=6",
            ],
            ["tensor_parallel_size=3 * context_parallel_size=1 is no multiple of the student's 2", "product is 2 or 6"],
        ),
        (
            [*CONTEXT, "teacher.max_total_sequence_length=4095"],
            ["teacher.max_total_sequence_length=4095 is below policy.generation.max_new_tokens=4096", "at least 4096"],
        ),
        (["cluster.gpu_memory_gb=0"], ["cluster.gpu_memory_gb=0.0 must be above 0"]),
        (["policy.scheduler.2.milestones=[]"], ["policy.scheduler has 2 stages and milestones=[]"]),
        (["policy.scheduler.0.kwargs.total=3"], ["takes no total=3", "total_iters"]),
        (["policy.scheduler.0.kwargs.total_iters=a"], ["takes no total_iters=a"]),
        (["loss_fn={outside_topk: floor, zero_outside_topk: true}"], ["loss_fn.zero_outside_topk=true", "to null"]),
        ([TEMPLATE + "{trace} {nix}"], ["teacher_prefix_template has the unknown placeholder {nix}", "{problem}"]),
        ([TEMPLATE + "{problem.text}"], ["unknown placeholder {problem.text}"]),
        ([TEMPLATE + "{trace!r}"], ["unknown placeholder {trace!r}"]),
        ([TEMPLATE + "{trace:>9}"], ["unknown placeholder {trace:>9}"]),
        ([TEMPLATE + "{problem"], ["teacher_prefix_template has no {problem}", "put it in"]),
        ([TEMPLATE + "{trace}"], ["teacher_prefix_template has no {problem}", "put it in"]),
        (
            ["distillation.context_distillation.enabled=true"],
            [
                "teacher.model_name=Qwen/Qwen3-4B differs from policy.model_name=Qwen/Qwen3-0.6B",
                "mode=self_frozen, where",
                "or the mode to frozen",
            ],
        ),
        (
            [*CONTEXT, "distillation.context_distillation.trace_source=static_dataset"],
            ["static_trace.answer_column=null names no column", "set it to the dataset's column with the traces"],
        ),
        (
            [*CONTEXT, "distillation.context_distillation.static_trace.answer_column=solution"],
            ["static_trace.answer_column=solution is read under", "set it to static_dataset, or the column to null"],
        ),
        (
            [*CONTEXT, "distillation.context_distillation.trace_extractor.type=full_text"],
            ["trace_extractor.type=full_text would show", "set the type to think_tag, or the source to static_dataset"],
        ),
        (["data.train=null"], ["data.train=null leaves nothing to train on", "data.train.data_path"]),
        (["data.train.dataset_name=null"], ["data.train has neither dataset_name nor data_path"]),
        (["data.train={dataset_name: a, data_path: b}"], ["data.train has both dataset_name and data_path"]),
        (["data.train=[{data_path: a}, {}]"], ["data.train.1 has neither dataset_name nor data_path"]),
        (["data.train.repeat=0"], ["data.train.repeat=0 must be at least 1"]),
        (["data.train.env_name=code"], ["data.train.env_name=code is no known judge", "exact, regex, choice or null"]),
        (["data.validation=null"], ["data.validation=null leaves nothing to validate on", "val_period=0"]),
        (["checkpointing.metric_name=accuracy"], ["checkpointing.metric_name=accuracy is neither train:NAME nor val:"]),
        (["checkpointing.checkpoint_must_save_by=4h"], ["checkpoint_must_save_by=4h isn't DD:HH:MM:SS"]),
        (
            ["teacher.model_name=${policy.model_name}"],
            ["is the student itself and reads the same", "distillation.allow_degenerate=true"],
        ),
        (["policy.generation.top_p=0.9"], ["top_p=0.9", "the full one", "distillation.allow_degenerate=true"]),
        (["policy.generation.top_k=5"], ["top_k=5", "distillation.allow_degenerate=true"]),
    ],
)
def test_a_contradiction_is_refused_with_its_remedy(words: list[str], parts: list[str]) -> None:
    sentence = refusal(*words)
    assert all(part in sentence for part in parts), sentence
    assert ":" in sentence  # what follows it is the remedy


@pytest.mark.parametrize(
    "words",
    [
        CONTEXT,
        ["distillation.context_distillation.enabled=true", "distillation.context_distillation.mode=frozen"],
        [*CONTEXT, "teacher.max_total_sequence_length=100", "policy.generation.max_new_tokens=100"],
        [*CONTEXT, TEMPLATE + "{problem} Answer in {{braces}}."],
        [
            *CONTEXT,
            "distillation.context_distillation.trace_source=static_dataset",
            "distillation.context_distillation.static_trace.answer_column=solution",
            "distillation.context_distillation.trace_extractor.type=full_text",
        ],
        ["data.validation=null", "distillation.val_period=0"],
        ["teacher.model_name=${policy.model_name}", "distillation.allow_degenerate=true"],
        ["policy.generation.top_p=0.9", "policy.generation.top_k=5", "distillation.allow_degenerate=true"],
        ["policy.generation.backend=transformers", "policy.generation.vllm_cfg.tensor_parallel_size=8"],
        ["policy.dtensor_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.context_parallel_size=2"],
        ["checkpointing.metric_name=null", "checkpointing.checkpoint_must_save_by=00:03:45:00"],
        ["policy.scheduler=[]"],
    ],
    ids=" ".join,
)
def test_what_only_looks_like_a_contradiction_is_accepted(words: list[str]) -> None:
    load(*words)


# ---- rivals and defaults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outside_topk", "zero_outside_topk", "meaning"),
    [
        (None, None, "bucket"),
        (None, False, "renormalize"),
        (None, True, "floor"),
        ("bucket", None, "bucket"),
        ("renormalize", None, "renormalize"),
        ("floor", None, "floor"),
    ],
)
def test_two_keys_say_what_happens_outside_the_top_k(
    outside_topk: Any, zero_outside_topk: bool | None, meaning: str
) -> None:
    assert LossConfig(outside_topk=outside_topk, zero_outside_topk=zero_outside_topk).outside == meaning


def test_of_the_two_keys_for_the_outside_the_later_set_wins(write: Write) -> None:
    assert load().loss_fn.outside == "renormalize"  # the base recipe: zero_outside_topk false
    child = write("child.yaml", f"defaults: {SMALL}\nloss_fn: {{outside_topk: bucket}}")
    assert load(recipe=child).loss_fn == LossConfig(outside_topk="bucket")
    assert load("loss_fn.zero_outside_topk=true", recipe=child).loss_fn == LossConfig(zero_outside_topk=True)
    assert load("loss_fn.zero_outside_topk=true", "loss_fn.outside_topk=bucket").loss_fn.outside == "bucket"
    assert load("loss_fn.outside_topk=bucket", "loss_fn.zero_outside_topk=true").loss_fn.outside == "floor"


def test_of_a_dataset_name_and_a_path_the_later_set_wins() -> None:
    train = load("data.train.data_path=mine.jsonl").data.train
    assert [(entry.dataset_name, entry.data_path) for entry in train] == [(None, "mine.jsonl")]
    train = load("data.train.data_path=mine.jsonl", "data.train.dataset_name=openai/gsm8k").data.train
    assert [(entry.dataset_name, entry.data_path) for entry in train] == [("openai/gsm8k", None)]


def test_the_references_name_for_own_files_is_no_dataset() -> None:
    (entry,) = load("data.train={dataset_name: ResponseDataset, data_path: mine.jsonl}").data.train
    assert (entry.dataset_name, entry.data_path) == (None, "mine.jsonl")


def test_data_default_fills_only_what_a_dataset_leaves_out(write: Write) -> None:
    text = f"""
        defaults: {SMALL}
        data:
          default: {{prompt_file: p.txt, system_prompt_file: s.txt, input_key: q, data_path: default.jsonl}}
          train:
            - {{data_path: a.jsonl, input_key: question, system_prompt_file: null}}
            - {{dataset_name: openai/gsm8k, repeat: 2}}
          validation: {{split: test}}
        """
    data = load(recipe=write("child.yaml", text)).data
    assert data.train == (
        DatasetConfig(data_path="a.jsonl", input_key="question", prompt_file="p.txt"),
        DatasetConfig(
            dataset_name="openai/gsm8k", input_key="q", prompt_file="p.txt", system_prompt_file="s.txt", repeat=2
        ),
    )
    assert [(entry.dataset_name, entry.split) for entry in data.validation] == [("AIME2024", "test")]
    assert load("data.train.1.repeat=5", recipe=str(write("again.yaml", text))).data.train[1].repeat == 5


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_the_resolved_text_is_a_recipe_of_the_same_configuration(write: Write) -> None:
    words = [
        *CONTEXT,
        TEMPLATE + "{{x}}: {problem} {trace}\n",
        r"logger.wandb.name=costs \${x}",
        "data.validation=[{data_path: a}]",
    ]
    arguments = parse_args(["--config", SMALL, *words, "loss_fn.outside_topk=bucket"])
    assert arguments.config.logger.wandb.name == "costs ${x}"
    assert load(recipe=write("resolved.yaml", arguments.resolved)) == arguments.config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().distillation.seed = 1  # type: ignore[misc]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_help_explains_every_key_with_its_value_and_the_direction_of_each_kl(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_args(["--config", SMALL, "--help", "distillation.seed=1234567"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    flags = {word for line in shown.splitlines() for word in line.split() if word.startswith("--")}
    keys = {f"--{key}" for key in leaves(dataclasses.asdict(Config()))}
    assert len(keys) > 120
    assert keys <= flags, keys - flags
    assert {"--config", "--dry-run", "--help"} <= {flag.strip(",") for flag in flags}
    words = " ".join(shown.replace("│", " ").split())
    assert "forward: KL(teacher || student); reverse: KL(student || teacher)" in words
    assert "(default: 1234567)" in words
    assert "(default: Qwen/Qwen3-0.6B)" in words


def test_help_is_given_for_a_recipe_that_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--config", SMALL, "distillation.topk_logits_k=-1", "-h"])
    assert "--distillation.topk_logits_k INT" in capsys.readouterr().out


def test_every_field_has_a_docstring() -> None:
    bare = []
    for name in ("schema.py", "policy.py"):
        for cls in ast.parse((ROOT / "distill" / "config" / name).read_text()).body:
            if isinstance(cls, ast.ClassDef):
                for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                    said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    if isinstance(field, ast.AnnAssign) and not said:
                        bare.append(f"{name}: {cls.name}.{ast.unparse(field.target)}")
    assert bare == []


def test_reading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = (
        f"import sys; from distill.config import load_config; load_config(['--config', {SMALL!r}]);"
        "print(sorted({'torch', 'transformers', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("metric", "higher", "warns"),
    [
        ("val:forward_kl", "true", True),
        ("val:gsm8k/truncation_rate", "true", True),
        ("train:loss", "true", True),
        ("val:forward_kl", "false", False),
        ("val:accuracy", "true", False),
        ("null", "true", False),
    ],
)
def test_a_metric_that_should_be_low_but_is_ranked_high_is_warned_of(
    caplog: pytest.LogCaptureFixture, metric: str, higher: str, warns: bool
) -> None:
    from distill.build import _check_supported

    _check_supported(load(f"checkpointing.metric_name={metric}", f"checkpointing.higher_is_better={higher}"))
    said = f"checkpointing.metric_name={metric} ranks the highest first"
    assert (said in caplog.text) == warns
