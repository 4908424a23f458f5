"""Llama, the model: pure mathematics on the tensors it is given.

Tokens become vectors (tok_embeddings); each block adds to them what attention finds in earlier
tokens and what a gated feed-forward network makes of the result; a last norm and one matrix turn
them into logits. Nothing here knows files, devices, text or sampling.

The surprising thing: no batch dimension and no padding. `forward_flat` takes the tokens of all
sequences in one row, and a `Batch` says where each sequence lies and where its keys are cached.

Letters: N tokens in a flat batch, D dim, H query heads and K key/value heads of this rank, G = H/K,
E head size, V vocabulary, M wanted logits, L keys, R one-token sequences, B x S Meta's rectangle.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from llama.args import ModelArgs as ModelArgs
from llama.args import RopeScaling as RopeScaling
from llama.cache import Batch, KVCache, Prefill
from llama.parallel import ONE, Ranks, column_linear, embedding, output_linear, row_linear


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each rotary pair (E/2,), float32.

    Rotary embedding: Su et al. 2021 (arXiv 2104.09864). The scaling of Llama 3.1 (arXiv
    2407.21783; constants as released): wavelengths longer than original_context / low_freq_factor
    are stretched by `factor`, shorter than original_context / high_freq_factor stay, between them
    linearly blended.
    """
    exponents = torch.arange(0, args.head_dim, 2, device="cpu").float() / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    scaling = args.rope_scaling
    if scaling is None:
        return freqs
    if scaling.factors is not None:
        return freqs / torch.tensor(scaling.factors, device="cpu")
    periods = scaling.original_context * freqs / (2 * math.pi)  # within the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn each interleaved pair (2i, 2i+1) of x (N, heads, E), read as a complex number, by
    `freqs_cis` (N, 1, E/2), complex64."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 inside (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def attend_prefill(q: Tensor, k: Tensor, v: Tensor, group: Prefill) -> Tensor:
    """Causal attention of B equally long sequences: q (B, H, S, E), k and v (B, K, L, E).

    Where torch has no kernel for grouped heads it would build all S x L scores on CUDA; so the keys
    are repeated there. Its flash kernel is called by name where a sequence continues: it sees the
    last S of L positions, which torch's function says only by a mask whose import takes seconds.
    """
    groups, begins = q.shape[1] // k.shape[1], group.slot is None
    grouped = begins and q.dtype != torch.float32
    if q.is_cuda and q.shape[-1] % 8 == 0:
        grouped = can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True))
        if grouped and not begins:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, is_causal=True)[0]  # type: ignore[no-any-return]
    if groups > 1 and not grouped:
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=group.mask, is_causal=begins, enable_gqa=groups > 1
    )


def attend_decode(q: Tensor, cache: KVCache, layer: int, batch: Batch) -> Tensor:
    """Attention of the one-token sequences, q (R, H, E) -> (R, H, E).

    The query heads that share a key head become rows of one product, so that each key is read once.
    It runs over the whole span of their slots, as a view: a slot in between costs time, no copy.
    """
    k, v = cache.read(layer, *batch.span, batch.longest)  # (slots, K, L, E)
    rows = q.view(len(q), k.shape[1], -1, q.shape[-1])  # (R, K, G, E)
    if batch.slot_in_span is not None:
        rows = rows.new_zeros(k.shape[0], *rows.shape[1:]).index_copy(0, batch.slot_in_span, rows)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=batch.mask)
    return (out if batch.slot_in_span is None else out[batch.slot_in_span]).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query attention over the tokens of a flat batch and the keys cached before them."""

    def __init__(self, args: ModelArgs, layer: int, ranks: Ranks) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        heads = args.n_heads // ranks.size * args.head_dim
        kv_heads = max(1, args.n_kv_heads // ranks.size) * args.head_dim
        self.wq = column_linear(args.dim, heads, ranks)
        self.wk = column_linear(args.dim, kv_heads, ranks)
        self.wv = column_linear(args.dim, kv_heads, ranks)
        self.wo = row_linear(heads, args.dim, ranks)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, cache_index: Tensor | None, batch: Batch,
        cache: KVCache | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = (w(x).view(len(x), -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)  # (N, H, E), (N, K, E)
        parts = []
        if cache is not None and cache_index is not None:
            cache.write(self.layer, k, v, cache_index)
            if batch.ones:
                parts.append(attend_decode(q[: batch.ones], cache, self.layer, batch))
        for group in batch.prefills:
            queries, keys, values = (
                t[group.rows].view(group.sequences, -1, *t.shape[1:]).transpose(1, 2)
                for t in (q, k, v)
            )  # (B, H or K, S, E)
            if cache is not None and group.slot is not None:
                keys, values = cache.read(self.layer, group.slot, group.slot + 1, group.length)
            parts.append(attend_prefill(queries, keys, values, group).transpose(1, 2).flatten(0, 1))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)  # (N, H, E)
        return self.wo(joined.flatten(1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs, ranks: Ranks) -> None:
        super().__init__()
        hidden = args.hidden_dim // ranks.size
        self.w1 = column_linear(args.dim, hidden, ranks)
        self.w2 = row_linear(hidden, args.dim, ranks)
        self.w3 = column_linear(args.dim, hidden, ranks)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int, ranks: Ranks) -> None:
        super().__init__()
        self.attention = Attention(args, layer, ranks)
        self.feed_forward = FeedForward(args, ranks)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, cache_index: Tensor | None, batch: Batch,
        cache: KVCache | None,
    ) -> Tensor:  # fmt: skip
        x = x + self.attention(self.attention_norm(x), freqs_cis, cache_index, batch, cache)
        return x + self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The model of one rank. Module names are the names of the tensors in Meta's files.

    The weights of a new one are whatever memory held: load them, or initialise them to train.
    """

    freqs: Tensor

    def __init__(self, params: ModelArgs, ranks: Ranks = ONE) -> None:
        super().__init__()
        if params.vocab_size <= 0:
            raise ValueError(f"vocab_size={params.vocab_size}: set it to the tokenizer's n_words")
        if ranks.size not in params.rank_counts():
            raise ValueError(
                f"this model cannot be cut into {ranks.size} ranks (n_heads {params.n_heads}, "
                f"n_kv_heads {params.n_kv_heads}, hidden size {params.hidden_dim}); these numbers "
                f"work: {params.rank_counts()}"
            )
        self.params = params
        self.ranks = ranks
        self.cache: KVCache | None = None  # for forward(); an engine brings its own
        vocab = -(-params.vocab_size // ranks.size)  # the last rank's rows may be padding
        self.tok_embeddings = embedding(vocab, params.dim, ranks)
        self.layers = nn.ModuleList(
            TransformerBlock(params, layer, ranks) for layer in range(params.n_layers)
        )
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = output_linear(params.dim, vocab, ranks)
        if params.tied:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("freqs", rope_frequencies(params), persistent=False)

    def hidden(
        self, tokens: Tensor, positions: Tensor, batch: Batch, cache: KVCache | None = None
    ) -> Tensor:
        """The normed states (N, D) that `logits` reads; arguments as in `forward_flat`."""
        angles = positions[:, None, None].float() * self.freqs  # (N, 1, E/2)
        scaling = self.params.rope_scaling
        length = 1.0 if scaling is None else scaling.attention_factor
        freqs_cis = torch.polar(torch.full_like(angles, length), angles)
        cache_index = None if cache is None else cache.index_of(batch, positions)
        h = self.tok_embeddings(tokens)  # (N, D)
        for layer in self.layers:
            h = layer(h, freqs_cis, cache_index, batch, cache)
        return self.norm(h)  # type: ignore[no-any-return]

    def logits(self, h: Tensor) -> Tensor:
        """Logits (M, V) of states (M, D), float32 from the product on."""
        return self.output(h)[..., : self.params.vocab_size]  # type: ignore[no-any-return]

    def forward_flat(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: Batch,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits (M, V), float32, at the rows `logits_at` (M,) of a flat batch; None means all
        rows.

        tokens (N,) and positions (N,) are int64; `batch` says which rows form which sequence. With
        a cache, new keys are stored there and earlier ones read from it. Without one, sequences
        begin in this call, and the result is differentiable: for training and scoring.
        """
        h = self.hidden(tokens, positions, batch, cache)
        return self.logits(h if logits_at is None else h[logits_at])

    def forward(self, tokens: Tensor, start_pos: int = 0) -> Tensor:
        """Meta's call: tokens (B, S) that continue at `start_pos` -> logits (B, S, V), float32.

        Borrows slots 0..B-1 of a cache made at the first call from params.max_batch_size and
        max_seq_len. Raises ValueError where the rectangle does not fit in it.
        """
        size, length = tokens.shape
        limits = (self.params.max_batch_size, self.params.max_seq_len)
        if size > limits[0] or start_pos < 0 or start_pos + length > limits[1]:
            raise ValueError(
                f"tokens of shape {(size, length)} at start_pos {start_pos} do not fit in "
                f"(max_batch_size, max_seq_len) = {limits}"
            )
        if self.cache is None:
            self.cache = self.new_cache(*limits)
        self.cache.follow(self.norm.weight)
        batch = Batch([length] * size, [start_pos + length] * size, range(size), tokens.device)
        positions = torch.arange(start_pos, start_pos + length, device=tokens.device).repeat(size)
        return self.forward_flat(tokens.flatten(), positions, batch, self.cache).view(
            size, length, -1
        )

    def new_cache(self, n_slots: int, max_seq_len: int) -> KVCache:
        """A cache for this rank's heads, in the weights' dtype, where the weights are."""
        args = self.params
        like = self.norm.weight
        kv_heads = max(1, args.n_kv_heads // self.ranks.size)
        return KVCache(
            args.n_layers, n_slots, kv_heads, max_seq_len, args.head_dim, like.dtype, like.device
        )
