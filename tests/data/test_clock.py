"""Prompts are the same on all ranks and after every resume: the run's clock, and hashes of the prompts' inputs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from distill.checkpoint import Found
from distill.checkpoint.resume import clock_of, log_clock, origin_of
from distill.config import Config, DatasetConfig
from distill.data import clock as clock_module
from distill.data.clock import RunClock
from distill.data.content import changed_parts, data_content, raise_if_ranks_differ, tokenizer_content
from distill.data.prompts import PromptOrder, chat_ids, load_prompts
from distill.errors import UserError
from tests.helpers import free_port, run_ranks
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _mains, _train_rows, make_tiny_run
from tests.tiny_tokenizer import CHATML, tiny_tokenizer

DATED = (
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    "{% if date_string is not defined %}{% set date_string = today() %}{% endif %}<|im_start|>{{ date_string }}\n"
)
"""The date as Llama's templates write it; inside a macro, whose names come from the same place."""
LATER = datetime(2031, 1, 1, tzinfo=UTC)
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


CHANGED: dict[str, dict[str, Any]] = {
    "data.train has changed (of its 3 prompts 1 are gone, and of the 3 now 1 are new)": {"problems": ["1", "2", "4"]},
    "data.train has changed (its 3 prompts are the same in another order)": {"problems": ["1", "3", "2"]},
    "data.train and the traces of data.train have changed (of its 3 prompts 0 are gone": {
        "problems": ["1", "2", "3", "3"]
    },
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
        (
            "data.train",
            {**first, "problems": "0", "tokens": "0"},
            "data.train: rank 2 on c has other problems than rank 0",
        ),
        ("data.train", {**first, "tokens": "0"}, "data.train: rank 2 on c has other tokens for the same texts"),
        ("teacher.tokenizer", {"tokens": "0"}, "teacher.tokenizer: rank 2 on c has other tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            raise_if_ranks_differ([("a", same), ("b", same), ("c", {**same, key: content})])


def found_at(step: int, order: PromptOrder, **info: Any) -> Found:
    """A checkpoint as a run with ``order`` and an unchanged recipe wrote it."""
    written = {"step": step, "data": order.state(step), "recipe": asdict(Config()), "in_context": {"a": 1.0}, **info}
    return Found(Path("step"), json.loads(json.dumps(written)), [])


def allowing(allowed: bool) -> Config:
    return replace(Config(), checkpointing=replace(Config().checkpointing, allow_changes=allowed))


def test_a_checkpoint_without_a_clock_resumes_where_its_prompts_have_no_date(tmp_path: Path) -> None:
    undated = {"template": CHATML}
    found = found_at(3, inputs(tmp_path / "first", undated))
    clock = clock_of(found)
    origin = origin_of(found, allowing(False), inputs(tmp_path / "now", undated, clock.time), clock, {"tokens": "1"})
    assert origin.changes == [] and origin.info["clock"] == str(clock) != str(FIRST)
    assert origin.info["validation_inputs"] == {"tokens": "1"}
    assert origin.reference(found) == {"a": 1.0}, "what that checkpoint validated is not known to differ"


def test_a_checkpoint_without_a_clock_whose_prompts_have_a_date_is_refused_with_that_reason(
    tmp_path: Path, caplog
) -> None:
    found, now, clock = (
        found_at(3, inputs(tmp_path / "first", {})),
        inputs(tmp_path / "now", {}, LATER),
        RunClock(LATER),
    )
    clock.was_read = True
    refusal = (
        "3 prompts 3 are gone.*writes the date, and the checkpoint is from a version.*allow_changes=true.*step 4 on"
    )
    with pytest.raises(UserError, match=refusal):
        origin_of(found, allowing(False), now, clock, None)
    log_clock(clock, found)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and f"see the date {clock} from here on" in warning.getMessage()
    assert len(origin_of(found, allowing(True), now, clock, None).changes) == 1


def test_every_change_of_a_run_stays_on_record(tmp_path: Path) -> None:
    """Of the data, of a key that shapes what is learnt, and of the validation, which nothing refuses."""
    order = inputs(tmp_path / "first", {})
    then: dict[str, Any] = {"problems": "1", "tokens": "2"}
    earlier = [{"step": 1, "what": "a key was 1 and is 2", "when": "2024-01-01"}]
    found = found_at(3, order, clock=str(FIRST), changes=earlier, validation_inputs=then)
    clock, seeded = clock_of(found), replace(allowing(True), distillation=replace(Config().distillation, seed=7))
    assert clock.time == FIRST
    one = origin_of(found, seeded, inputs(tmp_path / "other", {"prompt": "Q: {}"}), clock, {**then, "problems": "0"})
    assert one.info["changes"][0] == earlier[0]
    assert [(change["step"], change["what"].partition(" has")[0]) for change in one.changes[1:]] == [
        (3, "data.train.prompt_file"),
        (3, "distillation.seed was 42 and is 7"),
        (3, "validation"),
    ]
    assert one.reference(found) is None and one.info["validation_inputs"] == {**then, "problems": "0"}
    off = origin_of(found, allowing(False), order, clock, {})  # not validated now: comparable again later
    assert off.changes == earlier and off.reference(found) and off.info["validation_inputs"] == then


# -- the program ------------------------------------------------------------------------------------------------------


class FakeDatetime(datetime):
    """A clock that is a day later at each look."""

    today_ = datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: Any = None) -> FakeDatetime:
        cls.today_ += timedelta(days=1)
        return cls(*cls.today_.timetuple()[:6], tzinfo=tz)


class DatetimeOfTemplates(FakeDatetime):
    """The clock of transformers' own renderings, which no prompt may see."""


def dated_mains(runs: Sequence[tuple[int, str, str, Sequence[str]]]) -> list[tuple[int, str, str]]:
    """Run the program once for each port, date, time zone and command line, at a faked date."""
    import transformers.utils.chat_template_utils as of_templates

    ended = []
    for port, date, zone, line in runs:
        os.environ["TZ"] = zone
        time.tzset()
        FakeDatetime.today_ = DatetimeOfTemplates.today_ = datetime.fromisoformat(date)
        with (
            mock.patch.object(clock_module, "datetime", FakeDatetime),
            mock.patch.object(of_templates, "datetime", DatetimeOfTemplates),
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
    four = [{"question": f"What is {i}?", "answer": f"{i}"} for i in ("1 + 1", 5, 6, 7)]
    (root / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in four))
    return root


def line_of(root: Path, name: str, *overrides: str) -> list[str]:
    """A run whose student is its own teacher with a hint in view, validated each second step."""
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


JULY, NEW_YEAR = ("2024-07-26T23:50:00", "Europe/Berlin"), ("2031-01-01T10:00:00", "Asia/Tokyo")
ALLOWED = "checkpointing.allow_changes=true"
REFUSED = {
    "data.train.prompt_file has changed (of its 10 prompts 10 are gone": "data.default.prompt_file={root}/other.txt",
    "data.train.system_prompt_file has changed (of": "data.default.system_prompt_file={root}/other.txt",
    "the chat template of policy.tokenizer and the chat template of": "policy.tokenizer.name={root}/undated",
    "policy.tokenizer.chat_template_kwargs and": "policy.tokenizer.chat_template_kwargs={{date_string: today}}",
    "teacher.tokenizer.chat_template_kwargs has changed, since": "teacher.tokenizer.chat_template_kwargs={{a: b}}",
    "data.train has changed (of its 10 prompts 9 are gone, and of the 4": "data.train.data_path={root}/four.jsonl",
    "data.shuffle was True and is False, since": "data.shuffle=false",
}
CHANGE = (
    "data.default.prompt_file={root}/other.txt",
    "data.shuffle=false",
    "distillation.num_prompts_per_step=2",
    "data.validation={{data_path: {root}/few.jsonl}}",
)


@pytest.fixture(scope="module")
def ended(dated: Path) -> dict[str, tuple[int, str, str]]:
    """The code and output of each run, by its name or what it is refused for; all in one process."""
    one, two = (f"distillation.max_num_steps={n}" for n in (1, 2))
    moved = (
        f"data.train.data_path={dated}/elsewhere/problems.jsonl",
        f"data.default.prompt_file={dated}/elsewhere/prompt.txt",
    )
    runs = {
        "straight": (*JULY, line_of(dated, "straight", "distillation.max_num_steps=3")),
        "parted": (*JULY, line_of(dated, "parted", two)),
        "resumed": (*NEW_YEAR, line_of(dated, "parted", "distillation.max_num_steps=3", *moved)),
        "another day": (*NEW_YEAR, line_of(dated, "another day", one)),
    }
    for message, override in REFUSED.items():
        runs[message] = (*NEW_YEAR, line_of(dated, "another day", two, override.format(root=dated)))
    change = [override.format(root=dated) for override in CHANGE]
    runs["allowed"] = (*NEW_YEAR, line_of(dated, "another day", two, *change, ALLOWED))
    runs["again"] = (*NEW_YEAR, line_of(dated, "another day", two, *change))
    (found,) = run_ranks(1, dated_mains, [(free_port(), *run) for run in runs.values()])
    return dict(zip(runs, found, strict=True))


@pytest.mark.slow
def test_a_run_resumed_under_another_date_and_time_zone_continues_bit_for_bit(dated: Path, ended) -> None:
    assert all(ended[name][0] == 0 for name in ("straight", "parted", "resumed", "another day")), ended
    straight, parted, other = (_train_rows(dated / f"runs/{name}") for name in ("straight", "parted", "another day"))
    (third,) = (i for i, row in enumerate(straight) if row["step"] == 3)
    for name in SINCE_THE_LAST_SYNC:
        parted[third][name] = straight[third][name]
    assert parted == straight and any("validation/forward_kl" in row for row in straight)
    losses = {row["train/loss"] for rows in (straight, other) for row in rows if row["step"] == 1}
    assert len(losses) == 2, "the date does not reach the prompts"
    ours, theirs = (load_file(dated / f"checkpoints/{n}/step_3/hf/model.safetensors") for n in ("straight", "parted"))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    (first,) = {_info(dated, name, step)["clock"] for name in ("straight", "parted") for step in (2, 3)}
    assert first == "2024-07-27T23:50:00+02:00"
    shown = f"chat templates see the date of the run's first start: {first}"
    assert all(shown in ended[name][2] for name in ("straight", "parted", "resumed"))
    assert json.loads((dated / "runs/parted/versions.json").read_text())["clock"] == first
    assert "changed since" not in ended["resumed"][2] and not (dated / "runs/parted/changes.json").exists()


@pytest.mark.slow
def test_changed_inputs_are_refused_at_a_resume_unless_changes_are_allowed(dated: Path, ended) -> None:
    for message in REFUSED:
        code, _, said = ended[message]
        assert code == 2 and f"error: {message}" in said and ALLOWED in said.splitlines()[-1], said
    assert [ended[name][0] for name in ("allowed", "again")] == [0, 0], ended
    info, said = _info(dated, "another day", 2), ended["allowed"][2]
    changes = info["changes"]
    expected = (
        "data.train.prompt_file has changed (of its 10 prompts 10 are gone, and of the 10 now 10 are new)",
        "distillation.num_prompts_per_step was 4 and is 2",
        "data.shuffle was True and is False",
        "validation has other problems and gold answers",
    )
    assert sorted(change["what"] for change in changes) == sorted(expected)
    assert all(what in said for what in expected), said
    assert all(change["step"] == 1 and change["when"].startswith("2031-") for change in changes)
    assert info["in_context"] is None and "with the teacher's context in view are left out" in said
    assert info["clock"] == _info(dated, "another day", 1)["clock"], "the clock stays"
    assert info["data"]["num_prompts_per_step"] == 2
    # The new checkpoint holds the new inputs: nothing has changed since.
    assert "changed since" not in ended["again"][2] and "can't be compared" not in ended["again"][2]
    assert json.loads((dated / "runs/another day/changes.json").read_text()) == changes


def _differing_mains(ports: Sequence[int], line: Sequence[str], by_rank: str) -> list[tuple[int, str, str]]:
    """Two runs: one whose rank 1 tokenises the same texts in another way, and one whose ranks read different files."""
    from distill.data import prompts

    made = prompts.token_ids

    def shorter(tokenizer: Any, texts: Sequence[str], *args: Any, **kwargs: Any) -> list[list[int]]:
        """Prompts without their last token; the texts that check the tokenizer at start stay as they are."""
        found = zip(texts, made(tokenizer, texts, *args, **kwargs), strict=True)
        return [ids[:-1] if "<|im_start|>" in text else ids for text, ids in found]

    other = mock.patch.object(prompts, "token_ids", shorter)
    with other if os.environ["RANK"] == "1" else contextlib.nullcontext():
        tokenised = _mains(ports[:1], [line])
    return tokenised + _mains(ports[1:], [[*line, by_rank]])


@pytest.mark.slow
def test_ranks_that_render_other_prompts_or_read_other_data_leave_with_code_2(dated: Path) -> None:
    shutil.copy(dated / "problems.jsonl", dated / "rank_0.jsonl")
    (dated / "rank_1.jsonl").write_text((dated / "problems.jsonl").read_text().replace("3 + 3", "3 + 4"))
    by_rank = f"data.train.data_path={dated}/rank_${{oc.env:RANK}}.jsonl"
    line = _command(dated, "differing", f"policy.tokenizer.name={dated}/undated")
    first, second = run_ranks(2, _differing_mains, [free_port(), free_port()], line, by_rank)
    assert [code for code, _, _ in first + second] == [2] * 4, first
    expected = (
        "error: data.train: rank 1 on .* has other tokens for the same texts than rank 0 .*: give all nodes the same",
        "error: data.train: rank 1 on .* has other problems than rank 0 .*: give all nodes the same files",
    )
    for message, (_, _, said) in zip(expected, first, strict=True):
        assert re.search(message, said), said
