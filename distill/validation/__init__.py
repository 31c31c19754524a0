"""Validation: held-out problems answered, judged and compared with the teacher."""

from __future__ import annotations

from distill.validation.held_out import HeldOut, load_held_out
from distill.validation.validation import Validation, context_is_known

__all__ = ["HeldOut", "Validation", "context_is_known", "load_held_out"]
