"""Where the numbers of gemv.py lie: in shared memory, in registers, and for the tensor cores.

This file knows shapes and bits and computes nothing. No number may move between threads, and a sum
may be taken in any order: so outputs and inputs are numbered by where the tensor cores want them,
and weights lie as they lie. This is the operand of mma.m16n8k16 that thread T of a warp hands over,
two numbers a register; rows are outputs, columns are inputs:

              k   0 1   2 3   4 5   6 7    8 9  10 11  12 13  14 15
    row  0        T0    T1    T2    T3     T0    T1     T2     T3
    row  1        T4    T5    T6    T7     T4    T5     T6     T7
     ...
    row  7        T28   T29   T30   T31    T28   T29    T30    T31
    row  8        T0    T1    T2    T3     T0    T1     T2     T3
     ...
    row 15        T28   T29   T30   T31    T28   T29    T30    T31

In memory a thread reads 16 bytes that lie side by side, of a plain weight 8 inputs of 32: T0 has
0-7, T1 has 8-15, T2 has 16-23, T3 has 24-31. They are the operands of two instructions, in which
the inputs then have these columns; the row of inputs is read in the same order:

              k   0 1   2 3    4 5    6 7    8 9  10 11  12 13  14 15
    first         0 1   8 9   16 17  24 25   2 3  10 11  18 19  26 27
    second        4 5  12 13  20 21  28 29   6 7  14 15  22 23  30 31

Eight-bit operands (mma.m16n8k32) have four numbers a register instead of two. What is said here in
bits holds for all: of an input's index in a K slice, p or b say which number of a register, j and i
which register, and t which of the four threads that share a row (`bits_of`).

Letters: N outputs of a tile, in H halves, two where w1 lies above w3; W warps; S K slices of a K
block, of all warps.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from llama.cuda.products.gluon import constexpr_function, gl, powers, tma_layout
from llama.cuda.tuning import Gemv
from llama.cuda.weights import INT4, PLAIN, Source


@dataclass(frozen=True)
class GemvShape:
    """What the kernel is compiled for, as one constant argument."""

    inputs: int
    kind: int  # of the weight: PLAIN, INT8, FP8 or INT4
    group: int  # inputs of a group of int4
    halves: int  # 2 where w1 lies above w3, whose outputs are gated
    block_n: int  # outputs of a tile
    k_slice: int  # inputs that a warp multiplies at a time
    slices: int  # K slices of a K block, dealt to the warps in turn
    warps: int
    stages: int
    split: int  # programs that share the sums of a tile (split-K)
    block_k: int  # inputs of a K block: what all warps multiply between two barriers
    k_blocks: int  # of a split
    columns: int  # numbers or bytes of a K block in a row of the weight
    norm: bool  # whether the inputs are normed here
    tma: bool  # whether the copy engine fills the stages (TMA), rather than the threads (cp.async)


def gemv_shape(
    read: Source, inputs: int, blocks: Gemv, gated: bool, norm: bool, tma: bool
) -> GemvShape:
    block_k = block_k_of(read, blocks)
    return GemvShape(
        inputs, read.kind.value, read.group, 2 if gated else 1, blocks.block_n,
        block_k // (blocks.slices * blocks.warps), blocks.slices * blocks.warps, blocks.warps,
        blocks.stages, blocks.split, block_k, -(-inputs // (block_k * blocks.split)),
        block_k // 2 if read.kind == INT4 else block_k, norm, tma,
    )  # fmt: skip


def block_k_of(read: Source, blocks: Gemv) -> int:
    """Inputs of a K block."""
    bits: tuple[str, ...] = bits_of(read.kind, read.group)
    return (1 << len(bits)) * blocks.slices * blocks.warps


def shared_memory(read: Source, inputs: int, blocks: Gemv) -> int:
    """Bytes that a program needs, or a little less."""
    block_k = block_k_of(read, blocks)
    bits = {PLAIN.value: 16, INT4.value: 4}.get(read.kind.value, 8)
    pairs = 4 * block_k // read.group if read.group else 0
    stages = blocks.stages * blocks.block_n * (block_k * bits // 8 + pairs)
    span = -(-inputs // (block_k * blocks.split)) * block_k
    row: int = max(triton.next_power_of_2(span), block_k) * max(2, planes_of(read.kind))
    return stages + row + 4 * blocks.warps * blocks.block_n


# ---- the order of inputs and outputs


@constexpr_function
def bits_of(kind, group):
    """What the bits of an input's index in a K slice say, from the lowest one on."""
    if kind == 0:  # PLAIN
        return ("p", "j", "i0", "t0", "t1")
    if kind == 2:  # FP8
        return ("p", "j", "i0", "i1", "t0", "t1")
    if kind == 1:  # INT8
        return ("b0", "b1", "j", "i0", "t0", "t1")
    of_group = {  # INT4: the highest one is which half of a byte
        32: ("b0", "b1", "t0", "t1", "j"),
        64: ("b0", "b1", "j", "t0", "t1", "i0"),
        128: ("b0", "b1", "j", "i0", "t0", "t1", "i1"),
    }
    return of_group[group]


@constexpr_function
def _in_tensor_cores(bits, lie):
    """The indices in `lie` of the bits, in the order in which the tensor cores want them."""
    wanted = [bit for bit in ("i1", "i0", "j", "t1", "t0", "p", "b1", "b0") if bit in bits]
    return [lie.index(bit) for bit in wanted]


@constexpr_function
def weights_order(bits, int4):
    """The permutation from (N / 8, 2, 2, 2, S, bits as they lie) to (S, N / 8, 2, 2, 2, bits)."""
    lie = bits[::-1]
    if int4:
        lie = (*lie[1:], lie[0])
    return tl.constexpr([4, 0, 3, 2, 1, *(5 + at for at in _in_tensor_cores(bits, lie))])


@constexpr_function
def inputs_order(bits):
    """The permutation from (planes, S, bits as they lie) to (S, bits, planes)."""
    return tl.constexpr([1, *(2 + at for at in _in_tensor_cores(bits, bits[::-1])), 0])


@constexpr_function
def planes_of(kind):
    """How many planes a row has: with int8 and int4 three of its digits, and an empty one."""
    return 4 if kind in (1, 3) else 1


@constexpr_function
def padded_span(shape):
    """Inputs of a split, up to a power of two of K blocks."""
    span = shape.inputs if shape.split == 1 else shape.block_k * shape.k_blocks
    return max(triton.next_power_of_2(span), shape.block_k)


# ---- in shared memory


@constexpr_function
def copy_layout(columns, vector, warps):
    """How threads copy (H, N / H, columns): up to `vector` numbers of a row each."""
    vector = min(vector, columns)
    across = min(32, columns // vector)
    return gl.BlockedLayout([1, 1, vector], [1, 32 // across, across], [1, warps, 1], [2, 1, 0])


@constexpr_function
def stages_memory(columns, bits, tma):
    """How a stage (H, N / H, columns) lies: the 16-byte words of 128 bytes are swizzled."""
    if tma:
        return tma_layout(columns, bits)
    wide = min(128, columns * bits // 8)
    return gl.SwizzledSharedLayout(128 // bits, 128 // wide, wide // 16, [2, 1, 0])


@constexpr_function
def planes_memory(side, rank):
    """How planes (..., planes, inputs) lie: in different banks; `side` bytes are read as one."""
    wide = min(128, side)
    return gl.SwizzledSharedLayout(wide, 1, 128 // wide, [2, 1, 0][3 - rank :])


@constexpr_function
def plain_memory(rank):
    """How numbers lie that are not swizzled."""
    return gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0][3 - rank :])


# ---- in registers


@constexpr_function
def weights_layout(shape):
    """The weights (H, N / H, columns), `each` numbers side by side a thread. Eight rows go to the
    eight quads of threads as 0, 4, 2, 6, 1, 5, 3, 7, so that no bank of memory is asked twice."""
    each = shape.columns // shape.slices // 4
    rows = shape.block_n // shape.halves
    regs = [[0, 0, n] for n in powers(1, each)]
    regs += [[0, 0, n] for n in powers(4 * each * shape.warps, shape.slices // shape.warps)]
    regs += [[0, n, 0] for n in powers(8, rows // 8)]
    regs += [[1, 0, 0]] if shape.halves == 2 else []
    lanes = [[0, 0, each], [0, 0, 2 * each], [0, 4, 0], [0, 2, 0], [0, 1, 0]]
    warps = [[0, 0, n] for n in powers(4 * each, shape.warps)]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], [shape.halves, rows, shape.columns])


@constexpr_function
def pairs_layout(shape):
    """The pairs (H, N / H, S), one for each K slice, in the threads that have its rows."""
    rows = shape.block_n // shape.halves
    regs = [[0, 0, n] for n in powers(shape.warps, shape.slices // shape.warps)]
    regs += [[0, n, 0] for n in powers(8, rows // 8)]
    regs += [[1, 0, 0]] if shape.halves == 2 else []
    lanes = [[0, 0, 0], [0, 0, 0], [0, 4, 0], [0, 2, 0], [0, 1, 0]]
    warps = [[0, 0, n] for n in powers(1, shape.warps)]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], [shape.halves, rows, shape.slices])


@constexpr_function
def inputs_layout(shape):
    """The inputs (planes, block_k), each in the threads that have its weights."""
    bits, planes = bits_of(shape.kind, shape.group), planes_of(shape.kind)
    k_slice = shape.k_slice
    regs = [[0, 1 << i] for i, bit in enumerate(bits) if bit[0] != "t"]
    regs += [[0, n] for n in powers(k_slice * shape.warps, shape.slices // shape.warps)]
    lanes = [[0, 1 << bits.index(t)] for t in ("t0", "t1")]
    lanes += [[1, 0], [2, 0], [0, 0]] if planes == 4 else [[0, 0]] * 3
    warps = [[0, n] for n in powers(k_slice, shape.warps)]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], [planes, shape.block_k])


@constexpr_function
def columns_layout(shape):
    """The second operand (S, k_slice, 8 / planes, planes), which has eight columns."""
    bits, planes = bits_of(shape.kind, shape.group), planes_of(shape.kind)
    low = 2 if "b0" in bits else 1
    regs = [[0, 1 << i, 0, 0] for i in range(len(bits)) if not low <= i < low + 2]
    regs += [[n, 0, 0, 0] for n in powers(shape.warps, shape.slices // shape.warps)]
    lanes = [[0, 1 << low, 0, 0], [0, 2 << low, 0, 0]]
    lanes += [[0, 0, 0, n] for n in powers(1, planes)]
    lanes += [[0, 0, n, 0] for n in powers(1, 8 // planes)]
    warps = [[n, 0, 0, 0] for n in powers(1, shape.warps)]
    dims = [shape.slices, shape.k_slice, 8 // planes, planes]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], dims)


@constexpr_function
def mma_layout(shape):
    """The accumulators (S, N, 8) of the tensor cores."""
    return gl.NVMMADistributedLayout([2, 0], [shape.warps, 1, 1], [1, 16, 8])


@constexpr_function
def sums_layout(shape):
    """The same accumulators as (S, N / 16, 16, 8)."""
    regs = [[0, 0, 0, 1], [0, 0, 8, 0]]
    regs += [[0, n, 0, 0] for n in powers(1, shape.block_n // 16)]
    regs += [[n, 0, 0, 0] for n in powers(shape.warps, shape.slices // shape.warps)]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    warps = [[n, 0, 0, 0] for n in powers(1, shape.warps)]
    dims = [shape.slices, shape.block_n // 16, 16, 8]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], dims)


@constexpr_function
def partials_layout(shape):
    """The accumulators (S / W, W, N) when their columns have been added."""
    each = shape.slices // shape.warps
    regs = [[0, 0, n] for n in powers(8, shape.block_n // 8)]
    regs += [[n, 0, 0] for n in powers(1, each)]
    lanes = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    warps = [[0, n, 0] for n in powers(1, shape.warps)]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], [each, shape.warps, shape.block_n])


@constexpr_function
def outputs_layout(shape):
    """The sums (W, N): those of all warps, and pairs of outputs, are in one thread."""
    pair = shape.block_n // 2 if shape.halves == 2 else 4  # the bit of a row that says which of two
    rows, none = [[0, n] for n in powers(1, shape.block_n) if n != pair], [[0, 0]] * 5
    regs = [[n, 0] for n in powers(1, shape.warps)] + [[0, pair]]
    warps = (rows[5:] + none)[: shape.warps.bit_length() - 1]
    dims = [shape.warps, shape.block_n]
    return gl.DistributedLinearLayout(regs, (rows + none)[:5], warps, [], dims)
