"""Load model folders with transformers 4, transformers 5 or vLLM, and save their outputs.

    python tests/read_exports.py JOB.json RESULT.pt

JOB.json holds the arguments of ``read`` or of ``read_by_vllm``. This file imports nothing of this repository, because
it also runs in an environment with transformers 4.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TEXTS = ("What is 1 + 2?", "  two  spaces\n\nlines", "Grüße, 世界 🙂", "<|im_start|>user\nhi<|im_end|>")
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+2?"})


@torch.inference_mode()
def read(folders: Sequence[str], ids: Sequence[int], new_tokens: int, resave: Mapping[str, str] = {}) -> dict[str, Any]:
    """Return for each folder: log-probs [T, V] in float32, token ids of TEXTS, rendered CHAT, greedy continuations.

    ``generated``: continuation of ``ids``. ``continued``: continuation of TEXTS[0], from the output of the tokenizer.
    ``resave``: output folder of a copy in the format of the installed version, by folder.
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


def read_by_vllm(
    vllm_folders: Sequence[str], ids: Sequence[int], new_tokens: int, base: str, adapters: Sequence[str]
) -> dict[str, Any]:
    """Return for each folder vLLM's log-probs of ``ids[1:]``, ids of TEXTS, and greedy continuation of ``ids``.

    Also return the log-probs with each of the folders ``adapters``, and those of their base model ``base``.
    """
    found = {folder: _read_by_vllm(folder, ids, new_tokens) for folder in vllm_folders}
    return found | _read_adapters_by_vllm(base, adapters, ids)


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


def _read_adapters_by_vllm(base: str, adapters: Sequence[str], ids: Sequence[int]) -> dict[str, list[float]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings: dict[str, Any] = dict(dtype="float32", max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3)
    engine = LLM(base, enable_lora=True, max_lora_rank=8, **settings)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    requests = {base: None} | {folder: LoRARequest(folder, i, folder) for i, folder in enumerate(adapters, 1)}
    found = {}
    for folder, request in requests.items():
        (output,) = engine.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False, lora_request=request)
        after_first = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found[folder] = [entry[token].logprob for token, entry in after_first]
    return found


def main(job_file: str, result_file: str) -> None:
    """Run a job and save its result with the version of transformers."""
    import transformers

    warnings.simplefilter("ignore")
    with open(job_file) as file:
        job = json.load(file)
    torch.set_num_threads(1)
    result = (read_by_vllm if "vllm_folders" in job else read)(**job)
    torch.save({"version": transformers.__version__, "result": result}, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
