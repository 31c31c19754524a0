"""Edits of the small JSON files of an export: what training changed, and the keys of both versions of transformers.

Version 4 of transformers reads ``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq``; version 5 writes
``rope_parameters`` instead, and reads both. Every function returns a new dictionary that keeps the other keys.
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
"""Reads tokenizer.json as it is, in version 4 and in version 5; version 4 adds token_type_ids by default."""
_CLASSES = {
    "llama": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma3_text": "GemmaTokenizer",
}
"""Family -> the class that version 4 takes where tokenizer_config.json names none."""
_PADDED_LEFT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "XLNetTokenizer")


def model_config_for_export(source: Mapping[str, Any], config: Any, architecture: str) -> Json:
    """config.json of the export from the source's.

    ``config``: the source as the trainer reads it. ``architecture``: the class of the trained model. The dtype, the
    tying of the head and the stop ids are set by the other functions.
    """
    edited = without_ignored_settings(source, config)
    edited = {key: value for key, value in edited.items() if key not in (*_QUANTIZATION, _CODE)}
    # vLLM and transformers choose the model's class by it: a classifier in first place is one they can't load.
    return edited | {"architectures": [architecture]} | _rope_of_version_4(edited.get("rope_scaling"), config)


def _rope_of_version_4(rope_scaling: Any, config: Any) -> Json:
    """The rotary keys of version 4 from the values that version 5 reads.

    ``rope_scaling``: the source's, which stays as it is where version 4 reads the same from it.
    """
    every = config.rope_parameters.get("full_attention", config.rope_parameters)
    local = config.rope_parameters.get("sliding_attention")
    keys: Json = {"rope_theta": every["rope_theta"]}
    derived = _scaling(every)
    if derived is not None and derived.get("factor", 1.0) is None:
        derived["factor"] = rotary_factor(derived, config)
    if derived is not None and local is not None:  # version 5 reads truncate beside the types of layers
        derived.pop("truncate", None)
        derived |= {key: value for key, value in config.rope_parameters.items() if key == "truncate"}
    if (rope_scaling is not None and not rope_scaling) or _scaling(rope_scaling) != derived:
        keys["rope_scaling"] = derived
    if local is not None:
        keys["rope_local_base_freq"] = local["rope_theta"]
        if local.get("rope_type", "default") != "default":
            log.warning(
                "exports of this model are for transformers 5 and vLLM only: version 4 can't express the rotary"
                " embedding of its sliding layers (rope_type=%s)",
                local["rope_type"],
            )
    return keys


def _scaling(parameters: Mapping[str, Any] | None) -> Json | None:
    """Rotary parameters as version 4 reads them from ``rope_scaling``; None for the default type."""
    if not parameters:
        return None
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    others = {name: value for name, value in parameters.items() if name not in ("rope_theta", "type", "rope_type")}
    return None if kind == "default" else {"rope_type": kind, **others}


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> Json:
    """config.json with the dtype of the written weights; ``torch_dtype`` is the spelling that all versions read."""
    name = str(dtype).removeprefix("torch.")
    return {**config, **({"dtype": name} if "dtype" in config else {}), "torch_dtype": name}


def with_tying(config: Mapping[str, Any], as_read: bool, tied: bool) -> Json:
    """config.json that declares whether the head is tied to the embeddings, changed only where it is read otherwise.

    ``as_read``: ``tie_word_embeddings`` as transformers reads it from ``config``.
    """
    return dict(config) if as_read == tied else {**config, "tie_word_embeddings": tied}


def _listed_ids(config: Mapping[str, Any]) -> list[Any]:
    eos = config.get("eos_token_id")
    return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


def _has_ids(config: Mapping[str, Any], ids: Sequence[int]) -> bool:
    """Whether ``eos_token_id``, which is null, one id or a list, has these ids and no other."""
    listed = _listed_ids(config)
    known = all(type(token) is int and token in ids for token in listed)  # 256.0 is not an id for version 4
    return known and all(token in listed for token in ids)


def with_stop_ids(
    generation: Mapping[str, Any] | None, config: Mapping[str, Any], stop_token_ids: Sequence[int]
) -> tuple[Json | None, Json]:
    """generation_config.json and config.json with the stop ids of training.

    Both stay as they are where generation_config.json has these ids already, or where training had none. A missing
    generation_config.json is made from config.json's special tokens. One that is marked as made from config.json is
    made again by transformers when it is read, so config.json must have these ids too.
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
    # The source's own ids stay first: generate() pads with the first one.
    first = [token for token in (*_listed_ids(generation), *_listed_ids(config)) if type(token) is int]
    ordered = list(dict.fromkeys(token for token in (*first, *sorted(stop_token_ids)) if token in stop_token_ids))
    eos = ordered[0] if len(ordered) == 1 else ordered
    edited = {name: value for name, value in generation.items() if name != _FROM_CONFIG}
    return {**edited, "eos_token_id": eos}, {**config, "eos_token_id": eos}


def tokenizer_config_for_export(
    source: Mapping[str, Any], *, family: str, has_json: bool, misread: bool, own_template: bool
) -> Json:
    """tokenizer_config.json for both versions of transformers.

    Files in version 5's dialect, without a class, or with a class that is ``misread`` get one that reads tokenizer.json
    as it is, where there is one (``has_json``). Without a class, version 4 takes the model's (by ``family``), and
    Llama's puts a BOS token before every text. The defaults of the replaced class are written out.
    ``own_template``: the user gave a chat template, so the one in this file no longer holds.
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
