"""Malformed recipes, command lines, data files, templates, model folders and environments, drawn by a seed.

Each way to break something takes a run that works and makes it wrong by construction: a case that trains is a fault
of this file. ``malformed(root, count, seed, ranks)`` draws the cases for a folder that ``make_tiny_run`` filled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from distill.config.parse import hints, key_paths, members, type_of
from distill.config.rules import ABOVE_ZERO, AT_LEAST, AT_MOST_1
from distill.config.schema import Config

CANARY = "executed"
"""A file of this name in the root: something that only reads was made to run code."""


@dataclass
class Case:
    """One run that must be refused."""

    way: str
    """How it was broken."""
    argv: list[str]
    names: str
    """What the sentence must name: the key, the file or the variable; of several, divided by a bar, any."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Variables to set, or to unset."""
    detail: str = ""
    """What was drawn."""


class Workshop:
    """A folder to write broken things into, and the draw."""

    def __init__(self, root: Path, rng: random.Random, name: str, ranks: int) -> None:
        self.root, self.rng, self.name, self.ranks = root, rng, name, ranks
        self.folder = root / "malformed" / name
        self.folder.mkdir(parents=True)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def tree(self) -> dict[str, Any]:
        """The recipe that works."""
        tree: dict[str, Any] = yaml.safe_load((self.root / "recipe.yaml").read_text())
        tree["cluster"]["gpus_per_node"] = self.ranks
        tree["runtime"] = {"run_dir": f"{self.root}/runs/{self.name}"}
        tree["checkpointing"]["checkpoint_dir"] = f"{self.root}/checkpoints/{self.name}"
        return tree

    def case(self, names: str, *overrides: str, env: Mapping[str, str | None] | None = None, detail: str = "") -> Case:
        """The working recipe under overrides."""
        return self.recipe(yaml.safe_dump(self.tree()), names, *overrides, env=env, detail=detail)

    def recipe(
        self,
        text: str | bytes,
        names: str,
        *overrides: str,
        env: Mapping[str, str | None] | None = None,
        detail: str = "",
    ) -> Case:
        """A recipe of this text."""
        path = self.file("recipe.yaml", text)
        return Case("", ["--config", str(path), *overrides], names, env or {}, detail or " ".join(overrides)[:200])

    def keyed(self, key: str, value: Any, names: str | None = None) -> Case:
        """The working recipe with one key set otherwise."""
        tree: Any = self.tree()
        place = tree
        *sections, last = key.split(".")
        for section in sections:
            place[section] = place[section] if isinstance(place.get(section), dict) else {}
            place = place[section]
        place[last] = value
        return self.recipe(yaml.safe_dump(tree), names or shown(key), detail=f"{key}: {value!r}"[:200])

    def context(self, names: str, *overrides: str) -> Case:
        """The working recipe under context distillation."""
        return self.case(
            names,
            "distillation.context_distillation.enabled=true",
            f"teacher.model_name={self.root}/student",
            "teacher.max_total_sequence_length=256",
            *overrides,
        )

    def model(self) -> Path:
        """A copy of the student's folder."""
        return Path(shutil.copytree(self.root / "student", self.folder / "model"))

    def cut(self, data: bytes, least: int = 1) -> bytes:
        """Without its end."""
        return data[: self.rng.randrange(least, len(data))]

    def noise(self, length: int = 64) -> bytes:
        return bytes(self.rng.randrange(256) for _ in range(length))


def shown(key: str) -> str:
    """What a sentence calls a key: those of data.default are filled into data.train."""
    return key.rpartition(".")[2] if key.startswith("data.default.") else key


Way = Callable[[Workshop], Case]
WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    """Register a way to break a run under its name."""
    WAYS[function.__name__.strip("_")] = function
    return function


def malformed(root: Path, count: int, seed: int, ranks: int, among: Callable[[str], bool] = bool) -> list[Case]:
    """``count`` cases by a seed, every way in turn before one comes again."""
    rng = random.Random(seed)
    ways = [name for name in WAYS if among(name)]
    cases: list[Case] = []
    while len(cases) < count:
        for name in rng.sample(ways, len(ways))[: count - len(cases)]:
            shop = Workshop(root, random.Random(rng.random()), f"{seed}-{len(cases):03d}-{name}", ranks)
            case = WAYS[name](shop)
            case.way = name
            cases.append(case)
    return cases


# ---- recipes ---------------------------------------------------------------------------------------------------------

LEAVES = [
    key
    for key in key_paths()
    if not any(key.startswith(path) for path in ("policy.scheduler", "data.validation"))
    and not any(other.startswith(key + ".") for other in key_paths())
]
SECTIONS = [key for key in key_paths() if any(other.startswith(key + ".") for other in key_paths())]


def wrong_values(hint: Any) -> list[Any]:
    """Values that no alternative of a type takes."""
    options = members(hint)
    fits: dict[Any, list[Any]] = {
        bool: ["perhaps", 2, 0.5, [True], {"on": True}],
        int: ["many", 1.5, [1], {"a": 1}, True, float("nan"), float("inf"), "1e3"],
        float: ["warm", [0.5], {"a": 0.5}, True, float("nan"), float("inf"), float("-inf"), 10**400],
        str: [["a"], {"a": "b"}, 3, 0.5, False],
        dict: ["a", 3, ["a"]],
        tuple: ["a", 3, {"a": "b"}, [{"a": {"b": "c"}}]],
        Literal: ["nonsense", 3, [], {"a": "b"}, ""],
    }
    values: list[Any] = []
    for option in options:
        values += fits.get(get_origin(option) or option, [])
    wrong = [value for value in values if not any(_fits(value, option) for option in options)]
    return wrong + ([] if type(None) in options else [None])


def _fits(value: Any, option: Any) -> bool:
    kind = get_origin(option) or option
    if kind is Literal:
        return value in get_args(option) and type(value) is str
    if kind is float:
        return type(value) in (int, float) and abs(value) < float("inf")
    return kind is type(value) or (kind is tuple and isinstance(value, list) and value == [])


@way
def _wrong_type(shop: Workshop) -> Case:
    key = shop.rng.choice(LEAVES)
    return shop.keyed(key, shop.rng.choice(wrong_values(type_of(key))))


@way
def _wrong_type_on_the_command_line(shop: Workshop) -> Case:
    number = [key for key in LEAVES if not {str, dict} & {get_origin(m) or m for m in members(type_of(key))}]
    key = shop.rng.choice(number)
    value = shop.rng.choice(["nonsense", "{a: b}", "[[1]]", "1e999", "~nonsense", "'1'", '"'])
    return shop.case(shown(key), f"{key}={value}")


@way
def _section_is_no_section(shop: Workshop) -> Case:
    key = shop.rng.choice([key for key in SECTIONS if key not in ("policy.scheduler", "data.validation")])
    value = shop.rng.choice([3, "text", True, ["a"], 0.5])
    return shop.keyed(key, value, names=key.split(".")[0])


@way
def _unknown_key(shop: Workshop) -> Case:
    section = shop.rng.choice([key for key in SECTIONS if key != "policy.scheduler"])
    name = "zz" + "".join(shop.rng.choice("abcxyz_") for _ in range(6))
    return shop.keyed(f"{section}.{name}", shop.rng.choice([1, "a", None, [], {}]), names=name)


@way
def _misspelt_key(shop: Workshop) -> Case:
    key = shop.rng.choice(LEAVES)
    section, _, name = key.rpartition(".")
    place = shop.rng.randrange(len(name))
    wrong = name[:place] + name[place + shop.rng.choice([0, 1]) :]
    wrong = wrong if wrong != name else name[:place] + name[place] + name[place:]
    if not wrong or f"{section}.{wrong}" in LEAVES:
        wrong = name + "q"
    return shop.keyed(f"{section}.{wrong}", 1, names=wrong)


@way
def _unknown_section(shop: Workshop) -> Case:
    tree = shop.tree()
    name = shop.rng.choice(["polcy", "Policy", "policy ", "student", "", "zz", "policy.model_name", "0", "__class__"])
    tree[name] = tree["policy"]
    return shop.recipe(yaml.safe_dump(tree), name, detail=name)


@way
def _no_text_as_key(shop: Workshop) -> Case:
    key = shop.rng.choice(["3", "true", "null", "1.5", "[1, 2]", "? [a]\n "])
    names = "recipe.yaml" if "[" in key else "key"
    return shop.recipe(f"{yaml.safe_dump(shop.tree())}\n{key}: 1\n", names, detail=key)


@way
def _out_of_range(shop: Workshop) -> Case:
    ranges: list[tuple[str, Any]] = [(key, least - 1) for least, keys in AT_LEAST.items() for key in keys.split()]
    ranges += [(key, -(10 ** shop.rng.randrange(30))) for keys in AT_LEAST.values() for key in keys.split()]
    ranges += [(key, 0) for key in ABOVE_ZERO.split()] + [(key, 1.5) for key in AT_MOST_1.split()]
    ranges += [("data.train.repeat", 0), ("data.train.repeat", -3)]
    ranges += [("policy.generation.val_temperature", -0.1), ("policy.optimizer.kwargs.betas", [0.9, 1.0])]
    key, value = shop.rng.choice(ranges)
    return shop.keyed(key, value)


@way
def _huge_number(shop: Workshop) -> Case:
    """Beyond what the data, the models or the machine have."""
    key = shop.rng.choice(
        [
            "distillation.num_prompts_per_step",
            "distillation.topk_logits_k",
            "policy.max_total_sequence_length",
            "teacher.max_total_sequence_length",
            "policy.dtensor_cfg.tensor_parallel_size",
            "policy.dtensor_cfg.context_parallel_size",
            "policy.dtensor_cfg.replicate_size",
            "policy.train_global_batch_size",
            "cluster.gpus_per_node",
            "cluster.num_nodes",
        ]
    )
    return shop.keyed(key, 10 ** shop.rng.randrange(4, 40), key.rpartition(".")[2])


CONTRADICTIONS: list[tuple[str, list[str]]] = [
    ("policy.train_global_batch_size", ["policy.train_global_batch_size=3"]),
    ("sequence_packing.enabled", ["policy.sequence_packing.enabled=true", "policy.dynamic_batching.enabled=true"]),
    ("policy.generation.max_new_tokens=65", ["policy.generation.max_new_tokens=65"]),
    ("max_model_len=32", ["policy.generation.backend=vllm", "policy.generation.vllm_cfg.max_model_len=32"]),
    ("vllm_cfg.precision", ["policy.generation.backend=vllm", "policy.generation.vllm_cfg.precision=bfloat16"]),
    ("teacher.max_total_sequence_length=10", ["teacher.max_total_sequence_length=10"]),
    ("loss_fn.zero_outside_topk", ["loss_fn={zero_outside_topk: true, outside_topk: bucket}"]),
    ("loss_fn.jsd_beta=0.0", ["loss_fn.kl_type=jsd", "loss_fn.jsd_beta=0"]),
    ("loss_fn.kl_type=jsd", ["loss_fn.kl_type=jsd", "loss_fn.outside_topk=floor"]),
    ("loss_fn.temperature=0.5", ["loss_fn.kl_type=sampled", "loss_fn.temperature=0.5"]),
    ("ema_decay=1.0", ["distillation.context_distillation.ema_decay=1"]),
    ("teacher.model_name", ["distillation.context_distillation.enabled=true"]),
    ("data.train", ["data.train=null"]),
    ("data.train", ["data.train={dataset_name: gsm8k, data_path: x.jsonl}"]),
    ("data.validation", ["distillation.val_period=1"]),
    ("data.train.env_name=judge", ["data.train.env_name=judge"]),
    ("checkpointing.metric_name=accuracy", ["checkpointing.metric_name=accuracy"]),
    ("checkpoint_must_save_by=soon", ["checkpointing.checkpoint_must_save_by=soon"]),
    ("policy.generation.top_p=0.5", ["policy.generation.top_p=0.5"]),
    ("top_k=5", ["policy.generation.top_k=5"]),
    ("policy.scheduler", ["policy.scheduler=[{milestones: [3]}]"]),
    ("policy.scheduler", ["policy.scheduler=[{name: torch.optim.lr_scheduler.LinearLR, kwargs: {gamma: 1}}]"]),
    ("policy.scheduler", ["policy.scheduler=[{name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: a}}]"]),
    ("policy.scheduler", ["policy.scheduler=[{name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: 7}}]"]),
    ("policy.scheduler", ["policy.scheduler=[{name: torch.optim.lr_scheduler.LinearLR, kwargs: {total_iters: -7}}]"]),
    ("policy.scheduler", ["policy.scheduler=[{name: torch.optim.lr_scheduler.CosineAnnealingLR}]"]),
    ("policy.scheduler", ["policy.scheduler=[{name: torch.optim.lr_scheduler.CosineAnnealingLR, kwargs: {T_max: 0}}]"]),
    ("max_rollout_turns=2", ["distillation.max_rollout_turns=2"]),
    ("policy.dtensor_cfg.enabled=false", ["policy.dtensor_cfg.enabled=false"]),
    ("colocated.enabled=false", ["policy.generation.colocated.enabled=false"]),
    ("megatron_cfg.enabled", ["policy.megatron_cfg.enabled=true"]),
    ("stop_strings", ["policy.generation.stop_strings=[a]"]),
    ("stop_token_ids", ["policy.generation.stop_token_ids=[-1]"]),
    ("stop_token_ids", ["policy.generation.stop_token_ids=[100000]"]),
    ("runtime.run_dir", ["runtime.run_dir=/dev/null/run"]),
    ("runtime.run_dir", ["runtime.run_dir=''"]),
    ("logger.log_dir", ["logger.log_dir=''"]),
    ("checkpointing.checkpoint_dir", ["checkpointing.checkpoint_dir=/dev/null/checkpoints"]),
    ("data.train.split", ["data.train.split=test"]),
    ("data.train.split", ["data.train.split=train[:-]"]),
    ("vllm_kwargs.trust_remote_code", ["policy.generation={backend: vllm, vllm_kwargs: {trust_remote_code: true}}"]),
    ("vllm_kwargs.model", ["policy.generation={backend: vllm, vllm_kwargs: {model: other}}"]),
]


@way
def _contradiction(shop: Workshop) -> Case:
    names, overrides = shop.rng.choice(CONTRADICTIONS)
    return shop.case(names, *overrides)


@way
def _contradiction_too(shop: Workshop) -> Case:
    return _contradiction(shop)


@way
def _bad_interpolation(shop: Workshop) -> Case:
    key = shop.rng.choice(["policy.model_name", "distillation.seed", "data.train.data_path", "loss_fn.temperature"])
    value = shop.rng.choice(
        [
            "${nowhere}",
            "${nowhere.at.all}",
            "${",
            "${policy.model_name",
            "${mul:2}",
            "${mul:a,b}",
            "${mul:2,3,4}",
            "${frobnicate:1}",
            "${oc.env:NO_SUCH_VARIABLE_AT_ALL}",
            "${" + key + "}",
            "${policy}",
            "${..........x}",
            "${oc.create:[}",
            "${oc.decode:'{'}",
        ]
    )
    return shop.keyed(key, value, f"{key}|recipe.yaml")


@way
def _interpolations_in_a_circle(shop: Workshop) -> Case:
    tree = shop.tree()
    tree["policy"]["generation"]["temperature"] = "${loss_fn.temperature}"
    tree["loss_fn"]["temperature"] = shop.rng.choice(
        ["${policy.generation.temperature}", "${mul:2,${policy.generation.temperature}}"]
    )
    return shop.recipe(yaml.safe_dump(tree), "temperature")


@way
def _key_twice(shop: Workshop) -> Case:
    text = shop.rng.choice(["policy: {precision: float32}", "logger: {log_dir: a, log_dir: b}", "a: 1\na: 2"])
    return shop.recipe(yaml.safe_dump(shop.tree()) + "\n" + text + "\n", "recipe.yaml", detail=text)


@way
def _broken_yaml(shop: Workshop) -> Case:
    text = shop.rng.choice(["a: [1, 2", "\tpolicy: 1", "a: {", "a: 'b", "- x", "a: b: c", "%YAML 9.9", "*nowhere"])
    before = shop.rng.random() < 0.5
    whole = f"{text}\n{yaml.safe_dump(shop.tree())}" if before else f"{yaml.safe_dump(shop.tree())}\n{text}\n"
    return shop.recipe(whole, "recipe.yaml", detail=text)


@way
def _code_in_yaml(shop: Workshop) -> Case:
    canary = shop.root / CANARY
    tag = shop.rng.choice(
        [
            f"!!python/object/apply:os.system ['touch {canary}']",
            f"!!python/object/new:subprocess.Popen [[touch, '{canary}']]",
            "!!python/name:os.system",
            "!!python/object:distill.types.Problem {}",
            "!!python/tuple [1, 2]",
            "!custom {}",
        ]
    )
    return shop.recipe(yaml.safe_dump(shop.tree()) + f"\nruntime2: {tag}\n", "recipe.yaml", detail=tag)


@way
def _recipe_of_other_bytes(shop: Workshop) -> Case:
    text = yaml.safe_dump(shop.tree())
    kind = shop.rng.randrange(5)
    data = [
        text.encode() + b"\n# \xff\xfe\xff\n",
        b"\x00" + text.encode(),
        shop.noise(200) + b"\xff\xff",
        text.encode("utf-16")[: shop.rng.randrange(3, 40) * 2 + 1],
        b"\x7fELF" + shop.noise(500) + b"\xc3\x28",
    ][kind]
    return shop.recipe(data, "recipe.yaml", detail=str(kind))


@way
def _recipe_that_holds_no_keys(shop: Workshop) -> Case:
    text = shop.rng.choice(["[1, 2]", "3", "just words", "null", "true", "'policy: 1'"])
    names = {"null": "data.train", "just words": "just words", "'policy: 1'": "policy=1"}
    return shop.recipe(text, names.get(text, "recipe.yaml"), detail=text)


@way
def _recipe_that_never_ends(shop: Workshop) -> Case:
    """A few hundred bytes that stand for millions of values, or a thousand levels."""
    doubling = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    doubling += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    deep = "policy: " + "[" * 3000 + "]" * 3000
    ring = "policy: &p\n  again: *p"
    text = shop.rng.choice(["\n".join(doubling), deep, ring])
    return shop.recipe(text, "recipe.yaml", detail=text[:40])


@way
def _recipe_is_no_file(shop: Workshop) -> Case:
    kind = shop.rng.randrange(4)
    if kind == 0:
        path = shop.folder
    elif kind == 1:
        path = shop.folder / "nowhere.yaml"
    elif kind == 2:
        path = shop.folder / "pipe.yaml"
        os.mkfifo(path)
    else:
        path = shop.folder / "dangling.yaml"
        path.symlink_to(shop.folder / "gone.yaml")
    return Case("", ["--config", str(path)], path.name)


@way
def _bad_parent(shop: Workshop) -> Case:
    tree = shop.tree()
    shop.file("other.yaml", "defaults: recipe.yaml\n")
    shop.file("broken.yaml", "a: [")
    parent, names = shop.rng.choice(
        [
            ("recipe.yaml", "recipe.yaml"),
            ("other.yaml", "recipe.yaml"),
            ("nowhere.yaml", "nowhere.yaml"),
            ("broken.yaml", "broken.yaml"),
            (".", "defaults"),
            (3, "defaults"),
            ({"a": "b"}, "defaults"),
            ([["a"]], "defaults"),
            ([None], "defaults"),
            ("", "defaults"),
            ("\x00", "defaults"),
            ("${policy.model_name}", "defaults"),
        ]
    )
    tree["defaults"] = parent
    return shop.recipe(yaml.safe_dump(tree), names, detail=repr(parent))


@way
def _bad_override(shop: Workshop) -> Case:
    words, names = shop.rng.choice(
        [
            (["novalue"], "novalue"),
            (["=x"], "=x"),
            (["a..b=1"], "a..b"),
            (["policy.model_name.=x"], "policy.model_name."),
            (["--"], "--"),
            (["--config"], "--config"),
            (["--distillation.seed"], "distillation.seed"),
            (["--distillation.seed", "--dry_run_not"], "distillation.seed"),
            (["policy=3"], "policy=3"),
            (["policy.model_name.x=1"], "policy.model_name"),
            (["distillation={{"], "distillation"),
            (["distillation=[a"], "distillation"),
            (["data.train.5.repeat=2"], "data.train"),
            (["policy.scheduler.7.name=x"], "policy.scheduler"),
            (["policy.scheduler.-1.name=x"], "policy.scheduler"),
            (["distillation.seed=[1"], "distillation.seed"),
            (["distillation seed=1"], "distillation seed"),
            (["distillation.seed 1=1"], "distillation.seed 1"),
            (["distillation.séed=1"], "distillation.séed"),
            (["distillation.seed=\udcff"], "distillation.seed"),
            (["policy.model_name=\udcff"], "policy.model_name"),
            (["policy.model_name=" + "x" * 5000], "policy.model_name"),
            (["data.train.data_path=a\nb.jsonl"], "data.train.data_path"),
            (["distillation.seed=!!python/name:os.system"], "distillation.seed"),
            (["distillation.seed=" + "[" * 3000], "distillation.seed"),
            (["-x"], "-x"),
            (["data.train.data_path=" + "x" * 5000], "data.train.data_path"),
            (["data.default.prompt_file=" + "x" * 5000], "data.train.prompt_file"),
            (["--config", "x" * 5000], "--config"),
            (["defaults=" + "x" * 5000], "defaults"),
            (["runtime.run_dir=" + "x" * 5000], "runtime.run_dir"),
            (["defaults=other.yaml"], "defaults"),
            (["runtime.run_dir=a\x00b"], "runtime.run_dir"),
            (["checkpointing.checkpoint_dir=a\x00b"], "checkpointing.checkpoint_dir"),
            (["logger.log_dir=a\x00b", "runtime.run_dir=null"], "logger.log_dir"),
        ]
    )
    return shop.case(names, *words, detail=repr(words)[:200])


# ---- data files ------------------------------------------------------------------------------------------------------


def _rows(shop: Workshop) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(shop.rng.randrange(4, 30))]


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _data(shop: Workshop, name: str, content: bytes, names: str | None = None) -> Case:
    path = shop.file(name, content)
    return shop.case(names or name, f"data.train.data_path={path}", detail=repr(content[-80:]))


@way
def _cut_line(shop: Workshop) -> Case:
    data = _lines(_rows(shop))
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    return _data(shop, "cut.jsonl", data[: shop.rng.randrange(last + 1, len(data) - 2)])


@way
def _bad_line(shop: Workshop) -> Case:
    lines = _lines(_rows(shop)).splitlines()
    bad = shop.rng.choice(
        [
            b"{",
            b"}",
            b"[]",
            b"3",
            b"null",
            b'"text"',
            b"{'question': 'a'}",
            b'{"question": "a"} {"question": "b"}',
            b'{"question": "a",}',
            b"[" * 100_000,
            b'{"question": ' + b"9" * 5000 + b"}",
            b'{"question": "\\ud800"}',
            b'{"question": "a\xff"}',
            b'{"question": "\xc3\x28"}',
            b'{"question": 3}',
            b'{"question": {"a": "b"}}',
            b'{"question": ["a"]}',
            b'{"question": true, "answer": "3"}',
            b'{"question": "a", "answer": {"a": 1}}',
            b'{"question": "a", "answer": true}',
            b'{"problem": "a", "answer": "3"}',
            b'{"question": "a"}',
            b"{}",
            shop.noise(20).replace(b"\n", b"") + b"\xff",
        ]
    )
    at = shop.rng.randrange(len(lines) + 1)
    return _data(shop, "bad.jsonl", b"\n".join([*lines[:at], bad, *lines[at:]]) + b"\n", f"in line {at + 1}")


@way
def _data_without_problems(shop: Workshop) -> Case:
    name, content = shop.rng.choice(
        [
            ("none.jsonl", b""),
            ("none.jsonl", b"\n\n \n"),
            ("none.jsonl", b'{"question": "", "answer": "1"}\n' * 3),
            ("none.jsonl", b'{"question": null, "answer": "1"}\n'),
            ("none.jsonl", b"\xef\xbb\xbf"),
            ("none.json", b"[]"),
            ("none.json", b""),
        ]
    )
    return _data(shop, name, content)


@way
def _data_of_other_bytes(shop: Workshop) -> Case:
    text = _lines(_rows(shop)).decode()
    name, content = shop.rng.choice(
        [
            ("other.jsonl", text.encode("utf-16")),
            ("other.jsonl", shop.noise(300) + b"\xff"),
            ("other.jsonl", b"PK\x03\x04" + shop.noise(100)),
            ("other.jsonl", b"\x1f\x8b\x08\x00" + shop.noise(100)),
            ("other.jsonl", b"\x00" * 100),
            ("other.json", text.encode()[:-3]),
            ("other.json", b'[{"question": "a"'),
            ("other.json", b'[{"question": "a"}, 3]'),
            ("other.json", b'{"data": [{"question": "a"}]}'),
            ("other.csv", b"question,answer\na,b,c\n"),
            ("other", text.encode()),
            ("other.jsonl.gz", b"\x1f\x8b\x08\x00"),
            ("other.pkl", b"\x80\x04."),
        ]
    )
    return _data(shop, name, content)


@way
def _bad_parquet(shop: Workshop) -> Case:
    path = shop.folder / "bad.parquet"
    kind = shop.rng.randrange(8)
    rows = _rows(shop)
    table = pa.Table.from_pylist(rows)
    names = "bad.parquet"
    if kind == 0:
        table = table.rename_columns(["problem", "solution"])
    elif kind == 1:
        table = pa.table({"question": [[1.0]] * 4, "answer": ["1"] * 4})
    elif kind == 2:
        table = table.slice(0, 0)
    elif kind == 3:
        table = pa.table({"question": pa.array([None] * 4, pa.string()), "answer": ["1"] * 4})
    elif kind == 4:
        table = pa.table({"question": [b"a\xff"] * 4, "answer": ["1"] * 4})
    pq.write_table(table, path)
    whole = path.read_bytes()
    if kind == 5:
        path.write_bytes(shop.cut(whole))
    elif kind == 6:
        path.write_bytes(shop.noise(100))
    elif kind == 7:  # whole at both ends, and its pages overwritten
        path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    return shop.case(names, f"data.train.data_path={path}", detail=str(kind))


@way
def _parquet_of_text_that_is_none(shop: Workshop) -> Case:
    """A column that says it is UTF-8, and isn't."""
    path = shop.folder / "bytes.parquet"
    values = pa.array([b"a", b"\xff\xfe", b"c", b"d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": values, "answer": ["1"] * 4}), path)
    return shop.case("bytes.parquet", f"data.train.data_path={path}")


@way
def _data_path_is_no_file(shop: Workshop) -> Case:
    kind = shop.rng.randrange(6)
    path = shop.folder / ("data.jsonl" if kind < 5 else "data.parquet")
    if kind == 0:
        path = shop.folder / "empty"
        path.mkdir()
    elif kind in (1, 5):
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(shop.folder / "gone.jsonl")
    elif kind == 3:
        path.symlink_to(path)
    return shop.case(path.name, f"data.train.data_path={path}", detail=str(kind))


@way
def _broken_dataset_folder(shop: Workshop) -> Case:
    folder = shop.folder / "saved"
    folder.mkdir()
    name, content = shop.rng.choice(
        [
            ("dataset_info.json", "{"),
            ("dataset_dict.json", "{"),
            ("dataset_dict.json", '{"splits": ["train"]}'),
            ("dataset_info.json", "{}"),
            ("train.jsonl", '{"question": "a"'),
            ("train.txt.zip", "PK"),
            ("load.py", "open(__file__ + '.ran', 'w')"),
        ]
    )
    (folder / name).write_text(content)
    return shop.case("data.train", f"data.train.data_path={folder}", detail=f"{name}: {content}")


@way
def _data_keys_that_fit_nothing(shop: Workshop) -> Case:
    names, override = shop.rng.choice(
        [
            ("data.train.input_key=", "data.train.input_key=problem"),
            ("data.train.input_key=", "data.train.input_key=question.0"),
            ("data.train.output_key=", "data.train.output_key=gold"),
            ("data.train.dataset_name", "data.train.dataset_name=DeepScalr"),
            ("data.train.dataset_name", "data.train.dataset_name=no-one/nothing-at-all"),
            ("data.train.dataset_name", "data.train.dataset_name=AIME2024"),
            ("data.train.data_path", "data.train.data_path=no-one/nothing-at-all"),
            ("data.train", "data.train=[]"),
            ("data.train", "data.train=[{data_path: nowhere.jsonl}, {data_path: nowhere.jsonl}]"),
            ("data.max_input_seq_length", "data.max_input_seq_length=1"),
        ]
    )
    return shop.case(names, override)


# ---- prompts and templates -------------------------------------------------------------------------------------------

PLACEHOLDERS = ["{x}", "{0}", "{0.__class__}", "{.__class__}", "{!r}", "{:>99999999}", "{problem}", "{[0]}", "{", "}"]


@way
def _bad_prompt_file(shop: Workshop) -> Case:
    wrong = shop.rng.choice(PLACEHOLDERS)
    text = shop.rng.choice([f"{{}} {wrong}", f"{wrong} {{}}", wrong, f"{{}}\n{wrong}\n{{}}", "", "none", "{} {}"])
    if text in ("{",) or text == "":
        text = "no place"
    path = shop.file("prompt.txt", text)
    return shop.case("prompt.txt", f"data.default.prompt_file={path}", detail=text)


@way
def _unreadable_prompt_file(shop: Workshop) -> Case:
    key = shop.rng.choice(["prompt_file", "system_prompt_file"])
    kind = shop.rng.randrange(5)
    path = shop.folder / "prompt.txt"
    if kind == 0:
        path.write_bytes(b"{} \xff\xfe")
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.write_bytes("{}".encode("utf-16"))
    return shop.case("prompt.txt", f"data.default.{key}={path}", detail=str(kind))


@way
def _bad_teacher_template(shop: Workshop) -> Case:
    key = "distillation.context_distillation.teacher_prefix_template"
    wrong = shop.rng.choice(
        [
            "{problem.__class__}",
            "{problem!r}",
            "{problem:>99999999}",
            "{problem[0]}",
            "{trace.__init__.__globals__}",
            "{hint}",
        ]
    )
    texts = [f"Hint: {{problem}} {wrong}", f"{wrong} {{problem}}", f"{{trace}} {wrong}", "{trace}", "no"]
    text = shop.rng.choice(texts)
    return shop.context(key, f"{key}={text}")


@way
def _template_that_fills_the_window(shop: Workshop) -> Case:
    key = "distillation.context_distillation.teacher_prefix_template"
    return shop.context(key, f"{key}={{problem}} " + "and so on " * shop.rng.randrange(60, 4000))


@way
def _bad_chat_template(shop: Workshop) -> Case:
    model = shop.model()
    canary = shop.root / CANARY
    text = shop.rng.choice(
        [
            "{% for message in messages %}",
            "{{ messages + 1 }}",
            "{{ 1 / 0 }}",
            "{{ nothing.at.all }}",
            "{{ messages[7]['content'] }}",
            "{{ raise_exception('no') }}",
            "{% for i in range(1000000000) %}x{% endfor %}",
            "{% include 'other' %}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.__class__.__init__.__globals__ }}",
            f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ 'x' | nofilter }}",
            "{{ messages | sum }}",
            "{{ '%d' % 'a' }}",
            "{% set messages = 3 %}{% for m in messages %}{% endfor %}",
        ]
    )
    where = shop.rng.choice(["chat_template.jinja", "tokenizer_config.json"])
    (model / "chat_template.jinja").unlink(missing_ok=True)
    if where == "chat_template.jinja":
        (model / where).write_text(text)
    else:
        settings = json.loads((model / where).read_text())
        (model / where).write_text(json.dumps({**settings, "chat_template": text}))
    return shop.case("chat template", f"policy.model_name={model}", detail=f"{where}: {text}")


@way
def _bad_chat_template_kwargs(shop: Workshop) -> Case:
    kwargs = shop.rng.choice(
        [
            "{tokenize: true}",
            "{add_generation_prompt: false}",
            "{continue_final_message: true}",
            "{conversation: []}",
            "{chat_template: '{{ 1 / 0 }}'}",
            "{chat_template: 3}",
            "{messages: 3}",
            "{tools: 3}",
            "{self: 3}",
        ]
    )
    key = "policy.tokenizer.chat_template_kwargs"
    return shop.case(key, f"{key}={kwargs}")


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(shop: Workshop, names: str, model: Path, detail: str) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    case = shop.case(names.replace("MODEL", str(model)), f"{owner}.model_name={model}")
    case.detail = f"{owner}: {detail}"
    return case


@way
def _broken_config_json(shop: Workshop) -> Case:
    model = shop.model()
    path = model / "config.json"
    whole = json.loads(path.read_text())
    changed: list[dict[str, Any]] = [
        {"model_type": "unheard-of"},
        {"model_type": "gpt2"},
        {"model_type": None},
        {"model_type": 3},
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"hidden_size": -64},
        {"hidden_size": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": -1},
        {"vocab_size": -5},
        {"vocab_size": "many"},
        {"vocab_size": 0},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"intermediate_size": [1]},
        {"head_dim": "x"},
        {"hidden_act": "nonsense"},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"max_position_embeddings": "long"},
        {"max_position_embeddings": -1},
        {"rms_norm_eps": "small"},
        {"layer_types": ["nonsense"] * 2},
        {"layer_types": 3},
        {"attention_bias": {"a": 1}, "tie_word_embeddings": "x", "vocab_size": 1.5},
        {"num_experts": 8, "model_type": "qwen3_moe"},
    ]
    kind = shop.rng.randrange(6)
    if kind == 0:
        path.write_bytes(shop.cut(path.read_bytes(), least=2)[:-1])
    elif kind == 1:
        path.write_text(shop.rng.choice(["[]", "3", "null", '"text"', "", "{}", "{nonsense}", '{"a": NaN'] * 1))
    else:
        path.write_text(json.dumps({**whole, **(drawn := shop.rng.choice(changed))}))
        return _model(shop, "MODEL", model, repr(drawn))
    return _model(shop, "MODEL", model, path.read_text()[-60:])


@way
def _broken_config_json_too(shop: Workshop) -> Case:
    return _broken_config_json(shop)


@way
def _broken_safetensors(shop: Workshop) -> Case:
    model = shop.model()
    path = model / "model.safetensors"
    whole = path.read_bytes()
    kind = shop.rng.randrange(8)
    if kind == 0:
        path.write_bytes(shop.cut(whole))
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    elif kind == 3:
        path.write_bytes(whole[:8] + shop.noise(40) + whole[48:])
    elif kind == 4:
        path.unlink()
    elif kind == 5:
        path.unlink()
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif kind == 6:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(whole[:-1])
    return _model(shop, "MODEL", model, str(kind))


@way
def _broken_index(shop: Workshop) -> Case:
    model = shop.model()
    text = shop.rng.choice(
        [
            "{",
            "[]",
            "{}",
            '{"weight_map": 3}',
            '{"weight_map": {}}',
            '{"weight_map": {"model.norm.weight": 3}}',
            '{"weight_map": {"model.norm.weight": "gone.safetensors", "lm_head.weight": "model.safetensors"}}',
            json.dumps({"weight_map": {"model.norm.weight": os.path.join("..", "model.safetensors")}}),
            '{"weight_map": {"model.norm.weight": "pytorch_model.bin"}}',
            '{"weight_map": {"model.norm.weight": "."}}',
        ]
    )
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (model / "model.safetensors.index.json").write_text(text)
    return _model(shop, "MODEL", model, text)


@way
def _weights_that_do_not_fit(shop: Workshop) -> Case:
    import torch
    from safetensors.torch import load_file, save_file

    model = shop.model()
    weights = load_file(model / "model.safetensors")
    name = shop.rng.choice(sorted(weights))
    kind = shop.rng.randrange(3)
    if kind == 0:
        del weights[name]
    elif kind == 1:
        weights[name] = weights[name][: len(weights[name]) // 2].clone()
    else:
        weights[name] = torch.zeros(weights[name].shape, dtype=torch.int32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return _model(shop, name, model, f"{kind}: {name}")


@way
def _broken_tokenizer(shop: Workshop) -> Case:
    model = shop.model()
    kind = shop.rng.randrange(6)
    if kind == 0:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model / file).unlink(missing_ok=True)
    elif kind == 1:
        (model / "tokenizer.json").unlink()
    elif kind == 2:
        (model / "tokenizer.json").write_bytes(shop.cut((model / "tokenizer.json").read_bytes()))
    elif kind == 3:
        (model / "tokenizer_config.json").write_text(shop.rng.choice(["{", "[]", "3", "null"]))
    elif kind == 4:
        (model / "tokenizer.json").write_text(shop.rng.choice(["{}", "[]", '{"model": {}}', "null"]))
    else:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "NoSuchTokenizer"}))
        (model / "tokenizer.json").unlink()
    return _model(shop, "tokenizer", model, str(kind))


@way
def _broken_generation_config(shop: Workshop) -> Case:
    model = shop.model()
    text = shop.rng.choice(
        ["{", "[]", "3", '{"eos_token_id": "<|im_end|>"}', '{"eos_token_id": -7}', '{"eos_token_id": [1.5]}',
         '{"eos_token_id": [[2]]}', '{"eos_token_id": {"a": 1}}']
    )  # fmt: skip
    (model / "generation_config.json").write_text(text)
    return _model(shop, "generation_config.json", model, text)


@way
def _code_in_a_model_folder(shop: Workshop) -> Case:
    """A class of the folder's own, which transformers would run if it were trusted."""
    model = shop.model()
    code = f"open({str(shop.root / CANARY)!r}, 'w').close()\nclass Own: pass\n"
    (model / "own.py").write_text(code)
    if shop.rng.random() < 0.5:
        whole = json.loads((model / "config.json").read_text())
        auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        (model / "config.json").write_text(json.dumps({**whole, "model_type": "own", "auto_map": auto}))
        return _model(shop, "MODEL", model, "config")
    whole = json.loads((model / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["own.Own", None]}
    (model / "tokenizer.json").unlink()
    text = json.dumps({**whole, "tokenizer_class": "Own", "auto_map": auto_map})
    (model / "tokenizer_config.json").write_text(text)
    return _model(shop, "tokenizer", model, "tokenizer")


@way
def _model_name_that_is_none(shop: Workshop) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    name = shop.rng.choice(
        ["''", "nowhere", "./nowhere", "no-one/nothing", "a/b/c", "/dev/null", "~", "..", "https://x/y", "a//b", "a/",
         "no one/nothing", "no-one/nothing@main", "x" * 300 + "/y", f"{shop.root}/recipe.yaml"]
    )  # fmt: skip
    key = f"{owner}.model_name="
    return shop.case(key, f"{key}{name}", f"{owner}.tokenizer.name={shop.root}/student")


@way
def _tokenizer_name_that_is_none(shop: Workshop) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    names = ["''", "nowhere", "no-one/nothing", "/dev/null", f"{shop.root}/logs", f"{shop.root}/stranger"]
    name = shop.rng.choice(names)
    return shop.case("tokenizer", f"{owner}.tokenizer.name={name}")


# ---- environments ----------------------------------------------------------------------------------------------------

TORCHRUN: dict[str, str | None] = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29555",
}
SRUN: dict[str, str | None] = {
    **dict.fromkeys(TORCHRUN),
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
}


BROKEN: list[tuple[str, str | None]] = [
    *(("RANK", value) for value in ("abc", "", "-1", "7", "1.5", "0x1")),
    *(("WORLD_SIZE", value) for value in ("abc", "", "0", "-2", None)),
    *(("LOCAL_RANK", value) for value in ("abc", "", "-1", "7")),
    *(("LOCAL_WORLD_SIZE", value) for value in ("abc", "", "0", "-1")),
    *(("MASTER_ADDR", value) for value in ("", "no such host", "host.invalid", None)),
    *(("MASTER_PORT", value) for value in ("abc", "", "-1", "99999999", "0.5", None)),
]
"""Values that no place in a world of one or two ranks has; None: it isn't set."""


@way
def _environment_of_torchrun(shop: Workshop) -> Case:
    name, value = shop.rng.choice([*BROKEN, ("RANK", "1"), ("LOCAL_RANK", "1")])
    return shop.case(name, env={**TORCHRUN, name: value}, detail=f"{name}={value}")


@way
def _environment_of_srun(shop: Workshop) -> Case:
    name, value = shop.rng.choice(
        [
            *(("SLURM_NTASKS", value) for value in ("abc", "", "-2", "2.5")),
            *(("SLURM_PROCID", value) for value in ("abc", "", "-1", "2")),
            *(("SLURM_LOCALID", value) for value in ("abc", "", "-1", "2", None)),
            *(("SLURM_NODEID", value) for value in ("abc", "-4")),
            *(("SLURM_JOB_ID", value) for value in ("abc",)),
            *(("SLURM_STEP_ID", value) for value in ("abc",)),
            *(("SLURM_STEP_TASKS_PER_NODE", value) for value in ("abc", "(x2)", "2(x", "2(xa)", None)),
            *(("SLURM_STEP_NODELIST", value) for value in ("[", ",", "host.invalid", None)),
        ]
    )
    others = {"SLURM_STEP_TASKS_PER_NODE": "TASKS_PER_NODE", "SLURM_STEP_NODELIST": "NODELIST|MASTER_ADDR"}
    return shop.case(others.get(name, name), env={**SRUN, name: value}, detail=f"{name}={value}")


@way
def _environment_of_a_slurm_step(shop: Workshop) -> Case:
    value = shop.rng.choice(["abc", "", "2", "-1"])
    names = "cluster.num_nodes" if value == "2" else "SLURM_STEP_NUM_NODES"
    return shop.case(names, env={"SLURM_STEP_NUM_NODES": value}, detail=value)


assert set(hints(Config)) <= set(key_paths())
