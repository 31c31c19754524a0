"""Generation engine that uses the transformers library: slow, for tests and for machines without vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from distill.model.checksum import BitSums, bit_sums_by_name
from distill.model.hf_load import manifest_of, materialize, meta_model, restore_buffers
from distill.rollout.engine import Cancelled, EngineBase, GenerationCancelled, SyncError
from distill.rollout.requests import (
    Cutoff,
    CutoffPolling,
    OnEnded,
    Request,
    Segment,
    longest_first,
)
from distill.supervise.progress import heartbeat, task
from distill.types import Sampling


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
    def _segments(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        cutoff: Cutoff | None,
        cancelled: Cancelled,
        on_ended: OnEnded,
    ) -> list[Segment]:
        segments: dict[int, Segment] = {}
        # With a cutoff all requests should fit into one batch: a later batch would start after earlier ones were cut.
        per_prompt = sampling.responses_per_prompt if cutoff is None else 1
        with task(len(requests), "responses"):
            for inputs in batches_of(requests, self._batch_size, per_prompt):
                batch = [i for same_input in inputs for i in same_input]
                rows = [row for row, same_input in enumerate(inputs) for _ in same_input]
                decoding = _Decoding([requests[i] for i in batch], sampling, self._device)
                self._run(decoding, rows, cutoff, cancelled, on_ended)
                segments.update(zip(batch, decoding.segments(), strict=True))
        return [segments[i] for i in range(len(requests))]

    def _run(
        self, batch: _Decoding, rows: Sequence[int], cutoff: Cutoff | None, cancelled: Cancelled, on_ended: OnEnded
    ) -> None:
        """Generate the segments of one batch until all have ended or are cut.

        ``rows``: maps each request of the batch to the index of its input among the different inputs. The model
        processes each input once, and the input's key-value cache is copied for each request. Raises
        GenerationCancelled if ``cancelled()`` returns True.
        """
        polling = CutoffPolling(cutoff.limit if cutoff is not None else None)
        inputs = {row: request.input_ids for row, request in zip(rows, batch.requests, strict=True)}
        tokens, mask = self._padded(list(inputs.values()))
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(tokens, mask, cache)
        indices = torch.tensor(rows, device=self._device)
        cache.batch_select_indices(indices)
        mask, logits = mask[indices], logits[indices]
        while not polling.reached(lambda: batch.new_tokens):
            if cancelled():
                raise GenerationCancelled
            unfinished = batch.unfinished
            sampled, ended = batch.sample(logits, self._valid_vocab)
            heartbeat(done=len(ended), tokens=unfinished)
            if ended and cutoff is not None:
                cutoff.ended([len(segment.ids) for segment in ended])
            for segment in ended:
                on_ended(segment)
            keep = batch.unfinished_rows()
            if not keep:
                return
            if 2 * len(keep) <= len(sampled):  # removing rows copies the cache, so it waits for half of them
                indices = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(indices)
                mask, sampled = mask[indices], sampled[indices]
                batch.select(keep)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(sampled[:, None], mask, cache)

    def _padded(self, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the token ids and the attention mask of the left-padded inputs, both int64 [B, T]."""
        width = max(map(len, inputs))
        tokens = torch.zeros(len(inputs), width, dtype=torch.int64, device=self._device)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(inputs):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
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


def batches_of(requests: Sequence[Request], batch_size: int, per_prompt: int = 1) -> list[list[list[int]]]:
    """Return the batches in which the requests are generated: lists of groups of indices of ``requests``.

    A group has consecutive requests with the same input, the longest input first. A batch has at most ``batch_size``
    requests, or one group. ``per_prompt``: minimum room of a group of new responses, so that batches do not depend on
    the responses that are omitted.
    """
    order = longest_first(requests)
    groups = itertools.groupby(order, lambda i: (requests[i].prompt.prompt_id, requests[i].generated_ids))
    batches: list[list[list[int]]] = []
    room = 0
    for group in (list(indices) for _, indices in groups):
        size = len(group) if requests[group[0]].generated_ids else max(len(group), per_prompt)
        if size > room:
            batches.append([])
            room = batch_size
        batches[-1].append(group)
        room -= size
    return batches


class _Decoding:
    """State of one batch of segments: random numbers, sampled tokens and log-probs.

    A ``row`` is an index into the requests that have not been removed from the batch; only requests whose segments have
    ended are removed.
    """

    def __init__(self, requests: Sequence[Request], sampling: Sampling, device: torch.device) -> None:
        self.requests = requests
        self.new_tokens = 0
        """Number of tokens of each unfinished segment."""
        self._sampling = sampling
        longest = max(request.max_new_tokens for request in requests)
        self._uniforms = torch.stack([_uniforms(request.seed, longest) for request in requests]).to(device)
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._logprobs: list[list[float]] = [[] for _ in requests]
        self._ended: dict[int, Segment] = {}  # by index of the request
        self._rows = list(range(len(requests)))  # the request of each row

    def sample(self, logits: Tensor, valid_vocab: int) -> tuple[Tensor, list[Segment]]:
        """Sample the next token of each row: int64 [B]; return also the segments that end with this token.

        ``logits``: [B, V]. Every request has its own random numbers. Tokens of segments that have ended before are not
        recorded.
        """
        logprobs = processed_logprobs(logits, self._sampling, valid_vocab)
        greedy = self._sampling.temperature == 0
        sampled = logprobs.argmax(-1) if greedy else draw(logprobs, self._uniforms[self._rows, self.new_tokens])
        chosen = logprobs.gather(1, sampled[:, None])[:, 0]
        self.new_tokens += 1
        ended = []
        for index, token, logprob in zip(self._rows, sampled.tolist(), chosen.tolist(), strict=True):
            if index not in self._ended:
                self._tokens[index].append(token)
                self._logprobs[index].append(logprob)
                if token in self._sampling.stop_token_ids:
                    ended.append(self._end(index, "stop"))
                elif self.new_tokens == self.requests[index].max_new_tokens:
                    ended.append(self._end(index, "length"))
        return sampled, ended

    def _end(self, index: int, finish: Literal["stop", "length", "cut"]) -> Segment:
        request = self.requests[index]
        logprobs = tuple(self._logprobs[index]) if request.with_logprobs else ()
        self._ended[index] = Segment(request, tuple(self._tokens[index]), logprobs, finish)
        return self._ended[index]

    def unfinished_rows(self) -> list[int]:
        """Return the indices of the rows whose segments have not ended."""
        return [row for row, index in enumerate(self._rows) if index not in self._ended]

    @property
    def unfinished(self) -> int:
        """Number of segments that have not ended."""
        return len(self.requests) - len(self._ended)

    def select(self, rows: list[int]) -> None:
        """Remove all rows except ``rows`` from the batch."""
        self._rows = [self._rows[row] for row in rows]

    def segments(self) -> list[Segment]:
        """Return the segments of all requests; those that have not ended are cut."""
        return [self._ended.get(index) or self._end(index, "cut") for index in range(len(self.requests))]


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
