"""Complete probes of tiny models: of contexts, of another model, within a run, and with refused inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.validation.probe_stats import STARTS
from tests.helpers import free_port, run_ranks
from tests.test_train import make_tiny_run

pytestmark = pytest.mark.slow
CONTEXT = "distillation.context_distillation"


def _programs(ports: Sequence[int], root: Path) -> list[int]:
    """Probes of two contexts, of another model and of a teacher in the student's module, a run with probes, refusals.

    Returns their exit codes.
    """
    from distill.train import main as train
    from scripts.probe import main as probe

    held_out = f"data.validation={{data_path: {root}/problems.jsonl, env_name: regex}}"
    common = ["--config", f"{root}/recipe.yaml", "cluster.gpus_per_node=1", "distillation.max_val_samples=4"]
    itself = [f"teacher.model_name={root}/student", "runtime.verify_teacher=false"]
    twice = "distillation.val_num_generations=2"
    context = [f"{CONTEXT}.enabled=true", f"{CONTEXT}.teacher_prefix_template='Hint: {{problem}}'"]
    steps = [f"distillation.{key}" for key in ("max_num_steps=2", "probe_period=1")]
    steps.append(f"checkpointing.checkpoint_dir={root}/saved")
    lora = ["policy.dtensor_cfg.lora_cfg.enabled=true", f"{CONTEXT}.mode=self_ema"]
    templates = ["--template", f"{root}/same.txt", "--template", f"{root}/hint.txt"]
    lines: list[tuple[Any, list[str]]] = [
        (probe, [*common, held_out, *itself, *templates, twice, f"runtime.run_dir={root}/self"]),
        (probe, [*common, held_out, f"runtime.run_dir={root}/other"]),
        (train, [*common, held_out, *itself, *context, *steps, f"runtime.run_dir={root}/run"]),
        (probe, [*common, f"teacher.model_name={root}/stranger", held_out, f"runtime.run_dir={root}/none"]),
        (probe, [*common, f"runtime.run_dir={root}/none"]),
        (probe, [*common, held_out, *itself, *context, *lora, f"runtime.run_dir={root}/adapters"]),
        (probe, [*common, held_out, "--dry-run", f"runtime.run_dir={root}/none"]),
    ]
    codes = []
    for port, (main, argv) in zip(ports, lines, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(argv))
    return codes


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    root = make_tiny_run(tmp_path_factory.mktemp("probe"))
    (root / "same.txt").write_text("{problem}")
    (root / "hint.txt").write_text("Hint: {solution} {problem}")
    return root, run_ranks(1, _programs, [free_port() for _ in range(7)], root)[0]


def read(root: Path, name: str) -> Any:
    return json.loads((root / name).read_text())


def test_a_context_that_changes_nothing_equals_the_student_exactly(probes: tuple[Path, list[int]]) -> None:
    root, codes = probes
    assert codes[0] == 0
    same, hint = read(root, "self/probe.json")["candidates"]
    for cell in same["cells"]:
        assert (cell["responses"], cell["problems"]) == (8, 4)
        assert cell["difference"] == {"mean": 0.0, "stderr": 0.0}
        assert cell["avg_length"] == cell["student_avg_length"]
    assert all((tenth["forward_kl"] or 0) < 1e-5 for tenth in same["tenths"])
    assert all(tenth["topk_overlap"] in (None, 1.0) for tenth in same["tenths"])
    assert any((tenth["forward_kl"] or 0) > 1e-2 for tenth in hint["tenths"])
    assert any((tenth["topk_overlap"] or 1) < 1 for tenth in hint["tenths"])
    assert [cell["start"] for cell in hint["cells"]] == list(STARTS) and hint["skipped"] == 0
    assert "Recommendation" in (root / "self/probe.txt").read_text()
    assert not (root / "checkpoints").exists()


def test_another_model_continues_with_a_second_engine(probes: tuple[Path, list[int]]) -> None:
    root, codes = probes
    (teacher,) = read(root, "other/probe.json")["candidates"]
    assert codes[1] == 0 and teacher["kind"] == "teacher" and len(teacher["cells"]) == 5
    assert all(cell["avg_length"] <= 12 for cell in teacher["cells"]), "the limit includes the kept tokens"
    assert any((tenth["forward_kl"] or 0) > 0.1 for tenth in teacher["tenths"])


def test_a_run_probes_its_student_every_n_steps(probes: tuple[Path, list[int]]) -> None:
    root, codes = probes
    assert codes[2] == 0
    rows = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    probed = [row for row in rows if "validation/probe/start_60/difference" in row]
    assert [row["step"] for row in probed] == [1, 2]
    assert all(row["timing/validation/probe_generation"] > 0 for row in probed)
    assert [read(root, f"run/probe/step_{step}.json")["step"] for step in (1, 2)] == [1, 2]


def test_unusable_inputs_of_a_probe_end_with_exit_code_2(probes: tuple[Path, list[int]]) -> None:
    root, codes = probes
    assert [codes[i] for i in (3, 4, 6)] == [2, 2, 2] and not (root / "none/probe.json").exists()


def test_a_teacher_in_the_students_module_is_probed_with_the_students_engine(probes: tuple[Path, list[int]]) -> None:
    root, codes = probes
    (context,) = read(root, "adapters/probe.json")["candidates"]
    assert codes[5] == 0 and context["kind"] == "context" and len(context["cells"]) == 5
