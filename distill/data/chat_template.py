"""Load a chat template from a file, and check that a template contains the user's message."""

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
    """Replace the tokenizer's chat template with the Jinja template in the file ``path``.

    ``key``: the configuration key of the path; ``kwargs``: the configuration's arguments of the template. Raises
    UserError for a file that cannot be read or parsed, or a template that omits the user's message.
    """
    if "{{" in path or "{%" in path:
        problem = f"{key}={show(path)} must be the path of a file, but is a template"
        raise UserError(problem, "write the template to a file and give its path", key=key, value=path)
    text = read_text(path, key).removeprefix("\ufeff")  # an editor's byte order mark would begin every prompt
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        problem = f"{key}={path} is not a valid Jinja template (line {error.lineno}: {reason(error)})"
        raise UserError(problem, "correct the file", key=key, value=path) from None
    except Exception as error:  # e.g. RecursionError for deep nesting
        problem = f"{key}={path} is not a valid Jinja template ({reason(error)})"
        raise UserError(problem, "correct the file", key=key, value=path) from None
    tokenizer.chat_template = text
    if (rendered := _rendered_without_message(tokenizer, kwargs)) is not None:
        raise UserError(
            f"{key}={path} omits the user's message ({_MESSAGE!r} is rendered as {rendered!r})",
            "insert the content of the messages into the template",
            key=key,
            value=path,
        )


def check_chat_template(tokenizer: Any, what: str, key: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise UserError if the tokenizer's own chat template omits the user's message; log if it has no template.

    ``what``: the tokenizer's name in messages; ``key``: the configuration key that sets another template; ``kwargs``:
    the configuration's arguments of the template.
    """
    if tokenizer.chat_template is None:
        other = Path(tokenizer.name_or_path, "chat_template.json")
        remark = f" (transformers reads {other.name} for processors only)" if other.is_file() else ""
        log.info(
            "%s has no chat template%s: prompts are bare text after the tokenizer's own special tokens; set %s to a"
            " Jinja file for chat prompts",
            *(what, remark, key),
        )
    elif (rendered := _rendered_without_message(tokenizer, kwargs)) is not None:
        raise UserError(
            f"{what} has a chat template that omits the user's message ({_MESSAGE!r} is rendered as {rendered!r})",
            f"set {key} to a Jinja file that contains it",
            key=key,
        )


def _rendered_without_message(tokenizer: Any, kwargs: Mapping[str, Any] | None) -> str | None:
    """Return the start of a rendered chat if it lacks the user's message; white space is ignored.

    Return None also if the template raises an error: it may need other arguments, and rendering the prompts reports it.
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
