"""The run's clock: the time that chat templates see, the same on all ranks and after every resume."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = "strftime_now"
"""The function that transformers gives to chat templates; it returns the current local time in a format."""
_PERCENT_OR_EPOCH = re.compile("%[%s]")


def current_time() -> datetime:
    """The current local time with its UTC offset."""
    return datetime.now().astimezone()


class RunClock:
    """A clock that stands still at the run's first start.

    Chat templates that write the date would otherwise render other prompts on every day, and on ranks that render
    around midnight.
    """

    def __init__(self, time: datetime) -> None:
        self.time = time
        self.was_read = False
        """Whether a template of this process has read the time."""

    @classmethod
    def saved(cls, text: str) -> RunClock:
        """The clock of a checkpoint, from what ``str`` returned."""
        return cls(datetime.fromisoformat(text))

    def __str__(self) -> str:
        return self.time.isoformat()

    def strftime_now(self, format: str) -> str:
        """The local time at the run's first start in a format, as transformers' function writes it.

        ``%s``, the seconds since 1970, follows the saved UTC offset; the C library would use this machine's time zone.
        """
        self.was_read = True
        seconds = str(int(self.time.timestamp()))
        known = _PERCENT_OR_EPOCH.sub(lambda found: seconds if found.group() == "%s" else found.group(), format)
        return self.time.replace(tzinfo=None).strftime(known)

    def template_kwargs(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None, key: str
    ) -> Mapping[str, Any] | None:
        """The arguments of the chat template, with this clock's ``strftime_now`` where the template names it.

        A template argument hides transformers' function of the same name. Raises UserError where ``kwargs``, which come
        from the recipe's ``key``, have that name: a recipe holds no functions.
        """
        given = dict(kwargs or {})
        if _NAME in given:
            raise UserError(
                f"{key}.{_NAME}={given[_NAME]} can't be used, because chat templates call {_NAME} as a function: remove"
                " it, and set the argument that the template takes the date from (date_string in Llama's)"
            )
        sources = json.dumps([tokenizer.chat_template, given.get("chat_template")], default=str)
        return given | {_NAME: self.strftime_now} if _NAME in sources else kwargs
