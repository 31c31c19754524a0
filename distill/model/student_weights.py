"""Complete weights of the student for syncs and exports, with its low-rank adapters merged."""

from __future__ import annotations

import torch

from distill.config import Config
from distill.distributed.world import World
from distill.model.lora_merge import AdapterMerge
from distill.model.sharded import ShardedLM
from distill.model.weights import GatheredWeights

_MIB = 2**20


class StudentWeights:
    """Gathers the complete weights of the sharded student ``model``, in buckets of ``runtime.sync_bucket_mib``."""

    def __init__(self, config: Config, world: World, model: ShardedLM) -> None:
        self._model = model
        self._bucket_bytes = config.runtime.sync_bucket_mib * _MIB
        self._mesh, self._tp = world.replica_mesh, world.layout.tp_size
        self._replica_group = world.replica_group
        self._merge = AdapterMerge(model.adapters, world.shard_mesh)

    @property
    def trained_share(self) -> float:
        """Return the fraction of the elements of all weights in tensors that training changes: 1 without adapters."""
        sizes = {name: parameter.numel() for name, parameter in self._model.named_hf_parameters()}
        trained = [name for name, _ in self._model.adapters] or list(sizes)
        return sum(sizes[name] for name in trained) / sum(sizes.values())

    def merged(self, dtype: torch.dtype) -> GatheredWeights:
        """Return (Hugging Face name, complete weight) pairs in ``dtype``; iterating over them is collective.

        Adapters are merged into their weights; in bfloat16 the merged weights are rounded by a fixed dither.
        """
        named = self._model.named_hf_parameters()
        return GatheredWeights(named, dtype, self._bucket_bytes, self._mesh, self._tp, self._replica_group, self._merge)

    def adapters(self) -> GatheredWeights:
        """Return (name, complete float32 tensor) pairs of the adapters; iterating over them is collective."""
        named = self._model.named_trained()
        return GatheredWeights(named, torch.float32, self._bucket_bytes, self._mesh, self._tp, self._replica_group)
