"""Generation engines: interface, and base class that verifies weight syncs; random seeds of responses."""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.model.checksum import BitSums, bit_sums, changed_names
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

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """Sample responses to the prompts; requires the state ready and does not change the state.

        Collective over the engine's ranks: all of these ranks pass the same prompts, and each response is returned on
        only one of these ranks. ``step``: number that is hashed into the random seed of each response. ``cancelled`` is
        called before every token; if it returns True, the result is an empty list. Engines of several ranks ignore
        ``cancelled``, because their ranks must run in lockstep.
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

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled | None = None
    ) -> list[Rollout]:
        """Sample responses to the prompts; see Engine.generate.

        Returns an empty list if ``cancelled`` returned True. Raises RuntimeError if a prompt is too long or contains an
        invalid token id, or if a response is invalid.
        """
        self._expect("ready", "generate")
        for prompt in prompts:
            self._check_ids(f"prompt {prompt.prompt_id}", prompt.student_ids)
        try:
            rollouts = self._generate(prompts, sampling, step, cancelled or (lambda: False))
        except GenerationCancelled:
            return []
        for rollout in rollouts:
            seed = response_seed(sampling.seed, step, rollout.prompt.prompt_id, rollout.response_index)
            self._check_response(rollout, sampling.stop_token_ids, wants_logprobs(sampling, seed))
        return rollouts

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

    def _check_response(self, rollout: Rollout, stop_token_ids: Sequence[int], with_logprobs: bool) -> None:
        name = f"response {rollout.response_index} to prompt {rollout.prompt.prompt_id}"
        ids_R, logprobs = np.array(rollout.response_ids), np.array(rollout.logprobs)
        last = len(ids_R) - 1
        if len(logprobs) != (len(ids_R) if with_logprobs else 0):
            raise RuntimeError(f"the engine returned {len(logprobs)} log-probs for the {last + 1} tokens of {name}")
        if not np.isfinite(logprobs).all():
            raise RuntimeError(
                f"the engine's log-probs of {name} are not finite: the engine's weights or kernels are faulty"
            )
        if not 0 <= ids_R.min() <= ids_R.max() < self._valid_vocab:
            raise RuntimeError(f"the engine sampled a token id outside 0..{self._valid_vocab - 1} in {name}")
        stops = np.flatnonzero(np.isin(ids_R, list(stop_token_ids))).tolist()
        if stops != ([last] if rollout.finish == "stop" else []):
            raise RuntimeError(
                f"{name} has {last + 1} tokens, finish={rollout.finish!r} and stop tokens at {stops}: only the last"
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
    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[Rollout]:
        """Sample the responses; if ``cancelled()`` returns True, stop and raise GenerationCancelled."""

    @abstractmethod
    def _sleep(self) -> None: ...

    def _close(self) -> None:
        self._sleep()


def response_seed(seed: int, step: int, prompt_id: int, response_index: int) -> int:
    """Return the 63-bit random seed of one response, a hash of the arguments."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{response_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def wants_logprobs(sampling: Sampling, seed: int) -> bool:
    """Return whether the engine returns log-probs for the response with random seed ``seed``.

    The choice depends only on the seed, so it does not depend on the batch or on the number of ranks.
    """
    return seed % sampling.logprob_interval == 0


def stream_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for sampling responses outside training, derived from the run's ``seed``.

    ``stream``: purpose of these responses, such as "validation"; each purpose gets a different seed. With ``seed``
    itself, a response would use the same random numbers as the training response with equal step, prompt and index.
    """
    digest = hashlib.blake2b(f"{stream}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def response_limit(sampling: Sampling, prompt: Prompt, window: int) -> int:
    """Return the maximum number of tokens of a response to ``prompt``.

    ``window``: the engine's maximum number of tokens of a prompt and its response together.
    """
    total = window if sampling.max_total_length is None else min(window, sampling.max_total_length)
    most = sampling.max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
    limit = min(sampling.max_new_tokens, most, total - len(prompt.student_ids))
    assert limit >= 1, (limit, len(prompt.student_ids))
    return limit


def indices_to_generate(sampling: Sampling, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the indices of the responses to generate for each prompt, without those in ``Sampling.omitted``."""
    omitted, indices = set(sampling.omitted), range(sampling.responses_per_prompt)
    return [[i for i in indices if (prompt.prompt_id, i) not in omitted] for prompt in prompts]


def longest_first(prompts: Sequence[Prompt]) -> list[int]:
    """Return the indices of ``prompts``, sorted by decreasing length of the prompt in tokens.

    In this order, prompts of similar length share a batch, and the slowest prompts start first.
    """
    return sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].student_ids), i))
