"""What every format of weights yields: lazily read tensors by name, and what they belong to.

Knows no format. A tensor comes as parts, which are views of a mapped file or blocks made on the
spot, and whoever wants it whole copies them to where they are to stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.families import family_of
from llama.names import shapes
from llama.quantization.packed import Format
from llama.text.choose import open_tokenizer
from llama.tokenizer import Version
from llama.tokenizer.protocols import TextTokenizer

_BLOCK = 2**26  # bytes of a block of rows


class Part(NamedTuple):
    """A piece of a range of a tensor that was asked for."""

    dim: int  # the dimension along which pieces follow each other
    offset: int  # where it begins in that dimension of the range
    tensor: Tensor


class LazyTensor(ABC):
    """A tensor that lies somewhere else: `shape` and `dtype` are known, values come when read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        """Yield the range start..stop of dimension `dim` (None: to its end), a piece at a time."""

    def mapped(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor | None:
        """The same range where it is the whole of a tensor stored in a mapped file; None
        elsewhere."""
        return None

    def range_shape(self, dim: int, start: int, stop: int | None) -> tuple[int, ...]:
        end = self.shape[dim] if stop is None else stop
        assert 0 <= start <= end <= self.shape[dim], (self.shape, dim, start, stop)
        return (*self.shape[:dim], end - start, *self.shape[dim + 1 :])

    def read(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """The same range as one tensor: a view where it lies in one piece, a copy otherwise."""
        shape = self.range_shape(dim, start, stop)
        parts = self.parts(dim, start, stop)
        first = next(parts, None)
        if first is not None and first.tensor.shape == shape:
            return first.tensor
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        while first is not None:
            out.narrow(first.dim, first.offset, first.tensor.shape[first.dim]).copy_(first.tensor)
            first = next(parts, None)
        return out


def rows_of(
    source: LazyTensor, dim: int = 0, start: int = 0, stop: int | None = None
) -> Iterator[Tensor]:
    """Yield the range start..stop of dimension `dim`, from first row to last, in small blocks."""
    shape = source.range_shape(dim, start, stop)
    first = start if dim == 0 else 0
    step = max(1, _BLOCK // (prod(source.shape[1:]) * source.dtype.itemsize or 1))
    for low in range(first, first + shape[0], step):
        block = source.read(0, low, min(low + step, first + shape[0]))
        yield block if dim == 0 else block.narrow(dim, start, shape[dim])


def cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `block` in `dtype`, on the CPU; ValueError where a number is too large."""
    wanted = block.to("cpu", dtype).contiguous()
    narrows = dtype == torch.float16 and block.dtype != dtype
    if narrows and not torch.equal(wanted.isfinite(), block.to("cpu").isfinite()):
        raise ValueError(f"{name} has numbers above 65504, which float16 cannot say: use another")
    return wanted.view(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one model, not yet read."""

    args: ModelArgs
    # every name of `names.shapes`, except output.weight where args.tied
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    dtype: torch.dtype  # of the weights
    path: Path | None = None  # what was opened; None for random weights
    shards: int = 1  # how many files
    # why a tensor of the files is not among `tensors`, by its name
    skipped: Mapping[str, str] = field(default_factory=dict)
    tokenizer_path: Path | None = None
    # what the files say beside the tokenizer's: further ends of an answer, and a template in jinja
    stop_token_ids: tuple[int, ...] = ()
    chat_template: str | None = field(default=None, repr=False)
    stored: str = ""  # which types the weights have in a format that has types of its own
    tokenizer: Callable[[], TextTokenizer] | None = None  # makes the one that a format brings along
    # of matrices that are stored packed, and are to be run so
    formats: Mapping[str, Format] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> int:
        """How many numbers the model has, a tied matrix counted once."""
        return sum(prod(s) for name, s in shapes(self.args).items() if name in self.tensors)

    @property
    def version(self) -> Version:
        """The version that says how special tokens of a ranks file are called: the file does
        not."""
        return "3.1" if self.args.rope_scaling else "3"

    def open_tokenizer(self, path: str | Path | None = None) -> TextTokenizer | None:
        """The tokenizer at `path`, of any kind, or the one that came with the weights, if any."""
        if path is None and self.tokenizer is not None:
            return self.tokenizer()
        found = path or self.tokenizer_path
        return None if found is None else open_tokenizer(str(found), version=self.version)

    @property
    def family(self) -> str:
        """The released model that has this shape, a guess for people to read."""
        return family_of(self.args)
