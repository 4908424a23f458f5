"""Weights from where they lie to where they stay: this rank's part of each, plain or packed.

Knows how tensors are grouped and cut, and nothing of how a model runs. The surprising thing: on a
CPU, tensors that lie in the files just as they are wanted are not copied at all; the parameters are
the mapped file. And every rank packs whole rows and then keeps its part: scales are those of the
full matrix, so the values are the same on any number of ranks.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama.checkpoint import Checkpoint, LazyTensor
from llama.checkpoint.quantized.packing import pack_rows
from llama.checkpoint.quantized.read import PackedTensor
from llama.loading.staging import Stager
from llama.model import Transformer
from llama.names import local_shape, local_slice
from llama.parallel import Ranks
from llama.quantization.linear import quantized
from llama.quantization.packed import Format, Packed, local_format

_BLOCK = 2**26  # bytes that are copied at a time: what a cast on the way may hold in memory
_LEFT = 2**24  # bytes of freed blocks that are not worth giving back


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the weights of one rank go: its part of each, on `device` in `dtype`, or packed where
    `formats` says how. `copier` copies what is copied, and is told of all bytes."""

    checkpoint: Checkpoint
    formats: Mapping[str, Format]
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    copier: "Stager | Copier"

    def group(self, model: Transformer, names: Sequence[str], keep_mapped: bool) -> None:
        """Give a model on meta the values of tensors that belong into one storage.

        Plain ones become parameters: the mapped files where they lie there as they are wanted and
        `keep_mapped` says so, else copies. In the place of packed ones come quantized layers.
        """
        held = {self.formats.get(name) for name in names}
        assert len(held) == 1, names  # what lies in one storage is of one format
        format = held.pop()
        if format is not None:
            for name, packed in zip(names, self._packed(names, format), strict=True):
                shared = packed.each(lambda tensor: nn.Parameter(tensor, requires_grad=False))
                self._put(model, name, shared)
                if name == "tok_embeddings.weight" and self.checkpoint.args.tied:
                    self._put(model, "output.weight", shared)
            return
        views = self._mapped(names) if keep_mapped else None
        for name, tensor in zip(names, views or self._copied(names), strict=True):
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(tensor, requires_grad=False)

    # ---- plain weights

    def _mapped(self, names: Sequence[str]) -> list[Tensor] | None:
        views = mapped_parts(self.checkpoint, names, self.ranks, self.device, self.dtype)
        if views is not None:
            self.copier.advance(sum(view.nbytes for view in views))
        return views

    def _copied(self, names: Sequence[str]) -> list[Tensor]:
        """This rank's parts of tensors that belong together, as views of one new storage."""
        args, ranks = self.checkpoint.args, self.ranks
        sizes = [local_shape(name, args, ranks.size) for name in names]
        rows = [size[0] for size in sizes]
        make_room(self.device)
        storage = torch.empty((sum(rows), *sizes[0][1:]), dtype=self.dtype, device=self.device)
        targets = list(torch.split(storage, rows))
        for name, target in zip(names, targets, strict=True):
            cut = local_slice(name, args, ranks.rank, ranks.size)
            if cut is not None:
                dim, start, stop = cut
                target.narrow(dim, stop - start, target.shape[dim] - (stop - start)).zero_()
            for part in self.checkpoint.tensors[name].parts(*(cut or ())):
                length = part.tensor.shape[part.dim]
                self.copier.copy(target.narrow(part.dim, part.offset, length), part.tensor)
        return targets

    # ---- packed weights

    def _put(self, model: Transformer, name: str, packed: Packed) -> None:
        where, _, last = name.removesuffix(".weight").rpartition(".")
        parent: nn.Module = model.get_submodule(where)
        parent.register_module(last, quantized(getattr(parent, last), packed, self.dtype))

    def _packed(self, names: Sequence[str], format: Format) -> list[Packed]:
        """This rank's parts: as they lie in a mapped file, or views of one new storage each."""
        args, size = self.checkpoint.args, self.ranks.size
        sources = [self.checkpoint.tensors[name] for name in names]
        if size == 1 and self.device.type == "cpu":
            lying = [s.packed for s in sources if isinstance(s, PackedTensor)]
            if len(lying) == len(names) and {each.format for each in lying} == {format}:
                numbers = sum(s.shape[0] * s.shape[1] for s in sources)
                self.copier.advance(numbers * self.dtype.itemsize)
                return lying
        shapes = [local_shape(name, args, size) for name in names]
        local = local_format(names[0], format, args, size)
        assert local is not None, (names, format)
        rows = [shape[0] for shape in shapes]
        make_room(self.device)
        joint = Packed.zeros(local, sum(rows), shapes[0][1], self.device)
        targets = joint.split(rows)
        for name, source, target in zip(names, sources, targets, strict=True):
            self._fill(target, source, format, name)
        return targets

    def _fill(self, target: Packed, source: LazyTensor, format: Format, name: str) -> None:
        """Pack rows of `source` and put what is this rank's into `target`, whose rest is zeros."""
        cut = local_slice(name, self.checkpoint.args, self.ranks.rank, self.ranks.size)
        dim, start, stop = cut or (0, 0, source.shape[0])
        rows = (start, stop) if dim == 0 else (0, source.shape[0])
        low = 0
        for block in pack_rows(source, format, *rows, device=self.device, name=name):
            if dim == 1:
                block = block.columns(start, stop)
            high = low + len(block.weight)
            for there, here in zip(target.rows(low, high), block, strict=True):
                if there is not None and here is not None:
                    there.copy_(here)
            self.copier.advance(block.shape[0] * block.shape[1] * self.dtype.itemsize)
            low = high


class Copier(contextlib.nullcontext["Copier"]):
    """Copies block by block: a cast between devices holds a copy of what it casts."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        super().__init__(self)
        self.advance = advance

    def copy(self, target: Tensor, source: Tensor) -> None:
        rows = max(1, _BLOCK // (target[:1].nbytes or 1))
        for there, here in zip(torch.split(target, rows), torch.split(source, rows), strict=True):
            there.copy_(here)
            self.advance(there.nbytes)


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
