"""Keys and values by slot and position, and the map of a flat batch onto them.

Everything is allocated once, from max_batch_size and max_seq_len. This file knows neither tokens
nor attention: it stores what it is given and hands out views. The surprising thing: a slot is
never cleared between two sequences, because nobody reads past the length that a Batch states. It
must hold finite numbers all the same, since a masked key still meets a weight of zero; hence
`forget`.

Letters: N rows of a flat batch, A layers, P slots, K key/value heads, T positions, E head size,
R sequences that bring one token, S slots they span, L the longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefill:
    """Sequences that share one causal attention: equally long ones that begin in this batch, or one
    that continues what is in its slot."""

    rows: slice
    sequences: int
    length: int  # keys each has after this batch
    slot: int | None  # where the earlier keys are; None: there are none
    device: torch.device | str

    @cached_property
    def mask(self) -> Tensor | None:
        """(S, L): query i sees keys 0..L-S+i; None: as many keys as queries. Made when asked, since
        it is as large as the scores of one head, and where a kernel does without nobody does."""
        if self.slot is None:
            return None
        queries = (self.rows.stop - self.rows.start) // self.sequences
        mask = torch.ones(queries, self.length, dtype=torch.bool, device=self.device)
        return mask.tril(self.length - queries)


class Batch:
    """Which rows of a flat batch belong to which sequence.

    Sequence i brings `counts[i]` new tokens, which lie one after the other in the batch, and has
    `lengths[i]` keys once they are in its slot `slots[i]`. Sequences of one token come first: they
    share one attention over the cache, the others form `prefills`. Without `slots` no cache is
    meant, and every sequence begins here.
    """

    def __init__(
        self,
        counts: Sequence[int],
        lengths: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.counts = list(counts)
        self.lengths = list(counts if lengths is None else lengths)
        self.starts = [0, *accumulate(self.counts)]
        both = list(zip(self.counts, self.lengths, strict=True))
        assert all(0 < count <= length for count, length in both), both
        self.slots = None if slots is None else list(slots)
        self.ones = 0
        if slots is None:
            assert self.counts == self.lengths, (
                "a sequence that continues needs the slot it began in"
            )
        else:
            self._place(list(slots), device)
        self._device = device

    def _place(self, slots: list[int], device: torch.device | str) -> None:
        """The slot of every row, and what attention over the one-token sequences needs."""
        assert len(set(slots)) == len(self.counts), (slots, self.counts)
        self.ones = next((i for i, c in enumerate(self.counts) if c > 1), len(self.counts))
        assert 1 not in self.counts[self.ones :], ("one-token sequences come first", self.counts)
        rows = [slot for slot, c in zip(slots, self.counts, strict=True) for _ in range(c)]
        self.slot_of_row = torch.tensor(rows, device=device)  # (N,)
        singles, lengths = slots[: self.ones], self.lengths[: self.ones]
        low, high = min(singles, default=0), max(singles, default=-1) + 1
        self.span, self.longest = (low, high), max(lengths, default=0)
        self.slot_in_span = self.mask = None
        if singles != list(range(low, high)):
            self.slot_in_span = self.slot_of_row[: self.ones] - low  # (R,) in the span
        live = dict.fromkeys(range(low, high), 1) | dict(zip(singles, lengths, strict=True))
        if set(live.values()) - {self.longest}:
            keys = torch.arange(self.longest, device=device)
            lives = torch.tensor([live[slot] for slot in range(low, high)], device=device)
            self.mask = (keys < lives[:, None])[:, None, None]  # (high - low, 1, 1, L)

    @cached_property
    def prefills(self) -> list[Prefill]:
        """The sequences of more than one token."""
        slots, prefills = self.slots, []

        def shared(i: int) -> tuple[int, int | None]:
            begins = self.counts[i] == self.lengths[i]
            return self.lengths[i], None if begins or slots is None else slots[i]

        for (length, slot), group in groupby(range(self.ones, len(self.counts)), key=shared):
            ids = list(group)
            rows = slice(self.starts[ids[0]], self.starts[ids[-1] + 1])
            prefills.append(Prefill(rows, len(ids), length, slot, self._device))
        return prefills


class KVCache:
    """Preallocated keys and values of every layer: `k` and `v` are (A, P, T, K, E)."""

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        n_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (n_layers, n_slots, max_seq_len, n_kv_heads, head_dim)
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside it
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def n_slots(self) -> int:
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[2]

    def follow(self, like: Tensor) -> None:
        """Have the dtype and the device of `like`, where a model was moved."""
        self.k, self.v = self.k.to(like), self.v.to(like)

    def index_of(self, batch: Batch, positions: Tensor) -> Tensor:
        """The flat addresses (N,) in a layer at which `write` stores the rows of `batch`, which are
        at `positions` (N,)."""
        return batch.slot_of_row * self.max_seq_len + positions

    def write(self, layer: int, k: Tensor, v: Tensor, cache_index: Tensor) -> None:
        """Store rows `k` and `v` (N, K, E) at `cache_index` (N,), in the cache's dtype: under
        autocast they come in another."""
        self.k[layer].flatten(0, 1).index_copy_(0, cache_index, k.to(self.k.dtype))
        self.v[layer].flatten(0, 1).index_copy_(0, cache_index, v.to(self.v.dtype))

    def read(self, layer: int, lo: int, hi: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of the first `length` keys and values of slots lo..hi-1: (hi - lo, K, length,
        E)."""
        k, v = self.k[layer, lo:hi, :length], self.v[layer, lo:hi, :length]
        return k.transpose(1, 2), v.transpose(1, 2)

    def forget(self, slot: int, length: int | None = None) -> None:
        """Set the first `length` positions of a slot to zeros, all of them where it is None: what
        was in them can no longer reach anybody, not even as NaN."""
        self.k[:, slot, :length].zero_()
        self.v[:, slot, :length].zero_()

    def is_finite(self, slot: int, length: int) -> bool:
        """Whether the first `length` keys and values of a slot are all numbers."""
        for held in (self.k, self.v):
            for layer in held[:, slot, :length]:
                low, high = layer.aminmax()
                if not (low.isfinite() and high.isfinite()):
                    return False
        return True
