"""What all kernels share: how launches overlap, and how a kernel is compiled, or run without a GPU.

It knows launches and devices, and no kernel by name.

Programmatic dependent launch (compute capability 9.0): a kernel that is launched with `OVERLAP`
begins while its predecessor runs. Until `wait` returns it may read what no kernel writes, weights
and parameters, and nothing else; after it, all of its predecessors' writes are there. Every program
of every kernel must call `wait`, also one that has nothing to do, since that is what makes the
promise hold along a chain of kernels. `allow` lets the successor begin.

Nobody should wait for a compiler: what a step or a prompt launches is compiled in one go before the
first one, by as many threads as there are processors (`compile_together`).

Kernels take what belongs together as one argument: a NamedTuple of tensors and numbers, whose
fields they read by name, or, as a constant, one of integers and flags.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

P = ParamSpec("P")
T = TypeVar("T")

# Kernels, while they are not to run; of this thread alone, since others go on launching theirs.
_gathered: ContextVar[list[Any] | None] = ContextVar("gathered", default=None)

LEAST_SHARED = 32 * 1024  # bytes of shared memory, at least, that blocks are chosen for

INTERPRETED: bool = triton.knobs.runtime.interpret  # Triton's interpreter, on CPU tensors: tests


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is the GPU of this thread's launches, events and memory."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_its_device(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """The method, run with `self.device` as the current device whichever was current before: every
    thread has its own, and Triton launches on it."""

    @wraps(method)
    def on_device(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with current(self.device):
            return method(self, *args, **kwargs)

    return on_device


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """`kernel[grid]`, to be called with the arguments; see `compile_together`."""
    gathered = _gathered.get()
    if gathered is None:
        run: Callable[..., object] = kernel[grid]
        return run
    return lambda *args, **options: gathered.append(kernel.warmup(*args, grid=grid, **options))


def compile_together(function: Callable[[], object], device: torch.device) -> None:
    """Call `function`; what it launches does not run, but is compiled and loaded, all at one time.

    In a context of its own, since Triton's mode outlives an exception there, Ctrl-C for one.
    """
    with current(device):
        copy_context().run(_compile_together, function, index_of(device))


def _compile_together(function: Callable[[], object], device: int) -> None:
    gathered: list[Any] = []
    _gathered.set(gathered)  # in the context that ends with this function
    with ThreadPoolExecutor() as threads:
        with triton.AsyncCompileMode(threads):
            function()

        def load(kernel: Any) -> None:
            torch.cuda.set_device(device)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            _ = kernel.run  # reading it compiles what launches the kernel, in C

        list(threads.map(load, {id(kernel): kernel for kernel in gathered}.values()))


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Return when everything that was launched before has been written."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def allow(OVERLAP: tl.constexpr):
    """Let the next kernel begin, up to its own `wait`."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def prefetch(row, length, BYTES: tl.constexpr, OVERLAP: tl.constexpr):
    """Prefetch the first BYTES bytes of rows into the L2 cache, without waiting for them: `row`
    (N, 1) points to `length` numbers each, which no kernel writes."""
    if OVERLAP and BYTES > 0:
        numbers: tl.constexpr = 1024 // row.dtype.element_ty.primitive_bitwidth  # of a cache line
        lines: tl.constexpr = triton.next_power_of_2(BYTES // 128)
        line = tl.minimum(tl.arange(0, lines) * numbers, length - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(row + line[None, :]).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device: (0, 0) for a CPU, and in the interpreter."""
    if INTERPRETED or device.type != "cuda":
        return 0, 0
    return torch.cuda.get_device_capability(device)


def index_of(device: torch.device) -> int:
    """The number of a GPU: that of the current one where the device does not say."""
    return torch.cuda.current_device() if device.index is None else device.index


def multiprocessors_and_memory(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors a GPU has, and how many bytes of shared memory a program may have
    there. A CPU, and the interpreter, count as one with 227 KB."""
    if INTERPRETED or device.type != "cuda":
        return 1, _less.get(device, 227 * 1024)
    found = triton.runtime.driver.active.utils.get_device_properties(index_of(device))
    shared = found["max_shared_mem"]
    return found["multiprocessor_count"], min(shared, _less.get(device, shared))


_less: dict[torch.device, int] = {}  # bytes of shared memory, where a kernel found too few


def use_less(device: torch.device) -> bool:
    """Halve the shared memory that kernels are made for from now on, on a device that could not
    load one; return False where they are as small as they can be."""
    shared = multiprocessors_and_memory(device)[1] // 2
    if shared < LEAST_SHARED:
        return False
    _less[device] = shared
    return True


@cache
def overlap(device: torch.device) -> Mapping[str, Any]:
    """Keyword arguments that overlap a launch with its predecessor, where the GPU can do that."""
    can = capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if can else {"OVERLAP": False}
