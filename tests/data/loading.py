"""Load problems of several datasets, without prompts or a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.config import DatasetConfig
from distill.data.sources import keyed, load_problems
from distill.data.table import Problems
from distill.errors import UserError


def load_datasets(
    datasets: Sequence[DatasetConfig],
    key: str = "data.train",
    trace_column: str | None = None,
    trace_required: bool = True,
) -> Problems:
    """Concatenate the problems of ``datasets``."""
    return Problems.joined(
        [load_problems(dataset, name, trace_column, trace_required) for name, dataset in keyed(datasets, key)]
    )


def refusal(path: Path | str, **keys: Any) -> UserError:
    """Return the error of loading ``path``; its message must be one line."""
    with pytest.raises(UserError) as caught:
        load_datasets([DatasetConfig(data_path=str(path), **{"input_key": "question", "output_key": "answer"} | keys)])
    assert "\n" not in str(caught.value)
    return caught.value
