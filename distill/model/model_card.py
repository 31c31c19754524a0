"""Model card of an export: the source model's card and a section about the training."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TITLE = "## On-policy distillation"
_TEACHERS = {
    "self_frozen": "the initial student, with additional context",
    "self_ema": "a moving average (EMA) of the student's weights, with additional context",
    "self_live": "the current student, with additional context",
    "self_periodic": "a copy of the student, refreshed every {refresh_period} steps, with additional context",
}


def model_card(source: str, recipe: Mapping[str, Any], step: int, stop_tokens: Mapping[int, str]) -> str:
    """Return the README.md of an export: the source model's card, then a section about the training.

    ``source``: text of the source model's card, which is kept with its front matter and licence; if empty, a short card
    with front matter is created. ``recipe``: the configuration as nested dictionaries. ``step``: number of completed
    training steps. ``stop_tokens`` maps the id of each stop token to its text.
    """
    windows = "\r\n" in source
    begin = _with_closed_fence(source.replace("\r\n", "\n").rstrip()) or _front_matter(recipe["policy"]["model_name"])
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _settings(recipe, step, stop_tokens))
    card = (
        f"{begin}\n\n{_TITLE}\n\n"
        "The student model was trained on its own responses. The targets were the teacher's probabilities at each"
        " response token.\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\n"
        "`generation_config.json` contains the stop tokens of the training. Its other settings are those of the"
        " source model; the table above lists the sampling settings of the training.\n"
    )
    return card.replace("\n", "\r\n") if windows else card


def adapter_card(card: str, base: str) -> str:
    """Return the README.md of an exported adapter: front matter, and the section about the training.

    ``card``: the README.md of the export of the complete model, whose licence entries and last section are kept.
    ``base``: hub name or folder of the base model.
    """
    text = card.replace("\r\n", "\n")
    head, _, section = text.rpartition(f"\n{_TITLE}\n")
    front = re.match(r"---\n(.*?\n)---\n", head, re.DOTALL)
    licences = re.findall(r"^license\w*:.*\n", front[1], re.MULTILINE) if front else []
    use = (
        "vLLM and transformers read the stop tokens and the chat template of the base model. To use those of the"
        " training, name this folder in vLLM's `--tokenizer` and `--generation-config`, or in transformers'"
        " `GenerationConfig.from_pretrained` and `AutoTokenizer.from_pretrained`.\n"
    )
    return f"{_front_matter(base, 'peft', licences)}\n\n{_TITLE}\n{section}\n{use}"


def _with_closed_fence(text: str) -> str:
    """Return ``text``, with a closing fence if its last Markdown code block is still open.

    Without the fence, the section that follows would become part of the code block.
    """
    fence = ""
    for mark, rest in re.findall(r"^ {0,3}(`{3,}|~{3,})(.*)$", text, re.MULTILINE):
        if not fence:
            fence = "" if mark[0] == "`" and "`" in rest else mark
        elif mark.startswith(fence) and not rest.strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text


def public_name(name: str) -> str:
    """Return a model's name without local directories: its hub name, or the last part of its path.

    A folder in the hub's cache ends with a hash, so its hub name is returned.
    """
    expanded = os.path.expanduser(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isdir(expanded)
    if not is_path:
        return name
    return hub_name(name) or Path(os.path.abspath(expanded)).name


def hub_name(name: str) -> str | None:
    """Return the hub name of a model whose folder ``name`` is in the hub's cache; None for any other folder."""
    cached = _cached(name)
    return cached[1].replace("--", "/") if cached else None


def hub_revision(folder: str | Path) -> str | None:
    """Return the commit of a model whose ``folder`` is in the hub's cache; None for any other folder."""
    cached = _cached(folder)
    return cached[2] if cached else None


def _cached(folder: str | Path) -> re.Match[str] | None:
    return re.search(r"/models--([^/]+)/snapshots/([^/]+)$", os.path.realpath(os.path.expanduser(folder)))


def loadable_name(name: str) -> str:
    """Return a name that loads a model from any directory: its hub name, the absolute path of a folder, or ``name``."""
    return hub_name(name) or (os.path.abspath(name) if os.path.isdir(name) else name)


def _front_matter(base: str, library: str = "transformers", licences: Sequence[str] = ()) -> str:
    name = public_name(base)
    return (
        f"---\nbase_model: {json.dumps(name, ensure_ascii=False)}\nlibrary_name: {library}\n{''.join(licences)}"
        f"pipeline_tag: text-generation\ntags:\n- on-policy-distillation\n---\n\n# {name}, distilled"
    )


def _settings(recipe: Mapping[str, Any], step: int, stop_tokens: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    loop, policy, loss = recipe["distillation"], recipe["policy"], recipe["loss_fn"]
    context, sampling, optimizer = loop["context_distillation"], policy["generation"], policy["optimizer"]["kwargs"]
    yield "student", public_name(policy["model_name"])
    own = _TEACHERS.get(context["mode"], "").format_map(context) if context["enabled"] else ""
    yield "teacher", own or public_name(recipe["teacher"]["model_name"])
    yield "steps", str(step)
    yield "prompts per step", str(loop["num_prompts_per_step"])
    yield "responses per prompt", str(loop["num_generations_per_prompt"])
    top_k = loop["topk_logits_k"]
    tokens = f"the teacher's top {top_k} tokens" if top_k else "all tokens"
    yield "loss", f"{loss['kl_type']} KL over {tokens}"
    yield "optimizer", f"AdamW, learning rate {optimizer['lr']:g}, weight decay {optimizer['weight_decay']:g}"
    lora = policy.get("dtensor_cfg", {}).get("lora_cfg", {})
    if lora.get("enabled"):
        yield "LoRA", f"rank {lora['dim']}, alpha {lora['alpha']:g}"
    trained = "adapters" if lora.get("enabled") else "master weights"
    yield "precision", f"{policy['precision']} compute, float32 {trained}"
    yield "sampling temperature", f"{sampling['temperature']:g}"
    yield "sampling top_p, top_k", f"{sampling['top_p']:g}, {sampling['top_k'] or 'off'}"
    changes = (f"{tokens} from step {first}" for first, tokens in loop.get("max_new_tokens_schedule", ()))
    yield "maximum response length", ", ".join((f"{sampling['max_new_tokens']} tokens", *changes))
    yield "stop tokens", ", ".join(f"{_code(token)} ({id_})" for id_, token in stop_tokens.items()) or "none"


def _code(text: str) -> str:
    """Return ``text`` as Markdown inline code, with delimiters longer than any run of backticks in it."""
    if "`" not in text:
        return f"`{text}`"
    mark = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{mark} {text} {mark}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\r", "\\r").replace("\n", "\\n")
