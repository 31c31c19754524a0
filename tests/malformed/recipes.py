"""Malformed recipes and command lines."""

from __future__ import annotations

import os
from typing import Any, Literal, get_args, get_origin

import yaml

from distill.config.parse import hints, key_paths, members, type_of
from distill.config.rules import ABOVE_ZERO, AT_LEAST, AT_MOST_1
from distill.config.schema import Config
from tests.malformed.case import CANARY, Case, Workshop, shown, way

LEAVES = [
    key
    for key in key_paths()
    if not any(key.startswith(path) for path in ("policy.scheduler", "data.validation"))
    and not any(other.startswith(key + ".") for other in key_paths())
]
SECTIONS = [key for key in key_paths() if any(other.startswith(key + ".") for other in key_paths())]


def wrong_values(hint: Any) -> list[Any]:
    """Return values that fit no alternative of a type."""
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
def _section_has_a_value(shop: Workshop) -> Case:
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
def _key_is_not_text(shop: Workshop) -> Case:
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
    """A number above what the data, the models or the machine provide."""
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
    ("data.train.env_name=code", ["data.train.env_name=code"]),
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
    document = f"{text}\n{yaml.safe_dump(shop.tree())}" if before else f"{yaml.safe_dump(shop.tree())}\n{text}\n"
    return shop.recipe(document, "recipe.yaml", detail=text)


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
def _recipe_is_not_utf8(shop: Workshop) -> Case:
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
def _recipe_without_keys(shop: Workshop) -> Case:
    text = shop.rng.choice(["[1, 2]", "3", "just words", "null", "true", "'policy: 1'"])
    names = {"null": "data.train", "just words": "just words", "'policy: 1'": "policy=1"}
    return shop.recipe(text, names.get(text, "recipe.yaml"), detail=text)


@way
def _recipe_that_expands(shop: Workshop) -> Case:
    """A few hundred bytes that expand to millions of values or a thousand levels."""
    doubling = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    doubling += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    deep = "policy: " + "[" * 3000 + "]" * 3000
    ring = "policy: &p\n  again: *p"
    text = shop.rng.choice(["\n".join(doubling), deep, ring])
    return shop.recipe(text, "recipe.yaml", detail=text[:40])


@way
def _recipe_is_not_a_file(shop: Workshop) -> Case:
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


assert set(hints(Config)) <= set(key_paths())
