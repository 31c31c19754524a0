"""Generation with vLLM inside the trainer's processes; the engine sleeps while the student trains."""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distill.memory.phases import CPU_CACHE
from distill.model.checksum import BitSums
from distill.rollout.engine import (
    Cancelled,
    EngineBase,
    GenerationCancelled,
    longest_first,
    response_limit,
    response_seed,
)
from distill.rollout.gpu_memory import CudaMemory, Memory, SleepGuard
from distill.rollout.vllm_weights import VllmWeights
from distill.supervise.progress import heartbeat, task
from distill.types import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)

_CPU_DEFAULTS = {
    "enforce_eager": True,  # compiling takes a minute, and there are no CUDA graphs on CPU
    # With chunked prefill, vLLM rewinds the random generators, which CPU generators do not support (vLLM 0.32).
    "enable_chunked_prefill": False,
    "block_size": 32,  # with the default of 128, responses would not share the cache of shorter prompts
    "kv_cache_memory_bytes": CPU_CACHE,
}
_IDLE_STEPS = 1000
"""Number of consecutive vLLM steps without a new token after which the run fails.

For each token of the prompts one more step is allowed, because vLLM needs many steps to process long prompts.
"""
_STEPS_AHEAD = 4
"""Number of vLLM steps to run after requests are cancelled.

In these steps vLLM processes the results that were still in progress.
"""


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


def _scheduling(tensor_parallel_size: int) -> dict[str, Any]:
    """Return the vLLM arguments that keep an engine's ranks in lockstep; empty if none are needed.

    Asynchronous scheduling is disabled if vLLM is older than 0.32 and the engine has several ranks. The decisions of
    the asynchronous scheduler depend on timing, which differs between ranks.
    """
    import vllm

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    return {"async_scheduling": False} if tensor_parallel_size > 1 and version < (0, 32) else {}


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
        if tensor_parallel_size > 1 and current_platform.is_cpu():
            _name_shared_memory()
        started = time.monotonic()
        with kept_random_state(), kept_threads():
            self._llm = LLM(
                model=model,
                dtype=str(dtype).removeprefix("torch."),
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=window,
                **{
                    **(_CPU_DEFAULTS if current_platform.is_cpu() else {}),
                    **(arguments or {}),
                    **fixed_arguments(self.can_sleep),
                    **_scheduling(tensor_parallel_size),
                },
            )
        self._engine: Any = self._llm.llm_engine
        self._group: dist.ProcessGroup = get_tp_group().cpu_group
        self._tp_size, self._tp_rank = tensor_parallel_size, rank % tensor_parallel_size
        self._weights = VllmWeights(self._llm, manifest, tensor_parallel_size, self._group)
        self._mask_padding()
        self._tokens_made = 0
        self._count_tokens()
        self._requests = 0
        self._memory = memory or (CudaMemory(pool_bytes) if self.can_sleep else None)
        self._guard = SleepGuard(self._memory) if self._memory else None
        self._needs = self._first_sleep()
        self.pool_bytes = pool_bytes() if isinstance(self._memory, CudaMemory) else 0
        log.info(
            "created vLLM in %.0f s: %d engine(s) of %d rank(s) for sequences of up to %d tokens; each sync loads the"
            " weights with vLLM's method %s, and vLLM's sleep mode %s",
            *(time.monotonic() - started, self.replicas, tensor_parallel_size, window, self._weights.path),
            "frees the weights and the key-value cache" if self.can_sleep else "frees no memory",
        )

    def _first_sleep(self) -> dict[str, int]:
        """Put the new engine to sleep; return the bytes of device memory that are needed to wake it.

        The result maps "weights" and "kv_cache" (key-value cache) to bytes, or to 0 if memory is not measured.
        """
        memory = self._memory
        awake = memory.free() if memory else 0
        self._llm.sleep(level=2)
        freed = memory.free() - awake if memory else 0
        parameters = self._weights.model.parameters()
        weights = sum(p.numel() * p.element_size() for p in parameters) if memory else 0
        return {"weights": weights, "kv_cache": max(0, freed - weights)}

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

    def _count_tokens(self) -> None:
        """Make vLLM count the new tokens of each step, and record a heartbeat if there are new tokens.

        A heartbeat reports progress to the watchdog. The total is stored in ``self._tokens_made``.
        """
        core = self._engine.engine_core
        get_output = core.get_output

        def counted() -> Any:
            outputs = get_output()
            made = sum(len(output.new_token_ids) for output in outputs.outputs)
            self._tokens_made += made
            if made:
                heartbeat(tokens=made)
            return outputs

        core.get_output = counted

    def _wake_weights(self) -> None:
        self._wake("weights")

    def _wake_kv(self) -> None:
        self._wake("kv_cache")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError(
                "vLLM could not clear the key-value cache of the previous weights, because requests still use it"
            )

    def _wake(self, tag: str) -> None:
        if self._guard is not None:
            self._guard.check_free(tag, self._needs[tag])
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

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self._run([(tuple(token_ids), params)])
        return [output.prompt_logprobs[i][token].logprob for i, token in enumerate(token_ids) if i]

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[Rollout]:
        ids = [(prompt.prompt_id, prompt.student_ids) for prompt in prompts]
        self._check_same("prompts, sampling or step", ids, sampling, step, self._version)
        responses = [(prompts[i], g) for i in longest_first(prompts) for g in range(sampling.responses_per_prompt)]
        outputs = self._run(
            [(prompt.student_ids, self._params(prompt, index, sampling, step)) for prompt, index in responses],
            counted=self._tp_rank == 0,
            cancelled=cancelled if self._tp_size == 1 else None,
        )
        rollouts = [
            self._rollout(prompt, index, output) for (prompt, index), output in zip(responses, outputs, strict=True)
        ]
        self._check_same("responses", [rollout.response_ids for rollout in rollouts])
        position = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
        own = rollouts[self._tp_rank :: self._tp_size]
        return sorted(own, key=lambda rollout: (position[rollout.prompt.prompt_id], rollout.response_index))

    def _params(self, prompt: Prompt, response_index: int, sampling: Sampling, step: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=response_limit(sampling, prompt, self.window),
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # otherwise vLLM adds the stop ids of the model's directory
            seed=response_seed(sampling.seed, step, prompt.prompt_id, response_index),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, prompt: Prompt, response_index: int, output: Any) -> Rollout:
        (response,) = output.outputs
        if response.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended response {response_index} to prompt {prompt.prompt_id} with finish_reason"
                f" {response.finish_reason!r} instead of 'stop' or 'length'"
            )
        return Rollout(
            prompt=prompt,
            response_index=response_index,
            response_ids=tuple(response.token_ids),
            logprobs=tuple(response.logprobs.logprobs),
            finish=response.finish_reason,
            version=self._version,
        )

    def _run(
        self, requests: Sequence[tuple[tuple[int, ...], Any]], counted: bool = False, cancelled: Cancelled | None = None
    ) -> list[Any]:
        """Run ``requests`` in vLLM until all are finished; return vLLM's outputs in the same order.

        ``requests``: pairs of token ids and sampling parameters. ``counted``: count the finished requests as
        responses of the console's progress report; only one of an engine's ranks counts them. If ``cancelled()``
        returns True, removes the requests from vLLM and raises GenerationCancelled. Raises RuntimeError if vLLM
        generates no token for many steps.
        """
        if self._engine.is_sleeping():
            raise RuntimeError("vLLM is asleep, so it would accept the requests but never finish them")
        first = self._requests
        for token_ids, params in requests:
            self._engine.add_request(str(self._requests), {"prompt_token_ids": list(token_ids)}, params)
            self._requests += 1
        outputs: dict[int, Any] = {}
        max_idle = _IDLE_STEPS + sum(len(token_ids) for token_ids, _ in requests)  # long prompts take many steps
        idle = 0
        with task(len(requests) if counted else 0, "responses"):
            while self._engine.has_unfinished_requests():
                if cancelled is not None and cancelled():
                    self._abort(range(first, self._requests))
                    raise GenerationCancelled
                made = self._tokens_made
                for output in self._engine.step():
                    outputs[int(output.request_id)] = output
                    heartbeat(done=1)
                idle = 0 if self._tokens_made > made else idle + 1
                if idle > max_idle:
                    unfinished = len(requests) - len(outputs)
                    raise RuntimeError(
                        f"vLLM generated no token in {idle} steps, with {unfinished} of {len(requests)} responses"
                        " unfinished"
                    )
        return [outputs[first + i] for i in range(len(requests))]

    def _abort(self, requests: Iterable[int]) -> None:
        """Cancel the requests with these numbers, and let vLLM process the results that are still in progress."""
        self._engine.abort_request([str(number) for number in requests])
        for _ in range(_STEPS_AHEAD):
            self._engine.step()

    def _check_same(self, what: str, *values: object) -> None:
        """Raise RuntimeError on all ranks of the engine if the ranks pass different ``values``.

        Collective over the engine's ranks. ``what``: description of the values, for the message. vLLM does not compare
        the requests of the ranks, so different requests would produce wrong tokens without an error.
        """
        if self._tp_size == 1:
            return
        digest = hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
        digests = [""] * self._tp_size
        dist.all_gather_object(digests, digest, group=self._group)
        if len(set(digests)) > 1:
            raise RuntimeError(f"the ranks of one vLLM engine have different {what} (digests {digests})")


@contextmanager
def kept_threads() -> Iterator[None]:
    """Restore torch's number of CPU threads after the ``with`` block.

    vLLM lowers this number, which would slow down an optimizer that runs on the CPU.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def pool_bytes() -> int:
    """Return the size of vLLM's memory pool in bytes; sleeping does not change this number."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return int(CuMemAllocator.get_instance().get_current_usage())


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
