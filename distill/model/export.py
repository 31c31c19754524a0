"""Export the student as a Hugging Face model folder; the main rank writes the gathered weights."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.model.export_files import ExportFiles

_SHARD_BYTES = 5 * 2**30
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"


def export_hf(
    folder: Path, weights: Iterable[tuple[str, Tensor]], files: ExportFiles | None, dtype: torch.dtype
) -> None:
    """Write a folder for ``AutoModelForCausalLM.from_pretrained``: weights, configuration and tokenizer.

    Collective: all ranks iterate over ``weights``, pairs of a name and a complete tensor, because the iteration gathers
    the tensors. ``files``: configuration and tokenizer files on the main rank, which writes the folder; None on all
    other ranks. The main rank holds the weights of only one file (at most 5 GiB, or one larger tensor) in memory. If
    writing fails, the main rank raises the error only after all weights are gathered, so that the other ranks do not
    wait in a gather forever.
    """
    with consumed(weights) as remaining:
        if files is not None:
            write_hf(folder, remaining, files, dtype)


@contextmanager
def consumed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Yield an iterator over ``weights``; after the ``with`` block or an exception in it, iterate to the end.

    So every rank takes part in all gathers, also if it uses only some of the tensors.
    """
    remaining = iter(weights)
    try:
        yield remaining
    finally:
        for _ in remaining:
            pass


def write_hf(folder: Path, weights: Iterable[tuple[str, Tensor]], files: ExportFiles, dtype: torch.dtype) -> None:
    """Write the folder of ``export_hf``; not collective: after an error, the other weights are not read."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (
        *folder.glob("model*.safetensors"),
        folder / _INDEX,
    ):  # from an earlier export with another number of files
        stale.unlink(missing_ok=True)
    names, nbytes = _write_shards(folder, weights)
    total = len(set(names.values()))
    renamed = {file: _shard_name(i, total) for i, file in enumerate(dict.fromkeys(names.values()))}
    for file, final in renamed.items():
        (folder / file).rename(folder / final)
    if total > 1:
        weight_map = {name: renamed[file] for name, file in names.items()}
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))
    for name, content in files.complete(dtype, names.keys()).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    mode = stat.S_IMODE((folder / _CONFIG).stat().st_mode)
    for weights_file in renamed.values():  # safetensors ignores the umask and uses mode 0600
        (folder / weights_file).chmod(mode)


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, str], int]:
    """Write safetensors files of at most 5 GiB; return each tensor's file name and the total bytes.

    A tensor that is larger than 5 GiB gets its own file. The file names are temporary, because the final names contain
    the number of files, which is known only at the end.
    """
    names: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0

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
        total += nbytes
    flush()
    return names, total


def _shard_name(index: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{index + 1:05d}-of-{total:05d}.safetensors"
