"""Build teacher prefixes and rollouts for tests. A byte is a token here, so lengths are counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distill.config import ContextDistillationConfig, StaticTraceConfig, TraceExtractorConfig
from distill.data.teacher_prefix import ContextPrefixes
from distill.types import Problem, Prompt, Rollout
from tests.tiny_tokenizer import tiny_tokenizer

CONTEXT = "distillation.context_distillation"
STATIC: dict[str, Any] = {"trace_source": "static_dataset", "static_trace": StaticTraceConfig("solution")}
RESPONSE = "<think>abc</think>2"
"""A response of 7 tokens with <|im_end|>. With "1+1?|" its trace makes a prefix of 8 tokens."""
END = 258
"""<|im_end|>"""


def rollout(response: str, problem: str = "1+1?", tokenizer: Any = None, **columns: str) -> Rollout:
    """Return a finished response: one token per byte, and the stop token."""
    ids = (*(tokenizer or tiny_tokenizer())(response)["input_ids"], END)
    prompt = Prompt(0, (7, 8), Problem(problem, source="a.jsonl", columns=columns))
    return Rollout(prompt, 0, ids, (0.0,) * len(ids), "stop", version=0)


EXTRACTOR = TraceExtractorConfig()


def prefixes(
    template: str = "{problem}|{trace}",
    max_tokens: int = 1000,
    tokenizer: Any = None,
    template_kwargs: Any = None,
    **context: Any,
) -> ContextPrefixes:
    """Return the prefixes for a configuration with these keys, also those of the extractor; bare text by default."""
    of_extractor = {name: context.pop(name) for name in tuple(context) if hasattr(EXTRACTOR, name)}
    settings = ContextDistillationConfig(
        enabled=True,
        teacher_prefix_template=template,
        trace_extractor=replace(EXTRACTOR, **of_extractor),
        **{"chat_template": False, **context},
    )
    return ContextPrefixes(tokenizer or tiny_tokenizer(), settings, max_tokens, template_kwargs)


def counted(counts: Any) -> dict[str, Any]:
    """Return means and totals by metric name without the common prefix."""
    return {name.removeprefix("context_distillation_"): v for name, v in {**counts.means, **counts.totals}.items()}


def read(rollouts: list[Rollout]) -> list[str]:
    """Return the text of each rollout's teacher prefix."""
    return [tiny_tokenizer().decode(list(r.teacher_prefix_ids)) for r in rollouts]
