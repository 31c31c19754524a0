"""The benchmark's command line is one that the program takes, and both sides of a comparison do the same work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from distill.config import load_config
from distill.errors import UserError
from scripts import bench_step, peer_trl
from scripts.launch import ROOT

SMOL = ROOT / "models/SmolLM2-135M-Instruct"


def test_the_benchmark_generates_a_fixed_number_of_tokens(monkeypatch) -> None:
    seen: list[list[str]] = []

    def stop(command: list[str]) -> int:
        seen.append(command)
        return 3

    monkeypatch.setattr(bench_step, "run", stop)
    with pytest.raises(SystemExit, match="3"):
        bench_step.measure(2, 10, ["policy.precision=float32"])
    arguments = seen[0][seen[0].index("distill.train") + 1 :]
    config = load_config(arguments)
    assert config.policy.generation.stop_token_ids == () and config.policy.generation.max_new_tokens == 48
    assert (config.distillation.num_prompts_per_step, config.distillation.num_generations_per_prompt) == (8, 2)
    assert config.distillation.max_num_steps == 11 and config.policy.precision == "float32"


def turn(
    side: str, new_tokens: int, seconds: list[float], tokens: float = 900.0, shortest: float = 0
) -> bench_step.Turn:
    return bench_step.Turn(side, new_tokens, seconds, [tokens] * len(seconds), shortest or new_tokens)


def test_ranks_have_the_same_work_each_and_stand_side_by_side(monkeypatch, tmp_path, capsys) -> None:
    """With a stand-in for the runs: what they are told, and what is made of their metrics."""
    told: dict[int, list[str]] = {}

    def fake(ranks: int, recipe: Sequence[str]) -> list[dict[str, float]]:
        told[ranks] = list(recipe)
        return [{"timing/train/generation": 0.25 * step, "timing/train/policy_training": ranks} for step in (1, 2, 3)]

    monkeypatch.setattr(bench_step, "train", fake)
    monkeypatch.setattr(bench_step, "RUN_DIR", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_step", "--ranks", "1,2", "--steps", "3"])
    bench_step.main()
    for ranks, recipe in told.items():
        config = load_config(recipe)
        answers = config.distillation.num_prompts_per_step * config.distillation.num_generations_per_prompt
        assert (answers, config.policy.train_global_batch_size) == (8 * ranks, 8 * ranks)
        assert config.cluster.gpus_per_node == ranks
    head, *lines = capsys.readouterr().out.splitlines()[2:]
    assert head.split() == ["1", "rank", "2", "ranks"]
    assert lines[0].split() == ["policy_training", *"1.00 (1.00 to 1.00) 2.00 (2.00 to 2.00)".split()]
    assert lines[1].split() == ["generation", *"0.50 (0.25 to 0.75) 0.50 (0.25 to 0.75)".split()]


def test_the_table_divides_the_peers_median_by_ours_at_each_length() -> None:
    turns = [
        turn("ours", 48, [1.0, 2.0, 9.0]),
        turn("trl", 48, [7.0, 6.0, 5.0]),
        turn("ours", 48, [4.0, 3.0, 8.0]),
        turn("trl", 48, [7.0, 7.0, 8.0]),
        turn("ours", 256, [10.0]),
        turn("trl", 256, [5.0]),
    ]
    head, short, long = bench_step.table(turns).splitlines()
    assert head.split() == ["new", "tokens", "ours", "trl", "trl", "/", "ours"]
    assert short.split() == ["48", "3.50", "(1.00", "to", "9.00)", "7.00", "(5.00", "to", "8.00)", "2.00"]
    assert long.split() == ["256", "10.00", "(10.00", "to", "10.00)", "5.00", "(5.00", "to", "5.00)", "0.50"]


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (turn("trl", 48, [1.0], shortest=47), "trl: an answer has 47 tokens, not 48"),
        (turn("trl", 48, [1.0], tokens=901), "the tokens of the steps differ"),
    ],
    ids=["a short answer", "another prompt"],
)
def test_unequal_work_is_no_comparison(peer: bench_step.Turn, message: str) -> None:
    bench_step.check_equal_work(turn("ours", 48, [1.0]), turn("trl", 48, [1.0]))
    with pytest.raises(SystemExit, match=message):
        bench_step.check_equal_work(turn("ours", 48, [1.0]), peer)


@pytest.mark.parametrize("found", [None, "0.9.0", "1.160.0"])
def test_without_its_peer_it_says_in_one_sentence_what_to_install(found: str | None, monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(bench_step, "version", version)
    monkeypatch.setattr(bench_step, "run", lambda command: pytest.fail("nothing may start"))
    monkeypatch.setattr(sys, "argv", ["bench_step", "--peer", "trl"])
    with pytest.raises(SystemExit, match=r"^2$"):
        bench_step.main()
    out, said = capsys.readouterr()
    assert out == "" and said.count("\n") == 1 and f"found {found or 'none'}:" in said
    assert "`pip install --no-deps 'trl==1.16.*'`" in said


@pytest.fixture
def runs(monkeypatch, tmp_path: Path) -> Path:
    """A folder for what the benchmark leaves."""
    monkeypatch.setattr(bench_step, "RUN_DIR", tmp_path)
    monkeypatch.setattr(bench_step, "TRAINING", tmp_path / "training")
    return tmp_path


def test_both_sides_take_turns_on_one_recipe_with_the_users_overrides(monkeypatch, runs: Path, capsys) -> None:
    seen: list[tuple[str, list[str]]] = []

    def fake(command: list[str]) -> int:
        if "distill.train" in command:
            seen.append(("ours", command[command.index("distill.train") + 1 :]))
            length = load_config(seen[-1][1]).policy.generation.max_new_tokens
            row = {
                "timing/train/total_step_time": 2.0,
                "train/total_num_tokens": 500.0,
                "train/mean_gen_tokens_per_sample": float(length),
            }
            (runs / "training").mkdir()
            (runs / "training/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
            return 0
        out, weights, *recipe = command[command.index("scripts.peer_trl") + 1 :]
        assert weights == "bfloat16"
        seen.append(("trl", recipe))
        length = load_config(recipe).policy.generation.max_new_tokens
        found = {"seconds": [99.0, 3.0, 5.0], "shortest": [length] * 3, "tokens": [1.0, 500.0, 500.0]}
        Path(out).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(bench_step, "run", fake)
    monkeypatch.setattr(bench_step, "version", lambda name: "1.16.0")
    overrides = ["policy.train_micro_batch_size=4", "policy.generation_batch_size=16"]
    options = [
        "--peer",
        "trl",
        "--steps",
        "2",
        "--ranks",
        "4",
        "--new-tokens",
        "48",
        "256",
        "--peer-weights",
        "bfloat16",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_step", *overrides, *options])
    bench_step.main()

    assert [side for side, _ in seen] == ["ours", "trl"] * 4
    configs = [load_config(recipe) for _, recipe in seen]
    assert [config.policy.generation.max_new_tokens for config in configs] == [48] * 4 + [256] * 4
    for config in configs:
        assert config.policy.train_micro_batch_size == 4 and config.policy.generation_batch_size == 16
        assert config.policy.model_name == config.teacher.model_name == "models/SmolLM2-135M-Instruct"
        assert config.policy.generation.stop_token_ids == () and not config.distillation.context_distillation.enabled
        assert (config.distillation.max_num_steps, config.cluster.gpus_per_node) == (3, 4)
    record = json.loads((runs / "bench_peer_trl.json").read_text())
    assert record["ranks"] == 4 and record["overrides"] == overrides
    assert [(t["side"], t["seconds"]) for t in record["turns"]] == [("ours", [2.0] * 2), ("trl", [3.0, 5.0])] * 4
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-2:]] == ["2.00", "2.00"]


def peer_config(*overrides: str):
    return load_config(bench_step.arguments(bench_step.SAME_SIZE, 2, 3, overrides))


def test_the_peer_does_the_recipes_work() -> None:
    narrow = "policy.precision=bfloat16"
    found = peer_trl.settings(peer_config("policy.generation.max_new_tokens=256", narrow), 2, "float32")
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (4, 2)
    assert found["max_steps"] == 4 and found["max_completion_length"] == 256
    assert found["generation_kwargs"] == {"min_new_tokens": 256}, "an answer could end early"
    assert (found["bf16"], found["learning_rate"], found["gradient_checkpointing"]) == (True, 2e-5, False)
    assert not peer_trl.settings(peer_config("policy.precision=float32"), 2, "float32")["bf16"]
    short = peer_trl.settings(peer_config(), 2, "float32")
    assert (short["per_device_train_batch_size"], short["gradient_accumulation_steps"]) == (8, 1)
    plain = peer_trl.settings(peer_config(narrow), 2, "bfloat16")
    assert plain["model_init_kwargs"]["dtype"] == "bfloat16" and not plain["bf16"], "bfloat16 weights need no autocast"
    for refused in ("policy.train_global_batch_size=8", "distillation.num_prompts_per_step=4"):
        with pytest.raises((ValueError, UserError), match="train_global_batch_size"):
            peer_trl.settings(peer_config(refused), 2, "float32")


def test_the_peer_reads_our_prompts_in_our_order() -> None:
    from transformers import AutoTokenizer

    assert (SMOL / "config.json").is_file(), "make models"
    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    found = [row["prompt"] for row in peer_trl.rows(peer_config("data.shuffle=false"), tokenizer)]
    problems = [json.loads(line) for line in (ROOT / "prompts/gsm_train.jsonl").read_text().splitlines()]
    assert len(found) == 4 * 8 * 2 and found[0::2] == found[1::2]
    assert all(problem["question"] in text for text, problem in zip(found[0::2], problems, strict=False))
    assert found != [row["prompt"] for row in peer_trl.rows(peer_config(), tokenizer)]


def test_the_peers_tokens_are_counted_by_step() -> None:
    clock = peer_trl.Clock()
    clock.seconds = [2.0, 1.0]
    logged = {"completions/min_length": 48.0, "completions/max_length": 48.0}
    history = [{"num_tokens": 100.0, **logged}, {"num_tokens": 250.0, **logged}, {"train_runtime": 3.0}]
    found = peer_trl.measured(clock, history)
    assert found == {"seconds": [2.0, 1.0], "shortest": [48.0] * 2, "longest": [48.0] * 2, "tokens": [100.0, 150.0]}


@pytest.mark.slow
@pytest.mark.skipif(bench_step.missing_peer() is not None, reason="TRL is no dependency of ours, and is not installed")
def test_a_tiny_step_runs_on_both_sides(runs: Path, capsys) -> None:
    assert (SMOL / "config.json").is_file(), "make models"
    few = ["distillation.num_prompts_per_step=2", "policy.train_global_batch_size=4"]
    bench_step.compare(2, 1, 1, [4], few)
    record = json.loads((runs / "bench_peer_trl.json").read_text())
    assert [t["side"] for t in record["turns"]] == ["ours", "trl"] and record["versions"]["trl"].startswith("1.16.")
    assert all(len(t["seconds"]) == 1 and t["shortest"] == 4 for t in record["turns"])
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "4"
