"""Read and write adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import os.path
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.config import PolicyConfig
from distill.config.lora_rules import KEY
from distill.errors import MissingError
from distill.hub import is_hub_name
from distill.model.hf_files import FLOAT_TYPES, ModelFiles
from distill.model.hf_index import ModelSetting, StoredTensor, json_object, tensor_headers

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_CHECKPOINT = "training_info.json"
"""File that each checkpoint of this program contains."""
_PREFIX, _SUFFIX = "base_model.model.", ".weight"
_BASE = "base_checksum.json"
"""File with the checksums of the base model's weights; PEFT ignores it."""
_UNSUPPORTED = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config"),
    *("layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"),
)
"""Keys of adapter_config.json that change what an adapter computes; they must be false, null or empty."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model unchanged; others, such as pissa, change its weights."""


def adapter_config(
    recipe: Mapping[str, Any], adapters: Collection[str], base: Collection[str], base_info: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    ``recipe``: the configuration as nested dictionaries. ``adapters``: names of the adapter parameters, such as
    model.layers.0.self_attn.q_proj.lora_A. ``base``: names of the base model's parameters; ``base_info``: its name and
    revision, as ``frozen_base`` returns them.
    """
    lora = recipe["policy"]["dtensor_cfg"]["lora_cfg"]
    alpha = float(lora["alpha"])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_info["model_name"],
        "revision": base_info.get("revision"),  # older checkpoints lack it
        "r": lora["dim"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules(adapters, base),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def target_modules(adapters: Collection[str], base: Collection[str]) -> list[str]:
    """Return the shortest names that select the modules of ``adapters`` in PEFT, and no other module.

    The name is the last part of the module's name, such as q_proj, if all modules with this last part have adapters;
    otherwise the complete name. ``base``: names of the base model's parameters.
    """
    selected = {name.rpartition(".")[0] for name in adapters}
    others = {name.rpartition(".")[0].rpartition(".")[2] for name in base if name.rpartition(".")[0] not in selected}
    last_parts = {module: module.rpartition(".")[2] for module in sorted(selected)}
    return sorted({module if last in others else last for module, last in last_parts.items()})


def write_adapter(
    folder: Path, adapters: Mapping[str, Tensor], files: Mapping[str, bytes], base_checksum: Mapping[str, str]
) -> None:
    """Write a folder that PEFT and vLLM load; not collective.

    ``adapters`` maps names to complete tensors. ``files`` maps the path of each other file, among them
    adapter_config.json, to its content. ``base_checksum``: checksums of the base model's weights, which
    ``lora_cfg.init_from`` compares.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}{_SUFFIX}": tensor for name, tensor in adapters.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    checksum = json.dumps(dict(base_checksum), indent=2) + "\n"
    for name, content in {**files, _BASE: checksum.encode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    # safetensors ignores the umask and uses mode 0600
    (folder / ADAPTER_WEIGHTS).chmod(stat.S_IMODE((folder / ADAPTER_CONFIG).stat().st_mode))


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder, with the headers of its tensors; the tensors are read later."""

    files: ModelFiles
    """The tensors, by the name of the parameter, such as model.layers.0.self_attn.q_proj.lora_A."""
    rank: int
    scale: float
    """Factor of the product of B and A."""
    base: str
    """Name of the base model in adapter_config.json; "" if it is not recorded."""
    base_checksum: Mapping[str, str]
    """Checksums of the base model's weights; empty if the folder was not written by this program."""


def read_adapter(name: str, key: str) -> StoredAdapter:
    """Read adapter_config.json and the tensor headers of the adapter folder ``name``.

    ``key``: the configuration key that names the folder. Raises UserError if the folder is missing or damaged, or if
    the adapter computes something else than ``scale * B (A x)``.
    """
    setting, folder = ModelSetting(key, name), Path(name)
    if not (os.path.isdir(name) and (folder / ADAPTER_CONFIG).is_file()):
        fix = "set it to the folder of an adapter of PEFT"
        if (folder / "peft" / ADAPTER_CONFIG).is_file():
            fix = f"set it to {folder / 'peft'}"
        elif (folder / _CHECKPOINT).is_file():
            fix = f"export the checkpoint with python -m scripts.export_hf {folder} OUT, and set it to OUT"
        if not os.path.exists(name) and is_hub_name(name):
            fix = f"download the adapter with `hf download {name} --local-dir FOLDER`, and set it to this folder"
        raise setting.error(f"is not a folder with {ADAPTER_CONFIG}", fix, MissingError)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        found = f" but {_PICKLED}, which can execute code" if (folder / _PICKLED).is_file() else ""
        raise setting.error(
            f"has no {ADAPTER_WEIGHTS}{found}", "save the adapter with save_pretrained of PEFT, in safetensors"
        )
    config = json_object(folder / ADAPTER_CONFIG, setting)
    _check_config(config, setting)
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = _by_parameter(tensor_headers(folder / ADAPTER_WEIGHTS, setting), setting)
    base = config.get("base_model_name_or_path") or ""
    checksum = json_object(folder / _BASE, setting) if (folder / _BASE).is_file() else {}
    return StoredAdapter(ModelFiles(name, folder, tensors), rank, scale, base, checksum)


def _check_config(config: Mapping[str, Any], setting: ModelSetting) -> None:
    """Raise UserError if an adapter is no plain LoRA adapter."""
    fix = "choose a LoRA adapter without this setting"
    expected = {"peft_type": "LORA", "bias": "none"}
    wrong = [name for name, value in expected.items() if config.get(name, value) != value]
    wrong += [name for name in _UNSUPPORTED if config.get(name)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        wrong.append("init_lora_weights")
        fix = "convert the adapter with path_initial_model_for_weight_conversion of PEFT"
    if wrong:
        value = json.dumps(config.get(wrong[0]))
        raise setting.error(f"has {wrong[0]}={value} in {ADAPTER_CONFIG}, which is not supported", fix)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0):
        raise setting.error(f"has no positive r and lora_alpha in {ADAPTER_CONFIG}", "save the adapter again")


def _by_parameter(headers: Iterable[StoredTensor], setting: ModelSetting) -> dict[str, StoredTensor]:
    """Return the headers by the names of our parameters; raise UserError for a tensor that is no adapter."""
    tensors = {}
    for stored in headers:
        name = stored.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if f"{_PREFIX}{name}{_SUFFIX}" != stored.name or name.rpartition(".")[2] not in ("lora_A", "lora_B"):
            problem = f"has the tensor {stored.name} in {ADAPTER_WEIGHTS}, which is no adapter of a linear layer"
            raise setting.error(problem, "choose an adapter of linear layers only")
        if stored.dtype not in FLOAT_TYPES:
            problem = f"has the tensor {stored.name} in the unsupported element type {stored.dtype}"
            raise setting.error(problem, "save the adapter in float32 or bfloat16")
        tensors[name] = stored
    for name in tensors:
        other = f"{name[:-1]}{'A' if name.endswith('B') else 'B'}"
        if other not in tensors:
            raise setting.error(f"lacks the tensor {_PREFIX}{other}{_SUFFIX}", "save the adapter again")
    return tensors


def check_adapter(
    adapter: StoredAdapter, policy: PolicyConfig, shapes: Mapping[str, torch.Size], layers: Collection[str], key: str
) -> None:
    """Raise UserError if an adapter differs from the adapters of the recipe in rank, scale, modules or shapes.

    ``policy``: the student's section of the recipe. ``shapes`` maps the name of each adapter parameter of the recipe to
    its shape. ``layers``: names of the weights of all layers that can have adapters. ``key``: the key ``init_from``.
    """
    setting, lora = ModelSetting(key, adapter.files.name), policy.dtensor_cfg.lora_cfg
    if adapter.rank != lora.dim:
        problem = f"has r={adapter.rank} in {ADAPTER_CONFIG}, but {KEY}.dim={lora.dim}"
        raise setting.error(problem, f"set {KEY}.dim={adapter.rank}")
    if not math.isclose(adapter.scale, lora.alpha / lora.dim, rel_tol=1e-6):
        problem = (
            f"scales its adapters by {adapter.scale:g} (lora_alpha and r in {ADAPTER_CONFIG}), but"
            f" {KEY}.alpha / dim is {lora.alpha / lora.dim:g}"
        )
        raise setting.error(problem, f"set {KEY}.alpha={adapter.scale * lora.dim:g}")
    stored = adapter.files.tensors
    if different := sorted(stored.keys() ^ shapes.keys()):
        place = "does not select" if different[0] in stored else "also selects"
        modules = target_modules(stored, layers)
        raise setting.error(
            f"has adapters of other modules than the recipe, which {place} {different[0].rpartition('.')[0]}",
            f"set {KEY}.target_modules={json.dumps(modules)}" + " and exclude_modules=[]" * bool(lora.exclude_modules),
        )
    for name, shape in shapes.items():
        if stored[name].shape != tuple(shape):
            raise setting.error(
                f"has the tensor {stored[name].name} with the shape {stored[name].shape} instead of {tuple(shape)}",
                f"choose an adapter of {policy.model_name}",
            )
