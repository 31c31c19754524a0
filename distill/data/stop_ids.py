"""Find the stop ids of a model: the token ids that end a response."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from distill.errors import UserError, reason, show

log = logging.getLogger(__name__)


class ModelFolder(Protocol):
    """Interface of a model on disk, implemented by distill.model.hf_files.ModelFiles."""

    @property
    def name(self) -> str:
        """Return the model's name in the configuration (model_name)."""

    @property
    def folder(self) -> Path:
        """Return the folder of the model's files."""


def stop_ids(files: ModelFolder, tokenizer: Any, key: str) -> tuple[int, ...]:
    """Return the model's stop ids: ``eos_token_id`` in the model's files, and the EOS id of ``tokenizer``.

    As in transformers, ``eos_token_id`` is read from generation_config.json, or from config.json if
    generation_config.json is missing. ``key``: the model's configuration key, for messages. Raises UserError for a file
    that cannot be read, or for an ``eos_token_id`` that is neither a token id nor a list of token ids.
    """
    path = files.folder / "generation_config.json"
    sections = [read_json(path, files.name, key)] if path.is_file() else []
    if not sections and (path := files.folder / "config.json").is_file():
        config = read_json(path, files.name, key)
        sections = [config, *(config[name] for name in ("text_config",) if isinstance(config.get(name), dict))]
    eos: Any = next((section["eos_token_id"] for section in sections if section.get("eos_token_id") is not None), [])
    listed = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise UserError(
            f"{key}={files.name} has eos_token_id={show(eos)} in {path.name}, which is neither a token id nor a list of"
            " token ids",
            "correct the file, or set policy.generation.stop_token_ids",
            key=key,
            value=files.name,
        )
    return tuple(sorted({*listed, tokenizer.eos_token_id} - {None}))


def usable_stop_ids(ids: Sequence[int], tokenizer: Any, valid_vocab: int, name: str) -> tuple[int, ...]:
    """Return the stop ids that the model can generate: ids less than ``valid_vocab``, the vocabulary size.

    Logs a warning about ids that are too large, about stop ids that are ordinary text, and if no stop id is left.
    ``name``: the model's name, for messages.
    """
    if beyond := [token for token in ids if token >= valid_vocab]:
        log.warning("%s: stop ids %s are ignored, because the vocabulary has only %d tokens", name, beyond, valid_vocab)
    usable = tuple(token for token in ids if token < valid_vocab)
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if text := [token for token in usable if token not in control]:
        verbatim = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        log.warning(
            "%s: stop ids %s are ordinary text (%s), so a response ends when it contains this text: correct"
            " eos_token_id in generation_config.json or config.json, or set policy.generation.stop_token_ids",
            *(name, text, ", ".join(repr(tokenizer.decode([token], **verbatim)) for token in text)),
        )
    if not usable:
        log.warning(
            "%s has no stop id in generation_config.json, config.json or the tokenizer, so responses end only at"
            " policy.generation.max_new_tokens: set policy.generation.stop_token_ids",
            name,
        )
    return usable


def read_json(path: Path, name: str, key: str) -> dict[str, Any]:
    """Return the JSON object in the file ``path``; raise UserError if it cannot be read.

    ``name`` and ``key``: name of the model and its configuration key, for messages.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{key}={name} has a {path.name} that cannot be read ({reason(error)})"
        raise UserError(problem, "download the file again", key=key, value=name) from error
    if not isinstance(found, dict):
        problem = f"{key}={name} has a {path.name} that does not contain a JSON object"
        raise UserError(problem, "download the file again", key=key, value=name)
    return found
