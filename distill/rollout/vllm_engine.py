"""Generation with vLLM inside the trainer's processes; the engine sleeps while the student trains."""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distill.memory.phases import CPU_CACHE
from distill.model.checksum import BitSums
from distill.rollout.engine import Cancelled, EngineBase, GenerationCancelled
from distill.rollout.gpu_memory import CudaMemory, Memory, SleepGuard, Tag, pool_bytes
from distill.rollout.requests import (
    POLL_STEPS,
    Cutoff,
    CutoffPolling,
    OnEnded,
    Request,
    Segment,
    longest_first,
)
from distill.rollout.vllm_env import kept_allocator_options
from distill.rollout.vllm_loop import RequestLoop, Response
from distill.rollout.vllm_weights import VllmWeights
from distill.supervise.progress import heartbeat, task
from distill.types import Sampling

log = logging.getLogger(__name__)

_CPU_DEFAULTS = {
    "enforce_eager": True,  # compiling takes a minute, and there are no CUDA graphs on CPU
    # With chunked prefill, vLLM rewinds the random generators, which CPU generators do not support (vLLM 0.32).
    "enable_chunked_prefill": False,
    "block_size": 32,  # with the default of 128, responses would not share the cache of shorter prompts
    "kv_cache_memory_bytes": CPU_CACHE,
}
_PROBE_STEPS = 100
"""Maximum number of vLLM steps for the log-probs of the probe prompt."""
_SHARED_POLL_STEPS = 16
"""Value of POLL_STEPS for engines of several ranks, in which reading the bound is a collective operation."""


def fixed_arguments(can_sleep: bool) -> dict[str, Any]:
    """Return the vLLM arguments that the trainer always sets, as a dict from name to value.

    policy.generation.vllm_kwargs must not contain these arguments. ``can_sleep``: whether vLLM can sleep on this type
    of device.
    """
    return {
        "distributed_executor_backend": "external_launcher",  # the only executor that runs in the calling process
        "enable_sleep_mode": can_sleep,
        "trust_remote_code": False,  # never run code from a model's directory
        "config_format": "hf",  # read config.json even if there is also Mistral's params.json
        "load_format": "dummy",  # every step begins with a complete sync, so nothing is read from disk
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from the model's directory
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "seed": 0,
    }


def _name_shared_memory() -> None:
    """Add a random suffix to the names of the shared memory of vLLM's CPU engines; collective.

    Without the suffix, the names contain only rank numbers. Two jobs on one machine would then use the same memory, and
    the memory of a killed job would block later jobs.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, src=0)
    make_name = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{make_name(communicator)}-{token[0]}")


class VllmEngine(EngineBase):
    """A vLLM engine of ``tensor_parallel_size`` consecutive ranks.

    Creating the engine is collective over all ranks of the job. Create the engine before other models are loaded,
    because vLLM measures the free device memory at that time. Close it last, because closing destroys all process
    groups. Creating the engine does not change the random state of this process. ``model``: directory of the model.
    ``manifest``, ``window``, ``valid_vocab``: see EngineBase. ``arguments``: additional arguments of vLLM's ``LLM``, by
    name. ``memory``: source of memory measurements; None: the CUDA device, or no measurements if vLLM cannot sleep.
    """

    def __init__(
        self,
        model: str,
        manifest: Mapping[str, torch.Size],
        dtype: torch.dtype,
        window: int,
        valid_vocab: int,
        tensor_parallel_size: int = 1,
        arguments: Mapping[str, Any] | None = None,
        memory: Memory | None = None,
    ) -> None:
        from vllm import LLM
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.platforms import current_platform

        rank, size = dist.get_rank(), dist.get_world_size()
        super().__init__(manifest, window, valid_vocab, rank // tensor_parallel_size, size // tensor_parallel_size)
        self.can_sleep = bool(current_platform.is_sleep_mode_available())
        on_cpu = bool(current_platform.is_cpu())
        if tensor_parallel_size > 1 and on_cpu:
            _name_shared_memory()
        started = time.monotonic()
        with kept_random_state(), kept_threads(on_cpu), kept_allocator_options(on_cpu):
            self._llm = LLM(
                model=model,
                dtype=str(dtype).removeprefix("torch."),
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=window,
                **{
                    **(_CPU_DEFAULTS if on_cpu else {}),
                    **(arguments or {}),
                    **fixed_arguments(self.can_sleep),
                },
            )
        self._engine: Any = self._llm.llm_engine
        self._group: dist.ProcessGroup = get_tp_group().cpu_group
        self._tp_size, self._tp_rank = tensor_parallel_size, rank % tensor_parallel_size
        self._weights = VllmWeights(self._llm, manifest, tensor_parallel_size, self._group)
        self._mask_padding()
        self._loop = RequestLoop(self._engine)
        memory = memory or (CudaMemory() if self.can_sleep else None)
        self._guard = SleepGuard(memory) if memory else None
        self.pool_bytes = pool_bytes() if self.can_sleep else 0
        self._llm.sleep(level=2)
        log.info(
            "created vLLM in %.0f s: %d engine(s) of %d rank(s) for sequences of up to %d tokens; each sync loads the"
            " weights with vLLM's method %s, and vLLM's sleep mode %s",
            *(time.monotonic() - started, self.replicas, tensor_parallel_size, window, self._weights.path),
            "frees the weights and the key-value cache" if self.can_sleep else "frees no memory",
        )

    def _mask_padding(self) -> None:
        """Make vLLM mask the padding of the vocabulary: logits of ids from ``valid_vocab`` on become -inf."""
        model: Any = self._weights.model
        compute_logits, valid = model.compute_logits, self._valid_vocab

        def masked(*args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = compute_logits(*args, **kwargs)
            if logits is not None:
                logits[..., valid:] = -torch.inf
            return logits

        model.compute_logits = masked

    def _wake_weights(self) -> None:
        self._wake("weights")

    def _wake_kv(self) -> None:
        self._wake("kv_cache")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError(
                "vLLM could not clear the key-value cache of the previous weights, because requests still use it"
            )

    def _wake(self, tag: Tag) -> None:
        if self._guard is not None:
            self._guard.check_free(tag)
        self._llm.wake_up(tags=[tag])

    def _sleep(self) -> None:
        self._llm.sleep(level=2)
        if self._guard is not None:
            self.residual_bytes = self._guard.after_sleep()

    def _close(self) -> None:
        # vLLM destroys all process groups here, also those that the trainer created.
        self._engine.engine_core.shutdown()

    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._weights.receive(weights)

    def _verify(self, sent: Mapping[str, BitSums]) -> None:
        self._weights.verify(sent)

    def _probe(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        # vLLM's output processor assembles the log-probs of the prompt.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self._engine.add_request("probe", {"prompt_token_ids": list(token_ids)}, params)
        for _ in range(_PROBE_STEPS + len(token_ids)):
            for output in self._engine.step():
                return [output.prompt_logprobs[i][token].logprob for i, token in enumerate(token_ids) if i]
        raise RuntimeError("vLLM did not compute the log-probs of the probe prompt")

    def _segments(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        cutoff: Cutoff | None,
        cancelled: Cancelled,
        on_ended: OnEnded,
    ) -> list[Segment]:
        self._check_same("prompts, sampling or step", _identity(requests, sampling, cutoff, self._version))
        order = longest_first(requests)
        ordered = [requests[i] for i in order]
        segments = self._run(ordered, sampling, cutoff, cancelled if self._tp_size == 1 else None, on_ended)
        self._check_same("responses", (part for each in segments for part in (each.finish, _as_bytes(each.ids))))
        by_index = dict(zip(order, segments, strict=True))
        return [by_index[i] for i in sorted(order[self._tp_rank :: self._tp_size])]

    def _params(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # otherwise vLLM adds the stop ids of the model's directory
            seed=request.seed,
            logprobs=0 if request.with_logprobs else None,
            detokenize=False,
        )

    def _run(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        cutoff: Cutoff | None,
        cancelled: Cancelled | None,
        on_ended: OnEnded,
    ) -> list[Segment]:
        """Run ``requests`` in vLLM until all have ended or are cut; return their segments in the same order.

        Every rank of the engine returns all segments. Rank i of the engine's n ranks calls ``on_ended`` for the
        requests i, i + n, ...; the first rank reports to the cutoff and counts the ended responses for the console's
        progress report. If ``cancelled()`` returns True, removes the requests from vLLM and raises GenerationCancelled.
        """
        loop, is_first, polling = self._loop, self._tp_rank == 0, self._polling(cutoff)
        indices = {loop.add(each.input_ids, self._params(each, sampling)): i for i, each in enumerate(requests)}
        segments: dict[int, Segment] = {}
        with task(len(requests) if is_first else 0, "responses"):
            while loop.unfinished and not polling.reached(loop.fewest_tokens):
                if cancelled is not None and cancelled():
                    loop.abort()
                    raise GenerationCancelled
                ended = {indices[response.number]: response for response in loop.poll()}
                segments.update((i, _segment(requests[i], response)) for i, response in ended.items())
                if ended and cutoff is not None and is_first:
                    cutoff.ended([len(response.token_ids) for response in ended.values()])
                for i in ended:
                    heartbeat(done=1)
                    if i % self._tp_size == self._tp_rank:
                        on_ended(segments[i])
        for response in loop.abort() if loop.unfinished else []:
            i = indices[response.number]
            segments[i] = _segment(requests[i], response)
        return [segments[i] for i in range(len(requests))]

    def _polling(self, cutoff: Cutoff | None) -> CutoffPolling:
        if cutoff is None:
            return CutoffPolling(None)
        if self._tp_size == 1:
            return CutoffPolling(cutoff.limit, POLL_STEPS)
        return CutoffPolling(lambda: self._shared_limit(cutoff), _SHARED_POLL_STEPS)

    def _shared_limit(self, cutoff: Cutoff) -> int | None:
        """Return the bound that the engine's first rank reads; collective over the engine's ranks.

        The ranks must stop at the same step, because vLLM computes each step on all of them together.
        """
        bound = [cutoff.limit() if self._tp_rank == 0 else None]
        dist.broadcast_object_list(bound, group=self._group, group_src=0)
        return bound[0]

    def _check_same(self, what: str, values: Iterable[object]) -> None:
        """Raise RuntimeError on all ranks of the engine if the ranks pass different ``values``.

        Collective over the engine's ranks. ``what``: description of the values, for the message. vLLM does not compare
        the requests of the ranks, so different requests would produce wrong tokens without an error.
        """
        if self._tp_size == 1:
            return
        digest = hashlib.blake2b(digest_size=8)
        for value in values:
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
        digests = [""] * self._tp_size
        dist.all_gather_object(digests, digest.hexdigest(), group=self._group)
        if len(set(digests)) > 1:
            raise RuntimeError(f"the ranks of one vLLM engine have different {what} (digests {digests})")


def _identity(requests: Sequence[Request], sampling: Sampling, cutoff: Cutoff | None, version: int) -> Iterator[object]:
    """Yield the values that must be the same on all ranks of an engine."""
    yield sampling, cutoff is not None, version, len(requests)
    for request in requests:
        ids = request.input_ids
        yield request.prompt.prompt_id, request.response_index, request.order, len(ids)
        yield request.seed, request.max_new_tokens, request.with_logprobs
        yield _as_bytes(ids)


def _as_bytes(ids: Sequence[int]) -> bytes:
    return array("q", ids).tobytes()


def _segment(request: Request, response: Response) -> Segment:
    """Return the result of a request; a response that vLLM has not finished is cut."""
    finish = response.finish or "cut"
    if finish not in ("stop", "length", "cut"):
        raise RuntimeError(
            f"vLLM ended response {request.response_index} to prompt {request.prompt.prompt_id} with finish_reason"
            f" {finish!r} instead of 'stop' or 'length'"
        )
    return Segment(request, tuple(response.token_ids), tuple(response.logprobs), finish)  # type: ignore[arg-type]


@contextmanager
def kept_threads(on_cpu: bool) -> Iterator[None]:
    """Restore torch's number of CPU threads after the ``with`` block if vLLM runs on the CPU.

    With a GPU, vLLM sets one thread before it compiles the model, unless OMP_NUM_THREADS is set. The compiled model
    raises an error if the number of threads is another one when it runs.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if on_cpu and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the global random generators of Python, numpy and torch after the ``with`` block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_cuda is not None:
            torch.cuda.set_rng_state(on_cuda)
