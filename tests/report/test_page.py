"""The page of runs: numbers of the overview, comparison, size, hostile texts, the command."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest

from distill.checkpoint.lock import DirectoryLock
from distill.config import LoraConfig
from distill.metrics.sinks import JsonlSink
from distill.report.html import PAGE, build_page
from distill.report.page_data import Report, write_run_page
from distill.report.prompts import titles
from distill.report.samples import Limits
from distill.report.tables import MOST_ROWS
from distill.run_files import ALARMS_FILE, METRICS_FILE, RECIPE_FILE, REPORT_FILE, VALIDATION_FOLDER
from scripts.launch import ROOT
from scripts.report import main
from tests.report.run_folders import CONFIG, response, write_rows, write_run
from tests.report.synthetic import HOSTILE, page_data


def index_of(*folders: Path, **limits: int) -> dict[str, Any]:
    return dict(Report(folders, Limits(**limits)).page_data().index)


def validations(run: Path, *rows: dict[str, float]) -> None:
    """Replace the metrics of the run by validations at steps 0, 4, 8 and so on."""
    (run / METRICS_FILE).unlink()
    sink = JsonlSink(run / METRICS_FILE)
    for number, row in enumerate(rows):
        sink.write(4 * number, {f"validation/{name}": value for name, value in row.items()})
    sink.write(
        4 * len(rows), {"train/loss": 0.5, "train/total_num_tokens": 2000.0, "timing/train/total_step_time": 90.0}
    )
    sink.close()


def verdicts(run: Path, step: int, *problems: str, kl: float = 0.1) -> None:
    """Write a validation's responses: one word per problem, one letter per response (r: right, w: wrong)."""
    import random

    draw, rows = random.Random(0), []
    for problem, letters in enumerate(problems):
        for number, letter in enumerate(letters):
            row = response(problem, number, 4, step, draw, ["a", "b"])
            row |= {"verdict": {"r": "right", "w": "wrong"}[letter], "forward_kl": [kl] * 4}
            rows.append(row)
    write_rows(run / VALIDATION_FOLDER / f"step_{step}.jsonl", rows)


BEFORE = {"forward_kl": 0.4, "accuracy": 0.1, "accuracy_stderr": 0.02, "avg_length": 20.0}
AFTER = {"forward_kl": 0.1, "accuracy": 0.5, "accuracy_stderr": 0.03, "avg_length": 30.0, "in_context_accuracy": 0.6}


def test_the_headline_has_gap_accuracy_length_and_cost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    validations(run, BEFORE, AFTER)
    shown = {each["label"]: (each["value"], each["detail"]) for each in index_of(run)["runs"][0]["headline"]}
    assert shown["gap closed"] == ("75%", "KL(teacher || student) 0.4000 before training, 0.1000 at step 4")
    detail = "at step 4; before training 10.0% ± 2.0%; context in view 60.0%"
    assert shown["accuracy"] == ("50.0% ± 3.0%", detail)
    assert shown["mean length"] == ("30.0 tokens", "at step 4; 20.0 before training")
    assert shown["cost"] == ("2.00k tokens" if "2.00k" in shown["cost"][0] else "2k tokens", "8 steps in 90 s")


def test_charts_have_the_series_with_data(tmp_path: Path) -> None:
    found = {chart["id"]: chart for chart in index_of(write_run(tmp_path / "run"))["charts"]}
    names = {id_: [each["name"] for each in chart["series"]] for id_, chart in found.items()}
    assert names["memory"] == ["memory/training_gib", "forecast/memory/training_gib"]
    assert names["time"] == ["timing/train/generation", "timing/train/policy_training"]
    assert names["accuracy"] == ["validation/accuracy", "pass@2"] and names["repetition"] == ["train/repetition_rate"]
    errors = [each["error"] for each in found["accuracy"]["series"]]
    assert errors == ["validation/accuracy_stderr", "pass@2_stderr"]
    bands = {each["name"]: each["band"] for each in found["length"]["series"] if each["band"]}
    quantiles = [f"train/p{p}_gen_tokens_per_sample" for p in (10, 90)]
    assert bands == {"length_p50": ["length_p10", "length_p90"], "train/p50_gen_tokens_per_sample": quantiles}
    assert found["positions"]["kind"] == "positions" and "entropy" not in found and "lr" in found


def test_one_validation_closes_no_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    validations(run, BEFORE)
    assert "gap closed" not in {each["label"] for each in index_of(run)["runs"][0]["headline"]}


def test_the_accuracy_is_beside_that_of_the_control(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = replace(CONFIG, distillation=replace(CONFIG.distillation, control=True))
    control = write_run(tmp_path / "other", config=config)
    validations(run, BEFORE, AFTER)
    validations(control, BEFORE, {**AFTER, "accuracy": 0.12})
    of_run, of_control = (each["headline"] for each in index_of(run, control)["runs"])
    detail = {each["label"]: each["detail"] for each in of_run}["accuracy"]
    assert "control other 12.0% ± 3.0%" in detail
    assert "control " not in json.dumps(of_control)


def test_the_recipe_is_shown_as_its_difference_from_the_parent(tmp_path: Path) -> None:
    recipe = index_of(write_run(tmp_path / "run"))["runs"][0]["recipe"]
    assert recipe["parent"] == "parent.yaml" and "max_num_steps: 4" in recipe["text"]
    changes = {change["key"]: (change["old"], change["new"]) for change in recipe["changes"]}
    assert changes == {"distillation.max_num_steps": ("1000", "4"), "distillation.seed": ("42", "7")}


def test_runs_are_compared_on_the_problems_that_both_answered(tmp_path: Path) -> None:
    reverse = replace(CONFIG, loss_fn=replace(CONFIG.loss_fn, kl_type="reverse"))
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", config=reverse)
    verdicts(first, 4, "rw", "ww", "rr", kl=0.4)
    verdicts(second, 4, "rr", "rw", kl=0.1)
    found = index_of(first, second)
    assert found["recipe_differences"] == [{"key": "loss_fn.kl_type", "values": ["mixed", "reverse"]}]
    table = found["final"]
    assert table["columns"] == ["first", "second"]
    cells = [(row["label"].strip(), row["cells"]) for row in table["rows"]]
    kl, accuracy = (cells[i + 1][1] for i, (label, _) in enumerate(cells) if label in ("KL, last", "accuracy, last"))
    assert accuracy == ["-", "+50.0 ± 0.0 points (2 problems)"] and kl == ["-", "-0.3000 ± 0.0000 (2 problems)"]
    # pass@2 by problem: 1, 0, 1 and 1, 1; the standard deviation of the former is 0.577
    assert ("pass@2", ["66.7% ± 33.3%", "100.0% ± 0.0%"]) in cells


def test_responses_to_the_same_prompt_are_neighbours_in_all_runs_and_steps(tmp_path: Path) -> None:
    data = Report([write_run(tmp_path / "a"), write_run(tmp_path / "b")], Limits()).page_data()
    samples, sets = data.index["samples"], data.index["sample_sets"]
    assert samples["prompt"] == sorted(samples["prompt"]) and len(data.index["prompts"]) == 4  # 3 and one of training
    of_first = [sets[number] for number, prompt in zip(samples["set"], samples["prompt"], strict=True) if prompt == 0]
    assert {(each["run"], each["kind"], each["step"]) for each in of_first} == {
        (run, kind, step) for run in (0, 1) for kind, step in (("validation", 0), ("validation", 4), ("in_context", 0))
    }
    block = data.blocks[0]
    in_context = [s for s in block["samples"] if str(s["teacher_prompt"]).startswith("A rule. <")]
    assert in_context and all("A rule" not in prompt["prompt"] for prompt in block["prompts"].values())


def test_every_sample_is_where_the_list_says(tmp_path: Path) -> None:
    data = Report([write_run(tmp_path / "run", problems=400, number=1, tokens=2)], Limits()).page_data()
    samples = data.index["samples"]
    blocks = list(data.blocks)
    assert len(blocks) > 1
    for prompt, tokens, block, at in zip(*(samples[n] for n in ("prompt", "tokens", "block", "at")), strict=True):
        sample = blocks[block]["samples"][at]
        assert (sample["prompt"], len(sample["texts"])) == (prompt, tokens)
        assert str(prompt) in blocks[block]["prompts"]


def test_titles_omit_what_all_prompts_have_in_common() -> None:
    prompts = [f"<|user|>\nHow many {what} are there?<|end|>\n<|assistant|>\n" for what in ("apples", "trees")]
    assert titles(prompts) == ["How many apples are there?", "How many trees are there?"]
    assert titles(["same"]) == ["same"] and titles([]) == []


def test_of_many_validations_the_first_the_last_and_evenly_spaced_ones_are_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=9, validated=range(10), problems=1, tokens=2)
    found = index_of(run, steps=4)
    assert [each["step"] for each in found["sample_sets"] if each["kind"] == "validation"] == [0, 3, 6, 9]
    (note,) = found["notes"]
    assert "6 of 10" in note and "--steps" in note
    assert len(found["runs"][0]["tables"]["validation"]["step"]) == 10, "curves have all validations"
    assert [curve["step"] for curve in found["runs"][0]["positions"]["curves"]] == [0, 3, 6, 9]


@pytest.mark.parametrize("limits", [{"samples": 12}, {"tokens": 60}])
def test_a_limit_keeps_the_same_prompts_in_all_sets(limits: dict[str, int], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", problems=8, number=1, tokens=4)
    found = index_of(run, **limits)
    samples, sets = found["samples"], found["sample_sets"]
    kept = {
        kind: {p for p, n in zip(samples["prompt"], samples["set"], strict=True) if sets[n]["kind"] == kind}
        for kind in ("validation", "in_context")
    }
    assert kept["validation"] == kept["in_context"] and 2 <= len(kept["validation"]) < 8
    assert len(samples["set"]) <= limits.get("samples", 99) and sum(samples["tokens"]) <= limits.get("tokens", 999)
    assert any("--samples" in note for note in found["notes"])


def test_a_long_curve_is_thinned_but_keeps_its_peaks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", validated=())
    rows = [{"step": step, "train/loss": 9.0 if step == 4325 else 1.0 / step} for step in range(1, 10_001)]
    rows[5003]["train/loss"] = None  # type: ignore[assignment]
    rows[7774]["train/loss"] = 0.0
    write_rows(run / METRICS_FILE, rows)
    table = index_of(run)["runs"][0]["tables"]["train"]
    assert len(table["step"]) <= 1.5 * MOST_ROWS and {1, 4325, 5004, 7775, 10_000} <= set(table["step"])


def test_the_page_of_500_samples_of_48_tokens_has_at_most_3_mb(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=300, validated=(300,), problems=250, number=2, tokens=48)
    out = tmp_path / "page.html"
    assert main([str(run), "--out", str(out)]) == 0
    assert len(read_index(out.read_text())["samples"]["set"]) >= 500
    assert out.stat().st_size <= 3e6


# ---- security --------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Elements and attributes of a page, and the texts of its script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.texts:
            self.texts[self._open][-1] += data


def elements(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    parser.close()
    return parser


def read_index(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="text/plain" id="index">([^<]*)</script>', page)
    assert match is not None
    return dict(json.loads(gzip.decompress(base64.b64decode(match[1]))))


def shape(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Elements with their attributes, without data blocks and without the policy's hashes."""
    return [(tag, attributes) for tag, attributes in elements(page).tags if attributes.get("class") != "block"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_text_is_only_data(hostile: str, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", problems=1, number=1)
    model = replace(CONFIG.policy, model_name=hostile)
    run = write_run(
        tmp_path / re.sub("[/\0\ud800]", "", hostile),
        problems=1,
        number=1,
        config=replace(CONFIG, policy=model),
        change=lambda row: row.update(
            prompt=hostile, answer=hostile, source=hostile, gold=hostile, finish=hostile, token_texts=[hostile] * 12
        ),
    )
    pages = [build_page(Report([folder], Limits()).page_data()) for folder in (plain, run)]
    assert shape(pages[1]) == shape(pages[0])
    for tag, attributes in elements(pages[1]).tags:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "script" or set(attributes) <= {"type", "id", "class", "data-block"}
    blocks = [text for text in elements(pages[1]).texts["script"] if re.fullmatch(r"[A-Za-z0-9+/=]+", text)]
    assert len(blocks) == 2, "the index and one block"
    expected = hostile.encode("utf-8", "replace").decode()
    found = read_index(pages[1])
    assert found["sources"] == ["gsm_validation", expected] or expected in found["sources"]
    assert expected in {change["new"] for change in found["runs"][0]["recipe"]["changes"]}


def test_a_title_is_escaped() -> None:
    assert elements(build_page(page_data(runs=1))).texts["title"] == [f"Report of 1 runs {HOSTILE[0]}"]


def test_the_policy_permits_the_scripts_and_styles_of_the_page_and_no_network() -> None:
    page = elements(build_page(page_data(runs=1, problems=1)))
    (policy,) = [each["content"] for tag, each in page.tags if tag == "meta" and "http-equiv" in each]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert not {"connect-src", "frame-src", "font-src", "object-src"} & set(rules) and "unsafe" not in str(policy)
    code = [text for text in page.texts["script"] if not re.fullmatch(r"[A-Za-z0-9+/=]+", text)]
    for name, texts in (("script-src", code), ("style-src", page.texts["style"])):
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules[name].split() == [f"'sha256-{each}'" for each in hashes] and hashes


def test_no_file_of_the_page_refers_to_the_network() -> None:
    for path in PAGE.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"""(src|href)=(?!"(data:|#))|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon""", text
        ), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_without_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one"), write_run(tmp_path / "two\x1b[31m")
    assert main(["one", "two\x1b[31m", "--table"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.splitlines()[0].split() == ["one", "two?[31m"]
    assert "accuracy" in printed and not (tmp_path / REPORT_FILE).exists()


@pytest.mark.parametrize("arguments", [["missing"], ["run", "--out", "missing/page.html"]])
def test_a_user_error_has_exit_code_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", tokens=2)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["run", "--steps", "0"], ["run", "--samples", "x"]])
def test_wrong_arguments_have_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tokens=2)
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, omegaconf=None, tyro=None, numpy=None)"
    code = f"{blocked}; from scripts.report import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "page.html"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), "--out", str(out)], check=True, cwd=ROOT)
    assert out.stat().st_size > 10_000


def test_the_page_of_a_run_that_ends_shows_its_end_before_the_status_file_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", state="running")
    lock = DirectoryLock(run, "runtime.run_dir")
    states: tuple[Literal["finished", "failed"], ...] = ("finished", "failed")
    for state in states:
        page = write_run_page(run, state)
        assert page == run / REPORT_FILE
        shown = read_index(page.read_text())["runs"][0]
        assert shown["status"] == state and state in shown["ending"]
    code = (
        "import sys; from distill.run_files import owner_of; print(owner_of(__import__('pathlib').Path(sys.argv[1])))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(run)], check=True, cwd=ROOT, capture_output=True, text=True)
    assert f"process {os.getpid()}" in found.stdout, "the run has lost the lock of its directory"
    del lock


def test_runs_with_equal_names_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "exp_001", tokens=2) for name in ("a", "b")]
    assert [run["name"] for run in index_of(*runs)["runs"]] == ["a/exp_001", "b/exp_001"]
    (runs[0] / RECIPE_FILE).unlink()
    assert len(index_of(*runs)["recipe_differences"]) > 10


def test_alarms_are_in_the_headline_and_listed_with_their_messages(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    lines: list[dict[str, Any]] = [
        {"step": 12, "alarm": "repetition", "event": "start", "message": HOSTILE[0]},
        {"step": 14, "alarm": "collapse", "event": "start", "message": "both"},
        {"step": 20, "alarm": "repetition", "event": "end", "message": "it ended"},
        {"step": 30, "alarm": "repetition", "event": "start", "message": "again"},
        {"step": "x", "alarm": None, "event": 3},
    ]
    write_rows(run / ALARMS_FILE, lines)
    with (run / ALARMS_FILE).open("a") as file:
        file.write('{"step": 31, "ala')
    index = index_of(run, other)
    of_run, of_other = index["runs"]
    assert of_run["alarms"] == [
        {"label": "repetition from step 12 to 20, from step 30", "value": HOSTILE[0]},
        {"label": "collapse from step 14", "value": "both"},
    ]
    tiles = {each["label"]: (each["value"], each["detail"]) for each in of_run["headline"]}
    assert tiles["alarms"] == ("2", "repetition from step 12 to 20, from step 30; collapse from step 14")
    assert of_other["alarms"] == [] and "alarms" not in {each["label"] for each in of_other["headline"]}
    assert any("alarms.jsonl is incomplete" in note for note in index["notes"])


def test_the_accuracy_with_the_context_at_the_end_is_beside_that_at_the_start(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    validations(run, BEFORE, {**AFTER, "in_context_at_end_accuracy": 0.55, "pass@2": 0.7, "pass@2_stderr": 0.1})
    write_rows(
        run / VALIDATION_FOLDER / "in_context_at_end.jsonl", read_rows(run / VALIDATION_FOLDER / "in_context.jsonl")
    )
    index = index_of(run)
    detail = {each["label"]: each["detail"] for each in index["runs"][0]["headline"]}["accuracy"]
    assert "context in view 60.0%; context in view at the end 55.0%" in detail
    labels = {(each["kind"], each["step"]): each["label"] for each in index["sample_sets"]}
    assert labels["in_context", 0].startswith("untrained") and labels["in_context", 4].startswith("trained")
    assert "validation/pass@2" not in index["runs"][0]["tables"]["validation"]["series"], "shown once, as pass@2"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_facts_name_the_adapters_of_a_run_that_trains_them(tmp_path: Path) -> None:
    lora = LoraConfig(enabled=True, dim=16, exclude_modules=("*.mlp.*", "o_proj"))
    policy = replace(CONFIG.policy, dtensor_cfg=replace(CONFIG.policy.dtensor_cfg, lora_cfg=lora))
    run = write_run(tmp_path / "run", config=replace(CONFIG, policy=policy))
    found = [
        {each["label"]: each["value"] for each in of_run["facts"]}
        for of_run in index_of(run, write_run(tmp_path / "other"))["runs"]
    ]
    assert found[0]["trained"] == "adapters of rank 16, alpha 32.0, exclude_modules: *.mlp.*, o_proj"
    assert "trained" not in found[1]
