"""The engine that generates: a protocol, the state machine all members share, and what every sync must prove."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from distill.types import Prompt, Rollout, Sampling, SyncReport

State = Literal["asleep", "weights", "synced", "ready", "closed"]


class Engine(Protocol):
    """What the loop needs of whoever generates: asleep -> weights -> synced -> ready -> asleep, anything else raises.

    ``replica`` of ``replicas`` tells which share of the prompts is this engine's.
    """

    replica: int
    replicas: int

    def wake(self, what: Literal["weights", "kv"]) -> None:
        """Take back the memory of the weights (from asleep) or of the key-value cache (from synced)."""

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Receive every weight under its Hugging Face name; all ranks, same order."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Rollout]:
        """Answer the prompts; the engine's own ranks, any number of times while ready."""

    def sleep(self) -> None:
        """Free weights and cache; the weights are forgotten."""

    def close(self) -> None:
        """Let go of everything, in any state."""


class EngineBase(ABC):
    """The state machine and the manifest, the same for all members; a member fills in the verbs with underscores."""

    def __init__(self, manifest: Mapping[str, torch.Size], replica: int, replicas: int) -> None:
        self.replica = replica
        self.replicas = replicas
        self.state: State = "asleep"
        self._manifest = dict(manifest)
        self._version = -1

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

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """See Engine.sync. Raises RuntimeError if a tensor is missing, doubled, unknown or of another shape."""
        self._expect("weights", "sync")
        started = time.monotonic()
        seen: dict[str, int] = {}
        self._receive(self._checked(weights, seen))
        missing = self._manifest.keys() - seen.keys()
        if missing:
            raise RuntimeError(f"the sync to version {version} left out {len(missing)} tensors: {sorted(missing)[:3]}")
        self._version = version
        self.state = "synced"
        return SyncReport(version, len(seen), sum(seen.values()), time.monotonic() - started)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Rollout]:
        """See Engine.generate."""
        self._expect("ready", "generate")
        return self._generate(prompts, sampling, step)

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

    def _checked(self, weights: Iterable[tuple[str, Tensor]], seen: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in seen:
                raise RuntimeError(f"the sync sent {name} twice")
            if name not in self._manifest:
                raise RuntimeError(f"the sync sent {name}, which the engine's model does not have")
            if tensor.shape != self._manifest[name]:
                raise RuntimeError(
                    f"the sync sent {name} as {tuple(tensor.shape)}; it is {tuple(self._manifest[name])}"
                )
            seen[name] = tensor.numel() * tensor.element_size()
            yield name, tensor

    @abstractmethod
    def _wake_weights(self) -> None: ...

    @abstractmethod
    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    @abstractmethod
    def _wake_kv(self) -> None: ...

    @abstractmethod
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Rollout]: ...

    @abstractmethod
    def _sleep(self) -> None: ...

    def _close(self) -> None:
        self._sleep()


def answer_seed(seed: int, step: int, prompt_id: int, answer: int) -> int:
    """The seed of one answer, of 63 bits; neighbours are unrelated, so no two answers share a stream."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
