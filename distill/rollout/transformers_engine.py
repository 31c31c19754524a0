"""Generation engine that uses the transformers library: slow, for tests and for machines without vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from distill.model.checksum import BitSums, bit_sums_by_name
from distill.model.hf_load import manifest_of, materialize, meta_model, restore_buffers
from distill.rollout.engine import (
    Cancelled,
    EngineBase,
    GenerationCancelled,
    SyncError,
    indices_to_generate,
    longest_first,
    response_limit,
    response_seed,
    wants_logprobs,
)
from distill.supervise.progress import heartbeat, task
from distill.types import Prompt, Rollout, Sampling


class TransformersEngine(EngineBase):
    """Generation engine with a complete copy of the student on one rank; a sleeping engine has no weights.

    ``config``: the model's Hugging Face configuration; ``dtype``: dtype of weights and computation; ``batch_size``:
    number of responses generated together; ``window``: maximum number of tokens of a prompt and its response together;
    ``valid_vocab``: number of valid token ids; ``replica``: index of this engine among the ``replicas`` engines.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        window: int,
        valid_vocab: int,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self._model = meta_model(config, "eager", dtype).eval().requires_grad_(False)
        self._device = device
        self._batch_size = batch_size
        super().__init__(manifest_of(self._model), window, valid_vocab, replica, replicas)

    def _wake_weights(self) -> None:
        materialize(self._model, self._device)
        restore_buffers(self._model, self._device)

    @torch.no_grad()
    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        parameters = dict(self._model.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    def _verify(self, sent: Mapping[str, BitSums]) -> None:
        for name, sums in bit_sums_by_name(self._model.named_parameters()).items():
            if sums != sent[name]:
                raise SyncError(f"the weight {name} in the engine differs from the student's weight", name, "memory")

    def _wake_kv(self) -> None:
        pass

    @torch.no_grad()
    def _probe(self, token_ids: Sequence[int]) -> list[float]:
        tokens = torch.tensor([list(token_ids)], device=self._device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        logprobs = logits[:, : self._valid_vocab].log_softmax(-1)
        found: list[float] = logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()
        return found

    def _sleep(self) -> None:
        self._model.to("meta")
        self._model.tie_weights()

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[Rollout]:
        indices = indices_to_generate(sampling, prompts)
        order = [i for i in longest_first(prompts) if indices[i]]
        per_batch = max(1, self._batch_size // sampling.responses_per_prompt)
        done: dict[int, list[Rollout]] = {}
        with task(sum(map(len, indices)), "responses"):
            for start in range(0, len(order), per_batch):
                batch = order[start : start + per_batch]
                wanted = [(prompts[i], indices[i]) for i in batch]
                rollouts = self._generate_batch(wanted, sampling, step, cancelled)
                done.update(zip(batch, rollouts, strict=True))
        return [rollout for i in sorted(done) for rollout in done[i]]

    def _generate_batch(
        self, wanted: Sequence[tuple[Prompt, Sequence[int]]], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[list[Rollout]]:
        """Generate the responses to one batch of prompts; return one list of rollouts per prompt.

        ``wanted``: each prompt with the indices of its responses. The model processes each prompt once, and the
        prompt's key-value cache is copied for each response. Raises GenerationCancelled if ``cancelled()`` returns
        True.
        """
        batch = _Decoding(wanted, sampling, step, self.window, self._device)
        tokens, mask = self._padded([prompt for prompt, _ in wanted])
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(tokens, mask, cache)
        rows = torch.tensor([i for i, (_, indices) in enumerate(wanted) for _ in indices], device=self._device)
        cache.batch_select_indices(rows)
        mask, logits = mask[rows], logits[rows]
        unfinished = len(rows)
        while True:
            if cancelled():
                raise GenerationCancelled
            sampled = batch.sample(logits, self._valid_vocab)
            keep = batch.unfinished_rows()
            heartbeat(done=unfinished - len(keep), tokens=unfinished)
            unfinished = len(keep)
            if not keep:
                return batch.rollouts(self._version)
            if 2 * len(keep) <= len(sampled):  # removing rows copies the cache, so it waits for half of them
                rows = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(rows)
                mask, sampled = mask[rows], sampled[rows]
                batch.select(keep)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(sampled[:, None], mask, cache)

    def _padded(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Return the token ids and the attention mask of the left-padded prompts, both int64 [B, T]."""
        width = max(len(prompt.student_ids) for prompt in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64, device=self._device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt.student_ids) :] = torch.tensor(prompt.student_ids)
            mask[row, width - len(prompt.student_ids) :] = 1
        return tokens, mask

    def _forward(self, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Return the logits of the last position of each row, float32 [B, V].

        ``tokens``: [B, T], the tokens that are not in ``cache`` yet. ``mask``: attention mask of all positions.
        """
        heartbeat()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits


class _Decoding:
    """State of one batch of responses: random numbers, sampled tokens and log-probs.

    A ``response`` is an index into all responses of the batch. A ``row`` is an index into the responses that have not
    been removed from the batch; only finished responses are removed.
    """

    def __init__(
        self,
        wanted: Sequence[tuple[Prompt, Sequence[int]]],
        sampling: Sampling,
        step: int,
        window: int,
        device: torch.device,
    ) -> None:
        self._sampling = sampling
        self._wanted = wanted
        responses = [(prompt, index) for prompt, indices in wanted for index in indices]
        self._limits = [response_limit(sampling, prompt, window) for prompt, _ in responses]
        seeds = [response_seed(sampling.seed, step, prompt.prompt_id, index) for prompt, index in responses]
        self._wants_logprobs = [wants_logprobs(sampling, seed) for seed in seeds]
        self._uniforms = torch.stack([_uniforms(seed, max(self._limits)) for seed in seeds]).to(device)
        self._tokens: list[list[int]] = [[] for _ in responses]
        self._logprobs: list[list[float]] = [[] for _ in responses]
        self._stopped = [False] * len(responses)
        self._rows = list(range(len(responses)))  # the response of each row
        self._steps = 0

    def _unfinished(self, response: int) -> bool:
        return not self._stopped[response] and len(self._tokens[response]) < self._limits[response]

    def sample(self, logits: Tensor, valid_vocab: int) -> Tensor:
        """Sample and return the next token of each row: int64 [B].

        ``logits``: [B, V]. Every response has its own random numbers. Tokens of finished rows are not recorded.
        """
        logprobs = processed_logprobs(logits, self._sampling, valid_vocab)
        greedy = self._sampling.temperature == 0
        sampled = logprobs.argmax(-1) if greedy else draw(logprobs, self._uniforms[self._rows, self._steps])
        chosen = logprobs.gather(1, sampled[:, None])[:, 0]
        self._steps += 1
        for response, token, logprob in zip(self._rows, sampled.tolist(), chosen.tolist(), strict=True):
            if self._unfinished(response):
                self._tokens[response].append(token)
                self._logprobs[response].append(logprob)
                self._stopped[response] = token in self._sampling.stop_token_ids
        return sampled

    def unfinished_rows(self) -> list[int]:
        """Return the indices of the rows whose responses are unfinished."""
        return [row for row, response in enumerate(self._rows) if self._unfinished(response)]

    def select(self, rows: list[int]) -> None:
        """Remove all rows except ``rows`` from the batch."""
        self._rows = [self._rows[row] for row in rows]

    def rollouts(self, version: int) -> list[list[Rollout]]:
        """Return the finished rollouts, one list per prompt.

        ``version``: number of finished training steps when the engine received its weights.
        """
        responses = itertools.count()
        return [
            [self._rollout(next(responses), prompt, index, version) for index in indices]
            for prompt, indices in self._wanted
        ]

    def _rollout(self, response: int, prompt: Prompt, response_index: int, version: int) -> Rollout:
        return Rollout(
            prompt=prompt,
            response_index=response_index,
            response_ids=tuple(self._tokens[response]),
            logprobs=tuple(self._logprobs[response]) if self._wants_logprobs[response] else (),
            finish="stop" if self._stopped[response] else "length",
            version=version,
        )


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def processed_logprobs(logits: Tensor, sampling: Sampling, valid_vocab: int) -> Tensor:
    """Return the normalised log-probs [B, V] after temperature, top-k and top-p.

    For temperature 0 (greedy sampling), the log-probs at temperature 1 are returned. Token ids of ``valid_vocab`` and
    above are padding of the vocabulary and get -inf.
    """
    logits = logits / (sampling.temperature or 1.0)
    logits[:, valid_vocab:] = -torch.inf
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, valid_vocab), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        mass_before = sorted_logits.softmax(-1).cumsum(-1) - sorted_logits.softmax(-1)
        sorted_logits = sorted_logits.masked_fill(mass_before >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(1, order, sorted_logits)
    return logits.log_softmax(-1)


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one token per row by inverse transform sampling: int64 [B].

    ``logprobs``: [B, V]. ``uniforms``: random numbers in [0, 1), float64 [B]. Probabilities are summed in float64,
    because rounding in float32 would make some tokens impossible to sample.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
