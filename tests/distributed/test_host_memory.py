"""Code paths for CPUs: attention in float32, reduce-scatter with gloo, and reuse of freed memory."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from distill.distributed.world import World
from distill.model.attention import packed_attention
from distill.model.gloo_reduce_scatter import GlooReduceScatter
from tests.helpers import run_ranks


def random_heads(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [1, 4, T, 8], keys and values [1, 2, T, 8] that need gradients."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, length, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    return (
        query.transpose(1, 2).requires_grad_(),
        key.transpose(1, 2).requires_grad_(),
        value.transpose(1, 2).requires_grad_(),
    )


def test_bf16_attention_on_a_cpu_is_as_exact_as_pytorch_attention() -> None:
    bounds = (0, 90, 91, 200)
    heads = random_heads(200, torch.bfloat16)
    upstream = torch.randn(1, 200, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (h.detach().double().requires_grad_() for h in heads)
    exact = packed_attention(torch.nn.Module(), q, k, v, None, bounds)[0]
    exact_gradients = torch.autograd.grad(exact, (q, k, v), upstream.double())
    q, k, v = heads
    ours = packed_attention(torch.nn.Module(), q, k, v, None, bounds)[0]
    parts = [
        F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, enable_gqa=True)
        for a, b in pairwise(bounds)
    ]
    plain = torch.cat(parts, 2).transpose(1, 2)
    found = [[value, *torch.autograd.grad(value, heads, upstream)] for value in (ours, plain)]
    for our, other, exactly in zip(*found, [exact, *exact_gradients], strict=True):
        assert our.dtype == torch.bfloat16
        assert (our - exactly).norm() <= 1.05 * (other - exactly).norm()


def _sums() -> tuple[torch.Tensor, torch.Tensor]:
    world = World()
    mine = torch.randn(6 * world.size, generator=torch.Generator().manual_seed(world.rank)).float()
    ours, gloos = torch.empty(6), torch.empty(6)
    GlooReduceScatter()(ours, mine, dist.distributed_c10d._get_default_group(), dist.ReduceOp.SUM)
    dist.reduce_scatter_tensor(gloos, mine)
    world.close()
    return ours, gloos


def test_gloo_reduce_scatter_equals_torch_reduce_scatter() -> None:
    ranks = 3
    everything = [torch.randn(6 * ranks, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    total = torch.stack(everything).double().sum(0).float()
    for rank, (ours, gloos) in enumerate(run_ranks(ranks, _sums)):
        for sums in (ours, gloos):
            torch.testing.assert_close(sums, total[6 * rank : 6 * rank + 6], rtol=1e-6, atol=1e-6)


_PROGRAM = """
import resource, sys, torch
from distill.distributed.host_memory import keep_freed_memory
if not keep_freed_memory():
    sys.exit(5)
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)  # warm-up: the small allocations between the blocks get their final addresses
again = faults(10)
assert again < 16_384, f"{again} page faults; 163840 if no block were reused"
"""


def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    code = subprocess.run([sys.executable, "-c", _PROGRAM], check=False).returncode
    if code == 5:
        pytest.skip("the C library is not glibc")
    assert code == 0


_FRAGMENTS = """
import sys, torch
from distill.distributed.host_memory import give_back_freed_memory, keep_freed_memory, resident_bytes
if not keep_freed_memory():
    sys.exit(5)
blocks = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
full = resident_bytes()
del blocks[::2], blocks[1::2]
kept = resident_bytes()
give_back_freed_memory()
left = resident_bytes()
assert full - kept < 20 * 2**20, (full, kept)
assert full - left > 100 * 2**20, (full, left)
"""


def test_freed_memory_is_returned_on_request() -> None:
    code = subprocess.run([sys.executable, "-c", _FRAGMENTS], check=False).returncode
    if code == 5:
        pytest.skip("the C library is not glibc")
    assert code == 0
