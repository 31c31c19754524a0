"""The complete program on two ranks with tiny models: resume, metrics, exports, and refused inputs."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.checkpoint import ShardsReader, files_of, read_info
from distill.checkpoint.manifest import write_info
from distill.config import print_flag
from distill.run_files import LOCK_FILE, REPORT_FILE
from distill.train import print_dry_run
from tests.helpers import free_port, run_ranks, save_tiny_model
from tests.report.test_page import read_index
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parent.parent

RECIPE = """
defaults: {repo}/recipes/my-distillation-1n4g.yaml
distillation:
  {{num_prompts_per_step: 4, num_generations_per_prompt: 2, max_num_steps: 4, val_period: 0, topk_logits_k: 16}}
loss_fn: {{kl_type: mixed, outside_topk: bucket}}
policy:
  model_name: {root}/student
  precision: float32
  train_global_batch_size: 4
  train_micro_batch_size: 2
  max_total_sequence_length: 64
  optimizer: {{kwargs: {{lr: 1e-3}}}}
  generation: {{backend: transformers, max_new_tokens: 12}}
teacher: {{model_name: {root}/teacher}}
data:
  default: {{prompt_file: {root}/prompt.txt, input_key: question, output_key: answer}}
  train: {{data_path: {root}/problems.jsonl, env_name: null}}
  validation: null
checkpointing: {{checkpoint_dir: {root}/checkpoints, save_period: 2, metric_name: null}}
logger: {{wandb_enabled: false, log_dir: {root}/logs}}
cluster: {{num_nodes: 1, gpus_per_node: 2}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


def make_tiny_run(root: Path) -> Path:
    """Two tiny models with a tokenizer smaller than their embeddings, problems, a prompt file and a recipe."""
    tokenizer = tiny_tokenizer()
    for name, seed, layers in (("student", 1, 2), ("teacher", 2, 3)):
        save_tiny_model(root / name, "qwen3", True, seed=seed, layers=layers)
        tokenizer.save_pretrained(root / name)
    other = tiny_tokenizer(extra=("<|other|>",))
    save_tiny_model(root / "stranger", "qwen3", True)
    other.save_pretrained(root / "stranger")
    for name in ("cut", "half"):
        shutil.copytree(root / "student", root / name)
    weights = load_file(root / "cut/model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:380].clone()  # rank 1's slice is short
    save_file(weights, root / "cut/model.safetensors", metadata={"format": "pt"})
    (root / "half/model.safetensors").rename(root / "half/model-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-2.safetensors"}}
    (root / "half/model.safetensors.index.json").write_text(json.dumps(index))
    traces = ["", *(f"<think>{i} twice</think>" for i in range(1, 10))]
    problems = [
        {"question": f"What is {i} + {i}?", "answer": str(2 * i), "solution": trace} for i, trace in enumerate(traces)
    ]
    long = "What is " + "1 + " * 40 + "1?"  # longer than the window
    problems.append({"question": long, "answer": "41", "solution": ""})
    (root / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (root / "long.jsonl").write_text(json.dumps(problems[-1]) + "\n")
    (root / "few.jsonl").write_text('{"question": "What is 3?", "answer": "3"}\n')
    (root / "numbers.jsonl").write_text('{"question": "What is 3?", "answer": "3", "steps": 1}\n')
    (root / "empty.jsonl").write_text("")
    (root / "prompt.txt").write_text("{}")
    (root / "no-braces.txt").write_text("Solve it.")
    (root / "recipe.yaml").write_text(RECIPE.format(repo=REPO, root=root))
    return root


def _mains(
    ports: Sequence[int], command_lines: Sequence[Sequence[str]], ranks: Sequence[int] = ()
) -> list[tuple[int, str, str]]:
    """Run the program several times on these ranks, each with its own rendezvous: exit code, stdout, stderr.

    ``ranks``: number of ranks of each run, which are the first ones; the other ranks skip it. Empty: all ranks.
    """
    from distill.train import main

    seen = []
    os.umask(0)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for port, argv, count in zip(ports, command_lines, ranks or [size] * len(ports), strict=True):
        if rank >= count:
            seen.append((0, "", ""))
            continue
        os.environ.update(MASTER_PORT=str(port), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(argv)
        seen.append((code, out.getvalue(), err.getvalue()))
    return seen


def _run(command_lines: Sequence[Sequence[str]], ranks: int | Sequence[int] = 2) -> list[list[tuple[int, str, str]]]:
    """Run the program in the same processes, one command line after the other; return the ends of each rank.

    ``ranks``: number of ranks of all runs, or of each run.
    """
    each = [ranks] * len(command_lines) if isinstance(ranks, int) else list(ranks)
    return run_ranks(max(each), _mains, [free_port() for _ in command_lines], command_lines, each)


def mains_of_tiny_run(root: Path, device: str) -> list[tuple[int, str, str]]:
    """A bfloat16 run of two steps on one rank with the fused optimizer, and its resumption to four."""
    overrides = [
        f"runtime.device={device}",
        "cluster.gpus_per_node=1",
        "policy.precision=bfloat16",
        "policy.optimizer.kwargs.fused=true",
    ]
    line = _command(make_tiny_run(root), "one", *overrides)
    return _run([[*line, "distillation.max_num_steps=2"], line], ranks=1)[0]


NO_PAGE = "logger.report=false"
SINCE_THE_LAST_SYNC = {"train/probe_change", "train/sync_changed_tensors"}
"""What a resumed run's first step can't know: its engine has nothing to compare the first sync with."""


MEASURED = re.compile(r"tokens_per_sec|^timing/|^throughput/|^memory/|^timestamp$")
"""Times and memory, which differ between equal runs."""


def _train_rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not MEASURED.search(k)} for row in rows]


def _command(root: Path, name: str, *overrides: str) -> list[str]:
    return [
        *("--config", str(root / "recipe.yaml")),
        f"runtime.run_dir={root}/runs/{name}",
        f"checkpointing.checkpoint_dir={root}/checkpoints/{name}",
        *overrides,
    ]


@pytest.fixture(scope="module")
def runs(root: Path) -> list[list[tuple[int, str, str]]]:
    """One run of four steps; one of two that is resumed to four; others whose teacher is their student; validated ones.

    The validated ones read a hint; one takes three steps, the other takes two and is resumed to three. The last runs
    resume the first one from its checkpoint of step 2, with another number of ranks or in another layout, and their
    own checkpoint without the optimizer.
    """
    same = ["distillation.allow_degenerate=true", f"teacher.model_name={root}/student", "distillation.max_num_steps=1"]
    context = [
        "distillation.context_distillation.enabled=true",
        f"teacher.model_name={root}/student",
        "teacher.max_total_sequence_length=256",
    ]
    another = [
        f"teacher.model_name={root}/teacher",
        "distillation.context_distillation.mode=frozen",
        "distillation.context_distillation.teacher_prefix_template='Hint: {problem}'",
    ]
    extractor = "distillation.context_distillation.trace_extractor"
    none = [f"{extractor}.missing_trace_policy=drop_sample", f"{extractor}.unclosed_span=ignore"]
    validated = [
        "distillation.context_distillation.teacher_prefix_template='Hint: {problem}'",
        *(f"distillation.{key}" for key in ("val_period=2", "val_at_start=true", "val_at_end=true")),
        *(f"distillation.{key}" for key in ("max_val_samples=5", "val_num_generations=2")),
        f"data.validation=[{{data_path: {root}/problems.jsonl, env_name: regex}}, {{data_path: {root}/few.jsonl}}]",
        *(f"checkpointing.{key}" for key in ("metric_name=val:forward_kl", "higher_is_better=true")),
        *(f"checkpointing.{key}" for key in ("save_period=1", "keep_top_k=1")),
        "logger.num_val_samples_to_print=2",
    ]
    middle = f"checkpointing.resume_from={root}/checkpoints/full/step_2"
    sizes = "policy.dtensor_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.context_parallel_size=2"
    few = ["cluster.gpus_per_node=1", "checkpointing.save_optimizer=false", "policy.generation.max_new_tokens=2"]
    one, two, three = (f"distillation.max_num_steps={steps}" for steps in (1, 2, 3))
    return _run(
        [
            _command(root, "full"),
            _command(root, "parted", NO_PAGE, two),
            _command(root, "parted", NO_PAGE),
            _command(root, "same", NO_PAGE, *same),
            _command(root, "context", NO_PAGE, *context, one, "runtime.verify_teacher=false"),
            _command(root, "dropped", NO_PAGE, *context, one, *none),
            _command(root, "validated", NO_PAGE, *context, *validated, three),
            _command(root, "validated in parts", *context, *validated, two),
            _command(root, "validated in parts", *context, *validated, three),
            _command(root, "another's context", NO_PAGE, *context, *another, one),
            _command(root, "on 3", NO_PAGE, middle, "cluster.gpus_per_node=3"),
            _command(root, "split", NO_PAGE, middle, sizes[0], three),
            _command(root, "split", NO_PAGE, middle, sizes[1]),
            _command(root, "weights alone", NO_PAGE, *few, one),
            _command(root, "weights alone", NO_PAGE, *few),
        ],
        [*([2] * 10), 3, 2, 2, 1, 1],
    )


def test_another_number_of_ranks_resumes_from_a_checkpoint(root, runs) -> None:
    """Three ranks divide neither 64 nor 128 rows evenly."""
    code, _, error = runs[0][10]
    assert code == 0 and "resumed from" in error, error
    full, other = _train_rows(root / "runs/full"), _train_rows(root / "runs/on 3")
    assert [row["step"] for row in other] == [1, 2, 3, 4] and other[:2] == full[:2], "the curve so far travels along"
    for ours, theirs in zip(other[2:], full[2:], strict=True):
        for name in ("train/loss", "train/grad_norm", "train/global_valid_toks", "train/lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_another_layout_resumes_from_a_checkpoint(root, runs) -> None:
    """Tensor parallel for the third step and context parallel for the fourth, from a checkpoint of plain FSDP."""
    assert [code for code, _, _ in runs[0][11:13]] == [0, 0], runs[0][11:13]
    full, split = _train_rows(root / "runs/full"), _train_rows(root / "runs/split")
    assert [row["step"] for row in split] == [1, 2, 3, 4]
    for ours, theirs in zip(split, full, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/global_valid_toks", "train/lr", "train/forward_kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


LATER = ("finished", "finished elsewhere", "swept", "changed", "inside", "inside again", "two in one")


@pytest.fixture(scope="module")
def later(root: Path, runs: object) -> dict[str, tuple[int, str, str]]:
    """Starts after the run ``full`` has finished: the same run, changed runs, and another run in its directory."""
    shutil.copytree(root / "checkpoints/full/step_2", root / "checkpoints/sweep/step_2")
    full, swept = _command(root, "full"), [*_command(root, "sweep", NO_PAGE), "policy.optimizer.kwargs.lr=1e-4"]
    swept.append("policy.optimizer.kwargs.fused=true")
    inside = [*_command(root, "inside", NO_PAGE), "checkpointing.checkpoint_dir=null"]
    inside.append(f"checkpointing.resume_from={root}/checkpoints/full/step_2")
    lines = (
        full,
        [*full, f"runtime.run_dir={root}/runs/another"],
        swept,
        [*swept, "checkpointing.allow_changes=true", f"runtime.run_dir={root}/runs/changed"],
        [*inside, "distillation.max_num_steps=3"],
        inside,
        [*full, "checkpointing.enabled=false", "distillation.max_num_steps=2"],
    )
    before = {path: path.read_bytes() for path in (root / "runs/full").rglob("*") if path.is_file()}
    ended = dict(zip(LATER, _run(lines)[0], strict=True))
    assert {
        path: path.read_bytes() for path in (root / "runs/full").rglob("*") if path.name != LOCK_FILE and path.is_file()
    } == {path: content for path, content in before.items() if path.name != LOCK_FILE}
    return ended


def test_a_finished_run_exits_with_code_0_and_one_sentence(root, runs, later) -> None:
    """No file of the run changes, and no run directory of another name is created."""
    for name in ("finished", "finished elsewhere"):
        code, out, error = later[name]
        assert (code, out) == (0, "") and error.count("all 4 steps of this run are finished") == 1, error
    assert not (root / "runs/another").exists() and "are finished" not in runs[0][2][2]


def test_a_run_with_another_learning_rate_does_not_resume(root, later) -> None:
    """A sweep in one checkpoint_dir is refused with both ways to continue; an allowed change is recorded."""
    refused, changed = later["swept"], later["changed"]
    assert refused[0] == 2 and not (root / "runs/sweep").exists()
    sentence = refused[2].splitlines()[-1]
    for words in ("kwargs.lr was 0.001 and is 0.0001", "another checkpointing.checkpoint_dir", "allow_changes=true"):
        assert words in sentence
    assert "fused" not in sentence, "another implementation of the optimizer is the same run"
    assert changed[0] == 0 and "resumed from checkpoint" in changed[2], changed[2]
    assert [row["step"] for row in _train_rows(root / "runs/changed")] == [3, 4], "no metrics of the run before"
    recorded = json.loads((root / "runs/changed/changes.json").read_text())
    assert (2, "policy.optimizer.kwargs.lr was 0.001 and is 0.0001") in [(c["step"], c["what"]) for c in recorded]


def test_checkpoints_are_in_the_run_directory_if_checkpoint_dir_is_null(root, later) -> None:
    """The run starts from a given checkpoint of another directory, and a restart continues its own checkpoints."""
    first, second = later["inside"], later["inside again"]
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert f"resumed from checkpoint {root}/checkpoints/full/step_2 after 2" in first[2]
    assert f"resumed from checkpoint {root}/runs/inside/checkpoints/step_3 after 3" in second[2]
    full, inside = _train_rows(root / "runs/full"), _train_rows(root / "runs/inside")
    assert [row["step"] for row in inside] == [1, 2, 3, 4] and inside[-1]["train/loss"] == full[-1]["train/loss"]


def test_two_runs_in_one_run_directory_are_refused(later) -> None:
    code, _, error = later["two in one"]
    assert code == 2 and "contains the metrics of another run" in error.splitlines()[-1]


def test_resume_is_bit_exact(root, runs) -> None:
    assert [code for code, _, _ in runs[0]] == [0] * 15, runs[0]
    assert "resumed from" in runs[0][2][2]
    full, parted = _train_rows(root / "runs/full"), _train_rows(root / "runs/parted")
    assert [row["step"] for row in full] == [1, 2, 3, 4]
    for name in SINCE_THE_LAST_SYNC:
        parted[2][name] = full[2][name]
    assert full == parted
    check_same_export(*(root / f"checkpoints/{name}/step_4" for name in ("full", "parted")))


def check_same_export(one: Path, other: Path) -> None:
    """The final weights of two checkpoints are equal bit for bit."""
    ours, theirs = (load_file(step / "hf/model.safetensors") for step in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_teacher_is_verified_at_the_first_start_unless_switched_off(runs) -> None:
    first, resumed, switched_off = (runs[0][i][2] for i in (1, 2, 4))
    assert "verified" in first and "verified" not in resumed and "verified" not in switched_off


def test_every_step_has_a_loss_and_all_weights_change(root, runs) -> None:
    rows = _train_rows(root / "runs/full")
    assert all(row["train/loss"] > 0.1 and row["train/grad_norm"] > 0 for row in rows)
    start = load_file(root / "student/model.safetensors")
    end = load_file(root / "checkpoints/full/step_4/hf/model.safetensors")
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_metrics_have_the_documented_names(root, runs) -> None:
    first = json.loads((root / "runs/full/metrics.jsonl").read_text().splitlines()[0])
    names = {
        "train/loss train/grad_norm train/lr train/global_valid_toks train/truncation_rate train/forward_kl",
        "train/reverse_kl train/teacher_topk_mass train/student_topk_mass train/teacher_entropy train/student_entropy",
        "train/mean_gen_tokens_per_sample train/teacher_stop_mass train/sampler_logprob_diff",
        "timing/train/generation timing/train/policy_training timing/train/total_step_time",
        "timing/train/generation_tokens_per_sec",
    }
    assert {name for line in names for name in line.split()} <= first.keys(), first.keys()
    assert first["train/lr"] == pytest.approx(1e-4)  # the warm-up begins at a tenth
    assert first["train/sampler_logprob_diff"] < 1e-4, "the engine does not hold the student's weights"
    measured = {"timestamp", "progress/epoch", "progress/total_tokens", "memory/generation_gib", "memory/peak_gib"}
    assert measured <= first.keys() and first["progress/epoch"] == 0.5 and "throughput/mfu" not in first
    context = json.loads((root / "runs/context/metrics.jsonl").read_text().splitlines()[0])
    assert context["train/context_distillation_trace_coverage"] == 0.0
    assert context["train/context_distillation_valid_samples"] == 8


def test_the_log_shows_the_memory_forecast_at_start_and_the_measured_memory_after_two_steps(root, runs) -> None:
    before, after = runs[0][0][2].split("step 2/4")
    assert before.count("predicted peak memory") == 1 and "2 ranks: dp 2 x cp 1 x tp 1" in before
    (memory,) = re.findall(r"resident memory.*? (\d+\.\d) GiB.*? had (\d+\.\d) GiB.*? is (\d+\.\d) GiB", after)
    resident, before_models, predicted = map(float, memory)
    # models of a few MB in a process that has loaded torch
    assert predicted < 0.1 < before_models <= resident and "resident memory" not in before
    times = [phase for phase, _ in re.findall(r"(\w+) \d+\.\d \((\d+\.\d)\)", after)]
    assert times == ["sync", "generation", "teacher", "training"]
    assert "predicted" not in runs[1][0][2], "only the main rank logs to the console"


def test_a_step_whose_responses_are_all_dropped_warns_and_changes_no_weight(root, runs) -> None:
    assert "step 1 trained" in runs[0][5][2] and "dropped_" in runs[0][5][2]
    row = json.loads((root / "runs/dropped/metrics.jsonl").read_text().splitlines()[0])
    assert row["train/global_valid_seqs"] == row["train/global_valid_toks"] == 0
    assert row["train/context_distillation_dropped_missing_trace"] == 8 and row.get("train/loss") is None
    assert row["train/context_distillation_prefix_truncation_rate"] == 0.0, "no gap in the curve"
    start, end = (
        load_file(root / name)
        for name in ("student/model.safetensors", "checkpoints/dropped/step_1/hf/model.safetensors")
    )
    assert all(torch.equal(start[name], end[name]) for name in start)


def _validations(root: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in _train_rows(root / "runs" / name) if "validation/avg_length" in row]


def test_validation_runs_at_start_periodically_and_at_end_and_not_again_after_a_resume(root, runs) -> None:
    rows = _validations(root, "validated")
    assert [row["step"] for row in rows] == [0, 2, 3]
    parts = _validations(root, "validated in parts")
    at_end = [{name for name in row if "in_context_at_end" in name} for row in parts]
    assert [bool(names) for names in at_end] == [False, True, True], "its first part ended after step 2"
    parts[1] = {name: value for name, value in parts[1].items() if name not in at_end[1]}
    assert parts == rows, "the resumed run is equal bit for bit"
    trained = [row["step"] for row in _train_rows(root / "runs/validated") if "train/loss" in row]
    assert trained == [1, 2, 3]
    folder = root / "runs/validated/validation"
    assert sorted(file.name for file in folder.iterdir()) == [
        "in_context.jsonl",
        "in_context_at_end.jsonl",
        "step_0.jsonl",
        "step_2.jsonl",
        "step_3.jsonl",
    ]


def test_validation_metrics_equal_those_of_the_written_samples(root, runs) -> None:
    for row in _validations(root, "validated"):
        lines = (root / f"runs/validated/validation/step_{row['step']}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == row["validation/num_answers"] == 10, "5 problems, 2 responses each"
        assert len({sample["prompt_id"] for sample in samples}) == 5
        assert [sample["source"] for sample in samples[:4]] == ["problems", "problems", "few", "few"]
        for name in ("forward_kl", "reverse_kl"):
            kls = [kl for sample in samples for kl in sample[name]]
            assert len(kls) == sum(sample["tokens"] for sample in samples)
            assert row[f"validation/{name}"] == pytest.approx(sum(kls) / len(kls), abs=1e-5) and max(kls) > 1e-3
        for source in ("problems", "few"):
            right = [sample["verdict"] == "right" for sample in samples if sample["source"] == source]
            assert row[f"validation/{source}/accuracy"] == sum(right) / len(right)


def test_the_accuracy_in_context_is_measured_once_and_repeated_in_later_validations(root, runs) -> None:
    lines = (root / "runs/validated/validation/in_context.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 10 and all("Hint: What is" in sample["prompt"] for sample in samples)
    right = sum(sample["verdict"] == "right" for sample in samples)
    found = [row["validation/in_context_accuracy"] for row in _validations(root, "validated in parts")]
    assert found == [right / 10] * 3


def test_the_checkpoint_with_the_best_metric_is_kept_and_the_console_shows_samples(root, runs) -> None:
    """The recipe ranks the highest KL first; with the lowest, the newest checkpoint would also be the best."""
    kls = {row["step"]: row["validation/forward_kl"] for row in _validations(root, "validated")}
    assert kls[0] > max(kls[2], kls[3]), "the student learns the hint"
    best = max((2, 3), key=kls.__getitem__)
    assert {path.name for path in (root / "checkpoints/validated").iterdir()} == {LOCK_FILE, "step_3", f"step_{best}"}
    console = runs[0][6][2]
    assert console.count("validation at") == 3
    assert all(console.count(f"problem: What is {problem}?\nresponse: ") == 3 for problem in ("0 + 0", "3"))


def test_a_teacher_identical_to_the_student_gives_no_loss(root, runs) -> None:
    (row,) = _train_rows(root / "runs/same")
    assert abs(row["train/loss"]) < 1e-5
    assert abs(row["train/forward_kl"]) < 1e-5 and abs(row["train/reverse_kl"]) < 1e-5


def test_another_model_can_read_the_context(root, runs) -> None:
    (plain,) = _train_rows(root / "runs/full")[:1]
    (read,) = _train_rows(root / "runs/another's context")
    assert read["train/global_valid_toks"] == plain["train/global_valid_toks"], (
        "the same student generates the same responses"
    )
    assert abs(read["train/forward_kl"] - plain["train/forward_kl"]) > 1e-3, "the same teacher reads another prefix"
    assert read["train/context_distillation_valid_samples"] == 8


def test_only_the_main_rank_logs_to_the_console(runs) -> None:
    main, *others = runs
    assert "step 4/4" in main[0][2] and "run directory" in main[0][2]
    assert all(err == out == "" for other in others for _, out, err in other)


def test_the_run_directory_has_recipe_versions_metrics_and_logs(root, runs) -> None:
    run_dir = root / "runs/full"
    assert "max_num_steps: 4" in (run_dir / "config.yaml").read_text()
    assert json.loads((run_dir / "versions.json").read_text())["torch"] == torch.__version__
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("learning/loss")] == [1, 2, 3, 4]
    for name in ("sync", "generation", "teacher", "training"):
        assert all(event.value > 0 for event in events.Scalars(f"memory/predicted_{name}_gib"))
    assert len(list((run_dir / "logs").glob("rank_*.log"))) == 2


def test_the_layout_of_tensorboard_contains_metrics_of_the_run_once(root, runs) -> None:
    events = EventAccumulator(str(root / "runs/validated in parts/tensorboard"))
    events.Reload()
    (config,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(config.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    tags = [tag for chart in charts.values() for tag in chart.multiline.tag]
    (lengths,) = (series for chart in charts.values() for series in chart.margin.series)
    tags += [f"{tag}$" for tag in (lengths.value, lengths.lower, lengths.upper)]
    scalars = events.Tags()["scalars"]
    fast = ("seconds/checkpointing", "seconds/samples", "seconds/validation")  # omitted below 5 ms
    missing = [tag for tag in tags if not any(re.match(tag, name) for name in scalars) and not tag.startswith(fast)]
    assert len(tags) > 20 and missing == []


def test_samples_of_training_and_validation_have_every_token_and_top_tokens(root, runs) -> None:
    decode = partial(tiny_tokenizer().decode, skip_special_tokens=False)
    run_dir = root / "runs/validated"
    for name in ("train_samples/step_1", "validation/step_0", "validation/step_3", "validation/in_context"):
        rows = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            ids, texts, top = row["token_ids"], row["token_texts"], row["top_tokens"]
            assert len(ids) == len(texts) == row["tokens"] and "".join(texts) == decode(ids)
            assert "".join(texts).startswith(row["answer"])
            if name.endswith("in_context"):
                assert row["forward_kl"] is row["teacher_prompt"] is top is None
                continue
            assert "Hint: What is" in row["teacher_prompt"] != row["prompt"]
            kls = [max(pair) for pair in zip(row["forward_kl"], row["reverse_kl"], strict=True)]
            assert len(top) == min(16, len(ids)) and max(kls) == max(kls[each["at"]] for each in top)
            for likely in (each[model] for each in top for model in ("student", "teacher")):
                probs = [prob for _, _, prob in likely]
                assert len(likely) == 5 and probs == sorted(probs, reverse=True) and sum(probs) <= 1.00001
        assert {row.get("weights_step") for row in rows} == ({1} if name.startswith("train") else {None})


@pytest.mark.parametrize("name", ["full", "validated in parts"])
def test_a_run_ends_with_a_page_of_its_curves_and_responses(root, runs, name) -> None:
    run_dir = root / "runs" / name
    index = read_index((run_dir / REPORT_FILE).read_text(encoding="utf-8"))
    (run,) = index["runs"]
    rows = _train_rows(run_dir)
    assert run["status"] == "finished" and run["ending"].startswith("finished after step")
    assert run["tables"]["train"]["step"] == [row["step"] for row in rows if "train/loss" in row]
    shown = {chart["id"]: [each["name"] for each in chart["series"]] for chart in index["charts"]}
    assert "memory/training_gib" in shown["memory"] and "train/loss" in shown["loss"]
    written = [line for path in run_dir.glob("*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(index["samples"]["set"]) == len(written) > 0
    if name != "full":
        assert shown["accuracy"][:2] == ["validation/accuracy", "pass@2"] and run["positions"]
        assert run["recipe"]["parent"] and run["headline"][0]["label"] == "gap closed"


def test_other_users_cannot_write_to_files_of_a_run(root, runs) -> None:
    """Independent of the umask: _mains starts the runs with umask 0."""
    left = [path for folder in ("runs", "checkpoints") for path in (root / folder).rglob("*")]
    assert {path.suffix for path in left} >= {".log", ".jsonl", ".yaml", ".json", ".safetensors", ".distcp"}
    assert [str(path) for path in left if path.stat().st_mode & 0o002] == []


def test_the_export_is_a_plain_hugging_face_folder(root, runs) -> None:
    folder = root / "checkpoints/full/step_4/hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()
    assert model.generation_config.eos_token_id == 258 and "| steps | 4 |" in (folder / "README.md").read_text()
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    assert sorted(p.name for p in (root / "checkpoints/full").iterdir()) == [LOCK_FILE, "step_2", "step_4"]


def test_the_export_script_writes_the_same_bytes_as_the_run(root, runs, tmp_path, monkeypatch, capsys) -> None:
    from scripts import export_hf

    step, out = root / "checkpoints/full/step_4", tmp_path / "out"
    assert export_hf.main([str(step), str(out)]) == 0
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in (step / "hf").iterdir()) and "model.safetensors" in files
    assert all((out / name).read_bytes() == (step / "hf" / name).read_bytes() for name in files)
    assert export_hf.main([str(step), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half, full = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", out))
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in full.items())
    with monkeypatch.context() as patch:  # without the model: the checkpoint has everything that the export needs
        patch.setattr(export_hf, "find_model", MagicMock(side_effect=AssertionError))
        patch.setattr(export_hf, "load_tokenizer", MagicMock(side_effect=AssertionError))
        assert export_hf.main([str(step), str(tmp_path / "alone")]) == 0
    older = shutil.copytree(step, tmp_path / "older/step_4")
    shutil.rmtree(older / "export_files")
    info = read_info(older)
    del info["stop_token_ids"]
    write_info(older, info, {name: sum_ for name, sum_ in files_of(info).items() if "export_files" not in name})
    assert export_hf.main([str(older), str(tmp_path / "of an older one")]) == 0
    for folder in (tmp_path / "alone", tmp_path / "of an older one"):
        assert all((folder / name).read_bytes() == (out / name).read_bytes() for name in files), folder
    shutil.copytree(step, tmp_path / "step_4")
    os.truncate(tmp_path / "step_4/shards/__1_0.distcp", 100)
    for checkpoint, target, fragment in (
        (step, out, f"{out} exists"),
        (tmp_path, tmp_path / "no", "training_info.json"),
        (tmp_path / "step_4", tmp_path / "no", "shards/__1_0.distcp has 100"),
    ):
        assert export_hf.main([str(checkpoint), str(target)]) == 2 and fragment in capsys.readouterr().err
    assert export_hf.main([str(step), str(tmp_path / "no"), "--model", str(root / "teacher")]) == 2
    assert "--model" in capsys.readouterr().err
    for name, error in (("_slice_file", errno.EACCES), ("read_metadata", errno.EIO)):
        with monkeypatch.context() as patch:
            patch.setattr(ShardsReader, name, MagicMock(side_effect=OSError(error, os.strerror(error))))
            assert export_hf.main([str(step), str(tmp_path / "no")]) == 2
        message = capsys.readouterr().err
        assert str(step) in message and os.strerror(error) in message
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.part").exists()


def test_a_checkpoint_without_optimizer_state_resumes_with_zero_moments_and_a_warning(root, runs) -> None:
    (code, _, _), (again, _, error) = runs[0][13:]
    assert (code, again) == (0, 0) and "save_optimizer=false" in error and "AdamW" in error
    assert [row["step"] for row in _train_rows(root / "runs/weights alone")] == [1, 2, 3, 4]


def test_the_longest_prompt_is_skipped_counted_and_reported(runs) -> None:
    assert "1 of 11 prompts" in runs[0][0][2] and "63 tokens" in runs[0][0][2]


BAD = {
    "an unknown key": (["distillation.topk_logit_k=4"], "distillation.topk_logits_k"),
    "a missing model": (["policy.model_name=./nowhere"], "policy.model_name=./nowhere"),
    "a missing teacher": (["teacher.model_name={root}/nowhere"], "teacher.model_name={root}/nowhere"),
    "a folder without a model": (["policy.model_name={root}/logs"], "policy.model_name={root}/logs"),
    "a missing data file": (["data.train.data_path=nowhere.jsonl"], "nowhere.jsonl"),
    "a missing prompt file": (["data.default.prompt_file=nowhere.txt"], "data.train.prompt_file=nowhere.txt"),
    "a template with an unknown placeholder": (
        [
            "distillation.context_distillation.enabled=true",
            "distillation.context_distillation.teacher_prefix_template='{{problem}} {{hint}}'",
            "teacher.model_name={root}/student",
        ],
        "{hint}",
    ),
    "a template that shows no more": (
        [
            "distillation.context_distillation.enabled=true",
            "distillation.context_distillation.teacher_prefix_template={{problem}}",
            "teacher.model_name={root}/student",
        ],
        "allow_degenerate=true",
    ),
    "a template longer than the window": (
        [
            "distillation.context_distillation.enabled=true",
            "distillation.context_distillation.teacher_prefix_template={{problem}}" + " and so on" * 60,
            "teacher.model_name={root}/student",
        ],
        "teacher_prefix_template has 619",
    ),
    "a missing column of traces": (
        [
            "distillation.context_distillation.enabled=true",
            "distillation.context_distillation.trace_source=static_dataset",
            "distillation.context_distillation.static_trace.answer_column=steps",
            "teacher.model_name={root}/student",
        ],
        "static_trace.answer_column=steps",
    ),
    "a column of traces that holds no texts": (
        [
            "distillation.context_distillation.enabled=true",
            "distillation.context_distillation.trace_source=static_dataset",
            "distillation.context_distillation.static_trace.answer_column=steps",
            "data.train.data_path={root}/numbers.jsonl",
            "teacher.model_name={root}/student",
        ],
        "type int",
    ),
    "an empty validation set": (
        ["data.validation.data_path={root}/empty.jsonl", "distillation.val_period=1"],
        "data.validation: {root}/empty.jsonl is empty",
    ),
    "a missing column": (["data.train.input_key=problem"], "problem"),
    "a world of another size": (["cluster.gpus_per_node=4"], "cluster.gpus_per_node=4"),
    "a group that does not divide": (["policy.dtensor_cfg.tensor_parallel_size=3"], "tensor_parallel_size=3"),
    "prompts that are all too long": (["data.train.data_path={root}/long.jsonl"], "all 1 prompts"),
    "another tokenizer": (["teacher.model_name={root}/stranger"], "vocabularies"),
    "a top-k beyond the vocabulary": (["distillation.topk_logits_k=300"], "distillation.topk_logits_k=300"),
    "a half-downloaded model": (["teacher.model_name={root}/half"], "model-2.safetensors"),
    "a window beyond the model's": (
        ["policy.max_total_sequence_length=600", "teacher.max_total_sequence_length=600"],
        "policy.max_total_sequence_length=600",
    ),
    "weights of another shape": (["policy.model_name={root}/cut"], "model.embed_tokens.weight"),
}

if not torch.cuda.is_available():
    BAD["a device that isn't there"] = (["runtime.device=cuda"], "runtime.device=cuda")


@pytest.fixture(scope="module")
def refusals(root: Path) -> dict[str, tuple[tuple[int, str, str], ...]]:
    lines = [
        [
            *_command(root, what),
            *(o.replace("{root}", str(root)).replace("{{", "{").replace("}}", "}") for o in overrides),
        ]
        for what, (overrides, _) in BAD.items()
    ]
    return dict(zip(BAD, zip(*_run(lines), strict=True), strict=True))


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_sentence_on_all_ranks(root, refusals, what) -> None:
    (code, _, error), (other_code, other_out, other_error) = refusals[what]
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (code, other_code) == (2, 2), error
    assert len(sentences) == 1 and "Traceback" not in error, error
    assert BAD[what][1].replace("{root}", str(root)) in sentences[0], sentences[0]
    assert other_out == other_error == ""
    made = (root / "runs" / what).exists()
    assert not made, "refused before the run directory is made"


def test_a_printed_dry_run_is_the_same_recipe_again(root, capsys) -> None:
    printed = []
    for recipe, flag in (("recipe.yaml", "--dry-run"), ("resolved.yaml", "--dry_run")):
        words = ["--config", str(root / recipe), flag]
        assert print_flag(words)
        print_dry_run(words)
        printed.append(capsys.readouterr().out)
        (root / "resolved.yaml").write_text(printed[0])
    recipes = [[line for line in text.splitlines() if not line.startswith("#")] for text in printed]
    assert "max_num_steps: 4" in printed[0] and recipes[0] == recipes[1]
