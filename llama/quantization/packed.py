"""Packed matrices: what the bytes of int8, fp8 and int4 weights say, and how they are cut.

Knows the layouts, which kernels and files share; refuses to know how numbers were rounded. The
surprising thing: groups of int4 that a cut would go through become smaller ones, with the same
scale and offset, so a cut never changes a value.

Letters: N rows (outputs), K columns (inputs), G consecutive inputs of a group.

| kind | weight | scale | offset | a number is |
|---|---|---|---|---|
| int8 | int8 (N, K) | float32 (N,) | | q * scale |
| fp8 | float8_e4m3fn (N, K) | float32 (N,) | | q * scale |
| int4 | uint8 (N, K/2) | bfloat16 (N, K/G) | bfloat16 (N, K/G) | q * scale + offset, q 0..15 |

Byte j of a group of int4 holds input j in its low half and input j + G/2 in its high half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.names import local_shape

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Format:
    """How one matrix is packed."""

    kind: str  # one of KINDS
    group: int = 0  # consecutive inputs that share scale and offset, of int4

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self
        assert (self.group in GROUPS) == (self.kind == "int4"), self

    def __str__(self) -> str:
        return f"{self.kind}-{self.group}" if self.group else self.kind

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a packed matrix, by its name in `Packed`."""
        weight = KINDS[self.kind]
        if not self.group:
            return {"weight": ((rows, columns), weight), "scale": ((rows,), torch.float32)}
        assert columns % self.group == 0, (columns, self)
        grid = ((rows, columns // self.group), torch.bfloat16)
        return {"weight": ((rows, columns // 2), weight), "scale": grid, "offset": grid}

    def nbytes(self, rows: int, columns: int) -> int:
        layout = self.layout(rows, columns).values()
        return sum(prod(shape) * dtype.itemsize for shape, dtype in layout)

    def fitted(self, columns: int) -> "Format | None":
        """This format with the largest group, up to its own, that divides `columns`, or None."""
        if not self.group:
            return self
        return next((Format(self.kind, g) for g in GROUPS
                     if g <= self.group and columns % g == 0), None)  # fmt: skip


class Packed(NamedTuple):
    """A packed matrix (N, K); see the table above."""

    weight: Tensor
    scale: Tensor
    offset: Tensor | None = None  # of int4

    @staticmethod
    def zeros(format: Format, rows: int, columns: int, device: torch.device) -> "Packed":
        """A matrix of zeros, which also pads a vocabulary."""
        made = [
            torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device=device)
            for shape, dtype in format.layout(rows, columns).values()
        ]
        made[0] = made[0].view(KINDS[format.kind])
        return Packed(*made)

    @property
    def format(self) -> Format:
        if self.offset is None:
            return Format("int8" if self.weight.dtype == torch.int8 else "fp8")
        return Format("int4", 2 * self.weight.shape[1] // self.scale.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (N, K) of the numbers that it stands for."""
        rows, columns = self.weight.shape
        return rows, columns * (1 if self.offset is None else 2)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """Apply `change` to weight, scale and offset, all of which have rows as their first
        dimension."""
        return Packed(*(change(tensor) for tensor in self if tensor is not None))

    def rows(self, start: int, stop: int) -> "Packed":
        return self.each(lambda tensor: tensor[start:stop])

    def split(self, rows: Sequence[int]) -> list["Packed"]:
        """Cut the rows into matrices of so many rows each, as views."""
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        return [self.rows(end - n, end) for n, end in zip(rows, ends, strict=True)]

    def columns(self, start: int, stop: int) -> "Packed":
        """Cut out inputs start..stop, as views, or with smaller groups where a cut goes through
        one."""
        group = self.format.group
        if not group:
            return Packed(self.weight[:, start:stop], self.scale)
        if start % group or stop % group:
            return self.regrouped(group // 2).columns(start, stop)
        assert self.offset is not None
        low, high = start // group, stop // group
        return Packed(
            self.weight[:, start // 2 : stop // 2],
            self.scale[:, low:high],
            self.offset[:, low:high],
        )

    def regrouped(self, group: int) -> "Packed":
        """The same numbers of an int4 matrix, in smaller groups."""
        assert self.offset is not None
        times = self.format.group // group
        return Packed(
            join_nibbles(self.codes().view(len(self.weight), -1, group)),
            self.scale.repeat_interleave(times, 1),
            self.offset.repeat_interleave(times, 1),
        )

    def codes(self) -> Tensor:
        """The codes q of an int4 matrix, uint8 (N, K/G, G)."""
        bytes_ = self.weight.view(len(self.weight), -1, self.format.group // 2)  # (N, K/G, G/2)
        return torch.cat((bytes_ & 15, bytes_ >> 4), -1)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The numbers (N, K): computed in float32, then rounded to `dtype`."""
        if self.offset is None:
            return (_floats(self.weight) * self.scale[:, None]).to(dtype)
        numbers = self.codes().to(torch.float32)
        numbers.mul_(self.scale[..., None]).add_(self.offset[..., None])
        return numbers.flatten(1).to(dtype)


def join_nibbles(codes: Tensor) -> Tensor:
    """Pack the codes q, uint8 (N, K/G, G), into the bytes (N, K/2) of an int4 matrix."""
    low, high = codes.chunk(2, -1)
    return (low | high << 4).flatten(1)


def _floats(weight: Tensor) -> Tensor:
    """Convert int8 or float8 to float32. torch converts float8 a number at a time on a CPU.

    Its bits, moved into a float16, are its value / 256: both have their sign first, and the biases
    of their exponents, 7 and 15, differ by 8.
    """
    if weight.dtype == torch.int8 or weight.device.type != "cpu":
        return weight.to(torch.float32)
    bits = weight.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).to(torch.float32).mul_(256)


def local_format(name: str, format: Format, args: ModelArgs, size: int) -> Format | None:
    """The format of a rank's part of a matrix: smaller groups where a cut goes through them.

    None where a group would have less than 16 inputs.
    """
    return format.fitted(local_shape(name, args, size)[1])
