"""Rounding: a matrix of floats to int8, fp8 or int4, with its scales.

Knows one matrix at a time, on any device; what the bytes mean is in packed.py. The surprising
thing: int4 does not take the range of a group as it is. Clipping the rare large numbers a little
rounds all others finer; which clip is best is searched for each group, without data.

Letters: N rows (outputs), K columns (inputs), G consecutive inputs of a group.
"""

import torch
from torch import Tensor

from llama.quantization.packed import KINDS, Format, Packed, join_nibbles

_CLIPS = (1.0, 0.9, 0.8)  # of the lowest and the highest number of a group
_ROUNDS = 2  # of refits after that
_BLOCK = {"cpu": 2**18}  # numbers that are searched at a time: what fits in a core's cache
_LARGE_BLOCK = 2**22  # on a GPU, whose allocator keeps what was taken once
_TINY = 1e-30  # a scale below this is none


def quantize(matrix: Tensor, format: Format) -> Packed:
    """Pack `matrix` (N, K) of any float dtype, where it lies. A row of int8 and fp8 must be whole.

    Raises ValueError where a number is not finite, since its whole row or group would be lost.
    """
    rows, columns = matrix.shape
    step = max(1, _BLOCK.get(matrix.device.type, _LARGE_BLOCK) // columns)
    out = Packed.zeros(format, rows, columns, matrix.device)
    for low in range(0, rows, step):
        block = matrix[low : low + step].to(torch.float32)
        if not bool(block.isfinite().all()):
            raise ValueError("it has numbers that are not finite, which cannot be quantized")
        packed = _int4(block, format.group) if format.group else _by_row(block, format.kind)
        for target, made in zip(out.rows(low, low + len(block)), packed, strict=True):
            if target is not None and made is not None:
                target.copy_(made)
    return out


def _by_row(block: Tensor, kind: str) -> Packed:
    """Pack to int8 or fp8, to nearest, ties to even: a row's largest number is the largest code."""
    largest = 127.0 if kind == "int8" else torch.finfo(KINDS[kind]).max
    scale = block.abs().amax(1) / largest
    scale = torch.where(scale < _TINY, 1.0, scale)
    scaled = (block / scale[:, None]).clamp_(-largest, largest)
    return Packed((scaled.round_() if kind == "int8" else scaled).to(KINDS[kind]), scale)


# --- int4 -----------------------------------------------------------------------------------------


def _int4(block: Tensor, group: int) -> Packed:
    numbers = block.view(len(block), -1, group)  # (N, K/G, G)
    scale, offset = best_pair(numbers)
    codes = _codes(numbers, scale, offset).to(torch.uint8)
    return Packed(join_nibbles(codes), scale[..., 0].bfloat16(), offset[..., 0].bfloat16())


def best_pair(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (..., 1) with a small sum of squared errors for groups (..., G) in float32.

    For each clip of either end: the pair of that range, codes for it, the least-squares pair for
    these codes. From the best of them on, codes and pair refit each other a few times. All pairs
    are rounded to bfloat16 before they are judged.
    """
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    scale, offset = range_pair(low, high)
    error = _error(numbers, scale, offset)  # of plain rounding: nothing worse is taken
    keep = _Best(numbers, error, scale, offset)
    for bottom in _CLIPS:
        for top in _CLIPS:
            keep.offer(*_refit(numbers, *range_pair(low * bottom, high * top)))
    for _ in range(_ROUNDS):
        keep.offer(*_refit(numbers, keep.scale, keep.offset))
    return keep.scale, keep.offset


def range_pair(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, rounded to bfloat16, that spread the codes from `low` to `high`."""
    return _rounded((high - low) / 15), _rounded(low)


class _Best:
    """The pair with the smallest error so far, for each group."""

    def __init__(self, numbers: Tensor, error: Tensor, scale: Tensor, offset: Tensor) -> None:
        self.numbers, self.error, self.scale, self.offset = numbers, error, scale, offset

    def offer(self, scale: Tensor, offset: Tensor) -> None:
        error = _error(self.numbers, scale, offset)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)


def _rounded(number: Tensor) -> Tensor:
    return number.bfloat16().float()


def _codes(numbers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    inverse = torch.where(scale < _TINY, 0.0, 1 / scale)
    return ((numbers - offset) * inverse).round_().clamp_(0, 15)


def _error(numbers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    missed = _codes(numbers, scale, offset).mul_(scale).add_(offset).sub_(numbers)
    return missed.square_().sum(-1, keepdim=True)


def _refit(numbers: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares pair for the codes that a pair gives: a line through (code, number)."""
    codes = _codes(numbers, scale, offset)
    mean_code, mean = codes.mean(-1, keepdim=True), numbers.mean(-1, keepdim=True)
    codes -= mean_code
    spread = codes.square().sum(-1, keepdim=True)
    slope = _rounded((codes * numbers).sum(-1, keepdim=True) / spread.clamp_min(1e-9))
    return slope, _rounded(mean - slope * mean_code)
