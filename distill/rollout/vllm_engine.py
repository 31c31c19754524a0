"""Generation by vLLM in the trainer's own processes: asleep while the student trains, its weights pushed every step."""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

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
from distill.supervise.progress import heartbeat
from distill.types import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)

_CPU_DEFAULTS = {
    "enforce_eager": True,  # compiling takes a minute, and no CUDA graph is gained
    # A prompt read in parts has its draws of before the end taken back, which a CPU's generators can't (vLLM 0.32).
    "enable_chunked_prefill": False,
    "block_size": 32,  # the default of 128 shares no prompt shorter than that between its answers
    "kv_cache_memory_bytes": CPU_CACHE,
}
_IDLE_STEPS = 1000
_STEPS_AHEAD = 4
"""More than vLLM schedules before it has seen what came of the last one."""


def fixed_arguments(can_sleep: bool) -> dict[str, Any]:
    """vLLM's arguments that the trainer relies on; policy.generation.vllm_kwargs may not set them."""
    return {
        "distributed_executor_backend": "external_launcher",  # the only one whose worker is this very rank
        "enable_sleep_mode": can_sleep,
        "trust_remote_code": False,  # no code that a model's folder brings is ever run
        "config_format": "hf",  # config.json, also where Mistral's params.json lies beside it
        "load_format": "dummy",  # every step begins with a whole sync; nothing is read from disk
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "seed": 0,
    }


def _scheduling(tensor_parallel_size: int) -> dict[str, Any]:
    """Before 0.32, vLLM's asynchronous scheduler asks what is done by now, which the ranks of an engine see apart."""
    import vllm

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    return {"async_scheduling": False} if tensor_parallel_size > 1 and version < (0, 32) else {}


def _name_shared_memory() -> None:
    """Give the memory that ranks of an engine share on a CPU a name of this job's own; collective.

    vLLM names it by the ranks' numbers alone: two jobs of one machine would share it, and what a killed one left there
    would let no other begin.
    """
    from vllm.distributed.device_communicators.cpu_communicator import (
        _CPUSHMDistributed,
    )

    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, src=0)
    named = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{named(communicator)}-{token[0]}")


class VllmEngine(EngineBase):
    """One vLLM of ``tensor_parallel_size`` consecutive ranks; all ranks of the job make theirs at the same point.

    ``arguments``: of vLLM's ``LLM``, beside those fixed here. It must be made before other models are loaded (vLLM
    measures the device's memory) and closed last (it takes the process groups with it). The random state of this
    process stays what it was.
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
            "vLLM: %d engine(s) of %d rank(s), window %d, weights by %s, %s; ready in %.0f s",
            *(self.replicas, tensor_parallel_size, window, self._weights.path),
            *("level-2 sleep" if self.can_sleep else "no memory freed asleep", time.monotonic() - started),
        )

    def _first_sleep(self) -> dict[str, int]:
        """Put the fresh engine to sleep; bytes that waking its weights and its cache will need."""
        memory = self._memory
        awake = memory.free() if memory else 0
        self._llm.sleep(level=2)
        freed = memory.free() - awake if memory else 0
        parameters = self._weights.model.parameters()
        weights = sum(p.numel() * p.element_size() for p in parameters) if memory else 0
        return {"weights": weights, "kv_cache": max(0, freed - weights)}

    def _mask_padding(self) -> None:
        """Ids past the tokenizer's never get mass, as they get none in the loss."""
        model: Any = self._weights.model
        compute_logits, valid = model.compute_logits, self._valid_vocab

        def masked(*args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = compute_logits(*args, **kwargs)
            if logits is not None:
                logits[..., valid:] = -torch.inf
            return logits

        model.compute_logits = masked

    def _count_tokens(self) -> None:
        """Know how many tokens the engine has made, at every one of its steps."""
        core = self._engine.engine_core
        get_output = core.get_output

        def counted() -> Any:
            outputs = get_output()
            made = sum(len(output.new_token_ids) for output in outputs.outputs)
            self._tokens_made += made
            if made:
                heartbeat()
            return outputs

        core.get_output = counted

    def _wake_weights(self) -> None:
        self._wake("weights")

    def _wake_kv(self) -> None:
        self._wake("kv_cache")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not forget the keys and values of older weights: some are still in use")

    def _wake(self, tag: str) -> None:
        if self._guard is not None:
            self._guard.check_free(tag, self._needs[tag])
        self._llm.wake_up(tags=[tag])

    def _sleep(self) -> None:
        self._llm.sleep(level=2)
        if self._guard is not None:
            self.residual_bytes = self._guard.asleep()

    def _close(self) -> None:
        # It ends in destroy_process_group(), whoever made the group.
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
        asked = [(prompt.prompt_id, prompt.student_ids) for prompt in prompts]
        self._agree("prompts, sampling or step", asked, sampling, step, self._version)
        answers = [(prompts[i], a) for i in longest_first(prompts) for a in range(sampling.responses_per_prompt)]
        outputs = self._run(
            [(prompt.student_ids, self._params(prompt, answer, sampling, step)) for prompt, answer in answers],
            show=self.replica == 0 and self._tp_rank == 0,
            cancelled=cancelled if self._tp_size == 1 else None,
        )
        rollouts = [
            self._rollout(prompt, answer, output) for (prompt, answer), output in zip(answers, outputs, strict=True)
        ]
        self._agree("answers", [rollout.response_ids for rollout in rollouts])
        place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
        mine = rollouts[self._tp_rank :: self._tp_size]
        return sorted(mine, key=lambda rollout: (place[rollout.prompt.prompt_id], rollout.response_index))

    def _params(self, prompt: Prompt, answer: int, sampling: Sampling, step: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=response_limit(sampling, prompt, self.window),
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # or vLLM adds the stop ids of the model's folder to ours
            seed=response_seed(sampling.seed, step, prompt.prompt_id, answer),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(self, prompt: Prompt, answer: int, output: Any) -> Rollout:
        (said,) = output.outputs
        if said.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended answer {answer} to prompt {prompt.prompt_id} by {said.finish_reason}")
        return Rollout(
            prompt=prompt,
            response_index=answer,
            response_ids=tuple(said.token_ids),
            logprobs=tuple(said.logprobs.logprobs),
            finish=said.finish_reason,
            version=self._version,
        )

    def _run(
        self, requests: Sequence[tuple[tuple[int, ...], Any]], show: bool = False, cancelled: Cancelled | None = None
    ) -> list[Any]:
        """The outputs of all requests, in their order. Raises RuntimeError where the engine makes no progress, and
        GenerationCancelled, with nothing left in the engine, where ``cancelled`` says so.
        """
        if self._engine.is_sleeping():
            raise RuntimeError("vLLM is asleep: it would accept the requests and never answer")
        first = self._requests
        for token_ids, params in requests:
            self._engine.add_request(str(self._requests), {"prompt_token_ids": list(token_ids)}, params)
            self._requests += 1
        outputs: dict[int, Any] = {}
        patience = _IDLE_STEPS + sum(len(token_ids) for token_ids, _ in requests)  # a long prompt takes many steps
        idle = 0
        disable = not (show and sys.stderr.isatty())
        with tqdm(total=len(requests), desc="generate", unit="answer", leave=False, disable=disable) as bar:
            while self._engine.has_unfinished_requests():
                if cancelled is not None and cancelled():
                    self._abort(range(first, self._requests))
                    raise GenerationCancelled
                made = self._tokens_made
                for output in self._engine.step():
                    outputs[int(output.request_id)] = output
                    bar.update(1)
                idle = 0 if self._tokens_made > made else idle + 1
                if idle > patience:
                    raise RuntimeError(
                        f"vLLM made no token in {idle} steps, with {len(requests) - len(outputs)} of {len(requests)}"
                        " answers unfinished"
                    )
        return [outputs[first + i] for i in range(len(requests))]

    def _abort(self, requests: Iterable[int]) -> None:
        """Forget these requests, and what of them is on its way."""
        self._engine.abort_request([str(number) for number in requests])
        for _ in range(_STEPS_AHEAD):
            self._engine.step()

    def _agree(self, what: str, *values: object) -> None:
        """Raise RuntimeError on all ranks of this engine unless they bring the same values.

        vLLM's ranks exchange no requests: different ones give wrong tokens, often the same wrong ones everywhere.
        """
        if self._tp_size == 1:
            return
        digest = hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
        digests = [""] * self._tp_size
        dist.all_gather_object(digests, digest, group=self._group)
        if len(set(digests)) > 1:
            raise RuntimeError(f"the ranks of one vLLM engine have different {what}: digests {digests}")


@contextmanager
def kept_threads() -> Iterator[None]:
    """Leave torch's number of threads as it was: vLLM sets one, and an optimizer on the host would crawl."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def pool_bytes() -> int:
    """Bytes of the pool that sleep unmaps, mapped or not."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return int(CuMemAllocator.get_instance().get_current_usage())


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave Python's, numpy's and torch's generators as they were found."""
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
