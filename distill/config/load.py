"""From a command line to a Config: a recipe file, its parents beneath it, the overrides above it.

OmegaConf reads the files and resolves the interpolations; build.py gives every value its type. tyro only prints the
help: its own errors fill a box, and here an error is one sentence.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.nemo_compat import drop_old_keys
from distill.config.parse import build, hints, key_paths, members, refuse, type_of
from distill.config.paths import normalize, normalize_paths
from distill.config.precision import decide_precision
from distill.config.rules import check
from distill.config.schema import Config
from distill.errors import reason, show

BASE_RECIPE = Path("recipes/distillation_math.yaml")
"""What runs without --config, in the current folder or beside the package."""

_MOST_VALUES = 100_000
"""Of a recipe, every anchor's values counted wherever they are meant."""

RIVALS = (("zero_outside_topk", "outside_topk"), ("dataset_name", "data_path"))
"""Keys that say the same thing: the one set in a later layer sets the other back to null."""

FOLLOWING: dict[str, str] = {
    "policy.tokenizer.name": "${..model_name}",
    "policy.dynamic_batching.train_mb_tokens": "${mul:${..max_total_sequence_length},${..train_micro_batch_size}}",
    "policy.dynamic_batching.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "policy.sequence_packing.train_mb_tokens": "${mul:${..max_total_sequence_length},${..train_micro_batch_size}}",
    "policy.sequence_packing.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "policy.generation.max_new_tokens": "${..max_total_sequence_length}",
    "policy.generation.val_temperature": "${.temperature}",
    "policy.generation.val_top_p": "${.top_p}",
    "policy.generation.val_top_k": "${.top_k}",
    "policy.generation.vllm_cfg.precision": "${...precision}",
    "policy.generation.vllm_cfg.max_model_len": "${...max_total_sequence_length}",
    "teacher.tokenizer.name": "${..model_name}",
    "teacher.max_total_sequence_length": "${policy.max_total_sequence_length}",
    "teacher.precision": "${policy.precision}",
    "teacher.logprob_batch_size": "${policy.logprob_batch_size}",
    "teacher.dynamic_batching.train_mb_tokens": "${.logprob_mb_tokens}",
    "teacher.dynamic_batching.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "teacher.sequence_packing.train_mb_tokens": "${.logprob_mb_tokens}",
    "teacher.sequence_packing.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "data.max_input_seq_length": "${policy.max_total_sequence_length}",
}
"""Keys whose value follows another's where no recipe sets them."""


def _mul(a: Any, b: Any) -> Any:  # OmegaConf warns of an int where float is annotated
    """The interpolation ${mul:a,b}. Python alone would repeat a text b times."""
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        raise TypeError(f"mul takes two numbers, not {a!r} and {b!r}")
    return a * b


OmegaConf.register_resolver("mul", _mul, replace=True)


@dataclass(frozen=True)
class Arguments:
    """A command line, understood."""

    config: Config
    """The recipe with its overrides."""
    dry_run: bool
    """Whether to print the resolved configuration and stop."""

    @property
    def resolved(self) -> str:
        """The configuration as YAML, every key with its value; as a recipe it gives the same Config again."""
        return to_yaml(self.config)


def load_config(argv: Sequence[str] = ()) -> Config:
    """The configuration that ``argv`` (a command line without the program's name) asks for; errors are UserErrors."""
    return parse_args(argv).config


def parse_args(argv: Sequence[str]) -> Arguments:
    """Read ``[--config FILE] [--dry-run] [--help] [a.b=value | ++a.b=value | --a.b value | --a.b=value] ...``.

    Raises UserError for what the user got wrong; --help prints and raises SystemExit(0).
    """
    line = _split(argv)
    path = find_recipe(line.config_path)
    if line.help:
        _help(path, line.overrides)
    return Arguments(_load(path, line.overrides), line.dry_run)


def _load(path: Path, overrides: list[tuple[str, str]]) -> Config:
    tree = merge(_defaults(), read_recipe(path))
    for key, text in overrides:
        tree = merge(tree, _nested(key, _read_value(key, text)))
    return build_config(tree)


def _help(path: Path, overrides: list[tuple[str, str]]) -> NoReturn:
    """Print the help with the recipe's values; a recipe that can't be read is no reason to withhold it."""
    from distill.config.help import print_help  # tyro is slow to import, and only this needs it

    try:
        config = _load(path, overrides)
    except ValueError:
        config = Config()
    print_help(config, path)
    raise SystemExit(0)


def build_config(tree: dict[str, Any]) -> Config:
    """A merged tree, interpolations and old keys still in it, as a checked Config."""
    for name, section in hints(Config).items():
        if not isinstance(tree[name], dict):
            build(section, tree[name], name)  # refuses; an interpolation into it would fail with a worse sentence
    plain = _resolve(tree)
    decide_precision(plain)
    data = plain["data"]
    for name in ("train", "validation"):
        entries = data[name] if isinstance(data[name], list) else [] if data[name] is None else [data[name]]
        data[name] = [_fill_dataset(data.get("default") or {}, entry) for entry in entries]
    data["default"] = data.get("default") or {}
    normalize_paths(plain)
    config: Config = build(Config, plain, "")
    check(config)
    return config


def _fill_dataset(default: Any, entry: Any) -> Any:
    """``entry`` with what it leaves out taken from ``default``; the reference's name for own files goes."""
    filled = merge(default, entry)
    if isinstance(filled, dict) and filled.get("dataset_name") == "ResponseDataset":
        filled["dataset_name"] = None
    return filled


def _resolve(tree: dict[str, Any]) -> dict[str, Any]:
    try:
        config = OmegaConf.create(tree)
        drop_old_keys(config)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        _refuse_cause(tree)
        refuse(f"{error.full_key or 'the recipe'} can't be resolved ({reason(error)}): correct the ${{...}}")
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    return plain


def _refuse_cause(tree: dict[str, Any]) -> None:
    """Refuse a value of the wrong type that stands there by itself: what is made of it may have failed for that."""
    for key in key_paths():
        if key in ("data.train", "data.validation"):  # one dataset, a list or null: build_config makes a list of it
            continue
        place: Any = tree
        *sections, last = key.split(".")
        for name in sections:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and not isinstance(value := place.get(last, {}), dict) and "${" not in str(value):
            build(type_of(key), value, key)


def _defaults() -> dict[str, Any]:
    """The lowest layer: the schema's defaults, and which keys follow which."""
    tree: dict[str, Any] = _plain(asdict(Config()))
    # A complete section would leave nothing to fill: data.default holds only what a recipe sets.
    tree["data"] |= {"default": {}, "train": None, "validation": None}
    for key, interpolation in FOLLOWING.items():
        tree = merge(tree, _nested(key, interpolation))
    return tree


def merge(base: Any, layer: Any, key: str = "") -> Any:
    """``layer`` over ``base``: sections key by key, all else replaced; {"0": ...} changes one entry of a list."""
    if isinstance(base, list) and isinstance(layer, dict) and layer and all(str(name).isdigit() for name in layer):
        entries = {int(name): value for name, value in layer.items()}
        if max(entries) >= len(base):
            refuse(f"{key}.{max(entries)} doesn't exist: {key} has {len(base)} entries, counted from 0, so name one")
        return [merge(item, entries[i], f"{key}.{i}") if i in entries else item for i, item in enumerate(base)]
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return layer
    merged = dict(base)
    for pair in RIVALS:
        for one, other in (pair, pair[::-1]):
            if layer.get(one) is not None and other not in layer and other in base:
                merged[other] = None
    for name, value in layer.items():
        merged[name] = merge(base.get(name), value, f"{key}.{name}" if key else str(name))
    return merged


# ---- files -----------------------------------------------------------------------------------------------------------


def find_recipe(path: Path | None) -> Path:
    """The recipe's file; without one the base recipe, in the current folder or beside the package."""
    if path is None:
        beside = Path(__file__).resolve().parents[2] / BASE_RECIPE
        return BASE_RECIPE if BASE_RECIPE.is_file() or not beside.is_file() else beside
    return Path(normalize(str(path), "--config"))


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe merged over the parents that its ``defaults`` name, relative to its own folder."""
    if os.path.isfile(path) and path.resolve() in children:
        refuse(f"defaults={path} in {children[-1]} makes a recipe its own ancestor: name another parent")
    layer = _read_yaml(path, children)
    parents = layer.pop("defaults", [])
    if not isinstance(parents, (str, list)):
        refuse(f"defaults={show(parents)} in {path} is no recipe: write a file name or a list of them")
    tree: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        named = Path(normalize(str(parent), "defaults"))
        tree = merge(tree, read_recipe(path.parent / named, (*children, path.resolve())))
    return merge(tree, layer)  # type: ignore[no-any-return]


def _read_yaml(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    what = f"defaults={path} in {children[-1]}" if children else f"--config={path}"
    if not os.path.isfile(path):
        refuse(f"{what} {'is a folder' if os.path.isdir(path) else 'does not exist'}: {_nearby(path)}")
    try:
        _count_values(path.read_text(encoding="utf-8"))
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        refuse(f"{what} isn't a readable recipe{line} ({error.problem}): correct it there")
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
        refuse(f"{what} isn't a readable recipe ({reason(error)}): correct it there")
    if not isinstance(layer, dict):
        refuse(f"{what} holds no keys: write section: and its keys below it")
    return layer  # type: ignore[return-value]


def _count_values(text: str) -> None:
    """Raise YAMLError where anchors make a text stand for more values than any recipe has, or hold themselves."""
    if "&" not in text or "*" not in text:
        return
    nodes, count = [yaml.compose(text, Loader=yaml.SafeLoader)], 0
    while nodes and count <= _MOST_VALUES:
        node, count = nodes.pop(), count + 1
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
    if nodes:
        raise yaml.YAMLError(f"its anchors stand for more than {_MOST_VALUES} values")


def _nearby(path: Path) -> str:
    folder = path if os.path.isdir(path) else path.parent if os.path.isdir(path.parent) else BASE_RECIPE.parent
    names = sorted(file.name for file in folder.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, names, 3, 0.5) or names[:10]
    return f"in {folder} there are {', '.join(near)}" if near else f"there are no recipes in {folder}"


# ---- command line ----------------------------------------------------------------------------------------------------


@dataclass
class _Line:
    config_path: Path | None
    dry_run: bool
    help: bool
    overrides: list[tuple[str, str]]


def _split(argv: Sequence[str]) -> _Line:
    """Sort the words of the command line."""
    line, words = _Line(None, False, False, []), list(argv)
    if bad := [word for word in words if word != word.encode(errors="replace").decode()]:
        refuse(f"{bad[0]!a} on the command line is no UTF-8 text: write it so")
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            line.help = True
        elif word in ("--dry-run", "--dry_run"):
            line.dry_run = True
        else:
            key, text = _key_and_text(word, words)
            if key == "config":
                line.config_path = Path(text)
            else:
                line.overrides.append((key, text))
    return line


def _key_and_text(word: str, rest: list[str]) -> tuple[str, str]:
    """One setting in any of its spellings; takes the value from ``rest`` where it stands apart."""
    key, equals, text = word.partition("=")
    is_flag = key.startswith("--")
    key = key[2:].replace("-", "_") if is_flag else key.lstrip("+")
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        refuse(f"{word} is no setting: write key.path=value or --key.path value")
    if equals:
        return key, text
    if not is_flag or not rest or rest[0].startswith("--"):
        refuse(f"{word} has no value: write {key}=value")
    return key, rest.pop(0)


def _read_value(key: str, text: str) -> Any:
    """A value from the command line: as YAML, but a key that takes a text gets it as it stands, colons and all."""
    options = members(type_of(key))
    is_text = any(option is str or get_origin(option) is Literal for option in options) and bool not in options
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and text != "null" and not quoted:
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError):
        refuse(f"{key}={show(text)} can't be read: quote the value as YAML wants it")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


# ---- and back --------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """``config`` as a recipe that needs no parent and gives the same Config again."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config), escape=True)))


def _plain(value: Any, escape: bool = False) -> Any:
    """Lists for tuples; with ``escape``, ${ in a text is no interpolation."""
    if isinstance(value, Mapping):
        return {name: _plain(v, escape) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, escape) for v in value]
    return value.replace("${", "\\${") if escape and isinstance(value, str) else value
