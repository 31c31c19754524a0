"""Ways to break a model's config.json that transformers would accept, or would answer with another model."""

from __future__ import annotations

import json
from typing import Any

from tests.malformed.case import Case, Workshop, way

_ROTARY: list[Any] = [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "su", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    {"rope_type": ["linear"], "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 0, "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": "two", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": True, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": "1", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": "large"},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": None},
    "linear",
    ["linear", 2.0],
    7,
]


def _configured(shop: Workshop, **changes: Any) -> Case:
    """The working recipe with keys of the student's config.json set otherwise."""
    folder = shop.model()
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return shop.case("policy.model_name|config.json", f"policy.model_name={folder}", detail=f"{changes}"[:200])


@way
def _rotary_positions(shop: Workshop) -> Case:
    return _configured(shop, **{shop.rng.choice(["rope_parameters", "rope_scaling"]): shop.rng.choice(_ROTARY)})


@way
def _settings_of_another_kind_of_model(shop: Workshop) -> Case:
    changes: list[dict[str, Any]] = [
        {"is_causal": False},
        {"per_layer_config": {"0": {"intermediate_size": 64}}},
        {"layer_types": ["chunked_attention"] * 2},
        {"layer_types": "sliding_attention"},
        {"layer_types": ["full_attention"] * 7},
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0, "layer_types": None},
        {"use_sliding_window": True, "sliding_window": -4, "max_window_layers": 0, "layer_types": None},
        {"use_sliding_window": True, "sliding_window": "wide", "max_window_layers": 0, "layer_types": None},
    ]
    return _configured(shop, **shop.rng.choice(changes))


@way
def _an_untied_model_without_a_head(shop: Workshop) -> Case:
    return _configured(shop, tie_word_embeddings=False)  # the files hold the embedding only
