"""Products of packed weights on the tensor cores: from memory to registers, and from there at once.

A thread reads 16 bytes of a row of the weight and makes them numbers where they are; no weight goes
through shared memory. The surprising thing is what makes that possible: a sum may be taken in any
order, so the inputs are numbered by where the tensor cores want them (eight threads side by side
have eight outputs, four have four runs of inputs), and the weights lie as they lie. That Triton
loads them so was seen of 3.6; 3.9 chooses other threads, and brings them to these by shared memory:
right too, and slower.

Letters: N outputs, K inputs, W warps, RP rows as the tensor cores see them; of a tile, P tiles of
eight outputs and C runs of 64 bytes; t the thread of four, i its word of four; a word's numbers are
p of a pair of pair j, and int4 has them in a low and a high half, h.
"""

import triton
import triton.language as tl

from llama.cuda.launch import in_order, wait
from llama.cuda.weights import INT4, INT8, INTERPRETED, output_row, scale_and_offset

# Two bfloat16 in a word. Compute capability 8 has their fma, 9 their sums and products too.
MINUS_ONE, MINUS_ZERO = tl.constexpr(-0x407F4080), tl.constexpr(-0x7FFF8000)


# ---- a word's numbers: pairs of a byte and the one after the next, (..., j, p)


@triton.jit
def _four(b0, b1, b2, b3):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The numbers of a word's bytes, (..., j, p)."""
    return tl.join(tl.join(b0, b1), tl.join(b2, b3))


@triton.jit
def _halves(pair, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Two numbers of 16 bits that lie in a word."""
    low = pair.to(tl.int16).to(DTYPE, bitcast=True)
    return low, (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _two(even, odd, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Pairs in words, of the bytes 0 and 2 and of 1 and 3, as (..., j, p)."""
    b0, b2 = _halves(even, DTYPE)
    b1, b3 = _halves(odd, DTYPE)
    return _four(b0, b1, b2, b3)


@triton.jit
def _byte(word, B: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """Byte B of a word, with its sign."""
    return (word << (24 - 8 * B)) >> 24


@triton.jit
def _float8(byte):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The number of an e4m3: moved into a float32 its bits say that / 2^120."""
    bits = (byte & 0x80) << 24 | (byte & 0x7F) << 20
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _numbers_by_row(word, KIND: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The four numbers of int8 or fp8 words (...), not scaled: (..., j, p)."""
    if DTYPE == tl.bfloat16 and not INTERPRETED:  # noqa: SIM300
        if KIND == INT8:
            # 128 + the low seven bits, minus 128, or 256 where the sign is set
            even, odd = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b;
                lop3.b32 a, $2, 0x007f007f, 0x43004300, 0xEA;
                lop3.b32 b, $2, 0x00800080, 0x43004300, 0xEA;
                fma.rn.bf16x2 $0, b, $3, a;
                shr.u32 b, $2, 8;
                lop3.b32 a, b, 0x007f007f, 0x43004300, 0xEA;
                lop3.b32 b, b, 0x00800080, 0x43004300, 0xEA;
                fma.rn.bf16x2 $1, b, $3, a;
                }""",
                "=&r,=r,r,r", [word, MINUS_ONE], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            # the exponent's four bits are a bfloat16's last four: the number / 2^120
            even, odd = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b;
                shr.u32 a, $2, 4;
                and.b32 a, a, 0x07f007f0;
                lop3.b32 a, $2, 0x80008000, a, 0xEA;
                fma.rn.bf16x2 $1, a, $3, $4;
                shl.b32 b, $2, 8;
                shl.b32 a, $2, 4;
                and.b32 a, a, 0x07f007f0;
                lop3.b32 a, b, 0x80008000, a, 0xEA;
                fma.rn.bf16x2 $0, a, $3, $4;
                }""",
                "=r,=&r,r,r,r", [word, 0x7B807B80, MINUS_ZERO], dtype=(tl.int32, tl.int32),
                is_pure=True, pack=1,
            )  # fmt: skip
        numbers = _two(even, odd, DTYPE)
    else:
        b0, b1, b2, b3 = _byte(word, 0), _byte(word, 1), _byte(word, 2), _byte(word, 3)
        if KIND == INT8:
            numbers = _four(b0, b1, b2, b3).to(DTYPE)
        else:
            numbers = _four(_float8(b0), _float8(b1), _float8(b2), _float8(b3)).to(DTYPE)
    return numbers


@triton.jit
def _nibble(word, s, o, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    return ((word >> SHIFT) & 15).to(tl.float32) * s + o


@triton.jit
def _numbers_by_group(word, pair, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """The eight numbers of int4 words (...) with a pair of scale and offset: (..., j, p, h)."""
    if DTYPE == tl.bfloat16 and not INTERPRETED:  # noqa: SIM300
        # 128 + q, minus 128, times scale plus offset, rounded once
        even_low, odd_low, even_high, odd_high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, s, o;
            prmt.b32 s, $5, 0, 0x1010;
            prmt.b32 o, $5, 0, 0x3232;
            lop3.b32 a, $4, 0x000f000f, $6, 0xEA;
            fma.rn.bf16x2 a, $6, $7, a;
            fma.rn.bf16x2 $0, a, s, o;
            shr.u32 a, $4, 8;
            lop3.b32 a, a, 0x000f000f, $6, 0xEA;
            fma.rn.bf16x2 a, $6, $7, a;
            fma.rn.bf16x2 $1, a, s, o;
            shr.u32 a, $4, 4;
            lop3.b32 a, a, 0x000f000f, $6, 0xEA;
            fma.rn.bf16x2 a, $6, $7, a;
            fma.rn.bf16x2 $2, a, s, o;
            shr.u32 a, $4, 12;
            lop3.b32 a, a, 0x000f000f, $6, 0xEA;
            fma.rn.bf16x2 a, $6, $7, a;
            fma.rn.bf16x2 $3, a, s, o;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r", [word, pair, 0x43004300, MINUS_ONE],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        low, high = _two(even_low, odd_low, DTYPE), _two(even_high, odd_high, DTYPE)
    else:
        s, o = scale_and_offset(pair)
        low = _four(_nibble(word, s, o, 0), _nibble(word, s, o, 8), _nibble(word, s, o, 16),
                    _nibble(word, s, o, 24))  # fmt: skip
        high = _four(_nibble(word, s, o, 4), _nibble(word, s, o, 12), _nibble(word, s, o, 20),
                     _nibble(word, s, o, 28))  # fmt: skip
    return tl.join(low.to(DTYPE), high.to(DTYPE))


# ---- the product


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001,ANN202
    """What is at `at`, zeros where that is not inside, unless the WHOLE of it is."""
    return tl.load(at) if WHOLE else tl.load(at, mask=inside, other=0)


@triton.jit
def tile_of_words(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x, w, pairs, rows, n_outputs, first, begin, end, K: tl.constexpr, RP: tl.constexpr,  # noqa: ANN001
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    PAIRED: tl.constexpr, SINGLE: tl.constexpr, W: tl.constexpr, APART: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Inputs begin to end of RP rows, of which `rows` are there, times BLOCK_N weight rows:
    (BLOCK_N, RP) float32, not scaled by row.

    `w` holds words of four bytes, `pairs` those of a group's scale and offset. Warps are APART:
    each has outputs of its own; else each has a part of the inputs. A tile is one turn ahead.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    EACH: tl.constexpr = 8 if KIND == INT4 else 4  # numbers of a word
    RUN: tl.constexpr = 16 * EACH  # inputs of four threads
    OUTPUTS: tl.constexpr = BLOCK_N // W if APART else BLOCK_N
    P: tl.constexpr = OUTPUTS // 8
    C: tl.constexpr = BLOCK_K // RUN if APART else BLOCK_K // RUN // W
    Q: tl.constexpr = RP // 8
    HALVES: tl.constexpr = 2 if KIND == INT4 else 1
    EIGHTHS: tl.constexpr = C * HALVES * 2 * Q  # of the inputs' tile
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    g = tl.arange(0, 8)[:, None, None, None]  # of eight outputs, or of eight rows
    warp = tl.arange(0, W)[None, :, None, None]

    # Weights: (8 outputs, W, C * P, 16 words)
    tile = tl.arange(0, C * P)[None, None, :, None]
    word = tl.arange(0, 16)[None, None, None, :]
    run = tile // P if APART else tile // P * W + warp
    j = first + (warp * OUTPUTS if APART else 0) + tile % P * 8 + g
    n = output_row(tl.minimum(j, n_outputs - 1), n_outputs, PAIRED).to(tl.int64)
    column = run * RUN + word * EACH + tl.zeros_like(n).to(tl.int32)
    to_w = w + n * (K // EACH) + (run * 16 + word)

    # Pairs of groups: (a thread's or a word's, 8 outputs, W, C * P), so that threads get their own
    G: tl.constexpr = 16 if GROUP == 16 else 4
    if KIND == INT4:
        of, g_ = tl.arange(0, G)[:, None, None, None], tl.arange(0, 8)[None, :, None, None]
        warp_ = tl.arange(0, W)[None, None, :, None]
        tile = tl.arange(0, C * P)[None, None, None, :]
        run = tile // P if APART else tile // P * W + warp_
        j = first + (warp_ * OUTPUTS if APART else 0) + tile % P * 8 + g_
        n = output_row(tl.minimum(j, n_outputs - 1), n_outputs, PAIRED).to(tl.int64)
        group = (run * 64 + of * (64 // G)) // (GROUP // 2)
        to_pair = pairs + n * (K // GROUP) + group
        in_group = group * GROUP + tl.zeros_like(n).to(tl.int32)

    # Inputs: eight at a time, (8 rows or the one, W or 1, EIGHTHS, 4 threads * 8)
    e = tl.arange(0, 32)[None, None, None, :]
    b = tl.arange(0, EIGHTHS)[None, None, :, None]
    r = b % Q * 8 + (0 if SINGLE else g)  # one serves all eight
    eighth, half = b // Q % 2, b // (Q * 2) % HALVES
    run = b // (Q * 2 * HALVES) * (1 if APART else W) + (0 if APART else warp)
    if KIND == INT4:
        byte = run * 8 + e // 8 * 2 + eighth  # in eights
        c = byte // (GROUP // 16) * GROUP + byte % (GROUP // 16) * 8 + half * (GROUP // 2) + e % 8
    else:
        c = run * RUN + e // 8 * (RUN // 4) + eighth * 8 + e % 8
    c += tl.zeros((1, 1 if APART else W, 1, 1), tl.int32)
    to_x = x + tl.minimum(r, rows - 1) * K + c  # rows too many repeat the last

    soon = tl.minimum(begin, K - BLOCK_K) if WHOLE else begin  # a part may have no inputs
    words = _load(to_w + soon // EACH, soon + column < end, WHOLE)
    if KIND == INT4:
        pair = _load(to_pair + soon // GROUP, soon + in_group < end, WHOLE)
    wait(OVERLAP)
    y = tl.zeros((W, OUTPUTS, RP), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=1):
        later = start + BLOCK_K
        if WHOLE:
            later = tl.minimum(later, end - BLOCK_K)  # the last tile twice, and no mask
        ahead = _load(to_w + later // EACH, later + column < end, WHOLE)
        if KIND == INT4:
            pair_ahead = _load(to_pair + later // GROUP, later + in_group < end, WHOLE)
        xs = _load(to_x + start, start + c < end, WHOLE)
        if SINGLE or RP > 8:  # measured: at eight rows the compiler's own order is better
            in_order(OVERLAP)
        xs = tl.broadcast_to(xs, (8, W, EIGHTHS, 32))
        if KIND == INT4:
            each = tl.permute(pair, (1, 2, 3, 0))
            if G == 4:
                each = tl.broadcast_to(each[:, :, :, :, None], (8, W, C * P, 4, 4))
                each = tl.reshape(each, (8, W, C * P, 16))
            a = _numbers_by_group(words, each, DTYPE)
            a = tl.reshape(a, (8, W, C, P, 4, 4, 2, 2, 2))  # g W C P t i j p h
            a = tl.permute(a, (1, 3, 0, 2, 5, 6, 4, 8, 7))
            xs = tl.reshape(xs, (8, W, C, 2, 2, Q, 4, 2, 2, 2))  # g W C h i Q t i p j
            xs = tl.permute(xs, (1, 2, 4, 7, 9, 6, 3, 8, 5, 0))
            pair = pair_ahead
        else:
            a = _numbers_by_row(words, KIND, DTYPE)
            a = tl.reshape(a, (8, W, C, P, 4, 2, 2, 2, 2))  # g W C P t i i j p
            a = tl.permute(a, (1, 3, 0, 2, 5, 7, 4, 6, 8))
            xs = tl.reshape(xs, (8, W, C, 2, Q, 4, 2, 2, 2))  # g W C i Q t i p j
            xs = tl.permute(xs, (1, 2, 3, 8, 5, 6, 7, 4, 0))
        a = tl.reshape(a, (W, OUTPUTS, C * RUN))
        y = tl.dot(a, tl.reshape(xs, (W, C * RUN, RP)), y, input_precision="ieee")
        words = ahead
    return tl.reshape(y, (BLOCK_N, RP)) if APART else tl.sum(y, 0)
