"""Adapters of the student: base checksums, PEFT folders, merged exports, and the start from a PEFT folder."""

from __future__ import annotations

import errno
import json
import os.path
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.checkpoint import Checkpoints
from distill.checkpoint.base_model import BASE
from distill.checkpoint.manifest import INFO as INFO_FILE
from distill.config import CheckpointingConfig, Config
from distill.data.tokenizer import load_tokenizer
from distill.distributed.world import World
from distill.errors import UserError
from distill.model import export
from distill.model.base_checksum import digest
from distill.model.checksum import bit_sums_by_name
from distill.model.dtensor import local_shard
from distill.model.export_files import read_export_files
from distill.model.export_student import export_student
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.hf_load import local_slices
from distill.model.initial_adapter import initial_adapter, load_adapter
from distill.model.merged_files import merged_weights
from distill.model.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, target_modules
from distill.model.student import Student
from scripts import export_hf
from tests.harness import config_for
from tests.helpers import run_ranks, save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

slow = pytest.mark.slow
LORA = "policy.dtensor_cfg.lora_cfg"
IDS = [(37 * i) % 250 for i in range(1, 31)]
LAYOUTS = {
    "shards": (1, 1, "float32"),
    "tp": (2, 1, "float32"),
    "replicas": (1, 2, "float32"),
    "bfloat16": (1, 1, "bfloat16"),
}
"""Tensor-parallel size, number of replicas and precision of each student on two ranks."""
FLOAT32 = ("shards", "tp", "replicas")


def _config(folder: Path, *overrides: str, precision: str = "float32") -> Config:
    settings = [f"{LORA}.{key}" for key in ("enabled=true", "dim=6", "alpha=9", "exclude_modules=[k_proj]")]
    precision_key = f"policy.precision={precision}"
    return config_for(folder, folder, "distillation.allow_degenerate=true", *settings, precision_key, *overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "base", "qwen3", seed=3)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# Base\n\nText.\n")
    (folder / "LICENSE").write_text("Apache")
    return folder


def _train(student: Student) -> None:
    """Give every adapter random values that depend only on its name."""
    with torch.no_grad():
        for name, parameter in student.model.named_trained():
            generator = torch.Generator().manual_seed(sum(name.encode()))
            complete = 0.1 * torch.randn(parameter.shape, generator=generator)
            local_shard(parameter).copy_(complete[local_slices(parameter)])


@dataclass
class Seen:
    """Results of a student on one rank."""

    base: dict[str, Any]
    logprobs: list[float]
    merged: dict[str, Tensor]
    """Weights of a sync in bfloat16."""
    continued: list[float]
    """Log-probs of another student that starts from the export."""


def _student(config: Config, files: Any, world: World) -> Student:
    return Student(config, files, world, 384, ())


def export_on_ranks(
    folder: Path, out: Path, layouts: dict[str, tuple[int, int, str]], overrides: tuple[str, ...] = ()
) -> dict[str, Seen]:
    """Export a student in each layout to ``out / name``, save its checkpoint, and start another one from the export."""
    world, seen = World(), {}
    files = find_model(str(folder), "policy.model_name")
    model, tokenizer = model_config(files, "x"), load_tokenizer(files, None, "policy.tokenizer.name")
    for name, (tp, replicas, precision) in layouts.items():
        world.build_mesh("cpu", tp, 1, replicas)
        sizes = [f"policy.dtensor_cfg.tensor_parallel_size={tp}", f"policy.dtensor_cfg.replicate_size={replicas}"]
        config = _config(folder, *sizes, *overrides, f"cluster.gpus_per_node={world.size}", precision=precision)
        student = Student(config, files, world, 384, ())
        _train(student)
        small = read_export_files(files, tokenizer, None, (258,)).with_card(asdict(config), 3, {258: "<|im_end|>"})
        export_student(out / name, student, small if world.is_main else None, asdict(config))
        merged = {n: tensor.clone() for n, tensor in student.weights(torch.bfloat16)}
        saved = Checkpoints(CheckpointingConfig(checkpoint_dir=str(out / name)), world)
        stored = small.stored(student.dtype, list(merged)) if world.is_main else {}
        info = {"step": 3, "recipe": asdict(config), BASE: student.base, "stop_token_ids": [258]}
        saved.save(3, student.state(), info, files=stored)
        saved.finalize_pending(block=True)
        start = _config(folder, *overrides, f"{LORA}.init_from={out / name}/peft", precision=precision)
        another, adapter = Student(start, files, world, 384, ()), initial_adapter(start, model)
        assert adapter is not None and student.base is not None
        load_adapter(adapter, another, world)
        seen[name] = Seen(student.base, student.logprobs(IDS), merged, another.logprobs(IDS))
    world.close()
    return seen


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def seen(base: Path, out: Path) -> dict[str, Seen]:
    """Return the results of each layout on rank 0, and of one rank alone under the name ``one``.

    The recipe of ``one`` names the base by a relative path.
    """
    relative = Path(os.path.relpath(base))
    two: dict[str, Seen] = run_ranks(2, export_on_ranks, base, out, LAYOUTS)[0]
    one: dict[str, Seen] = run_ranks(1, export_on_ranks, relative, out, {"one": (1, 1, "float32")})[0]
    return two | one


# ---- the base's checksum --------------------------------------------------------------------------------------------


@slow
def test_the_checksum_of_the_base_depends_on_no_layout_and_counts_each_weight_once(
    base: Path, seen: dict[str, Seen]
) -> None:
    weights = load_file(base / "model.safetensors").items()
    complete = {
        str(dtype).removeprefix("torch."): digest(
            bit_sums_by_name((name, tensor.to(dtype)) for name, tensor in weights)
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name in (*FLOAT32, "one"):
        assert seen[name].base["checksum"] == complete, name
    rounded = {"bfloat16": complete["bfloat16"]}
    assert seen["bfloat16"].base["checksum"] == rounded, "the precision of a resume may differ"


def test_a_changed_element_and_a_changed_name_change_the_checksum() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3)}
    plain = digest(bit_sums_by_name(weights.items()))
    assert plain == digest(bit_sums_by_name(reversed(weights.items())))
    swapped = {"a": weights["a"].flip(0), "b": weights["b"]}
    renamed = {"a": weights["a"], "c": weights["b"]}
    assert len({plain, *(digest(bit_sums_by_name(each.items())) for each in (swapped, renamed))}) == 3


# ---- PEFT folders ---------------------------------------------------------------------------------------------------


def _logprobs(model: Any) -> Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _max_diff(ours: list[float] | Tensor, theirs: Tensor) -> float:
    return float((torch.as_tensor(ours) - theirs).abs().max())


@slow
def test_peft_loads_the_export_and_gives_the_trainers_logprobs(base: Path, out: Path, seen: dict[str, Seen]) -> None:
    import peft

    for name in (*FLOAT32, "one"):
        each, folder = seen[name], out / name / "peft"
        config = peft.PeftConfig.from_pretrained(folder)
        assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (6, 9, str(base))
        theirs = _logprobs(peft.PeftModel.from_pretrained(_plain(base), folder))
        assert _max_diff(each.logprobs, theirs) < 1e-4, name
        assert _max_diff(each.logprobs, _logprobs(_plain(base))) > 0.1, "the adapters change the model"


@slow
def test_the_export_of_an_adapter_is_the_same_for_every_layout_and_has_the_small_files(
    base: Path, out: Path, seen: dict[str, Seen]
) -> None:
    folders = [out / name / "peft" for name in (*FLOAT32, "one")]
    first, *others = [load_file(folder / ADAPTER_WEIGHTS) for folder in folders]
    assert len(first) == 2 * 2 * 6, "two layers with six of seven modules"
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    files = {path.name: path for path in folders[0].iterdir()}
    assert {
        "tokenizer.json",
        "LICENSE",
        "generation_config.json",
        "base_checksum.json",
    } <= files.keys() and "config.json" not in files
    card = files["README.md"].read_text()
    for part in (
        "library_name: peft",
        "license: apache-2.0",
        "| LoRA | rank 6, alpha 9 |",
        "| steps | 3 |",
        "--generation-config",
    ):
        assert part in card
    assert "# Base" not in card and card.count("library_name") == 1
    modules = ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads(files[ADAPTER_CONFIG].read_text())["target_modules"] == modules
    assert len({path.stat().st_mode & 0o777 for path in files.values()}) == 1


def test_modules_are_named_completely_if_their_last_part_selects_too_many() -> None:
    base = [f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("up", "down")]
    adapters = [f"model.layers.{i}.mlp.up_proj.lora_{m}" for i in range(2) for m in "AB"]
    assert target_modules(adapters, base) == ["up_proj"]
    assert target_modules(adapters[:2], base) == ["model.layers.0.mlp.up_proj"]


# ---- scripts.export_hf ----------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("layout", ["tp", "one"])
def test_the_script_writes_the_same_adapter_as_the_run_from_any_directory(
    out: Path, seen: dict[str, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_hf.main([str(out / f"{layout}/step_3"), "out"]) == 0
    own = out / f"{layout}/peft"
    names = sorted(path.name for path in own.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    different = [name for name in names if (tmp_path / "out" / name).read_bytes() != (own / name).read_bytes()]
    assert different == []


@slow
def test_an_exported_adapter_names_the_folder_that_the_option_model_names(
    base: Path, out: Path, seen: dict[str, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = ("moved", f"{tmp_path}/moved", None, "moved"), ("models--a--b/snapshots/12", "a/b", "12", "a/b")
    for folder, name, revision, shown in cases:
        shutil.copytree(base, folder)
        assert export_hf.main([str(out / "tp/step_3"), f"out-{revision}", "--model", folder]) == 0
        config = json.loads((tmp_path / f"out-{revision}" / ADAPTER_CONFIG).read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (name, revision)
        assert f'base_model: "{shown}"' in (tmp_path / f"out-{revision}" / "README.md").read_text()


@slow
def test_a_merged_export_gives_the_trainers_logprobs(out: Path, seen: dict[str, Seen], tmp_path: Path) -> None:
    assert export_hf.main([str(out / "tp/step_3"), str(tmp_path / "out"), "--merge"]) == 0
    assert _max_diff(seen["tp"].logprobs, _logprobs(_plain(tmp_path / "out"))) < 1e-4


@slow
def test_a_merged_bfloat16_export_has_the_weights_of_a_sync_and_almost_the_trainers_distribution(
    base: Path, out: Path, seen: dict[str, Seen], tmp_path: Path
) -> None:
    for name in ("bfloat16", "tp"):
        assert (
            export_hf.main([str(out / f"{name}/step_3"), str(tmp_path / name), "--merge", "--dtype", "bfloat16"]) == 0
        )
    config = json.loads((tmp_path / "bfloat16/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"]
    exported, original = load_file(tmp_path / "bfloat16/model.safetensors"), load_file(base / "model.safetensors")
    assert exported.keys() == seen["bfloat16"].merged.keys() == original.keys()
    for name, sent in seen["bfloat16"].merged.items():
        equal = float((exported[name] == sent).double().mean())
        assert equal > 0.9999, f"{name}: the export differs from a sync in {1 - equal:.2%} of the elements"
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(exported[name], original[name].to(torch.bfloat16)), "a weight without an adapter"
    export_hf.export(out / "tp/step_3", tmp_path / "exact", merge=True)
    trainer, merged, frozen = (_distributions(folder) for folder in (tmp_path / "exact", tmp_path / "tp", base))
    assert _kl(trainer, merged) < 0.02 * _kl(frozen, trainer)


@torch.inference_mode()
def _distributions(folder: Path) -> Tensor:
    """Return the log-probs of all tokens after each of IDS, float64 [T, V]."""
    return _plain(folder)(torch.tensor([IDS])).logits[0].double().log_softmax(-1)


def _kl(p_TV: Tensor, q_TV: Tensor) -> float:
    return float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())


@slow
def test_a_merged_export_has_the_configuration_and_tokenizer_of_the_training(
    base: Path, out: Path, seen: dict[str, Seen], tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    (other / "chat_template.jinja").write_text("another template")
    step = out / "tp/step_3"
    assert export_hf.main([str(step), str(tmp_path / "out"), "--merge", "--model", str(other)]) == 0
    for name in ("config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (step / "export_files" / name).read_bytes()


@slow
def test_an_export_refuses_another_base_before_it_writes_a_weight(
    base: Path, out: Path, seen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][5] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    checkpoint = out / "tp/step_3"
    for writer in ("write_hf", "export_adapter"):
        monkeypatch.setattr(export_hf, writer, lambda *_: pytest.fail("the export begins before the check"))
    for option in (["--merge"], []):
        assert export_hf.main([str(checkpoint), str(tmp_path / "out"), *option, "--model", str(other)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--model={other}" in line and str(base) in line
    assert [path.name for path in tmp_path.iterdir()] == ["other"], "no output is left"
    with pytest.raises(UserError) as refused:
        export_hf.export(checkpoint, tmp_path / "out", dtype="bfloat16")
    assert refused.value.key == "--dtype"


@slow
def test_a_merged_export_reads_no_weight_after_a_failed_write(
    out: Path, seen: dict[str, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def recorded(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for name, weight in merged_weights(*arguments):
            read.append(name)
            yield name, weight

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_hf, "merged_weights", recorded)
    monkeypatch.setattr(export, "_SHARD_BYTES", 1)
    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(UserError, match="No space left"):
        export_hf.export(out / "tp/step_3", tmp_path / "out", merge=True)
    assert len(read) == 2, "the second weight does not fit into the file of the first one"


# ---- init_from ------------------------------------------------------------------------------------------------------


@slow
def test_a_student_starts_from_an_exported_adapter_in_every_layout(seen: dict[str, Seen]) -> None:
    for name, each in seen.items():
        assert each.continued == each.logprobs, name


Edit = Callable[[Path], None]


def _set(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config | values))

    return edit


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return edit


FIRST = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@slow
@pytest.mark.parametrize(
    ("edit", "named", "fix"),
    [
        (_set(r=8), "r=8", f"{LORA}.dim=8"),
        (_set(lora_alpha=18), ADAPTER_CONFIG, f"{LORA}.alpha=18"),
        (_set(use_rslora=True), "3.67", f"{LORA}.alpha=22"),
        (_set(use_dora=True), "use_dora", ""),
        (_set(modules_to_save=["lm_head"]), "modules_to_save", ""),
        (_set(bias="all"), "bias", ""),
        (_set(peft_type="IA3"), "peft_type", ""),
        (_set(init_lora_weights="pissa"), "init_lora_weights", "path_initial_model"),
        (_set(init_lora_weights="lora_ga"), "init_lora_weights", "path_initial_model"),
        (_tensors(lambda t: t.pop(FIRST)), FIRST, ""),
        (_tensors(lambda t: t.update({FIRST: t[FIRST][:, :60].clone()})), FIRST, ""),
        (_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})), "lm_head", ""),
        (_tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.int32)})), "I32", ""),
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), ADAPTER_WEIGHTS, ""),
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), ADAPTER_CONFIG, ""),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("{"), ADAPTER_CONFIG, ""),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"123"), ADAPTER_WEIGHTS, ""),
    ],
)
def test_an_adapter_that_differs_from_the_recipe_is_refused(
    base: Path, out: Path, seen: Any, tmp_path: Path, edit: Edit, named: str, fix: str
) -> None:
    folder = shutil.copytree(out / "shards/peft", tmp_path / "adapter")
    edit(folder)
    config = _config(base, f"{LORA}.init_from={folder}")
    with pytest.raises(UserError) as refused:
        initial_adapter(config, model_config(find_model(str(base), "x"), "x"))
    assert (refused.value.key, refused.value.value) == (f"{LORA}.init_from", str(folder))
    assert named in refused.value.problem and fix in refused.value.fix, refused.value


@slow
@pytest.mark.parametrize("excluded", ["[]", "[k_proj, o_proj]"])
def test_an_adapter_of_other_modules_suggests_the_modules_that_it_has(
    base: Path, out: Path, seen: Any, excluded: str
) -> None:
    words = [f"{LORA}.init_from={out}/shards/peft", f"{LORA}.exclude_modules={excluded}"]
    model = model_config(find_model(str(base), "x"), "x")
    with pytest.raises(UserError) as refused:
        initial_adapter(_config(base, *words), model)
    assert ("k_proj" if excluded == "[]" else "o_proj") in refused.value.problem
    suggested, _, other = refused.value.fix.partition(f"{LORA}.target_modules=")[2].partition(" and ")
    words += [f"{LORA}.target_modules={suggested}", *([f"{LORA}.{other}"] if other else [])]
    assert initial_adapter(_config(base, *words), model) is not None


@slow
def test_a_checkpoint_in_place_of_an_adapter_suggests_its_export(
    base: Path, out: Path, seen: Any, tmp_path: Path
) -> None:
    """A checkpoint contains a PEFT folder if it was exported; otherwise the export is a command."""
    shutil.copytree(out / "shards/peft", tmp_path / "exported/peft")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / INFO_FILE).touch()
    for folder, fix in (("exported", f"{tmp_path}/exported/peft"), ("saved", f"export_hf {tmp_path}/saved OUT")):
        with pytest.raises(UserError) as refused:
            initial_adapter(
                _config(base, f"{LORA}.init_from={tmp_path / folder}"), model_config(find_model(str(base), "x"), "x")
            )
        assert fix in refused.value.fix
