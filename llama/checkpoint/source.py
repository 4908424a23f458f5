"""What every format of weights yields: lazily read tensors by name, and what they belong to.

Knows no file. The surprising thing: a tensor is never handed over whole unless asked;
it comes as parts that are views of a mapped file or blocks made on the spot, and whoever wants it
copies them to where they are to stay.
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
from llama.text.llama2 import open_tokenizer
from llama.tokenizer import TextTokenizer, Version

_BLOCK = 2**26  # bytes of a block of rows


class Part(NamedTuple):
    """A piece of a wanted range: it belongs at `offset` of dimension `dim` there."""

    dim: int
    offset: int
    tensor: Tensor


class LazyTensor(ABC):
    """A tensor that lies somewhere else: `shape` and `dtype` are known, values come when read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        """The range start..stop of dimension `dim` (None: to its end), a piece at a time."""

    def mapped(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor | None:
        """That range where it is a stored tensor of a mapped file, all of it; None elsewhere."""
        return None

    def range_shape(self, dim: int, start: int, stop: int | None) -> tuple[int, ...]:
        end = self.shape[dim] if stop is None else stop
        assert 0 <= start <= end <= self.shape[dim], (self.shape, dim, start, stop)
        return (*self.shape[:dim], end - start, *self.shape[dim + 1 :])

    def read(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """That range as one tensor: a view where it lies in one piece, a copy otherwise."""
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
    """The range start..stop of dimension `dim`, from its first row to its last, in small blocks."""
    shape = source.range_shape(dim, start, stop)
    first = start if dim == 0 else 0
    step = max(1, _BLOCK // (prod(source.shape[1:]) * source.dtype.itemsize or 1))
    for low in range(first, first + shape[0], step):
        block = source.read(0, low, min(low + step, first + shape[0]))
        yield block if dim == 0 else block.narrow(dim, start, shape[dim])


def cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of `block` in `dtype`, on the CPU; ValueError where a number is too large for it."""
    wanted = block.to("cpu", dtype).contiguous()
    narrows = dtype == torch.float16 and block.dtype != dtype
    if narrows and not torch.equal(wanted.isfinite(), block.to("cpu").isfinite()):
        raise ValueError(f"{name} has numbers above 65504, which float16 cannot say: use another")
    return wanted.view(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one model, not yet read.

    `tensors` holds every name of `names.shapes`, except output.weight where args.tied. `skipped`
    says of each tensor in the files that is not among them why. `path` is the folder that was
    opened, None for random weights; `shards` the number of files; `dtype` that of the weights.
    `stop_token_ids` and `chat_template` (in jinja) are what the files say beside the tokenizer's.
    Where a format has types of its own, `stored` says which these are; where it brings a tokenizer
    along, `tokenizer` makes it. `formats` are those of matrices that are stored packed, and are to
    be run so.
    """

    args: ModelArgs
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    dtype: torch.dtype
    path: Path | None = None
    shards: int = 1
    skipped: Mapping[str, str] = field(default_factory=dict)
    tokenizer_path: Path | None = None
    stop_token_ids: tuple[int, ...] = ()
    chat_template: str | None = field(default=None, repr=False)
    stored: str = ""
    tokenizer: Callable[[], TextTokenizer] | None = None
    formats: Mapping[str, Format] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> int:
        """How many numbers the model has, a tied matrix counted once."""
        return sum(prod(s) for name, s in shapes(self.args).items() if name in self.tensors)

    @property
    def version(self) -> Version:
        """Which names the special tokens of a file of ranks have, for the file does not say."""
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
