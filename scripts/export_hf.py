"""A checkpoint as a Hugging Face folder of safetensors: one process, no GPU, one tensor in memory at a time.

    python -m scripts.export_hf checkpoints/NAME/step_40 OUT [--dtype bfloat16] [--model NAME_OR_FOLDER]

It writes what the run itself exports to ``step_40/hf``. Every file of the checkpoint is first compared with its sum.
Configuration, tokenizer, licence and model card come from the checkpoint, so the original model is not needed. A
checkpoint of an older version holds none of them: they are then read from the model that the run began with.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from distill.data.tokenizer import load_tokenizer, stop_ids
from distill.model.export import export_hf
from distill.model.export_files import EXPORT_FILES, ExportFiles, read_export_files, stored_export_files
from distill.model.load import find_model, manifest_of, meta_model, model_config
from distill.model.student import DTYPES
from distill.runtime.checkpoint import SHARDS, Damaged, ShardsReader, files_of, read_whole
from distill.runtime.disk import writing_to
from distill.types import UserError

log = logging.getLogger(__name__)

_KEY = "policy.model_name"


def export(checkpoint: Path, out: Path, dtype: str | None = None, model: str | None = None) -> None:
    """Write ``out`` from the folder step_N ``checkpoint``; raises UserError. ``dtype``, ``model``: the run's."""
    part = out.with_name(f"{out.name}.part")
    for folder in (out, part):
        if folder.exists():
            raise UserError(f"{folder} exists: remove it, or name another folder to write to")
    try:
        info = read_whole(checkpoint)
    except Damaged as fault:
        raise UserError(f"{checkpoint} is no whole checkpoint ({fault}): name a folder step_N that is") from fault
    files, config, name = _files(checkpoint, info, model)
    kind = DTYPES[dtype or info["recipe"]["policy"]["precision"]]
    weights = _weights(checkpoint, config, kind, name)
    try:
        with writing_to(f"{out}", "free space there, or name a folder that can be written to"):
            export_hf(part, weights, files, kind)
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _files(checkpoint: Path, info: Mapping[str, Any], model: str | None) -> tuple[ExportFiles, Any, str]:
    """The small files, the configuration, and the name of the model that both come from."""
    stored = None if model else stored_export_files(checkpoint, files_of(info))
    recipe = info["recipe"]
    if stored is not None:
        config = AutoConfig.from_pretrained(checkpoint / EXPORT_FILES, trust_remote_code=False)
        return stored, config, recipe["policy"]["model_name"]
    source = find_model(model or recipe["policy"]["model_name"], "--model" if model else _KEY)
    config = model_config(source, _KEY)
    tokenizer_name = None if model else recipe["policy"]["tokenizer"]["name"]
    tokenizer = load_tokenizer(source, tokenizer_name, "policy.tokenizer.name")
    ids = info.get("stop_token_ids", recipe["policy"]["generation"]["stop_token_ids"])
    if ids is None:
        ids = stop_ids(source, tokenizer)
        log.warning("%s records no stop ids of the training: the export gets %s of %s", checkpoint, ids, source.name)
    template = recipe["policy"]["tokenizer"].get("chat_template")
    files = read_export_files(source, tokenizer, tokenizer_name, ids, chat_template=template)
    tokens = {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in ids}
    return files.with_card(recipe, info["step"], tokens), config, source.name


def _weights(checkpoint: Path, config: Any, dtype: torch.dtype, name_of_model: str) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors in its own order, in ``dtype``."""
    reader = ShardsReader(checkpoint / SHARDS)
    wanted = manifest_of(meta_model(config, "eager", dtype))
    try:
        stored = reader.shapes()
        for name, shape in wanted.items():
            if stored.get(f"model.{name}") != shape:
                raise UserError(
                    f"the checkpoint does not fit {name_of_model} ({name}: {stored.get(f'model.{name}')} against"
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
    parser.add_argument("--model", help="where configuration and tokenizer come from; left out: the checkpoint")
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
