"""Chat templates: one from the user's file, and a check that a template contains the user's message."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from distill.data.files import read_text
from distill.errors import UserError, reason, show

log = logging.getLogger(__name__)

_MESSAGE = "What is 1+2?"


def set_chat_template(tokenizer: Any, path: str, key: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Use the Jinja template in a file; ``key``: the setting that names it; ``kwargs``: the recipe's arguments for it.

    Raises UserError, naming file and line, where it can't be read or parsed or leaves out the user's message.
    """
    if "{{" in path or "{%" in path:
        raise UserError(f"{key}={show(path)} is a template, not a path: write it to a file and name that")
    text = read_text(path, key).removeprefix("\ufeff")  # an editor's mark, which would begin every prompt
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{key}={path} is no Jinja template in line {error.lineno} ({reason(error)}): correct the file"
        ) from None
    except Exception as error:  # too deeply nested, say
        raise UserError(f"{key}={path} is no Jinja template ({reason(error)}): correct the file") from None
    tokenizer.chat_template = text
    if (rendered := _without_message(tokenizer, kwargs)) is not None:
        raise UserError(
            f"{key}={path} leaves out the user's message ({_MESSAGE!r} becomes {rendered!r}): write the messages'"
            " content into it"
        )


def check_chat_template(tokenizer: Any, what: str, key: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse a tokenizer's own chat template that leaves out the user's message; log it where there is no template.

    ``what`` names the tokenizer, ``key`` is the setting for another template, ``kwargs`` are the recipe's arguments.
    """
    if tokenizer.chat_template is None:
        other = Path(tokenizer.name_or_path, "chat_template.json")
        remark = f" (transformers reads {other.name} for processors only)" if other.is_file() else ""
        log.info(
            "%s has no chat template%s: the model reads bare text after the tokenizer's own special tokens; set %s to a"
            " Jinja file for conversations",
            *(what, remark, key),
        )
    elif (rendered := _without_message(tokenizer, kwargs)) is not None:
        raise UserError(
            f"{what} has a chat template that leaves out the user's message ({_MESSAGE!r} becomes {rendered!r}): set"
            f" {key} to a Jinja file that has it"
        )


def _without_message(tokenizer: Any, kwargs: Mapping[str, Any] | None) -> str | None:
    """The start of a rendered conversation that lacks the user's message, white space aside; None where it is there.

    None too for a template that fails: it may need arguments, and the prompts themselves will show its error.
    """
    try:
        chat = [{"role": "user", "content": _MESSAGE}]
        settings = {**(kwargs or {}), "tokenize": False, "add_generation_prompt": True}
        text = str(tokenizer.apply_chat_template(chat, **settings))
    except Exception:
        return None
    return None if _letters(_MESSAGE) in _letters(text) else text[:60]


def _letters(text: str) -> str:
    return "".join(text.lower().split())
