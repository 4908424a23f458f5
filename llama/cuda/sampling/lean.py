"""A token for each row inside a captured step, in five launches; greedy, in two of them.

A step is lean if its rows ask for nothing beyond temperature and top_p; full.py is for the others.
The plain counterpart is `llama.sampling.sample`, whose ids these are; top_k, min_p, penalties and
biases are not known here. Nothing is sorted, allocated or waited for, and scratch is cleared by the
launches that use it, so that a step that was given up leaves nothing behind.

The surprising thing: the threshold of top_p has three digits, and the tokens are drawn when two are
known. Those that share the first two, mostly one or none, are kept apart by their third: the best
of each, which `_pick` takes or leaves. What programs add up together is integers, so that no order
of additions changes a choice.

R rows (sequences)   V vocabulary   P parts of a row, one program each
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from llama.cuda.launch import INTERPRETED, allow, launch, overlap, wait
from llama.sampling import SMALLEST_NORMAL, TOP_P_BITS, WEIGHT_SCALE

BLOCK = 1024  # tokens that a program has in registers at a time
PROGRAMS = 512  # of a launch, about: 4 to a multiprocessor
MAX_PARTS = tl.constexpr(128)  # of a row

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
BINS = tl.constexpr(2 * 1024 + 512)  # three histograms
SURE = tl.constexpr(512)  # after the best token of every third digit: the best above all of them
BEST = tl.constexpr(512 + 1)

LAST_ID = tl.constexpr(2**31 - 1)
LEAST_KEY = tl.constexpr(-(2**63))


# ---- arguments of the kernels


class Given(NamedTuple):
    """What the rows are chosen from, and how: logits (R, V) and each row's parameters."""

    logits: Tensor
    stride: int  # numbers from one row to the next
    mask: Tensor
    temperature: Tensor
    top_p: Tensor
    seed: Tensor
    seed_stride: int  # numbers from the low words to the high ones
    generated: Tensor  # (R,) int64: how many tokens each row generated before this one


class Scratch(NamedTuple):
    """What the launches of one choice hand on to each other."""

    keys: Tensor  # (R, MAX_PARTS) int64: the greatest logit of each part, as `_key` has it
    peaks: Tensor  # (R, MAX_PARTS) float32: the greatest logit of the model itself
    sums: Tensor  # (R, MAX_PARTS) float32: the sum of exponentials of logits less that
    bins: Tensor  # (R, BINS) int64: the sums of weights by each digit
    best: Tensor  # (R, BEST) int64: the best token of each third digit, and above all of them
    found: Tensor  # (R, 3) int64: first digit, goal after it, goal after the second


class Chosen(NamedTuple):
    """Where the choices go."""

    ids: Tensor
    logprob: Tensor
    finite: Tensor


class Shape(NamedTuple):
    """The sizes of a choice, as a constant of its kernels."""

    VOCAB: int
    WORDS: int  # ids from here on are never chosen
    MASKED: bool  # whether `mask` is read
    BLOCK: int  # tokens that a program has in registers at a time


# ---- one token


@triton.jit
def _load(given, row, ids, SHAPE: tl.constexpr):
    """Logits as the model has them, and as they may be chosen from: masked ones are -inf, and those
    of ids that no token has."""
    VOCAB: tl.constexpr = SHAPE.VOCAB
    at = given.logits + row.to(tl.int64) * given.stride + ids
    raw = tl.load(at, mask=ids < VOCAB, other=-float("inf"))
    open_to = raw
    if SHAPE.WORDS < VOCAB:
        open_to = tl.where(ids < SHAPE.WORDS, open_to, -float("inf"))
    if SHAPE.MASKED:
        words = given.mask + row.to(tl.int64) * ((VOCAB + 31) // 32) + ids // 32
        bit = tl.load(words, mask=ids < VOCAB, other=0) >> (ids % 32) & 1
        open_to = tl.where(bit == 1, open_to, -float("inf"))
    return raw, open_to


@triton.jit
def _ordered(bits):
    """Bit patterns of floats as integers in the floats' order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(values, ids):
    """One integer whose maximum is the greatest value and, among equals, the lowest id."""
    values = tl.where(values == 0.0, 0.0, values)  # -0.0 equals 0.0
    high = _ordered(values.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    return high | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def _value(key):
    """The float that a key was made of."""
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _best_key(keys, row, parts):
    """The key of the row's greatest logit."""
    at = tl.arange(0, MAX_PARTS)
    return tl.max(tl.load(keys + row * MAX_PARTS + at, mask=at < parts, other=LEAST_KEY), 0)


@triton.jit
def _odds(logits, peak, temperature):
    """Logits less the row's maximum, over temperature: <= 0, whatever the row holds; the tokens'
    weights; and their three digits as one number (negative where a weight is 0)."""
    divisor = tl.zeros_like(logits) + tl.maximum(temperature, COLDEST)
    scaled = tl.div_rn(logits - peak, divisor)
    scaled = tl.where(scaled <= 0, scaled, -float("inf"))
    odds = libdevice.exp(scaled) if LIBDEVICE else tl.exp(scaled)
    return scaled, (odds * SCALE).to(tl.int64), odds.to(tl.int32, bitcast=True) - LOWEST


@triton.jit
def _gumbel(given, row, first, BLOCK: tl.constexpr):
    """`llama.sampling.gumbel` of the ids from `first`, a multiple of 4, to `first + BLOCK`."""
    seed, index = given.seed + row, tl.load(given.generated + row)
    left, right = tl.load(seed).to(tl.uint32), tl.load(seed + given.seed_stride).to(tl.uint32)
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
def _digit(bins, goal, RADIX: tl.constexpr):
    """The largest digit from which on a histogram sums to `goal`; what is left of goal for it."""
    at = tl.arange(0, RADIX)
    weights = tl.load(bins + at)
    from_here = tl.sum(weights, 0) - tl.cumsum(weights, 0) + weights
    digit = tl.maximum(tl.sum((from_here >= goal).to(tl.int32), 0) - 1, 0)
    return digit, goal - tl.sum(tl.where(at > digit, weights, 0), 0)


@triton.jit
def _goal(bins, top_p, RADIX: tl.constexpr):
    """top_p of a row's total weight, in two parts, so that no product leaves 64 bits."""
    total = tl.sum(tl.load(bins + tl.arange(0, RADIX)), 0)
    return (total >> SHARE_BITS) * top_p + ((total & (FULL - 1)) * top_p >> SHARE_BITS)


# ---- launches


@triton.jit
def _clear(scratch, row):
    """Clear a row's histograms and best tokens."""
    lanes = tl.arange(0, 1024)
    for start in tl.static_range(0, BINS, 1024):
        at = start + lanes
        tl.store(scratch.bins + row * BINS + at, tl.zeros_like(at).to(tl.int64), mask=at < BINS)
    lowest = tl.full([1024], LEAST_KEY, tl.int64)
    tl.store(scratch.best + row * BEST + lanes, lowest, mask=lanes < BEST)


@triton.jit(do_not_specialize=["per"])
def _peaks(given, scratch, per, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """The greatest logit of every part, its id, and its softmax sum; scratch is cleared."""
    allow(OVERLAP)
    wait(OVERLAP)
    VOCAB: tl.constexpr = SHAPE.VOCAB
    BLOCK: tl.constexpr = SHAPE.BLOCK
    part, row = tl.program_id(0), tl.program_id(1)
    if (part == 0) & (tl.load(given.temperature + row) > 0):
        _clear(scratch, row)
    first = part * per * BLOCK
    lanes = tl.arange(0, BLOCK)
    key = tl.full([BLOCK], LEAST_KEY, tl.int64)
    m_i = tl.full([], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
        ids = start + lanes
        raw, open_to = _load(given, row, ids, SHAPE)
        key = tl.maximum(key, _key(open_to, ids))
        m_new = tl.maximum(m_i, tl.max(raw, 0))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # -inf less -inf is NaN
        l_i = l_i * tl.exp(m_i - base) + tl.exp(raw - base)
        m_i = m_new
    tl.store(scratch.keys + row * MAX_PARTS + part, tl.max(key, 0))
    tl.store(scratch.peaks + row * MAX_PARTS + part, m_i)
    tl.store(
        scratch.sums + row * MAX_PARTS + part, tl.sum(l_i, 0)
    )  # NaN if the part has NaN or inf


@triton.jit(do_not_specialize=["per"])
def _weigh(given, scratch, per, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """The weights by their first digit.

    The most probable token weighs SCALE, so tokens of less than (1 - top_p) * SCALE / V are in sum
    less than what top_p leaves out, and the threshold lies above them: they count in the total
    only, and are added at once, at digit 0. That spares most tokens their atomic addition.
    """
    allow(OVERLAP)
    wait(OVERLAP)
    VOCAB: tl.constexpr = SHAPE.VOCAB
    BLOCK: tl.constexpr = SHAPE.BLOCK
    part, row = tl.program_id(0), tl.program_id(1)
    top_p, temperature = tl.load(given.top_p + row), tl.load(given.temperature + row)
    if (temperature > 0) & (top_p < FULL):
        peak = _value(_best_key(scratch.keys, row, tl.num_programs(0)))
        bins = scratch.bins + row * BINS
        tail = (-top_p + FULL) * LEAST_TAIL // VOCAB
        first = part * per * BLOCK
        lumped = tl.zeros([BLOCK], tl.int64)
        for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            _, open_to = _load(given, row, ids, SHAPE)
            _, weights, digits = _odds(open_to, peak, temperature)
            counts = (digits >= 0) & (weights >= tail)
            tl.atomic_add(bins + (digits >> SHIFT), weights, mask=counts, sem="relaxed")
            lumped += tl.where(counts, 0, weights)
        tl.atomic_add(bins, tl.sum(lumped, 0), sem="relaxed")


@triton.jit(do_not_specialize=["per"])
def _narrow(given, scratch, per, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """The threshold's first digit; by their second the weights that share it."""
    allow(OVERLAP)
    wait(OVERLAP)
    VOCAB: tl.constexpr = SHAPE.VOCAB
    BLOCK: tl.constexpr = SHAPE.BLOCK
    part, row = tl.program_id(0), tl.program_id(1)
    top_p, temperature = tl.load(given.top_p + row), tl.load(given.temperature + row)
    if (temperature > 0) & (top_p < FULL):
        peak = _value(_best_key(scratch.keys, row, tl.num_programs(0)))
        bins = scratch.bins + row * BINS
        digit, goal = _digit(bins, _goal(bins, top_p, RADIX), RADIX)
        if part == 0:
            tl.store(scratch.found + row * 3, digit.to(tl.int64))
            tl.store(scratch.found + row * 3 + 1, goal)
        first = part * per * BLOCK
        for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            _, open_to = _load(given, row, ids, SHAPE)
            _, weights, digits = _odds(open_to, peak, temperature)
            second = bins + RADIX + (digits >> SHIFT_LOW & (RADIX - 1))
            tl.atomic_add(second, weights, mask=digits >> SHIFT == digit, sem="relaxed")


@triton.jit(do_not_specialize=["per"])
def _draw(given, scratch, per, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):
    """The threshold's second digit; the best score above it, and by third digit the best at it."""
    allow(OVERLAP)
    wait(OVERLAP)
    VOCAB: tl.constexpr = SHAPE.VOCAB
    BLOCK: tl.constexpr = SHAPE.BLOCK
    part, row = tl.program_id(0), tl.program_id(1)
    top_p, temperature = tl.load(given.top_p + row), tl.load(given.temperature + row)
    if temperature > 0:
        peak = _value(_best_key(scratch.keys, row, tl.num_programs(0)))
        bins, best, found = scratch.bins + row * BINS, scratch.best + row * BEST, scratch.found
        edge = tl.full([], -(2**30), tl.int32)  # every token is above it
        if top_p < FULL:
            digit, goal = _digit(bins + RADIX, tl.load(found + row * 3 + 1), RADIX)
            edge = tl.load(found + row * 3).to(tl.int32) * RADIX + digit
            if part == 0:
                tl.store(found + row * 3 + 2, goal)
        first = part * per * BLOCK
        top = tl.full([BLOCK], LEAST_KEY, tl.int64)
        for start in range(first, tl.minimum(first + per * BLOCK, VOCAB), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            _, open_to = _load(given, row, ids, SHAPE)
            scaled, weights, digits = _odds(open_to, peak, temperature)
            high = digits >> SHIFT_LOW
            if tl.max(high, 0) >= edge:  # most blocks hold nothing that stays
                key = _key(scaled + _gumbel(given, row, start, BLOCK), ids)
                top = tl.maximum(top, tl.where(high > edge, key, LEAST_KEY))
                third, at = digits & (RADIX_LOW - 1), high == edge
                tl.atomic_add(bins + 2 * RADIX + third, weights, mask=at, sem="relaxed")
                tl.atomic_max(best + third, key, mask=at, sem="relaxed")
        tl.atomic_max(best + SURE, tl.max(top, 0), sem="relaxed")


@triton.jit(do_not_specialize=["parts"])
def _pick(given, scratch, chosen, parts, WORDS: tl.constexpr, OVERLAP: tl.constexpr):
    """The threshold's third digit, the best token that stays, and its log-probability."""
    allow(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    key = _best_key(scratch.keys, row, parts)
    if tl.load(given.temperature + row) > 0:
        # Without top_p all third digits are empty: any will do.
        bins = scratch.bins + row * BINS + 2 * RADIX
        digit, _ = _digit(bins, tl.load(scratch.found + row * 3 + 2), RADIX_LOW)
        third = tl.arange(0, RADIX_LOW)
        at_edge = tl.load(scratch.best + row * BEST + third)
        key = tl.max(tl.where(third >= digit, at_edge, LEAST_KEY), 0)
        key = tl.maximum(key, tl.load(scratch.best + row * BEST + SURE))
    # A row without a finite logit may have chosen nothing, or past its end.
    token = tl.minimum((key & LAST_ID) ^ LAST_ID, WORDS - 1)
    at = tl.arange(0, MAX_PARTS)
    m_i = tl.load(scratch.peaks + row * MAX_PARTS + at, mask=at < parts, other=-float("inf"))
    l_i = tl.load(scratch.sums + row * MAX_PARTS + at, mask=at < parts, other=0.0)
    peak = tl.max(m_i, 0)
    total = tl.sum(l_i * tl.exp(m_i - peak), 0)
    logit = tl.load(given.logits + row.to(tl.int64) * given.stride + token)
    tl.store(chosen.ids + row, token)
    tl.store(chosen.logprob + row, logit - peak - tl.log(total))
    tl.store(chosen.finite + row, (total > 0).to(tl.int32))  # a NaN is not


class Sampler:
    """Parameters and results of up to `max_rows` rows, whose addresses never change.

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
        most = MAX_PARTS.value
        self._scratch = Scratch(
            keys=new(torch.int64, most),
            peaks=new(torch.float32, most),
            sums=new(torch.float32, most),
            bins=new(torch.int64, BINS.value),
            best=new(torch.int64, BEST.value),
            found=new(torch.int64, 3),
        )

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
        per = triton.cdiv(blocks, max(1, min(MAX_PARTS.value, PROGRAMS // rows)))
        parts = triton.cdiv(blocks, per)
        given = Given(logits, logits.stride(0), self.mask, self.temperature, self.top_p,
                      self.seed, self.seed.stride(1), index)  # fmt: skip
        chosen = Chosen(self.ids, self.logprob, self.finite)
        shape = Shape(self.vocab_size, self.n_words, masked, BLOCK)
        options, grid = {**self._overlap, **self._options}, (parts, rows)
        launch(_peaks, grid)(given, self._scratch, per, SHAPE=shape, **options)
        if not greedy:
            launch(_weigh, grid)(given, self._scratch, per, SHAPE=shape, **options)
            launch(_narrow, grid)(given, self._scratch, per, SHAPE=shape, **options)
            launch(_draw, grid)(given, self._scratch, per, SHAPE=shape, **options)
        launch(_pick, (rows,))(
            given, self._scratch, chosen, parts, WORDS=self.n_words, **options
        )  # fmt: skip
