"""Build a byte-level tokenizer of 261 tokens with a ChatML template.

It preserves every text. A byte is a token, so lengths can be counted by hand.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHATML, special_think: bool = True, extra: tuple[str, ...] = ()) -> Any:
    """Return a tokenizer of 256 bytes, special tokens (ids 256 to 258), think tags (259, 260) and ``extra``.

    A byte's id is its index in the byte-level alphabet, not its value. ``special_think``: the think tags are special
    tokens, so decoding may omit them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, *(THINK if special_think else ())])
    tokenizer.add_tokens([*(() if special_think else THINK), *extra])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = chat_template
    return fast
