"""Load the student's weights into vLLM's model, and verify vLLM's parameters with checksums.

The checksums (``BitSums``) are sums of bit patterns. The trainer computes the same checksums before it sends a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.model.checksum import WORD_BYTES, BitSums, bit_sums, wrap_int64
from distill.rollout.engine import SyncError


class Section(NamedTuple):
    """Range of rows of a vLLM parameter on this rank. A sync fills these rows from one student tensor."""

    tensor: str
    """Hugging Face name of the student's tensor."""
    begin: int
    """Index of the section's first row in the parameter."""
    end: int
    """Index of the section's last row in the parameter, exclusive."""
    first_row: int
    """Index of the section's first row in the student's tensor."""
    copies: int
    """Number of ranks of the engine that have a copy of the section."""


class VllmWeights:
    """The weights of a vLLM engine's model on this rank.

    ``llm``: vLLM's ``LLM`` object. ``manifest`` maps the Hugging Face name of each tensor that a sync sends to the
    tensor's shape. ``tp_group``: gloo group of the engine's ranks. On CPU, vLLM repacks matrices: it converts them to
    the memory format of its kernels and drops the originals. The checksums of these matrices are computed just before
    the repacking; all other checksums are computed from the parameters of the model. Raises RuntimeError if the model's
    parameters do not match the manifest.
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
        self._tensors = self._tensors_by_parameter(manifest)

    @property
    def path(self) -> str:
        """Return the name of the vLLM method that loads the weights.

        It is ``load_weights`` if the weights are updated in place. Otherwise it is ``reload_weights``, which also
        converts each layer's weights to the memory format of vLLM's kernels.
        """
        return "load_weights" if self._in_place else "reload_weights"

    @torch.no_grad()
    def receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load all weights of a sync into vLLM's model.

        ``weights`` yields pairs of Hugging Face name and unsharded tensor. The additional memory that loading needs is
        at most the size of one layer.
        """
        self._sums_before_repack.clear()
        if self._in_place:
            self.model.load_weights(weights)  # type: ignore[operator]
            return
        # Without an iterator, vLLM would reload the initial checkpoint from disk.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        head = getattr(self.model, "lm_head", None)
        if self._repacks and head is not None and "lm_head.weight" not in self._sums_before_repack:
            # A sync has no tensor for a tied head, so vLLM would not repack the head and keep its initial weights.
            head.quant_method.process_weights_after_loading(head)

    @torch.no_grad()
    def verify(self, sent: Mapping[str, BitSums]) -> None:
        """Compare each tensor's checksums, summed over the engine's ranks, with the sender's checksums.

        Collective over the engine's ranks. ``sent`` maps each tensor's Hugging Face name to the sender's checksums.
        Tensors that vLLM fused into one parameter, such as q, k and v, are compared separately. Raises SyncError if a
        checksum differs.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))  # a tied head may be the embedding module
        compared: list[tuple[str, Section]] = []
        sums: list[Tensor] = []
        for name, tensors in self._tensors.items():
            owner, _, leaf = name.rpartition(".")
            sections = self._sections(modules[owner], leaf, tensors)
            compared += [(name, section) for section in sections]
            sums.append(self._sums_of(name, modules[owner], sections))
        found = torch.cat(sums).cpu()
        if self._tp_size > 1:
            dist.all_reduce(found, group=self._tp_group)
        for (name, section), total in zip(compared, found.tolist(), strict=True):
            if total != [wrap_int64(value * section.copies) for value in sent[section.tensor]]:
                tensor = section.tensor
                raise SyncError(f"vLLM's parameter {name} differs from the student's weight {tensor}", tensor, "memory")

    def _sums_of(self, name: str, module: nn.Module, sections: list[Section]) -> Tensor:
        """Return the checksums of the sections (row ranges) of the parameter ``name``, int64 [sections, 2].

        vLLM converts some parameters to the memory format of its kernels. For these, return the checksums from just
        before the conversion; raise SyncError if this sync did not convert the parameter.
        """
        if name not in self._repacked_names:
            return section_sums(module.get_parameter(name.rpartition(".")[2]), sections)
        if name not in self._sums_before_repack:
            raise SyncError(
                f"vLLM still uses old weights for {name}, because {name} was not repacked in this sync",
                name,
                "repacking",
            )
        return self._sums_before_repack[name]

    def _hook_repack(self, prefix: str, module: nn.Module) -> None:
        """Make vLLM compute the checksums of the module's parameters just before it repacks these parameters.

        Repacking converts a parameter to the memory format of vLLM's kernels. An embedding that is used only for
        lookups is not repacked at all. ``prefix``: name of the module in the model.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        has_head = isinstance(getattr(self.model, "lm_head", None), ParallelLMHead)
        lookup_only = type(module) is VocabParallelEmbedding and has_head
        if lookup_only:  # it is never an operand of a matrix product, so no kernel needs it repacked
            module.quant_method.process_weights_after_loading = lambda layer: None  # type: ignore[union-attr]
            return
        self._repacked_names.update(f"{prefix}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        method: Any = module.quant_method
        repack = method.process_weights_after_loading

        def sum_and_repack(layer: nn.Module) -> None:
            for leaf, parameter in layer.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                sections = self._sections(layer, leaf, self._tensors[name])
                self._sums_before_repack[name] = section_sums(parameter, sections)
            repack(layer)

        method.process_weights_after_loading = sum_and_repack

    def _tensors_by_parameter(self, manifest: Mapping[str, torch.Size]) -> dict[str, list[str]]:
        """Return a dict that maps each vLLM parameter's name to the names of the student's tensors in it.

        A fused parameter consists of several tensors; their names are in the order of their rows. ``manifest`` maps the
        name of each tensor that a sync sends to the tensor's shape. Raises RuntimeError if vLLM's model needs other
        tensors than those of the manifest.
        """
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
                f"a sync into vLLM's {type(self.model).__name__} cannot be verified, because only the student or only"
                f" vLLM has the following weights: {', '.join(sorted(known ^ manifest.keys())[:4])}"
            )
        return tensors

    def _sections(self, module: Any, leaf: str, tensors: list[str]) -> list[Section]:
        """Return the sections of the parameter ``leaf`` of ``module`` on this rank.

        A section is a range of rows from one tensor of the student. The sections depend on how vLLM shards the
        parameter over the engine's ranks. ``tensors``: names of the student's tensors in the parameter.
        """
        from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        rows = len(module.get_parameter(leaf))
        if isinstance(module, VocabParallelEmbedding):  # padded with rows of zeros on the last rank
            return [Section(tensors[0], 0, rows, self._tp_rank * rows, 1)]
        if isinstance(module, RowParallelLinear) and leaf == "weight":  # sharded by columns: the checksums add up
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
    """Return the two checksums (``BitSums``) of each section of ``parameter``: int64 [sections, 2]."""
    return torch.stack([bit_sums(parameter[s.begin : s.end], s.first_row) for s in sections])
