"""Exports give the trainer's log-probs and stop at its stop ids in transformers 4, transformers 5 and vLLM.

Exports of adapters give the trainer's log-probs in vLLM, as a LoRARequest and merged into the base model.

`make test-exports` makes the environment with transformers 4 and runs these tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from distill.data.tokenizer import load_tokenizer
from distill.distributed.world import World
from distill.model.export import export_hf
from distill.model.export_files import read_export_files
from distill.model.hf_files import find_model
from distill.model.student import Student
from scripts import export_hf as export_script
from tests.harness import config_for
from tests.helpers import run_ranks, tiny_config
from tests.model.test_adapter_exports import LORA, base, export_on_ranks
from tests.read_exports import TEXTS, read
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.exports
__all__ = ["base"]  # a fixture
REPO = Path(__file__).resolve().parent.parent
PYTHON_4 = REPO / ".venv-transformers4/bin/python"
SMOLLM2 = REPO / "models/SmolLM2-135M-pruned"

IDS = [(37 * i) % 250 for i in range(1, 31)]
NEW_TOKENS = 16
SOURCE_EOS = 256  # <|endoftext|>, the stop token of the base models
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1+2?<|im_end|>\n<|im_start|>assistant\n"

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@dataclass(frozen=True)
class Variant:
    """A random model that is exported."""

    family: str
    tied: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """Additional settings in tokenizer_config.json."""
    padding_side: str = "right"


LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": True}
VARIANTS = {
    "llama": Variant("llama", settings={"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama-untied-biases": Variant("llama", False, {"attention_bias": True, "mlp_bias": True}),
    "llama-class-bos": Variant("llama", tokenizer=LLAMA_CLASS, padding_side="left"),
    "llama-linear": Variant(
        "llama", settings={"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}
    ),
    "llama-llama3": Variant("llama", False, {"rope_parameters": LLAMA3}),
    "llama-yarn": Variant("llama", settings={"rope_parameters": YARN}),
    "llama-foreign": Variant("llama", settings={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama-float16": Variant("llama", dtype=torch.float16),
    "qwen2": Variant("qwen2", settings={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-untied-sliding": Variant("qwen2", False, SLIDING),
    "qwen3-untied": Variant("qwen3", False, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-yarn-sliding": Variant("qwen3", True, {"rope_parameters": YARN, **SLIDING}),
    "gemma3": Variant("gemma3_text"),
    "gemma3-untied-linear": Variant(
        "gemma3_text",
        False,
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ),
}
BFLOAT16 = ("llama-llama3", "gemma3")
"""Variants that are also exported in bfloat16."""
VLLM = ("llama-llama3", "llama-foreign", "qwen3-untied", "gemma3")
"""Variants that vLLM also loads."""
FOREIGN = {"partial_rotary_factor": 0.5, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
"""Settings that transformers' Llama ignores and vLLM applies."""
ADAPTERS: dict[str, tuple[str, ...]] = {
    "most modules": (),
    "one layer": (f"{LORA}.target_modules=[model.layers.0.*]", f"{LORA}.exclude_modules=[]"),
}
"""Overrides of adapters; the names of the modules of one layer are written completely to the export."""


def save_source(folder: Path, variant: Variant, seed: int) -> None:
    """Save a random model, whose stop token is <|endoftext|>, in the format of transformers 5."""
    torch.manual_seed(seed)
    config = tiny_config(variant.family, variant.tied)
    values = {**config.to_dict(), **variant.settings}
    values.pop("layer_types", None) if "use_sliding_window" in values and variant.settings else None
    config = type(config).from_dict(values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = SOURCE_EOS
    model.to(variant.dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if folder.name == "llama-foreign":
        _set(folder / "config.json", FOREIGN)
    _set(folder / "tokenizer_config.json", variant.tokenizer)


def _set(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings)))


@torch.inference_mode()
def greedy(folder: Path, ids: Sequence[int] = IDS) -> list[int]:
    """Return the greedy continuation of ``ids``, one token at a time, without stop ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = list(ids)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def until(continuation: Sequence[int], stops: Collection[int]) -> list[int]:
    """Return a continuation up to its first stop id, inclusive."""
    end = next((i for i, token in enumerate(continuation, 1) if token in stops), len(continuation))
    return list(continuation[:end])


def stop_of(continuation: Sequence[int]) -> int:
    """Return the token of the first half of a continuation whose first occurrence is latest."""
    half = continuation[: NEW_TOKENS // 2]
    return max(set(half), key=half.index)


Job = tuple[str, str, str, tuple[int, ...]]
"""Source folder, export folder, precision, stop ids."""


def _export(jobs: Sequence[Job]) -> list[tuple[list[float], list[list[int]]]]:
    """Load each source as a student and export it; return the student's log-probs of IDS[1:] and the ids of TEXTS."""
    found = []
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    for source, out, precision, stops in jobs:
        settings = f"policy.precision={precision}", "distillation.allow_degenerate=true"
        config = config_for(Path(source), Path(source), *settings)
        files = find_model(source, "policy.model_name")
        tokenizer = load_tokenizer(files, None, "policy.tokenizer.name")
        student = Student(config, files, world, max(tokenizer.vocab_size, 384), stops)
        export_hf(Path(out), student.weights(), read_export_files(files, tokenizer, None, stops), student.dtype)
        found.append((student.logprobs(IDS), [tokenizer(text)["input_ids"] for text in TEXTS]))
    return found


@dataclass
class Seen:
    """Outputs of the trainer and of the other programs, by export folder."""

    root: Path
    trainer: dict[str, list[float]] = field(default_factory=dict)
    """Log-probs of IDS[1:] of the student."""
    text_ids: dict[str, list[list[int]]] = field(default_factory=dict)
    """Token ids of TEXTS in training."""
    continued: dict[str, list[int]] = field(default_factory=dict)
    """Greedy continuation of TEXTS[0] up to the first stop id, inclusive."""
    expected: dict[str, list[int]] = field(default_factory=dict)
    """Greedy continuation of IDS up to the first stop id, inclusive."""
    by_4: dict[str, Any] = field(default_factory=dict)
    by_vllm: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)
    adapters: dict[str, list[float]] = field(default_factory=dict)
    """Log-probs of IDS[1:] of students with adapters, by folder of the exported adapter."""


def start_program(python: Path, root: Path, name: str, job: Mapping[str, Any]) -> tuple[subprocess.Popen[str], Path]:
    (root / f"{name}.json").write_text(json.dumps(job))
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [str(python), str(REPO / "tests/read_exports.py"), f"{root / name}.json", f"{root / name}.pt"]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process, root / f"{name}.pt"


def result_of(process: subprocess.Popen[str], file: Path, version: str) -> Any:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    saved = torch.load(file, weights_only=False)
    assert saved["version"].startswith(version), saved["version"]
    return saved["result"]


def _export_adapters(base: Path, root: Path) -> dict[str, list[float]]:
    """Export students with adapters; return their log-probs by folder of the adapter. Merge the first one."""
    found = {}
    for name, overrides in ADAPTERS.items():
        (on_rank,) = run_ranks(1, export_on_ranks, base, root, {name: (1, 1, "float32")}, overrides)
        found[str(root / name / "peft")] = on_rank[name].logprobs
    export_script.export(root / next(iter(ADAPTERS)) / "step_3", root / "merged", merge=True)
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Seen:
    """Export and load sources saved by version 5; then export and load the copies that version 4 saves of them."""
    assert PYTHON_4.exists(), "run `make test-exports`, which makes the environment with transformers 4"
    root = tmp_path_factory.mktemp("exports")
    seen = Seen(root)
    jobs: list[Job] = []
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        source = root / "source-5" / name
        save_source(source, variant, seed)
        continuation = greedy(source)
        stop = stop_of(continuation)
        precisions = ("float32", "bfloat16") if name in BFLOAT16 else ("float32",)
        for precision in precisions:
            out = str(root / "export-5" / f"{name}-{precision}")
            jobs.append((str(source), out, precision, (stop, SOURCE_EOS)))
            seen.sources[out] = source
            seen.expected[out] = until(continuation, (stop, SOURCE_EOS))
    smollm2 = str(root / "export-5" / "smollm2")
    jobs.append((str(SMOLLM2), smollm2, "float32", ()))
    seen.sources[smollm2] = SMOLLM2
    _add_trainer(seen, jobs)
    resaved = {job[1]: str(root / "source-4" / Path(job[1]).name) for job in jobs if job[1] != smollm2}
    arguments: dict[str, Any] = {"ids": IDS, "new_tokens": NEW_TOKENS}
    seen.adapters = _export_adapters(base, root / "adapters")
    with ExitStack() as stack:
        vllm_folders = [str(root / "export-5" / f"{name}-float32") for name in VLLM] + [str(root / "adapters/merged")]
        with_adapters = {"base": str(base), "adapters": list(seen.adapters)}
        started = [
            start_program(
                Path(sys.executable), root, "vllm", {"vllm_folders": vllm_folders, **with_adapters, **arguments}
            ),
            start_program(
                PYTHON_4, root, "first", {"folders": [job[1] for job in jobs], "resave": resaved, **arguments}
            ),
        ]
        for process, _ in started:
            stack.callback(process.kill)
        seen.by_4 |= result_of(*started[1], "4.")
        second = [
            (resaved[out], out.replace("export-5", "export-4"), "float32", stops)
            for _, out, precision, stops in jobs
            if out != smollm2 and precision == "float32"
        ]
        _add_trainer(seen, second)
        seen.sources |= {job[1]: Path(job[0]) for job in second}
        seen.expected |= {job[1]: seen.expected[job[1].replace("export-4", "export-5")] for job in second}
        started.append(start_program(PYTHON_4, root, "second", {"folders": [job[1] for job in second], **arguments}))
        stack.callback(started[-1][0].kill)
        seen.by_4 |= result_of(*started[-1], "4.")
        seen.by_vllm |= result_of(*started[0], "5.")
    return seen


def _add_trainer(seen: Seen, jobs: Sequence[Job]) -> None:
    """Export the sources and record the outputs of the trainer and the continuation of TEXTS[0]."""
    (found,) = run_ranks(1, _export, jobs)
    for (source, out, precision, stops), (logprobs, text_ids) in zip(jobs, found, strict=True):
        seen.trainer[out], seen.text_ids[out] = logprobs, text_ids
        if precision == "float32":
            ends = stops or {AutoConfig.from_pretrained(source).eos_token_id}
            seen.continued[out] = until(greedy(Path(source), text_ids[0]), ends)


def _check(found: Mapping[str, Any], folder: str, seen: Seen) -> None:
    exact = folder.endswith(("float32", "smollm2"))
    if exact:
        after_first = torch.tensor(IDS[1:])[:, None]
        ours, theirs = torch.tensor(seen.trainer[folder]), found["logprobs"][:-1].gather(1, after_first)[:, 0]
        assert float((ours - theirs).abs().max()) < 1e-4, folder
    _check_texts(found, folder, seen)
    if not folder.endswith("smollm2"):
        variant = VARIANTS[Path(folder).name.rpartition("-")[0]]
        assert found["chat"] == RENDERED, folder
        special = [variant.tokenizer.get("bos_token"), "<|im_end|>", "<|endoftext|>", variant.padding_side]
        assert found["special"] == special, folder
        assert found["dtype"] == f"torch.{'float32' if exact else 'bfloat16'}", folder
    if exact:
        assert found["continued"] == seen.continued[folder], folder
    if exact and folder in seen.expected:
        assert found["generated"] == seen.expected[folder], folder
        assert len(found["generated"]) < NEW_TOKENS, "no stop id was generated"


def _check_texts(found: Mapping[str, Any], folder: str, seen: Seen) -> None:
    """Compare the ids of TEXTS with those of training and of tokenizer.json, after BOS if a setting requires it."""
    assert found["text_ids"] == seen.text_ids[folder], folder
    bos = [SOURCE_EOS] if "-bos-" in folder else []
    tokenizer = Tokenizer.from_file(str(seen.sources[folder] / "tokenizer.json"))
    own = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert found["text_ids"] == [bos + ids for ids in own], folder


def test_exports_of_models_in_both_formats_give_the_trainers_outputs_in_transformers_4(seen: Seen) -> None:
    assert len(seen.by_4) == 2 * len(VARIANTS) + len(BFLOAT16) + 1
    for folder, found in seen.by_4.items():
        _check(found, folder, seen)


def test_exports_of_models_in_both_formats_give_the_trainers_outputs_in_transformers_5(seen: Seen) -> None:
    found = read(list(seen.by_4), IDS, NEW_TOKENS)
    for folder in found:
        _check(found[folder], folder, seen)
    assert {folder: each["tied"] for folder, each in found.items()} == {
        folder: each["tied"] for folder, each in seen.by_4.items()
    }


def _max_diff(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return float((torch.tensor(ours) - torch.tensor(theirs)).abs().max())


def test_exports_give_the_trainers_outputs_in_vllm(seen: Seen) -> None:
    for name in VLLM:
        folder = str(seen.root / "export-5" / f"{name}-float32")
        found = seen.by_vllm[folder]
        assert _max_diff(seen.trainer[folder], found["logprobs"]) < 1e-4, folder
        assert found["generated"] == seen.expected[folder], f"vLLM ignores stop ids of the training: {folder}"
        _check_texts(found, folder, seen)


def test_exports_of_adapters_give_the_trainers_logprobs_in_vllm(seen: Seen, base: Path) -> None:
    """As LoRARequests, and merged into the base model."""
    assert len(seen.adapters) == len(ADAPTERS)
    for folder, logprobs in seen.adapters.items():
        assert _max_diff(logprobs, seen.by_vllm[folder]) < 1e-4, folder
        assert _max_diff(logprobs, seen.by_vllm[str(base)]) > 0.1, "the adapter changes the model"
        named = json.loads((Path(folder) / "adapter_config.json").read_text())["target_modules"]
        assert all(name.startswith("model.layers.0.") == ("one layer" in folder) for name in named)
    merged = seen.by_vllm[str(seen.root / "adapters/merged")]["logprobs"]
    assert _max_diff(next(iter(seen.adapters.values())), merged) < 1e-4
