"""Command lines and table of the step benchmark, and equal work of both sides of its comparison with TRL."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from distill.config import Config, load_config
from distill.errors import UserError
from scripts import bench_step, peer_trl
from scripts.launch import ROOT

SMOL = ROOT / "models/SmolLM2-135M-Instruct"


@pytest.fixture
def runs(monkeypatch, tmp_path: Path) -> Path:
    """Folder for the files of the benchmark."""
    monkeypatch.setattr(bench_step, "RUN_DIR", tmp_path)
    monkeypatch.setattr(bench_step, "TRAINING", tmp_path / "training")
    return tmp_path


def _main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step", *arguments])
    bench_step.main()


def test_each_rank_generates_the_same_fixed_number_of_tokens(monkeypatch, runs, capsys) -> None:
    configs: dict[int, Config] = {}

    def train(ranks: int, recipe: Sequence[str]) -> list[dict[str, float]]:
        configs[ranks] = load_config(recipe)
        return [{"timing/train/generation": 0.25 * step, "timing/train/policy_training": ranks} for step in (1, 2, 3)]

    monkeypatch.setattr(bench_step, "train", train)
    _main(monkeypatch, "--ranks", "1,2", "--steps", "3", "policy.precision=float32")
    for ranks, config in configs.items():
        loop, generation = config.distillation, config.policy.generation
        assert (generation.stop_token_ids, generation.max_new_tokens, config.policy.precision) == ((), 48, "float32")
        assert loop.num_prompts_per_step * loop.num_generations_per_prompt == 8 * ranks
        assert (config.policy.train_global_batch_size, config.cluster.gpus_per_node) == (8 * ranks, ranks)
        assert loop.max_num_steps == 4
    head, *lines = capsys.readouterr().out.splitlines()[2:]
    assert head.split() == ["1", "rank", "2", "ranks"]
    assert lines[0].split() == ["policy_training", *"1.00 (1.00 to 1.00) 2.00 (2.00 to 2.00)".split()]
    assert lines[1].split() == ["generation", *"0.50 (0.25 to 0.75) 0.50 (0.25 to 0.75)".split()]


def _turn(side: str, seconds: list[float], tokens: float = 900.0, shortest: float = 48) -> bench_step.Turn:
    return bench_step.Turn(side, 48, seconds, [tokens] * len(seconds), shortest)


@pytest.mark.parametrize("peer", [_turn("trl", [1.0], shortest=47), _turn("trl", [1.0], tokens=901)])
def test_sides_with_unequal_work_are_not_compared(peer: bench_step.Turn) -> None:
    bench_step.check_equal_work(_turn("ours", [1.0]), _turn("trl", [1.0]))
    with pytest.raises(SystemExit, match=r"47|901"):
        bench_step.check_equal_work(_turn("ours", [1.0]), peer)


@pytest.mark.parametrize("found", [None, "0.9.0", "1.160.0"])
def test_an_unsupported_trl_is_an_error_in_one_line(found: str | None, monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(bench_step, "version", version)
    monkeypatch.setattr(bench_step, "run", lambda command: pytest.fail("a run was started"))
    with pytest.raises(SystemExit, match=r"^2$"):
        _main(monkeypatch, "--peer", "trl")
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and f": {found or 'none'})" in error and "trl==1.16.*" in error


def test_both_sides_take_turns_with_one_recipe_and_its_overrides(monkeypatch, runs: Path, capsys) -> None:
    sides: list[tuple[str, Config]] = []

    def run(command: list[str]) -> int:
        if "distill.train" in command:
            config = load_config(command[command.index("distill.train") + 1 :])
            length = config.policy.generation.max_new_tokens
            row = {"timing/train/total_step_time": 2.0, "train/total_num_tokens": 500.0}
            line = json.dumps({**row, "train/mean_gen_tokens_per_sample": float(length)}) + "\n"
            (runs / "training").mkdir()
            (runs / "training/metrics.jsonl").write_text(line * 3)
            sides.append(("ours", config))
        else:
            out, weights, *recipe = command[command.index("scripts.peer_trl") + 1 :]
            sides.append(("trl", load_config(recipe)))
            length = sides[-1][1].policy.generation.max_new_tokens
            found = {"seconds": [99.0, 3.0, 5.0], "shortest": [length] * 3, "tokens": [1.0, 500.0, 500.0]}
            assert weights == "bfloat16"
            Path(out).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(bench_step, "run", run)
    monkeypatch.setattr(bench_step, "version", lambda name: "1.16.0")
    override = "policy.train_micro_batch_size=4"
    options = "--peer trl --steps 2 --ranks 4 --new-tokens 48 256 --peer-weights bfloat16".split()
    _main(monkeypatch, override, *options)
    assert [side for side, _ in sides] == ["ours", "trl"] * 4
    configs = [config for _, config in sides]
    assert [config.policy.generation.max_new_tokens for config in configs] == [48] * 4 + [256] * 4
    for config in configs:
        assert config.policy.train_micro_batch_size == 4 and config.policy.generation.stop_token_ids == ()
        assert config.policy.model_name == config.teacher.model_name
        assert (config.distillation.max_num_steps, config.cluster.gpus_per_node) == (3, 4)
    record = json.loads((runs / "bench_peer_trl.json").read_text())
    assert (record["ranks"], record["overrides"]) == (4, [override])
    assert [(t["side"], t["seconds"]) for t in record["turns"]] == [("ours", [2.0] * 2), ("trl", [3.0, 5.0])] * 4
    short, long = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])  # medians 2 and 4: ratio 2
    assert short == ["48", *"2.00 (2.00 to 2.00) 4.00 (3.00 to 5.00) 2.00".split()] and long[1:] == short[1:]


def _config(*overrides: str) -> Config:
    return load_config(bench_step.arguments(bench_step.SAME_SIZE, 2, 3, overrides))


def test_trl_gets_the_batch_sizes_and_lengths_of_the_recipe() -> None:
    found = peer_trl.settings(
        _config("policy.generation.max_new_tokens=256", "policy.precision=bfloat16"), 2, "float32"
    )
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (4, 2)
    assert (found["max_steps"], found["max_completion_length"]) == (4, 256)
    assert found["generation_kwargs"] == {"min_new_tokens": 256}
    assert (found["bf16"], found["learning_rate"], found["gradient_checkpointing"]) == (True, 2e-5, False)
    narrow = peer_trl.settings(_config("policy.precision=bfloat16"), 2, "bfloat16")
    assert narrow["model_init_kwargs"]["dtype"] == "bfloat16" and not narrow["bf16"]  # no autocast
    for refused in ("policy.train_global_batch_size=8", "distillation.num_prompts_per_step=4"):
        with pytest.raises((ValueError, UserError), match="train_global_batch_size"):
            peer_trl.settings(_config(refused), 2, "float32")


def test_trl_reads_our_prompts_in_our_order() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    found = [row["prompt"] for row in peer_trl.rows(_config("data.shuffle=false"), tokenizer)]
    problems = [json.loads(line) for line in (ROOT / "prompts/gsm_train.jsonl").read_text().splitlines()]
    assert len(found) == 4 * 8 * 2 and found[0::2] == found[1::2]
    assert all(problem["question"] in text for text, problem in zip(found[0::2], problems, strict=False))
    assert found != [row["prompt"] for row in peer_trl.rows(_config(), tokenizer)]


def test_the_tokens_of_trl_are_counted_by_step() -> None:
    clock = peer_trl.Clock()
    clock.seconds = [2.0, 1.0]
    logged = {"completions/min_length": 48.0, "completions/max_length": 48.0}
    history = [{"num_tokens": 100.0, **logged}, {"num_tokens": 250.0, **logged}, {"train_runtime": 3.0}]
    found = peer_trl.measured(clock, history)
    assert found == {"seconds": [2.0, 1.0], "shortest": [48.0] * 2, "longest": [48.0] * 2, "tokens": [100.0, 150.0]}
