"""The complete program with adapters: an averaged self-teacher, resume, other ranks, exports, refused resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.checkpoint import SHARDS, ShardsReader, read_info
from scripts import export_hf
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _run, _train_rows, make_tiny_run

pytestmark = pytest.mark.slow
CONTEXT = "distillation.context_distillation"
LORA = "policy.dtensor_cfg.lora_cfg"
STEPS = "distillation.max_num_steps"


def adapter_overrides(root: Path, model: str = "student") -> list[str]:
    """Return the overrides of three steps of the tiny run with adapters and an averaged self-teacher."""
    return [
        f"policy.model_name={root}/{model}",
        f"teacher.model_name={root}/{model}",
        "teacher.max_total_sequence_length=256",
        *(f"{CONTEXT}.{key}" for key in ("enabled=true", "mode=self_ema", "ema_decay=0.5")),
        f"{CONTEXT}.teacher_prefix_template='Hint: {{problem}}'",
        *(f"{LORA}.{key}" for key in ("enabled=true", "dim=4")),
        *(f"{STEPS}=3", "checkpointing.save_period=1", "policy.optimizer.kwargs.lr=1e-2", "logger.report=false"),
    ]


REFUSED = {
    "changed base": ("policy.model_name", ["checkpointing.allow_changes=true"]),
    "other rank": (f"{LORA}.dim", [f"{LORA}.dim=8", "checkpointing.allow_changes=true"]),
}
"""Maps a start from a checkpoint to the key that its error names, and to its overrides."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    shutil.copytree(root / "student", root / "renamed")
    other = shutil.copytree(root / "student", root / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def ended(root: Path) -> dict[str, tuple[int, str, str]]:
    """Return the exit code and output of each start: ``full`` of three steps, ``parted`` resumed to three, and others.

    ``continued`` starts from the adapter of ``full``. ``tp`` and ``one rank`` continue ``full`` after its second step,
    ``one rank`` with another folder of the same base model.
    """
    same = adapter_overrides(root)
    resumed = [*same, f"checkpointing.resume_from={root}/checkpoints/full/step_2"]
    lines = {
        "full": _command(root, "full", *same),
        "parted first": _command(root, "parted", *same, f"{STEPS}=2"),
        "parted": _command(root, "parted", *same),
        "continued": _command(
            root, "continued", *same, f"{STEPS}=1", f"{LORA}.init_from={root}/checkpoints/full/step_3/peft"
        ),
        "tp": _command(root, "tp", *resumed, "policy.dtensor_cfg.tensor_parallel_size=2"),
    }
    for name, (_, overrides) in REFUSED.items():
        own = adapter_overrides(root, "other") if name == "changed base" else same
        lines[name] = _command(root, name, *own, resumed[-1], *overrides)
    renamed = adapter_overrides(root, "renamed")
    lines["one rank"] = _command(root, "one rank", *renamed, resumed[-1], "cluster.gpus_per_node=1")
    return dict(zip(lines, _run(list(lines.values()), [2] * (len(lines) - 1) + [1])[0], strict=True))


def _adapters(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / f"checkpoints/{name}/step_3/peft/adapter_model.safetensors")


def test_a_resume_with_adapters_is_bit_exact(root: Path, ended: dict[str, tuple[int, str, str]]) -> None:
    for name in ("full", "parted first", "parted"):
        assert ended[name][0] == 0, ended[name]
    assert "resumed from" in ended["parted"][2]
    full, parted = _train_rows(root / "runs/full"), _train_rows(root / "runs/parted")
    assert [row["step"] for row in full] == [1, 2, 3] and all(row["train/loss"] > 0 for row in full)
    parted[2].update({name: full[2][name] for name in SINCE_THE_LAST_SYNC})
    assert full == parted
    ours, theirs = _adapters(root, "full"), _adapters(root, "parted")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.abs().max() > 0 for tensor in ours.values()), "all adapters were trained"


def test_a_checkpoint_with_adapters_contains_no_weight_of_the_base(root: Path, ended: Any) -> None:
    step = root / "checkpoints/full/step_3"
    names = ShardsReader(step / SHARDS).shapes()
    assert {name.partition(".")[0] for name in names} == {"model", "optimizer", "teacher"}
    assert all("lora_" in name for name in names)
    info = read_info(step)
    assert info["base"]["model_name"] == f"{root}/student" and info["base"]["checksum"].keys() == {
        "float32",
        "bfloat16",
    }
    assert not (step / "hf").exists()


@pytest.mark.parametrize("name", ["tp", "one rank"])
def test_another_layout_and_a_renamed_base_resume_from_a_checkpoint_with_adapters(
    root: Path, ended: dict[str, tuple[int, str, str]], name: str
) -> None:
    code, _, error = ended[name]
    assert code == 0 and "resumed from" in error, error
    full, other = _train_rows(root / "runs/full")[2], _train_rows(root / f"runs/{name}")[2]
    for metric in ("train/loss", "train/grad_norm", "train/global_valid_toks", "train/forward_kl"):
        assert other[metric] == pytest.approx(full[metric], rel=1e-5), metric


def test_a_run_starts_from_an_exported_adapter(root: Path, ended: dict[str, tuple[int, str, str]]) -> None:
    assert ended["continued"][0] == 0, ended["continued"]
    (row,) = _train_rows(root / "runs/continued")
    start, end = (_train_rows(root / "runs/full")[i] for i in (0, 2))
    assert row["train/loss"] != start["train/loss"] and end["step"] == 3
    with_step = load_file(root / "checkpoints/continued/step_1/peft/adapter_model.safetensors")
    # One step takes two optimizer steps at a tenth of the learning rate 0.01.
    for name, tensor in _adapters(root, "full").items():
        assert 0 < float((with_step[name] - tensor).abs().max()) < 3e-3, name


@pytest.mark.parametrize("name", REFUSED)
def test_a_resume_with_other_adapters_or_another_base_is_refused(
    root: Path, ended: dict[str, tuple[int, str, str]], name: str
) -> None:
    code, _, error = ended[name]
    assert code == 2 and REFUSED[name][0] in error.splitlines()[-1], error
    assert not (root / f"checkpoints/{name}/step_3").exists()


def test_the_script_exports_the_checkpoint_of_adapters_and_merges_it(root: Path, ended: Any, tmp_path: Path) -> None:
    step = root / "checkpoints/full/step_3"
    assert export_hf.main([str(step), str(tmp_path / "peft")]) == 0
    for path in (step / "peft").iterdir():
        assert (tmp_path / "peft" / path.name).read_bytes() == path.read_bytes(), path.name
    assert export_hf.main([str(step), str(tmp_path / "merged"), "--merge"]) == 0
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", root / "student"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "_proj" in name} and merged.keys() == base.keys()
