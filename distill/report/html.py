"""Assemble the page: one HTML file with inlined style, scripts and compressed data.

Texts of models, prompts and recipes are data. They are only in base64 blocks (letters, digits, +, / and =), so they
cannot become HTML or script. A Content-Security-Policy permits only the page's own scripts and styles, and no network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
"""Folder of the page's template, styles and scripts."""
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class PageData:
    """Data of a page: JSON values that the page's script reads."""

    index: Mapping[str, Any]
    """Runs, curves, tables, and a list of all samples without their texts."""
    blocks: Sequence[Mapping[str, Any]]
    """Texts and tokens of the samples, in blocks that the page decompresses when it needs them."""


def build_page(data: PageData) -> str:
    """Return the page as text of one HTML file."""
    styles = [
        path.read_text(encoding="utf-8") for path in [*sorted(PAGE.glob("vendor/*.css")), *sorted(PAGE.glob("*.css"))]
    ]
    scripts = [
        path.read_text(encoding="utf-8") for path in [*sorted(PAGE.glob("vendor/*.js")), *sorted(PAGE.glob("*.js"))]
    ]
    slots = {
        "policy": _policy(styles, scripts),
        "title": html.escape(str(data.index["title"])),
        "styles": "\n".join(_element("style", text) for text in styles),
        "data": "\n".join(_data(data)),
        "scripts": "\n".join(_element("script", text) for text in scripts),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return _SLOT.sub(lambda slot: slots[slot[1]], template)


def _data(data: PageData) -> list[str]:
    blocks = [
        f'<script type="text/plain" class="block" data-block="{i}">{pack(block)}</script>'
        for i, block in enumerate(data.blocks)
    ]
    return [f'<script type="text/plain" id="index">{pack(data.index)}</script>', *blocks]


def pack(value: Any) -> str:
    """Return ``value`` as base64 of gzipped JSON; level 9 would save 2% of the bytes in four times the time."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def _element(name: str, text: str) -> str:
    assert f"</{name}" not in text.lower(), f"a file of the page contains </{name}"
    return f"<{name}>{text}</{name}>"


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    return (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def _hashes(texts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
