"""Complete error sentences that the program prints for invalid command lines.

Only this test quotes prose. All other tests check keys, values, types and exit codes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.train import main

RECIPE = str(Path(__file__).resolve().parents[1] / "recipes" / "my-distillation-1n4g.yaml")

SENTENCES: list[tuple[list[str], str]] = [
    (
        ["distillation.topk_logit_k=3"],
        "unknown key distillation.topk_logit_k: did you mean distillation.topk_logits_k?",
    ),
    (
        ["policy.temperature=1"],
        "unknown key policy.temperature: did you mean loss_fn.temperature or policy.generation.temperature?",
    ),
    (
        ["qqq.zzz=1"],
        "unknown key qqq: choose distillation, loss_fn, policy, teacher, data, checkpointing, logger, cluster or "
        "runtime",
    ),
    (["distillation.seed"], "distillation.seed has no value: write distillation.seed=value"),
    (["=5"], "=5 is not an override: write key.path=value or --key.path value"),
    (
        ["distillation.max_num_steps=many"],
        "distillation.max_num_steps=many has the wrong type: set it to a whole number",
    ),
    (
        ["loss_fn.kl_type=backward"],
        "loss_fn.kl_type=backward is not a possible value: set it to mixed, forward, reverse, jsd or sampled",
    ),
    (
        ["policy.optimizer.kwargs.betas=[0.9]"],
        "policy.optimizer.kwargs.betas=[0.9] has the wrong type: set it to a list of 2 numbers",
    ),
    (["data.train=[{"], "data.train=[{ is not valid YAML: correct the syntax, or put the value in quotes"),
    (
        ["policy.max_grad_norm=${no.such}"],
        (
            "policy.max_grad_norm has an interpolation that cannot be resolved (Interpolation key "
            "'no.such' not found): correct the expression in ${...}"
        ),
    ),
    (["policy.scheduler.7.name=x"], "policy.scheduler.7 does not exist: use an index in 0..2"),
    (
        ["policy.scheduler=[]", "policy.scheduler.0.name=x"],
        "policy.scheduler.0 does not exist, because policy.scheduler is empty: set policy.scheduler to a complete list",
    ),
    (
        ["distillation.num_prompts_per_step=0"],
        "distillation.num_prompts_per_step=0 is out of range: set it to at least 1",
    ),
    (["policy.generation.top_p=1.5"], "policy.generation.top_p=1.5 is out of range: set it to at most 1"),
    (["policy.model_name="], "policy.model_name= is not allowed: set it to a hub name or a folder"),
    (["runtime.run_dir="], "runtime.run_dir= is not allowed: set it to the name of a folder"),
    (
        ["policy.train_global_batch_size=3"],
        (
            "policy.train_global_batch_size=3 does not divide the 8 responses of a step "
            "(distillation.num_prompts_per_step=8 * distillation.num_generations_per_prompt=1): set it "
            "to a divisor of 8"
        ),
    ),
    (
        ["policy.dynamic_batching.enabled=true", "policy.sequence_packing.enabled=true"],
        (
            "policy.dynamic_batching.enabled=true and policy.sequence_packing.enabled=true cannot be combined: "
            "set one of them to false"
        ),
    ),
    (
        ["policy.generation.max_new_tokens=4097"],
        "policy.generation.max_new_tokens=4097 exceeds policy.max_total_sequence_length=4096: set it to at most 4096",
    ),
    (
        ["policy.generation.vllm_cfg.max_model_len=4095"],
        (
            "policy.generation.vllm_cfg.max_model_len=4095 is below "
            "policy.max_total_sequence_length=4096, so the longest sequences do not fit into the engine: set "
            "policy.generation.vllm_cfg.max_model_len to at least 4096"
        ),
    ),
    (
        ["policy.generation.vllm_cfg.precision=float32"],
        (
            "policy.generation.vllm_cfg.precision=float32 differs from policy.precision=bfloat16: remove "
            "policy.generation.vllm_cfg.precision, so that the engine uses the student's precision"
        ),
    ),
    (
        ["teacher.max_total_sequence_length=4095"],
        (
            "teacher.max_total_sequence_length=4095 is below policy.max_total_sequence_length=4096, but "
            "the teacher reads the student's sequences: set it to at least 4096"
        ),
    ),
    (
        ["policy.dtensor_cfg.tensor_parallel_size=3"],
        (
            "policy.dtensor_cfg.tensor_parallel_size=3 * context_parallel_size=1 does not divide the 4 "
            "ranks (cluster.num_nodes=1 * cluster.gpus_per_node=4): choose sizes with the product 1, 2 "
            "or 4"
        ),
    ),
    (
        ["policy.dtensor_cfg.replicate_size=3"],
        (
            "policy.dtensor_cfg.replicate_size=3 does not divide 4, the number of groups of tensor_parallel_size=1 * "
            "context_parallel_size=1 ranks (cluster.num_nodes=1 * cluster.gpus_per_node=4): set it to 1, 2 or 4"
        ),
    ),
    (
        ["policy.generation.vllm_cfg.tensor_parallel_size=8"],
        (
            "policy.generation.vllm_cfg.tensor_parallel_size=8 does not divide the number of ranks per node "
            "(cluster.gpus_per_node=4): set it to 1, 2 or 4"
        ),
    ),
    (
        [
            "policy.dtensor_cfg.tensor_parallel_size=2",
            "teacher.dtensor_cfg.tensor_parallel_size=3",
            "cluster.gpus_per_node=6",
        ],
        (
            "teacher.dtensor_cfg.tensor_parallel_size=3 * context_parallel_size=1 is not a multiple of "
            "policy.dtensor_cfg.tensor_parallel_size=2 * context_parallel_size=1: choose teacher sizes with the "
            "product 2 or 6"
        ),
    ),
    (
        ["policy.scheduler.0.kwargs.total=3"],
        (
            "policy.scheduler has the invalid argument total=3 for torch.optim.lr_scheduler.LinearLR: "
            "set numbers for end_factor, start_factor, total_iters"
        ),
    ),
    (
        ["policy.scheduler.0.kwargs.total_iters=0"],
        (
            "policy.scheduler has total_iters=0 out of range for torch.optim.lr_scheduler.LinearLR: "
            "set it to a whole number of at least 1"
        ),
    ),
    (
        ["policy.scheduler.2.milestones=[]"],
        (
            "policy.scheduler has 2 stages and milestones=[]: set milestones to one training step for each stage after "
            "the first, in increasing order"
        ),
    ),
    (
        ["loss_fn.kl_type=jsd", "loss_fn.zero_outside_topk=true"],
        (
            "loss_fn.kl_type=jsd cannot be combined with loss_fn.zero_outside_topk=true: "
            "set loss_fn.outside_topk=bucket and remove loss_fn.zero_outside_topk"
        ),
    ),
    (
        ["loss_fn.kl_type=jsd", "loss_fn.jsd_beta=1"],
        (
            "loss_fn.jsd_beta=1.0 is not strictly between 0 and 1, as loss_fn.kl_type=jsd requires: set it between 0 "
            "and 1, or set loss_fn.kl_type=forward"
        ),
    ),
    (
        ["loss_fn.kl_type=sampled", "loss_fn.temperature=2"],
        (
            "loss_fn.temperature=2.0 differs from policy.generation.temperature=1.0, but "
            "loss_fn.kl_type=sampled requires equal temperatures: remove loss_fn.temperature"
        ),
    ),
    (
        ["distillation.context_distillation.teacher_prefix_template={problem} {hint!r}"],
        (
            "distillation.context_distillation.teacher_prefix_template has the unknown placeholder "
            "{hint!r} on line 1: write {problem}, {trace} or the name of a column in braces, or {{hint!r}} for literal"
            " text"
        ),
    ),
    (
        ["distillation.context_distillation.teacher_prefix_template=Be brief."],
        (
            "distillation.context_distillation.teacher_prefix_template does not contain {problem}: add "
            "{problem}, because otherwise the teacher does not read the problem"
        ),
    ),
    (
        ["distillation.context_distillation.enabled=true"],
        (
            "teacher.model_name=Qwen/Qwen3-4B differs from policy.model_name=Qwen/Qwen3-0.6B, but with "
            "distillation.context_distillation.mode=self_frozen the teacher is a copy of the student: "
            "set both to the same model, or set mode to frozen"
        ),
    ),
    (
        [
            "distillation.context_distillation.enabled=true",
            "teacher.model_name=${policy.model_name}",
            "distillation.context_distillation.trace_source=static_dataset",
        ],
        (
            "distillation.context_distillation.static_trace.answer_column=null is missing for "
            "distillation.context_distillation.trace_source=static_dataset: set it to the dataset "
            "column that contains the reasoning traces for the teacher's prompt"
        ),
    ),
    (
        ["distillation.context_distillation.trace_extractor.think_tags=[a, a]"],
        (
            "distillation.context_distillation.trace_extractor.think_tags=['a', 'a'] has a tag that "
            'equals or contains the other: set it to two different tags, such as ["<think>", "</think>"]'
        ),
    ),
    (
        ["data.train=null"],
        "data.train=null provides no training data: set data.train.dataset_name or data.train.data_path",
    ),
    (
        ["data.validation=null"],
        (
            "data.validation=null, but distillation.val_period=20 enables validation: set "
            "data.validation.dataset_name or data.validation.data_path, or disable validation with "
            "distillation.val_period=0, distillation.val_at_start=false, "
            "distillation.val_at_end=false and distillation.probe_period=0"
        ),
    ),
    (
        ["data.train.env_name=code"],
        "data.train.env_name=code is not a grader: set it to math, exact, regex, choice or null",
    ),
    (
        ["checkpointing.metric_name=accuracy"],
        "checkpointing.metric_name=accuracy is not a metric: set it to train:NAME, val:NAME or null",
    ),
    (
        ["checkpointing.checkpoint_must_save_by=4h"],
        (
            "checkpointing.checkpoint_must_save_by=4h is not DD:HH:MM:SS: set it to a duration such as "
            "00:03:45:00, or to null"
        ),
    ),
    (
        ["teacher.model_name=${policy.model_name}"],
        (
            "teacher.model_name=Qwen/Qwen3-0.6B is the student's model and reads the same prompts, so "
            "the student cannot learn from it: choose another teacher, set "
            "distillation.context_distillation.enabled=true, or set distillation.allow_degenerate=true "
            "for a control experiment"
        ),
    ),
    (
        ["policy.generation.top_k=5"],
        (
            "policy.generation.top_k=5 truncates the sampling distribution, but the loss assumes the complete "
            "distribution: set top_p=1 and top_k=null, or distillation.allow_degenerate=true"
        ),
    ),
    (
        ["distillation.max_rollout_turns=2"],
        (
            "distillation.max_rollout_turns=2 is not supported: set it to 1, because the student responds once "
            "to each prompt"
        ),
    ),
    (
        ["policy.megatron_cfg.enabled=true"],
        (
            "policy.megatron_cfg.enabled=true is not supported: set it to false, because training requires "
            "FSDP2 (dtensor_cfg)"
        ),
    ),
    (
        ["teacher.generation.temperature=0.5"],
        (
            "teacher.generation.temperature=0.5 differs from policy.generation.temperature=1.0, but the "
            "loss divides the logits of both models by the same temperature: remove teacher.generation.temperature, "
            "and set loss_fn.temperature to change the temperature of both models in the loss"
        ),
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), SENTENCES, ids=[" ".join(overrides) for overrides, _ in SENTENCES])
def test_an_error_is_printed_as_one_sentence(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", RECIPE, "--dry-run", *overrides]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"error: {sentence}\n")
