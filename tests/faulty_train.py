"""The program with a fault planted at one moment: ``torchrun ... -m tests.faulty_train`` instead of ``distill.train``.

The variable FAULT says which, as JSON: ``step`` (the first is 1; null: any), ``moment``, ``nth`` call of it in that
step, ``rank`` where it happens, and ``what`` does.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.distributed.program import exit_process
from distill.supervise.progress import CURRENT
from distill.train import main

FELL = "FAULT_FELL"
"""Variable that names a file for the time at which the fault happened, in seconds since the epoch."""

MOMENTS = {
    "loading": "distill.model.hf_load:load_weights",
    "sync": "distill.model.weights:GatheredWeights._finish",
    "generation": "distill.rollout.transformers_engine:TransformersEngine._forward",
    "vllm": "distill.rollout.vllm_engine:heartbeat",
    "data": "distill.batching.plan:view_of",
    "teacher": "distill.model.teacher:ShardedTeacher.targets",
    "forward": "distill.model.student:Student.loss",
    "backward": "torch:Tensor.backward",
    "optimizer": "distill.model.student:Student.end_step",
    "save": "distill.checkpoint:Checkpoints.save",
    "shards": "distill.checkpoint.async_save:Write._write",
    "bytes": "torch.distributed.checkpoint.filesystem:_write_item",
    "finish": "distill.checkpoint:Checkpoints._finish",
    "naming": "distill.checkpoint:Checkpoints._give_name",
    "validation": "distill.validation:Validation.answers",
    "metrics": "distill.metrics.sinks:Recorder.record",
}
"""What is about to be called at each moment."""


def launcher_and_ranks() -> tuple[int, list[int]]:
    """torchrun's agent, and the ranks that it started here, this process last."""
    agent = os.getppid()
    children = (Path(f"/proc/{agent}/task/{agent}/children").read_text()).split()
    return agent, [pid for pid in map(int, children) if pid != os.getpid()] + [os.getpid()]


def kill_rank() -> None:
    """kill -9 of this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze_rank() -> None:
    """This rank as it is on a machine that has no power, or hangs whole: there, and silent, its store with it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_tree() -> None:
    """kill -9 of agent and ranks."""
    agent, ranks = launcher_and_ranks()
    for pid in (agent, *ranks):
        os.kill(pid, signal.SIGKILL)


def kill_launcher() -> None:
    """kill -9 of the agent alone."""
    os.kill(os.getppid(), signal.SIGKILL)


def tell_launcher(name: str) -> None:
    """A signal to the agent, which hands it on."""
    os.kill(os.getppid(), signal.Signals[name])


def tell_all(name: str) -> None:
    """A signal to agent and ranks, as a scheduler sends it; the ranks get it twice."""
    agent, ranks = launcher_and_ranks()
    for pid in (agent, *ranks):
        os.kill(pid, signal.Signals[name])


def tell_rank(name: str) -> None:
    """A signal to this rank alone."""
    os.kill(os.getpid(), signal.Signals[name])


def tell_twice(name: str) -> None:
    """A request to stop, a later one, and never the end of the step."""
    tell_rank(name)
    time.sleep(6)
    tell_rank(name)
    hang()


def hang() -> None:
    """Never come back."""
    while True:
        time.sleep(1)


def hang_in_c() -> None:
    """Never come back, in a call that holds the interpreter's lock."""
    import ctypes

    ctypes.PyDLL(None).pause()


def plant(fault: dict[str, Any]) -> None:
    """Wrap what the moment calls, on the rank that is meant."""
    if int(os.environ["RANK"]) != fault.get("rank", 0):
        return
    module, _, path = MOMENTS[fault["moment"]].partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    does, *arguments = fault["what"].split()
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        now = fault["step"] in (None, CURRENT.step)
        calls += now
        if now and calls == fault.get("nth", 1):
            calls += 1
            if FELL in os.environ:
                Path(os.environ[FELL]).write_text(str(time.time()), encoding="utf-8")
            if does in PLANTED:
                return PLANTED[does](original, *args, **kwargs)
            DOES[does](*arguments)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def nan_loss(loss: Callable[..., Any], student: Any, *args: Any) -> Any:
    """A loss that is nan, though its gradient is not."""
    output = loss(student, *args)
    return type(output)(output.kl_sum + torch.tensor(torch.nan), output.stats)


def nan_weight(loss: Callable[..., Any], student: Any, *args: Any) -> Any:
    """One weight of this rank's shard becomes nan before the forward."""
    _poison(student)
    return loss(student, *args)


def nan_weight_after(end_step: Callable[..., Any], student: Any) -> None:
    """One weight becomes nan after the optimizer's step."""
    end_step(student)
    _poison(student)


def _poison(student: Any) -> None:
    with torch.no_grad():
        _, parameter = student.model.named_hf_parameters()[1]
        parameter.to_local().view(-1)[0] = torch.nan


DOES: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        *(kill_rank, kill_tree, kill_launcher, freeze_rank),
        *(tell_launcher, tell_all, tell_rank, tell_twice, hang, hang_in_c),
    )
}
PLANTED: dict[str, Callable[..., Any]] = {f.__name__: f for f in (nan_loss, nan_weight, nan_weight_after)}

if __name__ == "__main__":
    if "FAULT" in os.environ:
        plant(json.loads(os.environ["FAULT"]))
    exit_process(main())
