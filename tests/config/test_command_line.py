"""A mistake on the command line is refused with the word or option that the user may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config import load_config, print_flag
from distill.config.command_line import parse_command_line
from distill.config.load import find_recipe
from distill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "recipes" / "my-distillation-1n4g.yaml")
TEMPLATE = "distillation.context_distillation.teacher_prefix_template"


def refusal(*words: str) -> UserError:
    with pytest.raises(UserError) as error:
        parse_command_line(words)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--dryrun"], "--dry-run"),
        (["--dryrun", "distillation.seed=3"], "--dry-run"),
        (["-dry-run"], "--dry-run"),
        (["--configs", "x.yaml"], "--config"),
        (["--no-wandb"], "logger.wandb_enabled=false"),
        (["--gpus", "4"], "cluster.gpus_per_node=NUMBER"),
        (["--resume"], "checkpointing.resume_from=FOLDER"),
        (["--version"], "versions.json"),
        (["--lr", "1e-5"], "policy.optimizer.kwargs.lr=value"),
        (["--seed=3"], "distillation.seed=value"),
        (["--nproc-per-node", "4"], "torchrun"),
        (["--qqq"], "key.path=value"),
        (["-x"], "key.path=value"),
    ],
    ids=" ".join,
)
def test_an_unknown_option_is_refused_with_the_option_or_key_that_was_meant(words: list[str], fix: str) -> None:
    error = refusal(*words)
    assert error.key == words[0].partition("=")[0]
    assert fix in error.fix


@pytest.mark.parametrize("recipe", ["recipes/my-distillation-1n4g.yaml", "my-distillation-1n4g", "old/missing.yaml"])
def test_a_recipe_without_config_is_refused_with_the_option(recipe: str) -> None:
    assert refusal(recipe, "distillation.seed=3").fix.endswith(f"--config {recipe}")


def test_two_recipes_are_refused() -> None:
    error = refusal("--config", "a.yaml", "distillation.seed=3", "--config=b.yaml")
    assert (error.key, error.value) == ("--config", "b.yaml")
    assert "a.yaml" in str(error)


def test_a_value_with_spaces_is_refused_with_the_quoted_value() -> None:
    error = refusal(f"{TEMPLATE}=You", "are", "given", "{problem}", "distillation.seed=3")
    assert (error.key, error.value) == (TEMPLATE, "are")
    assert f"{TEMPLATE}='You are given {{problem}}'" in error.fix


def test_words_after_help_are_search_words() -> None:
    line = parse_command_line(["--help", "learning", "rate", "distillation.seed=3"])
    assert line.help_words == ["learning", "rate"]
    assert line.overrides == [("distillation.seed", "3")]
    assert [print_flag([flag, "x"]) for flag in ("--help", "-h", "--help-all")] == ["--help"] * 3


@pytest.mark.parametrize("name", ["my-distillation-1n4g", "my-distillation-1n4g.yaml"])
def test_a_recipe_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", name]) == load_config(["--config", SMALL])
    (tmp_path / "my-distillation-1n4g.yaml").write_text("{}")  # a file in the current folder is preferred
    assert find_recipe(Path(name)) == Path("my-distillation-1n4g.yaml")


def test_a_misspelled_name_is_refused_with_recipes_from_the_folder_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="my-distillation-1n4g"):
        load_config(["--config", "my-destillation-1n4g"])
