"""The files of a Hugging Face model: a folder or a hub name, its tensors, one tensor at a time."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from distill.errors import UserError
from distill.model.hf_index import StoredTensor, check_format, stored_tensors
from distill.model.quantized_weights import WeightScale, dequantized, read_quantization, weight_scales

LICENSE_FILES = ("README.md", "*LICEN[CS]E*", "NOTICE*", "*USE_POLICY*", "COPYING*", "*TERMS.*", "*TERMS", "TERMS_OF_*")
"""The model card and what else a model comes with that exports copy."""
PLAIN = ("F64", "F32", "F16", "BF16")
"""Element types, as safetensors names them, that are the weights themselves. F64 is rounded, as transformers does."""


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint on disk."""

    name: str
    """As the user wrote it."""
    folder: Path
    tensors: Mapping[str, StoredTensor]
    """Every tensor of the files, by the name of the parameter that takes it."""
    scales: Mapping[str, WeightScale] = field(default_factory=dict)
    """Of the weights that are stored in FP8."""

    @property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        return {name: stored.file for name, stored in self.tensors.items()}

    def tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or one slice of it, in plain floats; never more than that is in memory.

        An FP8 weight is dequantized to float32. Raises UserError for any other type that is not a plain float.
        """
        stored = self.tensors[name]
        if name in self.scales:
            return dequantized(stored, self.scales[name], slices)
        if stored.dtype not in PLAIN:
            raise UserError(
                f"the checkpoint {self.name} has {name} in the element type {stored.dtype}, which is no plain float:"
                " choose one that is not quantized"
            )
        with safe_open(stored.file, framework="pt") as file:
            part = file.get_slice(stored.name)
            tensor: Tensor = part[slices] if slices else part[:]
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The complete shape of a tensor, from its file's header."""
        return self.tensors[name].shape


def find_model(name: str, key: str) -> ModelFiles:
    """The checkpoint that ``key`` names: a folder, or a model of the hub (taken from its cache or fetched).

    Raises UserError where it is missing, holds no safetensors, or is quantized with a method that is not supported.
    """
    folder = Path(name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, also false for a name that no file can have
        folder = _from_hub(name, key)
    what = f"{key}={name}"
    check_format(folder, what)
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} holds no config.json: give the folder or hub name of a Hugging Face model")
    tensors = stored_tensors(folder, what)
    return ModelFiles(name, folder, tensors, weight_scales(tensors, read_quantization(folder, what)))


def _from_hub(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download

    if (
        name.startswith((".", "/"))
        or name.count("/") > 1
        or "/" not in name
        or name.split("/")[0] in ("models", "runs")
    ):
        raise UserError(f"{key}={name} does not exist: give a folder with config.json and safetensors, or a hub name")
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *LICENSE_FILES]
        others = ["original/*", "consolidated*"]  # the same weights once more, in their makers' own formats
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=others))
    except Exception as error:  # the hub's client has a dozen kinds; to the user they all mean this
        raise UserError(
            f"{key}={name} is no folder, and the hub did not give it ({type(error).__name__}): download it first,"
            " or give a folder"
        ) from error
