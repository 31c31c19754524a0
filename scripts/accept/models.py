"""Random models of a given size with a byte-level tokenizer, as Hugging Face folders; no download."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scripts.accept.results import Check
from scripts.accept.settings import Context

SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden=64, inner=128, layers=2, heads=4, kv_heads=2, channels=32, vocab=512),
    "0.1b": dict(hidden=768, inner=2048, layers=10, heads=12, kv_heads=4, channels=64, vocab=49_152),
    "0.6b": dict(hidden=1024, inner=3072, layers=28, heads=16, kv_heads=8, channels=128, vocab=151_936),
    "4b": dict(hidden=2560, inner=9728, layers=36, heads=32, kv_heads=8, channels=128, vocab=151_936),
}
"""Shapes of Qwen3 models; 0.6b and 4b are those of Qwen3-0.6B and Qwen3-4B."""
TEACHER_LAYERS = 2
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(context: Context) -> Iterator[Check]:
    """Write the random student, and a teacher of the student's width with few layers; the first rank writes."""
    settings = context.settings
    started = time.monotonic()
    if context.rank == 0:
        shape = SHAPES[settings.size]
        tokenizer = byte_tokenizer(shape["vocab"])
        for seed, (folder, layers) in enumerate(
            ((settings.student, shape["layers"]), (settings.teacher, TEACHER_LAYERS))
        ):
            shutil.rmtree(folder, ignore_errors=True)
            numel = save_model(folder, {**shape, "layers": layers}, seed, settings.device)
            tokenizer.save_pretrained(folder)
            yield Check(f"parameters, {folder.name}", numel / 1e6, "million")
        yield Check("written in", time.monotonic() - started, "s")
    if context.size > 1:
        context.world().barrier()


def save_model(folder: Path, shape: dict[str, int], seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Save a random Qwen3 model; return its number of parameters.

    The logits have a standard deviation of about 1, so that a wrong weight is visible in the log-probs.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # norms of ones would hide a missing gradient
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def model_config(shape: dict[str, int]) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["channels"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=1 / shape["hidden"] ** 0.5,
        eos_token_id=2,
    )


def byte_tokenizer(vocab: int) -> Any:
    """Return a tokenizer of 256 bytes, special tokens and fillers, with ``vocab`` ids and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"filler{i}" for i in range(vocab - len(alphabet) - len(_SPECIAL))]
    ids = {token: i for i, token in enumerate([*_SPECIAL, *alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = _TEMPLATE
    return fast
