"""Generation engines: interface, and base class that verifies weight syncs and responses."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.model.checksum import BitSums, bit_sums, changed_names
from distill.rollout.requests import Cutoff, OnEnded, Request, Segment, requests_of, rollout_of
from distill.types import Prompt, Rollout, Sampling, SyncReport

Cancelled = Callable[[], bool]
"""Function that returns True if generation must be cancelled, because a stop was requested."""
State = Literal["asleep", "weights", "synced", "ready", "closed"]


class GenerationCancelled(Exception):
    """Generation was cancelled by a stop request."""


FoundIn = Literal["names", "transfer", "memory", "repacking"]
"""Name of the check that failed in a sync of weights to the engine.

``names``: names and shapes of the sent tensors. ``transfer``: checksums of the received tensors. ``memory``: checksums
of the weights in the engine's memory. ``repacking``: whether the engine has converted the received weights to the
memory format of its kernels.
"""


class SyncError(RuntimeError):
    """Error of a sync: the engine's weights differ from the student's.

    ``tensor``: name of the first wrong tensor. ``found_in``: the check that failed.
    """

    def __init__(self, reason: str, tensor: str = "", found_in: FoundIn = "names") -> None:
        super().__init__(reason)
        self.tensor = tensor
        self.found_in = found_in


class Weights(Protocol):
    """The student's weights, as sent to the engine in one sync."""

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield (Hugging Face name, unsharded tensor, checksums computed before sending) for each weight."""


class Engine(Protocol):
    """Interface of a generation engine, which cycles through the states asleep, weights, synced, ready.

    asleep: no weights are in memory; weights: memory for the weights is allocated; synced: the weights are loaded;
    ready: the key-value cache is allocated too, and the engine can generate. A call in the wrong state raises
    RuntimeError. ``replicas``: number of engines in the job. ``replica``: index of this engine.
    """

    replica: int
    replicas: int
    residual_bytes: int
    """Bytes of device memory in use outside torch's allocator after the last sleep; 0 if not measured."""
    pool_bytes: int
    """Size in bytes of the engine's memory pool; 0 without a pool.

    Torch counts the pool as allocated even while the engine sleeps and the pool uses no device memory.
    """
    window: int
    """Maximum number of tokens of a prompt and its response together."""

    @property
    def version(self) -> int:
        """Return the version of the weights of the last sync: the number of finished training steps."""

    def share_of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the prompts for this engine; ``prompts``: the prompts of all engines."""

    def wake(self, what: Literal["weights", "kv"]) -> None:
        """Allocate memory for the weights or for the key-value cache.

        ``what``: "weights" requires the state asleep; "kv" (the cache) requires the state synced.
        """

    def sync(self, weights: Weights, version: int) -> SyncReport:
        """Load and verify all weights; requires the state ``weights``; collective over all ranks of the job.

        ``version``: number of finished training steps, which identifies the weights.
        """

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probs of all ``token_ids`` except the first, in nats at temperature 1.

        Collective over the engine's ranks; requires the state ready.
        """

    def segments(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        cutoff: Cutoff | None = None,
        cancelled: Cancelled | None = None,
        on_ended: OnEnded | None = None,
    ) -> list[Segment]:
        """Sample a segment for each request; requires the state ready and does not change the state.

        Collective over the engine's ranks: all of these ranks pass the same requests, and each segment is returned on
        only one of these ranks, in the order of the requests. Temperature, top-p, top-k and stop tokens are those of
        ``sampling``; seeds and limits are those of the requests. ``cutoff``: stops segments that take too long; a
        segment that it stopped has at least ``cutoff.limit()`` tokens. ``cancelled`` is called before every token; if
        it returns True, the result is an empty list. Engines of several ranks ignore ``cancelled``, because their ranks
        must run in lockstep. ``on_ended`` is called with each segment that is not cut, soon after it ended, on the rank
        that returns it. After an exception in ``on_ended`` or ``cutoff``, the engine can only be closed.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """Sample complete responses to the prompts with ``segments``.

        Collective over the engine's ranks, which all pass the same prompts. ``step``: number that is hashed into the
        random seed of each response. ``cancelled``: see ``segments``.
        """

    def sleep(self) -> None:
        """Discard the weights and the key-value cache, and free their memory."""

    def close(self) -> None:
        """Release all resources; allowed in any state. No other method may be called afterwards."""


class EngineBase(ABC):
    """Base class of all engines: state machine, verification of syncs, checks of prompts and responses.

    ``manifest`` maps the Hugging Face name of every tensor that a sync must send to the tensor's shape. ``window``:
    maximum number of tokens of a prompt and its response together. ``valid_vocab``: number of valid token ids. Ids of
    ``valid_vocab`` and above are padding of the vocabulary: they are refused in prompts and never sampled. ``replica``:
    index of this engine among the ``replicas`` engines of the job.
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

    @property
    def version(self) -> int:
        """Return the version of the weights of the last sync; -1 before the first one."""
        return self._version

    def share_of(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return this engine's prompts: ``prompts[replica::replicas]``.

        This divides the prompts evenly among the ``replicas`` engines.
        """
        return prompts[self.replica :: self.replicas]

    def wake(self, what: Literal["weights", "kv"]) -> None:
        """Allocate the memory of the weights or of the key-value cache; see Engine.wake."""
        if what == "weights":
            self._expect("asleep", "wake('weights')")
            self._wake_weights()
            self.state = "weights"
        else:
            self._expect("synced", "wake('kv')")
            self._wake_kv()
            self.state = "ready"

    def sync(self, weights: Weights, version: int) -> SyncReport:
        """Load and verify all weights; see Engine.sync.

        Raises SyncError if a tensor is missing, duplicate, unknown or has a wrong shape, or if the checksums of a
        tensor differ from the sender's, on arrival or in the engine's memory. The engine cannot be used after a
        SyncError.
        """
        self._expect("weights", "sync")
        started = time.monotonic()
        sums: dict[str, BitSums] = {}
        sizes: dict[str, int] = {}
        self._receive(self._checked(weights, sizes, sums))
        missing = sorted(self._manifest.keys() - sizes.keys())
        if missing:
            raise SyncError(
                f"the sync of weights version {version} did not send {len(missing)} tensors, such as {missing[:3]}",
                missing[0],
            )
        self._verify(sums)
        differ = changed_names(self._sums, sums)
        self._sums = sums
        self._version = version
        self.state = "synced"
        seconds, differing = time.monotonic() - started, sum(sizes[name] for name in differ)
        return SyncReport(version, len(sizes), sum(sizes.values()), seconds, len(differ), differing)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probs of ``token_ids`` except the first, in nats; see Engine.probe.

        Raises RuntimeError if a log-prob is not finite.
        """
        self._expect("ready", "probe")
        self._check_ids("the probe", token_ids)
        found = self._probe(token_ids)
        assert len(found) == len(token_ids) - 1, (len(found), len(token_ids))
        if not all(map(math.isfinite, found)):
            raise RuntimeError(
                f"the engine's log-probs of the probe prompt are not finite (weights after step {self._version})"
            )
        return found

    def segments(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        cutoff: Cutoff | None = None,
        cancelled: Cancelled | None = None,
        on_ended: OnEnded | None = None,
    ) -> list[Segment]:
        """Sample a segment for each request; see Engine.segments.

        Returns an empty list if ``cancelled`` returned True. Raises RuntimeError if the input of a request is too long
        or contains an invalid token id, or if a segment is invalid.
        """
        self._expect("ready", "segments")
        for request in {(each.prompt.prompt_id, each.generated_ids): each for each in requests}.values():
            self._check_ids(f"prompt {request.prompt.prompt_id}", request.input_ids)

        def ended(segment: Segment) -> None:
            if on_ended is not None:
                self._check_segment(segment, sampling.stop_token_ids)
                on_ended(segment)

        try:
            segments = self._segments(requests, sampling, cutoff, cancelled or (lambda: False), ended)
        except GenerationCancelled:
            return []
        for segment in segments:
            self._check_segment(segment, sampling.stop_token_ids)
        return segments

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """Sample complete responses to the prompts; see Engine.generate and ``segments``."""
        for prompt in prompts:
            self._check_ids(f"prompt {prompt.prompt_id}", prompt.student_ids)
        requests = requests_of(prompts, sampling, step, self.window)
        segments = self.segments(requests, sampling, cancelled=cancelled)
        return [rollout_of(segment, self._version) for segment in segments]

    def sleep(self) -> None:
        """Discard the weights and free the engine's memory; see Engine.sleep."""
        self._expect("ready", "sleep")
        self._sleep()
        self.state = "asleep"

    def close(self) -> None:
        """Release all resources; a second call has no effect."""
        if self.state != "closed":
            self._close()
        self.state = "closed"

    def _expect(self, state: State, call: str) -> None:
        if self.state != state:
            raise RuntimeError(f"the engine is in state {self.state!r}, but {call} requires state {state!r}")

    def _check_ids(self, what: str, token_ids: Sequence[int]) -> None:
        if not 0 < len(token_ids) < self.window:
            raise RuntimeError(
                f"{what} has {len(token_ids)} tokens, but must have 1 to {self.window - 1}: the engine's window for"
                f" prompt and response is {self.window} tokens"
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self._valid_vocab:
            raise RuntimeError(f"{what} contains a token id outside 0..{self._valid_vocab - 1}")

    def _check_segment(self, segment: Segment, stop_token_ids: Sequence[int]) -> None:
        """Raise RuntimeError if ids, log-probs or the finish reason of the segment are invalid."""
        request = segment.request
        name = f"response {request.response_index} to prompt {request.prompt.prompt_id}"
        ids_R, logprobs = np.array(segment.ids, dtype=np.int64), np.array(segment.logprobs)
        count = len(ids_R)
        if len(logprobs) != (count if request.with_logprobs else 0):
            raise RuntimeError(f"the engine returned {len(logprobs)} log-probs for the {count} tokens of {name}")
        if not np.isfinite(logprobs).all():
            raise RuntimeError(
                f"the engine's log-probs of {name} are not finite: the engine's weights or kernels are faulty"
            )
        if ((ids_R < 0) | (ids_R >= self._valid_vocab)).any():
            raise RuntimeError(f"the engine sampled a token id outside 0..{self._valid_vocab - 1} in {name}")
        stops = np.flatnonzero(np.isin(ids_R, list(stop_token_ids))).tolist()
        if stops != ([count - 1] if segment.finish == "stop" else []) or not (count or segment.finish == "cut"):
            raise RuntimeError(
                f"{name} has {count} tokens, finish={segment.finish!r} and stop tokens at {stops}: only the last"
                " token may be a stop token, and it must be a stop token if and only if finish is 'stop'"
            )

    def _checked(
        self, weights: Weights, sizes: dict[str, int], sums: dict[str, BitSums]
    ) -> Iterator[tuple[str, Tensor]]:
        """Verify each received tensor, then yield its Hugging Face name and the tensor.

        Stores the tensor's size in bytes in ``sizes`` and its checksums in ``sums``, under the same name. Raises
        SyncError if a tensor is wrong.
        """
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
                raise SyncError(
                    f"{name} changed during the sync: its checksums were {sent} and are now {arrived}", name, "transfer"
                )
            sums[name] = sent
            sizes[name] = tensor.numel() * tensor.element_size()
            yield name, tensor

    @abstractmethod
    def _wake_weights(self) -> None: ...

    @abstractmethod
    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    @abstractmethod
    def _verify(self, sent: Mapping[str, BitSums]) -> None:
        """Raise SyncError if the checksums of the weights in the engine's memory differ from ``sent``.

        ``sent`` maps each tensor's Hugging Face name to the checksums that the sender computed.
        """

    @abstractmethod
    def _wake_kv(self) -> None: ...

    @abstractmethod
    def _probe(self, token_ids: Sequence[int]) -> list[float]: ...

    @abstractmethod
    def _segments(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        cutoff: Cutoff | None,
        cancelled: Cancelled,
        on_ended: OnEnded,
    ) -> list[Segment]:
        """Sample the segments; if ``cancelled()`` returns True, stop and raise GenerationCancelled."""

    @abstractmethod
    def _sleep(self) -> None: ...

    def _close(self) -> None:
        self._sleep()
