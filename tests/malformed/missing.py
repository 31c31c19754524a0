"""Files, columns and packages that are missing, and paths of the system before this one."""

from __future__ import annotations

from dataclasses import replace

from tests.malformed.case import Case, Workshop, way


@way
def _old_path(shop: Workshop) -> Case:
    old, names = shop.rng.choice(
        [
            ("data.default.prompt_file=examples/prompts/cot.txt", "data.train.prompt_file"),
            ("data.default.system_prompt_file=examples/prompts/math.txt", "data.train.system_prompt_file"),
            ("data.train.data_path=examples/data/train.jsonl", "data.train.data_path"),
            ("policy.model_name=models/my-student", "policy.model_name"),
            ("teacher.model_name=/p/project1/models/teacher", "teacher.model_name"),
            ("policy.tokenizer.chat_template=examples/templates/chat.jinja", "policy.tokenizer.chat_template"),
            ("checkpointing.resume_from=results/distillation/step_100", "checkpointing.resume_from"),
        ]
    )
    return shop.case(names, old)


@way
def _missing_column(shop: Workshop) -> Case:
    name = "".join(shop.rng.choice("abcxyz_") for _ in range(6))
    key = shop.rng.choice(["input_key", "output_key"])
    return shop.case(f"data.train.{key}={name}", f"data.default.{key}={name}")


@way
def _missing_validation_file(shop: Workshop) -> Case:
    path = shop.folder / "nowhere.jsonl"
    return shop.case("data.validation.data_path", f"data.validation={{data_path: {path}}}", "distillation.val_period=1")


@way
def _absent_package(shop: Workshop) -> Case:
    validation = f"data.validation={{data_path: {shop.root}/problems.jsonl, env_name: math}}"
    package, names, overrides = shop.rng.choice(
        [
            ("wandb", "logger.wandb_enabled", ["logger.wandb_enabled=true"]),
            ("tensorboard", "logger.tensorboard_enabled", ["logger.tensorboard_enabled=true"]),
            ("vllm", "policy.generation.backend", ["policy.generation.backend=vllm"]),
            ("math_verify", "data.validation.env_name", [validation, "distillation.val_period=1"]),
            ("triton", "loss_fn.backend", ["loss_fn.backend=triton"]),
            ("datasets", "data.train.data_path", ["data.train.data_path=owner/name"]),
        ]
    )
    return replace(shop.case(names, *overrides, detail=package), absent=package)
