"""A checkpoint as a Hugging Face folder of safetensors: one process, no GPU, one tensor in memory at a time.

    python -m scripts.export_hf checkpoints/NAME/step_40 OUT [--dtype bfloat16] [--model NAME_OR_FOLDER]

What it writes is what the run itself exports to ``step_40/hf``. Every file of the checkpoint is first compared with its
sum. Configuration and tokenizer come from the model that the run began with.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.tokenizer import load_tokenizer
from distill.model.export import export_hf
from distill.model.load import ModelFiles, find_model, manifest_of, meta_model, model_config
from distill.model.student import DTYPES
from distill.runtime.checkpoint import SHARDS, Damaged, ShardsReader, read_whole
from distill.runtime.disk import writing_to
from distill.types import UserError

_KEY = "policy.model_name"


def export(checkpoint: Path, out: Path, dtype: str | None = None, model: str | None = None) -> None:
    """Write ``out`` from the folder step_N ``checkpoint``; raises UserError. ``dtype``, ``model``: the run's."""
    part = out.with_name(f"{out.name}.part")
    for folder in (out, part):
        if folder.exists():
            raise UserError(f"{folder} exists: remove it, or name another folder to write to")
    try:
        policy = read_whole(checkpoint)["recipe"]["policy"]
    except Damaged as fault:
        raise UserError(f"{checkpoint} is no whole checkpoint ({fault}): name a folder step_N that is") from fault
    name = model or policy["model_name"]
    files = find_model(name, _KEY if model is None else "--model")
    config = model_config(files, _KEY)
    tokenizer = load_tokenizer(files, None if model else policy["tokenizer"]["name"], "policy.tokenizer.name")
    kind = DTYPES[dtype or policy["precision"]]
    weights = _weights(checkpoint, config, kind, files)
    try:
        with writing_to(f"{out}", "free space there, or name a folder that can be written to"):
            export_hf(part, weights, files, config, tokenizer, kind, writes=True)
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _weights(checkpoint: Path, config: Any, dtype: torch.dtype, files: ModelFiles) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors in its own order, in ``dtype``."""
    reader = ShardsReader(checkpoint / SHARDS)
    wanted = manifest_of(meta_model(config, "eager", dtype))
    try:
        stored = reader.shapes()
        for name, shape in wanted.items():
            if stored.get(f"model.{name}") != shape:
                raise UserError(
                    f"the checkpoint does not fit {files.name} ({name}: {stored.get(f'model.{name}')} against"
                    f" {tuple(shape)}): give the model that the run began with as --model"
                )
        for name, tensor in reader.tensors(f"model.{name}" for name in wanted):
            yield name.removeprefix("model."), tensor.to(dtype)
    except OSError as error:  # whoever takes the tensors has errors of his own
        raise UserError(
            f"{checkpoint} can't be read ({error.strerror or error}): try again when the disk answers, as a user who"
            " may read it"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 where the user must change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder step_N")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights; left out: policy.precision")
    parser.add_argument("--model", help="where configuration and tokenizer come from; left out: policy.model_name")
    asked = parser.parse_args(argv)
    try:
        export(asked.checkpoint, asked.out, asked.dtype, asked.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
