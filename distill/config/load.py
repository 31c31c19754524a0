"""Load a Config from default values, parent recipes, the recipe (YAML file) and command-line overrides.

Later sources override earlier ones. OmegaConf reads files and resolves interpolations. parse.py converts values to the
types in schema.py, command_line.py splits the command line, and help.py prints --help.
"""

from __future__ import annotations

import difflib
import logging
import os.path
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.command_line import CommandLine, parse_command_line
from distill.config.nemo_compat import drop_ignored_keys, drop_inert_keys, inert_defaults
from distill.config.parse import hints, key_paths, members, parse_value, type_of
from distill.config.paths import local_or_shipped, normalize, normalize_paths, shipped
from distill.config.precision import resolve_auto_precision
from distill.config.rules import check
from distill.config.schema import BUILT_IN, Config
from distill.errors import UserError, any_of, reason, show

log = logging.getLogger(__name__)

RECIPES = Path("recipes")
"""Folder of the recipes, in the working directory or among the shipped files."""

_MAX_VALUES = 100_000
"""Maximum number of values in a recipe after its YAML aliases are expanded.

A short file with nested aliases can expand to an exponential number of values.
"""

MUTUALLY_EXCLUSIVE_KEYS = (("zero_outside_topk", "outside_topk"), ("dataset_name", "data_path"))
"""Pairs of key names for the same setting.

If a recipe or an override sets only one key of a pair, the other key becomes null, even if a parent recipe sets it.
"""

DERIVED_DEFAULTS: dict[str, str] = {
    "policy.tokenizer.name": "${..model_name}",
    "policy.dynamic_batching.train_mb_tokens": "${mul:${..max_total_sequence_length},${..train_micro_batch_size}}",
    "policy.dynamic_batching.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "policy.sequence_packing.train_mb_tokens": "${mul:${..max_total_sequence_length},${..train_micro_batch_size}}",
    "policy.sequence_packing.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "policy.generation.max_new_tokens": "${..max_total_sequence_length}",
    "policy.generation.val_max_new_tokens": "${.max_new_tokens}",
    "policy.generation.val_temperature": "${.temperature}",
    "policy.generation.val_top_p": "${.top_p}",
    "policy.generation.val_top_k": "${.top_k}",
    "policy.generation.vllm_cfg.precision": "${...precision}",
    "policy.generation.vllm_cfg.max_model_len": "${...max_total_sequence_length}",
    "teacher.tokenizer.name": "${..model_name}",
    "teacher.max_total_sequence_length": "${policy.max_total_sequence_length}",
    "teacher.precision": "${policy.precision}",
    "teacher.logprob_batch_size": "${policy.logprob_batch_size}",
    "data.max_input_seq_length": "${policy.max_total_sequence_length}",
}
"""Maps a key to its default, an interpolation of other keys.

The default is used if no recipe or override sets the key.
"""


def _mul(a: Any, b: Any) -> Any:  # Any: OmegaConf warns if an int is passed for float
    """Multiply two numbers, for the interpolation ${mul:a,b}."""
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        raise TypeError(f"mul takes two numbers, not {a!r} and {b!r}")
    return a * b


OmegaConf.register_resolver("mul", _mul, replace=True)


@dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    config: Config
    """Configuration from the recipe and all command-line overrides."""
    recipe: Path
    """Path of the recipe (``--config``)."""
    elsewhere: bool
    """Whether ``--dry-run`` plans a run on another machine (``--elsewhere``)."""

    @property
    def resolved(self) -> str:
        """Return the complete configuration as YAML text. Loading it as a recipe gives an equal Config."""
        return to_yaml(self.config)


def load_config(argv: Sequence[str]) -> Config:
    """Load the configuration for the command line ``argv``; raise UserError if a setting is invalid."""
    return parse_args(argv).config


def parse_args(argv: Sequence[str]) -> Arguments:
    """Parse the command line ``argv`` and load the configuration.

    Syntax: ``--config FILE [OPTION ...] [a.b=value | ++a.b=value | --a.b value | --a.b=value] ...``; OPTIONS in
    command_line.py lists the options. Raises UserError for an invalid command line or recipe. With ``--help`` or
    ``--help-all``, --config is optional; prints the help and raises SystemExit(0).
    """
    line = parse_command_line(argv)
    if line.flag == "--help":
        _help(line)
    if line.config_path is None:
        raise _no_recipe()
    path = find_recipe(line.config_path)
    return Arguments(_load(path, line.overrides), path, line.elsewhere)


def _no_recipe() -> UserError:
    names = next(filter(None, map(_recipes_in, _recipe_folders())), [])
    return UserError("--config is missing", f"add --config recipes/NAME with one of {', '.join(names)}", key="--config")


def _load(path: Path, overrides: list[tuple[str, str]]) -> Config:
    tree = merge(_defaults(), read_recipe(path))
    for key, text in overrides:
        tree = merge(tree, _nested(key, _read_value(key, text)))
    return build_config(tree)


def _help(line: CommandLine) -> NoReturn:
    """Print the help and exit.

    It shows the recipe's values; without a recipe, or if the recipe is invalid, it shows the default values.
    """
    from distill.config.help import print_help

    config, path = Config(), None
    if line.config_path is not None:
        with suppress(ValueError):
            path = find_recipe(line.config_path)
            config = _load(path, line.overrides)
    print_help(config, path, line.help_words, line.help_all)
    raise SystemExit(0)


def build_config(tree: dict[str, Any]) -> Config:
    """Build a Config from ``tree``: defaults, recipes and overrides, merged into one dict.

    Resolves interpolations, drops ignored keys, converts types and checks the rules.
    """
    config, ignored = _typed(tree)
    if ignored:
        log.warning("these keys of the recipe have no effect: %s", ", ".join(ignored))
    check(config)
    return config


def _typed(tree: dict[str, Any]) -> tuple[Config, list[str]]:
    """Return ``tree`` as a Config, without the checks of rules between keys, and its keys without effect."""
    for name, section in hints(Config).items():
        if not isinstance(tree[name], dict):
            parse_value(section, tree[name], name)  # raises a clearer error than _resolve would
    plain, ignored = _resolve(tree)
    resolve_auto_precision(plain)
    data = plain["data"]
    for name in ("train", "validation"):
        entries = data[name] if isinstance(data[name], list) else [] if data[name] is None else [data[name]]
        data[name] = [_fill_dataset(data.get("default") or {}, entry) for entry in entries]
    data["default"] = data.get("default") or {}
    normalize_paths(plain)
    return parse_value(Config, plain, ""), ignored


def _fill_dataset(default: Any, entry: Any) -> Any:
    """Return ``entry``, one dataset's section, with its missing keys taken from ``default`` (data.default).

    ``dataset_name: ResponseDataset`` becomes null. NeMo-RL requires this value for local files.
    """
    filled = merge(default, entry)
    if isinstance(filled, dict) and filled.get("dataset_name") == "ResponseDataset":
        filled["dataset_name"] = None
    return filled


def _resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return ``tree`` with interpolations resolved and without ignored keys, and the keys without effect."""
    try:
        config = OmegaConf.create(tree)
        ignored = drop_ignored_keys(config)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        _refuse_wrong_types(tree)
        key = error.full_key or ""
        cause = str(error).splitlines()[0]  # the other lines repeat the key
        problem = f"{key or 'the recipe'} has an interpolation that cannot be resolved ({cause})"
        raise UserError(problem, "correct the expression in ${...}", key=key) from None
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    drop_inert_keys(plain)
    return plain, ignored


def _refuse_wrong_types(tree: dict[str, Any]) -> None:
    """Raise UserError if a value in ``tree`` has the wrong type.

    This function is called after an interpolation failed, because a value of the wrong type may be the cause.
    """
    for key in key_paths():
        if key in ("data.train", "data.validation"):  # may be one dataset instead of a list
            continue
        section: Any = tree
        *sections, last = key.split(".")
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        value = section.get(last) if isinstance(section, dict) and last in section else {}
        if not isinstance(value, dict) and "${" not in str(value):
            parse_value(type_of(key), value, key)


def _defaults() -> dict[str, Any]:
    """Return the default values of all keys, including DERIVED_DEFAULTS and ignored keys of NeMo-RL."""
    tree: dict[str, Any] = _plain(asdict(Config()))
    # data.default must contain only keys that a recipe sets, because it fills data.train and data.validation.
    tree["data"] |= {"default": {}, "train": None, "validation": None}
    for key, value in (DERIVED_DEFAULTS | inert_defaults()).items():
        tree = merge(tree, _nested(key, value))
    return tree


def merge(base: Any, layer: Any, key: str = "") -> Any:
    """Return ``base`` overridden by ``layer``: mappings are merged key by key, other values are replaced.

    A mapping with numeric keys ({"0": ...}) changes single entries of a list. ``key``: dotted key of ``base``
    and ``layer``, for messages.
    """
    if isinstance(base, list) and isinstance(layer, dict) and layer and all(str(name).isdigit() for name in layer):
        entries = {int(name): value for name, value in layer.items()}
        if max(entries) >= len(base):
            missing = f"{key}.{max(entries)}"
            if not base:
                problem = f"{missing} does not exist, because {key} is empty"
                raise UserError(problem, f"set {key} to a complete list", key=missing)
            raise UserError(f"{missing} does not exist", f"use an index in 0..{len(base) - 1}", key=missing)
        return [merge(item, entries[i], f"{key}.{i}") if i in entries else item for i, item in enumerate(base)]
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return layer
    merged = dict(base)
    for pair in MUTUALLY_EXCLUSIVE_KEYS:
        for later, earlier in (pair, pair[::-1]):
            if layer.get(later) is not None and earlier not in layer and earlier in base:
                merged[earlier] = None
    for name, value in layer.items():
        merged[name] = merge(base.get(name), value, f"{key}.{name}" if key else str(name))
    return merged


# ---- files -----------------------------------------------------------------------------------------------------------


def find_recipe(path: Path) -> Path:
    """Return the normalized ``path`` of a recipe.

    The suffix .yaml may be omitted, and so may the folder recipes/. The recipe is read from the working directory, or
    else from the shipped recipes.
    """
    named = Path(normalize(str(path), "--config"))
    folders = [named.parent, RECIPES] if len(named.parts) == 1 else [named.parent]
    files = [str(folder / f"{named.name}{suffix}") for folder in folders for suffix in ("", ".yaml")]
    return next((Path(file) for file in map(local_or_shipped, files) if os.path.isfile(file)), named)


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe and merge it over its parent recipes.

    The recipe's key ``defaults`` lists the parents, relative to the recipe's folder; "recipes/NAME.yaml" is also a
    shipped recipe. ``children``: the recipes that led to ``path``: the recipe of the run, its parent, and so on. They
    are used to detect cycles.
    """
    if os.path.isfile(path) and path.resolve() in children:
        problem = f"defaults={path} in {children[-1]} makes the recipe a parent of itself"
        raise UserError(problem, "remove defaults, or set it to another recipe", key="defaults", value=str(path))
    layer = _read_yaml(path, children)
    return merge(_read_parents(path, layer.pop("defaults", []), children), layer)  # type: ignore[no-any-return]


def _read_parents(path: Path, parents: Any, children: tuple[Path, ...]) -> dict[str, Any]:
    """Return the merged parents of the recipe ``path``; ``parents``: the value of its key ``defaults``."""
    if not isinstance(parents, (str, list)):
        problem = f"defaults={show(parents)} in {path} is neither a file name nor a list of file names"
        raise UserError(
            problem,
            "set it to the file name of a parent recipe, or to a list of file names",
            key="defaults",
            value=parents,
        )
    tree: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        named = normalize(str(parent), "defaults")
        file = path.parent / named
        file = file if os.path.lexists(file) else Path(shipped(named) or file)
        tree = merge(tree, read_recipe(file, (*children, path.resolve())))
    return tree


def parent_of(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the name and the complete values of the parent of the recipe ``path``, as plain data.

    The parent is the recipe in the key ``defaults``. If the recipe has no parent, or a value of the parent is invalid,
    the parent is the built-in defaults.
    """
    try:
        parents = _read_yaml(path, ()).get("defaults") or []
        tree, name = _read_parents(path, parents, ()), parents if isinstance(parents, str) else ", ".join(parents)
        if tree:
            return name, _plain(asdict(_typed(merge(_defaults(), tree))[0]))
    except UserError:
        pass
    return BUILT_IN, _plain(asdict(_typed(_defaults())[0]))


def _read_yaml(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    key = "defaults" if children else "--config"
    what = f"defaults={path} in {children[-1]}" if children else f"--config={path}"
    if not os.path.isfile(path):
        fault = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{what} {fault}", _similar_recipes(path), key=key, value=str(path))
    try:
        _check_expanded_size(path.read_text(encoding="utf-8"))
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        where = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = f"{what} is not a readable recipe ({error.problem}{where})"
        raise UserError(problem, "correct the file", key=key, value=str(path)) from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        problem = f"{what} is not a readable recipe ({reason(error)})"
        raise UserError(problem, "correct the file", key=key, value=str(path)) from None
    if not isinstance(layer, dict):
        raise UserError(
            f"{what} is not a mapping of keys to values",
            "write sections (such as policy:) with keys below them",
            key=key,
            value=str(path),
        )
    return layer  # type: ignore[return-value]


def _check_expanded_size(text: str) -> None:
    """Raise YAMLError if the YAML aliases in ``text`` are recursive or expand to over ``_MAX_VALUES`` values."""
    if "&" not in text or "*" not in text:
        return
    nodes, count = [yaml.compose(text, Loader=yaml.SafeLoader)], 0
    while nodes and count <= _MAX_VALUES:
        node, count = nodes.pop(), count + 1
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
    if nodes:
        raise yaml.YAMLError(f"the YAML aliases expand to more than {_MAX_VALUES} values")


def _similar_recipes(path: Path) -> str:
    """Return the fix for the error message if the recipe ``path`` does not exist.

    The fix lists recipes with similar names in the folder of ``path``, or else the first ten recipes in this folder. If
    the folder contains no recipes, those in recipes/ or the shipped recipes are used.
    """
    folder = path if os.path.isdir(path) else path.parent
    folder = next((one for one in (folder, *_recipe_folders()) if _recipes_in(one)), folder)
    names = _recipes_in(folder)
    similar = difflib.get_close_matches(path.name, names, 3, 0.5) or names[:10]
    return (
        f"use {any_of(similar)} in {folder}"
        if similar
        else f"choose another folder, because {folder} contains no recipes"
    )


def _recipe_folders() -> tuple[Path, Path]:
    """Return the folder of recipes in the working directory and the folder of the shipped recipes."""
    return RECIPES, Path(shipped(RECIPES) or RECIPES)


def _recipes_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.yaml")) if os.path.isdir(folder) else []


# ---- values ----------------------------------------------------------------------------------------------------------


def _read_value(key: str, text: str) -> Any:
    """Return the value of an override: ``text`` parsed as YAML.

    For a key with a text type, ``text`` is returned unchanged, except for null and text in quotes.
    """
    options = members(type_of(key))
    is_text = any(option is str or get_origin(option) is Literal for option in options) and not {bool, int} & set(
        options
    )
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and text != "null" and not quoted:
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        problem = f"{key}={show(text)} is not valid YAML"
        raise UserError(problem, "correct the syntax, or put the value in quotes", key=key, value=text) from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def to_yaml(config: Config) -> str:
    """Return ``config`` as the YAML text of a complete recipe. Loading this recipe gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config), escape=True)))


def _plain(value: Any, escape: bool = False) -> Any:
    """Return ``value`` with tuples replaced by lists, at all levels.

    ``escape``: also replace ${ in texts by \\${, so that OmegaConf does not interpolate it.
    """
    if isinstance(value, Mapping):
        return {name: _plain(v, escape) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, escape) for v in value]
    return value.replace("${", "\\${") if escape and isinstance(value, str) else value
