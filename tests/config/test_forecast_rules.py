"""Rules of cluster.gpu and policy.generation.expected_length, and the table of GPUs."""

from __future__ import annotations

import pytest

from distill.checkpoint.recipe_diff import changed_keys
from distill.config import load_config
from distill.config.gpus import GPUS, gpu_of_device, parse_gpu
from distill.config.response_limits import expected_length
from distill.errors import UserError
from distill.memory.forecast import card_bytes

BASE = ["--config", "recipes/distillation_math.yaml", "policy.generation.max_new_tokens=4000"]
KEY = "policy.generation.expected_length"


def refused(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config([*BASE, *words])
    return caught.value


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_gpu_is_found_by_its_name_and_by_the_name_of_the_driver(gpu) -> None:
    assert parse_gpu(gpu.name.upper()) is parse_gpu(f" {gpu.name} ") is gpu
    assert gpu_of_device(f"NVIDIA {gpu.words}") is gpu
    assert gpu.memory_gbs > 0 and gpu.link_gbs >= gpu.network_gbs > 0 and gpu.memory_gb


def test_the_memory_of_an_a100_follows_from_its_name() -> None:
    assert gpu_of_device("NVIDIA A100-SXM4-40GB").name == "a100-40"  # type: ignore[union-attr]
    assert gpu_of_device("NVIDIA A100-SXM4-80GB").name == "a100-80"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        *(("a100-40", 40960), ("a100-80", 81920), ("h100", 81559), ("h200", 143771)),
        *(("b200", 183359), ("gb200", 189471), ("b300", 275040), ("gb300", 284208)),
        *(("l40s", 46068), ("a10", 23028), ("l4", 23034)),
    ],
)
def test_the_usable_memory_of_a_gpu_is_below_the_memory_that_nvidia_smi_reports(name: str, mebibytes: int) -> None:
    found = parse_gpu(name).memory_gb
    assert found is not None and 0.97 < card_bytes(found) / (mebibytes * 2**20) < 0.99


@pytest.mark.parametrize(
    ("device", "name", "link"),
    [
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40", 32),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80", 32),
        ("NVIDIA A800 80GB PCIe", "a800-pcie", 32),
        ("NVIDIA H100 PCIe", "h100-pcie", 64),
        ("NVIDIA H200 NVL", "h200-nvl", 450),
    ],
)
def test_variants_of_a_gpu_have_their_own_links(device: str, name: str, link: float) -> None:
    found = gpu_of_device(device)
    assert found is not None and (found.name, found.link_gbs) == (name, link)


@pytest.mark.parametrize("text", ["989/4800", "989.5 / 4800"])
def test_a_gpu_is_given_by_its_peaks(text: str) -> None:
    found = parse_gpu(text)
    assert (found.tflops, found.memory_gbs, found.memory_gb) == (float(text.split("/")[0]), 4800, None)


@pytest.mark.parametrize("text", ["h1000", "", "989", "989/", "0/4800", "989/0", "-1/5", "nan/5", "1e999/5", "a/b"])
def test_an_unknown_gpu_is_refused_with_the_names(text: str) -> None:
    error = refused(f"cluster.gpu='{text}'")
    assert (error.key, error.value) == ("cluster.gpu", text) and all(gpu.name in error.fix for gpu in GPUS)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["median=0"], "median", 0),
        (["median=-5"], "median", -5),
        (["median=.inf"], "median", float("inf")),
        (["p90=0"], "p90", 0),
        (["median=500", "p90=400"], "p90", 400),
        (["median=500.5", "p90=500"], "p90", 500),
    ],
)
def test_impossible_lengths_are_refused(words: list[str], name: str, value: float) -> None:
    error = refused(*(f"{KEY}.{word}" for word in words))
    assert (error.key, error.value) == (f"{KEY}.{name}", value)


def test_a_smaller_limit_does_not_require_other_expected_lengths() -> None:
    for size in ("4b", "8b", "14b"):
        path = f"recipes/qwen3-{size}-context-self-distillation-4n4g.yaml"
        load_config(["--config", path, "policy.generation.max_new_tokens=4096"])
    assert load_config(["--config", path, "policy.generation.max_new_tokens=1"])


def test_metrics_of_a_run_are_accepted_as_expected_lengths() -> None:
    found = load_config([*BASE, f"{KEY}.median=2048.5", f"{KEY}.p90=2048.5"])
    assert expected_length(found) == (2048.5, 2048.5)


def test_lengths_have_defaults() -> None:
    assert expected_length(load_config(BASE)) == (1000, 3000)
    assert expected_length(load_config([*BASE, f"{KEY}.median=200"])) == (200, 600)
    assert expected_length(load_config([*BASE, f"{KEY}.p90=2000"])) == (1000, 2000)
    assert expected_length(load_config([*BASE, f"{KEY}.p90=500"])) == (500, 500)  # below a quarter of the limit
    assert expected_length(load_config([*BASE, f"{KEY}.median=2000"])) == (2000, 6000)  # beyond the limit, which counts
    assert expected_length(load_config([*BASE, "policy.generation.max_new_tokens=3"])) == (1, 3)
    scheduled = [*BASE, "distillation.max_new_tokens_schedule=[[2,8000]]", f"{KEY}.median=6000"]
    assert expected_length(load_config(scheduled))[0] == 6000


def test_keys_of_the_forecast_do_not_change_what_a_run_learns() -> None:
    def saved(median: int | None, gpu: str | None) -> dict:
        section = {"generation": {"expected_length": {"median": median, "p90": None}}}
        return {"policy": section, "cluster": {"gpu": gpu}}

    assert changed_keys(saved(None, None), saved(100, "h100")) == {}
