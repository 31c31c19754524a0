"""Models, datasets, recipes, templates and checkpoints are read without executing code from them."""

from __future__ import annotations

import ast
import builtins
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from distill.checkpoint.storage import ShardsReader
from distill.config import load_config
from distill.data.rendering import chat_ids
from distill.data.tokenizer import load_tokenizer
from distill.errors import UserError
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.rollout.vllm_engine import fixed_arguments
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/distillation_math.yaml"

NEVER = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load", "full_load", "load_module", "dill"}
"""Functions that execute text as code."""


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Yield calls that may execute the data that they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_untrusted = keywords.get("trust_remote_code") == "False"
        if name.endswith(".from_pretrained") and not is_untrusted:
            yield f"{name} may prompt the user to run a model's code"
        if name.endswith("torch.load") and keywords.get("weights_only") != "True":
            yield f"{name} reads a pickle"
        if name in ("pickle.load", "pickle.loads", "yaml.load"):
            yield f"{name} may create any object"
        if name.rpartition(".")[2] in NEVER and name not in ("re.compile", "torch.compile"):
            if name.endswith(".eval") and not node.args:  # torch.nn.Module.eval
                continue
            yield name


def test_the_package_has_no_unsafe_calls() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {call}"
        for file in (ROOT / "distill").rglob("*.py")
        for call in unsafe_calls(ast.parse(file.read_text()))
    }
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "AutoConfig.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "pickle.loads(data)",
        "yaml.load(text, Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "os.system(text)",
    ],
)
def test_unsafe_calls_are_detected(line: str) -> None:
    assert len(list(unsafe_calls(ast.parse(line)))) == 1
    assert list(unsafe_calls(ast.parse("model.eval(); yaml.safe_load(t); torch.load(f, weights_only=True)"))) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with its own Python code, and an ``input`` that replies yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    save_tiny_model(tmp_path / "model", "qwen3", True)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code = f"""
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
Path({str(tmp_path / "code_was_run")!r}).touch()
class Own(PreTrainedConfig): model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
    (tmp_path / "model/own.py").write_text(code)
    return tmp_path / "model"


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_model_with_its_own_code_is_refused_and_the_code_is_not_run(folder: Path) -> None:
    _change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    files = ModelFiles(str(folder), folder, {})
    with pytest.raises(UserError, match="auto_map"):
        model_config(files, "policy.model_name")
    assert not (folder.parent / "code_was_run").exists()


def test_the_code_of_a_tokenizer_is_not_run(folder: Path) -> None:
    """tokenizer.json is read without the code; without that file the tokenizer is refused."""
    _change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    files = ModelFiles(str(folder), folder, {})
    assert type(load_tokenizer(files, None, "policy.tokenizer.name")).__module__.startswith("transformers.")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"policy\.tokenizer\.name"):
        load_tokenizer(files, None, "policy.tokenizer.name")
    assert not (folder.parent / "code_was_run").exists()


def test_pickled_weights_are_refused_with_the_command_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safe_serialization=True"):
        find_model(str(folder), "policy.model_name")
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map"):
        find_model(str(folder), "policy.model_name")


def test_vllm_does_not_run_the_code_of_a_model() -> None:
    assert fixed_arguments(can_sleep=False)["trust_remote_code"] is False


@pytest.mark.parametrize("name", ["os.system", "_StorageInfo.__init__.__globals__", "io.open"])
def test_the_metadata_of_a_checkpoint_cannot_reach_functions_of_imported_modules(tmp_path: Path, name: str) -> None:
    """A name with dots would reach the modules that a module imports."""
    dcp_save({"x": torch.zeros(3)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert ShardsReader(tmp_path / "shards").shapes() == {"x": torch.Size([3])}
    module = b"torch.distributed.checkpoint.filesystem"
    short = [b"\x8c" + bytes([len(text)]) + text for text in (module, name.encode(), b"touch ran")]
    (tmp_path / "shards/.metadata").write_bytes(b"\x80\x04" + short[0] + short[1] + b"\x93" + short[2] + b"\x85R.")
    with pytest.raises(pickle.UnpicklingError, match=re.escape(name)):
        ShardsReader(tmp_path / "shards").shapes()


def test_a_recipe_creates_no_python_objects(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for tag in (f"!!python/object/apply:os.mkdir ['{tmp_path}/ran']", "!!python/name:os.system", "!own {}"):
        recipe.write_text(f"policy: {tag}\n")
        with pytest.raises(UserError) as caught:
            load_config(["--config", str(recipe)])
        assert (caught.value.key, caught.value.value) == ("--config", str(recipe))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(RECIPE), "distillation.seed=!!python/name:os.system"])
    assert (caught.value.key, caught.value.value) == ("distillation.seed", "!!python/name:os.system")


def test_a_recipe_with_aliases_for_millions_of_values_is_refused(tmp_path: Path) -> None:
    tenfold = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    recipe = tmp_path / "recipe.yaml"
    for text in ("\n".join(tenfold), "policy: &p\n  again: *p"):
        recipe.write_text(text)
        with pytest.raises(UserError, match="100000"):
            load_config(["--config", str(recipe)])
    few = yaml.safe_load((ROOT / "recipes/distillation_math.yaml").read_text())
    recipe.write_text(yaml.safe_dump({**few, "policy": few["policy"]}) + "\nx: &x 1\n")
    with pytest.raises(UserError, match="x"):  # an anchor is allowed
        load_config(["--config", str(recipe)])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for a in ().__class__.__base__.__subclasses__() %}{{ a }}{% endfor %}",
    ],
)
def test_a_chat_template_cannot_reach_python_internals(template: str) -> None:
    """transformers renders in jinja's sandbox, which hides attributes with underscores."""
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(UserError, match=r"unsafe|undefined|no attribute"):
        chat_ids(tokenizer, [[{"role": "user", "content": "a"}]])


def test_the_folder_is_valid_before_the_tests_change_it(folder: Path) -> None:
    assert find_model(str(folder), "policy.model_name").files
    assert load_tokenizer(ModelFiles(str(folder), folder, {}), None, "policy.tokenizer.name").get_vocab()
