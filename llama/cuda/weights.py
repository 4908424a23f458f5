"""How kernels read a weight: as plain numbers, or packed in one of the ways of packed.py.

This file knows no product. The surprising thing: scale and offset of int4, two bfloat16 side by
side, are read as one int32.

Letters: N outputs, K inputs, G of a group, D numbers of a table's row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.quantization.packed import Packed

Weight = Tensor | Packed
PLAIN, INT8, FP8, INT4 = (tl.constexpr(i) for i in range(4))
_KINDS = {"int8": INT8, "fp8": FP8, "int4": INT4}


class Source(NamedTuple):
    """A weight as kernels get it."""

    weight: Tensor
    scale: Tensor  # of each row, or the pairs of groups as words
    kind: tl.constexpr  # PLAIN, INT8, FP8 or INT4
    group: int  # inputs of a group of int4


def kind_of(weight: Weight) -> str:
    """The name of its kind in the tables of tuning.py: "" for plain numbers."""
    return weight.format.kind if isinstance(weight, Packed) else ""


def source(weight: Weight) -> Source:
    if isinstance(weight, Tensor):
        return Source(weight, weight, PLAIN, 0)
    scale, format = weight.scale, weight.format
    if weight.offset is not None:
        scale = pairs_of(weight).view(torch.int32)
        assert scale.data_ptr() == weight.scale.data_ptr(), "scale and offset lie apart"
    return Source(weight.weight, scale, _KINDS[format.kind], format.group)


def pairs_of(weight: Packed) -> Tensor:
    """Return scale and offset of each group of int4 side by side: (N, K/G, 2), a view if they lie
    so."""
    scale, offset = weight.scale.detach(), weight.offset
    assert offset is not None, weight.format
    rows, groups = scale.shape
    beside = offset.data_ptr() == scale.data_ptr() + scale.itemsize
    if beside and scale.stride() == offset.stride() == (2 * groups, 2):
        return scale.as_strided((rows, groups, 2), (2 * groups, 2, 1))
    return torch.stack((scale, offset), -1)


@triton.jit
def scale_and_offset(pair):
    """Return the scale and the offset of a pair, in float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def table_row(
    table, scale, row, d, D: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Load numbers d of a table's row: plain ones in its dtype, packed ones in float32."""
    if KIND == PLAIN:
        return tl.load(table + row * D + d, mask=d < D)
    elif KIND == INT4:
        HALF: tl.constexpr = GROUP // 2
        bytes = tl.load(table + (row * D // 2 + d // GROUP * HALF + d % HALF), mask=d < D, other=0)
        q = (bytes >> (d % GROUP // HALF * 4).to(tl.uint8)) & 15
        group = row * (D // GROUP) + d // GROUP
        s, o = scale_and_offset(tl.load(scale + group, mask=d < D, other=0))
        return q.to(tl.float32) * s + o
    else:
        return tl.load(table + row * D + d, mask=d < D, other=0.0).to(tl.float32) * tl.load(
            scale + row
        )
