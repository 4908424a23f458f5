"""Which blocks a kernel gets, from a table that was measured: nothing is tried out at start.

Knows numbers only. `benchmarks/NOTES.md` says how they were measured.
"""

from typing import NamedTuple


MOST_ROWS = 32  # of our products; from there on torch's are as fast


class OneRow(NamedTuple):
    """Outputs and inputs of a tile, warps, tiles that are loaded ahead, whether the next kernel may
    begin only near the end."""

    block_n: int
    block_k: int
    warps: int
    ahead: int = 1
    late: bool = True


class SomeRows(NamedTuple):
    """Rows as the tensor cores see them, the tile, programs that share a sum, stages, warps, bytes
    a row that are on their way before the input is there."""

    padded: int
    block_n: int
    block_k: int
    split: int
    stages: int
    warps: int
    fetch: int = 0


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def one_row_blocks(outputs: int, inputs: int) -> OneRow:
    return OneRow(2, min(1024, power_of_two(inputs)), 4)


def some_rows_blocks(rows: int, outputs: int, inputs: int) -> SomeRows:
    padded = max(16, power_of_two(rows))
    split = 1
    while split < 4 and outputs // 64 * split < 200 and inputs // split >= 2048:
        split *= 2
    return SomeRows(padded, 64, min(128, power_of_two(inputs)), split, 4, 4)


class DecodeAttention(NamedTuple):
    """Programs a key head that share the keys, keys of a block, stages, warps, keys that are on
    their way before the queries are there."""

    programs: int
    block: int
    stages: int
    warps: int
    ahead: int = 128


def decode_attention_blocks(rows: int, kv_heads: int) -> DecodeAttention:
    return DecodeAttention(max(8, (512 if rows < 64 else 2048) // kv_heads), 64, 3, 4)
