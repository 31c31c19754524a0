"""A checkpoint as a Hugging Face folder of safetensors: one process, no GPU, one tensor in memory at a time.

    python -m scripts.export_hf checkpoints/NAME/step_40 OUT [--dtype bfloat16] [--model NAME_OR_FOLDER]
                                [--stop-token-ids ID ...]

It writes what the run itself exports to ``step_40/hf``. Every file of the checkpoint is first compared with its sum.
Configuration, tokenizer, licence and model card come from the checkpoint, so the original model is not needed. A
checkpoint of an older version holds none of them: they are then read from the model that the run began with, and the
stop ids of the training from that model and from the teacher.
"""

from __future__ import annotations

import argparse
import logging
import os.path
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from distill.checkpoint import SHARDS, CheckpointError, ShardsReader, files_of, read_verified
from distill.data.stop_ids import stop_ids, usable_stop_ids
from distill.data.tokenizer import load_tokenizer
from distill.errors import UserError, reason, writing_to
from distill.model.export import export_hf
from distill.model.export_files import (
    EXPORT_FILES,
    ExportFiles,
    read_export_files,
    stored_export_files,
    tokenizer_folder,
)
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.model.student import DTYPES

log = logging.getLogger(__name__)

_KEY = "policy.model_name"
_STORED_TEMPLATE = f"{EXPORT_FILES}/chat_template.jinja"


def export(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    model: str | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> None:
    """Write ``out`` from the folder step_N ``checkpoint``; raises UserError.

    ``dtype``, ``model``, ``stop_token_ids``: those of the run, where they are None.
    """
    out = Path(os.path.abspath(out))  # "." has no name
    part = out.parent / f"{out.name}.part"
    for folder in (out, part):
        if folder.exists():
            raise UserError(f"{folder} exists: remove it, or name another folder to write to")
    try:
        info = read_verified(checkpoint)
    except CheckpointError as fault:
        raise UserError(f"{checkpoint} is no whole checkpoint ({fault}): name a folder step_N that is") from fault
    files, config, name = _files(checkpoint, info, model, stop_token_ids)
    kind = DTYPES[dtype or info["recipe"]["policy"]["precision"]]
    weights = _weights(checkpoint, config, kind, name)
    try:
        with writing_to(f"{out}", "free space there, or name a folder that can be written to"):
            export_hf(part, weights, files, kind)
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _files(
    checkpoint: Path, info: Mapping[str, Any], model: str | None, stop_token_ids: Sequence[int] | None
) -> tuple[ExportFiles, Any, str]:
    """The small files, the configuration, and the name of the model that both come from."""
    recipe = info["recipe"]
    recorded = info.get("stop_token_ids", recipe["policy"]["generation"]["stop_token_ids"])
    if recorded is not None and stop_token_ids is not None:
        raise UserError(f"--stop-token-ids can't change the ids {recorded} that {checkpoint} records: leave it out")
    stored = None if model else stored_export_files(checkpoint, files_of(info))
    if stored is not None:
        config = AutoConfig.from_pretrained(checkpoint / EXPORT_FILES, trust_remote_code=False)
        return stored, config, recipe["policy"]["model_name"]
    source = _source(recipe, model)
    config = model_config(source, _KEY)
    tokenizer_name = None if model else recipe["policy"]["tokenizer"]["name"]
    tokenizer = load_tokenizer(source, tokenizer_name, "policy.tokenizer.name")
    ids = recorded
    if ids is None:
        valid_vocab = min(max(tokenizer.get_vocab().values()) + 1, config.vocab_size)
        ids = _stop_ids(recipe, source, tokenizer, valid_vocab, stop_token_ids)
        log.warning("%s records no stop ids of the training: the export gets %s", checkpoint, list(ids))
    template = recipe["policy"]["tokenizer"].get("chat_template")
    if template is not None and _STORED_TEMPLATE in files_of(info):  # the file of then may be gone or changed
        template = str(checkpoint / _STORED_TEMPLATE)
    files = read_export_files(source, tokenizer, tokenizer_name, ids, chat_template=template)
    tokens = {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in ids}
    return files.with_card(recipe, info["step"], tokens), config, source.name


def _source(recipe: Mapping[str, Any], model: str | None) -> ModelFiles:
    """The model that the run began with: ``model``, or the recipe's."""
    if model:
        return find_model(model, "--model")
    try:
        return find_model(recipe["policy"]["model_name"], _KEY)
    except UserError as error:
        raise UserError(f"{error}, or give its present place as --model") from error


def _stop_ids(
    recipe: Mapping[str, Any], source: ModelFiles, tokenizer: Any, valid_vocab: int, given: Sequence[int] | None
) -> tuple[int, ...]:
    """``given``, or the ids that end a response of the student or of the teacher, as a run takes them together."""
    if given is not None:
        if wrong := [token for token in given if not 0 <= token < valid_vocab]:
            raise UserError(f"--stop-token-ids has {wrong[0]}, which is no token: give ids in 0..{valid_vocab - 1}")
        return tuple(given)
    ours = usable_stop_ids(stop_ids(source, tokenizer), tokenizer, valid_vocab, source.name)
    name = recipe["teacher"]["model_name"]
    if name == recipe["policy"]["model_name"]:
        return ours
    try:
        teacher = ModelFiles(name, tokenizer_folder(source, name), {})
        teachers = load_tokenizer(teacher, recipe["teacher"]["tokenizer"]["name"], "teacher.tokenizer.name")
        theirs = usable_stop_ids(stop_ids(teacher, teachers), teachers, valid_vocab, name)
    except Exception as error:  # the hub's client has a dozen kinds
        log.warning(
            "the stop ids of teacher.model_name=%s are not known (%s), so the export may not stop where training ended"
            " responses: give the ids of both models as --stop-token-ids",
            *(name, reason(error)),
        )
        return ours
    return tuple(sorted({*ours, *theirs}))


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
    parser.add_argument(
        "--stop-token-ids", type=int, nargs="+", help="stop ids of the training, for a checkpoint that records none"
    )
    asked = parser.parse_args(argv)
    try:
        export(asked.checkpoint, asked.out, asked.dtype, asked.model, asked.stop_token_ids)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
