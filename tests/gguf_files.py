"""GGUF files byte by byte, for tests: whatever is asked for, sound or not."""

import struct
from math import prod

import torch

from llama.checkpoint.gguf.blocks import GGML_TYPES, NUMBER_OF
from llama.checkpoint.gguf.header import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    STRUCT_CODES,
    UINT32,
)
from llama.checkpoint.gguf.keys import gguf_name, keys_of

VECTORS = ("attn_norm", "ffn_norm", "output_norm", "rope_freqs")


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(value_type: int, given) -> bytes:
    """A value with its type before it; an array's `given` is (value_type, list)."""
    if value_type == ARRAY:
        inner, items = given
        packed = [value(inner, item)[4:] for item in items]
        return struct.pack("<IIQ", ARRAY, inner, len(items)) + b"".join(packed)
    if value_type == STRING:
        return struct.pack("<I", STRING) + text(given)
    return struct.pack(f"<I{STRUCT_CODES[value_type]}", value_type, given)


def guess(given) -> bytes:
    """A value of the type that a Python value suggests."""
    if isinstance(given, bytes):
        return given  # packed already
    if isinstance(given, list):
        types = {str: STRING, float: FLOAT32, int: INT32}
        return value(ARRAY, (types[type(given[0])] if given else STRING, given))
    types = {str: STRING, float: FLOAT32, int: UINT32, bool: BOOL}
    return value(types[type(given)], given)


def tensor(name, shape, data: bytes, tensor_type="F32", offset=None, dims=None):
    """An entry for `raw_gguf`; tensor_type: a name or a number; dims: written instead of shape."""
    number = NUMBER_OF[tensor_type] if isinstance(tensor_type, str) else tensor_type
    return name, tuple(shape) if dims is None else dims, number, data, offset


def raw_gguf(
    keys, tensors, *, magic=b"GGUF", version=3, n_tensors=None, n_keys=None, alignment=ALIGNMENT
) -> bytes:
    """A file of keys (pairs, or a dict) and entries of `tensor`."""
    keys = list(keys.items()) if isinstance(keys, dict) else list(keys)
    out = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    for key, given in keys:
        out += text(key) + guess(given)
    place, body = 0, b""
    for name, shape, number, data, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += struct.pack("<IQ", number, place if offset is None else offset)
        body += data + bytes(-len(data) % alignment)
        place = len(body)
    return out + bytes(-len(out) % alignment) + body


def keys_for(args, **changes):
    """Sound keys for a model; changes by name without "llama." , None removes one."""
    keys = {"general.architecture": "llama"}
    keys |= {key: value(*typed) for key, typed in keys_of(args).items()}
    for name, given in changes.items():
        key = (
            name
            if "." in name and not name.startswith(("rope.", "attention."))
            else f"llama.{name}"
        )
        keys[key] = given
    return {key: given for key, given in keys.items() if given is not None}


def entries_for(checkpoint, types=None):
    """Entries of `tensor` for every tensor: float32, or random blocks where `types` says so."""
    out = []
    for name, source in checkpoint.tensors.items():
        theirs, tensor_type = gguf_name(name), (types or {}).get(name)
        if tensor_type is None:
            data = source.read().float().numpy().tobytes()
            out.append(tensor(theirs, source.shape, data))
        else:
            out.append(
                tensor(theirs, source.shape, random_blocks(source.shape, tensor_type), tensor_type)
            )
    return out


def random_blocks(shape, tensor_type, seed=0) -> bytes:
    entry = GGML_TYPES[NUMBER_OF[tensor_type]]
    size = prod(shape) // entry.block * entry.size
    generator = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).tolist())
