"""Check tokenizers on fixed texts.

The token ids are compared with those of tokenizer.json, the decoded text with the original text, and the student's
tokenizer with the teacher's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from distill.data.rendering import token_ids
from distill.errors import UserError, reason, show

log = logging.getLogger(__name__)

PLAIN_TEXTS = ("What is 1+2, please?", "The first line.\nThe second line: x = 10 * (y - 3) / 2;")
"""Texts that every tokenizer must preserve: words, spaces, a line break, digits and punctuation."""
OTHER_TEXTS = (
    " leading, trailing  and   double spaces ",
    "Line one\r\n\n\n\tindented\n    four spaces",
    "0 12 345 6789 1234567890 3.14159 1,000,000 2^10 -7",
    "I'LL say it's DON'T, we've HelloWorld camelCase snake_case",
    "def f(x):\n\treturn {'a': [x, x**2]}  # comment\n",
    r"\frac{1}{2} \le \boxed{\sqrt{3}} $x_{1}$ <think>no</think> &amp; ...!?",
    "café naïve Straße Ωmega ѐ",
    "cafe\u0301 n\u0303 \u1112\u1161\u11ab",
    "今天天气很好。 日本語のテキスト 한국어 مرحبا नमस्ते",
    "😀👩‍👩‍👧 🇩🇪 ½ ﬁ ① \u00a0nbsp \u200bzero",
    "▁underline ▁▁ Ġ Ċ <0x0A> ##ing </w>",
    "x" * 40 + "=" * 20 + "-" * 7 + " " * 30 + ".",
)
"""Texts that some tokenizer classes of transformers encode differently from tokenizer.json."""
_VERBATIM = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def encoding_difference(read: Any, own: Tokenizer) -> str | None:
    """Describe a test text that ``read`` and ``own`` encode to different ids; None if all ids are equal.

    ``read``: the tokenizer as loaded by transformers, or None if it could not be loaded; ``own``: the tokenizer in
    tokenizer.json.
    """
    if read is None:
        return "the class cannot be loaded from these files"
    texts = _texts(token.content for token in own.get_added_tokens_decoder().values())
    try:
        ids = read(texts, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # the library raises a bare Exception if the unknown token has no id
        return reason(error)
    for text, found, written in zip(texts, ids, own.encode_batch(texts, add_special_tokens=False), strict=True):
        if found != written.ids:
            back = str(read.decode(found, **_VERBATIM))
            other = f"is decoded as {show(back)!r}" if back != text else f"becomes {len(found)} other ids"
            return f"{show(text)!r} {other}"
    return None


def _texts(added_tokens: Iterable[str]) -> list[str]:
    """Return the fixed texts and, for each added token, a text with the token between words.

    The spaces around the token are needed to test its flags lstrip and rstrip, which remove spaces.
    """
    return [*PLAIN_TEXTS, *OTHER_TEXTS, *(f"a {token} b{token}\n{token}c" for token in added_tokens)]


def check_round_trip(tokenizer: Any, key: str, value: str) -> None:
    """Encode and decode test texts; raise UserError if plain text changes, warn if other texts change.

    ``key``, ``value``: the configuration key that selects the tokenizer, and the value of this key.
    """
    what = f"{key}={value}"
    for text, back in changed_by_round_trip(tokenizer, PLAIN_TEXTS):
        if not _preserves_words(_normalized(tokenizer, text), _normalized(tokenizer, back)):
            raise UserError(
                f"{what} has a tokenizer that does not preserve text ({text!r} is decoded as {show(back)!r})",
                "choose a model with a tokenizer.json that preserves spaces and has tokens for these characters",
                key=key,
                value=value,
            )
    texts = [*PLAIN_TEXTS, *OTHER_TEXTS]
    if changed := changed_by_round_trip(tokenizer, texts):
        log.warning(
            "%s has a tokenizer that does not preserve %d of %d test texts (%r is decoded as %r): in prompts with such"
            " text, the model reads the changed text",
            *(what, len(changed), len(texts), *map(show, changed[0])),
        )


def changed_by_round_trip(tokenizer: Any, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Encode and decode each text; return (text, decoded text) for each text that is changed.

    The tokenizer's normalizer is applied to both texts before the comparison.
    """
    pairs = [(text, _round_trip(tokenizer, text)) for text in texts]
    return [(text, back) for text, back in pairs if _normalized(tokenizer, text) != _normalized(tokenizer, back)]


def _round_trip(tokenizer: Any, text: str) -> str:
    try:
        (ids,) = token_ids(tokenizer, [text])
        return str(tokenizer.decode(ids, **_VERBATIM))
    except Exception as error:  # e.g. an unknown token without an id
        return f"({reason(error)})"


def _normalized(tokenizer: Any, text: str) -> str:
    """Return ``text`` as changed by the tokenizer's normalizer, without spaces at the start.

    SentencePiece writes a space as ▁ and adds a space before each text; decoding removes this space.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return (normalizer.normalize_str(text) if normalizer is not None else text).replace("▁", " ").lstrip(" ")


def _preserves_words(text: str, back: str) -> bool:
    """Return whether ``back`` has all characters of ``text`` and all spaces between its words.

    ``back`` may have additional spaces.
    """
    words = [r"\s*".join(map(re.escape, word)) for word in text.split()]
    return re.fullmatch(r"\s*" + r"\s+".join(words) + r"\s*", back) is not None


def compare_vocabularies(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Raise UserError if the vocabularies of student and teacher, including added tokens, differ.

    The padded sizes of the embeddings may differ. Logs a warning if the tokenizers split test texts into different
    tokens. The teacher receives responses as token ids, and without context distillation also the student's prompts.
    In context distillation, the teacher's tokenizer encodes the teacher's prompts. ``student_name``, ``teacher_name``:
    the model names, for messages.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        token = differing[0]
        raise UserError(
            f"policy.model_name={student_name} and teacher.model_name={teacher_name} have different vocabularies"
            f" ({len(differing)} tokens differ; {token!r} has the ids {ours.get(token)} and {theirs.get(token)})",
            "choose a teacher with the student's tokenizer",
            key="teacher.model_name",
            value=teacher_name,
        )
    if student is teacher:
        return
    texts = _texts(student.get_added_vocab())
    pairs = zip(texts, token_ids(student, texts), token_ids(teacher, texts), strict=True)
    if differing := [text for text, of_student, of_teacher in pairs if of_student != of_teacher]:
        log.warning(
            "policy.model_name=%s and teacher.model_name=%s have the same tokens but split text differently (%d of %d"
            " test texts, for example %r), so without context distillation the teacher reads token ids that its own"
            " tokenizer would not produce: choose a teacher with the student's tokenizer",
            *(student_name, teacher_name, len(differing), len(texts), show(differing[0])),
        )
