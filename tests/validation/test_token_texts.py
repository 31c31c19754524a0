"""Texts of single tokens: characters of several tokens, special tokens, invalid bytes, SentencePiece."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distill.validation.token_texts import TokenTexts
from tests.tiny_tokenizer import tiny_tokenizer

BYTES = tiny_tokenizer(chat_template=None)
BAD = "\N{REPLACEMENT CHARACTER}"


def sentencepiece() -> Any:
    """Return a tokenizer like Llama 2's: words begin with U+2581, and other characters are bytes."""
    words = ["\u2581a", "\u2581", "b", "\u2581the", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")


def decode_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def ids_of(text: str | bytes) -> list[int]:
    """Return the byte-level ids of a text, or of bytes that are no text."""
    if isinstance(text, str):
        return list(BYTES(text)["input_ids"])
    by_byte = {BYTES(chr(i))["input_ids"][0]: i for i in range(128)}
    euro = dict(zip("€😀é".encode(), ids_of("€😀é"), strict=True))
    return [{**{byte: id_ for id_, byte in by_byte.items()}, **euro}[byte] for byte in text]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("a é", ["a", " ", "", "é"]),
        ("€", ["", "", "€"]),
        ("x😀<|im_end|>", ["x", "", "", "", "😀", "<|im_end|>"]),
        ("<think>é</think>", ["<think>", "", "é", "</think>"]),
        (b"a\xe2\x82b", ["a", "", BAD, "b"]),  # the character does not complete
        (b"\x82\x82\x82\x82\xe2\x82\xac", ["", "", "", BAD, BAD, "", f"{BAD}{BAD}€"]),
        (b"\xf0\x9f", ["", BAD]),
        ("", []),
    ],
)
def test_the_last_token_of_a_character_has_its_text(text: str | bytes, texts: list[str]) -> None:
    decode = decode_of(BYTES)
    found = TokenTexts(decode)(ids_of(text))
    assert found == texts and "".join(found) == decode(ids_of(text))


def test_texts_of_sentencepiece_tokens_have_the_spaces_of_the_response() -> None:
    tokenizer = sentencepiece()
    euro = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "€".encode()]
    texts = TokenTexts(decode_of(tokenizer))
    assert texts([3, 0, 2, *euro, 0, 1, 2]) == ["the", " a", "b", "", "", "€", " a", " ", "b"]
    assert texts.of(3) == " the" and texts.of(euro[0]) == BAD


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece])
def test_texts_of_random_tokens_join_to_the_decoded_response(make: Callable[[], Any]) -> None:
    tokenizer, chosen = make(), random.Random(0)
    decode = decode_of(tokenizer)
    texts = TokenTexts(decode)
    for length in (1, 2, 3, 5, 8, 200):
        for _ in range(20):
            ids = [chosen.randrange(len(tokenizer)) for _ in range(length)]
            found = texts(ids)
            assert len(found) == length and "".join(found) == decode(ids)


class Counted:
    """Decodes with a tokenizer and counts the decoded tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode, self.tokens = decode_of(tokenizer), 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.tokens += len(ids)
        return self._decode(ids)


def test_a_response_of_ordinary_tokens_is_decoded_once() -> None:
    for tokenizer, ids in ((sentencepiece(), [3, 0, 2, 1] * 500), (BYTES, ids_of("the " * 500))):
        texts = TokenTexts(decode := Counted(tokenizer))
        assert "".join(texts(ids)) == decode_of(tokenizer)(ids)
        assert decode.tokens < 1.1 * len(ids), "one decode, and a few of single tokens"


def test_the_texts_of_long_runs_of_invalid_bytes_take_linear_time() -> None:
    """Each token is decoded with fewer than 64 others; a decode of all earlier tokens would be 2,000 on average."""
    ids = ids_of(b"\x82" * 4000) + ids_of("€")
    texts = TokenTexts(decode := Counted(BYTES))(ids)
    assert decode.tokens < 64 * len(ids) and texts[-1].endswith("€") and "".join(texts) == decode_of(BYTES)(ids)
    assert max(map(len, texts)) <= 4, "each token has the text of the bytes before it"
