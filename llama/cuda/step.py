"""The decode step: one token for every row, from embedding to choice, without the host.

Everything a step reads and writes stays at its address on the device: tokens, positions, slots,
parameters, what ends a row. So a step is captured once as a CUDA graph for each of a few row
counts, and then replayed; the host reads the tokens of one step while the next one runs. It knows
rows, not requests. The surprising thing: a row that is done, or that only fills up a count, has
slot -1: it stores no keys, reads none, and what it computes is looked at by nobody.

Rows may share a slot: several tokens of one sequence at consecutive positions are as many rows. A
lean step chooses by temperature and top_p alone, a full one by everything in SamplingParams.

Letters: R rows, D dim, E head size, T positions of a slot, V vocabulary, S stop ids of a row.
"""

import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from llama.cache import KVCache
from llama.cuda.attention.decode import DecodeAttention
from llama.cuda.forward import FlatForward
from llama.cuda.launch import (
    INTERPRETED,
    allow,
    compile_together,
    launch,
    on_its_device,
    overlap,
    wait,
)
from llama.cuda.layers import Layers
from llama.cuda.sampling.full import Shifts
from llama.cuda.sampling.lean import Sampler
from llama.cuda.tuning import LONG, power_of_two
from llama.cuda.weights import source, table_row
from llama.engine.request import Choice
from llama.model import Transformer
from llama.sampling import SMALLEST_NORMAL, TOP_P_BITS, WORD, SamplingParams

FLIGHTS = 8  # steps whose results nobody has read
STOPS = 32  # stop ids of a row that the device knows; the host knows them all
EXACT = tl.constexpr(not INTERPRETED)  # the interpreter has no libdevice

CAPTURING = threading.Lock()  # a capture begins by waiting for the GPU, which breaks any other one


class RowState(NamedTuple):
    """What a step starts from and leaves for the next one, an int64 for each row."""

    tokens: Tensor  # the last one of each sequence, whose key is not in the cache yet
    positions: Tensor  # of that token
    slots: Tensor  # -1: the row is done
    lengths: Tensor  # keys of the sequence with that token's
    generated: Tensor  # how many tokens of it
    limits: Tensor  # how many may be
    stops: Tensor  # (S, R) ids that end a row, -1 where there are fewer


class Embedding(NamedTuple):
    """The table of embeddings, as `table_row` reads it."""

    table: Tensor
    scale: Tensor | None


class Begun(NamedTuple):
    """What a step begins with, a row each."""

    x: Tensor  # (R, D) embeddings
    cos: Tensor  # (R, E/2) rotary factors of the position
    sin: Tensor
    cache_index: Tensor  # (R,) flat address of the key in the cache, -1: none is stored


class Chosen(NamedTuple):
    """What was chosen, a row each."""

    ids: Tensor
    finite: Tensor  # whether the logits were numbers
    logprob: Tensor  # float32


@triton.jit
def _begin(
    rows, embedding, freqs, begun, T, D: tl.constexpr, HALF: tl.constexpr, D_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program a row: its embedding, the rotary factors of its position, and its address in the
    cache."""
    allow(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    d, i = tl.arange(0, D_PAD), tl.arange(0, HALF_PAD)
    token = tl.load(rows.tokens + row)
    entry = table_row(embedding.table, embedding.scale, token, d, D, KIND, GROUP)
    x = begun.x + row.to(tl.int64) * D
    tl.store(x + d, entry.to(begun.x.dtype.element_ty), mask=d < D)
    slot, position = tl.load(rows.slots + row), tl.load(rows.positions + row)
    angle = position.to(tl.float32) * tl.load(freqs + i, mask=i < HALF, other=0.0)
    c, s = (libdevice.cos(angle), libdevice.sin(angle)) if EXACT else (tl.cos(angle), tl.sin(angle))
    tl.store(begun.cos + row * HALF + i, c, mask=i < HALF)
    tl.store(begun.sin + row * HALF + i, s, mask=i < HALF)
    address = tl.where((slot >= 0) & (position < T), slot * T + position, -1)
    tl.store(begun.cache_index + row, address)


@triton.jit(do_not_specialize=["n"])
def _advance(
    chosen, results, steps, rows, stride, n, T, S: tl.constexpr, R_PAD: tl.constexpr,
    FLIGHTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: results of the first n rows for the host, and what the next step starts from."""
    allow(OVERLAP)
    wait(OVERLAP)
    r = tl.arange(0, R_PAD)
    real = r < n
    token = tl.load(chosen.ids + r, mask=real, other=0)
    slot = tl.load(rows.slots + r, mask=real, other=-1)
    position = tl.load(rows.positions + r, mask=real, other=0)
    count = tl.load(rows.generated + r, mask=real, other=0)
    live = real & (slot >= 0)
    # what the host reads
    step = tl.load(steps)
    out = results + step % FLIGHTS * (3 * stride) + 3 * r
    tl.store(out, token.to(tl.int32), mask=real)
    tl.store(out + 1, tl.load(chosen.finite + r, mask=real, other=0), mask=real)
    logprob = tl.load(chosen.logprob + r, mask=real, other=0.0)
    tl.store(out + 2, logprob.to(tl.int32, bitcast=True), mask=real)
    tl.store(steps, step + 1)
    # which rows end
    stops = rows.stops + tl.arange(0, S)[:, None] * stride + r[None, :]
    ending = tl.load(stops, mask=real[None, :], other=-1)  # (S, R)
    stopped = tl.max((ending == token[None, :]).to(tl.int32), 0) > 0
    limit = tl.load(rows.limits + r, mask=real, other=0)
    ended = stopped | (count + 1 >= limit) | (position + 1 >= T)
    # the next step
    tl.store(rows.tokens + r, token, mask=live)
    tl.store(rows.positions + r, position + 1, mask=live)
    tl.store(rows.generated + r, count + 1, mask=live)
    tl.store(rows.slots + r, tl.where(live & ~ended, slot, -1), mask=real)
    tl.store(rows.lengths + r, tl.where(live & ~ended, position + 2, 0), mask=real)


@dataclass(frozen=True)
class Row:
    """A sequence that wants a token: its last token, where that one's key belongs, and the rest."""

    token: int
    position: int
    slot: int
    generated: Sequence[int]  # so far
    limit: int  # how many it may generate in all
    seed: int
    params: SamplingParams
    stops: Collection[int]

    @property
    def lean(self) -> bool:
        """Whether temperature and top_p say all about it."""
        p = self.params
        shifts = p.presence_penalty or p.frequency_penalty or p.logit_bias
        return not (shifts or p.logprobs or (p.temperature and (p.top_k or p.min_p)))


class Key(NamedTuple):
    """What steps of one graph have in common."""

    rows: int
    top: int | None  # alternatives of a full step; None: a lean one
    long: bool  # whether a row has many keys
    masked: bool
    greedy: bool  # whether a lean one takes the most probable token of every row


class CapturedStep:
    """Steps for up to `max_rows` rows over the slots of `cache`.

    `load` says which rows there are, `launch` runs one step of them, `read` waits for the oldest
    step in flight. Rows whose end the device sees (a stop id, the limit) take no part in later
    steps; of one that ends otherwise `load` must be told.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, max_rows: int, n_words: int | None = None
    ) -> None:
        """Ids from `n_words` on, of rows that no token has, are never chosen."""
        self.cache, self.device, self.max_rows = cache, model.norm.weight.device, max_rows
        self._prepare(model, n_words)

    @on_its_device
    def _prepare(self, model: Transformer, n_words: int | None) -> None:
        args, device, max_rows = model.params, self.device, self.max_rows
        attend = DecodeAttention(max_rows, args.n_heads, args.n_kv_heads, args.head_dim, device)
        self.forward = FlatForward(model, attend)
        self.state = torch.zeros(10 + STOPS, max_rows, dtype=torch.int64, device=device)
        tokens, positions, slots, lengths, generated, limits = self.state[:6]
        rows = RowState(tokens, positions, slots, lengths, generated, limits, self.state[10:])
        self.row_state = rows
        self.layers = Layers(
            self.forward, attend, self.cache, rows.slots, rows.positions, rows.lengths
        )
        self.scratch, self.products = self.layers.scratch, self.layers.products
        self.sampler = Sampler(max_rows, args.vocab_size, device, n_words)
        self.shifts = Shifts(max_rows, args.vocab_size, device, n_words)
        self.sampler.seed, self.sampler.top_p = self.state[6:8].T, self.state[8]
        self.steps = self.state[9, :1]  # how many there were, on the device, as is self.launched
        # in the memory of the host, where a step writes by itself: a copy would hold up the next
        pinned = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        self.results = torch.zeros(FLIGHTS, max_rows, 3, dtype=torch.int32, pin_memory=pinned)
        self.launched = 0
        self.overlap = overlap(device)
        self.graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.masked = self.greedy = False
        self.rows = 0
        self.keys = 0  # of the longest row in the next step
        self.top: int | None = None  # alternatives of a full step; None: a lean one
        self.knows_stops = True  # whether the device sees every stop id of the rows
        self.flight: deque[tuple[Tensor, list[Tensor], torch.cuda.Event | None]] = deque()

    # ---- the face

    @on_its_device
    def load(self, rows: Sequence[Row], masked: bool = False) -> None:
        """Make `rows` those of the following steps. Nothing may be in flight. `masked`: tokens are
        chosen among those that `sampler.mask` allows each row, which may change between steps; for
        rows that are lean."""
        assert not self.flight, len(self.flight)
        assert 0 < len(rows) <= self.max_rows, (len(rows), self.max_rows)
        self.keys = max(row.position for row in rows) + 1
        assert self.keys <= self.cache.max_seq_len, (self.keys, self.cache.max_seq_len)
        self.rows = min(self.max_rows, power_of_two(len(rows)))
        assert not masked or all(row.lean for row in rows), "a mask is for lean rows"
        self.masked = masked
        self.knows_stops = all(len(row.stops) <= STOPS for row in rows)
        columns = [
            [r.token, r.position, r.slot, r.position + 1, len(r.generated), r.limit, r.seed & WORD,
             r.seed >> 32 & WORD, max(1, round(r.params.top_p * 2**TOP_P_BITS)), self.launched,
             *[*r.stops, *[-1] * STOPS][:STOPS]]
            for r in rows
        ]  # fmt: skip
        idle = [0, 0, -1, 0, 0, 0, 0, 0, 2**TOP_P_BITS, self.launched, *[-1] * STOPS]
        columns += [idle] * (self.rows - len(rows))
        self._send(self.state[:, : self.rows], torch.tensor(columns).T.contiguous())
        heat = [r.params.temperature and max(r.params.temperature, SMALLEST_NORMAL) for r in rows]
        heat += [0.0] * (self.rows - len(rows))
        self._send(self.sampler.temperature[: self.rows], torch.tensor(heat))
        self.top = None
        if not all(row.lean for row in rows):
            wanted = max(row.params.logprobs or 0 for row in rows)
            self.top = power_of_two(wanted) if wanted else 0
            self.top = min(self.top, self.forward.model.params.vocab_size)
            if self.shifts.reserve(self.top):  # graphs know the address of the one before
                self.graphs = {key: graph for key, graph in self.graphs.items() if key.top is None}
            self.shifts.load([(r.params, r.seed, r.generated) for r in rows], self.rows)
        self.greedy = self.top is None and not any(heat)

    @on_its_device
    def launch(self) -> None:
        """Run one step; it is in flight until it is read."""
        assert len(self.flight) < FLIGHTS, len(self.flight)
        key = Key(self.rows, self.top, self.keys > LONG, self.masked, self.greedy)
        self.keys += 1
        if self.device.type != "cuda":
            self._step(key)
        else:
            if key not in self.graphs:
                with CAPTURING:
                    self._capture(key)
            self.graphs[key].replay()
        results = self.results[self.launched % FLIGHTS, : self.rows]
        self.launched += 1
        tops, done = [], None
        if self.top:
            tops = [t[: self.rows, : self.top] for t in (self.shifts.top_ids, self.shifts.tops)]
        if self.device.type == "cuda":
            tops = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tops
            ]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        else:
            tops = [t.clone() for t in tops]
        self.flight.append((results, tops, done))

    @on_its_device
    def read(self) -> list[Choice]:
        """What the oldest step in flight brought, a row each; waits for that step alone."""
        results, alternatives, done = self.flight[0]
        if done is not None:
            done.synchronize()
        self.flight.popleft()
        ids, finite, bits = results.T
        logprobs = bits.contiguous().view(torch.float32).tolist()
        tops: list[list[tuple[int, float]]] = [[] for _ in logprobs]
        if alternatives:
            both = zip(*(t.tolist() for t in alternatives), strict=True)
            tops = [list(zip(names, values, strict=True)) for names, values in both]
        return [
            Choice(token, logprob, top, bool(fine))
            for token, logprob, top, fine in zip(
                ids.tolist(), logprobs, tops, finite.tolist(), strict=True
            )
        ]

    def drop(self) -> None:
        """Forget what is in flight: its rows are as they were before it, and must be loaded."""
        self.flight.clear()
        self.rows = 0

    # ---- one step

    def _send(self, target: Tensor, source: Tensor) -> None:
        if self.device.type == "cuda":
            source = source.pin_memory()
        target.copy_(source, non_blocking=True)

    def _capture(self, key: Key) -> None:
        """Record the graph of a step. What it needs is compiled and allocated before that by runs
        in which no row has a slot. Other threads may run steps meanwhile, and capture none."""
        kept = self.state.clone()
        self.row_state.slots[: key.rows] = -1
        self.row_state.lengths[: key.rows] = 0
        compile_together(lambda: self._step(key), self.device)
        self._step(key)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(
            graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            self._step(key)
        self.state.copy_(kept)
        self.graphs[key] = graph

    @torch.no_grad()
    def _step(self, key: Key) -> None:
        """Embedding, layers, choice, and what the next step starts from."""
        s, n, model, rows = self.scratch, key.rows, self.forward.model, self.row_state
        dim, half, longest = model.params.dim, model.params.head_dim // 2, self.cache.max_seq_len
        table = source(self.forward.table)
        launch(_begin, (n,))(
            rows, Embedding(table.weight, table.scale), model.freqs,
            Begun(s.x, s.cos, s.sin, s.cache_index), longest, D=dim, HALF=half,
            D_PAD=power_of_two(dim), HALF_PAD=power_of_two(half), KIND=table.kind,
            GROUP=table.group, **self.overlap,
        )  # fmt: skip
        logits = self.layers(n, key.long)
        sampler, index = self.sampler, rows.generated[:n]
        if key.top is None:
            sampler(logits, index, rows=n, masked=key.masked, greedy=key.greedy)
        else:
            self.shifts(logits, index, rows.slots[:n], sampler, key.top)
        launch(_advance, (1,))(
            Chosen(sampler.ids, sampler.finite, sampler.logprob), self.results, self.steps, rows,
            rows.stops.stride(0), n, longest, S=STOPS, R_PAD=max(2, power_of_two(self.max_rows)),
            FLIGHTS=FLIGHTS, **self.overlap,
        )  # fmt: skip
