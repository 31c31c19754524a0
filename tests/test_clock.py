"""Prompts are the same on all ranks and after every resume: the run's clock, and hashes of what prompts are made from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from distill.config import DatasetConfig
from distill.data import clock as clock_module
from distill.data.clock import RunClock
from distill.data.content import changed_parts, data_content, raise_if_ranks_differ, tokenizer_content
from distill.data.prompts import PromptOrder, Prompts, chat_ids, load_prompts
from distill.types import UserError
from tests.helpers import free_port, run_ranks
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _mains, _train_rows, make_tiny_run
from tests.tiny_tokenizer import CHATML, tiny_tokenizer

DATED = (
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    "{% if date_string is not defined %}{% set date_string = today() %}{% endif %}<|im_start|>{{ date_string }}\n"
)
"""The date as Llama's templates write it; inside a macro, whose names come from the same place."""
FIRST = datetime(2024, 7, 26, 23, 59, 59, tzinfo=timezone(timedelta(hours=2)))
CHAT = [{"role": "user", "content": "What is 3?"}]


def rendered(clock: RunClock, kwargs: dict[str, Any] | None = None, template: str = DATED + CHATML) -> str:
    tokenizer = tiny_tokenizer(template)
    (ids,) = chat_ids(tokenizer, [CHAT], clock.template_kwargs(tokenizer, kwargs, "policy.tokenizer.x"))
    return str(tokenizer.decode(ids))


# -- the clock --------------------------------------------------------------------------------------------------------


def test_a_template_sees_the_time_of_the_first_start() -> None:
    clock = RunClock(FIRST)
    assert not clock.was_read
    assert rendered(clock).startswith("<|im_start|>26 Jul 2024\n") and clock.was_read
    assert rendered(RunClock.saved(str(clock))) == rendered(clock)
    assert clock.strftime_now(format="%H:%M %s %%s %z") == "23:59 1722031199 %s "


def test_a_saved_clock_does_not_depend_on_the_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = "%c %x %X %A %B %j %s %Z"
    seen = set()
    for zone in ("UTC", "Asia/Tokyo", "America/Los_Angeles"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        seen.add(RunClock.saved(str(RunClock(FIRST))).strftime_now(everything))
    monkeypatch.undo()
    time.tzset()
    assert len(seen) == 1, seen


def test_a_date_of_the_recipe_wins_and_a_template_without_dates_gets_nothing() -> None:
    clock, plain = RunClock(FIRST), tiny_tokenizer()
    assert rendered(clock, {"date_string": "1 May"}).startswith("<|im_start|>1 May\n") and not clock.was_read
    for kwargs in (None, {"enable_thinking": False}):
        assert clock.template_kwargs(plain, kwargs, "policy.tokenizer.x") == kwargs
    named = {"chat_template": DATED + CHATML}  # apply_chat_template takes a template as an argument too
    assert "strftime_now" in (clock.template_kwargs(plain, named, "policy.tokenizer.x") or {})


def test_a_recipe_can_not_replace_the_clock() -> None:
    with pytest.raises(UserError, match=r"^teacher\.x\.strftime_now=today can't be used.*date_string"):
        RunClock(FIRST).template_kwargs(tiny_tokenizer(), {"strftime_now": "today"}, "teacher.x")


@pytest.mark.parametrize("part", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_random_numbers_is_refused(part: str) -> None:
    with pytest.raises(UserError, match="writes another text each time"):
        chat_ids(tiny_tokenizer(part + CHATML), [CHAT])
    assert chat_ids(tiny_tokenizer("at random" + CHATML), [CHAT]), "the word alone is no draw"


# -- what prompts are made from ---------------------------------------------------------------------------------------


def inputs(folder: Path, changes: dict[str, Any], day: datetime = FIRST) -> PromptOrder:
    """The prompts of three problems under one change, with everything in the folder made anew."""
    given: dict[str, Any] = {
        "problems": ["1", "2", "3"],
        "prompt": "{}",
        "system": "",
        "template": DATED + CHATML,
        "kwargs": None,
        "extra": (),
        "solution": "a",
        **changes,
    }
    folder.mkdir()
    rows = [{"input": text, "solution": given["solution"]} for text in given["problems"]]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt.txt").write_text(given["prompt"])
    (folder / "system.txt").write_text(given["system"])
    dataset = DatasetConfig(
        data_path=f"{folder}/p.jsonl",
        prompt_file=f"{folder}/prompt.txt",
        system_prompt_file=f"{folder}/system.txt",
    )
    tokenizer = tiny_tokenizer(given["template"], extra=given["extra"])
    kwargs = RunClock(day).template_kwargs(tokenizer, given["kwargs"], "policy.tokenizer.x")
    prompts = load_prompts([dataset], tokenizer, 1000, kwargs, trace_column="solution")
    content = {
        **data_content([dataset], prompts.problems, "solution"),
        **tokenizer_content(tokenizer, given["kwargs"]),
    }
    return PromptOrder(prompts, 1, 0, inputs=content)


CHANGED = {
    "data.train has changed (of its 3 prompts 1 are gone, and of the 3 now 1 are new)": {"problems": ["1", "2", "4"]},
    "data.train has changed (its 3 prompts are the same in another order)": {"problems": ["1", "3", "2"]},
    "data.train and the traces of data.train have changed (of its 3 prompts 0 are gone": {"problems": ["1", "2", "3", "3"]},
    "the traces of data.train has changed": {"solution": "b"},
    "data.train.prompt_file has changed (of its 3 prompts 3 are gone": {"prompt": "Solve: {}"},
    "data.train.system_prompt_file has changed (of its 3 prompts 3": {"system": "Be brief."},
    "the chat template of policy.tokenizer has changed (of its 3": {"template": CHATML},
    "policy.tokenizer.chat_template_kwargs has changed (of its 3 prompts": {"kwargs": {"enable_thinking": False}},
    "the vocabulary of policy.tokenizer has changed": {"extra": ("<|new|>",)},
}


def test_each_change_of_the_inputs_is_reported_by_its_key_and_a_path_is_no_change(tmp_path: Path) -> None:
    state = json.loads(json.dumps(inputs(tmp_path / "first", {}).state(1)))
    assert inputs(tmp_path / "moved", {"kwargs": {}}).changes(state) == []
    for i, (message, changes) in enumerate(CHANGED.items()):
        (change,) = inputs(tmp_path / f"{i}", changes).changes(state)
        assert change.startswith(message), change
    both = {"prompt": "Solve: {}", "system": "Be brief."}
    (change,) = inputs(tmp_path / "both", both).changes(state)
    assert change.startswith("data.train.prompt_file and data.train.system_prompt_file have changed (of")


def test_the_same_inputs_that_render_otherwise_are_reported_with_their_causes(tmp_path: Path) -> None:
    """Another day stands for everything that a template can read beside its arguments."""
    state = inputs(tmp_path / "first", {}).state(1)
    other_day = inputs(tmp_path / "day", {}, FIRST + timedelta(days=1))
    (change,) = other_day.changes(state)
    assert "the versions of transformers" in change and "3 prompts 3 are gone" in change
    del state["content"]
    (change,) = other_day.changes(state)  # as a checkpoint of an earlier version
    assert change.startswith("data.train, its prompt file, or policy.tokenizer has changed (of its 3 prompts 3 are")
    assert inputs(tmp_path / "same day", {}).changes(state) == []


def test_ranks_with_other_inputs_are_refused_by_cause() -> None:
    first = {"problems": "1", "prompt_file": "2", "tokens": "3"}
    same = {"data.train": first, "teacher.tokenizer": {"tokens": "4"}}
    raise_if_ranks_differ([("a", same), ("b", same)])
    assert changed_parts(first, {"problems": "0", "tokens": "0"}) == ["problems"]
    for key, content, message in [
        ("data.train", {**first, "problems": "0", "tokens": "0"}, "data.train: rank 2 on c has other problems than rank 0"),
        ("data.train", {**first, "tokens": "0"}, "data.train: rank 2 on c has other tokens for the same texts"),
        ("teacher.tokenizer", {"tokens": "0"}, "teacher.tokenizer: rank 2 on c has other tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            raise_if_ranks_differ([("a", same), ("b", same), ("c", {**same, key: content})])


# -- the program ------------------------------------------------------------------------------------------------------


class FakeDatetime(datetime):
    """A clock that is a day later at each look."""

    today_ = datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: Any = None) -> FakeDatetime:
        FakeDatetime.today_ += timedelta(days=1)
        return cls(*FakeDatetime.today_.timetuple()[:6], tzinfo=tz)


def dated_mains(runs: Sequence[tuple[int, str, str, Sequence[str]]]) -> list[tuple[int, str, str]]:
    """Run the program once for each port, date, time zone and command line, at a faked date."""
    import transformers.utils.chat_template_utils as of_templates

    ended = []
    for port, date, zone, line in runs:
        os.environ["TZ"] = zone
        time.tzset()
        FakeDatetime.today_ = datetime.fromisoformat(date)
        with (
            mock.patch.object(clock_module, "datetime", FakeDatetime),
            mock.patch.object(of_templates, "datetime", FakeDatetime),
        ):
            ended += _mains([port], [line])
    return ended


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose student, teacher and validation read a template with the date."""
    root = make_tiny_run(tmp_path_factory.mktemp("dated"))
    (root / "student/chat_template.jinja").write_text(DATED + CHATML)
    shutil.copytree(root / "student", root / "undated")
    (root / "undated/chat_template.jinja").write_text(CHATML)
    (root / "elsewhere").mkdir()
    for name in ("problems.jsonl", "prompt.txt"):
        shutil.copy(root / name, root / "elsewhere" / name)
    (root / "other.txt").write_text("Solve: {}")
    return root


def line_of(root: Path, name: str, *overrides: str) -> list[str]:
    """A run of four steps whose student is its own teacher with a hint in view, validated each second step."""
    return _command(
        root,
        name,
        "cluster.gpus_per_node=1",
        f"teacher.model_name={root}/student",
        "teacher.max_total_sequence_length=256",
        "policy.max_total_sequence_length=128",
        "distillation.context_distillation.enabled=true",
        "distillation.context_distillation.teacher_prefix_template='Hint: {problem}'",
        *(f"distillation.{key}" for key in ("val_period=2", "val_at_start=true", "max_val_samples=3")),
        f"data.validation={{data_path: {root}/problems.jsonl}}",
        "logger.tensorboard_enabled=false",
        *overrides,
    )


def _info(root: Path, name: str, step: int) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((root / f"checkpoints/{name}/step_{step}/training_info.json").read_text())
    return info


def _ran(root: Path, *runs: tuple[str, str, Sequence[str]]) -> list[tuple[int, str, str]]:
    (ended,) = run_ranks(1, dated_mains, [(free_port(), *run) for run in runs])
    return list(ended)


JULY = "2024-07-26T23:50:00"


@pytest.mark.slow
def test_a_run_resumed_under_another_date_and_time_zone_continues_bit_for_bit(dated: Path) -> None:
    two = "distillation.max_num_steps=2"
    moved = f"data.train.data_path={dated}/elsewhere/problems.jsonl", f"data.default.prompt_file={dated}/elsewhere/prompt.txt"
    ended = _ran(
        dated,
        (JULY, "Europe/Berlin", line_of(dated, "straight")),
        (JULY, "Europe/Berlin", line_of(dated, "parted", two)),
        ("2031-01-01T10:00:00", "Asia/Tokyo", line_of(dated, "parted", *moved)),
        ("2031-01-01T10:00:00", "Asia/Tokyo", line_of(dated, "another day", two)),
    )
    assert [code for code, _, _ in ended] == [0] * 4, ended
    straight, parted, other = (_train_rows(dated / f"runs/{name}") for name in ("straight", "parted", "another day"))
    for name in SINCE_THE_LAST_SYNC:
        parted[2][name] = straight[2][name]
    assert parted == straight
    assert other[0]["train/loss"] != straight[0]["train/loss"], "the date does not reach the prompts"
    ours, theirs = (load_file(dated / f"checkpoints/{n}/step_4/hf/model.safetensors") for n in ("straight", "parted"))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    (first,) = {_info(dated, "straight", step)["clock"] for step in (2, 4)} | {_info(dated, "parted", 4)["clock"]}
    assert first == "2024-07-27T23:50:00+02:00"
    assert all(f"chat templates see the date of the run's first start: {first}" in said for _, _, said in ended[:3])
    assert json.loads((dated / "runs/parted/versions.json").read_text())["clock"] == first
    assert "changed" not in ended[2][2] and not (dated / "runs/parted/changes.json").exists()


@pytest.mark.slow
def test_changed_inputs_are_refused_at_a_resume_unless_changes_are_allowed(dated: Path) -> None:
    one, later = "distillation.max_num_steps=1", ("2031-01-01T10:00:00", "UTC")
    first = line_of(dated, "changed", one, "checkpointing.save_period=1")

    def resumed(*overrides: str) -> list[str]:
        return line_of(dated, "changed", "distillation.max_num_steps=2", "checkpointing.save_period=1", *overrides)

    refused = {
        "data.train.prompt_file has changed (of its": f"data.default.prompt_file={dated}/other.txt",
        "data.train.system_prompt_file has changed": f"data.default.system_prompt_file={dated}/prompt.txt",
        "the chat template of policy.tokenizer has changed": f"policy.tokenizer.name={dated}/undated",
        "the chat template of teacher.tokenizer has": f"teacher.tokenizer.name={dated}/undated",
        "data.shuffle was True and is False": "data.shuffle=false",
    }
    refused.pop("the chat template of teacher.tokenizer has")  # the student is the teacher: it reads its own template
    change = (
        f"data.default.prompt_file={dated}/other.txt",
        "data.shuffle=false",
        "distillation.num_prompts_per_step=2",
        f"data.validation={{data_path: {dated}/few.jsonl}}",
    )
    allowed = "checkpointing.allow_changes=true"
    ended = _ran(
        dated,
        (JULY, "UTC", first),
        *((*later, resumed(override)) for override in refused.values()),
        (*later, resumed(*change, allowed)),
        (*later, resumed(*change)),
    )
    assert ended[0][0] == 0, ended[0]
    for message, (code, _, said) in zip(refused, ended[1:], strict=False):
        assert code == 2 and f"error: {message}" in said and allowed in said.splitlines()[-1], said
    assert [code for code, _, _ in ended[-2:]] == [0, 0], ended[-2:]
    info, said = _info(dated, "changed", 2), ended[-2][2]
    changes = json.loads((dated / "runs/changed/changes.json").read_text())
    assert info["changes"] == changes and {change["step"] for change in changes} == {1}
    expected = ("data.train.prompt_file has changed", "distillation.num_prompts_per_step was 4 and is 2", "data.shuffle was")
    for what in (*expected, "validation has other problems"):
        assert sum(change["what"].startswith(what) for change in changes) == 1 and what in said, (what, changes)
    assert all(change["when"].startswith("2031-") for change in changes)
    assert info["in_context"] is None and info["clock"].startswith("2024-07-27"), "the clock stays, the reference not"
    assert "have changed since" not in ended[-1][2], "the new checkpoint holds the new inputs"


def _differing_mains(ports: Sequence[int], line: Sequence[str], patched: bool) -> list[tuple[int, str, str]]:
    """The program on ranks of which rank 1 renders prompts of its own, where ``patched``."""
    from distill.data import prompts

    tokenised = prompts.token_ids
    other = mock.patch.object(prompts, "token_ids", lambda *args, **kwargs: [i[:-1] for i in tokenised(*args, **kwargs)])
    with other if patched and os.environ["RANK"] == "1" else contextlib.nullcontext():
        return _mains(ports, [line])


@pytest.mark.slow
def test_ranks_that_render_other_prompts_or_read_other_data_leave_with_code_2(dated: Path) -> None:
    shutil.copy(dated / "problems.jsonl", dated / "rank_0.jsonl")
    (dated / "rank_1.jsonl").write_text((dated / "problems.jsonl").read_text().replace("3 + 3", "3 + 4"))
    by_rank = f"data.train.data_path={dated}/rank_${{oc.env:RANK}}.jsonl"
    for message, override, patched in [
        ("data.train: rank 1 on .* has other tokens for the same texts than rank 0", "data.shuffle=true", True),
        ("data.train: rank 1 on .* has other problems than rank 0 .*: give all nodes the same files", by_rank, False),
    ]:
        line = _command(dated, "differing", override, f"policy.tokenizer.name={dated}/undated")
        ended = run_ranks(2, _differing_mains, [free_port()], line, patched)
        assert [code for ((code, _, _),) in ended] == [2, 2], ended
        ((_, _, said),) = ended[0]
        assert re.search(f"error: {message}", said), said
