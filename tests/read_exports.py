"""Read model folders as a user of transformers or vLLM would; also run by an environment with transformers 4.

    python tests/read_exports.py JOB.json RESULT.pt

The job is what ``read`` takes, by name; ``resave`` (folder -> folder) makes copies in this version's dialect. Imports
nothing of this repository: it must run under either version.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TEXTS = ("What is 1+2, please?", "  two  spaces\n\nand lines", "Grüße, 世界 🙂", "<|im_start|>user\nhi<|im_end|>")
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+2?"})


@torch.inference_mode()
def read(folders: Sequence[str], ids: Sequence[int], new_tokens: int, resave: Mapping[str, str] = {}) -> dict[str, Any]:
    """By folder: log-probs [T, V] in float32, the ids of TEXTS, the rendered CHAT, greedy tokens after ``ids``.

    ``continued``: greedy tokens after a text, from what the tokenizer returns for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found: dict[str, Any] = {}
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
        model.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = torch.tensor([ids])
        generated = model.generate(tokens, max_new_tokens=new_tokens, do_sample=False)
        encoded = tokenizer(TEXTS[0], return_tensors="pt")
        continued = model.generate(**encoded, max_new_tokens=new_tokens, do_sample=False)
        found[folder] = {
            "logprobs": model(tokens).logits[0].log_softmax(-1),
            "text_ids": [tokenizer(text)["input_ids"] for text in TEXTS],
            "chat": tokenizer.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True),
            "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side],
            "generated": generated[0, len(ids) :].tolist(),
            "continued": continued[0, encoded["input_ids"].shape[1] :].tolist(),
            "dtype": str(AutoConfig.from_pretrained(folder).dtype),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        }
        if folder in resave:
            model.save_pretrained(resave[folder])
            tokenizer.save_pretrained(resave[folder])
    return found


def read_by_vllm(vllm_folders: Sequence[str], ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """By folder: log-probs of ``ids`` after the first, the ids of TEXTS, and greedy tokens after ``ids``, by vLLM."""
    return {folder: _read_by_vllm(folder, ids, new_tokens) for folder in vllm_folders}


def _read_by_vllm(folder: str, ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3)
    sampling = engine.get_default_sampling_params()
    assert isinstance(sampling, SamplingParams)
    sampling.temperature, sampling.max_tokens, sampling.prompt_logprobs = 0.0, new_tokens, 0
    (output,) = engine.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
    after_first = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "logprobs": [entry[token].logprob for token, entry in after_first],
        "generated": list(output.outputs[0].token_ids),
        "text_ids": [engine.get_tokenizer()(text)["input_ids"] for text in TEXTS],
    }


def main(job_file: str, result_file: str) -> None:
    """Do the job and save what ``read`` returns, with the version of transformers."""
    import transformers

    warnings.simplefilter("ignore")
    with open(job_file) as file:
        job = json.load(file)
    torch.set_num_threads(1)
    result = read_by_vllm(**job) if "vllm_folders" in job else read(**job)
    torch.save({"version": transformers.__version__, "result": result}, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
