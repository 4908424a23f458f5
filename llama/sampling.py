"""How a token is chosen: logits (R, V) to ids (R,), on the device.

Refuses to know text, slots, prompts and who asks; what a request may ask for, `SamplingParams`, is
in sampling_params.py.

The surprising thing: there is no generator. The noise of a token is a function of (seed of the
request, index of the generated token, vocabulary id), by Philox counters, so a sample cannot depend
on batch, device, rank or on steps that were thrown away. Nothing is sorted: filters find their
thresholds in integer sums, which no order of summation can change.

R rows (sequences)   V vocabulary   W words of it   K alternatives   B biases of the whole batch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama.sampling_params import SamplingParams as SamplingParams
from llama.sampling_params import plain_number as plain_number

# Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011)
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF  # a 32-bit word in an int64

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

TOP_P_BITS = 24  # of a float32's mantissa: top_p is kept as an integer share of 2**24
WEIGHT_SCALE = 2.0**40  # weights as integers: the most probable token weighs 2**40
DIGIT_BITS = 10  # the bits of a float32 in [0, 1] are 30: three digits
RADIX = 2**DIGIT_BITS
UNREACHABLE = 2**62  # a goal that no sum reaches: nothing is filtered
AT_ONCE = 2**22  # logits that are chosen from at a time, which bounds what that takes
BYTES_AT_ONCE = 64  # a logit, at most, while it is chosen from
SHIFTED_ROWS = 16  # that a captured step chooses for at a time, for the same reason


@dataclass(frozen=True, kw_only=True)
class RowParams:
    """The parameters of R rows as tensors, with what the host must know to skip work.

    Built when the set of running rows changes, used at every step in between.
    """

    temperature: Tensor  # (R, 1) float32, at least the smallest normal number
    greedy: Tensor  # (R, 1) bool
    min_p: Tensor  # (R, 1) float32
    presence_penalty: Tensor  # (R, 1) float32
    frequency_penalty: Tensor  # (R, 1) float32
    top_p: Tensor  # (R, 1) int64, in units of 2**-24; 2**24 filters nothing
    top_k: Tensor  # (R, 1) int64; UNREACHABLE filters nothing
    seed: Tensor  # (R, 2) int64, the low and the high word
    bias: tuple[Tensor, Tensor, Tensor] | None  # rows (B,), ids (B,) int64, shifts (B,) float32

    any_greedy: bool
    any_sampled: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    penalised: bool
    shift: Tensor | None = None  # (R, V) float32, added to the logits: as a captured step has it

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device
    ) -> RowParams:
        """The rows of a batch. Where a seed of params is None the caller has drawn one: `seeds`."""
        assert len(seeds) == len(params) > 0, (len(seeds), len(params))
        drawn = [p for p in params if p.temperature > 0]
        shares = [max(1, round(p.top_p * 2**TOP_P_BITS)) for p in params]
        reals = torch.tensor(
            [
                [max(p.temperature, SMALLEST_NORMAL) for p in params],
                [p.min_p for p in params],
                [p.presence_penalty for p in params],
                [p.frequency_penalty for p in params],
            ],
            dtype=torch.float32,
        ).to(device)  # (4, R)
        whole = torch.tensor(
            [
                [p.temperature == 0 for p in params],
                shares,
                [min(p.top_k or UNREACHABLE, UNREACHABLE) for p in params],
                [seed & WORD for seed in seeds],
                [seed >> 32 & WORD for seed in seeds],
            ],
            dtype=torch.int64,
        ).to(device)  # (5, R)
        return cls(
            temperature=reals[0, :, None],
            greedy=whole[0, :, None] == 1,
            min_p=reals[1, :, None],
            presence_penalty=reals[2, :, None],
            frequency_penalty=reals[3, :, None],
            top_p=whole[1, :, None],
            top_k=whole[2, :, None],
            seed=whole[3:].T,
            bias=_flat_bias(params, device),
            any_greedy=len(drawn) < len(params),
            any_sampled=bool(drawn),
            any_top_k=any(p.top_k > 0 for p in drawn),
            any_top_p=any(p.top_p < 1 for p in drawn),
            any_min_p=any(p.min_p > 0 for p in drawn),
            penalised=any(p.presence_penalty != 0 or p.frequency_penalty != 0 for p in params),
        )

    def part(self, low: int, high: int, words: int) -> RowParams:
        """Rows low to high, and of their biases those of the first `words` ids; the others add 0
        to some logit, since taking them out would make the host wait."""
        bias = self.bias
        if bias is not None:
            at_rows, at_ids, shifts = bias
            here = (at_rows >= low) & (at_rows < high) & (at_ids < words)
            bias = (
                (at_rows - low).clamp(0, high - low - 1),
                at_ids.clamp(max=words - 1),
                shifts.where(here, 0.0),
            )
        shift = None if self.shift is None else self.shift[low:high, :words]
        cut = {name: getattr(self, name)[low:high] for name in ROW_TENSORS}
        return replace(self, bias=bias, shift=shift, **cut)


ROW_TENSORS = ("temperature", "greedy", "min_p", "presence_penalty", "frequency_penalty", "top_p",
               "top_k", "seed")  # fmt: skip


def _flat_bias(
    params: Sequence[SamplingParams], device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    flat = [(r, i, s) for r, p in enumerate(params) for i, s in (p.logit_bias or {}).items()]
    if not flat:
        return None
    rows, ids, shifts = zip(*flat, strict=True)
    return (
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(ids, dtype=torch.int64).to(device),
        torch.tensor(shifts, dtype=torch.float32).to(device),
    )


def sample(
    logits: Tensor,
    rows: RowParams,
    index: Tensor,
    counts: Tensor | Sequence[Sequence[int]] | None = None,
    words: int | None = None,
) -> Tensor:
    """The next token of every row: ids (R,) int64, with no wait of the host for the device.

    logits (R, V) float32, not written to; a token at -inf is never chosen, nor is an id from
    `words` on (None: V), of which a bias then means nothing; rows that `finite_rows` refuses give
    some id or other. index (R,) int64: how many tokens the row generated before this one. counts
    (R, V), any integers: how often it generated each, read where `rows.penalised`; or the tokens
    themselves, which are then counted for a few rows at a time.
    """
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.shape[-1] <= 2**21, logits.shape  # sums of weights stay below UNREACHABLE
    words = logits.shape[-1] if words is None else min(words, logits.shape[-1])
    chosen, slices = [], _slices(logits, light=not rows.any_sampled)
    if (
        len(slices) == 1
        and words == logits.shape[-1]
        and (counts is None or torch.is_tensor(counts))
    ):
        return _sample(logits, rows, index, counts)
    for low, high in slices:
        part, open_to = rows.part(low, high, words), logits[low:high, :words]
        some = None if counts is None else counts[low:high]
        if some is not None and not isinstance(some, Tensor):
            some = count_tokens(torch.zeros_like(logits[low:high]), some)
        some = None if some is None else some[:, :words]
        chosen.append(_sample(open_to, part, index[low:high], some))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _slices(logits: Tensor, light: bool) -> list[tuple[int, int]]:
    """Where rows begin and end that are worked on at a time, of logits (R, V): four times as many
    where little is made of each."""
    count, step = len(logits), max(1, AT_ONCE * (4 if light else 1) // logits.shape[-1])
    return [(low, min(low + step, count)) for low in range(0, count, step)]


def _sample(logits: Tensor, rows: RowParams, index: Tensor, counts: Tensor | None) -> Tensor:
    """`sample` for rows that are worked on at one time, (R, W)."""
    logits = shifted(logits, rows, counts)
    if not rows.any_sampled:
        return logits.argmax(-1)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(rows.temperature)  # (R, V), <= 0
    kept = survivors(scaled, rows)
    scores = scaled.add_(gumbel(rows.seed, index, logits.shape[-1]))
    if kept is not None:
        scores = torch.where(kept, scores, -math.inf)
    if rows.any_greedy:
        scores = torch.where(rows.greedy, logits, scores)
    return scores.argmax(-1)


def count_tokens(counts: Tensor, generated: Sequence[Sequence[int]]) -> Tensor:
    """Add to counts (R, V) how often each of the first rows generated each token; returns them."""
    rows = [row for row, tokens in enumerate(generated) for _ in tokens]
    ids = [token for tokens in generated for token in tokens]
    at_rows, at_ids = torch.tensor([rows, ids], dtype=torch.int64).to(counts.device)
    return counts.index_put_((at_rows, at_ids), counts.new_ones(()), accumulate=True)


def finite_rows(logits: Tensor) -> Tensor:
    """(R, V) -> (R,) bool: False where a row has NaN or +inf, or nothing but -inf."""
    return logits.amax(-1).isfinite()  # amax passes NaN on


def logprobs_of(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the model itself thinks of its tokens, before any bias, penalty, temperature or filter.

    logits (R, V), ids (R,) -> log-probabilities of ids (R,), the k most probable ids (R, K) in
    falling order (among equals, the order is the device's), their log-probabilities (R, K).
    """
    found = []
    for low, high in _slices(logits, light=True):
        logprobs = logits[low:high].log_softmax(-1)
        top = logprobs.topk(k, -1)
        found.append((logprobs.gather(-1, ids[low:high, None])[:, 0], top.indices, top.values))
    of_ids, top_ids, tops = (
        found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    )
    return of_ids, top_ids, tops


def shifted(logits: Tensor, rows: RowParams, counts: Tensor | None) -> Tensor:
    """Logits (R, V) with the penalties of the tokens generated so far, then the biases."""
    if rows.penalised:
        assert counts is not None, "rows with penalties need counts"
        assert counts.shape == logits.shape, (counts.shape, logits.shape)
        logits = logits - rows.presence_penalty * (counts > 0) - rows.frequency_penalty * counts
    if rows.bias is not None:
        at_rows, at_ids, shifts = rows.bias
        logits = logits.index_put((at_rows, at_ids), shifts, accumulate=True)
    return logits if rows.shift is None else logits + rows.shift


def survivors(scaled: Tensor, rows: RowParams) -> Tensor | None:
    """Which tokens top_k, top_p and min_p leave, (R, V) bool; None where no row filters.

    scaled (R, V) float32: logits less the row's maximum, over temperature. A filter keeps the
    tokens whose odds, exp(scaled) in [0, 1], are at least its threshold. Floats >= 0 are in the
    order of their bit patterns, so thresholds are searched among patterns, digit by digit. For
    top_p a token weighs odds * 2**40, rounded down.
    """
    if not (rows.any_top_k or rows.any_top_p or rows.any_min_p):
        return None
    odds = scaled.exp()  # (R, V); the most probable token's is 1
    bits = odds.view(torch.int32)
    least = torch.zeros_like(rows.min_p, dtype=torch.int32)  # (R, 1)
    if rows.any_top_k:
        ones = torch.ones_like(bits, dtype=torch.int64)
        least = _threshold(bits, ones, rows.top_k)
    if rows.any_top_p:
        weights = (odds * WEIGHT_SCALE).long()
        if rows.any_top_k:
            weights = torch.where(bits >= least, weights, 0)
        least = torch.maximum(least, _threshold(bits, weights, _share(weights, rows.top_p)))
    if rows.any_min_p:
        least = torch.maximum(least, rows.min_p.view(torch.int32))
    return bits >= least


def _share(weights: Tensor, top_p: Tensor) -> Tensor:
    """top_p of each row's total weight, in two parts, so that no product leaves 64 bits."""
    total = weights.sum(-1, keepdim=True)  # (R, 1)
    high, low = total >> TOP_P_BITS, total & (2**TOP_P_BITS - 1)
    share = high * top_p + ((low * top_p) >> TOP_P_BITS)
    return torch.where(top_p == 2**TOP_P_BITS, UNREACHABLE, share)


def _threshold(bits: Tensor, weights: Tensor, goal: Tensor) -> Tensor:
    """The largest t with sum(weights[bits >= t]) >= goal, and 0 where no t has it.

    bits (R, V) int32 below 2**30, weights (R, V) int64 >= 0, goal (R, 1) int64 -> t (R, 1) int32.
    Digit by digit: a histogram of the weights tells t's digit; weights of other digits then leave,
    and the goal is lowered by what lay above.
    """
    threshold = torch.zeros_like(goal)
    for shift in (2 * DIGIT_BITS, DIGIT_BITS, 0):
        digits = (bits >> shift & (RADIX - 1)).long()  # (R, V)
        histogram = weights.new_zeros(weights.shape[0], RADIX).scatter_add_(-1, digits, weights)
        upto = histogram.cumsum(-1)  # (R, RADIX)
        above = upto[:, -1:] - upto
        digit = ((above + histogram >= goal).sum(-1, keepdim=True) - 1).clamp_(min=0)  # (R, 1)
        threshold = threshold << DIGIT_BITS | digit
        goal = goal - above.gather(-1, digit)
        weights = torch.where(digits == digit, weights, 0)
    return threshold.int()


def gumbel(seed: Tensor, index: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise (R, V) float32 of seeds (R, 2) and indices (R,) of the generated tokens.

    argmax(scaled + noise) is a draw from softmax(scaled). A token's number is word id % 4 of the
    Philox block whose counter is (id // 4, low word of index, high word of index, 0) and whose key
    is the seed. The noise is -log(-log1p(-u)), u = (word + 0.5) / 2**32: it is large, and lifts a
    rare token, where u is near 0 and floats are dense. What 32 bits cost: a token of probability p
    is drawn with p * x / sinh(x), x = 2**-33 / p, which is p to 1 % for all p above 2**-31.
    Words are equal on all devices; logarithms may differ in the last bit.
    """
    blocks = torch.arange((vocab_size + 3) // 4, device=seed.device)  # (V / 4,)
    step = index[:, None]  # (R, 1)
    counter = (blocks[None], step & WORD, step >> 32, torch.zeros_like(step))
    words = philox(counter, (seed[:, :1], seed[:, 1:]))
    word = torch.stack([w.float() for w in words], -1).flatten(1)[:, :vocab_size]  # (R, V)
    minus_u = word.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return minus_u.log1p_().neg_().log_().neg_()


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four random words of a counter and a key.

    All are int64 tensors of words (0 to 2**32 - 1), of any shapes that broadcast. Products wrap
    modulo 2**64; bits above a word are masked only where the next product would see them.
    """
    a, b, c, d = counter
    left, right = key
    for turn in range(PHILOX_ROUNDS):
        if turn:
            left, right = left + PHILOX_KEY_STEPS[0], right + PHILOX_KEY_STEPS[1]
        from_a, from_c = a * PHILOX_MULTIPLIERS[0], c * PHILOX_MULTIPLIERS[1]
        a, b, c, d = (
            ((from_c >> 32) ^ b ^ left) & WORD,
            from_c,
            ((from_a >> 32) ^ d ^ right) & WORD,
            from_a,
        )
    return a, b & WORD, c, d & WORD
