"""Model shapes (layer sizes and parameter counts), and checks of a recipe against the shapes.

The checks are for sequence lengths and parallel sizes. No function reads weights.
"""

from __future__ import annotations

import logging
import os.path
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from distill.batching.flops import ModelSizes, sizes_of
from distill.config import Config
from distill.config.lora_rules import teacher_shares_base
from distill.errors import UserError, any_of, reason
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, one_layer_model

log = logging.getLogger(__name__)

QWEN3 = {
    "0.6": (1024, 28, 16, 3072, True),
    "1.7": (2048, 28, 16, 6144, True),
    "4": (2560, 36, 32, 9728, True),
    "8": (4096, 36, 32, 12288, False),
    "14": (5120, 40, 40, 17408, False),
    "32": (5120, 64, 64, 25600, False),
}
"""Maps the size of a published Qwen3 model, in billions of parameters, to its shape.

A shape is (hidden size, layers, query heads, intermediate size, whether the embeddings are tied). All models have 8
key-value heads of 128 channels. Forecasts use this table if the model's files are not on this machine.
"""


@dataclass(frozen=True)
class ModelShape(ModelSizes):
    """Sizes and numbers of parameters of a causal language model; all layers have the same shape."""

    name: str
    window: int
    """Maximum sequence length in tokens (``max_position_embeddings``)."""
    qk_norm: bool
    """Whether attention applies a norm to queries and keys."""
    embedding: int
    """Number of parameters of the token embedding."""
    head: int
    """Number of parameters of the LM head; 0 if the LM head is tied to the embedding."""
    layer: int
    """Number of parameters of one transformer layer."""
    rest: int
    """Number of parameters outside layers, embedding and LM head (the last norm)."""
    layer_tensors: tuple[tuple[int, ...], ...]
    """Shapes of the parameters of one transformer layer."""
    linear_layers: tuple[tuple[str, int, int], ...]
    """Name, outputs and inputs of each linear layer of a transformer layer; ``{}`` in a name is the layer's number."""

    @property
    def parameters(self) -> int:
        """Return the number of parameters of the model; a tied embedding and LM head are counted once."""
        return self.root + self.layers * self.layer

    @property
    def norms(self) -> int:
        """Return the number of norms of the hidden size in one layer: 2, or 4 for Gemma 3."""
        return self.layer_tensors.count((self.hidden,))

    @property
    def root(self) -> int:
        """Return the number of parameters in FSDP's root module: all parameters outside the layers."""
        return self.embedding + self.head + self.rest


def shard_sizes(shape: ModelShape, fsdp: int, tp: int = 1) -> list[int]:
    """Return the number of elements of each parameter's shard, on the rank with the largest shards.

    Tensor parallelism splits matrices over ``tp`` ranks, but not norms. FSDP splits the rows of every parameter over
    ``fsdp`` ranks.
    """
    root = [(shape.vocab, shape.hidden)] * (2 if shape.head else 1) + [(shape.hidden,)]
    return [
        -(-rows // fsdp) * prod(rest) // (tp if rest else 1)
        for rows, *rest in [*root, *shape.layer_tensors * shape.layers]
    ]


def shape_of(config: Any, name: str) -> ModelShape:
    """Return the shape of the model that the Hugging Face ``config`` describes.

    ``name`` is the name of the model in messages. Parameters are counted on a model with one layer on the meta device.
    Raises UserError if transformers cannot build the model.
    """
    text = config.get_text_config()
    try:
        model = one_layer_model(config)
    except Exception as error:  # transformers raises many types, for example for unknown activations
        raise UserError(
            f"transformers cannot build a model from the config.json of {name} ({reason(error)})",
            "correct the file, or download the model again",
            value=name,
        ) from error
    body, head = causal_lm_parts(model)
    (layer,) = body.layers  # type: ignore[misc]
    embedding = model.get_input_embeddings().weight.numel()
    own_head = 0 if head.weight is model.get_input_embeddings().weight else head.weight.numel()
    layer_parameters = sum(parameter.numel() for parameter in layer.parameters())
    return ModelShape(
        name=name,
        **sizes_of(text),
        window=text.max_position_embeddings,
        qk_norm=any(name.endswith("q_norm") for name, _ in layer.named_modules()),
        embedding=embedding,
        head=own_head,
        layer=layer_parameters,
        rest=sum(parameter.numel() for parameter in model.parameters()) - embedding - own_head - layer_parameters,
        layer_tensors=tuple(tuple(parameter.shape) for parameter in layer.parameters()),
        linear_layers=tuple(
            (f"{model.base_model_prefix}.layers.{{}}.{name}", module.out_features, module.in_features)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ),
    )


def find_shape(name: str, key: str) -> ModelShape | None:
    """Return the shape of the model ``name``, or None if ``find_config`` finds no such model.

    ``find_config`` searches local files and the table ``QWEN3``. ``key`` is the configuration key that contains the
    model's name; errors mention it.
    """
    config = find_config(name, key)
    return None if config is None else shape_of(config, name)


def find_config(name: str, key: str) -> Any:
    """Return the Hugging Face configuration of the model ``name``, or None if the model is not found.

    Uses no network. Searches the folder ``name``, the local cache of the Hugging Face hub, and the table ``QWEN3``.
    ``key``: the configuration key that contains the model's name; errors mention it. Raises UserError if the model is
    not supported.
    """
    folder = Path(name)
    if not os.path.isdir(folder):
        folder = _cached(name) or folder
    if (folder / "config.json").is_file():
        return model_config(ModelFiles(name, folder, {}), key)
    return _published(name)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid name of a hub model
        return None
    return Path(found).parent if isinstance(found, str) else None


def _published(name: str) -> Any:
    from transformers import Qwen3Config

    match = re.fullmatch(r"(?:.*/)?Qwen3-([\d.]+)B(-Base)?", name)
    if match is None or match[1] not in QWEN3:
        return None
    hidden, layers, heads, intermediate, tied = QWEN3[match[1]]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=32768 if match[2] else 40960,
    )


def check_shapes(config: Config, student: ModelShape | None, teacher: ModelShape | None) -> None:
    """Raise UserError if a model does not support the sequence length or the parallel sizes of the recipe.

    A model whose shape is None (unknown) is not checked. Logs a warning if the teacher is split over more ranks than
    teacher.dtensor_cfg sets. A teacher that is the student's module has the same parallel sizes.
    """
    for owner, shape, length in (
        ("policy", student, config.policy.max_total_sequence_length),
        ("teacher", teacher, config.teacher.max_total_sequence_length),
    ):
        if shape is not None and length > shape.window:
            key = f"{owner}.max_total_sequence_length"
            raise UserError(
                f"{key}={length} exceeds the {shape.window} positions (max_position_embeddings) of {shape.name}",
                f"set {key} to at most {shape.window}",
                key=key,
                value=length,
            )
    if student is not None:
        _check_student(config, student)
    if teacher_shares_base(config):
        return
    ours, theirs = group_size(config.policy.dtensor_cfg), group_size(config.teacher.dtensor_cfg)
    if 1 < theirs < ours:  # 1 is the default and needs no warning
        log.warning(
            "tensor_parallel_size * context_parallel_size is %d in teacher.dtensor_cfg, but %d in policy.dtensor_cfg:"
            " the teacher is also split over %d ranks, because it cannot be split over fewer ranks than the student",
            *(theirs, ours, ours),
        )
    if teacher is not None:
        _check_teacher(config, teacher)


def _check_student(config: Config, shape: ModelShape) -> None:
    """Raise UserError if the tensor- or context-parallel size of the recipe cannot split the student.

    Tensor parallelism splits attention heads and the MLP; context parallelism splits the heads of each tensor-parallel
    rank further.
    """
    parallel, ranks = config.policy.dtensor_cfg, config.cluster.num_nodes * config.cluster.gpus_per_node
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    parts = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "channels of the MLP (intermediate_size)": shape.intermediate,
    }
    for part, number in parts.items():
        if number % tp:
            fitting = [
                size for size in _divisors(config.cluster.gpus_per_node) if not any(n % size for n in parts.values())
            ]
            raise UserError(
                f"policy.dtensor_cfg.tensor_parallel_size={tp} does not divide the {number} {part} of {shape.name}",
                f"set policy.dtensor_cfg.tensor_parallel_size to {any_of(map(str, fitting))}",
                key="policy.dtensor_cfg.tensor_parallel_size",
                value=tp,
            )
    heads, kv_heads = shape.heads // tp, shape.kv_heads // tp
    if not _splits(heads, kv_heads, cp):
        fitting = [size for size in _divisors(ranks // tp) if _splits(heads, kv_heads, size)]
        raise UserError(
            f"policy.dtensor_cfg.context_parallel_size={cp} cannot be used with {shape.name}, because the {heads}"
            f" attention heads and {kv_heads} key-value heads of each rank (tensor_parallel_size={tp}) cannot be split"
            f" over {cp} ranks",
            f"set policy.dtensor_cfg.context_parallel_size to {any_of(map(str, fitting))}",
            key="policy.dtensor_cfg.context_parallel_size",
            value=cp,
        )


def _check_teacher(config: Config, shape: ModelShape) -> None:
    """Raise UserError if the teacher's attention heads cannot be split over the ranks of a teacher group.

    A teacher group is the set of ranks that compute the teacher together; see ``teacher_group``.
    """
    ranks, students = config.cluster.num_nodes * config.cluster.gpus_per_node, group_size(config.policy.dtensor_cfg)
    group = teacher_group(config)
    if not _splits(shape.heads, shape.kv_heads, group):
        fitting = [n for n in _divisors(ranks) if n % students == 0 and _splits(shape.heads, shape.kv_heads, n)]
        tp, cp = config.teacher.dtensor_cfg.tensor_parallel_size, config.teacher.dtensor_cfg.context_parallel_size
        raise UserError(
            f"the {shape.heads} attention heads and {shape.kv_heads} key-value heads of the teacher {shape.name} cannot"
            f" be split over {group} ranks (tensor_parallel_size * context_parallel_size is {tp} * {cp} in"
            f" teacher.dtensor_cfg and {students} in policy.dtensor_cfg, and the larger product is used)",
            f"set the two sizes in teacher.dtensor_cfg so that their product is {any_of(map(str, fitting))}"
            if fitting
            else "lower policy.dtensor_cfg.tensor_parallel_size or policy.dtensor_cfg.context_parallel_size, because"
            " the teacher is split over a multiple of the product of these two sizes",
            key="teacher.dtensor_cfg.context_parallel_size",
            value=cp,
        )


def group_size(parallel: Any) -> int:
    """Return the number of ranks that compute one micro-batch together.

    The number is tensor_parallel_size * context_parallel_size. ``parallel`` is the section ``policy.dtensor_cfg`` or
    ``teacher.dtensor_cfg``.
    """
    return int(parallel.tensor_parallel_size * parallel.context_parallel_size)


def teacher_group(config: Config) -> int:
    """Return the number of ranks over which the positions of a packed micro-batch of the teacher are split.

    The result is the larger of ``group_size`` of the teacher and ``group_size`` of the student. A teacher that is the
    student's module splits positions as the student does.
    """
    if teacher_shares_base(config):
        return config.policy.dtensor_cfg.context_parallel_size
    return max(group_size(config.policy.dtensor_cfg), group_size(config.teacher.dtensor_cfg))


def _splits(heads: int, kv_heads: int, size: int) -> bool:
    """Return whether the query heads and key-value heads of attention can be split over ``size`` ranks.

    ``heads`` is the number of query heads. If there are more ranks than key-value heads, the key-value heads are
    repeated.
    """
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
