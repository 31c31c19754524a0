"""Malformed chat templates and arguments: prompts that another rank or a resumed run renders differently."""

from __future__ import annotations

from tests.malformed.case import Case, Workshop, way

_READ_BY_TEACHER = (
    "distillation.context_distillation.mode=frozen",
    "distillation.context_distillation.teacher_prefix_template='Hint: {problem}'",
)
"""A teacher of another model renders its prefixes with its own tokenizer."""


@way
def _random_chat_template(shop: Workshop) -> Case:
    """The student's or teacher's template draws random numbers."""
    model = shop.model()
    draw = shop.rng.choice(["{{ range(1000) | random }}", "{{ lipsum(n=1) }}", "{{ 'abcdefgh' | list | random }}" * 9])
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}" + draw)
    key = shop.rng.choice(["policy.tokenizer.name", "teacher.tokenizer.name"])
    return shop.context("chat template", *_READ_BY_TEACHER, f"{key}={model}")


@way
def _strftime_now_in_template_arguments(shop: Workshop) -> Case:
    """The recipe replaces the function that writes the date."""
    value = shop.rng.choice(["today", "'2024-07-26'", "null", "[1]", "{a: b}"])
    key = shop.rng.choice(["policy", "teacher"]) + ".tokenizer.chat_template_kwargs"
    return shop.context(f"{key}.strftime_now", *_READ_BY_TEACHER, f"{key}={{strftime_now: {value}}}")
