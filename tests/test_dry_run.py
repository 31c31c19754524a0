"""``--dry-run`` refuses what a run refuses before it loads weights, with the same sentence, and writes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from distill.config import load_config
from distill.distributed.cluster import warn_of_cpu
from distill.distributed.planned import PlannedWorld
from distill.dry_run import _selection
from distill.errors import RunFailed, UserError, raise_if_not_creatable
from distill.train import main, print_dry_run
from scripts.launch import ENVIRONMENT
from tests.helpers import run_ranks
from tests.malformed import CANARY, Case, malformed
from tests.test_fuzz import Ended, run_case, run_cases
from tests.test_train import _command, make_tiny_run

Ends = list[tuple[Ended, Ended, bool]]
"""For each case: the end of the dry run, that of the run, and whether the dry run changed a file."""
STOPPED = "stopped before the weights"
COUNT = 36
MISSING = (
    *("old_path", "missing_column", "missing_validation_file", "absent_package"),
    *("data_path_is_no_file", "invalid_model_name", "chat_template_that_is_no_file", "unreadable_prompt_file"),
)
"""Ways in which files, columns or packages are missing."""

PATHS = [f"{key}={path}" for key in ("policy.tokenizer.name", "data.train.data_path") for path in ("./x", "models/x")]
"""Settings with missing paths that have the form of a name on the hub (owner/name)."""


def files_of(root: Path) -> set[tuple[str, int]]:
    """Paths and times of all files and directories below ``root``."""
    return {(str(path), path.lstat().st_mtime_ns) for path in root.rglob("*")}


def compare_cases(root: Path, cases: Sequence[Case]) -> Ends:
    """Return the ends of dry run and run of each case, and whether the dry run changed a file.

    The runs stop before they load weights.
    """
    ended = []
    for case in cases:
        before = files_of(root)
        dry = run_case(replace(case, argv=["--dry-run", *case.argv]))
        changed = files_of(root) != before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distill.build.build_engine", MagicMock(side_effect=RunFailed(STOPPED)))
            (run,) = run_cases([case])
        ended.append((dry, run, changed))
    return ended


def difference(dry: Ended, run: Ended, changed: bool) -> str:
    """Return how a dry run differs from the run; "" if it does not."""
    sentences = [[line for line in output.splitlines() if line.startswith("error: ")] for _, output in (dry, run)]
    if changed:
        return "the dry run changed a file"
    if "Traceback" in dry[1]:
        return f"a traceback: {dry[1].splitlines()[-1]}"
    if run[0] == 1 and STOPPED in run[1]:
        return "" if dry[0] == 0 else f"only the dry run is refused: {sentences[0]}"
    warned = re.findall(r"([\w.]+=.*?) is not in the download cache", dry[1])
    if dry[0] == 0 and any(line.startswith(f"error: {setting} ") for line in sentences[1] for setting in warned):
        return ""  # the hub may have it
    if dry[0] == 0 and "error: cluster.num_nodes=" in run[1]:
        return ""  # the number of ranks that the launcher starts
    if dry[0] != 2 or run[0] != 2:
        return f"exit codes {dry[0]} and {run[0]}, {sentences}"
    return "" if sentences[0] == sentences[1] else f"sentences {sentences}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        return make_tiny_run(tmp_path_factory.mktemp("dry run"))


def compare_and_resume(root: Path, cases: Sequence[Case]) -> tuple[Ends, list[Ended], Ends]:
    return compare_cases(root, cases), *resume_cases(root)


@pytest.fixture(scope="module")
def ended(root: Path) -> tuple[list[Case], Ends, list[Ended], Ends]:
    """Drawn cases with their ends, then the result of ``resume_cases``; all in one process."""
    cases = malformed(root, 2 * len(MISSING), seed=29, ranks=1, among=lambda way: way in MISSING)
    cases += malformed(root, COUNT - len(cases), seed=30, ranks=1, among=lambda way: not way.startswith("environment"))
    for setting in PATHS:
        argv = [*_command(root, "path", "cluster.gpus_per_node=1"), setting]
        cases.append(Case("a path that looks like a hub name", argv, ""))
    cases.append(Case("a working run", _command(root, "good", "cluster.gpus_per_node=1"), ""))
    return cases, *run_ranks(1, compare_and_resume, root, cases)[0]


@pytest.mark.slow
def test_36_dry_runs_are_refused_if_and_only_if_the_run_is_refused_before_its_weights(root, ended) -> None:
    cases, ends = ended[:2]
    faults = [(case.way, case.detail, difference(*end)) for case, end in zip(cases, ends, strict=True)]
    assert [fault for fault in faults if fault[-1]] == []
    assert ends[-1][0][0] == 0 and STOPPED in ends[-1][1][1]
    assert sum(dry[0] == 2 for dry, _, _ in ends) > COUNT / 2
    assert not (root / CANARY).exists()


def resume_cases(root: Path) -> tuple[list[Ended], Ends]:
    """Return the ends of a real run of two steps and of dry runs that resume it, and those of changed runs."""
    base = [*_command(root, "saved", "cluster.gpus_per_node=1"), "distillation.max_num_steps=2"]
    case = Case("", base, "")
    (trained,) = run_cases([case])
    ended = [trained]
    for words in (
        [],
        ["distillation.max_num_steps=4"],
        ["policy.optimizer.kwargs.lr=0.5", "checkpointing.allow_changes=true"],
    ):
        ended.append(dry_run_of(case, *words))
    other = _command(root, "other", "cluster.gpus_per_node=1")
    changed = [
        [*base, "policy.optimizer.kwargs.lr=0.5"],
        [*base, "distillation.max_num_steps=4", "checkpointing.resume_from=never"],
        [*other, f"runtime.run_dir={root}/runs/saved", "distillation.seed=77"],
        [*base, "distillation.max_num_steps=4", f"checkpointing.resume_from={root}/checkpoints"],
    ]
    compared = compare_cases(root, [replace(case, argv=argv) for argv in changed])
    settings = root / "student/config.json"
    text = settings.read_text()
    settings.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 0.1}))
    compared += compare_cases(root, [replace(case, argv=[*base, "distillation.max_num_steps=4"])])
    settings.write_text(text)
    shutil.copytree(root / "checkpoints/saved/step_2", root / "checkpoints/saved/step_3")
    (root / "checkpoints/saved/step_3/training_info.json").write_text("{")
    before = files_of(root)
    ended.append(dry_run_of(case, "distillation.max_num_steps=4"))
    ended.append((int(files_of(root) != before), ""))
    shutil.rmtree(root / "checkpoints/saved/step_3")
    (file,) = (root / "checkpoints/saved/step_2/shards").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    return ended, compared + compare_cases(root, [replace(case, argv=[*base, "distillation.max_num_steps=4"])])


def dry_run_of(case: Case, *words: str) -> Ended:
    """Return exit code and standard output of a dry run with more overrides."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["--dry-run", *case.argv, *words])
    return code, output.getvalue()


@pytest.mark.slow
def test_a_dry_run_reports_the_checkpoint_to_resume_from_and_refuses_another_run(ended) -> None:
    (trained, finished, longer, allowed, after_damage, renamed), compared = ended[2:]
    assert trained[0] == 0, trained
    assert "has finished all 2 steps" in finished[1] and finished[0] == 0
    assert longer[0] == allowed[0] == 0
    assert "resumes after step 2" in longer[1] and "# plan" in longer[1]
    assert "resumes after step 2" in after_damage[1] and not renamed[0], "a damaged checkpoint is skipped, not renamed"
    assert [difference(*end) for end in compared] == [""] * len(compared)
    assert [dry[0] for dry, _, _ in compared] == [2] * len(compared)
    assert sum("rms_norm_eps" in dry[1] for dry, _, _ in compared) == 1


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Skip the import of vLLM, which takes seconds."""
    monkeypatch.setattr("distill.preflight.check_backend", lambda *arguments: None)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_models_and_data_on_the_hub_are_warnings_with_the_command_that_fetches_them(quick, capsys, caplog) -> None:
    words = ["--config", str(RECIPES / "my-distillation-1n4g.yaml"), "distillation.max_num_steps=7"]
    print_dry_run(["--dry-run", *words])
    output = capsys.readouterr().out
    assert "at most 7" in output and "torchrun --nproc-per-node=4 -m distill.train --config" in output
    warned = [record.getMessage() for record in caplog.records if "scripts.fetch" in record.getMessage()]
    assert len(warned) == 4, "two models and two datasets"
    assert all(f"python -m scripts.fetch {' '.join(words)}" in text for text in warned)


def test_missing_files_and_packages_are_errors_here_and_warnings_elsewhere(root, quick, caplog) -> None:
    words = [*_command(root, "elsewhere", "cluster.gpus_per_node=1"), "--dry-run"]
    quick.setitem(sys.modules, "wandb", None)
    for missing in (
        "policy.model_name=/no/such",
        "data.train.data_path=/no/such.jsonl",
        "data.default.prompt_file=nope.txt",
        "logger.wandb_enabled=true",
        "runtime.device=cuda",
        *PATHS,
        f"checkpointing.checkpoint_dir={root}/prompt.txt/below",
    ):
        if missing == "runtime.device=cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UserError) as caught:
            print_dry_run([*words, missing])
        assert caught.value.key.rpartition(".")[2] in missing
        caplog.clear()
        print_dry_run([*words, missing, "--elsewhere"])
        assert caught.value.problem in caplog.text or "checkpoint" in missing
    with pytest.raises(UserError) as caught:  # invalid everywhere
        print_dry_run([*words, f"data.default.prompt_file={root}/no-braces.txt", "--elsewhere"])
    assert caught.value.key == "data.train.prompt_file"


def test_an_incomplete_model_in_the_hubs_cache_is_a_warning(root, quick, tmp_path, caplog) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--owner--model/snapshots/abc"
    shutil.copytree(root / "student", snapshot)
    (tmp_path / "models--owner--model/refs").mkdir()
    (tmp_path / "models--owner--model/refs/main").write_text("abc")
    quick.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = [*_command(root, "cached", "cluster.gpus_per_node=1"), "--dry-run", "policy.model_name=owner/model"]
    print_dry_run(words)
    assert "scripts.fetch" not in caplog.text
    (snapshot / "model.safetensors").unlink()
    print_dry_run(words)
    assert "policy.model_name=owner/model" in caplog.text and "scripts.fetch" in caplog.text


def test_the_checklist_has_the_failed_point(root, quick, capsys) -> None:
    words = [*_command(root, "checklist", "cluster.gpus_per_node=1"), "--dry-run"]
    print_dry_run(words)
    output = capsys.readouterr().out
    assert all(f"#   {number}. " in output for number in range(1, 9)) and "FAILED" not in output
    with pytest.raises(UserError):
        print_dry_run([*words, "policy.max_total_sequence_length=100000"])
    assert "#   4. FAILED" in capsys.readouterr().out
    quick.setenv("SLURM_JOB_ID", "7")
    quick.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError) as caught:
        print_dry_run(words)
    assert caught.value.key == "cluster.num_nodes" and "#   2. FAILED" in capsys.readouterr().out
    print_dry_run([*words, "--elsewhere"])
    assert "#   2. open" in capsys.readouterr().out


def test_a_gpu_of_unknown_memory_is_named_and_a_cpu_recipe_has_no_reserve(quick, capsys) -> None:
    words = ["--config", str(RECIPES / "distillation_math.yaml"), "--dry-run", "--elsewhere"]
    print_dry_run(words)
    output = capsys.readouterr().out
    assert "+ 60% of the GPU for vLLM" in output and "cluster.gpu_memory_gb is null" in output and "reserve" in output
    print_dry_run([*words, "cluster.gpu_memory_gb=80"])
    output = capsys.readouterr().out
    assert "% of the GPU" not in output and "is null" not in output and "engine cache" in output
    print_dry_run(["--config", str(RECIPES / "smollm2-context-cpu.yaml"), "--dry-run", "--elsewhere"])
    output = capsys.readouterr().out
    assert "reserve" not in output and "predicted peak memory" in output


def test_an_error_of_the_time_forecast_does_not_end_a_dry_run(quick, capsys, caplog) -> None:
    quick.setattr("distill.dry_run.time_table", lambda *_: 1 / 0)
    print_dry_run(["--config", str(RECIPES / "distillation_math.yaml"), "--dry-run", "--elsewhere"])
    assert "ZeroDivisionError" in caplog.text and "#   command: " in capsys.readouterr().out


def test_the_checklist_compares_the_forecast_with_the_gpu_of_this_machine_only(quick, capsys) -> None:
    words = ["--config", str(RECIPES / "distillation_math.yaml"), "--dry-run", "logger.wandb_enabled=false"]
    quick.setattr(torch.cuda, "is_available", lambda: True)
    quick.setattr("distill.distributed.cluster.check_gpus", lambda device: None)
    gpu = SimpleNamespace(total_memory=16 * 2**30, name="NVIDIA A10")
    quick.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for gigabytes, state in ((8, "FAILED"), (2000, "passed")):
        gpu.total_memory = gigabytes * 2**30
        print_dry_run(words)
        output = capsys.readouterr().out
        assert f"#   4. {state}" in output and f"GiB of {gigabytes}.0 GiB)" in output and "fits on" not in output
        print_dry_run([*words, "--elsewhere"])
        output = capsys.readouterr().out
        assert "#   4. open" in output and "the run fits on GPUs with at least" in output
    assert "#   8. open" in output


def test_a_gpu_build_of_torch_on_a_machine_without_gpu_plans_the_cpu(root, quick, capsys, caplog) -> None:
    warning = "no GPU was found: the run uses the CPU; set runtime.device=cpu if this is intended"
    words = [*_command(root, "device", "cluster.gpus_per_node=1"), "--dry-run", "runtime.device=auto"]
    quick.setattr(torch.cuda, "is_available", lambda: False)
    quick.setattr(torch.version, "cuda", "13.0")
    quick.setattr("distill.distributed.cluster.check_gpus", lambda device: None)
    for more, device in (
        ([], "CPU (this"),
        (["--elsewhere"], "GPUs"),
        (["cluster.gpu_memory_gb=80"], "GPUs"),
        (["cluster.gpu=h200"], "GPUs"),
        (["runtime.device=cpu"], "CPU,"),
    ):
        caplog.clear()
        print_dry_run([*words, *more])
        assert f"on 1 node, {device}" in capsys.readouterr().out
        assert (warning in caplog.text) == (not more)


def test_a_dry_run_forecasts_memory_and_time_for_the_named_gpu_on_any_machine(quick, capsys, caplog) -> None:
    """An H200 has 141 GB, of which 138.2 GiB are usable. The machine has no GPU, and then one of 16 GiB."""
    words = ["--config", str(RECIPES / "distillation_math.yaml"), "--dry-run", "logger.wandb_enabled=false"]
    quick.setattr("distill.distributed.cluster.check_gpus", lambda device: None)
    gpu = SimpleNamespace(total_memory=16 * 2**30, name="NVIDIA A10")
    quick.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for has_gpu in (False, True):
        quick.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        print_dry_run([*words, "cluster.gpu=h200"])
        output = capsys.readouterr().out
        assert "GiB of 138.2 GiB)" in output and " x h200: " in output and "reserve" in output
        print_dry_run([*words, "cluster.gpu=989/4800"])
        output = capsys.readouterr().out
        assert ("GiB of 16.0 GiB)" if has_gpu else "fits on GPUs") in output and " x 989/4800: " in output
        print_dry_run([*words, "cluster.gpu=h200", "cluster.gpu_memory_gb=80"])
        assert "GiB of 78.4 GiB)" in capsys.readouterr().out
    assert not any(record.name == "distill.distributed.cluster" for record in caplog.records)
    print_dry_run([*words, "cluster.gpu=h200", "runtime.device=cpu"])
    output = capsys.readouterr().out
    assert "predicted time" not in output and "reserve" not in output
    assert any(record.name == "distill.distributed.cluster" for record in caplog.records)


@pytest.mark.parametrize(("device", "gpu", "count"), [("auto", "h200", 2), ("cpu", "h200", 1), ("cpu", None, 0)])
def test_a_run_on_a_cpu_warns_if_the_recipe_names_a_gpu(device: str, gpu: str | None, count: int, caplog) -> None:
    warn_of_cpu(PlannedWorld(1, 1, torch.device("cpu")), device, gpu)
    assert len(caplog.records) == count and (f"cluster.gpu={gpu}" in caplog.text) is (gpu is not None)
    warn_of_cpu(PlannedWorld(1, 1, torch.device("cuda", 0)), device, gpu)
    assert len(caplog.records) == count


def test_the_teachers_own_tokenizer_and_template_are_checked_without_the_teachers_weights(root, quick, caplog) -> None:
    (root / "bad.jinja").write_text("{% for %}")
    words = [*_command(root, "teacher", "cluster.gpus_per_node=1"), "--dry-run", "teacher.model_name=owner/none"]
    print_dry_run([*words, f"teacher.tokenizer.name={root}/teacher"])
    caplog.clear()
    for key, value in (
        ("teacher.tokenizer.name", "/no/such"),
        ("teacher.tokenizer.chat_template", "/no/such.jinja"),
        ("teacher.tokenizer.chat_template", f"{root}/bad.jinja"),
    ):
        with pytest.raises(UserError) as caught:
            print_dry_run([*words, f"{key}={value}"])
        assert (caught.value.key, caught.value.value) == (key, value)
    print_dry_run([*words, "teacher.tokenizer.name=owner/tokenizer"])
    assert "teacher.tokenizer.name=owner/tokenizer is not in the download cache" in caplog.text


def test_a_dry_run_with_large_data_does_not_write_the_data_cache(root, quick, tmp_path: Path) -> None:
    quick.setattr("distill.data.cache.IN_MEMORY_BYTES", 0)
    quick.setenv("XDG_CACHE_HOME", str(tmp_path))
    print_dry_run([*_command(root, "large", "cluster.gpus_per_node=1"), "--dry-run"])
    assert not list(tmp_path.iterdir())


def test_the_run_directory_of_a_slurm_job_on_one_node_is_named(root, quick, capsys) -> None:
    command = _command(root, "folder", "cluster.gpus_per_node=1")
    words = [word for word in command if not word.startswith(("runtime.run_dir", "checkpointing.checkpoint_dir"))]
    print_dry_run([*words, "--dry-run", f"logger.log_dir={root}/runs", "checkpointing.checkpoint_dir=null"])
    output = capsys.readouterr().out
    assert f"run directory: a new {root}/runs/exp_NNN, or job_JOBID in a Slurm job\n" in output
    assert "checkpoints: checkpoints in the run directory" in output


def test_the_error_of_a_directory_that_cannot_be_created_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below/it", tmp_path / ("x" * 300) / "y"):
        with pytest.raises(OSError) as predicted:
            raise_if_not_creatable(path)
        with pytest.raises(OSError) as raised:
            path.mkdir(parents=True, exist_ok=True)
        assert predicted.value.errno == raised.value.errno, path
    raise_if_not_creatable(tmp_path / "a/b/c")
    raise_if_not_creatable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError):
        raise_if_not_creatable(tmp_path / "a/b/c")


def test_a_planned_world_returns_the_value_of_its_only_process() -> None:
    world = PlannedWorld(2, 4, torch.device("cpu"))
    assert (world.size, world.local_size, world.is_main) == (8, 4, True)
    assert world.gather(3) == [3] and world.broadcast("a") == "a"
    with pytest.raises(UserError, match="a=1"), world.all_or_none("x"), world.main_first():
        raise UserError("a=1", "set 2")


def test_a_difference_between_dry_run_and_run_is_found() -> None:
    refused, accepted, stopped = (2, "error: a=1: set 2\n"), (0, ""), (1, f"error: {STOPPED}\n")
    assert not difference(refused, refused, False) and not difference(accepted, stopped, False)
    assert not difference((0, "a=1 is not in the download cache: run"), (2, "error: a=1 is absent: b\n"), False)
    for dry, run, changed in (
        (accepted, refused, False),
        (refused, stopped, False),
        (refused, (2, "error: a=2: set 3\n"), False),
        (accepted, stopped, True),
        ((-1, "Traceback\n"), refused, False),
        ((0, "a=2 is not in the download cache: run scripts.fetch"), refused, False),
    ):
        assert difference(dry, run, changed)


def test_the_plan_shows_which_responses_a_step_trains_on() -> None:
    loop = [f"distillation.{key}" for key in ("train_on=right", "off_policy.share=0.25", "num_prompts_per_step=16")]
    schedule = ["policy.generation.max_new_tokens=20", "distillation.max_new_tokens_schedule=[[2,64]]"]
    recipe = ["--config", "recipes/my-distillation-1n4g.yaml", "policy.train_global_batch_size=16"]
    lines = list(_selection(load_config([*recipe, *loop, *schedule])))
    assert ["64" in line and "20" in line for line in lines] == [True, False, False]
    assert " 4 " in lines[1] and "right" in lines[2]
    assert not list(_selection(load_config(recipe[:2])))
