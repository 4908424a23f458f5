"""Rows of a matrix of any format, packed as they are read: for files and for loading alike.

Knows no layer of a model and no rank. What is stored packed in the wanted format is taken as it is.
"""

from collections.abc import Iterator

import torch

from llama.checkpoint.quantized.read import PackedTensor
from llama.checkpoint.source import LazyTensor, rows_of
from llama.quantization.packed import Format, Packed
from llama.quantization.rounding import quantize

_BLOCK = 2**26  # numbers of stored ones that are copied at a time


def pack_rows(
    source: LazyTensor, format: Format, start: int, stop: int, *, device: torch.device, name: str
) -> Iterator[Packed]:
    """Pack rows start..stop of a matrix on `device`, some at a time.

    What is stored in this format already is taken as it is. Raises ValueError, naming the matrix,
    where its numbers cannot be packed.
    """
    if isinstance(source, PackedTensor) and source.packed.format == format:
        step = max(1, _BLOCK // source.shape[1])
        for low in range(start, stop, step):
            yield source.packed.rows(low, min(low + step, stop)).each(lambda t: t.to(device))
        return
    for block in rows_of(source, 0, start, stop):
        try:
            yield quantize(block.to(device), format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
