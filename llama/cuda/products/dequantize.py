"""Bytes become numbers, and numbers bytes, several in an instruction; one by one when interpreted.

This file knows no layout and no scale of a row. The surprising thing: hardly any is converted. The
bits of a small whole number become the last ones of a float's fraction, and what that adds is
subtracted, which is exact.
"""

import triton
import triton.language as tl

from llama.cuda.launch import INTERPRETED as _INTERPRETED
from llama.cuda.weights import INT8, scale_and_offset

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def halves_of_bytes(x):
    """Return the low and the high halves of bytes, 0 to 15, as int8: (..., 2)."""
    if INTERPRETED:
        low, high = (x & 15).to(tl.int8), (x >> 4).to(tl.int8)
    else:
        low, high = tl.inline_asm_elementwise(
            "{ and.b32 $0, $2, 0x0f0f0f0f; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0f0f0f0f; }",
            "=&r,=r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    return tl.join(low, high)


@triton.jit
def floats_of_bytes(x):
    """Return the float16 of bytes that hold e4m3."""
    if INTERPRETED:
        bits = (x.to(tl.int32) & 0x80) << 24 | (x.to(tl.int32) & 0x7F) << 20
        y = (bits.to(tl.float32, bitcast=True) * 2.0**120).to(tl.float16)
    else:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""",
            "=&r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    return y


@triton.jit
def digits_of(x, factor):
    """Return as int8 the three digits, -128 to 127, the last one first, of x * factor, rounded to
    a whole number, which is at most 2^22."""
    if INTERPRETED:
        n = (x * factor + 12582912.0).to(tl.int32, bitcast=True) - (0x4B400000 - 0x808080)
        a, b, c = (n ^ 128).to(tl.int8), (n >> 8 ^ 128).to(tl.int8), (n >> 16 ^ 128).to(tl.int8)
    else:
        a, b, c = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, p, q;
            fma.rn.f32 a, $3, $7, 0f4B400000;
            fma.rn.f32 b, $4, $8, 0f4B400000;
            fma.rn.f32 c, $5, $9, 0f4B400000;
            fma.rn.f32 d, $6, $10, 0f4B400000;
            sub.s32 a, a, 0x4ABF7F80;
            sub.s32 b, b, 0x4ABF7F80;
            sub.s32 c, c, 0x4ABF7F80;
            sub.s32 d, d, 0x4ABF7F80;
            prmt.b32 p, a, b, 0x5140;
            prmt.b32 q, c, d, 0x5140;
            prmt.b32 $0, p, q, 0x5410;
            prmt.b32 $1, p, q, 0x7632;
            prmt.b32 p, a, b, 0x0062;
            prmt.b32 q, c, d, 0x0062;
            prmt.b32 $2, p, q, 0x5410;
            xor.b32 $0, $0, 0x80808080;
            xor.b32 $1, $1, 0x80808080;
            xor.b32 $2, $2, 0x80808080;
            }""",
            "=&r,=&r,=&r,r,r,r,r,r,r,r,r", [x, factor], dtype=(tl.int8,) * 3,
            is_pure=True, pack=4,
        )  # fmt: skip
    return a, b, c


# ---- the same as bfloat16, or as the interpreter's float16


@triton.jit
def bfloats_of_bytes(x, KIND: tl.constexpr):
    """Return the numbers of bytes that hold int8 or e4m3, not scaled."""
    if INTERPRETED:
        y = x.to(tl.float16) if KIND == INT8 else floats_of_bytes(x)
    elif KIND == INT8:  # 128 + the low seven bits, minus 128, or 256 where the sign is set
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            mov.b32 c, 0xBF80BF80;
            prmt.b32 b, $2, 0, 0x4140;
            lop3.b32 a, b, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 b, b, 0x00800080, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, b, c, a;
            prmt.b32 b, $2, 0, 0x4342;
            lop3.b32 a, b, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 b, b, 0x00800080, 0x43004300, 0xEA;
            fma.rn.bf16x2 $1, b, c, a;
            }""",
            "=&r,=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:  # the exponent's four bits are a bfloat16's last four: the number / 2^120
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            mov.b32 c, 0x7B807B80;
            mov.b32 d, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404;
            shr.u32 b, a, 4;
            and.b32 b, b, 0x07f007f0;
            lop3.b32 a, a, 0x80008000, b, 0xEA;
            fma.rn.bf16x2 $0, a, c, d;
            prmt.b32 a, $2, 0, 0x3424;
            shr.u32 b, a, 4;
            and.b32 b, b, 0x07f007f0;
            lop3.b32 a, a, 0x80008000, b, 0xEA;
            fma.rn.bf16x2 $1, a, c, d;
            }""",
            "=&r,=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return y


@triton.jit
def bfloats_of_nibbles(x, pair):
    """Return q * scale + offset of the halves q of bytes, with the pair (int32) of each byte:
    (..., 2)."""
    if INTERPRETED:
        s, o = scale_and_offset(pair)
        low = ((x & 15).to(tl.float32) * s + o).to(tl.float16)
        high = ((x >> 4).to(tl.float32) * s + o).to(tl.float16)
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, m, n, s, o;
            mov.b32 m, 0x43004300;
            mov.b32 n, 0xBF80BF80;
            prmt.b32 s, $5, 0, 0x1010;
            prmt.b32 o, $5, 0, 0x3232;
            prmt.b32 a, $4, 0, 0x4140;
            lop3.b32 b, a, 0x000f000f, m, 0xEA;
            fma.rn.bf16x2 b, m, n, b;
            fma.rn.bf16x2 $0, b, s, o;
            shr.u32 a, a, 4;
            lop3.b32 b, a, 0x000f000f, m, 0xEA;
            fma.rn.bf16x2 b, m, n, b;
            fma.rn.bf16x2 $2, b, s, o;
            prmt.b32 a, $4, 0, 0x4342;
            lop3.b32 b, a, 0x000f000f, m, 0xEA;
            fma.rn.bf16x2 b, m, n, b;
            fma.rn.bf16x2 $1, b, s, o;
            shr.u32 a, a, 4;
            lop3.b32 b, a, 0x000f000f, m, 0xEA;
            fma.rn.bf16x2 b, m, n, b;
            fma.rn.bf16x2 $3, b, s, o;
            }""",
            "=&r,=&r,=&r,=r,r,r,r,r,r", [x, pair], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True,
            pack=4,
        )  # fmt: skip
    return tl.join(low, high)
