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


def one_row_blocks(outputs: int, inputs: int, kind: str = "") -> OneRow:
    """`kind` is that of a packed weight, "" of a plain one. Where a row of a packed tile has 16
    bytes for each thread, inputs need not be exchanged."""
    if kind:
        return _one_packed_row(outputs, inputs, kind)
    if inputs > 8192:
        return OneRow(2, 1024, 4, late=False)
    if inputs >= 2048 and outputs >= 16384:
        return OneRow(2, 2048, 4, ahead=2 if outputs > 65536 else 1)
    return OneRow(8 if outputs > 4096 else 4, min(512, power_of_two(inputs)), 4)


def _one_packed_row(outputs: int, inputs: int, kind: str) -> OneRow:
    block = 4096 if kind == "int4" else 2048
    if inputs % block:
        return OneRow(4, min(block // 2, max(128, power_of_two(inputs))), 2)
    if kind == "int4":
        return OneRow(4, 4096, 4, late=outputs > 4096 and outputs < 16384)
    if outputs > 65536 or (outputs > 16384 and kind == "int8"):
        return OneRow(8, 1024, 2)
    return OneRow(4, 2048, 4) if kind == "int8" and outputs <= 4096 else OneRow(4, 1024, 2)


def some_rows_blocks(rows: int, outputs: int, inputs: int, kind: str = "") -> SomeRows:
    """As `one_row_blocks`."""
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
