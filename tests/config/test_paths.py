"""Paths of a recipe are normalized, and compared by the file or folder that they name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distill.checkpoint.recipe_diff import changed_keys
from distill.config import Config, load_config, paths
from distill.config.paths import normalize, same_place, shipped
from distill.errors import UserError

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes/distillation_math.yaml")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, also the current one, with a model folder and a symbolic link to it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/A").mkdir(parents=True)
    (tmp_path / "models/B").mkdir()
    (tmp_path / "models/link").symlink_to("A")
    return tmp_path


def loaded(*overrides: str) -> Config:
    return load_config(["--config", RECIPE, *overrides])


@pytest.mark.parametrize(
    "spelling", ["models/A/", "./models/A", "models//A", "models/./A", "~/models/A", "~/models/A//", "models/link/"]
)
def test_two_paths_to_a_folder_are_the_same_model(home: Path, spelling: str) -> None:
    for student, teacher in (("models/A", spelling), (spelling, "models/A")):
        with pytest.raises(UserError) as caught:
            loaded(f"policy.model_name={student}", f"teacher.model_name={teacher}")
        assert caught.value.key == "teacher.model_name"
    config = loaded(
        f"policy.model_name={home}/models/A",
        f"teacher.model_name={spelling}",
        "distillation.context_distillation.enabled=true",
    )
    names = (config.policy.model_name, config.teacher.model_name, config.teacher.tokenizer.name)
    assert set(names) == {f"{home}/models/A"}


def test_two_folders_are_different_models(home: Path) -> None:
    config = loaded("policy.model_name=models/A/", "teacher.model_name=./models/B")
    assert (config.policy.model_name, config.teacher.model_name) == ("models/A", "models/B")


def test_a_hub_name_and_its_snapshot_in_the_cache_are_the_same_model(home: Path) -> None:
    snapshot = home / "hub/models--some--model/snapshots/0123"
    snapshot.mkdir(parents=True)
    assert same_place(str(snapshot), "some/model") and same_place("some/model", f"{snapshot}/")
    assert not same_place(str(snapshot), "some/other")
    assert not same_place(str(snapshot.parent), "some/model")


def test_every_path_is_normalized(home: Path) -> None:
    config = loaded(
        "checkpointing.checkpoint_dir=~/runs/x/",
        "logger.log_dir=logs/.//y/",
        "runtime.run_dir=~",
        "data.train={data_path: ~/d.jsonl, prompt_file: ~/p.txt, system_prompt_file: a//s.txt}",
        "policy.model_name=some/model/",
    )
    assert config.checkpointing.checkpoint_dir == f"{home}/runs/x"
    assert (config.logger.log_dir, config.runtime.run_dir) == ("logs/y", str(home))
    (data,) = config.data.train
    assert (data.data_path, data.prompt_file) == (f"{home}/d.jsonl", f"{home}/p.txt")
    assert data.system_prompt_file == "a/s.txt"
    assert config.policy.model_name == "some/model"


def test_tilde_is_expanded_in_paths_of_recipes_and_parents(home: Path) -> None:
    (home / "base.yaml").write_text(f"defaults: {RECIPE}\ndistillation: {{max_num_steps: 7}}\n")
    (home / "sub").mkdir()
    (home / "sub/child.yaml").write_text("defaults: ~/base.yaml\n")
    assert load_config(["--config=~/sub/child.yaml"]).distillation.max_num_steps == 7


def test_a_missing_folder_is_not_taken_for_a_hub_name(home: Path) -> None:
    assert loaded("policy.model_name=./owner/name/").policy.model_name == "./owner/name"
    (home / "owner/name").mkdir(parents=True)
    assert loaded("policy.model_name=./owner/name/").policy.model_name == "owner/name"


def test_the_parent_folder_of_a_symbolic_link_is_kept(home: Path) -> None:
    assert normalize(f"link/{os.pardir}/x", "key") == f"link/{os.pardir}/x"


@pytest.mark.parametrize("key", ["checkpointing.checkpoint_dir", "policy.model_name", "logger.log_dir"])
def test_a_home_folder_of_an_unknown_user_is_refused(home: Path, key: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(f"{key}=~no-such-user/x")
    assert (caught.value.key, caught.value.value) == (key, "~no-such-user/x")


def test_a_broken_symbolic_link_is_refused(home: Path) -> None:
    (home / "link").symlink_to("gone/folder")
    with pytest.raises(UserError, match="gone/folder") as caught:
        loaded("checkpointing.checkpoint_dir=~/link/")
    assert (caught.value.key, caught.value.value) == ("checkpointing.checkpoint_dir", "~/link/")


def test_another_path_to_the_same_model_is_not_a_change_of_the_recipe(home: Path) -> None:
    before = {"policy": {"model_name": "models/A", "precision": "float32"}}
    assert changed_keys(before, {"policy": {"model_name": f"{home}/models/link", "precision": "float32"}}) == {}
    assert len(changed_keys(before, {"policy": {"model_name": "models/B", "precision": "float32"}})) == 1


# -- shipped files -----------------------------------------------------------------------------------------------------


def test_recipes_and_prompts_are_found_from_any_working_directory(home: Path) -> None:
    config = load_config(["--config", "recipes/my-distillation-1n4g.yaml"])
    prompt_file = config.data.train[0].prompt_file
    assert prompt_file is not None and Path(prompt_file).is_absolute() and Path(prompt_file).is_file()


def test_a_recipe_outside_the_project_has_shipped_parents(home: Path) -> None:
    (home / "mine.yaml").write_text("defaults: recipes/smollm2-distillation-cpu.yaml\ndistillation: {seed: 9}\n")
    config = load_config(["--config", "mine.yaml"])
    assert config.distillation.seed == 9
    data_path = config.data.train[0].data_path
    assert data_path is not None and Path(data_path).is_file()


def test_a_file_in_the_working_directory_is_preferred_to_a_shipped_file(home: Path) -> None:
    (home / "prompts").mkdir()
    (home / "prompts/cot.txt").write_text("{}")
    config = loaded("data.train.prompt_file=prompts/cot.txt")
    assert config.data.train[0].prompt_file == "prompts/cot.txt"


def test_folders_that_a_run_writes_stay_relative_to_the_working_directory(home: Path) -> None:
    config = loaded("checkpointing.checkpoint_dir=recipes", "logger.log_dir=prompts", "runtime.run_dir=recipes")
    assert (config.checkpointing.checkpoint_dir, config.logger.log_dir) == ("recipes", "prompts")
    assert config.runtime.run_dir == "recipes"


def test_an_installed_package_ships_its_files_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages/distill"
    for folder in ("config", "recipes", "prompts", "data"):
        (package / folder).mkdir(parents=True)
        (package / folder / "file").write_text("")
    monkeypatch.setattr(paths, "__file__", str(package / "config/paths.py"))
    assert shipped("prompts/file") == str(package / "prompts/file")
    assert shipped("data/file") is None and shipped("prompts/missing") is None
    assert shipped(str(package / "prompts/file")) is None
