"""Compared rows of student and teacher predict the same token, for any prefixes, packing and layout of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.batching.plan import PackingConfig, plan
from distill.types import Layout, MicroBatch, Problem, Prompt, Rollout, View


@dataclass(frozen=True)
class Ranks:
    """Sizes of the mesh dimensions."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    teacher: int = 1
    """Number of ranks that share the teacher's packs."""

    def layouts(self) -> list[Layout]:
        """Return the layout of each rank, in order."""
        places = [(d, c, t) for d in range(self.dp) for c in range(self.cp) for t in range(self.tp)]
        return [Layout(d, self.dp, c, self.cp, t, self.tp, self.teacher) for d, c, t in places]


WORLDS = [
    Ranks(),
    Ranks(dp=2),
    Ranks(dp=2, teacher=2),
    Ranks(cp=2, teacher=2),
    Ranks(cp=3, teacher=3),
    Ranks(tp=2, teacher=2),
    Ranks(dp=2, cp=2, tp=2, teacher=4),
    Ranks(dp=2, cp=2, teacher=4),
    Ranks(dp=2, tp=2, teacher=4),
    Ranks(dp=2, cp=2, tp=2, teacher=8),
]
PACKINGS = [
    PackingConfig(4, sequences=1, tokens=None, share_prefixes=False),
    PackingConfig(99, sequences=None, tokens=None, share_prefixes=False),
    PackingConfig(99, sequences=None, tokens=30, share_prefixes=False),
    PackingConfig(5, sequences=3, tokens=None),
    PackingConfig(99, sequences=None, tokens=30),
    PackingConfig(99, sequences=None, tokens=None),
]


def make_rollouts(prompts: Sequence[tuple[int, int]], lengths: Sequence[tuple[int, int]], trace: bool) -> list[Rollout]:
    """Return rollouts whose response tokens are all different.

    ``prompts``: lengths of student prefix and teacher prefix; ``lengths``: prompt number and response length. With
    ``trace`` each response's teacher prefix ends in a different token.
    """
    fresh = iter(range(1000, 100_000))
    made = []
    for a, (p, length) in enumerate(lengths):
        student, teacher = prompts[p % len(prompts)]
        prompt = Prompt(p % len(prompts), tuple(100 + p % len(prompts) + 10 * i for i in range(student)), Problem("p"))
        prefix = tuple(200 + p % len(prompts) + 10 * i for i in range(teacher))
        response = tuple(next(fresh) for _ in range(length))
        made.append(Rollout(prompt, a, response, (-1.0,) * length, "stop", 0, (*prefix[:-1], -a) if trace else prefix))
    return made


Histories = list[list[set[tuple[tuple[int, ...], int]]]]


def histories(parts: Sequence[View]) -> Histories:
    """Return for each row the tokens up to its position and its position number, in each of its sequences.

    ``parts``: the shards of one pack on the ranks of a group, in order.
    """
    view = parts[0]
    held = [token for part in parts for token in part.tokens_T.tolist()]
    numbers = [number for part in parts for number in part.positions_T.tolist()]
    place = list(range(len(held))) if view.shards is None else view.shards.slot_T.tolist()
    position_at = {held_at: position for position, held_at in enumerate(place)}
    sequences = list(range(len(place))) if view.shared is None else view.shared.expand_S.tolist()
    found: dict[int, set[tuple[tuple[int, ...], int]]] = {}
    for begin, end in zip(view.bounds, view.bounds[1:], strict=False):
        read = tuple(held[place[position]] for position in sequences[begin:end])
        for n, position in enumerate(sequences[begin:end], start=1):
            found.setdefault(position, set()).add((read[:n], numbers[place[position]]))
    size = len(view.tokens_T) if view.shards is not None else 0  # without shards, all parts have the same positions
    return [
        [found[position_at[part * size + row]] for row in of_part.rows_N.tolist()] for part, of_part in enumerate(parts)
    ]


def compared(rollouts: Sequence[Rollout], ranks: Ranks, micro_batches: Sequence[MicroBatch]) -> list[tuple[int, int]]:
    """Check each row's tokens on every rank; return (rollout, token index) of each row that the teacher scores."""
    ours: dict[int, Histories] = {}
    theirs: dict[int, Histories] = {}
    scored = []
    for rank, (layout, batch) in enumerate(zip(ranks.layouts(), micro_batches, strict=True)):
        group = layout.dp_rank * layout.group_size + layout.tp_rank
        of_group = micro_batches[group : group + layout.group_size : ranks.tp]
        first = rank // ranks.teacher * ranks.teacher
        if group not in ours:
            ours[group] = histories([other.student for other in of_group])
        if first not in theirs:
            theirs[first] = histories([other.teacher for other in micro_batches[first : first + ranks.teacher]])
        student, teacher = ours[group][layout.cp_rank], theirs[first][rank - first]
        skipped = sum(batch.rows_per_tp_rank[: layout.tp_rank])
        share = batch.rows_per_tp_rank[layout.tp_rank] if batch.rows_per_tp_rank else len(batch.sampled_N)
        assert (len(student), len(teacher)) == (len(batch.sampled_N), share)
        for n, (a, token) in enumerate(zip(batch.rollout_N.tolist(), batch.sampled_N.tolist(), strict=True)):
            if a == -1:
                assert batch.weight_N[n] == 0, "a padding row has a weight"
                continue
            rollout = rollouts[a]
            i = rollout.response_ids.index(token)
            read = (*rollout.prompt.student_ids, *rollout.response_ids[:i])
            assert student[n] == {(read, len(read) - 1)}
            if skipped <= n < skipped + share:
                read = (*rollout.teacher_prefix_ids, *rollout.response_ids[:i])
                assert teacher[n - skipped] == {(read, len(read) - 1)}
                scored.append((a, i))
    return scored


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads are far slower on small tensors if another process is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PREFIXES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=4)
LENGTHS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=9)


TWO_PROMPTS = [(3, 4), (5, 2)], [(0, 4), (0, 3), (0, 3), (1, 4), (1, 3), (1, 4)]


@pytest.mark.parametrize("ranks", WORLDS, ids=str)
@settings(max_examples=25, deadline=None)
@given(PREFIXES, LENGTHS, st.booleans(), st.sampled_from(PACKINGS))
@example(*TWO_PROMPTS, False, PACKINGS[-1])
@example(*TWO_PROMPTS, False, PACKINGS[1])
@example(*TWO_PROMPTS, True, PACKINGS[-1])
@example([(1, 20)], [(0, 1), (0, 1), (0, 3)], False, PACKINGS[-1])
@example([(12, 1)], [(0, 9)], True, PACKINGS[0])
def test_compared_rows_have_read_the_same_response_up_to_the_same_token(
    ranks, prefixes, lengths, trace, packing
) -> None:
    rollouts = make_rollouts(prefixes, lengths, trace)
    plans = [plan(rollouts, layout, packing, seed=3, step=5) for layout in ranks.layouts()]
    scored: list[tuple[int, int]] = []
    for batches in zip(*plans, strict=True):
        for micro_batches in zip(*batches, strict=True):
            scored += compared(rollouts, ranks, micro_batches)
    every = Counter((a, i) for a, rollout in enumerate(rollouts) for i in range(len(rollout.response_ids)))
    assert Counter(scored) == every, "a token is scored twice, or never"
