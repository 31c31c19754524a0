"""The loop itself, on stand-ins for everything that it calls."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from distill import train
from distill.errors import CollectiveUserError, RunFailed
from distill.rollout import gather as exchange
from distill.types import TeacherRows


def test_the_teachers_rows_and_head_go_with_the_batch_that_they_were_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them may lie beside a checkpoint, the next generation, or the next step's."""
    made: list[weakref.ref[Any]] = []
    seen: list[tuple[str, int]] = []

    def look(where: str, *_: Any) -> Any:
        seen.append((where, sum(tensor() is not None for tensor in made)))
        return []

    def made_here(*shape: int) -> torch.Tensor:
        tensor = torch.zeros(*shape)
        made.append(weakref.ref(tensor))
        return tensor

    class Teacher:
        head: torch.Tensor | None = None

        def onload(self) -> None:
            look("before the targets")

        def targets(self, micro_batch: object) -> TeacherRows:
            if self.head is None:
                self.head = made_here(4, 2)
            return TeacherRows(made_here(3, 2), self.head)

        def offload(self) -> None:
            look("offload")

        def after_step(self, student: object) -> None:
            self.head = None

    student = SimpleNamespace(
        learning_rate=0.0,
        train=lambda *_: look("train"),
        end_step=lambda: look("end of step"),
        **dict.fromkeys(("onload", "offload"), lambda: None),
    )
    run: Any = SimpleNamespace(
        student=student,
        teacher=Teacher(),
        engine=SimpleNamespace(replica=0, replicas=1, generate=lambda *_: look("generation"), sleep=lambda: None),
        first_step=0,
        last_step=2,
        phases=lambda step: lambda name: contextlib.nullcontext(),
        order=SimpleNamespace(batch=lambda step: []),
        sync=SimpleNamespace(push_weights=lambda *_: None),
        world=SimpleNamespace(all_or_none=lambda what: contextlib.nullcontext()),
        views=SimpleNamespace(add=lambda mine: (mine, {})),
        validation=SimpleNamespace(answers=lambda step: None, report=lambda answers: None),
        checkpoints=SimpleNamespace(finalize_pending=lambda block: look("settled" if not block else "waited")),
        validate_at_end=lambda: None,
        begin=lambda: None,
        finite=lambda *_: contextlib.nullcontext(),
        ends_early=lambda step: False,
        leaves_unjudged=lambda step: False,
        save_if_due=lambda step: look("checkpoint"),
        record=lambda *_: None,
        **dict.fromkeys(("sampling", "layout", "packing", "seed")),
    )
    monkeypatch.setattr(train, "plan", lambda *_: [("a", "b"), ("c",)])
    monkeypatch.setattr(exchange, "gather_rollouts", lambda *_, version: [])
    train.train(run)
    # Three rows and one head; two rows go with the first batch, one with the second, the head after the step.
    step = [("generation", 0), ("settled", 0), ("before the targets", 0), ("offload", 4), ("train", 4), ("train", 2)]
    assert seen == [*step, ("end of step", 1), ("checkpoint", 0)] * 2


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_a_dry_run_trains_nothing_in_both_spellings(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "start_process", lambda: None)
    monkeypatch.setattr(train, "run_program", MagicMock(side_effect=AssertionError))
    monkeypatch.setattr("distill.memory.forecast.dry_run", lambda config: ["# forecast"])
    assert train.main([flag]) == 0
    printed = capsys.readouterr().out
    assert "max_num_steps" in printed and "# forecast" in printed


@pytest.mark.parametrize("error", [CollectiveUserError("a full disk"), RunFailed("no number")])
def test_a_checkpoint_on_its_way_is_made_whole_before_all_ranks_leave(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = MagicMock()
    monkeypatch.setattr(train, "run_program", lambda program: program(MagicMock()))
    monkeypatch.setattr(train, "parse_args", lambda argv: SimpleNamespace(dry_run=False))
    monkeypatch.setattr(train, "start_process", lambda: None)
    monkeypatch.setattr("distill.build.build_run", lambda arguments, world: run)
    monkeypatch.setattr(train, "train", MagicMock(side_effect=error))
    with pytest.raises(type(error)):
        train.main([])
    run.checkpoints.finalize_pending.assert_called_once_with(block=True)
    run.finish.assert_not_called()
