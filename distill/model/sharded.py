"""Hugging Face models sharded by FSDP2, with a head that is applied to the rows of the loss only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from distill.distributed.host_memory import keep_freed_memory
from distill.distributed.world import World
from distill.model.attention import PACKED
from distill.model.dtensor import local_shard
from distill.model.gloo_reduce_scatter import GlooReduceScatter
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, load_weights, materialize, meta_model, restore_buffers
from distill.model.tensor_parallel import apply_tensor_parallel, check_plan
from distill.model.ulysses import UlyssesAllToAll
from distill.types import View

T = TypeVar("T")


class ShardedLM(nn.Module):
    """A causal language model that applies its head to the rows of the loss only.

    ``forward(view, use)`` runs the body over the packed sequences and calls ``use`` with the hidden states of
    ``view.rows_N`` [N, D] and the head [V, D] (under tensor parallelism: this rank's rows of the head). ``use``
    computes the loss or the top-k. It runs inside the root's forward because FSDP has gathered the head only there. It
    must return a pytree of tensors, so that FSDP can hook the backward. ``group``: the ranks that share the positions
    of a view with ``shards``.
    """

    def __init__(self, causal_lm: Any, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.summed_gradients: frozenset[str] = frozenset()
        """Names of the parameters whose gradients the tensor-parallel group must sum."""
        self._group = group

    def forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        """Run this rank's packed sequences and return the result of ``use``; collective over the shard mesh."""
        body, head = causal_lm_parts(self.causal_lm)
        hidden_TD = body(
            input_ids=view.tokens_T[None],
            position_ids=view.positions_T[None],
            packed_bounds=view.bounds,
            packed_shared=view.shared,
            packed_all_to_all=self._all_to_all(view),
            use_cache=False,  # with a cache, transformers silently reads packed positions as one sequence
        ).last_hidden_state[0]
        return use(hidden_TD.index_select(0, view.rows_N), local_shard(head.weight))

    def _all_to_all(self, view: View) -> UlyssesAllToAll | None:
        if view.shards is None:
            return None
        assert self._group is not None, "a view with shards needs a group"
        return UlyssesAllToAll(self._group, view.shards)

    def reshard_all(self) -> None:
        """Free all gathered weights; needed after a forward without a backward, which would free them.

        Not named ``reshard``: FSDP's method of that name takes precedence in a sharded module's class, and it reshards
        the root only.
        """
        for module in self.modules():
            if isinstance(module, FSDPModule):  # FSDP frees no layer by itself if reshard_after_forward is off
                module.reshard()

    def named_hf_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return Hugging Face names and parameters; a tied head appears once, under the embedding's name."""
        return list(self.causal_lm.named_parameters())


@dataclass(frozen=True)
class Sharding:
    """Layout of a model's parameters and activations on the ranks."""

    mesh: DeviceMesh
    """FSDP's mesh: one axis that shards, or two axes, the first of which replicates."""
    group: dist.ProcessGroup | None = None
    """Ranks that share the positions of a view with ``shards``."""
    tp_mesh: DeviceMesh | None = None
    """Ranks that share each matrix, according to ``tp_plan``; None: no tensor parallelism."""
    tp_plan: Mapping[str, str] | None = None
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    cpu_offload: bool = False


def load_sharded(
    files: ModelFiles,
    key: str,
    world: World,
    sharding: Sharding,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    trainable: bool,
) -> ShardedLM:
    """Load a checkpoint as a sharded model, each rank reading its own slices; collective.

    ``dtype``: of the shards; ``compute_dtype``: of gathered weights and activations. Gradients are reduced in float32
    and summed, not averaged: the loss is already divided by the global token count. ``key``: the configuration key that
    names the checkpoint, for errors. Raises UserError.
    """
    config = model_config(files, key)
    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    model = ShardedLM(meta_model(config, PACKED, dtype), sharding.group)
    model.requires_grad_(trainable)
    if sharding.tp_mesh is not None:
        plan = check_plan(config, sharding.tp_plan, files.name)
        model.summed_gradients = apply_tensor_parallel(model.causal_lm, sharding.tp_mesh, plan)
    if sharding.activation_checkpointing:
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(trainable)
    offloaded = sharding.cpu_offload and device.type == "cuda"
    _shard(model, sharding, compute_dtype, CPUOffloadPolicy() if offloaded else OffloadPolicy(), trainable)
    materialize(model, torch.device("cpu") if offloaded else device)
    restore_buffers(model.causal_lm, device)
    with world.all_or_none(f"loading {files.name}"):
        load_weights(model.named_hf_parameters(), files, key)
    return model


def _shard(
    model: ShardedLM, sharding: Sharding, compute_dtype: torch.dtype, offload: OffloadPolicy, trainable: bool
) -> None:
    mesh, reshard = sharding.mesh, sharding.reshard_after_forward
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    # FSDP keeps the root gathered for the backward by default. A frozen model has none, and a following teacher's
    # next forward would use gathered copies of old weights.
    root_reshards = None if trainable else True
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=root_reshards)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # both settings apply to one module, not to its submodules
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain SUM: gloo does not support PREMUL_SUM
            if mesh.device_type == "cpu":
                module.set_custom_reduce_scatter(GlooReduceScatter())  # type: ignore[arg-type]
