"""Texts and tokens of the page's responses, in blocks, and the list of all responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.report.prompts import titles
from distill.report.read import mapping, number, parsed
from distill.report.samples import VERDICTS, Sample, SampleSet, gold_of, kls, response_of, token_texts

_BLOCK_TOKENS, _BLOCK_SAMPLES = 60_000, 300
"""Most response tokens and responses in a block; a block is decompressed at once."""


@dataclass(frozen=True)
class _Shown:
    """A sample, with the index of its set and of its prompt."""

    set: int
    prompt: int
    sample: Sample


class Blocks(Sequence[dict[str, Any]]):
    """The list of samples of a page, and a sequence of blocks; a block's texts are read when it is used.

    ``sets``: pairs of the index of the run and a set of its samples. ``prompts``: the index of each prompt that the
    page contains. Samples of the same prompt are neighbours, because they are shown side by side. ``notes``: receives
    a note on each file that changed after its scan, when a block is used.
    """

    def __init__(self, sets: Sequence[tuple[int, SampleSet]], prompts: Mapping[str, int], notes: list[str]) -> None:
        self.sets = [_described(run, each) for run, each in sets]
        self.prompts = [{"title": title} for title in titles(list(prompts), sets)]
        self.notes = notes
        self.sources: list[str] = []
        self.finishes: list[str] = []
        names = "set prompt response source verdict finish tokens forward reverse block at"
        self.columns: dict[str, list[Any]] = {name: [] for name in names.split()}
        self._files = [each.file.path for _, each in sets]
        self._blocks: list[list[_Shown]] = []
        self._size = 0
        listed = [
            _Shown(number_, prompts[sample.problem[1]], sample)
            for number_, (_, each) in enumerate(sets)
            for sample in each.samples
            if sample.problem[1] in prompts
        ]
        for shown in sorted(listed, key=lambda shown: (shown.prompt, shown.set, shown.sample.response)):
            self._add(shown)

    def _add(self, shown: _Shown) -> None:
        sample = shown.sample
        if not self._blocks or self._size + sample.tokens > _BLOCK_TOKENS or len(self._blocks[-1]) >= _BLOCK_SAMPLES:
            self._blocks.append([])
            self._size = 0
        self._size += sample.tokens
        values = {
            "set": shown.set,
            "prompt": shown.prompt,
            "response": sample.response,
            "source": _index(self.sources, sample.problem[0]),
            "verdict": VERDICTS.index(sample.verdict),
            "finish": _index(self.finishes, sample.finish),
            "tokens": sample.tokens,
            "forward": significant(sample.forward),
            "reverse": significant(sample.reverse),
            "block": len(self._blocks) - 1,
            "at": len(self._blocks[-1]),
        }
        for name, value in values.items():
            self.columns[name].append(value)
        self._blocks[-1].append(shown)

    @property
    def without_tokens(self) -> int:
        """Return the number of samples without texts of tokens: an earlier version of the program wrote them."""
        return sum(not shown.sample.has_tokens for block in self._blocks for shown in block)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number_: Any) -> Any:
        prompts: dict[str, Any] = {}
        samples = []
        for shown in self._blocks[number_]:
            row = self._row(shown)
            prompts[str(shown.prompt)] = {"prompt": shown.sample.problem[1], "gold": shown.sample.gold}
            samples.append(_texts_of(shown, row, self.sets[shown.set]["kind"] == "in_context"))
        return {"prompts": prompts, "samples": samples}

    def _row(self, shown: _Shown) -> dict[str, Any]:
        """Return the row of a response; {} with a note if the file no longer has it."""
        path, sample = self._files[shown.set], shown.sample
        row = _row_at(path, sample.offset)
        if (str(row.get("prompt_id")), response_of(row), gold_of(row)) == (
            sample.prompt_id,
            sample.response,
            sample.gold,
        ):
            return row
        note = f"{path.parent.name}/{path.name} was changed or removed while the page was made: texts are missing."
        if note not in self.notes:
            self.notes.append(note)
        return {}


def _row_at(path: Path, offset: int) -> dict[str, Any]:
    """Return the JSON object in the line of ``path`` that starts at the byte ``offset``; {} without one."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return parsed(file.readline())
    except OSError:
        return {}


def _texts_of(shown: _Shown, row: Mapping[str, Any], in_context: bool) -> dict[str, Any]:
    """Return texts and tokens of one response. ``in_context``: whether the student read the teacher's context."""
    texts = token_texts(row)
    read = row.get("prompt") if in_context else row.get("teacher_prompt")
    if read is None and shown.sample.forward is not None:  # the teacher read the prompt of this run
        read = row.get("prompt")
    forward, reverse = (rounded(kls(row, name)) for name in ("forward_kl", "reverse_kl"))
    return {
        "prompt": shown.prompt,
        "teacher_prompt": read if isinstance(read, str) and read != shown.sample.problem[1] else None,
        "answer": str(row.get("answer") or ""),
        "texts": texts,
        "forward": forward if forward is not None and len(forward) == len(texts) else None,
        "reverse": reverse if reverse is not None and len(reverse) == len(texts) else None,
        "top": [each for each in _top(row) if 0 <= each["at"] < len(texts)],
    }


def _described(run: int, each: SampleSet) -> dict[str, Any]:
    labels = {
        "validation": f"validation at step {each.step}",
        "in_context": "trained, context in view" if each.step else "untrained, context in view",
        "train": f"training, step {each.step} (KL after the step)",
    }
    return {"run": run, "kind": each.kind, "step": each.step, "label": labels[each.kind]}


def _index(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    """Return the values with three significant digits."""
    return None if values is None else [significant(value) for value in values]


def significant(value: float | None) -> float | int | None:
    """Return ``value`` with three significant digits, which are enough for colours and save half of the bytes."""
    if value is None:
        return None
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() else short


def _top(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    found, ids = row.get("top_tokens"), row.get("token_ids")
    for entry in found if isinstance(found, list) else ():
        at = number(mapping(entry).get("at"))
        if at is None:
            continue
        tokens = {model: _tokens(entry, model) for model in ("student", "teacher")}
        top: dict[str, Any] = {"at": int(at)}
        top |= {model: [[str(text), significant(number(p))] for _, text, p in tokens[model]] for model in tokens}
        if isinstance(ids, list) and 0 <= int(at) < len(ids):
            top["chosen"] = {model: _index_of(tokens[model], ids[int(at)]) for model in tokens}
        yield top


def _tokens(entry: Mapping[str, Any], model: str) -> list[list[Any]]:
    """Return id, text and probability of the most likely tokens of a model."""
    tokens = entry.get(model)
    return (
        [token for token in tokens if isinstance(token, list) and len(token) == 3] if isinstance(tokens, list) else []
    )


def _index_of(tokens: Sequence[list[Any]], id_: Any) -> int | None:
    """Return the index of the token with the id of the response's token; None if it is not listed."""
    return next((i for i, (listed, _, _) in enumerate(tokens) if listed == id_), None)
