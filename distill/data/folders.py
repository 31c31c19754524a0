"""The data files of a folder and the splits that they belong to, as the ``datasets`` library assigns them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from distill.config.build import reason
from distill.data.files import KINDS, kind_of
from distill.types import UserError

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
    try:
        settings = _card_settings(base, subset)
        if settings is None or settings.keys() - _FILE_KEYS:
            return None
        base = base / settings.get("data_dir", "")
        patterns = sanitize_patterns(settings["data_files"]) if "data_files" in settings else None
        found = DataFilesDict.from_patterns(patterns or get_data_patterns(base.as_posix()), base_path=base.as_posix())
    except EmptyDatasetError:
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
    return {split: files for split, files in readable.items() if files}


def _readable(files: list[Path]) -> list[Path]:
    """Files of known kinds; one that is named metadata counts where there is no other."""
    known = [file for file in files if kind_of(file)[0]]
    return [file for file in known if file.name.split(".")[0].lower() != "metadata"] or known


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
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data if card.is_file() else {})
    if not configs:
        return {} if subset in (None, "default") else None
    name = subset or (configs.get_default_config_name() if len(configs) > 1 else next(iter(configs)))
    settings: dict[str, Any] | None = configs.get(name)
    return settings
