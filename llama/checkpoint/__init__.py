"""One way in for weights: open a folder, build on meta, then read, cut, cast and place each tensor.

Ties the formats together and accounts for every tensor; knows the Transformer's parameters by name
and nothing about how they are used. The surprising thing: on a CPU, tensors that lie in the files
just as they are wanted are not copied at all; the parameters are the mapped file.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.checkpoint.conversion import convert
from llama.checkpoint.files import check_file
from llama.checkpoint.gguf import find_gguf, is_gguf, open_gguf
from llama.checkpoint.gguf_write import write_gguf
from llama.checkpoint.hf import open_hf
from llama.checkpoint.hf_write import write_hf
from llama.checkpoint.lora import Merged, merge_adapter
from llama.checkpoint.meta import open_meta, write_meta
from llama.checkpoint.names import groups, local_shape, local_slice
from llama.checkpoint.packed import Format
from llama.checkpoint.plan import Plan, check, check_memory, free_memory, make_plan
from llama.checkpoint.quantized import FILE as QUANTIZED
from llama.checkpoint.quantized import PackedTensor, open_quantized
from llama.checkpoint.random import random_checkpoint
from llama.checkpoint.resharding import reshard
from llama.checkpoint.source import Checkpoint, LazyTensor, Part, make_room, mapped_parts
from llama.checkpoint.staging import Stager
from llama.checkpoint.stretching import check_rope_scaling, stretched
from llama.model import RopeScaling, Transformer
from llama.parallel import Ranks
from llama.progress import progress

__all__ = [
    "Checkpoint",
    "Format",
    "LazyTensor",
    "Part",
    "Place",
    "Plan",
    "check",
    "check_memory",
    "convert",
    "free_memory",
    "load",
    "make_plan",
    "merge_adapter",
    "open_checkpoint",
    "random_checkpoint",
    "reshard",
    "write_gguf",
    "write_hf",
    "write_meta",
]

logger = logging.getLogger(__name__)

_BLOCK = 2**26  # bytes that are copied at a time: what a cast on the way may hold in memory

# Given a model on meta, names of parameters that belong together, and a function to be told bytes:
# replaces their layers by ones that hold their values, or says that it does not
Place = Callable[[Transformer, Sequence[str], Callable[[int], object]], bool]


def open_checkpoint(
    ckpt_dir: str | Path, *, rope_scaling: float | RopeScaling | None = None
) -> Checkpoint:
    """Look at the weights in a folder (or in its `original/`), or in a GGUF file, unread.

    rope_scaling replaces what is said there: a factor, 1 for none, or all four constants; see
    `stretched`. Raises FileNotFoundError or ValueError in one sentence where the folder is not what
    it should be.
    """
    check_rope_scaling(rope_scaling)
    overrides: dict[str, Any] = {}
    if isinstance(rope_scaling, RopeScaling):  # what the files say need not even be understood
        overrides = {"use_scaled_rope": True, "rope_scaling": rope_scaling}
    checkpoint = _open(Path(ckpt_dir), overrides)
    if rope_scaling is None:
        return checkpoint
    return dataclasses.replace(checkpoint, args=stretched(checkpoint.args, rope_scaling))


def _open(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such folder")
    if path.is_dir():
        os.listdir(path)  # raises where it may not be read, which looks like an empty one below
    else:
        check_file(path)
        if is_gguf(path):
            return open_gguf(path, overrides)
        raise ValueError(
            f"{path} is a file; needed is a .gguf file, or the folder that holds params.json and "
            "consolidated.NN.pth (by how it begins, it is no GGUF file of another name)"
        )
    if os.path.lexists(path / QUANTIZED):
        return open_quantized(path, overrides)
    meta = _find_meta(path)
    if meta is not None:
        return open_meta(meta, overrides)
    gguf = None if (path / "config.json").exists() else find_gguf(path)
    if gguf is not None:
        return open_gguf(gguf, overrides)
    return open_hf(_check_hf(path), overrides)


def _find_meta(path: Path) -> Path | None:
    """The folder that holds params.json and shards; None where there is neither."""
    for folder in (path, path / "original"):
        has_params = os.path.lexists(folder / "params.json")
        has_shards = any(folder.glob("consolidated.*.pth"))
        if has_params and has_shards:
            return folder
        if (has_params or has_shards) and not (path / "config.json").exists():
            lacks = "consolidated.00.pth" if has_params else "params.json"
            raise FileNotFoundError(f"{folder / lacks} is missing; it belongs beside the others")
    return None


def _check_hf(path: Path) -> Path:
    """A folder that holds config.json, or an error that says what is there instead."""
    if (path / "config.json").exists():
        return path
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path}: is an adapter; give it as adapter= to the model that it is for")
    if any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{path / 'config.json'} is missing; it belongs beside the weights")
    raise FileNotFoundError(
        f"{path}: neither params.json nor consolidated.00.pth is in this folder, nor config.json"
    )


def load(
    checkpoint: Checkpoint,
    *,
    ranks: Ranks,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    place: Place | None = None,
    keep_mapped: bool = True,
    show_progress: bool = False,
) -> Transformer:
    """The model of this rank on `device`, its weights in `dtype` (None: the checkpoint's own).

    `place` may put other layers in the place of some, as quantization does; what it leaves becomes
    plain parameters, also what is stored packed. Without `keep_mapped` these are copied where they
    could be the mapped file, which one norm would keep in memory whole. Never holds much more than
    the weights themselves: parts are copied from where they lie to where they stay. Raises
    ValueError where the model cannot be cut into `ranks`.
    """
    device = torch.device(device)
    wanted = _wanted_dtype(checkpoint, device, dtype)
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(checkpoint.args), ranks)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(checkpoint.tensors), names ^ set(checkpoint.tensors)
    total = sum(p.numel() for p in model.parameters()) * wanted.itemsize
    with (
        progress("loading weights", total, unit="B", enabled=show_progress) as advance,
        Stager(advance) if device.type == "cuda" else _Copier(advance) as copier,
    ):
        for group in groups(checkpoint.args):
            held = [name for name in group if name in checkpoint.tensors]  # tied: no output
            if not held or (place is not None and place(model, held, copier.advance)):
                continue
            views = mapped_parts(checkpoint, held, ranks, device, wanted) if keep_mapped else None
            placed = views or _copied(checkpoint, held, ranks, device, wanted, copier)
            if views is not None:
                copier.advance(sum(view.nbytes for view in views))
            for name, tensor in zip(held, placed, strict=True):
                module = model.get_submodule(name.removesuffix(".weight"))
                module.weight = nn.Parameter(tensor, requires_grad=False)
    if checkpoint.args.tied and model.output.weight.is_meta:
        model.output.weight = model.tok_embeddings.weight
    model.freqs = model.freqs.to(device)
    unplaced = [name for name, p in model.named_parameters() if p.is_meta]
    assert not unplaced, unplaced
    return model.eval()


def _wanted_dtype(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of all parameters; says so where that is not what a person would expect."""
    wanted = checkpoint.dtype if dtype is None else dtype
    if not (isinstance(wanted, torch.dtype) and wanted.is_floating_point and wanted.itemsize > 1):
        raise ValueError(f"dtype={dtype!r}: use torch.bfloat16, torch.float16 or torch.float32")
    stored = [t for t in checkpoint.tensors.values() if not isinstance(t, (Merged, PackedTensor))]
    others = sorted({str(t.dtype) for t in stored} - {str(checkpoint.dtype)})
    if dtype is None and others and not checkpoint.stored:  # a mixture is what GGUF is
        logger.warning(
            "some tensors are stored as %s and loaded as %s, like the rest",
            ", ".join(others),
            wanted,
        )
    if wanted == torch.bfloat16 and device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            logger.warning(
                "%s has no bfloat16 arithmetic and will be slow; dtype=torch.float16 is faster, at "
                "other roundings",
                torch.cuda.get_device_name(device),
            )
    return wanted


def _copied(
    checkpoint: Checkpoint,
    names: Sequence[str],
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    copier: "Stager | _Copier",
) -> list[Tensor]:
    """This rank's parts of tensors that belong together, as views of one new storage."""
    sizes = [local_shape(name, checkpoint.args, ranks.size) for name in names]
    rows = [size[0] for size in sizes]
    make_room(device)
    storage = torch.empty((sum(rows), *sizes[0][1:]), dtype=dtype, device=device)
    targets = list(torch.split(storage, rows))
    for name, target in zip(names, targets, strict=True):
        cut = local_slice(name, checkpoint.args, ranks.rank, ranks.size)
        if cut is not None:
            dim, start, stop = cut
            target.narrow(dim, stop - start, target.shape[dim] - (stop - start)).zero_()
        for part in checkpoint.tensors[name].parts(*(cut or ())):
            length = part.tensor.shape[part.dim]
            copier.copy(target.narrow(part.dim, part.offset, length), part.tensor)
    return targets


class _Copier(contextlib.nullcontext["_Copier"]):
    """Copies block by block: a cast between devices holds a copy of what it casts."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        super().__init__(self)
        self.advance = advance

    def copy(self, target: Tensor, source: Tensor) -> None:
        rows = max(1, _BLOCK // (target[:1].nbytes or 1))
        for there, here in zip(torch.split(target, rows), torch.split(source, rows), strict=True):
            there.copy_(here)
            self.advance(there.nbytes)
