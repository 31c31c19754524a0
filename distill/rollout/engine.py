"""The engine that generates: a protocol, the state machine all members share, and what every sync must prove."""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from distill.model.checksum import BitSums, bit_sums, changed_names
from distill.types import Prompt, Rollout, Sampling, SyncReport

Cancelled = Callable[[], bool]
State = Literal["asleep", "weights", "synced", "ready", "closed"]


class GenerationCancelled(Exception):
    """Nobody waits for the answers any more."""


class Weights(Protocol):
    """The student's weights as one sync sends them."""

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield each tensor, complete, with its Hugging Face name and the bit sums that its sender computed."""


class Engine(Protocol):
    """What the loop needs of whoever generates: asleep -> weights -> synced -> ready -> asleep, anything else raises.

    ``replica`` of ``replicas`` tells which share of the prompts is this engine's.
    """

    replica: int
    replicas: int
    residual_bytes: int
    """Device memory in use outside torch after the last sleep; 0 where sleeping frees none."""
    pool_bytes: int
    """Bytes that torch counts as given out and that are free while the engine sleeps."""
    window: int
    """Maximum number of tokens of a prompt and its response together."""

    def share_of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the prompts that this engine generates for, out of those of all engines."""

    def wake(self, what: Literal["weights", "kv"]) -> None:
        """Take back the memory of the weights (from asleep) or of the key-value cache (from synced)."""

    def sync(self, weights: Weights, version: int) -> SyncReport:
        """Receive every weight and prove that it arrived; all ranks, same order."""

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs in nats of every token after the first, at temperature 1; the engine's own ranks, while ready."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """Answer the prompts; the engine's own ranks, any number of times while ready.

        Every rank of an engine brings the same prompts and gets its own part of the answers: each answer is one
        rank's, whose work it is to hand it on. ``cancelled`` is asked at every token: once it is true there are no
        answers at all; an engine of several ranks, which go in step, doesn't ask.
        """

    def sleep(self) -> None:
        """Free weights and cache; the weights are forgotten."""

    def close(self) -> None:
        """Let go of everything, in any state; the last thing a run does."""


class EngineBase(ABC):
    """The state machine and the proofs, the same for all members; a member fills in the verbs with underscores.

    ``manifest``: the shape of every tensor a sync must bring; ``window``: prompt and answer together, in tokens;
    ``valid_vocab``: ids at or past it are padding, and are neither read nor sampled.
    """

    def __init__(
        self, manifest: Mapping[str, torch.Size], window: int, valid_vocab: int, replica: int, replicas: int
    ) -> None:
        self.replica = replica
        self.replicas = replicas
        self.residual_bytes = 0
        self.pool_bytes = 0
        self.state: State = "asleep"
        self._manifest = dict(manifest)
        self.window = window
        self._valid_vocab = valid_vocab
        self._version = -1
        self._sums: dict[str, BitSums] = {}

    def share_of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """See Engine.share_of."""
        return prompts[self.replica :: self.replicas]

    def wake(self, what: Literal["weights", "kv"]) -> None:
        """See Engine.wake."""
        if what == "weights":
            self._expect("asleep", "wake('weights')")
            self._wake_weights()
            self.state = "weights"
        else:
            self._expect("synced", "wake('kv')")
            self._wake_kv()
            self.state = "ready"

    def sync(self, weights: Weights, version: int) -> SyncReport:
        """See Engine.sync.

        Raises RuntimeError if a tensor is missing, doubled, unknown, of another shape, not finite, or if its bits are
        not the sender's, at the engine's door or in its memory; the engine is of no use afterwards.
        """
        self._expect("weights", "sync")
        started = time.monotonic()
        sums: dict[str, BitSums] = {}
        seen: dict[str, int] = {}
        self._receive(self._checked(weights, seen, sums))
        missing = self._manifest.keys() - seen.keys()
        if missing:
            raise RuntimeError(f"the sync to version {version} left out {len(missing)} tensors: {sorted(missing)[:3]}")
        self._verify(sums)
        differ = changed_names(self._sums, sums)
        self._sums = sums
        self._version = version
        self.state = "synced"
        seconds, differing = time.monotonic() - started, sum(seen[name] for name in differ)
        return SyncReport(version, len(seen), sum(seen.values()), seconds, len(differ), differing)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """See Engine.probe. Raises RuntimeError where a log-prob isn't finite."""
        self._expect("ready", "probe")
        self._check_ids("the probe", token_ids)
        found = self._probe(token_ids)
        assert len(found) == len(token_ids) - 1, (len(found), len(token_ids))
        if not all(map(math.isfinite, found)):
            raise RuntimeError(f"the engine's log-probs of the probe are not finite at version {self._version}")
        return found

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """See Engine.generate. Raises RuntimeError for a prompt it can't read and for answers that can't be right."""
        self._expect("ready", "generate")
        for prompt in prompts:
            self._check_ids(f"prompt {prompt.prompt_id}", prompt.student_ids)
        try:
            rollouts = self._generate(prompts, sampling, step, cancelled or (lambda: False))
        except GenerationCancelled:
            return []
        for rollout in rollouts:
            self._check_response(rollout, sampling)
        return rollouts

    def sleep(self) -> None:
        """See Engine.sleep."""
        self._expect("ready", "sleep")
        self._sleep()
        self.state = "asleep"

    def close(self) -> None:
        """See Engine.close."""
        if self.state != "closed":
            self._close()
        self.state = "closed"

    def _expect(self, state: State, verb: str) -> None:
        if self.state != state:
            raise RuntimeError(f"the engine can {verb} only when {state}, and it is {self.state}")

    def _check_ids(self, what: str, token_ids: Sequence[int]) -> None:
        if not 0 < len(token_ids) < self.window:
            raise RuntimeError(
                f"{what} has {len(token_ids)} tokens; the engine's window of {self.window} needs one more"
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self._valid_vocab:
            raise RuntimeError(f"{what} holds a token id that is not in 0..{self._valid_vocab - 1}")

    def _check_response(self, rollout: Rollout, sampling: Sampling) -> None:
        if not all(map(math.isfinite, rollout.logprobs)):
            raise RuntimeError(
                f"the engine's log-probs of answer {rollout.response_index} to prompt {rollout.prompt.prompt_id} are"
                " not finite: its weights or its kernels are broken"
            )
        if not 0 <= min(rollout.response_ids) <= max(rollout.response_ids) < self._valid_vocab:
            raise RuntimeError(f"the engine sampled a token id that is not in 0..{self._valid_vocab - 1}")
        stops = [i for i, token in enumerate(rollout.response_ids) if token in sampling.stop_token_ids]
        last = len(rollout.response_ids) - 1
        if stops != ([last] if rollout.finish == "stop" else []):
            raise RuntimeError(
                f"answer {rollout.response_index} to prompt {rollout.prompt.prompt_id} ended by {rollout.finish} after"
                f" {last + 1} tokens, with stop tokens at {stops}"
            )

    def _checked(
        self, weights: Weights, seen: dict[str, int], sums: dict[str, BitSums]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor, sent in weights.with_sums():
            if name in seen:
                raise RuntimeError(f"the sync sent {name} twice")
            if name not in self._manifest:
                raise RuntimeError(f"the sync sent {name}, which the engine's model does not have")
            if tensor.shape != self._manifest[name]:
                raise RuntimeError(
                    f"the sync sent {name} as {tuple(tensor.shape)}; it is {tuple(self._manifest[name])}"
                )
            arrived = BitSums(*bit_sums(tensor).tolist())
            if arrived != sent:
                raise RuntimeError(f"{name} did not arrive as it was sent: bit sums {arrived}, not {sent}")
            sums[name] = sent
            seen[name] = tensor.numel() * tensor.element_size()
            yield name, tensor

    @abstractmethod
    def _wake_weights(self) -> None: ...

    @abstractmethod
    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    @abstractmethod
    def _verify(self, sent: Mapping[str, BitSums]) -> None:
        """Raise RuntimeError unless what lies in the engine's memory is what was sent."""

    @abstractmethod
    def _wake_kv(self) -> None: ...

    @abstractmethod
    def _probe(self, token_ids: Sequence[int]) -> list[float]: ...

    @abstractmethod
    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[Rollout]: ...

    @abstractmethod
    def _sleep(self) -> None: ...

    def _close(self) -> None:
        self._sleep()


def response_seed(seed: int, step: int, prompt_id: int, answer: int) -> int:
    """The seed of one answer, of 63 bits; neighbours are unrelated, so no two answers share a stream."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream_seed(seed: int, stream: str) -> int:
    """A seed for answers that are no training answers, of 63 bits: their (step, prompt, answer) may be the same."""
    digest = hashlib.blake2b(f"{stream}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def response_limit(sampling: Sampling, prompt: Prompt, window: int) -> int:
    """How many tokens an answer to ``prompt`` may have."""
    total = window if sampling.max_total_length is None else min(window, sampling.max_total_length)
    limit = min(sampling.max_new_tokens, total - len(prompt.student_ids))
    assert limit >= 1, (limit, len(prompt.student_ids))
    return limit


def longest_first(prompts: Sequence[Prompt]) -> list[int]:
    """Places of ``prompts``, the longest first: prompts of like length run together, and the dearest begins."""
    return sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].student_ids), i))
