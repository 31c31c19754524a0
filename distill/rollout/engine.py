"""The engine that generates rollouts: protocol, state machine, verification of a sync, seeds of responses."""

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
"""Returns True once a stop was requested and the responses are no longer needed."""
State = Literal["asleep", "weights", "synced", "ready", "closed"]


class GenerationCancelled(Exception):
    """Generation was cancelled by a stop request."""


class SyncError(RuntimeError):
    """The engine's weights are not the student's.

    ``tensor``: Hugging Face name of the first wrong tensor; ``found_in``: the check that failed, either of the tensors
    that the engine receives ("transfer") or of the weights in its memory ("memory").
    """

    def __init__(self, reason: str, tensor: str = "", found_in: Literal["transfer", "memory"] = "transfer") -> None:
        super().__init__(reason)
        self.tensor = tensor
        self.found_in = found_in


class Weights(Protocol):
    """The student's weights as one sync sends them."""

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield each complete tensor with its Hugging Face name and the bit sums that the sender computed."""


class Engine(Protocol):
    """What the training loop calls: a state machine asleep -> weights -> synced -> ready -> asleep.

    A call in the wrong state raises RuntimeError. A job has ``replicas`` engines; this is number ``replica``.
    """

    replica: int
    replicas: int
    residual_bytes: int
    """Device memory outside torch's allocator that was still in use after the last sleep; 0 if sleep frees nothing."""
    pool_bytes: int
    """Bytes that torch counts as allocated although they are free while the engine sleeps."""
    window: int
    """Maximum number of tokens of a prompt and its response together."""

    def share_of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the prompts that this engine generates for, out of those of all engines."""

    def wake(self, what: Literal["weights", "kv"]) -> None:
        """Allocate the memory of the weights (when asleep) or of the key-value cache (when synced)."""

    def sync(self, weights: Weights, version: int) -> SyncReport:
        """Receive and verify all weights; collective over all ranks, with the tensors in the same order."""

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probs, in nats at temperature 1, of all tokens but the first.

        Collective over the engine's ranks; only when ready.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """Sample responses to the prompts; only when ready, any number of times.

        Collective over the engine's ranks: each passes the same prompts, and each response is returned on one of them.
        ``cancelled`` is called before every token; once it returns True, the result is an empty list. Engines of
        several ranks ignore it, because their ranks must run in lockstep.
        """

    def sleep(self) -> None:
        """Free the memory of weights and cache and discard the weights."""

    def close(self) -> None:
        """Release all resources; allowed in any state, and the last call of a run."""


class EngineBase(ABC):
    """State machine and verification, shared by all engines; a subclass implements the abstract methods.

    ``manifest``: shape of every tensor that a sync must send; ``window``: maximum number of tokens of a prompt and its
    response together; ``valid_vocab``: ids from this one on are padding of the vocabulary, refused in prompts and never
    sampled.
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
        self._sums: dict[str, BitSums] = {}  # of the last sync

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

        Raises SyncError if a tensor is missing, duplicate, unknown or of another shape, or if its bits differ from the
        sender's on arrival or in the engine's memory. The engine cannot be used afterwards.
        """
        self._expect("weights", "sync")
        started = time.monotonic()
        sums: dict[str, BitSums] = {}
        sizes: dict[str, int] = {}
        self._receive(self._checked(weights, sizes, sums))
        missing = sorted(self._manifest.keys() - sizes.keys())
        if missing:
            raise SyncError(f"the sync to version {version} left out {len(missing)} tensors: {missing[:3]}", missing[0])
        self._verify(sums)
        differ = changed_names(self._sums, sums)
        self._sums = sums
        self._version = version
        self.state = "synced"
        seconds, differing = time.monotonic() - started, sum(sizes[name] for name in differ)
        return SyncReport(version, len(sizes), sum(sizes.values()), seconds, len(differ), differing)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """See Engine.probe. Raises RuntimeError if a log-prob is not finite."""
        self._expect("ready", "probe")
        self._check_ids("the probe", token_ids)
        found = self._probe(token_ids)
        assert len(found) == len(token_ids) - 1, (len(found), len(token_ids))
        if not all(map(math.isfinite, found)):
            raise RuntimeError(f"the engine's log-probs of the probe prompt are not finite at version {self._version}")
        return found

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """See Engine.generate. Raises RuntimeError for a prompt outside the window or vocabulary, or a bad response."""
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

    def _expect(self, state: State, call: str) -> None:
        if self.state != state:
            raise RuntimeError(f"the engine is {self.state!r}, and {call} needs the state {state!r}")

    def _check_ids(self, what: str, token_ids: Sequence[int]) -> None:
        if not 0 < len(token_ids) < self.window:
            raise RuntimeError(
                f"{what} has {len(token_ids)} tokens, and the engine's window of {self.window} tokens needs at least 1"
                f" and at most {self.window - 1}"
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self._valid_vocab:
            raise RuntimeError(f"{what} contains a token id outside 0..{self._valid_vocab - 1}")

    def _check_response(self, rollout: Rollout, sampling: Sampling) -> None:
        name = f"response {rollout.response_index} to prompt {rollout.prompt.prompt_id}"
        if not all(map(math.isfinite, rollout.logprobs)):
            raise RuntimeError(
                f"the engine's log-probs of {name} are not finite: its weights or its kernels are broken"
            )
        if not 0 <= min(rollout.response_ids) <= max(rollout.response_ids) < self._valid_vocab:
            raise RuntimeError(f"the engine sampled a token id outside 0..{self._valid_vocab - 1} in {name}")
        stops = [i for i, token in enumerate(rollout.response_ids) if token in sampling.stop_token_ids]
        last = len(rollout.response_ids) - 1
        if stops != ([last] if rollout.finish == "stop" else []):
            raise RuntimeError(
                f"{name} has {last + 1} tokens, finish={rollout.finish!r} and stop tokens at {stops}: a response has"
                " one stop token, its last, exactly if it finished with 'stop'"
            )

    def _checked(
        self, weights: Weights, sizes: dict[str, int], sums: dict[str, BitSums]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor after verifying it on arrival; fills ``sizes`` (in bytes) and the sender's ``sums``."""
        for name, tensor, sent in weights.with_sums():
            if name in sizes:
                raise SyncError(f"the sync sent {name} twice", name)
            if name not in self._manifest:
                raise SyncError(f"the sync sent {name}, which the engine's model does not have", name)
            if tensor.shape != self._manifest[name]:
                shape = tuple(self._manifest[name])
                raise SyncError(f"the sync sent {name} with shape {tuple(tensor.shape)} instead of {shape}", name)
            arrived = BitSums(*bit_sums(tensor).tolist())
            if arrived != sent:
                raise SyncError(f"{name} changed during the sync: its bit sums were {sent}, now {arrived}", name)
            sums[name] = sent
            sizes[name] = tensor.numel() * tensor.element_size()
            yield name, tensor

    @abstractmethod
    def _wake_weights(self) -> None: ...

    @abstractmethod
    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    @abstractmethod
    def _verify(self, sent: Mapping[str, BitSums]) -> None:
        """Raise SyncError unless the weights in the engine's memory have the bit sums ``sent``."""

    @abstractmethod
    def _wake_kv(self) -> None: ...

    @abstractmethod
    def _probe(self, token_ids: Sequence[int]) -> list[float]: ...

    @abstractmethod
    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[Rollout]:
        """Sample the responses; raises GenerationCancelled, with no request left running, once ``cancelled()``."""

    @abstractmethod
    def _sleep(self) -> None: ...

    def _close(self) -> None:
        self._sleep()


def response_seed(seed: int, step: int, prompt_id: int, response_index: int) -> int:
    """Return the 63-bit seed of one response; a hash, so that neighbouring responses have unrelated seeds."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{response_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for responses outside training, whose (step, prompt, response) may equal a training one."""
    digest = hashlib.blake2b(f"{stream}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def response_limit(sampling: Sampling, prompt: Prompt, window: int) -> int:
    """Return the maximum number of tokens of a response to ``prompt``."""
    total = window if sampling.max_total_length is None else min(window, sampling.max_total_length)
    limit = min(sampling.max_new_tokens, total - len(prompt.student_ids))
    assert limit >= 1, (limit, len(prompt.student_ids))
    return limit


def longest_first(prompts: Sequence[Prompt]) -> list[int]:
    """Return the indices of ``prompts`` by decreasing length.

    Prompts of similar length then share a batch, and the slowest ones start first.
    """
    return sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].student_ids), i))
