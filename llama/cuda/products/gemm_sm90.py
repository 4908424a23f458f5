"""Products of 2 to 128 rows on Hopper's tensor cores, with packed weights or plain ones.

One warp has the copy engine fill a ring in shared memory with weights and rows. Two groups of four
warps each multiply a tile of outputs with them. The wide matrix instruction reads the rows, and
plain weights, from shared memory by itself; packed ones a group makes bfloat16 in registers, while
the instruction works on those before. Where programs share the inputs, each leaves its part of the
sums, and whoever reads them adds up (rows.py).

The surprising thing: beside packed weights the rows come with their inputs in another order, in
which eight bytes of a weight that lie side by side are what one thread has to hand over; whoever
makes the rows puts them so (epilogues.arranged_place). Their outputs are numbered by where the
tensor cores have them, too.

Letters: N outputs of a group, in H halves of the weight, two where w1 lies above w3; K inputs, RP
rows as the tensor cores see them; a turn is what is multiplied at a time. The bits of an input's
number in sixty-four, from the last one on, are p of a pair, j, i, t which of four threads, h.
"""

# ruff: noqa: ANN001, ANN002, ANN201, ANN202 (arguments of kernels have no types in Python)
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import triton.language as tl

from llama.cuda.launch import allow, wait
from llama.cuda.products.dequantize import INTERPRETED, bfloats_of_bytes, bfloats_of_nibbles
from llama.cuda.products.epilogues import GATE, gate, half_row, numbered, pairs, store
from llama.cuda.products.gluon import (
    constexpr_function,
    copy_tile,
    flat,
    gl,
    jit,
    mbarrier,
    next_slot,
    powers,
    tiles_memory,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
    work_together,
)
from llama.cuda.weights import FP8, INT4, INT8, PLAIN

GROUP = tl.constexpr(64)  # inputs of a pair of int4
WARPS = tl.constexpr(4)  # of a group


# ---- where numbers lie


@constexpr_function
def rows_memory():
    """(RP, K), and (N, K) of plain weights."""
    return gl.NVMMASharedLayout(128, 16, 2)


@constexpr_function
def row_bits(block_n, halves, columns, plain):
    """The bits of an output's number in a tile, in the order in which the tensor cores have them:
    which of eight fours of threads (of those that read at a time, no two ask the same banks of
    memory), which of the two of a thread, which warp, and which of a thread again. Of plain
    weights, which no thread reads, they are as they are."""
    if plain:
        return tl.constexpr(powers(1, block_n))
    two = block_n // 2 if halves == 2 else 1
    apart = {32: (1, 2), 64: (1, 4), 128: (2, 4)}[min(128, columns)]
    others = [bit for bit in powers(1, block_n) if bit != two]
    others.sort(key=lambda bit: bit not in apart)
    return tl.constexpr([*others[:3], two, *others[3:]])


@constexpr_function
def rows_layout(bits, outputs, behind, mine, threads):
    """Outputs in dimensions `outputs`, and `behind` them others, with bits that say which number of
    a thread, `mine`, and those that say which thread of four."""

    def places(some):
        last = outputs[-1]
        at = [[bit] if len(outputs) == 1 else [bit // last, bit % last] for bit in some]
        return [place + [0] * len(behind) for place in at]

    def rest(some):
        return [[0] * len(outputs) + place for place in some]

    regs, lanes = rest(mine) + places([bits[3], *bits[6:]]), rest(threads) + places(bits[:3])
    return gl.DistributedLinearLayout(regs, lanes, places(bits[4:6]), [], outputs + behind)


@constexpr_function
def weights_layout(bits, halves, columns):
    """(H, N / H, columns) bytes, eight side by side a thread."""
    mine = [[1], [2], [4]] + [[n] for n in powers(32, columns // 32)]
    outputs = [halves, (1 << len(bits)) // halves]
    return rows_layout(bits, outputs, [columns], mine, [[8], [16]])


@constexpr_function
def words_layout(bits, groups):
    """The same of int4 as (N, groups, 4 threads, 8 bytes)."""
    mine = [[0, 0, n] for n in (1, 2, 4)] + [[n, 0, 0] for n in powers(1, groups)]
    threads = [[0, 1, 0], [0, 2, 0]]
    return rows_layout(bits, [1 << len(bits)], [groups, 4, 8], mine, threads)


@constexpr_function
def pairs_layout(bits, groups):
    """(N, groups), in all four threads."""
    mine = [[n] for n in powers(1, groups)]
    return rows_layout(bits, [1 << len(bits)], [groups], mine, [[0], [0]])


@constexpr_function
def sums_layout(bits, padded):
    """(N, RP): the two outputs of a thread side by side, so that they are stored as one."""
    regs = [[bits[3], 0], [0, 1], *([0, n] for n in powers(8, padded // 8))]
    regs += [[bit, 0] for bit in bits[6:]]
    lanes = [[0, 2], [0, 4], *([bit, 0] for bit in bits[:3])]
    warps = [[bit, 0] for bit in bits[4:6]]
    return gl.DistributedLinearLayout(regs, lanes, warps, [], [1 << len(bits), padded])


@constexpr_function
def as_bits(bits, *behind):
    """The shape of a tile with a dimension for each bit of an output's number."""
    return tl.constexpr([2] * len(bits) + list(behind))


@constexpr_function
def to_tensor_cores(bits, *behind):
    """The order of those dimensions that tensor cores have, and that of what is behind them."""
    order = [len(bits) - bit.bit_length() for bit in bits[::-1]]
    return tl.constexpr(order + [len(bits) + n for n in behind])


@constexpr_function
def from_tensor_cores(bits):
    """The order in which they say an output's number again."""
    order = [len(bits) - 1 - bits.index(bit) for bit in powers(1, 1 << len(bits))[::-1]]
    return tl.constexpr([*order, len(bits)])


# ---- the ring


@jit
def _bring_weights(turn, slot, memory, source, TURNS: tl.constexpr):
    """Begin to bring a turn's weights to a slot, if there is such a turn."""
    ready, _, ring, of_rows = memory
    _, w, program, begin = source
    H: tl.constexpr = ring.shape[1]
    OUTPUTS: tl.constexpr = ring.shape[2]
    COLUMNS: tl.constexpr = ring.shape[3]
    weights: tl.constexpr = 2 * H * OUTPUTS * COLUMNS * (w.dtype.primitive_bitwidth // 8)
    size: tl.constexpr = weights + 2 * of_rows.shape[1] * of_rows.shape[2]
    mbarrier.expect(ready.index(slot), size, turn < TURNS)
    for i in gl.static_range(2):
        at = [0, (2 * program + i) * OUTPUTS, (begin + turn) * COLUMNS]
        copy_tile(w, at, ready.index(slot), ring.index(2 * slot + i), turn < TURNS)


@jit
def _bring_rows(turn, slot, memory, source, TURNS: tl.constexpr):
    """The same of its rows."""
    ready, _, _, of_rows = memory
    x, _, _, begin = source
    at = [0, (begin + turn) * of_rows.shape[2]]
    copy_tile(x, at, ready.index(slot), of_rows.index(slot), turn < TURNS)


@jit
def _supply(memory, source, TURNS: tl.constexpr, OVERLAP: tl.constexpr):
    """The one warp: fill each slot, and each again when both groups are done with it."""
    _, free, _, of_rows = memory
    STAGES: tl.constexpr = of_rows.shape[0]
    for i in gl.static_range(STAGES):
        _bring_weights(i, i, memory, source, TURNS)
    wait(OVERLAP)
    for i in gl.static_range(STAGES):
        _bring_rows(i, i, memory, source, TURNS)
    slot, phase = 0, 0
    for turn in range(STAGES, TURNS):
        mbarrier.wait(free.index(slot), phase)
        _bring_weights(turn, slot, memory, source, TURNS)
        _bring_rows(turn, slot, memory, source, TURNS)
        slot, phase = next_slot(slot, phase, STAGES)


# ---- the product


@jit
def _weights(packed, pair, KIND: tl.constexpr, BITS: tl.constexpr, MMA: tl.constexpr):
    """A turn's weights as the tensor cores want them: (N, inputs)."""
    BLOCK_N: tl.constexpr = packed.shape[0] * packed.shape[1]
    COLUMNS: tl.constexpr = packed.shape[2]
    GROUPS: tl.constexpr = COLUMNS // 32 if KIND == INT4 else COLUMNS // GROUP
    a = packed.load(weights_layout(BITS, packed.shape[0], COLUMNS))
    if KIND == INT4:
        WORDS: tl.constexpr = words_layout(BITS, GROUPS)
        pair = gl.reshape(pair, [BLOCK_N, GROUPS, 1, 1])
        pair = gl.convert_layout(pair, WORDS, assert_trivial=True)
        pair, _ = gl.broadcast(pair, gl.full([BLOCK_N, GROUPS, 4, 8], 0, gl.int32, WORDS))
        a = gl.convert_layout(gl.reshape(a, [BLOCK_N, GROUPS, 4, 8]), WORDS, assert_trivial=True)
        a = bfloats_of_nibbles(a, pair)  # (N, groups, t, i j p, h)
        a = gl.reshape(a, as_bits(BITS, GROUPS, 4, 2, 2, 2, 2).value)
        a = gl.permute(a, to_tensor_cores(BITS, 0, 5, 2, 3, 1, 4).value)
    else:
        a = bfloats_of_bytes(a, KIND)  # (N, groups of h t i j p)
        a = gl.reshape(a, as_bits(BITS, GROUPS, 2, 4, 2, 2, 2).value)
        a = gl.permute(a, to_tensor_cores(BITS, 0, 1, 3, 4, 2, 5).value)
    a = gl.reshape(a, [BLOCK_N, GROUPS * GROUP])  # of groups of h i j t p
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@jit
def _turn(
    z, pair, before, slot, phase, turn, memory, source, at_pairs, ME: tl.constexpr,
    TURNS: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MMA: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Begin the products of a turn, whose data are in `slot`, and wait for those of the turn
    `before`, to which they are added, unless it is the FIRST one. Returns what the next turn
    needs."""
    ready, free, ring, of_rows = memory
    if INTERPRETED:  # one after the other
        _bring_weights(turn, slot, memory, source, TURNS)
        _bring_rows(turn, slot, memory, source, TURNS)
    soon = pair
    if KIND == INT4:
        soon = gl.load(at_pairs + gl.minimum(turn + 1, TURNS - 1) * pair.shape[1])
    mbarrier.wait(ready.index(slot), phase)
    a = ring.index(2 * slot + ME)
    if KIND == PLAIN:  # noqa: SIM108 (Triton)
        a = flat(a, rows_memory())
    else:
        a = _weights(a, pair, KIND, BITS, MMA)
    b = of_rows.index(slot).permute([1, 0])
    z = warpgroup_mma(a, b, z, use_acc=not FIRST, is_async=True)
    soon_slot, phase = next_slot(slot, phase, of_rows.shape[0])
    if not FIRST:
        z = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[z]))
        mbarrier.arrive(free.index(before))
    return z, soon, slot, soon_slot, phase


@jit
def _multiply(
    memory, source, scale, rows, n_outputs, out, ME: tl.constexpr, K: tl.constexpr,
    TURNS: tl.constexpr, KIND: tl.constexpr, EPILOGUE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Group ME: its tile, and what becomes of it."""
    _, _, ring, of_rows = memory
    _, _, program, begin = source
    H: tl.constexpr = ring.shape[1]
    BLOCK_N: tl.constexpr = H * ring.shape[2]
    RP: tl.constexpr = of_rows.shape[1]
    GROUPS: tl.constexpr = of_rows.shape[2] // GROUP
    BITS: tl.constexpr = row_bits(BLOCK_N, H, ring.shape[3], KIND == PLAIN)
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RP, 16])
    tile = 2 * program + ME
    pair, at_pairs = 0, 0
    if KIND == INT4:
        PAIRS: tl.constexpr = pairs_layout(BITS, GROUPS)
        n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, PAIRS))
        row = half_row(0, n, tile * (BLOCK_N // H), n_outputs, BLOCK_N, H)
        group = begin * GROUPS + gl.arange(0, GROUPS, gl.SliceLayout(0, PAIRS))
        at_pairs = scale + row.to(gl.int64)[:, None] * (K // GROUP) + group[None, :]
        pair = gl.load(at_pairs)
    wait(OVERLAP)
    # Two sets of registers by turns: while the tensor cores read one, the other one is made.
    z = gl.full([BLOCK_N, RP], 0.0, gl.float32, MMA)
    before, slot, phase = 0, 0, 0
    z, pair, before, slot, phase = _turn(
        z, pair, before, slot, phase, 0, memory, source, at_pairs, ME, TURNS, KIND, BITS, MMA, True
    )
    if TURNS % 2 == 0:
        z, pair, before, slot, phase = _turn(
            z, pair, before, slot, phase, 1, memory, source, at_pairs, ME, TURNS, KIND, BITS, MMA,
            False,
        )  # fmt: skip
    for turn in range(2 - TURNS % 2, TURNS, 2):
        for i in gl.static_range(2):
            z, pair, before, slot, phase = _turn(
                z, pair, before, slot, phase, turn + i, memory, source, at_pairs, ME, TURNS, KIND,
                BITS, MMA, False,
            )  # fmt: skip
    y = warpgroup_mma_wait(0, deps=[z])
    allow(OVERLAP)
    y = gl.permute(gl.reshape(y, as_bits(BITS, RP).value), from_tensor_cores(BITS).value)
    SUMS: tl.constexpr = sums_layout(BITS, RP)
    y = gl.convert_layout(gl.reshape(y, [BLOCK_N, RP]), SUMS, assert_trivial=True)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
    r = gl.arange(0, RP, gl.SliceLayout(0, SUMS))[None, :]
    if KIND == INT8 or KIND == FP8:  # noqa: SIM109 (Triton)
        at = half_row(scale, n, tile * (BLOCK_N // H), n_outputs, BLOCK_N, H)
        y *= gl.load(at)[:, None]
    if EPILOGUE == GATE:
        n, r = numbered(n[:, None] * RP + r, tile * BLOCK_N, GATE, BLOCK_N, RP, True)
        a, b = pairs(y, BLOCK_N, RP, True)
        gate(a, b, n, r, rows, n_outputs, out, KIND != PLAIN)
    else:
        out += (begin // TURNS).to(gl.int64) * rows * n_outputs
        store(y, tile * BLOCK_N + n[:, None], r, rows, n_outputs, out, False)


@jit
def wide(
    x, w, scale, rows, n_outputs, out, K: tl.constexpr, RP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr,
    EPILOGUE: tl.constexpr, OVERLAP: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """Two tiles of BLOCK_N outputs of RP rows over a SPLIT-th of the inputs: stored to `out`
    (SPLIT, rows, outputs), or gated. x (rows, K) and w, numbers or bytes, are described to the copy
    engine; `scale` are those of outputs, or the pairs of int4."""
    COLUMNS: tl.constexpr = BLOCK_K // 2 if KIND == INT4 else BLOCK_K
    H: tl.constexpr = 2 if EPILOGUE == GATE else 1
    TURNS: tl.constexpr = K // BLOCK_K // SPLIT
    ring = gl.allocate_shared_memory(
        w.dtype,
        [2 * STAGES, H, BLOCK_N // H, COLUMNS],
        tiles_memory(COLUMNS, w.dtype.primitive_bitwidth),
    )
    of_rows = gl.allocate_shared_memory(x.dtype, [STAGES, RP, BLOCK_K], rows_memory())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    memory = (ready, free, ring, of_rows)
    source = (x, w, gl.program_id(0), gl.program_id(1) * TURNS)
    work_together(
        [
            (_multiply, (memory, source, scale, rows, n_outputs, out, 0, K, TURNS, KIND, EPILOGUE,
                         OVERLAP)),
            (_multiply, (memory, source, scale, rows, n_outputs, out, 1, K, TURNS, KIND, EPILOGUE,
                         OVERLAP)),
            (_supply, (memory, source, TURNS, OVERLAP)),
        ],
        [WARPS, 1], [REGISTERS, 24],
    )  # fmt: skip
