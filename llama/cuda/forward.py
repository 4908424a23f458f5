"""The forward of many rows on one GPU: prompts, their chunks, and decodes beside them.

It computes what Transformer.hidden and .logits compute, with the weights that share an input joined
into one product, norms, rotation, cache and gate as one kernel each, and all causal attention in
one launch. It knows no requests. The surprising thing: residuals are added by the products
themselves, which accumulate onto the states in place. Packed weights are unpacked for each product,
a part at a time.

Letters: N rows, D dim, H query heads and K key/value heads, E head size, F hidden size, M wanted
logits, V vocabulary, R one-token sequences, P slots, T positions, X tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama.cache import Batch, KVCache
from llama.cuda.attention.prefill import attend_prefill, tile_table, tiling
from llama.cuda.launch import compile_together, on_its_device
from llama.cuda.norm_rope_gate import rms_norm, rotate_and_store, silu_multiply
from llama.cuda.products.unpack import Dequantizer
from llama.cuda.tuning import largest_power_of_two
from llama.cuda.weights import Weight, pairs_of
from llama.model import Transformer, TransformerBlock, attend_decode
from llama.parallel import float32_product
from llama.quantization.linear import QuantizedEmbedding, QuantizedLinear
from llama.quantization.packed import Packed

# Attention of sequences that bring one token: q (R, H, E), k_layer and v_layer (P, T, K, E),
# slots (R,) int64, lengths (R,) int64, and out (R, H, E), which it writes.
AttendOnes = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], object]


UNPACKED = 2**25  # numbers of a packed matrix that are unpacked at once, at most


def joined(modules: Sequence[nn.Module]) -> Weight:
    """The weights of layers, one below the other: (sum of rows, in).

    The result is a view where they lie so in one storage already. Elsewhere they are copied into a
    new one, and the layers' weights become views of that, so that nothing is held twice. Scales and
    offsets of int4 come to lie side by side, as kernels read them.
    """
    packed = [m.packed for m in modules if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    held = {str(p.format) for p in packed}
    assert not held or (len(held) == 1 and len(packed) == len(modules)), held  # as they are grouped
    weight = _below([module.get_parameter("weight").detach() for module in modules])
    if not packed:
        return _hand_out(modules, weight=weight)["weight"]
    if packed[0].offset is None:
        return Packed(**_hand_out(modules, weight=weight, scale=_below([p.scale for p in packed])))
    pairs = _below([pairs_of(p) for p in packed])
    return Packed(**_hand_out(modules, weight=weight, scale=pairs[..., 0], offset=pairs[..., 1]))


def _hand_out(modules: Sequence[nn.Module], **tensors: Tensor) -> dict[str, Tensor]:
    """Have each module hold its rows of the tensors, by the name of its parameter."""
    for name, tensor in tensors.items():
        held = [module.get_parameter(name) for module in modules]
        parts = torch.split(tensor, [len(parameter) for parameter in held])
        for module, parameter, part in zip(modules, held, parts, strict=True):
            if parameter.data_ptr() != part.data_ptr() or parameter.stride() != part.stride():
                setattr(module, name, nn.Parameter(part, requires_grad=False))
    return tensors


def _below(tensors: Sequence[Tensor]) -> Tensor:
    """Contiguous tensors, joined along their rows: a view if they lie so, or a copy."""
    first, sizes = tensors[0].detach(), [len(tensor) for tensor in tensors]
    starts = accumulate((tensor.nbytes for tensor in tensors), initial=first.data_ptr())
    if all(
        tensor.is_contiguous()
        and tensor.data_ptr() == start
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for tensor, start in zip(tensors, starts, strict=False)
    ):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    bits = [tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor for tensor in tensors]
    return torch.cat(bits).view(first.dtype)  # torch joins no float8


def rows_at_once(weight: Weight) -> int:
    """How many rows of a weight torch multiplies by at once: all of a plain one; of a packed one as
    many as are unpacked, a power of two, since columns of a result that begin anywhere make torch's
    products slow."""
    if isinstance(weight, Tensor):
        return len(weight)
    return min(weight.shape[0], largest_power_of_two(max(1, UNPACKED // weight.shape[1])))


class Block(NamedTuple):
    """The weights of one layer."""

    attention_norm: Tensor  # (D,)
    wqkv: Weight  # ((H + 2K) * E, D)
    wo: Weight  # (D, H * E)
    ffn_norm: Tensor  # (D,)
    w13: Weight  # (2F, D)
    w2: Weight  # (D, F)

    @classmethod
    def of(cls, layer: TransformerBlock) -> "Block":
        attention, feed_forward = layer.attention, layer.feed_forward
        return cls(
            layer.attention_norm.weight.detach(),
            joined([attention.wq, attention.wk, attention.wv]),
            joined([attention.wo]),
            layer.ffn_norm.weight.detach(),
            joined([feed_forward.w1, feed_forward.w3]),
            joined([feed_forward.w2]),
        )

    def products(self) -> tuple[Weight, Weight, Weight, Weight]:
        return self.wqkv, self.wo, self.w13, self.w2


class Step(NamedTuple):
    """What all layers of one forward share."""

    batch: Batch
    cache: KVCache
    cos: Tensor  # (N, E/2) float32
    sin: Tensor
    cache_index: Tensor  # (N,) where each row's keys and values belong
    lengths: Tensor  # (R,) keys of the one-token sequences
    tiles: Tensor | None  # (X, 5) of the others


class FlatForward:
    """Computes `hidden` and `logits` of a Transformer of one rank, by kernels.

    `attend_ones` is the attention of the sequences that bring one token; None means the plain one.
    It is for inference only: there are no gradients, and states are overwritten.
    """

    def __init__(self, model: Transformer, attend_ones: AttendOnes | None = None) -> None:
        assert model.ranks.size == 1, model.ranks
        args = model.params
        self.model = model
        self.attend_ones = attend_ones
        self.heads, self.kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.output = joined([model.output])
        self.table = self.output if args.tied else joined([model.tok_embeddings])
        if args.tied and isinstance(self.output, Packed):
            held = {name: t for name, t in self.output._asdict().items() if t is not None}
            _hand_out([model.tok_embeddings], **held)
        self.blocks = [Block.of(layer) for layer in model.layers]  # type: ignore[arg-type]
        weight = model.norm.weight
        self.device = weight.device
        self.cut = tiling(args.head_dim, weight.dtype, weight.device)
        self.numbers = Dequantizer(self._largest(), weight.dtype, weight.device)
        self.compiled = weight.device.type != "cuda"

    def _largest(self) -> int:
        """The largest number of elements that is unpacked at once."""
        every = [self.output, *(weight for block in self.blocks for weight in block.products())]
        return max(
            (rows_at_once(w) * w.shape[1] for w in every if isinstance(w, Packed)), default=0
        )

    @on_its_device
    @torch.no_grad()
    def hidden(self, tokens: Tensor, positions: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """The normed states (N, D) that `logits` reads; the arguments are Transformer.hidden's."""
        eps = self.model.params.norm_eps
        angles = positions[:, None].float() * self.model.freqs  # (N, E/2)
        freqs_cis = torch.polar(torch.ones_like(angles), angles)  # as in model.py, to the last bit
        step = Step(
            batch,
            cache,
            freqs_cis.real.contiguous(),
            freqs_cis.imag.contiguous(),
            cache.index_of(batch, positions),
            positions[: batch.ones] + 1,
            tile_table(batch, self.heads // self.kv_heads, self.cut.rows),
        )
        x = self.model.tok_embeddings(tokens)  # (N, D)
        h = torch.empty_like(x)
        if not self.compiled:
            # the results mean nothing: torch's products run, kernels do not
            compile_together(lambda: self._layer(h, h, 0, step), x.device)
            self.compiled = True
        for layer in range(len(self.blocks)):
            self._layer(h, x, layer, step)
        return rms_norm(x, self.model.norm.weight, eps, out=h)

    @on_its_device
    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """Logits (M, V) in float32 of states (M, D)."""
        out = torch.empty(len(h), self.output.shape[0], dtype=torch.float32, device=h.device)
        return self.logits_into(h, out)[..., : self.model.params.vocab_size]

    def logits_into(self, h: Tensor, out: Tensor) -> Tensor:
        """Write the products (M, V) of states and the output matrix into `out`, float32."""
        for low, high, some in self.parts(self.output):
            float32_product(h, some, out[:, low:high])
        return out

    def parts(self, weight: Weight) -> Iterator[tuple[int, int, Tensor]]:
        """Rows low to high of a weight, and their plain numbers, until the next is asked for."""
        step = rows_at_once(weight)
        for low in range(0, weight.shape[0], step):
            high = min(low + step, weight.shape[0])
            yield (
                low,
                high,
                self.numbers(weight if isinstance(weight, Tensor) else weight.rows(low, high)),
            )

    def product(self, x: Tensor, weight: Weight, out: Tensor) -> Tensor:
        """The product of x (N, in) and weight (out, in), in `out` (N, out), which is returned."""
        for low, high, some in self.parts(weight):
            torch.mm(x, some.t(), out=out[:, low:high])
        return out

    def add_product(self, into: Tensor, x: Tensor, weight: Weight) -> None:
        """into (N, out) += the product of x (N, in) and weight (out, in), rounded once."""
        for low, high, some in self.parts(weight):
            into[:, low:high].addmm_(x, some.t())

    def _layer(self, h: Tensor, x: Tensor, layer: int, step: Step) -> None:
        """Add what a layer computes to x (N, D); h (N, D) is scratch."""
        block, eps = self.blocks[layer], self.model.params.norm_eps
        rms_norm(x, block.attention_norm, eps, out=h)
        self._attention(h, x, layer, block, step)
        rms_norm(x, block.ffn_norm, eps, out=h)
        self._feed_forward(h, x, block)

    def _attention(self, h: Tensor, x: Tensor, layer: int, block: Block, step: Step) -> None:
        """x += attention of h (N, D)."""
        qkv = self.product(h, block.wqkv, h.new_empty(len(h), block.wqkv.shape[0]))
        batch, ones = step.batch, step.batch.ones
        k, v = step.cache.k[layer], step.cache.v[layer]
        q = rotate_and_store(
            qkv, step.cos, step.sin, step.cache_index, k, v, self.heads, self.kv_heads
        )  # (N, H, E)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if ones and self.attend_ones is None:
            out[:ones] = attend_decode(q[:ones], step.cache, layer, batch)
        elif ones and self.attend_ones is not None:
            self.attend_ones(q[:ones], k, v, batch.slot_of_row[:ones], step.lengths, out[:ones])
        if step.tiles is not None:
            attend_prefill(q, k, v, step.tiles, out, self.cut)
        self.add_product(x, out.flatten(1), block.wo)

    def _feed_forward(self, h: Tensor, x: Tensor, block: Block) -> None:
        """x += feed-forward of h (N, D)."""
        both = self.product(h, block.w13, h.new_empty(len(h), block.w13.shape[0]))  # (N, 2F)
        gated = silu_multiply(both, out=both[:, : both.shape[1] // 2])
        self.add_product(x, gated, block.w2)
