"""Measure how much of a low-rank update reaches the generation engine: rounding by dither and to nearest.

    python -m scripts.bench_lora_sync [--steps 1 10 40] [--prompts 32] [--compare] [key.path=value ...]

Trains SmolLM2-135M with adapters of rank 16 by the recipe of the context demonstration, on two ranks in bfloat16. After
each of the steps it stores the merged weights in float32, and in bfloat16 as a sync sends them. Then it compares the
models in float32 arithmetic, so that the numbers show the rounding of the weights only. The tokens are responses that
the base model samples for validation problems. KL is per token, over the complete vocabulary. The columns:

- moved: KL(base || adapter) in nats, where the adapter's weights are merged in float32.
- KL: KL(trainer || engine), where the trainer has the merged float32 weights and the engine those in bfloat16.
- of moved: KL as a fraction of ``moved``.
- arrives: share of the update in the engine's weights, (engine - base) * (trainer - base) / (trainer - base)^2.

The exit code is 1 if ``of moved`` is above 2% with the dither. The last line has the seconds in which a rank gathers
all weights, without and with the merge.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.launch import ROOT, run, torchrun

if TYPE_CHECKING:
    from distill.distributed.world import World

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
RUN_DIR = ROOT / "runs" / "bench_lora_sync"
LIMIT = 0.02
"""Largest KL(trainer || engine) as a fraction of KL(base || adapter)."""
NEW_TOKENS = 48
RECIPE = (
    *("--config", "recipes/demo-context-cpu.yaml"),
    *("policy.dtensor_cfg.lora_cfg.enabled=true", "policy.dtensor_cfg.lora_cfg.dim=16"),
    *("policy.optimizer.kwargs.lr=1e-4", "policy.precision=bfloat16"),
    *("distillation.val_at_start=false", "distillation.val_at_end=false"),
    f"logger.log_dir={RUN_DIR / 'training'}",
)

Weights = Mapping[str, Tensor]


def record(steps: Sequence[int], argv: Sequence[str], world: World) -> None:
    """Train, and store the weights after each of ``steps``; collective."""
    from distill.build import build_run
    from distill.config import parse_args
    from distill.train import train_step

    arguments = parse_args([*argv, f"distillation.max_num_steps={max(steps)}"])
    training = build_run(arguments, world)
    assert training is not None, "the run directory is not empty"
    world.supervisor.begin_loop(arguments.config.runtime.phase_timeout_s)
    for step in range(1, max(steps) + 1):
        train_step(training, step - 1)
        if step in steps:
            _store(training.student, step, world.is_main)
    training.finish()


def _store(student: Any, step: int, is_main: bool) -> None:
    """Write the adapted weights in both precisions, and the seconds of two gathers in bfloat16; collective."""
    adapted = {name for name, _ in student.model.adapters}
    weights = student._weights
    seconds = []
    for merge in (None, weights._merge):
        weights._merge = merge
        started = time.monotonic()
        for _ in weights.merged(torch.bfloat16):
            pass
        seconds.append(time.monotonic() - started)
    found = {
        name: {key: tensor.clone() for key, tensor in weights.merged(dtype) if key in adapted}
        for name, dtype in (("merged", torch.float32), ("sent", torch.bfloat16))
    }
    if is_main:
        torch.save(found | {"seconds": seconds}, RUN_DIR / f"step_{step}.pt")


def sequences(model: Any, prompts: int) -> list[tuple[Tensor, int]]:
    """Return (token ids of prompt and sampled response, length of the prompt) of the first validation problems."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
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


def share(base: Weights, merged: Weights, sent: Weights) -> float:
    """Return the share of the update ``merged`` - ``base`` that ``sent`` contains."""
    arrived = total = 0.0
    for name, tensor in merged.items():
        update = (tensor - base[name]).double()
        arrived += float(((sent[name].double() - base[name].double()) * update).sum())
        total += float(update.square().sum())
    return arrived / total


def measure(step: int, model: Any, base: Weights, texts: Sequence[tuple[Tensor, int]]) -> bool:
    """Print the table's line of one step; return whether the dither keeps the limit."""
    found = torch.load(RUN_DIR / f"step_{step}.pt")
    merged = found["merged"]
    own = {name: base[name] for name in merged}
    trainer = list(logprobs(model, merged, texts))
    moved = divergence(logprobs(model, own, texts), iter(trainer))
    row, ratios = f"{step:5d}  {moved:9.2e}", []
    for sent in (found["sent"], {name: tensor.bfloat16() for name, tensor in merged.items()}):
        kl = divergence(iter(trainer), logprobs(model, sent, texts))
        ratios.append(kl / moved)
        row += f"  {kl:9.2e}  {kl / moved:8.2%}  {share(own, merged, sent):7.1%}"
    print(row, flush=True)
    return ratios[0] <= LIMIT


def main() -> None:
    """Train in torchrun, then compare the stored weights in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 40])
    parser.add_argument("--prompts", type=int, default=32, help="validation problems, with one response each")
    parser.add_argument("--compare", action="store_true", help="compare the weights of the last training")
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.record:
        from distill.distributed.program import exit_process, run_program, start_process

        start_process()
        exit_process(run_program(partial(record, arguments.steps, overrides)))
    if not arguments.compare:
        _train(arguments.steps, overrides)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).float().eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = sequences(model, arguments.prompts)
    print(f"\n{sum(len(ids) - prompt for ids, prompt in texts)} tokens of {len(texts)} responses")
    print(f"{'':16s}  {'dither':>28s}  {'to nearest':>28s}")
    print(f"{'step':>5s}  {'moved':>9s}" + f"  {'KL':>9s}  {'of moved':>8s}  {'arrives':>7s}" * 2)
    kept = [measure(step, model, base, texts) for step in arguments.steps]
    seconds = [torch.load(RUN_DIR / f"step_{step}.pt")["seconds"] for step in arguments.steps]
    plain, merged = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"gather of all weights in bfloat16: {plain:.2f} s without and {merged:.2f} s with the merge")
    sys.exit(not all(kept))


def _train(steps: Sequence[int], overrides: Sequence[str]) -> None:
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    Path(RUN_DIR).mkdir(parents=True)
    program = ("-m", "scripts.bench_lora_sync", "--record", "--steps", *map(str, steps))
    code = run(torchrun(2, *program, *RECIPE, *overrides))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
