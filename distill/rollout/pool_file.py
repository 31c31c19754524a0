"""Store the pool of partial rollouts in a checkpoint: a file of numpy arrays."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.rollout.pool import Pool, PooledResponse
from distill.types import Prompt

_FORMAT = 1
_FINISHES = (None, "stop", "length")
FindPrompt = Callable[[int, tuple[int, ...]], Prompt | None]
"""Function that returns the prompt with an id and token ids; None if the training data do not contain it."""


class UnknownFormatError(Exception):
    """The file has a format of another version of this program."""


@dataclass(frozen=True)
class StoredPool:
    """A pool as read from a file."""

    pool: Pool
    responses_per_step: int
    """Number of responses per step, from which ``PooledResponse.order`` was computed."""
    missing: int
    """Number of responses that were left out, because their prompts are not in the training data."""


def to_bytes(pool: Pool, responses_per_step: int) -> bytes:
    """Return the content of a file with the pool; equal pools have equal files.

    Texts of the prompts are not stored. ``responses_per_step``: see ``StoredPool``.
    """
    responses = pool.responses
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(_FORMAT),
        "responses_per_step": np.array(responses_per_step),
        "next_order": np.array(pool.next_order),
        "prompt_id": np.array([each.prompt.prompt_id for each in responses], np.int64),
        "finish": np.array([_FINISHES.index(each.finish) for each in responses], np.int8),
    }
    for name in _NUMBERS:
        arrays[name] = np.array([getattr(each, name) for each in responses], np.int64)
    arrays |= _ragged("prompt_tokens", [each.prompt.student_ids for each in responses], np.int32)
    arrays |= _ragged("ids", [each.ids for each in responses], np.int32)
    arrays |= _ragged("logprobs", [each.logprobs for each in responses], np.float64)  # float64: exact for any engine
    arrays |= _ragged("versions", [[n for pair in each.versions for n in pair] for each in responses], np.int64)
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


_NUMBERS = ("order", "response_index", "batch", "started", "max_new_tokens", "with_logprobs", "rank")
"""Fields of PooledResponse that are numbers."""


def from_bytes(content: bytes, find_prompt: FindPrompt) -> StoredPool:
    """Return the pool that ``to_bytes`` stored; raise UnknownFormatError for another format."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        if int(arrays["format"]) != _FORMAT:
            raise UnknownFormatError(f"format {int(arrays['format'])} instead of {_FORMAT}")
        fields = {name: arrays[name].tolist() for name in (*_NUMBERS, "prompt_id", "finish")}
        lists = {name: _lists(arrays, name) for name in ("prompt_tokens", "ids", "logprobs", "versions")}
        next_order, responses_per_step = int(arrays["next_order"]), int(arrays["responses_per_step"])
    found = []
    for i, prompt_id in enumerate(fields["prompt_id"]):
        prompt = find_prompt(prompt_id, lists["prompt_tokens"][i])
        if prompt is not None:
            found.append(_response(prompt, {**fields, **lists}, i))
    pool = Pool(next_order, tuple(found))
    return StoredPool(pool, responses_per_step, len(fields["order"]) - len(found))


def _response(prompt: Prompt, columns: dict[str, Any], i: int) -> PooledResponse:
    numbers = {name: columns[name][i] for name in _NUMBERS}
    numbers["with_logprobs"] = bool(numbers["with_logprobs"])
    versions = columns["versions"][i]
    return PooledResponse(
        prompt=prompt,
        ids=columns["ids"][i],
        logprobs=columns["logprobs"][i],
        versions=tuple(zip(versions[::2], versions[1::2], strict=True)),
        finish=_FINISHES[columns["finish"][i]],  # type: ignore[arg-type]
        **numbers,
    )


def _ragged(name: str, rows: Iterable[Sequence[float]], dtype: type) -> dict[str, NDArray[Any]]:
    """Return two arrays by name: all numbers of the rows, and the bounds of the rows."""
    rows = list(rows)
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return {name: np.array([number for row in rows for number in row], dtype), f"{name}_bounds": bounds}


def _lists(arrays: Any, name: str) -> list[tuple[Any, ...]]:
    numbers = arrays[name].tolist()
    return [tuple(numbers[begin:end]) for begin, end in pairwise(arrays[f"{name}_bounds"].tolist())]
