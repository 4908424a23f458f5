"""Products of a few rows with a weight, at the speed at which the weight can be read.

This file launches three kernels, each of which reads a weight once: gemv.py for one row,
gemm_sm90.py for several on Hopper, gemm.py for everything else. They share what becomes of a
product (epilogues.py). It knows no layers. The surprising thing: there is no choice of a kernel at
run time; what a weight is and how many rows there are say which, and tuning.py with which blocks.

Letters: R rows, N outputs, K inputs, H query heads, E head size.
"""

import torch
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import INTERPRETED, capability, launch, multiprocessors_and_memory, overlap
from llama.cuda.products.epilogues import (
    ADD,
    GATE,
    ROTATE,
    STORE,
    Destination,
    Epilogue,
    Rotation,
    SplitK,
)
from llama.cuda.products.gemm import gemm
from llama.cuda.products.gemm_sm90 import gemm_sm90
from llama.cuda.products.gemm_sm90_layouts import WARPS, gemm_sm90_shape, rows_memory
from llama.cuda.products.gemv import Norm, gemv
from llama.cuda.products.gemv_layouts import GemvShape, block_k_of, gemv_shape, shared_memory
from llama.cuda.products.gluon import TensorDescriptor, tma_descriptor
from llama.cuda.tuning import (
    Blocks,
    GemmSm90,
    Gemv,
    fitted_gemm,
    gemm_blocks,
    gemm_sm90_blocks,
    gemv_blocks,
)
from llama.cuda.weights import INT4, PLAIN, Source, Weight, kind_of, source

__all__ = ["ADD", "GATE", "ROTATE", "STORE", "Products", "Rotation"]

# What gemm_sm90.py multiplies. The interpreter takes the bits of bfloat16 for integers.
SM90_DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
LEAST = 1024  # inputs from which on a row is worth a pipeline


class Products:
    """Launches the products of one device with rows of `dtype`, and holds the scratch of those
    whose sum several programs share."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.extra = overlap(device)
        self.capability = capability(device)
        self.multiprocessors, self.shared = multiprocessors_and_memory(device)
        self.split_k = SplitK(
            torch.empty(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)
        )

    # ---- which kernel

    def can_use_sm90(self, weight: Weight, whole: bool = False) -> bool:
        """Whether gemm_sm90.py can multiply several rows with it. `whole`: their sums can't be left
        as partials, so that of plain numbers there must be tiles for most multiprocessors."""
        enough = not whole or weight.shape[0] >= 192 * self.multiprocessors
        return (
            (INTERPRETED or self.capability[0] == 9)
            and self.dtype == SM90_DTYPE
            and weight.shape[1] % 128 == 0
            and (enough if isinstance(weight, Tensor) else weight.format.group in (0, 64))
        )

    def blocks(self, rows: int, weight: Weight, sm90: bool = False, gated: bool = False) -> Blocks:
        """The blocks of a product; their class says which kernel it is."""
        (outputs, inputs), kind = weight.shape, kind_of(weight)
        if sm90:
            return gemm_sm90_blocks(
                rows, outputs, inputs, kind, self.multiprocessors, gated, self.shared
            )
        if rows == 1 and inputs >= LEAST and self._can_use_gemv(weight):
            return self._fitting(weight, gemv_blocks(outputs, inputs, kind, self.multiprocessors))
        some, group = gemm_blocks(rows, outputs, inputs, kind), source(weight).group
        return fitted_gemm(some, kind, group, self.dtype.itemsize, self.capability, self.shared)

    def fuses_norm(self, rows: int, weight: Weight) -> bool:
        """Whether a product norms its inputs itself, rather than a kernel before it: where each
        program has all of them."""
        blocks = self.blocks(rows, weight)
        return isinstance(blocks, Gemv) and blocks.split == 1

    def _can_use_gemv(self, weight: Weight) -> bool:
        """Whether rows of numbers and of pairs can be copied in words of 16 bytes."""
        read = source(weight)
        copied = [read.weight]
        if read.group:
            copied.append(read.scale.view(len(read.weight), -1))
        words = all(t.stride(0) * t.itemsize % 16 == t.data_ptr() % 16 == 0 for t in copied)
        return self.dtype.itemsize == 2 and words and read.group in (0, 32, 64, 128)

    def _fitting(self, weight: Weight, blocks: Gemv) -> Gemv:
        """The blocks with fewer stages, then with more programs for a sum, then smaller ones, on
        GPUs that have less memory than the one that was measured."""
        read, inputs = source(weight), weight.shape[1]
        while shared_memory(read, inputs, blocks) > self.shared - 1024:
            if blocks.stages > 2:
                blocks = blocks._replace(stages=blocks.stages - 1)
            elif block_k_of(read, blocks) * blocks.split < min(inputs, 8192 * blocks.split):
                blocks = blocks._replace(split=2 * blocks.split)
            elif blocks.slices > 1:
                blocks = blocks._replace(slices=blocks.slices // 2)
            elif blocks.block_n > 16:
                blocks = blocks._replace(block_n=blocks.block_n // 2)
            else:
                break
        return blocks

    # ---- the product

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        epilogue: tl.constexpr = STORE,
        *,
        norm: tuple[Tensor, float] | None = None,
        rotation: Rotation | None = None,
        sm90: bool = False,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """x (R, K) times weight (N, K), and the epilogue, into `out`, which is returned.

        STORE: out (R, N), of any float dtype. ADD: added to out (R, N). GATE: the weight is w1 over
        w3, out (R, N / 2) is silu(w1 x) * w3 x. ROTATE: the weight is wq over wk over wv, out (R,
        H, E) are the rotated queries, and `rotation` says where keys and values go. `norm` (weight,
        eps) is that of x, for products of which `fuses_norm` says so. `sm90`: by gemm_sm90.py, if
        `can_use_sm90` says so; STORE and GATE only, see `partials`. Packed weights are read as they
        are; gemm_sm90.py wants, and gates, numbers that lie as epilogues.arranged_place says if the
        weight is packed. `blocks` overrules the tables of tuning.py.
        """
        outputs = weight.shape[0]
        blocks = blocks or self.blocks(len(x), weight, sm90, epilogue is GATE)
        if isinstance(blocks, GemmSm90):
            assert epilogue in (STORE, GATE), epilogue
            self._gemm_sm90(x, weight, out, epilogue, blocks._replace(split=1))
            return out
        does, longest = Epilogue(epilogue.value), 0
        if rotation is not None:
            longest, kv_heads, size = rotation.k.shape[1:]
            heads = outputs // size - 2 * kv_heads
            does = Epilogue(epilogue.value, heads, kv_heads, size)
        tiles = self.reserve(outputs, blocks)
        rotation = rotation or Rotation(x, x, x, x, x, x)
        to = Destination(outputs, out, self.split_k, rotation, longest)
        if isinstance(blocks, Gemv):
            self._gemv(x, weight, norm, blocks, to, does)
        else:
            assert norm is None, blocks
            read = source(weight)
            launch(gemm, (tiles, blocks.split))(
                x, read.weight, read.scale, len(x), to, K=x.shape[1], KIND=read.kind,
                GROUP=read.group, BLOCKS=blocks, EPILOGUE=does, num_warps=blocks.warps,
                **self.extra,
            )  # fmt: skip
        return out

    def partials(self, x: Tensor, weight: Weight, blocks: GemmSm90 | None = None) -> Tensor:
        """x (R, K) times weight (N, K), by gemm_sm90.py, as partials of split-K: (S, R, N) float32,
        which whoever reads them adds up. They are scratch, up to the next product."""
        rows, outputs = len(x), weight.shape[0]
        chosen = blocks or self.blocks(rows, weight, True)
        assert isinstance(chosen, GemmSm90), chosen
        self.reserve(outputs, chosen)
        numbers = chosen.split * rows * outputs
        out = self.split_k.partials[:numbers].view(chosen.split, rows, outputs)
        self._gemm_sm90(x, weight, out, STORE, chosen)
        return out

    def _gemm_sm90(
        self, x: Tensor, weight: Weight, out: Tensor, epilogue: tl.constexpr, blocks: GemmSm90
    ) -> None:
        read, (outputs, inputs) = source(weight), weight.shape
        assert inputs % (blocks.block_k * blocks.split) == 0, (inputs, blocks)
        gated, n, k = epilogue is GATE, blocks.block_n, blocks.block_k
        assert not gated or read.kind != PLAIN or n == 128, blocks
        registers, average = _registers(blocks, read.kind == PLAIN)
        shape = gemm_sm90_shape(read, inputs, blocks, gated, registers)
        launch(gemm_sm90, (-(-outputs // (2 * n)), blocks.split))(
            TensorDescriptor.from_tensor(x, [blocks.padded, k], rows_memory()),
            tma_descriptor(_bytes(read.weight), shape.halves, n, shape.columns), read.scale, len(x),
            outputs, out, SHAPE=shape, EPILOGUE=epilogue, num_warps=WARPS.value, maxnreg=average,
            **self.extra,
        )  # fmt: skip

    def _gemv(
        self,
        x: Tensor,
        weight: Weight,
        norm: tuple[Tensor, float] | None,
        blocks: Gemv,
        to: Destination,
        does: Epilogue,
    ) -> None:
        assert norm is None or blocks.split == 1, blocks
        read, (outputs, inputs) = source(weight), weight.shape
        tiles = -(-outputs // blocks.block_n)
        tma, gated = self.capability >= (9, 0), does.op == GATE.value
        shape = gemv_shape(read, inputs, blocks, gated, norm is not None, tma)
        w, scale = _operands(read, shape) if tma else (_bytes(read.weight), read.scale)
        most = max(1, blocks.programs * self.multiprocessors // blocks.split)
        launch(gemv, (min(tiles, most) * blocks.split,))(
            x, w, scale, Norm(*(norm or (x, 0.0))), to, SHAPE=shape, EPILOGUE=does,
            num_warps=blocks.warps, **self.extra,
        )  # fmt: skip

    def reserve(self, outputs: int, blocks: Blocks) -> int:
        """Have scratch for such a product, one of `partials` if it is gemm_sm90.py's; returns the
        tiles that it has. A captured product keeps the addresses it was given, so what is captured
        must be reserved before."""
        tiles = -(-outputs // blocks.block_n)
        shared = blocks.split > 1 or isinstance(blocks, GemmSm90)
        numbers = tiles * blocks.split * blocks.block_n * blocks.padded if shared else 0
        partials, arrived = self.split_k
        if partials.numel() < numbers:
            partials = partials.new_empty(numbers)
        if arrived.numel() < tiles:
            arrived = arrived.new_zeros(tiles)
        self.split_k = SplitK(partials, arrived)
        return tiles


def _operands(read: Source, shape: GemvShape) -> tuple[object, object]:
    """A weight of gemv.py and its scales, described to the copy engine if it brings them."""
    w = tma_descriptor(_bytes(read.weight), shape.halves, shape.block_n, shape.columns)
    if read.kind != INT4:
        return w, read.scale
    pairs = read.scale.view(len(read.weight), -1)
    return w, tma_descriptor(pairs, shape.halves, shape.block_n, shape.slices)


def _registers(blocks: GemmSm90, plain: bool) -> tuple[int, int]:
    """Registers of a thread of a consumer, and of all on average: as few as do, so that kernels
    before and after have room on the same multiprocessor."""
    few = blocks.block_n == 64 or plain
    consumer = 104 if blocks.programs == 2 else 168 if few else 232
    return consumer, -(-(2 * consumer + 24) // 24) * 8  # a third of the warps has 24, in steps of 8


def _bytes(weight: Tensor) -> Tensor:
    """fp8 as what it is packed in."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
