"""Loading with packed weights: each matrix is read, packed on its device, cut and placed.

Puts quantized layers in the place of a model's own, under their names; knows how tensors are
grouped and cut, and nothing of how a model runs. The surprising thing: every rank packs whole rows
and then keeps its part. Scales are those of the full matrix, so the values are the same on any
number of ranks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from llama.checkpoint import Checkpoint
from llama.checkpoint import load as load_plain
from llama.checkpoint.names import local_shape, local_slice
from llama.checkpoint.packed import Format, Packed, local_format
from llama.checkpoint.plan import is_mapped
from llama.checkpoint.quantized import PackedTensor
from llama.checkpoint.source import LazyTensor, make_room, rows_of
from llama.model import Transformer
from llama.parallel import Ranks
from llama.quantization.formats import quantize
from llama.quantization.linear import quantized
from llama.quantization.recipe import check_ranks

logger = logging.getLogger(__name__)

_BLOCK = 2**26  # numbers of stored ones that are copied at a time


def load(
    checkpoint: Checkpoint,
    *,
    ranks: Ranks,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    formats: Mapping[str, Format] | None = None,
    show_progress: bool = False,
) -> Transformer:
    """checkpoint.load, with the matrices in `formats` packed; None: those that are stored so.

    Beside the weights there is never more than a block of one unpacked matrix. Raises ValueError
    where `ranks` would cut a group too small.
    """
    wanted = dict(checkpoint.formats if formats is None else formats)
    check_ranks(wanted, checkpoint.args, ranks.size)
    if wanted and ranks.size > 1 and ranks.is_main:
        logger.warning(
            "quantized weights on %d ranks run without kernels: every product unpacks them, which "
            "on a GPU moves about ten times the bytes of bfloat16; it is faster without "
            "quantization, or on one GPU",
            ranks.size,
        )
    kind = dtype or checkpoint.dtype
    place = _Placer(checkpoint, wanted, ranks, torch.device(device), kind)
    return load_plain(
        checkpoint,
        ranks=ranks,
        device=device,
        dtype=dtype,
        place=place if wanted else None,
        keep_mapped=not wanted or is_mapped(checkpoint, ranks, torch.device(device), kind, wanted),
        show_progress=show_progress,
    )


class _Placer:
    """What `checkpoint.load` asks to place each group of names, see `Place` there."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, Format],
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint, self.formats = checkpoint, formats
        self.ranks, self.device, self.dtype = ranks, device, dtype

    def __call__(
        self, model: Transformer, names: Sequence[str], advance: Callable[[int], object]
    ) -> bool:
        held = {self.formats.get(name) for name in names}
        assert len(held) == 1, names  # what lies in one storage is of one format
        format = held.pop()
        if format is None:
            return False
        for name, packed in zip(names, self._packed(names, format, advance), strict=True):
            shared = packed.each(lambda tensor: nn.Parameter(tensor, requires_grad=False))
            self._put(model, name, shared)
            if name == "tok_embeddings.weight" and self.checkpoint.args.tied:
                self._put(model, "output.weight", shared)
        return True

    def _put(self, model: Transformer, name: str, packed: Packed) -> None:
        where, _, last = name.removesuffix(".weight").rpartition(".")
        parent: nn.Module = model.get_submodule(where)
        parent.register_module(last, quantized(getattr(parent, last), packed, self.dtype))

    def _packed(
        self, names: Sequence[str], format: Format, advance: Callable[[int], object]
    ) -> list[Packed]:
        """This rank's parts: as they lie in a mapped file, or views of one new storage each."""
        args, size = self.checkpoint.args, self.ranks.size
        sources = [self.checkpoint.tensors[name] for name in names]
        if size == 1 and self.device.type == "cpu":
            lying = [s.packed for s in sources if isinstance(s, PackedTensor)]
            if len(lying) == len(names) and {each.format for each in lying} == {format}:
                advance(sum(s.shape[0] * s.shape[1] for s in sources) * self.dtype.itemsize)
                return lying
        shapes = [local_shape(name, args, size) for name in names]
        local = local_format(names[0], format, args, size)
        assert local is not None, (names, format)
        rows = [shape[0] for shape in shapes]
        make_room(self.device)
        joint = Packed.zeros(local, sum(rows), shapes[0][1], self.device)
        targets = joint.split(rows)
        for name, source, target in zip(names, sources, targets, strict=True):
            self._fill(target, source, format, name, advance)
        return targets

    def _fill(
        self,
        target: Packed,
        source: LazyTensor,
        format: Format,
        name: str,
        advance: Callable[[int], object],
    ) -> None:
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
            advance(block.shape[0] * block.shape[1] * self.dtype.itemsize)
            low = high


def pack_rows(
    source: LazyTensor, format: Format, start: int, stop: int, *, device: torch.device, name: str
) -> Iterator[Packed]:
    """Rows start..stop of a matrix packed on `device`, some at a time.

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
