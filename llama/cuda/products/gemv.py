"""Products of a single row, at the speed of memory: weights stream through a ring in shared memory.

One program a multiprocessor, or two, each with every so-many-th tile of the outputs. What a program
will read is on its way long before it is needed, across tiles, and while the kernel before this one
still runs: weights depend on nothing. A thread takes some bytes from the ring, makes them numbers
where they are, and hands them to the tensor cores: int8 and int4 as whole numbers, with the row cut
into three planes of int8, which fill columns that a single row leaves empty.

The surprising thing is why no number moves between threads: a sum may be taken in any order, so
inputs and outputs are numbered by where the tensor cores want them, and weights lie as they lie.
Gluon checks that: a conversion of layouts that is not trivial is an error.

Letters: N outputs, K inputs, W warps; a turn is what all warps multiply between two barriers, in R
runs of inputs, RUNS a warp; H halves of the weight, two where w1 lies above w3. The bits of an
input's number within a run, from the last one on, are p or b within a word, j and i which word, t
which of four threads side by side; eight such fours have eight outputs.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (arguments of kernels have no types in Python)
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from llama.cuda.launch import allow, wait
from llama.cuda.products.dequantize import digits_of, floats_of_bytes, halves_of_bytes
from llama.cuda.products.epilogues import GATE, finish, half_row, numbered
from llama.cuda.products.gluon import (
    as_rows,
    barrier,
    commit_group,
    constexpr_function,
    copy_numbers,
    copy_tile,
    gl,
    jit,
    mbarrier,
    mma_v2,
    next_slot,
    powers,
    tiles_memory,
    wait_group,
)
from llama.cuda.tuning import Stream
from llama.cuda.weights import FP8, INT4, INT8, PLAIN, Source, scale_and_offset

LARGEST = tl.constexpr(2.0**22 - 1)  # of a row in whole numbers: three digits of 256 hold it
MAGIC, MAGIC_BITS = tl.constexpr(1.5 * 2.0**23), tl.constexpr(0x4B400000)  # + n: n is its last bits


# ---- where numbers lie


@constexpr_function
def bits_of(kind, group):
    """What the bits of an input's number within a run say, from the last one on."""
    if kind == 0:  # PLAIN
        return ("p", "j", "i0", "t0", "t1")
    if kind == 2:  # FP8
        return ("p", "j", "i0", "i1", "t0", "t1")
    if kind == 1:  # INT8
        return ("b0", "b1", "j", "i0", "t0", "t1")
    of_group = {  # INT4: the last one is which half of a byte
        32: ("b0", "b1", "t0", "t1", "j"),
        64: ("b0", "b1", "j", "t0", "t1", "i0"),
        128: ("b0", "b1", "j", "i0", "t0", "t1", "i1"),
    }
    return of_group[group]


@constexpr_function
def _places(bits, lie):
    """Where the bits are in `lie`, in the order in which the tensor cores want them."""
    wanted = [bit for bit in ("i1", "i0", "j", "t1", "t0", "p", "b1", "b0") if bit in bits]
    return [lie.index(bit) for bit in wanted]


@constexpr_function
def weights_order(bits, int4):
    """From (N / 8, 2, 2, 2, R, bits as they lie) to (R, N / 8, 2, 2, 2, bits)."""
    lie = bits[::-1]
    if int4:
        lie = (*lie[1:], lie[0])
    return tl.constexpr([4, 0, 3, 2, 1, *(5 + place for place in _places(bits, lie))])


@constexpr_function
def inputs_order(bits):
    """From (planes, R, bits as they lie) to (R, bits, planes)."""
    return tl.constexpr([1, *(2 + place for place in _places(bits, bits[::-1])), 0])


@constexpr_function
def number_of(kind, plain):
    """What the ring holds."""
    return plain if kind == 0 else gl.int8 if kind == 1 else gl.uint8


@constexpr_function
def planes_of(kind):
    """Planes of a row: of int8 and int4 three with its digits, and an empty one."""
    return 4 if kind in (1, 3) else 1


@constexpr_function
def room_for(part, turn):
    return max(triton.next_power_of_2(part), turn)


@constexpr_function
def copy_layout(columns, vector, warps):
    """(H, N / H, columns), up to `vector` numbers of a row a thread."""
    vector = min(vector, columns)
    across = min(32, columns // vector)
    return gl.BlockedLayout([1, 1, vector], [1, 32 // across, across], [1, warps, 1], [2, 1, 0])


@constexpr_function
def ring_memory(columns, bits, bulk):
    """(H, N / H, columns): the 16-byte words of 128 bytes change places, another way a row."""
    if bulk:
        return tiles_memory(columns, bits)
    wide = min(128, columns * bits // 8)
    return gl.SwizzledSharedLayout(128 // bits, 128 // wide, wide // 16, [2, 1, 0])


@constexpr_function
def planes_memory(run, rank):
    """(..., planes, inputs), planes in different banks; `run` bytes are read side by side."""
    wide = min(128, run)
    return gl.SwizzledSharedLayout(wide, 1, 128 // wide, [2, 1, 0][3 - rank :])


@constexpr_function
def memory(rank):
    """As it is."""
    return gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0][3 - rank :])


@constexpr_function
def weights_layout(halves, block_n, each, runs, warps):
    """(H, N / H, R * 4 * each), `each` numbers side by side a thread. Eight rows go to the eight
    fours of threads as 0, 4, 2, 6, 1, 5, 3, 7, so that no bank of memory is asked twice."""
    regs = [[0, 0, n] for n in powers(1, each)]
    regs += [[0, 0, n] for n in powers(4 * each * warps, runs // warps)]
    regs += [[0, n, 0] for n in powers(8, block_n // halves // 8)]
    regs += [[1, 0, 0]] if halves == 2 else []
    lanes = [[0, 0, each], [0, 0, 2 * each], [0, 4, 0], [0, 2, 0], [0, 1, 0]]
    parts = [[0, 0, n] for n in powers(4 * each, warps)]
    shape = [halves, block_n // halves, 4 * each * runs]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], shape)


@constexpr_function
def pairs_layout(halves, block_n, runs, warps):
    """(H, N / H, R), a pair of scale and offset for each run, in the threads that have its rows."""
    regs = [[0, 0, n] for n in powers(warps, runs // warps)]
    regs += [[0, n, 0] for n in powers(8, block_n // halves // 8)]
    regs += [[1, 0, 0]] if halves == 2 else []
    lanes = [[0, 0, 0], [0, 0, 0], [0, 4, 0], [0, 2, 0], [0, 1, 0]]
    parts = [[0, 0, n] for n in powers(1, warps)]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], [halves, block_n // halves, runs])


@constexpr_function
def inputs_layout(planes, bits, runs, warps):
    """(planes, R * run): threads have the inputs of their weights; one plane for all, or four."""
    run = 1 << len(bits)
    regs = [[0, 1 << i] for i, bit in enumerate(bits) if bit[0] != "t"]
    regs += [[0, n] for n in powers(run * warps, runs // warps)]
    lanes = [[0, 1 << bits.index(t)] for t in ("t0", "t1")]
    lanes += [[1, 0], [2, 0], [0, 0]] if planes == 4 else [[0, 0]] * 3
    parts = [[0, n] for n in powers(run, warps)]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], [planes, run * runs])


@constexpr_function
def columns_layout(planes, bits, runs, warps):
    """(R, run, 8 / planes, planes), as the tensor cores want a matrix of eight columns."""
    run, low = 1 << len(bits), 2 if "b0" in bits else 1
    regs = [[0, 1 << i, 0, 0] for i in range(len(bits)) if not low <= i < low + 2]
    regs += [[n, 0, 0, 0] for n in powers(warps, runs // warps)]
    lanes = [[0, 1 << low, 0, 0], [0, 2 << low, 0, 0]]
    lanes += [[0, 0, 0, n] for n in powers(1, planes)]
    lanes += [[0, 0, n, 0] for n in powers(1, 8 // planes)]
    parts = [[n, 0, 0, 0] for n in powers(1, warps)]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], [runs, run, 8 // planes, planes])


@constexpr_function
def sums_layout(block_n, runs, warps):
    """(R, N / 16, 16, 8), as the tensor cores have sums."""
    regs = [[0, 0, 0, 1], [0, 0, 8, 0]]
    regs += [[0, n, 0, 0] for n in powers(1, block_n // 16)]
    regs += [[n, 0, 0, 0] for n in powers(warps, runs // warps)]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    parts = [[n, 0, 0, 0] for n in powers(1, warps)]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], [runs, block_n // 16, 16, 8])


@constexpr_function
def parts_layout(block_n, runs, warps):
    """(RUNS, W, N): those sums when their columns have been added."""
    regs = [[0, 0, n] for n in powers(8, block_n // 8)]
    regs += [[n, 0, 0] for n in powers(1, runs // warps)]
    lanes = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    parts = [[0, n, 0] for n in powers(1, warps)]
    return gl.DistributedLinearLayout(regs, lanes, parts, [], [runs // warps, warps, block_n])


@constexpr_function
def outputs_layout(halves, block_n, warps):
    """(W, N): the parts of all warps, and pairs of outputs, in one thread."""
    pair = block_n // 2 if halves == 2 else 4  # the bit of a row that says which of a pair
    rows, none = [[0, n] for n in powers(1, block_n) if n != pair], [[0, 0]] * 5
    regs = [[n, 0] for n in powers(1, warps)] + [[0, pair]]
    parts = (rows[5:] + none)[: warps.bit_length() - 1]
    return gl.DistributedLinearLayout(regs, (rows + none)[:5], parts, [], [warps, block_n])


# ---- the ring


@jit
def _copy(
    ring, slot, ready, w, tile, turn, tiles, n_outputs, ROW: tl.constexpr, H: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, W: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """Begin to copy a turn of a tile, of rows of ROW numbers, to a slot; zeros elsewhere."""
    ROWS: tl.constexpr = BLOCK_N // H
    if BULK:
        at = [0, tile * ROWS, turn * COLUMNS]
        copy_tile(w, at, ready.index(slot), ring.index(slot), tile < tiles)
    else:
        LAYOUT: tl.constexpr = copy_layout(COLUMNS, VECTOR, W)
        h = gl.arange(0, H, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
        j = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
        c = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
        n = h * (n_outputs // H) + gl.minimum(tile * ROWS + j, n_outputs // H - 1)
        c += turn * COLUMNS
        there = (tile < tiles) & (c < ROW)
        at = w + n.to(gl.int64) * ROW + c
        copy_numbers(ring.index(slot), at, there)


@jit
def _fill(
    ring, of_pairs, slot, ready, w, scale, tile, turn, tiles, n_outputs, K: tl.constexpr,
    H: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    BYTES: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """Begin to fill a slot, with pairs if there are any."""
    INT: tl.constexpr = KIND == INT4
    if BULK:
        size: tl.constexpr = BLOCK_N * (COLUMNS * BYTES + (4 * R if INT else 0))
        mbarrier.expect(ready.index(slot), size, tile < tiles)
    _copy(ring, slot, ready, w, tile, turn, tiles, n_outputs, K // 2 if INT else K, H, BLOCK_N,
          COLUMNS, 16 // BYTES, W, BULK)  # fmt: skip
    if INT:
        _copy(of_pairs, slot, ready, scale, tile, turn, tiles, n_outputs, K // GROUP, H, BLOCK_N, R,
              4, W, BULK)  # fmt: skip
    commit_group()


# ---- the row


@jit
def _staged(
    x, gains, eps, i, length, KIND: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr,
    TURN: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The first `length` inputs i in shared memory, (turns, planes, TURN) by index, and the factor
    of all products with them: normed, and for whole numbers as three planes of digits."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = gl.load(x + i, mask=i < length, other=0.0)
    numbers = row.to(gl.float32)
    step = 1.0
    if NORM:
        step = gl.rsqrt(gl.sum(numbers * numbers, 0) / length + eps)
        numbers *= gains.to(gl.float32)
    if KIND == PLAIN:
        if NORM:
            row, step = (numbers * step).to(DTYPE), 1.0
        staged = gl.allocate_shared_memory(DTYPE, [ROOM], memory(1))
        staged.store(row)
        rows = as_rows(staged, [ROOM // TURN, 1, TURN], memory(2))
    else:
        top = gl.max(numbers.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # NaN is the greatest
        if KIND == FP8:  # by a power of two to below 2^14, where float16 has all that bfloat16 has
            power = gl.maximum(gl.minimum(267 - (top >> 23), 254), 1)
            numbers *= (power << 23).to(gl.float32, bitcast=True)
            step *= ((254 - power) << 23).to(gl.float32, bitcast=True)
            staged = gl.allocate_shared_memory(gl.float16, [ROOM], memory(1))
            staged.store(numbers.to(gl.float16))
            rows = as_rows(staged, [ROOM // TURN, 1, TURN], memory(2))
        else:
            largest = top.to(gl.float32, bitcast=True)
            some = largest > 1e-30
            a, b, c = digits_of(numbers, gl.where(some, LARGEST / largest, 0.0))
            step *= gl.where(some, largest / LARGEST, largest)
            SIDE: tl.constexpr = GROUP // 2 if KIND == INT4 else 64
            staged = gl.allocate_shared_memory(
                gl.int8, [ROOM // TURN, 4, TURN], planes_memory(SIDE, 3)
            )
            planes = gl.reshape(gl.join(gl.join(a, c), gl.join(b, c)), [ROOM // TURN, TURN, 4])
            staged.store(gl.permute(planes, [0, 2, 1]))
            rows = as_rows(staged, [ROOM // TURN, 4, TURN], planes_memory(SIDE, 2))
    return rows, step


# ---- the product


@jit
def _natural(z, BLOCK_N: tl.constexpr):
    """A tile's rows, (N,) as the tensor cores have them, in their own order: (N, 1)."""
    z = gl.permute(gl.reshape(z, [BLOCK_N // 8, 2, 2, 2]), [0, 3, 2, 1])
    return gl.reshape(z, [BLOCK_N, 1])


@jit
def _finish(
    z, m, first, scale, n_outputs, out, cos, sin, slots, positions, k, v, T, KIND: tl.constexpr,
    H: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """What becomes of the rows m of a tile, as the tensor cores number them."""
    n = m // 8 * 8 + (m & 1) * 4 + (m & 2) + (m & 4) // 4
    if KIND == INT8 or KIND == FP8:  # noqa: SIM109 (Triton)
        z *= gl.load(half_row(scale, n, first // H, n_outputs, BLOCK_N, H))
    n, r = numbered(_natural(n, BLOCK_N), first, EPILOGUE, BLOCK_N, 1, H == 2)
    finish(
        _natural(z, BLOCK_N), n, r, 1, n_outputs, out, cos, sin, slots, positions, k, v, T,
        EPILOGUE, BLOCK_N, 1, HEADS, KV_HEADS, E, H == 2,
    )  # fmt: skip


@jit
def stream(
    x, w, scale, gain, eps, n_outputs, out, partial, arrived, cos, sin, slots, positions,
    k, v, T, K: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr,
    W: tl.constexpr, EPILOGUE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    E: tl.constexpr, BULK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`w` are numbers or packed bytes, `scale` those of rows or the pairs of int4; what the ring
    holds of both is described to the copy engine instead, where that fills it (BULK). Each of SPLIT
    programs has a part of the inputs; the last one of them to be done adds up, in their order."""
    BITS: tl.constexpr = bits_of(KIND, GROUP)
    RUN: tl.constexpr = 2 ** len(BITS)
    R: tl.constexpr = W * RUNS
    EACH: tl.constexpr = 2 if KIND == INT4 else 1  # inputs of a number of w
    BYTES: tl.constexpr = 2 if KIND == PLAIN else 1  # of a number of w
    PLANES: tl.constexpr = planes_of(KIND)
    WHOLE: tl.constexpr = PLANES > 1
    H: tl.constexpr = 2 if EPILOGUE == GATE else 1
    TURN: tl.constexpr = RUN * R
    TURNS: tl.constexpr = (K + TURN * SPLIT - 1) // (TURN * SPLIT)  # of a part
    PART: tl.constexpr = K if SPLIT == 1 else TURN * TURNS
    COLUMNS: tl.constexpr = TURN // EACH
    ROOM: tl.constexpr = room_for(PART, TURN)
    OPERAND: tl.constexpr = gl.float16 if KIND == FP8 else gl.int8 if WHOLE else x.dtype.element_ty
    WIDTH: tl.constexpr = 4 if WHOLE else 2
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    WANTED: tl.constexpr = columns_layout(PLANES, BITS, R, W)
    SUMS: tl.constexpr = sums_layout(BLOCK_N, R, W)
    OUTPUTS: tl.constexpr = outputs_layout(H, BLOCK_N, W)

    part = gl.program_id(0) % SPLIT
    me, programs = gl.program_id(0) // SPLIT, gl.num_programs(0) // SPLIT
    tiles = (n_outputs + BLOCK_N - 1) // BLOCK_N
    NUMBER: tl.constexpr = number_of(KIND, x.dtype.element_ty)
    ring = gl.allocate_shared_memory(
        NUMBER, [STAGES, H, BLOCK_N // H, COLUMNS], ring_memory(COLUMNS, 8 * BYTES, BULK)
    )
    of_pairs, ready = ring, ring
    if KIND == INT4:
        of_pairs = gl.allocate_shared_memory(
            gl.int32, [STAGES, H, BLOCK_N // H, R], ring_memory(R, 32, BULK)
        )
    sums = gl.allocate_shared_memory(gl.float32, [W, BLOCK_N], memory(2))
    if BULK:
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)

    soon, turn_soon = me, part * TURNS  # what is copied next
    for i in range(gl.minimum(STAGES - 1, (tiles - me + programs - 1) // programs * TURNS)):
        _fill(ring, of_pairs, i, ready, w, scale, soon, turn_soon, tiles, n_outputs, K, H, BLOCK_N,
              COLUMNS, R, BYTES, KIND, GROUP, W, BULK)  # fmt: skip
        turn_soon += 1
        if turn_soon == (part + 1) * TURNS:
            turn_soon = part * TURNS
            soon += programs
    if not BULK:
        for i in range((tiles - me + programs - 1) // programs * TURNS, STAGES - 1):  # noqa: B007
            commit_group()  # as many groups in any case
    inputs = gl.arange(0, ROOM, gl.BlockedLayout([8], [32], [W], [0]))
    gains = inputs
    if NORM:
        gains = gl.load(gain + inputs, mask=inputs < K, other=0.0)
    wait(OVERLAP)
    rows, step = _staged(
        x + part * PART, gains, eps, inputs, gl.minimum(PART, K - part * PART), KIND, GROUP, NORM,
        TURN, ROOM,
    )  # fmt: skip

    slot, phase = 0, 0
    for tile in range(me, tiles, programs):
        if KIND == INT8:
            y = gl.full([R, BLOCK_N, 8], 0, gl.int32, MMA)
        else:
            y = gl.full([R, BLOCK_N, 8], 0.0, gl.float32, MMA)
        for turn in range(TURNS):
            if BULK:
                mbarrier.wait(ready.index(slot), phase)
            else:
                wait_group(STAGES - 2)
            barrier()  # all are done with the turn before this one, whose slot is free
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            _fill(ring, of_pairs, free, ready, w, scale, soon, turn_soon, tiles, n_outputs, K, H,
                  BLOCK_N, COLUMNS, R, BYTES, KIND, GROUP, W, BULK)  # fmt: skip
            turn_soon += 1
            if turn_soon == (part + 1) * TURNS:
                turn_soon = part * TURNS
                soon += programs
                if soon >= tiles:
                    allow(OVERLAP)
            # The row: (R, RUN, 8)
            b = rows.index(turn).load(inputs_layout(PLANES, BITS, R, W))
            b = gl.permute(gl.reshape(b, [PLANES, R] + [2] * len(BITS)), inputs_order(BITS).value)
            b = gl.convert_layout(gl.reshape(b, [R, RUN, 1, PLANES]), WANTED, assert_trivial=True)
            b, _ = gl.broadcast(b, gl.full([R, RUN, 8 // PLANES, PLANES], 0, OPERAND, WANTED))
            b = gl.reshape(b, [R, RUN, 8])
            b = gl.convert_layout(b, gl.DotOperandLayout(1, MMA, WIDTH), assert_trivial=True)
            # The weights: (R, BLOCK_N, RUN)
            a = ring.index(slot).load(weights_layout(H, BLOCK_N, RUN // EACH // 4, R, W))
            a = gl.reshape(a, [BLOCK_N // 8, 2, 2, 2, R] + [2] * (len(BITS) - EACH + 1))
            if KIND == INT4:
                a = halves_of_bytes(a)
            elif KIND == FP8:
                a = floats_of_bytes(a)
            a = gl.permute(a, weights_order(BITS, KIND == INT4).value)
            a = gl.reshape(a, [R, BLOCK_N, RUN])
            a = gl.convert_layout(a, gl.DotOperandLayout(0, MMA, WIDTH), assert_trivial=True)
            if KIND == INT4:
                pair = of_pairs.index(slot).load(pairs_layout(H, BLOCK_N, R, W))
                pair = gl.permute(gl.reshape(pair, [BLOCK_N // 8, 2, 2, 2, R]), [4, 0, 3, 2, 1])
                pair = gl.reshape(pair, [R, BLOCK_N])
                pair = gl.convert_layout(pair, gl.SliceLayout(2, MMA), assert_trivial=True)
                s, o = scale_and_offset(pair[:, :, None])
                # Each run is a group: sums of codes times digits, and of digits
                codes = mma_v2(a, b, gl.full([R, BLOCK_N, 8], MAGIC_BITS, gl.int32, MMA))
                ones = gl.full([R, 16, RUN], 1, gl.int8, gl.DotOperandLayout(0, MMA, WIDTH))
                total = mma_v2(ones, b, gl.full([R, 16, 8], MAGIC_BITS, gl.int32, MMA))
                total = total.to(gl.float32, bitcast=True) - MAGIC
                if BLOCK_N > 16:
                    total = gl.reshape(total, [R, 1, 16, 8])
                    total = gl.convert_layout(total, SUMS, assert_trivial=True)
                    zeros = gl.full([R, BLOCK_N // 16, 16, 8], 0.0, gl.float32, SUMS)
                    total, _ = gl.broadcast(total, zeros)
                    total = gl.reshape(total, [R, BLOCK_N, 8])
                    total = gl.convert_layout(total, MMA, assert_trivial=True)
                y += s * (codes.to(gl.float32, bitcast=True) - MAGIC)
                y += o * total
            else:
                y = mma_v2(a, b, y)
            slot, phase = next_slot(slot, phase, STAGES)
        # What the columns say, of all runs and all warps
        column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
        worth = gl.where(column == 0, 1.0, 0.0)
        if WHOLE:
            worth = gl.where(column == 1, 256.0, gl.where(column == 2, 65536.0, worth))
        z = gl.reshape(gl.sum(y.to(gl.float32) * worth, 2), [RUNS, W, BLOCK_N])
        z = gl.convert_layout(z, parts_layout(BLOCK_N, R, W), assert_trivial=True)
        sums.store(gl.sum(z, 0))
        z = gl.sum(sums.load(OUTPUTS), 0) * step
        m = gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUTPUTS))
        if SPLIT == 1:
            _finish(z, m, tile * BLOCK_N, scale, n_outputs, out, cos, sin, slots, positions, k, v,
                    T, KIND, H, BLOCK_N, EPILOGUE, HEADS, KV_HEADS, E)  # fmt: skip
        else:
            gl.store(partial + (tile * SPLIT + part) * BLOCK_N + m, z)
    if SPLIT > 1:
        barrier()
        if gl.atomic_add(arrived + me, 1, sem="acq_rel") == SPLIT - 1:
            gl.store(arrived + me, 0)
            for done in range(me, tiles, programs):
                row = gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUTPUTS))
                at = partial + done * (SPLIT * BLOCK_N) + row
                sum = gl.load(at, cache_modifier=".cg")
                for other in gl.static_range(1, SPLIT):
                    sum += gl.load(at + other * BLOCK_N, cache_modifier=".cg")
                _finish(sum, row, done * BLOCK_N, scale, n_outputs, out, cos, sin, slots, positions,
                        k, v, T, KIND, H, BLOCK_N, EPILOGUE, HEADS, KV_HEADS, E)  # fmt: skip


# ---- for its launch


def turn_of(read: Source, blocks: Stream) -> int:
    """Inputs of a turn."""
    bits: tuple[str, ...] = bits_of(read.kind, read.group)
    return (1 << len(bits)) * blocks.runs * blocks.warps


def shared_memory(read: Source, inputs: int, blocks: Stream) -> int:
    """Bytes that a program needs, or a little less."""
    turn = turn_of(read, blocks)
    bits = {PLAIN.value: 16, INT4.value: 4}.get(read.kind.value, 8)
    pairs = 4 * turn // read.group if read.group else 0
    ring = blocks.stages * blocks.block_n * (turn * bits // 8 + pairs)
    part = -(-inputs // (turn * blocks.split)) * turn
    row: int = room_for(part, turn) * max(2, planes_of(read.kind))
    return ring + row + 4 * blocks.warps * blocks.block_n
