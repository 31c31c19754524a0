"""Trainings by the real program on all ranks: stop and resume, memory against the forecast, tokens per second."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scripts.accept.results import Check, at_most, exactly
from scripts.accept.settings import Context, Settings
from scripts.launch import ROOT

STEPS, STOP_AFTER = 4, 2
MEASURED = re.compile(r"tokens_per_sec|^timing/|^throughput/|^memory/|^timestamp$|^step$|residual")
"""Metrics that differ between equal runs."""
_SINCE_THE_LAST_SYNC = {"train/probe_change", "train/sync_changed_tensors"}
"""Metrics that the first step after a resume cannot know."""
_PROBLEMS = 64


def command(settings: Settings, name: str, size: int, *overrides: str) -> list[str]:
    """Return the arguments of a run of the program; ``size``: number of ranks on all nodes. ``overrides`` come last."""
    folder = settings.runs
    return [
        *("--config", str(ROOT / "recipes/my-distillation-1n4g.yaml")),
        f"policy.model_name={settings.student}",
        f"teacher.model_name={settings.teacher}",
        "distillation.allow_degenerate=true",  # with --model, the teacher is the student
        f"distillation.num_prompts_per_step={2 * size}",
        "distillation.num_generations_per_prompt=2",
        f"policy.train_global_batch_size={4 * size}",
        f"distillation.max_num_steps={STEPS}",
        "distillation.val_period=0",
        "distillation.topk_logits_k=16",
        f"data.default.prompt_file={folder}/prompt.txt",
        "data.default.input_key=question",
        "data.default.output_key=answer",
        f"data.train=[{{data_path: {folder}/problems.jsonl}}]",
        "data.validation=null",
        "policy.scheduler=[]",
        f"runtime.device={settings.device}",
        f"runtime.run_dir={folder}/{name}",
        f"checkpointing.checkpoint_dir={folder}/{name}/checkpoints",
        "checkpointing.metric_name=null",
        "checkpointing.save_consolidated=false",
        "logger.wandb_enabled=false",
        "logger.train_samples_period=1",
        f"logger.num_train_samples_to_print={4 * size}",
        f"cluster.gpus_per_node={settings.ranks}",
        f"cluster.num_nodes={settings.nodes}",
        *overrides,
    ]


def write_problems(folder: Path) -> None:
    """Write short problems, and a prompt file that adds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": f"What is {i} + {i}?", "answer": str(2 * i)}) for i in range(_PROBLEMS)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "prompt.txt").write_text("{}", encoding="utf-8")


def make_small_model(folder: Path) -> None:
    """Write a tiny random model and its tokenizer."""
    from scripts.accept.models import SHAPES, byte_tokenizer, save_model

    save_model(folder, SHAPES["tiny"], 0, "cpu")
    byte_tokenizer(SHAPES["tiny"]["vocab"]).save_pretrained(folder)


def program(context: Context, name: str, *overrides: str) -> str:
    """Run the program on all ranks; return its state, "finished" or "stopped". Raises RuntimeError if it fails."""
    from distill.train import main

    context.use_next_port()
    code = main(command(context.settings, name, context.size, *overrides))
    if code:
        raise RuntimeError(f"python -m distill.train ended with exit code {code}: the log has the reason")
    status = json.loads((context.settings.runs / name / "status.json").read_text(encoding="utf-8"))
    return str(status["state"])


@contextmanager
def stop_after(step: int) -> Iterator[None]:
    """Send SIGTERM to this process after ``step`` steps of the run, as Slurm does before a time limit."""
    from distill.supervise.status import Status

    set_step = Status.set_step

    def stopping(self: Status, done: int) -> None:
        set_step(self, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Status, "set_step", stopping):
        yield


def _prepare(context: Context, *names: str) -> None:
    """Remove earlier runs and write the data, on the first rank; the next collective of the program waits for it."""
    if context.rank == 0:
        for name in names:
            shutil.rmtree(context.settings.runs / name, ignore_errors=True)
        write_problems(context.settings.runs)


def resume(context: Context) -> Iterator[Check]:
    """Stop a run with SIGTERM and resume it: the same prompts in each step, and on a CPU the same metrics."""
    _prepare(context, "complete", "stopped")
    small = context.settings.runs / "model"  # tiny: checkpoints of a large one take minutes and much disk
    if context.rank == 0:
        make_small_model(small)
    precision = "bfloat16" if context.settings.on_gpu else "float32"
    sizes = [
        *(f"policy.model_name={small}", f"teacher.model_name={small}", f"policy.precision={precision}"),
        "policy.max_total_sequence_length=128",
        *("policy.generation.backend=transformers", "policy.generation.max_new_tokens=12"),
        "checkpointing.save_period=100",
    ]
    program(context, "complete", *sizes)
    with stop_after(STOP_AFTER):
        state = program(context, "stopped", *sizes)
    resumed = program(context, "stopped", *sizes)
    if context.rank != 0:
        return
    yield Check("state after SIGTERM is stopped", float(state == "stopped"), "", exactly(1), state)
    yield Check("state after the resume is finished", float(resumed == "finished"), "", exactly(1), resumed)
    yield from compare_runs(context.settings.runs, context.settings.on_gpu)


def compare_runs(folder: Path, on_gpu: bool) -> Iterator[Check]:
    """Compare the run that was stopped with the complete one, step by step."""
    complete, stopped = (prompts_by_step(folder / name) for name in ("complete", "stopped"))
    yield Check("steps with recorded prompts", float(len(complete)), "", exactly(STEPS))
    different = [step for step in sorted(complete | stopped) if complete.get(step) != stopped.get(step)]
    note = f"steps {different}" * bool(different)
    yield Check("steps with other prompts after the resume", float(len(different)), "", exactly(0), note)
    rows = [read_rows(folder / name) for name in ("complete", "stopped")]
    names = different_metrics(*rows)
    note = ", ".join(sorted(names)[:3]) if not on_gpu else "on a GPU, the order of sums differs"
    bound = None if on_gpu else exactly(0)
    yield Check("metrics that differ, bit for bit", float(len(names)), "", bound, note)


def prompts_by_step(run_dir: Path) -> dict[int, list[str]]:
    """Return the prompts of each step in order."""
    found = {}
    for path in (run_dir / "train_samples").glob("step_*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[int(path.stem.removeprefix("step_"))] = [json.loads(line)["prompt"] for line in lines]
    return found


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def different_metrics(complete: list[dict[str, Any]], stopped: list[dict[str, Any]]) -> set[str]:
    """Return the names of metrics that differ in any step, without times and memory."""
    if [row["step"] for row in complete] != [row["step"] for row in stopped]:
        return {"step"}
    found = set()
    for ours, theirs in zip(complete, stopped, strict=True):
        for name in (ours.keys() | theirs.keys()) - _SINCE_THE_LAST_SYNC:
            if not MEASURED.search(name) and ours.get(name) != theirs.get(name):
                found.add(name)
    return found


def train(context: Context) -> Iterator[Check]:
    """Train with the engine that is installed; compare the measured memory of each phase with the forecast."""
    _prepare(context, "train")
    settings = context.settings
    vllm = find_spec("vllm") is not None
    window, new_tokens = (128, 12) if settings.quick else (1024, 960)  # full sequences, as the forecast assumes
    overrides = [
        f"policy.generation.backend={'vllm' if vllm else 'transformers'}",
        *(["policy.generation.vllm_cfg.gpu_memory_utilization=0.5"] if vllm else []),
        f"policy.max_total_sequence_length={window}",
        f"policy.generation.max_new_tokens={new_tokens}",
        "policy.generation.stop_token_ids=[]",
        "checkpointing.enabled=false",
    ]
    program(context, "train", *overrides)
    if context.rank != 0:
        return
    rows = read_rows(settings.runs / "train")
    yield Check("finished steps", float(len(rows)), "", exactly(STEPS), "generation by vLLM" if vllm else "")
    losses = [row["train/loss"] for row in rows]
    wrong = sum(loss is None or not abs(loss) < float("inf") for loss in losses)
    yield Check("steps without a finite loss", float(wrong), "", exactly(0), f"losses {losses}")
    yield from memory(command(settings, "train", context.size, *overrides), rows, settings.on_gpu)


def memory(arguments: list[str], rows: list[dict[str, Any]], on_gpu: bool) -> Iterator[Check]:
    """Compare the peak of each phase over all steps with the forecast; ``rows``: metrics of all steps."""
    import torch

    from distill.config import load_config
    from distill.memory.forecast import PHASES, known_shapes, predict

    config = load_config(arguments)
    student, teacher = known_shapes(config)
    assert student is not None and teacher is not None
    card = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    forecast = predict(config, student, teacher, on_gpu, card)
    for phase in PHASES:
        measured = max(float(row.get(f"memory/{phase}_gib") or 0.0) for row in rows)
        predicted = forecast.total(phase) / 2**30
        note = f"{measured:.2f} GiB measured, {predicted:.2f} GiB predicted"
        if not on_gpu:
            note += "; on a CPU, the process itself is not part of the forecast"
        bound = at_most(1.05) if on_gpu else None
        yield Check(f"{phase}: measured / predicted memory", measured / predicted, "", bound, note)


def speed(context: Context) -> Iterator[Check]:
    """Yield the medians of seconds per phase and of tokens per second, from the training run's metrics."""
    path = context.settings.runs / "train"
    rows = read_rows(path)[1:] if (path / "metrics.jsonl").exists() else []
    names = sorted({name for row in rows for name in row if name.startswith(("timing/", "throughput/"))})
    for name in names:
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        unit = "tokens/s" if "tokens_per_sec" in name else "s" if name.startswith("timing/") else ""
        yield Check(name, statistics.median(values), unit)
