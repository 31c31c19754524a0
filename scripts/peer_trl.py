"""Measure the optimizer steps of TRL's DistillationTrainer on a recipe; started by ``bench_step --peer trl``.

    torchrun --nproc-per-node 2 -m scripts.peer_trl OUT.json float32 --config recipes/NAME.yaml key.path=value ...

The recipe sets models, prompts and their order, responses per prompt, response length, temperature, AdamW and learning
rate. Every response has the full length. Settings without a counterpart in the recipe have the fastest value that was
measured: see ``settings``. TRL is not a dependency, so it is imported in ``main`` only.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from distill.config import Config, load_config
from distill.data.prompts import PromptOrder, load_prompts
from distill.data.tokenizer import load_tokenizer
from distill.model.hf_files import find_model

MICRO_BATCH_TOKENS = 1024
"""Maximum response tokens of a micro-batch: 8 x 256 take 11 GB per rank, and two half batches take no longer."""


def settings(config: Config, ranks: int, weights: str) -> dict[str, Any]:
    """Return the arguments of TRL's DistillationConfig for the recipe.

    ``weights`` is the dtype of the student's weights, gradients and AdamW state. With float32, as ours, the compute
    uses autocast to the recipe's precision. With bfloat16 there are no casts, but rounding removes most of a small
    update. The teacher has the recipe's precision. Defaults of TRL that only cost time here are disabled: activation
    checkpointing, the search for unused parameters, checkpoints. Raises ValueError if the batch sizes do not fit TRL.
    """
    loop, policy = config.distillation, config.policy
    adamw, responses = policy.optimizer.kwargs, loop.num_prompts_per_step * loop.num_generations_per_prompt
    if responses % ranks or policy.train_global_batch_size != responses:
        raise ValueError(
            f"policy.train_global_batch_size={policy.train_global_batch_size} must be the number of responses "
            f"per step ({responses}) and a multiple of the number of ranks ({ranks}), because TRL takes one optimizer "
            "step per generation"
        )
    fits = max(1, MICRO_BATCH_TOKENS // policy.generation.max_new_tokens)
    micro = max(n for n in range(1, responses // ranks + 1) if responses // ranks % n == 0 and n <= fits)
    cuda = torch.cuda.is_available()
    # On a CPU, sdpa takes 50% longer per generated token, and 20% longer in forward and backward.
    attention = "sdpa" if cuda else "eager"
    return {
        "max_steps": loop.max_num_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": responses // ranks // micro,
        "shuffle_dataset": False,
        "seed": loop.seed,
        "max_completion_length": policy.generation.max_new_tokens,
        # TRL masks all stop tokens up to this length.
        "generation_kwargs": {"min_new_tokens": policy.generation.max_new_tokens},
        "temperature": policy.generation.temperature,
        "beta": 1.0,  # KL(student || teacher): TRL's default; no value is faster
        "use_vllm": False,
        "model_init_kwargs": {"dtype": weights, "attn_implementation": attention},
        "teacher_model_init_kwargs": {"dtype": config.teacher.precision, "attn_implementation": attention},
        "bf16": policy.precision == "bfloat16" and weights == "float32",
        "gradient_checkpointing": policy.dtensor_cfg.recomputation != "none",
        "learning_rate": adamw.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": adamw.weight_decay,
        "adam_beta1": adamw.betas[0],
        "adam_beta2": adamw.betas[1],
        "adam_epsilon": adamw.eps,
        "optim": "adamw_torch_fused",
        "max_grad_norm": policy.max_grad_norm,
        "ddp_find_unused_parameters": False,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def rows(config: Config, tokenizer: Any) -> list[dict[str, str]]:
    """Return the prompt texts of all steps in our order, each repeated per response; TRL tokenizes them."""
    window = min(config.data.max_input_seq_length, config.policy.max_total_sequence_length - 1)
    prompts = load_prompts(config.data.train, tokenizer, window, config.policy.tokenizer.chat_template_kwargs)
    loop = config.distillation
    order = PromptOrder(prompts, loop.num_prompts_per_step, loop.seed, config.data.shuffle)
    found = []
    for prompt in (prompt for step in range(loop.max_num_steps) for prompt in order.batch(step)):
        text = tokenizer.decode(prompt.student_ids)
        assert tuple(tokenizer(text=text)["input_ids"]) == prompt.student_ids, text
        found += [{"prompt": text}] * loop.num_generations_per_prompt
    return found


class Clock(TrainerCallback):
    """Seconds of every optimizer step, from the first generated token to the zeroed gradients, without logging."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the start time of the step."""
        self._start = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the seconds of the step."""
        self.seconds.append(_now() - self._start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(clock: Clock, history: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Return lists by step: seconds, tokens of the shortest and longest response, tokens of all sequences."""
    steps = [entry for entry in history if "completions/min_length" in entry]
    assert len(steps) == len(clock.seconds), (len(steps), len(clock.seconds))
    seen = [0.0, *(entry["num_tokens"] for entry in steps)]
    return {
        "seconds": clock.seconds,
        "shortest": [entry["completions/min_length"] for entry in steps],
        "longest": [entry["completions/max_length"] for entry in steps],
        "tokens": [after - before for before, after in itertools.pairwise(seen)],
    }


def main(argv: Sequence[str]) -> None:
    """Train with the recipe and write the measurements as JSON; all ranks call it."""
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # generation uses transformers
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    out, weights, config = Path(argv[0]), argv[1], load_config(argv[2:])
    student = find_model(config.policy.model_name, "policy.model_name")
    teacher = find_model(config.teacher.model_name, "teacher.model_name")
    ours = config.policy.tokenizer
    tokenizer = load_tokenizer(student, ours.name, "policy.tokenizer.name", ours.chat_template)
    tokenizer.padding_side = "left"
    ranks, clock = config.cluster.num_nodes * config.cluster.gpus_per_node, Clock()
    trainer = DistillationTrainer(
        model=str(student.folder),
        teacher_model=str(teacher.folder),
        args=DistillationConfig(output_dir=str(out.parent / "trl"), **settings(config, ranks, weights)),
        train_dataset=Dataset.from_list(rows(config, tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    assert trainer.accelerator.num_processes == ranks, (trainer.accelerator.num_processes, ranks)
    trainer.train()
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps(measured(clock, trainer.state.log_history)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
