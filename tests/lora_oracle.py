"""Reference of low-rank adapters: plain transformers with peft, in one process, and adapters with fixed values."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distill.config import LoraConfig
from distill.model.attention import PACKED
from distill.model.dtensor import local_shard
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import load_weights, local_slices, materialize, meta_model, restore_buffers
from distill.model.lora import AdapterSettings, initialize_adapters
from distill.model.sharded import ShardedLM

LORA = ("policy.dtensor_cfg.lora_cfg.enabled=true", "policy.dtensor_cfg.lora_cfg.dim=3")
"""Overrides of a recipe that enable adapters on all linear layers; A has fewer rows than four ranks."""


def adapted_model(files: ModelFiles, lora: LoraConfig, seed: int = 0) -> ShardedLM:
    """Return the product's model with initial adapters in one process, without FSDP, in float32."""
    config = model_config(files, "a model")
    model = ShardedLM(meta_model(config, PACKED, torch.float32), lora=lora)
    materialize(model, torch.device("cpu"))
    restore_buffers(model.causal_lm, torch.device("cpu"))
    load_weights(model.named_hf_parameters(), files)
    initialize_adapters(model.causal_lm, AdapterSettings(lora, seed))
    return model.train()


def with_peft(model: Any, lora: LoraConfig) -> Any:
    """Return ``model`` with the adapters of peft, with the values of ``fixed_value``.

    peft selects the layers itself: all linear layers without the LM head, or those that end with a target module.
    """
    import peft

    settings = peft.LoraConfig(
        r=lora.dim,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules) or "all-linear",
        exclude_modules=list(lora.exclude_modules) or None,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings)
    fill(peft_parameters(adapted).items())
    return adapted


def peft_parameters(model: Any) -> dict[str, Tensor]:
    """Return the trained parameters of a model with peft's adapters, by their names in this project."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Set adapters, sharded or complete, to the values of ``fixed_value``; not collective."""
    for name, parameter in parameters:
        local_shard(parameter).copy_(fixed_value(name, parameter.shape)[local_slices(parameter)])


def fixed_value(name: str, shape: torch.Size) -> Tensor:
    """Return random values of an adapter's parameter; B is not 0, because then A would have no gradient."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scale = 1 / math.sqrt(shape[1]) if name.endswith("lora_A") else 0.05
    return scale * torch.randn(shape, generator=generator)
