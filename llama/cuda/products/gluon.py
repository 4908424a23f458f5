"""Gluon, Triton's language in which a kernel says where each number lies. In Triton's interpreter,
which does not know it, the same names stand for what they mean where nothing lies anywhere.

This file knows no kernel. The surprising thing: in the interpreter shared memory is a Python
object, a copy to it is done when it is begun, and specialized warps work one after the other; so
the interpreter shows what a kernel computes, and not whether it waits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import INTERPRETED


def _cut(value, dim, length):
    """Cut a dimension in parts of `length`, which becomes the one behind it; returns that and the
    index of each part."""
    shape = [int(n) for n in value.shape]
    parts = shape[dim] // length
    numbers = [1] * dim + [parts] + [1] * (len(shape) - dim)
    cut = tl.reshape(value, [*shape[:dim], parts, length, *shape[dim + 1 :]])
    return cut, tl.reshape(tl.arange(0, parts), numbers)


class _Memory:
    """Shared memory of one program holds a tensor, or one at each index of its first dimension."""

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


class _Views:
    """What a tensor has at each index of its first dimension, as shared memory."""

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
    """Gluon's names are Triton's, which the interpreter replaces while it runs, but for these."""

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

    cp_async = _copied
    barrier = commit_group = wait_group = _nothing

    class _Barriers:
        MBarrierLayout = init = expect = arrive = wait = staticmethod(_nothing)

    class _Descriptors:
        @staticmethod
        def from_tensor(tensor, block, layout):
            return host.TensorDescriptor.from_tensor(tensor, block)

    mbarrier: Any = _Barriers
    TensorDescriptor: Any = _Descriptors

    def tma_load(described, at, ready, memory, there):
        if there:
            memory.store(described.load(at))

    def warp_specialize(functions, warps, registers):
        for function, given in functions:
            function(*given)

    def reinterpret(memory, shape, layout):
        return _Views(tl.reshape(memory.load(), shape))

    def merge_halves(memory, layout):
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
    warp_specialize = gl.warp_specialize
    async_copy, mma_v2 = ampere.async_copy, ampere.mma_v2
    commit_group, wait_group = async_copy.commit_group, async_copy.wait_group
    mbarrier, tma, warpgroup_mma = hopper.mbarrier, hopper.tma, hopper.warpgroup_mma
    warpgroup_mma_init, warpgroup_mma_wait = hopper.warpgroup_mma_init, hopper.warpgroup_mma_wait
    TensorDescriptor = host.TensorDescriptor

    def _named(module, *names):
        """The first of these names that the module has; the latest comes first."""
        return next(getattr(module, name) for name in names if hasattr(module, name))

    # Triton 3.6 has the last ones, 3.9 the first ones.
    barrier = _named(gl, "barrier", "thread_barrier")
    cp_async = _named(async_copy, "async_load", "async_copy_global_to_shared")
    tma_load = _named(tma, "async_load", "async_copy_global_to_shared")
    RENAMED = tl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

    @jit
    def reinterpret(memory, shape: tl.constexpr, layout: tl.constexpr):
        """View memory in another shape, whose first dimension is an index; `layout` is that of the
        others."""
        if RENAMED:
            return memory.reinterpret(memory.dtype, shape, layout)
        else:
            return memory._reinterpret(memory.dtype, shape, layout)

    @jit
    def merge_halves(memory, layout: tl.constexpr):
        """View memory with its first two dimensions as one."""
        shape: tl.constexpr = [memory.shape[0] * memory.shape[1], memory.shape[2]]
        return reinterpret(memory, shape, layout)


@constexpr_function
def tma_layout(columns, bits):
    """How a tile (H, N / H, columns) of a matrix in H halves lies when TMA has loaded it."""
    return gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 3)


def tma_descriptor(tensor: Tensor, halves: int, block_n: int, columns: int) -> object:
    """Describe a matrix, in halves one above the other, to the copy engine, which loads tiles."""
    rows, inputs = tensor.shape
    return TensorDescriptor.from_tensor(
        tensor.view(halves, rows // halves, inputs),
        [halves, block_n // halves, columns],
        tma_layout(columns, 8 * tensor.itemsize),
    )


@jit
def next_stage(stage, phase, STAGES: tl.constexpr):
    """The stage after this one, and the phase that its barriers are in: it flips at each round."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@constexpr_function
def powers(step, count):
    """The basis vectors of a layout's bits: step, 2 step, 4 step and so on, below count * step."""
    return [step << i for i in range(int(count).bit_length() - 1)]
