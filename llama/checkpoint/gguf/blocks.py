"""The types of GGUF's tensors: how many bytes they take, and their blocks as numbers and back.

A quantized row is a row of blocks of 32 or 256 numbers, each with a scale or several. Knows bytes
and no files, names or models. The surprising thing: the results are those of the gguf package bit
for bit, so the order of the few floating-point operations matters; the rarer types are left to its
own code, which is why that package is needed for them and only for them.

Letters: n blocks. The layouts are those of ggml's block structs (ggml-common.h).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class GGMLType(NamedTuple):
    """A type of GGUF's tensors, by ggml's name for it."""

    name: str
    block: int  # how many numbers make a block
    size: int  # bytes of a block


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

GGML_TYPES = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
}
NUMBER_OF = {ggml_type.name: number for number, ggml_type in GGML_TYPES.items()}


def dequantize(data: Tensor, ggml_type: GGMLType) -> Tensor:
    """Unpack rows of whole blocks, uint8 (rows, bytes), to float32 (rows, numbers).

    Raises ImportError naming the extra where the type is a rare one and the gguf package is absent.
    """
    unpack = _UNPACK.get(ggml_type.name)
    if unpack is None:
        return _by_package(data, ggml_type)
    return unpack(data.reshape(-1, ggml_type.size)).view(len(data), -1)


def _by_package(data: Tensor, ggml_type: GGMLType) -> Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize as unpack
    except ImportError:
        raise ImportError(
            f"weights of type {ggml_type.name} are unpacked by the gguf package: "
            "pip install -e '.[gguf]'"
        ) from None
    return torch.from_numpy(unpack(data.numpy(), GGMLQuantizationType[ggml_type.name]))


# --- unpacking: blocks (n, bytes) to float32 (n, numbers) -----------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 (n, 1)."""
    return blocks[:, at : at + 2].clone().view(torch.float16).float()


def _planes(data: Tensor, width: int, bits: int) -> Tensor:
    """Unpack numbers of `bits` bits: of every `width` bytes first the lowest bits of all, then the
    next ones, and so on.

    (n, groups * width) -> uint8 (n, groups * 8 / bits, width). Shifts as many bytes at once as it
    can.
    """
    word, size = (torch.int64, 8) if width % 8 == 0 else (torch.uint8, 1)
    mask = int.from_bytes(bytes([2**bits - 1]) * size, "little")
    words = data.clone(memory_format=torch.contiguous_format).view(word)
    words = words.view(len(data), -1, width // size)
    planes = [(words >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(planes, 2).view(-1).view(torch.uint8).view(len(data), -1, width)


def _bits32(data: Tensor) -> Tensor:
    """The 32 bits of 4 bytes, lowest first, as uint8 (n, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((data[:, :, None] >> shifts) & 1).view(len(data), 32)


def _q4_0(blocks: Tensor) -> Tensor:
    q = _planes(blocks[:, 2:], 16, 4).view(-1, 32)
    return q.float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    q = _planes(blocks[:, 4:], 16, 4).view(-1, 32)
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    q = _planes(blocks[:, 6:], 16, 4).view(-1, 32)
    q |= _bits32(blocks[:, 2:6]) << 4
    return q.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    q = _planes(blocks[:, 8:], 16, 4).view(-1, 32)
    q |= _bits32(blocks[:, 4:8]) << 4
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = (_half(blocks, 80) * (scales & 15)).unsqueeze(-1)  # (n, 16, 1)
    least = (_half(blocks, 82) * (scales >> 4)).unsqueeze(-1)
    q = _planes(blocks[:, 16:80], 32, 2).view(-1, 16, 16)
    return q.float().mul_(scale).sub_(least).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    low, high = _planes(blocks[:, 96:104], 8, 4), _planes(blocks[:, 104:108], 4, 2)
    scales = low.view(-1, 16) | (high.view(-1, 16) << 4)
    scale = (_half(blocks, 108) * scales.float().sub_(32)).unsqueeze(-1)  # (n, 16, 1)
    q = _planes(blocks[:, 32:96], 32, 2).view(-1, 256)
    q |= _planes(blocks[:, :32], 32, 1).view(-1, 256) << 2  # where the bit is absent, minus 4
    return q.float().sub_(4).view(-1, 16, 16).mul_(scale).view(-1, 256)


def _scales_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's 8 scales and 8 minima (n, 8, 1) of 6 bits each, packed in 12 bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), 1)
    scale, least = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return scale.unsqueeze(-1), least.unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, least = _scales_k(blocks)
    q = _planes(blocks[:, 16:], 32, 4)  # (n, 8, 32)
    return q.float().mul_(scale).sub_(least).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, least = _scales_k(blocks)
    q = _planes(blocks[:, 48:], 32, 4)  # (n, 8, 32)
    q |= _planes(blocks[:, 16:48], 32, 1) << 4
    return q.float().mul_(scale).sub_(least).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 192:208].view(torch.int8)
    scale = (_half(blocks, 208) * scales).unsqueeze(-1)  # (n, 16, 1)
    q = _planes(blocks[:, :128], 64, 4).view(-1, 256)
    q |= _planes(blocks[:, 128:192], 32, 2).view(-1, 256) << 4
    return q.float().sub_(32).view(-1, 16, 16).mul_(scale).view(-1, 256)


_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _levels(q: Tensor) -> Tensor:
    """Look up q (uint8, below 16) in IQ4's table, as float32."""
    table = bytes(level % 256 for level in _LEVELS).ljust(256, b"\0")
    numbers = bytearray(q.numpy()).translate(table)  # the fastest of all ways to look up a byte
    return torch.frombuffer(numbers, dtype=torch.int8).view(q.shape).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    q = _planes(blocks[:, 2:], 16, 4).view(-1, 32)
    return _levels(q).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = _planes(blocks[:, 4:8], 1, 4).view(-1, 8)
    high = _planes(blocks[:, 2:4], 1, 2).view(-1, 8)
    scales = (low | (high << 4)).float().sub_(32)
    scale = (_half(blocks, 0) * scales).unsqueeze(-1)  # (n, 8, 1)
    q = _planes(blocks[:, 8:], 16, 4).view(-1, 8, 32)
    return _levels(q).mul_(scale).view(-1, 256)


_UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


# --- packing --------------------------------------------------------------------------------------


def quantize(rows: Tensor, ggml_type: GGMLType) -> Tensor:
    """Pack float32 (rows, numbers) to uint8 (rows, bytes), in Q8_0 or Q4_0, rounded as ggml
    does."""
    blocks = rows.reshape(-1, ggml_type.block)
    packed = _pack_q8_0(blocks) if ggml_type.name == "Q8_0" else _pack_q4_0(blocks)
    return packed.view(len(rows), -1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _pack_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127  # (n, 1)
    x = blocks * _inverse(scale)
    whole = x.abs().floor()
    q = (whole + (2 * (x.abs() - whole)).floor()) * x.sign()  # halves away from zero
    return torch.cat((_half_bytes(scale), q.to(torch.int8).view(torch.uint8)), 1)


def _pack_q4_0(blocks: Tensor) -> Tensor:
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = extreme / -8  # (n, 1): the number furthest from zero becomes -8
    q = (blocks * _inverse(scale) + 8.5).to(torch.uint8).clamp_(0, 15)
    return torch.cat((_half_bytes(scale), q[:, :16] | (q[:, 16:] << 4)), 1)


def _half_bytes(scale: Tensor) -> Tensor:
    return scale.to(torch.float16).view(torch.uint8)
