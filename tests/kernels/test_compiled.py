"""All kernels compiled for A100, H100 and B200: no spills in main loops, 16-byte accesses; see ``compiled.py``.

The compiler, ``cuobjdump`` and ``nvdisasm`` of the triton package need no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

from tests.kernels.compiled import (
    LENGTHS,
    TARGETS,
    Compiled,
    Loop,
    Unsupported,
    innermost_loops,
    instructions,
    spills,
    widths,
)

ROOT = Path(__file__).resolve().parents[2]


class Limits(NamedTuple):
    """What the compiler's result of a kernel must satisfy on every GPU."""

    stack: int = 0
    """Bytes per thread of registers that are spilled to memory, outside of the main loop."""
    spills: int = 0
    """Loads and stores of spilled registers in the main loop."""
    barriers: int = 0
    """Barriers in the main loop."""
    wide_loads: int = 4
    """Least number of 16-byte loads in the main loop, or in the kernel if it has no loop."""
    narrow: bool = False
    """Whether the main loop may have accesses of less than 16 bytes."""


LIMITS = {
    "loss_student._reduce": Limits(),
    # The 8 bytes are outside of the loop, on sm_80 with a slope.
    "loss_student._gradient": Limits(stack=8),
    "topk_programs.scan_tiles": Limits(wide_loads=16),
    # It gathers single logits of a few tiles, and is limited to 64 registers, so that more rows run at the same time.
    "topk_programs.select": Limits(stack=160, spills=8, barriers=12, wide_loads=0, narrow=True),
    # Each loop has a branch with 16-byte loads for complete blocks and one with masked loads for the end of the row.
    "topk_programs.full_row": Limits(barriers=32, narrow=True),  # 28 with Triton 3.9, 32 with 3.7.1
    "layer_norm._forward": Limits(),
    # Each row needs two sums over all threads.
    "layer_norm._backward": Limits(barriers=8),
    "layer_rotary._forward": Limits(),
    "layer_rotary._backward": Limits(),
    "layer_gate._forward": Limits(wide_loads=2),
    "layer_gate._backward": Limits(wide_loads=3),
}
LAUNCHES = {
    "loss_student._reduce": 2,
    "loss_student._gradient": 2,
    "topk_programs.scan_tiles": 1,
    "topk_programs.select": 1,
    "topk_programs.full_row": 1,
    "layer_norm._forward": 2,
    "layer_norm._backward": 2,
    "layer_rotary._forward": 4,
    "layer_rotary._backward": 4,
    "layer_gate._forward": 2,
    "layer_gate._backward": 2,
}
"""Number of variants of each kernel on the first GPU, by dtypes and optional arguments; on another GPU it is 1."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Compiled], list[Unsupported], list[str]]:
    """Compile in a separate process, because kernels decorated for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    compiled = [
        Compiled(name, target, registers, stack, [Loop(*loop) for loop in loops], loads, stores)
        for name, target, registers, stack, loops, loads, stores in printed["compiled"]
    ]
    return compiled, [Unsupported(*entry) for entry in printed["unsupported"]], printed["variants"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_do_not_spill_in_main_loops_and_access_16_bytes_at_a_time(
    found: tuple[list[Compiled], list[Unsupported], list[str]], target: int
) -> None:
    compiled, unsupported, _ = found
    reasons = [entry.reason for entry in unsupported if entry.target == target]
    if reasons:
        pytest.skip(f"triton cannot compile for sm_{target}: {reasons[0]}")
    kernels = [kernel for kernel in compiled if kernel.target == target]
    names = [kernel.name.split()[0] for kernel in kernels]
    expected = LAUNCHES if target == TARGETS[0] else dict.fromkeys(LAUNCHES, 1)
    assert {name: names.count(name) for name in names} == expected
    for kernel, name in zip(kernels, names, strict=True):
        limits = LIMITS[name]
        assert kernel.stack <= limits.stack, kernel
        main = main_loop(kernel)
        assert main.spills <= limits.spills and main.barriers <= limits.barriers, kernel
        assert sum(size >= 16 for size in main.loads) >= limits.wide_loads, kernel
        if kernel.loops and not limits.narrow:
            assert all(size >= 16 for size in [*main.loads, *main.stores]), kernel


def main_loop(kernel: Compiled) -> Loop:
    """Return the loop that moves the most bytes per iteration, or the complete kernel if it has no loop."""
    complete = Loop(0, kernel.loads, kernel.stores, kernel.stack, 0)
    return max(kernel.loops, key=lambda loop: sum(loop.loads) + sum(loop.stores), default=complete)


@pytest.mark.slow
def test_kernels_of_layers_are_not_compiled_again_for_another_pack_length(
    found: tuple[list[Compiled], list[Unsupported], list[str]],
) -> None:
    variants = found[2]
    kernels = 2 + 4 + 4  # norm, rotary with and without a norm, two activations; forward and backward
    assert len(variants) == len(LENGTHS) * kernels and len(set(variants)) == kernels


SASS = """
        /*0000*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;     /* 0x1 */
        /*0010*/                   MOV R5, R4 ;                          /* 0x1 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x1 */
        /*0030*/                   STL.64 [R1], R4 ;                     /* 0x1 */
        /*0040*/             @P0   BRA 0x20 ;                            /* 0x1 */
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;       /* 0x1 */
        /*0060*/             @!P1  BRA P2, 0x10 ;                        /* 0x1 */
        /*0070*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ; /* 0x1 */
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_machine_code_is_read() -> None:
    code = instructions(SASS)
    (inner,) = innermost_loops(code)
    assert [instruction.address for instruction in inner] == [0x20, 0x30, 0x40]
    assert (widths(code, "LDG"), widths(code, "STG"), spills(inner)) == ([2, 16, 32], [8], 1)
