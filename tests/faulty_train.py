"""distill.train with one injected fault: ``torchrun ... -m tests.faulty_train`` instead of ``-m distill.train``.

The variable FAULT describes it as JSON: ``step`` (from 1; null: any), ``moment``, ``nth`` call of the moment's function
in that step, ``rank``, and ``what``: the name of a fault below, with an argument.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.distributed.program import exit_process
from distill.supervise.progress import CURRENT
from distill.train import main

FAULT_TIME = "FAULT_TIME_FILE"
"""Variable with the path of a file, to which the time of the fault is written, in seconds since the epoch."""

MOMENTS = {
    "loading": "distill.model.hf_load:load_weights",
    "sync": "distill.model.weights:GatheredWeights._finish",
    "generation": "distill.rollout.transformers_engine:TransformersEngine._forward",
    "vllm": "distill.rollout.vllm_loop:heartbeat",
    "cut": "distill.rollout.partial:_Phase.complete",
    "teacher": "distill.model.teacher:ScoringTeacher.targets",
    "forward": "distill.model.student:Student.loss",
    "backward": "torch:Tensor.backward",
    "optimizer": "distill.model.student:Student.end_step",
    "save": "distill.checkpoint:Checkpoints.save",
    "shards": "distill.checkpoint.async_save:Write._write",
    "bytes": "torch.distributed.checkpoint.filesystem:_write_item",
    "finish": "distill.checkpoint:Checkpoints._finish",
    "naming": "distill.checkpoint:Checkpoints._give_name",
    "validation": "distill.validation:Validation.generate",
}
"""Function before whose call the fault happens, as module:path."""


def launcher_and_ranks() -> tuple[int, list[int]]:
    """Return the process ids of torchrun's agent and of its ranks, this process last."""
    agent = os.getppid()
    children = (Path(f"/proc/{agent}/task/{agent}/children").read_text()).split()
    return agent, [pid for pid in map(int, children) if pid != os.getpid()] + [os.getpid()]


def kill_rank() -> None:
    """Kill this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze_rank() -> None:
    """Stop this rank and its store without closing connections, as a power failure of its machine does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_tree() -> None:
    """Kill the agent and all ranks."""
    agent, ranks = launcher_and_ranks()
    for pid in (agent, *ranks):
        os.kill(pid, signal.SIGKILL)


def kill_launcher() -> None:
    """Kill the agent only."""
    os.kill(os.getppid(), signal.SIGKILL)


def signal_launcher(name: str) -> None:
    """Send a signal to the agent, which forwards it to the ranks."""
    os.kill(os.getppid(), signal.Signals[name])


def signal_all(name: str) -> None:
    """Send a signal to agent and ranks, as a scheduler does; the ranks get it twice."""
    agent, ranks = launcher_and_ranks()
    for pid in (agent, *ranks):
        os.kill(pid, signal.Signals[name])


def signal_rank(name: str) -> None:
    """Send a signal to this rank only."""
    os.kill(os.getpid(), signal.Signals[name])


def signal_twice(name: str) -> None:
    """Send a signal, a second one after more than 5 s, and hang in the step."""
    signal_rank(name)
    time.sleep(6)
    signal_rank(name)
    hang()


def hang() -> None:
    """Hang in Python code."""
    while True:
        time.sleep(1)


def inject(fault: dict[str, Any]) -> None:
    """Wrap the moment's function, on the fault's rank."""
    if int(os.environ["RANK"]) != fault.get("rank", 0):
        return
    module, _, path = MOMENTS[fault["moment"]].partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    what, *arguments = fault["what"].split()
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        now = fault["step"] in (None, CURRENT.step)
        calls += now
        if now and calls == fault.get("nth", 1):
            calls += 1
            if FAULT_TIME in os.environ:
                Path(os.environ[FAULT_TIME]).write_text(str(time.time()), encoding="utf-8")
            if what in REPLACEMENTS:
                return REPLACEMENTS[what](original, *args, **kwargs)
            ACTIONS[what](*arguments)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def nan_loss(loss: Callable[..., Any], student: Any, *args: Any) -> Any:
    """Return a NaN loss with a finite gradient."""
    output = loss(student, *args)
    return replace(output, kl_sum=output.kl_sum + torch.tensor(torch.nan))


def nan_weight(loss: Callable[..., Any], student: Any, *args: Any) -> Any:
    """Set one weight of this rank's shard to NaN before the forward."""
    _set_weight_to_nan(student)
    return loss(student, *args)


def nan_weight_after(end_step: Callable[..., Any], student: Any) -> None:
    """Set one weight to NaN after the optimizer's step."""
    end_step(student)
    _set_weight_to_nan(student)


def _set_weight_to_nan(student: Any) -> None:
    with torch.no_grad():
        _, parameter = student.model.named_hf_parameters()[1]
        parameter.to_local().view(-1)[0] = torch.nan


ACTIONS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        *(kill_rank, kill_tree, kill_launcher, freeze_rank),
        *(signal_launcher, signal_all, signal_rank, signal_twice, hang),
    )
}
REPLACEMENTS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (nan_loss, nan_weight, nan_weight_after)}

if __name__ == "__main__":
    if "FAULT" in os.environ:
        inject(json.loads(os.environ["FAULT"]))
    exit_process(main())
