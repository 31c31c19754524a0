"""Tensor parallelism of a Hugging Face model, by the plan that its class ships: each rank has part of every matrix.

Embedding and head are split by vocabulary. The residual stream is whole on every rank of the group, so what acts on it
alone (the norms between blocks) is the same everywhere, and so are gradients, but for the order of their sums.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from transformers import PreTrainedModel

from distill.config import Config
from distill.errors import UserError
from distill.loss.checks import check_part
from distill.model.hf_load import causal_lm_parts, chunk_of, meta_model

REPLICATED = "replicated_with_grad_allreduce"
"""Weights that are whole on every rank but act on its heads only: their gradients are summed over the group."""
STYLES = ("colwise", "rowwise", REPLICATED)
_BY_VOCABULARY = ("embed_tokens", "lm_head")
"""Always split by vocabulary, whatever a plan says of them: the loss is."""


def check_tensor_parallel(config: Config, model: Any, vocab: int) -> None:
    """Refuse tensor parallelism that doesn't suit the student, before anything is loaded: as ``check_plan``, and where
    a rank's part of the vocabulary would be padding alone. Raises UserError.

    ``model``: the student's Hugging Face configuration; ``vocab``: ids below this one have tokens.
    """
    parallel = config.policy.dtensor_cfg
    if parallel.tensor_parallel_size > 1:
        check_plan(model, parallel.custom_parallel_plan, config.policy.model_name)
        check_part(model.vocab_size, parallel.tensor_parallel_size, vocab, teacher_rows=False)


def check_plan(config: Any, custom: Mapping[str, str] | None, name: str) -> dict[str, str]:
    """Module pattern -> style: the recipe's plan or the model class's own.

    Errors: UserError where there is none, for a style that is not known here, a pattern that fits nothing or no linear
    layer, and for weights beside split ones that a plan leaves out: their gradients would lack other ranks' heads.
    """
    given = custom or getattr(config, "base_model_tp_plan", None) or {}
    plan = {pattern: style for pattern, style in given.items() if pattern not in _BY_VOCABULARY}
    key = "policy.dtensor_cfg.custom_parallel_plan"
    if not plan:
        raise UserError(
            f"policy.dtensor_cfg.tensor_parallel_size is above 1, but the family {config.model_type} of {name} ships no"
            f" plan for it: give one in {key}, or set the size to 1"
        )
    for pattern, style in plan.items():
        if style not in STYLES:
            source = key if custom else f"the plan of the family {config.model_type}"
            raise UserError(
                f"{source} has the style {style} for {pattern}, which is not known here: use {', '.join(STYLES)} in"
                f" {key}, or set policy.dtensor_cfg.tensor_parallel_size=1"
            )
    _check_modules(config, plan, key)
    return plan


def _check_modules(config: Any, plan: Mapping[str, str], key: str) -> None:
    body, _ = causal_lm_parts(meta_model(_one_layer(config), "eager", torch.float32))
    modules = {re.sub(r"\.\d+\.", ".*.", name): module for name, module in body.named_modules()}
    for pattern, style in plan.items():
        found = [module for name, module in modules.items() if _covers(pattern, name)]
        if not found or (style != REPLICATED and not all(isinstance(module, nn.Linear) for module in found)):
            raise UserError(
                f"{key} has {pattern}: {style}, which fits {'no linear layer' if found else 'nothing'} of a"
                f" {config.model_type}: name linear layers as its body does (layers.*.mlp.up_proj)"
            )
    styles = {name: _role(plan, name) for name in modules}
    own = {name: _role(getattr(config, "base_model_tp_plan", None) or {}, name) for name in modules}
    split = {_block(name) for name, style in styles.items() if style in ("colwise", "rowwise")}
    for name, module in modules.items():
        if not any(True for _ in module.parameters(recurse=False)) or name in _BY_VOCABULARY:
            continue
        wanted = (own[name] or REPLICATED) if _block(name) in split else None
        if wanted and not any(own.values()):  # nothing to hold the plan against but that a block is whole or split
            wanted = styles[name] or ("colwise or rowwise" if isinstance(module, nn.Linear) else REPLICATED)
        if styles[name] != wanted:
            block = _block(name)
            raise UserError(
                f"{key} leaves {block} whole, so what it says of {name} adds up whole gradients: leave that out"
                if wanted is None
                else f"{key} splits {block} and says {styles[name] or 'nothing'} of {name}: make it {wanted}, or leave"
                f" all of {block} out"
            )


def _one_layer(config: Any) -> Any:
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    return one


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern names modules of that name, ``*`` for the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", pattern) == name


def _role(plan: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in plan.items() if _covers(pattern, name)), None)


def apply_tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh, plan: Mapping[str, str]) -> frozenset[str]:
    """Split a model that is still on the meta device over ``mesh``; no communication. Before FSDP.

    Returns the names of the parameters that are whole on each rank and whose gradients the group must sum.
    """
    body, head = causal_lm_parts(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = _Inputs(mesh.get_group())
    styles: dict[str, ParallelStyle] = {}
    summed: set[str] = set()
    for name, module in body.named_modules():
        style = _style(plan, name)
        if style == REPLICATED:
            summed |= {names[id(parameter)] for parameter in module.parameters()}
        elif style is not None:
            styles[name] = _Columns(inputs) if style == "colwise" else _Rows(inputs)
    parallelize_module(body, mesh, styles)
    embedding = body.get_input_embeddings()  # type: ignore[operator]
    tied = head.weight is embedding.weight
    embedding.weight = _split(embedding.weight, mesh, 0)
    head.weight = embedding.weight if tied else _split(head.weight, mesh, 0)
    _look_up_over_ranks(embedding, mesh)
    return frozenset(summed)


def _style(plan: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in plan.items() if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _split(weight: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=None), weight.requires_grad)


def _local(parameter: Tensor | None) -> Tensor | None:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks of a group, each of which then computes the same: the gradient is every rank's own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumGradients(torch.autograd.Function):
    """What every rank has whole and uses in part: its gradient is the sum of the parts'."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Inputs:
    """Where the residual stream enters split matrices. Those that read one and the same tensor (q, k and v) share one
    entrance, so that their gradients are added up before they travel."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._last: tuple[Tensor, Tensor] | None = None

    def enter(self, whole: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not whole:
            self._last = whole, _SumGradients.apply(whole, self.group)  # type: ignore[no-untyped-call]
        return self._last[1]

    def forget(self) -> None:
        """Let go of the tensor: the matrices that share it are through."""
        self._last = None


class _Columns(ParallelStyle):
    """A linear layer whose outputs are spread over the ranks.

    The parameters are DTensors, which FSDP composes with its own shards. The arithmetic is local: DTensor's dispatch
    would take milliseconds for every new length of a pack.
    """

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear), type(module)
        module.weight = _split(module.weight, device_mesh, 0)
        if module.bias is not None:
            module.bias = _split(module.bias, device_mesh, 0)

        def forward(whole: Tensor) -> Tensor:
            weight = _local(module.weight)
            assert weight is not None
            return F.linear(self._inputs.enter(whole), weight, _local(module.bias))

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


class _Rows(ParallelStyle):
    """A linear layer whose inputs are spread over the ranks; its bias is whole and added once, after the sum."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear), type(module)
        module.weight = _split(module.weight, device_mesh, 1)

        def forward(part: Tensor) -> Tensor:
            self._inputs.forget()
            weight = _local(module.weight)
            assert weight is not None
            total: Tensor = _SumOverRanks.apply(F.linear(part, weight), self._inputs.group)  # type: ignore[no-untyped-call]
            return total if module.bias is None else total + module.bias

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


def _look_up_over_ranks(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Let an embedding whose rows are spread over ranks find a token's row wherever it is."""
    first = chunk_of(embedding.num_embeddings, mesh.size(), mesh.get_local_rank())[0]
    group = mesh.get_group()
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx - first

    def forward(ids: Tensor) -> Tensor:
        rows = _local(embedding.weight)
        assert rows is not None
        own = ids - first
        absent = (own < 0) | (own >= len(rows))
        # As in torch's own embedding, the padding row gets no gradient.
        ignored = padding if 0 <= padding < len(rows) else None
        found = F.embedding(own.masked_fill(absent, 0), rows, ignored).masked_fill(absent.unsqueeze(-1), 0.0)
        hidden: Tensor = _SumOverRanks.apply(found, group)  # type: ignore[no-untyped-call]
        scale = getattr(embedding, "embed_scale", None)  # Gemma's
        return hidden if scale is None else hidden * scale.to(hidden.dtype)

    embedding.forward = forward  # type: ignore[method-assign, assignment]
