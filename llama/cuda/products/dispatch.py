"""Products of a few rows with a weight, at the speed at which the weight can be read.

Launches three kernels, each of which reads a weight once: stream.py of one row, wide.py of several
on Hopper, tiles.py of everything else. They share what becomes of a product (epilogues.py). Knows
no layers. The surprising thing: there is no choice of a kernel at run time; what a weight is and
how many rows there are say which, and tuning.py with which blocks.

Letters: R rows, N outputs, K inputs, H query heads, E head size.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from llama.cuda.launch import INTERPRETED, capability, launch, multiprocessors_and_memory, overlap
from llama.cuda.products.epilogues import ADD, GATE, ROTATE, STORE, Rotation
from llama.cuda.products.gemm import some_rows
from llama.cuda.products.gemm_sm90 import WARPS, rows_memory, wide
from llama.cuda.products.gemv import shared_memory, stream, turn_of
from llama.cuda.products.gluon import TensorDescriptor, described
from llama.cuda.tuning import (
    Blocks,
    Stream,
    Wide,
    fitted_some_rows,
    some_rows_blocks,
    stream_blocks,
    wide_blocks,
)
from llama.cuda.weights import INT4, PLAIN, Source, Weight, kind_of, source

__all__ = ["ADD", "GATE", "ROTATE", "STORE", "Products", "Rotation"]

# What wide.py multiplies. The interpreter takes the bits of bfloat16 for integers.
WIDE = torch.float16 if INTERPRETED else torch.bfloat16
LEAST = 1024  # inputs from which on a row is worth a ring


class Products:
    """Launches the products of one device with rows of `dtype`, and holds the scratch of those
    whose sum several programs share."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.extra = overlap(device)
        self.capability = capability(device)
        self.multiprocessors, self.shared = multiprocessors_and_memory(device)
        self.partial = torch.empty(0, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    # ---- which kernel

    def is_wide(self, weight: Weight, whole: bool = False) -> bool:
        """Whether wide.py is there for products of several rows with it. `whole`: they can't be
        left in parts, so that of plain numbers there must be tiles for most multiprocessors."""
        enough = not whole or weight.shape[0] >= 192 * self.multiprocessors
        return (
            (INTERPRETED or self.capability[0] == 9)
            and self.dtype == WIDE
            and weight.shape[1] % 128 == 0
            and (enough if isinstance(weight, Tensor) else weight.format.group in (0, 64))
        )

    def blocks(self, rows: int, weight: Weight, wide: bool = False, gated: bool = False) -> Blocks:
        """What a product gets; of which kernel these are says which kernel it is."""
        (outputs, inputs), kind = weight.shape, kind_of(weight)
        if wide:
            return wide_blocks(
                rows, outputs, inputs, kind, self.multiprocessors, gated, self.shared
            )
        if rows == 1 and inputs >= LEAST and self._can_stream(weight):
            return self._fitting(weight, stream_blocks(outputs, inputs, kind, self.multiprocessors))
        some, group = some_rows_blocks(rows, outputs, inputs, kind), source(weight).group
        return fitted_some_rows(
            some, kind, group, self.dtype.itemsize, self.capability, self.shared
        )

    def norms(self, rows: int, weight: Weight) -> bool:
        """Whether a product norms its inputs itself, rather than a kernel before it: where each
        program has all of them."""
        blocks = self.blocks(rows, weight)
        return isinstance(blocks, Stream) and blocks.split == 1

    def _can_stream(self, weight: Weight) -> bool:
        """Rows of numbers and of pairs are copied in words of 16 bytes."""
        read = source(weight)
        copied = [read.weight]
        if read.group:
            copied.append(read.scale.view(len(read.weight), -1))
        words = all(t.stride(0) * t.itemsize % 16 == t.data_ptr() % 16 == 0 for t in copied)
        return self.dtype.itemsize == 2 and words and read.group in (0, 32, 64, 128)

    def _fitting(self, weight: Weight, blocks: Stream) -> Stream:
        """With fewer stages, then with more programs for a sum, then smaller, on GPUs that have
        less memory than the one that was measured."""
        read, inputs = source(weight), weight.shape[1]
        while shared_memory(read, inputs, blocks) > self.shared - 1024:
            if blocks.stages > 2:
                blocks = blocks._replace(stages=blocks.stages - 1)
            elif turn_of(read, blocks) * blocks.split < min(inputs, 8192 * blocks.split):
                blocks = blocks._replace(split=2 * blocks.split)
            elif blocks.runs > 1:
                blocks = blocks._replace(runs=blocks.runs // 2)
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
        wide: bool = False,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """x (R, K) times weight (N, K), and the epilogue, into `out`, which is returned.

        STORE: out (R, N), of any float dtype. ADD: added to out (R, N). GATE: the weight is w1 over
        w3, out (R, N / 2) is silu(w1 x) * w3 x. ROTATE: the weight is wq over wk over wv, out (R,
        H, E) are the rotated queries, and `rotation` says where keys and values go. `norm` (weight,
        eps) is that of x, for products of which `norms` says so. `wide`: by wide.py, if `is_wide`
        says so; STORE and GATE only, see `parts`. Packed weights are read as they are; wide.py
        wants, and gates, numbers that lie as epilogues.arranged_place says if the weight is packed.
        `blocks` overrules the tables of tuning.py.
        """
        rows, inputs = x.shape
        outputs = weight.shape[0]
        blocks = blocks or self.blocks(rows, weight, wide, epilogue is GATE)
        if isinstance(blocks, Wide):
            assert epilogue in (STORE, GATE), epilogue
            self._wide(x, weight, out, epilogue, blocks._replace(split=1))
            return out
        assert norm is None or (isinstance(blocks, Stream) and blocks.split == 1), blocks
        heads, kv_heads, size, longest = 0, 0, 2, 0
        where = (x,) * 6
        if rotation is not None:
            longest, kv_heads, size = rotation.k.shape[1:]
            heads = outputs // size - 2 * kv_heads
            where = (rotation.cos, rotation.sin, rotation.slots, rotation.positions, rotation.k,
                     rotation.v)  # fmt: skip
        tiles, read = self.reserve(outputs, blocks), source(weight)
        to = (out, self.partial, self.arrived, *where, longest)
        shape = dict(K=inputs, EPILOGUE=epilogue, HEADS=heads, KV_HEADS=kv_heads, E=size,
                     BLOCK_N=blocks.block_n, SPLIT=blocks.split, STAGES=blocks.stages,
                     KIND=read.kind, num_warps=blocks.warps, **self.extra)  # fmt: skip
        if isinstance(blocks, Stream):
            self._stream(x, read, norm, outputs, blocks, to, shape)
        else:
            launch(some_rows, (tiles, blocks.split))(
                x, read.weight, read.scale, rows, outputs, *to, RP=blocks.padded,
                BLOCK_K=blocks.block_k, GROUP=read.group, **shape,
            )  # fmt: skip
        return out

    def parts(self, x: Tensor, weight: Weight, blocks: Wide | None = None) -> Tensor:
        """x (R, K) times weight (N, K), by wide.py: (S, R, N) float32, which whoever reads them
        adds up. They are scratch, up to the next product."""
        rows, outputs = len(x), weight.shape[0]
        chosen = blocks or self.blocks(rows, weight, True)
        assert isinstance(chosen, Wide), chosen
        self.reserve(outputs, chosen)
        out = self.partial[: chosen.split * rows * outputs].view(chosen.split, rows, outputs)
        self._wide(x, weight, out, STORE, chosen)
        return out

    def _wide(
        self, x: Tensor, weight: Weight, out: Tensor, epilogue: tl.constexpr, blocks: Wide
    ) -> None:
        read, (outputs, inputs) = source(weight), weight.shape
        assert inputs % (blocks.block_k * blocks.split) == 0, (inputs, blocks)
        halves, n, k = 2 if epilogue is GATE else 1, blocks.block_n, blocks.block_k
        assert halves == 1 or read.kind != PLAIN or n == 128, blocks
        columns = k // 2 if read.kind == INT4 else k
        launch(wide, (-(-outputs // (2 * n)), blocks.split))(
            TensorDescriptor.from_tensor(x, [blocks.padded, k], rows_memory()),
            described(_bytes(read.weight), halves, n, columns), read.scale, len(x), outputs, out,
            K=inputs, RP=blocks.padded, BLOCK_N=n, BLOCK_K=k, SPLIT=blocks.split,
            STAGES=blocks.stages, KIND=read.kind, EPILOGUE=epilogue, num_warps=WARPS.value,
            **_registers(blocks, read.kind == PLAIN), **self.extra,
        )  # fmt: skip

    def _stream(
        self,
        x: Tensor,
        read: Source,
        norm: tuple[Tensor, float] | None,
        outputs: int,
        blocks: Stream,
        to: tuple[Any, ...],
        shape: dict[str, Any],
    ) -> None:
        gain, eps = norm or (x, 0.0)
        w, scale = _bytes(read.weight), read.scale
        ring: list[object] = [w, scale]
        bulk = self.capability >= (9, 0)
        if bulk:
            halves, turn = 2 if shape["EPILOGUE"] is GATE else 1, turn_of(read, blocks)
            columns = turn // 2 if read.kind == INT4 else turn
            ring[0] = described(w, halves, blocks.block_n, columns)
            if read.kind == INT4:
                pairs = scale.view(outputs, -1)
                ring[1] = described(pairs, halves, blocks.block_n, turn // read.group)
        most = max(1, blocks.programs * self.multiprocessors // blocks.split)
        programs = min(-(-outputs // blocks.block_n), most) * blocks.split
        launch(stream, (programs,))(
            x, *ring, gain, eps, outputs, *to, RUNS=blocks.runs, GROUP=read.group,
            NORM=norm is not None, W=blocks.warps, BULK=bulk, **shape,
        )  # fmt: skip

    def reserve(self, outputs: int, blocks: Blocks) -> int:
        """Have scratch for such a product, one in `parts` if it is wide.py's; the tiles that it
        has. A captured product keeps the addresses it was given, so what is captured must be
        reserved before."""
        tiles = -(-outputs // blocks.block_n)
        shared = blocks.split > 1 or isinstance(blocks, Wide)
        numbers = tiles * blocks.split * blocks.block_n * blocks.padded if shared else 0
        if self.partial.numel() < numbers:
            self.partial = self.partial.new_empty(numbers)
        if self.arrived.numel() < tiles:
            self.arrived = self.arrived.new_zeros(tiles)
        return tiles


def _registers(blocks: Wide, plain: bool) -> dict[str, int]:
    """Of a thread that multiplies, and of all on average: as few as do, so that kernels before and
    after have room on the same multiprocessor."""
    few = blocks.block_n == 64 or plain
    multiplying = 104 if blocks.programs == 2 else 168 if few else 232
    most = -(-(2 * multiplying + 24) // 24) * 8  # a third of the warps has 24, in steps of 8
    return {"REGISTERS": multiplying, "maxnreg": most}


def _bytes(weight: Tensor) -> Tensor:
    """fp8 as what it is packed in."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
