"""Exports of adapters give the trainer's log-probs in vLLM, as a LoRARequest and merged into the base model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts import export_hf
from tests.helpers import run_ranks
from tests.model.test_adapter_exports import IDS, LORA, Seen, base, export_on_ranks
from tests.test_exports import result_of, start_program

pytestmark = pytest.mark.exports
__all__ = ["base"]  # a fixture


SOME = (f"{LORA}.target_modules=[model.layers.0.*]", f"{LORA}.exclude_modules=[]")
"""Overrides that select the first layer only, so that the export names its modules completely."""


@pytest.mark.parametrize("overrides", [(), SOME], ids=["most modules", "one layer"])
def test_vllm_loads_the_adapter_and_the_merged_export(base: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    layouts = {"one": (1, 1, "float32")}
    found: dict[str, Seen] = run_ranks(1, export_on_ranks, base, tmp_path, layouts, overrides)[0]
    named = json.loads((tmp_path / "one/peft/adapter_config.json").read_text())["target_modules"]
    assert all(name.startswith("model.layers.0.") == bool(overrides) for name in named)
    merged = tmp_path / "merged"
    export_hf.export(tmp_path / "one/step_3", merged, merge=True)
    jobs = {
        "adapter": {"adapter": str(tmp_path / "one/peft"), "base": str(base), "ids": IDS, "max_rank": 8},
        "merged": {"vllm_folders": [str(merged)], "ids": IDS, "new_tokens": 1},
    }
    results = {}
    for name, job in jobs.items():
        results[name] = result_of(*start_program(Path(sys.executable), tmp_path, name, job), "5.")
    with_adapter, without = map(torch.tensor, results["adapter"])
    ours = torch.tensor(found["one"].logprobs)
    assert float((ours - with_adapter).abs().max()) < 1e-4
    assert float((ours - torch.tensor(results["merged"][str(merged)]["logprobs"])).abs().max()) < 1e-4
    assert float((ours - without).abs().max()) > 0.1, "the adapter changes the model"
