"""Find the data files of each split in a folder, by the rules of Hugging Face's ``datasets`` library."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path
from typing import Any

from distill.data.columns import setting_error
from distill.data.files import KINDS, kind_of
from distill.errors import UserError, reason

log = logging.getLogger(__name__)

_DOCUMENTS = (".md", ".txt", ".yaml", ".yml", ".py", "")
_FILE_KEYS = {"config_name", "data_files", "data_dir", "default", "description"}
"""Keys in a dataset card (README.md) that do not change how files are parsed: they only select files.

If a configuration in the card has any other key, the ``datasets`` library must read the folder.
"""


def split_files(folder: Path, subset: str | None, key: str) -> dict[str, list[Path]] | None:
    """Map each split to its data files, found by the dataset card or by the names of files and folders.

    ``subset``: name of a configuration in the dataset card (README.md); None: the default configuration. ``key``:
    configuration key of ``folder``, for messages. Returns None if the ``datasets`` library must read the folder: the
    folder has only unknown file types, or the card has parser settings. Raises UserError for a folder without data
    files and for an invalid card.
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
        raise _no_files(key, folder, base) from None
    except Exception as error:  # the card is user input, and the library raises many kinds of exception
        problem = f"has a dataset card (README.md) that is invalid or lists missing files ({reason(error)})"
        raise setting_error(key, str(folder), problem, "correct the README.md in this folder") from None
    splits = {str(split): [Path(name) for name in dict.fromkeys(files)] for split, files in found.items()}
    readable = {split: _readable(files) for split, files in splits.items()}
    if not any(readable.values()):
        return None
    _warn_of_ignored(f"{key}={folder}", base, splits, readable, by_names=not patterns)
    return {split: files for split, files in readable.items() if files}


def _no_files(key: str, folder: Path, base: Path) -> UserError:
    if linked := _all_readable(base):
        problem = f"has data files only in symbolic links to folders (first: {linked[0].relative_to(base)})"
        fix = f"set {key} to the target of the link, or create links to the files instead of the folder"
        return setting_error(key, str(folder), problem, fix)
    fix = f"set {key} to a folder with files of type {', '.join(KINDS)}"
    return setting_error(key, str(folder), "contains no data files", fix)


def _warn_of_ignored(
    label: str, base: Path, splits: dict[str, list[Path]], readable: dict[str, list[Path]], by_names: bool
) -> None:
    """Log a warning about ignored files: files of unknown types, and data files that belong to no split.

    ``splits``: maps each split to all its files; ``readable``: the same, but only files of known types. ``by_names``:
    whether splits were found by file names. If false, the dataset card lists the files and may leave out files on
    purpose, so there is no warning about data files that belong to no split.
    """
    unknown = [file for split in splits for file in splits[split] if file not in readable[split] and _may_be_data(file)]
    if unknown:
        log.warning(
            "%s: ignoring %d files of unknown types (first: %s); known types are %s",
            *(label, len(unknown), unknown[0].name, ", ".join(KINDS)),
        )
    listed = {file for files in splits.values() for file in files}
    if by_names and (unlisted := [file for file in _all_readable(base) if file not in listed]):
        log.warning(
            "%s: ignoring %d data files that are in a symbolically linked folder or whose names match no split (first:"
            " %s): rename the files, set data_path to one file, or list all files under configs in the README.md of the"
            " dataset",
            *(label, len(unlisted), unlisted[0].relative_to(base)),
        )


def _all_readable(base: Path) -> list[Path]:
    """Return the data files under ``base``, except hidden and metadata files; follow links to folders."""
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
    """Return those ``files`` that have a known type (KINDS, such as .jsonl).

    Files named "metadata" are returned only if no other file has a known type.
    """
    known = [file for file in files if kind_of(file)[0]]
    return [file for file in known if not _is_metadata(file)] or known


def _is_metadata(file: Path) -> bool:
    return file.name.split(".")[0].lower() == "metadata"


def _may_be_data(file: Path) -> bool:
    return file.suffix.lower() not in _DOCUMENTS


def _card_settings(folder: Path, subset: str | None) -> dict[str, Any] | None:
    """Return the settings of the configuration ``subset`` in the folder's dataset card (README.md).

    ``subset`` None: the default configuration. Returns {} if the card has no configurations. Returns None if no
    configuration has the name ``subset``, or if the folder has the obsolete settings file .huggingface.yaml; the
    ``datasets`` library then reads the folder or reports the error.
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
