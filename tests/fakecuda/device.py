"""A fake CUDA device for a CPU build of PyTorch: streams, events and functions of ``torch.cuda``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

GIB = 2**30
CARD = int(79.1 * GIB)
"""Memory of the fake GPU in bytes."""

_numbers = count(1)


class FakeEvent:
    """An event of the fake device; it has always happened."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, stream: object = None) -> FakeEvent:
        return self

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None:
        _on_sync("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


class FakeStream:
    """A stream of the fake device. Its number selects the memory pool of allocations made while it is current."""

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        self.number = next(_numbers)
        self.device = torch.device("cuda", 0)
        self.cuda_stream = self.stream_id = self.number

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return event or FakeEvent()

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        _on_sync("Stream.synchronize")

    def query(self) -> bool:
        return True


class _FakeDevice(contextlib.nullcontext[None]):
    """Replacement of the context manager ``torch.cuda.device``."""

    def __init__(self, *_: object) -> None:
        super().__init__()


_default = FakeStream()
_current = [_default]
_on_sync: Callable[[str], None] = lambda kind: None  # noqa: E731


def current_stream(device: object = None) -> FakeStream:
    """Return the innermost stream of ``torch.cuda.stream``, or the default stream.

    Autograd runs the backward in another thread, while the main thread waits; both threads use the same stack.
    """
    return _current[-1]


@contextlib.contextmanager
def _stream(stream: FakeStream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    _current.append(stream)
    try:
        yield
    finally:
        _current.pop()


def install(on_sync: Callable[[str], None], empty_cache: Callable[[], None]) -> None:
    """Replace functions of ``torch.cuda`` for the rest of the process.

    ``on_sync`` is called with the name of a function that waits for the device. ``empty_cache`` replaces
    ``torch.cuda.empty_cache``.
    """
    global _on_sync
    _on_sync = on_sync
    properties = SimpleNamespace(
        total_memory=CARD, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0
    )
    replaced: dict[str, Any] = {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "device": _FakeDevice,
        "stream": _stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: _default,
        "synchronize": lambda device=None: on_sync("torch.cuda.synchronize"),
        "empty_cache": empty_cache,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (CARD, CARD),
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "_lazy_init": lambda: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = current_stream  # type: ignore[assignment]
