"""What is read is never run: models, datasets, recipes, templates and checkpoints of other people's."""

from __future__ import annotations

import ast
import builtins
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from distill.checkpoint.storage import ShardsReader
from distill.config import load_config
from distill.data.prompts import chat_ids
from distill.data.tokenizer import load_tokenizer
from distill.errors import UserError
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.rollout.vllm_engine import fixed_arguments
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent

NEVER = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load", "full_load", "load_module", "dill"}
"""Calls that make code of text."""


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Calls that could run what they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        trusts_nobody = keywords.get("trust_remote_code") == "False"
        if name.endswith(".from_pretrained") and not trusts_nobody:
            yield f"{name} asks a user at a terminal whether to run a model's code"
        if name.endswith("torch.load") and keywords.get("weights_only") != "True":
            yield f"{name} reads a pickle"
        if name in ("pickle.load", "pickle.loads", "yaml.load"):
            yield f"{name} reads whatever it names"
        if name.rpartition(".")[2] in NEVER and name not in ("re.compile", "torch.compile"):
            if name.endswith(".eval") and not node.args:  # a module's, which trains no more
                continue
            yield name


def test_nothing_in_the_package_runs_what_it_reads() -> None:
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
def test_an_unsafe_call_is_seen(line: str) -> None:
    assert len(list(unsafe_calls(ast.parse(line)))) == 1
    assert list(unsafe_calls(ast.parse("model.eval(); yaml.safe_load(t); torch.load(f, weights_only=True)"))) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a class of its own in it, and a user who would answer yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    save_tiny_model(tmp_path / "model", "qwen3", True)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code = f"""
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
Path({str(tmp_path / "it ran")!r}).touch()
class Own(PreTrainedConfig): model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
    (tmp_path / "model/own.py").write_text(code)
    return tmp_path / "model"


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_code_of_a_model_is_never_run_and_the_model_is_refused(folder: Path) -> None:
    _change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    files = ModelFiles(str(folder), folder, {})
    with pytest.raises(UserError, match=r"would run code of its own \(auto_map\), which is not supported"):
        model_config(files, "policy.model_name")
    assert not (folder.parent / "it ran").exists()


def test_the_code_of_a_tokenizer_is_never_run(folder: Path) -> None:
    """Its tokenizer.json is read without it; where there is none, the tokenizer is refused."""
    _change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    files = ModelFiles(str(folder), folder, {})
    assert type(load_tokenizer(files, None, "policy.tokenizer.name")).__module__.startswith("transformers.")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        load_tokenizer(files, None, "policy.tokenizer.name")
    assert caught.value.key == "policy.tokenizer.name"
    assert not (folder.parent / "it ran").exists()


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"never read, as they can run code: convert .*safe_serialization=True"):
        find_model(str(folder), "policy.model_name")
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"without a weight_map from tensors to safetensors files"):
        find_model(str(folder), "policy.model_name")


def test_vllm_never_runs_the_code_of_a_model() -> None:
    """And a recipe can't set what is fixed here."""
    assert fixed_arguments(can_sleep=False)["trust_remote_code"] is False


@pytest.mark.parametrize("name", ["os.system", "_StorageInfo.__init__.__globals__", "io.open"])
def test_the_metadata_of_a_checkpoint_reaches_nothing_through_what_it_is_made_of(tmp_path: Path, name: str) -> None:
    """Names with dots walk on from a module to what that imports."""
    dcp_save({"x": torch.zeros(3)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert ShardsReader(tmp_path / "shards").shapes() == {"x": torch.Size([3])}
    module = b"torch.distributed.checkpoint.filesystem"
    short = [b"\x8c" + bytes([len(text)]) + text for text in (module, name.encode(), b"touch ran")]
    (tmp_path / "shards/.metadata").write_bytes(b"\x80\x04" + short[0] + short[1] + b"\x93" + short[2] + b"\x85R.")
    with pytest.raises(pickle.UnpicklingError, match="has no place there"):
        ShardsReader(tmp_path / "shards").shapes()


def test_a_recipe_makes_no_objects(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for tag in (f"!!python/object/apply:os.mkdir ['{tmp_path}/ran']", "!!python/name:os.system", "!own {}"):
        recipe.write_text(f"policy: {tag}\n")
        with pytest.raises(UserError, match=r"recipe\.yaml isn't a readable recipe in line 1 \(could not determine"):
            load_config(["--config", str(recipe)])
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"distillation\.seed=!!python/name:os\.system can't be read"):
        load_config(["distillation.seed=!!python/name:os.system"])


def test_a_recipe_whose_anchors_stand_for_millions_of_values_is_refused_at_once(tmp_path: Path) -> None:
    tenfold = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    recipe = tmp_path / "recipe.yaml"
    for text in ("\n".join(tenfold), "policy: &p\n  again: *p"):
        recipe.write_text(text)
        with pytest.raises(UserError, match="its anchors stand for more than 100000 values"):
            load_config(["--config", str(recipe)])
    few = yaml.safe_load((ROOT / "recipes/distillation_math.yaml").read_text())
    recipe.write_text(yaml.safe_dump({**few, "policy": few["policy"]}) + "\nx: &x 1\n")
    with pytest.raises(UserError, match="unknown key x"):  # an anchor alone is no harm
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
def test_a_chat_template_reaches_nothing_of_pythons(template: str) -> None:
    """transformers renders in jinja's sandbox: an attribute with underscores is refused, or is nothing."""
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(UserError, match=r"the chat template of .* refuses .*(unsafe|undefined|has no attribute)"):
        chat_ids(tokenizer, [[{"role": "user", "content": "a"}]])


def test_the_folder_of_the_tests_works_untouched(folder: Path) -> None:
    """What the tests above break is whole before."""
    assert find_model(str(folder), "policy.model_name").files
    assert load_tokenizer(ModelFiles(str(folder), folder, {}), None, "policy.tokenizer.name").get_vocab()
