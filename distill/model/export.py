"""A Hugging Face folder of the student, written by the main rank from gathered weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.model.load import ModelFiles

_SHARD_BYTES = 5 * 2**30


def export_hf(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    files: ModelFiles,
    config: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    writes: bool,
) -> None:
    """Write what ``AutoModelForCausalLM.from_pretrained(folder)`` loads: weights, configuration, tokenizer.

    All ranks call it and drain ``weights`` (a gather); the one that ``writes`` holds one file's worth, 5 GB, at most.
    An error of writing comes behind the gather's end, for the others wait in it.
    """
    left = iter(weights)
    try:
        if writes:
            _write(folder, left, files, config, tokenizer, dtype)
    finally:
        for _ in left:
            pass


def _write(
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    files: ModelFiles,
    config: Any,
    tokenizer: Any,
    dtype: torch.dtype,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = _write_shards(folder, weights)
    total = len(set(names.values()))
    renamed = {file: _shard_name(i, total) for i, file in enumerate(dict.fromkeys(names.values()))}
    for file, final in renamed.items():
        (folder / file).rename(folder / final)
    if total > 1:
        index = {"metadata": {}, "weight_map": {name: renamed[file] for name, file in names.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = type(config).from_dict(config.to_dict())
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (files.folder / "generation_config.json").is_file():
        shutil.copyfile(files.folder / "generation_config.json", folder / "generation_config.json")


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Tensor name -> file, in files of a few GB, named by their order."""
    names: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"part-{len(set(names.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in weights:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.cpu().clone()
        size += nbytes
    flush()
    return names


def _shard_name(place: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{place + 1:05d}-of-{total:05d}.safetensors"
