"""Tokenizers as their authors wrote them: tokenizer.json decides how text becomes token ids and ids become text."""

from __future__ import annotations

import filecmp
import json
import logging
import os.path
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import transformers
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from distill.data.chat_template import set_chat_template
from distill.data.prompts import opening_ids, token_ids
from distill.errors import UserError, reason, show

log = logging.getLogger(__name__)

PLAIN_TEXTS = ("What is 1+2, please?", "The first line.\nThe second line: x = 10 * (y - 3) / 2;")
"""Every tokenizer must keep these: words, spaces between them, a line break, digits and punctuation."""
OTHER_TEXTS = (
    " leading, trailing  and   double spaces ",
    "Line one\r\n\n\n\tindented\n    four spaces",
    "0 12 345 6789 1234567890 3.14159 1,000,000 2^10 -7",
    "I'LL say it's DON'T, we've HelloWorld camelCase snake_case",
    "def f(x):\n\treturn {'a': [x, x**2]}  # comment\n",
    r"\frac{1}{2} \le \boxed{\sqrt{3}} $x_{1}$ <think>no</think> &amp; ...!?",
    "café naïve Straße Ωmega ѐ",
    "cafe\u0301 n\u0303 \u1112\u1161\u11ab",
    "今天天气很好。 日本語のテキスト 한국어 مرحبا नमस्ते",
    "😀👩‍👩‍👧 🇩🇪 ½ ﬁ ① \u00a0nbsp \u200bzero",
    "▁underline ▁▁ Ġ Ċ <0x0A> ##ing </w>",
    "x" * 40 + "=" * 20 + "-" * 7 + " " * 30 + ".",
)
"""Texts on which tokenizer classes are known to differ."""

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_TEMPLATES = "additional_chat_templates"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BOS_BY_DEFAULT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes that put BOS before a text unless add_bos_token=false; transformers 5 does so for a tokenizer.json only."""
_AS_IT_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class ModelFolder(Protocol):
    """A checkpoint on disk, as ModelFiles is."""

    @property
    def name(self) -> str:
        """The name in the recipe."""

    @property
    def folder(self) -> Path:
        """The folder of its files."""


def load_tokenizer(
    files: ModelFolder,
    name: str | None,
    key: str,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer of the model, or the one that ``key`` (``*.tokenizer.name``) names instead.

    Its ids are those of its tokenizer.json. If the class that tokenizer_config.json names gives other ids, a warning is
    logged and that class is not used. ``chat_template``: path of a Jinja file that replaces the tokenizer's own
    template; ``template_kwargs``: the recipe's arguments for it.
    Raises UserError for files that can't be read, for a tokenizer that loses plain text and for a chat template that
    can't be parsed or that leaves out the user's message.
    """
    source = files.folder if name is None or name == files.name else name
    what = f"{key}={name or files.name}"
    tokenizer = _read(source, what)
    tokenizer.clean_up_tokenization_spaces = False  # it removes spaces from decoded text
    _check_round_trip(tokenizer, what)
    if chat_template is not None:
        key = key.removesuffix(".name") + ".chat_template"
        set_chat_template(tokenizer, chat_template, key, template_kwargs)
    return tokenizer


def tokenizer_class_misreads(folder: Path) -> bool:
    """Whether the class that transformers takes for ``folder`` gives other ids than the folder's tokenizer.json.

    False where there is no tokenizer.json. Raises UserError for a tokenizer.json that can't be read.
    """
    own = _tokenizer_json(_file(folder, "tokenizer.json"), str(folder))
    if own is None:
        return False
    try:
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # the class can't be made of these files at all
        return True
    return _difference(read, own) is not None


def same_tokenizer_files(student: Path, teacher: Path) -> bool:
    """Whether two folders have the same tokenizer.json, settings and chat template, so that one need not be loaded."""
    if not (student / "tokenizer.json").is_file() or any((f / _TEMPLATES).exists() for f in (student, teacher)):
        return False
    types = [_json(folder / "config.json", str(folder)).get("model_type") for folder in (student, teacher)]
    return types[0] == types[1] and all(_same_bytes(student / name, teacher / name) for name in _FILES)


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal, or neither exists."""
    there = one.is_file(), other.is_file()
    return there[0] == there[1] and (not there[0] or filecmp.cmp(one, other, shallow=False))


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(source: str | Path, what: str) -> Any:
    read, error = _from_pretrained(AutoTokenizer, source)
    own = _tokenizer_json(_file(source, "tokenizer.json"), what)
    difference = _difference(read, own) if own is not None else None
    tokenizer = read
    if own is not None and (difference is not None or not read.get_vocab().keys() <= own.get_vocab().keys()):
        # This class takes everything from tokenizer.json, and has no special tokens by default.
        tokenizer, error = _from_pretrained(PreTrainedTokenizerFast, source)
    if tokenizer is None or not len(tokenizer):
        raise UserError(
            f"{what} has no tokenizer that can be read ({reason(error or ValueError('it knows no token'))}): give the"
            " folder or hub name of a model with a tokenizer.json, whose own code is never run"
        )
    settings = _settings(source)
    if difference is not None:
        loaded = type(read).__name__ if read is not None else "nothing"
        log.warning(
            "%s has tokenizer_class=%s in its tokenizer_config.json, which transformers loads as %s and which reads"
            " text differently from its tokenizer.json (%s): tokenizer.json is used",
            *(what, show(settings.get("tokenizer_class")), loaded, difference),
        )
    by_default = False
    if own is not None:
        _replace_backend(tokenizer, own, read, what)
    elif _is_sentencepiece(tokenizer, source, what):
        by_default = type(tokenizer).__name__ in _BOS_BY_DEFAULT
    if settings.get("add_bos_token", by_default) is True:
        _add_bos(tokenizer, what)
    elif own and settings.get("add_bos_token") is False and tokenizer.bos_token_id in opening_ids(tokenizer):
        log.warning(
            "%s has add_bos_token=false in its tokenizer_config.json, and its tokenizer.json puts %s before bare text:"
            " tokenizer.json is used",
            *(what, tokenizer.bos_token),
        )
    return tokenizer


def _is_sentencepiece(tokenizer: Any, source: str | Path, what: str) -> bool:
    """Whether transformers has made the tokenizer from SentencePiece's tokenizer.model; warns as it may be another's.

    Raises UserError where plain text gets other ids than SentencePiece gives it.
    """
    log.warning(
        "%s has no tokenizer.json: transformers' %s makes the tokenizer from other files, and only a few texts are"
        " checked",
        *(what, type(tokenizer).__name__),
    )
    path = _file(source, "tokenizer.model")
    try:
        from sentencepiece import SentencePieceProcessor

        written = SentencePieceProcessor(model_file=str(path)).encode(list(PLAIN_TEXTS))
    except Exception:  # another format (tiktoken), no such file or no such package
        return False
    if token_ids(tokenizer, PLAIN_TEXTS) != written:
        raise UserError(
            f"{what} has a tokenizer.model that transformers' {type(tokenizer).__name__} reads differently from"
            " SentencePiece: add the model's tokenizer.json, or name the right tokenizer_class in its"
            " tokenizer_config.json (LlamaTokenizer for most)"
        )
    return True


def _from_pretrained(cls: Any, source: str | Path) -> tuple[Any, Exception | None]:
    try:
        return cls.from_pretrained(source, trust_remote_code=False), None
    except Exception as error:  # the same fault raises OSError, ValueError, KeyError or TypeError
        return None, error


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a hub name that transformers has just loaded; None if it is missing."""
    if os.path.isdir(source):
        return Path(source, name) if Path(source, name).is_file() else None
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except Exception:  # neither a folder nor a hub name
        return None
    return Path(found) if found else None


def _tokenizer_json(path: Path | None, what: str) -> Tokenizer | None:
    """The tokenizer that a tokenizer.json describes; None where there is no such file."""
    if path is None:
        return None
    try:
        own = Tokenizer.from_file(str(path))
        if not own.get_vocab_size():
            raise ValueError("it knows no token")
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"{what} has no tokenizer that can be read ({path.name}: {reason(error)}): download it again"
        ) from error
    own.no_truncation()
    own.no_padding()
    if getattr(own.model, "dropout", None):
        log.warning(
            "%s has BPE dropout in its tokenizer.json, which makes its ids random: dropout is not applied", what
        )
        own.model.dropout = None
    return own


def _replace_backend(tokenizer: Any, own: Tokenizer, read: Any, what: str) -> None:
    """Make ``own`` the backend of ``tokenizer``, with the special tokens that tokenizer_config.json adds to it.

    ``read``: the tokenizer as transformers loads it, whose class may have special tokens by default.
    """
    known = own.get_vocab()
    for name in _SPECIAL:
        default = getattr(read, name, None)
        if getattr(tokenizer, name) is None and str(default) in known:
            setattr(tokenizer, name, default)
    if added := {token: i for token, i in tokenizer.get_vocab().items() if token not in known}:
        log.warning(
            "%s adds special tokens that its tokenizer.json lacks (%s): they get new ids from %d on, which the model"
            " was hardly trained on",
            *(what, show(", ".join(added)), min(added.values())),
        )
        own.add_tokens([token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content in added])
    tokenizer._tokenizer = own
    if tokenizer.split_special_tokens:
        log.warning(
            "%s has split_special_tokens=true in its tokenizer_config.json, which would read the chat template's"
            " control tokens as text: it is not applied",
            what,
        )
        tokenizer.split_special_tokens = False


def _settings(source: str | Path) -> dict[str, Any]:
    """tokenizer_config.json, which transformers has read already; empty if it is missing."""
    path = _file(source, "tokenizer_config.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return found if isinstance(found, dict) else {}


def _add_bos(tokenizer: Any, what: str) -> None:
    """Put BOS before bare text where the post-processor does not: transformers 5 does not read add_bos_token."""
    bos = tokenizer.bos_token
    if bos is None or tokenizer.bos_token_id in opening_ids(tokenizer) or not hasattr(tokenizer, "backend_tokenizer"):
        return
    log.warning(
        "%s puts %s before bare text, as add_bos_token in its tokenizer_config.json or its class requires, though"
        " transformers %s does not",
        *(what, bos, transformers.__version__),
    )
    pair = [bos, "$A", bos, "$B:1"]
    special = [(bos, tokenizer.bos_token_id)]
    added = processors.TemplateProcessing(single=[bos, "$A"], pair=pair, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = added


# ---- comparing -------------------------------------------------------------------------------------------------------


def _texts(own: Tokenizer) -> list[str]:
    """The texts that ids are compared on: also each added token between words, where its flags matter."""
    tokens = (token.content for token in own.get_added_tokens_decoder().values())
    return [*PLAIN_TEXTS, *OTHER_TEXTS, *(f"a {token} b{token}\n{token}c" for token in tokens)]


def _difference(read: Any, own: Tokenizer) -> str | None:
    """How ``read`` reads a text differently from tokenizer.json, for a message; None where all ids are equal."""
    if read is None:
        return "it can't be made from these files"
    texts = _texts(own)
    try:
        ids = read(texts, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # the library raises a bare Exception where an unknown token has no id
        return reason(error)
    for text, found, written in zip(texts, ids, own.encode_batch(texts, add_special_tokens=False), strict=True):
        if found != written.ids:
            back = str(read.decode(found, **_AS_IT_IS))
            other = f"comes back as {show(back)!r}" if back != text else f"becomes {len(found)} other ids"
            return f"{show(text)!r} {other}"
    return None


def _check_round_trip(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer that loses plain text; warn of one that changes other texts."""
    for text, back in changed_by_round_trip(tokenizer, PLAIN_TEXTS):
        if not _keeps_words(_normalised(tokenizer, text), _normalised(tokenizer, back)):
            raise UserError(
                f"{what} has a tokenizer that loses text ({text!r} comes back as {show(back)!r}): give a model with a"
                " tokenizer.json that keeps spaces and knows these characters"
            )
    texts = [*PLAIN_TEXTS, *OTHER_TEXTS]
    if changed := changed_by_round_trip(tokenizer, texts):
        log.warning(
            "%s does not keep %d of %d texts (%r comes back as %r): prompts with such text reach the model changed",
            *(what, len(changed), len(texts), *map(show, changed[0])),
        )


def changed_by_round_trip(tokenizer: Any, texts: Sequence[str]) -> list[tuple[str, str]]:
    """The texts that encoding and decoding changes, after the tokenizer's own normaliser; and what they become."""
    pairs = [(text, _round_trip(tokenizer, text)) for text in texts]
    return [(text, back) for text, back in pairs if _normalised(tokenizer, text) != _normalised(tokenizer, back)]


def _round_trip(tokenizer: Any, text: str) -> str:
    try:
        (ids,) = token_ids(tokenizer, [text])
        return str(tokenizer.decode(ids, **_AS_IT_IS))
    except Exception as error:  # an unknown token without an id, say
        return f"({reason(error)})"


def _normalised(tokenizer: Any, text: str) -> str:
    """``text`` after the tokenizer's own normaliser (lower case, say), without spaces at its start.

    SentencePiece writes a space as ▁ and puts one before each text, which decoding takes off again.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return (normalizer.normalize_str(text) if normalizer is not None else text).replace("▁", " ").lstrip(" ")


def _keeps_words(text: str, back: str) -> bool:
    """Whether every character of ``text`` is in ``back`` and no two words have become one; more spaces are allowed."""
    words = [r"\s*".join(map(re.escape, word)) for word in text.split()]
    return re.fullmatch(r"\s*" + r"\s+".join(words) + r"\s*", back) is not None


def compare_vocabularies(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Refuse two models that don't share their tokens, compared by content: the same id must mean the same token.

    Added and special tokens are compared too; the padded size of the embeddings may differ. Two tokenizers that share
    their tokens but split a text differently are accepted with a warning: responses are passed on as ids, and the
    teacher's context is read by its own tokenizer, but without a context the teacher reads the student's ids. Raises
    UserError with both names.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        token = differing[0]
        raise UserError(
            f"policy.model_name={student_name} and teacher.model_name={teacher_name} have different tokenizers"
            f" ({len(differing)} tokens differ; {token!r} is {ours.get(token)} and {theirs.get(token)}):"
            " choose a teacher with the student's tokenizer"
        )
    if student is teacher:
        return
    texts = [*PLAIN_TEXTS, *OTHER_TEXTS, *(f"a {token} b{token}\n{token}c" for token in student.get_added_vocab())]
    pairs = zip(texts, token_ids(student, texts), token_ids(teacher, texts), strict=True)
    if differing := [text for text, of_student, of_teacher in pairs if of_student != of_teacher]:
        log.warning(
            "policy.model_name=%s and teacher.model_name=%s have the same tokens and split text differently (%d of %d"
            " texts, such as %r): without a context the teacher reads prompts as the student's tokenizer splits them",
            *(student_name, teacher_name, len(differing), len(texts), show(differing[0])),
        )


# ---- stop ids --------------------------------------------------------------------------------------------------------


def stop_ids(files: ModelFolder, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response of this model, as transformers decides them, and its tokenizer's EOS.

    transformers reads generation_config.json, and config.json only where there is no such file. Raises UserError for a
    file that can't be read or with an ``eos_token_id`` that is no id.
    """
    path = files.folder / "generation_config.json"
    sections = [_json(path, files.name)] if path.is_file() else []
    if not sections and (path := files.folder / "config.json").is_file():
        config = _json(path, files.name)
        sections = [config, *(config[name] for name in ("text_config",) if isinstance(config.get(name), dict))]
    eos: Any = next((section["eos_token_id"] for section in sections if section.get("eos_token_id") is not None), [])
    listed = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise UserError(
            f"{path} has eos_token_id={show(eos)}, which is no id of a token: correct it there, or set"
            " policy.generation.stop_token_ids"
        )
    return tuple(sorted({*listed, tokenizer.eos_token_id} - {None}))


def usable_stop_ids(ids: Sequence[int], tokenizer: Any, valid_vocab: int, name: str) -> tuple[int, ...]:
    """The stop ids among ``ids`` that the model can produce; warns of all other ids, of ordinary text, and of none."""
    if beyond := [token for token in ids if token >= valid_vocab]:
        log.warning("%s: stop ids %s are past its vocabulary of %d and are not used", name, beyond, valid_vocab)
    usable = tuple(token for token in ids if token < valid_vocab)
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if text := [token for token in usable if token not in control]:
        log.warning(
            "%s: stop ids %s are ordinary text (%s), so responses end wherever it occurs: correct eos_token_id in its"
            " generation_config.json or config.json, or set policy.generation.stop_token_ids",
            *(name, text, ", ".join(repr(tokenizer.decode([token], **_AS_IT_IS)) for token in text)),
        )
    if not usable:
        log.warning(
            "%s has no stop id in its generation_config.json, config.json or tokenizer: its responses don't end before"
            " policy.generation.max_new_tokens, unless policy.generation.stop_token_ids is set",
            name,
        )
    return usable


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} has a {path.name} that can't be read ({reason(error)}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} has a {path.name} that holds no keys and values: download it again")
    return found
