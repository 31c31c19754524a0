"""Find the safetensors files of a model folder and read their headers; no weights are read."""

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
_BASE_MODEL_NAME = re.compile(r"(embed_tokens|layers|norm)\.")
"""Matches tensor names that lack the prefix "model.", because only the base model was saved."""


@dataclass(frozen=True)
class ModelSetting:
    """A configuration key and the model that it names, for messages that start with ``key=value``."""

    key: str
    value: str
    """Local folder or hub name of the model."""

    def __str__(self) -> str:
        return f"{self.key}={self.value}"

    def error(self, problem: str, fix: str, kind: type[UserError] = UserError) -> UserError:
        """Return an error of the type ``kind``: ``key=value``, then ``problem``, then ``fix``."""
        return kind(f"{self} {problem}", fix, key=self.key, value=self.value)


@dataclass(frozen=True)
class StoredTensor:
    """File, name, element type and shape of a tensor, from the header of its safetensors file."""

    file: Path
    name: str
    """Name of the tensor in the file; it may lack the prefix "model." of the parameter's name."""
    dtype: str
    """Safetensors name of the element type: F32, BF16, F8_E4M3, I32, ..."""
    shape: tuple[int, ...]


def json_object(path: Path, setting: ModelSetting) -> dict[str, Any]:
    """Return the JSON object in a model's file ``path``; raise UserError if the file contains none."""
    return _object(path, setting, dict)


def _object(path: Path, setting: ModelSetting, pairs: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except UserError:  # raised by ``pairs``
        raise
    except (OSError, ValueError, RecursionError) as error:
        problem = f"has a {path.name} that cannot be read ({reason(error)})"
        raise setting.error(problem, "download this file again") from error
    if not isinstance(found, dict):
        raise setting.error(f"has a {path.name} that contains no JSON object", "download this file again")
    return found


def check_format(folder: Path, setting: ModelSetting) -> None:
    """Raise UserError if a folder holds an adapter or GGUF files instead of a safetensors model."""
    if (folder / "adapter_config.json").is_file():
        raise setting.error(
            "holds an adapter (adapter_config.json) and no complete model",
            "merge the adapter into its base model (merge_and_unload of PEFT, or scripts.export_hf --merge for a"
            f" checkpoint of this program), and set {setting.key} to the folder of the merged model;"
            " policy.dtensor_cfg.lora_cfg.init_from continues the training of an adapter",
        )
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise setting.error("holds GGUF files, which are not supported", "choose the safetensors version of the model")


def stored_tensors(folder: Path, setting: ModelSetting) -> dict[str, StoredTensor]:
    """Return a dictionary from parameter name to tensor header, for all tensors in ``folder``.

    If only the base model was saved, the names in the files lack the prefix "model."; it is added, as in transformers.
    Raises UserError if files are missing, damaged or inconsistent. Logs a warning if model.safetensors.index.json lists
    tensors that the files do not contain.
    """
    tensors: dict[str, StoredTensor] = {}
    named = _weight_map(folder, setting)
    for file in _files(folder, named, setting):
        for stored in tensor_headers(file, setting):
            name = f"model.{stored.name}" if _BASE_MODEL_NAME.match(stored.name) else stored.name
            if name in tensors:
                first = tensors[name]
                places = f"{first.name} in {first.file.name} and {stored.name} in {file.name}"
                raise setting.error(
                    f"holds the tensor {name} twice ({places})",
                    "remove the tensor that is not part of the model, or download the model again",
                )
            tensors[name] = stored
    present = {(stored.name, stored.file.name) for stored in tensors.values()}
    absent = sorted(tensor for tensor, file in named.items() if (tensor, file) not in present)
    if absent:
        log.warning(
            "%s has a %s that lists %d tensor%s missing from the model files, such as %s: these entries are ignored",
            *(setting, _INDEX, len(absent), "s" * (len(absent) != 1), absent[0]),
        )
    return tensors


def _files(folder: Path, named: dict[str, str], setting: ModelSetting) -> list[Path]:
    """Return the weight files that transformers reads: the files in ``named``, or else model.safetensors.

    ``named`` maps tensor names to file names, from model.safetensors.index.json; empty: no index.
    """
    single = folder / _SINGLE
    if not named:
        if single.is_file():
            return [single]
        raise _no_weights(folder, setting)
    files = sorted({folder / file for file in named.values()})
    if absent := [file.name for file in files if not file.is_file()]:
        raise setting.error(
            f"lacks {len(absent)} of the files that its {_INDEX} lists, such as {absent[0]}",
            "download the complete model",
        )
    if single.is_file() and single not in files:
        raise setting.error(
            f"has both a {_SINGLE} and a {_INDEX} that lists other files, so its weights are ambiguous",
            "remove the file that does not belong to the model",
        )
    return files


def _no_weights(folder: Path, setting: ModelSetting) -> UserError:
    shards = sorted(file.name for file in folder.glob("*.safetensors") if file.is_file())
    if shards:
        return setting.error(
            f"holds {shards[0]} but neither {_SINGLE} nor {_INDEX}, so the list of its weight files is unknown",
            f"download {_INDEX}, or the complete model",
        )
    return setting.error(
        "has no safetensors files, and pickled weights are not supported because they can execute code",
        "convert weights that you trust with save_pretrained(safe_serialization=True)",
    )


def _weight_map(folder: Path, setting: ModelSetting) -> dict[str, str]:
    """Return the map from tensor names to file names in model.safetensors.index.json.

    Returns an empty dictionary if the index is missing or outdated. An index is outdated if none of the files that it
    lists exists, but model.safetensors does.
    """
    index = folder / _INDEX
    if not index.is_file():
        return {}
    named = _object(index, setting, _unique_keys(index, setting)).get("weight_map")
    valid = isinstance(named, dict) and all(
        isinstance(file, str) and file.endswith(".safetensors") and "/" not in file for file in named.values()
    )
    if not valid or not named:
        raise setting.error(
            f"has a {index.name} without a valid weight_map (tensor names to safetensors files in the same folder)",
            "download this file again",
        )
    if (folder / _SINGLE).is_file() and not any((folder / file).is_file() for file in named.values()):
        log.warning("%s has an outdated %s that lists only missing files: %s is read instead", setting, _INDEX, _SINGLE)
        return {}
    return dict(named)


def _unique_keys(index: Path, setting: ModelSetting) -> Any:
    """Return an ``object_pairs_hook`` for ``json.loads`` that refuses two values for the same key.

    Without the hook, Python silently keeps the last value.
    """

    def pairs(found: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in found:
            if key in made and made[key] != value:
                problem = f"has a {index.name} that places {key} in two files, {made[key]} and {value}"
                raise setting.error(problem, "download this file again")
            made[key] = value
        return made

    return pairs


def tensor_headers(file: Path, setting: ModelSetting) -> list[StoredTensor]:
    """Return the headers of all tensors in a safetensors file.

    Opening the file also verifies that the file has the length that its header defines.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            parts = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 (it is no dict)
            return [StoredTensor(file, name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts]
    except (SafetensorError, OSError, ValueError) as error:
        raise setting.error(f"has a damaged {file.name} ({reason(error)})", "download this file again") from error
