"""Check policy.scheduler: the stages of the learning rate schedule, their arguments and the milestones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from distill.config.schema import Config
from distill.errors import UserError, any_of, show

Rule = tuple[Callable[[Any], bool], str]
_FACTOR: Rule = lambda value: 0 < value <= 1, "a number above 0 and at most 1"
_STEPS: Rule = (lambda value: value >= 1 and value == int(value), "a whole number of at least 1")
_STAGES: dict[str, dict[str, Rule]] = {
    "torch.optim.lr_scheduler.LinearLR": {
        "start_factor": _FACTOR,
        "end_factor": (lambda value: 0 <= value <= 1, "a number between 0 and 1"),
        "total_iters": _STEPS,
    },
    "torch.optim.lr_scheduler.ConstantLR": {"factor": _FACTOR, "total_iters": _STEPS},  # torch divides by the factor
    "torch.optim.lr_scheduler.CosineAnnealingLR": {
        "T_max": _STEPS,
        "eta_min": (lambda value: value >= 0, "at least 0"),
    },
}
"""Maps the path of a scheduler class to a dict of its allowed arguments.

The dict maps an argument to (function that returns whether a value is allowed, description of the allowed values).
"""


def check_scheduler(config: Config) -> None:
    """Raise UserError for the first rule that policy.scheduler breaks."""

    def refuse(problem: str, fix: str) -> NoReturn:
        raise UserError(f"policy.scheduler {problem}", fix, key="policy.scheduler", value=config.policy.scheduler)

    for entry in config.policy.scheduler:
        if entry.name is None and entry.kwargs:
            refuse(f"has an entry with kwargs={show(entry.kwargs)} and no name", f"set its name to {any_of(_STAGES)}")
        if entry.name is not None and entry.milestones:
            refuse(
                f"has milestones={list(entry.milestones)} in the entry of {entry.name}",
                "move them to the last entry, which has no name",
            )
    stages = [entry for entry in config.policy.scheduler if entry.name]
    milestones = [step for entry in config.policy.scheduler for step in entry.milestones]
    for stage in stages:
        assert stage.name is not None
        rules = _STAGES[stage.name]
        for name, value in stage.kwargs.items():
            if name not in rules or type(value) not in (int, float):
                known = f"set numbers for {', '.join(sorted(rules))}"
                refuse(f"has the invalid argument {name}={show(value)} for {stage.name}", known)
            holds, rule = rules[name]
            if not (abs(value) <= sys.float_info.max and holds(value)):
                refuse(f"has {name}={show(value)} out of range for {stage.name}", f"set it to {rule}")
        if stage.name.endswith("CosineAnnealingLR") and "T_max" not in stage.kwargs:
            fix = "set it to the number of steps until the learning rate reaches eta_min"
            refuse(f"has no T_max for {stage.name}", fix)
    in_order = sorted({step for step in milestones if step >= 1})
    if len(milestones) != max(len(stages) - 1, 0) or milestones != in_order:
        refuse(
            f"has {len(stages)} stages and milestones={milestones}",
            "set milestones to one training step for each stage after the first, in increasing order",
        )
