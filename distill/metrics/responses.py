"""Statistics of responses: lengths, repetition, and the frequency of given words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from distill.types import Rollout, Stats

LOOP_TOKENS = 64
"""Number of tokens at the end of a response that are checked for a loop."""
NGRAM = 8
"""Number of consecutive tokens that count as repeated if they occur more than once in a response."""
WORDS = "train/watched_words"
"""Metric of all watched words; the metric of one word has the word as an additional part of its name."""
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
_MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, NGRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def length_quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """Return quantiles of the lengths of responses, in tokens, by metric name; empty without responses.

    ``pN_gen_tokens_per_sample`` (N: 10, 50, 90, 99) is the length that N% of the responses do not exceed, interpolated
    linearly between the two nearest lengths.
    """
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {f"{name}_gen_tokens_per_sample": _quantile(ordered, q) for name, q in _QUANTILES.items()}


def own_responses(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts that the student generated, without those from the dataset (off-policy)."""
    return [rollout for rollout in rollouts if not rollout.off_policy]


def ends_in_a_loop(rollout: Rollout) -> bool:
    """Return whether the last ``LOOP_TOKENS`` tokens repeat a sequence of at most half as many tokens.

    The stop token is not counted. Shorter responses do not end in a loop. A loop of 32 tokens or less is thus repeated
    at least twice, a single token 64 times.
    """
    ids = rollout.response_ids[:-1] if rollout.finish == "stop" else rollout.response_ids
    end = ids[-LOOP_TOKENS:]
    return len(end) == LOOP_TOKENS and any(end[period:] == end[:-period] for period in range(1, LOOP_TOKENS // 2 + 1))


def repeated_tokens(ids: Sequence[int]) -> int:
    """Return how many tokens of a response lie in a repeated 8-gram.

    An 8-gram is a sequence of ``NGRAM`` consecutive tokens. It is repeated if it occurs at least twice in the response,
    also if the occurrences overlap. All tokens of all its occurrences count, each token once. A response of 8 tokens or
    less has no repeated 8-gram. 8-grams are equal if their 64-bit hashes are equal, which different 8-grams have with
    a probability of about 1e-19.
    """
    starts = len(ids) - NGRAM + 1
    if starts < 2:
        return 0
    ids_T = np.fromiter(ids, np.uint64, len(ids))
    hash_S = np.zeros(starts, np.uint64)
    for i, multiplier in enumerate(_MULTIPLIERS):
        hash_S += ids_T[i : i + starts] * multiplier  # modulo 2^64
    order_S = hash_S.argsort()
    sorted_S = hash_S[order_S]
    equals_next = sorted_S[1:] == sorted_S[:-1]
    repeated_S = np.union1d(order_S[1:][equals_next], order_S[:-1][equals_next])
    # Each repeated 8-gram raises the number of 8-grams that contain a token, from its first to its last token.
    change_T = np.zeros(len(ids) + 1, np.int64)
    change_T[repeated_S] += 1
    change_T[repeated_S + NGRAM] -= 1
    return int((change_T.cumsum()[:-1] > 0).sum())


def repeated_token_stats(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Return how many tokens of all responses lie in a repeated 8-gram of their response, and how many tokens exist."""
    responses = [rollout.response_ids for rollout in rollouts]
    return float(sum(map(repeated_tokens, responses))), float(sum(map(len, responses)))


class WatchedWords:
    """Counts given words in the decoded responses of this rank; nothing is decoded without words.

    ``decode`` returns the text of token ids. A word matches independently of upper and lower case, and only as a
    complete word: no letter, digit or underscore may precede or follow it. Characters of scripts that are written
    without spaces, such as Chinese, may have any neighbour. A space in a word matches any white space.
    """

    def __init__(self, words: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._patterns = {word: _pattern_of(word) for word in words}
        self._decode = decode

    def stats(self, rollouts: Sequence[Rollout]) -> Stats:
        """Return, by metric, 1000 times the occurrences in the student's own responses, and the number of tokens.

        The metrics are thus occurrences per 1,000 response tokens, stop tokens included. Empty without words, and
        without such responses.
        """
        own = own_responses(rollouts)
        if not (self._patterns and own):
            return {}
        texts = [self._decode(rollout.response_ids) for rollout in own]
        tokens = float(sum(len(rollout.response_ids) for rollout in own))
        counts = {word: sum(len(pattern.findall(text)) for text in texts) for word, pattern in self._patterns.items()}
        by_word = {f"{WORDS}/{word}": (1000.0 * count, tokens) for word, count in counts.items()}
        return {WORDS: (1000.0 * sum(counts.values()), tokens), **by_word}


def _pattern_of(word: str) -> re.Pattern[str]:
    def has_edge(letter: str) -> bool:
        return re.match(r"\w", letter) is not None and unicodedata.east_asian_width(letter) != "W"

    inner = r"\s+".join(map(re.escape, word.split()))
    before, after = (r"(?<!\w)" if has_edge(word[0]) else "", r"(?!\w)" if has_edge(word[-1]) else "")
    return re.compile(f"{before}{inner}{after}", re.IGNORECASE)


def _quantile(ordered: Sequence[int], q: float) -> float:
    index = q * (len(ordered) - 1)
    low = int(index)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (index - low) * (ordered[high] - ordered[low])
