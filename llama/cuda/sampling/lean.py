"""A token for each row inside a captured step, in five launches; greedy, in two of them.

The plain counterpart is `llama.sampling.sample`, whose ids these are; top_k, min_p, penalties and
biases are not known here. Nothing is sorted, allocated or waited for, and scratch is cleared by the
launches that use it, so that a step that was given up leaves nothing behind.

The surprising thing: the threshold of top_p has three digits, and the tokens are drawn when two are
known. Those that share the first two, mostly one or none, are kept apart by their third: the best
of each, which `_pick` takes or leaves. What programs add up together is integers, so that no order
of additions changes a choice.

R rows (sequences)   V vocabulary   P parts of a row, one program each
"""

# ruff: noqa: ANN001, ANN202 (arguments of kernels have no types in Python)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from llama.cuda.launch import INTERPRETED, allow, launch, overlap, wait
from llama.sampling import SMALLEST_NORMAL, TOP_P_BITS, WEIGHT_SCALE

BLOCK = 1024  # tokens that a program has in registers at a time
PROGRAMS = 512  # of a launch, about: 4 to a multiprocessor
MAX_PARTS = 128  # of a row

# Rounded as in torch's own kernels, so that ids agree: a * b + c is rounded twice, exponentials and
# logarithms are those of NVIDIA's library, and that keeps denormal numbers.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "enable_reflect_ftz": False, "num_warps": 8}
LIBDEVICE = tl.constexpr(not INTERPRETED)

SCALE = tl.constexpr(WEIGHT_SCALE)
SHARE_BITS = tl.constexpr(TOP_P_BITS)
FULL = tl.constexpr(2**TOP_P_BITS)  # a top_p that filters nothing
LEAST_TAIL = tl.constexpr(int(WEIGHT_SCALE) >> TOP_P_BITS)
COLDEST = tl.constexpr(SMALLEST_NORMAL)

# A weight is at least 1 where odds are at least 2**-40. From there to 1.0 are 40 * 2**23 + 1
# patterns of bits: digits of 641, 1024 and 512 values.
LOWEST = tl.constexpr((127 - 40) << 23)
SHIFT, SHIFT_LOW = tl.constexpr(19), tl.constexpr(9)
RADIX, RADIX_LOW = tl.constexpr(1024), tl.constexpr(512)
BINS = 2 * 1024 + 512  # three histograms
SURE = tl.constexpr(512)  # after the best token of every third digit: the best above all of them
BEST = 512 + 1

LAST_ID = tl.constexpr(2**31 - 1)
LEAST_KEY = tl.constexpr(-(2**63))


# ---- one token


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    logits, mask, row, ids, stride, VOCAB: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Logits as the model has them, and as they may be chosen from: masked ones are -inf, and those
    of ids that no token has."""
    raw = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < VOCAB, other=-float("inf"))
    open_to = raw
    if WORDS < VOCAB:
        open_to = tl.where(ids < WORDS, open_to, -float("inf"))
    if MASKED:
        words = mask + row.to(tl.int64) * ((VOCAB + 31) // 32) + ids // 32
        bit = tl.load(words, mask=ids < VOCAB, other=0) >> (ids % 32) & 1
        open_to = tl.where(bit == 1, open_to, -float("inf"))
    return raw, open_to


@triton.jit
def _ordered(bits):  # type: ignore[no-untyped-def]
    """Bit patterns of floats to integers in the floats' order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(values, ids):  # type: ignore[no-untyped-def]
    """One integer whose maximum is the greatest value and, among equals, the lowest id."""
    values = tl.where(values == 0.0, 0.0, values)  # -0.0 equals 0.0
    high = _ordered(values.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    return high | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    """The float that a key was made of."""
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _best_key(keys, row, parts, MAX_PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key of the row's greatest logit."""
    at = tl.arange(0, MAX_PARTS)
    return tl.max(tl.load(keys + row * MAX_PARTS + at, mask=at < parts, other=LEAST_KEY), 0)


@triton.jit
def _odds(logits, peak, temperature):  # type: ignore[no-untyped-def]
    """Logits less the row's maximum, over temperature: <= 0, whatever the row holds; tokens'
    weights; and their places among the weights above 0 (negative where a token has none)."""
    heat = tl.zeros_like(logits) + tl.maximum(temperature, COLDEST)
    scaled = tl.div_rn(logits - peak, heat)
    scaled = tl.where(scaled <= 0, scaled, -float("inf"))
    odds = libdevice.exp(scaled) if LIBDEVICE else tl.exp(scaled)
    return scaled, (odds * SCALE).to(tl.int64), odds.to(tl.int32, bitcast=True) - LOWEST


@triton.jit
def _gumbel(seed, stride, index, first, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`llama.sampling.gumbel` of the ids from `first`, a multiple of 4, to `first + BLOCK`."""
    left, right = tl.load(seed).to(tl.uint32), tl.load(seed + stride).to(tl.uint32)
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    low = tl.zeros_like(block) + (index & 0xFFFFFFFF).to(tl.uint32)
    high = tl.zeros_like(block) + (index >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(block, low, high, tl.zeros_like(block), left, right)
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.float32)
    minus_u = tl.maximum((word + 0.5) * -(2.0**-32), 2.0**-24 - 1)
    if LIBDEVICE:
        return -libdevice.log(-libdevice.log1p(minus_u))
    else:  # the interpreter, which has no log1p
        return -tl.log(-tl.log(1 + minus_u.to(tl.float64)).to(tl.float32))


# ---- thresholds


@triton.jit
def _digit(bins, goal, RADIX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest digit from which on a histogram sums to `goal`; what is left of goal for it."""
    at = tl.arange(0, RADIX)
    weights = tl.load(bins + at)
    from_here = tl.sum(weights, 0) - tl.cumsum(weights, 0) + weights
    digit = tl.maximum(tl.sum((from_here >= goal).to(tl.int32), 0) - 1, 0)
    return digit, goal - tl.sum(tl.where(at > digit, weights, 0), 0)


@triton.jit
def _goal(bins, top_p, RADIX: tl.constexpr):  # type: ignore[no-untyped-def]
    """top_p of a row's total weight, in two parts, so that no product leaves 64 bits."""
    total = tl.sum(tl.load(bins + tl.arange(0, RADIX)), 0)
    return (total >> SHARE_BITS) * top_p + ((total & (FULL - 1)) * top_p >> SHARE_BITS)


# ---- launches


@triton.jit(do_not_specialize=["per"])
def _peaks(  # type: ignore[no-untyped-def]
    logits, stride, mask, temperature, keys, peaks, sums, bins, best, per,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr, BINS: tl.constexpr, BEST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of every part: its greatest logit and id, its softmax sum; scratch is cleared."""
    allow(OVERLAP)
    wait(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    if (part == 0) & (tl.load(temperature + row) > 0):
        wide = tl.arange(0, 1024)
        for start in tl.static_range(0, BINS, 1024):
            at = start + wide
            tl.store(bins + row * BINS + at, tl.zeros_like(at).to(tl.int64), mask=at < BINS)
        lowest = tl.full([1024], LEAST_KEY, tl.int64)
        tl.store(best + row * BEST + wide, lowest, mask=wide < BEST)
    first = part * per * BLOCK
    lanes = tl.arange(0, BLOCK)
    key = tl.full([BLOCK], LEAST_KEY, tl.int64)
    peak = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
        ids = start + lanes
        raw, open_to = _load(logits, mask, row, ids, stride, VOCAB, WORDS, MASKED)
        key = tl.maximum(key, _key(open_to, ids))
        higher = tl.maximum(peak, tl.max(raw, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # -inf less -inf is NaN
        total = total * tl.exp(peak - base) + tl.exp(raw - base)
        peak = higher
    tl.store(keys + row * MAX_PARTS + part, tl.max(key, 0))
    tl.store(peaks + row * MAX_PARTS + part, peak)
    tl.store(sums + row * MAX_PARTS + part, tl.sum(total, 0))  # NaN where the part has NaN or inf


@triton.jit(do_not_specialize=["per"])
def _weigh(  # type: ignore[no-untyped-def]
    logits, stride, mask, temperature, top_p, keys, bins, per,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr, BINS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The weights by their first digit.

    The most probable token weighs SCALE, so tokens of less than (1 - top_p) * SCALE / V are in sum
    less than what top_p leaves out, and the threshold lies above them: they count in the total
    only, and are added at once, at digit 0. That spares most tokens their atomic addition.
    """
    allow(OVERLAP)
    wait(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    share, heat = tl.load(top_p + row), tl.load(temperature + row)
    if (heat > 0) & (share < FULL):
        peak = _value(_best_key(keys, row, tl.num_programs(0), MAX_PARTS))
        bins += row * BINS
        tail = (-share + FULL) * LEAST_TAIL // VOCAB
        first = part * per * BLOCK
        lumped = tl.zeros([BLOCK], tl.int64)
        for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            _, open_to = _load(logits, mask, row, ids, stride, VOCAB, WORDS, MASKED)
            _, weights, places = _odds(open_to, peak, heat)
            counts = (places >= 0) & (weights >= tail)
            tl.atomic_add(bins + (places >> SHIFT), weights, mask=counts, sem="relaxed")
            lumped += tl.where(counts, 0, weights)
        tl.atomic_add(bins, tl.sum(lumped, 0), sem="relaxed")


@triton.jit(do_not_specialize=["per"])
def _narrow(  # type: ignore[no-untyped-def]
    logits, stride, mask, temperature, top_p, keys, bins, found, per,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr, BINS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The threshold's first digit; by their second the weights that share it."""
    allow(OVERLAP)
    wait(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    share, heat = tl.load(top_p + row), tl.load(temperature + row)
    if (heat > 0) & (share < FULL):
        peak = _value(_best_key(keys, row, tl.num_programs(0), MAX_PARTS))
        bins += row * BINS
        digit, goal = _digit(bins, _goal(bins, share, RADIX), RADIX)
        if part == 0:
            tl.store(found + row * 3, digit.to(tl.int64))
            tl.store(found + row * 3 + 1, goal)
        first = part * per * BLOCK
        for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            _, open_to = _load(logits, mask, row, ids, stride, VOCAB, WORDS, MASKED)
            _, weights, places = _odds(open_to, peak, heat)
            second = bins + RADIX + (places >> SHIFT_LOW & (RADIX - 1))
            tl.atomic_add(second, weights, mask=places >> SHIFT == digit, sem="relaxed")


@triton.jit(do_not_specialize=["per"])
def _draw(  # type: ignore[no-untyped-def]
    logits, stride, mask, temperature, top_p, seed, seed_stride, index, keys, bins, best, found,
    per, VOCAB: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr, BINS: tl.constexpr, BEST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The threshold's second digit; the best score above it, and by third digit the best at it."""
    allow(OVERLAP)
    wait(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    share, heat = tl.load(top_p + row), tl.load(temperature + row)
    if heat > 0:
        peak = _value(_best_key(keys, row, tl.num_programs(0), MAX_PARTS))
        bins += row * BINS
        best += row * BEST
        edge = tl.full([], -(2**30), tl.int32)  # every token is above it
        if share < FULL:
            digit, goal = _digit(bins + RADIX, tl.load(found + row * 3 + 1), RADIX)
            edge = tl.load(found + row * 3).to(tl.int32) * RADIX + digit
            if part == 0:
                tl.store(found + row * 3 + 2, goal)
        first = part * per * BLOCK
        top = tl.full([BLOCK], LEAST_KEY, tl.int64)
        for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            _, open_to = _load(logits, mask, row, ids, stride, VOCAB, WORDS, MASKED)
            scaled, weights, places = _odds(open_to, peak, heat)
            high = places >> SHIFT_LOW
            if tl.max(high, 0) >= edge:  # most blocks hold nothing that stays
                noise = _gumbel(seed + row, seed_stride, tl.load(index + row), start, BLOCK)
                key = _key(scaled + noise, ids)
                top = tl.maximum(top, tl.where(high > edge, key, LEAST_KEY))
                third, at = places & (RADIX_LOW - 1), high == edge
                tl.atomic_add(bins + 2 * RADIX + third, weights, mask=at, sem="relaxed")
                tl.atomic_max(best + third, key, mask=at, sem="relaxed")
        tl.atomic_max(best + SURE, tl.max(top, 0), sem="relaxed")


@triton.jit(do_not_specialize=["parts"])
def _pick(  # type: ignore[no-untyped-def]
    logits, stride, temperature, keys, peaks, sums, bins, best, found, ids, logprob, finite, parts,
    WORDS: tl.constexpr, MAX_PARTS: tl.constexpr, BINS: tl.constexpr, BEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The threshold's third digit, the best token that stays, and its log-probability."""
    allow(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    key = _best_key(keys, row, parts, MAX_PARTS)
    if tl.load(temperature + row) > 0:  # without top_p all third digits are empty: any will do
        digit, _ = _digit(bins + row * BINS + 2 * RADIX, tl.load(found + row * 3 + 2), RADIX_LOW)
        third = tl.arange(0, RADIX_LOW)
        at_edge = tl.load(best + row * BEST + third)
        key = tl.max(tl.where(third >= digit, at_edge, LEAST_KEY), 0)
        key = tl.maximum(key, tl.load(best + row * BEST + SURE))
    # A row without a finite logit may have chosen nothing, or past its end.
    chosen = tl.minimum((key & LAST_ID) ^ LAST_ID, WORDS - 1)
    at = tl.arange(0, MAX_PARTS)
    peak = tl.load(peaks + row * MAX_PARTS + at, mask=at < parts, other=-float("inf"))
    total = tl.load(sums + row * MAX_PARTS + at, mask=at < parts, other=0.0)
    highest = tl.max(peak, 0)
    total = tl.sum(total * tl.exp(peak - highest), 0)
    logit = tl.load(logits + row.to(tl.int64) * stride + chosen)
    tl.store(ids + row, chosen)
    tl.store(logprob + row, logit - highest - tl.log(total))
    tl.store(finite + row, (total > 0).to(tl.int32))  # a NaN is not


class Sampler:
    """Parameters and results of up to `max_rows` rows, which keep their places in memory.

    The caller writes the parameters between steps, or has them in tensors of its own; a captured
    call reads what stands there when it is replayed.
    """

    temperature: Tensor  # (R,) float32; 0 takes the most probable token
    top_p: Tensor  # (R,) int64, in units of 2**-24; 2**24 filters nothing
    seed: Tensor  # (R, 2) int64, the low words side by side, then the high ones
    mask: Tensor  # (R, ceil(V / 32)) int32: bit i % 32 of word i // 32 allows token i
    ids: Tensor  # (R,) int64
    logprob: Tensor  # (R,) float32, of the chosen token, as `llama.sampling.logprobs_of` has it
    finite: Tensor  # (R,) int32: 1 where `llama.sampling.finite_rows` says True, otherwise 0

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device, n_words: int | None = None
    ) -> None:
        """Ids from `n_words` on are never chosen."""
        assert 0 < vocab_size <= 2**21, vocab_size  # sums of weights stay below 2**62
        self.max_rows, self.vocab_size = max_rows, vocab_size
        self.n_words = vocab_size if n_words is None else min(n_words, vocab_size)
        assert self.n_words > 0, n_words
        self._overlap = overlap(device)
        self._options = {} if INTERPRETED else OPTIONS

        def new(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(max_rows, *shape, dtype=dtype, device=device)

        self.temperature = new(torch.float32)
        self.top_p = new(torch.int64).fill_(FULL.value)
        self.seed = torch.zeros(2, max_rows, dtype=torch.int64, device=device).T
        self.mask = new(torch.int32, (vocab_size + 31) // 32).fill_(-1)
        self.ids = new(torch.int64)
        self.logprob = new(torch.float32)
        self.finite = new(torch.int32)
        self._keys = new(torch.int64, MAX_PARTS)
        self._peaks = new(torch.float32, MAX_PARTS)
        self._sums = new(torch.float32, MAX_PARTS)
        self._bins = new(torch.int64, BINS)
        self._best = new(torch.int64, BEST)
        self._found = new(torch.int64, 3)  # first digit, goal after it, goal after the second

    def __call__(
        self,
        logits: Tensor,
        index: Tensor,
        *,
        rows: int,
        masked: bool = False,
        greedy: bool = False,
    ) -> None:
        """Write ids, logprob and finite of the first `rows` rows, whose temperature is 0 if
        `greedy`.

        logits (rows, V) float32, not written to; index (rows,) int64: how many tokens each row
        generated before this one. `masked` reads `mask`. Rows that are not finite get some id.
        """
        assert logits.shape == (rows, self.vocab_size), (logits.shape, rows, self.vocab_size)
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.stride(1) == 1 or self.vocab_size == 1, logits.stride()
        assert index.shape == (rows,), (index.shape, rows)
        assert index.dtype == torch.int64, index.dtype
        assert index.is_contiguous(), index.stride()
        assert rows <= self.max_rows, (rows, self.max_rows)
        assert self.seed.stride(0) == 1, self.seed.stride()
        blocks = triton.cdiv(self.vocab_size, BLOCK)
        per = triton.cdiv(blocks, max(1, min(MAX_PARTS, PROGRAMS // rows)))
        parts = triton.cdiv(blocks, per)
        shape = {"WORDS": self.n_words, "MAX_PARTS": MAX_PARTS, "BINS": BINS}
        shape |= {**self._overlap, **self._options}
        tiled = {**shape, "VOCAB": self.vocab_size, "BLOCK": BLOCK, "MASKED": masked}
        whole = {**shape, "BEST": BEST}
        given = logits, logits.stride(0), self.mask, self.temperature
        sums = self._keys, self._peaks, self._sums
        grid = parts, rows
        launch(_peaks, grid)(*given, *sums, self._bins, self._best, per, BEST=BEST, **tiled)
        if not greedy:
            drawn = *given, self.top_p
            found = self._bins, self._found
            launch(_weigh, grid)(*drawn, self._keys, self._bins, per, **tiled)
            launch(_narrow, grid)(*drawn, self._keys, *found, per, **tiled)
            launch(_draw, grid)(
                *drawn, self.seed, self.seed.stride(1), index, self._keys,
                self._bins, self._best, self._found, per, BEST=BEST, **tiled,
            )  # fmt: skip
        launch(_pick, (rows,))(
            *given[:2], self.temperature, *sums, self._bins, self._best, self._found,
            self.ids, self.logprob, self.finite, parts, **whole,
        )  # fmt: skip
