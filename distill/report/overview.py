"""What a run was, how it ended, and its main numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distill.config.schema import BUILT_IN, Config
from distill.report.numbers import Estimate, Sums, gap_closed, gap_closed_stderr, total_mean
from distill.report.read import RunFiles, last, mapping, number
from distill.report.samples import SampleSet
from distill.report.tables import totals
from distill.supervise.quantities import duration, short_count

State = Literal["finished", "stopped", "running", "failed", "unknown"]
_STATES: dict[str, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed", "refused": "failed"}
ABSENT = "(absent)"
"""Text for the value of a key that a recipe does not have."""
_MOST_CHANGES = 8
"""Most keys in a note on a change of the recipe."""
_PACKAGES = ("python", "torch", "vllm", "transformers", "triton", "cuda", "nccl", "driver")


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    state: State
    text: str


@dataclass(frozen=True)
class Measured:
    """A metric, its standard error (None if unknown), and the step at which it was measured."""

    value: float
    stderr: float | None
    step: int


@dataclass(frozen=True)
class Ends:
    """The first and the last value of a metric; None if it was not measured."""

    first: Measured | None = None
    """None also if the last value is the only one."""
    last: Measured | None = None


@dataclass(frozen=True)
class Final:
    """Main numbers of a run; a number that was not measured is None."""

    steps: int
    kl: Ends
    """KL(teacher || student) on held-out problems, in nats per token."""
    closed: Measured | None
    """Fraction of this KL that training removed; None with fewer than two validations."""
    accuracy: Ends
    in_context: Measured | None
    """Accuracy of the untrained student with the teacher's context in view."""
    in_context_at_end: Measured | None
    """Accuracy of the trained student with the teacher's context in view."""
    length: Ends
    """Mean response length in tokens in validations; without validations, in training."""
    truncated: float | None
    loss: Ends
    tokens: float
    hours: float


def last_step(run: RunFiles) -> int:
    """Return the number of finished steps."""
    return int(run.train[-1]["step"]) if run.train else 0


def final_of(run: RunFiles, sets: Sequence[SampleSet] = ()) -> Final:
    """Return the main numbers of ``run``; ``sets``: its responses, for standard errors over problems."""
    rows, steps = run.validation, run.train
    lengths = _ends(rows, "validation/avg_length", sets, SampleSet.length_of_prompts)
    tokens, hours = totals(run)
    kl = _ends(rows, "validation/forward_kl", sets, SampleSet.kl_of_prompts)
    return Final(
        steps=last_step(run),
        kl=kl,
        closed=_closed(kl, sets),
        accuracy=_ends(rows, "validation/accuracy"),
        in_context=_ends(rows, "validation/in_context_accuracy").last,
        in_context_at_end=_ends(rows, "validation/in_context_at_end_accuracy").last,
        length=lengths if lengths.last else _ends(steps, "train/mean_gen_tokens_per_sample"),
        truncated=last(*((rows, "validation/truncation_rate") if rows else (steps, "train/truncation_rate"))),
        loss=_ends(steps, "train/loss"),
        tokens=tokens,
        hours=hours,
    )


def _ends(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    sets: Sequence[SampleSet] = (),
    of_prompts: Callable[[SampleSet], Sums] | None = None,
) -> Ends:
    """Return the metric in the first and in the last row that has it.

    The standard error is that in the same row, or is computed from the responses of the same step.
    """
    measured = [row for row in rows if number(row.get(name)) is not None]
    if not measured:
        return Ends()
    found = []
    for row in (measured[0], measured[-1]):
        step, stderr = int(row["step"]), number(row.get(f"{name}_stderr"))
        if stderr is None and of_prompts and (each := validation_at(sets, step)):
            stderr = (total_mean(of_prompts(each)) or (0.0, None))[1]
        found.append(Measured(float(row[name]), stderr, step))
    return Ends(found[0] if len(measured) > 1 else None, found[1])


def _closed(kl: Ends, sets: Sequence[SampleSet]) -> Measured | None:
    if not kl.first or not kl.last or (value := gap_closed(kl.first.value, kl.last.value)) is None:
        return None
    both = [each.kl_of_prompts() for step in (kl.first.step, kl.last.step) if (each := validation_at(sets, step))]
    return Measured(value, gap_closed_stderr(*both) if len(both) == 2 else None, kl.last.step)


def validation_at(sets: Sequence[SampleSet], step: int) -> SampleSet | None:
    """Return the responses of the validation at ``step``; None if they are not known."""
    return next((each for each in sets if each.kind == "validation" and each.step == step), None)


def ending_of(run: RunFiles) -> Ending:
    """Return how the run ended, from its status file and its lock."""
    state, reason = str(run.status.get("state")), str(run.status.get("reason") or "")
    at = f"after step {last_step(run)}"
    if state in _STATES:
        return Ending(_STATES[state], f"{state} {at}" + (f": {reason}" if reason else ""))
    if run.is_written:
        return Ending("running", f"running, {at}")
    when = str(run.status.get("time") or "an unknown time")
    return Ending(
        "unknown", f"no exit status: the last write was {at} at {when}; the run was killed, or runs on another machine"
    )


def headline(
    final: Final, control: tuple[str, Final] | None, alarms: Sequence[Mapping[str, str]] = ()
) -> list[dict[str, Any]]:
    """Return the main numbers as texts: label, value, detail.

    ``control``: name and numbers of the control run. ``alarms``: the result of ``alarms_of``.
    """
    found: list[tuple[str, str, str | None]] = []
    kl, accuracy, length = final.kl, final.accuracy, final.length
    if final.closed and kl.first and kl.last:
        kls = (f"{nats(each.value)} {when(each.step)}" for each in (kl.first, kl.last))
        found.append(("gap closed", percent(final.closed.value, 0), f"KL(teacher || student) {', '.join(kls)}"))
    if accuracy.last:
        references = {
            when(accuracy.first.step) if accuracy.first else "": accuracy.first,
            "context in view": final.in_context,
            "context in view at the end": final.in_context_at_end,
            f"control {control[0]}" if control else "": control[1].accuracy.last if control else None,
        }
        texts = [f"{name} {estimate(each)}" for name, each in references.items() if each]
        found.append(("accuracy", estimate(accuracy.last), _joined(_unless_at_end(accuracy.last, final), *texts)))
    if not final.closed and final.loss.last:
        first = final.loss.first
        found.append(
            ("loss", nats(final.loss.last.value), f"{nats(first.value)} {when(first.step)}" if first else None)
        )
    if length.last:
        first_length = f"{length.first.value:.1f} {when(length.first.step)}" if length.first else ""
        truncated = f"{percent(final.truncated)} truncated" if final.truncated is not None else ""
        detail = _joined(_unless_at_end(length.last, final), first_length, truncated)
        found.append(("mean length", f"{length.last.value:.1f} tokens", detail))
    if alarms:
        texts = [f"{each['label']} {each['steps']}" for each in alarms]
        found.append(("alarms", str(len(alarms)), _joined(*texts)))
    if final.steps:
        found.append(
            (
                "cost",
                f"{short_count(final.tokens)} tokens",
                f"{final.steps} step{'s' * (final.steps != 1)} in {spent(final)}",
            )
        )
    return [{"label": label, "value": value, "detail": detail} for label, value, detail in found]


def when(step: int) -> str:
    """Return the time of a validation as text: after ``step`` finished steps."""
    return f"at step {step}" if step else "before training"


def _unless_at_end(measured: Measured, final: Final) -> str:
    """Return when the number was measured, unless it was after the last step."""
    return "" if measured.step == final.steps and final.steps else when(measured.step)


def _joined(*texts: str) -> str | None:
    return "; ".join(filter(None, texts)) or None


def spent(final: Final) -> str:
    """Return the time of all steps as text."""
    return duration(3600 * final.hours)


def nats(value: float | None) -> str:
    """Return a KL or a loss as text."""
    return "-" if value is None else f"{value:.4f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as text in percent."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def estimate(value: Measured | Estimate | None) -> str:
    """Return a fraction and its standard error as text in percent."""
    if value is None:
        return "-"
    mean, stderr = (value.value, value.stderr) if isinstance(value, Measured) else value
    return percent(mean) + (f" ± {percent(stderr)}" if stderr is not None else "")


def _teachers_context(loop: Mapping[str, Any]) -> object:
    """Return what the teacher reads in place of the student's prompt; None if it reads the student's prompt."""
    context = mapping(loop.get("context_distillation"))
    if not context.get("enabled"):
        return None
    if loop.get("control"):
        return "none (distillation.control=true)"
    column = context.get("teacher_messages_key")
    return f"the messages in the column {column}" if column else context.get("teacher_prefix_template")


def _trained(policy: Mapping[str, Any]) -> str | None:
    """Return rank, scale and modules of the adapters; None if all weights are trained."""
    lora = mapping(mapping(policy.get("dtensor_cfg")).get("lora_cfg"))
    if not lora.get("enabled"):
        return None
    patterns = (
        f", {name}: {', '.join(lora[name])}" for name in ("target_modules", "exclude_modules") if lora.get(name)
    )
    return f"adapters of rank {lora.get('dim')}, alpha {lora.get('alpha')}{''.join(patterns)}"


def facts(run: RunFiles) -> list[dict[str, str]]:
    """Return what ran: models, data, teacher's context, hardware, versions, commit."""
    recipe, versions = run.recipe, run.versions
    earlier = versions.get("earlier_starts")
    packages = [f"{name} {versions[name]}" for name in _PACKAGES if versions.get(name)]
    hosts = versions.get("hosts")
    command = versions.get("command")
    found = {
        "folder": str(run.folder),
        "student": mapping(recipe.get("policy")).get("model_name"),
        "teacher": mapping(recipe.get("teacher")).get("model_name"),
        "trained": _trained(mapping(recipe.get("policy"))),
        "teacher's context": _teachers_context(mapping(recipe.get("distillation"))),
        "loss": mapping(recipe.get("loss_fn")).get("kl_type"),
        "training data": ", ".join(_datasets(recipe, "train")),
        "held-out data": ", ".join(_datasets(recipe, "validation")),
        "hardware": versions.get("device"),
        "ranks": versions.get("world_size"),
        "hosts": ", ".join(map(str, hosts)) if isinstance(hosts, list) else None,
        "versions": ", ".join(packages),
        "commit": versions.get("commit"),
        "command": " ".join(map(str, command)) if isinstance(command, list) else None,
        "starts": len(earlier) + 1 if isinstance(earlier, list) and earlier else None,
        "last write": run.status.get("time"),
    }
    return [{"label": label, "value": str(value)} for label, value in found.items() if value not in (None, "")]


def _datasets(recipe: Mapping[str, Any], part: str) -> Iterator[str]:
    entries = mapping(recipe.get("data")).get(part)
    for entry in entries if isinstance(entries, list) else [entries]:
        name = mapping(entry).get("data_path") or mapping(entry).get("dataset_name")
        if name:
            yield str(name)


def is_control(run: RunFiles) -> bool:
    """Return whether the run is a control experiment: its recipe has distillation.control=true."""
    return mapping(run.recipe.get("distillation")).get("control") is True


def alarms_of(run: RunFiles) -> list[dict[str, str]]:
    """Return each alarm of the run with its steps and the message of its first start; labels and values are texts."""
    found: dict[str, dict[str, str]] = {}
    for row in run.alarms:
        name, step = str(row.get("alarm")), number(row.get("step"))
        if row.get("event") == "start":
            entry = found.setdefault(name, {"label": name, "steps": "", "value": str(row.get("message"))})
            entry["steps"] += f"{', ' if entry['steps'] else ''}from step {step}"
        elif name in found:
            found[name]["steps"] += f" to {step}"
    return list(found.values())


def recipe_of(run: RunFiles) -> dict[str, Any]:
    """Return the recipe's text, and its differences from its parent or, if unknown, from the built-in defaults."""
    parent = run.parent_recipe or json.loads(json.dumps(asdict(Config())))
    before, after = flat(parent), flat(run.recipe)
    changes = _changes(before, after)
    if not run.parent_recipe:  # built-in defaults may have keys that the version of the run did not have
        changes = [change for change in changes if change["key"] in after]
    name = run.parent if run.parent_recipe else BUILT_IN
    return {"parent": name, "changes": changes if run.recipe else [], "text": run.recipe_text}


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the keys with different values, with both values; an empty section is no key if the other has its keys."""
    keys = list({**after, **before})
    sections = {key[:i] for key in keys for i, letter in enumerate(key) if letter == "."}
    values = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys if key not in sections]
    return [{"key": key, "old": old, "new": new} for key, old, new in values if old != new]


def resume_notes(run: RunFiles) -> list[str]:
    """Return a note for each resume that changed the recipe."""
    recipes = [*(recipe for _, recipe in run.earlier_recipes), run.recipe]
    notes = []
    for (step, before), after in zip(run.earlier_recipes, recipes[1:], strict=True):
        changes = _changes(flat(before), flat(after))
        texts = [f"{each['key']} from {each['old']} to {each['new']}" for each in changes[:_MOST_CHANGES]]
        more = [f"{len(changes) - _MOST_CHANGES} more keys"] if len(changes) > _MOST_CHANGES else []
        if before and after and changes:
            notes.append(f"The resume after step {step} changed the recipe: {', '.join([*texts, *more])}.")
    return notes


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a recipe as texts by dotted key; entries of a list of sections have their index as name."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = {str(i): entry for i, entry in enumerate(value)}
        if isinstance(value, dict) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return found
