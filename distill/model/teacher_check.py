"""Verification of the teacher's sharded, packed forward against transformers' plain forward."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.batching.context_parallel import shard_view
from distill.batching.plan import view_of
from distill.errors import RunFailed
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import causal_lm_parts, meta_model, restore_buffers
from distill.model.teacher import ScoringTeacher
from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Maps the teacher's dtype to the largest accepted mean absolute log-prob difference, in nats.

The teacher's log-probs are compared with those of transformers. Rounding causes differences of about 1e-5 (float32) and
0.1 (bfloat16); a wrong forward causes more than 1. These are the numbers at temperature 1; the temperature of the loss
divides all of them.
"""
_TOKENS = 32
_LOG_PERIOD_S = 10.0


@torch.no_grad()
def verify_teacher(teacher: ScoringTeacher, sequences: Sequence[Sequence[int]]) -> float:
    """Compare the teacher's sharded, packed forward with transformers' plain forward; collective.

    Uses 32 tokens of each of the first two ``sequences``, which must be the same on every rank. The main rank reads the
    complete checkpoint once. Returns the mean absolute difference between the two forwards in the log-probs of the
    teacher's top-8 tokens, in nats, at the temperature of the loss. Raises RunFailed if this difference exceeds
    ``MAX_DIFFERENCE`` divided by the temperature. The adapters of a teacher that shares the student's base are off,
    because the checkpoint does not contain them.
    """
    world, device = teacher.world, teacher.device
    sequences = [(tuple(s) * (_TOKENS + 1))[: _TOKENS + 1] for s in sequences[:2]]
    view = view_of([(s[:1], s[1:]) for s in sequences])
    layout = world.layout
    if layout.teacher_size > 1:
        rows = torch.arange(len(view.rows_N)).tensor_split(layout.teacher_size)
        view = shard_view(view, rows, layout.teacher_rank)
    with teacher.with_weights_of_files():
        found = teacher.topk(view.to(device), min(8, teacher.valid_vocab))
    parts = world.gather((layout.teacher_rank, (found.ids_NK.long().cpu(), found.logprobs_NK.cpu())))
    of_group = dict(reversed(parts))  # all groups read the same sequences: the first one is compared
    in_order = [of_group[rank] for rank in range(layout.teacher_size)]
    ids_NK, logprobs_NK = (torch.cat(columns).to(device) for columns in zip(*in_order, strict=True))
    difference = torch.zeros(())
    if world.is_main:
        config = model_config(teacher.files, "teacher.model_name")
        plain = plain_logits(teacher.files, config, [s[:-1] for s in sequences], teacher.dtype, device)
        logits_NV = plain.flatten(0, 1)[:, : teacher.valid_vocab] / teacher.temperature
        difference = (logits_NV.log_softmax(-1).gather(1, ids_NK) - logprobs_NK).abs().mean()
    mean = float(world.broadcast(float(difference)))
    limit = MAX_DIFFERENCE[teacher.dtype] / teacher.temperature
    if not mean <= limit:  # also if it is nan
        raise RunFailed(
            f"the teacher {teacher.files.name} failed verification: its log-probs differ by {mean:.3g} nats on average"
            f" from the log-probs that transformers computes with the same weights, but at most {limit:g} nats are"
            " accepted; set runtime.verify_teacher=false to train without this verification"
        )
    return mean


@torch.no_grad()
def plain_logits(
    files: ModelFiles, config: Any, sequences: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return float32 logits [B, T, V] of B sequences of T tokens, computed by transformers' plain model.

    Not collective. This is the slow reference for the sharded, packed forward. It uses eager attention. It reads the
    checkpoint once and keeps the weights of only one layer in memory, so it also works for models larger than the
    device's memory.
    """
    model = meta_model(config, "eager", dtype).eval()
    restore_buffers(model, device)
    body, head = causal_lm_parts(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = list(body.layers)  # type: ignore[arg-type]
    progress = _progress_log(len(layers))
    for module in [body.get_input_embeddings(), *layers, body.norm, head]:  # type: ignore[operator]
        _stream(module, names, files, dtype, device)
    for number, layer in enumerate(layers, 1):
        layer.register_forward_pre_hook(lambda *_, number=number: progress(number))
    tokens = torch.tensor([list(sequence) for sequence in sequences], device=device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return logits


def _progress_log(layers: int) -> Callable[[int], None]:
    """Return a function that logs the current layer number, at most once per ``_LOG_PERIOD_S`` seconds.

    ``layers``: total number of layers.
    """
    last = time.monotonic()

    def progress(number: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LOG_PERIOD_S:
            last = time.monotonic()
            log.info("verifying the teacher: computing layer %d of %d", number, layers)

    return progress


def _stream(
    module: nn.Module, names: dict[int, str], files: ModelFiles, dtype: torch.dtype, device: torch.device
) -> None:
    """Register hooks that load the weights of ``module`` before its forward and free them after it.

    ``names`` maps the ``id()`` of each parameter object to the parameter's name in the checkpoint.
    """
    parameters = [
        (part, leaf, parameter, names[id(parameter)])
        for part in module.modules()
        for leaf, parameter in part._parameters.items()
        if parameter is not None
    ]

    def load(*_: object) -> None:
        for part, leaf, _meta, name in parameters:
            heartbeat()
            part._parameters[leaf] = nn.Parameter(files.tensor(name).to(device, dtype), requires_grad=False)

    def free(*_: object) -> None:
        for part, leaf, meta, _name in parameters:
            part._parameters[leaf] = meta

    module.register_forward_pre_hook(load)
    module.register_forward_hook(free)
