"""Packed weights as plain numbers, for products of so many rows that this pays.

This is what Packed.unpack computes, to the last bit. The surprising thing: there is one scratch for
all matrices of a model, so what `Dequantizer` returns holds until it is asked for the next.

Letters: N rows, K columns, G of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import allow, launch, overlap, wait
from llama.cuda.weights import INT4 as _INT4
from llama.cuda.weights import Weight, scale_and_offset, source

_BLOCK = 2048  # numbers, or bytes of int4, of a program


@triton.jit
def _unpack(
    w, scale, out, numel, K: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Dequantize BLOCK elements of w, wherever rows end."""
    allow(OVERLAP)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < numel
    q = tl.load(w + i, mask=real, other=0.0)
    wait(OVERLAP)  # the product before may still read `out`
    if INT4:
        HALF: tl.constexpr = GROUP // 2
        s, o = scale_and_offset(tl.load(scale + i // HALF, mask=real, other=0))
        low, high = (q & 15).to(tl.float32) * s + o, (q >> 4).to(tl.float32) * s + o
        at = out + i // HALF * GROUP + i % HALF
        tl.store(at, low.to(out.dtype.element_ty), mask=real)
        tl.store(at + HALF, high.to(out.dtype.element_ty), mask=real)
    else:
        y = q.to(tl.float32) * tl.load(scale + i // K, mask=real, other=0.0)
        tl.store(out + i, y.to(out.dtype.element_ty), mask=real)


def unpack(weight: Weight, out: Tensor) -> Tensor:
    """Write the numbers (N, K) of a packed weight to `out`, which is returned."""
    read = source(weight)
    assert read.weight.is_contiguous(), read.weight.stride()
    assert out.shape == weight.shape, (out.shape, weight.shape)
    numel = read.weight.numel()
    launch(_unpack, (triton.cdiv(numel, _BLOCK),))(
        read.weight, read.scale, out, numel, K=weight.shape[1], GROUP=read.group,
        INT4=read.kind == _INT4, BLOCK=_BLOCK, num_warps=4, **overlap(out.device),
    )  # fmt: skip
    return out


class Dequantizer:
    """Dequantizes weights, a matrix at a time, into scratch of the largest one's size."""

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.scratch = torch.empty(numbers, dtype=dtype, device=device)

    def __call__(self, weight: Weight) -> Tensor:
        """Return its numbers (N, K), which hold until the next call; a plain weight is returned
        unchanged."""
        if isinstance(weight, Tensor):
            return weight
        rows, columns = weight.shape
        return unpack(weight, self.scratch[: rows * columns].view(rows, columns))
