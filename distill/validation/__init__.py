"""Validation: grade responses to problems that are not used for training; compare student and teacher."""

from __future__ import annotations

from distill.validation.held_out import HeldOut, load_held_out
from distill.validation.validation import Validation, context_is_known, validation_config

__all__ = ["HeldOut", "Validation", "context_is_known", "load_held_out", "validation_config"]
