"""Compile the kernels that a launch would run, for GPUs that this machine does not have; print JSON.

Run as ``python -m tests.kernels.compiled`` without TRITON_INTERPRET. Kernel launches are replaced by compilations, so
the functions of ``distill.kernels`` select types, constants and numbers of warps as they do on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

TARGETS = (90, 80, 100)
"""Compute capabilities of H100 and H200, of A100, and of B200; only for the first one, all variants are compiled."""
LENGTHS = (1, 5, 16, 8187, 8192)
"""Positions of a pack; kernels of layers must not be compiled again for another one."""
VOCAB, STRIDE, K = 151_669, 151_680, 64
"""Vocabulary of Qwen3, row stride of its logits in a buffer, and ids of the teacher's top-k."""


class Compiled(NamedTuple):
    """Properties of a kernel compiled for one GPU."""

    name: str
    target: int
    registers: int
    stack: int
    """Bytes per thread of local memory: registers that were spilled to memory."""
    loops: list[Loop]
    loads: list[int]
    """Bytes of each load from global memory outside of loops."""
    stores: list[int]


class Loop(NamedTuple):
    """Instructions of an innermost loop."""

    instructions: int
    loads: list[int]
    """Bytes of each load from global memory."""
    stores: list[int]
    spills: int
    """Number of loads and stores of local memory."""
    barriers: int


class Unsupported(NamedTuple):
    """A GPU for which the installed Triton cannot compile."""

    target: int
    reason: str


def record(found: list[Any]) -> None:
    """Replace the launch of all Triton kernels by their compilation for ``TARGETS``; append results to ``found``.

    The first launch of a kernel compiles it for all GPUs, a later launch with other arguments for the first GPU only.
    """
    from triton.runtime.jit import JITFunction

    compiled: set[Any] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        values = dict(zip(self.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n not in options}
        for target in TARGETS[:1] if self.fn in compiled else TARGETS:
            found.append(_compile(self, values, options, target))
        compiled.add(self.fn)

    JITFunction.run = run


def record_variants(found: list[str]) -> None:
    """Replace the launch of all Triton kernels; append what selects a compiled variant of the kernel to ``found``."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        found.append(f"{name} {specialize(self, dict(zip(self.arg_names, args, strict=False)) | kwargs)}")

    JITFunction.run = run


def specialize(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return types, constants and attributes of a kernel's arguments; a launch with other ones compiles again."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            signature[parameter.name], key = "constexpr", None
        else:
            specialized = not parameter.do_not_specialize
            signature[parameter.name], key = native_specialize_impl(BaseBackend, value, False, specialized, specialized)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif key == "D":
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _compile(kernel: Any, values: dict[str, Any], options: dict[str, Any], target: int) -> Compiled | Unsupported:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialize(kernel, values)
    types = "-".join(kind for kind in signature.values() if kind in ("*bf16", "*fp32"))
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__} {types}"
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        if target > 90 and "sm_" in str(error):  # ptxas of older versions
            return Unsupported(target, str(error).splitlines()[0])
        raise
    return describe(name, target, binary.asm["cubin"])


def describe(name: str, target: int, cubin: bytes) -> Compiled:
    """Return the properties of a compiled kernel, from its resource usage and its machine code."""
    usage = _cuobjdump(cubin, "-res-usage")
    numbers = dict(word.split(":", 1) for line in usage.splitlines() if "REG:" in line for word in line.split())
    code = instructions(_cuobjdump(cubin, "-sass"))
    loops = list(innermost_loops(code))
    inside = {id(instruction) for loop in loops for instruction in loop}
    outside = [instruction for instruction in code if id(instruction) not in inside]
    stack = int(numbers["STACK"]) + int(numbers["LOCAL"])
    described = [
        Loop(len(loop), widths(loop, "LDG"), widths(loop, "STG"), spills(loop), sum("BAR" in i.text for i in loop))
        for loop in loops
    ]
    registers = int(numbers["REG"])
    return Compiled(name, target, registers, stack, described, widths(outside, "LDG"), widths(outside, "STG"))


class Instruction:
    """One machine instruction: its address, and its text such as ``@P0 LDG.E.128 R4, [R2.64]``."""

    def __init__(self, address: int, text: str) -> None:
        self.address, self.text = address, text


def instructions(sass: str) -> list[Instruction]:
    """Return the instructions of ``cuobjdump -sass``."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)
    return [Instruction(int(address, 16), text.strip()) for address, text in found]


def innermost_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yield the instructions of each loop that contains no other loop; a loop ends with a branch backwards."""
    ranges = []
    for instruction in code:
        target = re.search(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)*(0x[0-9a-f]+)", instruction.text)
        # The last instruction of every kernel branches to itself.
        if target and int(target[1], 16) < instruction.address:
            ranges.append((int(target[1], 16), instruction.address))
    for first, last in ranges:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in ranges):
            yield [instruction for instruction in code if first <= instruction.address <= last]


def widths(code: list[Instruction], operation: str) -> list[int]:
    """Return the bytes of each instruction ``LDG`` or ``STG``: a load or store of global memory."""
    found = []
    for instruction in code:
        match = re.search(rf"\b{operation}((?:\.\w+)*)", instruction.text)
        if match:
            sizes = [int(bits) // 8 for bits in re.findall(r"\.(?:ENL2\.)?(\d+)\b", match[1]) if int(bits) >= 64]
            small = 1 if re.search(r"\.[US]8\b", match[1]) else 2 if re.search(r"\.[US]16\b", match[1]) else 4
            found.append(max(sizes, default=small))
    return found


def spills(code: list[Instruction]) -> int:
    """Return the number of loads and stores of local memory."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", instruction.text)) for instruction in code)


def _cuobjdump(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def launch_loss_kernels() -> None:
    """Launch the kernels of the loss and of the top-k as a training step with Qwen3 does."""
    from distill.kernels.loss_student import gradient_rows, reduce_rows
    from distill.kernels.topk import topk_with_tail

    ids_CK, number_C, d_logits_CK = torch.zeros(2, K, dtype=torch.int32), torch.zeros(2), torch.zeros(2, K)
    for dtype, slope_C in ((torch.float32, number_C), (torch.bfloat16, None)):
        z_CV, out_CV = _logits(dtype), _logits(torch.bfloat16)
        reduce_rows(z_CV, ids_CK, 1.0)
        gradient_rows(z_CV, ids_CK, number_C, number_C, slope_C, d_logits_CK, 1.0, out_CV)
    topk_with_tail(_logits(torch.float32), K, 1.0)


def launch_layer_kernels(
    length: int = 4, widths: tuple[int, ...] = (5120, 576), channels: tuple[int, ...] = (128, 96, 256)
) -> None:
    """Launch the kernels of layers as models with these sizes do, forward and backward, for ``length`` positions.

    The rotary embedding without a norm is launched for the first number of channels only.
    """
    from distill.kernels.layer_gate import gated, gated_backward
    from distill.kernels.layer_norm import rms_norm, rms_norm_backward
    from distill.kernels.layer_rotary import rotary, rotary_backward

    for width in widths:
        x_TD = torch.zeros(length, width, dtype=torch.bfloat16)
        rms_norm(x_TD, x_TD[0], 1e-6, False)
        rms_norm_backward(x_TD, x_TD, x_TD[0], 1e-6, False)
    for size in channels:
        x_THC, angles_TC = (torch.zeros(length, *shape, dtype=torch.bfloat16) for shape in ((8, size), (size,)))
        for saved_THC, weight_C in ((x_THC, angles_TC[0]), (None, None))[: 1 + (size == channels[0])]:
            rotary(x_THC, weight_C, angles_TC, angles_TC, 1e-6, False)
            rotary_backward(x_THC, saved_THC, weight_C, angles_TC, angles_TC, 1e-6, False)
    for gelu in (False, True):
        gated(x_TD, x_TD, gelu)
        gated_backward(x_TD, x_TD, x_TD, gelu)


def _logits(dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, STRIDE, dtype=dtype)[:, :VOCAB]


def main() -> int:
    """Print the variants for several pack lengths, a list of compiled kernels, and a list of unsupported targets."""
    variants: list[str] = []
    record_variants(variants)
    for length in LENGTHS:
        launch_layer_kernels(length, (580,), (64,))
    found: list[Any] = []
    record(found)
    launch_loss_kernels()
    launch_layer_kernels()
    compiled = [kernel for kernel in found if isinstance(kernel, Compiled)]
    unsupported = [entry for entry in found if isinstance(entry, Unsupported)]
    print(json.dumps({"variants": variants, "compiled": compiled, "unsupported": unsupported}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
