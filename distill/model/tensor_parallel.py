"""Tensor parallelism of a Hugging Face model, based on the plan of its model class.

A plan maps patterns of module names to styles, which are listed in ``STYLES``. Embedding and LM head are split by
vocabulary. Every rank of the tensor-parallel group has the complete residual stream, so the norms between blocks have
the same outputs and gradients on every rank, except for rounding.
"""

from __future__ import annotations

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
from distill.loss.checks import check_vocab_parallel
from distill.model.dtensor import local_shard
from distill.model.hf_load import causal_lm_parts, chunk_of, one_layer_model
from distill.model.lora import has_adapter, linear

REPLICATED = "replicated_with_grad_allreduce"
"""Style of a module with replicated weights whose gradients must be summed over the ranks.

Each rank applies such a weight (Qwen3's q_norm, for example) to its own attention heads only.
"""
STYLES = ("colwise", "rowwise", REPLICATED)
"""Supported styles: split by outputs, split by inputs, and replicated with summed gradients."""
_ROLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "colwise"),
    **dict.fromkeys(("o_proj", "down_proj"), "rowwise"),
    **dict.fromkeys(("q_norm", "k_norm"), REPLICATED),
}
"""The only correct style of each module that a plan may have; all other modules compute the same on every rank.

q, k, v, gate and up read the complete hidden states and split their outputs. o and down read these parts.
"""
_BY_VOCABULARY = {
    "embed_tokens": ("rowwise", "embedding_rowwise"),
    "lm_head": ("colwise", "colwise_rep", "colwise_gather_output"),
}
"""Modules that are always split by vocabulary, because the loss requires it, and the styles that mean this split."""
_PLAN = "policy.dtensor_cfg.custom_parallel_plan"
_SIZE = "policy.dtensor_cfg.tensor_parallel_size"


def check_tensor_parallel(config: Config, model: Any, vocab: int) -> None:
    """Raise UserError if the student does not support the configured tensor parallelism.

    Checks the tensor-parallel plan, and that every rank's part of the vocabulary has at least one token. Reads no
    weights. ``model``: the student's Hugging Face configuration; ``vocab``: number of token ids, without the padding of
    the vocabulary.
    """
    parallel = config.policy.dtensor_cfg
    if parallel.tensor_parallel_size > 1:
        check_plan(model, parallel.custom_parallel_plan, config.policy.model_name)
        check_vocab_parallel(model.vocab_size, parallel.tensor_parallel_size, vocab)


def check_plan(config: Any, custom: Mapping[str, str] | None, name: str) -> dict[str, str]:
    """Return the tensor-parallel plan (module pattern -> style) of the recipe or the model class.

    ``config``: the model's Hugging Face configuration. ``custom``: the recipe's plan; None: use the plan of the model
    class. ``name``: the model's name for error messages. Raises UserError if no plan exists, a style is not supported,
    a pattern matches no module, or a module has another style than its role requires. Also raises UserError if a plan
    splits a block (attention or MLP) of any layer but omits some of the block's weights, because the gradients of these
    weights would be incomplete.
    """
    given = custom or getattr(config, "base_model_tp_plan", None) or {}
    plan = {pattern: style for pattern, style in given.items() if pattern not in _BY_VOCABULARY}
    if not plan:
        raise UserError(
            f"{_SIZE} is above 1, but transformers has no tensor-parallel plan for the model {name}"
            f" (model_type={config.model_type})",
            f"set a plan in {_PLAN}, or set {_SIZE}=1",
            key=_SIZE,
        )
    for module, styles in _BY_VOCABULARY.items():
        if custom and custom.get(module, styles[0]) not in styles:
            raise UserError(
                f"{_PLAN} has {module}: {custom[module]}, but {module} is always split by vocabulary",
                f"remove the entry {module}, or set {module}: {styles[0]}",
                key=_PLAN,
                value=module,
            )
    for pattern, style in plan.items():
        if style not in STYLES:
            source = _PLAN if custom else f"transformers' tensor-parallel plan for model_type={config.model_type}"
            raise UserError(
                f"{source} has the unsupported style {style} for the modules {pattern}",
                f"set {_PLAN} to a plan that uses only the styles {', '.join(STYLES)}, or set {_SIZE}=1",
                key=_PLAN if custom else _SIZE,
                value=style,
            )
    _check_modules(config, plan)
    return plan


def _check_modules(config: Any, plan: Mapping[str, str]) -> None:
    modules = _modules(config, plan)
    for pattern, style in plan.items():
        found = {name: module for name, module in modules.items() if _matches(pattern, name)}
        if not found or (style != REPLICATED and not all(isinstance(module, nn.Linear) for module in found.values())):
            raise UserError(
                f"{_PLAN} has {pattern}: {style}, which matches {'no linear layer' if found else 'no module'} of"
                f" {config.model_type}",
                "give the path of linear layers inside the model's body, such as layers.*.mlp.up_proj",
                key=_PLAN,
                value=pattern,
            )
        for name in found:
            if style != role_of(name):
                raise _wrong_style(pattern, style, name)
    styles = {name: _style(plan, name) for name in modules}
    split = {_block(name) for name, style in styles.items() if style in ("colwise", "rowwise")}
    for name, module in modules.items():
        has_weights = any(True for _ in module.parameters(recurse=False))
        if has_weights and (styles[name] is not None) != (_block(name) in split):
            raise _incomplete_block(name, styles[name])


def _modules(config: Any, plan: Mapping[str, str]) -> dict[str, nn.Module]:
    """Return the modules of the layers that ``plan`` mentions by number, and of one other layer, by full name.

    All layers have the same modules. Names of the other layer have ``*`` instead of the layer's number.
    """
    count = config.get_text_config().num_hidden_layers
    mentioned = {int(part) for pattern in plan for part in pattern.split(".") if part.isdigit()} & set(range(count))
    layers = [*map(str, sorted(mentioned)), *(["*"] if len(mentioned) < count else [])]
    body, _ = causal_lm_parts(one_layer_model(config))
    return {re.sub(r"\.0\.", f".{layer}.", name): module for layer in layers for name, module in body.named_modules()}


def role_of(name: str) -> str | None:
    """Return the style of the module ``name`` in every plan that splits it; None if no plan may split it."""
    return _ROLES.get(name.rpartition(".")[2])


def _wrong_style(pattern: str, style: str, name: str) -> UserError:
    role = role_of(name)
    problem = f"{_PLAN} has {pattern}: {style}, but {name} must " + (
        f"be {role}" if role else "stay complete on every rank: its inputs are not split, and its gradient is complete"
    )
    fix = f"set {pattern}: {role}" if role else f"remove the entry {pattern}"
    return UserError(problem, fix, key=_PLAN, value=pattern)


def _incomplete_block(name: str, style: str | None) -> UserError:
    block, role = _block(name), role_of(name)
    if style is not None:
        problem = f"{_PLAN} has {name}: {style}, but splits no linear layer of {block}, so gradients would be wrong"
        return UserError(problem, f"remove the entry {name}", key=_PLAN, value=name)
    add = f"set {name}: {role}, or " if role else ""
    problem = f"{_PLAN} splits {block}, but has no entry for {name}"
    return UserError(problem, f"{add}remove all entries of {block}", key=_PLAN, value=name)


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def apply_tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh, plan: Mapping[str, str]) -> frozenset[str]:
    """Split a model on the meta device over ``mesh``; call it before FSDP. Not collective.

    ``plan``: module name pattern -> style. Returns the names of the replicated parameters whose gradients must be
    summed over the tensor-parallel group.
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
            if has_adapter(module):
                replicated: Any = module.lora_A if style == "colwise" else module.lora_B
                summed.add(names[id(replicated)])
    parallelize_module(body, mesh, styles)
    # Splitting replaces the parameter of the embedding, so a tied head must be tied to the new parameter.
    embedding = body.get_input_embeddings()  # type: ignore[operator]
    tied = head.weight is embedding.weight
    embedding.weight = _split(embedding.weight, mesh, 0)
    head.weight = embedding.weight if tied else _split(head.weight, mesh, 0)
    _split_lookup(embedding, mesh)
    return frozenset(summed)


def _style(plan: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in plan.items() if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` covers the module ``name``; ``*`` matches a layer's number, or ``*`` in a name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+|\*)"), name) is not None


def _split(weight: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=None), weight.requires_grad)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in the forward, identity in the backward.

    All ranks compute the same values from the sum, so each rank already has the complete gradient of the sum.
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

    Each rank computes a part of the outputs from the input, so the input's gradient is the sum over the ranks.
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
    """Input tensor of several linear layers with split outputs (q, k and v, for example).

    The layers share one autograd node, which adds their gradients before a single all-reduce.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._last: tuple[Tensor, Tensor] | None = None

    def get(self, hidden: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not hidden:
            self._last = hidden, _SumGradients.apply(hidden, self.group)  # type: ignore[no-untyped-call]
        return self._last[1]

    def clear(self) -> None:
        """Drop the reference to the input tensor; call it after the last layer that reads the tensor."""
        self._last = None


class _Columns(ParallelStyle):
    """Tensor-parallel style of a linear layer: its outputs are split over the ranks.

    The parameters are DTensors, so that FSDP can shard them further. The matrix product uses the local tensors, because
    DTensor's dispatch takes milliseconds for every new length of a packed micro-batch. Of an adapter, B is split.
    """

    def __init__(self, inputs: _SharedInput) -> None:
        self._inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear), type(module)
        module.weight = _split(module.weight, device_mesh, 0)
        if module.bias is not None:
            module.bias = _split(module.bias, device_mesh, 0)
        if has_adapter(module):
            module.lora_B = _split(module.lora_B, device_mesh, 0)  # type: ignore[arg-type]

        def forward(hidden: Tensor) -> Tensor:
            bias = None if module.bias is None else local_shard(module.bias)
            return linear(module, self._inputs.get(hidden), bias)

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


class _Rows(ParallelStyle):
    """Tensor-parallel style of a linear layer: its inputs are split over the ranks.

    An all-reduce sums the products of all ranks; the bias is added afterwards. Of an adapter, A is split.
    """

    def __init__(self, inputs: _SharedInput) -> None:
        self._inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear), type(module)
        module.weight = _split(module.weight, device_mesh, 1)
        if has_adapter(module):
            module.lora_A = _split(module.lora_A, device_mesh, 1)  # type: ignore[arg-type]

        def forward(part: Tensor) -> Tensor:
            self._inputs.clear()
            product = linear(module, part)
            total: Tensor = _SumOverRanks.apply(product, self._inputs.group)  # type: ignore[no-untyped-call]
            return total if module.bias is None else total + module.bias

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


def _split_lookup(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Replace the forward of an embedding that is split by vocabulary over the ranks.

    Each rank looks up the token ids in its part of the vocabulary and uses zeros for all other ids. An all-reduce adds
    the results of all ranks.
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
        scale = getattr(embedding, "embed_scale", None)  # only Gemma's embedding has a scale
        return hidden if scale is None else hidden * scale.to(hidden.dtype)

    embedding.forward = forward  # type: ignore[method-assign, assignment]
