"""Export a checkpoint as a Hugging Face folder of safetensors: one process, no GPU, one tensor in memory at a time.

    python -m scripts.export_hf checkpoints/NAME/step_40 OUT [--dtype bfloat16] [--model NAME_OR_FOLDER]
                                [--stop-token-ids ID ...]

The output equals the run's own export in ``step_40/hf``. The script first compares each file of the checkpoint with its
checksum. Configuration, tokenizer, licence and model card come from the checkpoint, so the source model is not needed.
Checkpoints of older versions lack them: the script then reads them from the student model of the recipe, and the stop
ids of the training from that model and from the teacher.
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
    """Export the folder step_N ``checkpoint`` to the new folder ``out``.

    ``dtype``, ``model`` and ``stop_token_ids`` replace those of the run if they are not None. Raises UserError if the
    checkpoint is incomplete, does not fit the model, or cannot be read, and if ``out`` exists or cannot be written.
    """
    out = Path(os.path.abspath(out))  # "." has no name
    part = out.parent / f"{out.name}.part"
    for folder in (out, part):
        if folder.exists():
            raise UserError(f"{folder} exists", "remove it, or choose another output folder", "out", str(folder))
    try:
        info = read_verified(checkpoint)
    except CheckpointError as fault:
        problem = f"{checkpoint} is not a complete checkpoint ({fault})"
        raise UserError(problem, "choose another folder step_N", "checkpoint", str(checkpoint)) from fault
    files, config, name = _files(checkpoint, info, model, stop_token_ids)
    kind = DTYPES[dtype or info["recipe"]["policy"]["precision"]]
    weights = _weights(checkpoint, config, kind, name)
    try:
        with writing_to(f"{out}", "free space there, or choose a writable output folder"):
            export_hf(part, weights, files, kind)
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _files(
    checkpoint: Path, info: Mapping[str, Any], model: str | None, stop_token_ids: Sequence[int] | None
) -> tuple[ExportFiles, Any, str]:
    """Return the small files, the Hugging Face configuration, and the name of their model."""
    recipe = info["recipe"]
    recorded = info.get("stop_token_ids", recipe["policy"]["generation"]["stop_token_ids"])
    if recorded is not None and stop_token_ids is not None:
        raise UserError(
            f"--stop-token-ids={list(stop_token_ids)} cannot replace the stop ids {recorded} in {checkpoint}",
            "remove the option",
            "--stop-token-ids",
            list(stop_token_ids),
        )
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
        log.warning("%s contains no stop ids of the training: the export uses %s", checkpoint, list(ids))
    template = recipe["policy"]["tokenizer"].get("chat_template")
    if template is not None and _STORED_TEMPLATE in files_of(info):  # the original file may be missing or changed
        template = str(checkpoint / _STORED_TEMPLATE)
    files = read_export_files(source, tokenizer, tokenizer_name, ids, chat_template=template)
    tokens = {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in ids}
    return files.with_card(recipe, info["step"], tokens), config, source.name


def _source(recipe: Mapping[str, Any], model: str | None) -> ModelFiles:
    """Find the source model: ``model`` if given, otherwise the student model of the recipe."""
    if model:
        return find_model(model, "--model")
    try:
        return find_model(recipe["policy"]["model_name"], _KEY)
    except UserError as error:
        fix = f"{error.fix}, or give its current folder as --model"
        raise UserError(error.problem, fix, error.key, error.value) from error


def _stop_ids(
    recipe: Mapping[str, Any], source: ModelFiles, tokenizer: Any, valid_vocab: int, given: Sequence[int] | None
) -> tuple[int, ...]:
    """Return ``given``, or the union of the student's and the teacher's stop ids, as in a run."""
    if given is not None:
        if wrong := [token for token in given if not 0 <= token < valid_vocab]:
            problem = f"--stop-token-ids={wrong[0]} is not a token id"
            raise UserError(problem, f"choose ids in 0..{valid_vocab - 1}", "--stop-token-ids", wrong[0])
        return tuple(given)
    ours = usable_stop_ids(stop_ids(source, tokenizer, _KEY), tokenizer, valid_vocab, source.name)
    name = recipe["teacher"]["model_name"]
    if name == recipe["policy"]["model_name"]:
        return ours
    try:
        teacher = ModelFiles(name, tokenizer_folder(source, name), {})
        teachers = load_tokenizer(teacher, recipe["teacher"]["tokenizer"]["name"], "teacher.tokenizer.name")
        theirs = usable_stop_ids(stop_ids(teacher, teachers, "teacher.model_name"), teachers, valid_vocab, name)
    except Exception as error:  # huggingface_hub raises many types
        log.warning(
            "the stop ids of teacher.model_name=%s cannot be read (%s), so the export may lack stop ids: give the ids"
            " of both models as --stop-token-ids",
            *(name, reason(error)),
        )
        return ours
    return tuple(sorted({*ours, *theirs}))


def _weights(checkpoint: Path, config: Any, dtype: torch.dtype, model_name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the model in the order of its parameters, in ``dtype``."""
    reader = ShardsReader(checkpoint / SHARDS)
    wanted = manifest_of(meta_model(config, "eager", dtype))
    try:
        stored = reader.shapes()
        for name, shape in wanted.items():
            if stored.get(f"model.{name}") != shape:
                raise UserError(
                    f"the checkpoint does not fit the model {model_name}, whose {name} has the shape {tuple(shape)}"
                    f" instead of {stored.get(f'model.{name}')}",
                    "give the student model of the run as --model",
                    "--model",
                    model_name,
                )
        for name, tensor in reader.tensors(f"model.{name}" for name in wanted):
            yield name.removeprefix("model."), tensor.to(dtype)
    except OSError as error:  # of this generator; errors of writing belong to the consumer
        raise UserError(
            f"{checkpoint} cannot be read ({error.strerror or error})",
            "check its permissions and the disk, and try again",
            "checkpoint",
            str(checkpoint),
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 after a UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder step_N of a checkpoint")
    parser.add_argument("out", type=Path, help="output folder, which must not exist")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="element type of the weights; default: policy.precision"
    )
    parser.add_argument("--model", help="source of configuration and tokenizer; default: the checkpoint")
    parser.add_argument(
        "--stop-token-ids", type=int, nargs="+", help="stop ids of the training, for a checkpoint without them"
    )
    arguments = parser.parse_args(argv)
    try:
        export(arguments.checkpoint, arguments.out, arguments.dtype, arguments.model, arguments.stop_token_ids)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
