"""A folder of quantized weights, read: params.json, quantized.safetensors and a tokenizer.

The file is written by write.py; here its tensors get their names back, packed matrices among them.
Knows no recipe beyond its text. The surprising thing: whoever asks for the numbers of a packed
matrix gets them as for any other, in float32; so a quantized model can be converted, cut and
quantized again like one that is not.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.meta.params import make_args, read_params
from llama.checkpoint.safetensors import Entry, Stored, open_file, read_metadata, stored, viewed
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.files.strict_json import parse_object
from llama.names import groups, shapes
from llama.quantization.packed import GROUPS, KINDS, Format, Packed

FILE = "quantized.safetensors"
KEY = "llama"  # of the file's metadata
VERSION = 1
_BLOCK = 2**18  # numbers that are unpacked at a time
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAID = {"version", "recipe", "dtype", "stop_token_ids", "chat_template"}


class PackedTensor(LazyTensor):
    """A packed matrix in a mapped file: `packed` is a view of it, `parts` its numbers."""

    dtype = torch.float32

    def __init__(self, packed: Packed) -> None:
        self.packed, self.shape = packed, packed.shape

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        shape = self.range_shape(dim, start, stop)
        first = start if dim == 0 else 0
        step = max(1, _BLOCK // self.shape[1])
        for low in range(first, first + shape[0], step):
            block = self.packed.rows(low, min(low + step, first + shape[0])).unpack(self.dtype)
            yield Part(0, low - first, block if dim == 0 else block.narrow(1, start, shape[1]))


def open_quantized(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder that holds params.json and quantized.safetensors.

    `overrides` are fields of ModelArgs that hold whatever params.json says. Raises
    FileNotFoundError or ValueError, naming the file, where anything is missing, unknown, or does
    not fit together.
    """
    args = make_args(read_params(path / "params.json") | dict(overrides), path / "params.json")
    file = path / FILE
    data, entries = open_file(file)
    said = _read_said(file)
    tensors = _tensors(args, data, entries, file)
    formats = {n: t.packed.format for n, t in tensors.items() if isinstance(t, PackedTensor)}
    counts = Counter(str(formats.get(name, str(t.dtype)[6:])) for name, t in tensors.items())
    tokenizers = [path / name for name in ("tokenizer.model", "tokenizer.json")]
    return Checkpoint(
        args=args,
        tensors=tensors,
        dtype=_DTYPES[said["dtype"]],
        path=path,
        tokenizer_path=next((file for file in tokenizers if os.path.lexists(file)), None),
        stop_token_ids=tuple(said["stop_token_ids"]),
        chat_template=said["chat_template"],
        stored=", ".join(f"{name} ({count})" for name, count in counts.most_common())
        + f", recipe {said['recipe']}",
        formats=formats,
    )


def _read_said(file: Path) -> dict[str, Any]:
    """Read what the writer said of itself and the model; ValueError where it is another writer."""
    text = read_metadata(file).get(KEY)
    if not isinstance(text, str):
        raise ValueError(
            f"{file}: was not written by `python -m llama quantize`; load the model's unquantized "
            "version"
        )
    try:
        said = parse_object(text)
        if said.get("version") != VERSION:
            raise ValueError(f"version {said.get('version')!r:.40}; {VERSION} is read")
        odd = sorted(_SAID ^ said.keys())
        if odd:
            raise ValueError(f"{odd[0]:.40} is {'unknown' if odd[0] in said else 'missing'}")
        ids, template = said["stop_token_ids"], said["chat_template"]
        if not isinstance(ids, list) or not all(type(n) is int and 0 <= n < 2**31 for n in ids):
            raise ValueError(f"stop_token_ids is {ids!r:.60}")
        if not (template is None or isinstance(template, str)):
            raise ValueError(f"chat_template is {template!r:.60}")
        if not isinstance(said["recipe"], str) or said["dtype"] not in [*_DTYPES]:
            raise ValueError(f"recipe and dtype are {said['recipe']!r:.60}, {said['dtype']!r:.60}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata is broken: {error}") from error
    return said


def _tensors(
    args: ModelArgs, data: Tensor, entries: Mapping[str, Entry], file: Path
) -> dict[str, LazyTensor]:
    """Every tensor of the model, plain or packed; ValueError for one too many or too few."""
    layers = {name.split(".")[1] for name in entries if name.startswith("layers.")}
    if len(layers) != args.n_layers:  # first: a number of layers may be absurd
        raise ValueError(
            f"{file}: holds {len(layers)} layers, and params.json says n_layers {args.n_layers}"
        )
    tensors: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for name, shape in shapes(args).items():
        if name == "output.weight" and args.tied:
            continue
        if name not in entries:
            raise ValueError(f"{file}: lacks {name}")
        pieces = {name} | {f"{name}.{each}" for each in ("scale", "offset")} & entries.keys()
        used |= pieces
        if len(pieces) == 1 and entries[name].dtype not in ("I8", "U8", "F8_E4M3"):
            tensors[name] = _plain(name, shape, data, entries[name], file)
        else:
            packed = _packed(name, shape, data, entries, file)
            tensors[name] = PackedTensor(packed)
    for names in groups(args):  # which lie in one storage
        stored_as = {str(t.packed.format) if isinstance(t, PackedTensor) else "not packed"
                 for t in map(tensors.get, names)}  # fmt: skip
        if len(stored_as) > 1:
            raise ValueError(
                f"{file}: {', '.join(names)} are {', '.join(sorted(stored_as))}; they need to be "
                "alike"
            )
    unknown = sorted(entries.keys() - used)
    if unknown:
        raise ValueError(f"{file}: holds tensors that this model does not have: {unknown[0]:.80}")
    return tensors


def _plain(name: str, shape: tuple[int, ...], data: Tensor, entry: Entry, file: Path) -> Stored:
    if entry.shape != shape:
        raise ValueError(
            f"{file}: {name} is {entry.shape}, and by params.json it should be {shape}"
        )
    return stored(name, data, entry, file)


def _packed(
    name: str, shape: tuple[int, ...], data: Tensor, entries: Mapping[str, Entry], file: Path
) -> Packed:
    """A packed matrix, each piece of the shape and dtype that its format has."""
    pieces = {"weight": name, "scale": f"{name}.scale", "offset": f"{name}.offset"}
    weight = viewed(name, data, entries[name], file)
    kind = next((kind for kind, dtype in KINDS.items() if dtype == weight.dtype), None)
    if kind is None or len(shape) != 2:
        raise ValueError(f"{file}: {name} has scales, and is {entries[name].dtype}")
    wanted = ["weight", "scale"] + ["offset"] * (kind == "int4")
    odd = [pieces[p] for p in pieces if (pieces[p] in entries) != (p in wanted)]
    if odd:
        how = "lacks" if odd[0] not in entries else f"{name} is {kind} and should not have"
        raise ValueError(f"{file}: {how} {odd[0]}")
    grid = entries[pieces["scale"]].shape
    group = shape[1] // grid[-1] if kind == "int4" and len(grid) == 2 and grid[-1] else 0
    if kind == "int4" and (group not in GROUPS or shape[1] % group):
        raise ValueError(f"{file}: {pieces['scale']} is {grid}, which are no groups of {shape}")
    layout = Format(kind, group).layout(*shape)
    made = {piece: viewed(pieces[piece], data, entries[pieces[piece]], file) for piece in wanted}
    for piece, tensor in made.items():
        if (tuple(tensor.shape), tensor.dtype) != layout[piece]:
            size, dtype = layout[piece]
            raise ValueError(
                f"{file}: {pieces[piece]} is {tensor.dtype} {tuple(tensor.shape)}, and by "
                f"params.json it should be {dtype} {size}"
            )
    return Packed(**made)
