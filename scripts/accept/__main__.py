"""Verify that a node can train: proofs in the first minutes, then timings; a table, a JSON file and an exit code.

    python -m scripts.accept [--minutes 15] [--size 0.1b|0.6b|4b | --model FOLDER] [--out DIR] [--only PART ...]
    sbatch -N2 scripts/accept.sbatch [the same options]

It needs no network and no arguments, ends only processes that it started, and never changes settings of a GPU. Each
part runs in its own processes with its own limit: a hang or crash ends one part. OUT/accept.json and OUT/accept.txt are
written after every part. Exit code: 0 if no part failed, 1 if one failed or a proof did not run, 2 for wrong
arguments, 128 + N after signal N. On a machine without a GPU all sizes are tiny, and parts that need a GPU report n/a.
If the machine has GPUs that torch does not find, the part ``environment`` fails.
With several nodes, the same command runs on each of them (torchrun --nproc-per-node 1 -m scripts.accept, or srun);
node N writes to OUT/node_N.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from scripts.accept.parts import PARTS, Part
from scripts.accept.processes import Place
from scripts.accept.results import PartResult, Report
from scripts.accept.runner import ENVIRONMENT_PART, Runner
from scripts.accept.settings import SIZES, Settings
from scripts.launch import ROOT

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(BaseException):
    """Raised by a stop signal; the argument is its number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected parts and print the table; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        parts = selection(args.only, args.skip, bool(args.model))
        place = Place.of(os.environ)
        model = _model_folder(args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out.resolve()
    scratch = Path(tempfile.mkdtemp(prefix="accept-"))
    settings = Settings(str(out), str(scratch), "cpu", args.ranks, place.nodes, place.node, args.size or "", model)
    about = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", "-m", "scripts.accept", *(sys.argv[1:] if argv is None else argv)],
        "nodes": place.nodes,
    }
    report = Report(settings.folder, about, [PartResult(part.name, part.kind) for part in parts])
    runner = Runner(settings, place, report, args.minutes * 60, {"vllm timings": True} if args.only else {})
    for number in _SIGNALS:
        signal.signal(number, _stop)
    try:
        runner.run(parts)
    except Stopped as stopped:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _mark_unfinished(report, signal.Signals(stopped.args[0]).name)
        return _end(report, 128 + int(stopped.args[0]), place.node == 0)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _end(report, 0 if report.passed else 1, place.node == 0)


def _end(report: Report, code: int, prints_table: bool = True) -> int:
    """Write the results and print them; return ``code``."""
    report.write()
    print(f"\n{report.table() if prints_table else report.verdict()}\n{report.folder / 'accept.json'}", flush=True)
    return code


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def _mark_unfinished(report: Report, name: str) -> None:
    """Give the reason to all parts that have not ended."""
    for part in report.parts:
        if part.status == "not run":
            part.reason = f"stopped by {name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15, help="time limit of all parts together (15)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--size", choices=SIZES, help="size of the random model (0.6b; without a GPU: tiny)")
    chosen.add_argument("--model", type=Path, help="folder of a model to use instead of a random one")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "accept", help="folder of the results")
    parser.add_argument("--ranks", type=int, default=0, help="ranks per node (one per GPU; without a GPU: 2)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART", help="parts not to run")
    return parser


def selection(only: Sequence[str], skip: Sequence[str], has_model: bool) -> list[Part]:
    """Return the parts to run, in order, with the parts that they need; raise ValueError if unknown.

    ``has_model``: the user gave a model, so no random model is written. "proof" and "timing" select all of a kind.
    """
    words = {*only, *skip}
    if unknown := sorted(words - PARTS.keys() - {"proof", "timing"}):
        raise ValueError(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}, proof, timing")

    def is_named(part: Part, names: Sequence[str]) -> bool:
        return part.name in names or part.kind in names

    chosen = [part for part in PARTS.values() if (not only or is_named(part, only)) and not is_named(part, skip)]
    needed = {ENVIRONMENT_PART} | {need for part in chosen for need in part.needs}
    names = {part.name for part in chosen}
    return [p for p in PARTS.values() if p.name in names | needed and not (p.name == "model" and has_model)]


def _model_folder(model: Path | None) -> str:
    """Return the absolute path of a model's folder; raise ValueError if it has no config.json."""
    if model is None:
        return ""
    if not (model / "config.json").is_file():
        raise ValueError(f"--model {model} must be a folder with config.json, weights and tokenizer")
    return str(model.resolve())


if __name__ == "__main__":
    sys.exit(main())
