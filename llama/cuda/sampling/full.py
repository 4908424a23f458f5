"""The choice of a full step: one whose rows ask for more than temperature and top_p.

Penalties, biases, top_k, min_p and the most probable alternatives are computed by llama.sampling's
own functions, on tensors whose addresses never change, so that a step can be captured. A step that
needs none of them is lean, and chooses by lean.py. This file knows rows, and no requests.
The surprising thing: how often each row generated each token is counted on the device, so that a
penalty knows the token of the step before, which the host has not seen.

Letters: R rows, V vocabulary, K alternatives.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llama.cuda.sampling.lean import Sampler
from llama.sampling import (
    ROW_TENSORS,
    SHIFTED_ROWS,
    RowParams,
    SamplingParams,
    count_tokens,
    finite_rows,
    logprobs_of,
    sample,
)


class Shifts:
    """Holds parameters, counts and alternatives of up to `max_rows` rows, allocated when needed."""

    counts: Tensor  # (R, V) float32: how often each token was generated
    shift: Tensor  # (R, V) float32, added to the logits: biases
    top_ids: Tensor  # (R, K) int64
    tops: Tensor  # (R, K) float32

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device, n_words: int | None = None
    ) -> None:
        """Ids from `n_words` on are never chosen."""
        self.shape, self.device, self.n_words = (max_rows, vocab_size), device, n_words
        self.rows: RowParams | None = None

    def load(self, rows: Sequence[tuple[SamplingParams, int, Sequence[int]]], padded: int) -> None:
        """Set the parameters, seeds and generated tokens of the first rows, up to `padded`."""
        idle = [SamplingParams(temperature=0)] * (padded - len(rows))
        params = [p for p, _, _ in rows] + idle
        seeds = [seed for _, seed, _ in rows] + [0] * len(idle)
        if self.rows is None:
            self._allocate()
        assert self.rows is not None
        new = RowParams.from_params(params, seeds, self.device)
        for name in ROW_TENSORS:
            getattr(self.rows, name)[:padded] = getattr(new, name)
        self.shift[:padded] = 0
        if new.bias is not None:
            at_rows, at_ids, shifts = new.bias
            self.shift.index_put_((at_rows, at_ids), shifts, accumulate=True)
        self.counts[:padded] = 0
        count_tokens(self.counts, [generated for _, _, generated in rows])

    def _allocate(self) -> None:
        max_rows = self.shape[0]
        like = RowParams.from_params([SamplingParams()] * max_rows, [0] * max_rows, self.device)
        every = dict.fromkeys(FLAGS, True)
        self.counts, self.shift = (torch.zeros(self.shape, device=self.device) for _ in range(2))
        self.rows = replace(like, shift=self.shift, **every)  # type: ignore[arg-type]
        self.top_ids = torch.zeros(max_rows, 1, dtype=torch.int64, device=self.device)
        self.tops = torch.zeros(max_rows, 1, device=self.device)

    def reserve(self, top: int) -> bool:
        """Make room for `top` alternatives a row; return whether `top_ids` and `tops` are new."""
        if self.rows is None:
            self._allocate()
        if self.top_ids.shape[1] >= top:
            return False
        self.top_ids = self.top_ids.new_zeros(self.shape[0], top)
        self.tops = self.tops.new_zeros(self.shape[0], top)
        return True

    def __call__(
        self, logits: Tensor, index: Tensor, slots: Tensor, sampler: Sampler, top: int
    ) -> None:
        """Choose for logits (R, V): ids, logprob and finite into `sampler`, `top` alternatives
        into `top_ids` and `tops`. Counts the choice of each row that has a slot."""
        assert self.rows is not None, "load comes first"
        for start in range(0, len(logits), SHIFTED_ROWS):
            part = slice(start, min(start + SHIFTED_ROWS, len(logits)))
            rows = self.rows.part(part.start, part.stop, self.shape[1])
            ids = sample(logits[part], rows, index[part], self.counts[part], self.n_words)
            logprob, top_ids, tops = logprobs_of(logits[part], ids, top)
            sampler.ids[part], sampler.logprob[part] = ids, logprob
            sampler.finite[part] = finite_rows(logits[part]).int()
            if top:
                self.top_ids[part, :top], self.tops[part, :top] = top_ids, tops
            live = (slots[part] >= 0).float()[:, None]
            self.counts[part].scatter_add_(1, ids[:, None], live)


FLAGS = ("any_greedy", "any_sampled", "any_top_k", "any_top_p", "any_min_p", "penalised")
