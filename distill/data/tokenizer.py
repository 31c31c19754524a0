"""Load a model's tokenizer; tokenizer.json, if present, has priority over the transformers class."""

from __future__ import annotations

import filecmp
import json
import logging
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from distill.data.chat_template import read_chat_template, set_chat_template
from distill.data.rendering import opening_ids, token_ids
from distill.data.stop_ids import ModelFolder, read_json
from distill.data.tokenizer_checks import PLAIN_TEXTS, check_round_trip, encoding_difference
from distill.errors import MissingError, NotCachedError, UserError, reason, show
from distill.hub import cause_and_fix, is_hub_name, model_cache

log = logging.getLogger(__name__)

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_TEMPLATES = "additional_chat_templates"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BOS_BY_DEFAULT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Names of tokenizer classes for which add_bos_token is true by default (add BOS before plain text).

transformers 5 ignores this default if tokenizer.json is missing, so this module adds the BOS.
"""


@dataclass(frozen=True)
class _Source:
    """Location of a tokenizer's files. str() gives the name of the tokenizer in messages."""

    path: str | Path
    """Folder of the files, or a name on the Hugging Face hub."""
    key: str = ""
    """Configuration key that selects the tokenizer; "" if the configuration does not select it."""
    value: str = ""
    """Value of the configuration key ``key``; "" without a key."""

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.key else str(self.path)

    @property
    def is_on_hub(self) -> bool:
        """Return whether ``path`` has the form of a name on the hub (owner/name) and is not a folder."""
        return not os.path.isdir(self.path) and is_hub_name(str(self.path))

    def file(self, name: str) -> Path | None:
        """Return the path of the tokenizer's file ``name``; None if the file is missing.

        For a hub name, transformers has already downloaded the files.
        """
        if os.path.isdir(self.path):
            path = Path(self.path, name)
            return path if path.is_file() else None
        try:
            found = cached_file(str(self.path), name, _raise_exceptions_for_missing_entries=False)
        except Exception:  # neither a folder nor a hub name
            return None
        return Path(found) if found else None

    def settings(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json; {} if the file is missing."""
        path = self.file("tokenizer_config.json")
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return found if isinstance(found, dict) else {}

    def error(self, problem: str, fix: str, kind: type[UserError] = UserError) -> UserError:
        """Return an error of the type ``kind`` about this tokenizer. Its message is "key=value problem: fix"."""
        return kind(f"{self} {problem}", fix, key=self.key, value=self.value)


def load_tokenizer(
    files: ModelFolder,
    name: str | None,
    key: str,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Load a tokenizer, and check that it preserves plain text.

    ``name``: a folder or a name on the Hugging Face hub, the value of the configuration key ``key``; None: the
    tokenizer of the model ``files`` is loaded. If the class in tokenizer_config.json gives other token ids than
    tokenizer.json, tokenizer.json is used and a warning is logged. ``chat_template``: path of a Jinja file that
    replaces the tokenizer's chat template; ``template_kwargs``: the arguments of this template in the configuration.
    Raises UserError for unreadable files, for a tokenizer that does not preserve plain text, and for a chat template
    that cannot be parsed or that omits the user's message.
    """
    source = _Source(files.folder if name is None or name == files.name else name, key, name or files.name)
    return _load(source, chat_template, template_kwargs)


def check_tokenizer(
    name: str | None, key: str, chat_template: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Raise the UserError that ``load_tokenizer`` raises for these arguments; the model's files are missing.

    Without ``name``, the tokenizer is one of the missing files, so only the chat template is read.
    """
    if name is not None:
        _load(_Source(name, key, name), chat_template, template_kwargs)
    elif chat_template is not None:
        read_chat_template(chat_template, _template_key(key))


def _template_key(key: str) -> str:
    return key.removesuffix(".name") + ".chat_template"


def _load(source: _Source, chat_template: str | None, template_kwargs: Mapping[str, Any] | None) -> Any:
    tokenizer = _read(source)
    tokenizer.clean_up_tokenization_spaces = False  # this setting removes spaces from decoded text
    check_round_trip(tokenizer, source.key, source.value)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template, _template_key(source.key), template_kwargs)
    return tokenizer


def tokenizer_class_misreads(folder: Path) -> bool:
    """Return whether the transformers class for ``folder`` gives other token ids than tokenizer.json.

    Returns False if tokenizer.json is missing. Raises UserError for a tokenizer.json that cannot be read.
    """
    source = _Source(folder)
    own = _tokenizer_json(source)
    if own is None:
        return False
    read, _ = _from_pretrained(AutoTokenizer, source)
    return encoding_difference(read, own) is not None


def same_tokenizer_files(student: Path, teacher: Path) -> bool:
    """Return whether both models have the same tokenizer files, so that both can use one tokenizer.

    Returns False if tokenizer.json is missing, a folder has additional chat templates, or the model types differ.
    """
    if not (student / "tokenizer.json").is_file() or any((f / _TEMPLATES).exists() for f in (student, teacher)):
        return False
    keyed = ((student, "policy.model_name"), (teacher, "teacher.model_name"))
    types = [read_json(folder / "config.json", str(folder), key).get("model_type") for folder, key in keyed]
    return types[0] == types[1] and all(_same_bytes(student / name, teacher / name) for name in _FILES)


def _same_bytes(one: Path, other: Path) -> bool:
    """Return whether both files have the same content, or both are missing."""
    exist = one.is_file(), other.is_file()
    return exist[0] == exist[1] and (not exist[0] or filecmp.cmp(one, other, shallow=False))


def _read(source: _Source) -> Any:
    read, error = _from_pretrained(AutoTokenizer, source)
    own = _tokenizer_json(source)
    difference = encoding_difference(read, own) if own is not None else None
    tokenizer = read
    if own is not None and (difference is not None or not read.get_vocab().keys() <= own.get_vocab().keys()):
        # This class uses only tokenizer.json, and adds no special tokens by default.
        tokenizer, error = _from_pretrained(PreTrainedTokenizerFast, source)
    if error is not None and source.is_on_hub and source.file("tokenizer_config.json") is None:
        cause, fix = cause_and_fix(error, str(source.path))
        problem = f"is neither a folder nor a tokenizer in the download cache {model_cache()}, and {cause}"
        raise source.error(problem, fix, NotCachedError)
    if tokenizer is None or not len(tokenizer):
        raise source.error(
            f"has no readable tokenizer ({reason(error or ValueError('its vocabulary is empty'))})",
            f"set {source.key} to the folder or the Hugging Face name of a model with a tokenizer.json (tokenizers that"
            " need custom code are not supported)",
            UserError if os.path.exists(source.path) or source.is_on_hub else MissingError,
        )
    settings = source.settings()
    if difference is not None:
        log.warning(
            "%s: tokenizer.json is used instead of tokenizer_class=%s in tokenizer_config.json, because transformers"
            " loads %s for it, with a different encoding of text (%s)",
            *(source, show(settings.get("tokenizer_class"))),
            *(type(read).__name__ if read is not None else "no class", difference),
        )
    bos_by_default = False
    if own is not None:
        _replace_backend(tokenizer, own, read, source)
    elif _is_sentencepiece(tokenizer, source):
        bos_by_default = type(tokenizer).__name__ in _BOS_BY_DEFAULT
    if settings.get("add_bos_token", bos_by_default) is True:
        _add_bos(tokenizer, source)
    elif own and settings.get("add_bos_token") is False and tokenizer.bos_token_id in opening_ids(tokenizer):
        log.warning(
            "%s has add_bos_token=false in tokenizer_config.json, but tokenizer.json adds %s before plain text, so"
            " add_bos_token is ignored",
            *(source, tokenizer.bos_token),
        )
    return tokenizer


def _from_pretrained(cls: Any, source: _Source) -> tuple[Any, Exception | None]:
    try:
        return cls.from_pretrained(source.path, trust_remote_code=False), None
    except Exception as error:  # the same fault raises OSError, ValueError, KeyError or TypeError
        return None, error


def _is_sentencepiece(tokenizer: Any, source: _Source) -> bool:
    """Return whether transformers loaded the tokenizer from a SentencePiece tokenizer.model.

    Always logs a warning, because only a few texts can be checked without tokenizer.json. Raises UserError if the ids
    of these texts differ from the ids of SentencePiece.
    """
    loaded = type(tokenizer).__name__
    log.warning(
        "%s has no tokenizer.json, so transformers loads its tokenizer from other files with the class %s, and wrong"
        " token ids may remain undetected: add the model's tokenizer.json to its folder to avoid this",
        *(source, loaded),
    )
    path = source.file("tokenizer.model")
    try:
        from sentencepiece import SentencePieceProcessor

        written = SentencePieceProcessor(model_file=str(path)).encode(list(PLAIN_TEXTS))
    except Exception:  # another format (tiktoken), a missing file or a missing package
        return False
    if token_ids(tokenizer, PLAIN_TEXTS) != written:
        raise source.error(
            f"has a tokenizer.model for which transformers' class {loaded} and SentencePiece give different token ids",
            "add the model's tokenizer.json, or correct tokenizer_class in tokenizer_config.json (most models have"
            " LlamaTokenizer)",
        )
    return True


def _tokenizer_json(source: _Source) -> Tokenizer | None:
    """Return the tokenizer in tokenizer.json, without its truncation, padding and dropout settings.

    Returns None if the file is missing.
    """
    path = source.file("tokenizer.json")
    if path is None:
        return None
    try:
        own = Tokenizer.from_file(str(path))
        if not own.get_vocab_size():
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # the library raises a bare Exception
        raise source.error(f"has an unreadable {path.name} ({reason(error)})", "download the file again") from error
    own.no_truncation()
    own.no_padding()
    if getattr(own.model, "dropout", None):
        log.warning(
            "%s has BPE dropout in tokenizer.json, which makes token ids random: the dropout is disabled", source
        )
        own.model.dropout = None
    return own


def _replace_backend(tokenizer: Any, own: Tokenizer, read: Any, source: _Source) -> None:
    """Replace the backend of ``tokenizer`` by ``own``, the tokenizer in tokenizer.json.

    Special tokens that only tokenizer_config.json defines are added to ``own``. ``read``: the tokenizer as loaded by
    transformers. If ``tokenizer`` lacks a special token, such as bos_token, the token of ``read`` is set, provided that
    it is in the vocabulary of ``own``.
    """
    known = own.get_vocab()
    for name in _SPECIAL:
        default = getattr(read, name, None)
        if getattr(tokenizer, name) is None and str(default) in known:
            setattr(tokenizer, name, default)
    if added := {token: i for token, i in tokenizer.get_vocab().items() if token not in known}:
        log.warning(
            "%s adds special tokens that are not in tokenizer.json (%s); their ids start at %d, and the model has"
            " probably not been trained on them",
            *(source, show(", ".join(added)), min(added.values())),
        )
        own.add_tokens([token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content in added])
    tokenizer._tokenizer = own
    if tokenizer.split_special_tokens:
        log.warning(
            "%s has split_special_tokens=true in tokenizer_config.json, which splits the control tokens of the chat"
            " template, so the setting is ignored",
            source,
        )
        tokenizer.split_special_tokens = False


def _add_bos(tokenizer: Any, source: _Source) -> None:
    """Configure the tokenizer to add BOS before plain text, because transformers 5 ignores add_bos_token."""
    bos = tokenizer.bos_token
    if bos is None or tokenizer.bos_token_id in opening_ids(tokenizer) or not hasattr(tokenizer, "backend_tokenizer"):
        return
    log.warning(
        "%s requires the BOS token %s before plain text (because of add_bos_token or the tokenizer class), but"
        " transformers %s does not add this token, so this run adds it",
        *(source, bos, transformers.__version__),
    )
    pair = [bos, "$A", bos, "$B:1"]
    special = [(bos, tokenizer.bos_token_id)]
    added = processors.TemplateProcessing(single=[bos, "$A"], pair=pair, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = added
