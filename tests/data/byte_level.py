"""Write small byte-level BPE tokenizers in the files of a model folder, and load them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from distill.data.tokenizer import load_tokenizer

KEY = "policy.tokenizer.name"
CORPUS = [
    "What is 1+2, please? The first line and the second: x = 10 * (y - 3) / 2; I'LL don't 12345",
    "café 日本語 😀",
] * 9
BOS, EOS, USER = "<|begin|>", "<|end|>", "<|user|>"
DIGITS_IN_THREES = Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+")


def byte_level(folder: Path, settings: dict[str, Any], model_type: str = "llama", **changes: Any) -> Path:
    """Write a byte-level BPE tokenizer whose post-processor adds BOS, like DeepSeek-R1-Distill-Llama's.

    ``settings``: tokenizer_config.json; ``changes``: parts of the tokenizer to replace.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(DIGITS_IN_THREES, "isolated")
    byte_pairs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_pairs])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(USER, rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], pair=[BOS, "$A", BOS, "$B:1"], special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_settings(folder, **{"bos_token": BOS, "eos_token": EOS} | settings)
    return folder


def write_settings(folder: Path, **settings: Any) -> None:
    """Write tokenizer_config.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load(folder: Path, key: str = KEY, chat_template: str | None = None) -> Any:
    """Load the tokenizer of ``folder`` as a model's own."""
    return load_tokenizer(SimpleNamespace(name=str(folder), folder=folder), None, key, chat_template)
