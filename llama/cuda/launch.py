"""What all kernels share: how launches overlap, and how a kernel is run without a GPU.

Programmatic dependent launch (compute capability 9.0): a kernel that is launched with `OVERLAP`
begins while its predecessor runs. Until `wait` returns it may read what no kernel writes, weights
and parameters, and nothing else; after it, all of its predecessors' writes are there. Every program
of every kernel must call `wait`, also one that has nothing to do, since that is what makes the
promise hold along a chain of kernels. `allow` lets the successor begin.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: bool = triton.knobs.runtime.interpret  # Triton's interpreter, on CPU tensors: tests


@triton.jit
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Return when everything that was launched before has been written."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def allow(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Let the next kernel begin, up to its own `wait`."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def fetch(row, length, FETCH: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN201
    """Have the first FETCH bytes of rows brought to the L2 cache; (N, 1) pointers to `length`
    numbers each, of what no kernel writes. Waits for nothing."""
    if OVERLAP and FETCH > 0:
        numbers: tl.constexpr = 1024 // row.dtype.element_ty.primitive_bitwidth  # of a cache line
        lines: tl.constexpr = triton.next_power_of_2(FETCH // 128)
        line = tl.minimum(tl.arange(0, lines) * numbers, length - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(row + line[None, :]).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) in the interpreter, and of a CPU."""
    if INTERPRETED or device.type != "cuda":
        return 0, 0
    return torch.cuda.get_device_capability(device)


def multiprocessors_and_memory(device: torch.device) -> tuple[int, int]:
    """Of a GPU, and how many bytes of it a program may share; in the interpreter some."""
    if INTERPRETED or device.type != "cuda":
        return 1, 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    return found["multiprocessor_count"], found["max_shared_mem"]


@cache
def overlap(device: torch.device) -> Mapping[str, Any]:
    """Keyword arguments of a launch: overlapped with its predecessor where the GPU can do that."""
    can = capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if can else {"OVERLAP": False}
