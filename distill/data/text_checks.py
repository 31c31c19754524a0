"""Checks of the user's texts against the tokenizer before the first step: ids, control tokens, changed characters."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from distill.data.grading import THINK_TAGS
from distill.data.tokenizer import changed_by_round_trip
from distill.errors import UserError, show
from distill.types import Problem, Prompt

log = logging.getLogger(__name__)

_ROUND_TRIPS = 32
"""Problems of a dataset list whose text is decoded again."""


def check_texts(
    prompts: Iterable[Prompt],
    tokenizer: Any,
    valid_vocab: int,
    where: str,
    trace_column: str | None = None,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> None:
    """Check prompts: refuse an id past the embeddings, warn of text that the model reads differently.

    ``prompts`` are iterated more than once; ``where``: the key that a message names; ``trace_column``: a column whose
    text the teacher reads, where ``think_tags`` are meant. Each warning names the number of prompts and the first one:
    control tokens of the chat template inside a problem or a trace, characters that the vocabulary lacks, texts that
    encoding and decoding change.
    Raises UserError with the row.
    """
    if largest_id(tokenizer) >= valid_vocab:
        for prompt in prompts:
            check_ids(tokenizer, prompt.student_ids, valid_vocab, _row(prompt, where), where)
    _warn_of_control_tokens(prompts, tokenizer, where, trace_column, think_tags)
    _warn_of_unknown_tokens(prompts, tokenizer, where)
    problems = list(islice(prompts, _ROUND_TRIPS))
    changed = changed_by_round_trip(tokenizer, [prompt.problem.text for prompt in problems])
    if changed:
        log.warning(
            "%s: the tokenizer does not keep the text of %d of the first %d problems (%r comes back as %r): the model"
            " reads them changed",
            *(where, len(changed), len(problems), *map(show, _around_difference(*changed[0]))),
        )


def largest_id(tokenizer: Any) -> int:
    """The largest id that the tokenizer can give."""
    return int(max(tokenizer.get_vocab().values()))


def check_ids(tokenizer: Any, ids: Sequence[int], valid_vocab: int, what: str, key: str) -> None:
    """Raise UserError, beginning with ``what``, for an id that the models' embeddings don't have."""
    if (beyond := max(ids, default=0)) >= valid_vocab:
        (token,) = tokenizer.convert_ids_to_tokens([beyond])
        raise UserError(
            f"{what} holds the token {token!r} with the id {beyond}, and the smaller of the embeddings of"
            f" policy.model_name and teacher.model_name ends at {valid_vocab - 1}: take it out of the text and the chat"
            " template, or choose models whose embeddings have a row for it"
        )


def _row(prompt: Prompt, where: str) -> str:
    return f"{where}: problem {prompt.prompt_id + 1}{named(prompt.problem)}"


def named(problem: Problem) -> str:
    """A problem's source and the start of its text, in brackets."""
    source = f"{problem.source}: " if problem.source else ""
    return f" ({source}{problem.text[:40]!r})"


def _warn_of_control_tokens(
    prompts: Iterable[Prompt], tokenizer: Any, where: str, column: str | None, think_tags: tuple[str, str]
) -> None:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    remedy = "as a control token, not as text: take it out of the data unless that is meant"
    texts = ((prompt, prompt.problem.text) for prompt in prompts)
    _warn_of(_control_tokens(texts, tokens), where, f"have %s in their text, which the model reads {remedy}")
    if column is not None:
        texts = ((prompt, prompt.problem.columns.get(column, "")) for prompt in prompts)
        found = _control_tokens(texts, tokens - set(think_tags))
        _warn_of(found, where, f"have %s in the column {column}, which the teacher reads {remedy}")


def _control_tokens(texts: Iterable[tuple[Prompt, str]], tokens: set[str]) -> Iterator[tuple[Prompt, str]]:
    """The first token in each text that has one. A pattern of thousands of tokens would take milliseconds a text."""
    if not tokens:
        return
    starts = re.compile(f"[{''.join(re.escape(start) for start in sorted({token[0] for token in tokens}))}]")
    lengths = sorted({len(token) for token in tokens}, reverse=True)
    for prompt, text in texts:
        parts = (text[at.start() : at.start() + length] for at in starts.finditer(text) for length in lengths)
        if hit := next((part for part in parts if part in tokens), None):
            yield prompt, hit


def _warn_of_unknown_tokens(prompts: Iterable[Prompt], tokenizer: Any, where: str) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unknown = str(getattr(getattr(backend, "model", None), "unk_token", None))
    number = tokenizer.get_vocab().get(unknown)
    if number is None or number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return
    hits = ((prompt, unknown) for prompt in prompts if number in prompt.student_ids)
    _warn_of(hits, where, "have characters that the vocabulary lacks and that the model reads as %s")


def _warn_of(hits: Iterator[tuple[Prompt, str]], where: str, fault: str) -> None:
    first = next(hits, None)
    if first is not None:
        prompt, token = first
        count = 1 + sum(1 for _ in hits)
        log.warning("%s: %d prompts %s; the first is %s", where, count, fault % repr(token), _row(prompt, where))


def _around_difference(text: str, back: str) -> tuple[str, str]:
    """The two texts from shortly before the first character in which they differ."""
    same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    begin = max(0, same - 20)
    return text[begin : begin + 60], back[begin : begin + 60]
