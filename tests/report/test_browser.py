"""The report page in headless Chromium: security, filters, tokens, charts, keyboard, themes and narrow windows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill.report.html import PAGE, PageData, build_page
from distill.report.page_data import Report
from distill.report.samples import Limits
from tests.report.browser import Browser, browser, missing_programs
from tests.report.run_folders import write_run
from tests.report.synthetic import HOSTILE, page_data

pytestmark = pytest.mark.browser
VIEWS = ("overview", "curves", "samples", "compare")
SHOWN = ("validation", "in_context")
"""Kinds of sample sets that the synthetic page shows first."""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install chromium chromium-driver)")
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def three() -> PageData:
    return page_data(runs=3)


@pytest.fixture(scope="module")
def one() -> PageData:
    return page_data(runs=1)


@pytest.fixture
def show(window: Browser, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Function that opens a page's view at 1400 pixels. Any message of the console fails the test."""

    def opened(data: PageData, view: str = "overview", width: int = 1400) -> Browser:
        page = tmp_path / "page.html"
        page.write_text(build_page(data), encoding="utf-8")
        window.resize(width)
        window.open(page, f"#{view}", ready=f".view-{view}")
        if view == "samples" and data.index["samples"]["set"]:
            window.wait(lambda: window.count(".response"))
        return window

    window.prefer("light")
    yield opened
    window.run("try { localStorage.clear() } catch {}")
    assert window.console() == []


def columns(data: PageData) -> list[dict[str, Any]]:
    """Samples that the page lists at first, as rows with their number, run and kind."""
    table, sets = data.index["samples"], data.index["sample_sets"]
    rows = [{"i": i} | {name: column[i] for name, column in table.items()} for i in range(len(table["set"]))]
    return [row for row in rows if sets[row["set"]]["kind"] in SHOWN]


def content(data: PageData, row: dict[str, Any]) -> dict[str, Any]:
    return dict(data.blocks[row["block"]]["samples"][row["at"]])


def listed(rows: list[dict[str, Any]]) -> str:
    """Expected text of the number of results."""
    n, prompts = len(rows), len({row["prompt"] for row in rows})
    return f"{n} response{'s' * (n != 1)} to {prompts} prompt{'s' * (prompts != 1)}"


def expect_results(page: Browser, rows: list[dict[str, Any]]) -> None:
    page.wait(lambda: page.texts(".results")[:1] == [listed(rows)])
    assert page.count(".card") == len({row["prompt"] for row in rows})


def compared(data: PageData) -> dict[str, Any]:
    """A sample with KLs in the first card."""
    return next(row for row in columns(data) if row["prompt"] == 0 and row["forward"] is not None)


# Security


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_texts_stay_text(show: Callable[..., Browser], three: PageData, view: str) -> None:
    page = show(three, view)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.run("document.querySelectorAll('.card-title button').forEach(each => each.click())")
    assert page.run("return window.hostile ?? null") is None
    assert page.dialog() is None
    assert page.count("img, iframe, object, embed, form, body [style*=javascript], #app b:empty") == 0
    assert page.count("script") == 1 + len(three.blocks) + len(list(PAGE.rglob("*.js")))
    assert page.run("return document.title") == three.index["title"]
    assert HOSTILE[1 if view == "overview" else 0] in page.text("#app")


def test_every_hostile_token_is_shown_as_text(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "samples")
    for prompt, text in enumerate(HOSTILE):
        page.run("document.querySelector(arguments[0]).scrollIntoView()", f'.card[data-prompt="{prompt}"]')
        selector = f'.card[data-prompt="{prompt}"] .t[data-i="1"]'
        page.wait(partial(page.count, selector))
        plain = re.sub(r"[\ud800\x00-\x1f\u2028-\u202e]|U\+[0-9A-F]{4}|\?", "", text)
        assert re.sub(r"U\+[0-9A-F]{4}|\?", "", page.text(selector)) == plain
    assert page.run("return window.hostile ?? null") is None


def test_the_policy_refuses_scripts_and_network(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one)
    page.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hostile = 1'}))")
    assert page.run("return window.hostile ?? null") is None
    assert page.run("return fetch('data:text/plain,x').then(() => 'loaded', () => 'refused')") == "refused"
    assert len(page.console()) >= 2


# Samples


def test_filters_change_the_list(show: Callable[..., Browser], three: PageData) -> None:
    page = show(three, "samples")
    rows = columns(three)
    expect_results(page, rows)
    page.choose("select[name=verdict]", "wrong")
    rows = [row for row in rows if row["verdict"] == 1]
    expect_results(page, rows)
    page.wait(lambda: set(page.texts(".response .badge")) == {"✗ wrong"})
    page.choose("select[name=source]", three.index["sources"][1])
    rows = [row for row in rows if row["source"] == 1]
    expect_results(page, rows)
    page.type("input[name=tokens-max]", "40")
    rows = [row for row in rows if row["tokens"] <= 40]
    expect_results(page, rows)
    page.type("input[name=kl-min]", "0.1")
    rows = [row for row in rows if row["forward"] is not None and row["forward"] >= 0.1]
    expect_results(page, rows)
    assert rows


def test_the_kl_filter_follows_the_kind_of_kl(show: Callable[..., Browser]) -> None:
    data = page_data(runs=1)
    reverse = data.index["samples"]["reverse"]
    reverse[:] = [None if value is None else 2 * value for value in reverse]
    page = show(data, "samples")
    page.type("input[name=kl-min]", "0.15")
    rows = columns(data)
    expect_results(page, [row for row in rows if row["forward"] is not None and row["forward"] >= 0.15])
    page.click(".colors button[data-key=reverse]")
    expect_results(page, [row for row in rows if row["reverse"] is not None and row["reverse"] >= 0.15])


def test_search_finds_texts_of_blocks_that_are_not_shown(show: Callable[..., Browser], three: PageData) -> None:
    page = show(three, "samples")
    first, second = content(three, columns(three)[-1])["texts"][5:7]
    words = f"{first}{second}".strip()
    page.type("input[name=query]", words.upper())
    rows = [row for row in columns(three) if words in content(three, row)["answer"]]
    assert 0 < len(rows) < len(columns(three)) / 2
    expect_results(page, rows)
    page.wait(lambda: page.count(".t.hit"))
    assert set(page.texts(".t.hit")) >= {first, second}
    assert page.count(".t.hit") < 0.2 * page.count(".t")
    page.type("input[name=query]", "no response has this")
    page.wait(lambda: page.texts(".results")[:1] == ["0 responses to 0 prompts"])
    assert page.count(".card") == 0


def test_steps_are_chosen_and_other_responses_can_be_added(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "samples")
    assert page.texts('.card[data-prompt="0"] .set') == [
        "validation, step 0",
        "in_context, step 0",
        "validation, step 40",
    ]
    page.click("input[data-set='1']")
    rows = [row for row in columns(one) if row["set"] != 1]
    expect_results(page, rows)
    page.choose("select[name=verdict]", "right")
    matching = [row for row in rows if row["verdict"] == 0]
    expect_results(page, matching)
    page.click("input[name=others]")
    expect_results(page, matching)
    first = matching[0]["prompt"]
    page.wait(
        lambda: page.count(f'.card[data-prompt="{first}"] .response') == sum(row["prompt"] == first for row in rows)
    )


@pytest.mark.parametrize(("sort", "key"), [("Highest KL first", "forward"), ("Longest first", "tokens")])
def test_the_list_is_sorted(show: Callable[..., Browser], one: PageData, sort: str, key: str) -> None:
    page = show(one, "samples")
    page.choose("select[name=sort]", sort)
    best: dict[int, float] = {}
    for row in columns(one):
        best[row["prompt"]] = max(best.get(row["prompt"], -1.0), row[key] if row[key] is not None else -1.0)
    order = page.run("return [...document.querySelectorAll('.card')].map(card => Number(card.dataset.prompt))")
    assert [best[prompt] for prompt in order] == sorted(best.values(), reverse=True)


def tooltip_lists(page: Browser) -> list[list[str]]:
    script = """return [...document.querySelectorAll("#tooltip ol")].map(list => [...list.children].map(
        row => row.querySelector("code").textContent + " " + row.querySelector(".probability").textContent))"""
    return list(page.run(script))


@pytest.mark.parametrize("how", ["hover", "focus"])
def test_a_token_shows_its_kls_and_top_tokens(show: Callable[..., Browser], three: PageData, how: str) -> None:
    page = show(three, "samples")
    row = compared(three)
    sample = content(three, row)
    at = sample["top"][1]["at"]
    selector = f'[data-sample="{row["i"]}"] .t[data-i="{at}"]'
    if how == "hover":
        page.hover(selector)
    else:
        page.run("document.querySelector(arguments[0]).focus()", selector)
    page.wait(lambda: page.count("#tooltip:not([hidden])"))
    assert f"token {at + 1} of {len(sample['texts'])}" in page.text("#tooltip")
    kls = page.texts("#tooltip dd .chip-kl")
    assert [float(text) for text in kls] == pytest.approx([sample["forward"][at], sample["reverse"][at]], rel=1e-3)
    assert tooltip_lists(page) == [["·the 50.0%", f"{HOSTILE[0]} 20.0%"], ["·a 70.0%", "↵ 10.0%"]]
    widths = page.run("return [...document.querySelectorAll('#tooltip .bar')].map(bar => bar.style.width)")
    assert widths == ["50%", "20%", "70%", "10%"]
    assert (
        page.run("return document.querySelector(arguments[0]).getAttribute('aria-describedby')", selector) == "tooltip"
    )


def test_the_color_of_a_token_is_the_level_of_its_kl(show: Callable[..., Browser], three: PageData) -> None:
    page = show(three, "samples")
    row = compared(three)
    sample = content(three, row)
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(token => Number(/k(\\d)/.exec(token.className)[1]))"
    )
    for kind in ("forward", "reverse"):
        page.click(f".colors button[data-key={kind}]")
        levels = [sum(kl >= limit for limit in (0.01, 0.03, 0.1, 0.3, 1, 3)) for kl in sample[kind]]
        assert page.run(script, f'[data-sample="{row["i"]}"] .t') == levels


def test_blanks_line_feeds_and_partial_characters_are_visible(show: Callable[..., Browser]) -> None:
    data = page_data(runs=1, problems=1)
    sample = data.blocks[0]["samples"][0]
    sample["texts"] = ["a", "\n\n", "   ", "\t", "", "é", " b\n", "\u202e"]
    page = show(data, "samples")
    tokens = page.texts('[data-sample="0"] .t')
    assert tokens == ["a", "↵\n↵\n", "···", "→", "▯", "é", " b↵\n", "U+202E"]


def test_the_prompt_shows_what_only_the_teacher_read(show: Callable[..., Browser], three: PageData) -> None:
    page = show(three, "samples")
    page.click('.card[data-prompt="1"] .card-title button')
    texts = page.texts('.card[data-prompt="1"] .labelled pre')
    assert texts[0].startswith("<|im_start|>user") and "A rule" in texts[1]
    assert "A rule" in page.text('.card[data-prompt="1"] mark')


def test_different_texts_of_the_teacher_are_at_their_responses(show: Callable[..., Browser]) -> None:
    data = page_data(runs=2, problems=1)
    chosen = [row for row in columns(data) if row["set"] in (2, 4, 6)]
    for number, row in enumerate(chosen):
        data.index["samples"]["forward"][row["i"]] = 0.1
        data.blocks[row["block"]]["samples"][row["at"]]["teacher_prompt"] = f"Trace {number}." if number else None
    page = show(data, "samples")
    assert "different" not in page.text(".card-head .prompt-texts")
    assert page.texts(".card-head .labelled h4") == ["The student read"]
    page.run("document.querySelectorAll('.response-head [aria-expanded]').forEach(each => each.click())")
    for number, row in enumerate(chosen[1:], start=1):
        response = f'[data-sample="{row["i"]}"]'
        assert page.texts(f"{response} .own-text:not([hidden]) pre") == [f"Trace {number}."]
    first = f'[data-sample="{chosen[0]["i"]}"]'
    assert page.count(f"{first} .own-text") == 0 and page.count(f"{first} .same-text") == 1


@pytest.mark.parametrize(
    ("chosen", "marked"), [((0, 1), [[True, False], [False, True]]), ((None, None), None), (None, None)]
)
def test_the_token_of_the_response_is_marked_by_its_place(
    show: Callable[..., Browser], chosen: tuple[int | None, int | None] | None, marked: list[list[bool]] | None
) -> None:
    data = page_data(runs=1, problems=1)
    row = compared(data)
    sample = data.blocks[row["block"]]["samples"][row["at"]]
    entry = sample["top"][1]
    entry["student"][0][0] = entry["teacher"][0][0] = sample["texts"][entry["at"]]  # another token with the same text
    del entry["chosen"]
    if chosen:
        entry["chosen"] = {"student": chosen[0], "teacher": chosen[1]}
    page = show(data, "samples")
    page.hover(f'[data-sample="{row["i"]}"] .t[data-i="{entry["at"]}"]')
    page.wait(lambda: page.count("#tooltip:not([hidden])"))
    script = """return [...document.querySelectorAll("#tooltip ol")].map(
        list => [...list.children].map(item => item.classList.contains("chosen")))"""
    assert page.run(script) == (marked or [[False, False], [False, False]])
    assert page.count("#tooltip .unlisted") == (chosen == (None, None))


def test_a_letter_with_a_longer_lower_case_does_not_shift_the_found_tokens(show: Callable[..., Browser]) -> None:
    data = page_data(runs=1, problems=1)
    sample = data.blocks[0]["samples"][0]
    sample["texts"] = ["\u0130\u0130\u0130", "ab", "Needle", "cd"]
    sample["answer"] = "".join(sample["texts"])
    page = show(data, "samples")
    page.type("input[name=query]", "nEEdle")
    page.wait(lambda: page.count(".t.hit"))
    assert page.texts(".t.hit") == ["Needle"]


def test_cards_and_long_responses_are_drawn_when_scrolled_to(show: Callable[..., Browser]) -> None:
    page = show(page_data(runs=1, problems=24, tokens=1200, steps=4), "samples")
    assert page.count(".card") == 24
    assert page.count(".card .response") < 60
    scroll = "document.querySelector('.card:last-child').scrollIntoView()"
    page.wait(lambda: page.run(scroll) or page.count(".card:last-child .response"))
    page.wait(lambda: page.count(".card:first-child .response") == 0)
    last = ".card:last-child .response"
    drawn = "return document.querySelector(arguments[0]).children.length"
    at_first = page.run(drawn, f"{last} .tokens")
    assert 0 < at_first < 500
    scroll = "const body = document.querySelector(arguments[0]); body.scrollTop = body.scrollHeight"
    page.run(scroll, f"{last} .tokens-scroll")
    page.wait(lambda: page.run(drawn, f"{last} .tokens") > at_first)
    page.click(f"{last} .expand")
    text = "return document.querySelector(arguments[0]).lastChild.textContent"
    assert page.run(text, f"{last} .tokens") == "<|im_end|>"


# Curves


def test_the_x_axis_is_switched_for_all_charts(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.wait(lambda: page.count("#chart-loss .place"))
    assert page.text("#chart-loss .place") == "last, step 40"
    page.click(".toolbar button[data-key=tokens]")
    assert page.text("#chart-loss .place") == "last, tokens 40,000"
    assert page.text("#chart-accuracy .place") == "last, tokens 40,000"
    page.click(".toolbar button[data-key=hours]")
    assert page.text("#chart-loss .place") == "last, hours 0.4"
    assert page.text("#chart-accuracy .place") == "last, hours 0.4"
    assert page.run("return page.built.get('curves').view.charts[0].plot.scales.x.max") == pytest.approx(0.4, abs=0.02)


def test_the_cursor_shows_values_of_all_charts(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.wait(lambda: page.count("#chart-accuracy .u-over"))
    page.hover("#chart-accuracy .u-over")
    page.wait(lambda: page.texts("#chart-accuracy .place")[:1] == ["step 20"])
    series = one.index["runs"][0]["tables"]["validation"]["series"]
    shown = [f"{100 * series[name][2]:.3g}% ± 3%" for name in ("validation/accuracy", "pass@2")]
    assert page.texts("#chart-accuracy .value") == shown
    assert page.text("#chart-kl .place") == "step 20"
    loss = one.index["runs"][0]["tables"]["train"]["series"]["train/loss"]
    assert re.fullmatch(r"step (19|20)", page.text("#chart-loss .place"))
    assert float(page.text("#chart-loss .value")) in (loss[18], loss[19])


def test_dragging_zooms_all_charts_and_a_double_click_resets(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.wait(lambda: page.count("#chart-accuracy .u-over"))
    ends = "return page.built.get('curves').view.charts.slice(0, 3).map(c => c.plot.scales.x.max - c.plot.scales.x.min)"
    before = page.run(ends)
    page.drag("#chart-accuracy .u-over", 60)
    page.wait(lambda: max(page.run(ends)) < 0.5 * min(before))
    assert page.count(".toolbar > button:not([hidden])") == 1
    page.run("document.querySelector('#chart-kl .u-over').dispatchEvent(new MouseEvent('dblclick', {bubbles: true}))")
    page.wait(lambda: page.run(ends) == pytest.approx(before))


def test_stacked_times_and_positions_are_drawn(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.wait(lambda: page.count("#chart-positions canvas"))
    assert page.texts("#chart-positions .item")[0].startswith("step 0")
    curve = one.index["runs"][0]["positions"]["curves"][0]
    assert float(page.text("#chart-positions .value")) == pytest.approx(curve["forward"][-1], rel=1e-3)
    page.click("#chart-positions .tools button")
    assert float(page.text("#chart-positions .value")) == pytest.approx(curve["reverse"][-1], rel=1e-3)
    page.run("document.querySelector('#chart-time').scrollIntoView()")
    page.wait(lambda: page.count("#chart-time canvas"))
    series = one.index["runs"][0]["tables"]["train"]["series"]
    values = [
        series[f"timing/train/{name}"][-1] for name in ("generation", "teacher_logprob_inference", "policy_training")
    ]
    assert [float(text) for text in page.texts("#chart-time .value")] == pytest.approx(values)
    top = "return page.built.get('curves').view.charts.find(c => c.chart.id === 'time').plot.data[7].at(-1)"
    assert page.run(top) == pytest.approx(sum(values))


def test_validations_without_a_value_do_not_interrupt_a_line(show: Callable[..., Browser], one: PageData) -> None:
    index = json.loads(json.dumps(one.index))
    series = index["runs"][0]["tables"]["validation"]["series"]
    series["pass@2"][1:4] = [None, None, None]
    page = show(PageData(index, one.blocks), "curves")
    page.wait(lambda: page.count("#chart-accuracy canvas"))
    gaps = (
        "return page.built.get('curves').view.charts.find(c => c.chart.id === arguments[0]).plot.series[arguments[1]]"
    )
    assert page.run(f"{gaps}._paths.gaps?.length ?? 0", "accuracy", 4) == 0
    assert page.run(f"{gaps}._paths.gaps?.length ?? 0", "loss", 1) == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_fractions_have_an_axis_from_0_to_1(show: Callable[..., Browser], one: PageData, value: float) -> None:
    index = json.loads(json.dumps(one.index))
    series = index["runs"][0]["tables"]["validation"]["series"]
    for name in ("validation/accuracy", "pass@2"):
        series |= {name: [value] * len(series[name]), f"{name}_stderr": [0.0] * len(series[name])}
    page = show(PageData(index, one.blocks), "curves")
    page.wait(lambda: page.count("#chart-accuracy canvas"))
    scale = "return page.built.get('curves').view.charts.find(c => c.chart.id === 'accuracy').plot.scales.y"
    assert (page.run(f"{scale}.min"), page.run(f"{scale}.max")) == (0, 1)


def test_predicted_values_are_dashed_and_have_the_color_of_measured_ones(
    show: Callable[..., Browser], one: PageData
) -> None:
    page = show(one, "curves")
    page.run("document.querySelector('#chart-memory').scrollIntoView()")
    page.wait(lambda: page.count("#chart-memory canvas"))
    lines = page.run(
        "return [...document.querySelectorAll('#chart-memory .swatch line')].map(l => l.attributes.length)"
    )
    colors = page.run(
        "return [...document.querySelectorAll('#chart-memory .swatch line')].map(l => l.attributes.stroke.value)"
    )
    dashed = [count > min(lines) for count in lines]
    assert dashed == [False, True, False, True]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_a_chart_of_any_metric_can_be_added(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.choose("select[name=metric]", "train/mean_gen_tokens_per_sample")
    page.run("document.querySelector('.group:last-child .chart').scrollIntoView()")
    page.wait(lambda: page.count(".group:last-child .chart canvas"))
    series = one.index["runs"][0]["tables"]["train"]["series"]["train/mean_gen_tokens_per_sample"]
    assert float(page.text(".group:last-child .chart .value")) == pytest.approx(series[-1], rel=1e-3)


# Several runs


def test_several_runs_are_compared(show: Callable[..., Browser], three: PageData) -> None:
    page = show(three, "compare")
    assert page.texts(".view-compare section:first-child thead th") == three.index["final"]["columns"]
    cells = page.texts(".view-compare section:last-child tbody tr:first-child td")
    assert cells == three.index["recipe_differences"][0]["values"]
    page.navigate("curves")
    page.wait(lambda: page.count("#chart-loss .value") == 3)
    page.click(".runs .chip:nth-child(2) input")
    assert page.count("#chart-loss .value") == 2
    page.navigate("samples")
    page.wait(lambda: page.count('.card[data-prompt="0"] .column') == 9)


def test_a_page_of_one_run_has_no_comparison(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one)
    assert page.texts("nav a") == ["Overview", "Curves", "Samples"]
    assert page.texts(".tile-value")[:2] == ["88%", "54.7% ± 3.1"]
    assert page.text(".badge") == "✓ finished"
    assert page.texts(".notes li") == one.index["notes"]


def test_missing_parts_leave_a_page(show: Callable[..., Browser]) -> None:
    index = json.loads(json.dumps(page_data(runs=1).index))
    empty: dict[str, Any] = {"step": [], "tokens": [], "hours": [], "series": {}}
    index["runs"][0] |= {
        "headline": [],
        "facts": [],
        "tables": {"train": empty, "validation": empty},
        "positions": None,
    }
    index |= {"sample_sets": [], "samples": {name: [] for name in index["samples"]}, "prompts": []}
    page = show(PageData(index, []), "curves")
    page.wait(lambda: page.count(".plot .empty"))
    page.navigate("samples")
    page.wait(lambda: "no samples" in "".join(page.texts(".view-samples")))
    page.navigate("overview")
    assert page.texts(".notes li") == index["notes"]


def test_samples_without_tokens_are_shown_as_text(show: Callable[..., Browser]) -> None:
    data = page_data(runs=1, problems=1)
    data.blocks[0]["samples"][0] |= {"texts": [], "top": [], "forward": None, "reverse": None}
    page = show(data, "samples")
    assert page.text('[data-sample="0"] .tokens') == data.blocks[0]["samples"][0]["answer"]


# Run directories


@pytest.mark.parametrize("runs", [1, 3])
def test_the_page_of_run_directories(show: Callable[..., Browser], tmp_path: Path, runs: int) -> None:
    folders = [write_run(tmp_path / f"run{number}", steps=4 + number) for number in range(runs)]
    page = show(Report(folders, Limits()).page_data())
    assert page.count(".view-overview .run-head") == runs
    names = [f"run{number}" for number in range(runs)]
    assert page.texts(".run-head h2") == names
    if runs > 1:
        page.navigate("compare")
        assert page.texts(".view-compare section:first-child thead th") == names
    page.navigate("curves")
    page.wait(lambda: page.count(".view-curves .plot canvas"))
    page.navigate("samples")
    selector = '.card[data-prompt="0"] .response:has(.t.top)'
    page.wait(lambda: page.count(selector))
    assert page.text('.card[data-prompt="0"] .column .set') == "validation at step 0"
    row = json.loads((folders[0] / "validation" / "step_0.jsonl").read_text().splitlines()[0])
    entry = row["top_tokens"][0]
    page.hover(f'{selector} .t[data-i="{entry["at"]}"]')
    page.wait(lambda: page.count("#tooltip:not([hidden])"))
    kls = [float(text) for text in page.texts("#tooltip dd .chip-kl")]
    assert kls == pytest.approx([row["forward_kl"][entry["at"]], row["reverse_kl"][entry["at"]]], rel=6e-3)
    assert page.text("#tooltip .token-head code").replace("·", " ") == row["token_texts"][entry["at"]]
    _, text, probability = entry["student"][0]
    assert tooltip_lists(page)[0][0].replace("·", " ") == f"{text} {100 * probability:.1f}%"


# Keyboard, themes, narrow windows


def test_the_keyboard_reaches_views_and_tokens(show: Callable[..., Browser], three: PageData) -> None:
    page = show(three)
    active = "return document.activeElement.textContent"
    page.keys("Tab")
    assert page.run(active) == "Skip to content"
    page.keys("Tab", "Tab", "Tab")
    assert page.run(active) == "Samples"
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keys("Enter")
    row = compared(three)
    page.wait(lambda: page.count(f'[data-sample="{row["i"]}"] .t'))
    page.run("document.querySelector(arguments[0]).focus()", f'[data-sample="{row["i"]}"] .t[tabindex="0"]')
    place = "return Number(document.activeElement.dataset.i)"
    page.keys("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight")
    assert page.run(place) == 2
    assert "token 3 of" in page.text("#tooltip")
    marked = [entry["at"] for entry in content(three, row)["top"]]
    page.keys("n")
    assert page.run(place) == next(at for at in marked if at > 2)
    page.keys("End")
    assert page.run(place) == len(content(three, row)["texts"]) - 1
    page.keys("P")
    assert page.run(place) == marked[-1]
    page.keys("Home", "ArrowDown")
    boxes = "const b = i => document.activeElement.parentElement.children[i]; "
    down = page.run(place)
    assert page.run(f"{boxes} return largestBox(b({down})).top - largestBox(b(0)).top") > 10
    page.keys("ArrowUp")
    assert page.run(place) == 0
    page.keys("Escape")
    assert page.count("#tooltip:not([hidden])") == 0
    page.click(f'[data-sample="{row["i"]}"] .t[data-i="3"]')
    assert page.run(place) == 3
    assert page.count(f'[data-sample="{row["i"]}"] .t[tabindex="0"]') == 1


def test_arrow_keys_move_the_cursor_of_a_chart(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.wait(lambda: page.count("#chart-kl canvas"))
    page.run("document.querySelector('#chart-kl .plot').focus()")
    page.keys("Home", "ArrowRight")
    page.wait(lambda: page.texts("#chart-kl .place")[:1] == ["step 10"])
    page.keys("End")
    page.wait(lambda: page.texts("#chart-kl .place")[:1] == ["step 40"])
    assert "KL(teacher || student): " in str(page.run("return document.activeElement.ariaLabel"))


def luminance(color: str) -> float:
    values = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast_in_both_themes(show: Callable[..., Browser], one: PageData, scheme: str) -> None:
    page = show(one, "samples")
    page.prefer(scheme)
    script = """const opaque = node => {
            const color = getComputedStyle(node).backgroundColor;
            return /rgba.*, 0\\)/.test(color) ? opaque(node.parentElement) : color;
        };
        return [...document.querySelectorAll(arguments[0])].map(
            node => [node.className, getComputedStyle(node).color, opaque(node)])"""
    levels = page.run(script, ".scale span:not(.label)")
    assert len({background for _, _, background in levels}) == 7
    shades = [luminance(background) for _, _, background in levels]
    assert shades == sorted(shades, reverse=scheme == "light")
    texts = page.run(script, ".t, .scale span, .label, .badge, .meta span, .chip, nav a, .finish, button, .set")
    assert [each for each in levels + texts if contrast(each[1], each[2]) < 4.5] == []


def test_the_theme_is_switched(show: Callable[..., Browser], one: PageData) -> None:
    page = show(one, "curves")
    page.wait(lambda: page.count("#chart-loss canvas"))
    background = "return getComputedStyle(document.body).backgroundColor"
    line = "return page.built.get('curves').view.charts[0].lines[0].color"
    before = page.run(background), page.run(line)
    assert luminance(before[0]) > 0.8 and page.text(".theme") == "Dark theme"
    page.click(".theme")
    assert luminance(page.run(background)) < 0.05
    assert page.run(line) != before[1] and page.text(".theme") == "Light theme"
    page.click(".theme")
    assert (page.run(background), page.run(line)) == before


@pytest.mark.parametrize("view", VIEWS)
def test_a_narrow_window_has_no_horizontal_scrolling(show: Callable[..., Browser], three: PageData, view: str) -> None:
    page = show(three, view, width=420)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    if view in ("overview", "curves"):
        page.run("document.querySelector('.chart').scrollIntoView()")
        page.wait(lambda: page.count(".plot canvas"))
    assert page.run("return document.documentElement.scrollWidth") == 420
    outside = """return [...document.querySelectorAll("#app *, #top *")].filter(node =>
        !node.closest(".scroll, .legend, canvas, .u-wrap") && getComputedStyle(node).clipPath === "none" &&
        node.getBoundingClientRect().right > 421).map(node => node.outerHTML.slice(0, 80))"""
    assert page.run(outside) == []
