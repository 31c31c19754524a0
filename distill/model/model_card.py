"""The model card of an export: the source's own, and a section that describes the training."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.config.build import show

_TITLE = "## On-policy distillation"
_TEACHERS = {
    "self_frozen": "the student itself, as it was at the start, with more context",
    "self_ema": "an average of the student's own weights, with more context",
    "self_live": "the student itself, with more context",
}


def model_card(source: str, recipe: Mapping[str, Any], step: int, stop_tokens: Mapping[int, str]) -> str:
    """README.md of an export: ``source`` (empty: a short card with front matter), then how the model was trained.

    ``recipe``: the configuration as nested dictionaries. ``stop_tokens``: id -> token. The model licence and the front
    matter of ``source`` stay.
    """
    begin = source.rstrip() or _front_matter(recipe)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _settings(recipe, step, stop_tokens))
    return (
        f"{begin}\n\n{_TITLE}\n\n"
        "The student model was trained on its own responses: the teacher's probabilities of each response token were"
        " the target.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\n"
        "`generation_config.json` holds the stop tokens of the training. The sampling settings of the training are in"
        " this table only.\n"
    )


def public_name(name: str) -> str:
    """A model's hub name, or the last part of a folder's path: a card shows no path of the machine."""
    expanded = os.path.expanduser(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isdir(expanded)
    return Path(os.path.abspath(expanded)).name if is_path else name


def _front_matter(recipe: Mapping[str, Any]) -> str:
    name = public_name(recipe["policy"]["model_name"])
    return (
        f"---\nbase_model: {name}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags:\n- on-policy-distillation\n---\n\n# {name}, distilled"
    )


def _settings(recipe: Mapping[str, Any], step: int, stop_tokens: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    loop, policy, loss = recipe["distillation"], recipe["policy"], recipe["loss_fn"]
    context, sampling, optimizer = loop["context_distillation"], policy["generation"], policy["optimizer"]["kwargs"]
    yield "student", public_name(policy["model_name"])
    own = _TEACHERS.get(context["mode"]) if context["enabled"] else None
    yield "teacher", own or public_name(recipe["teacher"]["model_name"])
    yield "steps", str(step)
    yield "prompts per step", str(loop["num_prompts_per_step"])
    yield "responses per prompt", str(loop["num_generations_per_prompt"])
    yield "loss", f"{loss['kl_type']} KL, teacher top-{loop['topk_logits_k'] or 'all'}"
    yield "optimizer", f"AdamW, learning rate {optimizer['lr']:g}, weight decay {optimizer['weight_decay']:g}"
    yield "precision", f"{policy['precision']} compute, float32 master weights"
    yield "sampling temperature", f"{sampling['temperature']:g}"
    yield "sampling top_p, top_k", f"{sampling['top_p']:g}, {show(sampling['top_k'])}"
    yield "longest response", f"{sampling['max_new_tokens']} tokens"
    yield "stop tokens", ", ".join(f"`{token}` ({id_})" for id_, token in stop_tokens.items()) or "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")
