"""Layers with packed weights: the same products as parallel.py's, from fewer bytes.

Knows linear layers and tables, not the Transformer, and no kernel of its own: this is the plain
path, right on every device, that kernels must agree with. A product unpacks some rows of its matrix
at a time, so that nothing as large as the unpacked matrix ever exists.

Letters: M rows of states, N outputs, K inputs, V rows of a table, D its columns.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.parallel import (
    ColumnParallelOutput,
    OutputLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    float32_product,
    gathered,
    summed,
)
from llama.quantization.packed import Packed

_BLOCK = {"cpu": 2**20}  # numbers unpacked at a time: a product reads them out of a core's cache
_LARGE_BLOCK = 2**24
_FEW = 16  # rows of states up to which torch's int8 product is faster on a CPU: 17 times for one


class _Holder(nn.Module):
    """A packed matrix as parameters `weight`, `scale` and, for int4, `offset`."""

    weight: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        for name, tensor in packed._asdict().items():
            held = tensor  # a parameter already where another layer has the same matrix
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                held = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)

    @property
    def packed(self) -> Packed:
        return Packed(self.weight, self.scale, self.offset)

    def dequantized(self) -> Tensor:
        """The numbers that this layer computes with, in its dtype."""
        return self.packed.unpack(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.packed.format}, {self.packed.shape}, {self.dtype}"


class QuantizedLinear(_Holder):
    """x (..., K) -> (..., N): F.linear with the unpacked weight, and then `finish`, if any."""

    def __init__(
        self, packed: Packed, dtype: torch.dtype, finish: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(packed, dtype)
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        return out if self.finish is None else self.finish(out)

    def product(self, x: Tensor) -> Tensor:
        """The product of x and this rank's part of the matrix."""
        if _torchs_own(self.packed, x):
            return int8_product(x, self.packed)
        return self._by_blocks(x, F.linear)

    def _by_blocks(self, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        packed = self.packed
        rows, columns = packed.shape
        step = max(1, _BLOCK.get(x.device.type, _LARGE_BLOCK) // columns)
        if step >= rows:
            return multiply(x, packed.unpack(x.dtype))
        parts = [
            multiply(x, packed.rows(low, low + step).unpack(x.dtype))
            for low in range(0, rows, step)
        ]
        return torch.cat(parts, -1)


class QuantizedOutput(QuantizedLinear):
    """The layer that makes logits, which are float32 from the product on."""

    def product(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.weight.dtype == torch.int8:
            return float32_product(x, self.weight) * self.scale  # torch's own rounds to x.dtype
        return self._by_blocks(x, float32_product)


def _torchs_own(packed: Packed, x: Tensor) -> bool:
    """Whether torch's own int8 product takes x, and is faster."""
    few = 0 < x.numel() <= _FEW * x.shape[-1] and not x.requires_grad
    plain = x.device.type == "cpu" and x.dtype == torch.bfloat16 and packed.weight.is_contiguous()
    return plain and few and packed.weight.dtype == torch.int8


def int8_product(x: Tensor, packed: Packed) -> Tensor:
    """x (..., K) in bfloat16 -> (..., N) by torch's packed product on a CPU, which sums in float32.

    It would round the scales to bfloat16, so they are kept out of it: sums are rounded twice, and
    weights never. Differs from the plain path by that, at most two last bits of a sum.
    """
    ones = torch.ones(len(packed.scale), dtype=x.dtype)
    sums = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), packed.weight, ones)
    out = (sums.float() * packed.scale).to(x.dtype)
    return out.view(*x.shape[:-1], -1)


class QuantizedEmbedding(_Holder):
    """ids -> (..., D): rows are gathered, then unpacked. `start` is the first id of this rank."""

    def __init__(
        self, packed: Packed, dtype: torch.dtype, start: int = 0, *, shared: bool = False
    ) -> None:
        super().__init__(packed, dtype)
        self.start, self.shared = start, shared

    def forward(self, ids: Tensor) -> Tensor:
        if not self.shared:
            return self._rows(ids)
        local = ids - self.start
        ours = (local >= 0) & (local < len(self.weight))
        return summed(self._rows(local.where(ours, 0)) * ours[..., None])

    def _rows(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        some = self.packed.each(lambda tensor: _gather(tensor, flat))
        return some.unpack(self.dtype).view(*ids.shape, -1)


def _gather(tensor: Tensor, ids: Tensor) -> Tensor:
    """Gather rows of a tensor, also of float8, of which torch gathers none on some devices."""
    if tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8)[ids].view(tensor.dtype)
    return tensor[ids]


def quantized(layer: nn.Module, packed: Packed, dtype: torch.dtype) -> nn.Module:
    """The layer that does with `packed` what one of parallel.py's does with its weight."""
    if isinstance(layer, VocabParallelEmbedding):
        return QuantizedEmbedding(packed, dtype, layer.vocab_start_index, shared=True)
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(packed, dtype)
    if isinstance(layer, OutputLinear):
        return QuantizedOutput(packed, dtype)
    if isinstance(layer, ColumnParallelOutput):
        return QuantizedOutput(packed, dtype, gathered)
    return QuantizedLinear(packed, dtype, summed if isinstance(layer, RowParallelLinear) else None)
