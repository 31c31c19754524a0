"""Generation by transformers: for tests, and for machines without vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from distill.model.checksum import BitSums, bit_sums_by_name
from distill.model.hf_load import manifest_of, materialize, meta_model, restore_buffers
from distill.rollout.engine import (
    Cancelled,
    EngineBase,
    GenerationCancelled,
    longest_first,
    response_limit,
    response_seed,
)
from distill.supervise.progress import heartbeat
from distill.types import Prompt, Rollout, Sampling


class TransformersEngine(EngineBase):
    """A whole copy of the student on this rank, batched, with a key-value cache; asleep it holds no memory.

    ``config``: the model's Hugging Face configuration; ``dtype``: that of weights and compute; ``batch_size``: answers
    generated at a time; ``valid_vocab``: ids at or past it are never sampled.
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
                raise RuntimeError(f"the engine's {name} does not have the bits that were sent")

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
        order = longest_first(prompts)
        per_batch = max(1, self._batch_size // sampling.responses_per_prompt)
        done: dict[int, list[Rollout]] = {}
        silent = self.replica != 0 or not sys.stderr.isatty()
        with tqdm(total=len(prompts), desc="generate", unit="prompt", leave=False, disable=silent) as bar:
            for i in range(0, len(order), per_batch):
                places = order[i : i + per_batch]
                answers = self._answer([prompts[place] for place in places], sampling, step, cancelled)
                done.update(zip(places, answers, strict=True))
                bar.update(len(places))
        return [rollout for place in range(len(prompts)) for rollout in done[place]]

    def _answer(
        self, prompts: list[Prompt], sampling: Sampling, step: int, cancelled: Cancelled
    ) -> list[list[Rollout]]:
        """All answers to one batch of prompts: each prompt is read once, its cache repeated for its answers."""
        G = sampling.responses_per_prompt
        batch = _Decoding(prompts, sampling, step, self.window, self._device)
        width = max(len(prompt.student_ids) for prompt in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64, device=self._device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt.student_ids) :] = torch.tensor(prompt.student_ids)
            mask[row, width - len(prompt.student_ids) :] = 1
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(tokens, mask, cache)
        cache.batch_repeat_interleave(G)
        mask, logits = mask.repeat_interleave(G, 0), logits.repeat_interleave(G, 0)
        while True:
            if cancelled():
                raise GenerationCancelled
            sampled = batch.sample(logits, self._valid_vocab)
            keep = batch.unfinished_rows()
            if not keep:
                return batch.rollouts(self._version)
            if 2 * len(keep) <= len(sampled):  # finished rows go when they are half the batch: copying the cache costs
                rows = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(rows)
                mask, sampled = mask[rows], sampled[rows]
                batch.select(keep)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(sampled[:, None], mask, cache)

    def _forward(self, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the last position, float32 [B, V]."""
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
    """The answers of one batch while they grow: a stream of uniforms, tokens and log-probs for each."""

    def __init__(self, prompts: list[Prompt], sampling: Sampling, step: int, window: int, device: torch.device) -> None:
        self._sampling = sampling
        self._prompts = prompts
        answers = [(prompt, answer) for prompt in prompts for answer in range(sampling.responses_per_prompt)]
        self._limits = [response_limit(sampling, prompt, window) for prompt, _ in answers]
        self._uniforms = torch.stack(
            [_uniforms(response_seed(sampling.seed, step, p.prompt_id, a), max(self._limits)) for p, a in answers]
        ).to(device)
        self._tokens: list[list[int]] = [[] for _ in answers]
        self._logprobs: list[list[float]] = [[] for _ in answers]
        self._stopped = [False] * len(answers)
        self._rows = list(range(len(answers)))  # which answer each row of the running batch is
        self._drawn = 0

    def _running(self, answer: int) -> bool:
        return not self._stopped[answer] and len(self._tokens[answer]) < self._limits[answer]

    def sample(self, logits: Tensor, valid_vocab: int) -> Tensor:
        """Draw the next token of every row [B] from its own uniform and note it where the answer still runs."""
        logprobs = processed_logprobs(logits, self._sampling, valid_vocab)
        greedy = self._sampling.temperature == 0
        sampled = logprobs.argmax(-1) if greedy else draw(logprobs, self._uniforms[self._rows, self._drawn])
        chosen = logprobs.gather(1, sampled[:, None])[:, 0]
        self._drawn += 1
        for answer, token, logprob in zip(self._rows, sampled.tolist(), chosen.tolist(), strict=True):
            if self._running(answer):
                self._tokens[answer].append(token)
                self._logprobs[answer].append(logprob)
                self._stopped[answer] = token in self._sampling.stop_token_ids
        return sampled

    def unfinished_rows(self) -> list[int]:
        """Rows of the running batch whose answer goes on."""
        return [row for row, answer in enumerate(self._rows) if self._running(answer)]

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self._rows = [self._rows[row] for row in rows]

    def rollouts(self, version: int) -> list[list[Rollout]]:
        """The answers, a list a prompt."""
        G = self._sampling.responses_per_prompt
        return [
            [
                Rollout(
                    prompt=prompt,
                    response_index=answer,
                    response_ids=tuple(self._tokens[p * G + answer]),
                    logprobs=tuple(self._logprobs[p * G + answer]),
                    finish="stop" if self._stopped[p * G + answer] else "length",
                    version=version,
                )
                for answer in range(G)
            ]
            for p, prompt in enumerate(self._prompts)
        ]


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def processed_logprobs(logits: Tensor, sampling: Sampling, valid_vocab: int) -> Tensor:
    """Log-probs [B, V] that are sampled from: at the temperature, inside top-k and top-p, renormalised there.

    At temperature 0 the likeliest token is taken, and log-probs are the model's own.
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
    """The token [B] at which the cumulative probability passes each row's uniform; float64, so that none is skipped."""
    cumulative = logprobs.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
