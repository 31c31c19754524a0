"""A Hugging Face model sharded over the ranks, whose head is used inside the root's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from distill.model.attention import PACKED
from distill.model.load import (
    ModelFiles,
    causal_lm_parts,
    load_weights,
    materialize,
    meta_model,
    model_config,
    restore_buffers,
)
from distill.model.reduce import ExchangeAndAdd
from distill.runtime.hostmemory import keep_freed_memory
from distill.runtime.world import World
from distill.types import View

T = TypeVar("T")


class RowsModel(nn.Module):
    """A causal language model read by rows: only the positions asked for meet the head.

    ``forward(view, use)`` runs the body over the packed sequences and hands ``use`` the hidden states of
    ``view.rows_N`` [N, D] and the head [V, D]. Loss and top-k are computed there, inside the root's forward, where
    FSDP holds the gathered head: a call beside the root would meet shards. ``use`` returns what pytree sees (tensors,
    tuples, dicts), so that FSDP can hook the backward.
    """

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        """Run the packed sequences; every rank of the shard mesh calls it, each with its own."""
        body, head = causal_lm_parts(self.causal_lm)
        hidden_TD = body(
            input_ids=view.tokens_T[None],
            position_ids=view.positions_T[None],
            packed_bounds=view.bounds,
            packed_shared=view.shared,
            use_cache=False,  # with a cache, transformers reads packed positions as one sequence, silently
        ).last_hidden_state[0]
        return use(hidden_TD.index_select(0, view.rows_N), head.weight)

    def reshard_all(self) -> None:
        """Let go of all gathered weights: after a forward that no backward follows nobody else does.

        Not ``reshard``: FSDP's method of that name comes first in a sharded module's class, and is for the root alone.
        """
        for module in self.modules():
            if isinstance(module, FSDPModule):  # also where reshard_after_forward is off
                module.reshard()

    def named_hf_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Hugging Face names and parameters; a tied head stands once, under the embedding's name."""
        return list(self.causal_lm.named_parameters())


def load_sharded(
    files: ModelFiles,
    key: str,
    world: World,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    trainable: bool,
    reshard_after_forward: bool = True,
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
) -> RowsModel:
    """A checkpoint as a sharded model: built on the meta device, its shards read slice by slice; collective.

    ``dtype`` is that of the shards, ``compute_dtype`` that of the gathered weights and activations; gradients are
    reduced in float32 and summed, not averaged (the loss is divided by the global token count already).
    """
    config = model_config(files, key)
    mesh, device = world.shard_mesh, world.device
    if device.type == "cpu":
        keep_freed_memory()
    model = RowsModel(meta_model(config, PACKED, dtype))
    model.requires_grad_(trainable)
    if activation_checkpointing:
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(trainable)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload: OffloadPolicy = CPUOffloadPolicy() if cpu_offload and device.type == "cuda" else OffloadPolicy()
    for layer in model.causal_lm.base_model.layers:
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard_after_forward
        )
    # A forward without backward must let the root's gathered weights go: a later one would read them stale.
    root_reshards = None if trainable else True
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=root_reshards)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # both settings hold for one module, not for those inside it
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain SUM: gloo knows no pre-multiplied one
            if device.type == "cpu":
                module.set_custom_reduce_scatter(ExchangeAndAdd())  # type: ignore[arg-type]
    offloaded = cpu_offload and device.type == "cuda"
    materialize(model, torch.device("cpu") if offloaded else device)
    restore_buffers(model.causal_lm, device)
    with world.agreed(f"loading {files.name}"):
        load_weights(model.named_hf_parameters(), files)
    return model
