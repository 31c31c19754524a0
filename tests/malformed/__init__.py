"""Malformed inputs of every kind. Importing this package registers all ways to break a run in ``case.WAYS``."""

from tests.malformed import (  # noqa: F401
    chat_templates,
    conversations,
    data,
    data_formats,
    environment,
    exports,
    missing,
    model_config,
    models,
    prompts,
    recipes,
    think_tags,
    tokenizer,
    weights,
)
from tests.malformed.case import CANARY, WAYS, Case, malformed
from tests.malformed.environment import BROKEN, TORCHRUN

__all__ = ["BROKEN", "CANARY", "TORCHRUN", "WAYS", "Case", "malformed"]
