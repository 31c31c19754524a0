"""Merge the adapters of a checkpoint into the files of their base model, one tensor at a time, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.model.base_checksum import digest
from distill.model.checksum import bit_sums_by_name
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import load_weights
from distill.model.lora_merge import Adapter, merge_into


def check_base(files: ModelFiles, key: str, shapes: Mapping[str, torch.Size], base: Mapping[str, Any]) -> None:
    """Raise UserError if the weights of a model are not those on which adapters were trained; reads all of them.

    ``files``, ``key``, ``shapes``, ``base``: as in ``merged_weights``. One tensor is in memory at a time.
    """
    sums = bit_sums_by_name((name, _base_weight(files, key, name, shape, base)) for name, shape in shapes.items())
    if digest(sums) != base["checksum"][base["dtype"]]:
        raise UserError(
            f"the weights of {key}={files.name} differ from those of the base model {base['model_name']} of the"
            " training",
            "give the folder of this base model as --model",
            key=key,
            value=files.name,
        )


def merged_weights(
    files: ModelFiles,
    key: str,
    shapes: Mapping[str, torch.Size],
    base: Mapping[str, Any],
    adapter_of: Callable[[str], Adapter | None],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, complete weight) pairs of the base model with its adapters, in ``dtype``; not collective.

    The weights are those that a sync sends: the base is first rounded to the precision of the training, and bfloat16 is
    rounded by a fixed dither. ``files``: the base model, and ``key`` the setting that names it. ``shapes`` maps the
    name of each weight to its shape. ``base``: the base model of the checkpoint, as ``frozen_base`` returns it.
    ``adapter_of`` returns the adapter of a weight; None for a weight without one. ``check_base`` must accept the
    base model. Raises UserError if a tensor is missing or has another shape.
    """
    for name, shape in shapes.items():
        yield name, _merged(_base_weight(files, key, name, shape, base), name, adapter_of(name), dtype)


def _base_weight(files: ModelFiles, key: str, name: str, shape: torch.Size, base: Mapping[str, Any]) -> Tensor:
    """Return a weight of the base model in the precision of the training."""
    weight = torch.empty(shape, dtype=getattr(torch, base["dtype"]))
    load_weights([(name, weight)], files, key)
    return weight


def _merged(weight: Tensor, name: str, adapter: Adapter | None, dtype: torch.dtype) -> Tensor:
    if adapter is None:
        return weight.to(dtype)
    merged = torch.empty_like(weight, dtype=dtype)
    if not bool(merge_into(merged, name, weight, adapter)):
        raise UserError(f"the adapter of {name} contains nan or infinity", "export another checkpoint", value=name)
    return merged
