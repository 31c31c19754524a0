"""Measure the seconds of each phase of a training step, or compare a step with TRL's DistillationTrainer.

    python -m scripts.bench_step [--ranks 2 | --ranks 1,2] [--steps 10] [key.path=value ...]
    python -m scripts.bench_step [key.path=value ...] --peer trl [--steps 3] [--turns 2] [--new-tokens 48 256]

The recipe is context self-distillation of SmolLM2-135M in bfloat16, with 8 responses of 48 tokens per rank. There are
no stop tokens, so every step generates the same number of tokens. With several numbers of ranks, each rank has the same
work. Additional time on more ranks is then time to wait for other ranks, or for shared hardware.

``--peer trl`` trains SmolLM2-135M with a copy of itself as teacher, which costs as much as any teacher of its size.
Both sides use the same prompts, response lengths and number of ranks, and read one recipe with its overrides;
peer_trl.py has the settings of TRL for generation, packing and sharding. They run in turns, so a busy machine slows
both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from distill.metrics.names import TIMING
from distill.metrics.sinks import read_metrics
from distill.metrics.summary import Row
from distill.run_files import METRICS_FILE
from scripts.launch import ROOT, run, torchrun

RUN_DIR = ROOT / "runs" / "bench_step"
TRAINING = RUN_DIR / "training"
"""Run directory of each measured run; emptied before the run."""

TRL = "1.16."
"""Prefix of the TRL versions that peer_trl.py supports."""
VERSIONS = ("torch", "transformers", "trl")
SAME_SIZE = (
    *("--config", "recipes/smollm2-distillation-cpu.yaml"),
    "policy.model_name=models/SmolLM2-135M-Instruct",
    "policy.optimizer.kwargs.lr=2e-5",
    "distillation.allow_degenerate=true",
)


@dataclass(frozen=True)
class Turn:
    """Measurements of one run of one side. Lists have one value per step, without the first step."""

    side: str
    """``ours`` or ``trl``."""
    new_tokens: int
    """Required number of tokens per response."""
    seconds: list[float]
    tokens: list[float]
    """Number of tokens of all prompts and responses."""
    shortest: float
    """Number of tokens of the shortest response over all steps (ours: smallest mean of a step)."""


def arguments(recipe: Sequence[str], ranks: int, steps: int, overrides: Sequence[str]) -> list[str]:
    """Return the command line of a recipe: one additional step as warm-up, no checkpoints, no stop tokens."""
    return [
        *recipe,
        f"distillation.max_num_steps={steps + 1}",
        f"cluster.gpus_per_node={ranks}",
        f"runtime.run_dir={TRAINING}",
        "policy.generation.stop_token_ids=[]",
        "checkpointing.enabled=false",
        *overrides,
    ]


def train(ranks: int, recipe: Sequence[str]) -> Sequence[Row]:
    """Run distill.train; return the metrics of every step without the first. Exits with the run's code if it fails."""
    shutil.rmtree(TRAINING, ignore_errors=True)
    if code := run(torchrun(ranks, "-m", "distill.train", *recipe)):
        sys.exit(code)
    return read_metrics(TRAINING / METRICS_FILE)[1:]


def measure(ranks: int, steps: int, overrides: Sequence[str]) -> dict[str, list[float]]:
    """Return the seconds of every step by phase, without the first step; 4 prompts x 2 responses per rank."""
    recipe = ("--config", "recipes/smollm2-context-cpu.yaml")
    work = (f"distillation.num_prompts_per_step={4 * ranks}", f"policy.train_global_batch_size={8 * ranks}")
    rows = train(ranks, arguments(recipe, ranks, steps, [*work, *overrides]))
    phases = [n for n in rows[0] if n.startswith(TIMING) and "tokens_per_sec" not in n and "share" not in n]
    return {name[len(TIMING) :]: [float(row[name] or 0.0) for row in rows] for name in phases}


def our_turn(ranks: int, new_tokens: int, recipe: Sequence[str]) -> Turn:
    """Measure one run of distill.train."""
    rows = train(ranks, recipe)

    def column(name: str) -> list[float]:
        return [float(row[name] or 0.0) for row in rows]

    return Turn(
        "ours",
        new_tokens,
        column(TIMING + "total_step_time"),
        column("train/total_num_tokens"),
        min(column("train/mean_gen_tokens_per_sample")),
    )


def peer_turn(ranks: int, new_tokens: int, recipe: Sequence[str], weights: str) -> Turn:
    """Measure one run of TRL."""
    out = RUN_DIR / "peer_trl.json"
    out.unlink(missing_ok=True)
    if code := run(torchrun(ranks, "-m", "scripts.peer_trl", str(out), weights, *recipe)):
        sys.exit(code)
    found = json.loads(out.read_text())
    return Turn("trl", new_tokens, found["seconds"][1:], found["tokens"][1:], min(found["shortest"]))


def check_equal_work(ours: Turn, peer: Turn) -> None:
    """Exit unless both sides processed the same number of tokens per step and no response is too short."""
    for turn in (ours, peer):
        if turn.shortest < turn.new_tokens:
            sys.exit(f"{turn.side}: a response has {turn.shortest:g} tokens instead of {turn.new_tokens}")
    if ours.tokens != peer.tokens:
        sys.exit(f"the numbers of tokens per step differ: ours {ours.tokens}, trl {peer.tokens}")


def compare(
    ranks: int, steps: int, turns: int, lengths: Sequence[int], overrides: Sequence[str], weights: str = "float32"
) -> None:
    """Measure both sides in turns and print a table. The JSON file is complete after each pair of turns."""
    done: list[Turn] = []
    versions = {name: version(name) for name in VERSIONS}
    head = {"ranks": ranks, "overrides": list(overrides), "peer_weights": weights, "versions": versions}
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    for new_tokens in lengths:
        length = f"policy.generation.max_new_tokens={new_tokens}"
        recipe = arguments(SAME_SIZE, ranks, steps, [*overrides, length])
        for _ in range(turns):
            pair = our_turn(ranks, new_tokens, recipe), peer_turn(ranks, new_tokens, recipe, weights)
            check_equal_work(*pair)
            done += pair
            record = {**head, "turns": [asdict(turn) for turn in done]}
            (RUN_DIR / "bench_peer_trl.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nseconds per step, {ranks} ranks: median of {turns} turns of {steps} steps (fastest to slowest)")
    print(f"dtype of the student's weights and AdamW state: ours float32, trl {weights}")
    print(table(done))


def table(turns: Sequence[Turn]) -> str:
    """Return a table with one line per response length: seconds of both sides and their ratio."""
    lines = [f"{'new tokens':>10s} {'ours':>24s} {'trl':>24s} {'trl / ours':>11s}"]
    for new_tokens in dict.fromkeys(turn.new_tokens for turn in turns):
        cells, medians = [], []
        for side in ("ours", "trl"):
            found = [s for turn in turns if (turn.side, turn.new_tokens) == (side, new_tokens) for s in turn.seconds]
            medians.append(statistics.median(found))
            cells.append(f"{medians[-1]:.2f} ({min(found):.2f} to {max(found):.2f})")
        lines.append(f"{new_tokens:>10d} {cells[0]:>24s} {cells[1]:>24s} {medians[1] / medians[0]:>11.2f}")
    return "\n".join(lines)


def missing_peer() -> str | None:
    """Return an error message if TRL is not installed in a supported version, otherwise None."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found.startswith(TRL):
        return None
    return (
        f"--peer trl needs TRL {TRL}* (installed: {found}): run `pip install --no-deps 'trl=={TRL}*'`, or add "
        "`--target FOLDER` to it and set PYTHONPATH=FOLDER"
    )


def main() -> None:
    """Measure, print the table and write the numbers to runs/bench_step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=_counts, default=[2], help="number of ranks, or several numbers (1,2)")
    parser.add_argument("--steps", type=int, help="steps after one warm-up step (10; with --peer 3 per turn)")
    parser.add_argument("--peer", choices=["trl"], help="compare with this trainer")
    parser.add_argument("--turns", type=int, default=2, help="with --peer: runs per side and length")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[48, 256], help="with --peer: response lengths")
    parser.add_argument(
        "--peer-weights",
        choices=["float32", "bfloat16"],
        default="float32",
        help="with --peer: dtype of TRL's student and AdamW state (ours: float32)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()
    if args.peer:
        if sentence := missing_peer():
            print(sentence, file=sys.stderr)
            sys.exit(2)
        compare(args.ranks[0], args.steps or 3, args.turns, args.new_tokens, args.overrides, args.peer_weights)
        return
    steps = args.steps or 10
    seconds = {ranks: measure(ranks, steps, args.overrides) for ranks in args.ranks}
    (RUN_DIR / "bench_step.json").write_text(json.dumps(seconds, indent=2) + "\n")
    print(f"\nseconds per step, {steps} steps: median (fastest to slowest)")
    print(phases_table(seconds))


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("each number of ranks must be at least 1")
    return counts


def phases_table(seconds: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """Return a table with one line per phase, the slowest first, and one column per number of ranks."""
    first = next(iter(seconds.values()))
    lines = [" " * 26 + "".join(f"{ranks:>21d} rank{'s' if ranks > 1 else ' '}" for ranks in seconds)]
    for name in sorted(first, key=lambda name: -statistics.median(first[name])):
        found = [by_phase[name] for by_phase in seconds.values()]
        cells = [f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for own in found]
        lines.append(f"{name:26s}" + "".join(f"{cell:>27s}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
