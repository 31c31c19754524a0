"""The data files of a folder and the splits that they belong to, as the ``datasets`` library assigns them."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path
from typing import Any

from distill.data.files import KINDS, kind_of
from distill.errors import UserError, reason

logger = logging.getLogger(__name__)

_DOCUMENTS = (".md", ".txt", ".yaml", ".yml", ".py", "")
_FILE_KEYS = {"config_name", "data_files", "data_dir", "default", "description"}
"""Keys of a dataset card's configuration that choose files; any other one changes how they are read."""


def split_files(folder: Path, subset: str | None, key: str) -> dict[str, list[Path]] | None:
    """The files of each split, by the card's configuration or by the names of files and folders.

    ``subset`` is the card's configuration; ``key`` begins a message: data.train.data_path=FOLDER. None: the folder has
    to be read by the ``datasets`` library, as its files are of other kinds, or its card has settings for a reader.
    Raises UserError for a folder without data files.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    base = folder.resolve()
    patterns = None
    try:
        settings = _card_settings(base, subset)
        if settings is None or settings.keys() - _FILE_KEYS:
            return None
        base = base / settings.get("data_dir", "")
        searched = glob.escape(base.as_posix())
        patterns = sanitize_patterns(settings["data_files"]) if "data_files" in settings else None
        found = DataFilesDict.from_patterns(patterns or get_data_patterns(searched), base_path=searched)
    except EmptyDatasetError:
        if linked := _all_readable(base):
            raise UserError(
                f"{key} holds data files only in folders that are symbolic links ({linked[0].relative_to(base)} first):"
                " name the linked folder, or link the files"
            ) from None
        raise UserError(f"{key} holds no data files: name a folder with files of {', '.join(KINDS)}") from None
    except Exception as error:  # the card is the user's, and the library raises many kinds
        raise UserError(f"{key} has files that can't be found ({reason(error)}): correct its README.md") from None
    splits = {str(split): [Path(name) for name in dict.fromkeys(files)] for split, files in found.items()}
    readable = {split: _readable(files) for split, files in splits.items()}
    if not any(readable.values()):
        return None
    left = [file for split in splits for file in splits[split] if file not in readable[split] and _may_be_data(file)]
    if left:
        logger.warning(
            "%s: %d files are of no kind that can be read, and are left out (%s first): the kinds are %s",
            *(key, len(left), left[0].name, ", ".join(KINDS)),
        )
    listed = {file for files in splits.values() for file in files}
    if not patterns and (unlisted := [file for file in _all_readable(base) if file not in listed]):
        logger.warning(
            "%s: %d data files are in no split by their names, or in a linked folder, and are left out (%s first):"
            " rename them, name one of the files, or list all of them under configs in README.md",
            *(key, len(unlisted), unlisted[0].relative_to(base)),
        )
    return {split: files for split, files in readable.items() if files}


def _all_readable(base: Path) -> list[Path]:
    """All files of known kinds under ``base``, also in linked folders, but not hidden ones and metadata."""
    from datasets.data_files import FILES_TO_IGNORE

    found, seen = [], set()
    for folder, folders, names in os.walk(base, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(folder, name) for name in names if name[0] != "." and name not in FILES_TO_IGNORE]
    return sorted(file for file in _readable(found) if not _is_metadata(file))


def _readable(files: list[Path]) -> list[Path]:
    """Files of known kinds; one that is named metadata counts where there is no other."""
    known = [file for file in files if kind_of(file)[0]]
    return [file for file in known if not _is_metadata(file)] or known


def _is_metadata(file: Path) -> bool:
    return file.name.split(".")[0].lower() == "metadata"


def _may_be_data(file: Path) -> bool:
    return file.suffix.lower() not in _DOCUMENTS


def _card_settings(folder: Path, subset: str | None) -> dict[str, Any] | None:
    """The configuration ``subset`` of the folder's dataset card, or its default; {}: the card has none.

    None: there is no such configuration, which the ``datasets`` library explains.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    if (folder / ".huggingface.yaml").exists():
        return None
    described = card.is_file() and card.read_text(encoding="utf-8").lstrip().startswith("---")
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data if described else {})
    if not configs:
        return {} if subset in (None, "default") else None
    name = subset or (configs.get_default_config_name() if len(configs) > 1 else next(iter(configs)))
    settings: dict[str, Any] | None = configs.get(name)
    return settings
