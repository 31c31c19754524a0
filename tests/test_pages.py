"""Links, files, make targets, keys, recipes and code in the repository's pages (*.md) are valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from distill.config import parse_args
from distill.config.help import COMMON_KEYS
from distill.config.nemo_compat import ONE_VALUE, UNUSED
from distill.config.parse import key_paths
from tests.quoted_messages import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "distill/**/*.md", "scripts/*.md", "recipes/**/*.md")
    for path in sorted(ROOT.glob(pattern))
}
SECTIONS = "distillation|loss_fn|policy|teacher|data|checkpointing|logger|cluster|runtime"
KEYS = {*key_paths(), *ONE_VALUE, *UNUSED}
NEMO_KEYS = {
    "data.num_workers",
    "data.train.split_validation_size",
    "teacher.dtensor_cfg.lora_cfg.enabled",
    "teacher.generation.temperature",
}
"""Keys of NeMo-RL recipes that a page mentions and that the schema lacks."""
FREE_FORM = ("policy.scheduler.kwargs.", "policy.tokenizer.chat_template_kwargs.", "policy.generation.vllm_kwargs.")
RULES: dict[Callable[[str, str], list[str]], str] = {}
"""Maps each rule for a page to a text that violates it once."""


def rule(bad: str) -> Callable[[Callable[[str, str], list[str]]], Callable[[str, str], list[str]]]:
    def register(check: Callable[[str, str], list[str]]) -> Callable[[str, str], list[str]]:
        RULES[check] = bad
        return check

    return register


def expand(text: str) -> list[str]:
    """Texts of a word with braces, as in a shell: a{b,c} gives ab and ac."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", text)]
    return ["".join(choice) for choice in product(*pieces)] if "{" in text else [text]


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@rule("[x](no_such.md)")
def broken_links(name: str, text: str) -> list[str]:
    """Links to a missing file or heading."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        page = target / "README.md" if target.is_dir() else target
        if not target.exists() or (anchor and anchor not in anchors(page.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@rule("`recipes/no_such.yaml`")
def missing_files(name: str, text: str) -> list[str]:
    """Paths into the repository's folders that do not exist; names in capitals are placeholders."""
    words = re.findall(r"(?<![\w/.])(?:distill|scripts|recipes|prompts|tests)/[\w./{},*-]+\w", text)
    paths = {path for word in words for path in expand(word) if not re.search(r"[A-Z]{2}|my-run", Path(path).stem)}
    return sorted(path for path in paths if not list(ROOT.glob(path)))


@rule("`make no-such`")
def unknown_targets(name: str, text: str) -> list[str]:
    """Targets of make that the Makefile lacks."""
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return sorted(set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, re.MULTILINE)) - set(known))


@rule("`python -m scripts.no_such`")
def missing_modules(name: str, text: str) -> list[str]:
    """Modules after ``-m`` that do not exist."""
    modules = set(re.findall(r"-m ((?:distill|scripts|tests)\.[\w.]+)", text))
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    return sorted(m for m, path in paths.items() if not (path.with_suffix(".py").exists() or path.is_dir()))


@rule("`policy.no_such`")
def unknown_keys(name: str, text: str) -> list[str]:
    """Configuration keys in backticks that do not exist."""
    words = re.findall(rf"`((?:{SECTIONS})\.[a-z_.{{}},0-9]*[a-z}}])(?:[:=][^`]*)?`", text)
    keys = [re.sub(r"\.\d+", "", key) for word in words for key in expand(word)]
    return [key for key in keys if key not in KEYS | NEMO_KEYS and not key.startswith(FREE_FORM)]


@rule("```bash\npython -m distill.train --config recipes/smollm2-context-cpu.yaml policy.no_such=1\n```\n")
def refused_commands(name: str, text: str) -> list[str]:
    """Command lines of distill.train in code blocks that the program refuses."""
    if name == "scripts/SLURM.md":  # test_slurm_job.py checks its commands
        return []
    found = []
    for line in re.findall(r"(?:distill\.train|train\.sbatch) (--config recipes/[\w.-]+\.yaml[^\n`#]*)", text):
        words = [word.replace("recipes/", f"{ROOT}/recipes/") for word in shlex.split(line) if "/my-run" not in line]
        words = [word for word in words if word not in ("...", "key.path=value") and "NAME.yaml" not in line]
        try:
            if words:
                parse_args(words)
        except ValueError as error:
            found.append(f"{line}: {error}")
    return found


def yaml_blocks(text: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@rule("```yaml\npolicy: {no_such: 1}\n```\n")
def refused_recipes(name: str, text: str) -> list[str]:
    """Code blocks in YAML that are not recipes."""
    found = []
    for block in yaml_blocks(text):
        recipe = ROOT / "recipes" / "distillation_math.yaml"
        parent = re.search(r"^defaults: ([\w.-]+)", block, re.MULTILINE)
        own = re.sub(r"^defaults: .*\n", "", block, flags=re.MULTILINE)
        path = _written(f"defaults: {recipe.parent / parent.group(1) if parent else recipe}\n{own}")
        try:
            parse_args(["--config", str(path)])
        except ValueError as error:
            found.append(f"{error}")
    return found


_FOLDER: list[Path] = []


def _written(text: str) -> Path:
    path = _FOLDER[0] / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _FOLDER[:] = [tmp_path_factory.mktemp("recipes")]


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_the_pages_keep_the_rule(check: Callable[[str, str], list[str]]) -> None:
    assert {name: found for name, text in PAGES.items() if (found := check(name, text))} == {}


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_the_rule_finds_a_violation(check: Callable[[str, str], list[str]]) -> None:
    assert len(check("README.md", RULES[check])) == 1


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 150
    assert [name for name in PAGES if name != "README.md" and f"({name})" not in readme] == []


def test_the_readme_reports_early_that_no_gpu_was_used() -> None:
    head = PAGES["README.md"].splitlines()[:20]
    assert any("GPU yet" in line for line in head)


def test_the_laptop_variant_of_the_own_recipe_is_valid() -> None:
    block = yaml_blocks(PAGES["README.md"])[0]
    laptop = re.search(r"on a laptop: ([\w.-]+)", block)
    assert laptop is not None
    own = re.sub(r"^(defaults|policy): .*\n", "", block, flags=re.MULTILINE)
    config = parse_args(["--config", str(_written(f"defaults: {ROOT}/recipes/{laptop.group(1)}\n{own}"))]).config
    assert config.data.train[0].data_path == "prompts/gsm_train.jsonl" and config.data.default.prompt_file is None
    assert "{trace}" not in config.distillation.context_distillation.teacher_prefix_template


def test_recipes_readme_lists_every_recipe() -> None:
    named = {name for word in re.findall(r"`([\w.{},-]+)`", PAGES["recipes/README.md"]) for name in expand(word)}
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} <= named


def test_recipes_readme_describes_the_keys_of_the_help() -> None:
    section = PAGES["recipes/README.md"].partition("## The 21 keys")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)`", section, re.MULTILINE) == list(COMMON_KEYS) and len(COMMON_KEYS) == 21


def test_the_python_code_of_the_readme_compiles() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    compile(blocks[0], "README.md", "exec")
