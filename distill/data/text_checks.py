"""Check the texts and token ids of the prompts before the first step.

The checks find token ids without an embedding, control tokens in problems, and text that the tokenizer changes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from distill.data.grading import THINK_TAGS
from distill.data.tokenizer_checks import changed_by_round_trip
from distill.errors import UserError, show
from distill.types import Prompt

log = logging.getLogger(__name__)

_ROUND_TRIPS = 32
"""Number of problems to encode and decode, to check that the tokenizer preserves their texts."""


def check_texts(
    prompts: Iterable[Prompt],
    tokenizer: Any,
    valid_vocab: int,
    where: str,
    trace_column: str | None = None,
    think_tags: tuple[str, str] = THINK_TAGS,
    columns: Sequence[str] = (),
) -> None:
    """Raise UserError for a token id without an embedding; log warnings about text that models misread.

    ``prompts`` are iterated several times. ``valid_vocab``: number of token ids with an embedding. ``where``: the
    configuration key of the datasets, for messages. ``trace_column``: the column with reasoning that the
    teacher reads, in which ``think_tags`` are allowed; None: there is no such column. ``columns``: other columns that
    the teacher reads. Warnings report control tokens
    inside a problem or a trace, characters that are not in the vocabulary, and texts that differ after encoding
    and decoding. Each warning contains the number of affected prompts and the first of them.
    """
    if largest_id(tokenizer) >= valid_vocab:
        for prompt in prompts:
            check_ids(tokenizer, prompt.student_ids, valid_vocab, _row(prompt, where), where)
    _warn_of_control_tokens(
        prompts, tokenizer, where, [*([trace_column] if trace_column else []), *columns], think_tags
    )
    _warn_of_unknown_tokens(prompts, tokenizer, where)
    problems = list(islice(prompts, _ROUND_TRIPS))
    changed = changed_by_round_trip(tokenizer, [prompt.problem.text for prompt in problems])
    if changed:
        log.warning(
            "%s: the tokenizer does not preserve the text of %d of the first %d problems (%r is decoded as %r), so the"
            " model reads the changed text",
            *(where, len(changed), len(problems), *map(show, _around_difference(*changed[0]))),
        )


def largest_id(tokenizer: Any) -> int:
    """Return the largest id in the tokenizer's vocabulary."""
    return int(max(tokenizer.get_vocab().values()))


def check_ids(tokenizer: Any, ids: Sequence[int], valid_vocab: int, what: str, key: str) -> None:
    """Raise UserError if ``ids`` contain a token id without an embedding.

    ``valid_vocab``: number of token ids with an embedding; ``what``: name of the text in the error message;
    ``key``: configuration key of the text.
    """
    largest = max(ids, default=0)
    if largest >= valid_vocab:
        (token,) = tokenizer.convert_ids_to_tokens([largest])
        raise UserError(
            f"{what} contains the token {token!r} with id {largest}, but policy.model_name and teacher.model_name have"
            f" embeddings only for ids up to {valid_vocab - 1}",
            "remove the token from the text and the chat template, or choose models with an embedding for this token",
            key=key,
        )


def _row(prompt: Prompt, where: str) -> str:
    """Return a description of the prompt's problem for messages: number, source and first characters."""
    problem = prompt.problem
    source = f"{problem.source}: " if problem.source else ""
    return f"{where}: problem {prompt.prompt_id + 1} ({source}{problem.text[:40]!r})"


def _warn_of_control_tokens(
    prompts: Iterable[Prompt], tokenizer: Any, where: str, columns: Sequence[str], think_tags: tuple[str, str]
) -> None:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    reads = (
        "reads such a token as a control token, not as text: remove the tokens from the data if this is not intended"
    )
    texts = ((prompt, prompt.problem.text) for prompt in prompts)
    found = _control_tokens(texts, tokens)
    _warn_of(found, where, "contain control tokens such as %s in the problem", f"the model {reads}")
    texts = ((prompt, prompt.problem.messages) for prompt in prompts if prompt.problem.messages)
    earlier = (hit for hit in _control_tokens(texts, tokens - set(think_tags)) if hit[1] not in hit[0].problem.text)
    _warn_of(earlier, where, "contain control tokens such as %s in the messages", f"the model {reads}")
    for column in columns:
        texts = ((prompt, prompt.problem.columns.get(column, "")) for prompt in prompts)
        found = _control_tokens(texts, tokens - set(think_tags))
        fault = f"contain control tokens such as %s in the column {column.replace('%', '%%')}"
        _warn_of(found, where, fault, f"the teacher {reads}")


def _control_tokens(texts: Iterable[tuple[Prompt, str]], tokens: set[str]) -> Iterator[tuple[Prompt, str]]:
    """Yield (prompt, first token found) for each text that contains one of ``tokens``.

    A regular expression with thousands of tokens takes milliseconds per text. It is faster to search for the first
    characters of the tokens, and to compare the tokens only at these positions.
    """
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
    fault = "contain characters that are not in the vocabulary and are encoded as the token %s"
    _warn_of(hits, where, fault, "the model cannot distinguish these characters")


def _warn_of(hits: Iterator[tuple[Prompt, str]], where: str, fault: str, effect: str) -> None:
    """Log a warning with the number of ``hits`` and the first prompt; log nothing if there are no hits.

    ``hits``: pairs (prompt, token found in the prompt). ``fault``: what is wrong with these prompts; ``%s`` in this
    text is replaced by the token of the first pair. ``effect``: the consequence for the model.
    """
    first = next(hits, None)
    if first is not None:
        prompt, token = first
        count = 1 + sum(1 for _ in hits)
        log.warning("%s: %d prompts %s (first: %s); %s", where, count, fault % repr(token), _row(prompt, where), effect)


def _around_difference(text: str, back: str) -> tuple[str, str]:
    """Return up to 60 characters of ``text`` and of ``back``, around their first difference."""
    same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    begin = max(0, same - 20)
    return text[begin : begin + 60], back[begin : begin + 60]
