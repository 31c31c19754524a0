"""Download the models, tokenizers and datasets of a recipe, for a run on machines without a network.

    python -m scripts.fetch --config recipes/NAME.yaml key.path=value ...

The arguments are those of distill.train. Run the command on a machine that reaches the Hugging Face hub, such as the
login node of a cluster, with the same HF_HOME as the run. It downloads only the files that the run reads, into the
caches that the run reads, and prints for each model and dataset its size and what was there before. Exit code 0: the
run finds everything, 1: something is missing, 2: the recipe is invalid.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import Config, DatasetConfig, parse_args, print_flag
from distill.data.sources import HubDataset, cached_dataset, dataset_cache, hub_dataset, keyed, load_subsets
from distill.errors import UserError
from distill.hub import cause_and_fix, is_hub_name, model_cache, offline_variable
from distill.inputs import validates
from distill.model.hf_files import DUPLICATE_PATTERNS, MODEL_PATTERNS, TOKENIZER_PATTERNS, is_complete


class Hub:
    """The Hugging Face hub and its caches on this machine."""

    def files(self, name: str, patterns: Sequence[str]) -> list[tuple[int, bool]]:
        """Return size in bytes and whether it must be downloaded, for each file of a model that matches ``patterns``.

        Raises an error of huggingface_hub if the hub cannot be reached.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

        disable_progress_bars()  # nothing is downloaded here
        try:
            listed = snapshot_download(
                name, allow_patterns=list(patterns), ignore_patterns=DUPLICATE_PATTERNS, dry_run=True
            )
        finally:
            enable_progress_bars()
        return [(file.file_size or 0, file.will_download) for file in listed]

    def download(self, name: str, patterns: Sequence[str], cached: bool = False) -> str:
        """Download the files of a model that match ``patterns``; return their folder.

        ``cached``: do not use the network; raise an error if the cache lacks the model or files of its weights.
        """
        from huggingface_hub import snapshot_download

        folder: str = snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=DUPLICATE_PATTERNS, local_files_only=cached
        )
        if cached and "*.safetensors" in patterns and not is_complete(Path(folder)):
            raise FileNotFoundError(f"the cache has only a part of {name}")
        return folder

    def load(self, found: HubDataset) -> list[Any]:
        """Load the subsets of a dataset, from the cache or from the hub."""
        return load_subsets(found)

    def cached_bytes(self, name: str) -> int:
        """Return the size of a dataset in the cache."""
        return sum(path.stat().st_size for path in cached_dataset(name).rglob("*") if path.is_file())


@dataclass(frozen=True)
class Item:
    """A model, tokenizer or dataset of a recipe. ``fetch`` returns what was done, or raises UserError."""

    setting: str
    """The setting that selects it, as "key=value"."""
    fetch: Callable[[], str]


def items(config: Config, hub: Hub) -> Iterator[Item]:
    """Yield what a run with this configuration reads; a name that several keys select is yielded once."""
    seen: set[str] = set()
    for key, name, patterns in (
        ("policy.model_name", config.policy.model_name, MODEL_PATTERNS),
        ("teacher.model_name", config.teacher.model_name, MODEL_PATTERNS),
        ("policy.tokenizer.name", config.policy.tokenizer.name, TOKENIZER_PATTERNS),
        ("teacher.tokenizer.name", config.teacher.tokenizer.name, TOKENIZER_PATTERNS),
    ):
        if name is not None and name not in seen:
            seen.add(name)
            yield Item(f"{key}={name}", partial(fetch_model, hub, key, name, patterns))
    sets = [("data.train", config.data.train)]
    sets += [("data.validation", config.data.validation)] if validates(config) else []
    loaded: set[object] = set()
    for section, datasets in sets:
        for key, dataset in keyed(datasets, section):
            found = hub_dataset(dataset, key)
            identity = (found.name, found.subsets, found.split) if found else dataset.data_path
            if identity not in loaded:
                loaded.add(identity)
                yield _dataset_item(hub, key, dataset, found)


def _dataset_item(hub: Hub, key: str, dataset: DatasetConfig, found: HubDataset | None) -> Item:
    if found is None:
        path = str(dataset.data_path)
        return Item(f"{key}.data_path={path}", partial(check_path, f"{key}.data_path", path))
    return Item(f"{found.key}={found.name}", partial(fetch_dataset, hub, found))


def check_path(key: str, path: str) -> str:
    """Return "a local path" if ``path`` exists, else raise UserError."""
    if not os.path.exists(Path(path).expanduser()):
        raise UserError(f"{key}={path} does not exist", "correct the path, or copy the data there", key, path)
    return "a local path, not downloaded"


def fetch_model(hub: Hub, key: str, name: str, patterns: Sequence[str]) -> str:
    """Download the files of a model or tokenizer; return its size and what was downloaded.

    If the hub cannot be reached, a complete model in the cache is sufficient. Raises UserError for a missing folder,
    and for a model that is neither cached nor downloaded.
    """
    if os.path.isdir(name):
        return "a local folder, not downloaded"
    if not is_hub_name(name):
        raise UserError(f"{key}={name} does not exist", "correct the path, or give the hub name of a model", key, name)
    try:
        files = hub.files(name, patterns)
        missing = sum(size for size, is_missing in files if is_missing)
        total = f"{gigabytes(sum(size for size, _ in files))} in {len(files)} files"
        if not missing:
            return f"{total}, complete before ({hub.download(name, patterns)})"
        print(f"  downloading {gigabytes(missing)} of {total}", flush=True)
        start = time.monotonic()
        folder = hub.download(name, patterns)
        seconds = max(time.monotonic() - start, 0.1)
        return f"{total}, downloaded {gigabytes(missing)} in {seconds:.0f} s ({folder})"
    except Exception as error:  # huggingface_hub raises many types
        cause, fix = cause_and_fix(error, name)
        try:
            return f"complete before ({hub.download(name, patterns, cached=True)}); not compared with the hub: {cause}"
        except Exception:
            raise UserError(f"{key}={name} is not complete in {model_cache()}, and {cause}", fix, key, name) from error


def fetch_dataset(hub: Hub, found: HubDataset) -> str:
    """Load a dataset, which downloads it if necessary; return its number of rows and what was downloaded.

    Raises UserError if it is neither cached nor downloaded, or lacks the subset or the split.
    """
    before = hub.cached_bytes(found.name)
    if not before and not offline_variable():
        print(f"  downloading split {found.split}", flush=True)
    rows = sum(len(part) for part in hub.load(found))
    after = hub.cached_bytes(found.name)
    what = "complete before" if after == before else f"downloaded {gigabytes(after - before)}"
    return f"{rows} rows of split {found.split}, {gigabytes(after)}, {what}"


def gigabytes(size: int) -> str:
    """Return a number of bytes as text, such as "1.2 GB" or "3 kB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def main(argv: Sequence[str], hub: Hub | None = None) -> int:
    """Fetch all items of the recipe, print a line for each, and return the exit code."""
    if print_flag(argv):
        print(__doc__)
        return 0
    missing = 0
    fixes: dict[str, None] = {}
    try:
        found = list(items(parse_args(argv).config, hub or Hub()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if offline := offline_variable():
        print(f"{offline} is set, so nothing is downloaded, and only the caches are checked")
    for item in found:
        print(item.setting, flush=True)
        try:
            print(f"  {item.fetch()}", flush=True)
        except UserError as error:
            missing += 1
            fixes[error.fix] = None
            print(f"  missing, because it {error.problem.removeprefix(item.setting).strip()}", flush=True)
    print(f"models are in {model_cache()}, datasets in {dataset_cache()}: the run must see the same folders (HF_HOME)")
    ends = f"{missing} of {len(found)} are missing: {'; '.join(fixes)}"
    print(ends if missing else f"the run finds all {len(found)} without a network")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
