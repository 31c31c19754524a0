"""Rules of the keys that only the time forecast reads: cluster.gpu and policy.generation.expected_length."""

from __future__ import annotations

import math

from distill.config.gpus import parse_gpu
from distill.config.schema import Config
from distill.errors import UserError

_KEY = "policy.generation.expected_length"


def check_time_forecast(config: Config) -> None:
    """Raise UserError for the first rule about the keys of the time forecast that ``config`` breaks.

    Expected lengths may exceed policy.generation.max_new_tokens: the forecast limits each length to it. So a smaller
    limit does not require other expected lengths.
    """
    if config.cluster.gpu is not None:
        parse_gpu(config.cluster.gpu)
    given = config.policy.generation.expected_length
    for name, value in (("median", given.median), ("p90", given.p90)):
        if value is not None and not 1 <= value < math.inf:
            raise UserError(
                f"{_KEY}.{name}={value:g} is out of range",
                "set it to a number of tokens of at least 1, or to null",
                key=f"{_KEY}.{name}",
                value=value,
            )
    if given.median is not None and given.p90 is not None and given.p90 < given.median:
        raise UserError(
            f"{_KEY}.p90={given.p90:g} is below {_KEY}.median={given.median:g}",
            f"set {_KEY}.p90 to at least the median, or to null",
            key=f"{_KEY}.p90",
            value=given.p90,
        )
