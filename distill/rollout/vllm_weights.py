"""Weights on their way into vLLM's model, and the proof that they lie there as they were sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.model.checksum import WORD_BYTES, BitSums, bit_sums, wrap_int64


class Section(NamedTuple):
    """Where a tensor of a sync lies in a parameter of this rank."""

    tensor: str
    """Its Hugging Face name."""
    begin: int
    end: int
    """Rows of the parameter, from ``begin`` to before ``end``."""
    first_row: int
    """Which row of the tensor the first of them is."""
    copies: int
    """How many ranks of the engine hold each of the tensor's elements."""


class VllmWeights:
    """The weights of a vLLM engine's model on this rank.

    ``manifest``: all tensors that a sync brings, by Hugging Face name; ``tp_group``: gloo, of the engine's ranks. An
    engine on CPU repacks its matrices for its kernels and drops the originals, so their bits are summed at that door,
    after they were put together and before they are repacked; all others are summed where they lie. Raises
    RuntimeError for a model whose parameters don't follow from the manifest: its syncs could not be proven.
    """

    def __init__(self, llm: Any, manifest: Mapping[str, torch.Size], tp_size: int, tp_group: dist.ProcessGroup) -> None:
        from vllm.platforms import current_platform

        self._llm = llm
        self._tp_size, self._tp_rank, self._tp_group = tp_size, dist.get_rank() % tp_size, tp_group
        self._repacks = bool(current_platform.is_cpu())
        self._in_place = not self._repacks and llm.llm_engine.model_config.quantization is None
        self.model: nn.Module = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        self._sums_before_repack: dict[str, Tensor] = {}
        self._repacked_names: set[str] = set()
        if self._repacks:
            for name, module in self.model.named_modules():
                if hasattr(module, "quant_method"):
                    self._hook_repack(name, module)
        self._names = self._names_by_parameter(manifest)

    @property
    def path(self) -> str:
        """How tensors get in: straight into vLLM's parameters, or layer by layer with repacking."""
        return "load_weights" if self._in_place else "reload_weights"

    @torch.no_grad()
    def receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Write all weights, streaming: at most a bucket and a layer are held beside the model."""
        self._sums_before_repack.clear()
        if self._in_place:
            self.model.load_weights(weights)  # type: ignore[operator]
            return
        # Without an iterator vLLM would read the first checkpoint again, from disk.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        head = getattr(self.model, "lm_head", None)
        if self._repacks and head is not None and "lm_head.weight" not in self._sums_before_repack:
            # A tied head has no tensor of its own that would make vLLM repack it: it would keep its first weights.
            head.quant_method.process_weights_after_loading(head)

    @torch.no_grad()
    def verify(self, sent: Mapping[str, BitSums]) -> None:
        """Compare the bits of every tensor, added over the engine's ranks, with those sent; collective over them.

        Each tensor is found by itself, also where vLLM fused several into one parameter.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))  # a tied head may be the embedding itself
        places: list[tuple[str, Section]] = []
        sums: list[Tensor] = []
        for name, tensors in self._names.items():
            owner, _, leaf = name.rpartition(".")
            sections = self._sections(modules[owner], leaf, tensors)
            places += [(name, section) for section in sections]
            sums.append(self._sums_of(name, modules[owner], sections))
        found = torch.cat(sums).cpu()
        if self._tp_size > 1:
            dist.all_reduce(found, group=self._tp_group)
        for (name, section), total in zip(places, found.tolist(), strict=True):
            if total != [wrap_int64(part * section.copies) for part in sent[section.tensor]]:
                raise RuntimeError(f"vLLM's {name} does not hold the bits of {section.tensor} that were sent")

    def _sums_of(self, name: str, module: nn.Module, sections: list[Section]) -> Tensor:
        """The bit sums of a parameter's sections, int64 [sections, 2]."""
        if name not in self._repacked_names:
            return section_sums(module.get_parameter(name.rpartition(".")[2]), sections)
        if name not in self._sums_before_repack:
            raise RuntimeError(f"vLLM computes with its old {name}: the sync did not make it repack that")
        return self._sums_before_repack[name]

    def _hook_repack(self, prefix: str, module: nn.Module) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        has_head = isinstance(getattr(self.model, "lm_head", None), ParallelLMHead)
        looked_up = type(module) is VocabParallelEmbedding and has_head
        if looked_up:  # it is never multiplied: what the kernels would be given isn't read
            module.quant_method.process_weights_after_loading = lambda layer: None  # type: ignore[union-attr]
            return
        self._repacked_names.update(f"{prefix}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        method: Any = module.quant_method
        repack = method.process_weights_after_loading

        def summed_first(layer: nn.Module) -> None:
            for leaf, parameter in layer.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                self._sums_before_repack[name] = section_sums(parameter, self._sections(layer, leaf, self._names[name]))
            repack(layer)

        method.process_weights_after_loading = summed_first

    def _names_by_parameter(self, manifest: Mapping[str, torch.Size]) -> dict[str, list[str]]:
        """Of which tensors each of vLLM's parameters is made, in the order in which they lie there."""
        fused = getattr(self.model, "packed_modules_mapping", {})
        tensors: dict[str, list[str]] = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            parent, _, own = name.rpartition(".")[0].rpartition(".")
            leaf = name.rpartition(".")[2]
            tensors[name] = [f"{parent}.{part}.{leaf}" for part in fused.get(own, [])] or [name]
            if name == "lm_head.weight" and name not in manifest:
                tensors[name] = ["model.embed_tokens.weight"]
        known = {tensor for parts in tensors.values() for tensor in parts}
        if known != manifest.keys():
            raise RuntimeError(
                f"a sync into vLLM's {type(self.model).__name__} can't be proven: it is not known where it keeps"
                f" {sorted(known ^ manifest.keys())[:4]}"
            )
        return tensors

    def _sections(self, module: Any, leaf: str, tensors: list[str]) -> list[Section]:
        """The sections of a parameter, as vLLM's layers split it over an engine's ranks."""
        from vllm.model_executor.layers.linear import (
            ColumnParallelLinear,
            QKVParallelLinear,
            RowParallelLinear,
        )
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            VocabParallelEmbedding,
        )

        rows = len(module.get_parameter(leaf))
        if isinstance(module, VocabParallelEmbedding):  # its last rank's end is padded with zeros
            return [Section(tensors[0], 0, rows, self._tp_rank * rows, 1)]
        if isinstance(module, RowParallelLinear) and leaf == "weight":  # columns are split, and add up
            assert module.input_size_per_partition * module.params_dtype.itemsize % WORD_BYTES == 0
            return [Section(tensors[0], 0, rows, 0, 1)]
        if not isinstance(module, ColumnParallelLinear):
            return [Section(tensors[0], 0, rows, 0, self._tp_size)]
        sections, begin = [], 0
        for i, (tensor, size) in enumerate(zip(tensors, module.output_partition_sizes, strict=True)):
            copies = module.num_kv_head_replicas if isinstance(module, QKVParallelLinear) and i else 1
            sections.append(Section(tensor, begin, begin + size, self._tp_rank // copies * size, copies))
            begin += size
        return sections


def section_sums(parameter: Tensor, sections: list[Section]) -> Tensor:
    """The bit sums of each section, int64 [sections, 2]."""
    return torch.stack([bit_sums(parameter[s.begin : s.end], s.first_row) for s in sections])
