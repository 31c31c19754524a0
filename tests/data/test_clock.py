"""Prompts are equal on all ranks and after every resume: the run's clock, and hashes of the prompts' inputs."""

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
from distill.checkpoint.resume import clock_of, compare_with_checkpoint, log_clock, warn_of_changes
from distill.config import Config, DatasetConfig
from distill.data import clock as clock_module
from distill.data.clock import RunClock
from distill.data.content import changed_parts, data_hashes, raise_if_ranks_differ, tokenizer_hashes
from distill.data.prompts import PromptOrder, load_prompts
from distill.data.rendering import chat_ids
from distill.errors import UserError
from tests.helpers import free_port, run_ranks
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _mains, _train_rows, make_tiny_run
from tests.tiny_tokenizer import CHATML, tiny_tokenizer

DATED = (
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    "{% if date_string is not defined %}{% set date_string = today() %}{% endif %}<|im_start|>{{ date_string }}\n"
)
"""A template that writes the date like those of Llama; the macro tests that arguments are visible in macros."""
LATER = datetime(2031, 1, 1, tzinfo=UTC)
FIRST = datetime(2024, 7, 26, 23, 59, 59, tzinfo=timezone(timedelta(hours=2)))
CHAT = [{"role": "user", "content": "What is 3?"}]


def rendered(clock: RunClock, kwargs: dict[str, Any] | None = None, template: str = DATED + CHATML) -> str:
    tokenizer = tiny_tokenizer(template)
    (ids,) = chat_ids(tokenizer, [CHAT], clock.template_kwargs(tokenizer, kwargs, "policy.tokenizer.x"))
    return str(tokenizer.decode(ids))


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_chat_templates_read_the_time_of_the_first_start() -> None:
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


def test_a_date_in_the_recipe_has_priority_over_the_clock() -> None:
    clock, plain = RunClock(FIRST), tiny_tokenizer()
    assert rendered(clock, {"date_string": "1 May"}).startswith("<|im_start|>1 May\n") and not clock.was_read
    for kwargs in (None, {"enable_thinking": False}):
        assert clock.template_kwargs(plain, kwargs, "policy.tokenizer.x") == kwargs
    named = {"chat_template": DATED + CHATML}  # apply_chat_template also accepts a template as an argument
    assert "strftime_now" in (clock.template_kwargs(plain, named, "policy.tokenizer.x") or {})


def test_a_recipe_cannot_replace_the_clock() -> None:
    with pytest.raises(UserError, match="date_string") as caught:
        RunClock(FIRST).template_kwargs(tiny_tokenizer(), {"strftime_now": "today"}, "teacher.x")
    assert (caught.value.key, caught.value.value) == ("teacher.x.strftime_now", "today")


@pytest.mark.parametrize("part", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_chat_templates_that_draw_random_numbers_are_refused(part: str) -> None:
    with pytest.raises(UserError) as caught:
        chat_ids(tiny_tokenizer(part + CHATML), [CHAT])
    assert caught.value.key == "policy.tokenizer.chat_template"
    assert chat_ids(tiny_tokenizer("at random" + CHATML), [CHAT]), "the word alone is allowed"


# -- hashes of the inputs ----------------------------------------------------------------------------------------------


def inputs(folder: Path, changes: dict[str, Any], day: datetime = FIRST) -> PromptOrder:
    """Write all inputs of three prompts with some ``changes`` into a new folder, and load the prompts."""
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
    hashes = {
        **data_hashes([dataset], prompts.problems, "solution"),
        **tokenizer_hashes(tokenizer, given["kwargs"]),
    }
    return PromptOrder(prompts, 1, 0, input_hashes=hashes)


CHANGED: dict[str, dict[str, Any]] = {
    "data.train has changed (1 of 3 prompts removed, 1 added)": {"problems": ["1", "2", "4"]},
    "data.train has changed (same 3 prompts": {"problems": ["1", "3", "2"]},
    "data.train and the trace column of data.train have changed (0 of 3 prompts removed, 1 added)": {
        "problems": ["1", "2", "3", "3"]
    },
    "the trace column of data.train has changed": {"solution": "b"},
    "data.train.prompt_file has changed (3 of 3 prompts": {"prompt": "Solve: {}"},
    "data.train.system_prompt_file has changed (3 of 3": {"system": "Be brief."},
    "the chat template of policy.tokenizer has changed (3 of 3": {"template": CHATML},
    "policy.tokenizer.chat_template_kwargs has changed (3 of 3 prompts": {"kwargs": {"enable_thinking": False}},
    "the vocabulary of policy.tokenizer has changed": {"extra": ("<|new|>",)},
}


def test_changed_inputs_are_reported_by_key_and_moved_files_are_no_change(tmp_path: Path) -> None:
    state = json.loads(json.dumps(inputs(tmp_path / "first", {}).state(1)))
    assert inputs(tmp_path / "moved", {"kwargs": {}}).changes(state) == []
    for i, (message, changes) in enumerate(CHANGED.items()):
        (change,) = inputs(tmp_path / f"{i}", changes).changes(state)
        assert change.startswith(message), change
    both = {"prompt": "Solve: {}", "system": "Be brief."}
    (change,) = inputs(tmp_path / "both", both).changes(state)
    assert change.startswith("data.train.prompt_file and data.train.system_prompt_file have changed (")


def test_different_tokens_from_equal_inputs_are_reported_with_possible_causes(tmp_path: Path) -> None:
    """Use a different day, because a template can read it without an argument."""
    state = inputs(tmp_path / "first", {}).state(1)
    other_day = inputs(tmp_path / "day", {}, FIRST + timedelta(days=1))
    (change,) = other_day.changes(state)
    assert "tokenization" in change and "3 of 3 prompts" in change
    del state["content"]
    (change,) = other_day.changes(state)  # checkpoints of earlier versions have no such entry
    assert change.startswith("data.train, ") and "policy.tokenizer has changed (3 of 3 prompts" in change
    assert inputs(tmp_path / "same day", {}).changes(state) == []


def test_ranks_with_different_inputs_are_refused_with_the_cause() -> None:
    first = {"problems": "1", "prompt_file": "2", "tokens": "3"}
    same = {"data.train": first, "teacher.tokenizer": {"tokens": "4"}}
    raise_if_ranks_differ([("a", same), ("b", same)])
    assert changed_parts(first, {"problems": "0", "tokens": "0"}) == ["problems"]
    for key, content, parts in [
        ("data.train", {**first, "problems": "0", "tokens": "0"}, ["problems"]),
        ("data.train", {**first, "tokens": "0"}, ["tokens"]),
        ("teacher.tokenizer", {"tokens": "0"}, ["tokens"]),
    ]:
        with pytest.raises(UserError) as caught:
            raise_if_ranks_differ([("a", same), ("b", same), ("c", {**same, key: content})])
        assert (caught.value.key, caught.value.value) == (key, None)
        assert all(part in caught.value.problem for part in (f"{key}: rank 2 on c ", *parts))


def found_at(step: int, order: PromptOrder, **info: Any) -> Found:
    """Return the checkpoint of a run with ``order`` and the default recipe."""
    written = {"step": step, "data": order.state(step), "recipe": asdict(Config()), "in_context": {"a": 1.0}, **info}
    return Found(Path("step"), json.loads(json.dumps(written)), [])


def allowing(allowed: bool) -> Config:
    return replace(Config(), checkpointing=replace(Config().checkpointing, allow_changes=allowed))


def test_a_checkpoint_without_a_clock_resumes_if_its_prompts_have_no_date(tmp_path: Path) -> None:
    undated = {"template": CHATML}
    found = found_at(3, inputs(tmp_path / "first", undated))
    clock = clock_of(found)
    now = inputs(tmp_path / "now", undated, clock.time)
    history = compare_with_checkpoint(found, allowing(False), now, clock, {"tokens": "1"})
    assert history.changes == [] and history.info["clock"] == str(clock) != str(FIRST)
    assert history.info["validation_inputs"] == {"tokens": "1"}
    assert history.in_context_metrics(found) == {"a": 1.0}, "a missing hash is no difference"


def test_a_checkpoint_without_a_clock_is_refused_if_its_prompts_have_a_date(tmp_path: Path, caplog) -> None:
    found, now, clock = (
        found_at(3, inputs(tmp_path / "first", {})),
        inputs(tmp_path / "now", {}, LATER),
        RunClock(LATER),
    )
    clock.was_read = True
    with pytest.raises(UserError, match=r"3 of 3 prompts.* the date,.*allow_changes=true.*step 4") as caught:
        compare_with_checkpoint(found, allowing(False), now, clock, None)
    assert (caught.value.key, caught.value.value) == ("checkpointing.allow_changes", False)
    log_clock(clock, found)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and str(clock) in warning.getMessage()
    assert len(compare_with_checkpoint(found, allowing(True), now, clock, None).changes) == 1


@pytest.mark.parametrize("allowed", [False, True])
def test_changed_settings_of_the_model_affect_learning(tmp_path: Path, allowed: bool) -> None:
    order = inputs(tmp_path / "data", {})
    found, changes = found_at(3, order, clock=str(FIRST)), ["rms_norm_eps was 1 and is 2"]
    compared = (found, allowing(allowed), order, clock_of(found), None, changes)
    if not allowed:
        with pytest.raises(UserError, match="rms_norm_eps was 1"):
            compare_with_checkpoint(*compared)
        return
    history = compare_with_checkpoint(*compared)
    assert history.training_changes == changes and not history.same_run
    assert [change["what"] for change in history.changes] == changes


def test_changes_of_all_resumes_are_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Record changes to the data, to a key that affects training, and to the validation data."""
    order = inputs(tmp_path / "first", {})
    then: dict[str, Any] = {"problems": "1", "tokens": "2"}
    earlier = [{"step": 1, "what": "a key was 1 and is 2", "when": "2024-01-01"}]
    found = found_at(3, order, clock=str(FIRST), changes=earlier, validation_inputs=then)
    clock, seeded = clock_of(found), replace(allowing(True), distillation=replace(Config().distillation, seed=7))
    assert clock.time == FIRST
    changed = {**then, "problems": "0"}
    one = compare_with_checkpoint(found, seeded, inputs(tmp_path / "other", {"prompt": "Q: {}"}), clock, changed)
    assert one.info["changes"][0] == earlier[0]
    assert [(change["step"], change["what"].partition(" has")[0]) for change in one.changes[1:]] == [
        (3, "data.train.prompt_file"),
        (3, "distillation.seed was 42 and is 7"),
        (3, "data.validation"),
    ]
    assert one.in_context_metrics(found) is None and one.info["validation_inputs"] == changed
    warn_of_changes(one, found)
    training, validation = caplog.records
    assert (training.levelname, validation.levelname) == ("WARNING", "WARNING")
    assert all(text in training.getMessage() for text in (f"{found.path} (", "data.train.prompt_file", "undo"))
    assert all(text in validation.getMessage() for text in ("data.validation", "step 3", "in_context"))
    off = compare_with_checkpoint(found, allowing(False), order, clock, {})  # without validation, the hashes are kept
    assert off.changes == earlier and off.in_context_metrics(found) and off.info["validation_inputs"] == then


# -- runs of the program -----------------------------------------------------------------------------------------------


class FakeDatetime(datetime):
    """A clock that advances by a day on each call."""

    today_ = datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: Any = None) -> FakeDatetime:
        cls.today_ += timedelta(days=1)
        return cls(*cls.today_.timetuple()[:6], tzinfo=tz)


class DatetimeOfTemplates(FakeDatetime):
    """The clock of the renderings by transformers, which must not reach a prompt."""


def dated_mains(runs: Sequence[tuple[int, str, str, Sequence[str]]]) -> list[tuple[int, str, str]]:
    """Run the program once for each port, date, time zone and command line, with a fake clock."""
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
    """Prepare a tiny run whose chat template writes the date."""
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
    """Return the command line of a run with a hint in the teacher's context and validation every second step."""
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
    "data.train.prompt_file has changed (10 of 10 prompts": "data.default.prompt_file={root}/other.txt",
    "data.train.system_prompt_file has changed (": "data.default.system_prompt_file={root}/other.txt",
    "the chat template of policy.tokenizer and the chat template of": "policy.tokenizer.name={root}/undated",
    "policy.tokenizer.chat_template_kwargs and": "policy.tokenizer.chat_template_kwargs={{date_string: today}}",
    "teacher.tokenizer.chat_template_kwargs has changed": "teacher.tokenizer.chat_template_kwargs={{a: b}}",
    "data.train has changed (9 of 10 prompts removed, 3 added)": "data.train.data_path={root}/four.jsonl",
    "data.shuffle was True and is False": "data.shuffle=false",
}
CHANGE = (
    "data.default.prompt_file={root}/other.txt",
    "data.shuffle=false",
    "distillation.num_prompts_per_step=2",
    "data.validation={{data_path: {root}/few.jsonl}}",
)


@pytest.fixture(scope="module")
def ended(dated: Path) -> dict[str, tuple[int, str, str]]:
    """Run the program several times in one process; return exit status and output by name or expected message."""
    one, two = (f"distillation.max_num_steps={n}" for n in (1, 2))
    moved = (
        f"data.train.data_path={dated}/elsewhere/problems.jsonl",
        f"data.default.prompt_file={dated}/elsewhere/prompt.txt",
    )
    runs = {
        "straight": (*JULY, line_of(dated, "straight", "distillation.max_num_steps=3")),
        "interrupted": (*JULY, line_of(dated, "resumed", two)),
        "resumed": (*NEW_YEAR, line_of(dated, "resumed", "distillation.max_num_steps=3", *moved)),
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
def test_resume_at_another_date_and_time_zone_is_bit_exact(dated: Path, ended) -> None:
    assert all(ended[name][0] == 0 for name in ("straight", "interrupted", "resumed", "another day")), ended
    straight, resumed, other = (_train_rows(dated / f"runs/{name}") for name in ("straight", "resumed", "another day"))
    (third,) = (i for i, row in enumerate(straight) if row["step"] == 3)
    for name in SINCE_THE_LAST_SYNC:
        resumed[third][name] = straight[third][name]
    at_end = {name for row in resumed if row["step"] == 2 for name in row if "in_context_at_end" in name}
    assert at_end, "the interrupted run validated step 2 as its last step"
    resumed = [{n: value for n, value in row.items() if row["step"] != 2 or n not in at_end} for row in resumed]
    assert resumed == straight and any("validation/forward_kl" in row for row in straight)
    losses = {row["train/loss"] for rows in (straight, other) for row in rows if row["step"] == 1}
    assert len(losses) == 2, "the date does not reach the prompts"
    ours, theirs = (load_file(dated / f"checkpoints/{n}/step_3/hf/model.safetensors") for n in ("straight", "resumed"))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    (first,) = {_info(dated, name, step)["clock"] for name in ("straight", "resumed") for step in (2, 3)}
    assert first == "2024-07-27T23:50:00+02:00"
    assert all(f"first start: {first}" in ended[name][2] for name in ("straight", "interrupted", "resumed"))
    assert json.loads((dated / "runs/resumed/versions.json").read_text())["clock"] == first
    assert "changed since" not in ended["resumed"][2] and not (dated / "runs/resumed/changes.json").exists()


@pytest.mark.slow
def test_resume_with_changed_inputs_is_refused_unless_changes_are_allowed(dated: Path, ended) -> None:
    for message in REFUSED:
        code, _, output = ended[message]
        sentence = output.splitlines()[-1]
        assert code == 2 and f"because {message}" in sentence and ALLOWED in sentence, output
    assert [ended[name][0] for name in ("allowed", "again")] == [0, 0], ended
    info, output = _info(dated, "another day", 2), ended["allowed"][2]
    changes = info["changes"]
    expected = (
        "data.train.prompt_file has changed (10 of 10 prompts removed, 10 added)",
        "distillation.num_prompts_per_step was 4 and is 2",
        "data.shuffle was True and is False",
        "data.validation has different problems and gold answers",
    )
    assert sorted(change["what"] for change in changes) == sorted(expected)
    assert all(what in output for what in expected), output
    assert all(change["step"] == 1 and change["when"].startswith("2031-") for change in changes)
    (omitted,) = (line for line in output.splitlines() if "data.validation has" in line)
    assert info["in_context"] is None and "in_context" in omitted
    assert info["clock"] == _info(dated, "another day", 1)["clock"], "the clock does not change"
    assert info["data"]["num_prompts_per_step"] == 2
    # The new checkpoint contains the new inputs, so the next resume finds no changes.
    assert "changed since" not in ended["again"][2] and "data.validation has" not in ended["again"][2]
    assert json.loads((dated / "runs/another day/changes.json").read_text()) == changes


def _differing_mains(ports: Sequence[int], line: Sequence[str], by_rank: str) -> list[tuple[int, str, str]]:
    """Start two runs: in the first, rank 1 tokenizes texts differently; in the second, ranks read different files."""
    from distill.data import rendering

    made = rendering.token_ids

    def shorter(tokenizer: Any, texts: Sequence[str], *args: Any, **kwargs: Any) -> list[list[int]]:
        """Remove the last token of prompts, but not of the texts that check the tokenizer at start."""
        found = zip(texts, made(tokenizer, texts, *args, **kwargs), strict=True)
        return [ids[:-1] if "<|im_start|>" in text else ids for text, ids in found]

    other = mock.patch.object(rendering, "token_ids", shorter)
    with other if os.environ["RANK"] == "1" else contextlib.nullcontext():
        ended = _mains(ports[:1], [line])
    return ended + _mains(ports[1:], [[*line, by_rank]])


@pytest.mark.slow
def test_ranks_with_different_prompts_or_data_exit_with_code_2(dated: Path) -> None:
    shutil.copy(dated / "problems.jsonl", dated / "rank_0.jsonl")
    (dated / "rank_1.jsonl").write_text((dated / "problems.jsonl").read_text().replace("3 + 3", "3 + 4"))
    by_rank = f"data.train.data_path={dated}/rank_${{oc.env:RANK}}.jsonl"
    line = _command(dated, "differing", f"policy.tokenizer.name={dated}/undated")
    first, second = run_ranks(2, _differing_mains, [free_port(), free_port()], line, by_rank)
    assert [code for code, _, _ in first + second] == [2] * 4, first
    for part, (_, _, output) in zip(("tokens", "problems"), first, strict=True):
        assert re.search(f"error: data.train: rank 1 on .* than rank 0 .*different {part}", output), output
