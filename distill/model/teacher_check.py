"""The plain model, a module at a time: the slow, readable twin of the sharded, packed path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, meta_model, restore_buffers


@torch.no_grad()
def plain_logits(
    files: ModelFiles, config: Any, sequences: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Logits [B, T, V] of B sequences of one length by transformers' own eager attention, unsharded and unpacked.

    One layer's weights are in memory at a time (read when its forward begins, let go when it ends), so that it works
    for a model no rank could hold. For one rank; reads the checkpoint once.
    """
    model = meta_model(config, "eager", dtype).eval()
    restore_buffers(model, device)
    body, head = causal_lm_parts(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_turn = [body.get_input_embeddings(), *body.layers, body.norm, head]  # type: ignore[operator, misc]
    for module in in_turn:
        _stream(module, names, files, dtype, device)
    tokens = torch.tensor([list(sequence) for sequence in sequences], device=device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return logits


def _stream(
    module: nn.Module, names: dict[int, str], files: ModelFiles, dtype: torch.dtype, device: torch.device
) -> None:
    """Load a module's weights when its forward begins and let go of them when it ends."""
    places = [
        (part, leaf, parameter, names[id(parameter)])
        for part in module.modules()
        for leaf, parameter in part._parameters.items()
        if parameter is not None
    ]

    def load(*_: object) -> None:
        for part, leaf, _meta, name in places:
            part._parameters[leaf] = nn.Parameter(files.tensor(name).to(device, dtype), requires_grad=False)

    def let_go(*_: object) -> None:
        for part, leaf, meta, _name in places:
            part._parameters[leaf] = meta

    module.register_forward_pre_hook(load)
    module.register_forward_hook(let_go)
