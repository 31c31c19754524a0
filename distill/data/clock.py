"""Give chat templates the time of the run's first start, on all ranks and after every resume."""

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
"""Name of the function that chat templates call to format the current local time."""
_PERCENT_OR_EPOCH = re.compile("%[%s]")


def current_time() -> datetime:
    """Return the current local time with its UTC offset."""
    return datetime.now().astimezone()


class RunClock:
    """A clock that always returns the time of the run's first start.

    With the current time, a chat template that contains the date would render different prompts after a resume on a
    later day. Ranks that render before and after midnight would also have different prompts.
    """

    def __init__(self, time: datetime) -> None:
        self.time = time
        self.was_read = False
        """Whether a chat template has called ``strftime_now`` of this clock in this process."""

    @classmethod
    def saved(cls, text: str) -> RunClock:
        """Return the clock with the time ``text``, an ISO 8601 time from a checkpoint (inverse of str(clock))."""
        return cls(datetime.fromisoformat(text))

    def __str__(self) -> str:
        return self.time.isoformat()

    def strftime_now(self, format: str) -> str:
        """Return the local time of the run's first start as text in the strftime format ``format``.

        Chat templates call this function in place of the function of the same name in transformers. ``%s`` (seconds
        since 1970) uses the UTC offset of the first start; the C library would use the time zone of this machine.
        """
        self.was_read = True
        seconds = str(int(self.time.timestamp()))
        without_epoch = _PERCENT_OR_EPOCH.sub(lambda found: seconds if found.group() == "%s" else found.group(), format)
        return self.time.replace(tzinfo=None).strftime(without_epoch)

    def template_kwargs(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None, key: str
    ) -> Mapping[str, Any] | None:
        """Return the template arguments ``kwargs``, plus ``strftime_now`` if the chat template uses this name.

        As a template argument, ``strftime_now`` of this clock overrides the function of the same name in transformers.
        ``key``: the configuration key of ``kwargs``. Raises UserError if ``kwargs`` contain ``strftime_now``, because a
        YAML recipe cannot define a function.
        """
        given = dict(kwargs or {})
        if _NAME in given:
            raise UserError(
                f"{key}.{_NAME}={given[_NAME]} is not allowed, because chat templates call {_NAME} as a function",
                "remove this key, and set the template's argument for the date instead (Llama: date_string)",
                key=f"{key}.{_NAME}",
                value=given[_NAME],
            )
        sources = json.dumps([tokenizer.chat_template, given.get("chat_template")], default=str)
        return given | {_NAME: self.strftime_now} if _NAME in sources else kwargs
