"""Small files of an export: configuration, tokenizer, model card and licence.

They are copies of the source model's files with the changes that the training requires.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os.path
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill.data.files import read_text
from distill.data.tokenizer import tokenizer_class_misreads
from distill.model.export_dialects import (
    Json,
    model_config_for_export,
    tokenizer_config_for_export,
    with_dtype,
    with_stop_ids,
    with_tying,
)
from distill.model.hf_config import forward_settings
from distill.model.hf_files import LICENSE_FILES, ModelFiles
from distill.model.hf_index import ModelSetting, json_object
from distill.model.model_card import adapter_card, model_card
from distill.model.peft_files import ADAPTER_CONFIG

log = logging.getLogger(__name__)

EXPORT_FILES = "export_files"
"""Subfolder of a checkpoint for the small files of an export: configuration, tokenizer, licence."""
_HEAD = "lm_head.weight"
_CONFIG, _GENERATION, _CARD, _TOKENIZER_JSON = "config.json", "generation_config.json", "README.md", "tokenizer.json"
_TOKENIZER_CONFIG, _SPECIAL_MAP, _TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates/*.jinja")
_TOKENIZER = (
    *(_TOKENIZER_JSON, _TOKENIZER_CONFIG, _SPECIAL_MAP, "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "*.tiktoken"),
    *("tekken.json", _TEMPLATE, *_OTHER_TEMPLATES),
)
_FOLDERS = ("additional_chat_templates", "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*")
"""Glob patterns of a model's subfolders that are also searched for files to copy to an export."""
_MODEL = (_CONFIG, _GENERATION, *LICENSE_FILES)
_SAMPLE_TEXTS = ("What is 1+2, please?", "  two  spaces\n\nand lines", "x = {'a': [1.5, -2]}; # done")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class ExportFiles:
    """Files of an export except its weights: configuration, tokenizer, model card and licence."""

    contents: Mapping[str, bytes]
    """Maps the path of each file, relative to the export folder, to its content."""
    tied_as_read: bool
    """Value of ``tie_word_embeddings`` that transformers reads from config.json in ``contents``."""

    def complete(self, dtype: torch.dtype, tensors: Collection[str]) -> dict[str, bytes]:
        """Return a dictionary from path to content, with config.json adapted to the exported weights.

        ``dtype``: dtype of the weights. ``tensors``: names of the weights. If ``tensors`` does not contain the LM head,
        config.json ties the LM head to the embedding.
        """
        complete = dict(self.contents)
        config = with_dtype(json.loads(complete[_CONFIG]), dtype)
        _put(complete, _CONFIG, with_tying(config, self.tied_as_read, _HEAD not in tensors))
        return complete

    def stored(self, dtype: torch.dtype, tensors: Collection[str]) -> dict[str, bytes]:
        """Return the same files as ``complete()``, keyed by their paths inside a checkpoint directory."""
        return {f"{EXPORT_FILES}/{name}": content for name, content in self.complete(dtype, tensors).items()}

    def for_adapter(self, config: Json) -> dict[str, bytes]:
        """Return the files of an adapter folder, except its tensors, as a dictionary from path to content.

        They are the same files without config.json, which belongs to the base model, with ``config`` as
        adapter_config.json and the model card of an adapter.
        """
        contents = {name: content for name, content in self.contents.items() if name != _CONFIG}
        _put(contents, ADAPTER_CONFIG, config)
        name, base = self._card_name, config["base_model_name_or_path"]
        contents[name] = adapter_card(contents.get(name, b"").decode("utf-8-sig", errors="replace"), base).encode()
        return contents

    def changes(self, current: ExportFiles) -> list[str]:
        """Return a text ``NAME was OLD and is NEW`` for each setting of the model that differs in ``current``.

        The compared settings change the logits of the same weights, or are the stop ids. ``self``: the files that a
        checkpoint stores. ``current``: the files that the run read at its start.
        """
        before, after = self._settings(), current._settings()
        return [f"{name} was {before[name]} and is {value}" for name, value in after.items() if before[name] != value]

    def _settings(self) -> dict[str, Any]:
        config = AutoConfig.for_model(**json.loads(self.contents[_CONFIG]))
        eos = json.loads(self.contents.get(_GENERATION, b"{}")).get("eos_token_id")
        stops = sorted(set(eos)) if isinstance(eos, list) else [] if eos is None else [eos]
        place = "in the config.json of policy.model_name"
        settings = {f"{name} {place}": value for name, value in forward_settings(config).items()}
        return {**settings, "the list of stop token ids": stops}

    @property
    def _card_name(self) -> str:
        return next((name for name in self.contents if name.lower() == _CARD.lower()), _CARD)

    def with_card(self, recipe: Mapping[str, Any], step: int, stop_tokens: Mapping[int, str]) -> ExportFiles:
        """Return a copy of these files with a model card that describes the training.

        ``recipe``: the configuration as nested dictionaries. ``step``: number of completed training steps.
        ``stop_tokens`` maps the id of each stop token to its text.
        """
        name = self._card_name
        source = self.contents.get(name, b"").decode("utf-8-sig", errors="replace")
        return replace(self, contents={**self.contents, name: model_card(source, recipe, step, stop_tokens).encode()})


def read_export_files(
    files: ModelFiles,
    tokenizer: Any,
    tokenizer_name: str | None,
    stop_token_ids: Sequence[int],
    *,
    chat_template: str | None = None,
) -> ExportFiles:
    """Read a model's configuration, tokenizer and licence files, and edit them for an export.

    Reads no weights. ``files``: the source model. ``tokenizer``: the tokenizer as loaded for training.
    ``tokenizer_name``: value of policy.tokenizer.name; None: the model's own tokenizer. ``stop_token_ids``: ids of the
    tokens that end a response in training; if empty, the stop ids of the source model are kept. ``chat_template``: path
    of the user's chat template; None: keep the tokenizer's template. Raises UserError for a file that cannot be read.
    """
    setting = ModelSetting("policy.model_name", files.name)
    try:
        folder = tokenizer_folder(files, tokenizer_name)
        contents = _read(files.folder, _MODEL) | _read(folder, _TOKENIZER)
    except (OSError, UnicodeDecodeError) as error:
        problem = f"has a file that cannot be copied to exports ({error})"
        raise setting.error(problem, "make this file readable, or download the model again") from error
    key = "policy.tokenizer.chat_template"
    template = None if chat_template is None else read_text(os.path.expanduser(chat_template), key)
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    _edit_model_files(contents, files.folder, config, stop_token_ids, setting)
    if template is not None:
        contents = {name: content for name, content in contents.items() if not _matches(name, _OTHER_TEMPLATES)}
        contents[_TEMPLATE] = template.encode()
    misread = tokenizer_class_misreads(folder)
    if _TOKENIZER_CONFIG in contents or _TOKENIZER_JSON in contents:
        source = _object(contents, folder, _TOKENIZER_CONFIG, setting)
        edited = tokenizer_config_for_export(
            source,
            family=config.model_type,
            has_json=_TOKENIZER_JSON in contents,
            misread=misread,
            own_template=template is not None,
        )
        if edited.get("tokenizer_class") != source.get("tokenizer_class"):
            named = _object(contents, folder, _SPECIAL_MAP, setting)
            special = _special_tokens(json.loads(contents[_TOKENIZER_JSON]), tokenizer)
            edited = {name: token for name, token in special.items() if name not in named} | edited
        _put(contents, _TOKENIZER_CONFIG, edited)
        if source.get("add_bos_token") is True and _TOKENIZER_JSON in contents:
            _write_bos(contents, tokenizer)
    if misread and _TOKENIZER_JSON in contents:
        _warn_if_misread(contents, setting)
    return ExportFiles(contents, bool(config.tie_word_embeddings))


def _edit_model_files(
    contents: dict[str, bytes], folder: Path, config: Any, stop_token_ids: Sequence[int], setting: ModelSetting
) -> None:
    """Edit config.json and generation_config.json in ``contents`` for the export.

    A missing generation_config.json is created if ``stop_token_ids`` is not empty.
    """
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    edited = model_config_for_export(json_object(folder / _CONFIG, setting), config, architecture)
    generation = json_object(folder / _GENERATION, setting) if _GENERATION in contents else None
    generation, edited = with_stop_ids(generation, edited, stop_token_ids)
    _put(contents, _CONFIG, edited)
    if generation is not None:
        _put(contents, _GENERATION, generation)


def _write_bos(contents: dict[str, bytes], tokenizer: Any) -> None:
    """Copy the post-processor of ``tokenizer`` to tokenizer.json if the two encode a text differently.

    ``tokenizer``: the tokenizer as loaded for training. Its post-processor adds the BOS token if the source model sets
    add_bos_token=true. The copy is needed because the tokenizer class in exports ignores add_bos_token in every version
    of transformers.
    """
    own, used = Tokenizer.from_str(contents[_TOKENIZER_JSON].decode()), tokenizer.backend_tokenizer
    if own.encode("a").ids != used.encode("a").ids:
        post_processor = json.loads(used.post_processor.__getstate__())
        _put(contents, _TOKENIZER_JSON, json.loads(contents[_TOKENIZER_JSON]) | {"post_processor": post_processor})


def _special_tokens(tokenizer_json: Json, tokenizer: Any) -> dict[str, str]:
    """Return the BOS, EOS, UNK and PAD tokens of ``tokenizer`` that tokenizer.json lists as added tokens.

    The result maps attribute names such as ``bos_token`` to the text of the token. Some of these tokens may come from
    the defaults of the tokenizer's class.
    """
    added = {entry["content"] for entry in tokenizer_json.get("added_tokens", ())}
    found = {name: str(getattr(tokenizer, name, None)) for name in _SPECIAL}
    return {name: token for name, token in found.items() if token in added}


def _warn_if_misread(contents: Mapping[str, bytes], setting: ModelSetting) -> None:
    """Log a warning if AutoTokenizer encodes sample texts differently from the exported tokenizer.json.

    This can happen because AutoTokenizer ignores ``tokenizer_class`` for some model types.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in (_CONFIG, _TOKENIZER_CONFIG, _TOKENIZER_JSON):
            Path(folder, name).write_bytes(contents[name])
        own = Tokenizer.from_file(f"{folder}/{_TOKENIZER_JSON}")
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        plain = {"add_special_tokens": False}
        if any(read.encode(text, **plain) != own.encode(text, **plain).ids for text in _SAMPLE_TEXTS):
            log.warning(
                "%s: AutoTokenizer of transformers %s encodes texts incorrectly with the exported tokenizer, because"
                " it ignores tokenizer_class for this model type: load the exported tokenizer with"
                " PreTrainedTokenizerFast.from_pretrained",
                *(setting, transformers.__version__),
            )


def _object(contents: Mapping[str, bytes], folder: Path, name: str, setting: ModelSetting) -> Json:
    """Return the JSON object in ``folder / name``, or an empty object if ``contents`` lacks this file."""
    return json_object(folder / name, setting) if name in contents else {}


def _put(contents: dict[str, bytes], name: str, edited: Json) -> None:
    """Store ``edited`` as JSON in ``contents[name]``, unless an equal JSON object is already stored there."""
    if name not in contents or json.loads(contents[name]) != edited:
        contents[name] = (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def stored_export_files(checkpoint: Path, names: Iterable[str]) -> ExportFiles | None:
    """Read the export files (without weights) that a checkpoint stores; return None if it has none.

    ``names``: paths of all files of the checkpoint, relative to the checkpoint. Checkpoints of older versions of this
    program have no export files.
    """
    prefix = f"{EXPORT_FILES}/"
    contents = {n.removeprefix(prefix): (checkpoint / n).read_bytes() for n in names if n.startswith(prefix)}
    if not contents:
        return None
    config = AutoConfig.from_pretrained(checkpoint / EXPORT_FILES, trust_remote_code=False)
    return ExportFiles(contents, bool(config.tie_word_embeddings))


def tokenizer_folder(files: ModelFiles, name: str | None) -> Path:
    """Return the local folder of the tokenizer ``name``; download the tokenizer if ``name`` is a hub name.

    ``name``: value of policy.tokenizer.name; None: the tokenizer in the folder of the model ``files``. The download
    contains tokenizer and configuration files, no weights.
    """
    if name in (None, files.name):
        return files.folder
    if os.path.isdir(str(name)):
        return Path(str(name))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=[*_TOKENIZER, _CONFIG, _GENERATION]))


def _read(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of the files that match ``patterns``, keyed by path relative to ``folder``.

    Symbolic links are followed.
    """
    return {name: (folder / name).read_bytes() for name in sorted(_names(folder)) if _matches(name, patterns)}


def _names(folder: Path) -> Iterator[str]:
    for path in (*folder.iterdir(), *(path for name in _FOLDERS for path in folder.glob(f"{name}/*"))):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
