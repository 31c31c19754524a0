"""Format durations and large numbers for the console."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration as text in its two largest units: ``45 s``, ``2 min``, ``3 h 12 min``, ``2 d 4 h``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, days = minutes // 60, minutes // 1440
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def short_count(number: float) -> str:
    """Return a number with at most three digits and the letter k, M, G or T: ``105``, ``12.4k``, ``1.5M``."""
    letters = iter("kMGT")
    letter = ""
    while abs(number) >= 999.5 and letter != "T":
        number, letter = number / 1000, next(letters)
    return f"{number:.3g}{letter}" if letter else f"{number:.0f}"
