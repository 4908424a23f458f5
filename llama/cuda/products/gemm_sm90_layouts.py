"""Where the numbers of gemm_sm90.py lie: in shared memory, in registers, and in the tensor cores.

This file knows shapes and bits and computes nothing. A warp of a consumer has sixteen rows of the
first operand of wgmma for each sixteen inputs, as gemv_layouts.py draws them. A thread reads eight
bytes of a packed weight that lie side by side, int8 and fp8 for example inputs 0 to 7 of
sixty-four, and they are its numbers in two instructions. So both operands have their inputs in
another order: of the bits h t t i j p of an index in sixty-four, h i j t t p.

Letters: N outputs of a consumer, in H halves of the weight, two where w1 lies above w3; K inputs,
RP rows as the tensor cores see them. The bits of an input's index in sixty-four, from the lowest
one on, are p of a pair, j, i, t which of four threads, h.
"""

from dataclasses import dataclass

import triton.language as tl

from llama.cuda.products.gluon import constexpr_function, gl, powers
from llama.cuda.tuning import GemmSm90
from llama.cuda.weights import INT4, Source

GROUP = tl.constexpr(64)  # inputs of a group of int4
WARPS = tl.constexpr(4)  # of a consumer


@dataclass(frozen=True)
class GemmSm90Shape:
    """What the kernel is compiled for, as one constant argument; no NamedTuple, since Triton 3.6
    forgets the names of a constant one on its way to specialized warps."""

    inputs: int
    kind: int  # of the weight: PLAIN, INT8, FP8 or INT4
    halves: int  # 2 where w1 lies above w3, whose outputs are gated
    padded: int  # rows as the tensor cores see them
    block_n: int  # outputs of a consumer
    block_k: int  # inputs of a K block
    k_blocks: int  # of a program
    columns: int  # numbers or bytes of a K block in a row of the weight
    stages: int
    registers: int  # of a thread of a consumer


def gemm_sm90_shape(
    read: Source, inputs: int, blocks: GemmSm90, gated: bool, registers: int
) -> GemmSm90Shape:
    columns = blocks.block_k // 2 if read.kind == INT4 else blocks.block_k
    return GemmSm90Shape(
        inputs, read.kind.value, 2 if gated else 1, blocks.padded, blocks.block_n, blocks.block_k,
        inputs // blocks.block_k // blocks.split, columns, blocks.stages, registers,
    )  # fmt: skip


@constexpr_function
def rows_memory():
    """How a stage's rows (RP, K) lie, and plain weights (N, K), as wgmma reads them."""
    return gl.NVMMASharedLayout(128, 16, 2)


@constexpr_function
def row_bits(shape):
    """The bits of an output's index in a tile, in the order in which the tensor cores have them:
    which of eight quads of threads (of those that read at a time, no two ask the same banks of
    memory), which of the two of a thread, which warp, and which of a thread again. Plain weights,
    which no thread reads, keep their order."""
    block_n = shape.block_n
    if shape.kind == 0:  # PLAIN
        return tl.constexpr(powers(1, block_n))
    two = block_n // 2 if shape.halves == 2 else 1
    apart = {32: (1, 2), 64: (1, 4), 128: (2, 4)}[min(128, shape.columns)]
    others = [bit for bit in powers(1, block_n) if bit != two]
    others.sort(key=lambda bit: bit not in apart)
    return tl.constexpr([*others[:3], two, *others[3:]])


@constexpr_function
def rows_layout(shape, outputs, behind, mine, threads):
    """The layout of outputs in dimensions `outputs`, and of others `behind` them, whose basis
    vectors are `mine` for the numbers of a thread, and `threads` for the four of a quad."""
    bits = row_bits(shape).value

    def basis(some):
        last = outputs[-1]
        at = [[bit] if len(outputs) == 1 else [bit // last, bit % last] for bit in some]
        return [vector + [0] * len(behind) for vector in at]

    def rest(some):
        return [[0] * len(outputs) + vector for vector in some]

    regs, lanes = rest(mine) + basis([bits[3], *bits[6:]]), rest(threads) + basis(bits[:3])
    return gl.DistributedLinearLayout(regs, lanes, basis(bits[4:6]), [], outputs + behind)


@constexpr_function
def weights_layout(shape):
    """How packed weights (H, N / H, columns) are read: eight bytes side by side a thread."""
    mine = [[1], [2], [4]] + [[n] for n in powers(32, shape.columns // 32)]
    outputs = [shape.halves, shape.block_n // shape.halves]
    return rows_layout(shape, outputs, [shape.columns], mine, [[8], [16]])


@constexpr_function
def words_layout(shape):
    """The same for int4 as (N, groups, 4 threads, 8 bytes)."""
    groups = shape.block_k // GROUP.value
    mine = [[0, 0, n] for n in (1, 2, 4)] + [[n, 0, 0] for n in powers(1, groups)]
    threads = [[0, 1, 0], [0, 2, 0]]
    return rows_layout(shape, [shape.block_n], [groups, 4, 8], mine, threads)


@constexpr_function
def pairs_layout(shape):
    """The pairs of int4 (N, groups), which all four threads of a quad have."""
    groups = shape.block_k // GROUP.value
    mine = [[n] for n in powers(1, groups)]
    return rows_layout(shape, [shape.block_n], [groups], mine, [[0], [0]])


@constexpr_function
def mma_layout(shape):
    """The accumulators (N, RP) of the tensor cores."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value, 1], [16, shape.padded, 16])


@constexpr_function
def sums_layout(shape):
    """The sums (N, RP), two outputs side by side in a thread, so that they are stored as one."""
    bits = row_bits(shape).value
    regs = [[bits[3], 0], [0, 1], *([0, n] for n in powers(8, shape.padded // 8))]
    regs += [[bit, 0] for bit in bits[6:]]
    lanes = [[0, 2], [0, 4], *([bit, 0] for bit in bits[:3])]
    warps = [[bit, 0] for bit in bits[4:6]]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], [shape.block_n, shape.padded])


@constexpr_function
def as_bits(bits, *behind):
    """The shape of a tile with a dimension for each bit of an output's index."""
    return tl.constexpr([2] * len(bits) + list(behind))


@constexpr_function
def to_tensor_cores(bits, *behind):
    """The permutation of those dimensions to the order of the tensor cores, and of those behind."""
    order = [len(bits) - bit.bit_length() for bit in bits[::-1]]
    return tl.constexpr(order + [len(bits) + n for n in behind])


@constexpr_function
def from_tensor_cores(bits):
    """The permutation back to the order in which they are an output's index."""
    order = [len(bits) - 1 - bits.index(bit) for bit in powers(1, 1 << len(bits))[::-1]]
    return tl.constexpr([*order, len(bits)])
