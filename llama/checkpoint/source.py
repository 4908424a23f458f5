"""What every format of weights yields: lazily read tensors by name, and what they belong to.

Knows no file. The surprising thing: a tensor is never handed over whole unless asked;
it comes as parts that are views of a mapped file or blocks made on the spot, and whoever wants it
copies them to where they are to stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.checkpoint.names import local_shape, local_slice, shapes
from llama.checkpoint.packed import Format
from llama.checkpoint.params import SENTENCEPIECE
from llama.llama2 import open_tokenizer
from llama.model import ModelArgs
from llama.parallel import Ranks
from llama.tokenizer import TextTokenizer, Version

_BLOCK = 2**26  # bytes of a block of rows
_LEFT = 2**24  # bytes of freed blocks that are not worth giving back


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


# (dim, n_layers, whether each query head has its own keys) of those with SentencePiece's
_OLD_SIZES = {
    (4096, 32, True): "7B",
    (5120, 40, True): "13B",
    (6656, 60, True): "33B",
    (8192, 48, False): "34B",
    (8192, 80, True): "65B",
    (8192, 80, False): "70B",
}
_OLD_FAMILIES = {2048: "Llama 1", 4096: "Llama 2", 16384: "Code Llama"}  # by context

# (dim, n_layers) of the released models with Llama 3's vocabulary, without and with scaled rotary
_FAMILIES = {
    (4096, 32): ("Llama 3 8B", "Llama 3.1 8B"),
    (8192, 80): ("Llama 3 70B", "Llama 3.1 or 3.3 70B"),
    (16384, 126): (None, "Llama 3.1 405B"),
    (2048, 16): (None, "Llama 3.2 1B"),
    (3072, 28): (None, "Llama 3.2 3B"),
}


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
        args = self.args
        plain, scaled = _FAMILIES.get((args.dim, args.n_layers), (None, None))
        name = scaled if args.rope_scaling else plain
        if args.vocab_size in SENTENCEPIECE:
            size = _OLD_SIZES.get((args.dim, args.n_layers, args.n_kv_heads == args.n_heads))
            family = _OLD_FAMILIES.get(args.context_length)
            name = f"{family} {size}" if family and size else None
        elif args.vocab_size != 128256:
            name = None
        return name or "a Llama of its own shape"


def mapped_parts(
    checkpoint: Checkpoint,
    names: Sequence[str],
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor] | None:
    """This rank's parts as they lie in mapped files, or None where one of them has to be copied."""
    views = []
    for name in names:
        source = checkpoint.tensors[name]
        cut = local_slice(name, checkpoint.args, ranks.rank, ranks.size)
        view = source.mapped(*(cut or ())) if device.type == "cpu" else None
        shape = local_shape(name, checkpoint.args, ranks.size)
        if view is None or view.dtype != dtype or view.shape != shape:
            return None
        views.append(view)
    return views


def make_room(device: torch.device) -> None:
    """Before memory for weights is taken: on CUDA, give back what earlier temporaries left.

    torch keeps freed blocks. It would cut the weight out of a larger one, whose rest then stays
    taken as long as the weight does: up to half a GB for an 8B.
    """
    if device.type == "cuda":
        left = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if left > _LEFT:
            torch.cuda.empty_cache()
