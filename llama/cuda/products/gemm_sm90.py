"""Products of 2 to 128 rows on Hopper's tensor cores (wgmma), with packed weights or plain ones.

A producer warp has the copy engine (TMA) fill the stages of a pipeline in shared memory with K
blocks of weights and rows. Two consumers, warp groups of four warps, each multiply a tile of
outputs with them:

      producer (one warp): waits for empty[stage], then starts TMA for the next K block
          |
          v           stage 0           stage 1          ...    stage STAGES - 1
      +---------+------------------+------------------+-------+------------------+
      |   TMA   | w of consumer 0  |                  |       |                  |
      |  ---->  | w of consumer 1  |                  |       |                  |
      |         | x (RP, BLOCK_K)  |                  |       |                  |
      +---------+------------------+------------------+-------+------------------+
                   |            |
                   | full[stage]: all of its bytes have arrived (1 arrival)
                   v            v
              consumer 0    consumer 1      each: wait for full[stage], wgmma on it,
                   |            |           wait for the wgmma of the stage before,
                   v            v           arrive at that one's empty barrier
                empty[stage before]: both consumers are done with it (2 arrivals)

wgmma reads the rows, and plain weights, from shared memory by itself; a consumer dequantizes packed
ones to bfloat16 in registers, while wgmma works on those of the K block before. Where programs
share the inputs (split-K), each leaves partials, and whoever reads them adds up
(norm_rope_gate.py).

The surprising thing: beside packed weights the rows come with their inputs in another order, in
which eight bytes of a weight that lie side by side are what one thread has to hand over; whoever
makes the rows puts them so (epilogues.arranged_place). Their outputs are numbered by where the
tensor cores have them, too (gemm_sm90_layouts.py).

Letters: N outputs of a consumer, in H halves of the weight, two where w1 lies above w3; K inputs,
RP rows as the tensor cores see them. The bits of an input's index in sixty-four, from the lowest
one on, are p of a pair, j, i, t which of four threads, h.
"""

from typing import Any, NamedTuple

import triton.language as tl

from llama.cuda.launch import allow, wait
from llama.cuda.products.dequantize import INTERPRETED, bfloats_of_bytes, bfloats_of_nibbles
from llama.cuda.products.epilogues import GATE, gate, half_row, output_indices, pairs, store
from llama.cuda.products.gemm_sm90_layouts import (
    GROUP,
    WARPS,
    as_bits,
    from_tensor_cores,
    mma_layout,
    pairs_layout,
    row_bits,
    rows_memory,
    sums_layout,
    to_tensor_cores,
    weights_layout,
    words_layout,
)
from llama.cuda.products.gluon import (
    gl,
    jit,
    mbarrier,
    merge_halves,
    next_stage,
    tma_layout,
    tma_load,
    warp_specialize,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from llama.cuda.weights import FP8, INT4, INT8, PLAIN


class _Pipeline(NamedTuple):
    """The stages in shared memory."""

    full: Any  # barriers: all bytes of a stage are there
    empty: Any  # barriers: both consumers are done with a stage
    w: Any  # (2 STAGES, H, N / H, columns): two tiles a stage
    x: Any  # (STAGES, RP, BLOCK_K)


class _Operands(NamedTuple):
    """What a program multiplies."""

    x: Any  # the descriptors of TMA
    w: Any
    program: Any  # its pair of tiles
    begin: Any  # its first K block


class _Output(NamedTuple):
    """Where the outputs of a program go."""

    scale: Any  # of rows of the weight, or the pairs of int4
    rows: Any
    n_outputs: Any
    out: Any


# ---- the producer


@jit
def _load_weights(k_block, stage, pipeline, operands, SHAPE: tl.constexpr):
    """Begin to load the weights of a K block to a stage, if there is such a block."""
    N: tl.constexpr = SHAPE.block_n // SHAPE.halves
    BYTES: tl.constexpr = operands.w.dtype.primitive_bitwidth // 8
    WEIGHTS: tl.constexpr = 2 * SHAPE.block_n * SHAPE.columns * BYTES
    SIZE: tl.constexpr = WEIGHTS + 2 * SHAPE.padded * SHAPE.block_k
    full, there = pipeline.full.index(stage), k_block < SHAPE.k_blocks
    mbarrier.expect(full, SIZE, there)
    for i in gl.static_range(2):
        at = [0, (2 * operands.program + i) * N, (operands.begin + k_block) * SHAPE.columns]
        tma_load(operands.w, at, full, pipeline.w.index(2 * stage + i), there)


@jit
def _load_rows(k_block, stage, pipeline, operands, SHAPE: tl.constexpr):
    """Begin to load the inputs of a K block to a stage, if there is such a block."""
    at = [0, (operands.begin + k_block) * SHAPE.block_k]
    full, there = pipeline.full.index(stage), k_block < SHAPE.k_blocks
    tma_load(operands.x, at, full, pipeline.x.index(stage), there)


@jit
def _produce(pipeline, operands, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """Fill each stage, and each again when both consumers are done with it."""
    STAGES: tl.constexpr = SHAPE.stages
    for i in gl.static_range(STAGES):
        _load_weights(i, i, pipeline, operands, SHAPE)
    wait(OVERLAP)
    for i in gl.static_range(STAGES):
        _load_rows(i, i, pipeline, operands, SHAPE)
    stage, phase = 0, 0
    for k_block in range(STAGES, SHAPE.k_blocks):
        mbarrier.wait(pipeline.empty.index(stage), phase)
        _load_weights(k_block, stage, pipeline, operands, SHAPE)
        _load_rows(k_block, stage, pipeline, operands, SHAPE)
        stage, phase = next_stage(stage, phase, STAGES)


# ---- the consumers


@jit
def _dequantize(packed, pair, SHAPE: tl.constexpr):
    """The weights of a K block as the tensor cores want them: (N, block_k) in registers."""
    N: tl.constexpr = SHAPE.block_n
    BITS: tl.constexpr = row_bits(SHAPE)
    GROUPS: tl.constexpr = SHAPE.block_k // GROUP
    a = packed.load(weights_layout(SHAPE))
    if SHAPE.kind == INT4:
        WORDS: tl.constexpr = words_layout(SHAPE)
        pair = gl.reshape(pair, [N, GROUPS, 1, 1])
        pair = gl.convert_layout(pair, WORDS, assert_trivial=True)
        pair, _ = gl.broadcast(pair, gl.full([N, GROUPS, 4, 8], 0, gl.int32, WORDS))
        a = gl.convert_layout(gl.reshape(a, [N, GROUPS, 4, 8]), WORDS, assert_trivial=True)
        a = bfloats_of_nibbles(a, pair)  # (N, groups, t, i j p, h)
        a = gl.reshape(a, as_bits(BITS, GROUPS, 4, 2, 2, 2, 2).value)
        a = gl.permute(a, to_tensor_cores(BITS, 0, 5, 2, 3, 1, 4).value)
    else:
        a = bfloats_of_bytes(a, SHAPE.kind)  # (N, groups of h t i j p)
        a = gl.reshape(a, as_bits(BITS, GROUPS, 2, 4, 2, 2, 2).value)
        a = gl.permute(a, to_tensor_cores(BITS, 0, 1, 3, 4, 2, 5).value)
    a = gl.reshape(a, [N, GROUPS * GROUP])  # of groups of h i j t p
    return gl.convert_layout(a, gl.DotOperandLayout(0, mma_layout(SHAPE), 2), assert_trivial=True)


@jit
def _multiply(
    acc, pair, previous, stage, phase, k_block, pipeline, operands, at_pairs, ME: tl.constexpr,
    SHAPE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Begin the wgmma of a K block, whose data are in `stage`, and wait for that of the one before,
    in stage `previous`, unless this is the FIRST one. Returns what the next one needs: the
    accumulators, its pairs of int4, stages and phase."""
    if INTERPRETED:  # one after the other
        _load_weights(k_block, stage, pipeline, operands, SHAPE)
        _load_rows(k_block, stage, pipeline, operands, SHAPE)
    next_pair = pair
    if SHAPE.kind == INT4:
        following = gl.minimum(k_block + 1, SHAPE.k_blocks - 1)
        next_pair = gl.load(at_pairs + following * pair.shape[1])
    mbarrier.wait(pipeline.full.index(stage), phase)
    a = pipeline.w.index(2 * stage + ME)
    if SHAPE.kind == PLAIN:
        a = merge_halves(a, rows_memory())
    else:
        a = _dequantize(a, pair, SHAPE)
    b = pipeline.x.index(stage).permute([1, 0])
    acc = warpgroup_mma(a, b, acc, use_acc=not FIRST, is_async=True)
    after, phase = next_stage(stage, phase, SHAPE.stages)
    if not FIRST:
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        mbarrier.arrive(pipeline.empty.index(previous))
    return acc, next_pair, stage, after, phase


@jit
def _pairs_of(tile, begin, output, SHAPE: tl.constexpr):
    """Where the pairs of int4 of a tile's first K block are: (N, groups)."""
    H: tl.constexpr = SHAPE.halves
    PAIRS: tl.constexpr = pairs_layout(SHAPE)
    GROUPS: tl.constexpr = SHAPE.block_k // GROUP
    n = gl.arange(0, SHAPE.block_n, gl.SliceLayout(1, PAIRS))
    row = half_row(0, n, tile * (SHAPE.block_n // H), output.n_outputs, SHAPE.block_n, H)
    group = begin * GROUPS + gl.arange(0, GROUPS, gl.SliceLayout(0, PAIRS))
    return output.scale + row.to(gl.int64)[:, None] * (SHAPE.inputs // GROUP) + group[None, :]


@jit
def _finish(acc, tile, split, output, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr):
    """Scale the outputs of a tile, and store or gate them."""
    KIND: tl.constexpr = SHAPE.kind
    H: tl.constexpr = SHAPE.halves
    N: tl.constexpr = SHAPE.block_n
    RP: tl.constexpr = SHAPE.padded
    BITS: tl.constexpr = row_bits(SHAPE)
    SUMS: tl.constexpr = sums_layout(SHAPE)
    rows, n_outputs, out = output.rows, output.n_outputs, output.out
    y = gl.permute(gl.reshape(acc, as_bits(BITS, RP).value), from_tensor_cores(BITS).value)
    y = gl.convert_layout(gl.reshape(y, [N, RP]), SUMS, assert_trivial=True)
    n = gl.arange(0, N, gl.SliceLayout(1, SUMS))
    r = gl.arange(0, RP, gl.SliceLayout(0, SUMS))[None, :]
    if KIND == INT8 or KIND == FP8:
        y *= gl.load(half_row(output.scale, n, tile * (N // H), n_outputs, N, H))[:, None]
    if EPILOGUE == GATE:
        n, r = output_indices(n[:, None] * RP + r, tile * N, GATE, N, RP, True)
        a, b = pairs(y, N, RP, True)
        gate(a, b, n, r, rows, n_outputs, out, KIND != PLAIN)
    else:
        out += split.to(gl.int64) * rows * n_outputs
        store(y, tile * N + n[:, None], r, rows, n_outputs, out, False)


@jit
def _consume(
    pipeline, operands, output, ME: tl.constexpr, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Multiply the tile of consumer ME, and finish it."""
    K_BLOCKS: tl.constexpr = SHAPE.k_blocks
    MMA: tl.constexpr = mma_layout(SHAPE)
    tile = 2 * operands.program + ME
    pair, at_pairs = 0, 0
    if SHAPE.kind == INT4:
        at_pairs = _pairs_of(tile, operands.begin, output, SHAPE)
        pair = gl.load(at_pairs)
    wait(OVERLAP)
    # Two sets of registers alternate: while the tensor cores read one, the other one is made.
    acc = gl.full([SHAPE.block_n, SHAPE.padded], 0.0, gl.float32, MMA)
    previous, stage, phase = 0, 0, 0
    acc, pair, previous, stage, phase = _multiply(
        acc, pair, previous, stage, phase, 0, pipeline, operands, at_pairs, ME, SHAPE, True
    )
    if K_BLOCKS % 2 == 0:
        acc, pair, previous, stage, phase = _multiply(
            acc, pair, previous, stage, phase, 1, pipeline, operands, at_pairs, ME, SHAPE, False
        )
    for k_block in range(2 - K_BLOCKS % 2, K_BLOCKS, 2):
        for i in gl.static_range(2):
            acc, pair, previous, stage, phase = _multiply(
                acc, pair, previous, stage, phase, k_block + i, pipeline, operands, at_pairs, ME,
                SHAPE, False,
            )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    allow(OVERLAP)
    _finish(acc, tile, operands.begin // K_BLOCKS, output, SHAPE, EPILOGUE)


# ---- the kernel


@jit
def gemm_sm90(
    x, w, scale, rows, n_outputs, out, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Multiply rows with two tiles of outputs over a split of the inputs: stored to `out` (splits,
    rows, outputs), or gated.

    x (rows, K) and w, numbers or bytes, are described to the copy engine; `scale` are those of
    outputs, or the pairs of int4. SHAPE is a GemmSm90Shape, EPILOGUE is STORE or GATE.
    """
    STAGES: tl.constexpr = SHAPE.stages
    H: tl.constexpr = SHAPE.halves
    of_w = gl.allocate_shared_memory(
        w.dtype,
        [2 * STAGES, H, SHAPE.block_n // H, SHAPE.columns],
        tma_layout(SHAPE.columns, w.dtype.primitive_bitwidth),
    )
    of_x = gl.allocate_shared_memory(x.dtype, [STAGES, SHAPE.padded, SHAPE.block_k], rows_memory())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    pipeline = _Pipeline(full, empty, of_w, of_x)
    operands = _Operands(x, w, gl.program_id(0), gl.program_id(1) * SHAPE.k_blocks)
    output = _Output(scale, rows, n_outputs, out)
    warp_specialize(
        [
            (_consume, (pipeline, operands, output, 0, SHAPE, EPILOGUE, OVERLAP)),
            (_consume, (pipeline, operands, output, 1, SHAPE, EPILOGUE, OVERLAP)),
            (_produce, (pipeline, operands, SHAPE, OVERLAP)),
        ],
        [WARPS, 1], [SHAPE.registers, 24],
    )  # fmt: skip
