"""Load a Config from default values, parent recipes, the recipe (YAML file) and command-line overrides.

Later sources override earlier ones. OmegaConf reads files and resolves interpolations. parse.py converts values to the
types in schema.py. tyro only prints --help. It does not parse the command line, because tyro's error messages are
longer than one sentence.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.nemo_compat import drop_ignored_keys, drop_inert_keys, inert_defaults
from distill.config.parse import hints, key_paths, members, parse_value, type_of
from distill.config.paths import normalize, normalize_paths
from distill.config.precision import resolve_auto_precision
from distill.config.rules import check
from distill.config.schema import Config
from distill.errors import UserError, any_of, reason, show

BASE_RECIPE = Path("recipes/distillation_math.yaml")
"""Recipe to use if the command line has no --config.

The path is relative to the current folder, or to the repository if the current folder does not contain the file.
"""

_HELP_FLAGS, _DRY_RUN_FLAGS = ("--help", "-h"), ("--dry-run", "--dry_run")

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
    "policy.generation.val_temperature": "${.temperature}",
    "policy.generation.val_top_p": "${.top_p}",
    "policy.generation.val_top_k": "${.top_k}",
    "policy.generation.vllm_cfg.precision": "${...precision}",
    "policy.generation.vllm_cfg.max_model_len": "${...max_total_sequence_length}",
    "teacher.tokenizer.name": "${..model_name}",
    "teacher.max_total_sequence_length": "${policy.max_total_sequence_length}",
    "teacher.precision": "${policy.precision}",
    "teacher.logprob_batch_size": "${policy.logprob_batch_size}",
    "teacher.dynamic_batching.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
    "teacher.sequence_packing.logprob_mb_tokens": "${mul:${..max_total_sequence_length},${..logprob_batch_size}}",
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

    @property
    def resolved(self) -> str:
        """Return the complete configuration as YAML text. Loading it as a recipe gives an equal Config."""
        return to_yaml(self.config)


def load_config(argv: Sequence[str] = ()) -> Config:
    """Load the configuration for the command line ``argv``; raise UserError if a setting is invalid."""
    return parse_args(argv).config


def parse_args(argv: Sequence[str]) -> Arguments:
    """Parse the command line ``argv`` and load the configuration.

    Syntax: ``[--config FILE] [--dry-run] [--help] [a.b=value | ++a.b=value | --a.b value | --a.b=value] ...``. Raises
    UserError for an invalid command line or recipe. With ``--help``, prints the help and raises SystemExit(0).
    """
    line = _parse_command_line(argv)
    path = find_recipe(line.config_path)
    if line.help:
        _help(path, line.overrides)
    return Arguments(_load(path, line.overrides))


def print_flag(argv: Sequence[str]) -> str | None:
    """Return "--help" or "--dry-run" if ``argv`` contains this flag, else None.

    With one of these flags, the program prints its output and exits without a run. An invalid command line raises no
    error here, but in ``parse_args``.
    """
    try:
        line = _parse_command_line(argv)
    except UserError:
        line = _parse_command_line([word for word in argv if word in _HELP_FLAGS + _DRY_RUN_FLAGS])
    return "--help" if line.help else "--dry-run" if line.dry_run else None


def _load(path: Path, overrides: list[tuple[str, str]]) -> Config:
    tree = merge(_defaults(), read_recipe(path))
    for key, text in overrides:
        tree = merge(tree, _nested(key, _read_value(key, text)))
    return build_config(tree)


def _help(path: Path, overrides: list[tuple[str, str]]) -> NoReturn:
    """Print the help and exit. It shows the recipe's values, or the default values if the recipe is invalid."""
    from distill.config.help import print_help  # imported here, as tyro is slow to import

    try:
        config = _load(path, overrides)
    except ValueError:
        config = Config()
    print_help(config, path)
    raise SystemExit(0)


def build_config(tree: dict[str, Any]) -> Config:
    """Build a Config from ``tree``: defaults, recipes and overrides, merged into one dict.

    Resolves interpolations, drops ignored keys, converts types and checks the rules.
    """
    for name, section in hints(Config).items():
        if not isinstance(tree[name], dict):
            parse_value(section, tree[name], name)  # raises a clearer error than _resolve would
    plain = _resolve(tree)
    resolve_auto_precision(plain)
    data = plain["data"]
    for name in ("train", "validation"):
        entries = data[name] if isinstance(data[name], list) else [] if data[name] is None else [data[name]]
        data[name] = [_fill_dataset(data.get("default") or {}, entry) for entry in entries]
    data["default"] = data.get("default") or {}
    normalize_paths(plain)
    config: Config = parse_value(Config, plain, "")
    check(config)
    return config


def _fill_dataset(default: Any, entry: Any) -> Any:
    """Return ``entry``, one dataset's section, with its missing keys taken from ``default`` (data.default).

    ``dataset_name: ResponseDataset`` becomes null. NeMo-RL requires this value for local files.
    """
    filled = merge(default, entry)
    if isinstance(filled, dict) and filled.get("dataset_name") == "ResponseDataset":
        filled["dataset_name"] = None
    return filled


def _resolve(tree: dict[str, Any]) -> dict[str, Any]:
    try:
        config = OmegaConf.create(tree)
        drop_ignored_keys(config)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        _refuse_wrong_types(tree)
        key = error.full_key or ""
        cause = str(error).splitlines()[0]  # the other lines repeat the key
        problem = f"{key or 'the recipe'} has an interpolation that cannot be resolved ({cause})"
        raise UserError(problem, "correct the expression in ${...}", key=key) from None
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    drop_inert_keys(plain)
    return plain


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


def find_recipe(path: Path | None) -> Path:
    """Return the normalized ``path`` of a recipe; for None, the path of the base recipe.

    The base recipe is read from the current folder, or else from the repository.
    """
    if path is None:
        repository = Path(__file__).resolve().parents[2] / BASE_RECIPE
        return BASE_RECIPE if BASE_RECIPE.is_file() or not repository.is_file() else repository
    return Path(normalize(str(path), "--config"))


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe and merge it over its parent recipes.

    The recipe's key ``defaults`` lists the parents, relative to the recipe's folder. ``children``: the
    recipes that led to ``path``: the recipe of the run, its parent, and so on. They are used to detect cycles.
    """
    if os.path.isfile(path) and path.resolve() in children:
        problem = f"defaults={path} in {children[-1]} makes the recipe a parent of itself"
        raise UserError(problem, "remove defaults, or set it to another recipe", key="defaults", value=str(path))
    layer = _read_yaml(path, children)
    parents = layer.pop("defaults", [])
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
        named = Path(normalize(str(parent), "defaults"))
        tree = merge(tree, read_recipe(path.parent / named, (*children, path.resolve())))
    return merge(tree, layer)  # type: ignore[no-any-return]


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
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
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

    The fix lists recipes with similar names in the folder of ``path``, or else the first ten recipes in this folder.
    """
    folder = path if os.path.isdir(path) else path.parent if os.path.isdir(path.parent) else BASE_RECIPE.parent
    names = sorted(file.name for file in folder.glob("*.yaml"))
    similar = difflib.get_close_matches(path.name, names, 3, 0.5) or names[:10]
    return (
        f"use {any_of(similar)} in {folder}"
        if similar
        else f"choose another folder, because {folder} contains no recipes"
    )


# ---- command line ----------------------------------------------------------------------------------------------------


@dataclass
class _CommandLine:
    config_path: Path | None = None
    help: bool = False
    dry_run: bool = False
    overrides: list[tuple[str, str]] = field(default_factory=list)


def _parse_command_line(argv: Sequence[str]) -> _CommandLine:
    line, words = _CommandLine(), list(argv)
    if bad := [word for word in words if word != word.encode(errors="replace").decode()]:
        problem = f"{bad[0]!a} on the command line is not UTF-8 text"
        raise UserError(problem, "encode it as UTF-8", key=bad[0].partition("=")[0], value=bad[0])
    while words:
        word = words.pop(0)
        if word in _HELP_FLAGS:
            line.help = True
        elif word in _DRY_RUN_FLAGS:
            line.dry_run = True
        else:
            key, text = _parse_override(word, words)
            if key == "config":
                line.config_path = Path(text)
            else:
                line.overrides.append((key, text))
    return line


def _parse_override(word: str, rest: list[str]) -> tuple[str, str]:
    """Split the override ``word`` into key and value text.

    ``rest``: the words after ``word`` on the command line. For ``--key value``, the value is removed from ``rest``.
    """
    key, equals, text = word.partition("=")
    is_flag = key.startswith("--")
    key = key[2:].replace("-", "_") if is_flag else key.lstrip("+")
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        raise UserError(f"{word} is not an override", "write key.path=value or --key.path value", value=word)
    if equals:
        return key, text
    if not is_flag or not rest or rest[0].startswith("--"):
        raise UserError(f"{word} has no value", f"write {key}=value", key=key)
    return key, rest.pop(0)


def _read_value(key: str, text: str) -> Any:
    """Return the value of an override: ``text`` parsed as YAML.

    For a key with a text type, ``text`` is returned unchanged, except for null and text in quotes.
    """
    options = members(type_of(key))
    is_text = any(option is str or get_origin(option) is Literal for option in options) and bool not in options
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and text != "null" and not quoted:
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError):
        problem = f"{key}={show(text)} is not valid YAML"
        raise UserError(problem, "correct the syntax, or put the value in quotes", key=key, value=text) from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


# ---- writing ---------------------------------------------------------------------------------------------------------


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
