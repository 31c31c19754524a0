"""Measure how much of a low-rank update reaches the generation engine: rounding by dither and to nearest.

    python -m scripts.bench_lora_sync CHECKPOINTS [--steps 1 10 40] [--prompts 32]

CHECKPOINTS is the folder of a run that trained adapters and exported each step, for example:

    torchrun --nproc-per-node 2 -m distill.train --config recipes/demo-context-lora-cpu.yaml checkpointing.enabled=true
        checkpointing.checkpoint_dir=CHECKPOINTS checkpointing.save_period=1 checkpointing.save_consolidated=true
        checkpointing.keep_top_k=null

The adapters of each step are merged into the base model in float32, and in bfloat16 as a sync sends them. The models
are compared in float32 arithmetic, so that the numbers show the rounding of the weights only. The tokens are responses
that the base model samples for validation problems. KL is per token, over the complete vocabulary. The columns:

- moved: KL(base || adapter) in nats, where the adapter's weights are merged in float32.
- KL: KL(trainer || engine), where the trainer has the merged float32 weights and the engine those in bfloat16.
- of moved: KL as a fraction of ``moved``.
- arrives: share of the update that the engine receives, (engine - base) * (trainer - base) / (trainer - base)^2.

The exit code is 1 if ``of moved`` is above 2% with the dither.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.errors import UserError
from distill.model.hf_load import load_weights
from distill.model.lora_merge import Adapter, merge_into
from distill.model.peft_files import read_adapter
from scripts.launch import ROOT

LIMIT = 0.02
"""Largest KL(trainer || engine) as a fraction of KL(base || adapter)."""
NEW_TOKENS = 48

Weights = Mapping[str, Tensor]


def adapters(folder: Path) -> dict[str, Adapter]:
    """Return the adapters of a PEFT folder by the name of their weight."""
    found = read_adapter(str(folder), "CHECKPOINTS")
    tensors = {name: torch.empty(stored.shape) for name, stored in found.files.tensors.items()}
    load_weights(tensors.items(), found.files, "CHECKPOINTS")
    layers = {name.rpartition(".")[0] for name in tensors}
    return {
        f"{layer}.weight": Adapter(tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"], found.scale)
        for layer in sorted(layers)
    }


def merged(base: Weights, found: Mapping[str, Adapter], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the adapted weights in ``dtype``, as a sync sends them."""
    weights = {name: torch.empty_like(base[name], dtype=dtype) for name in found}
    for name, adapter in found.items():
        finite = merge_into(weights[name], name, base[name], adapter)
        assert finite, name
    return weights


def sequences(model: Any, folder: Path, prompts: int) -> list[tuple[Tensor, int]]:
    """Return (token ids of prompt and sampled response, length of the prompt) of the first validation problems."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (ROOT / "prompts/gsm_validation.jsonl").read_text().splitlines()[:prompts]
    torch.manual_seed(0)
    found = []
    for line in lines:
        chat = [{"role": "user", "content": json.loads(line)["question"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
        sampled = model.generate(ids, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW_TOKENS)
        found.append((sampled[0], ids.shape[1]))
    return found


@torch.no_grad()
def logprobs(model: Any, weights: Weights, texts: Sequence[tuple[Tensor, int]]) -> Iterator[Tensor]:
    """Yield the log-probs at the response tokens of each sequence with ``weights``: float32 [N, V]."""
    model.load_state_dict(weights, strict=False)
    for ids, prompt in texts:
        yield model(ids[None], use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)


def divergence(one: Iterator[Tensor], other: Iterator[Tensor]) -> float:
    """Return the mean KL(one || other) per token, in nats."""
    by_token = [(p.exp() * (p - q)).sum(-1) for p, q in zip(one, other, strict=True)]
    return float(torch.cat(by_token).double().mean())


def share(base: Weights, complete: Weights, sent: Weights) -> float:
    """Return the share of the update ``complete`` - ``base`` that ``sent`` contains."""
    arrived = total = 0.0
    for name, tensor in complete.items():
        update = (tensor - base[name]).double()
        arrived += float(((sent[name].double() - base[name].double()) * update).sum())
        total += float(update.square().sum())
    return arrived / total


def measure(folder: Path, model: Any, base: Weights, texts: Sequence[tuple[Tensor, int]]) -> tuple[str, bool]:
    """Return the table's columns for the adapters in ``folder``, and whether the dither keeps the limit."""
    found = adapters(folder)
    complete, sent = merged(base, found, torch.float32), merged(base, found, torch.bfloat16)
    own = {name: base[name] for name in complete}
    trainer = list(logprobs(model, complete, texts))
    moved = divergence(logprobs(model, own, texts), iter(trainer))
    row, ratios = f"{moved:9.2e}", []
    for engine in (sent, {name: tensor.bfloat16() for name, tensor in complete.items()}):
        kl = divergence(iter(trainer), logprobs(model, engine, texts))
        ratios.append(kl / moved)
        row += f"  {kl:9.2e}  {kl / moved:8.2%}  {share(own, complete, engine):7.1%}"
    return row, ratios[0] <= LIMIT


def main() -> None:
    """Compare the adapters of each step with their base model in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="folder of the run's checkpoints")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 40])
    parser.add_argument("--prompts", type=int, default=32, help="validation problems, with one response each")
    arguments = parser.parse_args()
    folders = {step: arguments.checkpoints / f"step_{step}" / "peft" for step in arguments.steps}
    try:
        name = {read_adapter(str(folder), "CHECKPOINTS").base for folder in folders.values()}.pop()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).float().eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = sequences(model, Path(name), arguments.prompts)
    print(f"\n{sum(len(ids) - prompt for ids, prompt in texts)} tokens of {len(texts)} responses")
    print(f"{'':16s}  {'dither':>28s}  {'to nearest':>28s}")
    print(f"{'step':>5s}  {'moved':>9s}" + f"  {'KL':>9s}  {'of moved':>8s}  {'arrives':>7s}" * 2)
    kept = []
    for step, folder in folders.items():
        row, keeps = measure(folder, model, base, texts)
        print(f"{step:5d}  {row}", flush=True)
        kept.append(keeps)
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
