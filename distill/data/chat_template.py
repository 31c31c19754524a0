"""Load a chat template from a file, and check that chat templates render the user's message."""

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

    ``key``: the configuration key that contains ``path``; ``kwargs``: the configured template arguments
    (chat_template_kwargs). Raises UserError for a file that cannot be read or parsed, and for a template that omits the
    user's message.
    """
    tokenizer.chat_template = read_chat_template(path, key)
    if (rendered := _rendered_without_message(tokenizer, kwargs)) is not None:
        raise UserError(
            f"{key}={path} is a chat template that omits the user's message (the test message {_MESSAGE!r} is rendered"
            f" as {rendered!r})",
            "correct the template so that it renders the content of each message",
            key=key,
            value=path,
        )


def read_chat_template(path: str, key: str) -> str:
    """Return the Jinja template in the file ``path``; ``key``: the configuration key that contains ``path``.

    Raises UserError for a file that cannot be read or parsed.
    """
    if "{{" in path or "{%" in path:
        problem = f"{key}={show(path)} is the text of a template, but must be the path of a file"
        raise UserError(
            problem, f"write the template to a file and set {key} to the path of this file", key=key, value=path
        )
    text = read_text(path, key)
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        problem = f"{key}={path} is not a valid Jinja template (line {error.lineno}: {reason(error)})"
        raise UserError(problem, "correct the file", key=key, value=path) from None
    except Exception as error:  # e.g. RecursionError for deep nesting
        problem = f"{key}={path} is not a valid Jinja template ({reason(error)})"
        raise UserError(problem, "correct the file", key=key, value=path) from None
    return text


def check_chat_template(
    tokenizer: Any, what: str, key: str, kwargs: Mapping[str, Any] | None = None, value: str | None = None
) -> None:
    """Raise UserError if the tokenizer's chat template omits the user's message.

    If the tokenizer has no chat template, logs that prompts are plain text. ``what``: the name of the tokenizer in
    messages; ``key``: the configuration key for a file that replaces the tokenizer's template; ``value``: the current
    value of ``key``; ``kwargs``: the configured template arguments (chat_template_kwargs).
    """
    if tokenizer.chat_template is None:
        other = Path(tokenizer.name_or_path, "chat_template.json")
        remark = f" (transformers reads {other.name} only for multimodal processors)" if other.is_file() else ""
        log.info(
            "%s has no chat template%s, so prompts are plain text (after a BOS token, if the tokenizer adds one): to"
            " use a chat template, set %s to the path of a Jinja file",
            *(what, remark, key),
        )
    elif (rendered := _rendered_without_message(tokenizer, kwargs)) is not None:
        raise UserError(
            f"{what} has a chat template that omits the user's message (the test message {_MESSAGE!r} is rendered as"
            f" {rendered!r})",
            f"set {key} to the path of a Jinja file that renders the user's message",
            key=key,
            value=value,
        )


def _rendered_without_message(tokenizer: Any, kwargs: Mapping[str, Any] | None) -> str | None:
    """Render a test chat; if the text lacks the user's message, return its first 60 characters, else None.

    White space and case are ignored in the search for the message. Also returns None if the template raises an error:
    the error is reported later, when the prompts are rendered.
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
