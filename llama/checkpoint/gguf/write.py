"""A checkpoint written as one GGUF file, as llama.cpp reads them: keys, tokenizer, tensors.

A few rows of one tensor at a time; the file gets its name when it is whole. Knows no device. The
surprising thing: vectors are float32 whatever is asked for, since llama.cpp has no other kind of
norm, and so the scaling of rotary frequencies, which is a vector here, is exact too.
"""

import math
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.gguf.blocks import GGML_TYPES, NUMBER_OF, PLAIN, GGMLType, quantize
from llama.checkpoint.gguf.header import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    MAGIC,
    STRING,
    STRUCT_CODES,
    UINT32,
    VERSION,
)
from llama.checkpoint.gguf.keys import ROPE_FREQS, gguf_name, keys_of, rope_factors
from llama.checkpoint.gguf.tokenizer import named_ids, vocabulary
from llama.checkpoint.source import Checkpoint, LazyTensor
from llama.checkpoint.tokenizers import check_around
from llama.files.new_folder import new_files
from llama.terminal.progress import progress
from llama.text.templates import LLAMA3_TEMPLATE
from llama.tokenizer.protocols import TextTokenizer

Type = Literal["q8_0", "q4_0"]

_BLOCK = 2**24  # numbers that are read at a time
_PACKED = 2**18  # and that are packed at a time: what fits in a core's cache is fastest
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's, a remark


class _Entry(NamedTuple):
    """A tensor to be written."""

    name: str  # GGUF's
    source: LazyTensor | Tensor
    tensor_type: GGMLType  # that it is written in

    @property
    def nbytes(self) -> int:
        return math.prod(self.source.shape) // self.tensor_type.block * self.tensor_type.size


def write_gguf(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    type: Type | None = None,
    tokenizer: TextTokenizer | None = None,
    chat_template: str | None = None,
    show_progress: bool = False,
) -> None:
    """Write a checkpoint as the GGUF file `path`, which gets that name when it is whole.

    dtype: of the matrices, None for the checkpoint's; type: quantizes them instead, those whose
    rows are no multiple of 32 excepted ("q4_0" leaves the embedding and the output in Q8_0).
    tokenizer: None for the checkpoint's own, where it has one; chat_template: "" for none, None
    for the checkpoint's own, or Llama 3's where the tokenizer has its special tokens. Raises
    FileExistsError where there is such a file, and ValueError for what GGUF cannot say.
    """
    out = Path(path)
    if out.exists():
        raise FileExistsError(f"{out} is there already")
    wanted = _wanted(checkpoint.dtype if dtype is None else dtype, type)
    if tokenizer is None and checkpoint.tokenizer is not None:
        tokenizer = checkpoint.tokenizer()
    entries = list(_entries(checkpoint, wanted))
    template = checkpoint.chat_template if chat_template is None else chat_template
    keys = _keys(checkpoint, wanted, tokenizer, template)
    out.parent.mkdir(parents=True, exist_ok=True)
    total = sum(entry.nbytes for entry in entries)
    with (
        new_files(out.parent) as part,
        part(out.name).open("wb") as file,
        progress(f"writing {out.name}", total, unit="B", enabled=show_progress) as advance,
    ):
        file.write(_header(keys, entries))
        for entry in entries:
            _pad(file)
            _write(file, entry, advance)
        _pad(file)


def _wanted(dtype: torch.dtype, type: Type | None) -> GGMLType:
    names = {plain: name for name, plain in PLAIN.items()}
    if type is not None and type not in ("q8_0", "q4_0"):
        raise ValueError(f"type={type!r}: use 'q8_0' or 'q4_0', or None and a dtype")
    if dtype not in names:
        raise ValueError(f"dtype={dtype!r}: use torch.bfloat16, torch.float16 or torch.float32")
    return GGML_TYPES[NUMBER_OF[type.upper() if type else names[dtype]]]


def _entries(checkpoint: Checkpoint, wanted: GGMLType) -> Iterator[_Entry]:
    """Every tensor under GGUF's name, in the type in which it is written."""
    f32, f16, q8_0 = (GGML_TYPES[NUMBER_OF[name]] for name in ("F32", "F16", "Q8_0"))
    scaling = checkpoint.args.rope_scaling
    if scaling is not None:
        yield _Entry(ROPE_FREQS, rope_factors(checkpoint.args, scaling), f32)
    for name, source in checkpoint.tensors.items():
        outer = name in ("tok_embeddings.weight", "output.weight")
        tensor_type = q8_0 if outer and wanted.name == "Q4_0" else wanted
        if len(source.shape) == 1:
            tensor_type = f32
        elif source.shape[1] % tensor_type.block:
            tensor_type = f16
        yield _Entry(gguf_name(name), source, tensor_type)


# --- the header -----------------------------------------------------------------------------------


def _keys(
    checkpoint: Checkpoint, wanted: GGMLType, tokenizer: TextTokenizer | None, template: str | None
) -> dict[str, bytes]:
    """Every key of the header with the bytes of its value type and value."""
    args = checkpoint.args
    keys = {
        "general.architecture": _text("llama"),
        "general.name": _text(checkpoint.family),
        "general.file_type": _number(UINT32, _FILE_TYPES[wanted.name]),
        "general.quantization_version": _number(UINT32, 2),
    }
    keys |= {key: _number(*value) for key, value in keys_of(args).items()}
    if tokenizer is None:
        return keys | {"tokenizer.ggml.model": _text("none")}
    return keys | _tokenizer_keys(args, tokenizer, template, checkpoint.stop_token_ids)


def _tokenizer_keys(
    args: ModelArgs, tokenizer: TextTokenizer, template: str | None, stops: Collection[int]
) -> dict[str, bytes]:
    said = vocabulary(tokenizer, args.vocab_size)
    check_around(tokenizer, "GGUF")
    ids = named_ids(said, tokenizer, {*tokenizer.stop_tokens, *stops}, args.vocab_size)
    keys = {
        "model": _text(said.model),
        "tokens": _list(STRING, [_string(token) for token in said.tokens]),
        "token_type": _list(
            INT32, [struct.pack("<i", token_type) for token_type in said.token_types]
        ),
        "add_bos_token": _number(BOOL, bool(tokenizer.prefix)),
        "add_eos_token": _number(BOOL, bool(tokenizer.suffix)),
    }
    if said.model == "gpt2":
        keys["pre"] = _text("llama-bpe")
    if said.merges is not None:
        keys["merges"] = _list(STRING, [_string(merge) for merge in said.merges])
    if said.scores is not None:
        keys["scores"] = _list(FLOAT32, [struct.pack("<f", score) for score in said.scores])
    if said.add_space_prefix is not None:
        keys["add_space_prefix"] = _number(BOOL, said.add_space_prefix)
    keys |= {key: _number(UINT32, token) for key, token in ids.items()}
    packed = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    unstated = template is None and not tokenizer.stated  # Meta's files never say one
    if unstated and "<|start_header_id|>" in tokenizer.special_tokens:
        template = LLAMA3_TEMPLATE
    return packed | ({"tokenizer.chat_template": _text(template)} if template else {})


def _header(keys: dict[str, bytes], entries: Sequence[_Entry]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(keys))]
    for key, value in keys.items():
        parts += [_string(key), value]
    offset = 0
    for entry in entries:
        shape = entry.source.shape[::-1]  # fastest first
        parts.append(_string(entry.name))
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", NUMBER_OF[entry.tensor_type.name], offset))
        offset += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _text(text: str) -> bytes:
    return struct.pack("<I", STRING) + _string(text)


def _number(value_type: int, value: int | float) -> bytes:
    return struct.pack(f"<I{STRUCT_CODES[value_type]}", value_type, value)


def _list(value_type: int, values: Sequence[bytes]) -> bytes:
    return struct.pack("<IIQ", ARRAY, value_type, len(values)) + b"".join(values)


# --- the tensors ----------------------------------------------------------------------------------


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _write(file: BinaryIO, entry: _Entry, advance: Callable[[int], object]) -> None:
    """Write one tensor, a few rows at a time."""
    rows, numbers = entry.source.shape[0], math.prod(entry.source.shape[1:])
    step = max(1, _BLOCK // numbers)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if isinstance(entry.source, Tensor):
            block = entry.source[start:stop]
        else:
            block = entry.source.read(0, start, stop)
        for few in torch.split(block.to("cpu"), max(1, _PACKED // numbers)):
            packed = _packed(few, entry).contiguous().view(torch.uint8)
            packed.numpy().tofile(file)
            advance(packed.nbytes)


def _packed(block: Tensor, entry: _Entry) -> Tensor:
    """Convert rows to the type that is written. Raises ValueError where a number would become
    infinite."""
    plain = PLAIN.get(entry.tensor_type.name)
    packed = quantize(block.float(), entry.tensor_type) if plain is None else block.to(plain)
    narrow = packed if plain == torch.float16 else None
    if plain is None:  # the scale, at the beginning of each block
        narrow = packed.view(-1, entry.tensor_type.size)[:, :2].clone().view(torch.float16)
    if narrow is not None and not narrow.isfinite().all() and block.isfinite().all():
        raise ValueError(
            f"{entry.name} has numbers that {entry.tensor_type.name} cannot hold: write another "
            "dtype"
        )
    return packed
