"""Weights on their way into vLLM's model, and the proof that they lie there as they were sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.model.checksum import BitSums, bit_sums, wrapped


class VllmWeights:
    """The weights of a vLLM engine's model on this rank.

    ``manifest``: all tensors that a sync brings, by Hugging Face name; ``tp_group``: gloo, of the engine's ranks.
    An engine on CPU repacks its matrices for its kernels and drops the originals, so their bits are summed at that
    door, after they were put together and before they are repacked; all others are summed where they lie. Raises
    RuntimeError for a model whose parameters don't follow from the manifest: its syncs could not be proven.
    """

    def __init__(self, llm: Any, manifest: Mapping[str, torch.Size], tp_size: int, tp_group: dist.ProcessGroup) -> None:
        from vllm.platforms import current_platform

        self._llm = llm
        self._tp_size = tp_size
        self._tp_group = tp_group
        self._repacks = bool(current_platform.is_cpu())
        self._in_place = not self._repacks and llm.llm_engine.model_config.quantization is None
        self.model: nn.Module = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        self._parts = self._parts_by_parameter(manifest)
        self._at_door: dict[str, int] = {}
        self._through_door: set[str] = set()
        if self._repacks:
            for name, module in self.model.named_modules():
                if hasattr(module, "quant_method"):
                    self._watch_door(name, module)

    @property
    def path(self) -> str:
        """How tensors get in: straight into vLLM's parameters, or layer by layer with repacking."""
        return "load_weights" if self._in_place else "reload_weights"

    @torch.no_grad()
    def receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Write all weights, streaming: at most a bucket and a layer are held beside the model."""
        self._at_door.clear()
        if self._in_place:
            self.model.load_weights(weights)  # type: ignore[operator]
            return
        # Without an iterator vLLM would read the first checkpoint again, from disk.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        head = getattr(self.model, "lm_head", None)
        if self._repacks and head is not None and "lm_head.weight" not in self._at_door:
            # A tied head has no tensor of its own that would make vLLM repack it: it would keep its first weights.
            head.quant_method.process_weights_after_loading(head)

    @torch.no_grad()
    def prove(self, sent: Mapping[str, BitSums]) -> None:
        """Compare every parameter's bits, added over the engine's ranks, with those sent; collective over them."""
        names = list(self._parts)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = torch.tensor([self._sum_of(name, parameters[name]) for name in names], dtype=torch.int64)
        if self._tp_size > 1:
            dist.all_reduce(found, group=self._tp_group)
        for name, total in zip(names, found.tolist(), strict=True):
            parts = self._parts[name]
            if total != wrapped(sum(sent[part].plain * copies for part, copies in parts.items())):
                raise RuntimeError(f"vLLM's {name} is not made of the bits of {', '.join(parts)} that were sent")

    def _sum_of(self, name: str, parameter: Tensor) -> int:
        if name not in self._through_door:
            return int(bit_sums(parameter)[0])
        if name not in self._at_door:
            raise RuntimeError(f"vLLM computes with its old {name}: the sync did not make it repack that")
        return self._at_door[name]

    def _watch_door(self, prefix: str, module: nn.Module) -> None:
        self._through_door.update(f"{prefix}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        method: Any = module.quant_method
        repack = method.process_weights_after_loading

        def summed_first(layer: nn.Module) -> None:
            for leaf, parameter in layer.named_parameters(recurse=False):
                self._at_door[f"{prefix}.{leaf}"] = int(bit_sums(parameter)[0])
            repack(layer)

        method.process_weights_after_loading = summed_first

    def _parts_by_parameter(self, manifest: Mapping[str, torch.Size]) -> dict[str, dict[str, int]]:
        """Of which tensors each parameter is made, and how many copies of each the engine's ranks hold together."""
        fused = getattr(self.model, "packed_modules_mapping", {})
        modules = dict(self.model.named_modules())
        parts: dict[str, dict[str, int]] = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            parent, _, own = owner.rpartition(".")
            names = [f"{parent}.{part}.{leaf}" for part in fused.get(own, [])] or [name]
            if name == "lm_head.weight" and name not in manifest:
                names = ["model.embed_tokens.weight"]
            parts[name] = {part: self._copies(modules[owner], leaf, i) for i, part in enumerate(names)}
        known = {part for names_of in parts.values() for part in names_of}
        if known != manifest.keys():
            raise RuntimeError(
                f"a sync into vLLM's {type(self.model).__name__} can't be proven: it is not known where it keeps"
                f" {sorted(known ^ manifest.keys())[:4]}"
            )
        return parts

    def _copies(self, module: nn.Module, leaf: str, part: int) -> int:
        from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        if isinstance(module, QKVParallelLinear):
            return 1 if part == 0 else module.num_kv_head_replicas
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            return 1
        if isinstance(module, RowParallelLinear):
            return 1 if leaf == "weight" else self._tp_size
        return self._tp_size
