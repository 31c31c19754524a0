"""vLLM's engine core with a scripted executor in the model's place (a fake), and the plain way to run requests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 300


def scripted_token(seed: int, index: int) -> tuple[int, float]:
    """Return token id and log-prob of a response's token number ``index``; they depend on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number % VOCAB, float(np.float32(-(number % 1009) / 97))


def scripted_engine(folder: Path, running: int, asynchronous: bool = True, drafts: int = 0) -> Any:
    """Return vLLM's LLMEngine with its scheduler and engine core in this process, and a scripted executor.

    ``running``: maximum number of running requests. ``asynchronous``: use the asynchronous scheduler, as on GPUs. vLLM
    disables it on CPU, so it is enabled after the configuration is complete. ``drafts``: maximum number of draft tokens
    per request and step, of which the executor accepts a scripted number.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    executor = _scripted_executor()
    ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    arguments = EngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=running,
        max_num_batched_tokens=max(128, running),
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        enforce_eager=True,
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        block_size=16,
        distributed_executor_backend=executor,
        kv_cache_memory_bytes=2**30,
        speculative_config=ngram if drafts else None,
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    return LLMEngine(config, executor, log_stats=False, multiprocess_mode=False)


def _scripted_executor() -> Any:
    import torch
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    class ScriptedExecutor(Executor):
        """Fake executor: samples ``scripted_token`` instead of running a model."""

        def _init_executor(self) -> None:
            self._scheduled: Any = None
            self._requests: dict[str, tuple[int, int, bool]] = {}
            """Maps request id to (prompt tokens, seed, whether log-probs are requested)."""
            self._sampled: dict[str, int] = {}

        @classmethod
        def supports_async_scheduling(cls) -> bool:
            return True

        def collective_rpc(self, method: Any, *args: Any, non_block: bool = False, **kwargs: Any) -> list[Any]:
            spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
            replies = {
                "get_kv_cache_spec": {"layer": spec},
                "get_supported_tasks": ("generate",),
                "get_supported_kv_cache_layouts": ["NHD"],
                "determine_available_memory": 2**30,
            }
            if method == "compile_or_warm_up_model":
                return []
            return [replies.get(method)]

        def check_health(self) -> None: ...

        def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
            self._scheduled = scheduler_output
            nothing = scheduler_output.total_num_scheduled_tokens == 0
            return _done(ModelRunnerOutput([], {}) if nothing else None, non_block)

        def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
            return _done(self._sample(self._scheduled), non_block)

        def _sample(self, scheduled: Any) -> Any:
            computed = {}
            for new in scheduled.scheduled_new_reqs:
                params = new.sampling_params
                self._requests[new.req_id] = len(new.prompt_token_ids), params.seed, params.logprobs is not None
                self._sampled[new.req_id] = 0
                computed[new.req_id] = new.num_computed_tokens
            cached = scheduled.scheduled_cached_reqs
            computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            names = list(scheduled.num_scheduled_tokens)
            tokens: list[list[int]] = []
            rows: list[tuple[int, float]] = []
            first_rows = [0]
            for name in names:
                prefills = computed[name] + scheduled.num_scheduled_tokens[name] < self._requests[name][0]
                drafts = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
                own = [] if prefills else self._next_tokens(name, drafts)
                tokens.append([token for token, _ in own])
                rows += own or [(0, np.nan)]  # vLLM has a row of log-probs also for a prompt that is incomplete
                first_rows.append(len(rows))
            lists = LogprobsLists(
                np.array([token for token, _ in rows])[:, None],
                np.array([logprob for _, logprob in rows], np.float32)[:, None],
                np.zeros(len(rows), np.int64),
                first_rows if len(rows) > len(names) else None,
            )
            wanted = any(self._requests[name][2] for name in names)
            index = {name: row for row, name in enumerate(names)}
            return ModelRunnerOutput(names, index, tokens, lists if wanted else None)

        def _next_tokens(self, name: str, drafts: int) -> list[tuple[int, float]]:
            """Return the next token of a request, and before it a scripted number of accepted drafts."""
            seed, first = self._requests[name][1], self._sampled[name]
            count = 1 + scripted_token(-1 - seed, first)[0] % (drafts + 1)
            self._sampled[name] += count
            return [scripted_token(seed, first + i) for i in range(count)]

    return ScriptedExecutor


def _done(result: Any, non_block: bool) -> Any:
    if not non_block:
        return result
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def plain_run(engine: Any, requests: Sequence[tuple[Sequence[int], Any]]) -> list[Any]:
    """Run requests with vLLM's own LLMEngine.step until all are finished; return vLLM's outputs in the same order.

    This is the plain twin of ``RequestLoop``. ``requests``: pairs of token ids and sampling parameters.
    """
    from vllm.sampling_params import RequestOutputKind

    for number, (token_ids, params) in enumerate(requests):
        params = params.clone()
        params.output_kind, params.flat_logprobs = RequestOutputKind.FINAL_ONLY, True
        engine.add_request(f"plain-{number}", {"prompt_token_ids": list(token_ids)}, params)
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        outputs.update((output.request_id, output) for output in engine.step())
    return [outputs[f"plain-{number}"] for number in range(len(requests))]


def plain_fields(output: Any) -> tuple[list[int], list[float], str]:
    """Return token ids, log-probs and finish reason of one of vLLM's outputs."""
    (response,) = output.outputs
    logprobs = [] if response.logprobs is None else list(response.logprobs.logprobs)
    return list(response.token_ids), logprobs, response.finish_reason
