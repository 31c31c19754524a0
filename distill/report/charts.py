"""Charts of the page: title, unit, explanation and series; charts without data are omitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distill.metrics.names import PHASES, timing_tag
from distill.report.tables import FORECAST

Table = Literal["train", "validation"]
Group = Literal["quality", "responses", "optimization", "time", "memory"]


@dataclass(frozen=True)
class Series:
    """One curve: a column of a table, with the columns of its standard error and of its band."""

    table: Table
    name: str
    label: str
    error: str | None = None
    band: tuple[str, str] | None = None


@dataclass(frozen=True)
class Chart:
    """One chart of the page, with one curve per series and run."""

    id: str
    title: str
    unit: str
    help: str
    group: Group
    series: tuple[Series, ...]
    kind: Literal["lines", "stacked", "positions"] = "lines"
    log: bool = False


def _train(**labels: str) -> tuple[Series, ...]:
    return tuple(Series("train", f"train/{name}", label) for name, label in labels.items())


_FORWARD, _REVERSE = "KL(teacher || student)", "KL(student || teacher)"
_NATS = "nats per token"
_LENGTHS = (
    Series("validation", "length_p50", "validation: median, 10% to 90%", band=("length_p10", "length_p90")),
    Series("validation", "validation/avg_length", "validation: mean"),
    Series(
        "train",
        "train/p50_gen_tokens_per_sample",
        "training: median, 10% to 90%",
        band=("train/p10_gen_tokens_per_sample", "train/p90_gen_tokens_per_sample"),
    ),
    *_train(mean_gen_tokens_per_sample="training: mean", max_gen_tokens_per_sample="training: longest"),
)
_BEFORE_SOURCES = (
    Chart("loss", "Loss", _NATS, "Weighted mean of the loss over response tokens.", "quality", _train(loss="loss")),
    Chart(
        "validation_kl",
        "KL on held-out problems",
        _NATS,
        "Divergence of student and teacher on the student's own responses to held-out problems.",
        "quality",
        (
            Series("validation", "validation/forward_kl", _FORWARD),
            Series("validation", "validation/reverse_kl", _REVERSE),
        ),
    ),
    Chart(
        "train_kl",
        "KL in training",
        _NATS,
        "Divergence of student and teacher on the responses of each step; all tokens outside the top-k count as"
        " one token.",
        "quality",
        _train(forward_kl=_FORWARD, reverse_kl=_REVERSE),
    ),
)
_AFTER_SOURCES = (
    Chart(
        "positions",
        "KL by position in the response",
        _NATS,
        "Mean KL of the tokens at each position of the responses to held-out problems, one curve per validation.",
        "quality",
        (),
        kind="positions",
    ),
    Chart(
        "entropy",
        "Entropy",
        _NATS,
        "Mean entropy of the next-token distributions. A student whose entropy falls to 0 repeats itself.",
        "quality",
        _train(student_entropy="student", teacher_entropy="teacher"),
    ),
    Chart(
        "agreement",
        "Agreement",
        "fraction",
        "Fraction of tokens with the same most likely token; probability of the teacher's most likely tokens.",
        "quality",
        _train(
            top1_agreement="same most likely token",
            teacher_topk_mass="teacher's probability of its top-k",
            student_topk_mass="student's probability of the teacher's top-k",
            topk_overlap="teacher's top-k that are in the student's top-k",
        ),
    ),
    Chart(
        "length",
        "Response length",
        "tokens",
        "Length of responses with their stop token. In training, the median and the band are those of the responses on"
        " which the step trained; the mean and the longest are those of all generated responses.",
        "responses",
        _LENGTHS,
    ),
    Chart(
        "truncation",
        "Truncated responses",
        "fraction",
        "Fraction of responses without a stop token, cut at the length limit.",
        "responses",
        (*_train(truncation_rate="training"), Series("validation", "validation/truncation_rate", "validation")),
    ),
    Chart(
        "repetition",
        "Repetition",
        "fraction",
        "Fraction of tokens in a sequence of 8 tokens that occurs at least twice in its response, and fraction of"
        " responses that end in a loop: the last 64 tokens repeat a sequence of at most 32 tokens.",
        "responses",
        (
            *_train(repeated_token_share="tokens, training", repetition_rate="loops at the end, training"),
            Series("validation", "validation/repeated_token_share", "tokens, validation"),
            Series("validation", "validation/repetition_rate", "loops at the end, validation"),
        ),
    ),
)
_OPTIMIZATION = (
    Chart("lr", "Learning rate", "", "Learning rate of each step.", "optimization", _train(lr="learning rate")),
    Chart(
        "grad_norm",
        "Gradient norm",
        "",
        "Norm of the gradient before clipping.",
        "optimization",
        _train(grad_norm="gradient norm"),
        log=True,
    ),
    Chart(
        "sampler",
        "Sampler and trainer",
        "nats",
        "Difference of the sampled tokens' log-probs between the generation engine and the trainer.",
        "optimization",
        _train(sampler_logprob_diff="mean", sampler_logprob_diff_max="maximum"),
        log=True,
    ),
)


def charts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the charts for which a run has data. ``runs``: the runs of the page's index, with their tables."""
    columns = {table: _names(runs, table) for table in ("train", "validation")}
    has_positions = any(run["positions"] for run in runs)
    found = []
    for chart in (
        *_BEFORE_SOURCES,
        *_accuracy(columns["validation"]),
        *_AFTER_SOURCES,
        *_words(columns["train"]),
        *_OPTIMIZATION,
        *_resources(),
    ):
        series = [asdict(each) for each in chart.series if each.name in columns[each.table]]
        for each in series:
            each["error"] = each["error"] if each["error"] in columns[each["table"]] else None
            each["band"] = list(each["band"]) if each["band"] and set(each["band"]) <= columns[each["table"]] else None
        if series or (chart.kind == "positions" and has_positions):
            found.append({**asdict(chart), "series": series})
    return found


def _names(runs: Sequence[Mapping[str, Any]], table: str) -> set[str]:
    return {name for run in runs for name in run["tables"][table]["series"]}


def _accuracy(names: Iterable[str]) -> list[Chart]:
    """Return the charts of accuracy: of all problems with pass@k, and of each dataset if there are several."""
    ks = sorted(int(k) for name in names if name.startswith("pass@") and (k := name[5:]).isdigit())
    prefix = "validation/"
    series = [
        Series("validation", f"{prefix}accuracy", "accuracy", f"{prefix}accuracy_stderr"),
        *(Series("validation", f"pass@{k}", f"pass@{k}", f"pass@{k}_stderr") for k in ks),
        Series(
            "validation",
            f"{prefix}in_context_accuracy",
            "untrained, context in view",
            f"{prefix}in_context_accuracy_stderr",
        ),
        Series(
            "validation",
            f"{prefix}in_context_at_end_accuracy",
            "trained, context in view",
            f"{prefix}in_context_at_end_accuracy_stderr",
        ),
    ]
    help_ = "Fraction of right responses, and of problems with a right response among k; bars: one standard error."
    found = [Chart("accuracy", "Accuracy", "fraction", help_, "quality", tuple(series))]
    sources = sorted(name.split("/")[1] for name in names if name.endswith("/accuracy") and name.count("/") == 2)
    if len(sources) > 1:
        each = [
            Series("validation", f"{prefix}{name}/accuracy", name, f"{prefix}{name}/accuracy_stderr")
            for name in sources
        ]
        found.append(Chart("accuracy_by_source", "Accuracy by dataset", "fraction", help_, "quality", tuple(each)))
    return found


def _words(names: Iterable[str]) -> list[Chart]:
    """Return the chart of the words in distillation.watched_words."""
    prefix = "train/watched_words"
    series = [
        Series("train", name, name.removeprefix(f"{prefix}/") if name != prefix else "all words")
        for name in sorted(names)
        if name == prefix or name.startswith(f"{prefix}/")
    ]
    help_ = "Occurrences of the words in distillation.watched_words per 1,000 response tokens of training."
    return [Chart("watched_words", "Watched words", "per 1,000 tokens", help_, "responses", tuple(series))]


def _resources() -> list[Chart]:
    """Return the charts of time and memory by phase, and of throughput."""
    time = tuple(Series("train", timing_tag(phase), phase) for phase in PHASES)
    memory = [
        Series("train", f"{prefix}memory/{phase}_gib", f"{phase}, {what}")
        for phase in PHASES
        for prefix, what in (("", "measured"), (FORECAST, "predicted"))
    ]
    throughput = [Series("train", "train/tokens_per_sec_per_gpu", "step, per rank")]
    throughput += [Series("train", f"{timing_tag(phase)}_tokens_per_sec", f"{phase}, all ranks") for phase in PHASES]
    return [
        Chart("time", "Time of a step", "seconds", "Seconds in each phase.", "time", time, kind="stacked"),
        Chart("throughput", "Throughput", "tokens/s", "Tokens per second.", "time", tuple(throughput), log=True),
        Chart(
            "memory",
            "Memory by phase",
            "GiB",
            "Largest memory of a rank in each phase, measured, and predicted before the start without the reserve.",
            "memory",
            tuple(memory),
        ),
    ]
