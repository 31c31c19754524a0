"""Measure generation of SmolLM2-135M by vLLM without and with n-gram speculation.

    python -m scripts.bench_speculation [--running 1 8 64] [--new-tokens 128] [--turns 2] [key.path=value ...]

Each turn starts one process without and one with speculation, so a busy machine slows both. Each generates responses to
math problems of prompts/gsm_train.jsonl at temperature 1, with the recipe's stop tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from distill.config import Config, load_config
from distill.distributed.world import World
from distill.model.checksum import BitSums, bit_sums_by_name
from distill.model.hf_files import find_model
from distill.rollout.factory import build_engine, check_backend
from distill.rollout.vllm_speculation import KEY
from distill.types import Problem, Prompt, Sampling
from scripts.launch import ROOT, run, torchrun

MODEL = "models/SmolLM2-135M-Instruct"
OUT = ROOT / "runs" / "bench_speculation.json"


class StoredWeights:
    """The weights of a model's directory, as a sync sends them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors, self._sums = tensors, bit_sums_by_name(tensors.items())

    def with_sums(self) -> Any:
        """Yield (name, tensor, checksums)."""
        sums: dict[str, BitSums] = self._sums
        return ((name, tensor, sums[name]) for name, tensor in self._tensors.items())


class DraftCounter:
    """Counts the draft tokens that vLLM verifies, and those that it accepts, from now on."""

    def __init__(self, engine: Any) -> None:
        scheduler = engine._engine.engine_core.engine_core.scheduler
        self.proposed = self.accepted = 0
        record = scheduler.make_spec_decoding_stats

        def count(stats: Any, **numbers: Any) -> Any:
            self.proposed += numbers["num_draft_tokens"]
            self.accepted += numbers["num_accepted_tokens"]
            return record(stats, **numbers)

        scheduler.make_spec_decoding_stats = count


def config_of(speculative: str, overrides: Sequence[str]) -> Config:
    """Return the recipe of the measurement; ``speculative``: ngram or null."""
    recipe = ["--config", str(ROOT / "recipes/smollm2-distillation-cpu.yaml"), f"policy.model_name={MODEL}"]
    return load_config(
        [*recipe, "cluster.gpus_per_node=1", "distillation.allow_degenerate=true", f"{KEY}={speculative}", *overrides]
    )


def prompts_of(number: int) -> list[Prompt]:
    """Return the first problems of the training file as prompts of SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    lines = (ROOT / "prompts/gsm_train.jsonl").read_text().splitlines()[:number]
    chats = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return [Prompt(i, tuple(own), Problem("")) for i, own in enumerate(ids)]


def measure(running: Sequence[int], new_tokens: int, config: Config) -> list[dict[str, float]]:
    """Return tokens per second and counts of draft tokens for each number of running responses."""
    world = World()
    world.build_mesh("cpu" if config.runtime.device == "cpu" else "cuda", 1, 1)
    files = find_model(config.policy.model_name, "policy.model_name")
    check_backend(config, files, world)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    engine = build_engine(config, files, world, len(tokenizer))
    engine.wake("weights")
    engine.sync(StoredWeights({name: files.tensor(name) for name in files.files}), 0)
    engine.wake("kv")
    sampling = Sampling(temperature=1.0, max_new_tokens=new_tokens, stop_token_ids=(int(tokenizer.eos_token_id),))
    prompts = prompts_of(max(8, *running))
    engine.generate(prompts[:2], sampling, 0)  # warm-up
    counter, rows = DraftCounter(engine), []
    for number in running:
        before, tokens, started = (counter.proposed, counter.accepted), 0, time.monotonic()
        for first in range(0, max(8, number), number):
            batch = prompts[first : first + number]
            tokens += sum(len(rollout.response_ids) for rollout in engine.generate(batch, sampling, 1))
        seconds = time.monotonic() - started
        row = {"running": number, "tokens": tokens, "seconds": seconds}
        rows.append(row | {"proposed": counter.proposed - before[0], "accepted": counter.accepted - before[1]})
    engine.close()
    return rows


def main() -> None:
    """Run all turns and print a table, or one turn in a process of torchrun."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 64], help="responses generated at once")
    parser.add_argument("--new-tokens", type=int, default=128, help="maximum number of tokens of a response")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--side", choices=["ngram", "null"], help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.side:
        found = measure(arguments.running, arguments.new_tokens, config_of(arguments.side, overrides))
        OUT.write_text(json.dumps(found))
        return
    OUT.parent.mkdir(exist_ok=True)
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(arguments.turns):
        for side in ("null", "ngram"):
            words = ["--side", side, "--new-tokens", str(arguments.new_tokens)]
            words += ["--running", *map(str, arguments.running)]
            if code := run(torchrun(1, "-m", "scripts.bench_speculation", *words, *overrides)):
                sys.exit(code)
            for row in json.loads(OUT.read_text()):
                rows.setdefault((side, int(row["running"])), []).append(row)
    print(f"{'running':>8} {'tokens/s':>12} {'with ngram':>12} {'ratio':>6} {'accepted':>9} {'per response':>13}")
    for number in arguments.running:
        plain, ngram = rows["null", number], rows["ngram", number]
        speeds = [statistics.median(row["tokens"] / row["seconds"] for row in side) for side in (plain, ngram)]
        proposed, accepted, tokens = (sum(row[key] for row in ngram) for key in ("proposed", "accepted", "tokens"))
        share = f"{100 * accepted / max(1, proposed):.0f}%"
        steps = tokens / max(1, tokens - accepted)
        print(f"{number:8} {speeds[0]:12.1f} {speeds[1]:12.1f} {speeds[1] / speeds[0]:6.2f} {share:>9} {steps:13.2f}")
    print("accepted: share of the draft tokens; per response: mean number of tokens of a response per step")


if __name__ == "__main__":
    main()
