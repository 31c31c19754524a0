"""Export a checkpoint as a Hugging Face folder of safetensors: one process, no GPU, one tensor in memory at a time.

    python -m scripts.export_hf checkpoints/NAME/step_40 OUT [--merge] [--dtype bfloat16] [--model NAME_OR_FOLDER]
                                [--stop-token-ids ID ...]

The output equals the run's own export in ``step_40/hf``. The script first compares each file of the checkpoint with its
checksum. Configuration, tokenizer, licence and model card come from the checkpoint, so the source model is not needed.
Checkpoints of older versions lack them: the script then reads them from the student model of the recipe or ``--model``,
and the stop ids of the training from that model and from the teacher.

A checkpoint of low-rank adapters (LoRA) is exported as a PEFT folder, as ``step_40/peft``. ``--merge`` merges the
adapters into their base model and writes the complete model. For this it reads the base model of the recipe, or
``--model``. ``--model`` without ``--merge`` names the base model in the PEFT folder. In both cases, the weights of the
base model are first compared with the checksum in the checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os.path
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from distill.checkpoint import SHARDS, CheckpointError, ShardsReader, files_of, read_verified
from distill.checkpoint.base_model import BASE
from distill.data.stop_ids import stop_ids, usable_stop_ids
from distill.data.tokenizer import load_tokenizer
from distill.errors import UserError, disk_errors_as, reason, writing_to
from distill.model.export import write_hf
from distill.model.export_files import (
    EXPORT_FILES,
    ExportFiles,
    read_export_files,
    stored_export_files,
    tokenizer_folder,
)
from distill.model.export_student import export_adapter
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.hf_load import manifest_of, meta_model
from distill.model.lora_merge import Adapter
from distill.model.merged_files import check_base, merged_weights
from distill.model.model_card import hub_revision, loadable_name
from distill.model.student import DTYPES

log = logging.getLogger(__name__)

_KEY = "policy.model_name"


def export(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    model: str | None = None,
    stop_token_ids: Sequence[int] | None = None,
    merge: bool = False,
) -> None:
    """Export the folder step_N ``checkpoint`` to the new folder ``out``.

    ``dtype``, ``model`` and ``stop_token_ids`` replace those of the run if they are not None. ``model`` is the base of
    the adapters, or, for an older checkpoint, the source of configuration and tokenizer. ``merge``: whether to merge
    adapters into their base model. Raises UserError if the checkpoint is incomplete, does not fit the model, or cannot
    be read, and if ``out`` exists or cannot be written.
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
    _check_options(checkpoint, info, merge, dtype)
    files, config, name = _files(checkpoint, info, model, stop_token_ids)
    kind = DTYPES[dtype or info["recipe"]["policy"]["precision"]]
    shapes = manifest_of(meta_model(config, "eager", kind))
    try:
        with writing_to(f"{out}", "free space there, or choose a writable output folder"):
            if merge:
                write_hf(part, _merged(checkpoint, info, shapes, kind, model), files, kind)
            elif info.get(BASE) is not None:
                _export_adapter(part, checkpoint, info, files, shapes, model)
            else:
                write_hf(part, _weights(checkpoint, shapes, kind, name), files, kind)
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_options(checkpoint: Path, info: Mapping[str, Any], merge: bool, dtype: str | None) -> None:
    """Raise UserError if an option does not fit the checkpoint: all weights, or adapters."""
    has_adapters = info.get(BASE) is not None
    if merge and not has_adapters:
        problem = f"--merge has no effect on {checkpoint}, which contains all weights and no adapters"
        raise UserError(problem, "remove the option", "--merge", True)
    if dtype is not None and has_adapters and not merge:
        problem = f"--dtype={dtype} has no effect on the adapters in {checkpoint}, which are float32"
        raise UserError(problem, "remove the option, or add --merge", "--dtype", dtype)


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
    stored = stored_export_files(checkpoint, files_of(info))
    if stored is not None:
        if model and info.get(BASE) is None:
            problem = f"--model={model} has no effect on {checkpoint}, which contains all files of the export"
            raise UserError(problem, "remove the option", "--model", model)
        config = AutoConfig.from_pretrained(checkpoint / EXPORT_FILES, trust_remote_code=False)
        return stored, config, recipe["policy"]["model_name"]
    source = _source(recipe, model)
    config = model_config(source, _KEY)
    tokenizer_name = recipe["policy"]["tokenizer"]["name"]
    if tokenizer_name == recipe["policy"]["model_name"]:
        tokenizer_name = None  # that of the source model, whose folder may have been renamed
    tokenizer = load_tokenizer(source, tokenizer_name, "policy.tokenizer.name")
    ids = recorded
    if ids is None:
        valid_vocab = min(max(tokenizer.get_vocab().values()) + 1, config.vocab_size)
        ids = _stop_ids(recipe, source, tokenizer, valid_vocab, stop_token_ids)
        log.warning("%s contains no stop ids of the training: the export uses %s", checkpoint, list(ids))
    template = recipe["policy"]["tokenizer"].get("chat_template")
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


def _reading(place: Path | str, key: str) -> AbstractContextManager[None]:
    """Return a context manager that raises UserError if ``place``, the value of ``key``, cannot be read."""
    fix = "check its permissions and the disk, and try again"
    return disk_errors_as(
        lambda cause: UserError(f"{place} cannot be read ({cause.strerror or cause})", fix, key, str(place))
    )


def _stored(checkpoint: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and complete tensors of the trained parameters ``names``."""
    with _reading(checkpoint, "checkpoint"):
        for name, tensor in ShardsReader(checkpoint / SHARDS).tensors(f"model.{name}" for name in names):
            yield name.removeprefix("model."), tensor


def _shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Return the shapes of the trained parameters by name."""
    with _reading(checkpoint, "checkpoint"):
        stored = ShardsReader(checkpoint / SHARDS).shapes()
    return {name.removeprefix("model."): shape for name, shape in stored.items() if name.startswith("model.")}


def _weights(
    checkpoint: Path, wanted: Mapping[str, torch.Size], dtype: torch.dtype, model_name: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the model in the order of its parameters, in ``dtype``."""
    stored = _shapes(checkpoint)
    for name in (*wanted, *stored):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"the checkpoint does not fit the model {model_name}: {name} is {_shape(stored.get(name))} in the"
                f" checkpoint and {_shape(wanted.get(name))} in the model",
                "give the student model of the run as --model",
                "--model",
                model_name,
            )
    for name, tensor in _stored(checkpoint, wanted):
        yield name, tensor.to(dtype)


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else f"of shape {tuple(size)}"


def _export_adapter(
    out: Path,
    checkpoint: Path,
    info: Mapping[str, Any],
    files: ExportFiles,
    base: Mapping[str, torch.Size],
    model: str | None,
) -> None:
    """Write the PEFT folder ``out``; ``base``: shapes of the base model's weights; ``model``: its new name, or None."""
    named = info[BASE]
    if model:
        source, _ = _verified_base(info, base, model)
        named = {**named, "model_name": loadable_name(model), "revision": hub_revision(source.folder)}
    export_adapter(out, _stored(checkpoint, _shapes(checkpoint)), files, info["recipe"], base, named)


def _verified_base(
    info: Mapping[str, Any], shapes: Mapping[str, torch.Size], model: str | None
) -> tuple[ModelFiles, str]:
    """Return the base model of the adapters and the setting that names it, after a comparison of all its weights.

    Raises UserError if the weights are not those of the training.
    """
    source, key = _source(info["recipe"], model), "--model" if model else _KEY
    with _reading(source.name, key):
        check_base(source, key, shapes, info[BASE])
    return source, key


def _merged(
    checkpoint: Path, info: Mapping[str, Any], shapes: Mapping[str, torch.Size], dtype: torch.dtype, model: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Return names and weights of the base model with the adapters of the checkpoint merged, in ``dtype``.

    Raises UserError if the base model is not that of the training, before the first weight is merged. So the base model
    is read twice.
    """
    stored, lora = _shapes(checkpoint), info["recipe"]["policy"]["dtensor_cfg"]["lora_cfg"]

    def adapter_of(name: str) -> Adapter | None:
        names = [f"{name.removesuffix('.weight')}.lora_{matrix}" for matrix in "AB"]
        if names[0] not in stored:
            return None
        (_, lora_a), (_, lora_b) = _stored(checkpoint, names)
        return Adapter(lora_a, lora_b, lora["alpha"] / lora["dim"])

    source, key = _verified_base(info, shapes, model)

    def weights() -> Iterator[tuple[str, Tensor]]:
        with _reading(source.name, key):
            yield from merged_weights(source, key, shapes, info[BASE], adapter_of, dtype)

    return weights()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 after a UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder step_N of a checkpoint")
    parser.add_argument("out", type=Path, help="output folder, which must not exist")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="element type of the weights; default: policy.precision"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge low-rank adapters into their base model, which is read twice: for its checksum, and for the output;"
        " default: a PEFT folder",
    )
    parser.add_argument(
        "--model",
        help="base model of low-rank adapters, to merge them into it or to name it in the PEFT folder; its weights are"
        " compared with the checksum in the checkpoint; for a checkpoint of an older version, the source of"
        " configuration and tokenizer; default: the model of the recipe",
    )
    parser.add_argument(
        "--stop-token-ids", type=int, nargs="+", help="stop ids of the training, for a checkpoint without them"
    )
    arguments = parser.parse_args(argv)
    try:
        export(**vars(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
