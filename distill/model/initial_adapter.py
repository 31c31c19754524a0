"""Start training from the adapter folder policy.dtensor_cfg.lora_cfg.init_from."""

from __future__ import annotations

import logging
from typing import Any

import torch

from distill.config import Config
from distill.config.lora_rules import KEY
from distill.distributed.world import World
from distill.model.hf_load import load_weights
from distill.model.lora import adapted_layers, linear_layers
from distill.model.model_card import public_name
from distill.model.peft_files import StoredAdapter, check_adapter, read_adapter
from distill.model.student import Student

log = logging.getLogger(__name__)

_INIT_KEY = f"{KEY}.init_from"


def initial_adapter(config: Config, model: Any) -> StoredAdapter | None:
    """Return the adapter with which the recipe starts, after checks that read no tensor; None without one.

    ``model``: the student's Hugging Face configuration. Raises UserError if the folder does not contain exactly the
    adapters that the recipe trains.
    """
    lora = config.policy.dtensor_cfg.lora_cfg
    if not lora.enabled or lora.init_from is None:
        return None
    shapes = {}
    for name, (outputs, inputs) in adapted_layers(lora, model).items():
        shapes[f"{name}.lora_A"] = torch.Size((lora.dim, inputs))
        shapes[f"{name}.lora_B"] = torch.Size((outputs, lora.dim))
    adapter = read_adapter(lora.init_from, _INIT_KEY)
    all_layers = [f"{name}.weight" for name in linear_layers(model)]
    check_adapter(adapter, config.policy, shapes, all_layers, _INIT_KEY)
    return adapter


def load_adapter(adapter: StoredAdapter, student: Student, world: World) -> None:
    """Replace the values of the student's adapters by those of ``adapter``; collective.

    Call it before the teacher is built, which may copy the adapters. Logs a warning if the adapter seems
    to be trained on another base model. Raises UserError on all ranks if values are not finite or cannot be read.
    """
    name = adapter.files.name
    with world.all_or_none(f"loading the adapter {name}"):
        load_weights(student.model.named_trained(), adapter.files, _INIT_KEY)
    assert student.base is not None, "an adapter is only loaded if adapters are trained"
    log.info("the adapters start with the values of %s", name)
    _warn_if_other_base(adapter, student.base)


def _warn_if_other_base(adapter: StoredAdapter, base: dict[str, Any]) -> None:
    """Log a warning if an adapter was trained on another base model; compare the names if it has no checksums."""
    common = adapter.base_checksum.keys() & base["checksum"].keys()
    differs = any(adapter.base_checksum[dtype] != base["checksum"][dtype] for dtype in common)
    names = [public_name(each).rpartition("/")[2] for each in (adapter.base, base["model_name"])]
    if differs:
        problem = "its base model has other weights than"
    elif adapter.base and not common and names[0] != names[1]:
        problem = f"its base model is called {adapter.base}, and the weights cannot be compared with those of"
    else:
        return
    log.warning(
        "%s=%s: %s policy.model_name=%s: check that the adapter fits this model",
        *(_INIT_KEY, adapter.files.name, problem, base["model_name"]),
    )
