"""Low-rank adapters (LoRA): trained matrices A and B next to frozen weights of linear layers.

An adapter is two float32 parameters of the ``nn.Linear`` module that it adapts: ``lora_A`` [r, inputs] and ``lora_B``
[outputs, r], for rank r. No module is added, so the weight keeps its name, and FSDP shards it as without an adapter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.config import Config, LoraConfig
from distill.config.lora_rules import KEY
from distill.errors import UserError, show
from distill.model.dtensor import local_shard
from distill.model.hf_load import local_slices, one_layer_model

_NO_LAYER = {
    "target_modules": (
        " of the decoder layers (the embedding and the LM head cannot have adapters)",
        "give the last part of a layer's name, such as q_proj, or a pattern of its complete name, such as *.mlp.* for"
        " all layers of the MLPs",
    ),
    "exclude_modules": (
        "",
        "give the last part of a layer's name, such as o_proj; to exclude the layers of a block, give a pattern of"
        " their complete names, such as *.mlp.*",
    ),
}
"""Maps a key to the end of the problem and to the fix in the error for a pattern that matches no linear layer."""


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of a model's adapters, and the seed of their initial values."""

    lora: LoraConfig
    seed: int


class AdapterSwitch:
    """Switch that all adapters of a model share; ``on`` is whether forwards use the adapters."""

    def __init__(self) -> None:
        self.on = True


def check_adapters(config: Config, model: Any) -> None:
    """Raise UserError if a pattern of the adapters matches no layer; reads no weights.

    ``model``: the student's Hugging Face configuration.
    """
    lora = config.policy.dtensor_cfg.lora_cfg
    if lora.enabled:
        adapted_layers(lora, model)


def adapted_layers(lora: LoraConfig, model: Any) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of each linear layer that gets an adapter, by module name, in the model's order.

    ``model``: the Hugging Face configuration. The embedding and the LM head never get adapters. Raises UserError if a
    pattern matches no layer, or if no layer is left.
    """
    layers = linear_layers(model)
    _check_patterns("target_modules", lora.target_modules, layers)
    _check_patterns("exclude_modules", lora.exclude_modules, _modules(model))
    selected = select_layers(lora, layers)
    if not selected:
        raise UserError(
            f"{KEY}.exclude_modules={show(list(lora.exclude_modules))} excludes all linear layers that"
            f" {KEY}.target_modules={show(list(lora.target_modules))} selects",
            "remove a pattern of exclude_modules",
            key=f"{KEY}.exclude_modules",
            value=list(lora.exclude_modules),
        )
    return selected


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of all linear layers of the decoder layers, by module name, in the model's order.

    ``model``: the Hugging Face configuration.
    """
    return {name: size for name, size in _modules(model).items() if size is not None}


def select_layers(lora: LoraConfig, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the entries of ``layers`` that the patterns of ``lora`` select; keys are complete names of modules."""
    targets = lora.target_modules or ("*",)
    return {
        name: size
        for name, size in layers.items()
        if _matches_any(targets, name) and not _matches_any(lora.exclude_modules, name)
    }


def _modules(model: Any) -> dict[str, tuple[int, int] | None]:
    """Return the modules that a pattern may name: (outputs, inputs) of each linear layer in a decoder layer, by name.

    The values of the embedding and the LM head are None.
    """
    causal_lm = one_layer_model(model)
    layers = f"{causal_lm.base_model_prefix}.layers"
    first = f"{layers}.0."
    sizes = {
        name.removeprefix(first): (module.out_features, module.in_features)
        for name, module in causal_lm.named_modules()
        if name.startswith(first) and isinstance(module, nn.Linear)
    }
    found: dict[str, tuple[int, int] | None] = {
        name: None
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith(f"{layers}.")
    }
    count = range(model.get_text_config().num_hidden_layers)  # all layers have the same modules
    return found | {f"{layers}.{layer}.{name}": size for layer in count for name, size in sizes.items()}


def _check_patterns(name: str, patterns: Iterable[str], modules: Collection[str]) -> None:
    for pattern in patterns:
        if not any(_matches(pattern, module) for module in modules):
            place, fix = _NO_LAYER[name]
            problem = f"{KEY}.{name} has the pattern {show(pattern)}, which matches no linear layer{place}"
            raise UserError(problem, fix, key=f"{KEY}.{name}", value=pattern)


def _matches_any(patterns: Iterable[str], name: str) -> bool:
    return any(_matches(pattern, name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` covers the module ``name``, in which ``*`` matches any text.

    The pattern is compared with the complete name, and with the last part of the name.
    """
    expression = re.compile(re.escape(pattern).replace(r"\*", ".*"))
    return any(expression.fullmatch(text) is not None for text in (name, name.rpartition(".")[2]))


def add_adapters(model: PreTrainedModel, lora: LoraConfig, switch: AdapterSwitch) -> None:
    """Freeze ``model``, which is on the meta device, and add trainable adapters without values; not collective.

    Call it before tensor parallelism and FSDP, and ``initialize_adapters`` after the allocation of the storage.
    ``switch``: the switch of the added adapters. Raises UserError as ``adapted_layers``.
    """
    model.requires_grad_(False)
    for name, (outputs, inputs) in adapted_layers(lora, model.config).items():
        module: Any = model.get_submodule(name)
        module.lora_A = nn.Parameter(torch.empty(lora.dim, inputs, dtype=torch.float32, device="meta"))
        module.lora_B = nn.Parameter(torch.empty(outputs, lora.dim, dtype=torch.float32, device="meta"))
        module.lora_scale = lora.alpha / lora.dim
        module.lora_switch = switch
        module.forward = partial(_adapted_forward, module)


def _adapted_forward(module: Any, hidden: Tensor) -> Tensor:
    return linear(module, hidden, module.bias)


def has_adapter(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer with an adapter."""
    return "lora_A" in module._parameters


def is_adapter(name: str) -> bool:
    """Return whether ``name`` is the name of an adapter's parameter."""
    return name.endswith((".lora_A", ".lora_B"))


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (module name, ``nn.Linear``) of each layer with an adapter, in the model's order."""
    for name, module in model.named_modules():
        if has_adapter(module):
            yield name, module


def linear(module: Any, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return W x + scale * B (A x) + bias for this rank's part of a linear layer; W x + bias without an adapter.

    ``module``: an ``nn.Linear``; ``hidden`` [..., inputs]: x, in the dtype of the gathered weights. With tensor
    parallelism, this rank's parts of W, A, B and ``bias`` are used.
    """
    weight = local_shard(module.weight)
    if not has_adapter(module) or not module.lora_switch.on:
        return F.linear(hidden, weight, bias)
    low = F.linear(hidden, local_shard(module.lora_A)) * module.lora_scale
    update = F.linear(low, local_shard(module.lora_B))
    # Not one addmm: with B = 0 the result must be that of the same kernel without an adapter. Selective recomputation
    # keeps the product with W, so it must not change in place.
    return update.add_(F.linear(hidden, weight, bias))


@torch.no_grad()
def initialize_adapters(model: nn.Module, settings: AdapterSettings) -> None:
    """Set A to random values and B to 0; not collective.

    Each A is drawn as a complete tensor on the CPU, by a generator with a seed from ``settings.seed`` and the name of
    the parameter, so the values do not depend on the layout of the ranks.
    """
    for name, module in adapted_modules(model):
        complete = torch.empty(module.lora_A.shape)
        generator = torch.Generator().manual_seed(_seed(settings.seed, f"{name}.lora_A"))
        if settings.lora.lora_A_init == "xavier":
            nn.init.xavier_normal_(complete, generator=generator)
        else:
            nn.init.kaiming_uniform_(complete, a=math.sqrt(5), generator=generator)
        local_shard(module.lora_A).copy_(complete[local_slices(module.lora_A)])
        local_shard(module.lora_B).zero_()


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
