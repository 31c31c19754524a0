"""Malformed settings of think tags."""

from __future__ import annotations

from tests.malformed.case import Case, Workshop, way

_KEY = "distillation.context_distillation.trace_extractor.think_tags"


@way
def _think_tags_are_no_pair(shop: Workshop) -> Case:
    tags = shop.rng.choice(["[]", "[a]", "[a, b, c]", "[a, a]", "['', b]", "[' a', b]", "[think, /think]", "a", "null"])
    return shop.case(_KEY, f"{_KEY}={tags}", detail=tags)
