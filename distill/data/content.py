"""Hash all inputs of the prompts, to compare the inputs between ranks and with a checkpoint.

The inputs are the problems with their conversations and tools, the references, the columns that the teacher reads, the
prompt files, chat template, template arguments and vocabulary. The trace, a text with reasoning, is such a column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.data.files import read_text
from distill.errors import UserError
from distill.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import DatasetConfig

ContentHashes = Mapping[str, str]
"""Maps the name of each input of the prompts, such as ``problems`` or ``chat_template``, to its hash.

The entry ``tokens`` is the hash of the tokenized prompts.
"""

TOKENS = "tokens"
"""Key in ContentHashes for the hash of the tokenized prompts."""

_SAME_DATA = "use the same files on all nodes"
_SAME_RENDERING = (
    "use the same tokenizer files and the same versions of transformers and tokenizers on all nodes, and a chat"
    " template that always renders the same text (no random choice, no unordered set)"
)


def content_hash(values: Iterable[Any]) -> str:
    """Return a hash of ``values``: the first 16 hex digits of the SHA-256 of their JSON, with sorted keys."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def data_hashes(
    datasets: Sequence[DatasetConfig],
    problems: Iterable[Problem],
    trace_column: str | None,
    columns: Sequence[str] = (),
    references: bool = False,
) -> ContentHashes:
    """Return hashes of the problems, the traces, the teacher's columns and the prompt files' contents.

    Paths are not hashed. ``trace_column``: the dataset column of the traces (texts with reasoning that the teacher
    reads); None: the data have no traces. ``columns``: other columns that the teacher reads. ``references``: whether
    the run trains on the references, so that they are also hashed.
    """
    texts, traces, responses, others = (hashlib.sha256() for _ in range(4))
    for problem in problems:
        texts.update(json.dumps(content_of(problem)).encode())
        if references:
            responses.update(json.dumps(problem.reference).encode())
        if trace_column is not None:
            traces.update(json.dumps(problem.columns.get(trace_column)).encode())
        if columns:
            others.update(json.dumps(columns_of(problem, columns)).encode())
    prompt_files = [read_text(d.prompt_file, "prompt_file") if d.prompt_file else "{}" for d in datasets]
    systems = [read_text(d.system_prompt_file, "system_prompt_file") if d.system_prompt_file else "" for d in datasets]
    return {
        "problems": texts.hexdigest()[:16],
        **({"references": responses.hexdigest()[:16]} if references else {}),
        **({} if trace_column is None else {"traces": traces.hexdigest()[:16]}),
        **({"columns": others.hexdigest()[:16]} if columns else {}),
        "prompt_file": content_hash(prompt_files),
        "system_prompt_file": content_hash(systems),
    }


def content_of(problem: Problem) -> str | list[str]:
    """Return the text, messages and tools of ``problem`` for a hash; only the text if the problem is a plain text."""
    return [problem.text, problem.messages, problem.tools] if problem.messages or problem.tools else problem.text


def columns_of(problem: Problem, columns: Sequence[str]) -> list[str | None]:
    """Return the values of ``columns`` of ``problem``; None for a missing column."""
    return [problem.columns.get(column) for column in columns]


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None) -> ContentHashes:
    """Return hashes of a tokenizer's vocabulary, its chat template and the template arguments ``kwargs``."""
    return {
        "chat_template": content_hash([tokenizer.chat_template]),
        "chat_template_kwargs": content_hash([dict(kwargs or {})]),
        "vocabulary": content_hash([tokenizer.get_vocab()]),
    }


def changed_parts(before: ContentHashes, after: ContentHashes) -> list[str]:
    """Return the keys of ContentHashes that have different hashes in ``before`` and ``after``.

    ``tokens`` is returned only if no other hash differs. Keys that only one of the arguments contains are ignored.
    """
    changed = [part for part, value in after.items() if before.get(part, value) != value]
    return [part for part in changed if part != TOKENS] or changed


_PART_NAMES = {
    "problems": "data.train",
    "references": "the reference responses of data.train",
    "traces": "the trace column of data.train",
    "golds": "the gold answers or graders of data.train",
    "columns": "a column of data.train that the teacher reads",
    "prompt_file": "data.train.prompt_file",
    "system_prompt_file": "data.train.system_prompt_file",
    "chat_template": "the chat template of policy.tokenizer",
    "chat_template_kwargs": "policy.tokenizer.chat_template_kwargs",
    "vocabulary": "the vocabulary of policy.tokenizer",
    "teacher_system_prompt_file": "distillation.context_distillation.teacher_system_prompt_file",
    "teacher_chat_template": "the chat template of teacher.tokenizer",
    "teacher_chat_template_kwargs": "teacher.tokenizer.chat_template_kwargs",
}
"""Maps each key of ContentHashes except ``tokens`` to the name of the hashed input in messages."""


def describe_change(parts: Sequence[str], all_compared: bool) -> str:
    """Return a clause for messages about changed inputs, such as "data.train has changed".

    ``parts``: the keys of ContentHashes with different hashes. ``all_compared``: whether all hashes were compared;
    false: only the hash of the tokenized prompts was compared, so the changed input is unknown.
    """
    if not all_compared:
        return "data.train, its prompt file, or policy.tokenizer has changed"
    if list(parts) == [TOKENS]:
        return (
            "the tokenization of the prompts has changed, although the problems and the chat template are the same"
            " (possible causes: other tokenizer files, other versions of transformers or tokenizers, or a chat template"
            " that depends on more than its arguments)"
        )
    names = [_PART_NAMES[part] for part in parts]
    return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} changed"


def raise_if_ranks_differ(gathered: Sequence[tuple[str, Mapping[str, ContentHashes]]]) -> None:
    """Raise UserError if the prompts' inputs on any rank have other hashes than those on rank 0.

    ``gathered``: one pair per rank: the host name, and a mapping from configuration keys, such as ``data.train``, to
    the rank's hashes of these inputs. All ranks must pass the same value, so that all ranks raise the same error.
    """
    first_host, first = gathered[0]
    for key in first:
        for rank, (host, hashes) in enumerate(gathered):
            if parts := changed_parts(first[key], hashes[key]):
                only_tokens = parts == [TOKENS]
                what = "tokens for the same texts" if only_tokens else " and ".join(parts).replace("_", " ")
                raise UserError(
                    f"{key}: rank {rank} on {host} has other inputs than rank 0 on {first_host} (different {what})",
                    _SAME_RENDERING if only_tokens else _SAME_DATA,
                    key=key,
                )
