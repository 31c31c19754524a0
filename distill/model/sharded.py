"""Hugging Face models sharded by FSDP2, with the LM head applied only to response tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from distill.config.models import LoraConfig, Recomputation
from distill.distributed.host_memory import keep_freed_memory
from distill.distributed.world import World
from distill.model.attention import PACKED
from distill.model.dtensor import local_shard
from distill.model.fused_layers import fuse_layers
from distill.model.gloo_reduce_scatter import GlooReduceScatter
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, load_weights, materialize, meta_model, restore_buffers
from distill.model.lora import (
    AdapterSettings,
    AdapterSwitch,
    adapted_modules,
    add_adapters,
    initialize_adapters,
    is_adapter,
)
from distill.model.recomputation import set_recomputation
from distill.model.tensor_parallel import apply_tensor_parallel, check_plan
from distill.model.ulysses import UlyssesAllToAll
from distill.types import View

T = TypeVar("T")


class ShardedLM(nn.Module):
    """A causal language model that applies its LM head only to positions that predict a response token.

    ``forward(view, use)`` computes the hidden states of the packed sequences in ``view``. The result is
    ``use(hidden, head)``, e.g. the loss or the top-k tokens. ``hidden`` [N, D]: hidden states at the positions
    ``view.rows_N`` of the N response tokens, with D channels. ``head`` [V, D] is the LM head's weight for V token ids;
    with tensor parallelism, only this rank's rows. ``use`` runs inside the root module's forward, because FSDP gathers
    the LM head only there. ``use`` must return a pytree of tensors, so that FSDP can add its backward hooks. ``group``:
    the process group over which the positions of packed sequences are split; needed only if ``view.shards`` is set.
    ``lora``: the low-rank adapters to add; None: no adapters. With adapters, all other parameters are frozen.
    """

    def __init__(self, causal_lm: Any, group: dist.ProcessGroup | None = None, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._switch = AdapterSwitch()
        if lora is not None:
            add_adapters(causal_lm, lora, self._switch)
        self.summed_gradients: frozenset[str] = frozenset()
        """Names of the parameters whose gradients must be summed over the tensor-parallel group."""
        self._group = group

    def forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        """Run the model on this rank's packed sequences and return ``use(hidden, head)``; collective.

        ``hidden`` [N, D]: hidden states at the positions that predict the N response tokens. ``head`` [V, D]: weight of
        the LM head, or this rank's rows of it with tensor parallelism.
        """
        body, head = causal_lm_parts(self.causal_lm)
        hidden_TD = body(
            input_ids=view.tokens_T[None],
            position_ids=view.positions_T[None],
            packed_bounds=view.bounds,
            packed_bounds_B=view.bounds_B,
            packed_shared=view.shared,
            packed_all_to_all=self._all_to_all(view),
            use_cache=False,  # with a cache, transformers silently reads packed positions as one sequence
        ).last_hidden_state[0]
        return use(hidden_TD.index_select(0, view.rows_N), local_shard(head.weight))

    def _all_to_all(self, view: View) -> UlyssesAllToAll | None:
        if view.shards is None:
            return None
        assert self._group is not None, "a view with shards needs a process group"
        return UlyssesAllToAll(self._group, view.shards)

    def reshard_all(self) -> None:
        """Free the weights that FSDP gathered for the last forward, in all modules; not collective.

        Call it after a forward that is not followed by a backward. It is not named ``reshard``, because FSDP adds a
        method of that name to the module, and that method reshards the root module only.
        """
        for module in self.modules():
            if isinstance(module, FSDPModule):  # with reshard_after_forward=False, FSDP keeps every layer gathered
                module.reshard()
        self.forget_forwards()

    def forget_forwards(self) -> None:
        """Clear FSDP's record of the order of forwards; not collective.

        It grows until a backward, and a frozen model has none.
        """
        context = self._get_fsdp_state()._comm_ctx  # type: ignore[operator]
        order = getattr(context, "post_forward_order", [])  # absent before the first forward
        for group in order:
            group._post_forward_indices.clear()
        order.clear()

    def named_hf_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) pairs of the tensors in the Hugging Face checkpoint, so without adapters.

        A tied LM head appears once, as the embedding.
        """
        return [(name, parameter) for name, parameter in self.causal_lm.named_parameters() if not is_adapter(name)]

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) pairs of the trained parameters: the adapters if there are any, otherwise all."""
        return [(name, parameter) for name, parameter in self.causal_lm.named_parameters() if parameter.requires_grad]

    @property
    def adapters(self) -> list[tuple[str, Any]]:
        """Return (name of the weight, ``nn.Linear``) of each layer with an adapter; empty without adapters.

        The layer has the parameters ``lora_A`` [r, inputs] and ``lora_B`` [outputs, r], and the number ``lora_scale``.
        """
        return [(f"{name}.weight", module) for name, module in adapted_modules(self.causal_lm)]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute forwards inside a ``with`` block without adapters; not collective.

        Use it only for forwards without gradients, because a backward outside of the block recomputes with adapters.
        """
        before, self._switch.on = self._switch.on, False
        try:
            yield
        finally:
            self._switch.on = before


@dataclass(frozen=True)
class Sharding:
    """Distribution of a model's parameters and activations over the ranks."""

    mesh: DeviceMesh
    """Device mesh of FSDP: one axis (shards), or two axes (replicas, shards)."""
    group: dist.ProcessGroup | None = None
    """Process group over which the positions of packed sequences are split; None: not split."""
    tp_mesh: DeviceMesh | None = None
    """Device mesh of tensor parallelism; None: no tensor parallelism."""
    tp_plan: Mapping[str, str] | None = None
    """The user's tensor-parallel plan; None: the plan of the model class.

    Maps patterns of module names to styles, such as "colwise".
    """
    reshard_after_forward: bool = True
    """Whether FSDP frees a layer's gathered weights after the layer's forward."""
    recomputation: Recomputation = "none"
    """Activations inside layers that the backward recomputes."""
    fused_layers: bool = False
    """Whether norms, rotary embeddings and activations use the Triton kernels of ``kernels.layer_*``."""
    cpu_offload: bool = False
    """Whether FSDP keeps the shards in host memory on GPUs; no effect on CPUs."""


def load_sharded(
    files: ModelFiles,
    key: str,
    world: World,
    sharding: Sharding,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    trainable: bool,
    adapters: AdapterSettings | None = None,
) -> ShardedLM:
    """Load a checkpoint as a sharded model; each rank reads only its own slices. Collective.

    ``trainable``: whether the model has a backward. ``adapters``: train low-rank adapters, which have float32 shards,
    instead of the weights. ``dtype`` is the dtype of the shards of the weights, ``compute_dtype`` the dtype of gathered
    weights and activations. Gradients are reduced in float32. They are summed over the ranks, not averaged, because the
    loss is already divided by the token count of all ranks. ``key``: the configuration key that names the checkpoint.
    Raises UserError if the checkpoint cannot be loaded.
    """
    config = model_config(files, key)
    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    causal_lm = meta_model(config, PACKED, dtype).requires_grad_(trainable)
    model = ShardedLM(causal_lm, sharding.group, None if adapters is None else adapters.lora)
    if sharding.tp_mesh is not None:
        plan = check_plan(config, sharding.tp_plan, files.name)
        model.summed_gradients = apply_tensor_parallel(model.causal_lm, sharding.tp_mesh, plan)
    if sharding.fused_layers:
        fuse_layers(model.causal_lm)
    set_recomputation(model.causal_lm, sharding.recomputation)
    model.train(trainable)
    offloaded = sharding.cpu_offload and device.type == "cuda"
    _shard(model, sharding, compute_dtype, CPUOffloadPolicy() if offloaded else OffloadPolicy(), trainable)
    materialize(model, torch.device("cpu") if offloaded else device)
    restore_buffers(model.causal_lm, device)
    with world.all_or_none(f"loading {files.name}"):
        load_weights(model.named_hf_parameters(), files, key)
    if adapters is not None:
        initialize_adapters(model.causal_lm, adapters)
    return model


def _shard(
    model: ShardedLM, sharding: Sharding, compute_dtype: torch.dtype, offload: OffloadPolicy, trainable: bool
) -> None:
    mesh, reshard = sharding.mesh, sharding.reshard_after_forward
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    # By default FSDP keeps the root module gathered for the backward. A frozen model has no backward, and the gathered
    # copy would be outdated after LiveTeacher reloads its shards.
    root_reshards = None if trainable else True
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=root_reshards)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # these settings do not apply to submodules
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # reduce with SUM: gloo does not support PREMUL_SUM
            if mesh.device_type == "cpu":
                module.set_custom_reduce_scatter(GlooReduceScatter())  # type: ignore[arg-type]
