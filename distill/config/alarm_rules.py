"""Rules for alarms on metrics and for watched words."""

from __future__ import annotations

from distill.config.loop import AlarmConfig
from distill.config.measured import missing_cause
from distill.config.metric_names import is_metric, similar_metrics
from distill.config.schema import Config
from distill.errors import UserError, any_of, show

_KEY, _WORDS = "distillation.alarms", "distillation.watched_words"


def alarm_name(alarm: AlarmConfig) -> str:
    """Return the name of a user's alarm, such as ``train/loss>2.0,steps=3,stop``: different for different alarms."""
    steps = f",steps={alarm.steps}" if alarm.steps > 1 else ""
    return f"{alarm.metric}{alarm.op}{alarm.value!r}{steps},{alarm.action}"


def check_alarms(config: Config) -> None:
    """Raise UserError if an alarm can never start, or if a watched word cannot be found in a text."""
    alarms = config.distillation.alarms
    for i, alarm in enumerate(alarms):
        key = f"{_KEY}.{i}" if len(alarms) > 1 else _KEY
        _check_steps(alarm, key)
        _check_metric(alarm, key, config)
        if alarm.action == "save" and not config.checkpointing.enabled:
            raise UserError(
                f"{key}.action=save saves no checkpoint with checkpointing.enabled=false",
                "set the action to warn or stop, or set checkpointing.enabled=true",
                key=f"{key}.action",
                value=alarm.action,
            )
    names = [alarm_name(alarm) for alarm in alarms]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{_KEY} contains the alarm {repeated[0]} more than once",
            "keep one of these alarms",
            key=_KEY,
            value=repeated[0],
        )
    _check_words(config.distillation.watched_words)


def _check_steps(alarm: AlarmConfig, key: str) -> None:
    if alarm.steps < 1:
        raise UserError(
            f"{key}.steps={alarm.steps} is out of range",
            "set it to at least 1",
            key=f"{key}.steps",
            value=alarm.steps,
        )


def _check_metric(alarm: AlarmConfig, key: str, config: Config) -> None:
    name, key = alarm.metric, f"{key}.metric"
    if not is_metric(name):
        similar = similar_metrics(name)
        advice = f"set it to {any_of(similar)}" if similar else "set it to a name in metrics.jsonl, such as train/loss"
        raise UserError(f"{key}={show(name) or '(empty)'} is not a metric", advice, key=key, value=name)
    if (missing := missing_cause(name, config)) is not None:
        because, fix = missing
        problem = f"{key}={name} is never measured, because {because}"
        raise UserError(problem, f"{fix}, or remove the alarm", key=key, value=name)
    _check_word(name, key, config.distillation.watched_words)


def _check_word(name: str, key: str, words: tuple[str, ...]) -> None:
    """Raise UserError if ``name`` is the metric of watched words that are not in the recipe."""
    found = [f"train/watched_words/{word}" for word in words]
    if name.startswith("train/watched_words") and not (words if name == "train/watched_words" else name in found):
        missing = name.rpartition("/")[2] if "/" in name.removeprefix("train/") else "a word"
        raise UserError(
            f"{key}={name} is never measured, because {_WORDS}={show(list(words))} does not contain {missing}",
            f"add {missing} to {_WORDS}",
            key=key,
            value=name,
        )


def _check_words(words: tuple[str, ...]) -> None:
    for word in words:
        if not word or " ".join(word.split()) != word or not any(map(str.isalnum, word)):
            raise UserError(
                f"{_WORDS} contains {word!r}, which is no word",
                "use words with at least one letter or digit, without white space around them",
                key=_WORDS,
                value=word,
            )
    folded = [word.casefold() for word in words]
    if repeated := [word for word in words if folded.count(word.casefold()) > 1]:
        raise UserError(
            f"{_WORDS} contains {repeated[0]} more than once; upper and lower case are not distinguished",
            "keep one of these words",
            key=_WORDS,
            value=repeated[0],
        )
