"""A Hugging Face model sharded over the ranks, whose head is used inside the root's forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distill.distributed.host_memory import keep_freed_memory
from distill.distributed.world import World
from distill.model.attention import PACKED
from distill.model.gloo_reduce_scatter import GlooReduceScatter
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, load_weights, materialize, meta_model, restore_buffers
from distill.model.tensor_parallel import apply_tensor_parallel, check_plan
from distill.model.ulysses import UlyssesAllToAll
from distill.types import View

T = TypeVar("T")


class ShardedLM(nn.Module):
    """A causal language model read by rows: only the positions asked for meet the head.

    ``forward(view, use)`` runs the body over the packed sequences and hands ``use`` the hidden states of
    ``view.rows_N`` [N, D] and the head [V, D]. Loss and top-k are computed there, inside the root's forward, where
    FSDP holds the gathered head: a call beside the root would meet shards. ``use`` returns what pytree sees (tensors,
    tuples, dicts), so that FSDP can hook the backward. ``group``: the ranks that read spread views together. Under
    tensor parallelism the head is this rank's rows of it.
    """

    def __init__(self, causal_lm: Any, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.summed: frozenset[str] = frozenset()
        """Names of the parameters whose gradients the tensor-parallel group must sum."""
        self._group = group

    def forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        """Run the packed sequences; every rank of the shard mesh calls it, each with its own."""
        body, head = causal_lm_parts(self.causal_lm)
        hidden_TD = body(
            input_ids=view.tokens_T[None],
            position_ids=view.positions_T[None],
            packed_bounds=view.bounds,
            packed_shared=view.shared,
            packed_exchange=self._exchange(view),
            use_cache=False,  # with a cache, transformers reads packed positions as one sequence, silently
        ).last_hidden_state[0]
        weight = head.weight.to_local() if isinstance(head.weight, DTensor) else head.weight
        return use(hidden_TD.index_select(0, view.rows_N), weight)

    def _exchange(self, view: View) -> UlyssesAllToAll | None:
        if view.shards is None:
            return None
        assert self._group is not None, "a spread view needs the ranks that share it"
        return UlyssesAllToAll(self._group, view.shards)

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


@dataclass(frozen=True)
class Sharding:
    """Where a model's parts lie."""

    mesh: DeviceMesh
    """FSDP's: of one axis, or of two, the first of which only replicates."""
    group: dist.ProcessGroup | None = None
    """The ranks that read spread views together."""
    tp_mesh: DeviceMesh | None = None
    """The ranks that share each matrix, by ``tp_plan``; None: no tensor parallelism."""
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
    """A checkpoint as a sharded model: built on the meta device, its shards read slice by slice; collective.

    ``dtype`` is that of the shards, ``compute_dtype`` that of the gathered weights and activations; gradients are
    reduced in float32 and summed, not averaged (the loss is divided by the global token count already).
    """
    config = model_config(files, key)
    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    model = ShardedLM(meta_model(config, PACKED, dtype), sharding.group)
    model.requires_grad_(trainable)
    if sharding.tp_mesh is not None:
        plan = check_plan(config, sharding.tp_plan, files.name)
        model.summed = apply_tensor_parallel(model.causal_lm, sharding.tp_mesh, plan)
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
    mesh, again = sharding.mesh, sharding.reshard_after_forward
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=again)
    # A forward without backward must let the root's gathered weights go: a later one would read them stale.
    root_reshards = None if trainable else True
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=root_reshards)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # both settings hold for one module, not for those inside it
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain SUM: gloo knows no pre-multiplied one
            if mesh.device_type == "cpu":
                module.set_custom_reduce_scatter(GlooReduceScatter())  # type: ignore[arg-type]
