"""N-gram speculation of vLLM: its arguments, where it is supported, and a correction of vLLM's sampler on CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.errors import UserError
from distill.rollout.vllm_version import InstalledVllm

KEY = "policy.generation.vllm_cfg.speculative"
_CHECKED = (0, 32)
"""Release of vLLM whose speculation was examined."""
DRAFT_TOKENS = 3
"""Maximum number of draft tokens per response and step.

On a GPU, vLLM always verifies this many, so each response costs four tokens of computation per step even if no n-gram
matches.
"""
SHORTEST_MATCH, LONGEST_MATCH = 2, 4
"""Lengths of the n-gram at the end of a sequence that vLLM searches earlier in the sequence, longest first.

Most single tokens occur earlier in a sequence, so a match of one token would propose drafts that are rejected. Matches
longer than four tokens rarely choose another position.
"""


def check_speculation(installed: InstalledVllm, on_cpu: bool) -> None:
    """Raise UserError if n-gram speculation of the installed vLLM was not examined.

    Some releases sample from a wrong distribution (see ``correct_cpu_sampler``), so nothing is assumed of older
    releases, nor of another release on CPU.
    """
    release = installed.release
    if release == _CHECKED or (not on_cpu and (release is None or release > _CHECKED)):
        return
    name, needed = installed.name, ".".join(map(str, _CHECKED))
    raise UserError(
        f"{KEY}=ngram needs {name} {needed}{'' if on_cpu else ' or newer'}, but {name} {installed.version} is"
        " installed, whose speculation was not examined",
        f"install {name} {needed}, or set {KEY}=null",
        key=KEY,
        value="ngram",
    )


def speculation_arguments(on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM for n-gram speculation; on CPU, correct vLLM's sampler in this process.

    On a GPU, the method is ``ngram_gpu``, which finds drafts on the device and keeps asynchronous scheduling; ``ngram``
    would disable it. vLLM on CPU has only ``ngram``, and no asynchronous scheduling.
    """
    if on_cpu:
        correct_cpu_sampler()
    return {
        "speculative_config": {
            "method": "ngram" if on_cpu else "ngram_gpu",
            "num_speculative_tokens": DRAFT_TOKENS,
            "prompt_lookup_min": SHORTEST_MATCH,
            "prompt_lookup_max": LONGEST_MATCH,
        }
    }


def correct_cpu_sampler() -> None:
    """Replace the function of vLLM 0.32 that is wrong on CPU: temperature, top_k and top_p of the draft tokens.

    vLLM's function returns uninitialized memory there, a known error of this release, so draft tokens would be
    accepted with wrong probabilities. Greedy sampling does not use it.
    """
    from vllm.v1.sample import rejection_sampler

    assert callable(rejection_sampler.expand_batch_to_tokens)
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeat each response's value for each of its draft tokens, [responses] -> [tokens]; same dtype.

    The arguments are those of vLLM's function. ``cu_num_tokens``: cumulative numbers of draft tokens, [responses].
    Values equal to ``replace_from`` become ``replace_to``.
    """
    replaced = x.masked_fill(x == replace_from, replace_to)
    return replaced.repeat_interleave(cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)), output_size=num_tokens)
