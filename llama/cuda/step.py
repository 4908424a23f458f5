"""The decode step: one token for every row, from embedding to choice, without the host.

Everything a step reads and writes stays at its place on the device: tokens, positions, slots,
parameters, what ends a row. So a step is captured once as a CUDA graph for each of a few row
counts, and then replayed; the host reads the tokens of one step while the next one runs. It knows
rows, not requests. The surprising thing: a row that is done, or that only fills up a count, has
slot -1: it stores no keys, reads none, and what it computes is looked at by nobody.

Rows may share a slot: several tokens of one sequence at consecutive positions are as many rows.

Letters: R rows, D dim, H query heads and K key/value heads, E head size, F hidden size, V
vocabulary, S stop ids of a row.
"""

# ruff: noqa: ANN001, ANN202 (arguments of kernels have no types in Python)

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
from llama.cuda.forward import Block, FlatForward
from llama.cuda.launch import (
    INTERPRETED,
    allow,
    compile_together,
    launch,
    on_its_device,
    overlap,
    wait,
)
from llama.cuda.norm_rope_gate import rms_norm, rotate_and_store, silu_multiply
from llama.cuda.products.dispatch import ADD, GATE, ROTATE, STORE, Products, Rotation
from llama.cuda.sampling.full import Shifts
from llama.cuda.sampling.lean import Sampler
from llama.cuda.tuning import LEAST_WIDE, LONG, MOST_ROWS, power_of_two
from llama.cuda.weights import Weight, kind_of, source, table_row
from llama.model import Transformer
from llama.sampling import SMALLEST_NORMAL, TOP_P_BITS, WORD, SamplingParams

FLIGHTS = 8  # steps whose results nobody has read
STOPS = 32  # stop ids of a row that the device knows; the host knows them all
EXACT = tl.constexpr(not INTERPRETED)  # the interpreter has no libdevice

CAPTURING = threading.Lock()  # a capture begins by waiting for the GPU, which breaks any other one


@triton.jit
def _begin(  # type: ignore[no-untyped-def]
    tokens, positions, slots, table, scale, freqs, x, cos, sin, places, T,
    D: tl.constexpr, HALF: tl.constexpr, D_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A row's embedding, the turns of its rotary pairs, and its place in the cache."""
    allow(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    d, i = tl.arange(0, D_PAD), tl.arange(0, HALF_PAD)
    token = tl.load(tokens + row)
    entry = table_row(table, scale, token, d, D, KIND, GROUP)
    tl.store(x + row.to(tl.int64) * D + d, entry.to(x.dtype.element_ty), mask=d < D)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    angle = position.to(tl.float32) * tl.load(freqs + i, mask=i < HALF, other=0.0)
    c, s = (libdevice.cos(angle), libdevice.sin(angle)) if EXACT else (tl.cos(angle), tl.sin(angle))
    tl.store(cos + row * HALF + i, c, mask=i < HALF)
    tl.store(sin + row * HALF + i, s, mask=i < HALF)
    tl.store(places + row, tl.where((slot >= 0) & (position < T), slot * T + position, -1))


@triton.jit(do_not_specialize=["rows"])
def _advance(  # type: ignore[no-untyped-def]
    ids, finite, logprob, results, turn, tokens, positions, slots, lengths, index, limits, stops,
    stride, rows, T, S: tl.constexpr, R_PAD: tl.constexpr, FLIGHTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """What the step brought, for the host; and where the next one is."""
    allow(OVERLAP)
    wait(OVERLAP)
    r = tl.arange(0, R_PAD)
    real = r < rows
    chosen = tl.load(ids + r, mask=real, other=0)
    slot = tl.load(slots + r, mask=real, other=-1)
    position = tl.load(positions + r, mask=real, other=0)
    count = tl.load(index + r, mask=real, other=0)
    live = real & (slot >= 0)
    now = tl.load(turn)
    results += now % FLIGHTS * (3 * stride) + 3 * r
    tl.store(results, chosen.to(tl.int32), mask=real)
    tl.store(results + 1, tl.load(finite + r, mask=real, other=0), mask=real)
    likely = tl.load(logprob + r, mask=real, other=0.0)
    tl.store(results + 2, likely.to(tl.int32, bitcast=True), mask=real)
    tl.store(turn, now + 1)
    ending = tl.load(
        stops + tl.arange(0, S)[:, None] * stride + r[None, :], mask=real[None, :], other=-1
    )  # (S, R)
    stopped = tl.max((ending == chosen[None, :]).to(tl.int32), 0) > 0
    ended = stopped | (count + 1 >= tl.load(limits + r, mask=real, other=0)) | (position + 1 >= T)
    tl.store(tokens + r, chosen, mask=live)
    tl.store(positions + r, position + 1, mask=live)
    tl.store(index + r, count + 1, mask=live)
    tl.store(slots + r, tl.where(live & ~ended, slot, -1), mask=real)
    tl.store(lengths + r, tl.where(live & ~ended, position + 2, 0), mask=real)


def most_rows(weight: Weight, wide: bool) -> int:
    """Of a product with it by our kernels."""
    return MOST_ROWS["wide" if wide else kind_of(weight)]


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


class Outcome(NamedTuple):
    """What a step brought a row."""

    token: int
    finite: bool
    logprob: float
    top: list[tuple[int, float]]


class Key(NamedTuple):
    """What steps of one graph have in common."""

    rows: int
    top: int | None  # alternatives of a full step; None: a lean one
    long: bool  # whether a row has many keys
    masked: bool
    greedy: bool  # whether a lean one takes the most probable token of every row


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
        self.places = new(dtype=torch.int64)
        self.logits = new(args.vocab_size, dtype=torch.float32)


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
        heads, kv_heads = args.n_heads, args.n_kv_heads
        self.attend = DecodeAttention(max_rows, heads, kv_heads, args.head_dim, device)
        self.forward = FlatForward(model, self.attend)
        self.products = Products(device, model.norm.weight.dtype)
        self.wide = [self._is_wide(block) for block in self.forward.blocks]
        self.most_rows = [
            min(most_rows(weight, wide) for weight in block.products())
            for block, wide in zip(self.forward.blocks, self.wide, strict=True)
        ]
        self._reserve()
        self.scratch = Scratch(self.forward, max_rows)
        self.sampler = Sampler(max_rows, args.vocab_size, device, n_words)
        self.shifts = Shifts(max_rows, args.vocab_size, device, n_words)
        self.state = torch.zeros(10 + STOPS, max_rows, dtype=torch.int64, device=device)
        (self.tokens, self.positions, self.slots, self.lengths, self.index, self.limits) = (
            self.state[:6]
        )
        self.sampler.seed, self.sampler.top_p = self.state[6:8].T, self.state[8]
        self.turn = self.state[9, :1]  # how many steps there were, as is self.launched
        self.stops = self.state[10:]  # (S, R)
        # in the memory of the host, where a step writes by itself: a copy would hold up the next
        pinned = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        self.results = torch.zeros(FLIGHTS, max_rows, 3, dtype=torch.int32, pin_memory=pinned)
        self.launched = 0
        self.overlap = overlap(device)
        self.graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.masked = self.greedy = False
        self.left: Tensor | None = None  # what is to be added to the states, (S, R, D)
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
            if self.shifts.reserve(self.top):  # graphs know the place of the one before
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
    def read(self) -> list[Outcome]:
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
            Outcome(token, bool(fine), logprob, top)
            for token, fine, logprob, top in zip(
                ids.tolist(), finite.tolist(), logprobs, tops, strict=True
            )
        ]

    def drop(self) -> None:
        """Forget what is in flight: its rows are as they were before it, and must be loaded."""
        self.flight.clear()
        self.rows = 0

    # ---- one step

    def _reserve(self) -> None:
        """Scratch for the products of every row count, before any is captured."""
        every = [(self.forward.output, False)]  # and whether it is left in parts
        for block, wide in zip(self.forward.blocks, self.wide, strict=True):
            every += [(weight, wide and weight is not block.w13) for weight in block.products()]
        kinds = {(*w.shape, kind_of(w), parts): w for w, parts in every}
        for (*_, parts), weight in kinds.items():
            rows = 1
            while rows <= min(most_rows(weight, parts), self.max_rows * 2 - 1):
                wide = parts and rows >= LEAST_WIDE[kind_of(weight)]
                self.products.reserve(weight.shape[0], self.products.blocks(rows, weight, wide))
                rows *= 2

    def _is_wide(self, block: Block) -> bool:
        """Whether several rows go through the layer by wide.py."""
        wqkv, wo, w13, w2 = every = block.products()
        one = len({isinstance(weight, Tensor) for weight in every}) == 1
        return (
            one
            and self.products.is_wide(w13, True)
            and all(map(self.products.is_wide, (wqkv, wo, w2)))
        )

    def _send(self, target: Tensor, source: Tensor) -> None:
        if self.device.type == "cuda":
            source = source.pin_memory()
        target.copy_(source, non_blocking=True)

    def _capture(self, key: Key) -> None:
        """Record the graph of a step. What it needs is compiled and allocated before that by runs
        in which no row has a slot. Other threads may run steps meanwhile, and capture none."""
        kept = self.state.clone()
        self.slots[: key.rows] = -1
        self.lengths[: key.rows] = 0
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
        s, n, model = self.scratch, key.rows, self.forward.model
        size, self.left = model.params.head_dim // 2, None
        dim, table = model.params.dim, source(self.forward.table)
        launch(_begin, (n,))(
            self.tokens, self.positions, self.slots, table.weight, table.scale,
            model.freqs, s.x, s.cos, s.sin, s.places, self.cache.max_seq_len, D=dim, HALF=size,
            D_PAD=power_of_two(dim), HALF_PAD=power_of_two(size), KIND=table.kind,
            GROUP=table.group, **self.overlap,
        )  # fmt: skip
        for layer, block in enumerate(self.forward.blocks):
            if n > self.most_rows[layer]:
                self._many(n, layer, block, key.long)
            elif self.wide[layer] and n >= LEAST_WIDE[kind_of(block.wqkv)]:
                self._wide(n, layer, block, key.long)
            else:
                self._few(n, layer, block, key.long)
        logits = self._logits(n)
        if key.top is None:
            self.sampler(logits, self.index[:n], rows=n, masked=key.masked, greedy=key.greedy)
        else:
            self.shifts(logits, self.index[:n], self.slots[:n], self.sampler, key.top)
        launch(_advance, (1,))(
            self.sampler.ids, self.sampler.finite, self.sampler.logprob, self.results, self.turn,
            self.tokens, self.positions, self.slots, self.lengths, self.index, self.limits,
            self.stops, self.stops.stride(0), n, self.cache.max_seq_len, S=STOPS,
            R_PAD=max(2, power_of_two(self.max_rows)), FLIGHTS=FLIGHTS, **self.overlap,
        )  # fmt: skip

    def _norm(
        self, n: int, weight: Tensor, of: Weight | None = None, arranged: bool = False
    ) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """The states, normed, or with what the product `of` them norms them by."""
        eps, x = self.forward.model.params.norm_eps, self.scratch.x[:n]
        if of is not None and self.products.norms(n, of):
            return x, (weight, eps)
        left, self.left = self.left, None
        normed = self.scratch.normed[:n]
        return rms_norm(x, weight, eps, normed, partials=left, arranged=arranged), None

    def _few(self, n: int, layer: int, block: Block, long: bool) -> None:
        s, k, v = self.scratch, self.cache.k[layer], self.cache.v[layer]
        where = Rotation(s.cos, s.sin, self.slots, self.positions, k, v)
        multiply = self.products
        h, norm = self._norm(n, block.attention_norm, block.wqkv)
        multiply(h, block.wqkv, s.q[:n], ROTATE, norm=norm, rotation=where)
        self.attend(s.q[:n], k, v, self.slots, self.lengths, s.attended[:n], long)
        multiply(s.attended[:n].flatten(1), block.wo, s.x[:n], ADD)
        h, norm = self._norm(n, block.ffn_norm, block.w13)
        multiply(h, block.w13, s.gated[:n], GATE, norm=norm)
        multiply(s.gated[:n], block.w2, s.x[:n], ADD)

    def _wide(self, n: int, layer: int, block: Block, long: bool) -> None:
        """The same where products leave parts of their sums, which the next kernel adds up."""
        s, k, v, multiply = self.scratch, self.cache.k[layer], self.cache.v[layer], self.products
        heads, kv_heads = self.forward.heads, self.forward.kv_heads
        arranged = not isinstance(block.wqkv, Tensor)
        h, _ = self._norm(n, block.attention_norm, arranged=arranged)
        qkv = multiply.parts(h, block.wqkv)
        rotate_and_store(qkv, s.cos, s.sin, s.places, k, v, heads, kv_heads, out=s.q[:n])
        self.attend(s.q[:n], k, v, self.slots, self.lengths, s.attended[:n], long, arranged)
        self.left = multiply.parts(s.attended[:n].flatten(1), block.wo)
        h, _ = self._norm(n, block.ffn_norm, arranged=arranged)
        multiply(h, block.w13, s.gated[:n], GATE, wide=True)
        self.left = multiply.parts(s.gated[:n], block.w2)

    def _many(self, n: int, layer: int, block: Block, long: bool) -> None:
        s, k, v = self.scratch, self.cache.k[layer], self.cache.v[layer]
        heads, kv_heads = self.forward.heads, self.forward.kv_heads
        h, _ = self._norm(n, block.attention_norm)
        self.forward.product(h, block.wqkv, s.qkv[:n])
        rotate_and_store(
            s.qkv[:n], s.cos, s.sin, s.places, k, v, heads, kv_heads, out=s.q[:n]
        )  # (n, H, E)
        self.attend(s.q[:n], k, v, self.slots, self.lengths, s.attended[:n], long)
        self.forward.add_product(s.x[:n], s.attended[:n].flatten(1), block.wo)
        h, _ = self._norm(n, block.ffn_norm)
        self.forward.product(h, block.w13, s.both[:n])
        silu_multiply(s.both[:n], out=s.gated[:n])
        self.forward.add_product(s.x[:n], s.gated[:n], block.w2)

    def _logits(self, n: int) -> Tensor:
        """Logits (n, V) float32 of the states."""
        weight, output = self.forward.model.norm.weight, self.forward.output
        wide = self.products.is_wide(output, True) and n >= LEAST_WIDE[kind_of(output)]
        ours = n <= most_rows(output, wide)
        arranged = ours and wide and not isinstance(output, Tensor)
        h, norm = self._norm(n, weight, output if ours else None, arranged)
        logits = self.scratch.logits[:n]
        if ours:
            return self.products(h, output, logits, STORE, norm=norm, wide=wide)
        return self.forward.logits_into(h, logits)
