"""Edit the JSON files of exported models for transformers 4, transformers 5 and vLLM.

In this module, "version 4" and "version 5" are versions of transformers. Version 4 reads the keys ``rope_theta``,
``rope_scaling`` and ``rope_local_base_freq`` of config.json. Version 5 writes ``rope_parameters`` instead, but also
reads the keys of version 4. The public functions return new dictionaries and keep the keys that they do not edit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.model.hf_config import rotary_factor, without_ignored_settings

log = logging.getLogger(__name__)

Json = dict[str, Any]

_QUANTIZATION = ("quantization_config", "compression_config")
_CODE, _FROM_CONFIG = "auto_map", "_from_model_config"
_READ_BY_BOTH = "PreTrainedTokenizerFast"
"""Tokenizer class that loads tokenizer.json unchanged in both transformers 4 and transformers 5.

In version 4 the tokenizer also returns token_type_ids, unless model_input_names in tokenizer_config.json omits them.
"""
_CLASSES = {
    "llama": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma3_text": "GemmaTokenizer",
}
"""Maps a model type to transformers 4's tokenizer class if tokenizer_config.json names no class."""
_PADDED_LEFT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "XLNetTokenizer")
"""Tokenizer classes of transformers that pad on the left by default."""


def model_config_for_export(source: Mapping[str, Any], config: Any, architecture: str) -> Json:
    """Return the config.json of an export, made from the source model's config.json.

    The dtype, ``tie_word_embeddings`` and the stop ids are set afterwards, by ``with_dtype``, ``with_tying`` and
    ``with_stop_ids``. ``source``: content of the source model's config.json. ``config``: the Hugging Face configuration
    object of the source model. ``architecture``: class name of the trained model, such as Qwen3ForCausalLM.
    """
    edited = without_ignored_settings(source, config)
    edited = {key: value for key, value in edited.items() if key not in (*_QUANTIZATION, _CODE)}
    # vLLM and transformers select the model's class by architectures; they would fail for a classifier listed first.
    return edited | {"architectures": [architecture]} | _rope_of_version_4(edited.get("rope_scaling"), config)


def _rope_of_version_4(rope_scaling: Any, config: Any) -> Json:
    """Return the rotary keys of config.json for transformers 4, with the values in ``config``.

    ``config``: the configuration object that transformers 5 created from the source model's config.json.
    ``rope_scaling``: value of this key in that file, or None. If this value already agrees with ``config``, the result
    has no key ``rope_scaling``, and the export keeps the value.
    """
    main = config.rope_parameters.get("full_attention", config.rope_parameters)
    local = config.rope_parameters.get("sliding_attention")
    keys: Json = {"rope_theta": main["rope_theta"]}
    derived = _scaling(main)
    if derived is not None and derived.get("factor", 1.0) is None:
        derived["factor"] = rotary_factor(derived, config)
    if derived is not None and local is not None:  # version 5 reads truncate next to the layer types
        derived.pop("truncate", None)
        derived |= {key: value for key, value in config.rope_parameters.items() if key == "truncate"}
    if (rope_scaling is not None and not rope_scaling) or _scaling(rope_scaling) != derived:
        keys["rope_scaling"] = derived
    if local is not None:
        keys["rope_local_base_freq"] = local["rope_theta"]
        if local.get("rope_type", "default") != "default":
            log.warning(
                "exports of this model can be read only by transformers 5 and vLLM: transformers 4 does not support"
                " rope_type=%s in layers with a sliding attention window",
                local["rope_type"],
            )
    return keys


def _scaling(parameters: Mapping[str, Any] | None) -> Json | None:
    """Convert rotary parameters to transformers 4's ``rope_scaling``; None for the rope_type "default"."""
    if not parameters:
        return None
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    others = {name: value for name, value in parameters.items() if name not in ("rope_theta", "type", "rope_type")}
    return None if kind == "default" else {"rope_type": kind, **others}


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> Json:
    """Return a copy of ``config`` (content of config.json) with the dtype of the exported weights.

    The dtype is set in ``torch_dtype``, which all versions of transformers read, and in ``dtype`` if this key exists.
    """
    name = str(dtype).removeprefix("torch.")
    return {**config, **({"dtype": name} if "dtype" in config else {}), "torch_dtype": name}


def with_tying(config: Mapping[str, Any], as_read: bool, tied: bool) -> Json:
    """Return a copy of ``config`` (content of config.json) with ``tie_word_embeddings`` equal to ``tied``.

    ``as_read``: the value that transformers reads from ``config``. If it already equals ``tied``, the copy is not
    changed.
    """
    return dict(config) if as_read == tied else {**config, "tie_word_embeddings": tied}


def _listed_ids(config: Mapping[str, Any]) -> list[Any]:
    eos = config.get("eos_token_id")
    return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


def _has_ids(config: Mapping[str, Any], ids: Sequence[int]) -> bool:
    """Return whether ``eos_token_id`` in ``config`` (null, an id or a list) contains exactly ``ids``."""
    listed = _listed_ids(config)
    known = all(type(token) is int and token in ids for token in listed)  # version 4 does not accept 256.0
    return known and all(token in listed for token in ids)


def with_stop_ids(
    generation: Mapping[str, Any] | None, config: Mapping[str, Any], stop_token_ids: Sequence[int]
) -> tuple[Json | None, Json]:
    """Return generation_config.json and config.json with the training's stop ids as ``eos_token_id``.

    ``generation`` and ``config``: contents of the two files; None: generation_config.json is missing. Neither file
    changes if ``stop_token_ids`` is empty, or if generation_config.json already has exactly these ids. With
    ``_from_model_config`` in generation_config.json, transformers reads the ids from config.json, so config.json must
    then have these ids too. A missing generation_config.json is created from the special tokens in config.json.
    """
    if not stop_token_ids:
        return (None if generation is None else dict(generation)), dict(config)
    made = dict(generation or {})
    read = (made, config) if made.get(_FROM_CONFIG) else (made,)
    if all(_has_ids(each, stop_token_ids) for each in read):
        return made, dict(config)
    if generation is None:
        names = ("bos_token_id", "pad_token_id")
        generation = {name: config[name] for name in names if config.get(name) is not None}
    # The ids of the source come first, because generate() pads with the first id.
    first = [token for token in (*_listed_ids(generation), *_listed_ids(config)) if type(token) is int]
    ordered = list(dict.fromkeys(token for token in (*first, *sorted(stop_token_ids)) if token in stop_token_ids))
    eos = ordered[0] if len(ordered) == 1 else ordered
    edited = {name: value for name, value in generation.items() if name != _FROM_CONFIG}
    return {**edited, "eos_token_id": eos}, {**config, "eos_token_id": eos}


def tokenizer_config_for_export(
    source: Mapping[str, Any], *, family: str, has_json: bool, misread: bool, own_template: bool
) -> Json:
    """Return a tokenizer_config.json with which transformers 4 and 5 load the same tokenizer.

    ``source``: content of the source model's tokenizer_config.json. ``family``: model type. ``has_json``: whether the
    export has a tokenizer.json. ``misread``: whether the class that transformers chooses for the source model encodes
    texts differently from tokenizer.json. ``own_template``: whether the user configured a chat template; the template
    in ``source`` is then removed.

    With a tokenizer.json, the tokenizer class is replaced by PreTrainedTokenizerFast, which reads tokenizer.json
    unchanged, in three cases: ``source`` has the format of transformers 5, ``source`` names no class, or ``misread`` is
    true. Without a class name, transformers 4 would choose a class by model type; Llama's class adds a BOS token to
    every text. The defaults of the replaced class become explicit settings.
    """
    edited = {key: value for key, value in source.items() if key != _CODE}
    if own_template:
        edited.pop("chat_template", None)
    extra = edited.get("extra_special_tokens")
    if isinstance(extra, list):  # version 4 reads a dictionary under this name
        del edited["extra_special_tokens"]
        old = edited.get("additional_special_tokens") or []
        edited["additional_special_tokens"] = [*old, *(token for token in extra if token not in old)]
    newer = edited.get("tokenizer_class") in (None, "TokenizersBackend") or "backend" in edited
    if has_json and (newer or misread or isinstance(extra, list)):
        edited.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if str(edited.get("tokenizer_class") or _CLASSES[family]).removesuffix("Fast") in _PADDED_LEFT:
            edited.setdefault("padding_side", "left")
        edited["tokenizer_class"] = _READ_BY_BOTH
    return edited
