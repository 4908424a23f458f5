"""The layers of a captured step: from the states of its rows to their logits, in three sequences.

A few rows go through products that rotate, gate and add by themselves; on Hopper more rows go
through gemm_sm90.py, whose products leave partial sums for the next kernel to add up; still more
go through torch's products. Knows rows and where their keys are; refuses to know how a row began
and what is made of its logits. The surprising thing: everything is written to memory that was there
before, since a graph knows addresses.

Letters: n rows of a step, D dim, H query heads and K key/value heads, E head size, F hidden size, V
vocabulary, S partial sums.
"""

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.cuda.attention.decode import DecodeAttention
from llama.cuda.forward import Block, FlatForward
from llama.cuda.norm_rope_gate import rms_norm, rotate_and_store, silu_multiply
from llama.cuda.products.dispatch import ADD, GATE, ROTATE, STORE, Products, Rotation
from llama.cuda.tuning import LEAST_ROWS_SM90, MOST_ROWS, MOST_ROWS_SM90
from llama.cuda.weights import Weight, kind_of


def most_rows(weight: Weight, sm90: bool) -> int:
    """How many rows at most our kernels multiply with a weight."""
    return MOST_ROWS_SM90 if sm90 else MOST_ROWS[kind_of(weight)]


class Scratch:
    """What layers hand on to each other, for up to `rows` rows."""

    def __init__(self, forward: FlatForward, rows: int) -> None:
        args, like = forward.model.params, forward.model.norm.weight
        queries = args.n_heads * args.head_dim

        def new(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=like.device)

        self.x, self.normed = new(args.dim), new(args.dim)
        self.qkv = new(queries + 2 * args.n_kv_heads * args.head_dim)
        self.q, self.attended = (new(args.n_heads, args.head_dim) for _ in range(2))
        self.both, self.gated = new(2 * args.hidden_dim), new(args.hidden_dim)
        self.cos, self.sin = (new(args.head_dim // 2, dtype=torch.float32) for _ in range(2))
        self.cache_index = new(dtype=torch.int64)
        self.logits = new(args.vocab_size, dtype=torch.float32)


class Layers:
    """All layers and the output matrix, for up to `max_rows` rows.

    Row r is at positions[r] of slot slots[r] and has lengths[r] keys; its embedding, rotary factors
    and flat address in the cache are in `scratch`. On the GPU that the weights are on.
    """

    def __init__(
        self,
        forward: FlatForward,
        attend: DecodeAttention,
        cache: KVCache,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
    ) -> None:
        self.forward, self.attend, self.cache = forward, attend, cache
        self.slots, self.positions, self.lengths = slots, positions, lengths  # (max_rows,) each
        weight, self.max_rows = forward.model.norm.weight, len(slots)
        self.products = Products(weight.device, weight.dtype)
        self.sm90 = [self._can_use_sm90(block) for block in forward.blocks]
        self.most_rows = [
            min(most_rows(weight, sm90) for weight in block.products())
            for block, sm90 in zip(forward.blocks, self.sm90, strict=True)
        ]
        self._reserve()
        self.scratch = Scratch(forward, self.max_rows)
        self.partials: Tensor | None = None  # what is still to be added to the states, (S, n, D)

    def __call__(self, n: int, long: bool) -> Tensor:
        """Logits (n, V) float32 of the embeddings of the first n rows; `long`: one has many
        keys."""
        self.partials = None
        for layer, block in enumerate(self.forward.blocks):
            if n > self.most_rows[layer]:
                self._many(n, layer, block, long)
            elif self.sm90[layer] and n >= LEAST_ROWS_SM90[kind_of(block.wqkv)]:
                self._few_sm90(n, layer, block, long)
            else:
                self._few(n, layer, block, long)
        return self._logits(n)

    def _reserve(self) -> None:
        """Memory for the products of every row count, before any is captured."""
        every = [(self.forward.output, False)]  # and whether it leaves partial sums
        for block, sm90 in zip(self.forward.blocks, self.sm90, strict=True):
            every += [(weight, sm90 and weight is not block.w13) for weight in block.products()]
        kinds = {(*w.shape, kind_of(w), partials): w for w, partials in every}
        for (*_, partials), weight in kinds.items():
            rows = 1
            while rows <= min(most_rows(weight, partials), self.max_rows * 2 - 1):
                sm90 = partials and rows >= LEAST_ROWS_SM90[kind_of(weight)]
                self.products.reserve(weight.shape[0], self.products.blocks(rows, weight, sm90))
                rows *= 2

    def _can_use_sm90(self, block: Block) -> bool:
        """Whether several rows go through a layer by gemm_sm90.py."""
        wqkv, wo, w13, w2 = every = block.products()
        one = len({isinstance(weight, Tensor) for weight in every}) == 1
        return (
            one
            and self.products.can_use_sm90(w13, True)
            and all(map(self.products.can_use_sm90, (wqkv, wo, w2)))
        )

    def _norm(
        self, n: int, weight: Tensor, of: Weight | None = None, arranged: bool = False
    ) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """The states, normed, or with what the product `of` them norms them by."""
        eps, x = self.forward.model.params.norm_eps, self.scratch.x[:n]
        if of is not None and self.products.fuses_norm(n, of):
            return x, (weight, eps)
        partials, self.partials = self.partials, None
        normed = self.scratch.normed[:n]
        return rms_norm(x, weight, eps, normed, partials=partials, arranged=arranged), None

    def _few(self, n: int, layer: int, block: Block, long: bool) -> None:
        """A layer by products that do what follows them as well."""
        s, k, v = self.scratch, self.cache.k[layer], self.cache.v[layer]
        rotation = Rotation(s.cos, s.sin, self.slots, self.positions, k, v)
        multiply = self.products
        h, norm = self._norm(n, block.attention_norm, block.wqkv)
        multiply(h, block.wqkv, s.q[:n], ROTATE, norm=norm, rotation=rotation)
        self.attend(s.q[:n], k, v, self.slots, self.lengths, s.attended[:n], long)
        multiply(s.attended[:n].flatten(1), block.wo, s.x[:n], ADD)
        h, norm = self._norm(n, block.ffn_norm, block.w13)
        multiply(h, block.w13, s.gated[:n], GATE, norm=norm)
        multiply(s.gated[:n], block.w2, s.x[:n], ADD)

    def _few_sm90(self, n: int, layer: int, block: Block, long: bool) -> None:
        """A layer by products that leave partial sums, which the next kernel adds up."""
        s, k, v, multiply = self.scratch, self.cache.k[layer], self.cache.v[layer], self.products
        heads, kv_heads = self.forward.heads, self.forward.kv_heads
        arranged = not isinstance(block.wqkv, Tensor)
        h, _ = self._norm(n, block.attention_norm, arranged=arranged)
        qkv = multiply.partials(h, block.wqkv)
        rotate_and_store(qkv, s.cos, s.sin, s.cache_index, k, v, heads, kv_heads, out=s.q[:n])
        self.attend(s.q[:n], k, v, self.slots, self.lengths, s.attended[:n], long, arranged)
        self.partials = multiply.partials(s.attended[:n].flatten(1), block.wo)
        h, _ = self._norm(n, block.ffn_norm, arranged=arranged)
        multiply(h, block.w13, s.gated[:n], GATE, sm90=True)
        self.partials = multiply.partials(s.gated[:n], block.w2)

    def _many(self, n: int, layer: int, block: Block, long: bool) -> None:
        """A layer by torch's products, with kernels for the rest."""
        s, k, v = self.scratch, self.cache.k[layer], self.cache.v[layer]
        heads, kv_heads = self.forward.heads, self.forward.kv_heads
        h, _ = self._norm(n, block.attention_norm)
        qkv = self.forward.product(h, block.wqkv, s.qkv[:n])
        rotate_and_store(qkv, s.cos, s.sin, s.cache_index, k, v, heads, kv_heads, out=s.q[:n])
        self.attend(s.q[:n], k, v, self.slots, self.lengths, s.attended[:n], long)
        self.forward.add_product(s.x[:n], s.attended[:n].flatten(1), block.wo)
        h, _ = self._norm(n, block.ffn_norm)
        both = self.forward.product(h, block.w13, s.both[:n])
        silu_multiply(both, out=s.gated[:n])
        self.forward.add_product(s.x[:n], s.gated[:n], block.w2)

    def _logits(self, n: int) -> Tensor:
        """Logits (n, V) float32 of the states."""
        weight, output = self.forward.model.norm.weight, self.forward.output
        sm90 = self.products.can_use_sm90(output, True) and n >= LEAST_ROWS_SM90[kind_of(output)]
        ours = n <= most_rows(output, sm90)
        arranged = ours and sm90 and not isinstance(output, Tensor)
        h, norm = self._norm(n, weight, output if ours else None, arranged)
        logits = self.scratch.logits[:n]
        if ours:
            return self.products(h, output, logits, STORE, norm=norm, sm90=sm90)
        return self.forward.logits_into(h, logits)
