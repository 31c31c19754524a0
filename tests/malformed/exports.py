"""Ways to break a run by the files that its exports copy and change."""

from __future__ import annotations

from tests.malformed.case import Case, Workshop, way


@way
def _generation_config_that_exports_change(shop: Workshop) -> Case:
    """The recipe's own stop ids are used, so that nothing else reads the file."""
    model = shop.model()
    text = shop.rng.choice(["{", "[]", "3", "null", '{"eos_token_id": 2,}'])
    (model / "generation_config.json").write_text(text)
    overrides = f"policy.model_name={model}", "policy.generation.stop_token_ids=[258]"
    return shop.case("generation_config.json", *overrides)
