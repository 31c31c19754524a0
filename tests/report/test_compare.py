"""Steps, intervals and problems of the headline and of the table of final numbers; changes of the recipe."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.metrics.sinks import JsonlSink
from distill.report.page_data import Report
from distill.report.prompts import shortened, titles
from distill.report.samples import Limits, select
from distill.run_files import METRICS_FILE, PARENT_FILE, RECIPE_FILE, VALIDATION_FOLDER
from tests.report.run_folders import CONFIG, response, responses, write_rows, write_run


def index_of(*folders: Path, **limits: int) -> dict[str, Any]:
    return dict(Report(folders, Limits(**limits)).page_data().index)


def metrics(run: Path, *rows: dict[str, Any]) -> None:
    """Replace the rows of metrics; a name without prefix is that of a validation's metric."""
    (run / METRICS_FILE).unlink()
    sink = JsonlSink(run / METRICS_FILE)
    for row in rows:
        values = {name if "/" in name else f"validation/{name}": value for name, value in row.items() if name != "step"}
        sink.write(row["step"], values)
    sink.close()


def kls(run: Path, step: int, *problems: list[float], **changes: Any) -> None:
    """Write a validation's responses, one per problem, with the KLs of their tokens."""
    rows = []
    for number, values in enumerate(problems):
        row = response(number, 0, len(values), step, random.Random(0), ["a", "b"])
        rows.append({**row, "forward_kl": values, "verdict": "right", **changes})
    write_rows(run / VALIDATION_FOLDER / f"step_{step}.jsonl", rows)


def tiles(run: Path) -> dict[str, tuple[str, str | None]]:
    return {each["label"]: (each["value"], each["detail"]) for each in index_of(run)["runs"][0]["headline"]}


def cells(*runs: Path) -> dict[str, list[str]]:
    return {row["label"].strip(): row["cells"] for row in index_of(*runs)["final"]["rows"]}


def difference(index: Mapping[str, Any]) -> str:
    """The difference of the KL of the second run to the first run."""
    rows = index["final"]["rows"]
    (number,) = (i for i, row in enumerate(rows) if row["label"] == "KL, last")
    return str(rows[number + 1]["cells"][1])


BEFORE, AFTER = ({"forward_kl": kl, "accuracy": 0.5, "avg_length": 9.0} for kl in (0.4, 0.1))


@pytest.mark.parametrize(("first", "expected"), [(0, "before training"), (3, "at step 3")])
def test_only_step_0_is_before_training(first: int, expected: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics(run, {"step": first, **BEFORE}, {"step": 8, **AFTER}, {"step": 8, "train/loss": 1.0})
    shown = tiles(run)
    assert len(shown) == 4
    for label in ("gap closed", "accuracy", "mean length"):
        assert expected in str(shown[label][1]) and "before" not in str(shown[label][1]).replace("before training", "")
    assert ("before" in json.dumps(shown)) is (first == 0)
    assert cells(run)["validations"] == [f"steps {first} and 8"]


@pytest.mark.parametrize(("step", "detail"), [(0, "before training"), (5, "at step 5")])
def test_one_validation_is_compared_with_nothing(step: int, detail: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics(run, {"step": step, **BEFORE}, {"step": 8, "train/loss": 1.0})
    shown = tiles(run)
    assert shown["accuracy"] == ("50.0%", detail) and shown["mean length"] == ("9.0 tokens", detail)
    assert cells(run)["validations"] == [f"step {step}"]
    assert "KL, last" in cells(run) and "KL, first" not in cells(run) and "gap closed" not in cells(run)


def test_the_standard_error_is_that_of_the_same_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0, validated=())
    rows = [{"step": 0, "accuracy": 0.1, "accuracy_stderr": 0.02}, {"step": 4, "accuracy": 0.5}, {"step": 8, "x": 1.0}]
    metrics(run, *rows)
    assert tiles(run)["accuracy"] == ("50.0%", "at step 4; before training 10.0% ± 2.0%")


def test_numbers_of_different_steps_have_their_step_in_the_cell(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, validated=()) for name in ("a", "b")]
    for run, first, until in ((runs[0], 0, 4), (runs[1], 2, 6)):
        metrics(run, {"step": first, **BEFORE}, {"step": until, **AFTER}, {"step": until, "train/loss": 1.0})
        kls(run, until, [0.1, 0.1], [0.3])
    found = cells(*runs)
    assert found["gap closed"] == ["75.0% (steps 0 to 4)", "75.0% (steps 2 to 6)"]
    assert found["accuracy, first"] == ["50.0% (step 0)", "50.0% (step 2)"]
    assert found["accuracy, last"] == ["50.0% (step 4)", "50.0% (step 6)"]
    assert difference(index_of(*runs)).endswith("(2 problems; steps 6 and 4)")
    assert found["validations"] == ["steps 0 and 4", "steps 2 and 6"]
    same = cells(runs[0], runs[0])
    assert same["gap closed"] == ["75.0%", "75.0%"] and same["accuracy, last"] == ["50.0%", "50.0%"]


def test_the_difference_of_the_kl_is_that_of_the_kls_above_it(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=0, validated=()) for name in ("a", "b")]
    for run, long in zip(runs, ([0.1] * 9, [0.2] * 3), strict=True):
        kls(run, 4, [1.0], long)
        total = 1.0 + sum(long)
        metrics(run, {"step": 4, "forward_kl": total / (1 + len(long))})
    found = cells(*runs)
    assert [cell.split()[0] for cell in found["KL, last"]] == ["0.1900", "0.4000"]
    assert difference(index_of(*runs)).split()[0] == "+0.2100"


def test_final_numbers_have_standard_errors_over_problems(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0, validated=())
    kls(run, 0, [2.0, 2.0], [4.0, 4.0])
    kls(run, 4, [2.0, 2.0], [0.0, 0.0, 0.0, 0.0])
    metrics(run, {"step": 0, "forward_kl": 3.0, "avg_length": 2.0}, {"step": 4, "forward_kl": 2 / 3, "avg_length": 3.0})
    found = cells(run)
    assert found["KL, first"] == ["3.0000 ± 1.0000"]
    # mean 2/3; contributions (4 - 4/3) / 6 and -(8/3) / 6: sqrt(2 * 2 * (4/9)^2)
    assert found["KL, last"] == ["0.6667 ± 0.8889"]
    assert found["mean length, last"] == ["3.0 ± 1.0"] and found["mean length, first"] == ["2.0 ± 0.0"]
    # contributions of a: (4/9)/3 - (2/3) * (-1/2)/9 = 5/27, of b: -5/27; sqrt(2 * 2 * (5/27)^2)
    assert found["gap closed"] == ["77.8% ± 37.0%"]


# ---- problems of several runs ----------------------------------------------------------------------------------------


def other_template(row: dict[str, Any]) -> None:
    text = row["prompt"].removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
    row.update(prompt=f"<bos>[INST] {text} [/INST]", teacher_prompt=None)


def test_problems_of_runs_with_other_chat_templates_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", change=other_template)]
    data = Report(runs, Limits()).page_data()
    found = data.index
    assert len(found["prompts"]) == 4, "3 problems, and one of training"
    assert "(3 problems)" in difference(found)
    assert [note.startswith("b: ") and "3 problems" in note for note in found["notes"]] == [True]
    samples = [sample for block in data.blocks for sample in block["samples"]]
    assert sum(str(each["teacher_prompt"]).startswith("<bos>[INST] Question") for each in samples) == 12


@pytest.mark.parametrize(
    "change",
    [{"gold": "43"}, {"source": "other"}, {"prompt_id": 77}, {"prompt": "<bos>[INST] Question 1: Another [/INST]"}],
)
def test_problems_that_differ_are_not_compared(change: dict[str, Any], tmp_path: Path) -> None:
    def one_differs(row: dict[str, Any]) -> None:
        other_template(row)
        if row["prompt_id"] == 1:
            row.update(change)

    found = index_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", change=one_differs))
    assert "(2 problems)" in difference(found)
    (_, note) = found["notes"]
    assert note.startswith("2 problems are only") and "2 common" in note


def test_a_title_is_cut_at_the_end_of_a_word_and_has_an_ellipsis() -> None:
    short, long = shortened("word " * 32), shortened("word " * 33)
    assert short == ("word " * 32).strip() and long == short + "…"
    assert shortened("x" * 500) == "x" * 159 + "…"


def test_titles_have_no_chat_template_of_their_kind_of_prompt(tmp_path: Path) -> None:
    def in_training(row: dict[str, Any]) -> None:
        row["prompt"] = "<|im_start|>system\nBe brief.<|im_end|>\n" + row["prompt"]

    run = write_run(tmp_path / "run")
    write_rows(run / "train_samples" / "step_1.jsonl", responses(3, 1, 4, 1, in_training))
    shown = [each["title"] for each in index_of(run)["prompts"]]
    assert len(shown) == 6 and all(title.startswith("Question ") and "<|im_end|>" not in title for title in shown)


def test_a_single_prompt_has_no_chat_template_in_its_title(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_rows(run / "train_samples" / "step_1.jsonl", [response(5, 0, 2, 1, random.Random(0), ["a"] * 200)])
    assert titles(["<|im_start|>user\nOne<|im_end|>\n"]) == ["<|im_start|>user One<|im_end|>"]
    assert all(each["title"].startswith("Question ") for each in index_of(run)["prompts"])


# ---- responses -------------------------------------------------------------------------------------------------------


def test_the_responses_token_is_found_among_the_top_tokens_by_its_id(tmp_path: Path) -> None:
    lists = {"student": [[7, "same text", 0.5], "damaged", [8, "same text", 0.2]], "teacher": [[9, "x", 0.9]]}

    def change(row: dict[str, Any]) -> None:
        row.update(top_tokens=[{"at": 1, **lists}], token_ids=[7, 8, *[7] * 10])

    data = Report([write_run(tmp_path / "run", change=change)], Limits()).page_data()
    tops = [sample["top"] for sample in data.blocks[0]["samples"] if len(sample["top"]) == 1]
    assert len(tops) == 12
    for (top,) in tops:
        assert top["chosen"] == {"student": 1, "teacher": None} and top["student"][1] == ["same text", 0.2]


def test_kl_by_position_counts_the_tokens_without_a_finite_kl(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0, validated=())
    kls(run, 4, [None, 1.0, 2.0])  # type: ignore[list-item]
    curve = index_of(run)["runs"][0]["positions"]["curves"][0]
    assert curve["forward"] == [None, 1.0, 2.0] and curve["count"] == [0, 1, 1]


def test_training_samples_name_the_weights_that_were_compared(tmp_path: Path) -> None:
    labels = [each["label"] for each in index_of(write_run(tmp_path / "run"))["sample_sets"] if each["kind"] == "train"]
    assert len(labels) == 1 and "after" in labels[0] and "step 1" in labels[0]


@pytest.mark.parametrize("order", [[2, 3, 4, 5, 0, 1], [1, 0, 3, 2, 5, 4], None])
def test_a_file_that_is_replaced_after_its_scan_gives_a_note_and_no_texts(
    order: list[int] | None, tmp_path: Path
) -> None:
    """``order``: of the lines of the new file, with other problems or other responses; None: the file is removed."""
    run = write_run(tmp_path / "run")
    path = run / VALIDATION_FOLDER / "step_4.jsonl"
    lines = [line.ljust(9000) for line in path.read_text().splitlines()]  # equal lengths: each line is a row
    path.write_text("\n".join(lines))
    data = Report([run], Limits()).page_data()
    path.unlink()
    if order:
        path.write_text("\n".join(lines[i] for i in order))
    samples = [sample for block in data.blocks for sample in block["samples"]]
    assert sum(sample["answer"] == "" and sample["texts"] == [] for sample in samples) == 6
    (note,) = data.index["notes"]
    assert "step_4.jsonl" in note


def test_the_note_on_omitted_responses_names_the_longest(tmp_path: Path) -> None:
    def longer(row: dict[str, Any]) -> None:
        row["tokens"] = 1000 if row["prompt_id"] == 0 else 4

    report = Report([write_run(tmp_path / "run", problems=8, number=1, tokens=4, change=longer)], Limits(tokens=1500))
    kept, note = select(report.sets[0], report.limits)
    assert len(kept) < 8 and note is not None and "longest" in note
    _, note = select(report.sets[0], Limits(samples=12))
    assert note is not None and "longest" not in note


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_a_key_that_only_the_parent_has_is_shown_as_removed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    parent = yaml.safe_load((run / PARENT_FILE).read_text())
    parent["recipe"]["policy"]["optimizer"]["kwargs"] = {"foreach": True}
    parent["recipe"]["loss_fn"]["removed"] = {"a": 1}
    (run / PARENT_FILE).write_text(yaml.safe_dump(parent))
    changes = {each["key"]: (each["old"], each["new"]) for each in index_of(run)["runs"][0]["recipe"]["changes"]}
    assert changes["loss_fn.removed.a"] == ("1", "(absent)")
    (run / PARENT_FILE).unlink()
    recipe = yaml.safe_load((run / RECIPE_FILE).read_text())
    del recipe["loss_fn"]["kl_type"]  # a recipe of an earlier version
    (run / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    assert "(absent)" not in {each["new"] for each in index_of(run)["runs"][0]["recipe"]["changes"]}


def test_a_resume_that_changed_the_recipe_gives_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name, seed in (("10", 5), ("9_2", 6), ("9", 4)):
        earlier = replace(CONFIG, distillation=replace(CONFIG.distillation, seed=seed))
        text = yaml.safe_dump(json.loads(json.dumps(asdict(earlier))))
        (run / f"config_until_step_{name}.yaml").write_text(text)
    notes = index_of(run)["notes"]
    expected = [(9, 4, 6), (9, 6, 5), (10, 5, 7)]
    for note, (step, old, new) in zip(notes, expected, strict=True):
        assert f"step {step} " in note and f"distillation.seed from {old} to {new}." in note


# ---- unreadable files ------------------------------------------------------------------------------------------------


def test_an_unreadable_file_gives_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name, link in ((f"{VALIDATION_FOLDER}/step_4.jsonl", "missing"), (METRICS_FILE, "/proc/self/mem")):
        (run / name).unlink()
        os.symlink(link, run / name)
    (run / "train_samples" / "step_2.jsonl").mkdir()
    notes = index_of(run)["notes"]
    for name in ("step_4.jsonl", METRICS_FILE, "step_2.jsonl"):
        assert sum(f"/{name} " in note for note in notes) == 1
