"""Find the safetensors files of a checkpoint folder and read their headers; no weight is read here."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.errors import UserError, reason

log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OF_THE_BASE_MODEL = re.compile(r"(embed_tokens|layers|norm)\.")
"""Names as the base model saves them, without the prefix "model." of the causal language model."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its header in a safetensors file."""

    file: Path
    name: str
    """Its name in the file."""
    dtype: str
    """As safetensors names it: F32, BF16, F8_E4M3, I32, ..."""
    shape: tuple[int, ...]


def json_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file of a model; raises UserError, beginning with ``what``, where it holds none."""
    return _object(path, what, dict)


def _object(path: Path, what: str, pairs: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except UserError:  # raised by ``pairs``
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} has a {path.name} that can't be read ({reason(error)}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} has a {path.name} that holds no keys and values: download it again")
    return found


def check_format(folder: Path, what: str) -> None:
    """Raise UserError, beginning with ``what``, for a folder that holds an adapter or GGUF files and no full model."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{what} holds an adapter (adapter_config.json), which is not loaded: merge it into its base model"
            " (PEFT's merge_and_unload), save the merged model and give that folder"
        )
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{what} holds GGUF files, which are not read: give the safetensors checkpoint of the model")


def stored_tensors(folder: Path, what: str) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in ``folder``, by the name of the parameter that takes it.

    A checkpoint that was saved from the base model has names without "model."; they are completed, as transformers
    does. Raises UserError, beginning with ``what``, where files are missing, damaged or contradict each other.
    """
    tensors: dict[str, StoredTensor] = {}
    named = _weight_map(folder, what)
    for file in _files(folder, named, what):
        for stored in _headers(file, what):
            name = f"model.{stored.name}" if _OF_THE_BASE_MODEL.match(stored.name) else stored.name
            if name in tensors:
                first = tensors[name]
                places = f"{first.name} in {first.file.name} and {stored.name} in {file.name}"
                raise UserError(
                    f"{what} holds {name} twice ({places}), so which one counts is not defined: remove the one that is"
                    " not part of the model, or download it again"
                )
            tensors[name] = stored
    there = {(stored.name, stored.file.name) for stored in tensors.values()}
    absent = sorted(tensor for tensor, file in named.items() if (tensor, file) not in there)
    if absent:
        log.warning(
            "%s has a %s that names tensors that its files don't hold: %d, such as %s",
            *(what, _INDEX, len(absent), absent[0]),
        )
    return tensors


def _files(folder: Path, named: dict[str, str], what: str) -> list[Path]:
    """The files that transformers would read: one, or those that the index names."""
    single = folder / _SINGLE
    if not named:
        if single.is_file():
            return [single]
        raise UserError(f"{what} {_why_no_weights(folder)}")
    files = sorted({folder / file for file in named.values()})
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{what} lacks {len(absent)} of its files ({absent[0]}): download it completely")
    if single.is_file() and single not in files:
        raise UserError(
            f"{what} holds both a {_SINGLE} and a {_INDEX} that names other files, so which weights count is not"
            " defined: remove the one that is not the model"
        )
    return files


def _why_no_weights(folder: Path) -> str:
    shards = sorted(file.name for file in folder.glob("*.safetensors") if file.is_file())
    if shards:
        return (
            f"holds {shards[0]} but neither {_SINGLE} nor {_INDEX}, so which tensors belong to the model is not"
            " defined: download the missing file"
        )
    return (
        "holds no safetensors, and pickled weights are never read, as they can run code: convert them where you trust"
        " them with save_pretrained(safe_serialization=True)"
    )


def _weight_map(folder: Path, what: str) -> dict[str, str]:
    """Tensor -> file name, from the index; empty without an index, and for a stale one beside a single file."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    named = _object(index, what, _each_key_once(index, what)).get("weight_map")
    valid = isinstance(named, dict) and all(
        isinstance(file, str) and file.endswith(".safetensors") and "/" not in file for file in named.values()
    )
    if not valid or not named:
        raise UserError(
            f"{what} has a {index.name} without a weight_map from tensors to safetensors files beside it:"
            " download it again"
        )
    if (folder / _SINGLE).is_file() and not any((folder / file).is_file() for file in named.values()):
        log.warning("%s has a stale %s, none of whose files exist: %s is read", what, _INDEX, _SINGLE)
        return {}
    return dict(named)


def _each_key_once(index: Path, what: str) -> Any:
    """Python's JSON reader keeps the last of two equal keys without a message; an index must not name two files."""

    def pairs(found: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in found:
            if key in made and made[key] != value:
                raise UserError(
                    f"{what} has a {index.name} that names {key} twice, in {made[key]} and {value}: download it again"
                )
            made[key] = value
        return made

    return pairs


def _headers(file: Path, what: str) -> list[StoredTensor]:
    """The tensors of a safetensors file; opening it also checks that the file has the length that its header gives."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 (it is no dict)
            return [StoredTensor(file, name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts]
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{what} has a damaged {file.name} ({reason(error)}): download it again") from error
