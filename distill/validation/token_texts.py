"""Split the text of a response into the texts of its tokens, for byte-level and SentencePiece tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

Decode = Callable[[Sequence[int]], str]
"""Function that decodes token ids to text, including special tokens."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoders return it for bytes that are no complete character."""
_LONGEST = 3
"""Largest number of bytes of an incomplete character. Decoders return one to three replacement characters for it."""
_WINDOW, _CONTEXT = 64, 16
"""Maximum number of tokens to decode together, and number of these tokens that the next window repeats."""


class TokenTexts:
    """Texts of single tokens; keeps the texts of all tokens that it has seen.

    ``decode`` decodes token ids. The text of most tokens does not depend on other tokens, so a complete response is
    decoded only once. Tokens with incomplete characters are decoded together with the tokens before them.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return one text per token; joined, they are the text of all ``ids``.

        If a character consists of several tokens, the last of them has the character, and the texts before it are
        empty. Bytes that never become a character are replacement characters (U+FFFD) of one of the next tokens.
        """
        texts: list[str] = []
        for has_part, group in groupby(ids, lambda id_: _INCOMPLETE in self.of(id_)):
            run = list(group)
            texts += self._split(run) if has_part else map(self.of, run)
        if ids and _INCOMPLETE not in self.of(ids[0]):
            texts[0] = self._decode(ids[:1])  # SentencePiece omits the space before the first word
        return texts if "".join(texts) == self._decode(ids) else self._split(ids)

    def of(self, id_: int) -> str:
        """Return the text of a token after another token; U+FFFD in place of an incomplete character."""
        if id_ not in self._texts:
            alone = self._decode([id_])
            both = self._decode([id_, id_])
            is_suffix = _INCOMPLETE not in alone and both.startswith(alone)
            self._texts[id_] = both[len(alone) :] if is_suffix else alone
        return self._texts[id_]

    def _split(self, ids: Sequence[int]) -> list[str]:
        """Return the texts of tokens whose characters may consist of several tokens."""
        texts = self._incremental(ids)
        complete = self._decode(ids)
        return texts if "".join(texts) == complete else [*[""] * (len(ids) - 1), complete]

    def _incremental(self, ids: Sequence[int]) -> list[str]:
        """Return the characters that each token completes; the end of the text may still change with the next token."""
        texts: list[str] = []
        start = seen = 0
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[start:end])
            stable = len(text) if end == len(ids) else len(text) - _incomplete_characters(text)
            texts.append(text[seen:stable])
            seen = max(seen, stable)
            if end - start == _WINDOW:
                rest, start = len(text) - seen, end - _CONTEXT
                seen = len(self._decode(ids[start:end])) - rest
        return texts


def _incomplete_characters(text: str) -> int:
    """Return how many characters at the end of ``text`` may belong to a character that is not complete yet."""
    return min(_LONGEST, len(text) - len(text.rstrip(_INCOMPLETE)))
