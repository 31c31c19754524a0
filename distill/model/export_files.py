"""The small files of an export: copied from the source models, changed only where training changed something."""

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
from distill.errors import UserError
from distill.model.export_dialects import (
    Json,
    model_config_for_export,
    tokenizer_config_for_export,
    with_dtype,
    with_stop_ids,
    with_tying,
)
from distill.model.hf_files import LICENSE_FILES, ModelFiles
from distill.model.hf_index import json_object
from distill.model.model_card import model_card

log = logging.getLogger(__name__)

EXPORT_FILES = "export_files"
"""The folder of a checkpoint that holds them."""
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
"""Folders of a model whose files are copied, where their names match."""
_MODEL = (_CONFIG, _GENERATION, *LICENSE_FILES)
_TEXTS = ("What is 1+2, please?", "  two  spaces\n\nand lines", "x = {'a': [1.5, -2]}; # done")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class ExportFiles:
    """The small files of an export by their path in it."""

    contents: Mapping[str, bytes]
    tied_as_read: bool
    """``tie_word_embeddings`` as transformers reads it from this config.json."""

    def complete(self, dtype: torch.dtype, tensors: Collection[str]) -> dict[str, bytes]:
        """The files of an export that holds ``tensors`` (names) in ``dtype``."""
        complete = dict(self.contents)
        config = with_dtype(json.loads(complete[_CONFIG]), dtype)
        _put(complete, _CONFIG, with_tying(config, self.tied_as_read, _HEAD not in tensors))
        return complete

    def stored(self, dtype: torch.dtype, tensors: Collection[str]) -> dict[str, bytes]:
        """``complete``, by the paths that the files have in a checkpoint."""
        return {f"{EXPORT_FILES}/{name}": content for name, content in self.complete(dtype, tensors).items()}

    def with_card(self, recipe: Mapping[str, Any], step: int, stop_tokens: Mapping[int, str]) -> ExportFiles:
        """The same files with a model card that describes the training.

        ``recipe``: the configuration as nested dictionaries. ``stop_tokens``: id -> token.
        """
        name = next((name for name in self.contents if name.lower() == _CARD.lower()), _CARD)
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
    """Read the small files of the model ``files`` and of its tokenizer, and edit them for an export.

    ``tokenizer``: as the trainer reads it. ``tokenizer_name``: policy.tokenizer.name. ``stop_token_ids``: those of
    training; empty leaves the source's. ``chat_template``: the file of the user's own. Reads no weights. Raises
    UserError for a file that can't be read.
    """
    what = f"policy.model_name={files.name}"
    try:
        tokenizer_files = tokenizer_folder(files, tokenizer_name)
        contents = _read(files.folder, _MODEL) | _read(tokenizer_files, _TOKENIZER)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what} has a file that can't be copied to exports ({error}): make it readable, or download the model"
            " again"
        ) from error
    own_template = None
    if chat_template is not None:  # an editor's byte order mark would begin every rendered prompt
        path = os.path.expanduser(chat_template)
        own_template = read_text(path, "policy.tokenizer.chat_template").removeprefix("\ufeff")
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    edited = model_config_for_export(
        json_object(files.folder / _CONFIG, what), config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    )
    generation = json_object(files.folder / _GENERATION, what) if _GENERATION in contents else None
    generation, edited = with_stop_ids(generation, edited, stop_token_ids)
    _put(contents, _CONFIG, edited)
    if generation is not None:
        _put(contents, _GENERATION, generation)
    if own_template is not None:
        contents = {name: content for name, content in contents.items() if not _matches(name, _OTHER_TEMPLATES)}
        contents[_TEMPLATE] = own_template.encode()
    misread = tokenizer_class_misreads(tokenizer_files)
    if _TOKENIZER_CONFIG in contents or _TOKENIZER_JSON in contents:
        former = _object(contents, tokenizer_files, _TOKENIZER_CONFIG, what)
        tokenizer_config = tokenizer_config_for_export(
            former,
            family=config.model_type,
            has_json=_TOKENIZER_JSON in contents,
            misread=misread,
            own_template=own_template is not None,
        )
        if tokenizer_config.get("tokenizer_class") != former.get("tokenizer_class"):
            named = _object(contents, tokenizer_files, _SPECIAL_MAP, what)
            special = _special_tokens(json.loads(contents[_TOKENIZER_JSON]), tokenizer)
            tokenizer_config = {name: token for name, token in special.items() if name not in named} | tokenizer_config
        _put(contents, _TOKENIZER_CONFIG, tokenizer_config)
        if former.get("add_bos_token") is True and _TOKENIZER_JSON in contents:
            _write_bos(contents, tokenizer)
    if misread and _TOKENIZER_JSON in contents:
        _warn_if_misread(contents, what)
    return ExportFiles(contents, bool(config.tie_word_embeddings))


def _write_bos(contents: dict[str, bytes], tokenizer: Any) -> None:
    """Give tokenizer.json the post-processor of ``tokenizer`` where only that one puts BOS before a text.

    No version of transformers applies add_bos_token for the class that exports name.
    """
    own, used = Tokenizer.from_str(contents[_TOKENIZER_JSON].decode()), tokenizer.backend_tokenizer
    if own.encode("a").ids != used.encode("a").ids:
        post_processor = json.loads(used.post_processor.__getstate__())
        _put(contents, _TOKENIZER_JSON, json.loads(contents[_TOKENIZER_JSON]) | {"post_processor": post_processor})


def _special_tokens(tokenizer_json: Json, tokenizer: Any) -> dict[str, str]:
    """The named special tokens of ``tokenizer``, by its class perhaps, that tokenizer.json has."""
    there = {entry["content"] for entry in tokenizer_json.get("added_tokens", ())}
    found = {name: str(getattr(tokenizer, name, None)) for name in _SPECIAL}
    return {name: token for name, token in found.items() if token in there}


def _warn_if_misread(contents: Mapping[str, bytes], what: str) -> None:
    """Read the tokenizer of the export back: for some model types transformers ignores the class in the file."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (_CONFIG, _TOKENIZER_CONFIG, _TOKENIZER_JSON):
            Path(folder, name).write_bytes(contents[name])
        own = Tokenizer.from_file(f"{folder}/{_TOKENIZER_JSON}")
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        plain = {"add_special_tokens": False}
        if any(read.encode(text, **plain) != own.encode(text, **plain).ids for text in _TEXTS):
            log.warning(
                "%s: AutoTokenizer of transformers %s misreads the tokenizer of exports, as it ignores the class in"
                " tokenizer_config.json for this type of model: read it with PreTrainedTokenizerFast.from_pretrained",
                *(what, transformers.__version__),
            )


def _object(contents: Mapping[str, bytes], folder: Path, name: str, what: str) -> Json:
    """The object in the file ``name``; empty where there is no such file."""
    return json_object(folder / name, what) if name in contents else {}


def _put(contents: dict[str, bytes], name: str, edited: Json) -> None:
    """Replace a file's content; one that holds the same object stays as it is, byte for byte."""
    if name not in contents or json.loads(contents[name]) != edited:
        contents[name] = (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def stored_export_files(checkpoint: Path, names: Iterable[str]) -> ExportFiles | None:
    """The small files that a checkpoint with the files ``names`` holds; None for one of an older version."""
    prefix = f"{EXPORT_FILES}/"
    contents = {n.removeprefix(prefix): (checkpoint / n).read_bytes() for n in names if n.startswith(prefix)}
    if not contents:
        return None
    config = AutoConfig.from_pretrained(checkpoint / EXPORT_FILES, trust_remote_code=False)
    return ExportFiles(contents, bool(config.tie_word_embeddings))


def tokenizer_folder(files: ModelFiles, name: str | None) -> Path:
    """The folder of the tokenizer that ``name`` names: that of ``files`` (also for None), another one, or the hub's.

    From the hub it has the tokenizer and the configurations; no weights are downloaded.
    """
    if name in (None, files.name):
        return files.folder
    if os.path.isdir(str(name)):
        return Path(str(name))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=[*_TOKENIZER, _CONFIG, _GENERATION]))


def _read(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """The files of ``folder`` that match, links followed; large files of other kinds are never read."""
    return {name: (folder / name).read_bytes() for name in sorted(_names(folder)) if _matches(name, patterns)}


def _names(folder: Path) -> Iterator[str]:
    for path in (*folder.iterdir(), *(path for name in _FOLDERS for path in folder.glob(f"{name}/*"))):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
