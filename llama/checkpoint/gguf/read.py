"""GGUF files of the architecture `llama`: tensors by name, unpacked when they are read.

Reading maps the files and looks at headers only; quantized tensors become numbers a few rows at a
time, when somebody copies them. Knows neither devices nor ranks. The surprising thing: quantized
weights are run in bfloat16 unless asked otherwise, and come as float32 on the way there; so asking
for float32 gives what the blocks say to the last bit.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.gguf.blocks import PLAIN, dequantize
from llama.checkpoint.gguf.header import MAGIC, GGUFFile, Stored, read_header
from llama.checkpoint.gguf.keys import ROPE_FREQS, canonical_name, gguf_name, model_args
from llama.checkpoint.gguf.tokenizer import read_tokenizer
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.names import shapes

_BLOCK = 2**18  # numbers that are unpacked at a time: what fits in a core's cache is fastest


class _Rows(LazyTensor):
    """A tensor of a mapped file: a view of it, or unpacked some rows at a time, as float32."""

    def __init__(self, stored: Stored, storage: torch.UntypedStorage) -> None:
        self.shape, self.tensor_type = stored.shape, stored.tensor_type
        plain = PLAIN.get(stored.tensor_type.name)
        self.dtype = plain or torch.float32
        size = [*self.shape[:-1], self.shape[-1] // self.tensor_type.block * self.tensor_type.size]
        data = torch.empty(0, dtype=torch.uint8)
        data = data.set_(storage, stored.offset, size)  # type: ignore[call-overload]
        self.data = data if plain is None else data.view(plain)

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        stop = start + self.range_shape(dim, start, stop)[dim]
        if self.tensor_type.name in PLAIN:
            yield Part(dim, 0, self.data.narrow(dim, start, stop - start))
            return
        block, size = self.tensor_type.block, self.tensor_type.size
        rows, columns = (start, stop), (0, self.shape[1])
        if dim == 1:
            rows, columns = (0, self.shape[0]), (start, stop)
        first, last = columns[0] // block, -(-columns[1] // block)
        cut = slice(columns[0] - first * block, columns[1] - first * block)
        step = max(1, _BLOCK // max(1, (last - first) * block))
        for row in range(*rows, step):
            packed = self.data[row : min(row + step, rows[1]), first * size : last * size]
            yield Part(0, row - rows[0], dequantize(packed, self.tensor_type)[:, cut])

    def mapped(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor | None:
        whole = self.range_shape(dim, start, stop) == self.shape
        return self.data if whole and self.tensor_type.name in PLAIN else None


def open_gguf(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a GGUF file, or in all files of which it is one.

    `overrides` are fields of ModelArgs that hold whatever the file says. Raises FileNotFoundError
    or ValueError, naming the file, where anything is missing, unknown, or does not fit together.
    """
    files = [read_header(file) for file in find_parts(path)]
    _check_parts(files)
    head = files[0]
    found, skipped = _named(files)
    storages = {file.path: file.storage() for file in files}
    factors = found.pop(ROPE_FREQS, None)
    rope = None
    if factors is not None and "use_scaled_rope" not in overrides:
        _check_vector(factors, ROPE_FREQS)
        rope = _Rows(factors, storages[factors.file]).read().float()
    args = model_args(head, {n: s.shape for n, s in found.items()}, rope, overrides)
    _check_tensors(head, args, found)
    tensors = {name: _Rows(found[name], storages[found[name].file]) for name in found}
    counts = Counter(stored.tensor_type.name for stored in found.values())
    if factors is not None:
        skipped[ROPE_FREQS] = "is what rope_scaling says"
    has_tokenizer = head.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    template = head.metadata.get("tokenizer.chat_template")
    return Checkpoint(
        args=args,
        tensors=tensors,
        dtype=_dtype(found),
        path=path,
        shards=len(files),
        skipped=skipped,
        stored=", ".join(f"{name} ({count})" for name, count in counts.most_common()),
        tokenizer=(lambda: read_tokenizer(head)) if has_tokenizer else None,
        chat_template=template if isinstance(template, str) else None,
    )


def is_gguf(path: Path) -> bool:
    """Whether a plain file is GGUF: by its name, so that a broken one is called that, or by how it
    begins."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def find_gguf(folder: Path) -> Path | None:
    """The one model in a folder (its first file); None for none, ValueError for several.

    Known by their names, or, in a folder without such, by how they begin: blobs have no names.
    """
    models: dict[str, Path] = {}
    files = sorted(each for each in folder.iterdir() if each.is_file())
    named = [file for file in files if file.suffix.lower() == ".gguf"]
    for file in named or [file for file in files if os.access(file, os.R_OK) and is_gguf(file)]:
        match = _PART.fullmatch(file.name)
        models.setdefault(match[1] if match else file.name, file)
    if len(models) > 1:
        names = ", ".join(file.name for file in [*models.values()][:4])
        raise ValueError(f"{folder}: holds several models, give the path of one: {names}")
    return next(iter(models.values()), None)


_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE)


def find_parts(path: Path) -> list[Path]:
    """All files of the model of which `path` is one, in order."""
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    end = match[4] or ""
    parts = [path.with_name(f"{match[1]}-{n + 1:05}-of-{match[3]}{end}") for n in range(count)]
    for part in parts:
        if not os.path.lexists(part):
            raise FileNotFoundError(f"{part} is missing, of {count} files")
    return parts


# --- what belongs to whom -------------------------------------------------------------------------


def _check_parts(files: Sequence[GGUFFile]) -> None:
    """Raise ValueError where a file says that it is another part, or of another number of parts."""
    for number, file in enumerate(files):
        says = file.get("split.no", int, 0), max(1, file.get("split.count", int, 1))
        if says != (number, len(files)):
            raise ValueError(
                f"{file.path}: says that it is file {says[0] + 1} of {says[1]}, and is "
                f"{number + 1} of {len(files)} here"
            )
    total = sum(len(file.tensors) for file in files)
    claimed = files[0].get("split.tensors.count", int, total)
    if claimed != total:
        raise ValueError(
            f"{files[0].path}: says that there are {claimed} tensors, and there are {total}"
        )


def _named(files: Sequence[GGUFFile]) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor under its canonical name, rope_freqs under its own; and those that are skipped,
    each with the reason."""
    found: dict[str, Stored] = {}
    skipped: dict[str, str] = {}
    for file in files:
        for theirs, stored in file.tensors.items():
            name = canonical_name(theirs)
            if name is None:
                raise ValueError(f"{file.path}: {theirs!r:.80} is no tensor that this model has")
            if name == "":
                skipped[theirs] = "derived from rope_theta"
                continue
            if name in found:
                raise ValueError(f"{file.path}: {theirs!r:.80} is in {found[name].file} as well")
            found[name] = stored
    return found, skipped


def _check_tensors(head: GGUFFile, args: ModelArgs, found: Mapping[str, Stored]) -> None:
    """Raise ValueError where these are not exactly the tensors of this model, each of its shape."""
    wanted = shapes(args)
    missing = [name for name in wanted if name not in found]
    missing = [name for name in missing if not (args.tied and name == "output.weight")]
    for names, what in ((missing, "lacks"), (sorted(found.keys() - wanted), "does not need")):
        if names:
            some = ", ".join(gguf_name(name) for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{head.path}: {what} {some}{more}")
    for name, stored in found.items():
        if stored.shape != wanted[name]:
            raise ValueError(
                f"{stored.file}: {gguf_name(name)} is {stored.shape}, and its keys say "
                f"{wanted[name]}"
            )
        _check_vector(stored, gguf_name(name))


def _check_vector(stored: Stored, name: str) -> None:
    if len(stored.shape) == 1 and stored.tensor_type.name not in PLAIN:
        raise ValueError(
            f"{stored.file}: {name} is {stored.tensor_type.name}; vectors are read in "
            f"{', '.join(PLAIN)}"
        )


def _dtype(found: Mapping[str, Stored]) -> torch.dtype:
    """The dtype of most weights; quantized ones are run in bfloat16 unless asked otherwise."""
    counts: Counter[torch.dtype] = Counter()
    for stored in found.values():
        if len(stored.shape) > 1:
            counts[PLAIN.get(stored.tensor_type.name, torch.bfloat16)] += math.prod(stored.shape)
    return counts.most_common(1)[0][0]
