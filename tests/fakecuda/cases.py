"""Run several cases in one process with fake CUDA: JSON of cases on stdin, JSON of counts on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tests.fakecuda import preload
from tests.fakecuda.build import Case


def run_cases(cases: Mapping[str, Case]) -> dict[str, Any]:
    """Run the cases in a new process with fake CUDA, and return the counts of each; see ``drive.counts``.

    The counts of a case that raised an error are ``{"error": traceback}``.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.fakecuda.cases"]
    text = json.dumps({name: asdict(case) for name, case in cases.items()})
    done = subprocess.run(
        command, input=text, env=preload.environment(), cwd=preload.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_cases_without_errors(cases: Mapping[str, Case]) -> dict[str, Any]:
    """Run the cases as ``run_cases`` does; fail if one of them raised an error."""
    found = run_cases(cases)
    for counts in found.values():
        assert "error" not in counts, counts["error"]
    return found


def main() -> int:
    """Run the cases of stdin."""
    from tests.fakecuda.drive import counts

    cases: dict[str, dict[str, Any]] = json.load(sys.stdin)
    found: dict[str, Any] = {}
    for name, fields in cases.items():
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        try:
            found[name] = counts(Case(**values))
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
