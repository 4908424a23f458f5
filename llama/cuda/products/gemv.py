"""Products of a single row (gemv), at the speed of memory.

One program a multiprocessor, or two, each with every so-many-th tile of the outputs. The stages of
a pipeline in shared memory hold K blocks of weights. What a program will read is on its way long
before it is needed, across tiles, and while the kernel before this one still runs: weights depend
on nothing. A thread takes some bytes from a stage, dequantizes them in its registers, and hands
them to the tensor cores: int8 and int4 as whole numbers, with the row cut into three planes of
int8, which fill columns that a single row leaves empty.

The surprising thing is that no number moves between threads; gemv_layouts.py says why, and Gluon
checks it: a conversion of layouts that is not trivial is an error.

Letters: N outputs of a tile, K inputs, W warps, S K slices of a K block (`GemvShape`).
"""

from typing import Any, NamedTuple

import triton.language as tl

from llama.cuda.launch import allow, wait
from llama.cuda.products.dequantize import digits_of, floats_of_bytes, halves_of_bytes
from llama.cuda.products.epilogues import finish, half_row, output_indices
from llama.cuda.products.gemv_layouts import (
    bits_of,
    columns_layout,
    copy_layout,
    inputs_layout,
    inputs_order,
    mma_layout,
    outputs_layout,
    padded_span,
    pairs_layout,
    partials_layout,
    plain_memory,
    planes_memory,
    planes_of,
    stages_memory,
    sums_layout,
    weights_layout,
    weights_order,
)
from llama.cuda.products.gluon import (
    barrier,
    commit_group,
    cp_async,
    gl,
    jit,
    mbarrier,
    mma_v2,
    next_stage,
    reinterpret,
    tma_load,
    wait_group,
)
from llama.cuda.weights import FP8, INT4, INT8, PLAIN, scale_and_offset

LARGEST = tl.constexpr(2.0**22 - 1)  # of a row in whole numbers: three digits of 256 hold it
MAGIC, MAGIC_BITS = tl.constexpr(1.5 * 2.0**23), tl.constexpr(0x4B400000)  # + n: n is its last bits


class Norm(NamedTuple):
    """The RMSNorm of the inputs, as one argument of the kernel."""

    gain: Any
    eps: Any


class _Weight(NamedTuple):
    """The matrix that is read."""

    w: Any  # pointers to numbers or packed bytes, or a descriptor of TMA
    scale: Any  # the same of the pairs of int4; pointers to the scales of rows
    n_outputs: Any
    tiles: Any


class _Pipeline(NamedTuple):
    """The stages in shared memory."""

    w: Any  # (STAGES, H, N / H, columns)
    pairs: Any  # (STAGES, H, N / H, S), if the weight is int4
    full: Any  # barriers at which the bytes arrive that TMA loads


class _Share(NamedTuple):
    """What a program computes."""

    first: Any  # its first tile
    programs: Any  # and how many tiles lie between two of its own
    split: Any  # which part of the inputs


# ---- the pipeline


@jit
def _allocate(DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """The pipeline, and memory for the sums (W, N) of all warps."""
    KIND: tl.constexpr = SHAPE.kind
    STAGES: tl.constexpr = SHAPE.stages
    H: tl.constexpr = SHAPE.halves
    N: tl.constexpr = SHAPE.block_n // H
    NUMBER: tl.constexpr = DTYPE if KIND == PLAIN else gl.int8 if KIND == INT8 else gl.uint8
    LAYOUT: tl.constexpr = stages_memory(SHAPE.columns, 16 if KIND == PLAIN else 8, SHAPE.tma)
    w = gl.allocate_shared_memory(NUMBER, [STAGES, H, N, SHAPE.columns], LAYOUT)
    pairs, full = w, w
    if KIND == INT4:
        PAIRS: tl.constexpr = stages_memory(SHAPE.slices, 32, SHAPE.tma)
        pairs = gl.allocate_shared_memory(gl.int32, [STAGES, H, N, SHAPE.slices], PAIRS)
    sums = gl.allocate_shared_memory(gl.float32, [SHAPE.warps, SHAPE.block_n], plain_memory(2))
    if SHAPE.tma:
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
    return _Pipeline(w, pairs, full), sums


@jit
def _copy(
    memory, full, stage, matrix, tile, k_block, weight, ROW: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Begin to copy COLUMNS of a tile's rows of ROW numbers to a stage; zeros behind the end."""
    H: tl.constexpr = SHAPE.halves
    N: tl.constexpr = SHAPE.block_n // H
    if SHAPE.tma:
        at = [0, tile * N, k_block * COLUMNS]
        tma_load(matrix, at, full.index(stage), memory.index(stage), tile < weight.tiles)
    else:
        LAYOUT: tl.constexpr = copy_layout(COLUMNS, VECTOR, SHAPE.warps)
        h = gl.arange(0, H, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
        j = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
        c = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
        rows = weight.n_outputs // H
        n = h * rows + gl.minimum(tile * N + j, rows - 1)
        c += k_block * COLUMNS
        there = (tile < weight.tiles) & (c < ROW)
        cp_async(memory.index(stage), matrix + n.to(gl.int64) * ROW + c, there)


@jit
def _load_stage(pipeline, stage, weight, tile, k_block, SHAPE: tl.constexpr):
    """Begin to fill a stage with a K block of a tile, and with its pairs if there are any."""
    INT: tl.constexpr = SHAPE.kind == INT4
    BYTES: tl.constexpr = 2 if SHAPE.kind == PLAIN else 1  # of a number of w
    K: tl.constexpr = SHAPE.inputs
    if SHAPE.tma:
        ROW_BYTES: tl.constexpr = SHAPE.columns * BYTES + (4 * SHAPE.slices if INT else 0)
        size: tl.constexpr = SHAPE.block_n * ROW_BYTES
        mbarrier.expect(pipeline.full.index(stage), size, tile < weight.tiles)
    _copy(pipeline.w, pipeline.full, stage, weight.w, tile, k_block, weight, K // 2 if INT else K,
          SHAPE.columns, 16 // BYTES, SHAPE)  # fmt: skip
    if INT:
        _copy(pipeline.pairs, pipeline.full, stage, weight.scale, tile, k_block, weight,
              K // SHAPE.group, SHAPE.slices, 4, SHAPE)  # fmt: skip
    commit_group()


@jit
def _next_block(tile, k_block, tiles, share, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """The K block that is loaded after this one: of the same tile, or of the program's next one,
    and where that is none, the next kernel may begin."""
    k_block += 1
    if k_block == (share.split + 1) * SHAPE.k_blocks:
        k_block = share.split * SHAPE.k_blocks
        tile += share.programs
        if tile >= tiles:
            allow(OVERLAP)
    return tile, k_block


@jit
def _wait_for_stage(pipeline, stage, phase, SHAPE: tl.constexpr):
    """Return when a stage is full, and all threads are done with the one before it."""
    if SHAPE.tma:
        mbarrier.wait(pipeline.full.index(stage), phase)
    else:
        wait_group(SHAPE.stages - 2)
    barrier()


# ---- the row


@jit
def _load_row(x, norm, split, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """The inputs of a split in shared memory, (K blocks, planes, block_k) by index, and the factor
    of all products with them: normed, and for whole numbers as three planes of digits."""
    KIND: tl.constexpr = SHAPE.kind
    DTYPE: tl.constexpr = x.dtype.element_ty
    BLOCK_K: tl.constexpr = SHAPE.block_k
    PADDED: tl.constexpr = padded_span(SHAPE)
    BLOCKS: tl.constexpr = PADDED // BLOCK_K
    SPAN: tl.constexpr = SHAPE.inputs if SHAPE.split == 1 else BLOCK_K * SHAPE.k_blocks
    i = gl.arange(0, PADDED, gl.BlockedLayout([8], [32], [SHAPE.warps], [0]))
    gains = i
    if SHAPE.norm:
        gains = gl.load(norm.gain + i, mask=i < SHAPE.inputs, other=0.0)
    wait(OVERLAP)
    x += split * SPAN
    length = gl.minimum(SPAN, SHAPE.inputs - split * SPAN)
    row = gl.load(x + i, mask=i < length, other=0.0)
    numbers = row.to(gl.float32)
    factor = 1.0
    if SHAPE.norm:
        factor = gl.rsqrt(gl.sum(numbers * numbers, 0) / length + norm.eps)
        numbers *= gains.to(gl.float32)
    if KIND == PLAIN:
        if SHAPE.norm:
            row, factor = (numbers * factor).to(DTYPE), 1.0
        memory = gl.allocate_shared_memory(DTYPE, [PADDED], plain_memory(1))
        memory.store(row)
        rows = reinterpret(memory, [BLOCKS, 1, BLOCK_K], plain_memory(2))
    else:
        top = gl.max(numbers.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # NaN is the greatest
        if KIND == FP8:  # by a power of two to below 2^14, where float16 has all that bfloat16 has
            power = gl.maximum(gl.minimum(267 - (top >> 23), 254), 1)
            numbers *= (power << 23).to(gl.float32, bitcast=True)
            factor *= ((254 - power) << 23).to(gl.float32, bitcast=True)
            memory = gl.allocate_shared_memory(gl.float16, [PADDED], plain_memory(1))
            memory.store(numbers.to(gl.float16))
            rows = reinterpret(memory, [BLOCKS, 1, BLOCK_K], plain_memory(2))
        else:
            largest = top.to(gl.float32, bitcast=True)
            some = largest > 1e-30
            a, b, c = digits_of(numbers, gl.where(some, LARGEST / largest, 0.0))
            factor *= gl.where(some, largest / LARGEST, largest)
            SIDE: tl.constexpr = SHAPE.group // 2 if KIND == INT4 else 64
            memory = gl.allocate_shared_memory(
                gl.int8, [BLOCKS, 4, BLOCK_K], planes_memory(SIDE, 3)
            )
            planes = gl.reshape(gl.join(gl.join(a, c), gl.join(b, c)), [BLOCKS, BLOCK_K, 4])
            memory.store(gl.permute(planes, [0, 2, 1]))
            rows = reinterpret(memory, [BLOCKS, 4, BLOCK_K], planes_memory(SIDE, 2))
    return rows, factor


# ---- a K block


@jit
def _row_fragment(rows, k_block, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """A K block of the row as the tensor cores want it: (S, k_slice, 8)."""
    S: tl.constexpr = SHAPE.slices
    K: tl.constexpr = SHAPE.k_slice
    PLANES: tl.constexpr = planes_of(SHAPE.kind)
    BITS: tl.constexpr = bits_of(SHAPE.kind, SHAPE.group)
    COLUMNS: tl.constexpr = columns_layout(SHAPE)
    MMA: tl.constexpr = mma_layout(SHAPE)
    OPERAND: tl.constexpr = gl.float16 if SHAPE.kind == FP8 else gl.int8 if PLANES > 1 else DTYPE
    b = rows.index(k_block).load(inputs_layout(SHAPE))
    b = gl.permute(gl.reshape(b, [PLANES, S] + [2] * len(BITS)), inputs_order(BITS).value)
    b = gl.convert_layout(gl.reshape(b, [S, K, 1, PLANES]), COLUMNS, assert_trivial=True)
    b, _ = gl.broadcast(b, gl.full([S, K, 8 // PLANES, PLANES], 0, OPERAND, COLUMNS))
    b = gl.reshape(b, [S, K, 8])
    WIDTH: tl.constexpr = 4 if PLANES > 1 else 2
    return gl.convert_layout(b, gl.DotOperandLayout(1, MMA, WIDTH), assert_trivial=True)


@jit
def _weights_fragment(memory, SHAPE: tl.constexpr):
    """A stage's weights as the tensor cores want them: (S, N, k_slice)."""
    S: tl.constexpr = SHAPE.slices
    BITS: tl.constexpr = bits_of(SHAPE.kind, SHAPE.group)
    INT: tl.constexpr = SHAPE.kind == INT4
    MMA: tl.constexpr = mma_layout(SHAPE)
    WIDTH: tl.constexpr = 4 if planes_of(SHAPE.kind) > 1 else 2
    a = memory.load(weights_layout(SHAPE))
    a = gl.reshape(a, [SHAPE.block_n // 8, 2, 2, 2, S] + [2] * (len(BITS) - (1 if INT else 0)))
    if INT:
        a = halves_of_bytes(a)
    elif SHAPE.kind == FP8:
        a = floats_of_bytes(a)
    a = gl.permute(a, weights_order(BITS, INT).value)
    a = gl.reshape(a, [S, SHAPE.block_n, SHAPE.k_slice])
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, WIDTH), assert_trivial=True)


@jit
def _add_int4(acc, a, b, memory, SHAPE: tl.constexpr):
    """Add the products of groups of int4, which are K slices: sums of codes times digits, scaled,
    and sums of digits, times the offset."""
    S: tl.constexpr = SHAPE.slices
    N: tl.constexpr = SHAPE.block_n
    MMA: tl.constexpr = mma_layout(SHAPE)
    pair = memory.load(pairs_layout(SHAPE))
    pair = gl.permute(gl.reshape(pair, [N // 8, 2, 2, 2, S]), [4, 0, 3, 2, 1])
    pair = gl.reshape(pair, [S, N])
    pair = gl.convert_layout(pair, gl.SliceLayout(2, MMA), assert_trivial=True)
    s, o = scale_and_offset(pair[:, :, None])
    codes = mma_v2(a, b, gl.full([S, N, 8], MAGIC_BITS, gl.int32, MMA))
    ones = gl.full([S, 16, SHAPE.k_slice], 1, gl.int8, gl.DotOperandLayout(0, MMA, 4))
    total = mma_v2(ones, b, gl.full([S, 16, 8], MAGIC_BITS, gl.int32, MMA))
    total = total.to(gl.float32, bitcast=True) - MAGIC
    if N > 16:
        SUMS: tl.constexpr = sums_layout(SHAPE)
        total = gl.reshape(total, [S, 1, 16, 8])
        total = gl.convert_layout(total, SUMS, assert_trivial=True)
        total, _ = gl.broadcast(total, gl.full([S, N // 16, 16, 8], 0.0, gl.float32, SUMS))
        total = gl.reshape(total, [S, N, 8])
        total = gl.convert_layout(total, MMA, assert_trivial=True)
    acc += s * (codes.to(gl.float32, bitcast=True) - MAGIC)
    acc += o * total
    return acc


# ---- the outputs


@jit
def _reduce(acc, memory, SHAPE: tl.constexpr):
    """The sums (N,) of a tile: of what the columns say, of all K slices and all warps."""
    W: tl.constexpr = SHAPE.warps
    MMA: tl.constexpr = mma_layout(SHAPE)
    column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    worth = gl.where(column == 0, 1.0, 0.0)
    if planes_of(SHAPE.kind) > 1:
        worth = gl.where(column == 1, 256.0, gl.where(column == 2, 65536.0, worth))
    z = gl.sum(acc.to(gl.float32) * worth, 2)
    z = gl.reshape(z, [SHAPE.slices // W, W, SHAPE.block_n])
    z = gl.convert_layout(z, partials_layout(SHAPE), assert_trivial=True)
    memory.store(gl.sum(z, 0))
    return gl.sum(memory.load(outputs_layout(SHAPE)), 0)


@jit
def _natural(z, BLOCK_N: tl.constexpr):
    """A tile's rows, (N,) as the tensor cores have them, in their own order: (N, 1)."""
    z = gl.permute(gl.reshape(z, [BLOCK_N // 8, 2, 2, 2]), [0, 3, 2, 1])
    return gl.reshape(z, [BLOCK_N, 1])


@jit
def _finish(z, m, tile, scale, to, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr):
    """Scale the outputs m of a tile, as the tensor cores number them, and do what EPILOGUE says."""
    H: tl.constexpr = SHAPE.halves
    BLOCK_N: tl.constexpr = SHAPE.block_n
    first = tile * BLOCK_N
    n = m // 8 * 8 + (m & 1) * 4 + (m & 2) + (m & 4) // 4
    if SHAPE.kind == INT8 or SHAPE.kind == FP8:
        z *= gl.load(half_row(scale, n, first // H, to.n_outputs, BLOCK_N, H))
    n, r = output_indices(_natural(n, BLOCK_N), first, EPILOGUE.op, BLOCK_N, 1, H == 2)
    finish(_natural(z, BLOCK_N), n, r, 1, to, EPILOGUE, BLOCK_N, 1, H == 2)


@jit
def _add_partials(weight, share, to, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr):
    """The last program of a split to arrive adds up the partials, in the order of the splits."""
    SPLIT: tl.constexpr = SHAPE.split
    BLOCK_N: tl.constexpr = SHAPE.block_n
    barrier()
    arrived = to.split_k.arrived + share.first
    if gl.atomic_add(arrived, 1, sem="acq_rel") == SPLIT - 1:
        gl.store(arrived, 0)
        for tile in range(share.first, weight.tiles, share.programs):
            m = gl.arange(0, BLOCK_N, gl.SliceLayout(0, outputs_layout(SHAPE)))
            at = to.split_k.partials + tile * (SPLIT * BLOCK_N) + m
            sum = gl.load(at, cache_modifier=".cg")
            for other in gl.static_range(1, SPLIT):
                sum += gl.load(at + other * BLOCK_N, cache_modifier=".cg")
            _finish(sum, m, tile, weight.scale, to, SHAPE, EPILOGUE)


@jit
def gemv(x, w, scale, norm, to, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr, OVERLAP: tl.constexpr):
    """Multiply a row x (K,) with a weight, and do with the outputs what EPILOGUE says.

    `w` are numbers or packed bytes, `scale` those of rows or the pairs of int4; both are described
    to the copy engine instead, where it fills the stages. `norm` is a Norm, `to` a Destination,
    SHAPE a GemvShape, EPILOGUE an Epilogue.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    STAGES: tl.constexpr = SHAPE.stages
    SPLIT: tl.constexpr = SHAPE.split
    BLOCK_N: tl.constexpr = SHAPE.block_n
    MMA: tl.constexpr = mma_layout(SHAPE)
    split = gl.program_id(0) % SPLIT
    first, programs = gl.program_id(0) // SPLIT, gl.num_programs(0) // SPLIT
    share = _Share(first, programs, split)
    tiles = (to.n_outputs + BLOCK_N - 1) // BLOCK_N
    weight = _Weight(w, scale, to.n_outputs, tiles)
    pipeline, sums = _allocate(DTYPE, SHAPE)

    # Load all stages but one, then the row
    next_tile, next_block = first, split * SHAPE.k_blocks
    blocks = (tiles - first + programs - 1) // programs * SHAPE.k_blocks
    for i in range(gl.minimum(STAGES - 1, blocks)):
        _load_stage(pipeline, i, weight, next_tile, next_block, SHAPE)
        next_tile, next_block = _next_block(next_tile, next_block, tiles, share, SHAPE, False)
    if not SHAPE.tma:
        for i in range(blocks, STAGES - 1):
            commit_group()  # as many groups in any case
    rows, factor = _load_row(x, norm, split, SHAPE, OVERLAP)

    stage, phase = 0, 0
    for tile in range(first, tiles, programs):
        if SHAPE.kind == INT8:
            acc = gl.full([SHAPE.slices, BLOCK_N, 8], 0, gl.int32, MMA)
        else:
            acc = gl.full([SHAPE.slices, BLOCK_N, 8], 0.0, gl.float32, MMA)
        for k_block in range(SHAPE.k_blocks):
            # Wait for a stage, refill the one before it, and multiply
            _wait_for_stage(pipeline, stage, phase, SHAPE)
            empty = gl.where(stage == 0, STAGES - 1, stage - 1)
            _load_stage(pipeline, empty, weight, next_tile, next_block, SHAPE)
            next_tile, next_block = _next_block(next_tile, next_block, tiles, share, SHAPE, OVERLAP)
            b = _row_fragment(rows, k_block, DTYPE, SHAPE)
            a = _weights_fragment(pipeline.w.index(stage), SHAPE)
            if SHAPE.kind == INT4:
                acc = _add_int4(acc, a, b, pipeline.pairs.index(stage), SHAPE)
            else:
                acc = mma_v2(a, b, acc)
            stage, phase = next_stage(stage, phase, STAGES)
        # Add up what the warps have, and finish the tile, or leave it to the last of a split
        z = _reduce(acc, sums, SHAPE) * factor
        m = gl.arange(0, BLOCK_N, gl.SliceLayout(0, outputs_layout(SHAPE)))
        if SPLIT == 1:
            _finish(z, m, tile, scale, to, SHAPE, EPILOGUE)
        else:
            gl.store(to.split_k.partials + (tile * SPLIT + split) * BLOCK_N + m, z)
    if SPLIT > 1:
        _add_partials(weight, share, to, SHAPE, EPILOGUE)
