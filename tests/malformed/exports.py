"""Malformed files that exports copy and change."""

from __future__ import annotations

from tests.malformed.case import Case, Workshop, way


@way
def _broken_generation_config_of_an_export(shop: Workshop) -> Case:
    """The recipe sets stop ids, so that only the export reads the file."""
    model = shop.model()
    text = shop.rng.choice(["{", "[]", "3", "null", '{"eos_token_id": 2,}'])
    (model / "generation_config.json").write_text(text)
    overrides = f"policy.model_name={model}", "policy.generation.stop_token_ids=[258]"
    return shop.case("generation_config.json", *overrides)
