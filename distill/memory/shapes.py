"""A model by its numbers: what memory, tensor and context parallelism ask of it, before any of its weights is read."""

from __future__ import annotations

import logging
import os.path
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.errors import UserError, any_of, reason
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts
from distill.model.tensor_parallel import one_layer_model

log = logging.getLogger(__name__)

QWEN3 = {  # hidden width, layers, query heads, inner channels, tied; all have 8 key-value heads of 128 channels
    "0.6": (1024, 28, 16, 3072, True),
    "1.7": (2048, 28, 16, 6144, True),
    "4": (2560, 36, 32, 9728, True),
    "8": (4096, 36, 32, 12288, False),
    "14": (5120, 40, 40, 17408, False),
    "32": (5120, 64, 64, 25600, False),
}
"""The published shapes of Qwen3 by billions of parameters, for a plan made where the files are not."""


@dataclass(frozen=True)
class ModelShape:
    """Widths and parameter counts of a causal language model whose layers are alike."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    window: int
    """Positions that the model knows."""
    qk_norm: bool
    """Whether queries and keys are normalised."""
    embedding: int
    head: int
    """Parameters of the head; 0 where it is the embedding."""
    layer: int
    """Parameters of one layer."""
    rest: int
    """Parameters outside layers, embedding and head: the last norm."""

    @property
    def parameters(self) -> int:
        """All of them, a tied head once."""
        return self.root + self.layers * self.layer

    @property
    def root(self) -> int:
        """Parameters outside the layers: what FSDP gathers once a pass."""
        return self.embedding + self.head + self.rest


def shape_of(config: Any, name: str) -> ModelShape:
    """The shape that a Hugging Face configuration describes; its parameters are counted on a model of one layer.

    Raises UserError where no model can be built by it.
    """
    text = config.get_text_config()
    try:
        model = one_layer_model(config)
    except Exception as error:  # what transformers makes of an activation or a kind of positions that it doesn't know
        raise UserError(
            f"the config.json of {name} describes no model that can be built ({reason(error)}): download it again"
        ) from error
    body, head = causal_lm_parts(model)
    (layer,) = body.layers  # type: ignore[misc]
    embedding = model.get_input_embeddings().weight.numel()
    own_head = 0 if head.weight is model.get_input_embeddings().weight else head.weight.numel()
    of_layer = sum(parameter.numel() for parameter in layer.parameters())
    return ModelShape(
        name=name,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        vocab=text.vocab_size,
        window=text.max_position_embeddings,
        qk_norm=any(name.endswith("q_norm") for name, _ in layer.named_modules()),
        embedding=embedding,
        head=own_head,
        layer=of_layer,
        rest=sum(parameter.numel() for parameter in model.parameters()) - embedding - own_head - of_layer,
    )


def find_shape(name: str, key: str) -> ModelShape | None:
    """The shape of the model that ``key`` names, as ``find_config`` finds it; None where nothing knows it."""
    config = find_config(name, key)
    return None if config is None else shape_of(config, name)


def find_config(name: str, key: str) -> Any:
    """The configuration of the model that ``key`` names, without a network: from its folder or the hub's cache, else
    from the table of published shapes; None where all three don't know it. Raises UserError as ``model_config`` does.
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
    except ValueError:  # no name that the hub could have
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
    """Raise UserError where a window or the parallelism doesn't suit a model; None is a model that isn't known."""
    for owner, shape, length in (
        ("policy", student, config.policy.max_total_sequence_length),
        ("teacher", teacher, config.teacher.max_total_sequence_length),
    ):
        if shape is not None and length > shape.window:
            raise UserError(
                f"{owner}.max_total_sequence_length={length} exceeds the window of {shape.name}"
                f" ({shape.window}): set it to at most that"
            )
    ours, theirs = (group_size(config.policy.dtensor_cfg), group_size(config.teacher.dtensor_cfg))
    if 1 < theirs < ours:  # 1 asks for no group
        log.warning(
            "teacher.dtensor_cfg asks for groups of %d ranks and policy.dtensor_cfg for %d: the teacher reads in groups"
            " of %d too, as it reads the student's packs",
            *(theirs, ours, ours),
        )
    if student is not None:
        _check_student(config, student)
    if teacher is not None:
        _check_teacher(config, teacher)


def _check_student(config: Config, shape: ModelShape) -> None:
    """Tensor parallelism splits heads and inner channels, context parallelism what it leaves of the heads."""
    parallel, ranks = (config.policy.dtensor_cfg, config.cluster.num_nodes * config.cluster.gpus_per_node)
    tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
    parts = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "inner channels (intermediate_size)": shape.intermediate,
    }
    for part, number in parts.items():
        if number % tp:
            fitting = [
                size for size in _divisors(config.cluster.gpus_per_node) if not any(n % size for n in parts.values())
            ]
            raise UserError(
                f"policy.dtensor_cfg.tensor_parallel_size={tp} does not divide the {number} {part} of {shape.name}:"
                f" set it to {any_of(map(str, fitting))}"
            )
    heads, kv_heads = shape.heads // tp, shape.kv_heads // tp
    if not _splits(heads, kv_heads, cp):
        fitting = [size for size in _divisors(ranks // tp) if _splits(heads, kv_heads, size)]
        raise UserError(
            f"policy.dtensor_cfg.context_parallel_size={cp} can't split the {heads} attention and {kv_heads} key-value"
            f" heads that tensor_parallel_size={tp} leaves of {shape.name}: set it to {any_of(map(str, fitting))}"
        )


def _check_teacher(config: Config, shape: ModelShape) -> None:
    """A teacher's group shares positions, so that all of it splits the heads."""
    ranks, students = (config.cluster.num_nodes * config.cluster.gpus_per_node, group_size(config.policy.dtensor_cfg))
    group = teacher_group(config)
    if not _splits(shape.heads, shape.kv_heads, group):
        fitting = [n for n in _divisors(ranks) if n % students == 0 and _splits(shape.heads, shape.kv_heads, n)]
        remedy = (
            f"choose sizes whose product is {any_of(map(str, fitting))}"
            if fitting
            else "lower policy.dtensor_cfg.tensor_parallel_size and context_parallel_size, whose groups it contains"
        )
        raise UserError(
            f"teacher.dtensor_cfg.tensor_parallel_size={config.teacher.dtensor_cfg.tensor_parallel_size} and"
            f" context_parallel_size={config.teacher.dtensor_cfg.context_parallel_size} have {group} ranks read"
            f" together, which can't split the {shape.heads} attention and {shape.kv_heads} key-value heads of"
            f" {shape.name}: {remedy}"
        )


def group_size(parallel: Any) -> int:
    """Ranks that read the same tokens, by a ``dtensor_cfg``."""
    return int(parallel.tensor_parallel_size * parallel.context_parallel_size)


def teacher_group(config: Config) -> int:
    """Ranks that share the positions of a teacher's pack: the student's group, or more where the recipe asks for it."""
    return max(group_size(config.policy.dtensor_cfg), group_size(config.teacher.dtensor_cfg))


def _splits(heads: int, kv_heads: int, size: int) -> bool:
    """Whether ``size`` ranks can exchange positions for heads: key-value heads are shared out, or each one repeated."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
