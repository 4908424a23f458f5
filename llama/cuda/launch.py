"""What all kernels share: how launches overlap, and how a kernel is run without a GPU.

Programmatic dependent launch (compute capability 9.0): a kernel that is launched with `OVERLAP`
begins while its predecessor runs. Until `wait` returns it may read what no kernel writes, weights
and parameters, and nothing else; after it, all of its predecessors' writes are there. Every program
of every kernel must call `wait`, also one that has nothing to do, since that is what makes the
promise hold along a chain of kernels. `allow` lets the successor begin.

Nobody should wait for a compiler: what a step or a prompt launches is compiled in one go before the
first one, by as many threads as there are processors (`compile_together`).
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

LEAST_SHARED = 32 * 1024  # bytes of a program below which blocks are not made for

INTERPRETED: bool = triton.knobs.runtime.interpret  # Triton's interpreter, on CPU tensors: tests


def current(device: torch.device) -> AbstractContextManager[object]:
    """Where `device` is the GPU that launches, events and memory of this thread are of."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_its_device(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method that runs where `self.device` is the current one, whichever was before: threads have
    their own, and Triton launches on it."""

    @wraps(method)
    def there(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:  # noqa: ANN401
        with current(self.device):
            return method(self, *args, **kwargs)

    return there


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:  # noqa: ANN401
    """`kernel[grid]`, to be called with the arguments; see `compile_together`."""
    gathered = _gathered.get()
    if gathered is None:
        return kernel[grid]  # type: ignore[no-any-return]
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

        def load(kernel: Any) -> None:  # noqa: ANN401
            torch.cuda.set_device(device)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            kernel.run  # noqa: B018  (compiles what launches it, in C)

        list(threads.map(load, {id(kernel): kernel for kernel in gathered}.values()))


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


def index_of(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


def multiprocessors_and_memory(device: torch.device) -> tuple[int, int]:
    """Of a GPU, and how many bytes of it a program may share; in the interpreter some."""
    if INTERPRETED or device.type != "cuda":
        return 1, _less.get(device, 227 * 1024)
    found = triton.runtime.driver.active.utils.get_device_properties(index_of(device))
    shared = found["max_shared_mem"]
    return found["multiprocessor_count"], min(shared, _less.get(device, shared))


_less: dict[torch.device, int] = {}  # bytes for a program, where a kernel found too few


def use_less(device: torch.device) -> bool:
    """Have the kernels of whatever is made from now on share half as much memory, for a device that
    could not load one; False where they are as small as they can be."""
    shared = multiprocessors_and_memory(device)[1] // 2
    if shared < LEAST_SHARED:
        return False
    _less[device] = shared
    return True


@cache
def overlap(device: torch.device) -> Mapping[str, Any]:
    """Keyword arguments of a launch: overlapped with its predecessor where the GPU can do that."""
    can = capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if can else {"OVERLAP": False}
