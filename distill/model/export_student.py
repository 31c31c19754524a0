"""Export of a checkpoint of the student: the complete model, or the adapters if only they are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.model.export import consumed, export_hf
from distill.model.export_files import ExportFiles
from distill.model.peft_files import adapter_config, write_adapter
from distill.model.student import Student


def export_student(checkpoint: Path, student: Student, files: ExportFiles | None, recipe: Mapping[str, Any]) -> None:
    """Write the folder ``hf`` with the complete model, or ``peft`` with the adapters; collective.

    ``checkpoint``: the parent of the folder. ``files``, ``recipe``: as in ``export_adapter``.
    """
    if student.base is None:
        export_hf(checkpoint / "hf", student.weights(), files, student.dtype)
        return
    base = [name for name, _ in student.model.named_hf_parameters()]
    export_adapter(checkpoint / "peft", student.adapter_weights(), files, recipe, base, student.base)


def export_adapter(
    folder: Path,
    adapters: Iterable[tuple[str, Tensor]],
    files: ExportFiles | None,
    recipe: Mapping[str, Any],
    base: Iterable[str],
    base_info: Mapping[str, Any],
) -> None:
    """Write a folder for PEFT and for ``LoRARequest`` of vLLM: float32 adapters, configuration, tokenizer.

    Collective: all ranks iterate over ``adapters``, pairs of a name and a complete tensor. ``files``: files of an
    export on the main rank, which writes the folder; None on all other ranks. ``recipe``: the configuration as nested
    dictionaries. ``base``: names of the base model's parameters; ``base_info``: its name, revision and checksums,
    as ``frozen_base`` returns them. The main rank holds all adapters in host memory.
    """
    with consumed(adapters) as remaining:
        if files is not None:
            named = {name: tensor.cpu().clone() for name, tensor in remaining}  # a tensor may be a view of its bucket
            config = adapter_config(recipe, named, list(base), base_info)
            write_adapter(folder, named, files.for_adapter(config), base_info["checksum"])
