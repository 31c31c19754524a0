"""The acceptance command: limits, crashes, cut-off, results and exit codes, with small parts; and some real parts."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.accept import runner as runner_module
from scripts.accept import runs
from scripts.accept.__main__ import main, selection
from scripts.accept.parts import PARTS, RANK_GROUPS, START_OF_ENGINE, Part, missing
from scripts.accept.processes import Place
from scripts.accept.results import Bound, Check, PartResult, Report, at_least, at_most, exactly
from scripts.accept.runner import Runner
from scripts.accept.settings import Context, Settings
from scripts.launch import ROOT
from tests.scripts import accept_parts

MIB = 2**20
HERE = "tests.scripts.accept_parts"


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (at_most(0.05), (0.05, -math.inf), (0.0501, math.nan)),
        (at_least(0.9), (0.9,), (0.8999, math.nan)),
        (exactly(12), (12.0,), (11.0, 13.0, math.nan)),
    ],
)
def test_a_bound_includes_its_limit_and_excludes_nan(bound: Bound, inside, outside) -> None:
    assert all(Check("x", value, bound=bound).verdict == "ok" for value in inside)
    assert all(Check("x", value, bound=bound).verdict == "FAILED" for value in outside)


def test_a_check_survives_json() -> None:
    for check in (Check("a", 1.5, "s", at_most(2), "n"), Check("b", None, bound=exactly(3)), Check("c", math.inf)):
        assert Check.from_json(json.loads(json.dumps(check.as_json()))) == check
    assert [Check("a", 1.0).verdict, Check("b", None, bound=exactly(3)).verdict] == ["", "n/a"]


def _part(name: str, group: str = "one", kind: Any = "proof", limit: float = 60, needs: Any = ()) -> Part:
    """Return a part of accept_parts.py; its function is the first word of ``name``."""
    return Part(name, kind, group, needs, limit, f"{HERE}:{name.split()[0]}", "a part for tests")


def _run(tmp_path: Path, *parts: Part, seconds: float = 600, facts: Any = None) -> dict[str, dict]:
    """Run parts; return the written results by name. Parts that hang have a limit of half a second."""
    (tmp_path / "scratch").mkdir()
    settings = Settings(str(tmp_path), str(tmp_path / "scratch"), "cpu", 2)
    report = Report(tmp_path, {}, [PartResult(part.name, part.kind) for part in parts])
    Runner(settings, Place(), report, seconds, facts=facts or {}).run(parts)
    written = json.loads((tmp_path / "accept.json").read_text())
    assert written["finished"] and written["passed"] == report.passed
    return {part["name"]: part for part in written["parts"]}


def test_every_part_has_its_status_and_reason_and_an_error_ends_only_its_part(tmp_path) -> None:
    names = ("ok", "out_of_bounds", "error", "not_applicable", "ok again")
    found = _run(tmp_path, *map(_part, names))
    statuses = [found[name]["status"] for name in names]
    assert statuses == ["ok", "FAILED", "FAILED", "n/a", "ok"]
    assert "two" in found["out_of_bounds"]["reason"] and found["not_applicable"]["reason"] == "no reason"
    assert found["error"]["reason"].startswith("RuntimeError: out of memory")
    assert [number["name"] for number in found["error"]["numbers"]] == ["before"], "checks before the error are kept"
    first, again = (found[name]["numbers"][0]["note"] for name in ("ok", "ok again"))
    assert first != again, "a new process after an error"


def _alive(pid: float) -> bool:
    status = Path(f"/proc/{pid:.0f}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_hang_and_a_crash_end_only_their_parts_and_leave_no_process(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner_module, "START_LIMIT", 1.5)
    found = _run(tmp_path, _part("hang", limit=0.5), _part("crash"), _part("ok"))
    assert [part["status"] for part in found.values()] == ["FAILED", "FAILED", "ok"]
    assert "limit" in found["hang"]["reason"] and "SIGKILL" in found["crash"]["reason"]
    assert "in hang" in (tmp_path / "logs/one/rank_0.log").read_text(), "tracebacks"
    assert not _alive(found["hang"]["numbers"][0]["value"]), "the child process of a killed part"


def test_an_error_on_another_rank_fails_the_part(tmp_path) -> None:
    found = _run(tmp_path, _part("crash_of_last_rank", "ranks"), _part("ok", "ranks"))
    assert "ValueError: bad rank" in found["crash_of_last_rank"]["reason"] and found["ok"]["status"] == "ok"


def test_results_are_written_after_every_part(tmp_path) -> None:
    found = _run(tmp_path, _part("ok"), _part("written", "two"), _part("written again", "three"))
    assert [found[name]["numbers"][0]["value"] for name in ("written", "written again")] == [1, 2]
    assert (tmp_path / "accept.txt").read_text().count("written") == 2


def test_parts_that_lack_a_need_or_time_do_not_run(tmp_path) -> None:
    parts = [_part("ok", needs=("gpu", "vllm")), _part("ok here", needs=("config",)), _part("ok late", kind="timing")]
    found = _run(tmp_path, *parts, seconds=1, facts={"gpu": True, "config": True, "no vllm": "vLLM is not installed"})
    assert (found["ok"]["status"], found["ok"]["reason"]) == ("n/a", "vLLM is not installed")
    assert found["ok here"]["status"] == found["ok late"]["status"] == "not run"


@pytest.mark.parametrize(
    ("statuses", "passed"),
    [
        ({"a": "ok", "b": "n/a"}, True),
        ({"a": "ok", "b": "FAILED"}, False),
        ({"a": "n/a"}, False),
        ({"a": "ok", "b": "not run"}, False),
        ({"a": "ok", "timing": "not run"}, True),
    ],
)
def test_a_report_passes_if_nothing_failed_and_all_proofs_ran(tmp_path, statuses, passed) -> None:
    parts = [PartResult(name, "timing" if name == "timing" else "proof", status) for name, status in statuses.items()]
    assert Report(tmp_path, {}, parts).passed == passed


CUT_OFF = f"""
import sys
from scripts.accept import __main__ as command, parts
part = lambda name: parts.Part(name, "proof", "one", (), 500, "{HERE}:" + name, "a part for tests")
command.selection = lambda *_: [part("ok"), part("hang"), part("crash")]
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_the_results_so_far_and_no_process(tmp_path, number) -> None:
    command = [sys.executable, "-u", "-c", CUT_OFF, "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("ok")
        events = tmp_path / "logs/one/events.0.jsonl"
        while "child" not in events.read_text():  # the second part hangs
            time.sleep(0.02)
        process.send_signal(number)
        output = process.stdout.read()
    assert process.returncode == 128 + number
    found = json.loads((tmp_path / "accept.json").read_text())
    assert [part["status"] for part in found["parts"]] == ["ok", "not run", "not run"] and not found["finished"]
    assert number.name in found["parts"][1]["reason"] and "unfinished" in output
    children = [json.loads(line)["check"]["value"] for line in events.read_text().splitlines() if "child" in line]
    assert not _alive(children[0])
    assert not list(tmp_path.glob(".accept*"))


def test_wrong_arguments_exit_with_code_2_and_one_sentence(tmp_path, capsys) -> None:
    assert main(["--only", "no such part", "--out", str(tmp_path)]) == 2
    assert main(["--model", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_proofs_precede_timings_and_a_selection_includes_what_it_needs() -> None:
    kinds = [part.kind for part in PARTS.values()]
    assert kinds == sorted(kinds), "proof < timing"
    assert [part.name for part in selection(["sync"], [], False)] == ["environment", "model", "sync"]
    assert [part.name for part in selection(["sync"], [], True)] == ["environment", "sync"]
    assert "vLLM alone" not in {part.name for part in selection([], ["timing"], False)}
    assert sum(part.limit for part in PARTS.values() if part.name == "environment") <= 60


def test_every_part_has_a_function_and_groups_are_consecutive() -> None:
    groups = [part.group for part in PARTS.values()]
    assert [g for i, g in enumerate(groups) if g not in groups[:i]] == [
        g for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]
    ]
    assert set(RANK_GROUPS) <= set(groups)
    for part in PARTS.values():
        module, _, function = part.source.partition(":")
        text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        assert f"\ndef {function}(context: Context)" in text, part.source


def test_a_missing_need_gives_its_reason() -> None:
    part = PARTS["vLLM start"]
    facts = dict.fromkeys(("vllm", "transformers", "model", "engine"), True)
    assert missing(part, facts) == ""
    assert "not installed" in missing(part, {**facts, "vllm": False, "no vllm": "vLLM is not installed"})


def test_parts_with_an_engine_are_not_applicable_after_an_error_of_its_start(tmp_path) -> None:
    def part(name: str, source: str) -> Part:
        return Part(name, "proof", "one", ("engine",), 60, f"{HERE}:{source}", "a part for tests")

    found = _run(tmp_path, part(START_OF_ENGINE, "error"), part("sync", "ok"), facts={"engine": True})
    assert [(one["status"], one["reason"][:7]) for one in found.values()] == [("FAILED", "Runtime"), ("n/a", "vLLM di")]


def test_the_ports_of_a_group_do_not_depend_on_failures_in_other_groups(tmp_path) -> None:
    """Another node may have no such failure; its ranks must use the same ports."""
    settings = Settings(str(tmp_path), str(tmp_path), "cpu", 2, nodes=2)
    runner = Runner(settings, Place(2, 0, "node1", 20_000), Report(tmp_path, {}, []), 600)
    before = {group: runner._port_offset(group) for group in RANK_GROUPS}
    runner._groups += ["kernels", "kernels", "vllm"]
    assert before == {group: runner._port_offset(group) for group in RANK_GROUPS}
    runner._groups.append("ranks")
    offsets = [runner._port_offset(group) for group in RANK_GROUPS]
    assert len({*before.values(), *offsets}) == len(RANK_GROUPS) + 1


def test_gpus_that_torch_does_not_find_fail_the_environment(tmp_path, monkeypatch) -> None:
    from scripts.accept.environment import environment

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("distill.distributed.hardware.shown_gpus", lambda: "the driver shows 1 GPU")
    context = Context(Settings(str(tmp_path), str(tmp_path), "cpu", 1))
    failed = [found for found in environment(context) if isinstance(found, Check) and found.passed is False]
    assert len(failed) == 1 and "shows 1 GPU" in failed[0].note


def test_the_place_among_nodes_is_read_from_torchrun_and_slurm() -> None:
    rendezvous = {"MASTER_ADDR": "node1", "MASTER_PORT": "20000"}
    agent = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}
    for environment in (agent, step):
        assert Place.of({**environment, **rendezvous}) == Place(2, 1, "node1", 20001)
    assert Place.of({}) == Place.of({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Place()
    for wrong in ({**agent, "LOCAL_WORLD_SIZE": "2"}, {**step, "SLURM_STEP_NUM_NODES": "1"}, step):
        with pytest.raises(ValueError, match=r"ranks|torchrun|srun|MASTER"):
            Place.of({**wrong, **({} if wrong is step else rendezvous)})


def test_a_run_that_resumes_with_other_data_or_metrics_is_found(tmp_path) -> None:
    for name, prompts in (("complete", "abcd"), ("stopped", "abdc")):
        (tmp_path / name / "train_samples").mkdir(parents=True)
        for step, prompt in enumerate(prompts, 1):
            (tmp_path / name / f"train_samples/step_{step}.jsonl").write_text(json.dumps({"prompt": prompt}))
        rows = [{"step": i, "train/loss": float(i), "timing/x": ord(prompts[0])} for i in range(1, 5)]
        rows[3]["train/loss"] += name == "stopped"
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    checks = {check.name: check for check in runs.compare_runs(tmp_path, on_gpu=False)}
    values = [check.value for check in checks.values()]
    assert values == [4, 2, 1] and "train/loss" in list(checks.values())[2].note
    assert list(runs.compare_runs(tmp_path, on_gpu=True))[2].passed is None


def test_all_nodes_use_the_same_models_and_runs_but_their_own_logs() -> None:
    nodes = [Settings("out", f"scratch{node}", "cpu", 1, nodes=2, node=node) for node in range(2)]
    assert len({(settings.student, settings.teacher, settings.runs) for settings in nodes}) == 1
    assert len({settings.folder for settings in nodes}) == 2
    assert Settings("out", "scratch", "cpu", 1).student == Path("scratch/models/student")


def test_layouts_use_all_axes_that_the_ranks_allow() -> None:
    from scripts.accept.layouts import layouts_for

    assert {(1, 1, 1)} == {(x.tp, x.cp, x.replicas) for x in layouts_for(1)}
    assert {(2, 1, 1), (1, 2, 1), (1, 1, 2)} < {(x.tp, x.cp, x.replicas) for x in layouts_for(2)}
    assert {(2, 2, 1), (4, 1, 1), (2, 1, 2)} < {(x.tp, x.cp, x.replicas) for x in layouts_for(8)}
    for ranks in (1, 2, 3, 4, 6, 8, 12, 16):
        for layout in layouts_for(ranks):
            assert (
                ranks % (layout.tp * layout.cp) == ranks % (layout.replicas * layout.tp) == ranks % layout.teacher == 0
            )


def test_growth_is_measured_from_the_second_cycle() -> None:
    from scripts.accept.engine_checks import growth

    check = growth("memory", [0, 100 * MIB, 900 * MIB, 400 * MIB], 4, at_most(256))
    assert (check.value, check.passed) == (300.0, False) and "800" in check.note
    assert growth("memory", [0, 100 * MIB, 356 * MIB], 3, at_most(256)).passed is True
    assert growth("memory", [], 3, at_most(256)).passed is None


def test_exchanged_rows_keep_the_plain_sum_of_bits_and_scaled_weights_do_not() -> None:
    from distill.model.checksum import bit_sums_by_name
    from scripts.accept.engine_stage import exchange_rows, grow, one_of_each_kind, storage_bytes

    for weights in (torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.arange(6.0).view(3, 2)):
        exchanged, scaled = weights.clone(), weights.clone()
        exchange_rows(exchanged)
        grow(scaled)
        named = {"before": weights, "exchanged": exchanged, "scaled": scaled}
        sums = bit_sums_by_name([(name, tensor.bfloat16()) for name, tensor in named.items()])
        assert sums["exchanged"].plain == sums["before"].plain != sums["scaled"].plain
        assert sums["exchanged"].weighted != sums["before"].weighted
    base = torch.zeros(10, dtype=torch.int64)
    assert storage_bytes([base[:3], [base[5:], base], torch.zeros(4, dtype=torch.int16)]) == 88
    first = ["embed.weight", "l.0.q_proj.weight", "l.0.q_proj.bias", "l.1.norm.weight"]
    assert one_of_each_kind([*first, "l.1.q_proj.weight"]) == first


def test_speed_is_the_median_without_the_first_pass_relative_to_vllm_alone() -> None:
    from scripts.accept.speed import compare

    peer = {"plain": [9.0, 4.0, 5.0], "like_ours": [2.5]}
    ours, equal, plain = compare([0.1, 4.0, 1.0, 10.0], peer, bounded=True)
    assert (ours.value, equal.value, equal.passed, plain.value, plain.passed) == (4.0, 1.6, True, 0.8, None)
    assert list(compare([1.0, 2.0], peer, bounded=True))[1].passed is False
    assert list(compare([1.0, 2.0], peer, bounded=False))[1].passed is None


BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("omegaconf", "tyro"):
            raise ModuleNotFoundError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Missing())
from importlib import import_module
for module in ("layouts", "engine_checks", "kernels", "attention", "models", "collectives", "speed"):
    import_module(f"scripts.accept.{module}")
from scripts.accept.engine_stage import config_of
from scripts.accept.environment import environment
from scripts.accept.layouts import step_config
from scripts.accept.settings import Context, Settings
from scripts.bench_loss import __main__
settings = Settings(sys.argv[1], sys.argv[1], "cpu", 1)
config_of(settings), step_config(settings, "float32")
facts = [found["facts"] for found in environment(Context(settings)) if isinstance(found, dict) and "facts" in found]
sys.exit(facts[0]["config"] or not facts[0]["torch"] or "omegaconf" not in facts[0]["no config"])
"""


@pytest.mark.slow
def test_most_parts_need_neither_omegaconf_nor_tyro(tmp_path) -> None:
    """A machine may have only torch, triton and transformers."""
    subprocess.run([sys.executable, "-c", BLOCKED, str(tmp_path)], cwd=ROOT, check=True)


def test_wrong_kernels_are_found(monkeypatch) -> None:
    from distill.kernels import loss_student, topk
    from scripts.accept import kernels

    def errors() -> list[float]:
        generator = torch.Generator().manual_seed(0)
        z_CV = 3 * torch.randn(2, 300, generator=generator)
        return [kernels.topk_error(z_CV.clone(), 8), *kernels.student_errors(z_CV, 8, generator)]

    assert all(error <= bound for error, bound in zip(errors(), (1e-4, 1e-5, 1e-2), strict=True))
    right = loss_student.gradient_rows, topk.topk_with_tail
    monkeypatch.setattr(loss_student, "gradient_rows", lambda *args: right[0](*args).mul_(1.1))
    monkeypatch.setattr(topk, "topk_with_tail", lambda z_CV, k, inverse: right[1](z_CV, k, inverse * 1.001))
    found = errors()
    assert found[0] > 1e-4 and found[1] <= 1e-5 and found[2] > 1e-2


@pytest.mark.parametrize(("scale", "fails"), [(None, False), (0.1, True)])
def test_a_wrong_scale_raises_the_attention_error_above_its_bound(monkeypatch, scale, fails) -> None:
    from scripts.accept.attention import attention_error_ratio
    from tests.model.test_attention import _flash

    def flash(q, k, v, *args, **options) -> torch.Tensor:
        return _flash(*(tensor.float() for tensor in (q, k, v)), *args, **{**options, "scale": scale}).bfloat16()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    assert (attention_error_ratio(torch.device("cpu"), 128, 100) > 1.2) == fails


def test_the_parts_of_these_tests_are_not_parts_of_the_command() -> None:
    assert not set(vars(accept_parts)) & set(PARTS)
