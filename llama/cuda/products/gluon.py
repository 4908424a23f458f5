"""Gluon, Triton's language in which a kernel says where each number lies. In Triton's interpreter,
which does not know it, the same names stand for what they mean where nothing lies anywhere.

Knows no kernel. The surprising thing: in the interpreter shared memory is a Python object, a copy
to it is done when it is begun, and warps that work together work one after the other; so the
interpreter shows what a kernel computes, and not whether it waits.
"""

# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN202, ANN204, ANN205, ANN401 (nor have kernels types)
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import INTERPRETED


def _cut(value, dim, length):
    """A dimension in parts of `length`, which becomes the one behind it; and their numbers."""
    shape = [int(n) for n in value.shape]
    parts = shape[dim] // length
    numbers = [1] * dim + [parts] + [1] * (len(shape) - dim)
    cut = tl.reshape(value, [*shape[:dim], parts, length, *shape[dim + 1 :]])
    return cut, tl.reshape(tl.arange(0, parts), numbers)


class _Memory:
    """Shared memory of one program: a tensor, or one at each index of its first dimension."""

    def __init__(self, dtype, shape):
        self.dtype, self.shape, self.blocks, self.value = dtype, shape, {}, None

    def index(self, i):
        return self.blocks.setdefault(int(i), _Memory(self.dtype, self.shape[1:]))

    def load(self, layout=None):
        return tl.full(self.shape, 0, self.dtype) if self.value is None else self.value

    def store(self, value):
        self.value = value

    def permute(self, order):
        view = _Memory(self.dtype, [self.shape[i] for i in order])
        view.store(tl.permute(self.load(), *order))
        return view


class _Rows:
    """A tensor's first dimension, by index."""

    def __init__(self, value):
        self.value = value

    def index(self, i):
        cut, number = _cut(self.value, 0, 1)
        row = tl.sum(tl.where(number == i, cut, 0), 0).to(cut.dtype)
        shape = [int(n) for n in row.shape]
        memory = _Memory(row.dtype, shape[1:])
        memory.store(tl.reshape(row, shape[1:]))
        return memory


def _copied(memory, pointer, mask):
    every = tl.full(pointer.shape, 1, tl.int1) & mask
    memory.store(tl.load(pointer, mask=every, other=0))


def _nothing(*_, **__):
    return None


class _Gluon:
    """Names of Gluon: Triton's, which the interpreter replaces while it runs, but for these."""

    def __getattr__(self, name: str) -> Any:
        return _nothing if name.endswith("Layout") else getattr(tl, name)

    @staticmethod
    def arange(start, end, layout):
        return tl.arange(start, end)

    @staticmethod
    def full(shape, value, dtype, layout):
        return tl.full(shape, value, dtype)

    @staticmethod
    def convert_layout(value, layout, assert_trivial=False):
        return value

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        return _Memory(dtype, shape)


if INTERPRETED:
    from triton.tools import tensor_descriptor as host

    jit, gl = triton.jit, _Gluon()

    def constexpr_function(function):
        return lambda *args: function(*(getattr(arg, "value", arg) for arg in args))

    copy_numbers = _copied
    barrier = commit_group = wait_group = _nothing

    class _Barriers:
        MBarrierLayout = init = expect = arrive = wait = staticmethod(_nothing)

    class _Described:
        @staticmethod
        def from_tensor(tensor, block, layout):
            return host.TensorDescriptor.from_tensor(tensor, block)

    mbarrier: Any = _Barriers
    TensorDescriptor: Any = _Described

    def copy_tile(described, at, ready, memory, there):
        if there:
            memory.store(described.load(at))

    def work_together(functions, warps, registers):
        for function, given in functions:
            function(*given)

    def as_rows(memory, shape, layout):
        return _Rows(tl.reshape(memory.load(), shape))

    def flat(memory, layout):
        first, second, *rest = memory.shape
        view = _Memory(memory.dtype, [first * second, *rest])
        view.store(tl.reshape(memory.load(), view.shape))
        return view

    def mma_v2(a, b, sums):
        return tl.dot(a, b, sums, input_precision="ieee")

    def warpgroup_mma(a, b, sums, use_acc=True, is_async=False):
        return mma_v2(a.load() if isinstance(a, _Memory) else a, b.load(), sums)

    def warpgroup_mma_init(sums):
        return sums

    def warpgroup_mma_wait(count, deps):
        return deps[0]
else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language
    from triton.experimental.gluon.language.nvidia import ampere, hopper
    from triton.experimental.gluon.nvidia import hopper as host

    gl, jit, constexpr_function = language, gluon.jit, gluon.constexpr_function
    work_together = gl.warp_specialize
    async_copy, mma_v2 = ampere.async_copy, ampere.mma_v2
    commit_group, wait_group = async_copy.commit_group, async_copy.wait_group
    mbarrier, tma, warpgroup_mma = hopper.mbarrier, hopper.tma, hopper.warpgroup_mma
    warpgroup_mma_init, warpgroup_mma_wait = hopper.warpgroup_mma_init, hopper.warpgroup_mma_wait
    TensorDescriptor = host.TensorDescriptor

    def _named(module, *names):
        """What has one of these names, the latest of which comes first."""
        return next(getattr(module, name) for name in names if hasattr(module, name))

    # Triton 3.6 has the last ones, 3.9 the first ones.
    barrier = _named(gl, "barrier", "thread_barrier")
    copy_numbers = _named(async_copy, "async_load", "async_copy_global_to_shared")
    copy_tile = _named(tma, "async_load", "async_copy_global_to_shared")
    RENAMED = tl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

    @jit
    def as_rows(memory, shape: tl.constexpr, layout: tl.constexpr):
        """Memory in another shape, whose first dimension is an index; `layout` is of the others."""
        if RENAMED:
            return memory.reinterpret(memory.dtype, shape, layout)
        else:
            return memory._reinterpret(memory.dtype, shape, layout)

    @jit
    def flat(memory, layout: tl.constexpr):
        """Its first two dimensions as one."""
        shape: tl.constexpr = [memory.shape[0] * memory.shape[1], memory.shape[2]]
        return as_rows(memory, shape, layout)


@constexpr_function
def tiles_memory(columns, bits):
    """(H, N / H, columns) of a matrix in H halves, as the copy engine brings it."""
    return gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 3)


def described(tensor: Tensor, halves: int, block_n: int, columns: int) -> object:
    """A matrix, in halves one above the other, as the copy engine brings tiles of it."""
    rows, inputs = tensor.shape
    return TensorDescriptor.from_tensor(
        tensor.view(halves, rows // halves, inputs),
        [halves, block_n // halves, columns],
        tiles_memory(columns, 8 * tensor.itemsize),
    )


@jit
def next_slot(slot, phase, STAGES: tl.constexpr):
    """Of a ring, and which time around its barriers are in."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@constexpr_function
def powers(step, count):
    """step, 2 step, 4 step and so on, below count times it: what the bits of a layout move by."""
    return [step << i for i in range(int(count).bit_length() - 1)]
