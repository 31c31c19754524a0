"""Prompt files: texts with ``{}`` where the problem goes."""

from __future__ import annotations

import os.path
from pathlib import Path

from distill.config.template import Template
from distill.errors import UserError


def read_text(path: str, where: str) -> str:
    """The whole text of a UTF-8 file, unchanged; UserError where there is none."""
    if not os.path.isfile(path):  # a pipe, say, whose reader waits for ever
        fault = "is no file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{where}={path} {fault} (looked in {Path.cwd()}): correct the path")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}={path} is not a readable UTF-8 text file ({error}): correct the file") from None


def read_prompt_file(path: str, where: str) -> Template:
    """A prompt file: a text with ``{}`` once, where the problem goes.

    Two are refused, because the usual cause is a ``\\boxed{}`` that was to be literal and would swallow the problem.
    """
    template = Template(read_text(path, where), ("",), f"{where}={path}")
    if template.count("") == 0:
        raise UserError(f"{where}={path} has no {{}}: put one where the problem goes")
    if template.count("") > 1:
        raise UserError(
            f"{where}={path} has {template.count('')} {{}}: keep the problem's, write literal ones as {{{{}}}}"
        )
    return template
