"""Tensor parallelism of a Hugging Face model, following the plan that its class ships.

Embedding and head are split by vocabulary. Every rank of the group has the complete residual stream, so modules that
act on it alone (the norms between blocks) have the same outputs and gradients on every rank, except for the order of
floating-point sums.
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
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from transformers import PreTrainedModel

from distill.config import Config
from distill.errors import UserError
from distill.loss.checks import check_part
from distill.model.dtensor import local_shard
from distill.model.hf_load import causal_lm_parts, chunk_of, meta_model

REPLICATED = "replicated_with_grad_allreduce"
"""Style of weights that every rank has completely but applies to its own heads only: their gradients are summed."""
STYLES = ("colwise", "rowwise", REPLICATED)
_BY_VOCABULARY = ("embed_tokens", "lm_head")
"""Always split by vocabulary, as the loss needs it; a plan's entries for them are ignored."""
_PLAN = "policy.dtensor_cfg.custom_parallel_plan"
_SIZE = "policy.dtensor_cfg.tensor_parallel_size"


def check_tensor_parallel(config: Config, model: Any, vocab: int) -> None:
    """Raise UserError if the student does not support the recipe's tensor parallelism; reads no weights.

    Checks the plan, and that no rank's part of the vocabulary is padding only. ``model``: the student's Hugging Face
    configuration; ``vocab``: number of ids that have a token.
    """
    parallel = config.policy.dtensor_cfg
    if parallel.tensor_parallel_size > 1:
        check_plan(model, parallel.custom_parallel_plan, config.policy.model_name)
        check_part(model.vocab_size, parallel.tensor_parallel_size, vocab, teacher_rows=False)


def check_plan(config: Any, custom: Mapping[str, str] | None, name: str) -> dict[str, str]:
    """Return module pattern -> style from the recipe's plan or, without one, from the model class.

    Raises UserError if there is no plan, a style is unknown, or a pattern matches no linear layer. Also if a plan
    splits a block but omits some of its weights: their gradients would lack the other ranks' heads.
    """
    given = custom or getattr(config, "base_model_tp_plan", None) or {}
    plan = {pattern: style for pattern, style in given.items() if pattern not in _BY_VOCABULARY}
    if not plan:
        raise UserError(
            f"{_SIZE} is above 1, but transformers has no tensor-parallel plan for {name} of type {config.model_type}",
            f"set a plan in {_PLAN}, or set {_SIZE}=1",
            key=_SIZE,
        )
    for pattern, style in plan.items():
        if style not in STYLES:
            source = _PLAN if custom else f"the tensor-parallel plan of type {config.model_type}"
            raise UserError(
                f"{source} has the unsupported style {style} for {pattern}",
                f"set {_PLAN} with the styles {', '.join(STYLES)}, or set {_SIZE}=1",
                key=_PLAN if custom else _SIZE,
                value=style,
            )
    _check_modules(config, plan)
    return plan


def _check_modules(config: Any, plan: Mapping[str, str]) -> None:
    body, _ = causal_lm_parts(one_layer_model(config))
    modules = {re.sub(r"\.\d+\.", ".*.", name): module for name, module in body.named_modules()}
    for pattern, style in plan.items():
        found = [module for name, module in modules.items() if _covers(pattern, name)]
        if not found or (style != REPLICATED and not all(isinstance(module, nn.Linear) for module in found)):
            raise UserError(
                f"{_PLAN} has {pattern}: {style}, which matches {'no linear layer' if found else 'no module'} of"
                f" {config.model_type}",
                "name linear layers by their path inside the body, such as layers.*.mlp.up_proj",
                key=_PLAN,
                value=pattern,
            )
    # Compare with the family's own plan: a block that is split at all must be split as the family splits it.
    styles = {name: _role(plan, name) for name in modules}
    own = {name: _role(getattr(config, "base_model_tp_plan", None) or {}, name) for name in modules}
    split = {_block(name) for name, style in styles.items() if style in ("colwise", "rowwise")}
    for name, module in modules.items():
        if not any(True for _ in module.parameters(recurse=False)) or name in _BY_VOCABULARY:
            continue
        wanted = (own[name] or REPLICATED) if _block(name) in split else None
        if wanted and not any(own.values()):  # no plan to compare with: check only that a block is split completely
            wanted = styles[name] or ("colwise or rowwise" if isinstance(module, nn.Linear) else REPLICATED)
        if styles[name] != wanted:
            raise _wrong_style(name, styles[name], wanted)


def _wrong_style(name: str, style: str | None, wanted: str | None) -> UserError:
    block = _block(name)
    if wanted is None:
        problem = f"{_PLAN} does not split {block}, but has {name}: {style}, which would sum complete gradients"
        return UserError(problem, f"remove {name}", key=_PLAN, value=name)
    problem = f"{_PLAN} splits {block}, but has {f'{name}: {style}' if style else f'no entry for {name}'}"
    return UserError(problem, f"set {name}: {wanted}, or remove all of {block}", key=_PLAN, value=name)


def one_layer_model(config: Any) -> PreTrainedModel:
    """Return the model that ``config`` describes, with one layer, on the meta device (shapes only)."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return meta_model(config, "eager", torch.float32)


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def _covers(pattern: str, name: str) -> bool:
    """Return whether the pattern matches ``name``; ``*`` is the layer number."""
    return re.sub(r"\.\d+\.", ".*.", pattern) == name


def _role(plan: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in plan.items() if _covers(pattern, name)), None)


def apply_tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh, plan: Mapping[str, str]) -> frozenset[str]:
    """Split a model on the meta device over ``mesh``, before FSDP; not collective.

    Returns the names of the parameters that every rank has completely and whose gradients the group must sum.
    """
    body, head = causal_lm_parts(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = _SharedInput(mesh.get_group())
    styles: dict[str, ParallelStyle] = {}
    summed: set[str] = set()
    for name, module in body.named_modules():
        style = _style(plan, name)
        if style == REPLICATED:
            summed |= {names[id(parameter)] for parameter in module.parameters()}
        elif style is not None:
            styles[name] = _Columns(inputs) if style == "colwise" else _Rows(inputs)
    parallelize_module(body, mesh, styles)
    # Splitting replaces the parameters, so a tied head must be tied to the new one.
    embedding = body.get_input_embeddings()  # type: ignore[operator]
    tied = head.weight is embedding.weight
    embedding.weight = _split(embedding.weight, mesh, 0)
    head.weight = embedding.weight if tied else _split(head.weight, mesh, 0)
    _split_lookup(embedding, mesh)
    return frozenset(summed)


def _style(plan: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in plan.items() if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _split(weight: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=None), weight.requires_grad)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in the forward, identity in the backward.

    Every rank computes the same from the sum, so every rank already has its complete gradient.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumGradients(torch.autograd.Function):
    """Identity in the forward, all-reduce in the backward.

    Each rank used the input for its part of the outputs, so the complete gradient is the sum.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SharedInput:
    """The residual stream as input of column-split layers.

    Layers that read the same tensor (q, k and v) share one autograd node. Their gradients are then added before the
    all-reduce, which runs once.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._last: tuple[Tensor, Tensor] | None = None

    def get(self, hidden: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not hidden:
            self._last = hidden, _SumGradients.apply(hidden, self.group)  # type: ignore[no-untyped-call]
        return self._last[1]

    def clear(self) -> None:
        """Drop the reference to the tensor, after the last layer that reads it."""
        self._last = None


class _Columns(ParallelStyle):
    """A linear layer whose outputs are split over the ranks.

    The parameters are DTensors, so that FSDP can shard them again. The matrix product uses the local tensors: DTensor's
    dispatch would take milliseconds for every new pack length.
    """

    def __init__(self, inputs: _SharedInput) -> None:
        self._inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear), type(module)
        module.weight = _split(module.weight, device_mesh, 0)
        if module.bias is not None:
            module.bias = _split(module.bias, device_mesh, 0)

        def forward(hidden: Tensor) -> Tensor:
            bias = None if module.bias is None else local_shard(module.bias)
            return F.linear(self._inputs.get(hidden), local_shard(module.weight), bias)

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


class _Rows(ParallelStyle):
    """A linear layer whose inputs are split over the ranks; the complete bias is added after the sum."""

    def __init__(self, inputs: _SharedInput) -> None:
        self._inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear), type(module)
        module.weight = _split(module.weight, device_mesh, 1)

        def forward(part: Tensor) -> Tensor:
            self._inputs.clear()
            product = F.linear(part, local_shard(module.weight))
            total: Tensor = _SumOverRanks.apply(product, self._inputs.group)  # type: ignore[no-untyped-call]
            return total if module.bias is None else total + module.bias

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


def _split_lookup(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Replace the forward of an embedding whose rows are split over the ranks.

    Each rank looks up its own rows, and the results are summed.
    """
    first = chunk_of(embedding.num_embeddings, mesh.size(), mesh.get_local_rank())[0]
    group = mesh.get_group()
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx - first

    def forward(ids: Tensor) -> Tensor:
        rows = local_shard(embedding.weight)
        own = ids - first
        absent = (own < 0) | (own >= len(rows))
        # As in torch's embedding, the padding row gets no gradient.
        ignored = padding if 0 <= padding < len(rows) else None
        found = F.embedding(own.masked_fill(absent, 0), rows, ignored).masked_fill(absent.unsqueeze(-1), 0.0)
        hidden: Tensor = _SumOverRanks.apply(found, group)  # type: ignore[no-untyped-call]
        scale = getattr(embedding, "embed_scale", None)  # Gemma's
        return hidden if scale is None else hidden * scale.to(hidden.dtype)

    embedding.forward = forward  # type: ignore[method-assign, assignment]
