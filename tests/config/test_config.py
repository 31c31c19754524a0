"""Command lines and recipes become one Config, or a UserError with the key and value at fault."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, DatasetConfig, LossConfig, load_config, parse_args, print_flag
from distill.config.load import parent_of
from distill.config.nemo_compat import ONE_VALUE
from distill.config.parse import key_paths
from distill.config.schema import BUILT_IN
from distill.errors import UserError, show

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "recipes" / "my-distillation-1n4g.yaml")
Write = Callable[[str, str], str]


def load(*overrides: str, recipe: str = SMALL) -> Config:
    return load_config(["--config", recipe, *overrides])


@cache
def defaults() -> Config:
    """Return the configuration of the recipe without overrides."""
    return load()


def refusal(*overrides: str, recipe: str = SMALL) -> UserError:
    """Return the error that a command line raises, after checking that it is one sentence."""
    with pytest.raises(UserError) as error:
        load(*overrides, recipe=recipe)
    assert "\n" not in str(error.value)
    assert error.value.fix
    return error.value


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a recipe and returns its path."""

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
def test_an_override_has_several_spellings(words: list[str]) -> None:
    config = load(*words)
    assert config.distillation.max_num_steps == 5
    assert config.distillation.num_prompts_per_step == 8  # other keys of the section keep their values


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("policy.optimizer.kwargs.lr=1e-6", "policy.optimizer.kwargs.lr", 1e-6),
        ("policy.optimizer.kwargs.lr=1", "policy.optimizer.kwargs.lr", 1.0),
        ("distillation.max_num_steps=1e3", "distillation.max_num_steps", 1000),
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
def test_a_value_is_converted_to_the_type_of_its_key(word: str, key: str, value: Any) -> None:
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
    ("words", "key"),
    [
        (["distillation.max_num_steps"], "distillation.max_num_steps"),
        (["--distillation.max-num-steps"], "distillation.max_num_steps"),
        (["--distillation.max-num-steps", "--dry-run"], "distillation.max_num_steps"),
        (["=5"], ""),
        (["~distillation.seed"], ""),
        (["data.train=[{"], "data.train"),
        (["distillation.seed=0x_"], "distillation.seed"),
    ],
)
def test_an_override_without_a_value_is_refused(words: list[str], key: str) -> None:
    error = refusal(*words)
    assert error.key == key
    assert words[0] in str(error)


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_has_two_spellings(flag: str) -> None:
    assert print_flag([flag]) == "--dry-run"
    assert parse_args([flag, "--config", SMALL]) == parse_args([f"--config={SMALL}"])


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--dry-run", "--elsewhere", "distillation.seed=3"]])
def test_a_command_line_without_a_recipe_is_refused_with_the_names_of_the_recipes(flags: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(flags)
    assert caught.value.key == "--config"
    assert "my-distillation-1n4g.yaml" in caught.value.fix and "smollm2-context-cpu.yaml" in caught.value.fix


def test_elsewhere_requires_a_dry_run() -> None:
    with pytest.raises(UserError) as caught:
        parse_args(["--config", SMALL, "--elsewhere"])
    assert caught.value.key == "--elsewhere"
    assert parse_args(["--config", SMALL, "--elsewhere", "--dry-run"]).elsewhere
    assert not parse_args(["--config", SMALL, "--dry-run"]).elsewhere


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_recipe_overrides_its_parents_and_a_later_parent_an_earlier_one(write: Write) -> None:
    write("old/one.yaml", "distillation: {max_num_steps: 1, seed: 1, val_period: 1, topk_logits_k: 1}")
    write("two.yaml", "distillation: {max_num_steps: 2, seed: 2, val_period: 2}")
    write("three.yaml", "defaults: two.yaml\ndistillation: {max_num_steps: 3, seed: 3}")
    child = write("child.yaml", f"defaults: [{SMALL}, old/one.yaml, three.yaml]\ndistillation: {{max_num_steps: 4}}")
    loop = load(recipe=child).distillation
    assert (loop.max_num_steps, loop.seed, loop.val_period, loop.topk_logits_k) == (4, 3, 2, 1)
    assert load("distillation.max_num_steps=5", recipe=child).distillation.max_num_steps == 5


def test_defaults_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    write("old/parent.yaml", f"defaults: {SMALL}\ndistillation: {{seed: 9}}")
    child = write("old/child.yaml", "defaults: parent.yaml\ndistillation: {max_num_steps: 1}")
    monkeypatch.chdir("/")
    assert load(recipe=child).distillation.seed == 9


def test_the_parent_of_a_recipe_has_complete_values(write: Write) -> None:
    write("parent.yaml", f"defaults: {SMALL}\ndistillation: {{seed: 9}}")
    child = write("child.yaml", "defaults: parent.yaml\ndistillation: {seed: 1}")
    name, values = parent_of(Path(child))
    assert name == "parent.yaml" and values["distillation"]["seed"] == 9
    assert values["policy"]["model_name"] == load().policy.model_name
    assert values == json.loads(json.dumps(dataclasses.asdict(load("distillation.seed=9"))))


@pytest.mark.parametrize("text", ["distillation: {seed: 1}", "defaults: missing.yaml", "defaults: 3", "- no recipe"])
def test_a_recipe_without_a_readable_parent_is_compared_with_the_built_in_defaults(text: str, write: Write) -> None:
    name, values = parent_of(Path(write("child.yaml", text)))
    assert name == BUILT_IN and values["distillation"]["seed"] == Config().distillation.seed


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
            reshard_after_forward: false
        """
    config = load(recipe=write("child.yaml", text))
    assert config.policy.optimizer.kwargs.lr == 1e-6
    assert config.policy.optimizer.kwargs.eps == 1e-9
    assert config.teacher.dtensor_cfg.tensor_parallel_size == 2
    assert not config.teacher.dtensor_cfg.reshard_after_forward


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


def test_derived_defaults_follow_their_key(write: Write) -> None:
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
    assert config.teacher.dynamic_batching.logprob_mb_tokens == "auto"
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
def test_precision_auto_is_the_fast_precision_of_the_machine(
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
    ("text", "key"),
    [
        ("distillation: {seed: 1, seed: 2}", "--config"),
        ("distillation: [1", "--config"),
        ("distillation: {seed: 0x_}", "--config"),
        ("- 1", "--config"),
        ("policy: {model_name: '${mul:1,'}", "--config"),
        ("defaults: recipe.yaml", "defaults"),
        ("defaults: nowhere.yaml", "defaults"),
        ("defaults: 3", "defaults"),
        ("policy: {model_name: '${no.such}'}", "policy.model_name"),
        ("policy: {model_name: '${mul:a}'}", "policy.model_name"),
        ("policy: {model_name: '${mul:a,3}'}", "policy.model_name"),
        ("policy: {model_name: '${..model_name}'}", "policy.model_name"),
        ("policy: 3", "policy"),
    ],
)
def test_an_unreadable_recipe_is_refused(write: Write, text: str, key: str) -> None:
    assert refusal(recipe=write("recipe.yaml", text)).key == key


def test_an_error_in_a_recipe_names_the_line_and_the_parent_file(write: Write) -> None:
    assert "line 2" in str(refusal(recipe=write("recipe.yaml", "policy: {}\npolicy: {}")))
    child = refusal(recipe=write("child.yaml", "defaults: nowhere.yaml"))
    assert str(child.value).endswith("/nowhere.yaml") and "child.yaml" in str(child)


def test_a_missing_recipe_is_refused_with_similar_names() -> None:
    error = refusal(recipe=str(ROOT / "recipes" / "my-destillation-1n4g.yaml"))
    assert error.value == str(ROOT / "recipes" / "my-destillation-1n4g.yaml")
    assert "my-distillation-1n4g.yaml" in error.fix


# ---- keys and types --------------------------------------------------------------------------------------------------


def test_an_unknown_key_without_a_similar_one_is_refused_with_the_keys_of_its_section() -> None:
    for word, section in (("cluster.zzz=4", "cluster."), ("zzz.qqq=1", "")):
        names = {key.removeprefix(section).split(".")[0] for key in key_paths() if key.startswith(section)}
        assert names == {name.strip(",") for name in refusal(word).fix.split()} & names


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("loss_fn.kltype=reverse", ["loss_fn.kl_type"]),
        ("distillation.train_global_batch_size=4", ["policy.train_global_batch_size"]),
        ("topk_logits_k=3", ["distillation.topk_logits_k"]),
        ("data.train.datapath=x", ["data.train.data_path"]),
        ("policy.automodel_cfg.enabled=true", ["policy.dtensor_cfg"]),
        ("policy.vllm_kwargs_=3", ["policy.generation.vllm_kwargs"]),
        ("data.train_data_path=x", ["data.train.data_path"]),
        ("data.train.input_column=x", ["data.train.input_key"]),
        ("cluster.gpus=4", ["cluster.gpus_per_node"]),
        ("checkpointing.resume=x", ["checkpointing.resume_from"]),
    ],
)
def test_an_unknown_key_is_refused_with_similar_keys(word: str, meant: list[str]) -> None:
    error = refusal(word)
    assert word.startswith(error.key)
    assert [key for key in key_paths() if key in error.fix.rstrip("?").split()] == meant


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("distillation.max_num_steps=five", "number"),
        ("distillation.max_num_steps=5.5", "number"),
        ("distillation.max_num_steps=true", "number"),
        ("distillation.max_num_steps=null", "number"),
        ("distillation.max_val_samples=all", "null"),
        ("policy.optimizer.kwargs.lr=high", "finite"),
        ("policy.optimizer.kwargs.lr=.nan", "finite"),
        (f"policy.optimizer.kwargs.lr={10**400}", "finite"),
        ("policy.optimizer.kwargs.betas=[0.9]", "2 numbers"),
        ("policy.generation.stop_token_ids=1", "list"),
        ("policy.generation.stop_token_ids=[a]", "number"),
        ("logger.wandb_enabled=maybe", "true"),
        ("logger.wandb_enabled=1", "true"),
        ("policy.generation.vllm_kwargs=3", "keys"),
        ("policy.tokenizer=x", "keys"),
        ("policy.dtensor_cfg.custom_parallel_plan=x.y", "null"),
        ("policy.model_name=null", "text"),
        ("loss_fn.support=both", "teacher or student"),
        ("loss_fn.backend=cuda", "auto, triton or torch"),
        ("policy.precision=fp8", "bfloat16, float32 or auto"),
        ("policy.generation.backend=megatron", "vllm or transformers"),
        ("distillation.context_distillation.mode=ema", "self_frozen"),
        ("distillation.context_distillation.trace_source=x", "static_dataset"),
        ("distillation.context_distillation.overflow_policy=x", "truncate_prefix_from_end"),
        ("distillation.context_distillation.trace_extractor.selection=x", "longest"),
        ("distillation.context_distillation.trace_extractor.missing_trace_policy=x", "drop_sample"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_expected_type(word: str, wanted: str) -> None:
    error = refusal(word)
    assert error.key == word.partition("=")[0]
    assert wanted in error.fix


def test_a_number_in_a_recipe_is_not_text(write: Write) -> None:
    error = refusal(recipe=write("a.yaml", f"defaults: {SMALL}\npolicy: {{model_name: 123}}"))
    assert (error.key, error.value) == ("policy.model_name", 123)


def test_a_dotted_key_in_a_recipe_is_refused_with_the_correct_notation(write: Write) -> None:
    for text, key in (
        ("policy.precision: float32", "policy.precision"),
        ("loss_fn: {token_weights.first: 3}", "loss_fn.token_weights.first"),
    ):
        error = refusal(recipe=write("a.yaml", f"defaults: {SMALL}\n{text}"))
        assert error.key == key and "nested" in error.fix


def test_a_list_entry_that_does_not_exist_is_refused() -> None:
    error = refusal("policy.scheduler.7.name=x")
    assert error.key == "policy.scheduler.7"
    assert "0..2" in error.fix
    assert "list" in refusal("policy.scheduler=[]", "policy.scheduler.0.name=x").fix


# ---- keys of NeMo-RL -------------------------------------------------------------------------------------------------


def test_keys_without_effect_are_named_in_one_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    text = f"""
        defaults: {SMALL}
        policy:
          offload_optimizer_for_logprob: false
          make_sequence_length_divisible_by: ${{mul:2,2}}
          megatron_cfg:
            enabled: false
            offload_optimizer_for_logprob: true
            optimizer: {{lr: 1, clip: "${{policy.max_grad_norm}}"}}
          dtensor_cfg: {{_v2: true, lora_cfg: {{use_triton: false, lora_A_init: uniform}}}}
          sequence_packing: {{algorithm: modified_first_fit_decreasing}}
          generation: {{port_range_low: 3000, colocated: {{enabled: true, resources: {{num_nodes: null}}}}}}
        teacher: {{generation: null, optimizer: {{kwargs: {{lr: 1}}}}, dtensor_cfg: {{lora_cfg: {{enabled: false}}}}}}
        data: {{train: {{processor: math, split_validation_size: 0, seed: 3}}}}
        env: {{math: {{num_workers: 8}}}}
        logger: {{monitor_gpus: true, mlflow_enabled: false, swanlab: {{name: "${{data.train.x}}"}}}}
        cluster: {{master_port_range_low: 1400, segment_size: null}}
        """
    with caplog.at_level(logging.WARNING):
        load(recipe=write("old.yaml", text))
    (record,) = caplog.records
    assert record.name.startswith("distill.")
    assert set(record.getMessage().partition(": ")[2].split(", ")) == {
        "policy.offload_optimizer_for_logprob",
        "policy.make_sequence_length_divisible_by",
        "policy.megatron_cfg",
        "policy.dtensor_cfg._v2",
        "policy.dtensor_cfg.lora_cfg.use_triton",
        "policy.sequence_packing.algorithm",
        "policy.generation.port_range_low",
        "policy.generation.colocated.resources",
        "teacher.generation",
        "teacher.optimizer",
        "teacher.dtensor_cfg.lora_cfg",
        "data.train.processor",
        "data.train.split_validation_size",
        "data.train.seed",
        "env.math.num_workers",
        "logger.monitor_gpus",
        "logger.mlflow_enabled",
        "logger.swanlab",
        "cluster.master_port_range_low",
        "cluster.segment_size",
    }


def test_keys_without_effect_can_be_the_target_of_an_interpolation(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"""
        defaults: {SMALL}
        distillation: {{max_val_samples: "${{.val_batch_size}}"}}
        policy:
          dtensor_cfg: {{cpu_offload: "${{.enabled}}", activation_checkpointing: "${{.sequence_parallel}}"}}
          generation: {{max_new_tokens: "${{teacher.sequence_packing.train_mb_tokens}}"}}
        """
    with caplog.at_level(logging.WARNING):
        config = load(recipe=write("old.yaml", text))
    assert caplog.records == []
    assert config.distillation.max_val_samples == 64
    assert config.policy.dtensor_cfg.cpu_offload and not config.policy.dtensor_cfg.activation_checkpointing
    assert config.policy.generation.max_new_tokens == 4096


@pytest.mark.parametrize("key", ONE_VALUE)
def test_a_key_with_one_possible_value_is_accepted_without_a_warning(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(f"{key}={show(ONE_VALUE[key][0])}") == defaults()
    assert caplog.records == []
    for word, value in (("other", "other"), *([] if ONE_VALUE[key][0] is None else [("null", None)])):
        error = refusal(f"{key}={word}")
        assert (error.key, error.value) == (key, value)


@pytest.mark.parametrize(
    "word",
    [
        "policy.generation.stop_strings=[]",
        "checkpointing.is_peft=0",
        "checkpointing.is_peft=null",
        "data.train.split_validation_size=false",
        "policy.megatron_cfg.enabled=0",
    ],
)
def test_a_value_that_does_not_change_a_run_is_accepted(word: str) -> None:
    assert load(word) == defaults()


@pytest.mark.parametrize(
    ("word", "key", "fault"),
    [
        ("policy.generation.colocated.foo=1", "policy.generation.colocated.foo", "unknown"),
        ("env={math: {zzz: 1}}", "env.math.zzz", "unknown"),
        ("env.code.num_workers=1", "env.code", "unknown"),
        ("env=3", "env", "type"),
        ("env.math=null", "env.math", "type"),
        ("policy.generation.colocated=true", "policy.generation.colocated", "type"),
    ],
)
def test_other_keys_in_a_section_without_effect_are_refused(word: str, key: str, fault: str) -> None:
    error = refusal(word)
    assert error.key == key
    assert fault in error.problem


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("policy.megatron_cfg.enabled=true", True),
        ("teacher.megatron_cfg.enabled=true", True),
        ("teacher.dtensor_cfg.lora_cfg.enabled=true", True),
        ("policy.dtensor_cfg.enabled=1", 1),
        ("policy.generation.vllm_cfg.pipeline_parallel_size=1.0", 1.0),
        ("policy.generation.stop_strings=[a]", ["a"]),
        ("data.train.split_validation_size=0.05", 0.05),
        ("checkpointing.ft_save_period=3", 3),
        ("checkpointing.is_peft=true", True),
    ],
)
def test_a_key_that_would_change_the_meaning_of_a_run_is_refused(word: str, value: Any) -> None:
    error = refusal(word)
    assert (error.key, error.value) == (word.partition("=")[0], value)


def test_a_teacher_temperature_of_its_own_is_refused() -> None:
    assert load("teacher.generation.temperature=1.0").teacher.model_name == "Qwen/Qwen3-4B"
    error = refusal("teacher.generation.temperature=1.0", "policy.generation.temperature=0.6")
    assert (error.key, error.value) == ("teacher.generation.temperature", 1.0)
    assert "loss_fn.temperature" in error.fix


# ---- rules across keys -----------------------------------------------------------------------------------------------

CONTEXT = ["distillation.context_distillation.enabled=true", "teacher.model_name=${policy.model_name}"]
TEMPLATE = "distillation.context_distillation.teacher_prefix_template="


@pytest.mark.parametrize(
    ("words", "key", "value", "bound"),
    [
        (["distillation.topk_logits_k=-1"], "distillation.topk_logits_k", -1, "at least 0"),
        (["distillation.val_period=-1"], "distillation.val_period", -1, "at least 0"),
        (["runtime.logits_chunk_rows=0"], "runtime.logits_chunk_rows", 0, "at least 1"),
        (["loss_fn.token_kl_cap=0"], "loss_fn.token_kl_cap", 0.0, "above 0"),
        (["loss_fn.entry_clip=0"], "loss_fn.entry_clip", 0.0, "above 0"),
        (["loss_fn.importance_ratio_cap=-1"], "loss_fn.importance_ratio_cap", -1.0, "above 0"),
        (["loss_fn.mixed_kl_weight=1.5"], "loss_fn.mixed_kl_weight", 1.5, "at most 1"),
        (["loss_fn.mixed_kl_weight=-0.5"], "loss_fn.mixed_kl_weight", -0.5, "at least 0"),
        (["loss_fn.temperature=0"], "loss_fn.temperature", 0.0, "above 0"),
        (["policy.generation.temperature=0"], "policy.generation.temperature", 0.0, "above 0"),
        (["policy.optimizer.kwargs.betas=[0.9, 1.0]"], "policy.optimizer.kwargs.betas", (0.9, 1.0), "below 1"),
        (["cluster.gpu_memory_gb=0"], "cluster.gpu_memory_gb", 0.0, "above 0"),
        (["data.train.repeat=0"], "data.train.repeat", 0, "at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(words: list[str], key: str, value: Any, bound: str) -> None:
    error = refusal(*words)
    assert (error.key, error.value) == (key, value)
    assert bound in error.fix


JSD = ["loss_fn.kl_type=jsd", "loss_fn.outside_topk=bucket"]
TWO_NODES = "cluster.num_nodes=2"
SIZE = "dtensor_cfg.tensor_parallel_size"
ENGINE_SIZE = "policy.generation.vllm_cfg.tensor_parallel_size"
COLUMN = "distillation.context_distillation.static_trace.answer_column"
EXTRACTOR = "distillation.context_distillation.trace_extractor.type"
LR = "torch.optim.lr_scheduler"


# tests/test_messages.py checks the complete sentences of others for the same recipe.
@pytest.mark.parametrize(
    ("words", "key", "fix"),
    [
        (["loss_fn.kl_type=sampled", "loss_fn.entry_clip=0.05"], "loss_fn.entry_clip", "remove"),
        ([*JSD, "loss_fn.jsd_beta=0"], "loss_fn.jsd_beta", "loss_fn.kl_type=reverse"),
        (["loss_fn={outside_topk: floor, zero_outside_topk: true}"], "loss_fn.zero_outside_topk", "null"),
        ([*CONTEXT, "teacher.max_total_sequence_length=4095"], "teacher.max_total_sequence_length", "4096"),
        ([f"policy.{SIZE}=4", "policy.dtensor_cfg.context_parallel_size=2"], f"policy.{SIZE}", "1, 2 or 4"),
        (["teacher.dtensor_cfg.context_parallel_size=8"], f"teacher.{SIZE}", "1, 2 or 4"),
        ([f"{ENGINE_SIZE}=8", TWO_NODES], ENGINE_SIZE, "1, 2 or 4"),
        ([f"policy.{SIZE}=8", TWO_NODES], f"policy.{SIZE}", "1, 2 or 4"),
        (["policy.scheduler.0.kwargs.total_iters=a"], "policy.scheduler", "total_iters"),
        ([f"policy.scheduler.0.kwargs.total_iters={10**400}"], "policy.scheduler", "whole number"),
        (["policy.scheduler=[{kwargs: {factor: 0.5}}]"], "policy.scheduler", f"{LR}.ConstantLR"),
        ([f"policy.scheduler=[{{name: {LR}.ConstantLR, kwargs: {{factor: 0}}}}]"], "policy.scheduler", "above 0"),
        (["policy.scheduler.2.milestones=[0]"], "policy.scheduler", "milestones"),
        (
            [f"policy.scheduler=[{{name: {LR}.LinearLR, milestones: [1]}}, {{name: {LR}.LinearLR}}]"],
            "policy.scheduler",
            "last entry",
        ),
        (["data.train.output_pattern="], "data.train.output_pattern", "null"),
        (["data.default.prompt_file="], "data.train.prompt_file", "null"),
        (["distillation.context_distillation.ema_decay=1"], "distillation.context_distillation.ema_decay", "self_live"),
        ([*CONTEXT, f"{COLUMN}=solution"], COLUMN, "static_dataset"),
        ([*CONTEXT, f"{EXTRACTOR}=full_text"], EXTRACTOR, "think_tag"),
        (["data.train.dataset_name=null"], "data.train", "exactly one"),
        (["data.train={dataset_name: a, data_path: b}"], "data.train", "exactly one"),
        (["data.train=[{data_path: a}, {}]"], "data.train.1", "exactly one"),
        (
            ["checkpointing.resume_from=checkpoints/a", "checkpointing.enabled=false"],
            "checkpointing.resume_from",
            "checkpointing.enabled=true",
        ),
        (
            ["checkpointing.checkpoint_must_save_by=00:03:45:00", "checkpointing.enabled=false"],
            "checkpointing.checkpoint_must_save_by",
            "checkpointing.enabled=true",
        ),
        (["policy.generation.top_p=0.9"], "policy.generation.top_p", "distillation.allow_degenerate=true"),
    ],
)
def test_a_contradiction_between_keys_is_refused_with_a_fix(words: list[str], key: str, fix: str) -> None:
    error = refusal(*words)
    assert error.key == key
    assert fix in error.fix


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
def test_a_valid_combination_of_keys_is_accepted(words: list[str]) -> None:
    load(*words)


# ---- mutually exclusive keys and defaults ----------------------------------------------------------------------------


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
def test_outside_topk_and_zero_outside_topk_have_one_meaning(
    outside_topk: Any, zero_outside_topk: bool | None, meaning: str
) -> None:
    assert LossConfig(outside_topk=outside_topk, zero_outside_topk=zero_outside_topk).outside == meaning


def test_the_later_of_outside_topk_and_zero_outside_topk_counts(write: Write) -> None:
    assert load().loss_fn.outside == "renormalize"  # the base recipe: zero_outside_topk false
    child = write("child.yaml", f"defaults: {SMALL}\nloss_fn: {{outside_topk: bucket}}")
    assert load(recipe=child).loss_fn == LossConfig(outside_topk="bucket")
    assert load("loss_fn.zero_outside_topk=true", recipe=child).loss_fn == LossConfig(zero_outside_topk=True)
    assert load("loss_fn.zero_outside_topk=true", "loss_fn.outside_topk=bucket").loss_fn.outside == "bucket"
    assert load("loss_fn.outside_topk=bucket", "loss_fn.zero_outside_topk=true").loss_fn.outside == "floor"


def test_the_later_of_dataset_name_and_data_path_counts() -> None:
    train = load("data.train.data_path=mine.jsonl").data.train
    assert [(entry.dataset_name, entry.data_path) for entry in train] == [(None, "mine.jsonl")]
    train = load("data.train.data_path=mine.jsonl", "data.train.dataset_name=openai/gsm8k").data.train
    assert [(entry.dataset_name, entry.data_path) for entry in train] == [("openai/gsm8k", None)]


def test_dataset_name_response_dataset_means_own_files() -> None:
    (entry,) = load("data.train={dataset_name: ResponseDataset, data_path: mine.jsonl}").data.train
    assert (entry.dataset_name, entry.data_path) == (None, "mine.jsonl")


def test_data_default_fills_keys_that_a_dataset_omits(write: Write) -> None:
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


# ---- results ---------------------------------------------------------------------------------------------------------


def test_the_resolved_recipe_loads_as_the_same_configuration(write: Write) -> None:
    words = [
        *CONTEXT,
        TEMPLATE + "{{x}}: {problem} {trace}\n",
        r"logger.wandb.name=costs \${x}",
        "data.validation=[{data_path: a}]",
    ]
    arguments = parse_args(["--config", SMALL, *words, "loss_fn.outside_topk=bucket"])
    assert arguments.config.logger.wandb.name == "costs ${x}"
    assert load(recipe=write("resolved.yaml", arguments.resolved)) == arguments.config


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().distillation.seed = 1  # type: ignore[misc]


def test_every_field_has_a_docstring() -> None:
    missing = []
    for name in ("schema.py", "models.py"):
        for cls in ast.parse((ROOT / "distill" / "config" / name).read_text()).body:
            if isinstance(cls, ast.ClassDef):
                for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                    has_docstring = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    if isinstance(field, ast.AnnAssign) and not has_docstring:
                        missing.append(f"{name}: {cls.name}.{ast.unparse(field.target)}")
    assert missing == []


def test_reading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = (
        f"import sys; from distill.config import load_config; load_config(['--config', {SMALL!r}]);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
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
def test_ranking_a_metric_that_should_be_low_by_its_highest_value_is_warned_of(
    caplog: pytest.LogCaptureFixture, metric: str, higher: str, warns: bool
) -> None:
    from distill.preflight import _warn_of_metric

    _warn_of_metric(load(f"checkpointing.metric_name={metric}", f"checkpointing.higher_is_better={higher}"))
    assert [record.levelname for record in caplog.records if "higher_is_better" in record.getMessage()] == (
        ["WARNING"] if warns else []
    )
