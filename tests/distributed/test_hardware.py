"""GPUs that torch cannot use are refused; the devices of all ranks as text. All GPUs here are fakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from distill.distributed import hardware
from distill.distributed.hardware import RankDevice, TorchBuild, check_devices, check_gpus, describe_devices
from distill.errors import UserError

CPU_BUILD = TorchBuild("2.13.0+cpu", None, False)
BLIND = TorchBuild("2.13.0+cu130", "13.0", False)
H100 = "NVIDIA H100 80GB HBM3"
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\nGCC version: 12\n"


class FakeMachine:
    """A root folder with the files of a machine's driver, and the torch that is installed on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        for name in [name for name in os.environ if name.startswith(("SLURM_", "CUDA_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PATH", str(root / "bin"))
        monkeypatch.setattr(hardware, "_ROOT", root)
        self.install(CPU_BUILD)

    def install(self, build: TorchBuild) -> None:
        self.patch.setattr(hardware, "torch_build", lambda: build)

    def write(self, path: str, text: str = "") -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def refused(self, device: str = "auto") -> str:
        with pytest.raises(UserError) as caught:
            check_gpus(device)
        assert (caught.value.key, caught.value.value) == ("runtime.device", device)
        check_gpus("cpu")
        return str(caught.value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(tmp_path, monkeypatch)


def test_a_machine_without_gpus_is_refused_with_device_cuda_only(machine: FakeMachine) -> None:
    machine.write("dev/nvidiactl")  # left by a driver without devices
    check_gpus("auto")
    assert "set runtime.device=auto or cpu" in machine.refused("cuda")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidia-uvm": ""}, "2 GPUs"),
        ({"proc/driver/nvidia/gpus/0000:01:00.0": ""}, "1 GPU "),
        ({"bin/nvidia-smi": "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho 'GPU 1: NVIDIA H100'\n"}, "2 GPUs"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4"),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
    ],
    ids=["device files", "proc", "nvidia-smi", "gpus on node", "gpus of job"],
)
def test_gpus_that_a_torch_without_cuda_cannot_use_are_refused(machine: FakeMachine, shown, expected) -> None:
    for name, text in shown.items():
        if "/" in name:
            machine.write(name, text).chmod(0o755)
        else:
            machine.patch.setenv(name, text)
    message = machine.refused()
    assert expected in message and CPU_BUILD.version in message and "make venv-gpu" in message
    assert machine.refused("cuda") == message.replace("=auto", "=cuda")
    machine.install(TorchBuild("2.13.0+cu130", "13.0", True))
    check_gpus("auto")


def test_a_job_without_gpus_and_a_broken_nvidia_smi_are_not_refused(machine: FakeMachine) -> None:
    machine.patch.setenv("SLURM_GPUS_ON_NODE", "0")
    machine.write("bin/nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n").chmod(0o755)
    check_gpus("auto")
    (machine.root / "bin/nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    machine.patch.setattr(hardware, "_SMI_TIMEOUT_S", 0.1)
    check_gpus("auto")


def test_the_cause_and_the_fix_are_named_for_a_torch_with_cuda(machine: FakeMachine) -> None:
    machine.write("proc/driver/nvidia/gpus/0000:01:00.0")
    machine.install(BLIND)
    assert "install the NVIDIA driver" in machine.refused()
    machine.write("proc/driver/nvidia/version", DRIVER.format("535.104.05"))
    assert hardware.driver_version() == "535.104.05"
    message = machine.refused()
    assert "CUDA 13.0" in message and "580 or newer" in message and "535.104.05" in message
    machine.write("proc/driver/nvidia/version", DRIVER.format("580.65.06"))
    assert "docker run --gpus all" in machine.refused()
    machine.write("dev/nvidia0")
    assert "repair the driver" in machine.refused()
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in machine.refused()


def gpus(host: str, number: int, name: str = H100) -> list[RankDevice]:
    return [RankDevice(host, "cuda", name, f"GPU-{i}", "580.65.06") for i in range(number)]


def cpus(host: str, number: int = 2) -> list[RankDevice]:
    return [RankDevice(host, "cpu", "AMD EPYC, 2 cores", host, None)] * number


def test_the_devices_of_all_ranks_are_counted() -> None:
    assert describe_devices(gpus("a", 4)) == f"4 x {H100}"
    assert describe_devices(gpus("a", 4) + gpus("b", 4)) == f"8 x {H100} (2 nodes)"
    assert describe_devices(gpus("a", 2) + gpus("b", 4, "NVIDIA A100")) == f"2 x {H100} + 4 x NVIDIA A100 (2 nodes)"
    assert describe_devices(gpus("a", 1) * 2) == f"1 x {H100}", "two ranks share a GPU"
    assert describe_devices(cpus("a")) == "the CPU of a (AMD EPYC, 2 cores)"
    assert describe_devices(cpus("a") + cpus("b")) == "2 nodes' CPUs (AMD EPYC, 2 cores)"


def test_ranks_with_and_without_a_gpu_are_refused_together() -> None:
    check_devices(gpus("a", 2) + gpus("b", 2))
    with pytest.raises(UserError, match=r"rank 2 on b"):
        check_devices(gpus("a", 2) + cpus("b"))


def test_the_name_of_a_cpu_has_no_trademarks(machine: FakeMachine) -> None:
    machine.write("proc/cpuinfo", "model name\t: Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz\n")
    assert hardware.cpu_name().startswith("Intel Xeon Platinum 8480C, ")
    machine.write("proc/cpuinfo", "CPU implementer\t: 0x41\n")
    found = hardware.device_of_rank("cpu", None)
    assert found.name and not found.name.startswith(",") and found.driver is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_described() -> None:
    found = hardware.device_of_rank("cuda", 0)
    assert found.name == torch.cuda.get_device_name(0) and found.uid and found.driver
    assert hardware.shown_gpus() and hardware.torch_build().finds_gpu
