"""Generation with vLLM inside the trainer's processes; the engine sleeps while the student trains."""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
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
    indices_to_generate,
    longest_first,
    response_limit,
    response_seed,
    wants_logprobs,
)
from distill.rollout.gpu_memory import CudaMemory, Memory, SleepGuard, Tag, pool_bytes
from distill.rollout.vllm_env import kept_allocator_options
from distill.rollout.vllm_loop import RequestLoop, Response
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
_PROBE_STEPS = 100
"""Maximum number of vLLM steps for the log-probs of the probe prompt."""


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

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[Rollout]:
        ids = [(prompt.prompt_id, prompt.student_ids) for prompt in prompts]
        self._check_same("prompts, sampling or step", ids, sampling, step, self._version)
        indices = indices_to_generate(sampling, prompts)
        responses = [(prompts[i], index) for i in longest_first(prompts) for index in indices[i]]
        finished = self._run(
            [(prompt.student_ids, self._params(prompt, index, sampling, step)) for prompt, index in responses],
            counted=self._tp_rank == 0,
            cancelled=cancelled if self._tp_size == 1 else None,
        )
        rollouts = [
            self._rollout(prompt, index, response)
            for (prompt, index), response in zip(responses, finished, strict=True)
        ]
        self._check_same("responses", [array("q", rollout.response_ids).tobytes() for rollout in rollouts])
        position = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
        own = rollouts[self._tp_rank :: self._tp_size]
        return sorted(own, key=lambda rollout: (position[rollout.prompt.prompt_id], rollout.response_index))

    def _params(self, prompt: Prompt, response_index: int, sampling: Sampling, step: int) -> Any:
        from vllm import SamplingParams

        seed = response_seed(sampling.seed, step, prompt.prompt_id, response_index)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=response_limit(sampling, prompt, self.window),
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # otherwise vLLM adds the stop ids of the model's directory
            seed=seed,
            logprobs=0 if wants_logprobs(sampling, seed) else None,
            detokenize=False,
        )

    def _rollout(self, prompt: Prompt, response_index: int, response: Response) -> Rollout:
        if response.finish not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended response {response_index} to prompt {prompt.prompt_id} with finish_reason"
                f" {response.finish!r} instead of 'stop' or 'length'"
            )
        return Rollout(
            prompt=prompt,
            response_index=response_index,
            response_ids=tuple(response.token_ids),
            logprobs=tuple(response.logprobs),
            finish=response.finish,  # type: ignore[arg-type]
            version=self._version,
        )

    def _run(
        self, requests: Sequence[tuple[tuple[int, ...], Any]], counted: bool = False, cancelled: Cancelled | None = None
    ) -> list[Response]:
        """Run ``requests`` in vLLM until all are finished; return the responses in the same order.

        ``requests``: pairs of token ids and sampling parameters. ``counted``: count the finished requests as
        responses of the console's progress report; only one of an engine's ranks counts them. If ``cancelled()``
        returns True, removes the requests from vLLM and raises GenerationCancelled.
        """
        loop = self._loop
        numbers = [loop.add(token_ids, params) for token_ids, params in requests]
        finished: dict[int, Response] = {}
        with task(len(requests) if counted else 0, "responses"):
            while loop.unfinished:
                if cancelled is not None and cancelled():
                    loop.abort()
                    raise GenerationCancelled
                for response in loop.poll():
                    finished[response.number] = response
                    heartbeat(done=1)
        return [finished[number] for number in numbers]

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
