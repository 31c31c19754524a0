"""Downloads for offline machines. The hub is a fake; the sentences of a machine without a network are real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from distill.data.sources import KNOWN_DATASETS, HubDataset
from distill.errors import UserError
from distill.hub import cause_and_fix
from distill.model.hf_files import MODEL_PATTERNS, TOKENIZER_PATTERNS, find_model
from scripts.fetch import Hub, fetch_dataset, fetch_model, gigabytes, main
from scripts.launch import ROOT

RECIPE = ["--config", str(ROOT / "recipes/my-distillation-1n4g.yaml")]
PATTERNS = ["*.safetensors", "*.json"]


@pytest.fixture(autouse=True)
def _downloads_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")


class FakeHub(Hub):
    """A hub in memory: sizes of models and rows of datasets by name. ``reached`` is whether it can be reached."""

    def __init__(self, models: dict[str, list[int]], rows: dict[str, int] | None = None) -> None:
        self.models, self.rows, self.reached = models, rows or {}, True
        self.cached: set[str] = set()
        self.requests: list[tuple[str, Any]] = []

    def _find(self, name: str, known: Any) -> None:
        if not self.reached:
            raise ConnectionError("the fake hub is not reached")
        if name not in known:
            raise FileNotFoundError(name)

    def files(self, name, patterns):
        self._find(name, self.models)
        return [(size, name not in self.cached) for size in self.models[name]]

    def download(self, name, patterns, cached=False):
        if not cached or name not in self.cached:
            self._find(name, self.models)
        self.requests.append((name, list(patterns)))
        self.cached.add(name)
        return f"cache/{name}"

    def load(self, found):
        if found.name not in self.cached:
            self._find(found.name, self.rows)
        self.requests.append((found.name, (found.subsets, found.split)))
        self.cached.add(found.name)
        return [range(self.rows[found.name])] * len(found.subsets)

    def cached_bytes(self, name):
        return 3_000_000 if name in self.cached else 0


def hub_of() -> FakeHub:
    models = {"Qwen/Qwen3-0.6B": [1_500_000_000, 11_000], "Qwen/Qwen3-4B": [8_000_000_000] * 3, "x/tokenizer": [7000]}
    return FakeHub(models, {"agentica-org/DeepScaleR-Preview-Dataset": 40315, "openai/gsm8k": 7473})


SMALL = [
    *RECIPE,
    *("policy.model_name=Qwen/Qwen3-0.6B", "teacher.model_name=Qwen/Qwen3-4B"),
    *("data.train.dataset_name=GSM8K", "distillation.val_period=0", "distillation.val_at_start=false"),
    "distillation.val_at_end=false",
]


def test_the_models_tokenizers_and_datasets_of_a_recipe_are_downloaded_once(capsys: pytest.CaptureFixture[str]) -> None:
    hub = hub_of()
    arguments = [*SMALL, "teacher.tokenizer.name=x/tokenizer", "policy.tokenizer.name=Qwen/Qwen3-0.6B"]
    assert main(arguments, hub) == 0
    assert [name for name, _ in hub.requests] == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "x/tokenizer", "openai/gsm8k"]
    assert "*.safetensors" in hub.requests[0][1] and "*.safetensors" not in hub.requests[2][1]
    assert hub.requests[3][1] == (("main",), "train")
    printed = capsys.readouterr().out
    assert "downloading 24.0 GB of 24.0 GB in 3 files" in printed and "7473 rows" in printed
    assert "without a network" in printed.splitlines()[-1]
    assert main(arguments, hub) == 0
    printed = capsys.readouterr().out
    assert printed.count("complete before") == 4 and "download" not in printed
    hub.reached = False
    assert main(arguments, hub) == 0, "everything is cached"


def test_what_cannot_be_fetched_is_named_and_the_rest_is_fetched(tmp_path: Path, capsys) -> None:
    hub = hub_of()
    missing = [
        "policy.model_name=models/none",
        "teacher.model_name=no/such",
        f"data.train.data_path={tmp_path}/a.jsonl",
    ]
    assert main([*SMALL, *missing, "teacher.tokenizer.name=x/tokenizer"], hub) == 1
    printed = capsys.readouterr().out
    assert printed.count("missing, because it ") == 3 and "3 of 4 are missing" in printed
    assert [name for name, _ in hub.requests] == ["x/tokenizer"]
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "teacher").mkdir()
    folders = [f"policy.model_name={tmp_path}", f"teacher.model_name={tmp_path}/teacher"]
    assert main([*SMALL, *missing, *folders], hub) == 0


def test_an_invalid_recipe_is_refused_before_any_download(capsys: pytest.CaptureFixture[str]) -> None:
    hub = hub_of()
    assert main([*SMALL, "policy.model_nam=x"], hub) == 2 and not hub.requests
    assert capsys.readouterr().err.count("\n") == 1


def test_validation_data_are_fetched_if_the_run_validates() -> None:
    hub = hub_of()
    hub.rows["HuggingFaceH4/aime_2024"] = 30
    assert main([*SMALL, "distillation.val_period=10", "data.validation.dataset_name=AIME2024"], hub) == 0
    assert hub.requests[-1][0] == "HuggingFaceH4/aime_2024"


def test_a_machine_without_a_network_gets_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real Hub with HF_HUB_OFFLINE: the run and the command itself name the cause and the fix."""
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = HubDataset("data.train.dataset_name", "openai/gsm8k", ("main",), "train")
    for action in (
        lambda: find_model("Qwen/Qwen3-0.6B", "policy.model_name"),
        lambda: fetch_model(Hub(), "policy.model_name", "Qwen/Qwen3-0.6B", PATTERNS),
        lambda: fetch_dataset(Hub(), found),
        lambda: Hub().load(found),
    ):
        with pytest.raises(UserError) as caught:
            action()
        message = str(caught.value)
        assert "HF_HUB_OFFLINE=1" in message and "python -m scripts.fetch --config" in message
        assert str(tmp_path) in message and "\n" not in message


def test_the_cause_of_a_failed_download_decides_the_fix() -> None:
    def of(error: Exception) -> str:
        wrapped = LocalEntryNotFoundError("not found")
        wrapped.__cause__ = error
        assert cause_and_fix(wrapped, "a/b") == cause_and_fix(error, "a/b")
        return ": ".join(cause_and_fix(error, "a/b"))

    def http(kind: Any) -> Exception:
        return kind.__new__(kind)  # its constructor needs an HTTP response

    assert "accept the licence at https://huggingface.co/a/b" in of(http(GatedRepoError))
    assert "correct the name" in of(http(RepositoryNotFoundError))
    assert "free disk space" in of(OSError(28, "No space left on device"))
    assert "does not reach https://huggingface.co (refused)" in of(ConnectionError("refused"))
    assert "scripts.fetch --config" in of(ConnectionError("refused"))


@pytest.mark.parametrize("name", [known.hub for known in KNOWN_DATASETS.values()])
def test_the_folder_of_a_cached_dataset_is_that_of_the_library(name, monkeypatch, tmp_path: Path) -> None:
    """The library's own class names the folder; a second fetch finds its files."""
    import datasets

    class Builder(datasets.GeneratorBasedBuilder):
        def _info(self):
            return datasets.DatasetInfo(features=datasets.Features({"a": datasets.Value("int64")}))

        def _split_generators(self, dl_manager):
            return [datasets.SplitGenerator(name="train")]

        def _generate_examples(self):
            yield 0, {"a": 1}

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    builder = Builder(cache_dir=str(tmp_path), repo_id=name, dataset_name=name.rpartition("/")[2])

    def load(self: Hub, found: HubDataset) -> list[object]:
        builder.download_and_prepare()
        return [builder.as_dataset("train")]

    monkeypatch.setattr(Hub, "load", load)
    found = HubDataset("data.train.dataset_name", name, (None,), "train")
    assert Hub().cached_bytes(name) == 0
    assert "1 rows of split train" in (first := fetch_dataset(Hub(), found)) and "downloaded 0 kB" not in first
    assert Hub().cached_bytes(name) > 0 and "complete before" in fetch_dataset(Hub(), found)


def test_a_cached_model_without_its_weights_is_not_complete(monkeypatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--model/refs").mkdir()
    (tmp_path / "models--owner--model/refs/main").write_text("abc")
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    arguments = (Hub(), "policy.model_name", "owner/model")
    assert "complete before" in fetch_model(*arguments, TOKENIZER_PATTERNS), "a tokenizer"
    with pytest.raises(UserError, match="is not complete in"):
        fetch_model(*arguments, MODEL_PATTERNS)
    (snapshot / "model.safetensors").write_text("")
    assert "complete before" in fetch_model(*arguments, MODEL_PATTERNS)


def test_sizes_are_printed_in_decimal_units() -> None:
    assert [gigabytes(size) for size in (999, 2_500_000, 1_500_000_000)] == ["1 kB", "2.5 MB", "1.5 GB"]
