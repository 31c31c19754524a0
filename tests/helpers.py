"""Helpers of tests: small random models, free ports, and functions that run on several ranks."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3_text": Gemma3TextConfig}


def tiny_config(
    family: str, tied: bool, vocab: int = 384, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2
) -> Any:
    """Return a small configuration of a model family; by default two layers, four query and two key-value heads."""
    shape: dict[str, Any] = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large enough that gradients are well above float32's rounding errors
    )
    if family == "qwen2":  # transformers ignores head_dim here: it is hidden / heads
        shape.update(num_attention_heads=hidden // 32, num_key_value_heads=1)
    if family == "gemma3_text":
        # Alternates sliding and full layers, with a window shorter than most sequences and its own attention scale.
        shape.update(sliding_window=8, sliding_window_pattern=2, query_pre_attn_scalar=24)
    return CONFIGS[family](**shape)


def save_tiny_model(folder: Path, family: str = "llama", tied: bool = True, seed: int = 0, **shape: int) -> Path:
    """Save a random float32 model as a Hugging Face folder without tokenizer; return the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied, **shape), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # norms of ones would hide a missing gradient
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    return folder


_PORTS = itertools.count(random.Random(os.getpid()).randrange(10_000))
"""Counter for candidate ports; it starts at a random number, so that concurrent processes find different ports."""


def free_port() -> int:
    """Return a free port in 20000..31999.

    Linux uses ports from 32768 for outgoing connections, so such a port could be taken before the rendezvous uses it.
    """
    while True:
        port = 20_000 + next(_PORTS) % 12_000
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


_PRELOADED = [
    *("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.utils.tensorboard", "omegaconf", "tyro"),
    *(f"transformers.{name}" for name in ("modeling_utils", "models.auto.modeling_auto")),
    *(f"transformers.models.{name}" for name in ("llama.modeling_llama", "qwen2.modeling_qwen2")),
    *(f"transformers.models.{name}" for name in ("qwen3.modeling_qwen3", "gemma3.modeling_gemma3")),
    *("pandas", "pyarrow.compute", "distill.build", "tests.harness", "tests.test_train"),
]
"""Modules that the fork server imports once per test session; each process would need about eleven seconds of CPU."""


_READ_ON_IMPORT = ("CUDA_VISIBLE_DEVICES", "HF_", "LD_PRELOAD", "OMP_NUM_THREADS", "TRANSFORMERS_", "TRITON_INTERPRET")
"""Prefixes of environment variables that tests set and that a preloaded module or its libraries read on import."""


def _import_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_READ_ON_IMPORT)}


_FIRST_ENVIRONMENT = _import_environment()


def _start_method() -> str:
    """Return how to start ranks: "forkserver", a fork of a process that has only imported modules, or "spawn".

    The forked ranks share no other state with earlier ranks. Ranks whose variables would change an import are spawned.
    CUDA may not work after a fork.
    """
    if torch.cuda.is_available() or _import_environment() != _FIRST_ENVIRONMENT:
        return "spawn"
    multiprocessing.set_forkserver_preload(_PRELOADED)
    return "forkserver"


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in ``ranks`` processes that can create a World; return the results in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        _start(ranks, folder, function, args)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def exit_codes(ranks: int, function: Callable[..., Any], *args: Any) -> list[int | None]:
    """Call ``function(*args)`` as ``run_ranks`` does; wait until all ranks have exited, and return their exit codes."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(ranks, folder, function, args, join=False).processes
        for process in processes:
            process.join(120)
            process.kill()
            process.join()
        return [process.exitcode for process in processes]


def _start(ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], join: bool = True) -> Any:
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given = environment, folder, function, args
    return mp.start_processes(_rank_main, given, nprocs=ranks, join=join, start_method=_start_method())


def _rank_main(
    rank: int, environment: dict[str, str], folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.clear()  # a forked rank has the variables of the fork server
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
