"""Which blocks a kernel gets, from a table that was measured: nothing is tried out at start.

Knows numbers only. `benchmarks/NOTES.md` says how they were measured.
"""

from typing import NamedTuple

# Rows up to which our products are used, by kind: from there on torch's are as fast. Unpacking a
# weight for torch costs more than it saves at every number that was measured, up to 128.
MOST_ROWS = {"": 32, "int8": 128, "fp8": 128, "int4": 128}


class OneRow(NamedTuple):
    """Outputs and inputs of a tile, warps, tiles that are loaded ahead, whether the next kernel may
    begin only near the end."""

    block_n: int
    block_k: int
    warps: int
    ahead: int = 1
    late: bool = True


class SomeRows(NamedTuple):
    """Rows as the tensor cores see them, the tile, programs that share a sum, stages, warps,
    whether the next kernel may begin only near the end."""

    padded: int
    block_n: int
    block_k: int
    split: int
    stages: int
    warps: int
    late: bool = True


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class ByWords(NamedTuple):
    """As SomeRows, of packed weights that go straight to registers (words.py); whether warps have
    outputs of their own, or a part of the inputs each."""

    padded: int
    block_n: int
    block_k: int
    split: int
    warps: int
    apart: bool = False
    late: bool = True


Blocks = OneRow | SomeRows | ByWords


def norms_inputs(rows: int, kind: str = "") -> bool:
    """Whether a product norms its inputs itself, rather than a kernel before it: that pays where it
    adds little to the code of a program."""
    return rows == 1 and kind in ("", "int8")


def product_blocks(rows: int, outputs: int, inputs: int, kind: str = "") -> Blocks:
    """`kind` is that of a packed weight, "" of a plain one."""
    if kind:
        return _packed_blocks(rows, outputs, inputs, kind)
    if rows == 1:
        return _one_row_blocks(outputs, inputs)
    return _some_rows_blocks(rows, outputs, inputs)


def _one_row_blocks(outputs: int, inputs: int) -> OneRow:
    if inputs > 8192:
        return OneRow(2, 1024, 4, late=False)
    if inputs >= 2048 and outputs >= 16384:
        return OneRow(2, 2048, 4, ahead=2 if outputs > 65536 else 1)
    return OneRow(8 if outputs > 4096 else 4, min(512, power_of_two(inputs)), 4)


def _packed_blocks(rows: int, outputs: int, inputs: int, kind: str) -> Blocks:
    if rows > 32 or (inputs % 4 and rows > 1):  # the latter are not in words
        return _tiled_blocks(rows, outputs, inputs)
    if rows == 1:
        return _one_packed_row(outputs, inputs, kind)
    return _few_packed_rows(rows, outputs, inputs, kind)


def _one_packed_row(outputs: int, inputs: int, kind: str) -> Blocks:
    short = min(1024, max(128, power_of_two(inputs)))
    some, many = outputs > 4096, outputs > 16384
    if kind == "int4" and many:
        return ByWords(8, 16, 512, 1, 2)
    if kind == "int4":
        return ByWords(8, 16, 1024, 1 if some or inputs < 4096 else 2, 4)
    if kind == "fp8" and many and inputs % 4 == 0:
        return ByWords(8, 16, 256, 1, 2)
    if kind == "fp8":
        return OneRow(8 if some else 4, short, 4 if outputs == inputs else 2)
    if inputs % 2048:
        return OneRow(4, short, 2)
    return OneRow(8, 1024, 2) if many else OneRow(4, 1024, 2) if some else OneRow(4, 2048, 4)


def _few_packed_rows(rows: int, outputs: int, inputs: int, kind: str) -> ByWords:
    padded, int4 = max(8, power_of_two(rows)), kind == "int4"
    some, many = outputs > 4096, outputs > 16384
    if rows <= 8:
        if many:
            return ByWords(8, 32 if int4 else 16, 256, 1, 2)
        if some:
            return ByWords(8, 32, 512, 2, 4)
        if inputs > 8192:
            return ByWords(8, 16, 512, 2, 4) if kind == "int8" else ByWords(8, 32, 512, 4, 4)
        return ByWords(8, 32, 1024, 1, 4) if int4 else ByWords(8, 16, 512, 1, 8)
    if many and int4:
        return ByWords(padded, 64, 512, 1, 4)
    if many:
        block_n = 64 if kind == "int8" and outputs <= 65536 else 128
        return ByWords(padded, block_n, 128, 1, 4, apart=True)
    split = 1 if inputs < 4096 else 4 if some else 8
    return ByWords(padded, *((128, 256) if int4 else (64, 128)), split, 4, apart=True)


def _tiled_blocks(rows: int, outputs: int, inputs: int) -> SomeRows:
    """Of packed weights, for more rows than `ByWords` is good for."""
    padded, block_k = max(16, power_of_two(rows)), min(128, power_of_two(inputs))
    if 16384 < outputs <= 65536:
        return SomeRows(padded, 128, block_k, 1, 3, 8)
    split = 4 if outputs < 12800 and inputs >= 2048 else 1
    return SomeRows(padded, 64, block_k, split, 3, 4)


def _some_rows_blocks(rows: int, outputs: int, inputs: int) -> SomeRows:
    padded = max(16, power_of_two(rows))
    tiles = -(-outputs // 64)
    split = 1 if tiles >= 200 or inputs < 2048 else 2 if tiles >= 64 else 4
    stages = 4 if tiles >= 200 else 6 if tiles <= 64 else 3
    return SomeRows(
        padded, 64, min(128, power_of_two(inputs)), split, min(stages, 384 // padded), 4
    )


class DecodeAttention(NamedTuple):
    """Programs a key head that share the keys, keys of a block, stages, warps, keys that are on
    their way before the queries are there."""

    programs: int
    block: int
    stages: int
    warps: int
    ahead: int = 128


LONG = 1024  # keys from which on a row counts as long


def decode_attention_blocks(rows: int, kv_heads: int, long: bool) -> DecodeAttention:
    eighth = max(1, 8 // kv_heads) if kv_heads < 8 else 1
    if rows <= 2 and not long:
        return DecodeAttention(16 * eighth, 64, 2, 4)
    if rows <= 16:
        return DecodeAttention(16 * eighth, 128, 3, 4)
    return DecodeAttention(32 * eighth, 64, 4 if rows <= 64 else 2, 4)
