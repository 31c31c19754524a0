"""Hashes of everything that prompts are made from, compared between ranks and with a checkpoint's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.data.template import read_text
from distill.errors import UserError
from distill.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import DatasetConfig

Content = Mapping[str, str]
"""A hash by the name of a part, in an order in which a part's causes come before it."""

TOKENS = "tokens"
"""The rendered and tokenised prompts, which follow from all other parts."""

_SAME_DATA = "give all nodes the same files"
_SAME_RENDERING = (
    "give all nodes the same tokenizer files and versions of transformers and tokenizers, and a chat template that"
    " writes the same text each time (no random choice, no unordered set)"
)


def content_hash(values: Iterable[Any]) -> str:
    """16 hex digits of the SHA-256 of JSON values in their order; the keys of a mapping may have any order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def data_content(datasets: Sequence[DatasetConfig], problems: Iterable[Problem], trace_column: str | None) -> Content:
    """The parts of training data: problems and traces in their order, and the files around them; no path counts."""
    texts, traces = hashlib.sha256(), hashlib.sha256()
    for problem in problems:
        texts.update(json.dumps(problem.text).encode())
        if trace_column is not None:
            traces.update(json.dumps(problem.columns.get(trace_column)).encode())
    prompt_files = [read_text(d.prompt_file, "prompt_file") if d.prompt_file else "{}" for d in datasets]
    systems = [read_text(d.system_prompt_file, "system_prompt_file") if d.system_prompt_file else "" for d in datasets]
    return {
        "problems": texts.hexdigest()[:16],
        **({} if trace_column is None else {"traces": traces.hexdigest()[:16]}),
        "prompt_file": content_hash(prompt_files),
        "system_prompt_file": content_hash(systems),
    }


def tokenizer_content(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> Content:
    """The parts of a tokenizer and its chat template; ``kwargs`` are the recipe's, without the run's clock."""
    return {
        "chat_template": content_hash([tokenizer.chat_template]),
        "chat_template_kwargs": content_hash([dict(kwargs or {})]),
        "vocabulary": content_hash([tokenizer.get_vocab()]),
    }


def changed_parts(then: Content, now: Content) -> list[str]:
    """The parts of ``now`` that have another hash in ``then``; ``tokens`` only if no other part differs."""
    changed = [part for part, value in now.items() if then.get(part, value) != value]
    return [part for part in changed if part != TOKENS] or changed


_SUBJECTS = {
    "problems": "data.train",
    "traces": "the traces of data.train",
    "prompt_file": "data.train.prompt_file",
    "system_prompt_file": "data.train.system_prompt_file",
    "chat_template": "the chat template of policy.tokenizer",
    "chat_template_kwargs": "policy.tokenizer.chat_template_kwargs",
    "vocabulary": "the vocabulary of policy.tokenizer",
    "teacher_chat_template": "the chat template of teacher.tokenizer",
    "teacher_chat_template_kwargs": "teacher.tokenizer.chat_template_kwargs",
}
"""How a user knows each part."""


def subjects(parts: Sequence[str], known: bool) -> str:
    """The parts in a user's terms, with their verb; ``known``: all parts were compared, not only the tokens."""
    if not known:
        return "data.train, its prompt file, or policy.tokenizer has"
    if list(parts) == [TOKENS]:
        return (
            "what the tokenizer makes of the same problems and chat template (by its files, by the versions of"
            " transformers and tokenizers, or because the template depends on more than its arguments) has"
        )
    names = [_SUBJECTS[part] for part in parts]
    return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'}"


def raise_if_ranks_differ(everyone: Sequence[tuple[str, Mapping[str, Content]]]) -> None:
    """Raise UserError, the same on every rank, where a rank has other content than rank 0.

    ``everyone``: each rank's host name and its content by key, such as ``data.train``.
    """
    first_host, first = everyone[0]
    for key in first:
        for rank, (host, contents) in enumerate(everyone):
            if parts := changed_parts(first[key], contents[key]):
                rendered = parts == [TOKENS]
                what = "tokens for the same texts" if rendered else " and ".join(parts).replace("_", " ")
                raise UserError(
                    f"{key}: rank {rank} on {host} has other {what} than rank 0 on {first_host}: "
                    f"{_SAME_RENDERING if rendered else _SAME_DATA}"
                )
