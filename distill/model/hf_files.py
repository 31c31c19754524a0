"""Files of a Hugging Face model, in a local folder or from the hub; tensors are read one by one."""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from distill.errors import MissingError, NotCachedError, UserError
from distill.hub import cause_and_fix, is_hub_name, model_cache
from distill.model.hf_index import ModelSetting, StoredTensor, check_format, stored_tensors
from distill.model.quantized_weights import WeightScale, dequantized, read_quantization, weight_scales

LICENSE_FILES = ("README.md", "*LICEN[CS]E*", "NOTICE*", "*USE_POLICY*", "COPYING*", "*TERMS.*", "*TERMS", "TERMS_OF_*")
"""File name patterns of the model card and of licence files, which are copied to exports."""
TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""File name patterns of configuration and tokenizer files."""
MODEL_PATTERNS = ["*.safetensors", *TOKENIZER_PATTERNS, *LICENSE_FILES]
"""File name patterns of the files of a model on the hub that a run downloads."""
DUPLICATE_PATTERNS = ["original/*", "consolidated*"]
"""File name patterns of files with the same weights in the format of the model's authors, which are not downloaded."""
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Safetensors names of the supported unquantized element types.

F64 values are rounded to the dtype of the parameter that they are loaded into.
"""


@dataclass(frozen=True)
class ModelFiles:
    """Files of a Hugging Face model on disk, with the headers of all its tensors."""

    name: str
    """Local folder or hub name of the model, as in the user's configuration."""
    folder: Path
    """Local folder of the files; for a hub name, the folder of the download."""
    tensors: Mapping[str, StoredTensor]
    """Maps each parameter name to the header of its tensor: file, element type and shape."""
    scales: Mapping[str, WeightScale] = field(default_factory=dict)
    """Maps the parameter name of each FP8 weight to its scales."""

    @property
    def files(self) -> dict[str, Path]:
        """Return a dictionary that maps each parameter name to the safetensors file that contains the tensor."""
        return {name: stored.file for name, stored in self.tensors.items()}

    def tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Read the tensor ``name``, or only the part that ``slices`` selects.

        ``slices``: slices along the axes of the tensor; None: the complete tensor. Only the selected part is held in
        memory. The result has the element type of the file, except that an FP8 weight is dequantized to float32. Raises
        UserError for any other quantized type.
        """
        stored = self.tensors[name]
        if name in self.scales:
            return dequantized(stored, self.scales[name], slices)
        if stored.dtype not in FLOAT_TYPES:
            raise UserError(
                f"the model {self.name} has the tensor {name} in the unsupported element type {stored.dtype}",
                "choose an unquantized model",
                value=self.name,
            )
        with safe_open(stored.file, framework="pt") as file:
            part = file.get_slice(stored.name)
            tensor: Tensor = part[slices] if slices else part[:]
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the complete tensor ``name``, from the header of its file."""
        return self.tensors[name].shape


def find_model(name: str, key: str) -> ModelFiles:
    """Find the files of the model ``name``, a local folder or a hub name; download them if necessary.

    ``key``: the configuration key that names the model. Raises UserError if the model is missing, has no safetensors
    files, or is quantized with an unsupported method.
    """
    setting = ModelSetting(key, name)
    folder = Path(name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long for a file
        folder = _from_hub(setting)
    check_format(folder, setting)
    if not (folder / "config.json").is_file():
        raise setting.error("has no config.json", "give the folder or the hub name of a Hugging Face model")
    tensors = stored_tensors(folder, setting)
    return ModelFiles(name, folder, tensors, weight_scales(tensors, read_quantization(folder, setting)))


def _from_hub(setting: ModelSetting) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download

    name = setting.value
    if not is_hub_name(name):
        raise setting.error(
            "does not exist",
            "give a folder with config.json and safetensors files, or the hub name of a model",
            MissingError,
        )
    try:
        folder = Path(snapshot_download(name, allow_patterns=MODEL_PATTERNS, ignore_patterns=DUPLICATE_PATTERNS))
        if is_offline_mode() and not is_complete(folder):
            raise FileNotFoundError(f"the cache has only a part of {name}")
        return folder
    except Exception as error:  # huggingface_hub raises many types
        cause, fix = cause_and_fix(error, name)
        problem = f"is neither a folder nor a model in the download cache {model_cache()}, and {cause}"
        raise setting.error(problem, f"{fix}, or set {setting.key} to a local folder", NotCachedError) from error


def is_complete(folder: Path) -> bool:
    """Return whether a snapshot in the hub's cache has a config.json and all its safetensors files."""
    index = folder / "model.safetensors.index.json"
    try:
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError):
        return True  # damaged, which a later check reports
    files = [folder / name for name in listed] or list(folder.glob("*.safetensors"))
    return (folder / "config.json").is_file() and bool(files) and all(file.is_file() for file in files)
